"""What docs/sft.md and docs/reward.md say is so: Python and commands run, settings, metrics and names exist."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_docs as docs

from pairtune.cli import main
from pairtune.config import RewardConfig, SFTConfig, TrainConfig, keys_of, load_config
from pairtune.runs.metrics import read_jsonl

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "pairtune"


class Stage(NamedTuple):
    config: Any
    dataset: str
    """What the page's command reads."""
    rows: Callable[[int], dict[str, Any]]
    """Enough of them that every metric has something to say."""


def example(n: int) -> dict[str, Any]:
    return {"prompt": f"{n}: ", "completion": "ab" * (1 + n % 5)}


def pair(n: int) -> dict[str, Any]:
    chosen, rejected = "ba" if n % 3 == 0 else "ab"  # no model is right about all of them
    return {"prompt": f"{n}: ", "chosen": chosen * (1 + n % 7), "rejected": rejected * (1 + n * n % 5)}


STAGES = {
    "sft": Stage(SFTConfig, "answers.jsonl", example),
    "reward": Stage(RewardConfig, "comparisons.jsonl", pair),
}
PAGES = {name: ROOT / "docs" / f"{name}.md" for name in STAGES}
NEEDED = {"model": "m", "dataset": "d"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> dict[str, Path]:
    """A run of each stage by its verb in which every phase leaves its time and every metric something."""
    folder = tmp_path_factory.mktemp("stage-docs")
    small = {
        "model": model_folder,
        "device": "cpu",
        "chat": "never",
        "eval_steps": 1,
        "save_steps": 1,
        "batch_size": 12,
        "learning_rate": 3e-3,
        "num_epochs": 3,
    }
    for name, stage in STAGES.items():
        rows = [{**stage.rows(n), "split": "test" if n % 4 == 0 else "train"} for n in range(48)]
        data = folder / stage.dataset
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {**small, "dataset": data, "output_dir": folder / name}
        assert main([name, *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]) == 0
    return {name: folder / name for name in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_python_runs(
    stage: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    docs.test_python_runs(PAGES[stage], model_folder, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("stage", STAGES)
def test_the_command_of_a_page_learns_from_the_rows_of_the_page(
    stage: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [words for words in docs.commands(PAGES[stage]) if words[:2] == ["pairtune", stage]]
    assert len(commands) == 1
    [rows] = docs.blocks(PAGES[stage], "jsonl")
    Path(STAGES[stage].dataset).write_text(rows.text)
    words = ["--model", model_folder, *docs.without(commands[0][2:], {"model": None})]
    assert main([stage, *words]) == 0
    [run] = Path("runs").iterdir()
    assert str(run) == words[words.index("--output_dir") + 1]
    assert read_jsonl(run / "evaluations.jsonl")[-1]["step"] > 0


@pytest.mark.parametrize("stage", STAGES)
def test_the_other_commands_parse(stage: str) -> None:
    for words in docs.commands(PAGES[stage]):
        assert main([*words[1:], "--print-config"]) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_settings_have_the_defaults_that_the_page_gives_and_none_is_missing(stage: str) -> None:
    config = STAGES[stage].config
    listed = {docs.named(row[0])[0]: row[1] for row in docs.table(PAGES[stage], "Settings", "setting")}
    assert load_config(config, None, NEEDED | listed) == load_config(config, None, NEEDED)
    of_training = {key: field.default for key, field in keys_of(TrainConfig).items()}
    own = {key: field.default for key, field in keys_of(config).items() if not field.is_required()}
    different = {key for key, value in own.items() if key not in of_training or of_training[key] != value}
    assert different - {"output_dir"} <= set(listed)
    assert {key for key in listed if key not in keys_of(config)} == set()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("log", ["metrics", "evaluations"])
def test_metrics_are_what_a_run_logs_and_all_of_it(stage: str, log: str, runs: dict[str, Path]) -> None:
    text = PAGES[stage].read_text("utf-8")
    section = text[text.index(f"`{log}.jsonl` has a line") :]
    rows = section[section.index("| name |") :].split("\n\n")[0].splitlines()[2:]
    logged = {name for line in read_jsonl(runs[stage] / f"{log}.jsonl") for name in line}
    assert {docs.named(row)[0] for row in rows} == logged


@pytest.mark.parametrize("stage", STAGES)
def test_names_in_running_text_exist(stage: str, runs: dict[str, Path]) -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    checked = 0
    for name in docs.named(docs.prose(PAGES[stage])):
        if re.fullmatch(r"test_\w+", name):
            assert f"def {name}(" in sources, name
        elif re.fullmatch(r"(stages|maths)/\w+\.py", name):
            assert (SOURCE / name).is_file(), name
        elif match := re.fullmatch(r"([a-z_.]+): (\w+)", name):
            load_config(STAGES[stage].config, None, {**NEEDED, match[1]: match[2]})
        elif re.fullmatch(r"\w+\.json", name) and name != "config.json":
            assert (runs[stage] / name).is_file(), name
        else:
            continue
        checked += 1
    assert checked >= 5
