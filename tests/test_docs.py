"""What the documentation says is so: its Python runs, its commands parse, its names and defaults are those of the code.

That links between documents resolve is in test_house.py.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import test_properties as properties
import torch
import yaml

from pairtune.algorithms import ALGORITHMS
from pairtune.cli import VERBS, main
from pairtune.config import METHODS, CompareConfig, TrainConfig, keys_of, load_config, warnings_for
from pairtune.maths import advantages, contrastive, kl, pairwise, policy_gradient, preference

ROOT = Path(__file__).parent.parent
README, PYTHON, LOG = (ROOT / name for name in ("README.md", "docs/python.md", "docs/log.md"))
OVERVIEW = ROOT / "docs/algorithms/README.md"
PAGES = {name: ROOT / f"docs/algorithms/{name}.md" for name in ALGORITHMS}
P3O = PAGES["p3o"]
OTHERS = [ROOT / "docs" / f"{name}.md" for name in ("README", "sft", "reward", "compare", "report", "judge")]
DOCUMENTS = [README, PYTHON, LOG, OVERVIEW, *OTHERS, *PAGES.values()]

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


@pytest.mark.parametrize("path", [README, PYTHON, *PAGES.values()], ids=lambda path: path.name)
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
        if arguments[0] == "report":  # of runs that other commands have made
            for run in itertools.takewhile(lambda word: not word.startswith("-"), arguments[1:]):
                Path(run).mkdir(parents=True, exist_ok=True)
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


@pytest.mark.parametrize("method", PAGES)
def test_options_have_the_defaults_that_the_page_gives(method: str) -> None:
    options = {named(option)[0]: default for option, default, _ in table(PAGES[method], "Options", "option")}
    assert {key for key in keys_of(TrainConfig) if key.startswith(f"{method}.")} <= set(options)
    needed = NEEDED | {"algorithm": method}
    assert load_config(TrainConfig, None, needed | options) == load_config(TrainConfig, None, needed)


def words_of(module: ModuleType) -> set[str]:
    """The public functions of a module and their arguments."""
    functions = {
        name: f for name, f in inspect.getmembers(module, inspect.isfunction) if f.__module__ == module.__name__
    }
    public = {name: f for name, f in functions.items() if not name.startswith("_")}
    return set(public) | {argument for f in public.values() for argument in inspect.signature(f).parameters}


@pytest.mark.parametrize("method", PAGES)
def test_symbols_are_arguments_or_settings(method: str) -> None:
    """Those of the functions that the page says the method is made of."""
    modules = {
        m.__name__.rpartition(".")[2]: m for m in (advantages, contrastive, pairwise, policy_gradient, preference)
    }
    imported = set(re.findall(r"\b(\w+)\.\w+\(", "".join(block.text for block in blocks(PAGES[method], "python"))))
    known = words_of(kl).union(keys_of(TrainConfig), *(words_of(modules[name]) for name in imported & modules.keys()))
    known |= words_of(advantages)
    for symbol, code, *_ in table(PAGES[method], "Symbols", "symbol"):
        assert named(code) or symbol == "K", symbol
        assert set(named(code)) <= known, symbol


def test_settings_in_running_text_exist() -> None:
    """`key: value` or `section.key` in backticks is a setting with a value that it takes."""
    known = keys_of(TrainConfig)
    checked = 0
    for path in DOCUMENTS:
        if path.name in ("sft.md", "reward.md"):
            continue  # other stages, other settings: tests/test_stage_docs.py
        for name in named(prose(path)):
            if match := re.fullmatch(r"([a-z_0-9]+(?:\.[a-z_0-9]+)?): ([\w.-]+)", name):
                if path.name == "compare.md" and match[1] in set(keys_of(CompareConfig)) - set(known):
                    assert match[2] in ("true", "false")
                else:
                    load_config(TrainConfig, None, {**NEEDED, match[1]: match[2]})
            elif name.partition(".")[0] in ALGORITHMS and "." in name and not name.endswith(".md"):
                assert name in known, f"{path.name}: {name}"
            else:
                continue
            checked += 1
    assert checked >= 10


# -- Names of metrics, of tests, of files ------------------------------------------------------------------------------


def pattern(name: str) -> re.Pattern[str]:
    """`clip_ratio/pass_k` and `rewards/<name>/mean` stand for families of names."""
    return re.compile(re.escape(name).replace("<name>", r"[^/]+").replace("pass_k", r"pass_\d+"))


def own_metrics(method: str) -> list[str]:
    """The metrics that the page of a method gives."""
    return [named(row[0])[0] for row in table(PAGES[method], "Metrics", "name")]


@pytest.mark.parametrize("file", ["metrics.jsonl", "evaluations.jsonl"])
def test_metrics_are_what_a_run_logs_and_all_of_it(file: str, place: Path) -> None:
    text = OVERVIEW.read_text("utf-8")
    section = text[text.index(f"`{file}` has a line") :]
    rows = section[section.index("| name |") :].split("\n\n")[0].splitlines()[2:]
    documented = [named(row)[0] for row in rows]
    if file == "metrics.jsonl":
        documented += [f"{name}{suffix}" for name in own_metrics("p3o") for suffix in ("", "/pass_k")]
    logged = {name for line in lines(place / "runs" / "concise", file) for name in line}
    assert [name for name in documented if not any(pattern(name).fullmatch(key) for key in logged)] == []
    assert [key for key in sorted(logged) if not any(pattern(name).fullmatch(key) for name in documented)] == []


@pytest.mark.parametrize("method", PAGES)
def test_a_page_has_the_metrics_of_its_method_and_no_others(method: str) -> None:
    """Those that its loss returns, over all its options; the loop adds one for PPO."""
    returned = {"beta"} if method == "ppo" else set()
    # A clip has a metric of its own, and not every method's stands among the variants.
    clip = [{f"{method}.clip": True}] if method in ("rloo", "online_dpo", "online_ipo") else []
    for variant, words in properties.VARIANTS.items():
        for options in [{}, *clip] if words["algorithm"] == method else []:
            policy, values, experience = properties.collected()
            config = properties.config_of(variant, **options)
            experience = properties.prepared(experience, config)
            returned |= properties.output_of(policy, values, experience, config).metrics.keys()
    assert sorted(own_metrics(method)) == sorted(returned)


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


# -- The pages of the methods ------------------------------------------------------------------------------------------


def test_every_method_has_its_page_and_every_page_a_method() -> None:
    assert {path.name for path in OVERVIEW.parent.iterdir()} == {"README.md", *(f"{name}.md" for name in ALGORITHMS)}
    for path, heading, folder in ((OVERVIEW, "Algorithms", ""), (README, "Methods", "docs/algorithms/")):
        first_column = "method" if path == OVERVIEW else "`algorithm`"
        linked = [row[0] for row in table(path, heading, first_column)]
        assert sorted(linked) == sorted(f"[`{name}`]({folder}{name}.md)" for name in ALGORITHMS)


def by_method(heading: str) -> dict[str, list[str]]:
    """The cells of the overview's table under a heading, for each method; several may share a row."""
    rows = table(OVERVIEW, heading, "method")
    return {name: cells for first, *cells in rows for name in named(first) if name in ALGORITHMS}


def test_the_overview_has_every_method_in_every_table() -> None:
    headings = re.findall(r"^#+ (.*)$", OVERVIEW.read_text("utf-8"), re.MULTILINE)
    with_table = [h for h in headings if h not in ("Notation", "Metrics")]
    assert {heading: sorted(by_method(heading)) for heading in with_table} == dict.fromkeys(with_table, sorted(PAGES))


def test_what_the_overview_says_that_methods_need_is_what_the_configuration_asks() -> None:
    for name, (least, values, reads, shift, truncation, no_beta, replay) in by_method(
        "What each needs, and what it allows"
    ).items():
        method = METHODS[name]
        assert least == ("the dataset's 2" if method.offline else str(method.min_generations)), name
        assert values == ("yes" if method.has_values else "no"), name
        assert ("scored" in reads or "preferences" in reads) == (method.offline or name == "copg"), name
        assert shift == ("changes no bit" if properties.TABLE[name].shift else "matters"), name
        assert truncation == ("allowed" if method.any_sampler or method.offline else "refused"), name
        assert no_beta == ("refused" if method.needs_beta else "allowed"), name
        assert replay == ("yes" if method.replays else "no"), name


def test_the_overview_has_the_known_multiples_of_the_gradient() -> None:
    for name, (_, multiple) in by_method("The gradient at ratio 1").items():
        known = properties.TABLE[name].at_ratio_one
        assert (multiple == f"{known:g}") if known is not None else not multiple.isdigit(), name


def test_the_overview_counts_the_passes_over_the_model() -> None:
    for name, (sampling, _, old, update) in by_method("Passes over the model, and memory").items():
        assert (sampling == "none") == (METHODS[name].offline or name == "copg"), name  # copg's last row: offline
        assert (old == "free, or 1") == (not ALGORITHMS[name].prepares_from_old), name
        assert ("values" in update) == METHODS[name].has_values, name
        assert ("m" in update.split()[-1]) == (METHODS[name].replays and name != "copg"), name


def test_the_weights_of_the_overview_are_the_gradients() -> None:
    """Of methods that no other test of gradients covers as a formula in terms of pairs and tokens."""
    policy, values, experience = properties.collected(drift=0.0)
    experience = properties.with_fields(experience, old_logprobs=policy.detach())
    mask = experience.completions.completion_mask
    token_logratio = torch.where(mask, policy.detach() - experience.ref_logprobs, 0)
    u, r, beta = token_logratio.sum(-1), experience.rewards, properties.BETA
    du, dr = u[:, 0] - u[:, 1], r[:, 0] - r[:, 1]
    length = mask.sum(-1, keepdim=True)
    pair = torch.tensor([1.0, -1.0], dtype=torch.float64)
    sign = dr.sign()[:, None] * pair / (1 + 1e-4 / (dr.abs() / 2))[:, None]
    weights = {
        "online_dpo": (beta * (dr.sigmoid() - (beta * du).sigmoid()))[:, None, None] * pair[:, None],
        "online_ipo": (2 / beta * (dr.sigmoid() - 0.5 - beta * du))[:, None, None] * pair[:, None],
        "dpo": (beta * (1 - (beta * du).sigmoid()))[:, None, None] * pair[:, None],
        "ipo": (2 / beta * (0.5 - beta * du))[:, None, None] * pair[:, None],
        "grpo": (sign[..., None] - beta + beta / token_logratio.exp()) / 2 / length,
        "raft": (r == r.amax(-1, keepdim=True)).double()[..., None],
    }
    for name, weight in weights.items():
        found = -properties.gradients(policy, values, experience, properties.config_of(name))[0]
        expected = torch.where(mask, weight.expand(mask.shape), 0) / len(r)  # the mean over prompts
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, msg=name)


def page_commands(method: str) -> list[list[str]]:
    return [words for words in commands(PAGES[method]) if words[:2] == ["pairtune", "train"]]


@pytest.mark.parametrize("method", PAGES)
def test_the_commands_of_a_page_are_of_its_method_and_leave_nothing_to_warn_of(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert page_commands(method)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    for words in page_commands(method):
        flags = dict(zip((word.removeprefix("--") for word in words[2::2]), words[3::2], strict=True))
        config = load_config(TrainConfig, flags.pop("config"), flags)
        assert config.algorithm == method
        assert warnings_for(config) == [], shlex.join(words)
        assert config.output_dir != "runs/demo"


@pytest.mark.slow
@pytest.mark.parametrize("method", PAGES)
def test_the_commands_of_a_page_train(
    method: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vaderSentiment")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    small = {"model": model_folder, "max_steps": 2, "trainable_layers": 1, "num_eval_prompts": 2, "batch_size": 2}
    for words in page_commands(method):
        if "--dataset" in words:
            [rows] = blocks(PAGES[method], "jsonl")
            (tmp_path / words[words.index("--dataset") + 1]).write_text(rows.text)
        less = small | ({"minibatch_size": 1} if "--minibatch_size" in words else {})
        flags = [word for key, value in less.items() for word in (f"--{key}", str(value))]
        assert main([*without(words[1:], less), *flags]) == 0
        place = words[words.index("--output_dir") + 1]
        assert len(lines(tmp_path / place, "metrics.jsonl")) == 2


def without(words: list[str], keys: dict[str, Any]) -> list[str]:
    """A command without its flags of these settings."""
    given = [i for i, word in enumerate(words) if word.removeprefix("--") in keys and word.startswith("--")]
    return [word for i, word in enumerate(words) if i not in given and i - 1 not in given]


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
