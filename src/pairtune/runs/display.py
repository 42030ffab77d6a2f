"""What a person sees while pairtune works: a live display on a terminal, plain lines in a pipe, a notebook or CI.

Text of a model is data: it is shown without markup, and control characters never reach the terminal.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pairtune.runs import distributed

Row = tuple[str, float | None, float | None, float | None]
"""Label, value, low and high end of its 95% interval; the ends are None where there is no interval."""

QUANTITIES = {
    "reward": ("reward", "{:.3f}"),
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "accuracy": ("accuracy", "{:.1%}"),
    "kl": ("KL", "{:.2f}"),
    "kl_k1": ("KL by k1", "{:.2f}"),
    "kl_per_token": ("KL/token", "{:.3f}"),
    "length": ("length", "{:.1f}"),
    "truncated": ("unfinished", "{:.0%}"),
    "entropy": ("entropy/token", "{:.2f}"),
    "distinct_2": ("distinct-2", "{:.3f}"),
    "ref_nats_per_token": ("ref. nats/token", "{:.2f}"),
    "strongest_word_share": ("strongest words", "{:.1%}"),
}
"""What an evaluation may hold: name in evaluations.jsonl -> label and format."""

LEGEND = (
    "KL: nats a completion, to the reference; by k1: a second estimate, as a check. ref. nats/token: how unlikely the "
    "reference finds the text. Length in tokens, entropy in nats."
)
"""What the short labels mean, to stand below a table of them."""

FORMATS = dict(QUANTITIES.values())
QUIET_SECONDS = 5.0
"""Nothing that ends sooner is worth a plain line."""
QUIET_SECONDS_AMONG_STEPS = 60.0
"""Once steps print their lines, only long work needs others."""

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x1b[\]PX^_].*?(?:\x07|\x1b\\)"  # OSC and other strings: window titles, links, clipboard
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]",
    re.DOTALL,
)
# C0 and C1 controls without line feed and tab, and overrides of the text's direction.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def clean(text: str) -> str:
    """Text without escape sequences and control characters; line breaks and tabs stay."""
    return _CONTROLS.sub("", _ESCAPES.sub("", text.replace("\r\n", "\n")))


def prompt_text(prompt: Any) -> str:
    """A prompt as a person reads it: plain text, the one user turn, or all turns with their roles."""
    if isinstance(prompt, str):
        return clean(prompt)
    if len(prompt) == 1:
        return clean(str(prompt[0].get("content", "")))
    return "\n".join(clean(f"{turn.get('role', '')}: {turn.get('content', '')}") for turn in prompt)


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """A history in one line of blocks, from its lowest to its highest value; long histories are averaged into bins."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) > width:
        edges = [round(i * len(values) / width) for i in range(width + 1)]
        values = [statistics.fmean(values[a:b]) for a, b in itertools.pairwise(edges)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) * scale)] for value in values)


def counted(number: int, word: str) -> str:
    """`1 seed`, `2 seeds`."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def duration(seconds: float) -> str:
    """`7 s`, `3:07`, `2:03:07`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


@dataclass
class _Work:
    """A piece of work in progress."""

    name: str
    total: float | None
    started: float
    done: float = 0.0
    said: float = 0.0  # when the last plain line was printed, seconds after the start

    def describe(self) -> str:
        count = f" {self.done:g}/{self.total:g}" if self.total else ""
        return f"{self.name}{count}"

    def left(self, now: float) -> str:
        if not self.total or not 0 < self.done < self.total:
            return ""
        return f", about {duration((now - self.started) * (self.total - self.done) / self.done)} left"


_active: Display | None = None  # so that `progress` inside a run becomes a phase of its display


class Display:
    """The display of a training run, as a context. Only the main process shows anything, and none if `quiet`.

    `headline` is the metric whose course is drawn: `reward`, or `loss` where a dataset is learned; `rewards` are its
    values in earlier steps, where a run goes on. Call `begin` when the loop begins.
    """

    def __init__(
        self,
        num_steps: int,
        *,
        max_minutes: float | None = None,
        headline: str = "reward",
        rewards: Sequence[float | None] = (),
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console = console or make_console()
        self._num_steps, self._step, self._max_minutes = num_steps, 0, max_minutes
        self._headline = headline
        self._history = [float(value) for value in rewards if value is not None]
        self._clock = clock
        self._started = clock()
        self._silent = quiet or not distributed.is_main()
        self._live: Live | None = None
        self._work: list[_Work] = []
        self._metrics: dict[str, Any] = {}
        self._held_out: list[dict[str, Any]] = []
        self._step_times: list[float] = []
        self._intervals: list[float] = []
        self._last_step_at: float | None = None

    def __enter__(self) -> Display:
        global _active
        if not self._silent and shows_live(self.console):
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=3)
            self._live.start()
        _active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        global _active
        _active = None
        if self._live is not None:
            self._work.clear()
            self._live.stop()
            self._live = None

    def begin(self, step: int = 0, elapsed: float = 0.0) -> None:
        """The loop begins after `step` steps that took `elapsed` seconds; from here `max_minutes` is counted.

        A log may reach further than the checkpoint that a run goes on from, so later values are forgotten.
        """
        self._step, self._started = step, self._clock() - elapsed
        self._history = self._history[:step]

    @contextlib.contextmanager
    def phase(self, name: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """`with display.phase("sampling", 128) as advance: ... advance(8)`; phases may stand inside phases."""
        work = _Work(name, total, self._clock())
        self._work.append(work)

        def advance(amount: float) -> None:
            work.done += amount
            if self._live is None and not self._silent:
                quiet = QUIET_SECONDS if self._last_step_at is None else QUIET_SECONDS_AMONG_STEPS
                _say_plainly(self.console, work, self._clock(), quiet)

        try:
            yield advance
        finally:
            self._work.remove(work)

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Shows a finished step out of its line for metrics.jsonl."""
        now = self._clock()
        if self._last_step_at is not None:
            self._intervals.append(now - self._last_step_at)
            self._step_times.append(float(metrics.get("step_time") or self._intervals[-1]))
        else:
            self._step_times.append(float(metrics.get("step_time") or now - self._started))
        self._last_step_at, self._step, self._metrics = now, step, dict(metrics)
        if is_number(metrics.get(self._headline)):
            self._history.append(float(metrics[self._headline]))
        if self._live is None and not self._silent:
            words = [f"step {step}/{self._num_steps}", *self._words(), f"{self._step_times[-1]:.1f} s", self._times()]
            self._plain("  ".join(words))

    def evaluation(self, evaluation: dict[str, Any]) -> None:
        """Prints an evaluation as one line, above the live part."""
        self._held_out.append(evaluation)
        parts = [f"held-out, step {evaluation.get('step', '?')}"]
        units = {"kl": " nats", "length": " tokens"}
        for name in ("reward", "kl", "length", "loss", "perplexity", "accuracy"):
            label, value, low, high = _row(name, evaluation.get(name))
            if value is not None:
                shown = f"{'KL' if name == 'kl' else name} {_interval(label, value, low, high)}{units.get(name, '')}"
                parts.append(shown)
        self.message("  ".join(parts), style="bold")

    def message(self, text: str, style: str = "") -> None:
        """Prints a line above the live part."""
        if not self._silent:
            self._plain(text, style)

    def show(self, renderable: RenderableType) -> None:
        """Prints a table or another renderable above the live part."""
        if not self._silent:
            self.console.print(renderable)

    def time_left(self) -> float | None:
        """Seconds to the end; None before the first step.

        Median step time, so that a slow first step does not count, plus what evaluating and saving take on average
        between steps; never more than `max_minutes` leaves.
        """
        if not self._step_times:
            return None
        between = 0.0
        if self._intervals:
            between = max(0.0, statistics.fmean(self._intervals) - statistics.fmean(self._step_times[1:]))
        left = (self._num_steps - self._step) * (statistics.median(self._step_times[-50:]) + between)
        if self._max_minutes is not None:
            left = min(left, 60 * self._max_minutes - (self._clock() - self._started))
        return max(0.0, left)

    def _times(self) -> str:
        left = self.time_left()
        gone = f"{duration(self._clock() - self._started)} elapsed"
        return gone if left is None else f"{gone}, about {duration(left)} left"

    def _words(self) -> list[str]:
        # Where a reward is the headline, the loss is a number without a meaning of its own.
        learned = () if self._headline == "reward" else (("loss", "loss {:.3f}"), ("perplexity", "perplexity {:.2f}"))
        shown = (
            *learned,
            ("accuracy", "accuracy {:.1%}"),
            ("reward", "reward {:.3f}"),
            ("kl", "KL {:.2f} nats"),
            ("completions/mean_length", "length {:.1f}"),
            ("clip_ratio", "clip ratio {:.0%}"),
            ("tokens_per_second", "{:.0f} tokens/s"),
        )
        return [form.format(self._metrics[name]) for name, form in shown if is_number(self._metrics.get(name))]

    def _plain(self, text: str, style: str = "") -> None:
        # A terminal breaks lines between words; in a pipe a line stays a line.
        self.console.print(Text(clean(text), style=style), soft_wrap=self._live is None)

    def _render(self) -> RenderableType:
        """Drawn by a thread of rich three times a second, so it reads only what is replaced in one move."""
        grid = Table.grid(expand=True)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            Text(f"step {self._step}/{self._num_steps}", style="bold"),
            ProgressBar(total=max(self._num_steps, 1), completed=self._step, width=24),
            Text(self._times()),
        )
        grid.add_row(head)
        if words := self._words():
            course = Text(words[0], style="bold green")
            if not self.console.options.ascii_only:
                course.append(f"  {sparkline(self._history)}", style="green")
            if len(self._held_out) > 1:
                values = [_row(self._headline, line.get(self._headline))[1] for line in self._held_out]
                if values[0] is not None and values[-1] is not None:
                    course.append(f"  held-out {values[0]:.3f} to {values[-1]:.3f}", style="bold")
            grid.add_row(course)
            grid.add_row(Text("   ".join(words[1:])))
        work = list(self._work)
        if work:
            phase = Table.grid(padding=(0, 2))
            bar: RenderableType = ""
            if work[-1].total:
                bar = ProgressBar(total=work[-1].total, completed=work[-1].done, width=24)
            name = Text(": ".join(clean(item.describe()) for item in work), style="cyan")
            phase.add_row(name, bar, Text(duration(self._clock() - work[-1].started), style="dim"))
            grid.add_row(phase)
        return Panel(grid, box=box.ROUNDED, border_style="dim", title="pairtune", title_align="left")


@contextlib.contextmanager
def progress(
    description: str,
    total: float | None = None,
    *,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[float], None]]:
    """`with progress("scoring", 500) as advance: ... advance(16)`: for all that may take more than five seconds.

    Inside a run it is a phase of the run's display. Alone it is a bar on a terminal, and elsewhere a plain line now and
    then once five seconds have passed.
    """
    if _active is not None:
        with _active.phase(description, total) as advance:
            yield advance
        return
    if not distributed.is_main():
        yield _nothing
        return
    console = console or make_console()
    work = _Work(description, total, clock())

    def render() -> RenderableType:
        now = clock()
        grid = Table.grid(padding=(0, 2))
        bar: RenderableType = ProgressBar(total=total, completed=work.done, width=24) if total else ""
        grid.add_row(
            Text(clean(work.describe())), bar, Text(f"{duration(now - work.started)}{work.left(now)}", style="dim")
        )
        return grid

    live = shows_live(console)

    def advance_alone(amount: float) -> None:
        work.done += amount
        if not live:
            _say_plainly(console, work, clock(), QUIET_SECONDS)

    if live:
        with Live(get_renderable=render, console=console, refresh_per_second=3, transient=True):
            yield advance_alone
    else:
        yield advance_alone


def _nothing(amount: float) -> None:
    """The advance of a process that shows nothing."""


def _say_plainly(console: Console, work: _Work, now: float, quiet: float) -> None:
    """A line when `quiet` seconds have passed, and then when three times that have passed since the last."""
    passed = now - work.started
    if passed >= (work.said + 3 * quiet if work.said else quiet):
        work.said = passed
        console.print(Text(f"{clean(work.describe())}, {duration(passed)}{work.left(now)}"), soft_wrap=True)


def make_console() -> Console:
    """A console on stdout that cannot fail on a character its encoding lacks."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    if "utf" not in encoding.lower() and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    return Console(highlight=False)


def shows_live(console: Console) -> bool:
    """Whether the console can redraw its lines; a pipe, a notebook and a dumb terminal cannot."""
    return console.is_terminal and not console.is_jupyter and not console.is_dumb_terminal


def evaluation_rows(evaluation: dict[str, Any]) -> list[Row]:
    """The rows of a table from a line of evaluations.jsonl, in a fixed order; what the line lacks is left out."""
    return [_row(name, evaluation[name]) for name in QUANTITIES if evaluation.get(name) is not None]


def evaluation_table(
    before: Sequence[Row], after: Sequence[Row], change: Sequence[Row] = (), title: str = "held-out prompts"
) -> Table:
    """Before against after, each with its 95% interval. `change` gives the rows of the change where an interval of the
    change itself is known (paired by prompt); else the plain difference is shown."""
    # Narrow enough for 80 columns, where most numbers stand on one line with their interval; wider ones are wrapped.
    table = Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left", show_edge=False)
    table.padding = (0, 0)
    table.add_column("", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for cells in table_cells(before, after, change):
        table.add_row(*(Text(cell, style="bold" if i == 2 else "") for i, cell in enumerate(cells)))
    table.caption = f"In brackets: 95% interval over prompts. {LEGEND}"
    table.caption_justify = "left"
    return table


def evaluation_summary(evaluation: dict[str, Any], title: str = "held-out prompts") -> Table:
    """One evaluation as a table, each quantity with its 95% interval."""
    table = Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left")
    table.add_column("")
    table.add_column("mean [95% interval over prompts]", justify="right")
    for row in evaluation_rows(evaluation):
        table.add_row(row[0], Text(_interval(*row)))
    return table


def table_cells(before: Sequence[Row], after: Sequence[Row], change: Sequence[Row] = ()) -> list[list[str]]:
    """The cells of that table as text: label, before, after, change. A label that one side lacks shows a dash there."""
    first, last, changes = ({row[0]: row for row in rows} for rows in (before, after, change))
    cells = []
    for label in [*first, *(label for label in last if label not in first)]:
        a, b = first.get(label, (label, None, None, None)), last.get(label, (label, None, None, None))
        difference = b[1] - a[1] if a[1] is not None and b[1] is not None else None
        delta = changes.get(label, (label, difference, None, None))
        cells.append([label, _interval(*a), _interval(*b), _interval(*delta, signed=True)])
    return cells


def side_by_side(samples: Sequence[dict[str, Any]]) -> Group:
    """Samples `{"prompt", "before", "after", "reward_before", "reward_after"}`: a prompt above its completions."""
    parts: list[RenderableType] = []
    for sample in samples:
        table = Table(box=box.ROUNDED, expand=True, title=Text(prompt_text(sample["prompt"]), style="bold"))
        table.title_justify = "left"
        for side in ("before", "after"):
            reward = sample.get(f"reward_{side}")
            table.add_column(f"{side}, reward {reward:.3f}" if is_number(reward) else side, ratio=1, overflow="fold")
        table.add_row(Text(clean(str(sample["before"])).strip()), Text(clean(str(sample["after"])).strip()))
        parts.append(table)
    return Group(*parts)


def is_number(value: Any) -> bool:
    """Whether a logged value is a finite number (null stands for NaN)."""
    return isinstance(value, int | float) and math.isfinite(value)


def _row(name: str, quantity: Any) -> Row:
    """A quantity of an evaluation, `{"mean", "low", "high"}` or a bare number, as a row."""
    values = quantity if isinstance(quantity, dict) else {"mean": quantity}
    mean, low, high = (values.get(key) if is_number(values.get(key)) else None for key in ("mean", "low", "high"))
    return QUANTITIES[name][0], mean, low, high


def _interval(label: str, value: float | None, low: float | None, high: float | None, signed: bool = False) -> str:
    if value is None:
        return "–"
    form = FORMATS.get(label, "{:.3f}")
    if signed and "%" in form:  # the difference of two shares is in points, not in percent of the first
        form, value, low, high = "{:.1f} points", 100 * value, low and 100 * low, high and 100 * high
    text = (form.replace("{:", "{:+") if signed else form).format(value)
    return text if low is None or high is None else f"{text} [{form.format(low)}, {form.format(high)}]"
