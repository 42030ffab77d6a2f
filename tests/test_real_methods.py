"""Every method on the real model through the command line, a few steps of the demo's task: finite, and rising."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from pairtune.cli import main
from pairtune.config import METHODS
from pairtune.runs.metrics import read_jsonl

pytestmark = pytest.mark.slow
DEMO = Path(__file__).resolve().parent.parent / "configs" / "demo.yaml"
ONLINE = [name for name, method in METHODS.items() if not method.offline]

# What makes a method move by about as much as the others do within eight steps: REBEL stops where a pair has moved by
# eta nats a unit of reward, and IPO by 1 / (4 beta) where the others go for 1 / beta.
SETTINGS: dict[str, dict[str, Any]] = {
    "ppo": {"epsilon": 0.2, "ppo.vf_coef": 0.1},
    "grpo": {"epsilon": 0.2, "learning_rate": 7e-4},
    "rebel": {"rebel.eta": 20.0},
    "online_ipo": {"beta": 0.0125},
}


def command(verb: str, folder: Path, **words: Any) -> list[str]:
    common = {"config": DEMO, "output_dir": folder, "max_completion_length": 12, "dtype": "float32", "device": "cpu"}
    return [verb, *(text for key, value in {**common, **words}.items() for text in (f"--{key}", str(value)))]


@pytest.mark.parametrize("name", ONLINE)
def test_a_method_trains_the_real_model(name: str, tmp_path: Path) -> None:
    words = {
        "algorithm": name,
        "max_steps": 8,
        "max_minutes": "null",
        "batch_size": 8,
        "warmup_steps": 2,
        "learning_rate": 5e-4,
        "num_eval_prompts": 48,
        "eval_generations": 3,
        **SETTINGS.get(name, {}),
    }
    assert main(command("train", tmp_path / "run", **words)) == 0
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 8
    for line in lines:
        assert all(isinstance(value, int | float) and abs(value) < float("inf") for value in line.values()), line
        assert line["grad_norm"] > 0
    # On the same prompts before and after: steps differ by their prompts more than by what eight of them teach.
    before, after = read_jsonl(tmp_path / "run" / "evaluations.jsonl")
    assert after["reward"]["low"] > before["reward"]["mean"], (before["reward"], after["reward"])
    assert after["kl"]["low"] > 0.5


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Completions of the model itself with VADER's scores, as a user makes a dataset of them: `pairtune evaluate`."""
    folder = tmp_path_factory.mktemp("scored")
    words = {
        "model": "smollm2-135m-instruct-q4",
        "dataset": "everyday",
        "dataset_test_split": "train",
        "num_eval_prompts": 48,
        "eval_generations": 4,
        "reward_funcs": "pairtune.demo.vader.vader_sentiment",
        "system_prompt": "You are a helpful assistant.",
        "max_completion_length": 12,
        "dtype": "float32",
        "device": "cpu",
        "output": folder / "evaluation.json",
    }
    assert main(["evaluate", *(text for key, value in words.items() for text in (f"--{key}", str(value)))]) == 0
    samples = json.loads((folder / "evaluation.json").read_text("utf-8"))["samples"]
    rows = [{"prompt": s["prompt"], "completion": s["completion"], "reward": s["reward"]} for s in samples]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    pairs = []
    for start in range(0, len(rows), 4):
        group = sorted(rows[start : start + 4], key=lambda row: row["reward"])
        pairs.append(
            {"prompt": group[0]["prompt"], "chosen": group[-1]["completion"], "rejected": group[0]["completion"]}
        )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["dpo", "ipo", "copg"])
def test_an_offline_method_trains_the_real_model(name: str, scored: Path, tmp_path: Path) -> None:
    words = {
        "algorithm": name,
        "dataset": scored / ("scored.jsonl" if name == "copg" else "pairs.jsonl"),
        "dataset_test_split": "null",
        "num_iterations": 1,
        "batch_size": 8,
        "max_steps": 12,
        "max_minutes": "null",
        "warmup_steps": 2,
        "learning_rate": 1e-4,
        **({"copg.offline": "true"} if name == "copg" else {}),
    }
    assert main(command("train", tmp_path / "run", **words)) == 0
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 12
    losses = [line["loss"] for line in lines]
    assert statistics.fmean(losses[-4:]) < statistics.fmean(losses[:2])
    if name != "copg":
        assert statistics.fmean(line["rewards/accuracies"] for line in lines[-4:]) > 0.6
