"""The operator residual_stack: checkpointing, registration, autograd, public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthnet._activations import slopes
from depthnet._checks import integer
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
from depthnet.kernels.reference import sign_bytes, stream_dtype


def _segments(depth: int, every: int) -> list[tuple[int, int]]:
    """The layers in runs of `every`; `every` = 0 is one run."""
    every = every or max(depth, 1)
    return [(start, min(start + every, depth)) for start in range(0, depth, every)]


def _residual_stack(x, weight, scale, scales, p, q, mean_subtract, every, save):
    if weight.shape[1] == 0:  # no layers: an op returns new tensors all the same
        rest = _residual_stack_fake(x, weight, scale, scales, p, q, mean_subtract, every, save)[1:]
        return x.clone(), *rest
    backend, weight = select("residual_stack", x, weight), _matrices(weight)
    if not (every and save):
        return backend.residual_stack(x, weight, scale, scales, p, q, mean_subtract, save)
    # Between segments the stream stays in the precision that it is computed in, so that the backward
    # pass starts each segment from what the forward pass had, not from a rounded copy.
    stream = x.to(stream_dtype(x.dtype))
    starts = []
    for start, end in _segments(weight.shape[1], every):
        starts.append(stream)
        stream, _, _ = backend.residual_stack(
            stream, weight[:, start:end], scale, scales, p, q, mean_subtract, False
        )
    return stream.to(x.dtype), torch.stack(starts, 1), _no_signs(x)


def _matrices(weight):
    """(P, L, n, n) of which each matrix is contiguous, as the backends want them."""
    n = weight.shape[-1]
    return weight if weight.stride()[2:] == (n, 1) else weight.contiguous()


def _no_signs(x):
    return x.new_empty(0, dtype=torch.uint8)


def _residual_stack_fake(x, weight, scale, scales, p, q, mean_subtract, every, save):
    members, rows, n = x.shape
    depth = weight.shape[1]
    y = x.new_empty(x.shape)
    if not save:
        return y, weight.new_empty(0), _no_signs(x)
    if every:
        kept = len(_segments(depth, every))
        inputs = x.new_empty(members, kept, rows, n, dtype=stream_dtype(x.dtype))
        return y, inputs, _no_signs(x)
    signs = x.new_empty(members, depth, rows, sign_bytes(n), dtype=torch.uint8)
    return y, weight.new_empty(members, depth, rows, n), signs


def _residual_stack_backward(
    grad, weight, inputs, signs, scale, scales, p, q, mean_subtract, every, weight_grad
):
    grad_weight = weight.new_empty(weight.shape if weight_grad else 0)
    if weight.shape[1] == 0:
        return grad.clone(), grad_weight
    backend, weight = select("residual_stack", grad, weight), _matrices(weight)
    constants = scale, scales, p, q, mean_subtract
    if not every:
        out = grad_weight if weight_grad else None
        g = backend.residual_stack_backward(grad, weight, inputs, signs, *constants, out)
        return g, grad_weight
    g = grad.to(stream_dtype(grad.dtype))
    segments = _segments(weight.shape[1], every)
    for index, (start, end) in reversed(list(enumerate(segments))):
        layers = weight[:, start:end]
        _, x, s = backend.residual_stack(inputs[:, index], layers, *constants, True)
        out = grad_weight[:, start:end] if weight_grad else None
        g = backend.residual_stack_backward(g, layers, x, s, *constants, out)
    return g.to(grad.dtype), grad_weight


def _residual_stack_backward_fake(
    grad, weight, inputs, signs, scale, scales, p, q, mean_subtract, every, weight_grad
):
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape if weight_grad else (0,))


def _residual_stack_context(ctx, inputs, output):
    _, weight, scale, scales, *rest = inputs
    _, saved, signs = output
    ctx.mark_non_differentiable(saved, signs)
    ctx.set_materialize_grads(False)  # no zeros of the size of all that is saved
    ctx.save_for_backward(weight, saved, signs, scales)
    ctx.constants = scale, rest[:4]


def _residual_stack_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    weight, saved, signs, scales = ctx.saved_tensors
    scale, rest = ctx.constants
    weight_grad = ctx.needs_input_grad[1]
    grad_x, grad_weight = call(
        "residual_stack_backward", grad, weight, saved, signs, scale, scales, *rest, weight_grad
    )
    return grad_x, grad_weight if weight_grad else None, *[None] * 7


register(
    "residual_stack(Tensor x, Tensor weight, float scale, Tensor? scales, float p, float q, "
    "bool mean_subtract, int checkpoint_every, bool save) -> (Tensor y, Tensor inputs, Tensor signs)",
    _residual_stack,
    _residual_stack_fake,
)
register(
    "residual_stack_backward(Tensor grad, Tensor weight, Tensor inputs, Tensor signs, float scale, "
    "Tensor? scales, float p, float q, bool mean_subtract, int checkpoint_every, bool weight_grad) "
    "-> (Tensor, Tensor)",
    _residual_stack_backward,
    _residual_stack_backward_fake,
)
register_autograd("residual_stack", _residual_stack_autograd, _residual_stack_context)


def residual_stack(
    x: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    *,
    activation: str | tuple[float, float] = "abs",
    mean_subtract: bool = True,
    checkpoint_every: int | None = None,
) -> Tensor:
    """L residual layers: for l = 1..L, h = x W_l^T and x <- x + scale * (phi(h) - mean(phi(h))).

    Backward, g being the gradient of x_L: for l = L..1, u = scale * (g - mean(g)), d = u * phi'(h_l),
    dW_l = d^T x_{l-1}, g <- g + d W_l.  Saved are x_{l-1} and one bit per activation; with
    `checkpoint_every=c` every c-th x_l only, and the rest is recomputed in segments.

    Args:
        x: (*P, B, n), P being the dimensions of a population of networks, B rows and n the width;
            float32, float64, bfloat16 or float16.
        weight: (*P, L, n, n), L >= 0, of the dtype of x; or bfloat16/float16 beside a float32 x, which
            is what autocast makes of a float32 weight.  GEMM operands are of this dtype, while the
            residual stream and all sums are float32 (float64 for float64).
        scale: the branch multiplier: a finite number, or a tensor of shape (*P,).  It gets no gradient.
        activation: `identity`, `relu`, `abs`, `leaky_relu`, or slopes (p, q).
        mean_subtract: whether the mean over the last dimension is subtracted.
        checkpoint_every: None, or the number of layers between two kept x_l.

    Returns:
        x_L, of the shape and dtype of x; under autocast float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
    """
    p, q = slopes(activation)
    check_float_tensor("x", x)
    check_float_tensor("weight", weight)
    check_no_tangent("x", x)
    check_no_tangent("weight", weight)
    if autocast_enabled(x) and x.dtype != torch.float64:
        x, weight = x.float(), weight.to(torch.get_autocast_dtype(x.device.type))
    if weight.ndim < 3 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"weight must have the shape (*P, L, n, n), got {shape_text(weight)}")
    lead, (depth, n, _) = weight.shape[:-3], weight.shape[-3:]
    if x.ndim != len(lead) + 2 or x.shape[:-2] != lead or x.shape[-1] != n:
        wanted = ", ".join([*map(str, lead), "B", str(n)])
        raise ValueError(
            f"x must have the shape ({wanted}) beside a weight of shape {shape_text(weight)}, "
            f"got {shape_text(x)}"
        )
    mixed = x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
    check_same("weight", weight, "x", x, dtype=not mixed)
    every = 0 if checkpoint_every is None else integer("checkpoint_every", checkpoint_every, 1)
    factor, scales = multiplier(scale, x, lead)
    members = math.prod(lead)
    y, _, _ = call(
        "residual_stack",
        x.reshape(members, x.shape[-2], n),
        weight.reshape(members, depth, n, n),
        *(factor, scales, p, q, mean_subtract, every),
        needs_grad(x) or needs_grad(weight),
    )
    return y.view(x.shape)
