"""The value function of token-wise PPO and VPG: V_t, the expected return of a completion before its token t is written.

Two kinds. A `ValueHead` is linear in the policy's own final hidden states and is trained with the policy, trunk
included (Ziegler et al. 2019, arXiv 1909.08593). A `ValueNetwork` is a model of its own that starts from a reward model
(Stiennon et al. 2020, arXiv 2009.01325; Ouyang et al. 2022, arXiv 2203.02155). Both read V_t off the hidden state that
predicts token t: that of the token before it, and of the prompt's last token for t = 0. There is no value behind the
last token of a completion: nothing more is to come, so it is 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pairtune.errors import PairtuneError
from pairtune.models.logprobs import Layout, body, probe_ids, run_decoder


class ValueHead(nn.Module):
    """hidden (n, H) -> values (n,): w h + b with w and b zero at the start, as in OpenAI's lm-human-preferences (2019).

    Weights and arithmetic are of the precision `dtype`, whatever the hidden states are: a value is fitted to a number,
    and bfloat16 knows numbers to 0.4% only. The gradient flows on into the hidden states, once w has left zero.
    """

    prefix: ClassVar[str] = "value_head"
    """Of its parameters' names among the master weights."""

    def __init__(
        self, hidden_size: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, hidden_size, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        return _dot(hidden.to(self.weight.dtype), self.weight, self.bias)


class ValueNetwork:
    """A reward model read at every prefix: its decoder's hidden states by its `score` head, all of it trained.

    Before any training V_t is the reward model's score of prompt and completion up to token t - 1.
    """

    prefix: ClassVar[str] = "value_network"
    """Of its parameters' names among the master weights."""

    def __init__(self, model: Any, *, name: str = "value_model") -> None:
        """`model` is a sequence classifier with one label, without dropout; `name` is for messages.

        Raises PairtuneError if it has more labels, or does not score every prefix by a linear head on a decoder.
        """
        if model.config.num_labels != 1:
            raise PairtuneError(
                f"value_model: {name!r} is no reward model, for it gives {model.config.num_labels} labels; give one "
                "with num_labels = 1 in its config, or leave value_model empty for a head on the policy."
            )
        if not scores_every_prefix(model):
            raise PairtuneError(
                f"value_model: {name!r} ({model.config.model_type}) is no decoder with a linear `score` head, so it "
                "gives no value before each token; give a decoder, or leave value_model empty for a head on the policy."
            )
        self.model, self.name = model.requires_grad_(True), name

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As the reward model names them."""
        return self.model.named_parameters()

    def values(self, layout: Layout) -> Tensor:
        """(P, K, T) float32 (float64 where the network is), 0 where masked, differentiable by the network.

        Raises PairtuneError if a prompt with its completion is longer than the network has positions.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = int(layout.position_ids.max()) + 1
        if limit is not None and longest > limit:
            raise PairtuneError(
                f"value_model: a prompt with its completion has {longest + 1} tokens and {self.name!r} has {limit} "
                "positions, one for each but the last; lower max_prompt_length or max_completion_length."
            )
        hidden = layout.predicting(run_decoder(body(self.model), layout, {"input_ids": layout.input_ids}))
        # The last product in float32, for the sake of bfloat16: see ValueHead.
        dtype, head = torch.promote_types(hidden.dtype, torch.float32), self.model.score
        bias = None if head.bias is None else head.bias.to(dtype)
        return layout.spread(_dot(hidden.to(dtype), head.weight.to(dtype), bias))


def _dot(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(n,) of hidden (n, H), weight (1, H) and bias (1,). Not as a matrix product, which rounds a row otherwise when
    others stand beside it: a value does not hang on the micro-batch it is computed in."""
    products = (hidden * weight).sum(-1)
    return products if bias is None else products + bias


ValueFunction = ValueHead | ValueNetwork


@torch.no_grad()
def scores_every_prefix(model: Any) -> bool:
    """Whether a sequence classifier's score of a text is a linear `score` head on the hidden state of its last token,
    and no hidden state depends on what follows (an encoder's does). Found out on the model itself."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return False
    decoder = body(model)
    ids = probe_ids(decoder, (1, 8))
    # A classifier looks for the last token that is not padding.
    pad = model.config.get_text_config().pad_token_id
    ids = ids.masked_fill(ids == pad, (pad + 1) % decoder.config.vocab_size) if pad is not None else ids
    other = torch.cat([ids[:, :4], (ids[:, 4:] + 1) % decoder.config.vocab_size], 1)
    states, other_states = (decoder(input_ids=i, use_cache=False).last_hidden_state for i in (ids, other))
    if not torch.equal(states[:, :4], other_states[:, :4]):
        return False
    own, score = model(input_ids=ids).logits.float(), model.score(states[:, -1]).float()
    return torch.allclose(own, score, rtol=1e-3, atol=1e-3)
