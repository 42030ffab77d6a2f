"""The run folder: what it holds, who may write it, and how a file gets there whole.

config.yaml         the resolved configuration
environment.json    versions, hardware and command
metrics.jsonl       one line a step
evaluations.jsonl   one line an evaluation; step 0 is the starting policy
samples.jsonl       prompts and completions
checkpoints/step-N/ weights (`from_pretrained` reads them) and the state of the trainer
report.html         made by `pairtune report`
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch
import yaml

from pairtune.errors import PairtuneError

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
REPORT = "report.html"
REWARD_REPORT = "reward_report.json"
CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
LOGS = (METRICS, EVALUATIONS, SAMPLES)
FILES = (CONFIG, ENVIRONMENT, *LOGS, REPORT, REWARD_REPORT)

LOCK = ".pairtune-lock"
"""Held while a process writes the folder. It is the first file there, so it also marks the folder as pairtune's."""

SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one written in C where there is one: a comparison reads hundreds of configurations."""

MAY_DIFFER_ON_RESUME = frozenset(
    {
        # where a run ends, what it keeps and whom it tells
        *(
            "max_steps",
            "max_minutes",
            "max_generated_tokens",
            "save_steps",
            "keep_last",
            "eval_steps",
            "report_to",
            "num_completions_to_log",
        ),
        *("num_epochs", "num_eval_examples", "output_dir", "resume", "overwrite"),
        # the same mathematics, cut another way: who ran out of memory may go on with a smaller cut
        *("micro_batch_size", "reward_batch_size", "gradient_checkpointing", "num_threads", "activation_cache_gb"),
    }
)


def write_atomic(path: str | Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a run that is killed, meets the old content or the new one, never a part.

    Raises PairtuneError if the file cannot be written; the old content then stays.
    """
    path = Path(path)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")  # the same folder: a rename does not cross disks
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise PairtuneError(
            f"{path} could not be written ({error.strerror}); make room or choose a place that can be written"
        ) from error
    fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder outlast a power cut, where the file system can do it."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class RunFolder:
    """A run folder that this process alone writes. Close it, or use it as a context, to let the next one in."""

    def __init__(self, path: Path, lock: IO[str], resumed: bool) -> None:
        self.path = path
        self.resumed = resumed
        """True if an earlier run was found here and its configuration agrees."""
        self._lock = lock

    def close(self) -> None:
        """Releases the lock; the end of the process, however it comes, does so too."""
        self._lock.truncate(0)  # nobody writes any more; a folder that nothing was done in stays as it was
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def create(output_dir: str | Path, config_yaml: str, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """Makes the run folder, or takes an earlier one over, and locks it; the main process alone calls it.

    A folder with content is refused unless `resume` (the configuration must agree in all that changes the result) or
    `overwrite` (removes what pairtune wrote, and nothing else). `resume` with no earlier run begins at the beginning:
    a job that is started again may have been stopped before its first file.

    Raises PairtuneError for every refusal, before anything is changed.
    """
    path = Path(output_dir)
    # Once before the lock file is made, so that a folder of somebody else stays untouched; and once under the lock.
    check(path, config_yaml, overwrite=overwrite, resume=resume)
    lock = _make_and_lock(path)
    try:
        check(path, config_yaml, overwrite=overwrite, resume=resume)
        if overwrite:
            _remove_run(path)
        tidy(path)
        resumed = (path / CONFIG).exists()
        write_atomic(path / CONFIG, config_yaml)
    except BaseException:
        lock.close()
        raise
    return RunFolder(path, lock, resumed)


def hold(path: str | Path, config_yaml: str) -> RunFolder:
    """Makes and locks a folder that holds runs in folders of their own, and writes its configuration where that is
    another one. Raises PairtuneError if it cannot be made or another process holds it."""
    path = Path(path)
    lock = _make_and_lock(path)
    try:
        tidy(path)
        resumed = (path / CONFIG).exists()
        if not resumed or (path / CONFIG).read_text("utf-8") != config_yaml:
            write_atomic(path / CONFIG, config_yaml)
    except BaseException:
        lock.close()
        raise
    return RunFolder(path, lock, resumed)


def _make_and_lock(path: Path) -> IO[str]:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return _lock(path)
    except OSError as error:
        raise PairtuneError(
            f"output_dir {path} could not be made ({error.strerror}); choose another --output_dir"
        ) from error


def _lock(path: Path) -> IO[str]:
    lock = open(path / LOCK, "a+")  # noqa: SIM115 - stays open: closing it is what releases the lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise PairtuneError(
            f"another process{f' (pid {owner})' if owner else ''} is writing {path}; wait for it to end or choose "
            "another --output_dir"
        ) from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def is_run_folder(path: str | Path) -> bool:
    """Whether pairtune wrote this folder. A copy without hidden files still counts."""
    path = Path(path)
    return (path / LOCK).is_file() or ((path / CONFIG).is_file() and (path / ENVIRONMENT).is_file())


def check(output_dir: str | Path, config_yaml: str, *, overwrite: bool = False, resume: bool = False) -> None:
    """Raises PairtuneError where `create` would refuse a run folder as it is; changes nothing."""
    path = Path(output_dir)
    if overwrite and resume:
        raise PairtuneError("resume and overwrite are both set; choose --resume to go on or --overwrite to begin again")
    if not path.exists():
        return
    if not path.is_dir():
        raise PairtuneError(f"output_dir {path} is a file; choose another --output_dir")
    content = {entry.name for entry in path.iterdir()} - {LOCK}
    if not content:
        return
    if not is_run_folder(path):
        raise PairtuneError(f"output_dir {path} holds files but no run of pairtune; choose another --output_dir")
    if not overwrite and not resume:
        raise PairtuneError(
            f"output_dir {path} holds a run; --resume goes on with it, --overwrite replaces it, or choose another "
            "--output_dir"
        )
    if resume and (path / CONFIG).exists():
        _refuse_other_config(path / CONFIG, config_yaml)
    elif resume and (path / CHECKPOINTS).exists():
        raise PairtuneError(f"{path} has checkpoints but no {CONFIG}, so nothing says how to go on; put it back")


def compute_dtype(run_dir: Path, asked: str, *, resume: bool) -> str:
    """The precision to ask for. Measured anew, `auto` could come out otherwise when a run goes on: the first answer
    stands."""
    if resume and asked == "auto":
        with contextlib.suppress(OSError, ValueError, KeyError):
            environment = json.loads((run_dir / ENVIRONMENT).read_text("utf-8"))
            return str(environment["compute_dtype"]).removeprefix("torch.")
    return asked


def _refuse_other_config(stored_path: Path, config_yaml: str) -> None:
    before, now = flatten(read_config(stored_path)), flatten(yaml.safe_load(config_yaml) or {})
    may_differ = set(MAY_DIFFER_ON_RESUME)
    if before.get("lr_scheduler_type") in ("linear", "cosine"):
        may_differ -= {"max_steps", "num_epochs"}  # the schedule is stretched over them
    for name in [*now, *(name for name in before if name not in now)]:
        if name not in may_differ and before.get(name) != now.get(name):
            raise PairtuneError(
                f"{name} was {json.dumps(before.get(name))} in {stored_path} and is {json.dumps(now.get(name))} now; "
                "--resume needs it as it was, or choose another --output_dir"
            )


def read_config(path: Path) -> dict[str, Any]:
    """Reads a stored config.yaml; raises PairtuneError if it is damaged."""
    try:
        config = yaml.load(path.read_text("utf-8"), Loader=SAFE_LOADER)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise PairtuneError(f"{path} cannot be read ({type(error).__name__}); restore it") from error
    if not isinstance(config, dict):
        raise PairtuneError(f"{path} is not a list of names and values; restore it")
    return config


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections to dotted names: `{"p3o": {"clip": "joint"}}` to `{"p3o.clip": "joint"}`."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _remove_run(path: Path) -> None:
    for name in FILES:
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / TENSORBOARD, ignore_errors=True)
    checkpoints = path / CHECKPOINTS
    if checkpoints.is_dir():
        for entry in list(checkpoints.iterdir()):
            if re.fullmatch(r"step-\d+|\.(tmp|old)-step-\d+", entry.name):
                shutil.rmtree(entry)
        with contextlib.suppress(OSError):
            checkpoints.rmdir()  # only if nothing foreign is left in it


def tidy(path: Path) -> None:
    """Removes what a killed run left half done. The caller holds the lock."""
    for name in (CONFIG, ENVIRONMENT, *LOGS):  # not the report, which another process may be writing
        for leftover in path.glob(f".tmp-{name}-*"):
            leftover.unlink()
    for old in (path / CHECKPOINTS).glob(".old-step-*"):
        # Killed while one checkpoint took another's place: the old one is whole and goes back unless the new one came.
        target = old.with_name(old.name.removeprefix(".old-"))
        if target.exists():
            shutil.rmtree(old)
        else:
            os.replace(old, target)
    for leftover in (path / CHECKPOINTS).glob(".tmp-step-*"):
        shutil.rmtree(leftover)


def write_environment(run_dir: str | Path, **extra: Any) -> None:
    """Writes environment.json, once device and thread count are set. A resumed run adds to the list `resumed`."""
    path = Path(run_dir) / ENVIRONMENT
    now = environment() | extra
    with contextlib.suppress(OSError, ValueError, TypeError):
        first = json.loads(path.read_text("utf-8"))
        now = first | {"resumed": [*first.get("resumed", []), now]}
    write_atomic(path, json.dumps(now, indent=2, ensure_ascii=False) + "\n")


def without_nan(value: Any) -> Any:
    """A value for JSON, which has no NaN and no infinity: None stands for both. Named tuples become dicts."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(value: Any) -> str:
    """A file's worth of JSON that any reader takes, see `without_nan`; one space an indent, text as it is."""
    return json.dumps(without_nan(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def environment() -> dict[str, Any]:
    """What a result may depend on: versions, commit, hardware, threads, command. Nothing names a person or a host."""
    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "pairtune": _version("pairtune"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
    }


def _command() -> str | None:
    """The command line of pairtune, home folder shortened. A user's script is only named: its arguments are theirs."""
    program = Path(sys.argv[0])
    if program.name == "pairtune" or program.parts[-2:] in (("pairtune", "__main__.py"), ("pairtune", "cli.py")):
        return shlex.join(["pairtune", *sys.argv[1:]]).replace(str(Path.home()), "~")
    return f"python {program.name}" if program.suffix == ".py" else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of pairtune's own source, `-dirty` if it was changed; None for an installed package."""
    here = Path(__file__).resolve()
    try:
        # A virtual environment may stand inside somebody's repository: only a tracked file speaks for pairtune.
        _git(here, "ls-files", "--error-unmatch", here.name)
        return _git(here, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(file: Path, *arguments: str) -> str:
    command = ["git", "-C", str(file.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
