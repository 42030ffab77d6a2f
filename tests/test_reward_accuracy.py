"""benchmarks/reward_accuracy.py: no question on two sides, training as `pairtune reward` does it, what it records."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model

from pairtune import PairtuneError
from pairtune.config import RewardConfig
from pairtune.models.loading import load_tokenizer
from pairtune.models.reward_backbone import load_reward_backbone
from pairtune.stages.reward import reward

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reward_accuracy as ra  # noqa: E402


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def long_dialogue(first: str, second: str) -> dict[str, Any]:
    """Its oldest turns do not fit into the prompt."""
    prompt = [*turn("user", first), *turn("assistant", "x" * 120), *turn("user", second)]
    return {"prompt": prompt, "chosen": turn("assistant", "a?"), "rejected": turn("assistant", "b!")}


draw = random.Random(0)
ROWS = [
    {
        "prompt": turn("user", f"Question {draw.randint(0, 15)}"),
        "chosen": turn("assistant", "".join(draw.choices("ab", k=draw.randint(1, 8))) + "?"),
        "rejected": turn("assistant", "".join(draw.choices("ab", k=draw.randint(1, 8))) + "!"),
    }
    for _ in range(46)
] + [long_dialogue(f"Question {n}", f"Another {n}") for n in range(4)]
WORDS: dict[str, Any] = {
    "max_prompt_length": 64,
    "num_layers": 2,
    "trainable_layers": 1,
    "batch_size": 8,
    "learning_rate": 1e-3,
    "num_epochs": 2,
    "dtype": "float32",
}


@pytest.fixture
def experiment(tiny_tokenizer: Any, tmp_path: Path) -> ra.Experiment:
    config = RewardConfig(model="m", dataset="d", **WORDS)
    return ra.Experiment(ROWS, config, work=tmp_path, model=build_tiny_model("llama"), tokenizer=tiny_tokenizer)


def test_no_question_stands_on_two_sides(experiment: ra.Experiment) -> None:
    assert "4 dialogues longer than max_prompt_length lost their oldest turns" in experiment.data.data.notes
    questions = [row["prompt"][0]["content"] for row in ROWS]
    for seed in range(3):
        folds = experiment.folds(seed)
        assert sorted(row for _, test in folds for row in test) == list(range(50))
        for train, test in folds:
            assert sorted(train + test) == list(range(50))
            assert not {questions[row] for row in train} & {questions[row] for row in test}
    assert experiment.folds(0) == experiment.folds(0) != experiment.folds(1)


@pytest.mark.parametrize("way", ra.WAYS)
def test_a_fold_depends_on_its_own_training_rows_alone(experiment: ra.Experiment, way: str) -> None:
    (train, test), (other_train, other_test), *_ = experiment.folds(0)
    alone = experiment.judge(way, train, test, seed=0)
    experiment.judge(way, other_train, other_test, seed=0)
    assert experiment.judge(way, train, test, seed=0) == alone
    assert [*alone["leads"]] == [str(row) for row in test]
    fewer = experiment.judge(way, train, test[:3], seed=0)
    assert fewer["penalty"] == alone["penalty"]
    assert fewer["leads"] == pytest.approx({row: alone["leads"][row] for row in fewer["leads"]}, abs=1e-5)


def test_the_last_layers_are_trained_as_pairtune_reward_trains_them(
    experiment: ra.Experiment, tiny_model_folder: str, tmp_path: Path
) -> None:
    train, test = experiment.folds(0)[0]
    found = experiment.judge("layers", train, test, seed=0)
    config = RewardConfig(
        model=tiny_model_folder, dataset="d", output_dir=tmp_path / "run", reward={"fit_head": True}, **WORDS
    )
    rows = [ROWS[row] for row in train]
    result = reward(config, train_dataset=rows, eval_dataset=[ROWS[row] for row in test])
    lines = [json.loads(line) for line in (result.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert found["loss"] == pytest.approx([line["loss"] for line in lines], abs=1e-4)
    tokenizer = load_tokenizer(str(result.output_dir))
    trained = load_reward_backbone(str(result.output_dir), tokenizer=tokenizer, dtype="float32", device="cpu")
    task = ra.RewardTask(trained, experiment.data)
    scores = task.score(experiment.data, test)
    assert torch.tensor([*found["leads"].values()]) == pytest.approx(scores[:, 0] - scores[:, 1], abs=1e-4)


def test_the_numbers_of_a_summary() -> None:
    """Four comparisons of three questions, two seeds."""
    leads = {0: torch.tensor([1.0, 1.0, -1.0, 3.0]).double(), 1: torch.tensor([1.0, -2.0, -1.0, 0.0]).double()}
    lengths = torch.tensor([[1.0, 2.0], [1.0, 2.0], [2.0, 1.0], [3.0, 3.0]]).double()
    found = ra.summary(leads, lengths, torch.tensor([0, 0, 1, 2]))
    assert {name: rule["mean"] for name, rule in found["rules"].items()} == {
        "longer wins": 0.375,
        "shorter wins": 0.625,
    }
    assert found["better_rule"] == "shorter wins"
    assert found["mean"]["accuracy"]["mean"] == pytest.approx((3 + 1.5) / 8)
    assert found["mean"]["less_better_rule"]["mean"] == pytest.approx(4.5 / 8 - 0.625)
    assert found["std_over_seeds"]["accuracy"] == pytest.approx(abs(3 - 1.5) / 4 / 2**0.5)
    assert found["ensemble"]["num_ties"] == 0
    assert found["ensemble"]["accuracy"]["mean"] == pytest.approx(0.5)  # leads 1, -0.5, -1, 1.5
    assert found["ensemble_less_better_rule"]["mean"] == pytest.approx(0.5 - 0.625)
    assert found["seeds"]["0"]["num_prompts"] == 3
    # Questions are resampled, not rows: the two rows of one question are right and wrong together.
    many = {0: torch.tensor([1.0] * 50 + [-1.0] * 50).double()}
    two, hundred = (
        ra.summary(many, torch.ones(100, 2).double(), groups)["mean"]["accuracy"]
        for groups in (torch.arange(2).repeat_interleave(50), torch.arange(100))
    )
    assert (two["low"], two["high"]) == (0, 1)
    assert 0.3 < hundred["low"] < hundred["high"] < 0.7


def test_the_command_goes_on_and_its_page_is_made_from_its_numbers(
    monkeypatch: pytest.MonkeyPatch, tiny_model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ra, "read_dialogues", lambda dataset: ROWS)
    load = ra.load_config
    monkeypatch.setattr(
        ra, "load_config", lambda cls, path, words: load(cls, path, words | WORDS | {"model": tiny_model_folder})
    )
    folders = ["--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    ra.main(["--seeds", "0", "1", *folders, "--ways", "head"])
    scores = {path.name: path.read_text() for path in (tmp_path / "work").glob("*.json")}
    assert len(scores) == 10
    # What is there is not made again; a seed that is not whole is no seed.
    (tmp_path / "work" / "head-seed-1-fold-4.json").unlink()
    ra.main(["--seeds", "0", "1", *folders, "--record-only"])
    record = json.loads((tmp_path / "out" / "reward_accuracy.json").read_text())
    assert [*record["ways"]] == ["head"]
    assert [*record["ways"]["head"]["seeds"]] == ["0"]
    page = (tmp_path / "out" / "reward_accuracy.md").read_text()
    assert page == ra.as_markdown(record)
    accuracy = record["ways"]["head"]["mean"]["accuracy"]["mean"]
    assert f"| the fitted head alone | 0 | {100 * accuracy:.1f} [" in page
    ra.main(["--seeds", "0", "1", *folders, "--ways", "head"])
    assert {path.name: path.read_text() for path in (tmp_path / "work").glob("*.json")}.keys() == scores.keys()
    assert (tmp_path / "work" / "head-seed-0-fold-0.json").read_text() == scores["head-seed-0-fold-0.json"]
    monkeypatch.setitem(WORDS, "learning_rate", 1e-2)
    with pytest.raises(PairtuneError, match="holds scores of other settings"):
        ra.main([*folders])
