"""Learning curves: every method trains the same tiny transformer on as many completions, its regret known exactly.

    python benchmarks/learning_curves.py                   # sweep and three seeds, ten to twenty minutes on one core
    python benchmarks/learning_curves.py --seeds 0 --methods p3o ppo

The task is a language of three prompts with fifteen completions each; what is measured is the regret J(pi*) - J(pi)
with J = E[r] - beta KL(pi || reference), enumerated and not sampled, at every second step of `pairtune.train`.

One rule for all methods: as many completions, as many passes over each batch, the defaults of `TrainConfig` but for
`WORDS`, and the learning rate from `LEARNING_RATES` by one run each with a seed of its own: that of the lowest mean
regret over the last quarter of the run. dpo and ipo learn from pairs that the reference sampled, each met in one step,
with labels drawn by s(r - r'). Written are learning_curves.json (every number), learning_curves.md and
learning_curves.svg (both made from the JSON alone).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from limits import (
    BETA,
    RESULTS,
    Pairs,
    Progress,
    configuration,
    limit_of,
    listed,
    machine_line,
    provenance,
    spread,
    trained,
    whole,
)
from torch import Tensor

from pairtune import TrainConfig
from pairtune.config import METHODS
from pairtune.evidence.exact import EnumerableTask, exact_values, sequence_logprobs, tiny_transformer

TASK = EnumerableTask.random(num_prompts=3, max_completion_length=3, seed=0)
WORDS: dict[str, Any] = {"num_generations": 4, "batch_size": 48, "num_iterations": 2, "max_steps": 40}
PER_STEP = 192
"""Completions a step, of every method: 48 prompts times 4, or 96 pairs."""
OFFLINE_WORDS: dict[str, Any] = {"batch_size": 96, "eval_steps": 2}
"""An offline method asks no reward function while it trains, only when it is evaluated."""
LEARNING_RATES = (0.001, 0.003, 0.01)
SWEEP_SEED = 100
EVERY = 2
"""Steps between two measurements."""

CURVES: dict[str, dict[str, Any]] = {
    "p3o": {"algorithm": "p3o"},
    "p3o, clipped separately": {"algorithm": "p3o", "p3o.clip": "separate"},
    "rloo": {"algorithm": "rloo"},
    "reinforce": {"algorithm": "reinforce"},
    "vpg": {"algorithm": "vpg"},
    "ppo": {"algorithm": "ppo"},
    "copg": {"algorithm": "copg"},
    "rebel": {"algorithm": "rebel"},
    "online_dpo": {"algorithm": "online_dpo"},
    "dpo": {"algorithm": "dpo", **OFFLINE_WORDS},
    "online_ipo": {"algorithm": "online_ipo"},
    "ipo": {"algorithm": "ipo", **OFFLINE_WORDS},
    "grpo": {"algorithm": "grpo"},
    "raft": {"algorithm": "raft"},
}
"""In the order of the figure: those whose limit is the optimum first."""

TITLES = {
    "p3o": "P3O, clipped jointly",
    "p3o, clipped separately": "P3O, clipped separately",
    "rloo": "RLOO",
    "reinforce": "REINFORCE",
    "vpg": "VPG",
    "ppo": "PPO",
    "copg": "CoPG",
    "rebel": "REBEL",
    "online_dpo": "online DPO",
    "dpo": "DPO (offline)",
    "online_ipo": "online IPO",
    "ipo": "IPO (offline)",
    "grpo": "GRPO",
    "raft": "RAFT",
}


# ------------------------------------------------------------------------------------------------------------- learning


def sampled_pairs(reference: Any, num_pairs: int, *, seed: int) -> Pairs:
    """Pairs of different completions that the reference samples, prompts in turn, labels drawn by s(r - r')."""
    generator = torch.Generator().manual_seed(seed)
    law = sequence_logprobs(reference, TASK).exp()
    pairs: Pairs = []
    while len(pairs) < num_pairs:
        prompt = len(pairs) % TASK.num_prompts
        first, second = torch.multinomial(law[prompt], 2, replacement=True, generator=generator).tolist()
        if first != second:
            chance = (TASK.rewards[prompt, first] - TASK.rewards[prompt, second]).sigmoid()
            wins = torch.rand((), generator=generator, dtype=torch.float64) < chance
            pairs.append((prompt, first, second) if wins else (prompt, second, first))
    return pairs


def pairs_for(config: TrainConfig, reference: Any) -> Pairs:
    """As many as the run meets, each once."""
    if not METHODS[config.algorithm].offline:
        return []
    return sampled_pairs(reference, config.batch_size * config.max_steps, seed=config.seed)


def curve(words: dict[str, Any], learning_rate: float, seed: int) -> dict[str, Any]:
    """One run: completions seen, and exact regret, KL and reward at each of these."""
    config = configuration(TASK, {**WORDS, **words, "learning_rate": learning_rate, "seed": seed})
    model = tiny_transformer(TASK, seed=0)
    ref = sequence_logprobs(model, TASK)
    pairs, points = pairs_for(config, model), {}

    def watching(prompts: list[str], completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        # Asked for a batch before the step's updates, and by evaluations after them: both count the steps done.
        step = trainer_state.global_step
        if step % EVERY == 0:
            points[step] = exact_values(TASK, sequence_logprobs(model, TASK), ref, config.beta)
        return TASK.reward_func(prompts, completion_ids)

    trained(config, TASK, model, pairs=pairs, reward_func=watching, eval_dataset=TASK.dataset(TASK.num_prompts))
    steps = sorted(points)
    return {
        "seed": seed,
        "learning_rate": learning_rate,
        "completions": [PER_STEP * step for step in steps],
        **{
            name: [float(f"{getattr(points[step], name):.6g}") for step in steps] for name in ("regret", "kl", "reward")
        },
    }


def end_of(run: dict[str, Any]) -> float:
    """Mean regret over the last quarter of a run: what the sweep goes by."""
    regrets = run["regret"]
    return statistics.fmean(regrets[-max(1, len(regrets) // 4) :])


def measure(names: Sequence[str], seeds: Sequence[int]) -> dict[str, Any]:
    """The sweep of each method, then its seeds at the learning rate that came out."""
    progress = Progress(len(names) * (len(LEARNING_RATES) + len(seeds)))
    curves = {}
    for name in names:
        words, sweep = CURVES[name], {}
        for rate in LEARNING_RATES:
            with progress(f"{name}, learning rate {rate}"):
                sweep[str(rate)] = end_of(curve(words, rate, SWEEP_SEED))
        best = min(LEARNING_RATES, key=lambda rate: sweep[str(rate)])
        runs = []
        for seed in seeds:
            with progress(f"{name}, seed {seed}"):
                runs.append(curve(words, best, seed))
        curves[name] = {"words": words, "limit_regret": limit_regret(words), "sweep": sweep, "runs": runs}
    return {"seeds": list(seeds), "words": WORDS, "curves": curves}


def limit_regret(words: dict[str, Any]) -> float:
    """Regret of the point that a free table would come to rest at."""
    model = tiny_transformer(TASK, seed=0)
    ref = sequence_logprobs(model, TASK)
    law = limit_of(configuration(TASK, {**WORDS, **words, "seed": 0}), TASK, model, offline_weights(ref))
    return max(0.0, exact_values(TASK, law.clamp(min=1e-300).log(), ref, BETA).regret)


def offline_weights(ref: Tensor) -> Tensor:
    """(P, N, N) how often the first is chosen and the second rejected, in infinitely many of `sampled_pairs`."""
    met = ref.exp()[:, :, None] * ref.exp()[:, None]
    return met * (TASK.rewards[:, :, None] - TASK.rewards[:, None]).sigmoid()


# ----------------------------------------------------------------------------------------------------------- the record


NOTES = """\
- The limit is where a free table of logits would come to rest with ever smaller steps (`limit_of` in limits.py), for
  dpo and ipo with infinitely many pairs. A run with a constant learning rate and {completions} completions need not be
  there yet, and a transformer that shares its weights between histories need not reach it.
- Regret says how near a policy is to the optimum of E[r] - beta KL, which is not what raft, grpo and the ipo family
  aim at: they may pass nearer to the optimum than where they end.
- Two passes a batch are one rule for all, but not neutral: the second pass of rloo, reinforce and vpg has no ratio to
  the policy that sampled. The first pass of rloo is that of p3o, so this is what parts their curves.
- raft comes to rest at another point than its limit: of one prompt the best completion has probability 0.012 under the
  reference, and the policy has collapsed onto the next best that it samples before the best is met often enough. What
  is not sampled is lost for good.
- dpo and ipo meet 3840 pairs, each in one step. What these happen to say, and at a constant learning rate the last of
  them most, keeps both away from the limit for infinitely many.
- The sweep has one seed and three learning rates a method. Differences of a factor of two between methods are within
  what another sweep would change."""


def as_markdown(record: dict[str, Any]) -> str:
    """The record to read."""
    completions = next(iter(record["curves"].values()))["runs"][0]["completions"]
    marks = [completions[round((len(completions) - 1) * share)] for share in (0.25, 0.5, 1)]
    lines = [
        "# Learning curves, recorded",
        "",
        f"`{record['command']}`",
        "",
        machine_line(record),
        "",
        f"A transformer of two layers and hidden size 32 on a language of {TASK.num_prompts} prompts with "
        f"{TASK.num_completions} completions each, beta {BETA}. {PER_STEP} completions a step for every method, "
        f"{WORDS['num_iterations']} passes over each batch, {completions[-1]} completions in all. The learning rate is "
        f"that of {listed(LEARNING_RATES, 'g')} with the lowest mean regret over the last quarter of one run with seed "
        f"{SWEEP_SEED}; the rest are defaults.",
        "",
        "![Regret of every method](learning_curves.svg)",
        "",
        f"Regret, median (lowest to highest) of seeds {listed(record['seeds'], 'd')}, after so many completions; KL "
        "and reward at the end.",
        "",
        f"| method | learning rate | {listed(marks, 'd', ' | ')} | KL | reward | regret of its limit |",
        "|---|---:|" + "---:|" * (len(marks) + 3),
    ]
    for name, found in record["curves"].items():
        runs = found["runs"]
        cells = [spread([run["regret"][completions.index(mark)] for run in runs], ".4f") for mark in marks]
        ends = [f"{statistics.median(run[quantity][-1] for run in runs):.3f}" for quantity in ("kl", "reward")]
        lines.append(
            f"| {TITLES[name]} | {runs[0]['learning_rate']:g} | {' | '.join([*cells, *ends])} | "
            f"{found['limit_regret']:.4f} |"
        )
    start = next(iter(record["curves"].values()))["runs"][0]["regret"][0]
    lines += [
        "",
        f"All start at the reference, regret {start:.4f}.",
        "",
        "The sweep, mean regret over the last quarter:",
        "",
        f"| method | {listed(LEARNING_RATES, 'g', ' | ')} |",
        "|---|" + "---:|" * len(LEARNING_RATES),
        *(
            f"| {TITLES[name]} | {listed([found['sweep'][str(rate)] for rate in LEARNING_RATES], '.4f', ' | ')} |"
            for name, found in record["curves"].items()
        ),
    ]
    return "\n".join([*lines, "", NOTES.format(completions=completions[-1])]) + "\n"


# ----------------------------------------------------------------------------------------------------------- the figure

COLOURS = {True: "#0072B2", False: "#D55E00"}
"""Of Okabe and Ito's palette, told apart with any colour vision: whether the method's limit is the optimum."""


def draw(record: dict[str, Any], path: Path) -> None:
    """One panel a method: the median and the range of the seeds, all other medians in grey, its limit dashed. The same
    record gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    style: dict[Any, Any] = {
        "svg.hashsalt": "pairtune",
        "font.size": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    curves = record["curves"]
    medians = {
        name: [statistics.median(at) for at in zip(*(run["regret"] for run in found["runs"]), strict=True)]
        for name, found in curves.items()
    }
    lowest = min(min(run["regret"]) for found in curves.values() for run in found["runs"])
    with rc_context(style):
        columns = min(4, len(curves))
        rows = math.ceil(len(curves) / columns)
        figure = Figure(figsize=(2.1 * columns + 0.6, 1.7 * rows + 0.6), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for place in range(len(curves), rows * columns):
            grid.flat[place].remove()
            grid.flat[place - columns].xaxis.set_tick_params(labelbottom=True)  # now the lowest of its column
        for axes, (name, found) in zip(grid.flat, curves.items(), strict=False):
            completions = found["runs"][0]["completions"]
            colour = COLOURS[found["limit_regret"] < 1e-6]
            for other, median in medians.items():
                if other != name:
                    axes.plot(completions, median, color="#cccccc", linewidth=0.6, zorder=1)
            by_step = [*zip(*(run["regret"] for run in found["runs"]), strict=True)]
            band = [*map(min, by_step)], [*map(max, by_step)]
            axes.fill_between(completions, *band, color=colour, alpha=0.3, lw=0, zorder=2)
            axes.plot(completions, medians[name], color=colour, linewidth=1.5, zorder=3)
            if found["limit_regret"] >= 1e-6:
                axes.axhline(found["limit_regret"], color=colour, linewidth=0.9, linestyle=(0, (4, 2)), zorder=2)
            axes.set_title(TITLES[name], fontsize=8, loc="left", color=colour)
            axes.grid(axis="y", linewidth=0.4, alpha=0.4)
            axes.margins(x=0)
        axes = grid.flat[0]
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.8 * lowest)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k"))
        figure.supxlabel("completions seen", fontsize=8)
        figure.suptitle(
            f"Regret J(pi*) - J(pi): median and range of {len(record['seeds'])} seeds; grey: the other methods; "
            "dashed: a limit that is not the optimum", fontsize=8, x=0.01, ha="left",
        )  # fmt: skip
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=whole(0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--methods", nargs="+", choices=CURVES, default=list(CURVES), help="default: all")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results; older ones are replaced")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    record = {**provenance("learning_curves", argv, args.output), **measure(args.methods, args.seeds)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "learning_curves.json").write_text(json.dumps(record) + "\n")
    (args.output / "learning_curves.md").write_text(as_markdown(record))
    draw(record, args.output / "learning_curves.svg")
    print((args.output / "learning_curves.md").read_text())


if __name__ == "__main__":
    main()
