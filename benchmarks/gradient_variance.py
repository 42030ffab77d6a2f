"""How noisy is the gradient of each method? Exact variances at an equal number of completions, on small languages.

    python benchmarks/gradient_variance.py                          # three tasks, about five minutes on an idle core
    python benchmarks/gradient_variance.py --seeds 0 --models tabular

A reviewer of the P3O paper asked whether a baseline of one other sample needs large batches. Here nothing is sampled:
on a language whose completions can be enumerated, the mean of a method's gradient and its scatter are sums over all
groups of completions, each with its probability (`pairtune.evidence.exact.gradient_law`). They are taken at three
policies: the reference, one that has lost half of its regret, and one that has lost all but a sixteenth of it, on the
way of exact gradient ascent from the reference to the optimum of E[r] - beta KL.

The measure is the noise scale: the number of completions from which on the mean gradient of a batch has more signal
(the squared norm of the expected gradient) than noise (its variance). A factor before a loss cancels, and methods of
different K compare at the same number of completions. Written are gradient_variance.json (every number),
gradient_variance.md and gradient_variance.svg (both made from the JSON alone).
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtune import TrainConfig
from pairtune.algorithms import MethodState
from pairtune.evidence.exact import (
    EnumerableTask,
    GradientLaw,
    exact_values,
    gradient_law,
    objective_gradient,
    sequence_logprobs,
    tabular_model,
    tiny_transformer,
    value_function,
)
from pairtune.maths.advantages import MovingAverage
from pairtune.models.logprobs import Scorer
from pairtune.runs.display import progress
from pairtune.runs.folder import environment

MODELS: dict[str, Callable[..., Any]] = {"tabular": tabular_model, "transformer": tiny_transformer}
VOCAB_SIZE, NUM_PROMPTS, BETA = 3, 3, 0.5
MAX_LENGTHS = {"tabular": 3, "transformer": 2}
"""The transformer's languages are smaller because its derivatives cost more."""
ASCENT_RATE = {"tabular": 0.05, "transformer": 0.002}
"""Adam's learning rate on the way to the optimum."""
REMAINING_REGRET = {"reference": 1.0, "half way": 0.5, "near the optimum": 1 / 16}
"""Where the gradient is taken: at the first policy on the way with at most this share of the reference's regret."""
RESULTS = Path(__file__).parent / "results"


# ---------------------------------------------------------------------------------------------------- where it is taken


@dataclass(frozen=True)
class Place:
    """A policy on its way, and what is known of it exactly."""

    task: EnumerableTask
    policy: Any
    reference: Any

    def law(self, words: dict[str, Any], **given: Any) -> GradientLaw:
        """Of a method, in the words of a configuration; `given` as `gradient_law` takes it, or another `task`."""
        config = TrainConfig(
            model="in memory",
            dataset="in memory",
            beta=BETA,
            max_completion_length=self.task.max_completion_length,
            **{"ppo.whiten_advantages": False, "ppo.lam": 1.0, "vpg.lam": 1.0, **words},
        )
        return gradient_law(config, given.pop("task", self.task), self.policy, self.reference, **given)

    def less(self, baseline: Tensor) -> EnumerableTask:
        """The task with rewards that have lost a baseline (P,), which for REINFORCE is the same as having one."""
        return replace(self.task, rewards=self.task.rewards - baseline[:, None])

    @cached_property
    def shaped_rewards(self) -> Tensor:
        """(P, N) the trajectory reward r - beta log(policy / reference) of every completion."""
        logprobs, ref = (sequence_logprobs(model, self.task) for model in (self.policy, self.reference))
        return self.task.rewards - BETA * (logprobs - ref)

    @cached_property
    def shaped_means(self) -> Tensor:
        """(P,) its mean under the policy: J of each prompt."""
        return (sequence_logprobs(self.policy, self.task).exp() * self.shaped_rewards).sum(-1)

    @cached_property
    def values(self) -> Tensor:
        return value_function(self.task, self.policy, self.reference, BETA)

    @cached_property
    def best_baselines(self) -> tuple[Tensor, Tensor]:
        """The constants that leave REINFORCE the least variance: one for all prompts, and one for each; both (P,).

        E[R |s|^2] / E[|s|^2] with s the score of a completion, its log-probability's gradient (Greensmith et al. 2004).
        """
        scorer = Scorer(self.policy, shared=False)
        logprobs = scorer.logprobs(scorer.layout(self.task.completions()))[0].sum(-1)
        square_norms = torch.zeros_like(logprobs)
        for p in range(NUM_PROMPTS):
            for n in range(self.task.num_completions):
                score = torch.autograd.grad(logprobs[p, n], self.policy.parameters(), retain_graph=True)
                square_norms[p, n] = sum(part.square().sum() for part in score)
        weights = (logprobs.exp() * square_norms).detach()
        weighted = weights * self.shaped_rewards
        return (weighted.sum() / weights.sum()).expand(NUM_PROMPTS), weighted.sum(-1) / weights.sum(-1)


def places(task: EnumerableTask, kind: str, seed: int) -> dict[str, Place]:
    """REMAINING_REGRET's policies, by exact gradient ascent on J: no sample is drawn."""
    reference = MODELS[kind](task, seed=seed)
    policy = copy.deepcopy(reference).double()
    ref_logprobs = sequence_logprobs(reference, task)
    start = exact_values(task, ref_logprobs, ref_logprobs, BETA).regret
    optimizer = torch.optim.Adam(policy.parameters(), lr=ASCENT_RATE[kind])
    found: dict[str, Place] = {}
    for _ in range(5000):
        regret = exact_values(task, sequence_logprobs(policy, task), ref_logprobs, BETA).regret
        for name, share in REMAINING_REGRET.items():
            if name not in found and regret <= share * start:
                found[name] = Place(task, copy.deepcopy(policy), reference)
        if len(found) == len(REMAINING_REGRET):
            return found
        ascent = objective_gradient(task, policy, reference, BETA).split([p.numel() for p in policy.parameters()])
        for parameter, gradient in zip(policy.parameters(), ascent, strict=True):
            parameter.grad = -gradient.view_as(parameter)
        optimizer.step()
    raise RuntimeError("gradient ascent did not come near the optimum within 5000 steps")


# ---------------------------------------------------------------------------------------------------------- the methods

REINFORCE: dict[str, Any] = {"algorithm": "reinforce", "num_generations": 1}
PPO: dict[str, Any] = {"algorithm": "ppo", "num_generations": 1}
FOUR = {"num_generations": 4}
LEVELS = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
"""Added to the rewards of the three prompts, to make some prompts better than others by a standard deviation."""

Estimator = Callable[[Place], GradientLaw]


def plain(**words: Any) -> Estimator:
    return lambda place: place.law(words)


def averaged(place: Place) -> GradientLaw:
    """REINFORCE with its moving average as it would be if the policy had stood still for long: the mean of all
    trajectory rewards, of all prompts."""
    state = MethodState(beta=BETA, average=MovingAverage(place.shaped_means.mean().item(), 1))
    return place.law(REINFORCE, state=state)


def with_values(**words: Any) -> Estimator:
    """With the exact value function, the best that one could learn."""
    return lambda place: place.law({**PPO, **words}, values=place.values)


def uneven(estimate: Estimator) -> Estimator:
    """The same where the prompts' rewards have other levels, which changes neither preferences nor the optimum."""
    return lambda place: estimate(replace(place, task=place.less(-LEVELS)))


METHODS: dict[str, Estimator] = {
    "P3O, RLOO, CoPG, REBEL; K = 2": plain(algorithm="p3o"),
    "the same, uneven prompts": uneven(plain(algorithm="p3o")),
    "P3O, RLOO, CoPG, REBEL; K = 4": plain(algorithm="rloo", **FOUR),
    "REINFORCE, no baseline": plain(**REINFORCE),
    "REINFORCE, moving average": averaged,
    "REINFORCE, moving average, uneven prompts": uneven(averaged),
    "REINFORCE, best constant": lambda place: place.law(REINFORCE, task=place.less(place.best_baselines[0])),
    "REINFORCE, mean of the prompt": lambda place: place.law(REINFORCE, task=place.less(place.shaped_means)),
    "REINFORCE, best of the prompt": lambda place: place.law(REINFORCE, task=place.less(place.best_baselines[1])),
    "PPO, VPG; values 0": plain(**PPO),
    "PPO, VPG; values 0, uneven prompts": uneven(plain(**PPO)),
    "PPO, VPG; exact values": with_values(),
    "PPO, exact values, lambda 0.95": with_values(**{"ppo.lam": 0.95}),
    "online DPO, K = 2": plain(algorithm="online_dpo"),
    "online IPO, K = 2": plain(algorithm="online_ipo"),
    "GRPO, K = 2": plain(algorithm="grpo"),
    "GRPO, K = 4": plain(algorithm="grpo", **FOUR),
    "RAFT, K = 4": plain(algorithm="raft", **FOUR),
}
ORACLES = ("best constant", "of the prompt", "exact values")
"""What stands in the name of an estimator that no training run has: it knows an expectation exactly."""
COMPARED = (
    "P3O, RLOO, CoPG, REBEL; K = 4",
    "REINFORCE, moving average",
    "REINFORCE, moving average, uneven prompts",
    "REINFORCE, best of the prompt",
    "PPO, VPG; values 0",
    "PPO, VPG; values 0, uneven prompts",
    "PPO, VPG; exact values",
)
"""With the pair, in the answer to the reviewer."""


# ----------------------------------------------------------------------------------------------------------- the record


def measure(seeds: Sequence[int], kinds: Sequence[str]) -> dict[str, Any]:
    """All figures, as they go into the JSON: model -> place -> method -> quantity -> one number a seed."""
    quantities = ("noise_scale", "with_prompts", "cosine")
    found: dict[str, Any] = {
        kind: {place: {method: {q: [] for q in quantities} for method in METHODS} for place in REMAINING_REGRET}
        for kind in kinds
    }
    with progress("laws", len(kinds) * len(seeds) * len(REMAINING_REGRET) * len(METHODS)) as advance:
        for kind in kinds:
            for seed in seeds:
                task = EnumerableTask.random(
                    vocab_size=VOCAB_SIZE,
                    num_prompts=NUM_PROMPTS,
                    max_completion_length=MAX_LENGTHS[kind],
                    seed=seed,
                )
                for name, place in places(task, kind, seed).items():
                    ascent = objective_gradient(task, place.policy, place.reference, BETA)
                    for method, estimate in METHODS.items():
                        for quantity, value in figures(estimate(place), ascent).items():
                            found[kind][name][method][quantity].append(float(f"{value:.6g}"))
                        advance(1)
    return {"seeds": list(seeds), "beta": BETA, "figures": found}


def figures(law: GradientLaw, ascent: Tensor) -> dict[str, float]:
    """Completions until signal equals noise, with the prompts given and with prompts drawn too; and the cosine between
    the expected step and the gradient of J."""
    signal = law.gradient.square().sum().item()
    return {
        "noise_scale": law.noise_scale,
        "with_prompts": law.num_generations * (law.variance + law.prompt_variance) / signal,
        "cosine": torch.cosine_similarity(-law.gradient, ascent, 0).item(),
    }


def provenance(argv: Sequence[str], output: Path) -> dict[str, Any]:
    """What is needed to get the figures again, without a path of the machine."""
    found = environment()
    del found["command"]
    shown = ["..." if word == str(output) else word for word in argv]
    return {
        "benchmark": "gradient_variance",
        "command": shlex.join(["python", "benchmarks/gradient_variance.py", *shown]),
        "environment": {**found, "matplotlib": importlib.metadata.version("matplotlib")},
    }


NOTES = """\
- P3O, RLOO, CoPG and REBEL of the same K take one gradient at ratio 1 but for its size (K = 4 was taken of RLOO), and
  PPO without whitening that of VPG.
- Leave-one-out is REINFORCE with the mean of the prompt, plus a noise that falls like 1 / (K - 1). That mean is not
  quite the best baseline, but near it.
- On the first half of the way a pair needs about twice the completions of a common baseline where the prompts are
  alike, and as many where they are not. Near the optimum the common baseline needs more, by up to a factor of tens.
- A baseline common to all prompts leaves in the gradient how much better one prompt is than another. A shift that
  differs between prompts, which means nothing for preferences, is then all noise; a pair does not see it.
- Towards the optimum r - beta log(policy / reference) becomes one number a prompt, and the gradient of every single
  pair vanishes with the signal. With a common baseline, or with values 0, the signal vanishes and the noise does not.
- With the exact values PPO and VPG scatter less than a pair. A value function is learned, though, and starts at 0.
- Prompts drawn: more completions of one prompt mean fewer prompts in the same batch, which this column charges for.
- A cosine of 1 says that the expected step is along the gradient of J. Of the others the noise is held against their
  own expected step, wherever that leads."""


def as_markdown(record: dict[str, Any]) -> str:
    """The record to read."""
    lines = [
        "# Gradient variance, recorded",
        "",
        f"`{record['command']}`",
        "",
        "Machine and versions: " + "; ".join(f"{key} {value}" for key, value in record["environment"].items()),
        "",
        f"Languages of {VOCAB_SIZE} words with {NUM_PROMPTS} prompts and all completions of at most "
        f"{MAX_LENGTHS['tabular']} tokens (tabular) or {MAX_LENGTHS['transformer']} (transformer); normal rewards of "
        f"standard deviation 1, beta {record['beta']}. Seeds {', '.join(map(str, record['seeds']))}: each has rewards "
        "and weights of its own. Nothing is sampled. Half way: at half of the reference's regret; near the optimum: at "
        f"a sixteenth. Uneven prompts: rewards of the three prompts moved by "
        f"{', '.join(f'{level:g}' for level in LEVELS.tolist())}.",
        "",
        "![Noise scale of each method at three policies](gradient_variance.svg)",
        "",
        "Noise scale: completions in a batch from which on its mean gradient has more signal than noise, the prompts "
        "given; in brackets with prompts drawn at random as well. Median over the seeds, lowest to highest below it. "
        "Rows in italics know an expectation exactly, which no training run does.",
    ]
    for kind, by_place in record["figures"].items():
        lines += [
            "",
            f"## {'Free table of logits' if kind == 'tabular' else 'Tiny transformer'}",
            "",
            f"| method | {' | '.join(by_place)} | cosine to the gradient of J |",
            "|---|" + "---:|" * (len(by_place) + 1),
        ]
        for method in METHODS:
            cells = [cell(found[method]) for found in by_place.values()]
            cosines = [value for found in by_place.values() for value in found[method]["cosine"]]
            lines.append(f"| {shown_name(method)} | {' | '.join(cells)} | {cosine_range(cosines)} |")
    lines += [
        "",
        "## Does a baseline of one other sample need large batches?",
        "",
        "Noise scale over that of P3O at K = 2, median (lowest to highest) over seeds and models:",
        "",
        f"| | {' | '.join(REMAINING_REGRET)} |",
        "|---|" + "---:|" * len(REMAINING_REGRET),
    ]
    for method in COMPARED:
        cells = [ratio_range(over_pair(record, method, place)) for place in REMAINING_REGRET]
        lines.append(f"| {shown_name(method)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", NOTES]) + "\n"


def over_pair(record: dict[str, Any], method: str, place: str) -> list[float]:
    """Noise scale of a method over P3O's with K = 2, of each seed of each model."""
    pair = next(iter(METHODS))
    return [
        other / own
        for by_place in record["figures"].values()
        for other, own in zip(by_place[place][method]["noise_scale"], by_place[place][pair]["noise_scale"], strict=True)
    ]


def ratio_range(values: Sequence[float]) -> str:
    return f"{digits(statistics.median(values))} ({digits(min(values))} to {digits(max(values))})"


def shown_name(method: str) -> str:
    return f"*{method}*" if any(oracle in method for oracle in ORACLES) else method


def cell(found: dict[str, list[float]]) -> str:
    values = found["noise_scale"]
    median, drawn = statistics.median(values), statistics.median(found["with_prompts"])
    return f"{digits(median)} ({digits(drawn)})<br>{digits(min(values))} to {digits(max(values))}"


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}" if value < 1000 else f"{float(f'{value:.3g}'):.0f}"


def cosine_range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3f}", f"{max(values):.3f}"
    return low if low == high else f"{low} to {high}"


# ----------------------------------------------------------------------------------------------------------- the figure

COLOURS = {"tabular": "#0072B2", "transformer": "#D55E00"}
"""Of Okabe and Ito's palette, told apart with any colour vision."""


def draw(record: dict[str, Any], path: Path) -> None:
    """A row a method, a panel a policy: each seed a point, the median a bar; the same record gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": "pairtune",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    methods = [*METHODS]
    with rc_context(style):
        figure = Figure(figsize=(10.4, 5.4), layout="constrained")
        panels = figure.subplots(1, len(REMAINING_REGRET), sharey=True, sharex=True)
        for axes, place in zip(panels, REMAINING_REGRET, strict=True):
            for offset, (kind, by_place) in zip((-0.16, 0.16), record["figures"].items(), strict=False):
                rows = [row + offset for row in range(len(methods))]
                values = [by_place[place][method]["noise_scale"] for method in methods]
                medians = [statistics.median(found) for found in values]
                axes.plot(
                    medians, rows, "|", color=COLOURS[kind], markersize=8, markeredgewidth=2, label=f"{kind}, median"
                )
                for row, found in zip(rows, values, strict=True):
                    axes.plot(found, [row] * len(found), ".", color=COLOURS[kind], alpha=0.5, markersize=4)
            axes.set_xscale("log")
            axes.set_title(place, fontsize=9, loc="left")
            axes.grid(axis="x", linewidth=0.5, alpha=0.4)
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].invert_yaxis()
        figure.supxlabel("noise scale: completions from which on a batch has more signal than noise", fontsize=9)
        panels[-1].legend(frameon=False, fontsize=8, loc="lower right")
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_whole(0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--models", choices=[*MODELS], nargs="+", default=[*MODELS], help="default: both")
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
    torch.set_num_threads(1)  # matrices this small are not worth a second
    record = {**provenance(argv, args.output), **measure(args.seeds, args.models)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gradient_variance.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "gradient_variance.md").write_text(as_markdown(record))
    draw(record, args.output / "gradient_variance.svg")
    print((args.output / "gradient_variance.md").read_text())


if __name__ == "__main__":
    main()
