"""The operator scaled_residual: one launch each way, for all rows of all members.

A program handles tiles of ROWS rows of a member by COLS columns.  A row that fits into COLS is read once
and stays in registers.  A LONG one has several tiles; all but the last are read twice, the second time
backwards, as what was read last is still in the cache.  The formulas are those of csrc/math/homogeneous.h.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthnet.kernels.reference import sign_bytes
from depthnet.kernels.triton.parts import multiplier, slope
from depthnet.kernels.triton.rounding import rounded, widened

FEWEST_WARPS = 2 if torch.version.hip else 4  # 128 threads; a wavefront of AMD's has 64
OPTIONS = {"enable_fp_fusion": True}  # whatever the environment says, as in the CPU's kernels


@triton.jit
def _places(rows, ROWS: tl.constexpr):
    """This program's member, its rows of it, (ROWS,), and which of them exist."""
    tiles = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    row = (program % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return (program // tiles).to(tl.int64), row, row < rows


@triton.jit
def _starts(array, stride, length, places, UNIT: tl.constexpr):
    """Where the rows start, (ROWS, 1); the strides of members and rows are in units of UNIT.

    So the compiler knows how they are aligned, on which the width of accesses depends.
    """
    member, row, _ = places
    return array + member * stride * UNIT + (row * length * UNIT)[:, None]


@triton.jit
def _inside(start, n, places, COLS: tl.constexpr):
    """Which elements of the tile from column `start` on exist, (ROWS, COLS)."""
    _, _, exists = places
    return exists[:, None] & (start + tl.arange(0, COLS) < n)[None, :]


@triton.jit
def _load(starts, start, inside, COLS: tl.constexpr, TYPE: tl.constexpr):
    """A tile as TYPE; 0 where there is no element."""
    pointers = starts + (start + tl.arange(0, COLS))[None, :]
    return widened(tl.load(pointers, mask=inside, other=0.0), TYPE)


@triton.jit
def _store(starts, start, values, inside, COLS: tl.constexpr):
    pointers = starts + (start + tl.arange(0, COLS))[None, :]
    tl.store(pointers, rounded(values, starts.dtype.element_ty), mask=inside)


@triton.jit
def _sign_bytes(starts, start, n, places, COLS: tl.constexpr):
    """Where the signs of a tile are, (ROWS, COLS/8), and which of these bytes exist."""
    byte = start // 8 + tl.arange(0, COLS // 8)
    _, _, exists = places
    return starts + byte[None, :], exists[:, None] & (byte * 8 < n)[None, :]


@triton.jit
def _store_signs(starts, start, nonnegative, n, places, ROWS: tl.constexpr, COLS: tl.constexpr):
    bits = nonnegative.to(tl.int32) << (tl.arange(0, COLS) % 8)[None, :]
    packed = tl.sum(bits.reshape(ROWS, COLS // 8, 8), 2).to(tl.uint8)
    pointers, inside = _sign_bytes(starts, start, n, places, COLS)
    tl.store(pointers, packed, mask=inside)


@triton.jit
def _load_signs(starts, start, n, places, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Whether h >= 0, (ROWS, COLS)."""
    pointers, inside = _sign_bytes(starts, start, n, places, COLS)
    packed = tl.load(pointers, mask=inside, other=0).to(tl.int32)[:, :, None]
    bits = tl.broadcast_to(packed, (ROWS, COLS // 8, 8)).reshape(ROWS, COLS)
    return ((bits >> (tl.arange(0, COLS) % 8)[None, :]) & 1) != 0


@triton.jit
def _activation(h, p, q):
    """phi(h)."""
    return h * slope(h >= 0, p, q, h.dtype)


@triton.jit
def _mean(parts, n):
    """The means of rows, (ROWS, 1), of which `parts` are (ROWS, COLS) parts of the sums."""
    total = tl.sum(parts, 1)
    count = tl.cast(n, total.dtype)
    return (tl.div_rn(total, count) if total.dtype == tl.float32 else total / count)[:, None]


@triton.jit
def _store_update(y, operand, start, x, z, mean, s, inside, COLS: tl.constexpr):
    updated = x + s * (z - mean)
    _store(y, start, updated, inside, COLS)
    if operand is not None:
        _store(operand, start, updated, inside, COLS)


# Whatever the shapes are, the code is the same.
@triton.jit(
    do_not_specialize=[
        *("x_stride", "h_stride", "y_stride", "operand_stride", "signs_stride", "rows", "pieces")
    ],
    do_not_specialize_on_alignment=["signs", "scales"],
)
def residual_forward_kernel(
    x,
    h,
    y,
    operand,
    signs,
    scales,
    x_stride: tl.int64,
    h_stride: tl.int64,
    y_stride: tl.int64,
    operand_stride: tl.int64,
    signs_stride: tl.int64,
    rows,
    pieces,
    scale: tl.float64,
    p: tl.float64,
    q: tl.float64,
    MEAN: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LONG: tl.constexpr,
):
    """y = x + scale * (phi(h) - mean(phi(h))), rows of n = pieces * UNIT elements.

    Strides of members are in units of UNIT elements, those of signs in bytes.  operand, signs and scales
    may be None.
    """
    TYPE: tl.constexpr = tl.float64 if x.dtype.element_ty.is_fp64() else tl.float32
    n = pieces * UNIT
    places = _places(rows, ROWS)
    x, h = _starts(x, x_stride, pieces, places, UNIT), _starts(h, h_stride, pieces, places, UNIT)
    y = _starts(y, y_stride, pieces, places, UNIT)
    if operand is not None:
        operand = _starts(operand, operand_stride, pieces, places, UNIT)
    if signs is not None:
        signs = _starts(signs, signs_stride, (n + 7) // 8, places, 1)
    s = multiplier(scale, scales, places[0], TYPE)
    last = (n - 1) // COLS * COLS if LONG else 0

    # x is read before the sum, which waits for h: both are then on their way together.
    inside_last = _inside(last, n, places, COLS)
    x_last = _load(x, last, inside_last, COLS, TYPE)
    h_last = _load(h, last, inside_last, COLS, TYPE)
    z_last = _activation(h_last, p, q)
    sums = z_last
    if signs is not None:
        _store_signs(signs, last, inside_last & (h_last >= 0), n, places, ROWS, COLS)
    if LONG and (MEAN or signs is not None):
        for start in range(0, last, COLS):
            inside = _inside(start, n, places, COLS)
            h_tile = _load(h, start, inside, COLS, TYPE)
            sums += _activation(h_tile, p, q)
            if signs is not None:
                _store_signs(signs, start, inside & (h_tile >= 0), n, places, ROWS, COLS)
    mean = _mean(sums, n) if MEAN else tl.zeros((1, 1), TYPE)

    _store_update(y, operand, last, x_last, z_last, mean, s, inside_last, COLS)
    if LONG:
        for done in range(COLS, last + COLS, COLS):
            start = last - done
            inside = _inside(start, n, places, COLS)
            z = _activation(_load(h, start, inside, COLS, TYPE), p, q)
            x_tile = _load(x, start, inside, COLS, TYPE)
            _store_update(y, operand, start, x_tile, z, mean, s, inside, COLS)


@triton.jit
def _store_gradient(out, start, g, nonnegative, mean, s, p, q, inside, COLS: tl.constexpr):
    gradient = s * (g - mean) * slope(nonnegative, p, q, g.dtype)
    _store(out, start, gradient, inside, COLS)


@triton.jit(
    do_not_specialize=["grad_stride", "signs_stride", "out_stride", "rows", "pieces"],
    do_not_specialize_on_alignment=["signs", "scales"],
)
def residual_backward_kernel(
    grad,
    signs,
    out,
    scales,
    grad_stride: tl.int64,
    signs_stride: tl.int64,
    out_stride: tl.int64,
    rows,
    pieces,
    scale: tl.float64,
    p: tl.float64,
    q: tl.float64,
    MEAN: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LONG: tl.constexpr,
):
    """out = scale * (g - mean(g)) * phi'(h), with the arguments of the forward kernel."""
    TYPE: tl.constexpr = tl.float64 if grad.dtype.element_ty.is_fp64() else tl.float32
    n = pieces * UNIT
    places = _places(rows, ROWS)
    grad = _starts(grad, grad_stride, pieces, places, UNIT)
    out = _starts(out, out_stride, pieces, places, UNIT)
    signs = _starts(signs, signs_stride, (n + 7) // 8, places, 1)
    s = multiplier(scale, scales, places[0], TYPE)
    last = (n - 1) // COLS * COLS if LONG else 0

    inside_last = _inside(last, n, places, COLS)
    g_last = _load(grad, last, inside_last, COLS, TYPE)
    signs_last = _load_signs(signs, last, n, places, ROWS, COLS)
    sums = g_last
    if LONG and MEAN:
        for start in range(0, last, COLS):
            sums += _load(grad, start, _inside(start, n, places, COLS), COLS, TYPE)
    mean = _mean(sums, n) if MEAN else tl.zeros((1, 1), TYPE)

    _store_gradient(out, last, g_last, signs_last, mean, s, p, q, inside_last, COLS)
    if LONG:
        for done in range(COLS, last + COLS, COLS):
            start = last - done
            inside = _inside(start, n, places, COLS)
            g = _load(grad, start, inside, COLS, TYPE)
            nonnegative = _load_signs(signs, start, n, places, ROWS, COLS)
            _store_gradient(out, start, g, nonnegative, mean, s, p, q, inside, COLS)


def tile(n: int, itemsize: int) -> tuple[int, int, int]:
    """ROWS, COLS and the number of warps, for rows of n elements of at most `itemsize` bytes.

    Short rows share a tile of 4 KiB, 32 bytes a thread.  Longer ones have tiles of up to 8192 elements,
    16 a thread; of float64 half as many.
    """
    computed = max(itemsize, 4)
    cols = min(max(triton.next_power_of_2(n), 16), 32768 // computed)
    rows = max(4096 // itemsize // cols, 1)
    return rows, cols, max(rows * cols * computed // 8192, 1) * FEWEST_WARPS


@lru_cache(4096)
def _prepared(
    members: int, rows: int, n: int, mean_subtract: bool, itemsize: int, *strides: int
) -> tuple[tuple[int], int, tuple[int, ...], dict]:
    """For rows of n elements of at most `itemsize` bytes: the grid, the UNITs in a row and in the strides
    of members, and the keyword arguments.  Found once, because a short kernel takes less time."""
    tile_rows, cols, warps = tile(n, itemsize)
    unit = math.gcd(8, n, *strides)
    options = {
        "MEAN": mean_subtract,
        "UNIT": unit,
        "ROWS": tile_rows,
        "COLS": cols,
        "LONG": n > cols,
        "num_warps": warps,
        **OPTIONS,
    }
    grid = (members * triton.cdiv(rows, tile_rows),)
    return grid, n // unit, tuple(stride // unit for stride in strides), options


def residual_forward(
    x: Tensor,
    h: Tensor,
    y: Tensor,
    operand: Tensor | None,
    signs: Tensor | None,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
) -> None:
    """y = x + scale * (phi(h) - mean(phi(h))), in one launch, computed in float32 or float64.

    Arguments:
        x, h: (P, rows, n), of any two floating-point dtypes.  Here and below the rows of a member are
            contiguous, and the stride between members is arbitrary.
        y: written, of x's shape and dtype; may be x.
        operand: written if not None: y in a dtype of its own.
        signs: written if not None: uint8 (P, rows, ceil(n/8)), as `reference.pack_signs` has them.
        scales: float64 (P,) or None.
    """
    members, rows, n = x.shape
    if x.numel() == 0:
        return
    itemsize = max(x.itemsize, h.itemsize)
    strides = x.stride(0), h.stride(0), y.stride(0), 0 if operand is None else operand.stride(0)
    grid, pieces, strides, options = _prepared(members, rows, n, mean_subtract, itemsize, *strides)
    signs_stride = 0 if signs is None else signs.stride(0)
    with torch.cuda.device_of(x):
        residual_forward_kernel[grid](
            *(x, h, y, operand, signs, None if scales is None else scales.contiguous()),
            *(*strides, signs_stride, rows, pieces, scale, p, q),
            **options,
        )


def residual_backward(
    grad: Tensor,
    signs: Tensor,
    out: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
) -> None:
    """out = scale * (g - mean(g)) * phi'(h), in one launch; out has a dtype of its own."""
    members, rows, n = grad.shape
    if grad.numel() == 0:
        return
    itemsize = max(grad.itemsize, out.itemsize)
    grid, pieces, (grad_stride, out_stride), options = _prepared(
        members, rows, n, mean_subtract, itemsize, grad.stride(0), out.stride(0)
    )
    with torch.cuda.device_of(grad):
        residual_backward_kernel[grid](
            *(grad, signs, out, None if scales is None else scales.contiguous()),
            *(grad_stride, signs.stride(0), out_stride, rows, pieces, scale, p, q),
            **options,
        )


def scaled_residual(
    x: Tensor,
    h: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    x, h = x.contiguous(), h.contiguous()
    y = torch.empty_like(x)
    shape = (*x.shape[:2], sign_bytes(x.shape[2])) if save else (0,)
    signs = torch.empty(shape, dtype=torch.uint8, device=x.device)
    saved = signs if save else None
    residual_forward(x, h, y, None, saved, scale, scales, p, q, mean_subtract)
    return y, signs


def scaled_residual_backward(
    grad: Tensor,
    signs: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
) -> Tensor:
    grad = grad.contiguous()
    out = torch.empty_like(grad)
    residual_backward(grad, signs, out, scale, scales, p, q, mean_subtract)
    return out
