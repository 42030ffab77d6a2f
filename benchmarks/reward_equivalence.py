"""Theorem 2 of the P3O paper as an experiment: does a method see a shift of the reward that differs between prompts?

    python benchmarks/reward_equivalence.py                         # three seeds, about five minutes on an idle core
    python benchmarks/reward_equivalence.py --seeds 0 --steps 2 --models tabular

A reward r(x, y) and r(x, y) + delta(x) mean the same preferences and the same optimal policy (Wu et al. 2023, arXiv
2310.00212, Definition 1 and Theorem 2). Here every method is trained twice by `pairtune.train` from the same seed, once
on each, and after every optimizer update the two policies are compared: the largest difference of a completion's
log-probability, over all completions of all prompts by enumeration, and the largest difference of a weight. A method to
which the two rewards are one gives 0 in every bit; there is no tolerance.

Rewards and shifts are multiples of 1/64, so that float32 holds their sum exactly; one more line shows what rounding
does where they are not. Methods that learn from a dataset of preferences never read a reward and are left out. Written
are reward_equivalence.json (every number), reward_equivalence.md and reward_equivalence.svg (both made from the JSON
alone).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.optimizer import register_optimizer_step_post_hook

from pairtune import TrainConfig, train
from pairtune.evidence.exact import EnumerableTask, sequence_logprobs, tabular_model, tiny_transformer
from pairtune.runs.display import progress
from pairtune.runs.folder import environment

MODELS: dict[str, Callable[..., Any]] = {"transformer": tiny_transformer, "tabular": tabular_model}
VOCAB_SIZE, NUM_PROMPTS, MAX_LENGTH = 3, 4, 4
SIZES = (1, 8, 64)
"""The largest |delta(x)|, reward units; the rewards themselves have a standard deviation of 1."""
LEARNING_RATES = {"transformer": 0.001, "tabular": 0.03}
SETTINGS: dict[str, Any] = {
    "beta": 0.5,
    "num_iterations": 2,  # with one update a batch nothing is ever clipped
    "batch_size": 16,
    "num_generations": 2,
}
GROUPS_OF_FOUR = {"num_generations": 4, "batch_size": 8}
"""As many completions a step."""

INVARIANT: dict[str, dict[str, Any]] = {
    "P3O, joint clip": {"algorithm": "p3o"},
    "P3O, separate clip": {"algorithm": "p3o", "p3o.clip": "separate"},
    "P3O, four completions": {"algorithm": "p3o", **GROUPS_OF_FOUR},
    "RLOO": {"algorithm": "rloo"},
    "RLOO, four completions": {"algorithm": "rloo", **GROUPS_OF_FOUR},
    "CoPG": {"algorithm": "copg"},
    "REBEL": {"algorithm": "rebel"},
    "online DPO": {"algorithm": "online_dpo"},
    "online IPO": {"algorithm": "online_ipo"},
    "RAFT, four completions": {"algorithm": "raft", **GROUPS_OF_FOUR},
    "GRPO, four completions": {"algorithm": "grpo", **GROUPS_OF_FOUR},
}
"""To these the two rewards are one."""
OTHERS: dict[str, dict[str, Any]] = {
    "PPO": {"algorithm": "ppo"},
    "PPO, no whitening": {"algorithm": "ppo", "ppo.whiten_advantages": False},
    "VPG": {"algorithm": "vpg"},
    "REINFORCE, moving average": {"algorithm": "reinforce"},
    "REINFORCE, no baseline": {"algorithm": "reinforce", "reinforce.baseline": "none"},
    "P3O, running scale": {"algorithm": "p3o", "scale_rewards": "running"},
}
"""To these they are not."""
OFF_GRID = "P3O, shift not on the grid"
"""The same invariant method, with a shift that float32 must round."""
RESULTS = Path(__file__).parent / "results"


# ------------------------------------------------------------------------------------------------------ the experiment


def make_task(seed: int) -> EnumerableTask:
    return EnumerableTask.random(
        vocab_size=VOCAB_SIZE, num_prompts=NUM_PROMPTS, max_completion_length=MAX_LENGTH, seed=seed
    )


def draw_delta(seed: int, size: float) -> Tensor:
    """(P,) float64, another for each prompt, of largest magnitude `size`: multiples of 1/64 for a whole `size`, and of
    one direction for all sizes."""
    delta = torch.randperm(129, generator=torch.Generator().manual_seed(seed))[:NUM_PROMPTS] / 64 - 1
    largest = delta.abs().argmax()
    delta[largest] = delta[largest].sign()
    return size * delta.double()


def shifted(task: EnumerableTask, delta: Tensor) -> EnumerableTask:
    """The task with r(x, y) + delta(x)."""
    return replace(task, rewards=task.rewards + delta[:, None])


def run(words: dict[str, Any], task: EnumerableTask, *, seed: int, steps: int, kind: str = "transformer") -> Tensor:
    """Train through `pairtune.train`, in silence and in a folder that is gone afterwards.

    (U + 1, D) float32: all weights of the policy, before the first optimizer update and after each.
    """
    model, weights = MODELS[kind](task, seed=seed), []

    def watch(*_: Any) -> None:
        weights.append(parameters_to_vector(model.parameters()).detach().clone())

    watch()
    with contextlib.ExitStack() as stack:
        output_dir = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        hook = register_optimizer_step_post_hook(watch)
        stack.callback(hook.remove)
        result = train(
            TrainConfig(
                model="in memory",
                dataset="in memory",
                dataset_test_split=None,
                device="cpu",
                dtype="float32",
                output_dir=output_dir,
                max_completion_length=task.max_completion_length,
                max_steps=steps,
                save_steps=0,
                num_completions_to_log=0,
                seed=seed,
                **{**SETTINGS, "learning_rate": LEARNING_RATES[kind], **words},
            ),
            model=model,
            tokenizer=task.tokenizer(),
            reward_funcs=[task.reward_func],
            train_dataset=task.dataset(16 * task.num_prompts),
        )
    if not result.finished:  # `train` took the signal that was meant for all of this
        raise KeyboardInterrupt
    return torch.stack(weights)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Stricter than `torch.equal`, to which 0 and -0 are one."""
    return torch.equal(one.view(torch.int32), other.view(torch.int32))


def distances(one: Tensor, other: Tensor, task: EnumerableTask, kind: str = "transformer") -> dict[str, list[float]]:
    """The largest difference after each update, U + 1 numbers: of a log-probability (nats), and of a weight."""
    models = MODELS[kind](task), MODELS[kind](task)
    found: dict[str, list[float]] = {"logprob": [], "weight": []}
    for pair in zip(one, other, strict=True):
        gap = torch.zeros(())
        if not same_bits(*pair):  # the same weights are the same policy
            for model, weights in zip(models, pair, strict=True):
                vector_to_parameters(weights, model.parameters())
            gap = (sequence_logprobs(models[0], task) - sequence_logprobs(models[1], task)).abs().max()
        found["logprob"].append(gap.item())
        found["weight"].append((pair[0] - pair[1]).abs().max().item())
    return found


# ----------------------------------------------------------------------------------------------------------- the record


def measure(seeds: Sequence[int], steps: int, kinds: Sequence[str]) -> dict[str, Any]:
    """All figures, as they go into the JSON."""
    methods = {**INVARIANT, **OTHERS, OFF_GRID: INVARIANT["P3O, joint clip"]}
    with progress("runs", len(kinds) * len(methods) * len(seeds) * (1 + len(SIZES))) as advance:
        found = {
            kind: {name: compare(name, words, seeds, steps, kind, advance) for name, words in methods.items()}
            for kind in kinds
        }
    return {
        "seeds": list(seeds),
        "steps": steps,
        "settings": SETTINGS,
        "learning_rates": {kind: LEARNING_RATES[kind] for kind in kinds},
        "shifts": {str(seed): draw_delta(seed, 1).tolist() for seed in seeds},
        "distances": found,
    }


def compare(
    name: str, words: dict[str, Any], seeds: Sequence[int], steps: int, kind: str, advance: Callable[[float], None]
) -> dict[str, dict[str, list[list[float]]]]:
    """size -> logprob or weight -> one list of distances a seed, of four digits. `advance` is told of runs."""
    found: dict[str, dict[str, list[list[float]]]] = {str(size): {"logprob": [], "weight": []} for size in SIZES}
    for seed in seeds:
        task = make_task(seed)
        plain = run(words, task, seed=seed, steps=steps, kind=kind)
        advance(1)
        for size in SIZES:
            delta = draw_delta(seed, size / 3 if name == OFF_GRID else size)
            other = run(words, shifted(task, delta), seed=seed, steps=steps, kind=kind)
            advance(1)
            for quantity, values in distances(plain, other, task, kind).items():
                found[str(size)][quantity].append([float(f"{value:.4g}") for value in values])
    return found


def provenance(argv: Sequence[str], output: Path) -> dict[str, Any]:
    """What is needed to get the figures again, without a path of the machine."""
    found = environment()
    del found["command"]
    shown = ["..." if word == str(output) else word for word in argv]
    return {
        "benchmark": "reward_equivalence",
        "command": shlex.join(["python", "benchmarks/reward_equivalence.py", *shown]),
        "environment": {**found, "matplotlib": importlib.metadata.version("matplotlib")},
    }


def surprises(record: dict[str, Any]) -> list[str]:
    """Where a method does otherwise than expected, in any seed."""
    found = []
    for kind, methods in record["distances"].items():
        for name, by_size in methods.items():
            for size, quantities in by_size.items():
                for quantity, runs in quantities.items():
                    never = not any(value for run in runs for value in run)
                    at_once = all(run[1] > 0 for run in runs)
                    if (name in INVARIANT and not never) or (name in OTHERS and not at_once):
                        found.append(f"{name} at {size} ({kind}, {quantity})")
    return found


NOTES = """\
- `exactly 0` is no small number: not one bit of one weight differs after any update, in any seed.
- Pairwise methods see a reward only as a difference within a group. The library takes that difference before anything
  else, so that nothing is rounded; what remains of the shift is exactly nothing.
- PPO and VPG subtract a value function that starts at 0 and has yet to learn delta(x). A moving average is one number
  for all prompts: it can follow the mean of delta(x), not delta(x). Whitening is over the batch, and does not help.
- Adam divides by the size of its gradients, and their norm is clipped: that is why the first update differs far less
  than 64 times as much at 64 as at 1.
- A running reward scale contains the spread of delta(x) between prompts, so it ends the invariance of any method. At
  the first update the scale is one factor before all gradients, which Adam divides out but for its epsilon and
  rounding; the KL term and the later batches then tell the two rewards apart.
- A shift that is not on the grid is rounded when the reward function's answer becomes a float32. The invariance then
  holds up to that rounding, unless a rounded weight makes the two runs sample different completions: from then on they
  are different runs."""


def as_markdown(record: dict[str, Any]) -> str:
    """The record to read."""
    settings, unexpected = record["settings"], surprises(record)
    rates = " and ".join(f"{rate} ({kind})" for kind, rate in record["learning_rates"].items())
    lines = [
        "# Equivalent rewards, recorded",
        "",
        f"`{record['command']}`",
        "",
        "Machine and versions: " + "; ".join(f"{key} {value}" for key, value in record["environment"].items()),
        "",
        "Two runs of `pairtune.train` from the same seed, on r(x, y) and on r(x, y) + delta(x). The policy is a tiny "
        f"Llama (transformer) or a free table of logits (tabular) in float32 over {VOCAB_SIZE} words, with "
        f"{NUM_PROMPTS} prompts and all completions of at most {MAX_LENGTH} tokens. {record['steps']} steps of "
        f"{settings['batch_size'] * settings['num_generations']} completions, {settings['num_iterations']} updates "
        f"each. AdamW, learning rate {rates}, beta {settings['beta']}. Seeds {', '.join(map(str, record['seeds']))}: "
        "each has rewards, weights, samples and shifts of its own.",
        "",
        "![Distance between two policies](reward_equivalence.svg)",
        "",
        "Distance: the largest |log p - log p'| between the two policies, in nats, over all completions of all "
        "prompts, by enumeration. Median (lowest to highest) over the seeds.",
    ]
    for kind, methods in record["distances"].items():
        lines += [
            "",
            f"## {kind.capitalize()}",
            "",
            "| method | largest delta | after the first update | after the last | of a weight, after the last |",
            "|---|---:|---:|---:|---:|",
            *(row for name, by_size in methods.items() for row in rows(name, by_size)),
        ]
    verdict = "Not so: " + ", ".join(unexpected) if unexpected else "It is so in every run"
    lines += [
        "",
        f"Expected: exactly 0 after every update for {'; '.join(INVARIANT)}. More than 0 from the first update on for "
        f"{'; '.join(OTHERS)}. {verdict}.",
        "",
        NOTES,
    ]
    return "\n".join(lines) + "\n"


def rows(name: str, by_size: dict[str, dict[str, list[list[float]]]]) -> list[str]:
    """A row of the table for each size; a single one where all is 0."""
    cells = {
        size + " / 3" * (name == OFF_GRID): " | ".join(
            spread([run[place] for run in found[quantity]])
            for quantity, place in (("logprob", 1), ("logprob", -1), ("weight", -1))
        )
        for size, found in by_size.items()
    }
    if not any(value for found in by_size.values() for runs in found.values() for run in runs for value in run):
        return [f"| {name} | {', '.join(cells)} | {next(iter(cells.values()))} |"]
    return [f"| {name} | {size} | {cell} |" for size, cell in cells.items()]


def spread(values: Sequence[float]) -> str:
    if not any(values):
        return "exactly 0"
    return f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"


# ----------------------------------------------------------------------------------------------------------- the figure

COLOURS = {
    "PPO": "#D55E00",
    "PPO, no whitening": "#E69F00",
    "VPG": "#CC79A7",
    "REINFORCE, moving average": "#009E73",
    "REINFORCE, no baseline": "#56B4E9",
    "P3O, running scale": "#555555",
    OFF_GRID: "#000000",
}
"""Of Okabe and Ito's palette, told apart with any colour vision."""
ZERO_COLOUR = "#0072B2"
SMALLEST = 1e-8
"""Below this the axis is linear, so that 0 has a place of its own."""
SHOWN_SIZE = "1"


def draw(record: dict[str, Any], path: Path) -> None:
    """Distance against updates and against the size of the shift; the same record gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.hashsalt": "pairtune",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    updates = range(record["steps"] * record["settings"]["num_iterations"] + 1)
    kind, methods = next(iter(record["distances"].items()))
    panels = {
        "logprob": f"log-probability, largest |delta| {SHOWN_SIZE}",
        "weight": f"weight, largest |delta| {SHOWN_SIZE}",
        "size": "log-probability, after the last update",
    }
    with rc_context(style):
        figure = Figure(figsize=(10.4, 4.4), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (quantity, title) in zip(axes, panels.items(), strict=True):
            for name, by_size in methods.items():
                if quantity == "size":
                    x: Sequence[float] = list(map(float, by_size))
                    by_x = [[run[-1] for run in found["logprob"]] for found in by_size.values()]
                else:
                    x, by_x = updates, list(zip(*by_size[SHOWN_SIZE][quantity], strict=True))
                colour = COLOURS.get(name, ZERO_COLOUR)
                axis.plot(
                    x, [statistics.median(values) for values in by_x], color=colour, linewidth=1.6,
                    linestyle={OFF_GRID: ":", "P3O, running scale": "--"}.get(name, "-"),
                    label=name if name in COLOURS else "_", zorder=3 if name in INVARIANT else 2,
                )  # fmt: skip
                if name not in INVARIANT:
                    axis.fill_between(x, [*map(min, by_x)], [*map(max, by_x)], color=colour, alpha=0.15, lw=0)
            axis.set_title(title, fontsize=9, loc="left")
            axis.set_yscale("symlog", linthresh=SMALLEST, linscale=0.6)
            axis.grid(axis="y", linewidth=0.5, alpha=0.4)
        ticks = [10.0**power for power in range(-8, 2, 2)]
        axes[0].set_yticks([0, *ticks], ["exactly 0", *(f"{tick:g}" for tick in ticks)])
        axes[0].set_ylim(-SMALLEST / 3, 50)
        axes[0].set_ylabel(f"largest difference of the two policies ({kind})", fontsize=8)
        for axis in axes[:2]:
            axis.set_xlabel("optimizer updates")
        axes[2].set_xscale("log", base=8)
        axes[2].set_xticks([*map(float, SIZES)], [*map(str, SIZES)])
        axes[2].set_xlabel("largest |delta(x)|")
        names = [*INVARIANT]
        figure.suptitle(
            f"On the line at 0: {'; '.join(names[:7])};\n{'; '.join(names[7:])}",
            color=ZERO_COLOUR, fontsize=8, x=0.01, ha="left",
        )  # fmt: skip
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


# ---------------------------------------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=_whole(0), nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--steps", type=_whole(1), default=6, help="steps of two updates each; default: 6")
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
    record = {**provenance(argv, args.output), **measure(args.seeds, args.steps, args.models)}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "reward_equivalence.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.output / "reward_equivalence.md").write_text(as_markdown(record))
    draw(record, args.output / "reward_equivalence.svg")
    print((args.output / "reward_equivalence.md").read_text())


if __name__ == "__main__":
    main()
