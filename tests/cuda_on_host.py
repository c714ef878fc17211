"""The CUDA kernels' per-thread code on the host: tests/kernels/cuda_on_host.cpp, and what calls it."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def compile_library(folder: Path) -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if not shutil.which(compiler[0]):
        pytest.skip(f"no C++ compiler: {compiler[0]} was not found")
    library = folder / "cuda_on_host.so"
    flags = ["-std=c++17", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    source = ROOT / "tests/kernels/cuda_on_host.cpp"
    command = [*compiler, *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(library)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.chunk_size.restype = ctypes.c_int64
    loaded.step_on_host.argtypes = [ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool]
    loaded.residual_on_host.argtypes = [ctypes.c_void_p, ctypes.c_bool]
    return loaded


class ResidualLaunch(ctypes.Structure):
    """csrc/cuda/launch.h's."""

    _fields_ = [
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("members", "rows", "n", "x", "h", "out", "signs")),
        *((f"{name}_stride", ctypes.c_int64) for name in ("x", "h", "out", "signs")),
        ("scale", ctypes.c_double),
        ("scales", ctypes.c_int64),
        *((name, ctypes.c_double) for name in ("p", "q")),
        ("mean_subtract", ctypes.c_bool),
    ]


class ResidualOnHost:
    """In place of depthnet._C_cuda, for CPU tensors."""

    def __init__(self, library: ctypes.CDLL, backwards: bool = False):
        self.library, self.backwards = library, backwards

    def residual_forward(
        self, dtype, members, rows, n, x, x_stride, h, h_stride, y, y_stride, *rest
    ):
        signs, signs_stride, *constants, _device, _stream = rest
        strides = x_stride, h_stride, y_stride, signs_stride
        launch = ResidualLaunch(dtype, members, rows, n, x, h, y, signs, *strides, *constants)
        self.library.residual_on_host(ctypes.byref(launch), self.backwards)

    def residual_backward(self, dtype, members, rows, n, grad, grad_stride, *rest):
        signs, signs_stride, out, out_stride, *others = rest
        arrays = 0, 0, grad, grad_stride, out, out_stride, signs, signs_stride
        self.residual_forward(dtype, members, rows, n, *arrays, *others)


def replace_cuda(monkeypatch, library: ctypes.CDLL, backwards: bool = False) -> None:
    """From here on the cuda backend runs its residual operators on the host."""
    from depthnet.kernels import cuda

    monkeypatch.setattr(cuda, "_C_cuda", ResidualOnHost(library, backwards))
    monkeypatch.setattr(cuda, "_place", lambda tensor: (0, 0))
    monkeypatch.setattr(cuda, "unsupported", lambda op, *tensors: [])
