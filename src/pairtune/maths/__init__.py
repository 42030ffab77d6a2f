"""The mathematics: pure functions on tensors that import only torch.

`masking` is where masks meet arithmetic, `pairwise` holds P3O's losses, `kl` the divergences and the shaped reward,
`statistics` what a number on held-out prompts is worth.
"""

from pairtune.maths import kl, masking, pairwise, statistics

__all__ = ["kl", "masking", "pairwise", "statistics"]
