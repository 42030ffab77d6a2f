"""The sampler: its law, its random numbers, its bookkeeping. Tiny models with random weights, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers import decoders as token_decoders
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from pairtune.errors import PairtuneError
from pairtune.maths.random import counter_uniforms
from pairtune.models import packing
from pairtune.models.loading import frozen_copy
from pairtune.models.sampler import (
    BLOCK,
    EVALUATION_STREAM,
    HFSampler,
    SamplingParams,
    compacted,
    draw_tokens,
    preallocated_cache,
    truncate_logits,
)
from pairtune.types import Completions, Prompts

VOCAB = 40
PAD = 0


# ---- factories


def tiny_model(name: str, vocab_size: int = VOCAB, **changes: Any) -> nn.Module:
    """A causal language model with random weights, wide enough apart that its next-token laws are far from uniform."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": vocab_size}
    grouped = {**sizes, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config: Any = {
        "llama": lambda: LlamaConfig(**{**grouped, **changes}),
        "qwen2": lambda: Qwen2Config(**{**grouped, **changes}),
        "qwen3": lambda: Qwen3Config(**{**grouped, "head_dim": 8, **changes}),
        # Full and sliding layers in one model.
        "qwen2-hybrid": lambda: Qwen2Config(
            **{**grouped, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, **changes}
        ),
        "mistral-window": lambda: MistralConfig(**{**grouped, "sliding_window": 4, **changes}),
        "gpt2": lambda: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=vocab_size, **changes),
        # Takes no position_ids.
        "bloom": lambda: BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=vocab_size, **changes),
    }[name]()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.35)
    return model


ARCHITECTURES = ["llama", "qwen2", "qwen3", "qwen2-hybrid", "mistral-window", "gpt2", "bloom"]


def letters_tokenizer() -> PreTrainedTokenizerFast:
    """Token i is a letter, or one of a few longer texts; enough for stop strings to straddle tokens."""
    texts = ["<pad>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "ab", "abc", "bca", "xyz", "cab", "zz", "yz"]
    vocab = {text: i for i, text in enumerate(texts)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = token_decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def make_prompts(lengths: list[int], rows: list[int] | None = None, vocab_size: int = VOCAB, seed: int = 1) -> Prompts:
    """Random prompts, left-padded. A prompt depends on its row only, not on its batch."""
    rows = list(range(len(lengths))) if rows is None else rows
    width = max(lengths)
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.bool)
    for i, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        generator = torch.Generator().manual_seed(seed * 1000 + row)
        ids[i, width - length :] = torch.randint(1, vocab_size, (length,), generator=generator)
        mask[i, width - length :] = True
    return Prompts(ids=ids, mask=mask, rows=torch.tensor(rows), prompts=["" for _ in lengths])


def make_sampler(model: nn.Module, eos: tuple[int, ...] = (), opening: bool = False) -> HFSampler:
    return HFSampler(model, letters_tokenizer(), eos_token_ids=eos, pad_token_id=PAD, opening=opening)


def alike(prompts: Prompts, num_alike: int) -> Prompts:
    """The same prompts, the first tokens of each replaced by the same ones."""
    ids = prompts.ids.clone()
    for row, mask in zip(ids, prompts.mask, strict=True):
        start = int((~mask).sum())
        row[start : start + num_alike] = torch.arange(1, 1 + num_alike)
    return replace(prompts, ids=ids)


def sample(
    model: nn.Module,
    prompts: Prompts,
    num_generations: int = 2,
    *,
    eos: tuple[int, ...] = (),
    opening: bool = False,
    seed: int = 0,
    stream: int = 0,
    **params: Any,
) -> Completions:
    params = {"max_completion_length": 8, **params}
    return make_sampler(model, eos, opening).generate(
        prompts, num_generations, SamplingParams(**params), seed=seed, stream=stream
    )


@torch.no_grad()
def plain_logits(model: nn.Module, prompt: Tensor, completion: Tensor) -> Tensor:
    """(t, V) logits of each completion token from one unpadded forward pass without a cache."""
    logits = model(torch.cat([prompt, completion])[None], use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def each_completion(completions: Completions) -> list[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(p, k, prompt ids, completion ids, sampler log-probabilities), padding removed."""
    found = []
    for p in range(completions.completion_ids.shape[0]):
        prompt = completions.prompt_ids[p][completions.prompt_mask[p]]
        for k in range(completions.completion_ids.shape[1]):
            mask = completions.completion_mask[p, k]
            found.append(
                (p, k, prompt, completions.completion_ids[p, k][mask], completions.sampler_logprobs[p, k][mask])
            )
    return found


def plain_truncation(logits: Tensor, top_p: float, top_k: int) -> Tensor:
    """(V,) float64 probabilities after top-k and top-p, the slow way, one row."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i].item(), i))
    if top_k:
        order = order[:top_k]
    weights = [math.exp(logits[i].item() - logits.max().item()) for i in order]
    total = sum(weights)
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.append(token)
        mass += weight / total
        if top_p < 1 and mass >= top_p:
            break
    law = torch.zeros(len(logits), dtype=torch.float64)
    law[kept] = (logits[kept].double() - logits.max().double()).exp()
    return law / law.sum()


def chi_square_p(observed: Tensor, expected: Tensor) -> float:
    """The upper tail of the chi-square statistic, cells expecting fewer than 5 merged into one."""
    small = expected < 5
    observed = torch.cat([observed[~small].double(), observed[small].double().sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor(len(expected) - 1, dtype=torch.float64)
    return torch.special.gammaincc(freedom / 2, statistic / 2).item()


# ---- random numbers


STREAMS: dict[str, Callable[[int], Tensor]] = {
    "tokens": lambda n: counter_uniforms(0, 0, 0, 0, torch.arange(n)),
    "completions": lambda n: counter_uniforms(0, 0, 0, torch.arange(n), 0),
    "rows": lambda n: counter_uniforms(0, 0, torch.arange(n), 0, 0),
    "steps": lambda n: counter_uniforms(0, torch.arange(n), 3, 1, 5),
    "seeds": lambda n: counter_uniforms(torch.arange(n), EVALUATION_STREAM, 0, 0, 0),
    "evaluation": lambda n: counter_uniforms(
        1234, EVALUATION_STREAM, torch.arange(n // 8)[:, None], 0, torch.arange(8)
    ).flatten(),
}


@pytest.mark.parametrize("name", STREAMS)
def test_uniforms_are_uniform_and_neighbours_uncorrelated(name: str) -> None:
    n = 1 << 16
    u = STREAMS[name](n)
    assert u.dtype == torch.float64
    assert u.min() > 0
    assert u.max() < 1
    assert u.unique().numel() == n
    # Fixed numbers, so a threshold that one stream in a thousand would miss is missed by none of these or always.
    assert chi_square_p(torch.histc(u, 256, 0, 1), torch.full((256,), n / 256, dtype=torch.float64)) > 1e-3
    deviation = (u.sort().values - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert deviation * math.sqrt(n) < 1.95  # Kolmogorov-Smirnov, 0.1%
    for lag in (1, 2, 7, 64):
        pairs = torch.histc((u[:-lag] * 16).floor() * 16 + (u[lag:] * 16).floor(), 256, 0, 256)
        assert chi_square_p(pairs, torch.full((256,), (n - lag) / 256, dtype=torch.float64)) > 1e-3
    # The low bits too, which a weak mixing leaves behind.
    low = (u * 2**40) % 1
    assert chi_square_p(torch.histc(low, 256, 0, 1), torch.full((256,), n / 256, dtype=torch.float64)) > 1e-3


def test_uniforms_of_different_streams_are_uncorrelated() -> None:
    n = 1 << 14
    drawn = torch.stack([make(n) for make in STREAMS.values()])
    correlation = torch.corrcoef(drawn) - torch.eye(len(drawn))
    assert correlation.abs().max() < 4.5 / math.sqrt(n)


def test_every_counter_changes_every_uniform() -> None:
    base = [3, 5, 7, 1, 2]
    seen = {counter_uniforms(*base).item()}
    for i in range(5):
        for change in (1, -1, 2**32):
            changed = list(base)
            changed[i] += change
            seen.add(counter_uniforms(*changed).item())
    # Order matters: the counters are not summed up.
    seen.add(counter_uniforms(5, 3, 7, 1, 2).item())
    seen.add(counter_uniforms(3, 5, 1, 7, 2).item())
    assert len(seen) == 1 + 15 + 2


def test_uniforms_equal_splitmix64() -> None:
    """The first outputs of the published generator for seed 0, so that the numbers never change by accident."""
    words = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    expected = torch.tensor([((word >> 12) + 0.5) / 2**52 for word in words], dtype=torch.float64)
    assert torch.equal(counter_uniforms(torch.arange(4)), expected)


@pytest.mark.parametrize("bits", [0, -1, 2**63 - 1, -(2**63)])
def test_no_hash_gives_zero_or_one(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pairtune.maths.random._absorb", lambda *_: torch.tensor(bits))
    assert 0 < counter_uniforms(0).item() < 1


def test_uniforms_take_any_integer_seed() -> None:
    assert counter_uniforms(2**64 + 5).item() == counter_uniforms(5).item()
    assert 0 < counter_uniforms(2**63).item() < 1


# ---- the draw


@pytest.mark.parametrize("vocab_size", [2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 5000, 49152])
def test_draw_is_the_exact_inverse_of_the_cumulative_law(vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    n = 64
    logits = torch.randn(n, vocab_size) * 4
    logits[: n // 2, ::2] = -torch.inf  # half of the tokens impossible, in half of the rows
    logits[: n // 2, -1] = -torch.inf
    logits[0, 0] = logits[n // 2 - 1, 0] = 0.0
    if vocab_size == 2:
        logits[: n // 2, 0] = 0.0
    u = counter_uniforms(vocab_size, torch.arange(n))
    tokens, logprobs = draw_tokens(logits, u)
    law = logits.double().log_softmax(-1)
    upper = law.exp().cumsum(-1)
    lower = upper - law.exp()
    picked = tokens[:, None]
    assert (u > lower.gather(1, picked)[:, 0] - 1e-6).all()
    assert (u < upper.gather(1, picked)[:, 0] + 1e-6).all()
    assert logits.gather(1, picked).isfinite().all()
    torch.testing.assert_close(logprobs.double(), law.gather(1, picked)[:, 0], atol=2e-6, rtol=0)
    # Away from an edge the token is that one exactly.
    exact = torch.searchsorted(upper, u[:, None], right=True)[:, 0].clamp(max=vocab_size - 1)
    edge = (upper - u[:, None]).abs().amin(-1) < 1e-6
    assert torch.equal(tokens[~edge], exact[~edge])
    assert edge.float().mean() < 0.5


@pytest.mark.parametrize("u", [2.0**-53, 1e-12, 0.5, 1 - 1e-12, 1 - 2.0**-53])
@pytest.mark.parametrize("vocab_size", [7, BLOCK, 3 * BLOCK + 5])
def test_impossible_tokens_are_never_drawn_at_the_edges(u: float, vocab_size: int) -> None:
    """First and last tokens, whole blocks, and all but one token impossible."""
    logits = torch.zeros(4, vocab_size)
    logits[0, :3] = -torch.inf
    logits[1, 4:] = -torch.inf
    logits[2] = -torch.inf
    logits[2, 5] = -80.0
    logits[3, :-1] = -torch.inf
    tokens, logprobs = draw_tokens(logits, torch.full((4,), u, dtype=torch.float64))
    assert logits.gather(1, tokens[:, None]).isfinite().all()
    assert tokens[2] == 5
    assert tokens[3] == vocab_size - 1
    assert torch.equal(logprobs[2:], torch.zeros(2))
    assert tokens[0] == (3 if u < 1e-3 else vocab_size - 1 if u > 1 - 1e-3 else tokens[0])


def test_largest_uniform_draws_no_token_beyond_rounding() -> None:
    """Ten million million to one between the likeliest token and the rest: float32 sums cannot see the tail."""
    logits = torch.full((1, 1000), -30.0)
    logits[0, 500] = 0.0
    tail = 999 * math.exp(-30.0)
    for u, expected in [(tail / 4, range(0, 500)), (0.5, [500]), (1 - tail / 4, range(501, 1000))]:
        assert draw_tokens(logits, torch.tensor([u], dtype=torch.float64))[0].item() in expected


def test_a_parallel_sum_that_rounds_unevenly_reaches_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU cumulative sums are not monotone in their last bits; here those bits are made large."""
    exact = Tensor.cumsum
    jitter = 1 + 0.05 * counter_uniforms(torch.arange(BLOCK))
    monkeypatch.setattr(Tensor, "cumsum", lambda x, *args, **words: exact(x, *args, **words) * jitter[: x.shape[-1]])
    n, vocab_size = 500, 2 * BLOCK
    logits = torch.zeros(n, vocab_size)
    logits[:, 1::2] = -torch.inf
    logits[:, -30:] = -torch.inf
    tokens, _ = draw_tokens(logits, counter_uniforms(0, torch.arange(n)))
    assert (tokens % 2 == 0).all()
    assert tokens.max() < vocab_size - 30


def test_draw_frequencies_match_the_law() -> None:
    torch.manual_seed(0)
    n, vocab_size = 12_000, 600
    logits = torch.randn(1, vocab_size) * 2
    tokens, _ = draw_tokens(logits.expand(n, -1), counter_uniforms(0, torch.arange(n)))
    expected = n * logits[0].double().softmax(-1)
    assert chi_square_p(torch.bincount(tokens, minlength=vocab_size), expected) > 1e-3


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 3), (0.7, 0), (0.6, 7), (0.05, 0), (0.999, 0), (1.0, 10_000)])
@pytest.mark.parametrize("vocab_size", [50, 1500, 9000])
def test_truncation_equals_the_plain_one(top_p: float, top_k: int, vocab_size: int) -> None:
    torch.manual_seed(1)
    # Flat enough that a nucleus is wider than the first look at the candidates.
    logits = torch.randn(4, vocab_size) * torch.tensor([0.3, 1.0, 2.0, 5.0])[:, None]
    law = truncate_logits(logits, top_p=top_p, top_k=top_k).double().softmax(-1)
    expected = torch.stack([plain_truncation(row, top_p, top_k) for row in logits])
    assert torch.equal(law > 0, expected > 0)
    torch.testing.assert_close(law, expected, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 3, [1, 2, 3]),
        (0.5, 0, [1, 2, 3, 4]),
        (0.49, 0, [1, 2, 3, 4]),
        (0.51, 0, [1, 2, 3, 4, 6]),
        (0.5, 4, [1, 2]),
    ],
)
def test_ties_keep_the_lower_ids(top_p: float, top_k: int, kept: list[int]) -> None:
    logits = torch.full((1, 10), 1.0)
    logits[0, [0, 5]] = -torch.inf
    assert truncate_logits(logits, top_p=top_p, top_k=top_k)[0].isfinite().nonzero()[:, 0].tolist() == kept


def test_without_truncation_the_logits_are_untouched() -> None:
    logits = torch.randn(2, 9)
    assert truncate_logits(logits) is logits


# ---- the law against a plain pass


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprobs_equal_a_plain_forward_pass(name: str) -> None:
    """Prompts of different lengths, rows that leave early, a window shorter than prompt and completion."""
    model = tiny_model(name)
    prompts = make_prompts([3, 9, 6, 1])
    completions = sample(model, prompts, 3, eos=(5, 6, 7, 8), max_completion_length=12)
    assert completions.completion_mask.sum() > 20
    assert len({len(ids) for *_, ids, _ in each_completion(completions)}) > 3
    for _, _, prompt, ids, logprobs in each_completion(completions):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_completion_length", [2, 12])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2"])
def test_with_the_opening_once_logprobs_equal_a_plain_forward_pass(name: str, max_completion_length: int) -> None:
    """Tails of prompts shorter and longer than the room that a cache begins with."""
    model, prompts = tiny_model(name), alike(make_prompts([7, 12, 9, 6, 25]), 5)
    words = {"eos": (5, 6, 7, 8), "max_completion_length": max_completion_length}
    completions = sample(model, prompts, 3, opening=True, **words)
    for _, _, prompt, ids, logprobs in each_completion(completions):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
    without = sample(model, prompts, 3, **words)
    assert torch.equal(completions.completion_ids, without.completion_ids)
    assert torch.equal(completions.prompt_mask, without.prompt_mask)


def test_the_opening_is_encoded_once() -> None:
    model, inputs = tiny_model("llama"), []
    model.register_forward_hook(
        lambda _, __, words, ___: inputs.append(tuple(words["input_ids"].shape)), with_kwargs=True
    )
    prompts = alike(make_prompts([7, 12, 9]), 5)
    sample(model, prompts, 2, opening=True, max_completion_length=3)
    assert inputs == [(1, 5), (3, 7), (6, 1), (6, 1)]
    inputs.clear()
    sample(model, make_prompts([7, 12, 9]), 2, opening=True, max_completion_length=1)
    assert inputs == [(3, 12)]  # these begin with different tokens


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-hybrid"])
def test_a_cache_that_outgrows_its_buffer_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model(name), make_prompts([3, 9])
    roomy = sample(model, prompts, 2, max_completion_length=20)
    monkeypatch.setattr("pairtune.models.sampler.ROOM", 3)
    tight = sample(model, prompts, 2, max_completion_length=20)
    assert torch.equal(roomy.completion_ids, tight.completion_ids)
    torch.testing.assert_close(roomy.sampler_logprobs, tight.sampler_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "mistral-window", "qwen2-hybrid"])
def test_the_preallocated_cache_equals_the_librarys(name: str) -> None:
    """Step by step: what attention is given, what the mask is built from, after repeating and after rows leave."""
    config = tiny_model(name).config
    ours, theirs = preallocated_cache(config, room=3), DynamicCache(config=config)
    torch.manual_seed(0)
    rows = 3

    def compare(num_tokens: int) -> None:
        for layer in range(len(theirs.layers)):
            states = torch.randn(2, rows, 2, num_tokens, 8)
            assert ours.get_mask_sizes(num_tokens, layer) == theirs.get_mask_sizes(num_tokens, layer)
            for mine, reference in zip(ours.update(*states, layer), theirs.update(*states, layer), strict=True):
                assert torch.equal(mine, reference)
            assert ours.get_seq_length(layer) == theirs.get_seq_length(layer)
            assert torch.equal(ours.layers[layer].keys, theirs.layers[layer].keys)
            assert torch.equal(ours.layers[layer].values, theirs.layers[layer].values)

    compare(7)
    for cache in (ours, theirs):
        cache.batch_repeat_interleave(2)
    rows = 6
    for _ in range(5):
        compare(1)
    keep = torch.tensor([0, 5, 2, 4])
    for cache in (ours, theirs):
        cache.batch_select_indices(keep)
    rows = 4
    compare(9)  # more than there is room for, at once
    for _ in range(4):
        compare(1)
    assert [type(a) is type(b) for a, b in zip(ours.layers, theirs.layers, strict=True)] == [False] * len(theirs.layers)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_first_two_tokens_follow_the_exact_law(name: str) -> None:
    """All 8 x 8 pairs of a tiny vocabulary, enumerated, against many completions."""
    vocab_size, n = 8, 6000
    model = tiny_model(name, vocab_size)
    prompts = make_prompts([4, 2], vocab_size=vocab_size)
    completions = sample(model, prompts, n, max_completion_length=2, temperature=1.3)
    for p in range(2):
        prompt = prompts.ids[p][prompts.mask[p]]
        first = (plain_logits(model, prompt, torch.tensor([0]))[0] / 1.3).double().softmax(-1)
        second = torch.stack(
            [
                (plain_logits(model, prompt, torch.tensor([v, 0]))[1] / 1.3).double().softmax(-1)
                for v in range(vocab_size)
            ]
        )
        pairs = completions.completion_ids[p] @ torch.tensor([vocab_size, 1])
        assert first.max() < 0.9
        expected = n * (first[:, None] * second).flatten()
        assert chi_square_p(torch.bincount(pairs, minlength=vocab_size**2), expected) > 1e-3
        # The test can tell: the law at temperature 1 would not pass.
        colder = (first**1.3 / (first**1.3).sum())[:, None] * second
        assert chi_square_p(torch.bincount(pairs, minlength=vocab_size**2), n * colder.flatten()) < 1e-6


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"temperature": 1.5, "top_k": 9, "top_p": 0.8},
    ],
)
def test_the_law_of_temperature_and_truncation(params: dict[str, Any]) -> None:
    """Only tokens of the truncated law are drawn, with its renormalised log-probability."""
    model = tiny_model("llama")
    completions = sample(model, make_prompts([3, 5]), 8, **params)
    for _, _, prompt, ids, logprobs in each_completion(completions):
        logits = plain_logits(model, prompt, ids) / params.get("temperature", 1.0)
        laws = torch.stack([plain_truncation(row, params.get("top_p", 1.0), params.get("top_k", 0)) for row in logits])
        picked = laws.gather(1, ids[:, None])[:, 0]
        assert (picked > 0).all()
        torch.testing.assert_close(logprobs.double(), picked.log(), atol=2e-5, rtol=0)


def test_tokens_are_the_inverse_law_at_the_uniforms_of_their_counters() -> None:
    """Ties the loop to its random numbers: (seed, stream, dataset row, completion, token)."""
    model = tiny_model("llama")
    prompts = make_prompts([4, 6], rows=[17, 3])
    completions = sample(model, prompts, 2, seed=11, stream=29)
    checked = 0
    for p, k, prompt, ids, _ in each_completion(completions):
        upper = plain_logits(model, prompt, ids).double().softmax(-1).cumsum(-1)
        for t, token in enumerate(ids.tolist()):
            u = counter_uniforms(11, 29, int(prompts.rows[p]), k, t).item()
            if (upper[t] - u).abs().min() > 1e-5:
                assert token == int((upper[t] <= u).sum())
                checked += 1
    assert checked > 20


# ---- the same draws anywhere


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window"])
def test_a_prompt_alone_or_among_others(name: str) -> None:
    model, eos = tiny_model(name), (5, 6, 7)
    lengths, rows = [3, 9, 5], [4, 40, 8]
    together = sample(model, make_prompts(lengths, rows), 2, eos=eos, max_completion_length=10)
    for i in range(3):
        alone = sample(model, make_prompts(lengths[i : i + 1], rows[i : i + 1]), 2, eos=eos, max_completion_length=10)
        width = alone.completion_ids.shape[-1]
        assert torch.equal(alone.completion_ids[0], together.completion_ids[i, :, :width])
        assert torch.equal(alone.completion_mask[0], together.completion_mask[i, :, :width])
        assert not together.completion_mask[i, :, width:].any()
        assert torch.equal(alone.truncated[0], together.truncated[i])
        torch.testing.assert_close(
            alone.sampler_logprobs[0], together.sampler_logprobs[i, :, :width], atol=1e-5, rtol=0
        )


def test_more_completions_leave_the_first_ones_as_they_were() -> None:
    model, prompts = tiny_model("llama"), make_prompts([3, 6])
    two, four = (sample(model, prompts, k, eos=(5, 6), max_completion_length=10) for k in (2, 4))
    width = two.completion_ids.shape[-1]
    assert torch.equal(two.completion_ids, four.completion_ids[:, :2, :width])
    assert torch.equal(two.completion_mask, four.completion_mask[:, :2, :width])


def test_a_longer_cap_leaves_the_first_tokens_as_they_were() -> None:
    model, prompts = tiny_model("llama"), make_prompts([3, 6])
    short, long = (sample(model, prompts, 2, max_completion_length=n) for n in (4, 9))
    assert torch.equal(short.completion_ids, long.completion_ids[:, :, :4])


def test_the_same_call_twice_gives_the_same_bits() -> None:
    model, prompts = tiny_model("llama"), make_prompts([3, 6])
    first, second = (sample(model, prompts, 2, eos=(5,)) for _ in range(2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.sampler_logprobs, second.sampler_logprobs)


def test_seed_stream_row_and_completion_each_change_the_draws() -> None:
    model = tiny_model("llama")
    one = make_prompts([4])

    def ids(prompts: Prompts, **words: Any) -> tuple[int, ...]:
        return tuple(sample(model, prompts, 2, max_completion_length=12, **words).completion_ids[0].flatten().tolist())

    base = sample(model, one, 2, max_completion_length=12).completion_ids[0]
    assert not torch.equal(base[0], base[1])
    other_row = Prompts(ids=one.ids, mask=one.mask, rows=torch.tensor([1]), prompts=[""])
    assert (
        len({ids(one), ids(one, seed=1), ids(one, stream=1), ids(one, stream=EVALUATION_STREAM), ids(other_row)}) == 5
    )


# ---- endings


def test_compaction_moves_no_more_rows_than_have_ended() -> None:
    alive = torch.tensor([True, False, True, False, False, True, True])
    assert compacted(alive).tolist() == [0, 5, 2, 6]
    assert compacted(torch.ones(3, dtype=torch.bool)).tolist() == [0, 1, 2]
    assert compacted(torch.zeros(3, dtype=torch.bool)).tolist() == []


def test_rows_that_leave_early_do_not_change_the_others() -> None:
    """With and without EOS the draws are the same until each row's own first EOS."""
    model, prompts, eos = tiny_model("llama"), make_prompts([3, 6, 9, 4]), (5, 6, 7)
    free = sample(model, prompts, 3, max_completion_length=14)
    ending = sample(model, prompts, 3, eos=eos, max_completion_length=14)
    lengths = []
    for p in range(4):
        for k in range(3):
            ids = free.completion_ids[p, k]
            hits = torch.isin(ids, torch.tensor(eos)).nonzero()[:, 0]
            length = int(hits[0]) + 1 if len(hits) else 14
            lengths.append(length)
            mask = ending.completion_mask[p, k]
            assert mask.sum() == length
            assert mask[:length].all()
            assert torch.equal(ending.completion_ids[p, k, :length], ids[:length])
            assert ending.truncated[p, k] == (len(hits) == 0)
    assert len(set(lengths)) >= 4  # rows left at different times
    assert 0 < int(ending.truncated.sum()) < 12
    assert torch.equal(ending.num_tokens.flatten(), torch.tensor(lengths))


def test_only_what_is_needed_is_computed() -> None:
    """Each prompt once, no row that has ended, logits of the last position alone."""
    model, inputs, logits = tiny_model("llama"), [], []

    def note(_: Any, __: Any, words: dict[str, Any], output: Any) -> None:
        inputs.append(tuple(words["input_ids"].shape))
        logits.append(tuple(output.logits.shape[:2]))

    model.register_forward_hook(note, with_kwargs=True)
    completions = sample(model, make_prompts([3, 6]), 4, eos=tuple(range(1, 12)), max_completion_length=10)
    alive = [(completions.num_tokens > t).sum().item() for t in range(1, completions.completion_ids.shape[-1])]
    assert inputs == [(2, 6), *((n, 1) for n in alive)]
    assert logits == [(2, 1), *((n, 1) for n in alive)]
    assert alive[-1] < 8


def test_what_is_masked_holds_padding_and_zero() -> None:
    completions = sample(
        tiny_model("llama"), make_prompts([3, 6]), 4, eos=tuple(range(1, 12)), max_completion_length=10
    )
    mask = completions.completion_mask
    assert not mask.all()
    assert (completions.completion_ids[~mask] == PAD).all()
    assert (completions.sampler_logprobs[~mask] == 0).all()
    assert (completions.sampler_logprobs[mask] < 0).all()
    assert mask.any(0).any(0).all()  # no column beyond the longest completion
    assert (mask.long().diff(dim=-1) <= 0).all()


def test_shapes_and_dtypes_are_those_of_completions() -> None:
    prompts = make_prompts([3, 6])
    made = make_sampler(tiny_model("llama")).generate(
        prompts, 3, SamplingParams(max_completion_length=5), seed=0, stream=0, policy_version=12
    )
    assert made.policy_version == 12
    assert made.completion_ids.shape == made.completion_mask.shape == made.sampler_logprobs.shape == (2, 3, 5)
    assert made.completion_ids.dtype == torch.int64
    assert made.sampler_logprobs.dtype == torch.float32
    assert made.completion_mask.dtype == made.truncated.dtype == torch.bool
    assert made.truncated.shape == (2, 3)
    assert made.truncated.all()
    assert torch.equal(made.prompt_ids, prompts.ids)
    # Normal tensors: a loss may save them for its backward pass.
    assert not made.sampler_logprobs.is_inference()
    assert not made.sampler_logprobs.requires_grad


def test_eos_at_the_cap_is_not_truncation() -> None:
    model, prompts = tiny_model("llama"), make_prompts([3])
    last = sample(model, prompts, 1, max_completion_length=4).completion_ids[0, 0]
    eos = (int(last[3]),)
    assert eos[0] not in last[:3].tolist()
    ended = sample(model, prompts, 1, eos=eos, max_completion_length=4)
    assert ended.num_tokens.item() == 4
    assert not ended.truncated.item()


def test_one_token_at_most() -> None:
    completions = sample(tiny_model("gpt2"), make_prompts([3, 1]), 2, max_completion_length=1)
    assert completions.completion_ids.shape == (2, 2, 1)


def test_stop_strings_end_a_completion_and_stay_in_it() -> None:
    model, prompts, tokenizer = tiny_model("llama"), make_prompts([3, 6, 5]), letters_tokenizer()
    texts_of = lambda c: [tokenizer.decode(ids.tolist()) for *_, ids, _ in each_completion(c)]  # noqa: E731
    free = texts_of(sample(model, prompts, 6, max_completion_length=20))
    stop = ("ca", "yz")
    ended = sample(model, prompts, 6, max_completion_length=20, stop=stop)
    num_stopped = 0
    for text, unstopped, (p, k, _, ids, _) in zip(texts_of(ended), free, each_completion(ended), strict=True):
        assert unstopped.startswith(text)
        before_last = tokenizer.decode(ids[:-1].tolist())
        assert not any(word in before_last for word in stop)
        stopped = any(word in text for word in stop)
        num_stopped += stopped
        assert ended.truncated[p, k] == (not stopped)
        assert stopped or len(ids) == 20
    assert 3 <= num_stopped < 18


def test_eos_ends_a_completion_beside_stop_strings() -> None:
    model, prompts, eos = tiny_model("llama"), make_prompts([3, 6, 5]), (5, 6, 7)
    without, beside = (sample(model, prompts, 2, eos=eos, stop=stop) for stop in ((), ("zzzz",)))
    assert not without.truncated.all()
    assert torch.equal(without.completion_ids, beside.completion_ids)
    assert torch.equal(without.truncated, beside.truncated)


def test_a_stop_string_does_not_reach_back_into_the_prompt() -> None:
    model, tokenizer = tiny_model("llama"), letters_tokenizer()
    first = tokenizer.decode(sample(model, make_prompts([3]), 1, max_completion_length=1).completion_ids[0, 0].tolist())
    prompts = make_prompts([3])
    last = tokenizer.decode(prompts.ids[0, -1:].tolist())
    completions = sample(model, prompts, 1, max_completion_length=1, stop=(last + first,))
    assert completions.truncated.all()
    assert not sample(model, prompts, 1, max_completion_length=1, stop=(first,)).truncated.any()


def test_progress_is_reported_after_each_token() -> None:
    calls: list[tuple[int, int]] = []
    make_sampler(tiny_model("llama")).generate(
        make_prompts([3]),
        1,
        SamplingParams(max_completion_length=4),
        seed=0,
        stream=0,
        on_token=lambda *c: calls.append(c),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


# ---- packed weights


@pytest.fixture
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer that can be packed is, however small it is and however few the steps."""
    monkeypatch.setattr(packing, "SMALL", 0)
    monkeypatch.setattr(packing, "MIN_STEPS", 1)
    monkeypatch.setattr(packing, "MANY_STEPS", 1)


def packed_names(model: nn.Module, num_steps: int = 100) -> list[str]:
    with torch.no_grad(), packing.packed_linears(model, num_rows=3, num_steps=num_steps):
        return [name for name, module in model.named_modules() if "forward" in vars(module)]


def linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) is nn.Linear]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("pack_all")
def test_packed_layers_compute_the_same(name: str) -> None:
    """Rows other in number than packed for, one token and many; GPT-2 has but one nn.Linear, its head."""
    model = tiny_model(name)
    with torch.no_grad():
        for layer in model.modules():
            if type(layer) is nn.Linear and layer.bias is not None:
                layer.bias.normal_()
    assert packed_names(model) == linear_names(model) != []
    for shape in [(3, 1), (1, 1), (2, 9), (7, 1)]:
        ids = torch.randint(1, VOCAB, shape)
        with torch.no_grad():
            plain = model(ids).logits
            with packing.packed_linears(model, num_rows=3, num_steps=100):
                packed = model(ids).logits
        assert (packed - plain).abs().max() < 1e-5 * plain.abs().max()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("pack_all")
def test_packed_sampling_follows_the_plain_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, products = tiny_model(name), []
    plain_product = packing._packed_linear
    monkeypatch.setattr(packing, "_packed_linear", lambda *args: products.append(None) or plain_product(*args))
    completions = sample(model, make_prompts([3, 9, 6, 1]), 3, eos=(5, 6, 7, 8), max_completion_length=12)
    # The prompts' pass and each decode step; a product for each layer.
    assert len(products) == completions.completion_ids.shape[-1] * len(linear_names(model))
    assert len({len(ids) for *_, ids, _ in each_completion(completions)}) > 3
    for _, _, prompt, ids, logprobs in each_completion(completions):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("pack_all")
def test_the_same_packed_call_twice_gives_the_same_bits() -> None:
    model, prompts = tiny_model("llama"), make_prompts([3, 6])
    first, second = (sample(model, prompts, 2, eos=(5,)) for _ in range(2))
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert torch.equal(first.sampler_logprobs, second.sampler_logprobs)


@pytest.mark.usefixtures("pack_all")
def test_weights_that_changed_are_packed_anew() -> None:
    model, prompts = tiny_model("llama"), make_prompts([3, 6])
    sample(model, prompts, 2)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
        model.model.layers[1].mlp.up_proj.weight.neg_()
    for _, _, prompt, ids, logprobs in each_completion(sample(model, prompts, 2)):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("pack_all")
def test_layers_are_put_back_after_sampling_and_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, params, seen = tiny_model("llama"), SamplingParams(max_completion_length=8), []

    def fail(*_: int) -> None:
        seen.append([name for name, module in model.named_modules() if "forward" in vars(module)])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_sampler(model).generate(make_prompts([3]), 1, params, seed=0, stream=0, on_token=fail)
    assert seen == [linear_names(model)]
    layers = [module for module in model.modules() if type(module) is nn.Linear]
    assert not any("forward" in vars(layer) for layer in layers)
    sample(model, make_prompts([3]))
    assert not any("forward" in vars(layer) for layer in layers)
    # Half packed: memory ran out, say.
    monkeypatch.setattr(packing, "partial", lambda *_: fail() if "forward" in vars(layers[2]) else lambda x: x)
    with pytest.raises(KeyboardInterrupt):
        sample(model, make_prompts([3]))
    assert len(seen[-1]) == 3
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.usefixtures("pack_all")
def test_a_packed_lora_model_is_sampled_with_its_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_model("llama"), config).eval()
    assert "base_model.model.model.layers.0.mlp.up_proj.base_layer" in packed_names(model)
    for _, _, prompt, ids, logprobs in each_completion(sample(model, make_prompts([3, 6]), 2)):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("pack_all")
def test_hooks_run_around_packed_layers() -> None:
    model, calls = tiny_model("llama"), []
    layer = model.model.layers[0].mlp.up_proj
    layer.register_forward_hook(lambda _, __, output: calls.append(None) or 2 * output)
    assert "model.layers.0.mlp.up_proj" in packed_names(model)
    completions = sample(model, make_prompts([3, 6]), 2)
    assert len(calls) == 8
    for _, _, prompt, ids, logprobs in each_completion(completions):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("pack_all")
def test_a_frozen_reference_that_widens_its_weights_is_sampled_as_it_is() -> None:
    """Its pre-hooks bring other weights than those that could be packed before."""
    model = tiny_model("llama").bfloat16().float()
    reference, prompts = frozen_copy(model), make_prompts([3, 6])
    assert packed_names(reference) == []
    ours, theirs = sample(model, prompts, 2), sample(reference, prompts, 2)
    assert torch.equal(ours.completion_ids, theirs.completion_ids)
    torch.testing.assert_close(ours.sampler_logprobs, theirs.sampler_logprobs, atol=1e-5, rtol=0)


class OtherLinear(nn.Linear):
    """Like a quantised layer: an nn.Linear whose forward is not a plain product."""


@pytest.mark.usefixtures("pack_all")
def test_layers_that_are_left_as_they_are() -> None:
    layers = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "in bfloat16": nn.Linear(8, 8).bfloat16(),
            "in float64": nn.Linear(8, 8).double(),
            "elsewhere": nn.Linear(8, 8, device="meta"),
            "subclass": OtherLinear(8, 8),
            "pre-hook": nn.Linear(8, 8),
        }
    )
    layers["pre-hook"].register_forward_pre_hook(lambda layer, _: None)
    assert packed_names(layers) == ["plain"]
    with torch.autocast("cpu"):
        assert packed_names(layers) == []
    own = layers["plain"].forward = lambda inputs: inputs
    with packing.packed_linears(layers, num_rows=1, num_steps=100):
        assert layers["plain"].forward is own
    assert layers["plain"].forward is own


@pytest.mark.usefixtures("pack_all")
@pytest.mark.parametrize("missing", ["_linear_pointwise", "_reorder_linear_weight", "oneDNN", "memory"])
def test_without_what_packing_needs_sampling_is_plain(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("llama"), make_prompts([3, 6])
    assert packed_names(model) != []
    expected = sample(model, prompts, 2)
    if missing == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    elif missing == "memory":
        monkeypatch.setattr(packing, "MAX_WEIGHTS", 10_000)
    else:
        operators = {"_linear_pointwise": None, "_reorder_linear_weight": None}
        del operators[missing]
        monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(**operators))
    assert packed_names(model) == []
    torch.testing.assert_close(sample(model, prompts, 2).sampler_logprobs, expected.sampler_logprobs, atol=1e-5, rtol=0)


def test_onednn_switched_off_is_not_packed_for(pack_all: None) -> None:
    model = tiny_model("llama")
    torch.backends.mkldnn.enabled = False
    try:
        assert packed_names(model) == []
    finally:
        torch.backends.mkldnn.enabled = True
    assert packed_names(model) != []


def test_layers_are_packed_where_the_steps_repay_it() -> None:
    layers = nn.ModuleDict(
        {
            "head": nn.Linear(2, packing.LARGE // 2),
            "middling": nn.Linear(2, packing.LARGE // 2 - 1),
            "least": nn.Linear(2, packing.SMALL // 2),
            "too small": nn.Linear(2, packing.SMALL // 2 - 1),
        }
    )
    assert packed_names(layers, packing.MIN_STEPS - 1) == []
    assert packed_names(layers, packing.MIN_STEPS) == packed_names(layers, packing.MANY_STEPS - 1) == ["head"]
    assert packed_names(layers, packing.MANY_STEPS) == ["head", "middling", "least"]


# ---- models and mistakes


def test_dropout_is_off_and_modes_are_put_back() -> None:
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    quiet = sample(model, make_prompts([3, 5]))
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    loud = sample(model, make_prompts([3, 5]))
    assert [module.training for module in model.modules()] == before
    assert torch.equal(quiet.completion_ids, loud.completion_ids)


def test_a_model_in_bfloat16_gives_float32_logprobs() -> None:
    model = tiny_model("llama").bfloat16()
    completions = sample(model, make_prompts([3, 6]), 2, eos=(5, 6))
    assert completions.sampler_logprobs.dtype == torch.float32
    for _, _, prompt, ids, logprobs in each_completion(completions):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=0.3, rtol=0)


def test_a_lora_model_is_sampled_with_its_adapter() -> None:
    from peft import LoraConfig, get_peft_model

    model: Any = get_peft_model(
        tiny_model("llama"),
        LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    completions = sample(model.eval(), make_prompts([3, 6]), 2)
    for _, _, prompt, ids, logprobs in each_completion(completions):
        expected = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=0)
        with model.disable_adapter():
            without = plain_logits(model, prompt, ids).log_softmax(-1).gather(1, ids[:, None])[:, 0]
        assert (logprobs - without).abs().max() > 1e-2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_name_the_token_and_the_row(value: float) -> None:
    model = tiny_model("llama")
    calls = []

    def spoil(_: Any, __: Any, output: Any) -> None:
        calls.append(None)
        if len(calls) == 3:
            output.logits[3, -1, 7] = value

    model.register_forward_hook(spoil)
    with pytest.raises(PairtuneError, match="at step 4, dataset row 31, completion token 2"):
        sample(model, make_prompts([3, 6], rows=[30, 31]), 2, stream=4)


def test_a_model_may_forbid_tokens() -> None:
    model = tiny_model("llama")
    allowed = torch.zeros(VOCAB, dtype=torch.bool)
    allowed[[3, 9, VOCAB - 2]] = True

    def forbid(_: Any, __: Any, output: Any) -> None:
        output.logits.masked_fill_(~allowed, -torch.inf)

    model.register_forward_hook(forbid)
    completions = sample(model, make_prompts([3, 6]), 8)
    assert set(completions.completion_ids.unique().tolist()) == {3, 9, VOCAB - 2}
    assert completions.sampler_logprobs.isfinite().all()


def test_prompts_that_cannot_be_sampled_from() -> None:
    model = tiny_model("gpt2")
    prompts = make_prompts([3, 6])
    prompts.mask[0] = False
    with pytest.raises(PairtuneError, match="empty or padded on the right"):
        sample(model, prompts)
    # 64 positions: the prompt's 6 and all but the last of the completion's.
    fits = sample(model, make_prompts([3, 6]), 1, max_completion_length=59)
    assert fits.completion_ids.shape[-1] == 59
    with pytest.raises(PairtuneError, match="max_completion_length=60 and a prompt of 6 tokens exceed the model's 64"):
        sample(model, make_prompts([3, 6]), 1, max_completion_length=60)


@pytest.mark.parametrize(
    "words",
    [
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_completion_length": 0},
        {"stop": ("",)},
    ],
)
def test_sampling_words_out_of_range(words: dict[str, Any]) -> None:
    with pytest.raises(PairtuneError, match=next(iter(words))):
        SamplingParams(**words)


def test_a_stop_string_that_no_token_can_write() -> None:
    with pytest.raises(PairtuneError, match="stop"):
        sample(tiny_model("llama"), make_prompts([3]), stop=("€",))
