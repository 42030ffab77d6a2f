"""Sampling completions from a Hugging Face causal language model, in this process.

What all prompts begin with is encoded once, a prompt once for its K completions, rows that have ended leave the batch,
and every token is drawn with one uniform number that depends only on (seed, stream, dataset row, completion, token):
which other rows stand in the batch changes nothing but the last bits of the arithmetic.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, StopStringCriteria
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from pairtune.errors import PairtuneError
from pairtune.maths.random import counter_uniforms
from pairtune.models.opening import opening_length
from pairtune.models.packing import packed_linears
from pairtune.types import Completions, Prompts

EVALUATION_STREAM = -1
"""The stream of held-out evaluation. Training's streams are its steps, so the two never share a random number, and
every evaluation of a run draws the same ones: policies are compared on equal luck."""

BLOCK = 256
"""Tokens of the vocabulary summed together before one of them is searched for: near the root of its size."""

ROOM = 128
"""Tokens by which a cache buffer grows at most: one copy of the cache in so many tokens, that much unused at most."""


@dataclass(frozen=True)
class SamplingParams:
    """The law that completions are sampled under and what ends them. Raises PairtuneError for a value out of range."""

    temperature: float = 1.0
    """Divides the logits."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together hold this probability; 1: from all."""
    top_k: int = 0
    """Sample from this many likeliest tokens, before top_p is looked at; 0: from all."""
    max_completion_length: int = 256
    """Tokens, EOS included."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion; they stay in it."""

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise PairtuneError(f"temperature must be above 0, not {self.temperature}; 0.01 is as good as greedy.")
        if not 0 < self.top_p <= 1:
            raise PairtuneError(f"top_p must be above 0 and at most 1, not {self.top_p}; 1 samples from all tokens.")
        if self.top_k < 0:
            raise PairtuneError(f"top_k must not be negative, but is {self.top_k}; 0 samples from all tokens.")
        if self.max_completion_length < 1:
            raise PairtuneError(f"max_completion_length must be at least 1 token, not {self.max_completion_length}.")
        if "" in self.stop:
            raise PairtuneError("stop holds an empty text, which would end every completion; leave it out.")


class Sampler(Protocol):
    """Whatever turns prompts into completions."""

    def generate(
        self,
        prompts: Prompts,
        num_generations: int,
        params: SamplingParams,
        *,
        seed: int,
        stream: int,
        policy_version: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Completions: ...


class HFSampler:
    """Samples from a Hugging Face causal language model (plain or wrapped by peft) that keeps a standard cache.

    model: sampled as it is now, in its own precision; dropout is off while sampling.
    tokenizer: read for stop strings only.
    eos_token_ids: any of them ends a completion and stays in it.
    pad_token_id: what `completion_ids` holds where masked.
    opening: whether what all prompts begin with may be encoded once (`sharing` tells).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        eos_token_ids: tuple[int, ...],
        pad_token_id: int,
        opening: bool = False,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.pad_token_id = pad_token_id
        self.opening = opening
        # Some architectures read positions off the mask (BLOOM), and some always return all logits.
        causal_lm: Any = getattr(model, "get_base_model", lambda: model)()
        self.accepts = set(inspect.signature(causal_lm.forward).parameters)
        self._stop_criteria: dict[tuple[str, ...], StopStringCriteria] = {}

    def generate(
        self,
        prompts: Prompts,
        num_generations: int,
        params: SamplingParams,
        *,
        seed: int,
        stream: int,
        policy_version: int = 0,
        on_token: Callable[[int, int], None] | None = None,
    ) -> Completions:
        """K completions of each of P prompts; T is the longest one's tokens. The result lies on the model's device.

        stream: the training step, or EVALUATION_STREAM. Equal (seed, stream, dataset row) draw equal numbers, so a
        prompt that stands twice in a batch gets the same completions twice.
        on_token: called after each token with (tokens drawn so far, max_completion_length).
        Raises PairtuneError where the model's logits are not finite, a prompt is empty, or prompt and completion
        together exceed the model's positions.
        """
        device = next(self.model.parameters()).device
        prompt_ids, prompt_mask = prompts.ids.to(device), prompts.mask.to(device)
        self._check(prompt_mask, params)
        num_rows, max_length = len(prompts) * num_generations, params.max_completion_length
        ends = self._ending(params.stop, device)
        counters = prompts.rows.cpu()[:, None, None], torch.arange(num_generations)[:, None], torch.arange(max_length)
        uniforms = counter_uniforms(seed, stream, *counters).reshape(num_rows, max_length).to(device)

        ids = torch.full((num_rows, max_length), self.pad_token_id, device=device)
        logprobs = torch.zeros(num_rows, max_length, device=device)
        lengths = torch.full((num_rows,), max_length, device=device)
        truncated = torch.ones(num_rows, dtype=torch.bool, device=device)
        # Whatever follows is kept for the rows still in the batch; `rows` says which they are.
        rows = torch.arange(num_rows, device=device)
        width = prompt_mask.shape[1]

        # The prompts' pass too: packed products of many rows are as fast as plain ones, and its head sees few rows.
        packed = packed_linears(self.model, num_rows=num_rows, num_steps=max_length)
        with torch.no_grad(), _evaluating(self.model), packed:
            cache = preallocated_cache(self.model.config, room=min(max_length, ROOM))
            # One row a prompt; its K completions start from the same logits and from copies of the same cache.
            logits, mask = self._encode(prompt_ids, prompt_mask, cache)
            logits, mask = logits.repeat_interleave(num_generations, 0), mask.repeat_interleave(num_generations, 0)
            mask = F.pad(mask, (0, max_length), value=True)
            positions = prompt_mask.sum(-1, keepdim=True).repeat_interleave(num_generations, 0) - 1
            cache.batch_repeat_interleave(num_generations)
            for t in range(max_length):
                law = truncate_logits(_cooled(logits, params.temperature), top_p=params.top_p, top_k=params.top_k)
                tokens, token_logprobs = draw_tokens(law, uniforms[rows, t])
                ids[rows, t], logprobs[rows, t] = tokens, token_logprobs
                ended, sound = ends(ids[rows, : t + 1]), token_logprobs.isfinite()
                any_ended, all_sound = torch.stack((ended.any(), sound.all())).tolist()
                if not all_sound:
                    row = prompts.rows[int(rows[~sound][0]) // num_generations].item()
                    where = "in evaluation" if stream == EVALUATION_STREAM else f"at step {stream}"
                    raise PairtuneError(
                        f"The model's logits are NaN or infinite {where}, dataset row {row}, completion token {t}; "
                        "start from sound weights, or lower learning_rate."
                    )
                if on_token is not None:
                    on_token(t + 1, max_length)
                if any_ended:
                    lengths[rows[ended]], truncated[rows[ended]] = t + 1, False
                    keep = compacted(~ended)
                    rows, tokens, positions, mask = rows[keep], tokens[keep], positions[keep], mask[keep]
                    cache.batch_select_indices(keep)
                if t + 1 == max_length or len(rows) == 0:
                    break
                positions = positions + 1
                logits = self._next_logits(tokens[:, None], mask[:, : width + t + 1], positions, cache)

        longest = int(lengths.max())
        shape = (len(prompts), num_generations, longest)
        return Completions(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=ids[:, :longest].reshape(shape),
            completion_mask=(torch.arange(longest, device=device) < lengths[:, None]).reshape(shape),
            sampler_logprobs=logprobs[:, :longest].reshape(shape),
            truncated=truncated.reshape(shape[:2]),
            policy_version=policy_version,
        )

    def _encode(self, ids: Tensor, mask: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """(P, V) logits of the token after each prompt, and the mask (P, W) of what the cache then holds.

        ids, mask: (P, W), padded on the left; where all prompts begin alike, the cache holds that in its first columns
        and a row's padding behind it.
        """
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        length = opening_length(ids, mask) if self.opening else 0
        if length == 0:
            return self._next_logits(ids, mask, positions, cache), mask
        opening = ids[:1][mask[:1]][None, :length]
        columns = torch.arange(length, device=ids.device)[None]
        self._next_logits(opening, torch.ones_like(opening, dtype=torch.bool), columns, cache)
        cache.batch_repeat_interleave(len(ids))
        mask = mask & (positions >= length)
        mask[:, :length] = True
        return self._next_logits(ids[:, length:], mask, positions[:, length:], cache), mask

    def _next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache) -> Tensor:
        """(n, V) logits of the token after `ids` (n, q); mask (n, past + q) and positions (n, q) belong to it."""
        optional: dict[str, Any] = {"position_ids": positions, "logits_to_keep": 1}
        optional = {name: value for name, value in optional.items() if name in self.accepts}
        output = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **optional)
        return output.logits[:, -1]

    def _ending(self, stop: tuple[str, ...], device: torch.device) -> Callable[[Tensor], Tensor]:
        """ids (n, t) of completions so far -> (n,) bool, True where the last token ends its completion."""
        eos = torch.tensor(self.eos_token_ids, dtype=torch.int64, device=device)
        if not stop:
            return lambda ids: torch.isin(ids[:, -1], eos)
        if stop not in self._stop_criteria:
            try:
                self._stop_criteria[stop] = StopStringCriteria(self.tokenizer, list(stop))
            except ValueError as error:
                raise PairtuneError(f"stop: no token of this model can end any of {list(stop)}; change it.") from error
        matches = self._stop_criteria[stop]
        # The completion alone: a text that began in the prompt is not the model's to end.
        return lambda ids: torch.isin(ids[:, -1], eos) | matches(ids, None)

    def _check(self, prompt_mask: Tensor, params: SamplingParams) -> None:
        if not prompt_mask[:, -1].all():
            raise PairtuneError("A prompt is empty or padded on the right; give it a token, and pad on the left.")
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        prompt_length = int(prompt_mask.sum(-1).max())
        # The last token drawn is never fed back, so it needs no position.
        if 0 < positions < prompt_length + params.max_completion_length - 1:
            raise PairtuneError(
                f"max_completion_length={params.max_completion_length} and a prompt of {prompt_length} tokens exceed "
                f"the model's {positions} positions; shorten either."
            )


# ----------------------------------------------------------------------------------------------- the law and the draw


def _cooled(logits: Tensor, temperature: float) -> Tensor:
    """float32 logits of the law at this temperature, untouched at 1: each pass over a vocabulary costs."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def truncate_logits(logits: Tensor, *, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """The logits with -inf at every token that top-k and then top-p (nucleus) leave out. logits, result: (n, V).

    top-k keeps the k likeliest tokens. top-p keeps, of those renormalised, the fewest likeliest tokens whose
    probability reaches top_p, the one that crosses it included (Holtzman et al. 2020, "The curious case of neural
    text degeneration"). Of equally likely tokens at the edge the lower ids are kept.
    """
    num_tokens = logits.shape[-1]
    top_k = min(top_k, num_tokens) or num_tokens
    if top_p == 1 and top_k == num_tokens:
        return logits
    if top_p == 1:
        values = logits.topk(top_k).values
        num_kept = torch.full_like(values[:, :1], top_k, dtype=torch.int64)
    else:
        values, num_kept = _nucleus(logits, top_p, top_k)
    edge = values.gather(-1, num_kept - 1)
    above, tied = logits > edge, logits == edge
    tied_kept = num_kept - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (tied & (tied.cumsum(-1) <= tied_kept))), -torch.inf)


def _nucleus(logits: Tensor, top_p: float, top_k: int) -> tuple[Tensor, Tensor]:
    """(the largest logits (n, m), descending; how many of them (n, 1) are the nucleus of the top_k likeliest)."""
    if top_k < logits.shape[-1]:
        logits = logits.topk(top_k).values
    largest = logits.amax(-1, keepdim=True)
    enough = top_p * (logits - largest).exp().sum(-1, keepdim=True, dtype=torch.float64)
    # A nucleus is rarely wide, and sorting a whole vocabulary takes as long as a decode step.
    for num_candidates in (min(1024, top_k), top_k):
        values = logits.topk(num_candidates).values
        mass = (values - largest).exp().cumsum(-1, dtype=torch.float64)
        num_short = (mass < enough).sum(-1, keepdim=True)
        if (num_short < num_candidates).all():
            break
    return values, (num_short + 1).clamp(max=num_candidates)


def draw_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One token of each row by inverting its cumulative distribution, and the token's log-probability.

    logits: (n, V) float32, -inf at tokens that must not come. uniforms: (n,) float64 in (0, 1).
    Returns tokens (n,) int64 and log-probabilities (n,) float32, nats; NaN for a row whose logits hold NaN or +inf or
    nothing but -inf.
    """
    padding = -logits.shape[-1] % BLOCK
    padded = F.pad(logits, (0, padding), value=-torch.inf) if padding else logits
    largest = padded.amax(-1, keepdim=True)
    # Two levels, blocks and then the tokens of one block: one cumulative sum over the whole vocabulary would cost
    # more than the exponentials do, and in float32 it would lose the tail.
    masses = (padded - largest).exp_().unflatten(-1, (-1, BLOCK))
    block_masses = masses.sum(-1).double()
    block, uniforms = _invert(block_masses, uniforms)
    in_block = masses[torch.arange(len(block), device=block.device), block].double()
    tokens = block * BLOCK + _invert(in_block, uniforms)[0]
    log_total = block_masses.sum(-1).log() + largest[:, 0]
    return tokens, (logits.gather(-1, tokens[:, None])[:, 0] - log_total).float()


def _invert(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(the entry in whose share of the total each uniform falls, where within that share). masses: (n, m) float64.

    The second result is again uniform and independent of the first. An entry without mass is never chosen: its
    cumulative sum is left out, so that not even rounding at the far end can reach it.
    """
    cumulative = masses.cumsum(-1).masked_fill_(masses == 0, 0)
    target = uniforms * cumulative.amax(-1)
    entry = (cumulative > target[:, None]).to(torch.uint8).argmax(-1)
    mass = masses.gather(-1, entry[:, None])[:, 0]
    before = cumulative.gather(-1, entry[:, None])[:, 0] - mass
    return entry, ((target - before) / mass).clamp(0, 1 - 2**-53)


# ----------------------------------------------------------------------------------------------------- rows and cache


def compacted(alive: Tensor) -> Tensor:
    """Indices (m,) of the m rows alive, most of them where they are. alive: (n,) bool.

    Rows from the end fill the gaps, so that a cache moves as many rows as have ended, not as many as go on.
    """
    survivors = alive.nonzero()[:, 0]
    keep = torch.arange(len(survivors), device=alive.device)
    keep[~alive[: len(survivors)]] = survivors[survivors >= len(survivors)]
    return keep


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards each module in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _TokenBuffer:
    """Keys or values of one layer, (rows, heads, tokens, head size), with spare room behind the last token.

    Rows only leave and tokens only come, so both happen in place.
    """

    def __init__(self, states: Tensor, room: int, window: int | None) -> None:
        self.buffer, self.room, self.window = states, room, window
        self.rows, self.stop = states.shape[0], states.shape[2]

    @property
    def start(self) -> int:
        """The first token that later ones can attend to: a window counts the query itself."""
        return 0 if self.window is None else max(0, self.stop - self.window + 1)

    @property
    def view(self) -> Tensor:
        return self.buffer[: self.rows, :, self.start : self.stop]

    def append(self, states: Tensor) -> Tensor:
        """Takes in new tokens; returns what they attend to, themselves included."""
        if self.stop + states.shape[2] > self.buffer.shape[2]:
            self.repeat(1, more=states.shape[2])
        start, self.stop = self.start, self.stop + states.shape[2]
        attended = self.buffer[: self.rows, :, start : self.stop]
        attended[:, :, -states.shape[2] :] = states
        return attended

    def select(self, indices: Tensor) -> None:
        """Keeps these rows, in this order, which must be one of `compacted`: no row moves to where another is from."""
        to = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        kept = slice(self.start, self.stop)
        self.buffer[to, :, kept] = self.buffer[indices[to], :, kept]
        self.rows = len(indices)

    def repeat(self, repeats: int, more: int = 0) -> None:
        """Each row so many times, in a new buffer with room, and `more`; tokens out of the window stay behind."""
        kept = self.view
        rows, heads, tokens, size = kept.shape
        self.buffer = kept.new_empty(rows * repeats, heads, tokens + self.room + more, size)
        self.buffer.unflatten(0, (rows, repeats))[..., :tokens, :] = kept[:, None]
        self.rows, self.stop = rows * repeats, tokens


class _PreallocatedLayer(DynamicLayer):
    """A full-attention layer's cache that writes into spare room instead of copying itself at every token."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.window: int | None = None
        self.buffers: tuple[_TokenBuffer, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.buffers:
            keys, values = (b.append(s) for b, s in zip(self.buffers, (key_states, value_states), strict=True))
        else:
            self.lazy_initialization(key_states, value_states)
            keys, values = key_states, value_states
            self.buffers = tuple(_TokenBuffer(states, self.room, self.window) for states in (keys, values))
        self._publish()
        return keys, values

    def batch_repeat_interleave(self, repeats: int) -> None:
        for buffer in self.buffers:
            buffer.repeat(repeats)
        self._publish()

    def batch_select_indices(self, indices: Tensor) -> None:
        for buffer in self.buffers:
            buffer.select(indices)
        self._publish()

    def _publish(self) -> None:
        """The library and some models read these attributes."""
        self.keys, self.values = (buffer.view for buffer in self.buffers)


class _PreallocatedSlidingLayer(_PreallocatedLayer, DynamicSlidingWindowLayer):
    """The same for a layer that attends to its last `sliding_window` tokens only."""

    def __init__(self, room: int, sliding_window: int) -> None:
        DynamicSlidingWindowLayer.__init__(self, sliding_window)
        self.room = room
        self.window = sliding_window
        self.buffers = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cumulative_length += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)


def preallocated_cache(config: Any, *, room: int) -> DynamicCache:
    """The library's own cache for this architecture, with its attention layers' tensors in preallocated buffers.

    config: the model's. room: tokens by which a buffer grows. The library's layers concatenate, that is, they copy the
    whole cache at every token. Layers of other kinds (linear attention, shared keys and values) stay the library's.
    """
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        # Exactly these two types: what derives from them keeps more than keys and values.
        if type(layer) is DynamicLayer:
            cache.layers[index] = _PreallocatedLayer(room)
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = _PreallocatedSlidingLayer(room, layer.sliding_window)
    return cache
