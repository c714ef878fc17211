"""Every operator in plain PyTorch: the definition of what the other backends compute.

Tensors come here checked and flattened: x and h are (P, rows, n), weights (P, L, n, n), P being the
number of networks in a population, 1 for a single network.  The branch multiplier of member m is
`scale * scales[m]`, or `scale` where `scales` is None.  Without `save`, the forward passes are
ordinary differentiable PyTorch.

Precision: the residual stream and all sums are float32 (float64 for float64 inputs); GEMM operands
are in the weight's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from depthnet.kernels.step import StepTables

NORM_EPS = 1e-5  # of the norms that blocks of a stack begin with
FAR = 40.0  # beyond it, of a normal variable: the distribution function is 0 or 1, the density 0


class Block(NamedTuple):
    """What a residual block of a stack computes from x.

    layers: k, the number of its weights.
    norm: `layer` or `rms`, of x, before the first product; empty for none.
    activate_first: W_k phi(.. W_1 phi(x)) instead of phi(W_k .. phi(W_1 x)); only without a norm.
    """

    layers: int = 1
    norm: str = ""
    activate_first: bool = False


PLAIN = Block()


def missing() -> list[str]:
    return []


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    return []


def details() -> str:
    return "plain PyTorch, any device"


def stream_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(x: Tensor) -> tuple[int, int]:
    """How many rows there are in x, (..., n), and n."""
    return math.prod(x.shape[:-1]), x.shape[-1]


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
    bits = functional.pad((h >= 0).to(torch.uint8), (0, -h.shape[-1] % 8))
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


def residual_norm(
    x: Tensor,
    branch: Tensor,
    scale: float,
    weight: Tensor | None,
    bias: Tensor | None,
    center: bool,
    eps: float,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """s = x + scale * branch of (..., n), and (s - mean) / sqrt(var + eps) * weight + bias.

    The mean is 0 without `center`.  Also returns, if they are to be saved, the means (only with `center`)
    and 1 / sqrt(var + eps), (2 or 1, ...).  Weight and bias come in the dtype of the sums.
    """
    dtype = stream_dtype(x.dtype)
    s = (x.to(dtype) + scale * branch.to(dtype)).to(x.dtype)
    wide = s.to(dtype)
    y, rstd = row_norm(wide, "layer" if center else "rms", eps)
    y = y if weight is None else y * weight
    y = y if bias is None else y + bias
    if not save:
        return s, y.to(branch.dtype), wide.new_empty(0)
    statistics = (wide.mean(-1), rstd[..., 0]) if center else (rstd[..., 0],)
    return s, y.to(branch.dtype), torch.stack(statistics)


def residual_norm_backward(
    grad_y: Tensor,
    s: Tensor,
    grad_s: Tensor | None,
    statistics: Tensor,
    scale: float,
    weight: Tensor | None,
    weight_grad: bool,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, branch, weight and bias, the last two empty if they are not wanted."""
    dtype = stream_dtype(s.dtype)
    *mean, rstd = statistics[..., None]
    normalized = (s.to(dtype) - mean[0] if mean else s.to(dtype)) * rstd
    wide = grad_y.to(dtype)
    a = wide if weight is None else wide * weight
    g = row_norm_backward(a, normalized, rstd, "layer" if mean else "rms")
    g = g if grad_s is None else g + grad_s.to(dtype)
    summed = wide * normalized if weight_grad else None, wide if bias_grad else None
    sums = (wide.new_empty(0) if t is None else t.reshape(rows_of(t)).sum(0) for t in summed)
    return g.to(s.dtype), (scale * g).to(grad_y.dtype), *sums


def mlp_activation(h: Tensor, kind: str) -> Tensor:
    """gelu(h), |h| or, for `swiglu`, silu of the first half of h times the second; h is (..., n)."""
    wide = h.to(stream_dtype(h.dtype))
    if kind == "swiglu":
        gate, up = wide.chunk(2, -1)
        y = functional.silu(gate) * up
    elif kind == "gelu":
        # torch's own result for what is very large depends on the processor: x, infinity or NaN.
        y = torch.where(wide > FAR, wide, functional.gelu(wide.clamp(-FAR, FAR)))
    else:
        y = wide.abs()
    return y.to(h.dtype)


def mlp_activation_backward(grad: Tensor, h: Tensor, kind: str) -> Tensor:
    """The gradient of h."""
    dtype = stream_dtype(h.dtype)
    g, wide = grad.to(dtype), h.to(dtype)
    if kind == "swiglu":
        gate, up = wide.chunk(2, -1)
        on = gate.sigmoid()
        silu = gate * on
        d = torch.cat((g * up * (on + silu * (1 - on)), g * silu), -1)
    elif kind == "gelu":
        d = torch.ops.aten.gelu_backward(g, wide.clamp(-FAR, FAR))
    else:
        d = g * wide.sgn()
    return d.to(h.dtype)


def rotary(qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, (B, heads, T, size), of qkv, (B, T, 3, heads, size); q and k turned by the rotation."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    cos, sin = rotation.unbind(1)

    def turned(x):
        wide = x.to(rotation.dtype)
        return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)

    return turned(q), turned(k), v.clone(memory_format=torch.contiguous_format)


def rotary_backward(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor) -> Tensor:
    """The gradient of qkv, of those of q, k and v."""
    cos, sin = rotation.unbind(1)

    def back(g):
        wide = g.to(rotation.dtype)
        return (wide * cos + (wide * sin).roll(g.shape[-1] // 2, -1)).to(g.dtype)

    return torch.stack([part.transpose(1, 2) for part in (back(q), back(k), v)], 2)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T for x (P, rows, in) and weight (P, out, in)."""
    return x @ weight.mT


def embedding_sum(index: Tensor, weight: Tensor) -> Tensor:
    """The sum of the rows of weight (P, features, n) that index, int64 (P, rows, active), names."""
    members, features, n = weight.shape
    if members > 1:
        # Beyond them lie the rows of the next member.  Asynchronous: no wait for a GPU.
        torch._assert_async(
            ((index >= 0) & (index < features)).all(),
            f"index must hold indices of features, from 0 to {features - 1}",
        )
    rows = _table_rows(index, features).flatten(0, 1)
    sums = functional.embedding_bag(rows, weight.reshape(-1, n), mode="sum")
    return sums.view(*index.shape[:2], n)


def embedding_sum_backward(grad: Tensor, index: Tensor, features: int) -> Tensor:
    """The gradient of the weight: row by row the sum of the gradients of where it was added."""
    members, _, n = grad.shape
    rows = _table_rows(index, features).flatten()
    each = grad[:, :, None].expand(*index.shape, n).reshape(-1, n)
    table = grad.new_zeros(members * features, n)
    return table.index_add_(0, rows, each).view(members, features, n)


def _table_rows(index: Tensor, features: int) -> Tensor:
    """Where the features lie when the tables of all members are one."""
    return index + features * torch.arange(len(index), device=index.device)[:, None, None]


def row_norm(x: Tensor, norm: str, eps: float = NORM_EPS) -> tuple[Tensor, Tensor]:
    """(x - mean) / std, or without the mean for `rms`, over the last dimension; and 1/std, (..., 1)."""
    centered = subtract_mean(x, norm == "layer")
    inverse = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    return centered * inverse, inverse


def row_norm_backward(grad: Tensor, y: Tensor, inverse: Tensor, norm: str) -> Tensor:
    """The gradient of x, y and `inverse` being what `row_norm` gave."""
    projected = grad - y * (grad * y).mean(-1, keepdim=True)
    return inverse * subtract_mean(projected, norm == "layer")


def residual_stack(
    x: Tensor,
    weight: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
    block: Block,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks of k layers, of which the last one's result z is added: x <- x + scale * (z - mean(z)).

    Weights are (P, L k, n, n), layer by layer.  Also returns, if they are to be saved, what each layer's
    weight is multiplied by, in the weight's dtype, as (P, L k, rows, n); the packed signs of what phi is
    taken of, as (P, L k, rows, ceil(n/8)), in the order of computation; and the 1/std of the norms,
    (P, L, rows), empty without a norm.
    """
    dtype = stream_dtype(x.dtype)
    stream, inputs, signs, inverses = x.to(dtype), [], [], []

    def phi(h):
        if save:
            signs.append(pack_signs(h))
        return h * slope(h >= 0, p, q, dtype)

    for layers in _blocks(weight.unbind(1), block):
        operand = stream
        if block.norm:
            operand, inverse = row_norm(stream, block.norm)
            inverses.append(inverse.squeeze(-1))
        for layer in layers:
            operand = (phi(operand) if block.activate_first else operand).to(weight.dtype)
            inputs.append(operand)
            h = operand.to(dtype) @ layer.to(dtype).mT
            operand = h if block.activate_first else phi(h)
        branch = subtract_mean(operand, mean_subtract)
        stream = stream + multiplier(scale, scales, dtype) * branch
    y = stream.to(x.dtype)
    no_inverses = x.new_empty(0, dtype=dtype)
    if not save:
        return y, weight.new_empty(0), x.new_empty(0, dtype=torch.uint8), no_inverses
    inverse = torch.stack(inverses, 1) if inverses else no_inverses
    return y, torch.stack(inputs, 1), torch.stack(signs, 1), inverse


def _blocks(layers: Sequence, block: Block) -> list[Sequence]:
    return [layers[start : start + block.layers] for start in range(0, len(layers), block.layers)]


def residual_stack_backward(
    grad: Tensor,
    weight: Tensor,
    inputs: Tensor,
    signs: Tensor,
    inverses: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
    block: Block,
    grad_weight: Tensor | None,
) -> Tensor:
    """Block by block from the last: u = scale * (g - mean(g)), then layer by layer d = u * phi'(h_l),
    dW_l = d^T z_{l-1}, u = d W_l, z_{l-1} being what W_l was multiplied by; then g <- g + u, through the
    norm's derivative where there is one.

    The dW are written to `grad_weight`, (P, L k, n, n) with contiguous layers, unless it is None.
    """
    dtype = stream_dtype(grad.dtype)
    n, g = grad.shape[-1], grad.to(dtype)

    def through_phi(u, layer):
        return u * slope(unpack_signs(signs[:, layer], n), p, q, dtype)

    for index, layers in reversed(list(enumerate(_blocks(range(weight.shape[1]), block)))):
        u = multiplier(scale, scales, dtype) * subtract_mean(g, mean_subtract)
        for layer in reversed(layers):
            d = u if block.activate_first else through_phi(u, layer)
            d = d.to(weight.dtype).to(dtype)
            if grad_weight is not None:
                grad_weight[:, layer] = d.mT @ inputs[:, layer].to(dtype)
            u = d @ weight[:, layer].to(dtype)
            u = through_phi(u, layer) if block.activate_first else u
        if block.norm:
            y = inputs[:, layers[0]].to(dtype)
            u = row_norm_backward(u, y, inverses[:, index, :, None], block.norm)
        g = g + u
    return g.to(grad.dtype)


def optimizer_step_(tables: StepTables) -> None:
    """One step of Adam or SGD, in place; see `depthnet.kernels.adamw_step_` and `sgd_step_`.

    With `found_inf` it waits for the device.
    """
    if tables.found_inf is not None and tables.found_inf.item():
        return
    device = tables.scales.device
    factor = gradient_factor(
        tables.columns["grad"], tables.grad_scale, tables.max_grad_norm, device
    )
    update = _adam if tables.rule == "adam" else _sgd
    first_slice = 0
    for index, param in enumerate(tables.params):
        row = {name: column[index] for name, column in tables.columns.items()}
        group = tables.groups[tables.group[index]]
        dims = tables.leading[index]
        end = first_slice + tables.slices[index]
        scales = tables.scales[:, first_slice:end]
        lr, eps, decay = scales.reshape(3, *param.shape[:dims], *[1] * (param.ndim - dims))
        lr = lr * tables.lrs.get(tables.group[index], group["lr"])
        rates = lr, eps * group["eps"], decay * group["weight_decay"]
        first_slice = end

        dtype = stream_dtype(param.dtype)
        p = (param if row["master"] is None else row["master"]).to(dtype)
        g = row["grad"].to(dtype) * (-factor if group["maximize"] else factor).to(dtype)
        if row["step"] is not None:
            row["step"] += 1
        p = update(p, g, row, group, rates, tables.fresh[index])
        if row["master"] is not None:
            row["master"].copy_(p)
        elif tables.rounding[index] and param.dtype.itemsize == 2:
            p = _round_stochastically(p, param.dtype, tables.rounding[index], row["step"])
        param.copy_(p)


def gradient_factor(
    grads: list[Tensor], grad_scale: Tensor | None, max_norm: float | None, device: torch.device
) -> Tensor:
    """float64: what gradients are multiplied by, to undo their scale and to bring them down to a norm."""
    factor = torch.ones((), dtype=torch.float64, device=device)
    if grad_scale is not None:
        factor = factor / grad_scale.to(device, torch.float64).reshape(())
    if max_norm is not None:
        norms = [torch.linalg.vector_norm(g, dtype=stream_dtype(g.dtype)) for g in grads]
        norm = torch.stack([each.to(device, torch.float64) for each in norms]).norm() * factor
        factor = factor * (max_norm / (norm + 1e-6)).clamp(max=1)
    return factor


def _adam(
    p: Tensor, g: Tensor, row: dict, group, rates: tuple[Tensor, Tensor, Tensor], fresh: bool
) -> Tensor:
    """The new parameter; updates the moments."""
    lr, eps, decay = rates
    m, v, greatest = row["state0"], row["state1"], row["state2"]
    beta1, beta2 = float(group["beta1"]), float(group["beta2"])
    t = row["step"].to(p.device, torch.float64)
    bias1, bias2 = 1 - beta1**t, 1 - beta2**t
    p, g = _decayed(p, g, group, lr, decay)
    new_m = torch.lerp(m.to(p.dtype), g, 1 - beta1)
    new_v = beta2 * v.to(p.dtype) + (1 - beta2) * g * g
    m.copy_(new_m)
    v.copy_(new_v)
    if greatest is not None:
        new_v = torch.maximum(greatest.to(p.dtype), new_v)
        greatest.copy_(new_v)
    denominator = new_v.sqrt() / bias2.sqrt().to(p.dtype) + eps.to(p.dtype)
    return p - (lr / bias1).to(p.dtype) * (new_m / denominator)


def _sgd(
    p: Tensor, g: Tensor, row: dict, group, rates: tuple[Tensor, Tensor, Tensor], fresh: bool
) -> Tensor:
    """The new parameter; updates the momentum buffer."""
    lr, _, decay = rates
    buffer = row["state0"]
    momentum, dampening = float(group["beta1"]), float(group["beta2"])
    p, g = _decayed(p, g, group, lr, decay)
    if buffer is not None:
        new_buffer = momentum * buffer.to(p.dtype) + (1.0 if fresh else 1 - dampening) * g
        buffer.copy_(new_buffer)
        g = g + momentum * new_buffer if group["nesterov"] else new_buffer
    return p - lr.to(p.dtype) * g


def _decayed(p: Tensor, g: Tensor, group, lr: Tensor, decay: Tensor) -> tuple[Tensor, Tensor]:
    """Parameter and gradient after weight decay."""
    if group["decoupled"]:
        return p * (1 - lr * decay).to(p.dtype), g
    decay = decay.to(p.dtype)
    return p, torch.where(decay != 0, g + decay * p, g)  # without decay an infinite p is no matter


def _round_stochastically(p: Tensor, dtype: torch.dtype, rounding: int, step: Tensor) -> Tensor:
    """float32 p rounded to `dtype` up or down, in expectation to p itself, with bits that depend on
    (rounding, step, element) only; csrc/math/step.h says which."""

    def scramble(x: Tensor) -> Tensor:  # 32-bit arithmetic in int64
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = x ^ (x >> 15)
        low, high = x & 0xFFFF, x >> 16  # the product of 32 by 32 bits would overflow
        x = (low * 0x846CA68B + ((high * 0x846CA68B & 0xFFFF) << 16)) & 0xFFFFFFFF
        return x ^ (x >> 16)

    element = torch.arange(p.numel(), device=p.device).reshape(p.shape)
    key = scramble(torch.tensor(rounding, device=p.device)) ^ step.to(p.device, torch.int64)
    key = scramble(scramble(key) ^ (element >> 32))
    bits = scramble(scramble(element & 0xFFFFFFFF) ^ key)

    word = p.contiguous().view(torch.int32)
    if dtype == torch.bfloat16:
        moved = ((word + (bits >> 16).to(torch.int32)) & -0x10000).view(torch.float32)
    else:
        # |p| = fraction * 2^exponent, fraction in [0.5, 1); below 2^-14 halves are subnormal.
        _, exponent = torch.frexp(p.abs().clamp(min=2**-14))
        last = torch.ldexp(torch.ones_like(p), exponent - 11)
        moved = p.abs() + (bits >> 19).to(p.dtype) * 2**-13 * last
        normal = (moved.view(torch.int32) & -0x2000).view(torch.float32)
        subnormal = (moved * 2**24).trunc() * 2**-24
        moved = torch.where(moved < 2**-14, subnormal, normal).copysign(p)
    return torch.where(p.isfinite(), moved, p)
