"""The operator residual_stack: checkpointing, registration, autograd, public function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from depthnet._activations import slopes
from depthnet._checks import integer, one_of
from depthnet.kernels.checks import (
    NORMS,
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
from depthnet.kernels.reference import Block, sign_bytes, stream_dtype


def _segments(depth: int, every: int) -> list[tuple[int, int]]:
    """The layers in runs of `every`; `every` = 0 is one run."""
    every = every or max(depth, 1)
    return [(start, min(start + every, depth)) for start in range(0, depth, every)]


def _residual_stack(
    x, weight, scale, scales, p, q, mean_subtract, every, save, layers=1, norm="", first=False
):
    block = Block(layers, norm, first)
    if weight.shape[1] == 0:  # no layers: an op returns new tensors all the same
        fake = _residual_stack_fake(
            x, weight, scale, scales, p, q, mean_subtract, every, save, *block
        )
        return x.clone(), *fake[1:]
    backend, weight = select("residual_stack", x, weight), _matrices(weight)
    constants = scale, scales, p, q, mean_subtract, block
    if not (every and save):
        return backend.residual_stack(x, weight, *constants, save)
    # Between segments the stream stays in the precision that it is computed in, so that the backward
    # pass starts each segment from what the forward pass had, not from a rounded copy.
    stream = x.to(stream_dtype(x.dtype))
    starts = []
    for start, end in _segments(weight.shape[1], every * layers):
        starts.append(stream)
        stream, *_ = backend.residual_stack(stream, weight[:, start:end], *constants, False)
    nothing = stream.new_empty(0)
    return stream.to(x.dtype), torch.stack(starts, 1), _no_signs(x), nothing


def _matrices(weight):
    """(P, L, n, n) of which each matrix is contiguous, as the backends want them."""
    n = weight.shape[-1]
    return weight if weight.stride()[2:] == (n, 1) else weight.contiguous()


def _no_signs(x):
    return x.new_empty(0, dtype=torch.uint8)


def _residual_stack_fake(
    x, weight, scale, scales, p, q, mean_subtract, every, save, layers=1, norm="", first=False
):
    members, rows, n = x.shape
    depth = weight.shape[1]
    y, dtype = x.new_empty(x.shape), stream_dtype(x.dtype)
    nothing = x.new_empty(0, dtype=dtype)
    if not save:
        return y, weight.new_empty(0), _no_signs(x), nothing
    if every:
        kept = len(_segments(depth, every * layers))
        return y, x.new_empty(members, kept, rows, n, dtype=dtype), _no_signs(x), nothing
    inputs = weight.new_empty(members, depth, rows, n)
    signs = x.new_empty(members, depth, rows, sign_bytes(n), dtype=torch.uint8)
    inverses = x.new_empty(members, depth // layers, rows, dtype=dtype) if norm else nothing
    return y, inputs, signs, inverses


def _residual_stack_backward(
    grad, weight, inputs, signs, inverses, scale, scales, p, q, mean_subtract, every, weight_grad,
    layers=1, norm="", first=False,
):  # fmt: skip
    grad_weight = weight.new_empty(weight.shape if weight_grad else 0)
    if weight.shape[1] == 0:
        return grad.clone(), grad_weight
    block = Block(layers, norm, first)
    backend, weight = select("residual_stack", grad, weight), _matrices(weight)
    constants = scale, scales, p, q, mean_subtract, block
    if not every:
        out = grad_weight if weight_grad else None
        saved = inputs, signs, inverses
        return backend.residual_stack_backward(grad, weight, *saved, *constants, out), grad_weight
    g = grad.to(stream_dtype(grad.dtype))
    segments = _segments(weight.shape[1], every * layers)
    for index, (start, end) in reversed(list(enumerate(segments))):
        part = weight[:, start:end]
        _, *saved = backend.residual_stack(inputs[:, index], part, *constants, True)
        out = grad_weight[:, start:end] if weight_grad else None
        g = backend.residual_stack_backward(g, part, *saved, *constants, out)
    return g.to(grad.dtype), grad_weight


def _residual_stack_backward_fake(
    grad, weight, inputs, signs, inverses, scale, scales, p, q, mean_subtract, every, weight_grad,
    layers=1, norm="", first=False,
):  # fmt: skip
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape if weight_grad else (0,))


def _residual_stack_context(ctx, inputs, output):
    _, weight, scale, scales, p, q, mean_subtract, every, _, *block = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)  # no zeros of the size of all that is saved
    ctx.save_for_backward(weight, *saved, scales)
    ctx.constants = scale, (p, q, mean_subtract, every), block


def _residual_stack_autograd(ctx, grad, *_):
    if grad is None:
        return (None,) * 12
    weight, *saved, scales = ctx.saved_tensors
    scale, rest, block = ctx.constants
    weight_grad = ctx.needs_input_grad[1]
    grad_x, grad_weight = call(
        "residual_stack_backward",
        *(grad, weight, *saved, scale, scales, *rest, weight_grad, *block),
    )
    return grad_x, grad_weight if weight_grad else None, *[None] * 10


register(
    "residual_stack(Tensor x, Tensor weight, float scale, Tensor? scales, float p, float q, "
    "bool mean_subtract, int checkpoint_every, bool save, int block_depth=1, str norm='', "
    "bool activate_first=False) -> (Tensor y, Tensor inputs, Tensor signs, Tensor inverses)",
    _residual_stack,
    _residual_stack_fake,
)
register(
    "residual_stack_backward(Tensor grad, Tensor weight, Tensor inputs, Tensor signs, Tensor inverses, "
    "float scale, Tensor? scales, float p, float q, bool mean_subtract, int checkpoint_every, "
    "bool weight_grad, int block_depth=1, str norm='', bool activate_first=False) -> (Tensor, Tensor)",
    _residual_stack_backward,
    _residual_stack_backward_fake,
)
register_autograd("residual_stack", _residual_stack_autograd, _residual_stack_context)


def check_block(norm: str | None, activate: str) -> None:
    """Raise a ValueError if no block has that norm or that order."""
    if norm is not None:
        one_of("norm", norm, NORMS)
    one_of("activate", activate, ("after", "before"))
    if norm is not None and activate == "before":
        raise ValueError(f"activate='before' goes without a norm, got norm={norm!r}")


def residual_stack(
    x: Tensor,
    weight: Tensor,
    scale: float | Tensor,
    *,
    activation: str | tuple[float, float] = "abs",
    mean_subtract: bool = True,
    checkpoint_every: int | None = None,
    block_depth: int = 1,
    norm: str | None = None,
    activate: str = "after",
) -> Tensor:
    """L residual blocks: for l = 1..L, h = x W_l^T and x <- x + scale * (phi(h) - mean(phi(h))).

    Backward, g being the gradient of x_L: for l = L..1, u = scale * (g - mean(g)), d = u * phi'(h_l),
    dW_l = d^T x_{l-1}, g <- g + d W_l.  Saved are x_{l-1} and one bit per activation; with
    `checkpoint_every=c` every c-th x_l only, and the rest is recomputed in segments.

    A deeper block is z <- phi(z W_lj^T) for j = 1..k from z = x, and x <- x + scale * (z - mean(z)).  With
    a norm it begins with z = norm(x), `layer`: (x - mean) / sqrt(var + 1e-5), `rms`: x / sqrt(mean(x^2)
    + 1e-5), neither with parameters.  With `activate="before"` every layer is z <- phi(z) W_lj^T instead.

    Args:
        x: (*P, B, n), P being the dimensions of a population of networks, B rows and n the width;
            float32, float64, bfloat16 or float16.
        weight: (*P, L k, n, n), L >= 0, the k weights of a block one after another, of the dtype of x;
            or bfloat16/float16 beside a float32 x, which is what autocast makes of a float32 weight.
            GEMM operands are of this dtype, while the residual stream and all sums are float32
            (float64 for float64).
        scale: the branch multiplier: a finite number, or a tensor of shape (*P,).  It gets no gradient.
        activation: `identity`, `relu`, `abs`, `leaky_relu`, or slopes (p, q).
        mean_subtract: whether the mean over the last dimension is subtracted.
        checkpoint_every: None, or the number of blocks between two kept x_l.
        block_depth: k, the layers of a block.
        norm: None, `layer` or `rms`.
        activate: `after` or `before` the products; `before` only without a norm.

    Returns:
        x_L, of the shape and dtype of x; under autocast float32.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
    """
    p, q = slopes(activation)
    layers = integer("block_depth", block_depth, 1)
    check_block(norm, activate)
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
    if depth % layers:
        raise ValueError(
            f"weight must hold whole blocks of block_depth={layers} layers, got {depth} layers"
        )
    mixed = x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
    check_same("weight", weight, "x", x, dtype=not mixed)
    every = 0 if checkpoint_every is None else integer("checkpoint_every", checkpoint_every, 1)
    factor, scales = multiplier(scale, x, lead)
    members = math.prod(lead)
    y, *_ = call(
        "residual_stack",
        x.reshape(members, x.shape[-2], n),
        weight.reshape(members, depth, n, n),
        *(factor, scales, p, q, mean_subtract, every),
        needs_grad(x) or needs_grad(weight),
        *(layers, norm or "", activate == "before"),
    )
    return y.view(x.shape)
