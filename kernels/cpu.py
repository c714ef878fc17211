"""The CPU backend: thin bindings to the native kernels of depthnet._C."""

from __future__ import annotations

import os
from pathlib import Path

import torch  # before _C: its OpenMP threads are the ones that the kernels run on
from torch import Tensor

import depthnet
from depthnet._checks import one_of
from depthnet.kernels.reference import sign_bytes

try:
    from depthnet import _C
except ImportError as error:
    left_out = Path(depthnet.__path__[0]) / "_C_left_out.txt"  # written by setup.py
    _C, MISSING = None, left_out.read_text().strip() if left_out.exists() else str(error)
else:
    wanted = os.environ.get("DEPTHNET_CPU_ISA") or _C.isas()[-1]
    _C.select_isa(one_of("DEPTHNET_CPU_ISA", wanted, _C.isas()))

# The order of the kernel tables in csrc/cpu/kernels.h.
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
STACK_DTYPES = (torch.float32, torch.float64)


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    """Why `op` cannot run here on these tensors; empty if it can."""
    if _C is None:
        return [MISSING]
    reasons = []
    if op not in globals():
        reasons.append(f"{op} has no native CPU kernel yet")
    for tensor in tensors:
        if tensor.device.type != "cpu":
            reasons.append(f"a tensor is on {tensor.device}")
            break
    if op.endswith("step_") and tensors:
        if any(tensor.dtype != tensors[0].dtype for tensor in tensors):
            reasons.append("the tensors differ in dtype")
        if not all(tensor.is_contiguous() for tensor in tensors):
            reasons.append("a tensor is not contiguous")
    if op == "residual_stack" and any(tensor.dtype not in STACK_DTYPES for tensor in tensors):
        reasons.append("residual_stack has native CPU kernels for float32 and float64 only")
    return reasons


def details() -> str:
    threads = torch.get_num_threads() if _C.have_threads() else 1
    return f"{_C.selected_isa()} of {', '.join(_C.isas())}; {threads} threads"


def _constants(
    scale: float, scales: Tensor | None, p: float, q: float, mean_subtract: bool
) -> tuple[tuple, Tensor | None]:
    """The last arguments of the residual kernels, and the tensor that must outlive the call."""
    scales = None if scales is None else scales.contiguous()
    address = 0 if scales is None else scales.data_ptr()
    return (scale, address, p, q, mean_subtract, torch.get_num_threads()), scales


def _block(tensor: Tensor) -> tuple[int, int]:
    """Address and member stride of a (P, rows, n) tensor whose members are contiguous."""
    return tensor.data_ptr(), tensor.stride(0)


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
    x, h, y = x.contiguous(), h.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    signs = torch.empty((*x.shape[:2], sign_bytes(x.shape[2])) if save else 0, dtype=torch.uint8)
    address = _block(signs) if save else (0, 0)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    _C.residual_forward(
        DTYPES[x.dtype], *x.shape, *_block(x), *_block(h), *_block(y), *address, *constants
    )
    return y, signs


def scaled_residual_backward(
    grad: Tensor,
    signs: Tensor,
    scale: float,
    scales: Tensor | None,
    p: float,
    q: float,
    mean_subtract: bool,
) -> Tensor:
    grad, out = grad.contiguous(), torch.empty(grad.shape, dtype=grad.dtype)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    blocks = _block(grad), _block(signs), _block(out)
    _C.residual_backward(DTYPES[grad.dtype], *grad.shape, *sum(blocks, ()), *constants)
    return out


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
    """A vendor GEMM per layer; all that surrounds it in one native pass."""
    members, rows, n = x.shape
    depth, dtype = weight.shape[1], DTYPES[x.dtype]
    x = x.contiguous()
    y, h = torch.empty_like(x), torch.empty_like(x)
    inputs = torch.empty((members, depth, rows, n) if save else 0, dtype=x.dtype)
    signs = torch.empty((members, depth, rows, sign_bytes(n)) if save else 0, dtype=torch.uint8)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    stream, address = x, (0, 0)
    if save:
        stream = inputs[:, 0].copy_(x)
    for layer in range(depth):
        torch.bmm(stream, weight[:, layer].mT, out=h)
        into = inputs[:, layer + 1] if save and layer + 1 < depth else y
        if save:
            address = _block(signs[:, layer])
        _C.residual_forward(
            dtype,
            members,
            rows,
            n,
            *_block(stream),
            *_block(h),
            *_block(into),
            *address,
            *constants,
        )
        stream = into
    return y, inputs, signs


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
    weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Backward-data layer by layer, then all weight gradients as one batched GEMM."""
    g = grad.clone(memory_format=torch.contiguous_format)
    members, depth, rows, n = inputs.shape
    d = torch.empty(members, depth if weight_grad else 1, rows, n, dtype=grad.dtype)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    dtype = DTYPES[grad.dtype]
    for layer in reversed(range(depth)):
        d_layer = d[:, layer if weight_grad else 0]
        blocks = _block(g), _block(signs[:, layer]), _block(d_layer)
        _C.residual_backward(dtype, members, rows, n, *sum(blocks, ()), *constants)
        torch.baddbmm(g, d_layer, weight[:, layer], out=g)
    if not weight_grad:
        return g, weight.new_empty(0)
    dw = torch.empty(members * depth, n, n, dtype=weight.dtype)
    torch.bmm(d.flatten(0, 1).mT, inputs.flatten(0, 1), out=dw)
    return g, dw.view(members, depth, n, n)


def _parameters(
    params: list[Tensor], grads: list[Tensor], states: list[list[Tensor]], leading: list[int]
) -> Tensor:
    """The table of csrc/bindings.cpp: a row of addresses and sizes for each parameter."""
    columns = [[tensor.data_ptr() for tensor in tensors] for tensors in (params, grads, *states)]
    columns += [[0] * len(params)] * (2 - len(states))
    columns += [[param.numel() for param in params]]
    columns += [[param.shape[:dims].numel() for param, dims in zip(params, leading, strict=True)]]
    return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, device="cpu")


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
    torch._foreach_add_(steps, 1)
    counts = torch.tensor([step.item() for step in steps], dtype=torch.float64, device="cpu")
    table = _parameters(params, grads, [exp_avgs, exp_avg_sqs], leading)
    rates = [rate.contiguous() for rate in (lr, eps, weight_decay)]
    _C.adamw_step(
        DTYPES[params[0].dtype],
        *(table.data_ptr(), len(params), counts.data_ptr(), *(rate.data_ptr() for rate in rates)),
        *(beta1, beta2, decoupled, torch.get_num_threads()),
    )
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])


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
    table = _parameters(params, grads, [momentum_buffers] if momentum_buffers else [], leading)
    rates = [rate.contiguous() for rate in (lr, weight_decay)]
    _C.sgd_step(
        DTYPES[params[0].dtype],
        *(table.data_ptr(), len(params), *(rate.data_ptr() for rate in rates)),
        *(momentum, dampening, nesterov, decoupled, torch.get_num_threads()),
    )
    torch.autograd.graph.increment_version([*params, *momentum_buffers])
