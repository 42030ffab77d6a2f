"""benchmarks/reward_equivalence.py: who sees a shift of the reward per prompt, bit by bit, and its record."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim import optimizer

from pairtune.evidence.exact import sequence_logprobs, tabular_model

PATH = Path(__file__).parent.parent / "benchmarks" / "reward_equivalence.py"
RECORD = PATH.parent / "results" / "reward_equivalence.json"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reward_equivalence", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["reward_equivalence"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def both(bench: ModuleType, words: dict[str, Any], size: float, steps: int, kind: str) -> list[torch.Tensor]:
    """The weights along training on r and on r + delta(x)."""
    task = bench.make_task(0)
    tasks = task, bench.shifted(task, bench.draw_delta(0, size))
    return [bench.run(words, task, seed=0, steps=steps, kind=kind) for task in tasks]


# The shifts


@pytest.mark.parametrize("seed", range(5))
def test_shifts_lie_on_the_grid_and_differ_between_prompts(bench, seed):
    one = bench.draw_delta(seed, 1)
    assert one.shape == (4,)
    assert one.unique().numel() == 4
    assert one.abs().max() == 1
    assert torch.equal(one * 64, (one * 64).round())
    task = bench.make_task(seed)
    for size in bench.SIZES:
        assert torch.equal(bench.draw_delta(seed, size), size * one)
        rewards = bench.shifted(task, size * one).rewards
        assert torch.equal(rewards.float().double(), rewards)  # exact in float32
        assert torch.equal(rewards - task.rewards, (size * one)[:, None].expand_as(rewards))
    assert not torch.equal(bench.draw_delta(seed, 1), bench.draw_delta(seed + 1, 1))
    off_grid = bench.shifted(task, bench.draw_delta(seed, 1 / 3)).rewards
    assert not torch.equal(off_grid.float().double(), off_grid)


# Theorem 2


def test_every_online_method_is_in_one_of_the_two_lists(bench):
    from pairtune.config import METHODS

    online = {name for name, method in METHODS.items() if not method.offline}
    invariant, others = ({words["algorithm"] for words in group.values()} for group in (bench.INVARIANT, bench.OTHERS))
    assert invariant | others == online
    assert invariant & others == {"p3o"}  # with a running scale


INVARIANT = (
    "P3O, joint clip",
    "P3O, separate clip",
    "P3O, four completions",
    "RLOO",
    "RLOO, four completions",
    "CoPG",
    "REBEL",
    "online DPO",
    "online IPO",
    "RAFT, four completions",
    "GRPO, four completions",
)
OTHERS = ("PPO", "PPO, no whitening", "VPG", "REINFORCE, moving average", "REINFORCE, no baseline")


@pytest.mark.parametrize("name", INVARIANT)
def test_to_these_the_two_rewards_are_one(bench, name):
    plain, shifted = both(bench, bench.INVARIANT[name], 64, 2, "tabular")
    assert len(plain) == 5  # four updates
    assert bench.same_bits(plain, shifted)
    assert all(not torch.equal(before, after) for before, after in itertools.pairwise(plain))


@pytest.mark.parametrize("name", OTHERS)
def test_these_see_another_reward_from_the_first_update_on(bench, name):
    plain, shifted = both(bench, bench.OTHERS[name], 1, 1, "tabular")
    assert bench.same_bits(plain[0], shifted[0])
    assert (plain[1] - shifted[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["P3O, joint clip", "online DPO"])
def test_the_transformer_does_not_see_it_either(bench, name):
    plain, shifted = both(bench, bench.INVARIANT[name], 8, 1, "transformer")
    assert bench.same_bits(plain, shifted)
    assert not torch.equal(plain[0], plain[-1])


def test_running_scales_end_the_invariance(bench):
    plain, shifted = both(bench, bench.OTHERS["P3O, running scale"], 8, 1, "tabular")
    # Adam divides the scale out of the first update, rounding and epsilon aside.
    assert 0 < (plain[1] - shifted[1]).abs().max() < 1e-3
    assert (plain[2] - shifted[2]).abs().max() > 1e-3


def test_off_the_grid_only_rounding_is_left(bench):
    plain, shifted = both(bench, bench.INVARIANT["P3O, joint clip"], 64 / 3, 1, "tabular")
    assert 0 < (plain - shifted).abs().max() < 1e-4


# The run and the distances


def test_a_run_is_silent_and_leaves_nothing_behind(bench, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench.tempfile, "tempdir", str(tmp_path))
    hooks = dict(optimizer._global_optimizer_post_hooks)
    task = bench.make_task(1)
    weights = bench.run({"algorithm": "ppo"}, task, seed=1, steps=1, kind="tabular")
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []
    assert dict(optimizer._global_optimizer_post_hooks) == hooks
    start = torch.cat([p.detach().flatten() for p in tabular_model(task, seed=1).parameters()])
    assert (weights.shape, weights.dtype) == ((3, len(start)), torch.float32)  # the value head is no part of the policy
    assert torch.equal(weights[0], start)


def test_a_signal_ends_the_whole_benchmark(bench, monkeypatch):
    monkeypatch.setattr(bench, "train", lambda *_, **__: SimpleNamespace(finished=False))
    with pytest.raises(KeyboardInterrupt):
        bench.run({"algorithm": "p3o"}, bench.make_task(0), seed=0, steps=1, kind="tabular")


@torch.no_grad()
def test_distances_are_those_of_the_policies(bench):
    task = bench.make_task(0)
    model = tabular_model(task, seed=0)
    parameters = list(model.parameters())
    start = torch.cat([p.flatten() for p in parameters])
    before = sequence_logprobs(model, task)
    model.model.table.weight[3, 1] += 0.5
    moved = torch.cat([p.flatten() for p in parameters])
    gap = (sequence_logprobs(model, task) - before).abs().max().item()
    found = bench.distances(torch.stack([start, start, moved]), torch.stack([start, moved, start]), task, "tabular")
    assert found == {"logprob": [0, pytest.approx(gap), pytest.approx(gap)], "weight": [0, 0.5, 0.5]}
    assert gap > 0.1


def test_zero_and_minus_zero_are_other_bits(bench):
    assert not bench.same_bits(torch.zeros(1), -torch.zeros(1))
    assert bench.same_bits(torch.zeros(1), torch.zeros(1))


# The record


def test_the_record_is_what_the_json_says(bench, record, tmp_path):
    assert record["command"] == "python benchmarks/reward_equivalence.py"
    assert bench.surprises(record) == []
    assert {*record["distances"]} == {"transformer", "tabular"}
    for methods in record["distances"].values():
        for name in INVARIANT:
            runs = [run for found in methods[name].values() for quantity in found.values() for run in quantity]
            assert len(runs) == 2 * len(bench.SIZES) * len(record["seeds"])
            assert {value for run in runs for value in run} == {0}
            assert {len(run) for run in runs} == {2 * record["steps"] + 1}
        for name in OTHERS:
            assert min(run[1] for found in methods[name].values() for run in found["logprob"]) > 1e-3
    assert RECORD.with_suffix(".md").read_text() == bench.as_markdown(record)
    matplotlib = pytest.importorskip("matplotlib")
    for name in ("first.svg", "second.svg"):
        bench.draw(record, tmp_path / name)
    drawn = (tmp_path / "first.svg").read_bytes()
    assert drawn == (tmp_path / "second.svg").read_bytes()
    if matplotlib.__version__ == record["environment"]["matplotlib"]:  # others draw the same, in other bytes
        assert drawn == RECORD.with_suffix(".svg").read_bytes()


@pytest.mark.parametrize("name", ["PPO", "REINFORCE, moving average"])
def test_the_first_figures_of_the_record_come_out_again(bench, record, name):
    plain, shifted = both(bench, bench.OTHERS[name], 8, 1, "tabular")
    found = bench.distances(plain, shifted, bench.make_task(0), "tabular")
    for quantity, values in found.items():
        assert values[:2] == pytest.approx(record["distances"]["tabular"][name]["8"][quantity][0][:2], rel=0.01)


def test_what_is_not_as_expected_is_named(bench, record):
    changed = copy.deepcopy(record)
    changed["distances"]["tabular"]["RLOO"]["8"]["weight"][1][-1] = 1e-9
    changed["distances"]["transformer"]["VPG"]["64"]["logprob"][0][1] = 0.0
    assert bench.surprises(changed) == ["VPG at 64 (transformer, logprob)", "RLOO at 8 (tabular, weight)"]
    assert "Not so: VPG at 64 (transformer, logprob), RLOO at 8" in bench.as_markdown(changed)
    assert "It is so in every run." in bench.as_markdown(record)


def test_a_row_a_size_unless_all_is_zero(bench):
    zero, moved = [[0.0, 0.0, 0.0]], [[0.0, 0.25, 0.5], [0.0, 0.75, 1.5], [0.0, 0.3, 0.6]]
    nothing = {size: {"logprob": zero, "weight": zero} for size in ("1", "8")}
    assert bench.rows("RLOO", nothing) == ["| RLOO | 1, 8 | exactly 0 | exactly 0 | exactly 0 |"]
    something = {"1": nothing["1"], "8": {"logprob": moved, "weight": moved}}
    assert bench.rows("PPO", something) == [
        "| PPO | 1 | exactly 0 | exactly 0 | exactly 0 |",
        "| PPO | 8 | 0.3 (0.25 to 0.75) | 0.6 (0.5 to 1.5) | 0.6 (0.5 to 1.5) |",
    ]


def test_the_command_writes_its_files(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "INVARIANT", {"P3O, joint clip": bench.INVARIANT["P3O, joint clip"]})
    monkeypatch.setattr(bench, "OTHERS", {"VPG": bench.OTHERS["VPG"]})
    monkeypatch.setattr(bench, "SIZES", (1, 8))
    folder = tmp_path / "new"
    bench.main(["--seeds", "3", "--steps", "1", "--models", "tabular", "--output", str(folder)])
    assert sorted(path.name for path in folder.iterdir()) == [
        f"reward_equivalence.{kind}" for kind in ("json", "md", "svg")
    ]
    written = json.loads((folder / "reward_equivalence.json").read_text())
    assert written["command"].endswith("--seeds 3 --steps 1 --models tabular --output ...")
    assert str(tmp_path) not in json.dumps(written)
    assert list(written["distances"]["tabular"]) == ["P3O, joint clip", "VPG", bench.OFF_GRID]
    assert bench.surprises(written) == []
    text = (folder / "reward_equivalence.md").read_text()
    assert text == bench.as_markdown(written)
    assert text in capsys.readouterr().out
    assert "exactly 0" in (folder / "reward_equivalence.svg").read_text()


@pytest.mark.parametrize("argument", [["--steps", "0"], ["--models", "large"], ["--seeds", "-1"], ["--seeds"]])
def test_arguments_that_make_no_sense_are_refused(bench, argument, capsys):
    with pytest.raises(SystemExit):
        bench.main(argument)
    assert argument[0] in capsys.readouterr().err
