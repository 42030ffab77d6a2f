"""Losses on one log-probability at a time: REINFORCE, the clip of PPO and of TRL's RLOO, GRPO, RAFT, the value loss.

With l the log-probability of what was sampled (a whole completion or one token) under the policy that is updated,
l_old the same under the policy that sampled, rho = exp(l - l_old), A the advantage, V the value, G its target and sg
the stop-gradient, the losses, to be minimised, are

    REINFORCE          -sg(A) l
    clipped surrogate  -min(rho sg(A), clip(rho, 1 - eps, 1 + eps) sg(A))    (PPO, eq. 7)
    GRPO               clipped surrogate + beta k3(l - l_ref)                (GRPO, eq. 3 and 4)
    RAFT               -l of the best completion of its group
    value loss         max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2

Nothing is reduced but RAFT's group. Whether tokens are summed, averaged within a completion or over the batch is part
of a method, and each docstring says which its paper takes.

Only `policy_logprobs` (or `values`) receives a gradient; advantages, returns and rewards come detached. `mask` is True
where a completion or a token counts; elsewhere the loss is exactly 0 and nothing is read, NaN included. What counts
must be finite.

Range. The clip decides on log-ratios and takes one exponential at the end, so a stopped gradient is 0 and not 0 * inf.
On the side that the clip leaves open (A < 0 and a large ratio) loss and gradient are inf, never NaN, from a log-ratio
of 88 in float32 on (709 in float64); k3 is so from -88 on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pairtune.maths.kl import k3
from pairtune.maths.masking import checked_mask, masked_mean


def reinforce_loss(policy_logprobs: Tensor, advantages: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """-sg(A) l, the policy gradient (Williams 1992) as a loss: any shape -> the same shape.

    Sequence-level REINFORCE and RLOO (Ahmadian et al. 2024, arXiv 2402.14740, section 2): completions (..., K) with
    A = `leave_one_out` of the trajectory rewards, or rewards minus a `MovingAverage`; the mean over completions.
    VPG (P3O paper, Algorithm 1): tokens (..., T) with A = `gae`; the sum over tokens, the mean over completions. A mean
    over tokens is another estimator: it pays for length. Unbiased only for completions of the policy that is updated.
    Raises ValueError on wrong shapes or dtypes.
    """
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, advantages=advantages)
    policy, (advantages,) = _counted(mask, policy_logprobs, advantages)
    return -advantages * policy


def sequence_clip_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    mask: Tensor | None = None,
) -> Tensor:
    """The clipped surrogate on whole completions: (..., K) -> (..., K), the mean over completions.

    RLOO's paper has no ratio and no clip; TRL's RLOOTrainer adds this one for more than one update a batch. rho is the
    ratio of the sequence, so that `epsilon` (of a ratio, not in nats) is soon used up by long completions. Raises
    ValueError on wrong shapes or dtypes or an epsilon <= 0.
    """
    return _clipped_surrogate_loss(policy_logprobs, old_logprobs, advantages, epsilon, mask)


def ppo_policy_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    mask: Tensor | None = None,
) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7) on tokens: (..., T) -> (..., T).

    The gradient of a token is zero exactly where A > 0 and rho > 1 + eps, or A < 0 and rho < 1 - eps. In RLHF the loss
    of a batch is the mean over its tokens. Raises ValueError on wrong shapes or dtypes or an epsilon <= 0.
    """
    return _clipped_surrogate_loss(policy_logprobs, old_logprobs, advantages, epsilon, mask)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None = 0.2, mask: Tensor | None = None
) -> Tensor:
    """max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2) / 2 on tokens: (..., T) -> (..., T).

    The value loss of RLHF's PPO (OpenAI's lm-human-preferences, 2019; not in PPO's paper); `clip` c in units of the
    reward, None for the plain squared error (VPG, P3O paper, Algorithm 1). The gradient is zero exactly where V
    is outside the interval and nearer to G than the clipped V is. In RLHF the loss of a batch is the mean over its
    tokens. Raises ValueError on wrong shapes or a clip <= 0.
    """
    mask = checked_mask(mask, values=values, old_values=old_values, returns=returns)
    values, (old, target) = _counted(mask, values, old_values, returns)
    error = (values - target).square()
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip must be greater than 0 (or None for no clip), but it is {clip}")
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - target).square())
    return error / 2


def grpo_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon: float = 0.2,
    beta: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4) on tokens: (..., T) and advantages (...) -> (..., T).

    The clipped surrogate with one advantage for all tokens of a completion (`group_standardised`), plus beta * k3 of
    every token. The KL stands in the loss, not in the reward: on the policy's own samples its gradient is that of
    KL(reference || policy) at the prefixes that were reached, so the limit of training is not the optimum of
    E[r] - beta KL(policy || reference).

    The paper takes the mean over the tokens of a completion, then over the group; Dr. GRPO (arXiv 2503.20783) the sum
    over tokens with `group_centred` and beta 0; DAPO (arXiv 2503.14476) the mean over the tokens of the batch. With
    beta 0 the reference is not read. Raises ValueError on wrong shapes or dtypes, an epsilon <= 0 or a beta < 0.
    """
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs)
    if advantages.shape != policy_logprobs.shape[:-1]:
        raise ValueError(
            f"advantages must be one a completion, {tuple(policy_logprobs.shape[:-1])} for log-probabilities of "
            f"{tuple(policy_logprobs.shape)}, but they are {tuple(advantages.shape)}"
        )
    if not beta >= 0:
        raise ValueError(f"beta must be at least 0, but it is {beta}")
    advantages = advantages[..., None].expand_as(policy_logprobs)
    surrogate = _clipped_surrogate_loss(policy_logprobs, old_logprobs, advantages, epsilon, mask)
    if beta == 0:
        return surrogate
    policy, (ref,) = _counted(mask, policy_logprobs, ref_logprobs)
    return surrogate + beta * k3(policy - ref)


def raft_loss(policy_logprobs: Tensor, rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Minus the log-probability of the best completion of each group: (..., K) -> (...).

    RAFT (Dong et al. 2023, arXiv 2304.06767): imitate the best of K, here summed over its tokens. Equal best rewards
    share the weight. `rewards` as given, or with the KL term (`kl_shaped_rewards`) to rank by both. 0 where none of a
    group counts. Raises ValueError on wrong shapes or dtypes.
    """
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, rewards=rewards)
    rewards = rewards.detach().masked_fill(~mask, -math.inf)
    best = mask & (rewards == rewards.amax(-1, keepdim=True))
    return masked_mean(-policy_logprobs, best, -1)


# ------------------------------------------------------------------------------------------------------------ the clip


def clipped(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    epsilon: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Where the clip has set the gradient to zero, bool: any shape -> the same shape, False where masked.

    The ratio is past the edge on the side to which the advantage pushes. An advantage of 0 has no gradient to stop and
    counts as not clipped. Raises ValueError on wrong shapes or dtypes or an epsilon <= 0.
    """
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, old_logprobs=old_logprobs, advantages=advantages)
    policy, (old, advantages) = _counted(mask, policy_logprobs.detach(), old_logprobs, advantages)
    return _past_edge(policy - old, advantages, *_log_ratio_interval(epsilon))


def _clipped_surrogate_loss(
    policy_logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float, mask: Tensor | None
) -> Tensor:
    """-min(rho A, clip(rho, 1 - eps, 1 + eps) A), whatever the log-probabilities are of."""
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, old_logprobs=old_logprobs, advantages=advantages)
    policy, (old, advantages) = _counted(mask, policy_logprobs, old_logprobs, advantages)
    low, high = _log_ratio_interval(epsilon)
    logratio = policy - old
    edge = torch.full_like(advantages, low).masked_fill(advantages > 0, high)
    logratio = torch.where(_past_edge(logratio, advantages, low, high), edge, logratio)
    # An advantage of 0 must not meet an infinite ratio.
    return -advantages * torch.where(advantages == 0, 0, logratio).exp()


def _past_edge(logratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return ((advantages > 0) & (logratio > high)) | ((advantages < 0) & (logratio < low))


def _log_ratio_interval(epsilon: float) -> tuple[float, float]:
    """log(1 - eps) and log(1 + eps); a ratio is positive, so an epsilon of 1 or more has no lower edge."""
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, but it is {epsilon}")
    return (math.log1p(-epsilon) if epsilon < 1 else -math.inf), math.log1p(epsilon)


def _counted(mask: Tensor, x: Tensor, *others: Tensor) -> tuple[Tensor, list[Tensor]]:
    """x with its gradient, the others without and in the dtype of x; all 0 where masked, before any arithmetic."""
    return torch.where(mask, x, 0), [torch.where(mask, y.detach(), 0).to(x.dtype) for y in others]
