"""Loading the policy and its reference: precision, device, what is trained, and that step 0 has a KL of exactly 0."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from conftest import EOS_ID, TinyModel, build_tiny_model
from torch import Tensor, nn

from pairtune.errors import PairtuneError
from pairtune.models import loading
from pairtune.models.loading import (
    LoadedPolicy,
    MasterWeights,
    choose_device,
    choose_dtype,
    disable_dropout,
    eos_ids,
    frozen_copy,
    load_causal_lm,
    load_policy,
    load_tokenizer,
)
from pairtune.types import Completions

CPU = torch.device("cpu")
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"trainable_layers": 1},
    "lora": {"lora_r": 2, "lora_target_modules": "all-linear"},
}


def some_completions(num_prompts: int = 3, num_generations: int = 2, width: int = 4, length: int = 5) -> Completions:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.arange(num_prompts * num_generations).view(num_prompts, num_generations) % length + 1
    prompt_mask = torch.arange(width) >= torch.arange(num_prompts)[:, None]
    return Completions(
        prompt_ids=torch.randint(7, 100, (num_prompts, width), generator=generator),
        prompt_mask=prompt_mask,
        completion_ids=torch.randint(7, 100, (num_prompts, num_generations, length), generator=generator),
        completion_mask=torch.arange(length) < lengths[..., None],
        sampler_logprobs=torch.zeros(num_prompts, num_generations, length),
        truncated=torch.zeros(num_prompts, num_generations, dtype=torch.bool),
        policy_version=0,
    )


def policy_logprobs(policy: LoadedPolicy) -> Tensor:
    return policy.scorer.logprobs(policy.scorer.layout(some_completions()))[0]


@torch.no_grad()
def ref_logprobs(policy: LoadedPolicy) -> Tensor:
    return policy.reference.logprobs(policy.reference.layout(some_completions()))[0]


def one_update(policy: LoadedPolicy, size: float = 0.05) -> None:
    """A gradient step of the masters, the same way that training makes it."""
    policy_logprobs(policy).sum().backward()
    for master, grad in zip(policy.masters.masters, policy.masters.gradients(), strict=True):
        master.data.add_(size * grad.sign())
        master.grad = None
    policy.masters.publish()


# ---------------------------------------------------------------------------------------------------- precision, device


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_a_named_precision_is_taken(name: str) -> None:
    dtype, why = choose_dtype(name, CPU)
    assert dtype is getattr(torch, name)
    assert why == f"computing in {name}, as asked"


@pytest.mark.parametrize(("speedup", "chosen"), [(0.2, "float32"), (1.2, "float32"), (3.0, "bfloat16")])
def test_on_a_cpu_the_precision_is_measured(monkeypatch: pytest.MonkeyPatch, speedup: float, chosen: str) -> None:
    rates = {torch.float32: 80e9, torch.bfloat16: speedup * 80e9}
    monkeypatch.setattr(loading, "_matmul_rate", rates.__getitem__)
    dtype, why = choose_dtype("auto", CPU)
    assert dtype is getattr(torch, chosen)
    assert why == (
        f"computing in {chosen} on the CPU (measured: float32 80 GFLOP/s, bfloat16 {80 * speedup:.0f} GFLOP/s)"
    )


def test_the_measurement_measures() -> None:
    assert choose_dtype("auto", CPU)[0] in (torch.float32, torch.bfloat16)
    assert 1e6 < loading._matmul_rate(torch.float32) < 1e15


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == CPU
    with pytest.raises(PairtuneError, match="'cuda:1' was asked for, but torch sees no GPU; use device: cpu or auto"):
        choose_device("cuda:1")
    with pytest.raises(PairtuneError, match="'abacus' is no device that torch knows; use auto, cpu, cuda or cuda:N"):
        choose_device("abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert choose_dtype("auto", torch.device("cuda")) == (torch.float32, "computing in float32 on the GPU")


@pytest.mark.parametrize("name", ["mps", "xpu", "xpu:1", "meta"])
def test_a_device_that_nothing_was_made_for(name: str) -> None:
    sentence = rf"^device: pairtune cannot compute on '{name}'; use auto, cpu, cuda or cuda:N\.$"
    with pytest.raises(PairtuneError, match=sentence):
        choose_device(name)


@pytest.mark.parametrize(("count", "there"), [(1, "the only GPU is cuda:0"), (4, "the GPUs are cuda:0 to cuda:3")])
def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch, count: int, there: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert choose_device(f"cuda:{count - 1}") == torch.device("cuda", count - 1)
    with pytest.raises(PairtuneError, match=f"'cuda:7' was asked for, but {there}; use one that is there, or auto"):
        choose_device("cuda:7")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0", "cuda:7"])
def test_of_several_processes_each_has_its_own_gpu(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Reward models and judges too, which are told the configuration's device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(loading.distributed, "world_size", lambda: 4)
    assert choose_device(name) == torch.device("cuda:2")
    assert choose_device("cpu") == CPU


def test_the_main_process_decides_the_precision_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def gather(value: Any) -> list[Any]:
        told.append(value)
        return [["bfloat16", "as measured there"], value]

    monkeypatch.setattr(loading, "_matmul_rate", {torch.float32: 1.0, torch.bfloat16: 1.0}.__getitem__)
    monkeypatch.setattr(loading.distributed, "is_main", lambda: False)
    monkeypatch.setattr(loading.distributed, "gather_objects", gather)
    assert choose_dtype("auto", CPU) == (torch.bfloat16, "as measured there")
    assert choose_dtype("float32", CPU)[0] is torch.float32  # not measured, so nothing to ask
    assert told == [None]


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("llama", {"attention_dropout": 0.9}), ("gpt2", {"attn_pdrop": 0.9, "resid_pdrop": 0.9, "embd_pdrop": 0.9})],
)
def test_dropout_is_off_in_training_mode_too(tiny_model: TinyModel, kind: str, dropout: dict[str, float]) -> None:
    model = tiny_model(kind, **dropout)
    ids = torch.arange(7, 17)[None]
    with torch.no_grad():
        expected = model(ids).logits
        assert not torch.equal(model.train()(ids).logits, expected)
        assert torch.equal(disable_dropout(model)(ids).logits, expected)


# ------------------------------------------------------------------------------------------------------ master weights


def test_micro_batches_are_accumulated_in_float32() -> None:
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    masters = MasterWeights([("w", parameter)])
    for gradient in [1.0] + 8 * [2.0**-9]:  # in bfloat16 each of the small ones is rounded away: 1 + 2^-9 is 1
        (parameter * gradient).sum().backward()
        assert parameter.grad is None
    (gradient_sum,) = masters.gradients()
    assert gradient_sum.dtype == torch.float32
    assert gradient_sum.item() == 1 + 8 * 2.0**-9


def test_masters_keep_what_rounding_loses() -> None:
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    masters = MasterWeights([("w", parameter)])
    seen = []
    for _ in range(8):
        masters.masters[0].data.add_(2.0**-10)
        masters.publish()
        seen.append(parameter.item())
    assert seen == [torch.tensor(1 + n * 2.0**-10).bfloat16().item() for n in range(1, 9)]
    assert seen[0] == 1
    assert seen[-1] > 1
    assert parameter.dtype == torch.bfloat16
    masters.load({"w": torch.tensor([3.001])})
    assert masters.masters[0].item() == pytest.approx(3.001)
    assert parameter.item() == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_precise_parameter_is_its_own_master(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    masters = MasterWeights([("w", parameter)])
    assert masters.masters == [parameter]
    (parameter * 2).sum().backward()
    assert masters.gradients()[0] is parameter.grad
    assert parameter.grad is not None
    masters.load({"w": torch.full((2,), 5.0, dtype=dtype)})
    assert parameter.tolist() == [5, 5]


def test_a_parameter_out_of_the_losss_reach_has_a_zero_gradient() -> None:
    reached, idle = (nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(2))
    masters = MasterWeights([("reached", reached), ("idle", idle)])
    reached.sum().backward()
    assert [g.tolist() for g in masters.gradients()] == [[1, 1], [0, 0]]


# ------------------------------------------------------------------------------------------------------ what is trained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
@pytest.mark.parametrize("way", WAYS)
def test_the_reference_is_the_policy_at_step_0_and_stays(
    tmp_path: Path, tiny_tokenizer: Any, kind: str, way: str, dtype: str
) -> None:
    """To the last bit: shared rows (llama, gpt2) and plain (mistral), trunk and top split (llama) or not (gpt2)."""
    build_tiny_model(kind).save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path), tokenizer=tiny_tokenizer, dtype=dtype, device="cpu", **WAYS[way])
    assert policy.dtype is getattr(torch, dtype)
    assert {p.dtype for p in policy.model.parameters()} == {policy.dtype}
    assert policy.scorer.shared is (kind != "mistral")
    assert (policy.scorer.trunk is not None) is (way == "layers" and kind != "gpt2")

    start = ref_logprobs(policy)
    assert torch.equal(policy_logprobs(policy), start)
    assert start[some_completions().completion_mask].abs().min() > 0
    one_update(policy)
    assert (policy_logprobs(policy) - start).abs().max() > 0.1
    assert torch.equal(ref_logprobs(policy), start)


def moved(policy: LoadedPolicy) -> set[str]:
    """Names of the parameters that an update changes."""
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    one_update(policy)
    return {name for name, p in policy.model.named_parameters() if not torch.equal(p, before[name])}


@pytest.mark.parametrize(
    ("kind", "num_layers", "expected"),
    [("llama", 1, ("model.layers.1.", "model.norm.")), ("gpt2", 1, ("transformer.h.1.", "transformer.ln_f."))]
    + [("llama", 2, ("model.layers.0.", "model.layers.1.", "model.norm."))],
)
def test_trainable_layers_moves_the_last_layers_and_the_final_norm(
    tiny_model: TinyModel, tiny_tokenizer: Any, kind: str, num_layers: int, expected: tuple[str, ...]
) -> None:
    policy = load_policy(tiny_model(kind), tokenizer=tiny_tokenizer, trainable_layers=num_layers)
    names = {name for name, _ in policy.model.named_parameters() if name.startswith(expected)}
    assert moved(policy) == names == set(policy.masters.names)
    assert {name.split(".")[0] for name in names} <= {"model", "transformer"}  # no head


def test_the_top_layers_learn_what_they_would_learn_without_the_split(tiny_tokenizer: Any) -> None:
    split, whole = (load_policy(build_tiny_model("llama"), tokenizer=tiny_tokenizer, **w) for w in (WAYS["layers"], {}))
    layout = split.scorer.layout(some_completions())
    split.scorer.logprobs(layout, split.scorer.features(layout))[0].sum().backward()
    policy_logprobs(whole).sum().backward()
    expected = dict(zip(whole.masters.names, whole.masters.gradients(), strict=True))
    for name, gradient in zip(split.masters.names, split.masters.gradients(), strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_checkpointing_changes_no_gradient(tiny_tokenizer: Any, way: str) -> None:
    def gradients(checkpointing: bool) -> list[Tensor]:
        torch.manual_seed(0)  # of the adapter
        policy = load_policy(
            build_tiny_model("llama"), tokenizer=tiny_tokenizer, gradient_checkpointing=checkpointing, **WAYS[way]
        )
        policy.model.train(checkpointing)
        calls = []
        inside = next(m for name, m in policy.model.named_modules() if name.endswith("layers.1.input_layernorm"))
        inside.register_forward_pre_hook(lambda *_: calls.append(1))
        policy_logprobs(policy).sum().backward()
        assert len(calls) == (2 if checkpointing else 1)  # once more in the backward pass
        return policy.masters.gradients()

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("way", WAYS)
def test_policy_and_reference_are_one_where_all_prompts_begin_alike(tiny_tokenizer: Any, way: str) -> None:
    policy = load_policy(build_tiny_model("llama"), tokenizer=tiny_tokenizer, **WAYS[way])
    completions = some_completions()
    completions.prompt_ids[:], completions.prompt_mask[:] = completions.prompt_ids[:1], True
    layout = policy.scorer.layout(completions)
    assert layout.opening == 3
    with torch.no_grad():
        own, ref = (scorer.logprobs(layout, scorer.features(layout))[0] for scorer in (policy.scorer, policy.reference))
    assert torch.equal(own, ref)
    assert own.any()


def test_layers_that_compute_again_share_no_opening(tiny_tokenizer: Any) -> None:
    """They keep no keys and values for those who come after."""
    policy = load_policy(build_tiny_model("llama"), tokenizer=tiny_tokenizer, gradient_checkpointing=True)
    assert not policy.scorer.opening
    assert not policy.reference.opening


@pytest.mark.parametrize(("num_layers", "shown"), [(3, "3"), (0, "0"), (-1, "-1")])
def test_more_layers_than_there_are(tiny_llama: Any, tiny_tokenizer: Any, num_layers: int, shown: str) -> None:
    sentence = f"trainable_layers: {shown} is out of range, this model has 2 decoder layers; give a number from 1 to 2"
    with pytest.raises(PairtuneError, match=sentence):
        load_policy(tiny_llama, tokenizer=tiny_tokenizer, trainable_layers=num_layers)


def test_layers_under_another_name(tiny_llama: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "decoder_layers", lambda model: None)
    with pytest.raises(PairtuneError, match="keeps its decoder layers under no name that pairtune knows"):
        load_policy(tiny_llama, tokenizer=tiny_tokenizer, trainable_layers=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_its_adapter_the_policy_is_the_base_model(tiny_model_folder: str, dtype: str) -> None:
    policy = load_policy(tiny_model_folder, dtype=dtype, device="cpu", **WAYS["lora"])
    base = load_causal_lm(tiny_model_folder, dtype=getattr(torch, dtype), device=CPU)
    ids = torch.arange(7, 27)[None]
    with torch.no_grad():
        assert torch.equal(policy.model(ids).logits, base(ids).logits)
    names = moved(policy)
    assert names
    assert all("lora_B" in name for name in names)  # lora_A has no gradient yet: it is multiplied by zeros
    with torch.no_grad():
        assert not torch.equal(policy.model(ids).logits, base(ids).logits)
        with policy.model.disable_adapter():
            assert torch.equal(policy.model(ids).logits, base(ids).logits)


def test_target_modules_that_do_not_fit(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(PairtuneError, match="lora_target_modules: \\['q_projection'\\] does not fit this model"):
        load_policy(tiny_llama, tokenizer=tiny_tokenizer, lora_r=2, lora_target_modules=["q_projection"])


def test_full_fine_tuning_moves_everything(tiny_llama_untied: Any, tiny_tokenizer: Any) -> None:
    policy = load_policy(tiny_llama_untied, tokenizer=tiny_tokenizer)
    assert moved(policy) == {name for name, _ in policy.model.named_parameters()}
    assert not any(p.requires_grad for p in policy.reference.model.parameters())
    assert "training 0.0M of 0.0M parameters" in policy.notes


# -------------------------------------------------------------------------------------------------------- the reference


def rounded(model: Any) -> Any:
    """The model with bfloat16 values in float32, as most checkpoints are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "qwen2", "gpt2", "mistral"])
def test_a_copy_of_bfloat16_values_takes_half_the_memory_and_loses_no_bit(tiny_model: TinyModel, kind: str) -> None:
    model = rounded(tiny_model(kind))
    twin = frozen_copy(model)
    ids = torch.arange(7, 27).view(2, 10)
    for _ in range(2):
        assert {p.dtype for p in twin.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert torch.equal(twin(ids).logits, model(ids).logits)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in twin.parameters())


@pytest.mark.parametrize("kind", ["gemma", "gemma3"])
def test_a_copy_of_a_model_that_scales_its_embeddings_loses_no_bit_either(kind: str) -> None:
    name = {"gemma": "Gemma", "gemma3": "Gemma3Text"}[kind]
    words = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 12}
    config = getattr(transformers, f"{name}Config")(**words, num_attention_heads=4, num_key_value_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = rounded(getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config).eval())
    twin = frozen_copy(model)
    ids = torch.arange(7, 27).view(2, 10)
    with torch.no_grad():
        assert torch.equal(twin(ids).logits, model(ids).logits)
    of_layers = {p.dtype for p in twin.model.layers.parameters()}
    assert of_layers == {torch.bfloat16}


def test_a_model_whose_code_needs_its_weights_wide_is_copied_as_it_is(tiny_llama: Any) -> None:
    model = rounded(tiny_llama)
    layer = model.model.layers[0].mlp
    plain = type(layer).forward

    def reads_a_weight(its: Any, hidden: Tensor) -> Tensor:
        return plain(its, hidden) + hidden @ its.gate_proj.weight.T @ its.down_proj.weight.T

    layer.forward = MethodType(reads_a_weight, layer)
    twin = frozen_copy(model)
    twin.model.layers[0].mlp.forward = MethodType(reads_a_weight, twin.model.layers[0].mlp)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}


def test_a_copy_of_finer_values_stays_float32(tiny_llama: Any) -> None:
    twin = frozen_copy(tiny_llama)
    assert {p.dtype for p in twin.parameters()} == {torch.float32}
    assert next(twin.parameters()).data_ptr() != next(tiny_llama.parameters()).data_ptr()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_narrow_reference_is_exact_as_well(tiny_tokenizer: Any, attention: str) -> None:
    """Eager attention adds its mask to the scores, in the type of the weights."""
    model = build_tiny_model("llama", attn_implementation=attention)
    policy = load_policy(rounded(model), tokenizer=tiny_tokenizer)
    assert policy.scorer.shared
    assert policy.scorer.top.config._attn_implementation == attention
    assert {p.dtype for p in policy.reference.model.parameters()} == {torch.bfloat16}
    assert torch.equal(policy_logprobs(policy), ref_logprobs(policy))


def test_the_top_layers_share_the_rest_with_their_reference(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    policy = load_policy(tiny_llama, tokenizer=tiny_tokenizer, trainable_layers=1)
    assert policy.reference.trunk is policy.scorer.trunk
    assert policy.reference.head is policy.scorer.head
    own = {id(p) for p in policy.reference.top.layers.parameters()} | {
        id(p) for p in policy.reference.top.norm.parameters()
    }
    assert not own & {id(p) for p in policy.model.parameters()}


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_head_that_does_more_is_refused(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    forward = tiny_llama.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = 30 * (output.logits / 30).tanh()
        return output

    tiny_llama.forward = capped
    with pytest.raises(PairtuneError, match="'llama' does more to its logits than a linear head"):
        load_policy(tiny_llama, tokenizer=tiny_tokenizer)


def test_a_model_in_memory_needs_a_tokenizer(tiny_llama: Any) -> None:
    with pytest.raises(PairtuneError, match="needs its tokenizer too"):
        load_policy(tiny_llama)


@pytest.mark.parametrize("name", ["no/such-model", "./no-such-folder", "/nowhere/at/all"])
def test_a_model_that_is_not_there(name: str, tiny_tokenizer: Any) -> None:
    with pytest.raises(
        PairtuneError, match=r"^model: the tokenizer of .* could not be loaded \(.*give a hub id"
    ) as raised:
        load_policy(name)
    assert "\n" not in str(raised.value)
    with pytest.raises(PairtuneError, match=r"model: the model of .* could not be loaded"):
        load_policy(name, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("damage", ["weights gone", "weights cut short", "config gone", "config cut short"])
def test_a_damaged_folder(tiny_model_folder: str, damage: str) -> None:
    what, how = damage.split(" ", 1)
    path = Path(tiny_model_folder, {"weights": "model.safetensors", "config": "config.json"}[what])
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PairtuneError, match="could not be loaded") as raised:
        load_policy(tiny_model_folder, dtype="float32")
    assert "\n" not in str(raised.value)


# ----------------------------------------------------------------------------------------------------------- tokenizers


def test_a_missing_pad_token_is_eos(tiny_model_folder: str) -> None:
    edit_tokenizer(tiny_model_folder, pad_token=None)
    assert load_tokenizer(tiny_model_folder).pad_token_id == EOS_ID
    edit_tokenizer(tiny_model_folder, pad_token=None, eos_token=None)
    with pytest.raises(PairtuneError, match="has neither a pad nor an EOS token"):
        load_tokenizer(tiny_model_folder)


def edit_tokenizer(folder: str, **words: Any) -> None:
    path = Path(folder, "tokenizer_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **words}))


def test_every_eos_token_ends_a_completion(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    assert eos_ids(tiny_llama, tiny_tokenizer) == (EOS_ID,)
    tiny_llama.generation_config.eos_token_id = [5, 3]
    assert eos_ids(tiny_llama, tiny_tokenizer) == (EOS_ID, 3, 5)
    tiny_tokenizer.eos_token = None
    assert eos_ids(tiny_llama, tiny_tokenizer) == (3, 5)
    tiny_llama.generation_config = None
    with pytest.raises(PairtuneError, match="no completion could end"):
        eos_ids(tiny_llama, tiny_tokenizer)


# ------------------------------------------------------------------------------------------------------ saved adapters


def test_a_folder_with_an_adapter_is_merged_into_its_base(tiny_model_folder: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model_folder, dtype="float32", **WAYS["lora"])
    one_update(policy)
    policy.model.save_pretrained(tmp_path / "adapter")
    merged = load_causal_lm(str(tmp_path / "adapter"), dtype=torch.float32, device=CPU)
    assert type(merged).__name__ == "LlamaForCausalLM"
    ids = torch.arange(7, 27)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, policy.model(ids).logits, rtol=1e-4, atol=1e-4)
        base = load_causal_lm(tiny_model_folder, dtype=torch.float32, device=CPU)
        assert (merged(ids).logits - base(ids).logits).abs().max() > 0.01
    shutil.rmtree(tiny_model_folder)
    with pytest.raises(PairtuneError, match="could not be loaded"):
        load_causal_lm(str(tmp_path / "adapter"), dtype=torch.float32, device=CPU)


def test_what_an_adapter_has_learned_survives_bfloat16(tiny_model_folder: str, tmp_path: Path) -> None:
    policy = load_policy(tiny_model_folder, dtype="bfloat16", **WAYS["lora"])
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # as after a few hundred updates at a small learning rate
                parameter.copy_(3e-4 * torch.randn_like(parameter))
    policy.model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(7, 27)[None]
    kept, merged, base = (
        load_causal_lm(path, dtype=torch.bfloat16, device=CPU, merge=merge)
        for path, merge in (
            (str(tmp_path / "adapter"), False),
            (str(tmp_path / "adapter"), True),
            (tiny_model_folder, False),
        )
    )
    assert type(merged).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        acted, loaded, summed, start = (model(ids).logits.float() for model in (policy.model, kept, merged, base))
    assert torch.equal(loaded, acted)
    assert (summed - acted).norm() > 0.3 * (acted - start).norm()  # why it is not merged


def test_a_model_passed_in_is_trained_in_place(tiny_llama: Any, tiny_tokenizer: Any) -> None:
    before = copy.deepcopy(tiny_llama.state_dict())
    policy = load_policy(tiny_llama, tokenizer=tiny_tokenizer)
    one_update(policy)
    assert policy.model is tiny_llama
    assert not any(torch.equal(value, before[name]) for name, value in tiny_llama.state_dict().items())
