"""The first stage of RLHF: supervised fine-tuning. A model learns to write the completions of a dataset."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pairtune.completion_data import Example, ExampleDataset, load_examples
from pairtune.config import SFTConfig
from pairtune.errors import PairtuneError
from pairtune.maths.statistics import Interval, bootstrap_ratio
from pairtune.models.loading import LoadedPolicy, load_policy, load_tokenizer
from pairtune.models.logprobs import Layout, causal_lm
from pairtune.runs.memory import LESS_LOADED, out_of_memory
from pairtune.stages.optimization import TrainResult
from pairtune.stages.supervised import TaskLoss, begin_display, loading_words, prepare_run, train_supervised

EVALUATION_BATCH = 16
"""Held-out examples of a forward pass."""


def sft(
    config: SFTConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> TrainResult:
    """Fine-tune a model on completions, on the assistant's turns of conversations, or on plain text.

    The loss of an update is the mean negative log-likelihood, nats a token, over the learned tokens of all its
    examples, EOS among them: long completions count for more, as in pretraining. What cannot be written in a
    configuration may be passed in: a model in memory with its tokenizer, and datasets (lists of rows or
    `datasets.Dataset`). Raises PairtuneError, in one sentence, for everything that a user can mend.
    """
    device = prepare_run(config)
    with contextlib.ExitStack() as stack:
        # What can be refused is refused before the model is loaded.
        if tokenizer is None:
            tokenizer = load_tokenizer(
                config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code
            )
        train_data, held_out = load_examples(config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
        display = begin_display(
            config,
            stack,
            len(train_data.examples),
            notes=train_data.notes,
            held_out=[] if held_out is None else held_out.notes,
        )
        with display.phase("loading the model"), out_of_memory("loading the model", LESS_LOADED):
            policy = load_policy(
                model if model is not None else config.model,
                tokenizer=tokenizer,
                with_reference=False,
                **loading_words(config, device),
            )
        task = SFTTask(policy, train_data, held_out, num_eval_examples=config.num_eval_examples, packing=config.packing)
        for note in policy.notes:
            display.message(note)
        if config.packing and not task.packing:
            display.message(
                "no packing: this architecture does not let examples share a row unseen by each other, so each has a "
                "row of its own beside others of like length"
            )
        run_dir = Path(config.output_dir)
        return train_supervised(config, task, run_dir, display, stack, derived=_with_perplexity, pack=task.pack)


class SFTTask:
    """Examples, and the model that learns them."""

    def __init__(
        self,
        policy: LoadedPolicy,
        train_data: ExampleDataset,
        held_out: ExampleDataset | None = None,
        *,
        num_eval_examples: int | None = None,
        packing: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.masters = policy.model, policy.tokenizer, policy.masters
        self.device, self.dtype = policy.device, policy.dtype
        self._scorer = policy.scorer
        self.packing = packing and policy.scorer.shared
        """Whether examples share rows: what lets completions share their prompt's row lets examples, too."""
        self._examples = train_data.examples
        self._held_out = [] if held_out is None else held_out.examples[:num_eval_examples]
        self.num_rows, self.num_eval_rows = len(self._examples), len(self._held_out)
        for dataset in filter(None, (train_data, held_out)):
            _check_context(policy.model, dataset)

    def length(self, row: int) -> int:
        return len(self._examples[row].ids)

    def counted(self, rows: Sequence[int]) -> int:
        return sum(len(self._examples[row].learned) for row in rows)

    def pack(self, rows: Sequence[int]) -> list[list[int]]:
        """Which examples share a row of a forward pass, the fullest rows first. None is longer than the longest
        example: attention costs the square of a row's length."""
        if not self.packing:
            return [[row] for row in rows]
        lengths = [_num_inputs(self._examples[row]) for row in rows]
        return [[rows[place] for place in bin] for bin in best_fit(lengths, max(lengths, default=0))]

    def loss(self, rows: Sequence[Sequence[int]]) -> TaskLoss:
        """Of rows as `pack` makes them."""
        layout = example_layout([[self._examples[row] for row in together] for together in rows], self.device)
        logprobs, _ = self._scorer.logprobs(layout)
        num_tokens, room = layout.num_tokens, layout.segments.numel()
        return TaskLoss(-logprobs.sum(), {"padding": (room - num_tokens, room)}, num_tokens)

    def evaluate(self, advance: Callable[[float], None]) -> dict[str, Any]:
        """`loss`, nats a token, and `perplexity`, each with its interval over the held-out examples."""
        by_length = sorted(range(self.num_eval_rows), key=lambda row: len(self._held_out[row].ids))
        nats = torch.zeros(self.num_eval_rows, dtype=torch.float64)
        for start in range(0, self.num_eval_rows, EVALUATION_BATCH):
            rows = by_length[start : start + EVALUATION_BATCH]
            layout = example_layout([[self._held_out[row]] for row in rows], self.device)
            logprobs, _ = self._scorer.logprobs(layout)
            nats[rows] = -logprobs.double().sum((1, 2)).cpu()
            advance(len(rows))
        if not nats.isfinite().all():
            raise PairtuneError(
                "the model gives log-probabilities that are not finite; lower learning_rate and start again, or check "
                "the weights of the model that it started from."
            )
        num_tokens = torch.tensor([len(example.learned) for example in self._held_out])
        loss = bootstrap_ratio(nats, num_tokens)
        return {
            "num_examples": self.num_eval_rows,
            "num_tokens": int(num_tokens.sum()),
            "loss": loss._asdict(),
            "perplexity": Interval(*map(_perplexity, loss))._asdict(),
        }

    def save_model(self, path: Path) -> None:
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)


def example_layout(rows: Sequence[Sequence[Example]], device: torch.device | str = "cpu") -> Layout:
    """The examples of each row one behind the other, blind to each other, positions restarted, right-padded; P = R
    rows, K the most examples of one row, T the most tokens that one example learns.

    Where no row has more than one, the layout is plain, so that every architecture can take it. The last token of an
    example is only ever predicted, so no row holds it.
    """
    width = max(sum(map(_num_inputs, examples)) for examples in rows)
    num_learned = max(len(example.learned) for examples in rows for example in examples)
    shape = len(rows), max(map(len, rows)), num_learned
    ids, positions = torch.zeros((2, len(rows), width), dtype=torch.int64)
    segments = torch.full((len(rows), width), -1)
    source, targets = torch.zeros((2, *shape), dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, examples in enumerate(rows):
        start = 0
        for k, example in enumerate(examples):
            tokens, learned = torch.tensor(example.ids), torch.tensor(example.learned)
            here, learns = slice(start, start + _num_inputs(example)), slice(len(learned))
            ids[row, here], positions[row, here] = tokens[:-1], torch.arange(len(tokens) - 1)
            segments[row, here] = k + 1
            source[row, k, learns], targets[row, k, learns] = start + learned - 1, tokens[learned]
            mask[row, k, learns] = True
            start = here.stop
    return Layout(
        input_ids=ids.to(device),
        position_ids=positions.to(device),
        segments=segments.to(device),
        source=source.to(device),
        targets=targets.to(device),
        mask=mask.to(device),
        shared=shape[1] > 1,
    )


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The places of `lengths` in as few bins as the best-fit decreasing rule takes, the fullest first.

    Each goes, the longest first, into the fullest bin that has room for it; at most 11/9 of the fewest bins possible,
    and one (Johnson 1973). TRL's `bfd` is the same rule. No length may exceed the capacity.
    """
    bins: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        fitting = [bin for bin, left in enumerate(room) if left >= lengths[place]]
        if fitting:
            chosen = min(fitting, key=room.__getitem__)
        else:
            chosen = len(bins)
            bins.append([])
            room.append(capacity)
        bins[chosen].append(place)
        room[chosen] -= lengths[place]
    return [bins[bin] for bin in sorted(range(len(bins)), key=room.__getitem__)]


def _num_inputs(example: Example) -> int:
    """Tokens of an example that the model reads."""
    return len(example.ids) - 1


def _check_context(model: Any, dataset: ExampleDataset) -> None:
    """Raises PairtuneError where an example is longer than the model can read."""
    longest = max(len(example.ids) for example in dataset.examples)
    context = getattr(causal_lm(model).config, "max_position_embeddings", None)
    if context is not None and longest - 1 > context:
        raise PairtuneError(
            f"an example of {dataset.name} has {longest} tokens, but the model reads at most {context}; "
            f"set max_length to {context} or less."
        )


def _with_perplexity(metrics: dict[str, float]) -> dict[str, float]:
    return {"perplexity": _perplexity(metrics["loss"])}


def _perplexity(loss: float) -> float:
    """exp of nats a token; infinite where a float cannot hold it."""
    return math.exp(loss) if not loss > 700 else math.inf
