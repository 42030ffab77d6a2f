"""`pairtune sample`: one prompt, several completions, a conversation from a pipe, and what a run folder stands for."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model

from pairtune import PairtuneError, TrainConfig, chat, train
from pairtune.chat import sample
from pairtune.config import SampleConfig
from pairtune.models.weights import resolve_model
from pairtune.runs import folder


def config(model: str, **words: Any) -> SampleConfig:
    return SampleConfig(model=model, dtype="float32", device="cpu", **{"max_completion_length": 8, **words})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model is asked, as text, whenever it is; its answers are made short and known: <number>."""
    texts: list[str] = []

    def decode(tokenizer: Any, completions: Any) -> list[list[str]]:
        rows = zip(completions.prompt_ids, completions.prompt_mask, strict=True)
        texts.extend(tokenizer.decode(ids[mask]) for ids, mask in rows)
        num_generations = completions.completion_ids.shape[1]
        return [[f"<{len(texts)}{'abc'[k] if num_generations > 1 else ''}>" for k in range(num_generations)]]

    monkeypatch.setattr(chat, "decode", decode)
    return texts


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_one_prompt_is_answered_with_what_the_model_says(
    tiny_model_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sample(config(tiny_model_folder, prompt="Hello", num_generations=2, seed=3))
    first = capsys.readouterr().out
    assert first.strip()
    sample(config(tiny_model_folder, prompt="Hello", num_generations=2, seed=3))
    assert capsys.readouterr().out == first
    sample(config(tiny_model_folder, prompt="Hello", num_generations=2, seed=4))
    assert capsys.readouterr().out != first


def test_a_full_gpu_is_a_sentence(tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(chat.HFSampler, "generate", full)
    with pytest.raises(
        PairtuneError, match=r"^the GPU ran out of memory while sampling \(for 20.00 MiB more\); lower num"
    ):
        sample(config(tiny_model_folder, prompt="Hello"))


def test_what_a_model_says_cannot_steer_the_terminal(
    tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "decode", lambda *_: [["\x1b[2J\x1b]0;title\x07red\x1b[31m"]])
    sample(config(tiny_model_folder, prompt="Hello"))
    assert capsys.readouterr().out == "red\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, "<|user|>Hello<|end|><|assistant|>"),
        ({"system_prompt": "Be kind."}, "<|system|>Be kind.<|end|><|user|>Hello<|end|><|assistant|>"),
        ({"chat": "never"}, "Hello"),
    ],
)
def test_a_prompt_becomes_a_conversation(
    tiny_model_folder: str, asked: list[str], words: dict[str, str], expected: str
) -> None:
    sample(config(tiny_model_folder, prompt="Hello", **words))
    assert asked == [expected]


def test_a_conversation_from_a_pipe(
    tiny_model_folder: str, asked: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model sees the turns so far; an empty line begins anew, with the system prompt; the end of input ends it."""
    typed(monkeypatch, "Hello\nAnd?\n\nAgain\n")
    sample(config(tiny_model_folder, system_prompt="Hm."))
    opening = "<|system|>Hm.<|end|>"
    assert asked == [
        f"{opening}<|user|>Hello<|end|><|assistant|>",
        f"{opening}<|user|>Hello<|end|><|assistant|><1><|end|><|user|>And?<|end|><|assistant|>",
        f"{opening}<|user|>Again<|end|><|assistant|>",
    ]
    assert capsys.readouterr().out == "<1>\n<2>\n<3>\n"  # answers and nothing else: a pipe reads it


@pytest.mark.parametrize(
    ("words", "expected"),
    [({"chat": "never"}, ["Hello", "And?"]), ({"num_generations": 2}, ["Hello", "And?"])],
)
def test_where_no_turns_are_kept_each_line_stands_alone(
    tiny_model_folder: str,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: dict[str, Any],
    expected: list[str],
) -> None:
    """Without a template there are no turns, and of several answers none is the one that was given."""
    typed(monkeypatch, "Hello\nAnd?\n")
    sample(config(tiny_model_folder, **words))
    assert [text.removeprefix("<|user|>").removesuffix("<|end|><|assistant|>") for text in asked] == expected
    assert len(capsys.readouterr().out.split()) == 2 * words.get("num_generations", 1)


def test_the_same_line_twice_gets_other_numbers(
    tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, "Hello\nHello\n")
    sample(config(tiny_model_folder, chat="never", max_completion_length=30))
    first, second = capsys.readouterr().out.split("\n", 1)
    assert first != second.rstrip("\n")


# ------------------------------------------------------------------------------------------------------- run folders


@pytest.mark.parametrize("way", [{}, {"lora_r": 2}])
def test_a_run_folder_stands_for_its_newest_checkpoint(
    tiny_model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: dict[str, int]
) -> None:
    run = tmp_path / "run"
    train(
        TrainConfig(
            model=tiny_model_folder,
            dataset="passed in",
            dataset_test_split=None,
            dtype="float32",
            device="cpu",
            batch_size=2,
            max_completion_length=4,
            max_steps=2,
            save_steps=1,
            learning_rate=0.05,
            output_dir=str(run),
            **way,
        ),
        reward_funcs=[lambda completions: [float(sum(map(ord, text))) for text in completions]],
        train_dataset=[{"prompt": "a"}, {"prompt": "b"}],
    )
    capsys.readouterr()
    assert resolve_model(str(run)) == str(run / "checkpoints" / "step-2")

    def answer(model: Path | str) -> str:
        sample(config(str(model), prompt="Hello", max_completion_length=30))
        return capsys.readouterr().out

    assert answer(run) == answer(run / "checkpoints" / "step-2")
    assert answer(run) != answer(tiny_model_folder)


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    with folder.create(tmp_path / "run", "model: m\n"):
        pass
    with pytest.raises(
        PairtuneError, match=r"the run folder .*run has no checkpoint yet; wait for the run to save one"
    ):
        sample(config(str(tmp_path / "run"), prompt="Hello"))


def test_another_name_stands_for_itself(tmp_path: Path) -> None:
    build_tiny_model("llama").save_pretrained(tmp_path)
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    assert resolve_model(f"owner{os.sep}model") == f"owner{os.sep}model"
    with pytest.raises(PairtuneError, match="could not be loaded"):
        sample(config("owner/model", prompt="Hello"))


def test_a_prompt_that_does_not_fit(tiny_model_folder: str) -> None:
    with pytest.raises(PairtuneError, match="exceed the model's 256 positions"):
        sample(config(tiny_model_folder, prompt="x" * 300))
