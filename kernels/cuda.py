"""The CUDA backend: thin bindings to the kernels of depthnet._C_cuda."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import depthnet
from depthnet.kernels.device_tables import device_tables
from depthnet.kernels.reference import sign_bytes
from depthnet.kernels.step import DTYPES, StepTables

try:
    from depthnet import _C_cuda
except ImportError as error:
    left_out = Path(depthnet.__path__[0]) / "_C_cuda_left_out.txt"  # written by setup.py
    _C_cuda, MISSING = None, left_out.read_text().strip() if left_out.exists() else str(error)


@cache
def missing() -> list[str]:
    """Why nothing can run here; empty if something can.

    It may ask the driver, after which this process can no longer be forked to use a GPU.
    """
    if _C_cuda is None:
        return [MISSING]
    if torch.version.cuda is None:
        return ["this torch is built without CUDA"]
    reason = _C_cuda.missing()
    return [f"the CUDA kernels cannot run: {reason}"] if reason else []


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    """Why `op` cannot run here on these tensors; empty if it can."""
    reasons = [] if op in globals() else [f"{op} has no CUDA kernel yet"]
    for tensor in tensors:
        if not tensor.is_cuda:
            return [*reasons, f"a tensor is on {tensor.device}"]
    return [*missing(), *reasons]


def details() -> str:
    return f"compiled for {_C_cuda.ARCHITECTURES}"


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _block(tensor: Tensor) -> tuple[int, int]:
    """Address and member stride of a tensor whose members are contiguous."""
    return tensor.data_ptr(), tensor.stride(0)


def _place(tensor: Tensor) -> tuple[int, int]:
    """The device that a tensor is on, and its current stream."""
    device = tensor.device.index
    return device, torch.cuda.current_stream(device).cuda_stream


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
    x, h = x.contiguous(), h.contiguous()
    scales = None if scales is None else scales.contiguous()
    y = torch.empty_like(x)
    shape = (*x.shape[:2], sign_bytes(x.shape[2])) if save else (0,)
    signs = torch.empty(shape, dtype=torch.uint8, device=x.device)
    if x.numel():
        with torch.cuda.device_of(x):
            _C_cuda.residual_forward(
                *(DTYPES[x.dtype], *x.shape, *_block(x), *_block(h), *_block(y)),
                *(*(_block(signs) if save else (0, 0)), scale, _address(scales), p, q),
                *(mean_subtract, *_place(x)),
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
    grad = grad.contiguous()
    scales = None if scales is None else scales.contiguous()
    out = torch.empty_like(grad)
    if grad.numel():
        with torch.cuda.device_of(grad):
            _C_cuda.residual_backward(
                *(DTYPES[grad.dtype], *grad.shape, *_block(grad), *_block(signs), *_block(out)),
                *(scale, _address(scales), p, q, mean_subtract, *_place(grad)),
            )
    return out


def optimizer_step_(tables: StepTables) -> None:
    """One step of all parameters, in place, without waiting for the device; see `StepTables`."""
    table = device_tables(tables, _C_cuda.CHUNK)
    device = table.scales.device
    max_grad_norm = torch.inf if tables.max_grad_norm is None else tables.max_grad_norm
    with torch.cuda.device(device):
        _C_cuda.optimizer_step(
            *(tables.rule == "adam", table.tensors.data_ptr(), table.groups.data_ptr()),
            *(table.scales.data_ptr(), table.scales.shape[1]),
            *(table.chunks.data_ptr(), len(table.chunks), table.arrived.data_ptr()),
            *(table.partial_sums.data_ptr(), table.norm.data_ptr()),
            *(_address(tables.grad_scale), _address(tables.found_inf), max_grad_norm),
            *(device.index, torch.cuda.current_stream().cuda_stream),
        )
