"""Conversions between what is stored and what is computed, for the other files' kernels.

Compiled they are one instruction.  Triton's interpreter rounds bfloat16 towards 0 and loses its subnormal
numbers, so there they are integer arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from depthnet.kernels.triton import INTERPRETED

BY_HAND = tl.constexpr(INTERPRETED)


@triton.jit
def widened(x, TYPE: tl.constexpr):
    """x as TYPE, which holds every number of x's own type."""
    if BY_HAND and x.dtype == tl.bfloat16:
        bits = x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16
        return bits.to(tl.float32, bitcast=True).to(TYPE)
    return x.to(TYPE)


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x, float32 or of TYPE itself, as TYPE: to nearest, ties to even."""
    if BY_HAND and TYPE.is_bf16():
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(x == x, nearest, (bits >> 16) | 0x40)  # a quiet NaN
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(TYPE)


@triton.jit
def load_widened(array, where, inside, TYPE: tl.constexpr):
    """What is there of an array, 0 elsewhere."""
    return widened(tl.load(array + where, mask=inside, other=0.0), TYPE)


@triton.jit
def store_rounded(array, where, values, inside):
    tl.store(array + where, rounded(values, array.dtype.element_ty), mask=inside)
