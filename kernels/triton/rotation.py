"""The operator rotary: one launch each way.

A program handles the queries, keys and values that a few tokens have in one head.  A head's elements lie
side by side in both layouts: where there are 64, both are accessed in whole lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthnet.kernels.triton.residual import FEWEST_WARPS, OPTIONS
from depthnet.kernels.triton.rounding import load_widened, store_rounded

ELEMENTS = 1024  # of half a head, times tokens: a thread has eight


@triton.jit
def _turn(source, read, target, write, half, cos, sin, inside, TYPE: tl.constexpr):
    """Both halves of what is read, turned and written."""
    first = load_widened(source, read, inside, TYPE)
    second = load_widened(source, read + half, inside, TYPE)
    store_rounded(target, write, first * cos - second * sin, inside)
    store_rounded(target, write + half, second * cos + first * sin, inside)


@triton.jit
def _copy(source, read, target, write, half, inside):
    first = tl.load(source + read, mask=inside)
    second = tl.load(source + read + half, mask=inside)
    tl.store(target + write, first, mask=inside)
    tl.store(target + write + half, second, mask=inside)


# Whatever the shapes are, the code is the same.
@triton.jit(
    do_not_specialize=[
        *("tokens", "heads", "pieces"),
        *(f"{part}_{of}" for part in "qkv" for of in ("batch", "head", "token")),
    ]
)
def rotary_kernel(
    qkv,
    q,
    k,
    v,
    rotation,
    tokens,
    heads,
    pieces,
    q_batch,
    q_head,
    q_token,
    k_batch,
    k_head,
    k_token,
    v_batch,
    v_head,
    v_token,
    BACK: tl.constexpr,
    UNIT: tl.constexpr,
    TOKENS: tl.constexpr,
    COLS: tl.constexpr,
):
    """From qkv, (batch, tokens, 3, heads, size), to q, k and v, of the strides that are given; or BACK.

    Half a head has pieces of UNIT elements, at most COLS elements; strides are counted in UNITs, too.  A
    rotation's row is (cos, cos), (-sin, sin).
    """
    TYPE: tl.constexpr = rotation.dtype.element_ty
    half = pieces * UNIT
    tiles = tl.cdiv(tokens, TOKENS)
    program = tl.program_id(0)
    head = tl.cast(program // tiles % heads, tl.int64)
    batch = tl.cast(program // tiles // heads, tl.int64)
    token = tl.cast(program % tiles * TOKENS, tl.int64) + tl.arange(0, TOKENS)[:, None]
    column = tl.arange(0, COLS)[None, :]
    inside = (token < tokens) & (column < half)

    angle = token * (pieces * UNIT * 4) + column
    cos = tl.load(rotation + angle, mask=inside, other=0.0)
    sin = tl.load(rotation + angle + 3 * half, mask=inside, other=0.0)
    joint = (((batch * tokens + token) * 3) * heads + head) * (pieces * UNIT * 2) + column
    part = tl.cast(heads, tl.int64) * (pieces * UNIT * 2)
    at_q = (batch * q_batch + head * q_head + token * q_token) * UNIT + column
    at_k = (batch * k_batch + head * k_head + token * k_token) * UNIT + column
    at_v = (batch * v_batch + head * v_head + token * v_token) * UNIT + column
    if BACK:
        _turn(q, at_q, qkv, joint, half, cos, -sin, inside, TYPE)
        _turn(k, at_k, qkv, joint + part, half, cos, -sin, inside, TYPE)
        _copy(v, at_v, qkv, joint + 2 * part, half, inside)
    else:
        _turn(qkv, joint, q, at_q, half, cos, sin, inside, TYPE)
        _turn(qkv, joint + part, k, at_k, half, cos, sin, inside, TYPE)
        _copy(qkv, joint + 2 * part, v, at_v, half, inside)


def tile(half: int) -> tuple[int, int]:
    """TOKENS and COLS, for heads of twice `half`."""
    cols = triton.next_power_of_2(half)
    return max(ELEMENTS // cols, 1), cols


@lru_cache(4096)
def _prepared(
    batch: int, tokens: int, heads: int, size: int, strides: tuple[int, ...]
) -> tuple[tuple[int], list[int], dict]:
    """The grid, the UNITs in half a head and in each stride, and the keyword arguments of the kernel."""
    tile_tokens, cols = tile(size // 2)
    unit = gcd(8, size // 2, *strides)
    options = {"UNIT": unit, "TOKENS": tile_tokens, "COLS": cols, "num_warps": FEWEST_WARPS}
    grid = (batch * heads * triton.cdiv(tokens, tile_tokens),)
    return grid, [length // unit for length in (size // 2, *strides)], {**options, **OPTIONS}


def rotary(qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.contiguous()
    batch, tokens, _, heads, size = qkv.shape
    parts = tuple(qkv.new_empty(batch, heads, tokens, size) for _ in range(3))
    _launch(False, qkv, parts, rotation)
    return parts


def rotary_backward(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor) -> Tensor:
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v)]
    batch, heads, tokens, size = q.shape
    qkv = q.new_empty(batch, tokens, 3, heads, size)
    _launch(True, qkv, parts, rotation)
    return qkv


def _launch(back: bool, qkv: Tensor, parts: Sequence[Tensor], rotation: Tensor) -> None:
    if not qkv.numel():
        return
    batch, tokens, _, heads, size = qkv.shape
    strides = tuple(stride for part in parts for stride in part.stride()[:3])
    grid, units, options = _prepared(batch, tokens, heads, size, strides)
    with torch.cuda.device_of(qkv):
        rotary_kernel[grid](
            *(qkv, *parts, rotation.contiguous(), tokens, heads, *units),
            BACK=back,
            **options,
        )
