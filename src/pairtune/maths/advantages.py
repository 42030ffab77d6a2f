"""Credit: what a loss multiplies a log-probability with. Baselines over a group, over training and by a value function.

With R_i the reward of completion i of a group of K, r_t the reward of token t, V_t the value before token t and T the
last token:

    leave-one-out          R_i - mean_{j != i} R_j = K / (K - 1) (R_i - mean R)
    group-standardised     (R_i - mean R) / std R
    moving average         R_i - b, b the mean of all rewards of the steps before
    token rewards          r_t = -beta log(policy_t / reference_t), and the score on top at T
    rewards-to-go          sum_{l >= t} r_l
    GAE                    sum_{l >= t} (gamma lambda)^(l - t) (r_l + gamma V_{l+1} - V_l), V_{T+1} = 0

All results are detached. A mask is True where a completion (..., K) or a token (..., T) counts; elsewhere results are
0, and nothing is read, NaN included. Completions are padded on the right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pairtune.maths.masking import checked_mask, masked_mean, masked_sum

# ------------------------------------------------------------------------------------------------ baselines of a group


def leave_one_out(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """R_i minus the mean of the others' rewards: (..., K) -> (..., K).

    REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, section 2.3). With
    `reinforce_loss` and the mean over completions it is the paper's estimator, with 1/K in front; CoPG's paper writes
    the sum. A completion without another that counts has nothing to be compared with and gets 0.

    Rewards meet each other before anything else: a constant added to all rewards of a prompt leaves every bit as it
    was, as long as reward + constant is exact. Raises ValueError where shapes differ or the mask is not bool.
    """
    differences, num_counted = _sum_of_differences(rewards, checked_mask(mask, rewards=rewards))
    return differences / (num_counted - 1).clamp(min=1)


def group_centred(rewards: Tensor, mask: Tensor | None = None) -> Tensor:
    """R_i minus the group's mean, its own reward included: (..., K) -> (..., K).

    Dr. GRPO (Liu et al. 2025, arXiv 2503.20783); (K - 1) / K of `leave_one_out`, and as indifferent to a constant.
    Raises ValueError where shapes differ or the mask is not bool.
    """
    differences, num_counted = _sum_of_differences(rewards, checked_mask(mask, rewards=rewards))
    return differences / num_counted.clamp(min=1)


def group_standardised(rewards: Tensor, mask: Tensor | None = None, *, eps: float = 1e-4) -> Tensor:
    """(R_i - mean) / (std + eps) over the group: (..., K) -> (..., K).

    GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2), with the population standard deviation; a pair gets +1
    and -1, whatever the difference. The paper has no `eps` (0); TRL's 1e-4 keeps the rounding of two equal rewards
    from becoming a full advantage. Equal rewards get exactly 0 with either. Raises ValueError where shapes differ, the
    mask is not bool or `eps` is negative.
    """
    if not eps >= 0:
        raise ValueError(f"eps must be at least 0, but it is {eps}")
    mask = checked_mask(mask, rewards=rewards)
    centred = group_centred(rewards, mask)
    std = masked_mean(centred.square(), mask, -1).sqrt()[..., None]
    return torch.where(std > 0, centred / (std + eps), 0)


def _sum_of_differences(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j (R_i - R_j) (..., K) over those that count, and their number (..., 1)."""
    rewards = rewards.detach()
    pair_mask = mask[..., :, None] & mask[..., None, :]
    return masked_sum(rewards[..., :, None] - rewards[..., None, :], pair_mask, -1), mask.sum(-1, keepdim=True)


# --------------------------------------------------------------------------------------------- baseline over training


@dataclass(frozen=True)
class MovingAverage:
    """The mean of all rewards that training has seen: the baseline of REINFORCE in Ahmadian et al. 2024.

    Take `mean` before `update_moving_average` with the rewards of the step: a baseline that contains the reward which
    it is subtracted from is biased.
    """

    total: float = 0.0
    count: int = 0

    @property
    def mean(self) -> float:
        """0 before the first reward."""
        return self.total / self.count if self.count else 0.0


def update_moving_average(average: MovingAverage, rewards: Tensor, mask: Tensor | None = None) -> MovingAverage:
    """The average after the rewards of one more step, any shape; those of all processes, for one baseline everywhere.

    Raises ValueError where shapes differ or the mask is not bool.
    """
    mask = checked_mask(mask, rewards=rewards)
    total = masked_sum(rewards.detach().double(), mask).item()
    return MovingAverage(average.total + total, average.count + int(mask.sum()))


# -------------------------------------------------------------------------------------------------- credit of a token


def token_rewards(rewards: Tensor, logratio: Tensor, *, beta: float, mask: Tensor) -> Tensor:
    """-beta log(policy / reference) of every token, and the score on the last: (...), (..., T) -> (..., T).

    The reward of token-wise PPO (the modified reward R of Ziegler et al. 2019, arXiv 1909.08593) and of Algorithm 1 of
    the P3O paper. `logratio` is the one of the policy that sampled (k1, which as a reward has the gradient of the KL).
    Summed over tokens it is the trajectory reward. `mask` (..., T); a row without a token gives zeros, and its reward
    is not read. Raises ValueError where shapes differ or the mask is not bool.
    """
    checked_mask(mask, logratio=logratio)
    if rewards.shape != mask.shape[:-1]:
        raise ValueError(
            f"rewards must be one a completion, {tuple(mask.shape[:-1])} for a mask of {tuple(mask.shape)}, "
            f"but they are {tuple(rewards.shape)}"
        )
    num_tokens_to_go = mask.flip(-1).cumsum(-1).flip(-1)
    last = mask & (num_tokens_to_go == 1)
    score = torch.where(last, rewards.detach()[..., None], 0)
    return score - beta * torch.where(mask, logratio.detach(), 0)


def rewards_to_go(token_rewards: Tensor, mask: Tensor) -> Tensor:
    """The sum of the rewards from each token on: (..., T) -> (..., T). Not discounted.

    `gae` with gamma = lambda = 1 and no value function. Raises ValueError where shapes differ or the mask is not bool.
    """
    checked_mask(mask, token_rewards=token_rewards)
    rewards = torch.where(mask, token_rewards.detach(), 0)
    return torch.where(mask, rewards.flip(-1).cumsum(-1).flip(-1), 0)


def gae(token_rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> Tensor:
    """Generalised advantage estimation: (..., T), (..., T) -> (..., T).

    Schulman et al. 2015, arXiv 1506.02438, eq. 16: sum_{l >= t} (gamma lambda)^(l - t) delta_l with delta_t = r_t +
    gamma V_{t+1} - V_t. (The P3O paper prints its exponent one too high.) `values` V_t are the values before token t.
    The value after the last token is 0, also where the length cap ended a completion: what counts as its reward has
    been given. `mask` (..., T) is True on the tokens of a completion, without a gap. Raises ValueError where shapes
    differ, the mask is not bool or has a gap, or gamma or lambda lies outside [0, 1].
    """
    checked_mask(mask, token_rewards=token_rewards, values=values)
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, but it is {factor}")
    if (mask[..., 1:] & ~mask[..., :-1]).any():
        raise ValueError("mask must be True on the first tokens of a completion and False after them, without a gap")
    rewards, values = torch.where(mask, token_rewards.detach(), 0), torch.where(mask, values.detach(), 0)
    advantages = rewards + gamma * _shifted(values, 1) - values
    # Every pass doubles how many of the deltas ahead are in the sum: log2(T) passes in place of a loop over T.
    reach, decay = 1, gamma * lam
    while reach < mask.shape[-1]:
        advantages = advantages + decay * _shifted(advantages, reach)
        reach, decay = 2 * reach, decay * decay
    return advantages


def returns(advantages: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """What the value function is fitted to: A_t + V_t of the policy that sampled, (..., T) -> (..., T).

    `advantages` before they are whitened. Raises ValueError where shapes differ or the mask is not bool.
    """
    checked_mask(mask, advantages=advantages, values=values)
    return torch.where(mask, advantages.detach() + values.detach(), 0)


def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over all that counts, any shape: one mean and one variance for the batch.

    Population variance, as in OpenAI's lm-human-preferences (2019). `shift_mean` False adds the mean again, after the
    division: for rewards, of which the sign means something. The statistics are of the tensor that is given, so give
    the whole batch of all processes. Raises ValueError where shapes differ or the mask is not bool.
    """
    checked_mask(mask, x=x)
    x = torch.where(mask, x.detach(), 0)
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    whitened = (x - mean) * (variance + 1e-8).rsqrt()
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)


def _shifted(x: Tensor, steps: int) -> Tensor:
    """x[t + steps] at t, 0 past the end."""
    return F.pad(x[..., steps:], (0, steps))
