"""Two gloo processes train what one process trains."""

from __future__ import annotations

import json
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model
from forked import Call, Forked
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from pairtune import PairtuneError, TrainConfig, train
from pairtune.models import loading
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages import rl

PROMPTS = [{"prompt": f"{word} {number}"} for number in range(4) for word in ("Go on", "Say it again", "So")]
HELD_OUT = [{"prompt": "Tell me"}, {"prompt": "?"}]


def small_words(completions: list[str], prompts: list[str], trainer_state: Any, **_: Any) -> list[float | None]:
    """The share of small letters; None for a third of the prompts, so that processes count different numbers."""
    if os.environ.get("KILL_AT") == f"{trainer_state.global_step} of rank {os.environ.get('RANK')}":
        os.kill(os.getpid(), signal.SIGTERM)
    pairs = zip(completions, prompts, strict=True)
    return [None if prompt.startswith("So") else sum(map(str.islower, text)) / 8 for text, prompt in pairs]


def moved(model: Any, rank: int) -> Any:
    """The model, on every process but the first with weights of its own."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * rank
    return model


def work(
    rank: int,
    world_size: int,
    port: int,
    tokenizer: str,
    words: dict[str, Any],
    kill_at: str = "",
    apart: str = "",
) -> None:
    """One process of a run; leaves its weights beside the run folder."""
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["KILL_AT"] = kill_at
    settings = {
        "model": "in memory",
        "dataset": "passed in",
        "chat": "never",
        "device": "cpu",
        "num_threads": 1,
        "num_iterations": 2,
        "batch_size": 4,
        "max_completion_length": 6,
        "max_steps": 3,
        "eval_steps": 0,
        "save_steps": 0,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.01,
        **words,
    }
    # float64 throughout, which a Llama's norms are not.
    model = build_tiny_model("gpt2").to(torch.float64)
    if apart == "model":
        moved(model, rank)
    elif apart == "adapter":
        with_adapter = loading._with_adapter

        def drawn(*given: Any) -> Any:
            torch.manual_seed(rank)
            return with_adapter(*given)

        loading._with_adapter = drawn  # this process ends with the run
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*were not computed alike")
        result = train(
            TrainConfig(**settings),
            model=model,
            tokenizer=PreTrainedTokenizerFast.from_pretrained(tokenizer),
            reward_funcs=[small_words],
            train_dataset=PROMPTS,
            eval_dataset=HELD_OUT,
        )
    run = Path(settings["output_dir"])
    weights = {name: tensor.detach().clone() for name, tensor in result.model.named_parameters()}
    save_file(weights, run.with_name(f"{run.name}-{rank}.safetensors"))
    run.with_name(f"{run.name}-{rank}.json").write_text(json.dumps([result.steps, result.finished]))


@pytest.fixture(scope="module")
def forked() -> Iterator[Forked]:
    helper = Forked()
    yield helper
    helper.close()


@pytest.fixture
def together(forked: Forked, tmp_path: Path, _tokenizer_folder: str) -> Any:
    """together(num_processes, name, **words of the configuration): a run of so many processes."""

    def start(num_processes: int, name: str, kill_at: str = "", apart: str = "", **words: Any) -> Path:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        run = tmp_path / name
        forked.run(
            *(
                Call(
                    "test_distributed_train:work",
                    {
                        "rank": rank,
                        "world_size": num_processes,
                        "port": port,
                        "tokenizer": _tokenizer_folder,
                        "words": {"output_dir": str(run), **words},
                        "kill_at": kill_at,
                        "apart": apart,
                    },
                    str(tmp_path / f"{name}-{rank}.log"),
                )
                for rank in range(num_processes)
            )
        )
        return run

    return start


def weights(run: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return load_file(run.with_name(f"{run.name}-{rank}.safetensors"))


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [without_times(line) for line in read_jsonl(run / f"{name}.jsonl")]


@pytest.mark.parametrize("scale", ["none", "running"])
def test_two_processes_train_what_one_trains(together: Any, scale: str) -> None:
    one = together(1, "one", scale_rewards=scale)
    two = together(2, "two", scale_rewards=scale, micro_batch_size=1)
    start = dict(build_tiny_model("gpt2").double().named_parameters())
    assert max((weights(one)[name] - start[name]).abs().max() for name in start) > 1e-3
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-10)
        assert torch.equal(weights(two, rank=1)[name], weights(two)[name])

    assert lines(two, "evaluations") == [close(line) for line in lines(one, "evaluations")]
    metrics = lines(one, "metrics")
    assert len({line["reward"] for line in metrics}) == 3
    for line, other in zip(metrics, lines(two, "metrics"), strict=True):
        # The mean over processes of their own; what only a process knows is not gathered.
        assert other.pop("rewards/small_words/std") > 0 < line.pop("rewards/small_words/std")
        assert other.pop("rewards/small_words/mean") > 0 < line.pop("rewards/small_words/mean")
        assert other == close(line)
    samples = [s["completion"] for s in lines(one, "samples") if s["split"] == "train"]
    others = [s["completion"] for s in lines(two, "samples") if s["split"] == "train"]
    assert others == samples  # the first ones of the batch, which are the main process's


METHODS: dict[str, dict[str, Any]] = {
    "ppo": {"ppo.target_kl": 0.01, "ppo.kl_horizon": 50},
    "reinforce": {},
    "grpo": {},
    "online_dpo": {"online_dpo.labels": "sampled", "replay": 1},
}


@pytest.mark.parametrize("algorithm", METHODS)
def test_whatever_a_method_counts_or_carries_is_of_all_processes(together: Any, algorithm: str) -> None:
    """Whitening, the moving average, the controller's KL, drawn labels, replayed batches: also when the run goes on."""
    one = together(1, "one", algorithm=algorithm, **METHODS[algorithm])
    two = together(2, "two", algorithm=algorithm, micro_batch_size=1, **METHODS[algorithm])
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=0, atol=1e-9)
        assert torch.equal(weights(two, rank=1)[name], weights(two)[name])
    parts = together(2, "parts", kill_at="1 of rank 1", algorithm=algorithm, **METHODS[algorithm])
    together(2, "parts", resume=True, algorithm=algorithm, **METHODS[algorithm])
    whole = together(2, "whole", algorithm=algorithm, **METHODS[algorithm])
    for rank in (0, 1):
        for name, tensor in weights(whole, rank).items():
            assert torch.equal(weights(parts, rank)[name], tensor)


def close(line: dict[str, Any]) -> Any:
    """Equal up to the last digits of float32, in which the sampler computes."""
    return {
        name: close(value) if isinstance(value, dict) else pytest.approx(value, rel=1e-6, abs=1e-6)
        for name, value in line.items()
    }


def test_with_minibatches_the_processes_stay_together(together: Any) -> None:
    two = together(2, "two", minibatch_size=2)
    for name, tensor in weights(two).items():
        assert torch.equal(weights(two, rank=1)[name], tensor)
    assert lines(two, "metrics")[0]["kl"] == 0
    assert lines(two, "metrics")[2]["kl"] != 0


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(together: Any) -> None:
    """A process that left alone would leave the others waiting for ever."""
    whole = together(2, "whole")
    parts = together(2, "parts", kill_at="1 of rank 1")
    assert [json.loads(parts.with_name(f"parts-{rank}.json").read_text()) for rank in (0, 1)] == [[2, False]] * 2
    found = checkpoint.latest(parts)
    assert found is not None
    assert found.name == "step-2"
    together(2, "parts", resume=True)
    for name, tensor in weights(whole).items():
        assert torch.equal(weights(parts)[name], tensor)
        assert torch.equal(weights(parts, rank=1)[name], tensor)
    for log in ("metrics", "evaluations", "samples"):
        assert lines(parts, log) == lines(whole, log)


@pytest.mark.parametrize(("apart", "way"), [("model", {}), ("adapter", {"lora_r": 2})])
def test_all_processes_start_from_the_same_bits(together: Any, apart: str, way: dict[str, int]) -> None:
    """A model passed in, and its reference (or a warning would end the run); an adapter that is drawn at random."""
    two = together(2, "two", apart=apart, max_steps=1, **way)
    for name, tensor in weights(two).items():
        assert torch.equal(weights(two, rank=1)[name], tensor)


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1)])
def test_earlier_batches_bind_a_run_to_its_number_of_processes(together: Any, before: int, now: int) -> None:
    words = {"algorithm": "online_dpo", "replay": 1}
    rank = "None" if before == 1 else 1
    run = together(before, "run", kill_at=f"1 of rank {rank}", **words)
    found = checkpoint.latest(run)
    assert found is not None
    assert checkpoint.load(found)[1]["num_processes"] == before
    with pytest.raises(AssertionError, match=f"holds the earlier batches of {before} process.* and {now} would go on"):
        together(now, "run", resume=True, **words)


def test_without_earlier_batches_the_number_of_processes_may_change(together: Any) -> None:
    run = together(2, "run", kill_at="1 of rank 1")
    together(1, "run", resume=True)
    assert len(lines(run, "metrics")) == 3


def test_a_checkpoint_that_does_not_say_its_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of older versions: the shares in it tell."""
    shares = {f"replay.{rank}.0.rewards": torch.zeros(1) for rank in (0, 1)}
    rl._check_processes({}, {}, Path("step-2"))
    with pytest.raises(
        PairtuneError, match=r"step-2 holds the earlier batches of 2 processes and 1 would .* with 2, or"
    ):
        rl._check_processes(shares, {}, Path("step-2"))
    monkeypatch.setattr(rl.distributed, "world_size", lambda: 2)
    rl._check_processes(shares, {}, Path("step-2"))
    with pytest.raises(PairtuneError, match="of 1 process and 2 would"):
        rl._check_processes({"replay.0.0.rewards": torch.zeros(1)}, {"num_processes": 1}, Path("step-2"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"batch_size": 6}, "batch_size is 6, which 4 processes cannot share equally; give a multiple of 4"),
        ({"batch_size": 8, "minibatch_size": 2}, "minibatch_size is 2, which 4 processes cannot share equally"),
    ],
)
def test_a_share_that_does_not_divide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: dict[str, int], sentence: str
) -> None:
    monkeypatch.setattr(rl.distributed, "world_size", lambda: 4)
    settings = TrainConfig(model="m", dataset="d", reward_funcs=["a.b"], output_dir=str(tmp_path / "run"), **words)
    with pytest.raises(PairtuneError, match=sentence):
        train(settings)
    assert not (tmp_path / "run").exists()
