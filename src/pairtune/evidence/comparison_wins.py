"""Who wins against whom in a comparison, on the same prompts: the win matrix, the ranking, the start among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairtune.evidence.comparison import START, over_what
from pairtune.evidence.comparison_frontier import Compared, PromptKey, end, estimate_cell, places, scored, starts
from pairtune.evidence.figures import HeatMap, RowMark, Rows
from pairtune.evidence.head_to_head import Games, length_controlled, ranking, score_games, win_matrix, win_rate
from pairtune.evidence.page import Block, Figures, Tables, Text
from pairtune.evidence.runs import Arm
from pairtune.evidence.tables import Cell, Table
from pairtune.maths.statistics import Estimate, Interval
from pairtune.runs.display import clean

MOST_POLICIES = 24
"""In the win matrix; its cells could not be read beyond."""
ELO = 400 / math.log(10)


# ------------------------------------------------------------------------------------------------------ head to head


def head_to_head_blocks(compared: Compared) -> list[Block]:
    """The last evaluation of every arm on the same prompts, by the reward of training; then by held-out rewards."""
    arms, left_out = _players(compared.arms)
    scores, lengths = _scores(arms)
    held_out = _held_out(compared)
    if len(scores) < 2:
        return held_out
    games = score_games(scores, lengths, fixed=[START] if START in scores else [])
    matrix, ranked = win_matrix(games), ranking(games)
    if not ranked.names:
        nobody = "No completion has a reward, so that nobody wins against anybody by the reward of training."
        return [Text([nobody]), *held_out]
    strengths = dict(zip(ranked.names, ranked.strengths, strict=True))
    order = [ranked.names[i] for i in ranked.order]
    place = {name: i for i, name in enumerate(matrix.names)}

    def rate(row: str, column: str) -> Interval | None:
        estimate = matrix.rates[place[row]][place[column]]
        return None if estimate is None else Interval(*estimate[:3])

    spans = {name: Interval(*strengths[name][:3]) for name in order}
    when = "the row's completion has a larger reward than the column's"
    figures = win_figures(looks_of(compared), "", when, order, rate, spans, [len(arm.runs) for arm in arms])
    note: list[Block] = [Text([left_out])] if left_out else []
    return [*note, *figures, Tables([_strengths(compared, games, order, strengths)]), *held_out]


class Look(NamedTuple):
    """How a policy is told from others in a figure."""

    slot: int
    """Of the palette; 0 is neutral."""
    group: str
    """The entry of the legend that it is switched with; empty: none."""


NEUTRAL = Look(0, "")


def looks_of(compared: Compared) -> dict[str, Look]:
    return {arm.name: Look(compared.slot[arm.name], compared.group[arm.name]) for arm in compared.arms}


def win_figures(
    looks: Mapping[str, Look],
    key: str,
    when: str,
    order: Sequence[str],
    rate: Callable[[str, str], Interval | None],
    strengths: Mapping[str, Interval],
    seeds: Sequence[int],
) -> list[Block]:
    """Heat map and ranking, in this order of names; without strengths the heat map alone.

    `key` tells several of them on a page apart; `when` says what a win is ("the row's completion has ..."); `seeds` are
    how many each trained policy has, in any order.
    """
    look = [looks.get(name, NEUTRAL) for name in order]
    rates = [[rate(row, column) if row != column else None for column in order] for row in order]

    def grid(place: int) -> list[list[float | None]]:
        return [[None if one is None else end(one[place]) for one in row] for row in rates]

    heat_map = HeatMap(
        f"win_matrix{key}",
        "Who wins how often",
        f"How often {when} on the same prompt, in percent, ties half"
        f"{'; all seeds of one against all seeds of the other' if max(seeds, default=1) > 1 else ''}. The strongest "
        "stands first.",
        list(order),
        grid(0),
        grid(1),
        grid(2),
        [one.group for one in look],
    )
    if not strengths:
        return [Figures([heat_map])]
    marks = [
        RowMark(name, mean, end(low), end(high), **looks.get(name, NEUTRAL)._asdict())
        for name, (mean, low, high) in strengths.items()
    ]
    rows = Rows(
        f"ranking{key}",
        "Ranking",
        f"Bradley-Terry strength with its 95% interval over {over_what(seeds)}: one policy beats another with "
        "probability sigmoid(difference). 0 is the mean of all.",
        "strength (log-odds)",
        marks,
        x_name="strength",
        reference=0.0,
    )
    if len(order) <= 8:
        return [Figures([heat_map, rows])]
    return [Figures([heat_map], wide=True), Figures([rows], wide=True)]


def _strengths(
    compared: Compared, games: dict[tuple[str, str], Games], order: Sequence[str], strengths: dict[str, Estimate]
) -> Table:
    names = {name for pair in games for name in pair}
    against = START if START in names else order[0]
    rows: list[list[str | Cell]] = []
    for name in order:
        pair = _against(games, name, against)
        controlled = None if pair is None or pair.length_differences is None else length_controlled(pair).win_rate
        won = None if pair is None else win_rate(pair)
        row = [
            estimate_cell(strengths[name]),
            estimate_cell(strengths[name], "{:+.0f}", ELO),
            estimate_cell(won, "{:.1%}"),
            estimate_cell(controlled, "{:.1%}"),
        ]
        rows.append([name, *row])
    columns = ["policy", "strength", "Elo points", f"wins against the {against}", "the same at equal length"]
    text = (
        "At equal length: what a logistic fit on the difference in length leaves, after AlpacaEval 2. Training and win "
        "rates use the same reward, so a win here says less than one by a held-out reward or a judge."
    )
    groups = [({START: ""} | compared.group)[name] for name in order]
    return Table("ranking", "Strengths and win rates", columns, rows, text, groups)


def _held_out(compared: Compared) -> list[Block]:
    """The same by rewards that nothing was trained on: `pairtune compare` scores them and keeps the result."""
    found = compared.record.get("held_out") or {}
    names = found.get("names") or []
    if not set(names) <= {START, *compared.group}:
        return []
    place = {name: i for i, name in enumerate(names)}

    def rate(row: str, column: str) -> Interval | None:
        return interval_of(found["rates"][place[row]][place[column]])

    spans = {line["name"]: span for line in found.get("ranking", []) if (span := interval_of(line["strength"]))}
    if len(spans) < 2:
        return []
    functions = ", ".join(clean(str(name)) for name in found.get("reward_funcs", []))
    words = Text([f"By a reward that no policy was trained on: {functions}."], quiet=False)
    when = "the row's completion has a larger held-out reward than the column's"
    seeds = [len(arm.runs) for arm in compared.arms if arm.name in names]
    return [words, *win_figures(looks_of(compared), "-held_out", when, list(spans), rate, spans, seeds)]


def interval_of(estimate: Any) -> Interval | None:
    """An estimate of comparison.json or judge.json; None where it is none."""
    if not isinstance(estimate, dict) or estimate.get("mean") is None:
        return None
    return Interval(*(math.nan if estimate.get(key) is None else estimate[key] for key in ("mean", "low", "high")))


def _against(games: dict[tuple[str, str], Games], name: str, other: str) -> Games | None:
    if (name, other) in games:
        return games[name, other]
    return games[other, name].swapped() if (other, name) in games else None


def _players(arms: Sequence[Arm]) -> tuple[Sequence[Arm], str]:
    """All arms, or where there are too many those of the setting that most methods share; and a sentence on that."""
    if len(arms) <= MOST_POLICIES:
        return arms, ""
    place = places(arms)
    by_place: dict[str, list[Arm]] = {}
    for arm in arms:
        by_place.setdefault(place[arm.name], []).append(arm)
    most = max(len({arm.method for arm in group}) for group in by_place.values())
    fullest = [group for group in by_place.values() if len({arm.method for arm in group}) == most]
    chosen = fullest[len(fullest) // 2][:MOST_POLICIES]
    words = place[chosen[0].name] or "the same settings"
    return chosen, f"Of {len(arms)} policies the {len(chosen)} with {words} play."


def _scores(arms: Sequence[Arm]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """(S, P, K) rewards and lengths of each arm's last evaluation, and of the start, on the prompts that all have."""
    tables = {arm.name: [scored(run) for run in arm.runs] for arm in arms if all(run.evaluations for run in arm.runs)}
    first = starts(arms)
    everyone = [*first[:1], *(table for group in tables.values() for table in group)]
    keys = sorted(set.intersection(*(set(table) for table in everyone))) if everyone else []
    if not tables or not keys:
        return {}, None
    if first:  # it is one policy, so what one run wrote before training will do
        tables = {START: first[:1], **tables}
    both = {name: _filled(group, keys) for name, group in tables.items()}
    lengths = {name: values[..., 1] for name, values in both.items()}
    known = all(bool(values.isfinite().any()) for values in lengths.values())
    return {name: values[..., 0] for name, values in both.items()}, lengths if known else None


def _filled(tables: Sequence[dict[PromptKey, list[tuple[float, float]]]], keys: Sequence[PromptKey]) -> Tensor:
    """(S, P, K, 2), NaN where a prompt has fewer completions than another."""
    most = max(len(table[key]) for table in tables for key in keys)
    nothing = [(math.nan, math.nan)]
    rows = [[table[key] + nothing * (most - len(table[key])) for key in keys] for table in tables]
    return torch.tensor(rows, dtype=torch.float64)
