"""benchmarks/copg_bandit.py: the bandit's exact figures, what it learns, where it ends, and its record."""

from __future__ import annotations

import copy
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "copg_bandit.py"
RECORD = PATH.parent / "results" / "copg_bandit.json"

# The set-up as published, written down a second time.
REWARDS, FIRST, SECOND, BETA = (2.5, 2.0, 1.0), (0.1, 0.2, 0.7), (0.05, 0.05, 0.9), 0.5


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("copg_bandit", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["copg_bandit"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


# The bandit


def test_the_exact_figures(bench, record):
    assert bench.OPTIMUM.exp().tolist() == pytest.approx([0.7054, 0.2595, 0.0351], abs=5e-5)
    assert bench.objective(bench.OPTIMUM).item() == pytest.approx(2.12520, abs=5e-6)
    assert bench.objective(bench.REFERENCE).item() == pytest.approx(1.83333, abs=5e-6)
    assert bench.regret(bench.REFERENCE).item() == pytest.approx(0.29187, abs=5e-6)
    exact = record["exact"]
    assert exact["optimal policy"] == pytest.approx(bench.OPTIMUM.exp().tolist(), abs=1e-7)
    assert exact["J of the optimal policy"] == pytest.approx(2.12520, abs=5e-6)
    assert exact["J of the reference, where all start"] == pytest.approx(1.83333, abs=5e-6)
    assert exact["regret at the start"] == pytest.approx(0.29187, abs=5e-6)
    assert exact["KL of the optimal policy to the reference"] == pytest.approx(0.38475, abs=5e-6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def outcome_law() -> dict[tuple[int, int, int], float]:
    """(first arm, second arm, which is preferred) -> how probable that is."""
    law = {}
    for first in range(3):
        for second in range(3):
            chance = sigmoid(REWARDS[first] - REWARDS[second])
            law[first, second, 0] = FIRST[first] * SECOND[second] * chance
            law[first, second, 1] = FIRST[first] * SECOND[second] * (1 - chance)
    return law


def test_the_law_of_the_outcomes(bench):
    law, weights = outcome_law(), bench.law_of_outcomes()
    assert {
        tuple(outcome): weight for outcome, weight in zip(bench.OUTCOMES.tolist(), weights.tolist(), strict=True)
    } == (pytest.approx(law))
    assert weights.sum().item() == pytest.approx(1)


def test_outcomes_are_drawn_by_their_law(bench):
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    drawn = torch.cat([bench.draw_outcomes(generator) for generator in generators])
    num, weights = len(drawn), bench.law_of_outcomes()
    assert num == 20 * 10_000
    errors = drawn.bincount(minlength=18) / num - weights
    assert (errors.abs() <= 4 * (weights * (1 - weights) / num).sqrt()).all()


def test_batches_are_512_consecutive_pairs_and_a_short_last_one(bench):
    outcomes = torch.randint(18, (3, 10_000))
    weights = bench.batch_weights(outcomes)
    assert weights.shape == (20, 3, 18)
    for run in range(3):
        for batch in (0, 7, 19):
            cut = outcomes[run, 512 * batch : 512 * (batch + 1)]
            assert len(cut) == (512 if batch < 19 else 272)
            expected = [(cut == outcome).sum().item() / len(cut) for outcome in range(18)]
            assert weights[batch, run].tolist() == pytest.approx(expected)


# The methods


def pair_gradient(method: str, policy: list[float], first: int, second: int, preferred: int) -> list[float]:
    """By the logits, from the papers' equations: of what each method does to one pair."""
    logratio = [math.log(3 * p) for p in policy]

    def of_logprob(arm: int) -> list[float]:
        return [(arm == other) - policy[other] for other in range(3)]

    if method in ("none", "value", "objective"):
        shaped = [REWARDS[arm] - BETA * logratio[arm] for arm in range(3)]
        baseline = {
            "none": 0.0,
            "value": sum(p * r for p, r in zip(policy, REWARDS, strict=True)),
            "objective": sum(p * r for p, r in zip(policy, shaped, strict=True)),
        }[method]
        weights = [-(shaped[arm] - baseline) / 2 for arm in (first, second)]
    elif method == "copg":  # eq. 18: (R(y) - R(y')) grad log pi(y) + (R(y') - R(y)) grad log pi(y'), maximised
        gap = (REWARDS[first] - BETA * logratio[first]) - (REWARDS[second] - BETA * logratio[second])
        weights = [-gap, gap]
    else:
        chosen, rejected = (first, second) if preferred == 0 else (second, first)
        slope = 2 * (logratio[chosen] - logratio[rejected] - 1 / (2 * float(method.removeprefix("ipo "))))
        weights = [slope, -slope] if preferred == 0 else [-slope, slope]
    return [weights[0] * a + weights[1] * b for a, b in zip(of_logprob(first), of_logprob(second), strict=True)]


def expected_gradient(method: str, policy: list[float]) -> list[float]:
    total = [0.0, 0.0, 0.0]
    for (first, second, preferred), weight in outcome_law().items():
        gradient = pair_gradient(method, policy, first, second, preferred)
        total = [t + weight * g for t, g in zip(total, gradient, strict=True)]
    return total


WRITTEN = {"copg": "copg", "value": "value", "none": "none", "ipo": f"ipo {BETA}"}


@pytest.mark.parametrize("name", WRITTEN)
def test_each_outcome_has_the_gradient_of_the_papers_equation(bench, name):
    logits = torch.tensor([[0.3, -0.2, 0.9], [-1.0, 0.5, 0.1]], dtype=torch.float64, requires_grad=True)
    losses = bench.METHODS[name](logits.log_softmax(-1))
    assert losses.shape == (2, 18)
    for run in range(2):
        policy = logits[run].softmax(-1).tolist()
        for place, outcome in enumerate(bench.OUTCOMES.tolist()):
            (gradient,) = torch.autograd.grad(losses[run, place], logits, retain_graph=True)
            assert gradient[run].tolist() == pytest.approx(pair_gradient(WRITTEN[name], policy, *outcome), abs=1e-12)
            assert gradient[1 - run].tolist() == [0, 0, 0]


# Learning


@pytest.mark.parametrize("name", WRITTEN)
def test_the_first_rows_of_the_record_come_out_again(bench, record, name):
    assert record["seeds"] == [0, 1, 2, 3, 4]
    regrets, _ = bench.learn(bench.METHODS[name], record["seeds"], 10)
    for run, recorded in zip(regrets.tolist(), record["regret"][name], strict=True):
        assert run == pytest.approx(recorded[:10], abs=1e-6)
    for epoch, expected in list(zip(bench.MARKS, bench.EXPECTED[name], strict=True))[:2]:
        assert regrets[:, epoch - 1].mean().item() == pytest.approx(expected, abs=5e-4)


def test_seeds_do_not_meet(bench):
    together, policies = bench.learn(bench.copg, [4, 7], 2)
    for place, seed in enumerate([4, 7]):
        alone, policy = bench.learn(bench.copg, [seed], 2)
        assert together[place].tolist() == pytest.approx(alone[0].tolist(), abs=1e-12)
        assert policies[place].tolist() == pytest.approx(policy[0].tolist(), abs=1e-12)
    assert abs(together[0, 0] - together[1, 0]) > 1e-6


def test_a_factor_before_the_loss_cancels_in_adam(bench):
    plain, _ = bench.learn(bench.copg, [0], 3)
    scaled, _ = bench.learn(lambda policy: 4 * bench.copg(policy), [0], 3)
    assert scaled.tolist()[0] == pytest.approx(plain.tolist()[0], abs=1e-6)


# Where they end


@pytest.mark.parametrize(
    "name, written, expected",
    [
        ("copg", "copg", 0.0),
        ("value", "value", 0.014817),
        ("ipo", "ipo 0.5", 0.152531),
        ("none", "none", 0.637793),
        ("policy gradient, baseline J(policy)", "objective", 0.0),
        ("IPO, tau = beta / 2", "ipo 0.25", 0.067375),
        ("IPO, tau = 2 beta", "ipo 1.0", 0.214963),
    ],
)
def test_at_the_limit_the_expected_update_is_zero(bench, record, name, written, expected):
    method = {**bench.METHODS, **bench.VARIANTS}[name]
    policy = bench.limit(method, bench.law_of_outcomes())
    assert expected_gradient(written, policy.exp().tolist()) == pytest.approx([0, 0, 0], abs=1e-11)
    assert bench.regret(policy).item() == pytest.approx(expected, abs=1e-6)
    assert record["limits"][bench.NAMES.get(name, name)]["regret"] == pytest.approx(expected, abs=1e-6)


def test_only_the_limit_of_copg_does_not_depend_on_who_sampled(bench):
    weights = torch.arange(1.0, 19.0, dtype=torch.float64)
    policy = bench.limit(bench.copg, weights / weights.sum())
    assert policy.exp().tolist() == pytest.approx(bench.OPTIMUM.exp().tolist(), abs=1e-9)
    other = bench.limit(bench.METHODS["none"], weights / weights.sum())
    assert abs(bench.regret(other).item() - 0.637793) > 0.1


def test_the_long_runs_end_at_the_limit_of_their_pairs(record):
    """Up to the noise of the last batches, which Adam does not average out."""
    assert record["longer"]["epochs"] == 1000
    for name, end in record["longer"]["ends"].items():
        assert end["regret"]["1000"] == pytest.approx(end["limit_of_its_pairs"], abs=1e-3), name
    ends = record["longer"]["ends"]
    assert ends["copg"]["regret"]["1000"] < 5e-6
    assert ends["value"]["regret"]["1000"] == pytest.approx(0.0148, abs=5e-4)
    assert ends["value"]["policy"] == pytest.approx([0.812, 0.167, 0.021], abs=2e-3)
    assert ends["ipo"]["regret"]["1000"] == pytest.approx(0.15, abs=0.01)
    assert ends["none"]["regret"]["1000"] == pytest.approx(0.635, abs=0.015)


# The record


def test_the_record_is_what_the_json_says(bench, record, tmp_path):
    assert record["command"] == "python benchmarks/copg_bandit.py"
    assert (record["epochs"], bench.unexpected(record)) == (100, [])
    assert RECORD.with_suffix(".md").read_text() == bench.as_markdown(record)
    matplotlib = pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        bench.draw(record, tmp_path / name)
    drawn = (tmp_path / "first.svg").read_bytes()
    assert drawn == (tmp_path / "second.svg").read_bytes()
    if matplotlib.__version__ == record["environment"]["matplotlib"]:  # others draw the same, in other bytes
        assert drawn == RECORD.with_suffix(".svg").read_bytes()


def test_the_table_names_each_row_by_its_figures(bench, record):
    text = bench.as_markdown(record)
    for line in (
        "| optimal policy | 0.70538, 0.25950, 0.03512 |",
        "| CoPG | 100 | 0.0132 (0.0130 to 0.0134) | 0.0131 (0.0126 to 0.0136) | 0.013 |",
        "| IPO, tau = 2 beta | 0.3792, 0.3458, 0.2750 | 0.21496 |  |",
    ):
        assert f"\n{line}\n" in text
    assert "None lies outside that." in text


def test_a_figure_that_is_not_as_expected_is_named(bench, record):
    changed = copy.deepcopy(record)
    for run in changed["regret"]["ipo"]:
        run[24] += 0.02
    for place in range(len(bench.OTHER_SEEDS)):
        changed["regret_of_other_seeds"]["ipo"]["25"][place] += 0.02
    assert bench.unexpected(changed) == ["IPO at epoch 25"]
    assert "Outside that: IPO at epoch 25." in bench.as_markdown(changed)


def test_marks(bench):
    assert bench.marks(100) == [1, 10, 25, 50, 100]
    assert bench.marks(30) == [1, 10, 25, 30]
    assert bench.marks(1) == [1]


def test_the_command_writes_its_files(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "LONGER", 2)
    monkeypatch.setattr(bench, "OTHER_SEEDS", (100, 101))
    folder = tmp_path / "new"
    bench.main(["--seeds", "3", "8", "--epochs", "2", "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [f"copg_bandit.{kind}" for kind in ("json", "md", "svg")]
    written = json.loads((folder / "copg_bandit.json").read_text())
    assert written["command"] == "python benchmarks/copg_bandit.py --seeds 3 8 --epochs 2 --output ..."
    assert str(tmp_path) not in json.dumps(written)
    assert {name: [len(run) for run in runs] for name, runs in written["regret"].items()} == {
        name: [2, 2] for name in bench.METHODS
    }
    assert written["longer"]["seed"] == 3
    assert sorted(written["longer"]["ends"]["copg"]["regret"]) == ["2", "4"]
    text = (folder / "copg_bandit.md").read_text()
    assert text == bench.as_markdown(written)
    assert text in capsys.readouterr().out
    svg = (folder / "copg_bandit.svg").read_text()
    assert all(f"<!-- {name} -->" in svg for name in bench.NAMES.values())


@pytest.mark.parametrize("argument", [["--epochs", "0"], ["--epochs", "two"], ["--seeds", "-1"], ["--seeds"]])
def test_arguments_that_make_no_sense_are_refused(bench, argument, capsys):
    with pytest.raises(SystemExit):
        bench.main(argument)
    assert argument[0] in capsys.readouterr().err
