"""The command line: verbs, flags, help, exit codes. What a verb hands over to is replaced: nothing is trained here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import pairtune
from pairtune.cli import DEMO_CONFIG, VERBS, main
from pairtune.config import (
    EvaluateConfig,
    JudgeConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
    TrainConfig,
    config_to_yaml,
    keys_of,
    load_config,
)

NEEDED = ["--model", "m", "--dataset", "d", "--reward_funcs", "a.b"]
SOURCE = Path(pairtune.__file__).parents[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """(verb, args, kwargs) of every handover."""
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
    for name, verb in VERBS.items():

        def record(*args: Any, name: str = name, **kwargs: Any) -> str:
            calls.append((name, args, kwargs))
            return f"result of {name}"

        monkeypatch.setitem(sys.modules, verb.module, SimpleNamespace(**{verb.function: record}))  # type: ignore[misc]
    return calls


def failure(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one sentence with which a command ends."""
    assert main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    [line] = printed.err.splitlines()
    assert line.startswith("pairtune: error: ")
    assert line.endswith(".")
    return line.removeprefix("pairtune: error: ")


# -- Handing over ------------------------------------------------------------------------------------------------------


def test_train_reads_a_file_and_flags_win(calls: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: m\ndataset: d\nreward_funcs: [a.b]\nepsilon: 0.3\np3o:\n  kl_at: sampling\n")
    flags = [
        "--epsilon",
        "0.1",
        "--p3o.clip",
        "separate",
        "--p3o.max_ratio",
        "null",
        "--reward_funcs",
        "a.b.c",
        "d.e.f",
    ]
    assert main(["train", "--config", str(path), *flags]) == 0
    [(verb, (config,), kwargs)] = calls
    assert (verb, kwargs) == ("train", {})
    assert config == TrainConfig(
        model="m",
        dataset="d",
        reward_funcs=["a.b.c", "d.e.f"],
        epsilon=0.1,
        p3o={"clip": "separate", "kl_at": "sampling", "max_ratio": None},
    )


@pytest.mark.parametrize(
    "flags, key, value",
    [
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--gradient_checkpointing", "false"], "gradient_checkpointing", False),
        (["--gradient_checkpointing", "--seed", "3"], "gradient_checkpointing", True),
        (["--learning_rate", "1e-6"], "learning_rate", 1e-6),
        (["--learning_rate=2e-6"], "learning_rate", 2e-6),
        (["--max_minutes", "none"], "max_minutes", None),
        (["--scale_rewards", "none"], "scale_rewards", "none"),
        (["--stop", "a", "b c"], "stop", ["a", "b c"]),
        (["--stop"], "stop", []),
        (["--report_to", "none"], "report_to", []),
        (["--reward_weights", "-1e-1"], "reward_weights", [-0.1]),
        (["--reward_weights", "null"], "reward_weights", None),
        (["--lora_target_modules", "q_proj"], "lora_target_modules", "q_proj"),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--model", "123"], "model", "123"),
        (["--seed", "1", "--seed", "2"], "seed", 2),
    ],
)
def test_values_of_flags(calls: Any, flags: list[str], key: str, value: Any) -> None:
    assert main(["train", *NEEDED, *flags]) == 0
    [(_, (config,), _)] = calls
    assert getattr(config, key) == value


def test_demo_has_a_configuration_of_its_own(calls: Any) -> None:
    assert main(["demo", "--max_steps", "2"]) == 0
    [(verb, (config,), _)] = calls
    assert verb == "demo"
    assert config == load_config(TrainConfig, DEMO_CONFIG, {"max_steps": 2})
    assert config.output_dir == "runs/demo"


def test_sft_reads_a_file_and_flags_win(calls: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: m\ndataset: d\nlearning_rate: 3e-5\nnum_epochs: 2\n")
    assert main(["sft", "--config", str(path), "--completion_column", "chosen", "--num_epochs", "0.5"]) == 0
    config = SFTConfig(model="m", dataset="d", learning_rate=3e-5, num_epochs=0.5, completion_column="chosen")
    assert calls == [("sft", (config,), {})]
    assert (config.output_dir, config.batch_size, config.warmup_steps) == ("runs/sft", 32, None)


def test_evaluate_sample_and_report(
    calls: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for run in ("demo", "b"):
        Path("runs", run).mkdir(parents=True)
    assert main(["evaluate", *NEEDED, "--top_p", "0.9", "--ref_model", "r"]) == 0
    assert main(["sample", "runs/demo", "--prompt", "Hi - you"]) == 0
    assert main(["sample", "--model", "runs/demo"]) == 0
    assert capsys.readouterr().out == ""
    assert main(["report", "runs/demo"]) == 0
    assert capsys.readouterr().out == "result of report\n"
    assert main(["report", "runs/demo", "runs/b", "-o", "r.html", "--figures", "out"]) == 0
    assert calls == [
        ("evaluate", (EvaluateConfig(model="m", dataset="d", reward_funcs=["a.b"], top_p=0.9, ref_model="r"),), {}),
        ("sample", (SampleConfig(model="runs/demo", prompt="Hi - you"),), {}),
        ("sample", (SampleConfig(model="runs/demo"),), {}),
        ("report", ([Path("runs/demo")],), {"output": None, "figures": None}),
        ("report", ([Path("runs/demo"), Path("runs/b")],), {"output": "r.html", "figures": "out"}),
    ]
    assert main(["report", "runs/demo", "runs/c"]) == 2
    assert "there is no run folder runs/c; name the output_dir" in capsys.readouterr().err
    assert len(calls) == 5


def test_what_verbs_hand_over_to_exists() -> None:
    for verb in VERBS.values():
        *folders, name = verb.module.split(".")
        home = SOURCE.joinpath(*folders, name)
        source = (home / "__init__.py" if home.is_dir() else home.with_suffix(".py")).read_text("utf-8")
        assert f"\ndef {verb.function}(" in source, f"{verb.module} has no function {verb.function}"


# -- Resuming ----------------------------------------------------------------------------------------------------------


def test_resume_takes_the_configuration_of_the_run(calls: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    first = TrainConfig(
        model="m", dataset="d", reward_funcs=["a.b"], epsilon=0.3, overwrite=True, output_dir="elsewhere"
    )
    (run / "config.yaml").write_text(config_to_yaml(first))
    for flags in (["--resume"], ["--resume", "true"]):
        assert main(["train", *flags, "--output_dir", str(run)]) == 0
    assert main(["train", "--resume", "--output_dir", str(run), "--max_steps", "9"]) == 0
    assert main(["demo", "--resume", "--output_dir", str(run)]) == 0
    configs = [config for _, (config,), _ in calls]
    expected = first.model_copy(update={"resume": True, "overwrite": False, "output_dir": str(run)})
    assert configs == [expected, expected, expected.model_copy(update={"max_steps": 9}), expected]


def test_resume_looks_in_the_default_folder(calls: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/sft").mkdir(parents=True)
    Path("runs/sft/config.yaml").write_text(config_to_yaml(SFTConfig(model="sft", dataset="d")))
    assert main(["sft", "--resume"]) == 0
    for folder, verb in (("runs/train", "train"), ("runs/demo", "demo")):
        Path(folder).mkdir(parents=True)
        config = TrainConfig(model=verb, dataset="d", reward_funcs=["a.b"], output_dir=folder)
        Path(folder, "config.yaml").write_text(config_to_yaml(config))
        assert main([verb, "--resume"]) == 0
    assert [config.model for _, (config,), _ in calls] == ["sft", "train", "demo"]


def test_resume_with_a_file_takes_the_file(calls: Any, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("model: m\ndataset: d\nreward_funcs: [a.b]\n")
    assert main(["train", "--config", str(path), "--resume", "--output_dir", str(tmp_path / "absent")]) == 0
    [(_, (config,), _)] = calls
    assert config.resume is True


def test_resume_false_is_no_resume(calls: Any) -> None:
    assert main(["train", *NEEDED, "--resume", "false"]) == 0
    [(_, (config,), _)] = calls
    assert config.resume is False


def test_nothing_to_resume(calls: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sentence = failure(capsys, "train", "--resume", "--output_dir", str(tmp_path))
    for part in (str(tmp_path), "no config.yaml", "--output_dir"):
        assert part in sentence
    assert calls == []


# -- Refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["trian"], '"trian" is not a verb of pairtune; the nearest is train.'),
        (
            ["xyz"],
            f'"xyz" is not a verb of pairtune; there are {", ".join(VERBS)}.',
        ),
        (
            ["--verbose"],
            f"--verbose stands where a verb should; there are {', '.join(VERBS)}.",
        ),
        (["-x", "train"], "-x is not a flag of `pairtune`; `pairtune --help` shows what is expected."),
        (["train", *NEEDED, "--epsilonn", "3"], "--epsilonn is not a known setting; the nearest is --epsilon."),
        (["train", *NEEDED, "--epsil", "3"], "--epsil is not a known setting; the nearest is --epsilon."),
        (["train", *NEEDED, "--clip", "none"], "--clip is not a known setting; the nearest is --p3o.clip."),
        (["train", *NEEDED, "--kl-coef=0.1"], "--kl-coef is not a known setting; the nearest is --beta."),
        (["train", *NEEDED, "--max-step", "3"], "--max-step is not a known setting; the nearest is --max_steps."),
        (["train", *NEEDED, "--print_config"], "--print_config is not a known setting; the nearest is --print-config."),
        (["train", "--confg", "x"], "--confg is not a known setting; the nearest is --config."),
        (["train", *NEEDED, "--zzzz"], "--zzzz is not a known setting; `pairtune train --help` lists all of them."),
        (
            ["evaluate", "--max_steps", "3"],
            "--max_steps is a setting of `pairtune train`, which `pairtune evaluate` does not have; leave it out.",
        ),
        (
            ["sample", "--max-new-tokens", "3", "m"],
            "--max-new-tokens is not a known setting; the nearest is --max_completion_length.",
        ),
        (["train", "stray"], '"stray" is not expected here; every setting is a flag, such as `--seed 1`.'),
        (["train", "--epsilon", "abc", *NEEDED], '--epsilon must be a number > 0, not "abc".'),
        (["train", "--epsilon", "-1e-3", *NEEDED], '--epsilon must be a number > 0, not "-1e-3".'),
        (["train", "--resume", "maybe", *NEEDED], '--resume must be true or false, not "maybe".'),
        (
            ["train", "--epsilon"],
            "argument --epsilon: expected one argument; `pairtune train --help` shows what is expected.",
        ),
        (["sample"], "model is missing; give --model, or --config with a file that has it."),
        (
            ["train", "--model", "m", "--dataset", "d"],
            "reward_funcs is missing; "
            "give --reward_funcs with package.module.function, path/to/file.py:function or a reward model.",
        ),
        (
            ["sft", "--model", "m", "--dataset", "d", "--beta", "1"],
            "--beta is a setting of `pairtune train`, which `pairtune sft` does not have; leave it out.",
        ),
        (["report"], "the following arguments are required: RUN; `pairtune report --help` shows what is expected."),
        (
            ["report", "r", "--foo"],
            "--foo is not a flag of `pairtune report`; `pairtune report --help` shows what is expected.",
        ),
    ],
)
def test_refusals(calls: Any, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str) -> None:
    assert failure(capsys, *argv) == sentence
    assert calls == []


def test_several_mistakes_are_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *NEEDED, "--epsilon", "0", "--p3o.clip", "x"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        'pairtune: error: --epsilon must be a number > 0, not "0".',
        'pairtune: error: --p3o.clip must be joint, separate or none, not "x".',
    ]


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def ends_with(error: BaseException) -> SimpleNamespace:
        def train(config: TrainConfig) -> None:
            raise error

        return SimpleNamespace(train=train)

    monkeypatch.setitem(sys.modules, "pairtune.stages.rl", ends_with(KeyboardInterrupt()))  # type: ignore[misc]
    assert main(["train", *NEEDED]) == 130
    assert capsys.readouterr().err == "pairtune: interrupted\n"
    monkeypatch.setitem(sys.modules, "pairtune.stages.rl", ends_with(pairtune.PairtuneError("no.")))  # type: ignore[misc]
    assert main(["train", *NEEDED]) == 2
    assert capsys.readouterr().err == "pairtune: error: no.\n"
    monkeypatch.setitem(sys.modules, "pairtune.stages.rl", ends_with(ZeroDivisionError("a defect")))  # type: ignore[misc]
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its traceback
        main(["train", *NEEDED])


def test_the_process_group_is_left_when_all_is_done_and_only_then(
    calls: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left: list[int] = []
    group = SimpleNamespace(shutdown=lambda: left.append(len(calls)))
    monkeypatch.setitem(sys.modules, "pairtune.runs.distributed", group)
    assert main(["train", *NEEDED]) == 0
    assert left == [1]

    def fails(_: Any) -> None:
        raise pairtune.PairtuneError("no")

    monkeypatch.setattr("pairtune.cli._handover", lambda _: fails)
    assert main(["train", *NEEDED]) == 2
    assert left == [1]


def test_dashes_stand_for_underscores(calls: Any, capsys: pytest.CaptureFixture[str]) -> None:
    dashed = [
        "--max-steps",
        "3",
        "--learning-rate=1e-5",
        "--p3o.max-ratio",
        "4",
        "--system-prompt",
        "--not-a-flag is text",
    ]
    assert main(["train", *NEEDED, *dashed, "--print-config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["max_steps"], printed["learning_rate"], printed["p3o"]["max_ratio"]) == (3, 1e-5, 4.0)
    assert printed["system_prompt"] == "--not-a-flag is text"
    assert calls == []


# -- What is printed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb, needed", [("train", NEEDED), ("evaluate", NEEDED), ("sample", ["m"]), ("demo", [])])
def test_print_config_is_a_configuration(
    verb: str, needed: list[str], calls: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--temperature", "0.5", "--system_prompt", "Be kind: yes"]
    assert main([verb, *needed, *flags, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert calls == []
    path = tmp_path / "printed.yaml"
    path.write_text(printed)
    assert yaml.safe_load(printed)["temperature"] == 0.5
    assert main([verb, *needed, *flags]) == 0
    assert main([verb, "--config", str(path)]) == 0
    (_, asked, _), (_, read_back, _) = calls
    assert asked == read_back


CLASSES = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "train": TrainConfig,
    "demo": TrainConfig,
    "evaluate": EvaluateConfig,
    "sample": SampleConfig,
    "judge": JudgeConfig,
}


@pytest.mark.parametrize("verb", CLASSES)
@pytest.mark.parametrize("columns", [60, 200])
def test_help_shows_every_field(
    verb: str, columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= min(columns + 20, 118)
    for key, field in keys_of(CLASSES[verb]).items():
        entry = printed.split(f"\n  --{key} ")[1].split("\n  --")[0].split("\n\n")[0]
        explained = "".join((field.description or "").split())
        default = "[required]" if field.is_required() and verb != "demo" else "[default:"
        assert f"{explained}{default}" in "".join(entry.split()), key


def test_help_shows_defaults_and_those_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    shown = {}
    for verb in ("train", "demo"):
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown[verb] = " ".join(capsys.readouterr().out.split())
    assert "Tokens of a completion at most, end-of-sequence token included. [default: 256]" in shown["train"]
    assert "--p3o.clip joint|separate|none" in shown["train"]
    assert "--algorithm NAME" in shown["train"]
    assert "[default: p3o] One of: p3o, ppo, vpg," in shown["train"]  # too many to stand beside the flag
    assert "[default: runs/train]" in shown["train"]
    assert "[default: runs/demo]" in shown["demo"]
    assert "end-of-sequence token included. [default: 256]" not in shown["demo"]


def test_help_of_the_program_and_of_report(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        for name, verb in VERBS.items():
            assert f"{name} {verb.summary}" in printed
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "pairtune report RUN... [-o FILE] [--figures FOLDER]" in capsys.readouterr().out


# -- What it costs -----------------------------------------------------------------------------------------------------


def python(*args: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True, check=False)


def test_help_answers_within_a_second() -> None:
    before = os.times()
    ran = python("-m", "pairtune", "--help")
    after = os.times()
    assert ran.returncode == 0, ran.stderr
    assert "verbs:" in ran.stdout
    # Seconds of the processor, not of the clock: what else runs on the machine is not our cost.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 1


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    script = """
import contextlib, sys
from pairtune.cli import main
def heavy():
    return [name for name in ("pydantic", "yaml", "torch", "transformers", "datasets", "rich") if name in sys.modules]
with contextlib.suppress(SystemExit): main(["--help"])
print("after help", heavy())
main(["demo", "--print-config"])
main(["train", "--epsilon", "abc"])
print("after configuration", heavy())
"""
    ran = python("-c", script)
    assert ran.returncode == 0, ran.stderr
    assert "after help []" in ran.stdout
    assert "after configuration ['pydantic', 'yaml']" in ran.stdout


def test_the_module_runs_and_exits_with_its_code() -> None:
    ran = python("-m", "pairtune", "train", "--epsilon", "abc", *NEEDED)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == 'pairtune: error: --epsilon must be a number > 0, not "abc".\n'
    assert python("-m", "pairtune", "--version").stdout == f"pairtune {pairtune.__version__}\n"


# -- The package's own names -------------------------------------------------------------------------------------------


def test_names_of_the_package_are_loaded_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pairtune.TrainConfig is TrainConfig
    assert pairtune.EvaluateConfig is EvaluateConfig
    assert {"train", "evaluate", "PairtuneError", "__version__"} <= set(dir(pairtune))
    train = object()
    monkeypatch.setitem(sys.modules, "pairtune.stages.rl", SimpleNamespace(train=train))  # type: ignore[misc]
    assert pairtune.train is train
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pairtune.nonsense  # noqa: B018
