"""`pairtune judge`: files of completions, runs or models against each other on the same prompts, before a judge."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from pairtune.config import JudgeConfig, config_to_dict
from pairtune.data import (
    FILE_SUFFIXES,
    RawPrompts,
    Row,
    as_turns,
    checked_prompt,
    columns_of,
    load_dataset_rows,
    missing_column,
    shortened,
)
from pairtune.errors import PairtuneError
from pairtune.evaluation import EVALUATION_BATCH
from pairtune.evidence.head_to_head import (
    Games,
    PositionBias,
    both_orders,
    length_controlled,
    position_bias,
    ranking,
    win_matrix,
    win_rate,
    win_rate_by_length,
)
from pairtune.evidence.runs import JUDGED, evaluation_samples, group_arms, is_comparison, read_run, read_runs
from pairtune.experience import decode, sampling_params
from pairtune.feedback.judges import EndpointJudge, Judge, Judgement, Pair, Verdict, judge_pairs, load_judge
from pairtune.maths.statistics import Estimate
from pairtune.models.loading import choose_device, choose_dtype, eos_ids, load_causal_lm, load_tokenizer
from pairtune.models.logprobs import sharing
from pairtune.models.sampler import EVALUATION_STREAM, HFSampler
from pairtune.models.weights import resolve_model
from pairtune.runs.display import clean, counted, make_console, progress
from pairtune.runs.folder import as_json, flatten, is_run_folder, without_nan, write_atomic
from pairtune.runs.memory import out_of_memory
from pairtune.types import Prompt

VERDICTS = "verdicts.jsonl"

UNIMPORTANT = frozenset(
    {
        *("output_dir", "overwrite", "num_threads", "judge.batch_size", "judge.concurrency", "judge.timeout"),
        *("judge.requests_per_minute", "judge.tokens_per_minute", "judge.max_retries", "judge.cache"),
        *("judge.input_price", "judge.output_price", "judge.api_key_env"),
    }
)
"""Words that change what judging costs, not what it says."""


@dataclass(frozen=True)
class Completion:
    """One completion of a side."""

    text: str
    truncated: bool = False


@dataclass(frozen=True)
class Side:
    """Whoever is compared: completions of each prompt, from one or several training seeds."""

    name: str
    source: str
    prompts: dict[str, Prompt] = field(default_factory=dict)
    """key (see `_key`) -> prompt."""
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    """key -> the other columns of its row."""
    completions: list[dict[str, list[Completion]]] = field(default_factory=list)
    """One a seed: key -> completions. Empty for a model that is still to be sampled."""
    model: str | None = None
    """What to sample, None where the completions are there."""

    def answered(self) -> list[str]:
        """The prompts that all seeds have, in their order."""
        return [key for key in self.prompts if all(key in seed for seed in self.completions)]


@out_of_memory("judging", "lower judge.batch_size; verdicts that judge.cache holds are not asked for again")
def judge(config: JudgeConfig) -> dict[str, Any]:
    """Compare every two of the sides; prints tables, writes judge.json and verdicts.jsonl, returns the content of the
    former.

    Models are sampled first, seeded, on the prompts of `dataset` or on those that the other sides share. Every pair of
    completions is judged in both orders; two verdicts that contradict each other are a tie, and a pair without a
    verdict in both orders counts apart. Raises PairtuneError for everything that a user can mend.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    folder = Path(config.output_dir)
    _refuse_another_result(folder, config)
    sides = read_sides(config)
    wanted = _wanted(sides, config)
    arbiter = load_judge(config)
    arbiter.check(Pair(wanted.prompts[0], "Yes.", "No.", columns={name: v[0] for name, v in wanted.columns.items()}))
    if isinstance(arbiter, EndpointJudge) and any(side.model for side in sides):
        arbiter.probe()
    sides = [_sampled(side, wanted, config) if side.model else side for side in sides]
    keys, dropped = _shared(sides, config)
    contests = list(_contests(sides, keys))
    console = make_console()
    for note in dropped.values():
        for sentence in note["notes"]:
            console.print(Text(clean(sentence)), soft_wrap=True)
    judgements = judge_pairs(arbiter, [contest.pair for contest in contests])
    folder.mkdir(parents=True, exist_ok=True)
    lines = (
        json.dumps(without_nan(line), ensure_ascii=False, allow_nan=False)
        for contest, judgement in zip(contests, judgements, strict=True)
        for line in _lines(contest, judgement, sides)
    )
    # Before anything is made of them: verdicts may have cost money, and tables can be made again.
    write_atomic(folder / VERDICTS, "".join(f"{line}\n" for line in lines))
    summary = summarise(config, arbiter, sides, keys, contests, judgements, dropped)
    write_atomic(folder / JUDGED, as_json(summary))
    show(summary, console)
    if isinstance(arbiter, EndpointJudge):
        _show_usage(arbiter, console)
    console.print(Text(f"{folder / JUDGED}, {folder / VERDICTS}"), soft_wrap=True)
    return summary


def _refuse_another_result(folder: Path, config: JudgeConfig) -> None:
    """Raises PairtuneError where the folder holds the result of another comparison."""
    if config.overwrite or not (folder / JUDGED).exists():
        return
    try:
        before = flatten(json.loads((folder / JUDGED).read_text("utf-8"))["config"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise PairtuneError(f"{folder / JUDGED} is no result of pairtune judge; choose another --output_dir.") from None
    now = flatten(json.loads(json.dumps(config_to_dict(config))))
    for name in now:
        if name not in UNIMPORTANT and before.get(name) != now[name]:
            raise PairtuneError(
                f"{folder} holds a result with {name} {shortened(before.get(name))}, and here it is "
                f"{shortened(now[name])}; choose another --output_dir, or replace it with --overwrite."
            )


# ------------------------------------------------------------------------------------------------------------ the sides


def read_sides(config: JudgeConfig) -> list[Side]:
    """What is compared. Sides of one name are seeds of one side; models are not sampled yet.

    Raises PairtuneError for a path that is none of what a side can be, and for fewer than two sides.
    """
    found: dict[str, Side] = {}
    for number, text in enumerate(config.sides):
        name, equals, path = text.partition("=")
        named = bool(equals and name and path) and not Path(text).expanduser().exists()
        for side in _read_side(path if named else text, config):
            if named:
                side = replace(side, name=name)
            elif side.name in found:
                side = replace(side, name=f"{side.name} ({number + 1})")
            found[side.name] = _joined(found[side.name], side) if side.name in found else side
    if len(found) < 2:
        raise PairtuneError(
            f"there is only one side, {next(iter(found))!r}; name two or more to compare, each under a name of its own."
        )
    return list(found.values())


def _read_side(path: str, config: JudgeConfig) -> list[Side]:
    """The side that a path stands for, or the arms of a comparison."""
    place = Path(path).expanduser()
    if place.is_file():
        return [_from_rows(place.stem, path, _rows_of(place, config), config)]
    if not place.is_dir():
        if path.endswith(FILE_SUFFIXES) or path.startswith((".", "/", "~")):
            raise PairtuneError(f"there is no file or folder {path!r}; a side is one of these, or a model.")
        resolve_model(path)
        return [Side(Path(path).name, path, model=path)]
    if is_comparison(place):
        arms = group_arms(read_runs([place]))
        if not arms:
            raise PairtuneError(
                f"no cell of {path} is done yet, so it has nothing to judge; let `pairtune compare` finish one, or "
                "leave it out."
            )
        return [
            _joined(*(_from_rows(arm.name, path, _last_samples(run.folder), config) for run in arm.runs))
            for arm in arms
        ]
    name = place.resolve().name
    if is_run_folder(place) and (samples := _last_samples(place)):
        return [_from_rows(name, path, samples, config)]
    if is_run_folder(place) or (place / "config.json").is_file():
        resolve_model(path)
        return [Side(name, path, model=path)]
    raise PairtuneError(f"{path} is no run, no comparison and no model: it has neither config.yaml nor config.json.")


def _last_samples(folder: Path) -> list[Row]:
    """The completions of a run's last held-out evaluation; empty for a run that has none."""
    return evaluation_samples(read_run(folder))


def _rows_of(path: Path, config: JudgeConfig) -> list[Row]:
    """The rows of a file of completions: a dataset, or the JSON of `pairtune evaluate`."""
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise PairtuneError(f"{path} is not valid JSON ({error}); restore it.") from None
        if isinstance(content, dict) and isinstance(content.get("samples"), list):
            return list(content["samples"])
    split = config.dataset_test_split
    return load_dataset_rows(path, split=split, only_split=split)


def _from_rows(name: str, source: str, rows: Sequence[Row], config: JudgeConfig) -> Side:
    """Completions of one seed, out of rows with a prompt and a completion each."""
    if not rows:
        raise PairtuneError(f"{source} has no held-out completions; leave it out, or name one of its checkpoints.")
    names = columns_of(rows)
    written_by_us = "completion_index" in names  # an evaluation's samples, whatever the columns of a file are called
    prompt_column = "prompt" if written_by_us else config.prompt_column
    column = "completion" if written_by_us else config.completion_column
    for needed in (prompt_column, column):
        if needed not in names:
            word = "prompt_column" if needed == prompt_column else "completion_column"
            raise missing_column(needed, rows, source, f"name the right one with {word}=...")
    others = [other for other in names if other not in (prompt_column, column)] if not written_by_us else []
    side = Side(name, source, completions=[{}])
    for number, row in enumerate(rows):
        prompt = checked_prompt(row.get(prompt_column), f"row {number} of {source}")
        key = _key(prompt)
        text = _text(row.get(column), column, f"row {number} of {source}")
        side.prompts.setdefault(key, prompt)
        side.columns.setdefault(key, {other: row.get(other) for other in others})
        side.completions[0].setdefault(key, []).append(Completion(text, bool(row.get("truncated", False))))
    return side


def _text(value: Any, column: str, place: str) -> str:
    """A completion: a text, or the assistant's turn of a conversation."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0].get("content")
    if not isinstance(value, str):
        raise PairtuneError(
            f"{place}: `{column}` must be a text, or one turn of the assistant, not {shortened(value)}."
        )
    return value


def _key(prompt: Prompt) -> str:
    """What makes two prompts the same: their turns; plain text is what the user says."""
    return json.dumps([[turn["role"], turn["content"]] for turn in as_turns(prompt)])


def _joined(first: Side, *others: Side) -> Side:
    """Several seeds of one side."""
    for other in others:
        if first.model is not None or other.model is not None:
            raise PairtuneError(
                f"{first.source!r} and {other.source!r} are both called {first.name!r}, but only completions can be "
                "seeds of one side; give each model a name of its own."
            )
        first = replace(
            first,
            source=first.source if other.source == first.source else f"{first.source} {other.source}",
            completions=[*first.completions, *other.completions],
        )
    return first


# ------------------------------------------------------------------------------------------------------ sampling models


def _wanted(sides: Sequence[Side], config: JudgeConfig) -> RawPrompts:
    """The prompts to judge on, as far as they are known before models are sampled.

    Raises PairtuneError where there is none.
    """
    given = [side for side in sides if side.model is None]
    shared = _common(given) if given else []
    if config.dataset is None and not given:
        raise PairtuneError("dataset is missing; give --dataset with the prompts on which the models shall be sampled.")
    if config.dataset is None:
        prompts = [given[0].prompts[key] for key in shared]
        columns = [given[0].columns[key] for key in shared]
        raw = RawPrompts(prompts, _by_column(columns), "the prompts of the sides")
    else:
        split = config.dataset_test_split
        rows = load_dataset_rows(config.dataset, split=split, config=config.dataset_config, only_split=split)
        raw = RawPrompts.from_rows(rows, prompt_column=config.prompt_column, name=f"dataset {config.dataset!r}")
        if given:
            known = set(shared)
            raw = _rows_at(raw, [row for row, prompt in enumerate(raw.prompts) if _key(prompt) in known])
            if not len(raw):
                raise PairtuneError(
                    f"dataset {config.dataset!r} has none of the prompts of the sides; leave it out to take theirs."
                )
    return _rows_at(raw, list(range(min(len(raw), config.num_eval_prompts or len(raw)))))


def _by_column(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row.get(name) for row in rows] for name in columns_of(rows)}


def _rows_at(raw: RawPrompts, rows: Sequence[int]) -> RawPrompts:
    columns = {name: [values[row] for row in rows] for name, values in raw.columns.items()}
    return RawPrompts([raw.prompts[row] for row in rows], columns, raw.name)


@out_of_memory("sampling", "lower eval_generations or max_completion_length")
def _sampled(side: Side, wanted: RawPrompts, config: JudgeConfig) -> Side:
    """A model's completions of the prompts wanted: the same for one seed, whatever else is compared."""
    assert side.model is not None
    device = choose_device(config.device)
    tokenizer = load_tokenizer(side.model, trust_remote_code=config.trust_remote_code)
    dataset = wanted.encode(
        tokenizer, chat=config.chat, system_prompt=config.system_prompt, max_prompt_length=config.max_prompt_length
    )
    model = load_causal_lm(
        side.model,
        dtype=choose_dtype(config.dtype, device)[0],
        device=device,
        attn_implementation=config.attn_implementation,
        trust_remote_code=config.trust_remote_code,
    )
    sampler = HFSampler(
        model,
        tokenizer,
        eos_token_ids=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        opening=sharing(model)[1],
    )
    side = replace(side, completions=[{}])
    per_batch = max(1, EVALUATION_BATCH // config.eval_generations)
    with progress(f"sampling {side.name}", len(dataset)) as advance:
        for start in range(0, len(dataset), per_batch):
            rows = list(range(start, min(start + per_batch, len(dataset))))
            completions = sampler.generate(
                dataset.batch(rows, device=device),
                config.eval_generations,
                sampling_params(config),
                seed=config.seed,
                stream=EVALUATION_STREAM,
            )
            cut = completions.truncated.tolist()
            for row, texts, ends in zip(rows, decode(tokenizer, completions), cut, strict=True):
                key = _key(dataset.prompts[row])
                side.prompts.setdefault(key, dataset.prompts[row])
                side.columns.setdefault(key, {name: values[row] for name, values in dataset.columns.items()})
                if key not in side.completions[0]:  # a prompt that stands twice would count twice
                    side.completions[0][key] = [Completion(*one) for one in zip(texts, ends, strict=True)]
            advance(len(rows))
    return side


# ------------------------------------------------------------------------------------------------------------- contests


@dataclass(frozen=True)
class Contest:
    """One completion of each of two sides on one prompt."""

    pair: Pair
    sides: tuple[int, int]
    seeds: tuple[int, int]
    prompt: int
    """Its place among the prompts that are judged on."""
    completion: int


def _shared(sides: Sequence[Side], config: JudgeConfig) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """(the prompts that all sides have, by side what is left out and why)."""
    everywhere = _common(sides)
    keys = everywhere[: config.num_eval_prompts]
    fewest = {key: _fewest(sides, key) for key in keys}
    left_out = {}
    for side in sides:
        completions = [seed[key] for seed in side.completions for key in keys]
        num_judged = sum(fewest[key] for key in keys) * len(side.completions)
        count = {
            "prompts_not_shared": len(side.prompts) - len(everywhere),
            "prompts_beyond_num_eval_prompts": len(everywhere) - len(keys),
            "completions_beyond_the_fewest": sum(map(len, completions)) - num_judged,
            "empty": sum(not one.text.strip() for group in completions for one in group),
        }
        said = {
            "prompts_not_shared": ("prompt", "left out, which not all sides have"),
            "completions_beyond_the_fewest": ("completion", "left out, other sides having fewer of the same prompts"),
            "empty": ("completion", "without text, judged all the same"),
        }
        notes = [
            f"{side.name}: {counted(count[name], thing)} {words}"
            for name, (thing, words) in said.items()
            if count[name]
        ]
        left_out[side.name] = {**count, "notes": notes}
    return keys, left_out


def _common(sides: Sequence[Side]) -> list[str]:
    """The prompts that all sides have. Raises PairtuneError where there is none."""
    everywhere = set.intersection(*(set(side.answered()) for side in sides))
    if not everywhere:
        counts = ", ".join(f"{len(side.prompts)} of {side.name}" for side in sides)
        raise PairtuneError(
            f"the sides have no prompt in common ({counts}); give completions of the same prompts, word for word."
        )
    return [key for key in sides[0].answered() if key in everywhere]


def _fewest(sides: Sequence[Side], key: str) -> int:
    """How many completions of a prompt every seed of every side has."""
    return min(len(seed[key]) for side in sides for seed in side.completions)


def _contests(sides: Sequence[Side], keys: Sequence[str]) -> Iterator[Contest]:
    """Every two sides, seed by seed (the fewer go round again), prompt by prompt, completion by completion."""
    for (i, a), (j, b) in combinations(enumerate(sides), 2):
        for round_ in range(max(len(a.completions), len(b.completions))):
            s, t = round_ % len(a.completions), round_ % len(b.completions)
            for place, key in enumerate(keys):
                for k in range(_fewest(sides, key)):
                    x, y = a.completions[s][key][k], b.completions[t][key][k]
                    cut = (x.truncated, y.truncated)
                    pair = Pair(sides[0].prompts[key], x.text, y.text, cut, sides[0].columns[key])
                    yield Contest(pair, (i, j), (s, t), place, k)


def _lines(contest: Contest, judgement: Judgement, sides: Sequence[Side]) -> Iterator[dict[str, Any]]:
    """A contest's two lines of verdicts.jsonl, one an order."""
    names = tuple(sides[side].name for side in contest.sides)
    orders = (contest.pair, judgement.as_shown, 1), (contest.pair.swapped(), judgement.swapped, -1)
    for pair, verdict, step in orders:
        yield {
            "prompt_index": contest.prompt,
            "completion_index": contest.completion,
            "first": names[::step][0],
            "second": names[::step][1],
            "seeds": list(contest.seeds[::step]),
            "verdict": _word(verdict),
            "probability": verdict.probability,
            "reason": "both are the same text" if pair.first == pair.second else verdict.reason,
            "answer": verdict.answer,
            "mass": verdict.mass,
            "prompt_tokens": verdict.prompt_tokens,
            "completion_tokens": verdict.completion_tokens,
            "prompt": pair.prompt,
            "first_completion": pair.first,
            "second_completion": pair.second,
        }


def _word(verdict: Verdict) -> str | None:
    if verdict.probability is None:
        return None
    return "first" if verdict.probability > 0.5 else "second" if verdict.probability < 0.5 else "tie"


# ----------------------------------------------------------------------------------------------------------- statistics


def summarise(
    config: JudgeConfig,
    arbiter: Judge,
    sides: Sequence[Side],
    keys: Sequence[str],
    contests: Sequence[Contest],
    judgements: Sequence[Judgement],
    dropped: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """The content of judge.json. All intervals are 95% over prompts, both orders of a pair staying together, and over
    seeds where sides have several."""
    by_pair: dict[tuple[int, int], list[int]] = {}
    for number, contest in enumerate(contests):
        by_pair.setdefault(contest.sides, []).append(number)
    pairs, games = [], {}
    for (i, j), numbers in by_pair.items():
        some, said = [contests[n] for n in numbers], [judgements[n] for n in numbers]
        shape = (len(sides[i].completions), len(sides[j].completions), len(keys))
        played = _tensors(some, said, shape)
        games[sides[i].name, sides[j].name] = played.games
        pairs.append({"first": sides[i].name, "second": sides[j].name, **_contest_summary(some, said, played)})
    asked = list(dict(_asked(contests, judgements)).values())
    tokens = {name: sum(getattr(v, name) for v in asked) for name in ("prompt_tokens", "completion_tokens")}
    masses = [verdict.mass for verdict in asked if verdict.mass is not None]
    reasons = Counter(verdict.reason for verdict in asked if verdict.probability is None)
    summary: dict[str, Any] = {
        "config": config_to_dict(config),
        "judge": arbiter.name,
        "num_prompts": len(keys),
        "sides": [
            {
                "name": side.name,
                "source": side.source,
                "num_seeds": len(side.completions),
                "num_prompts": len(side.prompts),
                "left_out": {name: count for name, count in dropped[side.name].items() if name != "notes"},
            }
            for side in sides
        ],
        "pairs": pairs,
        "num_questions": len(asked),
        "no_verdict": dict(reasons.most_common()),
        "mass": sum(masses) / len(masses) if masses else None,
        "tokens": tokens,
        "cost": arbiter.endpoint.cost(*tokens.values()) if isinstance(arbiter, EndpointJudge) else None,
    }
    if len(sides) > 2:
        matrix, ranks = win_matrix(games), ranking(games)
        summary["matrix"] = {
            "names": list(matrix.names),
            "rates": [[None if rate is None else _interval(rate) for rate in row] for row in matrix.rates],
        }
        summary["ranking"] = [
            {"name": ranks.names[place], "strength": _interval(ranks.strengths[place])} for place in ranks.order
        ]
    return summary


def _asked(contests: Sequence[Contest], judgements: Sequence[Judgement]) -> Iterator[tuple[str, Verdict]]:
    """(digest of the question, verdict) of all that the judge was asked."""
    for contest, judgement in zip(contests, judgements, strict=True):
        if contest.pair.first != contest.pair.second:
            yield contest.pair.digest, judgement.as_shown
            yield contest.pair.swapped().digest, judgement.swapped


@dataclass(frozen=True)
class _Played:
    games: Games
    """Wins of the first side, contradictions as ties."""
    probable: Games
    """The same with probabilities, the mean of both orders."""
    bias: PositionBias


def _tensors(contests: Sequence[Contest], judgements: Sequence[Judgement], shape: tuple[int, int, int]) -> _Played:
    num_completions = 1 + max(contest.completion for contest in contests)
    as_shown, swapped, probability, lengths = (
        torch.full((*shape, num_completions), torch.nan, dtype=torch.float64) for _ in range(4)
    )
    identical = torch.zeros(as_shown.shape, dtype=torch.bool)
    for contest, judgement in zip(contests, judgements, strict=True):
        at = (*contest.seeds, contest.prompt, contest.completion)
        as_shown[at], swapped[at] = (_outcome(one) for one in (judgement.as_shown, judgement.swapped))
        if judgement.probability is not None:
            probability[at] = judgement.probability
        lengths[at] = len(contest.pair.first) - len(contest.pair.second)
        identical[at] = contest.pair.first == contest.pair.second

    def by_prompt(verdicts: Tensor) -> Tensor:
        """(P, S * S' * G), without pairs of the same text, of which nobody was asked."""
        return verdicts.masked_fill(identical, torch.nan).permute(2, 0, 1, 3).flatten(1)

    return _Played(
        Games.from_verdicts(both_orders(as_shown, swapped), lengths),
        Games.from_verdicts(probability, lengths),
        position_bias(by_prompt(as_shown), by_prompt(swapped)),
    )


def _outcome(verdict: Verdict) -> float:
    """1 where the completion shown first won, 0, 0.5 for a tie; NaN without a verdict."""
    return {"first": 1.0, "second": 0.0, "tie": 0.5, None: torch.nan}[_word(verdict)]


def _contest_summary(contests: Sequence[Contest], judgements: Sequence[Judgement], played: _Played) -> dict[str, Any]:
    outcomes = played.games.outcomes
    judged = [one for one in judgements if one.consistent is not None]
    identical = sum(contest.pair.first == contest.pair.second for contest in contests)
    bias, length = played.bias, length_controlled(played.games)
    return {
        "num_pairs": len(contests),
        "wins": int((outcomes == 1).sum()),
        "ties": int((outcomes == 0.5).sum()),
        "losses": int((outcomes == 0).sum()),
        "ties_by_contradiction": sum(not one.consistent for one in judged),
        "ties_of_identical_texts": identical,
        "no_verdict": len(judgements) - len(judged),
        "score": _interval(win_rate(played.games)),
        "mean_probability": _interval(win_rate(played.probable)),
        "position_bias": _interval(_complement(bias.consistent)),
        "first_in_both_orders": _interval(bias.first),
        "second_in_both_orders": _interval(bias.second),
        "won_by_first_shown": _interval(bias.won_by_first_shown),
        "length_controlled": _interval(length.win_rate),
        "length_effect": _interval(length.phi),
        "by_length_difference": [
            {"low": one.low, "high": one.high, "share": one.share, "score": _interval(one.win_rate)}
            for one in win_rate_by_length(played.games)
        ],
    }


def _complement(share: Estimate) -> Estimate:
    return share._replace(mean=1 - share.mean, low=1 - share.high, high=1 - share.low)


def _interval(estimate: Estimate) -> dict[str, float | None]:
    return dict(zip(("mean", "low", "high"), without_nan(estimate[:3]), strict=True))


# -------------------------------------------------------------------------------------------------------------- display


def show(summary: dict[str, Any], console: Console) -> None:
    """Print a result: every two sides, and for more than two the matrix and the ranking."""
    table = _table(f"judged by {summary['judge']} on {summary['num_prompts']} prompts, both orders of every pair")
    columns = ("", "against", "won/tied/lost", "score", "position bias", "no verdict")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 2 else "right", overflow="fold")
    for pair in summary["pairs"]:
        counts = "/".join(str(pair[name]) for name in ("wins", "ties", "losses"))
        bias, missing = _percent(pair["position_bias"], ends=False), f"{pair['no_verdict'] / pair['num_pairs']:.1%}"
        cells = (pair["first"], pair["second"], counts, _percent(pair["score"]), bias, missing)
        table.add_row(*map(_cell, cells))
    table.caption = (
        "score: share of pairs won, ties half; position bias: pairs of which the two orders contradict each other, "
        "counted as ties. In brackets: 95% interval over prompts, and over seeds where there are several."
    )
    table.caption_justify = "left"
    console.print(table)
    if "matrix" in summary:
        names, rates = summary["matrix"]["names"], summary["matrix"]["rates"]
        table = _table("score of row against column")
        for name in ("", *names):
            table.add_column(_cell(name), justify="right" if name else "left")
        for name, row in zip(names, rates, strict=True):
            table.add_row(_cell(name), *(_cell("" if rate is None else _percent(rate, ends=False)) for rate in row))
        console.print(table)
    if summary.get("ranking"):
        table = _table("Bradley-Terry ranking, log-odds")
        for name in ("", "strength"):
            table.add_column(name, justify="right" if name else "left")
        for one in summary["ranking"]:
            table.add_row(_cell(one["name"]), _cell(_signed(one["strength"])))
        console.print(table)
    if summary["mass"] is not None and summary["mass"] < 0.5:
        words = f"A and B together have a probability of {summary['mass']:.1%} where the verdict stands: most often "
        console.print(_cell(f"{words}{summary['judge']} would have said something else."), soft_wrap=True)
    for reason, count in summary["no_verdict"].items():
        console.print(
            _cell(f"no verdict from {count} of {summary['num_questions']} questions: {reason}"), soft_wrap=True
        )


def _show_usage(arbiter: EndpointJudge, console: Console) -> None:
    """What this run took, and what its verdicts took if earlier runs had asked some of them."""
    usage = arbiter.endpoint.usage
    cost = arbiter.endpoint.cost(usage.prompt_tokens, usage.completion_tokens)
    parts = [
        f"{usage.requests} requests sent ({usage.retries} of them again), {usage.from_cache} answers known before",
        f"{usage.prompt_tokens} tokens read and {usage.completion_tokens} written",
    ]
    if cost is not None:
        parts.append(f"cost {cost:.4f}")
    console.print(Text("; ".join(parts)), soft_wrap=True)


def _table(title: str) -> Table:
    return Table(box=box.SIMPLE_HEAD, title=_cell(title), title_justify="left", title_style="bold", show_edge=False)


def _cell(value: Any) -> Text:
    return Text(clean(str(value)))


def _percent(interval: dict[str, float | None], *, ends: bool = True) -> str:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    if mean is None:
        return "–"
    return f"{mean:.1%}" if low is None or high is None or not ends else f"{mean:.1%} [{low:.1%}, {high:.1%}]"


def _signed(interval: dict[str, float | None]) -> str:
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    return f"{mean:+.2f}" if low is None or high is None else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
