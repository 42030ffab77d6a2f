"""Log lines of a run, in files that survive `kill -9`, and the trackers that a user names beside them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from pairtune.errors import PairtuneError
from pairtune.runs.folder import EVALUATIONS, LOGS, METRICS, SAMPLES, TENSORBOARD, flatten, write_atomic

FIRST_KEYS = ("step", "reward", "reward_std", "kl", "kl_per_token", "entropy", "completions/mean_length")
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


class RunLog:
    """Appends to metrics.jsonl, evaluations.jsonl and samples.jsonl, and tells the trackers. Main process only.

    `resume_step` N keeps the lines up to step N, exactly as they are, and cuts what came later or was torn by a kill;
    None begins at the beginning and empties the files. `report_to` names trackers out of tensorboard, wandb, trackio.

    Raises PairtuneError if a tracker is not installed or does not start, if a file is damaged, or if the disk is full.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        resume_step: int | None = None,
        report_to: Sequence[str] = (),
        config_dict: dict[str, Any] | None = None,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._warned: set[str] = set()
        check_trackers(report_to)
        for name in LOGS:
            cut(self._run_dir / name, -1 if resume_step is None else resume_step)
        self._files: dict[str, IO[bytes]] = {name: open(self._run_dir / name, "ab") for name in LOGS}  # noqa: SIM115
        self._trackers = [
            (name, _start_tracker(name, self._run_dir, resume_step, config_dict or {}))
            for name in dict.fromkeys(report_to)
        ]

    def log_step(self, step: int, metrics: dict[str, Any]) -> None:
        """One line of metrics.jsonl. Values are numbers or tensors of one element; NaN and infinity become null."""
        line = in_order(self._numbers({"step": step, **metrics}))
        self._append(METRICS, [line])
        self._track({name: value for name, value in line.items() if name != "step" and value is not None}, step)

    def log_evaluation(self, evaluation: dict[str, Any]) -> None:
        """One line of evaluations.jsonl: `step`, `num_prompts` and `{"mean", "low", "high"}` per quantity."""
        line = self._numbers(evaluation)
        self._append(EVALUATIONS, [line])
        scalars = {
            f"eval/{name.removesuffix('.mean')}": value for name, value in flatten(line).items() if name != "step"
        }
        self._track({name: value for name, value in scalars.items() if isinstance(value, int | float)}, line["step"])

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Lines of samples.jsonl; each has a `step`."""
        self._append(SAMPLES, [self._numbers(sample) for sample in samples])

    def close(self) -> None:
        """Closes the files and finishes the trackers."""
        for file in self._files.values():
            file.close()
        for name, tracker in self._trackers:
            with _tracker_trouble(name):
                tracker.finish()
        self._trackers = []

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _append(self, name: str, lines: list[dict[str, Any]]) -> None:
        try:
            for line in lines:
                text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
                # backslashreplace: a lone surrogate in a text becomes its JSON escape
                self._files[name].write(text.encode("utf-8", "backslashreplace"))
            self._files[name].flush()
        except OSError as error:
            raise PairtuneError(
                f"{self._run_dir / name} could not be written ({error.strerror}); make room and go on with --resume"
            ) from error

    def _track(self, values: dict[str, Any], step: int) -> None:
        for entry in list(self._trackers):
            name, tracker = entry
            with _tracker_trouble(name) as trouble:
                tracker.log(values, step=step)
            if trouble:
                self._trackers.remove(entry)

    def _numbers(self, value: Any, name: str = "") -> Any:
        """Python values for JSON: tensors unpacked, NaN and infinity to None with one warning a name."""
        if isinstance(value, dict):
            return {key: self._numbers(item, f"{name}.{key}" if name else str(key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._numbers(item, name) for item in value]
        if hasattr(value, "item"):
            value = value.item()
        if isinstance(value, float) and not math.isfinite(value):
            # An interval over one prompt has NaN ends by its meaning; nothing went wrong.
            if name not in self._warned and not name.endswith((".low", ".high")):
                self._warned.add(name)
                warnings.warn(f"{name} is {value}; it is logged as null (said once)", stacklevel=4)
            return None
        return value


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log file, [] if there is none. A last line torn by a kill is left out.

    Raises PairtuneError naming file and line if another line is damaged.
    """
    return [line for _, line in _lines(Path(path))]


def without_times(line: dict[str, Any]) -> dict[str, Any]:
    """The part of a metrics line that an equal run repeats bit by bit."""
    return {name: value for name, value in line.items() if not _is_time(name)}


def in_order(line: dict[str, Any]) -> dict[str, Any]:
    """The keys of a metrics line in their fixed order: what one looks for first, the others by name, times last."""
    first = [name for name in FIRST_KEYS if name in line]
    others = sorted((name for name in line if name not in FIRST_KEYS), key=lambda name: (_is_time(name), name))
    return {name: line[name] for name in [*first, *others]}


def cut(path: Path, last_step: int) -> None:
    """Keeps the lines with `step` <= `last_step` byte by byte; cuts later ones and a torn one."""
    if not path.exists():
        return
    kept = b"".join(raw + b"\n" for raw, line in _lines(path) if line["step"] <= last_step)
    if kept != path.read_bytes():
        write_atomic(path, kept)


def check_trackers(report_to: Sequence[str]) -> None:
    """Raises PairtuneError naming the package if a tracker is unknown or not installed; loads nothing."""
    for name in report_to:
        if name not in PACKAGES:
            raise PairtuneError(f"report_to names {name!r}; choose among {', '.join(PACKAGES)}")
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise PairtuneError(
                f"report_to: {name} needs the package {PACKAGES[name]}; `pip install {PACKAGES[name]}` or leave it out"
            )


class Timer:
    """Seconds by phase: `with timer("sample"): ...`. A phase inside another counts for itself alone, so phases add up.

    On a GPU the queue is drained at both ends of a phase, else its work would be counted where somebody waits for it.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device if device is not None and device.type == "cuda" else None
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inner: list[float] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = self._now()
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = self._now() - start
            self._seconds[phase] += spent - self._inner.pop()
            if self._inner:
                self._inner[-1] += spent

    def take(self) -> dict[str, float]:
        """`time/<phase>` in seconds since the last call, and back to zero."""
        seconds = {f"time/{phase}": spent for phase, spent in self._seconds.items()}
        self._seconds.clear()
        return seconds

    def _now(self) -> float:
        if self._device is not None:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _is_time(name: str) -> bool:
    return name.startswith("time/") or name in ("step_time", "time_left") or name.endswith("_per_second")


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Raw and parsed lines; split at newlines only, since texts may hold other line ends."""
    if not path.exists():
        return
    try:
        raw_lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise PairtuneError(f"{path} cannot be read ({error.strerror})") from error
    while raw_lines and not raw_lines[-1].strip():
        raw_lines.pop()
    for number, raw in enumerate(raw_lines, 1):
        try:
            line = json.loads(raw)
            if not isinstance(line["step"], int):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            if number == len(raw_lines):
                return  # torn by a kill in the middle of a write
            raise PairtuneError(f"line {number} of {path} is damaged; remove that line") from error
        yield raw, line


def _start_tracker(name: str, run_dir: Path, resume_step: int | None, config: dict[str, Any]) -> Any:
    """A tracker of accelerate on its own; an Accelerator would set up devices and processes that the run owns."""
    tracking = importlib.import_module("accelerate.tracking")
    try:
        if name == "tensorboard":
            # purge_step hides the points that a killed run logged after the checkpoint it resumes from
            purge = None if resume_step is None else resume_step + 1
            tracker = tracking.TensorBoardTracker(TENSORBOARD, logging_dir=run_dir, purge_step=purge)
        elif name == "wandb":
            tracker = tracking.WandBTracker("pairtune", name=run_dir.resolve().name, dir=str(run_dir))
        else:
            tracker = tracking.TrackioTracker("pairtune", name=run_dir.resolve().name)
        tracker.start()
        scalars = {key: v if isinstance(v, int | float | str) else json.dumps(v) for key, v in flatten(config).items()}
        tracker.store_init_configuration(scalars)
    except Exception as error:
        raise PairtuneError(
            f"report_to: {name} did not start ({_first_line(error)}); mend it or leave it out"
        ) from error
    return tracker


@contextlib.contextmanager
def _tracker_trouble(name: str) -> Iterator[list[Exception]]:
    """Whatever a tracker throws while the run goes on: a run is worth more than its tracker."""
    trouble: list[Exception] = []
    try:
        yield trouble
    except Exception as error:
        trouble.append(error)
        warnings.warn(f"{name} failed ({_first_line(error)}); the run goes on without it", stacklevel=4)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
