"""A table of results, as the page shows it and as papers and spreadsheets take it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pairtune.evidence.figures import file_stem
from pairtune.runs.folder import write_atomic


@dataclass(frozen=True)
class Cell:
    """A number with the ends of its 95% interval, where it has one."""

    value: float | None
    low: float | None = None
    high: float | None = None
    form: str = "{:.3f}"

    @property
    def text(self) -> str:
        """The number alone; a dash where there is none."""
        return "–" if self.value is None else self.form.format(self.value)

    @property
    def interval(self) -> str:
        """`[low, high]`, or nothing."""
        if self.value is None or self.low is None or self.high is None:
            return ""
        unsigned = self.form.replace(":+", ":").removesuffix(" points")
        return f"[{unsigned.format(self.low)}, {unsigned.format(self.high)}]"


@dataclass(frozen=True)
class Table:
    """Rows of words and numbers under one title."""

    key: str
    """Names its file; unique on a page."""
    title: str
    columns: list[str]
    rows: list[list[str | Cell]]
    text: str = ""
    """What the columns mean."""
    groups: list[str] | None = None
    """Of each row: the entry of the legend that it is switched with."""


def save_tables(tables: Sequence[Table], folder: str | Path) -> list[Path]:
    """Writes each table as <key>.csv and <key>.tex into a folder; returns where they are."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for suffix, content in (("csv", to_csv(table)), ("tex", to_latex(table))):
            path = folder / f"{file_stem(table.key)}.{suffix}"
            write_atomic(path, content)
            written.append(path)
    return written


def to_csv(table: Table) -> str:
    """Comma-separated values, a header first. A number keeps all its digits; a column with intervals has two more, its
    low and its high end. What is not there is empty. A text that a spreadsheet would take for a formula gets a quote
    before it."""
    wide = [any(isinstance(row[i], Cell) and row[i].interval for row in table.rows) for i in range(len(table.columns))]  # type: ignore[union-attr]
    header = []
    for name, spread in zip(table.columns, wide, strict=True):
        header += [name, f"{name} low", f"{name} high"] if spread else [name]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(map(_inert, header))
    for row in table.rows:
        values: list[str] = []
        for cell, spread in zip(row, wide, strict=True):
            if isinstance(cell, Cell):
                ends = (cell.value, cell.low, cell.high) if spread else (cell.value,)
                values += ["" if number is None else repr(float(number)) for number in ends]
            else:
                values += [_inert(cell), "", ""] if spread else [_inert(cell)]
        writer.writerow(values)
    return buffer.getvalue()


def _inert(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def to_latex(table: Table) -> str:
    """A LaTeX `table` with booktabs rules; the interval stands small behind its number."""
    numeric = [
        bool(table.rows) and all(isinstance(row[i], Cell) for row in table.rows) for i in range(len(table.columns))
    ]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{table}",
        "  \\centering",
        f"  \\caption{{{escape_latex(table.title)}. Brackets: 95\\% interval.}}",
        f"  \\begin{{tabular}}{{{''.join('r' if right else 'l' for right in numeric)}}}",
        "    \\toprule",
        f"    {' & '.join(map(escape_latex, table.columns))} \\\\",
        "    \\midrule",
        *(f"    {' & '.join(map(_latex_cell, row))} \\\\" for row in table.rows),
        "    \\bottomrule",
        "  \\end{tabular}",
        "\\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _latex_cell(cell: str | Cell) -> str:
    if not isinstance(cell, Cell):
        return escape_latex(cell)
    # A bracket at the start of a cell could be taken for the optional argument of \\ before it; the number is first.
    interval = f" {{\\scriptsize {escape_latex(cell.interval)}}}" if cell.interval else ""
    return escape_latex(cell.text).replace("–", "--") + interval


_SPECIAL = {
    "\\": "\\textbackslash{}", "{": "\\{", "}": "\\}", "$": "\\$", "&": "\\&", "#": "\\#", "_": "\\_", "%": "\\%",
    "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "<": "\\textless{}", ">": "\\textgreater{}", "\n": " ",
}  # fmt: skip


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it is and never obeys."""
    return re.sub(r"[\\{}$&#_%~^<>\n]", lambda match: _SPECIAL[match.group()], text)
