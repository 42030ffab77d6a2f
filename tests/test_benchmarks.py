"""benchmarks/step_cost.py: what it counts, compares and writes down. TRL itself is not needed here."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "step_cost.py"
RATES = {"1152x576x1536": 60e9, "2048x2048x2048": 80e9, "672x576x49152": 50e9, "24x576x1536": 20e9}


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_cost", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_cost"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def a_session(
    variant: str = "float32-24",
    dtype: str = "float32",
    pairtune: tuple[float, ...] = (1.0, 2.0, 4.0),
    trl: tuple[float, ...] = (6.0, 6.0, 16.0),
) -> dict[str, Any]:
    """A session with figures made up: 20 GFLOP a step, 3 and 8 GiB."""

    def side(seconds: tuple[float, ...], gib: int) -> dict[str, Any]:
        return {
            "loaded_bytes": 2**30,
            "peak_bytes": gib * 2**30,
            "warmup_seconds": [99.0],
            "seconds": list(seconds),
            "phases": [{"sample": value / 2, "policy": value / 4, "other": value / 4} for value in seconds],
        }

    part = {"body": 6 * 10**9, "attention": 10**9, "head": 3 * 10**9}
    return {
        "variant": variant,
        "pairtune_dtype": dtype,
        "threads": 2,
        "flops": {"policy: forward": part, "reference: forward": part},
        "prompt_lengths": [40] * 12,
        "completion_tokens": 672,
        "matmul_rates": {name: [rate, rate * 1.5, rate / 2] for name, rate in RATES.items()},
        "pairtune": side(pairtune, 3),
        "trl": side(trl, 8),
    }


def a_record(*sessions: dict[str, Any]) -> dict[str, Any]:
    return {
        "benchmark": "step_cost",
        "command": "python benchmarks/step_cost.py --steps 3",
        "date": "2026-11-21",
        "commit": "0123456789ab with changes",
        "machine": {"cpu": "Some CPU (R) 9000 @ 2.5GHz", "cores": 2, "memory_gib": 8.0},
        "versions": {"python": "3.11.7", "trl": "1.16.0"},
        "seed": 0,
        "warmup": 1,
        "steps": 3,
        "sessions": list(sessions),
    }


# The work that a step must do


@pytest.mark.parametrize("opening", [0, 1])
def test_flops_are_those_of_every_token_one_by_one(bench, opening):
    """Against a walk over all tokens and all keys that each of them sees."""
    shape = bench.Shape(body_weights=1000, head_weights=700, num_layers=3, attention_width=16)
    lengths, num_generations, completion_length = [5, 2, 9], 2, 4
    flops = bench.count_flops(shape, lengths, num_generations, completion_length, opening=opening)

    def token(num_seen: int) -> tuple[int, int]:
        scores, mixture = (2 * shape.num_layers * shape.attention_width * num_seen for _ in range(2))
        return 2 * shape.body_weights, scores + mixture

    expected = {part: {"body": 0, "attention": 0, "head": 0} for part in ("prompts", "decoding")}
    for place, length in enumerate(lengths):
        for position in range(0 if place == 0 else opening, length):  # the first prompt's opening is that of all
            body, attention = token(position + 1)
            expected["prompts"]["body"] += body
            expected["prompts"]["attention"] += attention
        expected["prompts"]["head"] += 2 * shape.head_weights  # its last token predicts the first of each completion
        for _ in range(num_generations):
            for drawn in range(1, completion_length):  # the last one drawn is not fed back
                body, attention = token(length + drawn)
                expected["decoding"]["body"] += body
                expected["decoding"]["attention"] += attention
                expected["decoding"]["head"] += 2 * shape.head_weights
    assert flops["sampling: prompts, once"] == expected["prompts"]
    assert flops["sampling: decoding"] == expected["decoding"]
    once = sum(sum(kinds.values()) for kinds in expected.values())
    assert sum(flops["reference: forward"].values()) == sum(flops["policy: forward"].values()) == once
    assert sum(flops["policy: backward"].values()) == 2 * once
    assert bench.total_flops(flops) == 5 * once


def test_shape_is_read_off_the_model(bench, tiny_llama_untied):
    config = tiny_llama_untied.config
    hidden, inner, keys = config.hidden_size, config.intermediate_size, config.hidden_size // 2  # half as many heads
    layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner
    shape = bench.Shape.of(tiny_llama_untied)
    assert shape == bench.Shape(2 * layer, config.vocab_size * hidden, 2, hidden)


# The command


@pytest.mark.parametrize("name", ["float32-24", "autocast-8", "bfloat16-24-ckpt"])
def test_variants_have_names(bench, name):
    assert str(bench.Variant.parse(name)) == name


def test_pairtune_runs_in_the_precision_that_it_is_compared_with(bench):
    dtypes = {name: bench.Variant.parse(f"{name}-8").dtype for name in ("float32", "autocast", "bfloat16")}
    assert dtypes == {"float32": "float32", "autocast": "bfloat16", "bfloat16": "bfloat16"}


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--variants", "float16-24"], "'float16-24' is no variant: join one of float32, autocast, bfloat16"),
        (["--variants", "float32-12"], "'float32-12' is no variant"),
        (["--steps", "0"], "'0' is no number from 1 on"),
        (["--warmup", "-1"], "'-1' is no number from 0 on"),
        (["--warmup", "few"], "'few' is no number from 0 on"),
        (["--micro-batch-size", "0"], "'0' is no number from 1 on"),
        (["--sides", "3"], "unrecognized arguments: --sides 3"),
    ],
)
def test_bad_arguments_are_refused(bench, capsys, argv, words):
    with pytest.raises(SystemExit) as ended:
        bench.main(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_without_trl_it_says_how_to_get_it(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.main([])
    assert "TRL is not installed here; `make bench` makes an environment that has it" in capsys.readouterr().err


def test_another_trl_is_refused(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: "1.15.0")
    with pytest.raises(SystemExit):
        bench.main([])
    assert "TRL 1.15.0 is installed here, not 1.16.0" in capsys.readouterr().err


def test_an_unknown_model_is_refused_before_anything_is_loaded(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(bench.importlib.metadata, "version", lambda name: bench.TRL_VERSION)
    monkeypatch.setattr(bench, "Worker", None)
    with pytest.raises(SystemExit):
        bench.main(["--model", "smollm2-135m-instruct-q5"])
    assert "did you mean 'smollm2-135m-instruct-q4'?" in capsys.readouterr().err


def test_a_worker_is_told_everything(bench):
    args = bench.parser().parse_args(["--threads", "3", "--micro-batch-size", "4", "--warmup", "1", "--steps", "2"])
    variant = bench.Variant.parse("autocast-8-ckpt")
    _, _, *argv = bench.worker_command("trl", variant, "a/model", args)
    told = bench.parser().parse_args(argv)
    assert (told.worker, told.variants, told.model) == ("trl", [variant], "a/model")
    assert (told.threads, told.micro_batch_size, told.warmup, told.steps) == (3, 4, 1, 2)


# Workers


def test_a_worker_answers_line_by_line(bench):
    script = "import sys, json\nfor line in sys.stdin: print(json.dumps({'heard': line.strip()}), flush=True)"
    worker = bench.Worker("pairtune", [sys.executable, "-c", script])
    try:
        assert [worker.ask(command) for command in ("step", "matmul")] == [{"heard": "step"}, {"heard": "matmul"}]
    finally:
        worker.close()


def test_the_last_words_of_a_dead_worker_are_shown(bench):
    worker = bench.Worker("trl", [sys.executable, "-c", "raise SystemExit('no room for the model')"])
    try:
        with pytest.raises(SystemExit, match=r"no room for the model\n+The process of trl ended before it was told to"):
            worker.ask("step")
    finally:
        worker.close()


@pytest.mark.parametrize(
    "theirs, words",
    [
        ({"prompt_lengths": [3] * 11 + [4]}, "did not do the same work: prompt_lengths"),
        ({"completion_lengths": [28] * 23 + [7]}, "did not do the same work: completion_lengths"),
    ],
)
def test_unequal_work_is_not_compared(bench, theirs, words):
    ours = {"prompt_lengths": [3] * 12, "completion_lengths": [28] * 24}
    bench._check_equal_work(ours, dict(ours))
    with pytest.raises(SystemExit, match=words):
        bench._check_equal_work(ours, {**ours, **theirs})


def test_completions_that_ended_early_on_both_sides_are_not_compared(bench):
    short = {"prompt_lengths": [3] * 12, "completion_lengths": [28] * 23 + [7]}
    with pytest.raises(SystemExit, match="Completions should have 28 tokens"):
        bench._check_equal_work(short, dict(short))


def test_a_step_of_pairtune_is_timed_by_phase(bench, monkeypatch, tmp_path, tiny_llama, tiny_tokenizer):
    """The real parts of the loop on a tiny model whose vocabulary is so small that EOS would surely be drawn."""
    from pairtune.stages import rl

    monkeypatch.setattr(rl, "_apply_gradients", rl._apply_gradients)  # given back afterwards
    # VADER finds no words in what a random model says, and equal rewards would move nothing.
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def variety(completions, **kwargs):\n    return [float(len(set(text))) for text in completions]\n"
    )
    monkeypatch.setattr(bench, "REWARD", f"{reward}:variety")
    tiny_llama.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    step = bench.PairtuneStep(bench.pairtune_config(str(tmp_path), "float32", micro_batch_size=6))
    before = [parameter.clone() for parameter in step.policy.model.parameters()]
    first, second = step(), step()
    for done in (first, second):
        assert done["completion_lengths"] == [28] * 24
        assert done["prompt_lengths"] == [len(ids) for ids in step.prompts.token_ids[:12]]
        assert set(done["phases"]) <= set(bench.PHASES)
        assert {"sample", "score", "ref_logprobs", "policy", "optimizer"} <= set(done["phases"])
        assert sum(done["phases"].values()) == pytest.approx(done["seconds"])
        assert min(done["phases"].values()) >= 0
        assert done["peak_bytes"] > 2**20
    assert step.progress.num_updates == 2
    assert all(not torch.equal(old, new) for old, new in zip(before, step.policy.model.parameters(), strict=True))


class FakeTimer:
    """Notes which phase was open when something was called."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[tuple[str, list[str]]] = []

    def __call__(self, phase: str) -> FakeTimer:
        self.open.append(phase)
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self.open.pop()

    def note(self, what: str) -> None:
        self.seen.append((what, list(self.open)))


def test_the_passes_of_trl_are_told_apart(bench):
    timer = FakeTimer()
    trainer = SimpleNamespace(
        ref_model=object(),
        model=object(),
        accelerator=SimpleNamespace(
            backward=lambda loss: timer.note("backward"), clip_grad_norm_=lambda *a: timer.note("clip")
        ),
        _generate_single_turn=lambda *a: timer.note("generate"),
        _calculate_rewards=lambda *a: timer.note("reward"),
        _get_per_token_logps_and_entropies=lambda model: timer.note("pass"),
    )
    trainer.compute_loss = lambda: trainer._get_per_token_logps_and_entropies(trainer.model)
    bench.time_trl(trainer, timer)
    with torch.no_grad():
        trainer._generate_single_turn()
        trainer._get_per_token_logps_and_entropies(trainer.model)
        trainer._get_per_token_logps_and_entropies(trainer.ref_model)
    trainer._calculate_rewards()
    trainer.compute_loss()
    trainer.accelerator.backward(None)
    trainer.accelerator.clip_grad_norm_()
    assert timer.seen == [
        ("generate", ["sample"]),
        ("pass", ["old_logprobs"]),
        ("pass", ["ref_logprobs"]),
        ("reward", ["score"]),
        ("pass", ["policy"]),
        ("backward", ["policy"]),
        ("clip", ["optimizer"]),
    ]
    assert {phase for _, (phase,) in timer.seen} <= set(bench.PHASES)


def test_the_tokens_of_trl_are_counted_once_a_prompt(bench):
    trainer = SimpleNamespace(_generate=lambda prompts: ([[1] * 4, [1] * 4, [1] * 6, [1] * 6], [[2] * 28] * 4, None))
    lengths = bench.Lengths()
    lengths.record(trainer)
    assert len(trainer._generate(["a", "a", "b", "b"])) == 3
    assert (lengths.prompts, lengths.completions) == ([4, 6], [28] * 4)


def test_matmul_rates_cover_what_is_reported(bench, monkeypatch):
    from pairtune.models import loading

    sizes = []
    monkeypatch.setattr(loading, "_matmul_rate", lambda dtype, size: sizes.append((dtype, size)) or 1e9)
    assert bench.matmul_rates("bfloat16") == dict.fromkeys(bench.MATMULS, 1e9)
    assert (torch.bfloat16, (1152, 576, 1536)) in sizes


# The result


def test_summary(bench):
    summary = bench.summarise(a_session())
    assert summary.seconds["pairtune"] == bench.Spread(2, 1, 4)
    assert summary.samples["pairtune"] == bench.Spread(12, 6, 24)
    assert summary.samples["trl"] == bench.Spread(4, 1.5, 4)
    assert summary.speedup == bench.Spread(4, 3, 6)  # of 6/1, 6/2, 16/4, not of the medians' 6/2
    assert summary.memory_ratio == 3 / 8
    assert summary.phases["trl"]["sample"] == 3
    assert summary.phases["trl"]["old_logprobs"] == 0
    assert summary.share["pairtune"] == pytest.approx(20 / 2 / 80)  # GFLOP by seconds by GFLOP/s of the fastest
    assert summary.share["trl"] == pytest.approx(20 / 6 / 80)


def test_the_best_of_trl_is_the_fastest_of_each_precision(bench):
    sessions = [
        a_session("float32-24", trl=(9.0,) * 3),
        a_session("float32-8", trl=(7.0,) * 3),
        a_session("autocast-24", "bfloat16", trl=(5.0,) * 3),
    ]
    best = bench.best_of_trl([bench.summarise(session) for session in sessions])
    assert {dtype: summary.variant for dtype, summary in best.items()} == {
        "float32": "float32-8",
        "bfloat16": "autocast-24",
    }
    steps, *others = bench.tables(sessions)
    assert [row[0] for row in steps.rows] == [
        "pairtune float32",
        "TRL float32-24",
        "pairtune float32",
        "TRL float32-8 (its best)",
        "pairtune bfloat16",
        "TRL autocast-24",
    ]
    assert [table.title for table in others if "Where the time goes" in table.title] == [
        "Where the time goes: pairtune bfloat16 and TRL autocast-24, median seconds",
        "Where the time goes: pairtune float32 and TRL float32-8, median seconds",
    ]


def test_tables_say_what_was_measured(bench):
    steps, phases, matmuls, flops = bench.tables([a_session()])
    assert dict(zip(steps.header, steps.rows[0], strict=True)) == {
        "session": "pairtune float32",
        "seconds a step": "2.00 (1.00-4.00)",
        "samples a second": "12.00 (6.00-24.00)",
        "times as fast": "4.00 (3.00-6.00)",
        "peak GiB": "3.00",
        "of TRL's": "38%",
        "of matmul rate": "12%",
    }
    assert phases.rows[0] == ["sampling", "1.00", "3.00"]
    assert matmuls.rows[1][:2] == ["2048x2048x2048", "80 (40-120)"]
    assert flops.rows[-1] == ["all", "12.0", "2.0", "6.0", "20.0"]


def test_the_tables_reach_the_terminal(bench, capsys):
    bench.show(a_record(a_session()))
    shown = capsys.readouterr().out
    assert "4.00 (3.00-6.00)" in shown
    assert "reference log-probabilities" in shown


def test_markdown_has_what_is_needed_to_get_the_figures_again(bench):
    text = bench.to_markdown(a_record(a_session()))
    for words in (
        "`python benchmarks/step_cost.py --steps 3`",
        "0123456789ab with changes",
        "Some CPU (R) 9000 @ 2.5GHz, 2 cores, 8.0 GiB, threads of each side: 2",
        "trl 1.16.0",
        "seed 0; 1 warm-up steps",
        "the same 12 prompts (480 tokens), 672 tokens drawn",
        "| pairtune float32 | 2.00 (1.00-4.00) | 12.00 (6.00-24.00) | 4.00 (3.00-6.00) | 3.00 | 38% | 12% |",
    ):
        assert words in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_results_are_written_beside_older_ones(bench, tmp_path):
    record = a_record(a_session())
    first, second = bench.write(record, tmp_path / "new"), bench.write(record, tmp_path / "new")
    assert first.name == "step_cost-2026-11-21-some-cpu-r-9000-2-5ghz.md"
    assert second.name == "step_cost-2026-11-21-some-cpu-r-9000-2-5ghz-2.md"
    for path in (first, second):
        assert json.loads(path.with_suffix(".json").read_text()) == record
        assert path.read_text() == bench.to_markdown(record)


def test_provenance_names_no_path_of_the_machine(bench, tmp_path):
    model = tmp_path / "my-model"
    model.mkdir()
    argv = ["--model", str(model), "--output", str(tmp_path), "--steps", "3"]
    known = bench.provenance(argv, bench.parser().parse_args(argv))
    assert known["command"] == "python benchmarks/step_cost.py --model my-model --output ... --steps 3"
    assert str(tmp_path) not in json.dumps(known)
    assert re.fullmatch(r"[0-9a-f]{12}( with changes)?|unknown", known["commit"])
    assert known["versions"]["torch"] == torch.__version__
    assert (known["seed"], known["warmup"], known["steps"]) == (0, 5, 3)


def test_a_count_is_a_whole_number(bench):
    assert bench._count(0)("0") == 0
    with pytest.raises(argparse.ArgumentTypeError, match="no number from 1 on"):
        bench._count(1)("1.5")
