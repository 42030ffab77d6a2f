"""Value head and value network: against plain forward passes one sequence at a time, and the reward model's scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import EOS_ID, PAD_ID, VOCAB_SIZE, build_tiny_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from pairtune.errors import PairtuneError
from pairtune.feedback.reward_model import RewardModel
from pairtune.models.loading import LoadedPolicy, load_policy
from pairtune.models.logprobs import Scorer
from pairtune.models.values import ValueHead, ValueNetwork, scores_every_prefix
from pairtune.types import Completions, Prompts

KINDS = ["llama", "gpt2", "mistral"]
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"trainable_layers": 1},
    "lora": {"lora_r": 2, "lora_target_modules": "all-linear"},
}


def some_completions(num_prompts: int = 3, num_generations: int = 2, width: int = 4, length: int = 5) -> Completions:
    """Prompts of `width` tokens and fewer, completions of all lengths from one token up."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.arange(num_prompts * num_generations).view(num_prompts, num_generations) % length + 1
    return Completions(
        prompt_ids=torch.randint(7, 100, (num_prompts, width), generator=generator),
        prompt_mask=torch.arange(width) >= torch.arange(num_prompts)[:, None],
        completion_ids=torch.randint(7, 100, (num_prompts, num_generations, length), generator=generator),
        completion_mask=torch.arange(length) < lengths[..., None],
        sampler_logprobs=torch.zeros(num_prompts, num_generations, length),
        truncated=torch.ones(num_prompts, num_generations, dtype=torch.bool),
        policy_version=0,
    )


def tiny_reward_model(kind: str = "llama", *, num_labels: int = 1, **overrides: Any) -> Any:
    config = build_tiny_model(kind, **overrides).config
    config.num_labels, config.pad_token_id = num_labels, PAD_ID
    name = type(config).__name__.removesuffix("Config")
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    # An untrained head scores everything alike, within what a test of 1e-5 would let pass.
    nn.init.normal_(model.score.weight, std=1.0)
    return model


def with_head(tokenizer: Any, kind: str = "llama", *, moved: bool = True, double: bool = False, **way: Any) -> Any:
    """A policy with a value head, at zero or moved to where it says something of every token."""
    torch.manual_seed(2)  # of the adapter
    model = build_tiny_model(kind)
    policy = load_policy(model.double() if double else model, tokenizer=tokenizer, with_values=True, **way)
    if moved:
        assert isinstance(policy.value, ValueHead)
        nn.init.normal_(policy.value.weight)
        nn.init.constant_(policy.value.bias, 3.0)  # would show at every place that should have been masked
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # at zero, as it starts, it keeps every gradient from lora_A
                nn.init.normal_(parameter, std=0.1)
    return policy


def sequences(completions: Completions) -> list[tuple[int, int, Tensor, Tensor]]:
    """(p, k, prompt, completion) without padding."""
    num_prompts, num_generations, _ = completions.completion_ids.shape
    return [
        (
            p,
            k,
            completions.prompt_ids[p][completions.prompt_mask[p]],
            completions.completion_ids[p, k][completions.completion_mask[p, k]],
        )
        for p in range(num_prompts)
        for k in range(num_generations)
    ]


def plain_scores(model: Any, head: ValueHead, completions: Completions, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and values, one unpadded sequence at a time through the whole model, with a graph."""
    logprobs = torch.zeros(completions.completion_mask.shape, dtype=head.weight.dtype)
    values = torch.zeros_like(logprobs)
    for p, k, prompt, completion in sequences(completions):
        output = model(torch.cat([prompt, completion])[None], output_hidden_states=True)
        before = slice(len(prompt) - 1, -1)
        law = (output.logits[0, before] / temperature).log_softmax(-1)
        logprobs[p, k, : len(completion)] = law.gather(1, completion[:, None])[:, 0]
        hidden = output.hidden_states[-1][0, before]
        values[p, k, : len(completion)] = hidden @ head.weight[0] + head.bias
    return logprobs, values


def plain_network_values(model: Any, completions: Completions) -> Tensor:
    """The reward model's own score of every prefix, one forward pass each, with a graph."""
    values = torch.zeros(completions.completion_mask.shape)
    for p, k, prompt, completion in sequences(completions):
        for t in range(len(completion)):
            values[p, k, t] = model(torch.cat([prompt, completion[:t]])[None]).logits[0, 0]
    return values


def scored(policy: LoadedPolicy, **words: Any) -> Any:
    layout = policy.scorer.layout(some_completions())
    return policy.score(layout, policy.scorer.features(layout), **words)


def gradients(loss: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


# ------------------------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, torch.float32) for kind in KINDS), ("llama", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_a_new_head_is_zero_and_leaves_the_logprobs_alone(
    tiny_tokenizer: Any, kind: str, way: str, dtype: torch.dtype
) -> None:
    model = build_tiny_model(kind).to(dtype)
    policy = load_policy(model, tokenizer=tiny_tokenizer, with_values=True, **WAYS[way])
    layout = policy.scorer.layout(some_completions())
    features = policy.scorer.features(layout)
    expected, expected_entropy = policy.scorer.logprobs(layout, features, temperature=0.7, with_entropy=True)
    scores = policy.score(layout, features, temperature=0.7, with_entropy=True)
    assert torch.equal(scores.logprobs, expected)
    assert torch.equal(scores.entropies, expected_entropy)
    assert scores.values is not None
    assert scores.values.dtype == torch.float32
    assert not scores.values.any()
    assert isinstance(policy.value, ValueHead)
    assert {p.dtype for p in policy.value.parameters()} == {torch.float32}
    assert "values come from a linear head on the policy" in policy.notes


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_equal_a_plain_forward_pass(kind: str, shared: bool) -> None:
    if shared and kind == "mistral":  # takes one row a completion
        return
    model, head = build_tiny_model(kind), ValueHead(32)
    nn.init.normal_(head.weight)
    nn.init.constant_(head.bias, 3.0)
    completions = some_completions()
    scorer = Scorer(model, shared=shared)
    with torch.no_grad():
        _, expected = plain_scores(model, head, completions, 1.0)
        scores = scorer.score(scorer.layout(completions), value_head=head, temperature=0.5)
    assert scores.values is not None
    assert scores.values.std() > 1
    torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-5)
    assert not scores.values[~completions.completion_mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_head_and_trunk_learn_from_both_losses_in_one_pass(tiny_tokenizer: Any, kind: str, way: str) -> None:
    """Whatever is trained of the policy, trunk and top split (llama) or not. In float64, but for llama's norms."""
    policy = with_head(tiny_tokenizer, kind, double=True, **WAYS[way])
    completions = some_completions()
    mask = completions.completion_mask
    targets = torch.randn(mask.shape, dtype=torch.float64)

    def loss(logprobs: Tensor, values: Tensor) -> Tensor:
        return 0.3 * logprobs[mask].sum() + (values - targets)[mask].square().sum()

    scores = scored(policy, temperature=0.7)
    assert scores.values.dtype == torch.float64
    got = gradients(loss(scores.logprobs, scores.values), policy.masters.parameters)
    expected = loss(*plain_scores(policy.model, policy.value, completions, 0.7))
    for name, one, other in zip(policy.masters.names, got, gradients(expected, policy.masters.parameters), strict=True):
        assert other.any() or "k_proj.bias" in name, name
        assert (one - other).norm() <= (1e-12 if kind == "gpt2" else 1e-5) * other.norm(), name

    # The value loss alone reaches the policy too.
    values_only = gradients(scored(policy).values.square().sum(), policy.masters.parameters)
    assert sum(g.any() for g in values_only) > 3


@pytest.mark.parametrize("way", ["full", "layers", "network"])
def test_a_cut_of_the_batch_changes_no_bit_of_a_value(tiny_tokenizer: Any, way: str) -> None:
    if way == "network":
        policy = load_with(tiny_reward_model(), tiny_tokenizer)
    else:
        policy = with_head(tiny_tokenizer, **WAYS[way])
    layout = policy.scorer.layout(some_completions())
    features = policy.scorer.features(layout)
    assert (features is not None) is (way == "layers")
    prompts = torch.tensor([2, 0])
    with torch.no_grad():
        whole = policy.score(layout, features).values
        part = policy.score(layout.select(prompts), None if features is None else layout.rows(prompts, features)).values
    assert whole is not None
    assert part is not None
    assert torch.equal(part, whole[prompts])


def test_the_head_computes_in_float32_over_bfloat16(tiny_tokenizer: Any) -> None:
    policy = load_policy(build_tiny_model("llama").bfloat16(), tokenizer=tiny_tokenizer, with_values=True)
    assert isinstance(policy.value, ValueHead)
    nn.init.normal_(policy.value.weight)
    layout = policy.scorer.layout(some_completions())
    scores = policy.score(layout)
    hidden = policy.scorer.hidden(layout)
    assert hidden.dtype == torch.bfloat16
    assert scores.values is not None
    torch.testing.assert_close(scores.values[layout.mask], hidden.float() @ policy.value.weight[0])
    scores.values.square().sum().backward()
    assert policy.value.weight.grad is not None
    assert policy.value.weight.grad.dtype == torch.float32
    assert all(g.any() for name, g in named_gradients(policy) if "layers" in name)


def named_gradients(policy: LoadedPolicy) -> list[tuple[str, Tensor]]:
    return list(zip(policy.masters.names, policy.masters.gradients(), strict=True))


# ---------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy_kind", ["llama", "mistral"])
def test_a_new_network_gives_the_reward_models_score_of_every_prefix(
    tiny_tokenizer: Any, policy_kind: str, kind: str
) -> None:
    reward_model = tiny_reward_model(kind)
    policy = load_policy(
        build_tiny_model(policy_kind), tokenizer=tiny_tokenizer, with_values=True, value_model=reward_model
    )
    assert policy.scorer.shared is policy.reference.shared is ("mistral" not in (kind, policy_kind))
    with torch.no_grad():
        expected = plain_network_values(reward_model, some_completions())
        scores = scored(policy)
        plain = policy.scorer.logprobs(policy.scorer.layout(some_completions()))[0]
    assert scores.values.dtype == torch.float32
    assert scores.values.std() > 1
    torch.testing.assert_close(scores.values, expected, rtol=1e-5, atol=1e-5)
    assert not scores.values[~some_completions().completion_mask].any()
    assert torch.equal(scores.logprobs, plain)


def test_behind_the_last_token_it_would_give_the_reward(tiny_tokenizer: Any) -> None:
    """One token more, and its value is the score that the reward source gives what stands before it."""
    rewarded = some_completions()
    rewards = RewardModel(tiny_reward_model(), tiny_tokenizer, chat="never", policy_tokenizer=tiny_tokenizer)
    prompts = Prompts(rewarded.prompt_ids, rewarded.prompt_mask, torch.arange(3), ["", "", ""])
    expected = rewards.score(prompts, rewarded, [["", ""]] * 3)

    num_tokens = rewarded.num_tokens
    longer = Completions(
        rewarded.prompt_ids,
        rewarded.prompt_mask,
        nn.functional.pad(rewarded.completion_ids, (0, 1)).scatter(2, num_tokens[..., None], EOS_ID),
        torch.arange(6) <= num_tokens[..., None],
        nn.functional.pad(rewarded.sampler_logprobs, (0, 1)),
        ~rewarded.truncated,
        0,
    )
    network = ValueNetwork(tiny_reward_model())
    with torch.no_grad():
        values = network.values(Scorer(build_tiny_model("llama"), shared=True).layout(longer))
    last = values.gather(2, num_tokens[..., None]).flatten()
    torch.testing.assert_close(last, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_network_learns_all_of_it_and_the_policy_nothing(
    tiny_tokenizer: Any, kind: str, checkpointing: bool
) -> None:
    reward_model = tiny_reward_model(kind)
    policy = load_policy(
        build_tiny_model(kind),
        tokenizer=tiny_tokenizer,
        with_values=True,
        value_model=reward_model,
        gradient_checkpointing=checkpointing,
        trainable_layers=1,  # of the policy only
    )
    calls = []
    inside = next(m for n, m in reward_model.named_modules() if n.endswith(("layers.0.mlp", "h.0.mlp")))
    inside.register_forward_pre_hook(lambda *_: calls.append(1))
    targets = torch.randn(3, 2, 5)
    mask = some_completions().completion_mask
    (scored(policy).values - targets)[mask].square().sum().backward()
    assert len(calls) == (2 if checkpointing else 1)  # once more in the backward pass
    got = named_gradients(policy)
    expected = gradients(
        (plain_network_values(reward_model, some_completions()) - targets)[mask].square().sum(),
        list(reward_model.parameters()),
    )
    by_name = {f"value_network.{n}": g for (n, _), g in zip(reward_model.named_parameters(), expected, strict=True)}
    assert by_name.keys() == {name for name, _ in got if name.startswith("value_network.")}
    for name, gradient in got:
        if name in by_name:
            assert gradient.any(), name
            torch.testing.assert_close(gradient, by_name[name], rtol=1e-4, atol=2e-4)
        else:
            assert not gradient.any(), name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_network_has_no_dropout(tiny_tokenizer: Any, kind: str) -> None:
    rates = {"attention_dropout": 0.9} if kind == "llama" else {"attn_pdrop": 0.9, "resid_pdrop": 0.9}
    reward_model = tiny_reward_model(kind, **rates).train()
    policy = load_policy(build_tiny_model(kind), tokenizer=tiny_tokenizer, with_values=True, value_model=reward_model)
    with torch.no_grad():
        expected = scored(policy).values
        reward_model.train()
        assert torch.equal(scored(policy).values, expected)


def test_the_network_reads_its_score_in_float32_over_bfloat16(tiny_tokenizer: Any) -> None:
    reward_model = tiny_reward_model()
    policy = load_policy(
        build_tiny_model("llama").bfloat16(), tokenizer=tiny_tokenizer, with_values=True, value_model=reward_model
    )
    assert {p.dtype for p in reward_model.parameters()} == {torch.bfloat16}
    values = scored(policy).values
    assert values.dtype == torch.float32
    assert not torch.equal(values.bfloat16().float(), values)
    torch.testing.assert_close(values, plain_network_values(reward_model, some_completions()), rtol=0.1, atol=0.3)


# -------------------------------------------------------------------------------------------- masters and saved folders


def save_reward_model(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("of_its_own", "way", "dtype"),
    [
        (False, "full", "float32"),
        (False, "layers", "bfloat16"),
        (False, "lora", "bfloat16"),
        (True, "full", "bfloat16"),
        (True, "lora", "float32"),
    ],
)
def test_masters_train_and_restore_the_value_function_and_the_saved_model_lacks_it(
    tmp_path: Path, tiny_model_folder: str, tiny_tokenizer: Any, of_its_own: bool, way: str, dtype: str
) -> None:
    folder = save_reward_model(tmp_path / "reward", tiny_reward_model(), tiny_tokenizer)

    def load(with_values: bool = True) -> LoadedPolicy:
        torch.manual_seed(0)  # of the adapter
        return load_policy(
            tiny_model_folder,
            dtype=dtype,
            device="cpu",
            with_values=with_values,
            value_model=folder if of_its_own else None,
            **WAYS[way],
        )

    policy, without = load(), load(with_values=False)
    added = [name for name in policy.masters.names if name not in without.masters.names]
    if of_its_own:
        assert added == [f"value_network.{name}" for name, _ in tiny_reward_model().named_parameters()]
        assert any("values come from a network of their own, 0.0M parameters" in note for note in policy.notes)
    else:
        assert added == ["value_head.weight", "value_head.bias"]
    assert {m.dtype for m in policy.masters.masters} == {torch.float32}
    assert without.value is None
    assert scored(without).values is None

    start = scored(policy).values
    assert start.any() == of_its_own
    (scored(policy).values - 5.0).square().sum().backward()
    for master, gradient in zip(policy.masters.masters, policy.masters.gradients(), strict=True):
        master.data.add_(-0.05 * gradient.sign())
        master.grad = None
    policy.masters.publish()
    moved = scored(policy).values
    mask = some_completions().completion_mask
    assert (moved - start)[mask].abs().min() > 0.01

    again = load()
    again.masters.load(dict(zip(policy.masters.names, [m.detach() for m in policy.masters.masters], strict=True)))
    assert torch.equal(scored(again).values, moved)

    policy.model.save_pretrained(tmp_path / "saved")
    saved = [name for file in (tmp_path / "saved").glob("*.safetensors") for name in load_file(file)]
    assert saved
    assert not any("value" in name or "score" in name for name in saved)
    without.model.save_pretrained(tmp_path / "without")
    assert sorted(saved) == sorted(n for file in (tmp_path / "without").glob("*.safetensors") for n in load_file(file))


# ------------------------------------------------------------------------------------------------------ what is refused


def load_with(value_model: Any, tokenizer: Any) -> LoadedPolicy:
    return load_policy(build_tiny_model("llama"), tokenizer=tokenizer, with_values=True, value_model=value_model)


@pytest.mark.parametrize("in_memory", [True, False])
def test_another_vocabulary(tmp_path: Path, tiny_tokenizer: Any, in_memory: bool) -> None:
    model = tiny_reward_model(vocab_size=VOCAB_SIZE - 1)
    name = model if in_memory else save_reward_model(tmp_path, model, tiny_tokenizer)
    sentence = (
        f"value_model: .* has a vocabulary of {VOCAB_SIZE - 1} tokens and the policy of {VOCAB_SIZE}; give a reward "
        "model with the policy's tokenizer, or leave value_model empty for a head on the policy"
    )
    with pytest.raises(PairtuneError, match=sentence):
        load_with(name, tiny_tokenizer)


def test_another_tokenizer_of_the_same_size(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_reward_model(tmp_path, tiny_reward_model(), tiny_tokenizer)
    assert load_with(folder, tiny_tokenizer).value is not None
    path = tmp_path / "tokenizer.json"
    text = path.read_text()
    path.write_text(text.replace('"x":', '"swapped":').replace('"y":', '"x":').replace('"swapped":', '"y":'))
    assert PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() != tiny_tokenizer.get_vocab()
    with pytest.raises(
        PairtuneError, match=r"the tokenizer of .* means other tokens by the ids that the policy writes"
    ):
        load_with(folder, tiny_tokenizer)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_is_no_reward_model(tmp_path: Path, tiny_tokenizer: Any, kind: str) -> None:
    model = build_tiny_model(kind)
    folder = save_reward_model(tmp_path / "two", model, tiny_tokenizer)
    with pytest.raises(PairtuneError, match="is no reward model, for it gives 2 labels"):
        load_with(folder, tiny_tokenizer)
    model.config.num_labels = 1
    folder = save_reward_model(tmp_path / "one", model, tiny_tokenizer)
    with pytest.raises(PairtuneError, match=r"has no weights for score\.weight, so it is no trained reward model"):
        load_with(folder, tiny_tokenizer)


def test_an_encoder_gives_no_value_before_a_token(tiny_tokenizer: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertForSequenceClassification(BertConfig(vocab_size=VOCAB_SIZE, num_labels=1, **sizes))
    with pytest.raises(PairtuneError, match=r"\(bert\) is no decoder with a linear `score` head"):
        load_with(encoder, tiny_tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_what_scores_every_prefix(kind: str) -> None:
    model = tiny_reward_model(kind)
    assert scores_every_prefix(model)

    forward = model.forward

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.tanh()
        return output

    model.forward = capped
    assert not scores_every_prefix(model)

    deeper = tiny_reward_model(kind)
    deeper.score = nn.Sequential(deeper.score, nn.Tanh())
    assert not scores_every_prefix(deeper)


def test_a_decoder_that_looks_ahead_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_reward_model()
    forward = model.model.forward

    def both_ways(input_ids: Tensor, attention_mask: Any = None, **words: Any) -> Any:
        everything = torch.ones(len(input_ids), 1, input_ids.shape[1], input_ids.shape[1], dtype=torch.bool)
        return forward(input_ids, attention_mask=everything, **words)

    monkeypatch.setattr(model.model, "forward", both_ways)
    assert not scores_every_prefix(model)


def test_a_completion_beyond_the_networks_positions() -> None:
    network = ValueNetwork(tiny_reward_model("gpt2", n_positions=12), name="small")
    scorer = Scorer(build_tiny_model("llama"), shared=True)

    def values(length: int) -> Tensor:
        return network.values(scorer.layout(some_completions(num_prompts=1, num_generations=length, length=length)))

    assert values(9).shape == (1, 9, 9)
    with pytest.raises(PairtuneError, match=r"has 14 tokens and 'small' has 12 positions, .* lower max_prompt_length"):
        values(10)


@pytest.mark.parametrize("damage", ["no/such-model", "tokenizer gone", "weights cut short"])
def test_a_value_model_that_cannot_be_loaded(tmp_path: Path, tiny_tokenizer: Any, damage: str) -> None:
    name = damage
    if damage != "no/such-model":
        name = save_reward_model(tmp_path, tiny_reward_model(), tiny_tokenizer)
        if damage == "tokenizer gone":
            (tmp_path / "tokenizer.json").unlink()
            (tmp_path / "tokenizer_config.json").unlink()
        else:
            (tmp_path / "model.safetensors").write_bytes(b"short")
    what = "tokenizer" if damage == "tokenizer gone" else "model"
    with pytest.raises(
        PairtuneError, match=rf"^value_model: the {what} of .* could not be loaded \(.*\); give a hub id"
    ) as raised:
        load_with(name, tiny_tokenizer)
    assert "\n" not in str(raised.value)
    assert "smollm2" not in str(raised.value)


def test_without_values_no_value_model_is_read(tiny_tokenizer: Any) -> None:
    policy = load_policy(build_tiny_model("llama"), tokenizer=tiny_tokenizer, value_model="no/such-model")
    assert policy.value is None
