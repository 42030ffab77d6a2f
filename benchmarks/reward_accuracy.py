"""How often is a reward model right on human comparisons that it was not trained on? By cross-validation.

    nice -n 10 python benchmarks/reward_accuracy.py             # five folds, three seeds; about an hour on an idle core
    python benchmarks/reward_accuracy.py --ways head            # the fitted head alone: a quarter of that

Every comparison of the recipe's data (`make hh`) is judged by models that were trained without its fold; folds are made
by first turn, so that no question stands on two sides, and anew for every seed. The model is that of
recipes/hh/reward.yaml, in two ways:

    head     the head alone, fitted by penalised likelihood, its penalty chosen by cross-validation inside the training
             folds
    layers   from there the last layers too, by `pairtune reward`'s own loss and updates

What the frozen layers make of each row is the same for every fold, seed and epoch, and computed once. Scores are kept
in --work as they are made: an interrupted run goes on. Written are reward_accuracy.json (every number) and
reward_accuracy.md (made from the JSON alone).
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from limits import machine_line
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pairtune.config import RewardConfig, config_to_yaml, load_config
from pairtune.errors import PairtuneError
from pairtune.feedback.comparisons import Comparisons, encode_comparisons, report_dict
from pairtune.maths.calibration import evaluate_pairs
from pairtune.maths.linear_reward import fit_linear_reward
from pairtune.maths.statistics import bootstrap_ratio
from pairtune.models.reward_backbone import load_reward_backbone
from pairtune.runs.display import progress
from pairtune.runs.folder import environment, write_atomic
from pairtune.stages.optimization import apply_gradients, learning_rate_factor, make_optimizer
from pairtune.stages.reward import RewardTask
from pairtune.stages.supervised import micro_batches, num_updates, update_rows, warmup_updates

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RECIPE = ROOT / "recipes" / "hh"
NUM_FOLDS = 5
UNLIMITED = 2**60
TRIED = [
    "Depth, pooling and the penalty of the head: by hand on 704 of the comparisons, with folds of seeds that are not "
    "used here (docs/log.md, 2026-11-21). 18 of 30 layers and the last token were taken from that; the penalty is "
    "chosen anew inside every training fold.",
    "Truncation: a dialogue that is too long loses its oldest turns and keeps its last one.",
    "Averaging: the scores of models of several seeds, as above.",
    "Not tried for lack of time on the processor: more than one epoch, other learning rates, more layers.",
]
"""What the record says of the choice of settings."""
WAYS = {"head": "the fitted head alone", "layers": "the last layers too"}


# ------------------------------------------------------------------------------------------------------ the experiment


class Experiment:
    """All comparisons, the model that they are judged by, and what its frozen layers make of them."""

    def __init__(
        self, rows: list[dict[str, Any]], config: RewardConfig, *, work: Path, model: Any = None, tokenizer: Any = None
    ) -> None:
        """`work` keeps what the head reads, so that only `layers` needs the frozen layers in a second run."""
        self.config = config
        self.backbone = load_reward_backbone(
            config.model if model is None else model,
            tokenizer=tokenizer,
            dtype="float32",
            device="cpu",
            num_layers=config.num_layers,
            trainable_layers=config.trainable_layers,
        )
        self.data: Comparisons = encode_comparisons(rows, "the comparisons", config, self.backbone.tokenizer)
        self.task = RewardTask(self.backbone, self.data, cache_bytes=UNLIMITED)
        masters = self.task.masters
        self._start = {name: m.detach().clone() for name, m in zip(masters.names, masters.masters, strict=True)}
        # Those of the dataset: a long dialogue has lost its own.
        first_turns = [rows[row]["prompt"][0]["content"].lower() for row in self.data.data.prompt_dataset.numbers]
        number = {turn: place for place, turn in enumerate(dict.fromkeys(first_turns))}
        self.groups = torch.tensor([number[turn] for turn in first_turns])
        """(N,) rows of one number begin with the same question."""
        self._ends = self._read(work / "ends.safetensors")

    def _read(self, path: Path) -> Tensor:
        """(N, 2, H) the final hidden states at the ends of all completions, from the model as it starts."""
        if path.exists():
            return load_file(path)["ends"]
        start = time.perf_counter()
        with progress("frozen layers", len(self.data)) as advance:
            ends, _ = self.task.ends(range(len(self.data)), advance=advance)
        print(f"frozen layers: {time.perf_counter() - start:.0f} s", flush=True)
        save_file({"ends": ends}, path)
        return ends

    def folds(self, seed: int) -> list[tuple[list[int], list[int]]]:
        """(training rows, test rows) of each fold; first turns are dealt out at random."""
        order = np.random.default_rng(seed).permutation(int(self.groups.max()) + 1)
        fold = torch.from_numpy(order)[self.groups] % NUM_FOLDS
        return [
            ((fold != k).nonzero().flatten().tolist(), (fold == k).nonzero().flatten().tolist())
            for k in range(NUM_FOLDS)
        ]

    def judge(self, way: str, train: Sequence[int], test: Sequence[int], *, seed: int) -> dict[str, Any]:
        """Train on some rows; the lead of the chosen completion on others, and what the training came to."""
        self.task.masters.load(self._start)

        def loss(rewards: Tensor, places: Tensor) -> Tensor:
            return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])

        head = fit_linear_reward(self._ends[list(train)], loss, groups=self.groups[list(train)], seed=seed)
        found: dict[str, Any] = {"penalty": head.penalty}
        if way == "head":
            rewards = self._ends[list(test)].double() @ head.weight
        else:
            self.backbone.set_head(head.weight)
            found["loss"] = self._train(train, seed)
            rewards = self.task.score(self.data, test)
        return found | {"leads": dict(zip(map(str, test), (rewards[:, 0] - rewards[:, 1]).tolist(), strict=True))}

    def _train(self, rows: Sequence[int], seed: int) -> list[float]:
        """The updates of `pairtune reward` on these rows; the loss of each."""
        config = self.config.model_copy(update={"seed": seed})
        optimizer, steps = make_optimizer(config, self.task.masters), num_updates(config, len(rows))
        schedule = config.model_copy(update={"warmup_steps": warmup_updates(config, steps)})
        losses = []
        for step in range(steps):
            chosen = [rows[place] for place in update_rows(config, len(rows), step)]
            losses.append(0.0)
            for micro_batch in micro_batches(config, self.task, chosen):
                total = self.task.loss(micro_batch).total / len(chosen)
                total.backward()
                losses[-1] += total.item()
            rate = config.learning_rate * learning_rate_factor(schedule, step, steps)
            apply_gradients(
                self.task.masters,
                optimizer,
                learning_rate=rate,
                max_grad_norm=config.max_grad_norm,
                step=step + 1,
                mend="lower learning_rate",
            )
        return losses


def lengths_of(data: Comparisons) -> Tensor:
    """(N, 2) tokens of the chosen and the rejected completion, EOS included."""
    return torch.tensor([[len(one.ids) for one in group] for group in data.data.completions], dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------- the record


def summary(leads: dict[int, Tensor], lengths: Tensor, groups: Tensor) -> dict[str, Any]:
    """One way of training: leads (N,) of the chosen completion by seed -> every number of the record.

    `mean` are averages over seeds of each row's outcome, with intervals over first turns; `std_over_seeds` stands
    beside them. `ensemble` adds up the leads of all seeds, and is one model's report.
    """

    def report(lead: Tensor) -> dict[str, Any]:
        found = evaluate_pairs(lead, torch.zeros_like(lead), lengths[:, 0], lengths[:, 1], prompts=groups, num_bins=5)
        return report_dict(found)

    def right(lead: Tensor) -> Tensor:
        return (lead > 0).double() + 0.5 * (lead == 0)

    def over_groups(values: Tensor) -> dict[str, float]:
        zeros = torch.zeros(int(groups.max()) + 1, dtype=torch.float64)
        return bootstrap_ratio(zeros.index_add(0, groups, values), torch.bincount(groups).double())._asdict()

    rules = {"longer wins": right(lengths[:, 0] - lengths[:, 1]), "shorter wins": right(lengths[:, 1] - lengths[:, 0])}
    better = max(rules, key=lambda name: rules[name].mean().item())
    outcomes = torch.stack([right(lead) for lead in leads.values()])
    likelihoods = torch.stack([F.logsigmoid(lead) for lead in leads.values()])
    ensemble = torch.stack([*leads.values()]).mean(0)
    return {
        "mean": {
            "accuracy": over_groups(outcomes.mean(0)),
            "log_likelihood": over_groups(likelihoods.mean(0)),
            "less_better_rule": over_groups(outcomes.mean(0) - rules[better]),
        },
        "std_over_seeds": {
            "accuracy": deviation(outcomes.mean(1).tolist()),
            "log_likelihood": deviation(likelihoods.mean(1).tolist()),
        },
        "rules": {name: over_groups(values) for name, values in rules.items()},
        "better_rule": better,
        "seeds": {str(seed): report(lead) for seed, lead in leads.items()},
        "ensemble": report(ensemble),
        "ensemble_less_better_rule": over_groups(right(ensemble) - rules[better]),
    }


def deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def as_markdown(record: dict[str, Any]) -> str:
    lines = [
        "# Accuracy of a reward model on human comparisons, recorded",
        "",
        f"`{record['command']}`",
        "",
        machine_line(record),
        "",
        f"{record['num_rows']} comparisons of {record['num_first_turns']} first turns ({'; '.join(record['notes'])}); "
        f"{NUM_FOLDS} folds by first turn, made anew for every seed.",
        "",
        f"Model and training: {record['settings']}.",
        "",
        "In brackets: 95% interval over first turns; beside it the standard deviation over seeds (other folds, other "
        "order). A model without an opinion has a log-likelihood of -0.693.",
        "",
        "| | seeds | accuracy | over seeds | less the better rule | log-likelihood | over seeds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    ways = record["ways"]
    rules = next(iter(ways.values()))["rules"]
    lines += [f"| {name} | | {cell(value, 100)} | | | | |" for name, value in rules.items()]
    for name, way in ways.items():
        mean, spread = way["mean"], way["std_over_seeds"]
        lines.append(
            f"| {WAYS[name]} | {', '.join(way['seeds'])} | {cell(mean['accuracy'], 100)} | "
            f"{shown(spread['accuracy'], 100)} | {cell(mean['less_better_rule'], 100)} | "
            f"{cell(mean['log_likelihood'])} | {shown(spread['log_likelihood'])} |"
        )
        together = way["ensemble"]
        lines.append(
            f"| {WAYS[name]}, scores averaged over seeds | {', '.join(way['seeds'])} | "
            f"{cell(together['accuracy'], 100)} | | {cell(way['ensemble_less_better_rule'], 100)} | "
            f"{cell(together['log_likelihood'])} | |"
        )
    for name, way in ways.items():
        beats = way["mean"]["less_better_rule"]["low"] > 0
        lines += ["", f"## {WAYS[name].capitalize()}", ""]
        lines.append(
            f"{'Better' if beats else 'NOT shown to be better'} than the better rule of length ({way['better_rule']}), "
            "by the interval."
        )
        lines += [
            "",
            "| seed | accuracy | chosen longer | chosen shorter | temperature | calibration error | r, length |",
        ]
        lines.append("|---:|---:|---:|---:|---:|---:|---:|")
        for seed, report in [*way["seeds"].items(), ("averaged", way["ensemble"])]:
            length = report["length"]
            parts = [cell(length[part]["accuracy"], 100) for part in ("chosen_longer", "chosen_shorter")]
            numbers = [cell(report["accuracy"], 100), *parts, cell(report["temperature"], digits=2)]
            error = shown(report["expected_calibration_error"], 100)
            lines.append(f"| {seed} | {' | '.join(numbers)} | {error} | {length['pearson_within_pairs']:.2f} |")
        lines += ["", "By how sure it is, scores averaged over seeds:", ""]
        lines += ["| lead | pairs | expected | right |", "|---|---:|---:|---:|"]
        for one in way["ensemble"]["reliability"]:
            leads = f"{one['low']:.2f} to {one['high']:.2f}"
            expected = f"{100 * one['predicted']:.1f}"
            lines.append(f"| {leads} | {one['num_pairs']} | {expected} | {cell(one['accuracy'], 100)} |")
        penalties = ", ".join(f"{value:.2g}" for value in sorted({*way["penalties"]}))
        lines += ["", f"Penalties chosen: {penalties}. Seconds of training a fold: {way['seconds']:.0f}."]
    lines += ["", "## What was tried", "", *(f"- {line}" for line in record["tried"])]
    return "\n".join(lines) + "\n"


def cell(value: dict[str, float | None], scale: float = 1, digits: int = 0) -> str:
    mean, low, high = (shown(value[end], scale, digits) for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def shown(value: float | None, scale: float = 1, digits: int = 0) -> str:
    return "-" if value is None else f"{scale * value:.{digits or (1 if scale == 100 else 3)}f}"


# --------------------------------------------------------------------------------------------------------- the command


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as for `make hh`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--work", type=Path, default=Path("runs/reward-accuracy"), help="where scores are kept")
    parser.add_argument("--record-only", action="store_true", help="of the seeds that are done, without training more")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = read_dialogues(arguments.dataset)
    config = load_config(RewardConfig, RECIPE / "reward.yaml", {"dataset": "the comparisons"})
    settings = arguments.work / "settings.yaml"
    if settings.exists() and settings.read_text() != config_to_yaml(config):
        raise PairtuneError(f"{arguments.work} holds scores of other settings; give another --work, or delete it.")
    write_atomic(settings, config_to_yaml(config))
    experiment = Experiment(rows, config, work=arguments.work)
    cells = [(way, seed, fold) for way in arguments.ways for seed in arguments.seeds for fold in range(NUM_FOLDS)]
    with progress("folds", len(cells)) as advance:
        for way, seed, fold in cells:
            path = cell_file(arguments.work, way, seed, fold)
            if not path.exists() and not arguments.record_only:
                train, test = experiment.folds(seed)[fold]
                start = time.perf_counter()
                found = experiment.judge(way, train, test, seed=seed)
                found["seconds"] = time.perf_counter() - start
                write_atomic(path, json.dumps(found) + "\n")
            advance(1)
    record = make_record(arguments, experiment, config)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output / "reward_accuracy.json", json.dumps(record, indent=1) + "\n")
    write_atomic(arguments.output / "reward_accuracy.md", as_markdown(record))
    print(as_markdown(record))


def make_record(arguments: argparse.Namespace, experiment: Experiment, config: RewardConfig) -> dict[str, Any]:
    """From the scores that are kept in --work, of the seeds whose folds are all there."""
    ways = {}
    for way in arguments.ways:
        files = {seed: [cell_file(arguments.work, way, seed, k) for k in range(NUM_FOLDS)] for seed in arguments.seeds}
        found = {
            seed: [json.loads(path.read_text()) for path in paths]
            for seed, paths in files.items()
            if all(path.exists() for path in paths)
        }
        if not found:
            continue
        leads = {}
        for seed, folds in found.items():
            of_row = {int(row): lead for fold in folds for row, lead in fold["leads"].items()}
            leads[seed] = torch.tensor([of_row[row] for row in range(len(experiment.data))], dtype=torch.float64)
        ways[way] = summary(leads, lengths_of(experiment.data), experiment.groups) | {
            "penalties": [fold["penalty"] for folds in found.values() for fold in folds],
            "seconds": statistics.median(fold["seconds"] for folds in found.values() for fold in folds),
            "loss": {seed: [fold.get("loss") for fold in folds] for seed, folds in found.items()},
        }
    told = ("num_layers", "trainable_layers", "num_epochs", "batch_size", "learning_rate", "max_prompt_length")
    settings = {name: getattr(config, name) for name in (*told, "max_completion_length")}
    return {
        "command": shlex.join(["python", "benchmarks/reward_accuracy.py", *sys.argv[1:]]),
        "environment": {key: value for key, value in environment().items() if key != "command"},
        "num_rows": len(experiment.data),
        "num_first_turns": int(experiment.groups.max()) + 1,
        "notes": experiment.data.data.notes,
        "settings": f"{config.model}, " + ", ".join(f"{name} {value}" for name, value in settings.items()),
        "ways": ways,
        "tried": TRIED,
    }


def cell_file(work: Path, way: str, seed: int, fold: int) -> Path:
    return work / f"{way}-seed-{seed}-fold-{fold}.json"


def read_dialogues(dataset: str | None) -> list[dict[str, Any]]:
    """Those of the recipe."""
    sys.path.insert(0, str(RECIPE))
    import hh

    return hh.read_dialogues(dataset)[0]


if __name__ == "__main__":
    main()
