"""The residual stack on a GPU: which kernels run in which order, and the memory between them.

`stack_plan` chooses the regime and the tiles by the sizes alone; blocks that are not plain always run in
the regime `gemm`.  See docs/gpu_kernels.md.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from depthnet.kernels.planning import Launch, Plan, arch_of, kind_of, shared_limit, stack_plan
from depthnet.kernels.reference import (
    PLAIN,
    Block,
    row_norm,
    row_norm_backward,
    sign_bytes,
    stream_dtype,
)
from depthnet.kernels.triton import INTERPRETED
from depthnet.kernels.triton.residual import residual_backward, residual_forward
from depthnet.kernels.triton.stack_layers import (
    layer_backward_data_kernel,
    layer_finish_kernel,
    layer_forward_kernel,
)
from depthnet.kernels.triton.stack_narrow import (
    narrow_backward_data_kernel,
    narrow_forward_kernel,
)
from depthnet.kernels.triton.weight_gradient import weight_gradient_kernel

# A finished row is only moved; tiles of this size keep its accesses wide and programs many.
FINISH_ROWS, FINISH_COLUMNS = 16, 256


class _Constants(NamedTuple):
    """What all layers share."""

    scale: float
    scales: Tensor | None
    p: float
    q: float
    mean_subtract: bool


class _Run(NamedTuple):
    """A plan, and the keyword arguments of its kernels."""

    plan: Plan
    forward: dict
    backward_data: dict
    backward_weight: dict


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
    """See `depthnet.kernels.reference.residual_stack`."""
    members, rows, n = x.shape
    depth = weight.shape[1]
    x = x.contiguous()
    y = torch.empty_like(x)
    shape = (members, depth, rows, n) if save else 0
    inputs = torch.empty(shape, dtype=weight.dtype, device=x.device)
    shape = (members, depth, rows, sign_bytes(n)) if save else 0
    signs = torch.empty(shape, dtype=torch.uint8, device=x.device)
    shape = (members, depth // block.layers, rows) if save and block.norm else 0
    inverses = torch.empty(shape, dtype=stream_dtype(x.dtype), device=x.device)
    if y.numel():
        scales = None if scales is None else scales.contiguous()
        constants = _Constants(scale, scales, p, q, mean_subtract)
        sizes = members, rows, n, depth, kind_of(weight.dtype), x.device.index, mean_subtract
        run = prepared(*sizes) if block == PLAIN else None
        forward = {"narrow": _narrow_forward, "layers": _layers_forward}
        saved = (inputs, signs) if save else (None, None)
        with torch.cuda.device_of(x):
            if run and run.plan.regime in forward:
                forward[run.plan.regime](run, x, weight, y, *saved, constants)
            else:
                _gemm_forward(x, weight, y, *saved, inverses, constants, block)
    return y, inputs, signs, inverses


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
    """See `depthnet.kernels.reference.residual_stack_backward`."""
    members, depth, rows, n = inputs.shape
    grad = grad.contiguous()
    grad_x = torch.empty_like(grad)
    if grad.numel():
        scales = None if scales is None else scales.contiguous()
        constants = _Constants(scale, scales, p, q, mean_subtract)
        sizes = members, rows, n, depth, kind_of(weight.dtype), grad.device.index, mean_subtract
        run = prepared(*sizes) if block == PLAIN else None
        backward = {"narrow": _narrow_backward, "layers": _layers_backward}
        tensors = grad, weight, inputs, signs
        with torch.cuda.device_of(grad):
            if run and run.plan.regime in backward:
                backward[run.plan.regime](run, *tensors, grad_x, grad_weight, constants)
            else:
                _gemm_backward(*tensors, inverses, grad_x, grad_weight, constants, block)
    elif grad_weight is not None:
        grad_weight.zero_()
    return grad_x


@lru_cache(4096)
def prepared(
    members: int,
    rows: int,
    n: int,
    depth: int,
    kind: str,
    device: int | None,
    mean_subtract: bool,
) -> _Run:
    """What a call launches; found once, because a short stack takes less time than finding it."""
    arch, limit = ("sm_80", 1 << 20) if INTERPRETED else (arch_of(device), shared_limit(device))
    plan = stack_plan(members, rows, n, depth, kind, arch, limit)
    precision = "tf32" if kind == "tf32" else "ieee"

    def options(launch: Launch, **more) -> dict:
        tile = launch.tile
        if tile is None:
            return {}
        return {
            "WIDTH": n,
            "PRECISION": precision,
            "ROWS": tile.rows,
            "COLUMNS": tile.columns,
            "SLAB": tile.slab,
            "num_warps": tile.warps // 2 if torch.version.hip else tile.warps,
            "num_stages": tile.stages,
            # Products are contracted with sums whatever the environment says, as in the CPU's kernels.
            "enable_fp_fusion": True,
            **more,
        }

    return _Run(
        plan,
        options(plan.forward[0], MEAN_SUBTRACT=mean_subtract),
        options(plan.backward_data[0], MEAN_SUBTRACT=mean_subtract),
        options(plan.backward_weight[0]),
    )


def _narrow_forward(run, x, weight, y, inputs, signs, constants):
    (launch,) = run.plan.forward
    rows = x.shape[1]
    if inputs is None and launch.tile.slab < launch.tile.columns:
        inputs = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    scale, scales, p, q, _ = constants
    narrow_forward_kernel[(launch.programs,)](
        *(x, weight, y, inputs, signs, scales, weight.stride(0), weight.stride(1)),
        *(rows, weight.shape[1], scale, p, q),
        **run.forward,
    )


def _narrow_backward(run, grad, weight, inputs, signs, grad_x, grad_weight, constants):
    (launch,) = run.plan.backward_data
    rows = grad.shape[1]
    d = torch.empty_like(inputs)
    sharing = _sharing(run, grad_weight)
    scale, scales, p, q, _ = constants
    narrow_backward_data_kernel[(launch.programs,)](
        *(grad, weight, grad_x, d, signs, scales, *sharing[1:]),
        *(weight.stride(0), weight.stride(1), rows, weight.shape[1], scale, p, q),
        **run.backward_data,
    )
    _weight_gradient(run, d, inputs, grad_weight, sharing)


def _sharing(run, grad_weight) -> tuple[Tensor | None, Tensor | None, int]:
    """Where programs share tiles of the weights' gradient: memory for parts, counters, their number.

    backward-data clears the counters; it runs before anyhow.
    """
    (launch,) = run.plan.backward_weight
    if grad_weight is None or launch.splits == 1:
        return None, None, 0
    size, tiles = launch.tile.rows * launch.tile.columns, launch.programs // launch.splits
    new = grad_weight.new_empty
    return new(launch.programs * size, dtype=torch.float32), new(tiles, dtype=torch.int32), tiles


def _weight_gradient(run, d, inputs, grad_weight, sharing):
    if grad_weight is None:
        return
    (launch,) = run.plan.backward_weight
    _, depth, rows, _ = inputs.shape
    weight_gradient_kernel[(launch.programs,)](
        *(d, inputs, grad_weight, *sharing[:2], grad_weight.stride(0), rows, depth, launch.splits),
        **run.backward_weight,
    )


def _row_sums(launch: Launch, x: Tensor) -> Tensor:
    """Memory for the sums of rows over the tiles of columns, for two layers in turn."""
    members, rows, n = x.shape
    tiles = -(-n // launch.tile.columns)
    return torch.empty((2, tiles, members * rows), dtype=torch.float32, device=x.device)


def _layers_forward(run, x, weight, y, inputs, signs, constants):
    launch, _ = run.plan.forward
    members, rows, n = x.shape
    depth = weight.shape[1]
    scale, scales, p, q, mean_subtract = constants
    sums = _row_sums(launch, x) if mean_subtract else (None, None)
    streams = torch.empty((2, *x.shape), dtype=torch.float32, device=x.device)
    grid = (launch.programs,)
    for layer in range(depth):
        w, new = weight[:, layer], layer % 2
        operand, s = (None, None) if signs is None else (inputs[:, layer], signs[:, layer])
        layer_forward_kernel[grid](
            *(x, sums[1 - new] if layer else None, w, streams[new], sums[new], operand, s, scales),
            *(w.stride(0), *((0, 0) if s is None else (operand.stride(0), s.stride(0)))),
            *(members, rows, scale, p, q),
            **run.forward,
        )
        x = streams[new]
    tiles = sums[0].shape[0] if mean_subtract else 1
    grid = (members * -(-rows // FINISH_ROWS) * -(-n // FINISH_COLUMNS),)
    layer_finish_kernel[grid](
        *(x, sums[(depth - 1) % 2], y, scales, members, rows, scale),
        WIDTH=n,
        TILES=tiles,
        ROWS=FINISH_ROWS,
        COLUMNS=FINISH_COLUMNS,
    )


def _layers_backward(run, grad, weight, inputs, signs, grad_x, grad_weight, constants):
    (launch,) = run.plan.backward_data
    members, rows, _ = grad.shape
    scale, scales, p, q, mean_subtract = constants
    d = torch.empty_like(inputs)
    sharing = _sharing(run, grad_weight)
    depth = weight.shape[1]
    sums = _row_sums(launch, grad) if mean_subtract else (None, None)
    streams = torch.empty((2, *grad.shape), dtype=torch.float32, device=grad.device)
    grid = (launch.programs,)
    g = grad
    for layer in reversed(range(depth)):
        w, new = weight[:, layer], layer % 2
        first, last = layer == depth - 1, layer == 0
        out = grad_x if last else streams[new]
        layer_backward_data_kernel[grid](
            *(g, None if first else sums[1 - new], w, out, None if last else sums[new]),
            *(d[:, layer], signs[:, layer], scales, *sharing[1:]),
            *(w.stride(0), d.stride(0), signs.stride(0), members, rows, scale, p, q),
            **run.backward_data,
        )
        g = out
    _weight_gradient(run, d, inputs, grad_weight, sharing)


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a b, or out += a b, with sums in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.baddbmm(out, a, b, beta=float(accumulate), out=out)
    elif a.is_cuda:
        torch.ops.aten.baddbmm.dtype_out(out, a, b, out.dtype, beta=float(accumulate), out=out)
    else:  # the interpreter: no such product on the CPU
        torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), beta=float(accumulate), out=out)


def _gemm_forward(x, weight, y, inputs, signs, inverses, constants, block):
    depth, layers = weight.shape[1], block.layers
    stream = x.to(stream_dtype(x.dtype), copy=True)
    h = torch.empty_like(stream)
    if inputs is None:
        scratch = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
        operands, layer_signs = [scratch] * depth, [None] * depth
    else:
        operands, layer_signs = inputs.unbind(1), signs.unbind(1)
    from_stream = not (block.norm or block.activate_first)  # as it is
    zeros = None if block == PLAIN else torch.zeros_like(stream[:1]).expand_as(stream)

    def activate(h, operand, signs):
        residual_forward(zeros, h, operand, None, signs, *_inside(constants))

    if from_stream:
        operands[0].copy_(x)
    for layer in range(depth):
        first, last = layer % layers == 0, (layer + 1) % layers == 0
        if block.activate_first:
            activate(stream if first else h, operands[layer], layer_signs[layer])
        elif block.norm and first:
            normalized, inverse = row_norm(stream, block.norm)
            operands[layer].copy_(normalized)
            if inputs is not None:
                inverses[:, layer // layers] = inverse.squeeze(-1)
        _product(operands[layer], weight[:, layer].mT, h)
        if last and block.activate_first:
            residual_forward(stream, h, stream, None, None, *_linear(constants))
        elif last:
            following = operands[layer + 1] if from_stream and layer + 1 < depth else None
            residual_forward(stream, h, stream, following, layer_signs[layer], *constants)
        elif not block.activate_first:
            activate(h, operands[layer + 1], layer_signs[layer])
    y.copy_(stream)


def _gemm_backward(grad, weight, inputs, signs, inverses, grad_x, grad_weight, constants, block):
    g = grad.to(stream_dtype(grad.dtype), copy=True)
    u = None if block == PLAIN else torch.empty_like(g)  # the gradient of a layer's operand
    d = torch.empty(grad.shape, dtype=weight.dtype, device=grad.device)
    inside, layers = _inside(constants), block.layers
    for layer in reversed(range(weight.shape[1])):
        first, last = layer % layers == 0, (layer + 1) % layers == 0
        if not last:
            residual_backward(u, signs[:, layer + block.activate_first], d, *inside)
        elif block.activate_first:
            residual_backward(g, signs[:, layer], d, *_linear(constants))
        else:
            residual_backward(g, signs[:, layer], d, *constants)
        if grad_weight is not None:
            torch.bmm(d.mT, inputs[:, layer], out=grad_weight[:, layer])
        if first and not (block.norm or block.activate_first):
            _product(d, weight[:, layer], g, accumulate=True)
            continue
        _product(d, weight[:, layer], u)
        if first and block.norm:
            normalized, inverse = (
                inputs[:, layer].to(g.dtype),
                inverses[:, layer // layers, :, None],
            )
            g += row_norm_backward(u, normalized, inverse, block.norm)
        elif first:
            residual_backward(u, signs[:, layer], u, *inside)
            g += u
    grad_x.copy_(g)


def _inside(constants: _Constants) -> _Constants:
    """Those of phi alone, as it is between the layers of a block."""
    return constants._replace(scale=1.0, scales=None, mean_subtract=False)


def _linear(constants: _Constants) -> _Constants:
    """Those of the update with a branch that ends in a product: phi is the identity."""
    return constants._replace(p=1.0, q=-1.0)
