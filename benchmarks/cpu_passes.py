"""What each measure against waste brings on a CPU: `python benchmarks/cpu_passes.py --rounds 4`.

The passes of one training step of SmolLM2-135M in float32: 12 prompts of 41 tokens, the first 24 of them the same in
all (a chat template's system prompt has as many), 2 completions of 28. Each setting has one measure more than the one
before it and a process of its own, in turn: plain; huge pages (`THP_MEM_ALLOC_ENABLE=1`, what `import pairtune` sets);
freed memory kept (what a training run does); packed weights while sampling; and what all prompts begin with computed
once, which is all that pairtune does. Medians over the rounds, with their range, go to
benchmarks/results/cpu_passes.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
MEASURES = {
    "huge pages": "THP_MEM_ALLOC_ENABLE",
    "freed memory kept": "KEPT",
    "packed weights": "PACKED",
    "the opening once": "OPENING",
}
NAMES = ["plain", *MEASURES]
SETTINGS = {
    name: {variable: str(int(place < number)) for place, variable in enumerate(MEASURES.values())}
    for number, name in enumerate(NAMES)
}
PASSES = ("sampling", "reference", "policy forward", "policy backward")


def worker() -> None:
    """One process: every pass five times, the medians of the last three as JSON on the last line."""
    import torch

    from pairtune.models import packing
    from pairtune.models.loading import load_policy
    from pairtune.models.sampler import HFSampler, SamplingParams
    from pairtune.runs.memory import freed_memory_kept
    from pairtune.types import Prompts

    if os.environ["PACKED"] == "0":
        packing.MIN_STEPS = packing.MANY_STEPS = 10**9
    policy = load_policy("smollm2-135m-instruct-q4", dtype="float32", device="cpu")
    policy.scorer.opening = os.environ["OPENING"] == "1"
    sampler = HFSampler(
        policy.model,
        policy.tokenizer,
        eos_token_ids=(10**9,),
        pad_token_id=policy.pad_token_id,
        opening=policy.scorer.opening,
    )
    ids = torch.randint(100, 40_000, (12, 41), generator=torch.Generator().manual_seed(0))
    ids[:, :24] = ids[0, :24]
    prompts = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), rows=torch.arange(12), prompts=["-"] * 12)

    def seconds() -> list[float]:
        start = time.perf_counter()
        completions = sampler.generate(prompts, 2, SamplingParams(max_completion_length=28), seed=0, stream=0)
        sampled = time.perf_counter()
        layout = policy.scorer.layout(completions)
        with torch.no_grad():
            policy.reference.logprobs(layout)
        referred = time.perf_counter()
        logprobs, _ = policy.scorer.logprobs(layout)
        forward = time.perf_counter()
        logprobs.sum().backward()
        times = (start, sampled, referred, forward, time.perf_counter())
        policy.model.zero_grad(set_to_none=True)
        return [after - before for before, after in itertools.pairwise(times)]

    with freed_memory_kept() if os.environ["KEPT"] == "1" else contextlib.nullcontext():
        rounds = [seconds() for _ in range(5)][2:]
    print(json.dumps({name: statistics.median(column) for name, *column in zip(PASSES, *rounds, strict=True)}))


def measure(rounds: int) -> dict[str, dict[str, list[float]]]:
    """setting -> pass -> seconds of each round."""
    seconds: dict[str, dict[str, list[float]]] = {name: {p: [] for p in PASSES} for name in SETTINGS}
    start = time.perf_counter()
    for number in range(rounds):
        for name, variables in SETTINGS.items():
            command = [sys.executable, __file__, "--worker"]
            answer = subprocess.run(
                command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
            )
            for one, value in json.loads(answer.stdout.splitlines()[-1]).items():
                seconds[name][one].append(value)
        elapsed = time.perf_counter() - start
        left = elapsed / (number + 1) * (rounds - number - 1)
        print(f"round {number + 1} of {rounds}, {elapsed:.0f} s, about {left:.0f} s left", file=sys.stderr)
    return seconds


def as_markdown(record: dict[str, Any]) -> str:
    def cell(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    def whole(passes: dict[str, list[float]]) -> list[float]:
        return [sum(one) for one in zip(*passes.values(), strict=True)]

    environment = "; ".join(f"{key} {value}" for key, value in record["environment"].items())
    rows = [
        f"| {name} | {' | '.join(map(cell, [*passes.values(), whole(passes)]))} |"
        for name, passes in record["seconds"].items()
    ]
    return "\n".join(
        [
            "# Passes on a CPU, recorded",
            "",
            f"`{record['command']}`",
            "",
            f"Machine and versions: {environment}",
            "",
            "SmolLM2-135M in float32, 12 prompts of 41 tokens, the first 24 the same in all, 2 completions of 28. "
            f"Seconds: median (lowest to highest) of {record['rounds']} rounds, the settings in turn, a process each. "
            "A setting has its own measure and those above it; the last is what pairtune does.",
            "",
            f"| setting | {' | '.join(PASSES)} | all |",
            f"|---|{'---:|' * (len(PASSES) + 1)}",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    from pairtune.runs.folder import environment

    found = {key: value for key, value in environment().items() if key != "command"}
    record = {
        "command": f"python benchmarks/cpu_passes.py --rounds {arguments.rounds}",
        "environment": found,
        "rounds": arguments.rounds,
        "seconds": measure(arguments.rounds),
    }
    (RESULTS / "cpu_passes.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "cpu_passes.md").write_text(as_markdown(record))
    print(as_markdown(record))


if __name__ == "__main__":
    main()
