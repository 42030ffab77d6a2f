"""Where each method comes to rest: training on an enumerable task against the point that theory says it approaches.

    python benchmarks/limits.py                          # all cases, three seeds, ten to twenty minutes on one core
    python benchmarks/limits.py --seeds 0 --only ppo     # those whose name contains a word

Every case goes through `pairtune.train` on `TASK`, a language of three prompts with seven completions each, whose
policy is a free table. `limit_of` gives the point: the optimum of E[r] - beta KL(policy || reference) for most methods,
a known other one for the rest. Measured is, exactly and not on samples, how far the trained policy is from it: the
largest total variation of a prompt, and the regret. Written are limits.json (every number) and limits.md (made from it).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pairtune import TrainConfig, train
from pairtune.evidence.exact import EnumerableTask, exact_values, optimum, sequence_logprobs, tabular_model
from pairtune.maths.advantages import group_centred, group_standardised
from pairtune.maths.preference import dpo_loss, ipo_loss
from pairtune.runs.folder import environment

TASK = EnumerableTask.random(num_prompts=3, max_completion_length=2, seed=0)
BETA = 0.5
RESULTS = Path(__file__).parent / "results"

MAX_REGRET = 1e-3
"""Reward units, where the limit is the optimum."""
MAX_VARIATION = 0.02
"""Total variation to any other limit, at the worst prompt."""

Pairs = list[tuple[int, int, int]]
"""(prompt, chosen completion, rejected completion) as indices of a task."""


# ------------------------------------------------------------------------------------------------------------ the cases


@dataclass(frozen=True)
class Case:
    """One way to train, and what of it to expect."""

    name: str
    words: dict[str, Any] = field(default_factory=dict)
    """Of the configuration, beside `COMMON`."""
    at_optimum: bool = True
    max_variation: float = MAX_VARIATION
    note: str = ""

    @property
    def method(self) -> str:
        return self.name.partition(",")[0]

    def config(self, seed: int = 0) -> TrainConfig:
        return configuration(TASK, {**COMMON, "algorithm": self.method, "seed": seed, **self.words})


def configuration(task: EnumerableTask, words: dict[str, Any]) -> TrainConfig:
    """Of a run on `task`, nothing written but what must be."""
    fixed = {
        "model": "in memory",
        "dataset": "in memory",
        "dataset_test_split": None,
        "device": "cpu",
        "dtype": "float32",
        "beta": BETA,
        "max_completion_length": task.max_completion_length,
        "eval_steps": 0,
        "save_steps": 0,
        "num_completions_to_log": 0,
    }
    return TrainConfig(**(fixed | words))


COMMON: dict[str, Any] = {
    "num_generations": 4,
    "batch_size": 64,
    "num_iterations": 4,
    "max_steps": 100,
    "learning_rate": 0.05,
    "lr_scheduler_type": "cosine",
    "max_grad_norm": None,
}
"""Of every case that does not say otherwise: 256 completions a step, 400 updates, the learning rate down to 0. The norm
of gradients is not clipped, for the mean of clipped gradients is no gradient."""
ONE_UPDATE: dict[str, Any] = {"num_iterations": 1, "max_steps": 200}
"""For methods whose later updates of a batch follow another gradient than J's."""
OFFLINE: dict[str, Any] = {"num_iterations": 1, "max_steps": 400}

CASES = (
    Case("p3o"),
    Case("p3o, KL at sampling", {"p3o.kl_at": "sampling"}),
    Case("p3o, clipped separately", {"p3o.clip": "separate"}),
    Case("p3o, not clipped", {"p3o.clip": "none"}),
    Case("p3o, replay 2", {"replay": 2, "max_steps": 60}),
    Case("rloo", ONE_UPDATE),
    Case("rloo, clipped", {"rloo.clip": True}),
    Case("reinforce", ONE_UPDATE),
    Case("reinforce, no baseline", {**ONE_UPDATE, "reinforce.baseline": "none"}),
    Case("vpg", ONE_UPDATE),
    Case("ppo", {"ppo.whiten_advantages": False}),
    Case("ppo, whitening", {"ppo.whiten_advantages": True}, note="the default"),
    Case("online_dpo"),
    Case("online_dpo, sampled labels", {"online_dpo.labels": "sampled"}),
    Case("copg"),
    Case("copg, replay 2", {"replay": 2, "max_steps": 60}),
    Case("copg, offline", {**OFFLINE, "copg.offline": True, "batch_size": 3}, note="21 scored completions a prompt"),
    Case("rebel"),
    Case("grpo, KL in the reward", {"grpo.kl_in": "reward", "grpo.standardise": False}),
    Case("grpo, KL in the reward, standardised", {"grpo.kl_in": "reward"}),
    Case("raft, ranked by shaped reward", {"raft.rank_by": "shaped"}),
    Case("raft", at_optimum=False, note="the best completion"),
    Case("grpo", at_optimum=False, note="the paper's: standardised, k3 in the loss"),
    Case("grpo, centred", {"grpo.standardise": False}, at_optimum=False, note="k3 in the loss"),
    Case("online_ipo", at_optimum=False, note="the chance to win against itself"),
    Case("dpo", OFFLINE, at_optimum=False, note="the minimiser for its 900 pairs"),
    Case("ipo", OFFLINE, at_optimum=False, note="the minimiser for its 900 pairs"),
)


# ----------------------------------------------------------------------------------------------------------- the points


def limit_of(config: TrainConfig, task: EnumerableTask, reference: Any, pairs: Pairs | None = None) -> Tensor:
    """(P, N) float64 probabilities of the policy at which training with `config` comes to rest.

    For a policy that can be any law over completions, and a step size that goes to 0. `pairs` are what `dpo` and `ipo`
    learn from; without them they get the law that their labels come from, every pair met equally often.
    """
    ref, rewards, beta = sequence_logprobs(reference, task), task.rewards, config.beta
    name = config.algorithm
    if name == "raft" and config.raft.rank_by == "reward":
        # Whatever is not best loses in every batch; the best share as the reference has them.
        return ref.masked_fill(rewards < rewards.amax(-1, keepdim=True), -torch.inf).softmax(-1)
    if name == "grpo" and config.grpo.kl_in == "loss":
        return _rest_of_grpo(config, task, reference)
    if name == "online_ipo":
        wins = (rewards[:, :, None] - rewards[:, None]).sigmoid()  # (P, N, N), that the first is preferred
        return _settled(ref.exp(), lambda law: (ref + (wins @ law[..., None])[..., 0] / beta).softmax(-1))
    if name in ("dpo", "ipo"):
        return (ref + _offline_logratio(config, task, pairs)).softmax(-1)
    # All that remain have no gradient exactly where r - beta log(policy / reference) is the same for all completions.
    return optimum(task, ref, beta).logprobs.exp()


def _settled(law: Tensor, step: Callable[[Tensor], Tensor]) -> Tensor:
    """Where `step` leaves a law as it is, by going half of the way again and again."""
    for _ in range(1000):
        moved = (law + step(law)) / 2
        if (moved - law).abs().max() < 1e-15:
            return moved
        law = moved
    raise RuntimeError("the law did not come to rest within 1000 steps")


def _offline_logratio(config: TrainConfig, task: EnumerableTask, pairs: Pairs | None) -> Tensor:
    """(P, N) log(policy / reference) that minimises the loss of a dataset, up to a constant for each prompt."""
    weights = torch.zeros(task.num_prompts, task.num_completions, task.num_completions, dtype=torch.float64)
    if pairs is None:
        weights += (task.rewards[:, :, None] - task.rewards[:, None]).sigmoid()
    for prompt, chosen, rejected in pairs or []:
        weights[prompt, chosen, rejected] += 1
    weights = weights / weights.sum()

    def loss(logratio: Tensor) -> Tensor:
        sides = (logratio[:, :, None].expand_as(weights), logratio[:, None].expand_as(weights))
        if config.algorithm == "dpo":
            return (weights * dpo_loss(*sides, beta=config.beta, label_smoothing=config.dpo.label_smoothing)).sum()
        return (weights * ipo_loss(*sides, beta=config.beta, label_smoothing=config.ipo.label_smoothing)).sum()

    return _root(lambda x: torch.func.grad(loss)(x), torch.zeros_like(task.rewards))


def _root(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Newton's method; what `function` is indifferent to (a constant for each prompt) stays as it is."""
    for _ in range(50):
        value = function(x).flatten()
        if value.abs().max() < 1e-14:
            return x
        jacobian = torch.func.jacrev(function)(x).reshape(len(value), len(value))
        x = x - (torch.linalg.pinv(jacobian, rtol=1e-9) @ value).view_as(x)
    raise RuntimeError("Newton's method did not come to rest within 50 steps")


def _rest_of_grpo(config: TrainConfig, task: EnumerableTask, reference: Any) -> Tensor:
    """GRPO with k3 in the loss: the expected update of a table of logits, written out, and where it vanishes.

    On the policy's own samples a token of completion y is weighed by (a(y) - beta (1 - reference / policy)) / |y|, the
    token's ratio, and a(y) what y's advantage is in the mean over the other K - 1 completions of its group.
    """
    completions = task.completions()
    ids, mask = completions.completion_ids[0], completions.completion_mask[0]
    places = {prefix: i for i, prefix in enumerate(dict.fromkeys(s[:t] for s in task.sequences for t in range(len(s))))}
    at = torch.tensor([[places[s[: min(t, len(s) - 1)]] for t in range(ids.shape[1])] for s in task.sequences])
    num_others = config.num_generations - 1
    groups = torch.cartesian_prod(*[torch.arange(task.num_completions)] * config.num_generations)
    advantage = group_standardised if config.grpo.standardise else group_centred
    advantages = advantage(task.rewards[:, groups])[..., 0].unflatten(-1, (task.num_completions, -1))  # (P, N, others)
    others = groups[: advantages.shape[-1], 1:]

    def law(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        laws = logits.log_softmax(-1)
        tokens = laws[:, at, ids] * mask
        return laws.exp(), tokens, tokens.sum(-1).exp()

    def update(logits: Tensor) -> Tensor:
        """(P, H, V) by logits of that shape, H the histories of a prompt."""
        laws, tokens, probs = law(logits)
        mean_advantage = (advantages @ probs[:, others].prod(-1)[..., None])  # (P, N, 1)
        pull = config.beta * (1 - (ref_tokens - tokens).exp())
        weights = probs[..., None] * (mean_advantage - pull) * mask / mask.sum(-1, keepdim=True)
        drawn = nn.functional.one_hot(ids, task.vocab_size).to(laws) - laws[:, at]
        moves = weights[..., None] * drawn  # (P, N, T, V)
        return torch.zeros_like(logits).index_add(1, at.flatten(), moves.flatten(1, 2))

    start = _history_logits(task, reference, places)
    ref_tokens = law(start)[1]
    logits = start
    for _ in range(500):  # downhill first: Newton's method goes to any zero, training only to one that attracts
        logits = logits + 2 * update(logits)
    return law(_root(update, logits))[2]


def _history_logits(task: EnumerableTask, reference: Any, places: dict[tuple[int, ...], int]) -> Tensor:
    """(P, H, V) float64 log-probabilities of the next word behind each prompt and each history."""
    ref = sequence_logprobs(reference, task).exp()
    logits = torch.zeros(task.num_prompts, len(places), task.vocab_size, dtype=torch.float64)
    for prefix, place in places.items():
        for word in range(task.vocab_size):
            goes_on = [s[: len(prefix) + 1] == (*prefix, word) for s in task.sequences]
            logits[:, place, word] = ref[:, goes_on].sum(-1).log()
    return logits.log_softmax(-1)


# ------------------------------------------------------------------------------------------------------------- training


def preference_pairs(task: EnumerableTask, num_pairs: int, *, seed: int) -> Pairs:
    """For each prompt as many pairs of two different completions, all equally likely, and labels by s(r - r')."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for prompt in range(task.num_prompts):
        for _ in range(num_pairs):
            first, second = torch.randperm(task.num_completions, generator=generator)[:2].tolist()
            chance = (task.rewards[prompt, first] - task.rewards[prompt, second]).sigmoid()
            wins = torch.rand((), generator=generator, dtype=torch.float64) < chance
            pairs.append((prompt, first, second) if wins else (prompt, second, first))
    return pairs


def preference_rows(task: EnumerableTask, pairs: Pairs) -> list[dict[str, str]]:
    """As a dataset; completions as text, their end written out where they have one."""
    texts = [" " + task.text(sequence) for sequence in task.sequences]
    prompts = [task.text(prompt) for prompt in task.prompts]
    return [{"prompt": prompts[p], "chosen": texts[w], "rejected": texts[l]} for p, w, l in pairs]


def scored_rows(task: EnumerableTask, reference: Any, num_each: int, *, seed: int) -> list[dict[str, Any]]:
    """All completions of each prompt once, and as many more from the reference, and from a uniform law."""
    generator = torch.Generator().manual_seed(seed)
    ref = sequence_logprobs(reference, task).exp()
    rows = []
    for prompt, (law, rewards) in enumerate(zip(ref, task.rewards.tolist(), strict=True)):
        drawn = [torch.multinomial(p, num_each, True, generator=generator) for p in (law, torch.ones_like(law))]
        for n in [*range(task.num_completions), *torch.cat(drawn).tolist()]:
            text = " " + task.text(task.sequences[n])
            rows.append({"prompt": task.text(task.prompts[prompt]), "completion": text, "reward": rewards[n]})
    return rows


def trained(
    config: TrainConfig,
    task: EnumerableTask,
    model: Any,
    *,
    pairs: Pairs | None = None,
    reward_func: Callable[..., list[float]] | None = None,
    eval_dataset: list[dict[str, str]] | None = None,
) -> Any:
    """Train `model` in silence, and without leaving a run folder; returns what `train` does."""
    dataset: list[Any]
    if config.algorithm in ("dpo", "ipo"):
        dataset = preference_rows(task, pairs or [])
    elif config.offline:
        dataset = scored_rows(task, model, task.num_completions, seed=0)
    else:
        dataset = task.dataset(config.batch_size)
    with tempfile.TemporaryDirectory() as folder, _silence():
        return train(
            config.model_copy(update={"output_dir": folder + "/run"}),
            model=model,
            tokenizer=task.tokenizer(),
            reward_funcs=[reward_func or task.reward_func],
            train_dataset=dataset,
            eval_dataset=eval_dataset,
        )


@contextlib.contextmanager
def _silence() -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def pairs_of(case: Case) -> Pairs | None:
    return preference_pairs(TASK, 300, seed=0) if case.method in ("dpo", "ipo") else None


def run(case: Case, seed: int) -> dict[str, Any]:
    """Train once; what came out, against the limit."""
    config, model = case.config(seed), tabular_model(TASK, seed=0)
    limit, ref = limit_of(config, TASK, model, pairs_of(case)), sequence_logprobs(model, TASK)
    started = time.perf_counter()
    trained(config, TASK, model, pairs=pairs_of(case))
    found = sequence_logprobs(model, TASK)
    return {
        "seed": seed,
        "variation": (found.exp() - limit).abs().sum(-1).max().item() / 2,
        "regret": exact_values(TASK, found, ref, BETA).regret,
        "policy": [[round(p, 6) for p in law] for law in found.exp().tolist()],
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    for case in CASES:
        if len(sys.argv) == 1 or case.name in sys.argv[1:]:
            result = run(case, 0)
            print(f"{case.name:40s} TV {result['variation']:.5f} regret {result['regret']:.6f} {result['seconds']} s", flush=True)
