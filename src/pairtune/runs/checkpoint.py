"""Checkpoints: whole or not there, as safetensors and JSON, never pickle.

checkpoints/step-N/model.safetensors, config.json, ...   what `save_model` writes; `from_pretrained` reads it
checkpoints/step-N/trainer.safetensors                   optimizer and random states, float32 masters
checkpoints/step-N/trainer.json                          step, counters, and the size of every file
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pairtune.errors import PairtuneError
from pairtune.runs.folder import CHECKPOINTS, LOGS, fsync_folder, tidy

TENSORS = "trainer.safetensors"
STATE = "trainer.json"


def save(
    run_dir: str | Path,
    step: int,
    *,
    save_model: Callable[[Path], None],
    tensors: dict[str, Tensor],
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Writes checkpoints/step-N and removes all but the newest `keep_last`; returns its path.

    Everything is written beside its final place, made durable and renamed, so a kill at any moment leaves the former
    checkpoint or the new one. A checkpoint of the same step is replaced. The log files are made durable first: a
    checkpoint never outlives the lines that lead to it. Log and evaluate step N before saving it, for a resumed run
    goes on at N + 1.

    Tensors may be on any device, share memory or be strided; only those that must be are copied. `state` is JSON.
    The caller holds the lock of the run folder.

    Raises PairtuneError if the disk is full; the former checkpoint stays. What `save_model` raises passes through.
    """
    if keep_last < 1:
        raise PairtuneError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
    run_dir = Path(run_dir)
    folder = run_dir / CHECKPOINTS
    target, temporary, old = folder / f"step-{step}", folder / f".tmp-step-{step}", folder / f".old-step-{step}"
    try:
        tidy(run_dir)
        temporary.mkdir(parents=True)
        save_model(temporary)
        save_file(_separate(tensors), temporary / TENSORS)
        sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in _files(temporary)}
        (temporary / STATE).write_text(json.dumps({"step": step, "files": sizes, "state": state}), "utf-8")
        _fsync([*_files(temporary), *(run_dir / name for name in LOGS if (run_dir / name).exists())])
        for subfolder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            fsync_folder(subfolder)
        if target.exists():
            os.replace(target, old)  # a folder cannot be renamed onto another; `tidy` undoes this if we die here
        os.replace(temporary, target)
        fsync_folder(folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not target.exists():
            os.replace(old, target)
        if is_disk_full(error):
            raise _disk_full(folder, step) from error
        raise
    for stale in [old, *(path for path in all_checkpoints(run_dir)[:-keep_last] if path != target)]:
        _remove(stale)
    return target


def all_checkpoints(run_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = {}
    for path in (Path(run_dir) / CHECKPOINTS).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and (path / STATE).is_file():
            found[int(match[1])] = path
    return [found[step] for step in sorted(found)]


def latest(run_dir: str | Path) -> Path | None:
    """The newest complete checkpoint, None if there is none. Reads only: another process may be training."""
    checkpoints = all_checkpoints(run_dir)
    return checkpoints[-1] if checkpoints else None


def load(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads back the tensors (on the CPU) and the state of `save`.

    Raises PairtuneError naming what is damaged: every file of the checkpoint must have the size it was written with.
    """
    path = Path(path)
    if not path.is_dir():
        raise PairtuneError(f"there is no checkpoint {path}; a run keeps its own in the folder checkpoints")
    try:
        document = json.loads((path / STATE).read_text("utf-8"))
        state, sizes = dict(document["state"]), dict(document["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, STATE) from error
    for name, size in sizes.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            raise _damaged(path, name)
    try:
        return load_file(path / TENSORS), state
    except (OSError, SafetensorError) as error:
        raise _damaged(path, TENSORS) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an exception says so; the writer of safetensors tells it only in words."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, SafetensorError) and ("os error 28" in str(error) or "os error 122" in str(error))


def _damaged(path: Path, name: str) -> PairtuneError:
    others = [other.name for other in all_checkpoints(path.parent.parent) if other != path]
    mend = f"remove that folder and --resume goes on from {others[-1]}" if others else "start the run again"
    return PairtuneError(f"checkpoint {path} is damaged ({name} is missing, cut short or unreadable); {mend}")


def _disk_full(folder: Path, step: int) -> PairtuneError:
    kept = latest(folder.parent)
    what = (
        f"{kept.name} is kept, and --resume goes on from it" if kept else "no checkpoint is there yet; then start again"
    )
    return PairtuneError(f"the disk is full: checkpoint step-{step} did not fit into {folder}; make room: {what}")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors wants them: contiguous, and no two over the same memory."""
    ready = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    end: dict[torch.device, int] = {}
    for name, tensor in sorted(ready.items(), key=lambda item: item[1].data_ptr()):
        start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()
        if start < stop and start < end.get(tensor.device, 0):
            ready[name] = tensor.clone()
        else:
            end[tensor.device] = stop
    return ready


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fsync(paths: list[Path]) -> None:
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _remove(checkpoint: Path) -> None:
    """Renames before it removes, so that a kill in the middle leaves no folder that looks like a checkpoint."""
    if checkpoint.exists():
        doomed = checkpoint.with_name(f".tmp-{checkpoint.name.removeprefix('.old-')}")
        with contextlib.suppress(OSError):  # a checkpoint too many is no reason to stop a run
            os.replace(checkpoint, doomed)
            shutil.rmtree(doomed)
