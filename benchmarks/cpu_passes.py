"""What huge pages and packed weights bring on a CPU: `python benchmarks/cpu_passes.py --rounds 4`.

The passes of one training step of SmolLM2-135M in float32 (12 prompts of 41 tokens, 2 completions of 28), each setting
in a process of its own, in turn: plain, with huge pages (`THP_MEM_ALLOC_ENABLE=1`, what `import pairtune` sets), and
with huge pages and packed weights while sampling (what pairtune does). Medians over the rounds, with their range, go to
benchmarks/results/cpu_passes.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
SETTINGS = {
    "plain": {"THP_MEM_ALLOC_ENABLE": "0", "PACKED": "0"},
    "huge pages": {"THP_MEM_ALLOC_ENABLE": "1", "PACKED": "0"},
    "huge pages, packed weights": {"THP_MEM_ALLOC_ENABLE": "1", "PACKED": "1"},
}
PASSES = ("sampling", "reference", "policy forward", "policy backward")


def worker() -> None:
    """One process: every pass twice, of which the second counts, as JSON on the last line."""
    import torch

    from pairtune.models import packing
    from pairtune.models.loading import load_policy
    from pairtune.models.sampler import HFSampler, SamplingParams
    from pairtune.types import Prompts

    if os.environ["PACKED"] == "0":
        packing.MIN_STEPS = packing.MANY_STEPS = 10**9
    policy = load_policy("smollm2-135m-instruct-q4", dtype="float32", device="cpu")
    sampler = HFSampler(policy.model, policy.tokenizer, eos_token_ids=(10**9,), pad_token_id=policy.pad_token_id)
    ids = torch.randint(100, 40_000, (12, 41), generator=torch.Generator().manual_seed(0))
    prompts = Prompts(ids=ids, mask=torch.ones_like(ids, dtype=torch.bool), rows=torch.arange(12), prompts=["-"] * 12)
    seconds: dict[str, float] = {}
    for _ in range(2):
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
        seconds = {name: after - before for name, before, after in zip(PASSES, times, times[1:], strict=False)}
        policy.model.zero_grad(set_to_none=True)
    print(json.dumps(seconds))


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

    environment = "; ".join(f"{key} {value}" for key, value in record["environment"].items())
    rows = [
        f"| {name} | {' | '.join(cell(passes[one]) for one in PASSES)} |" for name, passes in record["seconds"].items()
    ]
    return "\n".join(
        [
            "# Passes on a CPU, recorded",
            "",
            f"`{record['command']}`",
            "",
            f"Machine and versions: {environment}",
            "",
            "SmolLM2-135M in float32, 12 prompts of 41 tokens, 2 completions of 28 tokens. Seconds: median (lowest to "
            f"highest) of {record['rounds']} rounds, the settings in turn, a process each.",
            "",
            f"| setting | {' | '.join(PASSES)} |",
            f"|---|{'---:|' * len(PASSES)}",
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
