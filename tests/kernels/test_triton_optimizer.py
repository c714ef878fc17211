"""The optimizer step in Triton: right in the interpreter, well compiled for every chip.

Triton's interpreter must be on before a kernel is defined, and ordinary tests must not run in it, so the
class TestInTheInterpreter is collected only in the process that `test_in_the_interpreter` starts.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from step_cases import ADAM, Parameter, StepTests, make_tables

pytest.importorskip("triton", reason="triton is not installed")

from depthnet.kernels import triton as backend
from depthnet.kernels.step import StepTables

INTERPRETED = backend.INTERPRETED
ROOT = Path(__file__).parents[2]


class Step:
    """Runs a step's tables: of CPU tensors in the interpreter, else on a GPU."""

    device, truncates_bfloat16 = ("cpu", True) if INTERPRETED else ("cuda", False)

    def __init__(self):
        from depthnet.kernels.triton.optimizer import CHUNK

        self.chunk = CHUNK.value

    def __call__(self, tables: StepTables) -> None:
        backend.optimizer_step_(tables)


@pytest.fixture
def step() -> Step:
    return Step()


def count_launches(monkeypatch, tables: StepTables) -> list[str]:
    """The kernels that a step launches."""
    from depthnet.kernels.triton import optimizer

    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append(self.name)

    for name in ("optimizer_step_kernel", "gradient_norm_kernel"):
        monkeypatch.setattr(optimizer, name, Recorder(name))
    backend.optimizer_step_(tables)
    return launched


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command.append(f"{Path(__file__).relative_to(ROOT)}::TestInTheInterpreter")
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


class TestInTheInterpreter(StepTests):
    __test__ = INTERPRETED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
class TestOnGpu(StepTests):
    __test__ = not INTERPRETED


@pytest.mark.parametrize("groups", [1, 50])
def test_one_launch_for_all_groups(monkeypatch, groups):
    parameters = [Parameter(3, group=i % groups) for i in range(60)]
    tables = make_tables("cpu", "adam", parameters, *[ADAM] * groups)
    assert count_launches(monkeypatch, tables) == ["optimizer_step_kernel"]
    tables.max_grad_norm = 1.0
    kernels = ["gradient_norm_kernel", "optimizer_step_kernel"]
    assert count_launches(monkeypatch, tables) == kernels


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_adam_is_compiled_well(arch, dtype):
    spec = importlib.util.spec_from_file_location("gpu_audit", ROOT / "bench/gpu_audit.py")
    gpu_audit = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_audit)
    figures = gpu_audit.audit(gpu_audit.step_case("adam", dtype, states=2), arch)
    assert figures["stack_bytes"] == figures["spill_instructions"] == 0
    assert figures["all_128"], figures


def test_reasons_why_not():
    reasons = backend.unsupported("residual_stack", torch.zeros(1))
    assert any("residual_stack" in reason for reason in reasons)
    assert INTERPRETED or any("cpu" in reason for reason in reasons)
    assert "triton" in backend.details()
