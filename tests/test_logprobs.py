"""Layouts, chunked log-probabilities, the split into trunk and top: against plain forward passes and full softmaxes."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pairtune.models import logprobs
from pairtune.models.logprobs import (
    Scorer,
    can_share_opening,
    can_share_prefix,
    can_split,
    check_head,
    chunked_logprobs,
    divergence,
    make_layout,
)
from pairtune.models.opening import opening_length
from pairtune.types import Completions

VOCAB = 61


def tiny(name: str, **changes: Any) -> nn.Module:
    torch.manual_seed(3)
    words = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**words)).eval()
    if name == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**words, tie_word_embeddings=True)).eval()
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**words, head_dim=8)).eval()
    if name == "olmo3":
        return Olmo3ForCausalLM(Olmo3Config(**words, pad_token_id=None)).eval()
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**words, sliding_window=6)).eval()
    config = GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
        initializer_range=0.3,
    )
    return GPT2LMHeadModel(config).eval()


def ragged_batch(num_prompts: int = 3, num_generations: int = 2, width: int = 5, length: int = 7) -> Completions:
    """Prompts and completions of all lengths, from one token up."""
    generator = torch.Generator().manual_seed(11)
    prompt_mask = torch.arange(width) >= torch.arange(num_prompts)[:, None] % width
    lengths = torch.arange(num_prompts * num_generations).view(num_prompts, num_generations) * 2 % length + 1
    completion_mask = torch.arange(length) < lengths[..., None]
    return Completions(
        prompt_ids=torch.randint(2, VOCAB, (num_prompts, width), generator=generator).masked_fill(~prompt_mask, 0),
        prompt_mask=prompt_mask,
        completion_ids=torch.randint(2, VOCAB, completion_mask.shape, generator=generator).masked_fill(
            ~completion_mask, 0
        ),
        completion_mask=completion_mask,
        sampler_logprobs=torch.zeros(completion_mask.shape),
        truncated=torch.zeros(lengths.shape, dtype=torch.bool),
        policy_version=0,
    )


def plain_logprobs(model: nn.Module, completions: Completions, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token log-probabilities and entropies, one unpadded sequence at a time."""
    logprobs = torch.zeros(completions.completion_mask.shape)
    entropies = torch.zeros_like(logprobs)
    for p, k in torch.cartesian_prod(*(torch.arange(n) for n in logprobs.shape[:2])).tolist():
        prompt = completions.prompt_ids[p][completions.prompt_mask[p]]
        completion = completions.completion_ids[p, k][completions.completion_mask[p, k]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1] / temperature
        law = logits.log_softmax(-1)
        logprobs[p, k, : len(completion)] = law.gather(1, completion[:, None])[:, 0]
        entropies[p, k, : len(completion)] = -(law.exp() * law).sum(-1)
    return logprobs, entropies


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gpt2", "mistral"])
@pytest.mark.parametrize("num_generations", [1, 2, 3])
@pytest.mark.parametrize("shared", [True, False])
def test_logprobs_equal_a_plain_forward_pass(name: str, num_generations: int, shared: bool) -> None:
    model = tiny(name)
    if shared and not can_share_prefix(model):
        assert name == "mistral"
        return
    completions = ragged_batch(num_generations=num_generations)
    expected, expected_entropy = plain_logprobs(model, completions, temperature=0.7)
    scorer = Scorer(model, shared=shared)
    with torch.no_grad():
        logprobs, entropies = scorer.logprobs(scorer.layout(completions), temperature=0.7, with_entropy=True)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropies, expected_entropy, rtol=0, atol=1e-4)


def test_which_architectures_share_a_prefix() -> None:
    assert {name: can_share_prefix(tiny(name)) for name in ("llama", "qwen2", "qwen3", "gpt2", "mistral")} == {
        "llama": True,
        "qwen2": True,
        "qwen3": True,
        "gpt2": True,
        "mistral": False,
    }


def test_a_mask_that_is_ignored_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, attention_mask=None, **k: forward(*a, attention_mask=None, **k)
    )
    assert not can_share_prefix(model)


def test_the_shared_layout_saves_the_prompts() -> None:
    completions = ragged_batch(num_prompts=4, num_generations=3)
    prompt_tokens, completion_tokens = completions.prompt_mask.sum(), completions.completion_mask.sum()
    num_completions = (completions.num_tokens > 0).sum()
    for with_last, num_left_out in ((True, 0), (False, num_completions)):
        shared, plain = (make_layout(completions, shared=s, with_last=with_last) for s in (True, False))
        assert (shared.segments >= 0).sum() == prompt_tokens + completion_tokens - num_left_out
        assert (plain.segments >= 0).sum() == 3 * prompt_tokens + completion_tokens - num_left_out


@pytest.mark.parametrize("shared", [True, False])
def test_a_cut_of_the_batch_changes_no_bit(shared: bool) -> None:
    model = tiny("llama")
    completions = ragged_batch(num_prompts=4)
    scorer = Scorer(model, shared=shared, num_top_layers=1)
    layout = scorer.layout(completions)
    features = scorer.features(layout)
    assert features is not None
    with torch.no_grad():
        whole, _ = scorer.logprobs(layout, features)
        prompts = torch.tensor([3, 1])
        part, _ = scorer.logprobs(layout.select(prompts), layout.rows(prompts, features))
    assert torch.equal(part, whole[prompts])


@pytest.mark.parametrize("shared", [True, False])
def test_padding_changes_nothing(shared: bool) -> None:
    model = tiny("llama")
    completions = ragged_batch()
    wider = Completions(
        nn.functional.pad(completions.prompt_ids, (3, 0), value=7),
        nn.functional.pad(completions.prompt_mask, (3, 0)),
        nn.functional.pad(completions.completion_ids, (0, 4), value=9),
        nn.functional.pad(completions.completion_mask, (0, 4)),
        nn.functional.pad(completions.sampler_logprobs, (0, 4)),
        completions.truncated,
        0,
    )
    scorer = Scorer(model, shared=shared)
    with torch.no_grad():
        narrow, _ = scorer.logprobs(scorer.layout(completions))
        wide, _ = scorer.logprobs(scorer.layout(wider))
    assert torch.equal(wide[..., :-4], narrow)
    assert not wide[..., -4:].any()


# ---- what all prompts begin with


def alike_batch(num_prompts: int = 4, num_alike: int = 4, **sizes: int) -> Completions:
    """A ragged batch whose prompts, of 5 to 9 tokens, begin with the same ones."""
    completions = ragged_batch(num_prompts=num_prompts, width=9, **sizes)
    prompt_mask = torch.arange(9) >= torch.arange(num_prompts)[:, None] % 5
    generator = torch.Generator().manual_seed(5)
    prompt_ids = torch.randint(2, VOCAB, prompt_mask.shape, generator=generator)
    for prompt, real in zip(prompt_ids, prompt_mask, strict=True):
        start = int((~real).sum())
        prompt[start : start + num_alike] = torch.arange(2, 2 + num_alike)
        prompt[start + num_alike] = 20 + start  # and here they part
    return dataclasses.replace(completions, prompt_ids=prompt_ids.masked_fill(~prompt_mask, 0), prompt_mask=prompt_mask)


SHARING = ["llama", "qwen2", "qwen3", "gpt2"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", SHARING)
def test_with_the_opening_once_logprobs_equal_a_plain_forward_pass(name: str, attention: str) -> None:
    model, completions = tiny(name), alike_batch()
    model.set_attn_implementation(attention)
    expected, expected_entropy = plain_logprobs(model, completions, temperature=0.7)
    scorer = Scorer(model, shared=True, opening=True)
    layout = scorer.layout(completions)
    assert layout.opening == 4
    with torch.no_grad():
        logprobs, entropies = scorer.logprobs(layout, temperature=0.7, with_entropy=True)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(entropies, expected_entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SHARING)
def test_with_the_opening_once_the_gradient_is_the_same(name: str) -> None:
    """Through keys and values of every prompt into the one opening; in float64, against every prompt for itself. All
    but GPT-2 round to float32 in their norms."""
    model, completions = tiny(name).double(), alike_batch()
    weights = torch.rand(completions.completion_mask.shape, dtype=torch.float64, generator=torch.Generator())

    def gradients(opening: bool) -> dict[str, Tensor]:
        scorer = Scorer(model, shared=True, opening=opening)
        model.zero_grad()
        (scorer.logprobs(scorer.layout(completions))[0] * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    once, each = gradients(opening=True), gradients(opening=False)
    tolerance = 1e-10 if name == "gpt2" else 1e-5
    for parameter in each:
        assert (once[parameter] - each[parameter]).norm() <= tolerance * each[parameter].norm(), parameter


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_tied_embeddings_meet_in_one_tensor(tied: bool) -> None:
    """The embeddings' own is sparse where the head has one to add it to, over several micro-batches too."""
    model, completions = tiny("llama", tie_word_embeddings=tied), alike_batch()

    def gradients(opening: bool) -> dict[str, Tensor]:
        scorer = Scorer(model, shared=True, opening=opening)
        layout = scorer.layout(completions)
        model.zero_grad()
        for prompts in torch.arange(4).split(2):
            scorer.logprobs(layout.select(prompts))[0].sum().backward()
        assert all(parameter.grad.layout is torch.strided for parameter in model.parameters())
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    once, each = gradients(opening=True), gradients(opening=False)
    for name in each:
        assert (once[name] - each[name]).norm() <= 1e-5 * each[name].norm(), name


def test_the_opening_goes_through_every_layer_once() -> None:
    model, completions = tiny("llama"), alike_batch()
    seen: list[tuple[int, int]] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[:2])))
    scorer = Scorer(model, shared=True, opening=True)
    layout = scorer.layout(completions)
    scorer.logprobs(layout)
    assert seen == [(1, 4)] * 3 + [(4, layout.segments.shape[1] - 4)] * 3


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_with_the_opening_once_trunk_and_top_are_the_whole(name: str) -> None:
    model, completions = tiny(name), alike_batch()
    whole = Scorer(model, shared=True, opening=True)
    top = Scorer(model, shared=True, opening=True, num_top_layers=2)
    layout = whole.layout(completions)
    assert layout.opening == 4
    with torch.no_grad():
        expected, _ = whole.logprobs(layout)
        features = top.features(layout)
        assert torch.equal(top.logprobs(layout, features)[0], expected)
        prompts = torch.tensor([2, 1])
        part, _ = top.logprobs(layout.select(prompts), layout.rows(prompts, features))
        alone, _ = top.logprobs(layout.select(prompts[:1]), layout.rows(prompts[:1], features))
    assert torch.equal(part, expected[prompts])
    torch.testing.assert_close(alone, expected[prompts[:1]], rtol=0, atol=1e-5)


def test_which_architectures_share_an_opening() -> None:
    assert all(can_share_opening(tiny(name)) for name in SHARING)


def test_a_model_without_embeddings_shares_no_opening() -> None:
    model = tiny("llama")

    def missing() -> nn.Module:
        raise NotImplementedError

    model.model.get_input_embeddings = missing
    assert can_share_prefix(model)
    assert not can_share_opening(model)


def test_an_opening_that_is_ignored_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, past_key_values=None, **k: forward(*a, past_key_values=None, **k)
    )
    assert can_share_prefix(model)
    assert not can_share_opening(model)


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        (["abcd", "abce", "abcf"], 3),
        (["abcd", "abc", "abcdef"], 2),  # of the shortest, one token is its own
        (["abcd", "abcd", "abcd"], 3),
        (["abcd"], 0),
        (["abcd", "xbcd"], 0),
        (["a", "a", "a"], 0),
        (["ab" + "c" * 20, "ax" + "c" * 20], 0),  # spares one token of 44
        (["ab" + "c" * 8, "ax" + "c" * 7, "ay" + "c" * 8], 1),  # spares two of 29
    ],
)
def test_the_length_of_an_opening(prompts: list[str], length: int) -> None:
    width = max(map(len, prompts)) + 1
    ids = torch.tensor([[0] * (width - len(prompt)) + [ord(letter) for letter in prompt] for prompt in prompts])
    assert opening_length(ids, ids > 0) == length


def test_an_opening_that_spares_little_of_a_pass_is_left_where_it_is() -> None:
    completions = alike_batch()
    prompt_tokens = int(completions.prompt_mask.sum())
    assert opening_length(completions.prompt_ids, completions.prompt_mask, num_tokens=12 * 16) == 4
    assert opening_length(completions.prompt_ids, completions.prompt_mask, num_tokens=12 * 16 + 1) == 0
    assert make_layout(completions, shared=True, opening=True).opening == 4
    assert make_layout(completions, shared=True).opening == make_layout(completions, shared=False, opening=True).opening
    longer = alike_batch(length=60, num_generations=6)
    assert longer.completion_mask.sum() > 12 * 16 - prompt_tokens
    assert make_layout(longer, shared=True, opening=True).opening == 0


@pytest.mark.parametrize(("name", "splits"), [("llama", True), ("qwen2", True), ("qwen3", True), ("gpt2", False)])
def test_trunk_and_top_are_the_whole(name: str, splits: bool) -> None:
    model = tiny(name)
    assert can_split(model, 1) is splits
    if not splits:
        return
    completions = ragged_batch()
    whole, top = Scorer(model, shared=True), Scorer(model, shared=True, num_top_layers=2)
    layout = whole.layout(completions)
    with torch.no_grad():
        expected, _ = whole.logprobs(layout)
        assert torch.equal(top.logprobs(layout, top.features(layout))[0], expected)


MIXED = {
    "qwen2": {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 6},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 6},
}


@pytest.mark.parametrize("num_top_layers", [1, 2])
@pytest.mark.parametrize("name", MIXED)
def test_the_top_of_layers_of_two_kinds_keeps_the_kind_of_each(name: str, num_top_layers: int) -> None:
    model = tiny(name, **MIXED[name], use_sliding_window=True)
    assert can_split(model, num_top_layers)
    assert model.config.sliding_window == 6
    assert model.config.layer_types == MIXED[name]["layer_types"]
    completions = ragged_batch(width=9, length=20)
    whole, split = Scorer(model, shared=False), Scorer(model, shared=False, num_top_layers=num_top_layers)
    layout = whole.layout(completions)
    with torch.no_grad():
        expected, _ = whole.logprobs(layout)
        assert torch.equal(split.logprobs(layout, split.features(layout))[0], expected)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_a_split_that_a_window_would_break_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window is wider than any probe; it is narrowed for it."""
    model = tiny(name, **MIXED.get(name, {}), use_sliding_window=True)
    assert can_split(model, 1)
    split = logprobs.split_body

    def without_window(decoder: Any, num_top_layers: int) -> tuple[Any, Any]:
        trunk, top = split(decoder, num_top_layers)
        top.config = copy.copy(decoder.config)
        if name == "mistral":
            top.config.sliding_window = None
        else:
            top.config.layer_types = ["sliding_attention"]  # of the layer that it is not
        return trunk, top

    monkeypatch.setattr(logprobs, "split_body", without_window)
    assert not can_split(model, 1)


def test_a_head_with_a_soft_cap_is_found_out() -> None:
    model = tiny("llama")
    assert check_head(model)
    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    assert not check_head(model)


@pytest.mark.parametrize("head_trained", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_chunked_gradient(head_trained: bool, with_bias: bool, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int, grad: bool = True) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)

    hidden, weight = leaf(9, 5), leaf(13, 5, grad=head_trained)
    bias = leaf(13, grad=head_trained) if with_bias else None
    targets = torch.randint(0, 13, (9,), generator=generator)
    upstream = torch.randn(9, dtype=torch.float64, generator=generator)
    trained = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]

    logprobs, entropies = chunked_logprobs(
        hidden, weight, targets, bias=bias, temperature=0.8, chunk=chunk, with_entropy=True
    )
    law = (nn.functional.linear(hidden, weight, bias) / 0.8).log_softmax(-1)
    expected = law.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropies, -(law.exp() * law).sum(-1), rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(logprobs, trained, upstream)
    want = torch.autograd.grad(expected, trained, upstream)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_gradient_that_is_there_is_added_to_in_place() -> None:
    model = tiny("llama", tie_word_embeddings=True)
    completions = ragged_batch()
    scorer = Scorer(model, shared=True)
    layout = scorer.layout(completions)
    scorer.logprobs(layout)[0].sum().backward()
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    buffer = model.lm_head.weight.grad
    scorer.logprobs(layout)[0].sum().backward()
    assert model.lm_head.weight.grad is buffer
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-5, atol=1e-6)


def test_divergence_is_exactly_zero_for_a_copy_and_right_for_another() -> None:
    completions = ragged_batch()
    model, other = tiny("llama"), tiny("llama", initializer_range=0.2)
    policy, twin, reference = (Scorer(m, shared=True) for m in (model, tiny("llama"), other))
    layout = policy.layout(completions)
    same = divergence(policy, twin, layout)
    assert not same.kl.any()
    assert torch.equal(same.policy_logprobs, same.ref_logprobs)
    compared = divergence(policy, reference, layout, temperature=0.9)
    hidden = policy.hidden(layout), reference.hidden(layout)
    law, ref = ((s.head(h) / 0.9).log_softmax(-1) for s, h in zip((policy, reference), hidden, strict=True))
    torch.testing.assert_close(compared.kl[layout.mask], (law.exp() * (law - ref)).sum(-1), rtol=1e-5, atol=1e-6)
    expected, entropy = plain_logprobs(model, completions, temperature=0.9)
    torch.testing.assert_close(compared.policy_logprobs, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(compared.entropy, entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("law", [{"top_k": 2}, {"top_p": 0.3}])
def test_a_token_that_was_drawn_belongs_to_the_law_that_drew_it(law: dict[str, Any]) -> None:
    """Where sampler and scorer round otherwise, a token at the edge of top-k or top-p may be out on a second look."""
    policy = Scorer(tiny("llama"), shared=True)
    compared = divergence(policy, policy, policy.layout(ragged_batch()), **law)  # tokens drawn from no law at all
    for values in (compared.policy_logprobs, compared.ref_logprobs, compared.kl, compared.entropy):
        assert values.isfinite().all()
    assert (compared.policy_logprobs <= 0).all()


def peak_above_start(code: str) -> int:
    """Bytes of resident memory that a piece of code adds at its worst, in a fresh process."""
    program = """
        import sys, torch
        from pairtune.models.logprobs import chunked_logprobs
        torch.manual_seed(0)
        num_tokens, vocab_size, hidden_size = map(int, sys.argv[1:])
        hidden = torch.randn(num_tokens, hidden_size, requires_grad=True)
        weight = (torch.randn(vocab_size, hidden_size) / hidden_size**0.5).requires_grad_()
        targets = torch.randint(0, vocab_size, (num_tokens,))
        # As from the second micro-batch on: the gradient to add to is there, on both sides.
        weight.grad = torch.full_like(weight, 1.0)
        torch.ones(64, 64) @ torch.ones(64, 64)
        def resident(field):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
        open("/proc/self/clear_refs", "w").write("5")
        start = resident("VmRSS")
        CODE
        print(resident("VmHWM") - start)
    """
    return textwrap.dedent(program).replace("CODE", code)


OURS = "chunked_logprobs(hidden, weight, targets, weight_grad=weight.grad)[0].sum().backward()"
FULL = "(hidden @ weight.T).log_softmax(-1).gather(1, targets[:, None]).sum().backward()"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("num_tokens", [1024, 4096])
def test_memory_is_a_quarter_of_the_full_logits(num_tokens: int) -> None:
    def peak(code: str) -> int:
        command = [sys.executable, "-c", peak_above_start(code), str(num_tokens), "151936", "896"]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    ours, full = peak(OURS), peak(FULL)
    assert ours <= full / 4, f"{ours / 2**20:.0f} MiB against {full / 2**20:.0f} MiB"


@pytest.mark.slow
def test_gradient_at_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(64, 896, requires_grad=True)
    weight = (torch.randn(151_936, 896) / 30).requires_grad_()
    targets = torch.randint(0, 151_936, (64,))
    ours = torch.autograd.grad(chunked_logprobs(hidden, weight, targets, chunk=20)[0].sum(), (hidden, weight))
    logits = hidden @ weight.T
    full = torch.autograd.grad(logits.log_softmax(-1).gather(1, targets[:, None]).sum(), (hidden, weight))
    for one, other in zip(ours, full, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
