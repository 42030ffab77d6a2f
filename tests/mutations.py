"""Small patches of the source, each with a test that must fail under it: a guard that no patch can trip guards nothing.

    python tests/mutations.py            every mutation
    python tests/mutations.py clip       those whose name, file or test contains "clip"

A mutation is applied to a temporary copy of `src`, never to the working tree, and its one test is run against the
copy. To add one, add a line to MUTATIONS: `old` must stand in the file exactly once, and the test must pass without
the patch.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
PASSED, FAILED = 0, 1
"""pytest's exit codes; anything else (a syntax error in a patch, an unknown test) is no verdict."""
NOT_THE_COPY = 100
"""The exit code where the tests imported a package other than the one in the copy."""


class Mutation(NamedTuple):
    name: str
    """What goes wrong, in a few words."""
    file: str
    """Below `src/pairtune`."""
    old: str
    new: str
    test: str
    """The pytest node below `tests` that must fail."""


PAIRWISE, KL, MASKING, STATISTICS = (f"maths/{name}.py" for name in ("pairwise", "kl", "masking", "statistics"))
TEST_PAIRWISE, TEST_KL, TEST_STATISTICS = (f"maths/test_{name}.py::test_" for name in ("pairwise", "kl", "statistics"))
ENUMERATION = "maths/test_enumeration.py::test_"
ALGORITHMS, EXPERIENCE, EVALUATION, RL = "algorithms.py", "experience.py", "evaluation.py", "stages/rl.py"
LOGPROBS, LOADING, OPTIMIZATION = "models/logprobs.py", "models/loading.py", "stages/optimization.py"
TEST_ALGORITHMS, TEST_EVALUATION, TEST_LOADING, TEST_LOGPROBS, TEST_TRAIN, TEST_DISTRIBUTED = (
    f"test_{name}.py::test_"
    for name in ("algorithms", "evaluation", "loading", "logprobs", "train", "distributed_train")
)
TEST_PROPERTIES, TEST_METHODS = "test_properties.py::test_", "test_methods.py::test_"

MUTATIONS = [
    # ----------------------------------------------------------------------------------------------- the losses: signs
    Mutation(
        "the joint loss is maximised",
        PAIRWISE,
        "    # The minimum over clipped and unclipped is the edge on the improving side and D everywhere else.\n"
        "    difference = torch.where(_past_joint_edge(pairs, epsilon), edge,"
        " pairs.policy_first - pairs.policy_second)\n"
        "    return masked_mean(-_joint",
        "    difference = torch.where(_past_joint_edge(pairs, epsilon), edge,"
        " pairs.policy_first - pairs.policy_second)\n"
        "    return masked_mean(_joint",
        ENUMERATION + "at_ratio_one_the_expected_gradient_is_exact",
    ),
    Mutation(
        "the separate loss is maximised",
        PAIRWISE,
        "masked_mean(-(first_term + second_term) / 2",
        "masked_mean((first_term + second_term) / 2",
        ENUMERATION + "at_ratio_one_the_expected_gradient_is_exact",
    ),
    Mutation(
        "the pairwise policy gradient is maximised",
        PAIRWISE,
        "masked_mean(-_joint_coefficient(pairs, max_ratio) * difference / 2, pairs.mask, -1)\n\n\ndef p3o_joint_loss",
        "masked_mean(_joint_coefficient(pairs, max_ratio) * difference / 2, pairs.mask, -1)\n\n\ndef p3o_joint_loss",
        ENUMERATION + "with_the_current_kl_it_is_exact_for_any_sampling_policy",
    ),
    Mutation(
        "the second separate term has the first one's sign",
        PAIRWISE,
        "_separate_term(-q, second, first,",
        "_separate_term(q, second, first,",
        TEST_PAIRWISE + "swapping_the_pair_changes_no_bit",
    ),
    Mutation(
        "rewards are subtracted the wrong way round",
        PAIRWISE,
        "rewards[..., i] - rewards[..., j]",
        "rewards[..., j] - rewards[..., i]",
        TEST_PAIRWISE + "equals_the_papers_equation",
    ),
    # ---------------------------------------------------------------------------------------------------- their halves
    Mutation(
        "the joint loss without its half, as the paper prints it",
        PAIRWISE,
        "pairs.policy_first - pairs.policy_second)\n"
        "    return masked_mean(-_joint_coefficient(pairs, max_ratio) * difference / 2,",
        "pairs.policy_first - pairs.policy_second)\n"
        "    return masked_mean(-_joint_coefficient(pairs, max_ratio) * difference,",
        ENUMERATION + "the_mean_over_pairs_is_leave_one_out",
    ),
    Mutation(
        "the separate loss without its half",
        PAIRWISE,
        "(first_term + second_term) / 2",
        "(first_term + second_term)",
        ENUMERATION + "the_mean_over_pairs_is_leave_one_out",
    ),
    Mutation(
        "the sum over pairs for their mean",
        MASKING,
        "    return masked_sum(x, mask, dim) / mask.expand_as(x).sum(dim).clamp(min=1)",
        "    return masked_sum(x, mask, dim)",
        ENUMERATION + "the_mean_over_pairs_is_leave_one_out",
    ),
    # -------------------------------------------------------------------------------------------------- stop-gradients
    Mutation(
        "the importance weight is differentiated",
        PAIRWISE,
        "    logratio = logratio.detach()\n    if max_ratio is None",
        "    if max_ratio is None",
        TEST_PAIRWISE + "gradient_is_the_equations_with_its_stop_gradient_factors_held",
    ),
    Mutation(
        "the reward is differentiated",
        PAIRWISE,
        "    rewards = rewards.detach()\n",
        "",
        TEST_PAIRWISE + "only_the_policy_gets_a_gradient",
    ),
    Mutation(
        "the old log-probabilities are differentiated",
        PAIRWISE,
        "old_logprobs.detach().to(",
        "old_logprobs.to(",
        TEST_PAIRWISE + "only_the_policy_gets_a_gradient",
    ),
    Mutation(
        "the separate ratio is not differentiated",
        PAIRWISE,
        "    exponent = logratio + _log_weight(other_logratio, max_ratio)",
        "    exponent = logratio.detach() + _log_weight(other_logratio, max_ratio)",
        TEST_PAIRWISE + "gradient_is_the_equations_with_its_stop_gradient_factors_held",
    ),
    Mutation(
        "the KL term of the reward is differentiated",
        KL,
        "beta * logratio.detach()",
        "beta * logratio",
        TEST_KL + "shaped_rewards_carry_no_gradient",
    ),
    # ---------------------------------------------------------------------------------------------- importance weights
    Mutation(
        "the joint weight has one ratio only",
        PAIRWISE,
        "_log_weight(pairs.logratio_first + pairs.logratio_second, max_ratio)",
        "_log_weight(pairs.logratio_first, max_ratio)",
        ENUMERATION + "with_the_current_kl_it_is_exact_for_any_sampling_policy",
    ),
    Mutation(
        "the separate weight is its own ratio",
        PAIRWISE,
        "exponent = logratio + _log_weight(other_logratio, max_ratio)",
        "exponent = logratio + _log_weight(logratio, max_ratio)",
        ENUMERATION + "with_the_current_kl_it_is_exact_for_any_sampling_policy",
    ),
    Mutation(
        "the separate weight clamps the product of both ratios",
        PAIRWISE,
        "exponent = logratio + _log_weight(other_logratio, max_ratio)",
        "exponent = _log_weight(logratio + other_logratio, max_ratio) - logratio.detach() + logratio",
        TEST_PAIRWISE + "the_weight_is_clamped",
    ),
    Mutation(
        "max_ratio does nothing",
        PAIRWISE,
        "return logratio.clamp(-math.log(max_ratio), math.log(max_ratio))",
        "return logratio",
        TEST_PAIRWISE + "the_weight_is_clamped",
    ),
    Mutation(
        "max_ratio clamps from above only",
        PAIRWISE,
        "logratio.clamp(-math.log(max_ratio), math.log(max_ratio))",
        "logratio.clamp(max=math.log(max_ratio))",
        TEST_PAIRWISE + "the_weight_is_clamped[-1]",
    ),
    Mutation(
        "an infinite weight meets equal rewards in the joint loss",
        PAIRWISE,
        "    return torch.where(q == 0, q, q * weight)",
        "    return q * weight",
        TEST_PAIRWISE + "equal_rewards_give_exactly_zero",
    ),
    Mutation(
        "an infinite ratio meets equal rewards in the separate loss",
        PAIRWISE,
        "q * torch.where(q == 0, 0, exponent).exp()",
        "q * exponent.exp()",
        TEST_PAIRWISE + "equal_rewards_give_exactly_zero",
    ),
    Mutation(
        "the ratio is formed before it is clipped",
        PAIRWISE,
        "    low, high = _log_ratio_interval(epsilon)\n    edge = torch.full_like",
        "    logratio = logratio.exp().log()\n    low, high = _log_ratio_interval(epsilon)\n    edge = torch.full_like",
        TEST_PAIRWISE + "log_ratios_beyond_float32_never_become_nan",
    ),
    # -------------------------------------------------------------------------------------------------------- clipping
    Mutation(
        "the joint clip stops the wrong side",
        PAIRWISE,
        "pairs.reward_difference.sign() * _drift(pairs) > epsilon",
        "-pairs.reward_difference.sign() * _drift(pairs) > epsilon",
        TEST_PAIRWISE + "joint_clips_the_difference_on_the_improving_side_only",
    ),
    Mutation(
        "the joint clip stops both sides",
        PAIRWISE,
        "pairs.reward_difference.sign() * _drift(pairs) > epsilon",
        "_drift(pairs).abs() > epsilon",
        TEST_PAIRWISE + "joint_clips_the_difference_on_the_improving_side_only",
    ),
    Mutation(
        "the joint clip takes in its edge",
        PAIRWISE,
        "pairs.reward_difference.sign() * _drift(pairs) > epsilon",
        "pairs.reward_difference.sign() * _drift(pairs) >= epsilon",
        TEST_PAIRWISE + "joint_clips_the_difference_on_the_improving_side_only",
    ),
    Mutation(
        "the joint clip bounds the common drift",
        PAIRWISE,
        "    return pairs.logratio_first - pairs.logratio_second\n\n",
        "    return pairs.logratio_first + pairs.logratio_second\n\n",
        TEST_PAIRWISE + "joint_clips_the_difference_on_the_improving_side_only",
    ),
    Mutation(
        "the joint clip decides on rounded sums",
        PAIRWISE,
        "    return pairs.logratio_first - pairs.logratio_second\n\n",
        "    return (pairs.policy_first - pairs.policy_second) - (pairs.old_first - pairs.old_second)\n\n",
        TEST_PAIRWISE + "the_joint_clip_decides_on_log_ratios_not_on_sums",
    ),
    Mutation(
        "the clipped joint value stands at the other edge",
        PAIRWISE,
        "+ epsilon * pairs.reward_difference.sign()",
        "- epsilon * pairs.reward_difference.sign()",
        TEST_PAIRWISE + "equals_the_papers_equation",
    ),
    Mutation(
        "the separate clip forgets the falling side",
        PAIRWISE,
        "((q > 0) & (logratio > high)) | ((q < 0) & (logratio < low))",
        "(q > 0) & (logratio > high)",
        TEST_PAIRWISE + "separate_clips_each_ratio_on_the_improving_side_only",
    ),
    Mutation(
        "the separate clip is an interval of log-ratios",
        PAIRWISE,
        "    return (math.log1p(-epsilon) if epsilon < 1 else -math.inf), math.log1p(epsilon)",
        "    return -epsilon, epsilon",
        TEST_PAIRWISE + "separate_clips_each_ratio_on_the_improving_side_only",
    ),
    Mutation(
        "the logged share looks at one side only",
        PAIRWISE,
        "_drift(pairs).abs() > epsilon",
        "_drift(pairs) > epsilon",
        TEST_PAIRWISE + "shares_past_the_clip_and_clipped",
    ),
    # ----------------------------------------------------------------------------------------------------------- masks
    Mutation(
        "a pair counts where one of it does",
        PAIRWISE,
        "mask[..., i] & mask[..., j]",
        "mask[..., i] | mask[..., j]",
        TEST_PAIRWISE + "masked_completions_change_nothing",
    ),
    Mutation(
        "the rewards of masked completions are read",
        PAIRWISE,
        "torch.where(pair_mask, rewards[..., i] - rewards[..., j], 0)",
        "(rewards[..., i] - rewards[..., j])",
        TEST_PAIRWISE + "masked_completions_change_nothing",
    ),
    Mutation(
        "a mask multiplies",
        MASKING,
        "torch.where(mask, x, 0).sum(dim)",
        "(x * mask).sum(dim)",
        "maths/test_masking.py::test_what_does_not_count_reaches_neither_value_nor_gradient",
    ),
    Mutation(
        "a mean over nothing",
        MASKING,
        ".sum(dim).clamp(min=1)",
        ".sum(dim)",
        TEST_PAIRWISE + "a_group_without_a_pair_gives_zero",
    ),
    Mutation(
        "pairs with oneself",
        MASKING,
        "offset=1",
        "offset=0",
        "maths/test_masking.py::test_pairs_are_all_pairs_once",
    ),
    # -------------------------------------------------------------------------------------------- rewards and their KL
    Mutation(
        "rewards are differenced after a cast",
        PAIRWISE,
        "    rewards = rewards.detach()\n",
        "    rewards = rewards.detach().to(policy_logprobs.dtype)\n",
        TEST_PAIRWISE + "rewards_are_subtracted_in_their_own_precision",
    ),
    Mutation(
        "rewards are differenced after the KL term",
        KL,
        "rewards - rewards.gather(-1, first) - beta * logratio.detach()",
        "rewards - beta * logratio.detach() - rewards.gather(-1, first)",
        TEST_PAIRWISE + "a_shift_of_a_prompts_rewards_changes_no_bit",
    ),
    Mutation(
        "rewards count from one that does not count",
        KL,
        "mask.int().argmax(-1, keepdim=True)",
        "mask.int().argmin(-1, keepdim=True)",
        TEST_KL + "shaped_rewards_count_from_the_first_that_counts_and_are_zero_elsewhere",
    ),
    Mutation(
        "drift from the reference is rewarded",
        KL,
        "- beta * logratio.detach()",
        "+ beta * logratio.detach()",
        ENUMERATION + "at_ratio_one_the_expected_gradient_is_exact",
    ),
    # ------------------------------------------------------------------------------------------------------ estimators
    Mutation(
        "k3 with the sign of its exponent flipped",
        KL,
        "torch.expm1(-logratio) + logratio",
        "torch.expm1(logratio) - logratio",
        TEST_KL + "k1_and_k3_are_unbiased_and_k2_is_not",
    ),
    Mutation(
        "k2 without its half",
        KL,
        "logratio.square() / 2",
        "logratio.square()",
        TEST_KL + "k2_agrees_to_second_order",
    ),
    Mutation(
        "the KL of the other direction",
        KL,
        "policy_logprobs.exp() * torch.where(counts",
        "ref_logprobs.exp() * torch.where(counts",
        TEST_KL + "rao_blackwellised_kl_and_entropy_equal_torchs",
    ),
    Mutation(
        "0 * log 0 in the KL",
        KL,
        "torch.where(counts, policy_logprobs - ref_logprobs, 0)",
        "(policy_logprobs - ref_logprobs)",
        TEST_KL + "tokens_that_the_policy_never_samples_add_nothing",
    ),
    Mutation(
        "0 * log 0 in the entropy",
        KL,
        "torch.where(logprobs > -torch.inf, logprobs, 0)",
        "logprobs",
        TEST_KL + "tokens_that_the_policy_never_samples_add_nothing",
    ),
    Mutation(
        "log-probabilities summed in bfloat16",
        KL,
        "token_logprobs.to(torch.promote_types(token_logprobs.dtype, torch.float32))",
        "token_logprobs",
        TEST_KL + "sequence_logprobs_sum_in_float32_at_least",
    ),
    # ------------------------------------------------------------------------------------------------------ statistics
    Mutation(
        "a bootstrap interval a tenth too narrow",
        STATISTICS,
        "sums[:, 0] / sums[:, 1], ends)",
        "sums[:, 0] / sums[:, 1] / 1.1 + estimate / 11, ends)",
        TEST_STATISTICS + "the_interval_of_a_mean_has_the_width_of_the_standard_error",
    ),
    Mutation(
        "a difference that is not paired",
        STATISTICS,
        "bootstrap_mean(a - b,",
        "bootstrap_mean(a - b.flip(0),",
        TEST_STATISTICS + "a_difference_is_paired_by_prompt",
    ),
    Mutation(
        "a mean of ratios",
        STATISTICS,
        "(total[0] / total[1]).item()",
        "(columns[:, 0] / columns[:, 1]).mean().item()",
        TEST_STATISTICS + "a_ratio_is_that_of_the_sums",
    ),
    Mutation(
        "the jackknife's variance without its factor P - 1",
        STATISTICS,
        "((num_prompts - 1) * values.var(correction=0)).sqrt()",
        "values.var(correction=0).sqrt()",
        TEST_STATISTICS + "the_jackknife_of_a_mean_is_its_standard_error",
    ),
    Mutation(
        "a prompt left out takes all its n-grams along",
        STATISTICS,
        "first[first == last]",
        "first",
        TEST_STATISTICS + "the_interval_of_distinct_n_leaves_each_prompt_out_once",
    ),
    Mutation(
        "n-grams with padding in them",
        STATISTICS,
        "(windows >= 0).all(-1)",
        "(windows >= 0).any(-1)",
        TEST_STATISTICS + "distinct_n_by_hand",
    ),
    # -------------------------------------------------------------------------------------------------- the algorithms
    Mutation(
        "the KL of the wrong policy in the reward",
        ALGORITHMS,
        'config.p3o.kl_at == "current"',
        'config.p3o.kl_at != "current"',
        TEST_ALGORITHMS + "p3o_is_its_pure_function",
    ),
    Mutation(
        "the KL rewarded",
        ALGORITHMS,
        "_sequence(kl_logprobs - experience.ref_logprobs, experience)",
        "_sequence(experience.ref_logprobs - kl_logprobs, experience)",
        TEST_ALGORITHMS + "at_ratio_one_the_gradient_is_the_exact_one",
    ),
    Mutation(
        "completions without feedback in the joint loss",
        ALGORITHMS,
        "p3o_joint_loss(policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio, mask=mask)",
        "p3o_joint_loss(policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio)",
        TEST_ALGORITHMS + "completions_without_feedback_do_not_count[joint]",
    ),
    Mutation(
        "no clamp in the separate loss",
        ALGORITHMS,
        "            policy, old, rewards, epsilon=config.epsilon, max_ratio=max_ratio, mask=mask",
        "            policy, old, rewards, epsilon=config.epsilon, mask=mask",
        TEST_ALGORITHMS + "p3o_is_its_pure_function",
    ),
    Mutation(
        "a group of one in the denominator",
        ALGORITHMS,
        "experience.reward_mask.sum(-1) >= 2",
        "experience.reward_mask.sum(-1) >= 1",
        TEST_ALGORITHMS + "completions_without_feedback_do_not_count[joint]",
    ),
    Mutation(
        "padding in a sequence's log-probability",
        ALGORITHMS,
        "masked_sum(token_values, experience.completions.completion_mask, -1)",
        "token_values.sum(-1)",
        TEST_ALGORITHMS + "wider_padding_changes_no_bit[joint]",
    ),
    Mutation(
        "the joint clip ratio reported for the separate clip",
        ALGORITHMS,
        '= "separate" if clip == "separate" else "joint"',
        '= "joint"',
        TEST_ALGORITHMS + "the_clip_ratio_counts_pairs_past_the_edge[separate]",
    ),
    # ------------------------------------------------------------------------------------------------ log-probabilities
    Mutation(
        "positions that count the padding of the prompt",
        LOGPROBS,
        "within_completion = prompt_length[:, None, None]",
        "within_completion = torch.full_like(prompt_length, prompt_width)[:, None, None]",
        TEST_LOGPROBS + "logprobs_equal_a_plain_forward_pass[True-2-gpt2]",
    ),
    Mutation(
        "a completion that sees its neighbour",
        LOGPROBS,
        "((key == 0) | (key == query)) & causal",
        "(query >= 0) & causal",
        TEST_LOGPROBS + "which_architectures_share_a_prefix",
    ),
    Mutation(
        "a first token predicted by the completion before it",
        LOGPROBS,
        "    before[:, 0] = prompt_width - 1\n",
        "",
        TEST_LOGPROBS + "logprobs_equal_a_plain_forward_pass[True-2-llama]",
    ),
    Mutation(
        "rows that leave out two tokens of a completion",
        LOGPROBS,
        "F.pad(completion_mask[:, :, 1:], (0, 1))",
        "F.pad(completion_mask[:, :, 2:], (0, 2))",
        TEST_LOGPROBS + "logprobs_equal_a_plain_forward_pass[True-2-llama]",
    ),
    Mutation(
        "a reward model that reads at the last token but one",
        "stages/reward.py",
        "layout = make_layout(batch.completions, shared=self.backbone.shared, with_last=True)",
        "layout = make_layout(batch.completions, shared=self.backbone.shared)",
        "test_reward_stage.py::test_the_gradient_is_that_of_a_plain_loop[pairs]",
    ),
    Mutation(
        "an opening without a gradient",
        LOGPROBS,
        "    opening = states(slice(0, 1), slice(0, layout.opening))\n",
        "    with torch.no_grad():\n        opening = states(slice(0, 1), slice(0, layout.opening))\n",
        TEST_LOGPROBS + "with_the_opening_once_the_gradient_is_the_same[gpt2]",
    ),
    Mutation(
        "an opening that takes all of the shortest prompt",
        "models/opening.py",
        "(columns < lengths.min() - 1)",
        "(columns < lengths.min())",
        TEST_LOGPROBS + "the_length_of_an_opening",
    ),
    Mutation(
        "an opening seen twice while sampling",
        "models/sampler.py",
        "mask = mask & (positions >= length)",
        "mask = mask.clone()",
        "test_sampler.py::test_with_the_opening_once_logprobs_equal_a_plain_forward_pass[llama-12]",
    ),
    Mutation(
        "a kept chunk without the token itself",
        LOGPROBS,
        "probs.scatter_add_(1, targets[:, None], -mass[:, None])",
        "probs",
        TEST_LOGPROBS + "chunked_gradient[100-True-True]",
    ),
    Mutation(
        "the temperature left out of the backward pass",
        LOGPROBS,
        "scale = -grad[rows, None] / ctx.temperature",
        "scale = -grad[rows, None]",
        TEST_LOGPROBS + "chunked_gradient",
    ),
    Mutation(
        "the head's gradient of the last chunk alone",
        LOGPROBS,
        "weight_grad.addmm_(error.T, (hidden[rows] * scale).to(hidden.dtype))",
        "torch.mm(error.T, hidden[rows] * scale, out=weight_grad)",
        TEST_LOGPROBS + "chunked_gradient",
    ),
    Mutation(
        "a reference with the adapter on",
        LOGPROBS,
        "        with self.context():\n            if features",
        "        with nullcontext():\n            if features",
        TEST_LOADING + "the_reference_is_the_policy_at_step_0_and_stays[lora-llama-float32]",
    ),
    # --------------------------------------------------------------------------------------------------------- loading
    Mutation(
        "a reference that is the policy",
        LOADING,
        "twin = copy.deepcopy(model).requires_grad_(False)",
        "twin = model",
        TEST_LOADING + "the_reference_is_the_policy_at_step_0_and_stays[full-llama-float32]",
    ),
    Mutation(
        "a final norm shared with the reference",
        LOGPROBS,
        "norm=copy.deepcopy(top.norm).requires_grad_(False)",
        "norm=top.norm",
        TEST_LOADING + "the_reference_is_the_policy_at_step_0_and_stays[layers-llama-float32]",
    ),
    Mutation(
        "a final norm that is not trained",
        LOADING,
        "        norm.requires_grad_(True)",
        "        norm.requires_grad_(False)",
        TEST_LOADING + "trainable_layers_moves_the_last_layers_and_the_final_norm",
    ),
    Mutation(
        "only the last micro-batch's gradient",
        LOADING,
        "master.grad.add_(parameter.grad)",
        "master.grad = parameter.grad.float()",
        TEST_LOADING + "micro_batches_are_accumulated_in_float32",
    ),
    Mutation(
        "micro-batches added up in bfloat16",
        LOADING,
        "        parameter.register_post_accumulate_grad_hook(_accumulate_into(master))",
        "        parameter.register_hook(lambda g: None)",
        TEST_LOADING + "micro_batches_are_accumulated_in_float32",
    ),
    Mutation(
        "masters that never reach the module",
        LOADING,
        "                parameter.copy_(master)",
        "                pass",
        TEST_LOADING + "masters_keep_what_rounding_loses",
    ),
    Mutation(
        "dropout left on",
        LOADING,
        "                setattr(module, attribute, 0.0)",
        "                pass",
        TEST_LOADING + "dropout_is_off_in_training_mode_too[llama-dropout0]",
    ),
    # -------------------------------------------------------------------------------------------------------- the loop
    Mutation(
        "old log-probabilities that follow the policy",
        RL,
        "if iteration == 0 and yields_old:",
        "if yields_old:",
        TEST_TRAIN + "a_run_learns_and_leaves_what_it_should[full]",
    ),
    Mutation(
        "a denominator of the whole batch",
        RL,
        "algorithm.counted(experience)[minibatch].sum()",
        "algorithm.counted(experience).sum()",
        TEST_TRAIN + "minibatches_add_up_to_the_batch",
    ),
    Mutation(
        "gradients left over from the last update",
        OPTIMIZATION,
        "    optimizer.zero_grad(set_to_none=True)\n",
        "",
        TEST_TRAIN + "a_run_is_the_plain_loop",
    ),
    Mutation(
        "an update that is not published",
        OPTIMIZATION,
        "    masters.publish()\n",
        "",
        TEST_TRAIN + "the_first_ratio_is_1_and_the_first_kl_0[llama-bfloat16-layers]",
    ),
    Mutation(
        "gradients that are not clipped",
        OPTIMIZATION,
        "    if max_grad_norm is not None:",
        "    if False:",
        TEST_TRAIN + "a_run_is_the_plain_loop",
    ),
    Mutation(
        "a learning rate without its schedule",
        RL,
        "config.learning_rate * learning_rate_factor(config, progress.num_updates, num_updates)",
        "config.learning_rate",
        TEST_TRAIN + "a_run_is_the_plain_loop",
    ),
    Mutation(
        "weight decay on vectors",
        OPTIMIZATION,
        'if m.ndim < 2], "weight_decay": 0.0}',
        'if m.ndim < 2], "weight_decay": config.weight_decay}',
        TEST_TRAIN + "a_run_is_the_plain_loop",
    ),
    Mutation(
        "inexactness that nobody is told of",
        RL,
        "        if gap > 0:",
        "        if gap > 9:",
        TEST_TRAIN + "a_reference_with_other_weights_is_noticed",
    ),
    Mutation(
        "a reference cut otherwise than the policy",
        EXPERIENCE,
        "cuts = first_pass(config, len(prompts), policy.device)",
        "cuts = [torch.arange(len(prompts), device=policy.device)]",
        TEST_TRAIN + "the_reference_is_cut_as_the_policy_is",
    ),
    Mutation(
        "a resumed optimizer that counts from 0",
        OPTIMIZATION,
        "torch.tensor(float(num_updates), device=master.device)",
        "torch.tensor(0.0, device=master.device)",
        TEST_TRAIN + "a_resumed_run_equals_the_uninterrupted_one[layers, cosine, decay]",
    ),
    Mutation(
        "a resumed run with a fresh running scale",
        RL,
        '        feedback.load_state_dict(state["rewards"])\n',
        "        pass\n",
        TEST_TRAIN + "a_resumed_run_equals_the_uninterrupted_one[minibatches, running scale]",
    ),
    Mutation(
        "a full GPU after which a step's rewards count twice",
        "stages/loop.py",
        "                take_back()\n                save()",
        "                save()",
        TEST_TRAIN + "a_full_gpu_is_a_sentence_and_what_was_done_is_kept",
    ),
    Mutation(
        "a frontier of straight lines over the KL",
        "evidence/frontier.py",
        "_crossing(_square_root(kls), rewards, _root(kl))",
        "_crossing(kls, rewards, kl)",
        "test_frontier.py::test_a_run_that_moves_far_between_evaluations_is_not_set_back",
    ),
    Mutation(
        "no evaluation where max_minutes ends a run just saved",
        "stages/loop.py",
        "        if progress.evaluated_step < progress.step:",
        "        if progress.evaluated_step < progress.step > self._saved_step:",
        TEST_TRAIN + "max_minutes_ends_with_a_checkpoint_and_an_evaluation[1]",
    ),
    Mutation(
        "each process with a gradient of its own",
        OPTIMIZATION,
        "    distributed.sum_gradients(gradients)\n",
        "",
        TEST_DISTRIBUTED + "two_processes_train_what_one_trains[none]",
    ),
    Mutation(
        "a signal that only one process heeds",
        "runs/signals.py",
        "self.agreed = num_requested > 0\n        return self.agreed or num_late > 0",
        "self.agreed = self.requested\n        return num_requested > 0 or num_late > 0",
        TEST_DISTRIBUTED + "a_signal_to_one_process_stops_all_and_the_run_goes_on",
    ),
    # ------------------------------------------------------------------------------------------------------ evaluation
    Mutation(
        "a mean of the KL a token over prompts",
        EVALUATION,
        'bootstrap_ratio(per_prompt["kl"], length)',
        'bootstrap_mean(per_prompt["kl"] / length)',
        TEST_EVALUATION + "every_metric_is_what_it_says[law0]",
    ),
    Mutation(
        "completions without a reward in its mean",
        EVALUATION,
        '(table["reward"] * table["counts"]).sum(1), table["counts"].sum(1)',
        'table["reward"].sum(1), torch.ones_like(table["counts"]).sum(1)',
        TEST_EVALUATION + "every_metric_is_what_it_says[law0]",
    ),
    Mutation(
        "the KL of the law before truncation",
        EVALUATION,
        "            top_p=config.top_p,\n",
        "",
        TEST_EVALUATION + "every_metric_is_what_it_says[law2]",
    ),
    Mutation(
        "evaluations that draw other numbers at every step",
        EVALUATION,
        "stream=EVALUATION_STREAM",
        "stream=step",
        TEST_EVALUATION + "every_metric_is_what_it_says[law0]",
    ),
    # -------------------------------------------------------------------------------------------- the rivals of P3O
    Mutation(
        "a denominator of all prompts of the minibatch",
        RL,
        "counted = algorithm.counted(experience)[minibatch].sum()",
        "counted = torch.tensor(algorithm.counted(experience)[minibatch].numel())",
        TEST_TRAIN + "the_loss_is_a_mean_over_what_counts",
    ),
    Mutation(
        "a leave-one-out that leaves none out",
        "maths/advantages.py",
        "return differences / (num_counted - 1).clamp(min=1)",
        "return differences / num_counted.clamp(min=1)",
        TEST_PROPERTIES + "the_multiple_of_p3o_at_ratio_one[rloo-1]",
    ),
    Mutation(
        "CoPG with half the factor",
        "maths/contrastive.py",
        "(reward - beta * logratio).square() / (2 * beta)",
        "(reward - beta * logratio).square() / (4 * beta)",
        TEST_PROPERTIES + "the_multiple_of_p3o_at_ratio_one[copg-2]",
    ),
    Mutation(
        "a baseline that is not subtracted",
        ALGORITHMS,
        "_trajectory_rewards(experience, config.beta) - experience.targets.baseline",
        "_trajectory_rewards(experience, config.beta)",
        TEST_PROPERTIES + "the_baseline_is_subtracted_from_every_reward",
    ),
    Mutation(
        "GRPO by the sum of tokens",
        ALGORITHMS,
        "losses=masked_mean(losses, completion_mask, -1)",
        "losses=masked_sum(losses, completion_mask, -1)",
        TEST_PROPERTIES + "grpo_takes_the_mean_over_the_tokens_of_a_completion",
    ),
    Mutation(
        "an adaptive controller without its clip",
        ALGORITHMS,
        "    error = min(0.2, max(-0.2, error))\n",
        "",
        TEST_PROPERTIES + "the_adaptive_controller[90.0-1.02]",
    ),
    Mutation(
        "advantages that are never whitened",
        ALGORITHMS,
        "    if not config.ppo.whiten_advantages:",
        "    if True:",
        TEST_PROPERTIES + "whitened_advantages_have_mean_0_and_variance_1",
    ),
    Mutation(
        "labels drawn by the place in the batch",
        ALGORITHMS,
        'rows = _given(experience.rows, "dataset rows to draw labels for").cpu()[:, None]',
        "rows = torch.arange(len(experience.rewards))[:, None]",
        TEST_PROPERTIES + "sampled_labels_are_drawn_once_for_a_prompt",
    ),
    Mutation(
        "replayed batches against the policy as it is",
        RL,
        "    is_fresh = experience.old_logprobs is None\n",
        "    is_fresh = True\n",
        TEST_METHODS + "earlier_batches_are_learned_from_again[p3o]",
    ),
    Mutation(
        "a resumed run without what its method carries",
        RL,
        'average=MovingAverage(**method["average"])',
        "average=MovingAverage()",
        TEST_METHODS + "a_resumed_run_of_any_method_equals_the_uninterrupted_one[reinforce]",
    ),
    Mutation(
        "a value function that is not fitted",
        ALGORITHMS,
        "losses = masked_sum(policy, mask, -1) + config.vpg.vf_coef * value",
        "losses = masked_sum(policy, mask, -1)",
        TEST_METHODS + "the_value_function_learns[vpg-way0]",
    ),
]


def defects() -> list[str]:
    """What is wrong with the list itself: patches that no longer fit the source, tests that are not there."""
    found = []
    for mutation in MUTATIONS:
        source = (SOURCE / "pairtune" / mutation.file).read_text(encoding="utf-8")
        if (count := source.count(mutation.old)) != 1:
            found.append(f"{mutation.name}: its old text stands {count} times in {mutation.file}, not once")
        if mutation.old == mutation.new:
            found.append(f"{mutation.name}: changes nothing")
        path, _, test = mutation.test.partition("::")
        if f"def {test.partition('[')[0]}(" not in (ROOT / "tests" / path).read_text(encoding="utf-8"):
            found.append(f"{mutation.name}: {path} has no {test}")
    return found


def run_tests(source: Path, tests: list[str]) -> tuple[int, str]:
    """pytest's exit code and output for these tests against the package in `source`, in a process of their own."""
    # A fork server has imported torch once; a fresh interpreter would take longer to do that than most tests to run.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.testing", "pytest", "hypothesis"])
    with tempfile.NamedTemporaryFile() as log:
        process = context.Process(target=_pytest, args=(str(source), tests, log.name))
        process.start()
        process.join()
        return process.exitcode or 0, Path(log.name).read_text(encoding="utf-8")


def _pytest(source: str, tests: list[str], log: str) -> None:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.path.insert(0, source)
    # The configured pythonpath would put the working tree before the copy.
    options = ["-q", "-x", "-m", "", "--no-header", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "pythonpath="]
    code = pytest.main([*options, *(f"tests/{test}" for test in tests)])
    package = sys.modules.get("pairtune")
    imported = Path(str(package.__file__)) if package else None
    if code in (PASSED, FAILED) and (imported is None or not imported.is_relative_to(source)):
        print(f"the tests used {imported}, not the package in {source}", flush=True)
        code = NOT_THE_COPY
    sys.exit(code)


def survives(mutation: Mutation) -> str | None:
    """None where the mutation's test fails as it must, else what happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        file = source / "pairtune" / mutation.file
        file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
        code, output = run_tests(source, [mutation.test])
    if code == FAILED:
        return None
    if code == PASSED:
        return f"{mutation.name}: {mutation.test} passes all the same"
    return f"{mutation.name}: pytest gave no verdict (exit code {code})\n{output}"


def main(words: list[str]) -> int:
    chosen = [m for m in MUTATIONS if all(word in f"{m.name} {m.file} {m.test}" for word in words)]
    problems = defects()
    if not problems:
        code, output = run_tests(SOURCE, sorted({mutation.test for mutation in chosen}))
        if code != PASSED:
            problems.append(f"the tests fail without any mutation\n{output}")
    for mutation in chosen if not problems else []:
        problem = survives(mutation)
        print("SURVIVED" if problem else "killed  ", mutation.name, flush=True)
        problems += [problem] if problem else []
    print(*problems, f"{len(chosen)} mutations, {len(problems)} problems", sep="\n")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
