"""Rewards: how functions and reward models are called, what they may answer, how answers become rewards."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from pairtune.config import EvaluateConfig, TrainConfig
from pairtune.data import PromptDataset, RawPrompts
from pairtune.demo.vader import strongest_word_share, strongest_words, vader_sentiment
from pairtune.errors import PairtuneError
from pairtune.feedback.rewards import (
    RewardModel,
    RewardSet,
    RunningScale,
    Scores,
    load_reward_function,
    load_rewards,
    subtract_missing_eos_penalty,
)
from pairtune.types import Completions, Prompts

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user:", "assistant:", "a", "b", "c", "d", "e", "f"]
PAD, BOS, EOS, UNK, USER, ASSISTANT, A, B, C, D, E, F = range(12)
TEMPLATE = (
    "<s>{% for turn in messages %} {{ turn['role'] + ': ' + turn['content'] }}"
    "{% if turn['role'] == 'assistant' %} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} assistant:{% endif %}"
)


def make_tokenizer(
    *, words: list[str] = WORDS, chat: bool = False, bos: bool = False, eos: bool = False
) -> PreTrainedTokenizerFast:
    """One token a word; adds BOS and EOS of its own accord where asked to."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if eos else "")
    ids = [(word, words.index(word)) for word in ("<s>", "</s>")]
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **special)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


POLICY_TOKENIZER = make_tokenizer()
OTHER_WORDS = [*WORDS[:4], *reversed(WORDS[4:])]


def make_dataset(prompts: list[Any], **columns: list[Any]) -> PromptDataset:
    rows = [
        {"prompt": prompt, **{name: values[i] for name, values in columns.items()}} for i, prompt in enumerate(prompts)
    ]
    conversational = not isinstance(prompts[0], str)
    return RawPrompts.from_rows(rows).encode(make_tokenizer(chat=conversational))


def make_prompts(prompts: list[Any], **columns: list[Any]) -> Prompts:
    return make_dataset(prompts, **columns).batch(range(len(prompts)))


def make_completions(prompts: Prompts, groups: list[list[str]]) -> tuple[Completions, list[list[str]]]:
    """(completions, texts) from texts; one that ends in "</s>" is finished, any other was cut by the length cap."""
    ids = [[POLICY_TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in group] for group in groups]
    width = max(len(row) for group in ids for row in group)
    shape = (len(groups), len(groups[0]), width)
    completion_ids, mask = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.bool)
    for p, group in enumerate(ids):
        for k, row in enumerate(group):
            completion_ids[p, k, : len(row)] = torch.tensor(row)
            mask[p, k, : len(row)] = True
    truncated = torch.tensor([[row[-1] != EOS for row in group] for group in ids])
    completions = Completions(prompts.ids, prompts.mask, completion_ids, mask, torch.zeros(shape), truncated, 0)
    texts = [[text.removesuffix("</s>").strip() for text in group] for group in groups]
    return completions, texts


GROUPS = [["b </s>", "c d"], ["e f </s>", "f </s>"]]


def score(
    *functions: Any, prompts: Prompts | None = None, groups: Any = GROUPS, state: Any = None, **settings: Any
) -> Scores:
    """Score two prompts with two completions each."""
    prompts = prompts or make_prompts(["a", "a b"], answer=["x", "y"])
    return RewardSet(functions, **settings).score(prompts, *make_completions(prompts, groups), trainer_state=state)


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text.split())) for text in completions]


def constant(answer: Any) -> Callable[..., Any]:
    """A reward function that always gives this answer."""

    def fixed(completions: list[str]) -> Any:
        return answer

    return fixed


# The call.


def test_functions_are_called_as_trl_calls_them() -> None:
    seen: dict[str, Any] = {}

    def reward(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        return [1.0, 2.0, 3.0, 4.0]

    state = SimpleNamespace(global_step=3)
    scores = score(reward, state=state)
    assert callable(seen.pop("log_extra"))
    assert callable(seen.pop("log_metric"))
    assert seen == {
        "prompts": ["a", "a", "a b", "a b"],
        "completions": ["b", "c d", "e f", "f"],
        "completion_ids": [[B, EOS], [C, D], [E, F, EOS], [F, EOS]],  # without padding, EOS included
        "answer": ["x", "x", "y", "y"],
        "trainer_state": state,
    }
    assert torch.equal(scores.rewards, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert scores.rewards.dtype == torch.float32
    assert scores.reward_mask.all()


def test_conversations_get_conversational_completions_that_functions_may_change() -> None:
    conversation = [{"role": "user", "content": "a"}]
    prompts = make_prompts([conversation])
    seen = []

    def spoil(prompts: list[Any], completions: list[Any]) -> list[float]:
        seen.append((json.dumps(prompts), json.dumps(completions)))
        prompts[0][0]["content"] = "spoilt"
        prompts.clear()
        completions.clear()
        return [0.0, 0.0]

    score(spoil, spoil, prompts=prompts, groups=[["b </s>", "c </s>"]])
    said = json.dumps([[{"role": "assistant", "content": "b"}], [{"role": "assistant", "content": "c"}]])
    assert seen == [(json.dumps([conversation, conversation]), said)] * 2
    assert prompts.prompts == [[{"role": "user", "content": "a"}]]


def test_a_function_gets_only_the_names_that_it_takes() -> None:
    def few(completion_ids: list[list[int]], answer: list[str], missing: int = 7) -> list[float]:
        assert missing == 7
        return [len(ids) + (given == "y") for ids, given in zip(completion_ids, answer, strict=True)]

    class Scorer:
        def __call__(self, completions: list[str], *, trainer_state: Any) -> list[float]:
            return [0.5] * len(completions)

    assert score(few).rewards.tolist() == [[2, 2], [4, 3]]
    assert score(partial(few, missing=7)).rewards.tolist() == [[2, 2], [4, 3]]
    assert list(score(Scorer()).by_function) == ["Scorer"]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda completions, anwser: [], r"`lambda` needs `anwser`.*\(`answer`, `level`\).*did you mean `answer`\?"),
        (lambda zzz: [], r"needs `zzz`, .*: give it a default, or the dataset that column"),
        (lambda completions, *, zzz: [], "needs `zzz`"),
        (lambda completions, /: [], "takes `completions` by position only"),
    ],
)
def test_a_function_that_needs_what_is_not_there_is_refused_before_training(function: Any, message: str) -> None:
    with pytest.raises(PairtuneError, match=message):
        RewardSet([function]).check(make_dataset(["a"], answer=["x"], level=[1]))


def test_functions_that_can_be_called_pass_the_check() -> None:
    functions = [length, lambda prompts, answer, *args, z=1, **kwargs: [], max, partial(lambda z, answer: [], 1)]
    RewardSet(functions).check(make_dataset(["a"], answer=["x"]))


def test_a_column_with_a_name_of_pairtunes_is_refused() -> None:
    with pytest.raises(PairtuneError, match=r"the dataset has a column `completions`.*rename it"):
        RewardSet([length]).check(make_dataset(["a"], completions=["x"]))


def test_asynchronous_functions_run_side_by_side() -> None:
    barrier = {"waiting": 0}

    async def meet(completions: list[str], **kwargs: Any) -> list[float]:
        barrier["waiting"] += 1
        while barrier["waiting"] < 2:  # one after the other, the first would wait for ever
            await asyncio.sleep(0.001)
        return [1.0] * len(completions)

    async def both(completions: list[str], **kwargs: Any) -> list[float]:
        return await asyncio.wait_for(meet(completions), timeout=5)

    assert score(both, length, both).rewards.tolist() == [[3, 4], [4, 3]]


def test_asynchronous_functions_keep_one_loop_also_inside_a_running_one() -> None:
    loops = []

    async def remember(completions: list[str]) -> list[float]:
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    async def notebook() -> None:
        score(remember)
        assert asyncio.get_running_loop() is not loops[-1]

    score(remember)
    asyncio.run(notebook())
    assert len(set(loops)) == 1
    assert not loops[0].is_closed()  # so that a client which a function keeps stays usable


def test_a_failure_cancels_what_still_runs() -> None:
    cancelled = threading.Event()

    async def slow(completions: list[str]) -> list[float]:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return []

    with pytest.raises(PairtuneError, match="`broken` raised"):
        score(slow, broken)
    assert cancelled.wait(5)


def broken(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("answer")


async def broken_later(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    raise KeyError("answer")


# What comes back.


@pytest.mark.parametrize("function", [broken, broken_later])
def test_an_exception_names_the_function_and_the_completions(function: Any) -> None:
    long = "b " * 100 + "</s>"
    with pytest.raises(PairtuneError) as caught:
        score(function, groups=[[long, "c"], ["d", "e"]])
    message = str(caught.value)
    line = inspect.getsourcelines(function)[1] + (1 if function is broken else 2)
    assert message.startswith(
        f"reward function `{function.__name__}` raised KeyError ('answer') at test_rewards.py:{line} on 4 completions"
    )
    assert "'b b b" in message
    assert len(message) < 200
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "answer, message",
    [
        (
            [1.0, math.nan, 0.0, 0.0],
            r"`fixed` returned nan for completion 1 \('c d'\): return a finite number, or None",
        ),
        ([1.0, 0.0, math.inf, 0.0], r"`fixed` returned inf for completion 2 \('e f'\)"),
        ([1.0, 0.0, 0.0, -1e39], r"`fixed` returned -1e\+39 for completion 3 \('f'\)"),  # infinite in float32
        ([1.0, 0.0, 0.0, "0.5"], r"`fixed` returned '0.5' for completion 3"),
        ([[1.0], 0.0, 0.0, 0.0], r"`fixed` returned \[1.0\] for completion 0"),
        (np.array([0.0, np.nan, 0.0, 0.0]), "`fixed` returned nan for completion 1"),
        ([1.0], "`fixed` returned 1 values for 4 completions"),
        ([1.0] * 5, "`fixed` returned 5 values for 4 completions"),
        (1.0, "`fixed` returned 1.0, a float: it must return a list"),
        (torch.tensor(1.0), r"`fixed` returned tensor\(1.\), a Tensor"),
        ("abcd", "`fixed` returned 'abcd', a str"),
        ({0: 1, 1: 1, 2: 1, 3: 1}, "a dict: it must return a list"),
        (None, "`fixed` returned None, a NoneType"),
    ],
)
def test_bad_answers_are_refused(answer: Any, message: str) -> None:
    with pytest.raises(PairtuneError, match=message):
        score(length, constant(answer))


@pytest.mark.parametrize(
    "answer",
    [
        [1, True, 0.5, 0.0],
        (1.0, 1.0, 0.5, 0.0),
        np.array([1, 1, 0.5, 0], dtype=np.float32),
        torch.tensor([1.0, 1.0, 0.5, 0.0]),
        [np.float32(1), np.int64(1), torch.tensor(0.5), 0],
    ],
)
def test_anything_that_is_a_row_of_numbers_will_do(answer: Any) -> None:
    assert score(constant(answer)).rewards.tolist() == [[1.0, 1.0], [0.5, 0.0]]


def test_the_weighted_sum_runs_over_the_functions_that_answered() -> None:
    first, second = constant([1.0, None, None, 4.0]), constant([10.0, 20.0, None, 40.0])
    scores = score(first, second, weights=[2.0, 0.5])
    assert scores.rewards.tolist() == [[7.0, 10.0], [0.0, 28.0]]
    assert scores.reward_mask.tolist() == [[True, True], [False, True]]
    assert list(scores.by_function) == ["fixed", "fixed_2"]
    assert torch.equal(scores.by_function["fixed"].isnan(), torch.tensor([[False, True], [True, False]]))
    assert scores.metrics == {
        "rewards/fixed/mean": 2.5,
        "rewards/fixed/std": pytest.approx(math.sqrt(4.5)),
        "rewards/fixed_2/mean": pytest.approx(70 / 3),
        "rewards/fixed_2/std": pytest.approx(15.27525),
    }


def test_one_answer_has_no_spread_and_none_has_no_metrics() -> None:
    scores = score(constant([None, 2.0, None, None]), constant([None] * 4))
    assert scores.metrics == {"rewards/fixed/mean": 2.0, "rewards/fixed/std": 0.0}


def test_functions_log_columns_and_metrics() -> None:
    def chatty(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log_extra("words", [len(text.split()) for text in completions])
        log_metric("share", 0.25)
        log_metric("share", 0.75)
        return [0.0] * len(completions)

    scores = score(chatty)
    assert scores.extras == {"words": [1, 2, 2, 1]}
    assert scores.metrics["share"] == 0.5


@pytest.mark.parametrize(
    "log, message",
    [
        (lambda extra, metric: extra("words", [1]), "`chatty` gave log_extra 1 values for 'words', but there are 4"),
        (lambda extra, metric: metric("share", "much"), "`chatty` raised ValueError"),
    ],
)
def test_bad_logging_is_refused(log: Any, message: str) -> None:
    def chatty(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
        log(log_extra, log_metric)
        return [0.0] * len(completions)

    with pytest.raises(PairtuneError, match=message):
        score(chatty)


def test_no_function_or_not_one_weight_each_is_refused() -> None:
    with pytest.raises(PairtuneError, match="there is no reward"):
        RewardSet([])
    with pytest.raises(PairtuneError, match="reward_weights has 1 values for 2 reward functions"):
        RewardSet([length, length], [1.0])


# From answers to what training sees.


def test_the_missing_eos_penalty_is_subtracted_from_truncated_completions_that_count() -> None:
    rewards, truncated = torch.tensor([[1.0, 2.0]]), torch.tensor([[True, False]])
    assert subtract_missing_eos_penalty(rewards, truncated, 0.5).tolist() == [[0.5, 2.0]]
    scores = score(constant([1.0, 2.0, 3.0, None]), groups=[["b </s>", "c"], ["d", "e"]], missing_eos_penalty=10.0)
    assert scores.raw_rewards.tolist() == [[1.0, 2.0], [3.0, 0.0]]
    assert scores.rewards.tolist() == [[1.0, -8.0], [-7.0, 0.0]]


def test_the_running_scale_is_the_deviation_of_all_rewards_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [1e6 + torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(5)]
    masks = [torch.rand(3, 4, generator=generator) < 0.7 for _ in batches]
    scale = RunningScale()
    for batch, mask in zip(batches, masks, strict=True):
        scale.update(torch.where(mask, batch, torch.nan), mask)
    seen = torch.cat([batch[mask] for batch, mask in zip(batches, masks, strict=True)])
    assert scale.std == pytest.approx(seen.std().item(), rel=1e-7)


def test_the_running_scale_is_1_until_rewards_differ() -> None:
    scale = RunningScale()
    for rewards in (torch.tensor([]), torch.tensor([3.0]), torch.tensor([3.0])):
        scale.update(rewards, torch.ones_like(rewards, dtype=torch.bool))
        assert scale.std == 1.0
    scale.update(torch.tensor([5.0]), torch.tensor([True]))
    assert scale.std == pytest.approx(torch.tensor([3.0, 3.0, 5.0]).std().item())


def test_the_running_scale_resumes_bit_by_bit_and_evaluation_leaves_it_alone() -> None:
    def fresh() -> RewardSet:
        return RewardSet([length], scale=RunningScale())

    prompts = make_prompts(["a", "b"])
    batches = [make_completions(prompts, [["b", f"c{' d' * i}"], ["e e e", "f"]]) for i in range(4)]
    uninterrupted, first, second = fresh(), fresh(), fresh()
    wanted = [uninterrupted.score(prompts, *batch) for batch in batches]
    for batch in batches[:2]:
        first.score(prompts, *batch)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert wanted[1].rewards.ne(wanted[1].raw_rewards).any()
    for batch, scores in zip(batches[2:], wanted[2:], strict=True):
        second.score(prompts, *batches[0], update_scale=False)
        assert torch.equal(second.score(prompts, *batch).rewards, scores.rewards)
    assert RewardSet([length]).state_dict() == {}


# Reward models.


def make_classifier(pad_token_id: int | None = PAD, num_labels: int = 1, **settings: Any) -> Any:
    """A random reward model of two layers, its weights large enough for every token to matter."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"num_labels": num_labels, "pad_token_id": pad_token_id, "initializer_range": 0.5}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=len(WORDS), **sizes, **labels, **settings)).eval()


@torch.no_grad()
def score_alone(model: Any, ids: list[int]) -> float:
    """The head's value at the last of these tokens."""
    hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    return float(model.score(hidden))


def model_scores(rewards: RewardModel, prompts: list[Any], groups: list[list[str]]) -> list[float]:
    batch = make_prompts(prompts)
    return rewards.score(batch, *make_completions(batch, groups))


def spaced(texts: list[list[str]]) -> list[list[str]]:
    """Completions that begin with a space, as they do behind a plain prompt."""
    return [[f" {text}" for text in group] for group in texts]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_plain_text_gets_one_bos_and_an_eos_behind_finished_completions_only(adds_eos: bool) -> None:
    model = make_classifier()
    rewards = RewardModel(model, make_tokenizer(bos=True, eos=adds_eos), batch_size=3)
    prompts = make_prompts(["a", "a b"])
    completions, texts = make_completions(prompts, GROUPS)
    wanted = [[BOS, A, B, EOS], [BOS, A, C, D], [BOS, A, B, E, F, EOS], [BOS, A, B, F, EOS]]
    expected = [score_alone(model, ids) for ids in wanted]
    assert rewards.score(prompts, completions, spaced(texts)) == pytest.approx(expected, abs=1e-4)


def test_a_truncated_and_a_finished_completion_score_differently() -> None:
    rewards = RewardModel(make_classifier(), make_tokenizer(words=OTHER_WORDS))
    finished, truncated = model_scores(rewards, ["a"], [["b </s>", "b"]])
    assert abs(finished - truncated) > 0.1


def test_a_shared_vocabulary_is_scored_from_the_sampled_ids() -> None:
    model = make_classifier()
    rewards = RewardModel(model, make_tokenizer(bos=True), policy_tokenizer=POLICY_TOKENIZER)
    prompts = make_prompts(["a", "a b"])
    completions, _ = make_completions(prompts, GROUPS)
    wanted = [[A, B, EOS], [A, C, D], [A, B, E, F, EOS], [A, B, F, EOS]]
    nonsense = [["never", "read"], ["at", "all"]]
    got = rewards.score(prompts, completions, nonsense)
    assert got == pytest.approx([score_alone(model, ids) for ids in wanted], abs=1e-4)


def test_a_completion_ended_by_a_stop_string_is_closed() -> None:
    model = make_classifier()
    rewards = RewardModel(model, make_tokenizer(), policy_tokenizer=POLICY_TOKENIZER)
    prompts = make_prompts(["a"])
    completions, texts = make_completions(prompts, [["b", "c </s>"]])
    stopped = Completions(**{**vars(completions), "truncated": torch.tensor([[False, False]])})
    assert rewards.score(prompts, stopped, texts)[0] == pytest.approx(score_alone(model, [A, B, EOS]), abs=1e-4)


def test_another_vocabulary_is_scored_from_the_text() -> None:
    tokenizer = make_tokenizer(words=OTHER_WORDS)
    model = make_classifier()
    rewards = RewardModel(model, tokenizer, policy_tokenizer=POLICY_TOKENIZER)
    prompts = make_prompts(["a"])
    completions, texts = make_completions(prompts, [["b </s>", "c"]])
    ids = tokenizer.convert_tokens_to_ids
    wanted = [[ids("a"), ids("b"), EOS], [ids("a"), ids("c")]]
    got = rewards.score(prompts, completions, spaced(texts))
    assert got == pytest.approx([score_alone(model, row) for row in wanted], abs=1e-4)


def test_conversations_go_through_the_reward_models_own_template() -> None:
    model = make_classifier()
    tokenizer = make_tokenizer(chat=True, bos=True)  # its template writes the only BOS
    wanted = [[BOS, USER, A, ASSISTANT, B, EOS], [BOS, USER, A, ASSISTANT, C, D]]  # the second was cut
    expected = [score_alone(model, ids) for ids in wanted]
    for prompt, chat in (([{"role": "user", "content": "a"}], "never"), ("a", "auto"), ("a", "always")):
        rewards = RewardModel(model, tokenizer, chat=chat, policy_tokenizer=POLICY_TOKENIZER)
        assert model_scores(rewards, [prompt], [["b </s>", "c d"]]) == pytest.approx(expected, abs=1e-4)
    plain = RewardModel(model, tokenizer, chat="never", policy_tokenizer=POLICY_TOKENIZER)
    assert model_scores(plain, ["a"], [["b </s>"]]) == pytest.approx([score_alone(model, [A, B, EOS])], abs=1e-4)


def chat_completions(prompts: Prompts, finished: bool) -> Completions:
    """The ids of "b" behind each prompt, ended or not."""
    ids = torch.tensor([[[B, EOS if finished else C]]] * len(prompts))
    truncated = torch.full((len(prompts), 1), not finished)
    return Completions(prompts.ids, prompts.mask, ids, ids > 0, torch.zeros(ids.shape), truncated, 0)


def test_a_shared_template_is_read_from_the_ids_that_the_policy_read() -> None:
    """With what the template writes behind an answer that was finished; the system prompt is in the ids."""
    model, policy_tokenizer, tokenizer = make_classifier(), make_tokenizer(chat=True), make_tokenizer(chat=True)
    for one in (policy_tokenizer, tokenizer):
        one.chat_template = TEMPLATE.replace("</s>", "</s> f")
    words = {"chat": "always", "system_prompt": "d"}
    prompts = RawPrompts.from_rows([{"prompt": "a"}]).encode(policy_tokenizer, **words).batch([0])
    opened = prompts.ids[0].tolist()
    assert D in opened
    assert opened[-1] == ASSISTANT
    for policy, texts in ((policy_tokenizer, [["nonsense"]]), (None, None)):
        judge = RewardModel(model, tokenizer, policy_tokenizer=policy, **words)
        for finished, ids in ((True, [*opened, B, EOS, F]), (False, [*opened, B, C])):
            given = texts or [["b" if finished else "b c"]]
            got = judge.score(prompts, chat_completions(prompts, finished), given)
            assert got == pytest.approx([score_alone(model, ids)], abs=1e-4)


def test_another_template_is_not_read_from_the_ids_of_the_policy() -> None:
    model, tokenizer = make_classifier(), make_tokenizer(chat=True)
    policy_tokenizer = make_tokenizer(chat=True)
    policy_tokenizer.chat_template = TEMPLATE.replace("assistant:", "f")
    prompts = RawPrompts.from_rows([{"prompt": "a"}]).encode(policy_tokenizer).batch([0])
    got = RewardModel(model, tokenizer, policy_tokenizer=policy_tokenizer).score(
        prompts, chat_completions(prompts, True), [["b"]]
    )
    assert got == pytest.approx([score_alone(model, [BOS, USER, A, ASSISTANT, B, EOS])], abs=1e-4)


def test_a_system_prompt_of_the_policy_goes_where_it_can() -> None:
    """Not into a conversation, which has its own turns, nor into plain text."""
    model = make_classifier()
    plain = RewardModel(model, make_tokenizer(), chat="never", system_prompt="d")
    assert model_scores(plain, ["a"], [["b </s>"]]) == pytest.approx([score_alone(model, [A, B, EOS])], abs=1e-4)
    judge = RewardModel(model, make_tokenizer(chat=True), system_prompt="d")
    (score_of_turns,) = model_scores(judge, [[{"role": "user", "content": "a"}]], [["b </s>"]])
    assert score_of_turns == pytest.approx(score_alone(model, [BOS, USER, A, ASSISTANT, B, EOS]), abs=1e-4)


def test_a_vocabulary_with_a_token_more_is_shared() -> None:
    tokenizer = make_tokenizer(words=[*WORDS, "<more>"])
    assert RewardModel(make_classifier(), tokenizer, policy_tokenizer=POLICY_TOKENIZER).same_vocabulary
    assert not RewardModel(make_classifier(), POLICY_TOKENIZER, policy_tokenizer=tokenizer).same_vocabulary


def test_a_saved_shift_is_added() -> None:
    model = make_classifier()
    (before,) = model_scores(RewardModel(model, make_tokenizer()), ["a"], [["b </s>"]])
    model.config.pairtune_reward_shift = 2.5
    (after,) = model_scores(RewardModel(model, make_tokenizer()), ["a"], [["b </s>"]])
    assert after - before == pytest.approx(2.5, abs=1e-5)


def test_batches_change_no_score_and_keep_the_order() -> None:
    model = make_classifier()
    groups = [["b </s>", "c d e f b c d </s>", "d"], ["e f </s>", "f b c", "b c d e f"]]
    one, many = (RewardModel(model, make_tokenizer(), batch_size=size) for size in (1, 4))
    expected = model_scores(one, ["a", "a b"], groups)
    assert model_scores(many, ["a", "a b"], groups) == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 5) for value in expected}) == 6


def test_an_encoder_sees_no_padding_and_gets_no_eos() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings = {"vocab_size": len(WORDS), "pad_token_id": PAD, "num_labels": 1, "initializer_range": 0.5}
    model = BertForSequenceClassification(BertConfig(**sizes, **settings)).eval()
    tokenizer = make_tokenizer(eos=True)  # its separator, which is not called EOS
    tokenizer.eos_token = None
    prompts = make_prompts(["a"])
    completions, texts = make_completions(prompts, [["b </s>", "c d e f"]])
    with torch.no_grad():
        expected = [model(torch.tensor([ids])).logits.item() for ids in ([A, B, EOS], [A, C, D, E, F, EOS])]
    got = RewardModel(model, tokenizer).score(prompts, completions, spaced(texts))
    assert got == pytest.approx(expected, abs=1e-4)


def test_scores_come_from_eval_mode_without_gradient() -> None:
    model = make_classifier(attention_dropout=0.9).train()
    rewards = RewardModel(model, make_tokenizer())
    assert not model.training
    graphs = []
    model.score.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    first = model_scores(rewards, ["a"], [["b c d </s>", "c"]])
    assert model_scores(rewards, ["a"], [["b c d </s>", "c"]]) == first
    assert graphs == [False, False]


def test_reward_models_and_functions_add_up() -> None:
    model = make_classifier()
    rewards = RewardModel(model, make_tokenizer(), name="judge", policy_tokenizer=POLICY_TOKENIZER)
    scores = score(rewards, length, weights=[1.0, 0.0])
    assert scores.rewards[0, 1].item() == pytest.approx(score_alone(model, [A, C, D]), abs=1e-4)
    assert set(scores.by_function) == {"judge", "length"}


def test_a_reward_model_that_returns_nan_is_refused() -> None:
    model = make_classifier()
    model.score.weight.data.fill_(math.nan)
    with pytest.raises(PairtuneError, match=r"`judge` returned nan for completion 0 \('b'\)"):
        score(RewardModel(model, make_tokenizer(), name="judge"))


def test_the_padding_token_is_never_the_eos_of_a_model_that_names_none() -> None:
    for missing in (None, "</s>"):
        tokenizer = make_tokenizer()
        tokenizer.pad_token = missing
        model = make_classifier(pad_token_id=None)
        rewards = RewardModel(model, tokenizer, policy_tokenizer=POLICY_TOKENIZER)
        assert rewards.pad_token_id == model.config.pad_token_id == BOS
        got = model_scores(rewards, ["a"], [["b </s>", "c d e f"]])
        assert got == pytest.approx([score_alone(model, [A, B, EOS]), score_alone(model, [A, C, D, E, F])], abs=1e-4)
    assert RewardModel(make_classifier(pad_token_id=None), make_tokenizer()).pad_token_id == PAD


def test_a_model_trained_to_pad_with_its_eos_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"pads with its end-of-sequence token.*missing_eos_penalty"):
        rewards = RewardModel(make_classifier(pad_token_id=EOS), make_tokenizer())
    assert rewards.pad_token_id == EOS


def test_a_model_without_any_padding_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.bos_token = "</s>"  # what is left, <unk>, may well end a text
    with pytest.raises(
        PairtuneError, match="`reward_model` has no padding token that differs from its end-of-sequence"
    ):
        RewardModel(make_classifier(pad_token_id=None), tokenizer)


def test_unfit_reward_models_are_refused() -> None:
    with pytest.raises(PairtuneError, match="'reward_model' is no reward model: it gives 3 labels"):
        RewardModel(make_classifier(num_labels=3), make_tokenizer())
    with pytest.raises(PairtuneError, match="chat is `always`, but the tokenizer of reward model `reward_model`"):
        RewardModel(make_classifier(), make_tokenizer(), chat="always")
    conversations = make_dataset([[{"role": "user", "content": "a"}]])
    with pytest.raises(PairtuneError, match=r"are conversations, but .* `reward_model` has no chat template"):
        RewardSet([RewardModel(make_classifier(), make_tokenizer())]).check(conversations)


def test_more_tokens_than_positions_are_refused() -> None:
    tokenizer = make_tokenizer()
    rewards = RewardModel(make_classifier(max_position_embeddings=4), tokenizer, policy_tokenizer=tokenizer)
    assert len(model_scores(rewards, ["a"], [["b c </s>", "c"]])) == 2
    with pytest.raises(PairtuneError, match="has 5 tokens for reward model `reward_model`, which has 4 positions"):
        model_scores(rewards, ["a"], [["b c d </s>", "c"]])


def test_a_template_that_refuses_is_one_sentence() -> None:
    tokenizer = make_tokenizer(chat=True)
    tokenizer.chat_template = "{{ raise_exception('users only') }}"
    with pytest.raises(
        PairtuneError,
        match=r"row 0 of the prompts of reward model `reward_model`: .* template .* refuses .*: users only",
    ):
        model_scores(RewardModel(make_classifier(), tokenizer), ["a"], [["b", "c"]])


# Finding rewards by name.


def save(model: Any, folder: Path, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def config(*names: str, **settings: Any) -> TrainConfig:
    return TrainConfig(model="m", dataset="everyday", device="cpu", reward_funcs=list(names), **settings)


def test_a_folder_is_a_reward_model(tmp_path: Path) -> None:
    model = make_classifier()
    folder = save(model, tmp_path / "judge")
    assert load_reward_function(folder) == folder
    rewards = load_rewards(config(folder, reward_batch_size=2), POLICY_TOKENIZER, make_dataset(["a"]))
    (name, judge), *_ = rewards.functions.items()
    assert isinstance(judge, RewardModel)
    assert (name, judge.batch_size, judge.same_vocabulary) == ("judge", 2, True)
    assert model_scores(judge, ["a"], [["b </s>"]]) == pytest.approx([score_alone(model, [A, B, EOS])], abs=1e-4)


def test_folders_that_hold_no_reward_model_are_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    policy = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), **sizes))
    with pytest.raises(PairtuneError, match="is no reward model: it gives 2 labels"):
        RewardModel.from_pretrained(save(policy, tmp_path / "policy"))
    policy.config.num_labels = 1
    with pytest.raises(PairtuneError, match=r"has no weights for score\.weight: it was not trained as a sequence"):
        RewardModel.from_pretrained(save(policy, tmp_path / "headless"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(PairtuneError, match=r"empty' holds no reward model: it has no config\.json"):
        load_reward_function(str(tmp_path / "empty"))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    with pytest.raises(PairtuneError, match=r"cannot load reward model '.*torn'"):
        RewardModel.from_pretrained(str(tmp_path / "torn"))


MODULE = """
from __future__ import annotations

from dataclasses import dataclass

@dataclass
class Weights:
    each: float = 0.5

def my_reward(completions, **kwargs):
    return [Weights().each] * len(completions)

number = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with modules that no other test sees."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "h3_module.py").write_text(MODULE)
    (tmp_path / "h3_broken.py").write_text("import no_such_package")
    (tmp_path / "h3_syntax.py").write_text("def f(:")
    return tmp_path


@pytest.mark.parametrize("name", ["h3_module.my_reward", "h3_module.py:my_reward", "{}/h3_module.py:my_reward"])
def test_functions_are_found_by_module_and_by_file(folder: Path, name: str) -> None:
    function = load_reward_function(name.format(folder))
    assert callable(function)
    assert function(completions=["a"]) == [0.5]


def test_a_hub_id_is_a_reward_model() -> None:
    assert load_reward_function("organisation/reward-model-1.5b") == "organisation/reward-model-1.5b"


@pytest.mark.parametrize(
    "name, message",
    [
        ("h3_module.my_rewrad", "has no function `my_rewrad`; did you mean `my_reward`?"),
        ("h3_module.py:zzz", "has no function `zzz`; it has `dataclass`, `Weights`, `my_reward`"),
        ("h3_module.number", "has no function `number`"),
        ("h3_module.py", "say which function of the file, as in h3_module.py:my_reward"),
        ("h3_broken.f", "importing h3_broken failed: No module named 'no_such_package'"),
        ("h3_syntax.f", "importing h3_syntax failed: invalid syntax"),
        ("h3_broken.py:f", "running 'h3_broken.py' failed at h3_broken.py:1: ModuleNotFoundError"),
        ("h3_missing.f", "there is no reward 'h3_missing.f': no module 'h3_missing' is installed or lies in"),
        ("h3_missing.py:f", "there is no file 'h3_missing.py'"),
        ("h3_brokn.py:f", "did you mean 'h3_broken.py'?"),
        ("my_reward", "there is no reward 'my_reward': it is no folder of a model, no `package.module.function`"),
        ("./missing", "there is no reward './missing'"),
        ("a/b/c", "there is no reward 'a/b/c'"),
    ],
)
def test_names_that_lead_nowhere_are_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(PairtuneError) as caught:
        load_reward_function(name)
    assert message in str(caught.value)


def test_rewards_of_a_configuration() -> None:
    names, prompts = ["pairtune.demo.vader.vader_sentiment"], make_dataset(["a"])
    settings = {"reward_weights": [2.0], "missing_eos_penalty": 1.0}
    rewards = load_rewards(config(*names, **settings, scale_rewards="running"), POLICY_TOKENIZER, prompts)
    assert list(rewards.functions) == ["vader_sentiment"]
    assert (rewards.weights.tolist(), rewards.missing_eos_penalty) == ([2.0], 1.0)
    assert isinstance(rewards.scale, RunningScale)
    evaluation = EvaluateConfig(model="m", dataset="everyday", device="cpu", reward_funcs=names)
    assert load_rewards(evaluation, POLICY_TOKENIZER, prompts).scale is None
    passed = load_rewards(config(*names), POLICY_TOKENIZER, prompts, [length, *names])
    assert list(passed.functions) == ["length", "vader_sentiment"]
    with pytest.raises(PairtuneError, match="needs `zzz`"):
        load_rewards(config(*names), POLICY_TOKENIZER, prompts, [lambda zzz: []])


# VADER.


def test_vader_scores_text_and_conversations() -> None:
    pytest.importorskip("vaderSentiment")
    good, bad, nothing, conversation = vader_sentiment(
        ["I love this, it is great!", "This is awful.", "", [{"role": "assistant", "content": "This is awful."}]],
        answer=["x"] * 4,
    )
    assert good > 0.8
    assert bad == conversation < -0.4
    assert nothing == 0.0


def test_the_strongest_words_and_their_share() -> None:
    lexicon = pytest.importorskip("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer().lexicon
    strongest = strongest_words()
    assert len(set(strongest)) == 20
    assert "love" in strongest
    assert all(word.isalpha() for word in strongest)
    weakest = min(lexicon[word] for word in strongest)
    assert not [word for word, value in lexicon.items() if word.isalpha() and value > weakest and word not in strongest]
    assert strongest_word_share(["Love, love! It is", [{"role": "assistant", "content": "42 a_b"}]]) == 2 / 6
    assert strongest_word_share(["", "!"]) == 0.0


def test_a_missing_vader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from pairtune.demo import vader

    vader._analyser.cache_clear()
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(PairtuneError, match=r"pip install 'pairtune\[demo\]'"):
        score(vader_sentiment)
