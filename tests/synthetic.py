"""Run folders as training would leave them, made up in a moment: several methods, betas and seeds, the same prompts."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

EVIL = '</script><script>document.title = "taken"</script><!-- <script> \u2028 <img src=x onerror="document.title=1">'
"""What a model may write, to leave the page's data or its markup."""

SKILL = {"p3o": 0.30, "ppo": 0.22, "rloo": 0.26, "online_dpo": 0.20, "raft": 0.12, "reinforce": 0.18, "copg": 0.24}
"""How much reward a method gets for the square root of a nat."""
WORDS = [
    "the",
    "a",
    "cat",
    "river",
    "stone",
    "walks",
    "gently",
    "over",
    "every",
    "old",
    "bridge",
    "while",
    "rain",
    "falls",
]


def _interval(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values) / len(values))
    return {"mean": mean, "low": mean - 2 * spread, "high": mean + 2 * spread}


def make_run(
    path: Path,
    algorithm: str = "p3o",
    *,
    beta: float = 0.05,
    seed: int = 0,
    num_prompts: int = 12,
    steps: tuple[int, ...] = (0, 10, 20, 30),
    cell: dict[str, Any] | None = None,
    completions_a_prompt: int = 1,
    **words: Any,
) -> Path:
    """A finished `train` run. Its first completion of the last evaluation is EVIL."""
    path.mkdir(parents=True)
    config = {"model": "tiny", "algorithm": algorithm, "beta": beta, "seed": seed, "temperature": 1.0, "top_p": 1.0}
    config |= {"learning_rate": 1e-4, "batch_size": 8, "num_generations": 2, "output_dir": "somewhere"}
    config |= {"reward_funcs": ["made.up"], "dataset": "made-up", "p3o": {"clip": "joint", "kl_at": "current"}} | words
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = f"pairtune train --algorithm {algorithm} --beta {beta} --seed {seed}"
    (path / "environment.json").write_text(json.dumps({"torch": "9.9", "cpu": "made up", "command": command}))
    if cell is not None:
        (path / "cell.json").write_text(json.dumps(cell))
    rng = random.Random(f"{algorithm} {beta} {seed}")
    luck = rng.gauss(0, 0.02)
    metrics = []
    for step in range(1, steps[-1] + 1):
        kl = _kl(step / steps[-1], beta)
        metrics.append(
            {
                "step": step,
                "reward": 0.1 + SKILL[algorithm] * math.sqrt(kl) + luck + rng.gauss(0, 0.03),
                "kl": kl,
                "loss": rng.gauss(0, 1),
                "entropy": 3 - 0.2 * kl,
                "grad_norm": rng.uniform(1, 2),
                "learning_rate": 1e-4,
                "completions/mean_length": 20 + rng.gauss(0, 1),
                "completions/clipped_ratio": 0.2,
                "clip_ratio": 0.1,
                "num_tokens": 500 * step,
                "step_time": 1.0,
                "time/sample": 0.4,
                "time/update": 0.5,
            }
        )
    evaluations, samples = [], []
    for step in steps:
        kl = _kl(step / steps[-1], beta)
        lines = []
        for row in range(num_prompts):
            hard = random.Random(row).gauss(0, 0.1)
            for k in range(completions_a_prompt):
                kl_here = max(0.0, kl * rng.lognormvariate(0, 0.3))
                reward = 0.1 + SKILL[algorithm] * math.sqrt(kl) + hard + (luck if step else 0) + rng.gauss(0, 0.08)
                length = rng.randint(8, 24)
                text = " ".join(rng.choice(WORDS) for _ in range(length))
                evil = row == 0 and step == steps[-1]
                lines.append(
                    {
                        "step": step,
                        "split": "eval",
                        "row": row,
                        "prompt": EVIL if row == 1 else f"Tell me of thing {row}.",
                        "completion_index": k,
                        "completion": EVIL if evil else text,
                        "completion_ids": list(range(length)),
                        "reward": reward,
                        "kl": kl_here,
                        "kl_k1": kl_here + rng.gauss(0, 0.1),
                        "truncated": length == 24,
                    }
                )
        samples += lines
        quantities = {
            "reward": [line["reward"] for line in lines],
            "kl": [line["kl"] for line in lines],
            "length": [float(len(line["completion_ids"])) for line in lines],
            "truncated": [float(line["truncated"]) for line in lines],
            "distinct_2": [0.8 + 0.01 * rng.random() for _ in lines],
        }
        means = {name: _interval(values) for name, values in quantities.items()}
        evaluations.append({"step": step, "num_prompts": num_prompts, "num_completions": len(lines)} | means)
    for name, content in (("metrics", metrics), ("evaluations", evaluations), ("samples", samples)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


def _kl(progress: float, beta: float) -> float:
    return 0.3 / math.sqrt(beta) * progress * 2


def make_grid(
    path: Path,
    methods: tuple[str, ...] = ("p3o", "ppo", "rloo"),
    betas: tuple[float, ...] = (0.05,),
    num_seeds: int = 3,
    **kwargs: Any,
) -> list[Path]:
    """One run a method, beta and seed."""
    return [
        make_run(path / f"{method}-{beta}-{seed}", method, beta=beta, seed=seed, **kwargs)
        for method in methods
        for beta in betas
        for seed in range(num_seeds)
    ]
