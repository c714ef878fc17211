"""The operators: argument checks, torch.library registration, autograd, choice of backend.

A public function checks and flattens its arguments and calls the registered op; the op's one
implementation, for every device, asks the backends in turn.  What is saved for the backward pass
has the same layout in every backend.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from depthnet.kernels import cpu, reference
from depthnet.kernels.activations import slopes
from torch import Tensor

from depthnet._checks import integer, one_of

BACKENDS = {"cpu": cpu, "reference": reference}  # in the order in which `auto` tries them
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# ---- choice of backend ----

_choice = one_of(
    "DEPTHNET_BACKEND", os.environ.get("DEPTHNET_BACKEND", "auto"), ["auto", *BACKENDS]
)


@contextmanager
def use_backend(name: str):
    """Run the operators inside the `with` block on one backend: `reference`, `cpu`, or `auto`.

    The choice is the process's, like torch.backends' flags, so that the autograd engine's threads see
    it.  DEPTHNET_BACKEND sets it at import.  A named backend that cannot run an operator raises a
    RuntimeError with every backend's reasons; `auto` takes the first that can.

    Raises:
        ValueError: there is no backend of that name.
    """
    global _choice
    previous, _choice = _choice, one_of("backend", name, ["auto", *BACKENDS])
    try:
        yield
    finally:
        _choice = previous


class BackendStatus(NamedTuple):
    """One backend: whether it can run on this machine, why not, and what it is made of."""

    name: str
    active: bool
    reasons: list[str]
    details: str


def backends() -> list[BackendStatus]:
    """Every backend, in the order in which `auto` tries them."""
    status = []
    for name, backend in BACKENDS.items():
        reasons = backend.unsupported("scaled_residual")
        status.append(
            BackendStatus(name, not reasons, reasons, "" if reasons else backend.details())
        )
    return status


def _select(op: str, *tensors: Tensor):
    names = BACKENDS if _choice == "auto" else [_choice]
    for name in names:
        if not BACKENDS[name].unsupported(op, *tensors):
            return BACKENDS[name]
    reasons = "".join(
        f"\n  {name}: {'; '.join(backend.unsupported(op, *tensors)) or 'can run it'}"
        for name, backend in BACKENDS.items()
    )
    raise RuntimeError(f"backend {_choice!r} was asked for and cannot run {op}:{reasons}")


# ---- registration ----

_library = torch.library.Library("depthnet", "DEF")


def _autocast(tensor: Tensor) -> bool:
    device = tensor.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _register(schema: str, implementation, fake) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def run(first, *args):
        # In which dtype each step is computed is the operator's own matter, also inside autocast.
        tensor = first if isinstance(first, Tensor) else first[0]
        if _autocast(tensor):
            with torch.autocast(tensor.device.type, enabled=False):
                return implementation(first, *args)
        return implementation(first, *args)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"depthnet::{name}", fake, lib=_library)


def _no_double_backward(op: str) -> None:
    def refuse(ctx, *grads):
        raise RuntimeError(f"depthnet.kernels.{op} cannot be differentiated twice")

    name = f"depthnet::{op}_backward"
    torch.library.register_autograd(name, refuse, lib=_library)


# ---- scaled_residual ----


def _sign_bytes(n):
    return (n + 7) // 8


def _scaled_residual(x, h, *args):
    return _select("scaled_residual", x, h).scaled_residual(x, h, *args)


def _scaled_residual_fake(x, h, scale, scales, p, q, mean_subtract, save):
    members, rows, n = x.shape
    shape = (members, rows, _sign_bytes(n)) if save else (0,)
    return x.new_empty(x.shape), x.new_empty(shape, dtype=torch.uint8)


def _scaled_residual_backward(grad, *args):
    return _select("scaled_residual", grad).scaled_residual_backward(grad, *args)


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
        grad_h = torch.ops.depthnet.scaled_residual_backward(grad, signs, scale, scales, *rest)
    return grad, grad_h, None, None, None, None, None, None


_register(
    "scaled_residual(Tensor x, Tensor h, float scale, Tensor? scales, float p, float q, "
    "bool mean_subtract, bool save) -> (Tensor y, Tensor signs)",
    _scaled_residual,
    _scaled_residual_fake,
)
_register(
    "scaled_residual_backward(Tensor grad, Tensor signs, float scale, Tensor? scales, float p, "
    "float q, bool mean_subtract) -> Tensor",
    _scaled_residual_backward,
    _scaled_residual_backward_fake,
)
torch.library.register_autograd(
    "depthnet::scaled_residual",
    _scaled_residual_autograd,
    setup_context=_scaled_residual_context,
    lib=_library,
)
_no_double_backward("scaled_residual")


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
    _check_float_tensor("x", x)
    _check_float_tensor("h", h)
    if _autocast(x):
        h = h.to(x.dtype)
    if x.ndim == 0 or h.shape != x.shape:
        raise ValueError(f"h must have the shape of x, {_shape(x)}, got {_shape(h)}")
    _check_same("h", h, "x", x)
    factor, scales = _multiplier(scale, x, None)
    members = 1 if scales is None else scales.numel()
    rows = math.prod(x.shape[:-1]) // max(members, 1)
    flat = (members, rows, x.shape[-1])
    y, _ = torch.ops.depthnet.scaled_residual(
        x.reshape(flat), h.reshape(flat), factor, scales, p, q, mean_subtract, _needs_grad(h)
    )
    return y.view(x.shape)


# ---- residual_stack ----


def _segments(depth: int, every: int) -> list[tuple[int, int]]:
    """The layers in runs of `every`; `every` = 0 is one run."""
    every = every or max(depth, 1)
    return [(start, min(start + every, depth)) for start in range(0, depth, every)]


def _residual_stack(x, weight, scale, scales, p, q, mean_subtract, every, save):
    if weight.shape[1] == 0:  # no layers: an op returns new tensors all the same
        rest = _residual_stack_fake(x, weight, scale, scales, p, q, mean_subtract, every, save)[1:]
        return x.clone(), *rest
    backend = _select("residual_stack", x, weight)
    if not (every and save):
        return backend.residual_stack(x, weight, scale, scales, p, q, mean_subtract, save)
    # Between segments the stream stays in the precision that it is computed in, so that the backward
    # pass starts each segment from what the forward pass had, not from a rounded copy.
    stream = x.to(reference.stream_dtype(x.dtype))
    starts = []
    for start, end in _segments(weight.shape[1], every):
        starts.append(stream)
        stream, _, _ = backend.residual_stack(
            stream, weight[:, start:end], scale, scales, p, q, mean_subtract, False
        )
    return stream.to(x.dtype), torch.stack(starts, 1), _no_signs(x)


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
        inputs = x.new_empty(members, kept, rows, n, dtype=reference.stream_dtype(x.dtype))
        return y, inputs, _no_signs(x)
    signs = x.new_empty(members, depth, rows, _sign_bytes(n), dtype=torch.uint8)
    return y, weight.new_empty(members, depth, rows, n), signs


def _residual_stack_backward(
    grad, weight, inputs, signs, scale, scales, p, q, mean_subtract, every, weight_grad
):
    if weight.shape[1] == 0:
        return grad.clone(), torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    backend = _select("residual_stack", grad, weight)
    constants = scale, scales, p, q, mean_subtract
    if not every:
        return backend.residual_stack_backward(grad, weight, inputs, signs, *constants, weight_grad)
    g = grad.to(reference.stream_dtype(grad.dtype))
    grad_weight = torch.empty_like(weight) if weight_grad else weight.new_empty(0)
    segments = _segments(weight.shape[1], every)
    for index, (start, end) in reversed(list(enumerate(segments))):
        layers = weight[:, start:end]
        _, x, s = backend.residual_stack(inputs[:, index], layers, *constants, True)
        g, segment_grad = backend.residual_stack_backward(g, layers, x, s, *constants, weight_grad)
        if weight_grad:
            grad_weight[:, start:end] = segment_grad
    return g.to(grad.dtype), grad_weight


def _residual_stack_backward_fake(
    grad, weight, inputs, signs, scale, scales, p, q, mean_subtract, every, weight_grad
):
    return grad.new_empty(grad.shape), weight.new_empty(weight.shape if weight_grad else (0,))


def _residual_stack_context(ctx, inputs, output):
    _, weight, scale, scales, *rest = inputs
    _, saved, signs = output
    ctx.mark_non_differentiable(saved, signs)
    ctx.save_for_backward(weight, saved, signs, scales)
    ctx.constants = scale, rest[:4]


def _residual_stack_autograd(ctx, grad, *_):
    weight, saved, signs, scales = ctx.saved_tensors
    scale, rest = ctx.constants
    weight_grad = ctx.needs_input_grad[1]
    grad_x, grad_weight = torch.ops.depthnet.residual_stack_backward(
        grad, weight, saved, signs, scale, scales, *rest, weight_grad
    )
    return grad_x, grad_weight if weight_grad else None, *[None] * 7


_register(
    "residual_stack(Tensor x, Tensor weight, float scale, Tensor? scales, float p, float q, "
    "bool mean_subtract, int checkpoint_every, bool save) -> (Tensor y, Tensor inputs, Tensor signs)",
    _residual_stack,
    _residual_stack_fake,
)
_register(
    "residual_stack_backward(Tensor grad, Tensor weight, Tensor inputs, Tensor signs, float scale, "
    "Tensor? scales, float p, float q, bool mean_subtract, int checkpoint_every, bool weight_grad) "
    "-> (Tensor, Tensor)",
    _residual_stack_backward,
    _residual_stack_backward_fake,
)
torch.library.register_autograd(
    "depthnet::residual_stack",
    _residual_stack_autograd,
    setup_context=_residual_stack_context,
    lib=_library,
)
_no_double_backward("residual_stack")


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
        x_L, of the shape and dtype of x.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device, shape or value.
    """
    p, q = slopes(activation)
    _check_float_tensor("x", x)
    _check_float_tensor("weight", weight)
    if _autocast(x) and x.dtype != torch.float64:
        x, weight = x.float(), weight.to(torch.get_autocast_dtype(x.device.type))
    if weight.ndim < 3 or weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"weight must have the shape (*P, L, n, n), got {_shape(weight)}")
    lead, (depth, n, _) = weight.shape[:-3], weight.shape[-3:]
    if x.ndim != len(lead) + 2 or x.shape[:-2] != lead or x.shape[-1] != n:
        wanted = ", ".join([*map(str, lead), "B", str(n)])
        raise ValueError(
            f"x must have the shape ({wanted}) beside a weight of shape {_shape(weight)}, "
            f"got {_shape(x)}"
        )
    mixed = x.dtype == torch.float32 and weight.dtype in (torch.bfloat16, torch.float16)
    _check_same("weight", weight, "x", x, dtype=not mixed)
    every = 0 if checkpoint_every is None else integer("checkpoint_every", checkpoint_every, 1)
    factor, scales = _multiplier(scale, x, lead)
    members = math.prod(lead)
    y, _, _ = torch.ops.depthnet.residual_stack(
        x.reshape(members, x.shape[-2], n),
        weight.reshape(members, depth, n, n),
        *(factor, scales, p, q, mean_subtract, every),
        _needs_grad(x) or _needs_grad(weight),
    )
    return y.view(x.shape)


# ---- optimizer steps ----


def _adamw_step(params, grads, exp_avgs, exp_avg_sqs, *args):
    backend = _select("adamw_step_", *params, *grads, *exp_avgs, *exp_avg_sqs)
    backend.adamw_step_(params, grads, exp_avgs, exp_avg_sqs, *args)


def _sgd_step(params, grads, momentum_buffers, *args):
    backend = _select("sgd_step_", *params, *grads, *momentum_buffers)
    backend.sgd_step_(params, grads, momentum_buffers, *args)


def _no_output(*args):
    return None


_register(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor lr, Tensor eps, Tensor weight_decay, "
    "int[] leading, float beta1, float beta2, bool decoupled) -> ()",
    _adamw_step,
    _no_output,
)
_register(
    "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, "
    "Tensor weight_decay, int[] leading, float momentum, float dampening, bool nesterov, "
    "bool decoupled) -> ()",
    _sgd_step,
    _no_output,
)


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    betas: tuple[float, float],
    leading: Sequence[int] | None = None,
    decoupled: bool = True,
) -> None:
    """One Adam step for a list of tensors, in place, each slice with rates of its own.

    With t the incremented step: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2 and
    p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps); with `decoupled=False`
    g <- g + wd p takes the place of the factor (1 - lr wd).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: tensors of equal shapes, list by list.
        steps: 0-dim tensors, the number of steps taken so far; incremented.
        lr, eps, weight_decay: a number, or a 1-dim tensor with one entry for each slice, the slices of
            all tensors one after another.
        leading: for each tensor the number d of leading dimensions whose indices are slices of their
            own: shape[0] * ... * shape[d-1] slices.  None: 0 everywhere, one slice a tensor.

    Raises:
        ValueError: the lists or the tables of rates do not fit each other.
    """
    leading, slices = _slices(params, leading)
    _check_lists(params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if len(steps) != len(params):
        raise ValueError(f"steps must have {len(params)} tensors, as params has, got {len(steps)}")
    if not params:
        return
    lr = _table("lr", lr, slices, params[0])
    eps = _table("eps", eps, slices, params[0])
    weight_decay = _table("weight_decay", weight_decay, slices, params[0])
    torch.ops.depthnet.adamw_step_(
        *(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps)),
        *(lr, eps, weight_decay, leading, *betas, decoupled),
    )


def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    leading: Sequence[int] | None = None,
    decoupled: bool = False,
) -> None:
    """One SGD step for a list of tensors, in place, each slice with rates of its own.

    g <- g + wd p (or, `decoupled`, p <- p (1 - lr wd)); b <- momentum b + (1 - dampening) g;
    g <- g + momentum b if `nesterov` else b; p <- p - lr g.  Without momentum buffers the two middle
    steps are left out.  `lr`, `weight_decay` and `leading` are those of `adamw_step_`.

    Raises:
        ValueError: the lists or the tables of rates do not fit each other.
    """
    leading, slices = _slices(params, leading)
    _check_lists(params, grads=grads)
    if momentum_buffers:
        _check_lists(params, momentum_buffers=momentum_buffers)
    if not params:
        return
    lr = _table("lr", lr, slices, params[0])
    weight_decay = _table("weight_decay", weight_decay, slices, params[0])
    torch.ops.depthnet.sgd_step_(
        *(list(params), list(grads), list(momentum_buffers), lr, weight_decay, leading),
        *(momentum, dampening, nesterov, decoupled),
    )


# ---- checks ----


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _check_float_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")


def _check_same(name: str, tensor: Tensor, other: str, like: Tensor, dtype: bool = True) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {other}, {like.device}, got {tensor.device}"
        )
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {like.dtype}, got {tensor.dtype}")


def _needs_grad(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def _multiplier(scale: object, x: Tensor, lead: torch.Size | None) -> tuple[float, Tensor | None]:
    """A multiplier as (number, None) or (1, float64 tensor over the members)."""
    if not isinstance(scale, Tensor):
        try:
            value = float(scale)
        except (TypeError, ValueError):
            raise TypeError(f"scale must be a number or a tensor, got {scale!r}") from None
        if not math.isfinite(value):
            raise ValueError(f"scale must be finite, got {scale!r}")
        return value, None
    if scale.requires_grad:
        raise ValueError("scale gets no gradient: pass scale.detach(), or a number")
    if not scale.is_floating_point():
        raise TypeError(f"scale must be a floating-point tensor, got {scale.dtype}")
    wanted = x.shape[: scale.ndim] if lead is None else lead
    if scale.shape != wanted or scale.ndim >= x.ndim:
        raise ValueError(
            f"scale must be a number or a tensor over the leading dimensions of x, "
            f"{_shape(x)}, got the shape {_shape(scale)}"
        )
    if scale.device != x.device:
        raise ValueError(f"scale must be on the device of x, {x.device}, got {scale.device}")
    # Reading a device's tensor would wait for the device: only values at hand are checked.
    if (
        scale.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not scale.isfinite().all()
    ):
        raise ValueError(f"scale must be finite, got {scale!r}")
    return 1.0, scale.to(torch.float64).reshape(-1)


def _slices(params: Sequence[Tensor], leading: Sequence[int] | None) -> tuple[list[int], int]:
    leading = [0] * len(params) if leading is None else list(leading)
    if len(leading) != len(params):
        raise ValueError(f"leading must have {len(params)} entries, as params has, got {leading}")
    for index, (param, dims) in enumerate(zip(params, leading, strict=True)):
        if not 0 <= dims <= param.ndim:
            raise ValueError(
                f"leading[{index}] must be 0 to {param.ndim}, the dimensions of its tensor, got {dims}"
            )
    total = sum(param.shape[:dims].numel() for param, dims in zip(params, leading, strict=True))
    return leading, total


def _check_lists(params: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{name} must have {len(params)} tensors, as params has, got {len(tensors)}"
            )
        for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{index}] must have the shape of its parameter, {_shape(param)}, "
                    f"got {_shape(tensor)}"
                )


def _table(name: str, value: float | Tensor, slices: int, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float64)
    if value.ndim not in (0, 1) or (value.ndim == 1 and len(value) != slices):
        raise ValueError(
            f"{name} must be a number or a 1-dim tensor of {slices} entries, one for each slice, "
            f"got the shape {_shape(value)}"
        )
    return value.to(like.device, torch.float64).expand(slices)
