"""What many tests share: offline and seeded surroundings, a tokenizer of characters and tiny random models."""

from __future__ import annotations

import os

# Before anything imports huggingface_hub, which reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random
import shutil
import signal
import string
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|begin|>", "<|unknown|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHARACTERS = "\n" + "".join(sorted(string.printable[:95]))
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(CHARACTERS)
PAD_ID, EOS_ID, BOS_ID = 0, 1, 2
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# The same examples in every run, and no failure because another process held the machine up.
hypothesis.settings.register_profile("pairtune", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("pairtune")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def _tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(SPECIAL_TOKENS)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        bos_token="<|begin|>",
        unk_token="<|unknown|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    folder = tmp_path_factory.mktemp("tiny-tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tiny_tokenizer(_tokenizer_folder: str) -> PreTrainedTokenizerFast:
    """One token a character (printable ASCII, newline), a chat template, and a pad token that is not the EOS token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(_tokenizer_folder)


def build_tiny_model(kind: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of two layers, hidden size 32, in float32 and eval mode, for the vocabulary of `tiny_tokenizer`.

    Args:
        kind: llama, llama-untied, qwen2, qwen3, gpt2 (learned absolute positions) or mistral (sliding window of 8).
        seed: of the weights; the test's own random state is left as it is.
        overrides: fields of the model's configuration.
    """
    import transformers

    shared = {"vocab_size": VOCAB_SIZE, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    modern = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # at the usual 0.02 all logits are nearly equal, and no test would see a wrong one
        "tie_word_embeddings": True,
    }
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.2}
    name, fields = {
        "llama": ("Llama", modern),
        "llama-untied": ("Llama", modern | {"tie_word_embeddings": False}),
        "qwen2": ("Qwen2", modern),
        "qwen3": ("Qwen3", modern | {"head_dim": 8}),
        "gpt2": ("GPT2", gpt2),
        "mistral": ("Mistral", modern | {"sliding_window": 8, "head_dim": 8, "tie_word_embeddings": False}),
    }[kind]
    config = getattr(transformers, f"{name}Config")(**(shared | fields | overrides))
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name + suffix)(config)
    return model.float().eval()


TinyModel = Callable[..., "PreTrainedModel"]


@pytest.fixture
def tiny_model() -> TinyModel:
    """`build_tiny_model`, for tests that run over several kinds: `tiny_model("gpt2")`."""
    return build_tiny_model


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Llama whose head is its embedding."""
    return build_tiny_model("llama")


@pytest.fixture
def tiny_llama_untied() -> PreTrainedModel:
    return build_tiny_model("llama-untied")


@pytest.fixture
def tiny_qwen2() -> PreTrainedModel:
    return build_tiny_model("qwen2")


@pytest.fixture
def tiny_qwen3() -> PreTrainedModel:
    return build_tiny_model("qwen3")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """Learned absolute positions."""
    return build_tiny_model("gpt2")


@pytest.fixture
def tiny_mistral() -> PreTrainedModel:
    """Attention to the last 8 tokens only."""
    return build_tiny_model("mistral")


def interrupt_update(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Ctrl-C at the beginning of an update, counted from 1, of the stages sft and reward."""
    from pairtune.stages import supervised

    update, calls = supervised._accumulate_gradients, []

    def interrupt(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return update(*args)

    monkeypatch.setattr(supervised, "_accumulate_gradients", interrupt)


@pytest.fixture
def tiny_model_folder(tmp_path: Any, tiny_tokenizer: PreTrainedTokenizerFast) -> str:
    """A tiny Llama with its tokenizer, saved as `model:` of a configuration wants it."""
    folder = tmp_path / "tiny-llama"
    build_tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, _tokenizer_folder: str) -> str:
    """The same, made once and only to be read."""
    folder = tmp_path_factory.mktemp("model")
    build_tiny_model("llama").save_pretrained(folder)
    shutil.copytree(_tokenizer_folder, folder, dirs_exist_ok=True)
    return str(folder)
