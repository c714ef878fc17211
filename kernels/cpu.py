"""The CPU backend: thin bindings to the native kernels of depthnet._C."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthnet.kernels.native import _C, MISSING
from depthnet.kernels.reference import Block, rows_of, sign_bytes, stream_dtype
from depthnet.kernels.step import DTYPES, StepTables

SINGLE = tuple(dtype for dtype in DTYPES if dtype != torch.float64)
OPS = {  # the operators, and the dtypes that their kernels are for
    "embedding_sum": (torch.float32, torch.float64),
    "embedding_sum_backward": (torch.float32, torch.float64),
    "linear": (torch.float32, torch.float64),
    "mlp_activation": SINGLE,
    "mlp_activation_backward": SINGLE,
    "optimizer_step_": tuple(DTYPES),
    "residual_norm": tuple(DTYPES),
    "residual_norm_backward": tuple(DTYPES),
    "residual_stack": tuple(DTYPES),
    "residual_stack_backward": tuple(DTYPES),
    "rotary": SINGLE,
    "rotary_backward": SINGLE,
    "scaled_residual": tuple(DTYPES),
    "scaled_residual_backward": tuple(DTYPES),
}
MLPS = {"gelu": 0, "abs": 1, "swiglu": 2}  # csrc/cpu/kernels.h


def missing() -> list[str]:
    """Why nothing can run here; empty if something can."""
    return [MISSING] if _C is None else []


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    """Why `op` cannot run here on these tensors; empty if it can."""
    reasons = missing()
    if op not in OPS:
        reasons.append(f"{op} has no native CPU kernel yet")
    for tensor in tensors:
        if tensor.device.type != "cpu":
            reasons.append(f"a tensor is on {tensor.device}")
            break
        if op in OPS and tensor.dtype not in OPS[op]:
            reasons.append(f"{op} has no native CPU kernel for {tensor.dtype}")
            break
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
    x, branch, weight, bias = (_contiguous(each) for each in (x, branch, weight, bias))
    s, y = torch.empty_like(x), torch.empty_like(branch)
    shape = (1 + center, *x.shape[:-1]) if save else (0,)
    statistics = torch.empty(shape, dtype=stream_dtype(x.dtype))
    tensors = x, branch, s, y, statistics, weight, bias
    _C.residual_norm_forward(
        *(DTYPES[x.dtype], DTYPES[branch.dtype], center, *rows_of(x), *map(_address, tensors)),
        *(scale, eps, torch.get_num_threads()),
    )
    return s, y, statistics


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
    grad_s, grad_y, s, weight = (_contiguous(each) for each in (grad_s, grad_y, s, weight))
    grad_x, grad_branch = torch.empty_like(s), torch.empty_like(grad_y)
    sums = [statistics.new_empty(s.shape[-1] * wanted) for wanted in (weight_grad, bias_grad)]
    tensors = grad_s, grad_y, s, statistics, weight, grad_x, grad_branch, *sums
    _C.residual_norm_backward(
        *(DTYPES[s.dtype], DTYPES[grad_y.dtype], len(statistics) == 2, *rows_of(s)),
        *(*map(_address, tensors), scale, torch.get_num_threads()),
    )
    return grad_x, grad_branch, *sums


def mlp_activation(h: Tensor, kind: str) -> Tensor:
    return _mlp_activation(h, None, kind)


def mlp_activation_backward(grad: Tensor, h: Tensor, kind: str) -> Tensor:
    return _mlp_activation(h, grad, kind)


def _mlp_activation(h: Tensor, grad: Tensor | None, kind: str) -> Tensor:
    h, grad = h.contiguous(), _contiguous(grad)
    rows, m = rows_of(h)
    n = m // 2 if kind == "swiglu" else m
    out = torch.empty_like(h) if grad is not None or n == m else h.new_empty(*h.shape[:-1], n)
    if out.numel():
        addresses = map(_address, (grad, h, out))
        _C.mlp_activation(DTYPES[h.dtype], MLPS[kind], rows, n, *addresses, torch.get_num_threads())
    return out


def rotary(qkv: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    qkv = qkv.contiguous()
    batch, tokens, _, heads, size = qkv.shape
    parts = tuple(qkv.new_empty(batch, heads, tokens, size) for _ in range(3))
    _rotary(False, qkv, rotation, parts)
    return parts


def rotary_backward(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor) -> Tensor:
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v)]
    batch, heads, tokens, size = q.shape
    qkv = q.new_empty(batch, tokens, 3, heads, size)
    _rotary(True, qkv, rotation, parts)
    return qkv


def _rotary(back: bool, qkv: Tensor, rotation: Tensor, parts: Sequence[Tensor]) -> None:
    batch, tokens, _, heads, size = qkv.shape
    rotation = rotation.contiguous()
    where = [(part.data_ptr(), *part.stride()[:3]) for part in parts]
    _C.rotary(
        *(DTYPES[qkv.dtype], back, batch, tokens, heads, size, qkv.data_ptr()),
        *(rotation.data_ptr(), where, torch.get_num_threads()),
    )


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


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
    members, rows, n = x.shape
    depth = weight.shape[1]
    stream = x.to(stream_dtype(x.dtype)).contiguous()
    y = torch.empty_like(stream)
    inputs = torch.empty((members, depth, rows, n) if save else 0, dtype=weight.dtype)
    signs = torch.empty((members, depth, rows, sign_bytes(n)) if save else 0, dtype=torch.uint8)
    kept = (members, depth // block.layers, rows) if save and block.norm else 0
    inverses = torch.empty(kept, dtype=stream.dtype)
    saved = (inputs.data_ptr(), signs.data_ptr(), inverses.data_ptr()) if save else (0, 0, 0)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    sizes = DTYPES[weight.dtype], members, depth, rows, n
    streams = stream.data_ptr(), y.data_ptr()
    _C.residual_stack_forward(*sizes, *_layers(weight), *streams, *saved, *block, *constants)
    return y.to(x.dtype), inputs, signs, inverses


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
    members, depth, rows, n = inputs.shape
    g = grad.to(stream_dtype(grad.dtype)).contiguous()
    grad_x = torch.empty_like(g)
    constants, _alive = _constants(scale, scales, p, q, mean_subtract)
    sizes = DTYPES[weight.dtype], members, depth, rows, n
    saved = inputs.data_ptr(), signs.data_ptr(), inverses.data_ptr()
    streams = g.data_ptr(), grad_x.data_ptr()
    out = (0, 0) if grad_weight is None else _block(grad_weight)
    _C.residual_stack_backward(*sizes, *_layers(weight), *streams, *saved, *block, *out, *constants)
    return grad_x.to(grad.dtype)


def _layers(weight: Tensor) -> tuple[int, int, int]:
    return weight.data_ptr(), weight.stride(0), weight.stride(1)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight if 1 in weight.stride()[1:] else weight.contiguous()
    y = torch.empty(*x.shape[:2], weight.shape[1], dtype=x.dtype)
    member, column, step = weight.stride()
    _C.linear(
        *(DTYPES[x.dtype], *y.shape, x.shape[2], x.data_ptr(), *x.stride()),
        *(weight.data_ptr(), member, step, column, y.data_ptr(), torch.get_num_threads()),
    )
    return y


def embedding_sum(index: Tensor, weight: Tensor) -> Tensor:
    weight, y = (
        weight.contiguous(),
        torch.empty(*index.shape[:2], weight.shape[2], dtype=weight.dtype),
    )
    sizes, index = _embedding(index, weight.shape)
    addresses = *_block(index), weight.data_ptr(), y.data_ptr()
    if not _C.embedding_sum_forward(
        DTYPES[weight.dtype], *sizes, *addresses, torch.get_num_threads()
    ):
        raise IndexError(f"index must hold indices of features, from 0 to {weight.shape[1] - 1}")
    return y


def embedding_sum_backward(grad: Tensor, index: Tensor, features: int) -> Tensor:
    grad = grad.contiguous()
    out = torch.empty(len(grad), features, grad.shape[2], dtype=grad.dtype)
    sizes, index = _embedding(index, out.shape)
    addresses = *_block(index), grad.data_ptr(), out.data_ptr()
    _C.embedding_sum_backward(DTYPES[grad.dtype], *sizes, *addresses, torch.get_num_threads())
    return out


def _embedding(index: Tensor, table: torch.Size) -> tuple[tuple, Tensor]:
    """Sizes, and the index with contiguous members, of which all may be the same one."""
    if index.stride()[1:] != (index.shape[2], 1):
        index = index.contiguous()
    return (*index.shape, *table[1:]), index


def optimizer_step_(tables: StepTables) -> None:
    if tables.found_inf is not None and tables.found_inf.item():
        return
    grad_scale = 1.0 if tables.grad_scale is None else tables.grad_scale.item()
    max_norm = torch.inf if tables.max_grad_norm is None else tables.max_grad_norm
    tensors, scales, groups = tables.table_addresses
    _C.optimizer_step(
        *(tables.rule, tensors, len(tables.tensors), scales, tables.scales.shape[1], groups),
        *(grad_scale, max_norm, torch.get_num_threads()),
    )
