"""What the kernels of residual updates and stacks share: sign bits, slopes, matrix products."""

from __future__ import annotations

import triton
import triton.language as tl

from depthnet.kernels.triton.rounding import BY_HAND, widened


@triton.jit
def multiplier(scale, scales, member, TYPE: tl.constexpr):
    """A member's branch multiplier as TYPE: scale * scales[member], or scale."""
    scale = tl.full((), scale, tl.float64)  # a number of Python's in the interpreter
    if scales is not None:
        scale *= tl.load(scales + member)
    return scale.to(TYPE)


@triton.jit
def slope(nonnegative, p, q, TYPE: tl.constexpr):
    """phi'(h) = p if h >= 0 else -q; phi(h) = h * slope."""
    # In the interpreter p and q are Python's numbers.
    return tl.where(nonnegative, tl.full((), p, TYPE), tl.full((), -q, TYPE))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, summed in float32; PRECISION is that of float32 operands, `ieee` or `tf32`."""
    if BY_HAND:  # the interpreter would multiply the bits of bfloat16 operands as integers
        a, b = widened(a, tl.float32), widened(b, tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def clear(counters, count):
    """Zero the counters of the next kernel, each program a part of them."""
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        tl.store(counters + index, 0)


@triton.jit
def pack(nonnegative, WIDTH: tl.constexpr):
    """The signs of (rows, columns) as words, lowest bit first: int32 (rows, words).

    Words have 32 bits where rows of WIDTH signs are whole ones, else 8.
    """
    WORD: tl.constexpr = 32 if WIDTH % 32 == 0 else 8
    WORDS: tl.constexpr = nonnegative.shape[1] // WORD
    bits = tl.reshape(nonnegative.to(tl.int32), (nonnegative.shape[0], WORDS, WORD))
    return tl.sum(bits << tl.arange(0, WORD)[None, None, :], 2)


@triton.jit
def unpack(words, WIDTH: tl.constexpr):
    """The inverse of `pack`, as booleans."""
    WORD: tl.constexpr = 32 if WIDTH % 32 == 0 else 8
    COLUMNS: tl.constexpr = words.shape[1] * WORD
    bits = (words[:, :, None].to(tl.int32) >> tl.arange(0, WORD)[None, None, :]) & 1
    return tl.reshape(bits, (words.shape[0], COLUMNS)) != 0


@triton.jit
def _words(signs, first_row, row, in_row, first_column, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to the words of a tile's signs, and which of them exist."""
    WORD: tl.constexpr = 32 if WIDTH % 32 == 0 else 8
    STRIDE: tl.constexpr = (WIDTH + WORD - 1) // WORD
    word = first_column // WORD + tl.arange(0, COLUMNS // WORD)
    signs = signs.to(tl.pointer_type(tl.int32)) if WORD == 32 else signs
    pointers = signs + first_row * STRIDE + row[:, None] * STRIDE + word[None, :]
    return pointers, in_row & (word < STRIDE)[None, :]


@triton.jit
def load_words(
    signs, first_row, row, in_row, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, first_column=0
):
    """The words of COLUMNS signs of some rows from `first_row` on; rows have WIDTH signs."""
    pointers, mask = _words(signs, first_row, row, in_row, first_column, WIDTH, COLUMNS)
    return tl.load(pointers, mask=mask, other=0)


@triton.jit
def store_words(signs, first_row, row, words, in_row, WIDTH: tl.constexpr, first_column=0):
    WORD: tl.constexpr = 32 if WIDTH % 32 == 0 else 8
    COLUMNS: tl.constexpr = words.shape[1] * WORD
    pointers, mask = _words(signs, first_row, row, in_row, first_column, WIDTH, COLUMNS)
    tl.store(pointers, words.to(pointers.dtype.element_ty), mask=mask)
