"""Narrow stacks: one launch for all layers, a block of whole rows in registers from end to end.

Rows do not depend on each other, whatever the depth.  A program keeps the float32 stream of its rows, or
their gradient, in registers while the weights come by, layer after layer; those of the next layer are
on their way while one is computed.

Where a layer's weights are too large for that (SLAB < COLUMNS), they come in slabs, and so does the other
operand: it is read again from where it was just stored, because registers cannot be indexed.
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
def _block(rows, ROWS: tl.constexpr):
    """This program's member, first row, and how many of its rows exist."""
    blocks = tl.cdiv(rows, ROWS)
    first = tl.program_id(0) % blocks * ROWS
    member = tl.program_id(0) // blocks
    return member.to(tl.int64), first.to(tl.int64), rows - first


@triton.jit(do_not_specialize=["rows", "depth"])
def narrow_forward_kernel(
    x,
    weight,
    y,
    operands,
    signs,
    scales,
    weight_member,
    weight_layer,
    rows,
    depth,
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
    """For each layer h = x W^T, x <- x + s (phi(h) - mean(phi(h))), for ROWS rows of a member.

    x, y (P, rows, n); weight (P, L, n, n), a member's and a layer's first elements `weight_member` and
    `weight_layer` apart.  `operands` gets x_0 .. x_{L-1}, (P, L, rows, n), and `signs` the signs of h; if
    these are None, `operands` is memory for one of them, (P, rows, n), or None where it is not needed.
    """
    TYPE: tl.constexpr = weight.dtype.element_ty
    member, first, count = _block(rows, ROWS)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_row, in_column = (row < count)[:, None], column < WIDTH
    tile, mask = row[:, None] * WIDTH + column[None, :], in_row & in_column[None, :]
    s = multiplier(scale, scales, member, tl.float32)
    weight += member * weight_member

    start = (member * rows + first) * WIDTH
    stream = widened(tl.load(x + start + tile, mask=mask, other=0.0), tl.float32)
    layer_row = (member if signs is None else member * depth) * rows + first
    for _ in range(depth):
        a = rounded(stream, TYPE)
        if signs is not None or SLAB < COLUMNS:
            tl.store(operands + layer_row * WIDTH + tile, a, mask=mask)
        h = tl.zeros((ROWS, COLUMNS), tl.float32)
        if SLAB == COLUMNS:
            w = tl.load(
                weight + column[None, :] * WIDTH + column[:, None],
                mask=in_column[None, :] & in_column[:, None],
                other=0.0,
            )
            h = dot(a, w, h, PRECISION)
        else:
            tl.debug_barrier()  # what other threads of the program have just stored is read
            for k in range(0, COLUMNS, SLAB):
                slab = k + tl.arange(0, SLAB)
                in_slab = slab < WIDTH
                part = tl.load(
                    operands + layer_row * WIDTH + row[:, None] * WIDTH + slab[None, :],
                    mask=in_row & in_slab[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + column[None, :] * WIDTH + slab[:, None],
                    mask=in_column[None, :] & in_slab[:, None],
                    other=0.0,
                )
                h = dot(part, w, h, PRECISION)
        nonnegative = h >= 0
        if signs is not None:
            words = pack(nonnegative & in_column[None, :], WIDTH)
            store_words(signs, layer_row, row, words, in_row, WIDTH)
            layer_row += rows
        elif SLAB < COLUMNS:
            tl.debug_barrier()  # all threads have read the operand that the next one replaces
        z = h * slope(nonnegative, p, q, tl.float32)
        if MEAN_SUBTRACT:
            z = tl.where(in_column[None, :], z - (tl.sum(z, 1) / WIDTH)[:, None], 0.0)
        stream += s * z
        weight += weight_layer
    tl.store(y + start + tile, rounded(stream, y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "depth", "counters"])
def narrow_backward_data_kernel(
    grad,
    weight,
    grad_x,
    d,
    signs,
    scales,
    arrived,
    counters,
    weight_member,
    weight_layer,
    rows,
    depth,
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
    """For each layer from the last d = s (g - mean(g)) phi'(h), g <- g + d W, for ROWS rows of a member.

    grad, grad_x (P, rows, n); d, which is written, (P, L, rows, n); weight and signs as in forward.
    `arrived`, unless None: the counters of the weights' gradient, to be cleared.
    """
    TYPE: tl.constexpr = weight.dtype.element_ty
    if arrived is not None:
        clear(arrived, counters)
    member, first, count = _block(rows, ROWS)
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    in_row, in_column = (row < count)[:, None], column < WIDTH
    tile, mask = row[:, None] * WIDTH + column[None, :], in_row & in_column[None, :]
    s = multiplier(scale, scales, member, tl.float32)
    weight += member * weight_member + (depth - 1) * weight_layer

    start = (member * rows + first) * WIDTH
    g = widened(tl.load(grad + start + tile, mask=mask, other=0.0), tl.float32)
    layer_row = (member * depth + depth - 1) * rows + first
    for _ in range(depth):
        words = load_words(signs, layer_row, row, in_row, WIDTH, COLUMNS)
        u = g
        if MEAN_SUBTRACT:
            u = tl.where(in_column[None, :], g - (tl.sum(g, 1) / WIDTH)[:, None], 0.0)
        a = rounded(s * u * slope(unpack(words, WIDTH), p, q, tl.float32), TYPE)
        tl.store(d + layer_row * WIDTH + tile, a, mask=mask)
        if SLAB == COLUMNS:
            w = tl.load(
                weight + column[:, None] * WIDTH + column[None, :],
                mask=in_column[:, None] & in_column[None, :],
                other=0.0,
            )
            g = dot(a, w, g, PRECISION)
        else:
            tl.debug_barrier()  # what other threads of the program have just stored is read
            for j in range(0, COLUMNS, SLAB):
                slab = j + tl.arange(0, SLAB)
                in_slab = slab < WIDTH
                part = tl.load(
                    d + layer_row * WIDTH + row[:, None] * WIDTH + slab[None, :],
                    mask=in_row & in_slab[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight + slab[:, None] * WIDTH + column[None, :],
                    mask=in_slab[:, None] & in_column[None, :],
                    other=0.0,
                )
                g = dot(part, w, g, PRECISION)
        layer_row -= rows
        weight -= weight_layer
    tl.store(grad_x + start + tile, rounded(g, grad_x.dtype.element_ty), mask=mask)
