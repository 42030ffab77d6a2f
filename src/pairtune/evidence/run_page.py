"""The page of one run: of reinforcement learning, of supervised fine-tuning or of reward learning."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from pairtune.evidence.figures import Chart, Figure, Point, RowMark, Rows, Series, thin
from pairtune.evidence.page import (
    Block,
    Choice,
    Completion,
    Completions,
    Figures,
    Page,
    Policy,
    Section,
    Settings,
    Tables,
    Text,
    plain,
)
from pairtune.evidence.runs import Line, Run, read_json
from pairtune.evidence.tables import Cell, Table
from pairtune.maths.statistics import bootstrap_difference
from pairtune.runs import folder
from pairtune.runs.display import FORMATS, LEGEND, Row, clean, duration, evaluation_rows, is_number, prompt_text

MAX_POINTS = 300
"""A curve of more steps is averaged into this many bins: more cannot be seen and makes the page heavy."""
MAX_OTHER_POINTS = 120
"""The same for the metrics in the list of all metrics, of which there are many."""
MAX_OTHER_METRICS = 40
MAX_POLICIES_OF_A_RUN = 6
NUM_SAMPLES = 40
"""Held-out prompts whose completions are on the page: the first ones of the data set, so that nobody picked them."""

TRAINING, HELD_OUT = "training batch", "held-out, 95% interval"
Quantity = tuple[float | None, float | None, float | None]
"""Mean, low and high end."""

_OWN_CHARTS = (
    "reward",
    "kl",
    "completions/mean_length",
    "completions/clipped_ratio",
    "step_time",
    "loss",
    "perplexity",
)


def run_page(run: Run) -> Page:
    """What one run folder shows. A run that still goes on, stopped early or was never evaluated gives what is there.

    Raises PairtuneError if a file in it is damaged.
    """
    return {"train": _train_page, "sft": _sft_page, "reward": _reward_page}[stage_of(run)](run)


def stage_of(run: Run) -> str:
    """Which verb made a run: train, sft or reward."""
    if "algorithm" in run.config:
        return "train"
    if "reward" in run.config or (run.folder / folder.REWARD_REPORT).exists():
        return "reward"
    if run.config:
        return "sft" if "dataset" in run.config and "reward_funcs" not in run.config else "train"
    return "sft" if run.metrics and "perplexity" in run.metrics[-1] else "train"


# ------------------------------------------------------------------------------------------------------------- train


def _train_page(run: Run) -> Page:
    change = reward_change(run.evaluations, run.samples)
    sections = [
        Section("change", "Change", "Before and after, on held-out prompts", _before_and_after(run, change)),
        Section("curves", "Curves", "Curves", [*_charts(run), *_all_metrics(run)]),
        Section("spread", "Spread", "Rewards and lengths", _spread(run)),
        Section("completions", "Completions", "Completions side by side", _completions(run)),
        Section("made", "Settings", "How it was made", [made(run)]),
    ]
    return _page(run, _verdict(run.evaluations, change), sections)


def _page(run: Run, verdict: str, sections: list[Section], facts: Sequence[tuple[str, str]] = ()) -> Page:
    shown = [section for section in sections if section.blocks]
    return Page(run.name, verdict, [*_facts(run), *facts], shown)


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
    first, last = quantity(evaluations[0], "reward"), quantity(evaluations[-1], "reward")
    if len(evaluations) < 2 or first[0] is None or last[0] is None:
        return "This run was evaluated once, so there is nothing yet to compare."
    change = last[0] - first[0]
    direction = "rose" if change > 0 else "fell" if change < 0 else "stayed the same"
    sentence = f"Held-out reward {direction} by {abs(change):.3f}" if change else f"Held-out reward {direction}"
    kl = quantity(evaluations[-1], "kl")[0]
    if kl is not None:
        sentence += f", at {kl:.2f} nats of KL to the reference"
    if paired is not None and paired[2] is not None and paired[3] is not None:
        clear = paired[2] > 0 or paired[3] < 0
        sentence += f"; the 95% interval of the change, [{paired[2]:.3f}, {paired[3]:.3f}], "
        sentence += "excludes zero." if clear else "includes zero."
    else:
        sentence += _apart(first, last)
    return sentence.removesuffix(".") + "."


def _apart(first: Quantity, last: Quantity) -> str:
    """Whether two intervals, of different means of the same rows, lie apart."""
    if None in (*first, *last):
        return ""
    apart = last[1] > first[2] or last[2] < first[1]  # type: ignore[operator]
    return "; the two 95% intervals lie apart." if apart else "; the two 95% intervals overlap."


def _before_and_after(run: Run, change: Row | None = None) -> list[Block]:
    evaluations = run.evaluations
    if not evaluations:
        return []
    before, after = ({row[0]: row for row in evaluation_rows(evaluations[i]) if row[0] in FORMATS} for i in (0, -1))
    rows: list[list[str | Cell]] = []
    for label in [*before, *(label for label in after if label not in before)]:
        a, b = (side.get(label, (label, None, None, None)) for side in (before, after))
        delta = change if change is not None and change[0] == label else _difference(a, b)
        rows.append([label, _cell(a), _cell(b), _cell(delta, signed=True)])
    num_prompts = evaluations[-1].get("num_prompts")
    words = "In brackets: 95% interval"
    words += f", bootstrapped over {num_prompts} prompts" if num_prompts else ""
    words += "; that of the change compares each prompt with itself" if change is not None else ""
    columns = ["", f"before (step {evaluations[0]['step']})", f"after (step {evaluations[-1]['step']})", "change"]
    legend = f" {LEGEND}" if stage_of(run) == "train" else ""
    return [Tables([Table("before_and_after", "Held-out measures", columns, rows, f"{words}.{legend}")])]


def _difference(a: Row, b: Row) -> Row:
    return a[0], None if a[1] is None or b[1] is None else b[1] - a[1], None, None


def _cell(row: Row, signed: bool = False) -> Cell:
    label, mean, low, high = row
    form = FORMATS.get(label, "{:.3f}")
    if signed and "%" in form:  # the difference of two shares is in points, not in percent of the first
        return Cell(*_percent((mean, low, high)), form="{:+.1f} points")
    return Cell(mean, low, high, form=form.replace("{:", "{:+") if signed else form)


def _percent(values: Quantity) -> Quantity:
    mean, low, high = (None if value is None else 100 * value for value in values)
    return mean, low, high


def _facts(run: Run) -> list[tuple[str, str]]:
    """Small numbers under the headline."""
    metrics, evaluations, config = run.metrics, run.evaluations, run.config
    facts = [("algorithm", str(config.get("algorithm", ""))), ("model", str(config.get("model", "")))]
    if metrics:
        facts.append(("steps", f"{metrics[-1]['step']}"))
        seconds = sum(numbers(metrics, "step_time"))
        if seconds:
            facts.append(("training time", duration(seconds)))
        if is_number(metrics[-1].get("num_tokens")):
            facts.append(("tokens seen", f"{metrics[-1]['num_tokens']:,.0f}"))
    if evaluations:
        for name, label in (
            ("num_prompts", "held-out prompts"),
            ("num_examples", "held-out examples"),
            ("num_pairs", "held-out pairs"),
        ):
            if is_number(evaluations[-1].get(name)):
                facts.append((label, f"{evaluations[-1][name]:,.0f}"))
                break
    return [(name, clean(value)) for name, value in facts if value]


# ------------------------------------------------------------------------------------------------------------ curves


def _charts(run: Run) -> list[Block]:
    """Every curve whose numbers are there."""
    metrics, evaluations = run.metrics, run.evaluations
    kl_label = f"KL to the reference (nats a completion{law(run.config)})"
    candidates = [
        _over_steps(
            run,
            "reward",
            "Reward",
            "Mean reward before any KL term: of each training batch, and of the held-out prompts.",
            "reward",
            ("reward", "reward"),
        ),
        _over_steps(
            run,
            "kl",
            "KL to the reference",
            "Sequence KL of the policy to the reference, summed over the tokens of a completion.",
            "KL (nats a completion)",
            ("kl", "kl"),
            y_name="KL",
        ),
        _plane(evaluations, kl_label),
        _clip_chart(metrics),
        _over_steps(
            run,
            "length",
            "Length",
            "Tokens a completion, end token included.",
            "length (tokens)",
            ("completions/mean_length", "length"),
            y_name="length",
        ),
        _over_steps(
            run,
            "unfinished",
            "Unfinished completions",
            "The share that the length cap cut off.",
            "unfinished (%)",
            ("completions/clipped_ratio", "truncated"),
            percent=True,
            y_name="unfinished %",
        ),
        time_chart(metrics),
    ]
    charts = [chart for chart in candidates if chart is not None]
    return [Figures(charts)] if charts else []


def quantity(evaluation: Line, name: str) -> Quantity:
    """Mean, low and high end of a quantity of an evaluation, None where it has none."""
    value = evaluation.get(name)
    values = value if isinstance(value, dict) else {"mean": value}
    mean, low, high = (values.get(key) if is_number(values.get(key)) else None for key in ("mean", "low", "high"))
    return mean, low, high


def numbers(lines: Iterable[Line], name: str) -> list[float]:
    """What a log says of one metric, without its gaps."""
    return [float(line[name]) for line in lines if is_number(line.get(name))]


def curve(metrics: list[Line], name: str, most: int = MAX_POINTS, scale: float = 1.0) -> list[Point]:
    """A metric over the steps."""
    points = [(float(line["step"]), scale * line[name]) for line in metrics if is_number(line.get(name))]
    return [Point(x, y) for x, y in thin(points, most)]


def held_out(evaluations: list[Line], name: str, scale: float = 1.0) -> list[Point]:
    """A quantity of the evaluations over the steps, with its intervals."""
    points = []
    for line in evaluations:
        mean, low, high = (None if value is None else scale * value for value in quantity(line, name))
        if mean is not None:
            points.append(Point(float(line["step"]), mean, low, high))
    return points


def law(config: Line) -> str:
    """What the KL is the KL of, where that is not the model as it is; starts with a comma."""
    parts = []
    if config.get("temperature", 1.0) != 1.0:
        parts.append(f"temperature {config['temperature']:g}")
    if config.get("top_p", 1.0) != 1.0:
        parts.append(f"top-p {config['top_p']:g}")
    if config.get("top_k"):
        parts.append(f"top-k {config['top_k']}")
    return f", of the law that samples, {', '.join(parts)}, to the untruncated reference" if parts else ""


def _over_steps(
    run: Run,
    key: str,
    title: str,
    text: str,
    y_label: str,
    names: tuple[str, str],
    *,
    percent: bool = False,
    y_name: str = "",
) -> Chart | None:
    """A metric of training and its held-out twin, `names` in the two logs, over the steps; None without either."""
    scale = 100.0 if percent else 1.0
    trained, evaluated = names
    series = []
    if points := curve(run.metrics, trained, scale=scale):
        series.append(Series(TRAINING, points, slot=0, group=TRAINING))
    if points := held_out(run.evaluations, evaluated, scale):
        series.append(Series("held-out", points, slot=1, interval="bars", marked=True, group=HELD_OUT))
    if not series:
        return None
    return Chart(
        key,
        title,
        text,
        "step",
        y_label,
        series,
        x_name="step",
        y_name=y_name or y_label,
        whole_steps=True,
        y_range=(-2.0, 102.0) if percent else None,
    )


def _plane(evaluations: list[Line], kl_label: str) -> Chart | None:
    """What each nat of drift bought: the plane in which methods are compared."""
    points = []
    for line in evaluations:
        kl, reward = quantity(line, "kl"), quantity(line, "reward")
        if kl[0] is not None and reward[0] is not None:
            points.append(Point(kl[0], reward[0], reward[1], reward[2], kl[1], kl[2], f"step {line['step']}"))
    if not points:
        return None
    return Chart(
        "frontier",
        "Reward against KL",
        "Each point is an evaluation on held-out prompts, with 95% intervals both ways; up and to the left is better.",
        kl_label,
        "held-out reward",
        [Series("held-out", points, slot=1, interval="bars", marked=True)],
        x_name="KL",
        y_name="reward",
        x_from_zero=True,
    )


def _clip_chart(metrics: list[Line]) -> Chart | None:
    passes = {name for line in metrics for name in line if re.fullmatch(r"clip_ratio/pass_\d+", name)}
    names = sorted(passes, key=lambda name: int(name.rpartition("_")[2])) or ["clip_ratio"]
    series = []
    for slot, name in enumerate(names, start=1):
        label = f"pass {name.rpartition('_')[2]}" if passes else "mean over passes"
        if points := curve(metrics, name, scale=100.0):
            series.append(Series(label, points, slot=slot, group=label))
    if not series:
        return None
    return Chart(
        "clip_ratio",
        "Clip ratio",
        "Share of pairs whose ratio has left the clip range, by pass over the batch. Pass 1 starts at ratio 1.",
        "step",
        "past the clip edge (%)",
        series,
        x_name="step",
        y_name="past the edge %",
        y_range=(-2.0, 102.0),
        whole_steps=True,
    )


def time_chart(metrics: list[Line]) -> Chart | None:
    """Seconds of each step by phase, one above the other."""
    timed = [line for line in metrics if is_number(line.get("step_time"))]
    if not timed:
        return None
    phases = {name for line in timed for name in line if re.fullmatch(r"time/[a-z0-9_]+", name)}
    phases -= {"time/evaluate", "time/save"}  # they stand between two steps and are no part of `step_time`
    shown = sorted(phases, key=lambda name: -sum(numbers(timed, name)))[:6]
    steps = [float(line["step"]) for line in timed]
    heights = {
        name.removeprefix("time/").replace("_", " "): [_or_zero(line.get(name)) for line in timed] for name in shown
    }
    known = [sum(parts) for parts in zip(*heights.values(), strict=True)] or [0.0] * len(timed)
    heights["other"] = [max(0.0, line["step_time"] - part) for line, part in zip(timed, known, strict=True)]
    series, below = [], [0.0] * len(timed)
    for slot, (name, seconds) in enumerate(heights.items(), start=1):
        above = [a + b for a, b in zip(below, seconds, strict=True)]
        low, high = thin(list(zip(steps, below, strict=True)), 120), thin(list(zip(steps, above, strict=True)), 120)
        points = [Point(x, y, low=bottom) for (x, y), (_, bottom) in zip(high, low, strict=True)]
        series.append(Series(name, points, slot=0 if name == "other" else slot, kind="area", group=name))
        below = above
    return Chart(
        "time",
        "Where the time goes",
        "Seconds of each step by phase, without evaluations and saving.",
        "step",
        "seconds a step",
        series,
        x_name="step",
        y_name="seconds",
        whole_steps=True,
        y_range=(0.0, max(point.y for one in series for point in one.points) * 1.05 or 1.0),
    )


def _or_zero(value: Any) -> float:
    return float(value) if is_number(value) else 0.0


def other_metrics(runs: Sequence[Run]) -> list[str]:
    """The metrics that have no chart of their own, in the order of the log."""
    names = dict.fromkeys(name for run in runs for line in run.metrics for name in line)
    left = [
        name
        for name in names
        if name != "step"
        and name not in _OWN_CHARTS
        and not name.startswith(("time/", "clip_ratio/pass_"))
        and any(is_number(line.get(name)) for run in runs for line in run.metrics)
    ]
    return left[:MAX_OTHER_METRICS]


def _all_metrics(run: Run) -> list[Block]:
    """A list from which to choose any metric of the log."""
    charts = []
    for name in other_metrics([run]):
        series = [Series(clean(name), curve(run.metrics, name, MAX_OTHER_POINTS), slot=1)]
        charts.append(
            Chart(f"metric-{name}", clean(name), "", "step", clean(name), series, x_name="step", whole_steps=True)
        )
    return [Choice("Any other metric of the log", "metric", charts)] if charts else []


def _spread(run: Run) -> list[Block]:
    """How rewards and lengths of single completions lie, before and after."""
    held_out_lines = [line for line in run.samples if line.get("split") == "eval"]
    steps = sorted({line["step"] for line in held_out_lines})
    shown = steps if len(steps) <= 4 else [steps[0], steps[len(steps) // 3], steps[2 * len(steps) // 3], steps[-1]]
    rewards, lengths = [], []
    for step in shown:
        lines = [line for line in held_out_lines if line["step"] == step]
        slot = 0 if step == steps[0] else 1
        rewards.append(spread_row(f"step {step}", [line.get("reward") for line in lines], slot))
        lengths.append(spread_row(f"step {step}", [length_of(line) for line in lines], slot))
    return spread_figures(rewards, lengths)


def spread_figures(rewards: Sequence[RowMark | None], lengths: Sequence[RowMark | None]) -> list[Block]:
    """The two charts of how single completions lie."""
    text = (
        "Single held-out completions. Thin: from the 5% to the 95% quantile; thick: the middle half; stroke: the "
        "median; mark: the mean."
    )
    figures: list[Figure] = []
    for key, title, rows, label in (
        ("reward_spread", "Rewards of completions", rewards, "reward"),
        ("length_spread", "Lengths of completions", lengths, "tokens, end token included"),
    ):
        if there := [row for row in rows if row is not None]:
            figures.append(Rows(key, title, text, label, there, x_name=label.partition(",")[0]))
    return [Figures(figures)] if figures else []


def spread_row(name: str, values: Sequence[Any], slot: int, group: str = "", text: str = "") -> RowMark | None:
    """Mean and quantiles of some numbers; None where there are fewer than two."""
    there = torch.tensor([float(value) for value in values if is_number(value)], dtype=torch.float64)
    if len(there) < 2:
        return None
    quantiles = there.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)).tolist()
    return RowMark(name, there.mean().item(), quantiles=tuple(quantiles), slot=slot, group=group, text=text)


def length_of(sample: Line) -> int | None:
    """Tokens of a completion, EOS included; None in a run of an older version."""
    ids = sample.get("completion_ids")
    return len(ids) if isinstance(ids, list) else None


# ------------------------------------------------------------------------------------------------------- completions


def _completions(run: Run) -> list[Block]:
    """Held-out completions of the evaluated steps; else what training logged last."""
    lines = [line for line in run.samples if line.get("split") == "eval"]
    if not lines and run.samples:
        last = run.samples[-1]["step"]
        lines = [
            line | {"row": number, "completion_index": 0}
            for number, line in enumerate(line for line in run.samples if line["step"] == last)
        ]
        return _browser({f"step {last}": lines}, f"Completions of step {last}, from training.")
    steps = sorted({line["step"] for line in lines})
    if len(steps) > MAX_POLICIES_OF_A_RUN:
        stride = (len(steps) - 1) / (MAX_POLICIES_OF_A_RUN - 1)
        steps = [steps[round(i * stride)] for i in range(MAX_POLICIES_OF_A_RUN)]
    return _browser({f"step {step}": [line for line in lines if line["step"] == step] for step in steps}, "")


def _browser(policies: dict[str, list[Line]], text: str) -> list[Block]:
    block = completions_of(policies, NUM_SAMPLES, text)
    return [] if block is None else [block]


def completions_of(policies: dict[str, list[Line]], most: int, text: str = "") -> Completions | None:
    """The browser over the first completion of each prompt: the first `most` prompts in the order of the data set."""
    by_prompt: dict[str, dict[tuple[Any, str], Line]] = {}
    prompts: dict[tuple[Any, str], str] = {}
    for name, lines in policies.items():
        for line in lines:
            prompt = line.get("prompt", "")
            key = (line.get("row"), json.dumps(prompt, sort_keys=True))  # a row of another data set is another prompt
            by_prompt.setdefault(name, {}).setdefault(key, line)
            prompts.setdefault(key, prompt_text(prompt))
    keys = sorted(prompts, key=lambda key: (key[0] is None, *key))
    if len(policies) > 1:  # what only one policy has answered cannot be compared
        keys = [key for key in keys if sum(key in answers for answers in by_prompt.values()) > 1]
    if not keys:
        return None
    shown = keys[:most]
    if not text:
        which = f"each of the {len(keys)}" if len(shown) == len(keys) else f"the first {len(shown)} of {len(keys)}"
        text = f"The first completion of {which} held-out prompts, in the order of the data set: nobody picked them."
    return Completions(
        prompts=[prompts[key] for key in shown],
        policies=[
            Policy(name, [_completion(answers.get(key)) for key in shown])
            for name, answers in by_prompt.items()
            if any(key in answers for key in shown)
        ],
        text=text,
    )


def _completion(line: Line | None) -> Completion | None:
    if line is None:
        return None
    reward, kl = (float(line[name]) if is_number(line.get(name)) else None for name in ("reward", "kl"))
    text = clean(str(line.get("completion", ""))).strip()
    return Completion(text, reward, kl, length_of(line), bool(line.get("truncated")))


# --------------------------------------------------------------------------------------------------- how it was made


def made(run: Run) -> Settings:
    """Commands, configuration and environment of one run."""
    environment = run.environment
    commands = [("this page", f"pairtune report {shlex.quote(run.folder.name or '.')}")]
    if environment.get("command"):
        commands.insert(0, ("the run", clean(str(environment["command"]))))
    num_resumed = len(environment.get("resumed", []))
    times = "time" if num_resumed == 1 else "times"
    return Settings(
        columns=[
            ("Configuration", [(clean(name), plain(value)) for name, value in folder.flatten(run.config).items()]),
            ("Environment", [(clean(name), plain(value)) for name, value in environment.items() if name != "resumed"]),
        ],
        commands=commands,
        note=f"Resumed {num_resumed} {times}; the environment is that of the first start." if num_resumed else "",
    )


# --------------------------------------------------------------------------------------------------------------- sft


def _sft_page(run: Run) -> Page:
    sections = [
        Section("change", "Change", "Before and after, on held-out examples", _before_and_after(run)),
        Section("curves", "Curves", "Curves", [*_supervised_charts(run, ("loss", "perplexity")), *_all_metrics(run)]),
        Section("made", "Settings", "How it was made", [made(run)]),
    ]
    return _page(run, _change_sentence(run, "loss", "Held-out loss", "{:.3f}", " nats a token"), sections)


def _change_sentence(run: Run, name: str, what: str, form: str, unit: str) -> str:
    """How a held-out measure went from the first evaluation to the last."""
    values = [quantity(line, name) for line in run.evaluations]
    values = [value for value in values if value[0] is not None]
    if not values:
        return "This run was not evaluated on held-out rows; the curves show its training batches alone."
    last: Any = values[-1]
    now = form.format(last[0]) + unit
    if last[1] is not None and last[2] is not None:
        now += f" [{form.format(last[1])}, {form.format(last[2])}]"
    if len(values) == 1:
        return f"{what} is {now}."
    first: Any = values[0]
    direction = "rose" if last[0] > first[0] else "fell" if last[0] < first[0] else "stayed"
    return f"{what} {direction} from {form.format(first[0])} to {now}{_apart(first, last).removesuffix('.')}."


_SUPERVISED = {
    "loss": (
        "Loss",
        "Mean over the rows of an update, and over the held-out rows where they were measured.",
        "loss (nats)",
    ),
    "perplexity": (
        "Perplexity",
        "exp of the loss a token: among how many equally likely tokens it chooses.",
        "perplexity",
    ),
    "accuracy": (
        "Accuracy",
        "Share of comparisons in which the better completion has the larger reward, ties half.",
        "accuracy (%)",
    ),
    "margin": ("Margin", "Mean lead of the better completion's reward.", "margin"),
    "log_likelihood": (
        "Log-likelihood",
        "Nats a held-out pair; -0.693 is that of a model without an opinion.",
        "nats a pair",
    ),
}


def _supervised_charts(run: Run, names: Sequence[str]) -> list[Block]:
    charts = []
    for name in names:
        title, text, label = _SUPERVISED[name]
        chart = _over_steps(run, name, title, text, label, (name, name), percent=name == "accuracy", y_name=name)
        charts.append(chart)
    charts.append(time_chart(run.metrics))
    there = [chart for chart in charts if chart is not None]
    return [Figures(there)] if there else []


# ------------------------------------------------------------------------------------------------------------ reward


def _reward_page(run: Run) -> Page:
    report = read_json(run.folder / folder.REWARD_REPORT) or {}
    evaluation = report.get("evaluation") or {}
    sections = [
        Section("worth", "Worth", "What it is worth on held-out comparisons", _worth(report, evaluation)),
        Section("change", "Change", "Before and after", _before_and_after(run)),
        Section(
            "curves",
            "Curves",
            "Curves",
            [*_supervised_charts(run, ("loss", "accuracy", "log_likelihood", "margin")), *_all_metrics(run)],
        ),
        Section("made", "Settings", "How it was made", [made(run)]),
    ]
    sentence = _change_sentence(run, "accuracy", "Held-out accuracy", "{:.1%}", "")
    if "beats_length_baselines" in evaluation:
        better = evaluation["beats_length_baselines"]
        sentence += (
            " It is better than both rules of length, by more than the intervals allow for."
            if better
            else " It is not shown to be better than the better of the two rules of length."
        )
    dataset = report.get("dataset") or {}
    facts = [("learned from", clean(str(dataset["train"])))] if dataset.get("train") else []
    return _page(run, sentence, sections, facts)


def _worth(report: Line, evaluation: Line) -> list[Block]:
    """reward_report.json: accuracy with its parts and baselines, and whether it is as sure as it is right."""
    if not evaluation:
        return []
    figures = [_accuracy_rows(evaluation), _reliability(evaluation)]
    notes = [clean(str(note)) for notes in (report.get("left_out") or {}).values() for note in notes]
    blocks: list[Block] = [
        Figures([figure for figure in figures if figure is not None]),
        Tables([_worth_table(evaluation)]),
    ]
    return [*blocks, Text(notes)] if notes else blocks


def _accuracy_rows(evaluation: Line) -> Rows | None:
    length = evaluation.get("length") or {}
    rows = [_accuracy_row("all pairs", evaluation, evaluation.get("num_pairs"), 1)]
    for key, name in (
        ("chosen_longer", "the chosen one is longer"),
        ("chosen_shorter", "the chosen one is shorter"),
        ("equal_length", "both are of one length"),
    ):
        part = length.get(key) or {}
        rows.append(_accuracy_row(name, part, part.get("num_pairs"), 2))
    for part in evaluation.get("by_margin") or ():
        rows.append(_accuracy_row(f"margin {_range(part)}", part, part.get("num_pairs"), 3))
    for key, name in (("longer_wins", "rule: the longer one wins"), ("shorter_wins", "rule: the shorter one wins")):
        rows.append(_accuracy_row(name, length.get(key) or {}, None, 0))
    there = [row for row in rows if row is not None]
    if not there:
        return None
    return Rows(
        "accuracy_parts",
        "Accuracy, in parts and beside rules of length",
        "Share of held-out comparisons in which the better completion has the larger reward, with 95% intervals. "
        "A model that only learned length is as good as a rule of length.",
        "accuracy (%)",
        there,
        x_name="accuracy %",
        reference=50.0,
    )


def _accuracy_row(name: str, part: Line, num_pairs: Any, slot: int) -> RowMark | None:
    mean, low, high = _percent(quantity(part, "accuracy"))
    if mean is None or num_pairs == 0:
        return None
    text = f"{num_pairs:,.0f} pairs" if is_number(num_pairs) else ""
    return RowMark(name, mean, low, high, slot=slot, text=text)


def _range(part: Line) -> str:
    return f"{part['low']:.3g} to {part['high']:.3g}"


def _reliability(evaluation: Line) -> Chart | None:
    points = []
    for part in evaluation.get("reliability") or ():
        mean, low, high = quantity(part, "accuracy")
        if mean is not None and is_number(part.get("predicted")) and part.get("num_pairs"):
            text = f"{part['num_pairs']} pairs, lead of {_range(part)}"
            ends = [None if value is None else 100 * value for value in (low, high)]
            points.append(Point(100 * part["predicted"], 100 * mean, ends[0], ends[1], text=text))
    if not points:
        return None
    ideal = Series(
        "as sure as it is right",
        [Point(50.0, 50.0), Point(100.0, 100.0)],
        slot=0,
        group="as sure as it is right",
        dashed=True,
    )
    return Chart(
        "reliability",
        "Is it as sure as it is right?",
        "Comparisons by how sure the model is. Above the dashed line it is right more often than it expects of itself, "
        "below it less often.",
        "accuracy that the model expects of itself (%)",
        "accuracy that it has (%)",
        [ideal, Series("held-out", points, slot=1, interval="bars", marked=True, group=HELD_OUT)],
        x_name="expected %",
        y_name="accuracy %",
        x_range=(48.0, 102.0),
    )


def _worth_table(evaluation: Line) -> Table:
    length = evaluation.get("length") or {}
    rows: list[list[str | Cell]] = [["accuracy", Cell(*quantity(evaluation, "accuracy"), form="{:.1%}"), ""]]
    for key, name in (("longer_wins", "the longer one wins"), ("shorter_wins", "the shorter one wins")):
        rule = length.get(key) or {}
        gain = _percent(quantity(rule, "model_minus_baseline"))
        rows.append(
            [f"rule: {name}", Cell(*quantity(rule, "accuracy"), form="{:.1%}"), Cell(*gain, form="{:+.1f} points")]
        )
    rows += [
        ["log-likelihood, nats a pair", Cell(*quantity(evaluation, "log_likelihood")), ""],
        ["temperature", Cell(*quantity(evaluation, "temperature"), form="{:.2f}"), ""],
        ["expected calibration error", Cell(quantity(evaluation, "expected_calibration_error")[0], form="{:.1%}"), ""],
        [
            "reward and length within pairs, Pearson",
            Cell(quantity(length, "pearson_within_pairs")[0], form="{:.2f}"),
            "",
        ],
        ["the same by rank, Spearman", Cell(quantity(length, "spearman_within_pairs")[0], form="{:.2f}"), ""],
    ]
    text = (
        "Brackets: 95% interval over prompts. log-likelihood: -0.693 is that of a model without an opinion. "
        "temperature: 1 where the model is as sure as it is right, above 1 where it is too sure."
    )
    return Table("reward_model", "The reward model in numbers", ["", "value", "the model is better by"], rows, text)
