import math

import pytest
import torch
from backends import run_on
from cases import (
    ACTIVATIONS,
    BACKENDS,
    DTYPES,
    WIDTHS,
    assert_as_accurate,
    grads,
    native,
    plain_residual,
)

from depthnet import kernels


@pytest.fixture(params=[*BACKENDS, "cuda-host", "cuda"])
def backend(request):
    """Also the CUDA kernels, which not every operator has."""
    yield from run_on(request)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("mean_subtract", [True, False])
def test_values_and_gradients(backend, dtype, n, mean_subtract):
    for activation in ACTIVATIONS:
        x, h, g = (torch.randn(3, 5, n).to(dtype) for _ in range(3))
        options = {"activation": activation, "mean_subtract": mean_subtract}
        ours = grads(lambda x, h: kernels.scaled_residual(x, h, 0.3, **options), [x, h], g)  # noqa: B023
        plain = grads(lambda x, h: plain_residual(x, h, 0.3, **options), [x, h], g)  # noqa: B023
        truth = grads(lambda x, h: plain_residual(x, h, 0.3, **options), [x, h], g, torch.float64)  # noqa: B023
        assert_as_accurate(str(activation), ours, plain, truth, terms=n)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [7, 64, 2500])
def test_any_alignment(backend, dtype, n):
    x, h, g = (torch.randn(15 * n + 1).to(dtype)[1:].view(3, 5, n) for _ in range(3))
    ours = grads(lambda x, h: kernels.scaled_residual(x, h, 0.3), [x, h], g)
    plain = grads(lambda x, h: plain_residual(x, h, 0.3), [x, h], g)
    truth = grads(lambda x, h: plain_residual(x, h, 0.3), [x, h], g, torch.float64)
    assert_as_accurate("", ours, plain, truth, terms=n)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (4, 0), (2, 3, 4, 33)])
def test_any_shape(backend, shape):
    x, h = torch.randn(shape), torch.randn(shape)
    torch.testing.assert_close(kernels.scaled_residual(x, h, 0.3), plain_residual(x, h, 0.3))


def test_rows_longer_than_the_cache_and_many_rows(backend):
    for shape in ((2, 300_000), (5000, 40)):
        x, h, g = torch.randn(shape), torch.randn(shape), torch.randn(shape)
        ours = grads(lambda x, h: kernels.scaled_residual(x, h, 0.3), [x, h], g)
        plain = grads(lambda x, h: plain_residual(x, h, 0.3), [x, h], g)
        truth = grads(lambda x, h: plain_residual(x, h, 0.3), [x, h], g, torch.float64)
        assert_as_accurate(str(shape), ours, plain, truth, terms=shape[-1])


def test_non_contiguous(backend):
    x, h, g = torch.randn(9, 5).mT, torch.randn(5, 18)[:, ::2], torch.randn(9).expand(5, 9)
    ours = grads(lambda x, h: kernels.scaled_residual(x, h, 0.3), [x, h], g)
    plain = grads(lambda x, h: plain_residual(x, h, 0.3), [x, h], g)
    torch.testing.assert_close(ours, plain)


def test_multiplier_for_each_member(backend):
    x, h, scale = torch.randn(3, 5, 9), torch.randn(3, 5, 9), torch.tensor([0.1, -2.0, 0.0])
    expected = plain_residual(x, h, scale[:, None, None])
    torch.testing.assert_close(kernels.scaled_residual(x, h, scale), expected)


def test_multipliers_need_not_be_contiguous(backend):
    x, h = torch.randn(4, 2, 8), torch.randn(4, 2, 8)
    table = torch.arange(8, dtype=torch.float64)
    for scale in (table[::2], table[3].expand(4)):
        expected = plain_residual(x.double(), h.double(), scale[:, None, None]).float()
        torch.testing.assert_close(kernels.scaled_residual(x, h, scale), expected)


def test_long_rows_with_a_large_mean(backend):
    h = torch.rand(1, 1_000_000) + 1000
    y = kernels.scaled_residual(torch.zeros_like(h), h, 1.0, activation="identity")
    plain = plain_residual(torch.zeros_like(h), h, 1.0, "identity")
    truth = plain_residual(torch.zeros_like(h).double(), h.double(), 1.0, "identity")
    # The mean itself, near 1000, is a float32.
    allowed = 2 * (plain.double() - truth).abs().max() + 1000 * torch.finfo(torch.float32).eps
    assert (y.double() - truth).abs().max() <= allowed


def test_slope_at_zero_is_p(backend):
    x, h = torch.zeros(1, 4), torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    options = {"activation": (2.0, 3.0), "mean_subtract": False}
    gradient = grads(
        lambda x, h: kernels.scaled_residual(x, h, 1.0, **options), [x, h], torch.ones(1, 4)
    )
    assert gradient[2].tolist() == [[2.0, 2.0, 2.0, -3.0]]


def test_not_finite_values_stay_in_their_row(backend):
    for dtype in DTYPES:
        x, h = torch.zeros(3, 40, dtype=dtype), torch.ones(3, 40, dtype=dtype)
        h[1, 35], x[2, 3] = math.nan, math.inf
        y = kernels.scaled_residual(x, h, 0.5)
        assert y[0].isfinite().all()
        assert y[1].isnan().all()
        assert y[2, 3] == math.inf
        assert y[2].isinf().sum() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_every_half_precision_value(backend, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(64, 1024)
    zero = torch.zeros_like(every)
    y = kernels.scaled_residual(every, zero, 0.0, mean_subtract=False)
    torch.testing.assert_close(y, every, rtol=0, atol=0, equal_nan=True)
    # h = every, scale 1/3: results between the representable values, subnormal and overflowing ones.
    finite = torch.where(every.isfinite(), every, zero)
    for scale in (1 / 3, 3.0):
        y = kernels.scaled_residual(zero, finite, scale, activation="identity", mean_subtract=False)
        expected = (finite.float() * torch.tensor(scale)).to(dtype)
        torch.testing.assert_close(y, expected, rtol=0, atol=0)
        if dtype == torch.float16 and torch.set_flush_denormal(True):  # of floats, not of halves
            try:
                again = kernels.scaled_residual(
                    zero, finite, scale, activation="identity", mean_subtract=False
                )
            finally:
                torch.set_flush_denormal(False)
            torch.testing.assert_close(again, expected, rtol=0, atol=0)


def test_one_bit_per_element_is_saved(backend):
    for n in (7, 64, 100):
        x, h = torch.randn(3, 5, n), torch.randn(3, 5, n, requires_grad=True)
        saved = []

        def pack(tensor):
            saved.append(tensor)  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kernels.scaled_residual(x, h, 0.3)
        assert [(t.dtype, t.numel()) for t in saved] == [(torch.uint8, 15 * math.ceil(n / 8))]


def test_layout_of_the_saved_signs_is_the_same(backend):
    for n in (1, 77, 96, 9000, 9001):
        x, h = torch.randn(3, 5, n), torch.randn(3, 5, n)
        for mean_subtract in (True, False):
            arguments = (x, h, 0.3, None, 1.0, 1.0, mean_subtract, True)
            _, signs = torch.ops.depthnet.scaled_residual(*arguments)
            with kernels.use_backend("reference"):
                assert torch.equal(signs, torch.ops.depthnet.scaled_residual(*arguments)[1])


@native
def test_equal_bits_on_one_and_many_threads(backend):
    x, h, g = (torch.randn(4000, 50) for _ in range(3))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(grads(lambda x, h: kernels.scaled_residual(x, h, 0.3), [x, h], g))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_autocast_keeps_the_stream(backend):
    x, h = torch.randn(4, 16), torch.randn(4, 16).bfloat16()
    with torch.autocast(x.device.type, torch.bfloat16):
        y = kernels.scaled_residual(x, h, 0.3)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, kernels.scaled_residual(x, h.float(), 0.3))


def test_gradcheck(backend):
    x, h = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    scale = torch.tensor([0.3, 0.7])
    for activation in ACTIVATIONS:
        assert torch.autograd.gradcheck(
            lambda x, h: kernels.scaled_residual(x, h, scale, activation=activation),  # noqa: B023
            (x, h),
        )


def test_no_second_derivative(backend):
    x, h = torch.randn(2, 6), torch.randn(2, 6, requires_grad=True)
    y = kernels.scaled_residual(x, h, 0.3)
    (gradient,) = torch.autograd.grad((y**2).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="scaled_residual cannot be differentiated twice"):
        gradient.sum().backward()


def test_no_forward_mode_derivative():
    x, h = torch.randn(2, 6), torch.randn(2, 6)
    with pytest.raises(
        NotImplementedError, match="h: forward-mode derivatives are not implemented"
    ):
        torch.func.jvp(lambda h: kernels.scaled_residual(x, h, 0.3), (h,), (h,))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        ({"h": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "h must be one of float32.*int64"),
        (
            {"h": torch.zeros(2, 4)},
            ValueError,
            r"h must have the shape of x, \(2, 3\), got \(2, 4\)",
        ),
        ({"h": torch.zeros(2, 3).double()}, TypeError, "h must have the dtype of x, torch.float32"),
        ({"h": torch.zeros(2, 3, device="meta")}, ValueError, "h must be on the device of x, cpu"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"scale": torch.tensor([1.0, math.nan])}, ValueError, "scale must be finite"),
        ({"scale": "big"}, TypeError, "scale must be a number or a tensor, got 'big'"),
        ({"scale": torch.ones(3)}, ValueError, r"scale must be a number or .* got the shape \(3\)"),
        ({"scale": torch.ones(2, requires_grad=True)}, ValueError, "scale gets no gradient"),
        ({"activation": "rellu"}, ValueError, "activation='rellu'.*did you mean 'relu'"),
        ({"activation": (1.0, math.nan)}, ValueError, r"activation=\(p, q\) must be finite"),
        ({"activation": 3}, TypeError, "activation must be a name"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"x": torch.zeros(2, 3), "h": torch.zeros(2, 3), "scale": 1.0, **change}
    with pytest.raises(error, match=words):
        kernels.scaled_residual(**arguments)
