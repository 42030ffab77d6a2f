"""The table of algorithms: p3o against its pure functions, and, on a transformer small enough to enumerate, its
gradient against the exact one."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from conftest import build_tiny_model
from torch import Tensor, nn

from pairtune.algorithms import ALGORITHMS
from pairtune.config import METHODS, TrainConfig
from pairtune.maths import pairwise
from pairtune.models.logprobs import Scorer
from pairtune.types import Completions, Experience, LossOutput, Targets

P3O = ALGORITHMS["p3o"]
CLIPS = ["joint", "separate", "none"]


def config(**values: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset="d", **{"beta": 0.3, "p3o.max_ratio": None, **values})


def batch(num_prompts: int = 5, num_generations: int = 3, length: int = 4, drift: float = 0.3) -> tuple[Tensor, Any]:
    """(policy log-probabilities, experience) in float64; completions of all lengths, rubbish where they are masked."""
    generator = torch.Generator().manual_seed(7)
    shape = (num_prompts, num_generations, length)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64, generator=generator)

    lengths = torch.randint(1, length + 1, shape[:2], generator=generator)
    mask = torch.arange(length) < lengths[..., None]
    old = draw(*shape) - 3
    rubbish = torch.where(mask, 0.0, torch.nan).double()
    completions = Completions(
        prompt_ids=torch.zeros(num_prompts, 1, dtype=torch.int64),
        prompt_mask=torch.ones(num_prompts, 1, dtype=torch.bool),
        completion_ids=torch.zeros(shape, dtype=torch.int64),
        completion_mask=mask,
        sampler_logprobs=torch.zeros(shape),
        truncated=torch.zeros(shape[:2], dtype=torch.bool),
        policy_version=0,
    )
    experience = Experience(
        completions=completions,
        rewards=(draw(num_prompts, num_generations) * 64).round() / 64,
        reward_mask=torch.ones(shape[:2], dtype=torch.bool),
        ref_logprobs=old + 0.2 * draw(*shape) + rubbish,
        old_logprobs=old + rubbish,
    )
    return (old + drift * draw(*shape) + rubbish).requires_grad_(), experience


def with_fields(experience: Experience, **fields: Any) -> Experience:
    return Experience(**{**vars(experience), **fields})


def gradient(policy: Tensor, output: LossOutput) -> Tensor:
    (found,) = torch.autograd.grad(output.losses.sum(), policy)
    return found


def summed(token_values: Tensor | None, experience: Experience) -> Tensor:
    """(P, K): the sums over completion tokens, one by one."""
    assert token_values is not None
    rows = zip(token_values.flatten(0, 1), experience.completions.completion_mask.flatten(0, 1), strict=True)
    return torch.stack([row[mask].sum() for row, mask in rows]).view(experience.rewards.shape)


# ------------------------------------------------------------------------------------------- against the pure functions


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kl_at", ["current", "sampling"])
@pytest.mark.parametrize("max_ratio", [None, 1.1])
def test_p3o_is_its_pure_function(clip: str, kl_at: str, max_ratio: float | None) -> None:
    policy, experience = batch()
    settings = config(epsilon=0.4, **{"p3o.clip": clip, "p3o.kl_at": kl_at, "p3o.max_ratio": max_ratio})
    output = P3O.loss(policy, experience, settings)

    sequence, old, ref = (summed(x, experience) for x in (policy, experience.old_logprobs, experience.ref_logprobs))
    measured_at = sequence.detach() if kl_at == "current" else old
    shaped = experience.rewards - 0.3 * (measured_at - ref)
    if clip == "none":
        expected = pairwise.pairwise_policy_gradient_loss(sequence, old, shaped, max_ratio=max_ratio)
    else:
        loss = {"joint": pairwise.p3o_joint_loss, "separate": pairwise.p3o_separate_loss}[clip]
        expected = loss(sequence, old, shaped, epsilon=0.4, max_ratio=max_ratio)
    torch.testing.assert_close(output.losses, expected, rtol=1e-12, atol=1e-12)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), policy)
    found = gradient(policy, output)
    torch.testing.assert_close(found, expected_gradient, rtol=1e-12, atol=1e-12)
    assert found.abs().sum() > 0
    assert not found[~experience.completions.completion_mask].any()


def test_each_option_of_p3o_changes_the_gradient() -> None:
    """Else the comparison above could not see it being ignored."""
    policy, experience = batch()
    options = [{}, {"p3o.clip": "separate"}, {"p3o.clip": "none"}, {"p3o.kl_at": "sampling"}, {"p3o.max_ratio": 1.1}]
    options += [{"beta": 0.0}, {"epsilon": 0.05}]
    gradients = [gradient(policy, P3O.loss(policy, experience, config(**{"epsilon": 0.4, **o}))) for o in options]
    for one, other in itertools.combinations(gradients, 2):
        assert (one - other).abs().max() > 1e-6


def test_the_kl_of_the_reward_is_not_differentiated() -> None:
    """With equal feedback and one sequence's log-ratio, the coefficient is a number, not a function of the policy."""
    policy, experience = batch(num_generations=2)
    experience = with_fields(experience, rewards=torch.zeros_like(experience.rewards))
    found = gradient(policy, P3O.loss(policy, experience, config(**{"p3o.clip": "none"})))
    sequence, old, ref = (
        summed(x, experience) for x in (policy.detach(), experience.old_logprobs, experience.ref_logprobs)
    )
    q = -0.3 * ((sequence - ref)[:, 0] - (sequence - ref)[:, 1])
    weight = (sequence - old).sum(1).exp()
    first = experience.completions.completion_mask[:, 0]
    expected = torch.where(first, (-q * weight / 2)[:, None], 0)
    torch.testing.assert_close(found[:, 0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", CLIPS)
def test_the_clip_ratio_counts_pairs_past_the_edge(clip: str) -> None:
    policy, experience = batch(num_prompts=8)
    epsilon = 0.4
    output = P3O.loss(policy, experience, config(epsilon=epsilon, **{"p3o.clip": clip}))
    logratio = summed(policy.detach(), experience) - summed(experience.old_logprobs, experience)
    past = torch.zeros(8, dtype=torch.float64)
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        if clip == "separate":
            outside = [(x.exp() < 1 - epsilon) | (x.exp() > 1 + epsilon) for x in (logratio[:, i], logratio[:, j])]
            past += (outside[0].double() + outside[1].double()) / 2
        else:
            past += ((logratio[:, i] - logratio[:, j]).abs() > epsilon).double()
    torch.testing.assert_close(output.metrics["clip_ratio"], past / 3)
    assert 0 < output.metrics["clip_ratio"].mean() < 1
    torch.testing.assert_close(output.metrics["logratio_abs"], logratio.abs().mean(1))
    assert ("clip_ratio/zero_gradient" in output.metrics) is (clip != "none")
    for values in output.metrics.values():
        assert not values.requires_grad
        assert values.shape == output.losses.shape == output.mask.shape == (8,)


def test_a_group_has_no_gradient_exactly_where_the_metric_says_so() -> None:
    policy, experience = batch(num_prompts=12, num_generations=2)
    output = P3O.loss(policy, experience, config(epsilon=0.4))
    without_gradient = ~gradient(policy, output).flatten(1).any(1)
    assert torch.equal(output.metrics["clip_ratio/zero_gradient"] == 1, without_gradient)
    assert 0 < without_gradient.sum() < 12


def test_equal_weights_clip_nothing() -> None:
    policy, experience = batch(drift=0.0)
    output = P3O.loss(policy, experience, config())
    assert not output.metrics["clip_ratio"].any()
    assert not output.metrics["logratio_abs"].any()


# ------------------------------------------------------------------------------------------------------ what must count


@pytest.mark.parametrize("clip", CLIPS)
def test_completions_without_feedback_do_not_count(clip: str) -> None:
    policy, experience = batch(num_prompts=4)
    mask = torch.tensor([[True, True, True], [True, False, True], [False, True, False], [False, False, False]])
    masked = with_fields(experience, reward_mask=mask, rewards=experience.rewards.masked_fill(~mask, 0))
    output = P3O.loss(policy, masked, config(**{"p3o.clip": clip}))
    assert output.mask.tolist() == P3O.counted(masked).tolist() == [True, True, False, False]
    assert output.losses[2:].tolist() == [0, 0]
    found = gradient(policy, output)
    assert not found[~mask].any()
    assert not found[2].any()  # one completion that counts makes no pair

    def part(tensor: Tensor | None, index: list[int]) -> Tensor:
        assert tensor is not None
        return tensor[1:2, index]

    # The second group is what it would be without its completion that does not count.
    kept = [0, 2]
    completions = experience.completions
    smaller = Experience(
        completions=Completions(
            completions.prompt_ids[1:2],
            completions.prompt_mask[1:2],
            part(completions.completion_ids, kept),
            part(completions.completion_mask, kept),
            part(completions.sampler_logprobs, kept),
            part(completions.truncated, kept),
            0,
        ),
        rewards=part(experience.rewards, kept),
        reward_mask=torch.ones(1, 2, dtype=torch.bool),
        ref_logprobs=part(experience.ref_logprobs, kept),
        old_logprobs=part(experience.old_logprobs, kept),
    )
    alone = P3O.loss(part(policy, kept), smaller, config(**{"p3o.clip": clip}))
    torch.testing.assert_close(output.losses[1:2], alone.losses, rtol=1e-12, atol=1e-14)
    for name, values in alone.metrics.items():
        torch.testing.assert_close(output.metrics[name][1:2], values, rtol=1e-12, atol=1e-14)


def test_without_old_logprobs_there_is_no_loss() -> None:
    policy, experience = batch()
    with pytest.raises(RuntimeError, match="old log-probabilities"):
        P3O.loss(policy, with_fields(experience, old_logprobs=None), config())


@pytest.mark.parametrize("clip", CLIPS)
def test_a_shift_of_the_rewards_of_a_prompt_changes_no_bit(clip: str) -> None:
    policy, experience = batch()
    shift = torch.tensor([0, 1, -1000, 7, 12345])[:, None] / 64
    settings = config(**{"p3o.clip": clip})
    here = P3O.loss(policy, experience, settings)
    there = P3O.loss(policy, with_fields(experience, rewards=experience.rewards + shift), settings)
    assert torch.equal(there.losses, here.losses)
    assert torch.equal(gradient(policy, there), gradient(policy, here))


@pytest.mark.parametrize("clip", CLIPS)
def test_swapping_two_completions_changes_nothing(clip: str) -> None:
    policy, experience = batch(num_generations=2)
    swapped = with_fields(
        experience,
        completions=Completions(
            **{
                **vars(experience.completions),
                "completion_ids": experience.completions.completion_ids.flip(1),
                "completion_mask": experience.completions.completion_mask.flip(1),
            }
        ),
        rewards=experience.rewards.flip(1),
        ref_logprobs=experience.ref_logprobs.flip(1),
        old_logprobs=experience.old_logprobs.flip(1),
    )
    settings = config(epsilon=0.4, **{"p3o.clip": clip})
    here, there = P3O.loss(policy, experience, settings), P3O.loss(policy.flip(1), swapped, settings)
    # The rewards are taken relative to the first completion, which is another one now: equal up to rounding.
    torch.testing.assert_close(there.losses, here.losses, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(gradient(policy, there), gradient(policy, here), rtol=1e-13, atol=1e-14)
    for name, values in here.metrics.items():
        assert torch.equal(there.metrics[name], values)


@pytest.mark.parametrize("clip", CLIPS)
def test_wider_padding_changes_no_bit(clip: str) -> None:
    policy, experience = batch()

    def wider(values: Tensor) -> Tensor:
        return F.pad(values, (0, 3), value=False if values.dtype == torch.bool else 77)

    completions = {
        name: wider(value) if isinstance(value, Tensor) and value.ndim == 3 else value
        for name, value in vars(experience.completions).items()
    }
    padded = with_fields(
        experience,
        completions=Completions(**completions),
        ref_logprobs=wider(experience.ref_logprobs),
        old_logprobs=wider(experience.old_logprobs),
    )
    settings = config(**{"p3o.clip": clip})
    here, there = P3O.loss(policy, experience, settings), P3O.loss(wider(policy), padded, settings)
    assert torch.equal(there.losses, here.losses)
    assert torch.equal(gradient(policy, there), gradient(policy, here))


def test_every_algorithm_of_the_configuration_is_in_the_table() -> None:
    assert set(ALGORITHMS) == set(METHODS)


# ------------------------------------------------------------------------------- the exact gradient of a small world


EOS = 1


class World(NamedTuple):
    """All completions of two prompts under a model of five tokens, and K of them at a time in every combination."""

    sequences: list[list[int]]
    """Every completion of at most `length` tokens: it ends with EOS or at the cap."""
    groups: Tensor
    """(G, K) indices into `sequences`, the same for each prompt."""
    completions: Completions
    """2 * G groups: those of the first prompt, then those of the second."""


PROMPTS = [[2, 3], [4, 2, 2]]


def world(length: int, num_generations: int) -> World:
    def continued(prefix: list[int]) -> list[list[int]]:
        if len(prefix) == length or (prefix and prefix[-1] == EOS):
            return [prefix]
        return [sequence for token in range(5) for sequence in continued([*prefix, token])]

    sequences = continued([])
    groups = torch.tensor(list(itertools.product(range(len(sequences)), repeat=num_generations)))
    ids = torch.tensor([s + [0] * (length - len(s)) for s in sequences])
    mask = torch.tensor([[t < len(s) for t in range(length)] for s in sequences])
    completions = Completions(
        prompt_ids=torch.tensor([[0, *PROMPTS[0]], PROMPTS[1]]).repeat_interleave(len(groups), 0),
        prompt_mask=torch.tensor([[False, True, True], [True] * 3]).repeat_interleave(len(groups), 0),
        completion_ids=ids[groups].repeat(2, 1, 1),
        completion_mask=mask[groups].repeat(2, 1, 1),
        sampler_logprobs=torch.zeros(2 * len(groups), num_generations, length),
        truncated=torch.zeros(2 * len(groups), num_generations, dtype=torch.bool),
        policy_version=0,
    )
    return World(sequences, groups, completions)


def small_model(seed: int) -> Any:
    """A Llama in float64 throughout: transformers' own norm would compute in float32."""
    model = build_tiny_model("llama-untied", seed=seed, vocab_size=5, hidden_size=16, num_hidden_layers=1)
    norms = [
        (m, name) for m in model.modules() for name, part in m.named_children() if "RMSNorm" in type(part).__name__
    ]
    for module, name in norms:
        setattr(module, name, nn.RMSNorm(16, eps=1e-6))
    assert len(norms) == 3
    return model.double()


def sequence_logprobs(model: Any, world: World) -> Tensor:
    """(2, S) log-probability of every completion of each prompt, by plain forward passes."""
    length = max(map(len, world.sequences))
    padded = torch.tensor([s + [0] * (length - len(s)) for s in world.sequences])  # on the right: nobody looks there
    rows = []
    for prompt in PROMPTS:
        ids = torch.cat([torch.tensor([prompt] * len(padded)), padded], 1)
        laws = model(ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        picked = laws.gather(2, padded[..., None])[..., 0]
        rows.append(torch.stack([row[: len(s)].sum() for row, s in zip(picked, world.sequences, strict=True)]))
    return torch.stack(rows)


def exact_gradient(model: Any, reference: Any, rewards: Tensor, world: World, beta: float) -> list[Tensor]:
    """Of the mean over prompts of E[r] - beta KL(model || reference), every completion counted."""
    logprobs = sequence_logprobs(model, world)
    with torch.no_grad():
        ref = sequence_logprobs(reference, world)
    torch.testing.assert_close(logprobs.exp().sum(1), torch.ones(2, dtype=torch.float64))
    objective = (logprobs.exp() * (rewards - beta * (logprobs - ref))).sum(1).mean()
    return list(torch.autograd.grad(objective, list(model.parameters())))


def p3o_gradient(
    models: tuple[Any, Any, Any], rewards: Tensor, world: World, settings: TrainConfig, shared: bool
) -> list[Tensor]:
    """The expected gradient of the loss, by way of the scorer: groups weighed with their probability under `old`."""
    model, old_model, _ = models
    policy_scorer, old_scorer, ref_scorer = (Scorer(m, shared=shared) for m in models)
    layout = policy_scorer.layout(world.completions)
    with torch.no_grad():
        old, ref = old_scorer.logprobs(layout)[0], ref_scorer.logprobs(layout)[0]
        weights = sequence_logprobs(old_model, world)[:, world.groups].sum(-1).exp().flatten()
    experience = Experience(
        completions=world.completions,
        rewards=rewards[:, world.groups].flatten(0, 1),
        reward_mask=torch.ones_like(world.completions.truncated),
        ref_logprobs=ref,
        old_logprobs=old,
    )
    output = P3O.loss(policy_scorer.logprobs(layout)[0], experience, settings)
    return list(torch.autograd.grad((output.losses * weights).sum() / 2, list(model.parameters())))


@pytest.mark.parametrize(("length", "num_generations", "shared"), [(2, 2, True), (2, 2, False), (1, 3, True)])
@pytest.mark.parametrize("clip", CLIPS)
def test_at_ratio_one_the_gradient_is_the_exact_one(length: int, num_generations: int, shared: bool, clip: str) -> None:
    everything = world(length, num_generations)
    model, reference = small_model(0), small_model(1)
    rewards = torch.randn(2, len(everything.sequences), dtype=torch.float64)
    exact = exact_gradient(model, reference, rewards, everything, beta=0.3)
    settings = config(**{"p3o.clip": clip, "p3o.kl_at": "sampling" if clip == "joint" else "current"})
    found = p3o_gradient((model, model, reference), rewards, everything, settings, shared)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(-one, other, rtol=0, atol=1e-10)
    assert max(g.abs().max() for g in exact) > 0.01


def test_without_clip_the_gradient_is_exact_wherever_the_completions_come_from() -> None:
    everything = world(2, 2)
    model, old, reference = small_model(0), small_model(2), small_model(1)
    rewards = torch.randn(2, len(everything.sequences), dtype=torch.float64)
    exact = exact_gradient(model, reference, rewards, everything, beta=0.3)

    def distance(**options: Any) -> float:
        settings = config(**{"p3o.clip": "none", **options})
        found = p3o_gradient((model, old, reference), rewards, everything, settings, shared=True)
        return max((one + other).abs().max().item() for one, other in zip(found, exact, strict=True))

    assert distance() < 1e-10
    # The paper's KL at the sampling policy, the clamp and the clip each pay with a bias here.
    assert distance(**{"p3o.kl_at": "sampling"}) > 1e-4
    assert distance(**{"p3o.max_ratio": 1.0}) > 1e-4
    assert distance(**{"p3o.clip": "joint"}) > 1e-4


def test_an_undecided_label_is_half_a_hit() -> None:
    policy, experience = batch(num_generations=2)
    labels = torch.tensor([[1.0], [0.0], [0.5], [0.9], [0.5]], dtype=torch.float64)
    targets = Targets(labels=labels, label_mask=torch.ones_like(labels, dtype=torch.bool))
    output = ALGORITHMS["online_dpo"].loss(
        policy, with_fields(experience, targets=targets), config(algorithm="online_dpo")
    )
    ratios = summed(policy.detach(), experience) - summed(experience.ref_logprobs, experience)
    first = (ratios[:, 0] > ratios[:, 1]).tolist()
    assert output.metrics["preference_accuracy"].tolist() == [first[0], not first[1], 0.5, first[3], 0.5]
