"""Checks of the operators' arguments: one clear error, naming the argument."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NORMS = ("layer", "rms")


def shape_text(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def check_float_tensor(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """The operators have no forward-mode derivative; torch.library would take it for zero."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
        raise NotImplementedError(f"{name}: forward-mode derivatives are not implemented")


def check_same(name: str, tensor: Tensor, other: str, like: Tensor, dtype: bool = True) -> None:
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {other}, {like.device}, got {tensor.device}"
        )
    if dtype and tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of {other}, {like.dtype}, got {tensor.dtype}")


def needs_grad(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def multiplier(scale: object, x: Tensor, lead: torch.Size | None) -> tuple[float, Tensor | None]:
    """A multiplier as (number, None) or (1, float64 tensor over the members)."""
    if not isinstance(scale, Tensor):
        try:
            value = float(scale)
        except (TypeError, ValueError):
            raise TypeError(f"scale must be a number or a tensor, got {scale!r}") from None
        if not torch.compiler.is_compiling() and not math.isfinite(value):
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
            f"{shape_text(x)}, got the shape {shape_text(scale)}"
        )
    if scale.device != x.device:
        raise ValueError(f"scale must be on the device of x, {x.device}, got {scale.device}")
    # Reading a device's tensor would wait for the device, and a traced one has no values.
    plain = type(scale) in (Tensor, torch.nn.Parameter) and scale.device.type == "cpu"
    if plain and not torch.compiler.is_compiling() and not scale.isfinite().all():
        raise ValueError(f"scale must be finite, got {scale!r}")
    return 1.0, scale.to(torch.float64).reshape(-1)


def count_slices(params: Sequence[Tensor], leading: Sequence[int] | None) -> tuple[list[int], int]:
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


def check_lists(params: Sequence[Tensor], **lists: Sequence[Tensor]) -> None:
    for index, param in enumerate(params):
        check_float_tensor(f"params[{index}]", param)
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(
                f"{name} must have {len(params)} tensors, as params has, got {len(tensors)}"
            )
        for index, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name}[{index}] must have the shape of its parameter, {shape_text(param)}, "
                    f"got {shape_text(tensor)}"
                )


def rate_table(name: str, value: float | Tensor, slices: int, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=torch.float64, device=like.device)
    if value.ndim not in (0, 1) or (value.ndim == 1 and len(value) != slices):
        raise ValueError(
            f"{name} must be a number or a 1-dim tensor of {slices} entries, one for each slice, "
            f"got the shape {shape_text(value)}"
        )
    return value.to(like.device, torch.float64).expand(slices)
