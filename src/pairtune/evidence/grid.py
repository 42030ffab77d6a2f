"""What a comparison consists of: every cell with the configuration of its run, checked before anything is loaded.

A cell's settings are laid over each other: `base`, then its method's, then the point of the axes, then what the sweep
chose, then what follows from the budget. No torch here: a mistake costs no wait.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pairtune.config import METHODS, CompareConfig, TrainConfig, flat_values, nearest_key, warnings_for
from pairtune.errors import PairtuneError

MIN_UPDATES = 4
"""Updates a batch of a method with a ratio: with fewer its clip has next to nothing to do."""
WITHOUT_RATIO = ("rloo", "reinforce", "vpg")
"""Of several updates a batch only their first follows the gradient of their objective."""
MAX_SENTENCES = 5
DECIDED = ("seed", "output_dir", "resume", "overwrite")
"""Words that `compare` sets for every cell itself."""

PRESETS: dict[str, dict[str, Any]] = {
    "kl_coefficient": {"axes": {"beta": [0.02, 0.05, 0.1, 0.2]}},
    "clipping": {
        "methods": {"p3o clipped": {"algorithm": "p3o"}, "p3o unclipped": {"algorithm": "p3o", "p3o.clip": "none"}},
        "learning_rate_factors": [1 / 3, 1.0, 3.0],
    },
    "clip_form": {
        "methods": {"p3o joint": {"algorithm": "p3o"}, "p3o separate": {"algorithm": "p3o", "p3o.clip": "separate"}}
    },
    "kl_at": {
        "methods": {
            "p3o, KL of the current policy": {"algorithm": "p3o"},
            "p3o, KL of the sampling policy": {"algorithm": "p3o", "p3o.kl_at": "sampling"},
        }
    },
    "num_generations": {"axes": {"num_generations": [2, 4, 8]}},
    "reward_noise": {"axes": {"reward_noise": [0.0, 0.5, 1.0]}},
}
"""Ready-made ablations: P3O paper, appendix C.2 (clipping, KL coefficient); RLOO paper, section 5.3 (noise, there in
units of its reward model); the rest are choices that the P3O paper leaves open."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    name: str
    """Of its folder."""
    method: str
    """Name in the tables."""
    settings: dict[str, Any]
    """Dotted key -> value: the point of the axes, and what the sweep tries."""
    config: TrainConfig
    """Of its run; what the sweep is to choose is not in it yet."""
    notes: list[str] = field(default_factory=list)
    """What is allowed, but not what it seems."""

    @property
    def seed(self) -> int:
        return self.config.seed


@dataclass(frozen=True)
class Grid:
    """Everything that a comparison runs."""

    cells: list[Cell]
    sweep: list[Cell]
    """The runs that choose; empty without a sweep."""
    notes: list[str]
    """Sentences about the whole, the remainder of the budget among them; each once."""


@dataclass(frozen=True)
class _Point:
    """A cell before its configuration is built."""

    method: str
    settings: dict[str, Any]
    own: dict[str, Any]
    """What the method and the cell set themselves, over `base`."""
    seed: int


def grid_of(config: CompareConfig) -> Grid:
    """The cells of a comparison in their order: by method, by point of the axes, by seed.

    Raises PairtuneError with one sentence a mistake, naming a cell that has it.
    """
    base = _base_of(config)
    methods = _methods_of(config)
    axes = _axes_of(config, base)
    _refuse_decided(config, methods)
    _refuse_unknown(config, [base, *methods.values(), axes, config.sweep.axes])
    points = list(_points(config, methods, axes))
    mistakes: dict[str, list[str]] = {}
    cells = [_cell(config, base, point, mistakes) for point in points]
    sweep = [_cell(config, base, point, mistakes, sweep=True) for point in _sweep_points(config, methods, axes)]
    if mistakes:
        sentences = [_for_cells(sentence, names) for sentence, names in mistakes.items()]
        raise PairtuneError("\n".join(sentences[:MAX_SENTENCES]))
    built, swept = (_told_apart([cell for cell in some if cell is not None]) for some in (cells, sweep))
    names = [cell.name for cell in built]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise PairtuneError(
            f"two cells are called {twice}, for they have one method, one setting and one seed; leave one of them out, "
            "or give it a method name of its own."
        )
    _refuse_one_run_twice(config, built)
    notes: dict[str, list[str]] = {}
    for cell in [*built, *swept]:
        for note in cell.notes:
            notes.setdefault(note, []).append(cell.method)
    told = [f"{', '.join(dict.fromkeys(its))}: {note}" for note, its in notes.items()]
    return Grid(built, swept, told)


def slug(text: str) -> str:
    """A name for a folder: lower-case letters, digits, dots, `_` and single dashes."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-.") or "cell"


def _told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of another method or setting whose names are spelt alike as folders, "P3O+" and "P3O-", get a few digits of
    what they are. The first keeps its name, so that a comparison may gain such a cell."""
    first: dict[str, str] = {}
    found = []
    for cell in cells:
        what = json.dumps([cell.method, cell.settings], sort_keys=True, default=str)
        if first.setdefault(cell.name, what) != what:
            stem, _, seed = cell.name.rpartition("_")
            name = f"{stem}_{hashlib.sha256(what.encode()).hexdigest()[:6]}_{seed}"
            path = str(Path(cell.config.output_dir).with_name(name))
            cell = replace(cell, name=name, config=cell.config.model_copy(update={"output_dir": path}))
        found.append(cell)
    return found


def _refuse_one_run_twice(config: CompareConfig, cells: Sequence[Cell]) -> None:
    """Cells that only their names tell apart: after the whole grid had run, no table could be made of them."""
    known: dict[str, Cell] = {}
    for cell in cells:
        values = {key: value for key, value in flat_values(cell.config).items() if key != "output_dir"}
        chosen = sorted(config.sweep.axes.keys() - cell.settings.keys())  # not in the configuration yet
        first = known.setdefault(json.dumps([cell.method, chosen, values], sort_keys=True, default=str), cell)
        if first is not cell:
            raise PairtuneError(
                f"the cells {first.name} and {cell.name} come to one and the same run, whatever tells their names "
                "apart (a budget sets max_steps itself, say); leave one of them out."
            )


# ------------------------------------------------------------------------------------------------- what is laid in what


def _base_of(config: CompareConfig) -> dict[str, Any]:
    base = _flat(config.base)
    if config.task.policy is not None:
        # Names for the record: the model, its language and its rewards are made in memory.
        base |= {
            "model": f"task-{config.task.policy}",
            "dataset": "task",
            "dataset_test_split": "test",
            "max_completion_length": config.task.max_completion_length,
        }
    return base | {"num_threads": base.get("num_threads") or 1}


def _methods_of(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Name -> its settings, flat."""
    given = config.methods or PRESETS.get(config.preset or "", {}).get("methods", {})
    if not given:
        algorithm = str(_flat(config.base).get("algorithm", "p3o"))
        return {algorithm: {"algorithm": algorithm}}
    if isinstance(given, list):
        return {name: {"algorithm": name} for name in given}
    return {name: _flat(settings or {}) for name, settings in given.items()}


def _axes_of(config: CompareConfig, base: Mapping[str, Any]) -> dict[str, list[Any]]:
    preset = PRESETS.get(config.preset or "", {})
    axes = dict(preset.get("axes", {}))
    if "learning_rate_factors" in preset and "learning_rate" not in config.sweep.axes:
        rate = float(base.get("learning_rate", TrainConfig.model_fields["learning_rate"].default))
        axes["learning_rate"] = [float(f"{rate * factor:.3g}") for factor in preset["learning_rate_factors"]]
    return {**axes, **config.axes}


def _refuse_decided(config: CompareConfig, methods: Mapping[str, Mapping[str, Any]]) -> None:
    """Words that every cell gets from `compare`, whatever a layer says; a single cell may name its seed."""
    layers: list[tuple[str, Mapping[str, Any]]] = [(f"methods.{name}", own) for name, own in methods.items()]
    layers += [("axes", config.axes), ("sweep.axes", config.sweep.axes)]
    layers += [("cells", {key: value for key, value in cell.items() if key != "seed"}) for cell in config.cells]
    sentences = [
        f"{key} stands in {where}, but `pairtune compare` sets it for every cell; "
        + ("use seeds." if key == "seed" else "leave it out.")
        for where, layer in layers
        for key in DECIDED
        if key in layer
    ]
    sentences += [
        f"{key} stands in sweep.axes, but how a run of the sweep is measured is not for it to choose; leave it out."
        for key in _sweep_evaluation(config)
        if key in config.sweep.axes
    ]
    if sentences:
        raise PairtuneError("\n".join(list(dict.fromkeys(sentences))[:MAX_SENTENCES]))


def _refuse_unknown(config: CompareConfig, layers: Sequence[Mapping[str, Any]]) -> None:
    """Keys that `train` does not have, once each and not once a cell."""
    known = list(flat_values(TrainConfig(model="m", dataset="d")))
    sentences = []
    for key in dict.fromkeys(key for layer in layers for key in layer):
        if key not in known:
            nearest = nearest_key(key, known)
            mend = f"the nearest is {nearest}" if nearest else "`pairtune train --help` lists all of them"
            sentences.append(f"{key} is not a setting of `pairtune train`; {mend}.")
    for cell in config.cells:
        if "method" not in cell:
            sentences.append(f"a cell in cells ({cell}) has no method; give one, so that the tables can name it.")
    if sentences:
        raise PairtuneError("\n".join(sentences[:MAX_SENTENCES]))


def _points(
    config: CompareConfig, methods: Mapping[str, Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]
) -> Iterator[_Point]:
    for method, own in methods.items():
        its_axes = {key: values for key, values in axes.items() if _concerns(key, own, config)}
        for values in itertools.product(*its_axes.values()):
            settings = dict(zip(its_axes, values, strict=True))
            for seed in config.seeds:
                yield _Point(method, settings, {**own, **settings}, seed)
    for cell in config.cells:
        extra = _flat({key: value for key, value in cell.items() if key not in ("method", "seed")})
        method = str(cell["method"])
        for seed in [cell["seed"]] if "seed" in cell else config.seeds:
            yield _Point(method, extra, {**methods.get(method, {}), **extra}, seed)


def _sweep_points(
    config: CompareConfig, methods: Mapping[str, Mapping[str, Any]], axes: Mapping[str, Sequence[Any]]
) -> Iterator[_Point]:
    """For every method each point of the sweep, the comparison's own axes at their middle value."""
    if not config.sweep.axes:
        return
    for method, own in methods.items():
        middle = {key: values[len(values) // 2] for key, values in axes.items() if _concerns(key, own, config)}
        tried = {key: values for key, values in config.sweep.axes.items() if _concerns(key, own, config)}
        for values in itertools.product(*tried.values()):
            settings = dict(zip(tried, values, strict=True))
            yield _Point(method, settings, {**own, **middle, **settings}, config.sweep.seed)


def _concerns(key: str, own: Mapping[str, Any], config: CompareConfig) -> bool:
    """A setting in a section of another method says nothing about this one."""
    section, dot, _ = key.partition(".")
    algorithm = own.get("algorithm", _flat(config.base).get("algorithm", "p3o"))
    return not dot or section not in METHODS or section == algorithm


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        else:
            flat[str(key)] = value
    return flat


# --------------------------------------------------------------------------------------------------------------- a cell


def _cell(
    config: CompareConfig,
    base: Mapping[str, Any],
    point: _Point,
    mistakes: dict[str, list[str]],
    *,
    sweep: bool = False,
) -> Cell | None:
    """Builds a cell; what is wrong with it goes into `mistakes`, sentence -> names of the cells that have it."""
    tokens = ", ".join(f"{key} {_word(value)}" for key, value in point.settings.items())
    shown = ", ".join(filter(None, (point.method, tokens, f"seed {point.seed}")))
    parts = [slug(point.method), *(slug(f"{key}-{_word(value)}") for key, value in point.settings.items())]
    name = "_".join([*parts, f"seed-{point.seed}"])
    values = {**base, **point.own, "seed": point.seed}
    if sweep:
        values |= _sweep_evaluation(config)
    folder = Path(config.output_dir) / ("sweep" if sweep else "cells") / name
    values |= {"output_dir": str(folder), "resume": True}
    notes: list[str] = []
    try:
        try:
            values |= _equal_steps(config, values, base, point.own)
            notes = _updates(values, point.own)
            notes += _budgeted(values, config, config.sweep.completions if sweep else None)
        except (TypeError, ValueError) as error:
            if isinstance(error, PairtuneError):
                raise
            # What cannot be reckoned with is no number, and is refused as that.
        train_config = TrainConfig(**values)
    except PairtuneError as error:
        for sentence in str(error).splitlines():
            mistakes.setdefault(sentence, []).append(shown)
        return None
    # Doing nothing is worth a sentence; that rloo takes one update a batch has been settled above.
    notes += warnings_for(train_config)
    flat = flat_values(train_config)
    return Cell(name, point.method, {key: flat[key] for key in point.settings}, train_config, notes)


def _sweep_evaluation(config: CompareConfig) -> dict[str, Any]:
    """How a run of the sweep is measured: only its end decides."""
    own = {"dataset_test_split": config.sweep.split, "eval_generations": config.sweep.eval_generations}
    return {"eval_steps": 0, **{key: value for key, value in own.items() if value is not None}}


def _word(value: Any) -> str:
    """A value in a name. YAML reads 1e-5 as text, which is no reason for another name."""
    try:
        return f"{float(value):g}" if not isinstance(value, bool) else str(value).lower()
    except (TypeError, ValueError):
        return str(value)


def completions_a_prompt(values: Mapping[str, Any]) -> int:
    """Completions that a prompt of a batch stands for: K, or the two of a preference."""
    if _offline(values):
        return 2
    return int(values.get("num_generations", TrainConfig.model_fields["num_generations"].default))


def _offline(values: Mapping[str, Any]) -> bool:
    """Whether a method learns from a dataset of completions, not from its own."""
    method = METHODS.get(values.get("algorithm", "p3o"))
    return method is not None and (method.offline or _switched_on(values, "copg.offline", of="copg"))


def _equal_steps(
    config: CompareConfig, values: Mapping[str, Any], base: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """batch_size such that every step has as many completions as a step of `base`, in as many minibatches.

    A method or a cell that sets batch_size itself is left alone.
    """
    if "batch_size" in own:
        return {}
    usual = int(base.get("batch_size", TrainConfig.model_fields["batch_size"].default))
    per_step = config.budget.completions_per_step or usual * completions_a_prompt(base)
    per_prompt = completions_a_prompt(values)
    if per_step % per_prompt:
        raise PairtuneError(
            f"a step has {per_step} completions, of which groups of {per_prompt} cannot be made; set "
            f"budget.completions_per_step to a multiple of {per_prompt}, or batch_size for this method."
        )
    changed = {"batch_size": per_step // per_prompt}
    if base.get("minibatch_size") is not None and "minibatch_size" not in own:
        num_minibatches = usual // int(base["minibatch_size"])
        if num_minibatches == 0 or changed["batch_size"] % num_minibatches:
            raise PairtuneError(
                f"minibatch_size is {base['minibatch_size']}, which cuts a batch of {usual} prompts into "
                f"{num_minibatches} updates, and {changed['batch_size']} prompts cannot be cut so; give another."
            )
        changed["minibatch_size"] = changed["batch_size"] // num_minibatches
    return changed


def _updates(values: dict[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Sets num_iterations where neither method nor cell does: as many updates a batch as the method makes use of."""
    algorithm = values.get("algorithm", "p3o")
    method = METHODS.get(algorithm)
    if method is None:
        return []  # TrainConfig refuses it
    batch_size = int(values.get("batch_size", TrainConfig.model_fields["batch_size"].default))
    minibatches = batch_size // int(values.get("minibatch_size") or batch_size) or 1
    iterations = int(values.get("num_iterations", TrainConfig.model_fields["num_iterations"].default))
    uses_ratios = method.uses_ratios or _switched_on(values, f"{algorithm}.clip", of=algorithm)
    if uses_ratios and iterations * minibatches < MIN_UPDATES:
        if "num_iterations" in own:
            return [
                f"num_iterations is {iterations}, so a batch is used for {iterations * minibatches} updates; with "
                f"fewer than {MIN_UPDATES} a ratio hardly leaves 1 and its clip has little to do."
            ]
        values["num_iterations"] = math.ceil(MIN_UPDATES / minibatches)
    elif not uses_ratios and (algorithm in WITHOUT_RATIO or _offline(values)) and "num_iterations" not in own:
        values["num_iterations"] = 1
    return []


def _switched_on(values: Mapping[str, Any], key: str, *, of: str) -> bool:
    """Whether a switch of a method's section is on, and that method chosen. YAML quotes may have made it a text."""
    return values.get("algorithm", "p3o") == of and values.get(key) in (True, "true")


def _budgeted(values: dict[str, Any], config: CompareConfig, completions: int | None) -> list[str]:
    """max_steps (or max_generated_tokens) from the budget; returns what the steps leave over."""
    completions = completions or config.budget.completions
    default = TrainConfig.model_fields
    per_step = int(values.get("batch_size", default["batch_size"].default)) * completions_a_prompt(values)
    if config.budget.tokens is not None and completions is None:
        values["max_generated_tokens"] = config.budget.tokens
        # A completion has a token or more, so no run needs more steps than this.
        values["max_steps"] = math.ceil(config.budget.tokens / per_step)
        return []
    if completions is None:
        return []
    values["max_steps"] = completions // per_step
    if values["max_steps"] == 0:
        raise PairtuneError(
            f"a budget of {completions} completions is less than one step of {per_step}; give more, or a smaller "
            "batch_size."
        )
    left = completions - values["max_steps"] * per_step
    if not left:
        return []
    return [
        f"of {completions} completions {values['max_steps']} steps of {per_step} take {completions - left}; {left} are "
        "left over."
    ]


def _for_cells(sentence: str, names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f'cell "{names[0]}"{others}: {sentence}'
