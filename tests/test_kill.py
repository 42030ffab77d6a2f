"""kill -9 at any moment, then --resume: weights and log lines of the run that nobody killed, to the last bit."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import build_tiny_model
from forked import Call, Forked
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pairtune import TrainConfig, train
from pairtune.models import sampler
from pairtune.runs import checkpoint, folder, metrics
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages import rl

pytestmark = pytest.mark.slow

PROMPTS = [{"prompt": f"{word} {number}"} for number in range(4) for word in ("Go on", "Say it again", "So")]
HELD_OUT = [{"prompt": "Tell me"}, {"prompt": "?"}]
NUM_RANDOM = 20


def small_letters(completions: list[str], **_: Any) -> list[float]:
    return [sum(map(str.islower, text)) / 8 for text in completions]


# ------------------------------------------------------------------------------------------- in the process that dies


def work(model: str, output_dir: str, resume: bool = False, kill: str = "") -> None:
    """A run of a few quick steps; `kill` names the moment at which the process shoots itself."""
    if kill:
        MOMENTS[kill]()
    train(
        TrainConfig(
            model=model,
            dataset="passed in",
            chat="never",
            dtype="float32",
            device="cpu",
            num_threads=1,
            num_iterations=2,
            batch_size=4,
            minibatch_size=2,
            max_completion_length=6,
            max_steps=6,
            eval_steps=3,
            save_steps=2,
            keep_last=1,
            learning_rate=1e-2,
            scale_rewards="running",
            output_dir=output_dir,
            resume=resume,
        ),
        reward_funcs=[small_letters],
        train_dataset=PROMPTS,
        eval_dataset=HELD_OUT,
    )


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(
    owner: Any,
    name: str,
    call: int = 1,
    act: Callable[..., Any] = die,
    when: Callable[..., bool] = lambda *_, **__: True,
) -> Callable[[], None]:
    """A moment: when `owner.name` is called for the so-many-th time (of those that `when` picks), `act` comes first."""

    def arm() -> None:
        original, calls = getattr(owner, name), []

        def armed(*args: Any, **words: Any) -> Any:
            calls.extend([1] if when(*args, **words) else [])
            if len(calls) == call:
                act(*args, **words)
            return original(*args, **words)

        setattr(owner, name, armed)

    return arm


def half_a_model(model: Any, path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"half")
    die()


def half_a_file(tensors: Any, path: Path) -> None:
    path.write_bytes(b"half")
    die()


def half_a_line(log: Any, name: str, entries: list[dict[str, Any]]) -> None:
    with open(log._run_dir / name, "ab") as file:
        file.write(b'{"step": 4, "rewa')
    die()


def first_file_only(path: Path, **_: Any) -> None:
    next(p for p in sorted(path.iterdir()) if p.is_file()).unlink()
    die()


# A step takes 6 tokens of sampling, an evaluation as many (the last one in the prompt's pass); checkpoints come after
# steps 2, 4 and 6, evaluations before step 1 and after steps 3 and 6.
MOMENTS: dict[str, Callable[[], None]] = {
    "before anything is written": before(folder, "create"),
    "before environment.json": before(folder, "write_environment"),
    "in the first evaluation": before(sampler.HFSampler, "_next_logits", 3),
    "in the first step's sampling": before(sampler.HFSampler, "_next_logits", 9),
    "in a later step's sampling": before(sampler.HFSampler, "_next_logits", 29),
    "while rewards are scored": before(rl.RewardSet, "score", 6),
    "between two updates of a step": before(rl, "_apply_gradients", 3 * 4 + 2),
    "in the middle of a log line": before(metrics.RunLog, "_append", 11, half_a_line),
    "between a log line and the samples": before(metrics.RunLog, "log_samples", 5),
    "between the log lines and the first checkpoint": before(checkpoint, "save"),
    "between the log lines and a later checkpoint": before(checkpoint, "save", 2),
    "between the last evaluation and the last checkpoint": before(checkpoint, "save", 3),
    "with half of a model written": before(PreTrainedModel, "save_pretrained", 2, half_a_model),
    "between a model and the trainer's state": before(checkpoint, "save_file", 2),
    "with half of the trainer's state written": before(checkpoint, "save_file", 2, half_a_file),
    "before a checkpoint gets its name": before(os, "replace", when=lambda _, path: Path(path).name == "step-4"),
    "after it got its name": before(
        checkpoint, "all_checkpoints", when=lambda run: (run / "checkpoints/step-4").exists()
    ),
    "while an old checkpoint is removed": before(checkpoint.shutil, "rmtree", 1, first_file_only),
    "before the lines past the checkpoint are cut": before(metrics, "cut", 1),
    "after some logs are cut": before(metrics, "cut", 3),
}
ON_RESUMING = ("before the lines past the checkpoint are cut", "after some logs are cut")
"""Moments that matter when a killed run goes on: these shoot the second process too."""


# -------------------------------------------------------------------------------------------- in the process that looks


class Killed:
    """Runs in a folder: one that nobody kills, and others to compare with it."""

    def __init__(self, forked: Forked, path: Path) -> None:
        self.forked, self.path, self.model = forked, path, str(path / "model")
        self.seconds = 0.0

    def call(self, run: Path, **words: Any) -> Call:
        arguments = {"model": self.model, "output_dir": str(run), **words}
        return Call("test_kill:work", arguments, str(self.path / f"{run.name}.log"))

    def killed(self, run: Path, after: float | None = None, **words: Any) -> bool:
        """Whether a process was killed: by itself, or from here after so many seconds of processor time."""
        (pid,) = self.forked.start(self.call(run, **words))
        while after is not None and (spent := cpu_seconds(pid)) is not None:
            if spent >= after:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.002)
        (code,) = self.forked.wait()
        assert code in (0, -signal.SIGKILL), (self.path / f"{run.name}.log").read_text()
        return code != 0

    def finish(self, run: Path) -> None:
        self.forked.run(self.call(run, resume=True))

    def assert_equal(self, run: Path) -> None:
        whole = self.path / "whole"
        for name in ("metrics", "evaluations", "samples"):
            lines, expected = ([without_times(x) for x in read_jsonl(r / f"{name}.jsonl")] for r in (run, whole))
            assert lines == expected, name
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-6"]  # and no half of another
        for name in ("model.safetensors", "trainer.safetensors"):
            one, other = (r / "checkpoints" / "step-6" / name for r in (run, whole))
            assert one.read_bytes() == other.read_bytes(), name
        assert not [p for p in run.rglob("*") if p.name.startswith((".tmp-", ".old-"))]


def cpu_seconds(pid: int) -> float | None:
    """The processor time a process has had, None once it has ended. Wall time would say little on a busy machine."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, _tokenizer_folder: str) -> Iterator[Killed]:
    path = tmp_path_factory.mktemp("killed")
    build_tiny_model("llama").save_pretrained(path / "model")
    PreTrainedTokenizerFast.from_pretrained(_tokenizer_folder).save_pretrained(path / "model")
    forked = Forked()
    runs = Killed(forked, path)
    (pid,) = forked.start(runs.call(path / "whole"))
    while (spent := cpu_seconds(pid)) is not None:
        runs.seconds = max(runs.seconds, spent)
        time.sleep(0.002)
    assert forked.wait() == [0], (path / "whole.log").read_text()
    yield runs
    forked.close()


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_a_chosen_moment(runs: Killed, moment: str) -> None:
    run = runs.path / f"moment-{list(MOMENTS).index(moment)}"
    if moment in ON_RESUMING:
        assert runs.killed(run, kill="between the log lines and a later checkpoint")
        assert runs.killed(run, kill=moment, resume=True)
    else:
        assert runs.killed(run, kill=moment)
    runs.finish(run)
    runs.assert_equal(run)
    shutil.rmtree(run)


@pytest.mark.parametrize("number", range(NUM_RANDOM))
def test_killed_at_a_random_moment(runs: Killed, number: int) -> None:
    """One moment in each of equal parts of a run's processor time, so that together they cover it; every fourth run is
    killed again when it goes on."""
    generator = random.Random(number)
    run = runs.path / f"random-{number}"
    killed = runs.killed(run, after=(number + generator.random()) / NUM_RANDOM * runs.seconds)
    assert killed or number > NUM_RANDOM / 2  # near its end a run may be done before the shot
    if number % 4 == 0:
        runs.killed(run, after=generator.random() * runs.seconds, resume=True)
    runs.finish(run)
    runs.assert_equal(run)
    shutil.rmtree(run)


def test_the_comparison_sees_another_run(runs: Killed) -> None:
    """Else the tests above could not fail."""
    other = runs.path / "other"
    shutil.copytree(runs.path / "whole", other)
    runs.assert_equal(other)
    weights = other / "checkpoints" / "step-6" / "trainer.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(AssertionError, match=r"trainer\.safetensors"):
        runs.assert_equal(other)
