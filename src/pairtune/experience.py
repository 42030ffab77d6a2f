"""collect(prompts) -> Experience: sample, score, reference log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pairtune.config import TrainConfig
from pairtune.feedback.rewards import RewardSet
from pairtune.models.loading import LoadedPolicy
from pairtune.models.logprobs import Layout
from pairtune.models.sampler import Sampler, SamplingParams
from pairtune.runs import distributed
from pairtune.types import Completions, Experience, Prompts

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
    ids = [
        row[mask].tolist()
        for row, mask in zip(
            completions.completion_ids.flatten(0, 1), completions.completion_mask.flatten(0, 1), strict=True
        )
    ]
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
    rewards: RewardSet,
    config: TrainConfig,
    step: int,
    policy_version: int,
    phase: Phase,
) -> Collected:
    """One batch of experience: K completions of each prompt, their rewards, and the reference's log-probabilities."""
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
        scores = rewards.score(prompts, completions, texts, trainer_state=state)
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
    )
    return Collected(experience, layout, features, texts, scores.metrics, scores.extras)
