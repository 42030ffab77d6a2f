"""A reward model in training: a decoder with a scalar head that reads the hidden state at the end of each completion.

The rewards of a layout are computed with the prompt encoded once for its completions. What is saved is an ordinary
sequence classifier with one label, which scores each completion behind its prompt the same: its head is linear without
a bias, and it reads the last token that is not padding. For that the padding token must be one that no text ends with;
with EOS as padding, a finished and an unfinished answer would score alike.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairtune.errors import PairtuneError
from pairtune.models.loading import (
    MasterWeights,
    checkpoint_activations,
    choose_device,
    choose_dtype,
    disable_dropout,
    eos_ids,
    load_causal_lm,
    load_tokenizer,
    train_last_layers,
)
from pairtune.models.logprobs import Layout, body, can_share_prefix, can_split, decoder_layers, run_decoder, split_body
from pairtune.models.values import scores_every_prefix
from pairtune.models.weights import resolve_model

ADAPTER = "reward"
PAD_TOKEN = "<|pairtune_pad|>"
"""The padding token that a tokenizer without any spare one is given."""


@dataclass
class RewardBackbone:
    """A reward model that is trained, and what is needed to run it."""

    model: Any
    """A sequence classifier with one label; with LoRA, its decoder holds the adapters."""
    tokenizer: Any
    masters: MasterWeights
    device: torch.device
    dtype: torch.dtype
    shared: bool
    """Whether a prompt stands once before all its completions."""
    trunk: Any
    """The frozen lower part of the decoder; None where all of it is trained or adapted."""
    top: Any
    """The rest of the decoder."""
    notes: list[str] = field(default_factory=list)
    """What was found out while loading, for the user to read."""

    @torch.no_grad()
    def features(self, layout: Layout) -> Tensor | None:
        """(R, W, H) what the frozen trunk makes of every token; None where there is no trunk."""
        return None if self.trunk is None else run_decoder(self.trunk, layout, {"input_ids": layout.input_ids})

    def ends(self, layout: Layout, features: Tensor | None = None) -> Tensor:
        """(P, K, H) float32 (float64 where the model is): the final hidden state at the end of each completion, which
        the head reads; meaningless for a completion without tokens. `features` of this layout, where they are at hand,
        spare the trunk."""
        if features is None:
            features = self.features(layout)
        inputs = {"input_ids": layout.input_ids} if features is None else {"inputs_embeds": features}
        states = layout.at_end(run_decoder(self.top, layout, inputs))
        # The product with the head is one in float32, for the sake of bfloat16: small differences decide pairs.
        return states.to(torch.promote_types(states.dtype, torch.float32))

    def rewards(self, layout: Layout, features: Tensor | None = None) -> Tensor:
        """(P, K) of what `ends` gives, differentiable by what is trained."""
        ends = self.ends(layout, features)
        return F.linear(ends, self.model.score.weight.to(ends.dtype)).squeeze(-1)

    @torch.no_grad()
    def set_head(self, weight: Tensor) -> None:
        """Put a head (H,) in place of the one that there is."""
        master = self.masters.masters[self.masters.names.index("score.weight")]
        master.copy_(weight[None])
        self.masters.publish()

    def save(self, path: str | Path) -> None:
        """Write a folder that `AutoModelForSequenceClassification` and `AutoTokenizer` load; adapters are merged."""
        self.model.save_pretrained(path, state_dict=merged_state(self.model))
        if _has_adapters(self.model):
            config = Path(path, "config.json")
            content = json.loads(config.read_text("utf-8"))
            config.write_text(json.dumps(content | {"dtype": "float32"}, indent=2) + "\n", "utf-8")
        self.tokenizer.save_pretrained(path)

    @property
    def context_length(self) -> int | None:
        """Positions that the model has; None where its configuration names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)


class TrunkCache:
    """What the frozen trunk makes of the rows of a dataset, computed when a row is first met and kept.

    Fixed weights give fixed hidden states, so that every further pass over the rows costs the trained layers alone. Of
    the dataset the first rows are kept, as many as fit into `max_bytes` of host memory; the others go through the trunk
    each time. A kept row goes through it by itself: its states do not depend on the batch that it was first met in,
    so a resumed run finds the same bits.
    """

    def __init__(
        self, backbone: RewardBackbone, layout_of: Callable[[int], Layout], num_tokens: Sequence[int], *, max_bytes: int
    ) -> None:
        """`layout_of(row)` lays one row out; `num_tokens` are the real tokens of each row's layout."""
        self._backbone, self._layout_of = backbone, layout_of
        self._states: dict[int, list[Tensor]] = {}
        hidden_size = backbone.model.config.get_text_config().hidden_size
        token_bytes = hidden_size * torch.empty(0, dtype=backbone.dtype).element_size()
        totals = [token_bytes * total for total in accumulate(num_tokens)] if backbone.trunk is not None else []
        self.num_kept = bisect_right(totals, max_bytes)
        """The rows from 0 to num_kept - 1 are kept."""
        self.num_bytes = totals[self.num_kept - 1] if self.num_kept else 0
        """What they take once all of them have been met."""

    def features(self, rows: Sequence[int], layout: Layout) -> Tensor | None:
        """(R, W, H) of the layout of these rows, 0 at padding of kept rows; None where there is no trunk."""
        fresh = [place for place, row in enumerate(rows) if row >= self.num_kept]
        if len(fresh) == len(rows):
            return self._backbone.features(layout)
        per_row = len(layout.input_ids) // len(rows)
        states = [self._row(row) if row < self.num_kept else [] for row in rows]
        example = next(filter(None, states))[0]
        features = example.new_zeros(*layout.input_ids.shape, example.shape[-1]).to(layout.input_ids.device)
        for place, parts in enumerate(states):
            for number, part in enumerate(parts):
                features[place * per_row + number, : len(part)] = part.to(features.device)
        if fresh:
            prompts = torch.tensor(fresh, device=features.device)
            computed = self._backbone.features(layout.select(prompts))
            assert computed is not None
            features.unflatten(0, (len(rows), per_row))[prompts] = computed.unflatten(0, (len(fresh), per_row))
        return features

    def _row(self, row: int) -> list[Tensor]:
        """The states of one row's real tokens, (w, H) for every row of its layout."""
        if row not in self._states:
            layout = self._layout_of(row)
            features = self._backbone.features(layout)
            assert features is not None
            real = (layout.segments >= 0).sum(1).tolist()
            # clone: a slice would keep the padding, and the device's memory, alive
            self._states[row] = [part[:width].clone().cpu() for part, width in zip(features, real, strict=True)]
        return self._states[row]


def load_reward_backbone(
    name: str | Any,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    num_layers: int | None = None,
    trainable_layers: int | None = None,
    lora_r: int | None = None,
    lora_alpha: int = 32,
    lora_target_modules: str | list[str] = "all-linear",
    gradient_checkpointing: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    seed: int = 0,
) -> RewardBackbone:
    """The decoder of a causal language model with a fresh scalar head, ready to be trained.

    `name` is what `load_policy` takes, or a reward model (a folder or hub id of a sequence classifier with one label),
    which keeps its head. A model in memory needs its `tokenizer` and is trained in place. The head is drawn from
    N(0, 1 / (d + 1)) with d the hidden size (Stiennon et al. 2020, arXiv 2009.01325), by `seed`. With `num_layers` only
    the first decoder layers are kept, see `keep_first_layers`. What is trained, the head apart, is as in `load_policy`.
    The tokenizer gets a padding token that no text ends with, see `choose_pad_token`; no other id changes its meaning.

    Raises PairtuneError for a model that cannot be loaded or is no decoder.
    """
    torch_device = choose_device(device)
    notes = []
    if isinstance(name, str):
        torch_dtype, why = choose_dtype(dtype, torch_device)
        notes.append(why)
        tokenizer = tokenizer or load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
        settings: dict[str, Any] = {
            "dtype": torch_dtype,
            "attn_implementation": attn_implementation,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
        }
        if is_classifier(name, revision=revision, trust_remote_code=trust_remote_code):
            source = _load_classifier(name, settings).to(torch_device)
            notes.append("the model is a reward model already: training goes on from its head")
        else:
            source = load_causal_lm(name, device=torch_device, merge=True, **settings)
    else:
        if tokenizer is None:
            raise PairtuneError("model: a model passed in memory needs its tokenizer too; pass tokenizer=....")
        source = disable_dropout(name).to(torch_device).eval()
        torch_dtype = next(source.parameters()).dtype
    if num_layers is not None:
        notes.append(keep_first_layers(source, num_layers))
    ends = eos_ids(source, tokenizer)
    model = source if hasattr(source, "score") else with_scalar_head(source, seed=seed)
    notes.append(set_pad_token(model, tokenizer, ends))
    shown = name if isinstance(name, str) else type(name).__name__
    if model.config.num_labels != 1:
        raise PairtuneError(
            f"model: {shown!r} gives {model.config.num_labels} labels, where a reward model gives one; choose a causal "
            "language model or a classifier with num_labels = 1."
        )
    if not scores_every_prefix(model) or model.score.bias is not None:
        raise PairtuneError(
            f"model: {shown!r} ({model.config.model_type}) is no decoder with a linear head, so a score at the end of "
            "each completion cannot be read from it; choose a causal language model."
        )

    shared = can_share_prefix(model)
    notes.append(
        "prompts are encoded once for all their completions"
        if shared
        else "this architecture takes one row a completion"
    )
    trunk, top = None, body(model)
    if lora_r is not None:
        _add_adapters(top, lora_r, lora_alpha, lora_target_modules)
    elif trainable_layers is not None:
        train_last_layers(model, trainable_layers)
        if can_split(model, trainable_layers):
            trunk, top = split_body(top, trainable_layers)
    else:
        model.requires_grad_(True)
    model.score.requires_grad_(True)
    if gradient_checkpointing:
        checkpoint_activations(model)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    notes.append(f"training {sum(p.numel() for _, p in trained) / 1e6:.1f}M of {total / 1e6:.1f}M parameters")
    return RewardBackbone(
        model=model,
        tokenizer=tokenizer,
        masters=MasterWeights(trained),
        device=torch_device,
        dtype=torch_dtype,
        shared=shared,
        trunk=trunk,
        top=top,
        notes=notes,
    )


# ------------------------------------------------------------------------------------------------------------ the model


def is_classifier(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a hub id or a folder holds a sequence classifier rather than a language model."""
    from transformers import AutoConfig

    path = resolve_model(name)
    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        return False
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, KeyError, ValueError):
        return False  # whoever loads the model says what is wrong with it
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def _load_classifier(name: str, settings: dict[str, Any]) -> Any:
    from transformers import AutoModelForSequenceClassification

    try:
        model = AutoModelForSequenceClassification.from_pretrained(resolve_model(name), **settings)
    except (OSError, KeyError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise PairtuneError(f"model: the reward model {name!r} could not be loaded ({first[:200]}).") from error
    return disable_dropout(model).eval()


def keep_first_layers(model: Any, num_layers: int) -> str:
    """Drop all decoder layers but the first `num_layers`, in place; the final norm stays. Returns one sentence on it.

    What tells a good answer from a bad one is easiest to read in the middle of a language model; its last layers turn
    to the next token. Raises PairtuneError where the model has fewer layers, or keeps them under a name unknown here.
    """
    layers = decoder_layers(model)
    if layers is None:
        raise PairtuneError(
            f"num_layers: {model.config.model_type!r} keeps its decoder layers under no name that pairtune knows "
            "(layers, h); leave num_layers out."
        )
    total = len(layers)
    if num_layers > total:
        raise PairtuneError(f"num_layers: {num_layers} is out of range, this model has {total} decoder layers.")
    del layers[num_layers:]
    config = model.config.get_text_config()
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]
    return f"the first {num_layers} of {total} decoder layers are kept"


def with_scalar_head(language_model: Any, *, seed: int = 0) -> Any:
    """A sequence classifier with one label around the decoder of `language_model`, which it shares, its vocabulary head
    left behind.

    Raises PairtuneError for an architecture that transformers has no sequence classifier for.
    """
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(language_model.config)
    config.num_labels = 1
    decoder = language_model.base_model
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
    except ValueError as error:
        raise PairtuneError(
            f"model: transformers has no sequence classifier for {config.model_type!r}, so no reward model can be "
            "saved; choose another model."
        ) from error
    setattr(model, model.base_model_prefix, decoder)
    hidden_size = config.get_text_config().hidden_size
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, hidden_size, generator=generator) / (hidden_size + 1) ** 0.5
    first = next(decoder.parameters())
    model.score = nn.Linear(hidden_size, 1, bias=False, device=first.device, dtype=first.dtype)
    model.score.weight.data.copy_(weight)
    return disable_dropout(model).eval()


def _add_adapters(decoder: Any, rank: int, alpha: int, target_modules: str | list[str]) -> None:
    """LoRA adapters inside the decoder, in its own precision; nothing else of it is trained."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules)
    decoder.requires_grad_(False)
    try:
        inject_adapter_in_model(config, decoder, adapter_name=ADAPTER)
    except ValueError as error:
        raise PairtuneError(f"lora_target_modules: {target_modules!r} does not fit this model ({error}).") from error
    dtype = next(decoder.parameters()).dtype
    for parameter in decoder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def merged_state(model: Any) -> dict[str, Tensor]:
    """The weights of `model` by the names that they have without adapters, each adapter added to what it adapts.

    A copy: merging in place and back would not leave the weights as they were, to the last bit. With adapters it is in
    float32, for in bfloat16 the sum would round small changes away.
    """
    if not _has_adapters(model):
        return dict(model.state_dict())
    state = {
        name.replace(".base_layer.", "."): weight.float()
        for name, weight in model.state_dict().items()
        if ".lora_" not in name
    }
    for name, module in _adapted(model):
        key = f"{name}.weight"
        state[key] = state[key] + module.get_delta_weight(ADAPTER).float()
    return state


def _has_adapters(model: Any) -> bool:
    return any(True for _ in _adapted(model))


def _adapted(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers that an adapter was added to, by name."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer))


# ---------------------------------------------------------------------------------------------------- the padding token


def set_pad_token(model: Any, tokenizer: Any, ends: Sequence[int]) -> str:
    """Give model and tokenizer a padding token that no text ends with; returns one sentence on which.

    Only where the tokenizer has no spare token is one added to it. Then the embedding is enlarged if it must be: many
    have rows to spare.
    """
    pad = choose_pad_token(tokenizer, ends)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
        how = "which was added to the vocabulary"
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    else:
        how = "as before" if pad == tokenizer.pad_token else "a special token that it has no use for"
        tokenizer.pad_token = pad
    text_config = model.config.get_text_config()
    model.config.pad_token_id = text_config.pad_token_id = tokenizer.pad_token_id
    return f"padding with {tokenizer.pad_token!r}, {how}"


def choose_pad_token(tokenizer: Any, ends: Sequence[int]) -> str | None:
    """The token to pad with, or None if the tokenizer has none to spare.

    Its own, unless that is EOS, another token that ends a text, or the unknown token; else a special token that is
    neither of these nor BOS nor in the chat template: one that is called padding or reserved if there is one, else the
    last one.
    """
    taken = {*ends, tokenizer.eos_token_id, tokenizer.unk_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
        return str(tokenizer.pad_token)
    written = _written_by_template(tokenizer)
    spare = [
        token.content
        for token_id, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and token_id not in taken | {tokenizer.bos_token_id} and token.content not in written
    ]
    named = [token for token in spare if any(word in token.lower() for word in ("pad", "reserved", "unused"))]
    return next(iter(named), spare[-1] if spare else None)


def _written_by_template(tokenizer: Any) -> str:
    """The chat template and a conversation that it has rendered: a token may stand in one and not in the other."""
    if not tokenizer.chat_template:
        return ""
    turns = [{"role": role, "content": ""} for role in ("system", "user", "assistant")]
    written = [str(tokenizer.chat_template)]
    for conversation in (turns, turns[1:]):
        with contextlib.suppress(Exception):  # some refuse a system turn, and raise what they like
            written.append(str(tokenizer.apply_chat_template(conversation, tokenize=False)))
    return "".join(written)
