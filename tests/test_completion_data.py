"""Completions of a dataset: what becomes of each row, which ids a completion gets, how groups are padded."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pairtune.completion_data import (
    Example,
    ExampleDataset,
    OfflineDataset,
    encode_completions,
    encode_examples,
    load_examples,
    load_preferences,
    load_scored,
)
from pairtune.config import EvaluateConfig, SFTConfig, TrainConfig
from pairtune.data import PromptDataset, RawPrompts, load_eval_prompts, load_prompts
from pairtune.errors import PairtuneError
from pairtune.models.logprobs import Scorer
from pairtune.models.weights import SMOLLM2_Q4, default_cache_dir

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-preferences.jsonl.gz"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"


def config(**changes: Any) -> TrainConfig:
    return TrainConfig(
        **{"model": "m", "dataset": "everyday", "reward_funcs": ["a.b"], "algorithm": "dpo", "chat": "never", **changes}
    )


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def said(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def raw(*prompts: Any) -> RawPrompts:
    return RawPrompts.from_rows([{"prompt": prompt} for prompt in prompts])


def text_of(tokenizer: Any, prompt: Any, completion: str, **settings: Any) -> str:
    """What the ids of one completion decode to."""
    return tokenizer.decode(encode_completions(raw(prompt), [[completion]], tokenizer, **settings)[0][0].ids)


def all_texts(tokenizer: Any, dataset: OfflineDataset) -> list[tuple[str, list[str]]]:
    """Each prompt with its completions, as the ids of one batch have them."""
    batch = dataset.batch(range(len(dataset)))
    texts = []
    for p, (ids, mask) in enumerate(zip(batch.prompts.ids, batch.prompts.mask, strict=True)):
        rows = zip(batch.completions.completion_ids[p], batch.completions.completion_mask[p], strict=True)
        texts.append((tokenizer.decode(ids[mask]), [tokenizer.decode(row[kept]) for row, kept in rows if kept.any()]))
    return texts


# Token ids.


def test_a_plain_completion_follows_the_prompts_own_ids_and_ends_with_one_eos(tiny_tokenizer: Any) -> None:
    prompts, completions = raw("why?", "how "), [[" so", f"no{END}"], ["far"]]
    encoded = encode_completions(prompts, completions, tiny_tokenizer, chat="never")
    alone = [tiny_tokenizer(text)["input_ids"] for text in (f" so{END}", f"no{END}", f"far{END}")]
    assert [completion.ids for group in encoded for completion in group] == alone
    assert not any(completion.truncated for group in encoded for completion in group)


@pytest.mark.parametrize("prompt", ["hi", turns("hi"), turns("hi", "yes?", "go")], ids=["wrapped", "one", "three"])
def test_a_templated_completion_is_the_assistants_turn_up_to_eos(tiny_tokenizer: Any, prompt: Any) -> None:
    assert text_of(tiny_tokenizer, prompt, " a\nb ") == f" a\nb {END}"
    tiny_tokenizer.chat_template = tiny_tokenizer.chat_template.replace(END, END + "\n")
    assert text_of(tiny_tokenizer, prompt, " a\nb ") == f" a\nb {END}"


def test_what_would_have_ended_sampling_ends_the_completion(tiny_tokenizer: Any) -> None:
    for chat in ("never", "always"):
        assert text_of(tiny_tokenizer, "a", f"b{END}c", chat=chat) == f"b{END}"


def template(*, opened: str = ASSISTANT, before: str = ASSISTANT, closing: str = END) -> str:
    """A chat template of our own: what opens the assistant's turn, what stands before and behind a finished one."""
    return (
        "{% for turn in messages %}{% if turn['role'] == 'assistant' %}" + before + "{{ turn['content'] | trim }}"
        "" + closing + "{% else %}" + USER + "{{ turn['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}" + opened + "{% endif %}"
    )


@pytest.mark.parametrize(
    "closing, expected",
    [
        ("<|system|>\n" + END, "yes<|system|>"),  # a turn ends with a special token that is not the tokenizer's EOS
        ("\n", f"yes{END}"),  # with no special token at all
        ("", f"yes{END}"),
        ("\u00e9", f"yes{END}"),  # unknown to the tokenizer, whose unknown token is special and ends nothing
    ],
)
def test_a_turn_ends_as_its_template_ends_it(tiny_tokenizer: Any, closing: str, expected: str) -> None:
    tiny_tokenizer.chat_template = template(closing=closing)
    assert text_of(tiny_tokenizer, "a", "yes") == expected


def test_a_template_that_opens_a_turn_otherwise_than_it_writes_one(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = template(opened=ASSISTANT + "<think>")
    assert text_of(tiny_tokenizer, "a", "<b> yes") == f"<b> yes{END}"  # not "b> yes", though both begin with "<"
    tiny_tokenizer.chat_template = template(before=ASSISTANT + "<think></think>")
    assert text_of(tiny_tokenizer, "a", "yes") == f"<think></think>yes{END}"  # what follows the prompt, all of it


def test_a_template_without_the_answer_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(
        PairtuneError, match=r"row 0 of the dataset: the chat template .* leaves out what the assistant"
    ):
        encode_completions(raw("a"), [["b"]], tiny_tokenizer)


def test_a_template_that_refuses_a_conversation_names_the_row(tiny_tokenizer: Any) -> None:
    refusal = "{% if 'b' in messages[-1]['content'] %}{{ raise_exception('no b here') }}{% endif %}"
    tiny_tokenizer.chat_template = refusal + tiny_tokenizer.chat_template
    rows = [{"prompt": "q", "chosen": "c", "rejected": "c"}, {"prompt": "q", "chosen": "b", "rejected": "c"}]
    with pytest.raises(PairtuneError, match=r"row 1 of the list of .* refuses the conversation: no b here"):
        load_preferences(config(chat="always"), tiny_tokenizer, rows)


def test_a_completion_at_the_cap_is_whole_and_one_above_is_cut_without_eos(tiny_tokenizer: Any) -> None:
    encoded = encode_completions(raw("q"), [["abc", "abcd", "abcde"]], tiny_tokenizer, max_completion_length=4)[0]
    assert [tiny_tokenizer.decode(completion.ids) for completion in encoded] == [f"abc{END}", "abcd", "abcd"]
    assert [completion.truncated for completion in encoded] == [False, True, True]


def test_a_tokenizer_without_eos_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.eos_token = None
    with pytest.raises(PairtuneError, match="has no EOS token, so no completion could end"):
        encode_completions(raw("q"), [["a"]], tiny_tokenizer)


def of_pieces(core: Tokenizer, *, chat: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    return tokenizer


def test_a_token_across_the_border_is_never_made() -> None:
    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", "x", "a", "b", "ab"])}
    tokenizer = of_pieces(Tokenizer(models.BPE(vocabulary, [("a", "b")], unk_token="<unk>")))
    assert tokenizer("xab")["input_ids"] == [3, 6]
    prompts = raw("xa")
    assert prompts.encode(tokenizer).token_ids == [[3, 4]]
    assert encode_completions(prompts, [["b", "ab"]], tokenizer)[0][0].ids == [5, 2]
    assert encode_completions(prompts, [["b", "ab"]], tokenizer)[0][1].ids == [6, 2]


def test_a_tokenizer_that_puts_a_space_before_every_text_puts_none_before_a_completion() -> None:
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "\n"]
    core = Tokenizer(models.Unigram([(piece, 0.0) for piece in pieces], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer = of_pieces(core)
    assert tokenizer("b")["input_ids"] == [3, 5]
    assert encode_completions(raw("a\n"), [["b", " b"]], tokenizer)[0][0].ids == [5, 2]
    assert encode_completions(raw("a\n"), [["b", " b"]], tokenizer)[0][1].ids == [3, 5, 2]


TEXTS = st.text(alphabet="ab \n'1", min_size=1, max_size=8)


@settings(max_examples=40)
@given(prompt=TEXTS.filter(str.strip), completion=TEXTS)
def test_nothing_is_lost_or_added_on_the_way(prompt: str, completion: str) -> None:
    tokenizer = byte_tokenizer()
    ids = [
        *raw(prompt).encode(tokenizer).token_ids[0],
        *encode_completions(raw(prompt), [[completion]], tokenizer)[0][0].ids,
    ]
    assert tokenizer.decode(ids) == prompt + completion + "</s>"


_BYTES: list[PreTrainedTokenizerFast] = []


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges reach across spaces, newlines and words."""
    if not _BYTES:
        from tokenizers import decoders

        merges = [("a", "b"), ("Ġ", "a"), ("Ċ", "Ċ"), ("1", "1"), ("'", "a"), ("b", "b"), ("Ġ", "Ġ")]
        pieces = ["<unk>", "<s>", "</s>", *"ab1'ĠĊ", *("".join(merge) for merge in merges)]
        core = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        _BYTES.append(of_pieces(core))
    return _BYTES[0]


# Preferences.


HH = [
    ("\n\nHuman: hi\n\nAssistant:", " I am well", " I am not"),
    ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", " d", " e"),
]


def hh(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"chosen": prompt + chosen, "rejected": prompt + rejected}


def test_preferences_in_one_string_with_marked_turns(tiny_tokenizer: Any) -> None:
    dataset = load_preferences(config(), tiny_tokenizer, [hh(*row) for row in HH])
    assert all_texts(tiny_tokenizer, dataset) == [(prompt, [a + END, b + END]) for prompt, a, b in HH]
    assert dataset.notes == []


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q: why?", "chosen": " yes", "rejected": " no"},
        {"chosen": "q: why? yes", "rejected": "q: why? no"},
    ],
    ids=["explicit", "implicit"],
)
def test_plain_preferences(tiny_tokenizer: Any, row: dict[str, Any]) -> None:
    batch = load_preferences(config(), tiny_tokenizer, [row]).batch([0])
    assert batch.prompts.prompts == ["q: why?"]
    assert tiny_tokenizer.batch_decode(batch.completions.completion_ids[0]) == [f" yes{END}", f" no{END}<|pad|>"]
    assert torch.equal(batch.completions.completion_mask.sum(-1), torch.tensor([[5, 4]]))
    assert torch.equal(batch.rewards, torch.tensor([[1.0, 0.0]]))
    assert batch.reward_mask.all()


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": turns("a", "b", "c"), "chosen": said("d"), "rejected": said("e")},
        {"prompt": turns("a", "b", "c"), "chosen": "d", "rejected": "e"},
        {"prompt": turns("a", "b", "c"), "chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")},
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")},
    ],
    ids=["turn", "text", "repeated", "implicit"],
)
def test_conversational_preferences_in_all_ways_they_are_written(tiny_tokenizer: Any, row: dict[str, Any]) -> None:
    dataset = load_preferences(config(), tiny_tokenizer, [row])
    prompt = f"{USER}a{END}{ASSISTANT}b{END}{USER}c{END}{ASSISTANT}"
    assert all_texts(tiny_tokenizer, dataset) == [(prompt, [f"d{END}", f"e{END}"])]
    assert dataset.prompts == [turns("a", "b", "c")]


def test_a_plain_prompt_beside_whole_conversations(tiny_tokenizer: Any) -> None:
    row = {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c")}
    dataset = load_preferences(config(chat="auto", system_prompt="s"), tiny_tokenizer, [row])
    prompt = f"<|system|>s{END}{USER}a{END}{ASSISTANT}"
    assert all_texts(tiny_tokenizer, dataset) == [(prompt, [f"b{END}", f"c{END}"])]


@pytest.mark.parametrize("prompts", [["a b", "c"], [turns("a b"), turns("c", "d", "e")]], ids=["plain", "conversation"])
@pytest.mark.parametrize("chat", ["auto", "never"])
def test_prompt_ids_are_those_that_sampling_starts_from(tiny_tokenizer: Any, prompts: list[Any], chat: str) -> None:
    rows = [{"prompt": prompt, "chosen": " x", "rejected": " y"} for prompt in prompts]
    sampled, _ = load_prompts(config(chat=chat, dataset_test_split=None), tiny_tokenizer, train_dataset=rows)
    offline = load_preferences(config(chat=chat), tiny_tokenizer, rows).batch([0, 1]).prompts
    assert torch.equal(offline.ids, sampled.batch([0, 1]).ids)
    assert torch.equal(offline.mask, sampled.batch([0, 1]).mask)


def test_what_is_left_out_is_counted_and_the_rest_stays_together(tiny_tokenizer: Any) -> None:
    rows = [
        {"prompt": "long prompt", "chosen": "a", "rejected": "b", "margin": 0},
        {"prompt": "p", "chosen": "c", "rejected": "d", "margin": 1},
        {"prompt": "p", "chosen": "same", "rejected": "same", "margin": 2},
        {"prompt": "p", "chosen": " ", "rejected": "d", "margin": 3},
        {"prompt": "p", "chosen": "d", "rejected": "", "margin": 4},
        {"prompt": "p", "chosen": "alike at first", "rejected": "alike at last", "margin": 5},
        {"prompt": "p", "chosen": turns("r", "s"), "rejected": "d", "margin": 6},
        {"prompt": "r", "chosen": "e", "rejected": "longer", "margin": 7},
    ]
    dataset = load_preferences(config(max_prompt_length=5, max_completion_length=5), tiny_tokenizer, rows)
    assert all_texts(tiny_tokenizer, dataset) == [("p", [f"c{END}", f"d{END}"]), ("r", [f"e{END}", "longe"])]
    assert dataset.batch([0, 1]).prompts.columns == {"margin": [1, 7]}
    assert dataset.prompt_dataset.numbers == [1, 7]
    assert torch.equal(dataset.batch([1]).completions.truncated, torch.tensor([[False, True]]))
    assert dataset.notes[:4] == [
        "1 row left out: chosen and rejected are identical",
        "2 rows left out: a completion is empty",
        "1 row left out: a completion is not one turn of the assistant",
        "1 prompt left out: its completions do not differ within max_completion_length=5 tokens",
    ]
    assert "longer than max_prompt_length" in dataset.notes[4]
    assert dataset.notes[5:] == ["1 completion cut at max_completion_length=5"]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": turns("a", "b"), "rejected": turns("a", "c", "d", "e")},
        {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "e", "f")},
        {"chosen": turns("a", "b", "c"), "rejected": turns("a", "b", "d")},
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
            "rejected": "\n\nHuman: a\n\nAssistant: e\n\nHuman: f\n\nAssistant: g",
        },
    ],
    ids=["answers", "questions", "no answer", "marked"],
)
def test_sides_that_differ_before_the_last_turn_are_left_out(tiny_tokenizer: Any, row: dict[str, Any]) -> None:
    kind = turns if isinstance(row["chosen"], list) else lambda a, b: f"\n\nHuman: {a}\n\nAssistant: {b}"
    rows = [row, {"chosen": kind("a", "x"), "rejected": kind("a", "y")}]
    dataset = load_preferences(config(), tiny_tokenizer, rows)
    assert len(dataset) == 1
    assert dataset.notes == ["1 row left out: chosen and rejected differ before the assistant's last turn"]


def test_an_empty_last_turn_in_marked_text_is_seen(tiny_tokenizer: Any) -> None:
    rows = [hh("\n\nHuman: a\n\nAssistant:", "", " b"), hh("\n\nHuman: a\n\nAssistant:", " ", " b"), hh(*HH[0])]
    dataset = load_preferences(config(), tiny_tokenizer, rows)
    assert dataset.prompt_dataset.numbers == [2]
    assert dataset.notes == ["2 rows left out: a completion is empty"]


def test_nothing_left_is_refused_with_the_reasons(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "a"}, {"prompt": "p", "chosen": "", "rejected": "a"}]
    reasons = "1 row left out: chosen and rejected are identical; 1 row left out: a completion is empty"
    with pytest.raises(PairtuneError, match=f"nothing is left of the list of .* to learn from: {reasons}"):
        load_preferences(config(), tiny_tokenizer, rows)
    cut = [{"prompt": "p", "chosen": "abc", "rejected": "abd"}]
    with pytest.raises(PairtuneError, match=r"1 prompt left out: its completions do not differ within .*=2 tokens"):
        load_preferences(config(max_completion_length=2), tiny_tokenizer, cut)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": "p", "choosen": "a", "rejected": "b"}], "has no column `chosen`, only .* did you mean `choosen`"),
        ([{"prompt": "p", "text": "a"}], "has no column `chosen`, only `prompt`, `text`; preferences have"),
        ([{"question": "p", "chosen": "a b", "rejected": "a c"}], None),  # the prompt is implicit then
        ([{"prompt": "p", "chosen": "a", "rejected": None}], "row 0 of .*: `rejected` is missing; it must be a string"),
        ([{"prompt": "p", "chosen": 3, "rejected": 3}], "row 0 of .*: `chosen` is of type int"),
        ([{"prompt": "p", "chosen": ["a"], "rejected": "b"}], "row 0 of .*: `chosen`: 'a' is not a turn"),
        ([{"prompt": None, "chosen": "a", "rejected": "b"}], "row 0 of .*: the prompt is missing"),
        ([{"chosen": "a b", "rejected": turns("a")}], "row 0 of .*: `chosen` and `rejected` must both be"),
        ([{"chosen": ["a"], "rejected": ["b"]}], "row 0 of .*: 'a' is not a turn"),
        ([{"chosen": "a b", "rejected": "c d"}], "row 0 of .* share no beginning"),
        (
            [
                {"prompt": "p", "chosen": "a", "rejected": "a"},
                {"prompt": "p", "chosen": "a", "rejected": "b"},
                {"prompt": turns("p"), "chosen": "a", "rejected": "b"},
            ],
            "row 2 of .* and its row 1 differ in kind",
        ),
    ],
)
def test_bad_preferences_are_refused(tiny_tokenizer: Any, rows: list[dict[str, Any]], message: str | None) -> None:
    if message is None:
        assert len(load_preferences(config(), tiny_tokenizer, rows)) == 1
        return
    with pytest.raises(PairtuneError, match=message):
        load_preferences(config(), tiny_tokenizer, rows)


def test_the_configurations_words_are_obeyed(tiny_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {"q": "a", "chosen": "b", "rejected": "c", "split": "dev"},
        {"q": "d", "chosen": "e", "rejected": "f", "split": "test"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = config(dataset=str(path), prompt_column="q", dataset_train_split="dev", chat="always", system_prompt="s")
    dataset = load_preferences(words, tiny_tokenizer)
    prompt = f"<|system|>s{END}{USER}a{END}{ASSISTANT}"
    assert all_texts(tiny_tokenizer, dataset) == [(prompt, [f"b{END}", f"c{END}"])]
    with pytest.raises(PairtuneError, match="dataset_config 'small' has no meaning"):
        load_preferences(config(dataset=str(path), dataset_config="small"), tiny_tokenizer)
    # What is passed in takes the place of the configuration's dataset with its variant.
    assert len(load_preferences(config(dataset_config="small"), tiny_tokenizer, [hh(*HH[0])])) == 1


# Scored completions.


SCORED = [
    {"prompt": "p", "completion": "a", "reward": 0.5},
    {"prompt": "q", "completion": "d", "reward": 3},
    {"prompt": "p", "completion": "bb", "reward": -1.0},
    {"prompt": "q", "completion": "e", "reward": 2.0},
    {"prompt": "p", "completion": "c", "reward": 0.0},
]
IN_LISTS = [
    {"prompt": "p", "completions": ["a", "bb", "c"], "rewards": [0.5, -1.0, 0.0]},
    {"prompt": "q", "completions": ["d", "e"], "rewards": [3, 2.0]},
]
TWO_POLICIES = [  # of one policy each
    {"prompt": "p", "completions": ["a", "bb"], "rewards": [0.5, -1.0]},
    {"prompt": "q", "completions": ["d"], "rewards": [3]},
    {"prompt": "p", "completions": ["c"], "rewards": [0.0]},
    {"prompt": "q", "completions": ["e"], "rewards": [2.0]},
]


@pytest.mark.parametrize("rows", [SCORED, IN_LISTS, TWO_POLICIES], ids=["one a row", "in lists", "of two policies"])
def test_scored_completions_are_grouped_by_prompt(tiny_tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    dataset = load_scored(config(algorithm="copg"), tiny_tokenizer, rows)
    assert all_texts(tiny_tokenizer, dataset) == [
        ("p", [f"a{END}", f"bb{END}", f"c{END}"]),
        ("q", [f"d{END}", f"e{END}"]),
    ]
    assert (len(dataset), dataset.num_completions, dataset.notes) == (2, 3, [])
    for order, rewards in ([0, 1], [[0.5, -1.0, 0.0], [3.0, 2.0, 0.0]]), ([1], [[3.0, 2.0, 0.0]]):
        batch = dataset.batch(order)
        assert torch.equal(batch.rewards, torch.tensor(rewards))
        assert batch.rewards.dtype == torch.float32
    assert torch.equal(dataset.batch([0, 1]).reward_mask, torch.tensor([[True, True, True], [True, True, False]]))


def test_completions_and_rewards_stay_with_their_prompt(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": "too long", "completions": ["x", "y"], "rewards": [7, 8]}, *IN_LISTS]
    dataset = load_scored(config(max_prompt_length=3), tiny_tokenizer, rows)
    assert [prompt for prompt, _ in all_texts(tiny_tokenizer, dataset)] == ["p", "q"]
    assert dataset.rewards == [[0.5, -1.0, 0.0], [3.0, 2.0]]


def test_equal_conversations_are_one_prompt(tiny_tokenizer: Any) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": "a"}], "completion": said("b"), "reward": 1},
        {"prompt": [{"content": "a", "role": "user"}], "completion": turns("a", "c"), "reward": 2},
        {"prompt": turns("d"), "completion": "e", "reward": 1},
    ]
    dataset = load_scored(config(), tiny_tokenizer, rows)
    assert all_texts(tiny_tokenizer, dataset) == [(f"{USER}a{END}{ASSISTANT}", [f"b{END}", f"c{END}"])]
    assert dataset.notes == ["1 prompt left out: fewer than two scored completions"]


def test_scored_completions_that_are_left_out_are_counted(tiny_tokenizer: Any) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "", "b", turns("x", "y")], "rewards": [1, 2, 3, 4]},
        {"prompt": "q", "completions": ["a", " "], "rewards": [1, 2]},
        {"prompt": "r", "completions": ["a", "a"], "rewards": [1, 2]},
        {"prompt": "s", "completions": [], "rewards": []},
    ]
    dataset = load_scored(config(max_completion_length=9), tiny_tokenizer, rows)
    assert dataset.rewards == [[1.0, 3.0]]
    assert dataset.notes == [
        "2 completions left out: a completion is empty",
        "1 completion left out: a completion is not one turn of the assistant",
        "2 prompts left out: fewer than two scored completions",
        "1 prompt left out: its completions do not differ within max_completion_length=9 tokens",
    ]


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), 1e39, None, "1", True, [1.0]])
def test_a_reward_that_is_no_finite_number_is_refused(tiny_tokenizer: Any, reward: Any) -> None:
    rows = [*SCORED, {"prompt": "p", "completion": "f", "reward": reward}]
    with pytest.raises(PairtuneError, match=r"row 5 of the list of .*: the reward .* is not a finite number; correct"):
        load_scored(config(), tiny_tokenizer, rows)
    with pytest.raises(PairtuneError, match=r"row 0 of the list of .*: the reward .* is not a finite number; correct"):
        load_scored(config(), tiny_tokenizer, [{"prompt": "p", "completions": ["a", "b"], "rewards": [1, reward]}])


@pytest.mark.parametrize(
    "row, message",
    [
        ({"promt": "p", "completion": "a", "reward": 1}, "has no column `prompt`, only .* did you mean `promt`"),
        ({"prompt": "p", "text": "a", "reward": 1}, "has no column `completion`, .* scored completions have"),
        ({"prompt": "p", "completion": "a", "rewrad": 1}, "has no column `reward`, .* did you mean `rewrad`"),
        ({"prompt": "p", "completions": ["a"], "reward": [1]}, "has no column `rewards`, .* did you mean `reward`"),
        ({"prompt": "p", "completions": ["a", "b"], "rewards": [1]}, "equal length, not a list of 2 and a list of 1"),
        ({"prompt": "p", "completions": "a", "rewards": [1]}, "must be lists of equal length, not of type str and a"),
        ({"prompt": "p", "completions": ["a"], "rewards": None}, "not a list of 1 and missing"),
        ({"prompt": "p", "completion": 3, "reward": 1}, "row 0 of .*: `completion` is of type int; it must be a str"),
        ({"prompt": "", "completion": "a", "reward": 1}, "row 0 of .*: the prompt is empty"),
        ({"prompt": "p", "completion": "a", "reward": 1}, "nothing is left .*: 1 prompt left out: fewer than two"),
    ],
)
def test_bad_scored_rows_are_refused(tiny_tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(PairtuneError, match=message):
        load_scored(config(), tiny_tokenizer, [row])


# Batches.


def test_a_batch_is_padded_to_its_own_longest_completion(tiny_tokenizer: Any) -> None:
    dataset = load_scored(config(), tiny_tokenizer, SCORED)
    both, second = dataset.batch([1, 0]).completions, dataset.batch([1]).completions
    assert tiny_tokenizer.batch_decode(both.completion_ids.flatten(0, 1)) == [
        f"d{END}<|pad|>", f"e{END}<|pad|>", "<|pad|>" * 3, f"a{END}<|pad|>", f"bb{END}", f"c{END}<|pad|>",
    ]  # fmt: skip
    assert torch.equal(both.num_tokens, torch.tensor([[2, 2, 0], [2, 3, 2]]))
    assert second.completion_ids.shape == (1, 3, 2)
    for completions in (both, second):
        assert torch.equal(completions.sampler_logprobs, torch.zeros(completions.completion_mask.shape))
        assert (completions.completion_ids.dtype, completions.completion_mask.dtype) == (torch.int64, torch.bool)
        assert not completions.truncated.any()
        assert completions.policy_version == 0


@pytest.mark.parametrize("shared", [True, False])
def test_a_missing_completion_is_harmless(tiny_tokenizer: Any, tiny_llama: Any, shared: bool) -> None:
    """The others get the log-probabilities that they get alone, and the gradient is finite."""
    dataset = load_scored(config(), tiny_tokenizer, [*SCORED, {"prompt": "p", "completion": "dd", "reward": 1}])
    scorer = Scorer(tiny_llama, shared=shared)
    completions = dataset.batch([1, 0]).completions
    assert not completions.completion_mask[0, 2:].any()
    together, _ = scorer.logprobs(scorer.layout(completions))
    for p, row in enumerate([1, 0]):
        for k, completion in enumerate(dataset.completions[row]):
            ids = torch.tensor([dataset.prompt_dataset.token_ids[row] + completion.ids])
            logits = tiny_llama(ids).logits[0].log_softmax(-1)
            num_prompt = len(dataset.prompt_dataset.token_ids[row])
            alone = logits[num_prompt - 1 : -1].gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            torch.testing.assert_close(together[p, k, : len(completion.ids)], alone, rtol=1e-4, atol=1e-5)
    assert (together[0, 2:] == 0).all()
    together.sum().backward()
    assert all(torch.isfinite(weight.grad).all() for weight in tiny_llama.parameters())


def test_the_order_is_that_of_prompts(tiny_tokenizer: Any) -> None:
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(9)]
    dataset = load_preferences(config(), tiny_tokenizer, rows)
    sampled, _ = load_prompts(config(dataset_test_split=None), tiny_tokenizer, train_dataset=rows)
    for step in range(6):
        assert dataset.step_rows(3, step, 4) == sampled.step_rows(3, step, 4)
    assert torch.equal(dataset.batch([7, 2]).prompts.rows, torch.tensor([7, 2]))
    with pytest.raises(PairtuneError, match="batch_size=10 is more than the 9 prompts of the list of"):
        dataset.step_rows(3, 0, 10)


# Held-out prompts of datasets that hold completions.


def held_out(tokenizer: Any, rows: list[dict[str, Any]], **settings: Any) -> PromptDataset:
    words = EvaluateConfig(model="m", dataset="everyday", reward_funcs=["a.b"], **{"chat": "never", **settings})
    return load_eval_prompts(words, tokenizer, rows)


@pytest.mark.parametrize(
    "row, prompt",
    [
        (hh(*HH[0]), HH[0][0]),  # without "I am", with which both answers begin
        (hh(*HH[1]), HH[1][0]),
        (hh(HH[0][0], "", " b"), HH[0][0]),
        (hh("\n\nHuman: a\n\nAssistant:", " b\n\nHuman: c\n\nAssistant: d", " e"), "\n\nHuman: a\n\nAssistant:"),
        (hh("Note:\n\nAssistant:", " I am well", " I am not"), "Note:\n\nAssistant: I am"),  # no dialogue
        ({"chosen": "the sky is blue", "rejected": "the sky is brown"}, "the sky is"),
        ({"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "b", "c", "e")}, turns("a", "b", "c")),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a"),
        ({"prompt": turns("a"), "completion": "b", "reward": 1.0}, turns("a")),
    ],
)
def test_held_out_prompts_stop_before_the_answers(tiny_tokenizer: Any, row: dict[str, Any], prompt: Any) -> None:
    assert held_out(tiny_tokenizer, [row]).prompts == [prompt]


# Examples to imitate.


def sft_config(**changes: Any) -> SFTConfig:
    return SFTConfig(**{"model": "m", "dataset": "d", **changes})


def examples_of(tokenizer: Any, rows: list[dict[str, Any]], **settings: Any) -> ExampleDataset:
    return encode_examples(rows, "the rows", sft_config(**settings), tokenizer)


def marked(tokenizer: Any, example: Example) -> str:
    """An example as text, what is learned in square brackets."""
    text, inside = "", False
    for place, token_id in enumerate(example.ids):
        if (place in example.learned) != inside:
            text, inside = text + "[]"[inside], not inside
        text += tokenizer.decode([token_id])
    return text + "]" * inside


def all_marked(tokenizer: Any, rows: list[dict[str, Any]], **settings: Any) -> list[str]:
    return [marked(tokenizer, example) for example in examples_of(tokenizer, rows, **settings).examples]


PAIR = {"prompt": "q: ", "completion": "a"}
WHOLE = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"


@pytest.mark.parametrize(
    "row, settings, expected",
    [
        (PAIR, {"chat": "never"}, f"q: [a{END}]"),
        (PAIR, {}, f"{USER}q: {END}{ASSISTANT}[a{END}]"),
        (PAIR, {"system_prompt": "s"}, f"<|system|>s{END}{USER}q: {END}{ASSISTANT}[a{END}]"),
        ({"prompt": turns("a"), "completion": said("b")}, {"chat": "never"}, f"{USER}a{END}{ASSISTANT}[b{END}]"),
        ({"prompt": turns("a"), "completion": turns("a", "b")}, {}, f"{USER}a{END}{ASSISTANT}[b{END}]"),
        (
            {"messages": [{"role": "system", "content": "s"}, *turns("a", "b", "c", "d")]},
            {},
            f"<|system|>s{END}{USER}a{END}{ASSISTANT}[b{END}]{USER}c{END}{ASSISTANT}[d{END}]",
        ),
        ({"messages": turns("a", "b", "c")}, {}, f"{USER}a{END}{ASSISTANT}[b{END}]"),  # the question is of no use
        (
            {"messages": turns("a", " ", "c", "d")},  # an empty turn is only read
            {},
            f"{USER}a{END}{ASSISTANT} {END}{USER}c{END}{ASSISTANT}[d{END}]",
        ),
        (
            {"messages": [*said("hi"), *turns("a", "b")]},  # and so is one that answers nothing
            {},
            f"{ASSISTANT}hi{END}{USER}a{END}{ASSISTANT}[b{END}]",
        ),
        ({"text": "abc"}, {}, f"a[bc{END}]"),
        ({"text": f"abc{END}"}, {}, f"a[bc{END}]"),
        ({"text": "abc", "messages": turns("a", "b")}, {}, f"{USER}a{END}{ASSISTANT}[b{END}]"),
        ({**PAIR, "messages": turns("x", "y"), "text": "z"}, {"chat": "never"}, f"q: [a{END}]"),
        (
            {"prompt": "p", "chosen": "c", "rejected": "d", "messages": turns("x", "y")},
            {},
            f"{USER}x{END}{ASSISTANT}[y{END}]",
        ),
        ({"q": "p", "a": "c"}, {"prompt_column": "q", "completion_column": "a", "chat": "never"}, f"p[c{END}]"),
        ({"talk": turns("a", "b")}, {"messages_column": "talk"}, f"{USER}a{END}{ASSISTANT}[b{END}]"),
        ({"content": "ab"}, {"text_column": "content"}, f"a[b{END}]"),
    ],
)
def test_what_of_a_row_is_learned(tiny_tokenizer: Any, row: dict[str, Any], settings: Any, expected: str) -> None:
    assert all_marked(tiny_tokenizer, [row], **settings) == [expected]


@pytest.mark.parametrize(
    "row, expected",
    [
        ({"prompt": "p", "chosen": "c", "rejected": "d"}, f"p[c{END}]"),
        ({"chosen": WHOLE + " d", "rejected": WHOLE + " e"}, f"{WHOLE}[ d{END}]"),
        ({"chosen": WHOLE + " d", "rejected": WHOLE + " d"}, f"{WHOLE}[ d{END}]"),  # no comparison, but an answer
        ({"chosen": "the sky is blue", "rejected": "the sky is brown"}, f"the sky is[ blue{END}]"),
        ({"chosen": turns("a", "b"), "rejected": turns("a", "c")}, f"{USER}a{END}{ASSISTANT}[b{END}]"),
        (
            {"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "e")},  # only the last turn was chosen
            f"{USER}a{END}{ASSISTANT}b{END}{USER}c{END}{ASSISTANT}[d{END}]",
        ),
    ],
)
def test_the_chosen_completions_of_a_preference_dataset(
    tiny_tokenizer: Any, row: dict[str, Any], expected: str
) -> None:
    assert all_marked(tiny_tokenizer, [row], completion_column="chosen", chat="never") == [expected]


def test_the_prompts_of_examples_are_those_that_sampling_starts_from(tiny_tokenizer: Any) -> None:
    for prompts in (["a b", "c"], [turns("a b"), turns("c", "d", "e")]):
        rows = [{"prompt": prompt, "completion": " x"} for prompt in prompts]
        sampled, _ = load_prompts(config(chat="auto", dataset_test_split=None), tiny_tokenizer, train_dataset=rows)
        for example, ids in zip(examples_of(tiny_tokenizer, rows).examples, sampled.token_ids, strict=True):
            assert example.ids[: len(ids)] == ids
            assert example.learned[0] == len(ids)


def test_a_template_that_rewrites_earlier_turns_gives_each_its_own_example(tiny_tokenizer: Any) -> None:
    """As some do that leave the thought out of all turns but the last."""
    tiny_tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn['role'] == 'assistant' %}" + ASSISTANT + "{% if loop.last %}(hm)"
        "{% endif %}{{ turn['content'] }}" + END + "{% else %}" + USER + "{{ turn['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
    )
    rows = [{"messages": turns("a", "b", "c", "d")}, {"messages": turns("a", "b")}]
    assert all_marked(tiny_tokenizer, rows) == [
        f"{USER}a{ASSISTANT}[(hm)b{END}]",
        f"{USER}a{ASSISTANT}b{END}{USER}c{ASSISTANT}[(hm)d{END}]",
        f"{USER}a{ASSISTANT}[(hm)b{END}]",
    ]


def test_two_conversations_that_begin_alike_stay_apart(tiny_tokenizer: Any) -> None:
    rows = [{"messages": turns("a", "b")}, {"messages": turns("a", "b", "c", "d")}]
    one = f"{USER}a{END}{ASSISTANT}[b{END}]"
    assert all_marked(tiny_tokenizer, rows) == [one, f"{one}{USER}c{END}{ASSISTANT}[d{END}]"]


def test_a_template_without_a_closing_token_gives_each_turn_an_end(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = template(closing="\n")
    assert all_marked(tiny_tokenizer, [{"messages": turns("a", "b", "c", "d")}]) == [
        f"{USER}a{ASSISTANT}[b{END}]",
        f"{USER}a{ASSISTANT}b\n{USER}c{ASSISTANT}[d{END}]",
    ]


def test_a_text_gets_the_tokenizers_own_bos_once() -> None:
    from tokenizers import processors

    vocabulary = {piece: number for number, piece in enumerate(["<unk>", "<s>", "</s>", "a", "b"])}
    core = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    core.add_special_tokens(["<s>", "</s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = of_pieces(core)
    assert tokenizer("<s>ab")["input_ids"] == [1, 1, 3, 4, 2]
    examples = examples_of(tokenizer, [{"text": "ab"}, {"text": "<s>ab"}, {"text": "ab</s>"}]).examples
    assert [example.ids for example in examples] == [[1, 3, 4, 2]] * 3
    assert [example.learned for example in examples] == [[1, 2, 3]] * 3


def test_what_is_too_long_is_left_out_or_cut_and_counted(tiny_tokenizer: Any) -> None:
    rows = [
        {"prompt": "12345", "completion": "a"},  # prompt too long
        {"prompt": "1234", "completion": "a"},  # fits: 6 tokens
        {"prompt": "123", "completion": "abcdef"},  # cut to 6, without EOS
        {"prompt": "1", "completion": "ab"},
        {"prompt": "1", "completion": "\n "},  # empty
        {"prompt": "1", "completion": turns("x", "y")},  # not one turn
    ]
    settings: dict[str, Any] = {"chat": "never", "max_prompt_length": 4, "max_length": 6}
    dataset = examples_of(tiny_tokenizer, rows, **settings)
    expected = [f"1234[a{END}]", "123[abc]", f"1[ab{END}]"]
    assert [marked(tiny_tokenizer, example) for example in dataset.examples] == expected
    assert dataset.notes == [
        "1 row left out: a completion is empty",
        "1 row left out: a completion is not one turn of the assistant",
        "1 row left out: its prompt is longer than max_prompt_length=4 tokens",
        "1 example cut at max_length=6",
    ]
    only = examples_of(tiny_tokenizer, rows[1:4], **settings | {"max_length": 4})
    assert [marked(tiny_tokenizer, example) for example in only.examples] == ["123[a]", f"1[ab{END}]"]
    assert only.notes == [
        "1 example left out: nothing to learn stands within max_length=4 tokens",
        "1 example cut at max_length=4",
    ]


def test_a_long_conversation_is_cut_behind_the_last_learned_token_that_fits(tiny_tokenizer: Any) -> None:
    rows = [{"messages": turns("a", "b", "c" * 9, "d")}, {"messages": turns("a" * 20, "b")}, {"messages": turns("a")}]
    dataset = examples_of(tiny_tokenizer, rows, max_length=10)
    assert [marked(tiny_tokenizer, example) for example in dataset.examples] == [f"{USER}a{END}{ASSISTANT}[b{END}]"]
    assert dataset.notes == [
        "1 conversation left out: no turn of the assistant has text and something before it",
        "1 example left out: nothing to learn stands within max_length=10 tokens",
        "1 example cut at max_length=10",
    ]


def test_turns_that_are_not_learned_are_counted(tiny_tokenizer: Any) -> None:
    rows = [{"messages": [*said("hi"), *turns("a", "", "b", "c")]}]
    assert examples_of(tiny_tokenizer, rows).notes == [
        "2 turns left out: it is empty, or the first of its conversation"
    ]


@pytest.mark.parametrize(
    "rows, settings, sentence",
    [
        ([{"chosen": "a b"}], {"completion_column": "chosen"}, "has no column `prompt`, only `chosen`; name the right"),
        (
            [{"chosen": "", "rejected": ""}],
            {"completion_column": "chosen"},
            "1 row left out: there is no prompt before",
        ),
        ([{"chosen": said("a")}], {"completion_column": "chosen"}, "1 row left out: there is no prompt before"),
        ([{"chosen": turns("a")}], {"completion_column": "chosen"}, "1 row left out: "),
        ([{"chosen": 3}], {"completion_column": "chosen"}, "row 0 of the rows: `chosen` is of type int"),
        ([{"prompt": "a", "answer": "b"}], {}, "has no column `completion`, only `prompt`, `answer`"),
        ([{"completions": "b"}], {}, "did you mean `completions`?"),
        ([{"messages": turns("a", "b")}, {"messages": None}], {}, "row 1 of the rows: `messages` is missing"),
        ([{"messages": turns("a", "b")}], {"system_prompt": "s"}, "system_prompt has nowhere to go"),
        ([{"text": "a"}, {}], {}, "row 1 of the rows: `text` is missing"),
    ],
)
def test_rows_that_are_no_examples_are_refused(
    tiny_tokenizer: Any, rows: list[dict[str, Any]], settings: Any, sentence: str
) -> None:
    with pytest.raises(PairtuneError, match=re.escape(sentence)) as caught:
        examples_of(tiny_tokenizer, rows, **settings)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_eos_or_template_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(PairtuneError, match="has no chat template"):
        examples_of(tiny_tokenizer, [{"messages": turns("a", "b")}])
    tiny_tokenizer.eos_token = None
    for row in (PAIR, {"text": "a"}):
        with pytest.raises(PairtuneError, match="has no EOS token"):
            examples_of(tiny_tokenizer, [row])


def test_held_out_examples_are_found_where_they_are_named(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"text": "train", "split": "train"}, {"text": "test", "split": "test"}]
    file = tmp_path / "held.jsonl"
    file.write_text('{"text": "elsewhere"}')

    def second(**settings: Any) -> str | None:
        in_memory = settings.pop("in_memory", None)
        words = sft_config(**settings)
        train, held_out = load_examples(words, tiny_tokenizer, train_dataset=rows, eval_dataset=in_memory)
        assert [marked(tiny_tokenizer, example) for example in train.examples] == [f"t[rain{END}]"]
        return None if held_out is None else marked(tiny_tokenizer, held_out.examples[0])

    assert second() == f"t[est{END}]"
    assert second(dataset_test_split=None) is None
    assert second(eval_dataset=str(file)) == f"e[lsewhere{END}]"
    assert second(eval_dataset=str(file), dataset_test_split=None) is None
    assert second(in_memory=[{"text": "memory"}], dataset_test_split=None) == f"m[emory{END}]"
    with pytest.raises(PairtuneError, match="has no split 'test', for its rows have no `split` column"):
        load_examples(sft_config(), tiny_tokenizer, train_dataset=[{"text": "a"}])


# Real comparisons.


@pytest.fixture(scope="module")
def comparisons() -> list[dict[str, str]]:
    if not REAL_DATA.is_file():
        pytest.skip("needs the HH comparisons in shared/data beside the repository")
    return [json.loads(line) for line in gzip.decompress(REAL_DATA.read_bytes()).decode().splitlines()]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    """The real tokenizer, from the converted weights of an earlier run; nothing is converted for a test of data."""
    for folder in sorted((default_cache_dir() / "models").glob(f"{SMOLLM2_Q4}-*/tokenizer.json")):
        return AutoTokenizer.from_pretrained(folder.parent)
    pytest.skip(f"needs the tokenizer of {SMOLLM2_Q4} in the cache; any run with that model puts it there")


def test_what_of_the_real_comparisons_is_used(comparisons: Any, smollm2: Any) -> None:
    dataset = load_preferences(config(max_prompt_length=100_000), smollm2, comparisons)
    assert (len(comparisons), len(dataset)) == (1611, 1605)
    notes = {note.partition(" ")[2]: int(note.partition(" ")[0]) for note in dataset.notes}
    assert notes.pop("completions cut at max_completion_length=256") > 0
    assert notes == {
        "rows left out: a completion is empty": 3,
        "rows left out: chosen and rejected differ before the assistant's last turn": 3,
    }
    assert all(str(prompt).endswith("\n\nAssistant:") for prompt in dataset.prompts)


def test_the_chosen_answers_of_the_real_comparisons(comparisons: Any, smollm2: Any) -> None:
    words = sft_config(completion_column="chosen", chat="never", max_prompt_length=100_000, max_length=100_000)
    rows = comparisons[::5]
    dataset = encode_examples(rows, "the comparisons", words, smollm2)
    parts = [row["chosen"].rpartition("\n\nAssistant:") for row in rows]
    parts = [(prompt + marker, answer) for prompt, marker, answer in parts if answer.strip()]
    for (prompt, answer), example in zip(parts, dataset.examples, strict=True):
        assert smollm2.decode(example.ids[: example.learned[0]]) == prompt
        assert smollm2.decode([example.ids[place] for place in example.learned]) == answer + "<|im_end|>"


@pytest.mark.parametrize("chat", ["never", "always"])
def test_real_comparisons_come_back_word_for_word(comparisons: Any, smollm2: Any, chat: str) -> None:
    rows = comparisons[::5]
    words = config(chat=chat, max_prompt_length=100_000, max_completion_length=100_000)
    dataset = load_preferences(words, smollm2, rows)
    encoded = dataset.prompt_dataset
    for prompt, number, ids, group in zip(
        dataset.prompts, encoded.numbers, encoded.token_ids, dataset.completions, strict=True
    ):
        for side, completion in zip(("chosen", "rejected"), group, strict=True):
            text, answer = smollm2.decode(ids + completion.ids), rows[number][side].removeprefix(prompt)
            if chat == "always":
                assert text.endswith(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>")
            else:
                assert text == rows[number][side] + "<|im_end|>"
            assert completion.ids.index(smollm2.eos_token_id) == len(completion.ids) - 1
            assert not completion.truncated


def test_real_comparisons_cut_at_a_cap(comparisons: Any, smollm2: Any) -> None:
    dataset = load_preferences(config(max_completion_length=32), smollm2, comparisons[:200])
    completions = dataset.batch(dataset.step_rows(0, 0, 64)).completions
    assert completions.completion_ids.shape == (64, 2, 32)
    ended = (completions.completion_ids == smollm2.eos_token_id) & completions.completion_mask
    assert torch.equal(completions.truncated, ~ended.any(-1))
    assert (completions.num_tokens[completions.truncated] == 32).all()
    assert 0 < completions.truncated.sum() < 128
