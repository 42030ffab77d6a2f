"""name -> Algorithm: the one place where credit meets a loss.

A loss sees whole groups: every tensor has the axes P prompts and K completions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from pairtune.config import TrainConfig
from pairtune.maths import pairwise
from pairtune.maths.kl import kl_shaped_rewards
from pairtune.maths.masking import masked_sum
from pairtune.types import Experience, LossOutput


@dataclass(frozen=True)
class Algorithm:
    """What the loop needs to know of a method."""

    counted: Callable[[Experience], Tensor]
    """(n,) bool: which elements of the loss count. Known before any pass, so that the denominator of an update is
    global."""
    loss: Callable[[Tensor, Experience, TrainConfig], LossOutput]
    """(policy log-probabilities (P, K, T), experience, configuration) -> unreduced losses."""


def _groups_with_a_pair(experience: Experience) -> Tensor:
    return experience.reward_mask.sum(-1) >= 2


# ------------------------------------------------------------------------------------------------------------------ P3O


def _p3o_loss(policy_logprobs: Tensor, experience: Experience, config: TrainConfig) -> LossOutput:
    """P3O (pairwise, Wu et al. 2023), section 4.2: clipped jointly, separately, or not at all.

    The trajectory reward is r - beta * log(pi / pi_ref), with pi the policy being updated (`kl_at: current`) or the one
    that sampled (`kl_at: sampling`, the paper's Algorithm 2).
    """
    if experience.old_logprobs is None:
        raise RuntimeError("p3o was asked for a loss without old log-probabilities")
    mask = experience.reward_mask
    policy, old = _sequence(policy_logprobs, experience), _sequence(experience.old_logprobs, experience)
    kl_logprobs = policy_logprobs.detach() if config.p3o.kl_at == "current" else experience.old_logprobs
    rewards = kl_shaped_rewards(
        experience.rewards, _sequence(kl_logprobs - experience.ref_logprobs, experience), config.beta, mask
    )
    clip, max_ratio = config.p3o.clip, config.p3o.max_ratio
    if clip == "joint":
        losses = pairwise.p3o_joint_loss(policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio, mask=mask)
    elif clip == "separate":
        losses = pairwise.p3o_separate_loss(
            policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio, mask=mask
        )
    else:
        losses = pairwise.pairwise_policy_gradient_loss(policy, old, rewards, max_ratio=max_ratio, mask=mask)
    kind: Literal["joint", "separate"] = "separate" if clip == "separate" else "joint"
    current, old = policy.detach(), old.detach()
    metrics = {
        "clip_ratio": pairwise.pairs_past_clip(current, old, epsilon=config.epsilon, kind=kind, mask=mask),
        "logratio_abs": ((current - old).abs() * mask).sum(-1) / mask.sum(-1).clamp(min=1),
    }
    if clip != "none":
        metrics["clip_ratio/zero_gradient"] = pairwise.clipped_share(
            current, old, rewards, epsilon=config.epsilon, kind=kind, mask=mask
        )
    return LossOutput(losses=losses, mask=_groups_with_a_pair(experience), metrics=metrics)


def _sequence(token_values: Tensor, experience: Experience) -> Tensor:
    """(P, K, T) per token -> (P, K) per sequence."""
    return masked_sum(token_values, experience.completions.completion_mask, -1)


ALGORITHMS: dict[str, Algorithm] = {
    "p3o": Algorithm(counted=_groups_with_a_pair, loss=_p3o_loss),
}
