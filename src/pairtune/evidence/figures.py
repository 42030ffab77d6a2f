"""What a figure shows, apart from how it is drawn: the page draws it with its own script, papers get SVG and PNG.

One description, two hands: `report.js` draws a `Chart` on the page, `save_figures` draws the same one with matplotlib.
So a figure in a paper cannot say anything else than the page does.
"""

from __future__ import annotations

import importlib.util
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pairtune.errors import PairtuneError
from pairtune.runs.folder import write_atomic

PALETTE = ("#6b7480", "#0072b2", "#c4501b", "#00805a", "#a8457f", "#9a6a00", "#2b8cc4", "#6a4fb3", "#5b4636")
"""Slot 0 is neutral; the others stay apart for eyes that do not tell red from green (after Okabe and Ito, darkened
until each has a contrast of 3 to white). With more lines than colours, marker and dash tell them apart."""
MARKERS = ("o", "o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
"""One for every full round of the palette."""
NUM_SLOTS = len(PALETTE) - 1
WIN_COLOURS = ("#e09a7c", "#ffffff", "#6fa6cc")
"""From always losing to always winning: orange and blue, light enough for black numbers."""


@dataclass(frozen=True)
class Point:
    """A place on a plane, with the ends of its 95% intervals where it has them."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    text: str = ""
    """What it is, besides its numbers: step and seed, say."""


@dataclass(frozen=True)
class Series:
    """Points that belong together."""

    name: str
    points: list[Point]
    slot: int = 0
    """Of the palette; 0 is neutral, for references."""
    kind: Literal["line", "points", "area"] = "line"
    """An area lies between `low` and `y`."""
    interval: Literal["none", "bars", "band"] = "none"
    marked: bool = False
    """Whether a line shows its points."""
    group: str = ""
    """The entry of the legend that it belongs to and is switched with; empty: no entry."""
    faint: bool = False
    """One of several that a bolder series sums up: a seed beside the mean."""
    dashed: bool = False
    """A reference rather than a result."""


@dataclass(frozen=True)
class Chart:
    """A plane with series."""

    key: str
    """Names its file; unique on a page."""
    title: str
    text: str
    x_label: str
    y_label: str
    series: list[Series]
    x_name: str = ""
    """How the axis is called in a few letters, beside a value."""
    y_name: str = ""
    y_range: tuple[float, float] | None = None
    x_range: tuple[float, float] | None = None
    x_log: bool = False
    x_from_zero: bool = False
    """Whether x cannot be below 0, though its intervals may."""
    whole_steps: bool = False
    """Whether x counts something."""


@dataclass(frozen=True)
class RowMark:
    """A row of a `Rows` chart: a value with its interval, or the quantiles of a spread."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    quantiles: tuple[float, float, float, float, float] | None = None
    """5, 25, 50, 75 and 95 percent."""
    slot: int = 0
    group: str = ""
    text: str = ""


@dataclass(frozen=True)
class Rows:
    """One row a name, a common axis below: rankings, spreads, accuracies of parts."""

    key: str
    title: str
    text: str
    x_label: str
    rows: list[RowMark]
    x_name: str = ""
    reference: float | None = None
    """A value to compare with, drawn through all rows."""


@dataclass(frozen=True)
class HeatMap:
    """A square of shares in [0, 1]: how often the row wins against the column."""

    key: str
    title: str
    text: str
    names: list[str]
    values: list[list[float | None]]
    lows: list[list[float | None]] = field(default_factory=list)
    highs: list[list[float | None]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    """Of each name: the entry of the legends that it is switched with."""


Figure = Chart | Rows | HeatMap


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most `most` points of a curve: means of equal bins. More cannot be seen and makes a page heavy."""
    size = max(1, math.ceil(len(points) / most))
    bins = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in bins]


def slots(groups: Sequence[str]) -> dict[str, int]:
    """Group -> its slot from 1, in order; beyond the palette the count goes on and the dash changes."""
    return {group: number for number, group in enumerate(dict.fromkeys(groups), start=1)}


# ------------------------------------------------------------------------------------------------------- for papers


def save_figures(figures: Sequence[Figure], folder: str | Path) -> list[Path]:
    """Writes each figure as <key>.svg and <key>.png into a folder; returns where they are.

    Text in the SVG stays text. The same figure gives the same bytes. Raises PairtuneError if matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise PairtuneError("figures need matplotlib; `pip install 'pairtune[report]'`")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        for suffix, content in draw(figure).items():
            path = folder / f"{file_stem(figure.key)}.{suffix}"
            write_atomic(path, content)
            written.append(path)
    return written


def file_stem(key: str) -> str:
    """A key as a file name: `completions/mean_length` is no folder."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", key).strip("-.") or "figure"


def draw(figure: Figure) -> dict[str, bytes]:
    """A figure as the bytes of an SVG and of a PNG file."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure as Canvas

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": figure.key,
        "font.size": 8.5,
        "text.parse_math": False,  # a name with dollar signs is a name
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "grid.linewidth": 0.5,
        "grid.color": "#e3e5e8",
    }
    with rc_context(style):
        canvas = Canvas(figsize=_size(figure), layout="constrained")
        axes = canvas.subplots()
        if isinstance(figure, Chart):
            _draw_chart(axes, figure)
        elif isinstance(figure, Rows):
            _draw_rows(axes, figure)
        else:
            _draw_heat_map(axes, figure)
        files = {}
        for suffix, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            buffer = io.BytesIO()
            # Tight: the picture grows with its legend, which may be wider or higher than the axes leave room for.
            legend = axes.get_legend()
            shown: dict[str, Any] = {"bbox_inches": "tight", "bbox_extra_artists": [] if legend is None else [legend]}
            canvas.savefig(buffer, format=suffix, dpi=200, metadata=metadata, **shown)
            files[suffix] = buffer.getvalue()
    return files


def _size(figure: Figure) -> tuple[float, float]:
    """Inches: names need room beside what they name."""
    if isinstance(figure, Chart):
        return 5.2, 3.5
    names = [row.name for row in figure.rows] if isinstance(figure, Rows) else figure.names
    label = 0.065 * max(map(len, names), default=0)
    if isinstance(figure, Rows):
        return 4.2 + label, 0.9 + 0.24 * len(names)
    side = 0.46 * len(names) + 0.3
    return side + label, side + 0.75 * label


def colour(slot: int) -> str:
    """The colour of a slot of the palette."""
    return PALETTE[0] if slot == 0 else PALETTE[1 + (slot - 1) % NUM_SLOTS]


def _marker(slot: int) -> str:
    return MARKERS[0] if slot == 0 else MARKERS[1 + (slot - 1) % NUM_SLOTS]


def _dash(slot: int) -> Any:
    return "-" if slot == 0 else DASHES[((slot - 1) // NUM_SLOTS) % len(DASHES)]


def _draw_chart(axes: Any, chart: Chart) -> None:
    from matplotlib.ticker import MaxNLocator

    named: set[str] = set()
    # Many intervals would hide what they belong to.
    num_bars = sum(len(series.points) for series in chart.series if series.interval == "bars")
    pale = min(0.65, max(0.16, 25 / max(1, num_bars)))
    for series in chart.series:
        label = series.group if series.group and series.group not in named and not series.faint else None
        if label is not None:
            named.add(label)
        _draw_series(axes, series, label, pale)
    axes.set_xlabel(chart.x_label)
    axes.set_ylabel(chart.y_label)
    if chart.x_log:
        axes.set_xscale("log")
    elif chart.whole_steps:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    points = [point for series in chart.series for point in series.points]
    if not chart.x_log:
        left, right = chart.x_range or _roomy([(p.x, p.x_low, p.x_high) for p in points])
        axes.set_xlim(max(left, -0.03 * right) if chart.x_from_zero else left, right)
    axes.set_ylim(chart.y_range or _roomy([(p.y, p.low, p.high) for p in points]))
    if len(named) > 1:  # above the axes: inside, it would lie over a line sooner or later
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 1.0),
            ncols=min(3, len(named)),
            frameon=False,
            handlelength=1.6,
            columnspacing=1.2,
            fontsize=7.5,
        ).set_in_layout(False)  # else many names would leave the axes no height


def _roomy(values: list[tuple[float, float | None, float | None]]) -> tuple[float, float]:
    """Room for all values, and for their intervals unless one is so wide that it would press all the rest together."""
    means = [mean for mean, _, _ in values] or [0.0]
    ends = [end for ends in values for end in ends if end is not None] or [0.0]
    width = max(means) - min(means) or abs(means[0]) or 1.0
    low, high = max(min(ends), min(means) - 0.25 * width), min(max(ends), max(means) + 0.25 * width)
    pad = 0.05 * (high - low) or 0.1 * width
    return low - pad, high + pad


def _draw_series(axes: Any, series: Series, label: str | None, pale: float) -> None:
    points, shade = series.points, colour(series.slot)
    x, y = [point.x for point in points], [point.y for point in points]
    lows = [point.y if point.low is None else point.low for point in points]
    highs = [point.y if point.high is None else point.high for point in points]
    alpha = 0.35 if series.faint else 1.0
    if series.kind == "area":
        axes.fill_between(x, lows, y, color=shade, label=label, linewidth=0, step="mid")
        return
    if series.interval == "band":
        axes.fill_between(x, lows, highs, color=shade, alpha=0.15, linewidth=0)
    if series.interval == "bars":
        below, above = [a - b for a, b in zip(y, lows, strict=True)], [b - a for a, b in zip(y, highs, strict=True)]
        left = [point.x - (point.x if point.x_low is None else point.x_low) for point in points]
        right = [(point.x if point.x_high is None else point.x_high) - point.x for point in points]
        spread = {"yerr": [_not_negative(below), _not_negative(above)]}
        if any(left) or any(right):
            spread["xerr"] = [_not_negative(left), _not_negative(right)]
        axes.errorbar(x, y, **spread, fmt="none", ecolor=shade, elinewidth=0.7, alpha=pale)
    axes.plot(
        x,
        y,
        color=shade,
        label=label,
        alpha=alpha,
        linewidth=0.8 if series.faint else 1.4,
        linestyle="none" if series.kind == "points" else (0, (4, 2)) if series.dashed else _dash(series.slot),
        marker=_marker(series.slot) if series.marked or series.kind == "points" or len(points) == 1 else None,
        markersize=2.6 if series.faint else 4,
    )


def _not_negative(values: list[float]) -> list[float]:
    return [max(0.0, value) for value in values]


def _draw_rows(axes: Any, rows: Rows) -> None:
    for place, row in enumerate(rows.rows):
        shade = colour(row.slot)
        if row.quantiles is not None:
            q5, q25, q50, q75, q95 = row.quantiles
            axes.plot([q5, q95], [place, place], color=shade, linewidth=0.9)
            axes.plot([q25, q75], [place, place], color=shade, linewidth=6, alpha=0.4, solid_capstyle="butt")
            axes.plot([q50, q50], [place - 0.28, place + 0.28], color=shade, linewidth=1.6)
        if row.low is not None and row.high is not None:
            axes.plot([row.low, row.high], [place, place], color=shade, linewidth=1.4)
        if row.value is not None:
            axes.plot([row.value], [place], color=shade, marker=_marker(row.slot), markersize=4.5)
    if rows.reference is not None:
        axes.axvline(rows.reference, color=PALETTE[0], linewidth=0.8, linestyle=(0, (4, 2)))
    axes.set_yticks(range(len(rows.rows)), [row.name for row in rows.rows])
    axes.set_ylim(len(rows.rows) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(rows.x_label)


def _draw_heat_map(axes: Any, heat_map: HeatMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    size = len(heat_map.names)
    values = [[math.nan if value is None else 100 * value for value in row] for row in heat_map.values]
    axes.imshow(values, cmap=LinearSegmentedColormap.from_list("wins", WIN_COLOURS), vmin=0, vmax=100)
    for i in range(size):
        for j in range(size):
            if i != j and not math.isnan(values[i][j]):
                axes.text(j, i, f"{values[i][j]:.0f}", ha="center", va="center", fontsize=7.5)
    axes.set_xticks(range(size), heat_map.names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(size), heat_map.names)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
