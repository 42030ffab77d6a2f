"""P3O's losses on pairs of completions: clipped jointly, clipped separately, not clipped.

Paper: Wu et al. 2023, "Pairwise Proximal Policy Optimization", arXiv 2310.00212. For a pair of completions of one
prompt, with

    l_i     sequence log-probability under the policy that is updated (summed over completion tokens, EOS included)
    l_i^old the same under the policy that sampled
    rho_i = exp(l_i - l_i^old)
    D     = l_1 - l_2, D_old the same under the policy that sampled
    q     = R_1 - R_2, with R the trajectory reward (reward - beta * log(policy / reference))
    sg    = stop-gradient

the paper's objectives, to be maximised, are

    pairwise policy gradient (eq. 6):  sg(q rho_1 rho_2) D / 2
    P3O-V1, clipped separately:        [ min(sg( q rho_2) rho_1, sg( q rho_2) clip(rho_1, 1 - eps, 1 + eps))
                                       + min(sg(-q rho_1) rho_2, sg(-q rho_1) clip(rho_2, 1 - eps, 1 + eps)) ] / 2
    P3O-V2, clipped jointly:           min(sg(q rho_1 rho_2) D, sg(q rho_1 rho_2) clip(D, D_old - eps, D_old + eps)) / 2

The paper prints P3O-V2 without the / 2. It stands here, as in the author's code, so that all three have one gradient
at ratio 1. A group of K > 2 completions takes the mean over its pairs. The functions return the negative, to be
minimised, one value a group.

All take `policy_logprobs`, `old_logprobs`, `rewards` and `mask` of shape (..., K) and return (...). Only
`policy_logprobs` receives a gradient. `mask` is True where a completion counts; the mean runs over the pairs of which
both count, and a group without such a pair gives exactly 0. What stands where the mask is False is never read, NaN
included. Log-probabilities that count must be finite.

`max_ratio` = c clamps the stop-gradient importance weight to [1/c, c]: the product of both ratios (joint, unclipped)
or the ratio of the other completion (separate). It is not in the paper; the author's code has it, with c = 10. None
leaves the weight as it is.

Range. With a `max_ratio`, joint and unclipped are finite for all finite log-probabilities. Separate also holds the
ratio rho_i that it differentiates, which is bounded on the improving side only; on the other its loss and gradient
are finite while |l_i - l_i^old| + log c < 88 in float32 (709 in float64) and become inf, never NaN, beyond.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pairtune.maths.masking import checked_mask, masked_mean, pair_indices

ClipKind = Literal["joint", "separate"]


def pairwise_policy_gradient_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    *,
    max_ratio: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """The pairwise policy gradient (paper, Theorem 1, eq. 6) as a loss, without clipping: (..., K) -> (...).

    -sg(q rho_1 rho_2) (l_1 - l_2) / 2, the mean over pairs. With `max_ratio` None its expected gradient is the exact
    one of E[R] for any policy that sampled. Shapes, mask, `max_ratio` and range: see the module. Raises ValueError on
    wrong shapes, dtypes or a max_ratio < 1.
    """
    pairs = _pairs(policy_logprobs, old_logprobs, rewards, mask)
    difference = pairs.policy_first - pairs.policy_second
    return masked_mean(-_joint_coefficient(pairs, max_ratio) * difference / 2, pairs.mask, -1)


def p3o_joint_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    *,
    epsilon: float = 0.2,
    max_ratio: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """P3O-V2 (paper, section 4.2), the difference of the two log-probabilities clipped: (..., K) -> (...).

    -min(sg(q w) D, sg(q w) clip(D, D_old - eps, D_old + eps)) / 2 with w = rho_1 rho_2, the mean over pairs. The
    gradient of a pair is zero exactly where q > 0 and D - D_old > eps, or q < 0 and D - D_old < -eps. `epsilon` is in
    nats. Shapes, mask, `max_ratio` and range: see the module. Raises ValueError on wrong shapes, dtypes, an epsilon
    <= 0 or a max_ratio < 1.
    """
    _check_epsilon(epsilon)
    pairs = _pairs(policy_logprobs, old_logprobs, rewards, mask)
    edge = pairs.old_first - pairs.old_second + epsilon * pairs.reward_difference.sign()
    # The minimum over clipped and unclipped is the edge on the improving side and D everywhere else.
    difference = torch.where(_past_joint_edge(pairs, epsilon), edge, pairs.policy_first - pairs.policy_second)
    return masked_mean(-_joint_coefficient(pairs, max_ratio) * difference / 2, pairs.mask, -1)


def p3o_separate_loss(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    *,
    epsilon: float = 0.2,
    max_ratio: float | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """P3O-V1 (paper, section 4.2), each ratio clipped by itself: (..., K) -> (...).

    -[min(sg(q rho_2) rho_1, sg(q rho_2) clip(rho_1, 1 - eps, 1 + eps)) + the same with 1 and 2 exchanged and -q] / 2,
    the mean over pairs. The gradient of term i is zero exactly where q_i > 0 and rho_i > 1 + eps, or q_i < 0 and
    rho_i < 1 - eps, with q_1 = q, q_2 = -q. Shapes, mask, `max_ratio` and range: see the module. Raises ValueError on
    wrong shapes, dtypes, an epsilon <= 0 or a max_ratio < 1.
    """
    _check_epsilon(epsilon)
    pairs = _pairs(policy_logprobs, old_logprobs, rewards, mask)
    q, first, second = pairs.reward_difference, pairs.logratio_first, pairs.logratio_second
    first_term = _separate_term(q, first, second, epsilon, max_ratio)
    second_term = _separate_term(-q, second, first, epsilon, max_ratio)
    return masked_mean(-(first_term + second_term) / 2, pairs.mask, -1)


def pairs_past_clip(
    policy_logprobs: Tensor, old_logprobs: Tensor, *, epsilon: float, kind: ClipKind, mask: Tensor | None = None
) -> Tensor:
    """Share of a group's pairs outside the clip interval, on either side: (..., K) -> (...), in [0, 1].

    joint: |D - D_old| > epsilon. separate: a ratio outside [1 - epsilon, 1 + epsilon], where each of a pair's two
    terms counts one half. It says how far the policy has moved from the one that sampled, whatever the rewards;
    `clipped_share` says what the clip stops. 0 where no pair counts. Raises ValueError on wrong shapes, dtypes, an
    epsilon <= 0 or another kind.
    """
    _check_epsilon(epsilon)
    pairs = _pairs(policy_logprobs.detach(), old_logprobs, torch.zeros_like(policy_logprobs), mask)
    if _is_joint(kind):
        outside = _drift(pairs).abs() > epsilon
    else:
        low, high = _log_ratio_interval(epsilon)
        logratios = torch.stack([pairs.logratio_first, pairs.logratio_second])
        outside = (logratios < low) | (logratios > high)
    return _share_of_pairs(outside, pairs)


def clipped_share(
    policy_logprobs: Tensor,
    old_logprobs: Tensor,
    rewards: Tensor,
    *,
    epsilon: float,
    kind: ClipKind,
    mask: Tensor | None = None,
) -> Tensor:
    """Share of a group's pairs whose gradient the clip has set to zero: (..., K) -> (...), in [0, 1].

    These are past the edge on the side to which the reward pushes; separate counts each of a pair's two terms one
    half. A pair of equal rewards has no gradient for the clip to stop and counts as not clipped. `rewards` are the
    trajectory rewards that the loss gets. 0 where no pair counts. Raises ValueError on wrong shapes, dtypes, an
    epsilon <= 0 or another kind.
    """
    _check_epsilon(epsilon)
    pairs = _pairs(policy_logprobs.detach(), old_logprobs, rewards, mask)
    if _is_joint(kind):
        clipped = _past_joint_edge(pairs, epsilon)
    else:
        q = torch.stack([pairs.reward_difference, -pairs.reward_difference])
        clipped = _past_separate_edge(q, torch.stack([pairs.logratio_first, pairs.logratio_second]), epsilon)
    return _share_of_pairs(clipped, pairs)


# --------------------------------------------------------------------------------------------------------------- pairs


class _Pairs(NamedTuple):
    """The M = K (K - 1) / 2 pairs of every group; all (..., M)."""

    policy_first: Tensor
    policy_second: Tensor
    old_first: Tensor
    old_second: Tensor
    reward_difference: Tensor
    """q, detached; 0 for a pair that does not count."""
    mask: Tensor

    @property
    def logratio_first(self) -> Tensor:
        return self.policy_first - self.old_first

    @property
    def logratio_second(self) -> Tensor:
        return self.policy_second - self.old_second


def _pairs(policy_logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, mask: Tensor | None) -> _Pairs:
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, old_logprobs=old_logprobs, rewards=rewards)
    i, j = pair_indices(policy_logprobs.shape[-1], policy_logprobs.device)
    pair_mask = mask[..., i] & mask[..., j]
    # Rewards meet each other before anything else, and in their own precision: a constant added to all rewards of a
    # prompt then leaves every bit as it was, as long as reward + constant is exact. The zero of a pair that does not
    # count also keeps its log-probabilities, NaN perhaps, out of every gradient.
    rewards = rewards.detach()
    reward_difference = torch.where(pair_mask, rewards[..., i] - rewards[..., j], 0).to(policy_logprobs.dtype)
    policy, old = policy_logprobs, old_logprobs.detach().to(policy_logprobs.dtype)
    return _Pairs(policy[..., i], policy[..., j], old[..., i], old[..., j], reward_difference, pair_mask)


def _check_epsilon(epsilon: float) -> None:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be greater than 0, but it is {epsilon}")


def _is_joint(kind: str) -> bool:
    if kind not in ("joint", "separate"):
        raise ValueError(f"kind must be 'joint' or 'separate', but it is {kind!r}")
    return kind == "joint"


# --------------------------------------------------------------------------------------------------- weights and edges


def _log_weight(logratio: Tensor, max_ratio: float | None) -> Tensor:
    """The log of a stop-gradient importance weight, clamped to [-log c, log c]."""
    logratio = logratio.detach()
    if max_ratio is None:
        return logratio
    if not max_ratio >= 1:
        raise ValueError(f"max_ratio must be at least 1 (or None for no clamp), but it is {max_ratio}")
    return logratio.clamp(-math.log(max_ratio), math.log(max_ratio))


def _joint_coefficient(pairs: _Pairs, max_ratio: float | None) -> Tensor:
    """sg(q rho_1 rho_2), exactly 0 where q is (there an infinite weight must not make 0 * inf)."""
    q = pairs.reward_difference
    weight = _log_weight(pairs.logratio_first + pairs.logratio_second, max_ratio).exp()
    return torch.where(q == 0, q, q * weight)


def _drift(pairs: _Pairs) -> Tensor:
    """D - D_old, from the two log-ratios: the clip decides on small numbers, not on the difference of large ones."""
    return pairs.logratio_first - pairs.logratio_second


def _past_joint_edge(pairs: _Pairs, epsilon: float) -> Tensor:
    """Where the clip stops the gradient of a pair: moved past epsilon to the side that q asks for."""
    return pairs.reward_difference.sign() * _drift(pairs) > epsilon


def _separate_term(
    q: Tensor, logratio: Tensor, other_logratio: Tensor, epsilon: float, max_ratio: float | None
) -> Tensor:
    """min(sg(q rho_other) rho, sg(q rho_other) clip(rho, 1 - eps, 1 + eps)).

    Clipped and weighted as logarithms, with one exponential at the end: exp first would overflow, and where the clip
    then stops the gradient, leave 0 * inf behind; and a large ratio beside a small one has a product that is neither.
    """
    low, high = _log_ratio_interval(epsilon)
    edge = torch.full_like(q, low).masked_fill(q > 0, high)
    logratio = torch.where(_past_separate_edge(q, logratio, epsilon), edge, logratio)
    exponent = logratio + _log_weight(other_logratio, max_ratio)
    return q * torch.where(q == 0, 0, exponent).exp()


def _past_separate_edge(q: Tensor, logratio: Tensor, epsilon: float) -> Tensor:
    """Where the clip stops the gradient of a term: its ratio left [1 - eps, 1 + eps] on the side that q asks for."""
    low, high = _log_ratio_interval(epsilon)
    return ((q > 0) & (logratio > high)) | ((q < 0) & (logratio < low))


def _log_ratio_interval(epsilon: float) -> tuple[float, float]:
    """log(1 - eps) and log(1 + eps); a ratio is positive, so an epsilon of 1 or more has no lower edge."""
    return (math.log1p(-epsilon) if epsilon < 1 else -math.inf), math.log1p(epsilon)


def _share_of_pairs(flags: Tensor, pairs: _Pairs) -> Tensor:
    """Flags (..., M) of the pairs, or (2, ..., M) of the two terms of each -> their share in every group (...)."""
    share = flags.to(pairs.policy_first.dtype)
    if flags.dim() > pairs.mask.dim():
        share = share.mean(0)
    return masked_mean(share, pairs.mask, -1)
