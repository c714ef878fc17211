"""What test_scaled_residual.py does not test of Triton's kernels: its cases in the interpreter, and the
launchers with tensors that the operators do not have."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from depthnet.kernels import reference
from depthnet.kernels import triton as backend

INTERPRETED = backend.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
SCALES = torch.tensor([0.5, -1.0], dtype=torch.float64)
CONSTANTS = 0.3, SCALES.to(DEVICE) if not backend.missing() else SCALES, 1.5, 0.5

needs_triton = pytest.mark.skipif(bool(backend.missing()), reason="; ".join(backend.missing()))


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(
    ("tests", "keyword"),
    [
        ("tests/kernels/test_scaled_residual.py", "triton"),
        ("tests/kernels/test_triton_residual.py", "triton"),
    ],
)
def test_in_the_interpreter(run_in_interpreter, tests, keyword):
    run_in_interpreter(tests, keyword)


def layers(*shape, dtype):
    """(P, rows, n): one layer of a larger tensor."""
    members, *rest = shape
    return torch.randn(members, 3, *rest, device=DEVICE).to(dtype)[:, 1]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [16, 50, 9000])
@pytest.mark.parametrize("mean_subtract", [True, False])
def test_forward_of_layers_of_mixed_dtypes(dtype, n, mean_subtract):
    from depthnet.kernels.triton.residual import residual_forward

    x, h = layers(2, 3, n, dtype=torch.float32), layers(2, 3, n, dtype=dtype)
    want, want_signs = reference.scaled_residual(x, h.float(), *CONSTANTS, mean_subtract, True)
    operand = layers(2, 3, n, dtype=dtype)
    signs = torch.empty(2, 3, 3, -(-n // 8), dtype=torch.uint8, device=DEVICE)[:, 1]
    y = torch.empty_like(x)
    residual_forward(x, h, y, None, None, *CONSTANTS, mean_subtract)
    residual_forward(x, h, x, operand, signs, *CONSTANTS, mean_subtract)  # in place
    torch.testing.assert_close(x, want)
    assert torch.equal(x, y)
    assert torch.equal(operand, x.to(dtype))
    assert torch.equal(signs, want_signs)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", [16, 50, 9000])
@pytest.mark.parametrize("mean_subtract", [True, False])
def test_backward_of_layers_of_mixed_dtypes(dtype, n, mean_subtract):
    from depthnet.kernels.triton.residual import residual_backward

    g, h = layers(2, 3, n, dtype=torch.float32), layers(2, 3, n, dtype=dtype)
    signs, out = reference.pack_signs(h), torch.empty_like(h)
    residual_backward(g, signs, out, *CONSTANTS, mean_subtract)
    want = reference.scaled_residual_backward(g, signs, *CONSTANTS, mean_subtract)
    torch.testing.assert_close(out, want.to(dtype))


@needs_triton
def test_one_launch_each_way(monkeypatch):
    from depthnet.kernels.triton import residual

    launched = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launched.append((self.name, grid))

    for name in ("residual_forward_kernel", "residual_backward_kernel"):
        monkeypatch.setattr(residual, name, Recorder(name))
    x = torch.randn(100, 7, 64, device=DEVICE)
    constants = 0.3, None, 1.0, 1.0, True
    _, signs = residual.scaled_residual(x, x, *constants, True)
    residual.scaled_residual_backward(x, signs, *constants)
    rows, _, _ = residual.tile(64, 4)
    grid = (100 * -(-7 // rows),)
    assert launched == [("residual_forward_kernel", grid), ("residual_backward_kernel", grid)]
