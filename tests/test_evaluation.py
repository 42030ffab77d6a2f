"""Evaluation on held-out prompts: every metric against a plain computation, one completion and one token at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tiny_model

from pairtune import EvaluateConfig, PairtuneError, evaluate
from pairtune import evaluation as evaluation_module
from pairtune.data import load_eval_prompts
from pairtune.evaluation import evaluate_policy
from pairtune.experience import sampling_params
from pairtune.feedback.rewards import RewardSet
from pairtune.maths.statistics import bootstrap_mean, bootstrap_ratio
from pairtune.models.loading import LoadedPolicy, load_policy
from pairtune.models.sampler import EVALUATION_STREAM, HFSampler

ROWS = [{"prompt": text} for text in ("Tell me", "And now, at last", "?", "Say it again", "So")]
METRICS = [
    "reward",
    "kl",
    "kl_k1",
    "kl_per_token",
    "length",
    "truncated",
    "entropy",
    "ref_nats_per_token",
    "distinct_2",
]


def config(**words: Any) -> EvaluateConfig:
    settings = {"model": "m", "dataset": "passed in", "chat": "never", "dtype": "float32", "device": "cpu"}
    return EvaluateConfig(**{**settings, "max_completion_length": 12, "eval_generations": 2, **words})


def length_in_hundredths(completions: list[str], prompts: list[str]) -> list[float | None]:
    """None for one prompt, and for short completions."""
    pairs = zip(completions, prompts, strict=True)
    return [None if prompt == "?" or len(text) < 4 else len(text) / 100 for text, prompt in pairs]


@pytest.fixture
def policy(tiny_tokenizer: Any) -> LoadedPolicy:
    """A policy and a reference with other weights."""
    loaded = load_policy(build_tiny_model("llama"), tokenizer=tiny_tokenizer)
    for parameter in loaded.reference.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return loaded


def measured(
    policy: LoadedPolicy, settings: EvaluateConfig, **words: Any
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sampler = HFSampler(
        policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id
    )
    dataset = load_eval_prompts(settings, policy.tokenizer, ROWS)
    return evaluate_policy(policy, sampler, RewardSet([length_in_hundredths]), dataset, settings, step=3, **words)


def by_hand(policy: LoadedPolicy, settings: EvaluateConfig) -> list[list[SimpleNamespace]]:
    """Every completion of every prompt, with plain forward passes and sums over the vocabulary."""
    dataset = load_eval_prompts(settings, policy.tokenizer, ROWS)
    sampler = HFSampler(
        policy.model, policy.tokenizer, eos_token_ids=policy.eos_token_ids, pad_token_id=policy.pad_token_id
    )
    found = []
    for row in range(len(dataset)):
        prompts = dataset.batch([row])
        drawn = sampler.generate(
            prompts, settings.eval_generations, sampling_params(settings), seed=settings.seed, stream=EVALUATION_STREAM
        )
        group = []
        for k in range(settings.eval_generations):
            completion = drawn.completion_ids[0, k][drawn.completion_mask[0, k]].tolist()
            text = policy.tokenizer.decode(completion, skip_special_tokens=True)
            group.append(one_completion(policy, settings, dataset.token_ids[row], completion))
            group[-1].text, group[-1].truncated = text, bool(drawn.truncated[0, k])
            group[-1].reward = length_in_hundredths([text], [ROWS[row]["prompt"]])[0]
        found.append(group)
    return found


@torch.no_grad()
def one_completion(
    policy: LoadedPolicy, settings: EvaluateConfig, prompt: list[int], completion: list[int]
) -> SimpleNamespace:
    ids = torch.tensor([prompt + completion])
    logits = policy.model(ids).logits[0, len(prompt) - 1 : -1].double() / settings.temperature
    reference = policy.reference.model(ids).logits[0, len(prompt) - 1 : -1].double() / settings.temperature
    kl = k1 = entropy = nats = 0.0
    for token, row, ref_row in zip(completion, logits.softmax(-1), reference.log_softmax(-1).tolist(), strict=True):
        likeliest = sorted(enumerate(row.tolist()), key=lambda item: -item[1])
        kept, mass = {}, 0.0
        for index, probability in likeliest[: settings.top_k or None]:
            if mass >= settings.top_p:
                break
            kept[index] = probability
            mass += probability
        law = {index: probability / mass for index, probability in kept.items()}
        kl += sum(p * (math.log(p) - ref_row[index]) for index, p in law.items())
        entropy -= sum(p * math.log(p) for p in law.values())
        k1 += math.log(law[token]) - ref_row[token]
        nats -= ref_row[token]
    return SimpleNamespace(kl=kl, k1=k1, entropy=entropy, nats=nats, length=len(completion), ids=completion)


@pytest.mark.parametrize("law", [{}, {"temperature": 0.7}, {"top_p": 0.6}, {"top_k": 5, "temperature": 1.3}])
def test_every_metric_is_what_it_says(policy: LoadedPolicy, law: dict[str, Any]) -> None:
    settings = config(**law)
    line, samples = measured(policy, settings)
    groups = by_hand(policy, settings)
    every = [completion for group in groups for completion in group]
    num_tokens = sum(c.length for c in every)
    rewards = [c.reward for c in every if c.reward is not None]
    bigrams = [pair for c in every for pair in zip(c.ids, c.ids[1:], strict=False)]
    expected = {
        "reward": sum(rewards) / len(rewards),
        "kl": sum(c.kl for c in every) / len(every),
        "kl_k1": sum(c.k1 for c in every) / len(every),
        "kl_per_token": sum(c.kl for c in every) / num_tokens,
        "length": num_tokens / len(every),
        "truncated": sum(c.truncated for c in every) / len(every),
        "entropy": sum(c.entropy for c in every) / num_tokens,
        "ref_nats_per_token": sum(c.nats for c in every) / num_tokens,
        "distinct_2": len(set(bigrams)) / len(bigrams),
    }
    assert list(line) == ["step", "num_prompts", "num_completions", *METRICS]
    assert (line["step"], line["num_prompts"], line["num_completions"]) == (3, 5, 10)
    for name, value in expected.items():
        assert line[name]["mean"] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        assert line[name]["low"] <= line[name]["mean"] <= line[name]["high"]
    assert expected["kl"] > 0.1
    assert 0 < expected["truncated"] < 1
    assert len(rewards) < len(every)

    assert [s["completion"] for s in samples] == [c.text for c in every]
    assert [s["reward"] for s in samples] == [c.reward and pytest.approx(c.reward) for c in every]
    assert [s["truncated"] for s in samples] == [c.truncated for c in every]
    assert [(s["row"], s["completion_index"]) for s in samples] == [(row, k) for row in range(5) for k in range(2)]
    assert {(s["step"], s["split"]) for s in samples} == {(3, "eval")}


def test_the_intervals_are_over_prompts(policy: LoadedPolicy) -> None:
    line, _ = measured(policy, config())
    groups = by_hand(policy, config())
    kl, length = (torch.tensor([[getattr(c, n) for c in group] for group in groups]) for n in ("kl", "length"))
    for name, interval in [
        ("kl", bootstrap_mean(kl.mean(1))),
        ("kl_per_token", bootstrap_ratio(kl.sum(1), length.sum(1))),
        ("length", bootstrap_mean(length.float().mean(1))),
    ]:
        assert tuple(line[name].values()) == pytest.approx(interval, rel=1e-4)


def test_the_same_draws_at_every_call_whatever_the_batch(policy: LoadedPolicy) -> None:
    line, samples = measured(policy, config())
    assert measured(policy, config()) == (line, samples)
    for size in (1, 2):
        told: list[float] = []
        other_line, other_samples = measured(policy, config(), batch_size=size, advance=told.append)
        assert sum(told) == 5
        assert list(map(drawn, other_samples)) == list(map(drawn, samples))
        for name in METRICS:
            assert other_line[name] == pytest.approx(line[name], rel=1e-4, abs=1e-6)
    assert list(map(drawn, measured(policy, config(seed=1))[1])) != list(map(drawn, samples))
    # The draws belong to dataset rows: fewer prompts, the same completions.
    fewer_line, fewer = measured(policy, config(num_eval_prompts=3))
    assert list(map(drawn, fewer)) == list(map(drawn, samples[:6]))
    assert fewer_line["num_prompts"] == 3
    assert measured(policy, config(num_eval_prompts=99)) == (line, samples)


def drawn(sample: dict[str, Any]) -> dict[str, Any]:
    """What was sampled and scored, without what was measured in floating point."""
    return {name: value for name, value in sample.items() if not name.startswith("kl")}


def test_samples_hold_what_the_line_is_made_of(policy: LoadedPolicy) -> None:
    line, samples = measured(policy, config())
    for name in ("reward", "kl", "kl_k1", "truncated"):
        values = [s[name] for s in samples if s[name] is not None]  # one completion has no reward
        assert line[name]["mean"] == pytest.approx(sum(values) / len(values), rel=1e-5)
    lengths = [len(s["completion_ids"]) for s in samples]
    assert line["length"]["mean"] == pytest.approx(sum(lengths) / len(samples))
    assert [policy.tokenizer.decode(s["completion_ids"], skip_special_tokens=True) for s in samples] == [
        s["completion"] for s in samples
    ]


def test_where_no_reward_counts_there_is_no_mean(policy: LoadedPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.length_in_hundredths", lambda completions, prompts: [None] * len(completions))
    line, samples = measured(policy, config())
    assert math.isnan(line["reward"]["mean"])
    assert {s["reward"] for s in samples} == {None}
    assert line["kl"]["mean"] > 0


# ------------------------------------------------------------------------------------------------- the verb `evaluate`


def evaluated(folder: str, **words: Any) -> dict[str, Any]:
    return evaluate(config(model=folder, **words), reward_funcs=[length_in_hundredths], dataset=ROWS)


@pytest.fixture
def other_folder(tmp_path: Path, tiny_tokenizer: Any) -> str:
    build_tiny_model("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_without_a_reference_there_is_no_kl(tiny_model_folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = evaluated(tiny_model_folder)
    assert set(line) == {"num_prompts", "num_completions", *METRICS} - {
        "kl",
        "kl_k1",
        "kl_per_token",
        "ref_nats_per_token",
    }
    output = capsys.readouterr().out
    assert "reward" in output
    assert "KL" not in output


def test_a_full_gpu_is_a_sentence(tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(HFSampler, "generate", full)
    with pytest.raises(
        PairtuneError, match=r"^the GPU ran out of memory while evaluating .*; lower batch_size, reward_"
    ):
        evaluated(tiny_model_folder)


def test_against_a_reference(
    tiny_model_folder: str, other_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "result.json"
    line = evaluated(tiny_model_folder, ref_model=other_folder, output=str(output), top_p=0.9)
    assert line["kl"]["mean"] > 1
    assert f"{line['kl']['mean']:.2f}" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["evaluation"] == line
    assert written["config"]["top_p"] == 0.9
    assert len(written["samples"]) == 10
    same = evaluated(tiny_model_folder, ref_model=tiny_model_folder)
    assert same["kl"] == same["kl_k1"] == {"mean": 0, "low": 0, "high": 0}


def test_what_is_no_number_is_null_in_the_file(tiny_model_folder: str, tmp_path: Path) -> None:
    """One prompt has no spread, and a KL to a law that excludes a token has no bound: JSON can say neither."""
    output = tmp_path / "result.json"
    line = evaluated(tiny_model_folder, output=str(output), num_eval_prompts=1)
    assert math.isnan(line["length"]["low"])
    written = json.loads(output.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert written["evaluation"]["length"] == {"mean": line["length"]["mean"], "low": None, "high": None}


def test_two_models_share_a_layout_that_both_can_take(
    tiny_model_folder: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    build_tiny_model("mistral").save_pretrained(tmp_path / "mistral")
    mistral = str(tmp_path / "mistral")
    there = evaluated(tiny_model_folder, ref_model=mistral)
    assert there["kl"]["mean"] > 1
    tiny_tokenizer.save_pretrained(mistral)
    assert evaluated(mistral, ref_model=mistral)["kl"]["mean"] == 0


def test_a_reference_of_another_vocabulary(tiny_model_folder: str, tmp_path: Path) -> None:
    build_tiny_model("llama", vocab_size=99).save_pretrained(tmp_path / "small")
    sentence = (
        r"ref_model: '.*small' has a vocabulary of 99 tokens and '.*tiny-llama' one of 103; a KL needs two models"
    )
    with pytest.raises(PairtuneError, match=sentence):
        evaluated(tiny_model_folder, ref_model=str(tmp_path / "small"))


def test_what_is_asked_for_is_what_is_loaded(
    tiny_model_folder: str, other_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    load = evaluation_module.load_causal_lm

    def recording(name: str, **words: Any) -> Any:
        asked.append((name, words["revision"], words["dtype"], words["attn_implementation"]))
        return load(name, **words)

    monkeypatch.setattr(evaluation_module, "load_causal_lm", recording)
    evaluated(
        tiny_model_folder, ref_model=other_folder, model_revision="v2", dtype="bfloat16", attn_implementation="eager"
    )
    assert asked == [
        (tiny_model_folder, "v2", torch.bfloat16, "eager"),
        (other_folder, None, torch.bfloat16, "eager"),  # a revision of another repository means nothing here
    ]


def test_a_head_that_does_more_is_refused_here_too(tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = evaluation_module.load_causal_lm

    def capped(name: str, **words: Any) -> Any:
        model = load(name, **words)
        forward = model.forward

        def with_cap(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            output.logits = output.logits.tanh()
            return output

        model.forward = with_cap
        return model

    monkeypatch.setattr(evaluation_module, "load_causal_lm", capped)
    with pytest.raises(PairtuneError, match="does more to its logits than a linear head"):
        evaluated(tiny_model_folder)


def test_a_reward_function_may_read_the_state_of_the_trainer(tiny_model_folder: str) -> None:
    def reward(completions: list[str], trainer_state: Any) -> list[float]:
        return [float(trainer_state.global_step)] * len(completions)

    line = evaluate(config(model=tiny_model_folder), reward_funcs=[reward], dataset=ROWS)
    assert line["reward"]["mean"] == 0


def test_the_best_of_n_are_chosen_from_the_same_draws(policy: LoadedPolicy) -> None:
    all_six, samples = measured(policy, config(eval_generations=6))
    best, kept = measured(policy, config(eval_generations=2, best_of_n=3))
    assert (best["num_completions"], len(kept)) == (2 * len(ROWS), 2 * len(ROWS))
    for row in range(len(ROWS)):
        drawn = [sample for sample in samples if sample["row"] == row]
        for place, sample in enumerate(s for s in kept if s["row"] == row):
            three = drawn[3 * place : 3 * place + 3]
            expected = max(three, key=lambda s: -1 if s["reward"] is None else s["reward"])  # the first of equals
            assert (sample["completion"], sample["reward"]) == (expected["completion"], expected["reward"])
    assert best["reward"]["mean"] > all_six["reward"]["mean"]


def test_the_kl_of_the_best_of_n_adds_choice_and_drift(policy: LoadedPolicy) -> None:
    """Chosen among completions of which none would come twice: log n - (n - 1) / n on top of the drift."""
    best, _ = measured(policy, config(eval_generations=1, best_of_n=4))
    groups = by_hand(policy, config(eval_generations=4))
    chosen = [max(group, key=lambda c: -1 if c.reward is None else c.reward) for group in groups]
    drift = sum(c.k1 for c in chosen) / len(chosen)
    assert best["kl"] == best["kl_k1"]
    assert best["kl"]["mean"] == pytest.approx(math.log(4) - 3 / 4 + drift, abs=0.02)
    assert best["length"]["mean"] == sum(c.length for c in chosen) / len(chosen)


def test_best_of_n_is_measured_to_the_model_that_it_samples(tiny_model_folder: str) -> None:
    line = evaluated(tiny_model_folder, best_of_n=4)
    assert line["kl"]["mean"] == pytest.approx(math.log(4) - 3 / 4, abs=0.02)
    assert "kl" not in evaluated(tiny_model_folder)
