import math

import pytest
import torch
from cases import DTYPES, assert_as_accurate, grads, native
from torch.nn import functional as F

from depthnet import kernels
from depthnet.kernels.mlp_activation import MLPS
from depthnet.kernels.triton import INTERPRETED

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
kinds = pytest.mark.parametrize("kind", MLPS)
pytestmark = pytest.mark.usefixtures("float64_is_torchs")


def plain(h, kind):
    if kind == "swiglu":
        gate, up = h.chunk(2, -1)
        return F.silu(gate) * up
    return F.gelu(h) if kind == "gelu" else h.abs()


def definition(h, kind):
    if kind == "swiglu":
        gate, up = h.chunk(2, -1)
        return gate * up / (1 + (-gate).exp())
    return h * (0.5 * torch.special.erfc(-h / math.sqrt(2))) if kind == "gelu" else h.abs()


def width(n, kind):
    return 2 * n if kind == "swiglu" else n


def check(h, kind, g=None):
    g = torch.randn(*h.shape[:-1], h.shape[-1] // width(1, kind)).to(h.dtype) if g is None else g
    got = grads(lambda h: kernels.mlp_activation(h, kind), [h], g)
    judge = grads(lambda h: plain(h, kind), [h], g)
    truth = grads(lambda h: definition(h, kind), [h], g, torch.float64)
    assert_as_accurate(kind, got, judge, truth, 8)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("tests", "keyword"), [("tests/kernels/test_mlp_activation.py", "triton")])
def test_in_the_interpreter(run_in_interpreter, tests, keyword):
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_interpreter(tests, keyword)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 7, 64, 129])
def test_values_and_gradients(backend, dtype, n, kind):
    check((2 * torch.randn(3, 5, width(n, kind))).to(dtype), kind)


@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows(backend, dtype, kind):
    check((2 * torch.randn(70, width(72, kind))).to(dtype), kind)


@kinds
def test_float32_at_every_size(backend, kind):
    """Each element, not their mean, against float64: within a few roundings of the largest term of it."""
    gate = torch.cat([torch.linspace(-15, 15, 9001), torch.logspace(-30, 1, 999), torch.zeros(1)])
    up = torch.randn_like(gate)
    h, ones = torch.cat([gate, up] if kind == "swiglu" else [gate]), torch.ones_like(gate)
    results = grads(lambda h: kernels.mlp_activation(h, kind), [h], ones)
    truths = grads(lambda h: definition(h, kind), [h], ones, torch.float64)
    x, u = gate.double().abs(), up.double().abs()
    bounds = {
        "gelu": (x, 1 + x),
        "abs": (0 * x, 0 * x),
        "swiglu": (x * u, torch.cat([u + u * x, x])),
    }
    for result, truth, bound in zip(results, truths, bounds[kind], strict=True):
        assert ((result - truth).abs() <= 8 * torch.finfo(torch.float32).eps * bound).all()


@kinds
@pytest.mark.parametrize("shape", [(6,), (5, 2), (0, 6), (2, 0, 6), (4, 0), (2, 3, 4, 34)])
def test_any_shape(backend, shape, kind):
    check(torch.randn(shape), kind)


@kinds
def test_non_contiguous(backend, kind):
    check(torch.randn(10, 5).mT, kind)
    check(torch.randn(5, 20)[:, ::2], kind, torch.ones(1).expand(5, 10 // width(1, kind)))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS])
def test_what_is_not_finite_stays_where_it_is(backend, dtype, kind):
    h = torch.randn(4, 40, dtype=torch.float32)
    h[1, 3], h[2, 7] = math.nan, math.inf
    y = kernels.mlp_activation(h.to(dtype), kind)
    bad = ~y.isfinite()
    assert bad.nonzero().tolist() == [[1, 3], [2, 7]]
    assert y[1, 3].isnan()
    assert y[2, 7].abs() == math.inf


@kinds
def test_the_gradient_where_there_is_no_number(backend, kind):
    """NaN in h or in the gradient of y; as torch has it: at NaN |x| has the slope 0."""
    h, g = torch.randn(3, width(20, kind)), torch.randn(3, 20)
    h[0, 3] = h[1, -2] = g[2, 5] = math.nan
    got, want = (
        grads(function, [h], g)[1]
        for function in (
            lambda h: kernels.mlp_activation(h, kind),
            lambda h: plain(h, kind),
        )
    )
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.nan_to_num(0), want.nan_to_num(0))


@kinds
def test_large_arguments(backend, kind):
    """Tails are 0 and slopes 0 or 1, with nothing infinite between."""
    large = torch.tensor([-3e38, -1e20, -200.0, -89.0, 89.0, 200.0, 1e20, 3e38])[:, None]
    h = torch.cat([large, torch.ones_like(large)], 1) if kind == "swiglu" else large
    y, g = grads(lambda h: kernels.mlp_activation(h, kind), [h], torch.ones(8, 1))
    flat = large.abs() if kind == "abs" else large.relu()
    torch.testing.assert_close(y, flat, rtol=0, atol=1e-35)
    torch.testing.assert_close(
        g[:, :1], large.sign() if kind == "abs" else (large > 0).float(), rtol=0, atol=1e-35
    )


@pytest.mark.parametrize("kind", ["gelu", "abs"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_limits_at_infinity(backend, dtype, kind):
    h = torch.tensor([math.inf, -math.inf], dtype=dtype).repeat_interleave(67)
    y, slope = grads(lambda h: kernels.mlp_activation(h, kind), [h], torch.ones_like(h))
    limits = {"gelu": (math.inf, 0, 1, 0), "abs": (math.inf, math.inf, 1, -1)}[kind]
    for got, (above, below) in ((y, limits[:2]), (slope, limits[2:])):
        assert (got[:67] == above).all()
        assert (got[67:] == below).all()


def test_the_slope_of_abs_at_0_is_0(backend):
    h = torch.tensor([[-0.0, 0.0, -1.0, 1.0]])
    y, g = grads(lambda h: kernels.mlp_activation(h, "abs"), [h], torch.ones(1, 4))
    assert y.tolist() == [[0, 0, 1, 1]]
    assert g.tolist() == [[0, 0, -1, 1]]


@kinds
def test_gradcheck(kind):
    h = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: kernels.mlp_activation(h, kind), [h])


@native
@kinds
def test_equal_bits_on_one_and_many_threads(backend, set_threads, kind):
    h, g = torch.randn(3000, width(50, kind)), torch.randn(3000, 50)
    outcomes = []
    for threads in (1, 2, 3):
        set_threads(threads)
        outcomes.append(grads(lambda h: kernels.mlp_activation(h, kind), [h], g))
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


@kinds
def test_only_the_input_is_saved(backend, kind):
    h = torch.randn(4, 12, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        kernels.mlp_activation(h, kind)
    assert [tensor.numel() for tensor in saved] == [48]


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype, kind):
    h = torch.randn(4, 12, dtype=torch.float32).to(dtype).requires_grad_()
    y = torch.ops.depthnet.mlp_activation(h, kind)
    torch.library.opcheck(torch.ops.depthnet.mlp_activation, (h, kind))
    torch.library.opcheck(
        torch.ops.depthnet.mlp_activation_backward, (torch.randn_like(y), h.detach(), kind)
    )


@kinds
def test_compiled_equals_eager(backend, kind):
    h = torch.randn(4, 6, 12, requires_grad=True)

    def loss(h):
        return kernels.mlp_activation(h.sin(), kind).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(h), h) for f in (loss, compiled))
    torch.testing.assert_close(got, want)


def test_autocast_leaves_it_alone(backend):
    h = torch.randn(4, 12)
    with torch.autocast(h.device.type, torch.bfloat16):
        y = kernels.mlp_activation(h, "gelu")
    assert torch.equal(y, kernels.mlp_activation(h, "gelu"))


def test_no_second_derivative(backend):
    h = torch.randn(2, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        kernels.mlp_activation(h, "gelu").square().sum(), h, create_graph=True
    )
    with pytest.raises(RuntimeError, match="mlp_activation cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("h", "kind", "error", "words"),
    [
        ([1.0], "gelu", TypeError, "h must be a tensor, got list"),
        (torch.zeros(2, dtype=torch.int64), "gelu", TypeError, "h must be one of float32"),
        (torch.zeros(()), "gelu", ValueError, r"h must have the shape \(\.\.\., m\), got \(\)"),
        (
            torch.zeros(2, 3),
            "swiglu",
            ValueError,
            r"h must have the shape \(\.\.\., 2 m\), got \(2, 3\)",
        ),
        (
            torch.zeros(2),
            "GELU",
            ValueError,
            "kind='GELU' is not one of gelu, swiglu, abs; did you mean",
        ),
    ],
)
def test_bad_arguments_are_named(h, kind, error, words):
    with pytest.raises(error, match=words):
        kernels.mlp_activation(h, kind)
