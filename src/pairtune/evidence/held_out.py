"""Stored completions scored again, by rewards that nobody trained on: their own tokens, the columns of their rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pairtune.config import TrainConfig
from pairtune.data import PromptDataset, load_held_out
from pairtune.errors import PairtuneError
from pairtune.evidence.runs import Line, Run, evaluation_samples, read_json
from pairtune.experience import decode
from pairtune.feedback.rewards import RewardSet, load_rewards
from pairtune.models.loading import load_tokenizer
from pairtune.runs.display import progress
from pairtune.runs.folder import without_nan, write_atomic
from pairtune.types import Completions

HELD_OUT = "held_out.json"
BATCH = 128
"""Completions scored at a time."""


LOADED_BY = (
    *("model", "model_revision", "trust_remote_code", "dataset_test_split", "prompt_column", "chat"),
    *("system_prompt", "max_prompt_length", "device", "reward_batch_size"),
)
"""Words that decide, besides the dataset, what is loaded to score a run."""


@dataclass(frozen=True)
class _Scorer:
    """What scores completions."""

    tokenizer: Any
    prompts: PromptDataset
    rewards: RewardSet


Loaded = dict[str, _Scorer]
"""What was loaded for the runs before, by what decides it."""


def held_out_scores(
    run: Run, reward_funcs: Sequence[str], *, step: int | None = None, loaded: Loaded | None = None
) -> list[float | None]:
    """A reward for each sample of an evaluation (the last), in their order; None where no function answered.

    What was scored once is kept in the run folder's held_out.json, so that it is not scored again. Give one dictionary
    as `loaded` for several runs: what all of them need is then loaded once and kept in it. Raises PairtuneError
    for a reward function that cannot be loaded or that fails, and where a row's prompt is no longer what was sampled.
    """
    lines = evaluation_samples(run, step)
    step = lines[0]["step"] if lines else -1
    path = run.folder / HELD_OUT
    kept = read_json(path) or {}
    if kept.get("reward_funcs") != list(reward_funcs):
        kept = {"reward_funcs": list(reward_funcs), "scores": {}}
    if str(step) not in kept["scores"]:
        kept["scores"][str(step)] = without_nan(_scored(run, lines, reward_funcs, {} if loaded is None else loaded))
        write_atomic(path, json.dumps(kept, allow_nan=False) + "\n")
    return list(kept["scores"][str(step)])


def _scored(run: Run, lines: Sequence[Line], reward_funcs: Sequence[str], loaded: Loaded) -> list[float | None]:
    config = TrainConfig(**run.config).model_copy(
        update={"reward_funcs": list(reward_funcs), "reward_weights": None, "missing_eos_penalty": None}
    )
    scorer = _scorer(run, config, loaded)
    tokenizer, prompts, rewards = scorer.tokenizer, scorer.prompts, scorer.rewards
    groups: dict[int, list[int]] = {}
    for number, line in enumerate(lines):
        if line["row"] >= len(prompts) or prompts.prompts[line["row"]] != line["prompt"]:
            raise PairtuneError(
                f"held_out_reward_funcs: row {line['row']} of {config.dataset} is no longer the prompt that "
                f"{run.folder} was evaluated on; restore the dataset."
            )
        groups.setdefault(line["row"], []).append(number)
    found: list[float | None] = [None] * len(lines)
    num_drawn = len(next(iter(groups.values())))
    rows = list(groups)
    size = max(1, BATCH // num_drawn)
    with progress(f"scoring {run.name} by held-out rewards", len(rows)) as advance:
        for part in (rows[start : start + size] for start in range(0, len(rows), size)):
            batch = prompts.batch(part)
            numbers = torch.tensor([groups[row] for row in part])
            completions = _completions(batch.ids, batch.mask, [[lines[i] for i in row] for row in numbers.tolist()])
            scores = rewards.score(
                batch,
                completions,
                decode(tokenizer, completions),
                trainer_state=SimpleNamespace(global_step=lines[0]["step"], max_steps=config.max_steps),
                update_scale=False,
            )
            for i, value, known in zip(
                numbers.flatten().tolist(),
                scores.raw_rewards.flatten().tolist(),
                scores.reward_mask.flatten().tolist(),
                strict=True,
            ):
                found[i] = value if known else None
            advance(len(part))
    return found


def _scorer(run: Run, config: TrainConfig, loaded: Loaded) -> _Scorer:
    """What scores this run: of the runs before where that is the same, else newly loaded."""
    source = [config.dataset, config.dataset_config] if config.eval_dataset is None else [config.eval_dataset]
    key = json.dumps([config.reward_funcs, source, *(getattr(config, word) for word in LOADED_BY)])
    if key not in loaded:
        tokenizer = load_tokenizer(
            config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code
        )
        prompts = load_held_out(config, tokenizer)
        if prompts is None:
            raise PairtuneError(f"held_out_reward_funcs: {run.folder} has no held-out prompts; set dataset_test_split.")
        loaded[key] = _Scorer(tokenizer, prompts, load_rewards(config, tokenizer, prompts))
    return loaded[key]


def _completions(prompt_ids: Tensor, prompt_mask: Tensor, groups: Sequence[Sequence[Line]]) -> Completions:
    """The stored tokens as they were sampled."""
    lengths = torch.tensor([[len(line["completion_ids"]) for line in group] for group in groups])
    width = int(lengths.max())
    ids = torch.tensor([[_padded(line["completion_ids"], width) for line in group] for group in groups])
    mask = torch.arange(width) < lengths[..., None]
    return Completions(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        completion_ids=ids,
        completion_mask=mask,
        sampler_logprobs=torch.zeros(mask.shape),
        truncated=torch.tensor([[bool(line["truncated"]) for line in group] for group in groups]),
        policy_version=0,
    )


def _padded(ids: list[int], width: int) -> list[Any]:
    return ids + [0] * (width - len(ids))
