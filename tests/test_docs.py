"""What the documentation says is so: its Python runs, its commands parse, its names and defaults are those of the code.

That links between documents resolve is in test_house.py.
"""

from __future__ import annotations

import inspect
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import yaml
from conftest import build_tiny_model

from pairtune.cli import VERBS, main
from pairtune.config import TrainConfig, keys_of, load_config, warnings_for
from pairtune.maths import kl, pairwise

ROOT = Path(__file__).parent.parent
README, P3O, PYTHON, LOG = (ROOT / name for name in ("README.md", "docs/p3o.md", "docs/python.md", "docs/log.md"))
DOCUMENTS = [README, P3O, PYTHON, LOG, ROOT / "docs/README.md"]

NEEDED = {"model": "m", "dataset": "d", "reward_funcs": ["a.b"]}
MODELS = ("smollm2-135m-instruct-q4", "HuggingFaceTB/SmolLM2-135M-Instruct")
SMALL = {"max_steps": 2, "batch_size": 4, "max_completion_length": 6, "trainable_layers": 1}
"""What the examples are made smaller by, so that a tiny model runs them in a moment."""


class Block(NamedTuple):
    """A fenced block of a document."""

    language: str
    line: int
    """Of its first line, in the document."""
    text: str

    @property
    def file_name(self) -> str | None:
        """The name in the comment that a block begins with, where it is the content of a file."""
        match = re.match(r"# ([\w.]+\.(?:py|yaml))\n", self.text)
        return match[1] if match else None


def blocks(path: Path, language: str) -> list[Block]:
    text = path.read_text("utf-8")
    return [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        if match[1] == language
    ]


def table(path: Path, heading: str, first_column: str) -> list[list[str]]:
    """The rows of the table under a heading whose first column is so called."""
    section = re.split(rf"^#+ {re.escape(heading)}$", path.read_text("utf-8"), flags=re.MULTILINE)[1]
    lines = section[section.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def named(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


# -- Where the examples run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, _tokenizer_folder: str) -> str:
    folder = tmp_path_factory.mktemp("docs-model")
    build_tiny_model("llama").save_pretrained(folder)
    shutil.copytree(_tokenizer_folder, folder, dirs_exist_ok=True)
    return str(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    """A folder with the files that the README writes, and the run that its first command makes of them."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for block in [*blocks(README, "python"), *blocks(README, "yaml")]:
        if block.file_name is not None:
            (folder / block.file_name).write_text(block.text)
    command = next(c for c in commands(README) if c[:2] == ["pairtune", "train"])
    # Every phase is to leave its time: two updates a pass, an evaluation and a checkpoint before the last step.
    small = SMALL | {"minibatch_size": 2, "eval_steps": 1, "save_steps": 1, "num_eval_prompts": 4, "keep_last": 9}
    flags = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main([*command[1:], "--model", model_folder, *flags]) == 0
    return folder


def lines(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / name).read_text("utf-8").splitlines()]


# -- Python ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [README, P3O, PYTHON], ids=lambda path: path.name)
def test_python_runs(
    path: Path,
    model_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From top to bottom in one namespace; what `print(...)  # text` promises is what is printed."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", "configs")
    namespace: dict[str, Any] = {"__name__": "example"}
    found = blocks(path, "python")
    assert found
    for block in found:
        code = block.text
        for name in MODELS:
            code = code.replace(f'"{name}"', repr(model_folder))
        for key, value in SMALL.items():
            code = re.sub(rf"\b{key}=\d+", f"{key}={value}", code)
        exec(compile("\n" * (block.line - 1) + code, str(path), "exec"), namespace)
        printed = capsys.readouterr().out.splitlines()
        for promised in re.findall(r"^ *print\(.*\)  # (.+)$", block.text, re.MULTILINE):
            assert promised in printed, f"{path.name}:{block.line} promises {promised!r}"


# -- Commands ----------------------------------------------------------------------------------------------------------


def commands(path: Path) -> list[list[str]]:
    """The commands of a document's shell blocks as words, without the environment variables before them."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words:
                found.append(words)
    return found


def pairtune_arguments(words: list[str]) -> list[str] | None:
    """What pairtune is told by a command, None where the command is another program's."""
    if words[0] == "torchrun":
        return words[words.index("-m") + 2 :] if words[words.index("-m") + 1] == "pairtune" else None
    return words[1:] if words[0] == "pairtune" else None


COMMANDS = [(path, words) for path in DOCUMENTS for words in commands(path)]


@pytest.mark.parametrize("path, words", COMMANDS, ids=[" ".join(words)[:60] for _, words in COMMANDS])
def test_commands_parse(path: Path, words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = pairtune_arguments(words)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"no target {words[1]}"
    elif arguments is not None:
        handed_over = []
        for verb in VERBS.values():  # nothing is trained, sampled or written here
            record = SimpleNamespace(**{verb.function: lambda *args, **kwargs: handed_over.append(args)})
            monkeypatch.setitem(sys.modules, verb.module, record)  # type: ignore[misc]
        monkeypatch.chdir(place)
        assert main(arguments) == 0
        assert len(handed_over) == (0 if "--print-config" in arguments else 1)
    else:
        assert words == [".", ".venv/bin/activate"], f"{path.name}: nothing checks {shlex.join(words)}"


def test_the_readme_shows_every_verb_and_begins_with_two_commands() -> None:
    shown = {arguments[0] for words in commands(README) if (arguments := pairtune_arguments(words))}
    assert shown == set(VERBS)
    assert commands(README)[:2] == [["make", "demo"], ["make", "test"]]
    text = README.read_text("utf-8")
    assert text.index("make demo") < text.index("\n## ")


def test_paths_of_checkpoints_are_those_of_the_run(place: Path) -> None:
    """`runs/concise/checkpoints/step-20` in a command is what the README's own settings write."""
    config = load_config(TrainConfig, place / "concise.yaml")
    named_paths = {word for _, words in COMMANDS for word in words if "/checkpoints/" in word}
    assert named_paths == {f"{config.output_dir}/checkpoints/step-{config.max_steps}"}
    assert (place / config.output_dir / "checkpoints" / f"step-{SMALL['max_steps']}" / "model.safetensors").is_file()


# -- Settings ----------------------------------------------------------------------------------------------------------

YAML_BLOCKS = [(path, block) for path in DOCUMENTS for block in blocks(path, "yaml")]


@pytest.mark.parametrize("path, block", YAML_BLOCKS, ids=[f"{path.name}:{b.line}" for path, b in YAML_BLOCKS])
def test_yaml_is_a_configuration(path: Path, block: Block, tmp_path: Path) -> None:
    """Whole files stand alone; of an excerpt, only what it leaves out is filled in."""
    missing = {} if block.file_name else {k: v for k, v in NEEDED.items() if k not in yaml.safe_load(block.text)}
    file = tmp_path / "config.yaml"
    file.write_text(block.text)
    assert warnings_for(load_config(TrainConfig, file, missing)) == []


def test_options_have_the_defaults_that_the_page_gives() -> None:
    options = {named(option)[0]: default for option, default, _ in table(P3O, "Options", "option")}
    assert {key for key in keys_of(TrainConfig) if key.startswith("p3o.")} <= set(options)
    assert load_config(TrainConfig, None, NEEDED | options) == load_config(TrainConfig, None, NEEDED)


def test_symbols_are_arguments_or_settings() -> None:
    losses = (pairwise.p3o_joint_loss, pairwise.p3o_separate_loss, pairwise.pairwise_policy_gradient_loss)
    known = {name for f in (*losses, kl.kl_shaped_rewards) for name in inspect.signature(f).parameters}
    known |= {"kl_shaped_rewards", *keys_of(TrainConfig)}
    for symbol, code, *_ in table(P3O, "Symbols", "symbol"):
        assert named(code), symbol
        assert set(named(code)) <= known, symbol


def test_settings_in_running_text_exist() -> None:
    """`key: value` or `section.key` in backticks is a setting with a value that it takes."""
    known = keys_of(TrainConfig)
    checked = 0
    for path in DOCUMENTS:
        for name in named(prose(path)):
            if match := re.fullmatch(r"([a-z_0-9]+(?:\.[a-z_0-9]+)?): ([\w.-]+)", name):
                load_config(TrainConfig, None, {**NEEDED, match[1]: match[2]})
            elif name.startswith("p3o.") and "/" not in name and not name.endswith(".md"):
                assert name in known, f"{path.name}: {name}"
            else:
                continue
            checked += 1
    assert checked >= 10


# -- Names of metrics, of tests, of files ------------------------------------------------------------------------------


def pattern(name: str) -> re.Pattern[str]:
    """`clip_ratio/pass_k` and `rewards/<name>/mean` stand for families of names."""
    return re.compile(re.escape(name).replace("<name>", r"[^/]+").replace("pass_k", r"pass_\d+"))


@pytest.mark.parametrize("file", ["metrics.jsonl", "evaluations.jsonl"])
def test_metrics_are_what_a_run_logs_and_all_of_it(file: str, place: Path) -> None:
    text = P3O.read_text("utf-8")
    section = text[text.index(f"`{file}` has a line") :]
    rows = section[section.index("| name |") :].split("\n\n")[0].splitlines()[2:]
    documented = [named(row)[0] for row in rows]
    logged = {name for line in lines(place / "runs" / "concise", file) for name in line}
    assert [name for name in documented if not any(pattern(name).fullmatch(key) for key in logged)] == []
    assert [key for key in sorted(logged) if not any(pattern(name).fullmatch(key) for name in documented)] == []


def test_the_run_folder_holds_what_the_readme_lists(place: Path) -> None:
    run_dir = place / "runs" / "concise"
    listed = {named(row[0])[0] for row in table(README, "What a run leaves behind", "in the run folder")}
    written = {path.name for path in run_dir.iterdir() if not path.name.startswith(".")} - {"checkpoints"}
    assert listed - {"checkpoints/step-N/", "report.html"} == written


def test_named_tests_and_files_exist() -> None:
    sources = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    checked = 0
    for path in DOCUMENTS:
        for name in named(prose(path)):
            if re.fullmatch(r"test_\w+", name):
                assert f"def {name}(" in sources, f"{path.name}: there is no test {name}"
            elif re.fullmatch(r"(src|tests|configs|docs|benchmarks)/[\w/.-]+", name):
                assert (ROOT / name).exists(), f"{path.name}: there is no {name}"
            else:
                continue
            checked += 1
    assert checked >= 20


# -- Figures -----------------------------------------------------------------------------------------------------------


def test_the_variances_are_those_of_the_enumeration() -> None:
    from maths.test_enumeration import EXACT_BASELINE, p3o_variance, reinforce_variance

    computed = {
        "P3O, K = 2": p3o_variance(2),
        "P3O, K = 3": p3o_variance(3),
        "P3O, K = 4": p3o_variance(4),
        "REINFORCE with the exact, unknown E[R] as baseline": EXACT_BASELINE,
        "REINFORCE without a baseline": reinforce_variance(0.0),
        "REINFORCE without a baseline, all rewards raised by 1": reinforce_variance(1.0),
        "REINFORCE without a baseline, all rewards raised by 5": reinforce_variance(5.0),
    }
    assert dict(table(P3O, "Exact variance", "estimator")) == {k: f"{v:.3f}" for k, v in computed.items()}
