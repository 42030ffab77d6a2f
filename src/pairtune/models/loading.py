"""Loading the policy and its reference, and the float32 master weights behind the policy.

The policy *is* what the compute precision computes: one module in that precision samples, scores and is differentiated,
and the reference is a copy in the same precision (or the same module with its adapter off). Where that precision is
below float32, every trained parameter has a float32 master that the optimizer moves and that is rounded into the module
after each update.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pairtune.errors import PairtuneError
from pairtune.models.logprobs import (
    Layout,
    Scorer,
    TokenScores,
    body,
    can_split,
    causal_lm,
    check_head,
    decoder_layers,
    frozen_top,
    probe_ids,
    sharing,
)
from pairtune.models.values import ValueFunction, ValueHead, ValueNetwork
from pairtune.models.weights import resolve_model
from pairtune.runs import distributed


class MasterWeights:
    """float32 masters of the trained parameters, their gradients, and the way back into the module.

    A parameter that is float32 (or float64) already is its own master.
    """

    def __init__(self, named_parameters: Sequence[tuple[str, nn.Parameter]]) -> None:
        self.names = [name for name, _ in named_parameters]
        self.parameters = [parameter for _, parameter in named_parameters]
        self.masters = [_master_of(parameter) for parameter in self.parameters]
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))

    def gradients(self) -> list[Tensor]:
        """The masters' gradients; zeros for a parameter that the loss did not reach."""
        for master in self.masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters if master.grad is not None]

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the module that computes."""
        for parameter, master in zip(self.parameters, self.masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)

    def copy_from_main(self) -> None:
        """Start from the main process's masters on every process.

        From then on all make the same moves. What was computed for each on its own (a fitted or a random head, an
        adapter, a model passed in) may differ in the last bits, and the processes would train different models.
        """
        distributed.copy_from_main(self.masters)
        self.publish()

    @torch.no_grad()
    def load(self, masters: dict[str, Tensor]) -> None:
        """Put back saved masters, by parameter name."""
        for name, master in zip(self.names, self.masters, strict=True):
            master.copy_(masters[name])
        self.publish()


def _master_of(parameter: nn.Parameter) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.detach().float().requires_grad_(True)


def _accumulate_into(master: Tensor) -> Any:
    """A hook that adds each micro-batch's gradient to the master's in float32, so that cutting a batch costs no
    precision."""

    def hook(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook


@dataclass
class LoadedPolicy:
    """A policy, its reference and what is needed to run them."""

    model: Any
    tokenizer: Any
    scorer: Scorer
    reference: Scorer
    masters: MasterWeights
    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    device: torch.device
    dtype: torch.dtype
    notes: list[str] = field(default_factory=list)
    """What was found out while loading, for the user to read."""
    value: ValueFunction | None = None
    """Of a method that has one: a head on the policy, or a network of its own. Its parameters are among `masters`."""

    def score(
        self,
        layout: Layout,
        features: Tensor | None = None,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> TokenScores:
        """Log-probabilities, entropies and, where there is a value function, values under the weights as they are.

        One forward pass of the policy; a value network makes one of its own. `features` are the policy's trunk's.
        """
        head = self.value if isinstance(self.value, ValueHead) else None
        scores = self.scorer.score(
            layout, features, temperature=temperature, with_entropy=with_entropy, value_head=head
        )
        if isinstance(self.value, ValueNetwork):
            scores = replace(scores, values=self.value.values(layout))
        return scores


DEVICES = "auto, cpu, cuda or cuda:N"
"""Where pairtune computes. Sampling needs float64, which mps lacks; precision and process group are chosen for CUDA."""


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Of several processes each has one GPU, whichever is named.

    Raises PairtuneError for a device that pairtune cannot compute on, or that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise PairtuneError(f"device: {name!r} is no device that torch knows; use {DEVICES}.") from error
    if device.type not in ("cpu", "cuda"):
        raise PairtuneError(f"device: pairtune cannot compute on {name!r}; use {DEVICES}.")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise PairtuneError(f"device: {name!r} was asked for, but torch sees no GPU; use device: cpu or auto.")
    if distributed.world_size() > 1:
        # The one that `distributed.init_from_env` has made current: else the reward models and judges of all
        # processes would crowd on the GPU that is named.
        return torch.device("cuda", torch.cuda.current_device())
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        there = "the only GPU is cuda:0" if count == 1 else f"the GPUs are cuda:0 to cuda:{count - 1}"
        raise PairtuneError(f"device: {name!r} was asked for, but {there}; use one that is there, or auto.")
    return device


def choose_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The compute precision and one sentence on why. `auto` on a CPU is decided by timing one matrix product in
    both. Of several processes the main one decides: each measuring for itself, they could compute different models."""
    if name != "auto":
        return getattr(torch, name), f"computing in {name}, as asked"
    decided = _choose_dtype(device) if distributed.is_main() else None
    chosen, why = distributed.gather_objects(decided)[0]
    return getattr(torch, chosen), why


def _choose_dtype(device: torch.device) -> tuple[str, str]:
    """What `auto` means on this machine, and why."""
    if device.type == "cuda":
        chosen = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        return chosen, f"computing in {chosen} on the GPU"
    rates = {dtype: _matmul_rate(dtype) for dtype in (torch.float32, torch.bfloat16)}
    chosen = "bfloat16" if rates[torch.bfloat16] > 1.5 * rates[torch.float32] else "float32"
    measured = ", ".join(
        f"{str(dtype).removeprefix('torch.')} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates.items()
    )
    return chosen, f"computing in {chosen} on the CPU (measured: {measured})"


def _matmul_rate(dtype: torch.dtype, size: tuple[int, int, int] = (256, 1024, 512)) -> float:
    """Floating-point operations a second of one matrix product; a few milliseconds of measurement."""
    rows, inner, columns = size
    a, b = torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)
    nn.functional.linear(a, b)
    best = min(_seconds(lambda: nn.functional.linear(a, b)) for _ in range(3))
    return 2 * rows * inner * columns / best


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model; a missing pad token is stood in for by EOS, which is safe because masks say what is
    real."""
    from transformers import AutoTokenizer

    with _loading(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            resolve_model(name), revision=revision, trust_remote_code=trust_remote_code
        )
    return with_pad_token(tokenizer)


def with_pad_token(tokenizer: Any) -> Any:
    """The tokenizer, with EOS as its pad token if it had none."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise PairtuneError(
            f"model: the tokenizer of {tokenizer.name_or_path!r} has neither a pad nor an EOS token; give it one and "
            "save it."
        )
    return tokenizer


def load_causal_lm(
    name: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str = "sdpa",
    revision: str | None = None,
    trust_remote_code: bool = False,
    merge: bool = False,
) -> Any:
    """A causal language model in the compute precision, without dropout.

    Of a folder with a LoRA adapter comes its base with the adapter. In float32 it is merged; in a coarser precision,
    where the sum would round small changes away, it stays beside its base unless `merge` asks for plain weights.
    """
    from transformers import AutoModelForCausalLM

    path = resolve_model(name)
    with _loading(name, "model"):
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(
                path, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=trust_remote_code
            )
            if merge or dtype == torch.float32:
                model = model.merge_and_unload()
            # peft loads adapters in float32; in training they act in the precision of their base.
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                attn_implementation=attn_implementation,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
    return disable_dropout(model).to(device).eval()


class _loading:
    """Turns the many errors of a missing or unreadable model into one sentence."""

    def __init__(self, name: str, what: str, *, key: str = "model") -> None:
        self.name, self.what, self.key = name, what, key

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, (OSError, KeyError, ValueError, SafetensorError)) and not isinstance(error, PairtuneError):
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise PairtuneError(
                f"{self.key}: the {self.what} of {self.name!r} could not be loaded ({first.strip()[:200]}); give a hub "
                "id that this machine can reach or a local folder saved by save_pretrained"
                f"{', or smollm2-135m-instruct-q4' if self.key == 'model' else ''}."
            ) from error


def disable_dropout(model: Any) -> Any:
    """Dropout off in every pass, training included: a ratio of two passes must not measure noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    return model


def eos_ids(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Every id that ends a completion: the model's generation config may name several, the tokenizer names one."""
    declared = getattr(causal_lm(model), "generation_config", None)
    ids = getattr(declared, "eos_token_id", None)
    several = list(ids) if isinstance(ids, (list, tuple)) else [ids]
    found = {int(i) for i in [*several, tokenizer.eos_token_id] if i is not None}
    if not found:
        raise PairtuneError(
            "model: neither tokenizer nor generation config names an EOS token, so no completion could end."
        )
    return tuple(sorted(found))


def load_policy(
    name: str | Any,
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str = "sdpa",
    trainable_layers: int | None = None,
    lora_r: int | None = None,
    lora_alpha: int = 32,
    lora_target_modules: str | list[str] = "all-linear",
    gradient_checkpointing: bool = False,
    with_values: bool = False,
    value_model: str | Any | None = None,
    with_reference: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedPolicy:
    """Load a policy and its reference, ready to sample, score and train.

    `name` is a hub id, a local folder, a name that `pairtune.models.weights` knows, or a model already in memory (then
    `tokenizer` is required). What is trained: everything, the last `trainable_layers` decoder layers with the final
    norm, or a LoRA adapter of rank `lora_r`. The reference is a frozen copy of what is trained and shares the rest.

    `with_values` is for a method that has a value function, and `value_model` is read only then: None for a linear head
    on the policy that starts at zero, else the reward model (a hub id, a local folder, or one in memory) from which a
    network of its own starts, fully trained whatever is trained of the policy. A model in memory is trained in place,
    so it must not be the one that gives the rewards. Without `with_reference` no copy of all weights is made, for a
    stage that measures no KL: `reference` is then not to be used.
    """
    torch_device = choose_device(device)
    notes = []
    if isinstance(name, str):
        torch_dtype, why = choose_dtype(dtype, torch_device)
        notes.append(why)
        tokenizer = tokenizer or load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
        model = load_causal_lm(
            name,
            dtype=torch_dtype,
            device=torch_device,
            attn_implementation=attn_implementation,
            revision=revision,
            trust_remote_code=trust_remote_code,
            merge=True,
        )
    else:
        if tokenizer is None:
            raise PairtuneError("model: a model passed in memory needs its tokenizer too; pass tokenizer=....")
        tokenizer = with_pad_token(tokenizer)
        model = disable_dropout(name).to(torch_device).eval()
        distributed.copy_from_main(model.parameters())  # before the reference is copied from it
        torch_dtype = next(model.parameters()).dtype
    refuse_other_heads(model)
    value: ValueFunction | None = None
    if with_values and value_model is None:
        value = _value_head(model)
        notes.append("values come from a linear head on the policy")
    elif with_values:
        value = load_value_network(
            value_model,
            policy=model,
            tokenizer=tokenizer,
            attn_implementation=attn_implementation,
            gradient_checkpointing=gradient_checkpointing,
            trust_remote_code=trust_remote_code,
        )
        size = sum(p.numel() for _, p in value.named_parameters())
        notes.append(f"values come from a network of their own, {size / 1e6:.1f}M parameters, all trained")
    # One layout for policy and value network: a second one would have widths, and so roundings, of its own. Layers that
    # compute their activations again keep no cache, and so have no opening.
    networks = [value.model] if isinstance(value, ValueNetwork) else []
    shared, opening = sharing(model, *networks, opening=not gradient_checkpointing)
    if with_reference:
        once = "what prompts begin with is encoded once for a batch, " if opening else ""
        notes.append(
            f"{once}prompts are encoded once for all their completions"
            if shared
            else "this architecture takes one row a completion"
        )

    scorer_of = partial(Scorer, shared=shared, opening=opening)
    if lora_r is not None:
        model = _with_adapter(model, lora_r, lora_alpha, lora_target_modules)
        scorer, reference = scorer_of(model), scorer_of(model, context=model.disable_adapter)
    elif trainable_layers is not None:
        scorer, reference = _top_layers(model, trainable_layers, scorer_of)
    else:
        model.requires_grad_(True)
        scorer = scorer_of(model)
        reference = scorer_of(frozen_copy(model)) if with_reference else scorer
    if gradient_checkpointing:
        checkpoint_activations(causal_lm(model))
        if lora_r is not None:
            causal_lm(model).enable_input_require_grads()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    total = sum(p.numel() for p in model.parameters())
    notes.append(f"training {sum(p.numel() for _, p in trained) / 1e6:.1f}M of {total / 1e6:.1f}M parameters")
    if value is not None:
        trained += [(f"{value.prefix}.{n}", p) for n, p in value.named_parameters()]
    return LoadedPolicy(
        model=model,
        tokenizer=tokenizer,
        scorer=scorer,
        reference=reference,
        masters=MasterWeights(trained),
        eos_token_ids=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        device=torch_device,
        dtype=torch_dtype,
        notes=notes,
        value=value,
    )


def _value_head(model: Any) -> ValueHead:
    """A head for the policy's hidden states, in float32 (float64 where the policy is)."""
    vocabulary = causal_lm(model).get_output_embeddings().weight
    dtype = torch.promote_types(vocabulary.dtype, torch.float32)
    return ValueHead(vocabulary.shape[1], dtype=dtype, device=vocabulary.device)


def load_value_network(
    name: str | Any,
    *,
    policy: Any,
    tokenizer: Any,
    attn_implementation: str = "sdpa",
    gradient_checkpointing: bool = False,
    trust_remote_code: bool = False,
) -> ValueNetwork:
    """A value network that starts from the reward model `name`, on the device and in the precision of `policy`.

    `name` is a hub id, a local folder or a sequence classifier in memory. It reads the ids that the policy wrote, so
    its vocabulary must be that of `policy` and `tokenizer`. Raises PairtuneError where it is not, or where the model
    cannot be loaded or is no reward model that scores every prefix.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    weight = next(policy.parameters())
    if isinstance(name, str):
        with _loading(name, "model", key="value_model"):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                resolve_model(name),
                dtype=weight.dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
        with _loading(name, "tokenizer", key="value_model"):
            own = AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
        shown, missing = name, sorted(found["missing_keys"])
    else:
        model, own, shown, missing = name, tokenizer, type(name).__name__, []
    network = ValueNetwork(disable_dropout(model).to(weight.device, weight.dtype).eval(), name=shown)

    mend = "give a reward model with the policy's tokenizer, or leave value_model empty for a head on the policy."
    if missing:
        raise PairtuneError(
            f"value_model: {shown!r} has no weights for {', '.join(missing)}, so it is no trained reward model; {mend}"
        )
    num_ids, num_policy_ids = (m.get_input_embeddings().weight.shape[0] for m in (model, policy))
    if num_ids < num_policy_ids:
        raise PairtuneError(
            f"value_model: {shown!r} has a vocabulary of {num_ids} tokens and the policy of {num_policy_ids}; {mend}"
        )
    if not tokenizer.get_vocab().items() <= own.get_vocab().items():
        raise PairtuneError(
            f"value_model: the tokenizer of {shown!r} means other tokens by the ids that the policy writes; {mend}"
        )
    if gradient_checkpointing:
        checkpoint_activations(model)
        model.train()  # where checkpointing happens; without dropout nothing else changes
    return network


def refuse_other_heads(model: Any) -> None:
    """Raises PairtuneError for a model whose logits are not its output embedding applied to its last hidden states."""
    if not check_head(model):
        raise PairtuneError(
            f"model: {causal_lm(model).config.model_type!r} does more to its logits than a linear head (a soft cap or "
            "a scale), which pairtune does not compute; choose another model."
        )


def frozen_copy(model: Any) -> Any:
    """A copy that nobody trains, for the reference.

    A float32 copy whose weights are bfloat16 values (most checkpoints are) is kept in bfloat16, and each module's
    weights are widened only while it runs: half the memory, and the same arithmetic to the last bit. Where a model's
    code does not allow that, as a probe shows, the copy stays in float32.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    if all(p.dtype == torch.float32 and torch.equal(p, p.bfloat16().float()) for p in twin.parameters()):
        hooks = _store_in_bfloat16(twin)
        if not _same_states(twin, model):
            for hook in hooks:
                hook.remove()
            for parameter in twin.parameters():
                parameter.data = parameter.data.float()
    return twin


def _store_in_bfloat16(model: Any) -> list[RemovableHandle]:
    """The weights in bfloat16, and hooks (returned) that widen them while they are used.

    An embedding that does more than look up (Gemma's are scaled) stays as it is, and so does a head tied to it.
    """
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    wide = {id(module.weight) for module in lookups if type(module) is not nn.Embedding}
    for parameter in model.parameters():
        if id(parameter) not in wide:
            parameter.data = parameter.data.bfloat16()
    hooks: list[RemovableHandle] = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if any(id(parameter) in wide for parameter in own):
            continue
        if isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(lambda _, __, looked_up: looked_up.float()))
        elif own:
            hooks += [module.register_forward_pre_hook(_widen), module.register_forward_hook(_narrow)]
    return hooks


@torch.no_grad()
def _same_states(one: Any, other: Any) -> bool:
    """Whether two models agree in their last hidden states to the last bit; False where one of them cannot run."""
    ids = probe_ids(body(other), (1, 6))
    try:
        first, second = (body(model)(input_ids=ids, use_cache=False).last_hidden_state for model in (one, other))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # two precisions met in one product
        return False
    return torch.equal(first, second)


def _widen(module: nn.Module, _: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.float()


def _narrow(module: nn.Module, _: Any, __: Any) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.bfloat16()


def _top_layers(model: Any, trainable_layers: int, scorer_of: Callable[..., Scorer]) -> tuple[Scorer, Scorer]:
    """Train the last layers only; the reference shares everything below them, so the trunk runs once for both."""
    train_last_layers(model, trainable_layers)
    if not can_split(model, trainable_layers):
        return scorer_of(model), scorer_of(frozen_copy(model))
    scorer = scorer_of(model, num_top_layers=trainable_layers)
    return scorer, scorer.with_top(frozen_top(scorer.top))


def checkpoint_activations(model: Any) -> None:
    """Keep no activations within layers: they are computed again in the backward pass."""
    # transformers renamed it in 5.23 and warns of the older name.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def train_last_layers(model: Any, trainable_layers: int) -> None:
    """Let gradients reach the last decoder layers and the final norm, and nothing else."""
    decoder = body(model)
    layers = decoder_layers(model)
    if layers is None:
        raise PairtuneError(
            f"trainable_layers: {causal_lm(model).config.model_type!r} keeps its decoder layers under no name that "
            "pairtune knows (layers, h); train all weights, or use lora_r."
        )
    if not 1 <= trainable_layers <= len(layers):
        raise PairtuneError(
            f"trainable_layers: {trainable_layers} is out of range, this model has {len(layers)} decoder layers; "
            f"give a number from 1 to {len(layers)}."
        )
    model.requires_grad_(False)
    layers[-trainable_layers:].requires_grad_(True)
    norm = getattr(decoder, "norm", getattr(decoder, "ln_f", None))
    if norm is not None:
        norm.requires_grad_(True)


def _with_adapter(model: Any, rank: int, alpha: int, target_modules: str | list[str]) -> Any:
    """The model with a LoRA adapter to train; the reference is the same module with the adapter switched off."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=target_modules, task_type="CAUSAL_LM"
    )
    try:
        # In the compute precision like everything else: the masters keep float32.
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    except ValueError as error:
        raise PairtuneError(f"lora_target_modules: {target_modules!r} does not fit this model ({error}).") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(next(model.parameters()).dtype)
    return adapted
