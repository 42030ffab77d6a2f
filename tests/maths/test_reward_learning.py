"""Losses of reward learning: comparisons and rankings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairtune.maths import reward_learning
from pairtune.maths.reward_learning import (
    bradley_terry_loss,
    centring_penalty,
    pairwise_ranking_loss,
    plackett_luce_loss,
)

inf, nan = math.inf, math.nan
RANKING: dict[str, Callable[..., Tensor]] = {
    "plackett-luce": plackett_luce_loss,
    "k-choose-2": pairwise_ranking_loss,
}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def probability_of_order(rewards: list[float]) -> float:
    """That the completions are drawn in the order given: the product of softmax over those that are left."""
    weights = [math.exp(r) for r in rewards]
    return math.prod(w / sum(weights[k:]) for k, w in enumerate(weights))


def plain_plackett_luce(rewards: list[float], ranks: list[int]) -> float:
    """-log of the sum over all orders in which no completion stands before one of a better rank."""
    orders = [
        order for order in itertools.permutations(range(len(ranks))) if [ranks[i] for i in order] == sorted(ranks)
    ]
    return -math.log(sum(probability_of_order([rewards[i] for i in order]) for order in orders))


def plain_pairwise(rewards: list[float], ranks: list[int]) -> float:
    losses = [
        -math.log(sigmoid(rewards[i] - rewards[j]))
        for i, j in itertools.permutations(range(len(ranks)), 2)
        if ranks[i] < ranks[j]
    ]
    return sum(losses) / len(losses) if losses else 0.0


PLAIN = {"plackett-luce": plain_plackett_luce, "k-choose-2": plain_pairwise}


def random_rankings(num_completions: int, *, ties: bool, num_prompts: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rewards = 2 * torch.randn(num_prompts, num_completions, dtype=torch.float64, generator=generator)
    if ties:
        return rewards, torch.randint(1, 4, rewards.shape, generator=generator)
    return rewards, torch.rand(rewards.shape, generator=generator).argsort(-1) + 1


def loss_and_gradient(loss: Callable[..., Tensor], rewards: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    rewards = rewards.clone().requires_grad_()
    losses = loss(rewards, *args, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), rewards)
    return losses.detach(), gradient


def random_pairs(num_pairs: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = 2 * torch.randn(2, num_pairs, dtype=torch.float64, generator=generator)
    return chosen, rejected, torch.rand(num_pairs, dtype=torch.float64, generator=generator)


# -------------------------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_bradley_terry_equals_the_equation(label_smoothing: float) -> None:
    chosen, rejected, some = random_pairs()
    options = {"label_smoothing": label_smoothing}

    def cross_entropy(d: float, p: float) -> float:
        p = (1 - label_smoothing) * p + label_smoothing * (1 - p)
        return -p * math.log(sigmoid(d)) - (1 - p) * math.log(sigmoid(-d))

    differences = (chosen - rejected).tolist()
    for losses, expected in [
        (bradley_terry_loss(chosen, rejected, **options), [cross_entropy(d, 1) for d in differences]),
        (
            bradley_terry_loss(chosen, rejected, margin=some, **options),
            [cross_entropy(d - m, 1) for d, m in zip(differences, some.tolist(), strict=True)],
        ),
        (
            bradley_terry_loss(chosen, rejected, probability=some, **options),
            [cross_entropy(d, p) for d, p in zip(differences, some.tolist(), strict=True)],
        ),
    ]:
        torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_soft_label_is_the_average_of_the_hard_ones_and_smallest_at_its_log_odds() -> None:
    chosen, rejected, p = random_pairs()
    soft = bradley_terry_loss(chosen, rejected, probability=p)
    hard = p * bradley_terry_loss(chosen, rejected) + (1 - p) * bradley_terry_loss(rejected, chosen)
    torch.testing.assert_close(soft, hard, rtol=1e-12, atol=0)
    assert torch.equal(
        bradley_terry_loss(chosen, rejected, probability=torch.ones(40)), bradley_terry_loss(chosen, rejected)
    )
    _, gradient = loss_and_gradient(bradley_terry_loss, rejected + p.logit(), rejected, probability=p)
    assert gradient.abs().max() < 1e-14


def test_gradients_of_pairs() -> None:
    chosen, rejected, some = (x.requires_grad_() for x in random_pairs(6))
    for options in ({}, {"margin": some.detach()}, {"probability": some.detach()}, {"label_smoothing": 0.2}):
        assert torch.autograd.gradcheck(lambda c, r, o=options: bradley_terry_loss(c, r, **o), (chosen, rejected))
    assert torch.autograd.gradcheck(centring_penalty, (chosen, rejected))
    for name in ("margin", "probability"):  # what the data says is no parameter
        bradley_terry_loss(chosen, rejected, **{name: some}).sum().backward()
    assert some.grad is None
    assert chosen.grad is not None


def test_centring_is_the_square_of_the_sum() -> None:
    penalty = centring_penalty(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([2.0, 2.0, 0.5]))
    assert penalty.tolist() == [9.0, 0.0, 12.25]


@pytest.mark.parametrize("poison", [nan, inf])
@pytest.mark.parametrize("extra", [None, "margin", "probability"])
def test_masked_pairs_change_nothing(poison: float, extra: str | None) -> None:
    mask = torch.tensor([True, False, True])
    chosen = torch.tensor([1.0, poison, -2.0], requires_grad=True)
    rejected = torch.tensor([0.5, poison, 1.0], requires_grad=True)
    given = {} if extra is None else {extra: torch.tensor([0.25, poison, 0.75])}
    kept = {name: x[mask] for name, x in given.items()}
    losses = bradley_terry_loss(chosen, rejected, mask=mask, **given)
    assert losses[1].item() == 0
    assert torch.equal(losses[mask], bradley_terry_loss(chosen[mask], rejected[mask], **kept))
    losses.sum().backward()
    assert chosen.grad[1].item() == rejected.grad[1].item() == 0
    assert torch.equal(chosen.grad, -rejected.grad)
    assert chosen.grad[mask].isfinite().all()
    assert chosen.grad[mask].ne(0).all()
    penalty = centring_penalty(chosen, rejected, mask=mask)
    assert penalty.tolist() == [2.25, 0.0, 1.0]
    (gradient,) = torch.autograd.grad(penalty.sum(), chosen)
    assert gradient.tolist() == [3.0, 0.0, -2.0]


@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_pairs_are_finite_where_the_sigmoid_is_not_a_float(difference: float) -> None:
    chosen, rejected = torch.tensor([difference]), torch.zeros(1)
    for options in ({}, {"label_smoothing": 0.1}, {"probability": torch.tensor([0.3])}):
        loss, gradient = loss_and_gradient(bradley_terry_loss, chosen, rejected, **options)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
    loss, gradient = loss_and_gradient(bradley_terry_loss, chosen, rejected)
    assert loss.item() == max(-difference, 0.0)
    assert gradient.item() == (-1.0 if difference < 0 else 0.0)


# ----------------------------------------------------------------------------------------------------------- rankings


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("num_completions", [1, 2, 3, 5])
def test_rankings_equal_the_equation(kind: str, ties: bool, num_completions: int) -> None:
    """With ties, by all K! orders."""
    rewards, ranks = random_rankings(num_completions, ties=ties)
    losses = RANKING[kind](rewards, ranks)
    expected = [PLAIN[kind](*rows) for rows in zip(rewards.tolist(), ranks.tolist(), strict=True)]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-14)


def test_the_probabilities_of_all_rankings_sum_to_one() -> None:
    rewards = random_rankings(4, ties=False, num_prompts=1)[0].expand(24, 4)
    orders = torch.tensor(list(itertools.permutations([1, 2, 3, 4])))
    assert plackett_luce_loss(rewards, orders).neg().exp().sum().item() == pytest.approx(1, abs=1e-14)
    best = torch.eye(4, dtype=torch.int64).neg()  # who is the best, the others undecided: a softmax
    losses = plackett_luce_loss(rewards[:4], best)
    torch.testing.assert_close(-losses, rewards[0].log_softmax(-1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", RANKING)
def test_a_ranking_of_two_is_bradley_terry(kind: str) -> None:
    chosen, rejected, _ = random_pairs()
    rewards = torch.stack([chosen, rejected], -1)
    expected, gradient = loss_and_gradient(lambda x: bradley_terry_loss(x[:, 0], x[:, 1]), rewards)
    found = loss_and_gradient(RANKING[kind], rewards, torch.tensor([1, 2]).expand(40, 2))
    torch.testing.assert_close(found[0], expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(found[1], gradient, rtol=1e-12, atol=1e-15)
    swapped = RANKING[kind](rewards.flip(-1), torch.tensor([7, -3]).expand(40, 2))  # only the order of ranks matters
    torch.testing.assert_close(swapped, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("ties", [False, True])
def test_the_order_in_which_completions_are_written_changes_nothing(kind: str, ties: bool) -> None:
    rewards, ranks = random_rankings(5, ties=ties)
    losses, gradient = loss_and_gradient(RANKING[kind], rewards, ranks)
    order = torch.tensor([3, 0, 4, 2, 1])
    permuted = loss_and_gradient(RANKING[kind], rewards[:, order], ranks[:, order])
    torch.testing.assert_close(permuted[0], losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(permuted[1], gradient[:, order], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("ties", [False, True])
def test_gradients_of_rankings(kind: str, ties: bool) -> None:
    rewards, ranks = random_rankings(4, ties=ties, num_prompts=4)
    assert torch.autograd.gradcheck(lambda x: RANKING[kind](x, ranks), rewards.requires_grad_())


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_completions_that_are_all_tied_teach_nothing(kind: str, dtype: torch.dtype) -> None:
    rewards = 10 * random_rankings(4, ties=False)[0].to(dtype)
    losses, gradient = loss_and_gradient(RANKING[kind], rewards, torch.full(rewards.shape, 2))
    assert losses.abs().max() < 1e-13
    assert gradient.abs().max() < 1e-13


def test_a_tie_draws_no_rewards_together() -> None:
    """The two best are tied: the better of them does not lose by being it, as it would by Breslow's rule."""
    rewards = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
    _, gradient = loss_and_gradient(plackett_luce_loss, rewards, torch.tensor([[1, 1, 2]]))
    assert gradient[0, 0] < 0
    assert gradient[0, 1] < 0
    assert gradient[0, 2] > 0


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_masked_completions_change_nothing(kind: str, ties: bool, poison: float) -> None:
    rewards, ranks = random_rankings(5, ties=ties)
    mask = torch.tensor([True, False, True, True, False])
    expected = loss_and_gradient(RANKING[kind], rewards[:, mask], ranks[:, mask])
    losses, gradient = loss_and_gradient(
        RANKING[kind], torch.where(mask, rewards, poison), torch.where(mask, ranks, 1), mask=mask.expand_as(rewards)
    )
    torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient[:, mask], expected[1], rtol=1e-12, atol=1e-14)
    assert gradient[:, ~mask].eq(0).all()
    for alone in (torch.tensor([True, False, False, False, False]), torch.zeros(5, dtype=torch.bool)):
        losses, gradient = loss_and_gradient(
            RANKING[kind], torch.where(alone, rewards, poison), ranks, mask=alone.expand_as(rewards)
        )
        assert losses.eq(0).all()
        assert gradient.eq(0).all()


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rankings_are_finite_at_large_differences(kind: str, ties: bool, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, 0.0, 1e4, 5e3]], dtype=dtype)
    ranks = torch.tensor([[1, 2, 2, 1], [1, 1, 2, 3]] if ties else [[1, 4, 3, 2], [1, 2, 3, 4]])
    losses, gradient = loss_and_gradient(RANKING[kind], rewards, ranks)
    assert losses.isfinite().all()
    assert gradient.isfinite().all()
    assert losses.dtype == dtype
    if kind == "plackett-luce":
        # Right: the two equal ones alone are undecided. Wrong: every step pays the distance to the best that is left.
        expected = [0.0, 3e4] if ties else [math.log(2), 3e4]
        assert losses.tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("ties", [False, True])
@settings(max_examples=30)
@given(rewards=st.lists(st.integers(-640, 640), min_size=2, max_size=5), shift=st.integers(-(2**16), 2**16))
def test_a_shift_of_a_prompts_rewards_changes_no_bit(ties: bool, rewards: list[int], shift: int) -> None:
    r, delta = torch.tensor([rewards]) / 64, shift / 64
    ranks = torch.tensor([[1 + k // 2 if ties else 1 + k for k in range(len(rewards))]])
    for loss in RANKING.values():
        before, after = (loss_and_gradient(loss, x, ranks) for x in (r, r + delta))
        assert torch.equal(before[0], after[0])
        assert torch.equal(before[1], after[1])
    margin = torch.tensor([0.5])
    assert torch.equal(
        bradley_terry_loss(r[:, 0], r[:, 1], margin=margin),
        bradley_terry_loss(r[:, 0] + delta, r[:, 1] + delta, margin=margin),
    )


def test_a_tie_of_one_prompt_changes_no_other() -> None:
    rewards, ranks = random_rankings(4, ties=False)
    alone = loss_and_gradient(plackett_luce_loss, rewards, ranks)
    ranks[5] = 1
    losses, gradient = loss_and_gradient(plackett_luce_loss, rewards, ranks)
    others = torch.arange(12) != 5
    assert torch.equal(losses[others], alone[0][others])
    assert torch.equal(gradient[others], alone[1][others])
    assert losses[5] != alone[0][5]


def test_the_most_likely_rewards_are_found_from_rankings_with_ties() -> None:
    """Rankings of which only the best two, unordered, are told: the rewards that made them come back."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([1.0, 0.3, -0.2, -1.1], dtype=torch.float64)
    pairs = list(itertools.combinations(range(4), 2))
    told = torch.tensor([[1 if k in pair else 2 for k in range(4)] for pair in pairs])
    frequency = plackett_luce_loss(truth.expand(6, 4), told).neg().exp()
    assert frequency.sum().item() == pytest.approx(1, abs=1e-14)
    found = torch.randn(4, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = torch.optim.LBFGS([found], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (frequency * plackett_luce_loss(found.expand(6, 4), told)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(found.detach() - found.detach().mean(), truth - truth.mean(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", RANKING)
@pytest.mark.parametrize("shape", [(2,), (1, 3), (4, 2, 3), (0, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_shapes(kind: str, shape: tuple[int, ...], ties: bool) -> None:
    rewards = torch.randn(shape)
    ranks = torch.ones(shape, dtype=torch.int64) if ties else torch.arange(shape[-1]).expand(shape)
    losses = RANKING[kind](rewards, ranks)
    assert losses.shape == shape[:-1]
    assert bradley_terry_loss(rewards, rewards).shape == centring_penalty(rewards, rewards).shape == shape
    rows = zip(rewards.reshape(-1, shape[-1]), ranks.reshape(-1, shape[-1]), strict=True)
    each = [RANKING[kind](*row) for row in rows]
    torch.testing.assert_close(losses.flatten(), torch.stack(each) if each else losses.flatten())


def test_a_wrong_call_says_what_is_wrong() -> None:
    two, three = torch.zeros(2), torch.zeros(3)
    with pytest.raises(ValueError, match=r"chosen_rewards, rejected_rewards and mask must have one shape"):
        bradley_terry_loss(two, three)
    with pytest.raises(ValueError, match=r"margin and mask must have one shape"):
        bradley_terry_loss(two, two, margin=torch.zeros(1))
    with pytest.raises(ValueError, match=r"mask must be bool"):
        centring_penalty(two, two, mask=torch.ones(2))
    with pytest.raises(ValueError, match="give one of them"):
        bradley_terry_loss(two, two, margin=two, probability=two)
    for smoothing in (-0.1, 0.5, nan):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
            bradley_terry_loss(two, two, label_smoothing=smoothing)
    for loss in RANKING.values():
        with pytest.raises(ValueError, match="rewards, ranks and mask must have one shape"):
            loss(three, torch.tensor([1, 2]))
        with pytest.raises(ValueError, match=r"ranks must be integers, 1 the best, but they are torch.float32"):
            loss(three, three)
    many = reward_learning.MOST_TIED + 1
    assert plackett_luce_loss(torch.zeros(many), torch.arange(many)).item() == pytest.approx(math.lgamma(many + 1))
    with pytest.raises(ValueError, match=f"among at most 12 of a prompt, but there are {many}"):
        plackett_luce_loss(torch.zeros(many), torch.arange(many).clamp(min=1))
