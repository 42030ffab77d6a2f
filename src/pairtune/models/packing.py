"""Linear layers over weights that oneDNN has rearranged once, for the many skinny products of sampling on a CPU.

A decode step multiplies a few rows, one for each completion, by every weight of the model. A plain product rearranges
the weight for the processor's caches each time; here that is done once for all the steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# What packing costs and gains, measured on two cores of an EPYC with AVX2 for products of 24 rows: 2 to 3 ns a weight
# once, up to 8 where its pages are new, and each pass 0.6 ns a weight of an output head (28M), 0.4 of a matrix of 4M,
# 0.15 of one of 0.3M to 0.9M, 0.1 of smaller ones.
LARGE = 2**21
"""Weights from which a layer is packed for MIN_STEPS passes."""

MIN_STEPS = 8

SMALL = 2**18
"""Weights from which a layer is packed for MANY_STEPS passes; smaller ones never are."""

MANY_STEPS = 16

MAX_WEIGHTS = 2**30
"""Weights in all, 4 GiB: above it nothing is packed, since a second copy of them may not fit in memory."""


@contextmanager
def packed_linears(model: nn.Module, *, num_rows: int, num_steps: int) -> Iterator[None]:
    """Within the block, float32 `nn.Linear` layers of a model on a CPU compute from packed copies where that pays.

    num_rows: rows of the products to come; fewer or more are as right, if not always as fast.
    num_steps: passes to come, at most.

    For a block without gradients in which no weight changes. Outputs equal the plain ones up to rounding. The packed
    copies take their memory until the block ends.
    """
    layers: list[Any] = [layer for layer in model.modules() if _can_pack(layer) and _repays(layer, num_steps)]
    if not _has_operators() or sum(layer.weight.numel() for layer in layers) > MAX_WEIGHTS:
        layers = []
    try:
        for layer in layers:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), num_rows)
            # Set on the instance: the layer's own hooks still run around it.
            layer.forward = partial(_packed_linear, weight, layer.bias)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _has_operators() -> bool:
    """Whether this torch has oneDNN's operators, which are not public, and nobody has switched oneDNN off."""
    named = hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return named and torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def _can_pack(layer: nn.Module) -> bool:
    """A linear layer in float32 on the CPU, not a subclass, that nobody has given another forward.

    Float32 alone: oneDNN takes no float64, and bfloat16 only on processors that compute in it. Under autocast a plain
    product would be in another precision. A pre-hook may put other weights in place (`frozen_copy` does).
    """
    return (
        type(layer) is nn.Linear
        and layer.weight.dtype == torch.float32
        and layer.weight.device.type == "cpu"
        and "forward" not in vars(layer)
        and not layer._forward_pre_hooks
        and not torch.is_autocast_enabled("cpu")
    )


def _repays(layer: Any, num_steps: int) -> bool:
    num_weights: int = layer.weight.numel()
    return num_steps >= MIN_STEPS and num_weights >= (SMALL if num_steps >= MANY_STEPS else LARGE)


def _packed_linear(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    output: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return output
