"""What a run says that it has cost, against hooks in the model that count for themselves; where a budget ends it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from test_values import tiny_reward_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pairtune import PairtuneError, TrainConfig, train
from pairtune.config import METHODS
from pairtune.models.logprobs import body
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages import rl

PROMPTS = [{"prompt": text} for text in ("Go", "Say it again", "So on", "?")]
PAIRS = [{"prompt": f"{n} and", "chosen": " yes" * (1 + n), "rejected": " no"} for n in range(4)]
NO_KEYS = {"missing_keys": []}


class Meter:
    """Counts real tokens through decoder layers: forward as they go in, backward as their gradients come back."""

    def __init__(self, model: nn.Module) -> None:
        self.forward = self.backward = 0.0
        self.watch(model)

    def watch(self, model: nn.Module) -> None:
        decoder = body(model)
        now = {"tokens": 0}  # of the pass that the layers are in

        def enter(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
            given = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
            if kwargs.get("attention_mask") is not None:  # what tries a model out gives none
                now["tokens"] = real_tokens(kwargs["attention_mask"], kwargs["position_ids"], given.shape[1])

        def layer_in(_: Any, __: Any) -> None:
            self.forward += now["tokens"] / 2

        def layer_out(_: Any, __: Any, output: Any) -> None:
            states, tokens = output[0] if isinstance(output, tuple) else output, now["tokens"]
            if states.requires_grad:
                states.register_hook(lambda _: self._back(tokens / 2))

        decoder.register_forward_pre_hook(enter, with_kwargs=True)
        assert len(decoder.layers) == 2
        for layer in decoder.layers:
            layer.mlp.register_forward_pre_hook(layer_in)  # called again where activations are computed again
            layer.register_forward_hook(layer_out)

    def _back(self, tokens: float) -> None:
        self.backward += tokens


def real_tokens(mask: Tensor, positions: Tensor, num_new: int) -> int:
    """Of the last `num_new` columns: not padding, which in a shared layout has position 0 behind the first token."""
    if mask.ndim == 2:
        return int(mask[:, -num_new:].sum())
    return int((positions > 0).sum()) + len(positions)


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    reward.calls += len(completion_ids)  # type: ignore[attr-defined]
    reward.tokens += sum(map(len, completion_ids))  # type: ignore[attr-defined]
    return [float(len(ids) % 3) for ids in completion_ids]


def settings(tmp_path: Path, **words: Any) -> TrainConfig:
    common = {"model": "in memory", "dataset": "passed in", "dataset_test_split": None, "chat": "never"}
    common |= {"device": "cpu", "batch_size": 4, "max_completion_length": 6, "learning_rate": 0.01, "save_steps": 1}
    return TrainConfig(**(common | {"max_steps": 3, "output_dir": str(tmp_path / "run")} | words))


CASES: dict[str, dict[str, Any]] = {
    "four passes of one update": {"algorithm": "p3o"},
    "the old law has a pass of its own": {"algorithm": "p3o", "minibatch_size": 2, "micro_batch_size": 1},
    "only the top layer": {"algorithm": "p3o", "trainable_layers": 1, "minibatch_size": 2},
    "only the top layer, not split": {"algorithm": "rloo", "trainable_layers": 1, "num_iterations": 1},
    "activations computed again": {"algorithm": "p3o", "gradient_checkpointing": True},
    "an adapter": {"algorithm": "p3o", "lora_r": 2, "num_iterations": 1},
    "a value head": {"algorithm": "ppo", "num_generations": 1, "num_iterations": 2},
    "a value network of its own": {"algorithm": "ppo", "ppo.value_model": "tiny", "minibatch_size": 2},
    "earlier batches again": {"algorithm": "p3o", "replay": 1, "num_iterations": 2},
    "a preference dataset": {"algorithm": "dpo", "num_iterations": 1, "max_steps": 2, "batch_size": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_the_cost_of_a_run_is_what_hooks_in_the_model_count(
    name: str, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(tmp_path, **CASES[name])
    model = build_tiny_model("mistral" if name.endswith("not split") else "llama")
    if name.endswith("not split"):
        monkeypatch.setattr("pairtune.models.loading.can_split", lambda *_: False)
    meter = Meter(model)
    if config.value_model is not None:
        values = tiny_reward_model()
        meter.watch(values)
        monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: (values, NO_KEYS))
        monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_tokenizer)
        monkeypatch.setattr("pairtune.models.loading.resolve_model", lambda name: name)
    reward.calls = reward.tokens = 0  # type: ignore[attr-defined]

    class FromHere(rl.HFSampler):
        """Made when loading, which tries the model out, is over."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            meter.forward = meter.backward = 0.0

    monkeypatch.setattr(rl, "HFSampler", FromHere)
    offline = METHODS[config.algorithm].offline
    data = PAIRS if offline else PROMPTS
    train(config, model=model, tokenizer=tiny_tokenizer, reward_funcs=[reward], train_dataset=data)
    last = read_jsonl(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["num_forward_tokens"] == pytest.approx(meter.forward, abs=1e-6)
    assert last["num_backward_tokens"] == pytest.approx(meter.backward, abs=1e-6)
    assert 0 < last["num_backward_tokens"] < last["num_forward_tokens"]
    num_completions = config.max_steps * config.batch_size * (2 if offline else config.num_generations)
    assert last["num_completions"] == num_completions
    assert last["num_reward_calls"] == reward.calls == (0 if offline else num_completions)  # type: ignore[attr-defined]
    assert last["num_generated_tokens"] == reward.tokens  # type: ignore[attr-defined]
    replays = sum(min(config.replay, step) for step in range(config.max_steps))
    assert last["num_updates"] == config.updates_per_batch * (config.max_steps + replays)


def test_a_budget_of_tokens_ends_the_run_with_the_step_that_reaches_it(tmp_path: Path, tiny_tokenizer: Any) -> None:
    def run(folder: Path, **words: Any) -> list[dict[str, Any]]:
        config = settings(folder, num_iterations=1, algorithm="rloo", eval_steps=1, max_steps=30, **words)
        config = config.model_copy(update={"dataset_test_split": "test"})
        held_out = [{"prompt": "Tell me"}]
        given = {"model": build_tiny_model("llama"), "tokenizer": tiny_tokenizer, "reward_funcs": [reward]}
        train(config, **given, train_dataset=PROMPTS, eval_dataset=held_out)
        return read_jsonl(folder / "run" / "metrics.jsonl")

    lines = run(tmp_path, max_generated_tokens=100)
    spent = [line["num_generated_tokens"] for line in lines]
    assert spent[-2] < 100 <= spent[-1]
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "evaluations.jsonl")] == list(range(len(lines) + 1))
    # Resumed, a run that has spent its budget does nothing; with a larger one it goes on as if never stopped.
    assert run(tmp_path, max_generated_tokens=100, resume=True) == lines
    longer = run(tmp_path, max_generated_tokens=200, resume=True)
    whole = run(tmp_path / "whole", max_generated_tokens=200)
    assert [*map(without_times, longer)] == [*map(without_times, whole)]
    assert len(longer) > len(lines)


def test_noise_is_on_training_rewards_alone_and_depends_on_what_it_is_for(tmp_path: Path, tiny_tokenizer: Any) -> None:
    def run(folder: Path, batch: int, **words: Any) -> Path:
        config = settings(
            folder, algorithm="rloo", num_iterations=1, learning_rate=0, batch_size=batch, num_completions_to_log=99
        ).model_copy(update={"dataset_test_split": "test", **words})
        given = {"model": build_tiny_model("llama"), "tokenizer": tiny_tokenizer, "reward_funcs": [reward]}
        train(config, **given, train_dataset=PROMPTS[:batch], eval_dataset=[{"prompt": "Tell me"}])
        return folder / "run" / "samples.jsonl"

    def rewards(path: Path, split: str) -> dict[tuple[int, ...], float]:
        found = [line for line in read_jsonl(path) if line["split"] == split]
        return {(line["step"], line["row"], line["completion_index"]): line["reward"] for line in found}

    clean, noisy = run(tmp_path / "clean", 4), run(tmp_path / "noisy", 4, reward_noise=3.0)
    assert rewards(clean, "eval") == rewards(noisy, "eval")
    noise = {key: value - rewards(clean, "train")[key] for key, value in rewards(noisy, "train").items()}
    assert len(noise) == len(set(noise.values())) == 3 * 4 * 2
    assert 1.5 < torch.tensor([*noise.values()]).std() < 4.5
    # Another batch around a completion, the same noise.
    fewer = rewards(run(tmp_path / "fewer", 2, reward_noise=3.0), "train")
    bare = rewards(run(tmp_path / "bare", 2), "train")
    assert {key: value - bare[key] for key, value in fewer.items()} == pytest.approx(
        {key: noise[key] for key in fewer}, abs=1e-5
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"algorithm": "dpo", "max_generated_tokens": 9}, "max_generated_tokens is 9, but dpo reads a dataset"),
        ({"max_generated_tokens": 9, "lr_scheduler_type": "linear"}, "lr_scheduler_type is linear, whose end"),
        ({"algorithm": "ipo", "reward_noise": 0.5}, "reward_noise is 0.5, but ipo takes its rewards from the dataset"),
        ({"preference_func": "a.b.c", "reward_noise": 0.5}, "reward_noise is 0.5, but with preference_func"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, words: dict[str, Any], told: str) -> None:
    with pytest.raises(PairtuneError, match=told):
        settings(tmp_path, **words)
