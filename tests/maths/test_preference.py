"""Labels of pairs, and the losses of DPO and IPO, offline and online."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pairtune.maths import preference
from pairtune.maths.masking import pair_indices

BETA, EPSILON = 0.4, 0.2
inf, nan = math.inf, math.nan
ONLINE: dict[str, Callable[..., Tensor]] = {"dpo": preference.online_dpo_loss, "ipo": preference.online_ipo_loss}
OFFLINE: dict[str, Callable[..., Tensor]] = {"dpo": preference.dpo_loss, "ipo": preference.ipo_loss}


def plain_pair_loss(kind: str, difference: float, label: float) -> float:
    """The loss with the first preferred and with the second preferred, weighed by the label."""

    def chosen(d: float) -> float:
        return math.log1p(math.exp(-BETA * d)) if kind == "dpo" else (d - 1 / (2 * BETA)) ** 2

    return label * chosen(difference) + (1 - label) * chosen(-difference)


def random_groups(num_completions: int, *, num_groups: int = 24, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """[policy, ref, labels] and pair mask."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_groups, num_completions)
    ref = -30 * torch.rand(shape, dtype=torch.float64, generator=generator)
    policy = ref + torch.randn(shape, dtype=torch.float64, generator=generator)
    num_pairs = num_completions * (num_completions - 1) // 2
    labels = torch.rand(num_groups, num_pairs, dtype=torch.float64, generator=generator)
    return [policy, ref, labels], torch.rand(labels.shape, generator=generator) < 0.8


def loss_and_gradient(loss: Callable[..., Tensor], policy: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    policy = policy.clone().requires_grad_()
    losses = loss(policy, *args, **options)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    return losses.detach(), gradient


# -------------------------------------------------------------------------------------------------------------- labels


def test_labels_of_all_pairs_in_order() -> None:
    rewards = torch.tensor([[1.0, 3.0, 1.0], [0.0, -1.0, 5.0]], dtype=torch.float64)
    hard = preference.preference_labels(rewards, "hard")
    assert hard.probability.tolist() == [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]]
    assert hard.mask.tolist() == [[True, False, True], [True, True, True]]
    expected = preference.preference_labels(rewards, "expected")
    differences = [[-2.0, 0.0, 2.0], [1.0, -5.0, -6.0]]
    sigmoids = [[1 / (1 + math.exp(-d)) for d in row] for row in differences]
    torch.testing.assert_close(expected.probability, torch.tensor(sigmoids, dtype=torch.float64), rtol=1e-14, atol=0)
    assert expected.probability[0, 1].item() == 0.5
    assert expected.mask.all()


@pytest.mark.parametrize("kind", ["hard", "expected"])
@pytest.mark.parametrize("poison", [nan, inf])
def test_a_pair_counts_where_both_of_it_do(kind: str, poison: float) -> None:
    rewards = torch.tensor([[1.0, poison, 2.0, 3.0], [poison, poison, poison, 0.0]])
    mask = torch.tensor([[True, False, True, True], [False, False, False, True]])
    labels = preference.preference_labels(rewards, kind, mask=mask)
    i, j = pair_indices(4)
    assert labels.mask.tolist() == (mask[:, i] & mask[:, j]).tolist()
    assert labels.probability[~labels.mask].eq(0.5).all()
    assert labels.probability[labels.mask].ne(0.5).all()


@pytest.mark.parametrize("kind", ["hard", "expected"])
@settings(max_examples=30)
@given(rewards=st.lists(st.integers(-640, 640), min_size=2, max_size=5), shift=st.integers(-(2**16), 2**16))
def test_a_shift_of_a_prompts_rewards_changes_no_label(kind: str, rewards: list[int], shift: int) -> None:
    r = torch.tensor(rewards) / 64
    before, after = preference.preference_labels(r, kind), preference.preference_labels(r + shift / 64, kind)
    assert torch.equal(before.probability, after.probability)
    assert torch.equal(before.mask, after.mask)


def test_large_differences_give_certain_labels() -> None:
    labels = preference.preference_labels(torch.tensor([[1e4, -1e4]]), "expected")
    assert labels.probability.tolist() == [[1.0]]
    assert not preference.preference_labels(torch.randn(2, 2, requires_grad=True), "expected").probability.requires_grad


def test_sampled_labels_have_the_given_probability() -> None:
    probability = torch.tensor([0.0, 0.25, 0.5, 1.0]).expand(1000, 4)
    uniforms = ((torch.arange(1000) + 0.5) / 1000)[:, None].expand(1000, 4)
    labels = preference.sample_labels(probability, uniforms)
    assert labels.mean(0).tolist() == pytest.approx([0.0, 0.25, 0.5, 1.0])
    assert set(labels.unique().tolist()) == {0.0, 1.0}
    # A uniform number may be 0, and is never 1: an impossible label is not drawn, a certain one always is.
    edges = preference.sample_labels(torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1 - 2**-24]))
    assert edges.tolist() == [0.0, 1.0]


# ------------------------------------------------------------------------------------------------------ offline losses


@pytest.mark.parametrize("kind", OFFLINE)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_offline_losses_equal_the_equation(kind: str, label_smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected = 2 * torch.randn(2, 40, dtype=torch.float64, generator=generator)
    losses = OFFLINE[kind](chosen, rejected, beta=BETA, label_smoothing=label_smoothing)
    expected = [plain_pair_loss(kind, d, 1 - label_smoothing) for d in (chosen - rejected).tolist()]
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", OFFLINE)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_offline_is_online_with_the_chosen_first(kind: str, label_smoothing: float) -> None:
    (policy, ref, labels), _ = random_groups(2)
    u = policy - ref
    offline = OFFLINE[kind](u[:, 0], u[:, 1], beta=BETA, label_smoothing=label_smoothing)
    online = ONLINE[kind](policy, ref, torch.full_like(labels, 1 - label_smoothing), beta=BETA)
    torch.testing.assert_close(offline, online, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", OFFLINE)
def test_offline_gradients(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = torch.randn(2, 6, dtype=torch.float64, generator=generator).requires_grad_()
    options = {"beta": BETA, "label_smoothing": 0.1}
    assert torch.autograd.gradcheck(lambda c, r: OFFLINE[kind](c, r, **options), (chosen, rejected))
    assert torch.autograd.gradcheck(lambda c, r: OFFLINE[kind](c, r, beta=BETA), (chosen, rejected))


@pytest.mark.parametrize("kind", OFFLINE)
@pytest.mark.parametrize("poison", [nan, inf])
def test_masked_pairs_of_a_dataset_change_nothing(kind: str, poison: float) -> None:
    mask = torch.tensor([True, False, True])
    chosen = torch.tensor([1.0, poison, -2.0], requires_grad=True)
    rejected = torch.tensor([0.5, poison, 1.0], requires_grad=True)
    losses = OFFLINE[kind](chosen, rejected, beta=BETA, mask=mask)
    assert losses[1].item() == 0
    assert torch.equal(losses[mask], OFFLINE[kind](chosen[mask], rejected[mask], beta=BETA))
    losses.sum().backward()
    assert chosen.grad.isfinite().all()
    assert chosen.grad[1].item() == rejected.grad[1].item() == 0
    assert torch.equal(chosen.grad, -rejected.grad)
    assert chosen.grad[mask].ne(0).all()


@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_dpo_is_finite_where_the_sigmoid_is_not_a_float(difference: float) -> None:
    """log(sigmoid(-4000)) would be -inf, with a NaN gradient."""
    zero = torch.zeros(1)
    loss, gradient = loss_and_gradient(preference.dpo_loss, torch.tensor([difference]), zero, beta=BETA)
    assert loss.item() == pytest.approx(max(-BETA * difference, 0.0))
    assert gradient.item() == pytest.approx(-BETA if difference < 0 else 0.0)
    for label in (0.0, 0.3, 1.0):
        policy = torch.tensor([[difference, 0.0]])
        loss, gradient = loss_and_gradient(
            preference.online_dpo_loss, policy, torch.zeros(1, 2), torch.tensor([[label]]), beta=BETA
        )
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


# ------------------------------------------------------------------------------------------------------- online losses


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("num_completions", [1, 2, 3, 5])
def test_online_losses_equal_the_equation(kind: str, num_completions: int) -> None:
    (policy, ref, labels), pair_mask = random_groups(num_completions)
    losses = ONLINE[kind](policy, ref, labels, pair_mask, beta=BETA)
    u = (policy - ref).tolist()
    for g, row in enumerate(u):
        pairs = itertools.combinations(range(num_completions), 2)
        values = [
            plain_pair_loss(kind, row[i] - row[j], labels[g, m].item())
            for m, (i, j) in enumerate(pairs)
            if pair_mask[g, m]
        ]
        expected = sum(values) / len(values) if values else 0.0
        assert losses[g].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ONLINE)
def test_the_expected_label_is_the_average_over_sampled_labels(kind: str) -> None:
    """Of loss and gradient, by all 2^M labels of a group with their probabilities."""
    (policy, ref, labels), pair_mask = random_groups(3)
    loss, gradient = loss_and_gradient(ONLINE[kind], policy, ref, labels, pair_mask, beta=BETA)
    mean_loss, mean_gradient = torch.zeros_like(loss), torch.zeros_like(gradient)
    for outcome in itertools.product([0.0, 1.0], repeat=3):
        drawn = torch.tensor(outcome, dtype=torch.float64).expand_as(labels)
        probability = torch.where(drawn == 1, labels, 1 - labels).prod(-1)
        sampled = loss_and_gradient(ONLINE[kind], policy, ref, drawn, pair_mask, beta=BETA)
        mean_loss += probability * sampled[0]
        mean_gradient += probability[:, None] * sampled[1]
    torch.testing.assert_close(loss, mean_loss, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, mean_gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ONLINE)
def test_a_hard_tie_has_no_gradient_and_an_expected_one_does(kind: str) -> None:
    rewards = torch.tensor([[1.5, 1.5]])
    policy, ref = torch.tensor([[-1.0, -4.0]]), torch.tensor([[-2.0, -2.0]])
    hard = preference.preference_labels(rewards, "hard")
    loss, gradient = loss_and_gradient(ONLINE[kind], policy, ref, *hard, beta=BETA)
    assert loss.tolist() == [0.0]
    assert gradient.tolist() == [[0.0, 0.0]]
    expected = preference.preference_labels(rewards, "expected")
    _, gradient = loss_and_gradient(ONLINE[kind], policy, ref, *expected, beta=BETA)
    assert gradient[0, 0] > 0  # the policy prefers the first by more than the reference does
    assert gradient[0, 1] == -gradient[0, 0]


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("poison", [nan, inf, -inf])
def test_masked_completions_change_nothing(kind: str, clip: bool, poison: float) -> None:
    (policy, ref, _), _ = random_groups(5)
    rewards = policy.sin()
    mask = torch.tensor([True, False, True, True, False]).expand_as(policy)

    def run(policy: Tensor, ref: Tensor, old: Tensor, labels: preference.PairLabels) -> tuple[Tensor, Tensor]:
        options = {"old_logprobs": old, "epsilon": EPSILON} if clip else {}
        return loss_and_gradient(ONLINE[kind], policy, ref, *labels, beta=BETA, **options)

    kept = [x[:, mask[0]] for x in (policy, ref, ref + 0.1)]
    expected = run(*kept, preference.preference_labels(rewards[:, mask[0]], "expected"))
    labels = preference.preference_labels(rewards, "expected", mask=mask)
    poisoned_labels = preference.PairLabels(torch.where(labels.mask, labels.probability, poison), labels.mask)
    losses, gradient = run(*(torch.where(mask, x, poison) for x in (policy, ref, ref + 0.1)), poisoned_labels)
    torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[:, mask[0]], expected[1], rtol=1e-12, atol=1e-14)
    assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize("kind", ONLINE)
def test_only_the_policy_gets_a_gradient(kind: str) -> None:
    inputs, _ = random_groups(3)
    old = (inputs[0] + 0.05).detach()
    for x in (*inputs, old):
        x.requires_grad_()
    ONLINE[kind](*inputs, beta=BETA, old_logprobs=old, epsilon=EPSILON).sum().backward()
    assert inputs[0].grad is not None
    assert inputs[0].grad.abs().sum() > 0
    assert all(x.grad is None for x in (*inputs[1:], old))


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("clip", [False, True])
def test_gradcheck(kind: str, clip: bool) -> None:
    (policy, ref, labels), pair_mask = random_groups(3, num_groups=8, seed=3)
    options = {"old_logprobs": policy.roll(1, 0) - ref.roll(1, 0) + ref, "epsilon": EPSILON} if clip else {}
    assert torch.autograd.gradcheck(
        lambda x: ONLINE[kind](x, ref, labels, pair_mask, beta=BETA, **options), policy.clone().requires_grad_()
    )


@pytest.mark.parametrize("kind", ONLINE)
def test_swapping_the_pair_and_its_label_changes_nothing(kind: str) -> None:
    (policy, ref, labels), _ = random_groups(2)
    losses, gradient = loss_and_gradient(ONLINE[kind], policy, ref, labels, beta=BETA)
    swapped = loss_and_gradient(ONLINE[kind], policy.flip(-1), ref.flip(-1), 1 - labels, beta=BETA)
    torch.testing.assert_close(losses, swapped[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, swapped[1].flip(-1), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("shape", [(2,), (1, 3), (4, 2, 3), (0, 2)])
def test_shapes(kind: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert ONLINE[kind](x, x, *preference.preference_labels(x, "hard"), beta=BETA).shape == shape[:-1]
    assert OFFLINE[kind](x, x, beta=BETA).shape == shape


# ------------------------------------------------------------------------------------------------------------ the clip


@pytest.mark.parametrize("kind", ONLINE)
@pytest.mark.parametrize("label", [0.9, 0.1])
@pytest.mark.parametrize("step", [-2.0, -0.3, -0.205, -0.195, 0.0, 0.195, 0.205, 0.3, 2.0])
def test_the_clip_stops_a_difference_that_moved_past_the_edge_for_the_better(kind, label, step) -> None:
    """Whichever of the two moved. Past the edge and past the minimum by as much again, the loss pulls back."""
    old, ref = (torch.tensor(x, dtype=torch.float64) for x in ([-3.0, -5.0], [-3.5, -5.2]))
    labels = torch.tensor([label], dtype=torch.float64)
    old_difference = (old - ref)[0].item() - (old - ref)[1].item()
    losses = {d: plain_pair_loss(kind, old_difference + d, label) for d in (step, EPSILON, -EPSILON)}
    edge = math.copysign(EPSILON, step)
    stopped = abs(step) > EPSILON and losses[step] < losses[edge]
    for move in ([step, 0.0], [0.0, -step], [step + 1, 1.0]):
        policy = old + torch.tensor(move, dtype=torch.float64)
        options = {"old_logprobs": old, "epsilon": EPSILON}
        loss, gradient = loss_and_gradient(ONLINE[kind], policy, ref, labels, beta=BETA, **options)
        _, unclipped = loss_and_gradient(ONLINE[kind], policy, ref, labels, beta=BETA)
        assert loss.item() == pytest.approx(losses[edge] if stopped else losses[step], rel=1e-12)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient) if stopped else unclipped, rtol=0, atol=1e-15)


# --------------------------------------------------------------------------------------------------------- wrong calls


def test_a_wrong_label_call_says_what_is_wrong() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="'hard' or 'expected', but it is 'sampled'"):
        preference.preference_labels(x, "sampled")
    with pytest.raises(ValueError, match="rewards and mask must have one shape"):
        preference.preference_labels(x, "hard", mask=torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"must have one shape, but they have \(3, 2\), \(3,\)"):
        preference.sample_labels(x, x[:, 0])


@pytest.mark.parametrize("kind", OFFLINE)
def test_a_wrong_offline_call_says_what_is_wrong(kind: str) -> None:
    x = torch.zeros(3)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        OFFLINE[kind](x, x, beta=0.0)
    for smoothing in (-0.1, 0.5):
        with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\)"):
            OFFLINE[kind](x, x, beta=BETA, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="chosen_logratio, rejected_logratio and mask must have one shape"):
        OFFLINE[kind](x, x[:1], beta=BETA)
    with pytest.raises(ValueError, match="mask must be bool"):
        OFFLINE[kind](x, x, beta=BETA, mask=x)
    with pytest.raises(ValueError, match="rejected_logratio must be float32 or float64"):
        OFFLINE[kind](x, x.half(), beta=BETA)


@pytest.mark.parametrize("kind", ONLINE)
def test_a_wrong_online_call_says_what_is_wrong(kind: str) -> None:
    x, labels = torch.zeros(3, 3), torch.zeros(3, 3)
    with pytest.raises(ValueError, match="beta must be greater than 0"):
        ONLINE[kind](x, x, labels, beta=0.0)
    with pytest.raises(ValueError, match=r"labels must be one a pair, \(3, 3\).*are \(3, 2\)"):
        ONLINE[kind](x, x, labels[:, :2], beta=BETA)
    with pytest.raises(ValueError, match="labels and mask must have one shape"):
        ONLINE[kind](x, x, labels, torch.ones(3, 1, dtype=torch.bool), beta=BETA)
    with pytest.raises(ValueError, match="mask must be bool"):
        ONLINE[kind](x, x, labels, labels, beta=BETA)
    with pytest.raises(ValueError, match="policy_logprobs, ref_logprobs and mask must have one shape"):
        ONLINE[kind](x, x[:1], labels, beta=BETA)
    with pytest.raises(ValueError, match="ref_logprobs must be float32 or float64"):
        ONLINE[kind](x, x.bfloat16(), labels, beta=BETA)
    with pytest.raises(ValueError, match="epsilon must be greater than 0"):
        ONLINE[kind](x, x, labels, beta=BETA, old_logprobs=x, epsilon=0.0)
    with pytest.raises(ValueError, match="old_logprobs and mask must have one shape"):
        ONLINE[kind](x, x, labels, beta=BETA, old_logprobs=x[:1], epsilon=EPSILON)
    for half in ({"old_logprobs": x}, {"epsilon": EPSILON}):
        with pytest.raises(ValueError, match="belong together"):
            ONLINE[kind](x, x, labels, beta=BETA, **half)


# ------------------------------------------------------------------------------------------------------ from a judge


def table(scores: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry's probabilities (..., K, K) of scores (..., K)."""
    return (scores[..., :, None] - scores[..., None, :]).sigmoid()


def test_a_judge_is_used_as_it_is() -> None:
    judged = torch.tensor([[0.5, 0.9, nan], [0.1, 0.5, 0.25], [nan, 0.75, 0.5]])
    labels = preference.pair_preferences(judged)
    assert labels.probability.tolist() == pytest.approx([0.9, 0.5, 0.25])
    assert labels.mask.tolist() == [True, False, True]
    masked = preference.pair_preferences(judged, torch.tensor([True, True, False]))
    assert masked.mask.tolist() == [True, False, False]
    with pytest.raises(ValueError, match="mask must be bool"):
        preference.pair_preferences(judged, torch.ones(3))


@pytest.mark.parametrize("num_completions", [2, 5])
def test_rewards_of_bradley_terry_preferences_are_its_scores(num_completions: int) -> None:
    scores = torch.linspace(-1, 1.2, 3 * num_completions, dtype=torch.float64).view(3, num_completions)
    rewards = preference.preference_rewards(table(scores), "logits")
    torch.testing.assert_close(rewards, scores - scores.mean(-1, keepdim=True))
    margins = preference.preference_rewards(table(scores), "margins")
    torch.testing.assert_close(margins, (2 * table(scores) - 1).mean(-1))


def test_a_sure_judge_gives_no_infinite_reward() -> None:
    sure = torch.tensor([[0.5, 1.0], [0.0, 0.5]])
    expected = math.log(99) / 2
    assert preference.preference_rewards(sure, "logits").tolist() == pytest.approx([expected, -expected], rel=1e-4)
    assert preference.preference_rewards(sure, "margins").tolist() == [0.5, -0.5]
    unsaid = torch.tensor([[0.5, nan], [nan, 0.5]])
    assert preference.preference_rewards(unsaid, "logits").tolist() == [0, 0]
    with pytest.raises(ValueError, match="rule must be 'logits' or 'margins', but it is 'wins'"):
        preference.preference_rewards(sure, "wins")  # type: ignore[arg-type]
