"""The page of several runs: which method gives more reward for less drift, and how sure that is."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pairtune.config import METHODS
from pairtune.evidence.comparison import START, behind_by, same_start, sweep_notes
from pairtune.evidence.comparison_frontier import (
    Compared,
    ablation_blocks,
    compare_arms,
    frontier_blocks,
    last_evaluations,
    matched_blocks,
    matches_of,
    starts,
    stopped,
    table1_blocks,
    verdict_sentence,
)
from pairtune.evidence.comparison_judged import judged_blocks
from pairtune.evidence.comparison_wins import head_to_head_blocks, looks_of
from pairtune.evidence.figures import Chart, Point, Series, thin
from pairtune.evidence.page import Block, Choice, Page, Section, Settings, Tables, Text, plain
from pairtune.evidence.run_page import (
    completions_of,
    curve,
    length_of,
    numbers,
    other_metrics,
    spread_figures,
    spread_row,
    stage_of,
)
from pairtune.evidence.runs import COMPARISON, Arm, Line, Run, evaluation_samples, group_arms, read_json, shown
from pairtune.evidence.tables import Cell, Table
from pairtune.runs import folder
from pairtune.runs.display import clean, counted, duration, is_number

MOST_CURVE_POINTS = 30_000
"""In all training curves of a page together."""
MOST_TEXT = 1_000_000
"""Characters of completions on a page."""
MOST_PROMPTS = 120
RECORD_VERSION = 1
"""Of comparison.json, whose keys are read here; the page of another one does without it."""
FIRST_METRICS = ("reward", "kl", "loss", "entropy", "completions/mean_length", "accuracy", "perplexity")


def comparison_page(runs: Sequence[Run], folders: Sequence[Path], judged: Sequence[Line] = ()) -> Page:
    """What several runs of one stage show together. Arms whose runs are not done are told, not compared.

    judged: results of `pairtune judge`, see `read_judged`.

    Raises PairtuneError where two runs are one setting and one seed, or a file is damaged.
    """
    only = folders[0] if len(folders) == 1 else None
    record = (read_json(only / COMPARISON) or {}) if only is not None else {}
    compared = compare_arms(group_arms(runs), record if record.get("version") == RECORD_VERSION else {})
    arms = compared.arms
    name = only.resolve().name if only is not None else f"{len(runs)} runs"
    if not arms:
        verdict = "No run is done yet, so there is nothing to compare."
        return Page(name, verdict, [], [Section("runs", "Runs", "Runs", _runs(runs, compared))])
    if stage_of(runs[0]) == "train":
        matches = matches_of(compared)
        sections = [
            Section("frontier", "Frontier", "Reward against KL", frontier_blocks(compared)),
            Section("matched", "Matched KL", "Reward at matched KL", matched_blocks(compared, matches)),
            Section("wins", "Head to head", "Head to head", head_to_head_blocks(compared)),
            Section("judged", "Judges", "Before a judge", judged_blocks(judged, looks_of(compared))),
            Section("table1", "Numbers", "Every policy in numbers", table1_blocks(compared)),
            Section("ablations", "Ablations", "What a setting does", ablation_blocks(compared)),
        ]
        verdict = verdict_sentence(compared, matches)
    else:
        sections = [Section("ends", "Numbers", "Held-out measures", last_evaluations(compared))]
        verdict = f"{counted(len(arms), 'setting')}, {counted(sum(len(arm.runs) for arm in arms), 'run')}."
    sections += [
        Section("curves", "Curves", "Training curves", _curves(compared)),
        Section("spread", "Spread", "Rewards and lengths", _spread(compared)),
        Section("completions", "Completions", "Completions side by side", _completions(compared)),
        Section("runs", "Runs", "Runs and budgets", _runs(runs, compared)),
        Section("made", "Settings", "How it was made", _made(runs, compared, folders)),
    ]
    return Page(name, verdict, _facts(runs, compared), [section for section in sections if section.blocks])


def _facts(runs: Sequence[Run], compared: Compared) -> list[tuple[str, str]]:
    arms = compared.arms
    seeds = {len(arm.runs) for arm in arms}
    many = f"{min(seeds)}" if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    facts = [
        ("methods", str(len({arm.method for arm in arms}))),
        ("settings", str(len(arms))),
        ("seeds of each", many),
        ("runs", str(len(runs))),
    ]
    models = {str(arm.runs[0].config.get("model", "")) for arm in arms}
    if len(models) == 1:
        facts.insert(0, ("model", clean(models.pop())))
    if compared.measured:
        measured = "exactly" if compared.exact else f"on {compared.measured[0].num_prompts} held-out prompts"
        facts.append(("measured", measured))
    seconds = sum(sum(numbers(run.metrics, "step_time")) for run in runs)
    return [*facts, ("training time", duration(seconds))] if seconds else facts


# ------------------------------------------------------------------------------------- curves, spread, completions


def _curves(compared: Compared) -> list[Block]:
    """Any metric of the log over the steps: the mean over seeds, and from the least to the most of them."""
    runs = [run for arm in compared.arms for run in arm.runs]
    every = {name for run in runs for line in run.metrics for name in line}
    names = [name for name in FIRST_METRICS if name in every]
    names += [
        name
        for name in [*other_metrics(runs), "completions/clipped_ratio", "step_time"]
        if name in every and name not in names
    ]
    most = max(24, min(150, 3000 // max(1, len(compared.arms))))
    charts: list[Chart] = []
    num_points = 0
    for name in names:
        series = [one for arm in compared.arms if (one := _arm_curve(compared, arm, name, most)) is not None]
        num_points += sum(len(one.points) for one in series)
        if charts and num_points > MOST_CURVE_POINTS:
            break
        if series:
            many = any(len(arm.runs) > 1 for arm in compared.arms)
            text = "Mean over seeds; the band goes from the least to the most of them." if many else ""
            charts.append(
                Chart(f"metric-{name}", clean(name), text, "step", clean(name), series, x_name="step", whole_steps=True)
            )
    return [Choice("Over the steps of training", "metric", charts)] if charts else []


def _arm_curve(compared: Compared, arm: Arm, name: str, most: int) -> Series | None:
    by_seed = [{point.x: point.y for point in curve(run.metrics, name, most=10**9)} for run in arm.runs]
    by_seed = [values for values in by_seed if values]
    steps = sorted(set.intersection(*(set(values) for values in by_seed))) if by_seed else []
    if not steps:
        return None
    across = [[values[step] for values in by_seed] for step in steps]

    def over(what: Callable[[list[float]], float]) -> list[float]:
        return [y for _, y in thin([(step, what(values)) for step, values in zip(steps, across, strict=True)], most)]

    xs = [x for x, _ in thin([(step, 0.0) for step in steps], most)]
    means, lows, highs = over(lambda values: sum(values) / len(values)), over(min), over(max)
    if len(by_seed) == 1:
        points = [Point(x, y) for x, y in zip(xs, means, strict=True)]
    else:
        points = [Point(x, y, low, high) for x, y, low, high in zip(xs, means, lows, highs, strict=True)]
    return Series(
        arm.name,
        points,
        slot=compared.slot[arm.name],
        interval="none" if len(by_seed) == 1 else "band",
        group=compared.group[arm.name],
    )


def _spread(compared: Compared) -> list[Block]:
    rewards, lengths = [], []
    if first := [pair for table in starts(compared.arms) for pairs in table.values() for pair in pairs]:
        rewards.append(spread_row(START, [reward for reward, _ in first], 0))
        lengths.append(spread_row(START, [length for _, length in first], 0))
    for arm in compared.arms:
        lines = [line for run in arm.runs for line in evaluation_samples(run)]
        look: dict[str, Any] = {"slot": compared.slot[arm.name], "group": compared.group[arm.name]}
        rewards.append(spread_row(arm.name, [line.get("reward") for line in lines], **look))
        lengths.append(spread_row(arm.name, [length_of(line) for line in lines], **look))
    return spread_figures(rewards, lengths)


def _completions(compared: Compared) -> list[Block]:
    """The start and the end of every arm: all seeds of few arms, the first seed of many."""
    arms, policies = compared.arms, {}
    first = arms[0].runs[0]
    if same_start(arms) and first.evaluations and len(first.evaluations) > 1 and first.evaluations[0]["step"] == 0:
        policies[START] = evaluation_samples(first, 0)
    one_seed = len(arms) > 3
    for arm in arms:
        for run in arm.runs[:1] if one_seed else arm.runs:
            name = arm.name if len(arm.runs) == 1 else f"{arm.name}, seed {run.seed}"
            policies[name] = evaluation_samples(run)
    lines = [line for group in policies.values() for line in group]
    if not lines:
        return []
    mean_length = sum(len(str(line.get("completion", ""))) for line in lines) / len(lines)
    room = int(MOST_TEXT / (len(policies) * max(1.0, mean_length + 60)))
    block = completions_of(policies, max(8, min(MOST_PROMPTS, room)))
    if block is None:
        return []
    if one_seed and any(len(arm.runs) > 1 for arm in arms):
        block = replace(block, text=f"{block.text} Of every policy the first seed.")
    return [replace(block, left=0, right=1)]


# ---------------------------------------------------------------------------------------------------- runs, settings


BUDGET = {
    "completions": "completions",
    "tokens_generated": "tokens generated",
    "reward_calls": "reward calls",
    "updates": "updates",
    "forward_tokens": "forward tokens",
    "backward_tokens": "backward tokens",
}


def _runs(runs: Sequence[Run], compared: Compared) -> list[Block]:
    """Every run with what it spent, those that are not done too."""
    arm_of = {str(run.folder): arm for arm in compared.arms for run in arm.runs}
    budgets = [(run.cell or {}).get("budget") or {} for run in runs]
    spent = [name for name in BUDGET if any(is_number(budget.get(name)) for budget in budgets)]
    rows: list[list[str | Cell]] = []
    groups = []
    for run, budget in zip(runs, budgets, strict=True):
        arm = arm_of.get(str(run.folder))
        groups.append("" if arm is None else compared.group[arm.name])
        status = str((run.cell or {}).get("status", "")) or stopped(run) or "done"
        if error := (run.cell or {}).get("error"):
            status = f"{status}: {clean(str(error))}"
        steps = run.metrics[-1]["step"] if run.metrics else None
        seconds = sum(numbers(run.metrics, "step_time"))
        row: list[str | Cell] = [clean(run.name), str(run.seed) if run.config else "", status, _number(steps)]
        row += [_number(budget.get(name)) for name in spent]
        if not spent:
            row.append(_number(run.metrics[-1].get("num_tokens") if run.metrics else None))
        rows.append([*row, duration(seconds) if seconds else "–"])
    columns = ["run", "seed", "status", "steps", *(BUDGET[name] for name in spent)]
    columns += [] if spent else ["tokens seen"]
    table = Table("runs", "What every run spent", [*columns, "training time"], rows, "", groups)
    per_run = Tables([table], folded=f"all {len(runs)} runs" if len(runs) > 12 else "")
    notes = [clean(str(note)) for note in compared.record.get("notes") or ()]
    blocks: list[Block] = [Text(notes)] if notes else []
    if len(runs) > 12 and spent and compared.arms:
        blocks.append(Tables([_budgets(compared, spent)]))
    if sweep := _sweep(compared):
        blocks.append(Tables([sweep], folded="the sweep that chose settings"))
    return [*blocks, per_run]


def _budgets(compared: Compared, spent: Sequence[str]) -> Table:
    """What a run of each policy spent, the mean over its seeds."""
    rows: list[list[str | Cell]] = []
    for arm in compared.arms:
        budgets = [(run.cell or {}).get("budget") or {} for run in arm.runs]
        columns = [[budget[name] for budget in budgets if is_number(budget.get(name))] for name in spent]
        rows.append([arm.name, *(_number(sum(values) / len(values) if values else None) for values in columns)])
    groups = [compared.group[arm.name] for arm in compared.arms]
    title = "What a run of each policy spent"
    return Table("budgets", title, ["policy", *(BUDGET[name] for name in spent)], rows, "Means over seeds.", groups)


def _sweep(compared: Compared) -> Table | None:
    """The runs from which settings were chosen, by the same rule for every method."""
    sweep = compared.record.get("sweep") or {}
    at_edge = sweep.get("at_edge") or ()
    rows: list[list[str | Cell]] = []
    for line in sweep.get("runs") or ():
        settings = ", ".join(f"{word} {shown(value)}" for word, value in (line.get("settings") or {}).items())
        numbers_of = [Cell(line.get(name)) for name in ("reward", "kl", "value")]
        edge = ", at the edge" if line.get("method") in at_edge else ""
        beside = behind_by(line["behind"]) if line.get("behind") else ""
        chosen = f"chosen{edge}" if line.get("chosen") else clean(str(line.get("error") or beside))
        rows.append([str(line.get("method")), settings, *numbers_of, chosen])
    if not rows:
        return None
    rule = f"Chosen by the largest {sweep.get('rule')} on the split {sweep.get('split')}, seed {sweep.get('seed')}."
    rule = " ".join([rule, *sweep_notes(sweep)])
    return Table("sweep", "The sweep", ["method", "settings", "reward", "KL (nats)", "value", ""], rows, rule)


def _number(value: Any) -> Cell:
    return Cell(float(value) if is_number(value) else None, form="{:,.0f}")


def _made(runs: Sequence[Run], compared: Compared, folders: Sequence[Path]) -> list[Block]:
    """What differs first, then what all have in common, then where it ran."""
    arms = compared.arms
    blocks: list[Block] = []
    words = list(arms[0].settings)
    if words:
        rows: list[list[str | Cell]] = [[arm.name, *(_setting(arm, word) for word in words)] for arm in arms]
        groups = [compared.group[arm.name] for arm in arms]
        blocks.append(Tables([Table("settings", "What differs", ["policy", *words], rows, "", groups)]))
    flats = [folder.flatten(run.config) for run in runs if run.config]
    shared = _common(flats)
    environments = [
        {name: value for name, value in run.environment.items() if name not in ("resumed", "started", "command")}
        for run in runs
        if run.environment
    ]
    alike = _common(environments)
    different: dict[str, set[str]] = {}
    for environment in environments:
        for name, value in environment.items():
            if name not in alike:
                different.setdefault(name, set()).add(plain(value))
    commands = dict.fromkeys(clean(str(run.environment["command"])) for run in runs if run.environment.get("command"))
    listed = [("a run", command) for command in list(commands)[:3]]
    if len(commands) > 3:
        listed[-1] = (f"a run (and {len(commands) - 3} more like these)", listed[-1][1])
    paths = " ".join(shlex.quote(path.name or ".") for path in folders[:6]) + (" ..." if len(folders) > 6 else "")
    blocks.append(
        Settings(
            columns=[
                ("The same in all", [(clean(name), plain(value)) for name, value in shared.items()]),
                ("Environment", [(clean(name), plain(value)) for name, value in alike.items()]),
                (
                    "Environment, where it differs",
                    [(clean(name), " or ".join(sorted(values))) for name, values in different.items()],
                ),
            ],
            commands=[*listed, ("this page", f"pairtune report {paths}")],
        )
    )
    return blocks


def _setting(arm: Arm, word: str) -> str:
    """A setting of an arm; a dash where it belongs to another method."""
    section = word.partition(".")[0]
    foreign = section in METHODS and section != arm.runs[0].config.get("algorithm")
    return "–" if foreign else plain(arm.settings.get(word))


def _common(dicts: Sequence[Line]) -> Line:
    """What all of them say alike."""
    first = dicts[0] if dicts else {}
    return {name: value for name, value in first.items() if all(name in one and one[name] == value for one in dicts)}
