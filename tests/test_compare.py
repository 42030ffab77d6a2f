"""`pairtune compare`: what a grid consists of, that its budgets are equal, and that nothing done is done again."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from synthetic import make_run
from test_evidence_runs import sample, write_run

from pairtune import PairtuneError
from pairtune.cli import main
from pairtune.config import CompareConfig, TrainConfig, config_to_yaml, load_config
from pairtune.evidence import compare as compare_module
from pairtune.evidence import comparison, held_out
from pairtune.evidence.compare import compare
from pairtune.evidence.comparison import clip_of, show
from pairtune.evidence.grid import PRESETS, Cell, Grid, grid_of
from pairtune.evidence.runs import Arm, Run, cell_folders, evaluation_samples, group_arms, read_run, read_runs
from pairtune.runs.metrics import read_jsonl, without_times

BASE: dict[str, Any] = {
    "num_generations": 4,
    "batch_size": 6,
    "learning_rate": 0.05,
    "eval_steps": 1,
    "save_steps": 1,
    "dtype": "float32",
    "device": "cpu",
}
SMALL: dict[str, Any] = {
    "base": BASE,
    "task": {"policy": "table", "num_prompts": 2, "max_completion_length": 2, "num_rows": 8},
    "seeds": [0, 1],
    "budget": {"completions": 60},
}
REAL: dict[str, Any] = {"base": {"model": "m", "dataset": "d", "reward_funcs": ["f"]}, "seeds": [0]}
TWO: dict[str, Any] = {
    **SMALL,
    "methods": {"P3O joint": {"algorithm": "p3o"}, "PPO": {"algorithm": "ppo", "num_generations": 1}},
    "sweep": {"axes": {"learning_rate": [0.02, 0.1]}},
}


def config(folder: Path | str = "runs/x", **words: Any) -> CompareConfig:
    return CompareConfig(**{**SMALL, "output_dir": str(folder), **words})


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tables(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "comparison.json").read_text()))


def written(folder: Path, name: str = "metrics") -> dict[str, list[dict[str, Any]]]:
    """A log of every cell, without times."""
    return {path.name: [*map(without_times, read_jsonl(path / f"{name}.jsonl"))] for path in cell_folders(folder)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, two seeds, a sweep of two learning rates; only to be read."""
    return compare(config(tmp_path_factory.mktemp("compare") / "out", **TWO))


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty report: drawing one takes longer than a cell."""
    monkeypatch.setattr("pairtune.evidence.report.write_report", lambda path: (path / "report.html").touch())


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


# ------------------------------------------------------------------------------------------------------------- the grid


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"axes": {"modle": ["a"]}}, "modle is not a setting of `pairtune train`; the nearest is model."),
        ({"axes": {"beta": [0.1, -1]}}, 'cell "p3o, beta -1, seed 0" and 1 more: beta must be a number >= 0, not -1.'),
        ({"methods": ["p3o", "rlo"]}, 'cell "rlo, seed 0" and 1 more: algorithm must be p3o, ppo, '),
        ({"methods": {"RLOO": {"algorithm": "rloo", "num_generations": 1}}}, "give 2 or more."),
        ({"axes": {"num_generations": [2, 5]}}, 'cell "p3o, num_generations 5, seed 0" and 1 more: a step has 24'),
        ({"budget": {"completions": 20}}, "a budget of 20 completions is less than one step of 24"),
        ({"budget": {"completions": 20, "tokens": 20}}, "cells are equal in one of the two"),
        ({"seeds": [0, 1, 0]}, "seeds is [0, 1, 0], which names one twice"),
        ({"base": {**BASE, "seed": 3}}, "base.seed is 3, but `pairtune compare` sets it for every cell; give `seeds`."),
        ({"base": {**BASE, "model": "m"}}, 'base.model is "m", but a task brings its own'),
        ({"base": {**BASE, "batch_size": "many"}}, "batch_size must be a whole number > 0"),
        ({"axes": {"beta": [0.1, 0.10]}}, "two cells are called p3o_beta-0.1_seed-0"),
        ({"axes": {"seed": [1, 2]}}, "seed stands in axes, but `pairtune compare` sets it for every cell; use seeds."),
        ({"methods": {"a": {"resume": False}}}, "resume stands in methods.a, but `pairtune compare` sets it"),
        ({"sweep": {"axes": {"overwrite": [True]}}}, "overwrite stands in sweep.axes, but `pairtune compare` sets it"),
        (
            {"sweep": {"axes": {"eval_steps": [1]}}},
            "eval_steps stands in sweep.axes, but how a run of the sweep is mea",
        ),
        ({"cells": [{"method": "a", "output_dir": "b"}]}, "output_dir stands in cells, but `pairtune compare` sets it"),
        ({"axes": {"max_steps": [1, 2]}}, "p3o_max_steps-1_seed-0 and p3o_max_steps-2_seed-0 come to one and the same"),
        ({"axes": {"beta": []}}, "axes must be lists of values by setting"),
        ({"sweep": {"axes": {"beta": [1]}}, "axes": {"beta": [1]}}, "beta stands in axes and in sweep.axes"),
        ({"sweep": {"axes": {"beta": [1]}, "seed": 1}}, "sweep.seed is 1, one of seeds"),
        ({**REAL, "task": {}, "sweep": {"axes": {"beta": [1]}}}, "sweep.split is missing"),
        ({"task": {}}, "base.model is missing"),
        ({**REAL, "task": {}, "base": {**REAL["base"], "dataset_test_split": None}}, "dataset_test_split is null"),
        ({"cells": [{"beta": 0.1}]}, "has no method"),
        ({"budget": {"tokens": 99}, "base": {**BASE, "lr_scheduler_type": "linear"}}, "does not know"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_cell(words: dict[str, Any], told: str) -> None:
    with pytest.raises(PairtuneError) as error:
        grid_of(config(**words))
    assert told in str(error.value)


def test_nothing_is_loaded_for_a_mistake() -> None:
    code = (
        "import sys; from pairtune.config import CompareConfig; from pairtune.evidence.grid import grid_of\n"
        "grid_of(CompareConfig(base={}, task={'policy': 'table'}))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_step_has_as_many_completions_and_every_ratio_its_updates() -> None:
    methods = {
        "P3O": {"algorithm": "p3o", "p3o.clip": "separate"},
        "PPO": {"algorithm": "ppo", "num_generations": 1},
        "RLOO": {"algorithm": "rloo"},
        "RLOO clipped": {"algorithm": "rloo", "rloo.clip": True},
        "few": {"algorithm": "p3o", "num_iterations": 1},
        "own": {"algorithm": "reinforce", "batch_size": 10, "minibatch_size": 5, "num_iterations": 2},
    }
    base = {**BASE, "num_iterations": 2, "minibatch_size": 3}
    grid = grid_of(config(base=base, methods=methods, seeds=[7], budget={"completions": 100}))
    by_method = {cell.method: cell.config for cell in grid.cells}
    sizes = {name: (its.batch_size, its.minibatch_size, its.max_steps) for name, its in by_method.items()}
    assert sizes == {
        **dict.fromkeys(("P3O", "RLOO", "RLOO clipped", "few"), (6, 3, 4)),
        "PPO": (24, 12, 4),
        "own": (10, 5, 2),
    }
    updates = {name: its.num_iterations for name, its in by_method.items()}
    assert updates == {"P3O": 2, "PPO": 2, "RLOO": 1, "RLOO clipped": 2, "few": 1, "own": 2}
    notes = "\n".join(grid.notes)
    assert "few: num_iterations is 1, so a batch is used for 2 updates; with fewer than 4" in notes
    assert "of 100 completions 4 steps of 24 take 96; 4 are left over." in notes
    assert "own: of 100 completions 2 steps of 40 take 80; 20 are left over." in notes


def test_an_axis_of_a_section_concerns_its_method_alone_and_explicit_cells_come_beside() -> None:
    grid = grid_of(
        config(
            methods=["p3o", "rloo"],
            axes={"p3o.clip": ["joint", "separate"], "beta": ["1e-1", 0.5]},
            cells=[{"method": "p3o", "beta": 0.9, "seed": 5}, {"method": "wild", "algorithm": "grpo"}],
            seeds=[0],
        )
    )
    assert [cell.name for cell in grid.cells] == [
        "p3o_p3o.clip-joint_beta-0.1_seed-0",
        "p3o_p3o.clip-joint_beta-0.5_seed-0",
        "p3o_p3o.clip-separate_beta-0.1_seed-0",
        "p3o_p3o.clip-separate_beta-0.5_seed-0",
        "rloo_beta-0.1_seed-0",
        "rloo_beta-0.5_seed-0",
        "p3o_beta-0.9_seed-5",
        "wild_algorithm-grpo_seed-0",
    ]
    assert grid.cells[2].config.p3o.clip == "separate"
    assert grid.cells[0].settings == {"p3o.clip": "joint", "beta": 0.1}
    assert grid.cells[-1].config.algorithm == "grpo"


def test_cells_whose_names_are_spelt_alike_have_folders_of_their_own() -> None:
    methods: dict[str, Any] = {"P3O+": {"algorithm": "p3o"}, "P3O-": {"algorithm": "p3o", "beta": 0.3}}
    methods |= {"α": {"algorithm": "rloo"}, "β": {"algorithm": "rloo", "beta": 0.3}}
    words: dict[str, Any] = {"seeds": [0, 1], "sweep": {"axes": {"learning_rate": [0.1, 0.2]}}}
    grid = grid_of(config(methods=methods, **words))
    for cells, kind in ((grid.cells, "cells"), (grid.sweep, "sweep")):
        names = [cell.name for cell in cells]
        assert len(set(names)) == len(names) == 8
        assert [cell.config.output_dir for cell in cells] == [f"runs/x/{kind}/{name}" for name in names]
    names = [cell.name for cell in grid.cells]
    # The first keeps what it is called alone, so that the others can be added to a folder that has it.
    assert (names[:2], names[4:6]) == (["p3o_seed-0", "p3o_seed-1"], ["cell_seed-0", "cell_seed-1"])
    assert re.fullmatch("p3o_[0-9a-f]{6}_seed-0", names[2])
    assert names[2].removesuffix("0") == names[3].removesuffix("1")
    alone = grid_of(config(methods={name: methods[name] for name in ("P3O+", "α")}, **words))
    assert [cell.name for cell in alone.cells] == [*names[:2], *names[4:6]]


def test_the_sweep_has_its_own_seed_and_prompts_and_the_middle_of_every_axis() -> None:
    words = {**REAL, "task": {}, "axes": {"beta": [0.1, 0.2, 0.3]}, "budget": {"completions": 512}}
    sweep = {"axes": {"learning_rate": [1e-5, 1e-4]}, "split": "test[:9]", "completions": 256, "eval_generations": 5}
    grid = grid_of(config(**words, methods=["p3o", "rloo"], sweep=sweep))
    assert [(cell.method, cell.settings["learning_rate"]) for cell in grid.sweep] == [
        *(("p3o", rate) for rate in (1e-5, 1e-4)),
        *(("rloo", rate) for rate in (1e-5, 1e-4)),
    ]
    for cell in grid.sweep:
        assert cell.config.dataset_test_split == "test[:9]"
        assert (cell.config.beta, cell.config.seed, cell.config.max_steps) == (0.2, 1_000_003, 2)
        assert (cell.config.eval_generations, cell.config.eval_steps) == (5, 0)
    assert {(cell.config.eval_generations, cell.config.eval_steps) for cell in grid.cells} == {(1, 10)}
    assert {cell.config.dataset_test_split for cell in grid.cells} == {"test"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_vary_what_they_are_called_after(preset: str) -> None:
    grid = grid_of(config(preset=preset, seeds=[0], base={**BASE, "batch_size": 8}))
    varied = {
        "kl_coefficient": lambda c: c.beta,
        "clipping": lambda c: (c.p3o.clip, c.learning_rate),
        "clip_form": lambda c: c.p3o.clip,
        "kl_at": lambda c: c.p3o.kl_at,
        "num_generations": lambda c: (c.num_generations, c.batch_size),
        "reward_noise": lambda c: c.reward_noise,
    }[preset]
    expected: dict[str, list[Any]] = {
        "kl_coefficient": [0.02, 0.05, 0.1, 0.2],
        "clipping": [(clip, rate) for clip in ("joint", "none") for rate in (0.0167, 0.05, 0.15)],
        "clip_form": ["joint", "separate"],
        "kl_at": ["current", "sampling"],
        "num_generations": [(2, 16), (4, 8), (8, 4)],
        "reward_noise": [0.0, 0.5, 1.0],
    }
    assert [varied(cell.config) for cell in grid.cells] == expected[preset]


# ------------------------------------------------------------------------------------------------------ a finished grid


def test_cells_are_ordinary_runs_at_equal_budgets(finished: Path) -> None:
    found = tables(finished)
    assert [cell["name"] for cell in found["cells"]] == [path.name for path in cell_folders(finished)]
    for cell in found["cells"]:
        run = read_run(finished / "cells" / cell["name"])
        assert (cell["status"], cell["steps"], len(run.metrics), len(run.evaluations)) == ("done", 2, 2, 3)
        num_updates = 8
        assert cell["budget"]["completions"] == cell["budget"]["reward_calls"] == 48
        assert cell["budget"]["updates"] == num_updates
        assert cell["budget"]["tokens_generated"] == run.metrics[-1]["num_generated_tokens"]
        assert run.cell is not None
        assert run.cell["budget"] == cell["budget"]
        assert run.config["num_threads"] == 1
    assert found["notes"] == ["P3O joint, PPO: of 60 completions 2 steps of 24 take 48; 12 are left over."]


def test_held_out_prompts_and_random_numbers_are_the_same_for_all(finished: Path) -> None:
    """Before training all cells of a seed are one policy, so with common random numbers they write the same."""
    runs = read_runs([finished])
    for seed in (0, 1):
        first, second = ([s for s in run.samples if s["split"] == "eval"] for run in runs if run.seed == seed)
        assert [s for s in first if s["step"] == 0] == [s for s in second if s["step"] == 0]


def test_the_sweep_is_kept_and_its_choice_is_what_the_cells_run_with(finished: Path) -> None:
    sweep = tables(finished)["sweep"]
    assert len(sweep["runs"]) == 4
    for method, settings in sweep["chosen"].items():
        runs = [run for run in sweep["runs"] if run["method"] == method]
        best = max(runs, key=lambda run: run["reward"] - 0.05 * run["kl"])
        assert [run["chosen"] for run in runs] == [run is best for run in runs]
        assert settings == best["settings"]
        for cell in read_runs([finished]):
            if cell.cell is not None and cell.cell["method"] == method:
                assert cell.config["learning_rate"] == settings["learning_rate"]
    assert sweep["at_edge"] == ["P3O joint", "PPO"]


def test_the_tables_hold_the_truth_of_the_task(finished: Path) -> None:
    found = tables(finished)
    assert [arm["name"] for arm in found["arms"]] == ["P3O joint", "PPO"]
    exact = [(point["kl"], point["reward"]) for point in found["exact_frontier"]]
    assert exact == sorted(exact)
    for arm in found["arms"]:
        runs = [read_run(finished / "cells" / name) for name in arm["cells"]]
        assert arm["frontier"][-1]["kl"]["by_seed"] == [run.exact[-1]["kl"] for run in runs]
        assert all(gap > 0 for gap in arm["gap"]["by_seed"])
        assert [len(run.exact) for run in runs] == [3, 3]
        assert arm["frontier"][0]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
        # What was sampled agrees with it.
        for run in runs:
            for line, true in zip(run.evaluations, run.exact, strict=True):
                assert abs(line["kl"]["mean"] - true["kl"]) < 0.5
    (difference,) = found["differences"]
    assert (difference["first"], difference["second"], difference["by"]) == ("P3O joint", "PPO", "method")
    assert found["head_to_head"]["names"] == ["starting policy", "P3O joint", "PPO"]
    rates = found["head_to_head"]["rates"]
    assert rates[1][2]["mean"] + rates[2][1]["mean"] == 1


@pytest.mark.usefixtures("no_page")
def test_a_second_run_of_a_finished_comparison_changes_no_byte(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished cell was run again")

    # In a copy every path differs but those in the configuration, which name the folder that is asked for.
    compare(config(copied, **TWO))
    before = digests(copied)
    monkeypatch.setattr(compare_module, "_train", never)
    compare(config(copied, **TWO))
    assert digests(copied) == before
    # And tables made anew are the same.
    (copied / "comparison.json").unlink()
    compare(config(copied, **TWO))
    assert digests(copied) == before


def test_tables_are_added_up_on_one_thread_whatever_the_cells_had(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another number adds in another order: a resumed grid differed in the last digits of its tables."""
    threads: list[int] = []
    monkeypatch.setattr(comparison, "_tables", lambda *_: threads.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    comparison.tables(config(finished, **TWO), grid_of(config(finished, **TWO)), None)
    threads.append(torch.get_num_threads())
    torch.set_num_threads(1)
    assert threads == [1, 2]


@pytest.mark.usefixtures("no_page")
def test_another_configuration_is_refused_unless_it_adds_cells(copied: Path) -> None:
    before = digests(copied)

    def refused(told: str, **words: Any) -> None:
        with pytest.raises(PairtuneError, match=told):
            compare(config(copied, **{**TWO, **words}))
        assert digests(copied) == before

    refused("holds a comparison with the cell cells/p3o-joint_seed-1, which", seeds=[0])
    refused("beta of cells/p3o-joint_seed-0 was 0.05 in .* and is 0.7 now", base={**BASE, "beta": 0.7})
    refused("task was ", task={**SMALL["task"], "seed": 3})
    refused("sweep.rule was", sweep={**TWO["sweep"], "rule": "reward"})
    refused("P3O joint has chosen already", sweep={"axes": {"learning_rate": [0.02, 0.1, 0.3]}})
    kept = {name: digest for name, digest in before.items() if name.startswith(("cells/", "sweep/"))}
    compare(config(copied, **{**TWO, "seeds": [0, 1, 2], "keep_checkpoints": False}))
    after = digests(copied)
    assert {name: after[name] for name in kept} == kept
    assert tables(copied)["arms"][0]["seeds"] == [0, 1, 2]
    assert not (copied / "cells" / "ppo_seed-2" / "checkpoints").exists()
    assert "seeds:\n- 0\n- 1\n- 2\n" in (copied / "config.yaml").read_text()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PairtuneError, match="holds files but no comparison"):
        compare(config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.usefixtures("no_page")
def test_a_failed_cell_is_told_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compare_module._train
    broken = {"on": True}

    def train(its: Any, task: Any) -> bool:
        if broken["on"] and its.algorithm == "rloo":
            raise PairtuneError("the reward model is on strike;\ncall it back.")
        if broken["on"] and its.algorithm == "reinforce":
            raise ZeroDivisionError("by nothing")
        return real(its, task)

    monkeypatch.setattr(compare_module, "_train", train)
    path = tmp_path / "config.yaml"
    words = {"methods": ["rloo", "p3o", "reinforce"], "seeds": [0], "output_dir": str(tmp_path / "out")}
    path.write_text(config_to_yaml(config(**words)))
    assert main(["compare", "--config", str(path)]) == 2
    out, err = capsys.readouterr()
    assert "cell 1 of 3  rloo_seed-0  failed: the reward model is on strike; call it back." in out
    assert "failed: reinforce_seed-0: ZeroDivisionError: by nothing" in out
    assert "2 of 3 cells failed (rloo_seed-0, reinforce_seed-0)" in err
    found = tables(tmp_path / "out")
    assert [(cell["status"], cell["error"] is None) for cell in found["cells"]] == [
        ("failed", False),
        ("done", True),
        ("failed", False),
    ]
    assert [arm["name"] for arm in found["arms"]] == ["p3o"]
    assert "ZeroDivisionError" in (tmp_path / "out" / "cells" / "reinforce_seed-0" / "traceback.txt").read_text()
    # Mended, they are tried again, and only they.
    broken["on"] = False
    assert main(["compare", "--config", str(path)]) == 0
    assert "cell 3 of 3" in (out := capsys.readouterr().out)
    assert "1 of 3 cells are done already" in out
    assert {cell["status"] for cell in tables(tmp_path / "out")["cells"]} == {"done"}


@pytest.mark.usefixtures("no_page")
@pytest.mark.parametrize("end", [(None, 1.0), (0.5, math.nan)])
def test_a_run_of_the_sweep_that_measured_nothing_is_not_chosen(
    finished: Path, monkeypatch: pytest.MonkeyPatch, end: tuple[float | None, float]
) -> None:
    """A mean that is none stands as null in the lines of an evaluation."""
    settings = config(finished, **TWO)
    measured, ends = compare_module._end_of, {}

    def end_of(path: Path) -> Any:
        ends[path.name] = end if not ends else measured(path)
        return ends[path.name]

    monkeypatch.setattr(compare_module, "_end_of", end_of)
    found = compare_module.sweep_of(settings, grid_of(settings))
    assert found is not None
    assert found["runs"][0]["status"] == "done"
    assert [run["value"] is None for run in found["runs"]] == [True, False, False, False]
    assert [run["chosen"] for run in found["runs"][:2]] == [False, True]


def test_a_sweep_says_where_chance_may_have_chosen(tmp_path: Path) -> None:
    """Over the same prompts a constant gap is no chance, however far the prompts lie apart; one of both signs is."""
    words: dict[str, Any] = {**REAL, "task": {}, "budget": {}, "methods": ["p3o", "rloo"]}
    settings = config(tmp_path, **words, sweep={"axes": {"learning_rate": [1e-5, 1e-4]}, "split": "test[:9]"})
    grid = grid_of(settings)
    gaps = {"p3o": [0.5, 0.5, 0.5, 0.5], "rloo": [2.0, -1.0, 1.5, -1.5]}
    for cell in grid.sweep:
        is_better = cell.settings["learning_rate"] == 1e-4
        rewards = [10.0 * row + (gap if is_better else 0) for row, gap in enumerate(gaps[cell.method])]
        lines = [sample(5, row, reward) for row, reward in enumerate(rewards)]
        folder = write_run(Path(cell.config.output_dir), lines, {"status": "done", "error": None})
        ends = {"step": 5, "reward": {"mean": sum(rewards) / 4}, "kl": {"mean": 5.15}}
        (folder / "evaluations.jsonl").write_text(json.dumps(ends) + "\n")
    swept = compare_module.sweep_of(settings, grid)
    assert swept is not None
    assert [run["chosen"] for run in swept["runs"]] == [False, True, False, True]
    behind = [run["behind"] for run in swept["runs"]]
    assert behind[0] == {"mean": 0.5, "low": 0.5, "high": 0.5}
    assert behind[1] is None
    assert behind[2]["mean"] == 0.25
    assert behind[2]["low"] < 0 < behind[2]["high"]
    assert swept["undecided"] == ["rloo"]
    console = Console(file=io.StringIO(), width=200)
    console.print(comparison._sweep_table(swept))
    text = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "behind by 0.500 ±0.000" in text
    assert "of rloo the sweep cannot tell all runs from the best" in text


@pytest.mark.parametrize(
    ("tried", "chosen", "edge"),
    [
        ([0.1, 0.2, 1], 1, True),
        ([0.1, 0.2, 1], 0.2, False),
        ([0.1, 0.1], 0.1, False),
        ([0, None], 0, False),
        ([["q"], ["q", "v"]], ["q"], False),
        ([False, True], True, False),
        (["a", "b"], "a", False),
    ],
)
def test_only_numbers_have_an_edge(tried: list[Any], chosen: Any, edge: bool) -> None:
    """After the sweep had run, null and lists broke the comparison."""
    cells = [Cell("x", "p3o", {"word": value}, TrainConfig(model="m", dataset="d")) for value in tried]
    assert compare_module._is_at_edge("p3o", {"word": chosen}, Grid([], cells, [])) is edge


def recorded_cells(grid: Grid, rewards: dict[str, float | None]) -> None:
    """The folders of cells as if they had run: two evaluations of four prompts, a reward by method."""
    for cell in [*grid.cells, *grid.sweep]:
        its, folder = cell.config, Path(cell.config.output_dir)
        reward = rewards[cell.method]
        lines = [sample(step, row, reward and reward * (step + row)) for step in (0, 5) for row in range(4)]
        record = {"name": cell.name, "method": cell.method, "settings": cell.settings, "status": "done", "error": None}
        budget = dict.fromkeys(compare_module.BUDGET, 24)
        words = {key: getattr(its, key) for key in ("algorithm", "seed", "dataset", "reward_funcs", "learning_rate")}
        write_run(folder, lines, {**record, "steps": 5, "budget": budget}, **words)
        ends = {"reward": {"mean": reward}, "kl": {"mean": 5.0}, "distinct_2": {"mean": 0.5, "low": 0.4, "high": 0.6}}
        (folder / "evaluations.jsonl").write_text("".join(json.dumps({"step": s, **ends}) + "\n" for s in (0, 5)))


@pytest.fixture
def without_rewards(tmp_path: Path) -> CompareConfig:
    """Of three methods one whose rewards are null throughout; all have run."""
    words: dict[str, Any] = {**REAL, "task": {}, "budget": {}, "seeds": [0, 1], "methods": ["p3o", "rloo", "grpo"]}
    settings = config(tmp_path / "out", **words, held_out_reward_funcs=["g"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").write_text(config_to_yaml(settings))
    recorded_cells(grid_of(settings), {"p3o": 1.0, "rloo": None, "grpo": 2.0})
    return settings


class Scoring:
    """Stands in for all that `held_out` loads, and counts what is loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[str] = []
        self.prompts = [f"prompt {row}" for row in range(4)]
        for name in ("load_tokenizer", "load_held_out", "load_rewards"):
            monkeypatch.setattr(held_out, name, lambda *_, name=name, **__: self.loaded.append(name) or self)
        monkeypatch.setattr(held_out, "decode", lambda *_: [])

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: list[int]) -> Any:
        mask = torch.ones(len(rows), 1, dtype=torch.bool)
        return SimpleNamespace(ids=mask.long(), mask=mask)

    def score(self, batch: Any, completions: Any, *_: Any, **__: Any) -> Any:
        shape = completions.completion_mask.shape[:2]
        return SimpleNamespace(raw_rewards=torch.ones(shape), reward_mask=torch.ones(shape, dtype=torch.bool))


def test_an_arm_without_rewards_takes_no_table_from_the_others(
    without_rewards: CompareConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scoring = Scoring(monkeypatch)
    monkeypatch.setattr(compare_module, "_train", lambda *_: pytest.fail("a finished cell was run again"))
    path = compare(without_rewards)
    found = tables(path)
    note = "rloo: evaluations of rloo_seed-0, rloo_seed-1 have no reward, so the arm is left out where one is needed."
    assert found["notes"] == [note]
    ends = {arm["name"]: (arm["end"]["reward"]["mean"], arm["end"]["kl"]["mean"]) for arm in found["arms"]}
    assert ends == {"p3o": (6.5, 5.15), "rloo": (None, 5.15), "grpo": (13.0, 5.15)}
    (difference,) = found["differences"]
    assert "rloo" not in (difference["first"], difference["second"])
    assert [[arm["name"] for arm in line["arms"]] for line in found["matched"]] == [["p3o", "grpo"]]
    assert [line["name"] for line in found["head_to_head"]["ranking"]][:2] == ["grpo", "p3o"]
    assert "rloo" in {line["name"] for line in found["held_out"]["ranking"]}  # of what it wrote there are scores
    row = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["rloo"])
    assert row.split()[1] == "–"
    # All six runs have one model, one split and one set of functions.
    assert scoring.loaded == ["load_tokenizer", "load_held_out", "load_rewards"]
    before = digests(path)
    compare(without_rewards)
    assert digests(path) == before


def test_what_scores_is_loaded_anew_for_another_split(
    without_rewards: CompareConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scoring = Scoring(monkeypatch)
    loaded: held_out.Loaded = {}
    for number, run in enumerate(read_runs([Path(without_rewards.output_dir)])[:4]):
        run.config["dataset_test_split"] = "test" if number % 2 else "test[:4]"
        held_out.held_out_scores(run, ["g"], loaded=loaded)
    assert len(scoring.loaded) == 6


def test_a_cell_without_a_reward_is_shown_with_a_dash_and_a_sweep_of_such_chooses_nothing(
    tmp_path: Path,
) -> None:
    words: dict[str, Any] = {**REAL, "task": {}, "budget": {}, "methods": ["p3o", "rloo"]}
    sweep = {"axes": {"learning_rate": [1e-5, 1e-4]}, "split": "test[:9]"}
    settings = config(tmp_path / "out", **words, sweep=sweep)
    grid = grid_of(settings)
    recorded_cells(grid, {"p3o": 1.0, "rloo": None})
    console = Console(file=io.StringIO(), width=200)
    shown = compare_module._Shown(2, 0, "cell", console, 1)
    for cell in grid.cells:
        shown.begin(cell)
        shown.end(cell, {"status": "done"})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "rloo_seed-0  reward –, KL 5.00" in text
    assert "p3o_seed-0  reward 1.000, KL 5.00" in text
    swept = compare_module.sweep_of(settings, grid)
    assert swept is not None
    assert [run["value"] is None for run in swept["runs"]] == [False, False, True, True]
    assert swept["chosen"]["rloo"] is None
    compare_module._fail_unchosen(grid, swept)
    record = json.loads((Path(grid.cells[1].config.output_dir) / "cell.json").read_text())
    assert record["error"] == (
        "no run of the sweep of rloo measured what the rule goes by, so nothing was chosen for it"
    )


def test_the_truth_of_a_policy_that_broke_is_valid_json(tmp_path: Path) -> None:
    settings = config(tmp_path)
    task, model = compare_module.task_of(settings.task), compare_module.starting_policy(settings.task)
    words = {**BASE, "model": "m", "dataset": "d", "reward_funcs": ["f"], "output_dir": str(tmp_path)}
    reward = compare_module._exact_reward(task, model, TrainConfig(**words))
    for step, weight in enumerate((0.0, math.nan)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += weight
        state = SimpleNamespace(global_step=step)
        reward(prompts=[], completion_ids=[], trainer_state=state, evaluation=[])
    assert "NaN" not in (tmp_path / "exact.jsonl").read_text()
    first, last = read_jsonl(tmp_path / "exact.jsonl")
    assert first["kl"] == pytest.approx(0)
    assert (last["reward"], last["kl"], last["regret"]) == (None, None, None)


def test_where_no_run_of_a_sweep_finished_its_cells_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = compare_module._train

    def train(its: Any, task: Any) -> bool:
        if its.algorithm == "rloo":
            raise PairtuneError("no.")
        return real(its, task)

    monkeypatch.setattr(compare_module, "_train", train)
    sweep = {"axes": {"learning_rate": [0.1]}}
    with pytest.raises(PairtuneError, match="1 of 2 cells failed"):
        compare(config(tmp_path / "out", methods=["rloo", "p3o"], seeds=[0], sweep=sweep))
    found = tables(tmp_path / "out")
    assert found["cells"][0]["error"] == "no run of the sweep of rloo finished, so nothing was chosen for it"
    assert found["sweep"]["chosen"] == {"rloo": None, "p3o": {"learning_rate": 0.1}}


@pytest.mark.usefixtures("no_page")
def test_a_budget_of_tokens_is_reached_by_every_cell_in_its_last_step(tmp_path: Path) -> None:
    compare(config(tmp_path / "out", methods=["p3o", "reinforce"], seeds=[0], budget={"tokens": 130}))
    for lines in written(tmp_path / "out").values():
        assert lines[-2]["num_generated_tokens"] < 130 <= lines[-1]["num_generated_tokens"]


def arm_with(clip_ratios: list[float | None], **words: Any) -> Arm:
    settings = {"algorithm": "p3o", "p3o": {"clip": "joint"}, **words}
    run = Run(folder=Path("x"), name="x", config=settings, environment={}, cell=None)
    run.__dict__["metrics"] = [{"step": step, "clip_ratio": ratio} for step, ratio in enumerate(clip_ratios)]
    return Arm("p3o joint", "p3o joint", {}, [run])


def test_a_clip_that_never_or_always_worked_is_a_void_ablation(finished: Path) -> None:
    assert clip_of(arm_with([0.0, 0.0])) == {"lowest": 0.0, "highest": 0.0, "mean": 0.0, "void": True}
    assert clip_of(arm_with([1.0, 1.0]))["void"] is True  # type: ignore[index]
    assert clip_of(arm_with([0.0, 0.3]))["void"] is False  # type: ignore[index]
    assert clip_of(arm_with([0.0, 1.0]))["void"] is False  # type: ignore[index]
    assert clip_of(arm_with([0.5], p3o={"clip": "none"})) is None
    assert clip_of(arm_with([None, None])) is None
    content = tables(finished)
    content["arms"][0]["clip"] = clip_of(arm_with([0.0, 0.0]))
    console = Console(file=io.StringIO(), width=200)
    show(content, console)
    assert "void: clip_ratio of P3O joint was 0 in every step, so its clip was not tested" in console.file.getvalue()  # type: ignore[attr-defined]


def shown_on_a_console(content: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(content, console)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_console_says_what_its_intervals_are_over(finished: Path) -> None:
    content = tables(finished)
    both, alone = "prompts and training seeds together", "prompts alone (one seed)"
    text = "±: half a 95% interval over {}. KL in nats"
    assert text.format(f"training seeds, of the strength over {both}") in shown_on_a_console(content)
    content["task"] = None
    assert text.format(both) in shown_on_a_console(content)
    content["arms"][0]["seeds"] = [0]
    assert "together (a policy of one seed adds no spread between seeds). KL" in shown_on_a_console(content)
    content["arms"][1]["seeds"] = [0]
    assert text.format(alone) in shown_on_a_console(content)
    content["task"] = tables(finished)["task"]
    assert text.format(f"{alone}, of the strength alone") in shown_on_a_console(content)


def arms_of(folder: Path, **other: Any) -> list[Arm]:
    """Two arms of two seeds; the second has other words."""
    runs = [
        make_run(folder / f"{method}-{seed}", method, seed=seed, steps=(0, 4), completions_a_prompt=2, **words)
        for method, words in (("p3o", {}), ("ppo", other))
        for seed in (0, 1)
    ]
    return group_arms(read_runs(runs))


@pytest.mark.parametrize("other", [{"temperature": 0.7}, {"model": "bigger"}, {"top_p": 0.9}, {"dataset": "other"}])
def test_arms_that_start_apart_have_no_start_in_common(tmp_path: Path, other: dict[str, Any]) -> None:
    arms = arms_of(tmp_path, **other)
    assert comparison._best_of_n(arms) == []
    scored = {run.name: [float(line["row"]) for line in evaluation_samples(run)] for arm in arms for run in arm.runs}
    for scores in (None, scored):  # of the starting policy there is none
        found = comparison._head_to_head(arms, scores)
        assert found is not None
        assert found["names"] == [arm.name for arm in arms]
        assert found["length_controlled"] == []


@pytest.mark.parametrize("other", [{}, {"learning_rate": 1.0}, {"dataset": "pairs", "eval_dataset": "one"}])
def test_arms_that_start_alike_have_it_among_them(tmp_path: Path, other: dict[str, Any]) -> None:
    arms = arms_of(tmp_path, **other)
    if "eval_dataset" in other:
        for run in arms[0].runs:
            run.config["eval_dataset"] = "one"
    assert [point["n"] for point in comparison._best_of_n(arms)] == [1, 2, 4]
    found = comparison._head_to_head(arms, None)
    assert found is not None
    assert found["names"] == ["starting policy", *(arm.name for arm in arms)]
    assert [line["name"] for line in found["length_controlled"]] == [arm.name for arm in arms]


# ----------------------------------------------------------------------------------------------------- a real language

REWARDS = """
def length(completions, **_):
    return [len(text) / 8 for text in completions]

def vowels(prompts, completions, completion_ids, weight, **_):
    return [w * sum(c in "aeiou" for c in text) for w, text in zip(weight, completions)]
"""


@pytest.mark.usefixtures("no_page")
def test_stored_completions_are_scored_by_rewards_that_nobody_trained_on(
    tmp_path: Path, tiny_model_folder: str
) -> None:
    rows = [{"prompt": f"Say {n}", "weight": n, "split": "train" if n < 6 else "test"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    base = {
        **BASE,
        "model": tiny_model_folder,
        "dataset": str(tmp_path / "rows.jsonl"),
        "dataset_test_split": "test[2:]",
        "reward_funcs": [f"{tmp_path / 'rewards.py'}:length"],
        "chat": "never",
        "max_completion_length": 6,
        "eval_generations": 2,
    }
    words: dict[str, Any] = {"base": base, "task": {}, "methods": ["rloo"], "budget": {"completions": 24}}
    words |= {"held_out_reward_funcs": [f"{tmp_path / 'rewards.py'}:vowels"]}
    sweep = {"axes": {"learning_rate": [0.001, 0.01]}, "split": "test[:2]"}
    compare(config(tmp_path / "out", **words, sweep=sweep))
    found = tables(tmp_path / "out")
    run = read_runs([tmp_path / "out"])[1]
    assert {line["prompt"] for line in run.samples if line["split"] == "eval"} == {f"Say {n}" for n in range(8, 12)}
    (swept, _) = read_runs(sorted((tmp_path / "out" / "sweep").iterdir()))
    assert {line["prompt"] for line in swept.samples if line["split"] == "eval"} == {"Say 6", "Say 7"}
    last = [line for line in run.samples if line["step"] == 1 and line["split"] == "eval"]
    scores = json.loads((run.folder / "held_out.json").read_text())["scores"]["1"]
    assert scores == [int(s["prompt"][4:]) * sum(c in "aeiou" for c in s["completion"]) for s in last]
    assert found["held_out"]["names"] == ["starting policy", "rloo"]
    assert found["held_out"]["rates"] != found["head_to_head"]["rates"]
    before = digests(tmp_path / "out")
    compare(config(tmp_path / "out", **words, sweep=sweep))
    assert digests(tmp_path / "out") == before


@pytest.mark.usefixtures("no_page")
def test_methods_that_learn_from_a_dataset_stand_beside_those_that_sample(
    tmp_path: Path, tiny_model_folder: str
) -> None:
    def rows(name: str, what: list[dict[str, Any]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in what))
        return str(tmp_path / name)

    (tmp_path / "rewards.py").write_text(REWARDS)
    pairs = [{"prompt": f"Say {n}", "chosen": "aeiou", "rejected": "b"} for n in range(12)]
    scored = [{"prompt": f"Say {n}", "completions": ["aeiou", "b"], "rewards": [1.0, 0.0]} for n in range(12)]
    prompts = [{"prompt": f"Say {n}"} for n in range(12)]
    base = {
        **BASE,
        "model": tiny_model_folder,
        "dataset": rows("prompts.jsonl", prompts),
        "eval_dataset": rows("held_out.jsonl", [{"prompt": f"Tell {n}"} for n in range(5)]),
        "reward_funcs": [f"{tmp_path / 'rewards.py'}:length"],
        "chat": "never",
        "max_completion_length": 6,
    }
    offline: dict[str, Any] = {"dataset": rows("pairs.jsonl", pairs)}
    methods: dict[str, Any] = {
        "P3O": {"algorithm": "p3o"},
        "DPO": {"algorithm": "dpo", **offline},
        "CoPG": {"algorithm": "copg", "copg.offline": True, "dataset": rows("scored.jsonl", scored)},
    }
    compare(config(tmp_path / "out", base=base, task={}, methods=methods, budget={"completions": 48}))
    runs = read_runs([tmp_path / "out"])
    assert len(runs) == 6
    for run in runs:
        assert run.cell is not None
        budget = run.cell["budget"]
        assert run.cell["status"] == "done"
        assert budget["completions"] == 48
        assert budget["updates"] == (8 if run.cell["method"] == "P3O" else 2)
        assert (budget["tokens_generated"] == 0) == (run.cell["method"] != "P3O")
        held_out = {line["prompt"] for line in run.samples if line["split"] == "eval"}
        assert held_out == {f"Tell {n}" for n in range(5)}
    found = tables(tmp_path / "out")
    assert {(line["first"], line["second"]) for line in found["differences"] if line["by"] == "method"} == {
        ("P3O", "DPO"),
        ("P3O", "CoPG"),
        ("DPO", "CoPG"),
    }
    assert found["head_to_head"]["names"] == ["starting policy", "P3O", "DPO", "CoPG"]


# ---------------------------------------------------------------------------------------------- kills, signals, workers


def command(folder: Path, **words: Any) -> list[str]:
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**SMALL, "output_dir": str(folder), **words}))
    return [sys.executable, "-m", "pairtune", "compare", "--config", str(path)]


def start(*args: Any, **words: Any) -> subprocess.Popen[str]:
    # With Ctrl-C as at a terminal: where tests run in a shell's background, they and what they start ignore it.
    return subprocess.Popen(
        command(*args, **words),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


LONG: dict[str, Any] = {**TWO, "budget": {"completions": 144}, "axes": {"beta": [0.1, 0.5]}, "seeds": [0]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compare(config(tmp_path_factory.mktemp("undisturbed") / "out", **LONG))


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_killed_at_any_moment_and_resumed_a_grid_gives_the_same_tables(
    undisturbed: Path, tmp_path: Path, parallel: int
) -> None:
    """And side by side it gives what one after another does."""
    chance, folder = random.Random(parallel), tmp_path / "killed"
    for _ in range(3):
        process = start(folder, **LONG, parallel=parallel)
        while not (folder / "sweep").exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(chance.uniform(0.2, 4))
        process.kill()
        process.wait()
        time.sleep(0.5)  # a worker dies with the process that fed it
    assert subprocess.run(command(folder, **LONG, parallel=parallel), stdout=subprocess.DEVNULL).returncode == 0
    assert tables(folder) == tables(undisturbed)
    for name in ("metrics", "evaluations", "samples", "exact"):
        assert written(folder, name) == written(undisturbed, name)


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "sent"), [(1, signal.SIGTERM), (2, signal.SIGINT)])
def test_a_signal_stops_a_grid_and_it_says_how_to_go_on(tmp_path: Path, parallel: int, sent: signal.Signals) -> None:
    folder = tmp_path / "out"
    words = {**SMALL, "methods": ["p3o", "rloo"], "budget": {"completions": 24 * 200}, "parallel": parallel}
    process = start(folder, **words)
    metrics = folder / "cells" / "p3o_seed-0" / "metrics.jsonl"
    while not metrics.exists() or len(read_jsonl(metrics)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, sent)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped with 0 of 4 cells done; the same command goes on where it stopped" in out
    states = [json.loads(path.read_text())["status"] for path in sorted(folder.glob("cells/*/cell.json"))]
    assert states == ["stopped"] * parallel
    steps = len(read_jsonl(metrics))
    assert (folder / "cells" / "p3o_seed-0" / "checkpoints" / f"step-{steps}").exists()


@pytest.mark.slow
def test_a_worker_that_dies_fails_its_cell_alone(tmp_path: Path) -> None:
    words = {**SMALL, "methods": ["p3o", "rloo"], "budget": {"completions": 24 * 60}, "parallel": 2}
    folder = tmp_path / "out"
    process = start(folder, **words)
    metrics = folder / "cells" / "p3o_seed-0" / "metrics.jsonl"
    while not metrics.exists() or len(read_jsonl(metrics)) < 3:
        assert process.poll() is None
        time.sleep(0.05)
    lock = folder / "cells" / "p3o_seed-0" / ".pairtune-lock"
    os.kill(int(lock.read_text()), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "its process ended without a word (exit code -9)" in out
    states = {cell["name"]: cell["status"] for cell in tables(folder)["cells"]}
    assert states == {"p3o_seed-0": "failed", "p3o_seed-1": "done", "rloo_seed-0": "done", "rloo_seed-1": "done"}


# ----------------------------------------------------------------------------------------------- configurations we ship


@pytest.mark.parametrize("path", sorted((Path(__file__).parent.parent / "configs").glob("[ac][bo]*_*.yaml")), ids=str)
def test_shipped_configurations_are_whole(path: Path) -> None:
    assert grid_of(load_config(CompareConfig, path)).cells


def test_group_arms_names_what_tells_arms_apart(finished: Path) -> None:
    runs = read_runs([finished])
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in group_arms(runs)] == [
        ("P3O joint", [0, 1]),
        ("PPO", [0, 1]),
    ]


# ----------------------------------------------------------------------------------------------------------- the record


def recorded(comparison: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], str]:
    """What `benchmarks/comparisons.py --record-only` writes: the JSON and the text."""
    path = Path(__file__).parent.parent / "benchmarks" / "comparisons.py"
    spec = importlib.util.spec_from_file_location("comparisons", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    shutil.copy(comparison / "config.yaml", results / "two.yaml")
    flags = [str(results / "two.yaml"), "--record-only", "--output_dir", str(comparison), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["comparisons.py", *flags])
    bench.main()
    record, text = json.loads((results / "two.json").read_text()), (results / "two.md").read_text()
    assert bench.markdown(record, "two") == text
    return record, text


def test_a_record_says_what_the_comparison_says(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, text = recorded(finished, tmp_path, monkeypatch)
    content = tables(finished)
    assert record["num_done"] == record["num_cells"] == 4
    assert "not complete" not in text
    for arm, whole in zip(record["arms"], content["arms"], strict=True):
        reward = [whole["end"]["reward"][k] for k in ("mean", "low", "high")]
        assert arm["end"]["reward"] == pytest.approx(reward, rel=1e-4)
        assert f"| {arm['name']} | 2 | {whole['end']['reward']['mean']:.3f} [" in text
    chosen = {run["method"]: run["settings"] for run in content["sweep"]["runs"] if run["chosen"]}
    for method, settings in chosen.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {method} | ") and "0.02: " in line)
        assert f"| {settings['learning_rate']:g}" in line
    names, rates = content["head_to_head"]["names"], content["head_to_head"]["rates"]
    row = rates[names.index("PPO")]
    wins = next(line for line in text.partition("## Who wins")[2].splitlines() if line.startswith("| PPO | "))
    for name, cell in zip(names, wins.split(" | ")[1:], strict=True):
        assert cell.startswith("-" if name == "PPO" else f"{row[names.index(name)]['mean']:.2f} [")
    spent = next(line for line in text.partition("## What a run has spent")[2].splitlines() if "| PPO | " in line)
    assert spent.startswith("| PPO | 48 | ")
    assert (tmp_path / "two.svg").read_text().lstrip().startswith("<?xml")


def test_a_comparison_that_is_not_complete_is_recorded_as_such(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copied / "comparison.json").unlink()
    shutil.rmtree(copied / "cells" / "ppo_seed-1")
    results = tmp_path / "results"
    results.mkdir()
    record, text = recorded(copied, results, monkeypatch)
    assert (record["num_done"], record["num_cells"]) == (3, 4)
    assert "3 of 4 runs are finished, 0 failed." in text
    assert "The comparison is not complete" in text
    assert [len(arm["seeds"]) for arm in record["arms"]] == [2, 1]
