"""The operator mlp_activation: registration, autograd, public function."""

from __future__ import annotations

from torch import Tensor

from depthnet._checks import one_of
from depthnet.kernels.checks import check_float_tensor, check_no_tangent, shape_text
from depthnet.kernels.dispatch import call, register, register_autograd, select

MLPS = ("gelu", "swiglu", "abs")


def _mlp_activation(h, kind):
    return select("mlp_activation", h).mlp_activation(h, kind)


def _mlp_activation_fake(h, kind):
    return h.new_empty(*h.shape[:-1], _outputs(h, kind))


def _mlp_activation_backward(grad, h, kind):
    return select("mlp_activation_backward", grad, h).mlp_activation_backward(grad, h, kind)


def _mlp_activation_backward_fake(grad, h, kind):
    return h.new_empty(h.shape)


def _outputs(h: Tensor, kind: str) -> int:
    return h.shape[-1] // 2 if kind == "swiglu" else h.shape[-1]


def _context(ctx, inputs, output):
    h, ctx.kind = inputs
    ctx.save_for_backward(h)


def _autograd(ctx, grad):
    (h,) = ctx.saved_tensors
    return call("mlp_activation_backward", grad, h, ctx.kind), None


register("mlp_activation(Tensor h, str kind) -> Tensor", _mlp_activation, _mlp_activation_fake)
register(
    "mlp_activation_backward(Tensor grad, Tensor h, str kind) -> Tensor",
    _mlp_activation_backward,
    _mlp_activation_backward_fake,
)
register_autograd("mlp_activation", _autograd, _context)


def mlp_activation(h: Tensor, kind: str) -> Tensor:
    """What an MLP applies between its two products, forward and backward in one pass each.

    `gelu`: h Φ(h), with Φ the distribution function of a normal variable (no approximation by tanh);
    `abs`: |h|, whose derivative at 0 is 0; `swiglu`: silu(g) u = g u / (1 + exp(-g)), with g the first
    half of the last dimension of h and u the second.  Only h is saved for the backward pass.

    At infinity `gelu` and `abs` and their derivatives have their limits: gelu(-inf) is 0, its slope 0.

    Args:
        h: (..., m), for `swiglu` (..., 2 m); float32, float64, bfloat16 or float16.  16-bit elements are
            computed in float32 and rounded once.
        kind: `gelu`, `swiglu` or `abs`.

    Returns:
        (..., m), of the dtype of h.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or value.
    """
    check_float_tensor("h", h)
    check_no_tangent("h", h)
    one_of("kind", kind, MLPS)
    if h.ndim == 0 or (kind == "swiglu" and h.shape[-1] % 2):
        wanted = "(..., 2 m)" if kind == "swiglu" else "(..., m)"
        raise ValueError(f"h must have the shape {wanted}, got {shape_text(h)}")
    return call("mlp_activation", h, kind)
