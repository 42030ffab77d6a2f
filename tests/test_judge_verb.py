"""`pairtune judge` from end to end, and a judge as the feedback of training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import build_tiny_model
from stub_endpoint import endpoint, failure, longer, responses
from test_train import HELD_OUT, PROMPTS, lines, share_of_letters

from pairtune import PairtuneError, TrainConfig, train
from pairtune.cli import main
from pairtune.config import JudgeConfig
from pairtune.evidence import judge as judge_module
from pairtune.evidence.judge import VERDICTS, judge
from pairtune.evidence.runs import JUDGED
from pairtune.feedback.judges import Pair, Verdict
from pairtune.maths.masking import pair_indices
from pairtune.runs import folder

KEY = "sk-very-secret-0123456789"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("PAIRTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.chdir(tmp_path)
    Path("judges.py").write_text(
        "def longer(first, second): return [float(len(a) > len(b)) if len(a) != len(b) else 0.5"
        " for a, b in zip(first, second)]\n"
        "def first(first, second): return [1.0] * len(first)\n"
        "def mute(first, second): return [None] * len(first)\n"
        "def unsure(first, second): return [None if a == b'' or len(a) % 3 == 0 else 0.9 for a in first]\n"
        "def letters(completions): return [float(sum(c.isalpha() for c in text)) for text in completions]\n"
    )


def write(name: str, rows: list[dict[str, Any]]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def completions(name: str, texts: list[str], **more: Any) -> str:
    """A file with one completion of each of the prompts Q0, Q1, ..."""
    return write(name, [{"prompt": f"Q{n}", "completion": text, **more} for n, text in enumerate(texts)])


def two_files() -> tuple[str, str]:
    return completions("a.jsonl", ["x" * (n % 5 + 1) for n in range(20)]), completions(
        "b.jsonl", ["y" * (n % 7 + 1) for n in range(20)]
    )


def result(*sides: str, model: str = "judges.py:longer", output: str = "out", **words: Any) -> dict[str, Any]:
    words.setdefault("judge", {})
    words["judge"] = {"model": model, **words["judge"]}
    return judge(JudgeConfig(sides=list(sides), output_dir=output, device="cpu", dtype="float32", **words))


def read(output: str = "out") -> tuple[dict[str, Any], list[dict[str, Any]]]:
    verdicts = [json.loads(line) for line in Path(output, VERDICTS).read_text().split("\n")[:-1]]
    return json.loads(Path(output, JUDGED).read_text()), verdicts


def refusal(*sides: str, **words: Any) -> str:
    with pytest.raises(PairtuneError) as caught:
        result(*sides, **words)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# -- What comes out ----------------------------------------------------------------------------------------------------


def test_two_files(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_files()
    returned = result(a, b)
    summary, verdicts = read()
    assert summary == json.loads(json.dumps(returned))
    lengths = [(n % 5 + 1, n % 7 + 1) for n in range(20)]
    [pair] = summary["pairs"]
    expected = (sum(x > y for x, y in lengths), sum(x == y for x, y in lengths), sum(x < y for x, y in lengths))
    assert (pair["wins"], pair["ties"], pair["losses"]) == expected
    assert pair["score"]["mean"] == pytest.approx((expected[0] + expected[1] / 2) / 20)
    assert pair["score"]["low"] < pair["score"]["mean"] < pair["score"]["high"]
    assert (pair["no_verdict"], pair["ties_by_contradiction"], pair["position_bias"]["mean"]) == (0, 0, 0)
    assert pair["length_effect"]["mean"] > 0
    assert sum(one["share"] for one in pair["by_length_difference"]) == pytest.approx(1)
    assert len(verdicts) == 40
    assert [verdicts[0][key] for key in ("first", "second", "prompt", "first_completion")] == ["a", "b", "Q0", "x"]
    assert [verdicts[1][key] for key in ("first", "second", "second_completion")] == ["b", "a", "x"]
    words = {"first": 1.0, "second": 0.0, "tie": 0.5}
    assert all(line["probability"] == words[line["verdict"]] for line in verdicts)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{expected[0]}/{expected[1]}/{expected[2]}" in printed
    assert "matrix" not in summary


def test_swapped_files_give_what_is_left_of_100() -> None:
    """Recomputed from the swapped files, not from the other's tensor."""
    a, b = two_files()
    with endpoint(
        lambda n, q: "More helpful: " + ("A" if int(hashlib.sha256(q.encode()).hexdigest(), 16) % 3 else "B")
    ) as stub:
        judges = {"ab": {"base_url": stub.base_url, "cache": "one"}, "ba": {"base_url": stub.base_url, "cache": "two"}}
        one = result(a, b, model="m", output="ab", judge=judges["ab"])["pairs"][0]
        other = result(b, a, model="m", output="ba", judge=judges["ba"])["pairs"][0]
    assert 0 < one["position_bias"]["mean"] < 1
    for name in ("score", "mean_probability"):
        assert one[name]["mean"] + other[name]["mean"] == 1
        assert one[name]["low"] + other[name]["high"] == pytest.approx(1, abs=1e-12)
    assert (one["wins"], one["ties"], one["losses"]) == (other["losses"], other["ties"], other["wins"])
    assert one["position_bias"] == other["position_bias"]


def test_a_judge_that_always_says_first() -> None:
    [pair] = result(*two_files(), model="judges.py:first")["pairs"]
    assert pair["score"]["mean"] == 0.5
    assert pair["position_bias"]["mean"] == 1
    assert pair["first_in_both_orders"]["mean"] == 1
    assert pair["won_by_first_shown"]["mean"] == 1
    assert (pair["ties"], pair["ties_by_contradiction"]) == (20, 20)


def test_three_sides_and_several_completions() -> None:
    """Every two sides meet; completion k meets completion k, and what has no counterpart is counted."""
    a = write("a.jsonl", [{"prompt": f"Q{n}", "completion": "aaa" + "a" * k} for n in range(6) for k in range(3)])
    b = write("b.jsonl", [{"prompt": f"Q{n}", "completion": "bb" + "b" * k} for n in range(8) for k in range(2)])
    c = write("c.jsonl", [{"prompt": f"Q{n}", "completion": "c" + "c" * k} for n in range(2, 9) for k in range(2)])
    summary = result(a, b, c)
    assert summary["num_prompts"] == 4
    assert [(p["first"], p["second"], p["wins"], p["num_pairs"]) for p in summary["pairs"]] == [
        ("a", "b", 8, 8),
        ("a", "c", 8, 8),
        ("b", "c", 8, 8),
    ]
    left_out = {side["name"]: side["left_out"] for side in summary["sides"]}
    assert [left_out[name]["prompts_not_shared"] for name in "abc"] == [2, 4, 3]
    assert [left_out[name]["completions_beyond_the_fewest"] for name in "abc"] == [4, 0, 0]
    assert [one["name"] for one in summary["ranking"]] == ["a", "b", "c"]
    rates = summary["matrix"]["rates"]
    assert rates[0][0] is None
    assert rates[0][1]["mean"] + rates[1][0]["mean"] == 1


def test_what_is_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    a = completions("a.jsonl", ["x", "", "  ", "y"])
    b = completions("b.jsonl", ["z", "zz"])
    summary = result(a, b, num_eval_prompts=1)
    assert summary["sides"][0]["left_out"] == {
        "prompts_not_shared": 2,
        "prompts_beyond_num_eval_prompts": 1,
        "completions_beyond_the_fewest": 0,
        "empty": 0,
    }
    printed = capsys.readouterr().out
    assert "a: 2 prompts left out, which not all sides have" in printed
    assert result(a, b, output="whole")["pairs"][0]["losses"] == 1  # an empty one is judged as it is
    assert "a: 1 completion without text, judged all the same" in capsys.readouterr().out


def test_the_same_text_is_a_tie_of_which_nobody_is_asked() -> None:
    a, b = completions("a.jsonl", ["same", "x"]), completions("b.jsonl", ["same", "yy"])
    with endpoint() as stub:
        summary = result(a, b, model="m", judge={"base_url": stub.base_url})
    [pair] = summary["pairs"]
    assert len(stub.requests) == 2
    assert (pair["ties"], pair["ties_of_identical_texts"], pair["losses"]) == (1, 1, 1)
    assert pair["position_bias"]["mean"] == 0
    assert summary["num_questions"] == 2
    assert read()[1][0]["reason"] == "both are the same text"
    [pair] = result(a, b, model="judges.py:first", output="first")["pairs"]
    assert pair["position_bias"]["mean"] == 1  # of the pairs that were judged, not of all


def test_pairs_without_a_verdict_count_apart(capsys: pytest.CaptureFixture[str]) -> None:
    a = completions("a.jsonl", ["x" * n for n in range(1, 9)])
    b = completions("b.jsonl", ["y" * (9 - n) for n in range(1, 9)])

    def vague(number: int, question: str) -> str:
        return longer(number, question) if len(responses(question)[0]) > 2 else "Both are fine."

    with endpoint(vague) as stub:
        summary = result(a, b, model="m", judge={"base_url": stub.base_url})
    [pair] = summary["pairs"]
    assert pair["no_verdict"] == 4
    assert pair["wins"] + pair["ties"] + pair["losses"] == 4
    assert summary["no_verdict"] == {"its last line is no verdict": 4}
    assert "no verdict from 4 of 16 questions: its last line is no verdict" in capsys.readouterr().out


def test_a_judge_without_any_verdict() -> None:
    with endpoint(lambda *_: "I cannot say.") as stub:
        [pair] = result(*two_files(), model="m", judge={"base_url": stub.base_url})["pairs"]
    assert (pair["no_verdict"], pair["score"]["mean"], pair["position_bias"]["mean"]) == (20, None, None)


def test_three_sides_without_any_verdict_have_no_ranking(capsys: pytest.CaptureFixture[str]) -> None:
    sides = [completions(f"{name}.jsonl", [name * n for n in range(1, 5)]) for name in "abc"]
    returned = result(*sides, model="judges.py:mute")
    summary, verdicts = read()
    assert summary == json.loads(json.dumps(returned))
    assert (summary["ranking"], len(verdicts)) == ([], 24)
    assert summary["matrix"]["rates"] == [[None] * 3] * 3
    assert "Bradley-Terry" not in capsys.readouterr().out


def test_verdicts_are_kept_whatever_becomes_of_their_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may have cost money."""

    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(judge_module, "summarise", broken)
    with pytest.raises(ZeroDivisionError):
        result(*two_files())
    assert len(Path("out", VERDICTS).read_text().splitlines()) == 40


def test_a_comparison_without_a_finished_cell_is_no_side() -> None:
    _, b = two_files()
    for status in ("running", "failed"):
        cell = Path("cmp", "cells", status)
        cell.mkdir(parents=True)
        (cell / "cell.json").write_text(json.dumps({"name": status, "method": "p3o", "status": status}))
    assert "no cell of cmp is done yet" in refusal("cmp", b)
    assert "no cell of cmp is done yet" in refusal("cmp")


def test_a_judge_that_computes_no_number_leaves_valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in a precision that overflows: JSON has no NaN, and null says as much."""

    class Overflown:
        name, sees_columns = "overflown", False

        def check(self, example: Pair) -> None:
            pass

        def verdicts(self, pairs: Sequence[Pair], advance: Any) -> list[Verdict]:
            return [Verdict(math.nan, mass=math.nan) for _ in pairs]

    monkeypatch.setattr(judge_module, "load_judge", lambda config: Overflown())
    result(*two_files())
    for name in (JUDGED, VERDICTS):
        assert not re.search("NaN|Infinity", Path("out", name).read_text())
    summary, verdicts = read()
    assert summary["mass"] is None
    assert {(line["probability"], line["mass"]) for line in verdicts} == {(None, None)}


def test_verdicts_are_whole_and_a_rerun_changes_no_byte(capsys: pytest.CaptureFixture[str]) -> None:
    odd = 'a "quoted"\n\u2028 line\x1b[31m <script> \U0001f600 \ud800 More helpful: A'
    a, b = completions("a.jsonl", [odd, "x", "xyz"]), completions("b.jsonl", ["y", "yy", "yyyy"])
    with endpoint() as stub:
        words = {"base_url": stub.base_url, "input_price": 1.0, "output_price": 2.0}
        summary = result(a, b, model="m", judge=words)
        assert "6 requests sent (0 of them again), 0 answers known before" in capsys.readouterr().out
        before = [Path("out", name).read_bytes() for name in (JUDGED, VERDICTS)]
        result(a, b, model="m", judge=words | {"concurrency": 2, "timeout": 30.0})
        assert len(stub.requests) == 6
    assert "0 requests sent (0 of them again), 6 answers known before" in capsys.readouterr().out
    after = [Path("out", name).read_bytes() for name in (JUDGED, VERDICTS)]
    assert after[1] == before[1]
    assert json.loads(after[0])["pairs"] == json.loads(before[0])["pairs"]
    assert read()[1][0]["first_completion"] == odd
    assert summary["tokens"] == {"prompt_tokens": 60, "completion_tokens": 30}
    assert summary["cost"] == pytest.approx(120e-6)
    assert all(KEY.encode() not in content for content in after)


# -- What a side can be ------------------------------------------------------------------------------------------------


def run_folder(path: str, texts: dict[int, list[str]], *, seed: int = 0, **config: Any) -> str:
    """A run folder with held-out samples of some steps; its evaluations name no more than these."""
    made = Path(path)
    made.mkdir(parents=True)
    words = {"algorithm": "p3o", "seed": seed, "beta": 0.05, **config}
    (made / folder.CONFIG).write_text(yaml.safe_dump(words))
    (made / folder.ENVIRONMENT).write_text("{}")
    (made / folder.EVALUATIONS).write_text("".join(json.dumps({"step": step}) + "\n" for step in texts))
    samples = [{"step": 1, "split": "train", "row": 0, "prompt": "Q0", "completion": "not this", "completion_index": 0}]
    for step, some in texts.items():
        for row, text in enumerate(some):
            line = {"step": step, "split": "eval", "row": row, "prompt": f"Q{row}", "completion_index": 0}
            samples.append(line | {"completion": text, "truncated": False, "reward": 0.0})
    (made / folder.SAMPLES).write_text("".join(json.dumps(line) + "\n" for line in samples))
    return path


def test_run_folders_stand_for_their_last_held_out_samples() -> None:
    a = run_folder("runs/a", {0: ["x", "x"], 10: ["xxxx", "xxxx"]})
    b = run_folder("runs/b", {0: ["yyyyyyyy", "y"], 10: ["yy", "yy"]})
    summary = result(a, f"other={b}")
    assert [(p["first"], p["second"], p["wins"]) for p in summary["pairs"]] == [("a", "other", 2)]


def test_a_comparison_stands_for_its_arms_seed_by_seed() -> None:
    texts = {"p3o": "xxx", "ppo": "yy"}
    for name, text in texts.items():
        for seed in range(2):
            cell = run_folder(f"grid/cells/{name}-{seed}", {4: [text + "z" * seed] * 3}, seed=seed, algorithm=name)
            content = {"name": f"{name}-{seed}", "method": name, "seed": seed, "status": "done", "settings": {}}
            Path(cell, "cell.json").write_text(json.dumps(content))
    summary = result("grid", completions("base.jsonl", ["b"] * 3))
    assert [side["name"] for side in summary["sides"]] == ["p3o", "ppo", "base"]
    assert [side["num_seeds"] for side in summary["sides"]] == [2, 2, 1]
    assert [(p["first"], p["second"], p["wins"], p["num_pairs"]) for p in summary["pairs"]] == [
        ("p3o", "ppo", 6, 6),
        ("p3o", "base", 6, 6),
        ("ppo", "base", 6, 6),
    ]
    alone = result("grid", output="alone")
    assert [(p["first"], p["second"]) for p in alone["pairs"]] == [("p3o", "ppo")]
    # Files under one name are seeds of one side, and the same comparison comes out.
    again = result(
        *(f"p3o=grid/cells/p3o-{seed}" for seed in range(2)),
        *(f"ppo=grid/cells/ppo-{seed}" for seed in range(2)),
        output="again",
    )
    assert again["pairs"][0]["score"] == summary["pairs"][0]["score"]


def test_the_json_of_evaluate() -> None:
    samples = [
        {"row": n, "prompt": f"Q{n}", "completion_index": k, "completion": "x" * (n + k), "split": "eval"}
        for n in range(3)
        for k in range(2)
    ]
    Path("a.json").write_text(json.dumps({"config": {}, "evaluation": {}, "samples": samples}))
    summary = result("a.json", completions("b.jsonl", ["yy"] * 3), completion_column="completion")
    assert summary["pairs"][0]["num_pairs"] == 3
    assert summary["sides"][0]["left_out"]["completions_beyond_the_fewest"] == 3


def test_columns_and_conversations() -> None:
    turns = [{"role": "user", "content": "Q0"}]
    a = write("a.jsonl", [{"question": "Q0", "answer": "longer", "completion": "no"}])
    b = write("b.jsonl", [{"question": turns, "answer": [{"role": "assistant", "content": "short"}]}])
    summary = result(a, b, prompt_column="question", completion_column="answer")
    assert summary["pairs"][0]["wins"] == 1


@pytest.mark.parametrize(
    ("place", "name", "doing"),
    [("HFSampler", "generate", "sampling .*; lower eval_g"), ("", "judge_pairs", "judging .*; lower judge.batch_size")],
)
def test_a_full_gpu_is_a_sentence(
    tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch, place: str, name: str, doing: str
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(getattr(judge_module, place) if place else judge_module, name, full)
    sides = [tiny_model_folder if place else completions("a.jsonl", ["a"] * 3), completions("b.jsonl", ["z"] * 3)]
    with pytest.raises(PairtuneError, match=f"^the GPU ran out of memory while {doing}"):
        result(*sides, model="judges.py:letters")


def test_models_are_sampled_first_on_the_prompts_given(tiny_model_folder: str, tiny_tokenizer: Any) -> None:
    other = Path("other-model")
    build_tiny_model("llama", seed=1).save_pretrained(other)
    tiny_tokenizer.save_pretrained(other)
    prompts = write("prompts.jsonl", [{"prompt": f"Q{n}"} for n in range(4)])
    words = {"dataset": prompts, "max_completion_length": 8, "eval_generations": 2, "num_eval_prompts": 3}
    summary = result(tiny_model_folder, str(other), model="judges.py:letters", **words)
    assert (summary["num_prompts"], summary["pairs"][0]["num_pairs"]) == (3, 6)
    verdicts = read()[1]
    assert len({line["first_completion"] for line in verdicts}) > 6
    # The same draws again, whatever else is compared and whatever the prompts come from.
    file = completions("b.jsonl", ["z"] * 3)
    again = result(file, tiny_model_folder, output="again", **{**words, "dataset": None})
    assert again["num_prompts"] == 3
    first = {(line["prompt"], line["completion_index"]): line["first_completion"] for line in verdicts[::2]}
    for line in read("again")[1][::2]:
        assert line["second_completion"] == first[line["prompt"], line["completion_index"]]


def test_a_run_without_held_out_samples_is_sampled(tiny_model_folder: str, tmp_path: Path) -> None:
    """Its newest checkpoint is; a run that has none yet is refused."""
    words = {"model": tiny_model_folder, "dataset": "passed in", "chat": "never", "dataset_test_split": None}
    config = TrainConfig(**words, max_steps=1, batch_size=2, max_completion_length=4, output_dir="runs/bare")
    train(config, reward_funcs=[share_of_letters], train_dataset=PROMPTS)
    file = completions("b.jsonl", ["z"] * 3)
    summary = result("runs/bare", file, model="judges.py:letters", max_completion_length=4)
    assert (summary["sides"][0]["name"], summary["num_prompts"]) == ("bare", 3)
    run_folder("runs/young", {})
    assert "the run folder runs/young has no checkpoint yet" in refusal("runs/young", file, output="young")


def test_an_endpoint_is_tried_before_models_are_sampled(
    tiny_model_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pairtune.evidence.judge as module

    monkeypatch.setattr(module, "load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    with endpoint(lambda *_: failure(401, "bad key")) as stub:
        words = {"model": "m", "judge": {"base_url": stub.base_url}}
        file = completions("a.jsonl", ["x"])
        assert "refuses the key in OPENAI_API_KEY" in refusal(file, tiny_model_folder, **words)
        assert len(stub.requests) == 1
        monkeypatch.delenv("OPENAI_API_KEY")
        assert "is not set" in refusal(file, tiny_model_folder, **words)
        assert len(stub.requests) == 1


# -- Refusals ----------------------------------------------------------------------------------------------------------


def test_sides_that_cannot_be_compared(tmp_path: Path) -> None:
    a, b = two_files()
    other = write("other.jsonl", [{"prompt": "Z", "completion": "z"}])
    assert "the sides have no prompt in common (20 of a, 1 of other)" in refusal(a, other)
    assert "there is no file or folder 'absent.jsonl'" in refusal(a, "absent.jsonl")
    assert "has no column `completion`" in refusal(a, write("p.jsonl", [{"prompt": "Q0", "text": "x"}]))
    assert "row 1 of bad.jsonl: `completion` must be a text" in refusal(
        a, write("bad.jsonl", [{"prompt": "Q0", "completion": "x"}, {"prompt": "Q1", "completion": None}])
    )
    Path("empty").mkdir()
    assert "empty is no run, no comparison and no model" in refusal(a, "empty")
    assert "there is only one side, 'x'" in refusal(f"x={a}", f"x={b}")
    Path("broken.json").write_text("{")
    assert "broken.json is not valid JSON" in refusal(a, "broken.json")
    assert "dataset is missing" in refusal("some/model", "other/model")
    assert not Path("out").exists()


def test_another_result_is_not_replaced_unasked() -> None:
    a, b = two_files()
    result(a, b)
    sentence = refusal(a, b, model="judges.py:first")
    assert "out holds a result with judge.model 'judges.py:longer', and here it is 'judges.py:first'" in sentence
    assert result(a, b, model="judges.py:first", overwrite=True)["judge"] == "first"
    Path("out", JUDGED).write_text("[]")
    assert "is no result of pairtune judge" in refusal(a, b)


def test_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    a, b = two_files()
    flags = ["--judge.model", "judges.py:longer", "--output_dir", "out"]
    assert main(["judge", a, b, *flags]) == 0
    assert "judged by longer on 20 prompts" in capsys.readouterr().out
    assert main(["judge", *flags, a, f"name={b}", "--overwrite"]) == 0
    assert read()[0]["pairs"][0]["second"] == "name"
    Path("judge.yaml").write_text(f"sides: [{a}, {b}]\njudge:\n  model: judges.py:first\n")
    assert main(["judge", "--config", "judge.yaml", "--overwrite", "--output_dir", "out"]) == 0
    capsys.readouterr()
    for argv, sentence in (
        (["judge", a, *flags, "--overwrite"], "there is only one side, 'a'; name two or more to compare"),
        (["judge", a, b], "judge.model is missing; give --judge.model, who judges."),
        (["judge", *flags], "sides is missing; give --sides, or --config with a file that has it."),
    ):
        assert main(argv) == 2
        assert sentence in capsys.readouterr().err


# -- Killed and resumed ------------------------------------------------------------------------------------------------


def test_killed_and_resumed_makes_only_the_missing_requests() -> None:
    a, b = two_files()
    with endpoint(lambda n, q: time.sleep(0.01) or longer(n, q)) as stub:
        words = {"base_url": stub.base_url, "cache": "answers", "concurrency": 2}
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                result(a, b, model="m", judge=words)
            os._exit(0)
        deadline = time.monotonic() + 60
        while len(stub.requests) < 10 and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        asked = len(stub.requests)
        assert 10 <= asked < 40
        assert not Path("out").exists()
        result(a, b, model="m", judge=words)
        # Those under way when it was killed were not kept: one a thread at most.
        missing = len(stub.requests) - asked
        assert 40 - asked <= missing <= 40 - asked + 2


# -- Training ----------------------------------------------------------------------------------------------------------


def trained(tmp_path: Path, model: str, name: str, **words: Any) -> Any:
    settings: dict[str, Any] = {
        "model": model,
        "dataset": "passed in",
        "chat": "never",
        "dtype": "float32",
        "device": "cpu",
        "algorithm": name,
        "preference_func": "judge",
        "num_generations": 3,
        "num_iterations": 2,
        "batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 8,
        "beta": 0.02,
        "epsilon": 0.5,
        "learning_rate": 8e-3,
        "eval_steps": 0,
        "output_dir": str(tmp_path / "run"),
    }
    config = TrainConfig(**settings | words)
    return train(config, reward_funcs=[share_of_letters], train_dataset=PROMPTS, eval_dataset=HELD_OUT)


@pytest.mark.parametrize("name", ["p3o", "online_dpo"])
def test_training_from_a_judge_behind_an_endpoint(tmp_path: Path, tiny_model_folder: str, name: str) -> None:
    """The judge likes letters; what it says is what is learned."""

    def likes_letters(number: int, question: str) -> str:
        a, b = share_of_letters(list(responses(question)))
        return f"More helpful: {'A' if a >= b else 'B'}"  # of equals the first: position bias

    with endpoint(likes_letters) as stub:
        words = {"model": "m", "base_url": stub.base_url, "concurrency": 4}
        run = trained(tmp_path, tiny_model_folder, name, judge=words)
        asked = len(stub.requests)
        before, after = lines(run, "evaluations")
        trained(tmp_path, tiny_model_folder, name, judge=words, overwrite=True, max_steps=1)
        assert len(stub.requests) == asked + 1  # the probe; the same run asks the same questions
    assert after["reward"]["mean"] > before["reward"]["mean"] + 0.1
    step = lines(run)[0]
    assert step["preferences/judge/answered"] == 1
    assert 0 < step["preferences/judge/consistency"] <= 1
    assert KEY not in "".join(path.read_text() for path in (tmp_path / "run").glob("*.*"))


@pytest.mark.parametrize("name", ["p3o", "online_dpo"])
def test_training_from_a_model_on_this_machine(
    tmp_path: Path, tiny_model_folder: str, tiny_tokenizer: Any, name: str
) -> None:
    """Probabilities that are neither 0 nor 1, as they are for online DPO, as rewards for P3O."""
    judge_folder = tmp_path / "judge"
    build_tiny_model("llama", seed=3, max_position_embeddings=4096).save_pretrained(judge_folder)
    tiny_tokenizer.save_pretrained(judge_folder)
    template = tmp_path / "question.txt"
    template.write_text("{prompt}|{first}|{second}\nBest: <A or B>")
    words = {"model": str(judge_folder), "template": str(template)}
    run = trained(tmp_path, tiny_model_folder, name, judge=words, max_steps=2)
    steps = lines(run)
    assert len(steps) == 2
    assert all(math.isfinite(step["loss"]) for step in steps)
    assert all(0.5 < step["preferences/judge/confidence"] < 1 for step in steps)


def test_the_probabilities_reach_the_experience(tiny_model_folder: str, tmp_path: Path) -> None:
    """(P, K, K) out of the mean of both orders."""
    from test_preferences import batch

    from pairtune.feedback.judges import JudgedPreference, function_judge
    from pairtune.feedback.preferences import PreferenceSet

    def by_last(first: list[str], second: list[str]) -> list[float]:
        return [0.6 + 0.1 * (int(a[-1]) - int(b[-1])) for a, b in zip(first, second, strict=True)]

    scores = PreferenceSet(JudgedPreference(function_judge(by_last)), rule="margins").score(*batch())
    i, j = pair_indices(3)
    expected = 0.5 + 0.1 * (i - j)  # the lean to the first, 0.1, is gone
    assert scores.preferences is not None
    torch.testing.assert_close(scores.preferences[:, i, j], expected.expand(2, 3))
    assert scores.metrics["preferences/judge/consistency"] == pytest.approx(1 / 3)  # a tie in one order
    assert scores.rewards[0].tolist() == pytest.approx([-0.2, 0, 0.2], abs=1e-6)


# -- A real model ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probabilities of a real model: it prefers an answer to a string of noise, and writes a verdict now and then."""
    pytest.importorskip("gguf")
    monkeypatch.delenv("PAIRTUNE_CACHE")
    questions = ["What is the capital of France?", "How do plants make food?", "Why is the sky blue?"]
    good = [
        "The capital of France is Paris.",
        "Plants use sunlight to make sugar.",
        "Air scatters blue light the most.",
    ]
    a = write("good.jsonl", [{"prompt": q, "completion": t} for q, t in zip(questions, good, strict=True)])
    b = write("noise.jsonl", [{"prompt": q, "completion": "qz qz 7 7 7 ; ; qz"} for q in questions])
    try:
        summary = result(a, b, model="smollm2-135m-instruct-q4", num_threads=1)
    except PairtuneError as error:
        pytest.skip(str(error))
    [pair] = summary["pairs"]
    assert pair["mean_probability"]["mean"] > 0.5
    assert 0.05 < summary["mass"] <= 1  # it knows what is asked for
    assert pair["no_verdict"] == 0
    written = result(
        a,
        b,
        model="smollm2-135m-instruct-q4",
        output="written",
        num_threads=1,
        judge={"answer": "text", "max_tokens": 48},
    )
    verdicts = read("written")[1]
    assert all(line["answer"] for line in verdicts)
    assert sum(written["no_verdict"].values()) == sum(line["verdict"] is None for line in verdicts)
