"""report.html: whole, self-contained, and safe against what a model may write."""

from __future__ import annotations

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from pairtune.errors import PairtuneError
from pairtune.evidence import report
from pairtune.evidence.report import write_report
from pairtune.runs.metrics import read_jsonl

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

EVIL = '<script>alert("x")</script><img src=x onerror=alert(1)>\x1b[31m{{ 7 * 7 }}'
TITLES = ["Reward", "KL to the reference", "Reward against KL", "Clip ratio", "Length", "Where the time goes"]


def interval(mean: float, width: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - width, "high": mean + width}


def step(number: int) -> dict[str, Any]:
    return {
        "step": number,
        "reward": 0.2 + 0.01 * number,
        "kl": 0.1 * number,
        "completions/mean_length": 27.0,
        "completions/clipped_ratio": 0.5,
        "clip_ratio/pass_1": 0.0,
        "clip_ratio/pass_2": 0.3,
        "num_tokens": 1000 * number,
        "step_time": 10.0,
        "time/sample": 4.0,
        "time/update": 5.0,
        "time/evaluate": 7.0,
        "time/<b>": 5.0,
    }


def evaluation(number: int, reward: float) -> dict[str, Any]:
    quantities = {"kl": interval(0.1 * number), "length": interval(27.0), "truncated": interval(0.5)}
    return {"step": number, "num_prompts": 72, "reward": interval(reward), **quantities}


def sample(number: int, row: int, completion: str, prompt: Any = "Say it", **extra: Any) -> dict[str, Any]:
    fields = {"step": number, "split": "eval", "row": row, "completion_index": 0, "prompt": prompt}
    return fields | {"completion": completion, "reward": 0.5, "truncated": False} | extra


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def fill(path: Path) -> Path:
    path.mkdir()
    (path / "config.yaml").write_text(
        yaml.safe_dump({"algorithm": "p3o", "model": EVIL, "stop": [], "p3o": {"clip": "joint"}})
    )
    (path / "environment.json").write_text(
        json.dumps({"torch": "9.9", "command": f"pairtune train {EVIL}", "resumed": [{}]})
    )
    write(path / "metrics.jsonl", [step(i) for i in range(1, 7)])
    write(path / "evaluations.jsonl", [evaluation(0, 0.2), evaluation(3, 0.3), evaluation(6, 0.5)])
    samples = [sample(0, row, f"early {row}") for row in range(12)]
    samples += [sample(3, row, f"middle {row}") for row in range(12)]
    samples += [sample(6, row, EVIL if row == 0 else f"last {row}", EVIL, truncated=True) for row in range(11)]
    samples += [sample(6, 0, "from training", split="train")]
    write(path / "samples.jsonl", samples)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill(tmp_path / "my run")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a whole run, made once: drawing takes seconds."""
    return Page(write_report(fill(tmp_path_factory.mktemp("reports") / "my run")))


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; checks that the tags nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert self._open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words.append(data)


def test_a_report_holds_numbers_curves_samples_and_settings(page: Page) -> None:
    assert (
        "Held-out reward rose by 0.300, at 0.60 nats of KL to the reference; the two 95% intervals lie apart."
        in page.text
    )
    assert "0.200 [0.100, 0.300]" in page.text
    assert "+0.300" in page.text
    assert "over 72 prompts" in page.text
    assert page.tags.count("svg") == len(TITLES)
    for title in TITLES:
        assert title in page.text
    for label in (
        "step",
        "reward",
        "KL (nats a completion)",
        "pairs past the clip edge (%)",
        "seconds a step",
        "length (tokens)",
    ):
        assert label in page.words, label
    assert "sample" in page.words
    assert "evaluate" not in page.words
    assert "p3o.clip" in page.text
    assert "torch" in page.text
    assert "Resumed 1 time;" in page.text
    assert "pairtune report 'my run'" in page.text
    assert "1:00" in page.text
    assert "6,000" in page.text
    # rows that both ends have, the first in the order of the data set beside the last; nothing of the middle
    assert "The first 11 of 11 held-out completions" in page.text
    assert "step 0 beside step 6" in page.text
    assert "early 10" in page.text
    assert "last 10" in page.text
    assert "unfinished" in page.text
    assert "3 more" in page.text
    for absent in ("middle", "early 11", "from training"):
        assert absent not in page.text


def test_what_a_model_wrote_is_text(page: Page) -> None:
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert (
        page.text.count('<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}') >= 4
    )  # model, command, prompt, completion
    assert "\x1b" not in page.source


def test_the_page_asks_for_nothing_from_outside(page: Page) -> None:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert ("content", policy) in page.attributes
    links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(value is not None and value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert "/reports" not in page.source  # nor names folders of this machine


def test_colours_follow_the_page_and_no_placeholder_is_left(page: Page) -> None:
    source = page.source
    assert "var(--series-2)" in source
    assert "prefers-color-scheme: dark" in source
    assert not re.search(r"#0[1-4]0[0-9]{3}", source)
    svg = re.findall(r"<svg.*?</svg>", source, re.DOTALL)
    ids = [name for figure in svg for name in re.findall(r' id="([^"]+)"', figure)]
    assert len(ids) == len(set(ids))
    assert all(f'href="#{name}"' in source or f"url(#{name})" in source for name in ids)


def test_one_step_and_nothing_else_is_enough(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [step(1)])
    page = Page(write_report(tmp_path, tmp_path / "deep" / "page.html"))
    assert "was not evaluated on held-out prompts" in page.text
    assert page.tags.count("svg") == len(TITLES) - 1  # no plane without evaluations


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: tiny\n")
    assert Page(write_report(tmp_path)).tags.count("svg") == 0
    write(tmp_path / "evaluations.jsonl", [evaluation(0, 0.2)])
    page = Page(write_report(tmp_path))
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert "evaluated once" in page.text
    assert page.tags.count("svg") == 4


def test_nulls_and_torn_lines_are_gaps(run: Path) -> None:
    lines = [step(1), step(2) | {"reward": None, "kl": None, "step_time": None, "time/sample": None}, step(3)]
    write(run / "metrics.jsonl", lines)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    bare = {
        "step": 6,
        "reward": {"mean": 0.1, "low": None, "high": None},
        "kl": {"mean": None, "low": None, "high": None},
    }
    write(run / "evaluations.jsonl", [evaluation(0, 0.2), bare])
    page = Page(write_report(run))
    assert "Held-out reward fell by 0.100." in page.text
    assert page.tags.count("svg") == len(TITLES)


@pytest.mark.parametrize(("spread", "words"), [(0.01, "excludes zero"), (0.9, "includes zero")])
def test_the_change_is_paired_by_prompt_where_every_prompt_is_there(run: Path, spread: float, words: str) -> None:
    write(
        run / "evaluations.jsonl", [evaluation(0, 0.2) | {"num_prompts": 8}, evaluation(6, 0.25) | {"num_prompts": 8}]
    )
    after = [0.1 + 0.1 * row + 0.05 + spread * (-1) ** row for row in range(8)]
    lines = [sample(0, row, "x", reward=0.1 + 0.1 * row) for row in range(8)]
    lines += [sample(6, row, "y", reward=after[row]) for row in range(8)]
    write(run / "samples.jsonl", lines)
    _, mean, low, high = report.reward_change(
        *(read_jsonl(run / f"{name}.jsonl") for name in ("evaluations", "samples"))
    )
    assert mean == pytest.approx(0.05)
    assert low == pytest.approx(0.05 - 2 * spread / 8**0.5, abs=spread / 5)
    text = Page(write_report(run)).text
    assert f"interval of the change, [{low:.3f}, {high:.3f}], {words}." in text
    assert f"+0.050 [{low:.3f}, {high:.3f}]" in text


def test_no_change_is_paired_where_prompts_are_missing() -> None:
    both = [evaluation(0, 0.2) | {"num_prompts": 2}, evaluation(6, 0.3) | {"num_prompts": 2}]
    whole = [sample(step, row, "x") for step in (0, 6) for row in (0, 1)]
    assert report.reward_change(both, whole) is not None
    assert report.reward_change(both, whole[:-1]) is None  # the last step lacks a prompt
    assert report.reward_change(both, [line for line in whole if line["row"] == 0]) is None  # only a part was kept
    assert report.reward_change(both[:1], whole) is None


def test_overlapping_intervals_are_said_to_overlap(run: Path) -> None:
    write(run / "evaluations.jsonl", [evaluation(0, 0.2), evaluation(6, 0.35)])
    assert "the two 95% intervals overlap." in Page(write_report(run)).text


def test_without_held_out_samples_those_of_training_are_shown(run: Path) -> None:
    write(run / "samples.jsonl", [sample(i, 0, f"training {i}", split="train") for i in (1, 2)])
    text = Page(write_report(run)).text
    assert "Completions of step 2." in text
    assert "training 2" in text
    assert "training 1" not in text


def test_a_long_run_makes_a_small_page(run: Path) -> None:
    write(run / "metrics.jsonl", [step(i) for i in range(1, 5001)])
    assert len(write_report(run).read_bytes()) < 300_000
    assert len(report._thin(list(range(5000)), list(range(5000)))[0]) <= report.MAX_POINTS
    assert report._thin([1, 2], [3, 4]) == ([1, 2], [3, 4])


def test_what_is_no_run_folder_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(PairtuneError, match=r"there is no run folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PairtuneError, match=r"empty is no run folder: it has no config\.yaml"):
        write_report(tmp_path / "empty")
    with pytest.raises(PairtuneError, match="is a folder; give the report a file name"):
        write_report(run, tmp_path)


def test_a_damaged_file_is_named(run: Path) -> None:
    (run / "environment.json").write_text("{")
    with pytest.raises(PairtuneError, match=r"environment\.json is damaged"):
        write_report(run)


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_a_missing_package_is_named_with_its_mend(run: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(PairtuneError, match=rf"a report needs {package}; `pip install 'pairtune\[report\]'`"):
        write_report(run)
