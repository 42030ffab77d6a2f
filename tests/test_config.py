"""Configuration: what is read, what is refused in which words, what survives a round trip. No torch here."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any, get_origin

import pytest
import yaml

from pairtune import config as config_module
from pairtune.config import (
    FOREIGN_WORDS,
    METHODS,
    EvaluateConfig,
    JudgeConfig,
    P3OConfig,
    RewardConfig,
    SampleConfig,
    SFTConfig,
    TrainConfig,
    Words,
    allowed,
    config_to_dict,
    config_to_yaml,
    flat_values,
    keys_of,
    kinds_of,
    load_config,
    nearest_key,
    supervised_warnings,
    warnings_for,
)
from pairtune.errors import PairtuneError

ROOT = Path(__file__).parents[1]
REQUIRED: dict[type[Words], dict[str, Any]] = {
    TrainConfig: {"model": "m", "dataset": "d", "reward_funcs": ["a.b"]},
    SFTConfig: {"model": "m", "dataset": "d"},
    RewardConfig: {"model": "m", "dataset": "d"},
    EvaluateConfig: {"model": "m", "dataset": "d", "reward_funcs": ["a.b"]},
    SampleConfig: {"model": "m"},
    JudgeConfig: {"sides": ["a", "b"], "judge.model": "m"},
}
CONFIGS = list(REQUIRED)


def train_config(**values: Any) -> TrainConfig:
    return TrainConfig(**REQUIRED[TrainConfig] | values)


def refusal(**values: Any) -> str:
    """The sentence with which a training configuration is refused."""
    with pytest.raises(PairtuneError) as caught:
        train_config(**values)
    return one_sentence(caught.value)


def one_sentence(error: PairtuneError) -> str:
    text = str(error)
    assert "\n" not in text
    assert text.endswith(".")
    assert not re.search(r"[a-z]\. [A-Z]", text), f"two sentences: {text}"
    return text


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# -- What is refused ---------------------------------------------------------------------------------------------------

OUT_OF_RANGE = [
    ("model", "", "a text (not empty)"),
    ("dataset", "", "a text (not empty)"),
    ("output_dir", "", "a text (not empty)"),
    ("reward_funcs", [""], "a list of texts (not empty)"),
    ("stop", [""], "a list of texts (not empty)"),
    ("device", "gpu", "auto, cpu, cuda or cuda:N"),
    ("device", "mps", "auto, cpu, cuda or cuda:N"),
    ("device", "xpu:0", "auto, cpu, cuda or cuda:N"),
    ("dtype", "fp16", "auto, float32 or bfloat16"),
    ("chat", "maybe", "auto, always or never"),
    ("num_threads", 0, "a whole number > 0 or null"),
    ("max_prompt_length", 0, "a whole number > 0"),
    ("reward_batch_size", 0, "a whole number > 0"),
    ("missing_eos_penalty", -1.0, "a number >= 0 or null"),
    ("temperature", 0, "a number > 0"),
    ("top_p", 0, "a number > 0 and <= 1"),
    ("top_p", 1.5, "a number > 0 and <= 1"),
    ("top_k", -1, "a whole number >= 0"),
    ("max_completion_length", 0, "a whole number > 0"),
    ("seed", -1, "a whole number >= 0 and < 4294967296"),
    ("seed", 2**32, "a whole number >= 0 and < 4294967296"),
    ("algorithm", "p4o", f"{', '.join(list(METHODS)[:-1])} or ipo"),
    ("scale_rewards", "batch", "none or running"),
    ("beta", -0.1, "a number >= 0"),
    ("epsilon", 0, "a number > 0"),
    ("num_generations", 0, "a whole number > 0"),
    ("num_iterations", 0, "a whole number > 0"),
    ("batch_size", 0, "a whole number > 0"),
    ("minibatch_size", 0, "a whole number > 0 or null"),
    ("micro_batch_size", 0, "a whole number > 0 or null"),
    ("replay", -1, "a whole number >= 0"),
    ("preference_func", "", "a text (not empty) or null"),
    ("preference_rewards", "wins", "logits or margins"),
    ("judge.model", "", "a text (not empty) or null"),
    ("judge.base_url", "host/v1", "a URL like https://host/v1 or null"),
    ("judge.base_url", "https://me:secret@host/v1", "a URL like https://host/v1 or null"),
    ("judge.api_key_env", "sk-secret", "the name of an environment variable or null"),
    ("judge.answer", "score", "probabilities or text"),
    ("judge.temperature", -1, "a number >= 0 or null"),
    *[(f"judge.{key}", 0, "a whole number > 0") for key in ("max_tokens", "batch_size", "concurrency")],
    *[(f"judge.{key}", 0, "a number > 0 or null") for key in ("requests_per_minute", "tokens_per_minute")],
    ("judge.timeout", 0, "a number > 0"),
    ("judge.max_retries", -1, "a whole number >= 0"),
    *[(f"judge.{key}", -1, "a number >= 0 or null") for key in ("input_price", "output_price")],
    ("p3o.clip", "both", "joint, separate or none"),
    ("p3o.kl_at", "old", "current or sampling"),
    ("p3o.max_ratio", 0.5, "a number >= 1 or null"),
    *[(f"{section}.gamma", 1.5, "a number >= 0 and <= 1") for section in ("ppo", "vpg")],
    *[(f"{section}.lam", -0.5, "a number >= 0 and <= 1") for section in ("ppo", "vpg")],
    *[(f"{section}.vf_coef", -0.1, "a number >= 0") for section in ("ppo", "vpg")],
    ("ppo.value_clip", 0, "a number > 0 or null"),
    ("ppo.target_kl", 0, "a number > 0 or null"),
    ("ppo.kl_horizon", 0, "a whole number > 0"),
    ("reinforce.baseline", "value", "moving_average or none"),
    ("grpo.kl_in", "both", "loss or reward"),
    ("rebel.eta", 0, "a number > 0"),
    ("raft.rank_by", "length", "reward or shaped"),
    *[(f"{section}.labels", "soft", "expected, sampled or hard") for section in ("online_dpo", "online_ipo")],
    *[(f"{section}.label_smoothing", 0.5, "a number >= 0 and < 0.5") for section in ("dpo", "ipo")],
    ("learning_rate", -1e-6, "a number >= 0"),
    ("lr_scheduler_type", "step", "constant, constant_with_warmup, linear or cosine"),
    ("warmup_steps", -1, "a whole number >= 0"),
    ("weight_decay", -0.1, "a number >= 0"),
    ("adam_beta1", 1, "a number >= 0 and < 1"),
    ("adam_beta2", 1, "a number >= 0 and < 1"),
    ("adam_epsilon", 0, "a number > 0"),
    ("max_grad_norm", 0, "a number > 0 or null"),
    ("trainable_layers", 0, "a whole number > 0 or null"),
    ("lora_r", 0, "a whole number > 0 or null"),
    ("lora_alpha", 0, "a whole number > 0"),
    ("max_steps", 0, "a whole number > 0"),
    ("max_minutes", 0, "a number > 0 or null"),
    ("max_generated_tokens", 0, "a whole number > 0 or null"),
    ("reward_noise", -0.1, "a number >= 0"),
    ("eval_steps", -1, "a whole number >= 0"),
    ("num_eval_prompts", 0, "a whole number > 0 or null"),
    ("eval_generations", 0, "a whole number > 0"),
    ("save_steps", -1, "a whole number >= 0"),
    ("keep_last", 0, "a whole number > 0"),
    ("report_to", ["mlflow"], "a list of tensorboard, wandb or trackio"),
    ("num_completions_to_log", -1, "a whole number >= 0"),
]
SFT_OUT_OF_RANGE = [
    ("max_length", 0, "a whole number > 0"),
    ("num_eval_examples", 0, "a whole number > 0 or null"),
    ("num_epochs", 0, "a number > 0"),
    ("max_steps", 0, "a whole number > 0 or null"),
    ("warmup_steps", -1, "a whole number >= 0 or null"),
]
"""What `train` lacks, or takes otherwise."""
REWARD_OUT_OF_RANGE = [
    ("reward.loss", "listwise", "plackett_luce or pairwise"),
    ("reward.centring", -1, "a number >= 0"),
    ("reward.label_smoothing", 0.5, "a number >= 0 and < 0.5"),
    ("num_layers", 0, "a whole number > 0 or null"),
    ("activation_cache_gb", -1, "a number >= 0"),
]
"""What `sft` lacks, or takes otherwise."""


@pytest.mark.parametrize("key, value, takes", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused(key: str, value: Any, takes: str) -> None:
    shown = '["mlflow"]' if value == ["mlflow"] else '[""]' if value == [""] else None
    shown = shown or (f'"{value}"' if isinstance(value, str) else str(value))
    assert refusal(**{key: value}) == f"{key} must be {takes}, not {shown}."


@pytest.mark.parametrize("key, value, takes", SFT_OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_sft(key: str, value: Any, takes: str) -> None:
    with pytest.raises(PairtuneError) as caught:
        SFTConfig(**REQUIRED[SFTConfig] | {key: value})
    assert one_sentence(caught.value) == f"{key} must be {takes}, not {value}."


@pytest.mark.parametrize("key, value, takes", REWARD_OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_reward(key: str, value: Any, takes: str) -> None:
    with pytest.raises(PairtuneError) as caught:
        RewardConfig(**REQUIRED[RewardConfig] | {key: value})
    shown = f'"{value}"' if isinstance(value, str) else value
    assert one_sentence(caught.value) == f"{key} must be {takes}, not {shown}."


def bounded(cls: type[Words]) -> dict[str, str]:
    """The fields that do not take everything of their type, and what they take."""
    unbounded = {"a text", "a text or null", "true or false", "a list of numbers or null", "a text or a list of texts"}
    taken = {key: allowed(field.annotation, field.metadata) for key, field in keys_of(cls).items()}
    return {key: takes for key, takes in taken.items() if takes not in unbounded}


def test_every_bounded_field_has_a_case_out_of_range() -> None:
    assert set(bounded(TrainConfig)) == {key for key, _, _ in OUT_OF_RANGE}
    others = {key for key, takes in bounded(SFTConfig).items() if bounded(TrainConfig).get(key) != takes}
    assert others == {key for key, _, _ in SFT_OUT_OF_RANGE}
    known = bounded(TrainConfig) | bounded(SFTConfig)
    others = {key for key, takes in bounded(RewardConfig).items() if known.get(key) != takes}
    assert others == {key for key, _, _ in REWARD_OUT_OF_RANGE}


def wrong_types(cls: type[Words]) -> list[Any]:
    wrong = []
    for key, field in keys_of(cls).items():
        kinds = kinds_of(field.annotation)
        numbers = int in kinds or float in kinds
        wrong.append((cls, key, {"a": 1}))
        if numbers or bool in kinds:
            wrong.append((cls, key, "abc"))
        else:
            wrong.append((cls, key, [{}] if get_origin(kinds[0]) is list else ["x", 1]))
        if bool not in kinds:
            wrong.append((cls, key, True))
        if int in kinds:
            wrong.append((cls, key, 1.5))
        if float in kinds:
            wrong += [(cls, key, float("nan")), (cls, key, float("inf"))]
    return wrong


@pytest.mark.parametrize("cls, key, value", [case for cls in CONFIGS for case in wrong_types(cls)])
def test_a_value_of_the_wrong_type_is_refused(cls: type[Words], key: str, value: Any) -> None:
    field = keys_of(cls)[key]
    with pytest.raises(PairtuneError) as caught:
        cls(**REQUIRED[cls] | {key: value})
    sentence = one_sentence(caught.value)
    assert sentence.startswith(f"{key} must be {allowed(field.annotation, field.metadata)}, not ")


def test_a_long_value_is_shown_short() -> None:
    assert refusal(epsilon="x" * 500).endswith("xxx....")
    assert len(refusal(epsilon="x" * 500)) < 120


@pytest.mark.parametrize("cls", CONFIGS)
def test_missing_fields_are_named(cls: type[Words], tmp_path: Path) -> None:
    required = [key for key, field in keys_of(cls).items() if field.is_required()]
    known = {SampleConfig: ["model"], JudgeConfig: ["sides"]}
    assert required == known.get(cls, ["model", "dataset"])
    first = required[0]
    with pytest.raises(PairtuneError) as caught:
        cls()
    assert str(caught.value).splitlines() == [f"{key} is missing; give it as {key}=...." for key in required]
    with pytest.raises(PairtuneError) as caught:
        load_config(cls)
    sentence = f"{first} is missing; give --{first}, or --config with a file that has it."
    assert str(caught.value).splitlines()[0] == sentence
    path = write(tmp_path, "seed: 1\n")
    with pytest.raises(PairtuneError) as caught:
        load_config(cls, path)
    sentence = f"{first} is missing; add a line `{first}: ...` to {path}, or give --{first}."
    assert str(caught.value).splitlines()[0] == sentence


CONTRADICTIONS = [
    ({"num_generations": 1}, ["num_generations is 1", "p3o", "give 2 or more"]),
    ({"top_p": 0.9}, ["top_p is 0.9", "p3o", "train with top_p 1."]),
    ({"top_k": 50}, ["top_k is 50", "p3o", "train with top_k 0."]),
    ({"algorithm": "rloo", "top_p": 0.9}, ["top_p is 0.9", "rloo", "differentiates the law that samples"]),
    ({"algorithm": "rloo", "num_generations": 1}, ["num_generations is 1", "rloo", "give 2 or more"]),
    ({"preference_func": "a.b", "algorithm": "ppo", "num_generations": 1}, ["num_generations is 1", "preference_func"]),
    ({"preference_func": "a.b", "algorithm": "dpo"}, ['preference_func is "a.b"', "dpo", "set it to null"]),
    ({"preference_func": "a.b", "missing_eos_penalty": 1.0}, ["missing_eos_penalty is 1.0", "preference_func"]),
    ({"preference_func": "a.b", "scale_rewards": "running"}, ["scale_rewards is running", "preference_func"]),
    ({"preference_func": "judge"}, ["judge.model is missing", "--judge.model"]),
    *[
        ({"algorithm": name, "beta": 0}, ["beta is 0", name, "give a beta above 0"])
        for name in ("copg", "online_dpo", "online_ipo", "dpo", "ipo")
    ],
    ({"algorithm": "ppo", "replay": 1}, ["replay is 1", "ppo", "set it to 0", "p3o, copg, online_dpo or online_ipo"]),
    ({"algorithm": "dpo", "replay": 2}, ["replay is 2", "dpo", "reads a dataset"]),
    ({"algorithm": "copg", "copg.offline": True, "replay": 2}, ["replay is 2", "copg", "reads a dataset"]),
    ({"algorithm": "ipo", "scale_rewards": "running"}, ["scale_rewards is running", "ipo", "set it to none"]),
    ({"batch_size": 64, "minibatch_size": 48}, ["minibatch_size is 48", "batch_size 64", "such as 16."]),
    ({"batch_size": 64, "minibatch_size": 128}, ["minibatch_size is 128", "batch_size 64", "such as 64."]),
    ({"lora_r": 8, "trainable_layers": 2}, ["lora_r is 8", "trainable_layers 2", "set one of the two to null"]),
    (
        {"reward_funcs": ["a.b", "c.d"], "reward_weights": [1.0]},
        ["reward_weights has 1 ", "reward_funcs 2", "one weight for each"],
    ),
    ({"reward_weights": []}, ["reward_weights has 0 ", "reward_funcs 1", "one weight for each"]),
    ({"resume": True, "overwrite": True}, ["resume and overwrite", "true", "set one of them to false"]),
]


@pytest.mark.parametrize("values, parts", CONTRADICTIONS)
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], parts: list[str]) -> None:
    sentence = refusal(**values)
    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    "values",
    [
        {"num_generations": 2},
        {"algorithm": "ppo", "num_generations": 1},
        {"algorithm": "dpo", "num_generations": 1, "top_p": 0.9},
        {"algorithm": "copg", "top_k": 5, "replay": 3},
        {"algorithm": "raft", "beta": 0},
        {"top_p": 1, "top_k": 0},
        {"batch_size": 64, "minibatch_size": 64},
        {"lora_r": 8},
        {"trainable_layers": 2},
        {"reward_weights": [-1.5]},
        {"reward_funcs": [], "reward_weights": [1.0, 2.0]},  # functions to be passed in from Python
        {"resume": True},
        {"beta": 0, "learning_rate": 0, "eval_steps": 0, "save_steps": 0},
        {"p3o.max_ratio": 1},
    ],
)
def test_the_edges_are_allowed(values: dict[str, Any]) -> None:
    train_config(**values)


def test_sft_refuses_the_same_of_what_it_shares() -> None:
    for values in ({"lora_r": 8, "trainable_layers": 2}, {"resume": True, "overwrite": True}):
        with pytest.raises(PairtuneError) as caught:
            SFTConfig(**REQUIRED[SFTConfig] | values)
        assert one_sentence(caught.value) == refusal(**values)


def test_all_contradictions_are_said_at_once() -> None:
    with pytest.raises(PairtuneError) as caught:
        train_config(num_generations=1, lora_r=8, trainable_layers=2)
    assert [line.split(" is ")[0] for line in str(caught.value).splitlines()] == ["num_generations", "lora_r"]


def test_mistakes_are_said_in_the_order_of_the_help_and_at_most_five() -> None:
    with pytest.raises(PairtuneError) as caught:
        TrainConfig(max_steps=0, epsilon=0, epsilom=0.1)
    keys = [line.split()[0] for line in str(caught.value).splitlines()]
    assert keys == ["epsilom", "model", "dataset", "epsilon", "max_steps"]
    with pytest.raises(PairtuneError) as caught:
        TrainConfig(max_steps=0, epsilon=0, epsilom=0.1, beta=-1, keep_last=0)
    assert len(str(caught.value).splitlines()) == 5


def test_methods_table_names_the_methods_of_the_configuration() -> None:
    assert list(METHODS) == list(TrainConfig.model_fields["algorithm"].annotation.__args__)  # type: ignore[union-attr]


# -- Unknown keys ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key, nearest",
    [
        ("epsilonn", "epsilon"),
        ("learning_rat", "learning_rate"),
        ("clip", "p3o.clip"),
        ("max_ration", "p3o.max_ratio"),
        ("ppo.clip", "p3o.clip"),
        ("p3o.clp", "p3o.clip"),
        ("p3o.epsilon", "epsilon"),
        ("sampling.dataset", "dataset"),  # not eval_dataset, which is spelled more like it
        ("model_name_or_path", "model"),
        ("dataset_name", "dataset"),
        ("per_device_train_batch_size", "batch_size"),
        ("max_new_tokens", "max_completion_length"),
        ("kl_coef", "beta"),
        ("cliprange", "epsilon"),
        ("num_ppo_epochs", "num_iterations"),
        ("resume_from_checkpoint", "resume"),
        ("zzzzzz", None),
    ],
)
def test_nearest_key(key: str, nearest: str | None) -> None:
    assert nearest_key(key, list(keys_of(TrainConfig))) == nearest


def test_one_foreign_word_may_mean_different_things_to_different_verbs() -> None:
    for word, of_train, of_sft in [
        ("num_train_epochs", "max_steps", "num_epochs"),
        ("dataset_text_field", "prompt_column", "text_column"),
    ]:
        assert nearest_key(word, list(keys_of(TrainConfig))) == of_train
        assert nearest_key(word, list(keys_of(SFTConfig))) == of_sft


def test_every_foreign_word_leads_to_a_key_and_is_none_itself() -> None:
    ours = {key for cls in CONFIGS for key in keys_of(cls)}
    assert {word for words in FOREIGN_WORDS.values() for word in words} <= ours
    assert not set(FOREIGN_WORDS) & ours


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path: Path) -> None:
    assert refusal(epsilonn=0.1) == "epsilonn is not a known setting; the nearest is epsilon."
    assert refusal(p3o={"clipp": "joint"}) == "p3o.clipp is not a known setting; the nearest is p3o.clip."
    assert refusal(zzzzzz=1) == "zzzzzz is not a known setting; `pairtune train --help` lists all of them."
    with pytest.raises(PairtuneError) as caught:
        P3OConfig(clipp="joint")
    assert one_sentence(caught.value) == "clipp is not a known setting; the nearest is clip."

    path = write(tmp_path, "model: m\ndataset: d\nkl_coef: 0.1\n")
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path)
    assert one_sentence(caught.value) == f"kl_coef in {path} is not a known setting; the nearest is beta."

    path = write(tmp_path, "model: m\ndataset: d\np3o:\n  max_ration: 3\n")
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path)
    assert (
        one_sentence(caught.value) == f"p3o.max_ration in {path} is not a known setting; the nearest is p3o.max_ratio."
    )

    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, None, {"model": "m", "dataset": "d", "clip": "none"})
    assert one_sentence(caught.value) == "--clip is not a known setting; the nearest is --p3o.clip."


def test_a_key_of_another_verb_is_told_apart() -> None:
    with pytest.raises(PairtuneError) as caught:
        SampleConfig(model="m", learning_rate=1.0)
    sentence = one_sentence(caught.value)
    assert (
        sentence
        == "learning_rate is a setting of `pairtune train`, which `pairtune sample` does not have; leave it out."
    )
    assert "which `pairtune train` does not have" in refusal(ref_model="m")


# -- Reading -----------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndataset: d\nepsilon: 0.3\nbeta: 0.1\np3o:\n  clip: none\n  kl_at: sampling\n")
    config = load_config(TrainConfig, path, {"epsilon": "0.1", "p3o.clip": "separate", "max_steps": 7})
    assert (config.epsilon, config.beta, config.max_steps, config.num_iterations) == (0.1, 0.1, 7, 4)
    assert (config.p3o.clip, config.p3o.kl_at, config.p3o.max_ratio) == ("separate", "sampling", 10.0)


@pytest.mark.parametrize(
    "line, key, value",
    [
        ("learning_rate: 1e-6", "learning_rate", 1e-6),  # PyYAML reads this as text
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 3.0", "max_steps", 3),
        ("max_minutes: null", "max_minutes", None),
        ("max_minutes: none", "max_minutes", None),
        ("p3o.max_ratio: null", "p3o.max_ratio", None),
        ("p3o:\n  max_ratio: None", "p3o.max_ratio", None),
        ("p3o:\n  clip: none", "p3o.clip", "none"),
        ("p3o:", "p3o.clip", "joint"),
        ("reward_funcs: a.b", "reward_funcs", ["a.b"]),
        ("reward_weights: 2", "reward_weights", [2.0]),
        ("report_to: none", "report_to", []),
        ("report_to:", "report_to", []),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("stop: ['\\n', none]", "stop", ["\\n", "none"]),
        ("lora_target_modules: q_proj", "lora_target_modules", "q_proj"),
        ("lora_target_modules: [q_proj]", "lora_target_modules", ["q_proj"]),
        ("resume: yes", "resume", True),
        ("device: cuda:1", "device", "cuda:1"),
    ],
)
def test_yaml_values(line: str, key: str, value: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndataset: d\n" + line)
    read = flat_values(load_config(TrainConfig, path))[key]
    assert read == value
    assert type(read) is type(value)


def test_a_wrong_value_is_named_with_its_place(tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndataset: d\nepsilon: abc\n")
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path)
    assert one_sentence(caught.value) == f'epsilon in {path} must be a number > 0, not "abc".'
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path, {"epsilon": "xyz"})
    assert one_sentence(caught.value) == '--epsilon must be a number > 0, not "xyz".'
    path = write(tmp_path, "model: m\ndataset: d\np3o:\n  max_ratio: 0\n")
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path)
    assert one_sentence(caught.value) == f"p3o.max_ratio in {path} must be a number >= 1 or null, not 0."


@pytest.mark.parametrize("overrides", [{}, {"p3o.clip": "none"}])
def test_a_section_that_is_no_section_is_refused(overrides: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, "model: m\ndataset: d\np3o: joint\n")
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path, overrides)
    assert one_sentence(caught.value) == (
        f'p3o in {path} must be a section with the keys clip, kl_at or max_ratio, not "joint".'
    )


BROKEN_FILES = [
    ("", ["is empty", "`model: ...`"]),
    ("# only a comment\n", ["is empty", "`model: ...`"]),
    ("just words\n", ['holds "just words"', "`key: value`"]),
    ("- model: m\n", ["not settings", "`key: value`"]),
    ("model: m\ndataset: : d\n", ["not valid YAML at line 2", "correct it"]),
    ("model: m\n\tdataset: d\n", ["not valid YAML at line 2", "correct it"]),
    ("model: m\np3o: {clip: joint\n", ["not valid YAML at line 3", "correct it"]),
    ("model: m\nepsilon: 0.1\nepsilon: 0.2\n", ["not valid YAML at line 3", "epsilon is given twice", "correct it"]),
    ("model: !!python/object:os.system x\n", ["not valid YAML at line 1", "correct it"]),
    ("model: \x01\n", ["not valid YAML", "correct it"]),
    ("stop: 2026-99-99\n", ["not valid YAML", "correct it"]),
]


@pytest.mark.parametrize("text, parts", BROKEN_FILES)
def test_a_broken_file_is_refused(text: str, parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PairtuneError) as caught:
        load_config(TrainConfig, path)
    sentence = one_sentence(caught.value)
    for part in [str(path), *parts]:
        assert part in sentence


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, why in [(tmp_path / "absent.yaml", "No such file"), (tmp_path, "directory")]:
        with pytest.raises(PairtuneError) as caught:
            load_config(TrainConfig, path)
        sentence = one_sentence(caught.value)
        for part in (str(path), why, "check its path"):
            assert part in sentence
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("model: übung\n".encode("latin-1"))
    with pytest.raises(PairtuneError, match="UTF-8"):
        load_config(TrainConfig, latin)


# -- Python ------------------------------------------------------------------------------------------------------------


def test_python_construction_takes_paths_tuples_sections_and_dotted_keys(tmp_path: Path) -> None:
    config = train_config(output_dir=tmp_path, reward_funcs=("a.b", "c.d"), p3o=P3OConfig(clip="none"))
    assert config.output_dir == str(tmp_path)
    assert config.reward_funcs == ["a.b", "c.d"]
    assert config.p3o.clip == "none"
    assert train_config(p3o=config.p3o, **{"p3o.kl_at": "sampling"}).p3o == P3OConfig(clip="none", kl_at="sampling")
    assert train_config(p3o={"clip": "none"}).p3o == train_config(**{"p3o.clip": "none"}).p3o == config.p3o


def test_validation_by_pydantic_alone_takes_no_unknown_key_either() -> None:
    with pytest.raises(ValueError, match="epsilonn"):
        TrainConfig.model_validate(REQUIRED[TrainConfig] | {"epsilonn": 0.1})


def test_reward_functions_may_come_from_python() -> None:
    assert TrainConfig(model="m", dataset="d").reward_funcs == []


def test_a_configuration_is_frozen_and_defaults_are_not_shared() -> None:
    config, other = train_config(), train_config()
    with pytest.raises(ValueError, match="frozen"):
        config.epsilon = 0.5  # type: ignore[misc]
    config.stop.append("x")
    assert other.stop == []


def test_a_configuration_can_be_copied() -> None:
    config = train_config(epsilon=0.3, p3o={"clip": "none"})
    assert copy.deepcopy(config) == config


def test_updates_per_step() -> None:
    assert train_config(num_iterations=3, batch_size=12).updates_per_step == 3
    assert train_config(num_iterations=3, batch_size=12, minibatch_size=4).updates_per_step == 9
    replaying = train_config(num_iterations=3, batch_size=12, minibatch_size=4, replay=2)
    assert (replaying.updates_per_batch, replaying.updates_per_step) == (9, 27)


def test_which_methods_never_sample() -> None:
    assert {name for name in METHODS if train_config(algorithm=name).offline} == {"dpo", "ipo"}
    assert train_config(algorithm="copg", **{"copg.offline": True}).offline
    assert not train_config(algorithm="p3o", **{"copg.offline": True}).offline


def test_the_value_model_is_that_of_the_method() -> None:
    sections = {"ppo.value_model": "a", "vpg.value_model": "b"}
    assert [train_config(algorithm=name, **sections).value_model for name in ("ppo", "vpg")] == ["a", "b"]


# -- Round trip --------------------------------------------------------------------------------------------------------

UNLIKE_DEFAULT: dict[str, Any] = {
    "model": "some/model",
    "model_revision": "v1",
    "dtype": "float32",
    "device": "cuda:1",
    "num_threads": 2,
    "attn_implementation": "eager",
    "trust_remote_code": True,
    "dataset": "some/dataset",
    "dataset_config": "en",
    "dataset_test_split": "validation",
    "prompt_column": "question",
    "max_prompt_length": 99,
    "dataset_train_split": "train[:10]",
    "eval_dataset": "prompts.jsonl",
    "system_prompt": "Be kind: “always”\n# and brief",
    "chat": "never",
    "reward_funcs": ["a.b.c", "path/to/file.py:f"],
    "reward_weights": [1.0, -0.1],
    "reward_batch_size": 3,
    "missing_eos_penalty": 1.0,
    "temperature": 0.7,
    "max_completion_length": 53,
    "stop": ["\n\n", "null", "yes", "1e-3"],
    "seed": 7,
    "scale_rewards": "running",
    "beta": 1e-7,
    "epsilon": 1 / 3,
    "num_generations": 4,
    "num_iterations": 2,
    "batch_size": 48,
    "minibatch_size": 16,
    "micro_batch_size": 8,
    "learning_rate": 3e-7,
    "lr_scheduler_type": "linear",
    "warmup_steps": 5,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-5,
    "max_grad_norm": None,
    "lora_r": 16,
    "lora_alpha": 8,
    "lora_target_modules": ["q_proj", "v_proj"],
    "gradient_checkpointing": True,
    "num_eval_prompts": 64,
    "eval_generations": 2,
    "completion_column": "chosen",
    "messages_column": "conversations",
    "text_column": "content",
    "max_length": 300,
    "num_eval_examples": 10,
    "num_epochs": 2.5,
    "max_steps": 1000,
    "max_minutes": 0.5,
    "max_generated_tokens": 9000,
    "reward_noise": 0.25,
    "eval_steps": 0,
    "save_steps": 0,
    "keep_last": 1,
    "output_dir": "runs/ä b",
    "resume": True,
    "report_to": ["tensorboard", "wandb"],
    "num_completions_to_log": 0,
    "p3o.clip": "none",
    "p3o.kl_at": "sampling",
    "p3o.max_ratio": None,
    "replay": 3,
    "preference_func": "a.b",
    "preference_rewards": "margins",
    "judge.model": "some-judge",
    "judge.base_url": "https://host/v1",
    "judge.api_key_env": "JUDGE_KEY",
    "judge.template": "question.txt",
    "judge.answer": "text",
    "judge.temperature": None,
    "judge.max_tokens": 64,
    "judge.batch_size": 4,
    "judge.concurrency": 2,
    "judge.requests_per_minute": 60.0,
    "judge.tokens_per_minute": 1e5,
    "judge.timeout": 5.0,
    "judge.max_retries": 2,
    "judge.cache": "answers",
    "judge.input_price": 0.15,
    "judge.output_price": 0.6,
    "sides": ["ours=a.jsonl", "b.jsonl"],
    "ppo.gamma": 0.99,
    "ppo.lam": 1.0,
    "ppo.vf_coef": 0.5,
    "ppo.value_clip": None,
    "ppo.value_model": "some/reward-model",
    "ppo.whiten_advantages": False,
    "ppo.whiten_rewards": True,
    "ppo.target_kl": 6.0,
    "ppo.kl_horizon": 500,
    "vpg.gamma": 0.9,
    "vpg.lam": 0.5,
    "vpg.vf_coef": 1.0,
    "vpg.value_model": "some/reward-model",
    "reinforce.baseline": "none",
    "rloo.clip": True,
    "grpo.standardise": False,
    "grpo.kl_in": "reward",
    "rebel.eta": 0.5,
    "raft.rank_by": "shaped",
    "copg.offline": True,
    "online_dpo.labels": "hard",
    "online_dpo.clip": True,
    "online_ipo.labels": "sampled",
    "online_ipo.clip": True,
    "dpo.label_smoothing": 0.1,
    "ipo.label_smoothing": 0.2,
    "cut_dialogues": False,
    "margin_column": None,
    "probability_column": "p",
    "reward.loss": "pairwise",
    "reward.centring": 0.01,
    "reward.label_smoothing": 0.1,
    "reward.normalise_mean": True,
    "reward.fit_head": True,
    "num_layers": 3,
    "activation_cache_gb": 0.0,
    "packing": True,
    "ref_model": "other/model",
    "reward_model": "some/reward-model",
    "best_of_n": 4,
    "output": "result.json",
    "prompt": "Hi",
    "top_p": 0.9,
    "top_k": 3,
    "trainable_layers": 2,
    "overwrite": True,
}
REFUSED_TOGETHER = {
    TrainConfig: {
        *("top_p", "top_k", "trainable_layers", "overwrite", "algorithm", "preference_func", "max_generated_tokens")
    },
    SFTConfig: {"trainable_layers", "overwrite"},
    RewardConfig: {"trainable_layers", "overwrite"},
}


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_survives_yaml(cls: type[Words], tmp_path: Path) -> None:
    keys = set(keys_of(cls)) - REFUSED_TOGETHER.get(cls, set())
    config = cls(**{key: UNLIKE_DEFAULT[key] for key in keys})
    defaults = flat_values(cls(**REQUIRED[cls]))
    assert {key for key, value in flat_values(config).items() if value != defaults[key]} == keys
    assert load_config(cls, write(tmp_path, config_to_yaml(config))) == config
    assert cls(**config_to_dict(config)) == config


def test_the_rest_survives_yaml_one_by_one(tmp_path: Path) -> None:
    for values in (
        {"trainable_layers": 2},
        {"overwrite": True},
        {"stop": []},
        {"p3o.max_ratio": 2.5},
        {"preference_func": "a.b"},
        {"max_generated_tokens": 9000},
    ):
        config = train_config(**values)
        assert load_config(TrainConfig, write(tmp_path, config_to_yaml(config))) == config


def test_yaml_is_in_the_order_of_the_help() -> None:
    values = yaml.safe_load(config_to_yaml(train_config()))
    assert next(iter(values)) == "model"
    assert list(flat_values(train_config())) == list(keys_of(TrainConfig))
    assert values["p3o"] == {"clip": "joint", "kl_at": "current", "max_ratio": 10.0}


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_is_explained_in_one_line(cls: type[Words]) -> None:
    for key, field in keys_of(cls).items():
        assert field.description, key
        assert field.description.endswith((".", "...")), key
    assert {key.partition(".")[0] for key in keys_of(cls)} == set(cls.model_fields)


# -- Warnings ----------------------------------------------------------------------------------------------------------

WARNINGS = [
    ({"num_iterations": 1}, ["num_iterations is 1", "epsilon, p3o.clip, p3o.max_ratio and p3o.kl_at do nothing"]),
    ({"num_iterations": 1, "batch_size": 8, "minibatch_size": 8}, ["num_iterations is 1"]),
    ({"p3o.clip": "none", "epsilon": 0.3}, ["epsilon is 0.3", "p3o.clip none"]),
    ({"judge.model": "m"}, ['judge.model is "m"', "not asked while preference_func is null"]),
    ({"scale_rewards": "running"}, ["scale_rewards is running", "invariance"]),
    ({"lr_scheduler_type": "constant", "warmup_steps": 3}, ["warmup_steps is 3", "constant_with_warmup"]),
    ({"max_steps": 5, "warmup_steps": 20}, ["warmup_steps is 20", "20 updates"]),
    ({"algorithm": "ppo", "num_iterations": 1}, ["num_iterations is 1", "epsilon does nothing"]),
    ({"algorithm": "dpo"}, ["num_iterations is 4", "4 times in a row"]),
    ({"algorithm": "rloo"}, ["rloo has no ratio", "of the 4 updates", "rloo.clip to true"]),
    ({"algorithm": "vpg", "num_iterations": 2}, ["vpg has no ratio", "of the 2 updates", "set num_iterations to 1."]),
    ({"algorithm": "raft"}, ["beta is 0.05", "raft.rank_by reward"]),
    ({"eval_dataset": "d", "dataset_test_split": None}, ['eval_dataset is "d"', "dataset_test_split is null"]),
]


@pytest.mark.parametrize("values, parts", WARNINGS)
def test_what_does_nothing_is_warned_of(values: dict[str, Any], parts: list[str]) -> None:
    [sentence] = warnings_for(train_config(**values))
    one_sentence(PairtuneError(sentence))
    for part in parts:
        assert part in sentence


def test_what_does_nothing_is_warned_of_in_sft_too() -> None:
    def sentences(**values: Any) -> list[str]:
        return supervised_warnings(SFTConfig(**REQUIRED[SFTConfig] | values), 20)

    [sentence] = sentences(warmup_steps=20)
    assert "the run has only 20 updates" in one_sentence(PairtuneError(sentence))
    [sentence] = sentences(warmup_steps=3, lr_scheduler_type="constant")
    assert "warmup_steps is 3" in one_sentence(PairtuneError(sentence))
    [sentence] = sentences(eval_dataset="d", dataset_test_split=None)
    assert 'eval_dataset is "d"' in one_sentence(PairtuneError(sentence))
    assert sentences() == sentences(warmup_steps=19) == sentences(lr_scheduler_type="constant") == []


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"num_iterations": 1, "batch_size": 8, "minibatch_size": 4},
        {"p3o.clip": "none"},
        {"p3o.clip": "separate", "epsilon": 0.3},
        {"algorithm": "dpo", "num_iterations": 1},
        {"algorithm": "raft", "raft.rank_by": "shaped"},
        {"algorithm": "rloo", "num_iterations": 1},
        {"algorithm": "rloo", "rloo.clip": True},
        {"max_steps": 5, "warmup_steps": 19},
        {"eval_dataset": "d"},
    ],
)
def test_what_is_sound_is_not_warned_of(values: dict[str, Any]) -> None:
    assert warnings_for(train_config(**values)) == []


# -- The files that the project ships ----------------------------------------------------------------------------------


def test_the_demo_has_one_configuration() -> None:
    packaged = Path(config_module.__file__).with_name("demo") / "demo.yaml"
    assert (ROOT / "configs" / "demo.yaml").read_text("utf-8") == packaged.read_text("utf-8"), (
        "configs/demo.yaml and src/pairtune/demo/demo.yaml differ; copy the one that you changed over the other"
    )


TRAINED = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if not path.match("[ac][bo]*_*")]
"""Those of `pairtune compare` have a test in tests/test_compare.py."""


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.name)
def test_shipped_configurations_are_sound(path: Path) -> None:
    config = load_config(TrainConfig, path)
    assert config.reward_funcs
    assert warnings_for(config) == []
    assert config.updates_per_step >= 2  # else it would not be P3O
