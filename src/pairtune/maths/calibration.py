"""What a reward model is worth on held-out comparisons: is it right, is it as sure as it should be, is it about length.

A pair is told by d = r_chosen - r_rejected. The model holds the chosen one for better with probability s(d), s the
sigmoid; it is right where d > 0, and a tie d = 0 is half right. Swapping the two of a pair only turns the sign of d, so
a model's confidence is s(|d|), at least 1/2, and its accuracy is read against that.

Pairs of one prompt are not independent: with `prompts` (N,), an integer for each pair, pairs of one prompt stay
together in every interval. Intervals hold the spread over prompts, not that over training seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pairtune.maths.statistics import Interval, bootstrap_ratio

# ---------------------------------------------------------------------------------------------------- what is returned


@dataclass(frozen=True)
class Accuracy:
    """How often a model is right on some of the pairs."""

    num_pairs: int
    accuracy: Interval


@dataclass(frozen=True)
class Bin:
    """Pairs whose |d|, or another number that they were sorted by, lies between `low` and `high`, both reached."""

    low: float
    high: float
    num_pairs: int
    predicted: float
    """The accuracy that the model expects of itself: the mean of s(|d|)."""
    accuracy: Interval
    """The accuracy that it has."""


@dataclass(frozen=True)
class Baseline:
    """A rule without a model, and how much more often the model is right than it on the same pairs."""

    accuracy: Interval
    model_minus_baseline: Interval


@dataclass(frozen=True)
class LengthReport:
    """How much of a reward model could be length."""

    chosen_longer: Accuracy
    """The model's accuracy where the longer completion was chosen; then where the shorter was, and where both are of
    one length."""
    chosen_shorter: Accuracy
    equal_length: Accuracy
    longer_wins: Baseline
    """Right where the chosen completion is longer, half right at equal length."""
    shorter_wins: Baseline
    pearson: float
    """Of reward and length over all completions; the mean reward of a prompt, which no comparison fixes, is in it."""
    spearman: float
    pearson_within_pairs: float
    """Of reward and length, each less its mean over the pair: only what decides a comparison is in it."""
    spearman_within_pairs: float


@dataclass(frozen=True)
class PairEvaluation:
    """A reward model on held-out pairs. `as_dict` gives plain dicts, lists and numbers."""

    num_pairs: int
    num_prompts: int
    num_ties: int
    accuracy: Interval
    log_likelihood: Interval
    """The mean of log s(d), nats a pair; log 1/2 = -0.693 is that of a model without an opinion."""
    temperature: Interval
    expected_calibration_error: float
    reliability: tuple[Bin, ...]
    """By quantiles of |d|."""
    by_margin: tuple[Bin, ...] | None
    """By quantiles of the dataset's own margin, where it has one."""
    length: LengthReport

    @property
    def beats_length_baselines(self) -> bool:
        """Whether the model is right more often than both length rules, by more than the intervals allow for."""
        return all(rule.model_minus_baseline.low > 0 for rule in (self.length.longer_wins, self.length.shorter_wins))

    def as_dict(self) -> dict[str, Any]:
        """Intervals become {"mean", "low", "high"}. Numbers may be NaN or infinite, where said."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value._asdict()
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def evaluate_pairs(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    margins: Tensor | None = None,
    prompts: Tensor | None = None,
    num_bins: int = 10,
    num_margin_bins: int = 4,
    level: float = 0.95,
) -> PairEvaluation:
    """All that this module measures, of N held-out pairs: tensors (N,), lengths in tokens.

    `margins` say how much better the chosen one is in the dataset's own words; equal ones share a bin. No pair gives
    NaN throughout. Raises ValueError where shapes differ, a number is not finite, or on a bad level or number of bins.
    """
    _check_pairs(chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths, margins, prompts)
    differences = _double(chosen_rewards) - _double(rejected_rewards)
    options: dict[str, Any] = {"prompts": prompts, "level": level}
    reliability = reliability_curve(differences, num_bins=num_bins, **options)
    return PairEvaluation(
        num_pairs=len(differences),
        num_prompts=len(differences if prompts is None else prompts.unique()),
        num_ties=int((differences == 0).sum()),
        accuracy=accuracy(differences, **options),
        log_likelihood=log_likelihood(differences, **options),
        temperature=fitted_temperature(differences, **options),
        expected_calibration_error=expected_calibration_error(reliability),
        reliability=reliability,
        by_margin=None if margins is None else binned(differences, margins, num_bins=num_margin_bins, **options),
        length=length_report(chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths, **options),
    )


# ------------------------------------------------------------------------------------------------- right, and how sure


def accuracy(differences: Tensor, *, prompts: Tensor | None = None, level: float = 0.95) -> Interval:
    """The share of differences (N,) above 0, ties half, with its interval.

    Wilson's interval (1927) for as many independent pairs as have the standard error of these: for pairs of distinct
    prompts without a tie their number, for many pairs of few prompts less. Unlike a bootstrap it has a width where all
    pairs are right. NaN ends for fewer than two prompts. Raises ValueError where differences are not (N,) or not
    finite, where prompts do not fit, or on a level outside (0, 1).
    """
    _check_pairs(differences, prompts)
    z = _normal_quantile(level)
    right = _right(differences)
    sums, counts = _per_prompt(right, prompts)
    num_pairs, num_prompts = len(right), len(counts)
    if num_prompts < 2:
        return Interval(right.mean().item(), math.nan, math.nan)
    share = right.mean()
    # The variance of a ratio of sums over prompts, by linearisation; it says nothing where no pair differs.
    variance = (sums - share * counts).square().sum() * num_prompts / (num_prompts - 1) / num_pairs**2
    spread = share * (1 - share)
    effective = (spread / variance).clamp(max=num_pairs) if spread > 0 else share.new_tensor(num_prompts)
    centre = (share + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z * (spread / effective + (z / (2 * effective)) ** 2).sqrt() / (1 + z**2 / effective)
    # The estimate lies inside; where it is 0 or 1, it is an end.
    low, high = torch.minimum(share, centre - half).clamp(min=0), torch.maximum(share, centre + half).clamp(max=1)
    return Interval(share.item(), low.item(), high.item())


def log_likelihood(differences: Tensor, *, prompts: Tensor | None = None, level: float = 0.95) -> Interval:
    """The mean of log s(d) over differences (N,), in nats, with its bootstrap interval over prompts.

    Raises ValueError as `accuracy` does.
    """
    _check_pairs(differences, prompts)
    return bootstrap_ratio(*_per_prompt(F.logsigmoid(_double(differences)), prompts), level=level)


def fitted_temperature(differences: Tensor, *, prompts: Tensor | None = None, level: float = 0.95) -> Interval:
    """The T that makes s(d / T) most likely on differences (N,), with its interval.

    1 for a calibrated model, more for one that is too sure of itself. 0 where every pair is right and infinite where
    d is at most 0 on average: then no certainty is too much or too little. Fit it on pairs that the model was not
    trained on. The interval is that of 1 / T, in which the log-likelihood is concave (Newton's information, with the
    scores of a prompt summed); its ends may be infinite, and are NaN where every pair is right or every pair is wrong.
    NaN throughout without a difference. Raises ValueError as `accuracy` does.
    """
    _check_pairs(differences, prompts)
    z = _normal_quantile(level)
    d = _double(differences)
    if not d.any():
        return Interval(math.nan, math.nan, math.nan)
    inverse = _most_likely_inverse(d) if d.sum() >= 0 else -_most_likely_inverse(-d)
    temperature = 1 / inverse if inverse > 0 else math.inf
    scores, counts = _per_prompt(d * (-inverse * d).sigmoid(), prompts)
    information = (d.square() * (inverse * d).sigmoid() * (-inverse * d).sigmoid()).sum()
    if len(counts) < 2 or not math.isfinite(inverse) or not information > 0:
        return Interval(temperature, math.nan, math.nan)
    standard_error = (scores.square().sum() * len(counts) / (len(counts) - 1)).sqrt() / information
    half = z * standard_error.item()
    low, high = (1 / x if x > 0 else math.inf for x in (inverse + half, inverse - half))
    return Interval(temperature, low, high)


def _most_likely_inverse(d: Tensor) -> float:
    """The a >= 0 with sum d s(-a d) = 0, for d (N,) with a sum >= 0; infinite where no d is below 0.

    The sum falls in a, so the root is bracketed by doubling and then halved down to the last bit.
    """
    if not (d < 0).any():
        return math.inf

    def slope(a: float) -> float:
        return (d * (-a * d).sigmoid()).sum().item()

    low, high = 0.0, 1 / d.abs().max().item()
    while slope(high) > 0:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return high


# ------------------------------------------------------------------------------------------------------------ in bins


def reliability_curve(
    differences: Tensor,
    *,
    num_bins: int = 10,
    temperature: float = 1.0,
    prompts: Tensor | None = None,
    level: float = 0.95,
) -> tuple[Bin, ...]:
    """Expected and observed accuracy in bins of about equally many pairs, by |d|: differences (N,) of a model.

    `temperature` divides d before: one that was fitted on other pairs shows the model as it would be calibrated.
    Equal |d| share a bin, so there may be fewer bins than asked for. Raises ValueError as `accuracy` does, on a
    num_bins < 1 or a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be greater than 0, but it is {temperature}")
    differences = _double(differences) / temperature
    return binned(differences, differences.abs(), num_bins=num_bins, prompts=prompts, level=level)


def binned(
    differences: Tensor, values: Tensor, *, num_bins: int, prompts: Tensor | None = None, level: float = 0.95
) -> tuple[Bin, ...]:
    """Expected and observed accuracy in bins of about equally many pairs, by `values` (N,), the smallest first.

    Otherwise as `reliability_curve`.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins must be at least 1, but it is {num_bins}")
    _check_pairs(differences, values, prompts)
    differences, values = _double(differences), _double(values)
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    # The middle of all pairs with this value, from 0 to 1, says in which quantile they stand.
    middle = (counts.cumsum(0) - counts / 2) / max(1, len(values))
    bins = (middle * num_bins).floor()[place]
    found = []
    for number in bins.unique():
        here = bins == number
        d, inside = differences[here], values[here]
        found.append(
            Bin(
                low=inside.min().item(),
                high=inside.max().item(),
                num_pairs=len(d),
                predicted=d.abs().sigmoid().mean().item(),
                accuracy=accuracy(d, prompts=None if prompts is None else prompts[here], level=level),
            )
        )
    return tuple(found)


def expected_calibration_error(bins: tuple[Bin, ...]) -> float:
    """The mean over pairs of |expected - observed accuracy| of their bin (Naeini et al. 2015), NaN without a pair.

    Chance alone makes it positive: with n pairs a bin, about 0.8 sqrt(p (1 - p) / n) for a calibrated model.
    """
    num_pairs = sum(one.num_pairs for one in bins)
    gaps = (one.num_pairs * abs(one.accuracy.mean - one.predicted) for one in bins)
    return sum(gaps) / num_pairs if num_pairs else math.nan


# ------------------------------------------------------------------------------------------------------------- length


def length_report(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    *,
    prompts: Tensor | None = None,
    level: float = 0.95,
) -> LengthReport:
    """What a reward model has to do with length, on N pairs: tensors (N,), lengths in tokens.

    The differences to the baselines are paired: both judge the same pairs, and prompts are resampled with both.
    Raises ValueError as `evaluate_pairs` does.
    """
    _check_pairs(chosen_rewards, rejected_rewards, chosen_lengths, rejected_lengths, prompts)
    rewards = torch.stack([_double(chosen_rewards), _double(rejected_rewards)])
    lengths = torch.stack([_double(chosen_lengths), _double(rejected_lengths)])
    differences, longer_by = rewards[0] - rewards[1], lengths[0] - lengths[1]

    def where(these: Tensor) -> Accuracy:
        some = None if prompts is None else prompts[these]
        return Accuracy(int(these.sum()), accuracy(differences[these], prompts=some, level=level))

    def against(rule: Tensor) -> Baseline:
        gain = bootstrap_ratio(*_per_prompt(_right(differences) - _right(rule), prompts), level=level)
        return Baseline(accuracy(rule, prompts=prompts, level=level), gain)

    within = [x - x.mean(0) for x in (rewards, lengths)]
    return LengthReport(
        chosen_longer=where(longer_by > 0),
        chosen_shorter=where(longer_by < 0),
        equal_length=where(longer_by == 0),
        longer_wins=against(longer_by),
        shorter_wins=against(-longer_by),
        pearson=pearson(rewards.flatten(), lengths.flatten()),
        spearman=spearman(rewards.flatten(), lengths.flatten()),
        pearson_within_pairs=pearson(within[0].flatten(), within[1].flatten()),
        spearman_within_pairs=spearman(within[0].flatten(), within[1].flatten()),
    )


def pearson(x: Tensor, y: Tensor) -> float:
    """The correlation of x and y, both (N,), in [-1, 1]; NaN where one of them does not vary.

    Raises ValueError where shapes differ or a number is not finite.
    """
    _check_pairs(x, y)
    x, y = (_double(v) - _double(v).mean() for v in (x, y))
    return ((x @ y) / (x.norm() * y.norm())).clamp(-1, 1).item()


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks of x and y, both (N,); equal values share the mean of their ranks.

    Otherwise as `pearson`.
    """
    _check_pairs(x, y)
    return pearson(_mean_ranks(x), _mean_ranks(y))


def _mean_ranks(x: Tensor) -> Tensor:
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[place]


# ---------------------------------------------------------------------------------------------------- shared arithmetic


def _double(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float64)


def _right(differences: Tensor) -> Tensor:
    """1 where the model is right, 0 where it is wrong, 1/2 at a tie."""
    return (_double(differences).sign() + 1) / 2


def _per_prompt(values: Tensor, prompts: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sums of the values (N,) of each prompt, and how many there are: (P,) each; every pair its own for None."""
    if prompts is None:
        return values, torch.ones_like(values)
    _, place, counts = prompts.cpu().unique(return_inverse=True, return_counts=True)
    return values.new_zeros(len(counts)).index_add(0, place, values), counts.to(values.dtype)


def _normal_quantile(level: float) -> float:
    """How many standard errors an interval of this level reaches to either side."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, but it is {level}")
    return torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item()


def _check_pairs(*tensors: Tensor | None) -> None:
    """Raises ValueError unless all that are given are (N,), alike and finite."""
    given = [x for x in tensors if x is not None]
    shapes = [tuple(x.shape) for x in given]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(f"values must be one a pair, (N,) and alike, but they have {', '.join(map(str, shapes))}")
    if not all(x.isfinite().all() for x in given):
        raise ValueError("values must be finite, but some are NaN or infinite: leave out pairs without a reward")
