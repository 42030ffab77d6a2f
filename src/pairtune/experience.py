"""collect(prompts) -> Experience: sample, score, reference log-probabilities; or read completions from a dataset.

Also what an earlier batch needs to be learned from again: its experience as tensors, to save and to come back from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pairtune.config import TrainConfig
from pairtune.data import shard
from pairtune.feedback.noise import NoisyRewards
from pairtune.feedback.preferences import PreferenceSet
from pairtune.feedback.rewards import RewardSet
from pairtune.models.loading import LoadedPolicy
from pairtune.models.logprobs import Layout
from pairtune.models.sampler import Sampler, SamplingParams
from pairtune.runs import distributed
from pairtune.types import Completions, Experience, Prompts, Targets, real_ids

if TYPE_CHECKING:
    from pairtune.completion_data import OfflineBatch, OfflineDataset

Phase = Callable[..., AbstractContextManager[Callable[[float], None]]]
"""phase(name, label, total=None): a part of a step, timed under its name and shown under its label; yields a progress
callback."""


@dataclass(frozen=True)
class Collected:
    """A batch of experience with what was computed on the way and is needed again."""

    experience: Experience
    layout: Layout
    features: Tensor | None
    """(R, W, H) the frozen trunk's output for every token, None where there is no frozen trunk."""
    texts: list[list[str]]
    """P lists of K completions as text."""
    metrics: dict[str, float]
    extras: dict[str, list[Any]]
    """Columns that reward functions asked to log, P*K values each."""
    forward_tokens: float = 0.0
    """Real tokens, padding left out, that went through a decoder on the way: in sampling (a prompt once, and every
    completion token but the last) and under the reference. A token that passes part of the layers counts for that
    part."""


def sampling_params(config: Any) -> SamplingParams:
    """The sampling words of a configuration."""
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_completion_length=config.max_completion_length,
        stop=tuple(config.stop),
    )


def decode(tokenizer: Any, completions: Completions) -> list[list[str]]:
    """P lists of K texts, special tokens left out."""
    num_generations = completions.completion_ids.shape[1]
    ids = real_ids(completions.completion_ids.flatten(0, 1), completions.completion_mask.flatten(0, 1))
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return [texts[i : i + num_generations] for i in range(0, len(texts), num_generations)]


def first_pass(config: TrainConfig, num_prompts: int, device: torch.device) -> list[Tensor]:
    """Indices of the prompts in each micro-batch of the first pass over this process's share of a batch.

    The reference and the old policy are evaluated in the same cuts: a matrix product of another shape may round
    otherwise.
    """
    minibatch_size = minibatch_share(config)
    minibatches = torch.arange(num_prompts, device=device).split(minibatch_size)
    return [
        prompts for minibatch in minibatches for prompts in minibatch.split(config.micro_batch_size or minibatch_size)
    ]


def minibatch_share(config: TrainConfig) -> int:
    """Prompts an optimizer update on one process."""
    return (config.minibatch_size or config.batch_size) // distributed.world_size()


@torch.no_grad()
def reference_logprobs(
    policy: LoadedPolicy, layout: Layout, features: Tensor | None, cuts: Sequence[Tensor], *, temperature: float
) -> Tensor:
    """(P, K, T) under the reference; `cuts` hold all prompts in order."""
    parts = []
    for prompts in cuts:
        part = None if features is None else layout.rows(prompts, features)
        parts.append(policy.reference.logprobs(layout.select(prompts), part, temperature=temperature)[0])
    return torch.cat(parts)


@torch.no_grad()
def trunk_features(policy: LoadedPolicy, layout: Layout, cuts: Sequence[Tensor]) -> Tensor | None:
    """(R, W, H) what the frozen trunk makes of the batch, or None where nothing is frozen."""
    if policy.scorer.trunk is None:
        return None
    parts = [policy.scorer.features(layout.select(prompts)) for prompts in cuts]
    return torch.cat([part for part in parts if part is not None])


def collect(
    prompts: Prompts,
    *,
    policy: LoadedPolicy,
    sampler: Sampler,
    feedback: RewardSet | NoisyRewards | PreferenceSet,
    config: TrainConfig,
    step: int,
    policy_version: int,
    phase: Phase,
) -> Collected:
    """One batch of experience: K completions of each prompt, their feedback, and the reference's log-probabilities."""
    with phase("sample", "sampling", config.max_completion_length) as advance:
        completions = sampler.generate(
            prompts,
            config.num_generations,
            sampling_params(config),
            seed=config.seed,
            stream=step,
            policy_version=policy_version,
            on_token=lambda done, total: advance(1),
        )
    with phase("score", "scoring"):
        texts = decode(policy.tokenizer, completions)
        state = SimpleNamespace(global_step=step, max_steps=config.max_steps)
        scores = feedback.score(prompts, completions, texts, trainer_state=state)
    with phase("ref_logprobs", "reference log-probabilities"):
        layout = policy.scorer.layout(completions)
        cuts = first_pass(config, len(prompts), policy.device)
        features = trunk_features(policy, layout, cuts)
        ref_logprobs = reference_logprobs(policy, layout, features, cuts, temperature=config.temperature)
    experience = Experience(
        completions=completions,
        rewards=scores.rewards.to(policy.device),
        reward_mask=scores.reward_mask.to(policy.device),
        ref_logprobs=ref_logprobs,
        preferences=None if scores.preferences is None else scores.preferences.to(policy.device),
        rows=prompts.rows,
        step=step,
    )
    sampled = int(completions.prompt_mask.sum() + (completions.num_tokens - 1).sum())
    forward_tokens = sampled + layout.num_tokens
    return Collected(experience, layout, features, texts, scores.metrics, scores.extras, forward_tokens)


# ------------------------------------------------------------------------------------------- completions from a dataset


def collect_offline(
    batch: OfflineBatch,
    *,
    policy: LoadedPolicy,
    references: ReferenceCache,
    config: TrainConfig,
    step: int,
    phase: Phase,
) -> Collected:
    """A batch of a dataset's completions with their rewards there, and the reference's log-probabilities."""
    with phase("ref_logprobs", "reference log-probabilities"):
        layout = policy.scorer.layout(batch.completions)
        cuts = first_pass(config, len(batch.prompts), policy.device)
        features = trunk_features(policy, layout, cuts)
        rows = batch.prompts.rows.tolist()
        forward_tokens = layout.num_tokens * (
            1 - policy.scorer.top_share + (policy.scorer.top_share if references.meets_new(rows, step) else 0)
        )
        ref_logprobs = references.logprobs(rows, layout, features, cuts, step=step)
    experience = Experience(
        completions=batch.completions,
        rewards=batch.rewards,
        reward_mask=batch.reward_mask,
        ref_logprobs=ref_logprobs,
        rows=batch.prompts.rows,
        step=step,
    )
    texts = decode(policy.tokenizer, batch.completions)
    return Collected(experience, layout, features, texts, {}, {}, forward_tokens)


class ReferenceCache:
    """The reference's log-probabilities of a dataset's completions, each computed once.

    A row's are computed with the batch in which it first comes. A resumed run, which has lost them, computes them with
    that same batch again: in another batch they could differ in the last bits.
    """

    def __init__(self, dataset: OfflineDataset, policy: LoadedPolicy, config: TrainConfig) -> None:
        self._dataset, self._policy, self._config = dataset, policy, config
        self._known: dict[int, Tensor] = {}
        """row -> the log-probabilities of all tokens of its completions, one after another."""
        self._first_step: dict[int, int] = {}
        self._steps_scanned = 0

    def logprobs(
        self, rows: list[int], layout: Layout, features: Tensor | None, cuts: Sequence[Tensor], *, step: int
    ) -> Tensor:
        """(P, K, T) of the rows of this step's batch, which `layout` holds."""
        if any(row not in self._known and self._first(row) == step for row in rows):
            self._compute(rows, layout, features, cuts)
        for row in rows:
            if row not in self._known:
                self._compute_again(row)
        empty = torch.zeros(layout.mask.shape, device=layout.mask.device)
        return empty.masked_scatter(layout.mask, torch.cat([self._known[row] for row in rows]).to(empty))

    def meets_new(self, rows: list[int], step: int) -> bool:
        """Whether a row of this step's batch comes for the first time, so that the batch goes through the reference."""
        return any(self._first(row) == step for row in rows)

    def _compute(self, rows: list[int], layout: Layout, features: Tensor | None, cuts: Sequence[Tensor]) -> None:
        logprobs = reference_logprobs(self._policy, layout, features, cuts, temperature=self._config.temperature)
        for row, row_logprobs, mask in zip(rows, logprobs, layout.mask, strict=True):
            self._known.setdefault(row, row_logprobs[mask].cpu())

    def _compute_again(self, row: int) -> None:
        """With the share of the batch in which the row first came."""
        everyone = self._dataset.step_rows(self._config.seed, self._first(row), self._config.batch_size)
        shares = [shard(everyone, rank, distributed.world_size()) for rank in range(distributed.world_size())]
        rows = next(share for share in shares if row in share)
        layout = self._policy.scorer.layout(self._dataset.batch(rows, device=self._policy.device).completions)
        cuts = first_pass(self._config, len(rows), self._policy.device)
        self._compute(rows, layout, trunk_features(self._policy, layout, cuts), cuts)

    def _first(self, row: int) -> int:
        """The step in whose batch a row first comes."""
        while row not in self._first_step:
            step = self._steps_scanned
            for other in self._dataset.step_rows(self._config.seed, step, self._config.batch_size):
                self._first_step.setdefault(other, step)
            self._steps_scanned += 1
        return self._first_step[row]


# ------------------------------------------------------------------------------------------------------ earlier batches


def as_tensors(experience: Experience) -> dict[str, Tensor]:
    """An experience as named tensors, to be saved; `from_tensors` is the way back."""
    completions, targets = vars(experience.completions), vars(experience.targets)
    values = {
        **{f"completions.{name}": value for name, value in completions.items()},
        **{f"targets.{name}": value for name, value in targets.items()},
        **{name: value for name, value in vars(experience).items() if name not in ("completions", "targets")},
    }
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in values.items()
        if value is not None
    }


def from_tensors(tensors: dict[str, Tensor], policy: LoadedPolicy, config: TrainConfig) -> Collected:
    """A saved experience, ready to be learned from again."""
    tensors = {name: value.to(policy.device) for name, value in tensors.items()}

    def section(prefix: str) -> dict[str, Any]:
        found = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        return {name: value.item() if value.ndim == 0 else value for name, value in found.items()}

    whole = {name: value for name, value in section("").items() if "." not in name}
    completions = Completions(**section("completions."))
    experience = Experience(completions=completions, targets=Targets(**section("targets.")), **whole)
    layout = policy.scorer.layout(completions)
    cuts = first_pass(config, len(experience.rewards), policy.device)
    return Collected(experience, layout, trunk_features(policy, layout, cuts), [], {}, {})
