"""The operator rotary: registration, autograd, public function."""

from __future__ import annotations

from torch import Tensor

from depthnet.kernels.checks import (
    check_float_tensor,
    check_no_tangent,
    check_same,
    shape_text,
)
from depthnet.kernels.dispatch import call, register, register_autograd, select
from depthnet.kernels.reference import stream_dtype


def _rotary(qkv, rotation):
    return select("rotary", qkv).rotary(qkv, rotation)


def _rotary_fake(qkv, rotation):
    batch, tokens, _, heads, size = qkv.shape
    return tuple(qkv.new_empty(batch, heads, tokens, size) for _ in range(3))


def _rotary_backward(q, k, v, rotation):
    return select("rotary_backward", q, k, v).rotary_backward(q, k, v, rotation)


def _rotary_backward_fake(q, k, v, rotation):
    batch, heads, tokens, size = q.shape
    return q.new_empty(batch, tokens, 3, heads, size)


def _context(ctx, inputs, output):
    _, rotation = inputs
    ctx.save_for_backward(rotation)


def _autograd(ctx, *grads):
    (rotation,) = ctx.saved_tensors
    return call("rotary_backward", *grads, rotation), None


register(
    "rotary(Tensor qkv, Tensor rotation) -> (Tensor q, Tensor k, Tensor v)", _rotary, _rotary_fake
)
register(
    "rotary_backward(Tensor q, Tensor k, Tensor v, Tensor rotation) -> Tensor",
    _rotary_backward,
    _rotary_backward_fake,
)
register_autograd("rotary", _autograd, _context)


def rotary(qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by heads, out of one product, the first two turned by their positions:
    with x = (x_1, x_2) in halves, q = (x_1 cos - x_2 sin, x_2 cos + x_1 sin), and k likewise.

    One pass forward, and one backward, which turns the gradients back.

    Args:
        qkv: (B, T, 3, heads, size), size even; float32, float64, bfloat16 or float16.
        rotation: of T tokens, (T, 2, size), [:, 0] being (cos, cos) and [:, 1] (-sin, sin); float32
            (float64 for float64).  It gets no gradient.

    Returns:
        (q, k, v), each (B, heads, T, size), contiguous.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
    """
    check_float_tensor("qkv", qkv)
    check_float_tensor("rotation", rotation)
    check_no_tangent("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3 or qkv.shape[4] % 2:
        raise ValueError(
            f"qkv must have the shape (B, T, 3, heads, size) with an even size, got {shape_text(qkv)}"
        )
    wanted = qkv.shape[1], 2, qkv.shape[4]
    if rotation.shape != wanted:
        raise ValueError(f"rotation must have the shape {wanted}, got {shape_text(rotation)}")
    if rotation.requires_grad:
        raise ValueError("rotation gets no gradient: pass rotation.detach()")
    check_same("rotation", rotation, "qkv", qkv, dtype=False)
    if rotation.dtype != stream_dtype(qkv.dtype):
        raise TypeError(f"rotation must be {stream_dtype(qkv.dtype)}, got {rotation.dtype}")
    return call("rotary", qkv, rotation)
