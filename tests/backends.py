"""How a test is run on one backend."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from cases import cpu_isas
from cuda_on_host import replace_cuda

from depthnet import kernels
from depthnet.kernels import cuda, planning, triton


def force_regime(patch, regime: str) -> None:
    from depthnet.kernels.triton import stack

    forced = {"float64": planning.regimes(1, "float64")}  # which has only one
    patch.setattr(planning, "regimes", lambda n, kind: forced.get(kind, (regime,)))
    for name in ("stack_plan", "prepared"):  # without their caches
        patch.setattr(stack, name, getattr(stack, name).__wrapped__)


def run_on(request):
    """What a fixture `backend` yields from: the backend that is its parameter.

    The native CPU kernels are run with the instruction set that is named.  On a GPU new tensors are there
    by default.  Without one Triton needs its interpreter; `cuda-host` is the CUDA kernels' code run by the
    host.  `triton-layers` and `triton-gemm` run every stack in that regime.
    """
    name, _, variant = request.param.partition("-")
    patch = request.getfixturevalue("monkeypatch")
    device, isa = nullcontext(), None
    if variant == "host":
        library = request.getfixturevalue("cuda_on_host")
        replace_cuda(patch, library)
    elif name in ("cuda", "triton"):
        gpu = {"cuda": cuda, "triton": triton}[name]
        if gpu.missing():
            pytest.skip(*gpu.missing())
        device = torch.device("cpu" if name == "triton" and triton.INTERPRETED else "cuda")
        if variant:
            force_regime(patch, variant)
    elif variant:
        isa = variant
        if isa not in cpu_isas():
            pytest.skip(f"this machine or build has only the instruction sets {cpu_isas()}")
        from depthnet import _C

        before = _C.selected_isa()
        _C.select_isa(isa)
    with kernels.use_backend(name), device:
        yield request.param
    if isa:
        _C.select_isa(before)
