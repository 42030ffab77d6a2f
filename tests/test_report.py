"""report.html: whole, self-contained, and safe against what a model may write. What it draws: test_report_page.py."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from synthetic import EVIL, make_grid, make_run

from pairtune.errors import PairtuneError
from pairtune.evidence import report, run_page
from pairtune.evidence.comparison_frontier import compare_arms, matches_of, stopped, verdict_sentence
from pairtune.evidence.figures import thin
from pairtune.evidence.page import json_for_script
from pairtune.evidence.report import write_report
from pairtune.evidence.runs import group_arms, read_run, read_runs
from pairtune.runs.metrics import read_jsonl

pytest.importorskip("jinja2")

WILD = '<script>alert("x")</script><img src=x onerror=alert(1)>\x1b[31m{{ 7 * 7 }}'
TITLES = [
    *("Reward", "KL to the reference", "Reward against KL", "Clip ratio", "Length", "Unfinished completions"),
    "Where the time goes",
]


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
        "grad_norm": 1.23456789,
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
    config = {"algorithm": "p3o", "model": WILD, "stop": [], "p3o": {"clip": "joint"}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    environment = {"torch": "9.9", "command": f"pairtune train {WILD}", "resumed": [{}]}
    (path / "environment.json").write_text(json.dumps(environment))
    write(path / "metrics.jsonl", [step(i) for i in range(1, 7)])
    write(path / "evaluations.jsonl", [evaluation(0, 0.2), evaluation(3, 0.3), evaluation(6, 0.5)])
    samples = [sample(0, row, f"early {row}", WILD) for row in range(12)]
    samples += [sample(3, row, f"middle {row}", WILD) for row in range(12)]
    samples += [sample(6, row, WILD if row == 0 else f"last {row}", WILD, truncated=True) for row in range(11)]
    samples += [sample(6, 0, "from training", split="train")]
    write(path / "samples.jsonl", samples)
    return path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return fill(tmp_path / "my run")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(fill(tmp_path_factory.mktemp("reports") / "my run")))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = tmp_path_factory.mktemp("comparison")
    runs = make_grid(folder, ("p3o", "ppo"), (0.02, 0.1), num_seeds=2)
    return Page(write_report(runs, folder / "page.html"))


class Page(HTMLParser):
    """Tags, attributes, visible text and data of a page; checks that the tags nest."""

    VOID = frozenset({"meta", "br", "img", "link", "input", "hr"})

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.hidden: dict[str, list[str]] = {"style": [], "script": []}
        self._open: list[str] = []
        self.source = path.read_text("utf-8")
        self.feed(self.source)
        assert self._open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))
        data, self.script = self.hidden["script"]
        self.data = json.loads(data)
        self.figures: dict[str, Any] = self.data["figures"]

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
        if self._open and self._open[-1] in self.hidden:
            self.hidden[self._open[-1]].append(data)
        else:
            self.words.append(data)


# ----------------------------------------------------------------------------------------------------------- one run


def test_a_report_holds_numbers_curves_samples_and_settings(page: Page) -> None:
    verdict = "Held-out reward rose by 0.300, at 0.60 nats of KL to the reference; the two 95% intervals lie apart."
    assert verdict in page.text
    for words in (
        *("0.200 [0.100, 0.300]", "+0.300", "over 72 prompts", "p3o.clip", "torch", "Resumed 1 time;"),
        *("pairtune report 'my run'", "1:00", "6,000"),
    ):
        assert words in page.text, words
    titles = [figure["title"] for figure in page.figures.values()]
    assert titles[: len(TITLES)] == TITLES
    assert {figure["x_label"] for figure in page.figures.values()} >= {
        "step",
        "KL to the reference (nats a completion)",
    }
    assert titles[len(TITLES)] == "grad_norm"  # any other metric of the log can be chosen
    assert page.figures["metric-grad_norm"]["series"][0]["points"][0] == [1.0, 1.2346]  # as fine as a screen can show
    time = {series["name"] for series in page.figures["time"]["series"]}
    assert time == {"sample", "update", "other"}  # nothing that stands between two steps, no name that is no phase
    held_out = page.figures["reward"]["series"][1]
    assert held_out["points"] == [[0.0, 0.2, 0.1, 0.3], [3.0, 0.3, 0.2, 0.4], [6.0, 0.5, 0.4, 0.6]]


def test_the_browser_has_what_both_ends_have_in_the_order_of_the_data_set(page: Page) -> None:
    completions = page.data["completions"]
    assert [policy["name"] for policy in completions["policies"]] == ["step 0", "step 3", "step 6"]
    texts = [[one and one["text"] for one in policy["completions"]] for policy in completions["policies"]]
    assert texts[0] == [f"early {row}" for row in range(12)]
    assert texts[2][1:] == [*(f"last {row}" for row in range(1, 11)), None]
    assert completions["policies"][2]["completions"][1]["truncated"] is True
    assert "from training" not in page.source
    assert "The first completion of each of the 12 held-out prompts, in the order of the data set" in page.text


def test_what_a_model_wrote_is_text(page: Page, comparison: Page) -> None:
    for one in (page, comparison):
        assert one.tags.count("script") == 2  # the data and the page's own
        assert one.source.count("</script>") == 2
        assert "img" not in one.tags
        assert not [name for name, _ in one.attributes if name.startswith("on")]
        assert "\x1b" not in one.source
        assert "\u2028" not in one.source
    shown = '<script>alert("x")</script><img src=x onerror=alert(1)>{{ 7 * 7 }}'
    assert page.text.count(shown) >= 2  # model and command; prompt and completion are in the data:
    assert page.data["completions"]["policies"][2]["completions"][0]["text"] == shown
    assert EVIL in comparison.data["completions"]["prompts"]


def test_json_inside_a_script_cannot_leave_it() -> None:
    value = {"</script>": "<!-- <script> ]]> & \u2028\u2029 \ud800"}
    text = json_for_script(value)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert text.isascii()
    assert json.loads(text) == value
    with pytest.raises(ValueError):
        json_for_script(float("nan"))  # JSON.parse would refuse the page's data


def test_the_page_asks_for_nothing_and_runs_its_own_script_alone(page: Page) -> None:
    def named(content: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"

    policy = next(value for name, value in page.attributes if name == "content" and "default-src" in str(value))
    style = "".join(page.hidden["style"])
    expected = f"default-src 'none'; style-src {named(style)}; script-src {named(page.script)};"
    assert policy == f"{expected} base-uri 'none'; form-action 'none'"
    links = [str(value) for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert links
    assert all(value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#|\$)|@import|https?://(?!www\.w3\.org/2000/svg)", page.source)
    assert "style" not in [name for name, _ in page.attributes]  # the policy would refuse it
    assert "/reports" not in page.source  # nor does it name folders of this machine


def test_one_step_and_nothing_else_is_enough(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [step(1)])
    page = Page(write_report(tmp_path, tmp_path / "deep" / "page.html"))
    assert "was not evaluated on held-out prompts" in page.text
    titles = [figure["title"] for figure in page.figures.values()]
    assert titles[: len(TITLES) - 1] == [title for title in TITLES if title != "Reward against KL"]


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: tiny\nalgorithm: p3o\n")
    assert Page(write_report(tmp_path)).figures == {}
    write(tmp_path / "evaluations.jsonl", [evaluation(0, 0.2)])
    page = Page(write_report(tmp_path))
    assert write_report(tmp_path) == tmp_path / "report.html"
    assert "evaluated once" in page.text
    assert list(page.figures) == ["reward", "kl", "frontier", "length", "unfinished"]


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
    assert page.figures["reward"]["series"][0]["points"] == [[1.0, 0.21], [3.0, 0.23]]
    assert page.figures["reward"]["series"][1]["points"] == [[0.0, 0.2, 0.1, 0.3], [6.0, 0.1]]


@pytest.mark.parametrize(("spread", "words"), [(0.01, "excludes zero"), (0.9, "includes zero")])
def test_the_change_is_paired_by_prompt_where_every_prompt_is_there(run: Path, spread: float, words: str) -> None:
    write(
        run / "evaluations.jsonl", [evaluation(0, 0.2) | {"num_prompts": 8}, evaluation(6, 0.25) | {"num_prompts": 8}]
    )
    after = [0.1 + 0.1 * row + 0.05 + spread * (-1) ** row for row in range(8)]
    lines = [sample(0, row, "x", reward=0.1 + 0.1 * row) for row in range(8)]
    lines += [sample(6, row, "y", reward=after[row]) for row in range(8)]
    write(run / "samples.jsonl", lines)
    change = report.reward_change(*(read_jsonl(run / f"{name}.jsonl") for name in ("evaluations", "samples")))
    assert change is not None
    _, mean, low, high = change
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
    page = Page(write_report(run))
    assert "Completions of step 2, from training." in page.text
    (policy,) = page.data["completions"]["policies"]
    assert [one["text"] for one in policy["completions"]] == ["training 2"]


def test_a_long_run_makes_a_small_page(run: Path) -> None:
    write(run / "metrics.jsonl", [step(i) for i in range(1, 5001)])
    assert len(write_report(run).read_bytes()) < 300_000
    assert len(thin([(i, i) for i in range(5000)], 300)) <= 300
    assert thin([(1, 3), (2, 4)], 300) == [(1, 3), (2, 4)]


def test_an_older_run_without_kl_and_tokens_is_shown(run: Path) -> None:
    page = Page(write_report(run))
    assert page.data["completions"]["policies"][0]["completions"][0] == {
        **{"text": "early 0", "reward": 0.5, "kl": None, "length": None, "truncated": False}
    }
    assert "reward_spread" in page.figures
    assert "length_spread" not in page.figures


# --------------------------------------------------------------------------------------------------- other stages


def supervised(path: Path, config: dict[str, Any], lines: list[dict[str, Any]], ends: list[dict[str, Any]]) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"model": "tiny", "dataset": "d", **config}))
    write(path / "metrics.jsonl", lines)
    write(path / "evaluations.jsonl", ends)
    return path


def test_a_run_of_fine_tuning_shows_loss_and_perplexity(tmp_path: Path) -> None:
    lines = [
        {"step": i, "loss": 3.0 - 0.1 * i, "perplexity": 20.0 - i, "grad_norm": 1.0, "step_time": 1.0}
        for i in range(1, 9)
    ]
    ends = [
        {"step": number, "num_examples": 1234, "loss": interval(loss), "perplexity": interval(10 * loss)}
        for number, loss in ((0, 3.0), (8, 2.2))
    ]
    page = Page(write_report(supervised(tmp_path / "sft", {"max_length": 64}, lines, ends)))
    assert "Held-out loss fell from 3.000 to 2.200 nats a token [2.100, 2.300]" in page.text
    assert "the two 95% intervals lie apart." in page.text
    assert "1,234" in page.text
    assert list(page.figures) == ["loss", "perplexity", "time", "metric-grad_norm"]
    assert "22.00 [21.90, 22.10]" in page.text
    assert page.data["completions"] is None


def pair_report(beats: bool = True) -> dict[str, Any]:
    part = {"low": 0.1, "high": 0.4, "num_pairs": 50, "predicted": 0.6, "accuracy": interval(0.65)}
    rule = {"accuracy": interval(0.55), "model_minus_baseline": interval(0.15)}
    some = {"num_pairs": 100, "accuracy": interval(0.7)}
    length = {
        "chosen_longer": some,
        "chosen_shorter": some,
        "equal_length": {"num_pairs": 0, "accuracy": interval(0.0)},
    }
    length |= {"longer_wins": rule, "shorter_wins": rule, "pearson_within_pairs": 0.3, "spearman_within_pairs": None}
    evaluation: dict[str, Any] = {"beats_length_baselines": beats, "num_pairs": 200, "accuracy": interval(0.7)}
    evaluation |= {"log_likelihood": interval(-0.5), "temperature": interval(1.2), "expected_calibration_error": 0.04}
    evaluation |= {"reliability": [part, part | {"predicted": 0.9}], "by_margin": [part], "length": length}
    return {"dataset": {"train": "tldr"}, "left_out": {"train": [f"3 rows {WILD}"]}, "evaluation": evaluation}


@pytest.mark.parametrize("beats", [True, False])
def test_a_run_of_reward_learning_shows_what_the_model_is_worth(tmp_path: Path, beats: bool) -> None:
    lines = [{"step": i, "loss": 0.6, "accuracy": 0.6, "margin": 0.1, "step_time": 1.0} for i in range(1, 5)]
    ends = [{"step": 4, "num_pairs": 200, "accuracy": interval(0.7), "log_likelihood": interval(-0.5)}]
    path = supervised(tmp_path / "reward", {"reward": {"loss": "pairwise"}}, lines, ends)
    (path / "reward_report.json").write_text(json.dumps(pair_report(beats)))
    page = Page(write_report(path))
    assert "Held-out accuracy is 70.0% [60.0%, 80.0%]." in page.text
    assert ("is better than both rules of length" in page.text) == beats
    assert ("is not shown to be better" in page.text) != beats
    assert list(page.figures)[:2] == ["accuracy_parts", "reliability"]
    rows = {row["name"]: row for row in page.figures["accuracy_parts"]["rows"]}
    assert rows["all pairs"]["value"] == 70.0
    assert "both are of one length" not in rows  # no pair is
    assert rows["margin 0.1 to 0.4"]["low"] == 55.0
    assert page.figures["reliability"]["series"][1]["points"][1][:2] == [90.0, 65.0]
    assert page.figures["accuracy"]["series"][0]["points"][0] == [1.0, 60.0]
    assert "+15.0 points [5.0, 25.0]" in page.text
    assert "3 rows <script>" in page.text
    assert "tldr" in page.text


# ------------------------------------------------------------------------------------------------------- comparisons


def test_a_comparison_holds_all_that_several_runs_say(comparison: Page) -> None:
    keys = list(comparison.figures)
    for key in ("frontier", "frontier-ends", "win_matrix", "ranking", "ablation-beta-reward", "ablation-beta-kl"):
        assert key in keys, key
    for title in (
        *("Reward at equal drift", "More reward at the same KL?", "Strengths and win rates", "At the end of training"),
        *("What every run spent", "What differs", "The same in all"),
    ):
        assert title in comparison.text, title
    assert "At matched KL" in comparison.text
    names = ["p3o joint, beta 0.02", "p3o joint, beta 0.1", "ppo, beta 0.02", "ppo, beta 0.1"]
    groups = dict.fromkeys(series["group"] for series in comparison.figures["frontier"]["series"])
    assert list(groups)[:4] == names
    seeds = [series for series in comparison.figures["frontier"]["series"] if series["faint"]]
    assert len(seeds) == 8  # seeds stand apart from the mean
    assert all(len(point) == 7 for point in seeds[0]["points"])  # with intervals of their own, and their number
    assert seeds[1]["points"][2][6] == "step 20, seed 1 alone"
    assert "step 20, mean of seeds 0, 1" in json.dumps(comparison.figures["frontier"])
    wins = comparison.figures["win_matrix"]
    assert set(wins["names"]) == {"starting policy", *names}
    assert all(
        wins["values"][i][j] + wins["values"][j][i] == pytest.approx(1, abs=2e-5) for i in range(5) for j in range(i)
    )


def headline(runs: list[Path]) -> str:
    compared = compare_arms(group_arms(read_runs(runs)), {})
    return verdict_sentence(compared, matches_of(compared))


def test_the_headline_counts_settings_at_which_both_methods_were_run(tmp_path: Path) -> None:
    words: dict[str, Any] = {"num_seeds": 3, "steps": (0, 4)}
    p3o = make_grid(tmp_path, ("p3o",), (0.02, 0.05, 0.1), **words)
    raft = make_grid(tmp_path, ("raft",), (0.02, 0.05, 0.1), **words)
    sentence = "At matched KL, confirmed over prompts and training seeds, p3o joint has more reward than raft (at {})."
    assert headline([*p3o, *raft]) == sentence.format("3 of 3 settings")
    # Whichever is named first, in whatever order the settings come.
    assert headline([*p3o[:3], *raft, *p3o[3:]]) == sentence.format("3 of 3 settings")
    # Where they have none in common the pairs count, and are called that.
    assert headline([*p3o[:6], *raft[6:]]) == sentence.format("2 of 2 pairs of settings")


def test_intervals_of_single_seeds_are_said_to_be_over_prompts_alone(tmp_path: Path, comparison: Page) -> None:
    runs = make_grid(tmp_path, ("p3o", "ppo"), (0.02, 0.1), num_seeds=1, steps=(0, 4))
    page = Page(write_report(runs, tmp_path / "p.html"))

    def all_of(page: Page) -> str:
        return f"{page.text} {json.dumps(page.figures)}"

    for start in ("Bars are at 95%, over", "Intervals are at 95%, over", "strength with its 95% interval over"):
        assert f"{start} prompts alone (one seed)" in all_of(page), start
        assert f"{start} prompts and training seeds together" in all_of(comparison), start
    for words in ("aint marks", "all seeds of one", "mean over its seeds", "mean over seeds", "one seed at least"):
        assert words not in all_of(page), words
        assert words in all_of(comparison), words
    assert "and seeds" not in all_of(page)
    assert "and training seeds" not in all_of(page)


def test_a_void_clip_is_told_where_no_setting_varies(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", steps=(0, 4)), make_run(tmp_path / "b", "ppo", steps=(0, 4))]
    words = "Void as an ablation of the clip, for it touched nothing or everything: p3o joint."
    assert "Void" not in Page(write_report(runs, tmp_path / "p.html")).text
    lines = [line | {"clip_ratio": 0.0} for line in read_jsonl(runs[0] / "metrics.jsonl")]
    write(runs[0] / "metrics.jsonl", lines)
    assert words in Page(write_report(runs, tmp_path / "p.html")).text
    # Nor does it hang on evaluations that can be compared.
    write(runs[1] / "samples.jsonl", [])
    page = Page(write_report(runs, tmp_path / "p.html"))
    assert "cannot be compared prompt by prompt" in page.text
    assert words in page.text


def test_a_run_that_stopped_half_way_says_so_and_is_compared(tmp_path: Path) -> None:
    whole = make_run(tmp_path / "a", steps=(0, 4), max_steps=4)
    half = make_run(tmp_path / "b", "ppo", steps=(0, 3), max_steps=40, max_minutes=1.0)
    page = Page(write_report([whole, half], tmp_path / "p.html"))
    assert [series["name"] for series in page.figures["frontier"]["series"]][:2] == ["p3o joint", "ppo"]
    assert "a 0 done 4" in page.text
    assert "b 0 stopped at step 3 of 40 3" in page.text
    assert "Before the end of training: ppo, seed 0, stopped at step 3 of 40." in page.text


@pytest.mark.parametrize(
    ("config", "last", "words"),
    [
        ({"max_steps": 9}, {"step": 9}, ""),
        ({"max_steps": 9}, {"step": 8}, "stopped at step 8 of 9"),
        ({"max_steps": 9}, None, "stopped at step 0 of 9"),
        ({"max_steps": 9, "max_generated_tokens": 50}, {"step": 8, "num_generated_tokens": 51}, ""),
        (
            {"max_steps": 9, "max_generated_tokens": 50},
            {"step": 8, "num_generated_tokens": 49},
            "stopped at step 8 of 9",
        ),
        ({"max_steps": None, "num_epochs": 1.0}, {"step": 30, "epoch": 1.0}, ""),
        ({"max_steps": None, "num_epochs": 0.1}, {"step": 3, "epoch": 0.1}, ""),
        ({"max_steps": None, "num_epochs": 2.0}, {"step": 30, "epoch": 1.0}, "stopped at step 30 of 60"),
        ({"model": "of an older version"}, {"step": 8}, ""),
    ],
)
def test_what_a_run_was_to_do_says_whether_it_stopped(
    tmp_path: Path, config: dict[str, Any], last: dict[str, Any] | None, words: str
) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    write(tmp_path / "metrics.jsonl", [] if last is None else [last])
    assert stopped(read_run(tmp_path)) == words


def test_without_a_common_kl_the_fits_say_that(tmp_path: Path, comparison: Page) -> None:
    runs = [make_run(tmp_path / "a", steps=(0, 4)), make_run(tmp_path / "b", "ppo", steps=(0, 4))]
    lines = [line | {"kl": line["kl"] + 100} for line in read_jsonl(runs[1] / "samples.jsonl")]
    write(runs[1] / "samples.jsonl", lines)
    page = Page(write_report(runs, tmp_path / "p.html"))
    assert "No range of KLs is passed by all of them, so none has a mean reward along the frontier." in page.text
    assert "divided by their width" not in page.text
    assert re.search(r"over KLs of [\d.]+ to [\d.]+ nats, which all of them pass, divided by their", comparison.text)


def test_completions_of_other_data_sets_do_not_stand_under_one_prompt(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", steps=(0, 4)), make_run(tmp_path / "b", "ppo", steps=(0, 4), dataset="other")]
    lines = read_jsonl(runs[1] / "samples.jsonl")
    write(runs[1] / "samples.jsonl", [line | ({"prompt": "Other"} if line["row"] >= 7 else {}) for line in lines])
    completions = Page(write_report(runs, tmp_path / "p.html")).data["completions"]
    assert completions["prompts"] == [EVIL if row == 1 else f"Tell me of thing {row}." for row in range(7)]
    assert [policy["name"] for policy in completions["policies"]] == ["p3o joint", "ppo"]
    # Of three the one that shares nothing stays away.
    block = run_page.completions_of(
        {name: [sample(4, 0, "x", prompt)] for name, prompt in (("a", "A"), ("b", "B"), ("c", "A"))}, 9
    )
    assert block is not None
    assert (block.prompts, [policy.name for policy in block.policies]) == (["A"], ["a", "c"])


def test_runs_that_never_left_the_start_have_nothing_at_matched_kl(tmp_path: Path) -> None:
    runs = make_grid(tmp_path, ("p3o", "ppo"), num_seeds=2, steps=(0, 3))
    for run in runs:
        for name in ("evaluations", "samples"):
            lines = read_jsonl(run / f"{name}.jsonl")
            write(run / f"{name}.jsonl", [line for line in lines if line["step"] == 0])
    page = Page(write_report(runs, tmp_path / "p.html"))
    assert "No two of these policies reach a common KL" in page.text
    assert "At the end of training" in page.text


def test_the_axis_says_what_kl_it_is(tmp_path: Path) -> None:
    page = Page(write_report([make_run(tmp_path / "a", temperature=0.7, top_p=0.9)], tmp_path / "p.html"))
    label = page.figures["frontier"]["x_label"]
    assert label == (
        "KL to the reference (nats a completion, of the law that samples, temperature 0.7, top-p 0.9, to the "
        "untruncated reference)"
    )


def test_many_arms_share_the_colour_of_their_method(tmp_path: Path) -> None:
    runs = make_grid(tmp_path, ("p3o", "ppo", "rloo"), (0.02, 0.05, 0.1), num_seeds=1, steps=(0, 4))
    page = Page(write_report(runs, tmp_path / "p.html"))
    series = page.figures["frontier"]["series"]
    assert {one["group"] for one in series} == {"p3o joint", "ppo", "rloo"}
    assert {one["slot"] for one in series} == {1, 2, 3}
    assert next(iter(page.figures)) == "frontier-ends"  # nine courses would hide each other


def test_completions_are_capped_and_the_page_says_how_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_page, "NUM_SAMPLES", 5)
    page = Page(write_report(make_run(tmp_path / "a")))
    assert len(page.data["completions"]["prompts"]) == 5
    assert "The first completion of the first 5 of 12 held-out prompts, in the order of the data set" in page.text


def test_runs_that_are_not_done_are_told_and_not_compared(tmp_path: Path) -> None:
    done = {"name": "a", "method": "P3O, mine", "seed": 0, "status": "done", "error": None}
    done |= {"budget": {"completions": 4096, "updates": 64}}
    make_run(tmp_path / "c" / "cells" / "a", cell=done)
    make_run(tmp_path / "c" / "cells" / "b", "ppo", cell=done | {"name": "b", "method": "ppo"})
    failed = {"name": "z", "method": "rloo", "status": "failed", "error": f"no room {WILD}"}
    make_run(tmp_path / "c" / "cells" / "z", "rloo", cell=failed)
    path = write_report(tmp_path / "c")
    assert path == tmp_path / "c" / "report.html"
    page = Page(path)
    assert "P3O, mine" in page.text
    assert "failed: no room <script>" in page.text
    assert "4,096" in page.text
    assert "rloo" not in json.dumps(page.figures)


def test_a_comparison_folder_adds_what_only_its_record_knows(tmp_path: Path) -> None:
    cells = tmp_path / "c" / "cells"
    for method in ("p3o", "ppo"):
        done = {"name": method, "method": method.upper(), "seed": 0, "status": "done", "error": None, "settings": {}}
        make_run(cells / method, method, cell=done)
    names = ["starting policy", "P3O", "PPO"]
    rates = [[None if i == j else interval(0.3 if i < j else 0.7, 0.05) for j in range(3)] for i in range(3)]
    ranking = [
        {"name": name, "strength": interval(strength)} for name, strength in zip(names[::-1], (1, 0, -1), strict=True)
    ]
    tried = {"method": "PPO", "settings": {"learning_rate": 0.001}, "reward": 0.5, "kl": 1.0, "value": 0.4}
    record: dict[str, Any] = {
        "version": 1,
        "notes": [f"a remainder {WILD}"],
        "exact_frontier": [{"kl": kl, "reward": kl**0.5} for kl in (0.0, 1.0, 2.0, 99.0)],
        "arms": [{"name": "P3O", "gap": interval(0.125, 0.001), "regret": None}],
        "held_out": {"reward_funcs": ["my.held_out"], "names": names, "rates": rates, "ranking": ranking},
        "sweep": {"rule": "reward", "split": "test[:24]", "seed": 7, "runs": [tried | {"chosen": True, "error": None}]},
    }
    behind = {"mean": 0.1, "low": -0.05, "high": 0.25}
    record["sweep"]["runs"].append(tried | {"value": 0.3, "chosen": False, "error": None, "behind": behind})
    record["sweep"] |= {"at_edge": ["PPO"], "undecided": ["PPO"]}
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(record))
    page = Page(write_report(tmp_path / "c"))
    exact = next(one for one in page.figures["frontier"]["series"] if one["name"].startswith("exact frontier"))
    assert [point[0] for point in exact["points"]] == [0.0, 1.0, 2.0]  # as far as a policy went
    held_out = page.figures["win_matrix-held_out"]
    assert held_out["names"] == ["PPO", "P3O", "starting policy"]
    assert held_out["values"][0] == [None, 0.7, 0.7]
    assert held_out["lows"][1][2] == 0.65
    assert [row["value"] for row in page.figures["ranking-held_out"]["rows"]] == [1, 0, -1]
    for words in (
        *(
            "By a reward that no policy was trained on: my.held_out.",
            "below the exact frontier",
            "0.125 [0.124, 0.126]",
        ),
        *(
            "a remainder <script>",
            "learning_rate 0.001",
            "Chosen by the largest reward on the split test[:24], seed 7.",
        ),
        *("chosen, at the edge", "At the edge: what lies beyond the values that were tried?"),
        *("behind by 0.100 [-0.050, 0.250]", "of PPO the sweep cannot tell all runs from the best"),
    ):
        assert words in page.text, words
    assert "regret" not in page.text  # no policy has one
    (tmp_path / "c" / "comparison.json").write_text(json.dumps(record | {"version": 2}))
    assert "win_matrix-held_out" not in Page(write_report(tmp_path / "c")).figures


def test_runs_without_shared_measures_are_shown_each_for_itself(tmp_path: Path) -> None:
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "ppo")
    lines = [{key: value for key, value in line.items() if key != "kl"} for line in read_jsonl(b / "samples.jsonl")]
    write(b / "samples.jsonl", lines)
    page = Page(write_report([a, b], tmp_path / "p.html"))
    assert "cannot be compared prompt by prompt" in page.text
    assert "an older version wrote it" in page.text
    assert [series["name"] for series in page.figures["frontier"]["series"]] == ["p3o joint", "ppo"]


def test_a_comparison_of_fine_tuning_runs(tmp_path: Path) -> None:
    lines = [{"step": i, "loss": 3.0 - 0.1 * i, "perplexity": 20.0 - i} for i in range(1, 9)]
    ends = [{"step": 8, "num_examples": 10, "loss": interval(2.2)}]
    runs = [
        supervised(tmp_path / name, {"max_length": 64, "learning_rate": rate}, lines, ends)
        for name, rate in (("a", 1e-5), ("b", 1e-4))
    ]
    page = Page(write_report(runs, tmp_path / "p.html"))
    assert list(page.figures) == ["metric-loss", "metric-perplexity"]
    assert "2.200 [2.100, 2.300]" in page.text
    assert "learning_rate 0.0001" in page.text


def test_several_folders_write_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / "a", steps=(0, 2)), make_run(tmp_path / "b", "ppo", steps=(0, 2))]
    assert write_report(runs) == Path("report.html")
    assert (tmp_path / "report.html").is_file()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_what_is_no_run_folder_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(PairtuneError, match=r"there is no run folder .*nowhere"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PairtuneError, match=r"empty is no run folder: it has no config\.yaml"):
        write_report(tmp_path / "empty")
    with pytest.raises(PairtuneError, match="is a folder; give the report a file name"):
        write_report(run, tmp_path)
    with pytest.raises(PairtuneError, match=r"config\.yaml is a file; name a folder"):
        write_report(run, figures=run / "config.yaml")
    assert not (run / "report.html").exists()


def test_runs_of_two_stages_are_refused(tmp_path: Path, run: Path) -> None:
    other = supervised(tmp_path / "sft", {"max_length": 64}, [], [])
    with pytest.raises(PairtuneError, match=r"my run is a run of train and .*sft one of sft; .* make one for each"):
        write_report([run, other], tmp_path / "p.html")


def test_a_damaged_file_is_named(run: Path) -> None:
    (run / "environment.json").write_text("{")
    with pytest.raises(PairtuneError, match=r"environment\.json is damaged"):
        write_report(run)


@pytest.mark.parametrize(("package", "figures"), [("jinja2", None), ("matplotlib", "figures")])
def test_a_missing_package_is_named_with_its_mend(
    run: Path, monkeypatch: pytest.MonkeyPatch, package: str, figures: str | None
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(PairtuneError, match=rf"needs? {package}; `pip install 'pairtune\[report\]'`"):
        write_report(run, figures=None if figures is None else run / figures)
