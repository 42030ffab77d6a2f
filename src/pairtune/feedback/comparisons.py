"""Comparisons of completions, by people or by whoever made the dataset: what a reward model learns from, and what it is
measured by.

A comparison is tokenised as `RewardModel` reads a sampled completion: the ids that follow the prompt's, closed where
the completion is whole, and open where the length cap cut it. A score is then one number in training, in evaluation and
in reinforcement learning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

import torch
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pairtune.completion_data import (
    LARGEST,
    OfflineDataset,
    answer_end,
    encode_preferences,
    encode_rankings,
    held_out_rows,
    training_rows,
)
from pairtune.data import RawPrompts, Row, columns_of, shortened
from pairtune.errors import PairtuneError
from pairtune.feedback.reward_model import RewardModel
from pairtune.maths.calibration import Accuracy, Baseline, Bin, PairEvaluation, evaluate_pairs
from pairtune.maths.reward_learning import MOST_TIED
from pairtune.maths.statistics import Interval
from pairtune.runs.folder import without_nan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pairtune.config import RewardConfig


@dataclass(frozen=True)
class Comparisons:
    """Completions of one prompt each, and which of them is better."""

    data: OfflineDataset
    """As a policy samples. A pair is (chosen, rejected). The rank of a completion is minus its reward: the smallest is
    the best."""
    closed: OfflineDataset
    """The same as a reward model reads it: with what the chat template writes behind a finished answer."""
    ranked: bool
    """Whether completions are ranked; else they are pairs."""
    margins: list[float] | None
    """Of each pair, reward units: by how much the chosen one should lead."""
    probabilities: list[float] | None
    """Of each pair: that the chosen one is better."""

    def __len__(self) -> int:
        return len(self.data)

    def decided(self, row: int) -> list[tuple[int, int]]:
        """The pairs (better, worse) of a row's completions. A tie is none; a chosen one that is likely the worse of the
        two is the worse one."""
        if self.probabilities is not None:
            likelier = self.probabilities[row] - 0.5
            return [] if likelier == 0 else [(0, 1) if likelier > 0 else (1, 0)]
        rewards = self.data.rewards[row]
        pairs = combinations(range(len(rewards)), 2)
        return [(i, j) if rewards[i] > rewards[j] else (j, i) for i, j in pairs if rewards[i] != rewards[j]]


def load_comparisons(
    config: RewardConfig, tokenizer: PreTrainedTokenizerBase, *, train_dataset: Any = None, eval_dataset: Any = None
) -> tuple[Comparisons, Comparisons | None]:
    """The comparisons to learn from and the held-out ones, tokenised; the second is None where `dataset_test_split` is
    null.

    Datasets passed in take the place of the configuration's; see `load_dataset_rows` for what they may be. A row has
    `chosen` and `rejected` as in `load_preferences`, or `completions` and `ranks` as in `encode_rankings`.

    Raises PairtuneError for whatever is wrong with the data, and if nothing is left.
    """
    train = encode_comparisons(*training_rows(config, train_dataset), config, tokenizer)
    held_out = held_out_rows(config, train_dataset=train_dataset, eval_dataset=eval_dataset)
    return train, None if held_out is None else encode_comparisons(*held_out, config, tokenizer)


def encode_comparisons(
    rows: list[Row], name: str, config: RewardConfig, tokenizer: PreTrainedTokenizerBase
) -> Comparisons:
    """Rows as comparisons; see `load_comparisons`."""
    ranked = {"completions", "ranks"} <= set(columns_of(rows))
    encode = encode_rankings if ranked else encode_preferences
    data = encode(rows, name, config, tokenizer, cut_dialogues=config.cut_dialogues)
    margins = None if ranked else _numbers(data, config.margin_column, "margin")
    probabilities = None if ranked else _numbers(data, config.probability_column, "probability")
    if margins is not None and probabilities is not None:
        raise PairtuneError(
            f"{name} has both `{config.margin_column}` and `{config.probability_column}`, which both say how much "
            "better the chosen completion is; set margin_column or probability_column to null."
        )
    if ranked and config.reward.label_smoothing:
        raise PairtuneError(
            f"reward.label_smoothing is {config.reward.label_smoothing}, but {name} holds rankings, for which it has "
            "no meaning; set it to 0."
        )
    if ranked and config.reward.loss == "plackett_luce" and data.num_completions > MOST_TIED:
        for number, ranks in zip(data.prompt_dataset.numbers, data.rewards, strict=True):
            if len(set(ranks)) < len(ranks):
                raise PairtuneError(
                    f"row {number} of {name} has tied ranks, which reward.loss plackett_luce takes among at most "
                    f"{MOST_TIED} completions a prompt, not {data.num_completions}; set reward.loss to pairwise."
                )
    return Comparisons(data, _closed(data, config, tokenizer), ranked, margins, probabilities)


def _closed(data: OfflineDataset, config: RewardConfig, tokenizer: PreTrainedTokenizerBase) -> OfflineDataset:
    """Finished answers end as the template ends a conversation, so that its text has the same score for everyone."""
    tail = answer_end(RawPrompts(data.prompts[:1], {}, data.name), tokenizer, chat=config.chat)[1:]
    if not tail:
        return data
    completions = [
        [one if one.truncated else replace(one, ids=[*one.ids, *tail]) for one in group] for group in data.completions
    ]
    return replace(data, completions=completions)


def _numbers(data: OfflineDataset, column: str | None, kind: str) -> list[float] | None:
    """A column of numbers, one a pair; None where the dataset has no such column."""
    values = data.prompt_dataset.columns.get(column) if column is not None else None
    if values is None:
        return None
    wanted = "a number from 0 to 1" if kind == "probability" else "a finite number"
    for number, value in zip(data.prompt_dataset.numbers, values, strict=True):
        real = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST
        if not real or (kind == "probability" and not 0 <= value <= 1):
            raise PairtuneError(
                f"row {number} of {data.name}: the {kind} {shortened(value)} in `{column}` is not {wanted}; correct "
                f"it, or set {kind}_column to null."
            )
    return [float(value) for value in values]


def score_comparisons(
    judge: RewardModel, comparisons: Comparisons, num_rows: int, batch_size: int, advance: Callable[[float], None]
) -> Tensor:
    """(N, K) float64: what a reward model gives to the first rows, NaN where a row has no such completion.

    Its tokenizer must be the one that the comparisons were tokenised with. Raises PairtuneError for a score that is not
    finite.
    """
    scores = torch.full((num_rows, comparisons.data.num_completions), math.nan, dtype=torch.float64)
    for start in range(0, num_rows, batch_size):
        rows = range(start, min(start + batch_size, num_rows))
        batch = comparisons.data.batch(rows)
        # A completion that a row lacks is scored as an empty one, and the score not used.
        given = judge.score(batch.prompts, batch.completions, [[""] * scores.shape[1] for _ in rows])
        given_scores = torch.tensor(given, dtype=torch.float64).view(len(rows), -1)
        if not given_scores[batch.reward_mask].isfinite().all():
            raise PairtuneError(f"reward model `{judge.name}` gives scores that are not finite; check its weights.")
        scores[start : start + len(rows)] = given_scores.masked_fill(~batch.reward_mask, math.nan)
        advance(len(rows))
    return scores


# ----------------------------------------------------------------------------------------------------------- the report


def evaluate_comparisons(comparisons: Comparisons, rewards: Tensor) -> PairEvaluation:
    """What rewards (N, K) of the first N rows of held-out comparisons are worth. Rows of equal prompts are resampled
    together."""
    chosen, rejected, numbers = [], [], []
    prompts: dict[str, int] = {}
    for row in range(len(rewards)):
        key = json.dumps(comparisons.data.prompts[row], sort_keys=True, default=repr)
        number = prompts.setdefault(key, len(prompts))
        for better, worse in comparisons.decided(row):
            chosen.append((row, better))
            rejected.append((row, worse))
            numbers.append(number)
    margins = comparisons.margins
    if comparisons.probabilities is not None:  # how sure the label is
        margins = [abs(2 * probability - 1) for probability in comparisons.probabilities]

    def rewards_of(places: Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor([rewards[row, k].item() for row, k in places], dtype=torch.float64)

    def lengths_of(places: Sequence[tuple[int, int]]) -> Tensor:
        return torch.tensor([len(comparisons.data.completions[row][k].ids) for row, k in places], dtype=torch.float64)

    return evaluate_pairs(
        rewards_of(chosen),
        rewards_of(rejected),
        lengths_of(chosen),
        lengths_of(rejected),
        margins=None if margins is None else torch.tensor([margins[row] for row, _ in chosen], dtype=torch.float64),
        prompts=torch.tensor(numbers, dtype=torch.int64),
    )


def evaluation_line(report: PairEvaluation) -> dict[str, Any]:
    """What of a report a line of evaluations.jsonl holds; what no pair says anything of is left out."""
    length = report.length
    line: dict[str, Any] = {
        "num_pairs": report.num_pairs,
        "num_prompts": report.num_prompts,
        "accuracy": report.accuracy._asdict(),
        "log_likelihood": report.log_likelihood._asdict(),
        "temperature": report.temperature._asdict(),
        "expected_calibration_error": report.expected_calibration_error,
        "accuracy_chosen_longer": length.chosen_longer.accuracy._asdict(),
        "accuracy_chosen_shorter": length.chosen_shorter.accuracy._asdict(),
        "accuracy_minus_longer_wins": length.longer_wins.model_minus_baseline._asdict(),
        "accuracy_minus_shorter_wins": length.shorter_wins.model_minus_baseline._asdict(),
        "reward_length_correlation": length.pearson_within_pairs,
    }
    return {
        name: value
        for name, value in line.items()
        if math.isfinite(value["mean"] if isinstance(value, dict) else value)
    }


def report_dict(report: PairEvaluation) -> dict[str, Any]:
    """All of a report for JSON, which has no NaN and no infinity: None stands for both."""
    finite: dict[str, Any] = without_nan({"beats_length_baselines": report.beats_length_baselines, **report.as_dict()})
    return finite


def report_table(report: PairEvaluation) -> Table:
    """A report for a person to read."""
    title = f"reward model on {report.num_pairs} held-out pairs of {report.num_prompts} prompts"
    table = Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left")
    table.add_column("")
    table.add_column("mean [95% interval]", justify="right")
    table.add_column("the model is better by", justify="right")
    length = report.length

    def rule(label: str, baseline: Baseline) -> None:
        gain = Interval(*(100 * x for x in baseline.model_minus_baseline))
        table.add_row(label, _share(baseline.accuracy), f"{_shown(gain, '{:+.1f}')} points")

    def part(label: str, accuracy: Accuracy | Bin) -> None:
        if accuracy.num_pairs:
            table.add_row(f"  {label} ({accuracy.num_pairs})", _share(accuracy.accuracy), "")

    table.add_row("accuracy", Text(_share(report.accuracy), style="bold"), "")
    rule("the longer one wins", length.longer_wins)
    rule("the shorter one wins", length.shorter_wins)
    part("where the chosen one is longer", length.chosen_longer)
    part("where it is shorter", length.chosen_shorter)
    part("where both are of one length", length.equal_length)
    for one in report.by_margin or ():
        part(f"margin {one.low:.3g} to {one.high:.3g}", one)
    table.add_row("log-likelihood, nats a pair (no opinion: -0.693)", _shown(report.log_likelihood, "{:.3f}"), "")
    table.add_row("temperature (1: as sure as it is right)", _shown(report.temperature, "{:.2f}"), "")
    table.add_row("expected calibration error", _number(report.expected_calibration_error, "{:.1%}"), "")
    for one in report.reliability:
        part(f"lead of {one.low:.2g} to {one.high:.2g}, {one.predicted:.0%} expected", one)
    correlation = f"{_number(length.pearson_within_pairs, '{:.2f}')}, {_number(length.spearman_within_pairs, '{:.2f}')}"
    table.add_row("reward and length within pairs (Pearson, Spearman)", correlation, "")
    if not report.beats_length_baselines:
        table.caption = "Not shown to be better than the better of the two rules of length."
        table.caption_justify = "left"
    return table


def _share(interval: Interval) -> str:
    return _shown(interval, "{:.1%}")


def _shown(interval: Interval, form: str) -> str:
    ends = ", ".join(_number(end, form) for end in interval[1:])
    return f"{_number(interval.mean, form)} [{ends}]"


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else form.format(value)
