"""The operator residual_norm: registration, autograd, public function."""

from __future__ import annotations

import torch
from torch import Tensor

from depthnet._checks import number, one_of
from depthnet.kernels.checks import (
    NORMS,
    check_float_tensor,
    check_no_tangent,
    check_same,
    needs_grad,
    shape_text,
)
from depthnet.kernels.dispatch import call, register, register_autograd, select
from depthnet.kernels.reference import stream_dtype


def _residual_norm(x, branch, *args):
    return select("residual_norm", x, branch).residual_norm(x, branch, *args)


def _residual_norm_fake(x, branch, scale, weight, bias, center, eps, save):
    shape = (1 + center, *x.shape[:-1]) if save else (0,)
    statistics = x.new_empty(shape, dtype=stream_dtype(x.dtype))
    return x.new_empty(x.shape), branch.new_empty(x.shape), statistics


def _residual_norm_backward(grad_y, s, *args):
    return select("residual_norm", grad_y, s).residual_norm_backward(grad_y, s, *args)


def _residual_norm_backward_fake(
    grad_y, s, grad_s, statistics, scale, weight, weight_grad, bias_grad
):
    def sums(wanted):
        return statistics.new_empty(s.shape[-1] if wanted else 0)

    return s.new_empty(s.shape), grad_y.new_empty(s.shape), sums(weight_grad), sums(bias_grad)


def _residual_norm_context(ctx, inputs, output):
    _, _, scale, weight, *_ = inputs
    s, y, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(s, statistics, weight)
    ctx.constants = scale, y.dtype


def _residual_norm_autograd(ctx, grad_s, grad_y, _):
    s, statistics, weight = ctx.saved_tensors
    scale, branch_dtype = ctx.constants
    needs_x, needs_branch, _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    if grad_y is None:
        grads = grad_s, None if grad_s is None else (scale * grad_s).to(branch_dtype), None, None
    else:
        grads = call(
            "residual_norm_backward",
            *(grad_y, s, grad_s, statistics, scale, weight, needs_weight, needs_bias),
        )
    grad_x, grad_branch, grad_weight, grad_bias = grads
    return (
        grad_x if needs_x else None,
        grad_branch if needs_branch else None,
        None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        *(None, None, None),
    )


register(
    "residual_norm(Tensor x, Tensor branch, float scale, Tensor? weight, Tensor? bias, bool center, "
    "float eps, bool save) -> (Tensor s, Tensor y, Tensor statistics)",
    _residual_norm,
    _residual_norm_fake,
)
register(
    "residual_norm_backward(Tensor grad_y, Tensor s, Tensor? grad_s, Tensor statistics, float scale, "
    "Tensor? weight, bool weight_grad, bool bias_grad) -> (Tensor x, Tensor branch, Tensor weight, "
    "Tensor bias)",
    _residual_norm_backward,
    _residual_norm_backward_fake,
)
register_autograd("residual_norm", _residual_norm_autograd, _residual_norm_context)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: float,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    norm: str = "layer",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """The residual update s = x + scale * branch and the norm that follows it, over the last dimension.

    `layer`: y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with the biased variance;
    `rms`: y = s / sqrt(mean(s^2) + eps) * weight + bias.  The norm is that of s as it is returned, rounded
    to the dtype of x.

    Backward: with u the normalized s and a = weight * g_y,
    dx = g_s + (a - mean(a) - u mean(a u)) / sqrt(var(s) + eps), without mean(a) for `rms`;
    dbranch = scale * dx, dweight = the sum of g_y u over the rows, dbias that of g_y.  Beside s two
    numbers a row are saved, for `rms` one.

    Args:
        x: the residual stream, (..., n); float32, float64, bfloat16 or float16.
        branch: of the shape of x, and of its dtype; beside a float32 x also bfloat16 or float16.
        scale: the branch multiplier, a finite number.  It gets no gradient.
        weight, bias: (n,), of the dtype of x or branch or float32; None for ones and zeros.
        norm: `layer` or `rms`.
        eps: added to the variance, or to the mean square; not negative.

    Returns:
        (s, y): of the shape of x, s of its dtype, y of that of branch.  Sums are float32 (float64 for
        float64).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
    """
    check_float_tensor("x", x)
    check_float_tensor("branch", branch)
    for name, tensor in (("x", x), ("branch", branch)):
        check_no_tangent(name, tensor)
    if x.ndim == 0 or branch.shape != x.shape:
        raise ValueError(
            f"branch must have the shape of x, {shape_text(x)}, got {shape_text(branch)}"
        )
    mixed = x.dtype == torch.float32 and branch.dtype.itemsize == 2
    check_same("branch", branch, "x", x, dtype=not mixed)
    if not torch.compiler.is_compiling():
        scale, eps = number("scale", scale), number("eps", eps)
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
    weight = _parameter("weight", weight, x, branch)
    bias = _parameter("bias", bias, x, branch)
    center = one_of("norm", norm, NORMS) == "layer"

    save = any(tensor is not None and needs_grad(tensor) for tensor in (x, branch, weight, bias))
    return call("residual_norm", x, branch, scale, weight, bias, center, eps, save)[:2]


def _parameter(name: str, tensor: Tensor | None, x: Tensor, branch: Tensor) -> Tensor | None:
    """A weight or bias in the dtype in which the norm is computed."""
    if tensor is None:
        return None
    check_float_tensor(name, tensor)
    check_no_tangent(name, tensor)
    if tensor.shape != x.shape[-1:]:
        raise ValueError(
            f"{name} must have the shape ({x.shape[-1]}), of the last dimension of x, "
            f"got {shape_text(tensor)}"
        )
    check_same(name, tensor, "x", x, dtype=tensor.dtype not in (branch.dtype, torch.float32))
    return tensor.to(stream_dtype(x.dtype))
