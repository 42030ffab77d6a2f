"""`sft` from end to end on tiny models: what is learned and what is not, what it leaves behind, what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import EOS_ID, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairtune import PairtuneError
from pairtune.cli import main
from pairtune.completion_data import Example, ExampleDataset, encode_examples
from pairtune.config import SFTConfig
from pairtune.models import loading
from pairtune.models.loading import load_policy
from pairtune.models.weights import resolve_model
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages import sft as sft_module
from pairtune.stages import supervised
from pairtune.stages.rl import TrainResult
from pairtune.stages.sft import SFTTask, example_layout, sft

ROWS = [{"prompt": f"{word} {number}: ", "completion": f"{word}!" * (number + 1)} for number in range(4) for word in ("ab", "c", "dd")]
HELD_OUT = [{"prompt": "ab 7: ", "completion": "ab!ab!"}, {"prompt": "c: ", "completion": "c!"}, {"prompt": "x ", "completion": "yes"}]
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"trainable_layers": 1},
    "lora": {"lora_r": 4, "lora_alpha": 8},
}
Run = Callable[..., TrainResult]


@pytest.fixture
def run(tiny_model_folder: str, tmp_path: Path) -> Run:
    """sft() on the tiny Llama; every word of SFTConfig may be given."""

    def start(*, rows: Any = ROWS, held_out: Any = HELD_OUT, **words: Any) -> TrainResult:
        given = {key: words.pop(key) for key in ("tokenizer",) if key in words}
        if not isinstance(words.get("model", ""), str):
            given["model"] = words.pop("model")
        settings = {
            "model": tiny_model_folder,
            "dataset": "passed in",
            "chat": "never",
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 4,
            "micro_batch_size": 3,
            "learning_rate": 1e-3,
            "eval_steps": 0,
            "save_steps": 0,
            "output_dir": str(tmp_path / "run"),
        }
        if held_out is None:
            settings["dataset_test_split"] = None
        return sft(SFTConfig(**{**settings, **words}), train_dataset=rows, eval_dataset=held_out, **given)

    return start


def lines(result: TrainResult | Path, name: str = "metrics") -> list[dict[str, Any]]:
    folder = result if isinstance(result, Path) else result.output_dir
    return [without_times(line) for line in read_jsonl(folder / f"{name}.jsonl")]


def newest(result: TrainResult | Path) -> Path:
    found = checkpoint.latest(result if isinstance(result, Path) else result.output_dir)
    assert found is not None
    return found


def test_smoke(run: Run) -> None:
    result = run()
    print(lines(result), lines(result, "evaluations"))
