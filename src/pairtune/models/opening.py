"""The opening of a batch: the tokens that all its prompts begin with, a chat template's system prompt for instance.

It goes through a decoder once, and the tokens that follow it in each prompt attend to the keys and values that are
there. In a batch of short questions to a chat model that spares a good part of all tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SHARE = 1 / 16
"""Share of the tokens of a pass that the opening must spare: a pass of its own over a few tokens is a slow one."""


def opening_length(prompt_ids: Tensor, prompt_mask: Tensor, *, num_tokens: int | None = None) -> int:
    """How many tokens all prompts begin with; 0 where sharing them spares less than `LEAST_SHARE` of a pass.

    prompt_ids (P, W) int64 and prompt_mask (P, W) bool, padded on the left. num_tokens: of the whole pass (default:
    the prompts'). At least one token of each prompt is not counted in: it has to stand in a row of its own.
    """
    num_prompts, width = prompt_ids.shape
    lengths = prompt_mask.sum(1)
    columns = torch.arange(width, device=prompt_ids.device)
    from_left = prompt_ids.gather(1, (width - lengths[:, None] + columns).clamp(max=width - 1))
    same = (from_left == from_left[:1]).all(0) & (columns < lengths.min() - 1)
    length = int(same.to(torch.int64).cumprod(0).sum())
    spared = length * (num_prompts - 1)
    return length if spared >= LEAST_SHARE * (num_tokens or int(lengths.sum())) else 0
