"""`pairtune compare`: a grid of runs at equal budgets, each an ordinary `train` run, and what they say together.

Every cell stands in a folder of its own and is finished, half done or not begun; nothing else is remembered. A grid
that is started again skips what is finished, lets a half-done cell go on from its checkpoint, and tries failed ones
again. Tables are made from the folders alone, in `pairtune.evidence.comparison`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pairtune.config import CompareConfig, TaskWords, TrainConfig, config_to_yaml, flat_values
from pairtune.errors import PairtuneError
from pairtune.evidence.grid import Cell, Grid, grid_of
from pairtune.evidence.runs import (
    CELL,
    CELLS,
    COMPARISON,
    EXACT,
    SWEEP,
    Arm,
    evaluated,
    is_exact,
    read_json,
    read_run,
    shared_prompts,
    shown,
)
from pairtune.runs import folder
from pairtune.runs.display import clean, duration, shows_live
from pairtune.runs.folder import as_json, without_nan, write_atomic
from pairtune.runs.metrics import read_jsonl

LOG = "log.txt"
TRACEBACK = "traceback.txt"
BUDGET = {
    "completions": "num_completions",
    "tokens_generated": "num_generated_tokens",
    "reward_calls": "num_reward_calls",
    "updates": "num_updates",
    "forward_tokens": "num_forward_tokens",
    "backward_tokens": "num_backward_tokens",
}
"""Name in cell.json -> metric of the run's last step."""

MAY_DIFFER = frozenset({"output_dir", "save_steps", "keep_last", "report_to", "num_completions_to_log"})
"""Words of a cell that a comparison may be started again with otherwise: they change what is kept."""


def compare(config: CompareConfig) -> Path:
    """Run every cell of a comparison that is not finished yet, then write comparison.json and report.html.

    Returns the comparison's folder. Raises PairtuneError for what a user can mend: before anything is loaded for a
    mistake in the configuration or a folder that holds another comparison, at the end where cells failed (all others
    are done then, and in the tables). KeyboardInterrupt once Ctrl-C or SIGTERM has stopped the grid.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PairtuneError("`pairtune compare` runs its cells itself; start it without torchrun, with --parallel.")
    grid = grid_of(config)
    path = Path(config.output_dir)
    _check_folder(path, config, grid)
    console = Console(file=sys.stdout, highlight=False)  # this stdout: while a cell runs there is another

    def say(text: str) -> None:
        console.print(Text(clean(text)), soft_wrap=True)

    text, stored = config_to_yaml(config), path / folder.CONFIG
    is_same = stored.exists() and stored.read_text("utf-8") == text
    with folder.hold(path, text):
        (path / CELLS).mkdir(exist_ok=True)
        if not is_same or any(_status(cell) != "done" for cell in [*grid.sweep, *grid.cells]):
            (path / COMPARISON).unlink(missing_ok=True)  # of fewer cells, or of other rewards: no longer true
        for note in grid.notes:
            say(f"note: {note}")
        try:
            with _sigterm_interrupts():
                _run_all(grid.sweep, config, console, "run of the sweep")
                swept = sweep_of(config, grid)
                for line in _sweep_lines(swept):
                    say(line)
                _run_all(_with_chosen(grid, swept), config, console, "cell")
                _fail_unchosen(grid, swept)
                _show_tables(path, config, grid, swept, console)
        except KeyboardInterrupt:
            done = sum(_status(cell) == "done" for cell in grid.cells)
            say(f"stopped with {done} of {len(grid.cells)} cells done; the same command goes on where it stopped.")
            raise
    failed = [cell for cell in grid.cells if _status(cell) == "failed"]
    if failed:
        shown = ", ".join(cell.name for cell in failed[:3]) + (" and others" if len(failed) > 3 else "")
        raise PairtuneError(
            f"{len(failed)} of {len(grid.cells)} cells failed ({shown}); {CELL} in their folders under {path / CELLS} "
            "says why, and the same command tries them again."
        )
    return path


# ---------------------------------------------------------------------------------------------------------- the folder


def _check_folder(path: Path, config: CompareConfig, grid: Grid) -> None:
    """Raises PairtuneError unless the folder is free, or holds this comparison or a part of it."""
    if path.is_file():
        raise PairtuneError(f"output_dir {path} is a file; choose another --output_dir.")
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / folder.CONFIG).exists() or not (path / CELLS).exists():
        if {entry.name for entry in path.iterdir()} <= {folder.LOCK, folder.CONFIG}:
            return  # killed before its first cell
        raise PairtuneError(f"output_dir {path} holds files but no comparison; choose another --output_dir.")
    stored = yaml.safe_load((path / folder.CONFIG).read_text("utf-8"))
    try:
        before = CompareConfig(**{**stored, "output_dir": config.output_dir})
        earlier = grid_of(before)
    except (PairtuneError, TypeError) as error:
        raise PairtuneError(
            f"{path / folder.CONFIG} cannot be read as a comparison ({str(error).splitlines()[0]}); choose another "
            "--output_dir."
        ) from error
    if before.task != config.task:
        raise PairtuneError(_other(path, "task", before.task.model_dump(), config.task.model_dump()))
    if before.sweep.rule != config.sweep.rule:
        raise PairtuneError(_other(path, "sweep.rule", before.sweep.rule, config.sweep.rule))
    swept = {cell.method for cell in earlier.sweep}
    for cell in grid.sweep:
        if cell.method in swept and cell.name not in {other.name for other in earlier.sweep}:
            raise PairtuneError(
                f"{SWEEP}/{cell.name} is new, but {cell.method} has chosen already and its cells ran with that; choose "
                "another --output_dir."
            )
    for kind, old, new in ((CELLS, earlier.cells, grid.cells), (SWEEP, earlier.sweep, grid.sweep)):
        now = {cell.name: cell for cell in new}
        for cell in old:
            if cell.name not in now:
                raise PairtuneError(
                    f"{path} holds a comparison with the cell {kind}/{cell.name}, which this configuration does not "
                    "have; it may add cells, but not take any away: choose another --output_dir."
                )
            was, to_be = flat_values(cell.config), flat_values(now[cell.name].config)
            for key in was:
                if was[key] != to_be[key] and key not in MAY_DIFFER:
                    shown = f"{key} of {kind}/{cell.name}"
                    raise PairtuneError(_other(path, shown, was[key], to_be[key]))


def _other(path: Path, what: str, before: Any, now: Any) -> str:
    return (
        f"{what} was {json.dumps(before)} in {path / folder.CONFIG} and is {json.dumps(now)} now; a comparison may "
        "gain cells, but those it has must stay as they are: choose another --output_dir."
    )


def _status(cell: Cell) -> str | None:
    return (read_json(Path(cell.config.output_dir) / CELL) or {}).get("status")


# ------------------------------------------------------------------------------------------------------------- one cell


def run_cell(cell: Cell, task: TaskWords, *, keep_checkpoints: bool) -> dict[str, Any]:
    """Run a cell, or let it go on where it was stopped; returns the contents of its cell.json.

    What `train` says goes into log.txt. An error ends in `status` failed and one sentence; a signal in stopped.
    """
    path = Path(cell.config.output_dir)
    before = read_json(path / CELL) or {}
    path.mkdir(parents=True, exist_ok=True)
    (path / folder.LOCK).touch()  # marks it as pairtune's before `train` comes
    record = {"name": cell.name, "method": cell.method, "seed": cell.seed, "settings": cell.settings}
    record |= {"status": "running", "error": None, "steps": 0, "budget": None}
    (path / TRACEBACK).unlink(missing_ok=True)
    _write_cell(path, record)
    started = time.monotonic()
    try:
        with _into(path / LOG):
            finished = _train(cell.config, task)
        record |= {"status": "done" if finished else "stopped"}
    except KeyboardInterrupt:
        record |= {"status": "stopped"}
    except PairtuneError as error:
        record |= {"status": "failed", "error": " ".join(str(error).splitlines())}
    except Exception as error:  # a bug, in a reward function perhaps: the other cells are worth running
        first = (str(error).strip() or "no message").splitlines()[0]
        record |= {"status": "failed", "error": f"{type(error).__name__}: {first}"}
        (path / TRACEBACK).write_text(traceback.format_exc(), "utf-8")
    metrics = read_jsonl(path / folder.METRICS)
    if metrics:
        record["steps"] = metrics[-1]["step"]
        record["budget"] = {name: metrics[-1][metric] for name, metric in BUDGET.items()}
    record["seconds"] = round(before.get("seconds", 0) + time.monotonic() - started, 1)
    _write_cell(path, record)
    if record["status"] == "done" and not keep_checkpoints:
        shutil.rmtree(path / folder.CHECKPOINTS, ignore_errors=True)
    return record


def _write_cell(path: Path, record: dict[str, Any]) -> None:
    write_atomic(path / CELL, json.dumps(record, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _into(path: Path) -> Iterator[None]:
    """What is printed meanwhile, warnings too, goes into a file, after what stands there."""
    with (
        open(path, "a", encoding="utf-8", errors="backslashreplace") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield


def _train(config: TrainConfig, task: TaskWords) -> bool:
    from pairtune.stages.rl import train

    if task.policy is not None:
        return _train_on_task(config, task)
    return train(config, tokenizer=_tokenizer(config.model, config.model_revision, config.trust_remote_code)).finished


@cache
def _tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Loaded once a process: nothing in a run changes it."""
    from pairtune.models.loading import load_tokenizer

    return load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)


# ---------------------------------------------------------------------------------------------------- enumerable tasks


def task_of(words: TaskWords) -> Any:
    """The language that a comparison is about, an `EnumerableTask`."""
    from pairtune.evidence.exact import EnumerableTask

    return EnumerableTask.random(
        vocab_size=words.vocab_size,
        num_prompts=words.num_prompts,
        max_completion_length=words.max_completion_length,
        seed=words.seed,
    )


def starting_policy(words: TaskWords) -> Any:
    """The policy in memory that every cell starts from, and that is the reference of every KL."""
    from pairtune.evidence.exact import tabular_model, tiny_transformer

    make = tiny_transformer if words.policy == "transformer" else tabular_model
    return make(task_of(words), seed=words.seed)


def _train_on_task(config: TrainConfig, words: TaskWords) -> bool:
    """As `train`, with what is made in memory, and exact.jsonl beside the evaluations."""
    from pairtune.stages.rl import train

    task, model = task_of(words), starting_policy(words)
    # All prompts equally often, whatever the size of a batch.
    rows = task.dataset(math.lcm(config.batch_size, task.num_prompts))
    held_out = [{**row, "evaluation": True} for row in task.dataset(words.num_rows)]
    return train(
        config,
        model=model,
        tokenizer=task.tokenizer(),
        reward_funcs=[_exact_reward(task, model, config)],
        train_dataset=rows,
        eval_dataset=held_out,
    ).finished


def _exact_reward(task: Any, model: Any, config: TrainConfig) -> Any:
    """The task's rewards; asked by an evaluation it also writes down what the policy truly is."""
    from pairtune.evidence.exact import exact_values, sequence_logprobs

    reference = sequence_logprobs(model, task)
    completions = task.completions()
    lengths, truncated = completions.num_tokens.double(), completions.truncated.double()
    path = Path(config.output_dir) / EXACT

    def table(prompts: list[str], completion_ids: list[list[int]], trainer_state: Any, **columns: Any) -> list[float]:
        step = trainer_state.global_step
        earlier = [] if step == 0 else read_jsonl(path)
        if "evaluation" in columns and not any(line["step"] == step for line in earlier):
            law = sequence_logprobs(model, task)
            values = exact_values(task, law, reference, config.beta or 1.0)
            line = {"step": step, "reward": values.reward, "kl": values.kl}
            line |= {"regret": values.regret if config.beta else None}
            line |= {
                name: (law.exp() * column).sum(-1).mean().item()
                for name, column in (("length", lengths), ("truncated", truncated))
            }
            # A run that goes on from an earlier checkpoint comes by here again, and finds the same.
            kept = [line for line in earlier if line["step"] < step]
            write_atomic(path, "".join(json.dumps(without_nan(each), allow_nan=False) + "\n" for each in [*kept, line]))
        return task.reward_func(prompts, completion_ids)

    return table


# ---------------------------------------------------------------------------------------------------- one after another


def _run_all(cells: Sequence[Cell], config: CompareConfig, console: Console, what: str) -> None:
    """Runs the cells that are not finished. Raises KeyboardInterrupt where one was stopped by a signal."""
    waiting = [cell for cell in cells if _status(cell) != "done"]
    if not waiting:
        return
    shown = _Shown(len(cells), len(cells) - len(waiting), what, console, config.parallel)
    with shown:
        if config.parallel == 1:
            for cell in waiting:
                shown.begin(cell)
                shown.end(cell, run_cell(cell, config.task, keep_checkpoints=config.keep_checkpoints))
        else:
            _side_by_side(waiting, config, shown)


class _Shown:
    """The grid as it goes on: a line for every cell that ends, and on a terminal what is at work."""

    def __init__(self, total: int, done: int, what: str, console: Console, parallel: int) -> None:
        self._total, self._done, self._what, self._console, self._parallel = total, done, what, console, parallel
        self._begun: dict[str, tuple[Cell, float]] = {}
        self._seconds: list[float] = []
        self._live: Live | None = None

    def __enter__(self) -> _Shown:
        if self._done:
            self._say(f"{self._done} of {self._total} {self._what}s are done already")
        if shows_live(self._console):
            # What cells print goes into their logs, so nothing is to be caught here.
            self._live = Live(
                get_renderable=self._render,
                console=self._console,
                refresh_per_second=2,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def begin(self, cell: Cell) -> None:
        self._begun[cell.name] = (cell, time.monotonic())

    def end(self, cell: Cell, record: dict[str, Any]) -> None:
        """Raises KeyboardInterrupt where the cell was stopped by a signal."""
        seconds = time.monotonic() - self._begun.pop(cell.name)[1]
        if record["status"] == "stopped":
            raise KeyboardInterrupt
        self._done += 1
        self._seconds.append(seconds)
        how = f"failed: {record['error']}" if record["status"] == "failed" else self._result(cell)
        left = f", about {duration(self.time_left())} left" if self._done < self._total else ""
        self._say(f"{self._what} {self._done} of {self._total}  {cell.name}  {how}  {duration(seconds)}{left}")

    def time_left(self) -> float:
        """Seconds, at the mean pace so far."""
        left = (self._total - self._done) * sum(self._seconds) / max(1, len(self._seconds)) / self._parallel
        return max(0.0, left - max((time.monotonic() - begun for _, begun in self._begun.values()), default=0.0))

    def _result(self, cell: Cell) -> str:
        evaluations = read_jsonl(Path(cell.config.output_dir) / folder.EVALUATIONS)
        if not evaluations:
            return "done"
        # Null where no reward function answered: the cell is done all the same.
        reward, kl = (evaluations[-1][name]["mean"] for name in ("reward", "kl"))
        return f"reward {'–' if reward is None else f'{reward:.3f}'}, KL {'–' if kl is None else f'{kl:.2f}'}"

    def _say(self, text: str) -> None:
        self._console.print(Text(clean(text)), soft_wrap=True)

    def _render(self) -> RenderableType:
        lines = []
        for cell, begun in list(self._begun.values()):
            steps = _last_step(Path(cell.config.output_dir) / folder.METRICS)
            lines.append(
                f"  {cell.name}  step {steps} of {cell.config.max_steps}  {duration(time.monotonic() - begun)}"
            )
        left = f", about {duration(self.time_left())} left" if self._seconds else ""
        return Group(Text(f"{self._done} of {self._total} {self._what}s done{left}", style="bold"), *map(Text, lines))


def _last_step(path: Path) -> int:
    """Of the last whole line of metrics.jsonl, without reading all of it."""
    with contextlib.suppress(OSError, ValueError, KeyError, IndexError), open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 20_000))
        return int(json.loads(file.read().split(b"\n")[-2])["step"])
    return 0


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does. While a cell trains, its own handler lets it finish its step and save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# --------------------------------------------------------------------------------------------------------- side by side


def _side_by_side(cells: Sequence[Cell], config: CompareConfig, shown: _Shown) -> None:
    """`parallel` processes, each taking the next cell when it is done with one."""
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    told: queue.SimpleQueue[tuple[Cell, dict[str, Any] | None]] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    workers = [_Worker(waiting, told, config) for _ in range(min(config.parallel, len(cells)))]
    try:
        ended = 0
        while ended < len(cells):
            cell, record = told.get()
            if record is None:
                shown.begin(cell)
            else:
                ended += 1
                shown.end(cell, record)
    except KeyboardInterrupt:
        for worker in workers:
            worker.stop()
        raise
    finally:
        for worker in workers:
            worker.join()


class _Worker(threading.Thread):
    """A process that runs cells, and the thread that hands them to it, one JSON line each way."""

    def __init__(
        self,
        waiting: queue.SimpleQueue[Cell],
        told: queue.SimpleQueue[tuple[Cell, dict[str, Any] | None]],
        config: CompareConfig,
    ) -> None:
        super().__init__(daemon=True)
        self._waiting, self._told, self._config = waiting, told, config
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False
        self.start()

    def run(self) -> None:
        while not self._stopping:
            try:
                cell = self._waiting.get_nowait()
            except queue.Empty:
                break
            self._told.put((cell, None))
            self._told.put((cell, self._ask(cell)))
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()  # the end of its work
            self._process.wait()

    def _ask(self, cell: Cell) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            # Its own session: Ctrl-C reaches this process alone, which then asks the workers to stop, once.
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from pairtune.evidence.compare import work; work()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        order: dict[str, Any] = {"name": cell.name, "method": cell.method, "settings": cell.settings}
        order |= {"config": cell.config.model_dump(), "task": self._config.task.model_dump()}
        order |= {"keep_checkpoints": self._config.keep_checkpoints}
        if self._stopping:
            process.terminate()
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if answer:
            return dict(json.loads(answer))
        process.wait()
        path = Path(cell.config.output_dir)
        record = (read_json(path / CELL) or {"name": cell.name, "method": cell.method}) | {"status": "stopped"}
        if not self._stopping:
            error = f"its process ended without a word (exit code {process.returncode}); was there memory enough?"
            record |= {"status": "failed", "error": error}
        path.mkdir(parents=True, exist_ok=True)
        _write_cell(path, record)
        return record

    def stop(self) -> None:
        """The cell at work finishes its step and saves."""
        self._stopping = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def work() -> None:
    """What a worker process does: cells in, one JSON line each, cell.json out, until its stdin ends.

    When the process that feeds it dies, so does it, at once: whatever it was doing can be resumed, and a second one
    that does it too would be in its way.
    """
    orders: queue.SimpleQueue[str] = queue.SimpleQueue()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # nothing else may speak on this line
    at_work = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            at_work.set()
            orders.put(line)
        if at_work.is_set():
            os._exit(1)
        orders.put("")

    threading.Thread(target=listen, daemon=True).start()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _sigterm_interrupts(), contextlib.suppress(KeyboardInterrupt):
        while line := orders.get():
            order = json.loads(line)
            config = TrainConfig(**order["config"])
            cell = Cell(order["name"], order["method"], order["settings"], config)
            record = run_cell(cell, TaskWords(**order["task"]), keep_checkpoints=order["keep_checkpoints"])
            at_work.clear()
            answers.write(json.dumps(record) + "\n")
            answers.flush()
            if record["status"] == "stopped":
                break


# -------------------------------------------------------------------------------------------------------------- sweep


def sweep_of(config: CompareConfig, grid: Grid) -> dict[str, Any] | None:
    """The runs of the sweep with what the rule makes of each, and what it chooses for each method; None without one.

    `rule`, `split`, `seed`; `runs`: `name`, `method`, `settings`, `status`, `error`, `reward`, `kl`, `value` (what the
    rule goes by; null where the run failed or measured none), `chosen` and `behind` (how far the value lies below that
    of the method's chosen run, an interval over the prompts; null for that run itself and where the truth is known);
    `chosen`: method -> settings, or null where none finished; `at_edge`: the methods that chose the smallest or the
    largest value of several, so that a better may lie beyond; `undecided`: those where 0 lies in the interval of a run
    that was not chosen, so that chance may have chosen.
    """
    if not grid.sweep:
        return None
    runs: list[dict[str, Any]] = []
    for cell in grid.sweep:
        path = Path(cell.config.output_dir)
        record = read_json(path / CELL) or {"status": "missing", "error": None}
        line: dict[str, Any] = {"name": cell.name, "method": cell.method, "settings": cell.settings}
        line |= {"status": record["status"], "error": record["error"], "reward": None, "kl": None, "value": None}
        if record["status"] == "done":
            reward, kl = without_nan(_end_of(path))  # JSON has null for a mean that is none
            line |= {"reward": reward, "kl": kl}
            if reward is not None and (kl is not None or config.sweep.rule != "objective"):
                line["value"] = reward - (cell.config.beta * kl if config.sweep.rule == "objective" else 0.0)
        runs.append({**line, "chosen": False, "behind": None})
    chosen: dict[str, Any] = {}
    for method in dict.fromkeys(cell.method for cell in grid.sweep):
        tried = [(line, cell) for line, cell in zip(runs, grid.sweep, strict=True) if cell.method == method]
        finished = [(line, cell) for line, cell in tried if line["value"] is not None]
        chosen[method] = None
        if finished:
            best, best_cell = max(finished, key=lambda pair: pair[0]["value"])
            chosen[method], best["chosen"] = best["settings"], True
            best_arm = _arm_of(best_cell)
            for line, cell in finished:
                if line is not best:
                    line["behind"] = _behind(best_arm, _arm_of(cell), config.sweep.rule)
    words = config.sweep
    edges = [method for method, settings in chosen.items() if settings and _is_at_edge(method, settings, grid)]
    open_runs = [line for line in runs if line["behind"] and line["behind"]["low"] <= 0 <= line["behind"]["high"]]
    undecided = list(dict.fromkeys(line["method"] for line in open_runs))
    how = {"rule": words.rule, "split": words.split, "seed": words.seed}
    return {**how, "runs": runs, "chosen": chosen, "at_edge": edges, "undecided": undecided}


def _arm_of(cell: Cell) -> Arm:
    """A run of the sweep as an arm of its own."""
    return Arm(cell.name, cell.method, cell.settings, [read_run(cell.config.output_dir)])


def _behind(best: Arm, other: Arm, rule: str) -> dict[str, float] | None:
    """What the rule gives the best run of a sweep more than another one, with a 95% interval over the prompts of both;
    None where the truth is known, or where they share fewer than two prompts."""
    from pairtune.maths.statistics import bootstrap_difference

    arms = [best, other]
    if is_exact(arms) or len(prompts := shared_prompts(arms)) < 2:
        return None
    values = []
    for arm in arms:
        found = evaluated(arm, prompts)
        drift = arm.runs[0].config["beta"] * found.at("kl", -1)[0] if rule == "objective" else 0.0
        values.append(found.at("reward", -1)[0] - drift)
    return bootstrap_difference(*values)._asdict()


def _is_at_edge(method: str, settings: dict[str, Any], grid: Grid) -> bool:
    """Only numbers have an edge: null, lists, words and booleans lie in no order."""
    for key, value in settings.items():
        tried = [cell.settings[key] for cell in grid.sweep if cell.method == method]
        if any(isinstance(each, bool) or not isinstance(each, int | float) for each in tried):
            continue
        if min(tried) < max(tried) and value in (min(tried), max(tried)):
            return True
    return False


def _end_of(path: Path) -> tuple[float | None, float | None]:
    """Reward and KL at the last evaluation; the true ones where they are known. None for what was not measured."""
    run = read_run(path)
    if run.exact:
        return run.exact[-1]["reward"], run.exact[-1]["kl"]
    last = run.evaluations[-1]
    return last["reward"]["mean"], last["kl"]["mean"]


def _sweep_lines(swept: dict[str, Any] | None) -> list[str]:
    if swept is None:
        return []
    return [
        f"{method}: " + (", ".join(f"{key} {shown(value)}" for key, value in settings.items()) + " by the sweep")
        if settings
        else f"{method}: no run of the sweep {_lacking(swept, method)}"
        for method, settings in swept["chosen"].items()
    ]


def _lacking(swept: dict[str, Any], method: str) -> str:
    """What no run of a method's sweep did, where nothing was chosen for it."""
    done = any(line["status"] == "done" for line in swept["runs"] if line["method"] == method)
    return "measured what the rule goes by" if done else "finished"


def _with_chosen(grid: Grid, swept: dict[str, Any] | None) -> list[Cell]:
    """The cells with what the sweep chose for their methods; those of a method without a choice are left out."""
    if swept is None:
        return grid.cells
    cells = []
    for cell in grid.cells:
        chosen = swept["chosen"].get(cell.method, {})
        if chosen is not None:
            new = {key: value for key, value in chosen.items() if key not in cell.settings}
            config = TrainConfig(**{**flat_values(cell.config), **new})
            cells.append(replace(cell, config=config))
    return cells


def _fail_unchosen(grid: Grid, swept: dict[str, Any] | None) -> None:
    for cell in grid.cells if swept is not None else []:
        assert swept is not None
        if swept["chosen"].get(cell.method, {}) is None:
            path = Path(cell.config.output_dir)
            path.mkdir(parents=True, exist_ok=True)
            record = {"name": cell.name, "method": cell.method, "seed": cell.seed, "settings": cell.settings}
            lacking = _lacking(swept, cell.method)
            error = f"no run of the sweep of {cell.method} {lacking}, so nothing was chosen for it"
            _write_cell(path, {**record, "status": "failed", "error": error, "steps": 0, "budget": None})


# -------------------------------------------------------------------------------------------------------------- tables


def _show_tables(path: Path, config: CompareConfig, grid: Grid, swept: dict[str, Any] | None, console: Console) -> None:
    """The tables on the console; comparison.json and report.html are made where they are not there."""
    from pairtune.evidence.comparison import show, tables

    content, report = read_json(path / COMPARISON), path / folder.REPORT
    if content is None:
        content = tables(config, grid, swept)
        report.unlink(missing_ok=True)
        write_atomic(path / COMPARISON, as_json(content))
    show(content, console)
    if not report.exists():
        from pairtune.evidence.report import write_report

        write_report(path)
    console.print(Text(f"report: {report}"), soft_wrap=True)
