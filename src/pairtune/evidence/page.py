"""One self-contained page: blocks of words, tables and figures, rendered with their script and their data inside.

The page asks for nothing from outside, and its own policy forbids it to: only the one script and the one style sheet
whose hashes it names may act. Text written by a model reaches the page through the template's escaping or through
`textContent`, never as markup.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from pairtune.errors import PairtuneError
from pairtune.evidence.figures import Chart, Figure, HeatMap, Point, Rows
from pairtune.evidence.tables import Cell, Table
from pairtune.runs.display import clean

Line = dict[str, Any]

DIGITS = 5
"""Significant digits of a number in a figure: finer than a screen can show."""


@dataclass(frozen=True)
class Text:
    """Sentences: the first ones of a section, or findings one below the other."""

    paragraphs: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    quiet: bool = True
    on_screen_only: bool = False
    """For words about what a reader may press."""
    kind: str = "text"


@dataclass(frozen=True)
class Figures:
    """Figures side by side, or one over the whole width."""

    figures: Sequence[Figure]
    wide: bool = False
    kind: str = "figures"


@dataclass(frozen=True)
class Choice:
    """One frame, and a list from which to choose the figure in it."""

    title: str
    label: str
    figures: Sequence[Figure]
    kind: str = "choice"


@dataclass(frozen=True)
class Tables:
    """Tables one below the other; folded ones open on demand."""

    tables: Sequence[Table]
    folded: str = ""
    kind: str = "tables"


@dataclass(frozen=True)
class Completion:
    """What a policy wrote for one prompt."""

    text: str
    reward: float | None
    kl: float | None
    length: int | None
    """Tokens."""
    truncated: bool


@dataclass(frozen=True)
class Policy:
    """A policy whose completions can be read; None where it has none for a prompt."""

    name: str
    completions: list[Completion | None]


@dataclass(frozen=True)
class Completions:
    """The browser of completions: the same prompts for every policy."""

    prompts: list[str]
    policies: list[Policy]
    text: str
    left: int = 0
    right: int = -1
    """The two policies that stand side by side at first."""
    kind: str = "completions"


@dataclass(frozen=True)
class Settings:
    """Names and values, and commands."""

    columns: list[tuple[str, list[tuple[str, str]]]]
    commands: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""
    kind: str = "settings"


Block = Text | Figures | Choice | Tables | Completions | Settings


@dataclass(frozen=True)
class Section:
    """A part of the page, which the line of links at its top names in a word."""

    key: str
    link: str
    title: str
    blocks: list[Block]


@dataclass(frozen=True)
class Page:
    name: str
    verdict: str
    """One sentence a hurried reader may keep."""
    facts: list[tuple[str, str]]
    sections: list[Section]

    def figures(self) -> list[Figure]:
        """All of them, those in lists too."""
        return [figure for block in self._blocks() if isinstance(block, Figures | Choice) for figure in block.figures]

    def tables(self) -> list[Table]:
        return [table for block in self._blocks() if isinstance(block, Tables) for table in block.tables]

    def completions(self) -> Completions | None:
        return next((block for block in self._blocks() if isinstance(block, Completions)), None)

    def _blocks(self) -> list[Block]:
        return [block for section in self.sections for block in section.blocks]


def render(page: Page) -> str:
    """The page as HTML. Raises PairtuneError if jinja2 is missing."""
    if importlib.util.find_spec("jinja2") is None:
        raise PairtuneError("a report needs jinja2; `pip install 'pairtune[report]'`")
    import jinja2
    from markupsafe import Markup

    style, script = _file("report.css"), _file("report.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.tests["cell"] = lambda value: isinstance(value, Cell)
    return environment.from_string(_file("report.html.j2")).render(
        page=page,
        style=Markup(style),
        script=Markup(script),
        data=Markup(json_for_script(_data(page))),
        policy=(
            f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
            "form-action 'none'"
        ),
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def _file(name: str) -> str:
    return resources.files("pairtune.evidence").joinpath(f"templates/{name}").read_text("utf-8")


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def json_for_script(value: Any) -> str:
    """JSON that may stand inside a <script>: no `<`, so neither a tag nor a comment can begin, and no line separator
    that older scripts take for the end of a line. A lone half of a surrogate pair stays the escape that it is."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _data(page: Page) -> Line:
    """What the script reads."""
    completions = page.completions()
    return {
        "figures": {figure.key: _figure(figure) for figure in page.figures()},
        "completions": None if completions is None else _completions(completions),
    }


def _figure(figure: Figure) -> Line:
    values = asdict(figure)
    values["type"] = {Chart: "chart", Rows: "rows", HeatMap: "heat_map"}[type(figure)]
    if isinstance(figure, Chart):
        for series, of_page in zip(figure.series, values["series"], strict=True):
            of_page["points"] = [_point(point) for point in series.points]
    return {name: _rounded(value) for name, value in values.items()}


def _point(point: Point) -> list[Any]:
    """x, y, low, high, x_low, x_high, text without the empty end: most of the page are points."""
    values = [point.x, point.y, point.low, point.high, point.x_low, point.x_high, point.text or None]
    while values[-1] is None:
        values.pop()
    return values


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _completions(completions: Completions) -> Line:
    policies = [
        {"name": policy.name, "completions": [one and asdict(one) for one in policy.completions]}
        for policy in completions.policies
    ]
    return {"prompts": completions.prompts, "policies": _rounded(policies)}


def plain(value: Any) -> str:
    """A setting as a person reads it."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return clean(json.dumps(value, ensure_ascii=False))
    return clean(", ".join(map(str, value)) or "none") if isinstance(value, list) else clean(str(value))
