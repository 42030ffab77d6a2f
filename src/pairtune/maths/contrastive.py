"""Losses that regress the difference of two log-probabilities on the difference of two rewards: CoPG, REBEL.

For a pair of completions of one prompt, with

    u_i   log(policy / reference) of completion i, summed over completion tokens, EOS included
    l_i   log(policy / policy that sampled) of the same
    dR    R_1 - R_2, and du, dl alike

the losses, to be minimised, are

    CoPG   (dr - beta du)^2 / (2 beta)    Flet-Berliac et al. 2024, arXiv 2406.19185, eq. 7 to 9 and 34 to 38
    REBEL  (dl - eta dR)^2                Gao et al. 2024, arXiv 2404.16767, its squared loss

Both are losses of a difference in every pair, so neither has importance weights or a clip, and any policy may have
sampled that reaches all completions. A group of K > 2 completions takes the mean over its pairs.

Both take log-probabilities, rewards and mask of shape (..., K) and return (...). Only `policy_logprobs` receives a
gradient. `mask` is True where a completion counts; the mean runs over the pairs of which both count, and a group
without such a pair gives exactly 0. What stands where the mask is False is never read, NaN included. Rewards meet each
other before anything else: a constant added to all rewards of a prompt leaves every bit as it was, as long as reward +
constant is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pairtune.maths.masking import checked_mask, masked_mean, pair_indices


def copg_loss(
    policy_logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, *, beta: float, mask: Tensor | None = None
) -> Tensor:
    """Contrastive policy gradient: (dr - beta du)^2 / (2 beta), the mean over pairs, (..., K) -> (...).

    `rewards` as given, without a KL term: the term is in the loss, and differentiated. The paper maximises
    (R(y) - R(y')) (u - u') with R = r - beta/2 u; up to the constant dr^2 / (2 beta) this is minus that (eq. 34 to 38).
    Zero for every pair exactly where the policy is reference * exp(r / beta) / Z, the maximum of E[r] - beta KL. On the
    policy's own completions its gradient is twice that of P3O and RLOO at ratio 1, for every K. Raises ValueError on
    wrong shapes or dtypes or a beta <= 0.
    """
    _check_positive("beta", beta)
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, ref_logprobs=ref_logprobs, rewards=rewards)
    logratio, reward, pair_mask = _differences(policy_logprobs, ref_logprobs, rewards, mask)
    return masked_mean((reward - beta * logratio).square() / (2 * beta), pair_mask, -1)


def rebel_loss(
    policy_logprobs: Tensor, old_logprobs: Tensor, rewards: Tensor, *, eta: float = 1.0, mask: Tensor | None = None
) -> Tensor:
    """REBEL: (dl - eta dR)^2, the mean over pairs, (..., K) -> (...).

    `rewards` are trajectory rewards, with the KL term of the policy that sampled (`kl_shaped_rewards`). The loss of one
    batch is smallest where policy = old * exp(eta R) / Z, a step of mirror descent of size `eta`; repeated steps end at
    reference * exp(r / beta) / Z while eta beta < 2. This is the form of the authors' code; the paper
    divides it by eta^2. At ratio 1 the gradient is 4 eta times that of P3O. Raises ValueError on wrong shapes or dtypes
    or an eta <= 0.
    """
    _check_positive("eta", eta)
    mask = checked_mask(mask, policy_logprobs=policy_logprobs, old_logprobs=old_logprobs, rewards=rewards)
    logratio, reward, pair_mask = _differences(policy_logprobs, old_logprobs, rewards, mask)
    return masked_mean((logratio - eta * reward).square(), pair_mask, -1)


def _differences(
    policy_logprobs: Tensor, base_logprobs: Tensor, rewards: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all pairs of every group: difference of the log-ratios, of the rewards, and what counts; all (..., M)."""
    i, j = pair_indices(mask.shape[-1], mask.device)
    policy = torch.where(mask, policy_logprobs, 0)
    # The log-ratio first: the small numbers are then subtracted, not the large ones.
    logratio = policy - torch.where(mask, base_logprobs.detach(), 0).to(policy.dtype)
    rewards = torch.where(mask, rewards.detach(), 0)
    reward_difference = (rewards[..., i] - rewards[..., j]).to(policy.dtype)
    return logratio[..., i] - logratio[..., j], reward_difference, mask[..., i] & mask[..., j]


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be greater than 0, but it is {value}")
