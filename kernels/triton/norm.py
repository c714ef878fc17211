"""The operator residual_norm: one launch forward; backward one, and one for each of weight and bias, which
adds up what the programs have of its gradient.

A program handles tiles of ROWS rows by COLS columns.  A row that fits into COLS is read once and stays in
registers.  A LONG one has several tiles, and all but the first are read anew in every pass.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from depthnet.kernels.reference import rows_of, stream_dtype
from depthnet.kernels.triton.residual import FEWEST_WARPS, OPTIONS
from depthnet.kernels.triton.rounding import load_widened, rounded, store_rounded, widened

MOST_PROGRAMS = 512  # backward: several for each multiprocessor, and few sums to add up


@triton.jit
def _number(value, TYPE: tl.constexpr):
    return tl.full((), value, tl.float64).to(TYPE)  # of Python's in the interpreter


@triton.jit
def _rows(tile, rows, ROWS: tl.constexpr):
    """The rows of a tile, int64 (ROWS, 1), and which of them exist."""
    row = tl.cast(tile, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, row < rows


@triton.jit
def _row_sum(parts):
    return tl.sum(parts, 1)[:, None]


@triton.jit
def _updated(x, branch, where, scale, inside, TYPE: tl.constexpr):
    """x + scale * branch, as it is stored."""
    s = load_widened(x, where, inside, TYPE) + scale * load_widened(branch, where, inside, TYPE)
    return widened(rounded(s, x.dtype.element_ty), TYPE)


@triton.jit
def _squares(s, mean, inside):
    deviation = tl.where(inside, s - mean, 0.0)
    return deviation * deviation


@triton.jit
def _store_outputs(s_out, y, where, s, mean, rstd, weight, bias, column, inside, n):
    store_rounded(s_out, where, s, inside)
    normalized = (s - mean) * rstd
    if weight is not None:
        normalized *= tl.load(weight + column, mask=column < n, other=0.0)
    if bias is not None:
        normalized += tl.load(bias + column, mask=column < n, other=0.0)
    store_rounded(y, where, normalized, inside)


# Whatever the shapes are, the code is the same.
@triton.jit(do_not_specialize=["rows", "pieces"], do_not_specialize_on_alignment=["statistics"])
def residual_norm_forward_kernel(
    x,
    branch,
    s,
    y,
    statistics,
    weight,
    bias,
    rows,
    pieces,
    scale: tl.float64,
    eps: tl.float64,
    CENTER: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LONG: tl.constexpr,
):
    """s = x + scale * branch, y = (s - mean) * rstd * weight + bias, rows of n = pieces * UNIT elements.

    The mean is 0 without CENTER.  statistics (the means, if any, and rstd), weight and bias may be None.
    """
    TYPE: tl.constexpr = tl.float64 if x.dtype.element_ty.is_fp64() else tl.float32
    scale = _number(scale, TYPE)
    n = pieces * UNIT
    row, exists = _rows(tl.program_id(0), rows, ROWS)
    start_of_row = row * pieces * UNIT
    column = tl.arange(0, COLS)[None, :]
    inside = exists & (column < n)

    first = _updated(x, branch, start_of_row + column, scale, inside, TYPE)
    mean = tl.zeros((1, 1), TYPE)
    if CENTER:
        parts = first
        if LONG:
            for start in range(COLS, n, COLS):
                there = exists & (start + column < n)
                parts += _updated(x, branch, start_of_row + start + column, scale, there, TYPE)
        mean = _row_sum(parts) / n
    parts = _squares(first, mean, inside)
    if LONG:
        for start in range(COLS, n, COLS):
            there = exists & (start + column < n)
            tile = _updated(x, branch, start_of_row + start + column, scale, there, TYPE)
            parts += _squares(tile, mean, there)
    rstd = tl.rsqrt(_row_sum(parts) / n + _number(eps, TYPE))
    if statistics is not None:
        if CENTER:
            tl.store(statistics + row, mean, mask=exists)
            statistics += rows
        tl.store(statistics + row, rstd, mask=exists)

    where = start_of_row + column
    _store_outputs(s, y, where, first, mean, rstd, weight, bias, column, inside, n)
    if LONG:
        for start in range(COLS, n, COLS):
            there, where = exists & (start + column < n), start_of_row + start + column
            tile = _updated(x, branch, where, scale, there, TYPE)
            _store_outputs(s, y, where, tile, mean, rstd, weight, bias, start + column, there, n)


@triton.jit
def _gradient_tile(grad_y, s, mean, rstd, weight, where, column, inside, n, TYPE: tl.constexpr):
    """The gradient of y, that times the weight, and the normalized s."""
    g = load_widened(grad_y, where, inside, TYPE)
    a = g if weight is None else g * tl.load(weight + column, mask=column < n, other=0.0)
    return g, a, (load_widened(s, where, inside, TYPE) - mean) * rstd


@triton.jit
def _store_gradients(
    grad_x, grad_branch, grad_s, where, a, normalized, a_mean, along_mean, rstd, scale, inside
):
    g = rstd * (a - a_mean - normalized * along_mean)
    if grad_s is not None:
        g += load_widened(grad_s, where, inside, g.dtype)
    store_rounded(grad_x, where, g, inside)
    store_rounded(grad_branch, where, scale * g, inside)


@triton.jit
def _add(sums, column, values, n):
    kept = tl.load(sums + column, mask=column < n, other=0.0)
    tl.store(sums + column, kept + values, mask=column < n)


@triton.jit(do_not_specialize=["rows", "pieces"], do_not_specialize_on_alignment=["statistics"])
def residual_norm_backward_kernel(
    grad_s,
    grad_y,
    s,
    statistics,
    weight,
    grad_x,
    grad_branch,
    weight_sums,
    bias_sums,
    rows,
    pieces,
    scale: tl.float64,
    CENTER: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LONG: tl.constexpr,
):
    """The gradients of x and branch, and each program's sums of those of weight and bias, (programs, n).

    grad_s, weight, weight_sums and bias_sums may be None.  The sums of LONG rows, one of which is a
    tile's, come as zeros.
    """
    TYPE: tl.constexpr = tl.float64 if s.dtype.element_ty.is_fp64() else tl.float32
    scale = _number(scale, TYPE)
    n = pieces * UNIT
    column = tl.arange(0, COLS)[None, :]
    program = tl.cast(tl.program_id(0), tl.int64) * pieces * UNIT
    weight_parts, bias_parts = tl.zeros((ROWS, COLS), TYPE), tl.zeros((ROWS, COLS), TYPE)
    for index in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row, exists = _rows(index, rows, ROWS)
        start_of_row = row * pieces * UNIT
        inside = exists & (column < n)
        mean = tl.zeros((1, 1), TYPE)
        if CENTER:
            mean = tl.load(statistics + row, mask=exists, other=0.0)
        rstd = tl.load(statistics + (rows if CENTER else 0) + row, mask=exists, other=0.0)

        where = start_of_row + column
        g, a, normalized = _gradient_tile(
            grad_y, s, mean, rstd, weight, where, column, inside, n, TYPE
        )
        a_parts, along_parts = a, a * normalized
        if LONG:
            if weight_sums is not None:
                _add(weight_sums + program, column, g * normalized, n)
            if bias_sums is not None:
                _add(bias_sums + program, column, g, n)
            for start in range(COLS, n, COLS):
                there, at = exists & (start + column < n), start + column
                g_tile, a_tile, normalized_tile = _gradient_tile(
                    grad_y, s, mean, rstd, weight, start_of_row + at, at, there, n, TYPE
                )
                a_parts += a_tile
                along_parts += a_tile * normalized_tile
                if weight_sums is not None:
                    _add(weight_sums + program, at, g_tile * normalized_tile, n)
                if bias_sums is not None:
                    _add(bias_sums + program, at, g_tile, n)
        else:
            if weight_sums is not None:
                weight_parts += g * normalized
            if bias_sums is not None:
                bias_parts += g

        a_mean = _row_sum(a_parts) / n if CENTER else mean
        along_mean = _row_sum(along_parts) / n
        _store_gradients(
            *(grad_x, grad_branch, grad_s, where, a, normalized),
            *(a_mean, along_mean, rstd, scale, inside),
        )
        if LONG:
            for start in range(COLS, n, COLS):
                there, at = exists & (start + column < n), start + column
                _, a_tile, normalized_tile = _gradient_tile(
                    grad_y, s, mean, rstd, weight, start_of_row + at, at, there, n, TYPE
                )
                _store_gradients(
                    *(grad_x, grad_branch, grad_s, start_of_row + at, a_tile, normalized_tile),
                    *(a_mean, along_mean, rstd, scale, there),
                )
            # The next row's sums are added to what other threads may have stored.
            tl.debug_barrier()
    if not LONG:
        if weight_sums is not None:
            total = tl.sum(weight_parts, 0)[None, :]
            tl.store(weight_sums + program + column, total, mask=column < n)
        if bias_sums is not None:
            total = tl.sum(bias_parts, 0)[None, :]
            tl.store(bias_sums + program + column, total, mask=column < n)


def tile(n: int, itemsize: int) -> tuple[int, int, int]:
    """ROWS, COLS and the number of warps, for rows of n elements that are computed in `itemsize` bytes.

    A thread has 8 elements, of rows that just fit 16; of float64 half as many.
    """
    elements = 4 * 1024 // itemsize
    cols = max(triton.next_power_of_2(n), 16)
    if cols > 8 * elements:
        cols = 4 * elements
    rows = max(elements // cols, 1)
    return rows, cols, min(rows * cols // elements, 4) * FEWEST_WARPS


@lru_cache(4096)
def _prepared(rows: int, n: int, itemsize: int, center: bool) -> tuple[int, int, dict]:
    """The number of tiles, the UNITs in a row, and the keyword arguments of both kernels."""
    tile_rows, cols, warps = tile(n, itemsize)
    unit = gcd(8, n)
    options = {
        "CENTER": center,
        "UNIT": unit,
        "ROWS": tile_rows,
        "COLS": cols,
        "LONG": n > cols,
        "num_warps": warps,
        **OPTIONS,
    }
    return triton.cdiv(rows, tile_rows), n // unit, options


def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    center: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, branch, weight, bias = (_contiguous(each) for each in (x, branch, weight, bias))
    s, y = torch.empty_like(x), torch.empty_like(branch)
    rows, n = rows_of(x)
    dtype = stream_dtype(x.dtype)
    statistics = x.new_empty((1 + center, *x.shape[:-1]) if save else (0,), dtype=dtype)
    if x.numel():
        tiles, pieces, options = _prepared(rows, n, dtype.itemsize, center)
        with torch.cuda.device_of(x):
            residual_norm_forward_kernel[(tiles,)](
                *(x, branch, s, y, statistics if save else None, weight, bias),
                *(rows, pieces, scale, eps),
                **options,
            )
    return s, y, statistics


def residual_norm_backward(
    grad_y: Tensor,
    s: Tensor,
    grad_s: Tensor | None,
    statistics: Tensor,
    scale: float,
    weight: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_s, grad_y, s, weight = (_contiguous(each) for each in (grad_s, grad_y, s, weight))
    grad_x, grad_branch = torch.empty_like(s), torch.empty_like(grad_y)
    rows, n = rows_of(s)
    wanted = weight_grad, bias_grad
    if not s.numel():
        return grad_x, grad_branch, *(statistics.new_zeros(n if each else 0) for each in wanted)
    tiles, pieces, options = _prepared(rows, n, statistics.itemsize, len(statistics) == 2)
    programs = min(tiles, MOST_PROGRAMS)
    allocate = statistics.new_zeros if options["LONG"] else statistics.new_empty
    sums = allocate(sum(wanted), programs, n)
    each = iter(sums)
    with torch.cuda.device_of(s):
        residual_norm_backward_kernel[(programs,)](
            *(grad_s, grad_y, s, statistics, weight, grad_x, grad_branch),
            *(next(each) if is_wanted else None for is_wanted in wanted),
            *(rows, pieces, scale),
            **options,
        )
    totals = iter([part.sum(0) for part in sums])  # results must not share memory
    empty = (statistics.new_empty(0) for _ in wanted)
    return grad_x, grad_branch, *(next(totals if given else empty) for given in wanted)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
