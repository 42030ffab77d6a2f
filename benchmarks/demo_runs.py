"""The demo over several seeds, recorded: `python benchmarks/demo_runs.py --seeds 0 1 2`.

Each seed is an ordinary `pairtune demo` run in its own folder; finished ones are not run again. From their logs come
benchmarks/results/demo.json and demo.md (figures with their spread, the command, the commit, the machine) and
docs/images/demo.svg.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from pairtune.demo import strongest_word_row
from pairtune.runs.metrics import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PICTURE = ROOT / "docs" / "images" / "demo.svg"
QUANTITIES = ("reward", "kl", "distinct_2", "ref_nats_per_token", "length", "truncated", "strongest_word_share")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the run folders stand")
    arguments = parser.parse_args()
    folders = {seed: arguments.runs / f"demo-seed-{seed}" for seed in arguments.seeds}
    for seed, folder in folders.items():
        if not (folder / "report.html").exists():
            command = [sys.executable, "-m", "pairtune", "demo", "--seed", str(seed), "--output_dir", str(folder)]
            subprocess.run([*command, "--overwrite"], check=True)
    runs = [read_run(seed, folder) for seed, folder in folders.items()]
    environment = json.loads((next(iter(folders.values())) / "environment.json").read_text())
    for name in ("command", "commit", "started"):  # the first holds a path of the machine, the others stand by each run
        environment.pop(name, None)
    record = {
        "command": f"python benchmarks/demo_runs.py --seeds {' '.join(map(str, arguments.seeds))}",
        "environment": environment,
        "runs": [{key: value for key, value in run.items() if key != "steps"} for run in runs],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "demo.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "demo.md").write_text(as_markdown(record))
    draw(runs)
    print((RESULTS / "demo.md").read_text())


def read_run(seed: int, folder: Path) -> dict[str, Any]:
    """What one run folder says: the first and last evaluation, the clipping and the time."""
    steps = read_jsonl(folder / "metrics.jsonl")
    evaluations = read_jsonl(folder / "evaluations.jsonl")
    samples = [s for s in read_jsonl(folder / "samples.jsonl") if s["split"] == "eval"]
    for line in evaluations:
        row = strongest_word_row([s for s in samples if s["step"] == line["step"]])
        line["strongest_word_share"] = dict(zip(("mean", "low", "high"), row[1:], strict=True))
    last_pass = [line["clip_ratio"] for line in steps]
    environment = json.loads((folder / "environment.json").read_text())
    return {
        "seed": seed,
        "commit": environment["commit"],
        "started": environment["started"],
        "num_steps": len(steps),
        "before": {name: evaluations[0][name] for name in QUANTITIES},
        "after": {name: evaluations[-1][name] for name in QUANTITIES},
        "clip_ratio_last_pass": {"mean": statistics.fmean(last_pass), "low": min(last_pass), "high": max(last_pass)},
        "step_seconds_median": statistics.median(line["step_time"] for line in steps),
        "tokens_per_second_median": statistics.median(line["tokens_per_second"] for line in steps),
        "steps": steps,
    }


def as_markdown(record: dict[str, Any]) -> str:
    """A table a seed, and the change of the reward with its spread over seeds."""
    environment = record["environment"]
    lines = [
        "# The demo, recorded",
        "",
        f"`{record['command']}`",
        "",
        "Machine and versions: " + "; ".join(f"{key} {value}" for key, value in environment.items()),
        "",
        "In brackets: 95% interval over the held-out prompts of one run (for the clip ratio: lowest and highest step).",
    ]
    for run in record["runs"]:
        lines += ["", f"## Seed {run['seed']}, {run['num_steps']} steps", ""]
        lines += [f"Commit {run['commit']}, {run['started']}.", "", "| | before | after |", "|---|---|---|"]
        lines += [f"| {n} | {cell(run['before'][n])} | {cell(run['after'][n])} |" for n in QUANTITIES]
        lines += [
            "",
            f"Pairs past the clip edge in the last pass of a step: {cell(run['clip_ratio_last_pass'])}. "
            f"Median step {run['step_seconds_median']:.1f} s, {run['tokens_per_second_median']:.0f} tokens a second.",
        ]
    gains = [run["after"]["reward"]["mean"] - run["before"]["reward"]["mean"] for run in record["runs"]]
    spread = f", standard deviation over seeds {statistics.stdev(gains):.3f}" if len(gains) > 1 else ""
    listed = ", ".join(f"{gain:+.3f}" for gain in gains)
    lines += ["", f"Change of the held-out reward by seed: {listed}; mean {statistics.fmean(gains):+.3f}{spread}."]
    return "\n".join(lines) + "\n"


def cell(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"


def draw(runs: list[dict[str, Any]]) -> None:
    """Reward, KL and clip ratio against the step, a line a seed; the points are the held-out evaluations."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "pairtune", "font.size": 9, "axes.spines.top": False})
    plt.rcParams["axes.spines.right"] = False
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 2.8), layout="constrained")
    colours = plt.get_cmap("viridis")([0.1 + 0.75 * i / max(1, len(runs) - 1) for i in range(len(runs))])
    for run, colour in zip(runs, colours, strict=True):
        steps = [line["step"] for line in run["steps"]]
        for panel, name in zip(panels, ("reward", "kl", "clip_ratio"), strict=True):
            scale = 100 if name == "clip_ratio" else 1
            values = [scale * line[name] for line in run["steps"]]
            panel.plot(steps, values, color=colour, linewidth=1.2, label=f"seed {run['seed']}")
            if name != "clip_ratio":
                ends = [run["before"][name], run["after"][name]]
                spread = [[e["mean"] - e["low"] for e in ends], [e["high"] - e["mean"] for e in ends]]
                means = [e["mean"] for e in ends]
                panel.errorbar([0, steps[-1]], means, spread, fmt="o", color=colour, markersize=4, capsize=2)
    titles = (
        "reward (points: held out)",
        "KL to the reference, nats",
        "pairs past the clip, %",
    )
    for panel, title in zip(panels, titles, strict=True):
        panel.set_title(title, fontsize=9, loc="left")
        panel.set_xlabel("step")
    panels[2].set_ylim(0, 100)
    panels[0].legend(frameon=False, fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
