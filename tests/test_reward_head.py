"""A reward model of the first layers alone, and a head that is fitted before anything else moves."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification

from pairtune import PairtuneError
from pairtune.config import RewardConfig
from pairtune.feedback.comparisons import encode_comparisons
from pairtune.models.reward_backbone import load_reward_backbone
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages.reward import RewardTask, reward


def separable(count: int, seed: int) -> list[dict[str, Any]]:
    """The chosen answer asks and the other shouts; which of the two is longer is left to chance."""
    draw = random.Random(seed)
    words = [["".join(draw.choices("ab", k=draw.randint(2, 8))) for _ in range(2)] for _ in range(count)]
    return [{"prompt": f"{n}: ", "chosen": f"{w[0]}?", "rejected": f"{w[1]}!"} for n, w in enumerate(words)]


ROWS, HELD_OUT = separable(40, 0), separable(20, 1)
RANKED = [
    {"prompt": f"{n}: ", "completions": ["aa!", "b?", "c"][: 2 + n % 2], "ranks": [3, 1, 2][: 2 + n % 2]}
    for n in range(9)
]


def task_of(tokenizer: Any, rows: list[dict[str, Any]], **words: Any) -> RewardTask:
    config = RewardConfig(model="m", dataset="d", chat="never", **words)
    backbone = load_reward_backbone(build_tiny_model("llama").double(), tokenizer=tokenizer, device="cpu")
    return RewardTask(backbone, encode_comparisons(rows, "the rows", config, tokenizer), config=config.reward)


def run(folder: Path, model: str, *, rows: Any = ROWS, **words: Any) -> Path:
    settings = {"chat": "never", "dtype": "float32", "learning_rate": 1e-4, "batch_size": 16, "max_steps": 3}
    config = RewardConfig(model=model, dataset="passed in", output_dir=folder, **{**settings, **words})
    return reward(config, train_dataset=rows, eval_dataset=HELD_OUT).output_dir


def newest(folder: Path) -> Path:
    path = checkpoint.latest(folder)
    assert path is not None
    return path


# ------------------------------------------------------------------------------------------------------------ the head


def test_the_head_is_the_most_likely_one(tiny_tokenizer: Any) -> None:
    task = task_of(tiny_tokenizer, ROWS)
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    told = task.fit_head()
    assert told.startswith("the head was fitted to 40 rows, penalty ")
    changed = [name for name, weight in task.model.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed == ["score.weight"]
    ends, mask = task.ends(range(40))
    assert mask.all()
    rewards = (ends @ task.model.score.weight[0].double()).detach()
    assert torch.allclose(rewards, task._rewards(task._train_data, range(40))[0].double())
    # No small step along any feature makes the comparisons much likelier: what stops it is the penalty alone.
    assert F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean() > -0.2


def test_it_reads_rankings_and_soft_labels(tiny_tokenizer: Any) -> None:
    ranked = task_of(tiny_tokenizer, RANKED)
    ranked.fit_head()
    rewards, mask, _ = ranked._rewards(ranked._train_data, range(9))
    assert mask.sum(1).tolist() == [2 + n % 2 for n in range(9)]
    assert (rewards[:, 1] > rewards[:, 0]).all()
    assert (rewards[1::2, 1] > rewards[1::2, 2]).all()
    # Labels that say that the rejected one is better.
    soft = task_of(tiny_tokenizer, [row | {"probability": 0.05} for row in ROWS])
    soft.fit_head()
    rewards, _, _ = soft._rewards(soft._train_data, range(40))
    assert (rewards[:, 1] > rewards[:, 0]).double().mean() > 0.9


def test_a_run_starts_from_a_fitted_head_and_goes_on_from_its_own(tiny_model_folder: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"reward": {"fit_head": True}, "trainable_layers": 1, "eval_steps": 2}
    whole = run(tmp_path / "whole", tiny_model_folder, **words)
    first = read_jsonl(whole / "evaluations.jsonl")[0]
    assert first["step"] == 0
    assert first["accuracy"]["mean"] > 0.9
    parted = run(tmp_path / "parted", tiny_model_folder, **words, max_minutes=1e-9)
    assert not read_jsonl(parted / "metrics.jsonl")
    parted = run(tmp_path / "parted", tiny_model_folder, **words, resume=True)
    for name in ("metrics", "evaluations"):
        of_both = [[without_times(line) for line in read_jsonl(one / f"{name}.jsonl")] for one in (whole, parted)]
        assert of_both[0] == of_both[1]


# ---------------------------------------------------------------------------------------------------------- the layers


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_the_first_layers_are_a_reward_model(tiny_tokenizer: Any, tmp_path: Path, kind: str) -> None:
    backbone = load_reward_backbone(
        build_tiny_model(kind), tokenizer=tiny_tokenizer, device="cpu", num_layers=1, trainable_layers=1
    )
    assert "the first 1 of 2 decoder layers are kept" in backbone.notes
    config = RewardConfig(model="m", dataset="d", chat="never")
    task = RewardTask(backbone, encode_comparisons(ROWS, "the rows", config, tiny_tokenizer))
    rewards = task._rewards(task._train_data, range(5))[0]
    backbone.save(tmp_path / "saved")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert loaded.config.num_hidden_layers == 1
    for row in range(5):
        data = task._train_data.closed
        for k in range(2):
            ids = torch.tensor([data.prompt_dataset.token_ids[row] + data.completions[row][k].ids])
            assert loaded(ids).logits.item() == pytest.approx(rewards[row, k].item(), abs=1e-4)


def test_a_run_of_the_first_layers(tiny_model_folder: str, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", tiny_model_folder, num_layers=1)
    saved = json.loads((newest(folder) / "config.json").read_text())
    assert saved["num_hidden_layers"] == 1
    # Training goes on from it, and all of it is there.
    again = run(tmp_path / "again", str(folder), num_layers=1)
    assert json.loads((newest(again) / "config.json").read_text())["num_hidden_layers"] == 1


def test_more_layers_than_there_are(tiny_tokenizer: Any) -> None:
    with pytest.raises(PairtuneError, match=r"^num_layers: 3 is out of range, this model has 2 decoder layers\.$"):
        load_reward_backbone(build_tiny_model("llama"), tokenizer=tiny_tokenizer, device="cpu", num_layers=3)
