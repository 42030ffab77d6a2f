"""Preferences: labels of pairs, and the losses that read them, offline (DPO, IPO) and online.

With u_i = log(policy / reference) of completion i (summed over completion tokens, EOS included), D = u_1 - u_2 for the
first and second of a pair, p the probability that the first is better, s the sigmoid and log s evaluated as one
function, the losses, to be minimised, are

    DPO          -log s(beta D), first = chosen                          Rafailov et al. 2023, arXiv 2305.18290, eq. 7
    IPO          (D - 1 / (2 beta))^2, first = chosen                    Azar et al. 2023, arXiv 2310.12036, eq. 17
    online DPO   -p log s(beta D) - (1 - p) log s(-beta D)               P3O paper (arXiv 2310.00212), appendix A.2
    online IPO   p (D - 1 / (2 beta))^2 + (1 - p) (D + 1 / (2 beta))^2   Calandriello et al. 2024, arXiv 2403.08635

Both are linear in p. A loss with p is therefore the mean of the losses with labels drawn by p, without their variance,
and label smoothing is p = 1 - smoothing.

A group of K completions has M = K (K - 1) / 2 pairs, in the order of `pair_indices`. A pair mask (..., M) is True
where a pair counts; what stands elsewhere is never read, NaN included.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pairtune.maths.masking import checked_mask, masked_mean, pair_indices

# -------------------------------------------------------------------------------------------------------------- labels


class PairLabels(NamedTuple):
    """The preferences within groups; both (..., M)."""

    probability: Tensor
    """That the first of the pair is better, in [0, 1]."""
    mask: Tensor
    """bool, True where the pair counts."""


def preference_labels(rewards: Tensor, kind: Literal["hard", "expected"], *, mask: Tensor | None = None) -> PairLabels:
    """What rewards (..., K) say about the pairs of a group: probability and mask (..., M).

    expected: s(r_1 - r_2), the Bradley-Terry model that rewards are the log-odds of; equal rewards give 1/2, which
    draws the policy's odds for this pair towards the reference's. hard: 1 or 0; equal rewards are no preference, so
    that pair does not count and has no gradient (a label of 1/2 would have one). Pairs of a completion that does not
    count do not count either; their probability is 1/2. Rewards are subtracted first, so that a constant cancels.
    Raises ValueError where shapes differ, the mask is not bool, or on another kind.
    """
    if kind not in ("hard", "expected"):
        raise ValueError(f"kind must be 'hard' or 'expected', but it is {kind!r}")
    mask = checked_mask(mask, rewards=rewards)
    i, j = pair_indices(rewards.shape[-1], rewards.device)
    pair_mask = mask[..., i] & mask[..., j]
    difference = torch.where(pair_mask, (rewards[..., i] - rewards[..., j]).detach(), 0)
    if kind == "expected":
        return PairLabels(difference.sigmoid(), pair_mask)
    return PairLabels((difference.sign() + 1) / 2, pair_mask & (difference != 0))


PROBABILITY_EDGE = 0.01
"""Probabilities are drawn in to this distance from 0 and 1 before their logits are taken."""


def pair_preferences(preferences: Tensor, mask: Tensor | None = None) -> PairLabels:
    """A judge's probabilities (..., K, K) that the row's completion beats the column's, as labels (..., M) of pairs.

    They are used as they are; NaN says that a pair does not count. Only the entries above the diagonal are read.
    `mask` (..., K) is True where a completion counts. Raises ValueError where the mask is not bool or its shape is
    another.
    """
    mask = checked_mask(mask, preferences=preferences[..., 0])
    i, j = pair_indices(preferences.shape[-1], preferences.device)
    probability = preferences.detach()[..., i, j]
    pair_mask = mask[..., i] & mask[..., j] & ~probability.isnan()
    return PairLabels(torch.where(pair_mask, probability, 0.5), pair_mask)


def preference_rewards(preferences: Tensor, rule: Literal["logits", "margins"]) -> Tensor:
    """Rewards from probabilities that the row beats the column: (..., K, K) -> (..., K).

    logits: the row's mean of log(p / (1 - p)), p drawn in to [0.01, 0.99]; where p = s(a_i - a_j) for some scores a,
    it is a_i less their mean, so that a pair keeps its log-odds. margins: the row's mean of 2 p - 1, the chance to win
    less the chance to lose. The mean includes the diagonal, which must be 1/2; what is NaN is left out. A row with
    nothing but its diagonal gets 0. Raises ValueError on another rule.
    """
    if rule not in ("logits", "margins"):
        raise ValueError(f"rule must be 'logits' or 'margins', but it is {rule!r}")
    counted = ~preferences.isnan()
    p = torch.where(counted, preferences.detach(), 0.5)
    values = p.clamp(PROBABILITY_EDGE, 1 - PROBABILITY_EDGE).logit() if rule == "logits" else 2 * p - 1
    return masked_mean(values, counted, -1)


def sample_labels(probability: Tensor, uniforms: Tensor) -> Tensor:
    """Labels 1 and 0 drawn with `probability`, from as many numbers uniform in [0, 1): any shape -> the same shape.

    Adds variance to what `probability` itself gives as a label, and nothing else. Raises ValueError where shapes
    differ.
    """
    if probability.shape != uniforms.shape:
        raise ValueError(
            f"probability and uniforms must have one shape, "
            f"but they have {tuple(probability.shape)}, {tuple(uniforms.shape)}"
        )
    return (uniforms < probability).to(probability.dtype)


# ------------------------------------------------------------------------------------------------------ offline losses


def dpo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7): log-ratios of completions (...) -> (...), one a pair.

    -(1 - smoothing) log s(beta D) - smoothing log s(-beta D); the smoothing is the share of labels taken to be wrong.
    Log-ratios are policy minus reference, summed over tokens; only they receive gradients. `mask` True where a pair
    counts, 0 elsewhere. Raises ValueError on wrong shapes or dtypes, a beta <= 0 or a label_smoothing outside
    [0, 1/2).
    """
    return _offline_loss(_logistic_loss, chosen_logratio, rejected_logratio, beta, label_smoothing, mask)


def ipo_loss(
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17): log-ratios of completions (...) -> (...), one a pair.

    (D - 1 / (2 beta))^2 with `beta` the paper's tau. Log-ratios are summed over tokens, as printed; TRL takes their
    mean per token. `label_smoothing` as in `dpo_loss` (not in the paper; it moves the target to
    (1 - 2 smoothing) / (2 beta)). Raises ValueError on wrong shapes or dtypes, a beta <= 0 or a label_smoothing
    outside [0, 1/2).
    """
    return _offline_loss(_squared_loss, chosen_logratio, rejected_logratio, beta, label_smoothing, mask)


# ------------------------------------------------------------------------------------------------------- online losses


def online_dpo_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    labels: Tensor,
    pair_mask: Tensor | None = None,
    *,
    beta: float,
    old_logprobs: Tensor | None = None,
    epsilon: float | None = None,
) -> Tensor:
    """Online DPO (P3O paper, appendix A.2): (..., K) and labels (..., M) -> (...), the mean over the pairs that count.

    -p log s(beta D) - (1 - p) log s(-beta D), gradient beta (s(beta D) - p) by D. `labels` p come from
    `preference_labels`, `sample_labels` or a judge. With p = s(r_1 - r_2) the loss of every pair is smallest at
    reference * exp(r / beta) / Z, whatever policy sampled.

    `epsilon` (in nats, with `old_logprobs` of the policy that sampled) adds P3O's joint clip, which no paper of DPO
    has: the larger of the losses at D and at D clipped to D_old -+ epsilon. The gradient of a pair is then zero where D
    moved past the edge and its loss got smaller by that.

    Only `policy_logprobs` receives a gradient. Raises ValueError on wrong shapes or dtypes, a beta <= 0, an epsilon
    <= 0, or one of epsilon and old_logprobs without the other.
    """
    return _online_loss(_logistic_loss, policy_logprobs, ref_logprobs, labels, pair_mask, beta, old_logprobs, epsilon)


def online_ipo_loss(
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    labels: Tensor,
    pair_mask: Tensor | None = None,
    *,
    beta: float,
    old_logprobs: Tensor | None = None,
    epsilon: float | None = None,
) -> Tensor:
    """Online IPO (Calandriello et al. 2024, arXiv 2403.08635): (..., K) and labels (..., M) -> (...), the mean over
    the pairs that count.

    p (D - 1 / (2 beta))^2 + (1 - p) (D + 1 / (2 beta))^2. On pairs from a fixed policy mu its smallest expectation is
    at reference * exp(E_{y' ~ mu}[p(y > y')] / beta) / Z: what is maximised is the chance to win, not the reward that
    labels may have come from. Otherwise as `online_dpo_loss`, the clip included.
    """
    return _online_loss(_squared_loss, policy_logprobs, ref_logprobs, labels, pair_mask, beta, old_logprobs, epsilon)


# ---------------------------------------------------------------------------------------------------- shared arithmetic

_PairLoss = Callable[[Tensor, Tensor | float, float], Tensor]
"""(difference D, probability p that the first is better, beta) -> loss."""


def _logistic_loss(difference: Tensor, label: Tensor | float, beta: float) -> Tensor:
    return -(label * F.logsigmoid(beta * difference) + (1 - label) * F.logsigmoid(-beta * difference))


def _squared_loss(difference: Tensor, label: Tensor | float, beta: float) -> Tensor:
    target = 1 / (2 * beta)
    return label * (difference - target).square() + (1 - label) * (difference + target).square()


def _offline_loss(
    loss: _PairLoss,
    chosen_logratio: Tensor,
    rejected_logratio: Tensor,
    beta: float,
    label_smoothing: float,
    mask: Tensor | None,
) -> Tensor:
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), but it is {label_smoothing}")
    mask = checked_mask(mask, chosen_logratio=chosen_logratio, rejected_logratio=rejected_logratio)
    difference = torch.where(mask, chosen_logratio, 0) - torch.where(mask, rejected_logratio, 0)
    return torch.where(mask, loss(difference, 1 - label_smoothing, beta), 0)


def _online_loss(
    loss: _PairLoss,
    policy_logprobs: Tensor,
    ref_logprobs: Tensor,
    labels: Tensor,
    pair_mask: Tensor | None,
    beta: float,
    old_logprobs: Tensor | None,
    epsilon: float | None,
) -> Tensor:
    _check_beta(beta)
    checked_mask(None, policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs)
    pair_mask = checked_mask(pair_mask, labels=labels)
    i, j = pair_indices(policy_logprobs.shape[-1], policy_logprobs.device)
    if labels.shape != (*policy_logprobs.shape[:-1], len(i)):
        raise ValueError(
            f"labels must be one a pair, {(*policy_logprobs.shape[:-1], len(i))} for log-probabilities of "
            f"{tuple(policy_logprobs.shape)}, but they are {tuple(labels.shape)}"
        )

    def pair_differences(logratio: Tensor) -> Tensor:
        # 0 before any loss is taken: a gradient of 0 times the NaN of a masked pair would be NaN.
        return torch.where(pair_mask, logratio[..., i], 0) - torch.where(pair_mask, logratio[..., j], 0)

    difference = pair_differences(policy_logprobs - ref_logprobs.detach())
    labels = labels.detach().to(difference.dtype)
    losses = loss(difference, labels, beta)
    if (epsilon is None) != (old_logprobs is None):
        raise ValueError("epsilon and old_logprobs belong together: give both for a clipped loss, or none")
    if epsilon is not None and old_logprobs is not None:
        if not epsilon > 0:
            raise ValueError(f"epsilon must be greater than 0, but it is {epsilon}")
        checked_mask(None, policy_logprobs=policy_logprobs, old_logprobs=old_logprobs)
        old_difference = pair_differences(old_logprobs.detach() - ref_logprobs.detach())
        clipped = difference.clamp(old_difference - epsilon, old_difference + epsilon)
        losses = torch.maximum(losses, loss(clipped, labels, beta))
    return masked_mean(losses, pair_mask, -1)


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be greater than 0, but it is {beta}")
