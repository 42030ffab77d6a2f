"""Small languages in which every completion can be enumerated, so that the answer is known and not sampled.

`EnumerableTask` is a language with a table of rewards. `tabular_model` and `tiny_transformer` are policies over it,
ordinary Hugging Face models that go through the same `train()` as everything else:

    task = EnumerableTask.random(seed=0)
    model = tabular_model(task, seed=0)
    config = TrainConfig(model="in memory", dataset="in memory", dataset_test_split=None, output_dir="runs/exact",
                         max_completion_length=task.max_completion_length, learning_rate=0.05, beta=0.5)
    train(config, model=model, tokenizer=task.tokenizer(), train_dataset=task.dataset(256),
          reward_funcs=[watched_reward_func(task, model, config.beta)])

`exact_values` then says how far a policy is from `optimum`, the best that any method can reach, and `gradient_law` what
a method's gradient is in expectation and how much it scatters. All of these are float64, whatever the model's
precision: a copy of the model is evaluated. Axes: P prompts, N completions (all of them, the same for each prompt),
T tokens, V words of the vocabulary, D parameters.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pairtune.algorithms import ALGORITHMS, MethodState
from pairtune.config import METHODS, TrainConfig
from pairtune.errors import PairtuneError
from pairtune.maths.kl import rao_blackwellised_kl
from pairtune.maths.masking import masked_sum
from pairtune.models.logprobs import Scorer
from pairtune.types import Completions, Experience

EOS = 0
"""The id of the word that ends a completion; it also stands for padding, which masks tell apart."""

MAX_COMPLETIONS = 100_000
MAX_GROUPS = 500_000
MAX_JACOBIAN = 2**27
"""Numbers in a prompt's derivatives of token log-probabilities by parameters: a gigabyte."""

Watched = Callable[..., list[float]]


# ------------------------------------------------------------------------------------------------------------- language


@dataclass(frozen=True, eq=False)
class EnumerableTask:
    """A language of V words, EOS among them, prompts in it, and a reward for every completion of every prompt.

    A completion ends with EOS or is cut at T tokens; N = 1 + (V-1) + ... + (V-1)^(T-1) end, (V-1)^T are cut.
    Raises PairtuneError for a language too large to enumerate, a prompt that cannot be, or a table of another shape.
    """

    vocab_size: int
    """V, EOS included; the words are EOS, a, b, c, ..."""
    prompts: tuple[tuple[int, ...], ...]
    """Token ids, without EOS; none is the beginning of another, or their histories would be the same."""
    max_completion_length: int
    """T, EOS included."""
    rewards: Tensor
    """(P, N) float64, completions in the order of `sequences`."""

    def __post_init__(self) -> None:
        if not 3 <= self.vocab_size <= 27:
            raise PairtuneError(f"vocab_size is {self.vocab_size}, but must be 3 (EOS, a, b) to 27 (EOS, a to z).")
        if self.max_completion_length < 1:
            raise PairtuneError(f"max_completion_length is {self.max_completion_length}, but must be at least 1.")
        for prompt in self.prompts:
            if not prompt or not all(0 < token < self.vocab_size for token in prompt):
                raise PairtuneError(f"the prompt {prompt} must be one or more ids from 1 to {self.vocab_size - 1}.")
        for prompt, other in permutations(self.prompts, 2):
            if other[: len(prompt)] == prompt:
                raise PairtuneError(f"the prompt {prompt} is how {other} begins; take another last word.")
        expected = (len(self.prompts), count_completions(self.vocab_size, self.max_completion_length))
        if tuple(self.rewards.shape) != expected or self.rewards.dtype != torch.float64:
            raise PairtuneError(
                f"rewards must be float64 of shape {expected}, one for each prompt and completion, but are "
                f"{str(self.rewards.dtype).removeprefix('torch.')} of shape {tuple(self.rewards.shape)}."
            )

    @classmethod
    def random(
        cls, *, vocab_size: int = 3, num_prompts: int = 3, max_completion_length: int = 3, seed: int = 0
    ) -> EnumerableTask:
        """A task with normal rewards of standard deviation 1, rounded to multiples of 1/64.

        On that grid a float32 holds every reward, and every sum and difference of a few, without rounding. The prompts
        are `a`, `b a`, `b b a`, ...: all of different lengths, none the beginning of another.
        """
        prompts = tuple((2,) * i + (1,) for i in range(num_prompts))
        shape = num_prompts, count_completions(vocab_size, max_completion_length)
        draws = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return cls(vocab_size, prompts, max_completion_length, (draws * 64).round() / 64)

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def num_completions(self) -> int:
        return len(self.sequences)

    @cached_property
    def sequences(self) -> list[tuple[int, ...]]:
        """All N completions as token ids: those of one token first, those that the cap cuts last."""
        prefixes = _prefixes(self.vocab_size, self.max_completion_length)
        ended = [(*prefix, EOS) for prefix in prefixes if len(prefix) < self.max_completion_length]
        return ended + [prefix for prefix in prefixes if len(prefix) == self.max_completion_length]

    def completions(self) -> Completions:
        """All N completions of each prompt, as if they had been sampled: K = N."""
        width = max(map(len, self.prompts))
        prompt_ids = torch.tensor([[EOS] * (width - len(p)) + list(p) for p in self.prompts])
        prompt_mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in self.prompts])
        length = self.max_completion_length
        ids = torch.tensor([[*s, *[EOS] * (length - len(s))] for s in self.sequences])
        mask = torch.tensor([[t < len(s) for t in range(length)] for s in self.sequences])
        truncated = torch.tensor([s[-1] != EOS for s in self.sequences])
        shape = self.num_prompts, self.num_completions
        return Completions(
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            completion_ids=ids.expand(*shape, -1),
            completion_mask=mask.expand(*shape, -1),
            sampler_logprobs=torch.zeros(*shape, length),
            truncated=truncated.expand(*shape),
            policy_version=0,
        )

    def text(self, ids: Sequence[int]) -> str:
        """Token ids as words with spaces between them."""
        return " ".join(self._words[token] for token in ids)

    @property
    def _words(self) -> list[str]:
        return ["</s>", *string.ascii_lowercase[: self.vocab_size - 1]]

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word, `</s>` for the end and for padding; made in memory."""
        backend = Tokenizer(models.WordLevel({word: token for token, word in enumerate(self._words)}))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")

    def dataset(self, num_rows: int) -> list[dict[str, str]]:
        """Rows `{"prompt": ...}` that go through the prompts again and again. Sampling is seeded by the row, so rows of
        one prompt get independent completions."""
        return [{"prompt": self.text(self.prompts[row % self.num_prompts])} for row in range(num_rows)]

    def reward_func(self, prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        """The table as a reward function. Raises PairtuneError for what does not stand in it."""
        rewards = []
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            reward = self._reward_of.get((prompt, tuple(ids)))
            if reward is None:
                raise PairtuneError(
                    f"the reward table has no completion {ids} of the prompt {prompt!r}; take the prompts from "
                    f"dataset() and set max_completion_length to {self.max_completion_length}."
                )
            rewards.append(reward)
        return rewards

    @cached_property
    def _reward_of(self) -> dict[tuple[str, tuple[int, ...]], float]:
        """(prompt, completion) -> reward."""
        return {
            (self.text(prompt), sequence): reward
            for prompt, rewards in zip(self.prompts, self.rewards.tolist(), strict=True)
            for sequence, reward in zip(self.sequences, rewards, strict=True)
        }


def count_completions(vocab_size: int, max_completion_length: int) -> int:
    """N, the completions of at most so many tokens. Raises PairtuneError where they are too many to enumerate."""
    count = sum((vocab_size - 1) ** length for length in range(max_completion_length + 1))
    if count > MAX_COMPLETIONS:
        raise PairtuneError(
            f"{vocab_size} words and max_completion_length {max_completion_length} make {count} completions, and at "
            f"most {MAX_COMPLETIONS} are enumerated; lower either."
        )
    return count


def _prefixes(vocab_size: int, max_length: int) -> list[tuple[int, ...]]:
    """All sequences of words without EOS, of 0 to `max_length` tokens, short ones first."""
    found: list[tuple[int, ...]] = [()]
    start = 0
    for _ in range(max_length):
        longest, start = found[start:], len(found)
        found += [(*prefix, token) for prefix in longest for token in range(1, vocab_size)]
    return found


# ------------------------------------------------------------------------------------------------------- tabular policy


class TabularConfig(PreTrainedConfig):
    """Of a policy that is a free table of logits, one row for every history of a task."""

    model_type = "pairtune_tabular"
    vocab_size: int = 3
    prompts: list[list[int]] | None = None
    max_completion_length: int = 1
    num_hidden_layers: int = 1

    @property
    def hidden_size(self) -> int:
        """The logits, and one number more: see `TabularForCausalLM`."""
        return self.vocab_size + 1

    @property
    def max_position_embeddings(self) -> int:
        return max(map(len, self.prompts or [[]])) + self.max_completion_length


class TabularModel(PreTrainedModel):
    """History -> its row of the table, by one attention-like sum.

    Token x at position i is worth (x + 1) * (V + 1)^i. The sum over the tokens that a query sees is the history written
    as a number, whatever padding, cache or neighbours stand in the batch. What is no history of the task (padding, the
    probes of `can_share_prefix`) gets zeros.
    """

    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_sdpa = True  # it takes the boolean masks of that kernel

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        prefixes = _prefixes(config.vocab_size, config.max_completion_length - 1)
        histories = [(*prompt, *prefix) for prompt in config.prompts or [] for prefix in prefixes]
        base = config.vocab_size + 1
        codes = sorted(sum((token + 1) * base**i for i, token in enumerate(history)) for history in histories)
        # Saved with the weights: `from_pretrained` would leave anything else empty.
        self.register_buffer("codes", torch.tensor(codes, dtype=torch.int64))
        self.table = nn.Embedding(len(codes), config.hidden_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = past + torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        worth = (input_ids + 1) * (self.config.vocab_size + 1) ** position_ids
        if past_key_values is not None:
            keys = worth[:, None, :, None]
            worth = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0]
        code = masked_sum(worth[:, None], _visible(attention_mask, input_ids.shape[1], worth), -1)
        row = torch.searchsorted(self.codes, code).clamp(max=len(self.codes) - 1)
        states = torch.where((self.codes[row] == code)[..., None], self.table(row), 0)
        return BaseModelOutputWithPast(last_hidden_state=states, past_key_values=past_key_values)


def _visible(attention_mask: Tensor | None, num_queries: int, keys: Tensor) -> Tensor:
    """(R, Q, W) bool, which of the W keys each of the last Q tokens sees; for a mask (R, W), or (R, 1, Q, W) bool or to
    be added to scores."""
    if attention_mask is not None and attention_mask.ndim == 4:
        mask = attention_mask[:, 0]
        return mask if mask.dtype == torch.bool else mask == 0
    num_keys = keys.shape[1]
    causal = torch.ones(num_queries, num_keys, dtype=torch.bool, device=keys.device).tril(num_keys - num_queries)
    return causal[None] if attention_mask is None else causal & attention_mask.bool()[:, None]


class _Readout(nn.Module):
    """The logits are the first V numbers of the hidden state. A buffer, not a parameter: nothing here is trained."""

    bias = None
    weight: Tensor

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.eye(vocab_size, hidden_size))

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class TabularForCausalLM(PreTrainedModel):
    """A policy whose logits are a free number for each (history, word).

    A hidden state holds one number that is no logit. It starts at 1, so that a value head on the policy begins as a
    constant and can become a free value for each history.
    """

    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_sdpa = True

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = _Readout(config.vocab_size, config.hidden_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        output = self.model(input_ids, attention_mask, position_ids, past_key_values)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def register_tabular() -> None:
    """Tell transformers' Auto classes about the tabular model, so that a checkpoint of it can be loaded by its path.

    `tabular_model` does it too; a process that only loads calls this first.
    """
    AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
    AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM, exist_ok=True)


def tabular_model(task: EnumerableTask, *, seed: int = 0, scale: float = 1.0) -> TabularForCausalLM:
    """A tabular policy in float32 with normal logits of standard deviation `scale` (0: every word equally likely).

    `.double()` makes a float64 one. Raises PairtuneError where prompt and completion are too long to be told apart by a
    64-bit number.
    """
    config = TabularConfig(
        vocab_size=task.vocab_size,
        prompts=[list(prompt) for prompt in task.prompts],
        max_completion_length=task.max_completion_length,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    longest = config.max_position_embeddings
    if (task.vocab_size + 1) ** longest >= 2**63:
        raise PairtuneError(
            f"prompt and completion reach {longest} tokens of {task.vocab_size} words, too many to number their "
            "histories; take shorter prompts."
        )
    register_tabular()
    model = TabularForCausalLM(config)
    draws = torch.randn(model.model.table.weight.shape, generator=torch.Generator().manual_seed(seed))
    draws[:, :-1] *= scale
    draws[:, -1] = 1
    model.model.table.weight.data.copy_(draws)
    return model.float().eval()


def tiny_transformer(task: EnumerableTask, *, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of two layers and hidden size 32 over the same words, in float32; its law at the start is not uniform."""
    config = LlamaConfig(
        vocab_size=task.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(map(len, task.prompts)) + task.max_completion_length,
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.float().eval()


# ----------------------------------------------------------------------------------------------------- exact quantities


def _token_logprobs(model: Any, task: EnumerableTask, temperature: float = 1.0) -> Tensor:
    """(P, N, T) of all completions, differentiable by the model's parameters, in its own precision."""
    # One row a completion: in a shared row the padding of all N would stand between them.
    scorer = Scorer(model, shared=False)
    return scorer.logprobs(scorer.layout(task.completions()), temperature=temperature)[0]


def _in_float64(model: Any) -> Any:
    """A copy that computes in float64 throughout."""
    twin = copy.deepcopy(model).double().eval().requires_grad_(True)
    for parent in list(twin.modules()):
        for name, part in list(parent.named_children()):
            if isinstance(part, LlamaRMSNorm):  # goes through float32 whatever it is given
                norm = nn.RMSNorm(part.weight.shape, eps=part.variance_epsilon)
                norm.weight = part.weight
                setattr(parent, name, norm)
    return twin


@torch.no_grad()
def sequence_logprobs(model: Any, task: EnumerableTask) -> Tensor:
    """The log-probability of every completion: (P, N) float64, nats; their exponentials sum to 1 for each prompt."""
    return _token_logprobs(_in_float64(model), task).sum(-1)


@dataclass(frozen=True)
class Optimum:
    """The best policy for a reward, a reference and a beta."""

    logprobs: Tensor
    """(P, N) float64, nats, of the policy reference * exp(r / beta) / Z."""
    reward: Tensor
    """(P,) float64, its expected reward."""
    kl: Tensor
    """(P,) float64, nats, its KL to the reference."""
    objective: Tensor
    """(P,) float64, reward units: J = beta log Z, which is reward - beta * kl."""


def optimum(task: EnumerableTask, ref_logprobs: Tensor, beta: float) -> Optimum:
    """The maximiser of E[r] - beta KL(policy || reference) and its value (Rafailov et al. 2023, appendix A.1).

    ref_logprobs: (P, N) float64. Raises PairtuneError unless beta is above 0.
    """
    if not beta > 0:
        raise PairtuneError(f"beta is {beta}, but only a beta above 0 has an optimum with a finite KL.")
    tilted = ref_logprobs + task.rewards / beta
    log_normaliser = tilted.logsumexp(-1)
    logprobs = tilted - log_normaliser[:, None]
    return Optimum(
        logprobs=logprobs,
        reward=(logprobs.exp() * task.rewards).sum(-1),
        kl=rao_blackwellised_kl(logprobs, ref_logprobs),
        objective=beta * log_normaliser,
    )


@dataclass(frozen=True)
class ExactValues:
    """What a policy is worth, in the mean over prompts. No sampling error."""

    reward: float
    kl: float
    """Nats a completion, KL(policy || reference)."""
    objective: float
    """J = reward - beta * kl, reward units."""
    regret: float
    """J of the optimum less J of the policy, reward units; beta times KL(policy || optimum)."""


def exact_values(task: EnumerableTask, policy_logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> ExactValues:
    """Reward, KL, J and regret of a policy; both log-probabilities (P, N) float64 as `sequence_logprobs` gives them.

    Raises PairtuneError unless beta is above 0.
    """
    best = optimum(task, ref_logprobs, beta)
    reward = (policy_logprobs.exp() * task.rewards).sum(-1).mean().item()
    kl = rao_blackwellised_kl(policy_logprobs, ref_logprobs).mean().item()
    # Not J* - J, which would lose all digits near the optimum.
    regret = beta * rao_blackwellised_kl(policy_logprobs, best.logprobs).mean().item()
    return ExactValues(reward=reward, kl=kl, objective=reward - beta * kl, regret=regret)


def optimal_frontier(
    task: EnumerableTask, ref_logprobs: Tensor, betas: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """(KL, reward), each (B,) float64, of the optimum at each of B betas, in the mean over prompts.

    With one beta for all prompts this is the upper envelope of what policies reach on this set of prompts: concave, of
    slope dR/dKL = beta. Raises PairtuneError unless every beta is above 0.
    """
    found = [optimum(task, ref_logprobs, float(beta)) for beta in betas]
    return torch.stack([o.kl.mean() for o in found]), torch.stack([o.reward.mean() for o in found])


def watched_reward_func(task: EnumerableTask, model: Any, beta: float) -> Watched:
    """The task's reward function, which also logs what `model` is worth at every step it is asked.

    `train` moves the model that it is given, so with the same `model` handed to both, `metrics.jsonl` holds the columns
    `exact/reward`, `exact/kl`, `exact/objective` and `exact/regret` of the policy that sampled the step's batch. The
    reference is the model as it is now.
    """
    ref_logprobs = sequence_logprobs(model, task)

    def table(
        prompts: list[str], completion_ids: list[list[int]], log_metric: Callable[[str, float], None], **_: Any
    ) -> list[float]:
        values = exact_values(task, sequence_logprobs(model, task), ref_logprobs, beta)
        for name, value in asdict(values).items():
            log_metric(f"exact/{name}", value)
        return task.reward_func(prompts, completion_ids)

    return table


# ------------------------------------------------------------------------------------------------------------ best of n


@dataclass(frozen=True)
class BestOfN:
    """The law of the best of n samples of the reference."""

    probs: Tensor
    """(P, N) float64."""
    reward: Tensor
    """(P,) float64."""
    kl: Tensor
    """(P,) float64, nats, to the reference."""


def best_of_n(task: EnumerableTask, ref_logprobs: Tensor, n: int) -> BestOfN:
    """Draw n completions of the reference, keep the best; of equally good ones any, with equal chances.

    A level of reward wins with F^n - F_below^n, F the reference's probability of a reward up to it and F_below of one
    below it, and its completions share that in proportion to the reference (Beirami et al. 2024, arXiv 2401.01879, for
    rewards without ties). ref_logprobs: (P, N) float64. Raises PairtuneError unless n is at least 1.
    """
    if n < 1:
        raise PairtuneError(f"n is {n}, but best-of-n takes at least 1 completion.")
    ref, probs, kl = ref_logprobs.exp(), [], []
    for prompt_ref, rewards in zip(ref, task.rewards, strict=True):
        levels, level = rewards.unique(return_inverse=True)
        mass = torch.zeros_like(levels).index_add(0, level, prompt_ref)
        up_to = mass.cumsum(0)
        tilt = (up_to**n - (up_to - mass) ** n) / mass
        probs.append(prompt_ref * tilt[level])
        kl.append((mass * tilt * tilt.log()).sum())
    stacked = torch.stack(probs)
    return BestOfN(stacked, (stacked * task.rewards).sum(-1), torch.stack(kl))


# --------------------------------------------------------------------------------------- gradients of a method, exactly


def objective_gradient(task: EnumerableTask, policy: Any, reference: Any, beta: float) -> Tensor:
    """(D,) float64, the gradient of J, the mean over prompts of E[r] - beta KL(policy || reference), by the parameters.

    The order of the D numbers is that of `policy.parameters()`, flattened.
    """
    ref_logprobs = sequence_logprobs(reference, task)
    twin = _in_float64(policy)
    logprobs = _token_logprobs(twin, task).sum(-1)
    objective = (logprobs.exp() * (task.rewards - beta * (logprobs - ref_logprobs))).sum(-1).mean()
    return _flat_gradient(objective, list(twin.parameters()))


def value_function(task: EnumerableTask, policy: Any, reference: Any, beta: float) -> Tensor:
    """The best value function that token-wise PPO could have: (P, N, T) float64, reward units, 0 where masked.

    Before each token of each completion, what the policy expects from there on: the reward less beta times the
    log-ratios of the tokens still to come (no discount).
    """
    completions = task.completions()
    ids, mask = completions.completion_ids[0], completions.completion_mask[0]
    with torch.no_grad():
        policy_tokens, ref_tokens = (_token_logprobs(_in_float64(model), task) for model in (policy, reference))
    probs, logratio = policy_tokens.sum(-1).exp(), policy_tokens - ref_tokens
    to_go = task.rewards[..., None] - beta * logratio.flip(-1).cumsum(-1).flip(-1)
    values = torch.zeros_like(to_go)
    for t in range(task.max_completion_length):
        # (N, N): the two begin alike and go on. (One that has ended holds an EOS, which no other can share.)
        alike = (ids[:, None, :t] == ids[None, :, :t]).all(-1) & mask[:, t]
        weights = alike * probs[:, None]
        values[..., t] = (weights @ to_go[..., t, None])[..., 0] / weights.sum(-1).clamp(min=1e-300)
    return values


@dataclass(frozen=True)
class GradientLaw:
    """Mean and scatter of the gradient that one group of K completions gives, by the D parameters of the policy."""

    gradient: Tensor
    """(D,) float64, of the loss, which is minimised: where a method is unbiased, minus a multiple of
    `objective_gradient`. What the mean over ever more groups tends to."""
    prompt_gradients: Tensor
    """(P, D) float64, of each prompt; `gradient` is their mean."""
    variance: float
    """The trace of the covariance of one group's gradient for a given prompt, in the mean over prompts."""
    prompt_variance: float
    """The trace of the covariance of `prompt_gradients`: what drawing the prompt adds."""
    num_generations: int
    """K."""

    @property
    def variance_per_completion(self) -> float:
        """Variance times K: over the number of completions of a batch, the variance of its mean gradient. Methods of
        different K compare by this."""
        return self.num_generations * self.variance

    @property
    def noise_scale(self) -> float:
        """Completions from which on a batch's gradient is more signal than noise; a factor of the loss cancels (the
        simple noise scale of McCandlish et al. 2018, arXiv 1812.06162)."""
        return self.variance_per_completion / self.gradient.square().sum().item()


def gradient_law(
    config: TrainConfig,
    task: EnumerableTask,
    policy: Any,
    reference: Any,
    old: Any = None,
    *,
    state: MethodState | None = None,
    values: Tensor | None = None,
) -> GradientLaw:
    """The exact expectation and variance of the gradient of `config.algorithm`: all N^K groups, each with its
    probability.

    policy: where the gradient is taken. old: what sampled; the policy itself where None, so that all ratios are 1.
    state: what the method carries from earlier steps (a moving average, an adapted beta); None: a first step.
    values: (P, N, T) float64, of a method with a value function; zeros where None (`value_function` is the best).
    The reward is the task's table: `missing_eos_penalty` and `scale_rewards` of the configuration are not applied.

    A group's gradient is divided by the expected number of loss elements of a group that count, as an update divides by
    those of its batch. Raises PairtuneError for too many groups, and for a method whose loss of one group depends on
    the rest of the batch or on other luck than the samples.
    """
    num_generations = config.num_generations
    _check_size(config, task, sum(p.numel() for p in policy.parameters()))
    _check_is_law_of_groups(config)
    groups = torch.cartesian_prod(*[torch.arange(task.num_completions)] * num_generations).view(-1, num_generations)

    twin = _in_float64(policy)
    tokens = _token_logprobs(twin, task, config.temperature)
    policy_tokens = tokens.detach()
    with torch.no_grad():
        ref_tokens = _token_logprobs(_in_float64(reference), task, config.temperature)
        old_tokens = policy_tokens if old is None else _token_logprobs(_in_float64(old), task, config.temperature)
    probs = old_tokens.sum(-1)[:, groups].sum(-1).exp()  # (P, G)

    experience = _every_group(task, groups, old_tokens, ref_tokens, values)
    weights, counted = _loss_gradients(config, experience, policy_tokens[:, groups].flatten(0, 1), state)
    counted = (probs * counted.view_as(probs)).sum(-1).mean()
    weights = weights.unflatten(0, probs.shape) / torch.where(counted > 0, counted, 1)

    gradients, second_moments = [], []
    mask = task.completions().completion_mask[0]
    for prompt_tokens, prompt_weights, prompt_probs in zip(tokens, weights, probs, strict=True):
        jacobian = torch.zeros(*mask.shape, sum(p.numel() for p in twin.parameters()), dtype=torch.float64)
        for n, t in mask.nonzero().tolist():
            jacobian[n, t] = _flat_gradient(prompt_tokens[n, t], list(twin.parameters()))
        mean_weights = torch.zeros(mask.shape, dtype=torch.float64)
        for k in range(num_generations):
            mean_weights.index_add_(0, groups[:, k], prompt_probs[:, None] * prompt_weights[:, k])
        gradients.append(torch.einsum("nt,ntd->d", mean_weights, jacobian))
        second_moments.append(prompt_probs @ _square_norms(groups, prompt_weights, jacobian))
    prompt_gradients = torch.stack(gradients)
    square_norms = prompt_gradients.square().sum(-1)
    gradient = prompt_gradients.mean(0)
    return GradientLaw(
        gradient=gradient,
        prompt_gradients=prompt_gradients,
        variance=(torch.stack(second_moments) - square_norms).mean().item(),
        prompt_variance=(prompt_gradients - gradient).square().sum(-1).mean().item(),
        num_generations=num_generations,
    )


def _check_size(config: TrainConfig, task: EnumerableTask, num_parameters: int) -> None:
    num_groups = task.num_prompts * task.num_completions**config.num_generations
    if num_groups > MAX_GROUPS:
        raise PairtuneError(
            f"{task.num_prompts} prompts with {task.num_completions} completions make {num_groups} groups of "
            f"{config.num_generations}, and at most {MAX_GROUPS} are enumerated; take a smaller task or fewer "
            "num_generations."
        )
    num_tokens = task.num_completions * task.max_completion_length
    if num_tokens * max(num_tokens, num_parameters) > MAX_JACOBIAN:
        raise PairtuneError(
            f"the derivatives of {num_tokens} tokens by {num_parameters} parameters are more than fit into memory; "
            "take a smaller task or model."
        )


def _check_is_law_of_groups(config: TrainConfig) -> None:
    """Refuse what is not settled by one group of completions alone."""
    name = config.algorithm
    if config.offline:
        raise PairtuneError(f"{name} reads its completions from a dataset here, which has no law to enumerate.")
    if config.top_p < 1 or config.top_k > 0:
        raise PairtuneError("the gradient's law is that of untruncated sampling; set top_p to 1 and top_k to 0.")
    if name == "ppo" and (config.ppo.whiten_advantages or config.ppo.whiten_rewards):
        raise PairtuneError(
            "ppo whitens over the whole batch, so one group has no gradient of its own; set ppo.whiten_advantages and "
            "ppo.whiten_rewards to false."
        )
    labels = {"online_dpo": config.online_dpo.labels, "online_ipo": config.online_ipo.labels}.get(name)
    if labels == "sampled":
        raise PairtuneError(f"{name}.labels is sampled, and only the completions are enumerated; take expected.")


def _every_group(
    task: EnumerableTask, groups: Tensor, old_tokens: Tensor, ref_tokens: Tensor, values: Tensor | None
) -> Experience:
    """The experience whose prompts are all groups (G, K) of the first prompt, then all of the second, and so on."""
    every = task.completions()

    def grouped(x: Tensor) -> Tensor:
        return x[:, groups].flatten(0, 1)

    completions = Completions(
        prompt_ids=every.prompt_ids.repeat_interleave(len(groups), 0),
        prompt_mask=every.prompt_mask.repeat_interleave(len(groups), 0),
        completion_ids=grouped(every.completion_ids),
        completion_mask=grouped(every.completion_mask),
        sampler_logprobs=grouped(old_tokens),
        truncated=grouped(every.truncated),
        policy_version=0,
    )
    return Experience(
        completions=completions,
        rewards=grouped(task.rewards),
        reward_mask=torch.ones_like(completions.truncated),
        ref_logprobs=grouped(ref_tokens),
        old_logprobs=grouped(old_tokens),
        old_values=grouped(torch.zeros_like(old_tokens) if values is None else values),
    )


def _loss_gradients(
    config: TrainConfig, experience: Experience, policy_logprobs: Tensor, state: MethodState | None
) -> tuple[Tensor, Tensor]:
    """(the gradient of each group's summed losses by its token log-probabilities (G, K, T), how many of its losses
    count (G,))."""
    algorithm = ALGORITHMS[config.algorithm]
    if algorithm.prepare is not None:
        targets = algorithm.prepare(experience, config, state or MethodState(beta=config.beta))
        experience = replace(experience, targets=targets)
    policy_logprobs = policy_logprobs.clone().requires_grad_()
    policy_values = experience.old_values if METHODS[config.algorithm].has_values else None
    output = algorithm.loss(policy_logprobs, experience, config, policy_values=policy_values)
    # Groups do not read each other, so the gradient of the sum holds the gradient of each.
    (gradient,) = torch.autograd.grad(masked_sum(output.losses, output.mask), policy_logprobs)
    return gradient, output.mask.reshape(len(gradient), -1).sum(-1)


def _square_norms(groups: Tensor, weights: Tensor, jacobian: Tensor) -> Tensor:
    """(G,) squared norms of sum_kt weights[g, k, t] * jacobian[groups[g, k], t], without a (G, D) tensor."""
    gram = torch.einsum("ntd,msd->nmts", jacobian, jacobian)
    found = torch.zeros(len(groups), dtype=torch.float64)
    for i in range(groups.shape[1]):
        for j in range(groups.shape[1]):
            blocks = gram[groups[:, i], groups[:, j]]
            found += torch.einsum("gt,gts,gs->g", weights[:, i], blocks, weights[:, j])
    return found


def _flat_gradient(value: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """(D,) the gradient of a number by all parameters, kept graph and all."""
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])
