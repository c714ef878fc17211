"""Wide stacks: one launch a layer and pass, each program computing a tile of the layer's output.

No program sees a whole row, so the means of a layer's rows are known only when all of its programs are
through: each leaves the sum over its columns, and whoever reads the rows next adds up and subtracts.
What is in memory between two launches is the stream before its last mean was subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from depthnet.kernels.triton.parts import (
    clear,
    dot,
    load_words,
    multiplier,
    pack,
    slope,
    store_words,
    unpack,
)
from depthnet.kernels.triton.rounding import rounded, widened


@triton.jit
def _tile(rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's member, first row, number of rows that exist, and number among the row's tiles.

    Programs that share rows run side by side; the weights stay in the second-level cache.
    """
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    block, tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    blocks = tl.cdiv(rows, ROWS)
    first = block % blocks * ROWS
    return (block // blocks).to(tl.int64), first.to(tl.int64), rows - first, tile


@triton.jit
def _row_means(sums, row, in_row, total_rows, WIDTH: tl.constexpr, TILES: tl.constexpr):
    """Of rows of which `sums` (TILES, P * rows) has the sums over tiles of columns, added in order."""
    total = tl.load(sums + row, mask=in_row, other=0.0)
    for tile in tl.static_range(1, TILES):
        total += tl.load(sums + tile * total_rows + row, mask=in_row, other=0.0)
    return total / WIDTH


@triton.jit(do_not_specialize=["members", "rows"])
def layer_forward_kernel(
    x,
    sums,
    weight,
    y,
    y_sums,
    operand,
    signs,
    scales,
    weight_member,
    operand_member,
    signs_member,
    members,
    rows,
    scale: tl.float64,
    p,
    q,
    MEAN_SUBTRACT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """y = x - s mean + s phi(h), h = (x - s mean) W^T; the next layer subtracts the mean of phi(h).

    x, y (P, rows, n), y float32; sums (tiles, P * rows) of the phi(h) before, or None in the first layer;
    y_sums of this one's.  weight is a layer's, (P, n, n).  `operand` gets what is multiplied with the
    weights, (P, rows, n), and `signs` the signs of h, unless they are None.  Members of weight, operand
    and signs are `..._member` elements apart.
    """
    TYPE: tl.constexpr = weight.dtype.element_ty
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    member, first, count, tile = _tile(rows, WIDTH, ROWS, COLUMNS)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    rows_exist = row < count
    in_row, in_column = rows_exist[:, None], column < WIDTH
    s = multiplier(scale, scales, member, tl.float32)
    weight += member * weight_member
    total_rows = members.to(tl.int64) * rows
    first_of_all = member * rows + first
    x += first_of_all * WIDTH
    shift = tl.zeros((ROWS,), tl.float32)
    if MEAN_SUBTRACT and sums is not None:
        shift = s * _row_means(sums + first_of_all, row, rows_exist, total_rows, WIDTH, TILES)

    h = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, SLAB):
        k = start + tl.arange(0, SLAB)
        in_k = k < WIDTH
        part = tl.load(
            x + row[:, None] * WIDTH + k[None, :], mask=in_row & in_k[None, :], other=0.0
        )
        w = tl.load(
            weight + column[None, :] * WIDTH + k[:, None],
            mask=in_column[None, :] & in_k[:, None],
            other=0.0,
        )
        h = dot(rounded(widened(part, tl.float32) - shift[:, None], TYPE), w, h, PRECISION)

    offsets, mask = row[:, None] * WIDTH + column[None, :], in_row & in_column[None, :]
    stream = widened(tl.load(x + offsets, mask=mask, other=0.0), tl.float32) - shift[:, None]
    nonnegative = h >= 0
    if operand is not None:
        operand += member * operand_member + first * WIDTH
        tl.store(operand + offsets, rounded(stream, TYPE), mask=mask)
    if signs is not None:
        words = pack(nonnegative & in_column[None, :], WIDTH)
        signs += member * signs_member
        store_words(signs, first, row, words, in_row, WIDTH, tile * COLUMNS)
    z = h * slope(nonnegative, p, q, tl.float32)
    tl.store(y + first_of_all * WIDTH + offsets, stream + s * z, mask=mask)
    if MEAN_SUBTRACT:
        # Columns that do not exist have h = 0, and so z = 0.
        y_sums += tile * total_rows + first_of_all
        tl.store(y_sums + row, tl.sum(z, 1), mask=rows_exist)


@triton.jit(do_not_specialize=["members", "rows"])
def layer_finish_kernel(
    x,
    sums,
    y,
    scales,
    members,
    rows,
    scale: tl.float64,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = x - s mean, after the last layer; x, y (P, rows, n), sums (TILES, P * rows) or None."""
    member, first, count, tile = _tile(rows, WIDTH, ROWS, COLUMNS)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    in_row = row < count
    first_of_all = member * rows + first
    mask = in_row[:, None] & (column < WIDTH)[None, :]
    offsets = row[:, None] * WIDTH + column[None, :]
    stream = tl.load(x + first_of_all * WIDTH + offsets, mask=mask, other=0.0)
    if sums is not None:
        total_rows = members.to(tl.int64) * rows
        means = _row_means(sums + first_of_all, row, in_row, total_rows, WIDTH, TILES)
        stream -= (multiplier(scale, scales, member, tl.float32) * means)[:, None]
    y += first_of_all * WIDTH
    tl.store(y + offsets, rounded(stream, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["members", "rows", "counters"])
def layer_backward_data_kernel(
    g,
    sums,
    weight,
    g_out,
    g_sums,
    d,
    signs,
    scales,
    arrived,
    counters,
    weight_member,
    d_member,
    signs_member,
    members,
    rows,
    scale: tl.float64,
    p,
    q,
    MEAN_SUBTRACT: tl.constexpr,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """d = s (g - mean(g)) phi'(h), g_out = g + d W.

    g, g_out (P, rows, n); sums (tiles, P * rows) of g, or None in the last layer, the first to come,
    where each program finds the means itself; g_sums of g_out, unless it is None.  `d`, (P, rows, n), is
    written.  weight, signs and members as in forward.  `arrived`, unless None: the counters of the
    gradient of the weights, to be cleared.
    """
    TYPE: tl.constexpr = weight.dtype.element_ty
    if arrived is not None:
        clear(arrived, counters)
    TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    member, first, count, tile = _tile(rows, WIDTH, ROWS, COLUMNS)
    row, column = tl.arange(0, ROWS), tile * COLUMNS + tl.arange(0, COLUMNS)
    rows_exist = row < count
    in_row, in_column = rows_exist[:, None], column < WIDTH
    s = multiplier(scale, scales, member, tl.float32)
    weight += member * weight_member
    signs += member * signs_member
    total_rows = members.to(tl.int64) * rows
    first_of_all = member * rows + first
    g += first_of_all * WIDTH
    means = tl.zeros((ROWS,), tl.float32)
    if MEAN_SUBTRACT:
        if sums is not None:
            means = _row_means(sums + first_of_all, row, rows_exist, total_rows, WIDTH, TILES)
        else:
            for start in range(0, WIDTH, SLAB):
                j = start + tl.arange(0, SLAB)
                part = tl.load(
                    g + row[:, None] * WIDTH + j[None, :],
                    mask=in_row & (j < WIDTH)[None, :],
                    other=0.0,
                )
                means += tl.sum(widened(part, tl.float32), 1)
            means /= WIDTH

    change = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, WIDTH, SLAB):
        j = start + tl.arange(0, SLAB)
        in_j = j < WIDTH
        part = tl.load(
            g + row[:, None] * WIDTH + j[None, :], mask=in_row & in_j[None, :], other=0.0
        )
        words = load_words(signs, first, row, in_row, WIDTH, SLAB, start)
        w = tl.load(
            weight + j[:, None] * WIDTH + column[None, :],
            mask=in_j[:, None] & in_column[None, :],
            other=0.0,
        )
        u = s * (widened(part, tl.float32) - means[:, None])
        a = rounded(u * slope(unpack(words, WIDTH), p, q, tl.float32), TYPE)
        change = dot(a, w, change, PRECISION)

    offsets, mask = row[:, None] * WIDTH + column[None, :], in_row & in_column[None, :]
    old = widened(tl.load(g + offsets, mask=mask, other=0.0), tl.float32)
    words = load_words(signs, first, row, in_row, WIDTH, COLUMNS, tile * COLUMNS)
    u = s * (old - means[:, None])
    d += member * d_member + first * WIDTH
    tl.store(
        d + offsets, rounded(u * slope(unpack(words, WIDTH), p, q, tl.float32), TYPE), mask=mask
    )
    new = old + change
    g_out += first_of_all * WIDTH
    tl.store(g_out + offsets, rounded(new, g_out.dtype.element_ty), mask=mask)
    if MEAN_SUBTRACT and g_sums is not None:
        g_sums += tile * total_rows + first_of_all
        tl.store(g_sums + row, tl.sum(new, 1), mask=rows_exist)
