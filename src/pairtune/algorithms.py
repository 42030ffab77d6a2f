"""name -> Algorithm: the one place where credit meets a loss.

A loss sees whole groups: every tensor has the axes P prompts and K completions. What is fixed for a batch (labels that
were drawn, advantages of a value function) is made once by `prepare`; what follows from the rewards of one group alone
is formed in the loss, where the log-probabilities of the policy that sampled are known for certain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from pairtune.config import OnlinePreferenceConfig, TrainConfig
from pairtune.maths import advantages as credit
from pairtune.maths import contrastive, pairwise, policy_gradient, preference
from pairtune.maths.kl import kl_shaped_rewards
from pairtune.maths.masking import masked_mean, masked_sum, pair_indices
from pairtune.maths.random import counter_uniforms
from pairtune.runs import distributed
from pairtune.types import Experience, LossOutput, Targets


@dataclass(frozen=True)
class MethodState:
    """What a method carries from step to step; a checkpoint keeps it."""

    beta: float
    """The weight of the KL now: the configuration's, or the adaptive controller's."""
    average: credit.MovingAverage = field(default_factory=credit.MovingAverage)
    """Of all trajectory rewards so far."""


class Loss(Protocol):
    """(policy log-probabilities (P, K, T), experience, configuration, values (P, K, T)) -> unreduced losses."""

    def __call__(
        self,
        policy_logprobs: Tensor,
        experience: Experience,
        config: TrainConfig,
        policy_values: Tensor | None = None,
    ) -> LossOutput: ...


@dataclass(frozen=True)
class Algorithm:
    """What the loop needs to know of a method."""

    counted: Callable[[Experience], Tensor]
    """Bool, first axis P: which elements of the loss count. Known before any pass, so that the denominator of an update
    is global."""
    loss: Loss
    prepare: Callable[[Experience, TrainConfig, MethodState], Targets] | None = None
    """What is fixed for a batch before its first update."""
    next_state: Callable[[Experience, TrainConfig, MethodState], MethodState] | None = None
    """The state for the next step, once a batch has been used."""
    prepares_from_old: bool = False
    """Whether `prepare` reads old log-probabilities and values, so that these need a pass of their own."""


# ------------------------------------------------------------------------------------------- what several methods share


def _groups_with_a_pair(experience: Experience) -> Tensor:
    return experience.reward_mask.sum(-1) >= 2


def _compared_completions(experience: Experience) -> Tensor:
    """(P, K) completions that count and have another to be compared with."""
    return experience.reward_mask & _groups_with_a_pair(experience)[:, None]


def _counted_tokens(experience: Experience) -> Tensor:
    return experience.completions.completion_mask & experience.reward_mask[..., None]


def _sequence(token_values: Tensor, experience: Experience) -> Tensor:
    """(P, K, T) per token -> (P, K) per sequence."""
    return masked_sum(token_values, experience.completions.completion_mask, -1)


def _given(x: Tensor | None, name: str) -> Tensor:
    if x is None:
        raise RuntimeError(f"a loss was asked for without {name}")
    return x


def _old(experience: Experience) -> Tensor:
    return _given(experience.old_logprobs, "old log-probabilities")


def _old_logratio(experience: Experience) -> Tensor:
    """(P, K) log(policy that sampled / reference) of whole completions."""
    return _sequence(_old(experience) - experience.ref_logprobs, experience)


def _shaped(experience: Experience, config: TrainConfig) -> Tensor:
    """(P, K) trajectory rewards with the KL of the policy that sampled, up to a constant per prompt."""
    return kl_shaped_rewards(experience.rewards, _old_logratio(experience), config.beta, experience.reward_mask)


def _trajectory_rewards(experience: Experience, beta: float) -> Tensor:
    """(P, K) the same without the free constant, for a baseline that is not of the group."""
    return torch.where(experience.reward_mask, experience.rewards - beta * _old_logratio(experience), 0)


def _mean_drift(policy: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    """(P, K) sequence log-probabilities -> (P,) mean |log-ratio| of a group's completions, nats."""
    return masked_mean((policy.detach() - old).abs(), mask, -1)


# ------------------------------------------------------------------------------------------------------------------ P3O


def _p3o_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """P3O (pairwise, Wu et al. 2023), section 4.2: clipped jointly, separately, or not at all.

    The trajectory reward is r - beta * log(pi / pi_ref), with pi the policy being updated (`kl_at: current`) or the one
    that sampled (`kl_at: sampling`, the paper's Algorithm 2).
    """
    mask = experience.reward_mask
    policy, old = _sequence(policy_logprobs, experience), _sequence(_old(experience), experience)
    kl_logprobs = policy_logprobs.detach() if config.p3o.kl_at == "current" else _old(experience)
    rewards = kl_shaped_rewards(
        experience.rewards, _sequence(kl_logprobs - experience.ref_logprobs, experience), config.beta, mask
    )
    clip, max_ratio = config.p3o.clip, config.p3o.max_ratio
    if clip == "joint":
        losses = pairwise.p3o_joint_loss(policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio, mask=mask)
    elif clip == "separate":
        losses = pairwise.p3o_separate_loss(
            policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio, mask=mask
        )
    else:
        losses = pairwise.pairwise_policy_gradient_loss(policy, old, rewards, max_ratio=max_ratio, mask=mask)
    kind: Literal["joint", "separate"] = "separate" if clip == "separate" else "joint"
    current, old = policy.detach(), old.detach()
    metrics = {
        "clip_ratio": pairwise.pairs_past_clip(current, old, epsilon=config.epsilon, kind=kind, mask=mask),
        "logratio_abs": _mean_drift(current, old, mask),
    }
    if clip != "none":
        metrics["clip_ratio/zero_gradient"] = pairwise.clipped_share(
            current, old, rewards, epsilon=config.epsilon, kind=kind, mask=mask
        )
    return LossOutput(losses=losses, mask=_groups_with_a_pair(experience), metrics=metrics)


# ------------------------------------------------------------------------------------------ REINFORCE and its relatives


def _reinforce_prepare(experience: Experience, config: TrainConfig, state: MethodState) -> Targets:
    moving = config.reinforce.baseline == "moving_average"
    return replace(experience.targets, baseline=state.average.mean if moving else 0.0)


def _reinforce_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """Sequence-level REINFORCE (Ahmadian et al. 2024, arXiv 2402.14740, section 2.3), the baseline a moving average."""
    mask = experience.reward_mask
    policy, old = _sequence(policy_logprobs, experience), _sequence(_old(experience), experience)
    advantages = _trajectory_rewards(experience, config.beta) - experience.targets.baseline
    losses = policy_gradient.reinforce_loss(policy, advantages, mask=mask)
    metrics = {"advantages": advantages, "logratio_abs": (policy.detach() - old).abs()}
    return LossOutput(losses=losses, mask=mask, metrics=metrics)


def _reinforce_next_state(experience: Experience, config: TrainConfig, state: MethodState) -> MethodState:
    """One baseline for all processes: the mean of all trajectory rewards, this batch's included from the next step."""
    shaped = _trajectory_rewards(experience, config.beta)[experience.reward_mask]
    everywhere = [reward for part in distributed.gather_objects(shaped.tolist()) for reward in part]
    rewards = torch.tensor(everywhere, dtype=torch.float64)
    return replace(state, average=credit.update_moving_average(state.average, rewards))


def _rloo_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, section 2.3), with trl's clip of sequence ratios as an option."""
    mask = _compared_completions(experience)
    policy, old = _sequence(policy_logprobs, experience), _sequence(_old(experience), experience)
    advantages = credit.leave_one_out(_shaped(experience, config), experience.reward_mask)
    metrics = {"logratio_abs": (policy.detach() - old).abs()}
    if not config.rloo.clip:
        losses = policy_gradient.reinforce_loss(policy, advantages, mask=mask)
        return LossOutput(losses=losses, mask=mask, metrics=metrics)
    losses = policy_gradient.sequence_clip_loss(policy, old, advantages, epsilon=config.epsilon, mask=mask)
    stopped = policy_gradient.clipped(policy, old, advantages, epsilon=config.epsilon, mask=mask)
    return LossOutput(losses=losses, mask=mask, metrics={**metrics, "clip_ratio": stopped.float()})


def _grpo_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """GRPO (Shao et al. 2024, arXiv 2402.03300): a clip of each token, one advantage a completion, its mean."""
    completion_mask = experience.completions.completion_mask
    in_reward = config.grpo.kl_in == "reward"
    rewards = _shaped(experience, config) if in_reward else experience.rewards
    advantage = credit.group_standardised if config.grpo.standardise else credit.group_centred
    advantages = advantage(rewards, experience.reward_mask)
    old, mask = _old(experience), _counted_tokens(experience)
    losses = policy_gradient.grpo_loss(
        policy_logprobs,
        old,
        experience.ref_logprobs,
        advantages,
        epsilon=config.epsilon,
        beta=0.0 if in_reward else config.beta,
        mask=mask,
    )
    stopped = policy_gradient.clipped(
        policy_logprobs, old, advantages[..., None].expand_as(old), epsilon=config.epsilon, mask=mask
    )
    metrics = {
        "clip_ratio": masked_mean(stopped.float(), completion_mask, -1),
        "logratio_abs": _sequence(policy_logprobs.detach() - old, experience).abs(),
    }
    return LossOutput(
        losses=masked_mean(losses, completion_mask, -1), mask=_compared_completions(experience), metrics=metrics
    )


def _raft_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """RAFT (Dong et al. 2023, arXiv 2304.06767): the best of each group is imitated, token sum, ties share."""
    mask = experience.reward_mask
    ranked = _shaped(experience, config) if config.raft.rank_by == "shaped" else experience.rewards
    policy, old = _sequence(policy_logprobs, experience), _sequence(_old(experience), experience)
    best = masked_mean(experience.rewards, mask & (ranked == ranked.masked_fill(~mask, -torch.inf).amax(-1, True)), -1)
    return LossOutput(
        losses=policy_gradient.raft_loss(policy, ranked, mask=mask),
        mask=_groups_with_a_pair(experience),
        metrics={"logratio_abs": _mean_drift(policy, old, mask), "reward_best": best},
    )


# ---------------------------------------------------------------------------------------------- CoPG, REBEL, online DPO


def _copg_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """Contrastive policy gradient (Flet-Berliac et al. 2024, arXiv 2406.19185), whoever sampled the completions."""
    mask = experience.reward_mask
    policy, ref = _sequence(policy_logprobs, experience), _sequence(experience.ref_logprobs, experience)
    losses = contrastive.copg_loss(policy, ref, experience.rewards, beta=config.beta, mask=mask)
    metrics = {"logratio_abs": _mean_drift(policy, _sequence(_old(experience), experience), mask)}
    return LossOutput(losses=losses, mask=_groups_with_a_pair(experience), metrics=metrics)


def _rebel_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """REBEL (Gao et al. 2024, arXiv 2404.16767): regress the pair's log-ratio on the difference of shaped rewards."""
    mask = experience.reward_mask
    policy, old = _sequence(policy_logprobs, experience), _sequence(_old(experience), experience)
    losses = contrastive.rebel_loss(policy, old, _shaped(experience, config), eta=config.rebel.eta, mask=mask)
    metrics = {"logratio_abs": _mean_drift(policy, old, mask)}
    return LossOutput(losses=losses, mask=_groups_with_a_pair(experience), metrics=metrics)


def _online_section(config: TrainConfig) -> OnlinePreferenceConfig:
    return config.online_dpo if config.algorithm == "online_dpo" else config.online_ipo


def _online_prepare(experience: Experience, config: TrainConfig, state: MethodState) -> Targets:
    """Labels of all pairs; one that is drawn stays as it is for all passes and all replays of its batch."""
    kind = _online_section(config).labels
    if experience.preferences is not None:  # a judge has said how likely: used as it is, or drawn from
        labels, mask = preference.pair_preferences(experience.preferences, experience.reward_mask)
        if kind == "hard":
            labels, mask = (labels > 0.5).to(labels), mask & (labels != 0.5)
    else:
        labels, mask = preference.preference_labels(
            experience.rewards, "hard" if kind == "hard" else "expected", mask=experience.reward_mask
        )
    if kind == "sampled":
        rows = _given(experience.rows, "dataset rows to draw labels for").cpu()[:, None]
        # One counter fewer than the sampler's, so the two never share a number.
        uniforms = counter_uniforms(config.seed, experience.step, rows, torch.arange(labels.shape[-1]))
        labels = preference.sample_labels(labels, uniforms.to(labels))
    return replace(experience.targets, labels=labels, label_mask=mask)


def _labels(experience: Experience) -> tuple[Tensor, Tensor]:
    """Labels (P, M) of all pairs and which pairs count, as `prepare` made them."""
    return _given(experience.targets.labels, "labels"), _given(experience.targets.label_mask, "a label mask")


def _groups_with_a_label(experience: Experience) -> Tensor:
    return _labels(experience)[1].any(-1)


def _online_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """Online DPO (P3O paper, appendix A.2) and online IPO (Calandriello et al. 2024, arXiv 2403.08635)."""
    labels, label_mask = _labels(experience)
    policy, ref = _sequence(policy_logprobs, experience), _sequence(experience.ref_logprobs, experience)
    old = _sequence(_old(experience), experience)
    clip = _online_section(config).clip
    loss = preference.online_dpo_loss if config.algorithm == "online_dpo" else preference.online_ipo_loss
    losses = loss(
        policy,
        ref,
        labels,
        label_mask,
        beta=config.beta,
        old_logprobs=old if clip else None,
        epsilon=config.epsilon if clip else None,
    )
    i, j = pair_indices(policy.shape[-1], policy.device)
    agrees = (((policy - ref)[..., i] > (policy - ref)[..., j]) == (labels > 0.5)).to(labels.dtype)
    metrics = {
        "preference_accuracy": masked_mean(agrees.where(labels != 0.5, 0.5), label_mask, -1),
        "logratio_abs": _mean_drift(policy, old, experience.reward_mask),
    }
    if clip:
        metrics["clip_ratio"] = pairwise.pairs_past_clip(
            policy.detach(), old, epsilon=config.epsilon, kind="joint", mask=experience.reward_mask
        )
    return LossOutput(losses=losses, mask=_groups_with_a_label(experience), metrics=metrics)


# ------------------------------------------------------------------------------------------------- offline DPO and IPO


def _whole_pairs(experience: Experience) -> Tensor:
    return experience.reward_mask.all(-1)


def _offline_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """DPO (Rafailov et al. 2023) and IPO (Azar et al. 2023) on pairs of which completion 0 was chosen."""
    logratio = _sequence(policy_logprobs - experience.ref_logprobs, experience)
    chosen, rejected = logratio.unbind(-1)
    mask = _whole_pairs(experience)
    dpo = config.algorithm == "dpo"
    loss = preference.dpo_loss if dpo else preference.ipo_loss
    smoothing = config.dpo.label_smoothing if dpo else config.ipo.label_smoothing
    margin = (chosen - rejected).detach()
    metrics = {
        "rewards/accuracies": (margin > 0).float(),
        "rewards/margins": config.beta * margin,
        "rewards/chosen": config.beta * chosen.detach(),
        "rewards/rejected": config.beta * rejected.detach(),
    }
    losses = loss(chosen, rejected, beta=config.beta, label_smoothing=smoothing, mask=mask)
    return LossOutput(losses=losses, mask=mask, metrics=metrics)


# ------------------------------------------------------------------------------------ token-wise, with a value function


def _token_credit(experience: Experience, config: TrainConfig, beta: float, gamma: float, lam: float) -> Targets:
    """Advantages by GAE and returns, of token rewards with the KL of the policy that sampled."""
    mask, old_values = _counted_tokens(experience), _given(experience.old_values, "old values")
    rewards = credit.token_rewards(experience.rewards, _old(experience) - experience.ref_logprobs, beta=beta, mask=mask)
    if config.algorithm == "ppo" and config.ppo.whiten_rewards:
        rewards = _whitened_everywhere(rewards, mask, shift_mean=False)
    advantages = credit.gae(rewards, old_values, mask, gamma=gamma, lam=lam)
    returns = credit.returns(advantages, old_values, mask)
    return replace(experience.targets, advantages=advantages, returns=returns)


def _whitened_everywhere(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Whitened over the tokens of all processes."""
    parts = distributed.gather_objects(x[mask].tolist())
    start = sum(len(part) for part in parts[: distributed.rank()])
    everything = torch.tensor([value for part in parts for value in part], dtype=x.dtype, device=x.device)
    if not len(everything):
        return torch.zeros_like(x)
    whitened = credit.whiten(everything, torch.ones_like(everything, dtype=torch.bool), shift_mean=shift_mean)
    return torch.zeros_like(x).masked_scatter(mask, whitened[start : start + int(mask.sum())])


def _credit(experience: Experience) -> tuple[Tensor, Tensor]:
    """Advantages and returns (P, K, T) as `prepare` made them."""
    targets = experience.targets
    return _given(targets.advantages, "advantages"), _given(targets.returns, "returns")


def _vpg_prepare(experience: Experience, config: TrainConfig, state: MethodState) -> Targets:
    return _token_credit(experience, config, state.beta, config.vpg.gamma, config.vpg.lam)


def _vpg_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """Vanilla policy gradient (P3O paper, Algorithm 1): the sum of -A l over a completion, the mean of value errors."""
    mask, (advantages, returns) = _counted_tokens(experience), _credit(experience)
    values = _given(policy_values, "values")
    policy = policy_gradient.reinforce_loss(policy_logprobs, advantages, mask=mask)
    value = masked_mean(policy_gradient.ppo_value_loss(values, values, returns, clip=None, mask=mask), mask, -1)
    metrics = {
        "value_loss": value.detach(),
        "logratio_abs": _sequence(policy_logprobs.detach() - _old(experience), experience).abs(),
    }
    losses = masked_sum(policy, mask, -1) + config.vpg.vf_coef * value
    return LossOutput(losses=losses, mask=experience.reward_mask, metrics=metrics)


def _ppo_prepare(experience: Experience, config: TrainConfig, state: MethodState) -> Targets:
    targets = _token_credit(experience, config, state.beta, config.ppo.gamma, config.ppo.lam)
    if not config.ppo.whiten_advantages:
        return targets
    advantages = _given(targets.advantages, "advantages")
    return replace(targets, advantages=_whitened_everywhere(advantages, _counted_tokens(experience)))


def _ppo_loss(
    policy_logprobs: Tensor, experience: Experience, config: TrainConfig, policy_values: Tensor | None = None
) -> LossOutput:
    """Token-wise PPO (Schulman et al. 2017; for language models Ziegler et al. 2019): the mean over tokens."""
    mask, old, (advantages, returns) = _counted_tokens(experience), _old(experience), _credit(experience)
    values, old_values = _given(policy_values, "values"), _given(experience.old_values, "old values")
    policy = policy_gradient.ppo_policy_loss(policy_logprobs, old, advantages, epsilon=config.epsilon, mask=mask)
    value = policy_gradient.ppo_value_loss(values, old_values, returns, clip=config.ppo.value_clip, mask=mask)
    stopped = policy_gradient.clipped(policy_logprobs, old, advantages, epsilon=config.epsilon, mask=mask)
    metrics = {
        "clip_ratio": stopped.float(),
        "value_loss": value.detach(),
        "logratio_abs": (policy_logprobs.detach() - old).abs(),
    }
    return LossOutput(losses=policy + config.ppo.vf_coef * value, mask=mask, metrics=metrics)


def _ppo_next_state(experience: Experience, config: TrainConfig, state: MethodState) -> MethodState:
    """The adaptive controller (Ziegler et al. 2019, section 2.2): beta follows the KL of whole completions."""
    if config.ppo.target_kl is None:
        return state
    parts = distributed.gather_objects(_old_logratio(experience).flatten().tolist())
    logratios = [logratio for part in parts for logratio in part]
    error = sum(logratios) / len(logratios) / config.ppo.target_kl - 1
    error = min(0.2, max(-0.2, error))
    return replace(state, beta=state.beta * (1 + error * len(logratios) / config.ppo.kl_horizon))


ALGORITHMS: dict[str, Algorithm] = {
    "p3o": Algorithm(counted=_groups_with_a_pair, loss=_p3o_loss),
    "ppo": Algorithm(
        counted=_counted_tokens,
        loss=_ppo_loss,
        prepare=_ppo_prepare,
        next_state=_ppo_next_state,
        prepares_from_old=True,
    ),
    "vpg": Algorithm(
        counted=lambda experience: experience.reward_mask,
        loss=_vpg_loss,
        prepare=_vpg_prepare,
        prepares_from_old=True,
    ),
    "reinforce": Algorithm(
        counted=lambda experience: experience.reward_mask,
        loss=_reinforce_loss,
        prepare=_reinforce_prepare,
        next_state=_reinforce_next_state,
    ),
    "rloo": Algorithm(counted=_compared_completions, loss=_rloo_loss),
    "grpo": Algorithm(counted=_compared_completions, loss=_grpo_loss),
    "rebel": Algorithm(counted=_groups_with_a_pair, loss=_rebel_loss),
    "raft": Algorithm(counted=_groups_with_a_pair, loss=_raft_loss),
    "copg": Algorithm(counted=_groups_with_a_pair, loss=_copg_loss),
    "online_dpo": Algorithm(counted=_groups_with_a_label, loss=_online_loss, prepare=_online_prepare),
    "online_ipo": Algorithm(counted=_groups_with_a_label, loss=_online_loss, prepare=_online_prepare),
    "dpo": Algorithm(counted=_whole_pairs, loss=_offline_loss),
    "ipo": Algorithm(counted=_whole_pairs, loss=_offline_loss),
}
