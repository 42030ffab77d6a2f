"""What surrounds the steps of a run, whatever is learned in them: evaluations and checkpoints in their time, an end
that can be resumed, and what is kept where the GPU has no room."""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import torch

from pairtune.config import VERB_OF, RunWords, SupervisedWords
from pairtune.errors import PairtuneError
from pairtune.runs import checkpoint, distributed, folder
from pairtune.runs.display import Display
from pairtune.runs.memory import freed_memory_kept, what_happened
from pairtune.runs.metrics import RunLog, Timer
from pairtune.runs.signals import stop_on_signals


class Standing(Protocol):
    """Where a run stands: what the loop reads and writes of it."""

    step: int
    """Steps made."""
    seconds: float
    """Training time so far, over all resumes."""
    evaluated_step: int
    """The last step whose model was evaluated on the held-out data."""


class Loop:
    """Log, clock and steps of one run. `log` is None but on the main process.

    Writes the environment into the run folder, which must be there; `stack` closes what is opened here.
    """

    def __init__(
        self,
        config: RunWords | SupervisedWords,
        run_dir: Path,
        progress: Standing,
        display: Display,
        stack: contextlib.ExitStack,
        *,
        num_steps: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.config, self.run_dir, self.progress, self.display = config, run_dir, progress, display
        self.num_steps, self.device = num_steps, device
        self.timer = Timer(device)
        if device.type == "cpu":
            stack.enter_context(freed_memory_kept())
        self.log: RunLog | None = None
        if distributed.is_main():
            folder.write_environment(run_dir, compute_dtype=str(dtype), device=str(device))
            resume_step = progress.step if config.resume and progress.step else None
            log = RunLog(run_dir, resume_step=resume_step, report_to=config.report_to, config_dict=config.model_dump())
            self.log = stack.enter_context(log)
        self.stop = stack.enter_context(stop_on_signals())
        self._started = time.perf_counter() - progress.seconds
        display.begin(progress.step, progress.seconds)
        self._step_started = self._last_step_time = 0.0
        self._saved_step = progress.step
        self._under_way = ("update", "updating")

    @contextlib.contextmanager
    def phase(self, name: str, label: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """A part of a run: timed as `name`, shown as `label`, named by it where the GPU is full."""
        self._under_way = (name, label)
        with self.timer(name), self.display.phase(label, total) as advance:
            yield advance

    def step_time(self) -> float:
        """Seconds that the step under way has taken; the next is taken to last as long."""
        self._last_step_time = time.perf_counter() - self._step_started
        return self._last_step_time

    def run(
        self,
        step: Callable[[], None],
        *,
        measure: Callable[[], None],
        write: Callable[[], None],
        mend: Callable[[str], str],
        untouched: Callable[[], bool],
        remember: Callable[[], Callable[[], None]] = lambda: lambda: None,
        limit: Callable[[], str | None] = lambda: None,
    ) -> bool:
        """Steps until `num_steps`, `max_minutes` or a signal end them; whether the run is finished (no signal).

        step: makes one, logs it and counts it in `progress`.
        measure: the held-out evaluation, into the log; called on every process.
        write: a checkpoint, on every process.
        mend: what helps where the GPU has no room, by the name of the phase.
        untouched: whether the step under way has left weights and optimizer as they were.
        remember: called before a step; the result takes back what else it changed, for as long as it is `untouched`.
        limit: why no further step may be made, though `num_steps` are not; None while one may.
        """
        progress, config, message = self.progress, self.config, self.display.message

        def save() -> None:
            progress.seconds = time.perf_counter() - self._started
            write()
            distributed.barrier()
            self._saved_step = progress.step

        def is_unsaved() -> bool:
            return progress.step > self._saved_step

        def is_spent() -> bool:
            return progress.step >= self.num_steps or limit() is not None

        def is_due(every: int) -> bool:
            return not is_spent() and every > 0 and progress.step % every == 0

        def evaluate() -> None:
            def measured() -> None:
                measure()
                progress.evaluated_step = progress.step

            self._keep(measured, mend=mend, save=save, can_save=is_unsaved, of_main=True)

        def step_and_after() -> None:
            self._step_started = time.perf_counter()
            step()
            # In this order: a checkpoint vouches for every line before it.
            if is_due(config.eval_steps):
                evaluate()
            if is_due(config.save_steps):
                save()

        if progress.step == 0:
            evaluate()
        elif progress.evaluated_step < progress.step and is_due(config.eval_steps):
            evaluate()  # the one that the GPU had no room for
            save()

        while not self._should_stop() and not is_spent():
            take_back = remember()

            def save_as_before(take_back: Callable[[], None] = take_back) -> None:
                take_back()
                save()

            self._keep(step_and_after, mend=mend, save=save_as_before, can_save=lambda: is_unsaved() and untouched())

        if self.stop.agreed:
            save()
            message(
                f"stopped after step {progress.step} of {self.num_steps}; go on with: "
                f"pairtune {VERB_OF.get(type(config), 'train')} --resume --output_dir {self.run_dir}"
            )
            return False
        if progress.step < self.num_steps:
            reached = limit() or f"the next would pass max_minutes {config.max_minutes:g}"
            message(f"stopping after step {progress.step}: {reached}")
        if progress.evaluated_step < progress.step:
            evaluate()
            save()
        elif is_unsaved():
            save()
        return True

    def _should_stop(self) -> bool:
        end = time.perf_counter() - self._started + self._last_step_time
        late = self.config.max_minutes is not None and end > 60 * self.config.max_minutes
        return self.stop.now(late=late, device=self.device)

    def _keep(
        self,
        work: Callable[[], None],
        *,
        mend: Callable[[str], str],
        save: Callable[[], None],
        can_save: Callable[[], bool],
        of_main: bool = False,
    ) -> None:
        """Does a part of a run. Where the GPU has no room for it, what was computed before it is saved, if it can be,
        and a PairtuneError says what was being done, what helps and where --resume goes on.

        `can_save` says whether all is as it was before `work`, and not yet in a checkpoint. Work `of_main` is done by
        the main process while the others wait here, so that they all learn of its end and save together. In other work
        a process cannot reach the others, which wait for it in the midst of theirs: it saves only where it is alone.
        """
        failure: str | None = None
        try:
            work()
        except torch.OutOfMemoryError as error:
            name, label = self._under_way
            failure = f"{what_happened(error, label)}; {mend(name)}"
            traceback.clear_frames(error.__traceback__)  # they hold activations, and saving may need the room
        if of_main:
            failure = distributed.gather_objects(failure)[0]
        if failure is None:
            return
        if can_save() and (of_main or distributed.world_size() == 1):
            torch.cuda.empty_cache()
            with contextlib.suppress(torch.OutOfMemoryError):
                save()
        newest = checkpoint.latest(self.run_dir)
        where = (
            "no checkpoint is there yet, so start the run again"
            if newest is None
            else f"{newest.name} is kept, and --resume goes on from it"
        )
        raise PairtuneError(f"{failure}; {where}.")
