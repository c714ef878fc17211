"""How a residual stack would run on a GPU: regimes, launches, bytes, predictions.

The class TestLaunches is collected only in the process that `test_launches_in_the_interpreter` starts.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from depthnet.kernels import plan, residual_stack
from depthnet.kernels.chips import CHIPS
from depthnet.kernels.triton import INTERPRETED

sys.path.append(str(Path(__file__).parents[2] / "bench"))
from launches import recorded, training_step

bfloat16, float32, float64 = torch.bfloat16, torch.float32, torch.float64


def shapes(members: int, rows: int, n: int, depth: int):
    return (members, rows, n), (members, depth, n, n)


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize(
    ("rows", "n", "dtype", "regime"),
    [
        (1, 1, bfloat16, "narrow"),
        (100, 256, bfloat16, "narrow"),
        (100000, 256, float32, "narrow"),
        (16, 512, bfloat16, "layers"),  # the launches take the time
        (512, 8192, bfloat16, "gemm"),  # the products do
        (16, 64, float64, "gemm"),
    ],
)
def test_regimes(arch, rows, n, dtype, regime):
    assert plan(*shapes(1, rows, n, 64), dtype, arch).regime == regime


@pytest.mark.parametrize("depth", [8, 1024])
def test_launches(depth):
    narrow = plan(*shapes(2, 100, 64, depth), bfloat16, "sm_90")
    assert narrow.launches == 3
    layers = plan(*shapes(2, 100, 512, depth), bfloat16, "sm_90")
    assert layers.launches == 2 * depth + 2
    counts = [(launch.kernel, launch.count) for launch in (*layers.forward, *layers.backward_data)]
    assert counts == [
        ("layer_forward", depth),
        ("layer_finish", 1),
        ("layer_backward_data", depth),
    ]
    assert [launch.count for launch in layers.backward_weight] == [1]
    gemm = plan(*shapes(2, 100, 64, depth), float64, "sm_90")
    assert gemm.launches == 5 * depth  # three products, the residual and its gradient


def total(launches) -> int:
    return sum(launch.bytes for launch in launches)


def test_bytes_of_narrow():
    p = plan(*shapes(2, 100, 64, 3), bfloat16, "sm_80")
    stream = 2 * 100 * 64 * 4  # float32, into registers at the start and back at the end
    weights = 3 * 2 * 64 * 64 * 2
    operands = 3 * 2 * 100 * 64 * 2  # those of the weights' gradient, x or d
    signs = 3 * 2 * 100 * 8
    assert total(p.forward) == 2 * stream + weights + operands + signs
    assert total(p.backward_data) == 2 * stream + weights + operands + signs
    assert total(p.backward_weight) == 2 * operands + weights
    assert p.bytes == total(p.forward) + total(p.backward_data) + total(p.backward_weight)


def test_bytes_of_layers():
    p = plan(*shapes(1, 50, 300, 20), bfloat16, "sm_80")
    assert p.regime == "layers"
    stream = 50 * 300 * 4  # of a layer, each of which reads and writes it
    weights, operands, signs = 300 * 300 * 2, 50 * 300 * 2, 50 * 38
    finish = 2 * stream
    assert total(p.forward) == 20 * (2 * stream + weights + operands + signs) + finish
    assert total(p.backward_data) == 20 * (2 * stream + weights + operands + signs)
    assert total(p.backward_weight) == 20 * (2 * operands + weights)


def test_bytes_of_gemm():
    p = plan(*shapes(1, 50, 40, 2), float64, "sm_80")
    stream = operands = 50 * 40 * 8
    weights, signs = 40 * 40 * 8, 50 * 5
    # h = x W^T; then x and h are read, the new x is written, and again as the next operand.
    assert total(p.forward) == 2 * (operands + weights + stream + 3 * stream + operands + signs)
    # d of g; then g += d W.
    assert total(p.backward_data) == 2 * (
        stream + signs + operands + operands + weights + 2 * stream
    )
    assert total(p.backward_weight) == 2 * (2 * operands + weights)


SHAPES = [
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (1, 4096, 16, 1),
    (8, 128, 64, 1000),
    (1, 33, 100, 5),
    (100, 1000, 256, 8),
    (1, 17, 301, 3),
    (2, 8192, 1024, 64),
    (1, 100, 8191, 2),
]


@pytest.mark.parametrize("arch", CHIPS)
@pytest.mark.parametrize("dtype", [bfloat16, torch.float16, float32, float64])
@pytest.mark.parametrize("sizes", SHAPES)
def test_every_shape_has_tiles_that_fit(sizes, dtype, arch):
    members, rows, n, depth = sizes
    p, chip = plan(*shapes(*sizes), dtype, arch), CHIPS[arch]
    assert p.flops == 6 * members * rows * n * n * depth
    assert p.shared_bytes <= chip.shared_bytes
    assert p.seconds > 0
    for launch in (*p.forward, *p.backward_data, *p.backward_weight):
        assert launch.tile is None or launch.tile.resident(chip) >= 1
        assert launch.kernel in str(p)


@pytest.mark.parametrize("arch", CHIPS)
def test_programs_share_a_tile_only_where_tiles_are_few(arch):
    (few,) = plan(*shapes(1, 65536, 64, 1), bfloat16, arch).backward_weight
    assert few.splits > 1
    assert few.programs % few.splits == 0
    (many,) = plan(*shapes(1, 65536, 64, 4096), bfloat16, arch).backward_weight
    assert many.splits == 1
    (short,) = plan(*shapes(1, 16, 64, 1), bfloat16, arch).backward_weight
    assert short.splits == 1  # nothing to share


@pytest.mark.parametrize("n", [64, 512, 8192])
def test_prediction_is_linear_in_depth(n):
    def seconds(depth):
        return plan(*shapes(1, 1024, n, depth), bfloat16, "sm_90").seconds

    first, second = seconds(2048) - seconds(1024), seconds(4096) - seconds(2048)
    assert second == pytest.approx(2 * first, rel=0.02)
    assert seconds(4096) == pytest.approx(4096 / 1024 * seconds(1024), rel=0.05)


@pytest.fixture
def products():
    """What torch allows of products of float32."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


def test_float32_is_tf32_where_torch_allows_it(products):
    arguments = (*shapes(1, 65536, 256, 64), float32, "sm_90")
    products.fp32_precision = "ieee"
    exact = plan(*arguments)
    products.fp32_precision = "tf32"
    assert plan(*arguments).seconds < exact.seconds


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (((4, 8), (2, 8, 8), torch.int32), TypeError, "dtype must be .* got torch.int32"),
        (((4, 8), (2, 8, 8), float32, "sm_75"), ValueError, "sm_75.*sm_80.*gfx942"),
        (((4, 8), (2, 8, 9), float32), ValueError, r"do not fit: \(4, 8\) and \(2, 8, 9\)"),
        (((4, 9), (2, 8, 8), float32), ValueError, "do not fit"),
        (((3, 4, 8), (2, 8, 8), float32), ValueError, "do not fit"),
        (((8,), (2, 8, 8), float32), ValueError, r"x_shape must be \(\*P, B, n\).* got \(8,\)"),
        (((4, 8), (8, 8), float32), ValueError, r"weight_shape \(\*P, L, n, n\), got .*\(8, 8\)"),
        (((4, 8), (0, 8, 8), float32), ValueError, r"sizes of 1 at least, got .*\(0, 8, 8\)"),
        (((0, 8), (2, 8, 8), float32), ValueError, "sizes of 1 at least"),
    ],
)
def test_errors(arguments, error, words):
    with pytest.raises(error, match=words):
        plan(*arguments)


def test_the_chip_need_not_be_named():
    assert plan((4, 8), (2, 8, 8), float32).arch in CHIPS


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("tests", "keyword"), [("tests/kernels/test_plan.py::TestLaunches", "")])
def test_launches_in_the_interpreter(run_in_interpreter, tests, keyword):
    run_in_interpreter(tests, keyword)


class TestLaunches:
    """What kernels/triton launches is what the plan says, and does not depend on the depth."""

    __test__ = INTERPRETED

    @pytest.mark.parametrize("depth", [4, 6])
    @pytest.mark.parametrize(
        ("members", "rows", "n", "dtype", "regime"),
        [
            (1, 1, 1, bfloat16, "narrow"),
            (2, 100, 64, float32, "narrow"),
            (1, 4096, 16, float32, "narrow"),
            (3, 33, 256, bfloat16, "narrow"),
            (1, 70, 300, bfloat16, "layers"),
            (2, 100, 512, bfloat16, "layers"),
            (2, 10, 24, float64, "gemm"),
            (1, 100, 2048, bfloat16, "gemm"),
        ],
    )
    def test_a_stack(self, members, rows, n, dtype, regime, depth):
        x = torch.zeros(members, rows, n, dtype=float64 if dtype == float64 else float32)
        weight = torch.zeros(members, depth, n, n, dtype=dtype).requires_grad_()
        p = plan(x.shape, weight.shape, dtype, "sm_80")  # whose tiles the interpreter takes
        assert p.regime == regime
        with recorded() as launched:
            y = residual_stack(x.requires_grad_(), weight, 0.5)
        self.assert_equal(p.forward, launched)
        with recorded() as launched:
            y.backward(y.detach())
        self.assert_equal((*p.backward_data, *p.backward_weight), launched)

    def assert_equal(self, planned, launched):
        """Equal counts, and programs where the plan has tiles; torch also copies."""
        products = {"baddbmm": "torch.baddbmm", "bmm": "torch.baddbmm"}
        names = Counter(products.get(launch.kernel, launch.kernel) for launch in launched)
        for name in ("copy_", "_to_copy"):
            del names[name]
        counts = Counter()
        for launch in planned:
            counts[launch.kernel] += launch.count
        assert names == counts
        for launch in planned:
            if launch.tile is not None:
                grids = {found.grid for found in launched if found.kernel == launch.kernel}
                assert grids == {(launch.programs,)}

    def test_a_training_step_at_any_depth(self):
        step = training_step(64, 8)
        assert step == training_step(64, 1024)
        stack = {
            name: step[name] for name in step if name.startswith(("narrow", "weight", "layer"))
        }
        assert stack == {"narrow_forward": 1, "narrow_backward_data": 1, "weight_gradient": 1}
        assert step["optimizer_step"] == 1
        # Input and output layer with the gradients of their weights, and that of the output's input.
        assert step["mm"] == 5
        assert step.total() == 14  # the others are the loss's
