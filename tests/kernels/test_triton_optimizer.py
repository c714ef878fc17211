"""The optimizer step in Triton, in the interpreter or on a GPU.

The class TestInTheInterpreter is collected only in the process that `test_in_the_interpreter` starts.
"""

from __future__ import annotations

import pytest
import torch
from step_cases import ADAM, Parameter, StepTests, make_tables

pytest.importorskip("triton", reason="triton is not installed")

from depthnet.kernels import triton as backend
from depthnet.kernels.step import StepTables

INTERPRETED = backend.INTERPRETED


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
@pytest.mark.parametrize(
    ("tests", "keyword"), [("tests/kernels/test_triton_optimizer.py::TestInTheInterpreter", "")]
)
def test_in_the_interpreter(run_in_interpreter, tests, keyword):
    run_in_interpreter(tests, keyword)


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


def test_reasons_why_not():
    reasons = backend.unsupported("no_such_operator", torch.zeros(1))
    assert any("no_such_operator" in reason for reason in reasons)
    assert INTERPRETED or any("cpu" in reason for reason in reasons)
    assert "triton" in backend.details()
