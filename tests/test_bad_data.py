"""What may be wrong with data, through `sft` and `reward` from end to end: one sentence that names the row and what to
do, or a count of what was left out and why; never a silent NaN."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import build_tiny_model
from transformers import PreTrainedTokenizerFast

from pairtune import PairtuneError
from pairtune.config import EvaluateConfig, RewardConfig, SFTConfig, TrainConfig
from pairtune.data import load_eval_prompts, load_prompts
from pairtune.models.logprobs import Scorer
from pairtune.models.reward_backbone import RewardBackbone
from pairtune.runs.metrics import read_jsonl
from pairtune.stages.reward import reward
from pairtune.stages.sft import sft

REAL_DATA = Path(__file__).parents[2] / "shared" / "data" / "hh-harmless-preferences.jsonl.gz"
STAGES: dict[str, tuple[Callable[..., Any], type[Any]]] = {"sft": (sft, SFTConfig), "reward": (reward, RewardConfig)}
HALF = "\ud83d"
"""Half of a surrogate pair, which a file of JSON can hold."""


def turns(*contents: Any) -> list[dict[str, Any]]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def dialogue(*contents: str) -> str:
    """The same in the markup of the HH datasets."""
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {content}" for i, content in enumerate(contents))


def pair(**columns: Any) -> dict[str, Any]:
    return {"prompt": "p ", "chosen": "aa", "rejected": "b", **columns}


def example(**columns: Any) -> dict[str, Any]:
    return {"prompt": "p ", "completion": "aa", **columns}


def ranking(completions: Any = ("a", "b"), ranks: Any = (1, 2), **columns: Any) -> dict[str, Any]:
    return {
        "prompt": "p ",
        "completions": list(completions) if isinstance(completions, tuple) else completions,
        "ranks": list(ranks) if isinstance(ranks, tuple) else ranks,
        **columns,
    }


NOTE = re.compile(
    r"(\d+) (?:rows?|prompts?) left out: (a completion is empty|chosen and rejected differ before the "
    r"assistant's last turn|its [^0-9]+|longer than max_prompt_length)"
)
GOOD = {"sft": example(prompt="q ", completion="c"), "reward": pair(prompt="q ", chosen="c", rejected="dd")}
RANKED = ranking(("c", "dd"), (1, 2))


@pytest.fixture
def run(tmp_path: Path, _tokenizer_folder: str) -> Callable[..., Path]:
    """run(stage, rows, held_out, words of the configuration, changes of the tokenizer) -> the run folder."""

    def start(stage: str, rows: Any, held_out: Any = None, tokenizer: Any = None, **words: Any) -> Path:
        function, config = STAGES[stage]
        reader = PreTrainedTokenizerFast.from_pretrained(_tokenizer_folder)
        for name, value in (tokenizer or {}).items():
            setattr(reader, name, value)
        model = words.pop("model", None) or build_tiny_model("llama")
        settings = {
            "model": "in memory",
            "dataset": "passed in",
            "device": "cpu",
            "max_steps": 2,
            "dataset_test_split": None if held_out is None else "test",
            "output_dir": str(tmp_path / "run"),
            **words,
        }
        function(config(**settings), model=model, tokenizer=reader, train_dataset=rows, eval_dataset=held_out)
        return tmp_path / "run"

    return start


def numbers(value: Any) -> list[float]:
    """All numbers of a line; None stands for NaN and infinity."""
    if isinstance(value, dict):
        # One held-out row says nothing of the spread: its interval has no ends.
        return [n for key, inner in value.items() if key not in ("low", "high") for n in numbers(inner)]
    return [math.nan if value is None else float(value)]


# ------------------------------------------------------------------------------------------------ refused in a sentence


class Bad(NamedTuple):
    """Rows that a stage refuses, and what it says."""

    stage: str
    rows: Any
    sentence: str
    words: dict[str, Any] | None = None
    tokenizer: dict[str, Any] | None = None


THE = "of the list of prompts"
LISTS = f"row 0 {THE}: `completions` and `ranks` must be lists of equal length, not"
MARGIN, PROBABILITY = (f"row 0 {THE}: the {kind} {{}} in `{kind}` is not a" for kind in ("margin", "probability"))
NOTHING = "nothing is left of the list of prompts to learn from: 1 "

REFUSED: dict[str, Bad] = {
    # Nothing, or nothing of what is needed.
    "no rows": Bad("sft", [], "has no rows in split 'train'"),
    "no rows to compare": Bad("reward", [], "has no rows in split 'train'"),
    "no dictionaries": Bad("reward", ["a"], f"row 0 {THE} is a str, not a dictionary"),
    "columns in place of rows": Bad("sft", {"prompt": ["a"], "completion": ["b"]}, "has no split 'train'; it has `pro"),
    "no completion column": Bad("sft", [{"prompt": "a"}], "has no column `completion`, only `prompt`; examples are in"),
    "no chosen column": Bad("reward", [example()], "no column `chosen`, only `prompt`, `completion`; preferences have"),
    "no rejected column": Bad("reward", [{"prompt": "p", "chosen": "a"}], "has no column `rejected`, only `prompt`, `"),
    "no prompt column": Bad("reward", [{"completions": ["a", "b"], "ranks": [1, 2]}], "has no column `prompt`, only `"),
    "no prompt to be found": Bad("reward", [{"chosen": "abc", "rejected": "xyz"}], "share no beginning, so there is n"),
    "a cell that is missing": Bad("sft", [example(), {"prompt": "p"}], f"row 1 {THE}: `completion` is missing; it mus"),
    # Identical, empty, different before the last turn.
    "identical sides": Bad("reward", [pair(rejected="aa")], f"{NOTHING}row left out: chosen and rejected are identica"),
    "identical within the cap": Bad(
        "reward",
        [pair(chosen="same 1", rejected="same 2")],
        f"{NOTHING}prompt left out: its completions do not differ within max_completion_length=4 tokens",
        {"max_completion_length": 4},
    ),
    "an empty completion": Bad("sft", [example(completion=" ")], f"{NOTHING}row left out: a completion is empty"),
    "an empty side": Bad("reward", [pair(rejected="")], f"{NOTHING}row left out: a completion is empty"),
    "an empty last turn": Bad(
        "reward",
        [{"chosen": dialogue("a", ""), "rejected": dialogue("a", "b")}],
        f"{NOTHING}row left out: a completion is empty",
    ),
    "turns that differ earlier": Bad(
        "reward",
        [{"chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x", "c", "e")}],
        f"{NOTHING}row left out: chosen and rejected differ before the assistant's last turn",
    ),
    "text that differs earlier": Bad(
        "reward",
        [{"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "x", "c", "e")}],
        f"{NOTHING}row left out: chosen and rejected differ before the assistant's last turn",
    ),
    "an empty prompt": Bad("sft", [example(prompt=" ")], f"row 0 {THE}: the prompt is empty"),
    "an empty conversation": Bad("reward", [pair(prompt=[])], f"row 0 {THE}: the prompt is an empty conversation"),
    "no turn to learn": Bad("sft", [{"messages": turns("a")}], f"{NOTHING}conversation left out: no turn of the assis"),
    "nothing but EOS": Bad("sft", [{"text": "<|end|>"}], f"{NOTHING}example left out: nothing to learn stands within"),
    # Too long.
    "longer than the context": Bad(
        "sft",
        [example(prompt="p" * 300)],
        f"an example {THE} has 306 tokens, but the model reads at most 256; set max_length to 256 or less",
    ),
    "compared beyond the context": Bad(
        "reward",
        [pair(prompt="p" * 300)],
        f"a prompt {THE} with its completion has 306 tokens, but the model reads at most 256; lower max_prompt_length",
    ),
    "longer than max_prompt_length": Bad(
        "sft",
        [example(prompt="p" * 300)],
        f"{NOTHING}row left out: its prompt is longer than max_prompt_length=99 tokens",
        {"max_prompt_length": 99},
    ),
    "compared beyond max_prompt_length": Bad(
        "reward", [pair(prompt="p" * 300)], "longer than max_prompt_length=99", {"max_prompt_length": 99}
    ),
    # Lists and ranks.
    "fewer ranks": Bad("reward", [ranking(ranks=(1,))], f"{LISTS} a list of 2 and a list of 1"),
    "no ranks": Bad("reward", [ranking(ranks=None)], f"{LISTS} a list of 2 and missing"),
    "completions in a string": Bad("reward", [ranking(completions="ab")], f"{LISTS} of type str and a list of 2"),
    "ranks in strings": Bad("reward", [ranking(ranks=("1", "2"))], f"row 0 {THE}: the rank '1' is not a whole number"),
    "a rank that is half": Bad("reward", [ranking(ranks=(1, 1.5))], "the rank 1.5 is not a whole number; write 1 for"),
    "a rank that is NaN": Bad("reward", [ranking(ranks=(1, math.nan))], "the rank nan is not a whole number"),
    "a rank that is infinite": Bad("reward", [ranking(ranks=(1, math.inf))], "the rank inf is not a whole number"),
    "all tied": Bad("reward", [ranking(ranks=(3, 3))], f"{NOTHING}prompt left out: all its completions have one rank"),
    "many tied": Bad("reward", [ranking(tuple("abcdefghijklm"), (1,) * 12 + (2,))], "takes among at most 12 completio"),
    "one completion": Bad("reward", [ranking(("a",), (1,))], f"{NOTHING}prompt left out: fewer than two scored"),
    "copies of one": Bad("reward", [ranking(("a", "a"))], f"{NOTHING}prompt left out: its completions do not differ"),
    # Numbers that are none.
    **{
        f"the margin {value!r}": Bad("reward", [pair(margin=value)], MARGIN.format(shown))
        for value, shown in ((math.nan, "nan"), (math.inf, "inf"), (1e300, r"1e\+300"), ("1", "'1'"), (None, "None"))
    },
    "a margin that overflows": Bad("reward", [pair(margin=3e38), pair(margin=3e38)], "the loss of step 1 is not finit"),
    **{
        f"the probability {value!r}": Bad("reward", [pair(probability=value)], PROBABILITY.format(shown))
        for value, shown in ((math.nan, "nan"), (1.5, "1.5"), (-0.1, "-0.1"), ("x", "'x'"), (True, "True"))
    },
    "both": Bad("reward", [pair(margin=1.0, probability=0.9)], "has both `margin` and `probability`"),
    # What is no text.
    **{
        f"the prompt {value!r}": Bad("sft", [example(prompt=value)], f"row 0 {THE}: the prompt is {shown}; it must")
        for value, shown in ((3, "of type int"), (None, "missing"), ({"role": "user"}, "of type dict"))
    },
    **{
        f"the completion {value!r}": Bad("sft", [example(completion=value)], f"`completion` is of type {kind}; it must")
        for value, kind in ((3, "int"), (math.nan, "float"), ({"a": 1}, "dict"), (b"a", "bytes"))
    },
    "chosen is a number": Bad("reward", [pair(chosen=1)], f"row 0 {THE}: `chosen` is of type int; it must be a string"),
    "both are one number": Bad("reward", [pair(chosen=1, rejected=1)], "`chosen` is of type int; it must be a string"),
    "numbers in a list": Bad("reward", [ranking((1, 2))], "`completions` is of type int; it must be a string or"),
    "a turn without text": Bad("sft", [{"messages": turns("a", None)}], r"'content': None\} is not a turn like"),
    "a turn of parts": Bad("sft", [example(prompt=turns([{"type": "text", "text": "a"}]))], "is not a turn like"),
    "text beside turns": Bad("reward", [{"chosen": turns("a", "b"), "rejected": "a"}], "must both be strings or both"),
    "half a character": Bad("sft", [GOOD["sft"], example(completion=f"a{HALF}")], f"row 1 {THE}: its text holds '.ud8"),
    "half a character in a prompt": Bad("reward", [pair(prompt=HALF)], f"row 0 {THE}: its text holds '.ud83d', which"),
    "half a character in text": Bad("sft", [{"text": f"ab{HALF}"}], f"row 0 {THE}: its text holds '.ud83d', which is"),
    # Tokenizers.
    "no EOS": Bad("sft", [example()], "has no EOS token, so no completion could end", {}, {"eos_token": None}),
    "no EOS to close with": Bad("reward", [pair()], "has no EOS token, so no completion", {}, {"eos_token": None}),
    "no template": Bad(
        "sft", [{"messages": turns("a", "b")}], "conversations, but .* no chat template", {}, {"chat_template": None}
    ),
    "no template to compare with": Bad(
        "reward", [pair()], "chat is `always`, but .* has no chat template", {"chat": "always"}, {"chat_template": None}
    ),
    "a template without answers": Bad(
        "reward", [pair()], "leaves out what the assistant says", {}, {"chat_template": "{{ messages[0]['content'] }}"}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_in_one_sentence(run: Callable[..., Path], name: str) -> None:
    bad = REFUSED[name]
    with pytest.raises(PairtuneError, match=bad.sentence) as caught:
        run(bad.stage, bad.rows, tokenizer=bad.tokenizer, **(bad.words or {}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", [f"a{HALF}", turns(f"a{HALF}")])
def test_half_a_character_in_a_prompt_is_said_wherever_prompts_are_read(
    tmp_path: Path, tiny_tokenizer: Any, prompt: Any
) -> None:
    """Of training and of evaluation, though nothing stands behind the prompt there."""
    rows = [{"prompt": "good" if isinstance(prompt, str) else turns("good")}, {"prompt": prompt}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    sentence = r"^row 1 of dataset '.*prompts.jsonl': its text holds '.ud83d', which is half of a character; correct it"
    for load, config in (
        (load_prompts, TrainConfig(model="m", dataset=str(path), dataset_test_split=None)),
        (load_eval_prompts, EvaluateConfig(model="m", dataset=str(path))),
    ):
        with pytest.raises(PairtuneError, match=sentence):
            load(config, tiny_tokenizer)


OF_ROWS = [name for name, bad in REFUSED.items() if bad.rows and not bad.tokenizer and "overflows" not in name][::3]
"""Every third: both sets of rows go the same way."""


@pytest.mark.parametrize("name", OF_ROWS)
def test_held_out_rows_are_looked_at_as_closely(run: Callable[..., Path], tmp_path: Path, name: str) -> None:
    """Before the first update, not at the first evaluation."""
    bad = REFUSED[name]
    sentence = bad.sentence.replace("no split 'train'", "no split 'test'")
    with pytest.raises(PairtuneError, match=sentence):
        run(bad.stage, [GOOD[bad.stage]], held_out=bad.rows, **(bad.words or {}))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ left out, and counted


LEFT_OUT: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "an empty completion": ("sft", [example(completion="")] * 2, "2 rows left out: a completion is empty"),
    "a long prompt": ("sft", [example(prompt="p" * 99)], "1 row left out: its prompt is longer than max_prompt_length"),
    "two turns": ("sft", [example(completion=turns("a", "b"))], "1 row left out: a completion is not one turn of the"),
    "identical sides": ("reward", [pair(rejected="aa")] * 3, "3 rows left out: chosen and rejected are identical"),
    "an empty side": ("reward", [pair(chosen=" ")], "1 row left out: a completion is empty"),
    "another turn": ("reward", [pair(rejected=turns("a", "b"))], "1 row left out: a completion is not one turn of the"),
    "a long prompt, compared": ("reward", [pair(prompt="p" * 99)], "1 prompt left out: longer than max_prompt_length"),
    "all tied": ("reward", [ranking(ranks=(2, 2))], "1 prompt left out: all its completions have one rank"),
    "an empty one of three": ("reward", [ranking(("a", "", "b"), (1, 2, 3))], "1 completion left out: a completion is"),
    "one of its kind": ("reward", [ranking(("a", " "), (1, 2))], "1 prompt left out: fewer than two scored completion"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_is_left_out_is_counted_and_the_rest_is_learned(
    run: Callable[..., Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, rows, note = LEFT_OUT[name]
    good = RANKED if "ranks" in rows[0] else GOOD[stage]
    folder = run(stage, [*rows, good], held_out=[good, *rows], chat="never", max_prompt_length=50)
    shown = " ".join(capsys.readouterr().out.split())
    assert f" {note}" in f" {shown}"
    assert f"held-out: {note}" in shown
    metrics, evaluations = (read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "evaluations"))
    assert len(metrics) == len(evaluations) == 2
    found = [number for line in [*metrics, *evaluations] for number in numbers(line)]
    assert all(map(math.isfinite, found))


ODD: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "one row": ("sft", [example()]),
    "one pair": ("reward", [pair()]),
    "one ranking": ("reward", [ranking()]),
    "a negative margin": ("reward", [pair(margin=-1.0), pair(margin=0.0)]),
    "labels that decide nothing": ("reward", [pair(probability=0.5)]),
    "labels for the rejected one": ("reward", [pair(probability=0.0)]),
    "ties among ranks": ("reward", [ranking(("a", "b", "c"), (1, 1, 2))]),
    "ranks from anywhere": ("reward", [ranking(ranks=(-7, 900.0))]),
    "one character": ("sft", [{"text": "a"}]),
    "EOS within": ("sft", [example(completion="a<|end|>b")]),
    "characters beyond the vocabulary": ("sft", [example(completion="\0é☃")]),
    "sides that differ in length alone": ("reward", [pair(chosen="a" * 60, rejected="a" * 61)]),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_but_right_is_learned(run: Callable[..., Path], name: str) -> None:
    stage, rows = ODD[name]
    folder = run(stage, rows, held_out=rows, chat="never")
    lines = [line for name in ("metrics", "evaluations") for line in read_jsonl(folder / f"{name}.jsonl")]
    assert len(lines) == 4
    assert all(math.isfinite(number) for line in lines for number in numbers(line))
    assert any((folder / "checkpoints").iterdir())


@pytest.mark.parametrize("stage", STAGES)
def test_a_tokenizer_without_a_pad_token_is_enough(run: Callable[..., Path], stage: str) -> None:
    folder = run(stage, [GOOD[stage]], held_out=[GOOD[stage]], tokenizer={"pad_token": None})
    assert all(math.isfinite(number) for line in read_jsonl(folder / "metrics.jsonl") for number in numbers(line))


# -------------------------------------------------------------------------------------------------- never a silent NaN


def test_log_probabilities_that_are_not_finite_end_an_evaluation(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = Scorer.logprobs
    monkeypatch.setattr(Scorer, "logprobs", lambda *a, **k: tuple(x * math.nan for x in scored(*a, **k)))
    with pytest.raises(PairtuneError, match="the model gives log-probabilities that are not finite; lower learning_"):
        run("sft", [GOOD["sft"]], held_out=[GOOD["sft"]])


def test_rewards_that_are_not_finite_end_an_evaluation(
    run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = RewardBackbone.rewards
    monkeypatch.setattr(RewardBackbone, "rewards", lambda *a, **k: rewards(*a, **k) * math.nan)
    with pytest.raises(PairtuneError, match="the reward model gives rewards that are not finite; lower learning_rate"):
        run("reward", [GOOD["reward"]], held_out=[GOOD["reward"]])


# ------------------------------------------------------------------------------------------------------- the real data


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_real_comparisons_go_through_both_stages(
    run: Callable[..., Path], stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """1,611 rows, of which three have an empty side and three differ before the last turn."""
    if not REAL_DATA.is_file():
        pytest.skip("needs the HH comparisons in shared/data beside the repository")
    words = {"dataset": str(REAL_DATA), "chat": "never", "batch_size": 8, "max_prompt_length": 300}
    words |= {"reward": {"max_completion_length": 100}, "sft": {"completion_column": "chosen"}}[stage]
    model = build_tiny_model("llama", max_position_embeddings=2048)
    folder = run(stage, None, model=model, **words)
    shown = " ".join(capsys.readouterr().out.split())
    lines = read_jsonl(folder / "metrics.jsonl")
    assert all(math.isfinite(number) for line in lines for number in numbers(line))
    num_used = round(8 / lines[0]["epoch"])  # to the next eight
    left_out = {reason: int(count) for count, reason in NOTE.findall(shown)}
    if stage == "reward":
        assert left_out["a completion is empty"] == 3
        assert left_out["chosen and rejected differ before the assistant's last turn"] == 3
    else:
        assert 1 <= left_out["a completion is empty"] <= 3
    assert len(left_out) >= 2
    assert 0 <= num_used - (1611 - sum(left_out.values())) < 8
