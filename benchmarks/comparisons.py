"""Runs a comparison and records what it says in a form small enough to be kept.

    python benchmarks/comparisons.py configs/compare_enumerable.yaml --parallel 2
    python benchmarks/comparisons.py configs/compare_enumerable.yaml --record-only    # what is finished so far

Cells that are finished are not run again, so that a long comparison can be made in several sittings. Written are
NAME.json (the tables of comparison.json without single seeds, of many policies without the win matrix and without
differences within a method, five digits), NAME.md (made from that alone) and NAME.svg (the frontier of the report).
NAME is that of the configuration.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from pairtune.config import CompareConfig, load_config
from pairtune.errors import PairtuneError
from pairtune.evidence.compare import compare, sweep_of
from pairtune.evidence.comparison import behind_by, sweep_notes, tables
from pairtune.evidence.comparison_page import BUDGET
from pairtune.evidence.figures import save_figures
from pairtune.evidence.grid import grid_of
from pairtune.evidence.report import make_page
from pairtune.evidence.runs import COMPARISON, read_json, read_runs
from pairtune.runs.folder import environment, write_atomic

RESULTS = Path(__file__).parent / "results"
MOST_IN_FULL = 12
"""Policies whose win matrix is kept, and what a setting makes of one method."""
VERDICTS = {"reward_at_kl": "reward at equal KL", "kl_at_reward": "KL at equal reward", "area": "area"}


# ----------------------------------------------------------------------------------------------------------- the record


def recorded(config: CompareConfig) -> dict[str, Any]:
    """What is kept of a comparison, finished or not."""
    grid = grid_of(config)
    content = read_json(Path(config.output_dir) / COMPARISON)
    if content is None or len(content["cells"]) != len(grid.cells):
        content = tables(config, grid, sweep_of(config, grid))
    runs = [run for run in read_runs([config.output_dir]) if run.finished]
    where = Counter(
        tuple(str(run.environment.get(name)) for name in ("pairtune", "commit", "torch", "cpu", "cpu_count", "threads"))
        for run in runs
    )
    head_to_head = content["head_to_head"]
    few = len(content["arms"]) <= MOST_IN_FULL
    return {
        "command": shlex.join(["python", *sys.argv]),
        "environment": environment(),
        "cells_ran_on": [{"where": " ".join(key), "cells": count} for key, count in where.items()],
        "num_cells": len(content["cells"]),
        "num_done": sum(cell["status"] == "done" for cell in content["cells"]),
        "failed": [{"name": c["name"], "error": c["error"]} for c in content["cells"] if c["status"] == "failed"],
        **{name: content[name] for name in ("budget", "task", "notes", "sweep")},
        "arms": [_arm(arm) for arm in content["arms"]],
        "matched": _small(content["matched"]),
        "best_of_n": _small(content["best_of_n"]),
        "differences": _small([line for line in content["differences"] if few or line["by"] == "method"]),
        "ranking": None if head_to_head is None else _small(head_to_head["ranking"]),
        "wins": _small({name: head_to_head[name] for name in ("names", "rates")}) if head_to_head and few else None,
    }


def _arm(arm: dict[str, Any]) -> dict[str, Any]:
    kept = ("name", "method", "axes", "seeds", "end", "fits", "spent", "clip", "gap", "regret")
    course = [{"step": point["step"], "kl": point["kl"], "reward": point["reward"]} for point in arm["frontier"]]
    return _small({name: arm.get(name) for name in kept} | {"frontier": course})


def _small(value: Any) -> Any:
    """Estimates as [mean, low, high], numbers to five digits."""
    if isinstance(value, dict) and "prompt_error" in value:
        return [_small(value[name]) for name in ("mean", "low", "high")]
    if isinstance(value, dict):
        return {name: _small(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_small(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


# ------------------------------------------------------------------------------------------------------------- in words


def markdown(record: dict[str, Any], name: str) -> str:
    machine = record["environment"]
    lines = [f"# {name}, recorded", "", f"`{record['command']}`", ""]
    lines += [
        f"Recorded with pairtune {machine['pairtune']}, commit {machine['commit']}, {machine['started']}. The runs:"
    ]
    lines += [
        f"{one['cells']} with (version, commit, torch, processor, cores, threads) {one['where']};"
        for one in record["cells_ran_on"]
    ]
    lines += [
        "",
        f"{record['num_done']} of {record['num_cells']} runs are finished, {len(record['failed'])} failed.",
        "",
    ]
    if record["num_done"] < record["num_cells"]:
        lines += ["The comparison is not complete; what stands here is about the finished runs alone.", ""]
    lines += [f"- {note}" for note in record["notes"]]
    lines += [
        "",
        (
            "In brackets: 95% intervals, with the spread over training seeds in them."
            if _has_seeds(record)
            else "In brackets: 95% intervals over prompts alone, since each policy has one seed; nothing is confirmed."
        )
        + " KL in nats a completion.",
        "",
    ]
    lines += [f"![Reward against KL]({name}.svg)", ""]
    lines += _sweep(record["sweep"]) + _ends(record) + _clips(record["arms"]) + _matched(record["matched"])
    lines += _differences(record["differences"], _has_seeds(record))
    lines += _best_of_n(record.get("best_of_n")) + _wins(record.get("wins")) + _spent(record["arms"])
    return "\n".join(lines).rstrip() + "\n"


def _has_seeds(record: dict[str, Any]) -> bool:
    return any(len(arm["seeds"]) > 1 for arm in record["arms"])


def _sweep(sweep: dict[str, Any] | None) -> list[str]:
    if sweep is None:
        return []
    rule = "reward - beta * KL" if sweep["rule"] == "objective" else "reward"
    lines = ["## Learning rates", "", f"By the largest {rule} at the end, on a seed of their own.", ""]
    lines += [f"| method | {rule} by what was tried (reward at KL) | chosen |", "|---|---|---|"]
    for method in dict.fromkeys(run["method"] for run in sweep["runs"]):
        runs = [run for run in sweep["runs"] if run["method"] == method]
        tried = ", ".join(f"{_settings(run)}: {run['status'] if run['value'] is None else _tried(run)}" for run in runs)
        chosen = "".join(_settings(run) for run in runs if run["chosen"])
        lines.append(f"| {method} | {tried} | {chosen}{', at the edge' if method in sweep['at_edge'] else ''} |")
    return [*lines, "", *(line for note in sweep_notes(sweep) for line in (note, ""))]


def _tried(run: dict[str, Any]) -> str:
    behind = f"; {behind_by(run['behind'])}" if run.get("behind") else ""
    return f"{run['value']:.3f} ({run['reward']:.3f} at {run['kl']:.2f}{behind})"


def _settings(run: dict[str, Any]) -> str:
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in run["settings"].values())


def _ends(record: dict[str, Any]) -> list[str]:
    is_task = record["task"] is not None
    strengths = {line["name"]: line["strength"] for line in record["ranking"] or []}
    lines = ["## At the end of training", ""]
    of_policy = ("KL a token", "tokens", "finished", "distinct-2")
    columns = ["policy", "seeds", "reward", "KL"]
    columns += ["below the optimum at its KL", "regret"] if is_task else of_policy
    lines += _head([*columns, "strength"])
    for arm in record["arms"]:
        end = arm["end"]
        cells = [arm["name"], str(len(arm["seeds"])), _shown(end["reward"]), _shown(end["kl"], 2)]
        if is_task:
            cells += [_shown(arm["gap"]), _shown(arm["regret"])]
        else:
            cells += [_shown(end["kl_per_token"]), _shown(end["tokens"], 1)]
            cells += [_shown(end["finished"]), _shown(end["distinct_2"])]
        lines.append(f"| {' | '.join([*cells, _shown(strengths.get(arm['name']), 2)])} |")
    lines += [
        "",
        "Strength: Bradley-Terry over all policies, in nats, by who has the larger reward on the same prompt.",
        "",
    ]
    return lines


def _clips(arms: list[dict[str, Any]]) -> list[str]:
    """Of few policies how often the clip was at work; of all where it never was."""
    clipped = [arm for arm in arms if arm["clip"]]
    lines = []
    if clipped and len(arms) <= MOST_IN_FULL:
        lines += ["## How often the clip was at work", "", "`clip_ratio` of the last pass of a step.", ""]
        lines += _head(["policy", "mean over steps", "lowest and highest step"])
        for arm in clipped:
            clip = arm["clip"]
            lines.append(f"| {arm['name']} | {clip['mean']:.2f} | {clip['lowest']:.2f} to {clip['highest']:.2f} |")
        lines.append("")
    if void := [arm["name"] for arm in clipped if arm["clip"]["void"]]:
        lines += [f"The clip of {', '.join(void)} never left 0 or 1: void as a test of clipping.", ""]
    return lines


def _head(columns: list[str]) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]


def _best_of_n(points: list[dict[str, Any]] | None) -> list[str]:
    if not points:
        return []
    lines = ["## Best of n completions of the starting policy", "", *_head(["n", "KL at most", "reward"])]
    return [*lines, *(f"| {p['n']} | {p['kl_bound']:.2f} | {_shown(p['reward'])} |" for p in points), ""]


def _wins(wins: dict[str, Any] | None) -> list[str]:
    if wins is None:
        return []
    lines = ["## Who wins how often", "", "The row against the column, by the larger reward on the same prompt.", ""]
    lines += _head(["", *wins["names"]])
    for name, row in zip(wins["names"], wins["rates"], strict=True):
        lines.append(f"| {name} | {' | '.join(_shown(rate, 2) for rate in row)} |")
    return [*lines, ""]


def _spent(arms: list[dict[str, Any]]) -> list[str]:
    lines = ["## What a run has spent", "", "Means over seeds.", "", *_head(["policy", *BUDGET.values()])]
    for arm in arms:
        amounts = [arm["spent"].get(name) for name in BUDGET]
        lines.append(f"| {arm['name']} | {' | '.join('-' if n is None else f'{n:,.0f}' for n in amounts)} |")
    return [*lines, ""]


def _matched(matched: list[dict[str, Any]]) -> list[str]:
    lines = []
    for line in matched:
        if len(line["arms"]) < 2:
            continue
        lines += [f"KL {line['to']:.2f}, the largest that all of these reach:", ""]
        lines += _head(["policy", "reward", "mean reward up to there"])
        lines += [f"| {arm['name']} | {_shown(arm['reward'])} | {_shown(arm['area'])} |" for arm in line["arms"]] + [""]
    return ["## Reward at matched KL", "", *lines] if lines else []


def _differences(differences: list[dict[str, Any]], has_seeds: bool) -> list[str]:
    if not differences:
        return []
    lines = ["## One against another, everything else equal", ""]
    if has_seeds:
        lines += [
            "The first less the second; bold: confirmed, that is",
            "the interval excludes 0 with the spread over seeds in it. Each stands for itself: of twenty true ties one",
            "may come out as confirmed.",
        ]
    else:
        lines += ["The first less the second; intervals over prompts alone, so that another seed may say otherwise."]
    lines += [
        "",
        f"| first | second | {' | '.join(VERDICTS.values())} |",
        "|---|---|---:|---:|---:|",
    ]
    for line in differences:
        shown = [_verdict(line[name]) for name in VERDICTS]
        lines.append(f"| {line['first']} | {line['second']} | {' | '.join(shown)} |")
    return [*lines, ""]


def _verdict(verdict: dict[str, Any] | None) -> str:
    if verdict is None or verdict["estimate"] is None:
        return "-"
    text = _shown(verdict["estimate"])
    return f"**{text}**" if verdict["confirmed"] else text


def _shown(estimate: list[float | None] | None, digits: int = 3) -> str:
    if estimate is None or estimate[0] is None:
        return "-"
    mean, low, high = (None if value is None else f"{value:.{digits}f}" for value in estimate)
    return f"{mean}" if low is None or high is None else f"{mean} [{low}, {high}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="of `pairtune compare`")
    parser.add_argument("--parallel", type=int, help="runs side by side")
    parser.add_argument("--output_dir", help="folder of the comparison, where it is not that of the configuration")
    parser.add_argument("--record-only", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    changed = {key: getattr(flags, key) for key in ("parallel", "output_dir") if getattr(flags, key) is not None}
    try:
        config = load_config(CompareConfig, flags.config, {key: str(value) for key, value in changed.items()})
        failed: PairtuneError | None = None
        if not flags.record_only:
            try:
                compare(config)
            except PairtuneError as error:  # some cells: the others are worth recording
                failed = error
        record, name = recorded(config), flags.config.stem
    except PairtuneError as error:
        parser.exit(2, f"{error}\n")
    flags.results.mkdir(parents=True, exist_ok=True)
    write_atomic(flags.results / f"{name}.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    write_atomic(flags.results / f"{name}.md", markdown(record, name))
    with tempfile.TemporaryDirectory() as scratch:
        drawn = {figure.key: figure for figure in make_page([config.output_dir]).figures()}
        # Of many settings the ends, joined by method, say more than forty courses over each other.
        many = len(record["arms"]) > MOST_IN_FULL
        figure = drawn.get("frontier-ends", drawn["frontier"]) if many else drawn["frontier"]
        paths = save_figures([figure], scratch)
        svg = next(path for path in paths if path.suffix == ".svg")
        write_atomic(flags.results / f"{name}.svg", svg.read_text("utf-8"))
    print(flags.results / f"{name}.md")
    if failed is not None:
        parser.exit(1, f"{failed}\n")


if __name__ == "__main__":
    main()
