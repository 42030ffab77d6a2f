"""What a comparison shows of reward and drift: the frontier, reward at matched KL, ends in numbers, ablations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from pairtune.errors import PairtuneError
from pairtune.evidence.comparison import axes_of, clip_of, over_what, same_start
from pairtune.evidence.figures import Chart, Point, RowMark, Rows, Series
from pairtune.evidence.frontier import (
    Evaluated,
    FrontierPoint,
    area_under_frontier,
    best_of_n_curve,
    compare_kl_at_reward,
    compare_reward_at_kl,
    fit_frontier,
    frontier,
    kl_range,
    reward_at_kl,
    reward_range,
    table1_row,
)
from pairtune.evidence.page import Block, Choice, Figures, Tables, Text
from pairtune.evidence.run_page import law, length_of, quantity
from pairtune.evidence.runs import CONSEQUENCES, Arm, Run, evaluated_together, evaluation_samples, is_exact, shown
from pairtune.evidence.tables import Cell, Table
from pairtune.maths.statistics import Estimate, Interval, Verdict
from pairtune.runs.display import counted, is_number

MOST_FINDINGS = 6
MOST_COLOURS = 8
"""More arms than that share the colour of their method."""

PromptKey = tuple[int, str]


@dataclass(frozen=True)
class Compared:
    """The arms of a page, what they measured, and how they look."""

    arms: list[Arm]
    measured: list[Evaluated] | None
    """Of each arm, over the prompts that all of them have; None where the runs do not hold it."""
    why_not: str
    """Why nothing was measured together; empty where it was."""
    group: dict[str, str]
    """Arm -> the entry of the legend that it is switched with: itself, or its method where there are many."""
    slot: dict[str, int]
    """Arm -> its slot of the palette."""
    exact: bool = False
    """Whether what was measured is the truth about policies of an enumerable task: one value for all prompts."""
    record: dict[str, Any] = field(default_factory=dict)
    """comparison.json, where `pairtune compare` wrote one: the exact frontier, held-out rewards, the sweep."""


def compare_arms(arms: list[Arm], record: dict[str, Any]) -> Compared:
    """Arms with what they measured together, as far as their runs hold it."""
    own = len(arms) <= MOST_COLOURS
    group = {arm.name: arm.name if own else arm.method for arm in arms}
    number = {name: place for place, name in enumerate(dict.fromkeys(group.values()), start=1)}
    slot = {arm.name: number[group[arm.name]] for arm in arms}
    try:
        measured = evaluated_together(arms) if arms else []
        return Compared(arms, measured, "", group, slot, bool(arms) and is_exact(arms), record)
    except PairtuneError as error:
        return Compared(arms, None, str(error), group, slot, False, record)


def estimate_cell(estimate: Estimate | Interval | None, form: str = "{:.3f}", scale: float = 1.0) -> Cell:
    if estimate is None:
        return Cell(None, form=form)
    mean, low, high = (scale * end if math.isfinite(end) else None for end in estimate[:3])
    return Cell(mean, low, high, form=form)


def end(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---------------------------------------------------------------------------------------------------------- frontier


def frontier_blocks(compared: Compared) -> list[Block]:
    """The frontier: every evaluation of every arm; where a method has several settings, also the ends joined."""
    if compared.measured is None:
        return _plain_frontier(compared)
    points = [frontier(evaluated) for evaluated in compared.measured]
    laws = {law(run.config) for arm in compared.arms for run in arm.runs}
    of = laws.pop() if len(laws) == 1 else ", each of the law that its run samples from"
    label = f"KL to the reference (nats a completion{of})"
    bars, many = _intervals(compared, "Bars"), _has_seeds(compared)
    where = "what a policy truly is" if compared.exact else "an evaluation on held-out prompts"
    text = f"Each mark is {where}: up and to the left is better. {bars}"
    text += " Faint marks are the single seeds." if many else ""
    references = _references(compared)

    def chart(key: str, title: str, text: str, series: list[Series]) -> Chart:
        series = [*series, *references]
        y_label = "reward" if compared.exact else "held-out reward"
        return Chart(key, title, text, label, y_label, series, x_name="KL", y_name="reward", x_from_zero=True)

    charts = [chart("frontier", "every evaluation of every policy", text, _courses(compared, points))]
    if ends := _joined_ends(compared, points):
        text = (
            f"Each mark is the end of one setting{', the mean over its seeds' if many else ''}; a line joins the "
            f"settings of one method in the order of their KL. {bars}"
        )
        charts.append(chart("frontier-ends", "the ends, joined by method", text, ends))
        if len(compared.arms) > MOST_COLOURS:
            charts.reverse()
    blocks: list[Block] = [Choice("KL-reward frontier", "what is shown", charts)]
    hint = "Press an entry of a legend to take it off every figure and table of the page, and again to bring it back."
    return [*blocks, Text([hint], on_screen_only=True)] if len(set(compared.group.values())) > 1 else blocks


def _courses(compared: Compared, points: Sequence[list[FrontierPoint]]) -> list[Series]:
    """Each arm's evaluations in the order of training, and those of its seeds apart."""
    assert compared.measured is not None
    series: list[Series] = []
    for arm, course, evaluated in zip(compared.arms, points, compared.measured, strict=True):
        look: dict[str, Any] = {"slot": compared.slot[arm.name], "group": compared.group[arm.name], "marked": True}
        mean = [_frontier_point(point, f"{_when(arm, point, course)}, {_seeds(arm)}") for point in course]
        mean = [point for point in mean if math.isfinite(point.y)]
        series.append(Series(arm.name, mean, interval="bars", **look))
        if len(arm.runs) > 1:
            kind: Literal["line", "points"] = "line" if len(compared.arms) <= MOST_COLOURS else "points"
            series += [
                Series(arm.name, _seed_points(run, number, course, evaluated), kind=kind, faint=True, **look)
                for number, run in enumerate(arm.runs)
            ]
    return series


def _joined_ends(compared: Compared, points: Sequence[list[FrontierPoint]]) -> list[Series]:
    """One line a method through the ends of its settings; nothing where no method has two of them."""
    by_method: dict[str, list[tuple[Arm, FrontierPoint]]] = {}
    for arm, course in zip(compared.arms, points, strict=True):
        if math.isfinite(course[-1].reward.mean):
            by_method.setdefault(arm.method, []).append((arm, course[-1]))
    if max(map(len, by_method.values()), default=0) < 2:
        return []
    own = len(compared.arms) <= MOST_COLOURS  # then a group is an arm, and a line over several cannot be one of them
    series = []
    for slot, (method, ends) in enumerate(by_method.items(), start=1):
        ends.sort(key=lambda pair: pair[1].kl.mean)
        there = [
            _frontier_point(point, f"{arm.name}, {_when(arm, point, [point])}, {_seeds(arm)}") for arm, point in ends
        ]
        look = slot if own else compared.slot[ends[0][0].name]
        series.append(Series(method, there, slot=look, interval="bars", marked=True, group=method))
    return series


def _has_seeds(compared: Compared) -> bool:
    """Whether any arm has more than one run."""
    return any(len(arm.runs) > 1 for arm in compared.arms)


def _intervals(compared: Compared, what: str = "Intervals") -> str:
    """A sentence on what the intervals are over, as far as the arms have seeds for one."""
    over = over_what([len(arm.runs) for arm in compared.arms], exact=compared.exact)
    if not over:
        return "There are no intervals: every policy has one seed, and its values are exact."
    exact = "; the values of each policy are exact, means over all prompts of the task" if compared.exact else ""
    return f"{what} are at 95%, over {over}{exact}."


def _frontier_point(point: FrontierPoint, text: str) -> Point:
    kl, reward = point.kl, point.reward
    return Point(kl.mean, reward.mean, end(reward.low), end(reward.high), end(kl.low), end(kl.high), text)


def _when(arm: Arm, point: FrontierPoint, course: Sequence[FrontierPoint]) -> str:
    """The step of an evaluation; of the last one from where to where, if the seeds ended at different steps."""
    ends = {run.evaluations[-1]["step"] for run in arm.runs if run.evaluations}
    if point is not course[-1] or len(ends) < 2:
        return f"step {point.step}"
    return f"the end (steps {min(ends)} to {max(ends)})"


def _seeds(arm: Arm) -> str:
    seeds = ", ".join(str(run.seed) for run in arm.runs)
    return f"mean of seeds {seeds}" if len(arm.runs) > 1 else f"seed {seeds}"


def _seed_points(run: Run, number: int, points: Sequence[FrontierPoint], evaluated: Evaluated) -> list[Point]:
    """One seed's evaluations; its intervals are those over prompts alone, where they are of the same prompts."""
    lines = {line["step"]: line for line in run.evaluations if line.get("num_prompts") == evaluated.num_prompts}
    found = []
    for point in points:
        # The last evaluations of the seeds stand at one place, whatever their steps.
        step = run.evaluations[-1]["step"] if point is points[-1] and run.evaluations else point.step
        _, low, high = quantity(lines.get(step, {}), "reward")
        _, left, right = quantity(lines.get(step, {}), "kl")
        text = f"step {step}, seed {run.seed} alone"
        if math.isfinite(point.reward.by_seed[number]):
            found.append(Point(point.kl.by_seed[number], point.reward.by_seed[number], low, high, left, right, text))
    return found


def _plain_frontier(compared: Compared) -> list[Block]:
    """What evaluations.jsonl alone can show: every run for itself, intervals over prompts alone."""
    series = []
    for arm in compared.arms:
        for run in arm.runs:
            points = []
            for line in run.evaluations:
                kl, reward = quantity(line, "kl"), quantity(line, "reward")
                if kl[0] is not None and reward[0] is not None:
                    text = f"step {line['step']}, seed {run.seed}"
                    points.append(Point(kl[0], reward[0], reward[1], reward[2], kl[1], kl[2], text))
            if points:
                look: dict[str, Any] = {"slot": compared.slot[arm.name], "group": compared.group[arm.name]}
                series.append(Series(arm.name, points, interval="bars", marked=True, **look))
    note = Text([f"Intervals are over prompts alone, and nothing is paired: {compared.why_not}."])
    if not series:
        return [note]
    chart = Chart(
        "frontier",
        "KL-reward frontier",
        "Each mark is an evaluation of one run; up and to the left is better.",
        "KL to the reference (nats a completion)",
        "held-out reward",
        series,
        x_name="KL",
        y_name="reward",
    )
    return [Figures([chart], wide=True), note]


def _references(compared: Compared) -> list[Series]:
    """The exact frontier of an enumerable task; best-of-n where several completions a prompt of the start were kept."""
    series = []
    exact = [Point(line["kl"], line["reward"]) for line in compared.record.get("exact_frontier") or ()]
    if exact and compared.measured:
        widest = 1.1 * max(float(evaluated.kl.max()) for evaluated in compared.measured)
        name = "exact frontier: no policy lies above it"
        there = [point for point in sorted(exact, key=lambda point: point.x) if point.x <= widest]
        series.append(Series(name, there, group=name))
    rewards = _start_rewards(compared.arms)
    if rewards is not None:
        points = [
            Point(one.kl_bound, one.reward.mean, end(one.reward.low), end(one.reward.high), text=f"best of {one.n}")
            for one in best_of_n_curve(rewards)
        ]
        name = "best of n of the start, KL at most"
        series.append(Series(name, points, interval="bars", marked=True, group=name, dashed=True))
    return series


def _start_rewards(arms: Sequence[Arm]) -> Tensor | None:
    """(P, N): rewards of the starting policy's completions, those of all seeds side by side; None without any."""
    tables = starts(arms)
    keys = sorted(set.intersection(*(set(table) for table in tables))) if tables else []
    rows = [[reward for table in tables for reward, _ in table[key]] for key in keys]
    if not rows or len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        return None
    return torch.tensor(rows, dtype=torch.float64)


def scored(run: Run, step: int | None = None) -> dict[PromptKey, list[tuple[float, float]]]:
    """Reward and length of each completion of an evaluation (the last) by prompt; NaN for what is not there."""
    found: dict[PromptKey, list[tuple[float, float]]] = {}
    for line in evaluation_samples(run, step):
        reward: Any = line.get("reward")
        length = length_of(line)
        pair = (float(reward) if is_number(reward) else math.nan, math.nan if length is None else float(length))
        found.setdefault((line["row"], str(line.get("prompt"))), []).append(pair)
    return found


def starts(arms: Sequence[Arm]) -> list[dict[PromptKey, list[tuple[float, float]]]]:
    """What the starting policy wrote, once a seed; empty where arms start apart or it was not evaluated."""
    by_seed: dict[int, Run] = {}
    for arm in arms if same_start(arms) else ():
        for run in arm.runs:
            if run.evaluations and run.evaluations[0]["step"] == 0:
                by_seed.setdefault(run.seed, run)
    return [scored(run, 0) for run in by_seed.values()]


# --------------------------------------------------------------------------------------------------- at matched KL


@dataclass(frozen=True)
class Match:
    """Two arms at the largest KL, and at the largest reward, that all their seeds reach."""

    first: Arm
    second: Arm
    kl: float
    """Nats."""
    verdict: Verdict
    """On the reward at that KL, of the first less that of the second."""
    reward: float | None
    kl_verdict: Verdict | None
    """On the KL at that reward; None where they share no reward."""


def matches_of(compared: Compared) -> list[Match]:
    """All pairs of few arms; of many, those of the first method with the others at the same other settings."""
    if compared.measured is None:
        return []
    measured = {arm.name: evaluated for arm, evaluated in zip(compared.arms, compared.measured, strict=True)}
    matches = []
    for first, second in _pairs(compared.arms):
        a, b = measured[first.name], measured[second.name]
        if not (a.has_rewards and b.has_rewards):
            continue
        kls, rewards = kl_range(a, b), reward_range(a, b)
        if kls is not None and kls[1] > kls[0]:
            verdict = compare_reward_at_kl(a, b, kls[1])
            kl_verdict = None if rewards is None else compare_kl_at_reward(a, b, rewards[1])
            reward = None if rewards is None else rewards[1]
            matches.append(Match(first, second, kls[1], verdict, reward, kl_verdict))
    return matches


def _pairs(arms: Sequence[Arm]) -> list[tuple[Arm, Arm]]:
    if len(arms) <= 6:  # the first method's before all others, so that it is the first of every pair it is in
        arms = sorted(arms, key=lambda arm: arm.method != arms[0].method)
        return [(a, b) for number, a in enumerate(arms) for b in arms[number + 1 :]]
    place = places(arms)
    first = [arm for arm in arms if arm.method == arms[0].method]
    others = [arm for arm in arms if arm.method != arms[0].method]
    alike = [(a, b) for b in others for a in first if place[a.name] == place[b.name]]
    return alike or [(arms[0], other) for other in arms[1:]]


def places(arms: Sequence[Arm]) -> dict[str, str]:
    """Arm -> its point of the grid in words: "beta 0.05". Of plain runs the words that one method has in several ways
    span the grid; what differs between methods alone belongs to the method."""
    spanning = [
        word
        for word in dict.fromkeys(word for arm in arms for word in arm.settings)
        if word not in CONSEQUENCES
        and any(a.method == b.method and a.settings.get(word) != b.settings.get(word) for a in arms for b in arms)
    ]

    def place(arm: Arm) -> str:
        chosen = axes_of(arm) if arm.runs[0].cell else {word: arm.settings.get(word) for word in spanning}
        return ", ".join(f"{word} {shown(value)}" for word, value in chosen.items())

    return {arm.name: place(arm) for arm in arms}


def matched_blocks(compared: Compared, matches: Sequence[Match]) -> list[Block]:
    if compared.measured is None:
        return []
    tables = []
    if levels := _levels(compared.measured):
        rows: list[list[str | Cell]] = []
        for arm, evaluated in zip(compared.arms, compared.measured, strict=True):
            rows.append([arm.name, *(estimate_cell(reward_at_kl(evaluated, kl)) for kl in levels)])
        many = _has_seeds(compared)
        text = (
            "The reward where a run first crosses that KL, between two evaluations on a straight line over the square "
            f"root of the KL{'; the mean over seeds' if many else ''}. {_intervals(compared)} A dash: "
            f"{'one seed at least never gets' if many else 'the run never gets'} there."
        )
        columns = ["policy", *(f"at {kl:g} nats" for kl in levels)]
        groups = [compared.group[arm.name] for arm in compared.arms]
        tables.append(Table("reward_at_kl", "Reward at equal drift", columns, rows, text, groups))
    if matches:
        tables += _verdicts(matches, compared.exact)
    blocks: list[Block] = [Text(findings=_findings(matches))] if matches else []
    blocks += [Tables(tables)] if tables else []
    if fits := _fits(compared):
        blocks.append(Tables([fits], folded="Area under the frontier, and lines through it"))
    return blocks


def _verdicts(matches: Sequence[Match], exact: bool) -> list[Table]:
    """Every pair at matched KL, and at matched reward."""
    how = "is taken" if exact else "compares each prompt with itself,"
    text = (
        f"The difference {how} at the largest {{}} that all seeds of both reach. It is called confirmed only if its "
        "interval, with the variance between training seeds in it, excludes zero."
    )
    at_kl: list[list[str | Cell]] = []
    at_reward: list[list[str | Cell]] = []
    for match in matches:
        names = f"{match.first.name} against {match.second.name}"
        words = f"{match.verdict.word}: {match.verdict.reason}"
        at_kl.append([names, Cell(match.kl, form="{:.2f}"), estimate_cell(match.verdict.estimate, "{:+.3f}"), words])
        if match.kl_verdict is not None:
            words = f"{match.kl_verdict.word}: {match.kl_verdict.reason}"
            at_reward.append([names, Cell(match.reward), estimate_cell(match.kl_verdict.estimate, "{:+.2f}"), words])
    columns = ["policies", "KL (nats)", "reward of the first less that of the second", "verdict"]
    tables = [Table("matched_kl", "More reward at the same KL?", columns, at_kl, text.format("KL"))]
    if at_reward:
        columns = ["policies", "reward", "KL of the first less that of the second (nats)", "verdict"]
        title = "More KL for the same reward?"
        tables.append(Table("matched_reward", title, columns, at_reward, text.format("reward")))
    return tables


def _findings(matches: Sequence[Match]) -> list[str]:
    """The confirmed differences in words, the largest first, and how many are not."""
    confirmed = [
        (match, estimate) for match in matches if match.verdict.confirmed and (estimate := match.verdict.estimate)
    ]
    confirmed.sort(key=lambda pair: -abs(pair[1].mean))
    sentences = []
    for match, estimate in confirmed[:MOST_FINDINGS]:
        more = "more" if estimate.mean > 0 else "less"
        low, high = sorted((abs(estimate.low), abs(estimate.high)))
        sentences.append(
            f"At {match.kl:.2f} nats {match.first.name} has {abs(estimate.mean):.3f} [{low:.3f}, {high:.3f}] {more} "
            f"reward than {match.second.name}."
        )
    if len(matches) == 1:
        return sentences or ["The one difference in reward at matched KL is not confirmed."]
    others = f"; the {MOST_FINDINGS} largest stand here" if len(confirmed) > MOST_FINDINGS else ""
    last = f"{len(confirmed)} of {len(matches)} differences in reward at matched KL are confirmed{others}."
    if len(matches) >= 10:
        last += " Each stands for itself: of twenty true ties one may be among them."
    return [*sentences, last]


def _levels(measured: Sequence[Evaluated]) -> list[float]:
    """Up to four round KLs that at least one arm reaches."""
    ranges = [common for evaluated in measured if (common := kl_range(evaluated)) is not None]
    top = max((high for _, high in ranges), default=0.0)
    if not top > 0:
        return []
    round_ones = [m * 10.0**power for power in range(-4, 5) for m in (1, 2, 5)]
    return [kl for kl in round_ones if kl <= top][-4:]


def _fits(compared: Compared) -> Table | None:
    assert compared.measured is not None
    rewarded = [evaluated for evaluated in compared.measured if evaluated.has_rewards]
    common = kl_range(*rewarded) if rewarded else None
    common = common if common is not None and common[1] > common[0] else None
    rows: list[list[str | Cell]] = []
    for arm, evaluated in zip(compared.arms, compared.measured, strict=True):
        area = None if common is None else area_under_frontier(evaluated, common[1], common[0])
        row: list[str | Cell] = [
            arm.name,
            estimate_cell(area, scale=1.0 if common is None else 1 / (common[1] - common[0])),
        ]
        for kind in ("linear", "sqrt"):
            fit = fit_frontier(evaluated, kind)
            row += [estimate_cell(fit.slope if fit else None), Cell(fit.r_squared if fit else None, form="{:.2f}")]
        rows.append(row)
    mean = (
        f"Mean reward along the frontier: its area over KLs of {common[0]:.2f} to {common[1]:.2f} nats, which all of "
        "them pass, divided by their width."
        if common
        else "No range of KLs is passed by all of them, so none has a mean reward along the frontier."
    )
    text = f"{mean} Slopes are of reward = a + b KL and reward = a + b sqrt(KL) through the evaluations of each seed."
    columns = ["policy", "mean reward along the frontier", "slope in KL", "R² in KL", "slope in √KL", "R² in √KL"]
    groups = [compared.group[arm.name] for arm in compared.arms]
    return Table("frontier_fits", "Area and fits", columns, rows, text, groups)


def verdict_sentence(compared: Compared, matches: Sequence[Match]) -> str:
    """One sentence a hurried reader may keep: the first method against each other one, at matched KL."""
    arms = compared.arms
    if compared.measured is None:
        return "These runs cannot be compared prompt by prompt; the figures show each for itself."
    if len(arms) == 1:
        point = frontier(compared.measured[0])[-1]
        reward = estimate_cell(point.reward)
        return (
            f"{arms[0].name} ends at a held-out reward of {reward.text} {reward.interval} and {point.kl.mean:.2f} nats "
            f"of KL to the reference, over {counted(len(arms[0].runs), 'seed')}."
        )
    rewarded = [arm for arm, one in zip(arms, compared.measured, strict=True) if one.has_rewards]
    place = places(arms)
    subject, against = _against_others((rewarded or arms)[0], matches, place)
    if not against:
        return "No two of these policies reach a common KL, so nothing is compared at equal drift."
    kinds: dict[str, list[str]] = {"more reward than": [], "less reward than": [], "no confirmed difference to": []}
    for name, group in against.items():
        confirmed = [match.verdict.estimate for match in group if match.verdict.confirmed]
        more = sum(estimate is not None and estimate.mean > 0 for estimate in confirmed)
        less = sum(estimate is not None and estimate.mean < 0 for estimate in confirmed)
        alike = all(place[match.first.name] == place[match.second.name] for match in group)
        many = f"{len(group)} {'settings' if alike else 'pairs of settings'}"
        for words, number in (("more reward than", more), ("less reward than", less)):
            if number:
                kinds[words].append(f"{name} (at {number} of {many})" if len(group) > 1 else name)
        if not more and not less:
            kinds["no confirmed difference to"].append(name)
    parts = [f"{words} {_listed(found)}" for words, found in kinds.items() if found]
    over = "training seeds" if compared.exact else "prompts and training seeds"
    sure = f", confirmed over {over}" if len(parts) > 1 or "confirmed" not in parts[0] else ""
    return f"At matched KL{sure}, {subject} has {'; '.join(parts)}."


def _against_others(
    first: Arm, matches: Sequence[Match], place: Mapping[str, str]
) -> tuple[str, dict[str, list[Match]]]:
    """The first method and what it was matched with, by method; with one method alone, the first arm and the others.

    place: as `places`. A difference to a method at another setting is that of the setting too, so it counts only where
    the two have no setting in common.
    """
    against: dict[str, list[Match]] = {}
    for match in matches:
        if match.first.method == first.method != match.second.method:
            against.setdefault(match.second.method, []).append(match)
    if against:
        alike = {
            name: [match for match in group if place[match.first.name] == place[match.second.name]]
            for name, group in against.items()
        }
        return first.method, {name: alike[name] or group for name, group in against.items()}
    return first.name, {match.second.name: [match] for match in matches if match.first is first}


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ------------------------------------------------------------------------------------------------ numbers, ablations


def table1_blocks(compared: Compared) -> list[Block]:
    """The P3O paper's table 1 at the end of training; for a task also how far from the optimum every policy ends."""
    if compared.measured is None:
        return last_evaluations(compared)
    ends = {line.get("name"): line for line in compared.record.get("arms") or ()}
    truths = [name for name in ("gap", "regret") if any(line.get(name) for line in ends.values())]
    rows: list[list[str | Cell]] = []
    for arm, evaluated in zip(compared.arms, compared.measured, strict=True):
        distinct = [_interval(run, "distinct_2") for run in arm.runs]
        row = table1_row(evaluated, distinct=[one for one in distinct if one is not None] if all(distinct) else ())
        cells = [
            estimate_cell(row.reward),
            estimate_cell(row.kl, "{:.2f}"),
            estimate_cell(row.kl_per_token),
            estimate_cell(row.tokens, "{:.1f}"),
            estimate_cell(row.finished, "{:.1%}"),
            estimate_cell(row.distinct),
        ]
        found = [(ends.get(arm.name) or {}).get(name) or {} for name in truths]
        rows.append([arm.name, *cells, *(Cell(one.get("mean"), one.get("low"), one.get("high")) for one in found)])
    columns = ["policy", "reward", "KL (nats a completion)", "KL a token", "tokens", "finished", "distinct-2"]
    columns += [{"gap": "below the exact frontier", "regret": "regret of the objective"}[name] for name in truths]
    text = (
        f"At the last evaluation{', over all seeds' if _has_seeds(compared) else ''}. {_intervals(compared)} KL a "
        "token is the ratio of the sums. Finished: ended by itself, not by the length cap."
    )
    if early := _stopped_early(compared.arms):
        text += f" Before the end of training: {early}."
    groups = [compared.group[arm.name] for arm in compared.arms]
    return [Tables([Table("table1", "At the end of training", columns, rows, text, groups)])]


def stopped(run: Run) -> str:
    """ "stopped at step 5 of 10" of a run that is no cell and whose log ends before what its configuration asks for;
    else empty.

    A run that has generated max_generated_tokens ended on purpose. Whether max_minutes ended one, no file of it tells;
    stopped it has in any case.
    """
    if run.cell is not None:
        return ""
    last: dict[str, Any] = run.metrics[-1] if run.metrics else {"step": 0}
    steps, limit, asked = last["step"], run.config.get("max_generated_tokens"), run.config.get("max_steps")
    if limit is not None and last.get("num_generated_tokens", 0) >= limit:
        return ""
    if asked is None and last.get("epoch") and run.config.get("num_epochs"):  # as `supervised.num_updates`
        asked = max(1, math.ceil(round(run.config["num_epochs"] * steps / last["epoch"], 6)))
    return f"stopped at step {steps} of {asked}" if asked is not None and steps < asked else ""


def _stopped_early(arms: Sequence[Arm]) -> str:
    found = [f"{arm.name}, seed {run.seed}, {words}" for arm in arms for run in arm.runs if (words := stopped(run))]
    return "; ".join(found) if len(found) <= MOST_FINDINGS else f"{len(found)} runs, which the table of runs names"


def _interval(run: Run, name: str) -> Interval | None:
    mean, low, high = quantity(run.evaluations[-1], name) if run.evaluations else (None, None, None)
    return (
        None if mean is None else Interval(mean, math.nan if low is None else low, math.nan if high is None else high)
    )


def last_evaluations(compared: Compared) -> list[Block]:
    """The last evaluation of every run, where nothing better can be said."""
    names = ("reward", "kl", "loss", "perplexity", "accuracy", "length")
    runs = [(arm, run) for arm in compared.arms for run in arm.runs if run.evaluations]
    there = [name for name in names if any(quantity(run.evaluations[-1], name)[0] is not None for _, run in runs)]
    if not runs or not there:
        return []
    rows: list[list[str | Cell]] = [
        [arm.name, str(run.seed), *(Cell(*quantity(run.evaluations[-1], name)) for name in there)] for arm, run in runs
    ]
    groups = [compared.group[arm.name] for arm, _ in runs]
    columns = ["setting", "seed", *("KL" if name == "kl" else name for name in there)]
    return [
        Tables(
            [
                Table(
                    "last_evaluations",
                    "The last evaluation",
                    columns,
                    rows,
                    "95% intervals over held-out rows.",
                    groups,
                )
            ]
        )
    ]


def ablation_blocks(compared: Compared) -> list[Block]:
    """Arms that differ in one word, side by side at the end of training."""
    void = [arm.name for arm in compared.arms if (clip := clip_of(arm)) is not None and clip["void"]]
    notes = [f"Void as an ablation of the clip, for it touched nothing or everything: {', '.join(void)}."]
    told: list[Block] = [Text(notes)] if void else []  # whether or not a setting varies
    if compared.measured is None:
        return told
    ends = {
        arm.name: frontier(one)[-1]
        for arm, one in zip(compared.arms, compared.measured, strict=True)
        if one.has_rewards
    }
    figures: list[Chart | Rows] = []
    words = dict.fromkeys(word for arm in compared.arms for word in arm.settings)
    for word in words:
        if word in CONSEQUENCES or word in ("algorithm", "model"):
            continue
        families = _families([arm for arm in compared.arms if arm.name in ends], word)
        values = [arm.settings.get(word) for family in families for arm in family]
        if not families:
            continue
        if all(is_number(value) and not isinstance(value, bool) for value in values):
            figures += _numeric_ablation(compared, word, families, ends)
        else:
            figures.append(_worded_ablation(compared, word, families, ends))
    if not figures:
        return told
    what = "At the end of training, not at equal KL: a setting that has more reward may only have drifted further."
    return [Text([what, *(notes if void else [])]), Figures(figures)]


def _families(arms: Sequence[Arm], word: str) -> list[list[Arm]]:
    """Arms of one method that differ in this word, and in what follows from it, alone."""
    found: dict[str, list[Arm]] = {}
    for arm in arms:
        rest = {key: value for key, value in arm.settings.items() if key != word and key not in CONSEQUENCES}
        found.setdefault(str((arm.method, rest)), []).append(arm)
    return [family for family in found.values() if len({str(arm.settings.get(word)) for arm in family}) > 1]


def _numeric_ablation(
    compared: Compared, word: str, families: Sequence[Sequence[Arm]], ends: dict[str, Any]
) -> list[Chart | Rows]:
    values = [float(arm.settings[word]) for family in families for arm in family]
    log = min(values) > 0 and max(values) / min(values) >= 4
    charts: list[Chart | Rows] = []
    for key, title, label in (("reward", "reward", "held-out reward"), ("kl", "KL", "KL to the reference (nats)")):
        series = []
        for number, family in enumerate(families, start=1):
            ordered = sorted(family, key=lambda arm: float(arm.settings[word]))
            points = [_ablation_point(arm, word, getattr(ends[arm.name], key)) for arm in ordered]
            name, slot, group = _family_look(compared, family, word, number)
            series.append(Series(name, points, slot=slot, interval="bars", marked=True, group=group))
        charts.append(
            Chart(
                f"ablation-{word}-{key}",
                f"{word}: {title} at the end",
                "Each line varies this setting alone.",
                word,
                label,
                series,
                x_name=word,
                y_name=title,
                x_log=log,
            )
        )
    return charts


def _family_look(compared: Compared, family: Sequence[Arm], word: str, number: int) -> tuple[str, int, str]:
    """Name, slot and group of a family: those of its method where arms have these in common."""
    group = compared.group[family[0].name]
    if all(compared.group[arm.name] == group for arm in family):
        return group, compared.slot[family[0].name], group
    rest = {key: value for key, value in family[0].settings.items() if key not in (word, "algorithm", *CONSEQUENCES)}
    name = ", ".join([family[0].method, *(f"{key} {shown(value)}" for key, value in rest.items())])
    return name, number, name


def _ablation_point(arm: Arm, word: str, estimate: Estimate) -> Point:
    return Point(
        float(arm.settings[word]),
        estimate.mean,
        end(estimate.low),
        end(estimate.high),
        text=counted(len(arm.runs), "seed"),
    )


def _worded_ablation(compared: Compared, word: str, families: Sequence[Sequence[Arm]], ends: dict[str, Any]) -> Rows:
    rows = []
    for family in families:
        for arm in family:
            reward, kl = ends[arm.name].reward, ends[arm.name].kl
            name = (
                f"{arm.method}: {shown(arm.settings.get(word))}" if len(families) > 1 else shown(arm.settings.get(word))
            )
            rows.append(
                RowMark(
                    name,
                    reward.mean,
                    end(reward.low),
                    end(reward.high),
                    slot=compared.slot[arm.name],
                    group=compared.group[arm.name],
                    text=f"{arm.name}, KL {kl.mean:.2f} nats",
                )
            )
    return Rows(
        f"ablation-{word}", f"{word}: reward at the end", "All else alike.", "held-out reward", rows, x_name="reward"
    )
