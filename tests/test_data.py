"""Prompts: what is read, what is refused, how it is tokenised, in what order it comes."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pairtune.config import EvaluateConfig, TrainConfig
from pairtune.data import (
    EVERYDAY,
    PromptDataset,
    RawPrompts,
    load_dataset_rows,
    load_eval_prompts,
    load_prompts,
    shard,
)
from pairtune.errors import PairtuneError

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", "system:", "a", "b", "c", "d"]
PAD, BOS, EOS, UNK, USER, ASSISTANT, SYSTEM, A, B, C, D = range(11)
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ ' ' + turn['role'] + ': ' + turn['content'] }}"
    "{% if turn['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{{ ' ' + suffix if suffix is defined else '' }}{% endif %}"
)


def make_tokenizer(*, chat: bool = False, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word; adds BOS and EOS of its own accord where asked to."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", BOS), ("</s>", EOS)])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def encode(prompts: list[Any], tokenizer: PreTrainedTokenizerFast, **settings: Any) -> PromptDataset:
    return RawPrompts.from_rows([{"prompt": prompt} for prompt in prompts]).encode(tokenizer, **settings)


# The shipped prompts.


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", text.lower()))


def test_everyday_prompts_are_many_distinct_and_short() -> None:
    rows = [json.loads(line) for line in EVERYDAY.read_text(encoding="utf-8").splitlines()]
    assert Counter(row["split"] for row in rows) == {"train": 312, "test": 72}
    assert all(set(row) == {"prompt", "split"} and row["prompt"] == row["prompt"].strip() for row in rows)
    assert all(4 <= len(row["prompt"].split()) <= 20 for row in rows)
    bare = [re.sub(r"\W+", " ", row["prompt"].lower()).strip() for row in rows]
    assert len(set(bare)) == len(bare)
    openings = Counter(prompt.split()[0] for prompt in bare)
    assert len(openings) >= 40
    assert openings.most_common(1)[0][1] <= len(rows) // 8


def test_no_held_out_everyday_prompt_is_close_to_a_training_prompt() -> None:
    train = [words(row["prompt"]) for row in load_dataset_rows("everyday", split="train")]
    test = [words(row["prompt"]) for row in load_dataset_rows("everyday", split="test")]
    assert max(len(a & b) / len(a | b) for a in test for b in train) < 0.7


def test_everyday_splits_are_alike_and_neutral() -> None:
    analyser = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
    means = {}
    for split in ("train", "test"):
        scores = [
            analyser.polarity_scores(row["prompt"])["compound"] for row in load_dataset_rows("everyday", split=split)
        ]
        means[split] = sum(scores) / len(scores)
        assert abs(means[split]) < 0.05
    assert abs(means["train"] - means["test"]) < 0.03


# Reading.


ROWS = [{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}]


def test_local_files_give_the_same_rows(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n\n" for row in ROWS)
    (tmp_path / "rows.jsonl").write_text("\ufeff" + lines, encoding="utf-8")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "array.json").write_text(json.dumps(ROWS, indent=1))
    (tmp_path / "lines.json").write_text(lines)
    datasets.Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.jsonl.gz", "array.json", "lines.json", "rows.parquet"):
        assert load_dataset_rows(str(tmp_path / name), split="train") == ROWS, name
    assert load_dataset_rows(tmp_path / "rows.jsonl", split="train") == ROWS


def test_a_line_separator_inside_a_json_string_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert load_dataset_rows(tmp_path / "rows.jsonl", split="train") == [{"prompt": "a\u2028b"}]


def test_python_data_gives_the_same_rows() -> None:
    table = datasets.Dataset.from_list(ROWS)
    for data in (ROWS, tuple(ROWS), table, {"train": ROWS}, datasets.DatasetDict({"train": table, "test": table})):
        assert load_dataset_rows(data, split="train") == ROWS


def test_folders_are_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "files"
    folder.mkdir()
    write(folder / "train.jsonl", *ROWS)
    write(folder / "test.jsonl", ROWS[1])
    assert load_dataset_rows(str(folder), split="train") == ROWS
    assert load_dataset_rows(str(folder), split="test") == [ROWS[1]]
    with pytest.raises(PairtuneError, match=r"cannot load split 'valid' of dataset .*files"):
        load_dataset_rows(str(folder), split="valid")

    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert load_dataset_rows(str(tmp_path / "saved"), split="train") == ROWS
    with pytest.raises(PairtuneError, match="has no split 'test'; it has `train`"):
        load_dataset_rows(str(tmp_path / "saved"), split="test")


def test_a_hub_id_goes_to_datasets_with_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_dataset_rows("some/prompts", split="train", config="small") == ROWS
    assert calls == [(("some/prompts", "small"), {"split": "train"})]


def test_a_hub_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to the hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(PairtuneError) as caught:
        load_dataset_rows("some/prompts", split="train", config="small")
    assert str(caught.value) == "cannot load split 'train' of dataset 'some/prompts' (small): no route to the hub"
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_split_column_selects_and_is_dropped(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "split": "train"}, {"prompt": "b", "split": "test"}, {"prompt": "c", "split": "train"}]
    for data in (write(tmp_path / "rows.jsonl", *rows), rows):
        assert load_dataset_rows(data, split="train") == [{"prompt": "a"}, {"prompt": "c"}]
        assert load_dataset_rows(data, split="test") == [{"prompt": "b"}]
        with pytest.raises(PairtuneError, match="no split 'dev'; its `split` column has `test`, `train`"):
            load_dataset_rows(data, split="dev")


def test_rows_without_splits_are_one_split_only() -> None:
    with pytest.raises(PairtuneError, match=r"no split 'test'.*eval_dataset=\.\.\..*`split` column"):
        load_dataset_rows(ROWS, split="test")
    assert load_dataset_rows(ROWS, split="test", only_split="test") == ROWS


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"rows.jsonl:2: this line is not valid JSON"),
        ('{"prompt": "a"}\n\n["a"]\n', r"rows.jsonl:3: this line must be one object .* not \['a'\]"),
        ("\n\n", "has no rows in split 'train'"),
        ("", "has no rows in split 'train'"),
    ],
)
def test_bad_json_lines_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(PairtuneError, match=message):
        load_dataset_rows(tmp_path / "rows.jsonl", split="train")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("rows.json", b'{"prompt": "a"\n "b"}', r"rows.json:2: not valid JSON"),
        ("rows.json", b'["a"]', "must hold a list of objects"),
        ("rows.json", b'"a"', "must hold a list of objects"),
        ("rows.jsonl", b'{"prompt": "\xff"}', "cannot read .*utf-8"),
        ("rows.jsonl.gz", b"not gzip", "cannot read .*gzip"),
        pytest.param("rows.jsonl.gz", gzip.compress(b"x" * 99)[:-9], "cannot read .*end-of-stream", id="cut gzip"),
        pytest.param(
            "rows.jsonl.gz", gzip.compress(b"x")[:10] + b"\xff" * 20, "cannot read .*while decomp", id="damaged gzip"
        ),
        ("rows.parquet", b"not parquet", "cannot read .* as Parquet"),
        ("rows.csv", b"prompt\na\n", r"must end in one of \.jsonl"),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PairtuneError, match=message):
        load_dataset_rows(tmp_path / name, split="train")


@pytest.mark.parametrize(
    "dataset, message",
    [
        ("missing.jsonl", "no file or folder 'missing.jsonl'"),
        ("./missing", "no file or folder './missing'"),
        ("a/b/c", "no file or folder 'a/b/c'"),
        ("two words", "no file or folder 'two words'"),
        (["a", "b"], "row 0 of the list of prompts is a str, not a dictionary"),
        (7, "cannot be read as a dataset: pass a list of dictionaries"),
        (iter(ROWS), "cannot be read as a dataset"),
        ([], "has no rows"),
        ({"train": ROWS}, "has no split 'dev'; it has `train`"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset: Any, message: str) -> None:
    with pytest.raises(PairtuneError, match=message):
        load_dataset_rows(dataset, split="dev" if isinstance(dataset, dict) else "train")


def test_a_variant_of_a_local_dataset_is_refused() -> None:
    with pytest.raises(PairtuneError, match="dataset_config 'small' has no meaning for dataset 'everyday'"):
        load_dataset_rows("everyday", split="train", config="small")


# From rows to prompts.


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def test_the_prompt_is_taken_and_the_rest_is_kept() -> None:
    rows = [{"prompt": "a", "completion": "b", "answer": 1}, {"prompt": "c", "completion": "d"}]
    raw = RawPrompts.from_rows(rows)
    assert raw.prompts == ["a", "c"]
    assert raw.columns == {"completion": ["b", "d"], "answer": [1, None]}
    assert RawPrompts.from_rows(rows, prompt_column="completion").prompts == ["b", "d"]


def test_an_explicit_prompt_stands_beside_chosen_and_rejected() -> None:
    raw = RawPrompts.from_rows([{"prompt": "a", "chosen": "a b", "rejected": "a c"}])
    assert raw.prompts == ["a"]
    assert raw.columns == {"chosen": ["a b"], "rejected": ["a c"]}


@pytest.mark.parametrize(
    "chosen, rejected, prompt",
    [
        ("Q: why? A: because", "Q: why? A: no idea", "Q: why? A:"),
        ("the sky is blue", "the sky is brown", "the sky is"),  # not "the sky is b"
        ("why?\nyes", "why?\nno", "why?\n"),
        ("the sky", "the sky above", "the"),  # a word is left to both
    ],
)
def test_an_implicit_plain_prompt_ends_with_a_whole_word(chosen: str, rejected: str, prompt: str) -> None:
    assert RawPrompts.from_rows([{"chosen": chosen, "rejected": rejected}]).prompts == [prompt]


def test_an_implicit_conversational_prompt_is_the_turns_that_both_share() -> None:
    row = {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")}
    assert RawPrompts.from_rows([row]).prompts == [turns("a", "b", "c")]
    same = {"chosen": turns("a", "b"), "rejected": turns("a", "b")}
    assert RawPrompts.from_rows([same]).prompts == [turns("a")]  # the answers stay answers


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"promt": "a", "x": 1}], "has no column `prompt`, only `promt`, `x`; did you mean `promt`?"),
        ([{"text": "a"}], r"has no column `prompt`, only `text`; name the right one with prompt_column=\.\.\."),
        ([{"chosen": "a b"}], "has no column `prompt`, only `chosen`"),
        ([{"prompt": "a"}, {"prompt": " \n"}], "row 1 of the dataset: the prompt is empty"),
        ([{"prompt": "a"}, {"x": 1}], "row 1 of the dataset: the prompt is missing"),
        ([{"prompt": "a"}, {"prompt": 3}], "row 1 of the dataset: the prompt is of type int"),
        ([{"prompt": []}], "row 0 of the dataset: the prompt is an empty conversation"),
        ([{"prompt": ["a"]}], "row 0 of the dataset: 'a' is not a turn"),
        ([{"prompt": [{"role": "user"}]}], "row 0 of the dataset: {'role': 'user'} is not a turn"),
        ([{"prompt": [{"role": "user", "content": [1]}]}], "is not a turn"),
        ([{"prompt": turns("a", "b")}], "row 0 of the dataset: the conversation ends with the assistant's turn"),
        ([{"prompt": "a"}, {"prompt": turns("a")}], "row 1 of the dataset and its row 0 differ in kind"),
        ([{"chosen": "a b", "rejected": turns("a")}], "must both be strings or both be conversations"),
        ([{"chosen": "a b", "rejected": "c d"}], "share no beginning"),
        ([{"chosen": turns("a", "b"), "rejected": turns("c", "d")}], "share no beginning"),
        ([{"chosen": turns("a", "b", "c"), "rejected": turns("a", "b", "d")}], "ends with the assistant's turn"),
    ],
)
def test_bad_rows_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PairtuneError, match=message.replace("{", r"\{").replace("?", r"\?")):
        RawPrompts.from_rows(rows)


# Tokenising.


def test_plain_prompts_get_one_bos_and_no_eos() -> None:
    prompts = ["a b", "<s> a", "b </s>"]
    assert encode(prompts, make_tokenizer()).token_ids == [[A, B], [BOS, A], [B, EOS]]
    # A tokenizer that puts BOS in front and EOS behind of its own accord: the text's own are kept, none is doubled.
    greedy = encode(prompts, make_tokenizer(bos=True, eos=True))
    assert [ids[:2] for ids in greedy.token_ids] == [[BOS, A], [BOS, A], [BOS, B]]
    assert [ids[-1] for ids in greedy.token_ids] == [B, A, EOS]


def test_templated_prompts_get_the_templates_bos_alone() -> None:
    for tokenizer in (make_tokenizer(chat=True), make_tokenizer(chat=True, bos=True, eos=True)):
        wrapped = encode(["a b"], tokenizer)
        assert wrapped.token_ids == [[BOS, USER, A, B, ASSISTANT]]
        assert wrapped.prompts == ["a b"]  # what reward functions see is what the dataset said
        assert encode([turns("a", "b", "c")], tokenizer).token_ids == [
            [BOS, USER, A, ASSISTANT, B, EOS, USER, C, ASSISTANT]
        ]


def test_chat_says_whether_plain_prompts_become_conversations() -> None:
    with_template, without = make_tokenizer(chat=True), make_tokenizer()
    assert encode(["a"], with_template, chat="never").token_ids == [[A]]
    assert encode(["a"], with_template, chat="always").token_ids == [[BOS, USER, A, ASSISTANT]]
    assert encode(["a"], without, chat="auto").token_ids == [[A]]
    with pytest.raises(PairtuneError, match=r"chat is `always`, but the tokenizer .* has no chat template"):
        encode(["a"], without, chat="always")
    # A conversation can only be templated.
    assert encode([turns("a")], with_template, chat="never").token_ids == [[BOS, USER, A, ASSISTANT]]
    with pytest.raises(PairtuneError, match=r"are conversations, but the tokenizer .* has no chat template"):
        encode([turns("a")], without)


def test_the_system_prompt_goes_before_plain_prompts_only() -> None:
    tokenizer = make_tokenizer(chat=True)
    assert encode(["a"], tokenizer, system_prompt="b").token_ids == [[BOS, SYSTEM, B, USER, A, ASSISTANT]]
    with pytest.raises(PairtuneError, match="system_prompt has nowhere to go, for the prompts are conversations"):
        encode([turns("a")], tokenizer, system_prompt="b")
    with pytest.raises(PairtuneError, match="system_prompt has nowhere to go, for the prompts stay plain text"):
        encode(["a"], tokenizer, chat="never", system_prompt="b")


def test_the_template_gets_its_own_arguments() -> None:
    encoded = encode(["a"], make_tokenizer(chat=True), chat_template_kwargs={"suffix": "c"})
    assert encoded.token_ids == [[BOS, USER, A, ASSISTANT, C]]


def test_a_template_that_refuses_a_prompt_names_the_row() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{% if 'b' in messages[0]['content'] %}{{ raise_exception('no b here') }}{% endif %}a"
    with pytest.raises(
        PairtuneError, match=r"row 1 of the dataset: the chat template .* refuses the prompt: no b here"
    ):
        encode(["a", "b"], tokenizer)


def test_long_prompts_are_left_out_whole_and_counted() -> None:
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(["a b c", "a", "a b"])]
    encoded = RawPrompts.from_rows(rows).encode(make_tokenizer(), max_prompt_length=2)
    assert (encoded.prompts, encoded.token_ids) == (["a", "a b"], [[A], [A, B]])
    assert encoded.columns == {"number": [1, 2]}
    assert (len(encoded), encoded.num_left_out) == (2, 1)
    with pytest.raises(PairtuneError, match=r"all 1 prompts .* max_prompt_length=2 tokens \(the shortest has 3\)"):
        encode(["a b c"], make_tokenizer(), max_prompt_length=2)


def test_a_prompt_without_tokens_is_refused() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(PairtuneError, match="row 0 of the dataset: the prompt '' has no tokens"):
        encode(["a"], tokenizer)


# Batches and order.


def test_a_batch_is_left_padded_to_its_own_longest_prompt() -> None:
    rows = [{"prompt": prompt, "number": i} for i, prompt in enumerate(["a b c", "a", "c d"])]
    encoded = RawPrompts.from_rows(rows).encode(make_tokenizer())
    batch = encoded.batch([2, 1])
    assert torch.equal(batch.ids, torch.tensor([[C, D], [PAD, A]]))
    assert torch.equal(batch.mask, torch.tensor([[True, True], [False, True]]))
    assert torch.equal(batch.rows, torch.tensor([2, 1]))
    assert (batch.ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
    assert (batch.prompts, batch.columns) == (["c d", "a"], {"number": [2, 1]})


def test_a_tokenizer_without_padding_token_pads_with_its_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    assert encode(["a", "a b"], tokenizer).batch([0, 1]).ids.tolist() == [[EOS, A], [A, B]]


def numbered(count: int) -> PromptDataset:
    return encode([f"a {i}" for i in range(count)], make_tokenizer())


@pytest.mark.parametrize("count, batch_size", [(12, 4), (13, 4), (7, 7), (9, 5)])
def test_each_epoch_meets_every_row_at_most_once(count: int, batch_size: int) -> None:
    dataset, steps = numbered(count), count // batch_size
    for epoch in range(3):
        rows = [row for i in range(steps) for row in dataset.step_rows(3, epoch * steps + i, batch_size)]
        assert len(rows) == steps * batch_size
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(count))


def test_the_order_depends_on_seed_and_epoch_and_nothing_else() -> None:
    dataset = numbered(40)
    forward = [dataset.step_rows(0, step, 10) for step in range(8)]
    assert [dataset.step_rows(0, step, 10) for step in reversed(range(8))] == forward[::-1]
    assert [numbered(40).step_rows(0, step, 10) for step in range(8)] == forward
    assert forward[:4] != forward[4:]  # the second epoch is permuted afresh
    assert forward != [dataset.step_rows(1, step, 10) for step in range(8)]


def test_what_does_not_fill_a_batch_is_left_out_of_one_epoch_not_of_all() -> None:
    dataset = numbered(9)
    seen = [set(dataset.step_rows(0, epoch, 5)) for epoch in range(20)]
    assert set().union(*seen) == set(range(9))


def test_fewer_prompts_than_a_batch_takes_are_refused() -> None:
    with pytest.raises(
        PairtuneError, match=r"batch_size=4 is more than the 3 prompts .* lower batch_size to 3 or less"
    ):
        numbered(3).step_rows(0, 0, 4)


def test_shards_are_contiguous_disjoint_and_complete() -> None:
    rows = list(range(11))
    parts = [shard(rows, rank, 4) for rank in range(4)]
    assert [row for part in parts for row in part] == rows
    assert {len(part) for part in parts} == {2, 3}


# The configuration's datasets.


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"model": "m", "dataset": "everyday", "reward_funcs": ["a.b"], "chat": "never", **changes})


def test_the_shipped_prompts_come_in_two_splits() -> None:
    train, held_out = load_prompts(config(), make_tokenizer())
    assert held_out is not None
    assert (len(train), len(held_out)) == (312, 72)
    assert load_prompts(config(dataset_test_split=None), make_tokenizer())[1] is None


def test_held_out_prompts_from_a_dataset_of_their_own(tmp_path: Path) -> None:
    train, test = write(tmp_path / "train.jsonl", {"prompt": "a"}), write(tmp_path / "test.jsonl", {"prompt": "b"})
    tokenizer = make_tokenizer()
    for settings, passed in (
        ({"dataset": str(train), "eval_dataset": str(test)}, {}),
        ({}, {"train_dataset": [{"prompt": "a"}], "eval_dataset": [{"prompt": "b"}]}),
        ({"dataset_test_split": None}, {"train_dataset": str(train), "eval_dataset": str(test)}),
    ):
        read, held_out = load_prompts(config(**settings), tokenizer, **passed)
        assert held_out is not None
        assert (read.prompts, held_out.prompts) == (["a"], ["b"])
    with pytest.raises(PairtuneError, match="has no split 'test'"):
        load_prompts(config(dataset=str(train)), tokenizer)


def test_evaluation_takes_a_file_without_splits_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "held_out.jsonl", {"question": "a"})
    evaluate = EvaluateConfig(model="m", dataset=str(path), prompt_column="question", reward_funcs=["a.b"])
    assert load_eval_prompts(evaluate, make_tokenizer()).prompts == ["a"]
