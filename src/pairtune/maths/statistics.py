"""What a number measured on held-out prompts is worth: intervals over prompts, over prompts and training seeds
together, and distinct n-grams.

Completions of one prompt are not independent, so the unit of every interval here is the prompt; average the completions
of a prompt before, or sum them for a ratio. `bootstrap_*` take one trained policy and hold the spread over prompts and
sampled completions alone. `estimate_*` take what several training seeds have come to and hold the spread over seeds
too: what is said of a method, and not of one run of it, needs them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_DRAWS_AT_ONCE = 2**20
"""Bounds the memory of a bootstrap: so many resampled values are held at a time."""


class Interval(NamedTuple):
    """An estimate and the interval around it; NaN ends where fewer than two prompts say nothing about the spread."""

    mean: float
    low: float
    high: float


def bootstrap_mean(values: Tensor, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """The mean over prompts, values (P,), with its percentile bootstrap interval.

    Deterministic in `seed`. One prompt gives its value with NaN ends, none gives NaN throughout. Percentile intervals
    are a little narrow for few prompts: at P = 30 a nominal 95% covers 91 to 93%; and a value that is the same for
    all prompts gets an interval of no width (a share of 0 of 30 prompts may well be 10% of all). Raises ValueError
    where `values` is not (P,) or `level` not inside (0, 1).
    """
    return bootstrap_ratio(values, torch.ones_like(values), num_resamples=num_resamples, level=level, seed=seed)


def bootstrap_difference(
    a: Tensor, b: Tensor, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """The mean of a - b, values (P,) of the same prompts in the same order, with its interval.

    The two values of a prompt stay together. Where prompts differ more than the two policies do, this interval is
    much shorter than those of `a` and `b` suggest. Otherwise as `bootstrap_mean`.
    """
    _check_prompts(a, b)
    return bootstrap_mean(a - b, num_resamples=num_resamples, level=level, seed=seed)


def bootstrap_ratio(
    numerators: Tensor, denominators: Tensor, *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """sum(numerators) / sum(denominators), both (P,), with its interval.

    KL a token, say, from the KL and the number of tokens of each prompt: long completions count for more, unlike in a
    mean of ratios. NaN where the denominators sum to 0. Otherwise as `bootstrap_mean`.
    """
    _check_prompts(numerators, denominators)
    _check_level(level)
    columns = torch.stack([x.to("cpu", torch.float64) for x in (numerators, denominators)], 1)
    total = columns.sum(0)
    estimate = (total[0] / total[1]).item() if total[1] != 0 else math.nan
    if len(columns) < 2:
        return Interval(estimate, math.nan, math.nan)
    sums = _resampled_sums(columns, num_resamples, seed)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=sums.dtype)
    # nan: a resample of prompts without a denominator (0 / 0) says nothing.
    low, high = torch.nanquantile(sums[:, 0] / sums[:, 1], ends).tolist()
    return Interval(estimate, low, high)


def _resampled_sums(columns: Tensor, num_resamples: int, seed: int) -> Tensor:
    """(P, C) -> (num_resamples, C): the sums over P prompts drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    num_prompts = len(columns)
    sums = []
    for resamples in torch.arange(num_resamples).split(max(1, _DRAWS_AT_ONCE // num_prompts)):
        drawn = torch.randint(num_prompts, (len(resamples), num_prompts), generator=generator)
        sums.append(columns[drawn].sum(1))
    return torch.cat(sums)


def _check_prompts(*values: Tensor) -> None:
    shapes = [tuple(x.shape) for x in values]
    if values[0].dim() != 1 or len(set(shapes)) > 1:
        raise ValueError(f"values must be one a prompt, (P,) and alike, but they have {', '.join(map(str, shapes))}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, but it is {level}")


# ---------------------------------------------------------------------------------------------------- distinct n-grams


def distinct_n(ids: Tensor, n: int = 2) -> float:
    """Distinct n-grams over all n-grams of a set of completions, in (0, 1] (Li et al. 2016); NaN where there is none.

    ids (..., T) are token ids, -1 where there is no token; n-grams do not cross completions. The share falls as a set
    grows, since new n-grams run out: compare only sets of as many prompts and about as many tokens. Raises ValueError
    on an n < 1.
    """
    types, _ = _ngrams(ids, n)
    return (types.max().item() + 1) / len(types) if len(types) else math.nan


def distinct_n_interval(ids: Tensor, n: int = 2, *, level: float = 0.95) -> Interval:
    """distinct_n of completions (P, ..., T), with the interval of what P other prompts would give.

    The jackknife over prompts: each is left out once, which never repeats an n-gram. A bootstrap would: it draws
    prompts twice, and their n-grams with them, so that every resample is less distinct than the set itself and the
    interval would lie below the estimate. The jackknife errs to the wide side: a nominal 95% covers about 98%.
    """
    _check_level(level)
    num_prompts = len(ids)
    types, prompts = _ngrams(ids, n)
    if not len(types):
        return Interval(math.nan, math.nan, math.nan)
    num_types = int(types.max()) + 1
    first = torch.full((num_types,), num_prompts).scatter_reduce(0, types, prompts, "amin")
    last = torch.full((num_types,), -1).scatter_reduce(0, types, prompts, "amax")
    # Without a prompt, the n-grams that only it uses are gone.
    only_here = torch.bincount(first[first == last], minlength=num_prompts)
    remaining = len(types) - torch.bincount(prompts, minlength=num_prompts)
    return jackknife_interval(num_types / len(types), (num_types - only_here) / remaining, level=level)


def jackknife_interval(estimate: float, leave_one_out: Tensor, *, level: float = 0.95) -> Interval:
    """The interval of a statistic of P prompts from its values (P,) with one prompt left out each.

    The jackknife: estimate +- z * sqrt((P - 1) / P * sum_i (value_i - mean)^2). For statistics that are smooth in the
    weight of a prompt (not medians or maxima), among them those that a bootstrap would bias because it draws a prompt
    twice. NaN ends for fewer than two prompts.
    """
    _check_prompts(leave_one_out)
    _check_level(level)
    num_prompts = len(leave_one_out)
    if num_prompts < 2:
        return Interval(estimate, math.nan, math.nan)
    values = leave_one_out.to("cpu", torch.float64)
    standard_error = ((num_prompts - 1) * values.var(correction=0)).sqrt().item()
    half_width = torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)).item() * standard_error
    return Interval(estimate, estimate - half_width, estimate + half_width)


def _ngrams(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The N n-grams of completions (R, ..., T): types (N,), numbered from 0 without a gap, and rows (N,) in R."""
    if n < 1:
        raise ValueError(f"n must be at least 1, but it is {n}")
    windows = F.pad(ids.cpu(), (0, n - 1), value=-1).unfold(-1, n, 1)  # padded: a completion may be shorter than n
    whole = (windows >= 0).all(-1)
    grams = windows[whole]
    types = torch.zeros(len(grams), dtype=torch.int64)
    for tokens in grams.unbind(-1) if len(grams) else ():
        # Numbered anew after every token, the types stay below N, so that N times a vocabulary stays within int64.
        _, types = torch.unique(types * (tokens.max() + 1) + tokens, return_inverse=True)
    return types, whole.nonzero()[:, 0]


# -------------------------------------------------------------------------------------------------- prompts and seeds


class Estimate(NamedTuple):
    """An estimate with its interval over prompts and training seeds together, and what each of the two adds."""

    mean: float
    low: float
    high: float
    prompt_error: float
    """Standard error over prompts and sampled completions, the trained policies given; NaN for one prompt."""
    seed_error: float
    """What other training seeds would add to the standard error, sampling error taken out; NaN where no policy has
    two seeds."""
    seeds_included: bool
    """Whether the interval holds the variance between training seeds; not where a trained policy has one seed."""
    prompts_included: bool
    """Whether the interval holds the variance over prompts; not where there is one (or exact values stand for all)."""
    by_seed: tuple[float, ...] = ()
    """The same quantity of each seed; empty where several policies take part."""


def crossed_estimate(
    mean: float,
    prompts: Tensor,
    arms: Sequence[Tensor],
    *,
    fixed: Sequence[bool] = (),
    share: bool = False,
    unseen: float = 0.0,
    level: float = 0.95,
) -> Estimate:
    """The interval of `mean` over prompts and training seeds, which are crossed: every seed answers every prompt.

    prompts (P,): what each prompt adds, all seeds together; its mean is `mean`, or anything, since only the spread is
    read. arms: for each trained policy, cells (S_a, P): what seed and prompt add, the seeds of others averaged out. A
    statistic that is no mean comes by its linearisation: values that vary with the data as it does to first order. A
    policy of one seed adds no variance between seeds, and the estimate says so, unless `fixed` names it as one that was
    not trained. unseen: a variance over prompts that their values do not show.

    The variance between seeds is what the scatter of the seeds' means exceeds that which prompts and completions
    explain (the interaction of the two-way layout). With three seeds it has two degrees of freedom, so that it cannot
    share one quantile with the prompts: each source gets its own t interval, and their half-widths add in squares (the
    MOVER of Zou & Donner 2008). Prompts are often skewed, and t intervals then miss on one side: theirs is corrected by
    Hall's cubic transformation (Hall 1992); that of a share in [0, 1] is Wilson's (1927), with as many trials as its
    variance says, so that a share of 0 or 1 has a width too.

    No random number is drawn. Coverage of the nominal 95% is measured in benchmarks/coverage.py: 93 to 97% with 60
    log-normal prompts and 3 seeds, down to 90% with 2 seeds. With one prompt the interval is over seeds alone, with one
    seed over prompts alone, with both its ends are NaN. Raises ValueError where the shapes do not agree.
    """
    _check_prompts(prompts)
    _check_level(level)
    num_prompts = len(prompts)
    if any(cells.dim() != 2 or cells.shape[1] != num_prompts for cells in arms):
        shapes = ", ".join(str(tuple(cells.shape)) for cells in arms)
        raise ValueError(f"cells must be (S, {num_prompts}), a row a seed, but they have {shapes}")
    seed_variance, freedom = _seed_variance([cells.double() for cells in arms if len(cells) > 1])
    half_seeds = 0.0
    if seed_variance > 0:
        half_seeds = student_quantile((1 + level) / 2, freedom) * math.sqrt(seed_variance)
    prompt_error = math.sqrt(prompts.double().var().item() / num_prompts + unseen) if num_prompts > 1 else math.nan
    below = above = math.nan if math.isnan(seed_variance) else 0.0
    if num_prompts > 1:
        widths = _share_widths if share else _skewed_widths
        below, above = widths(mean, prompts.double(), prompt_error, level)
    low, high = mean - math.hypot(below, half_seeds), mean + math.hypot(above, half_seeds)
    if share:
        low, high = max(low, 0.0), min(high, 1.0)
    given = list(fixed) or [False] * len(arms)
    return Estimate(
        mean=mean,
        low=low,
        high=high,
        prompt_error=prompt_error,
        seed_error=math.sqrt(seed_variance),
        seeds_included=all(len(cells) > 1 or known for cells, known in zip(arms, given, strict=True)),
        prompts_included=num_prompts > 1,
        by_seed=tuple(arms[0].double().mean(1).tolist()) if len(arms) == 1 else (),
    )


def _seed_variance(arms: Sequence[Tensor]) -> tuple[float, float]:
    """(what other seeds would add to the variance of the sum of the means of cells (S, P), at least 0; its degrees of
    freedom by Satterthwaite 1946). NaN without an arm."""
    added, degrees = [], []
    for cells in arms:
        num_seeds, num_prompts = cells.shape
        scatter = cells.mean(1).var().item() / num_seeds
        if num_prompts > 1:
            residuals = cells - cells.mean(0) - cells.mean(1, keepdim=True) + cells.mean()
            interaction = residuals.square().sum().item() / ((num_seeds - 1) * (num_prompts - 1))
            scatter -= interaction / (num_seeds * num_prompts)
        added.append(scatter)
        degrees.append(num_seeds - 1)
    # The sum, not each, is held at 0: many arms would otherwise add up what luck alone leaves above it.
    if not added or not sum(added) > 0:
        return (0.0 if added else math.nan), math.nan
    shares = [max(x, 0.0) / max(added) for x in added]
    return sum(added), sum(shares) ** 2 / sum(x**2 / df for x, df in zip(shares, degrees, strict=True))


def _skewed_widths(mean: float, values: Tensor, error: float, level: float) -> tuple[float, float]:
    """How far the interval of a mean of P values goes below and above it: Student's, corrected for skewness."""
    num_prompts, quantile = len(values), student_quantile((1 + level) / 2, len(values) - 1)
    if num_prompts < 3 or not error > 0:
        return quantile * error, quantile * error
    cubes = ((values - values.mean()) / (num_prompts * error)).pow(3).sum().item()
    skewness = cubes * num_prompts**2 / ((num_prompts - 1) * (num_prompts - 2))  # that of the mean
    below, above = (sign * _unskewed(sign * quantile, skewness) * error for sign in (1, -1))
    return max(below, 0.0), max(above, 0.0)


def _unskewed(quantile: float, skewness: float) -> float:
    """Where the studentised mean has its quantile, if its transformation has it at `quantile`: the inverse of
    t + a t^2 / 3 + a^2 t^3 / 27 + a / 6 with a the skewness of the mean (Hall 1992, Transformation)."""
    if abs(skewness) < 1e-6:
        return quantile
    cube = 1 + skewness * (quantile - skewness / 6)
    return 3 / skewness * (math.copysign(abs(cube) ** (1 / 3), cube) - 1)


def _share_widths(mean: float, values: Tensor, error: float, level: float) -> tuple[float, float]:
    """Wilson's interval about a share, with as many trials as would give it this standard error."""
    quantile, spread = student_quantile((1 + level) / 2, len(values) - 1), mean * (1 - mean)
    if not spread > 0:
        trials = float(len(values))  # a share of 0 or 1 shows no scatter; every prompt is taken as one trial
    elif error > 0:
        trials = spread / error**2
    else:
        return 0.0, 0.0
    q2 = quantile**2 / trials
    centre = (mean + q2 / 2) / (1 + q2)
    half = quantile * math.sqrt(max(spread, 0.0) / trials + (q2 / quantile / 2) ** 2) / (1 + q2)
    return max(mean - centre + half, 0.0), max(centre + half - mean, 0.0)


def estimate_mean(values: Tensor, *, fixed: bool = False, share: bool = False, level: float = 0.95) -> Estimate:
    """The mean of values (S, P), S training seeds and P prompts; a vector (P,) is one seed. See `crossed_estimate`.

    fixed: the policy was not trained. share: the values lie in [0, 1] and so shall the interval.
    """
    cells = torch.atleast_2d(values).to("cpu", torch.float64)
    prompts = cells.mean(0)
    return crossed_estimate(prompts.mean().item(), prompts, [cells], fixed=[fixed], share=share, level=level)


def estimate_ratio(numerators: Tensor, denominators: Tensor, *, level: float = 0.95) -> Estimate:
    """The mean over S seeds of sum(numerators) / sum(denominators) over prompts, both (S, P): KL a token, say.

    Every seed is a policy with a ratio of its own; linearised, see `crossed_estimate`.
    """
    above, below = (torch.atleast_2d(x).to("cpu", torch.float64) for x in (numerators, denominators))
    ratio = above.mean(1, keepdim=True) / below.mean(1, keepdim=True)
    return estimate_mean(ratio + (above - ratio * below) / below.mean(1, keepdim=True), level=level)


def estimate_difference(
    a: Tensor, b: Tensor, *, fixed: tuple[bool, bool] = (False, False), level: float = 0.95
) -> Estimate:
    """The mean of a (S, P) less that of b (S', P), values or linearised ones.

    Prompts are paired: what is hard for both drops out. Training seeds are independent, also where they have the same
    numbers: two methods do different things with the same random numbers.
    """
    a, b = (torch.atleast_2d(x).to("cpu", torch.float64) for x in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the prompts must be the same, but there are {a.shape[1]} and {b.shape[1]}")
    prompts = a.mean(0) - b.mean(0)
    return crossed_estimate(prompts.mean().item(), prompts, [a, b], fixed=fixed, level=level)


class Verdict(NamedTuple):
    """Whether an estimate lies away from a value, with the variance between training seeds in it."""

    estimate: Estimate | None
    confirmed: bool
    reason: str
    """In plain words, no capital and no full stop."""

    @property
    def word(self) -> str:
        return "confirmed" if self.confirmed else "not confirmed"


def verdict(estimate: Estimate | None, *, against: float = 0.0) -> Verdict:
    """Confirmed where the interval does not contain `against` and has the variance between seeds in it.

    None (a curve does not reach the point asked for) is not confirmed, nor is anything with a trained policy of one
    seed: its next seed may come out on the other side, and nothing measured says how far.
    """
    if estimate is None:
        return Verdict(None, False, "not every run reaches this point")
    if not estimate.seeds_included:
        return Verdict(estimate, False, "one training seed does not show how much seeds differ")
    if not math.isfinite(estimate.low) or not math.isfinite(estimate.high):
        return Verdict(estimate, False, "too few values for an interval")
    over = "prompts and seeds" if estimate.prompts_included else "seeds"
    if estimate.low <= against <= estimate.high:
        return Verdict(estimate, False, f"the interval over {over} contains {against:g}")
    side = "above" if estimate.low > against else "below"
    return Verdict(estimate, True, f"the interval over {over} lies {side} {against:g}")


@lru_cache(maxsize=1024)
def student_quantile(probability: float, freedom: float) -> float:
    """The quantile of Student's t distribution, for any degrees of freedom >= 1 and a probability from 0.5 on.

    With t = sqrt(df) tan x the distribution's integral is that of cos(x)^(df - 1), solved for x by Newton's method from
    the normal quantile, which lies below. Raises ValueError for other arguments.
    """
    if not (0.5 <= probability < 1 and freedom >= 1):
        raise ValueError(f"no quantile of Student's t at {probability} with {freedom} degrees of freedom")
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    simpson = torch.tensor([1.0, *[4.0, 2.0] * 99, 4.0, 1.0], dtype=torch.float64) / 600
    half = math.sqrt(math.pi) / 2 * math.exp(math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2))
    x = math.atan(torch.special.ndtri(torch.tensor(probability, dtype=torch.float64)).item() / math.sqrt(freedom))
    for _ in range(100):
        integral = x * (simpson @ torch.cos(x * grid) ** (freedom - 1)).item()
        step = ((2 * probability - 1) * half - integral) / math.cos(x) ** (freedom - 1)
        x += step
        if abs(step) <= 1e-13 * x:
            break
    return math.sqrt(freedom) * math.tan(x)
