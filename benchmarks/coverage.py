"""How often do the intervals of a comparison hold the truth? Simulated worlds in which it is known, and not kind.

    python benchmarks/coverage.py     # 1,000 repetitions of one world, 400 of the others; minutes on an idle core
    python benchmarks/coverage.py --repetitions 200 --worlds three

Each repetition draws prompts whose values are log-normal (skewness 6.2), training seeds with a variance of their own,
two completions a prompt, and asks `pairtune.evidence` for its 95% interval of every quantity that a comparison shows.
Beside it stands the interval over prompts alone, which takes the trained policies for all there are: the percentile
bootstrap where a quantity is a mean or a ratio, else 1.96 standard errors. Written are coverage.json and coverage.md,
after every world anew.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pairtune.evidence.frontier import (
    Evaluated,
    area_under_frontier,
    compare_area,
    compare_kl_at_reward,
    compare_reward_at_kl,
    fit_frontier,
    kl_at_reward,
    reward_at_kl,
)
from pairtune.evidence.head_to_head import Games, length_controlled, ranking, score_games, win_rate
from pairtune.maths.ranking import bradley_terry
from pairtune.maths.statistics import (
    Estimate,
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    estimate_difference,
    estimate_mean,
    estimate_ratio,
)
from pairtune.runs.display import progress
from pairtune.runs.folder import environment

RESULTS = Path(__file__).parent / "results"
NUM_COMPLETIONS = 2
KL, REWARD = 3.0, 1.2
"""Where curves are matched."""


@dataclass(frozen=True)
class World:
    """What a repetition draws."""

    about: str
    num_seeds: int = 3
    num_prompts: int = 60
    seed_spread: float = 1.0
    """1: three seeds add about as much to the standard error of a mean as 60 prompts do."""
    skew: float = 1.0
    """The sigma of the log-normal values."""


WORLDS = {
    "three": World("3 seeds that differ about as much as prompts do"),
    "alike": World("3 seeds that do not differ", seed_spread=0.0),
    "apart": World("3 seeds that differ twice as much", seed_spread=2.0),
    "five": World("5 seeds", num_seeds=5),
    "two": World("2 seeds", num_seeds=2),
    "one": World("1 seed; the truth is that of its policy", num_seeds=1, seed_spread=0.0),
    "many": World("the seeds of the first with 300 prompts", num_prompts=300),
    "heavy": World("the seeds of the first, values of skewness 33", skew=1.5),
}


class Draw:
    """The random numbers of one repetition."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.generator = world, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def skewed(self, *shape: int) -> Tensor:
        """Log-normal, mean 0, variance 1."""
        return standardised(self.normal(*shape), self.world.skew)

    def seeds(self, scale: float) -> Tensor:
        """(S,) of a spread such that at 1 three seeds weigh as much as 60 prompts of standard deviation `scale`."""
        return seed_spread(self.world, scale) * self.normal(self.world.num_seeds)


def seed_spread(world: World, scale: float) -> float:
    return world.seed_spread * scale * math.sqrt(3 / 60)


def standardised(normal: Tensor, sigma: float) -> Tensor:
    mean = math.exp(sigma**2 / 2)
    return (torch.exp(sigma * normal) - mean) / (mean * math.sqrt(math.expm1(sigma**2)))


class Measured(NamedTuple):
    """One quantity in one repetition: the interval of the comparison, and that over prompts alone."""

    estimate: Estimate
    alone: tuple[float, float]
    truth: float


def normal_interval(estimate: Estimate) -> tuple[float, float]:
    half = 1.959964 * estimate.prompt_error
    return estimate.mean - half, estimate.mean + half


def alone(bootstrap: Callable[..., Interval], *values: Tensor) -> tuple[float, float]:
    """The percentile bootstrap over prompts of values (S, P), the seeds averaged."""
    _, low, high = bootstrap(*[x.mean(0) for x in values], num_resamples=500)
    return low, high


# ------------------------------------------------------------------------------------------------------- means, ratios


def means(draw: Draw) -> dict[str, Measured]:
    """Rewards, KL and KL a token of one arm, the difference of two, at one evaluation."""
    world = draw.world
    seeds, prompts = world.num_seeds, world.num_prompts

    def noise() -> Tensor:
        return draw.normal(seeds, prompts, NUM_COMPLETIONS).mean(-1)

    skewed = draw.skewed(prompts)
    reward = 1 + draw.seeds(1)[:, None] + skewed + 0.3 * draw.normal(seeds, prompts) + 0.7 * noise()
    other = 0.5 + draw.seeds(1)[:, None] + 1.3 * skewed + 0.3 * draw.normal(seeds, prompts) + 0.7 * noise()
    # Some prompts make every policy drift and write more; KL grows faster than length.
    hard = draw.normal(prompts)
    drift = 4 * (1 + draw.seeds(1.3)[:, None])
    factor = torch.exp(world.skew * hard + 0.3 * noise())
    kl = drift * factor / math.exp(world.skew**2 / 2 + 0.3**2 / NUM_COMPLETIONS / 2)
    length = 30 * torch.exp(0.5 * hard - 0.125) * torch.ones_like(kl)
    rate = 0.1 * (1 + draw.seeds(0.5)[:, None])
    per_token = rate * length * torch.exp(0.3 * hard - 0.045 + 0.2 * noise() - 0.01)
    true_rate = 0.1 * math.exp(0.15)  # E[exp(0.8 z)] over E[exp(0.5 z)] exp(0.3^2 / 2) is exp(0.15)
    return {
        "mean reward": Measured(estimate_mean(reward), alone(bootstrap_mean, reward), 1.0),
        "difference of rewards": Measured(
            estimate_difference(reward, other), alone(bootstrap_difference, reward, other), 0.5
        ),
        "KL": Measured(estimate_mean(kl), alone(bootstrap_mean, kl), 4.0),
        "KL a token": Measured(estimate_ratio(per_token, length), alone(bootstrap_ratio, per_token, length), true_rate),
    }


# ------------------------------------------------------------------------------------------------------------- frontier


@dataclass(frozen=True)
class Arm:
    """A method: reward = start + gain * sqrt(KL) of each seed, KL growing with the step at a rate of each seed."""

    gain: float


ARMS = Arm(1.0), Arm(0.8)
NUM_EVALUATIONS = 9
GAIN_SCALE = 0.5
"""How much gains differ between prompts, and seeds accordingly."""


def curves(draw: Draw, arm: Arm, hard: Tensor, base: Tensor) -> Evaluated:
    """Runs of one arm: KL and gain skewed over prompts and correlated; luck of an evaluation partly that of the last,
    as common random numbers make it."""
    seeds, prompts = draw.world.num_seeds, draw.world.num_prompts
    rate = 6 / (NUM_EVALUATIONS - 1) * torch.exp(0.1 * draw.normal(seeds))
    gain = arm.gain * (1 + draw.seeds(GAIN_SCALE))
    at = rate[:, None] * torch.arange(NUM_EVALUATIONS)
    kl_shape = 1 + 0.8 * hard
    reward_shape = 1 + GAIN_SCALE * (0.6 * hard + 0.8 * draw.skewed(prompts))

    def noise(scale: float) -> Tensor:
        shared, own = draw.normal(seeds, 1, prompts), draw.normal(seeds, NUM_EVALUATIONS, prompts)
        return scale * (0.8 * shared + 0.6 * own) / math.sqrt(NUM_COMPLETIONS)

    kl = at[..., None] * kl_shape * torch.exp(noise(0.3) - 0.045 / NUM_COMPLETIONS)
    reward = base + (gain[:, None] * at.sqrt())[..., None] * reward_shape + noise(0.5)
    return Evaluated(torch.arange(NUM_EVALUATIONS), kl, kl, reward, torch.ones_like(kl))


def frontiers(draw: Draw) -> dict[str, Measured]:
    prompts = draw.world.num_prompts
    hard, base = standardised(draw.normal(prompts), 0.6), 0.5 * draw.skewed(prompts)
    a, b = (curves(draw, arm, hard, base) for arm in ARMS)
    gain, other = (arm.gain for arm in ARMS)
    found = {
        "reward at matched KL": (reward_at_kl(a, KL), gain * math.sqrt(KL)),
        "KL at matched reward": (kl_at_reward(a, REWARD), kl_truth(draw.world, ARMS[0])),
        "area under the frontier": (area_under_frontier(a, KL), gain * KL**1.5 / 1.5),
        "difference of rewards at matched KL": (
            compare_reward_at_kl(a, b, KL).estimate,
            (gain - other) * math.sqrt(KL),
        ),
        "difference of KL at matched reward": (
            compare_kl_at_reward(a, b, REWARD).estimate,
            kl_truth(draw.world, ARMS[0]) - kl_truth(draw.world, ARMS[1]),
        ),
        "difference of areas": (compare_area(a, b, KL).estimate, (gain - other) * KL**1.5 / 1.5),
    }
    fit = fit_frontier(a, "sqrt")
    found["slope of the square-root fit"] = (None if fit is None else fit.slope, gain)
    return {
        name: Measured(estimate, normal_interval(estimate), truth)
        for name, (estimate, truth) in found.items()
        if estimate is not None
    }


@cache
def kl_truth(world: World, arm: Arm) -> float:
    """The mean over seeds of (REWARD / gain)^2 with the gain normal over seeds, by quadrature.

    A gain far below is a run that never gets there, and such a repetition has no estimate; the truth is that of runs
    that do: KL up to 6.
    """
    z = torch.linspace(-6, 6, 20001, dtype=torch.float64)
    gain = arm.gain * (1 + seed_spread(world, GAIN_SCALE) * z)
    kl = (REWARD / gain).square()
    weight = torch.exp(-z.square() / 2) * ((gain > 0) & (kl < 6))
    return ((kl * weight).sum() / weight.sum()).item()


# --------------------------------------------------------------------------------------------------------- head to head

STRENGTHS = {"a": (0.0, 0.0), "b": (0.2, 0.3), "c": (0.5, -0.3), "d": (1.0, 0.5)}
"""What a policy's completions are worth on average, and how much more on the prompts of the skewed kind."""
SEED_SCALE = 0.7


def worth(draw: Draw) -> dict[str, Tensor]:
    """Scores (S, P, K) of four policies."""
    seeds, prompts = draw.world.num_seeds, draw.world.num_prompts
    skewed = draw.skewed(prompts)
    base = 2 * draw.skewed(prompts)
    return {
        name: (
            mean
            + draw.seeds(SEED_SCALE)[:, None, None]
            + (base + tilt * skewed)[:, None]
            + draw.normal(seeds, prompts, NUM_COMPLETIONS)
        )
        for name, (mean, tilt) in STRENGTHS.items()
    }


@cache
def true_rate(world: World, first: str, second: str) -> float:
    """P(first beats second) over completions, prompts and seeds, by quadrature over the prompts' normal."""
    z = torch.linspace(-8, 8, 40001, dtype=torch.float64)
    (mean, tilt), (other_mean, other_tilt) = STRENGTHS[first], STRENGTHS[second]
    spread = math.sqrt(2 + 2 * seed_spread(world, SEED_SCALE) ** 2)
    lead = mean - other_mean + (tilt - other_tilt) * standardised(z, world.skew)
    weight = torch.exp(-z.square() / 2)
    return ((torch.special.ndtr(lead / spread) * weight).sum() / weight.sum()).item()


@cache
def true_strengths(world: World) -> tuple[float, ...]:
    """Of the true win matrix, without a prior: what more and more prompts lead to."""
    rates = torch.tensor(
        [[0.5 if a == b else true_rate(world, a, b) for b in STRENGTHS] for a in STRENGTHS], dtype=torch.float64
    )
    return tuple(bradley_terry(1e6 * rates, prior=1e-6).tolist())


def wins(draw: Draw) -> dict[str, Measured]:
    games = score_games(worth(draw))
    found = {}
    for pair in (("b", "c"), ("a", "d")):
        rate = win_rate(games[pair])
        by_prompt = games[pair].outcomes.mean((0, 3))
        found[f"win rate of {pair[0]} over {pair[1]}"] = Measured(
            rate, alone(bootstrap_mean, by_prompt), true_rate(draw.world, *pair)
        )
    ranked = ranking(games)
    for name, estimate, truth in zip(ranked.names, ranked.strengths, true_strengths(draw.world), strict=True):
        found[f"Bradley-Terry strength of {name}"] = Measured(estimate, normal_interval(estimate), truth)
    return found


THETA, PHI, LONGER = 0.3, 0.8, math.sqrt(30**2 + 20**2)
LENGTH_DRAWS = 2_000_000


def lengths(draw: Draw) -> dict[str, Measured]:
    """Verdicts of a judge that likes length, and a first policy that writes more. Prompts and seeds move the odds, so
    the truth is the coefficients that this many more prompts and seeds lead to, in `length_truth`."""
    controlled = length_controlled(judged(draw))
    rate, phi = length_truth(draw.world)
    return {
        "length-controlled win rate": Measured(controlled.win_rate, normal_interval(controlled.win_rate), rate),
        "weight of length": Measured(controlled.phi, normal_interval(controlled.phi), phi),
    }


def judged(draw: Draw) -> Games:
    num_seeds, num_prompts = draw.world.num_seeds, draw.world.num_prompts
    first, second = draw.seeds(1)[:, None, None, None], draw.seeds(1)[:, None, None]
    liked = 0.5 * draw.skewed(num_prompts)[:, None]
    longer = 10 + 30 * draw.skewed(num_prompts)[:, None] + 20 * draw.normal(num_seeds, num_seeds, num_prompts, 1)
    odds = THETA + first - second + liked + PHI * torch.tanh(longer / LONGER)
    chance = torch.rand(odds.shape, dtype=torch.float64, generator=draw.generator)
    return Games((chance < torch.sigmoid(odds)).double(), longer)


@cache
def length_truth(world: World) -> tuple[float, float]:
    """(win rate, weight of length) from many games, each of a prompt and seeds of its own."""
    draw = Draw(world, 987654321)
    num = LENGTH_DRAWS
    liked = 0.5 * draw.skewed(num)
    longer = 10 + 30 * draw.skewed(num) + 20 * draw.normal(num)
    odds = THETA + math.sqrt(2) * seed_spread(world, 1) * draw.normal(num) + liked + PHI * torch.tanh(longer / LONGER)
    found = length_controlled(Games.from_verdicts(torch.sigmoid(odds), longer))
    return found.win_rate.mean, found.phi.mean


# ---------------------------------------------------------------------------------------------------------- the measure

PARTS: dict[str, Callable[[Draw], dict[str, Measured]]] = {
    "means": means,
    "frontiers": frontiers,
    "wins": wins,
    "lengths": lengths,
}


def coverage(
    world: World,
    repetitions: int,
    parts: Sequence[str] = tuple(PARTS),
    advance: Callable[[float], None] = lambda done: None,
) -> dict[str, dict[str, float]]:
    """Of every quantity: the share of repetitions whose interval holds the truth, with it below and above, the same for
    the interval over prompts alone, and the median widths."""
    found: dict[str, list[Measured]] = {}
    for seed in range(repetitions):
        for part in parts:
            for name, measured in PARTS[part](Draw(world, seed)).items():
                found.setdefault(name, []).append(measured)
        advance(1)
    return {name: figures(measured) for name, measured in found.items()}


def figures(measured: Sequence[Measured]) -> dict[str, float]:
    truth = torch.tensor([m.truth for m in measured], dtype=torch.float64)
    mean, low, high = torch.tensor([m.estimate[:3] for m in measured], dtype=torch.float64).unbind(1)
    alone_low, alone_high = torch.tensor([m.alone for m in measured], dtype=torch.float64).unbind(1)
    covered = (low <= truth) & (truth <= high)
    alone = (alone_low <= truth) & (truth <= alone_high)
    return {
        "repetitions": len(measured),
        "truth": truth[0].item(),
        "mean": mean.mean().item(),
        "covered": covered.double().mean().item(),
        "below": (truth < low).double().mean().item(),
        "above": (truth > high).double().mean().item(),
        "width": (high - low).median().item(),
        "covered_by_prompts_alone": alone.double().mean().item(),
        "width_by_prompts_alone": (alone_high - alone_low).median().item(),
    }


# ---------------------------------------------------------------------------------------------------------- the command


NOTES = """\
- An interval over prompts alone is no interval of a method: with three seeds that differ as much as prompts do it holds
  the truth in half to four fifths of the repetitions, and more prompts make it worse, not better.
- What is not linear in what seeds do falls short where they differ much: the KL at a matched reward, which goes with
  the inverse square of a seed's gain, misses on one side.
- Two seeds have one degree of freedom. Their intervals are several times as wide as those of three, and where many
  policies meet they hold the truth in 90 to 94% only.
- With one seed there is nothing to say about seeds; the interval is one of its policy."""


def as_markdown(record: dict[str, Any]) -> str:
    env = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    lines = [
        "# Coverage of 95% intervals, recorded",
        "",
        f"`{record['command']}`",
        "",
        f"Machine and versions: {env}",
        "",
        "Repetitions are seeded from 0 on. Prompts are log-normal "
        "(skewness 6.2 unless said otherwise), seeds have a variance of their own, two completions a prompt. Truth "
        "below: the interval lies wholly above the truth. Width: median. Prompts alone: the percentile bootstrap over "
        "prompts for means, ratios and win rates, 1.96 standard errors over prompts for the rest; it takes the trained "
        "policies for all there are. What each world and quantity is stands in benchmarks/coverage.py.",
        "",
        NOTES,
    ]
    for name, rows in record["figures"].items():
        about = record["worlds"][name]
        count = about["repetitions"]
        error = 100 * math.sqrt(0.95 * 0.05 / count)
        lines += [
            "",
            f"## {about['about'].capitalize()}",
            "",
            f"{about['num_seeds']} seed{'s' * (about['num_seeds'] > 1)}, {about['num_prompts']} prompts; {count} "
            f"repetitions, so that the standard error of a coverage of 95% is {error:.1f} points.",
            "",
            "| quantity | covered | truth below | truth above | width | prompts alone: covered | width |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for quantity, row in rows.items():
            shares = [f"{100 * row[key]:.1f}%" for key in ("covered", "below", "above", "covered_by_prompts_alone")]
            lines.append(
                f"| {quantity}{'' if row['repetitions'] == count else ' (*)'} | {shares[0]} | "
                f"{shares[1]} | {shares[2]} | {row['width']:.3g} | {shares[3]} | {row['width_by_prompts_alone']:.3g} |"
            )
        if any(row["repetitions"] < count for row in rows.values()):
            lines += ["", "(*) Repetitions in which a run did not reach the point asked for have no interval."]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--repetitions",
        type=int,
        default=1000,
        help="of the world named three; of the others two fifths; default: 1000",
    )
    parser.add_argument("--worlds", nargs="+", choices=[*WORLDS], default=[*WORLDS], help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; older ones are replaced")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    torch.set_num_threads(1)  # tensors this small are not worth a second
    found = environment()
    del found["command"]
    shown = ["..." if word == str(args.output) else word for word in argv]
    record: dict[str, Any] = {
        "benchmark": "coverage",
        "command": shlex.join(["python", "benchmarks/coverage.py", *shown]),
        "environment": found,
        "worlds": {},
        "figures": {},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    repetitions = {name: args.repetitions if name == "three" else args.repetitions * 2 // 5 for name in args.worlds}
    with progress("repetitions", sum(repetitions.values())) as advance:
        for name in args.worlds:
            record["worlds"][name] = {**vars(WORLDS[name]), "repetitions": repetitions[name]}
            record["figures"][name] = coverage(WORLDS[name], repetitions[name], advance=advance)
            (args.output / "coverage.json").write_text(json.dumps(record, indent=1) + "\n")
            (args.output / "coverage.md").write_text(as_markdown(record))
    print(as_markdown(record))


if __name__ == "__main__":
    main()
