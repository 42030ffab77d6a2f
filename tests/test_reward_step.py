"""benchmarks/reward_step.py: all ways compute one loss, and what they read is counted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reward_step  # noqa: E402


def row(question: str, chosen: str, rejected: str) -> dict[str, Any]:
    answers = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", chosen), ("rejected", rejected))
    }
    return {"prompt": [{"role": "user", "content": question}], **answers}


LONG = row("long " * 40, "no", "yes")
ROWS = [LONG, *(row("a" * n, "b" * (n + 1), "c" * (9 - n)) for n in range(1, 10))]


def test_all_ways_compute_one_loss_and_count_what_they_read(
    tiny_model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = {name: dict(way) for name, way in reward_step.WAYS.items()}
    for way in ways.values():
        if "trainable_layers" in way:
            way |= {"trainable_layers": 1} | ({"num_layers": 2} if "num_layers" in way else {})
    monkeypatch.setattr(reward_step, "WAYS", ways)
    data = tmp_path / "hh.jsonl"
    content = [
        {
            side: f"\n\nHuman: {one['prompt'][0]['content']}\n\nAssistant: {one[side][0]['content']}"
            for side in ("chosen", "rejected")
        }
        for one in ROWS
    ]
    data.write_text("".join(json.dumps(one) + "\n" for one in content))
    reward_step.main(
        ["--dataset", str(data), "--model", tiny_model_folder, "--repeats", "2", "--output", str(tmp_path)]
    )
    record = json.loads((tmp_path / "reward_step.json").read_text())
    assert (tmp_path / "reward_step.md").read_text() == reward_step.as_markdown(record)
    found = record["ways"]
    assert [*found] == [*ways]
    (exact, *_) = [way["first_loss"] for name, way in found.items() if name == "plain loop, float32"]
    for name, way in found.items():
        assert way["first_loss"] == pytest.approx(exact, abs=0.05 if "bfloat16" in name else 1e-5), name
        assert len(way["seconds"]) == 2

    # <|user|> q <|end|> <|assistant|>, then the answer and <|end|>: the first eight that are short enough.
    short = [(1 + n + 1 + 1, n + 1 + 1, 9 - n + 1) for n in range(1, 9)]
    assert found["plain loop, float32"]["tokens"] == 16 * max(q + max(a, b) for q, a, b in short)
    assert found["prompt once"]["tokens"] == sum(q + a + b for q, a, b in short)
    gflop = {name.strip(): way["gflop"] for name, way in found.items()}
    # Both layers forward and backward; one of them forward alone; nothing of it at all.
    assert gflop["prompt once, last 4 of 30 layers"] == pytest.approx(gflop["prompt once"] * 4 / 6)
    kept = [way["gflop"] for name, way in found.items() if name.startswith("the same")]
    assert kept == pytest.approx([gflop["prompt once"] / 2] * 2)
