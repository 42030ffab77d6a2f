"""`sft` from end to end on tiny models: what is learned and what is not, what it leaves behind, what it refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import EOS_ID, build_tiny_model
from hypothesis import given
from hypothesis.strategies import integers, lists
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

from pairtune import PairtuneError
from pairtune.cli import main
from pairtune.completion_data import Example, encode_examples
from pairtune.config import SFTConfig
from pairtune.maths.statistics import bootstrap_ratio
from pairtune.models.loading import load_policy
from pairtune.models.logprobs import Scorer, body
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages import loop, supervised
from pairtune.stages.rl import TrainResult
from pairtune.stages.sft import SFTTask, best_fit, example_layout, sft

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
WORDS = ("ab", "c", "dd")
ROWS = [{"prompt": f"{word} {n}: ", "completion": f"{word}!" * (n + 1)} for n in range(4) for word in WORDS]
HELD_OUT = [{"prompt": f"{word} 4: ", "completion": f"{word}!" * 4} for word in WORDS]
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"trainable_layers": 1},
    "lora": {"lora_r": 4, "lora_alpha": 8},
}
Run = Callable[..., TrainResult]


@pytest.fixture
def run(tiny_model_folder: str, tmp_path: Path) -> Run:
    """sft() on the tiny Llama; every word of SFTConfig may be given."""

    def start(*, rows: Any = ROWS, held_out: Any = HELD_OUT, **words: Any) -> TrainResult:
        given = {key: words.pop(key) for key in ("tokenizer",) if key in words}
        if not isinstance(words.get("model", ""), str):
            given["model"] = words.pop("model")
        settings = {
            "model": tiny_model_folder,
            "dataset": "passed in",
            "chat": "never",
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 4,
            "micro_batch_size": 3,
            "learning_rate": 1e-3,
            "eval_steps": 0,
            "save_steps": 0,
            "output_dir": str(tmp_path / "run"),
        }
        if held_out is None:
            settings["dataset_test_split"] = None
        return sft(SFTConfig(**{**settings, **words}), train_dataset=rows, eval_dataset=held_out, **given)

    return start


def lines(result: TrainResult | Path, name: str = "metrics") -> list[dict[str, Any]]:
    folder = result if isinstance(result, Path) else result.output_dir
    return [without_times(line) for line in read_jsonl(folder / f"{name}.jsonl")]


def newest(result: TrainResult | Path) -> Path:
    found = checkpoint.latest(result if isinstance(result, Path) else result.output_dir)
    assert found is not None
    return found


def turns(*contents: str) -> list[dict[str, str]]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def task_of(model: Any, tokenizer: Any, rows: list[dict[str, Any]] = ROWS, **words: Any) -> SFTTask:
    """A task on a model in memory."""
    config = SFTConfig(**{"model": "m", "dataset": "d", "chat": "never", **words})
    ways = {key: words[key] for key in ("trainable_layers", "lora_r") if key in words}
    policy = load_policy(model, tokenizer=tokenizer, device="cpu", **ways)
    return SFTTask(policy, encode_examples(rows, "the rows", config, tokenizer))


def plain_nats(model: Any, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
    """The negative log-likelihood of one completion, from the model's own logits."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0, len(prompt_ids) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(completion_ids), reduction="sum")


# --------------------------------------------------------------------------------------------------------- one long run


@pytest.mark.parametrize("way", WAYS)
def test_a_run_learns_and_leaves_what_it_should(run: Run, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One run, many assertions: the pattern is to repeat the word before the number."""
    result = run(
        num_epochs=8,
        learning_rate={"full": 1e-2, "layers": 3e-2, "lora": 3e-2}[way],
        eval_steps=10,
        save_steps=10,
        keep_last=2,
        **WAYS[way],
    )
    assert (result.steps, result.finished) == (24, True)
    folder, metrics, evaluations = result.output_dir, lines(result), lines(result, "evaluations")

    assert metrics[-1]["loss"] < 0.4 * metrics[0]["loss"]
    assert [line["step"] for line in metrics] == list(range(1, 25))
    assert [line["step"] for line in evaluations] == [0, 10, 20, 24]
    first, last = evaluations[0], evaluations[-1]
    assert last["perplexity"]["mean"] < 0.7 * first["perplexity"]["mean"]
    num_tokens = sum(len(row["completion"]) + 1 for row in HELD_OUT)
    for line in evaluations:
        assert (line["num_examples"], line["num_tokens"]) == (3, num_tokens)
        for end in ("mean", "low", "high"):
            assert line["perplexity"][end] == pytest.approx(math.exp(line["loss"][end]))
        assert line["loss"]["low"] < line["loss"]["mean"] < line["loss"]["high"]
    seen = sum(len(row["prompt"] + row["completion"]) for row in ROWS)  # all but EOS, which is only predicted
    for line in read_jsonl(folder / "metrics.jsonl"):
        assert line["perplexity"] == pytest.approx(math.exp(line["loss"]))
        assert {"grad_norm", "learning_rate", "padding", "step_time", "tokens_per_second", "time/update"} <= set(line)
        assert line["epoch"] == line["step"] / 3
    assert [line["num_tokens"] for line in metrics[2::3]] == [seen * (epoch + 1) for epoch in range(8)]

    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"config.yaml", "environment.json", "metrics.jsonl", "evaluations.jsonl"} <= files
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"step-20", "step-24"}
    weights = "adapter_model" if way == "lora" else "model"
    assert {f"checkpoints/step-24/{name}" for name in (f"{weights}.safetensors", "trainer.json")} <= files
    environment = json.loads((folder / "environment.json").read_text())
    assert (environment["compute_dtype"], environment["device"]) == ("torch.float32", "cpu")

    loaded = AutoModelForCausalLM.from_pretrained(newest(result), dtype="float32").eval()
    ids = torch.arange(7, 37).view(2, 15)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert AutoTokenizer.from_pretrained(newest(result))("So 1")["input_ids"] == result.tokenizer("So 1")["input_ids"]
    # The run folder is a model to go on from, as `model:` of another stage. An adapter is merged, which may round.
    policy = load_policy(str(folder), dtype="float32", device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(policy.model(ids).logits, result.model(ids).logits, rtol=1e-4, atol=1e-4)

    shown = capsys.readouterr().out
    assert f"held-out, step 24  loss {last['loss']['mean']:.3f}" in shown
    assert f"step 24/24  loss {metrics[-1]['loss']:.3f}  perplexity {metrics[-1]['perplexity']:.2f}" in shown


# ------------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_loss_and_gradient_are_those_of_a_plain_loop(tiny_tokenizer: Any, kind: str) -> None:
    """In float64, example by example; a Llama's norms and angles are float32 whatever the rest is."""
    model = build_tiny_model(kind).double()
    plain = copy.deepcopy(model)
    task = task_of(model, tiny_tokenizer)
    rows = [7, 0, 3, 11, 2]
    expected = torch.zeros((), dtype=torch.float64)
    for row in rows:
        prompt, completion = ROWS[row]["prompt"], ROWS[row]["completion"]
        completion_ids = [*tiny_tokenizer(completion)["input_ids"], EOS_ID]
        expected = expected + plain_nats(plain, tiny_tokenizer(prompt)["input_ids"], completion_ids)
    expected.backward()

    output = task.loss([[row] for row in rows])
    output.total.backward()
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-10 if kind == "gpt2" else 1e-6)
    assert task.counted(rows) == sum(len(ROWS[row]["completion"]) + 1 for row in rows)
    tolerance = 1e-10 if kind == "gpt2" else 1e-4
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=0, atol=tolerance)
        assert parameter.grad.abs().max() > 1e-3


def test_only_what_is_learned_is_pulled_at(tiny_tokenizer: Any) -> None:
    """The final hidden states get a gradient where they predict a learned token, and nowhere else."""
    rows = [{"messages": turns("hi", "yes", "add?", "no")}, {"messages": turns("o", "k")}]
    model = build_tiny_model("llama-untied")
    task = task_of(model, tiny_tokenizer, rows)
    states: list[Tensor] = []
    model.model.norm.register_forward_hook(lambda _, __, output: (output.retain_grad(), states.append(output))[1])
    task.loss([[0], [1]]).total.backward()
    pulled = (states[0].grad != 0).any(-1)
    text = [USER, *"hi", END, ASSISTANT, *"yes", END, USER, *"add?", END, ASSISTANT, *"no"]
    learned = [token in (ASSISTANT, *"yesno") for token in text]
    # The closing token of a turn is predicted from its last letter; the next user's words are predicted by nothing.
    assert pulled[0].tolist() == learned
    second = ["<|user|>", "o", "<|end|>", "<|assistant|>", "k"]
    assert pulled[1].tolist() == [token in ("<|assistant|>", "k") for token in second] + [False] * (len(text) - 5)


@pytest.mark.parametrize("chat", ["never", "always"])
def test_eos_is_learned_also_where_it_is_the_pad_token(tiny_tokenizer: Any, chat: str) -> None:
    totals = []
    for pad in ("<|pad|>", "<|end|>"):
        tiny_tokenizer.pad_token = pad
        task = task_of(build_tiny_model("gpt2").double(), tiny_tokenizer, chat=chat)
        layout = example_layout([[example] for example in task._examples[:4]])
        for row in range(4):
            targets = layout.targets[row][layout.mask[row]].tolist()
            assert tiny_tokenizer.decode(targets) == ROWS[row]["completion"] + "<|end|>"
        totals.append(task.loss([[0], [1], [2], [3]]).total.item())
    assert totals[0] == totals[1]


def test_an_example_takes_no_room_that_it_does_not_need(tiny_tokenizer: Any) -> None:
    examples = [Example([5, 6, 7, 8], [2, 3]), Example([9, 8], [1])]
    layout = example_layout([[example] for example in examples])
    assert layout.input_ids.tolist() == [[5, 6, 7], [9, 0, 0]]  # the last token is only predicted
    assert layout.attention_mask().tolist() == [[True] * 3, [True, False, False]]
    assert layout.mask.sum() == 3  # and the head meets three states, not six
    assert layout.source[layout.mask].tolist() == [1, 2, 0]


def test_the_frozen_trunk_leaves_no_graph(tiny_tokenizer: Any) -> None:
    model = build_tiny_model("llama", num_hidden_layers=3)
    task = task_of(model, tiny_tokenizer, trainable_layers=1)
    graphs: list[bool] = []
    for layer in body(model).layers:
        layer.register_forward_hook(lambda _, __, output: graphs.append(output.requires_grad))
    task.loss([[0], [1]]).total.backward()
    assert graphs == [False, False, True]
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {
        name for name, _ in model.named_parameters() if ".layers.2." in name or name == "model.norm.weight"
    }


def test_rows_of_a_micro_batch_are_of_like_length(tiny_tokenizer: Any) -> None:
    task = task_of(build_tiny_model("llama"), tiny_tokenizer)
    config = SFTConfig(model="m", dataset="d", micro_batch_size=4)
    cut = supervised.micro_batches(config, task, range(12))
    lengths = [[task.length(row) for row in rows] for rows in cut]
    assert [len(rows) for rows in cut] == [4, 4, 4]
    assert sorted(row for rows in cut for row in rows) == list(range(12))
    assert [length for part in lengths for length in part] == sorted(map(task.length, range(12)), reverse=True)

    # Of all tokens in rows, the share that is padding: less than half of that in the order of the dataset.
    def padding(parts: list[list[int]]) -> float:
        return 1 - sum(map(sum, parts)) / sum(max(part) * len(part) for part in parts)

    unordered = [[task.length(row) for row in range(start, 12, 3)] for start in range(3)]
    assert padding(lengths) < 0.5 * padding(unordered)


# -------------------------------------------------------------------------------------------------------------- packing


def in_float64(model: Any) -> Any:
    """The model in float64 throughout: the norms of a Llama or Qwen go through float32 whatever they are given."""
    model = model.double()
    for parent in list(model.modules()):
        for name, part in list(parent.named_children()):
            if type(part).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(part.weight.shape, eps=part.variance_epsilon)
                norm.weight = part.weight
                setattr(parent, name, norm)
    return model


def packed_task(model: Any, tokenizer: Any, rows: list[dict[str, Any]] = ROWS, **words: Any) -> SFTTask:
    task = task_of(model, tokenizer, rows, **words)
    task.packing = task._scorer.shared
    return task


def alone(rows: Any) -> list[list[int]]:
    return [[row] for row in rows]


VARIED = [{"prompt": f"{n}" * (1 + n * n % 17), "completion": "abcd"[n % 4] * (1 + n * n % 23)} for n in range(32)]
"""Of very different lengths."""
ARCHITECTURES = ["llama", "llama-untied", "qwen2", "qwen3", "gpt2", "mistral"]


@pytest.mark.parametrize("double", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_have_the_loss_and_gradient_of_rows_of_their_own(
    tiny_tokenizer: Any, kind: str, double: bool
) -> None:
    model = build_tiny_model(kind)
    task = packed_task(in_float64(model) if double else model, tiny_tokenizer, VARIED[:12])
    assert task.packing == (kind != "mistral")  # whose window counts columns, not positions
    packs = task.pack(range(12))
    assert sorted(row for together in packs for row in together) == list(range(12))
    if kind == "mistral":
        assert packs == alone(range(12))
        return
    assert len(packs) <= 8
    assert max(map(len, packs)) >= 3
    found = []
    for rows in (alone(range(12)), packs):
        model.zero_grad()
        output = task.loss(rows)
        output.total.backward()
        found.append((output.total.item(), [parameter.grad.clone() for parameter in model.parameters()]))
    tolerance = 1e-10 if double else 1e-5
    assert found[1][0] == pytest.approx(found[0][0], rel=tolerance)
    for gradient, expected in zip(found[1][1], found[0][1], strict=True):
        assert (gradient - expected).norm() <= tolerance * expected.norm()
        assert expected.norm() > 1e-3


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_examples_of_a_row_do_not_see_each_other(tiny_tokenizer: Any, attention: str) -> None:
    """Whatever stands before or behind an example, and however long that is, what it makes of itself stays."""
    model = build_tiny_model("llama", attn_implementation=attention)
    one, short, long = Example([30, 31, 32, 33, 34], [2, 3, 4]), Example([40, 41], [1]), Example([*range(50, 60)], [9])
    scorer = load_policy(model, tokenizer=tiny_tokenizer, device="cpu").scorer
    with torch.no_grad():
        expected = scorer.logprobs(example_layout([[one]]))[0][0, 0]
        for row in ([one, short], [short, one], [long, one], [long, one, short], [one, one]):
            place = row.index(one)
            found = scorer.logprobs(example_layout([row]))[0][0, place]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # To the last bit, where nothing but the words of the neighbours changes.
        rows = [[Example([n, n + 1, n + 2], [1, 2]), one, Example([n, n], [1])] for n in (40, 60)]
        first, second = (scorer.logprobs(example_layout([row]))[0][0] for row in rows)
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], second[0])


def test_a_packed_row_holds_examples_one_behind_the_other() -> None:
    layout = example_layout([[Example([5, 6, 7, 8], [2, 3]), Example([9, 8], [1])], [Example([4, 3, 2], [1, 2])]])
    assert layout.input_ids.tolist() == [[5, 6, 7, 9], [4, 3, 0, 0]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert layout.segments.tolist() == [[1, 1, 1, 2], [1, 1, -1, -1]]
    assert layout.targets[layout.mask].tolist() == [7, 8, 8, 3, 2]
    assert layout.hidden_rows().tolist() == [0, 0, 0, 1, 1]
    assert layout.source[layout.mask].tolist() == [1, 2, 3, 0, 1]
    seen = layout.attention_mask()[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]


@given(lengths=lists(integers(1, 30), max_size=40), spare=integers(0, 9))
def test_best_fit_wastes_less_than_half(lengths: list[int], spare: int) -> None:
    capacity = max(lengths, default=0) + spare
    bins = best_fit(lengths, capacity)
    assert sorted(place for bin in bins for place in bin) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in bin) for bin in bins]
    assert filled == sorted(filled, reverse=True)
    assert max(filled, default=0) <= capacity
    # Whatever opened a bin had found no room in any other: no two bins would go into one.
    assert all(one + other > capacity for one, other in combinations(filled, 2))


def test_best_fit_takes_the_fullest_bin_with_room() -> None:
    assert best_fit([5, 4, 3, 2, 1], 6) == [[0, 4], [1, 3], [2]]
    assert best_fit([7, 5, 3, 3], 10) == [[0, 2], [1, 3]]  # the first 3 into the bin of 7, where 5 has more room
    assert best_fit([], 0) == []


def test_packing_leaves_less_padding_than_rows_of_like_length(tiny_tokenizer: Any) -> None:
    task = packed_task(build_tiny_model("llama"), tiny_tokenizer, VARIED)
    config = SFTConfig(model="m", dataset="d", micro_batch_size=4)

    def padding(cut: list[list[Any]]) -> float:
        parts = [task.loss(rows).metrics["padding"] for rows in cut]
        return sum(part for part, _ in parts) / sum(room for _, room in parts)

    packed = supervised.micro_batches(config, task, range(32), task.pack)
    assert max(map(len, packed)) <= 4
    assert sorted(row for rows in packed for together in rows for row in together) == list(range(32))
    longest = max(map(task.length, range(32))) - 1
    assert all(sum(task.length(row) - 1 for row in together) <= longest for rows in packed for together in rows)
    by_length = [alone(rows) for rows in supervised.micro_batches(config, task, range(32))]
    assert len(packed) < len(by_length)
    assert padding(packed) < 0.5 * padding(by_length)


@pytest.mark.parametrize("way", WAYS)
def test_a_packed_run_is_the_unpacked_one(run: Run, tmp_path: Path, way: str) -> None:
    words = {"rows": VARIED, "batch_size": 8, "num_epochs": 2, "learning_rate": 1e-2, **WAYS[way]}
    plain = run(output_dir=str(tmp_path / "plain"), micro_batch_size=2, **words)
    packed = run(output_dir=str(tmp_path / "packed"), micro_batch_size=2, packing=True, **words)
    assert packed.steps == 8
    for line, other in zip(lines(packed), lines(plain), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-3)
        assert line["num_tokens"] == other["num_tokens"]
    padding = [sum(line["padding"] for line in lines(result)) for result in (packed, plain)]
    assert 0 < padding[0] < padding[1]
    assert lines(packed)[-1]["loss"] < 0.9 * lines(packed)[0]["loss"]


def test_where_rows_cannot_be_shared_packing_is_left_out_and_that_is_said(
    run: Run, tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = []
    for packing in (False, True):
        model = build_tiny_model("mistral")
        words = {"model": model, "tokenizer": tiny_tokenizer, "output_dir": str(tmp_path / f"{packing}")}
        results.append(run(packing=packing, **words))
        assert ("no packing: this architecture" in capsys.readouterr().out) == packing
    assert lines(results[0]) == lines(results[1])


# ---------------------------------------------------------------------------------------------------- cuts of an update


def gradients(run: Run, monkeypatch: pytest.MonkeyPatch, tokenizer: Any, **words: Any) -> tuple[list[Tensor], float]:
    """The gradient of the first update, which is not made, and the loss that is logged, in float64."""
    found: list[list[Tensor]] = []

    def record(masters: Any, optimizer: Any, **_: Any) -> float:
        found.append([gradient.clone() for gradient in masters.gradients()])
        for master in masters.masters:
            master.grad = None
        return 0.0

    monkeypatch.setattr(supervised, "apply_gradients", record)
    model = build_tiny_model("gpt2").double()
    result = run(model=model, tokenizer=tokenizer, batch_size=6, max_steps=1, overwrite=True, held_out=None, **words)
    monkeypatch.undo()
    return found[0], lines(result)[0]["loss"]


def test_any_cut_into_micro_batches_gives_one_gradient(
    run: Run, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    whole, loss = gradients(run, monkeypatch, tiny_tokenizer, micro_batch_size=None)
    assert max(gradient.abs().max().item() for gradient in whole) > 1e-3
    for size, packing in ((1, False), (4, False), (5, False), (6, False), (None, True), (1, True), (2, True)):
        cut, its_loss = gradients(run, monkeypatch, tiny_tokenizer, micro_batch_size=size, packing=packing)
        assert its_loss == pytest.approx(loss, rel=1e-12)
        for one, other in zip(cut, whole, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_checkpointing_changes_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any) -> None:
    one, _ = gradients(run, monkeypatch, tiny_tokenizer)
    forward, on_the_way_back = GPT2MLP.forward, []

    def recorded(*args: Any) -> Any:
        on_the_way_back.append(torch._C._current_graph_task_id() != -1)
        return forward(*args)

    monkeypatch.setattr(GPT2MLP, "forward", recorded)
    other, _ = gradients(run, monkeypatch, tiny_tokenizer, gradient_checkpointing=True)
    assert sum(on_the_way_back) == 2 * 2  # two layers, once more in each of two micro-batches
    for gradient, same in zip(one, other, strict=True):
        torch.testing.assert_close(gradient, same, rtol=0, atol=1e-13)


def test_a_run_is_the_plain_loop(run: Run, tiny_tokenizer: Any) -> None:
    words: dict[str, Any] = {
        "num_epochs": 2.0,
        "batch_size": 5,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.2,
        "adam_beta2": 0.95,
        "max_grad_norm": 0.5,
        "seed": 3,
    }
    model = build_tiny_model("gpt2").double()
    expected = copy.deepcopy(model)
    result = run(model=model, tokenizer=tiny_tokenizer, **words)
    config = SFTConfig(**yaml.safe_load((result.output_dir / "config.yaml").read_text()))

    matrices, vectors = ([p for p in expected.parameters() if (p.ndim >= 2) is m] for m in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    factors = [1 / 3, 2 / 3, 1.0, 0.75, 0.5, 0.25]  # two updates of warm-up, then to 0, which would be the seventh
    for step, factor in enumerate(factors):
        rows = [ROWS[row] for row in supervised.update_rows(config, 12, step)]
        assert len(rows) == 4  # three equal updates an epoch, not 5 + 5 + 2
        ids = [(tiny_tokenizer(r["prompt"])["input_ids"], tiny_tokenizer(r["completion"])["input_ids"]) for r in rows]
        loss = sum(plain_nats(expected, prompt, [*completion, EOS_ID]) for prompt, completion in ids)
        optimizer.zero_grad()
        (loss / sum(len(completion) + 1 for _, completion in ids)).backward()
        torch.nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()
    assert result.steps == len(factors)
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(result.model.get_parameter(name), parameter, rtol=0, atol=1e-7)
    assert all(line["grad_norm"] > 0.5 for line in lines(result))


# ------------------------------------------------------------------------------------------------ stopping and going on


class Interrupted(Exception):
    pass


def at_loss(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], None]) -> None:
    """Until monkeypatch.undo(), something happens in a micro-batch (from 0) of training."""
    loss, calls = SFTTask.loss, Counter[str]()

    def acting(task: SFTTask, rows: Any) -> Any:
        if calls["loss"] == number:
            act()
        calls["loss"] += 1
        return loss(task, rows)

    monkeypatch.setattr(SFTTask, "loss", acting)


def interrupt() -> None:
    raise Interrupted


RESUMED: dict[str, dict[str, Any]] = {
    "full, cosine": {},
    "bfloat16, linear schedule": {"dtype": "bfloat16", "lr_scheduler_type": "linear", "warmup_steps": 3},
    "layers, decay": {"trainable_layers": 1, "weight_decay": 0.1},
    "lora, bfloat16": {"dtype": "bfloat16", "lora_r": 2},
}


@pytest.mark.parametrize(
    "name", [name if "bfloat16" in name else pytest.param(name, marks=pytest.mark.slow) for name in RESUMED]
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    words = {"num_epochs": 2, "save_steps": 2, "eval_steps": 2, "micro_batch_size": 2, **RESUMED[name]}
    whole = run(output_dir=str(tmp_path / "whole"), **words)

    at_loss(monkeypatch, 7, interrupt)  # in the second half of step 4
    with pytest.raises(Interrupted):
        run(output_dir=str(tmp_path / "parts"), **words)
    monkeypatch.undo()
    assert newest(tmp_path / "parts").name == "step-2"
    assert lines(tmp_path / "parts")[-1]["step"] == 3  # a line past the checkpoint, to be cut
    parts = run(output_dir=str(tmp_path / "parts"), resume=True, **words)

    assert (parts.steps, parts.finished) == (6, True)
    for log in ("metrics", "evaluations"):
        assert lines(parts, log) == lines(whole, log)
    one, other = (checkpoint.load(newest(result))[0] for result in (parts, whole))
    assert one.keys() == other.keys()
    assert any(tensor.abs().sum() > 0 for tensor in one.values())
    for key, tensor in one.items():
        assert torch.equal(tensor, other[key]), key
    for key, tensor in parts.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[key]), key


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_go_on(
    run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    handler = signal.getsignal(number)
    at_loss(monkeypatch, 2, lambda: os.kill(os.getpid(), number))
    stopped = run()
    monkeypatch.undo()
    assert signal.getsignal(number) is handler
    assert (stopped.steps, stopped.finished) == (2, False)
    assert newest(stopped).name == "step-2"
    output, errors = capfd.readouterr()
    assert "stopping: this step is finished and saved first" in errors
    going_on = f"pairtune sft --resume --output_dir {stopped.output_dir}"
    assert f"stopped after step 2 of 3; go on with: {going_on}" in output
    if number == signal.SIGINT:  # goes on like the other
        return
    resumed, whole = run(resume=True), run(output_dir=str(tmp_path / "whole"))
    assert resumed.finished
    assert lines(resumed) == lines(whole)
    assert lines(resumed, "evaluations") == lines(whole, "evaluations")


@pytest.mark.parametrize("save_steps", [0, 1])
def test_max_minutes_ends_with_a_checkpoint_and_an_evaluation(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], save_steps: int
) -> None:
    class Clock:
        seconds = 0.0

        def perf_counter(self) -> float:
            return self.seconds

    clock, loss = Clock(), SFTTask.loss

    def slow(task: SFTTask, rows: Any) -> Any:
        clock.seconds += 10  # two micro-batches a step
        return loss(task, rows)

    monkeypatch.setattr(SFTTask, "loss", slow)
    monkeypatch.setattr(loop, "time", clock)
    result = run(num_epochs=3, max_minutes=1.2, save_steps=save_steps, lr_scheduler_type="constant")
    assert (result.steps, result.finished) == (3, True)  # a fourth would end after 80 s, over the 72
    assert newest(result).name == "step-3"
    assert [line["step"] for line in lines(result, "evaluations")] == [0, 3]
    assert "stopping after step 3: the next would pass max_minutes 1.2" in capsys.readouterr().out


def test_a_finished_run_can_be_made_longer(run: Run, tmp_path: Path) -> None:
    words = {"lr_scheduler_type": "constant", "eval_steps": 2}
    whole = run(output_dir=str(tmp_path / "whole"), max_steps=4, **words)
    run(max_steps=2, **words)
    for _ in range(2):  # the second time there is nothing left to do
        parts = run(max_steps=4, resume=True, **words)
        assert parts.steps == 4
        assert lines(parts) == lines(whole)
        assert lines(parts, "evaluations") == lines(whole, "evaluations")


# ---------------------------------------------------------------------------------------------------------- what is odd


def test_two_rows_are_enough(run: Run) -> None:
    result = run(rows=ROWS[:2], batch_size=32, num_epochs=3, held_out=HELD_OUT[:1])
    assert result.steps == 3
    evaluation = lines(result, "evaluations")[-1]
    assert evaluation["loss"]["mean"] > 0
    assert evaluation["loss"]["low"] is None  # one example says nothing of the spread


def test_one_row_is_enough_to_learn_it_by_heart(run: Run) -> None:
    result = run(rows=ROWS[4:5], num_epochs=30, learning_rate=1e-2, held_out=None)
    assert lines(result)[-1]["loss"] < 0.2
    assert not (result.output_dir / "evaluations.jsonl").read_text()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rows": []}, "has no rows in split 'train'"),
    ({"rows": [{"prompt": "a"}]}, "has no column `completion`, only `prompt`; examples are in `completion`, `mess"),
    ({"rows": [{"completion": "a"}]}, "has no column `prompt`, only `completion`; name the right one"),
    ({"rows": [{"prompt": "a", "completion": " "}]}, "nothing is left .* 1 row left out: a completion is empty"),
    ({"rows": [{"prompt": "a", "completion": None}]}, "row 0 of the list of prompts: `completion` is missing; it must"),
    ({"rows": [{"prompt": " ", "completion": "b"}]}, "row 0 of the list of prompts: the prompt is empty"),
    ({"max_prompt_length": 3}, "12 rows left out: its prompt is longer than max_prompt_length=3 tokens"),
    ({"max_length": 5}, "12 examples left out: nothing to learn stands within max_length=5 tokens"),
    ({"rows": [{"messages": turns("a")}]}, "1 conversation left out: no turn of the assistant has text"),
    ({"rows": [{"messages": "a"}]}, "row 0 of the list of prompts: `messages` is of type str; it must be a list"),
    ({"rows": [{"messages": [{"role": "user"}]}]}, "is not a turn like"),
    ({"rows": [{"text": 3}]}, "row 0 of the list of prompts: `text` is of type int; it must be a string"),
    ({"rows": [{"text": ""}]}, "1 row left out: a text is empty"),
    ({"rows": [{"prompt": "x" * 300, "completion": "y"}], "max_prompt_length": 512}, "reads at most 256; set max_len"),
    ({"held_out": [{"prompt": "a", "completion": ""}]}, "nothing is left"),
    ({"trainable_layers": 9}, "out of range"),
    ({"model": "no/such-model"}, "could not be loaded"),
    ({"report_to": ["trackio", "wandb", "tensorboard"]}, "needs the package"),
]


@pytest.mark.parametrize("words, sentence", REFUSED)
def test_what_cannot_be_learned_from_is_refused_in_one_sentence(
    run: Run, tmp_path: Path, words: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(PairtuneError, match=sentence) as caught:
        run(**words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_conversations_need_a_chat_template(run: Run, tiny_model_folder: str, tmp_path: Path) -> None:
    Path(tiny_model_folder, "chat_template.jinja").unlink()
    with pytest.raises(PairtuneError, match=r"conversations, but the tokenizer of .* has no chat template"):
        run(rows=[{"messages": turns("a", "b")}], chat="auto")
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there_is_not_touched(run: Run) -> None:
    folder = run().output_dir
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(PairtuneError, match="holds a run; --resume goes on with it, --overwrite replaces it"):
        run()
    with pytest.raises(PairtuneError, match=r"learning_rate was 0\.001"):
        run(resume=True, learning_rate=1.0)
    with pytest.raises(PairtuneError, match="nothing is left"):
        run(overwrite=True, max_length=2)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(overwrite=True, max_steps=1).steps == 1


def test_a_gradient_that_is_not_finite_ends_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = Scorer.logprobs
    monkeypatch.setattr(Scorer, "logprobs", lambda *a, **k: tuple(x * torch.inf for x in scored(*a, **k)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(PairtuneError, match=r"the gradient of step 1 is not finite \(.*lower learning_rate"):
            run(held_out=None)


def test_what_is_left_out_or_does_nothing_is_said(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS, {"prompt": "q", "completion": ""}]
    run(rows=rows, held_out=[*HELD_OUT, {"prompt": "q" * 20, "completion": "a"}], max_prompt_length=9, warmup_steps=99)
    shown = capsys.readouterr().out
    assert "\n1 row left out: a completion is empty\n" in "\n" + shown
    assert "\nheld-out: 1 row left out: its prompt is longer than max_prompt_length=9 tokens\n" in shown
    assert "note: warmup_steps is 99, but the run has only 3 updates" in shown


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": turns(f"say {word}", word, "again", word)} for word in WORDS],
        [{"text": f"{word} and {word}"} for word in WORDS],
        [{"prompt": turns(word), "completion": [{"role": "assistant", "content": word}]} for word in WORDS],
        [{"prompt": word, "chosen": word, "rejected": "no"} for word in WORDS],
    ],
    ids=["conversations", "text", "turns", "chosen"],
)
def test_every_form_of_a_dataset_is_learned(run: Run, rows: list[dict[str, Any]]) -> None:
    words = {"completion_column": "chosen"} if "chosen" in rows[0] else {}
    result = run(rows=rows, held_out=rows, num_epochs=20, learning_rate=1e-2, chat="auto", **words)
    evaluations = lines(result, "evaluations")
    assert evaluations[-1]["perplexity"]["mean"] < 0.5 * evaluations[0]["perplexity"]["mean"]


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_the_evaluation_is_that_of_a_plain_loop(run: Run, tiny_tokenizer: Any, tiny_gpt2: Any) -> None:
    held_out = [{"prompt": f"{word} ", "completion": word * n} for word in WORDS for n in range(1, 8)]
    plain = copy.deepcopy(tiny_gpt2)
    result = run(model=tiny_gpt2, tokenizer=tiny_tokenizer, held_out=held_out, num_eval_examples=19)
    line = lines(result, "evaluations")[0]
    nats, counts = [], []
    with torch.no_grad():
        for row in held_out[:19]:
            completion = [*tiny_tokenizer(row["completion"])["input_ids"], EOS_ID]
            nats.append(plain_nats(plain, tiny_tokenizer(row["prompt"])["input_ids"], completion).item())
            counts.append(len(completion))
    assert (line["num_examples"], line["num_tokens"]) == (19, sum(counts))
    assert line["loss"]["mean"] == pytest.approx(sum(nats) / sum(counts), rel=1e-5)
    # Each example with its own tokens, in whatever order they were read.
    expected = bootstrap_ratio(torch.tensor(nats), torch.tensor(counts))
    assert line["loss"] == pytest.approx(expected._asdict(), rel=1e-4)


# -------------------------------------------------------------------------------------------------------- command line


def test_the_command_line_from_end_to_end(
    tiny_model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "answers.jsonl"
    rows = [{**row, "split": "train"} for row in ROWS] + [{**row, "split": "test"} for row in HELD_OUT]
    file.write_text("\n".join(map(json.dumps, rows)))
    run_dir = tmp_path / "run"
    words = ["--model", tiny_model_folder, "--dataset", str(file), "--chat", "never", "--dtype", "float32"]
    words += ["--device", "cpu", "--output_dir", str(run_dir)]
    assert main(["sft", *words, "--batch_size", "5"]) == 0
    assert [line["step"] for line in lines(run_dir)] == [1, 2, 3]
    assert [line["step"] for line in lines(run_dir, "evaluations")] == [0, 3]
    assert "held-out, step 3  loss" in capsys.readouterr().out
    assert main(["sft", "--resume", "--output_dir", str(run_dir)]) == 0
    assert main(["sft", *words, "--overwrite", "--completion_column", "chosen"]) == 2
    assert "has no column `chosen`" in capsys.readouterr().err

    # And on to the third stage.
    reward = tmp_path / "reward.py"
    reward.write_text("def length(completions, **_):\n    return [float(len(text)) for text in completions]\n")
    words[1], words[-1] = str(run_dir), str(tmp_path / "aligned")
    going_on = ["--reward_funcs", f"{reward}:length", "--max_steps", "1", "--batch_size", "2"]
    assert main(["train", *words, *going_on, "--max_completion_length", "4"]) == 0
    assert lines(tmp_path / "aligned")[0]["kl"] == 0


def test_a_full_gpu_is_a_sentence_and_what_was_done_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an update, and in the evaluation after the last one."""

    def fails_once(place: Any, name: str, at: int) -> None:
        real, calls = getattr(place, name), Counter[str]()

        def full(*args: Any, **words: Any) -> Any:
            calls[name] += 1
            if calls[name] == at:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
            return real(*args, **words)

        monkeypatch.setattr(place, name, full)

    words = {"max_steps": 4, "micro_batch_size": 4}
    whole = run(**words, output_dir=str(tmp_path / "whole"))
    for place, at, label, step in (
        (SFTTask.loss, 3, "updating", 2),
        (SFTTask.evaluate, 1, "evaluating on held-out", 4),
    ):
        fails_once(SFTTask, place.__name__, at)
        match = (
            f"out of memory while {label}.* \\(for 2.50 GiB more\\); lower micro_batch_size, .*; step-{step} is kept"
        )
        with pytest.raises(PairtuneError, match=match):
            run(**words, resume=step == 4)
        assert newest(tmp_path / "run").name == f"step-{step}"
    again = run(**words, resume=True)
    assert lines(again) == lines(whole)
    assert lines(again, "evaluations") == lines(whole, "evaluations")
    for key, tensor in checkpoint.load(newest(whole))[0].items():
        assert torch.equal(checkpoint.load(newest(again))[0][key], tensor)
