"""A GPU without room ends what is done with one sentence."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch

from pairtune.errors import PairtuneError

LESS_LOADED = "train less of the model (trainable_layers, lora_r), or choose a smaller one"
"""What helps where the weights alone do not fit."""


@contextlib.contextmanager
def out_of_memory(doing: str, mend: str) -> Iterator[None]:
    """Turns a full GPU into a PairtuneError: what was being done ("sampling"), and what to lower. Also a decorator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PairtuneError(f"{what_happened(error, doing)}; {mend}.") from error


def what_happened(error: torch.OutOfMemoryError, doing: str) -> str:
    """The beginning of the sentence; what helps is to follow."""
    wanted = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
    return f"the GPU ran out of memory while {doing}{f' (for {wanted[1]} more)' if wanted else ''}"
