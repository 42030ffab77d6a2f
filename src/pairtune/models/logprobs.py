"""Log-probabilities of sampled completions, without waste.

A `Layout` says where every token of a batch stands in the rows of a forward pass. In the prefix-shared layout a row
holds a prompt once and its K completions behind it, each blind to the others, positions restarted after the prompt, and
what all prompts begin with is computed once for all rows; where an architecture does not allow that, a row holds one
prompt and one completion. Either way padding is squeezed out of the middle of a row, and width and opening are those of
the whole batch, so that however the batch is cut into micro-batches the same arithmetic is done.

A `Scorer` turns a layout into log-probabilities, and into values in the same pass. The vocabulary is met in chunks of
tokens, in the forward pass and in the backward pass: no tensor of more tokens by the whole vocabulary is ever made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from pairtune.maths.kl import entropy, rao_blackwellised_kl
from pairtune.models.opening import opening_length
from pairtune.models.sampler import truncate_logits
from pairtune.types import Completions

CPU_CHUNK_BYTES = 128 * 2**20
GPU_CHUNK_BYTES = 512 * 2**20
"""Bytes of float32 logits in one chunk of tokens: large enough for matrix products at full rate, small beside the
model."""


# --------------------------------------------------------------------------------------------------------------- layout


@dataclass(frozen=True)
class Layout:
    """Where the tokens of P prompts and their K completions stand in R rows of width W (R = P shared, R = P*K
    plain)."""

    input_ids: Tensor
    """(R, W) int64, real tokens first."""
    position_ids: Tensor
    """(R, W) int64; a completion's positions follow its prompt's."""
    segments: Tensor
    """(R, W) int64: -1 padding, 0 the prompt, k the k-th completion of the row (from 1)."""
    source: Tensor
    """(P, K, T) int64, the column whose hidden state predicts completion token t."""
    targets: Tensor
    """(P, K, T) int64, the completion tokens themselves."""
    mask: Tensor
    """(P, K, T) bool, True on completion tokens."""
    shared: bool
    """Whether the K completions of a prompt share its row."""
    opening: int = 0
    """Columns, from the first on, in which all rows hold the same tokens of their prompts; these go through the decoder
    once for all rows."""

    @property
    def num_tokens(self) -> int:
        """Real tokens of all rows, without the padding. The opening counts in each row, though it is computed once."""
        return int((self.segments >= 0).sum())

    def select(self, prompts: Tensor) -> Layout:
        """The layout of some of the prompts, at the same width. prompts: (p,) int64."""
        rows = prompts
        if not self.shared:
            num_generations = self.mask.shape[1]
            rows = (prompts[:, None] * num_generations + torch.arange(num_generations, device=prompts.device)).flatten()
        return Layout(
            self.input_ids[rows],
            self.position_ids[rows],
            self.segments[rows],
            self.source[prompts],
            self.targets[prompts],
            self.mask[prompts],
            self.shared,
            self.opening,
        )

    def rows(self, prompts: Tensor, features: Tensor) -> Tensor:
        """The rows of `features` (R, W, H) that belong to `prompts` (p,)."""
        return features.unflatten(0, (self.mask.shape[0], -1))[prompts].flatten(0, 1)

    def attention_mask(self) -> Tensor:
        """What the model is told: (R, 1, W, W) bool for a shared layout, True where a query may look; (R, W) for a
        plain one."""
        if not self.shared:
            return self.segments >= 0
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        width = self.segments.shape[1]
        causal = torch.ones(width, width, dtype=torch.bool, device=self.segments.device).tril()
        visible = ((key == 0) | (key == query)) & causal & (key >= 0)
        # A padding token looks at itself: a softmax over nothing would be NaN.
        visible |= torch.eye(width, dtype=torch.bool, device=visible.device)
        return visible[:, None]

    def hidden_rows(self) -> Tensor:
        """(n,) the row of the hidden state that predicts each of the n real completion tokens."""
        num_prompts, num_generations, _ = self.mask.shape
        rows = torch.arange(num_prompts * (1 if self.shared else num_generations), device=self.mask.device)
        rows = rows[:, None].expand(-1, num_generations) if self.shared else rows.view(num_prompts, num_generations)
        return rows[:, :, None].expand_as(self.mask)[self.mask]

    def predicting(self, states: Tensor) -> Tensor:
        """(n, H) of the hidden states (R, W, H): those that predict the n real completion tokens."""
        return states[self.hidden_rows(), self.source[self.mask]]

    def at_end(self, states: Tensor) -> Tensor:
        """(P, K, H) of the hidden states (R, W, H): those AT the last token of each completion, where a reward model
        reads its score. Meaningless for a completion without tokens, and in a layout made without `with_last`."""
        # The last column of its segment, which is k + 1 for the k-th completion of a shared row and 1 in a row of its
        # own. Not `source` + 1: the first token of a completion need not stand behind the token that predicts it.
        num_generations = self.mask.shape[1]
        per_row = num_generations if self.shared else 1
        completion = torch.arange(1, per_row + 1, device=states.device)[:, None]
        column = torch.arange(self.segments.shape[1], device=states.device)
        last = ((self.segments[:, None] == completion) * column).amax(-1)  # (R, per_row)
        rows = torch.arange(len(states), device=states.device)[:, None]
        return states[rows, last].view(-1, num_generations, states.shape[-1])

    def spread(self, tokens: Tensor) -> Tensor:
        """(P, K, T) of what was computed for the n real completion tokens, (n,) in their order; 0 where masked."""
        empty = torch.zeros(self.mask.shape, dtype=tokens.dtype, device=tokens.device)
        return empty.masked_scatter(self.mask, tokens)


def make_layout(completions: Completions, *, shared: bool, opening: bool = False, with_last: bool = False) -> Layout:
    """The layout of a batch of completions: prompt once with its K completions behind it (shared), or one row for
    each. `opening`: what all prompts begin with is computed once for all rows, if they are shared and it repays that.
    `with_last`: the last token of each completion stands there too, which predicts no other (`Layout.at_end`).
    """
    prompt_ids, prompt_mask = completions.prompt_ids, completions.prompt_mask
    completion_ids, completion_mask = completions.completion_ids, completions.completion_mask
    if not with_last:
        completion_mask = F.pad(completion_mask[:, :, 1:], (0, 1))
    num_prompts, num_generations, length = completion_ids.shape
    if not shared:
        prompt_ids = prompt_ids.repeat_interleave(num_generations, 0)
        prompt_mask = prompt_mask.repeat_interleave(num_generations, 0)
        completion_ids, completion_mask = completion_ids.flatten(0, 1)[:, None], completion_mask.flatten(0, 1)[:, None]
    num_rows, per_row, _ = completion_ids.shape
    prompt_width = prompt_ids.shape[1]

    device = prompt_ids.device
    ids = torch.cat([prompt_ids, completion_ids.flatten(1)], 1)
    real = torch.cat([prompt_mask, completion_mask.flatten(1)], 1)
    prompt_length = prompt_mask.sum(1)
    within_completion = prompt_length[:, None, None] + torch.arange(length, device=device)
    positions = torch.cat(
        [(prompt_mask.cumsum(1) - 1).clamp(min=0), within_completion.expand(num_rows, per_row, length).flatten(1)], 1
    )
    segments = torch.cat(
        [
            torch.zeros_like(prompt_ids),
            torch.arange(1, per_row + 1, device=device).repeat_interleave(length).expand(num_rows, -1),
        ],
        1,
    )

    # A stable sort of "is padding" moves real tokens to the front and keeps their order: every row at once.
    order = (~real).to(torch.int8).argsort(dim=1, stable=True)
    width = int(real.sum(1).max())
    kept = order[:, :width]
    still_real = real.gather(1, kept)
    column_of = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=device).expand_as(order))

    # Token t of a completion is predicted at token t - 1, its first token at the last token of the prompt.
    before = prompt_width - 1 + torch.arange(per_row * length, device=device).view(per_row, length)
    before[:, 0] = prompt_width - 1
    source = column_of[:, before.flatten()].view(num_prompts, num_generations, length)
    return Layout(
        input_ids=ids.gather(1, kept),
        position_ids=positions.gather(1, kept).masked_fill(~still_real, 0),
        segments=segments.gather(1, kept).masked_fill(~still_real, -1),
        source=source.clamp(max=width - 1),
        targets=completions.completion_ids,
        mask=completions.completion_mask,
        shared=shared,
        opening=opening_length(prompt_ids, prompt_mask, num_tokens=int(real.sum())) if shared and opening else 0,
    )


# ---------------------------------------------------------------------------------------------------- vocabulary chunks


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """How many tokens meet the vocabulary at once."""
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    return max(16, budget // (4 * vocab_size))


def _on_cpu_in_float32(tensor: Tensor) -> bool:
    """Where what is done about the vocabulary's products and gradients was measured."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size))


def _chunk_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, *, any_strides: bool = False
) -> Tensor:
    """(n, V) float32 logits (float64 where the model is), as the compute precision gives them. With `any_strides` those
    of one token need not stand side by side."""
    if any_strides and _on_cpu_in_float32(hidden):
        # The same product the other way round, which is a fifth faster where the tokens are few beside the vocabulary.
        logits = torch.mm(weight, hidden.T).T
        logits = logits if bias is None else logits.add_(bias)
    else:
        logits = F.linear(hidden, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits if temperature == 1.0 else logits.div_(temperature)


class _ChunkedLogprobs(torch.autograd.Function):
    """log softmax(hidden @ weight.T / temperature)[target] for every token, one chunk of tokens at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        with_entropy: bool,
        weight_grad: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        hidden_trained, weight_trained, bias_trained = ctx.needs_input_grad[:3]
        ctx.head_trained = weight_trained or bias_trained
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logprobs = torch.empty(len(targets), dtype=accumulate, device=hidden.device)
        entropies = torch.zeros_like(logprobs)
        # With a frozen head the derivative by the hidden state does not depend on anything that comes later: it is
        # formed here, while the chunk's softmax is at hand, and the backward pass needs no product with the vocabulary
        # at all.
        jacobian = torch.empty_like(hidden) if hidden_trained and not ctx.head_trained else None
        # A single chunk is kept: the backward pass would make as large a one again. Of several, none is.
        kept: list[Tensor | None] = [None, None]
        normaliser = torch.empty_like(logprobs)
        for rows in _chunks(len(targets), chunk):
            logits = _chunk_logits(hidden[rows], weight, bias, temperature, any_strides=True)
            picked = logits.gather(1, targets[rows, None]).squeeze(1)
            top = logits.amax(1, keepdim=True)
            if with_entropy:
                shifted = logits.sub_(top)
                probs = shifted.exp()
                mass = probs.sum(1)
                # sum_v p_v * shifted_v in place: no third tensor of the chunk's size.
                entropies[rows] = mass.log() - shifted.mul_(probs).sum(1) / mass
            else:
                probs = logits.sub_(top).exp_()
                mass = probs.sum(1)
            normaliser[rows] = mass.log() + top.squeeze(1)
            logprobs[rows] = picked - normaliser[rows]
            if jacobian is not None:
                expected = torch.mm(probs.div_(mass[:, None]).to(weight.dtype), weight)
                jacobian[rows] = torch.sub(weight[targets[rows]], expected).div_(temperature)
            elif ctx.head_trained and len(targets) <= chunk:
                kept = [probs.scatter_add_(1, targets[:, None], -mass[:, None]), mass]
        ctx.temperature, ctx.chunk, ctx.weight_grad = temperature, chunk, weight_grad
        if jacobian is not None:
            ctx.save_for_backward(jacobian)
        elif ctx.head_trained:
            ctx.save_for_backward(hidden, weight, bias, targets, normaliser, *kept)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.head_trained:
            (jacobian,) = ctx.saved_tensors
            return jacobian * grad[:, None].to(jacobian.dtype), *[None] * 7
        hidden, weight, bias, targets, normaliser, kept, mass = ctx.saved_tensors
        hidden_grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_grad = ctx.weight_grad
        if weight_grad is None and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight)
        bias_grad = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for rows in _chunks(len(targets), ctx.chunk):
            # The derivative by the logits is scale * error, error being the law less one at the token: the scale goes
            # onto hidden states, which are narrow beside a vocabulary.
            scale = -grad[rows, None] / ctx.temperature
            if kept is None:
                error = _chunk_logits(hidden[rows], weight, bias, ctx.temperature, any_strides=True)
                error.sub_(normaliser[rows, None]).exp_()
                error.scatter_add_(1, targets[rows, None], torch.full_like(scale, -1.0))
            else:
                error, scale = kept, scale / mass[:, None]
            error = error.to(hidden.dtype)
            if hidden_grad is not None:
                hidden_grad[rows] = torch.mm(error, weight) * scale
            if weight_grad is not None:
                weight_grad.addmm_(error.T, (hidden[rows] * scale).to(hidden.dtype))
            if bias_grad is not None:
                bias_grad.add_(torch.mv(error.T, scale[:, 0].to(error.dtype)))
        return hidden_grad, weight_grad if ctx.weight_grad is None else None, bias_grad, *[None] * 5


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
    weight_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens under a linear head, in chunks of tokens by the whole vocabulary.

    hidden (n, H), weight (V, H), targets (n,) int64, bias (V,) or None -> log-probabilities (n,) in nats,
    differentiable by hidden, weight and bias, and entropies (n,) in nats, not differentiable (zeros unless
    `with_entropy`). float32, or float64 where `hidden` is. `chunk` tokens meet the vocabulary at a time; logits are
    divided by `temperature`.

    The memory above the inputs is that of a few chunks of logits and of the head's own gradient; where a single chunk
    holds all tokens, it is kept for the backward pass. `weight_grad` (V, H), a gradient that is there already, takes
    the head's away: the backward pass adds to it in place and hands autograd none.
    """
    if chunk is None:
        chunk = chunk_tokens(weight.shape[0], weight.device)
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets, temperature, chunk, with_entropy, weight_grad)


# --------------------------------------------------------------------------------------------------------------- scorer


@dataclass(frozen=True)
class TokenScores:
    """What one forward pass says of completions, every field (P, K, T) float32 (float64 where the model is), 0 where
    masked."""

    logprobs: Tensor
    """Of the sampled tokens, nats; differentiable where the model is trained."""
    entropies: Tensor
    """Of the law of each token, nats; not differentiable, and zeros unless asked for."""
    values: Tensor | None
    """Before each token, in the unit of the reward; differentiable by value function and model. None without a value
    function."""


class Scorer:
    """Scores completions under a causal language model: the one place where policy, old policy and reference are
    evaluated.

    `shared` and `opening` say what a layout may hold once: a prompt for its completions, what all prompts begin with.
    `num_top_layers` splits the decoder: what lies below is the trunk, frozen and shared with the reference, computed
    once a batch by `features` and reused by every pass over it.
    """

    def __init__(
        self,
        model: Any,
        *,
        shared: bool,
        opening: bool = False,
        num_top_layers: int | None = None,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model = model
        self.shared, self.opening = shared, opening
        self.context = context
        self.trunk: Any = None
        self.top: Any = body(model)
        if num_top_layers is not None and num_top_layers < len(self.top.layers):
            self.trunk, self.top = split_body(self.top, num_top_layers)
        self.head = causal_lm(model).get_output_embeddings()

    @property
    def top_share(self) -> float:
        """The share of the decoder's layers that stand above the trunk; 1 where there is no trunk."""
        if self.trunk is None:
            return 1.0
        return len(self.top.layers) / (len(self.trunk.layers) + len(self.top.layers))

    def with_top(self, model: Any) -> Scorer:
        """The scorer of another model whose trunk is this one's: `model` holds a copy of the top layers only."""
        other = copy.copy(self)
        other.top = model
        return other

    def layout(self, completions: Completions) -> Layout:
        return make_layout(completions, shared=self.shared, opening=self.opening)

    @torch.no_grad()
    def features(self, layout: Layout) -> Tensor | None:
        """(R, W, H) what the frozen trunk makes of every token, or None where the whole model is trained."""
        if self.trunk is None:
            return None
        return run_decoder(self.trunk, layout, {"input_ids": layout.input_ids})

    def hidden(self, layout: Layout, features: Tensor | None = None) -> Tensor:
        """(n, H) the final hidden states that predict the layout's n real completion tokens."""
        if self.trunk is not None and features is None:
            features = self.features(layout)
        with self.context():
            if features is not None:
                inputs = {"inputs_embeds": features}
            elif layout.opening > 0:
                inputs = {"inputs_embeds": self._embedded(layout.input_ids)}
            else:
                inputs = {"input_ids": layout.input_ids}
            states = run_decoder(self.top, layout, inputs)
        return layout.predicting(states)

    def _embedded(self, ids: Tensor) -> Tensor:
        """(R, W, H) the decoder's own embeddings. Where the head has the same weights, their gradient is sparse: it is
        added to that of the head, and no second tensor of the vocabulary's size is made."""
        embedding: Any = self.top.get_input_embeddings()
        tied = type(embedding) is nn.Embedding and embedding.weight is self.head.weight
        hooked = bool(embedding._forward_pre_hooks or embedding._forward_hooks)
        if not tied or hooked or embedding.max_norm is not None or not _on_cpu_in_float32(embedding.weight):
            return embedding(ids)
        return F.embedding(ids, embedding.weight, embedding.padding_idx, sparse=True)

    def head_weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """The vocabulary head's weight and bias in the precision of the hidden states (a reference may store them in
        less)."""
        weight, bias = self.head.weight, self.head.bias
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def logprobs(
        self, layout: Layout, features: Tensor | None = None, *, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (zeros unless asked for) of all completion tokens, as in `TokenScores`."""
        scores = self.score(layout, features, temperature=temperature, with_entropy=with_entropy)
        return scores.logprobs, scores.entropies

    def score(
        self,
        layout: Layout,
        features: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        value_head: Callable[[Tensor], Tensor] | None = None,
    ) -> TokenScores:
        """Log-probabilities, entropies and values of all completion tokens out of one forward pass.

        `value_head` maps final hidden states (n, H) to values (n,). The hidden state that predicts a token gives the
        value before it; no temperature touches it.
        """
        hidden = self.hidden(layout, features)
        weight, bias = self.head_weights(hidden.dtype)
        logprobs, entropies = chunked_logprobs(
            hidden,
            weight,
            layout.targets[layout.mask],
            bias=bias,
            temperature=temperature,
            with_entropy=with_entropy,
            # From the second micro-batch on there is a gradient to add to. One of lower precision goes through its
            # master.
            weight_grad=weight.grad if weight.is_leaf and weight.dtype == torch.float32 else None,
        )
        return TokenScores(
            layout.spread(logprobs),
            layout.spread(entropies),
            None if value_head is None else layout.spread(value_head(hidden)),
        )


def run_decoder(module: Any, layout: Layout, inputs: dict[str, Tensor]) -> Tensor:
    """(R, W, H) what a decoder (or a part of one) makes of a layout; `inputs` are `input_ids` or `inputs_embeds`."""
    mask = layout.attention_mask()
    if layout.shared and module.config._attn_implementation == "eager":
        # Eager attention adds its mask to the scores; the others take a boolean one.
        dtype = next(module.parameters()).dtype
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    words: dict[str, Any] = {**inputs, "position_ids": layout.position_ids}
    if layout.opening == 0:
        return module(**words, attention_mask=mask, use_cache=False, return_dict=True).last_hidden_state

    def states(rows: slice, columns: slice) -> Tensor:
        part = {name: tensor[rows, columns] for name, tensor in words.items()}
        seen = mask[rows, :, columns, : columns.stop]
        output = module(**part, attention_mask=seen, past_key_values=cache, use_cache=True, return_dict=True)
        return output.last_hidden_state

    # The library's cache without a configuration: it concatenates, so gradients pass through it to the opening.
    cache = DynamicCache()
    opening = states(slice(0, 1), slice(0, layout.opening))
    num_rows, width = layout.segments.shape
    cache.batch_repeat_interleave(num_rows)
    own = states(slice(0, num_rows), slice(layout.opening, width))
    return torch.cat([opening.expand(num_rows, -1, -1), own], 1)


@dataclass(frozen=True)
class Divergence:
    """What two policies make of the same completions, every field (P, K, T) float32 nats, 0 where masked."""

    policy_logprobs: Tensor
    """Of the sampled tokens, under the law that samples (temperature, top-p, top-k)."""
    ref_logprobs: Tensor
    """Of the sampled tokens, under the reference at the same temperature, not truncated."""
    kl: Tensor
    """sum_v p(v) log(p(v) / ref(v)) over the whole vocabulary at each token: the Rao-Blackwellised term."""
    entropy: Tensor


@torch.no_grad()
def divergence(
    policy: Scorer,
    reference: Scorer,
    layout: Layout,
    features: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
) -> Divergence:
    """Compare the law that samples with the reference along sampled completions, in chunks of tokens by the whole
    vocabulary."""
    hidden, ref_hidden = policy.hidden(layout, features), reference.hidden(layout, features)
    head, ref_head = policy.head_weights(hidden.dtype), reference.head_weights(hidden.dtype)
    targets = layout.targets[layout.mask]
    columns: list[list[Tensor]] = [[], [], [], []]
    # Several tensors of a chunk's size stand side by side here.
    for rows in _chunks(len(targets), max(1, chunk_tokens(head[0].shape[0], hidden.device) // 4)):
        logits, picked = _chunk_logits(hidden[rows], *head, temperature), targets[rows, None]
        kept = truncate_logits(logits, top_p=top_p, top_k=top_k)
        if kept is not logits:
            # The sampler rounds otherwise: a token at the edge that it drew belongs to the law all the same.
            kept = kept.scatter(1, picked, logits.gather(1, picked))
        law = kept.log_softmax(-1)
        ref = _chunk_logits(ref_hidden[rows], *ref_head, temperature).log_softmax(-1)
        parts = (law.gather(1, picked)[:, 0], ref.gather(1, picked)[:, 0], rao_blackwellised_kl(law, ref), entropy(law))
        for column, part in zip(columns, parts, strict=True):
            column.append(part)
    return Divergence(*(layout.spread(torch.cat(column).float()) for column in columns))


# ------------------------------------------------------------------------------------------ what an architecture allows


def causal_lm(model: Any) -> Any:
    """The language model itself, out of its peft wrapper if it has one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body(model: Any) -> Any:
    """The decoder without its vocabulary head."""
    return causal_lm(model).base_model


def decoder_layers(model: Any) -> Any:
    """The list of a model's decoder layers; None where it stands under no name that pairtune knows (layers, h)."""
    decoder = body(model)
    return getattr(decoder, "layers", getattr(decoder, "h", None))


def split_body(decoder: Any, num_top_layers: int) -> tuple[Any, Any]:
    """(trunk, top): the decoder cut in two that share its parameters; the top takes the trunk's output as
    `inputs_embeds`."""
    layers = list(decoder.layers)
    trunk = _shallow_copy(decoder, layers=nn.ModuleList(layers[:-num_top_layers]), norm=nn.Identity())
    top = _shallow_copy(decoder, layers=nn.ModuleList(layers[-num_top_layers:]))
    if kinds := getattr(decoder.config, "layer_types", None):
        # A decoder asks its configuration which attention mask its i-th layer takes, and the top counts from 0.
        top.config = copy.copy(decoder.config)
        top.config.num_hidden_layers, top.config.layer_types = num_top_layers, list(kinds[-num_top_layers:])
    return trunk, top


def frozen_top(top: Any) -> Any:
    """The top of a split decoder with layers and norm of its own that nobody trains, for the reference; the rest is
    shared."""
    return _shallow_copy(
        top,
        layers=copy.deepcopy(top.layers).requires_grad_(False),
        norm=copy.deepcopy(top.norm).requires_grad_(False),
    )


def _shallow_copy(module: Any, **replaced: nn.Module) -> Any:
    twin = copy.copy(module)
    twin._modules = {**module._modules, **replaced}
    return twin


@torch.no_grad()
def can_split(model: Any, num_top_layers: int) -> bool:
    """Whether trunk and top, one after the other, give exactly what the whole decoder gives (they do not where
    embeddings are scaled or positions added on the way in)."""
    decoder = body(model)
    if not hasattr(decoder, "layers") or not hasattr(decoder, "norm") or num_top_layers >= len(decoder.layers):
        return False
    ids = probe_ids(decoder, (2, 6))
    with _narrow_windows(decoder.config):
        trunk, top = split_body(decoder, num_top_layers)
        between = trunk(input_ids=ids, use_cache=False).last_hidden_state
        whole = decoder(input_ids=ids, use_cache=False).last_hidden_state
        return torch.equal(top(inputs_embeds=between, use_cache=False).last_hidden_state, whole)


@contextmanager
def _narrow_windows(config: Any) -> Iterator[None]:
    """Windows of attention so small that a probe of a few tokens sees them."""
    windows = {name: getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")}
    windows = {name: size for name, size in windows.items() if size}
    try:
        for name in windows:
            setattr(config, name, 3)
        yield
    finally:
        for name, size in windows.items():
            setattr(config, name, size)


def sharing(*models: Any, opening: bool = True) -> tuple[bool, bool]:
    """What a layout for all of these models may hold once: a prompt for its completions; what all prompts begin with
    (never, where `opening` is not wanted)."""
    shared = all(map(can_share_prefix, models))
    return shared, opening and shared and all(map(can_share_opening, models))


@torch.no_grad()
def can_share_prefix(model: Any) -> bool:
    """Whether a prompt may stand once before its K completions.

    Found out on the model itself: the shared layout must give the hidden states that plain rows give, and a completion
    must not change when its neighbour does. Sliding windows count columns, not positions, so they are left to plain
    rows.
    """
    config = causal_lm(model).config
    kinds = getattr(config, "layer_types", None) or []
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if any(kind != "full_attention" for kind in kinds) or (windowed and not kinds):
        return False
    decoder = body(model)
    ids = probe_ids(decoder, (2, 12))
    prompt, completions = ids[:, :4], ids[:, 4:].view(2, 2, 4)
    shared, plain = (_probe_states(decoder, prompt, completions, shared=shared) for shared in (True, False))
    if shared is None or plain is None:
        return False
    other = completions.clone()
    other[:, 0] = (other[:, 0] + 1) % decoder.config.vocab_size
    changed = _probe_states(decoder, prompt, other, shared=True)
    blind = changed is not None and torch.equal(shared[:, 1], changed[:, 1])
    return blind and _equal_but_for_rounding(decoder, shared, plain)


@torch.no_grad()
def can_share_opening(model: Any) -> bool:
    """Whether what all prompts begin with may go through the decoder once for all of them, in the shared layout.

    Found out on the model itself, one that `can_share_prefix`: it must give the hidden states that it gives without.
    """
    decoder = body(model)
    ids = probe_ids(decoder, (2, 13))
    prompt, completions = ids[:, :5], ids[:, 5:].view(2, 2, 4)
    prompt[1, :3] = prompt[0, 1:4]  # behind the padding of the first
    once, each = (_probe_states(decoder, prompt, completions, shared=True, opening=o) for o in (True, False))
    return once is not None and each is not None and _equal_but_for_rounding(decoder, once, each)


def _probe_states(
    decoder: Any, prompt: Tensor, completion_ids: Tensor, *, shared: bool, opening: bool = False
) -> Tensor | None:
    """(P, K, T, H) the states that predict completions of full length; None for a decoder that does not take what the
    layout asks of it. The first prompt is padded by one token."""
    real = torch.ones_like(prompt, dtype=torch.bool)
    real[0, 0] = False
    sampled = Completions(
        prompt,
        real,
        completion_ids,
        torch.ones_like(completion_ids, dtype=torch.bool),
        torch.zeros(completion_ids.shape),
        torch.zeros(completion_ids.shape[:2], dtype=torch.bool),
        0,
    )
    layout = make_layout(sampled, shared=shared, opening=opening)
    inputs = {"input_ids": layout.input_ids}
    try:
        if opening:  # as a Scorer does
            inputs = {"inputs_embeds": decoder.get_input_embeddings()(layout.input_ids)}
        hidden = run_decoder(decoder, layout, inputs)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError):
        if shared:  # the architecture takes no mask of four dimensions, has no embeddings, or keeps no cache
            return None
        raise
    return layout.predicting(hidden).view(*completion_ids.shape, -1).float()


def _equal_but_for_rounding(decoder: Any, states: Tensor, expected: Tensor) -> bool:
    """In bfloat16 two layouts differ by rounding; a wrong position or a missing token differs by the size of the states
    themselves."""
    tolerance = 1e-3 if next(decoder.parameters()).dtype in (torch.float32, torch.float64) else 0.2
    return bool((states - expected).norm() <= tolerance * expected.norm())


def probe_ids(decoder: Any, shape: tuple[int, ...]) -> Tensor:
    """Token ids to find a model's behaviour out with: always the same."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, decoder.config.vocab_size, shape, generator=generator)
    return ids.to(next(decoder.parameters()).device)


def check_head(model: Any) -> bool:
    """Whether the logits are the output embedding applied to the final hidden states and nothing else (no soft cap, no
    scale)."""
    with torch.no_grad():
        ids = probe_ids(body(model), (1, 5))
        language_model = causal_lm(model)
        logits = language_model(input_ids=ids, use_cache=False).logits.float()
        own = language_model.get_output_embeddings()(
            body(model)(input_ids=ids, use_cache=False).last_hidden_state
        ).float()
    return torch.allclose(logits, own, rtol=1e-3, atol=1e-3)
