"""The GPU backend: Triton kernels for CUDA and ROCm, and on CPU tensors in Triton's interpreter.

Each operator is a file of its own, imported when it first runs: importing Triton takes long.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

OPS = {"optimizer_step_": "optimizer"}  # the operators and the files that they are in
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def missing() -> list[str]:
    """Why nothing can run here; empty if something can."""
    if find_spec("triton") is None:
        return ["triton is not installed"]
    if not INTERPRETED and not torch.cuda.is_available():
        return ["there is no GPU"]
    return []


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    """Why `op` cannot run here on these tensors; empty if it can."""
    reasons = [] if op in OPS else [f"{op} has no Triton kernel yet"]
    for tensor in tensors:
        if not tensor.is_cuda and not INTERPRETED:
            return [*reasons, f"a tensor is on {tensor.device}"]  # without a look for GPUs
    return [*missing(), *reasons]


def details() -> str:
    import triton

    where = "in the interpreter" if INTERPRETED else "CUDA, ROCm"
    return f"optimizer steps; triton {triton.__version__}, {where}"


def __getattr__(name: str):
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = globals()[name] = getattr(import_module(f"{__name__}.{OPS[name]}"), name)
    return op
