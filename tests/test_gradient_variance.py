"""benchmarks/gradient_variance.py: identities between variances, enumeration against sampling, and the record."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pairtune import TrainConfig
from pairtune.algorithms import ALGORITHMS, MethodState
from pairtune.evidence.exact import (
    EnumerableTask,
    exact_values,
    gradient_law,
    objective_gradient,
    sequence_logprobs,
    tabular_model,
)
from pairtune.maths.advantages import MovingAverage
from pairtune.maths.masking import masked_sum
from pairtune.types import Completions, Experience

PATH = Path(__file__).parent.parent / "benchmarks" / "gradient_variance.py"
RECORD = PATH.parent / "results" / "gradient_variance.json"
PAIR = "P3O, RLOO, CoPG, REBEL; K = 2"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradient_variance", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gradient_variance"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def place(bench: ModuleType) -> Any:
    """Away from the reference, so that the KL counts."""
    task = EnumerableTask.random(max_completion_length=2, seed=3)
    return bench.Place(task, tabular_model(task, seed=1).double(), tabular_model(task, seed=2))


def scores(place: Any) -> Tensor:
    """(P, N, T, D) gradients of token log-probabilities by the table, from its softmax and nothing else."""
    task, table = place.task, place.policy.model.table.weight.detach()
    histories = sorted(
        (sum((token + 1) * (task.vocab_size + 1) ** i for i, token in enumerate(history)), history)
        for prompt in task.prompts
        for history in [prompt, *((*prompt, token) for token in range(1, task.vocab_size))]
    )
    row_of = {history: row for row, (_, history) in enumerate(histories)}
    found = torch.zeros(task.num_prompts, task.num_completions, 2, *table.shape, dtype=torch.float64)
    for p, prompt in enumerate(task.prompts):
        for n, sequence in enumerate(task.sequences):
            for t, token in enumerate(sequence):
                row = row_of[(*prompt, *sequence[:t])]
                found[p, n, t, row, :-1] = -table[row, :-1].softmax(-1)
                found[p, n, t, row, token] += 1
    return found.flatten(3)


def shaped(place: Any) -> Tensor:
    logprobs, ref = (sequence_logprobs(model, place.task) for model in (place.policy, place.reference))
    return place.task.rewards - 0.5 * (logprobs - ref)


# Identities


def test_what_stands_in_one_row_is_one_gradient(bench, place):
    pair = bench.METHODS[PAIR](place)
    for words, factor in (
        ({"algorithm": "rloo"}, 1),
        ({"algorithm": "copg"}, 2),
        ({"algorithm": "rebel"}, 4),
        ({"algorithm": "p3o", "p3o.clip": "separate"}, 1),
    ):
        law = place.law(words)
        torch.testing.assert_close(law.gradient, factor * pair.gradient, rtol=1e-9, atol=1e-12)
        assert law.variance == pytest.approx(factor**2 * pair.variance, rel=1e-9)
        assert law.noise_scale == pytest.approx(pair.noise_scale, rel=1e-9)
    four = bench.METHODS["P3O, RLOO, CoPG, REBEL; K = 4"](place)
    for name in ("p3o", "copg", "rebel"):
        law = place.law({"algorithm": name, "num_generations": 4})
        assert law.noise_scale == pytest.approx(four.noise_scale, rel=1e-9)
    for ppo in ("PPO, VPG; values 0", "PPO, VPG; exact values"):
        values = place.values if "exact" in ppo else None
        vpg = place.law({"algorithm": "vpg", "num_generations": 1}, values=values)
        assert vpg.noise_scale == pytest.approx(bench.METHODS[ppo](place).noise_scale, rel=1e-9)


def test_leave_one_out_falls_to_the_mean_of_the_prompt(bench, place):
    """Per completion, its variance is that with the prompt's mean plus (Var R E|s|^2 + |E R s|^2) / (K - 1)."""
    probs = sequence_logprobs(place.policy, place.task).exp()
    sequence_scores, rewards = scores(place).sum(2), shaped(place)
    centred = rewards - (probs * rewards).sum(-1, keepdim=True)
    spread = (probs * centred.square()).sum(-1) * (probs * sequence_scores.square().sum(-1)).sum(-1)
    signal = torch.einsum("pn,pn,pnd->pd", probs, centred, sequence_scores).square().sum(-1)
    limit = bench.METHODS["REINFORCE, mean of the prompt"](place).variance
    direct = (probs * centred.square() * sequence_scores.square().sum(-1)).sum(-1) - signal
    assert limit == pytest.approx(direct.mean().item(), rel=1e-9)
    falling = []
    for k in (2, 3, 4, 5):
        law = place.law({"algorithm": "rloo", "num_generations": k})
        assert law.variance_per_completion == pytest.approx(limit + (spread + signal).mean().item() / (k - 1), rel=1e-9)
        falling.append(law.variance_per_completion)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] > limit


def test_the_best_baselines_are_the_best(bench, place):
    one, each = place.best_baselines
    assert torch.equal(one, one[0].expand(3))
    assert each.unique().numel() == 3

    def variance(baseline: Tensor) -> float:
        return place.law(bench.REINFORCE, task=place.less(baseline)).variance

    for best, directions in ((one, [torch.ones(3)]), (each, torch.eye(3))):
        for direction in directions:
            for step in (-0.01, 0.01):
                assert variance(best + step * direction.double()) > variance(best)
    mean = bench.METHODS["REINFORCE, mean of the prompt"](place).variance
    averaged = bench.METHODS["REINFORCE, moving average"](place).variance
    assert variance(each) < mean
    assert variance(each) < variance(one) < averaged


def test_a_baseline_leaves_the_expectation_alone(bench, place):
    exactly = objective_gradient(place.task, place.policy, place.reference, 0.5)
    for name, estimate in bench.METHODS.items():
        law = estimate(place)
        # A mean over tokens is shorter, and so is the sum of two per pair longer: the direction is what counts.
        cosine = torch.cosine_similarity(-law.gradient, exactly, 0).item()
        unbiased = not name.startswith(("online", "GRPO", "RAFT"))
        assert (cosine > 1 - 1e-9) == unbiased, name
        if name.startswith(("P3O", "REINFORCE")):
            torch.testing.assert_close(-law.gradient, exactly, rtol=0, atol=1e-6)


def test_uneven_prompts_are_noise_for_a_common_baseline_and_nothing_for_a_pair(bench, place):
    pair, uneven = bench.METHODS[PAIR](place), bench.METHODS["the same, uneven prompts"](place)
    assert uneven.variance == pytest.approx(pair.variance, rel=1e-12)
    for name in ("REINFORCE, moving average", "PPO, VPG; values 0"):
        plain, uneven = bench.METHODS[name](place), bench.METHODS[f"{name}, uneven prompts"](place)
        torch.testing.assert_close(uneven.gradient, plain.gradient, rtol=0, atol=1e-12)
        assert uneven.variance > 1.2 * plain.variance


# Enumeration against sampling


@pytest.mark.parametrize(
    "words",
    [
        {"algorithm": "p3o"},
        {"algorithm": "rloo", "num_generations": 4},
        {"algorithm": "reinforce", "num_generations": 1},
        {"algorithm": "ppo", "num_generations": 1, "ppo.whiten_advantages": False},
        {"algorithm": "online_dpo"},
        {"algorithm": "grpo", "num_generations": 4},
    ],
    ids=lambda words: words["algorithm"],
)
def test_the_law_is_what_sampled_groups_show(place, words):
    """20000 groups a prompt, drawn, through the loss of the method, times scores taken by hand."""
    config = TrainConfig(model="m", dataset="d", beta=0.5, max_completion_length=2, **words)
    state = MethodState(beta=0.5, average=MovingAverage(3.0, 10))
    law = gradient_law(config, place.task, place.policy, place.reference, state=state)
    task, num, k = place.task, 20_000, config.num_generations
    generator = torch.Generator().manual_seed(0)
    policy_tokens, ref_tokens = (tokens(model, task) for model in (place.policy, place.reference))
    every, jacobian = task.completions(), scores(place)
    means, variances, counts = [], [], []
    for p in range(task.num_prompts):
        drawn = torch.multinomial(policy_tokens[p].sum(-1).exp(), num * k, replacement=True, generator=generator)
        drawn = drawn.view(num, k)
        completions = Completions(
            every.prompt_ids[p].expand(num, -1),
            every.prompt_mask[p].expand(num, -1),
            *(x[p, drawn] for x in (every.completion_ids, every.completion_mask, every.sampler_logprobs)),
            every.truncated[p, drawn],
            0,
        )
        old = policy_tokens[p, drawn]
        mask = torch.ones(num, k, dtype=torch.bool)
        experience = Experience(
            completions, task.rewards[p, drawn], mask, ref_tokens[p, drawn], old, old_values=torch.zeros_like(old)
        )
        algorithm = ALGORITHMS[config.algorithm]
        if algorithm.prepare is not None:
            experience = replace(experience, targets=algorithm.prepare(experience, config, state))
        current = old.clone().requires_grad_()
        output = algorithm.loss(current, experience, config, torch.zeros_like(old))
        (weights,) = torch.autograd.grad(masked_sum(output.losses, output.mask), current)
        gradients = torch.einsum("gkt,gktd->gd", weights, jacobian[p, drawn])
        means.append(gradients.mean(0))
        variances.append(gradients.var(0).sum().item())
        counts.append(output.mask.sum().item() / num)
    counted = sum(counts) / len(counts)  # PPO's loss is a mean over tokens, whose number is random
    assert sum(variances) / 3 / counted**2 == pytest.approx(law.variance, rel=0.04)
    # Four standard errors of a mean of 20000, summed over directions.
    error = (torch.stack(means) / counted - law.prompt_gradients).square().sum(-1).mean().item()
    assert error < 4 * law.variance / num
    assert law.prompt_gradients.square().sum(-1).min() > 20 * error


def tokens(model: Any, task: EnumerableTask) -> Tensor:
    """(P, N, T) token log-probabilities of a table, by hand; 0 where masked."""
    histories = sorted(
        (sum((token + 1) * (task.vocab_size + 1) ** i for i, token in enumerate(history)), history)
        for prompt in task.prompts
        for history in [prompt, *((*prompt, token) for token in range(1, task.vocab_size))]
    )
    laws = model.model.table.weight.detach().double()[:, :-1].log_softmax(-1)
    law_of = {history: laws[row] for row, (_, history) in enumerate(histories)}
    found = torch.zeros(task.num_prompts, task.num_completions, 2, dtype=torch.float64)
    for p, prompt in enumerate(task.prompts):
        for n, sequence in enumerate(task.sequences):
            for t, token in enumerate(sequence):
                found[p, n, t] = law_of[(*prompt, *sequence[:t])][token]
    return found


def test_the_tokens_by_hand_are_the_models(place):
    for model in (place.policy, place.reference):
        torch.testing.assert_close(tokens(model, place.task).sum(-1), sequence_logprobs(model, place.task))


# The policies and the figures


def test_policies_on_the_way_have_the_regret_that_is_said(bench):
    task = EnumerableTask.random(max_completion_length=2, seed=3)
    found = bench.places(task, "tabular", 1)
    assert list(found) == list(bench.REMAINING_REGRET)
    reference = sequence_logprobs(tabular_model(task, seed=1), task)
    regrets = [exact_values(task, sequence_logprobs(x.policy, task), reference, 0.5).regret for x in found.values()]
    shares = [regret / regrets[0] for regret in regrets]
    assert shares[0] == 1
    assert 0.4 < shares[1] <= 0.5
    assert 0.05 < shares[2] <= 1 / 16
    for x in found.values():
        assert torch.equal(sequence_logprobs(x.reference, task), reference)


def test_figures_of_a_law(bench, place):
    law = bench.METHODS[PAIR](place)
    ascent = objective_gradient(place.task, place.policy, place.reference, 0.5)
    found = bench.figures(law, ascent)
    norm = law.gradient.norm().item() ** 2
    assert found["noise_scale"] == pytest.approx(2 * law.variance / norm)
    # In a table, prompts share no parameter: their gradients are orthogonal.
    between = law.prompt_gradients.square().sum().item() / 3 - norm
    assert found["with_prompts"] == pytest.approx(found["noise_scale"] + 2 * between / norm)
    assert between / norm == pytest.approx(2)
    assert found["cosine"] == pytest.approx(1)


# The record


def test_the_record_is_what_the_json_says(bench, record, tmp_path):
    assert record["command"] == "python benchmarks/gradient_variance.py"
    assert {*record["figures"]} == {"tabular", "transformer"}
    for by_place in record["figures"].values():
        assert list(by_place) == list(bench.REMAINING_REGRET)
        for found in by_place.values():
            assert list(found) == list(bench.METHODS)
            pair, uneven = found[PAIR], found["the same, uneven prompts"]
            assert pair["noise_scale"] == pytest.approx(uneven["noise_scale"], rel=1e-4)
            four = found["P3O, RLOO, CoPG, REBEL; K = 4"]["noise_scale"]
            mean, best = (found[f"REINFORCE, {x} of the prompt"]["noise_scale"] for x in ("mean", "best"))
            for values in zip(pair["noise_scale"], four, mean, best, strict=True):
                assert list(values) == sorted(values, reverse=True)
            assert min(pair["cosine"] + four + mean) > 0.999
    # What the record says in words of a pair and a common baseline.
    over = {
        (name, at): statistics.median(bench.over_pair(record, f"REINFORCE, moving average{name}", at))
        for name in ("", ", uneven prompts")
        for at in bench.REMAINING_REGRET
    }
    assert all(0.4 < over["", at] < 0.6 for at in ("reference", "half way"))
    assert all(0.8 < over[", uneven prompts", at] < 1.25 for at in ("reference", "half way"))
    assert over["", "near the optimum"] > 1.5
    assert max(bench.over_pair(record, "REINFORCE, moving average, uneven prompts", "near the optimum")) > 20
    assert RECORD.with_suffix(".md").read_text() == bench.as_markdown(record)
    matplotlib = pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        bench.draw(record, tmp_path / name)
    drawn = (tmp_path / "first.svg").read_bytes()
    assert drawn == (tmp_path / "second.svg").read_bytes()
    if matplotlib.__version__ == record["environment"]["matplotlib"]:  # others draw the same, in other bytes
        assert drawn == RECORD.with_suffix(".svg").read_bytes()


def test_the_first_figures_of_the_record_come_out_again(bench, record):
    task = EnumerableTask.random(seed=0)
    start = bench.places(task, "tabular", 0)["reference"]
    recorded = record["figures"]["tabular"]["reference"]
    for name in (PAIR, "REINFORCE, moving average", "PPO, VPG; exact values"):
        assert bench.METHODS[name](start).noise_scale == pytest.approx(recorded[name]["noise_scale"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("value", "text"), [(0.4153, "0.415"), (6.066, "6.07"), (51.72, "51.7"), (242.4, "242"), (2913.0, "2910")]
)
def test_three_digits(bench, value, text):
    assert bench.digits(value) == text


def test_the_command_writes_its_files(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    few = (PAIR, "REINFORCE, moving average", "PPO, VPG; exact values")
    monkeypatch.setattr(bench, "METHODS", {name: bench.METHODS[name] for name in few})
    monkeypatch.setattr(bench, "COMPARED", few[1:])
    monkeypatch.setitem(bench.MAX_LENGTHS, "tabular", 2)
    folder = tmp_path / "new"
    bench.main(["--seeds", "3", "--models", "tabular", "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        f"gradient_variance.{kind}" for kind in ("json", "md", "svg")
    ]
    written = json.loads((folder / "gradient_variance.json").read_text())
    assert written["command"].endswith("--seeds 3 --models tabular --output ...")
    assert str(tmp_path) not in json.dumps(written)
    assert len(written["figures"]["tabular"]["half way"][PAIR]["with_prompts"]) == 1
    text = (folder / "gradient_variance.md").read_text()
    assert text == bench.as_markdown(written)
    assert text in capsys.readouterr().out
    assert "| *PPO, VPG; exact values* |" in text
    assert "| REINFORCE, moving average |" in text


@pytest.mark.parametrize("argument", [["--models", "large"], ["--seeds", "-1"], ["--seeds"]])
def test_arguments_that_make_no_sense_are_refused(bench, argument, capsys):
    with pytest.raises(SystemExit):
        bench.main(argument)
    assert argument[0] in capsys.readouterr().err
