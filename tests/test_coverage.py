"""benchmarks/coverage.py: do 95% intervals hold a simulated truth that is not kind 95 times in 100? And its record."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pairtune.evidence.head_to_head import Games
from pairtune.maths.statistics import estimate_mean

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RECORD = BENCHMARKS / "results" / "coverage.json"

sys.path.insert(0, str(BENCHMARKS))
try:
    bench: Any = importlib.import_module("coverage")
finally:
    sys.path.remove(str(BENCHMARKS))

WORLD = bench.WORLDS["three"]
"""60 log-normal prompts, 3 seeds with a variance of their own."""
MOST_ASKED = {
    "means": ("mean reward", "difference of rewards", "KL", "KL a token"),
    "frontiers": ("reward at matched KL", "difference of rewards at matched KL", "area under the frontier"),
    "wins": (
        "win rate of b over c",
        "win rate of a over d",
        *(f"Bradley-Terry strength of {name}" for name in "abcd"),
    ),
    "lengths": ("length-controlled win rate",),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", MOST_ASKED)
def test_the_intervals_hold_the_truth_as_often_as_they_say(part: str) -> None:
    """1,000 repetitions. 92 to 98%; the interval over prompts alone, which knows nothing of seeds, far from it."""
    found = bench.coverage(WORLD, 1000, [part])
    for name in MOST_ASKED[part]:
        row = found[name]
        assert row["repetitions"] == 1000
        assert 0.92 <= row["covered"] <= 0.98, (name, row)
        assert row["covered_by_prompts_alone"] < 0.90, (name, row)


def test_a_few_repetitions_hold_the_truth() -> None:
    """30 of every quantity but those whose truth takes long: a sound interval misses 6 of them once in 300 tries."""
    found = bench.coverage(WORLD, 30, ["means", "frontiers", "wins"])
    assert len(found) == 17
    for name, row in found.items():
        assert round(row["repetitions"] * (1 - row["covered"])) <= 5, (name, row)
    total = sum(row["covered"] for row in found.values()) / len(found)
    assert 0.91 < total < 0.995
    alone = sum(row["covered_by_prompts_alone"] for row in found.values()) / len(found)
    assert alone < 0.85


def test_the_worlds_are_what_they_say() -> None:
    """Moments of the drawn values, and truths by quadrature against plain averages of many draws."""
    draw = bench.Draw(WORLD, 0)
    values = draw.skewed(500_000)
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.var().item() == pytest.approx(1, abs=0.1)
    assert values.pow(3).mean().item() > 3
    scores = bench.worth(bench.Draw(bench.World("", num_seeds=50, num_prompts=1000), 1))
    games = Games.from_scores(scores["a"][:, :, :1], scores["d"][:, :, :1])
    assert games.share == pytest.approx(bench.true_rate(WORLD, "a", "d"), abs=0.02)
    measured = bench.means(bench.Draw(bench.World("", num_seeds=50, num_prompts=10_000), 2))
    for name, found in measured.items():
        error = math.hypot(found.estimate.prompt_error, found.estimate.seed_error)
        assert abs(found.estimate.mean - found.truth) < 3.5 * error < 0.25 * found.truth + 0.1, name
    assert sum(bench.true_strengths(WORLD)) == pytest.approx(0, abs=1e-9)
    assert bench.kl_truth(bench.World("", seed_spread=0.0), bench.ARMS[0]) == pytest.approx(1.2**2)


def test_what_is_counted() -> None:
    def measured(truth: float) -> Any:
        return bench.Measured(estimate_mean(torch.tensor([1.0, 2.0, 3.0])), (1.5, 2.5), truth)

    row = bench.figures([measured(2.0), measured(2.6), measured(-9.0), measured(9.0)])
    assert (row["covered"], row["below"], row["above"], row["covered_by_prompts_alone"]) == (0.5, 0.25, 0.25, 0.25)
    assert row["width_by_prompts_alone"] == 1
    assert (row["mean"], row["repetitions"]) == (2, 4)


def test_a_run_leaves_a_record_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.length_truth.cache_clear()
    monkeypatch.setattr(bench, "LENGTH_DRAWS", 1000)
    bench.main(["--repetitions", "3", "--worlds", "three", "one", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "coverage.json").read_text())
    assert record["command"] == "python benchmarks/coverage.py --repetitions 3 --worlds three one --output ..."
    assert record["worlds"]["three"]["repetitions"] == 3
    assert record["worlds"]["one"]["repetitions"] == 1
    assert len(record["figures"]["three"]) == 19
    assert str(tmp_path) not in (tmp_path / "coverage.md").read_text() + (tmp_path / "coverage.json").read_text()
    assert (tmp_path / "coverage.md").read_text() in capsys.readouterr().out
    bench.length_truth.cache_clear()


def test_the_record_says_what_the_docstring_of_the_intervals_does() -> None:
    record = json.loads(RECORD.read_text())
    assert RECORD.with_suffix(".md").read_text() == bench.as_markdown(record)
    assert record["worlds"]["three"]["repetitions"] >= 1000
    for names in MOST_ASKED.values():
        for name in names:
            row = record["figures"]["three"][name]
            assert 0.92 <= row["covered"] <= 0.98, name
            assert row["covered_by_prompts_alone"] < 0.90, name
            assert math.isclose(row["covered"] + row["below"] + row["above"], 1)
