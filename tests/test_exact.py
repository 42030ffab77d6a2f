"""Enumerable languages: the law against plain counting, the models in every layout and in `train`, the optimum, best of
n and a method's gradient against what they are by definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pairtune import PairtuneError, TrainConfig, train
from pairtune.algorithms import ALGORITHMS, MethodState
from pairtune.data import RawPrompts
from pairtune.evidence import exact
from pairtune.evidence.exact import (
    EnumerableTask,
    best_of_n,
    exact_values,
    gradient_law,
    objective_gradient,
    optimal_frontier,
    optimum,
    sequence_logprobs,
    tabular_model,
    tiny_transformer,
    value_function,
    watched_reward_func,
)
from pairtune.maths.advantages import MovingAverage
from pairtune.maths.kl import best_of_n_kl
from pairtune.models.loading import load_policy
from pairtune.models.logprobs import Scorer, can_share_prefix, check_head
from pairtune.models.sampler import HFSampler, SamplingParams
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.types import Completions, Experience

TASK = EnumerableTask.random(seed=0)
SMALL = EnumerableTask.random(num_prompts=2, max_completion_length=2, seed=1)
MODELS: dict[str, Callable[..., Any]] = {"tabular": tabular_model, "transformer": tiny_transformer}
BETA = 0.5


def config(**words: Any) -> TrainConfig:
    settings = {
        "model": "in memory",
        "dataset": "in memory",
        "dataset_test_split": None,
        "device": "cpu",
        "dtype": "float32",
        "beta": BETA,
        "max_completion_length": TASK.max_completion_length,
        "ppo.whiten_advantages": False,
        "ppo.lam": 1.0,
        "vpg.lam": 1.0,
    }
    return TrainConfig(**{**settings, **words})


def random_law(seed: int, task: EnumerableTask = TASK) -> Tensor:
    """(P, N) log-probabilities of no autoregressive model in particular."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(task.rewards.shape, dtype=torch.float64, generator=generator).log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------- language


@pytest.mark.parametrize(("vocab_size", "length"), [(3, 1), (3, 3), (4, 2), (5, 3)])
def test_all_completions_are_there_once(vocab_size: int, length: int) -> None:
    task = EnumerableTask.random(vocab_size=vocab_size, max_completion_length=length)
    # Cut each string of T words behind its first end: what is left are the completions.
    strings = itertools.product(range(vocab_size), repeat=length)
    expected = {s[: s.index(0) + 1] if 0 in s else s for s in strings}
    assert set(task.sequences) == expected
    assert task.num_completions == len(task.sequences) == len(expected)
    assert [len(p) for p in task.prompts] == [1, 2, 3]

    every = task.completions()
    assert every.completion_ids.shape == (3, len(expected), length)
    for p, n in itertools.product(range(3), range(task.num_completions)):
        sequence = task.sequences[n]
        assert tuple(every.completion_ids[p, n][every.completion_mask[p, n]].tolist()) == sequence
        assert every.completion_mask[p, n].tolist() == [t < len(sequence) for t in range(length)]
        assert every.truncated[p, n] == (0 not in sequence)
        assert tuple(every.prompt_ids[p][every.prompt_mask[p]].tolist()) == task.prompts[p]
    assert every.prompt_mask[:, -1].all()  # padded on the left


def test_rewards_lie_on_a_grid_and_come_from_the_seed() -> None:
    assert torch.equal(TASK.rewards * 64, (TASK.rewards * 64).round())
    assert torch.equal(TASK.rewards.float().double(), TASK.rewards)
    assert 0.7 < TASK.rewards.std() < 1.3
    assert torch.equal(EnumerableTask.random(seed=0).rewards, TASK.rewards)
    assert not torch.equal(EnumerableTask.random(seed=1).rewards, TASK.rewards)


def test_words_go_through_the_tokenizer_and_back() -> None:
    tokenizer = TASK.tokenizer()
    rows = TASK.dataset(7)
    assert [row["prompt"] for row in rows] == ["a", "b a", "b b a", "a", "b a", "b b a", "a"]
    encoded = RawPrompts.from_rows(rows).encode(tokenizer)
    assert [tuple(ids) for ids in encoded.token_ids] == [TASK.prompts[row % 3] for row in range(7)]
    assert tokenizer.decode([2, 1, 0], skip_special_tokens=True) == "b a"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 0


def test_the_reward_function_reads_the_table() -> None:
    rewards = TASK.reward_func(prompts=["b a", "a"], completion_ids=[[2, 1, 0], [0]], completions=["b a", ""])
    assert rewards == [TASK.rewards[1, TASK.sequences.index((2, 1, 0))], TASK.rewards[0, TASK.sequences.index((0,))]]
    for prompt, ids in [("a", [1, 0, 0]), ("a", [1]), ("b", [0])]:
        with pytest.raises(PairtuneError, match="no completion"):
            TASK.reward_func(prompts=[prompt], completion_ids=[ids])


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"vocab_size": 2}, "vocab_size is 2"),
        ({"vocab_size": 28}, "vocab_size is 28"),
        ({"prompts": ((1,), (2, 3))}, "ids from 1 to 2"),
        ({"prompts": ((1,), ())}, "must be one or more"),
        ({"prompts": ((2,), (2, 1))}, "is how .* begins"),
        ({"prompts": ((1,), (1,))}, "is how .* begins"),
        ({"rewards": torch.zeros(2, 6, dtype=torch.float64)}, r"shape \(2, 7\)"),
        ({"rewards": torch.zeros(2, 7)}, "are float32"),
        ({"max_completion_length": 0}, "at least 1"),
        ({"max_completion_length": 30}, "at most 100000 are enumerated"),
    ],
)
def test_languages_that_cannot_be(words: dict[str, Any], match: str) -> None:
    with pytest.raises(PairtuneError, match=match):
        replace(SMALL, **words)


def test_prompts_too_long_to_number() -> None:
    task = EnumerableTask.random(num_prompts=29)  # 32 positions, two bits each
    with pytest.raises(PairtuneError, match="too many to number"):
        tabular_model(task)
    assert tabular_model(EnumerableTask.random(num_prompts=28)).model.codes.unique().numel() == 28 * 7


# --------------------------------------------------------------------------------------------------------------- models


def one_by_one(model: Any, task: EnumerableTask) -> Tensor:
    """(P, N), each from a forward pass of its own over nothing but its own tokens."""
    found = torch.zeros(task.rewards.shape, dtype=torch.float64)
    for (p, prompt), (n, sequence) in itertools.product(enumerate(task.prompts), enumerate(task.sequences)):
        ids = torch.tensor([[*prompt, *sequence]])
        laws = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found[p, n] = laws.gather(1, torch.tensor(sequence)[:, None]).sum()
    return found


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_the_enumerated_law_is_a_law_and_the_models_own(kind: str) -> None:
    model = MODELS[kind](TASK, seed=3)
    logprobs = sequence_logprobs(model, TASK)
    assert (logprobs.dtype, logprobs.shape) == (torch.float64, (3, 15))
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(logprobs, one_by_one(model.double(), TASK), rtol=0, atol=1e-6)
    assert logprobs.exp().std(-1).min() > 0.02  # not uniform: a wrong history would show
    assert (logprobs[0] - logprobs[1]).abs().max() > 0.1  # nor blind to the prompt
    assert not torch.equal(logprobs, sequence_logprobs(MODELS[kind](TASK, seed=4), TASK))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("layout", ["shared", "plain", "eager"])
@torch.no_grad()
def test_every_layout_gives_the_enumerated_law(kind: str, layout: str) -> None:
    model = MODELS[kind](TASK, seed=3).double()
    expected = sequence_logprobs(model, TASK)
    if layout == "eager":  # its mask is added to scores
        model.set_attn_implementation("eager")
    assert can_share_prefix(model)
    assert check_head(model)
    scorer = Scorer(model, shared=layout != "plain")
    found = scorer.logprobs(scorer.layout(TASK.completions()))[0].sum(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if kind == "tabular" else 1e-6)


def test_a_table_has_a_row_for_every_history_and_nothing_else_is_trained() -> None:
    model = tabular_model(TASK)
    policy = load_policy(model, tokenizer=TASK.tokenizer(), device="cpu")
    assert policy.masters.names == ["model.table.weight"]
    assert policy.eos_token_ids == (0,)
    table = model.model.table.weight
    assert table.shape == (3 * 7, 3 + 1)  # a prompt and no, one or two words
    with torch.no_grad():
        table.copy_(torch.arange(21.0)[:, None].expand(-1, 4))
        hidden = policy.scorer.hidden(policy.scorer.layout(TASK.completions()))
    assert set(hidden[:, 0].tolist()) == set(range(21))


@torch.no_grad()
def test_the_last_number_of_a_row_is_no_logit() -> None:
    model = tabular_model(TASK, scale=2.0)
    before = sequence_logprobs(model, TASK)
    table = model.model.table.weight
    assert 1.5 < table[:, :-1].std() < 2.5
    assert table[:, -1].tolist() == [1] * 21
    table[:, -1] = torch.randn(21)
    assert torch.equal(sequence_logprobs(model, TASK), before)
    table[0, 0] += 1
    assert not torch.equal(sequence_logprobs(model, TASK), before)


def test_scale_zero_is_the_uniform_policy() -> None:
    lengths = TASK.completions().num_tokens
    expected = -lengths * math.log(3)
    torch.testing.assert_close(sequence_logprobs(tabular_model(TASK, scale=0), TASK), expected.double())


@pytest.mark.parametrize("kind", MODELS)
def test_samples_follow_the_enumerated_law(kind: str) -> None:
    """Through left padding, the cache and rows that leave the batch."""
    model, tokenizer = MODELS[kind](TASK, seed=3), TASK.tokenizer()
    prompts = RawPrompts.from_rows(TASK.dataset(900)).encode(tokenizer).batch(range(900))
    sampler = HFSampler(model, tokenizer, eos_token_ids=(0,), pad_token_id=0)
    sampled = sampler.generate(prompts, 4, SamplingParams(max_completion_length=3), seed=0, stream=0)
    logprobs = sequence_logprobs(model, TASK)
    counts = torch.zeros_like(logprobs)
    for row, k in itertools.product(range(900), range(4)):
        mask = sampled.completion_mask[row, k]
        n = TASK.sequences.index(tuple(sampled.completion_ids[row, k][mask].tolist()))
        counts[row % 3, n] += 1
        assert abs(sampled.sampler_logprobs[row, k].sum() - logprobs[row % 3, n]) < 1e-5
        assert sampled.truncated[row, k] == (0 not in TASK.sequences[n])
    expected = logprobs.exp() * 1200
    chi_square = ((counts - expected) ** 2 / expected).sum(-1)
    assert (chi_square < 14 + 4 * math.sqrt(2 * 14)).all()  # 14 degrees of freedom, four standard deviations


@torch.no_grad()
def test_token_by_token_with_a_cache_and_no_positions() -> None:
    model, cache = tabular_model(TASK, seed=3), DynamicCache()
    ids = torch.tensor([[2, 1, 1, 2], [1, 2, 2, 0]])
    whole = model(input_ids=ids).logits
    parts = [model(input_ids=part, past_key_values=cache).logits for part in (ids[:, :2], ids[:, 2:3], ids[:, 3:])]
    assert torch.equal(torch.cat(parts, 1), whole)
    assert len(whole.flatten(0, 1).unique(dim=0)) == 7  # `b` alone and what follows EOS are no histories: zeros


@pytest.mark.parametrize("kind", MODELS)
def test_a_saved_model_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind](TASK, seed=3)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(sequence_logprobs(loaded, TASK), sequence_logprobs(model, TASK))


# -------------------------------------------------------------------------------------------------------------- optimum


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_nothing_beats_the_optimum(beta: float) -> None:
    ref = sequence_logprobs(tabular_model(TASK), TASK)
    best = optimum(TASK, ref, beta)
    for x in (best.logprobs.exp().sum(-1), best.logprobs.sub(ref).exp().mul(ref.exp()).sum(-1)):
        torch.testing.assert_close(x, torch.ones(3, dtype=torch.float64))
    # J = beta log Z, from the definition of Z.
    torch.testing.assert_close(best.objective, beta * (ref.exp() * (TASK.rewards / beta).exp()).sum(-1).log())
    torch.testing.assert_close(best.objective, best.reward - beta * best.kl)
    torch.testing.assert_close(best.reward, (best.logprobs.exp() * TASK.rewards).sum(-1))

    at_best = exact_values(TASK, best.logprobs, ref, beta)
    assert at_best.regret == pytest.approx(0, abs=1e-12)
    assert at_best.objective == pytest.approx(best.objective.mean().item())
    near = [(best.logprobs + 0.01 * random_law(seed)).log_softmax(-1) for seed in range(50)]
    for policy in [ref, *near, *(random_law(seed) for seed in range(50))]:
        values = exact_values(TASK, policy, ref, beta)
        plain = (policy.exp() * (TASK.rewards - beta * (policy - ref))).sum(-1)
        assert values.objective == pytest.approx(plain.mean().item())
        assert values.regret == pytest.approx((best.objective - plain).mean().item(), abs=1e-12)
        assert values.regret > 1e-12
        assert values.objective == pytest.approx(values.reward - beta * values.kl)
    assert exact_values(TASK, ref, ref, beta).kl == 0


def test_the_frontier_has_slope_beta_and_is_concave() -> None:
    ref = sequence_logprobs(tabular_model(TASK), TASK)
    betas = torch.logspace(-1, 1, 2001, dtype=torch.float64)
    kl, reward = optimal_frontier(TASK, ref, betas)
    slope = (reward[2:] - reward[:-2]) / (kl[2:] - kl[:-2])
    torch.testing.assert_close(slope, betas[1:-1], rtol=1e-5, atol=0)
    assert (kl.diff() < 0).all()
    assert (reward.diff() < 0).all()
    # Best of n starts from the same point and stays below.
    for n in (2, 4, 8):
        best = best_of_n(TASK, ref, n)
        reached = (kl - best.kl.mean()).abs().argmin()
        assert best.reward.mean() < reward[reached] + betas[reached] * (best.kl.mean() - kl[reached])


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_an_optimum_needs_a_beta(beta: float) -> None:
    for call in (optimum, lambda *a: exact_values(a[0], a[1], *a[1:]), lambda t, r, b: optimal_frontier(t, r, [1, b])):
        with pytest.raises(PairtuneError, match="beta is"):
            call(TASK, random_law(0), beta)


# ------------------------------------------------------------------------------------------------------------ best of n


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("grid", [64, 1, 0.25])
def test_best_of_n_is_what_it_says(n: int, grid: float) -> None:
    """Every draw of n completions, the prize shared among the best of them; on a coarse grid there are ties."""
    task = replace(SMALL, rewards=(SMALL.rewards * grid).round() / grid)
    num_levels = [row.unique().numel() for row in task.rewards]
    assert num_levels == {64: [7, 7], 1: [3, 2], 0.25: [1, 1]}[grid]
    ref = sequence_logprobs(tabular_model(task), task)
    expected = torch.zeros_like(ref)
    for p in range(2):
        for drawn in itertools.product(range(7), repeat=n):
            rewards = task.rewards[p, list(drawn)]
            winners = [i for i, r in zip(drawn, rewards, strict=True) if r == rewards.max()]
            for i in winners:
                expected[p, i] += ref[p, list(drawn)].sum().exp() / len(winners)
    found = best_of_n(task, ref, n)
    torch.testing.assert_close(found.probs, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(found.reward, (expected * task.rewards).sum(-1))
    torch.testing.assert_close(found.kl, (expected * (expected.log() - ref)).sum(-1), rtol=1e-10, atol=1e-14)
    assert (found.kl <= math.log(n) - (n - 1) / n + 1e-14).all()
    with pytest.raises(PairtuneError, match="n is 0"):
        best_of_n(task, ref, 0)


def test_the_cheaper_estimate_of_best_of_n() -> None:
    bound = math.log(64) - 63 / 64
    # The figures of ten equally likely outcomes: 2.29 nats, and 3.17 by the familiar formula.
    outcomes = torch.arange(11, dtype=torch.float64) / 10
    pmf = (outcomes[1:] ** 64) - (outcomes[:-1] ** 64)
    exactly = (pmf * (pmf * 10).log()).sum().item()
    assert (round(exactly, 2), round(bound, 2)) == (2.29, 3.17)
    estimate = best_of_n_kl(torch.full((4,), math.log(0.1)), 64)
    assert estimate.shape == (4,)
    assert estimate[0].item() == pytest.approx(exactly, abs=0.02)

    rare = best_of_n_kl(torch.tensor([-20.0, -800.0, -1e5]), 64)
    assert rare.tolist() == pytest.approx([bound] * 3, abs=1e-6)
    assert best_of_n_kl(torch.tensor([0.0, 0.0]), 64).tolist() == [0, 0]
    assert best_of_n_kl(torch.tensor([-3.0]), 1).item() == pytest.approx(0, abs=1e-12)
    e, n = 0.03, 16
    none = (1 - e) ** n
    plain = none * (math.log(n) + (n - 1) * math.log(1 - e) - (n - 1) / n) + (1 - none) * math.log((1 - none) / e)
    assert best_of_n_kl(torch.tensor(math.log(e), dtype=torch.float64), n).item() == pytest.approx(plain, rel=1e-12)


# ------------------------------------------------------------------------------------------------------------ gradients


def models(kind: str, task: EnumerableTask) -> list[Any]:
    return [MODELS[kind](task, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("kind", MODELS)
def test_the_gradient_of_the_objective(kind: str) -> None:
    """Against finite differences of the objective that `exact_values` gives."""
    policy, reference, other = (model.double() for model in models(kind, SMALL))
    found = objective_gradient(SMALL, policy, reference, BETA)
    ref, step = sequence_logprobs(reference, SMALL), 1e-4
    moves = [0.01 * p.detach() for p in other.parameters()]
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, move in zip(policy.parameters(), moves, strict=True):
                parameter += sign * step * move
            ends.append(exact_values(SMALL, sequence_logprobs(policy, SMALL), ref, BETA).objective)
            for parameter, move in zip(policy.parameters(), moves, strict=True):
                parameter -= sign * step * move
    along = found @ torch.cat([move.flatten() for move in moves])
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(along.item(), rel=1e-5)
    assert abs(along) > 1e-4
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("clip", "num_generations"), [("joint", 2), ("separate", 2), ("none", 3)])
def test_p3o_at_ratio_one_has_the_gradient_of_the_objective(kind: str, clip: str, num_generations: int) -> None:
    policy, reference, _ = models(kind, SMALL)
    law = gradient_law(config(num_generations=num_generations, **{"p3o.clip": clip}), SMALL, policy, reference)
    exactly = objective_gradient(SMALL, policy, reference, BETA)
    torch.testing.assert_close(-law.gradient, exactly, rtol=0, atol=1e-10)
    assert exactly.abs().max() > 0.01


def test_unclipped_p3o_has_it_whoever_sampled() -> None:
    policy, reference, old = models("tabular", SMALL)
    exactly = objective_gradient(SMALL, policy, reference, BETA)

    def distance(**words: Any) -> float:
        settings = config(**{"p3o.clip": "none", "p3o.max_ratio": None, **words})
        return (gradient_law(settings, SMALL, policy, reference, old).gradient + exactly).abs().max().item()

    assert distance() < 1e-10
    assert distance(**{"p3o.max_ratio": 1.1}) > 1e-4
    assert distance(**{"p3o.clip": "joint"}) > 1e-4


@pytest.mark.parametrize(
    ("words", "factor"),
    [
        ({"algorithm": "rloo"}, 1),
        ({"algorithm": "rloo", "num_generations": 3}, 1),
        ({"algorithm": "reinforce", "num_generations": 1}, 1),
        ({"algorithm": "copg"}, 2),
        ({"algorithm": "rebel", "rebel.eta": 0.5}, 2),
        ({"algorithm": "vpg", "num_generations": 1}, 1),
        ({"algorithm": "vpg", "num_generations": 2}, 1),
        ({"algorithm": "ppo", "num_generations": 1}, "a token"),
        ({"algorithm": "raft"}, None),
        ({"algorithm": "grpo"}, None),
        ({"algorithm": "online_dpo"}, None),
    ],
)
def test_methods_have_the_known_multiple_of_it(words: dict[str, Any], factor: Any) -> None:
    """The identities at ratio 1 (facts 9.1), and that the others have no multiple of it."""
    policy, reference, _ = models("tabular", SMALL)
    law = gradient_law(config(**words), SMALL, policy, reference)
    exactly = objective_gradient(SMALL, policy, reference, BETA)
    if factor == "a token":  # its loss is a mean over tokens
        factor = 1 / (sequence_logprobs(policy, SMALL).exp() * SMALL.completions().num_tokens).sum(-1).mean()
    if factor is None:
        assert torch.cosine_similarity(-law.gradient, exactly, 0) < 0.999
        return
    torch.testing.assert_close(-law.gradient, factor * exactly, rtol=0, atol=1e-10)
    torch.testing.assert_close(law.prompt_gradients.mean(0), law.gradient)


@pytest.mark.parametrize(
    ("words", "sampled_by_old"), [({}, True), ({"algorithm": "rloo"}, False), ({"algorithm": "grpo"}, True)]
)
def test_a_law_is_the_sum_over_real_updates(words: dict[str, Any], sampled_by_old: bool) -> None:
    """Each group alone through scorer, loss and backward pass; then mean and covariance from their definition."""
    task = EnumerableTask.random(num_prompts=2, max_completion_length=1, seed=2)
    policy, reference, old = (model.double() for model in models("tabular", task))
    old = old if sampled_by_old else policy
    settings = config(**words)
    law = gradient_law(settings, task, policy, reference, old)
    every, old_probs = task.completions(), sequence_logprobs(old, task).exp()
    scorers = [Scorer(model, shared=True) for model in (policy, old, reference)]
    means, variances = [], []
    for p in range(2):
        gradients, probs = [], []
        for group in itertools.product(range(3), repeat=2):
            pick = torch.tensor([p])[:, None], torch.tensor(group)[None]
            completions = Completions(
                every.prompt_ids[p : p + 1],
                every.prompt_mask[p : p + 1],
                *(x[pick] for x in (every.completion_ids, every.completion_mask, every.sampler_logprobs)),
                every.truncated[pick],
                0,
            )
            current, sampling, ref = (scorer.logprobs(scorer.layout(completions))[0] for scorer in scorers)
            experience = Experience(
                completions, task.rewards[pick], torch.ones(1, 2, dtype=torch.bool), ref.detach(), sampling.detach()
            )
            output = ALGORITHMS[settings.algorithm].loss(current, experience, settings)
            loss = output.losses[output.mask].mean()
            gradients.append(torch.autograd.grad(loss, policy.parameters())[0].flatten())
            probs.append(old_probs[p, list(group)].prod())
        weights = torch.stack(probs)
        means.append(weights @ torch.stack(gradients))
        centred = torch.stack(gradients) - means[-1]
        variances.append((weights @ centred.square().sum(-1)).item())
    torch.testing.assert_close(law.prompt_gradients, torch.stack(means), rtol=0, atol=1e-12)
    assert law.variance == pytest.approx(sum(variances) / 2, rel=1e-10)
    between = torch.stack(means) - law.gradient
    assert law.prompt_variance == pytest.approx(between.square().sum().item() / 2, rel=1e-10)
    assert law.variance_per_completion == 2 * law.variance
    assert law.noise_scale == pytest.approx(2 * law.variance / law.gradient.norm().item() ** 2)


def test_the_variance_is_what_sampling_shows() -> None:
    policy, reference, _ = models("tabular", SMALL)
    law = gradient_law(config(), SMALL, policy, reference)
    tokenizer = SMALL.tokenizer()
    prompts = RawPrompts.from_rows(SMALL.dataset(6000)).encode(tokenizer).batch(range(6000))
    sampler = HFSampler(policy, tokenizer, eos_token_ids=(0,), pad_token_id=0)
    sampled = sampler.generate(prompts, 2, SamplingParams(max_completion_length=2), seed=0, stream=0)
    drawn = [
        SMALL.sequences.index(tuple(ids[mask].tolist()))
        for ids, mask in zip(sampled.completion_ids.flatten(0, 1), sampled.completion_mask.flatten(0, 1), strict=True)
    ]
    groups = torch.tensor(drawn).view(6000, 2)
    twin = policy.double()
    logprobs = exact._token_logprobs(twin, SMALL).sum(-1)
    scores = torch.stack([exact._flat_gradient(x, list(twin.parameters())) for x in logprobs.flatten()])
    scores = scores.view(2, SMALL.num_completions, -1)
    shaped = SMALL.rewards - BETA * (logprobs.detach() - sequence_logprobs(reference, SMALL))
    variances = []
    for p in range(2):
        i, j = groups[p::2].unbind(1)
        estimates = (shaped[p, i] - shaped[p, j])[:, None] * (scores[p, i] - scores[p, j]) / 2
        variances.append(estimates.var(0).sum().item())
    assert sum(variances) / 2 == pytest.approx(law.variance, rel=0.05)


def test_variance_at_equal_completions() -> None:
    policy, reference, _ = models("tabular", SMALL)

    def law(**words: Any) -> exact.GradientLaw:
        given = {name: words.pop(name) for name in ("state", "values") if name in words}
        return gradient_law(config(**words), SMALL, policy, reference, **given)

    # A mean of independent completions: K of them scatter K times less than one.
    one, three = (law(algorithm="reinforce", num_generations=k) for k in (1, 3))
    assert three.variance == pytest.approx(one.variance / 3, rel=1e-9)
    assert three.variance_per_completion == pytest.approx(one.variance_per_completion, rel=1e-9)
    # A factor of the loss cancels.
    p3o, copg = law(), law(algorithm="copg")
    assert copg.variance == pytest.approx(4 * p3o.variance, rel=1e-9)
    assert copg.noise_scale == pytest.approx(p3o.noise_scale, rel=1e-9)
    # With more completions to compare with, the leave-one-out baseline is less noisy.
    rloo = [law(algorithm="rloo", num_generations=k).variance_per_completion for k in (2, 3, 4)]
    assert rloo[0] == pytest.approx(p3o.variance_per_completion, rel=1e-9)
    assert rloo[0] > rloo[1] > rloo[2]
    # A baseline leaves the mean alone. The state carries REINFORCE's.
    shifted = law(algorithm="reinforce", num_generations=1, state=MethodState(BETA, MovingAverage(7.0, 1)))
    torch.testing.assert_close(shifted.gradient, one.gradient, rtol=0, atol=1e-12)
    assert shifted.variance > 2 * one.variance
    # So does the best value function, and it takes away variance.
    values = value_function(SMALL, policy, reference, BETA)
    without, best = law(algorithm="vpg"), law(algorithm="vpg", values=values)
    torch.testing.assert_close(best.gradient, without.gradient, rtol=0, atol=1e-12)
    assert best.variance < without.variance


def test_the_value_function_is_its_own_expectation() -> None:
    policy, reference, _ = models("tabular", TASK)
    values = value_function(TASK, policy, reference, BETA)
    mask = TASK.completions().completion_mask
    assert not values[~mask].any()
    with torch.no_grad():
        tokens, ref = (exact._token_logprobs(m.double(), TASK) for m in (policy, reference))
    value_of = {
        (p, s[:t]): values[p, n, t] for p in range(3) for n, s in enumerate(TASK.sequences) for t in range(len(s))
    }
    for p in range(3):
        best = exact_values(TASK, tokens.sum(-1), ref.sum(-1), BETA)
        root = [value_of[p, ()] for p in range(3)]
        assert sum(root).item() / 3 == pytest.approx(best.objective)
        # Before a token: what it may be, times what it earns and what comes after it.
        for prefix in [(), (1,), (2,), (1, 2), (2, 2)]:
            expected = 0.0
            for token in range(3):
                after = (*prefix, token)
                n = next(i for i, s in enumerate(TASK.sequences) if s[: len(after)] == after)
                logprob, ref_logprob = tokens[p, n, len(prefix)], ref[p, n, len(prefix)]
                rest = TASK.rewards[p, n] if after == TASK.sequences[n] else value_of[p, after]
                expected += (logprob.exp() * (rest - BETA * (logprob - ref_logprob))).item()
            assert value_of[p, prefix].item() == pytest.approx(expected)


def test_a_law_is_taken_at_the_temperature_that_samples() -> None:
    """Logits at temperature 1/2 are those of a table twice as large, and move twice as fast with it."""
    policy, reference, _ = models("tabular", SMALL)
    cooled = gradient_law(config(temperature=0.5), SMALL, policy, reference)
    for model in (policy, reference):
        model.model.table.weight.data *= 2
    larger = gradient_law(config(), SMALL, policy, reference)
    torch.testing.assert_close(cooled.gradient, 2 * larger.gradient, rtol=0, atol=1e-12)
    assert cooled.variance == pytest.approx(4 * larger.variance)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"num_generations": 8}, "at most 500000 are enumerated"),
        ({"algorithm": "dpo"}, "from a dataset"),
        ({"algorithm": "copg", "copg.offline": True}, "from a dataset"),
        ({"algorithm": "raft", "top_p": 0.9}, "set top_p to 1"),
        ({"algorithm": "ppo", "ppo.whiten_advantages": True}, "whitens over the whole batch"),
        ({"algorithm": "online_dpo", "online_dpo.labels": "sampled"}, "online_dpo.labels is sampled"),
        ({"algorithm": "online_ipo", "online_ipo.labels": "sampled"}, "online_ipo.labels is sampled"),
    ],
)
def test_what_has_no_law_of_one_group(words: dict[str, Any], match: str) -> None:
    model = tabular_model(SMALL)
    with pytest.raises(PairtuneError, match=match):
        gradient_law(config(**words), SMALL, model, model)


def test_derivatives_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "MAX_JACOBIAN", 14 * 24 - 1)
    with pytest.raises(PairtuneError, match="14 tokens by 24 parameters"):
        gradient_law(config(), SMALL, tabular_model(SMALL), tabular_model(SMALL))


# ---------------------------------------------------------------------------------------------------- in the real loop


def run(model: Any, output_dir: Path, reward: Any = None, **words: Any) -> Any:
    settings = {"batch_size": 24, "max_steps": 3, "num_iterations": 2, "learning_rate": 0.05, "save_steps": 0}
    return train(
        config(output_dir=str(output_dir), **{**settings, **words}),
        model=model,
        tokenizer=TASK.tokenizer(),
        reward_funcs=[reward or TASK.reward_func],
        train_dataset=TASK.dataset(48),
    )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_models_go_through_train(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[kind](TASK).to(dtype)
    start = sequence_logprobs(model, TASK)
    result = run(model, tmp_path / "run", watched_reward_func(TASK, model, BETA), learning_rate=0.002)
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert result.steps == len(lines) == 3
    # The columns are the sampling policy's: at the first step the reference itself.
    before = exact_values(TASK, start, start, BETA)
    assert {name: lines[0][f"exact/{name}"] for name in vars(before)} == pytest.approx(vars(before), abs=1e-12)
    assert lines[0]["exact/kl"] == 0
    assert lines[2]["exact/kl"] > 0
    assert all(line["sampling/logprob_difference/max"] < 1e-5 for line in lines)

    # What the loop measures on samples is what is enumerated; 48 samples, four standard errors.
    assert abs(lines[0]["reward"] - before.reward) < 4 * TASK.rewards.std() / math.sqrt(48)
    after = sequence_logprobs(result.model, TASK)
    assert exact_values(TASK, after, start, BETA).regret < before.regret
    newest = checkpoint.latest(tmp_path / "run")
    loaded = AutoModelForCausalLM.from_pretrained(newest, dtype=dtype)
    assert torch.equal(sequence_logprobs(loaded, TASK), after)
    assert AutoTokenizer.from_pretrained(newest)("b a")["input_ids"] == [2, 1]


def test_a_tabular_run_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = run(tabular_model(TASK), tmp_path / "whole")
    run(tabular_model(TASK), tmp_path / "parts", max_steps=2)
    parts = run(tabular_model(TASK), tmp_path / "parts", resume=True)
    assert torch.equal(whole.model.model.table.weight, parts.model.model.table.weight)
    lines = [[without_times(x) for x in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_a_batch_is_nearly_the_exact_gradient(tmp_path: Path) -> None:
    """One update of plain size from many samples moves the table along minus the law's gradient."""
    model = tabular_model(TASK)
    law = gradient_law(config(), TASK, model, model)
    before = model.model.table.weight.detach().clone()
    # With so large an epsilon AdamW's first move is the gradient times learning_rate / epsilon.
    words = {"max_steps": 1, "num_iterations": 1, "batch_size": 1536, "max_grad_norm": None}
    train(
        config(output_dir=str(tmp_path / "run"), learning_rate=1.0, adam_epsilon=1e4, save_steps=0, **words),
        model=model,
        tokenizer=TASK.tokenizer(),
        reward_funcs=[TASK.reward_func],
        train_dataset=TASK.dataset(1536),
    )
    moved = (model.model.table.weight.detach() - before).flatten().double() * 1e4
    error = (moved + law.gradient).square().sum().item()
    # The scatter of a mean of 1536 groups, a third of them of each prompt.
    assert error == pytest.approx(law.variance / 1536, rel=0.7)
    assert error < 0.05 * law.gradient.square().sum().item()


@pytest.mark.slow
def test_p3o_trains_the_table_to_its_optimum(tmp_path: Path) -> None:
    model = tabular_model(TASK)
    ref = sequence_logprobs(model, TASK)
    result = train(
        config(
            output_dir=str(tmp_path / "run"),
            batch_size=192,
            max_steps=200,
            num_iterations=1,
            learning_rate=0.1,
            lr_scheduler_type="cosine",
            max_grad_norm=None,
            save_steps=0,
        ),
        model=model,
        tokenizer=TASK.tokenizer(),
        reward_funcs=[TASK.reward_func],
        train_dataset=TASK.dataset(192),
    )
    assert exact_values(TASK, ref, ref, BETA).regret > 0.5
    assert exact_values(TASK, sequence_logprobs(result.model, TASK), ref, BETA).regret < 1e-3
