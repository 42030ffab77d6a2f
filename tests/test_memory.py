"""What a training run does about the memory that it frees, seen from within and in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="the C library is not glibc",
)

BEGINNING = """
import resource
import torch
from pairtune.runs.memory import freed_memory_kept

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults(times=4, size=10_000_000):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.empty(size).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""

PROGRAM = """
start = resident()
before = faults()
with freed_memory_kept():
    for _ in range(3):
        faults()
    within, kept = faults(), resident() - start
rest = resident() - start
print(before, within, kept, rest, faults())
"""


def measured(program: str = PROGRAM, **environment: str) -> tuple[int, ...]:
    # Without huge pages, so that a page fault stands for 4 KiB on every machine.
    words = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0", **environment}
    command = [sys.executable, "-c", BEGINNING + program]
    answer = subprocess.run(command, check=True, capture_output=True, text=True, env=words)
    return tuple(map(int, answer.stdout.split()))


@glibc
def test_freed_memory_is_kept_within_and_given_back_after() -> None:
    before, within, kept, rest, after = measured()
    assert before > 30_000
    assert within < before / 100
    assert kept > 30e6
    assert rest < 10e6
    assert after > before / 4  # the system is asked for pages again


@glibc
def test_what_a_user_has_set_for_the_c_library_wins() -> None:
    before, within, *_ = measured(MALLOC_MMAP_THRESHOLD_="65536")
    assert within > before / 2 > 500


@glibc
def test_what_follows_a_run_gets_no_new_pages_for_each_small_tensor() -> None:
    program = "with freed_memory_kept(): pass\nprint(faults(40, 500_000))"
    assert measured(program)[0] < 6_000  # of 20,000 that the 40 of them have
