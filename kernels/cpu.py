"""The CPU backend: thin bindings to the native kernels of depthnet._C."""

from __future__ import annotations

import os
from pathlib import Path

import torch  # before _C: its OpenMP threads are the ones that the kernels run on
from torch import Tensor

import depthnet
from depthnet._checks import one_of
from depthnet.kernels.reference import sign_bytes, stream_dtype

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
    """Address and member stride of a tensor whose members are contiguous."""
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
    members, rows, n = x.shape
    depth = weight.shape[1]
    weight = _matrices(weight)
    stream = x.to(stream_dtype(x.dtype)).contiguous()
    y = torch.empty_like(stream)
    inputs = torch.empty((members, depth, rows, n) if save else 0, dtype=weight.dtype)
    signs = torch.empty((members, depth, rows, sign_bytes(n)) if save else 0, dtype=torch.uint8)
    saved = (inputs.data_ptr(), signs.data_ptr()) if save else (0, 0)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    sizes = DTYPES[weight.dtype], members, depth, rows, n
    streams = stream.data_ptr(), y.data_ptr()
    _C.residual_stack_forward(*sizes, *_layers(weight), *streams, *saved, *constants)
    return y.to(x.dtype), inputs, signs


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
    members, depth, rows, n = inputs.shape
    weight = _matrices(weight)
    g = grad.to(stream_dtype(grad.dtype)).contiguous()
    grad_x = torch.empty_like(g)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    sizes = DTYPES[weight.dtype], members, depth, rows, n
    pointers = g.data_ptr(), grad_x.data_ptr(), inputs.data_ptr(), signs.data_ptr()
    out = (0, 0) if grad_weight is None else _block(grad_weight)
    _C.residual_stack_backward(*sizes, *_layers(weight), *pointers, *out, *constants)
    return grad_x.to(grad.dtype)


def _matrices(weight: Tensor) -> Tensor:
    """(P, L, n, n) of which each matrix is contiguous."""
    n = weight.shape[-1]
    return weight if weight.stride()[2:] == (n, 1) else weight.contiguous()


def _layers(weight: Tensor) -> tuple[int, int, int]:
    return weight.data_ptr(), weight.stride(0), weight.stride(1)


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
