"""The GPU backend: Triton kernels for CUDA and ROCm, and on CPU tensors in Triton's interpreter.

Each operator is a file of its own, imported when it first runs: importing Triton takes long.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from torch import Tensor

OPS = {  # the operators and the files that they are in
    "mlp_activation": "mlp",
    "mlp_activation_backward": "mlp",
    "optimizer_step_": "optimizer",
    "residual_norm": "norm",
    "residual_norm_backward": "norm",
    "residual_stack": "stack",
    "residual_stack_backward": "stack",
    "rotary": "rotation",
    "rotary_backward": "rotation",
    "scaled_residual": "residual",
    "scaled_residual_backward": "residual",
}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (3, 5)  # of Triton, as in the oldest torch that depthnet runs on
PACKAGES = ("triton", "pytorch-triton", "pytorch-triton-rocm")  # that hold it


def missing() -> list[str]:
    """Why nothing can run here; empty if something can."""
    version = _version()
    if version is None:
        return ["triton is not installed"]
    if tuple(map(int, version.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return [f"triton is too old: {wanted} or newer is needed, {version} is installed"]
    if not INTERPRETED and not torch.cuda.is_available():
        return ["there is no GPU"]
    return []


def unsupported(op: str, *tensors: Tensor) -> list[str]:
    """Why `op` cannot run here on these tensors; empty if it can."""
    reasons = [] if op in OPS else [f"{op} has no Triton kernel yet"]
    for tensor in tensors:
        if not tensor.is_cuda and not INTERPRETED:
            return [*reasons, f"a tensor is on {tensor.device}"]  # without a look for GPUs
    if reasons := [*missing(), *reasons]:
        return reasons
    return [] if INTERPRETED or not tensors else _too_old(tensors[0].device.index)


@cache
def _version() -> str | None:
    """Of Triton, without importing it."""
    if find_spec("triton") is None:
        return None
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            return metadata.version(package)
    return import_module("triton").__version__  # built from source


@cache
def _too_old(device: int) -> list[str]:
    if torch.version.hip or (capability := torch.cuda.get_device_capability(device)) >= (8, 0):
        return []
    return [f"the GPU has compute capability {capability[0]}.{capability[1]}, 8.0 is needed"]


def details() -> str:
    import triton

    where = "in the interpreter" if INTERPRETED else "CUDA, ROCm"
    return f"triton {triton.__version__}, {where}"


def __getattr__(name: str):
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    op = globals()[name] = getattr(import_module(f"{__name__}.{OPS[name]}"), name)
    return op
