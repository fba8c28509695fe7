"""Rounding of state in 16 bits whose mean is right: steps smaller than half the distance of two numbers are not lost.

Whether a number is rounded up or down is decided by a fraction in [0, 1) for each element and generation. The fractions
of an element are a Weyl sequence over the generations, so in any stretch of them it is rounded up as often as its
distance from the lower number says, more evenly than at random, and without a random number to draw.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The inverse of the plastic number and its square, times 2**32: a sequence in two dimensions that stays even in both.
_BY_ELEMENT, _BY_GENERATION = 0xC13FA9A9, 0x91E10DA5
_CUT = {torch.float16: 13, torch.bfloat16: 16}
"""Lowest bits of a float32 that the shorter format does not have."""


def rounded(wide: Tensor, dtype: torch.dtype, generation: int) -> Tensor:
    """``wide`` in ``dtype``, up or down with the right mean over generations; what fits exactly stays as it is.

    Args:
        wide: float32, contiguous; overwritten.
        dtype: float16 (finite numbers, exact mean down to 6e-5, nearest below) or bfloat16.
        generation: of the update; with the element's place in the tensor it decides about up and down.
    """
    cut = _CUT[dtype]
    fractions = torch.arange(wide.numel(), dtype=torch.int32, device=wide.device)
    fractions.mul_(_signed(_BY_ELEMENT)).add_(_signed(_BY_GENERATION * generation))
    fractions.bitwise_right_shift_(32 - cut).bitwise_and_((1 << cut) - 1)
    raw = wide.view(torch.int32)
    raw.add_(fractions.view(wide.shape)).bitwise_and_(-(1 << cut))
    return wide.to(dtype)


def _signed(word: int) -> int:
    """The 32 lowest bits of a number as an int32."""
    return (word + 2**31) % 2**32 - 2**31
