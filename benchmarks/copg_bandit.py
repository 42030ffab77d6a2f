"""CoPG's toy bandit: four methods learn from the same off-policy pairs, against the exact optimum.

    python benchmarks/copg_bandit.py                                # five seeds, 100 epochs, a minute or two
    python benchmarks/copg_bandit.py --seeds 0 --epochs 10

The set-up is that of Flet-Berliac et al. 2024 (arXiv 2406.19185, section 5): three arms, a uniform reference, 10^4
pairs of which the first arm is drawn from one fixed law and the second from another, batches of 512, Adam. What is
measured is the regret J(pi*) - J(pi) with J = E[r] - beta KL(pi || reference), exactly. Every method sees the same
pairs in the same order; only IPO sees labels, drawn once a pair from s(r - r'), in place of rewards. All losses are
those of `pairtune.maths`.

Beside the curves, one seed goes on for ten times as many epochs, and the point that each method ends at is computed
from its pairs and from the law that they are drawn from. Written are copg_bandit.json (every number), copg_bandit.md
and copg_bandit.svg (both made from the JSON alone).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtune.maths.contrastive import copg_loss
from pairtune.maths.policy_gradient import reinforce_loss
from pairtune.maths.preference import ipo_loss
from pairtune.runs.display import progress
from pairtune.runs.folder import environment

REWARDS = torch.tensor([2.5, 2.0, 1.0], dtype=torch.float64)
LAWS = torch.tensor([[0.1, 0.2, 0.7], [0.05, 0.05, 0.9]], dtype=torch.float64)
"""Of the first and of the second arm of a pair, independent of each other."""
REFERENCE = torch.full((3,), 1 / 3, dtype=torch.float64).log()
BETA = 0.5
NUM_PAIRS, BATCH_SIZE, LEARNING_RATE = 10_000, 512, 1e-3

LONGER = 10
"""Times as many epochs for the one run that shows where the methods end."""
OTHER_SEEDS = tuple(range(100, 125))
"""Run beside the seeds asked for: five runs alone say little about how far a run strays by chance."""
MARKS = (1, 10, 25, 50, 100)
"""Epochs in the table."""
RESULTS = Path(__file__).parent / "results"


# ----------------------------------------------------------------------------------------------------------- the bandit


def objective(policy: Tensor) -> Tensor:
    """J = E[r] - beta KL(policy || reference), exactly: log-probabilities of the arms (..., 3) -> (...)."""
    return (policy.exp() * (REWARDS - BETA * (policy - REFERENCE))).sum(-1)


OPTIMUM = (REFERENCE + REWARDS / BETA).log_softmax(-1)
"""Log-probabilities of pi* = reference * exp(r / beta) / Z."""


def regret(policy: Tensor) -> Tensor:
    """J(pi*) - J(policy): (..., 3) -> (...)."""
    return objective(OPTIMUM) - objective(policy)


# A pair is one of nine pairs of arms, and one of its two comes out as preferred: 18 outcomes. A loss depends on nothing
# else, so it is taken once an outcome, and the mean over a batch is the mean weighted with how often each is in it.
OUTCOMES = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
ARMS, PREFERRED = OUTCOMES[:, :2], OUTCOMES[:, 2:]
"""First and second arm (18, 2), and which of the two is preferred (18, 1), 0 or 1."""
PAIR_REWARDS, PAIR_REFERENCE = REWARDS[ARMS], REFERENCE[ARMS]
CHANCE = (REWARDS[:, None] - REWARDS).sigmoid()
"""s(r - r') that the first arm of a pair is preferred (3, 3)."""


def draw_outcomes(generator: torch.Generator) -> Tensor:
    """NUM_PAIRS pairs with one label each, as indices into OUTCOMES."""
    first, second = (torch.multinomial(law, NUM_PAIRS, replacement=True, generator=generator) for law in LAWS)
    uniforms = torch.rand(NUM_PAIRS, generator=generator, dtype=torch.float64)
    return 6 * first + 2 * second + (uniforms >= CHANCE[first, second])


def law_of_outcomes() -> Tensor:
    """How probable each outcome is: (18,)."""
    first, second = ARMS.unbind(-1)
    chance = CHANCE[first, second]
    return LAWS[0][first] * LAWS[1][second] * torch.where(PREFERRED[:, 0] == 0, chance, 1 - chance)


# ---------------------------------------------------------------------------------------------------------- the methods

Method = Callable[[Tensor], Tensor]
"""Log-probabilities of the arms (S, 3) -> the loss of each outcome (S, 18). Factors in front of a loss are those of
`pairtune.maths`; Adam divides them out again."""


def copg(policy: Tensor) -> Tensor:
    logprobs = policy[:, ARMS]
    return copg_loss(logprobs, PAIR_REFERENCE.expand_as(logprobs), PAIR_REWARDS.expand_as(logprobs), beta=BETA)


def ipo(tau: float) -> Method:
    """`tau` as in IPO's paper. Comparable with the others is tau = beta: CoPG with r = +-1/4 is then IPO (Prop. 3)."""

    def loss(policy: Tensor) -> Tensor:
        logratio = policy[:, ARMS] - PAIR_REFERENCE
        chosen, rejected = (
            logratio.gather(-1, index.expand(len(policy), -1, -1)) for index in (PREFERRED, 1 - PREFERRED)
        )
        return ipo_loss(chosen[..., 0], rejected[..., 0], beta=tau)

    return loss


def policy_gradient(baseline: Callable[[Tensor], Tensor]) -> Method:
    """REINFORCE on r - beta log(policy / reference) minus a baseline (S, 3) -> (S,), as if the policy had sampled."""

    def loss(policy: Tensor) -> Tensor:
        logprobs = policy[:, ARMS]
        # Not `kl_shaped_rewards`: it leaves out a constant, which matters where no difference is taken.
        shaped_rewards = PAIR_REWARDS - BETA * (logprobs - PAIR_REFERENCE)
        return reinforce_loss(logprobs, shaped_rewards - baseline(policy)[:, None, None]).mean(-1)

    return loss


def no_baseline(policy: Tensor) -> Tensor:
    return policy.new_zeros(len(policy))


def expected_reward(policy: Tensor) -> Tensor:
    """E[r] under the policy, without the KL term: the value baseline of the paper."""
    return (policy.exp() * REWARDS).sum(-1)


METHODS: dict[str, Method] = {
    "copg": copg,
    "value": policy_gradient(expected_reward),
    "ipo": ipo(BETA),
    "none": policy_gradient(no_baseline),
}
NAMES = {
    "copg": "CoPG",
    "value": "policy gradient, value baseline",
    "ipo": "IPO",
    "none": "policy gradient, no baseline",
}
VARIANTS: dict[str, Method] = {
    "policy gradient, baseline J(policy)": policy_gradient(objective),
    "IPO, tau = beta / 2": ipo(BETA / 2),
    "IPO, tau = 2 beta": ipo(2 * BETA),
}
"""Limits only: what the choice of the baseline and of tau does."""

EXPECTED = {
    "copg": (0.281, 0.200, 0.118, 0.059, 0.013),
    "value": (0.281, 0.196, 0.109, 0.059, 0.028),
    "ipo": (0.281, 0.211, 0.166, 0.153, 0.152),
    "none": (0.303, 0.404, 0.535, 0.620, 0.635),
}
"""Regret at MARKS in an earlier implementation of its own, the mean over five seeds. The paper prints curves only."""
EXPECTED_END = {"copg": "0.00000", "value": "0.0148", "ipo": "about 0.15", "none": "0.635"}
"""The same after 1000 epochs of one seed."""


# ------------------------------------------------------------------------------------------------------------- learning


def learn(
    method: Method, seeds: Sequence[int], epochs: int, advance: Callable[[float], None] = lambda epochs: None
) -> tuple[Tensor, Tensor]:
    """All seeds side by side: regret after each epoch (S, epochs), and the policies at the end (S, 3).

    Seeds do not meet: their losses are summed, and Adam treats every number by itself. `advance` is told of epochs.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    outcomes = torch.stack([draw_outcomes(generator) for generator in generators])
    logits = torch.zeros(len(seeds), 3, dtype=torch.float64, requires_grad=True)  # the reference
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    regrets = []
    for _ in range(epochs):
        order = torch.stack([torch.randperm(NUM_PAIRS, generator=generator) for generator in generators])
        for weights in batch_weights(outcomes.gather(1, order)):
            optimizer.zero_grad()
            (weights * method(logits.log_softmax(-1))).sum().backward()
            optimizer.step()
        regrets.append(regret(logits.detach().log_softmax(-1)))
        advance(1)
    return torch.stack(regrets, -1), logits.detach().softmax(-1)


def batch_weights(outcomes: Tensor) -> Tensor:
    """The share of each outcome in consecutive batches, the last one short: (S, N) -> (batches, S, 18)."""
    num_runs, num_pairs = outcomes.shape
    num_batches = -(-num_pairs // BATCH_SIZE)
    batch = torch.arange(num_pairs) // BATCH_SIZE
    place = (batch * num_runs + torch.arange(num_runs)[:, None]) * len(OUTCOMES) + outcomes
    counts = place.flatten().bincount(minlength=num_batches * num_runs * len(OUTCOMES))
    counts = counts.view(num_batches, num_runs, len(OUTCOMES)).double()
    return counts / counts.sum(-1, keepdim=True)


def limit(method: Method, weights: Tensor) -> Tensor:
    """The policy (3,) at which the update of a method is zero where outcomes have these weights (18,)."""
    logits = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    for _ in range(10_000):
        (gradient,) = torch.autograd.grad((weights * method(logits.log_softmax(-1))).sum(), logits)
        if gradient.abs().max() < 1e-13:
            return logits.detach().log_softmax(-1)[0]
        logits = (logits - gradient).detach().requires_grad_()
    raise RuntimeError("the update did not come to rest within 10000 steps")


# ----------------------------------------------------------------------------------------------------------- the record


def measure(seeds: Sequence[int], epochs: int) -> dict[str, Any]:
    """All figures, as they go into the JSON: regrets in seven digits behind the point."""
    curves, others, ends = {}, {}, {}
    drawn = draw_outcomes(torch.Generator().manual_seed(seeds[0]))
    shares = drawn.bincount(minlength=len(OUTCOMES)) / NUM_PAIRS
    with progress("epochs", len(METHODS) * (1 + LONGER) * epochs) as advance:
        for name, method in METHODS.items():
            regrets, _ = learn(method, [*seeds, *OTHER_SEEDS], epochs, advance)
            curves[name] = rounded(regrets[: len(seeds)])
            others[name] = rounded(regrets[len(seeds) :])
            regrets, policies = learn(method, seeds[:1], LONGER * epochs, advance)
            ends[name] = {
                "policy": rounded(policies[0]),
                "regret": {str(LONGER * epoch): rounded(regrets[0, LONGER * epoch - 1]) for epoch in marks(epochs)},
                "limit_of_its_pairs": rounded(regret(limit(method, shares))),
            }
    limits = {
        NAMES.get(name, name): limit(method, law_of_outcomes()) for name, method in {**METHODS, **VARIANTS}.items()
    }
    return {
        "seeds": list(seeds),
        "epochs": epochs,
        "exact": {
            "optimal policy": rounded(OPTIMUM.exp()),
            "J of the optimal policy": rounded(objective(OPTIMUM)),
            "J of the reference, where all start": rounded(objective(REFERENCE)),
            "regret at the start": rounded(regret(REFERENCE)),
            "KL of the optimal policy to the reference": rounded((OPTIMUM.exp() * (OPTIMUM - REFERENCE)).sum()),
        },
        "regret": curves,
        "regret_of_other_seeds": {
            name: {str(epoch): [run[epoch - 1] for run in runs] for epoch in marks(epochs)}
            for name, runs in others.items()
        },
        "longer": {"seed": seeds[0], "epochs": LONGER * epochs, "ends": ends},
        "limits": {
            name: {"policy": rounded(policy.exp()), "regret": rounded(regret(policy))}
            for name, policy in limits.items()
        },
    }


def rounded(values: Tensor) -> Any:
    """A list (or a float) as JSON takes it; + 0.0 makes -0.0 a zero."""
    return (values.mul(1e7).round().div(1e7) + 0.0).tolist()


def marks(epochs: int) -> list[int]:
    """The epochs in the table: those of MARKS that were reached, and the last."""
    return sorted({epoch for epoch in MARKS if epoch < epochs} | {epochs})


def provenance(argv: Sequence[str], output: Path) -> dict[str, Any]:
    """What is needed to get the figures again, without a path of the machine."""
    found = environment()
    del found["command"]
    shown = ["..." if word == str(output) else word for word in argv]
    return {
        "benchmark": "copg_bandit",
        "command": shlex.join(["python", "benchmarks/copg_bandit.py", *shown]),
        "environment": {**found, "matplotlib": importlib.metadata.version("matplotlib")},
    }


NOTES = """\
- A limit is where the update over all pairs is zero: those of the seed, or those of the law they are drawn from. It is
  the optimum for CoPG, whatever the pairs. The other three are biased, and more epochs or more pairs do not mend that.
- Off-policy, the policy gradient with the value baseline passes nearer to the optimum than where it ends.
- The paper takes E[r] as the value baseline, without the KL term, and that is what leaves this regret. With J(policy) =
  E[r - beta log(policy / reference)] the update off-policy is not the gradient of J either, but it is zero at the
  optimum, where r - beta log(policy / reference) is the same for all arms.
- IPO's tau is beta: half or twice as much ends elsewhere. It misses the optimum because labels say how often an arm
  wins, not by how much.
- With learning rate 0.001, Adam moves a logit by at most about 2 in 100 epochs, so no regret is zero by then.
- A constant factor in front of a loss (CoPG's 1 / (2 beta), a sum or a mean over the pair) cancels in Adam."""


def as_markdown(record: dict[str, Any]) -> str:
    """The record to read."""
    seeds, epochs, longer = record["seeds"], record["epochs"], record["longer"]
    lines = [
        "# CoPG's toy bandit, recorded",
        "",
        f"`{record['command']}`",
        "",
        "Machine and versions: " + "; ".join(f"{key} {value}" for key, value in record["environment"].items()),
        "",
        f"Three arms with rewards {listed(REWARDS.tolist(), '.1f')}, a uniform reference, beta {BETA}. A seed draws "
        f"{NUM_PAIRS} pairs, the first arm from ({listed(LAWS[0].tolist(), '.2f')}), the second from "
        f"({listed(LAWS[1].tolist(), '.2f')}). Adam, learning rate {LEARNING_RATE}, batches of {BATCH_SIZE}. "
        "Regret is J(pi*) - J(pi) with J = E[r] - beta KL(pi || reference).",
        "",
        "![Regret of the four methods](copg_bandit.svg)",
        "",
        "## Exact",
        "",
        "| | |",
        "|---|---:|",
        *(
            f"| {name} | {listed(value, '.5f') if isinstance(value, list) else f'{value:.5f}'} |"
            for name, value in record["exact"].items()
        ),
        "",
        f"## Regret over {epochs} epochs",
        "",
        f"Mean (lowest to highest) of seeds {listed(seeds, 'd')}, and of {len(OTHER_SEEDS)} other seeds "
        f"({OTHER_SEEDS[0]} to {OTHER_SEEDS[-1]}), which show what chance does. Expected: the mean over five seeds in "
        "an earlier implementation of its own, to three digits (the paper prints curves only).",
        "",
        "| method | epoch | regret | other seeds | expected |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, runs in record["regret"].items():
        expected = dict(zip(MARKS, EXPECTED[method], strict=True))
        for epoch in marks(epochs):
            own, others = [run[epoch - 1] for run in runs], record["regret_of_other_seeds"][method][str(epoch)]
            known = f"{expected[epoch]:.3f}" if epoch in expected else ""
            lines.append(f"| {NAMES[method]} | {epoch} | {spread(own)} | {spread(others)} | {known} |")
    surprises = unexpected(record)
    verdict = "Outside that: " + ", ".join(surprises) if surprises else "None lies outside that"
    lines += [
        "",
        "To be expected is what lies between the lowest and the highest single run, half a digit aside. "
        + verdict
        + ".",
    ]
    long_marks = [LONGER * epoch for epoch in marks(epochs)]
    lines += [
        "",
        "## Where they end",
        "",
        f"Seed {longer['seed']} over {longer['epochs']} epochs, regret after",
        "",
        f"| method | {listed(long_marks, 'd', ' | ')} | limit of its pairs | policy at the end |",
        "|---|" + "---:|" * len(long_marks) + "---:|---|",
    ]
    for method, end in longer["ends"].items():
        regrets = listed([end["regret"][str(epoch)] for epoch in long_marks], ".5f", " | ")
        lines.append(
            f"| {NAMES[method]} | {regrets} | {end['limit_of_its_pairs']:.5f} | {listed(end['policy'], '.4f')} |"
        )
    lines += [
        "",
        "In the limit, with infinitely many pairs. Expected: one seed after 1000 epochs, in the same earlier "
        "implementation.",
        "",
        "| method | policy | regret | expected |",
        "|---|---|---:|---:|",
    ]
    expected_end = {NAMES[method]: value for method, value in EXPECTED_END.items()}
    for name, end in record["limits"].items():
        lines.append(
            f"| {name} | {listed(end['policy'], '.4f')} | {end['regret']:.5f} | {expected_end.get(name, '')} |"
        )
    return "\n".join([*lines, "", NOTES]) + "\n"


def unexpected(record: dict[str, Any]) -> list[str]:
    """Where EXPECTED is lower than every single run or higher, by more than the rounding of its third digit."""
    found = []
    for method, runs in record["regret"].items():
        for epoch, expected in zip(MARKS, EXPECTED[method], strict=True):
            if epoch in marks(record["epochs"]):
                regrets = [run[epoch - 1] for run in runs] + record["regret_of_other_seeds"][method][str(epoch)]
                if not min(regrets) - 0.0005 <= expected <= max(regrets) + 0.0005:
                    found.append(f"{NAMES[method]} at epoch {epoch}")
    return found


def listed(values: Sequence[float], form: str, between: str = ", ") -> str:
    return between.join(format(value, form) for value in values)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


# ----------------------------------------------------------------------------------------------------------- the figure

COLOURS = {"copg": "#0072B2", "value": "#D55E00", "ipo": "#009E73", "none": "#555555"}
"""Of Okabe and Ito's palette, told apart with any colour vision."""


def draw(record: dict[str, Any], path: Path) -> None:
    """Regret against epochs, a line for the mean and a band from the lowest to the highest seed; the same record gives
    the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    style: dict[Any, Any] = {
        "svg.hashsalt": "pairtune",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4.0), layout="constrained")
        axes = figure.subplots()
        epochs = range(record["epochs"] + 1)
        start = record["exact"]["regret at the start"]
        for method, runs in record["regret"].items():
            by_epoch = [(start,) * len(runs), *zip(*runs, strict=True)]
            means = [statistics.fmean(values) for values in by_epoch]
            colour = COLOURS[method]
            axes.fill_between(epochs, [*map(min, by_epoch)], [*map(max, by_epoch)], color=colour, alpha=0.25, lw=0)
            axes.plot(epochs, means, color=colour, linewidth=1.6)
            axes.annotate(
                f"{NAMES[method]}\n{means[-1]:.3f}, limit {record['limits'][NAMES[method]]['regret']:.3f}",
                (epochs[-1], means[-1]), xytext=(6, 0), textcoords="offset points", color=colour, va="center",
                annotation_clip=False,
            )  # fmt: skip
        # The curves end a factor of fifty apart, and the two lowest would be one line on a linear axis.
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks([y for y in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if y > min(axes.get_ylim())])
        axes.grid(axis="y", linewidth=0.5, alpha=0.4)
        axes.margins(x=0)
        axes.set_xlabel("epochs over the same 10000 pairs")
        axes.set_title(
            f"Regret J(pi*) - J(pi); line: mean of {len(record['seeds'])} seeds, band: lowest to highest",
            fontsize=9, loc="left",
        )  # fmt: skip
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_whole(0), nargs="+", default=[0, 1, 2, 3, 4], help="default: 0 1 2 3 4")
    parser.add_argument("--epochs", type=_whole(1), default=100, help="default: 100, as in the paper")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; older ones are replaced")
    return parser


def _whole(least: int) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return whole


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    record = {**provenance(argv, args.output), **measure(args.seeds, args.epochs)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "copg_bandit.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "copg_bandit.md").write_text(as_markdown(record))
    draw(record, args.output / "copg_bandit.svg")
    print((args.output / "copg_bandit.md").read_text())


if __name__ == "__main__":
    main()
