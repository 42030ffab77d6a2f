"""Datasets that already hold completions: preferences and scored completions, as token ids in padded groups; and
examples to imitate, as token ids of which some are learned.

What is tokenised here once is what sampling would have produced: the prompt's ids are those of `RawPrompts.encode`, a
completion's ids follow them and end with EOS, or without it where the length cap cuts.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pairtune.data import (
    HUMAN,
    Chat,
    PromptDataset,
    PromptFormat,
    RawPrompts,
    Row,
    as_turns,
    check_characters,
    check_turns,
    checked_prompt,
    columns_of,
    dataset_name,
    dialogue_prompt,
    load_dataset_rows,
    missing_column,
    prompts_are_implicit,
    shared_prompt,
    shortened,
)
from pairtune.errors import PairtuneError
from pairtune.runs.display import counted
from pairtune.types import Completions, Prompt, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pairtune.config import RewardConfig, SFTConfig, TrainConfig

IDENTICAL = "chosen and rejected are identical"
DIFFERENT_EARLIER = "chosen and rejected differ before the assistant's last turn"
EMPTY = "a completion is empty"
NOT_ONE_TURN = "a completion is not one turn of the assistant"
TOO_FEW = "fewer than two scored completions"
ONE_RANK = "all its completions have one rank"
NO_PROMPT = "there is no prompt before the completion"
EMPTY_TEXT = "a text is empty"
NO_TURN = "no turn of the assistant has text and something before it"
"""Why something of a dataset is left out."""

UNCUT = 2**62
"""A length cap that cuts nothing."""

MARK = "pairtune-answer"
"""Stands for an answer where a chat template is asked what it writes around one."""
LARGEST = torch.finfo(torch.float32).max


# From text to token ids.


@dataclass(frozen=True)
class EncodedCompletion:
    """The token ids of one completion, as sampling would have produced them."""

    ids: list[int]
    """At most `max_completion_length`, EOS included."""
    truncated: bool
    """True where the length cap ended it, not EOS."""


def encode_completions(
    raw: RawPrompts,
    completions: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: Chat = "auto",
    system_prompt: str | None = None,
    max_completion_length: int = 256,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[EncodedCompletion]]:
    """Tokenise completions behind their prompts: the texts `completions[p]` continue `raw.prompts[p]`.

    Text is taken as it stands: for a plain prompt it goes right behind the prompt, in a conversation it is the content
    of the assistant's turn. The ids are those that follow the prompt's when both are tokenised together; where a token
    would reach across the border, which no sampler can produce, the completion is tokenised alone.

    A completion ends with the first token that would have ended it when sampled: EOS, or what the chat template closes
    the assistant's turn with. Where neither stands there, EOS is put behind. One of more than `max_completion_length`
    tokens is cut to its beginning, without EOS.

    Raises PairtuneError if the tokenizer has no EOS token, if the template leaves out what the assistant says, and for
    whatever `RawPrompts.encode` refuses.
    """
    eos_token_id = eos_of(tokenizer)
    prompt_format = raw.format(
        tokenizer, chat=chat, system_prompt=system_prompt, chat_template_kwargs=chat_template_kwargs
    )
    _, closing = _around_answer(prompt_format, raw.prompts[0], raw.place(0))
    closing_id = _special_token(tokenizer, closing)

    openings: list[str] = []
    texts: list[str] = []
    for row, (prompt, group) in enumerate(zip(raw.prompts, completions, strict=True)):
        opening = prompt_format.text(prompt, raw.place(row))
        openings += [opening] * len(group)
        texts += [_continuation(prompt_format, prompt, text, opening, raw.place(row)) for text in group]
    if closing_id is None:  # a turn is closed with plain text, such as a newline, or not at all
        texts = [text.removesuffix(closing) for text in texts]
    end_ids = {eos_token_id, closing_id}
    encoded = iter(
        _ended(ids, end_ids, eos_token_id, max_completion_length) for ids in _ids_behind(prompt_format, openings, texts)
    )
    return [[next(encoded) for _ in group] for group in completions]


def answer_end(raw: RawPrompts, tokenizer: PreTrainedTokenizerBase, *, chat: Chat = "auto") -> list[int]:
    """The ids that a finished answer ends with: the token that ends it, EOS or what the chat template closes the
    assistant's turn with, then what the template writes behind that (a newline, for many).

    Raises PairtuneError where `encode_completions` does.
    """
    _, closing = _around_answer(raw.format(tokenizer, chat=chat), raw.prompts[0], raw.place(0))
    closing_id = _special_token(tokenizer, closing)
    if closing_id is None:  # plain text, or a template that closes a turn with plain text
        return [eos_of(tokenizer)]
    ids = list(tokenizer(closing, add_special_tokens=False)["input_ids"])
    return ids[ids.index(closing_id) :]


def eos_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's EOS token; raises PairtuneError if it has none."""
    eos_token_id = tokenizer.eos_token_id
    if not isinstance(eos_token_id, int):
        raise PairtuneError(
            f"the tokenizer of {tokenizer.name_or_path!r} has no EOS token, so no completion could end: "
            "set its eos_token and save it."
        )
    return eos_token_id


def _around_answer(prompt_format: PromptFormat, prompt: Prompt, place: str) -> tuple[str, str]:
    """What is written before an answer to `prompt`, the prompt included, and what behind it."""
    before, mark, behind = prompt_format.text(prompt, place, MARK).rpartition(MARK)
    if not mark:
        raise PairtuneError(
            f"{place}: the chat template of {prompt_format.tokenizer.name_or_path!r} leaves out what the assistant "
            "says, so nothing can be learned from completions; give the tokenizer another template."
        )
    return before, behind


def _special_token(tokenizer: PreTrainedTokenizerBase, closing: str) -> int | None:
    """The first special token in what a template writes behind an answer; it need not be the tokenizer's EOS."""
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = tokenizer(closing, add_special_tokens=False)["input_ids"]
    return next((token_id for token_id in ids if token_id in special - {tokenizer.unk_token_id}), None)


def _continuation(prompt_format: PromptFormat, prompt: Prompt, completion: str, opening: str, place: str) -> str:
    """The text that stands behind the opened prompt once the assistant has spoken."""
    text = prompt_format.text(prompt, place, completion)
    if text.startswith(opening):
        return text[len(opening) :]
    # Some templates open a turn otherwise than they write a finished one, for instance with the start of a thought.
    before, _ = _around_answer(prompt_format, prompt, place)
    return text[len(before) :]


def _ids_behind(prompt_format: PromptFormat, openings: list[str], texts: list[str]) -> list[list[int]]:
    """The ids of texts, each behind its opening."""
    distinct = list(dict.fromkeys(openings))
    opening_ids = dict(zip(distinct, prompt_format.token_ids(distinct), strict=True))
    joint = prompt_format.token_ids([opening + text for opening, text in zip(openings, texts, strict=True)])
    behind = []
    for opening, text, ids in zip(openings, texts, joint, strict=True):
        before = opening_ids[opening]
        if ids[: len(before)] == before:
            behind.append(ids[len(before) :])
        else:
            behind.append(list(prompt_format.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))
    return behind


def _ended(ids: list[int], end_ids: set[int | None], eos_token_id: int, max_length: int) -> EncodedCompletion:
    end = next((place for place, token_id in enumerate(ids) if token_id in end_ids), None)
    ids = [*ids, eos_token_id] if end is None else ids[: end + 1]
    return EncodedCompletion(ids[:max_length], truncated=len(ids) > max_length)


# From token ids to batches.


@dataclass(frozen=True)
class OfflineBatch:
    """A batch of prompts with the completions and rewards that a dataset holds for them."""

    prompts: Prompts
    completions: Completions
    """A completion that a prompt lacks has a mask that is False throughout. Nothing is known of the law that sampled:
    `sampler_logprobs` are 0."""
    rewards: Tensor
    """(P, K) float32; for preferences 1 for chosen, 0 for rejected. 0 where `reward_mask` is False."""
    reward_mask: Tensor
    """(P, K) bool, True where there is a completion."""


@dataclass(frozen=True)
class OfflineDataset:
    """Prompts with tokenised completions and their rewards, in the order of `PromptDataset`."""

    prompt_dataset: PromptDataset
    completions: list[list[EncodedCompletion]]
    """The completions of each prompt; of preferences (chosen, rejected)."""
    rewards: list[list[float]]
    """One for each completion."""
    notes: list[str]
    """What of the dataset is not used and why, for the user to read."""

    def __len__(self) -> int:
        return len(self.prompt_dataset)

    @property
    def name(self) -> str:
        """What error messages call it."""
        return self.prompt_dataset.name

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts as the dataset gave them."""
        return self.prompt_dataset.prompts

    @property
    def num_completions(self) -> int:
        """K: the completions of the prompt that has most. One number for all batches, so that all processes agree."""
        return max(map(len, self.completions))

    def step_rows(self, seed: int, step: int, batch_size: int) -> list[int]:
        """The rows of training step `step` (from 0); see `PromptDataset.step_rows`."""
        return self.prompt_dataset.step_rows(seed, step, batch_size)

    def batch(self, rows: Sequence[int], *, device: torch.device | str = "cpu") -> OfflineBatch:
        """The named rows as one batch, completions (P, K, T) right-padded to its longest one."""
        prompts = self.prompt_dataset.batch(rows, device=device)
        width = max(len(completion.ids) for row in rows for completion in self.completions[row])
        shape = (len(rows), self.num_completions)
        ids = torch.full((*shape, width), self.prompt_dataset.pad_token_id, dtype=torch.int64)
        mask = torch.zeros((*shape, width), dtype=torch.bool)
        truncated, rewards = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.float32)
        for p, row in enumerate(rows):
            rewards[p, : len(self.rewards[row])] = torch.tensor(self.rewards[row])
            for k, completion in enumerate(self.completions[row]):
                ids[p, k, : len(completion.ids)] = torch.tensor(completion.ids)
                mask[p, k, : len(completion.ids)] = True
                truncated[p, k] = completion.truncated
        return OfflineBatch(
            prompts=prompts,
            completions=Completions(
                prompt_ids=prompts.ids,
                prompt_mask=prompts.mask,
                completion_ids=ids.to(device),
                completion_mask=mask.to(device),
                sampler_logprobs=torch.zeros(mask.shape, dtype=torch.float32, device=device),
                truncated=truncated.to(device),
                policy_version=0,
            ),
            rewards=rewards.to(device),
            reward_mask=mask.any(-1).to(device),
        )


# From rows to groups.


def load_preferences(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, dataset: Any = None) -> OfflineDataset:
    """The preferences of the training split, tokenised: groups of two, (chosen, rejected), rewarded 1 and 0.

    `dataset` takes the place of the configuration's; see `load_dataset_rows` for what it may be. A row has `chosen` and
    `rejected`, and a prompt, explicit in `prompt_column` or implicit (see `shared_prompt`). Each side is a string, or a
    list with one turn of the assistant, before which the prompt's turns may be repeated. Other columns are kept.

    Left out, counted and told in `notes`: rows whose sides are identical (also: once cut), of which one is empty, or
    which differ before the assistant's last turn, and prompts longer than max_prompt_length.

    Raises PairtuneError for whatever else is wrong with the data, and if nothing is left.
    """
    return encode_preferences(*training_rows(config, dataset), config, tokenizer)


def encode_preferences(
    rows: list[Row],
    name: str,
    config: TrainConfig | RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cut_dialogues: bool = False,
) -> OfflineDataset:
    """Rows as groups of two; see `load_preferences`.

    With `cut_dialogues` a dialogue longer than max_prompt_length loses its oldest turns, see `without_oldest_turns`.
    """
    for column in ("chosen", "rejected"):
        if column not in columns_of(rows):
            raise missing_column(column, rows, name, "preferences have `chosen` and `rejected`.")
    implicit = prompts_are_implicit(rows, config.prompt_column, name)
    groups: list[_Group] = []
    left_out: Counter[tuple[str, str]] = Counter()
    for number, row in enumerate(rows):
        place = f"row {number} of {name}"
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if isinstance(chosen, str | list) and chosen == rejected:
            left_out["row", IDENTICAL] += 1
            continue
        if implicit:
            prompt = shared_prompt(row, place)
            chosen, rejected = row["chosen"][len(prompt) :], row["rejected"][len(prompt) :]
        else:
            prompt = checked_prompt(row.get(config.prompt_column), place)
        sides = [_answer(chosen, prompt, f"{place}: `chosen`"), _answer(rejected, prompt, f"{place}: `rejected`")]
        answers = [side for side in sides if side is not None]
        if implicit and (len(answers) < 2 or _differ_earlier(row)):
            left_out["row", DIFFERENT_EARLIER] += 1
        elif len(answers) < 2:
            left_out["row", NOT_ONE_TURN] += 1
        elif not all(answer.strip() for answer in answers):
            left_out["row", EMPTY] += 1
        else:
            groups.append(_Group(checked_prompt(prompt, place), number, row, answers, [1.0, 0.0]))
    used = (config.prompt_column, "chosen", "rejected")
    others = [column for column in columns_of(rows) if column not in used]
    return _encoded(groups, left_out, others, name, config, tokenizer, cut_dialogues=cut_dialogues)


def encode_rankings(
    rows: list[Row],
    name: str,
    config: RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cut_dialogues: bool = False,
) -> OfflineDataset:
    """Ranked completions, tokenised: one group a row, each completion rewarded with minus its rank.

    A row has a prompt in `prompt_column` and lists of equal length in `completions` and `ranks`: whole numbers, the
    smallest is the best, equal ones are tied. Ranks of two rows are never compared, not even of one prompt.

    Left out, counted and told in `notes`: completions that are empty or not one turn of the assistant, prompts with
    fewer than two completions, with nothing but copies of one or with all of one rank, and prompts longer than
    max_prompt_length (with `cut_dialogues` only what is longer without its oldest turns).

    Raises PairtuneError for whatever else is wrong with the data, and if nothing is left.
    """
    for column in (config.prompt_column, "completions", "ranks"):
        if column not in columns_of(rows):
            raise missing_column(column, rows, name, "rankings have `prompt`, `completions` and `ranks`.")
    groups: list[_Group] = []
    left_out: Counter[tuple[str, str]] = Counter()
    for number, row in enumerate(rows):
        place = f"row {number} of {name}"
        prompt = checked_prompt(row.get(config.prompt_column), place)
        group = _Group(prompt, number, row, [], [])
        ranked = _Scored("completions", row.get("completions"), "ranks", row.get("ranks"))
        _add(group, ranked, lambda rank, place: -_whole(rank, place), left_out, place)
        if len(group.completions) > 1 and len(set(group.rewards)) == 1:
            left_out["prompt", ONE_RANK] += 1
        else:
            groups.append(group)
    used = (config.prompt_column, "completions", "ranks")
    others = [column for column in columns_of(rows) if column not in used]
    return _encoded(groups, left_out, others, name, config, tokenizer, cut_dialogues=cut_dialogues)


def load_scored(config: TrainConfig, tokenizer: PreTrainedTokenizerBase, dataset: Any = None) -> OfflineDataset:
    """The scored completions of the training split, tokenised and grouped by equal prompt, in order of appearance.

    `dataset` takes the place of the configuration's; see `load_dataset_rows` for what it may be. A row has a prompt in
    `prompt_column` with one `completion` and its `reward`, or with lists of them in `completions` and `rewards`; a
    completion is written as in `load_preferences`. Which policy it is from does not matter.

    Left out, counted and told in `notes`: completions that are empty or not one turn of the assistant, prompts with
    fewer than two completions or with nothing but copies of one, and prompts longer than max_prompt_length.

    Raises PairtuneError for whatever else is wrong with the data, a reward that is no finite number among it, and if
    nothing is left.
    """
    rows, name = training_rows(config, dataset)
    column_names = columns_of(rows)
    in_lists = "completions" in column_names and "completion" not in column_names
    completion_column, reward_column = ("completions", "rewards") if in_lists else ("completion", "reward")
    if config.prompt_column not in column_names:
        raise missing_column(config.prompt_column, rows, name, "name the right one with prompt_column=...")
    for column in (completion_column, reward_column):
        if column not in column_names:
            mend = "scored completions have `completion` and `reward`, or lists in `completions` and `rewards`."
            raise missing_column(column, rows, name, mend)
    groups: dict[str, _Group] = {}
    left_out: Counter[tuple[str, str]] = Counter()
    for number, row in enumerate(rows):
        place = f"row {number} of {name}"
        prompt = checked_prompt(row.get(config.prompt_column), place)
        key = json.dumps(prompt, sort_keys=True, default=repr)
        group = groups.setdefault(key, _Group(prompt, number, row, [], []))
        completions, rewards = row.get(completion_column), row.get(reward_column)
        if not in_lists:
            completions, rewards = [completions], [rewards]
        scored = _Scored(completion_column, completions, reward_column, rewards)
        _add(group, scored, _finite, left_out, place)
    return _encoded(list(groups.values()), left_out, [], name, config, tokenizer)


@dataclass(frozen=True)
class _Group:
    """The completions of one prompt, as text."""

    prompt: Prompt
    number: int
    """The row that the prompt was first met in."""
    row: Row
    completions: list[str]
    rewards: list[float]


class _Scored(NamedTuple):
    """The two columns of a row that hold completions and a number for each, by name."""

    completion_column: str
    completions: Any
    number_column: str
    numbers: Any


def _add(
    group: _Group,
    row: _Scored,
    reward_of: Callable[[Any, str], float],
    left_out: Counter[tuple[str, str]],
    place: str,
) -> None:
    """Adds to a group the completions of a row that can be learned from, with what `reward_of` makes of their
    numbers; counts the others."""
    completions, numbers = row.completions, row.numbers
    if not (isinstance(completions, list) and isinstance(numbers, list) and len(completions) == len(numbers)):
        raise PairtuneError(
            f"{place}: `{row.completion_column}` and `{row.number_column}` must be lists of equal length, "
            f"not {_described(completions)} and {_described(numbers)}."
        )
    for completion, number in zip(completions, numbers, strict=True):
        reward = reward_of(number, place)
        answer = _answer(completion, group.prompt, f"{place}: `{row.completion_column}`")
        if answer is None:
            left_out["completion", NOT_ONE_TURN] += 1
        elif not answer.strip():
            left_out["completion", EMPTY] += 1
        else:
            group.completions.append(answer)
            group.rewards.append(reward)


def training_rows(config: TrainConfig | SFTConfig | RewardConfig, dataset: Any = None) -> tuple[list[Row], str]:
    """The rows of the training split, of `dataset` or else the configuration's, and what to call them."""
    source = config.dataset if dataset is None else dataset
    variant = config.dataset_config if dataset is None else None
    return load_dataset_rows(source, split=config.dataset_train_split, config=variant), dataset_name(source)


def _answer(value: Any, prompt: Prompt, place: str) -> str | None:
    """What the assistant says to `prompt`; None if that is anything but one turn of the assistant."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PairtuneError(f"{place} is {_described(value)}; it must be a string or a list of role/content turns.")
    check_turns(value, place)
    turns = [(turn["role"], turn["content"]) for turn in value]
    asked = [(turn["role"], turn["content"]) for turn in as_turns(prompt)]
    if turns[: len(asked)] == asked:
        turns = turns[len(asked) :]
    if not turns:
        return ""
    return turns[0][1] if len(turns) == 1 and turns[0][0] == "assistant" else None


def _differ_earlier(row: Row) -> bool:
    """Whether the two sides are dialogues in one string that part before the assistant's last turn."""
    return isinstance(row["chosen"], str) and dialogue_prompt(row["chosen"]) != dialogue_prompt(row["rejected"])


def _finite(reward: Any, place: str) -> float:
    """A reward that is a number within float32. True and false are none, nor is an empty cell."""
    if isinstance(reward, int | float) and not isinstance(reward, bool) and abs(reward) <= LARGEST:
        return float(reward)
    raise PairtuneError(
        f"{place}: the reward {shortened(reward)} is not a finite number; correct it, or leave the row out."
    )


def _whole(rank: Any, place: str) -> float:
    """A rank that is a whole number, by value: 2.0 is one too."""
    if isinstance(rank, int | float) and not isinstance(rank, bool) and abs(rank) <= 2**24 and rank == int(rank):
        return float(rank)
    raise PairtuneError(
        f"{place}: the rank {shortened(rank)} is not a whole number; write 1 for the best, 2 for the next, and so on."
    )


def _described(value: Any) -> str:
    if value is None:
        return "missing"
    return f"a list of {len(value)}" if isinstance(value, list) else f"of type {type(value).__name__}"


def _encoded(
    groups: list[_Group],
    left_out: Counter[tuple[str, str]],
    columns: list[str],
    name: str,
    config: TrainConfig | RewardConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    cut_dialogues: bool = False,
) -> OfflineDataset:
    """The groups that can be learned from, as token ids. `left_out` counts (unit, reason) so far."""

    def keep(kept: list[_Group], among: list[_Group], reason: str) -> list[_Group]:
        if len(kept) < len(among):
            left_out["prompt", reason] = len(among) - len(kept)
        if not kept:
            raise PairtuneError(f"nothing is left of {name} to learn from: {'; '.join(_told(left_out))}.")
        return kept

    groups = keep([group for group in groups if len(group.completions) > 1], groups, TOO_FEW)
    _check_characters(groups, name)
    num_shortened = 0
    if cut_dialogues:
        whole = _raw(groups, [], name)
        prompts = without_oldest_turns(
            whole,
            whole.format(tokenizer, chat=config.chat, system_prompt=config.system_prompt),
            config.max_prompt_length,
        )
        num_shortened = sum(prompt != group.prompt for prompt, group in zip(prompts, groups, strict=True))
        groups = [replace(group, prompt=prompt) for prompt, group in zip(prompts, groups, strict=True)]
    encoded = encode_completions(
        _raw(groups, [], name),
        [group.completions for group in groups],
        tokenizer,
        chat=config.chat,
        system_prompt=config.system_prompt,
        max_completion_length=config.max_completion_length,
    )
    encoded_of = {group.number: completions for group, completions in zip(groups, encoded, strict=True)}
    different = [group for group in groups if len({tuple(c.ids) for c in encoded_of[group.number]}) > 1]
    reason = f"its completions do not differ within max_completion_length={config.max_completion_length} tokens"
    groups = keep(different, groups, reason)
    prompt_dataset = _raw(groups, columns, name).encode(
        tokenizer, chat=config.chat, system_prompt=config.system_prompt, max_prompt_length=config.max_prompt_length
    )
    rewards_of = {group.number: group.rewards for group in groups}
    completions = [encoded_of[number] for number in prompt_dataset.numbers]
    notes = [*_told(left_out), *prompt_dataset.notes]
    if num_shortened:
        notes.append(f"{counted(num_shortened, 'dialogue')} longer than max_prompt_length lost their oldest turns")
    if num_cut := sum(completion.truncated for group in completions for completion in group):
        notes.append(f"{counted(num_cut, 'completion')} cut at max_completion_length={config.max_completion_length}")
    rewards = [rewards_of[number] for number in prompt_dataset.numbers]
    return OfflineDataset(prompt_dataset, completions, rewards, notes)


def without_oldest_turns(raw: RawPrompts, prompt_format: PromptFormat, max_prompt_length: int) -> list[Prompt]:
    """The prompts, where dialogues of more than `max_prompt_length` tokens have lost as many of their oldest turns as
    it takes, and all but the last turn of the user at most.

    A dialogue is a conversation, whose system turn stays, or a string in the markup of the HH datasets. What it still
    begins with is a turn of the user. Other text stays as it is: half a question is another question.
    """
    prompts = list(raw.prompts)
    to_measure = list(range(len(prompts)))
    while to_measure:
        texts = [prompt_format.text(prompts[row], raw.place(row)) for row in to_measure]
        measured = zip(to_measure, prompt_format.token_ids(texts), strict=True)
        to_measure = []
        for row, ids in measured:
            shorter = _without_first_exchange(prompts[row]) if len(ids) > max_prompt_length else None
            if shorter is not None:
                prompts[row] = shorter
                to_measure.append(row)
    return prompts


def _without_first_exchange(prompt: Prompt) -> Prompt | None:
    """A dialogue from the user's second turn on; None where there is none."""
    if isinstance(prompt, str):
        marker = f"\n\n{HUMAN}"
        second = prompt.find(marker, 1) if dialogue_prompt(prompt) == prompt else -1
        return prompt[second:] if second > 0 else None
    asked = [place for place, turn in enumerate(prompt) if turn["role"] == "user"]
    system = prompt[:1] if prompt[0]["role"] == "system" else []
    return [*system, *prompt[asked[1] :]] if len(asked) > 1 else None


def _raw(groups: list[_Group], columns: list[str], name: str) -> RawPrompts:
    return RawPrompts(
        prompts=[group.prompt for group in groups],
        columns={column: [group.row.get(column) for group in groups] for column in columns},
        name=name,
        numbers=[group.number for group in groups],
    )


def _check_characters(groups: Sequence[_Group], name: str) -> None:
    """Raises PairtuneError for half of a character, in completions too: before anything is cut or rendered."""
    for group in groups:
        check_characters([group.prompt, group.completions], f"row {group.number} of {name}")


def _told(left_out: Counter[tuple[str, str]]) -> list[str]:
    return [f"{counted(count, unit)} left out: {reason}" for (unit, reason), count in left_out.items()]


# Examples to imitate.


@dataclass(frozen=True)
class Example:
    """One sequence of token ids, some of which are learned."""

    ids: list[int]
    """What the model reads, up to the last token that is learned."""
    learned: list[int]
    """Places in `ids` of the tokens to predict, ascending; never 0, for nothing stands before the first token."""


@dataclass(frozen=True)
class ExampleDataset:
    """Tokenised examples."""

    examples: list[Example]
    notes: list[str]
    """What of the dataset is not used and why, for the user to read."""
    name: str
    """What error messages call it."""


def load_examples(
    config: SFTConfig, tokenizer: PreTrainedTokenizerBase, *, train_dataset: Any = None, eval_dataset: Any = None
) -> tuple[ExampleDataset, ExampleDataset | None]:
    """The examples to learn and the held-out ones, tokenised; the second is None where `dataset_test_split` is null.

    Datasets passed in take the place of the configuration's; see `load_dataset_rows` for what they may be. In what
    form they are is told by the columns that they have, in this order:

    `completion_column`  a completion of the prompt in `prompt_column`, both as `load_preferences` takes them. Without
                         that column the prompt is read from the completion, where it is a whole conversation or a
                         dialogue in the markup of the HH datasets, or from what `chosen` and `rejected` share.
    `messages_column`    a conversation, every turn of the assistant is learned, with the token that ends it
    `text_column`        plain text, learned from its second token on, with EOS behind it

    Raises PairtuneError for whatever is wrong with the data, and if nothing is left to learn.
    """
    train = encode_examples(*training_rows(config, train_dataset), config, tokenizer)
    held_out = held_out_rows(config, train_dataset=train_dataset, eval_dataset=eval_dataset)
    return train, None if held_out is None else encode_examples(*held_out, config, tokenizer)


def held_out_rows(
    config: SFTConfig | RewardConfig, *, train_dataset: Any = None, eval_dataset: Any = None
) -> tuple[list[Row], str] | None:
    """The held-out rows and what to call them; None where `dataset_test_split` is null and no dataset is passed in.

    Rows without named splits are all held out if their dataset was named for this purpose.
    """
    separate = config.eval_dataset if eval_dataset is None else eval_dataset
    if eval_dataset is None and config.dataset_test_split is None:
        return None
    split = config.dataset_test_split or "test"
    if separate is not None:
        variant = config.dataset_config if eval_dataset is None else None
        return load_dataset_rows(separate, split=split, config=variant, only_split=split), dataset_name(separate)
    source = config.dataset if train_dataset is None else train_dataset
    variant = config.dataset_config if train_dataset is None else None
    return load_dataset_rows(source, split=split, config=variant), dataset_name(source)


def encode_examples(
    rows: list[Row], name: str, config: SFTConfig, tokenizer: PreTrainedTokenizerBase
) -> ExampleDataset:
    """Rows as examples; see `load_examples`. Each row is one, but a conversation may become several: see `_joined`.

    Left out, counted and told in `notes`: what is empty, what is not one turn of the assistant, prompts longer than
    max_prompt_length, and what has nothing to learn within max_length.
    """
    column_names = columns_of(rows)
    left_out: Counter[tuple[str, str]] = Counter()
    if config.completion_column in column_names:
        answers = _answers(rows, name, config, left_out)
        examples = _behind_prompts(answers, name, config, tokenizer, left_out)
    elif config.messages_column in column_names:
        turns = _assistant_turns(rows, name, config, left_out)
        examples = _joined(turns, name, config, tokenizer)
    elif config.text_column in column_names:
        examples = _texts(rows, name, config, tokenizer, left_out)
    else:
        mend = f"examples are in `{config.completion_column}`, `{config.messages_column}` or `{config.text_column}`."
        raise missing_column(config.completion_column, rows, name, mend)

    fitting = [example for example in examples if example.learned and example.learned[0] < config.max_length]
    if len(fitting) < len(examples):
        reason = f"nothing to learn stands within max_length={config.max_length} tokens"
        left_out["example", reason] = len(examples) - len(fitting)
    notes = _told(left_out)
    if not fitting:
        raise PairtuneError(f"nothing is left of {name} to learn from: {'; '.join(notes)}.")
    if num_cut := sum(len(example.ids) > config.max_length for example in fitting):
        notes.append(f"{counted(num_cut, 'example')} cut at max_length={config.max_length}")
    kept = [_cut(example, config.max_length) for example in fitting]
    return ExampleDataset(kept, notes, name)


def _cut(example: Example, max_length: int) -> Example:
    learned = [place for place in example.learned if place < max_length]
    return Example(example.ids[: learned[-1] + 1], learned)


def _answers(rows: list[Row], name: str, config: SFTConfig, left_out: Counter[tuple[str, str]]) -> list[_Group]:
    """The rows that have a prompt and a completion."""
    explicit = config.prompt_column in columns_of(rows)
    groups = []
    for number, row in enumerate(rows):
        place = f"row {number} of {name}"
        if explicit:
            prompt = checked_prompt(row.get(config.prompt_column), place)
            answer = _answer(row.get(config.completion_column), prompt, f"{place}: `{config.completion_column}`")
        else:
            prompt, answer = _implicit(row, rows, name, place, config)
        if not prompt:
            left_out["row", NO_PROMPT] += 1
        elif answer is None:
            left_out["row", NOT_ONE_TURN] += 1
        elif not answer.strip():
            left_out["row", EMPTY] += 1
        else:
            groups.append(_Group(prompt, number, row, [answer], []))
    return groups


def _implicit(row: Row, rows: list[Row], name: str, place: str, config: SFTConfig) -> tuple[Prompt, str | None]:
    """The prompt and the answer of a completion that holds both; an empty prompt where there is none, and None for an
    answer that is not the assistant's."""
    value = row.get(config.completion_column)
    if isinstance(value, list):
        check_turns(value, place)
        spoken = bool(value) and value[-1]["role"] == "assistant"
        return value[:-1], value[-1]["content"] if spoken else None
    if not isinstance(value, str):
        what = f"{place}: `{config.completion_column}` is {_described(value)}"
        raise PairtuneError(f"{what}; it must be a string or a list of role/content turns.")
    prompt = dialogue_prompt(value)
    if prompt is None:
        prompts_are_implicit(rows, config.prompt_column, name)  # refuses what is no preference dataset either
        identical = row.get("chosen") == row.get("rejected")
        prompt = "" if identical or not value else str(shared_prompt(row, place))
    return prompt, value[len(prompt) :]


def _behind_prompts(
    groups: list[_Group],
    name: str,
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    left_out: Counter[tuple[str, str]],
) -> list[Example]:
    """Each completion behind its prompt, the completion learned."""
    examples = []
    for _, prompt_ids, completion_ids in _encoded_answers(groups, name, config, tokenizer):
        if len(prompt_ids) > config.max_prompt_length:
            left_out["row", f"its prompt is longer than max_prompt_length={config.max_prompt_length} tokens"] += 1
        else:
            ends = len(prompt_ids), len(prompt_ids) + len(completion_ids)
            examples.append(Example(prompt_ids + completion_ids, list(range(*ends))))
    return examples


def _assistant_turns(rows: list[Row], name: str, config: SFTConfig, left_out: Counter[tuple[str, str]]) -> list[_Group]:
    """Every turn of the assistant behind all that precedes it."""
    groups = []
    for number, row in enumerate(rows):
        place, turns = f"row {number} of {name}", row.get(config.messages_column)
        if not isinstance(turns, list):
            what = f"{place}: `{config.messages_column}` is {_described(turns)}"
            raise PairtuneError(f"{what}; it must be a list of role/content turns.")
        check_turns(turns, place)
        spoken = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
        # A turn with nothing before it stays what others are read behind: sampling cannot begin from nothing.
        usable = [k for k in spoken if k > 0 and turns[k]["content"].strip()]
        groups += [_Group(turns[:k], number, row, [turns[k]["content"]], []) for k in usable]
        if not usable:
            left_out["conversation", NO_TURN] += 1
        elif len(usable) < len(spoken):
            left_out["turn", "it is empty, or the first of its conversation"] += len(spoken) - len(usable)
    return groups


def _joined(groups: list[_Group], name: str, config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The turns of each conversation as one example, each behind the very ids that sampling would start from.

    Where a template writes an earlier turn otherwise once another follows (some leave out its thought), no one sequence
    is right for both turns: the later one begins an example of its own.
    """
    examples: list[Example] = []
    last_number = -1
    for group, prompt_ids, completion_ids in _encoded_answers(groups, name, config, tokenizer):
        learned = list(range(len(prompt_ids), len(prompt_ids) + len(completion_ids)))
        if group.number == last_number and prompt_ids[: len(examples[-1].ids)] == examples[-1].ids:
            learned = examples.pop().learned + learned
        examples.append(Example(prompt_ids + completion_ids, learned))
        last_number = group.number
    return examples


def _encoded_answers(
    groups: list[_Group], name: str, config: SFTConfig, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[_Group, list[int], list[int]]]:
    """Each group with the ids of its prompt and of its one completion, neither of them cut."""
    if not groups:
        return []
    _check_characters(groups, name)
    raw = _raw(groups, [], name)
    settings: dict[str, Any] = {"chat": config.chat, "system_prompt": config.system_prompt}
    prompts = raw.encode(tokenizer, max_prompt_length=UNCUT, **settings)
    completions = encode_completions(
        raw, [group.completions for group in groups], tokenizer, max_completion_length=UNCUT, **settings
    )
    return [
        (group, ids, completion.ids)
        for group, ids, (completion,) in zip(groups, prompts.token_ids, completions, strict=True)
    ]


def _texts(
    rows: list[Row],
    name: str,
    config: SFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    left_out: Counter[tuple[str, str]],
) -> list[Example]:
    """Plain texts with EOS behind each, all but the first token learned."""
    eos_token_id = eos_of(tokenizer)
    groups: list[_Group] = []
    for number, row in enumerate(rows):
        text = row.get(config.text_column)
        if not isinstance(text, str):
            what = f"row {number} of {name}: `{config.text_column}` is {_described(text)}"
            raise PairtuneError(f"{what}; it must be a string.")
        if text.strip():
            groups.append(_Group(text.removesuffix(str(tokenizer.eos_token)), number, row, [], []))
        else:
            left_out["row", EMPTY_TEXT] += 1
    if not groups:
        return []
    _check_characters(groups, name)
    texts = [str(group.prompt) for group in groups]
    encoded = RawPrompts(prompts=list(texts), columns={}, name=name).format(tokenizer, chat="never").token_ids(texts)
    return [Example([*ids, eos_token_id], list(range(1, len(ids) + 1))) for ids in encoded]
