"""A preference function or a judge as the feedback of training: which of two completions of one prompt is better.

It is asked for every pair of every group and answers with probabilities. Methods that learn from labels (online_dpo,
online_ipo) take these as they are; for the others a named rule turns them into rewards.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from concurrent.futures import Future
from typing import Any, Literal

import torch

from pairtune.data import PromptDataset, first_line, shortened
from pairtune.errors import PairtuneError
from pairtune.feedback.rewards import Scores, call_function, line_of, load_reward_function
from pairtune.maths.masking import pair_indices
from pairtune.maths.preference import preference_rewards
from pairtune.types import Completions, Prompts

PreferenceFunction = Callable[..., Any]
"""f(prompts, first, second, **columns) -> list[float | None]: the probability that the first is better, None where the
pair does not count. Synchronous or not. What its attribute `metrics` holds after a call is logged with the step."""

ARGUMENTS = ("prompts", "first", "second", "trainer_state")


class PreferenceSet:
    """One preference function, asked for every pair; `Scores` with `preferences` is what the loop reads."""

    def __init__(self, function: PreferenceFunction, *, rule: Literal["logits", "margins"] = "logits") -> None:
        self.function, self.rule = function, rule
        self.name = getattr(function, "__name__", type(function).__name__)

    def check(self, prompts: PromptDataset) -> None:
        """Raises PairtuneError if the function needs a name that is neither a column nor given by pairtune."""
        check_preference_function(self.function, self.name, prompts.columns)

    def score(
        self,
        prompts: Prompts,
        completions: Completions,
        texts: list[list[str]],
        *,
        trainer_state: Any = None,
        update_scale: bool = True,
    ) -> Scores:
        """Preferences (P, K, K) of all pairs of each group, asked in one call, and the rewards that follow from them.

        Raises PairtuneError naming the function, and where it can the pair, for an exception, a wrong number of answers
        and an answer that is no probability.
        """
        num_generations = completions.truncated.shape[1]
        i, j = pair_indices(num_generations)
        pairs = [(p, a, b) for p in range(len(texts)) for a, b in zip(i.tolist(), j.tolist(), strict=True)]
        arguments = {
            "prompts": [prompts.prompts[p] for p, _, _ in pairs],
            "first": [texts[p][a] for p, a, _ in pairs],
            "second": [texts[p][b] for p, _, b in pairs],
            "trainer_state": trainer_state,
            **{column: [values[p] for p, _, _ in pairs] for column, values in prompts.columns.items()},
        }
        answers = preference_answers(self.function, self.name, arguments)
        probability = torch.tensor(answers).view(len(texts), -1)
        preferences = torch.full((len(texts), num_generations, num_generations), 0.5)
        preferences[:, i, j], preferences[:, j, i] = probability, 1 - probability
        counted = ~preferences.isnan() & ~torch.eye(num_generations, dtype=torch.bool)
        reward_mask = counted.any(-1)
        rewards = torch.where(reward_mask, preference_rewards(preferences, self.rule), 0)
        decided = (probability - 0.5).abs()
        metrics = {
            "confidence": decided[~decided.isnan()].add(0.5).mean().item(),
            **getattr(self.function, "metrics", {}),
        }
        return Scores(
            rewards=rewards,
            raw_rewards=rewards,
            reward_mask=reward_mask,
            by_function={},
            metrics={f"preferences/{self.name}/{name}": value for name, value in metrics.items()},
            extras={},
            preferences=preferences,
        )

    def state_dict(self) -> dict[str, Any]:
        """Nothing is carried from step to step."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to put back."""


def check_preference_function(function: PreferenceFunction, name: str, columns: Collection[str]) -> None:
    """Raises PairtuneError if the function needs a name that is neither a column nor given by pairtune."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.default is parameter.empty and parameter.name not in (*ARGUMENTS, *columns):
            raise PairtuneError(
                f"preference function `{name}` needs `{parameter.name}`, which is neither a column of the "
                f"dataset nor one of {', '.join(ARGUMENTS)}: give it a default, or the dataset that column."
            )


def preference_answers(function: PreferenceFunction, name: str, arguments: dict[str, Any]) -> list[float]:
    """The function's probabilities, one a pair, NaN for None.

    Raises PairtuneError naming the function, and where it can the pair, for an exception, a wrong number of answers
    and an answer that is no probability.
    """
    first = arguments["first"]
    try:
        answer = call_function(function, arguments)
        answer = answer.result() if isinstance(answer, Future) else answer
    except (PairtuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PairtuneError(
            f"preference function `{name}` raised {type(error).__name__} ({first_line(error)}){line_of(error)} "
            f"on {len(first)} pairs, the first completion being {shortened(first[0])}."
        ) from error
    values = answer.tolist() if hasattr(answer, "tolist") else answer
    if not isinstance(values, list | tuple) or len(values) != len(first):
        found = len(values) if isinstance(values, list | tuple) else shortened(values)
        raise PairtuneError(
            f"preference function `{name}` returned {found} for {len(first)} pairs: return a list with one "
            "probability or None for each."
        )
    for index, value in enumerate(values):
        if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
            raise PairtuneError(
                f"preference function `{name}` returned {shortened(value)} for pair {index} "
                f"({shortened(first[index])} first): return a probability from 0 to 1, or None."
            )
    return [math.nan if value is None else float(value) for value in values]


def load_preference_function(name: str) -> PreferenceFunction:
    """The function that `package.module.function` or `path/to/file.py:function` stands for.

    Raises PairtuneError if there is none.
    """
    found = load_reward_function(name)
    if isinstance(found, str):
        raise PairtuneError(
            f"preference_func {name!r} is no function: name one as `package.module.function` or "
            "`path/to/file.py:function`; a reward model belongs into reward_funcs."
        )
    return found
