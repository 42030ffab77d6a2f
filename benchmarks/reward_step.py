"""What does one update of a reward model cost on a CPU, and what of it is needed?

    nice -n 10 python benchmarks/reward_step.py

One update of 8 comparisons of up to 192 tokens, forward, backward and AdamW, in several ways: as a plain loop over
transformers' sequence classifier does it, chosen and rejected each behind its own copy of the prompt, and as `pairtune
reward` does it, the prompt once for both, with fewer and fewer layers trained, and with the frozen ones read from
memory. Seconds are those of the processor on one thread, so that another process beside it matters little; operations
are counted from the tokens and the weights, a multiply and an add for each weight and token, twice more for gradients.
Written are reward_step.json and reward_step.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from limits import machine_line
from torch.nn import functional as F

from pairtune.config import RewardConfig
from pairtune.feedback.comparisons import Comparisons, encode_comparisons
from pairtune.models.loading import load_tokenizer
from pairtune.models.reward_backbone import load_reward_backbone
from pairtune.runs.display import progress
from pairtune.runs.folder import environment, write_atomic
from pairtune.stages.optimization import apply_gradients, make_optimizer
from pairtune.stages.reward import RewardTask

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NUM_PAIRS, MAX_TOKENS = 8, 192
WAYS: dict[str, dict[str, Any]] = {
    "plain loop, bfloat16 autocast": {"plain": True, "autocast": True},
    "plain loop, float32": {"plain": True},
    "prompt once": {},
    "prompt once, last 4 of 30 layers": {"trainable_layers": 4},
    "the same, frozen layers kept": {"trainable_layers": 4, "kept": True},
    "18 layers, last 2 of them": {"num_layers": 18, "trainable_layers": 2},
    "the same, frozen layers kept ": {"num_layers": 18, "trainable_layers": 2, "kept": True},
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="as for `make hh`")
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--without-autocast", action="store_true", help="for processors without bfloat16: minutes for one such update"
    )
    arguments = parser.parse_args(argv)
    chosen = {name: way for name, way in WAYS.items() if not (arguments.without_autocast and "autocast" in way)}
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / "recipes" / "hh"))
    import hh

    rows = hh.read_dialogues(arguments.dataset)[0]
    ways = {}
    with progress("updates", len(chosen)) as advance:
        for name, way in chosen.items():
            ways[name] = measure(arguments.model, rows, arguments.repeats, **way)
            advance(1)
    record = {
        "command": shlex.join(["python", "benchmarks/reward_step.py", *sys.argv[1:]]),
        "environment": {key: value for key, value in environment().items() if key != "command"},
        "num_pairs": NUM_PAIRS,
        "max_tokens": MAX_TOKENS,
        "ways": ways,
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_atomic(arguments.output / "reward_step.json", json.dumps(record, indent=1) + "\n")
    write_atomic(arguments.output / "reward_step.md", as_markdown(record))
    print(as_markdown(record))


def measure(
    model: str,
    rows: list[dict[str, Any]],
    repeats: int,
    *,
    plain: bool = False,
    autocast: bool = False,
    kept: bool = False,
    **words: Any,
) -> dict[str, Any]:
    """Seconds of an update in one way, the tokens that the model reads in it, and what they cost by the count."""
    config = RewardConfig(model=model, dataset="the comparisons", dtype="float32", learning_rate=1e-6, **words)
    tokenizer = load_tokenizer(model)
    backbone = load_reward_backbone(model, tokenizer=tokenizer, dtype="float32", device="cpu", **words)
    data = encode_comparisons(short_rows(rows, config, tokenizer), "the comparisons", config, tokenizer)
    task = RewardTask(backbone, data, cache_bytes=2**40 if kept else 0)
    optimizer = make_optimizer(config, task.masters)
    forward = plain_loss if plain else pairtune_loss
    losses, seconds = [], []
    for _ in range(repeats + 1):
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = forward(task, data)
        loss.backward()
        apply_gradients(task.masters, optimizer, learning_rate=1e-6, max_grad_norm=1.0, step=1, mend="stop")
        seconds.append(time.process_time() - start)
        losses.append(loss.item())
    found = {
        "seconds": seconds[1:],  # the first one fills the memory with frozen states, among other things
        "first_loss": losses[0],
        **counted(task, data, plain=plain, kept=kept),
    }
    del task, backbone, optimizer, loss
    gc.collect()
    return found


def short_rows(rows: list[dict[str, Any]], config: RewardConfig, tokenizer: Any) -> list[dict[str, Any]]:
    """The first comparisons whose dialogues are no longer than MAX_TOKENS."""
    some = rows[: 20 * NUM_PAIRS]
    data = encode_comparisons(some, "the comparisons", config, tokenizer)
    short = [
        some[number]
        for place, number in enumerate(data.data.prompt_dataset.numbers)
        if max(lengths_of(data, place)) <= MAX_TOKENS
    ]
    return short[:NUM_PAIRS]


def lengths_of(data: Comparisons, row: int) -> list[int]:
    """Tokens of a prompt with each of its completions."""
    prompt = len(data.closed.prompt_dataset.token_ids[row])
    return [prompt + len(one.ids) for one in data.closed.completions[row]]


def pairtune_loss(task: RewardTask, data: Comparisons) -> torch.Tensor:
    return task.loss(range(len(data))).total / len(data)


def plain_loss(task: RewardTask, data: Comparisons) -> torch.Tensor:
    """One padded batch of all chosen and all rejected dialogues."""
    texts = [
        data.closed.prompt_dataset.token_ids[row] + data.closed.completions[row][k].ids
        for k in range(2)
        for row in range(len(data))
    ]
    width = max(map(len, texts))
    ids = torch.full((len(texts), width), task.model.config.pad_token_id)
    for place, text in enumerate(texts):
        ids[place, : len(text)] = torch.tensor(text)
    logits = task.model(ids, attention_mask=ids != task.model.config.pad_token_id).logits[:, 0].float()
    chosen, rejected = logits.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def counted(task: RewardTask, data: Comparisons, *, plain: bool, kept: bool) -> dict[str, Any]:
    """Tokens that the model reads in an update, padding among them in the plain loop, and the GFLOP of its layers."""
    lengths = [lengths_of(data, row) for row in range(len(data))]
    needed = sum(map(task.length, range(len(data))))
    tokens = 2 * len(data) * max(map(max, lengths)) if plain else needed
    layers = task.backbone.model.base_model.layers
    weights = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    num_trained = sum(any(p.requires_grad for p in layer.parameters()) for layer in layers)
    trained = sum(weights[len(weights) - num_trained :])
    frozen = 0 if kept else sum(weights) - trained
    return {"tokens": tokens, "gflop": 2 * tokens * (frozen + 3 * trained) / 1e9}


def as_markdown(record: dict[str, Any]) -> str:
    first = next(iter(record["ways"].values()))
    lines = [
        "# One update of a reward model, recorded",
        "",
        f"`{record['command']}`",
        "",
        machine_line(record),
        "",
        f"{record['num_pairs']} comparisons of up to {record['max_tokens']} tokens. Seconds of the processor on one "
        "thread: median and range of the updates after the first. Operations are counted, the rate is their quotient.",
        "",
        "| | tokens | GFLOP | seconds | GFLOP/s | times as fast |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, way in record["ways"].items():
        median = statistics.median(way["seconds"])
        spread = f"{median:.2f} ({min(way['seconds']):.2f} to {max(way['seconds']):.2f})"
        faster = statistics.median(first["seconds"]) / median
        numbers = f"{way['gflop']:.0f} | {spread} | {way['gflop'] / median:.0f} | {faster:.1f}"
        lines.append(f"| {name.strip()} | {way['tokens']} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
