"""The optimizer step in CUDA: its per-thread code run over the launch grid by the host, and on a GPU.

`cuda_on_host.cpp` compiles the code of csrc/cuda/optimizer.h with the C++ compiler.  What a GPU adds,
concurrency, is tested on one only.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
from step_cases import ADAM, DTYPES, HALVES, Parameter, StepTests, make_tables, rounded, tensors_of
from torch import Tensor

from depthnet.kernels import cuda
from depthnet.kernels.device_tables import device_tables
from depthnet.kernels.step import StepTables


class StepLaunch(ctypes.Structure):
    """csrc/cuda/launch.h's."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tensors", "groups", "scales")),
        *((name, ctypes.c_int64) for name in ("slice_count", "chunks", "chunk_count", "arrived")),
        *((name, ctypes.c_int64) for name in ("partial_sums", "norm", "grad_scale", "found_inf")),
        ("max_grad_norm", ctypes.c_double),
    ]


class OnHost:
    """Runs a step's tables of CPU tensors through the GPU's code."""

    device, truncates_bfloat16 = "cpu", False

    def __init__(self, library: ctypes.CDLL):
        self.library, self.chunk = library, library.chunk_size()

    def __call__(self, tables: StepTables, backwards: bool = False) -> None:
        table = device_tables(tables, self.chunk)
        optional = [0 if t is None else t.data_ptr() for t in (tables.grad_scale, tables.found_inf)]
        launch = StepLaunch(
            *(table.tensors.data_ptr(), table.groups.data_ptr()),
            *(table.scales.data_ptr(), table.scales.shape[1]),
            *(table.chunks.data_ptr(), len(table.chunks), table.arrived.data_ptr()),
            *(table.partial_sums.data_ptr(), table.norm.data_ptr(), *optional),
            torch.inf if tables.max_grad_norm is None else tables.max_grad_norm,
        )
        self.library.step_on_host(tables.rule == "adam", ctypes.byref(launch), backwards)

    def convert(
        self, dtype: torch.dtype, stored: Tensor, values: Tensor, random: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """`stored` in float32, and `values` in `dtype`, rounded with random bits if there are any."""
        widened, narrowed = torch.empty(len(stored)), torch.empty(len(stored), dtype=dtype)
        self.library.convert_on_host(
            *(dtype == torch.bfloat16, ctypes.c_int64(len(stored))),
            *(ctypes.c_void_p(t.data_ptr()) for t in (stored, widened, values)),
            ctypes.c_void_p(None if random is None else random.ctypes.data),
            ctypes.c_void_p(narrowed.data_ptr()),
        )
        return widened, narrowed


class OnGpu:
    device, truncates_bfloat16 = "cuda", False

    def __init__(self):
        self.chunk = cuda._C_cuda.CHUNK

    def __call__(self, tables: StepTables) -> None:
        cuda.optimizer_step_(tables)


@pytest.fixture
def on_host(cuda_on_host) -> OnHost:
    return OnHost(cuda_on_host)


@pytest.fixture(params=["host", "gpu"])
def step(request):
    """What runs a step of tables that are on `step.device`."""
    if request.param == "host":
        return request.getfixturevalue("on_host")
    if cuda.missing():
        pytest.skip(*cuda.missing())
    return OnGpu()


class TestStep(StepTests):
    """On the host and on a GPU."""


def test_order_of_blocks_and_threads_does_not_matter(on_host):
    parameters = [Parameter(10_001, dtype, rounding=i) for i, dtype in enumerate(DTYPES)]
    results = []
    for backwards in (False, True):
        torch.manual_seed(0)
        tables = make_tables(on_host.device, "adam", parameters, ADAM, max_grad_norm=1.0)
        on_host(tables, backwards)
        results.append(tensors_of(tables))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", HALVES)
def test_conversions(on_host, dtype):
    """Every 16-bit number, and float32 numbers of every exponent."""
    stored = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    generator = np.random.default_rng(0)
    words = generator.integers(0, 2**32, 2**16, dtype=np.uint64).astype(np.uint32)
    halfway = stored.float().numpy().view(np.uint32) ^ (
        0x8000 if dtype == torch.bfloat16 else 0x1000
    )
    random = generator.integers(0, 2**32, 2**16, dtype=np.uint64).astype(np.uint32)
    near = np.abs(generator.standard_normal(2**16)) * np.exp2(generator.integers(-28, 18, 2**16))
    for values in (words.view(np.float32), halfway.view(np.float32), near.astype(np.float32)):
        widened, narrowed = on_host.convert(dtype, stored, torch.from_numpy(values))
        torch.testing.assert_close(widened, stored.float(), rtol=0, atol=0, equal_nan=True)
        want = torch.from_numpy(values).to(dtype)
        torch.testing.assert_close(narrowed, want, rtol=0, atol=0, equal_nan=True)
        _, narrowed = on_host.convert(dtype, stored, torch.from_numpy(values), random)
        want = rounded(values, random, dtype)
        torch.testing.assert_close(narrowed, want, rtol=0, atol=0, equal_nan=True)


def test_unsupported():
    reasons = cuda.unsupported("optimizer_step_", torch.ones(1))
    assert reasons == ["a tensor is on cpu"]
    assert "residual_stack has no CUDA kernel yet" in cuda.unsupported("residual_stack")
