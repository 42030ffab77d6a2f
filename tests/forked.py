"""Functions in processes of their own, without the seconds that importing torch and transformers takes each time.

One helper process imports everything once and forks at request. The child of a fork runs `module:function(**arguments)`
and writes what it prints to a log; whoever asked gets its pid at once (to kill it, say) and its exit code in the end.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

TIME_LIMIT = 300
"""Seconds, for a busy machine; processes that wait for each other in vain must not hold the tests up for ever."""


class Call(NamedTuple):
    function: str
    """`module:function`; the module lies in tests/."""
    arguments: dict[str, Any]
    log: str
    """A file for stdout and stderr."""


class Forked:
    """The helper process, seen from a test."""

    def __init__(self) -> None:
        import pairtune

        source = Path(pairtune.__file__).parents[1]  # the same package as here, be it a mutated copy
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *calls: Call) -> list[int]:
        """Forks one process a call; returns their pids. `wait` must come before the next start."""
        assert self._process.stdin is not None
        print(json.dumps(calls), file=self._process.stdin, flush=True)
        return list(self._answer())

    def wait(self) -> list[int]:
        """The exit codes of the calls, negative where a signal ended one."""
        return list(self._answer())

    def run(self, *calls: Call) -> None:
        """Runs calls side by side; fails with what they printed unless all end well."""
        self.start(*calls)
        codes = self.wait()
        printed = "\n".join(Path(call.log).read_text() for call in calls)
        assert codes == [0] * len(calls), printed

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the helper process died"
        return json.loads(line)


def serve() -> None:
    import conftest  # noqa: F401 - one thread, offline
    import transformers.models.gpt2.modeling_gpt2
    import transformers.models.llama.modeling_llama  # noqa: F401

    import pairtune.stages.rl  # noqa: F401

    for line in sys.stdin:
        calls = [Call(*call) for call in json.loads(line)]
        for call in calls:
            importlib.import_module(call.function.partition(":")[0])
        pids = [_fork(call) for call in calls]
        print(json.dumps(pids), flush=True)
        # As they end: one that fails leaves the others waiting for it in vain.
        codes: dict[int, int] = {}
        while len(codes) < len(pids):
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0:
                for other in set(pids) - set(codes):
                    os.kill(other, signal.SIGKILL)
        print(json.dumps([codes[pid] for pid in pids]), flush=True)


def _fork(call: Call) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    signal.alarm(TIME_LIMIT)
    try:
        null, log = os.open(os.devnull, os.O_RDONLY), os.open(call.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        module, _, function = call.function.partition(":")
        getattr(importlib.import_module(module), function)(**call.arguments)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
