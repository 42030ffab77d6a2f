"""recipes/hh from end to end on a tiny model: what is split how, what is done once, what the record says."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pairtune import PairtuneError

ROOT = Path(__file__).parent.parent


def load_recipe() -> Any:
    spec = importlib.util.spec_from_file_location("hh_recipe", ROOT / "recipes" / "hh" / "hh.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


hh = load_recipe()
SMALL = [
    *(f"{stage}.{key}" for stage in ("sft", "reward_a", "reward_b") for key in ("trainable_layers=1", "max_steps=2")),
    *("reward_a.num_layers=2", "reward_b.num_layers=2"),
    *("p3o.trainable_layers=1", "p3o.max_steps=2", "p3o.batch_size=4", "p3o.max_completion_length=8"),
    *("evaluate.max_completion_length=8", "evaluate.num_eval_prompts=5"),
]
STAGES = ("sft", "reward_a", "reward_b", "p3o", "evaluate")


def dialogue(*said: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[n % 2]}: {text}" for n, text in enumerate(said))


def rows(count: int) -> list[dict[str, str]]:
    draw = random.Random(0)
    first_turns = [f"{n}?" for n in range(count // 2)]
    made = []
    for _ in range(count):
        opening = [draw.choice(first_turns)] + (["so", "why?"] if draw.random() < 0.3 else [])
        answers = ["".join(draw.choices("ab", k=draw.randint(2, 9))) + end for end in "?!"]
        made.append({"chosen": dialogue(*opening, answers[0]), "rejected": dialogue(*opening, answers[1])})
    return made


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    path = tmp_path / "hh.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows(80)).encode()))
    return str(path)


@pytest.fixture
def start(tmp_path: Path, dataset: str, tiny_model_folder: str) -> Callable[..., int]:
    """The recipe as its command starts it, on a tiny model."""

    def main(*words: str, settings: tuple[str, ...] = ()) -> int:
        models = [f"{stage}.model={tiny_model_folder}" for stage in ("sft", "reward_a", "reward_b")]
        output = ["--dataset", dataset, "--output", str(tmp_path / "out")]
        code: int = hh.main([*output, *words, "--set", *models, *SMALL, *settings])
        return code

    return main


def test_all_stages_and_their_record(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start("--record", str(tmp_path / "record")) == 0
    told = capsys.readouterr().out
    for number, stage in enumerate(STAGES, start=1):
        assert f"\n{stage}: stage {number} of 5" in told
    assert "minutes to the end of all" in told
    record = json.loads((tmp_path / "record" / "hh.json").read_text())
    assert (tmp_path / "out" / "hh.json").read_text() == (tmp_path / "record" / "hh.json").read_text()
    assert record["num_prompts"] == 5

    # Both judges on both policies, recomputed from the samples.
    samples = {
        name: json.loads((tmp_path / "out" / f"evaluation-{name}.json").read_text())["samples"]
        for name in ("sft", "p3o")
    }
    for judge in ("reward_a", "reward_b"):
        old, new = (
            torch.tensor([one[f"rewards/{judge}"] for one in samples[name]]).double().view(5, 2) for name in samples
        )
        for name, values in (("sft", old), ("p3o", new)):
            mean = record["policies"][name][f"rewards/{judge}"]["mean"]
            assert mean == pytest.approx(values.mean().item(), abs=1e-6)
        one = record["comparison"][judge]
        assert one["gain"]["mean"] == pytest.approx((new - old).mean().item(), abs=1e-6)
        wins = [float(b > a) + 0.5 * float(a == b) for row in range(5) for a in old[row] for b in new[row]]
        assert one["win_rate"]["mean"] == pytest.approx(sum(wins) / 20)
        assert one["win_rate"]["low"] <= one["win_rate"]["mean"] <= one["win_rate"]["high"]
        assert 0 <= one["win_rate_at_equal_length"]["low"] <= one["win_rate_at_equal_length"]["high"] <= 1
    # They are two models: other heads, other comparisons.
    assert record["policies"]["sft"]["rewards/reward_a"] != record["policies"]["sft"]["rewards/reward_b"]
    assert "kl" not in record["policies"]["sft"]
    assert record["policies"]["p3o"]["kl"]["mean"] >= 0

    page = (tmp_path / "record" / "hh.md").read_text()
    assert "| the judge: never optimised, trained on fold B | " in page
    assert str(tmp_path) not in page  # no path of a machine
    # No dialogue goes into the record.
    texts = [one["completion"] for name in samples for one in samples[name] if len(one["completion"]) > 4]
    assert texts
    assert not [text for text in texts if text in page or text in json.dumps(record)]

    # Everything is done: nothing is done again.
    for stage in ("sft", "reward", "train", "evaluate"):
        monkeypatch.setattr(hh, stage, None)
    assert start() == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "done before" in line]
    assert start(settings=("reward_b.learning_rate=1e-3",)) == 2
    assert "holds the result of reward_b with other settings; give another --output" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_stage_goes_on(
    start: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the machine had gone down in the second stage."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hh, "reward", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            start()
    (tmp_path / "out" / "stages.json").unlink()  # nor was the first one noted
    assert start() == 0
    told = capsys.readouterr().out
    assert "sft: stage 1 of 5" in told
    assert len((tmp_path / "out" / "sft" / "metrics.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------------------------------------------------ the data


def test_no_first_turn_stands_on_two_sides(tmp_path: Path, dataset: str) -> None:
    told = hh.write_folds(tmp_path, dataset)
    sides: dict[str, set[str]] = {}
    splits = {}
    for name in ("a", "b"):
        lines = [json.loads(line) for line in (tmp_path / f"fold_{name}.jsonl").read_text().splitlines()]
        for split in ("train", "test"):
            splits[name, split] = [line for line in lines if line["split"] == split]
        sides[name] = {line["prompt"][0]["content"] for line in splits[name, "train"]}
    assert splits["a", "test"] == splits["b", "test"]
    sides["held_out"] = {line["prompt"][0]["content"] for line in splits["a", "test"]}
    assert not sides["a"] & sides["b"] | sides["a"] & sides["held_out"] | sides["b"] & sides["held_out"]
    assert sum(told["dialogues"].values()) == 80
    assert told["first_turns"] == {name: len(turns) for name, turns in sides.items()}
    # Every row is there, and its turns are.
    given = sorted(row["chosen"] for row in rows(80))
    kept = splits["a", "train"] + splits["b", "train"] + splits["a", "test"]
    assert sorted(dialogue(*(t["content"] for t in row["prompt"] + row["chosen"])) for row in kept) == given
    # Another order of the rows is the same split.
    assert hh.fold_of({"prompt": [{"role": "user", "content": "0?"}]}) == hh.fold_of(
        {"prompt": [{"role": "user", "content": "0?"}, {"role": "assistant", "content": "x"}]}
    )
    shares = [hh.fold_of({"prompt": [{"content": str(n)}]}) for n in range(2000)]
    assert shares.count("held_out") / 2000 == pytest.approx(0.15, abs=0.03)
    assert shares.count("a") / 2000 == pytest.approx(0.425, abs=0.03)


@pytest.mark.parametrize(
    "chosen, rejected, why",
    [
        (dialogue("q", "a"), dialogue("p", "b"), "the two differ before the last turn"),
        (dialogue("q", "a"), dialogue("q", " "), "a turn is empty"),
        (dialogue("q", ""), dialogue("q", "b"), "a turn is empty"),
        (dialogue("q", "", "r", "a"), dialogue("q", "", "r", "b"), "a turn is empty"),
        ("\n\nHuman: q\n\nHuman: r\n\nAssistant: a", "\n\nHuman: q\n\nHuman: r\n\nAssistant: b", "do not take turns"),
        ("\n\nHuman: q", "\n\nHuman: r", "do not take turns"),
        ("", "", "do not take turns"),
        (dialogue("q", "a"), dialogue("q", "a"), "the two answers are the same"),
        (dialogue("q", "a", "r", "a"), dialogue("q", "a", "r", "b"), None),
    ],
)
def test_what_is_left_out(chosen: str, rejected: str, why: str | None) -> None:
    found = hh.fault(hh.turns(chosen), hh.turns(rejected))
    assert found is None if why is None else why in found


def test_turns_keep_what_was_said() -> None:
    assert hh.turns("\n\nHuman: Hi\n\nthere: you \n\nAssistant: A Human: no\n\nHuman:x\n\nAssistant:") == [
        {"role": "user", "content": "Hi\n\nthere: you"},
        {"role": "assistant", "content": "A Human: no"},
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": ""},
    ]


def test_what_a_user_can_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hh, "BESIDE", tmp_path / "nowhere")
    assert hh.main(["--output", str(tmp_path / "out")]) == 2
    assert "give --dataset Anthropic/hh-rlhf" in capsys.readouterr().err
    for words in ("sft", "sft.", "sftt.model=x", "model=x"):
        assert hh.main(["--output", str(tmp_path / "out"), "--set", words]) == 2
        assert "write STAGE.KEY=VALUE" in capsys.readouterr().err
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(rows(2)[0]) + "\n")
    assert hh.main(["--dataset", str(few), "--output", str(tmp_path / "out")]) == 2
    assert "1 dialogues are too few to split" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"text": "x"}) + "\n")
    assert hh.main(["--dataset", str(other), "--output", str(tmp_path / "out")]) == 2
    assert "chosen" in capsys.readouterr().err


def test_another_dataset_in_the_same_folder(tmp_path: Path, dataset: str) -> None:
    hh.write_folds(tmp_path, dataset)
    hh.write_folds(tmp_path, dataset)
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(60)))
    with pytest.raises(PairtuneError, match="was begun with other dialogues"):
        hh.write_folds(tmp_path, str(tmp_path / "other.jsonl"))


@pytest.mark.skipif(not hh.BESIDE.exists(), reason="the human comparisons are not beside this checkout")
def test_the_real_data() -> None:
    dialogues, left_out = hh.read_dialogues(None)
    assert (len(dialogues), sum(left_out.values())) == (1602, 9)
    folds = [hh.fold_of(row) for row in dialogues]
    assert {name: folds.count(name) for name in ("a", "b", "held_out")} == {"a": 660, "b": 700, "held_out": 242}


def test_of_several_reward_functions_each_has_its_own_mean(
    tiny_model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the stage `evaluate` stands on: a function of weight 0 is measured too, where it answers."""

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [float(len(ids)) for ids in completion_ids]

    def some(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [float(len(ids)) if len(ids) % 2 else None for ids in completion_ids]

    config = hh.EvaluateConfig(
        model=tiny_model_folder,
        dataset="passed in",
        chat="never",
        max_completion_length=6,
        eval_generations=3,
        reward_weights=[1.0, 0.0],
        output=str(tmp_path / "evaluation.json"),
    )
    prompts = [{"prompt": f"{n}: "} for n in range(6)]
    line = hh.evaluate(config, reward_funcs=[length, some], dataset=prompts)
    samples = json.loads((tmp_path / "evaluation.json").read_text())["samples"]
    lengths = [len(one["completion_ids"]) for one in samples]
    odd = [n for n in lengths if n % 2]
    assert 0 < len(odd) < len(lengths)
    assert [one["rewards/some"] for one in samples] == [float(n) if n % 2 else None for n in lengths]
    assert line["rewards/some"]["mean"] == pytest.approx(sum(odd) / len(odd))
    assert line["rewards/length"]["mean"] == line["reward"]["mean"] == pytest.approx(sum(lengths) / len(lengths))
    alone = hh.evaluate(config.model_copy(update={"reward_weights": None}), reward_funcs=[length], dataset=prompts)
    assert not [name for name in alone if name.startswith("rewards/")]
