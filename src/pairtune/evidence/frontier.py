"""More reward for less drift? Points and curves of KL against reward, with intervals over prompts and seeds together.

An arm is one method with one setting, trained with S seeds, each evaluated E times on the same P prompts. What is
asked of an arm is the mean over its seeds of what each run is worth. x is the sequence KL to the reference in nats, y
the reward.

Between two evaluations a run is taken as a straight line over the square root of the KL. Near its start the best that
any policy can do rises with that root, in which Gao et al. (2022, arXiv 2210.10760) describe training too: a line over
the KL itself lies far below, and would set back whoever moves far between two evaluations. Where its KL goes up and
down, the run is at a KL where it first crosses it in time: what a user gets who trains until then, and no choice by the
reward that would flatter it. Nothing is extrapolated: a KL that one seed of an arm does not reach gives None.

Every interval is that of `statistics.crossed_estimate`. A point on a curve is no mean, but it moves with the means of
its evaluations by known derivatives; those carry the spread of prompts over to it, through the KL as well as the
reward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pairtune.evidence.exact import EnumerableTask, optimal_frontier
from pairtune.maths.statistics import (
    Estimate,
    Interval,
    Verdict,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
    student_quantile,
    verdict,
)

Metric = Literal["kl", "kl_k1", "reward", "length", "truncated"]
FitKind = Literal["linear", "sqrt"]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """The evaluations of one arm: S seeds, E evaluations, P prompts; means over a prompt's completions, float64.

    Exact values of an enumerable task go in with P = 1, the mean over all prompts: intervals are then over seeds.
    Leave a prompt out that any cell has no value for: NaN goes through to every estimate that reads it. The last
    evaluation is the end of each seed's training, whose steps may differ. Raises ValueError where the shapes do not
    agree.
    """

    steps: Tensor
    """(E,) int64, ascending; the last is the largest of those at which the seeds ended."""
    kl: Tensor
    """(S, E, P) nats a completion."""
    kl_k1: Tensor
    """(S, E, P) nats a completion, the plain estimate as a cross-check."""
    reward: Tensor
    """(S, E, P)"""
    length: Tensor
    """(S, E, P) tokens, EOS included."""
    truncated: Tensor | None = None
    """(S, E, P) share of completions that the cap cut; None where it is not known."""

    def __post_init__(self) -> None:
        measured = {name: getattr(self, name) for name in ("kl", "kl_k1", "reward", "length", "truncated")}
        shapes = {name: tuple(values.shape) for name, values in measured.items() if values is not None}
        if len(self.kl.shape) != 3 or len(set(shapes.values())) > 1 or self.kl.shape[1] != len(self.steps):
            raise ValueError(f"all must be (S, {len(self.steps)}, P), as many evaluations as steps, but are {shapes}")

    @property
    def num_seeds(self) -> int:
        return self.kl.shape[0]

    @property
    def num_prompts(self) -> int:
        return self.kl.shape[2]

    @property
    def has_rewards(self) -> bool:
        """Whether every evaluation of every seed has a reward; without, nothing that needs one can be said."""
        return bool(self.reward.isfinite().all())

    def at(self, metric: Metric, index: int) -> Tensor:
        """(S, P) of one metric at the evaluation of that index, from the end where negative. Raises ValueError where
        the metric is not known."""
        values = getattr(self, metric)
        if values is None:
            raise ValueError(f"{metric} is not known of these evaluations")
        return values[:, index]


class FrontierPoint(NamedTuple):
    """One evaluation of an arm."""

    step: int
    """At the end the largest of the seeds' last steps."""
    kl: Estimate
    kl_k1: Estimate
    reward: Estimate


def frontier(evaluated: Evaluated, *, level: float = 0.95) -> list[FrontierPoint]:
    """A point for each of the E evaluations, in the order of training; `kl.by_seed`, `reward.by_seed` are the runs'."""
    return [
        FrontierPoint(
            int(step),
            estimate_mean(evaluated.kl[:, i], level=level),
            estimate_mean(evaluated.kl_k1[:, i], level=level),
            estimate_mean(evaluated.reward[:, i], level=level),
        )
        for i, step in enumerate(evaluated.steps)
    ]


# ------------------------------------------------------------------------------------------------------ along the curve

Curve = Callable[[Tensor, Tensor], Tensor]
"""(KL, reward), both (S, E) of means over prompts -> (S,), what is asked of each run; differentiable."""


def _cells(evaluated: Evaluated, curve: Curve) -> Tensor:
    """(S, P): values whose mean over prompts is what `curve` says of each run, and which vary with the prompts as it
    does to first order."""
    measured = [values.to("cpu", torch.float64) for values in (evaluated.kl, evaluated.reward)]
    means = [values.mean(-1).requires_grad_() for values in measured]
    with torch.enable_grad():
        found = curve(*means)
        gradients = torch.autograd.grad(found.sum(), means, materialize_grads=True)
    moved = [
        (gradient[..., None] * (values - mean[..., None])).sum(1)
        for gradient, values, mean in zip(gradients, measured, means, strict=True)
    ]
    return (found[:, None] + moved[0] + moved[1]).detach()


def _crossing(along: Tensor, across: Tensor, at: float) -> Tensor:
    """`across` where each path `along`, both (S, E), first comes to `at`, on straight lines; (S,), NaN where never."""
    starts, ends = along[:, :-1], along[:, 1:]
    crosses = (starts.detach() - at) * (ends.detach() - at) <= 0
    seeds = torch.arange(len(along))
    if not crosses.shape[1]:
        return along.sum(1) * math.nan
    first = crosses.int().argmax(1)
    start, end = starts[seeds, first], ends[seeds, first]
    rise = end - start
    part = torch.where(rise == 0, 0, (at - start) / torch.where(rise == 0, 1, rise))
    values = across[seeds, first] * (1 - part) + across[seeds, first + 1] * part
    return torch.where(crosses.any(1), values, math.nan)


def _reward_cells(evaluated: Evaluated, kl: float) -> Tensor:
    return _cells(evaluated, lambda kls, rewards: _crossing(_square_root(kls), rewards, _root(kl)))


def _kl_cells(evaluated: Evaluated, reward: float) -> Tensor:
    return _cells(evaluated, lambda kls, rewards: _crossing(rewards, _square_root(kls), reward).square())


def _root(kl: float) -> float:
    """Its square root; of a KL below 0, to which no run comes, a number to which no square root comes."""
    return math.sqrt(kl) if kl >= 0 else -1.0


def _area_cells(evaluated: Evaluated, start: float, kl: float) -> Tensor:
    """The reward at the first crossing, integrated over all KLs between: what the segments add that reach a KL for the
    first time. On a segment the reward is a + b sqrt(KL), and the integral over KLs of that a KL + 2/3 b KL^1.5."""

    def area(kls: Tensor, rewards: Tensor) -> Tensor:
        roots = _square_root(kls)
        reached = roots.cummax(1).values[:, :-1].clamp(_root(start), _root(kl))
        until = torch.maximum(roots[:, 1:].clamp(_root(start), _root(kl)), reached)
        slope = rewards.diff(dim=1) / torch.where(until > reached, roots.diff(dim=1), 1)
        level = rewards[:, :-1] - slope * roots[:, :-1]
        found = (level * (until**2 - reached**2) + 2 / 3 * slope * (until**3 - reached**3)).sum(1)
        return torch.where((kls[:, 0] <= start) & (kls.amax(1) >= kl), found, math.nan)

    return _cells(evaluated, area)


def kl_range(*arms: Evaluated) -> tuple[float, float] | None:
    """The KLs, from and to, that every seed of every arm passes; None where there is none."""
    return _range([arm.kl.mean(-1) for arm in arms])


def reward_range(*arms: Evaluated) -> tuple[float, float] | None:
    """The rewards, from and to, that every seed of every arm passes; None where there is none."""
    return _range([arm.reward.mean(-1) for arm in arms])


def _range(paths: Sequence[Tensor]) -> tuple[float, float] | None:
    low = max(path.amin(1).max().item() for path in paths)
    high = min(path.amax(1).min().item() for path in paths)
    return (low, high) if low <= high else None


def reward_at_kl(evaluated: Evaluated, kl: float, *, level: float = 0.95) -> Estimate | None:
    """The reward where each seed's run first crosses `kl` nats, in the mean over seeds; None if one does not."""
    return _estimate(_reward_cells(evaluated, kl), level)


def kl_at_reward(evaluated: Evaluated, reward: float, *, level: float = 0.95) -> Estimate | None:
    """The KL in nats where each seed's run first crosses `reward`, in the mean over seeds; None if one does not."""
    return _estimate(_kl_cells(evaluated, reward), level)


def area_under_frontier(
    evaluated: Evaluated, kl: float, start: float | None = None, *, level: float = 0.95
) -> Estimate | None:
    """The integral of the reward by the KL, from `start` to `kl` nats, in the mean over seeds; reward times nats.

    The reward at a KL is that of the first crossing. Divided by kl - start it is the mean reward along the frontier.
    start: where None, the KL of the first evaluation, the largest of all seeds'. None if a seed begins above `start` or
    does not reach `kl`. Raises ValueError unless kl is above start.
    """
    start = _start(evaluated) if start is None else start
    _check_above(start, kl)
    return _estimate(_area_cells(evaluated, start, kl), level)


def _start(*arms: Evaluated) -> float:
    return max(arm.kl[:, 0].mean(-1).max().item() for arm in arms)


def _check_above(start: float, kl: float) -> None:
    if not kl > start:
        raise ValueError(f"the area ends at a KL of {kl}, which is not above its start at {start}")


def _estimate(cells: Tensor, level: float) -> Estimate | None:
    return None if cells.isnan().any() else estimate_mean(cells, level=level)


# --------------------------------------------------------------------------------------------------------- differences


def compare_reward_at_kl(a: Evaluated, b: Evaluated, kl: float, *, level: float = 0.95) -> Verdict:
    """Reward of `a` less that of `b` at a matched KL: prompts paired, seeds independent. Above 0: `a` is better."""
    return _compare(_reward_cells(a, kl), _reward_cells(b, kl), level)


def compare_kl_at_reward(a: Evaluated, b: Evaluated, reward: float, *, level: float = 0.95) -> Verdict:
    """KL of `a` less that of `b` at a matched reward: prompts paired, seeds independent. Below 0: `a` is better."""
    return _compare(_kl_cells(a, reward), _kl_cells(b, reward), level)


def compare_area(a: Evaluated, b: Evaluated, kl: float, start: float | None = None, *, level: float = 0.95) -> Verdict:
    """Area of `a` less that of `b` up to a common KL, from a common start. Above 0: `a` is better."""
    start = _start(a, b) if start is None else start
    _check_above(start, kl)
    return _compare(_area_cells(a, start, kl), _area_cells(b, start, kl), level)


def compare_at(a: Evaluated, b: Evaluated, metric: Metric, index: int = -1, *, level: float = 0.95) -> Verdict:
    """A metric of `a` less that of `b` at the evaluation of that index (the last: the end of training), not at equal
    KL."""
    return _compare(a.at(metric, index), b.at(metric, index), level)


def _compare(a: Tensor, b: Tensor, level: float) -> Verdict:
    if a.isnan().any() or b.isnan().any():
        return verdict(None)
    return verdict(estimate_difference(a, b, level=level))


# ---------------------------------------------------------------------------------------------------------------- fits


class Fit(NamedTuple):
    """reward = intercept + slope * f(KL), by least squares through the evaluations of each seed; means over seeds."""

    kind: FitKind
    """f: the KL itself (the P3O paper's figure 2) or its square root (as the exact frontier begins)."""
    intercept: Estimate
    slope: Estimate
    r_squared: float
    """1 - residual over total sum of squares, each seed about its own line and its own mean."""
    residual_std: float
    """Standard deviation of the residuals, reward units, two degrees of freedom a seed taken off."""

    def reward(self, kl: float) -> float:
        """The line at a KL in nats."""
        return self.intercept.mean + self.slope.mean * (math.sqrt(kl) if self.kind == "sqrt" else kl)


def fit_frontier(evaluated: Evaluated, kind: FitKind, *, level: float = 0.95) -> Fit | None:
    """None with fewer than three evaluations, or where a seed's KL does not vary."""
    kls, rewards = (values.mean(-1).to("cpu", torch.float64) for values in (evaluated.kl, evaluated.reward))
    num_seeds, num_evaluations = kls.shape
    if num_evaluations < 3 or (kls.amax(1) == kls.amin(1)).any():
        return None

    def line(kls: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(intercept (S,), slope (S,), residuals (S, E))"""
        x = _square_root(kls) if kind == "sqrt" else kls
        x_mean, y_mean = x.mean(1, keepdim=True), rewards.mean(1, keepdim=True)
        slope = ((x - x_mean) * (rewards - y_mean)).sum(1) / (x - x_mean).square().sum(1)
        intercept = y_mean[:, 0] - slope * x_mean[:, 0]
        return intercept, slope, rewards - intercept[:, None] - slope[:, None] * x

    residual = line(kls, rewards)[2].square().sum().item()
    total = (rewards - rewards.mean(1, keepdim=True)).square().sum().item()
    return Fit(
        kind,
        intercept=estimate_mean(_cells(evaluated, lambda k, r: line(k, r)[0]), level=level),
        slope=estimate_mean(_cells(evaluated, lambda k, r: line(k, r)[1]), level=level),
        r_squared=1 - residual / total if total > 0 else math.nan,
        residual_std=math.sqrt(residual / (num_seeds * (num_evaluations - 2))),
    )


def _square_root(kls: Tensor) -> Tensor:
    """0 with derivative 0 at 0 and below: a run begins at a KL of 0 that no other prompts would change."""
    positive = kls > 0
    return torch.where(positive, torch.where(positive, kls, 1).sqrt(), 0)


# ----------------------------------------------------------------------------------------------------- reference curves


class BestOfNPoint(NamedTuple):
    """The best of n completions of the starting policy."""

    n: int
    kl_bound: float
    """Nats: log n - (n - 1) / n. The KL itself is at most that, and less where rewards tie (Beirami et al. 2024)."""
    reward: Estimate


def best_of_n_curve(rewards: Tensor, sizes: Sequence[int] | None = None, *, level: float = 0.95) -> list[BestOfNPoint]:
    """The reference curve of best-of-n, from rewards (P, N) of N completions a prompt of the starting policy.

    The mean over all subsets of n of the N completions of the subset's largest reward, which is unbiased and wastes
    nothing (Nakano et al. 2021, appendix I). NaN rewards do not count; a prompt with fewer than n others is left out.
    sizes: powers of 2 up to N where None. Sizes that no prompt has completions for are left out.
    """
    ordered = rewards.to("cpu", torch.float64).nan_to_num(torch.inf).sort(1).values
    count = rewards.isfinite().sum(1).cpu()
    num_completions = rewards.shape[1]
    if sizes is None:
        sizes = [2**i for i in range(num_completions.bit_length())]
    points = []
    for n in sizes:
        if n < 1:
            raise ValueError(f"n must be at least 1, but it is {n}")
        enough = count >= n
        if not enough.any():
            continue
        # The i-th smallest of N is the best of comb(i - 1, n - 1) of the comb(N, n) subsets.
        rank, total = torch.arange(1, num_completions + 1, dtype=torch.float64), count[enough, None].double()
        weights = (_log_comb(rank - 1, n - 1) - _log_comb(total, n)).exp()
        weights = torch.where((rank >= n) & (rank <= total), weights, 0)
        best = (weights * torch.where(weights > 0, ordered[enough], 0)).sum(1)
        bound = math.log(n) - (n - 1) / n
        points.append(BestOfNPoint(n, bound, estimate_mean(best, fixed=True, level=level)))
    return points


def _log_comb(n: Tensor, k: int) -> Tensor:
    return torch.lgamma(n + 1) - math.lgamma(k + 1) - torch.lgamma(n - k + 1)


def optimal_reward(task: EnumerableTask, ref_logprobs: Tensor, kl: Tensor) -> Tensor:
    """R*(KL), the most reward that any policy has at KLs of any shape (nats, means over prompts): the exact frontier.

    ref_logprobs: (P, N) float64 as `exact.sequence_logprobs` gives them. Interpolated between the optima of 400 betas
    with the frontier's own slope, dR/dKL = beta, to about nine digits; flat once every prompt has its best completion.
    """
    asked = kl.to("cpu", torch.float64).clamp(min=0).sqrt()
    start = (ref_logprobs.exp() * task.rewards).sum(-1).mean()
    spread = task.rewards.max() - task.rewards.min()
    if spread == 0:
        return torch.where(asked.isnan(), math.nan, start)
    betas = spread * torch.logspace(4, -4, 400, dtype=torch.float64)
    kls, rewards = optimal_frontier(task, ref_logprobs, betas)
    # Over sqrt(KL) the curve has a finite slope at 0 too.
    x, slope = kls.clamp(min=0).sqrt(), 2 * betas * kls.clamp(min=0).sqrt()
    rises = x > torch.cat([torch.zeros(1), x.cummax(0).values[:-1]]) + 1e-9
    x, y = torch.cat([torch.zeros(1), x[rises]]), torch.cat([start[None], rewards[rises]])
    slope = torch.cat([slope[rises][:1], slope[rises]])
    right = torch.searchsorted(x, asked).clamp(1, len(x) - 1)
    left, width = right - 1, x[right] - x[right - 1]
    t = ((asked - x[left]) / width).clamp(max=1)
    s = 1 - t
    inside = y[left] * (1 + 2 * t) * s**2 + y[right] * (1 + 2 * s) * t**2
    return inside + width * s * t * (slope[left] * s - slope[right] * t)


def gap_to_optimum(task: EnumerableTask, ref_logprobs: Tensor, kl: Tensor, reward: Tensor) -> Tensor:
    """R*(KL) - R of points of any shape, reward units: how far each lies below the exact frontier.

    Of exact values it is never below 0; (S, 1) of them through `estimate_mean` gives its interval over seeds.
    """
    return optimal_reward(task, ref_logprobs, kl) - reward.to("cpu", torch.float64)


# ------------------------------------------------------------------------------------------------------------- table 1


class Table1Row(NamedTuple):
    """A line of the P3O paper's table 1, for one arm at one evaluation."""

    reward: Estimate
    kl: Estimate
    """Nats a completion."""
    kl_per_token: Estimate
    """Nats a token, ratio of sums."""
    tokens: Estimate
    finished: Estimate | None
    """Share of completions that ended by themselves."""
    distinct: Estimate | None


def table1_row(
    evaluated: Evaluated, index: int = -1, *, distinct: Sequence[Interval] = (), level: float = 0.95
) -> Table1Row:
    """distinct: distinct-n of each seed with its 95% interval over prompts, as the evaluations of its run hold it."""
    kl, length = evaluated.at("kl", index), evaluated.at("length", index)
    return Table1Row(
        reward=estimate_mean(evaluated.at("reward", index), level=level),
        kl=estimate_mean(kl, level=level),
        kl_per_token=estimate_ratio(kl, length, level=level),
        tokens=estimate_mean(length, level=level),
        finished=None
        if evaluated.truncated is None
        else estimate_mean(1 - evaluated.at("truncated", index), share=True, level=level),
        distinct=combine_seeds(distinct, level=level) if distinct else None,
    )


def combine_seeds(runs: Sequence[Interval], *, level: float = 0.95) -> Estimate:
    """One estimate from a metric of which only each seed's mean and 95% interval over the same prompts are known.

    The runs' errors over prompts are taken as wholly shared and none of the scatter of seeds as explained by them,
    which errs to the wide side. `level` is that of the seeds' part. Raises ValueError for no run.
    """
    if not runs:
        raise ValueError("no run to combine")
    means, lows, highs = torch.tensor([tuple(run) for run in runs], dtype=torch.float64).unbind(1)
    num_seeds, mean = len(means), means.mean().item()
    seed_error = (means.var() / num_seeds).sqrt().item() if num_seeds > 1 else math.nan
    half = student_quantile((1 + level) / 2, num_seeds - 1) * seed_error if num_seeds > 1 else 0.0
    below, above = (means - lows).mean().item(), (highs - means).mean().item()
    return Estimate(
        mean=mean,
        low=mean - math.hypot(below, half),
        high=mean + math.hypot(above, half),
        prompt_error=(below + above) / 2 / NormalDist().inv_cdf(0.975),
        seed_error=seed_error,
        seeds_included=num_seeds > 1,
        prompts_included=not math.isnan(below),
        by_seed=tuple(means.tolist()),
    )
