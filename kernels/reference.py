"""Every operator in plain PyTorch: the definition of what the other backends compute.

Tensors come here checked and flattened: x and h are (P, rows, n), weights (P, L, n, n), P being the
number of networks in a population, 1 for a single network.  The branch multiplier of member m is
`scale * scales[m]`, or `scale` where `scales` is None.  Without `save`, the forward passes are
ordinary differentiable PyTorch.

Precision: the residual stream and all sums are float32 (float64 for float64 inputs); GEMM operands
are in the weight's dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    return []


def details() -> str:
    return "plain PyTorch, any device"


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slope(nonnegative: Tensor, p: float, q: float, dtype: torch.dtype) -> Tensor:
    """phi'(h) = p if h >= 0 else -q."""
    minus_q = torch.full((), -q, dtype=dtype, device=nonnegative.device)
    return torch.where(nonnegative, torch.full_like(minus_q, p), minus_q)


def multiplier(scale: float, scales: Tensor | None, dtype: torch.dtype) -> float | Tensor:
    """The branch multipliers as a factor of (P, rows, n) tensors."""
    return scale if scales is None else (scale * scales).to(dtype)[:, None, None]


def subtract_mean(z: Tensor, mean_subtract: bool) -> Tensor:
    return z - z.mean(-1, keepdim=True) if mean_subtract else z


def sign_bytes(n: int) -> int:
    """Bytes that hold the signs of a row of n elements."""
    return (n + 7) // 8


def pack_signs(h: Tensor) -> Tensor:
    """Bits of h >= 0, eight to a byte, lowest first: (..., n) -> uint8 (..., ceil(n/8))."""
    bits = torch.nn.functional.pad((h >= 0).to(torch.uint8), (0, -h.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=h.device)
    return (bits.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(signs: Tensor, n: int) -> Tensor:
    """The inverse of `pack_signs`, as booleans."""
    shifts = torch.arange(8, dtype=torch.uint8, device=signs.device)
    return ((signs.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :n].bool()


def scaled_residual(
    x: Tensor,
    h: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """x + scale * (phi(h) - mean(phi(h))), and the packed signs of h if they are to be saved."""
    dtype = stream_dtype(x.dtype)
    wide = h.to(dtype)
    z = wide * slope(wide >= 0, p, q, dtype)
    branch = multiplier(scale, scales, dtype) * subtract_mean(z, mean_subtract)
    y = (x.to(dtype) + branch).to(x.dtype)
    return y, pack_signs(h) if save else h.new_empty(0, dtype=torch.uint8)


def scaled_residual_backward(
    grad: Tensor,
    signs: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
) -> Tensor:
    """The gradient of h; that of x is `grad` itself.  Mean subtraction is its own adjoint."""
    dtype = stream_dtype(grad.dtype)
    u = multiplier(scale, scales, dtype) * subtract_mean(grad.to(dtype), mean_subtract)
    return (u * slope(unpack_signs(signs, grad.shape[-1]), p, q, dtype)).to(grad.dtype)


def residual_stack(
    x: Tensor,
    weight: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """For l = 1..L: h = x W_l^T, x <- x + scale * (phi(h) - mean(phi(h))).

    Also returns, if they are to be saved, x_0 .. x_{L-1} in the weight's dtype as (P, L, rows, n) and
    the packed signs of h_1 .. h_L as (P, L, rows, ceil(n/8)).
    """
    dtype = stream_dtype(x.dtype)
    stream, inputs, signs = x.to(dtype), [], []
    for layer in weight.unbind(1):
        operand = stream.to(weight.dtype)
        h = operand.to(dtype) @ layer.to(dtype).mT
        stream, layer_signs = scaled_residual(stream, h, scale, scales, p, q, mean_subtract, save)
        inputs.append(operand)
        signs.append(layer_signs)
    y = stream.to(x.dtype)
    if not save:
        return y, weight.new_empty(0), x.new_empty(0, dtype=torch.uint8)
    return y, torch.stack(inputs, 1), torch.stack(signs, 1)


def residual_stack_backward(
    grad: Tensor,
    weight: Tensor,
    inputs: Tensor,
    signs: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
    grad_weight: Tensor | None,
) -> Tensor:
    """For l = L..1: u = scale * (g - mean(g)), d = u * phi'(h_l), dW_l = d^T x_{l-1}, g <- g + d W_l.

    The dW are written to `grad_weight`, (P, L, n, n) with contiguous layers, unless it is None.
    """
    dtype = stream_dtype(grad.dtype)
    g = grad.to(dtype)
    for layer in reversed(range(weight.shape[1])):
        d = scaled_residual_backward(g, signs[:, layer], scale, scales, p, q, mean_subtract)
        d = d.to(weight.dtype).to(dtype)
        if grad_weight is not None:
            grad_weight[:, layer] = d.mT @ inputs[:, layer].to(dtype)
        g = g + d @ weight[:, layer].to(dtype)
    return g.to(grad.dtype)


def adamw_step_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    eps: Tensor,
    weight_decay: Tensor,
    leading: list[int],
    beta1: float,
    beta2: float,
    decoupled: bool,
) -> None:
    """One Adam step, in place; see `depthnet.kernels.adamw_step_`."""
    rates = per_tensor(params, leading, lr, eps, weight_decay)
    tensors = zip(params, grads, exp_avgs, exp_avg_sqs, steps, rates, strict=True)
    for param, grad, m, v, step, (tensor_lr, tensor_eps, decay) in tensors:
        dtype = stream_dtype(param.dtype)
        step += 1
        t = step.to(param.device, torch.float64)
        bias1, bias2 = 1 - beta1**t, 1 - beta2**t
        p, g = param.to(dtype), grad.to(dtype)
        if decoupled:
            p = p * (1 - tensor_lr * decay).to(dtype)
        else:
            g = g + decay.to(dtype) * p
        new_m = torch.lerp(m.to(dtype), g, 1 - beta1)
        new_v = beta2 * v.to(dtype) + (1 - beta2) * g * g
        denominator = new_v.sqrt() / bias2.sqrt().to(dtype) + tensor_eps.to(dtype)
        param.copy_(p - (tensor_lr / bias1).to(dtype) * (new_m / denominator))
        m.copy_(new_m)
        v.copy_(new_v)


def sgd_step_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    lr: Tensor,
    weight_decay: Tensor,
    leading: list[int],
    momentum: float,
    dampening: float,
    nesterov: bool,
    decoupled: bool,
) -> None:
    """One SGD step, in place; see `depthnet.kernels.sgd_step_`."""
    buffers = momentum_buffers or [None] * len(params)
    rates = per_tensor(params, leading, lr, weight_decay)
    for param, grad, buffer, (tensor_lr, decay) in zip(params, grads, buffers, rates, strict=True):
        dtype = stream_dtype(param.dtype)
        p, g = param.to(dtype), grad.to(dtype)
        if decoupled:
            p = p * (1 - tensor_lr * decay).to(dtype)
        else:
            g = g + decay.to(dtype) * p
        if buffer is not None:
            new_buffer = momentum * buffer.to(dtype) + (1 - dampening) * g
            buffer.copy_(new_buffer)
            g = g + momentum * new_buffer if nesterov else new_buffer
        param.copy_(p - tensor_lr.to(dtype) * g)


def per_tensor(params: list[Tensor], leading: list[int], *tables: Tensor):
    """Cut tables with one entry per slice into factors that broadcast against each tensor."""
    start = 0
    for param, dims in zip(params, leading, strict=True):
        lead = param.shape[:dims]
        shape = (*lead, *[1] * (param.ndim - dims))
        end = start + lead.numel()
        yield tuple(table[start:end].reshape(shape) for table in tables)
        start = end
