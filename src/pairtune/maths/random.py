"""Uniform numbers that depend on what they are for, not on when they are drawn.

A generator with a state gives a completion other numbers as soon as the batch around it changes. Here each number is
a hash of counters (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the seed, the stream, the
dataset row, the completion and the token. The mixing function is splitmix64's (Steele, Lea & Flood 2014, "Fast
splittable pseudorandom number generators"), on int64 tensors, whose products wrap as unsigned ones do.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _as_int64(number: int) -> int:
    """The int64 that has the last 64 bits of `number`."""
    return (number + 2**63) % 2**64 - 2**63


_INCREMENT = _as_int64(0x9E3779B97F4A7C15)
_FACTORS = (_as_int64(0xBF58476D1CE4E5B9), _as_int64(0x94D049BB133111EB))


def _shift_right(bits: Tensor, places: int) -> Tensor:
    """A logical shift; torch's own copies the sign bit."""
    return (bits >> places) & (2 ** (64 - places) - 1)


def _absorb(state: Tensor, word: Tensor) -> Tensor:
    """Output number `word` of splitmix64 started at `state`: a new state in which every bit of both counts."""
    bits = state + (word + 1) * _INCREMENT
    bits = (bits ^ _shift_right(bits, 30)) * _FACTORS[0]
    bits = (bits ^ _shift_right(bits, 27)) * _FACTORS[1]
    return bits ^ _shift_right(bits, 31)


def counter_uniforms(*counters: int | Tensor) -> Tensor:
    """Uniform float64 numbers in the open interval (0, 1), one for each tuple of counters.

    counters: integers or int64 tensors, in an order that matters; the result has the shape that they broadcast to.
    """
    state = torch.zeros((), dtype=torch.int64)
    for counter in counters:
        word = counter if isinstance(counter, Tensor) else torch.tensor(_as_int64(counter))
        state = _absorb(state, word)
    # 52 random bits and a half: the 53 bits of a float64 hold that exactly, so neither 0 nor 1 can come out.
    return (_shift_right(state, 12).double() + 0.5) * 2.0**-52
