"""The second stage of RLHF: reward learning. A model learns to score completions as comparisons of them say."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtune.config import RewardConfig, RewardLearningConfig
from pairtune.errors import PairtuneError
from pairtune.feedback.comparisons import (
    Comparisons,
    evaluate_comparisons,
    evaluation_line,
    load_comparisons,
    report_dict,
    report_table,
)
from pairtune.feedback.reward_model import SHIFT
from pairtune.maths.calibration import PairEvaluation
from pairtune.maths.linear_reward import fit_linear_reward
from pairtune.maths.masking import masked_mean
from pairtune.maths.reward_learning import (
    bradley_terry_loss,
    centring_penalty,
    pairwise_ranking_loss,
    plackett_luce_loss,
)
from pairtune.models.loading import load_tokenizer
from pairtune.models.logprobs import Layout, make_layout
from pairtune.models.reward_backbone import RewardBackbone, TrunkCache, load_reward_backbone
from pairtune.runs import checkpoint, distributed, folder
from pairtune.runs.memory import LESS_LOADED, out_of_memory
from pairtune.stages.optimization import TrainResult
from pairtune.stages.supervised import (
    TaskLoss,
    begin_display,
    loading_words,
    num_updates,
    prepare_run,
    train_supervised,
    updates_per_epoch,
)

EVALUATION_BATCH = 16
"""Held-out rows of a forward pass."""
FIT_ROWS = 4096
"""Training rows that a head is fitted to, at most."""
SHIFT_ROWS = 512
"""Training rows whose best completion the mean of `reward.normalise_mean` is taken over."""


def reward(
    config: RewardConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> TrainResult:
    """Learn a reward model from comparisons, by maximum likelihood (P3O paper, eq. 1).

    Every checkpoint is a sequence classifier with one label. After the last evaluation `reward_report.json` in the run
    folder says what the model is worth on the held-out comparisons. What cannot be written in a configuration may be
    passed in: a model in memory with its tokenizer, and datasets (lists of rows or `datasets.Dataset`). Raises
    PairtuneError, in one sentence, for everything that a user can mend.
    """
    device = prepare_run(config)
    run_dir = Path(config.output_dir)
    with contextlib.ExitStack() as stack:
        # What can be refused is refused before the model is loaded.
        if tokenizer is None:
            tokenizer = load_tokenizer(
                config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code
            )
        train_data, held_out = load_comparisons(
            config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
        display = begin_display(
            config,
            stack,
            len(train_data),
            notes=train_data.data.notes,
            held_out=[] if held_out is None else held_out.data.notes,
        )
        with display.phase("loading the model"), out_of_memory("loading the model", LESS_LOADED):
            backbone = load_reward_backbone(
                model if model is not None else config.model,
                tokenizer=tokenizer,
                num_layers=config.num_layers,
                seed=config.seed,
                **loading_words(config, device),
            )
        for note in backbone.notes:
            display.message(note)
        task = RewardTask(
            backbone,
            train_data,
            held_out,
            config=config.reward,
            num_eval_examples=config.num_eval_examples,
            cache_bytes=int(config.activation_cache_gb * 2**30),
            num_epochs=num_updates(config, len(train_data)) / updates_per_epoch(config, len(train_data))
            + config.reward.fit_head,
        )
        for note in task.notes:
            display.message(note)
        # A run that goes on has its head from the checkpoint.
        if config.reward.fit_head and not (config.resume and checkpoint.latest(run_dir)):
            mend = "set reward.fit_head: false, or give shorter completions (max_completion_length)"
            label = "fitting the head"
            with out_of_memory(label, mend), display.phase(label, min(task.num_rows, FIT_ROWS)) as advance:
                display.message(task.fit_head(advance=advance))
        result = train_supervised(config, task, run_dir, display, stack)
        if task.report is not None and result.finished:
            display.show(report_table(task.report))
            if distributed.is_main():
                folder.write_atomic(
                    run_dir / folder.REWARD_REPORT, _report_json(task, held_out, train_data, result.steps)
                )
        return result


class RewardTask:
    """Comparisons, and the reward model that learns them."""

    def __init__(
        self,
        backbone: RewardBackbone,
        train_data: Comparisons,
        held_out: Comparisons | None = None,
        *,
        config: RewardLearningConfig | None = None,
        num_eval_examples: int | None = None,
        cache_bytes: int = 0,
        num_epochs: float = math.inf,
    ) -> None:
        """`cache_bytes`: memory for what frozen lower layers make of rows that are met more than once; the training
        rows are, where `num_epochs` is above 1, and come first."""
        self.model, self.tokenizer, self.masters = backbone.model, backbone.tokenizer, backbone.masters
        self.device, self.dtype = backbone.device, backbone.dtype
        self.backbone = backbone
        self.report: PairEvaluation | None = None
        """Of the last evaluation."""
        self.reward_std = math.nan
        """Of all held-out rewards of that evaluation."""
        self._config = config or RewardLearningConfig()
        self._train_data, self._held_out = train_data, held_out
        self.num_rows = len(train_data)
        num_held_out = 0 if held_out is None else len(held_out)
        self.num_eval_rows = min(num_held_out, num_eval_examples or num_held_out)
        for comparisons in filter(None, (train_data, held_out)):
            self._check_context(comparisons)
        self.notes: list[str] = []
        """What was decided, for the user to read."""
        self._caches: dict[int, TrunkCache] = {}
        read_again = {id(train_data): (train_data, self.num_rows)} if num_epochs > 1 else {}
        if held_out is not None:
            read_again.setdefault(id(held_out), (held_out, self.num_eval_rows))
        for key, (comparisons, num_rows) in read_again.items():
            left = cache_bytes - sum(cache.num_bytes for cache in self._caches.values())
            self._caches[key] = self._cache(comparisons, num_rows, left)
        if kept := sum(cache.num_kept for cache in self._caches.values()):
            size = sum(cache.num_bytes for cache in self._caches.values()) / 2**30
            self.notes.append(
                f"the frozen layers meet {kept} rows once: what they make of them is kept, {size:.2g} GiB"
            )

    def length(self, row: int) -> int:
        return _num_tokens(self._train_data, row)

    def counted(self, rows: Sequence[int]) -> int:
        """Every row is one element of the loss, a ranking of many completions too."""
        return len(rows)

    def loss(self, rows: Sequence[int]) -> TaskLoss:
        rewards, mask, num_tokens = self._rewards(self._train_data, rows)
        losses = self._losses(rewards, mask, rows)
        if self._config.centring:
            # (2 mean)^2 is (chosen + rejected)^2 of a pair, and means the same for more than two.
            mean = masked_mean(rewards, mask, -1)
            losses = losses + self._config.centring * centring_penalty(mean, mean)
        pairs = [(i, *pair) for i, row in enumerate(rows) for pair in self._train_data.decided(row)]
        seen = rewards.detach().double().cpu()
        leads = [(seen[i, better] - seen[i, worse]).item() for i, better, worse in pairs]
        right = sum((lead > 0) + 0.5 * (lead == 0) for lead in leads)
        metrics = {
            "accuracy": (float(right), float(len(pairs))),
            "margin": (sum(leads), float(len(pairs))),
            "reward": (seen[mask.cpu()].sum().item(), float(mask.sum())),
        }
        return TaskLoss(losses.sum(), metrics, num_tokens)

    @torch.no_grad()
    def fit_head(
        self, rows: Sequence[int] | None = None, *, advance: Callable[[float], None] = lambda rows: None
    ) -> str:
        """Put the head in place that is most likely on the model as it stands, with a penalty chosen by
        cross-validation over prompts; `rows` are the first FIT_ROWS of the training rows unless given. Returns one
        sentence on it.

        A head drawn at random gives every completion a reward of its own that fine-tuning must first unlearn, and its
        gradients disturb the layers below meanwhile (Kumar et al. 2022, arXiv 2202.10054).
        """
        rows = range(min(self.num_rows, FIT_ROWS)) if rows is None else rows
        features, mask = self.ends(rows, advance=advance)
        keys = [tuple(self._train_data.data.prompt_dataset.token_ids[row]) for row in rows]
        number = {key: place for place, key in enumerate(dict.fromkeys(keys))}

        def loss(rewards: Tensor, places: Tensor) -> Tensor:
            return self._losses(rewards, mask[places], [rows[place] for place in places.tolist()])

        fitted = fit_linear_reward(features, loss, groups=torch.tensor([number[key] for key in keys]))
        self.backbone.set_head(fitted.weight)
        of_others = "" if math.isnan(fitted.loss) else f"; loss {fitted.loss:.3f} on rows that it was not fitted to"
        return f"the head was fitted to {len(rows)} rows, penalty {fitted.penalty:.2g}{of_others}"

    @torch.no_grad()
    def ends(
        self, rows: Sequence[int], *, advance: Callable[[float], None] = lambda rows: None
    ) -> tuple[Tensor, Tensor]:
        """What the head reads of training rows, (N, K, H) float32 on the CPU, and which of the completions there are,
        (N, K)."""
        features: list[Tensor] = [torch.empty(0)] * len(rows)
        masks = list(features)
        by_length = sorted(range(len(rows)), key=lambda place: self.length(rows[place]))
        for start in range(0, len(rows), EVALUATION_BATCH):
            places = by_length[start : start + EVALUATION_BATCH]
            layout, cached, mask = self._inputs(self._train_data, [rows[place] for place in places])
            states = self.backbone.ends(layout, cached).masked_fill(~mask[..., None], 0.0)
            for place, state, real in zip(places, states.cpu(), mask.cpu(), strict=True):
                features[place], masks[place] = state, real
            advance(len(places))
        return torch.stack(features), torch.stack(masks)

    def _losses(self, rewards: Tensor, mask: Tensor, rows: Sequence[int]) -> Tensor:
        """(P, K) -> (P,): what the configuration makes of the labels of these rows."""
        data = self._train_data
        if data.ranked:
            ranks = torch.zeros(mask.shape, dtype=torch.int64)
            for place, row in enumerate(rows):
                ranks[place, : len(data.data.rewards[row])] = -torch.tensor(data.data.rewards[row]).long()
            loss = plackett_luce_loss if self._config.loss == "plackett_luce" else pairwise_ranking_loss
            return loss(rewards, ranks.to(rewards.device), mask=mask)

        def of_rows(values: list[float] | None) -> Tensor | None:
            return None if values is None else rewards.new_tensor([values[row] for row in rows])

        return bradley_terry_loss(
            rewards[:, 0],
            rewards[:, 1],
            margin=of_rows(data.margins),
            probability=of_rows(data.probabilities),
            label_smoothing=self._config.label_smoothing,
        )

    def _rewards(self, comparisons: Comparisons, rows: Sequence[int]) -> tuple[Tensor, Tensor, int]:
        """Rewards (P, K), which of them there are (P, K), and how many tokens the model has read."""
        layout, features, mask = self._inputs(comparisons, rows)
        return self.backbone.rewards(layout, features), mask, layout.num_tokens

    def _inputs(self, comparisons: Comparisons, rows: Sequence[int]) -> tuple[Layout, Tensor | None, Tensor]:
        """What the model reads of rows, what its frozen layers are known to make of it, and which completions there
        are (P, K)."""
        batch = comparisons.closed.batch(rows, device=self.device)
        layout = make_layout(batch.completions, shared=self.backbone.shared, with_last=True)
        cache = self._caches.get(id(comparisons))
        return layout, None if cache is None else cache.features(rows, layout), batch.reward_mask

    def _cache(self, comparisons: Comparisons, num_rows: int, max_bytes: int) -> TrunkCache:
        """Of the first `num_rows` rows."""
        data, shared = comparisons.closed, self.backbone.shared

        def layout_of(row: int) -> Layout:
            return make_layout(data.batch([row], device=self.device).completions, shared=shared, with_last=True)

        prompts_read = 1 if shared else data.num_completions
        num_tokens = [
            prompts_read * len(data.prompt_dataset.token_ids[row]) + sum(len(one.ids) for one in data.completions[row])
            for row in range(num_rows)
        ]
        return TrunkCache(self.backbone, layout_of, num_tokens, max_bytes=max_bytes)

    def evaluate(self, advance: Callable[[float], None]) -> dict[str, Any]:
        """`accuracy`, `log_likelihood`, `temperature` and more, as `evaluation_line` has them."""
        assert self._held_out is not None
        held_out = self._held_out
        rewards = self.score(held_out, range(self.num_eval_rows), advance=advance)
        self.report = evaluate_comparisons(held_out, rewards)
        given = rewards[rewards.isfinite()]
        self.reward_std = given.std(correction=0).item()
        return {**evaluation_line(self.report), "reward_mean": given.mean().item(), "reward_std": self.reward_std}

    @torch.no_grad()
    def score(
        self,
        comparisons: Comparisons,
        rows: Sequence[int],
        *,
        advance: Callable[[float], None] = lambda rows: None,
    ) -> Tensor:
        """(n, K) float64 of the named rows, NaN where a row has no such completion. Raises PairtuneError for a reward
        that is not finite."""
        rewards = torch.full((len(rows), comparisons.data.num_completions), math.nan, dtype=torch.float64)
        by_length = sorted(range(len(rows)), key=lambda place: _num_tokens(comparisons, rows[place]))
        for start in range(0, len(rows), EVALUATION_BATCH):
            places = by_length[start : start + EVALUATION_BATCH]
            scores, mask, _ = self._rewards(comparisons, [rows[place] for place in places])
            if not torch.isfinite(scores[mask]).all():
                raise PairtuneError(
                    "the reward model gives rewards that are not finite; lower learning_rate and start again, or check "
                    "the weights of the model that it started from."
                )
            rewards[places] = scores.double().masked_fill(~mask, math.nan).cpu()
            advance(len(places))
        return rewards

    def save_model(self, path: Path) -> None:
        if self._config.normalise_mean:
            setattr(self.model.config, SHIFT, -self._mean_of_best())
        self.backbone.save(path)

    @torch.no_grad()
    def _mean_of_best(self) -> float:
        """The mean reward of the best completion of the first training rows: the demonstrations of a dataset of
        comparisons."""
        total, num_rows = 0.0, min(self.num_rows, SHIFT_ROWS)
        for start in range(0, num_rows, EVALUATION_BATCH):
            rows = range(start, min(start + EVALUATION_BATCH, num_rows))
            rewards, _, _ = self._rewards(self._train_data, rows)
            for place, row in enumerate(rows):
                ranked = self._train_data.data.rewards[row]
                total += rewards[place, ranked.index(max(ranked))].item()
        return total / num_rows

    def _check_context(self, comparisons: Comparisons) -> None:
        """Raises PairtuneError where a prompt with its completion is longer than the model can read."""
        data, context = comparisons.closed, self.backbone.context_length
        longest = max(
            len(prompt) + max(len(one.ids) for one in group)
            for prompt, group in zip(data.prompt_dataset.token_ids, data.completions, strict=True)
        )
        if context is not None and longest > context:
            raise PairtuneError(
                f"a prompt of {data.name} with its completion has {longest} tokens, but the model reads at most "
                f"{context}; lower max_prompt_length or max_completion_length."
            )


def _num_tokens(comparisons: Comparisons, row: int) -> int:
    data = comparisons.closed
    return len(data.prompt_dataset.token_ids[row]) + sum(len(one.ids) for one in data.completions[row])


def _report_json(task: RewardTask, held_out: Comparisons | None, train_data: Comparisons, step: int) -> str:
    assert task.report is not None
    assert held_out is not None
    content = {
        "step": step,
        "dataset": {"train": train_data.data.name, "held_out": held_out.data.name},
        "num_rows": {"train": len(train_data), "held_out": task.num_eval_rows},
        "left_out": {"train": train_data.data.notes, "held_out": held_out.data.notes},
        "reward_std": task.reward_std,
        "evaluation": report_dict(task.report),
    }
    return folder.as_json(content)
