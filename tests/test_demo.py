"""`pairtune demo` on a tiny model: the table, the completions side by side, the report, and text that cannot escape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pairtune import TrainConfig, demo
from pairtune.config import load_config
from pairtune.data import load_dataset_rows
from pairtune.runs.metrics import read_jsonl

pytest.importorskip("vaderSentiment")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

EVIL = "<script>alert(1)</script>"


def config(folder: str, output_dir: Path, **words: Any) -> TrainConfig:
    settings = {
        "model": folder,
        "dataset": "everyday",
        "reward_funcs": ["pairtune.demo.vader.vader_sentiment"],
        "dtype": "float32",
        "device": "cpu",
        "num_iterations": 2,
        "batch_size": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "eval_steps": 0,
        "num_eval_prompts": 7,
        "output_dir": str(output_dir),
    }
    return TrainConfig(**{**settings, **words})


def test_the_demo_shows_what_training_did(
    tiny_model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that writes HTML, ends up in a page that shows it as text."""
    from pairtune import evaluation

    def decode(tokenizer: Any, completions: Any) -> list[list[str]]:
        return [[f"{EVIL} wonderful love" for _ in row] for row in completions.truncated]

    monkeypatch.setattr(evaluation, "decode", decode)
    monkeypatch.setenv("COLUMNS", "120")
    run = tmp_path / "run"
    demo.run(config(tiny_model_folder, run))
    output = capsys.readouterr().out

    assert "7 held-out prompts, before and after 2 steps of p3o" in output
    table = output[output.index("7 held-out prompts") :]
    for label in ("before", "after", "change", "reward", "KL", "length", "unfinished", "distinct-2", "strongest words"):
        assert label in table
    assert len(re.findall(r"\[-?[\d.]+%?, -?[\d.]+%?\]", table)) >= 16  # intervals, before and after
    assert table.count("before, reward") == demo.NUM_SHOWN == 5
    prompts = [s["prompt"] for s in read_jsonl(run / "samples.jsonl") if s["split"] == "eval"][:5]
    for prompt in prompts:
        assert prompt.split()[0] in table
    assert f"report: {run / 'report.html'}" in output
    assert f"talk to it: pairtune sample {run}" in output

    page = (run / "report.html").read_text()
    assert EVIL not in page
    assert r"\u003cscript\u003ealert(1)\u003c/script\u003e" in page  # in the data that its script shows as text


def test_the_share_of_the_strongest_words_is_a_ratio_of_sums() -> None:
    from pairtune.demo.vader import strongest_words

    strong = strongest_words(1)[0]
    samples = [{"completion": f"{strong} and so on"}, {"completion": f"{strong}"}, {"completion": "nothing"}]
    label, share, low, high = demo.strongest_word_row(samples)
    assert label == "strongest words"
    assert share == pytest.approx(2 / 6)
    assert low <= share <= high


def test_the_pairs_shown_are_the_first_ones() -> None:
    first = [
        {"row": row, "completion_index": k, "prompt": f"p{row}", "completion": f"b{row}{k}", "reward": 0.0}
        for row in (4, 2, 0, 1, 3, 5)
        for k in (0, 1)
    ]
    last = [{**s, "completion": s["completion"].replace("b", "a"), "reward": 1.0} for s in reversed(first)]
    shown = demo.pairs_to_show(first, last)
    assert [pair["prompt"] for pair in shown] == ["p4", "p2", "p0", "p1", "p3"]
    assert shown[0] == {"prompt": "p4", "before": "b40", "after": "a40", "reward_before": 0.0, "reward_after": 1.0}


def test_a_stopped_demo_shows_nothing(
    tiny_model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pairtune.stages import rl

    def stopped(config: TrainConfig) -> rl.TrainResult:
        return rl.TrainResult(Path(config.output_dir), 1, False, None, None)

    monkeypatch.setattr(rl, "train", stopped)
    demo.run(config(tiny_model_folder, tmp_path / "run"))
    assert capsys.readouterr().out == ""


def test_a_demo_without_held_out_prompts_still_reports(
    tiny_model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.run(config(tiny_model_folder, tmp_path / "run", dataset_test_split=None, max_steps=1))
    output = capsys.readouterr().out
    assert "held-out" not in output
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_demos_own_configuration_is_p3o_that_clips() -> None:
    """With one update a batch, epsilon would do nothing."""
    from pairtune.cli import DEMO_CONFIG

    settings = load_config(TrainConfig, DEMO_CONFIG)
    assert settings.algorithm == "p3o"
    assert settings.updates_per_step >= 2
    assert settings.p3o.clip == "joint"
    assert settings.max_minutes is not None
    assert settings.max_minutes <= 6
    train, held_out = (load_dataset_rows(settings.dataset, split=split) for split in ("train", "test"))
    assert len(train) + len(held_out) >= 300
    assert len(held_out) >= 60
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
