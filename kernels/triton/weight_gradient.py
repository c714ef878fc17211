"""The gradients of all weights of a stack: dW_l = d_l^T x_{l-1}, one launch for all members and layers."""

from __future__ import annotations

import triton
import triton.language as tl

from depthnet.kernels.triton.parts import dot
from depthnet.kernels.triton.rounding import rounded


@triton.jit(do_not_specialize=["rows", "depth", "splits"])
def weight_gradient_kernel(
    d,
    operands,
    grad_weight,
    partial,
    arrived,
    grad_member,
    rows,
    depth,
    splits,
    WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLAB: tl.constexpr,
):
    """A tile of ROWS x COLUMNS of one layer's gradient.

    d, operands (P, L, rows, n); grad_weight (P, L, n, n), its members `grad_member` elements apart.  Where
    there are fewer tiles than a GPU has multiprocessors, `splits` programs share a tile, each summing
    over a part of the rows into `partial`, float32 (programs, ROWS, COLUMNS).  The last to arrive, by the
    tile's counter in `arrived`, which starts at 0, adds the parts, always in the same order.
    """
    TYPE: tl.constexpr = grad_weight.dtype.element_ty
    J_TILES: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    K_TILES: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    layer = (tile // (J_TILES * K_TILES)).to(tl.int64)  # counted through all members
    j = tile // K_TILES % J_TILES * ROWS + tl.arange(0, ROWS)
    k = tile % K_TILES * COLUMNS + tl.arange(0, COLUMNS)
    in_j, in_k = j < WIDTH, k < WIDTH

    # Slabs of rows are handed out evenly.
    slabs = tl.cdiv(rows, SLAB)
    begin, end = (
        split * slabs // splits * SLAB,
        tl.minimum((split + 1) * slabs // splits * SLAB, rows),
    )
    start = (layer * rows + begin) * WIDTH
    row = tl.arange(0, SLAB)
    d += start + row[None, :] * WIDTH + j[:, None]
    operands += start + row[:, None] * WIDTH + k[None, :]
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, SLAB):
        in_row = row < end - first
        a = tl.load(d, mask=in_j[:, None] & in_row[None, :], other=0.0)
        b = tl.load(operands, mask=in_row[:, None] & in_k[None, :], other=0.0)
        sums = dot(a, b, sums, PRECISION)
        d += SLAB * WIDTH
        operands += SLAB * WIDTH

    last = True
    if partial is not None:
        element = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        partial += tile.to(tl.int64) * splits * (ROWS * COLUMNS)
        tl.store(partial + split.to(tl.int64) * (ROWS * COLUMNS) + element, sums)
        # Every thread has stored its part when the program arrives; the atomic operation releases what was
        # stored before it and acquires what others have released.
        tl.debug_barrier()
        last = tl.atomic_add(arrived + tile, 1) == splits - 1
        if last:
            sums = tl.zeros((ROWS, COLUMNS), tl.float32)
            for _ in range(splits):
                sums += tl.load(partial + element, cache_modifier=".cg")
                partial += ROWS * COLUMNS
    if last:
        member = layer // depth
        grad_weight += member * grad_member + (layer - member * depth) * (WIDTH * WIDTH)
        tl.store(
            grad_weight + j[:, None] * WIDTH + k[None, :],
            rounded(sums, TYPE),
            mask=in_j[:, None] & in_k[None, :],
        )
