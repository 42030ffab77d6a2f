"""What judges say of policies, as a page shows it: each result of `pairtune judge`, in pictures and in counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from pairtune.evidence.comparison_wins import Look, interval_of, win_figures
from pairtune.evidence.figures import NUM_SLOTS
from pairtune.evidence.page import Block, Tables, Text
from pairtune.evidence.runs import Line
from pairtune.evidence.tables import Cell, Table
from pairtune.maths.statistics import Interval
from pairtune.runs.display import clean

MOST_PAIRS_OPEN = 10
"""Rows of the table of pairs that stand open on a page; more are folded."""


def judged_blocks(results: Sequence[Line], looks: Mapping[str, Look]) -> list[Block]:
    """Heat map, ranking and counts of each result. `looks` has the colours of the policies that the page knows."""
    return [block for number, result in enumerate(results, 1) for block in _result_blocks(result, number, looks)]


def own_looks(results: Sequence[Line]) -> dict[str, Look]:
    """Colours for a page that has nothing else."""
    names = dict.fromkeys(side["name"] for result in results for side in result["sides"])
    return {name: Look(1 + place % NUM_SLOTS, name) for place, name in enumerate(names)}


def _result_blocks(result: Line, number: int, looks: Mapping[str, Look]) -> list[Block]:
    scores = _scores(result)
    strengths = {
        line["name"]: strength
        for line in result.get("ranking") or ()
        if (strength := interval_of(line["strength"])) is not None
    }
    judge = clean(str(result["judge"]))
    words = f"Judged by {judge} on {result['num_prompts']} prompts, every pair of completions in both orders."
    blocks: list[Block] = [Text([words], quiet=False)]
    if scores:
        blocks += win_figures(
            looks,
            f"-judge{number}",
            "the judge prefers the row's completion to the column's",
            list(strengths) or sorted(dict.fromkeys(name for name, _ in scores), key=partial(_losses, scores)),
            lambda row, column: scores.get((row, column)),
            strengths,
            [side.get("num_seeds", 1) for side in result["sides"]],
        )
    pairs = _pairs(result, number)
    folded = f"all {len(pairs.rows)} pairs of policies" if len(pairs.rows) > MOST_PAIRS_OPEN else ""
    return [*blocks, *_doubts(result), Tables([pairs], folded=folded)]


def _scores(result: Line) -> dict[tuple[str, str], Interval]:
    """How often the first of two policies wins, for every two in either order; without those that have no verdict."""
    scores = {}
    for pair in result["pairs"]:
        if (score := interval_of(pair["score"])) is not None:
            scores[pair["first"], pair["second"]] = score
            scores[pair["second"], pair["first"]] = Interval(1 - score.mean, 1 - score.high, 1 - score.low)
    return scores


def _losses(scores: Mapping[tuple[str, str], Interval], name: str) -> float:
    return sum(score.mean for (_, column), score in scores.items() if column == name)


def _doubts(result: Line) -> list[Block]:
    """What a reader should know before believing the judge."""
    findings = []
    mass = result.get("mass")
    if mass is not None and mass < 0.5:
        findings.append(
            f"A and B together have a probability of {mass:.1%} where the verdict stands: most often the judge would "
            "have said something else, so its choice between them means little."
        )
    for reason, count in (result.get("no_verdict") or {}).items():
        findings.append(f"No verdict from {count} of {result['num_questions']} questions: {clean(str(reason))}")
    return [Text(findings=findings)] if findings else []


def _pairs(result: Line, number: int) -> Table:
    rows: list[list[str | Cell]] = []
    for pair in result["pairs"]:
        counts: list[str | Cell] = [_count(pair[name]) for name in ("wins", "ties", "losses")]
        shares = [_share(pair[name]) for name in ("score", "length_controlled", "position_bias")]
        rows.append([clean(pair["first"]), clean(pair["second"]), *counts, *shares, _count(pair["no_verdict"])])
    columns = ["policy", "against", "won", "tied", "lost", "score", "at equal length", "position bias", "no verdict"]
    text = (
        "Score: share of pairs won, ties half; pairs without a verdict do not count. Position bias: share of pairs of "
        "which the two orders contradict each other, which are ties. At equal length: what a logistic fit on the "
        "difference in length leaves."
    )
    return Table(f"judge{number}", f"Before the judge {clean(str(result['judge']))}", columns, rows, text)


def _share(estimate: Any) -> Cell:
    interval = interval_of(estimate)
    return Cell(None) if interval is None else Cell(*interval, form="{:.1%}")


def _count(value: int) -> Cell:
    return Cell(float(value), form="{:.0f}")
