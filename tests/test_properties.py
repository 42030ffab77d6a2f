"""One table: every method by every property that it has. A property that it lacks is asserted to be lacking.

All in float64, on groups of completions of all lengths with rubbish where they are masked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from test_algorithms import batch, with_fields
from torch import Tensor

from pairtune.algorithms import ALGORITHMS, MethodState
from pairtune.config import TrainConfig
from pairtune.maths.advantages import MovingAverage
from pairtune.maths.masking import masked_sum
from pairtune.types import Experience, LossOutput

BETA = 0.25
STATE = MethodState(beta=BETA, average=MovingAverage(total=1.5, count=6))


class Properties(NamedTuple):
    """What is true of a method's gradient."""

    shift: bool = True
    """A constant added to all rewards of a prompt changes no bit."""
    swap: bool = True
    """The order of a group's completions means nothing."""
    masked: bool = True
    """A completion whose feedback does not count changes nothing."""
    cut: bool = True
    """It is the sum of the gradients of any micro-batches."""
    at_ratio_one: float | None = None
    """The expected gradient relative to P3O's where policy, old and reference of every token are what they are and the
    policy has not moved: None for a method whose gradient is not a multiple of it."""


TABLE: dict[str, Properties] = {
    "p3o": Properties(at_ratio_one=1),
    "ppo": Properties(shift=False),
    "vpg": Properties(shift=False),
    "reinforce": Properties(shift=False),
    "rloo": Properties(at_ratio_one=1),
    "grpo": Properties(),
    "rebel": Properties(at_ratio_one=4),
    "raft": Properties(),
    "copg": Properties(at_ratio_one=2),
    "online_dpo": Properties(),
    "online_ipo": Properties(),
    "dpo": Properties(swap=False),
    "ipo": Properties(swap=False),
}
"""Offline DPO and IPO never read a reward: that its shift changes nothing is trivial."""

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in TABLE},
    "p3o separate": {"algorithm": "p3o", "p3o.clip": "separate"},
    "p3o unclipped": {"algorithm": "p3o", "p3o.clip": "none", "p3o.max_ratio": None},
    "ppo unwhitened": {"algorithm": "ppo", "ppo.whiten_advantages": False},
    "ppo whitened rewards": {"algorithm": "ppo", "ppo.whiten_rewards": True},
    "reinforce without baseline": {"algorithm": "reinforce", "reinforce.baseline": "none"},
    "rloo clipped": {"algorithm": "rloo", "rloo.clip": True},
    "grpo centred": {"algorithm": "grpo", "grpo.standardise": False},
    "grpo kl in reward": {"algorithm": "grpo", "grpo.kl_in": "reward"},
    "raft shaped": {"algorithm": "raft", "raft.rank_by": "shaped"},
    "online_dpo hard": {"algorithm": "online_dpo", "online_dpo.labels": "hard"},
    "online_dpo clipped": {"algorithm": "online_dpo", "online_dpo.clip": True},
    "online_ipo hard": {"algorithm": "online_ipo", "online_ipo.labels": "hard"},
}


def config_of(variant: str, **values: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset="d", **{"beta": BETA, **VARIANTS[variant], **values})


def properties_of(variant: str) -> Properties:
    return TABLE[VARIANTS[variant]["algorithm"]]


def collected(drift: float = 0.3, num_generations: int = 2) -> tuple[Tensor, Tensor, Experience]:
    """(policy log-probabilities, values, experience with old values and rows), on a binary grid where sums matter."""
    policy, experience = batch(num_generations=num_generations, drift=drift)
    generator = torch.Generator().manual_seed(11)
    old_values = torch.randn(policy.shape, generator=generator, dtype=torch.float64)
    values = (old_values + drift * torch.randn(policy.shape, generator=generator, dtype=torch.float64)).requires_grad_()
    rows = torch.arange(len(policy)) + 40
    return policy, values, with_fields(experience, old_values=old_values, rows=rows, step=3)


def prepared(experience: Experience, config: TrainConfig) -> Experience:
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.prepare is None:
        return experience
    return with_fields(experience, targets=algorithm.prepare(experience, config, STATE))


def output_of(policy: Tensor, values: Tensor, experience: Experience, config: TrainConfig) -> LossOutput:
    return ALGORITHMS[config.algorithm].loss(policy, experience, config, values)


def gradients(policy: Tensor, values: Tensor, experience: Experience, config: TrainConfig) -> tuple[Tensor, Tensor]:
    """Of the loss of one update by log-probabilities and by values, as the loop takes it."""
    experience = prepared(experience, config)
    output = output_of(policy, values, experience, config)
    denominator = ALGORITHMS[config.algorithm].counted(experience).sum().clamp(min=1)
    loss = masked_sum(output.losses, output.mask) / denominator
    found = torch.autograd.grad(loss, (policy, values), allow_unused=True)
    by_policy, by_values = (torch.zeros_like(policy) if g is None else g for g in found)
    return by_policy, by_values


def taken(experience: Experience, order: Tensor) -> Experience:
    """The experience with the completions of every group in another order. order: (K,) int64."""
    completions = {
        name: value[:, order] if isinstance(value, Tensor) and not name.startswith("prompt") else value
        for name, value in vars(experience.completions).items()
    }
    fields = ("rewards", "reward_mask", "ref_logprobs", "old_logprobs", "old_values")
    return with_fields(
        experience,
        completions=type(experience.completions)(**completions),
        **{name: getattr(experience, name)[:, order] for name in fields},
    )


def test_every_method_stands_in_the_table() -> None:
    assert list(TABLE) == list(ALGORITHMS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_has_the_shape_of_what_is_counted(variant: str) -> None:
    policy, values, experience = collected()
    config = config_of(variant)
    experience = prepared(experience, config)
    output = output_of(policy, values, experience, config)
    counted = ALGORITHMS[config.algorithm].counted(experience)
    assert output.losses.shape == output.mask.shape == counted.shape
    assert torch.equal(output.mask, counted)
    assert counted.any()
    assert {x.shape for x in output.metrics.values()} == {counted.shape}
    assert not any(x.requires_grad for x in output.metrics.values())
    assert all(x[output.mask].isfinite().all() for x in output.metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_is_finite_and_not_zero(variant: str) -> None:
    policy, values, experience = collected()
    by_policy, by_values = gradients(policy, values, experience, config_of(variant))
    assert by_policy.isfinite().all()
    assert by_policy.abs().max() > 1e-3
    assert (by_values.abs().max() > 0) == (config_of(variant).algorithm in ("ppo", "vpg"))
    mask = experience.completions.completion_mask
    assert (by_policy[~mask] == 0).all()
    assert (by_values[~mask] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_shift_of_the_rewards_of_a_prompt(variant: str) -> None:
    policy, values, experience = collected()
    shift = torch.tensor([0.0, 1.5, -3.25, 8.0, -0.5], dtype=torch.float64)[:, None]
    shifted = with_fields(experience, rewards=experience.rewards + shift)
    before, after = (gradients(policy, values, e, config_of(variant))[0] for e in (experience, shifted))
    assert torch.equal(before, after) == properties_of(variant).shift


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num_generations", [2, 4])
def test_the_order_of_completions(variant: str, num_generations: int) -> None:
    if config_of(variant).offline and num_generations != 2:
        pytest.skip("a pair is chosen and rejected")
    policy, values, experience = collected(num_generations=num_generations)
    order = torch.arange(num_generations).roll(1)
    swapped = gradients(
        policy.detach()[:, order].requires_grad_(),
        values.detach()[:, order].requires_grad_(),
        taken(experience, order),
        config_of(variant),
    )[0]
    if properties_of(variant).swap:
        expected = gradients(policy, values, experience, config_of(variant))[0]
        torch.testing.assert_close(swapped, expected[:, order], rtol=1e-12, atol=1e-12)
    else:
        expected = gradients(policy, values, experience, config_of(variant))[0]
        assert (swapped - expected[:, order]).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_wider_padding_changes_nothing(variant: str) -> None:
    policy, values, experience = collected()

    def wider(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full((*x.shape[:2], 3), fill, dtype=x.dtype)], -1)

    completions = vars(experience.completions) | {
        "completion_mask": wider(experience.completions.completion_mask, False),
        "completion_ids": wider(experience.completions.completion_ids, 0),
    }
    padded = with_fields(
        experience,
        completions=type(experience.completions)(**completions),
        **{
            name: wider(getattr(experience, name), torch.nan) for name in ("ref_logprobs", "old_logprobs", "old_values")
        },
    )
    wide_policy = wider(policy.detach(), torch.nan).requires_grad_()
    wide_values = wider(values.detach(), torch.nan).requires_grad_()
    narrow = gradients(policy, values, experience, config_of(variant))
    wide = gradients(wide_policy, wide_values, padded, config_of(variant))
    for before, after in zip(narrow, wide, strict=True):
        torch.testing.assert_close(after[..., :-3], before, rtol=1e-12, atol=1e-14)
        assert (after[..., -3:] == 0).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_cut_into_micro_batches(variant: str) -> None:
    policy, values, experience = collected()
    config = config_of(variant)
    whole = gradients(policy, values, experience, config)[0]
    ready = prepared(experience, config)
    denominator = ALGORITHMS[config.algorithm].counted(ready).sum()
    total = torch.zeros_like(policy)
    for prompts in (torch.tensor([3]), torch.tensor([0, 4]), torch.tensor([2, 1])):
        output = output_of(policy[prompts], values[prompts], ready.select(prompts), config)
        (part,) = torch.autograd.grad(masked_sum(output.losses, output.mask) / denominator, policy)
        total += part
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("variant", VARIANTS)
def test_feedback_that_does_not_count(variant: str) -> None:
    """Four completions of which two do not count are as good as the other two alone, whatever stands in their place."""
    if config_of(variant).offline:
        pytest.skip("a pair of a preference dataset counts as a whole")
    policy, values, experience = collected(num_generations=4)
    counts = torch.tensor([True, False, True, False]).expand_as(experience.reward_mask)
    masked = with_fields(
        experience, reward_mask=counts, rewards=torch.where(counts, experience.rewards, torch.nan).double()
    )
    kept = torch.tensor([0, 2])
    alone = gradients(
        policy.detach()[:, kept].requires_grad_(),
        values.detach()[:, kept].requires_grad_(),
        taken(experience, kept),
        config_of(variant),
    )
    for found, expected in zip(gradients(policy, values, masked, config_of(variant)), alone, strict=True):
        torch.testing.assert_close(found[:, kept], expected, rtol=1e-12, atol=1e-14)
        assert (found[:, [1, 3]] == 0).all()


@pytest.mark.parametrize(("name", "factor"), [(n, p.at_ratio_one) for n, p in TABLE.items() if p.at_ratio_one])
def test_the_multiple_of_p3o_at_ratio_one(name: str, factor: float) -> None:
    policy, values, experience = collected(drift=0.0, num_generations=3)
    experience = with_fields(experience, old_logprobs=policy.detach())
    p3o = gradients(policy, values, experience, config_of("p3o"))[0]
    found = gradients(policy, values, experience, config_of(name))[0]
    torch.testing.assert_close(found, factor * p3o, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("p3o unclipped",)])
def test_far_from_the_old_policy_everything_stays_finite(variant: str) -> None:
    """Log-ratios of +-50 a completion in float32: what is not clipped or clamped has no exponential of a ratio."""
    _, values, experience = collected()
    sign = torch.tensor([1.0, -1.0])[:, None]
    first = torch.zeros_like(experience.ref_logprobs)
    first[..., 0] = 1
    old = torch.where(experience.completions.completion_mask, experience.old_logprobs, 0)
    policy = (old + 50 * sign * first).float().requires_grad_()
    by_policy, by_values = gradients(policy, values.detach().float().requires_grad_(), experience, config_of(variant))
    assert by_policy.isfinite().all()
    assert by_values.isfinite().all()


def test_sampled_labels_are_drawn_once_for_a_prompt() -> None:
    """They depend on seed, step and dataset row, not on the batch around the prompt."""
    _, _, experience = collected(num_generations=4)
    config = config_of("online_dpo", **{"online_dpo.labels": "sampled"})
    labels = prepared(experience, config).targets.labels
    assert labels is not None
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    part = torch.tensor([4, 2])
    assert torch.equal(prepared(experience.select(part), config).targets.labels, labels[part])
    again = with_fields(experience, step=4)
    assert not torch.equal(prepared(again, config).targets.labels, labels)
    other_seed = config_of("online_dpo", seed=1, **{"online_dpo.labels": "sampled"})
    assert not torch.equal(prepared(experience, other_seed).targets.labels, labels)


def test_a_tie_has_no_hard_label() -> None:
    policy, values, experience = collected()
    tied = with_fields(experience, rewards=torch.full_like(experience.rewards, 0.5))
    hard = gradients(policy, values, tied, config_of("online_dpo hard"))[0]
    expected = gradients(policy, values, tied, config_of("online_dpo"))[0]
    assert (hard == 0).all()
    assert expected.abs().max() > 1e-3  # a label of one half draws the pair to the reference


def test_tied_best_completions_log_one_reward() -> None:
    policy, values, experience = collected(num_generations=4)
    rewards = torch.tensor([0.5, 0.25, 0.5, -1.0], dtype=torch.float64).expand(5, 4)
    output = output_of(policy, values, with_fields(experience, rewards=rewards), config_of("raft"))
    assert output.metrics["reward_best"].tolist() == [0.5] * 5


def test_the_moving_average_is_of_earlier_steps() -> None:
    _, _, experience = collected()
    config = config_of("reinforce")
    algorithm = ALGORITHMS["reinforce"]
    assert algorithm.prepare is not None
    assert algorithm.next_state is not None
    assert algorithm.prepare(experience, config, STATE).baseline == 0.25  # 1.5 / 6
    state = algorithm.next_state(experience, config, STATE)
    mask = experience.completions.completion_mask
    logratio = torch.where(mask, experience.old_logprobs - experience.ref_logprobs, 0).sum(-1)
    shaped = experience.rewards - BETA * logratio
    assert state.average.count == 6 + shaped.numel()
    assert state.average.total == pytest.approx(1.5 + shaped.sum().item(), abs=1e-12)


def test_the_baseline_is_subtracted_from_every_reward() -> None:
    policy, values, experience = collected()
    lowered = with_fields(experience, rewards=experience.rewards - 0.25)
    with_baseline = gradients(policy, values, experience, config_of("reinforce"))[0]
    without = gradients(policy, values, lowered, config_of("reinforce without baseline"))[0]
    torch.testing.assert_close(with_baseline, without, rtol=1e-12, atol=1e-14)


def test_grpo_takes_the_mean_over_the_tokens_of_a_completion() -> None:
    """At ratio 1 without a KL: -A / T for every token, the mean over completions; a pair has advantages +-1."""
    policy, values, experience = collected(drift=0.0)
    experience = with_fields(experience, old_logprobs=policy.detach())
    found = gradients(policy, values, experience, config_of("grpo", beta=0.0))[0]
    mask = experience.completions.completion_mask
    difference = experience.rewards[:, :1] - experience.rewards[:, 1:]
    sign = torch.cat([difference, -difference], 1).sign()
    expected = -sign[..., None] / mask.sum(-1, keepdim=True) * mask / sign.numel()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(("kl", "factor"), [(3.0, 1 - 0.2 * 10 / 100), (6.6, 1 + 0.1 * 10 / 100), (90.0, 1.02)])
def test_the_adaptive_controller(kl: float, factor: float) -> None:
    """Error clipped to -+0.2, times completions by horizon."""
    _, _, experience = collected()
    mask = experience.completions.completion_mask
    lengths = mask.sum(-1, keepdim=True)
    old = torch.where(mask, experience.ref_logprobs + kl / lengths.double(), torch.nan)
    config = config_of("ppo", **{"ppo.target_kl": 6.0, "ppo.kl_horizon": 100})
    algorithm = ALGORITHMS["ppo"]
    assert algorithm.next_state is not None
    state = algorithm.next_state(with_fields(experience, old_logprobs=old), config, STATE)
    assert state.beta == pytest.approx(BETA * factor, rel=1e-9)
    fixed = algorithm.next_state(with_fields(experience, old_logprobs=old), config_of("ppo"), STATE)
    assert fixed.beta == BETA


def test_ppo_reads_the_beta_of_the_controller() -> None:
    _, _, experience = collected()
    config = config_of("ppo unwhitened")
    algorithm = ALGORITHMS["ppo"]
    assert algorithm.prepare is not None
    mild, strong = (algorithm.prepare(experience, config, MethodState(beta=beta)) for beta in (0.0, 2.0))
    assert mild.advantages is not None
    assert strong.advantages is not None
    assert (mild.advantages - strong.advantages).abs().max() > 0.1


def test_ppo_on_its_first_update() -> None:
    """Ratio 1: nothing is clipped; with gamma = lambda = 1 and no values the advantage is the reward to go."""
    policy, _, experience = collected(drift=0.0)
    zeros = torch.zeros_like(policy)
    experience = with_fields(experience, old_values=zeros, old_logprobs=policy.detach())
    config = config_of("ppo unwhitened", **{"ppo.lam": 1.0})
    ready = prepared(experience, config)
    output = output_of(policy, zeros.clone().requires_grad_(), ready, config)
    assert (output.metrics["clip_ratio"] == 0).all()
    assert ready.targets.advantages is not None
    mask = experience.completions.completion_mask
    penalty = torch.where(mask, -BETA * (policy.detach() - experience.ref_logprobs), 0)
    whole = experience.rewards + penalty.sum(-1)
    torch.testing.assert_close(ready.targets.advantages[..., 0], whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ready.targets.returns, ready.targets.advantages)


def test_whitened_advantages_have_mean_0_and_variance_1() -> None:
    _, _, experience = collected()
    advantages = prepared(experience, config_of("ppo")).targets.advantages
    assert advantages is not None
    counted = advantages[experience.completions.completion_mask]
    assert counted.mean().item() == pytest.approx(0, abs=1e-12)
    assert counted.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
