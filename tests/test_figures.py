"""Figures and tables for papers and spreadsheets: the same as on the page, safe, and the same bytes again."""

from __future__ import annotations

import csv
import io
import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest
from synthetic import make_grid

from pairtune.evidence import comparison_page
from pairtune.evidence import figures as figures_module
from pairtune.evidence.figures import (
    NUM_SLOTS,
    PALETTE,
    Chart,
    Figure,
    HeatMap,
    Point,
    RowMark,
    Rows,
    Series,
    draw,
    file_stem,
    save_figures,
)
from pairtune.evidence.report import make_page, write_report
from pairtune.evidence.tables import Cell, Table, escape_latex, save_tables, to_csv, to_latex

pytest.importorskip("matplotlib")

WILD = "a_b & 50% $x$ \\input{secret} {#1} ~^ <b>"


def chart() -> Chart:
    line = Series(
        WILD, [Point(0, 1, 0.5, 1.5, 0, 0.2, "step 0"), Point(1, 2)], 1, interval="bars", marked=True, group=WILD
    )
    band = Series("band", [Point(0, 0, -1, 1), Point(1, 1, 0, 2)], 2, interval="band", group="band")
    area = Series("area", [Point(0, 1, 0), Point(1, 1, 0)], 3, kind="area", group="area")
    return Chart("fron/tier", "title", "text", "x", "y", [line, band, area])


def every_kind() -> list[Figure]:
    rows = [
        RowMark(WILD, 1.0, 0.5, 1.5, slot=1),
        RowMark("b", 2.0, quantiles=(0.0, 1.0, 2.0, 3.0, 4.0)),
        RowMark("c", None),
    ]
    heat_map = HeatMap("wins", "title", "text", ["a", WILD], [[None, 0.7], [0.3, None]])
    return [chart(), Rows("rows", "title", "text", "x", rows, reference=0.0), heat_map]


def test_every_figure_becomes_svg_and_png(tmp_path: Path) -> None:
    paths = save_figures(every_kind(), tmp_path / "new" / "folder")
    assert [path.name for path in paths] == [
        *("fron-tier.svg", "fron-tier.png", "rows.svg", "rows.png", "wins.svg", "wins.png")
    ]
    for path in paths:
        content = path.read_bytes()
        if path.suffix == ".png":
            assert content.startswith(b"\x89PNG")
            width, height = struct.unpack(">II", content[16:24])
            assert width > 500 < height + 300
        else:
            root = ElementTree.fromstring(content)
            texts = ["".join(element.itertext()).strip() for element in root.iter("{http://www.w3.org/2000/svg}text")]
            assert WILD in texts  # text, neither drawn as outlines nor taken for mathematics
            assert "<dc:date>" not in content.decode()


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert draw(chart()) == draw(chart())


def test_colours_stay_apart_for_eyes_that_do_not_tell_red_from_green() -> None:
    """Contrast to white of at least 3, and distance under simulated deuteranopia (Vienot et al. 1999)."""

    def linear(colour: str) -> list[float]:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]

    def seen(colour: str) -> tuple[float, ...]:
        r, g, b = linear(colour)
        mixed = 0.29275 * r + 0.70725 * g
        return tuple(value ** (1 / 2.4) for value in (mixed, max(0.0, -0.02234 * r + 0.02234 * g + b)))

    for colour in PALETTE:
        r, g, b = linear(colour)
        assert 1.05 / (0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05) >= 3, colour
    own = PALETTE[1:]
    assert len(set(own)) == NUM_SLOTS
    close = [
        (a, b)
        for i, a in enumerate(own)
        for b in own[i + 1 :]
        if sum((x - y) ** 2 for x, y in zip(seen(a), seen(b), strict=True)) ** 0.5 < 0.06
    ]
    # What colours cannot tell apart, markers must.
    markers = [figures_module.MARKERS[1 + own.index(colour)] for pair in close for colour in pair]
    assert len(close) <= 2
    assert len(set(markers)) == len(markers)


def test_a_page_says_the_same_as_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison_page, "MOST_CURVE_POINTS", 1)  # one metric will do: drawing takes time
    runs = make_grid(tmp_path, ("p3o", "ppo"), num_seeds=2, steps=(0, 5, 10))
    page = make_page(runs)
    write_report(runs, tmp_path / "page.html", figures=tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    for figure in page.figures():
        assert {f"{file_stem(figure.key)}.svg", f"{file_stem(figure.key)}.png"} <= names
    for table in page.tables():
        assert {f"{file_stem(table.key)}.csv", f"{file_stem(table.key)}.tex"} <= names
    for group in (page.figures(), page.tables()):  # none overwrites another
        assert len({file_stem(one.key) for one in group}) == len(group)
    table1 = next(table for table in page.tables() if table.key == "table1")
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "table1.csv").read_text())))
    reward = table1.rows[0][1]
    assert isinstance(reward, Cell)
    assert [row["policy"] for row in rows] == ["p3o joint", "ppo"]
    assert float(rows[0]["reward"]) == reward.value  # every digit of it
    assert float(rows[0]["reward low"]) == reward.low < reward.value < float(rows[0]["reward high"])


# -------------------------------------------------------------------------------------------------------------- tables


def table() -> Table:
    rows: list[list[str | Cell]] = [
        [WILD, Cell(0.123456789, 0.1, 0.2), Cell(None)],
        ["=1+1", Cell(-2.0), Cell(0.5, form="{:.0%}")],
    ]
    return Table("t", WILD, ["name", "reward", "share"], rows)


def test_a_table_as_comma_separated_values() -> None:
    rows = list(csv.reader(io.StringIO(to_csv(table()))))
    assert rows[0] == ["name", "reward", "reward low", "reward high", "share"]
    assert rows[1] == [WILD, "0.123456789", "0.1", "0.2", ""]
    assert rows[2] == ["'=1+1", "-2.0", "", "", "0.5"]  # no formula for a spreadsheet; a number is a number


def test_a_table_as_latex() -> None:
    source = to_latex(table())
    assert "\\begin{tabular}{lrr}" in source
    assert "0.123 {\\scriptsize [0.100, 0.200]} & --" in source
    assert "50\\%" in source
    assert source.count("\\\\") == 3 + 0  # header and two rows
    body = source.split("\\midrule")[1].split("\\bottomrule")[0]
    assert escape_latex(WILD) in body
    assert "\\input" not in source
    without_escapes = re.sub(r"\\[a-z]+|\\.", "", body)
    assert not re.search(r"[$#_%~^<>]", without_escapes)
    assert body.count("{") == body.count("}")


def test_latex_prints_special_characters() -> None:
    assert escape_latex("\\{}$&#_%") == "\\textbackslash{}\\{\\}\\$\\&\\#\\_\\%"
    assert escape_latex("~^<>\n") == "\\textasciitilde{}\\textasciicircum{}\\textless{}\\textgreater{} "


def test_tables_are_written_beside_the_figures(tmp_path: Path) -> None:
    assert [path.name for path in save_tables([table()], tmp_path / "out")] == ["t.csv", "t.tex"]
    assert (tmp_path / "out" / "t.csv").read_text() == to_csv(table())


def test_a_key_is_no_path() -> None:
    assert file_stem("../completions/mean length") == "completions-mean-length"
    assert file_stem("///") == "figure"
