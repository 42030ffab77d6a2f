"""Align language models from pairs of completions: P3O (Pairwise Proximal Policy Optimization) and its neighbours.

Names are loaded when they are first asked for, so that `import pairtune.maths` stays light.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairtune.config import EvaluateConfig as EvaluateConfig
    from pairtune.config import SFTConfig as SFTConfig
    from pairtune.config import TrainConfig as TrainConfig
    from pairtune.errors import PairtuneError as PairtuneError
    from pairtune.evaluation import evaluate as evaluate
    from pairtune.stages.rl import train as train
    from pairtune.stages.sft import sft as sft

# torch's CPU allocator reads this once, at its first allocation: then it asks for huge pages, and a forward pass that
# keeps its activations spends less time in page faults (benchmarks/cpu_passes.py). A user's own setting wins.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.1.0"

_HOME = {
    "train": "pairtune.stages.rl",
    "TrainConfig": "pairtune.config",
    "sft": "pairtune.stages.sft",
    "SFTConfig": "pairtune.config",
    "evaluate": "pairtune.evaluation",
    "EvaluateConfig": "pairtune.config",
    "PairtuneError": "pairtune.errors",
}

__all__ = ["train", "TrainConfig", "sft", "SFTConfig", "evaluate", "EvaluateConfig", "PairtuneError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pairtune' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
