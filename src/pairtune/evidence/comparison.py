"""comparison.json: every table of a comparison, made from its cells' folders alone, and their short form for a console.

The file holds no time and no path, so that the same cells give the same bytes. Its keys, in their order:

version         1; a change that a reader would notice makes it 2
budget          what every cell could spend: `completions`, `tokens`, `completions_per_step` (null: not set)
task            the words of the enumerable task, null without one
notes           sentences about the grid: remainders of the budget, settings that do nothing; and about arms whose
                evaluations have no reward, of which `matched` and `differences` say nothing
cells           every cell in the order of the grid: `name`, `method`, `arm` (null unless done), `seed`, `settings`,
                `status`, `error`, `steps`, `budget` (as in cell.json)
sweep           as `pairtune.evidence.compare.sweep_of` says; null without one
arms            every setting that has a finished cell: `name`, `method`, `settings` (what differs between arms), `axes`
                (its point of the grid), `seeds`, `cells`; `frontier`: `step`, `kl`, `kl_k1`, `reward` of every
                evaluation, the last being each seed's own (`step`: the largest of theirs); `end`: the line of table 1:
                `reward`, `kl`, `kl_per_token`, `tokens`, `finished`, `distinct_2`; `fits`: `linear` and `sqrt`, each
                `intercept`, `slope`, `r_squared`, `residual_std` or null; `spent`: the mean of each counter of the
                budget over seeds; `clip`: null, or `lowest`, `highest`, `mean` of `clip_ratio` over all steps, and
                `void`: whether it never left 0 or 1; for a task also `gap` (reward below the exact frontier at its KL,
                at the end) and `regret` (of the objective)
matched         by point of the axes: `axes`, the common range of KL (`from`, `to`) of its arms, and `arms`: `name`,
                `reward` at the KL `to`, `area` (mean reward between `from` and `to`); null where they share no range
differences     pairs of arms that differ in method alone or in one axis alone: `first`, `second`, `by` ("method" or the
                axis), and for `reward_at_kl` (at `kl`, the largest that both reach), `kl_at_reward` (at `reward`),
                `area`, `end_reward`, `end_kl` a verdict: `estimate` (first less second), `confirmed`, `reason`
best_of_n       reference curve of the starting policy: `n`, `kl_bound`, `reward`; [] with one completion a prompt, or
                where the arms start apart
exact_frontier  `kl`, `reward` of the optimum at many betas; [] without a task
head_to_head    by the reward of training: `names`; `rates` (row beats column, null on the diagonal); `ranking`: `name`,
                `strength`, best first, [] where no game has a verdict; `length_controlled`: `name`, `win_rate`, `raw`,
                `phi` against the start. The first policy is the starting one; where the arms start apart (in another
                model, or measured by another law or reward) none is, and `length_controlled` is []. Null where nothing
                was sampled
held_out        the same by `held_out_reward_funcs`, with `reward_funcs`; null without

An estimate is `mean`, `low`, `high` (95%, over prompts and seeds), `prompt_error`, `seed_error`, `seeds_included`,
`prompts_included`, `by_seed`; null where there is none. NaN is null.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pairtune.config import CompareConfig
from pairtune.evidence.exact import optimal_frontier, sequence_logprobs
from pairtune.evidence.frontier import (
    Evaluated,
    area_under_frontier,
    best_of_n_curve,
    compare_area,
    compare_at,
    compare_kl_at_reward,
    compare_reward_at_kl,
    fit_frontier,
    frontier,
    gap_to_optimum,
    kl_range,
    reward_at_kl,
    reward_range,
    table1_row,
)
from pairtune.evidence.grid import Grid
from pairtune.evidence.head_to_head import length_controlled, ranking, score_games, win_matrix
from pairtune.evidence.runs import (
    CELL,
    Arm,
    Run,
    evaluated_together,
    evaluation_samples,
    group_arms,
    read_json,
    read_run,
    shown,
)
from pairtune.maths.statistics import Estimate, Interval, estimate_mean
from pairtune.runs.display import clean
from pairtune.runs.folder import without_nan

VERSION = 1
START = "starting policy"
NUM_EXACT_POINTS = 60
VERDICTS = ("reward_at_kl", "kl_at_reward", "area", "end_reward", "end_kl")
START_WORDS = (
    *("model", "model_revision", "eval_dataset", "dataset_test_split", "reward_funcs", "temperature"),
    *("top_p", "top_k", "max_completion_length"),
)
"""Runs in which these agree, and the `dataset` too where it gives the held-out prompts, start from one policy, sampled
by one law and scored by one reward."""


def tables(config: CompareConfig, grid: Grid, swept: dict[str, Any] | None) -> dict[str, Any]:
    """What comparison.json holds; see the head of this module.

    On one thread, whatever the cells ran with: another number of them would add in another order.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _tables(config, grid, swept)
    finally:
        torch.set_num_threads(num_threads)


def _tables(config: CompareConfig, grid: Grid, swept: dict[str, Any] | None) -> dict[str, Any]:
    records = [_record(Path(cell.config.output_dir)) for cell in grid.cells]
    done = [cell for cell, record in zip(grid.cells, records, strict=True) if record.get("status") == "done"]
    arms = group_arms([read_run(cell.config.output_dir) for cell in done])
    arm_of = {run.name: arm.name for arm in arms for run in arm.runs}
    measured = evaluated_together(arms) if arms else []
    content: dict[str, Any] = {
        "version": VERSION,
        "budget": config.budget.model_dump(),
        "task": config.task.model_dump() if config.task.policy is not None else None,
        "notes": [*grid.notes, *_without_rewards(arms, measured)],
        "cells": [
            {
                "name": cell.name,
                "method": cell.method,
                "arm": arm_of.get(cell.name),
                "seed": cell.seed,
                "settings": cell.settings,
                **{key: record.get(key) for key in ("status", "error", "steps", "budget")},
            }
            for cell, record in zip(grid.cells, records, strict=True)
        ],
        "sweep": swept,
        "arms": [_arm(arm, evaluated) for arm, evaluated in zip(arms, measured, strict=True)],
        "matched": _matched(arms, measured),
        "differences": _differences(arms, measured),
        "best_of_n": _best_of_n(arms),
        "exact_frontier": [],
        "head_to_head": _head_to_head(arms, None),
        "held_out": None,
    }
    if config.task.policy is not None:
        _add_truth(content, arms, measured, config)
    if config.held_out_reward_funcs and arms:
        from pairtune.evidence.held_out import Loaded, held_out_scores

        functions, loaded = config.held_out_reward_funcs, Loaded()
        scores = {run.name: held_out_scores(run, functions, loaded=loaded) for arm in arms for run in arm.runs}
        if same_start(arms):
            scores[START] = held_out_scores(arms[0].runs[0], functions, step=0, loaded=loaded)
        content["held_out"] = {
            "reward_funcs": config.held_out_reward_funcs,
            **(_head_to_head(arms, scores) or {}),
        }
    return without_nan(content)


def _record(cell: Path) -> dict[str, Any]:
    return read_json(cell / CELL) or {"status": "missing"}


def _without_rewards(arms: Sequence[Arm], measured: Sequence[Evaluated]) -> list[str]:
    """A sentence on each arm of which nothing is said that needs a reward."""
    sentences = []
    for arm, evaluated in zip(arms, measured, strict=True):
        lacking = [run.name for run, its in zip(arm.runs, evaluated.reward, strict=True) if not its.isfinite().all()]
        if lacking:
            sentences.append(
                f"{arm.name}: evaluations of {', '.join(lacking)} have no reward, so the arm is left out where one is "
                "needed."
            )
    return sentences


# ---------------------------------------------------------------------------------------------------------- single arms


def _arm(arm: Arm, evaluated: Evaluated) -> dict[str, Any]:
    distinct = [Interval(**run.evaluations[-1]["distinct_2"]) for run in arm.runs if run.evaluations]
    found = all(None not in interval for interval in distinct)
    end = table1_row(evaluated, distinct=distinct if found else ())._asdict()
    end["distinct_2"] = end.pop("distinct")
    budgets = [(run.cell or {}).get("budget") or {} for run in arm.runs]
    fits = {}
    kinds: tuple[Literal["linear", "sqrt"], ...] = ("linear", "sqrt")
    for kind in kinds:
        fit = fit_frontier(evaluated, kind)
        fits[kind] = None if fit is None else {key: value for key, value in fit._asdict().items() if key != "kind"}
    return {
        "name": arm.name,
        "method": arm.method,
        "settings": arm.settings,
        "axes": axes_of(arm),
        "seeds": [run.seed for run in arm.runs],
        "cells": [run.name for run in arm.runs],
        "frontier": [point._asdict() for point in frontier(evaluated)],
        "end": end,
        "fits": fits,
        "spent": {key: statistics.fmean(budget[key] for budget in budgets) for key in budgets[0]},
        "clip": clip_of(arm),
    }


def axes_of(arm: Arm) -> dict[str, Any]:
    """An arm's point of the grid."""
    return dict((arm.runs[0].cell or {}).get("settings") or {})


def same_start(arms: Sequence[Arm]) -> bool:
    """Whether all arms begin with one policy, and measure it alike."""

    def start(config: Mapping[str, Any]) -> str:
        prompts = config.get("dataset") if config.get("eval_dataset") is None else None
        return str([prompts, *(config.get(word) for word in START_WORDS)])

    return len({start(arm.runs[0].config) for arm in arms}) == 1


def over_what(seeds: Sequence[int], *, exact: bool = False) -> str:
    """What intervals are over, from the number of seeds that each policy has; empty where there are none: exact values
    of one seed vary with nothing."""
    if max(seeds, default=1) == 1:
        return "" if exact else "prompts alone (one seed)"
    some = "" if min(seeds) > 1 else " (a policy of one seed adds no spread between seeds)"
    return f"training seeds{some}" if exact else f"prompts and training seeds together{some}"


def clip_of(arm: Arm) -> dict[str, Any] | None:
    """How often the clip was at work in all steps of all seeds; None where nothing is clipped.

    An ablation of a clip that never touched anything, or that always did, says nothing: it is void.
    """
    config = arm.runs[0].config
    algorithm = str(config.get("algorithm"))
    clip = (config.get(algorithm) or {}).get("clip", algorithm in ("ppo", "grpo"))
    ratios = [line["clip_ratio"] for run in arm.runs for line in run.metrics if line.get("clip_ratio") is not None]
    if clip in (False, "none") or not ratios:
        return None
    lowest, highest = min(ratios), max(ratios)
    return {
        "lowest": lowest,
        "highest": highest,
        "mean": statistics.fmean(ratios),
        "void": highest == 0 or lowest == 1,
    }


# ---------------------------------------------------------------------------------------------------- arms side by side


def _matched(arms: Sequence[Arm], measured: Sequence[Evaluated]) -> list[dict[str, Any]]:
    """Reward at one KL for all arms of a point of the axes, and the mean reward up to there."""
    points: dict[str, list[int]] = {}
    for number, arm in enumerate(arms):
        if measured[number].has_rewards:
            points.setdefault(json.dumps(axes_of(arm), sort_keys=True), []).append(number)
    found = []
    for key, numbers in points.items():
        common = kl_range(*(measured[number] for number in numbers))
        line: dict[str, Any] = {"axes": json.loads(key), "from": None, "to": None, "arms": []}
        if common is not None and common[1] > common[0]:
            start, end = common
            line |= {"from": start, "to": end}
            for number in numbers:
                area = area_under_frontier(measured[number], end, start)
                line["arms"].append(
                    {
                        "name": arms[number].name,
                        "reward": reward_at_kl(measured[number], end),
                        "area": None if area is None else _scaled(area, 1 / (end - start)),
                    }
                )
        found.append(line)
    return found


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    names = ("mean", "low", "high", "prompt_error", "seed_error")
    scaled = {name: factor * getattr(estimate, name) for name in names}
    return estimate._replace(**scaled, by_seed=tuple(factor * value for value in estimate.by_seed))


def _differences(arms: Sequence[Arm], measured: Sequence[Evaluated]) -> list[dict[str, Any]]:
    found = []
    for i, first in enumerate(arms):
        for j in range(i + 1, len(arms)):
            by = differs_by(first, arms[j])
            if by is not None and measured[i].has_rewards and measured[j].has_rewards:
                line = {"first": first.name, "second": arms[j].name, "by": by}
                found.append({**line, **_verdicts(measured[i], measured[j])})
    return found


def differs_by(first: Arm, second: Arm) -> str | None:
    """ "method" where two arms differ in that alone, the axis where one method differs in one; else None."""
    a, b = axes_of(first), axes_of(second)
    other = [key for key in a if key in b and a[key] != b[key]]
    if first.method != second.method:
        return None if other else "method"
    return other[0] if len(other) == 1 else None


def _verdicts(a: Evaluated, b: Evaluated) -> dict[str, Any]:
    kls, rewards = kl_range(a, b), reward_range(a, b)
    missing = {"estimate": None, "confirmed": False, "reason": "the two share no range"}
    return {
        "kl": kls[1] if kls else None,
        "reward": rewards[1] if rewards else None,
        "reward_at_kl": compare_reward_at_kl(a, b, kls[1]) if kls else missing,
        "kl_at_reward": compare_kl_at_reward(a, b, rewards[1]) if rewards else missing,
        "area": compare_area(a, b, kls[1], kls[0]) if kls and kls[1] > kls[0] else missing,
        "end_reward": compare_at(a, b, "reward"),
        "end_kl": compare_at(a, b, "kl"),
    }


# ------------------------------------------------------------------------------------------- what was sampled together


def _best_of_n(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """From what the starting policy wrote in the evaluations before training: once a seed, so no two runs repeat it."""
    if not same_start(arms):
        return []
    tables = [_scores_of(run, 0) for run in arms[0].runs]
    rows = sorted(set.intersection(*(set(table) for table in tables)))
    if not rows or any(None in (reward for reward, _ in table[row]) for table in tables for row in rows):
        return []
    rewards = torch.tensor([[reward for table in tables for reward, _ in table[row]] for row in rows]).double()
    if rewards.shape[1] < 2:
        return []
    return [point._asdict() for point in best_of_n_curve(rewards)]


Scored = dict[tuple[int, str], list[tuple[float | None, int]]]
"""Prompt -> reward and length of each of its completions."""


def _scores_of(run: Run, step: int | None, scores: Sequence[float | None] | None = None) -> Scored:
    """Of one evaluation; `scores` stand in for the rewards of training, in the order of its samples."""
    found: Scored = {}
    for number, line in enumerate(evaluation_samples(run, step)):
        key = (line["row"], json.dumps(line["prompt"], sort_keys=True))
        reward = line["reward"] if scores is None else scores[number]
        found.setdefault(key, []).append((reward, len(line["completion_ids"])))
    return found


def _head_to_head(arms: Sequence[Arm], scores: Mapping[str, Sequence[float | None]] | None) -> dict[str, Any] | None:
    """Every policy at its end against every other, the starting policy among them where all have the same."""
    if not arms:
        return None
    by_policy: dict[str, list[Scored]] = {}
    if same_start(arms):
        by_policy[START] = [_scores_of(arms[0].runs[0], 0, None if scores is None else scores[START])]
    for arm in arms:
        by_policy[arm.name] = [_scores_of(run, None, None if scores is None else scores[run.name]) for run in arm.runs]
    tables = [table for runs in by_policy.values() for table in runs]
    prompts = sorted(set.intersection(*(set(table) for table in tables)))
    sizes = {len(table[prompt]) for table in tables for prompt in prompts}
    if not prompts or len(sizes) != 1:
        return None

    def values(runs: Sequence[Scored], place: int) -> Tensor:
        """(S, P, K); a completion without a reward is NaN."""
        rows = [[[pair[place] for pair in table[prompt]] for prompt in prompts] for table in runs]
        return torch.tensor(
            [[[math.nan if value is None else value for value in row] for row in run] for run in rows],
            dtype=torch.float64,
        )

    games = score_games(
        {name: values(runs, 0) for name, runs in by_policy.items()},
        {name: values(runs, 1) for name, runs in by_policy.items()},
        fixed=[START] if START in by_policy else [],
    )
    matrix, ranked = win_matrix(games), ranking(games)
    controlled = [
        {"name": arm.name, **length_controlled(games[START, arm.name].swapped())._asdict()}
        for arm in (arms if START in by_policy else ())
    ]
    return {
        "names": list(matrix.names),
        "rates": matrix.rates,
        "ranking": [{"name": ranked.names[i], "strength": ranked.strengths[i]} for i in ranked.order],
        "length_controlled": controlled,
    }


# ---------------------------------------------------------------------------------------------------- enumerable tasks


def _add_truth(
    content: dict[str, Any], arms: Sequence[Arm], measured: Sequence[Evaluated], config: CompareConfig
) -> None:
    """The exact frontier, and how far below it every arm ends."""
    from pairtune.evidence.compare import starting_policy, task_of

    task = task_of(config.task)
    reference = sequence_logprobs(starting_policy(config.task), task)
    betas = torch.logspace(2, -3, NUM_EXACT_POINTS, dtype=torch.float64)
    kls, rewards = optimal_frontier(task, reference, betas)
    points = zip(kls.tolist(), rewards.tolist(), strict=True)
    content["exact_frontier"] = [{"kl": kl, "reward": reward} for kl, reward in points]
    for arm, evaluated, line in zip(arms, measured, content["arms"], strict=True):
        gaps = gap_to_optimum(task, reference, evaluated.kl[:, -1], evaluated.reward[:, -1])
        regrets = [run.exact[-1]["regret"] for run in arm.runs]
        line["gap"] = estimate_mean(gaps)
        line["regret"] = None if None in regrets else estimate_mean(torch.tensor(regrets, dtype=torch.float64)[:, None])


# -------------------------------------------------------------------------------------------------------- on a console


def show(content: dict[str, Any], console: Console) -> None:
    """The short form: what every arm came to, which differences are confirmed, what failed."""
    if content["sweep"] is not None:
        console.print(_sweep_table(content["sweep"]))
    if content["arms"]:
        console.print(_ends_table(content))
        matched = [line for line in content["matched"] if len(line["arms"]) > 1]
        if matched:
            console.print(_matched_table(matched))
        _say_differences(content["differences"], console)
    for arm in content["arms"]:
        if arm["clip"] and arm["clip"]["void"]:
            ratio = "1" if arm["clip"]["lowest"] == 1 else "0"
            _say(console, f"void: clip_ratio of {arm['name']} was {ratio} in every step, so its clip was not tested")
    for cell in content["cells"]:
        if cell["status"] == "failed":
            _say(console, f"failed: {cell['name']}: {cell['error']}")


def _say(console: Console, text: str) -> None:
    console.print(Text(clean(text)), soft_wrap=True)


def _table(title: str, columns: Sequence[str], text: str = "") -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left", show_edge=False)
    table.padding = (0, 1)
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    if text:
        table.caption, table.caption_justify = text, "left"
    return table


def _interval(estimate: dict[str, Any] | None, form: str = "{:.3f}") -> str:
    if estimate is None or estimate["mean"] is None:
        return "–"
    mean = form.format(estimate["mean"])
    if estimate["low"] is None or estimate["high"] is None:
        return mean
    half = (estimate["high"] - estimate["low"]) / 2
    return f"{mean} ±{form.replace('+', '').format(half)}"


def _ends_table(content: dict[str, Any]) -> Table:
    is_task = content["task"] is not None
    columns = ["at the end", "reward", "KL", "tokens", *(["below optimum"] if is_task else []), "strength"]
    strengths = {line["name"]: line["strength"] for line in (content["head_to_head"] or {"ranking": []})["ranking"]}
    seeds = [len(arm["seeds"]) for arm in content["arms"]]
    many = f"{min(seeds)} to {max(seeds)}" if min(seeds) < max(seeds) else str(min(seeds))
    over, games = over_what(seeds, exact=is_task), over_what(seeds)
    if is_task:  # what is known exactly varies with seeds alone, but games are played with samples
        over = f"{over}, of the strength over {games}" if over else f"{games}, of the strength alone"
    table = _table(
        "Every policy at its end",
        columns,
        f"Seeds of each: {many}. ±: half a 95% interval over {over}. KL in nats a completion; strength: Bradley-Terry, "
        "in nats.",
    )
    for arm in content["arms"]:
        end = arm["end"]
        row = [arm["name"], _interval(end["reward"]), _interval(end["kl"], "{:.2f}")]
        row += [_interval(end["tokens"], "{:.1f}")]
        row += [_interval(arm["gap"])] if is_task else []
        table.add_row(*row, _interval(strengths.get(arm["name"]), "{:+.2f}"))
    return table


def _matched_table(matched: Sequence[dict[str, Any]]) -> Table:
    table = _table("Reward at matched KL", ["", "at KL", "reward", "mean reward up to there"])
    for line in matched:
        for arm in line["arms"]:
            table.add_row(arm["name"], f"{line['to']:.2f}", _interval(arm["reward"]), _interval(arm["area"]))
    return table


def _sweep_table(sweep: dict[str, Any]) -> Table:
    rule = "reward - beta * KL" if sweep["rule"] == "objective" else "reward"
    table = _table(f"The sweep: kept is the highest {rule} at the end", ["", "settings", rule, ""])
    for run in sweep["runs"]:
        settings = ", ".join(f"{key} {shown(value)}" for key, value in run["settings"].items())
        lacking = "–" if run["status"] == "done" else run["status"]
        value = lacking if run["value"] is None else f"{run['value']:.4f}"
        edge = ", at the edge" if run["chosen"] and run["method"] in sweep["at_edge"] else ""
        behind = f"behind by {_interval(run['behind'])}" if run.get("behind") else ""
        table.add_row(run["method"], settings, value, f"chosen{edge}" if run["chosen"] else behind)
    if notes := sweep_notes(sweep):
        table.caption, table.caption_justify = " ".join(notes), "left"
    return table


def behind_by(behind: dict[str, float]) -> str:
    """How far a run of a sweep lies behind the chosen one."""
    return "behind by {mean:.3f} [{low:.3f}, {high:.3f}]".format(**behind)


def sweep_notes(sweep: dict[str, Any]) -> list[str]:
    """What to think of before a sweep's choice is believed."""
    notes = []
    if sweep.get("at_edge"):
        notes.append("At the edge: what lies beyond the values that were tried?")
    if undecided := sweep.get("undecided"):  # an older version did not say
        methods = ", ".join(undecided)
        notes.append(f"Behind by an interval that holds 0: of {methods} the sweep cannot tell all runs from the best.")
    return notes


def _say_differences(differences: Sequence[dict[str, Any]], console: Console) -> None:
    """The confirmed ones of reward at matched KL, and how many are not."""
    found = [line for line in differences if line["reward_at_kl"]["confirmed"]]
    if not differences:
        return
    for line in found[:12]:
        estimate = line["reward_at_kl"]["estimate"]
        better, worse = line["first"], line["second"]
        if estimate["mean"] < 0:
            better, worse = worse, better
            estimate = {"mean": -estimate["mean"], "low": -estimate["high"], "high": -estimate["low"]}
        more = _interval(estimate, "{:.3f}")
        _say(console, f"confirmed: at KL {line['kl']:.2f} {better} has {more} more reward than {worse}")
    more = f"; {len(found) - 12} more are in comparison.json" if len(found) > 12 else ""
    _say(
        console,
        f"{len(found)} of {len(differences)} differences in reward at matched KL are confirmed{more}; each stands for "
        "itself, so of twenty true ties one may be among them",
    )
