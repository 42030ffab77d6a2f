"""Typed configuration of every verb: a YAML file plus dotted overrides, checked before anything is loaded.

Shared words are flat; a method's own knobs stand in a section of its name (`p3o.clip`). The docstring under a field is
its help text and carries its unit. Whatever a user got wrong ends as one sentence that names the key, the value and the
mend: that is why these are pydantic models, whose errors are data. Nothing here imports torch: a mistake costs no wait.
"""

from __future__ import annotations

import difflib
import inspect
import json
import math
import os
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from pairtune.errors import PairtuneError


class Method(NamedTuple):
    """What a method of training asks of the rest of the configuration."""

    min_generations: int = 1
    """The fewest completions of one prompt from which it can learn."""
    any_sampler: bool = False
    """Whether it may learn from completions of another law than the policy's: one cut by top-p or top-k."""
    uses_ratios: bool = False
    """Whether its loss weighs by policy / sampling probability, so that several updates a batch are what it is for."""
    needs_beta: bool = False
    """Whether its loss has no meaning at beta 0."""
    replays: bool = False
    """Whether its loss stays right on completions of an earlier policy."""
    has_values: bool = False
    """Whether it learns a value function."""
    offline: bool = False
    """Whether it learns from a dataset of completions and never samples."""


METHODS: dict[str, Method] = {
    "p3o": Method(min_generations=2, uses_ratios=True, replays=True),
    "ppo": Method(uses_ratios=True, has_values=True),
    "vpg": Method(has_values=True),
    "reinforce": Method(),
    "rloo": Method(min_generations=2),
    "grpo": Method(min_generations=2, uses_ratios=True),
    "rebel": Method(min_generations=2),
    "raft": Method(min_generations=2, any_sampler=True),
    "copg": Method(min_generations=2, any_sampler=True, needs_beta=True, replays=True),
    "online_dpo": Method(min_generations=2, any_sampler=True, needs_beta=True, replays=True),
    "online_ipo": Method(min_generations=2, any_sampler=True, needs_beta=True, replays=True),
    "dpo": Method(needs_beta=True, offline=True),
    "ipo": Method(needs_beta=True, offline=True),
}

WORDS_ELSEWHERE: dict[str, str] = {
    "algorithm": "loss_type",
    "batch_size": "num_rollouts per_device_train_batch_size train_batch_size",
    "beta": "init_kl_coef kl_coef",
    "dataset": "dataset_name",
    "dtype": "bf16 fp16 torch_dtype",
    "epsilon": "clip_eps clip_range cliprange",
    "eval_dataset": "eval_dataset_name",
    "eval_steps": "eval_strategy",
    "keep_last": "save_total_limit",
    "ppo.kl_horizon": "horizon",
    "ppo.target_kl": "kl_target target",
    "ppo.value_clip": "cliprange_value",
    "ppo.value_model": "value_model_path",
    "replay": "replay_buffer_size",
    "learning_rate": "lr",
    "lora_r": "lora_rank use_peft",
    "max_completion_length": "max_new_tokens response_length",
    "max_length": "max_seq_length",
    "num_epochs": "num_train_epochs",
    "max_steps": "num_train_epochs total_episodes",
    "micro_batch_size": "gradient_accumulation_steps local_rollout_forward_batch_size",
    "minibatch_size": "mini_batch_size num_mini_batches",
    "missing_eos_penalty": "non_eos_penalty",
    "model": "model_name model_name_or_path model_path sft_model_path",
    "num_completions_to_log": "log_completions num_completions_to_print",
    "num_generations": "num_return_sequences rloo_k",
    "num_iterations": "num_ppo_epochs p3o_epochs ppo_epochs",
    "overwrite": "overwrite_output_dir",
    "p3o.max_ratio": "cliprange_ratio",
    "text_column": "dataset_text_field",
    "prompt_column": "dataset_text_field input_key",
    "ref_model": "ref_model_name_or_path",
    "resume": "resume_from_checkpoint",
    "reward_funcs": "reward_fn reward_model_name_or_path reward_model_path",
    "stop": "stop_sequences stop_token",
    "trainable_layers": "num_layers_unfrozen",
    "warmup_steps": "warmup_ratio",
}
"""Our word -> what trl, transformers and trlX call the nearest thing. Never accepted, only named in an error. Of
several of ours for one of theirs, the first that a verb has is meant."""

FOREIGN_WORDS: dict[str, list[str]] = {}
for _ours, _theirs in WORDS_ELSEWHERE.items():
    for _word in _theirs.split():
        FOREIGN_WORDS.setdefault(_word, []).append(_ours)


class Allowed(NamedTuple):
    """Put into a field's annotation: what it takes, in words, where the type does not say."""

    text: str


if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # it has no public name


class _OneSentence(ModelMetaclass):
    """Makes direct construction raise the same one-sentence errors as the command line."""

    def __call__(cls, /, **values: Any) -> Any:
        return _build(cls, values)  # type: ignore[arg-type]  # cls is a subclass of Words


class Words(BaseModel, metaclass=_OneSentence):
    """Base of every configuration and of every group of settings that several verbs share."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    topic: ClassVar[str] = ""

    @field_validator("*", mode="before")
    @classmethod
    def _as_written(cls, value: Any, info: ValidationInfo) -> Any:
        """What YAML, a shell and Python write differently becomes one thing: paths, null, one value for a list."""
        assert info.field_name is not None
        annotation = cls.model_fields[info.field_name].annotation
        kinds = kinds_of(annotation)
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        if isinstance(value, str) and value.lower() in ("null", "none") and value not in _choices(annotation):
            value = None
        takes_list = any(get_origin(kind) is list for kind in kinds)
        if value is None:
            return [] if takes_list and NoneType not in kinds else None
        if isinstance(value, str) and any(get_origin(kind) is dict for kind in kinds):
            value = _parsed(value)  # a shell gives `{beta: [0.05, 0.1]}` as text
        items = value if isinstance(value, list) else [value]
        if bool not in kinds and any(isinstance(item, bool) for item in items):
            raise ValueError("true and false are not numbers")  # pydantic would read them as 1 and 0
        if takes_list and str not in kinds and isinstance(value, str | int | float):
            return [value]
        return value


class ComputeWords(Words):
    """How models compute."""

    topic = "model"

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute precision of every pass; auto: bfloat16 where the hardware is fast at it, else float32."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$"), Allowed("auto, cpu, cuda or cuda:N")] = "auto"
    """Where to compute; auto: CUDA if there is a GPU, else the CPU."""
    num_threads: PositiveInt | None = None
    """CPU threads; null: torch's own choice. A resumed run is bit-equal only at the same number, and on a CPU."""
    attn_implementation: str = "sdpa"
    """Attention kernel of transformers: sdpa, eager, flash_attention_2, ..."""
    trust_remote_code: bool = False
    """Run Python code that a hub model brings along."""


class ModelWords(ComputeWords):
    """Which model, and how it computes."""

    topic = "model"

    model: Annotated[str, Field(min_length=1)]
    """The policy: a hub id, a local folder, a run folder (its newest checkpoint), or `smollm2-135m-instruct-q4` (comes
    as a package, no hub needed)."""
    model_revision: str | None = None
    """Branch, tag or commit of a hub model; null: its main branch."""


class PromptWords(Words):
    """Which prompts."""

    topic = "prompts"

    dataset: Annotated[str, Field(min_length=1)]
    """Prompts: a hub id, a folder, a .jsonl, .json or .parquet file, or `everyday` (prompts that pairtune ships)."""
    dataset_config: str | None = None
    """Configuration (subset) of a hub dataset."""
    dataset_test_split: str | None = "test"
    """Split of the held-out prompts; null: no held-out evaluation."""
    prompt_column: str = "prompt"
    """Column that holds the prompt: text, or a list of {role, content} turns."""
    max_prompt_length: PositiveInt = 512
    """Tokens; longer prompts are left out and counted, never cut."""


class TrainPromptWords(Words):
    """Which prompts to train on, where `PromptWords` names those to judge by."""

    topic = "prompts"

    dataset_train_split: str = "train"
    """Split of the training prompts."""
    eval_dataset: str | None = None
    """Another dataset for the held-out prompts (its `dataset_test_split`); null: the same as `dataset`."""


class ChatWords(Words):
    """How plain text becomes a conversation."""

    topic = "prompts"

    system_prompt: str | None = None
    """System turn put before plain prompts that become conversations; null: none of ours."""
    chat: Literal["auto", "always", "never"] = "auto"
    """Whether a plain-text prompt is wrapped as a user turn; auto: if the tokenizer has a chat template."""


class RewardWords(Words):
    """What is good."""

    topic = "reward"

    reward_funcs: list[Annotated[str, Field(min_length=1)]] = []
    """One or more of: `package.module.function`, `path/to/file.py:function`, hub id or folder of a reward model.
    Required, unless functions are passed in from Python."""
    reward_weights: list[float] | None = None
    """Weight of each reward function in the sum; null: 1 each."""
    reward_batch_size: PositiveInt = 16
    """Completions a forward pass of a reward model."""
    missing_eos_penalty: NonNegativeFloat | None = None
    """Reward units, subtracted from a completion that the length cap ended; null: nothing."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> RewardWords:
        if self.reward_weights is not None and self.reward_funcs and len(self.reward_weights) != len(self.reward_funcs):
            raise PairtuneError(
                f"reward_weights has {len(self.reward_weights)} values and reward_funcs {len(self.reward_funcs)}; "
                "give one weight for each reward function."
            )
        return self


EndpointURL = Annotated[str, Field(pattern=r"^https?://[^\s/@?#]+[^\s@?#]*$"), Allowed("a URL like https://host/v1")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$"), Allowed("the name of an environment variable")]


class JudgeWords(Words):
    """Who says which of two completions is better."""

    topic = "judge"

    model: Annotated[str, Field(min_length=1)] | None = None
    """Who judges: a model at the endpoint base_url; without one a language or reward model (a hub id, a folder, a run
    folder), or a preference or reward function (`package.module.function`, `path/to/file.py:function`)."""
    base_url: EndpointURL | None = None
    """OpenAI-compatible endpoint; `/chat/completions` is added to it. null: the judge is on this machine."""
    api_key_env: VariableName | None = "OPENAI_API_KEY"
    """Name of the environment variable that holds the endpoint's key (never the key itself); null: it needs none."""
    template: str | None = None
    """File with a question of your own, holding {prompt}, {first} and {second}; null: the P3O paper's question."""
    answer: Literal["probabilities", "text"] = "probabilities"
    """How a language model here is asked: the probabilities of A and B where the verdict stands, or a written answer.
    Endpoints always write."""
    temperature: NonNegativeFloat | None = 0.0
    """Of a written answer; null: the endpoint's own."""
    max_tokens: PositiveInt = 256
    """Tokens of a written answer at most; one that is cut short has no verdict."""
    batch_size: PositiveInt = 8
    """Questions a forward pass of a model here."""
    concurrency: PositiveInt = 8
    """Requests under way at a time."""
    requests_per_minute: PositiveFloat | None = None
    """Requests sent a minute at most; null: no limit of ours."""
    tokens_per_minute: PositiveFloat | None = None
    """Tokens read and written a minute at most; null: no limit of ours."""
    timeout: PositiveFloat = 60.0
    """Seconds to wait for an answer."""
    max_retries: NonNegativeInt = 6
    """Times that a request is sent again after a time-out, 429, 5xx or an answer that cannot be read."""
    cache: str | None = None
    """Folder where answers are kept, so that no question is asked twice; null: in pairtune's own cache. A model here
    keeps its verdicts for `pairtune judge`, not in training."""
    input_price: NonNegativeFloat | None = None
    """Price of a million tokens read, in your currency; null: no cost is shown."""
    output_price: NonNegativeFloat | None = None
    """Price of a million tokens written."""


class PreferenceWords(Words):
    """Which of two is better, where a function or a judge says that and not how good each is."""

    topic = "reward"

    preference_func: Annotated[str, Field(min_length=1)] | None = None
    """Feedback of training in place of rewards: `judge` (see judge.model), or a function (named as in reward_funcs)
    that gives the probability that the first of two is better; reward_funcs then judge held-out completions alone."""
    preference_rewards: Literal["logits", "margins"] = "logits"
    """Rewards from preferences, for methods that need rewards: a row's mean of log-odds, or of 2 p - 1."""
    judge: JudgeWords = Field(default_factory=JudgeWords)
    """The judge, read when `preference_func` is judge."""


class SamplingWords(Words):
    """How completions are drawn."""

    topic = "sampling"

    temperature: PositiveFloat = 1.0
    """Divides the logits before sampling; the policy of every KL and ratio is the law at this temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that hold this probability; 1: all."""
    top_k: NonNegativeInt = 0
    """Sample from this many likeliest tokens; 0: all."""
    max_completion_length: PositiveInt = 256
    """Tokens of a completion at most, end-of-sequence token included."""
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Texts that end a completion, beside the model's end-of-sequence tokens."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of sampling and, in training, of the order of prompts."""


class EvaluationWords(Words):
    """How much is measured."""

    topic = "evaluation"

    num_eval_prompts: PositiveInt | None = None
    """Held-out prompts to evaluate on; null: all."""
    eval_generations: PositiveInt = 1
    """Completions a held-out prompt."""


UnitInterval = Annotated[float, Field(ge=0, le=1)]


class P3OConfig(Words):
    """Knobs of Pairwise Proximal Policy Optimization (read when `algorithm` is p3o)."""

    topic = "p3o"

    clip: Literal["joint", "separate", "none"] = "joint"
    """What the clip bounds: the pair's difference of log-ratios, each completion's ratio, or nothing."""
    kl_at: Literal["current", "sampling"] = "current"
    """Policy whose KL is in the reward: the one being updated, or the one that sampled (the paper's Algorithm 2)."""
    max_ratio: Annotated[float, Field(ge=1)] | None = 10.0
    """c: the constant importance weight is clamped to [1/c, c]; null: the bare paper."""


class VPGConfig(Words):
    """Knobs of vanilla policy gradient (read when `algorithm` is vpg)."""

    topic = "vpg"

    gamma: UnitInterval = 1.0
    """Discount of later rewards, a token."""
    lam: UnitInterval = 0.95
    """GAE's lambda: 1 trusts the rewards that came, 0 the value function."""
    vf_coef: NonNegativeFloat = 0.1
    """Weight of the value loss."""
    value_model: str | None = None
    """Reward model that the value network starts from: a hub id or a folder; null: a head on the policy."""


class PPOConfig(VPGConfig):
    """Knobs of token-wise PPO (read when `algorithm` is ppo)."""

    topic = "ppo"

    value_clip: PositiveFloat | None = 0.2
    """Values may move this far from those of the batch, reward units, before the value loss ignores it; null: any."""
    whiten_advantages: bool = True
    """Advantages of a batch get mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Token rewards of a batch get variance 1 (their mean stays)."""
    target_kl: PositiveFloat | None = None
    """Nats a completion that the adaptive controller steers beta to; null: beta is fixed."""
    kl_horizon: PositiveInt = 10_000
    """Completions over which the adaptive controller may change beta by a factor of 1.2 at most."""


class ReinforceConfig(Words):
    """Knobs of REINFORCE (read when `algorithm` is reinforce)."""

    topic = "reinforce"

    baseline: Literal["moving_average", "none"] = "moving_average"
    """Subtracted from the trajectory reward: the mean of all earlier ones of the run, or nothing."""


class RLOOConfig(Words):
    """Knobs of REINFORCE leave-one-out (read when `algorithm` is rloo)."""

    topic = "rloo"

    clip: bool = False
    """Clip the ratio of whole completions to 1 -+ epsilon, as trl does; the paper has no ratio."""


class RAFTConfig(Words):
    """Knobs of RAFT (read when `algorithm` is raft)."""

    topic = "raft"

    rank_by: Literal["reward", "shaped"] = "reward"
    """What the best completion is best by: the reward, or the reward with the KL term."""


class GRPOConfig(Words):
    """Knobs of GRPO (read when `algorithm` is grpo)."""

    topic = "grpo"

    standardise: bool = True
    """Divide a group's centred rewards by their standard deviation, as the paper does; false: Dr. GRPO's."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL stands: k3 of every token in the loss (the paper), or log-ratios in the reward."""


class REBELConfig(Words):
    """Knobs of REBEL (read when `algorithm` is rebel)."""

    topic = "rebel"

    eta: PositiveFloat = 1.0
    """Nats by which the log-ratio of a pair is to move for each unit of reward between the two."""


class OnlinePreferenceConfig(Words):
    """Knobs of online_dpo and of online_ipo (each has a section of its own)."""

    topic = "online_dpo"

    labels: Literal["expected", "sampled", "hard"] = "expected"
    """Preference of a pair: its probability s(r1 - r2), one draw from it, or the better one (a tie: no pair)."""
    clip: bool = False
    """Stop a pair whose log-ratio moved epsilon nats to where its loss is smaller (P3O's clip; no paper has it)."""


class OnlineIPOConfig(OnlinePreferenceConfig):
    """Knobs of online IPO (read when `algorithm` is online_ipo)."""

    topic = "online_ipo"


class DPOConfig(Words):
    """Knobs of offline DPO (read when `algorithm` is dpo)."""

    topic = "dpo"

    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the dataset's labels taken to be wrong."""


class IPOConfig(DPOConfig):
    """Knobs of offline IPO (read when `algorithm` is ipo)."""

    topic = "ipo"


class CoPGConfig(Words):
    """Knobs of contrastive policy gradient (read when `algorithm` is copg)."""

    topic = "copg"

    offline: bool = False
    """Learn from a dataset of scored completions (`prompt`, `completion`, `reward`) and never sample."""


class AlgorithmWords(Words):
    """What is learned from a batch."""

    topic = "algorithm"

    algorithm: Literal[
        "p3o",
        "ppo",
        "vpg",
        "reinforce",
        "rloo",
        "grpo",
        "rebel",
        "raft",
        "copg",
        "online_dpo",
        "online_ipo",
        "dpo",
        "ipo",
    ] = "p3o"
    """Method of training: p3o (pairwise, Wu et al. 2023) or one of its rivals; dpo and ipo read a preference
    dataset."""
    scale_rewards: Literal["none", "running"] = "none"
    """running: divide rewards by their running standard deviation (breaks the invariance to a shift per prompt)."""
    reward_noise: NonNegativeFloat = 0.0
    """Standard deviation of normal noise that is added to the rewards of training, not to held-out ones."""
    beta: NonNegativeFloat = 0.05
    """Weight of the KL to the starting policy, reward units a nat; 0: no pull (the KL is logged all the same)."""
    epsilon: PositiveFloat = 0.2
    """Clip range: of a probability ratio, or for the joint clip of a difference of log-ratios (nats)."""
    num_generations: PositiveInt = 2
    """Completions a prompt, K."""
    num_iterations: PositiveInt = 4
    """Passes over a batch of experience. With one update a batch nothing is ever clipped."""
    batch_size: PositiveInt = 64
    """Prompts a step, over all processes."""
    minibatch_size: PositiveInt | None = None
    """Prompts an optimizer update, a divisor of `batch_size`; null: all of the batch."""
    micro_batch_size: PositiveInt | None = None
    """Prompts a forward pass on one process; changes memory and speed, not the gradient; null: all of the minibatch."""
    replay: NonNegativeInt = 0
    """Earlier batches that every step learns from again, beside its own (p3o, copg, online_dpo, online_ipo)."""
    p3o: P3OConfig = Field(default_factory=P3OConfig)
    """Knobs of p3o."""
    ppo: PPOConfig = Field(default_factory=PPOConfig)
    """Knobs of ppo."""
    vpg: VPGConfig = Field(default_factory=VPGConfig)
    """Knobs of vpg."""
    reinforce: ReinforceConfig = Field(default_factory=ReinforceConfig)
    """Knobs of reinforce."""
    rloo: RLOOConfig = Field(default_factory=RLOOConfig)
    """Knobs of rloo."""
    grpo: GRPOConfig = Field(default_factory=GRPOConfig)
    """Knobs of grpo."""
    rebel: REBELConfig = Field(default_factory=REBELConfig)
    """Knobs of rebel."""
    raft: RAFTConfig = Field(default_factory=RAFTConfig)
    """Knobs of raft."""
    copg: CoPGConfig = Field(default_factory=CoPGConfig)
    """Knobs of copg."""
    online_dpo: OnlinePreferenceConfig = Field(default_factory=OnlinePreferenceConfig)
    """Knobs of online_dpo."""
    online_ipo: OnlineIPOConfig = Field(default_factory=OnlineIPOConfig)
    """Knobs of online_ipo."""
    dpo: DPOConfig = Field(default_factory=DPOConfig)
    """Knobs of dpo."""
    ipo: IPOConfig = Field(default_factory=IPOConfig)
    """Knobs of ipo."""


class OptimizerWords(Words):
    """How weights move, and which."""

    topic = "optimizer"

    learning_rate: NonNegativeFloat = 1e-6
    """Step size of AdamW at the end of the warm-up."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    """Course of the learning rate over all updates; linear and cosine end at 0."""
    warmup_steps: NonNegativeInt = 0
    """Optimizer updates (not steps) over which the learning rate rises from 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay of AdamW, per unit of learning rate."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's mean of gradients."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's mean of squared gradients."""
    adam_epsilon: PositiveFloat = 1e-8
    """Added to the root in AdamW's denominator."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients are scaled down to this Euclidean norm; null: never."""
    trainable_layers: PositiveInt | None = None
    """Train only the last n decoder layers and the final norm; null: all weights."""
    lora_r: PositiveInt | None = None
    """Rank of LoRA adapters; null: no LoRA."""
    lora_alpha: PositiveInt = 32
    """LoRA's scale times its rank."""
    lora_target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: `all-linear`, a regular expression, or names."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class RunWords(Words):
    """How long, how often measured, and what is kept."""

    topic = "run"

    max_steps: PositiveInt = 200
    """Steps, each one batch collected and learned from."""
    max_minutes: PositiveFloat | None = None
    """Minutes of training after which the run ends early, with a checkpoint; null: no limit."""
    max_generated_tokens: PositiveInt | None = None
    """Completion tokens sampled in training; the step that reaches them is the last; null: no limit."""
    eval_steps: NonNegativeInt = 10
    """Steps between held-out evaluations; 0: only before and after."""
    save_steps: NonNegativeInt = 50
    """Steps between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints kept."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/train"
    """Run folder: configuration, logs, samples, checkpoints, report."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder. Without --config, the folder's own config.yaml is taken."""
    overwrite: bool = False
    """Replace a run that is already in the run folder."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers to log to, beside the run folder."""
    num_completions_to_log: NonNegativeInt = 4
    """Rows of samples.jsonl a step."""


class TrainConfig(
    ModelWords,
    PromptWords,
    TrainPromptWords,
    ChatWords,
    RewardWords,
    PreferenceWords,
    SamplingWords,
    AlgorithmWords,
    OptimizerWords,
    EvaluationWords,
    RunWords,
):
    """Everything `pairtune train` and `pairtune demo` can be told."""

    @property
    def updates_per_batch(self) -> int:
        """Optimizer updates that one batch of experience is used for in a step."""
        return self.num_iterations * (self.batch_size // (self.minibatch_size or self.batch_size))

    @property
    def updates_per_step(self) -> int:
        """Optimizer updates of a step that has all its earlier batches to learn from again."""
        return (1 + self.replay) * self.updates_per_batch

    @property
    def offline(self) -> bool:
        """Whether training reads completions from a dataset and never samples."""
        return METHODS[self.algorithm].offline or (self.algorithm == "copg" and self.copg.offline)

    @property
    def adapts_beta(self) -> bool:
        """Whether the weight of the KL changes from step to step."""
        return self.algorithm == "ppo" and self.ppo.target_kl is not None

    @property
    def value_model(self) -> str | None:
        """What the value network starts from, None where there is none of its own."""
        return self.ppo.value_model if self.algorithm == "ppo" else self.vpg.value_model

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        if sentences := list(_contradictions(self)):
            raise PairtuneError("\n".join(sentences))
        return self


class SupervisedOptimizerWords(OptimizerWords):
    """How weights move when the dataset is fixed: defaults as in the recipe of Stanford Alpaca (2023)."""

    learning_rate: NonNegativeFloat = 2e-5
    """Step size of AdamW at the end of the warm-up."""
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """Course of the learning rate over all updates; linear and cosine end at 0."""
    warmup_steps: NonNegativeInt | None = None  # type: ignore[assignment]  # the loop puts a number in its place
    """Updates over which the learning rate rises from 0; null: 3% of all updates."""


class SupervisedWords(SupervisedOptimizerWords):
    """How a fixed dataset is gone through, how often the model is measured, and what is kept."""

    topic = "run"

    batch_size: PositiveInt = 32
    """Rows an update at most, over all processes; an epoch is cut into updates of equal size (one row more or less)."""
    micro_batch_size: PositiveInt | None = 4
    """Rows a forward pass on one process; changes memory and speed, not the gradient; null: all of the update."""
    num_epochs: PositiveFloat = 1.0
    """Passes over the training rows; 0.5: half of them."""
    max_steps: PositiveInt | None = None
    """Updates, in place of what `num_epochs` comes to; null: as `num_epochs` says."""
    max_minutes: PositiveFloat | None = None
    """Minutes of training after which the run ends early, with a checkpoint; null: no limit."""
    eval_steps: NonNegativeInt = 50
    """Updates between held-out evaluations; 0: only before and after."""
    save_steps: NonNegativeInt = 100
    """Updates between checkpoints; 0: only at the end."""
    keep_last: PositiveInt = 2
    """Checkpoints kept."""
    output_dir: Annotated[str, Field(min_length=1)]
    """Run folder: configuration, logs, checkpoints."""
    resume: bool = False
    """Go on from the newest checkpoint of the run folder. Without --config, the folder's own config.yaml is taken."""
    overwrite: bool = False
    """Replace a run that is already in the run folder."""
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers to log to, beside the run folder."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the order of rows, and of whatever is initialised at random."""


class SFTConfig(ModelWords, PromptWords, TrainPromptWords, ChatWords, SupervisedWords):
    """Everything `pairtune sft` can be told."""

    topic = "prompts"

    model: Annotated[str, Field(min_length=1)]
    """The model to fine-tune: a hub id, a local folder, a run folder (its newest checkpoint), or
    `smollm2-135m-instruct-q4` (comes as a package, no hub needed)."""
    dataset: Annotated[str, Field(min_length=1)]
    """Examples: a hub id, a folder, or a .jsonl, .json or .parquet file. Which of the four columns below it has says
    how it is read."""
    dataset_test_split: str | None = "test"
    """Split of the held-out examples; null: no held-out evaluation."""
    prompt_column: str = "prompt"
    """Column with the prompt that `completion_column` answers: text, or a list of {role, content} turns."""
    completion_column: str = "completion"
    """Column with the completion to learn; `chosen` for a preference dataset, whose prompts may be implicit."""
    messages_column: str = "messages"
    """Column with a conversation, a list of {role, content} turns; every turn of the assistant is learned. Read where
    there is no completion column."""
    text_column: str = "text"
    """Column with plain text, all of which is learned. Read where there is neither of the two."""
    max_prompt_length: PositiveInt = 512
    """Tokens; rows with a longer prompt are left out and counted, never cut. Conversations and texts have no such
    limit."""
    max_length: PositiveInt = 1024
    """Tokens of an example, prompt included; longer ones are cut to their beginning and counted."""
    packing: bool = False
    """Several examples in one row of a forward pass, blind to each other, where the architecture allows it; changes
    memory and speed, not the gradient."""
    dataset_train_split: str = "train"
    """Split of the training examples."""
    eval_dataset: str | None = None
    """Another dataset for the held-out examples (its `dataset_test_split`); null: the same as `dataset`."""
    num_eval_examples: PositiveInt | None = None
    """Held-out examples to evaluate on; null: all."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/sft"
    """Run folder: configuration, logs, checkpoints."""

    @model_validator(mode="after")
    def _fits_together(self) -> SFTConfig:
        if sentences := list(_run_contradictions(self)):
            raise PairtuneError("\n".join(sentences))
        return self


class RewardLearningConfig(Words):
    """Knobs of reward learning."""

    topic = "reward"

    loss: Literal["plackett_luce", "pairwise"] = "plackett_luce"
    """What rankings are learned by: the likelihood of the ranking, or Bradley-Terry averaged over a prompt's pairs. For
    pairs both are Bradley-Terry."""
    centring: NonNegativeFloat = 0.0
    """Weight of (chosen + rejected)^2, which pulls a pair's mean reward to 0 (trl advises 0.01); 0: maximum
    likelihood."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs' labels taken to be wrong."""
    fit_head: bool = False
    """Fit the head alone before the first update, to up to 4096 rows, in place of a random one. Its penalty is chosen
    by cross-validation."""
    normalise_mean: bool = False
    """Shift rewards so that up to 512 of the best training completions have mean 0. The shift is a number in the saved
    config that only pairtune reads: the model's class has no bias."""


class RewardConfig(ModelWords, PromptWords, TrainPromptWords, ChatWords, SupervisedWords):
    """Everything `pairtune reward` can be told."""

    topic = "prompts"

    model: Annotated[str, Field(min_length=1)]
    """Where the reward model starts: a language model (a hub id, a local folder, a run folder, or
    `smollm2-135m-instruct-q4`), which gets a fresh head, or a reward model, which keeps its own."""
    dataset: Annotated[str, Field(min_length=1)]
    """Comparisons: a hub id, a folder, or a .jsonl, .json or .parquet file with `chosen` and `rejected` (`prompt` may
    be implicit), or with `prompt`, `completions` and `ranks`."""
    dataset_test_split: str | None = "test"
    """Split of the held-out comparisons; null: no held-out evaluation."""
    max_prompt_length: PositiveInt = 512
    """Tokens; rows with a longer prompt are left out and counted, but see `cut_dialogues`."""
    dataset_train_split: str = "train"
    """Split of the training comparisons."""
    eval_dataset: str | None = None
    """Another dataset for the held-out comparisons (its `dataset_test_split`); null: the same as `dataset`."""
    cut_dialogues: bool = True
    """A dialogue with a longer prompt loses its oldest turns, never the last one; false: it is left out."""
    max_completion_length: PositiveInt = 512
    """Tokens; a longer completion is cut to its beginning and scored without an end-of-sequence token."""
    margin_column: str | None = "margin"
    """Column, where there is one, with the reward by which a chosen completion should lead; null: not read."""
    probability_column: str | None = "probability"
    """Column, where there is one, with the probability that the chosen completion is better; null: not read."""
    num_eval_examples: PositiveInt | None = None
    """Held-out rows to evaluate on; null: all."""
    num_layers: PositiveInt | None = None
    """Keep only the first n decoder layers: a reward model that costs less and, from few comparisons, may learn more;
    null: all."""
    activation_cache_gb: NonNegativeFloat = 2.0
    """GiB of memory at most for what the layers below `trainable_layers` make of rows that are read more than once, so
    that they meet a row once and not once an epoch; 0: none."""
    reward: RewardLearningConfig = Field(default_factory=RewardLearningConfig)
    """Knobs of reward learning."""
    learning_rate: NonNegativeFloat = 1e-5
    """Step size of AdamW at the end of the warm-up."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/reward"
    """Run folder: configuration, logs, checkpoints, reward_report.json."""

    @model_validator(mode="after")
    def _fits_together(self) -> RewardConfig:
        if sentences := list(_run_contradictions(self)):
            raise PairtuneError("\n".join(sentences))
        return self


class EvaluateConfig(ModelWords, PromptWords, ChatWords, RewardWords, SamplingWords, EvaluationWords):
    """Everything `pairtune evaluate` can be told."""

    topic = "evaluation"

    dataset_test_split: str = "test"
    """Split of the held-out prompts."""
    reward_model: str | None = None
    """Measure this reward model (a hub id, a folder or a run folder) on the comparisons of `dataset`, and nothing
    else; `model` is not needed then. null: measure `model`."""
    ref_model: str | None = None
    """Measure the KL to this model: a hub id or a local folder; null: no KL."""
    batch_size: PositiveInt = 64
    """Prompts sampled and scored at a time; changes memory and speed only."""
    best_of_n: PositiveInt = 1
    """Draw this many for every completion that is measured, and keep the one of the largest reward; 1: no choice."""
    output: str | None = None
    """JSON file for the result; null: only printed."""

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, values: Any) -> Any:
        """A reward model stands in for the policy that is not measured."""
        if isinstance(values, dict) and values.get("reward_model") is not None and values.get("model") is None:
            return values | {"model": values["reward_model"]}
        return values


class SideWords(Words):
    """What is judged."""

    topic = "sides"

    sides: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Paths or NAME=path, two sides or more in all: a file of completions, the JSON of `pairtune evaluate`, a run
    folder (its last held-out samples), a comparison (each of its arms is a side), or a model (sampled first)."""
    completion_column: str = "completion"
    """Column of a file that holds the completion, beside `prompt_column`."""


class JudgeConfig(SideWords, PromptWords, ChatWords, SamplingWords, EvaluationWords, ComputeWords):
    """Everything `pairtune judge` can be told."""

    topic = "result"

    dataset: str | None = None  # type: ignore[assignment]  # files bring their own prompts
    """Prompts on which models are sampled: a hub id, a folder or a file; null: those that the other sides share."""
    dataset_test_split: str = "test"
    """Split of these prompts."""
    num_eval_prompts: PositiveInt | None = None
    """Prompts to judge on, the first that all sides share; null: all."""
    eval_generations: PositiveInt = 1
    """Completions a prompt that models are sampled for."""
    judge: JudgeWords = Field(default_factory=JudgeWords)
    """The judge."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/judge"
    """Folder of judge.json (the tables) and verdicts.jsonl (a line a verdict)."""
    overwrite: bool = False
    """Replace the result of other sides or another judge that is already there."""

    @model_validator(mode="after")
    def _fits_together(self) -> JudgeConfig:
        if sentences := list(_judge_contradictions(self.judge)):
            raise PairtuneError("\n".join(sentences))
        return self


class SampleConfig(ModelWords, ChatWords, SamplingWords):
    """Everything `pairtune sample` can be told."""

    topic = "sampling"

    model: Annotated[str, Field(min_length=1)]
    """A run folder (its newest checkpoint), a hub id, a local folder, or `smollm2-135m-instruct-q4`."""
    prompt: str | None = None
    """Text to answer; null: ask for one after another."""
    num_generations: PositiveInt = 1
    """Completions a prompt."""


Settings = Annotated[dict[str, Any], Allowed("settings of `pairtune train`, as `key: value`")]
Axis = Annotated[list[Any], Field(min_length=1)]


class BudgetWords(Words):
    """What every cell of a comparison may spend in training; evaluations are not counted."""

    topic = "budget"

    completions: PositiveInt | None = None
    """Completions that every cell learns from: it takes as many whole steps as fit; null: `base.max_steps` decides."""
    tokens: PositiveInt | None = None
    """Tokens that every cell samples: the step that reaches them is its last; null: not limited."""
    completions_per_step: PositiveInt | None = None
    """Completions a step of every cell, whatever its num_generations; null: batch_size times num_generations of
    `base`."""


class SweepWords(Words):
    """How each method's own settings are chosen before the comparison: by one rule, on other prompts."""

    topic = "sweep"

    axes: Annotated[dict[str, Axis], Allowed("lists of values by setting, such as {learning_rate: [1e-5, 1e-4]}")] = {}
    """Setting -> values to try for every method, such as {learning_rate: [1e-5, 1e-4]}; empty: no sweep."""
    rule: Literal["objective", "reward"] = "objective"
    """Kept is what ends highest in held-out reward - beta * KL, or in held-out reward."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1_000_003
    """Seed of every run of the sweep; none of `seeds`."""
    split: str | None = None
    """Split of the prompts that the sweep is judged on, apart from those of the comparison, such as `test[:32]`; not
    needed for a task."""
    completions: PositiveInt | None = None
    """Budget of a run of the sweep; null: that of a cell."""
    eval_generations: PositiveInt | None = None
    """Completions a held-out prompt at the end of a run of the sweep, so that chance does not choose; null: as in the
    comparison."""


class TaskWords(Words):
    """A language in which every completion can be enumerated, in place of model, dataset and reward: its frontier is
    known exactly."""

    topic = "task"

    policy: Literal["transformer", "table"] | None = None
    """The starting policy: a transformer of two layers, or a free table of logits; null: no task."""
    vocab_size: Annotated[int, Field(ge=3, le=27)] = 3
    """Words, the end of a completion among them."""
    num_prompts: PositiveInt = 3
    """Prompts of the language."""
    max_completion_length: PositiveInt = 3
    """Tokens, the end of a completion among them."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the rewards and of the starting policy."""
    num_rows: PositiveInt = 48
    """Held-out rows, prompts in turn: what is sampled for the head-to-head. KL and reward are enumerated."""


class CompareConfig(Words):
    """Everything `pairtune compare` can be told."""

    topic = "comparison"

    base: Settings
    """Settings of `pairtune train` that all cells share: one starting policy, one reward, one split of prompts."""
    methods: Annotated[
        dict[str, dict[str, Any] | None] | list[str], Allowed("settings by a method's name, or a list of algorithms")
    ] = {}
    """Name in the tables -> its settings over `base`, `algorithm` among them; or a list of algorithms; empty: the
    algorithm of `base`."""
    axes: Annotated[dict[str, Axis], Allowed("lists of values by setting, such as {beta: [0.05, 0.1]}")] = {}
    """Setting -> values: every combination is a cell of every method. A setting of a method's own section concerns that
    method alone."""
    cells: Annotated[list[dict[str, Any]], Allowed("a list of cells, each settings over `base` with its `method`")] = []
    """Cells beside the grid, each settings over those of its `method`."""
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)] = [0, 1, 2]
    """Every cell is run once a seed. One alone says nothing about the next training run."""
    preset: Literal["kl_coefficient", "clipping", "clip_form", "kl_at", "num_generations", "reward_noise"] | None = None
    """A ready-made ablation, which gives the axes (docs/compare.md lists them); `axes` win over it."""
    budget: BudgetWords = Field(default_factory=BudgetWords)
    """What every cell may spend."""
    sweep: SweepWords = Field(default_factory=SweepWords)
    """How each method's own settings are chosen."""
    task: TaskWords = Field(default_factory=TaskWords)
    """A language whose frontier is known."""
    held_out_reward_funcs: list[Annotated[str, Field(min_length=1)]] = []
    """Rewards that nobody trained on, named as in reward_funcs: stored completions are scored again, for a second
    head-to-head."""
    parallel: PositiveInt = 1
    """Cells at work at a time, each in a process of its own with `base.num_threads` threads (null: 1)."""
    keep_checkpoints: bool = True
    """Keep the last checkpoint of finished cells; false: a finished cell is its logs and samples."""
    output_dir: Annotated[str, Field(min_length=1)] = "runs/compare"
    """Comparison folder: cells/, sweep/, comparison.json, report.html. Cells that are finished there are not run
    again."""

    @model_validator(mode="after")
    def _fits_together(self) -> CompareConfig:
        if sentences := list(_compare_contradictions(self)):
            raise PairtuneError("\n".join(sentences))
        return self


ConfigT = TypeVar("ConfigT", bound=Words)
VERB_OF: dict[type[Words], str] = {
    TrainConfig: "train",
    SFTConfig: "sft",
    RewardConfig: "reward",
    EvaluateConfig: "evaluate",
    SampleConfig: "sample",
    JudgeConfig: "judge",
    CompareConfig: "compare",
}
MAX_SENTENCES = 5


# -- What does not fit together ----------------------------------------------------------------------------------------


def _contradictions(config: TrainConfig) -> Iterator[str]:
    """One sentence for each pair of settings that cannot both be meant."""
    name, method = config.algorithm, METHODS[config.algorithm]
    if config.num_generations < method.min_generations and not config.offline:
        yield (
            f"num_generations is {config.num_generations}, but {name} compares completions of one prompt; "
            f"give {method.min_generations} or more."
        )
    if not (method.any_sampler or config.offline) and (config.top_p < 1 or config.top_k > 0):
        key, value, mend = ("top_p", config.top_p, 1) if config.top_p < 1 else ("top_k", config.top_k, 0)
        why = "weighs by probability ratios" if method.uses_ratios else "differentiates the law that samples"
        yield f"{key} is {value}, but {name} {why}, which a truncated law falsifies; train with {key} {mend}."
    if method.needs_beta and config.beta == 0:
        yield f"beta is 0, but {name} divides by it, or has no reference without it; give a beta above 0, such as 0.05."
    if config.replay and (config.offline or not method.replays):
        why = "reads a dataset" if config.offline else "is right only on completions of the policy as it is"
        methods = _or(tuple(other for other, its in METHODS.items() if its.replays))
        yield f"replay is {config.replay}, but {name} {why}; set it to 0, or take {methods}."
    if config.offline and config.scale_rewards == "running":
        yield f"scale_rewards is running, but {name} takes its rewards from the dataset; set it to none."
    if config.offline and config.reward_noise:
        yield f"reward_noise is {config.reward_noise}, but {name} takes its rewards from the dataset; set it to 0."
    if config.offline and config.max_generated_tokens is not None:
        yield (
            f"max_generated_tokens is {config.max_generated_tokens}, but {name} reads a dataset and generates none; "
            "leave it out."
        )
    if config.max_generated_tokens is not None and config.lr_scheduler_type in ("linear", "cosine"):
        yield (
            f"lr_scheduler_type is {config.lr_scheduler_type}, whose end max_generated_tokens does not know; take "
            "constant or constant_with_warmup."
        )
    if config.preference_func == "judge":
        yield from _judge_contradictions(config.judge)
    if config.preference_func is not None:
        if config.offline:
            yield f"preference_func is {_show(config.preference_func)}, but {name} reads a dataset; set it to null."
        if config.num_generations < 2:
            yield "num_generations is 1, but preference_func compares two completions of a prompt; give 2 or more."
        for key in ("missing_eos_penalty", "scale_rewards", "reward_noise"):
            if (value := getattr(config, key)) not in (None, "none", 0):
                yield f"{key} is {value}, but with preference_func there are no rewards to change; leave it out."
    if config.minibatch_size is not None and config.batch_size % config.minibatch_size:
        yield (
            f"minibatch_size is {config.minibatch_size}, which does not divide batch_size {config.batch_size}; "
            f"give a divisor, such as {math.gcd(config.batch_size, config.minibatch_size)}."
        )
    yield from _run_contradictions(config)


def _judge_contradictions(judge: JudgeWords) -> Iterator[str]:
    """The same of a judge that is to be asked."""
    if judge.model is None:
        yield "judge.model is missing; give --judge.model, who judges."
    if (judge.input_price is None) != (judge.output_price is None):
        given, lacking = ("input", "output") if judge.output_price is None else ("output", "input")
        yield f"judge.{given}_price is given and judge.{lacking}_price not; give both, or none."


def _run_contradictions(config: TrainConfig | SupervisedWords) -> Iterator[str]:
    """The same of what all stages share."""
    if config.lora_r is not None and config.trainable_layers is not None:
        yield (
            f"lora_r is {config.lora_r} and trainable_layers {config.trainable_layers}, but training moves either "
            "adapters or layers; set one of the two to null."
        )
    if config.resume and config.overwrite:
        yield "resume and overwrite are both true, but a run is either continued or replaced; set one of them to false."


def _compare_contradictions(config: CompareConfig) -> Iterator[str]:
    """One sentence for each thing that `compare` decides and `base` or a method decides too, or that does not fit."""
    if config.budget.completions is not None and config.budget.tokens is not None:
        yield (
            f"budget.completions is {config.budget.completions} and budget.tokens {config.budget.tokens}, but cells "
            "are equal in one of the two; leave one out."
        )
    for key in ("output_dir", "resume", "overwrite", "seed"):
        if key in config.base:
            mend = "give `seeds`" if key == "seed" else "leave it out"
            yield f"base.{key} is {_show(config.base[key])}, but `pairtune compare` sets it for every cell; {mend}."
    for key in config.sweep.axes:
        if key in config.axes:
            yield f"{key} stands in axes and in sweep.axes, but is either compared or chosen; leave it out of one."
    if config.sweep.axes and config.sweep.seed in config.seeds:
        yield f"sweep.seed is {config.sweep.seed}, one of seeds; give another, so that no run chooses for itself."
    if config.sweep.axes and config.sweep.split is None and config.task.policy is None:
        yield (
            "sweep.split is missing, but a sweep needs prompts of its own; name a split of the held-out dataset, or "
            "cut one in two: base.dataset_test_split `test[32:]` and sweep.split `test[:32]`."
        )
    if len(set(config.seeds)) < len(config.seeds):
        yield f"seeds is {_show(config.seeds)}, which names one twice; give each once."
    if config.task.policy is None:
        for key in ("model", "dataset", "reward_funcs"):
            if not config.base.get(key):
                yield f"base.{key} is missing; every cell starts from one policy, on one set of prompts, by one reward."
        if config.base.get("dataset_test_split", "test") is None:
            yield "base.dataset_test_split is null, but cells are compared on held-out prompts; name their split."
    else:
        for key in ("model", "dataset", "reward_funcs", "max_completion_length", "dataset_test_split"):
            if key in config.base:
                yield f"base.{key} is {_show(config.base[key])}, but a task brings its own; leave one of the two out."
        if config.held_out_reward_funcs:
            yield "held_out_reward_funcs is given, but a task has its one reward; leave it out."


def warnings_for(config: TrainConfig) -> list[str]:
    """One sentence for each setting that is allowed but does nothing, or costs a property that users count on."""
    warnings = []
    if METHODS[config.algorithm].uses_ratios and config.updates_per_step == 1:
        knobs = ", p3o.clip, p3o.max_ratio and p3o.kl_at do" if config.algorithm == "p3o" else " does"
        warnings.append(
            f"num_iterations is 1 with one minibatch a batch, so every ratio is 1 and epsilon{knobs} nothing; "
            "set num_iterations to 2 or more."
        )
    unclipped_rloo = config.algorithm == "rloo" and not config.rloo.clip
    if config.updates_per_step > 1 and (config.algorithm in ("reinforce", "vpg") or unclipped_rloo):
        mend = "set num_iterations to 1" + (", or rloo.clip to true" if unclipped_rloo else "")
        warnings.append(
            f"{config.algorithm} has no ratio, so of the {config.updates_per_step} updates a step only the first "
            f"follows the objective's gradient; {mend}."
        )
    if config.offline and config.num_iterations > 1:
        warnings.append(
            f"num_iterations is {config.num_iterations}, so every batch of the dataset is learned from "
            f"{config.num_iterations} times in a row; set it to 1 to go through the dataset as others do."
        )
    if config.algorithm == "raft" and config.raft.rank_by == "reward" and config.beta > 0:
        warnings.append(
            f"beta is {config.beta}, but does nothing with raft.rank_by reward; set that to shaped to rank with the KL."
        )
    default_epsilon = TrainConfig.model_fields["epsilon"].default
    if config.algorithm == "p3o" and config.p3o.clip == "none" and config.epsilon != default_epsilon:
        warnings.append(
            f"epsilon is {config.epsilon}, but does nothing with p3o.clip none; set p3o.clip to joint or separate."
        )
    if config.judge.model is not None and config.preference_func != "judge":
        warnings.append(
            f"judge.model is {_show(config.judge.model)}, but is not asked while preference_func is "
            f"{_show(config.preference_func)}; set that to judge."
        )
    if config.scale_rewards == "running":
        warnings.append(
            "scale_rewards is running, which breaks the invariance to a reward shift per prompt and changes what beta "
            "means; set it to none to keep both."
        )
    return warnings + list(_shared_warnings(config, config.max_steps * config.updates_per_step))


def supervised_warnings(config: SupervisedWords, num_updates: int) -> list[str]:
    """The same for a run of `num_updates` on a fixed dataset."""
    return list(_shared_warnings(config, num_updates))


def _shared_warnings(config: TrainConfig | SupervisedWords, num_updates: int) -> Iterator[str]:
    """The same of what all stages share."""
    if config.lr_scheduler_type == "constant" and config.warmup_steps:
        yield (
            f"warmup_steps is {config.warmup_steps}, but does nothing with lr_scheduler_type constant; "
            "set that to constant_with_warmup."
        )
    elif config.warmup_steps is not None and config.warmup_steps >= num_updates:
        yield (
            f"warmup_steps is {config.warmup_steps}, but the run has only {num_updates} updates, so the learning rate "
            "never reaches its full value; set warmup_steps lower (it counts updates, not steps)."
        )
    eval_dataset, split = getattr(config, "eval_dataset", None), getattr(config, "dataset_test_split", None)
    if eval_dataset is not None and split is None:
        yield (
            f"eval_dataset is {_show(eval_dataset)}, but is not read while dataset_test_split is null; "
            "name the split of its held-out prompts."
        )


# -- Reading and building ----------------------------------------------------------------------------------------------


def load_config(
    cls: type[ConfigT], path: str | os.PathLike[str] | None = None, overrides: Mapping[str, Any] | None = None
) -> ConfigT:
    """The configuration in a YAML file, with dotted overrides (`{"p3o.clip": "separate"}`) that win over it.

    Values may be strings as a shell gives them. Raises PairtuneError, one sentence a mistake.
    """
    overrides = overrides or {}
    values: dict[str, Any] = {}
    mend = "give --{key}, or --config with a file that has it"
    if path is not None:
        values = _flatten(cls, _read_yaml(Path(path)))
        mend = f"add a line `{{key}}: ...` to {path}, or give --{{key}}"
    shown = {key: f"{key} in {path}" for key in values} | {key: f"--{key}" for key in overrides}
    return _build(cls, values | _flatten(cls, overrides), shown, mend)


def flat_values(config: Words) -> dict[str, Any]:
    """dotted key -> plain value, in the order of the help."""
    flat = _flatten(type(config), config.model_dump())
    return {key: flat[key] for key in keys_of(type(config))}


def config_to_dict(config: Words) -> dict[str, Any]:
    """Nested plain values in the order of the help; building from them gives an equal configuration."""
    return _nest(flat_values(config))


def config_to_yaml(config: Words) -> str:
    """The resolved whole as YAML; reading it back gives an equal configuration."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=100)


def _build(
    cls: type[ConfigT],
    values: Mapping[str, Any],
    shown: Mapping[str, str] | None = None,
    mend: str = "give it as {key}=...",
) -> ConfigT:
    """Validates values, nested or dotted; `shown` tells how to name a key that was given, `mend` how to give one."""
    shown = shown or {}
    flat = _flatten(cls, values)
    keys = keys_of(cls)
    unknown = [key for key in flat if key not in keys and key not in cls.model_fields]
    sentences = [unknown_key(cls, key, shown.get(key, key)) for key in unknown]
    try:
        config = cls.model_validate(_nest({key: value for key, value in flat.items() if key not in unknown}))
    except ValidationError as error:
        sentences += _sentences(cls, error, flat, shown, mend)
    if sentences:
        raise PairtuneError("\n".join(sentences[:MAX_SENTENCES]))
    return config


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, refusing a key that is given twice (PyYAML keeps the last one without a word)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parsed(text: str) -> Any:
    """A mapping written on one line; any other text as it is, to be refused or taken for a name."""
    try:
        value = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError:
        return text
    return value if isinstance(value, dict) else text


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise PairtuneError(
            f"the configuration file {path} cannot be read ({error.strerror}); check its path."
        ) from None
    except yaml.MarkedYAMLError as error:
        line = f" at line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise PairtuneError(f"{path} is not valid YAML{line}: {error.problem or error.context}; correct it.") from None
    except (yaml.YAMLError, ValueError) as error:
        raise PairtuneError(f"{path} is not valid YAML in UTF-8: {str(error).splitlines()[0]}; correct it.") from None
    if values is None:
        raise PairtuneError(f"{path} is empty; write at least one line such as `model: ...` into it.")
    if not isinstance(values, dict):
        raise PairtuneError(f"{path} holds {_show(values)}, not settings; write lines of the form `key: value`.")
    return {str(key): value for key, value in values.items()}


def _flatten(cls: type[Words], values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys for what stands in sections; an empty section (`p3o:` with its lines commented out) is no value."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        section = key in cls.model_fields and _is_section(cls.model_fields[key])
        if section and isinstance(value, Words):
            value = value.model_dump()
        if section and (value is None or isinstance(value, Mapping)):
            flat.update({f"{key}.{name}": inner for name, inner in (value or {}).items()})
        else:
            flat[key] = value
    return flat


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.partition(".")
        if not dot:
            nested[key] = value
        elif isinstance(inner := nested.setdefault(section, {}), dict):  # else a wrong section, to be refused
            inner[name] = value
    return nested


# -- Reading the models themselves: for errors and help ----------------------------------------------------------------


def fields_by_topic(cls: type[Words]) -> dict[str, dict[str, FieldInfo]]:
    """topic -> dotted key -> field, in the order in which a reader wants them: groups as they are listed as bases."""
    topics: dict[str, dict[str, FieldInfo]] = {}
    placed: set[str] = set()
    for owner in (*cls.__mro__[1:], cls):
        if not issubclass(owner, Words):
            continue
        for name in inspect.get_annotations(owner):
            if name not in cls.model_fields or name in placed:
                continue
            placed.add(name)
            field = cls.model_fields[name]
            if _is_section(field):
                section = field.annotation
                topics[name] = {f"{name}.{inner}": f for inner, f in section.model_fields.items()}  # type: ignore[union-attr]
            else:
                topics.setdefault(owner.topic, {})[name] = field
    return topics


def keys_of(cls: type[Words]) -> dict[str, FieldInfo]:
    """Every dotted key and its field."""
    return {key: field for fields in fields_by_topic(cls).values() for key, field in fields.items()}


def allowed(annotation: Any, metadata: list[Any] | None = None) -> str:
    """What a field takes, in words: "a number > 0 or null", "joint, separate or none"."""
    metadata = list(metadata or [])
    if get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        metadata += inner
    metadata = [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]
    if texts := [m.text for m in metadata if isinstance(m, Allowed)]:
        return texts[0]
    if get_origin(annotation) in (Union, UnionType):
        kinds = sorted(get_args(annotation), key=lambda kind: kind is NoneType)
        return " or ".join("null" if kind is NoneType else allowed(kind, metadata) for kind in kinds)
    if get_origin(annotation) is Literal:
        return _or(get_args(annotation))
    if get_origin(annotation) is list:
        item = allowed(get_args(annotation)[0])
        return f"a list of {item.replace('a text', 'texts').replace('a number', 'numbers')}"
    if inspect.isclass(annotation) and issubclass(annotation, Words):
        return f"a section with the keys {_or(tuple(annotation.model_fields))}"
    name = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[annotation]
    bounds = " and ".join(filter(None, (_bound(m) for m in metadata)))
    return f"{name} {bounds}".strip()


def _bound(constraint: Any) -> str:
    match constraint:
        case Gt(gt=limit):
            return f"> {limit}"
        case Ge(ge=limit):
            return f">= {limit}"
        case Lt(lt=limit):
            return f"< {limit}"
        case Le(le=limit):
            return f"<= {limit}"
        case MinLen():
            return "(not empty)"
    return ""


def _or(words: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type, without their constraints."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for member in get_args(annotation) for kind in kinds_of(member))
    return (annotation,)


def _choices(annotation: Any) -> tuple[str, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _is_section(field: FieldInfo) -> bool:
    return inspect.isclass(field.annotation) and issubclass(field.annotation, Words)


# -- Sentences ---------------------------------------------------------------------------------------------------------


def _sentences(
    cls: type[Words], error: ValidationError, flat: Mapping[str, Any], shown: Mapping[str, str], mend: str
) -> list[str]:
    """One sentence a key, from pydantic's list of errors."""
    sentences: dict[str, str] = {}
    for item in error.errors(include_url=False):
        if not item["loc"]:  # settings that do not fit together: our own sentences
            return str(item["ctx"]["error"]).splitlines()
        key = str(item["loc"][0])
        field = cls.model_fields[key]
        if _is_section(field) and len(item["loc"]) > 1:
            inner = str(item["loc"][1])
            key, field = f"{key}.{inner}", field.annotation.model_fields[inner]  # type: ignore[union-attr]
        if item["type"] == "missing":
            sentences[key] = f"{key} is missing; {mend.format(key=key)}."
        else:
            value = flat.get(key, item["input"])
            sentences[key] = (
                f"{shown.get(key, key)} must be {allowed(field.annotation, field.metadata)}, not {_show(value)}."
            )
    rank = {key: number for number, key in enumerate(keys_of(cls))}  # a whole section has none
    return [sentences[key] for key in sorted(sentences, key=lambda key: rank.get(key, len(rank)))]


def unknown_key(cls: type[Words], key: str, shown: str) -> str:
    """The sentence for a key that `cls` does not have and that the user wrote as `shown`."""
    verb = VERB_OF.get(cls, "train")
    for other, its_verb in VERB_OF.items():
        if key in keys_of(other) and key not in keys_of(cls):
            return (
                f"{shown} is a setting of `pairtune {its_verb}`, which `pairtune {verb}` does not have; leave it out."
            )
    nearest = nearest_key(key, list(keys_of(cls)))
    if nearest is None:
        return f"{shown} is not a known setting; `pairtune {verb} --help` lists all of them."
    return f"{shown} is not a known setting; the nearest is {'--' if shown.startswith('--') else ''}{nearest}."


def nearest_key(key: str, keys: list[str]) -> str | None:
    """The key that was probably meant: another library's word, the same word in a section, or the nearest spelling."""
    word = key.rpartition(".")[2]
    by_word = {known.rpartition(".")[2]: known for known in reversed(keys)}  # of several, the first in the help
    if meant := [ours for ours in FOREIGN_WORDS.get(word, []) if ours in keys]:
        return meant[0]
    if word in by_word:
        return by_word[word]
    whole = difflib.get_close_matches(key, keys, n=1)
    part = difflib.get_close_matches(word, list(by_word), n=1)
    return whole[0] if whole else by_word[part[0]] if part else None


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
