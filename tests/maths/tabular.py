"""A policy small enough to enumerate: every completion, its log-probability and its gradient are known exactly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

EOS = 0


class TabularPolicy:
    """An autoregressive policy with one row of logits for every prefix: V tokens, completions of at most T.

    theta is (number of prefixes, V). The M completions end with EOS or at T tokens.
    """

    def __init__(self, vocabulary: int = 3, max_length: int = 3) -> None:
        words = range(1, vocabulary)
        prefixes = [p for length in range(max_length) for p in itertools.product(words, repeat=length)]
        ended = [(*p, EOS) for p in prefixes]
        self.completions = ended + list(itertools.product(words, repeat=max_length))
        self.shape = (len(prefixes), vocabulary)
        row = {prefix: i for i, prefix in enumerate(prefixes)}
        self.visits = torch.zeros(len(self.completions), *self.shape, dtype=torch.float64)
        for i, completion in enumerate(self.completions):
            for t, token in enumerate(completion):
                self.visits[i, row[completion[:t]], token] = 1

    def logits(self, seed: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def sequence_logprobs(self, theta: Tensor) -> Tensor:
        """(M,) of all completions."""
        return torch.einsum("mpv,pv->m", self.visits, theta.log_softmax(-1))

    def scores(self, theta: Tensor) -> Tensor:
        """(M, D): the gradient of each completion's log-probability."""
        return torch.func.jacrev(self.sequence_logprobs)(theta).flatten(1)

    def rewards(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(len(self.completions), dtype=torch.float64, generator=generator)

    def groups(self, num_completions: int) -> Tensor:
        """(M^K, K): every group of K completions that could be sampled, as indices."""
        indices = torch.arange(len(self.completions))
        return torch.cartesian_prod(*[indices] * num_completions)


def expected_loss_gradient(
    policy: TabularPolicy,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    theta: Tensor,
    old_theta: Tensor,
    num_completions: int,
    rewards: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The exact expectation, over groups sampled from `old_theta`, of the gradient of loss(policy, old, rewards) at
    `theta`.

    `rewards(groups, logprobs)` gives the trajectory rewards (M^K, K) of groups whose current log-probabilities are
    `logprobs`.
    """
    theta = theta.clone().requires_grad_()
    groups = policy.groups(num_completions)
    old = policy.sequence_logprobs(old_theta)[groups]
    current = policy.sequence_logprobs(theta)[groups]
    losses = loss(current, old, rewards(groups, current.detach()))
    (gradient,) = torch.autograd.grad((old.sum(-1).exp() * losses).sum(), theta)
    return gradient


def objective_gradient(
    policy: TabularPolicy, theta: Tensor, rewards: Tensor, ref_logprobs: Tensor, beta: float
) -> Tensor:
    """The gradient of E[r] - beta KL(policy || reference), by autograd through the enumerated sum."""
    theta = theta.clone().requires_grad_()
    logprobs = policy.sequence_logprobs(theta)
    objective = (logprobs.exp() * (rewards - beta * (logprobs - ref_logprobs))).sum()
    (gradient,) = torch.autograd.grad(objective, theta)
    return gradient


def estimator_variance(
    policy: TabularPolicy, theta: Tensor, coefficients: Tensor, groups: Tensor
) -> tuple[Tensor, float]:
    """The exact mean (D,) and total variance (trace of the covariance) of sum_k coefficient_k * score_k over groups
    (N, K)."""
    probs = policy.sequence_logprobs(theta)[groups].sum(-1).exp()
    assert math.isclose(probs.sum().item(), 1.0, rel_tol=1e-12)
    estimates = torch.einsum("nk,nkd->nd", coefficients, policy.scores(theta)[groups])
    mean = probs @ estimates
    return mean, (probs @ estimates.square().sum(-1)).item() - mean.square().sum().item()
