"""The frozen data that flows through a step.

Axes: P prompts, K completions of each, S prompt tokens, T completion tokens. A mask is boolean and named for what True
keeps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

Prompt = str | list[dict[str, Any]]
"""A prompt as its dataset gave it: plain text, or a conversation of `{"role", "content"}` turns."""


def real_ids(ids: Tensor, mask: Tensor) -> list[list[int]]:
    """The rows of `ids` (n, T) without what `mask` (n, T) leaves out."""
    kept, ends = ids[mask].tolist(), mask.sum(-1).cumsum(0).tolist()
    return [kept[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts, tokenised once."""

    ids: Tensor
    """(P, S) int64, left-padded."""
    mask: Tensor
    """(P, S) bool, True on prompt tokens."""
    rows: Tensor
    """(P,) int64, the row of each prompt in its dataset; seeds the sampling of its completions."""
    prompts: list[Prompt]
    """The P prompts as the dataset gave them; reward functions receive these."""
    columns: dict[str, list[Any]] = field(default_factory=dict)
    """The other columns of the dataset, P values each; reward functions receive these too."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Completions:
    """K sampled completions of each of P prompts, as token ids. Nothing here is ever tokenised again."""

    prompt_ids: Tensor
    """(P, S) int64, left-padded."""
    prompt_mask: Tensor
    """(P, S) bool."""
    completion_ids: Tensor
    """(P, K, T) int64, right-padded; the sampled ids, EOS kept."""
    completion_mask: Tensor
    """(P, K, T) bool, True on sampled tokens, EOS included."""
    sampler_logprobs: Tensor
    """(P, K, T) float32, nats, under the law that sampled (temperature, top-p, top-k); 0 where masked."""
    truncated: Tensor
    """(P, K) bool, True where the length cap ended the completion, not EOS or a stop string."""
    policy_version: int
    """The number of optimizer updates that the sampling weights had seen."""

    @property
    def num_tokens(self) -> Tensor:
        """(P, K) int64, tokens of each completion, EOS included."""
        return self.completion_mask.sum(-1)

    def pick(self, chosen: Tensor) -> Completions:
        """Some of the completions of every prompt, at the same width. chosen: (P, k) int64, places in the group."""
        tokens = chosen[..., None].expand(-1, -1, self.completion_ids.shape[-1])
        return replace(
            self,
            completion_ids=self.completion_ids.gather(1, tokens),
            completion_mask=self.completion_mask.gather(1, tokens),
            sampler_logprobs=self.sampler_logprobs.gather(1, tokens),
            truncated=self.truncated.gather(1, chosen),
        )

    def select(self, prompts: Tensor) -> Completions:
        """The completions of some of the prompts, at the same width. prompts: (p,) int64."""
        return Completions(
            prompt_ids=self.prompt_ids[prompts],
            prompt_mask=self.prompt_mask[prompts],
            completion_ids=self.completion_ids[prompts],
            completion_mask=self.completion_mask[prompts],
            sampler_logprobs=self.sampler_logprobs[prompts],
            truncated=self.truncated[prompts],
            policy_version=self.policy_version,
        )


@dataclass(frozen=True)
class Targets:
    """What is fixed for a batch before its first update. All detached; a method sets what its loss reads."""

    advantages: Tensor | None = None
    """(P, K, T) float32, reward units, 0 where masked."""
    returns: Tensor | None = None
    """(P, K, T) float32, reward units: what the value function is fitted to."""
    labels: Tensor | None = None
    """(P, M) float32 in [0, 1]: the probability that the first of each pair is better, pairs as in `pair_indices`."""
    label_mask: Tensor | None = None
    """(P, M) bool, True where a pair counts."""
    baseline: float = 0.0
    """Reward units, subtracted from every reward of the batch."""

    def select(self, prompts: Tensor) -> Targets:
        """The targets of some of the prompts. prompts: (p,) int64."""
        tensors: dict[str, Any] = {name: x[prompts] for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Experience:
    """All that a loss may read."""

    completions: Completions
    rewards: Tensor
    """(P, K) float32, feedback as given, before any KL term; 0 where `reward_mask` is False."""
    reward_mask: Tensor
    """(P, K) bool, True where the feedback counts (a reward function may answer None: does not count)."""
    ref_logprobs: Tensor
    """(P, K, T) float32, nats, under the reference; 0 where masked."""
    old_logprobs: Tensor | None = None
    """(P, K, T) float32, nats, the trainer's own under the weights that sampled; 0 where masked.

    None until known: where the whole batch is one minibatch, the first pass computes them anyway."""
    old_values: Tensor | None = None
    """(P, K, T) float32, reward units, the value function's before each token when the batch was collected; 0 where
    masked. None for a method without a value function."""
    preferences: Tensor | None = None
    """(P, K, K) float32, a judge's probability that the row's completion beats the column's; NaN where a pair does not
    count. None where the feedback is rewards."""
    targets: Targets = Targets()
    """What the method's `prepare` made of all this."""
    rows: Tensor | None = None
    """(P,) int64, the row of each prompt in its dataset: with the step it seeds whatever is drawn for a prompt."""
    step: int = 0
    """The step that collected it."""

    def select(self, prompts: Tensor) -> Experience:
        """The experience of some of the prompts. prompts: (p,) int64."""
        return Experience(
            completions=self.completions.select(prompts),
            rewards=self.rewards[prompts],
            reward_mask=self.reward_mask[prompts],
            ref_logprobs=self.ref_logprobs[prompts],
            old_logprobs=None if self.old_logprobs is None else self.old_logprobs[prompts],
            old_values=None if self.old_values is None else self.old_values[prompts],
            preferences=None if self.preferences is None else self.preferences[prompts],
            targets=self.targets.select(prompts),
            rows=None if self.rows is None else self.rows[prompts],
            step=self.step,
        )


@dataclass(frozen=True)
class LossOutput:
    """What an algorithm's loss returns for a micro-batch."""

    losses: Tensor
    """(n,) unreduced: one per prompt, per completion or per token, to be minimised."""
    mask: Tensor
    """(n,) bool, True counts in the denominator."""
    metrics: dict[str, Tensor]
    """name -> (n,) float values over the same elements, averaged over the same mask; to log, never read by code."""
