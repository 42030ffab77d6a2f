"""Every method of the table through `train`: one word changes the method, and the loop keeps its promises for it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import Run, inexact, lines, masters, run  # noqa: F401  # `run` is a fixture
from torch import Tensor
from transformers import AutoModelForCausalLM

from pairtune.config import METHODS, TrainConfig
from pairtune.models.logprobs import Scorer
from pairtune.stages import rl

ONLINE = [name for name, method in METHODS.items() if not method.offline]
WITH_VALUES = [name for name, method in METHODS.items() if method.has_values]
REPLAYING = [name for name, method in METHODS.items() if method.replays]
OPTIONS: dict[str, dict[str, Any]] = {
    "reinforce": {"reinforce.baseline": "moving_average"},
    "rloo": {"rloo.clip": True},
    "raft": {"raft.rank_by": "shaped"},
    "online_dpo": {"online_dpo.labels": "sampled"},
    "ppo": {"ppo.target_kl": 0.01, "ppo.kl_horizon": 100},
}
"""Settings that leave something to carry from step to step, or to draw."""

WORDS = ["ab ba", "so it is", "x y z", "no", "then we went on", "why not", "and so", "yes yes"]
PAIRS = [
    {"prompt": f"{word} {number}", "chosen": f" {word} aaa", "rejected": f" {number}{number} ZZ"}
    for number in range(2)
    for word in WORDS
]
SCORED = [
    {"prompt": row["prompt"], "completion": row[answer], "reward": reward}
    for row in PAIRS
    for answer, reward in (("chosen", 1.0), ("rejected", -0.5))
]


def offline_words(name: str) -> dict[str, Any]:
    """What selects a method that reads a dataset."""
    return {
        "algorithm": name,
        "prompts": SCORED if name == "copg" else PAIRS,
        "num_iterations": 1,
        **({"copg.offline": True} if name == "copg" else {}),
    }


def quantities(result: Any, name: str) -> list[float]:
    return [line[name] for line in lines(result)]


@pytest.mark.parametrize("name", ONLINE)
def test_one_word_changes_the_method(run: Run, name: str) -> None:  # noqa: F811
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = run(
            algorithm=name,
            max_steps=12,
            batch_size=8,
            num_generations=4,
            num_iterations=2,
            beta=0.02,
            epsilon=0.5,
            learning_rate=1e-2 if name == "rebel" else 5e-3,
            eval_steps=5,
        )
    assert inexact(record) == []
    rewards = quantities(result, "reward")
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.1
    for line in lines(result):
        assert all(torch.tensor(value).isfinite() for value in line.values() if isinstance(value, float)), line
        assert line["grad_norm"] > 0
        assert ("value_loss" in line) == (name in WITH_VALUES)
        assert ("clip_ratio" in line) == METHODS[name].uses_ratios
    first, *_, last = lines(result, "evaluations")
    assert first["kl"]["mean"] == 0
    assert last["kl"]["mean"] > 0.01
    # What is saved is an ordinary language model, whatever helped to train it.
    model = AutoModelForCausalLM.from_pretrained(sorted((result.output_dir / "checkpoints").iterdir())[-1])
    assert not [key for key in model.state_dict() if "value" in key]


@pytest.mark.parametrize("way", [{}, {"trainable_layers": 1}, {"lora_r": 4}, {"minibatch_size": 2}])
@pytest.mark.parametrize("name", WITH_VALUES)
def test_the_value_function_learns(run: Run, name: str, way: dict[str, Any]) -> None:  # noqa: F811
    result = run(
        algorithm=name,
        max_steps=8,
        batch_size=6,
        num_generations=2,
        num_iterations=3,
        beta=0.0,
        learning_rate=1e-2,
        reward=lambda completions, **_: [1.0] * len(completions),
        **{f"{name}.vf_coef": 1.0},
        **way,
    )
    losses = quantities(result, "value_loss/pass_1")
    assert losses[0] > (0.35 if "minibatch_size" not in way else 0.2)  # half a squared reward of 1, before any update
    assert losses[-1] < 0.4 * losses[0]
    assert any(key.startswith("master.value_head") for key in masters(result))


def reward_model_folder(folder: Path, tokenizer: Any) -> str:
    """A random reward model with the policy's vocabulary."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_value_network_starts_from_a_reward_model(run: Run, tmp_path: Path, tiny_tokenizer: Any) -> None:  # noqa: F811
    folder = reward_model_folder(tmp_path / "rm", tiny_tokenizer)
    words: dict[str, Any] = {"algorithm": "ppo", "ppo.value_model": folder, "max_steps": 3, "save_steps": 2}
    whole = run(output_dir=str(tmp_path / "whole"), **words)
    names = [key for key in masters(whole) if key.startswith("master.value_network.")]
    assert "master.value_network.score.weight" in names
    run(output_dir=str(tmp_path / "parts"), **{**words, "max_steps": 2})
    parts = run(output_dir=str(tmp_path / "parts"), resume=True, **words)
    assert all(torch.equal(value, masters(whole)[key]) for key, value in masters(parts).items())


@pytest.mark.parametrize("name", ONLINE)
def test_a_resumed_run_of_any_method_equals_the_uninterrupted_one(run: Run, tmp_path: Path, name: str) -> None:  # noqa: F811
    """What a method carries from step to step comes back: averages, beta, labels, earlier batches."""
    words: dict[str, Any] = {"algorithm": name, "save_steps": 2, **OPTIONS.get(name, {})}
    words["replay"] = 2 if name in REPLAYING else 0
    whole = run(output_dir=str(tmp_path / "whole"), max_steps=4, **words)
    run(output_dir=str(tmp_path / "parts"), max_steps=2, **words)
    parts = run(output_dir=str(tmp_path / "parts"), max_steps=4, resume=True, **words)
    assert lines(parts) == lines(whole)
    expected = masters(whole)
    assert masters(parts).keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in masters(parts).items())


def test_the_adaptive_controller_moves_beta(run: Run) -> None:  # noqa: F811
    words: dict[str, Any] = {"algorithm": "ppo", "max_steps": 4, "learning_rate": 1e-2, "beta": 0.1}
    adaptive = run(**words, **{"ppo.target_kl": 0.01, "ppo.kl_horizon": 50})
    betas = quantities(adaptive, "beta")
    assert betas[0] == 0.1
    # 8 completions a step; the first step's KL is 0, far below the target, the later ones' far above it.
    assert betas[1] == pytest.approx(0.1 * (1 - 0.2 * 8 / 50))
    assert betas[2] == pytest.approx(betas[1] * (1 + 0.2 * 8 / 50))
    assert "beta" not in lines(run(**words, overwrite=True))[0]


def test_the_model_passes_of_more_completions_grow_like_their_number(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All pairs of a group are formed from K log-probabilities: 28 pairs of 8 completions cost 4 times the 1 of 2."""
    tokens: list[int] = []
    hidden = Scorer.hidden

    def counting(scorer: Scorer, layout: Any, *rest: Any) -> Tensor:
        tokens.append(int(layout.mask.sum()))
        return hidden(scorer, layout, *rest)

    monkeypatch.setattr(Scorer, "hidden", counting)
    seen = {}
    for num_generations in (2, 8):
        tokens.clear()
        words = {"max_steps": 1, "num_iterations": 3, "held_out": None, "dataset_test_split": None, "overwrite": True}
        run(num_generations=num_generations, **words)
        seen[num_generations] = list(tokens)
    assert len(seen[2]) == len(seen[8]) == 1 + 3  # the reference once, the policy once a pass
    assert sum(seen[8]) < 4.5 * sum(seen[2])


# ------------------------------------------------------------------------------------------------------------- replay


@pytest.mark.parametrize("name", REPLAYING)
def test_earlier_batches_are_learned_from_again(
    run: Run,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Against the log-probabilities of their own sampling policy, newest first, as many as there are."""
    seen: list[tuple[int, Tensor]] = []
    update = rl._update

    def noting(config: TrainConfig, algorithm: Any, policy: Any, optimizer: Any, collected: Any, *rest: Any) -> Any:
        experience, metrics = update(config, algorithm, policy, optimizer, collected, *rest)
        seen.append((experience.step, experience.old_logprobs.clone()))
        return experience, metrics

    monkeypatch.setattr(rl, "_update", noting)
    result = run(algorithm=name, max_steps=4, replay=2)
    assert [step for step, _ in seen] == [0, 1, 0, 2, 1, 0, 3, 2, 1]
    for step in range(4):
        olds = [old for other, old in seen if other == step]
        assert all(torch.equal(old, olds[0]) for old in olds)
    metrics = lines(result)
    assert "replay/loss" not in metrics[0]
    assert all("replay/logratio_abs" in line for line in metrics[1:])
    assert metrics[2]["replay/logratio_abs"] > metrics[2]["logratio_abs"]  # an older policy is farther away


def test_a_replayed_batch_is_clipped_against_its_own_policy(run: Run) -> None:  # noqa: F811
    result = run(max_steps=4, replay=1, epsilon=0.05, learning_rate=1e-2)
    assert quantities(result, "replay/clip_ratio")[1] > 0 if "replay/clip_ratio" in lines(result)[0] else True
    assert all(line["replay/clip_ratio"] > 0 for line in lines(result)[1:])


# ------------------------------------------------------------------------------------------------------------ offline


@pytest.mark.parametrize("name", ["dpo", "ipo", "copg"])
def test_an_offline_method_learns_from_its_dataset(run: Run, name: str) -> None:  # noqa: F811
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        result = run(**offline_words(name), max_steps=16, batch_size=8, beta=0.1, learning_rate=3e-3, eval_steps=8)
    assert inexact(record) == []
    metrics = lines(result)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    for absent in ("kl", "sampling/logprob_difference/mean", "time/sample"):
        assert absent not in metrics[0]
    if name != "copg":
        assert metrics[0]["rewards/accuracies"] == 0  # policy and reference are equal: no pair is in order
        assert metrics[-1]["rewards/accuracies"] > 0.9
        assert metrics[-1]["rewards/margins"] > 0
    first, *_, last = lines(result, "evaluations")
    assert first["kl"]["mean"] == 0
    assert last["kl"]["mean"] > 0


@pytest.mark.parametrize("name", ["dpo", "copg"])
def test_a_resumed_offline_run_equals_the_uninterrupted_one(run: Run, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Also where the resumed part is in the second epoch and has lost the reference's log-probabilities."""
    words = {**offline_words(name), "batch_size": 8, "save_steps": 3, "reward": []}
    whole = run(output_dir=str(tmp_path / "whole"), max_steps=5, **words)
    run(output_dir=str(tmp_path / "parts"), max_steps=3, **words)
    parts = run(output_dir=str(tmp_path / "parts"), max_steps=5, resume=True, **words)
    assert lines(parts) == lines(whole)
    assert all(torch.equal(value, masters(whole)[key]) for key, value in masters(parts).items())
    assert lines(parts, "evaluations") == []  # without a reward function nothing judges the held-out completions


def test_the_reference_meets_every_pair_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from pairtune import experience

    rows = 0
    reference_logprobs = experience.reference_logprobs

    def counting(policy: Any, layout: Any, *rest: Any, **words: Any) -> Tensor:
        nonlocal rows
        rows += len(layout.mask)
        return reference_logprobs(policy, layout, *rest, **words)

    monkeypatch.setattr(experience, "reference_logprobs", counting)
    run(**offline_words("dpo"), max_steps=8, batch_size=4, reward=[])  # two epochs of 16 pairs
    assert rows == len(PAIRS)


def test_the_dataset_of_an_offline_method_is_shown_in_samples(run: Run) -> None:  # noqa: F811
    result = run(**offline_words("dpo"), max_steps=1, num_completions_to_log=2, reward=[], max_completion_length=40)
    [chosen, rejected] = lines(result, "samples")
    row = next(row for row in PAIRS if row["prompt"] == chosen["prompt"])
    assert (chosen["completion"], rejected["completion"]) == (row["chosen"], row["rejected"])
    assert (chosen["reward"], rejected["reward"]) == (1.0, 0.0)
