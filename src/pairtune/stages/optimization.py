"""What the three stages share: how gradients become a move of the weights, and what of it a checkpoint keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pairtune.config import OptimizerWords
from pairtune.errors import PairtuneError
from pairtune.models.loading import MasterWeights
from pairtune.runs import distributed

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves in memory."""

    output_dir: Path
    steps: int
    """Steps done, over all resumes."""
    finished: bool
    """False where a signal ended the run early; it can be resumed."""
    model: Any
    tokenizer: Any


def make_optimizer(config: OptimizerWords, masters: MasterWeights) -> torch.optim.AdamW:
    """AdamW on the float32 masters. Weight decay leaves vectors (norms, biases) alone."""
    groups = [
        {"params": [m for m in masters.masters if m.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [m for m in masters.masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def learning_rate_factor(config: OptimizerWords, update: int, num_updates: int) -> float:
    """The share of `learning_rate` at an optimizer update (from 0) of a run of `num_updates`."""
    if update < config.warmup_steps and config.lr_scheduler_type != "constant":
        return (update + 1) / (config.warmup_steps + 1)
    if config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return 1.0
    done = (update - config.warmup_steps) / max(1, num_updates - config.warmup_steps)
    if config.lr_scheduler_type == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def apply_gradients(
    masters: MasterWeights,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    max_grad_norm: float | None,
    step: int,
    mend: str,
) -> float:
    """One optimizer move from the gradients accumulated on the masters; returns their norm before clipping.

    `step` (from 1) and `mend` are for the PairtuneError that a gradient which is not finite raises, before anything
    moves.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    gradients = masters.gradients()
    distributed.sum_gradients(gradients)
    norm = torch.nn.utils.get_total_norm(gradients)
    if not torch.isfinite(norm):
        raise PairtuneError(
            f"the gradient of step {step} is not finite ({norm.item()}); {mend}, and go on from the last checkpoint "
            "with --resume."
        )
    if max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(masters.masters, max_grad_norm, norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    masters.publish()
    return norm.item()


def state_tensors(masters: MasterWeights, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Masters and moments by name, for a checkpoint."""
    tensors = {}
    for name, master in zip(masters.names, masters.masters, strict=True):
        tensors[f"master.{name}"] = master.detach()
        for moment in MOMENTS:
            if moment in optimizer.state.get(master, {}):
                tensors[f"{moment}.{name}"] = optimizer.state[master][moment]
    return tensors


def load_state_tensors(
    masters: MasterWeights, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], *, num_updates: int
) -> None:
    """The way back, after `num_updates` updates."""
    masters.load({name: tensors[f"master.{name}"] for name in masters.names})
    for name, master in zip(masters.names, masters.masters, strict=True):
        if f"{MOMENTS[0]}.{name}" in tensors:
            moments = {moment: tensors[f"{moment}.{name}"].to(master.device) for moment in MOMENTS}
            count = torch.tensor(float(num_updates), device=master.device)
            optimizer.state[master] = {"step": count, **moments}
