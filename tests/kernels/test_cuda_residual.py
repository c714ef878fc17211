"""What test_scaled_residual.py does not test of the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from cuda_on_host import replace_cuda

from depthnet.kernels import cuda


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, 64, 1000, 5000, 5001])
def test_order_of_blocks_and_threads_does_not_matter(cuda_on_host, monkeypatch, dtype, n):
    x, h, g = (torch.randn(3, 50, n).to(dtype) for _ in range(3))
    constants = 0.3, torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), 1.0, 0.5, True
    results = []
    for backwards in (False, True):
        replace_cuda(monkeypatch, cuda_on_host, backwards)
        y, signs = cuda.scaled_residual(x, h, *constants, True)
        results.append([y, signs, cuda.scaled_residual_backward(g, signs, *constants)])
    assert all(map(torch.equal, *results))


def test_unsupported():
    reasons = cuda.unsupported("scaled_residual", torch.ones(1))
    assert reasons == ["a tensor is on cpu"]
