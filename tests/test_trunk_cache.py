"""What frozen layers make of the rows of a reward dataset is computed once, and nothing else changes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, interrupt_update

from pairtune.config import RewardConfig
from pairtune.feedback.comparisons import Comparisons, encode_comparisons
from pairtune.models.reward_backbone import TrunkCache, load_reward_backbone
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages.reward import RewardTask, reward

draw = random.Random(0)
PAIRS = [
    {
        "prompt": "p" * draw.randint(1, 9) + ": ",
        "chosen": "".join(draw.choices("ab", k=draw.randint(2, 9))) + "?",
        "rejected": "".join(draw.choices("ab", k=draw.randint(2, 9))) + "!",
    }
    for _ in range(12)
]
RANKED = [
    {"prompt": "p: ", "completions": ["aa!", "b?", "c"], "ranks": [1, 2, 3]},
    {"prompt": "q: ", "completions": ["dddd", "e"], "ranks": [7, 3]},
    {"prompt": "rrrr: ", "completions": ["ff", "g", "h", "i"], "ranks": [2, 1, 2, 4]},
]
EVERYTHING = 2**30


def comparisons(tokenizer: Any, rows: list[dict[str, Any]]) -> Comparisons:
    return encode_comparisons(rows, "the rows", RewardConfig(model="m", dataset="d", chat="never"), tokenizer)


def task_of(
    tokenizer: Any, rows: list[dict[str, Any]], *, kind: str = "llama", ways: Any = None, **settings: Any
) -> RewardTask:
    """A task in float64; of its two layers the last one is trained."""
    ways = {"trainable_layers": 1} if ways is None else ways
    backbone = load_reward_backbone(build_tiny_model(kind).double(), tokenizer=tokenizer, device="cpu", **ways)
    return RewardTask(backbone, comparisons(tokenizer, rows), **settings)


def caches(task: RewardTask) -> list[TrunkCache]:
    return list(task._caches.values())


def bytes_of(task: RewardTask, num_rows: int) -> int:
    """Of the first rows, float64 states of 32 numbers a token that the model reads."""
    per_prompt = 1 if task.backbone.shared else task._train_data.data.num_completions
    data = task._train_data.closed
    prompts = sum(map(len, data.prompt_dataset.token_ids[:num_rows]))
    answers = sum(len(one.ids) for group in data.completions[:num_rows] for one in group)
    return 8 * 32 * (per_prompt * prompts + answers)


def trunk_tokens(task: RewardTask) -> list[int]:
    """Fills with the columns of every pass through the frozen layers from here on."""
    met: list[int] = []
    task.backbone.trunk.layers[0].register_forward_hook(lambda _, inputs, __: met.append(inputs[0][..., 0].numel()))
    return met


@pytest.mark.parametrize("kind", ["llama", "mistral"], ids=["prompt shared", "a row a completion"])
@pytest.mark.parametrize("rows", [PAIRS, RANKED], ids=["pairs", "ranked"])
@pytest.mark.parametrize("room", [0, 2, None], ids=["nothing kept", "two rows kept", "all kept"])
def test_loss_and_gradient_are_the_same(
    tiny_tokenizer: Any, kind: str, rows: list[dict[str, Any]], room: int | None
) -> None:
    plain = task_of(tiny_tokenizer, rows, kind=kind)
    assert plain.backbone.shared is (kind == "llama")
    limit = EVERYTHING if room is None else bytes_of(plain, room)
    cached = task_of(tiny_tokenizer, rows, kind=kind, cache_bytes=limit)
    assert [cache.num_kept for cache in caches(cached)] == [len(rows) if room is None else room]
    order = list(reversed(range(len(rows))))
    for _ in range(2):  # what is computed, then what was kept
        for task in (plain, cached):
            for parameter in task.masters.parameters:
                parameter.grad = None
        losses = [sum(task.loss(part).total for part in (order[:2], order[2:])) for task in (plain, cached)]
        for loss in losses:
            loss.backward()
        assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
        for a, b in zip(plain.masters.parameters, cached.masters.parameters, strict=True):
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_a_row_meets_the_frozen_layers_once(tiny_tokenizer: Any) -> None:
    task = task_of(tiny_tokenizer, PAIRS, cache_bytes=EVERYTHING)
    met = trunk_tokens(task)
    task.loss(range(6))
    assert sum(met) == sum(map(task.length, range(6)))  # no padding either
    task.loss(range(8))
    assert sum(met) == sum(map(task.length, range(8)))
    task.loss([7, 2, 5])
    assert sum(met) == sum(map(task.length, range(8)))


@pytest.mark.parametrize("kind", ["llama", "mistral"], ids=["prompt shared", "a row a completion"])
def test_memory_stays_within_its_bound(tiny_tokenizer: Any, kind: str) -> None:
    plain = task_of(tiny_tokenizer, PAIRS, kind=kind)
    limit = bytes_of(plain, 5) - 1
    task = task_of(tiny_tokenizer, PAIRS, kind=kind, cache_bytes=limit)
    task.loss(range(12))
    (cache,) = caches(task)
    storages = [part.untyped_storage().nbytes() for parts in cache._states.values() for part in parts]
    assert cache.num_kept == 4
    assert sum(storages) == cache.num_bytes == bytes_of(plain, 4) <= limit
    size = f"{cache.num_bytes / 2**30:.2g} GiB"
    assert task.notes == [f"the frozen layers meet 4 rows once: what they make of them is kept, {size}"]


def test_rows_that_are_read_once_are_not_kept(tiny_tokenizer: Any) -> None:
    held_out = comparisons(tiny_tokenizer, PAIRS[:5])
    sizes = [
        [cache.num_kept for cache in caches(task_of(tiny_tokenizer, PAIRS, held_out=held_out, **words))]
        for words in (
            {"cache_bytes": EVERYTHING, "num_epochs": 1.0},
            {"cache_bytes": EVERYTHING, "num_epochs": 1.5},
            {"cache_bytes": EVERYTHING, "num_eval_examples": 3},
        )
    ]
    assert sizes == [[5], [12, 5], [12, 3]]
    # One limit for both; the training rows come first.
    plain = task_of(tiny_tokenizer, PAIRS)
    task = task_of(tiny_tokenizer, PAIRS, held_out=held_out, cache_bytes=bytes_of(plain, 12) + bytes_of(plain, 2))
    assert [cache.num_kept for cache in caches(task)] == [12, 2]


@pytest.mark.parametrize("ways", [{}, {"lora_r": 2}, {"trainable_layers": 2}], ids=["full", "lora", "all layers"])
def test_without_frozen_layers_nothing_is_kept(tiny_tokenizer: Any, ways: dict[str, Any]) -> None:
    task = task_of(tiny_tokenizer, PAIRS, ways=ways, cache_bytes=EVERYTHING)
    assert [cache.num_kept for cache in caches(task)] == [0]
    assert not task.notes
    assert task.loss(range(3)).total.isfinite()


def test_a_resumed_run_is_the_same_run(
    tiny_model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows are met in other batches, or before other rows, than in the run that was not interrupted."""

    def run(name: str, **words: Any) -> Path:
        config = RewardConfig(
            model=tiny_model_folder,
            dataset="passed in",
            chat="never",
            dtype="float32",
            trainable_layers=1,
            batch_size=5,
            micro_batch_size=3,
            learning_rate=3e-3,
            num_epochs=3,
            eval_steps=2,
            output_dir=tmp_path / name,
            **words,
        )
        return reward(config, train_dataset=PAIRS, eval_dataset=PAIRS[:5]).output_dir

    whole = run("whole")
    assert "the frozen layers meet 17 rows once" in capsys.readouterr().out.replace("\n", " ")
    interrupt_update(monkeypatch, 4)
    parted = run("parted")
    run("parted", resume=True)
    for name in ("metrics", "evaluations"):
        of_whole, of_parted = (
            [without_times(line) for line in read_jsonl(f / f"{name}.jsonl")] for f in (whole, parted)
        )
        assert of_parted == of_whole
    newest = [checkpoint.latest(folder) for folder in (whole, parted)]
    weights = [next(folder.rglob("model.safetensors")).read_bytes() for folder in newest if folder is not None]
    assert weights[0] == weights[1]
