"""What `pairtune judge` found, on the page of `pairtune report`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, Browser
from synthetic import EVIL, make_run
from test_report import Page

from pairtune.config import JudgeConfig
from pairtune.errors import PairtuneError
from pairtune.evidence.comparison_judged import MOST_PAIRS_OPEN
from pairtune.evidence.judge import judge
from pairtune.evidence.report import write_report
from pairtune.evidence.runs import JUDGED

pytest.importorskip("jinja2")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("judges.py").write_text(
        "def longer(first, second): return [float(len(a) > len(b)) if len(a) != len(b) else 0.5"
        " for a, b in zip(first, second)]\n"
        "def unsure(first, second): return [None] * len(first)\n"
    )


def comparison(*methods: str) -> str:
    """A folder as `pairtune compare` leaves it, two seeds of each method."""
    for method in methods:
        for seed in range(2):
            cell = {"name": f"{method}-{seed}", "method": method, "seed": seed, "status": "done", "settings": {}}
            make_run(Path("grid/cells", f"{method}-{seed}"), method, seed=seed, cell=cell)
    return "grid"


def judged(*sides: str, output: str, model: str = "judges.py:longer") -> dict[str, Any]:
    return judge(JudgeConfig(sides=list(sides), output_dir=output, judge={"model": model}))  # type: ignore[arg-type]


def completions(name: str, texts: list[str]) -> str:
    rows = [{"prompt": f"Q{n}", "completion": text} for n, text in enumerate(texts)]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_a_comparison_that_was_judged() -> None:
    grid = comparison("p3o", "ppo", "rloo")
    summary = judged(grid, output="grid/judged")
    page = Page(write_report(grid))
    pairs = {(pair["first"], pair["second"]): pair["score"] for pair in summary["pairs"]}
    assert len(pairs) == 3
    heat_map = page.figures["win_matrix-judge1"]
    assert heat_map["names"] == [line["name"] for line in summary["ranking"]]
    place = {name: number for number, name in enumerate(heat_map["names"])}
    for (first, second), score in pairs.items():
        i, j = place[first], place[second]
        for ours, there, mirrored in (("values", "mean", "mean"), ("lows", "low", "high"), ("highs", "high", "low")):
            assert heat_map[ours][i][j] == pytest.approx(score[there], abs=1e-4)
            assert heat_map[ours][j][i] == pytest.approx(1 - score[mirrored], abs=1e-4)
    rows = page.figures["ranking-judge1"]["rows"]
    strengths = [line["strength"]["mean"] for line in summary["ranking"]]
    assert [row["value"] for row in rows] == pytest.approx(strengths, abs=1e-3)
    # A policy has one colour and one switch on the whole page.
    trained = {row["name"]: (row["slot"], row["group"]) for row in page.figures["ranking"]["rows"]}
    assert {row["name"]: (row["slot"], row["group"]) for row in rows}.items() <= trained.items()
    assert "Judged by longer on 12 prompts" in page.text
    assert f"{summary['pairs'][0]['score']['mean']:.1%}" in page.text
    # Naming the folder too says nothing twice; without its result the page has none.
    assert Page(write_report([grid, "grid/judged"], "page.html")).figures.keys() == page.figures.keys()
    Path(grid, "judged", JUDGED).unlink()
    assert "win_matrix-judge1" not in Page(write_report(grid)).figures


def test_two_judges_of_one_comparison_and_a_side_that_is_not_on_the_page() -> None:
    grid = comparison("p3o", "ppo")
    prompts = [line for line in Path("grid/cells/p3o-0/samples.jsonl").read_text().splitlines()]
    texts = {json.dumps(line["prompt"]): line for line in map(json.loads, prompts) if line["split"] == "eval"}
    rows = [{"prompt": line["prompt"], "completion": "x" * 500} for line in texts.values()]
    Path("base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged(grid, "base.jsonl", output="first")
    judged(f"x={grid}/cells/p3o-0", "base.jsonl", output="second", model="judges.py:unsure")
    page = Page(write_report([grid, "first", "second"], "page.html"))
    best = page.figures["ranking-judge1"]["rows"][0]
    assert (best["name"], best["slot"], best["group"]) == ("base", 0, "")
    assert page.figures["win_matrix-judge1"]["values"][0][1:] == [1.0, 1.0]
    assert "win_matrix-judge2" not in page.figures  # not one verdict, so nothing to draw, and the page says so
    assert "Judged by unsure" in page.text
    assert "No verdict from" in page.text


def test_files_alone_make_a_page() -> None:
    a = completions("a.jsonl", ["xx"] * 9 + [EVIL])
    b = completions("b.jsonl", ["yyy"] * 8 + ["y", ""])
    summary = judged(a, b, output="files")
    page = Page(write_report("files"))
    assert list(page.figures) == ["win_matrix-judge1"]
    assert page.figures["win_matrix-judge1"]["names"] == ["b", "a"]  # the winner first
    assert page.figures["win_matrix-judge1"]["values"][0][1] == pytest.approx(0.8)
    assert summary["pairs"][0]["score"]["mean"] == pytest.approx(0.2)
    assert "2 policies before longer" in page.text


def test_many_pairs_are_folded() -> None:
    sides = [completions(f"{name}.jsonl", ["x" * (n + 1)] * 3) for n, name in enumerate("abcdef")]
    judged(*sides, output="files")
    page = Page(write_report("files", figures="paper"))
    assert MOST_PAIRS_OPEN < 15
    assert "all 15 pairs of policies" in page.text
    assert [row["name"] for row in page.figures["ranking-judge1"]["rows"]] == list("fedcba")
    assert len(Path("paper/judge1.csv").read_text().splitlines()) == 16
    assert Path("paper/win_matrix-judge1.svg").is_file()


def test_one_run_that_was_judged() -> None:
    run = str(make_run(Path("p3o")))
    other = str(make_run(Path("other"), seed=1))
    judged(run, other, output="p3o/judged")
    page = Page(write_report(run))
    assert page.figures["win_matrix-judge1"]["names"] in (["p3o", "other"], ["other", "p3o"])
    assert "held-out" in page.text


def test_a_judge_that_wrote_into_the_folder_that_it_judged() -> None:
    """The folder is still the run, or the comparison, whose page it has."""
    run, other = str(make_run(Path("p3o"), steps=(0, 4))), str(make_run(Path("other"), seed=1, steps=(0, 4)))
    before = Page(write_report(run)).figures.keys()
    judged(run, other, output=run)
    assert Page(write_report(run)).figures.keys() == {*before, "win_matrix-judge1"}
    grid = comparison("p3o", "ppo")
    before = Page(write_report(grid)).figures.keys()
    judged(grid, output=grid)
    assert Page(write_report(grid)).figures.keys() == {*before, "win_matrix-judge1"}


def test_the_seeds_of_what_was_judged_are_what_its_intervals_are_over() -> None:
    judged(comparison("p3o", "ppo", "rloo"), output="many")
    judged(*(completions(f"{name}.jsonl", ["x" * n] * 3) for n, name in enumerate("abc", 1)), output="one")
    for folder, over in (("many", "prompts and training seeds together"), ("one", "prompts alone (one seed)")):
        page = Page(write_report(folder))
        assert f"interval over {over}: one policy" in json.dumps(page.figures) + page.text


def test_a_model_that_would_have_said_something_else() -> None:
    judged(completions("a.jsonl", ["xx"] * 3), completions("b.jsonl", ["y"] * 3), output="out")
    content = json.loads(Path("out", JUDGED).read_text())
    words = "would have said something else"
    assert words not in Page(write_report("out")).text
    Path("out", JUDGED).write_text(json.dumps(content | {"mass": 0.01}))
    assert words in Page(write_report("out")).text


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"judge": "x"}'])
def test_what_is_no_result_is_refused(content: str) -> None:
    Path("out").mkdir()
    Path("out", JUDGED).write_text(content)
    with pytest.raises(PairtuneError, match=r"out/judge\.json is (damaged|no result of `pairtune judge`)"):
        write_report("out")
    assert not Path("out/report.html").exists()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
def test_the_heat_map_of_a_judge_is_drawn(tmp_path: Path) -> None:
    grid = comparison("p3o", "ppo", "rloo")
    judged(grid, output="grid/judged")
    page = write_report(grid)
    with Browser(tmp_path / "profile") as browser:
        browser.open(page)
        assert browser.errors == []
        cells = "document.querySelectorAll('[data-figure=win_matrix-judge1] svg text.cell').length"
        assert browser.run(cells) >= 6
        assert browser.run("document.querySelector('nav a[href=\"#judged\"]').textContent") == "Judges"
