"""`train` from end to end on tiny models: what it learns, what it leaves behind, how it goes on, what it refuses."""

from __future__ import annotations

import asyncio
import copy
import itertools
import json
import os
import signal
import string
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import EOS_ID, PAD_ID, build_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from pairtune import PairtuneError, TrainConfig, train
from pairtune.data import RawPrompts
from pairtune.experience import decode, sampling_params
from pairtune.maths.pairwise import p3o_joint_loss
from pairtune.models import loading
from pairtune.models.logprobs import Scorer
from pairtune.models.sampler import HFSampler
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages import loop, rl

PROMPTS = [{"prompt": f"{word} {number}"} for number in range(4) for word in ("Go on", "Say it again", "So")]
HELD_OUT = [{"prompt": "Tell me"}, {"prompt": "And now, at last"}, {"prompt": "?"}]
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"trainable_layers": 1},
    "lora": {"lora_r": 4, "lora_alpha": 8},
}


def share_of_letters(completions: list[str], **_: Any) -> list[float]:
    """Something that a random model learns in a few steps: lower-case letters are a quarter of its tokens."""
    return [sum(c in string.ascii_lowercase for c in text) / max(1, len(text)) for text in completions]


@pytest.fixture
def run(tiny_model_folder: str, tmp_path: Path) -> Callable[..., rl.TrainResult]:
    """train() on the tiny Llama: `run(max_steps=3, reward=...)`; every word of TrainConfig may be given."""

    def start(
        *, reward: Any = share_of_letters, prompts: Any = PROMPTS, held_out: Any = HELD_OUT, **words: Any
    ) -> rl.TrainResult:
        given = {key: words.pop(key) for key in ("tokenizer",) if key in words}
        if not isinstance(words.get("model", ""), str):
            given["model"] = words.pop("model")
        settings = {
            "model": tiny_model_folder,
            "dataset": "passed in",
            "chat": "never",
            "dtype": "float32",
            "device": "cpu",
            "num_iterations": 2,
            "batch_size": 4,
            "max_completion_length": 6,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "eval_steps": 0,
            "save_steps": 0,
            "output_dir": str(tmp_path / "run"),
        }
        rewards = reward if isinstance(reward, list) else [reward]
        return train(
            TrainConfig(**{**settings, **words}),
            reward_funcs=rewards,
            train_dataset=prompts,
            eval_dataset=held_out,
            **given,
        )

    return start


Run = Callable[..., rl.TrainResult]


def lines(result: rl.TrainResult | Path, name: str = "metrics") -> list[dict[str, Any]]:
    folder = result if isinstance(result, Path) else result.output_dir
    return [without_times(line) for line in read_jsonl(folder / f"{name}.jsonl")]


def newest(result: rl.TrainResult | Path) -> Path:
    found = checkpoint.latest(result if isinstance(result, Path) else result.output_dir)
    assert found is not None
    return found


def masters(result: rl.TrainResult | Path) -> dict[str, Tensor]:
    """The weights and moments of the newest checkpoint."""
    return checkpoint.load(newest(result))[0]


def inexact(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in record if "were not computed alike" in str(w.message)]


# --------------------------------------------------------------------------------------------------------- one long run


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_and_leaves_what_it_should(run: Run, way: str) -> None:
    """One run, many assertions."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = run(
            max_steps=12,
            batch_size=6,
            num_generations=4,
            num_iterations=3,
            beta=0.01,
            epsilon=0.5,
            learning_rate={"full": 5e-3, "layers": 3e-2, "lora": 2e-2}[way],
            eval_steps=6,
            save_steps=4,
            keep_last=2,
            num_completions_to_log=3,
            **WAYS[way],
        )
    assert inexact(record) == []
    assert (result.steps, result.finished) == (12, True)
    folder = result.output_dir

    metrics, evaluations = lines(result), lines(result, "evaluations")
    rewards = [line["reward"] for line in metrics]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.25
    assert evaluations[-1]["reward"]["mean"] > evaluations[0]["reward"]["mean"] + 0.2

    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"} <= files
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-8", "step-12"}
    weights = "adapter_model" if way == "lora" else "model"
    assert {f"checkpoints/step-12/{name}" for name in (f"{weights}.safetensors", "trainer.json")} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl", ".pickle")) for name in files)

    assert [line["step"] for line in metrics] == list(range(1, 13))
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    trl_names = {"reward", "reward_std", "frac_reward_zero_std", "kl", "entropy", "num_tokens", "grad_norm", "loss"}
    trl_names |= {f"completions/{x}_length" for x in ("mean", "min", "max", "mean_terminated")}
    trl_names |= {"completions/clipped_ratio", "clip_ratio", "learning_rate"}
    trl_names |= {"rewards/share_of_letters/mean", "rewards/share_of_letters/std"}
    ours = {"kl_per_token", "sampling/logprob_difference/mean", "sampling/logprob_difference/max", "logratio_abs"}
    ours |= {f"{name}/pass_{p}" for p in (1, 2, 3) for name in ("clip_ratio", "clip_ratio/zero_gradient")}
    times = {"step_time", "tokens_per_second"} | {f"time/{x}" for x in ("sample", "score", "ref_logprobs", "update")}
    for line in read_jsonl(folder / "metrics.jsonl"):
        assert trl_names | ours | times <= set(line)
        assert line["clip_ratio"] == line["clip_ratio/pass_3"]
        assert line["clip_ratio/pass_1"] == line["logratio_abs/pass_1"] == 0  # ratio 1, exactly
        assert line["sampling/logprob_difference/max"] < 1e-4
        assert "time/old_logprobs" not in line  # one update a pass: the first pass gives them
    assert any(line["clip_ratio/pass_2"] > 0 for line in metrics)
    assert any(line["clip_ratio/pass_3"] > line["clip_ratio/pass_2"] for line in metrics)
    assert metrics[-1]["num_tokens"] > metrics[0]["num_tokens"] > 0

    assert metrics[0]["kl"] == metrics[0]["kl_per_token"] == 0
    assert metrics[-1]["kl"] > 0.1
    for name in ("kl", "kl_k1", "kl_per_token"):
        assert evaluations[0][name] == {"mean": 0, "low": 0, "high": 0}
        assert evaluations[-1][name]["mean"] > 0.01

    samples = lines(result, "samples")
    assert Counter((s["split"], s["step"]) for s in samples) == {
        **{("train", step): 3 for step in range(1, 13)},
        **{("eval", step): 3 for step in (0, 6, 12)},
    }
    assert {s["prompt"] for s in samples if s["split"] == "eval"} == {row["prompt"] for row in HELD_OUT}
    for sample in samples:
        assert sample["reward"] == pytest.approx(share_of_letters([sample["completion"]])[0])

    loaded = AutoModelForCausalLM.from_pretrained(newest(result), dtype="float32").eval()
    ids = torch.arange(7, 37).view(2, 15)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert AutoTokenizer.from_pretrained(newest(result))("So 1")["input_ids"] == result.tokenizer("So 1")["input_ids"]
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["compute_dtype"], environment["device"]) == ("torch.float32", "cpu")


# ------------------------------------------------------------------------------------------------------- one arithmetic


@pytest.mark.parametrize(
    ("kind", "dtype", "way"),
    [
        ("llama", "float32", "full"),
        ("llama", "bfloat16", "layers"),
        ("llama", "bfloat16", "lora"),
        ("mistral", "bfloat16", "full"),
        ("mistral", "float32", "layers"),
        ("mistral", "float32", "lora"),
    ],
)
def test_the_first_ratio_is_1_and_the_first_kl_0(
    run: Run, tmp_path: Path, tiny_tokenizer: Any, kind: str, dtype: str, way: str
) -> None:
    """With shared rows and plain ones, minibatches, and micro-batches that divide neither them nor the batch."""
    folder = tmp_path / kind
    build_tiny_model(kind).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    words = {"batch_size": 6, "minibatch_size": 3, "micro_batch_size": 2, "temperature": 0.7}
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = run(model=str(folder), dtype=dtype, num_generations=3, **words, **WAYS[way])
    assert inexact(record) == []
    assert lines(result)[0]["kl"] == 0
    assert lines(result)[1]["kl"] != 0
    assert lines(result, "evaluations")[0]["kl"]["mean"] == 0
    assert "time/old_logprobs" in read_jsonl(result.output_dir / "metrics.jsonl")[0]
    assert {p.dtype for p in result.model.parameters()} == {getattr(torch, dtype)}


def test_the_reference_is_cut_as_the_policy_is(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix product of another shape may round otherwise, on some machine and for some width."""
    cuts: dict[int, list[int]] = {}
    score = Scorer.score

    def recording(scorer: Scorer, layout: Any, *args: Any, **words: Any) -> Any:
        cuts.setdefault(id(scorer), []).append(len(layout.mask))
        return score(scorer, layout, *args, **words)

    monkeypatch.setattr(Scorer, "score", recording)
    run(batch_size=10, minibatch_size=5, micro_batch_size=2, num_iterations=1, max_steps=1)
    reference, policy = cuts.values()
    assert reference == [2, 2, 1, 2, 2, 1]
    assert policy == reference + reference  # once for the old log-probabilities, once for the update


def test_a_reference_with_other_weights_is_noticed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        policy = loading.load_policy(*args, **kwargs)
        next(policy.reference.model.parameters()).data[7:] += 0.01
        return policy

    monkeypatch.setattr(rl, "load_policy", load)
    with pytest.warns(UserWarning, match="KL to the reference is not 0 .* or a reference with other weights"):
        run(max_steps=1)


def test_dropout_left_on_is_noticed(
    run: Run, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tiny_model("gpt2", resid_pdrop=0.3).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer.save_pretrained(tmp_path / "gpt2")
    monkeypatch.setattr(loading, "disable_dropout", lambda model: model)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        # Only checkpointing trains in training mode, where dropout would act.
        run(model=str(tmp_path / "gpt2"), max_steps=1, minibatch_size=2, gradient_checkpointing=True)
    found = inexact(record)
    assert any("the KL to the reference is not 0" in sentence for sentence in found)
    assert any("the first ratio of step 1 is not 1" in sentence for sentence in found)
    assert all("dropout left on" in sentence for sentence in found)


def test_each_forward_pass_is_needed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old log-probabilities cost a pass of their own only where a batch has more than one minibatch."""
    calls: Counter[str] = Counter()

    def load(*args: Any, **kwargs: Any) -> Any:
        policy = loading.load_policy(*args, **kwargs)
        names = {id(policy.scorer): "policy", id(policy.reference): "reference"}
        for method in ("score", "features"):
            inner = getattr(Scorer, method)

            def counted(self: Scorer, *a: Any, _inner: Any = inner, _method: str = method, **k: Any) -> Any:
                calls[f"{names[id(self)]} {_method}"] += 1
                return _inner(self, *a, **k)

            monkeypatch.setattr(Scorer, method, counted)
        return policy

    monkeypatch.setattr(rl, "load_policy", load)

    def count(**words: Any) -> dict[str, int]:
        monkeypatch.undo()
        monkeypatch.setattr(rl, "load_policy", load)
        calls.clear()
        run(max_steps=1, held_out=None, dataset_test_split=None, overwrite=True, **words)
        return {name: number for name, number in calls.items() if number}

    assert count(num_iterations=1) == {"policy score": 1, "reference score": 1}
    assert count(num_iterations=3) == {"policy score": 3, "reference score": 1}
    assert count(num_iterations=2, micro_batch_size=3) == {"policy score": 4, "reference score": 2}
    assert count(num_iterations=2, minibatch_size=2) == {"policy score": 2 + 4, "reference score": 2}
    # The trunk below the trained layers runs once a batch, for policy and reference, all passes together.
    expected = {"policy score": 3, "reference score": 1, "policy features": 1}
    assert count(num_iterations=3, trainable_layers=1) == expected


# ------------------------------------------------------------------------------------------------------- the plain loop


def plain_loop(model: Any, tokenizer: Any, config: TrainConfig, num_groups: int) -> None:
    """What `train` does with this configuration, written down without any of its machinery."""
    reference = copy.deepcopy(model)
    dataset = RawPrompts.from_rows(PROMPTS).encode(tokenizer, chat="never")
    sampler = HFSampler(model, tokenizer, eos_token_ids=(EOS_ID,), pad_token_id=PAD_ID)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is m] for m in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(config.adam_beta1, config.adam_beta2),
    )
    # Two updates of warm-up; from there linearly towards 0, which would come after the last update.
    num_updates = config.max_steps * config.num_iterations
    factors = [1 / 3, 2 / 3] + [1 - n / (num_updates - 2) for n in range(num_updates - 2)]

    for step in range(config.max_steps):
        prompts = dataset.batch(dataset.step_rows(config.seed, step, config.batch_size))
        drawn = sampler.generate(
            prompts, config.num_generations, sampling_params(config), seed=config.seed, stream=step
        )
        texts = decode(tokenizer, drawn)
        counts = torch.tensor([not prompt.startswith("So") for prompt in prompts.prompts])
        rewards = torch.tensor([share_of_letters(group) for group in texts], dtype=torch.float64)

        def sequence_logprobs(scored: Any, drawn: Any = drawn) -> Tensor:
            sums = []
            for p, k in itertools.product(range(config.batch_size), range(config.num_generations)):
                prompt = drawn.prompt_ids[p][drawn.prompt_mask[p]]
                completion = drawn.completion_ids[p, k][drawn.completion_mask[p, k]]
                logits = scored(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
                law = (logits / config.temperature).log_softmax(-1)
                sums.append(law.gather(1, completion[:, None]).sum())
            return torch.stack(sums).view(config.batch_size, -1)

        with torch.no_grad():
            old, ref = sequence_logprobs(model), sequence_logprobs(reference)
        for _ in range(config.num_iterations):
            policy = sequence_logprobs(model)
            shaped = rewards - config.beta * (policy.detach() - ref)
            losses = p3o_joint_loss(policy, old, shaped, epsilon=config.epsilon, max_ratio=config.p3o.max_ratio)
            loss = losses[counts].mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factors[0]
            factors.pop(0)
            optimizer.step()
        assert int(counts.sum()) >= num_groups
    assert not factors


def test_a_run_is_the_plain_loop(run: Run, tiny_tokenizer: Any) -> None:
    words = {
        "num_iterations": 3,
        "temperature": 0.8,
        "beta": 0.3,
        "epsilon": 0.4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.2,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.05,
        "max_steps": 2,
    }
    model = build_tiny_model("gpt2").double()
    start = copy.deepcopy(model)
    expected = copy.deepcopy(model)
    result = run(model=model, tokenizer=tiny_tokenizer, reward=some_without_reward, micro_batch_size=3, **words)
    settings = yaml.safe_load((result.output_dir / "config.yaml").read_text())
    plain_loop(expected, tiny_tokenizer, TrainConfig(**settings), num_groups=2)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(result.model.get_parameter(name), parameter, rtol=0, atol=1e-7)
        assert (parameter - start.get_parameter(name)).abs().max() > 1e-4
    # Clipping acted, by its edge and by the norm.
    assert all(line["clip_ratio"] > 0 and line["grad_norm"] > 0.05 for line in lines(result))
    assert any(line["clip_ratio"] < 1 for line in lines(result))


# ---------------------------------------------------------------------------------------------------- cuts of the batch


def some_without_reward(completions: list[str], prompts: list[str], **_: Any) -> list[float | None]:
    """None for two prompts of three, so that minibatches have other counts than prompts."""
    rewards = share_of_letters(completions)
    return [None if prompt.startswith("So") else reward for prompt, reward in zip(prompts, rewards, strict=True)]


def recorded_gradients(run: Run, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, **words: Any) -> list[Any]:
    """(denominator, gradients) of every update of a step that makes no update, in float64."""
    found: list[Any] = []
    denominators: list[int] = []
    sum_across = rl.distributed.sum_across

    def counting(tensor: Tensor) -> Tensor:
        if tensor.ndim == 0:
            denominators.append(int(tensor))
        return sum_across(tensor)

    def record(config: Any, policy: Any, optimizer: Any, progress: Any) -> float:
        found.append((denominators[-1], [g.clone() for g in policy.masters.gradients()]))
        for master in policy.masters.masters:
            master.grad = None
        progress.num_updates += 1
        return 0.0

    monkeypatch.setattr(rl.distributed, "sum_across", counting)
    monkeypatch.setattr(rl, "_apply_gradients", record)
    run(
        model=build_tiny_model("gpt2").double(),  # float64 throughout: a Llama's norms would compute in float32
        tokenizer=tokenizer,
        reward=some_without_reward,
        batch_size=6,
        num_iterations=1,
        max_steps=1,
        overwrite=True,
        **words,
    )
    monkeypatch.undo()
    return found


def test_any_cut_into_micro_batches_gives_one_gradient(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    ((count, whole),) = recorded_gradients(run, monkeypatch, tiny_tokenizer)
    assert 0 < count < 6
    assert max(gradient.abs().max().item() for gradient in whole) > 1e-4
    for size in (1, 4, 5, 6):
        ((_, cut),) = recorded_gradients(run, monkeypatch, tiny_tokenizer, micro_batch_size=size)
        for one, other in zip(cut, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_minibatches_add_up_to_the_batch(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    ((count, whole),) = recorded_gradients(run, monkeypatch, tiny_tokenizer)
    parts = recorded_gradients(run, monkeypatch, tiny_tokenizer, minibatch_size=2, micro_batch_size=1)
    assert len(parts) == 3
    assert sum(number for number, _ in parts) == count
    assert len({number for number, _ in parts}) > 1
    for index, gradient in enumerate(whole):
        mean = sum(number * gradients[index] for number, gradients in parts) / count
        torch.testing.assert_close(mean, gradient, rtol=0, atol=1e-14)


def test_the_logged_loss_does_not_depend_on_the_cut(run: Run) -> None:
    frozen = {"learning_rate": 0.0, "num_iterations": 1, "max_steps": 1, "overwrite": True}
    whole = lines(run(**frozen))[0]["loss"]
    assert abs(whole) > 1e-4
    assert lines(run(minibatch_size=2, **frozen))[0]["loss"] == pytest.approx(whole, rel=1e-5)
    assert lines(run(micro_batch_size=3, **frozen))[0]["loss"] == pytest.approx(whole, rel=1e-5)


# ------------------------------------------------------------------------------------------------ stopping and going on


class Interrupted(Exception):
    pass


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Until monkeypatch.undo(), a run dies while it collects this step (from 0)."""
    collect = rl.collect

    def dying(*args: Any, **words: Any) -> Any:
        if words["step"] == step:
            raise Interrupted
        return collect(*args, **words)

    monkeypatch.setattr(rl, "collect", dying)


RESUMED: dict[str, dict[str, Any]] = {
    "minibatches, running scale": {"minibatch_size": 2, "micro_batch_size": 1, "scale_rewards": "running"},
    "bfloat16, linear schedule": {"dtype": "bfloat16", "lr_scheduler_type": "linear", "warmup_steps": 3},
    "layers, cosine, decay": {"trainable_layers": 1, "lr_scheduler_type": "cosine", "weight_decay": 0.1},
    "lora, bfloat16": {"dtype": "bfloat16", "lora_r": 2},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = {"max_steps": 5, "save_steps": 2, "eval_steps": 2, **RESUMED[name]}
    whole = run(output_dir=str(tmp_path / "whole"), **words)

    interrupted_at(monkeypatch, 3)
    with pytest.raises(Interrupted):
        run(output_dir=str(tmp_path / "parts"), **words)
    monkeypatch.undo()
    assert newest(tmp_path / "parts").name == "step-2"
    assert lines(tmp_path / "parts")[-1]["step"] == 3  # a line past the checkpoint, to be cut
    parts = run(output_dir=str(tmp_path / "parts"), resume=True, **words)

    assert (parts.steps, parts.finished) == (5, True)
    for log in ("metrics", "evaluations", "samples"):
        assert lines(parts, log) == lines(whole, log)
    one, other = masters(parts), masters(whole)
    assert one.keys() == other.keys()
    assert any(tensor.abs().sum() > 0 for tensor in one.values())
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
    for key, tensor in parts.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[key]), key


def test_a_finished_run_can_be_made_longer(run: Run, tmp_path: Path) -> None:
    whole = run(output_dir=str(tmp_path / "whole"), max_steps=4, eval_steps=2)
    run(output_dir=str(tmp_path / "parts"), max_steps=2, eval_steps=2)
    parts = run(output_dir=str(tmp_path / "parts"), max_steps=4, eval_steps=2, resume=True)
    assert lines(parts) == lines(whole)
    assert lines(parts, "evaluations") == lines(whole, "evaluations")
    again = run(output_dir=str(tmp_path / "parts"), max_steps=4, eval_steps=2, resume=True)
    assert again.steps == 4
    assert lines(again) == lines(whole)
    assert lines(again, "evaluations") == lines(whole, "evaluations")


def test_to_resume_what_never_began_is_to_begin(run: Run) -> None:
    assert run(resume=True).steps == 2


def test_the_measured_precision_is_kept(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine `auto` could come out otherwise the second time."""
    asked: list[str] = []
    choose = loading.choose_dtype

    def chosen(name: str, device: Any) -> Any:
        asked.append(name)
        return choose("bfloat16" if name == "auto" and len(asked) == 1 else name, device)

    monkeypatch.setattr(loading, "choose_dtype", chosen)
    run(dtype="auto", max_steps=1)
    result = run(dtype="auto", max_steps=2, resume=True)
    assert asked == ["auto", "bfloat16"]
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}


def kills_itself(number: signal.Signals, step: int, times: int = 1) -> Callable[..., list[float]]:
    """A reward function that sends its process a signal in the middle of a training step."""

    def reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        if len(completions) != len(HELD_OUT) and trainer_state.global_step == step:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return share_of_letters(completions)

    reward.__name__ = share_of_letters.__name__  # the same metrics
    return reward


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    stopped = run(max_steps=4, reward=kills_itself(number, step=1))
    assert signal.getsignal(number) is handler
    assert (stopped.steps, stopped.finished) == (2, False)
    assert newest(stopped).name == "step-2"
    output, errors = capfd.readouterr()
    assert "stopping: this step is finished and saved first" in errors
    going_on = f"pairtune train --resume --output_dir {stopped.output_dir}"
    assert f"stopped after step 2 of 4; go on with: {going_on}" in output

    if number == signal.SIGINT:  # goes on like the other
        return
    resumed = run(max_steps=4, resume=True)
    whole = run(max_steps=4, output_dir=str(tmp_path / "whole"))
    assert resumed.finished
    for log in ("metrics", "evaluations", "samples"):
        assert lines(resumed, log) == lines(whole, log)
    assert all(torch.equal(tensor, masters(whole)[key]) for key, tensor in masters(resumed).items())


def test_a_signal_in_the_last_step_leaves_the_last_evaluation_to_the_resumed_run(run: Run) -> None:
    stopped = run(max_steps=2, reward=kills_itself(signal.SIGTERM, step=1))
    assert (stopped.steps, stopped.finished) == (2, False)
    assert [line["step"] for line in lines(stopped, "evaluations")] == [0]
    for _ in range(2):
        resumed = run(max_steps=2, resume=True)
        assert (resumed.steps, resumed.finished) == (2, True)
        assert [line["step"] for line in lines(resumed, "evaluations")] == [0, 2]


def test_a_second_ctrl_c_stops_at_once(run: Run) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(max_steps=4, save_steps=1, reward=kills_itself(signal.SIGINT, step=1, times=2))
    assert signal.getsignal(signal.SIGINT) is handler


def test_in_another_thread_the_signals_are_left_alone(run: Run) -> None:
    results = []
    thread = threading.Thread(target=lambda: results.append(run(max_steps=1)))
    thread.start()
    thread.join()
    assert results[0].finished


@pytest.mark.parametrize("save_steps", [0, 1])
def test_max_minutes_ends_with_a_checkpoint_and_an_evaluation(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], save_steps: int
) -> None:
    class Clock:
        seconds = 0.0

        def perf_counter(self) -> float:
            return self.seconds

    clock = Clock()

    def reward(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        clock.seconds += 0 if len(completions) == len(HELD_OUT) else 20  # a step takes 20 s
        return share_of_letters(completions)

    monkeypatch.setattr(loop, "time", clock)
    result = run(max_steps=9, max_minutes=1.2, save_steps=save_steps, reward=reward)
    assert (result.steps, result.finished) == (3, True)  # a fourth would end after 80 s, over the 72
    assert newest(result).name == "step-3"
    assert [line["step"] for line in lines(result, "evaluations")] == [0, 3]
    assert "stopping after step 3: the next would pass max_minutes 1.2" in capsys.readouterr().out
    longer = run(max_steps=4, max_minutes=60.0, save_steps=save_steps, reward=reward, resume=True)
    assert longer.steps == 4


# ---------------------------------------------------------------------------------------------------------- what is odd


def test_more_prompts_a_batch_than_there_are(run: Run, tmp_path: Path) -> None:
    with pytest.raises(PairtuneError, match="batch_size=20 is more than the 12 prompts"):
        run(batch_size=20)
    assert not (tmp_path / "run").exists()


REWARDS: dict[str, tuple[Callable[..., Any], str]] = {
    "nan": (lambda completions: [0.0] * (len(completions) - 1) + [float("nan")], "returned nan for completion 7"),
    "infinite": (lambda completions: [float("inf")] * len(completions), "returned inf for completion 0"),
    "raises": (
        lambda completions: {}["missing"],
        r"raised KeyError \('missing'\) at test_train.py:\d+ on 8 ",
    ),
    "too few": (lambda completions: [0.0], "returned 1 values for 8 completions"),
    "text": (lambda completions: ["0.5"] * len(completions), "returned '0.5' for completion 0"),
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_that_goes_wrong_is_named(run: Run, name: str) -> None:
    wrong, sentence = REWARDS[name]

    def my_reward(completions: list[str]) -> Any:
        return wrong(completions)

    with pytest.raises(PairtuneError, match=f"reward function `my_reward` {sentence}"):
        run(reward=my_reward, held_out=None, dataset_test_split=None)


def test_a_reward_that_goes_wrong_later_costs_no_step_that_was_saved(run: Run) -> None:
    fails = True

    def my_reward(completions: list[str], trainer_state: Any) -> list[float]:
        return [float("nan") if fails and trainer_state.global_step == 2 else 0.5 for _ in completions]

    with pytest.raises(PairtuneError, match="reward function `my_reward` returned nan"):
        run(max_steps=3, save_steps=1, reward=my_reward)
    fails = False
    result = run(max_steps=3, save_steps=1, reward=my_reward, resume=True)
    assert [line["step"] for line in lines(result)] == [1, 2, 3]


def test_an_earlier_run_is_not_touched_by_what_is_refused(run: Run, tiny_model_folder: str) -> None:
    folder = run().output_dir

    def content() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = content()
    with pytest.raises(PairtuneError, match="holds a run; --resume goes on with it, --overwrite replaces it"):
        run()
    for words, sentence in [
        ({"batch_size": 20}, "more than the 12 prompts"),
        ({"reward": "no.such.module"}, "no module 'no' is installed"),
        ({"reward": lambda answers: []}, "needs `answers`"),
        ({"held_out": [{"prompt": ""}]}, "the prompt is empty"),
        ({"model": "no/such-model"}, "could not be loaded"),
        ({"trainable_layers": 7}, "out of range"),
        ({"report_to": ["trackio", "wandb", "tensorboard"]}, "needs the package"),
    ]:
        with pytest.raises(PairtuneError, match=sentence):
            run(overwrite=True, **words)
        assert content() == before
    with pytest.raises(PairtuneError, match=r"learning_rate was 0.001 .* --resume needs it as it was"):
        run(resume=True, learning_rate=1.0)
    assert content() == before
    assert run(overwrite=True, max_steps=1).steps == 1
    assert not (folder / "checkpoints" / "step-2").exists()


def test_conversations_need_a_chat_template(run: Run, tiny_model_folder: str, tmp_path: Path) -> None:
    Path(tiny_model_folder, "chat_template.jinja").unlink()
    prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
    with pytest.raises(PairtuneError, match="has no chat template"):
        run(prompts=prompts, chat="auto")
    assert not (tmp_path / "run").exists()


def test_a_gradient_that_is_not_finite_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = rl.ALGORITHMS["p3o"]

    def broken(logprobs: Tensor, experience: Any, config: Any, values: Any) -> Any:
        output = algorithm.loss(logprobs, experience, config, values)
        return type(output)(losses=output.losses * torch.inf, mask=output.mask, metrics=output.metrics)

    monkeypatch.setitem(rl.ALGORITHMS, "p3o", type(algorithm)(counted=algorithm.counted, loss=broken))
    with pytest.raises(PairtuneError, match=r"the gradient of step 1 is not finite \(.*lower learning_rate"):
        run()


def test_the_loss_is_a_mean_over_what_counts(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam and the clip of the norm would hide a wrong denominator; the logged loss does not."""
    algorithm = rl.ALGORITHMS["p3o"]

    def ones(logprobs: Tensor, experience: Any, config: Any, values: Any) -> Any:
        output = algorithm.loss(logprobs, experience, config, values)
        return type(output)(losses=1 + 0 * output.losses, mask=output.mask, metrics={})

    def reward(prompts: list[str], **_: Any) -> list[float | None]:
        return [None if prompt.startswith("So") else 1.0 for prompt in prompts]

    monkeypatch.setitem(rl.ALGORITHMS, "p3o", type(algorithm)(counted=algorithm.counted, loss=ones))
    result = run(reward=reward, batch_size=12, minibatch_size=6, micro_batch_size=4, max_steps=1)
    assert lines(result)[0]["loss"] == pytest.approx(1, abs=1e-6)


def test_one_update_a_batch_is_noted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(num_iterations=1, max_steps=1)
    assert "note: num_iterations is 1 with one minibatch a batch, so every ratio is 1" in capsys.readouterr().out
    run(num_iterations=1, minibatch_size=2, max_steps=1, overwrite=True)
    assert "num_iterations is 1" not in capsys.readouterr().out


def test_long_prompts_are_left_out_and_counted(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run(max_steps=1, max_prompt_length=7)
    assert "4 prompts left out: longer than max_prompt_length" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- rewards


def test_a_reward_function_gets_what_trl_would_give_it(run: Run) -> None:
    seen: list[SimpleNamespace] = []

    def reward(
        prompts: Any,
        completions: Any,
        completion_ids: Any,
        topic: Any,
        trainer_state: Any,
        log_extra: Any,
        log_metric: Any,
    ) -> list[float]:
        seen.append(SimpleNamespace(**locals()))
        log_extra("shouted", [text.upper() for text in completions])
        log_metric("mean_words", 2.5)
        return [0.5] * len(completions)

    rows = [{**row, "topic": f"t{index}"} for index, row in enumerate(PROMPTS)]
    result = run(reward=reward, prompts=rows, held_out=[{**row, "topic": "held"} for row in HELD_OUT])
    at_start, *steps, at_end = seen
    assert (at_start.trainer_state.global_step, at_end.trainer_state.global_step) == (0, 2)
    assert at_start.topic == ["held"] * 3
    topics = {row["prompt"]: row["topic"] for row in rows}
    for number, call in enumerate(steps):
        assert (call.trainer_state.global_step, call.trainer_state.max_steps) == (number, 2)
        assert len(call.completions) == len(call.completion_ids) == 8
        assert call.prompts[0::2] == call.prompts[1::2]
        assert call.topic == [topics[prompt] for prompt in call.prompts]
    assert all(line["mean_words"] == 2.5 for line in lines(result))
    samples = [s for s in lines(result, "samples") if s["split"] == "train"]
    assert all(s["shouted"] == s["completion"].upper() for s in samples)
    # Equal rewards: no pair has anything to learn from, and without a KL pull yet nothing moves in the first pass.
    assert lines(result)[0]["frac_reward_zero_std"] == 1


def test_asynchronous_and_weighted_rewards(run: Run) -> None:
    async def letters(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return share_of_letters(completions)

    def short(completions: list[str]) -> list[float]:
        return [float(-len(text)) for text in completions]

    result = run(reward=[letters, short], reward_weights=[2.0, 0.5])
    for line in lines(result):
        weighted = 2 * line["rewards/letters/mean"] + 0.5 * line["rewards/short/mean"]
        assert line["reward"] == pytest.approx(weighted, rel=1e-5)


def test_where_no_pair_counts_nothing_is_learned(run: Run, tiny_model_folder: str) -> None:
    start = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()

    def every_other(completions: list[str]) -> list[float | None]:
        return [None if index % 2 else 1.0 for index in range(len(completions))]

    result = run(reward=every_other, beta=1.0)
    assert all(torch.equal(tensor, start[key]) for key, tensor in result.model.state_dict().items())
    assert lines(result)[0]["loss"] == lines(result)[0]["grad_norm"] == 0
    assert lines(result)[0]["reward"] == 1
    samples = [s["reward"] for s in lines(result, "samples") if s["split"] == "train"]
    assert samples[:4] == [1, None, 1, None]

    some = run(reward=some_without_reward, overwrite=True, learning_rate=1e-2)
    assert not all(torch.equal(tensor, start[key]) for key, tensor in some.model.state_dict().items())


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_conversations(run: Run, system: str | None) -> None:
    """As the dataset has them, or made of plain prompts."""
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        seen.append((prompts, completions))
        return [0.0] * len(completions)

    def conversation(row: dict[str, str]) -> dict[str, Any]:
        return {"prompt": [{"role": "user", "content": row["prompt"]}]}

    if system is None:
        run(reward=reward, prompts=[conversation(r) for r in PROMPTS], held_out=[conversation(r) for r in HELD_OUT])
        prompts, completions = seen[1]
        assert prompts[0][0]["role"] == "user"
        assert [turn["role"] for turn in completions[0]] == ["assistant"]
    else:
        run(reward=reward, chat="always", system_prompt=system)
        prompts, completions = seen[1]
        assert isinstance(prompts[0], str)
        assert isinstance(completions[0], str)


def test_four_completions_a_prompt(run: Run) -> None:
    result = run(num_generations=4, num_completions_to_log=8)
    samples = [s for s in lines(result, "samples") if s["step"] == 1 and s["split"] == "train"]
    assert [s["completion_index"] for s in samples] == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len({s["completion"] for s in samples[:4]}) > 1
    assert lines(result)[1]["kl"] != 0


def test_the_penalty_of_a_missing_eos(run: Run) -> None:
    def zero(completions: list[str]) -> list[float]:
        return [0.0] * len(completions)

    result = run(reward=zero, missing_eos_penalty=0.75, max_completion_length=20)
    truncated = [line["completions/clipped_ratio"] for line in lines(result)]
    assert any(0 < share < 1 for share in truncated)
    for line in lines(result):
        assert line["reward"] == pytest.approx(-0.75 * line["completions/clipped_ratio"])
    assert lines(result, "evaluations")[0]["reward"]["mean"] == 0  # a penalty is a means, not what is measured


def test_the_options_of_p3o_reach_the_loss(run: Run) -> None:
    words = {"num_iterations": 3, "batch_size": 6, "epsilon": 0.05, "beta": 0.5, "overwrite": True}
    words |= {"held_out": None, "dataset_test_split": None}
    options = [{}, {"p3o.clip": "separate"}, {"p3o.clip": "none"}, {"p3o.kl_at": "sampling"}, {"p3o.max_ratio": 1.01}]
    found = [lines(run(**words, **option)) for option in options]
    assert len({line[0]["grad_norm"] for line in found}) == len(options)
    assert len({line[1]["kl"] for line in found}) == len(options)


def test_a_model_in_memory(run: Run, tiny_llama: Any, tiny_tokenizer: Any) -> None:
    result = run(model=tiny_llama, tokenizer=tiny_tokenizer)
    assert result.model is tiny_llama
    assert lines(result)[0]["kl"] == 0


# --------------------------------------------------------------------------------------------------- a GPU without room


def full() -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 9 GiB")


def fails_once(monkeypatch: pytest.MonkeyPatch, place: Any, name: str, at: int) -> None:
    """The GPU is full at one call of a function, counted from 0."""
    real, calls = getattr(place, name), itertools.count()
    monkeypatch.setattr(place, name, lambda *args, **words: full() if next(calls) == at else real(*args, **words))


@pytest.mark.parametrize(
    ("place", "name", "at", "phase", "mend"),
    [
        (HFSampler, "generate", 1 + 2, "sampling", "lower batch_size, num_generations or max_completion_length"),
        # after a reward of the step: what a running scale has learned from it must not be saved
        (loading.LoadedPolicy, "score", 2 * 2, "updating, pass 1 of 2", "lower micro_batch_size, set gradient_ch"),
    ],
)
def test_a_full_gpu_is_a_sentence_and_what_was_done_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, at: int, phase: str, mend: str
) -> None:
    words = {"max_steps": 3, "scale_rewards": "running"}
    whole = run(**words, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fails_once(patch, place, name, at)
        sentence = (
            rf"^the GPU ran out of memory while {phase} \(for 2.50 GiB more\); {mend}.*; step-2 is kept, and --res"
        )
        with pytest.raises(PairtuneError, match=sentence):
            run(**words)
    assert len(lines(tmp_path / "run")) == 2
    again = run(**words, resume=True)
    for key, tensor in masters(whole).items():
        assert torch.equal(masters(again)[key], tensor)
    for log in ("metrics", "evaluations", "samples"):
        assert lines(again, log) == lines(whole, log)


def test_an_update_that_fails_halfway_is_not_saved(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the third step the first of two updates was made: the weights are no step's."""
    fails_once(monkeypatch, loading.LoadedPolicy, "score", 2 * 2 + 1)
    with pytest.raises(PairtuneError, match=r"while updating, pass 2 of 2 .*; no checkpoint is there yet"):
        run(max_steps=3)
    assert len(lines(tmp_path / "run")) == 2


def test_a_gpu_that_is_full_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fails_once(monkeypatch, HFSampler, "generate", 1)
    with pytest.raises(PairtuneError, match=r"while sampling .*; no checkpoint is there yet, so start the run again"):
        run()


def test_a_reward_that_fills_the_gpu_is_no_fault_of_the_function(run: Run) -> None:
    def of_a_model(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        return full() if trainer_state.global_step else [float(len(text)) for text in completions]

    with pytest.raises(
        PairtuneError, match=r"out of memory while scoring .*; lower reward_batch_size.* step-1 is kept"
    ):
        run(reward=of_a_model)


@pytest.mark.parametrize("at", [2, 4])
def test_an_evaluation_without_room_is_made_when_the_run_goes_on(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """In the middle, and after the last step: what was learned until then is kept."""
    words = {"max_steps": 4, "eval_steps": 2}
    whole = run(**words, output_dir=str(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        fails_once(patch, rl, "evaluate_policy", at // 2)
        with pytest.raises(PairtuneError, match=f"while evaluating on held-out prompts .*; step-{at} is kept"):
            run(**words)
    again = run(**words, resume=True)
    for log in ("metrics", "evaluations", "samples"):
        assert lines(again, log) == lines(whole, log)
    for key, tensor in masters(whole).items():
        assert torch.equal(masters(again)[key], tensor)
