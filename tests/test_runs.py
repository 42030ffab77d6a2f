"""The run folder, checkpoints, log lines, timer and process group."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from socket import socket
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from pairtune.errors import PairtuneError
from pairtune.runs import checkpoint, distributed, folder, metrics

CONFIG: dict[str, Any] = {
    "model": "tiny",
    "learning_rate": 1e-6,
    "max_steps": 10,
    "keep_last": 2,
    "lr_scheduler_type": "constant",
    "p3o": {"clip": "joint"},
}


def config(**changes: Any) -> str:
    return yaml.safe_dump(CONFIG | changes, sort_keys=False)


def in_a_fork(work: Callable[[], None]) -> int:
    """Runs `work` in a copy of this process; returns its id."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    return process


def run_python(code: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    source = str(Path(folder.__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"} | (env or {})
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


# The folder


def test_a_new_folder_holds_its_configuration_and_opens_again_only_on_request(tmp_path: Path) -> None:
    with folder.create(tmp_path / "a" / "run", config()) as run:
        assert yaml.safe_load((run.path / "config.yaml").read_text()) == CONFIG
        assert not run.resumed
    with pytest.raises(PairtuneError, match=r"holds a run; --resume goes on with it, --overwrite replaces it"):
        folder.create(run.path, config())
    with folder.create(run.path, config(), resume=True) as again:
        assert again.resumed
    with pytest.raises(PairtuneError, match="both set"):
        folder.create(run.path, config(), resume=True, overwrite=True)


def test_resume_without_an_earlier_run_begins_at_the_beginning(tmp_path: Path) -> None:
    with folder.create(tmp_path / "run", config(), resume=True) as run:
        assert not run.resumed
    (run.path / "config.yaml").unlink()  # killed between the lock and the configuration
    with folder.create(run.path, config(), resume=True) as run:
        assert not run.resumed
        assert (run.path / "config.yaml").exists()


def test_resume_refuses_checkpoints_without_a_configuration(tmp_path: Path) -> None:
    with folder.create(tmp_path, config()):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.yaml").unlink()
    with pytest.raises(PairtuneError, match=r"no config\.yaml"):
        folder.create(tmp_path, config(), resume=True)


@pytest.mark.parametrize("flags", [{}, {"resume": True}, {"overwrite": True}])
def test_a_folder_of_somebody_else_stays_untouched(tmp_path: Path, flags: dict[str, bool]) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1")  # the name of one of our files makes it not ours
    with pytest.raises(PairtuneError, match="holds files but no run of pairtune"):
        folder.create(tmp_path, config(), **flags)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_a_file_or_a_place_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PairtuneError, match="is a file"):
        folder.create(tmp_path / "file", config())
    with pytest.raises(PairtuneError, match=r"could not be made \(Not a directory\)"):
        folder.create(tmp_path / "file" / "below", config())


def test_overwrite_removes_what_pairtune_wrote_and_nothing_else(tmp_path: Path) -> None:
    with folder.create(tmp_path, config()):
        for name in ["metrics.jsonl", "samples.jsonl", "report.html", "notes.txt", "checkpoints/mine.txt"]:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("old")
        (tmp_path / "checkpoints" / "step-3").mkdir()
        (tmp_path / "tensorboard").mkdir()
    with folder.create(tmp_path, config(learning_rate=1.0), overwrite=True) as run:
        assert not run.resumed
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {folder.LOCK, "config.yaml", "notes.txt", "checkpoints", "checkpoints/mine.txt"}
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["learning_rate"] == 1.0


def test_resume_names_the_first_difference_that_changes_the_result(tmp_path: Path) -> None:
    with folder.create(tmp_path, config()):
        pass
    with pytest.raises(PairtuneError, match=r"learning_rate was 1e-06 in .* and is 0\.1 now"):
        folder.create(tmp_path, config(learning_rate=0.1, p3o={"clip": "none"}), resume=True)
    with pytest.raises(PairtuneError, match=r'p3o\.clip was "joint".*is "none" now'):
        folder.create(tmp_path, config(p3o={"clip": "none"}), resume=True)
    with pytest.raises(PairtuneError, match="seed was null"):
        folder.create(tmp_path, config(seed=1), resume=True)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == CONFIG  # a refusal changes nothing
    with folder.create(tmp_path, config(max_steps=20, keep_last=5, report_to=["wandb"]), resume=True):
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["max_steps"] == 20


def test_max_steps_may_not_change_under_a_schedule_stretched_over_it(tmp_path: Path) -> None:
    with folder.create(tmp_path, config(lr_scheduler_type="cosine")):
        pass
    with pytest.raises(PairtuneError, match="max_steps was 10"):
        folder.create(tmp_path, config(lr_scheduler_type="cosine", max_steps=20), resume=True)


def test_a_damaged_configuration_is_named(tmp_path: Path) -> None:
    with folder.create(tmp_path, config()):
        pass
    for text in ("a: [", "- 1"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(PairtuneError, match=r"config\.yaml .*restore it"):
            folder.create(tmp_path, config(), resume=True)


def test_two_processes_cannot_write_one_folder_and_death_frees_it(tmp_path: Path) -> None:
    made, making = os.pipe()

    def hold() -> None:
        run = folder.create(tmp_path / "run", config())
        os.write(making, str(run.path).encode())
        time.sleep(60)

    other = in_a_fork(hold)
    assert os.read(made, 1000).decode() == str(tmp_path / "run")
    for flags in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(PairtuneError, match=rf"another process \(pid {other}\) is writing"):
            folder.create(tmp_path / "run", config(), **flags)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    folder.create(tmp_path / "run", config(), resume=True).close()


def test_write_atomic_keeps_the_old_content_when_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    folder.write_atomic(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(PairtuneError, match=r"could not be written \(No space left on device\)"):
        folder.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_environment_names_versions_and_no_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/bin/pairtune", "train", "--model", str(Path.home() / "a model")])
    monkeypatch.setenv("SECRET_TOKEN", "tok-12345")
    folder.write_environment(tmp_path, device="cpu")
    folder.write_environment(tmp_path, device="cuda")
    text = (tmp_path / "environment.json").read_text()
    stored = json.loads(text)
    assert stored["torch"] == torch.__version__
    assert stored["threads"] == torch.get_num_threads()
    assert stored["command"] == "pairtune train --model '~/a model'"
    assert stored["device"] == "cpu"
    assert [again["device"] for again in stored["resumed"]] == ["cuda"]
    assert "tok-12345" not in text
    assert str(Path.home()) not in text
    assert os.uname().nodename not in text


def test_the_arguments_of_a_users_own_script_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/x/pairtune/mine.py", "--key", "secret"])
    assert folder.environment()["command"] == "python mine.py"


# Checkpoints


def nothing(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weights")


def save(run: Path, step: int, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"save_model": nothing, "tensors": {"x": torch.full((3,), float(step))}, "state": {}}
    return checkpoint.save(run, step, **(arguments | {"keep_last": 2} | changes))


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "base": base,
        "same": base,
        "view": base[1:3],
        "strided": base.t(),
        "half": torch.randn(3).bfloat16(),
        "random": torch.get_rng_state(),
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 2),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    state = {"step": 7, "seconds": 0.1 + 0.2, "best": None, "names": ["a", "ü"]}
    path = checkpoint.save(tmp_path, 7, save_model=nothing, tensors=tensors, state=state, keep_last=1)
    loaded, loaded_state = checkpoint.load(path)
    assert path == checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-7"
    assert loaded_state == state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


def test_only_tensors_that_must_be_are_copied() -> None:
    flat = torch.arange(12.0)
    ready = checkpoint._separate({"a": flat[:6], "b": flat[6:], "c": flat[3:9]})
    copied = {name for name, tensor in ready.items() if tensor.untyped_storage().data_ptr() != flat.data_ptr()}
    assert copied == {"c"}


def test_the_newest_are_kept_and_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == {"step-10", "step-100"}
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoints" / "step-100"
    with pytest.raises(PairtuneError, match="keep_last is 0"):
        save(tmp_path, 101, keep_last=0)


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 5, tensors={"x": torch.tensor([7.0])})
    assert checkpoint.load(path)[0]["x"].item() == 7
    assert names(tmp_path) == {"step-5"}


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "checkpoints" / "step-4").mkdir(parents=True)  # no state in it: not complete
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(PairtuneError, match="there is no checkpoint"):
        checkpoint.load(tmp_path / "checkpoints" / "step-9")


def test_an_exception_while_saving_leaves_the_former_one(tmp_path: Path) -> None:
    save(tmp_path, 1)

    def breaks(path: Path) -> None:
        nothing(path)
        raise RuntimeError("boom")

    for step in (1, 2):
        with pytest.raises(RuntimeError, match="boom"):
            save(tmp_path, step, save_model=breaks)
    assert names(tmp_path) == {"step-1"}
    assert checkpoint.load(tmp_path / "checkpoints" / "step-1")[0]["x"][0] == 1


def test_a_failed_rename_puts_the_replaced_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    replace = os.replace

    def fails(source: Path, target: Path) -> None:
        if Path(source).name == ".tmp-step-1":
            raise OSError(errno.EIO, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 1, tensors={"x": torch.tensor([7.0])})
    assert names(tmp_path) == {"step-1"}
    assert checkpoint.load(tmp_path / "checkpoints" / "step-1")[0]["x"][0] == 1


@pytest.mark.parametrize("moment", ["save_model", "first rename", "second rename", "pruning"])
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path, moment: str) -> None:
    with folder.create(tmp_path, config()):
        for step in (1, 2):
            save(tmp_path, step)
    step = 3 if moment == "pruning" else 2

    def save_and_die() -> None:
        replace = os.replace

        def die(*_: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def watched(source: Path, target: Path) -> None:
            name = Path(target).name
            if (moment, name) in (("first rename", ".old-step-2"), ("second rename", "step-2")):
                die()
            replace(source, target)
            if (moment, name) == ("pruning", ".tmp-step-1"):
                die()

        os.replace = watched  # type: ignore[assignment]
        save(tmp_path, step, save_model=die if moment == "save_model" else nothing, tensors={"x": torch.zeros(3)})

    _, status = os.waitpid(in_a_fork(save_and_die), 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    before = names(tmp_path)
    assert any(name.startswith(".") for name in before), before  # it died in the middle
    with folder.create(tmp_path, config(), resume=True):
        newest = checkpoint.latest(tmp_path)
        assert newest is not None
        assert newest.name == f"step-{step}"
        assert checkpoint.load(newest)[0]["x"].tolist() == [0.0 if moment == "pruning" else 2.0] * 3
        assert names(tmp_path) == ({"step-2", "step-3"} if moment == "pruning" else {"step-1", "step-2"})


def test_a_leftover_is_removed_by_the_next_save_and_never_taken(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints" / ".tmp-step-9"
    leftover.mkdir(parents=True)
    (leftover / "trainer.json").write_text("{}")
    assert checkpoint.latest(tmp_path) is None
    assert leftover.exists()
    save(tmp_path, 1)
    assert names(tmp_path) == {"step-1"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(PairtuneError, match=r"no checkpoint is there yet"):
        save(tmp_path, 10)
    monkeypatch.undo()
    save(tmp_path, 10)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(
        PairtuneError, match=r"disk is full: checkpoint step-20 .*step-10 is kept, and --resume goes on"
    ):
        save(tmp_path, 20)
    assert names(tmp_path) == {"step-10"}


@pytest.mark.parametrize("name", ["trainer.safetensors", "trainer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    if damage == "cut":
        (path / name).write_bytes((path / name).read_bytes()[:-2])
    else:
        (path / name).unlink()
    with pytest.raises(PairtuneError, match=rf"step-2 is damaged \({name}.*--resume goes on from step-1"):
        checkpoint.load(path)


def test_a_checkpoint_with_rubbish_inside_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, 2)
    size = (path / "trainer.safetensors").stat().st_size
    (path / "trainer.safetensors").write_bytes(b"\xff" * size)
    with pytest.raises(PairtuneError, match=r"damaged .*start the run again"):
        checkpoint.load(path)


def test_saving_a_large_tensor_takes_no_second_copy(tmp_path: Path) -> None:
    code = """
import resource, sys, torch
from pathlib import Path
from pairtune.runs import checkpoint
x = torch.ones(32 * 2**20)  # 128 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoint.save(Path(sys.argv[1]), 1, save_model=lambda path: None, tensors={"x": x}, state={}, keep_last=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kibibytes = int(run_python(code, str(tmp_path)).communicate()[0])
    assert kibibytes < 64 * 1024


# Log lines


def read(path: Path) -> list[int]:
    return [line["step"] for line in metrics.read_jsonl(path)]


def test_lines_come_in_a_fixed_order_with_whole_floats(tmp_path: Path) -> None:
    with metrics.RunLog(tmp_path) as log:
        log.log_step(1, {"time/b": 1.0, "loss": 0.1 + 0.2, "kl": torch.tensor(0.5), "num_tokens": 3, "reward": 1.0})
        log.log_step(2, {"reward": 1.0, "num_tokens": 3, "kl": 0.5, "step_time": 2.0, "loss": 0.1 + 0.2})
    text = (tmp_path / "metrics.jsonl").read_text()
    first, second = text.splitlines()
    assert first == '{"step": 1, "reward": 1.0, "kl": 0.5, "loss": 0.30000000000000004, "num_tokens": 3, "time/b": 1.0}'
    plain = [metrics.without_times(json.loads(line)) for line in (first, second)]
    assert list(plain[0]) == list(plain[1])
    assert plain[0] | {"step": 2} == plain[1]


def test_without_times_drops_times_alone() -> None:
    line = {"step": 1, "time/x": 1, "step_time": 1, "time_left": 1, "tokens_per_second": 1, "kl": 1, "timely": 1}
    assert metrics.without_times(line) == {"step": 1, "kl": 1, "timely": 1}


@pytest.mark.parametrize("bad", [math.nan, math.inf, torch.tensor(-math.inf)])
def test_nan_becomes_null_with_one_warning_a_name(tmp_path: Path, bad: Any) -> None:
    with metrics.RunLog(tmp_path) as log:
        with pytest.warns(UserWarning, match=r"^grad_norm is .*logged as null"):
            log.log_step(1, {"grad_norm": bad})
        with warnings.catch_warnings(action="error"):
            log.log_step(2, {"grad_norm": bad})
        with pytest.warns(UserWarning, match=r"^reward\.mean is"):
            log.log_evaluation({"step": 2, "reward": {"mean": bad, "low": 1.0}})
        with warnings.catch_warnings(action="error"):  # the ends of an interval over one prompt
            log.log_evaluation({"step": 3, "kl": {"mean": 1.0, "low": bad}})
    assert [line["grad_norm"] for line in metrics.read_jsonl(tmp_path / "metrics.jsonl")] == [None, None]
    evaluations = metrics.read_jsonl(tmp_path / "evaluations.jsonl")
    assert evaluations == [
        {"step": 2, "reward": {"mean": None, "low": 1.0}},
        {"step": 3, "kl": {"mean": 1.0, "low": None}},
    ]


def test_each_line_is_on_disk_at_once(tmp_path: Path) -> None:
    log = metrics.RunLog(tmp_path)
    log.log_step(1, {})
    log.log_samples([{"step": 1, "completion": "a\u2028b\nc \ud800 é"}])
    assert read(tmp_path / "metrics.jsonl") == [1]
    assert metrics.read_jsonl(tmp_path / "samples.jsonl")[0]["completion"] == "a\u2028b\nc \ud800 é"
    log.close()


def test_resume_cuts_later_and_torn_lines_from_all_files_and_keeps_the_bytes(tmp_path: Path) -> None:
    lines = ['{"step": 1,  "odd": 1e-7}', '{"step": 2}', '{"step": 3}', '{"step": 4, "rew']
    for name in folder.LOGS:
        (tmp_path / name).write_text("\n".join(lines))
    with metrics.RunLog(tmp_path, resume_step=2) as log:
        log.log_step(3, {"reward": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == f'{lines[0]}\n{lines[1]}\n{{"step": 3, "reward": 1.0}}\n'
    for name in ("evaluations.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_text() == f"{lines[0]}\n{lines[1]}\n"


@pytest.mark.parametrize("tail", ['{"step": 2', '{"step": 2, "x": "é'[:-1] + "\\u00", "\0\0\0\0", '{"ste', "2", "[]"])
def test_a_torn_last_line_is_left_out(tmp_path: Path, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + tail)
    assert read(path) == [1]
    metrics.cut(path, 5)
    assert path.read_text() == '{"step": 1}\n'


def test_a_whole_last_line_without_its_newline_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    metrics.cut(path, 5)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_line_torn_inside_a_character_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_bytes(b'{"step": 1}\n' + '{"step": 2, "x": "é'.encode()[:-1])
    assert read(path) == [1]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(PairtuneError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        metrics.read_jsonl(path)


def test_a_run_from_the_beginning_empties_the_files(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0}\n')
    metrics.RunLog(tmp_path).close()
    assert (tmp_path / "evaluations.jsonl").read_text() == ""


def test_a_full_disk_while_logging_is_one_sentence(tmp_path: Path) -> None:
    log = metrics.RunLog(tmp_path)
    log._files["metrics.jsonl"].close()
    log._files["metrics.jsonl"] = open("/dev/full", "ab")  # noqa: SIM115
    with pytest.raises(PairtuneError, match=r"metrics\.jsonl could not be written \(No space left on device\)"):
        log.log_step(1, {"reward": 1.0})


class FakeTracker:
    """Stands for one of accelerate's trackers."""

    def __init__(self, *arguments: Any, **kwargs: Any) -> None:
        self.calls: list[Any] = [("made", arguments, kwargs)]
        FakeTracker.last = self

    last: FakeTracker

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((step, values))
        if "explode" in values:
            raise ConnectionError("network is down")

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def fake_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.tracking

    monkeypatch.setattr(accelerate.tracking, "WandBTracker", FakeTracker)
    monkeypatch.setattr(accelerate.tracking, "TensorBoardTracker", FakeTracker)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())


def test_a_tracker_gets_numbers_and_the_flat_configuration(tmp_path: Path, fake_tracker: None) -> None:
    run_config = {"beta": 0.1, "stop": [], "max_minutes": None, "p3o": {"clip": "joint"}}
    with metrics.RunLog(tmp_path, report_to=["wandb"], config_dict=run_config) as log, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        log.log_step(3, {"reward": 1.0, "kl": math.nan})
        log.log_evaluation({"step": 3, "num_prompts": 2, "reward": {"mean": 0.5, "low": 0.1, "high": None}})
    assert FakeTracker.last.calls[1:] == [
        "start",
        {"beta": 0.1, "stop": "[]", "max_minutes": "null", "p3o.clip": "joint"},
        (3, {"reward": 1.0}),
        (3, {"eval/num_prompts": 2, "eval/reward": 0.5, "eval/reward.low": 0.1}),
        "finish",
    ]


def test_tensorboard_forgets_what_a_killed_run_logged_later(tmp_path: Path, fake_tracker: None) -> None:
    metrics.RunLog(tmp_path, report_to=["tensorboard"], resume_step=4).close()
    assert FakeTracker.last.calls[0][2]["purge_step"] == 5


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path: Path, fake_tracker: None) -> None:
    with metrics.RunLog(tmp_path, report_to=["wandb"]) as log:
        with pytest.warns(UserWarning, match=r"wandb failed \(network is down\); the run goes on"):
            log.log_step(1, {"explode": 1})
        log.log_step(2, {})
    assert [call[0] for call in FakeTracker.last.calls if isinstance(call, tuple)] == ["made", 1]
    assert read(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_tracker_that_does_not_start_stops_the_run_before_it_begins(
    tmp_path: Path, fake_tracker: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FakeTracker) -> None:
        raise RuntimeError("no API key\nmore words")

    monkeypatch.setattr(FakeTracker, "start", refuse)
    with pytest.raises(PairtuneError, match=r"wandb did not start \(no API key\); mend it or leave it out"):
        metrics.RunLog(tmp_path, report_to=["wandb"])


def test_a_missing_or_unknown_tracker_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PairtuneError, match=r"trackio needs the package trackio; `pip install trackio`"):
        metrics.check_trackers(["trackio"])
    with pytest.raises(PairtuneError, match="'mlflow'; choose among tensorboard, wandb, trackio"):
        metrics.check_trackers(["mlflow"])


def test_timer_adds_up_without_counting_an_inner_phase_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 6.0, 10.0, 10.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    timer = metrics.Timer()
    with timer("update"):  # 0 to 6, of which 1 to 4 is the inner one
        with timer("ref_logprobs"):
            pass
    with pytest.raises(KeyError), timer("update"):  # 10 to 10.5: an exception does not lose the time
        raise KeyError
    assert timer.take() == {"time/ref_logprobs": 3.0, "time/update": 3.5}
    assert timer.take() == {}


# Processes


def test_without_a_process_group_all_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.init_from_env() is None
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    tensor = torch.ones(2)
    distributed.barrier()
    distributed.sum_gradients([tensor])
    assert distributed.sum_across(tensor) is tensor
    assert tensor.tolist() == [1, 1]
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    distributed.shutdown()


def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(PairtuneError, match="WORLD_SIZE is set but RANK is not"):
        distributed.init_from_env()


def test_more_processes_than_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: True, device_count=lambda: 1))
    with pytest.raises(PairtuneError, match="process 3 of this machine has no GPU, there are 1"):
        distributed.init_from_env()


@pytest.mark.parametrize("on_gpu", [True, False])
def test_processes_wait_for_hours_and_nccl_is_told_its_gpu(monkeypatch: pytest.MonkeyPatch, on_gpu: bool) -> None:
    environment = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked: list[Any] = []
    cuda = {"is_available": lambda: on_gpu, "device_count": lambda: 2, "set_device": asked.append}
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(**cuda))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, **words: asked.append((backend, words)))
    device = distributed.init_from_env()
    *chosen, (backend, words) = asked
    assert (device, chosen) == ((torch.device("cuda:1"), [1]) if on_gpu else (torch.device("cpu"), []))
    assert backend == ("nccl" if on_gpu else "gloo")
    assert words["device_id"] == (torch.device("cuda:1") if on_gpu else None)
    assert words["timeout"].total_seconds() >= 4 * 3600  # an endpoint may ask for 600 seconds many times over


def test_two_real_processes_sum_and_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)

    def work() -> None:
        assert distributed.init_from_env("cpu") == torch.device("cpu")
        rank = distributed.rank()
        total = distributed.sum_across(torch.tensor([1.0 + rank]))
        doubles = torch.full((5,), 10.0 * (1 + rank), dtype=torch.float64)
        gradients = [torch.full((3, 2), 1.0 + rank), doubles, torch.full((2, 4), 2.0 + rank).t()]
        distributed.sum_gradients(gradients, bucket_bytes=64)
        distributed.barrier()
        gathered = distributed.gather_objects({"rank": rank, "text": "é" * (1 + 5 * rank)})
        sums = [gradient.unique().tolist() for gradient in gradients]
        own = [torch.tensor([1.5 + rank], dtype=torch.bfloat16), torch.full((3, 2), 1.0 + rank).t()]
        distributed.copy_from_main(own)
        copied = [tensor.unique().tolist() for tensor in own]
        said = [distributed.world_size(), distributed.is_main(), total.tolist(), sums, gathered, copied]
        (tmp_path / str(rank)).write_text(json.dumps(said))
        distributed.shutdown()

    children = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        children.append(in_a_fork(work))
    for child in children:
        os.waitpid(child, 0)
    gathered = [{"rank": 0, "text": "é"}, {"rank": 1, "text": "éééééé"}]
    for rank in range(2):
        said = json.loads((tmp_path / str(rank)).read_text())
        assert said == [2, rank == 0, [3.0], [[3.0], [30.0], [5.0]], gathered, [[1.5], [1.0]]]
