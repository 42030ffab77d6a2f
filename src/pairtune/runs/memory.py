"""A GPU without room ends a run with one sentence, and with what was computed before it kept."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from pairtune.errors import PairtuneError
from pairtune.runs import checkpoint, distributed

LESS_LOADED = "train less of the model (trainable_layers, lora_r), or choose a smaller one"
"""What helps where the weights alone do not fit."""


@contextlib.contextmanager
def out_of_memory(doing: str, mend: str) -> Iterator[None]:
    """Turns a full GPU into a PairtuneError: what was being done ("sampling"), and what to lower. Also a decorator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PairtuneError(f"{_what_happened(error, doing)}; {mend}.") from error


def keep(
    work: Callable[[], None],
    *,
    doing: Callable[[], tuple[str, str]],
    run_dir: Path,
    save: Callable[[], None],
    can_save: Callable[[], bool],
    of_main: bool = False,
) -> None:
    """Does a part of a run. Where the GPU has no room for it, what was computed before it is saved, if it can be, and
    a PairtuneError says what was being done (`doing`: that, and its mend) and where --resume goes on.

    `can_save` says whether all is as it was before `work`, and not yet in a checkpoint. Work `of_main` is done by the
    main process while the others wait here, so that they all learn of its end and save together. In other work a
    process cannot reach the others, which wait for it in the midst of theirs: it saves only where it is alone.
    """
    failure: tuple[str, str] | None = None
    try:
        work()
    except torch.OutOfMemoryError as error:
        label, mend = doing()
        failure = (_what_happened(error, label), mend)
        traceback.clear_frames(error.__traceback__)  # they hold activations, and saving may need the room
    if of_main:
        failure = distributed.gather_objects(failure)[0]
    if failure is None:
        return
    if can_save() and (of_main or distributed.world_size() == 1):
        torch.cuda.empty_cache()
        with contextlib.suppress(torch.OutOfMemoryError):
            save()
    newest = checkpoint.latest(run_dir)
    where = (
        "no checkpoint is there yet, so start the run again"
        if newest is None
        else f"{newest.name} is kept, and --resume goes on from it"
    )
    raise PairtuneError(f"{failure[0]}; {failure[1]}; {where}.")


def _what_happened(error: torch.OutOfMemoryError, doing: str) -> str:
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return f"the GPU ran out of memory while {doing}{f' (for {wanted[1]} more)' if wanted else ''}"
