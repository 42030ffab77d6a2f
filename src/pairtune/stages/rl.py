"""The third stage of RLHF: reinforcement learning from a reward. `train` reads from top to bottom in the order of
events."""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtune.algorithms import ALGORITHMS, Algorithm, MethodState
from pairtune.completion_data import OfflineDataset, load_preferences, load_scored
from pairtune.config import METHODS, TrainConfig, config_to_yaml, warnings_for
from pairtune.data import PromptDataset, load_held_out, load_prompts, shard
from pairtune.errors import PairtuneError
from pairtune.evaluation import evaluate_policy, num_evaluated
from pairtune.experience import (
    Collected,
    Phase,
    ReferenceCache,
    as_tensors,
    collect,
    collect_offline,
    first_pass,
    from_tensors,
    minibatch_share,
)
from pairtune.feedback.judges import judged_preference
from pairtune.feedback.noise import NoisyRewards
from pairtune.feedback.preferences import PreferenceSet, load_preference_function
from pairtune.feedback.rewards import RewardSet, load_rewards
from pairtune.maths.advantages import MovingAverage
from pairtune.maths.masking import masked_mean, masked_sum
from pairtune.models.loading import LoadedPolicy, load_policy, load_tokenizer
from pairtune.models.logprobs import TokenScores, decoder_layers
from pairtune.models.sampler import HFSampler
from pairtune.models.values import ValueNetwork
from pairtune.runs import checkpoint, distributed, folder
from pairtune.runs.display import Display
from pairtune.runs.memory import LESS_LOADED, out_of_memory
from pairtune.runs.metrics import check_trackers, read_jsonl
from pairtune.stages.loop import Loop
from pairtune.stages.optimization import (
    TrainResult,
    apply_gradients,
    learning_rate_factor,
    load_state_tensors,
    make_optimizer,
    state_tensors,
)
from pairtune.types import Experience, LossOutput

BUDGET = (
    "num_completions",
    "num_generated_tokens",
    "num_reward_calls",
    "num_updates",
    "num_forward_tokens",
    "num_backward_tokens",
)
"""What a run has cost so far: metrics of every step, counted since the run's beginning and over all processes.
Evaluations are not in them."""

LESS_TRAINED = (
    "lower micro_batch_size, set gradient_checkpointing: true, or train less in a new run (trainable_layers, lora_r)"
)
OUT_OF_MEMORY = {
    "sample": "lower batch_size, num_generations or max_completion_length in a new run",
    "score": "lower reward_batch_size, or judge.batch_size in a new run",
    "ref_logprobs": "lower micro_batch_size",
    "old_logprobs": "lower micro_batch_size",
    "evaluate": "lower reward_batch_size, or eval_generations or max_completion_length in a new run",
}
"""What helps where the GPU has no room for a part of a step. A run that goes on may cut its batches otherwise, no
more. In all other parts it is LESS_TRAINED."""


def train(
    config: TrainConfig,
    *,
    model: Any = None,
    tokenizer: Any = None,
    reward_funcs: Sequence[Callable[..., Any] | str] | None = None,
    preference_func: Callable[..., Any] | None = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
) -> TrainResult:
    """Align a policy from relative feedback.

    What cannot be written in a configuration may be passed in: a model in memory with its tokenizer, reward functions
    (`f(prompts, completions, completion_ids, **columns) -> list[float | None]`) or a preference function
    (`f(prompts, first, second, **columns) -> list[float | None]`, the probability that the first is better), datasets
    (lists of rows or `datasets.Dataset`). Raises PairtuneError, in one sentence, for everything that a user can mend.
    """
    device = distributed.init_from_env(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    _check_shares(config)
    check_trackers(config.report_to)

    with contextlib.ExitStack() as stack:
        # What can be refused is refused before the model is loaded.
        run_dir = Path(config.output_dir)
        run_folder = (run_dir, config_to_yaml(config))
        if distributed.is_main():
            folder.check(*run_folder, overwrite=config.overwrite, resume=config.resume)
        if tokenizer is None:
            tokenizer = load_tokenizer(
                config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code
            )
        train_data, eval_prompts = _load_data(config, tokenizer, train_dataset, eval_dataset)
        feedback, rewards = _load_feedback(config, tokenizer, train_data, eval_prompts, reward_funcs, preference_func)

        done = read_jsonl(run_dir / folder.METRICS) if config.resume else []
        display = stack.enter_context(
            Display(config.max_steps, max_minutes=config.max_minutes, rewards=[line.get("reward") for line in done])
        )
        for sentence in warnings_for(config):
            display.message(f"note: {sentence}")
        for note in train_data.notes:
            display.message(note)
        with display.phase("loading the model"), out_of_memory("loading the model", LESS_LOADED):
            policy = load_policy(
                model if model is not None else config.model,
                tokenizer=tokenizer,
                dtype=folder.compute_dtype(run_dir, config.dtype, resume=config.resume),
                device=config.device if device is None else str(device),
                attn_implementation=config.attn_implementation,
                trainable_layers=config.trainable_layers,
                lora_r=config.lora_r,
                lora_alpha=config.lora_alpha,
                lora_target_modules=config.lora_target_modules,
                gradient_checkpointing=config.gradient_checkpointing,
                with_values=METHODS[config.algorithm].has_values,
                value_model=config.value_model,
                revision=config.model_revision,
                trust_remote_code=config.trust_remote_code,
            )
        for note in policy.notes:
            display.message(note)
        # Only now: whatever was refused above leaves no folder behind, and an earlier run as it was.
        if distributed.is_main():
            stack.enter_context(folder.create(*run_folder, overwrite=config.overwrite, resume=config.resume))
        distributed.barrier()
        return _loop(config, policy, feedback, rewards, train_data, eval_prompts, run_dir, display, stack)


def _load_data(
    config: TrainConfig, tokenizer: Any, train_dataset: Any, eval_dataset: Any
) -> tuple[PromptDataset | OfflineDataset, PromptDataset | None]:
    """What to learn from, and the held-out prompts."""
    train_data: PromptDataset | OfflineDataset
    if config.offline:
        load = load_scored if config.algorithm == "copg" else load_preferences
        train_data = load(config, tokenizer, train_dataset)
        eval_prompts = load_held_out(config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset)
    else:
        train_data, eval_prompts = load_prompts(
            config, tokenizer, train_dataset=train_dataset, eval_dataset=eval_dataset
        )
    train_data.step_rows(config.seed, 0, config.batch_size)  # refuses a dataset smaller than a batch
    return train_data, eval_prompts


def _load_feedback(
    config: TrainConfig,
    tokenizer: Any,
    train_data: PromptDataset | OfflineDataset,
    eval_prompts: PromptDataset | None,
    reward_funcs: Sequence[Callable[..., Any] | str] | None,
    preference_func: Callable[..., Any] | None,
) -> tuple[RewardSet | NoisyRewards | PreferenceSet | None, RewardSet | None]:
    """(what training learns from, what judges the held-out completions), checked against the prompts.

    Most often they are one. A dataset of completions says itself what is good, and a preference function says nothing
    of a completion alone: reward functions then judge the held-out completions only, and may be missing.
    """
    if preference_func is None and config.preference_func == "judge" and isinstance(train_data, PromptDataset):
        preference_func = judged_preference(config, train_data)
    elif preference_func is None and config.preference_func is not None:
        preference_func = load_preference_function(config.preference_func)
    if isinstance(train_data, PromptDataset) and preference_func is None:
        rewards = load_rewards(config, tokenizer, train_data, reward_funcs)
        if eval_prompts is not None:
            rewards.check(eval_prompts)
        return NoisyRewards(rewards, config.reward_noise, config.seed) if config.reward_noise else rewards, rewards
    preferences = None
    if isinstance(train_data, PromptDataset) and preference_func is not None:
        preferences = PreferenceSet(preference_func, rule=config.preference_rewards)
        preferences.check(train_data)
    if eval_prompts is None or not (reward_funcs or config.reward_funcs):
        return preferences, None
    return preferences, load_rewards(config, tokenizer, eval_prompts, reward_funcs)


def _check_shares(config: TrainConfig) -> None:
    """Every process takes the same share of every update."""
    share, world_size = config.minibatch_size or config.batch_size, distributed.world_size()
    if share % world_size:
        key = "batch_size" if config.minibatch_size is None else "minibatch_size"
        raise PairtuneError(
            f"{key} is {share}, which {world_size} processes cannot share equally; give a multiple of {world_size}."
        )


def _loop(
    config: TrainConfig,
    policy: LoadedPolicy,
    feedback: RewardSet | NoisyRewards | PreferenceSet | None,
    rewards: RewardSet | None,
    train_data: PromptDataset | OfflineDataset,
    eval_prompts: PromptDataset | None,
    run_dir: Path,
    display: Display,
    stack: contextlib.ExitStack,
) -> TrainResult:
    """Collect, update, log: step after step, in the `Loop` that evaluates and saves."""
    algorithm = ALGORITHMS[config.algorithm]
    sampler = HFSampler(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        pad_token_id=policy.pad_token_id,
        opening=policy.scorer.opening,
    )
    policy.masters.copy_from_main()
    optimizer = make_optimizer(config, policy.masters)
    progress, replay = _restore(config, run_dir, policy, optimizer, feedback)
    references = ReferenceCache(train_data, policy, config) if isinstance(train_data, OfflineDataset) else None
    is_main = distributed.is_main()
    loop = Loop(
        config,
        run_dir,
        progress,
        display,
        stack,
        num_steps=config.max_steps,
        dtype=policy.dtype,
        device=policy.device,
    )
    log, phase = loop.log, loop.phase

    def measure() -> None:
        if log is not None and eval_prompts is not None and rewards is not None:
            with phase("evaluate", "evaluating on held-out prompts", num_evaluated(eval_prompts, config)) as advance:
                evaluation, samples = evaluate_policy(
                    policy, sampler, rewards, eval_prompts, config, step=progress.step, advance=advance
                )
            log.log_evaluation(evaluation)
            log.log_samples(samples)
            display.evaluation(evaluation)

    def write() -> None:
        replays = distributed.gather_tensors(_replay_tensors(replay))
        if is_main:
            with phase("save", "saving a checkpoint"):
                _save(config, run_dir, policy, optimizer, feedback, progress, replays)

    def remember() -> Callable[[], None]:
        if feedback is None:
            return lambda: None
        carried = feedback.state_dict()  # a step may be scored before it fails
        return lambda: feedback.load_state_dict(carried)

    def limit() -> str | None:
        if config.max_generated_tokens is None or progress.num_generated_tokens < config.max_generated_tokens:
            return None
        return (
            f"{progress.num_generated_tokens} tokens generated, max_generated_tokens is {config.max_generated_tokens}"
        )

    def step() -> None:
        progress.updates_in_step, progress.forward_in_step, progress.backward_in_step = 0, 0.0, 0.0

        # Collect: prompts -> completions -> rewards -> reference log-probabilities.
        rows = train_data.step_rows(config.seed, progress.step, config.batch_size)
        rows = shard(rows, distributed.rank(), distributed.world_size())
        if isinstance(train_data, OfflineDataset):
            assert references is not None
            collected = collect_offline(
                train_data.batch(rows, device=policy.device),
                policy=policy,
                references=references,
                config=config,
                step=progress.step,
                phase=phase,
            )
        else:
            assert feedback is not None
            collected = collect(
                train_data.batch(rows, device=policy.device),
                policy=policy,
                sampler=sampler,
                feedback=feedback,
                config=config,
                step=progress.step,
                policy_version=progress.num_updates,
                phase=phase,
            )

        progress.forward_in_step += collected.forward_tokens

        # Update: several passes over the batch, then over earlier ones.
        experience, update_metrics = _update(config, algorithm, policy, optimizer, collected, progress, phase)
        update_metrics |= _update_again(config, algorithm, policy, optimizer, replay, progress, phase)
        replay.append(replace(collected, experience=experience))
        if config.adapts_beta:
            update_metrics["beta"] = progress.method.beta
        if algorithm.next_state is not None:
            progress.method = algorithm.next_state(experience, config, progress.method)

        progress.step += 1
        # What reward functions log comes first: it may not stand in for a metric of ours.
        metrics = {**collected.metrics, **_step_metrics(config, experience, progress), **update_metrics}
        metrics = _averaged(metrics)
        step_time = loop.step_time()
        tokens = metrics["completions/mean_length"] * config.batch_size * experience.rewards.shape[1]
        metrics.update(loop.timer.take(), step_time=step_time, tokens_per_second=tokens / step_time)
        if log is not None:
            log.log_step(progress.step, metrics)
            log.log_samples(_training_samples(config, train_data, rows, collected, progress.step))
        display.step(progress.step, metrics)

    finished = loop.run(
        step,
        measure=measure,
        write=write,
        mend=lambda phase: OUT_OF_MEMORY.get(phase, LESS_TRAINED),
        untouched=lambda: progress.updates_in_step == 0,
        remember=remember,
        limit=limit,
    )
    return TrainResult(run_dir, progress.step, finished=finished, model=policy.model, tokenizer=policy.tokenizer)


def _averaged(metrics: dict[str, float]) -> dict[str, float]:
    """The mean over the processes that have a metric; each holds an equal share of the batch."""
    everywhere = distributed.gather_objects(metrics)
    names = dict.fromkeys(name for one in everywhere for name in one)
    return {name: statistics.fmean(one[name] for one in everywhere if name in one) for name in names}


# --------------------------------------------------------------------------------------------------------------- update


def _update(
    config: TrainConfig,
    algorithm: Algorithm,
    policy: LoadedPolicy,
    optimizer: torch.optim.Optimizer,
    collected: Collected,
    progress: Progress,
    phase: Phase,
) -> tuple[Experience, dict[str, float]]:
    """`num_iterations` passes over a batch, each in minibatches of one optimizer update, each in micro-batches."""
    experience = collected.experience
    num_prompts = len(experience.rewards)
    minibatch_size = minibatch_share(config)
    is_fresh = experience.old_logprobs is None
    # Where a pass is one update, the first pass itself yields the old log-probabilities: a forward pass saved.
    yields_old = is_fresh and minibatch_size >= num_prompts and not algorithm.prepares_from_old
    old_logprobs = torch.zeros_like(experience.ref_logprobs)
    if yields_old:
        experience = replace(experience, old_logprobs=old_logprobs)
    elif is_fresh:
        with phase("old_logprobs", "old log-probabilities"):
            experience = _with_old(config, policy, collected)
    if is_fresh and algorithm.prepare is not None:
        experience = replace(experience, targets=algorithm.prepare(experience, config, progress.method))

    metrics: dict[str, float] = {}
    passes = []
    gradient_norms = []
    policy.model.train(config.gradient_checkpointing)
    for iteration in range(config.num_iterations):
        totals = Totals()
        for minibatch in _minibatches(config, progress.step, iteration, num_prompts, minibatch_size, policy.device):
            with phase("update", f"updating, pass {iteration + 1} of {config.num_iterations}"):
                # The denominator is counted over all micro-batches and processes before any backward pass, so that the
                # gradient does not depend on how a batch is cut.
                counted = algorithm.counted(experience)[minibatch].sum()
                denominator = max(1, int(distributed.sum_across(counted)))
                for prompts in minibatch.split(config.micro_batch_size or minibatch_size):
                    scores = _scores(config, policy, collected, prompts, with_entropy=iteration == 0)
                    if iteration == 0 and yields_old:
                        old_logprobs[prompts] = scores.logprobs.detach()
                    micro = experience.select(prompts)
                    if iteration == 0:
                        first_update = progress.updates_in_step == 0
                        _check_exact(scores.logprobs.detach(), micro, progress, first_update=first_update)
                    output = algorithm.loss(scores.logprobs, micro, config, scores.values)
                    loss = masked_sum(output.losses, output.mask) / denominator
                    loss.backward()
                    totals.add(output, loss, scores.entropies, micro.completions.completion_mask)
                gradient_norms.append(_apply_gradients(config, policy, optimizer, progress))
        passes.append(totals)
    policy.model.eval()
    _count_passes(config, policy, collected, progress, old_pass=is_fresh and not yields_old)

    everywhere = [totals.over_processes() for totals in passes]
    for number, totals in enumerate(everywhere, 1):
        for name, value in totals.means().items():
            metrics[f"{name}/pass_{number}"] = value
            metrics[name] = value  # without a pass: the last one
    metrics["loss"] = sum(totals.loss for totals in everywhere) / config.updates_per_batch
    metrics["entropy"] = everywhere[0].entropy()
    metrics["grad_norm"] = statistics.fmean(gradient_norms)
    metrics["learning_rate"] = optimizer.param_groups[0]["lr"]
    return experience, metrics


def _update_again(
    config: TrainConfig,
    algorithm: Algorithm,
    policy: LoadedPolicy,
    optimizer: torch.optim.Optimizer,
    replay: Sequence[Collected],
    progress: Progress,
    phase: Phase,
) -> dict[str, float]:
    """The same for earlier batches, newest first, against their own old log-probabilities: means under `replay/`."""
    columns: dict[str, list[float]] = {}
    for earlier in reversed(replay):
        _, metrics = _update(config, algorithm, policy, optimizer, earlier, progress, phase)
        for name in metrics.keys() - {"learning_rate"}:
            columns.setdefault(f"replay/{name}", []).append(metrics[name])
    return {name: statistics.fmean(columns[name]) for name in sorted(columns) if "/pass_" not in name}


def _count_passes(
    config: TrainConfig, policy: LoadedPolicy, collected: Collected, progress: Progress, *, old_pass: bool
) -> None:
    """Tokens through decoders, forward and backward, in `num_iterations` passes over a batch and the pass for its old
    log-probabilities. Padding does not count, and a token that passes part of the layers counts for that part."""
    scorer = policy.scorer
    forward = scorer.top_share
    # Below the layers that are trained no gradient flows, whether or not they were split off as a trunk.
    trained = config.trainable_layers
    backward = 1.0 if trained is None else trained / len(decoder_layers(policy.model))
    if isinstance(policy.value, ValueNetwork):
        forward, backward = forward + 1, backward + 1
    recomputed = backward if config.gradient_checkpointing else 0.0
    tokens = collected.layout.num_tokens
    progress.forward_in_step += tokens * (config.num_iterations * (forward + recomputed) + (forward if old_pass else 0))
    progress.backward_in_step += tokens * config.num_iterations * backward


def _scores(
    config: TrainConfig, policy: LoadedPolicy, collected: Collected, prompts: Tensor, *, with_entropy: bool = False
) -> TokenScores:
    """Log-probabilities, entropies and values (p, K, T) of some prompts' completions under the policy as it is now."""
    layout, features = collected.layout, collected.features
    part = None if features is None else layout.rows(prompts, features)
    return policy.score(layout.select(prompts), part, temperature=config.temperature, with_entropy=with_entropy)


@torch.no_grad()
def _with_old(config: TrainConfig, policy: LoadedPolicy, collected: Collected) -> Experience:
    """The experience with log-probabilities and values from before the first update, cut as the first pass will cut
    them: the same arithmetic, so a first ratio of 1."""
    cuts = first_pass(config, len(collected.experience.rewards), policy.device)
    parts = [_scores(config, policy, collected, prompts) for prompts in cuts]
    values = [part.values for part in parts if part.values is not None]
    return replace(
        collected.experience,
        old_logprobs=torch.cat([part.logprobs for part in parts]),
        old_values=torch.cat(values) if values else None,
    )


def _minibatches(
    config: TrainConfig, step: int, iteration: int, num_prompts: int, size: int, device: torch.device
) -> tuple[Tensor, ...]:
    """The prompts of each update of a pass: in order in the first pass, freshly permuted in the later ones."""
    order = torch.arange(num_prompts)
    if iteration > 0 and size < num_prompts:
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1009 + iteration)
        order = torch.randperm(num_prompts, generator=generator)
    return order.to(device).split(size)


def _apply_gradients(
    config: TrainConfig, policy: LoadedPolicy, optimizer: torch.optim.Optimizer, progress: Progress
) -> float:
    """One optimizer move from the gradients accumulated on the masters; returns the norm before clipping."""
    num_updates = config.max_steps * config.updates_per_step
    progress.updates_in_step += 1  # before it is made: one that fails halfway leaves nothing to be saved
    norm = apply_gradients(
        policy.masters,
        optimizer,
        learning_rate=config.learning_rate * learning_rate_factor(config, progress.num_updates, num_updates),
        max_grad_norm=config.max_grad_norm,
        step=progress.step + 1,
        mend="lower learning_rate or epsilon, or set p3o.max_ratio",
    )
    progress.num_updates += 1
    return norm


def _check_exact(logprobs: Tensor, experience: Experience, progress: Progress, *, first_update: bool) -> None:
    """One arithmetic, asserted: before the first update the policy is its reference, and the old policy is the current
    one."""
    mask = experience.completions.completion_mask

    def warn_unless_equal(other: Tensor, what: str) -> None:
        gap = ((logprobs - other) * mask).abs().max().item()
        if gap > 0:
            warnings.warn(
                f"{what} (a token differs by {gap:.2g} nats): the two were not computed alike; look for other casts, "
                "layout, padded width or micro-batch size, dropout left on, or a reference with other weights.",
                stacklevel=3,
            )

    if progress.num_updates == 0:
        warn_unless_equal(experience.ref_logprobs, "the KL to the reference is not 0 before the first update")
    if first_update and experience.old_logprobs is not None:
        warn_unless_equal(experience.old_logprobs, f"the first ratio of step {progress.step + 1} is not 1")


class Totals:
    """Sums over the micro-batches of a pass."""

    def __init__(self) -> None:
        self.loss = 0.0
        self._sums: Counter[str] = Counter()
        self._counted = 0
        self._entropy = 0.0
        self._tokens = 0

    def add(self, output: LossOutput, loss: Tensor, entropies: Tensor, completion_mask: Tensor) -> None:
        self.loss += loss.item()
        self._sums.update({name: masked_sum(x, output.mask).item() for name, x in output.metrics.items()})
        self._counted += int(output.mask.sum())
        self._entropy += masked_sum(entropies, completion_mask).item()
        self._tokens += int(completion_mask.sum())

    def over_processes(self) -> Totals:
        """The same sums over the micro-batches of all processes."""
        total = Totals()
        for part in distributed.gather_objects(vars(self)):
            total.loss += part["loss"]
            total._sums.update(part["_sums"])
            total._counted += part["_counted"]
            total._entropy += part["_entropy"]
            total._tokens += part["_tokens"]
        return total

    def means(self) -> dict[str, float]:
        return {name: value / max(1, self._counted) for name, value in self._sums.items()}

    def entropy(self) -> float:
        """Mean entropy of the next token, nats."""
        return self._entropy / max(1, self._tokens)


# -------------------------------------------------------------------------------------------------------------- metrics


def _step_metrics(config: TrainConfig, experience: Experience, progress: Progress) -> dict[str, float]:
    """What a step reports of its batch, over all processes."""
    completions = experience.completions
    rewards, counts = _of_all_processes(experience.rewards), _of_all_processes(experience.reward_mask)
    real = _of_all_processes(completions.num_tokens > 0)
    lengths = _of_all_processes(completions.num_tokens.float())
    truncated = _of_all_processes(completions.truncated)
    group_mean = masked_mean(rewards, counts, -1)
    group_std = masked_mean((rewards - group_mean[:, None]) ** 2, counts, -1).sqrt()
    progress.num_tokens += int(lengths.sum() + _of_all_processes(completions.prompt_mask.sum(1)).sum())
    _count(config, experience, progress, num_completions=int(real.sum()), num_generated=int(lengths.sum()))
    metrics = {
        "reward": masked_mean(rewards, counts).item(),
        "reward_std": group_std.mean().item(),
        "frac_reward_zero_std": (group_std == 0).float().mean().item(),
    }
    if not config.offline:
        metrics |= _sampling_metrics(experience)
    return metrics | {
        "completions/mean_length": masked_mean(lengths, real).item(),
        "completions/min_length": lengths[real].min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/mean_terminated_length": masked_mean(lengths, ~truncated & real).item(),
        "completions/clipped_ratio": masked_mean(truncated.float(), real).item(),
        "num_tokens": float(progress.num_tokens),
        **{name: float(getattr(progress, name)) for name in BUDGET},
    }


def _count(
    config: TrainConfig, experience: Experience, progress: Progress, *, num_completions: int, num_generated: int
) -> None:
    """Adds what a step has cost, over all processes, to what the run has cost so far. Evaluations are not counted."""
    own = torch.tensor([[progress.forward_in_step, progress.backward_in_step]], dtype=torch.float64)
    forward, backward = _of_all_processes(own).sum(0).tolist()
    progress.num_forward_tokens += forward
    progress.num_backward_tokens += backward
    progress.num_completions += num_completions
    if not config.offline:
        progress.num_generated_tokens += num_generated
        num_prompts, num_generations = config.batch_size, config.num_generations
        pairs = experience.preferences is not None
        progress.num_reward_calls += num_prompts * (math.comb(num_generations, 2) if pairs else num_generations)


def _sampling_metrics(experience: Experience) -> dict[str, float]:
    """Of completions that the policy itself sampled. `kl` is the plain estimate of its sequence KL to the reference."""
    completions = experience.completions
    mask, old = completions.completion_mask, experience.old_logprobs
    assert old is not None
    gap = (completions.sampler_logprobs - old).abs() * mask
    kl = _of_all_processes(masked_sum(old - experience.ref_logprobs, mask, -1))
    lengths = _of_all_processes(completions.num_tokens.float())
    gap_sums, gap_peaks = _of_all_processes(gap.sum(-1)), _of_all_processes(gap.amax(-1))
    return {
        "kl": kl.mean().item(),
        "kl_per_token": (kl.sum() / lengths.sum()).item(),
        "sampling/logprob_difference/mean": (gap_sums.sum() / lengths.sum()).item(),
        "sampling/logprob_difference/max": gap_peaks.max().item(),
    }


def _of_all_processes(rows: Tensor) -> Tensor:
    """The rows of every process, one below the other, on the CPU."""
    parts = distributed.gather_objects(rows.tolist())
    return torch.tensor([row for part in parts for row in part], dtype=rows.dtype)


def _training_samples(
    config: TrainConfig, dataset: PromptDataset | OfflineDataset, rows: list[int], collected: Collected, step: int
) -> list[dict[str, Any]]:
    """The first few completions of the batch, for samples.jsonl."""
    num_generations = collected.experience.rewards.shape[1]
    rewards, counts = collected.experience.rewards, collected.experience.reward_mask
    truncated = collected.experience.completions.truncated
    samples = []
    for index in range(min(config.num_completions_to_log, len(rows) * num_generations)):
        p, k = divmod(index, num_generations)
        sample = {
            "step": step,
            "split": "train",
            "row": rows[p],
            "prompt": dataset.prompts[rows[p]],
            "completion_index": k,
            "completion": collected.texts[p][k],
            "reward": rewards[p, k].item() if counts[p, k] else None,
            "truncated": bool(truncated[p, k]),
        }
        samples.append({**sample, **{name: values[index] for name, values in collected.extras.items()}})
    return samples


# ----------------------------------------------------------------------------------------------- optimizer and resuming


@dataclass
class Progress:
    """Where a run stands; with the masters and the optimizer's moments, all that resuming needs: every random number is
    a function of (seed, step)."""

    step: int = 0
    num_updates: int = 0
    num_tokens: int = 0
    """Prompt and completion tokens seen, over all processes; so are the five below."""
    num_completions: int = 0
    """Completions learned from, each once: sampled, or read from a dataset."""
    num_generated_tokens: int = 0
    """Completion tokens sampled."""
    num_reward_calls: int = 0
    """Completions that were judged, or pairs where a preference function judges."""
    num_forward_tokens: float = 0.0
    """Real tokens through the decoders of policy, reference and value network: sampling, scoring and updating."""
    num_backward_tokens: float = 0.0
    """Real tokens through them backward."""
    seconds: float = 0.0
    """Training time so far, over all resumes."""
    updates_in_step: int = 0
    forward_in_step: float = 0.0
    """Of this process alone, as the next."""
    backward_in_step: float = 0.0
    evaluated_step: int = -1
    """The last step whose policy was evaluated on the held-out prompts."""
    method: MethodState = field(default_factory=lambda: MethodState(beta=0.0))


def _save(
    config: TrainConfig,
    run_dir: Path,
    policy: LoadedPolicy,
    optimizer: torch.optim.Optimizer,
    feedback: RewardSet | NoisyRewards | PreferenceSet | None,
    progress: Progress,
    replays: list[dict[str, Tensor]],
) -> None:
    """A checkpoint that `from_pretrained` loads, with what resuming needs beside it."""
    tensors = state_tensors(policy.masters, optimizer)
    for process, replayed in enumerate(replays):
        tensors |= {f"replay.{process}.{name}": tensor for name, tensor in replayed.items()}

    def save_model(path: Path) -> None:
        policy.model.save_pretrained(path)
        policy.tokenizer.save_pretrained(path)

    state = {
        "progress": asdict(progress),
        "rewards": {} if feedback is None else feedback.state_dict(),
        "num_processes": distributed.world_size(),
    }
    checkpoint.save(
        run_dir, progress.step, save_model=save_model, tensors=tensors, state=state, keep_last=config.keep_last
    )


def _replay_tensors(replay: Sequence[Collected]) -> dict[str, Tensor]:
    """`number.name` -> tensor, of the earlier batches of this process, oldest first."""
    return {
        f"{number}.{name}": tensor
        for number, batch in enumerate(replay)
        for name, tensor in as_tensors(batch.experience).items()
    }


def _restore(
    config: TrainConfig,
    run_dir: Path,
    policy: LoadedPolicy,
    optimizer: torch.optim.Optimizer,
    feedback: RewardSet | NoisyRewards | PreferenceSet | None,
) -> tuple[Progress, deque[Collected]]:
    """Where the run stands, and the batches that it learns from again: at its newest checkpoint when resuming, else at
    the start."""
    replay: deque[Collected] = deque(maxlen=config.replay)
    path = checkpoint.latest(run_dir) if config.resume else None
    if path is None:
        return Progress(method=MethodState(beta=config.beta)), replay
    tensors, state = checkpoint.load(path)
    if config.replay:
        _check_processes(tensors, state, path)
    method = state["progress"].pop("method")
    method = MethodState(beta=method["beta"], average=MovingAverage(**method["average"]))
    progress = Progress(**state["progress"], method=method)
    load_state_tensors(policy.masters, optimizer, tensors, num_updates=progress.num_updates)
    if feedback is not None:
        feedback.load_state_dict(state["rewards"])
    for number in range(config.replay):
        prefix = f"replay.{distributed.rank()}.{number}."
        batch = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        if batch:
            replay.append(from_tensors(batch, policy, config))
    return progress, replay


def _check_processes(tensors: dict[str, Tensor], state: dict[str, Any], path: Path) -> None:
    """Each process replays its own share of earlier batches: of another number of processes some would have no share,
    or some shares no process, and the processes would wait for each other for ever or forget batches."""
    # Checkpoints of older versions do not say the number; the shares in them are counted.
    shares = {name.split(".")[1] for name in tensors if name.startswith("replay.")}
    before, now = state.get("num_processes", len(shares)), distributed.world_size()
    if shares and before != now:
        raise PairtuneError(
            f"replay: {path} holds the earlier batches of {before} process{'es' * (before != 1)} and {now} would go on "
            f"with them; resume with {before}, or begin a new run in another output_dir."
        )
