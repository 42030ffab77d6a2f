"""Memory: what is freed on a CPU is kept for the next step; a GPU without room ends what is done with one sentence."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator

import torch

from pairtune.errors import PairtuneError

LESS_LOADED = "train less of the model (trainable_layers, lora_r), or choose a smaller one"
"""What helps where the weights alone do not fit."""


# The parameters of glibc's mallopt (malloc.h), what a training run sets them to, and what it leaves: glibc raises both
# to these by itself where large blocks are freed, but no longer once they have been set.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 2**30}
_AFTERWARDS = {_TRIM_THRESHOLD: 2**26, _MMAP_THRESHOLD: 2**25}
_ITS_WORDS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, large tensors on the CPU are freed to the process, not to the system; at its end, all is.

    A step makes and frees tensors of the same sizes again and again. By default each comes from the system as pages
    that are cleared when they are first touched, a part of the time of a step (benchmarks/cpu_passes.py). What a user
    has set for the C library wins; one that is not glibc, or another allocator in its place, is left alone.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" and not os.environ.keys() & set(_ITS_WORDS) else None
    if library is None or not hasattr(library, "mallopt"):
        yield
        return
    try:
        for option, value in _KEPT.items():
            library.mallopt(option, value)
        yield
    finally:
        for option, value in _AFTERWARDS.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


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
