"""Run folders, read for what they say together: runs, arms (one setting over its seeds), what an arm's evaluations
measured by seed and prompt.

A run folder is what `pairtune.runs.folder` describes. A comparison folder, written by `pairtune compare`, holds

config.yaml       the resolved configuration of the comparison
cells/<name>/     an ordinary run folder each, with cell.json beside its files
cells/<name>/exact.jsonl   where the task is enumerable: per evaluation the policy's true `reward`, `kl`, `regret`,
                  `length` (tokens) and `truncated` (share), means over prompts without sampling error
sweep/<name>/     the same for the runs that chose the learning rates; they are not compared
comparison.json   all tables, see `pairtune.evidence.compare`
report.html       the page
<any>/judge.json  what `pairtune judge` found, where it was told to write in here

cell.json: `name`, `method` (its name in the comparison), `arm`, `seed`, `settings` (dotted key -> value, what the grid
chose), `status` (running, done, failed, stopped), `error` (one sentence or null), `steps`, `budget` (null until the
cell is done): `completions`, `tokens_generated`, `reward_calls`, `updates`, `forward_tokens`, `backward_tokens`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pairtune.config import METHODS
from pairtune.errors import PairtuneError
from pairtune.evidence.grid import DECIDED
from pairtune.runs import folder
from pairtune.runs.metrics import read_jsonl

if TYPE_CHECKING:
    from pairtune.evidence.frontier import Evaluated

Line = dict[str, Any]
Prompt = tuple[int, str]
"""A held-out prompt: its row, and the prompt itself as JSON, so that rows of two datasets are never taken for one."""

CELLS = "cells"
SWEEP = "sweep"
CELL = "cell.json"
EXACT = "exact.jsonl"
COMPARISON = "comparison.json"
JUDGED = "judge.json"

ALIKE = frozenset(
    {
        *(*DECIDED, "max_minutes", "save_steps", "keep_last", "report_to"),
        *("num_completions_to_log", "num_threads", "micro_batch_size", "reward_batch_size", "gradient_checkpointing"),
        *("eval_steps", "num_eval_prompts", "eval_generations"),
    }
)
"""Words that may differ between the runs of one arm: they change what is kept or measured, not what is learned. Where a
grid varies one of them all the same, its values are arms of their own."""

CONSEQUENCES = ("max_steps", "batch_size", "minibatch_size")
"""What equal budgets make of another setting. Such a word stands in an arm's name only where nothing else tells it
apart."""


@dataclass(frozen=True)
class Run:
    """One run folder as it is now. What is long is read when it is asked for."""

    folder: Path
    name: str
    config: dict[str, Any]
    """Nested, as in config.yaml; empty where a cell failed before it began."""
    environment: dict[str, Any]
    cell: dict[str, Any] | None
    """Contents of cell.json, None for a run that is no cell of a comparison."""

    @cached_property
    def metrics(self) -> list[Line]:
        return read_jsonl(self.folder / folder.METRICS)

    @cached_property
    def evaluations(self) -> list[Line]:
        return read_jsonl(self.folder / folder.EVALUATIONS)

    @cached_property
    def samples(self) -> list[Line]:
        return read_jsonl(self.folder / folder.SAMPLES)

    @cached_property
    def exact(self) -> list[Line]:
        """Of an enumerable task: what each evaluated policy truly is, in the order of steps; [] elsewhere."""
        return read_jsonl(self.folder / EXACT)

    @property
    def finished(self) -> bool:
        """False for a cell that failed, was stopped or is still at work."""
        return bool(self.config) and (self.cell is None or self.cell.get("status") == "done")

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))


@dataclass(frozen=True)
class Arm:
    """One setting, run once a seed."""

    name: str
    """Method and what tells it from the other arms of its method: "p3o joint, beta 0.05"."""
    method: str
    """What a comparison calls it, else the algorithm with its clip: "p3o joint", "online_dpo clipped"."""
    settings: dict[str, Any]
    """Dotted key -> value, of the words that differ between the arms."""
    runs: list[Run]
    """One a seed, in the order of their seeds."""


# -------------------------------------------------------------------------------------------------------------- reading


def read_run(path: str | Path) -> Run:
    """The run in a folder. Raises PairtuneError where there is none or a file of it is damaged."""
    path = Path(path)
    if not path.is_dir():
        raise PairtuneError(f"there is no run folder {path}; name the output_dir of a run or of a comparison")
    if not any((path / name).is_file() for name in (folder.CONFIG, folder.METRICS, folder.EVALUATIONS, CELL)):
        raise PairtuneError(f"{path} is no run folder: it has no {folder.CONFIG} and no {folder.METRICS}")
    return Run(
        folder=path,
        name=path.resolve().name,
        config=folder.read_config(path / folder.CONFIG) if (path / folder.CONFIG).exists() else {},
        environment=read_json(path / folder.ENVIRONMENT) or {},
        cell=read_json(path / CELL),
    )


def read_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs of several folders, in their order; a comparison folder stands for its cells, in the order of its grid.

    Each path counts once. Raises PairtuneError where a folder holds no run.
    """
    found: dict[Path, Path] = {}
    for path in map(Path, folders):
        inner = cell_folders(path)
        if not inner and is_comparison(path):
            raise PairtuneError(f"the comparison {path} has no cell yet; `pairtune compare` writes them")
        for one in inner or [path]:
            found.setdefault(one.resolve(), one)
    if not found:
        raise PairtuneError("no run folder was named; name one or more, or a folder that `pairtune compare` wrote")
    return [read_run(path) for path in found.values()]


def is_comparison(path: str | Path) -> bool:
    """Whether `pairtune compare` wrote this folder."""
    return (Path(path) / CELLS).is_dir()


def is_judged(path: str | Path) -> bool:
    """Whether `pairtune judge` wrote this folder."""
    return (Path(path) / JUDGED).is_file()


def read_judged(folders: Sequence[Path]) -> list[Line]:
    """The results of `pairtune judge` in folders, and in those directly inside of them.

    Raises PairtuneError where one is damaged or none of ours.
    """
    found = {
        file.resolve(): file
        for folder in folders
        for file in ([folder / JUDGED] if is_judged(folder) else sorted(folder.glob(f"*/{JUDGED}")))
    }
    results = []
    for file in found.values():
        result = read_json(file) or {}
        if not {"judge", "num_prompts", "sides", "pairs"} <= result.keys():
            raise PairtuneError(f"{file} is no result of `pairtune judge`; make it again, or leave its folder out")
        results.append(result)
    return results


def cell_folders(path: str | Path) -> list[Path]:
    """The cells of a comparison folder that have begun, in the order of its grid as far as comparison.json tells it."""
    found = sorted(file.parent for file in (Path(path) / CELLS).glob(f"*/{CELL}"))
    if not found:
        return []
    grid = (read_json(Path(path) / COMPARISON) or {}).get("cells", [])
    rank = {cell["name"]: number for number, cell in enumerate(grid)}
    return sorted(found, key=lambda cell: (rank.get(cell.name, len(rank)), cell.name))


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no file. Raises PairtuneError where it is damaged."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PairtuneError(f"{path} is damaged; restore or remove it") from error
    return content if isinstance(content, dict) else {}


# ----------------------------------------------------------------------------------------------------------------- arms


def group_arms(runs: Sequence[Run]) -> list[Arm]:
    """Runs that are alike but for their seed, and for words that do not change what is learned, are one arm.

    A word that a cell's recorded settings name tells arms apart, whatever it changes: somebody asked what it does.
    Sections of methods that a run does not select do not count. Cells that are not done are left out. Raises
    PairtuneError where two runs of an arm have one seed: counted twice, it would make intervals too narrow.
    """
    groups: dict[str, list[Run]] = {}
    relevant: dict[str, dict[str, Any]] = {}
    asked = {word for run in runs if run.finished for word in (run.cell or {}).get("settings") or {}}
    alike = ALIKE - (asked - set(DECIDED))
    for run in runs:
        if run.finished:
            words = _relevant(run.config, alike)
            key = json.dumps([method_of(run), words], sort_keys=True, default=str)
            groups.setdefault(key, []).append(run)
            relevant[key] = words
    differing = _differing(list(relevant.values()))
    methods = {key: method_of(group[0]) for key, group in groups.items()}
    names = _names(methods, relevant)
    arms = []
    for key, group in groups.items():
        seeds = [run.seed for run in group]
        for run in group:
            if seeds.count(run.seed) > 1:
                first, second, *_ = (str(other.folder) for other in group if other.seed == run.seed)
                raise PairtuneError(
                    f"{first} and {second} are runs of one setting and one seed, {run.seed}; leave one of them out"
                )
        settings = {word: relevant[key][word] for word in differing if word in relevant[key]}
        arms.append(Arm(names[key], methods[key], settings, sorted(group, key=lambda run: run.seed)))
    return arms


def method_of(run: Run) -> str:
    """What a comparison calls the run's method; else its algorithm, with the clip where that is a choice."""
    if run.cell is not None and run.cell.get("method"):
        return str(run.cell["method"])
    return method_name(run.config)


def method_name(config: dict[str, Any]) -> str:
    """The algorithm of a nested configuration, with the clip where that is a choice: "p3o separate", "rloo clipped"."""
    algorithm = str(config.get("algorithm", "run"))
    section = config.get(algorithm) or {}
    if algorithm == "p3o":
        clip = section.get("clip", "joint")
        return f"p3o {'unclipped' if clip == 'none' else clip}"
    return f"{algorithm} clipped" if section.get("clip") is True else algorithm


def _relevant(config: dict[str, Any], alike: Collection[str]) -> dict[str, Any]:
    """Dotted key -> value of all words but those that may differ within an arm."""
    flat = folder.flatten(config)
    others = METHODS.keys() - {config.get("algorithm")}
    return {key: value for key, value in flat.items() if key not in alike and key.partition(".")[0] not in others}


def _differing(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The keys of which two configurations have other values, in the order of the help.

    A key that only some have belongs to a section of their method, and differs where these differ.
    """
    keys = dict.fromkeys(key for config in configs for key in config)
    values = {key: [config[key] for config in configs if key in config] for key in keys}
    return [key for key in keys if any(value != values[key][0] for value in values[key])]


def _names(methods: dict[str, str], relevant: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A name for each group: its method, and the words that differ between the groups of that method."""
    names: dict[str, str] = {}
    for method in dict.fromkeys(methods.values()):
        keys = [key for key, other in methods.items() if other == method]
        words = _differing([relevant[key] for key in keys])
        telling = [word for word in words if word not in CONSEQUENCES]
        short = {key: _name(method, relevant[key], telling) for key in keys}
        if len(set(short.values())) < len(keys):
            short = {key: _name(method, relevant[key], words) for key in keys}
        names |= short
    return names


def _name(method: str, config: dict[str, Any], words: Sequence[str]) -> str:
    return ", ".join([method, *(f"{word} {shown(config.get(word))}" for word in words)])


def shown(value: Any) -> str:
    """A setting in a name: `0.05`, `1e-05`, `true`, `null`, `a b` for a list."""
    if isinstance(value, list):
        return " ".join(map(shown, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------------------------------------------------- evaluations


def evaluation_samples(run: Run, step: int | None = None) -> list[Line]:
    """The lines of samples.jsonl of one evaluation, the last one by default: a line a completion."""
    if step is None:
        step = max((line["step"] for line in run.evaluations), default=-1)
    return [line for line in run.samples if line["step"] == step and line.get("split") == "eval"]


def shared_prompts(arms: Sequence[Arm]) -> list[Prompt]:
    """The held-out prompts that every evaluation of every run of all arms has with a reward, in the order of rows."""
    tables = [_by_prompt(run) for arm in arms for run in arm.runs]
    return _shared(tables)


def evaluated(arm: Arm, prompts: Sequence[Prompt] | None = None) -> Evaluated:
    """What an arm's evaluations measured on the prompts that all of them have: at the steps that all its seeds have and
    none ends with, then at each seed's own last evaluation.

    With a budget of tokens seeds end at different steps; their ends stand side by side all the same, at the largest of
    these steps, so that the last place is where training ended and nothing else.

    Where exact.jsonl knows the truth it stands in for what was sampled: one prompt, the mean over all of them. Give
    the `shared_prompts` of several arms to pair them by prompt, as sampled. A prompt's values are the means over its
    completions; a completion without a reward does not count in the mean reward. Of a run whose last evaluation has no
    reward at all the rewards are NaN where there is none. Raises PairtuneError where nothing is shared, or where
    samples.jsonl has no KL (an older version wrote it).
    """
    import torch

    from pairtune.evidence.frontier import Evaluated

    if prompts is None and is_exact([arm]):
        return _exact_evaluated(arm)
    tables = [_by_prompt(run) for run in arm.runs]
    courses = _courses([{step for step, _ in table} for table in tables])
    if prompts is None:
        prompts = _shared(tables)
    if not courses or not prompts:
        what = "evaluation step" if not courses else "held-out prompt"
        folders = ", ".join(str(run.folder) for run in arm.runs)
        raise PairtuneError(f"the runs of {arm.name} ({folders}) share no {what}; leave out those that differ")
    values = torch.tensor(
        [
            [[table[step, prompt] for prompt in prompts] for step in course]
            for table, course in zip(tables, courses, strict=True)
        ],
        dtype=torch.float64,
    )
    steps = torch.tensor(courses).amax(0)
    reward, kl, kl_k1, length, truncated = values.unbind(-1)
    return Evaluated(steps=steps, kl=kl, kl_k1=kl_k1, reward=reward, length=length, truncated=truncated)


def _courses(evaluated: Sequence[set[int]]) -> list[list[int]]:
    """For each seed the steps of its evaluations that stand beside those of the others: the ones that all have and that
    are nobody's last, then its last. Empty where a seed has none."""
    if not all(evaluated):
        return []
    ends = [max(steps) for steps in evaluated]
    between = sorted(set.intersection(*evaluated) - set(ends))
    return [[*between, end] for end in ends]


def evaluated_together(arms: Sequence[Arm]) -> list[Evaluated]:
    """`evaluated` of several arms over the prompts that all of them have, so that they can be paired by prompt."""
    prompts = None if is_exact(arms) else shared_prompts(arms)
    return [evaluated(arm, prompts) for arm in arms]


def is_exact(arms: Sequence[Arm]) -> bool:
    """Whether every run is one of an enumerable task, so that the truth of all is known."""
    return all(run.exact for arm in arms for run in arm.runs)


def _exact_evaluated(arm: Arm) -> Evaluated:
    import torch

    from pairtune.evidence.frontier import Evaluated

    tables = [{line["step"]: line for line in run.exact} for run in arm.runs]
    courses = _courses([set(table) for table in tables])
    names = ("kl", "reward", "length", "truncated")
    values = torch.tensor(
        [
            [[math.nan if table[step][name] is None else table[step][name] for name in names] for step in course]
            for table, course in zip(tables, courses, strict=True)
        ],
        dtype=torch.float64,
    )
    steps = torch.tensor(courses).amax(0)
    kl, reward, length, truncated = values[..., None].unbind(-2)
    return Evaluated(steps=steps, kl=kl, kl_k1=kl, reward=reward, length=length, truncated=truncated)


def _shared(tables: Sequence[dict[tuple[int, Prompt], tuple[float, ...]]]) -> list[Prompt]:
    by_evaluation: list[set[Prompt]] = []
    for table in tables:
        by_step: dict[int, set[Prompt]] = {}
        for step, prompt in table:
            by_step.setdefault(step, set()).add(prompt)
        by_evaluation += by_step.values()
    return sorted(set.intersection(*by_evaluation)) if by_evaluation else []


def _by_prompt(run: Run) -> dict[tuple[int, Prompt], tuple[float, ...]]:
    """(step, prompt) -> mean reward, KL, KL by k1, length and share cut over the prompt's completions.

    Prompts without a reward are left out, unless no prompt of the last evaluation has one: then they stand with NaN,
    so that an end without rewards is seen as that and an earlier evaluation is not taken for it.
    """
    found: dict[tuple[int, Prompt], list[Line]] = {}
    for line in run.samples:
        if line.get("split") == "eval":
            prompt = (line["row"], json.dumps(line["prompt"], ensure_ascii=False, sort_keys=True))
            found.setdefault((line["step"], prompt), []).append(line)
    end = max((step for step, _ in found), default=None)
    is_rewarded = any(line["reward"] is not None for key, lines in found.items() if key[0] == end for line in lines)
    table = {}
    for key, lines in found.items():
        if any(line.get("kl") is None or "completion_ids" not in line for line in lines):
            raise PairtuneError(
                f"{run.folder / folder.SAMPLES} has no KL of each completion (an older version wrote it); run it again"
            )
        rewards = [line["reward"] for line in lines if line["reward"] is not None]
        if rewards or not is_rewarded:
            table[key] = (
                math.fsum(rewards) / len(rewards) if rewards else math.nan,
                *(math.fsum(line[name] for line in lines) / len(lines) for name in ("kl", "kl_k1")),
                sum(len(line["completion_ids"]) for line in lines) / len(lines),
                sum(line["truncated"] for line in lines) / len(lines),
            )
    return table
