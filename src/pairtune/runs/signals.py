"""How a run ends early: SIGTERM and Ctrl-C ask it to, and it stops where it can be resumed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from pairtune.runs import distributed


class StopRequest:
    """Set by SIGTERM or Ctrl-C; honoured between two steps."""

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        """True once all processes know that one of them was asked."""

    def now(self, *, late: bool, device: torch.device) -> bool:
        """Whether a run ends before its next step: one of its processes was asked to, or is `late`.

        Every process must come to the same answer: one that leaves would leave the others waiting.
        """
        answers = torch.tensor([int(late), int(self.requested)], device=device)
        num_late, num_requested = distributed.sum_across(answers).tolist()
        self.agreed = num_requested > 0
        return self.agreed or num_late > 0


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Finish the step, save, say how to go on. A second Ctrl-C stops at once."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signal handlers belong to the main thread: in another one the caller decides
        return

    def request(number: int, _: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True
        # No print: a signal may come in the middle of one, and Python's streams are not reentrant.
        os.write(2, b"\nstopping: this step is finished and saved first (Ctrl-C again to stop at once)\n")

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
