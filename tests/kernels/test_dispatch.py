import os
import subprocess
import sys

import pytest
import torch

from depthnet import kernels


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
        timeout=120,
    )


def test_backends_are_listed_in_order_with_reasons():
    status = kernels.backends()
    assert [entry.name for entry in status] == ["cpu", "cuda", "triton", "reference"]
    for entry in status:
        assert entry.active == (not entry.reasons)
        assert entry.details if entry.active else entry.reasons


def test_an_explicit_backend_that_cannot_run_says_why_for_every_backend():
    param, grad = torch.ones(4, 3).mT, torch.ones(3, 4)

    def step():
        kernels.sgd_step_([param], [grad], [], lr=1.0, weight_decay=0.0)

    with (
        kernels.use_backend("cpu"),
        pytest.raises(
            RuntimeError,
            match=r"backend 'cpu' was asked for and cannot run optimizer_step_:(\n.*)*\n  cpu: the "
            r"tensors of a parameter differ in layout, or have gaps(\n.*)*\n  reference: can run it",
        ),
    ):
        step()
    step()  # auto falls back
    assert torch.equal(param, torch.zeros(3, 4))


def test_unknown_backends_are_refused_and_the_choice_is_restored():
    with pytest.raises(ValueError, match=r"backend='referense'.*did you mean 'reference'"):
        kernels.use_backend("referense").__enter__()
    with pytest.raises(KeyError), kernels.use_backend("reference"):
        raise KeyError
    assert kernels.dispatch.choice() == "auto"


def test_the_environment_chooses():
    code = "from depthnet.kernels import dispatch; print(dispatch.choice())"
    assert python(code, DEPTHNET_BACKEND="reference").stdout.strip() == "reference"
    failed = python(code, DEPTHNET_BACKEND="gpu")
    assert failed.returncode != 0
    assert (
        "DEPTHNET_BACKEND='gpu' is not one of auto, cpu, cuda, triton, reference" in failed.stderr
    )


def test_the_environment_chooses_the_instruction_set():
    code = "from depthnet import kernels, _C; print(_C.selected_isa())"
    result = python(code, DEPTHNET_CPU_ISA="baseline")
    if "ImportError" in result.stderr:
        pytest.skip("the native kernels are not built")
    assert result.stdout.strip() == "baseline"
    assert "DEPTHNET_CPU_ISA='sse9' is not one of" in python(code, DEPTHNET_CPU_ISA="sse9").stderr


def test_everything_runs_without_the_native_kernels():
    code = """
import sys
sys.modules["depthnet._C"] = None  # an import of it now fails
import torch, depthnet
status = {entry.name: entry for entry in depthnet.kernels.backends()}
assert not status["cpu"].active and status["cpu"].reasons, status
model = depthnet.ResNet(4, 8, 3, 2)
model(torch.randn(5, 4)).sum().backward()
depthnet.optim.AdamW(model, lr=0.1).step()
print("ran")
"""
    result = python(code)
    assert result.stdout.strip() == "ran", result.stderr
