"""Reading run folders together: what is a run, what is an arm, what its evaluations measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pairtune import PairtuneError
from pairtune.config import TrainConfig, config_to_dict
from pairtune.evidence import held_out
from pairtune.evidence.comparison_frontier import compare_arms, frontier_blocks
from pairtune.evidence.comparison_page import comparison_page
from pairtune.evidence.comparison_wins import head_to_head_blocks
from pairtune.evidence.figures import Chart
from pairtune.evidence.page import Choice, render
from pairtune.evidence.runs import (
    evaluated,
    evaluated_together,
    evaluation_samples,
    group_arms,
    read_run,
    read_runs,
    shared_prompts,
)

Sample = dict[str, Any]


def sample(step: int, row: int, reward: float | None, *, index: int = 0, length: int = 3, **words: Any) -> Sample:
    line = {"step": step, "split": "eval", "row": row, "prompt": f"prompt {row}", "completion_index": index}
    line |= {"completion": "x", "completion_ids": [5] * length, "reward": reward, "truncated": length > 3}
    return {**line, "kl": step + row / 10, "kl_k1": step + row / 10 + 0.01, **words}


def write_run(
    folder: Path, samples: list[Sample] | None = None, cell: dict[str, Any] | None = None, **words: Any
) -> Path:
    """A run folder with the configuration `words` and two evaluations of three prompts, unless `samples` are given."""
    folder.mkdir(parents=True)
    config = TrainConfig(**{"model": "m", "dataset": "d", "output_dir": str(folder), **words})
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
    if samples is None:
        samples = [sample(step, row, 100 * config.seed + 10 * step + row) for step in (0, 5) for row in range(3)]
    steps = dict.fromkeys(line["step"] for line in samples)
    for name, lines in (("samples", samples), ("evaluations", [{"step": step} for step in steps])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if cell is not None:
        (folder / "cell.json").write_text(json.dumps(cell))
    return folder


# -------------------------------------------------------------------------------------------------------------- reading


def test_a_comparison_stands_for_its_cells_and_each_path_counts_once(tmp_path: Path) -> None:
    lone = write_run(tmp_path / "lone")
    for name in ("b", "a", "c"):
        write_run(tmp_path / "cmp" / "cells" / name, cell={"name": name, "status": "done"})
    (tmp_path / "cmp" / "cells" / "waiting").mkdir()
    found = read_runs([lone, tmp_path / "cmp", tmp_path / "cmp" / "cells" / ".." / "cells" / "a", lone])
    assert [run.name for run in found] == ["lone", "a", "b", "c"]
    # comparison.json tells the order of the grid.
    (tmp_path / "cmp" / "comparison.json").write_text(json.dumps({"cells": [{"name": n} for n in "bca"]}))
    assert [run.name for run in read_runs([tmp_path / "cmp"])] == ["b", "c", "a"]


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path / "nowhere", "there is no run folder"),
        (lambda path: path, "is no run folder: it has no config.yaml"),
        (lambda path: (path / "cells").mkdir() or path, "has no cell yet"),
    ],
)
def test_what_holds_no_run_is_refused(tmp_path: Path, make: Any, told: str) -> None:
    with pytest.raises(PairtuneError, match=told):
        read_runs([make(tmp_path)])


def test_nothing_named_is_refused() -> None:
    with pytest.raises(PairtuneError, match="no run folder was named"):
        read_runs([])


def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "cell.json").write_text("{")
    with pytest.raises(PairtuneError, match=r"cell\.json is damaged"):
        read_run(folder)


# ----------------------------------------------------------------------------------------------------------------- arms


def test_runs_alike_but_for_seed_and_what_changes_nothing_are_one_arm(tmp_path: Path) -> None:
    write_run(tmp_path / "1", seed=1)
    write_run(tmp_path / "0", save_steps=7, num_threads=2, micro_batch_size=2, eval_steps=3, resume=True)
    write_run(tmp_path / "2", seed=2, algorithm="p3o", **{"ppo.gamma": 0.5})  # a section that p3o does not read
    (arm,) = group_arms(read_runs([tmp_path / name for name in "102"]))
    assert (arm.name, arm.method, arm.settings) == ("p3o joint", "p3o joint", {})
    assert [run.name for run in arm.runs] == ["0", "1", "2"]


def test_arms_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [
        {"beta": 0.1},
        {"beta": 0.2},
        {"beta": 0.1, "p3o.clip": "separate"},
        {"p3o.clip": "none", "beta": 0.1},
        {"algorithm": "rloo", "beta": 0.1, "num_generations": 2},
        {"algorithm": "rloo", "beta": 0.1, "num_generations": 4, "batch_size": 32},
        {"algorithm": "rloo", "beta": 0.1, "rloo.clip": True},
        {"algorithm": "ppo", "beta": 0.1, "batch_size": 16},
        {"algorithm": "ppo", "beta": 0.1, "batch_size": 32},
    ]
    for number, words in enumerate(settings):
        write_run(tmp_path / str(number), **words)
    arms = group_arms(read_runs([tmp_path / str(number) for number in range(len(settings))]))
    assert [arm.name for arm in arms] == [
        "p3o joint, beta 0.1",
        "p3o joint, beta 0.2",
        "p3o separate",
        "p3o unclipped",
        "rloo, num_generations 2",  # the batch follows from K, so K alone is named
        "rloo, num_generations 4",
        "rloo clipped",
        "ppo, batch_size 16",
        "ppo, batch_size 32",
    ]
    assert arms[1].settings["beta"] == 0.2
    assert "p3o.clip" not in arms[-1].settings
    assert "rloo.clip" not in arms[0].settings
    assert "learning_rate" not in arms[0].settings


def test_a_cell_is_called_what_its_comparison_calls_it_and_counts_when_it_is_done(tmp_path: Path) -> None:
    write_run(tmp_path / "a", cell={"method": "ours", "status": "done"})
    write_run(tmp_path / "b", cell={"method": "theirs", "status": "done"})
    write_run(tmp_path / "c", cell={"method": "late", "status": "running"})
    write_run(tmp_path / "d", cell={"method": "broken", "status": "failed"})
    arms = group_arms(read_runs([tmp_path / name for name in "abcd"]))
    assert [arm.name for arm in arms] == ["ours", "theirs"]


def test_what_a_grid_varies_tells_arms_apart_whatever_it_changes(tmp_path: Path) -> None:
    """After the whole grid had run, two of its cells were taken for one run twice."""
    sizes: list[dict[str, Any]] = [{"micro_batch_size": 2}, {"micro_batch_size": 4}, {}]
    for number, settings in enumerate(sizes):
        for seed in (0, 1):
            cell = {"method": "p3o", "status": "done", "settings": settings}
            write_run(tmp_path / f"{number}{seed}", cell=cell, seed=seed, **settings, save_steps=number + 1)
    arms = group_arms(read_runs(sorted(tmp_path.iterdir())))
    assert [arm.name for arm in arms] == [f"p3o, micro_batch_size {size}" for size in ("2", "4", "null")]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 1]] * 3


def test_one_seed_twice_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    with pytest.raises(PairtuneError, match=r"a and .*b are runs of one setting and one seed, 0"):
        group_arms(read_runs([tmp_path / "a", tmp_path / "b"]))


# ---------------------------------------------------------------------------------------------------------- evaluations


def test_an_arm_holds_means_over_completions_by_seed_evaluation_and_prompt(tmp_path: Path) -> None:
    write_run(
        tmp_path / "0",
        [
            *(sample(0, row, 1.0, index=i, length=2 + i) for row in (0, 1) for i in (0, 1)),
            sample(5, 1, 2.0),
            sample(5, 1, None, index=1, length=9),  # no reward: it counts in KL and length alone
            sample(5, 0, 7.0),
            sample(5, 0, 9.0, index=1),
            {**sample(5, 0, 99.0), "split": "train"},
        ],
    )
    (arm,) = group_arms([read_run(tmp_path / "0")])
    found = evaluated(arm)
    assert found.steps.tolist() == [0, 5]
    assert found.reward.tolist() == [[[1.0, 1.0], [8.0, 2.0]]]
    assert found.length.tolist() == [[[2.5, 2.5], [3.0, 6.0]]]
    assert found.truncated is not None
    assert found.truncated.tolist() == [[[0.0, 0.0], [0.0, 0.5]]]
    torch.testing.assert_close(found.kl, torch.tensor([[[0.0, 0.1], [5.0, 5.1]]], dtype=torch.float64))
    torch.testing.assert_close(found.kl_k1 - found.kl, torch.full_like(found.kl, 0.01))


def test_only_shared_steps_and_prompts_count(tmp_path: Path) -> None:
    write_run(tmp_path / "0", [sample(step, row, row) for step in (0, 5, 8) for row in (0, 1, 2)])
    write_run(tmp_path / "1", [sample(step, row, 10 + row) for step in (0, 8) for row in (2, 1, 3)], seed=1)
    other = [*(sample(0, row, 1.0) for row in (1, 2)), sample(8, 2, None), sample(8, 1, 3.0)]
    write_run(tmp_path / "2", other, algorithm="rloo")
    arms = group_arms(read_runs([tmp_path / name for name in "012"]))
    assert evaluated(arms[0]).steps.tolist() == [0, 8]
    assert evaluated(arms[0]).reward[:, 0].tolist() == [[1.0, 2.0], [11.0, 12.0]]
    # Together only row 1: of row 2 the other arm has no reward at its end.
    assert [prompt[0] for prompt in shared_prompts(arms)] == [1]
    first, second = evaluated_together(arms)
    assert first.reward.tolist() == [[[1.0], [1.0]], [[11.0], [11.0]]]
    assert second.reward.tolist() == [[[1.0], [3.0]]]


def test_seeds_that_end_at_different_steps_end_at_one_place(tmp_path: Path) -> None:
    """A budget of tokens: the end is the last evaluation of each seed, not the last step that all of them have."""
    for seed, steps in enumerate([(0, 5, 10, 12), (0, 5, 10), (0, 5, 7, 10, 14)]):
        folder = write_run(tmp_path / str(seed), [sample(s, row, s + row) for s in steps for row in (0, 1)], seed=seed)
        keys = {"length": 2.0, "truncated": 0.0}
        truth = [{"step": step, "reward": 2.0 * step, "kl": step, "regret": 0.1, **keys} for step in steps]
        (folder / "exact.jsonl").write_text("".join(json.dumps(line) + "\n" for line in truth))
    (arm,) = group_arms(read_runs([tmp_path / name for name in "012"]))
    sampled, exact = evaluated(arm, shared_prompts([arm])), evaluated(arm)
    # Seed 1 ends at step 10, so that this is no step between for the others; 7 and 12 are those of one seed alone.
    assert sampled.steps.tolist() == exact.steps.tolist() == [0, 5, 14]
    assert sampled.reward[..., 0].tolist() == [[0.0, 5.0, 12.0], [0.0, 5.0, 10.0], [0.0, 5.0, 14.0]]
    assert exact.kl[..., 0].tolist() == [[0.0, 5.0, 12.0], [0.0, 5.0, 10.0], [0.0, 5.0, 14.0]]
    # All that is shown of the end is of these evaluations, and named as them.
    compared = compare_arms([arm], {})
    (choice, *_) = frontier_blocks(compared)
    assert isinstance(choice, Choice)
    ((mean, *others), *_) = [chart.series for chart in choice.figures if isinstance(chart, Chart)]
    assert [point.text for point in mean.points] == [
        "step 0, mean of seeds 0, 1, 2",
        "step 5, mean of seeds 0, 1, 2",
        "the end (steps 10 to 14), mean of seeds 0, 1, 2",
    ]
    seeds = [one.points[-1].text for one in others if one.faint]
    assert seeds == ["step 12, seed 0 alone", "step 10, seed 1 alone", "step 14, seed 2 alone"]
    assert [evaluation_samples(run)[0]["step"] for run in arm.runs] == [12, 10, 14]


def test_an_end_without_rewards_is_no_earlier_end(tmp_path: Path) -> None:
    """It stands as NaN, and takes no prompt away from the others."""
    write_run(tmp_path / "0", [sample(step, row, None if step else 1.0) for step in (0, 5) for row in (0, 1)])
    write_run(tmp_path / "1", [sample(step, row, 1.0) for step in (0, 5) for row in (0, 1)], algorithm="rloo")
    arms = group_arms(read_runs([tmp_path / "0", tmp_path / "1"]))
    mute, other = evaluated_together(arms)
    assert mute.reward[0, 0].tolist() == [1.0, 1.0]
    assert mute.reward[0, 1].isnan().all()
    assert mute.kl[0].tolist() == other.kl[0].tolist() == [[0.0, 0.1], [5.0, 5.1]]
    assert (mute.has_rewards, other.has_rewards) == (False, True)


def test_a_page_shows_what_there_is_without_rewards(tmp_path: Path) -> None:
    samples = {"0": None, "1": 1.0, "2": 2.0}
    for name, reward in samples.items():
        lines = [sample(step, row, reward and reward * step + row) for step in (0, 5, 9) for row in (0, 1)]
        write_run(tmp_path / name, lines, beta=0.1 + int(name))
    runs = read_runs([tmp_path / name for name in samples])
    page = comparison_page(runs, [run.folder for run in runs])
    assert page.verdict.startswith("At matched KL, p3o joint, beta 1.1 has ")
    assert {"Matched KL", "Head to head", "Numbers", "What a setting does"} <= {
        word for section in page.sections for word in (section.link, section.title)
    }
    render(page)
    # Nor does it break where nobody has any.
    page = comparison_page(runs[:1], [runs[0].folder])
    blocks = head_to_head_blocks(compare_arms(group_arms(runs[:1]), {}))
    assert "No completion has a reward" in str(blocks[0])
    render(page)


def test_rows_of_two_data_sets_are_never_taken_for_one(tmp_path: Path) -> None:
    write_run(tmp_path / "0", [sample(0, 0, 1.0), sample(0, 1, 1.0)])
    write_run(tmp_path / "1", [sample(0, 0, 1.0, prompt="another"), sample(0, 1, 1.0)], seed=1)
    (arm,) = group_arms(read_runs([tmp_path / "0", tmp_path / "1"]))
    assert evaluated(arm).num_prompts == 1


def test_what_cannot_be_measured_together_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "0", [sample(0, 0, 1.0)])
    write_run(tmp_path / "1", [sample(0, 1, 1.0)], seed=1)
    (arm,) = group_arms(read_runs([tmp_path / "0", tmp_path / "1"]))
    with pytest.raises(PairtuneError, match="share no held-out prompt"):
        evaluated(arm)
    old = {key: value for key, value in sample(0, 0, 1.0).items() if key != "kl"}
    write_run(tmp_path / "old", [old], seed=2)
    (arm,) = group_arms([read_run(tmp_path / "old")])
    with pytest.raises(PairtuneError, match="has no KL of each completion"):
        evaluated(arm)


def test_the_truth_of_a_task_stands_in_for_what_was_sampled(tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = write_run(tmp_path / str(seed), seed=seed)
        lines = [
            {"step": step, "reward": step + seed, "kl": 0.5 * step, "regret": 0.1, "length": 2.5, "truncated": 0.25}
            for step in (0, 5)
        ]
        (folder / "exact.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (arm,) = group_arms(read_runs([tmp_path / "0", tmp_path / "1"]))
    (found,) = evaluated_together([arm])
    assert found.reward.tolist() == [[[0.0], [5.0]], [[1.0], [6.0]]]
    assert found.kl.tolist() == found.kl_k1.tolist() == [[[0.0], [2.5]]] * 2
    assert (found.length.unique().tolist(), found.num_prompts) == ([2.5], 1)
    # As sampled, where prompts are asked for.
    assert evaluated(arm, shared_prompts([arm])).num_prompts == 3


def test_a_truth_that_is_no_number_is_read_as_none(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "0")
    line = {"step": 0, "reward": None, "kl": None, "regret": None, "length": 2.0, "truncated": 0.0}
    (folder / "exact.jsonl").write_text(json.dumps(line) + "\n")
    (found,) = evaluated_together(group_arms(read_runs([tmp_path / "0"])))
    assert found.reward.isnan().all()
    assert found.kl.isnan().all()
    assert found.length.tolist() == [[[2.0]]]


def test_a_score_that_is_no_number_is_kept_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "0"))
    monkeypatch.setattr(held_out, "_scored", lambda *_: [math.inf, None, 1.0])
    assert held_out.held_out_scores(run, ["f"]) == [None, None, 1.0]
    assert "Infinity" not in (run.folder / held_out.HELD_OUT).read_text()


def test_samples_of_the_last_evaluation(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "0"))
    assert {line["step"] for line in evaluation_samples(run)} == {5}
    assert {line["step"] for line in evaluation_samples(run, 0)} == {0}
