"""P3O's three losses, each against every property that it should have."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairtune.maths import pairwise
from pairtune.maths.kl import kl_shaped_rewards

KINDS = ["joint", "separate", "none"]
EPSILON = 0.2
inf, nan = math.inf, math.nan


def loss_of(kind: str, policy, old, rewards, *, epsilon=EPSILON, max_ratio=None, mask=None) -> Tensor:
    if kind == "none":
        return pairwise.pairwise_policy_gradient_loss(policy, old, rewards, max_ratio=max_ratio, mask=mask)
    function = pairwise.p3o_joint_loss if kind == "joint" else pairwise.p3o_separate_loss
    return function(policy, old, rewards, epsilon=epsilon, max_ratio=max_ratio, mask=mask)


def loss_and_gradient(kind: str, policy: Tensor, old: Tensor, rewards: Tensor, **options) -> tuple[Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    loss = loss_of(kind, policy, old, rewards, **options)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    return loss.detach(), gradient


# --------------------------------------------------------------------------------- the paper's equations, pair by pair


def paper_objective(kind: str, policy, held, old, rewards, max_ratio: float | None) -> float:
    """One pair, to be maximised. `held` are the policy's log-probabilities inside the stop-gradient factors."""

    def clamped(weight: float) -> float:
        return weight if max_ratio is None else min(max(weight, 1 / max_ratio), max_ratio)

    def clip(x: float, low: float, high: float) -> float:
        return min(max(x, low), high)

    q = rewards[0] - rewards[1]
    rho = [math.exp(policy[i] - old[i]) for i in (0, 1)]
    held_rho = [math.exp(held[i] - old[i]) for i in (0, 1)]
    if kind == "separate":
        a, b = q * clamped(held_rho[1]), -q * clamped(held_rho[0])
        clipped = [clip(x, 1 - EPSILON, 1 + EPSILON) for x in rho]
        return (min(a * rho[0], a * clipped[0]) + min(b * rho[1], b * clipped[1])) / 2
    w = q * clamped(held_rho[0] * held_rho[1])
    d, d_old = policy[0] - policy[1], old[0] - old[1]
    if kind == "none":
        return w * d / 2
    return min(w * d, w * clip(d, d_old - EPSILON, d_old + EPSILON)) / 2


def paper_loss(kind: str, policy, old, rewards, mask, max_ratio: float | None, held=None) -> float:
    """One group: minus the mean over the pairs that count."""
    held = policy if held is None else held
    pairs = [p for p in itertools.combinations(range(len(policy)), 2) if mask[p[0]] and mask[p[1]]]
    values = [paper_objective(kind, *([x[i], x[j]] for x in (policy, held, old, rewards)), max_ratio) for i, j in pairs]
    return -sum(values) / len(values) if values else 0.0


def random_groups(num_completions: int, *, num_groups: int = 24, seed: int = 0, scale: float = 0.5):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_completions)
    old = -30 * torch.rand(shape, dtype=torch.float64, generator=generator)
    policy = old + scale * torch.randn(shape, dtype=torch.float64, generator=generator)
    rewards = torch.randn(shape, dtype=torch.float64, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.8
    return policy, old, rewards, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_ratio", [None, 10.0, 1.3])
@pytest.mark.parametrize("num_completions", [2, 3, 5])
def test_equals_the_papers_equation(kind: str, max_ratio: float | None, num_completions: int) -> None:
    policy, old, rewards, mask = random_groups(num_completions)
    losses = loss_of(kind, policy, old, rewards, max_ratio=max_ratio, mask=mask)
    rows = zip(policy.tolist(), old.tolist(), rewards.tolist(), mask.tolist(), strict=True)
    expected = [paper_loss(kind, *row, max_ratio) for row in rows]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_ratio", [None, 1.3])
@pytest.mark.parametrize("num_completions", [2, 3])
def test_gradient_is_the_equations_with_its_stop_gradient_factors_held(kind, max_ratio, num_completions) -> None:
    policy, old, rewards, mask = random_groups(num_completions, seed=1)
    _, gradient = loss_and_gradient(kind, policy, old, rewards, max_ratio=max_ratio, mask=mask)
    step = 1e-6
    for g, k in itertools.product(range(len(policy)), range(num_completions)):
        ends = []
        for sign in (1, -1):
            moved = policy[g].tolist()
            moved[k] += sign * step
            rest = (old[g].tolist(), rewards[g].tolist(), mask[g].tolist(), max_ratio)
            ends.append(paper_loss(kind, moved, *rest, held=policy[g].tolist()))
        assert gradient[g, k].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_with_the_weights_held(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, old, rewards, mask = random_groups(3, num_groups=6, seed=2)
    weight_of = pairwise._log_weight
    held: list[Tensor] = []
    monkeypatch.setattr(pairwise, "_log_weight", lambda x, c: held.append(weight_of(x, c)) or held[-1])
    loss_of(kind, policy, old, rewards, mask=mask)
    weights = itertools.cycle(held.copy())
    monkeypatch.setattr(pairwise, "_log_weight", lambda x, c: next(weights))
    assert torch.autograd.gradcheck(
        lambda x: loss_of(kind, x, old, rewards, mask=mask), policy.clone().requires_grad_()
    )


# ----------------------------------------------------------------------------------------------------- every property


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_policy_gets_a_gradient(kind: str) -> None:
    policy, old, rewards, _ = (x.requires_grad_() if x.is_floating_point() else x for x in random_groups(3))
    loss_of(kind, policy, old, rewards, max_ratio=10.0).sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().sum() > 0
    assert old.grad is None
    assert rewards.grad is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(2,), (1, 3), (4, 2, 3), (0, 2)])
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert loss_of(kind, x, x, x).shape == shape[:-1]
    for share in (
        pairwise.pairs_past_clip(x, x, epsilon=EPSILON, kind="separate"),
        pairwise.clipped_share(x, x, x, epsilon=EPSILON, kind="separate"),
    ):
        assert share.shape == shape[:-1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_ratio", [None, 2.0])
def test_swapping_the_pair_changes_no_bit(kind: str, max_ratio: float | None) -> None:
    policy, old, rewards, _ = random_groups(2, num_groups=200, seed=3)
    loss, gradient = loss_and_gradient(kind, policy, old, rewards, max_ratio=max_ratio)
    swapped = loss_and_gradient(kind, policy.flip(-1), old.flip(-1), rewards.flip(-1), max_ratio=max_ratio)
    assert torch.equal(loss, swapped[0])
    assert torch.equal(gradient, swapped[1].flip(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_a_group_does_not_matter(kind: str) -> None:
    policy, old, rewards, mask = random_groups(4, seed=4)
    order = torch.tensor([2, 0, 3, 1])
    loss, gradient = loss_and_gradient(kind, policy, old, rewards, mask=mask)
    shuffled = loss_and_gradient(kind, policy[:, order], old[:, order], rewards[:, order], mask=mask[:, order])
    torch.testing.assert_close(loss, shuffled[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient[:, order], shuffled[1], rtol=1e-12, atol=1e-12)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    num_completions=st.integers(2, 4),
    seed=st.integers(0, 2**16),
    shift=st.integers(-(2**16), 2**16).map(lambda n: n / 64),
    beta=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_a_shift_of_a_prompts_rewards_changes_no_bit(kind, num_completions, seed, shift, beta) -> None:
    policy, old, rewards, mask = (
        x.float() if x.is_floating_point() else x for x in random_groups(num_completions, num_groups=4, seed=seed)
    )
    rewards = (rewards * 64).round() / 64
    logratio = policy - old - 0.3

    def run(r: Tensor) -> tuple[Tensor, Tensor]:
        return loss_and_gradient(
            kind, policy, old, kl_shaped_rewards(r, logratio, beta, mask), max_ratio=10.0, mask=mask
        )

    for before, after in zip(run(rewards), run(rewards + shift), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("kind", KINDS)
def test_rewards_are_subtracted_in_their_own_precision(kind: str) -> None:
    """2^20 + 1/64 needs more than float32: differenced after a cast, the shift would swallow the rewards."""
    policy, old, rewards, _ = random_groups(3)
    rewards = (rewards * 64).round() / 64
    before = loss_and_gradient(kind, policy.float(), old.float(), rewards)
    after = loss_and_gradient(kind, policy.float(), old.float(), rewards + 2.0**20)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [nan, inf, -inf])
@pytest.mark.parametrize("max_ratio", [None, 10.0])
def test_masked_completions_change_nothing(kind: str, poison: float, max_ratio: float | None) -> None:
    policy, old, rewards, _ = random_groups(5)
    mask = torch.tensor([True, False, True, True, False]).expand_as(policy)
    kept = [x[:, mask[0]] for x in (policy, old, rewards)]
    poisoned = [torch.where(mask, x, poison) for x in (policy, old, rewards)]
    loss, gradient = loss_and_gradient(kind, *poisoned, max_ratio=max_ratio, mask=mask)
    expected = loss_and_gradient(kind, *kept, max_ratio=max_ratio)
    torch.testing.assert_close(loss, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, mask[0]], expected[1], rtol=1e-12, atol=0)
    assert gradient[~mask].eq(0).all()
    for clip in ("joint", "separate"):
        options = {"epsilon": EPSILON, "kind": clip}
        past = pairwise.pairs_past_clip(*poisoned[:2], mask=mask, **options)
        assert torch.equal(past, pairwise.pairs_past_clip(*kept[:2], **options))
        clipped = pairwise.clipped_share(*poisoned, mask=mask, **options)
        assert torch.equal(clipped, pairwise.clipped_share(*kept, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mask", [[False, False, False], [False, True, False]])
def test_a_group_without_a_pair_gives_zero(kind: str, mask: list[bool]) -> None:
    """Beside a whole group, whose gradient must not suffer; the lone completion has a log-ratio that overflows."""
    counts = torch.tensor([mask, [True, True, True]])
    policy = torch.tensor([[nan, 900.0, inf], [-1.0, -2.0, -3.0]], dtype=torch.float64)
    old = torch.tensor([[inf, -900.0, nan], [-1.1, -2.2, -2.9]], dtype=torch.float64)
    rewards = torch.tensor([[nan, 1.0, -inf], [0.0, 1.0, 3.0]], dtype=torch.float64)
    loss, gradient = loss_and_gradient(kind, policy, old, rewards, mask=counts)
    assert loss[0].item() == 0
    assert gradient[0].eq(0).all()
    assert gradient[1].isfinite().all()
    assert gradient[1].abs().sum() > 0


@pytest.mark.parametrize("kind", KINDS)
def test_one_completion_makes_no_pair(kind: str) -> None:
    loss, gradient = loss_and_gradient(kind, torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.tensor([[3.0]]))
    assert loss.tolist() == [0.0]
    assert gradient.tolist() == [[0.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_ratio", [None, 10.0])
@pytest.mark.parametrize("logratios", [(0.3, -0.1), (500.0, 500.0), (500.0, -500.0), (-500.0, -500.0)])
def test_equal_rewards_give_exactly_zero(kind: str, max_ratio: float | None, logratios: tuple[float, float]) -> None:
    old = torch.tensor([[-3.0, -4.0]])
    loss, gradient = loss_and_gradient(
        kind, old + torch.tensor(logratios), old, torch.tensor([[1.7, 1.7]]), max_ratio=max_ratio
    )
    assert loss.tolist() == [0.0]
    assert gradient.tolist() == [[0.0, 0.0]]


def extreme_groups(size: float, num_completions: int):
    """Every sign of every log-ratio, with rewards in both orders, in float32."""
    signs = torch.tensor(list(itertools.product([-1.0, 0.0, 1.0], repeat=num_completions)))
    rewards = torch.tensor([[2.0, -1.0, 0.5][:num_completions], [-1.0, 2.0, 2.0][:num_completions]])
    old = torch.full_like(signs, -60.0)
    return tuple(x.repeat(2, 1) for x in (old + size * signs, old)), rewards.repeat_interleave(len(signs), 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_completions", [2, 3])
def test_log_ratios_of_50_stay_finite_where_the_weight_is_clamped(kind: str, num_completions: int) -> None:
    (policy, old), rewards = extreme_groups(50.0, num_completions)
    loss, gradient = loss_and_gradient(kind, policy, old, rewards, max_ratio=10.0)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [100.0, 1000.0])
def test_log_ratios_beyond_float32_never_become_nan(kind: str, size: float) -> None:
    (policy, old), rewards = extreme_groups(size, 3)
    loss, gradient = loss_and_gradient(kind, policy, old, rewards, max_ratio=10.0)
    assert not loss.isnan().any()
    assert not gradient.isnan().any()
    if kind != "separate":
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_separate_keeps_a_product_whose_factors_overflow() -> None:
    """rho_1 = e^100 is no float32, rho_2 = e^-100 is none either; their product is 1."""
    old = torch.tensor([-150.0, -10.0])
    policy = old + torch.tensor([100.0, -100.0])
    loss, gradient = loss_and_gradient("separate", policy, old, torch.tensor([0.0, 3.0]))
    assert loss.item() == 0.0  # (q - q) / 2
    assert gradient.tolist() == [1.5, -1.5]


@pytest.mark.parametrize("sign", [1, -1])
def test_the_weight_is_clamped(sign: int) -> None:
    """joint and none: the product of both ratios; separate: the other completion's ratio alone."""
    c, weight = 4.0, 4.0**sign
    old = torch.tensor([-3.0, -5.0], dtype=torch.float64)
    rewards = torch.tensor([2.0, 1.0], dtype=torch.float64)
    both = old + sign * 3.0
    for kind in ("joint", "none"):
        _, gradient = loss_and_gradient(kind, both, old, rewards, max_ratio=c)
        assert gradient.tolist() == pytest.approx([-weight / 2, weight / 2])
    # Each ratio is inside, their product is not.
    _, gradient = loss_and_gradient("joint", old + sign * 1.0, old, rewards, max_ratio=c)
    assert gradient[0].item() == pytest.approx(-weight / 2)
    # The second alone moved: its ratio weighs the first term, which is not clipped; the first's, 1, weighs the second.
    policy = old + torch.tensor([0.0, sign * 3.0])
    _, gradient = loss_and_gradient("separate", policy, old, rewards, max_ratio=c)
    assert gradient.tolist() == pytest.approx([-weight / 2, math.exp(3.0) / 2 if sign > 0 else 0.0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_call_says_what_is_wrong(kind: str) -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"one shape.*\(3, 1\)"):
        loss_of(kind, x, x, x[:, :1])
    with pytest.raises(ValueError, match="mask must be bool"):
        loss_of(kind, x, x, x, mask=x)
    with pytest.raises(ValueError, match=r"old_logprobs must be float32 or float64.*bfloat16"):
        loss_of(kind, x, x.bfloat16(), x)
    with pytest.raises(ValueError, match=r"max_ratio must be at least 1.*0\.5"):
        loss_of(kind, x, x, x, max_ratio=0.5)
    if kind != "none":
        with pytest.raises(ValueError, match="epsilon must be greater than 0"):
            loss_of(kind, x, x, x, epsilon=0.0)


# ----------------------------------------------------------------------------------------------------------- clipping

STEPS = [-1.0, -0.3, -0.225, -0.22, -0.205, -0.2, -0.195, -0.18, 0.0, 0.18, 0.185, 0.195, 0.2, 0.205, 0.3, 1.0]


@pytest.mark.parametrize("q", [1.5, -1.5])
@pytest.mark.parametrize("step", STEPS)
def test_joint_clips_the_difference_on_the_improving_side_only(q: float, step: float) -> None:
    """Whichever of the two moved, and with what both do together. The edge itself is inside."""
    old = torch.zeros(2, dtype=torch.float64)
    moves = [(step, 0.0), (0.0, -step), (step / 2, -step / 2)]
    if abs(step) != EPSILON:  # there the sum would be off by a rounding
        moves += [(step + 2.0, 2.0), (step - 0.7, -0.7)]
    for move in moves:
        policy = torch.tensor(move, dtype=torch.float64)
        _, gradient = loss_and_gradient("joint", policy, old, torch.tensor([q, 0.0], dtype=torch.float64))
        clipped = (q > 0 and step > EPSILON) or (q < 0 and step < -EPSILON)
        weight = math.exp(sum(move))
        expected = [0.0, 0.0] if clipped else [-q * weight / 2, q * weight / 2]
        assert gradient.tolist() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("q", [1.5, -1.5])
@pytest.mark.parametrize("first, second", list(itertools.product(STEPS, [-0.3, -0.21, 0.0, 0.19, 0.3])))
def test_separate_clips_each_ratio_on_the_improving_side_only(q: float, first: float, second: float) -> None:
    old = torch.zeros(2, dtype=torch.float64)
    policy = torch.tensor([first, second], dtype=torch.float64)
    _, gradient = loss_and_gradient("separate", policy, old, torch.tensor([q, 0.0], dtype=torch.float64))
    for i, q_i in enumerate((q, -q)):
        ratio = math.exp(policy[i])
        clipped = (q_i > 0 and ratio > 1 + EPSILON) or (q_i < 0 and ratio < 1 - EPSILON)
        expected = 0.0 if clipped else -q_i * math.exp(first + second) / 2
        assert gradient[i].item() == pytest.approx(expected, rel=1e-12, abs=0)


@pytest.mark.parametrize("q", [1.0, -1.0])
def test_an_epsilon_above_one_has_no_lower_edge(q: float) -> None:
    old = torch.zeros(2)
    _, gradient = loss_and_gradient("separate", torch.tensor([-9.0, -9.0]), old, torch.tensor([q, 0.0]), epsilon=1.0)
    assert gradient.ne(0).all()


def test_the_joint_clip_decides_on_log_ratios_not_on_sums() -> None:
    """Sequence log-probabilities of thousands of nats have a float32 spacing of 2e-4; their log-ratios do not."""
    generator = torch.Generator().manual_seed(0)
    n = 4000
    old = torch.stack([-4000 * torch.rand(n, generator=generator), -20 * torch.rand(n, generator=generator)], -1)
    drift = EPSILON + 2e-3 * (torch.rand(n, generator=generator) - 0.5)
    policy = old + torch.stack([drift, torch.zeros(n)], -1)
    logratio = policy.double() - old.double()
    outside = logratio[:, 0] - logratio[:, 1] > torch.tensor(EPSILON)
    assert outside.float().mean() == pytest.approx(0.5, abs=0.05)
    _, gradient = loss_and_gradient("joint", policy, old, torch.tensor([1.0, 0.0]).expand(n, 2))
    assert torch.equal(gradient[:, 0] == 0, outside)


@pytest.mark.parametrize("kind", ["joint", "separate"])
@pytest.mark.parametrize("num_completions", [2, 4])
def test_shares_past_the_clip_and_clipped(kind: str, num_completions: int) -> None:
    policy, old, rewards, mask = random_groups(num_completions, num_groups=60, scale=0.25, seed=6)
    rewards[:5] = 1.0  # no gradient to stop
    past = pairwise.pairs_past_clip(policy, old, epsilon=EPSILON, kind=kind, mask=mask)
    clipped = pairwise.clipped_share(policy, old, rewards, epsilon=EPSILON, kind=kind, mask=mask)
    for g in range(len(policy)):
        outside, stopped = [], []
        for i, j in itertools.combinations(range(num_completions), 2):
            if not (mask[g, i] and mask[g, j]):
                continue
            pair = [i, j]
            logratio = (policy - old)[g, pair].tolist()
            q = (rewards[g, i] - rewards[g, j]).item()
            if kind == "joint":
                drift = logratio[0] - logratio[1]
                outside.append(abs(drift) > EPSILON)
                stopped.append(q * drift > 0 and abs(drift) > EPSILON)
            else:
                ratios = [math.exp(x) for x in logratio]
                outside += [not 1 - EPSILON <= x <= 1 + EPSILON for x in ratios]
                stopped += [
                    (s > 0 and x > 1 + EPSILON) or (s < 0 and x < 1 - EPSILON)
                    for s, x in zip((q, -q), ratios, strict=True)
                ]
        assert past[g].item() == pytest.approx(sum(outside) / max(len(outside), 1))
        assert clipped[g].item() == pytest.approx(sum(stopped) / max(len(stopped), 1))
    assert 0.1 < past.mean() < 0.9
    assert 0 < clipped.mean() < past.mean()
    if num_completions == 2:
        _, gradient = loss_and_gradient(kind, policy, old, rewards, mask=mask)
        lives = (mask.all(-1) & (rewards[:, 0] != rewards[:, 1]))[:, None]
        assert torch.equal(clipped, ((gradient == 0) & lives).double().mean(-1))


def test_nothing_is_past_the_clip_before_the_first_update() -> None:
    old = random_groups(3)[1]
    for kind in ("joint", "separate"):
        assert pairwise.pairs_past_clip(old, old, epsilon=1e-6, kind=kind).eq(0).all()


def test_an_unknown_clip_is_refused() -> None:
    x = torch.zeros(2)
    with pytest.raises(ValueError, match="'joint' or 'separate', but it is 'none'"):
        pairwise.pairs_past_clip(x, x, epsilon=0.2, kind="none")
