"""The three stages of RLHF on human preferences, and what their result is worth to a judge that nobody optimised.

    make hh                                                    # all of it, about an hour on two cores
    python recipes/hh/hh.py --dataset Anthropic/hh-rlhf        # the full data, from the hub
    python recipes/hh/hh.py --set p3o.beta=0.1 p3o.max_steps=60 --output runs/hh-2

The dialogues are split by their first turn into fold A, fold B and held-out dialogues. Fold A is all that the pipeline
sees: a model learns to write its chosen answers (sft), a reward model learns its comparisons (reward_a), and P3O
optimises that reward on its prompts (p3o). Fold B trains a second reward model (reward_b), the judge. On the held-out
prompts both reward models score both policies (evaluate): the one that was optimised must like the result, and proves
nothing; the judge has never met the policy, nor a dialogue of fold A.

Each stage is a run folder of its own. A stage that is done is not done again, and one that was interrupted goes on from
its newest checkpoint. The outcome is hh.json and hh.md, in the output folder and where --record says.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from pairtune import PairtuneError, TrainConfig, evaluate, sft, train
from pairtune.config import EvaluateConfig, RewardConfig, SFTConfig, Words, config_to_yaml, load_config
from pairtune.data import columns_of, dataset_name, load_dataset_rows, missing_column
from pairtune.evidence.head_to_head import Games, length_controlled, win_rate
from pairtune.feedback.reward_model import RewardModel
from pairtune.maths.calibration import pearson
from pairtune.maths.statistics import Estimate, bootstrap_difference
from pairtune.models.loading import load_tokenizer
from pairtune.models.weights import resolve_model
from pairtune.runs.folder import write_atomic
from pairtune.runs.metrics import read_jsonl
from pairtune.stages.reward import reward

HERE = Path(__file__).parent
BESIDE = HERE.parents[2] / "shared" / "data" / "hh-harmless-preferences.jsonl.gz"
"""A part of the data, where a checkout has it beside it."""
HELD_OUT, FOLD_A = 0.15, 0.425
"""Shares of the first turns; fold B is the rest."""
SHARES = {"sft": 0.20, "reward_a": 0.17, "reward_b": 0.18, "p3o": 0.23, "evaluate": 0.22}
"""Of the whole time, measured: what the time that is left is told by."""
JUDGES = {
    "reward_a": "the reward model that was optimised",
    "reward_b": "the judge: never optimised, trained on fold B",
}
MEASURES = ("kl", "length", "truncated", "entropy", "distinct_2")

Turn = dict[str, str]
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="a file with `chosen` and `rejected` dialogues, or Anthropic/hh-rlhf")
    parser.add_argument("--output", type=Path, default=Path("runs/hh"), help="folder of all stages (runs/hh)")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="STAGE.KEY=VALUE", help="settings that win over the YAML"
    )
    parser.add_argument("--record", type=Path, help="write hh.json and hh.md here too")
    arguments = parser.parse_args(argv)
    logging.disable_progress_bar()  # transformers' own would be drawn across ours
    try:
        run(arguments.output, arguments.dataset, dict(_setting(words) for words in arguments.set))
        write_record(arguments.output, [arguments.output, *filter(None, [arguments.record])])
    except PairtuneError as error:
        print(f"hh: error: {error}", file=sys.stderr)
        return 2
    return 0


# ------------------------------------------------------------------------------------------------------------ the data


def read_dialogues(dataset: str | None) -> tuple[list[Row], Counter[str]]:
    """Rows with a conversation in `prompt` and one answer each in `chosen` and `rejected`, and why others were left
    out."""
    if dataset is None:
        if not BESIDE.exists():
            raise PairtuneError(
                "there are no comparisons to learn from: give --dataset Anthropic/hh-rlhf (downloaded from the Hugging "
                "Face hub; MIT licence), or --dataset with a .jsonl or .jsonl.gz file of `chosen` and `rejected` "
                "dialogues in the markup of that dataset."
            )
        dataset = str(BESIDE)
    rows, left_out = [], Counter[str]()
    given = load_dataset_rows(dataset, split="train")
    for side in ("chosen", "rejected"):
        if side not in columns_of(given):
            raise missing_column(side, given, dataset_name(dataset), "a comparison has `chosen` and `rejected`.")
    for row in given:
        chosen, rejected = turns(row["chosen"]), turns(row["rejected"])
        if why := fault(chosen, rejected):
            left_out[why] += 1
        else:
            rows.append({"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]})
    return rows, left_out


def turns(dialogue: str) -> list[Turn]:
    """A dialogue in the markup of the HH datasets, as a conversation."""
    _, *parts = re.split(r"\n\n(Human|Assistant):", dialogue)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def fault(chosen: list[Turn], rejected: list[Turn]) -> str | None:
    """Why two dialogues are not two answers to one conversation; None if they are."""
    if chosen[:-1] != rejected[:-1]:
        return "the two differ before the last turn"
    if not all(turn["content"] for turn in [*chosen, *rejected[-1:]]):
        return "a turn is empty"
    wanted = ["user", "assistant"] * (len(chosen) // 2)
    if not chosen or [turn["role"] for turn in chosen] != wanted or rejected[-1]["role"] != "assistant":
        return "user and assistant do not take turns"
    return "the two answers are the same" if chosen == rejected else None


def fold_of(row: Row) -> str:
    """`held_out`, `a` or `b`, by a hash of the first turn: no question stands on two sides, whatever the order of the
    rows."""
    first_turn = row["prompt"][0]["content"].lower()
    place = int.from_bytes(hashlib.sha256(first_turn.encode()).digest()[:8]) / 2**64
    return "held_out" if place < HELD_OUT else "a" if place < HELD_OUT + FOLD_A else "b"


def write_folds(output: Path, dataset: str | None) -> dict[str, Any]:
    """fold_a.jsonl and fold_b.jsonl, each with the held-out rows as its test split; returns what they hold."""
    rows, left_out = read_dialogues(dataset)
    folds: dict[str, list[Row]] = {"a": [], "b": [], "held_out": []}
    for row in rows:
        folds[fold_of(row)].append(row)
    if empty := [name for name, fold in folds.items() if not fold]:
        raise PairtuneError(f"{len(rows)} dialogues are too few to split: fold `{empty[0]}` is empty; give more.")
    for name in ("a", "b"):
        both = [row | {"split": "train"} for row in folds[name]] + [
            row | {"split": "test"} for row in folds["held_out"]
        ]
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in both)
        path = output / f"fold_{name}.jsonl"
        if path.exists() and path.read_text("utf-8") != content:
            raise PairtuneError(f"{output} was begun with other dialogues; give another --output, or delete it.")
        write_atomic(path, content)
    return {
        "dialogues": {name: len(fold) for name, fold in folds.items()},
        "first_turns": {name: len({row["prompt"][0]["content"] for row in fold}) for name, fold in folds.items()},
        "left_out": dict(left_out),
    }


# ---------------------------------------------------------------------------------------------------------- the stages


def run(output: Path, dataset: str | None, settings: dict[str, str]) -> None:
    """Every stage that is not done yet, in order."""
    output.mkdir(parents=True, exist_ok=True)
    data = write_folds(output, dataset)
    counts = ", ".join(f"{name} {count}" for name, count in data["dialogues"].items())
    left_out = "".join(f"; {count} left out: {why}" for why, count in data["left_out"].items())
    print(f"dialogues by fold: {counts}{left_out}", flush=True)
    fold_a, fold_b = str(output / "fold_a.jsonl"), str(output / "fold_b.jsonl")

    def config(cls: type[Words], stage: str, file: str, **words: Any) -> Any:
        own = {
            name.removeprefix(f"{stage}."): value for name, value in settings.items() if name.startswith(f"{stage}.")
        }
        return load_config(cls, HERE / file, words | own)

    stages = Stages(output, dataset=data)
    stages.do("sft", sft, config(SFTConfig, "sft", "sft.yaml", dataset=fold_a, output_dir=output / "sft"))
    for seed, (name, fold) in enumerate((("reward_a", fold_a), ("reward_b", fold_b))):
        learned = config(RewardConfig, name, "reward.yaml", dataset=fold, output_dir=output / name, seed=seed)
        stages.do(name, reward, learned)
    policy = {"model": str(output / "sft"), "dataset": fold_a}
    optimised = {**policy, "reward_funcs": [str(output / "reward_a")], "output_dir": output / "p3o"}
    stages.do("p3o", train, config(TrainConfig, "p3o", "p3o.yaml", **optimised))
    measured = config(EvaluateConfig, "evaluate", "evaluate.yaml", **policy)
    stages.do("evaluate", lambda given: evaluate_policies(output, given), measured)


class Stages:
    """Runs stages in order, once each, and keeps in stages.json which are done and how long they took."""

    def __init__(self, output: Path, **facts: Any) -> None:
        self._output, self._path = output, output / "stages.json"
        self._done: dict[str, Any] = json.loads(self._path.read_text("utf-8")) if self._path.exists() else {}
        self._done |= facts

    def do(self, name: str, stage: Callable[[Any], Any], config: Any) -> None:
        written = config_to_yaml(config)
        before = self._done.get(name)
        if before is not None and before["config"] != written:
            raise PairtuneError(
                f"{self._output} holds the result of {name} with other settings; give another --output, or delete it."
            )
        if before is not None:
            print(f"{name}: done before, in {before['minutes']:.1f} minutes", flush=True)
            return
        print(f"\n{name}: stage {[*SHARES].index(name) + 1} of {len(SHARES)}{self._left(name)}", flush=True)
        start = time.perf_counter()
        if hasattr(config, "resume") and (self._output / name / "config.yaml").exists():
            config = config.model_copy(update={"resume": True})
        result = stage(config)
        if not getattr(result, "finished", True):
            raise PairtuneError(f"{name} was interrupted; the same command goes on from there.")
        self._done[name] = {"minutes": (time.perf_counter() - start) / 60, "config": written}
        write_atomic(self._path, json.dumps(self._done, indent=1) + "\n")

    def _left(self, name: str) -> str:
        """How long this stage and those behind it will take, where one was done before."""
        known = [other for other in SHARES if other in self._done]
        if not known:
            return ""
        pace = sum(self._done[other]["minutes"] for other in known) / sum(SHARES[other] for other in known)
        order = [*SHARES]
        left = pace * sum(SHARES[other] for other in order[order.index(name) :])
        return f", about {left:.0f} minutes to the end of all"


def evaluate_policies(output: Path, config: EvaluateConfig) -> None:
    """evaluation-sft.json and evaluation-p3o.json: both policies on the same prompts, scored by both reward models."""
    tokenizer = load_tokenizer(config.model)
    judges = [
        RewardModel.from_pretrained(resolve_model(str(output / name)), name=name, policy_tokenizer=tokenizer)
        for name in JUDGES
    ]
    for policy, reference in (("sft", None), ("p3o", config.model)):
        words = {"model": str(output / policy), "ref_model": reference, "reward_weights": [1.0, 0.0]}
        result = output / f"evaluation-{policy}.json"
        evaluate(config.model_copy(update={**words, "output": str(result)}), reward_funcs=judges)


# ---------------------------------------------------------------------------------------------------------- the record


def write_record(output: Path, folders: Sequence[Path]) -> None:
    """hh.json and hh.md in each of the folders, from what the stages left in `output`. They hold numbers, no
    dialogues."""
    record = make_record(output)
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "hh.json", json.dumps(record, indent=1) + "\n")
        write_atomic(folder / "hh.md", as_markdown(record))
    print(f"\n{as_markdown(record)}\nwritten to {folders[-1] / 'hh.md'}")


def make_record(output: Path) -> dict[str, Any]:
    """Every number of the outcome, from the run folders and the two evaluations."""

    def read(name: str) -> Any:
        return json.loads((output / name).read_text("utf-8"))

    stages, start = read("stages.json"), read("sft/environment.json")
    before, after = read("evaluation-sft.json"), read("evaluation-p3o.json")
    steps = read_jsonl(output / "p3o" / "metrics.jsonl")
    return {
        "command": "make hh",
        "environment": {key: value for key, value in start.items() if key not in ("command", "resumed")},
        "dataset": stages["dataset"],
        "minutes": {name: stages[name]["minutes"] for name in SHARES},
        "settings": {name: stages[name]["config"] for name in SHARES},
        "sft": [line["perplexity"] for line in read_jsonl(output / "sft" / "evaluations.jsonl")],
        "reward_models": {name: read(f"{name}/reward_report.json")["evaluation"] for name in JUDGES},
        "p3o": [{name: line[name] for name in ("step", "reward", "kl", "step_time")} for line in steps],
        "num_prompts": before["evaluation"]["num_prompts"],
        "policies": {"sft": before["evaluation"], "p3o": after["evaluation"]},
        "comparison": {judge: compare(before["samples"], after["samples"], f"rewards/{judge}") for judge in JUDGES},
        "judges_agree": correlation(*(column(before["samples"], f"rewards/{judge}").flatten() for judge in JUDGES)),
    }


def compare(before: list[Row], after: list[Row], reward_name: str) -> dict[str, Any]:
    """One judge on both policies. A game is a completion of each for one prompt; intervals are over prompts."""
    old, new = column(before, reward_name), column(after, reward_name)
    old_lengths, new_lengths = (column(samples, "completion_ids", len) for samples in (before, after))
    games = Games.from_scores(new[None], old[None], new_lengths[None], old_lengths[None], fixed=(False, True))
    return {
        "gain": bootstrap_difference(new.mean(1), old.mean(1))._asdict(),
        "win_rate": ends(win_rate(games)),
        "win_rate_at_equal_length": ends(length_controlled(games).win_rate),
        "std_before": old.std().item(),
        "length_correlation": {
            "sft": correlation(old.flatten(), old_lengths.flatten()),
            "p3o": correlation(new.flatten(), new_lengths.flatten()),
        },
    }


def ends(estimate: Estimate) -> dict[str, float]:
    return {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}


def column(samples: list[Row], name: str, of: Callable[[Any], float] = float) -> Tensor:
    """(P, K) float64: one number of every sample, a row a prompt."""
    rows: dict[int, list[float]] = {}
    for sample in samples:
        rows.setdefault(sample["row"], []).append(of(sample[name]))
    return torch.tensor(list(rows.values()), dtype=torch.float64)


def correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson's; None where one of the two does not vary."""
    value = pearson(x, y)
    return value if math.isfinite(value) else None


def as_markdown(record: dict[str, Any]) -> str:
    """The outcome for a person to read."""
    data, policies = record["dataset"], record["policies"]
    dialogues = ", ".join(f"{name} {count}" for name, count in data["dialogues"].items())
    left_out = "; ".join(f"{count}: {why}" for why, count in data["left_out"].items()) or "none"
    minutes = ", ".join(f"{name} {time:.1f}" for name, time in record["minutes"].items())
    lines = [
        "# Three stages on human preferences, recorded",
        "",
        f"`{record['command']}`",
        "",
        "Machine and versions: " + "; ".join(f"{key} {value}" for key, value in record["environment"].items()),
        "",
        f"Dialogues by fold, no first turn on two sides: {dialogues}; left out: {left_out}.",
        "",
        f"Minutes by stage: {minutes}; in all {sum(record['minutes'].values()):.0f}.",
        "",
        "One seed. In brackets: 95% interval over held-out prompts; it does not hold the spread over seeds.",
        "",
        "## The policies on held-out prompts",
        "",
        f"{record['num_prompts']} prompts; both reward models score the completions of both policies. KL in nats "
        "to the policy of the first stage, length in tokens.",
        "",
        "| | sft | p3o | p3o less sft | p3o wins | at equal length |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for judge, what in JUDGES.items():
        one = record["comparison"][judge]
        cells = [cell(policies[name][f"rewards/{judge}"]) for name in policies] + [cell(one["gain"], "{:+.3f}")]
        cells += [cell(one[name], "{:.1%}") for name in ("win_rate", "win_rate_at_equal_length")]
        lines.append(f"| {what} | {' | '.join(cells)} |")
    for name in MEASURES:
        cells = [cell(policies[policy][name]) if name in policies[policy] else "0" for policy in policies]
        lines.append(f"| {name} | {' | '.join(cells)} | | | |")
    lines += [
        "",
        "At equal length: what a logistic fit of the wins on the difference of lengths says of completions of one "
        "length (Dubois et al. 2024, arXiv 2404.04475); a guess where the lengths of the two hardly overlap.",
    ]
    of_length = [
        f"{judge} {shown(values['sft'])} before and {shown(values['p3o'])} after"
        for judge, values in ((judge, record["comparison"][judge]["length_correlation"]) for judge in JUDGES)
    ]
    spreads = ", ".join(f"{judge} {record['comparison'][judge]['std_before']:.3f}" for judge in JUDGES)
    lines += [
        "",
        f"Standard deviation of the rewards of the sft policy: {spreads}. Correlation of the two reward models on its "
        f"completions: {shown(record['judges_agree'])}. Correlation of reward and length: {'; '.join(of_length)}.",
        "",
        "## The reward models on held-out comparisons",
        "",
        "| | pairs | accuracy | longer wins | shorter wins | accuracy less that | log-likelihood | temperature |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, report in record["reward_models"].items():
        length = report["length"]
        rules = [cell(length[rule]["accuracy"], "{:.1%}") for rule in ("longer_wins", "shorter_wins")]
        gain = cell(length["shorter_wins"]["model_minus_baseline"], "{:+.1%}")
        numbers = [cell(report["accuracy"], "{:.1%}"), *rules, gain, cell(report["log_likelihood"])]
        lines.append(
            f"| {name} | {report['num_pairs']} | {' | '.join(numbers)} | {cell(report['temperature'], '{:.2f}')} |"
        )
    lines += [
        "",
        "## Training",
        "",
        f"Perplexity of the held-out chosen answers: {' -> '.join(map(cell, record['sft']))}.",
        "",
        "| P3O step | reward (reward_a) | KL | seconds |",
        "|---:|---:|---:|---:|",
    ]
    steps = record["p3o"]
    for step in steps[:: max(1, len(steps) // 10)]:
        lines.append(f"| {step['step']} | {step['reward']:.3f} | {step['kl']:.2f} | {step['step_time']:.1f} |")
    return "\n".join(lines) + "\n"


def cell(value: dict[str, float | None], form: str = "{:.3f}") -> str:
    mean, low, high = (shown(value[end], form) for end in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def shown(value: float | None, form: str = "{:.2f}") -> str:
    return "-" if value is None else form.format(value)


def _setting(words: str) -> tuple[str, str]:
    name, equals, value = words.partition("=")
    if not equals or name.partition(".")[0] not in SHARES or not name.partition(".")[2]:
        raise PairtuneError(f"--set {words}: write STAGE.KEY=VALUE with one of the stages {', '.join(SHARES)}.")
    return name, value


if __name__ == "__main__":
    sys.exit(main())
