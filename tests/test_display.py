"""What a person sees: live on a terminal, plain in a pipe; text of a model is data."""

from __future__ import annotations

import io
import math
import re
import sys
from typing import Any

import pytest
from rich.console import Console

from pairtune.runs import display, distributed
from pairtune.runs.display import Display, clean, progress, sparkline


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def pipe(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False)


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), width=width, highlight=False, force_terminal=True, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


METRICS = {
    "reward": 0.4321,
    "kl": 2.3,
    "completions/mean_length": 27.44,
    "clip_ratio": 0.342,
    "tokens_per_second": 142.4,
    "step_time": 10.0,
}


@pytest.mark.parametrize(
    ("dirty", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07text", "text"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b]52;c;never ended", "52;c;never ended"),
        ("\x9b2Jgone", "gone"),
        ("a\x00b\x07c\x08d\x7f", "abcd"),
        ("line\r\nnext\tcell\rback", "line\nnext\tcellback"),
        ("abc\u202edef\u2066", "abcdef"),
        ("ü 漢字 👩‍🍳 [bold]", "ü 漢字 👩‍🍳 [bold]"),
        ("end \x1b", "end "),
    ],
)
def test_clean_leaves_text_alone_and_nothing_else(dirty: str, shown: str) -> None:
    assert clean(dirty) == shown


def test_a_prompt_is_shown_as_a_person_reads_it() -> None:
    assert display.prompt_text("plain\x1b[1m") == "plain"
    assert display.prompt_text([{"role": "user", "content": "one"}]) == "one"
    turns = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert display.prompt_text(turns) == "system: be kind\nuser: hi"


def test_sparkline_spans_its_values_and_fits() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == sparkline([math.nan]) == ""
    assert sparkline([0, math.nan, 1]) == "▁█"
    long = sparkline([float(i) for i in range(1000)], width=24)
    assert len(long) == 24
    assert long[0] == "▁"
    assert long[-1] == "█"
    assert list(long) == sorted(long)


def test_duration_reads_like_a_clock() -> None:
    assert [display.duration(s) for s in (0.4, 59.4, 59.6, 187, 7387)] == ["0 s", "59 s", "1:00", "3:07", "2:03:07"]


def run_steps(shown: Display, clock: Clock, seconds: list[float], start: int = 1, extra: float = 0.0) -> None:
    for i, spent in enumerate(seconds):
        clock.now += spent
        shown.step(start + i, METRICS | {"step_time": spent - (extra if i else 0.0)})


def test_time_left_is_the_median_step_and_what_lies_between() -> None:
    clock = Clock()
    shown = Display(20, console=pipe(), clock=clock)
    assert shown.time_left() is None
    run_steps(shown, clock, [50, 10, 10, 10])  # a slow first step does not count
    assert shown.time_left() == pytest.approx(16 * 10)
    between = Display(20, console=pipe(), clock=clock)
    run_steps(between, clock, [10, 12, 12, 12], extra=2)  # two seconds of evaluation after each step
    assert between.time_left() == pytest.approx(16 * 12)
    run_steps(between, clock, [12] * 16, start=5, extra=2)
    assert between.time_left() == 0


def test_time_left_never_exceeds_max_minutes_and_counts_what_passed_before_a_resume() -> None:
    clock = Clock()
    shown = Display(1000, max_minutes=2, console=pipe(), clock=clock)
    clock.now = 30  # loading is no training time
    shown.begin(10, elapsed=40)
    run_steps(shown, clock, [10, 10], start=11)
    assert shown.time_left() == pytest.approx(120 - 40 - 20)
    clock.now += 500
    assert shown.time_left() == 0


def test_a_pipe_gets_one_plain_line_a_step() -> None:
    clock, console = Clock(), pipe(width=40)
    with Display(30, console=console, clock=clock) as shown:
        with shown.phase("sampling", 8) as advance:
            clock.now += 4.9
            advance(8)
        clock.now = 10.0
        shown.step(12, METRICS)
    assert written(console) == (
        "step 12/30  reward 0.432  KL 2.30 nats  length 27.4  clip ratio 34%  142 tokens/s  10.0 s  "
        "10 s elapsed, about 3:00 left\n"
    )


def test_a_missing_or_null_value_is_left_out() -> None:
    clock, console = Clock(), pipe()
    with Display(3, console=console, clock=clock) as shown:
        clock.now = 7.0
        shown.step(1, {"reward": None, "kl": 1.0})
    assert written(console) == "step 1/3  KL 1.00 nats  7.0 s  7 s elapsed, about 14 s left\n"


def test_long_work_before_the_first_step_speaks_in_a_pipe() -> None:
    clock, console = Clock(), pipe()
    with Display(3, console=console, clock=clock) as shown, shown.phase("evaluating", 100) as advance:
        for _ in range(30):
            clock.now += 1
            advance(1)
    lines = written(console).splitlines()
    assert lines == ["evaluating 5/100, 5 s, about 1:35 left", "evaluating 20/100, 20 s, about 1:20 left"]


def test_an_evaluation_is_one_line_with_its_intervals() -> None:
    console = pipe(width=30)
    with Display(3, console=console) as shown:
        shown.evaluation({"step": 10, "reward": {"mean": 0.3, "low": 0.2, "high": 0.4}, "kl": {"mean": 1.0}})
    assert written(console) == "held-out, step 10  reward 0.300 [0.200, 0.400]  KL 1.00 nats\n"


def test_the_live_display_shows_all_that_was_asked_for() -> None:
    clock, console = Clock(), terminal()
    with Display(30, console=console, clock=clock, rewards=[None, 0.1, 0.2, 9.0]) as shown:
        shown.begin(2)
        clock.now = 10.0
        shown.step(12, METRICS)
        for step, mean in ((0, 0.2), (12, 0.5)):
            shown.evaluation({"step": step, "reward": {"mean": mean, "low": 0.1, "high": 0.6}})
        with shown.phase("update 2 of 4", 16) as advance, progress("scoring [b]x[/b]\x1b[2J", 4) as inner:
            advance(8)
            inner(3)
            assert shown._live is not None
            shown._live.refresh()
            clock.now = 12.0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))
    for part in ("step 12/30", "12 s elapsed, about 3:00 left", "reward 0.432", "▁▃█", "held-out 0.200 to 0.500"):
        assert part in text, part
    for part in ("KL 2.30 nats", "length 27.4", "clip ratio 34%", "142 tokens/s"):
        assert part in text, part
    assert "update 2 of 4 8/16: scoring [b]x[/b] 3/4" in text  # markup is text, escapes are gone
    assert "\x1b[2J" not in written(console)
    assert display._active is None


def test_before_the_first_step_the_live_display_shows_the_phase() -> None:
    console = terminal()
    with Display(30, console=console) as shown, shown.phase("loading the model"):
        assert shown._live is not None
        shown._live.refresh()
    assert "step 0/30" in written(console)
    assert "loading the model" in written(console)


def test_quiet_and_other_processes_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    consoles = [terminal(), pipe(), terminal()]
    with Display(3, console=consoles[0], quiet=True) as shown:
        shown.step(1, METRICS)
        shown.message("hello")
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    clock = Clock()
    with Display(3, console=consoles[1], clock=clock) as shown, shown.phase("x", 2) as advance:
        clock.now = 100
        advance(1)
        shown.step(1, METRICS)
        shown.evaluation({"step": 0})
        shown.show("table")
    with progress("x", 3, console=consoles[2]) as advance:
        advance(3)
    assert [written(console) for console in consoles] == ["", "", ""]


def test_progress_alone_is_silent_while_short_and_plain_in_a_pipe() -> None:
    clock, console = Clock(), pipe()
    with progress("scoring", 40, console=console, clock=clock) as advance:
        clock.now = 4.0
        advance(4)
        assert written(console) == ""
        clock.now = 10.0
        advance(6)
    assert written(console) == "scoring 10/40, 10 s, about 30 s left\n"


def test_progress_on_a_terminal_is_a_bar() -> None:
    console = terminal()
    with progress("reading [i]weights[/i]", 4, console=console) as advance:
        advance(2)
    assert "reading [i]weights[/i] 2/4" in written(console)


def test_a_console_without_unicode_does_not_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console = display.make_console()
    with Display(3, console=console) as shown:
        shown.message("ü 漢字")
    sys.stdout.flush()
    assert raw.getvalue() == b"? ??\n"


BEFORE: list[display.Row] = [
    ("reward", 0.2, 0.12, 0.28),
    ("unfinished", 0.85, 0.8, 0.9),
    ("gone", 1.0, None, None),
]
AFTER: list[display.Row] = [
    ("reward", 0.53, 0.46, 0.6),
    ("unfinished", 0.75, 0.7, 0.8),
    ("new", None, None, None),
]


def test_the_table_shows_values_intervals_and_change() -> None:
    assert display.table_cells(BEFORE, AFTER) == [
        ["reward", "0.200 [0.120, 0.280]", "0.530 [0.460, 0.600]", "+0.330"],
        ["unfinished", "85% [80%, 90%]", "75% [70%, 80%]", "-10.0 points"],
        ["gone", "1.000", "–", "–"],
        ["new", "–", "–", "–"],
    ]
    paired = display.table_cells(BEFORE[:2], AFTER[:2], [("reward", 0.33, 0.25, 0.41), ("unfinished", -0.1, -0.2, 0.0)])
    assert [row[3] for row in paired] == ["+0.330 [0.250, 0.410]", "-10.0 points [-20.0 points, 0.0 points]"]
    console = pipe(width=100)
    console.print(display.evaluation_table(BEFORE, AFTER, title="[x]"))
    assert "0.530 [0.460, 0.600]" in written(console)
    assert "[x]" in written(console)


def test_a_narrow_table_loses_no_digit() -> None:
    """Three intervals with two signs each are wider than 80 columns: they are wrapped, not cut."""
    wide = [("ref. nats/token", -0.111, -0.222, 0.333), ("reward", -0.444, -0.555, -0.666)]
    console = pipe(width=80)
    console.print(display.evaluation_table(wide, wide, [("reward", -0.777, -0.888, -0.999)]))
    text = written(console)
    assert "…" not in text
    assert all(f"-0.{digit * 3}" in text for digit in "456789")


def test_rows_of_an_evaluation_come_in_a_fixed_order() -> None:
    line: dict[str, Any] = {
        "step": 3,
        "distinct_2": {"mean": 0.9, "low": 0.8, "high": 1.0},
        "unknown": {"mean": 1.0},
        "kl": None,
        "reward": {"mean": 0.5, "low": None, "high": None},
        "length": 12,
    }
    assert display.evaluation_rows(line) == [
        ("reward", 0.5, None, None),
        ("length", 12.0, None, None),
        ("distinct-2", 0.9, 0.8, 1.0),
    ]


def test_side_by_side_shows_model_text_as_it_is() -> None:
    console = pipe(width=70)
    sample = {
        "prompt": [{"role": "user", "content": "Say [red]hi[/red]"}],
        "before": "  [bold]x[/bold] \x1b[2J[/nonsense]",
        "after": "word " * 30,
        "reward_before": 0.1234,
        "reward_after": None,
    }
    console.print(display.side_by_side([sample]))
    text = written(console)
    for part in ("Say [red]hi[/red]", "[bold]x[/bold] [/nonsense]", "before, reward 0.123", "after ", "word word"):
        assert part in text, part
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 70
