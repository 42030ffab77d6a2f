"""report.html: one self-contained page about one run, without scripts, made from the files of its folder."""

from __future__ import annotations

import importlib.util
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from pairtune.errors import PairtuneError
from pairtune.maths.statistics import bootstrap_difference
from pairtune.runs import folder
from pairtune.runs.display import LEGEND, Row, clean, duration, evaluation_rows, is_number, prompt_text, table_cells
from pairtune.runs.metrics import read_jsonl

Line = dict[str, Any]

NUM_SAMPLES_OPEN = 8
NUM_SAMPLES = 40
"""Samples on the page: the first ones of the data set, so that nobody picked them."""
MAX_POINTS = 400
"""A curve of more steps is averaged into this many bins: more cannot be seen and makes the page heavy."""

# Matplotlib writes plain colours; each of these stands for a colour of the page, which knows light and dark.
COLOURS = {
    "#010101": "var(--text)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    **{f"#0401{i:02d}": f"var(--series-{i})" for i in range(1, 8)},
}
TEXT, MUTED, LINE, *SERIES = COLOURS


def write_report(run_dir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the report of a run, by default to report.html in its folder; returns where it is.

    A run that still goes on, stopped early or was never evaluated gives a report of what is there.
    Raises PairtuneError if `run_dir` is no run folder, a file in it is damaged, or jinja2 or matplotlib is missing.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise PairtuneError(f"there is no run folder {run_dir}")
    if not any((run_dir / name).is_file() for name in (folder.CONFIG, folder.METRICS, folder.EVALUATIONS)):
        raise PairtuneError(f"{run_dir} is no run folder: it has no {folder.CONFIG} and no {folder.METRICS}")
    for package in ("jinja2", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise PairtuneError(f"a report needs {package}; `pip install 'pairtune[report]'`")
    import jinja2

    source = resources.files("pairtune.evidence").joinpath("templates/report.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    target = Path(output) if output is not None else run_dir / folder.REPORT
    if target.is_dir():
        raise PairtuneError(f"{target} is a folder; give the report a file name, such as {target / folder.REPORT}")
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.write_atomic(target, template.render(_contents(run_dir)))
    return target


def _contents(run_dir: Path) -> dict[str, Any]:
    """All that the template shows."""
    metrics = read_jsonl(run_dir / folder.METRICS)
    evaluations = read_jsonl(run_dir / folder.EVALUATIONS)
    samples = read_jsonl(run_dir / folder.SAMPLES)
    config = folder.read_config(run_dir / folder.CONFIG) if (run_dir / folder.CONFIG).exists() else {}
    environment = _read_environment(run_dir / folder.ENVIRONMENT)
    before, after = ([] if not evaluations else evaluation_rows(evaluations[i]) for i in (0, -1))
    change = reward_change(evaluations, samples)
    return {
        "name": run_dir.resolve().name,
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "verdict": _verdict(evaluations, change),
        "facts": _facts(metrics, evaluations, config),
        "table": table_cells(before, after, [] if change is None else [change]),
        "legend": LEGEND,
        "paired": change is not None,
        "first_step": evaluations[0]["step"] if evaluations else None,
        "last_step": evaluations[-1]["step"] if evaluations else None,
        "num_prompts": evaluations[-1].get("num_prompts") if evaluations else None,
        "charts": _charts(metrics, evaluations),
        "samples": _samples(samples),
        "num_open": NUM_SAMPLES_OPEN,
        "config": [(name, _plain(value)) for name, value in folder.flatten(config).items()],
        "environment": [(name, _plain(value)) for name, value in environment.items() if name != "resumed"],
        "num_resumed": len(environment.get("resumed", [])),
        "commands": _commands(run_dir, environment),
    }


def _read_environment(path: Path) -> Line:
    if not path.exists():
        return {}
    try:
        environment = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PairtuneError(f"{path} is damaged; restore or remove it") from error
    return environment if isinstance(environment, dict) else {}


def _plain(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return clean(", ".join(map(str, value)) or "none") if isinstance(value, list) else clean(str(value))


def _commands(run_dir: Path, environment: Line) -> list[tuple[str, str]]:
    """How the run and this page were made."""
    commands = [("this page", f"pairtune report {shlex.quote(run_dir.name or '.')}")]
    if environment.get("command"):
        commands.insert(0, ("the run", clean(str(environment["command"]))))
    return commands


def reward_change(evaluations: list[Line], samples: list[Line]) -> Row | None:
    """The change in held-out reward from the first evaluation to the last with its 95% interval, paired by prompt.

    None where the samples do not hold every evaluated prompt twice.
    """
    if len(evaluations) < 2:
        return None
    first, last = (_rewards_by_prompt(samples, evaluations[i]["step"]) for i in (0, -1))
    if len(first) != evaluations[-1].get("num_prompts") or first.keys() != last.keys():
        return None
    a, b = (torch.tensor([rewards[row] for row in first]) for rewards in (last, first))
    return evaluation_rows({"reward": bootstrap_difference(a, b)._asdict()})[0]


def _rewards_by_prompt(samples: list[Line], step: int) -> dict[Any, float]:
    """Mean reward over the completions of each held-out prompt."""
    rewards: dict[Any, list[float]] = {}
    for sample in samples:
        if sample["step"] == step and sample.get("split") == "eval" and is_number(sample.get("reward")):
            rewards.setdefault(sample.get("row"), []).append(sample["reward"])
    return {row: sum(values) / len(values) for row, values in rewards.items()}


def _verdict(evaluations: list[Line], paired: Row | None) -> str:
    """One sentence a hurried reader may keep. It claims no more than the intervals show."""
    if not evaluations:
        return "This run was not evaluated on held-out prompts; the curves show its training batches alone."
    first, last = _quantity(evaluations[0], "reward"), _quantity(evaluations[-1], "reward")
    if len(evaluations) < 2 or first[0] is None or last[0] is None:
        return "This run was evaluated once, so there is nothing yet to compare."
    change = last[0] - first[0]
    direction = "rose" if change > 0 else "fell" if change < 0 else "stayed the same"
    sentence = f"Held-out reward {direction} by {abs(change):.3f}" if change else f"Held-out reward {direction}"
    kl = _quantity(evaluations[-1], "kl")[0]
    if kl is not None:
        sentence += f", at {kl:.2f} nats of KL to the reference"
    if paired is not None and paired[2] is not None and paired[3] is not None:
        clear = paired[2] > 0 or paired[3] < 0
        sentence += f"; the 95% interval of the change, [{paired[2]:.3f}, {paired[3]:.3f}], "
        sentence += "excludes zero." if clear else "includes zero."
    elif None not in (*first, *last):
        apart = last[1] > first[2] or last[2] < first[1]  # type: ignore[operator]
        sentence += "; the two 95% intervals lie apart." if apart else "; the two 95% intervals overlap."
    return sentence.removesuffix(".") + "."


def _facts(metrics: list[Line], evaluations: list[Line], config: Line) -> list[tuple[str, str]]:
    """Small numbers under the headline."""
    facts = [("algorithm", str(config.get("algorithm", ""))), ("model", str(config.get("model", "")))]
    if metrics:
        facts.append(("steps", f"{metrics[-1]['step']}"))
        seconds = sum(line["step_time"] for line in metrics if is_number(line.get("step_time")))
        if seconds:
            facts.append(("training time", duration(seconds)))
        if is_number(metrics[-1].get("num_tokens")):
            facts.append(("tokens seen", f"{metrics[-1]['num_tokens']:,.0f}"))
    if evaluations and is_number(evaluations[-1].get("num_prompts")):
        facts.append(("held-out prompts", f"{evaluations[-1]['num_prompts']}"))
    return [(name, clean(value)) for name, value in facts if value]


# Samples


def _samples(samples: list[Line]) -> dict[str, Any]:
    """Held-out completions of one prompt at the first and the last evaluated step; else what training logged last."""
    held_out = [sample for sample in samples if sample.get("split") == "eval"]
    if held_out:
        steps = [min(sample["step"] for sample in held_out), max(sample["step"] for sample in held_out)]
        first, last = ({_key(s): s for s in held_out if s["step"] == step} for step in steps)
        pairs = [(first[key], last[key]) for key in first if key in last] if steps[0] < steps[1] else []
        if pairs:
            shown = [{"prompt": prompt_text(a.get("prompt", "")), "sides": [_side(a), _side(b)]} for a, b in pairs]
            return {"kind": "held-out", "steps": steps, "total": len(pairs), "shown": shown[:NUM_SAMPLES]}
    rest = [sample for sample in samples if sample["step"] == samples[-1]["step"]]
    shown = [{"prompt": prompt_text(s.get("prompt", "")), "sides": [_side(s)]} for s in rest]
    steps = [rest[-1]["step"]] if rest else []
    return {"kind": "single", "steps": steps, "total": len(shown), "shown": shown[:NUM_SAMPLES]}


def _key(sample: Line) -> tuple[Any, Any]:
    return sample.get("row"), sample.get("completion_index")


def _side(sample: Line) -> Line:
    reward = sample.get("reward")
    return {
        "step": sample["step"],
        "text": clean(str(sample.get("completion", ""))).strip(),
        "reward": f"{reward:.3f}" if is_number(reward) else None,
        "truncated": bool(sample.get("truncated")),
    }


# Curves


def _charts(metrics: list[Line], evaluations: list[Line]) -> list[Line]:
    """Inline SVG of every curve whose numbers are there."""
    makers: list[Callable[[list[Line], list[Line]], Line | None]] = [
        _reward_chart,
        _kl_chart,
        _plane_chart,
        _clip_chart,
        _length_chart,
        _time_chart,
    ]
    return [chart for maker in makers if (chart := maker(metrics, evaluations)) is not None]


def _reward_chart(metrics: list[Line], evaluations: list[Line]) -> Line | None:
    def draw(axes: Any) -> None:
        _curve(axes, metrics, "reward", SERIES[0], "training batch")
        _band(axes, evaluations, "reward", SERIES[1], "held-out, 95% interval")
        _label(axes, "step", "reward")

    text = "Mean reward before any KL term: of each training batch, and of the held-out prompts."
    return _chart("Reward", text, draw) if _has(metrics, evaluations, "reward") else None


def _kl_chart(metrics: list[Line], evaluations: list[Line]) -> Line | None:
    def draw(axes: Any) -> None:
        _curve(axes, metrics, "kl", SERIES[0], "training batch")
        _band(axes, evaluations, "kl", SERIES[1], "held-out, 95% interval")
        _label(axes, "step", "KL (nats a completion)")

    text = "Sequence KL of the policy to the reference, summed over the tokens of a completion."
    return _chart("KL to the reference", text, draw) if _has(metrics, evaluations, "kl") else None


def _plane_chart(metrics: list[Line], evaluations: list[Line]) -> Line | None:
    """What each nat of drift bought: the plane in which methods are compared."""
    points = [
        (line["step"], _quantity(line, "kl"), _quantity(line, "reward"))
        for line in evaluations
        if None not in (_quantity(line, "kl")[0], _quantity(line, "reward")[0])
    ]
    if not points:
        return None

    def draw(axes: Any) -> None:
        kl, reward = ([point[i][0] for point in points] for i in (1, 2))
        axes.plot(kl, reward, color=SERIES[1], linewidth=1, alpha=0.6)
        for _, x, y in points:
            axes.errorbar(
                x[0], y[0], xerr=_spread(x), yerr=_spread(y), color=SERIES[1], marker="o", markersize=4, elinewidth=0.8
            )
        for step, x, y in {0: points[0], 1: points[-1]}.values():
            axes.annotate(f"step {step}", (x[0], y[0]), (5, 5), textcoords="offset points", color=TEXT)
        _label(axes, "KL to the reference (nats a completion)", "held-out reward")

    text = (
        "Each point is an evaluation on held-out prompts, with 95% intervals both ways; up and to the left is better."
    )
    return _chart("Reward against KL", text, draw)


def _clip_chart(metrics: list[Line], evaluations: list[Line]) -> Line | None:
    names = sorted(
        {name for line in metrics for name in line if re.fullmatch(r"clip_ratio/pass_\d+", name)},
        key=lambda name: int(name.rpartition("_")[2]),
    )
    if not names and not _numbers(metrics, "clip_ratio"):
        return None

    def draw(axes: Any) -> None:
        for i, name in enumerate(names or ["clip_ratio"]):
            label = f"pass {name.rpartition('_')[2]}" if names else "mean over passes"
            _curve(axes, metrics, name, SERIES[i % len(SERIES)], label, scale=100)
        _label(axes, "step", "pairs past the clip edge (%)")
        axes.set_ylim(-2, 102)

    text = "Share of pairs whose ratio has left the clip range, by pass over the batch. Pass 1 starts at ratio 1."
    return _chart("Clip ratio", text, draw)


def _length_chart(metrics: list[Line], evaluations: list[Line]) -> Line | None:
    if not _has(metrics, evaluations, "completions/mean_length", "length"):
        return None

    def draw(length: Any, truncated: Any) -> None:
        _curve(length, metrics, "completions/mean_length", SERIES[0], "training batch")
        _band(length, evaluations, "length", SERIES[1], "held-out")
        _label(length, "", "length (tokens)")
        _curve(truncated, metrics, "completions/clipped_ratio", SERIES[0], "training batch", scale=100)
        _band(truncated, evaluations, "truncated", SERIES[1], "held-out", scale=100)
        _label(truncated, "step", "unfinished (%)", legend=False)
        truncated.set_ylim(-2, 102)

    text = "Tokens a completion, end token included, and the share that the length cap cut off."
    return _chart("Length", text, draw, panels=2)


def _time_chart(metrics: list[Line], evaluations: list[Line]) -> Line | None:
    timed = [line for line in metrics if is_number(line.get("step_time"))]
    names = {name for line in timed for name in line if re.fullmatch(r"time/[a-z0-9_]+", name)}
    names -= {"time/evaluate", "time/save"}  # they stand between two steps and are no part of `step_time`
    if not timed:
        return None
    ordered = sorted(names, key=lambda name: -sum(_or_zero(line.get(name)) for line in timed))
    shown, colours = ordered[: len(SERIES) - 2], SERIES[1:]
    stack = {name: [_or_zero(line.get(name)) for line in timed] for name in shown}
    stack["time/other"] = [
        max(0.0, line["step_time"] - sum(_or_zero(line.get(name)) for name in shown)) for line in timed
    ]

    def draw(axes: Any) -> None:
        steps = [float(line["step"]) for line in timed]
        x, _ = _thin(steps, steps)
        bottom = [0.0] * len(x)
        gap = x[1] - x[0] if len(x) > 1 else 1.0
        for i, (name, seconds) in enumerate(stack.items()):
            _, y = _thin(steps, seconds)
            colour = colours[i] if name != "time/other" else colours[-1]
            label = name.removeprefix("time/").replace("_", " ")
            top = [a + b for a, b in zip(bottom, y, strict=True)]
            if len(x) <= 60:
                axes.bar(x, y, width=0.8 * gap, bottom=bottom, color=colour, label=label, linewidth=0)
            else:
                axes.fill_between(x, bottom, top, step="mid", color=colour, label=label, linewidth=0)
            bottom = top
        if len(x) == 1:
            axes.set_xlim(x[0] - 2, x[0] + 2)
        _label(axes, "step", "seconds a step")

    return _chart("Where the time goes", "Seconds of each step by phase, without evaluations and saving.", draw)


def _has(metrics: list[Line], evaluations: list[Line], name: str, evaluated: str | None = None) -> bool:
    held_out = any(_quantity(line, evaluated or name)[0] is not None for line in evaluations)
    return held_out or bool(_numbers(metrics, name))


def _numbers(lines: list[Line], name: str) -> list[float]:
    return [line[name] for line in lines if is_number(line.get(name))]


def _or_zero(value: Any) -> float:
    return float(value) if is_number(value) else 0.0


def _quantity(evaluation: Line, name: str) -> tuple[float | None, float | None, float | None]:
    rows: list[Row] = evaluation_rows({name: evaluation.get(name)})
    return rows[0][1:] if rows else (None, None, None)


def _spread(quantity: tuple[float | None, float | None, float | None]) -> list[list[float]] | None:
    mean, low, high = quantity
    if mean is None or low is None or high is None:
        return None
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]


def _thin(steps: Sequence[float], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MAX_POINTS points: means of equal bins of steps."""
    size = math.ceil(len(steps) / MAX_POINTS)
    starts = range(0, len(steps), max(size, 1))
    bins = [(steps[i : i + size], values[i : i + size]) for i in starts]
    return [sum(x) / len(x) for x, _ in bins], [sum(y) / len(y) for _, y in bins]


def _curve(axes: Any, metrics: list[Line], name: str, colour: str, label: str, scale: float = 1) -> None:
    points = [(line["step"], scale * line[name]) for line in metrics if is_number(line.get(name))]
    if points:
        x, y = _thin(*zip(*points, strict=True))
        axes.plot(x, y, color=colour, label=label, linewidth=1.2, marker="o" if len(x) < 3 else None, markersize=3)


def _band(axes: Any, evaluations: list[Line], name: str, colour: str, label: str, scale: float = 1) -> None:
    points = [(line["step"], *_quantity(line, name)) for line in evaluations if _quantity(line, name)[0] is not None]
    if not points:
        return
    steps, means = [point[0] for point in points], [scale * float(point[1] or 0) for point in points]
    spreads = [_spread(point[1:]) or [[0.0], [0.0]] for point in points]
    lows = [mean - scale * spread[0][0] for mean, spread in zip(means, spreads, strict=True)]
    highs = [mean + scale * spread[1][0] for mean, spread in zip(means, spreads, strict=True)]
    axes.fill_between(steps, lows, highs, color=colour, alpha=0.18, linewidth=0)
    axes.errorbar(
        steps,
        means,
        yerr=[
            [m - low for m, low in zip(means, lows, strict=True)],
            [h - m for m, h in zip(means, highs, strict=True)],
        ],
        color=colour,
        label=label,
        marker="o",
        markersize=3.5,
        linewidth=1.6,
        elinewidth=0.8,
    )


def _label(axes: Any, x: str, y: str, legend: bool = True) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    handles, labels = axes.get_legend_handles_labels()
    if legend and len(labels) > 1:
        # Above the axes: inside it would lie over a curve sooner or later.
        columns = len(labels) if len(labels) <= 4 else 3
        axes.legend(
            handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, frameon=False, borderpad=0.2,
            handlelength=1.2, columnspacing=1.2, fontsize=8,
        )  # fmt: skip


def _chart(title: str, text: str, draw: Callable[..., None], panels: int = 1) -> Line:
    """Draws a figure and returns it as inline SVG whose text and colours are the page's own."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: dict[Any, Any] = {
        "svg.fonttype": "none",  # text stays text: sharp, small, and coloured by the page
        "svg.hashsalt": title,  # the same run gives the same bytes, and ids differ between the figures of one page
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": MUTED,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "grid.color": LINE,
        "font.size": 8.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.linewidth": 0.6,
        "grid.linewidth": 0.6,
    }
    with rc_context(style):
        figure = Figure(figsize=(4.6, 3.0 if panels == 1 else 4.0), layout="constrained")
        figure.patch.set_visible(False)
        all_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
        draw(*all_axes)
        for axes in all_axes:
            axes.patch.set_visible(False)
            if "step" in all_axes[-1].get_xlabel():
                axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    return {"title": title, "text": text, "svg": _inline(buffer.getvalue(), title)}


def _inline(svg: str, title: str) -> Any:
    """The <svg> element alone, scaled by the page; only numbers and words of this file are in it."""
    import markupsafe

    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r' id="[A-Za-z0-9.]+_\d+"', "", svg
    )  # figure_1, axes_1: the same in each figure, and nobody refers to them
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 role="img" aria-label="{markupsafe.escape(title)}"', svg, count=1)
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return markupsafe.Markup(svg)
