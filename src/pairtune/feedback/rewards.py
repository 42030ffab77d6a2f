"""Feedback as rewards: Python functions with TRL's signature, reward models, and their weighted sum.

A reward function is called once a batch, as

    f(prompts=..., completions=..., completion_ids=..., trainer_state=..., log_extra=..., log_metric=..., **columns)

and answers with one number for each completion, or None where the completion does not count. The lists are flat: P * K
entries, the K completions of the first prompt first, prompts and dataset columns repeated K times. `completions` are
strings, or `[{"role": "assistant", "content": text}]` where the prompt is a conversation; `completion_ids` are the
sampled ids, EOS included and padding not. A function may leave out any of these names that it has no use for.
`log_extra(column, values)` adds a column, one value a completion, to samples.jsonl; `log_metric(name, value)` adds a
number to the step's metrics. A function may be asynchronous.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
import sysconfig
import threading
import traceback
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pairtune.data import PromptDataset, first_line, listed, shortened
from pairtune.errors import PairtuneError
from pairtune.feedback.reward_model import RewardModel
from pairtune.maths.masking import masked_mean, masked_sum
from pairtune.models.weights import resolve_model
from pairtune.runs import distributed
from pairtune.runs.display import counted
from pairtune.types import Completions, Prompts, real_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pairtune.config import EvaluateConfig, TrainConfig

RewardFunction = Callable[..., Any]

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""The names that pairtune gives to a reward function; dataset columns may not have them."""


@dataclass(frozen=True)
class Scores:
    """What the feedback says of a batch."""

    rewards: Tensor
    """(P, K) float32, on the CPU: `raw_rewards` less the missing-EOS penalty, divided by the running scale if there is
    one; 0 where `reward_mask` is False."""
    raw_rewards: Tensor
    """(P, K) float32, the weighted sum over the reward functions that answered; 0 where `reward_mask` is False."""
    reward_mask: Tensor
    """(P, K) bool, True where at least one reward function answered."""
    by_function: dict[str, Tensor]
    """Name of a reward function -> (P, K) float32, its own answers without weight; NaN where it answered None."""
    metrics: dict[str, float]
    """`rewards/<name>/mean` and `/std` over the answers of this process, and what functions gave to `log_metric`."""
    extras: dict[str, list[Any]]
    """Columns that functions gave to `log_extra`: P * K values each, prompt-major."""
    preferences: Tensor | None = None
    """(P, K, K) float32, the probability that the row's completion beats the column's, NaN where a pair does not count;
    None where the feedback is rewards."""


class RewardSet:
    """Reward functions and reward models with their weights."""

    def __init__(
        self,
        functions: Sequence[RewardFunction | RewardModel],
        weights: Sequence[float] | None = None,
        *,
        missing_eos_penalty: float | None = None,
        scale: RunningScale | None = None,
    ) -> None:
        """`missing_eos_penalty` is in units of reward; `scale`, if given, divides what training sees.

        Raises PairtuneError if there is no function, or not one weight for each.
        """
        if not functions:
            raise PairtuneError(
                "there is no reward: name at least one reward function or reward model in reward_funcs."
            )
        weights = [1.0] * len(functions) if weights is None else list(weights)
        if len(weights) != len(functions):
            raise PairtuneError(f"reward_weights has {len(weights)} values for {len(functions)} reward functions.")
        self.functions = dict(zip(_distinct_names(functions), functions, strict=True))
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.missing_eos_penalty = missing_eos_penalty
        self.scale = scale

    def check(self, prompts: PromptDataset) -> None:
        """Refuse, before training, prompts that the reward functions cannot be called with.

        Raises PairtuneError if a function needs a name that is neither a column nor given by pairtune, if a column has
        a name that pairtune gives, or if a reward model has no chat template for prompts that are conversations.
        """
        for name, function in self.functions.items():
            if isinstance(function, RewardModel):
                function.check(prompts.prompts[0])
            else:
                _check_signature(name, function, prompts.columns)

    def score(
        self,
        prompts: Prompts,
        completions: Completions,
        texts: list[list[str]],
        *,
        trainer_state: Any = None,
        update_scale: bool = True,
    ) -> Scores:
        """Score P * K completions.

        `texts` are P lists of K completions decoded without special tokens; `trainer_state` is handed to the functions.
        As in TRL, the weighted sum runs over the functions that answered. A completion that none answered does not
        count (TRL gives it 0). `update_scale=False` leaves the running scale as it is.

        Raises PairtuneError naming the function, and where it can the completion, for an exception, a wrong number of
        answers, an answer that is no number, and NaN or infinity.
        """
        shape = completions.truncated.shape
        flat_texts = [text for group in texts for text in group]
        log = _Log(len(flat_texts))
        pending: dict[str, Any] = {}
        try:
            for name, function in self.functions.items():
                if isinstance(function, RewardModel):
                    pending[name] = function.score(prompts, completions, texts)
                    continue
                arguments = _arguments(prompts, completions, texts) | log.callbacks(name)
                with _blamed(name, flat_texts):
                    pending[name] = call_function(function, arguments | {"trainer_state": trainer_state})
            answers = {}
            for name, answer in pending.items():
                with _blamed(name, flat_texts):
                    answers[name] = answer.result() if isinstance(answer, Future) else answer
        finally:
            for answer in pending.values():
                if isinstance(answer, Future):
                    answer.cancel()  # no effect on one that is done
        # float64 until the sum is made: a weighted sum that float32 can hold exactly then is exact.
        values = torch.tensor(
            [_checked_answer(name, answer, flat_texts) for name, answer in answers.items()], dtype=torch.float64
        )
        answered = ~values.isnan()
        raw_rewards = masked_sum(values * self.weights[:, None], answered, 0).float().view(shape)
        reward_mask = answered.any(0).view(shape)
        rewards = raw_rewards
        if self.missing_eos_penalty is not None:
            rewards = subtract_missing_eos_penalty(
                rewards, completions.truncated.cpu() & reward_mask, self.missing_eos_penalty
            )
        if self.scale is not None:
            if update_scale:
                self.scale.update(rewards, reward_mask)
            rewards = rewards / self.scale.std
        return Scores(
            rewards=rewards,
            raw_rewards=raw_rewards,
            reward_mask=reward_mask,
            by_function={name: row.float().view(shape) for name, row in zip(self.functions, values, strict=True)},
            metrics=self._metrics(values, answered) | log.metrics(),
            extras=log.extras,
        )

    def _metrics(self, values: Tensor, answered: Tensor) -> dict[str, float]:
        metrics = {}
        for name, row, mask in zip(self.functions, values, answered, strict=True):
            if mask.any():
                metrics[f"rewards/{name}/mean"] = row[mask].mean().item()
                metrics[f"rewards/{name}/std"] = row[mask].std().item() if mask.sum() > 1 else 0.0
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, as plain numbers."""
        return {} if self.scale is None else {"scale": self.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back a `state_dict`."""
        if self.scale is not None and "scale" in state:
            self.scale.load_state_dict(state["scale"])


def subtract_missing_eos_penalty(rewards: Tensor, truncated: Tensor, penalty: float) -> Tensor:
    """`rewards` less `penalty` (units of reward) where `truncated` (bool, same shape) is True."""
    return torch.where(truncated, rewards - penalty, rewards)


class RunningScale:
    """The standard deviation of all rewards seen so far, over all processes.

    Batches are merged by their counts, means and sums of squared deviations (Chan, Golub & LeVeque 1983, "Algorithms
    for Computing the Sample Variance"), which loses no digits where the mean is large.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, rewards: Tensor, mask: Tensor) -> None:
        """Take in the rewards of a step where `mask` (bool, same shape) is True. All processes call this together."""
        rewards = rewards.double()
        count, mean = mask.sum().item(), masked_mean(rewards, mask).item()
        squares = masked_sum((rewards - mean) ** 2, mask).item()
        for part in distributed.gather_objects([count, mean, squares]):
            self._merge(*part)

    def _merge(self, count: float, mean: float, squares: float) -> None:
        if count == 0:
            return
        merged = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * count / merged
        self.mean += shift * count / merged
        self.count = merged

    @property
    def std(self) -> float:
        """The divisor of rewards; 1 until two different rewards have been seen."""
        return math.sqrt(self.squares / (self.count - 1)) if self.squares > 0 else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


# Calling a function.


def _distinct_names(functions: Sequence[RewardFunction | RewardModel]) -> list[str]:
    """The functions' own names, the second of a name called `name_2`: metrics must not overwrite each other."""
    names: list[str] = []
    for function in functions:
        inner = getattr(function, "func", function)  # what a functools.partial wraps
        own = function.name if isinstance(function, RewardModel) else getattr(inner, "__name__", type(inner).__name__)
        name = own.strip("<>")
        names.append(next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(functions) + 2))) if n not in names))
    return names


def _arguments(prompts: Prompts, completions: Completions, texts: list[list[str]]) -> dict[str, Any]:
    """The flat lists for one call: made anew for each function, which may do with them as it likes."""
    num_generations = completions.truncated.shape[1]

    def repeated(values: Iterable[Any]) -> list[Any]:
        return [value for value in values for _ in range(num_generations)]

    return {
        "prompts": [p if isinstance(p, str) else [dict(turn) for turn in p] for p in repeated(prompts.prompts)],
        "completions": [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, group in zip(prompts.prompts, texts, strict=True)
            for text in group
        ],
        "completion_ids": real_ids(completions.completion_ids.flatten(0, 1), completions.completion_mask.flatten(0, 1)),
        **{column: repeated(values) for column, values in prompts.columns.items()},
    }


def _parameters(function: RewardFunction) -> list[inspect.Parameter] | None:
    """The parameters of a function, or None if it does not tell (some builtins)."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return None


def _check_signature(name: str, function: RewardFunction, columns: Collection[str]) -> None:
    clash = next((column for column in columns if column in ARGUMENTS), None)
    if clash is not None:
        raise PairtuneError(
            f"the dataset has a column `{clash}`, a name that pairtune gives to reward functions: rename it."
        )
    available = [*ARGUMENTS, *columns]
    for parameter in _parameters(function) or []:
        optional = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if optional or parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise PairtuneError(
                f"reward function `{name}` takes `{parameter.name}` by position only, but is called with names: "
                "remove the `/` from its signature."
            )
        if parameter.name not in available:
            nearest = get_close_matches(parameter.name, available, n=1)
            mend = f"did you mean `{nearest[0]}`?" if nearest else "give it a default, or the dataset that column."
            raise PairtuneError(
                f"reward function `{name}` needs `{parameter.name}`, which is neither a column of the dataset "
                f"({listed(columns)}) nor one of {listed(ARGUMENTS)}: {mend}"
            )


def call_function(function: RewardFunction, arguments: dict[str, Any]) -> Any:
    """The function's answer; of an asynchronous function, the future of its answer, at work from now on."""
    parameters = _parameters(function)
    if parameters is not None and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        arguments = {p.name: arguments[p.name] for p in parameters if p.name in arguments}
    answer = function(**arguments)
    if inspect.isawaitable(answer):
        return asyncio.run_coroutine_threadsafe(_coroutine(answer), _event_loop())
    return answer


async def _coroutine(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """One event loop, in a thread of its own, for all asynchronous reward functions of the process.

    A notebook already runs a loop in the main thread, and a client that a function keeps from call to call (an HTTP
    session, say) lives only as long as the loop that it was made in.
    """
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="pairtune-rewards", daemon=True).start()
    return loop


@contextmanager
def _blamed(name: str, texts: list[str]) -> Iterator[None]:
    """What a function raises becomes one sentence, with the original behind it."""
    try:
        yield
    except (PairtuneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise PairtuneError(
            f"reward function `{name}` raised {type(error).__name__} ({first_line(error)}){line_of(error)} "
            f"on {counted(len(texts), 'completion')}, the first being {shortened(texts[0])}."
        ) from error


def line_of(error: BaseException) -> str:
    """` at rewards.py:8`, the last line of a user's own code that an error came through; empty if there is none."""
    others = (str(Path(__file__).parents[1]), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith((*others, "<"))]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


class _Log:
    """What reward functions log during one call of `RewardSet.score`."""

    def __init__(self, num_completions: int) -> None:
        self.num_completions = num_completions
        self.extras: dict[str, list[Any]] = {}
        self.values: dict[str, list[float]] = {}

    def callbacks(self, name: str) -> dict[str, Callable[[str, Any], None]]:
        """`log_extra` and `log_metric` for the function `name`."""

        def log_extra(column: str, values: Sequence[Any]) -> None:
            if len(values) != self.num_completions:
                raise PairtuneError(
                    f"reward function `{name}` gave log_extra {len(values)} values for {column!r}, "
                    f"but there are {self.num_completions} completions: give one for each."
                )
            self.extras[column] = list(values)

        def log_metric(metric: str, value: Any) -> None:
            self.values.setdefault(metric, []).append(float(value))

        return {"log_extra": log_extra, "log_metric": log_metric}

    def metrics(self) -> dict[str, float]:
        """The mean of each metric over its calls."""
        return {metric: sum(values) / len(values) for metric, values in self.values.items()}


def _checked_answer(name: str, answer: Any, texts: list[str]) -> list[float]:
    """One float a completion, NaN for None."""
    values = answer.tolist() if hasattr(answer, "tolist") else answer  # arrays and tensors
    if not isinstance(values, list | tuple):
        raise PairtuneError(
            f"reward function `{name}` returned {shortened(answer)}, a {type(answer).__name__}: "
            "it must return a list with one number or None for each completion."
        )
    if len(values) != len(texts):
        raise PairtuneError(
            f"reward function `{name}` returned {len(values)} values for {len(texts)} completions: return one for each."
        )
    return [
        math.nan if value is None else _checked_value(name, value, index, text)
        for index, (value, text) in enumerate(zip(values, texts, strict=True))
    ]


def _checked_value(name: str, value: Any, index: int, text: str) -> float:
    try:
        if isinstance(value, str | bytes):
            raise TypeError("text")  # float() would read "0.5"
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise PairtuneError(
            f"reward function `{name}` returned {shortened(value)} for completion {index} ({shortened(text)}): "
            "return a finite number, or None where a completion does not count."
        )
    return number


# Loading.


def load_rewards(
    config: TrainConfig | EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptDataset,
    reward_funcs: Sequence[RewardFunction | RewardModel | str] | None = None,
) -> RewardSet:
    """The rewards of a configuration, or the functions, models and names passed in, checked against the prompts.

    `tokenizer` is the policy's. Functions are found before any model is loaded.

    Raises PairtuneError if one cannot be found or loaded, or cannot score these prompts.
    """
    from pairtune.models.loading import choose_device

    given = config.reward_funcs if reward_funcs is None else reward_funcs
    found = [load_reward_function(entry) if isinstance(entry, str) else entry for entry in given]
    device = choose_device(config.device)
    functions = [
        RewardModel.from_pretrained(
            entry,
            device=device,
            trust_remote_code=config.trust_remote_code,
            batch_size=config.reward_batch_size,
            chat=config.chat,
            system_prompt=config.system_prompt,
            policy_tokenizer=tokenizer,
        )
        if isinstance(entry, str)
        else entry
        for entry in found
    ]
    rewards = RewardSet(
        functions,
        config.reward_weights,
        missing_eos_penalty=config.missing_eos_penalty,
        scale=RunningScale() if getattr(config, "scale_rewards", "none") == "running" else None,
    )
    rewards.check(prompts)
    return rewards


def load_reward_function(name: str) -> RewardFunction | str:
    """The function that `name` stands for, or `name` itself if it is a reward model's.

    A folder with a config.json, or a run folder (its newest checkpoint), is a reward model; `path/to/file.py:function`
    and `package.module.function` are functions (the working directory counts as a place for modules); another name with
    one "/" is a hub id.

    Raises PairtuneError, telling what was tried, if it is none of these.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        folder = Path(resolve_model(str(path)))
        if not (folder / "config.json").is_file():
            raise PairtuneError(f"the folder {name!r} holds no reward model: it has no config.json.")
        return str(folder)
    if ".py:" in name:
        file, function = name.rsplit(":", 1)
        return _function_of(_import_file(Path(file).expanduser()), function, name)
    if name.endswith(".py"):
        raise PairtuneError(f"reward function {name!r}: say which function of the file, as in {name}:my_reward.")
    if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", name):
        module_name, function = name.rsplit(".", 1)
        return _function_of(_import_module(module_name, name), function, name)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return name
    raise PairtuneError(
        f"there is no reward {name!r}: it is no folder of a model, no `package.module.function`, no "
        "`path/to/file.py:function` and no hub id like `organisation/model`."
    )


def _import_module(module_name: str, name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a stray file there shadows no installed package
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise PairtuneError(
                f"reward function {name!r}: importing {module_name} failed: {first_line(error)}"
            ) from error
        raise PairtuneError(
            f"there is no reward {name!r}: no module {error.name!r} is installed or lies in {os.getcwd()}; "
            "a reward model is named `organisation/model` or by its folder."
        ) from error
    except Exception as error:
        raise PairtuneError(f"reward function {name!r}: importing {module_name} failed: {first_line(error)}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = get_close_matches(path.name, [file.name for file in path.parent.glob("*.py")], n=1)
        mend = f"; did you mean {str(path.with_name(near[0]))!r}?" if near else "."
        raise PairtuneError(f"reward function: there is no file {str(path)!r} in {os.getcwd()}{mend}")
    if str(path.resolve().parent) not in sys.path:
        sys.path.append(str(path.resolve().parent))  # a file may import its neighbours
    spec = importlib.util.spec_from_file_location(f"pairtune_rewards_{path.stem}", path)
    assert spec is not None  # a .py file always has a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        failed = f"running {str(path)!r} failed{line_of(error)}: {type(error).__name__}: {first_line(error)}"
        raise PairtuneError(failed) from error
    return module


def _function_of(module: ModuleType, function: str, name: str) -> RewardFunction:
    found = getattr(module, function, None)
    if not callable(found):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        nearest = get_close_matches(function, callables, n=1)
        mend = f"did you mean `{nearest[0]}`?" if nearest else f"it has {listed(callables)}."
        raise PairtuneError(f"reward function {name!r}: {module.__file__} has no function `{function}`; {mend}")
    return found
