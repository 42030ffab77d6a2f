"""The loop of the first two stages: learning from a dataset that does not change. `train_supervised` reads from top to
bottom in the order of events; what is learned is the task's."""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pairtune.config import RewardConfig, SFTConfig, SupervisedWords, config_to_yaml, supervised_warnings
from pairtune.data import shard
from pairtune.errors import PairtuneError
from pairtune.models.loading import MasterWeights
from pairtune.runs import checkpoint, distributed, folder
from pairtune.runs.display import Display
from pairtune.runs.metrics import check_trackers, read_jsonl
from pairtune.stages.loop import Loop
from pairtune.stages.optimization import (
    TrainResult,
    apply_gradients,
    learning_rate_factor,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)

WARMUP_SHARE = 0.03
"""Of all updates, where `warmup_steps` is null: as in the recipe of Stanford Alpaca (2023)."""

OUT_OF_MEMORY = (
    "lower micro_batch_size, set gradient_checkpointing: true, or give a new run a smaller max_length or "
    "max_completion_length, trainable_layers or lora_r"
)
"""What helps where the GPU has no room. A run that goes on may cut its batches otherwise, no more."""


@dataclass(frozen=True)
class TaskLoss:
    """What one micro-batch contributes to an update."""

    total: Tensor
    """Scalar with gradient: the loss SUMMED over the counted elements of the rows. The loop divides."""
    metrics: dict[str, tuple[float, float]]
    """name -> (sum, count); logged as sum / count over all micro-batches and processes of the update."""
    num_tokens: int
    """Real tokens that went through the model, for tokens_per_second and num_tokens."""


class SupervisedTask(Protocol):
    """What is learned: a model, a loss of some rows of its training data, and a measure on held-out data."""

    model: Any
    tokenizer: Any
    masters: MasterWeights
    device: torch.device
    dtype: torch.dtype
    num_rows: int
    """Training rows; `rows` below are numbers from 0 to num_rows - 1."""
    num_eval_rows: int
    """Held-out rows that `evaluate` goes through; 0: it is never called."""

    def length(self, row: int) -> int:
        """Tokens of a training row: rows of like length share a micro-batch, so that little of it is padding."""

    def counted(self, rows: Sequence[int]) -> int:
        """Elements of the loss in these rows (tokens, pairs, ...), known before any pass: the update's denominator."""

    def loss(self, rows: Sequence[Any]) -> TaskLoss:
        """One micro-batch, forward only; the loop divides by the update's `counted` and goes backward. Numbers of
        training rows, or what the task's `pack` makes of them."""

    def evaluate(self, advance: Callable[[float], None]) -> dict[str, Any]:
        """A line of evaluations.jsonl without its step: bare numbers, and {"mean", "low", "high"} for what has an
        interval. `advance(n)` after every n held-out rows. Called without gradients, in eval mode, on the main process.
        """

    def save_model(self, path: Path) -> None:
        """Write what `from_pretrained` loads into an existing folder, tokenizer included."""


# ------------------------------------------------------------------------------------------------------ before the loop


def prepare_run(config: SFTConfig | RewardConfig) -> str:
    """The first thing a stage does: join the process group, seed, and refuse what can be refused before anything is
    loaded. Returns the device that this process shall use, in the words of `load_policy`."""
    process_device = distributed.init_from_env(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    check_trackers(config.report_to)
    if distributed.is_main():
        folder.check(config.output_dir, config_to_yaml(config), overwrite=config.overwrite, resume=config.resume)
    return config.device if process_device is None else str(process_device)


def begin_display(
    config: SupervisedWords,
    stack: contextlib.ExitStack,
    num_rows: int,
    *,
    notes: Sequence[str],
    held_out: Sequence[str],
) -> Display:
    """A display that `stack` closes, with the losses of a run that goes on, and what was left out of the data."""
    done = read_jsonl(Path(config.output_dir) / folder.METRICS) if config.resume else []
    display = stack.enter_context(
        Display(
            num_updates(config, num_rows),
            max_minutes=config.max_minutes,
            headline="loss",
            rewards=[line.get("loss") for line in done],
        )
    )
    for note in [*notes, *(f"held-out: {note}" for note in held_out)]:
        display.message(note)
    return display


def loading_words(config: SFTConfig | RewardConfig, device: str) -> dict[str, Any]:
    """What `load_policy` and `load_reward_backbone` are told alike."""
    return {
        "dtype": folder.compute_dtype(Path(config.output_dir), config.dtype, resume=config.resume),
        "device": device,
        "attn_implementation": config.attn_implementation,
        "trainable_layers": config.trainable_layers,
        "lora_r": config.lora_r,
        "lora_alpha": config.lora_alpha,
        "lora_target_modules": config.lora_target_modules,
        "gradient_checkpointing": config.gradient_checkpointing,
        "revision": config.model_revision,
        "trust_remote_code": config.trust_remote_code,
    }


def updates_per_epoch(config: SupervisedWords, num_rows: int) -> int:
    """Updates in which every row is met once."""
    return math.ceil(num_rows / config.batch_size)


def num_updates(config: SupervisedWords, num_rows: int) -> int:
    """Updates (steps) of the whole run."""
    if config.max_steps is not None:
        return config.max_steps
    # Rounded before it is rounded up: 0.1 of 30 updates are 3, not 4.
    return max(1, math.ceil(round(config.num_epochs * updates_per_epoch(config, num_rows), 6)))


def update_rows(config: SupervisedWords, num_rows: int, step: int) -> list[int]:
    """The rows of update `step` (from 0), over all processes: a function of its arguments alone, so resuming needs no
    state.

    Each epoch is a fresh permutation, cut into updates of `batch_size` rows or one fewer than the largest: a short last
    update would weigh each of its rows more than the others do.
    """
    epoch, place = divmod(step, updates_per_epoch(config, num_rows))
    order = np.random.default_rng((config.seed, epoch)).permutation(num_rows).tolist()
    return shard(order, place, updates_per_epoch(config, num_rows))


Pack = Callable[[list[int]], list[Any]]
"""Rows of an update, the longest first, to rows of a forward pass: the same, or lists of those that share one."""


def micro_batches(
    config: SupervisedWords, task: SupervisedTask, rows: Sequence[int], pack: Pack = list
) -> list[list[Any]]:
    """This process's share of an update's rows, cut into micro-batches of rows of like length, the longest first: who
    runs out of memory does so at once."""
    by_length = sorted(rows, key=lambda row: (-task.length(row), row))
    mine = pack(by_length[distributed.rank() :: distributed.world_size()])
    size = config.micro_batch_size or max(1, len(mine))
    return [mine[start : start + size] for start in range(0, len(mine), size)]


# ------------------------------------------------------------------------------------------------------------- the loop


@dataclass
class Progress:
    """Where a run stands; with the masters and the optimizer's moments, all that resuming needs."""

    step: int = 0
    """Updates made."""
    num_tokens: int = 0
    """Tokens that went through the model in training, over all processes."""
    seconds: float = 0.0
    """Training time so far, over all resumes."""
    evaluated_step: int = -1
    """The last step whose model was evaluated on the held-out rows."""


def train_supervised(
    config: SupervisedWords,
    task: SupervisedTask,
    run_dir: Path,
    display: Display,
    stack: contextlib.ExitStack,
    *,
    derived: Callable[[dict[str, float]], dict[str, float]] = lambda metrics: {},
    pack: Pack = list,
) -> TrainResult:
    """Update and log, step after step, in the `Loop` that evaluates and saves. A step is one optimizer update.

    Makes and locks the run folder, and writes it as `pairtune train` does. `stack` closes what is opened here;
    `derived` adds to a step's metrics what is computed from their means; `pack` says which rows share one of a forward
    pass. Raises PairtuneError where the folder is
    refused, where a gradient or a loss is not finite, and for whatever the task raises.
    """
    is_main = distributed.is_main()
    if is_main:
        run_folder = (run_dir, config_to_yaml(config))
        stack.enter_context(folder.create(*run_folder, overwrite=config.overwrite, resume=config.resume))
    distributed.barrier()
    task.masters.copy_from_main()
    optimizer = make_optimizer(config, task.masters)
    progress = _restore(config, run_dir, task, optimizer)
    num_steps = num_updates(config, task.num_rows)
    for sentence in supervised_warnings(config, num_steps):
        display.message(f"note: {sentence}")
    schedule = config.model_copy(update={"warmup_steps": warmup_updates(config, num_steps)})
    loop = Loop(config, run_dir, progress, display, stack, num_steps=num_steps, dtype=task.dtype, device=task.device)
    log, phase = loop.log, loop.phase
    moving = False

    def measure() -> None:
        if log is not None and task.num_eval_rows:
            with phase("evaluate", "evaluating on held-out rows", task.num_eval_rows) as advance, torch.no_grad():
                evaluation = {"step": progress.step, **task.evaluate(advance)}
            log.log_evaluation(evaluation)
            display.evaluation(evaluation)

    def write() -> None:
        if is_main:
            with phase("save", "saving a checkpoint"):
                checkpoint.save(
                    run_dir,
                    progress.step,
                    save_model=task.save_model,
                    tensors=state_tensors(task.masters, optimizer),
                    state={"progress": asdict(progress)},
                    keep_last=config.keep_last,
                )

    def step() -> None:
        nonlocal moving
        moving = False
        rows = update_rows(config, task.num_rows, progress.step)

        with phase("update", "updating", len(rows)) as advance:
            totals = _accumulate_gradients(config, task, rows, pack, advance)
            moving = True  # a move that fails halfway leaves nothing to be saved
            norm = apply_gradients(
                task.masters,
                optimizer,
                learning_rate=config.learning_rate * learning_rate_factor(schedule, progress.step, num_steps),
                max_grad_norm=config.max_grad_norm,
                step=progress.step + 1,
                mend="lower learning_rate",
            )
        if not math.isfinite(totals.metrics["loss"]):
            raise PairtuneError(
                f"the loss of step {progress.step + 1} is not finite, though its gradient is; look for margins of "
                "enormous size in the dataset, or lower learning_rate."
            )

        progress.step += 1
        progress.num_tokens += totals.num_tokens
        metrics = totals.metrics | {
            "grad_norm": norm,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "epoch": progress.step / updates_per_epoch(config, task.num_rows),
            "num_tokens": float(progress.num_tokens),
        }
        metrics |= derived(metrics)
        step_time = loop.step_time()
        metrics |= loop.timer.take()
        metrics |= {"step_time": step_time, "tokens_per_second": totals.num_tokens / step_time}
        if log is not None:
            log.log_step(progress.step, metrics)
        display.step(progress.step, metrics)

    task.model.eval()
    finished = loop.run(
        step, measure=measure, write=write, mend=lambda phase: OUT_OF_MEMORY, untouched=lambda: not moving
    )
    return TrainResult(run_dir, progress.step, finished=finished, model=task.model, tokenizer=task.tokenizer)


def warmup_updates(config: SupervisedWords, num_steps: int) -> int:
    """Updates over which the learning rate rises."""
    return math.ceil(WARMUP_SHARE * num_steps) if config.warmup_steps is None else config.warmup_steps


@dataclass(frozen=True)
class _Totals:
    """What an update says of itself, over all micro-batches and processes."""

    metrics: dict[str, float]
    """Means; the loss among them."""
    num_tokens: int


def _accumulate_gradients(
    config: SupervisedWords, task: SupervisedTask, rows: Sequence[int], pack: Pack, advance: Callable[[float], None]
) -> _Totals:
    """The gradient of one update's mean loss, on the masters of this process; what is left is the sum over
    processes."""
    # Counted over all micro-batches and processes before any backward pass, so that the gradient does not depend on how
    # an update is cut.
    denominator = max(1, task.counted(rows))
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    num_tokens = 0
    task.model.train(config.gradient_checkpointing)
    cut = micro_batches(config, task, rows, pack)
    for micro_batch in cut:
        output = task.loss(micro_batch)
        (output.total / denominator).backward()
        for name, (total, count) in (output.metrics | {"loss": (output.total.item(), 0)}).items():
            sums[name][0] += total
            sums[name][1] += count
        num_tokens += output.num_tokens
        advance(len(rows) / len(cut))
    task.model.eval()

    parts = distributed.gather_objects([dict(sums), num_tokens])
    everywhere: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for part, _ in parts:
        for name, (total, count) in part.items():
            everywhere[name][0] += total
            everywhere[name][1] += count
    everywhere["loss"][1] = denominator
    metrics = {name: total / count for name, (total, count) in everywhere.items() if count}
    return _Totals(metrics, sum(tokens for _, tokens in parts))


def _restore(
    config: SupervisedWords, run_dir: Path, task: SupervisedTask, optimizer: torch.optim.Optimizer
) -> Progress:
    """Where the run stands: at its newest checkpoint when resuming, else at the start."""
    path = checkpoint.latest(run_dir) if config.resume else None
    if path is None:
        return Progress()
    tensors, state = checkpoint.load(path)
    progress = Progress(**state["progress"])
    load_state_tensors(task.masters, optimizer, tensors, num_updates=progress.step)
    return progress
