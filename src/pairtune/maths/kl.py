"""Sequence log-probabilities, the KL-shaped reward, estimators of KL(policy || reference) and entropy. In nats."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pairtune.maths.masking import masked_sum


def sequence_logprobs(token_logprobs: Tensor, mask: Tensor) -> Tensor:
    """The log-probability of whole completions: (..., T) per token -> (...), summed in float32 (float64 stays).

    `mask` (..., T) is True on completion tokens, EOS included. For a log-ratio, pass the difference of the tokens'
    log-probabilities: the small numbers are then summed, not subtracted after the sum.
    """
    # In bfloat16 the sum alone would be off by more than the clip range.
    return masked_sum(token_logprobs.to(torch.promote_types(token_logprobs.dtype, torch.float32)), mask, -1)


def kl_shaped_rewards(rewards: Tensor, logratio: Tensor, beta: float, mask: Tensor | None = None) -> Tensor:
    """The trajectory reward r - beta * log(policy / reference), up to a constant per group: (..., K), detached.

    `rewards` (..., K) as given, `logratio` (..., K) of whole completions (policy minus reference, nats), `mask`
    (..., K) True where a completion counts; 0 where it does not.

    Every reward is first taken relative to the group's first completion that counts. Pairwise losses and
    leave-one-out baselines see only differences within a group, so the constant is free, and chosen so, a shift of
    all rewards of a prompt vanishes before anything can be rounded: where rewards and shift lie on a binary grid
    (multiples of 1/64, say), the result keeps every bit. A method that reads the reward itself, as REINFORCE without
    a baseline does, must not use this function.
    """
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    rewards = torch.where(mask, rewards.detach(), 0)
    first = mask.int().argmax(-1, keepdim=True)  # the first of equal maxima; any of the zeros where none counts
    return torch.where(mask, rewards - rewards.gather(-1, first) - beta * logratio.detach(), 0)


# --------------------------------------------------------------------------------- estimators from sampled completions
# `logratio` d = log policy - log reference of what the policy sampled, any shape; per token or per sequence. The names
# are J. Schulman's ("Approximating KL divergence", 2020).


def k1(logratio: Tensor) -> Tensor:
    """d: unbiased for KL(policy || reference), may be negative.

    As a loss it has zero expected gradient on the policy's own samples; in the (detached) reward its gradient is right.
    """
    return logratio


def k2(logratio: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative.

    As a loss on sequence log-ratios of the policy's own samples it has the gradient of KL(policy || reference); summed
    over tokens it loses what a token does to the later ones.
    """
    return logratio.square() / 2


def k3(logratio: Tensor) -> Tensor:
    """exp(-d) - 1 + d: unbiased where the policy covers the reference, never negative.

    The sign matters: exp(d) - 1 - d estimates chi^2 - KL, which agrees to second order only. exp(-d) explodes on the
    rare completions that the reference likes far more, so sum it over tokens; of a sequence ratio it is useless
    beyond a KL of about 1. As a loss on the policy's own samples it has the gradient of the other direction,
    KL(reference || policy).
    """
    return torch.expm1(-logratio) + logratio


# ------------------------------------------------------------------------------------------ from whole next-token laws


def rao_blackwellised_kl(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """sum_v p_v (log p_v - log ref_v), the KL of one token's law: (n, V) normalised log-probabilities -> (n,).

    Summed over the tokens of a completion that the policy sampled, it is an unbiased estimate of the sequence KL,
    non-negative, and in practice with far less spread than k1 (Amini, Vieira and Cotterell 2025, arXiv 2504.10637).
    Exactly 0 where both inputs are bit-equal. Tokens that the policy never samples (-inf under top-p or top-k) add
    nothing; a token that only the reference excludes makes it inf.
    """
    counts = policy_logprobs > -torch.inf
    return (policy_logprobs.exp() * torch.where(counts, policy_logprobs - ref_logprobs, 0)).sum(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """-sum_v p_v log p_v: (n, V) normalised log-probabilities -> (n,). Tokens at -inf add nothing."""
    return -(logprobs.exp() * torch.where(logprobs > -torch.inf, logprobs, 0)).sum(-1)


# ---------------------------------------------------------------------------------------------------------- best of n


def best_of_n_kl(logprobs: Tensor, n: int) -> Tensor:
    """An estimate of KL(best of n || the law that sampled), from what was chosen: any shape -> the same shape.

    `logprobs` are those of whole chosen completions under the law that the n were drawn from. With e = exp(logprob) and
    q = 1 - (1 - e)^n, the chance that it is drawn at all: (1 - q) (log n + (n - 1) log(1 - e) - (n - 1) / n) +
    q log(q / e) (Beirami et al. 2024, arXiv 2401.01879). For a completion that is never drawn twice it is the well
    known log n - (n - 1) / n, which is only an upper bound; for one that is sure to be drawn it is 0. Raises ValueError
    for an n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, but it is {n}")
    # Of a long completion's probability nothing is left in floating point; the limit is reached long before.
    e = logprobs.double().clamp(max=0).exp().clamp(min=torch.finfo(torch.float64).tiny)
    log_none = n * torch.log1p(-e)
    none, some = log_none.exp(), -torch.expm1(log_none)
    distinct = none * (math.log(n) - (n - 1) / n) + torch.special.xlog1py((n - 1) * none, -e)
    return distinct + some * (some / e).log()
