"""The operator scaled_residual: registration, autograd, public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthnet._activations import slopes
from depthnet.kernels.checks import (
    check_float_tensor,
    check_no_tangent,
    check_same,
    multiplier,
    needs_grad,
    shape_text,
)
from depthnet.kernels.dispatch import (
    autocast_enabled,
    call,
    register,
    register_autograd,
    select,
)
from depthnet.kernels.reference import sign_bytes


def _scaled_residual(x, h, *args):
    return select("scaled_residual", x, h).scaled_residual(x, h, *args)


def _scaled_residual_fake(x, h, scale, scales, p, q, mean_subtract, save):
    members, rows, n = x.shape
    shape = (members, rows, sign_bytes(n)) if save else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.uint8)


def _scaled_residual_backward(grad, *args):
    return select("scaled_residual", grad).scaled_residual_backward(grad, *args)


def _scaled_residual_backward_fake(grad, *args):
    return grad.new_empty(grad.shape)


def _scaled_residual_context(ctx, inputs, output):
    _, _, scale, scales, *rest = inputs
    _, signs = output
    ctx.mark_non_differentiable(signs)
    ctx.save_for_backward(signs, scales)
    ctx.constants = scale, rest[:3]


def _scaled_residual_autograd(ctx, grad, _):
    signs, scales = ctx.saved_tensors
    scale, rest = ctx.constants
    grad_h = None
    if ctx.needs_input_grad[1]:
        grad_h = call("scaled_residual_backward", grad, signs, scale, scales, *rest)
    return grad, grad_h, None, None, None, None, None, None


register(
    "scaled_residual(Tensor x, Tensor h, float scale, Tensor? scales, float p, float q, "
    "bool mean_subtract, bool save) -> (Tensor y, Tensor signs)",
    _scaled_residual,
    _scaled_residual_fake,
)
register(
    "scaled_residual_backward(Tensor grad, Tensor signs, float scale, Tensor? scales, float p, "
    "float q, bool mean_subtract) -> Tensor",
    _scaled_residual_backward,
    _scaled_residual_backward_fake,
)
register_autograd("scaled_residual", _scaled_residual_autograd, _scaled_residual_context)


def scaled_residual(
    x: Tensor,
    h: Tensor,
    scale: float | Tensor,
    *,
    activation: str | tuple[float, float] = "abs",
    mean_subtract: bool = True,
) -> Tensor:
    """The residual update x + scale * (phi(h) - mean(phi(h))), the mean over the last dimension.

    Backward: dh = scale * (g - mean(g)) * phi'(h), with phi'(h) = p if h >= 0 else -q; the signs of h,
    one bit an element, are all that is saved.  Under autocast h is taken to the dtype of x.

    Args:
        x: the residual stream, (..., n); float32, float64, bfloat16 or float16.
        h: the pre-activation, of the shape, dtype and device of x.
        scale: the branch multiplier: a finite number, or a tensor over the leading dimensions of x
            (one multiplier for each network of a population).  It gets no gradient.
        activation: `identity`, `relu`, `abs`, `leaky_relu`, or slopes (p, q).
        mean_subtract: whether the mean is subtracted.

    Returns:
        A new tensor of the shape and dtype of x.  Sums are float32 (float64 for float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
    """
    p, q = slopes(activation)
    check_float_tensor("x", x)
    check_float_tensor("h", h)
    check_no_tangent("x", x)
    check_no_tangent("h", h)
    if autocast_enabled(x):
        h = h.to(x.dtype)
    if x.ndim == 0 or h.shape != x.shape:
        raise ValueError(f"h must have the shape of x, {shape_text(x)}, got {shape_text(h)}")
    check_same("h", h, "x", x)
    factor, scales = multiplier(scale, x, None)
    members = 1 if scales is None else scales.numel()
    rows = math.prod(x.shape[:-1]) // max(members, 1)
    flat = (members, rows, x.shape[-1])
    y, _ = call(
        "scaled_residual",
        *(x.reshape(flat), h.reshape(flat), factor, scales, p, q, mean_subtract, needs_grad(h)),
    )
    return y.view(x.shape)
