"""The operator mlp_activation: one launch each way.  Elements do not depend on each other.

A program handles BLOCK elements of a row of y.  GELU and |x| take the whole tensor for one row.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthnet.kernels.reference import rows_of
from depthnet.kernels.triton.residual import FEWEST_WARPS, OPTIONS
from depthnet.kernels.triton.rounding import load_widened, store_rounded

BLOCK = 2048  # a thread has 16 elements
FAR = tl.constexpr(40.0)  # as in the reference; 0 times infinity is no number


@triton.jit
def _place(pieces, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row and its columns, int64; how many columns there are."""
    n = tl.cast(pieces, tl.int64) * UNIT
    tiles = tl.cdiv(n, BLOCK)
    program = tl.cast(tl.program_id(0), tl.int64)
    row = program // tiles
    return row, (program - row * tiles) * BLOCK + tl.arange(0, BLOCK), n


@triton.jit
def _probability(x):
    """Of a normal variable below x."""
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


# Whatever the shapes are, the code is the same.
@triton.jit(do_not_specialize=["pieces"])
def mlp_activation_forward_kernel(
    h, y, pieces, KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """y = gelu(h), |h|, or silu(gate) * up with rows (gate, up) of h; a row of y has pieces * UNIT."""
    TYPE: tl.constexpr = tl.float64 if h.dtype.element_ty.is_fp64() else tl.float32
    row, column, n = _place(pieces, UNIT, BLOCK)
    inside = column < n
    if KIND == "swiglu":
        gate = row * n * 2 + column
        x, up = load_widened(h, gate, inside, TYPE), load_widened(h, gate + n, inside, TYPE)
        values = x * _sigmoid(x) * up
    else:
        x = load_widened(h, row * n + column, inside, TYPE)
        values = tl.where(x < -FAR, 0.0, x * _probability(x)) if KIND == "gelu" else tl.abs(x)
    store_rounded(y, row * n + column, values, inside)


@triton.jit(do_not_specialize=["pieces"])
def mlp_activation_backward_kernel(
    grad, h, grad_h, pieces, KIND: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of h; arguments as of the forward kernel."""
    TYPE: tl.constexpr = tl.float64 if h.dtype.element_ty.is_fp64() else tl.float32
    row, column, n = _place(pieces, UNIT, BLOCK)
    inside = column < n
    g = load_widened(grad, row * n + column, inside, TYPE)
    if KIND == "swiglu":
        gate = row * n * 2 + column
        x, up = load_widened(h, gate, inside, TYPE), load_widened(h, gate + n, inside, TYPE)
        on = _sigmoid(x)
        silu = x * on
        store_rounded(grad_h, gate, g * up * (on + silu * (1.0 - on)), inside)
        store_rounded(grad_h, gate + n, g * silu, inside)
    else:
        x = load_widened(h, row * n + column, inside, TYPE)
        if KIND == "gelu":
            density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
            values = g * (_probability(x) + tl.where(tl.abs(x) > FAR, 0.0, x * density))
        else:
            values = tl.where(x > 0, g, tl.where(x < 0, -g, g * 0.0))
        store_rounded(grad_h, row * n + column, values, inside)


@lru_cache(4096)
def _prepared(rows: int, n: int, kind: str) -> tuple[tuple[int], int, dict]:
    """The grid, the UNITs in a row of y, and the keyword arguments of both kernels."""
    if kind != "swiglu":
        rows, n = 1, rows * n
    unit = gcd(8, n)
    options = {"KIND": kind, "UNIT": unit, "BLOCK": BLOCK, "num_warps": FEWEST_WARPS, **OPTIONS}
    return (rows * triton.cdiv(n, BLOCK),), n // unit, options


def mlp_activation(h: Tensor, kind: str) -> Tensor:
    h = h.contiguous()
    y = h.new_empty(*h.shape[:-1], h.shape[-1] // 2) if kind == "swiglu" else torch.empty_like(h)
    if y.numel():
        grid, pieces, options = _prepared(*rows_of(y), kind)
        with torch.cuda.device_of(h):
            mlp_activation_forward_kernel[grid](h, y, pieces, **options)
    return y


def mlp_activation_backward(grad: Tensor, h: Tensor, kind: str) -> Tensor:
    grad, h = grad.contiguous(), h.contiguous()
    grad_h = torch.empty_like(h)
    if h.numel():
        grid, pieces, options = _prepared(*rows_of(grad), kind)
        with torch.cuda.device_of(h):
            mlp_activation_backward_kernel[grid](grad, h, grad_h, pieces, **options)
    return grad_h
