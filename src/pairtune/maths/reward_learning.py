"""Reward learning: the losses that turn comparisons and rankings of completions into a reward.

With r_w and r_l the rewards of the chosen and the rejected completion of a prompt, d = r_w - r_l, s the sigmoid and
log s evaluated as one function, the losses, to be minimised, are

    Bradley-Terry   -log s(d)                                                     P3O paper (arXiv 2310.00212), eq. 1
      margin m      -log s(d - m)                                                 Touvron et al. 2023, 2307.09288, eq. 2
      soft label p  -p log s(d) - (1 - p) log s(-d)
    Plackett-Luce   -sum_k [r_(k) - log sum_{j >= k} exp r_(j)], (1) the best     Zhu et al. 2023, 2301.11270
    K choose 2      the mean of -log s(r_i - r_j) over pairs with i before j      Ouyang et al. 2022, 2203.02155, eq. 1
    centring        (r_w + r_l)^2, to be weighed and added                        Eisenstein et al. 2023, 2312.09244

All but centring leave the reward of a prompt free up to a constant. They subtract rewards of one prompt from each other
before anything else, so that such a constant cancels without a rounding where the rewards are exact in binary.
"""

from __future__ import annotations

import itertools
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from pairtune.maths.masking import checked_mask, masked_mean, masked_sum, pair_indices

MOST_TIED = 12
"""The most completions of a prompt that `plackett_luce_loss` takes where some are tied: it visits their 2^K subsets."""

# ------------------------------------------------------------------------------------------------------------- pairs


def bradley_terry_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    probability: Tensor | None = None,
    label_smoothing: float = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Bradley-Terry: rewards of completions (...) -> (...), one loss a pair, in nats.

    The cross-entropy of the model's s(d) with the label, which is 1, or `probability` (...) in [0, 1] that the chosen
    one is better. `margin` (...), in units of reward, is taken off d (Touvron et al. 2023): how far apart the two
    should be at least. It belongs to pairs with a certain label; a soft label already says how far. `label_smoothing`
    is the share of labels taken to be wrong: p becomes (1 - smoothing) p + smoothing (1 - p).

    Only rewards receive gradients. `mask` True where a pair counts, 0 elsewhere; what stands there, NaN included, is
    never read. Raises ValueError where shapes differ, the mask is not bool, on both margin and probability, or on a
    label_smoothing outside [0, 1/2).
    """
    if margin is not None and probability is not None:
        raise ValueError("margin and probability both say how much better the chosen one is: give one of them")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), but it is {label_smoothing}")
    given = {"margin": margin, "probability": probability}
    mask = checked_mask(
        mask,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        **{name: x for name, x in given.items() if x is not None},
    )
    # A pair that does not count loses its gradient here and its loss in the last line.
    difference = torch.where(mask, chosen_rewards, 0) - torch.where(mask, rejected_rewards, 0)
    if margin is not None:
        difference = difference - margin.detach().to(difference.dtype)
    label = torch.ones_like(difference) if probability is None else probability.detach().to(difference.dtype)
    label = (1 - label_smoothing) * label + label_smoothing * (1 - label)
    losses = -(label * F.logsigmoid(difference) + (1 - label) * F.logsigmoid(-difference))
    return torch.where(mask, losses, 0)


def centring_penalty(chosen_rewards: Tensor, rejected_rewards: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """(r_w + r_l)^2 (Eisenstein et al. 2023, arXiv 2312.09244): rewards (...) -> (...), one a pair.

    Added with a small weight (TRL advises 0.01), it chooses, among the rewards that Bradley-Terry cannot tell apart,
    one with mean 0 over a pair. It is the square of the sum: a sum of squares would pull d towards 0 as well. `mask`
    as in `bradley_terry_loss`. Raises ValueError where shapes differ or the mask is not bool.
    """
    mask = checked_mask(mask, chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    return torch.where(mask, chosen_rewards + rejected_rewards, 0).square()


# ---------------------------------------------------------------------------------------------------------- rankings


def plackett_luce_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Plackett-Luce (Zhu, Jiao & Jordan 2023, arXiv 2301.11270): (..., K) and ranks (..., K) -> (...), nats a prompt.

    -log of the probability of the ranking, if the best is drawn by softmax of the rewards, then the next best among
    the rest, and so on. Bradley-Terry where K = 2. `ranks` are integers, the smallest is the best, and only their
    order matters.

    A tie says nothing about the order within it: the probability of a ranking with ties is the sum over all orders
    that agree with it, taken exactly, over the subsets of the completions. Completions that are all tied have loss 0
    and no gradient (up to rounding), as a tied pair has none in `pairwise_ranking_loss`. Breslow's approximation, the
    usual one, would draw their rewards together.

    Only `rewards` receive a gradient. `mask` (..., K) is True where a completion counts; the others are in no
    competition and never read. Raises ValueError where shapes differ, ranks are no integers, the mask is not bool, or
    completions are tied among more than `MOST_TIED`.
    """
    mask = _checked_ranking(rewards, ranks, mask)
    rewards = torch.where(mask, rewards, 0)
    both = mask[..., :, None] & mask[..., None, :]
    worse = both & (ranks[..., None, :] > ranks[..., :, None])  # [k, j]: j is ranked behind k
    itself = torch.eye(rewards.shape[-1], dtype=torch.bool, device=rewards.device)
    tied = (both & ~itself & (ranks[..., None, :] == ranks[..., :, None])).any(-1).any(-1)
    # r_j - r_k over k itself (a 0, which keeps the log finite) and all that rank behind it.
    differences = rewards[..., None, :] - rewards[..., :, None]
    losses = masked_sum(torch.where(worse | itself, differences, -torch.inf).logsumexp(-1), mask, -1)
    if not tied.any():
        return losses
    if rewards.shape[-1] > MOST_TIED:
        raise ValueError(
            f"completions with equal ranks can be taken among at most {MOST_TIED} of a prompt, but there are "
            f"{rewards.shape[-1]}: use pairwise_ranking_loss or decide the ties"
        )
    return losses.masked_scatter(tied, _loss_with_ties(rewards[tied], ranks[tied], mask[tied]))


def pairwise_ranking_loss(rewards: Tensor, ranks: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The K-choose-2 loss (Ouyang et al. 2022, arXiv 2203.02155, eq. 1): (..., K) and ranks (..., K) -> (...).

    The mean of Bradley-Terry over the pairs of a prompt that differ in rank; 0 where none does. Bradley-Terry where
    K = 2. It treats the pairs of a prompt as if they were drawn apart, so it is not the likelihood of a ranking.
    `ranks` are integers, the smallest is the best. Gradients and `mask` as in `plackett_luce_loss`. Raises ValueError
    where shapes differ, ranks are no integers or the mask is not bool.
    """
    mask = _checked_ranking(rewards, ranks, mask)
    rewards = torch.where(mask, rewards, 0)
    i, j = pair_indices(rewards.shape[-1], rewards.device)
    first_is_better = ranks[..., i] < ranks[..., j]
    difference = rewards[..., i] - rewards[..., j]
    losses = -F.logsigmoid(torch.where(first_is_better, difference, -difference))
    return masked_mean(losses, mask[..., i] & mask[..., j] & (ranks[..., i] != ranks[..., j]), -1)


def _checked_ranking(rewards: Tensor, ranks: Tensor, mask: Tensor | None) -> Tensor:
    mask = checked_mask(mask, rewards=rewards, ranks=ranks)
    if ranks.is_floating_point() or ranks.dtype == torch.bool:
        # Most often scores, of which the largest is the best.
        raise ValueError(f"ranks must be integers, 1 the best, but they are {ranks.dtype}")
    return mask


def _loss_with_ties(rewards: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """(G, K) -> (G,): -log of the sum, over the orders that agree with the ranks, of their probabilities.

    Every order removes one completion after the other from the full set. What a set contributes from there on does
    not depend on the order before, so it is computed once for each of the 2^K sets, the small ones first:
    h(S) = log sum_i exp(r_i + h(S without i)) - log sum_j exp(r_j), i over the best ranked of S, j over S.
    """
    # Against a reward of the prompt itself, so that a constant cancels; with the largest, the sums stay small.
    rewards = rewards - torch.where(mask, rewards, -torch.inf).amax(-1, keepdim=True).detach()
    last = torch.iinfo(ranks.dtype).max
    log_probability = rewards.new_zeros(len(rewards), 1)  # of the empty set
    for members, without in _subsets(rewards.shape[-1]):
        members, without = members.to(rewards.device), without.to(rewards.device)
        r, counts, rank = rewards[:, members], mask[:, members], ranks[:, members]
        # Where none counts, let all: both sums are the same then, and their difference is 0.
        counts = counts | ~counts.any(-1, keepdim=True)
        rank = torch.where(counts, rank, last)
        next_one = counts & (rank == rank.amin(-1, keepdim=True))
        chosen = torch.where(next_one, r + log_probability[:, without], -torch.inf).logsumexp(-1)
        log_probability = chosen - torch.where(counts, r, -torch.inf).logsumexp(-1)
    return -log_probability[:, 0]


@cache
def _subsets(num_completions: int) -> list[tuple[Tensor, Tensor]]:
    """For n = 1 to K: the members (C, n) of all C subsets of that size, and, for each member, the place of the subset
    without it among those of size n - 1 (C, n)."""
    sizes = []
    place: dict[tuple[int, ...], int] = {(): 0}
    for size in range(1, num_completions + 1):
        sets = list(itertools.combinations(range(num_completions), size))
        without = [[place[members[:k] + members[k + 1 :]] for k in range(size)] for members in sets]
        sizes.append((torch.tensor(sets), torch.tensor(without)))
        place = {members: index for index, members in enumerate(sets)}
    return sizes
