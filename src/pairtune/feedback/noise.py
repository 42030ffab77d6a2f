"""Normal noise on the rewards of training: how much a method loses where its reward is unsure of itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from pairtune.feedback.rewards import RewardSet, Scores
from pairtune.maths.random import counter_uniforms
from pairtune.types import Completions, Prompts

NOISE_STREAM = -2
"""Beside the streams of sampling, which are the steps and that of evaluation."""


class NoisyRewards:
    """Rewards with noise N(0, sigma^2) on each (Ahmadian et al. 2024, "Back to basics", section 5.3, on RLOO and RAFT).

    A completion's noise depends only on (seed, step, dataset row, completion): a resumed run draws the same, and so do
    two methods that are compared.
    """

    def __init__(self, rewards: RewardSet, sigma: float, seed: int) -> None:
        """`sigma` in units of reward."""
        self.rewards, self.sigma, self.seed = rewards, sigma, seed

    def score(
        self, prompts: Prompts, completions: Completions, texts: list[list[str]], *, trainer_state: Any
    ) -> Scores:
        """As `RewardSet.score`, whose errors it raises; the metrics of single reward functions stay without noise."""
        scores = self.rewards.score(prompts, completions, texts, trainer_state=trainer_state)
        completion = torch.arange(scores.rewards.shape[1])
        uniforms = counter_uniforms(
            self.seed, NOISE_STREAM, trainer_state.global_step, prompts.rows.cpu()[:, None], completion
        )
        noise = self.sigma * torch.special.ndtri(uniforms).float() * scores.reward_mask
        return replace(scores, rewards=scores.rewards + noise, raw_rewards=scores.raw_rewards + noise)

    def state_dict(self) -> dict[str, Any]:
        return self.rewards.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rewards.load_state_dict(state)
