"""A preference function as the feedback of training: what it is asked, what follows, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from test_train import HELD_OUT, PROMPTS, Run, lines, run, share_of_letters  # noqa: F401  # `run` is a fixture

from pairtune import PairtuneError, TrainConfig, train
from pairtune.algorithms import ALGORITHMS
from pairtune.config import METHODS
from pairtune.feedback.preferences import PreferenceSet, load_preference_function
from pairtune.types import Completions, Prompts

PREFER = [name for name, method in METHODS.items() if not method.offline]


def more_letters(first: list[str], second: list[str]) -> list[float]:
    """The odds of two answers are those of their shares of letters."""
    scores = zip(share_of_letters(first), share_of_letters(second), strict=True)
    return [1 / (1 + math.exp(8 * (b - a))) for a, b in scores]


def batch(num_generations: int = 3) -> tuple[Prompts, Completions, list[list[str]]]:
    texts = [[f"{p}{k}" for k in range(num_generations)] for p in "xy"]
    shape = (2, num_generations, 1)
    prompts = Prompts(
        ids=torch.zeros(2, 1, dtype=torch.int64),
        mask=torch.ones(2, 1, dtype=torch.bool),
        rows=torch.arange(2),
        prompts=["X", "Y"],
        columns={"topic": ["p", "q"]},
    )
    completions = Completions(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        completion_ids=torch.zeros(shape, dtype=torch.int64),
        completion_mask=torch.ones(shape, dtype=torch.bool),
        sampler_logprobs=torch.zeros(shape),
        truncated=torch.zeros(shape[:2], dtype=torch.bool),
        policy_version=0,
    )
    return prompts, completions, texts


def test_every_pair_is_asked_once_in_one_call() -> None:
    calls: list[dict[str, Any]] = []

    def judge(prompts: list[str], first: list[str], second: list[str], topic: list[str]) -> list[float]:
        calls.append({"prompts": prompts, "first": first, "second": second, "topic": topic})
        return [0.9, 0.2, 0.5, 1.0, 0.0, 0.75]

    scores = PreferenceSet(judge, rule="margins").score(*batch())
    assert calls == [
        {
            "prompts": ["X"] * 3 + ["Y"] * 3,
            "first": ["x0", "x0", "x1", "y0", "y0", "y1"],
            "second": ["x1", "x2", "x2", "y1", "y2", "y2"],
            "topic": ["p"] * 3 + ["q"] * 3,
        }
    ]
    assert scores.preferences is not None
    torch.testing.assert_close(scores.preferences[0], torch.tensor([[0.5, 0.9, 0.2], [0.1, 0.5, 0.5], [0.8, 0.5, 0.5]]))
    torch.testing.assert_close(scores.rewards[0], torch.tensor([0.2, -0.8, 0.6]) / 3)
    assert scores.reward_mask.all()
    assert scores.metrics["preferences/judge/confidence"] == pytest.approx((0.9 + 0.8 + 0.5 + 1 + 1 + 0.75) / 6)


def test_a_pair_without_an_answer_does_not_count() -> None:
    async def judge(first: list[str], **_: Any) -> list[float | None]:
        return [None, None, 0.25, 0.5, None, 0.75]

    scores = PreferenceSet(judge).score(*batch())
    assert scores.preferences is not None
    assert scores.preferences[0].isnan().sum() == 4
    assert scores.reward_mask.tolist() == [[False, True, True], [True, True, True]]
    assert scores.rewards[0, 0] == 0


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (lambda n: [0.5] * (n - 1), "`judge` returned 5 for 6 pairs: return a list with one probability or None"),
        (lambda n: "yes", "`judge` returned 'yes' for 6 pairs"),
        (lambda n: [0.5, 1.5] + [0.5] * (n - 2), r"`judge` returned 1.5 for pair 1 \('x0' first\)"),
        (lambda n: [math.nan] * n, "`judge` returned nan for pair 0"),
        (lambda n: 1 / 0, r"`judge` raised ZeroDivisionError \(division by zero\) at test_pref\w+.py:\d+ on 6 pairs"),
    ],
)
def test_an_answer_that_is_none_is_named(answer: Any, sentence: str) -> None:
    def judge(first: list[str], **_: Any) -> Any:
        return answer(len(first))

    with pytest.raises(PairtuneError, match=sentence):
        PreferenceSet(judge).score(*batch())


def test_names_that_are_no_preference_function() -> None:
    with pytest.raises(PairtuneError, match="preference_func 'some/model' is no function"):
        load_preference_function("some/model")
    assert load_preference_function("test_preferences.more_letters").__name__ == "more_letters"


@pytest.mark.parametrize("name", ["p3o", "online_dpo", "ppo"])
def test_training_from_preferences(run: Run, tmp_path: Any, tiny_model_folder: str, name: str) -> None:  # noqa: F811
    config = TrainConfig(
        model=tiny_model_folder,
        dataset="passed in",
        chat="never",
        dtype="float32",
        device="cpu",
        algorithm=name,
        preference_func="test_preferences.more_letters",
        num_iterations=2,
        num_generations=4,
        batch_size=8,
        max_completion_length=6,
        max_steps=12,
        beta=0.02,
        epsilon=0.5,
        learning_rate=5e-3,
        eval_steps=0,
        output_dir=str(tmp_path / "run"),
    )
    result = train(config, reward_funcs=[share_of_letters], train_dataset=PROMPTS, eval_dataset=HELD_OUT)
    before, after = lines(result, "evaluations")
    assert after["reward"]["mean"] > before["reward"]["mean"] + 0.1
    assert 0.5 <= lines(result)[0]["preferences/more_letters/confidence"] <= 1


def test_without_reward_functions_nothing_is_evaluated(run: Run) -> None:  # noqa: F811
    result = run(reward=[], preference_func="test_preferences.more_letters", max_steps=1)
    assert lines(result, "evaluations") == []


def test_a_judge_says_the_labels_of_online_methods() -> None:
    """Its probability, not the one that would follow from the rewards; a None is a pair that does not count."""
    from test_properties import collected, config_of, prepared, with_fields

    _, _, experience = collected()
    judged = torch.tensor([0.9, 0.1, 0.5, math.nan, 1.0])
    preferences = torch.full((5, 2, 2), 0.5)
    preferences[:, 0, 1], preferences[:, 1, 0] = judged, 1 - judged
    experience = with_fields(experience, preferences=preferences)
    expected = prepared(experience, config_of("online_dpo")).targets
    assert expected.labels is not None
    torch.testing.assert_close(expected.labels[:, 0], torch.tensor([0.9, 0.1, 0.5, 0.5, 1.0]))
    assert expected.label_mask[:, 0].tolist() == [True, True, True, False, True]
    hard = prepared(experience, config_of("online_dpo hard")).targets
    assert hard.labels[:, 0].tolist() == [1, 0, 0, 0, 1]
    assert hard.label_mask[:, 0].tolist() == [True, True, False, False, True]
    assert ALGORITHMS["online_dpo"].counted(with_fields(experience, targets=hard)).sum() == 3
