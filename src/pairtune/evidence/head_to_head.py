"""Which policy wins on the same prompts? Win rates, their matrix, a Bradley-Terry ranking, position and length bias.

A game is one completion of each of two policies for one prompt; ties are half a win. Intervals are over prompts and
training seeds together, as those of the frontier are; games of one prompt are never taken as independent.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pairtune.errors import PairtuneError
from pairtune.maths.ranking import bradley_terry, bradley_terry_derivatives
from pairtune.maths.statistics import Estimate, crossed_estimate


@dataclass(frozen=True, eq=False)
class Games:
    """All games of a first policy with S seeds against a second with S' on P prompts, G games each.

    Raises ValueError where the shapes do not agree or an outcome lies outside [0, 1].
    """

    outcomes: Tensor
    """(S, S', P, G) float64: 1 where the first won, 0 where the second did, 0.5 for a tie, any probability between;
    NaN where there is no verdict."""
    length_differences: Tensor | None = None
    """(S, S', P, G) float64, tokens (or characters) of the first's completion less the second's."""
    fixed: tuple[bool, bool] = (False, False)
    """Which of the two was not trained (a starting policy): one seed is all it has."""

    def __post_init__(self) -> None:
        shape = tuple(self.outcomes.shape)
        if len(shape) != 4:
            raise ValueError(f"outcomes must be (S, S', P, G), but they have {shape}")
        if self.length_differences is not None and tuple(self.length_differences.shape) != shape:
            raise ValueError(f"length_differences are {tuple(self.length_differences.shape)}, the outcomes {shape}")
        if ((self.outcomes < 0) | (self.outcomes > 1)).any():
            raise ValueError("outcomes must lie between 0 and 1")

    @classmethod
    def from_scores(
        cls,
        first: Tensor,
        second: Tensor,
        first_lengths: Tensor | None = None,
        second_lengths: Tensor | None = None,
        *,
        fixed: tuple[bool, bool] = (False, False),
    ) -> Games:
        """The larger score wins. first (S, P, K), second (S', P, K'), lengths of the same shapes: all K * K' pairs of
        completions of a prompt play, G = K * K'. A NaN score plays no game."""

        def pairs(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            """Broadcast against each other to (S, S', P, K, K')."""
            a, b = (x.to("cpu", torch.float64) for x in (a, b))
            return a[:, None, :, :, None], b[None, :, :, None, :]

        if first.shape[1] != second.shape[1]:
            raise ValueError(f"the prompts must be the same, but there are {first.shape[1]} and {second.shape[1]}")
        a, b = pairs(first, second)
        outcomes = ((a > b).double() + 0.5 * (a == b)).masked_fill(a.isnan() | b.isnan(), math.nan)
        differences = None
        if first_lengths is not None and second_lengths is not None:
            longer, shorter = pairs(first_lengths, second_lengths)
            differences = (longer - shorter).flatten(3)
        return cls(outcomes.flatten(3), differences, fixed)

    @classmethod
    def from_verdicts(cls, outcomes: Tensor, length_differences: Tensor | None = None) -> Games:
        """A judge's verdicts (P,) or (P, G) on one seed of each, NaN where it gave none; or (S, S', P, G)."""

        def whole(x: Tensor) -> Tensor:
            x = x.to("cpu", torch.float64)
            x = x[:, None] if x.dim() == 1 else x
            return x[None, None] if x.dim() == 2 else x

        return cls(whole(outcomes), None if length_differences is None else whole(length_differences))

    def swapped(self) -> Games:
        """The same games seen from the second policy."""
        differences = None if self.length_differences is None else -self.length_differences.transpose(0, 1)
        return Games(1 - self.outcomes.transpose(0, 1), differences, (self.fixed[1], self.fixed[0]))

    @property
    def num_prompts(self) -> int:
        """Prompts of which at least one game has a verdict."""
        return int((~self.outcomes.isnan()).any(-1).any(0).any(0).sum())

    @property
    def share(self) -> float:
        """The share of games with a verdict that the first won, ties half; NaN without a verdict."""
        return self.outcomes.nanmean().item()

    def spread(self, values: Tensor | None = None) -> Tensor:
        """(S, S', P): what each prompt and pair of seeds adds to the mean of values (S, S', P, G) over the games with a
        verdict, less that mean; of the share of wins where None. Prompts with more games count for more."""
        values = self.outcomes if values is None else values
        played = ~self.outcomes.isnan()
        values = torch.where(played, values, 0)
        count = played.sum(-1)
        mean = values.sum() / count.sum()
        return (values.sum(-1) - mean * count) / count.double().mean()

    @property
    def one_sided(self) -> bool:
        """Whether one of the two won every game, so that the games show no scatter."""
        return self.share in (0.0, 1.0)


def win_rate(games: Games, *, level: float = 0.95) -> Estimate:
    """The share of games that the first won, ties half, in [0, 1], over all games that have a verdict.

    A policy that won every game has an interval too. `win_rate(games.swapped())` is 1 minus this, end for end.
    """
    spread, share = games.spread(), games.share
    arms = [spread.mean(1), spread.mean(0)]
    return crossed_estimate(share, spread.mean((0, 1)), arms, fixed=games.fixed, share=True, level=level)


class Outcomes(NamedTuple):
    """Shares of all games, decided and not."""

    won: float
    tied: float
    lost: float
    missing: float
    """Of all games, those without a verdict; the other three are shares of the games that have one."""


def outcome_shares(games: Games) -> Outcomes:
    """A probability above 0.5 counts as won, below as lost."""
    played = games.outcomes[~games.outcomes.isnan()]
    won, lost = ((played > 0.5).double().mean().item(), (played < 0.5).double().mean().item())
    tied = (played == 0.5).double().mean().item()
    return Outcomes(won, tied, lost, missing=1 - played.numel() / games.outcomes.numel())


class WinMatrix(NamedTuple):
    """Every policy against every other."""

    names: tuple[str, ...]
    rates: list[list[Estimate | None]]
    """(M, M): how often row beat column; rates[i][j].mean + rates[j][i].mean is exactly 1. None on the diagonal and
    where the two never met."""


def score_games(
    scores: Mapping[str, Tensor], lengths: Mapping[str, Tensor] | None = None, *, fixed: Collection[str] = ()
) -> dict[tuple[str, str], Games]:
    """The games of every pair of policies from scores (S, P, K) of each, on the same P prompts in the same order.

    fixed: names of the policies that were not trained. Raises PairtuneError where prompts differ in number.
    """
    counts = {name: values.shape[1] for name, values in scores.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise PairtuneError(f"policies meet on the same prompts, but have different numbers of them ({listed}).")
    return {
        (a, b): Games.from_scores(
            scores[a],
            scores[b],
            None if lengths is None else lengths[a],
            None if lengths is None else lengths[b],
            fixed=(a in fixed, b in fixed),
        )
        for a, b in combinations(scores, 2)
    }


def win_matrix(games: Mapping[tuple[str, str], Games], *, level: float = 0.95) -> WinMatrix:
    """games: (first, second) -> their games, each pair once. Policies stand in the order in which they are named."""
    names = _names(games)
    rates: list[list[Estimate | None]] = [[None] * len(names) for _ in names]
    for (a, b), played in games.items():
        if played.num_prompts:
            rate = win_rate(played, level=level)
            rates[names.index(a)][names.index(b)] = rate
            # Not from the swapped games, whose sum might round another way.
            other = rate._replace(mean=1 - rate.mean, low=1 - rate.high, high=1 - rate.low)
            rates[names.index(b)][names.index(a)] = other
    return WinMatrix(names, rates)


def _names(games: Mapping[tuple[str, str], Games]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for pair in games for name in pair))


class Ranking(NamedTuple):
    """Bradley-Terry strengths: a policy beats another with probability sigma(difference of strengths)."""

    names: tuple[str, ...]
    """In the order of WinMatrix.names, not sorted."""
    strengths: list[Estimate]
    """Nats (log-odds), mean 0; Elo points are 400 / ln 10 = 173.7 times that."""
    order: tuple[int, ...]
    """Indices of the policies, strongest first."""


def ranking(games: Mapping[tuple[str, str], Games], *, prior: float = 1.0, level: float = 0.95) -> Ranking:
    """The strengths of all policies from all games, with intervals over prompts and seeds.

    Each pair counts as many games as it has prompts with a verdict, so that more completions or seeds do not weigh
    more; prior: so many games more that each pair has split. What a pair adds to the variance that one of them won
    throughout is taken from the fit, since its games show no scatter. A policy without a verdict is left out: nobody
    is ranked where no game has one. Raises ValueError where a policy's seeds or the prompts differ between its games.
    """
    games = {pair: played for pair, played in games.items() if played.num_prompts}
    if not games:
        return Ranking((), [], ())
    names = _names(games)
    index = {name: i for i, name in enumerate(names)}
    wins, counts = torch.zeros(2, len(names), len(names), dtype=torch.float64)
    for (a, b), played in games.items():
        i, j, num_prompts = index[a], index[b], played.num_prompts
        wins[i, j], wins[j, i] = num_prompts * played.share, num_prompts * (1 - played.share)
        counts[i, j] = counts[j, i] = num_prompts
    strengths = bradley_terry(wins, prior=prior)
    derivatives = bradley_terry_derivatives(strengths, counts, prior=prior)
    prompts, arms, unseen = _strength_cells(games, index, strengths, derivatives)
    fixed = [any(name == pair[i] and g.fixed[i] for pair, g in games.items() for i in (0, 1)) for name in names]
    estimates = [
        crossed_estimate(
            strengths[k].item(),
            prompts[k],
            [cells[k] for cells in arms],
            fixed=fixed,
            unseen=unseen[k].item(),
            level=level,
        )
        for k in range(len(names))
    ]
    return Ranking(names, estimates, tuple(strengths.argsort(descending=True, stable=True).tolist()))


def _strength_cells(
    games: Mapping[tuple[str, str], Games], index: Mapping[str, int], strengths: Tensor, derivatives: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """What prompts (M, P), the seeds of each policy (a list of M (M, S_a, P)) and one-sided pairs (M,), as a variance,
    add to the M strengths."""
    prompts, arms = torch.zeros(()), [torch.zeros(()) for _ in index]
    unseen = torch.zeros(len(index), dtype=torch.float64)
    for (a, b), played in games.items():
        i, j = index[a], index[b]
        moved = derivatives[:, i, j, None, None, None] * played.spread()
        of_first, of_second = moved.mean(2), moved.mean(1)
        for name, sums, cells in ((a, arms[i], of_first), (b, arms[j], of_second)):
            if sums.dim() and sums.shape != cells.shape:
                shapes = f"{tuple(sums.shape[1:])} and {tuple(cells.shape[1:])}"
                raise ValueError(f"{name} has (seeds, prompts) {shapes} in its games, which must be the same")
        prompts = prompts + moved.mean((1, 2))
        arms[i], arms[j] = arms[i] + of_first, arms[j] + of_second
        if played.one_sided:
            probability = torch.sigmoid(strengths[i] - strengths[j])
            unseen += derivatives[:, i, j] ** 2 * probability * (1 - probability) / played.num_prompts
    return prompts, arms, unseen


class PositionBias(NamedTuple):
    """What the order in which two completions are shown does to a judge; shares of pairs judged in both orders."""

    consistent: Estimate
    """The same completion in both orders, or a tie in both."""
    first: Estimate
    """Whichever was shown first, in both orders."""
    second: Estimate
    """Whichever was shown second, in both orders."""
    won_by_first_shown: Estimate
    """The share of single verdicts for the completion shown first, ties half; 0.5 without bias on average."""


def position_bias(as_shown: Tensor, swapped: Tensor, *, level: float = 0.95) -> PositionBias:
    """Verdicts (P,) or (P, G) in both orders: whether the completion shown FIRST won (1, 0, 0.5, NaN for none).

    as_shown: the first policy's completion first; swapped: the second policy's first. A pair counts with both
    verdicts.
    """
    none = as_shown.isnan() | swapped.isnan()

    def share(judged: Tensor, missing: Tensor = none) -> Estimate:
        return win_rate(Games.from_verdicts(judged.double().masked_fill(missing, math.nan)), level=level)

    first, second = (as_shown > 0.5) & (swapped > 0.5), (as_shown < 0.5) & (swapped < 0.5)
    return PositionBias(
        consistent=share(torch.sign(as_shown - 0.5) == torch.sign(0.5 - swapped)),
        first=share(first),
        second=share(second),
        won_by_first_shown=share((as_shown.double() + swapped.double()) / 2),
    )


def both_orders(as_shown: Tensor, swapped: Tensor) -> Tensor:
    """One outcome for the first policy from two verdicts of the completion shown first, any shape.

    Verdicts that contradict each other make a tie (the rule of MT-bench), as does a single tie; a missing one makes the
    pair missing. A probability counts by its side of 0.5.
    """
    one, other = torch.sign(as_shown.double() - 0.5), torch.sign(0.5 - swapped.double())
    agreed = 0.5 + 0.5 * torch.where(one == other, one, 0)
    return agreed.masked_fill(as_shown.isnan() | swapped.isnan(), math.nan)


class LengthBin(NamedTuple):
    """Games of one range of length differences."""

    low: float
    high: float
    share: float
    """Of all games."""
    win_rate: Estimate


def win_rate_by_length(games: Games, num_bins: int = 5, *, level: float = 0.95) -> list[LengthBin]:
    """Win rate in bins of the length difference that hold about equally many games; equal differences stay together.

    From the shortest to the longest; fewer bins where few differences occur. Raises ValueError where the lengths are
    not known.
    """
    differences = _differences(games)
    played = ~(games.outcomes.isnan() | differences.isnan())
    known = differences[played]
    if not len(known):
        return []
    cuts = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)[1:-1]
    edges = known.sort().values[(cuts * len(known)).long()].unique()
    bins = torch.bucketize(differences, edges, right=True)
    found = []
    for i in range(len(edges) + 1):
        inside = (bins == i) & played
        if inside.any():
            members = differences[inside]
            rate = win_rate(Games(games.outcomes.masked_fill(~inside, math.nan), fixed=games.fixed), level=level)
            share = len(members) / len(known)
            found.append(LengthBin(members.min().item(), members.max().item(), share, rate))
    return found


def _differences(games: Games) -> Tensor:
    if games.length_differences is None:
        raise ValueError("the games have no length_differences")
    return games.length_differences


class LengthControlled(NamedTuple):
    """P(first wins) = sigma(theta + phi * tanh(length difference / its standard deviation))."""

    win_rate: Estimate
    """sigma(theta): what it would be between completions of one length."""
    raw: Estimate
    phi: Estimate
    """Log-odds; above 0 the longer completion tends to win."""


def length_controlled(games: Games, *, level: float = 0.95) -> LengthControlled:
    """The minimal form of AlpacaEval 2's length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475): without
    its term for a prompt's difficulty.

    Both coefficients are fitted together and the intervals hold the fit's own error, by prompt and seed: each game's
    pull on them (the sandwich), also by way of the standard deviation, instead of refits of resampled prompts. All
    games together count as many as there are prompts. One more at equal length is split, and phi has a normal prior of
    standard deviation 4, so that a policy that won everything has finite coefficients. NaN without a verdict. Raises
    ValueError where the lengths are not known.
    """
    differences = _differences(games)
    outcomes = games.outcomes.masked_fill(differences.isnan(), math.nan)
    games = Games(outcomes, differences, games.fixed)
    played, raw = ~outcomes.isnan(), win_rate(games, level=level)
    if not played.any():
        return LengthControlled(raw, raw, raw)
    length, won = differences[played], outcomes[played]
    scale = length.std(correction=0) if len(length.unique()) > 1 else torch.ones((), dtype=torch.float64)
    x = torch.tanh(length / scale)
    features = torch.stack([torch.ones_like(x), x], -1)
    weight = games.num_prompts / len(features)
    fitted, information, scatter = _fit_logistic(features, won, weight)
    inverse, chance = torch.linalg.inv(information), torch.sigmoid(features @ fitted)
    # The score of the fit is a sum over games; the scale moves it through x, and the games move the scale.
    by_scale = -(1 - x**2) * length / scale**2
    through = -chance * (1 - chance) * fitted[1] * by_scale
    moved = features * through[:, None]
    moved[:, 1] += (won - chance) * by_scale
    of_scale = ((length - length.mean()).square() - scale**2) / (2 * scale)
    pulls = torch.zeros(*outcomes.shape, 2, dtype=torch.float64)
    pulls[played] = (
        games.num_prompts * ((won - chance)[:, None] * features + of_scale[:, None] * moved.mean(0)) @ inverse
    )
    # One prompt a trial, as for a Bradley-Terry pair that one policy won throughout.
    unseen = (inverse @ scatter @ inverse).diag() if games.one_sided else torch.zeros(2, dtype=torch.float64)

    def estimate(k: int) -> Estimate:
        spread = games.spread(pulls[..., k])
        arms = [spread.mean(1), spread.mean(0)]
        return crossed_estimate(
            fitted[k].item(), spread.mean((0, 1)), arms, fixed=games.fixed, unseen=unseen[k].item(), level=level
        )

    return LengthControlled(_as_probability(estimate(0)), raw, estimate(1))


def _fit_logistic(features: Tensor, outcomes: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """(coefficients (2,), the negative second derivative (2, 2), the games' own part of it) of `length_controlled`."""
    x = torch.cat([features, torch.tensor([[1.0, 0.0]], dtype=torch.float64)])
    y = torch.cat([outcomes, torch.tensor([0.5], dtype=torch.float64)])
    weights = torch.cat([torch.full_like(outcomes, weight), torch.ones(1, dtype=torch.float64)])
    precision = torch.tensor([0.0, 1 / 4**2], dtype=torch.float64)

    def loss(fitted: Tensor) -> float:
        of_games = weights * F.binary_cross_entropy_with_logits(x @ fitted, y, reduction="none")
        return (of_games.sum() + (precision * fitted.square()).sum() / 2).item()

    fitted = torch.zeros(2, dtype=torch.float64)
    value = loss(fitted)
    for _ in range(200):
        probabilities = torch.sigmoid(x @ fitted)
        scatter = weights * probabilities * (1 - probabilities)
        information = x.T @ (scatter[:, None] * x) + precision.diag()
        step = torch.linalg.solve(information, x.T @ (weights * (y - probabilities)) - precision * fitted)
        while (further := loss(fitted + step)) > value and step.abs().max() > 0.1:  # as in bradley_terry
            step = step / 2
        fitted, value = fitted + step, further
        if step.abs().max() <= 1e-12:
            break
    return fitted, information, features.T @ (scatter[:-1, None] * features)


def _as_probability(log_odds: Estimate) -> Estimate:
    """sigma of an estimate: its interval end for end, its standard errors by the slope."""
    mean, low, high = (torch.tensor(log_odds[:3], dtype=torch.float64).sigmoid()).tolist()
    slope = mean * (1 - mean)
    return log_odds._replace(
        mean=mean,
        low=low,
        high=high,
        prompt_error=slope * log_odds.prompt_error,
        seed_error=slope * log_odds.seed_error,
    )
