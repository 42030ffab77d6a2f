"""The command line: each verb reads its configuration and hands over to one function.

Flags, defaults and help come from the models in `pairtune.config`. A verb's function is imported when the verb runs,
and its flags are built only when it is asked for: `pairtune --help` answers without torch and without pydantic.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, get_args, get_origin

import pairtune
from pairtune.errors import PairtuneError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pairtune.config import Words

LONGEST_METAVAR = 60
"""Characters of a flag's choices beside its name; more of them stand in its help."""

DEMO_CONFIG = Path(__file__).with_name("demo") / "demo.yaml"
DEMO_COMPARISON = DEMO_CONFIG.with_name("compare.yaml")


class Verb(NamedTuple):
    """What a verb does, and the one function that it hands over to."""

    summary: str
    module: str
    function: str
    config: str | None = None
    """Class in `pairtune.config` that gives the flags; the function takes an instance of it."""
    default: Path | None = None
    """The configuration file that is read when none is named."""


VERBS: dict[str, Verb] = {
    "sft": Verb("fine-tune a model on completions, conversations or text", "pairtune.stages.sft", "sft", "SFTConfig"),
    "reward": Verb("learn a reward model from comparisons", "pairtune.stages.reward", "reward", "RewardConfig"),
    "train": Verb("align a model from relative feedback", "pairtune.stages.rl", "train", "TrainConfig"),
    "evaluate": Verb(
        "measure a model on held-out prompts: reward, KL, length, each with its interval",
        "pairtune.evaluation",
        "evaluate",
        "EvaluateConfig",
    ),
    "judge": Verb(
        "compare completions or models pairwise before a judge, each pair in both orders",
        "pairtune.evidence.judge",
        "judge",
        "JudgeConfig",
    ),
    "compare": Verb(
        "run a grid of methods at equal budgets, and say which gives more reward for less drift",
        "pairtune.evidence.compare",
        "compare",
        "CompareConfig",
    ),
    "sample": Verb("talk to a model or to the result of a run", "pairtune.chat", "sample", "SampleConfig"),
    "demo": Verb(
        "align SmolLM2-135M-Instruct on this machine, before and after side by side",
        "pairtune.demo",
        "run",
        "TrainConfig",
        DEMO_CONFIG,
    ),
    "report": Verb("write the page of a run, or of a comparison of runs", "pairtune.evidence.report", "write_report"),
}

EXAMPLES = """\
examples:
  pairtune demo
  pairtune demo --compare
  pairtune sft --model smollm2-135m-instruct-q4 --dataset answers.jsonl --dataset_test_split null
  pairtune train --config configs/tldr_gpu.yaml --epsilon 0.1 --p3o.clip separate
  pairtune train --resume --output_dir runs/train
  pairtune sample runs/demo --prompt "How was your day?"
"""
USAGE = {
    "demo": "pairtune demo [--compare] [settings]",
    "judge": "pairtune judge A B [C ...] [settings]",
    "sample": "pairtune sample MODEL [settings]",
    "report": "pairtune report RUN... [-o FILE] [--figures FOLDER]",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0 done, 2 the user can mend it, 130 Ctrl-C."""
    try:
        _run(list(sys.argv[1:] if argv is None else argv))
    except PairtuneError as error:
        for sentence in str(error).splitlines():
            print(f"pairtune: error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pairtune: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(argv: list[str]) -> None:
    if argv[:1] == ["demo"] and "--compare" in argv:
        # Another thing to show than one run, with the settings of `pairtune compare`.
        argv = ["compare", "--config", str(DEMO_COMPARISON), *(word for word in argv[1:] if word != "--compare")]
    name = argv[0] if argv else "--help"
    if not name.startswith("-") and name not in VERBS:
        near = difflib.get_close_matches(name, VERBS, n=1)
        raise PairtuneError(
            f'"{name}" is not a verb of pairtune; {f"the nearest is {near[0]}" if near else _all_verbs()}.'
        )
    flags, unknown = _parser(name).parse_known_args(_with_underscores(argv, name) or ["--help"])
    if flags.verb is None:
        raise PairtuneError(f"{name} stands where a verb should; {_all_verbs()}.")
    if unknown:
        raise PairtuneError(_unknown_argument(unknown[0], name))
    verb, values = VERBS[flags.verb], {key: value for key, value in vars(flags).items() if key != "verb"}
    if verb.config is None:
        for run in values["runs"]:
            if not Path(run).is_dir():  # before seconds are spent on imports
                raise PairtuneError(f"there is no run folder {run}; name the output_dir of a run or of a comparison.")
        print(_handover(verb)(list(map(Path, values["runs"])), output=values["output"], figures=values["figures"]))
    elif (config := _read_config(verb, values)) is not None:
        function = _handover(verb)
        _hide_progress_bars()
        function(config)
        # Not after an error: the others may be waiting, and would be waited for.
        if "pairtune.runs.distributed" in sys.modules:
            sys.modules["pairtune.runs.distributed"].shutdown()


def _with_underscores(argv: list[str], name: str) -> list[str]:
    """The arguments, a setting that is spelled with dashes (`--max-steps`) as the setting that it is."""
    if name not in VERBS or VERBS[name].config is None or not any("-" in word.lstrip("-") for word in argv):
        return argv
    from pairtune.config import keys_of

    known = {f"--{key}" for key in keys_of(_config_class(VERBS[name]))}
    words = []
    for word in argv:
        flag, equals, value = word.partition("=")
        spelled = "--" + flag[2:].replace("-", "_")
        words.append(f"{spelled}{equals}{value}" if flag.startswith("--") and spelled in known else word)
    return words


def _hide_progress_bars() -> None:
    """Those of transformers: they would be drawn across our own display."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def _handover(verb: Verb) -> Any:
    return getattr(import_module(verb.module), verb.function)


def _all_verbs() -> str:
    return f"there are {', '.join(VERBS)}"


# -- Reading the configuration -----------------------------------------------------------------------------------------


def _read_config(verb: Verb, flags: dict[str, Any]) -> Words | None:
    """The configuration that the verb shall use, or None when it was only to be printed."""
    from pairtune.config import config_to_yaml, load_config

    cls, path, only_print = _config_class(verb), flags.pop("config", verb.default), flags.pop("print_config")
    # One value for a list field may also be meant as null; the models tell these apart.
    overrides = {
        key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in flags.items()
    }
    if str(overrides.get("resume")).lower() in ("true", "1", "yes", "on") and path == verb.default:
        path = _config_of_run(verb, overrides)
        overrides = {"overwrite": "false", **overrides}  # a run that once replaced another is not to be replaced itself
    config = load_config(cls, path, overrides)
    # From Python reward functions can be passed in; here they must be named.
    stand_ins = ("reward_model", "preference_func")
    if getattr(config, "reward_funcs", None) == [] and all(getattr(config, key, None) is None for key in stand_ins):
        raise PairtuneError(
            "reward_funcs is missing; "
            "give --reward_funcs with package.module.function, path/to/file.py:function or a reward model."
        )
    if only_print:
        print(config_to_yaml(config), end="")
        return None
    return config


def _config_of_run(verb: Verb, overrides: dict[str, Any]) -> Path:
    """The configuration that the run to be resumed was started with."""
    from pairtune.config import load_config

    run_dir = overrides.get("output_dir")
    if run_dir is None:
        cls = _config_class(verb)
        values = load_config(cls, verb.default).model_dump() if verb.default else {}
        run_dir = values.get("output_dir", cls.model_fields["output_dir"].default)
    path = Path(run_dir) / "config.yaml"
    if not path.is_file():
        raise PairtuneError(
            f"there is no run to resume in {run_dir} (it has no config.yaml); "
            "name its folder with --output_dir, or give --config."
        )
    return path


def _config_class(verb: Verb) -> type[Words]:
    from pairtune import config

    cls: type[Words] = getattr(config, str(verb.config))
    return cls


# -- Flags and help, made from the models ------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are PairtuneErrors."""

    def __init__(self, **settings: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 118)
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                prog, max_help_position=min(32, width // 3), width=width
            ),
            **settings,
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as Python 3.14 has it: -1e-6 is a value, not a flag

    def error(self, message: str) -> NoReturn:
        raise PairtuneError(f"{message}; `{self.prog} --help` shows what is expected.")


def _parser(asked: str) -> _Parser:
    """The parser of all verbs, with the flags of the one that is asked for."""
    parser = _Parser(
        prog="pairtune",
        usage="pairtune VERB [settings]",
        description="Align language models from pairs of completions.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"pairtune {pairtune.__version__}")
    verbs = parser.add_subparsers(
        dest="verb",
        metavar="VERB",
        prog="pairtune",
        title="verbs",
        description="`pairtune VERB --help` lists all settings",
    )
    for name, verb in VERBS.items():
        usage = USAGE.get(name, f"pairtune {name} [settings]")
        verb_parser = verbs.add_parser(
            name, help=verb.summary, usage=usage, description=f"{verb.summary[0].upper()}{verb.summary[1:]}."
        )
        if name != asked:
            continue
        if name == "sample":
            verb_parser.add_argument(
                "model", nargs="?", default=argparse.SUPPRESS, metavar="MODEL", help="same as --model"
            )
        if name == "demo":
            verb_parser.add_argument(
                "--compare",
                action="store_true",
                default=argparse.SUPPRESS,
                help="compare methods on a language whose best frontier is known",
            )
        if name == "judge":
            sides = verb_parser.add_argument(
                "sides", nargs="+", default=argparse.SUPPRESS, metavar="SIDE", help="same as --sides"
            )
            sides.required = False  # they may stand in the configuration file
        if verb.config is not None:
            _add_settings(verb_parser, verb)
        else:
            verb_parser.add_argument(
                "runs", metavar="RUN", nargs="+", help="run folder; the folder of a comparison stands for its runs"
            )
            verb_parser.add_argument(
                "-o",
                "--output",
                metavar="FILE",
                help="where to write it [default: report.html in the folder, or here where several are named]",
            )
            verb_parser.add_argument(
                "--figures", metavar="FOLDER", help="also write its figures as SVG and PNG, its tables as CSV and LaTeX"
            )
    return parser


def _add_settings(parser: argparse.ArgumentParser, verb: Verb) -> None:
    """A flag for every field, in one group a topic."""
    from pairtune.config import fields_by_topic, flat_values, load_config

    parser.add_argument(
        "--config", metavar="FILE", default=verb.default, help="YAML file of settings; flags win over it"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resolved settings as YAML and exit")
    cls = _config_class(verb)
    defaults = flat_values(load_config(cls, verb.default)) if verb.default else {}
    for topic, fields in fields_by_topic(cls).items():
        group = parser.add_argument_group(topic)
        for key, field in fields.items():
            required = field.is_required() and key not in defaults
            default = "required" if required else f"default: {_shown(defaults.get(key, field.default))}"
            text = f"{' '.join((field.description or '').split())} [{default}]"
            shape = _shape(field)
            if len(shape["metavar"]) > LONGEST_METAVAR:  # argparse never breaks one over two lines
                text += f" One of: {shape['metavar'].replace('|', ', ')}."
                shape["metavar"] = "NAME"
            text = text.replace("%", "%%")
            group.add_argument(f"--{key}", dest=key, default=argparse.SUPPRESS, help=text, **shape)


def _shape(field: FieldInfo) -> dict[str, Any]:
    """argparse's settings for a field's type. Values stay text here; the models read them."""
    from pairtune.config import kinds_of

    kinds = kinds_of(field.annotation)
    if bool in kinds:
        return {"nargs": "?", "const": "true", "metavar": "true|false"}
    lists = [kind for kind in kinds if get_origin(kind) is list]
    kind = kinds_of(get_args(lists[0])[0])[0] if lists else kinds[0]
    if get_origin(kind) is dict:
        return {"nargs": "*", "metavar": "YAML"} if lists else {"metavar": "YAML"}
    metavar = "|".join(get_args(kind)) or {int: "N", float: "X"}.get(kind, "TEXT")
    return {"nargs": "*", "metavar": metavar} if lists else {"metavar": metavar}


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return " ".join(map(str, default)) or "none"
    return default if isinstance(default, str) else json.dumps(default)


def _unknown_argument(argument: str, verb: str) -> str:
    """What to say of a word that no flag has taken."""
    if not argument.startswith("-"):
        return f'"{argument}" is not expected here; every setting is a flag, such as `--seed 1`.'
    flag = argument.partition("=")[0]
    if verb not in VERBS or VERBS[verb].config is None:
        program = f"pairtune {verb}" if verb in VERBS else "pairtune"
        return f"{flag} is not a flag of `{program}`; `{program} --help` shows what is expected."
    if near := difflib.get_close_matches(flag.replace("_", "-"), ["--config", "--print-config"], n=1, cutoff=0.8):
        return f"{flag} is not a known setting; the nearest is {near[0]}."
    from pairtune.config import unknown_key

    return unknown_key(_config_class(VERBS[verb]), flag.lstrip("-").replace("-", "_"), flag)
