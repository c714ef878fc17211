"""What test_residual_stack.py does not test of Triton's kernels: its cases in the interpreter, and shapes
that bring other code to run."""

from __future__ import annotations

import pytest
import torch
from cases import assert_as_accurate, grads, plain_stack

pytest.importorskip("triton", reason="triton is not installed")

from depthnet.kernels import planning, residual_stack, use_backend
from depthnet.kernels import triton as backend

INTERPRETED = backend.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_triton = pytest.mark.skipif(bool(backend.missing()), reason="; ".join(backend.missing()))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(
    ("tests", "keyword"),
    [
        # gradcheck evaluates the operator hundreds of times.
        ("tests/kernels/test_residual_stack.py", "triton and not gradcheck"),
        ("tests/kernels/test_triton_stack.py", "on_triton"),
    ],
)
def test_in_the_interpreter(run_in_interpreter, tests, keyword):
    run_in_interpreter(tests, keyword)


def draw(members, rows, n, depth, dtype):
    x, g = (torch.randn(members, rows, n, device=DEVICE).to(dtype) for _ in range(2))
    return x, (torch.randn(members, depth, n, n, device=DEVICE) / n**0.5).to(dtype), g


def stack(x, weight, scale=0.3):
    with use_backend("triton"):
        return residual_stack(x, weight, scale)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_programs_that_share_a_tile_add_in_the_same_order_on_triton(dtype):
    members, rows, n, depth = 2, 600, 20, 2
    (launch,) = planning.stack_plan(
        members, rows, n, depth, planning.kind_of(dtype), "sm_80", 1 << 17
    ).backward_weight
    assert launch.splits > 1 or not INTERPRETED
    x, weight, g = draw(members, rows, n, depth, dtype)
    results = [grads(stack, [x, weight], g) for _ in range(2)]
    assert all(map(torch.equal, *results))

    def plain(x, weight):
        return plain_stack(x, weight, 0.3)

    truth = grads(plain, [x, weight], g, torch.float64)
    assert_as_accurate("", results[0], grads(plain, [x, weight], g), truth, terms=rows)


@needs_triton
@pytest.mark.parametrize("n", [257, 320])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_stacks_on_triton(n, dtype):
    x, weight, g = draw(2, 21, n, 2, dtype)
    scale = torch.tensor([0.3, -0.7], device=DEVICE)

    def ours(x, weight):
        return stack(x, weight, scale)

    def plain(x, weight):
        return plain_stack(x, weight, scale)

    truth = grads(plain, [x, weight], g, torch.float64)
    assert_as_accurate("", grads(ours, [x, weight], g), grads(plain, [x, weight], g), truth, n)


def test_too_old(monkeypatch):
    monkeypatch.setattr(backend, "_version", lambda: "3.4.0")
    assert backend.missing() == ["triton is too old: 3.5 or newer is needed, 3.4.0 is installed"]
    monkeypatch.setattr(backend, "_version", lambda: None)
    assert backend.missing() == ["triton is not installed"]


def test_gpus_that_are_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    wanted = ["the GPU has compute capability 7.5, 8.0 is needed"]
    assert backend._too_old.__wrapped__(0) == wanted
