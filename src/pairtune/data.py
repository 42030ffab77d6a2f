"""Prompts: from a dataset in TRL's formats to token ids, in an order that depends on nothing but the seed and the step.

Rows count from 0 everywhere: in error messages, in `Prompts.rows` and in the order.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pairtune.errors import PairtuneError
from pairtune.runs.display import counted
from pairtune.types import Prompt, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pairtune.config import EvaluateConfig, TrainConfig

Row = dict[str, Any]
Chat = Literal["auto", "always", "never"]

EVERYDAY = Path(__file__).parent / "demo" / "everyday.jsonl"
FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
SPLIT_COLUMN = "split"
HUMAN, ASSISTANT = "Human:", "\n\nAssistant:"
"""How the HH datasets mark the turns of a dialogue that is one string (Bai et al. 2022, arXiv 2204.05862)."""


# Where rows come from.


def load_prompts(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, train_dataset: Any = None, eval_dataset: Any = None
) -> tuple[PromptDataset, PromptDataset | None]:
    """The training prompts and the held-out ones, tokenised.

    Datasets passed in take the place of the configuration's `dataset` and `eval_dataset`; see `load_dataset_rows` for
    what they may be. Without an evaluation dataset the held-out prompts are the test split of the training dataset, or
    None where `dataset_test_split` is null.

    Raises PairtuneError for whatever is wrong with the data.
    """
    source = config.dataset if train_dataset is None else train_dataset
    variant = config.dataset_config if train_dataset is None else None
    rows = load_dataset_rows(source, split=config.dataset_train_split, config=variant)
    train = _encoded(rows, source, config, tokenizer)
    return train, load_held_out(config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)


def load_held_out(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, train_dataset: Any = None, eval_dataset: Any = None
) -> PromptDataset | None:
    """The held-out prompts alone, as `load_prompts` finds them."""
    if eval_dataset is not None:
        return load_eval_prompts(config, tokenizer, eval_dataset)
    if config.dataset_test_split is None:
        return None
    if config.eval_dataset is not None:
        return load_eval_prompts(config, tokenizer, config.eval_dataset)
    source = config.dataset if train_dataset is None else train_dataset
    variant = config.dataset_config if train_dataset is None else None
    return _encoded(
        load_dataset_rows(source, split=config.dataset_test_split, config=variant), source, config, tokenizer
    )


def load_eval_prompts(
    config: TrainConfig | EvaluateConfig, tokenizer: PreTrainedTokenizerBase, dataset: Any = None
) -> PromptDataset:
    """The held-out prompts of `dataset` (by default the configuration's), tokenised.

    Rows without named splits are all held out: the dataset was named for this purpose.

    Raises PairtuneError for whatever is wrong with the data.
    """
    split = config.dataset_test_split or "test"
    source, variant = (config.dataset, config.dataset_config) if dataset is None else (dataset, None)
    return _encoded(load_dataset_rows(source, split=split, config=variant, only_split=split), source, config, tokenizer)


def _encoded(
    rows: list[Row], source: Any, config: TrainConfig | EvaluateConfig, tokenizer: PreTrainedTokenizerBase
) -> PromptDataset:
    return RawPrompts.from_rows(rows, prompt_column=config.prompt_column, name=dataset_name(source)).encode(
        tokenizer, chat=config.chat, system_prompt=config.system_prompt, max_prompt_length=config.max_prompt_length
    )


def load_dataset_rows(dataset: Any, *, split: str, config: str | None = None, only_split: str = "train") -> list[Row]:
    """The rows of one split of a dataset, as dictionaries.

    `dataset` is "everyday" (the prompts shipped with pairtune), a .jsonl, .jsonl.gz, .json or .parquet file, a folder
    that `datasets` can read, a hub id, or Python data: a list of dictionaries, a `datasets.Dataset`, or a mapping from
    split to one of these (a `datasets.DatasetDict`). `config` is the hub's name for a variant of a dataset.

    A file and Python data have no named splits of their own. Where their rows have a `split` column it selects (and is
    dropped); where they have none, everything is the split `only_split` and any other split is refused: a held-out set
    must be named, not guessed. The caller gives the test split's name as `only_split` for a dataset that is meant to be
    held out as a whole. A split may be cut, `test[:32]` or `test[32:]`, as `datasets` cuts those of the hub.

    Raises PairtuneError if the dataset, the file or the split does not exist, is empty, or cannot be read.
    """
    name = dataset_name(dataset)
    is_local = not isinstance(dataset, str | Path) or _is_file(dataset)
    if is_local and (cut := re.fullmatch(r"(.+)\[(-?\d*):(-?\d*)\]", split)):
        start, stop = (int(end) if end else None for end in cut.groups()[1:])
        whole = load_dataset_rows(dataset, split=cut[1], config=config, only_split=re.sub(r"\[.*\]$", "", only_split))
        if not whole[start:stop]:
            raise PairtuneError(f"{name} has no rows in split {split!r}: {cut[1]} has {len(whole)}; cut it elsewhere.")
        return whole[start:stop]
    if isinstance(dataset, str | Path) and not _is_file(dataset):
        rows = _load_with_datasets(str(dataset), config, split, only_split)
    elif config is not None:
        raise PairtuneError(
            f"dataset_config {config!r} has no meaning for {name}: only a dataset of the hub has variants."
        )
    elif isinstance(dataset, str | Path):
        path = EVERYDAY if dataset == "everyday" else Path(dataset).expanduser()
        rows = _select_split(_read_file(path), split, only_split, name)
    elif isinstance(dataset, Mapping):
        if split not in dataset:
            raise PairtuneError(f"{name} has no split {split!r}; it has {listed(dataset)}.")
        rows = _python_rows(dataset[split], name)
    else:
        rows = _select_split(_python_rows(dataset, name), split, only_split, name)
    if not rows:
        raise PairtuneError(f"{name} has no rows in split {split!r}; give a file with rows, or another split.")
    return rows


def dataset_name(dataset: Any) -> str:
    """What error messages call a dataset."""
    return (
        f"dataset {str(dataset)!r}" if isinstance(dataset, str | Path) else f"the {type(dataset).__name__} of prompts"
    )


def listed(names: Iterable[str]) -> str:
    """Names as an error message lists them."""
    return ", ".join(f"`{name}`" for name in names) or "none"


def _is_file(dataset: str | Path) -> bool:
    return dataset == "everyday" or Path(dataset).expanduser().is_file()


def _select_split(rows: list[Row], split: str, only_split: str, name: str) -> list[Row]:
    if not any(SPLIT_COLUMN in row for row in rows):
        if split == only_split:
            return rows
        raise PairtuneError(
            f"{name} has no split {split!r}, for its rows have no `{SPLIT_COLUMN}` column: name the held-out prompts "
            f"with eval_dataset=..., give the rows a `{SPLIT_COLUMN}` column, or switch evaluation off "
            "(dataset_test_split=null)."
        )
    selected = [
        {column: value for column, value in row.items() if column != SPLIT_COLUMN}
        for row in rows
        if row.get(SPLIT_COLUMN) == split
    ]
    if not selected:
        splits = sorted({str(row.get(SPLIT_COLUMN)) for row in rows})
        raise PairtuneError(f"{name} has no split {split!r}; its `{SPLIT_COLUMN}` column has {listed(splits)}.")
    return selected


def _python_rows(dataset: Any, name: str) -> list[Row]:
    if hasattr(dataset, "to_list"):  # a datasets.Dataset, without importing datasets
        dataset = dataset.to_list()
    if not isinstance(dataset, Sequence) or isinstance(dataset, str | bytes):
        raise PairtuneError(f"{name} cannot be read as a dataset: pass a list of dictionaries or a datasets.Dataset.")
    for number, row in enumerate(dataset):
        if not isinstance(row, Mapping):
            raise PairtuneError(
                f'row {number} of {name} is a {type(row).__name__}, not a dictionary like {{"prompt": "..."}}.'
            )
    return [dict(row) for row in dataset]


def _read_file(path: Path) -> list[Row]:
    if not path.name.endswith(FILE_SUFFIXES):
        raise PairtuneError(f"cannot read {path} as a dataset: its name must end in one of {', '.join(FILE_SUFFIXES)}.")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:  # gzip.BadGzipFile is an OSError
        raise PairtuneError(f"cannot read {path}: {error}.") from error
    return _parse_json_array(text, path) if path.suffix == ".json" else _parse_json_lines(text, path)


def _parse_json_lines(text: str, path: Path) -> list[Row]:
    rows = []
    # Not splitlines(): a JSON string may hold a bare U+2028, which is a line break to Python and not to JSON Lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise PairtuneError(
                f"{path}:{number}: this line is not valid JSON ({error.msg}, column {error.colno}); "
                'each line must be one object like {"prompt": "..."}.'
            ) from error
        if not isinstance(row, dict):
            raise PairtuneError(
                f'{path}:{number}: this line must be one object like {{"prompt": "..."}}, not {shortened(row)}.'
            )
        rows.append(row)
    return rows


def _parse_json_array(text: str, path: Path) -> list[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # a complete value and then another: JSON Lines under the name .json
            return _parse_json_lines(text, path)
        raise PairtuneError(f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}).") from error
    if isinstance(rows, dict):
        rows = [rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise PairtuneError(
            f'{path} must hold a list of objects like [{{"prompt": "..."}}], or one such object a line.'
        )
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise PairtuneError(f"cannot read {path} as Parquet: {first_line(error)}") from error


def _load_with_datasets(dataset: str, config: str | None, split: str, only_split: str) -> list[Row]:
    """A folder or a hub id, by way of the `datasets` library."""
    folder = Path(dataset).expanduser()
    if not folder.is_dir():
        looks_local = dataset.endswith(FILE_SUFFIXES) or dataset.startswith((".", "/", "~"))
        if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", dataset):
            raise PairtuneError(
                f"there is no file or folder {dataset!r} in {os.getcwd()}; a dataset is a {', '.join(FILE_SUFFIXES)} "
                "file, a folder, the id of a dataset on the hub, or `everyday`."
            )
    import datasets

    described = f"dataset {dataset!r}" + (f" ({config})" if config else "")
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            return load_dataset_rows(datasets.load_from_disk(str(folder)), split=split, only_split=only_split)
        return datasets.load_dataset(str(folder) if folder.is_dir() else dataset, config, split=split).to_list()
    except PairtuneError:
        raise
    except Exception as error:  # datasets raises a dozen kinds, from a missing config to no network
        raise PairtuneError(f"cannot load split {split!r} of {described}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What an exception says, as one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def shortened(value: Any, limit: int = 60) -> str:
    """A value as an error message quotes it."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 3] + "...")
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def check_characters(texts: Any, place: str) -> None:
    """Raises PairtuneError for half of a surrogate pair, which JSON can hold (`"\\ud83d"`) and no tokenizer reads."""
    try:
        (texts if isinstance(texts, str) else json.dumps(texts, ensure_ascii=False, default=repr)).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise PairtuneError(
            f"{place}: its text holds {half!r}, which is half of a character; correct it, or leave the row out."
        ) from None


# From rows to prompts.


@dataclass(frozen=True)
class RawPrompts:
    """The prompts of a dataset, checked, before any tokenizer; all plain text or all conversations."""

    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    """The other columns, one value a prompt (None where a row lacks it); they reach the reward functions."""
    name: str
    """What error messages call it."""
    numbers: list[int] | None = None
    """The row of the dataset that each prompt came from; None: the first prompt is row 0, and so on."""

    def __post_init__(self) -> None:
        for row, prompt in enumerate(self.prompts):
            if isinstance(prompt, str) != isinstance(self.prompts[0], str):
                raise PairtuneError(
                    f"{self.place(row)} and its row {self.number(0)} differ in kind, one being plain text and the "
                    "other a conversation; write all prompts the same way."
                )

    @classmethod
    def from_rows(cls, rows: Sequence[Row], *, prompt_column: str = "prompt", name: str = "the dataset") -> RawPrompts:
        """Take the prompt of each row, in any of TRL's dataset types.

        A prompt is a string or a list of `{"role", "content"}` turns. It stands in `prompt_column`; what stands beside
        it (`completion`, `chosen`, `rejected`, ...) is kept as columns. Rows with `chosen` and `rejected` alone hold it
        implicitly, see `shared_prompt`.

        Raises PairtuneError naming the row for a missing column, an empty prompt, a wrong type, a conversation that
        ends with the assistant, or a mixture of strings and conversations.
        """
        implicit = prompts_are_implicit(rows, prompt_column, name)
        prompts: list[Prompt] = []
        for number, row in enumerate(rows):
            place = f"row {number} of {name}"
            prompt = shared_prompt(row, place) if implicit else row.get(prompt_column)
            prompts.append(checked_prompt(prompt, place))
        column_names = columns_of(rows)
        columns = {column: [row.get(column) for row in rows] for column in column_names if column != prompt_column}
        return cls(prompts, columns, name)

    def __len__(self) -> int:
        return len(self.prompts)

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: Chat = "auto",
        system_prompt: str | None = None,
        max_prompt_length: int = 512,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PromptDataset:
        """Tokenise all prompts once.

        Conversations go through the tokenizer's chat template, opened for the assistant's turn. So do plain prompts, as
        one user turn behind `system_prompt`, if `chat` is "always", or "auto" and the tokenizer has a template; what
        `chat_template_kwargs` holds is handed to the template. A template writes its special tokens itself, so none are
        added to its text; plain prompts get the tokenizer's own, with one BOS at most and no EOS behind them.

        Prompts of more than `max_prompt_length` tokens are left out (never cut: half a question is another question).

        Raises PairtuneError if there is no template where one is needed, if the template refuses a prompt, if a system
        prompt has nowhere to go, if a prompt holds half of a character, or if no prompt is short enough.
        """
        for row, prompt in enumerate(self.prompts):
            check_characters(prompt, self.place(row))
        prompt_format = self.format(
            tokenizer, chat=chat, system_prompt=system_prompt, chat_template_kwargs=chat_template_kwargs
        )
        texts = [prompt_format.text(prompt, self.place(row)) for row, prompt in enumerate(self.prompts)]
        encoded = prompt_format.token_ids(texts)
        for row, ids in enumerate(encoded):
            if not ids:
                raise PairtuneError(f"{self.place(row)}: the prompt {shortened(texts[row])} has no tokens.")
        kept = [row for row, ids in enumerate(encoded) if len(ids) <= max_prompt_length]
        if not kept:
            raise PairtuneError(
                f"all {len(self)} prompts of {self.name} are longer than max_prompt_length={max_prompt_length} tokens "
                f"(the shortest has {min(map(len, encoded))}): raise max_prompt_length."
            )
        return PromptDataset(
            prompts=[self.prompts[row] for row in kept],
            columns={column: [values[row] for row in kept] for column, values in self.columns.items()},
            token_ids=[encoded[row] for row in kept],
            numbers=[self.number(row) for row in kept],
            num_left_out=len(self) - len(kept),
            name=self.name,
            pad_token_id=_first_given(tokenizer.pad_token_id, tokenizer.eos_token_id, 0),
        )

    def number(self, row: int) -> int:
        """The row of the dataset that prompt `row` came from."""
        return row if self.numbers is None else self.numbers[row]

    def place(self, row: int) -> str:
        """What error messages call prompt `row`."""
        return f"row {self.number(row)} of {self.name}"

    def format(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat: Chat = "auto",
        system_prompt: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> PromptFormat:
        """How these prompts, and completions behind them, become token ids: as `encode` says.

        Raises PairtuneError if there is no template where one is needed, or if a system prompt has nowhere to go.
        """
        conversational = not isinstance(self.prompts[0], str)
        templated = conversational or chat == "always" or (chat == "auto" and bool(tokenizer.chat_template))
        if templated and not tokenizer.chat_template:
            reason = f"the prompts of {self.name} are conversations" if conversational else "chat is `always`"
            raise PairtuneError(
                f"{reason}, but the tokenizer of {tokenizer.name_or_path!r} has no chat template: "
                "use plain-text prompts with chat `never`, or a model with a chat template."
            )
        if system_prompt is not None and (conversational or not templated):
            why = "are conversations with turns of their own" if conversational else "stay plain text"
            raise PairtuneError(
                f"system_prompt has nowhere to go, for the prompts {why}: leave it out, or write it into the dataset."
            )
        return PromptFormat(tokenizer, templated, system_prompt, chat_template_kwargs)


@dataclass(frozen=True)
class PromptFormat:
    """How the prompts of one dataset, and completions behind them, become text and token ids of one tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    templated: bool
    """Whether prompts go through the tokenizer's chat template."""
    system_prompt: str | None
    chat_template_kwargs: Mapping[str, Any] | None

    def text(self, prompt: Prompt, place: str, completion: str | None = None) -> str:
        """A prompt opened for the assistant's turn, or with that turn behind it.

        Raises PairtuneError, naming `place`, if the template refuses the turns.
        """
        if not self.templated:
            return str(prompt) + (completion or "")
        opening = [] if self.system_prompt is None else [{"role": "system", "content": self.system_prompt}]
        turns = [*opening, *as_turns(prompt)]
        if completion is not None:
            turns.append({"role": "assistant", "content": completion})
        try:
            rendered = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=completion is None, **(self.chat_template_kwargs or {})
            )
        except Exception as error:  # templates are programs of their own and raise what they like
            what = "prompt" if completion is None else "conversation"
            refusal = f"the chat template of {self.tokenizer.name_or_path!r} refuses the {what}: {first_line(error)}"
            raise PairtuneError(f"{place}: {refusal}") from error
        return str(rendered)

    def token_ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of texts that begin with a prompt: one BOS at most, no EOS that the text does not hold."""
        encoded = self.tokenizer(
            texts, add_special_tokens=not self.templated, return_attention_mask=False, verbose=False
        )["input_ids"]
        if self.templated:
            return [list(ids) for ids in encoded]
        return [_one_bos_no_eos(ids, text, self.tokenizer) for ids, text in zip(encoded, texts, strict=True)]


def _first_given(*ids: int | None) -> int:
    return next(token_id for token_id in ids if token_id is not None)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """The columns that any of the rows has, in order of appearance."""
    return list(dict.fromkeys(column for row in rows for column in row))


def missing_column(column: str, rows: Sequence[Row], name: str, mend: str) -> PairtuneError:
    """The error for a dataset without a column that it must have; `mend` is said where no other name is close."""
    column_names = columns_of(rows)
    nearest = get_close_matches(column, column_names, n=1)
    mend = f"did you mean `{nearest[0]}`?" if nearest else mend
    return PairtuneError(f"{name} has no column `{column}`, only {listed(column_names)}; {mend}")


def prompts_are_implicit(rows: Sequence[Row], prompt_column: str, name: str) -> bool:
    """Whether the rows hold their prompts in `chosen` and `rejected` alone.

    Raises PairtuneError if there are no prompts at all.
    """
    column_names = columns_of(rows)
    if prompt_column in column_names:
        return False
    if prompt_column == "prompt" and {"chosen", "rejected"} <= set(column_names):
        return True
    raise missing_column(prompt_column, rows, name, "name the right one with prompt_column=...")


def shared_prompt(row: Row, place: str) -> Prompt:
    """The prompt that `chosen` and `rejected` have in common; at least one word or turn is left to each of them.

    For conversations it is the turns that both share. For strings in the markup of the HH datasets ("\\n\\nHuman: ...
    \\n\\nAssistant: ...") that differ in the last turn only, it is all that precedes that turn. For other strings it is
    the text that both share up to the last whole word. (TRL cuts strings at the first character that differs, which
    leaves the words that two answers begin with, and even letters, in the prompt.)

    Raises PairtuneError, naming `place`, for wrong types and for two that share no beginning.
    """
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt: Prompt = dialogue_prompt(chosen) or ""
        if not prompt or prompt != dialogue_prompt(rejected):
            pairs = zip(chosen, rejected, strict=False)
            shared = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            # Back to the last white space, so that no word is cut in two; a space itself begins the next word.
            prompt = re.sub(r"\S+\Z", "", shared).removesuffix(" ")
    elif isinstance(chosen, list) and isinstance(rejected, list):
        check_turns([*chosen, *rejected], place)
        num_shared = 0
        while num_shared < min(len(chosen), len(rejected)) - 1 and chosen[num_shared] == rejected[num_shared]:
            num_shared += 1
        prompt = chosen[:num_shared]
    else:
        raise PairtuneError(f"{place}: `chosen` and `rejected` must both be strings or both be conversations.")
    if not prompt:
        raise PairtuneError(
            f"{place}: `chosen` and `rejected` share no beginning, so there is no prompt; add a `prompt` column."
        )
    return prompt


def dialogue_prompt(text: str) -> str | None:
    """What precedes the assistant's last turn in a dialogue in the markup of the HH datasets; None for other text."""
    prompt, marker, _ = text.rpartition(ASSISTANT)
    return prompt + marker if prompt.lstrip().startswith(HUMAN) else None


def checked_prompt(prompt: Any, place: str) -> Prompt:
    """`prompt`, if it is one.

    Raises PairtuneError naming `place` for an empty prompt, a wrong type, a conversation that ends with the assistant.
    """
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PairtuneError(f"{place}: the prompt is empty.")
        return prompt
    if not isinstance(prompt, list):
        what = "missing" if prompt is None else f"of type {type(prompt).__name__}"
        raise PairtuneError(f"{place}: the prompt is {what}; it must be a string or a list of role/content turns.")
    if not prompt:
        raise PairtuneError(f"{place}: the prompt is an empty conversation.")
    check_turns(prompt, place)
    if prompt[-1]["role"] == "assistant":
        raise PairtuneError(
            f"{place}: the conversation ends with the assistant's turn; a prompt must end before the assistant speaks."
        )
    return prompt


def check_turns(turns: list[Any], place: str) -> None:
    """Raises PairtuneError, naming `place`, for what is no turn with a role and text."""
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)):
            raise PairtuneError(f'{place}: {shortened(turn)} is not a turn like {{"role": "user", "content": "..."}}.')


def as_turns(prompt: Prompt) -> list[Row]:
    """A prompt as a conversation; plain text is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _one_bos_no_eos(ids: list[int], text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Undo a BOS added to a text that brings its own, and an EOS added behind a prompt that is to be continued."""
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


# From prompts to batches.


@dataclass(frozen=True)
class PromptDataset:
    """Tokenised prompts, and the endless, reproducible order in which training meets them."""

    prompts: list[Prompt]
    columns: dict[str, list[Any]]
    token_ids: list[list[int]]
    """The ids of each prompt, without padding."""
    numbers: list[int]
    """The row of the dataset, as it was read, that each prompt came from."""
    num_left_out: int
    """Prompts of the dataset that were longer than max_prompt_length; `rows` count without them."""
    name: str
    """What error messages call it."""
    pad_token_id: int
    """Stands left of the shorter prompts of a batch, where the mask is False."""

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def notes(self) -> list[str]:
        """What of the dataset is not used, for the user to read."""
        left_out = f"{counted(self.num_left_out, 'prompt')} left out: longer than max_prompt_length"
        return [left_out] if self.num_left_out else []

    def batch(self, rows: Sequence[int], *, device: torch.device | str = "cpu") -> Prompts:
        """The named rows as one batch, left-padded to its longest prompt: ids and mask (P, S), rows (P,)."""
        token_ids = [self.token_ids[row] for row in rows]
        width = max(map(len, token_ids))
        ids = torch.tensor([[self.pad_token_id] * (width - len(row)) + row for row in token_ids])
        mask = torch.arange(width) >= width - torch.tensor([len(row) for row in token_ids])[:, None]
        return Prompts(
            ids=ids.to(device),
            mask=mask.to(device),
            rows=torch.tensor(rows, dtype=torch.int64, device=device),
            prompts=[self.prompts[row] for row in rows],
            columns={column: [values[row] for row in rows] for column, values in self.columns.items()},
        )

    def step_rows(self, seed: int, step: int, batch_size: int) -> list[int]:
        """The rows of training step `step` (from 0): a function of its arguments alone, so resuming needs no state.

        Each epoch is a fresh permutation, cut into whole batches. What does not fill a batch sits this epoch out: a
        batch across two epochs could hold a row twice, and as sampling is seeded by the row, its completions would be
        identical.

        Raises PairtuneError if there are fewer prompts than one batch takes.
        """
        if batch_size > len(self):
            raise PairtuneError(
                f"batch_size={batch_size} is more than the {len(self)} prompts of {self.name}, so one would stand in a "
                f"batch twice: lower batch_size to {len(self)} or less, or add prompts."
            )
        epoch, place = divmod(step, len(self) // batch_size)
        return self._order(seed, epoch)[place * batch_size : (place + 1) * batch_size]

    def _order(self, seed: int, epoch: int) -> list[int]:
        return np.random.default_rng((seed, epoch)).permutation(len(self)).tolist()


def shard(rows: Sequence[int], rank: int, world_size: int) -> list[int]:
    """The contiguous part of `rows` that falls to one process; the parts differ by one row at most."""
    return list(rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size])
