"""The mathematics: pure functions on tensors that import only torch.

`masking` is where masks meet arithmetic, `pairwise` holds P3O's losses, `kl` the divergences and the shaped reward,
`statistics` what a number on held-out prompts is worth. `advantages`, `policy_gradient`, `preference` and `contrastive`
hold the losses of the methods that P3O is compared with. `reward_learning` holds the losses that make a reward out of
comparisons and rankings, `calibration` what such a reward is worth.
"""

from pairtune.maths import (
    advantages,
    calibration,
    contrastive,
    kl,
    masking,
    pairwise,
    policy_gradient,
    preference,
    reward_learning,
    statistics,
)

__all__ = [
    "advantages",
    "calibration",
    "contrastive",
    "kl",
    "masking",
    "pairwise",
    "policy_gradient",
    "preference",
    "reward_learning",
    "statistics",
]
