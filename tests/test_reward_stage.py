"""`reward` from end to end on tiny models: one score everywhere, what is learned, what is measured, what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHAT_TEMPLATE, EOS_ID, PAD_ID, SPECIAL_TOKENS, VOCAB_SIZE, build_tiny_model, interrupt_update
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pairtune import PairtuneError
from pairtune.cli import main
from pairtune.config import RewardConfig, config_to_yaml
from pairtune.data import RawPrompts
from pairtune.feedback.comparisons import Comparisons, encode_comparisons, evaluate_comparisons
from pairtune.feedback.reward_model import SHIFT, RewardModel
from pairtune.models.loading import load_tokenizer
from pairtune.models.logprobs import make_layout
from pairtune.models.reward_backbone import ADAPTER, PAD_TOKEN, RewardBackbone, choose_pad_token, load_reward_backbone
from pairtune.models.values import ValueNetwork
from pairtune.runs import checkpoint
from pairtune.runs.metrics import read_jsonl, without_times
from pairtune.stages.reward import RewardTask, _report_json, reward
from pairtune.stages.rl import TrainResult
from pairtune.types import Completions

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
NEWLINE_TEMPLATE = CHAT_TEMPLATE.replace("<|end|>{% endfor %}", "<|end|>\n{% endfor %}")
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "layers": {"trainable_layers": 1},
    "lora": {"lora_r": 4, "lora_alpha": 8},
}
Run = Callable[..., TrainResult]


def separable(count: int, seed: int) -> list[dict[str, Any]]:
    """The chosen answer asks and the other shouts; which of the two is longer is left to chance."""
    draw = random.Random(seed)
    rows = []
    for n in range(count):
        answers = ["".join(draw.choices("ab", k=draw.randint(2, 8))) for _ in range(2)]
        rows.append({"prompt": f"{n % 7}: ", "chosen": f"{answers[0]}?", "rejected": f"{answers[1]}!"})
    return rows


ROWS, HELD_OUT = separable(64, 0), separable(40, 1)
RANKED = [
    {"prompt": "p: ", "completions": ["aa!", "b?", "c"], "ranks": [1, 2, 3]},
    {"prompt": "q: ", "completions": ["dddd", "e"], "ranks": [7, 3]},
    {"prompt": "r: ", "completions": ["ff", "g", "h", "i"], "ranks": [2, 1, 2, 4]},
]


@pytest.fixture
def run(tiny_model_folder: str, tmp_path: Path) -> Run:
    """reward() on the tiny Llama; every word of RewardConfig may be given."""

    def start(*, rows: Any = ROWS, held_out: Any = HELD_OUT, **words: Any) -> TrainResult:
        settings = {
            "model": tiny_model_folder,
            "dataset": "passed in",
            "chat": "never",
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 16,
            "learning_rate": 3e-3,
            "eval_steps": 0,
            "save_steps": 0,
            "output_dir": str(tmp_path / "run"),
        }
        if held_out is None:
            settings["dataset_test_split"] = None
        return reward(RewardConfig(**{**settings, **words}), train_dataset=rows, eval_dataset=held_out)

    return start


def config(**words: Any) -> RewardConfig:
    return RewardConfig(**{"model": "m", "dataset": "d", "chat": "never", **words})


def comparisons(tokenizer: Any, rows: list[dict[str, Any]], **words: Any) -> Comparisons:
    return encode_comparisons(rows, "the rows", config(**words), tokenizer)


def backbone_of(tokenizer: Any, kind: str = "llama", *, double: bool = False, **ways: Any) -> RewardBackbone:
    model = build_tiny_model(kind)
    return load_reward_backbone(model.double() if double else model, tokenizer=tokenizer, device="cpu", **ways)


def task_of(tokenizer: Any, rows: list[dict[str, Any]], *, ways: Any = None, **words: Any) -> RewardTask:
    """A task in float64 on the tiny Llama."""
    data = comparisons(tokenizer, rows, **words)
    return RewardTask(backbone_of(tokenizer, double=True, **(ways or {})), data, data, config=config(**words).reward)


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


def stage_scores(backbone: RewardBackbone, data: Comparisons) -> Tensor:
    """(N, K) as the stage computes them."""
    batch = data.closed.batch(range(len(data)))
    with torch.no_grad():
        return backbone.rewards(make_layout(batch.completions, shared=backbone.shared, with_last=True))


def transformers_scores(folder: Path, texts: list[str], *, special: bool, tokenizer: Any = None) -> list[float]:
    """What transformers' own class makes of texts, one right-padded batch."""
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(folder)
    model, found = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    assert model.config.num_labels == 1
    inputs = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=special, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, 0].tolist()


# ------------------------------------------------------------------------------------------------- one score everywhere


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["plain", "chat", "newline"])
def test_the_score_of_a_completion_is_one_number_everywhere(
    tiny_tokenizer: Any, tmp_path: Path, way: str, kind: str
) -> None:
    """In the stage, by transformers on text, and by RewardModel on sampled ids and on text."""
    chat = "never" if kind == "plain" else "always"
    if kind == "newline":
        tiny_tokenizer.chat_template = NEWLINE_TEMPLATE
    rows = [
        {"prompt": "abc: ", "chosen": "yes", "rejected": "no, and more"},
        {"prompt": "d ", "chosen": "a much longer one", "rejected": "a"},
    ]
    cap = 8  # of tokens; "no, and more" and the long one are cut
    data = comparisons(tiny_tokenizer, rows, chat=chat, max_completion_length=cap)
    backbone = backbone_of(tiny_tokenizer, **WAYS[way])
    with torch.no_grad():  # adapters begin as nothing, and would be merged for nothing
        for parameter in backbone.masters.parameters:
            parameter += 0.05 * torch.randn_like(parameter)
    expected = stage_scores(backbone, data).flatten().tolist()
    assert len({round(score, 3) for score in expected}) == 4
    backbone.save(tmp_path)

    behind = {"plain": END, "chat": END, "newline": f"{END}\n"}[kind]
    opened = [row["prompt"] if kind == "plain" else f"{USER}{row['prompt']}{END}{ASSISTANT}" for row in rows]
    if kind == "newline":
        opened = [text.replace(END, f"{END}\n") for text in opened]
    answers = [["yes", "no, and "], ["a much l", "a"]]
    texts = [
        opened[p] + answers[p][k] + (behind if len(answers[p][k]) < cap else "") for p in range(2) for k in range(2)
    ]
    assert transformers_scores(tmp_path, texts, special=False) == pytest.approx(expected, abs=1e-4)

    prompts = RawPrompts.from_rows([{"prompt": row["prompt"]} for row in rows]).encode(tiny_tokenizer, chat=chat)
    batch = prompts.batch([0, 1])
    policy_tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer.name_or_path)
    policy_tokenizer.chat_template = tiny_tokenizer.chat_template
    ids = torch.full((2, 2, cap), PAD_ID)
    for p in range(2):
        for k in range(2):
            written = tiny_tokenizer(answers[p][k])["input_ids"]
            written += [EOS_ID] if len(written) < cap else []
            ids[p, k, : len(written)] = torch.tensor(written)
    truncated = torch.tensor([[False, True], [True, False]])
    sampled = Completions(batch.ids, batch.mask, ids, ids != PAD_ID, torch.zeros(ids.shape), truncated, 0)
    for policy in (policy_tokenizer, None):  # from the ids, and from the text
        judge = RewardModel.from_pretrained(str(tmp_path), chat=chat, policy_tokenizer=policy)
        assert judge._reads_what_the_policy_reads(batch) == (policy is not None)
        assert judge.score(batch, sampled, answers) == pytest.approx(expected, abs=1e-4)


def test_what_transformers_writes_of_a_conversation_is_what_is_learned(tiny_tokenizer: Any, tmp_path: Path) -> None:
    """A finished answer ends as a rendered conversation does, for whoever scores it without pairtune."""
    tiny_tokenizer.chat_template = NEWLINE_TEMPLATE
    rows = [{"chosen": turns("a", "b", "c", "good"), "rejected": turns("a", "b", "c", "bad one")}]
    data = comparisons(tiny_tokenizer, rows, chat="auto")
    backbone = backbone_of(tiny_tokenizer)
    backbone.save(tmp_path)
    rendered = [tiny_tokenizer.apply_chat_template(rows[0][side], tokenize=False) for side in ("chosen", "rejected")]
    expected = stage_scores(backbone, data).flatten().tolist()
    assert transformers_scores(tmp_path, rendered, special=False) == pytest.approx(expected, abs=1e-4)
    # The newline is no token of the answer.
    assert [[len(one.ids) for one in group] for group in data.data.completions] == [[5, 8]]


def test_plain_text_gets_one_bos(tiny_tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import processors

    single = "<|begin|> $A"
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<|begin|>", 2)]
    )
    rows = [{"prompt": "a", "chosen": "b", "rejected": "cc"}]
    data = comparisons(tiny_tokenizer, rows)
    assert data.data.prompt_dataset.token_ids == [tiny_tokenizer("a")["input_ids"]]
    assert tiny_tokenizer("a")["input_ids"].count(2) == 1
    backbone = backbone_of(tiny_tokenizer)
    backbone.save(tmp_path)
    expected = stage_scores(backbone, data)[0].tolist()
    assert transformers_scores(tmp_path, [f"ab{END}", f"acc{END}"], special=True) == pytest.approx(expected, abs=1e-4)
    judge = RewardModel.from_pretrained(str(tmp_path), chat="never")
    batch = RawPrompts.from_rows(rows).encode(tiny_tokenizer, chat="never").batch([0])
    sampled = data.data.batch([0]).completions
    assert judge.score(batch, sampled, [["b", "cc"]]) == pytest.approx(expected, abs=1e-4)


def rounded_backbone(tokenizer: Any, dtype: torch.dtype = torch.bfloat16, **ways: Any) -> RewardBackbone:
    return load_reward_backbone(build_tiny_model("llama").to(dtype), tokenizer=tokenizer, device="cpu", **ways)


def test_a_reward_model_in_bfloat16_has_the_last_product_in_float32(tiny_tokenizer: Any, tmp_path: Path) -> None:
    rows = [{"prompt": "abc: ", "chosen": "yes", "rejected": "no, and more"}]
    data = comparisons(tiny_tokenizer, rows)
    backbone = rounded_backbone(tiny_tokenizer)
    backbone.save(tmp_path)
    judge = RewardModel.from_pretrained(str(tmp_path), chat="never", dtype="auto", policy_tokenizer=tiny_tokenizer)
    ids = tiny_tokenizer("abc: yes", return_tensors="pt")["input_ids"]
    ids = torch.cat([ids, torch.tensor([[EOS_ID]])], 1)
    with torch.no_grad():
        state = judge.model.base_model(input_ids=ids).last_hidden_state[0, -1]
    assert state.dtype == torch.bfloat16
    expected = (state.float() @ judge.model.score.weight[0].float()).item()
    assert expected != torch.tensor(expected).bfloat16().item()
    batch = RawPrompts.from_rows(rows).encode(tiny_tokenizer, chat="never").batch([0])
    judge.batch_size = 1  # no padding, which would round otherwise
    scores = judge.score(batch, data.data.batch([0]).completions, [["yes", "no, and more"]])
    assert scores[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_adapter_is_not_rounded_away_in_what_is_saved(
    tiny_tokenizer: Any, tmp_path: Path, dtype: torch.dtype
) -> None:
    backbone = rounded_backbone(tiny_tokenizer, dtype, **WAYS["lora"])
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if "lora_B" in name:  # small against the steps of bfloat16 at the size of a weight
                parameter.copy_(1e-4 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    backbone.save(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    judge = RewardModel.from_pretrained(str(tmp_path), chat="never", dtype="auto")
    assert judge.model.dtype == torch.float32
    layer = "model.layers.1.mlp.up_proj"
    adapter = backbone.model.get_submodule(layer)
    base, delta = adapter.base_layer.weight.float(), adapter.get_delta_weight(ADAPTER).float()
    learned = judge.model.get_submodule(layer).weight - base
    assert delta.abs().max() > 0
    torch.testing.assert_close(learned, delta, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "qwen2", "qwen3", "gpt2", "mistral"])
def test_every_architecture_is_scored_as_transformers_scores_it(tiny_tokenizer: Any, tmp_path: Path, kind: str) -> None:
    """Shared prompts and rows of their own, completions of one token and of many."""
    rows = [{"prompt": "ab", "completions": ["z", "x", "long one", "yy"], "ranks": [1, 2, 3, 4]}]
    data = comparisons(tiny_tokenizer, rows)
    backbone = backbone_of(tiny_tokenizer, kind)
    assert backbone.shared == (kind != "mistral")
    backbone.save(tmp_path)
    texts = [f"ab{text}{END}" for text in rows[0]["completions"]]
    expected = stage_scores(backbone, data)[0].tolist()
    # AutoTokenizer takes the tiny tokenizer beside a Qwen for Qwen's own, which splits otherwise.
    got = transformers_scores(tmp_path, texts, special=False, tokenizer=tiny_tokenizer)
    assert got == pytest.approx(expected, abs=1e-4)


def test_a_completion_of_one_token_is_read_at_its_own_token(tiny_tokenizer: Any) -> None:
    """Where the token before it stands, behind the prompt, is another place in a shared row."""
    backbone = backbone_of(tiny_tokenizer)
    ids = torch.tensor([[[EOS_ID, 0], [30, EOS_ID], [EOS_ID, 0]]])
    prompt = torch.tensor([[20, 21]])
    sampled = Completions(
        prompt, prompt > 0, ids, ids > 0, torch.zeros(ids.shape), torch.zeros(1, 3, dtype=torch.bool), 0
    )
    with torch.no_grad():
        got = backbone.rewards(make_layout(sampled, shared=True, with_last=True))[0]
        wanted = [
            backbone.model(torch.tensor([row])).logits[0, 0] for row in ([20, 21, 1], [20, 21, 30, 1], [20, 21, 1])
        ]
    assert torch.allclose(got, torch.stack(wanted), atol=1e-5)


# ------------------------------------------------------------------------------------------------------ padding and hea


def test_a_tokenizer_that_pads_with_eos_gets_a_spare_special_token(tiny_tokenizer: Any, tmp_path: Path) -> None:
    tiny_tokenizer.pad_token = END
    before = dict(tiny_tokenizer.get_vocab())
    backbone = backbone_of(tiny_tokenizer)
    assert backbone.tokenizer.get_vocab() == before
    # Of "<|pad|>", "<|begin|>" (BOS), "<|unknown|>" and the three of the template one is left.
    assert (backbone.tokenizer.pad_token, backbone.model.config.pad_token_id) == ("<|pad|>", PAD_ID)
    backbone.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).pad_token == "<|pad|>"
    finished, cut = transformers_scores(tmp_path, [f"ab{END}", "ab"], special=False)
    assert abs(finished - cut) > 1e-3


def test_which_token_pads(tiny_tokenizer: Any) -> None:
    assert choose_pad_token(tiny_tokenizer, [EOS_ID]) == "<|pad|>"
    assert choose_pad_token(tiny_tokenizer, [EOS_ID, PAD_ID]) is None  # what ends a text cannot pad
    tiny_tokenizer.chat_template = None
    assert choose_pad_token(tiny_tokenizer, [EOS_ID, PAD_ID]) == SPECIAL_TOKENS[-1]
    tiny_tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_1|>", "<|zzz|>"]})
    assert choose_pad_token(tiny_tokenizer, [EOS_ID, PAD_ID]) == "<|reserved_1|>"


@pytest.mark.parametrize("num_rows", [VOCAB_SIZE, VOCAB_SIZE + 8], ids=["full", "rows to spare"])
def test_a_tokenizer_without_a_spare_token_gets_one_and_no_id_changes(
    tiny_tokenizer: Any, tmp_path: Path, num_rows: int
) -> None:
    tiny_tokenizer.pad_token = END
    tiny_tokenizer.chat_template += "{# <|pad|> #}"
    before = dict(tiny_tokenizer.get_vocab())
    model = build_tiny_model("llama", vocab_size=num_rows)
    backbone = load_reward_backbone(model, tokenizer=tiny_tokenizer, device="cpu")
    assert backbone.tokenizer.pad_token == PAD_TOKEN
    assert before.items() <= backbone.tokenizer.get_vocab().items()
    rows_now = backbone.model.get_input_embeddings().weight.shape[0]
    assert rows_now == max(num_rows, VOCAB_SIZE + 1)
    data = comparisons(backbone.tokenizer, ROWS[:2])
    backbone.save(tmp_path)
    texts = [row["prompt"] + row[side] + END for row in ROWS[:2] for side in ("chosen", "rejected")]
    expected = stage_scores(backbone, data).flatten().tolist()
    assert transformers_scores(tmp_path, texts, special=False) == pytest.approx(expected, abs=1e-4)
    # The policy, whose tokenizer lacks the token, still writes ids that the reward model reads as they are.
    policy_tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer.name_or_path)
    assert RewardModel.from_pretrained(str(tmp_path), policy_tokenizer=policy_tokenizer).same_vocabulary


def test_the_head_starts_as_it_should_and_has_no_bias(tiny_tokenizer: Any) -> None:
    import transformers

    tiny = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=512, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    one, two, other = (
        load_reward_backbone(transformers.LlamaForCausalLM(tiny), tokenizer=tiny_tokenizer, device="cpu", seed=seed)
        for seed in (0, 0, 1)
    )
    weight = one.model.score.weight
    assert weight.shape == (1, 512)
    assert one.model.score.bias is None
    assert weight.std().item() == pytest.approx(513**-0.5, rel=0.1)
    assert abs(weight.mean().item()) < 4 * 513**-0.5 / 512**0.5
    assert torch.equal(weight, two.model.score.weight)
    assert not torch.equal(weight, other.model.score.weight)
    assert "model.embed_tokens.weight" in one.masters.names
    assert "score.weight" in one.masters.names


def test_what_is_trained(tiny_tokenizer: Any) -> None:
    assert all("layers.0" not in name and "embed" not in name for name in backbone_names(tiny_tokenizer, "layers"))
    assert all("lora_" in name for name in backbone_names(tiny_tokenizer, "lora") if name != "score.weight")
    for way in WAYS:
        assert "score.weight" in backbone_names(tiny_tokenizer, way)


def backbone_names(tokenizer: Any, way: str) -> list[str]:
    return backbone_of(tokenizer, **WAYS[way]).masters.names


def test_a_value_network_starts_from_it(tiny_tokenizer: Any, tmp_path: Path) -> None:
    backbone_of(tiny_tokenizer).save(tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert ValueNetwork(model).name == "value_model"


def test_training_goes_on_from_a_reward_model(tiny_tokenizer: Any, tmp_path: Path) -> None:
    first = backbone_of(tiny_tokenizer)
    first.save(tmp_path)
    again = load_reward_backbone(str(tmp_path), dtype="float32", device="cpu", seed=5)
    assert torch.equal(again.model.score.weight, first.model.score.weight)
    data = comparisons(tiny_tokenizer, ROWS[:3])
    assert torch.equal(stage_scores(again, data), stage_scores(first, data))


def test_the_shift_is_off_and_where_asked_for_makes_the_best_have_mean_0(run: Run, tiny_tokenizer: Any) -> None:
    result = run(max_steps=1, held_out=None)
    assert not hasattr(result.model.config, SHIFT)
    result = run(max_steps=1, held_out=None, reward={"normalise_mean": True}, overwrite=True)
    judge = RewardModel.from_pretrained(str(newest(result)), chat="never", policy_tokenizer=tiny_tokenizer)
    data = comparisons(tiny_tokenizer, ROWS)
    batch = data.data.batch(range(len(ROWS)))
    scores = judge.score(batch.prompts, batch.completions, [])
    assert abs(judge.shift) > 1e-3
    assert sum(scores[::2]) / len(ROWS) == pytest.approx(0, abs=1e-4)


# -------------------------------------------------------------------------------------------------------------- the los


def plain_scores(task: RewardTask, rows: list[dict[str, Any]]) -> list[list[Tensor]]:
    """Every completion behind its prompt alone, by the saved class."""
    tokenizer = task.tokenizer
    return [
        [
            task.model(torch.tensor([tokenizer(row["prompt"] + text + END)["input_ids"]])).logits[0, 0]
            for text in (row["completions"] if "completions" in row else (row["chosen"], row["rejected"]))
        ]
        for row in rows
    ]


def plackett_luce(scores: list[Tensor], ranks: list[int]) -> Tensor:
    """Without ties."""
    order = sorted(range(len(ranks)), key=lambda k: ranks[k])
    ordered = torch.stack([scores[k] for k in order])
    return torch.stack([ordered[k:].logsumexp(0) - ordered[k] for k in range(len(ranks))]).sum()


LOSSES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Callable[[Any, list[Tensor]], Tensor]]] = {
    "pairs": (ROWS[:5], {}, lambda row, r: -logsigmoid(r[0] - r[1])),
    "margin": (
        [{**row, "margin": n / 2} for n, row in enumerate(ROWS[:5])],
        {},
        lambda row, r: -logsigmoid(r[0] - r[1] - row["margin"]),
    ),
    "probability": (
        [{**row, "probability": n / 4} for n, row in enumerate(ROWS[:5])],
        {},
        lambda row, r: (
            -row["probability"] * logsigmoid(r[0] - r[1]) - (1 - row["probability"]) * logsigmoid(r[1] - r[0])
        ),
    ),
    "smoothing": (
        ROWS[:5],
        {"reward": {"label_smoothing": 0.1}},
        lambda row, r: -0.9 * logsigmoid(r[0] - r[1]) - 0.1 * logsigmoid(r[1] - r[0]),
    ),
    "centring": (
        ROWS[:5],
        {"reward": {"centring": 0.25}},
        lambda row, r: -logsigmoid(r[0] - r[1]) + 0.25 * (r[0] + r[1]) ** 2,
    ),
    "ranking": (RANKED[:2], {}, lambda row, r: plackett_luce(r, row["ranks"])),
    "pairwise": (
        RANKED,
        {"reward": {"loss": "pairwise"}},
        lambda row, r: torch.stack(
            [-logsigmoid(r[i] - r[j]) for i, a in enumerate(row["ranks"]) for j, b in enumerate(row["ranks"]) if a < b]
        ).mean(),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_a_plain_loop(tiny_tokenizer: Any, name: str) -> None:
    rows, words, loss_of = LOSSES[name]
    task = task_of(tiny_tokenizer, rows, **words)
    output = task.loss(range(len(rows)))
    output.total.backward()
    got = {n: p.grad.clone() for n, p in task.model.named_parameters()}
    task.model.zero_grad()
    expected = torch.stack([loss_of(row, r) for row, r in zip(rows, plain_scores(task, rows), strict=True)]).sum()
    expected.backward()
    assert output.total.item() == pytest.approx(expected.item(), rel=1e-9)
    for n, parameter in task.model.named_parameters():
        # Norms and rotations are computed in float32 by transformers.
        assert torch.allclose(got[n], parameter.grad, rtol=1e-5, atol=1e-6), n


def test_two_ranked_completions_are_a_pair(tiny_tokenizer: Any) -> None:
    as_ranks = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "ranks": [2, 1]} for row in ROWS[:6]
    ]
    pairs, ranks = (task_of(tiny_tokenizer, rows).loss(range(6)) for rows in (ROWS[:6], as_ranks))
    pairwise = task_of(tiny_tokenizer, as_ranks, reward={"loss": "pairwise"}).loss(range(6))
    assert ranks.total.item() == pytest.approx(pairs.total.item(), rel=1e-12)
    assert pairwise.total.item() == pytest.approx(pairs.total.item(), rel=1e-12)
    for name, (total, count) in pairs.metrics.items():
        assert ranks.metrics[name] == pytest.approx((total, count))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", [ROWS[:6], RANKED], ids=["pairs", "ranked"])
def test_how_an_update_is_cut_changes_nothing(tiny_tokenizer: Any, way: str, rows: list[dict[str, Any]]) -> None:
    task = task_of(tiny_tokenizer, rows, ways=WAYS[way])
    whole = task.loss(range(len(rows)))
    whole.total.backward()
    gradients = [p.grad.clone() for p in task.masters.parameters]
    for p in task.masters.parameters:
        p.grad = None
    cut = [task.loss(part) for part in ([0], list(range(1, len(rows))))]
    for part in cut:
        part.total.backward()
    for gradient, parameter in zip(gradients, task.masters.parameters, strict=True):
        assert torch.allclose(gradient, parameter.grad, rtol=1e-5, atol=1e-6)
    for name, (total, count) in whole.metrics.items():
        assert [sum(part.metrics[name][i] for part in cut) for i in (0, 1)] == pytest.approx([total, count])
    assert task.counted(range(len(rows))) == len(rows)
    assert whole.num_tokens == sum(map(task.length, range(len(rows))))


def test_metrics_count_what_the_labels_decide(tiny_tokenizer: Any) -> None:
    rows = [{**row, "probability": p} for row, p in zip(ROWS, (1.0, 0.25, 0.5), strict=False)]
    task = task_of(tiny_tokenizer, rows)
    (first, second, _) = [[r.item() for r in pair] for pair in plain_scores(task, rows)]
    leads = [first[0] - first[1], second[1] - second[0]]
    metrics = task.loss(range(3)).metrics
    assert metrics["accuracy"] == (sum(lead > 0 for lead in leads), 2)
    assert metrics["margin"] == pytest.approx((sum(leads), 2))
    assert metrics["reward"][1] == 6


# --------------------------------------------------------------------------------------------------------- one long run


@pytest.mark.parametrize("way", WAYS)
def test_a_separable_preference_is_learned(run: Run, way: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One run, many assertions."""
    rate = {"full": 3e-3, "layers": 1e-2, "lora": 1e-2}[way]
    result = run(num_epochs=8, learning_rate=rate, eval_steps=10, **WAYS[way])
    assert (result.steps, result.finished) == (32, True)
    first, *_, last = lines(result, "evaluations")
    assert last["accuracy"]["mean"] > 0.9 > first["accuracy"]["mean"] + 0.1
    assert last["log_likelihood"]["mean"] > first["log_likelihood"]["mean"]
    metrics = lines(result)
    assert metrics[-1]["loss"] < 0.5 * metrics[0]["loss"]
    assert {"accuracy", "margin", "reward", "grad_norm", "epoch", "num_tokens"} <= metrics[-1].keys()

    report = json.loads((result.output_dir / "reward_report.json").read_text())
    assert report["step"] == 32
    evaluation = report["evaluation"]
    assert evaluation["beats_length_baselines"] is True
    assert evaluation["accuracy"] == last["accuracy"]
    assert evaluation["length"]["longer_wins"]["model_minus_baseline"]["low"] > 0
    assert evaluation["num_pairs"] == last["num_pairs"] == 40
    out = capsys.readouterr().out
    for words in ("accuracy", "the longer one wins", "the shorter one wins", "temperature", "held-out pairs"):
        assert words in out

    # What was learned is what is saved, for transformers and for the third stage.
    judge = RewardModel.from_pretrained(str(newest(result)), chat="never")
    texts = [row["prompt"] + row[side] + END for row in HELD_OUT for side in ("chosen", "rejected")]
    scores = torch.tensor(transformers_scores(newest(result), texts, special=False)).view(-1, 2)
    assert (scores[:, 0] > scores[:, 1]).double().mean().item() == pytest.approx(last["accuracy"]["mean"])
    assert judge.pad_token_id == PAD_ID


def test_rankings_are_learned(run: Run) -> None:
    draw = random.Random(3)

    def ranked(count: int) -> list[dict[str, Any]]:
        groups = [draw.sample(["a!!", "bbb?", "c.", "dd;"], k=draw.randint(2, 4)) for _ in range(count)]
        return [{"prompt": "p", "completions": g, "ranks": ["!?.;".index(x[-1]) for x in g]} for g in groups]

    result = run(rows=ranked(48), held_out=ranked(20), num_epochs=5, micro_batch_size=4)
    last = lines(result, "evaluations")[-1]
    assert last["accuracy"]["mean"] > 0.9
    assert last["num_pairs"] > last["num_prompts"] == 1


def test_a_resumed_run_is_the_same_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(output_dir=str(tmp_path / "whole"), eval_steps=3, lora_r=4)
    interrupt_update(monkeypatch, 2)
    parted = run(output_dir=str(tmp_path / "parted"), eval_steps=3, lora_r=4)
    assert (parted.steps, parted.finished) == (2, False)
    assert not (parted.output_dir / "reward_report.json").exists()
    parted = run(output_dir=str(tmp_path / "parted"), eval_steps=3, lora_r=4, resume=True)
    assert lines(parted) == lines(whole)
    assert lines(parted, "evaluations") == lines(whole, "evaluations")
    for file in ("model.safetensors", "state.safetensors"):
        names = [next(newest(one).rglob(file), None) for one in (whole, parted)]
        if names[0] is not None:
            assert names[0].read_bytes() == names[1].read_bytes()
    reports = [(one.output_dir / "reward_report.json").read_text() for one in (whole, parted)]
    assert reports[0] == reports[1]


def test_the_verb_runs_from_a_file(tiny_model_folder: str, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{**row, "split": split} for split, part in (("train", ROWS), ("test", HELD_OUT)) for row in part]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = config(model=tiny_model_folder, dataset=str(data), output_dir=str(tmp_path / "run"), max_steps=2)
    (tmp_path / "c.yaml").write_text(config_to_yaml(words.model_copy(update={"device": "cpu", "dtype": "float32"})))
    assert main(["reward", "--config", str(tmp_path / "c.yaml"), "--reward.centring", "0.01"]) == 0
    assert (tmp_path / "run" / "reward_report.json").exists()


# ------------------------------------------------------------------------------------------------------------ the repor


def test_the_report_reads_labels_margins_and_lengths(tiny_tokenizer: Any) -> None:
    rows = [
        {"prompt": "p", "chosen": "aaaa", "rejected": "b", "margin": 1.0},
        {"prompt": "p", "chosen": "c", "rejected": "dd", "margin": 2.0},
        {"prompt": "q", "chosen": "e", "rejected": "f", "margin": 2.0},
    ]
    data = comparisons(tiny_tokenizer, rows)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
    report = evaluate_comparisons(data, rewards)
    assert (report.num_pairs, report.num_prompts, report.accuracy.mean) == (3, 2, pytest.approx(2 / 3))
    assert report.length.longer_wins.accuracy.mean == pytest.approx(0.5)
    assert report.length.chosen_longer.accuracy.mean == 1
    assert report.length.chosen_shorter.accuracy.mean == 0
    assert report.by_margin is not None
    assert [(one.low, one.accuracy.mean) for one in report.by_margin] == [(1.0, 1.0), (2.0, 0.5)]
    soft = [
        {key: value for key, value in row.items() if key != "margin"} | {"probability": p}
        for row, p in zip(rows, (0.9, 0.2, 0.5), strict=True)
    ]
    report = evaluate_comparisons(comparisons(tiny_tokenizer, soft), rewards)
    assert (report.num_pairs, report.accuracy.mean) == (2, 1.0)  # the second label is for the rejected one
    ranked = comparisons(tiny_tokenizer, RANKED)
    report = evaluate_comparisons(
        ranked, torch.tensor([[3.0, 2, 1, math.nan], [0, 1, math.nan, math.nan], [1, 2, 1, 0]])
    )
    assert (report.num_pairs, report.accuracy.mean) == (3 + 1 + 5, 1.0)


@pytest.mark.parametrize("chat", ["never", "always"])
def test_evaluate_measures_any_reward_model_alike(
    tiny_tokenizer: Any, tmp_path: Path, chat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_tokenizer.chat_template = NEWLINE_TEMPLATE
    backbone = backbone_of(tiny_tokenizer)
    backbone.save(tmp_path / "model")
    data = comparisons(tiny_tokenizer, HELD_OUT, chat=chat)
    task = RewardTask(backbone, data, data)
    with torch.no_grad():
        expected = task.evaluate(lambda rows: None)
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in HELD_OUT))
    words = ["--reward_model", str(tmp_path / "model"), "--dataset", str(path), "--chat", chat, "--device", "cpu"]
    assert main(["evaluate", *words, "--output", str(tmp_path / "out.json")]) == 0
    assert "the shorter one wins" in capsys.readouterr().out
    got = json.loads((tmp_path / "out.json").read_text())["evaluation"]
    assert got["accuracy"] == expected["accuracy"]
    assert got["log_likelihood"]["mean"] == pytest.approx(expected["log_likelihood"]["mean"], abs=1e-4)
    ranked = tmp_path / "ranked.jsonl"
    ranked.write_text("".join(json.dumps(row) + "\n" for row in RANKED))
    words[3] = str(ranked)
    assert main(["evaluate", *words, "--output", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["evaluation"]["num_pairs"] == 9


def test_one_row_and_no_held_out_rows(run: Run) -> None:
    result = run(rows=ROWS[:1], held_out=HELD_OUT[:1], max_steps=2)
    (_, last) = lines(result, "evaluations")
    assert last["accuracy"]["low"] is None
    assert json.loads((result.output_dir / "reward_report.json").read_text())["evaluation"]["num_pairs"] == 1
    result = run(held_out=None, max_steps=1, overwrite=True)
    assert not (result.output_dir / "reward_report.json").exists()


def test_what_is_no_number_is_null_in_the_report(tiny_tokenizer: Any) -> None:
    data = comparisons(tiny_tokenizer, HELD_OUT[:1])
    task = RewardTask(backbone_of(tiny_tokenizer), data, data)
    with torch.no_grad():
        task.evaluate(lambda rows: None)
    task.reward_std = math.nan
    text = _report_json(task, data, data, 1)
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["reward_std"] is None


# ------------------------------------------------------------------------------------------------------------- the data


def test_what_cannot_be_learned_from_is_left_out_and_counted(tiny_tokenizer: Any) -> None:
    rows = [
        *ROWS[:2],
        {"prompt": "p", "chosen": "a", "rejected": "a"},
        {"prompt": "p", "chosen": "", "rejected": "a"},
        {"prompt": "a long prompt", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "same start 1", "rejected": "same start 2"},
    ]
    data = comparisons(tiny_tokenizer, rows, max_prompt_length=8, max_completion_length=9)
    assert len(data) == 2
    assert data.data.notes == [
        "1 row left out: chosen and rejected are identical",
        "1 row left out: a completion is empty",
        "1 prompt left out: its completions do not differ within max_completion_length=9 tokens",
        "1 prompt left out: longer than max_prompt_length",
        "2 completions cut at max_completion_length=9",
    ]
    tied = [
        *RANKED,
        {"prompt": "s", "completions": ["a", "b"], "ranks": [1, 1]},
        {"prompt": "t", "completions": ["a"], "ranks": [1]},
    ]
    data = comparisons(tiny_tokenizer, tied)
    assert data.data.notes == [
        "1 prompt left out: all its completions have one rank",
        "1 prompt left out: fewer than two scored completions",
    ]


def test_rankings_of_one_prompt_are_not_mixed(tiny_tokenizer: Any) -> None:
    data = comparisons(tiny_tokenizer, [RANKED[0], {**RANKED[0], "ranks": [3, 2, 1]}])
    assert data.data.rewards == [[-1, -2, -3], [-3, -2, -1]]
    assert [data.decided(0)[0], data.decided(1)[0]] == [(0, 1), (1, 0)]


def test_a_long_dialogue_loses_its_oldest_turns(tiny_tokenizer: Any) -> None:
    system = {"role": "system", "content": "S"}
    asked = [system, *turns("first question", "first answer", "second", "x", "last")]
    rows = [
        {"prompt": asked, "chosen": "a", "rejected": "b"},
        {"prompt": turns("too long " * 9), "chosen": "a", "rejected": "b"},
    ]
    data = comparisons(tiny_tokenizer, rows, chat="auto", max_prompt_length=25)
    assert data.data.prompts == [[system, *turns("second", "x", "last")]]
    assert data.data.notes == [
        "1 prompt left out: longer than max_prompt_length",
        "1 dialogue longer than max_prompt_length lost their oldest turns",
    ]
    with pytest.raises(PairtuneError, match="are longer than max_prompt_length=25"):
        comparisons(tiny_tokenizer, rows, chat="auto", max_prompt_length=25, cut_dialogues=False)
    marked = "\n\nHuman: first question\n\nAssistant: first answer\n\nHuman: last\n\nAssistant:"
    data = comparisons(tiny_tokenizer, [{"chosen": f"{marked} a", "rejected": f"{marked} b"}], max_prompt_length=30)
    assert data.data.prompts == ["\n\nHuman: last\n\nAssistant:"]


@pytest.mark.parametrize(
    "rows, words, message",
    [
        ([{"prompt": "p", "text": "a"}], {}, "the rows has no column `chosen`, only `prompt`, `text`"),
        ([{**ROWS[0], "margin": "1"}], {}, "row 0 of the rows: the margin '1' in `margin` is not a finite number"),
        ([{**ROWS[0], "probability": 1.5}], {}, r"the probability 1.5 in `probability` is not a number from 0 to 1"),
        ([{**ROWS[0], "probability": 1.0, "margin": 1}], {}, "the rows has both `margin` and `probability`"),
        ([{**ROWS[0], "m": None}], {"margin_column": "m"}, "the margin None in `m` is not a finite number"),
        (
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [1]}],
            {},
            "must be lists of equal length, not a list of 2 and a",
        ),
        (
            [{"prompt": "p", "completions": ["a", "b"], "ranks": [1, 0.5]}],
            {},
            "row 0 of the rows: the rank 0.5 is not a whole",
        ),
        ([{"prompt": "p", "completions": ["a", "b"], "ranks": [1, True]}], {}, "the rank True is not a whole number"),
        (RANKED, {"reward": {"label_smoothing": 0.1}}, "the rows holds rankings, for which it has no meaning"),
        (
            [{"prompt": "p", "completions": list("abcdefghijklm"), "ranks": [1] * 12 + [2]}],
            {},
            "row 0 of the rows has tied ranks, which reward.loss plackett_luce takes among at most 12",
        ),
        ([{"question": "p", "completions": ["a"], "ranks": [1]}], {}, "the rows has no column `prompt`"),
        (
            [{"prompt": "p", "chosen": "a", "rejected": "a"}],
            {},
            "nothing is left of the rows to learn from: 1 row left",
        ),
    ],
)
def test_bad_comparisons_are_refused(
    tiny_tokenizer: Any, rows: list[dict[str, Any]], words: dict[str, Any], message: str
) -> None:
    with pytest.raises(PairtuneError, match=message):
        comparisons(tiny_tokenizer, rows, **words)


def test_unfit_models_are_refused(tiny_tokenizer: Any, run: Run) -> None:
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = BertConfig(vocab_size=VOCAB_SIZE, **sizes, num_labels=1)
    with pytest.raises(PairtuneError, match=r"'BertLMHeadModel' .* is no decoder with a linear head"):
        load_reward_backbone(BertLMHeadModel(encoder), tokenizer=tiny_tokenizer, device="cpu")
    with pytest.raises(PairtuneError, match="needs its tokenizer too"):
        load_reward_backbone(build_tiny_model("llama"))
    with pytest.raises(PairtuneError, match=r"with its completion has .* tokens, but the model reads at most 256"):
        run(rows=[{"prompt": "p" * 300, "chosen": "a", "rejected": "b"}], held_out=None)
    with pytest.raises(PairtuneError, match="could not be loaded"):
        run(model="./nowhere")


def test_a_tokenizer_without_eos_or_template_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(PairtuneError, match="has no chat template"):
        comparisons(tiny_tokenizer, ROWS[:1], chat="always")
    tiny_tokenizer.eos_token = None
    with pytest.raises(PairtuneError, match="has no EOS token"):
        comparisons(tiny_tokenizer, ROWS[:1])


def test_the_loaded_tokenizer_of_a_model_is_used(tiny_model_folder: str) -> None:
    assert (
        load_reward_backbone(tiny_model_folder, dtype="float32").tokenizer.get_vocab()
        == load_tokenizer(tiny_model_folder).get_vocab()
    )
