"""One optimizer step of many tensors, as the tables that every backend runs over.

The layout is that of csrc/math/step.h.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from depthnet.kernels.native import _C, FAST_DESCRIBE

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

TENSOR = np.dtype(
    [(name, np.int64) for name in ("param", "grad", "state0", "state1", "state2", "master")]
    + [(name, np.int64) for name in ("step", "size", "slices", "first_slice", "group", "dtype")]
    + [(name, np.int64) for name in ("fresh", "rounding")]
)
GROUP = np.dtype(
    [(name, np.float64) for name in ("lr", "eps", "weight_decay", "beta1", "beta2")]
    + [(name, np.float64) for name in ("decoupled", "maximize", "nesterov")]
    + [("lr_address", np.int64)]
)
ADDRESSES = TENSOR.names[:7]


@dataclass(eq=False)
class StepTables:
    """What a step reads and writes; all tensors are on one device.

    Attributes:
        rule: `adam` or `sgd`.
        columns: for each name of ADDRESSES a list with a tensor, or None, for each parameter.  States
            and masters are in the dtype that the parameter is computed in; `step` is float32 of one
            element.  state0, state1, state2 are exp_avg, exp_avg_sq, max_exp_avg_sq (None without
            amsgrad), or momentum_buffer (None without momentum).
        leading: for each parameter, how many leading dimensions index slices with rates of their own.
        scales: float64 (3, slices), contiguous, on the device: what lr, eps and weight_decay of the
            group are multiplied by, for the slices of all parameters one after another.
        group: for each parameter, its row in `groups`.
        groups: structured array of GROUP; SGD's momentum and dampening are beta1 and beta2.
        lrs: for some rows of `groups` a 0-dim tensor that takes the place of the number lr.
        fresh: for each parameter whether its momentum buffer, zeros, is still unwritten.
        rounding: for each parameter 0, or 1 + the number that its stochastic rounding depends on; that
            of 16-bit parameters without a master.
        grad_scale, found_inf: tensors of one element: gradients are divided by the one; nothing is
            written where the other is not 0.
        max_grad_norm: None, or the norm that all (unscaled) gradients together are brought down to.
    """

    rule: str
    columns: dict[str, list[Tensor | None]]
    leading: Sequence[int]
    scales: Tensor
    group: Sequence[int]
    groups: np.ndarray
    fresh: Sequence[bool]
    rounding: Sequence[int]
    lrs: dict[int, Tensor] = field(default_factory=dict)
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None

    @property
    def params(self) -> list[Tensor]:
        return self.columns["param"]

    @cached_property
    def slices(self) -> list[int]:
        """The number of slices of each parameter."""
        pairs = zip(self.params, self.leading, strict=True)
        return [param.shape[:dims].numel() for param, dims in pairs]

    @cached_property
    def tensors(self) -> np.ndarray:
        """The table of tensors, a structured array of TENSOR, for backends that take addresses: all
        tensors of a row are then laid out alike, without gaps.  It does not follow `columns`."""
        table = np.zeros(len(self.params), TENSOR)
        table["size"] = [param.numel() for param in self.params]
        table["slices"] = self.slices
        table["first_slice"][1:] = np.cumsum(self.slices[:-1])
        table["group"] = self.group
        table["dtype"] = [DTYPES[param.dtype] for param in self.params]
        table["fresh"] = self.fresh
        table["rounding"] = self.rounding
        for name, column in self.columns.items():
            table[name] = [0 if tensor is None else tensor.data_ptr() for tensor in column]
        return table

    @cached_property
    def words(self) -> np.ndarray:
        """`tensors` as int64, a column for each of TENSOR's names."""
        return self.tensors.view(np.int64).reshape(-1, len(TENSOR))

    @cached_property
    def table_addresses(self) -> tuple[int, int, int]:
        """Of `tensors`, `scales` and `groups`, in the memory of the host."""
        return self.tensors.ctypes.data, self.scales.data_ptr(), self.groups.ctypes.data


def laid_out_alike(tensors: Sequence[Tensor], leading: int) -> bool:
    """Whether the tensors' memory is without gaps and in one order, slices first to last."""
    first, *others = tensors
    if any(other.stride() != first.stride() or other.shape != first.shape for other in others):
        return False
    if first.is_contiguous():
        return True
    permuted = first.permute(sorted(range(first.ndim), key=first.stride().__getitem__)[::-1])
    return leading == 0 and permuted.is_contiguous()


def describe(tensors: list[Tensor | None]) -> np.ndarray:
    """int64 (2, N): addresses, and fingerprints of dtype, device, shape, strides, and negation.

    Both are 0 for what is no tensor, or has no memory of its own.
    """
    if FAST_DESCRIBE:
        table = np.empty((2, len(tensors)), np.int64)
        _C.describe(tensors, table.ctypes.data)
        return table
    return np.array([_described(tensor) for tensor in tensors], np.int64).reshape(-1, 2).T.copy()


def describe_step(params: list[Tensor], sources: list[tuple[dict, str]]) -> np.ndarray | None:
    """`describe` of parameters, their gradients, and the states that `sources` name; None if one of these
    is missing."""
    if not FAST_DESCRIBE:
        tensors = tensors_of_step(params, sources)
        return None if tensors is None else describe(tensors)
    table = np.empty((2, 2 * len(params) + len(sources)), np.int64)
    return table if _C.describe_step(params, sources, table.ctypes.data) else None


def tensors_of_step(
    params: list[Tensor], sources: list[tuple[dict, str]]
) -> list[Tensor | None] | None:
    """Parameters, their gradients, and the states that `sources` name; None if one of these is missing."""
    grads = [param.grad for param in params]
    try:
        return [*params, *grads, *[state[key] for state, key in sources]]
    except KeyError:
        return None


def _described(tensor: Tensor | None) -> tuple[int, int]:
    try:
        address = tensor.data_ptr()
    except (AttributeError, RuntimeError):  # None; sparse
        return 0, 0
    form = tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.is_neg()
    return address, hash(form) if address or not tensor.numel() else 0
