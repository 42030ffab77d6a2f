"""One policy on held-out prompts: reward, KL, length, with intervals. Used by the loop and by the evidence.

All intervals are bootstrapped over prompts: the completions of one prompt are not independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pairtune.config import EvaluateConfig, RewardConfig
from pairtune.data import PromptDataset, dataset_name, load_dataset_rows, load_eval_prompts
from pairtune.errors import PairtuneError
from pairtune.experience import decode, sampling_params
from pairtune.feedback.comparisons import (
    encode_comparisons,
    evaluate_comparisons,
    evaluation_line,
    report_dict,
    report_table,
    score_comparisons,
)
from pairtune.feedback.reward_model import RewardModel
from pairtune.feedback.rewards import RewardSet, Scores, load_rewards
from pairtune.maths.kl import best_of_n_kl
from pairtune.maths.masking import masked_sum
from pairtune.maths.statistics import Interval, bootstrap_mean, bootstrap_ratio, distinct_n_interval
from pairtune.models.loading import (
    LoadedPolicy,
    MasterWeights,
    choose_device,
    choose_dtype,
    eos_ids,
    load_causal_lm,
    load_tokenizer,
    refuse_other_heads,
)
from pairtune.models.logprobs import Scorer, causal_lm, divergence, sharing
from pairtune.models.sampler import EVALUATION_STREAM, HFSampler, Sampler
from pairtune.models.weights import resolve_model
from pairtune.runs.display import evaluation_summary, make_console, progress
from pairtune.runs.folder import as_json, write_atomic
from pairtune.runs.memory import out_of_memory
from pairtune.types import Completions

EVALUATION_BATCH = 128
"""Completions sampled side by side; it changes the speed, not the tokens."""


def evaluate_policy(
    policy: LoadedPolicy,
    sampler: Sampler,
    rewards: RewardSet,
    dataset: PromptDataset,
    config: Any,
    *,
    step: int,
    batch_size: int | None = None,
    advance: Callable[[float], None] = lambda prompts: None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(one line of evaluations.jsonl, one sample per completion) of the policy on held-out prompts.

    The same prompts, the same random numbers and the same temperature at every call, so that two policies are compared
    on the same draws. `kl` is the sequence KL(law that samples || reference) in nats, Rao-Blackwellised (Amini, Vieira
    & Cotterell 2025); `kl_k1` the plain estimate log p - log ref of the same quantity, as a cross-check. Each metric is
    a mean with its 95% interval. Of several reward functions each has its own mean too, `rewards/<name>`.
    """
    num_prompts = num_evaluated(dataset, config)
    state = SimpleNamespace(global_step=step, max_steps=getattr(config, "max_steps", step))
    best_of_n = getattr(config, "best_of_n", 1)
    num_drawn = config.eval_generations * best_of_n
    per_batch = batch_size or max(1, EVALUATION_BATCH // num_drawn)
    columns: dict[str, list[Tensor]] = {}
    samples: list[dict[str, Any]] = []
    all_ids: list[Tensor] = []
    for start in range(0, num_prompts, per_batch):
        rows = list(range(start, min(start + per_batch, num_prompts)))
        prompts = dataset.batch(rows, device=policy.device)
        completions = sampler.generate(
            prompts, num_drawn, sampling_params(config), seed=config.seed, stream=EVALUATION_STREAM
        )
        texts = decode(policy.tokenizer, completions)
        scores = rewards.score(prompts, completions, texts, trainer_state=state, update_scale=False)
        if best_of_n > 1:
            completions, texts, scores = _best(completions, texts, scores, best_of_n)
        layout = policy.scorer.layout(completions)
        features = policy.scorer.features(layout)
        compared = divergence(
            policy.scorer,
            policy.reference,
            layout,
            features,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
        )
        mask = completions.completion_mask
        batch = {
            "reward": scores.raw_rewards,
            "counts": scores.reward_mask.float(),
            "kl": masked_sum(compared.kl, mask, -1),
            "kl_k1": masked_sum(compared.policy_logprobs - compared.ref_logprobs, mask, -1),
            "ref_nats": -masked_sum(compared.ref_logprobs, mask, -1),
            "entropy": masked_sum(compared.entropy, mask, -1),
            "length": completions.num_tokens.float(),
            "truncated": completions.truncated.float(),
        }
        if best_of_n > 1:
            # The law of the best is no product over tokens: what the choice adds, and what the policy has drifted.
            chosen = masked_sum(compared.policy_logprobs, mask, -1)
            batch["kl"] = batch["kl_k1"] = best_of_n_kl(chosen, best_of_n) + batch["kl_k1"]
        by_function = scores.by_function if len(scores.by_function) > 1 else {}
        batch |= {f"rewards/{name}": values for name, values in by_function.items()}
        for name, values in batch.items():
            columns.setdefault(name, []).append(values.float().cpu())
        width = config.max_completion_length
        ids = torch.full((*mask.shape[:2], width), -1)
        ids[..., : mask.shape[-1]] = completions.completion_ids.masked_fill(~mask, -1).cpu()
        all_ids.append(ids)
        measured = {name: batch[name] for name in ("kl", "kl_k1")}
        samples += _samples(dataset, rows, texts, scores, completions, measured, step)
        advance(len(rows))
    table = {name: torch.cat(parts) for name, parts in columns.items()}
    intervals = _intervals(table, torch.cat(all_ids))
    line = {"step": step, "num_prompts": num_prompts, "num_completions": num_prompts * config.eval_generations}
    return {**line, **{name: interval._asdict() for name, interval in intervals.items()}}, samples


def _best(
    completions: Completions, texts: list[list[str]], scores: Scores, n: int
) -> tuple[Completions, list[list[str]], Scores]:
    """Of every n completions the one of the largest reward, the first of equals."""
    rewards = scores.raw_rewards.masked_fill(~scores.reward_mask, -torch.inf).unflatten(1, (-1, n))
    chosen = rewards.argmax(-1) + n * torch.arange(rewards.shape[1], device=rewards.device)
    picked = {name: getattr(scores, name).gather(1, chosen) for name in ("rewards", "raw_rewards", "reward_mask")}
    kept = [[group[k] for k in row] for group, row in zip(texts, chosen.tolist(), strict=True)]
    by_function = {name: values.gather(1, chosen) for name, values in scores.by_function.items()}
    picked_scores = replace(scores, **picked, by_function=by_function)
    return completions.pick(chosen.to(completions.completion_ids.device)), kept, picked_scores


def num_evaluated(dataset: PromptDataset, config: Any) -> int:
    """How many of the held-out prompts an evaluation takes."""
    return min(len(dataset), config.num_eval_prompts or len(dataset))


@out_of_memory("evaluating", "lower batch_size, reward_batch_size, best_of_n or max_completion_length")
def evaluate(
    config: EvaluateConfig, *, reward_funcs: Sequence[Callable[..., Any] | str] | None = None, dataset: Any = None
) -> dict[str, Any]:
    """Measure a model on held-out prompts; prints a table, writes JSON where `output` says so, returns the line.

    Without `ref_model` there is nothing to measure a KL to, and the metrics that need a reference are left out; but
    best-of-n, a decoding that moves away from the model it samples, is measured to that model.
    With `reward_model` it is that model which is measured, see `evaluate_reward_model`.
    Raises PairtuneError for everything that a user can mend.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if config.reward_model is not None:
        return evaluate_reward_model(config, dataset)
    tokenizer = load_tokenizer(config.model, revision=config.model_revision, trust_remote_code=config.trust_remote_code)
    prompts = load_eval_prompts(config, tokenizer, dataset)
    rewards = load_rewards(config, tokenizer, prompts, reward_funcs)
    policy = load_pair(config, tokenizer)
    sampler = HFSampler(
        policy.model,
        tokenizer,
        eos_token_ids=policy.eos_token_ids,
        pad_token_id=policy.pad_token_id,
        opening=policy.scorer.opening,
    )
    with progress("evaluating", num_evaluated(prompts, config)) as advance:
        line, samples = evaluate_policy(
            policy, sampler, rewards, prompts, config, step=0, batch_size=config.batch_size, advance=advance
        )
    del line["step"]
    if config.ref_model is None and config.best_of_n == 1:
        line, *samples = (
            {name: value for name, value in one.items() if not name.startswith(("kl", "ref_"))}
            for one in (line, *samples)
        )
    make_console().print(evaluation_summary(line))
    if config.output is not None:
        content = {"config": config.model_dump(), "evaluation": line, "samples": samples}
        write_atomic(Path(config.output), as_json(content))
    return line


def evaluate_reward_model(config: EvaluateConfig, dataset: Any = None) -> dict[str, Any]:
    """Measure `reward_model` on held-out comparisons, as `pairtune reward` measures the model that it trains; prints a
    table, writes JSON where `output` says so, returns the line.

    Any sequence classifier with one label will do; the comparisons are tokenised by its own tokenizer.
    Raises PairtuneError for everything that a user can mend.
    """
    assert config.reward_model is not None
    split, source = config.dataset_test_split, config.dataset if dataset is None else dataset
    variant = config.dataset_config if dataset is None else None
    rows = load_dataset_rows(source, split=split, config=variant, only_split=split)
    shared = ("prompt_column", "max_prompt_length", "max_completion_length", "chat", "system_prompt")
    words = RewardConfig(
        model=config.reward_model, dataset=config.dataset, **{name: getattr(config, name) for name in shared}
    )
    tokenizer = load_tokenizer(config.reward_model, trust_remote_code=config.trust_remote_code)
    comparisons = encode_comparisons(rows, dataset_name(source), words, tokenizer)
    device = choose_device(config.device)
    judge = RewardModel.from_pretrained(
        resolve_model(config.reward_model),
        device=device,
        trust_remote_code=config.trust_remote_code,
        batch_size=config.reward_batch_size,
        chat=config.chat,
        system_prompt=config.system_prompt,
        policy_tokenizer=tokenizer,
    )
    num_rows = min(len(comparisons), config.num_eval_prompts or len(comparisons))
    with progress("scoring", num_rows) as advance:
        rewards = score_comparisons(judge, comparisons, num_rows, config.batch_size, advance)
    report = evaluate_comparisons(comparisons, rewards)
    console = make_console()
    for note in comparisons.data.notes:
        console.print(note, markup=False)
    console.print(report_table(report))
    line = evaluation_line(report)
    if config.output is not None:
        content = {"config": config.model_dump(), "evaluation": report_dict(report)}
        write_atomic(Path(config.output), as_json(content))
    return line


def load_pair(config: EvaluateConfig, tokenizer: Any) -> LoadedPolicy:
    """The model and the one its KL is measured to, in one compute precision and one layout."""
    device = choose_device(config.device)
    dtype, why = choose_dtype(config.dtype, device)

    def load(name: str, revision: str | None) -> Any:
        loaded = load_causal_lm(
            name,
            dtype=dtype,
            device=device,
            attn_implementation=config.attn_implementation,
            revision=revision,
            trust_remote_code=config.trust_remote_code,
        )
        refuse_other_heads(loaded)
        return loaded

    model = load(config.model, config.model_revision)
    other = model if config.ref_model is None else load(config.ref_model, None)
    sizes = [causal_lm(m).get_output_embeddings().weight.shape[0] for m in (model, other)]
    if sizes[0] != sizes[1]:
        raise PairtuneError(
            f"ref_model: {config.ref_model!r} has a vocabulary of {sizes[1]} tokens and {config.model!r} one of "
            f"{sizes[0]}; a KL needs two models of one vocabulary."
        )
    shared, opening = sharing(model) if other is model else sharing(model, other)
    return LoadedPolicy(
        model=model,
        tokenizer=tokenizer,
        scorer=Scorer(model, shared=shared, opening=opening),
        reference=Scorer(other, shared=shared, opening=opening),
        masters=MasterWeights([]),
        eos_token_ids=eos_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        device=device,
        dtype=dtype,
        notes=[why],
    )


def _intervals(table: dict[str, Tensor], ids: Tensor) -> dict[str, Interval]:
    """Each metric over prompts; a metric a token is the ratio of sums, not the mean of ratios."""
    per_prompt = {name: values.mean(1) for name, values in table.items()}
    length = per_prompt["length"]
    # A completion without a reward does not count: the mean reward is a ratio too.
    reward = bootstrap_ratio((table["reward"] * table["counts"]).sum(1), table["counts"].sum(1))
    by_function = {
        name: bootstrap_ratio(values.nansum(1), values.isfinite().float().sum(1))
        for name, values in table.items()
        if name.startswith("rewards/")
    }
    return {
        "reward": reward,
        **by_function,
        "kl": bootstrap_mean(per_prompt["kl"]),
        "kl_k1": bootstrap_mean(per_prompt["kl_k1"]),
        "kl_per_token": bootstrap_ratio(per_prompt["kl"], length),
        "length": bootstrap_mean(length),
        "truncated": bootstrap_mean(per_prompt["truncated"]),
        "entropy": bootstrap_ratio(per_prompt["entropy"], length),
        "ref_nats_per_token": bootstrap_ratio(per_prompt["ref_nats"], length),
        "distinct_2": distinct_n_interval(ids, n=2),
    }


def _samples(
    dataset: PromptDataset,
    rows: list[int],
    texts: list[list[str]],
    scores: Scores,
    completions: Completions,
    measured: dict[str, Tensor],
    step: int,
) -> list[dict[str, Any]]:
    """One line a completion. With its tokens it can be scored again as it was sampled, with its measures whatever an
    evaluation says can be worked out again, over other prompts and seeds together say."""
    measured = {name: values.cpu() for name, values in measured.items()}
    by_function = scores.by_function if len(scores.by_function) > 1 else {}
    lengths, ids = completions.num_tokens.tolist(), completions.completion_ids.cpu()
    return [
        {
            "step": step,
            "split": "eval",
            "row": row,
            "prompt": dataset.prompts[row],
            "completion_index": k,
            "completion": text,
            "reward": float(scores.raw_rewards[i, k]) if scores.reward_mask[i, k] else None,
            "completion_ids": ids[i, k, : lengths[i][k]].tolist(),
            "truncated": bool(completions.truncated[i, k]),
            **{name: values[i, k].item() for name, values in measured.items()},
            **{f"rewards/{name}": _or_none(values[i, k].item()) for name, values in by_function.items()},
        }
        for i, row in enumerate(rows)
        for k, text in enumerate(texts[i])
    ]


def _or_none(answer: float) -> float | None:
    return None if math.isnan(answer) else answer
