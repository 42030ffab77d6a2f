"""The loop that SFT and reward learning share: the order of rows, the number of updates, several processes, display."""

from __future__ import annotations

import io
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from forked import Call, Forked
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from pairtune.config import RewardConfig, SFTConfig
from pairtune.models.reward_backbone import RewardBackbone
from pairtune.runs import folder
from pairtune.runs.display import Display
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages.reward import reward
from pairtune.stages.sft import SFTTask, sft
from pairtune.stages.supervised import num_updates, update_rows, updates_per_epoch, warmup_updates

ROWS = [{"prompt": "q" * n, "completion": "a" * (13 - n)} for n in range(1, 12)]
HELD_OUT = [{"prompt": "qq", "completion": "aaa"}, {"prompt": "q", "completion": "a"}]
DATA: dict[str, list[dict[str, Any]]] = {
    "sft": ROWS,
    "sft, of all lengths": [{"prompt": "q", "completion": "a" * (1 + n * n % 13)} for n in range(12)],
    "pairs": [
        {"prompt": "q" * n, "chosen": "a" * (13 - n), "rejected": "b" * n, "margin": 0.1 * n} for n in range(1, 12)
    ],
    "rankings": [
        {"prompt": "q" * (1 + n), "completions": [*"abcd"[: 2 + n % 3]], "ranks": [*range(2 + n % 3)]} for n in range(9)
    ],
}


def config(**words: Any) -> SFTConfig:
    return SFTConfig(**{"model": "m", "dataset": "d", **words})


# ------------------------------------------------------------------------------------------------------- rows and steps


@pytest.mark.parametrize("num_rows, batch_size", [(10, 4), (12, 4), (3, 8), (1, 1), (33, 32), (7, 1)])
def test_an_epoch_meets_every_row_once_in_updates_of_equal_size(num_rows: int, batch_size: int) -> None:
    words = config(batch_size=batch_size, seed=5)
    per_epoch = updates_per_epoch(words, num_rows)
    for epoch in range(3):
        updates = [update_rows(words, num_rows, epoch * per_epoch + place) for place in range(per_epoch)]
        assert sorted(row for rows in updates for row in rows) == list(range(num_rows))
        sizes = {len(rows) for rows in updates}
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_each_epoch_and_each_seed_has_an_order_of_its_own() -> None:
    orders = [tuple(update_rows(config(batch_size=64, seed=seed), 64, step)) for seed in (0, 1) for step in (0, 1)]
    assert len(set(orders)) == 4
    assert update_rows(config(batch_size=64), 64, 1) == update_rows(config(batch_size=64), 64, 1)


@pytest.mark.parametrize(
    "words, expected",
    [
        ({}, 4),
        ({"num_epochs": 2.5}, 10),
        ({"num_epochs": 0.1}, 1),
        ({"num_epochs": 0.3}, 2),  # every row of that share is met
        ({"max_steps": 7}, 7),
        ({"max_steps": 7, "num_epochs": 9}, 7),
    ],
)
def test_the_number_of_updates(words: dict[str, Any], expected: int) -> None:
    assert num_updates(config(batch_size=32, **words), 100) == expected


def test_a_tenth_of_thirty_updates_are_three() -> None:
    assert num_updates(config(batch_size=1, num_epochs=0.1), 30) == 3


def test_the_warm_up_is_a_share_of_the_run_unless_it_is_given() -> None:
    assert [warmup_updates(config(), n) for n in (1, 30, 100, 1000)] == [1, 1, 3, 30]
    assert warmup_updates(config(warmup_steps=0), 100) == 0
    assert warmup_updates(config(warmup_steps=7), 100) == 7


def test_the_measured_precision_is_kept(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"compute_dtype": "torch.bfloat16"}')
    assert folder.compute_dtype(tmp_path, "auto", resume=True) == "bfloat16"
    assert folder.compute_dtype(tmp_path, "float32", resume=True) == "float32"
    assert folder.compute_dtype(tmp_path, "auto", resume=False) == "auto"
    assert folder.compute_dtype(tmp_path / "nowhere", "auto", resume=True) == "auto"


# ---------------------------------------------------------------------------------------------------- several processes


def work(
    rank: int,
    world_size: int,
    port: int,
    tokenizer: str,
    words: dict[str, Any],
    kill_at: int = -1,
    stage: str = "sft",
    apart: bool = False,
) -> None:
    """One process of a run; leaves its weights beside the run folder."""
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    loss, calls = SFTTask.loss, Counter[str]()

    def counted(task: SFTTask, rows: Any) -> Any:
        if calls["loss"] == kill_at and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        calls["loss"] += 1
        return loss(task, rows)

    fitted = RewardBackbone.set_head
    if apart:  # what each fits for itself differs in the last bits; here in the first
        RewardBackbone.set_head = lambda self, weight: fitted(self, weight + rank)  # type: ignore[method-assign]
    SFTTask.loss = counted  # type: ignore[method-assign]  # this process ends with the run
    settings = {
        "model": "m",
        "dataset": "d",
        "chat": "never",
        "device": "cpu",
        "num_threads": 1,
        "batch_size": 5,
        "eval_steps": 0,
        "save_steps": 0,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.01,
        **words,
    }
    in_memory = {
        "model": build_tiny_model("gpt2").double(),  # float64 throughout, which a Llama's norms are not
        "tokenizer": PreTrainedTokenizerFast.from_pretrained(tokenizer),
    }
    rows = DATA[stage]
    if stage.startswith("sft"):
        result = sft(SFTConfig(**settings), train_dataset=rows, eval_dataset=HELD_OUT, **in_memory)
    else:
        result = reward(RewardConfig(**settings), train_dataset=rows, eval_dataset=rows[:3], **in_memory)
    run = Path(words["output_dir"])
    weights = {name: tensor.detach().clone() for name, tensor in result.model.named_parameters()}
    save_file(weights, run.with_name(f"{run.name}-{rank}.safetensors"))


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    helper = Forked()
    yield helper
    helper.close()


@pytest.fixture
def together(forked: Forked, tmp_path: Path, _tokenizer_folder: str) -> Any:
    """together(num_processes, name, **words of the configuration): a run of so many processes."""

    def start(
        num_processes: int, name: str, kill_at: int = -1, stage: str = "sft", apart: bool = False, **words: Any
    ) -> Path:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = {"world_size": num_processes, "port": port, "tokenizer": _tokenizer_folder, "kill_at": kill_at}
        shared |= {"stage": stage, "apart": apart, "words": {"output_dir": str(tmp_path / name), **words}}
        logs = [str(tmp_path / f"{name}-{rank}.log") for rank in range(num_processes)]
        calls = [Call("test_supervised:work", {"rank": rank, **shared}, log) for rank, log in enumerate(logs)]
        forked.run(*calls)
        return tmp_path / name

    return start


def weights(run: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(run.with_name(f"{run.name}-{rank}.safetensors"))


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [without_times(line) for line in read_jsonl(run / f"{name}.jsonl")]


def close(line: dict[str, Any]) -> dict[str, Any]:
    return {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in line.items()}


def test_two_processes_learn_what_one_learns(together: Any) -> None:
    """Updates of 4, 3 and 4 rows: one of the two has more rows than the other, and more tokens."""
    one, two = together(1, "one"), together(2, "two", micro_batch_size=1)
    start = dict(build_tiny_model("gpt2").double().named_parameters())
    assert max((weights(one)[name] - start[name]).abs().max() for name in start) > 1e-3
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-10)
        assert torch.equal(weights(two, rank=1)[name], weights(two)[name])
    assert lines(two, "metrics") == [close(line) for line in lines(one, "metrics")]
    losses = [[line["loss"]["mean"] for line in lines(run, "evaluations")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_two_processes_pack_what_one_does_not(together: Any) -> None:
    rows = "sft, of all lengths"
    one = together(1, "one", stage=rows)
    two = together(2, "two", stage=rows, micro_batch_size=1, packing=True)
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-10)
    losses, padding = (
        [[line[name] for line in lines(run, "metrics")] for run in (one, two)] for name in ("loss", "padding")
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert sum(padding[1]) < sum(padding[0])


@pytest.mark.parametrize(
    ("stage", "steps"), [("pairs", 1), ("rankings", 1), pytest.param("pairs", 3, marks=pytest.mark.slow)]
)
def test_two_processes_learn_the_rewards_that_one_learns(together: Any, stage: str, steps: int) -> None:
    words = {"stage": stage, "reward.centring": 0.1, "max_steps": steps}
    one, two = together(1, "one", **words), together(2, "two", micro_batch_size=1, **words)
    start = dict(build_tiny_model("gpt2").double().named_parameters())
    assert max((tensor - start[name]).abs().max() for name, tensor in weights(one).items() if name in start) > 1e-4
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-10)
        assert torch.equal(weights(two, rank=1)[name], weights(two)[name])
    assert lines(two, "metrics") == [close(line) for line in lines(one, "metrics")]
    likelihoods = [[line["log_likelihood"]["mean"] for line in lines(run, "evaluations")] for run in (one, two)]
    assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-9)


def test_both_processes_start_from_the_same_head(together: Any) -> None:
    """Each fits one for itself."""
    words = {"reward": {"fit_head": True}, "max_steps": 1}
    two = together(2, "two", stage="pairs", apart=True, **words)
    for name, tensor in weights(two).items():
        assert torch.equal(weights(two, rank=1)[name], tensor)


def test_more_processes_than_rows(together: Any) -> None:
    """The last of three processes has nothing to do in an update of two rows, and waits."""
    one, three = (together(n, f"{n} processes", batch_size=2, max_steps=2) for n in (1, 3))
    assert lines(three, "metrics") == [close(line) for line in lines(one, "metrics")]


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(together: Any) -> None:
    whole = together(2, "whole", micro_batch_size=1)
    together(2, "parts", micro_batch_size=1, kill_at=2)
    stopped = lines(whole.with_name("parts"), "metrics")
    assert 0 < len(stopped) < 3
    parts = together(2, "parts", micro_batch_size=1, resume=True)
    assert lines(parts, "metrics") == lines(whole, "metrics")
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor)


# -------------------------------------------------------------------------------------------------------------- display


def test_the_display_shows_what_a_fixed_dataset_has_to_show() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, _environ={"TERM": "xterm"})
    with Display(30, console=console, headline="loss", rewards=[3.0, 2.0, 9.0]) as shown:
        shown.begin(2)
        shown.step(3, {"loss": 1.0, "perplexity": 2.718, "accuracy": 0.625, "reward": None, "tokens_per_second": 99.6})
        for step, mean in ((0, 3.0), (3, 1.5)):
            shown.evaluation({"step": step, "num_examples": 3, "loss": {"mean": mean, "low": 1.0, "high": 4.0}})
        assert shown._live is not None
        shown._live.refresh()
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("step 3/30", "loss 1.000", "█▅▁", "held-out 3.000 to 1.500", "perplexity 2.72", "accuracy 62.5%"):
        assert part in text, part
    assert "100 tokens/s" in text
    assert "held-out, step 3  loss 1.500 [1.000, 4.000]" in text


def test_the_loss_of_a_run_with_rewards_is_not_shown() -> None:
    console = Console(file=io.StringIO(), width=100)
    with Display(3, console=console) as shown:
        shown.step(1, {"loss": 1.0, "reward": 0.5, "step_time": 1.0})
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().startswith("step 1/3  reward 0.500  1.0 s")
