import math

import pytest
import torch
from cases import assert_as_accurate, native

from depthnet import kernels
from depthnet.kernels.triton import INTERPRETED

WIDTHS = [3, 33, 64, 257]
LONG = 9000  # more columns than a tile of the GPU's has, and than a block of the CPU's sums
MIXED = [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
EQUAL = [(d, d) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]
NORMS = ["layer", "rms"]


def plain(x, branch, weight=None, bias=None, norm="layer", eps=1e-5):
    """As a user of torch writes it, with a norm computed in float32 at least."""
    s = (x + 0.3 * branch).to(x.dtype)
    functional, n = torch.nn.functional, x.shape[-1:]
    wide = s if s.dtype == torch.float64 else s.float()
    weight, bias = (t if t is None else t.to(wide.dtype) for t in (weight, bias))
    if norm == "layer":
        y = functional.layer_norm(wide, n, weight, bias, eps)
    else:
        y = functional.rms_norm(wide, n, weight, eps)
        y = y if bias is None else y + bias
    return s, y.to(branch.dtype)


def definition(x, branch, weight=None, bias=None, norm="layer"):
    s = x + 0.3 * branch
    centered = s - s.mean(-1, keepdim=True) if norm == "layer" else s
    y = centered * (centered.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    y = y if weight is None else y * weight
    return s, y if bias is None else y + bias


def ours(x, branch, weight=None, bias=None, norm="layer", eps=1e-5):
    return kernels.residual_norm(x, branch, 0.3, weight, bias, norm=norm, eps=eps)


def results(function, inputs, grads, dtype=None, **options):
    """[s, y, gradient of each input] of a function of tensors, computed in `dtype`; no grad for None."""
    inputs = [t if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    outputs = function(*inputs, **options)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    used, grads = zip(*pairs, strict=True)
    wanted = [t for t in inputs if t is not None]
    return [
        *(output.detach() for output in outputs),
        *torch.autograd.grad(used, wanted, grads, materialize_grads=True, allow_unused=True),
    ]


def tensors(dtypes, *shape):
    """x, branch, weight, bias and the gradients of s and y."""
    stream, branch = dtypes
    x, grad_s = (torch.randn(shape).to(stream) for _ in range(2))
    h, grad_y = (torch.randn(shape).to(branch) for _ in range(2))
    weight, bias = (torch.randn(shape[-1:]).to(stream) for _ in range(2))
    return [x, h, weight, bias], [grad_s, grad_y]


def check(inputs, grads, terms, **options):
    got = results(ours, inputs, grads, **options)
    judge = results(plain, inputs, grads, **options)
    truth = results(definition, inputs, grads, torch.float64, **options)
    assert_as_accurate(str(options), got, judge, truth, terms)


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("tests", "keyword"), [("tests/kernels/test_residual_norm.py", "triton")])
def test_in_the_interpreter(run_in_interpreter, tests, keyword):
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_interpreter(tests, keyword)


@pytest.mark.parametrize("dtypes", [*EQUAL, *MIXED])
@pytest.mark.parametrize("n", WIDTHS)
@pytest.mark.parametrize("norm", NORMS)
def test_values_and_gradients(backend, dtypes, n, norm):
    inputs, grads = tensors(dtypes, 3, 5, n)
    check(inputs, grads, 4 * n, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, LONG), (700, 24)])
def test_long_rows_and_many_rows(backend, norm, shape):
    inputs, grads = tensors(EQUAL[0], *shape)
    check(inputs, grads, shape[-1], norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("given", [(False, False), (True, False), (False, True)])
def test_without_weight_or_bias(backend, norm, given):
    inputs, grads = tensors(MIXED[0], 4, 33)
    parameters = [t if there else None for t, there in zip(inputs[2:], given, strict=True)]
    check([*inputs[:2], *parameters], grads, 33, norm=norm)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("used", [0, 1])
def test_an_output_that_is_not_used(backend, norm, used):
    inputs, grads = tensors(MIXED[0], 4, 33)
    grads[1 - used] = None
    check(inputs, grads, 33, norm=norm)


@pytest.mark.parametrize("frozen", range(4))
def test_a_frozen_input(backend, frozen):
    inputs, grads = tensors(EQUAL[1], 4, 33)
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index != frozen)
    for function in (ours, plain):
        torch.autograd.backward(function(*inputs), grads)
    assert inputs[frozen].grad is None
    twice = [t.grad for index, t in enumerate(inputs) if index != frozen]
    once = results(plain, inputs, grads)[2:]
    del once[frozen]
    torch.testing.assert_close(twice, [2 * g for g in once])


@pytest.mark.parametrize("shape", [(6,), (5, 1), (0, 6), (2, 0, 6), (4, 0), (2, 3, 4, 33)])
@pytest.mark.parametrize("norm", NORMS)
def test_any_shape(backend, shape, norm):
    inputs, grads = tensors(EQUAL[1], *shape)
    got, want = (results(f, inputs, grads, norm=norm) for f in (ours, definition))
    torch.testing.assert_close(got, want)


def test_non_contiguous(backend):
    inputs = [torch.randn(9, 5).mT, torch.randn(5, 18)[:, ::2], torch.randn(18)[::2], None]
    grads = [torch.randn(9).expand(5, 9), torch.randn(9, 5).mT]
    check(inputs, grads, 9)


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(backend, norm):
    inputs = [t.requires_grad_() for t in tensors(EQUAL[1], 3, 7)[0]]
    assert torch.autograd.gradcheck(lambda *inputs: ours(*inputs, norm=norm), inputs)


def test_the_norm_is_that_of_the_rounded_sum(backend):
    x, branch = torch.full((1, 4), 256.0).bfloat16(), torch.full((1, 4), 0.25).bfloat16()
    branch[0, 0] = 8.0  # of 256.x only that of 8 is seen
    s, y = kernels.residual_norm(x, branch, 1.0, eps=0.0)
    assert s.tolist() == [[264.0, 256.0, 256.0, 256.0]]
    torch.testing.assert_close(y, torch.tensor([[3.0, -1.0, -1.0, -1.0]]).bfloat16() / math.sqrt(3))


def test_a_large_mean(backend):
    x = torch.rand(2, 1000) + 1000
    _, y = kernels.residual_norm(x, torch.zeros_like(x), 1.0)
    wide = x.double()
    want = torch.nn.functional.layer_norm(wide, (1000,))
    # The mean itself, near 1000, is a float32; the deviation is near 0.3.
    assert (y - want).abs().max() <= 4 * 1000 * torch.finfo(torch.float32).eps


def test_not_finite_values_stay_in_their_row(backend):
    for norm in NORMS:
        x, branch = torch.randn(3, 40), torch.randn(3, 40)
        branch[1, 35] = math.nan
        s, y = kernels.residual_norm(x, branch, 0.5, norm=norm)
        assert s.isnan().sum() == 1
        assert y[1].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("norm", "statistics"), [("layer", 2), ("rms", 1)])
def test_what_is_saved(backend, norm, statistics):
    inputs = [t.requires_grad_() for t in tensors(MIXED[0], 4, 33)[0]]
    saved = []

    def pack(tensor):
        saved.append((tensor.dtype, tensor.numel()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ours(*inputs, norm=norm)
    expected = [(torch.float32, numel) for numel in (4 * 33, 4 * statistics, 33)]
    assert saved == expected  # s, statistics, weight


@native
def test_equal_bits_on_one_and_many_threads(backend, set_threads):
    inputs, grads = tensors(EQUAL[0], 3000, 50)
    outcomes = []
    for threads in (1, 2, 3):
        set_threads(threads)
        outcomes.append(results(ours, inputs, grads))
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(backend, norm):
    for dtypes in (EQUAL[0], MIXED[0]):
        inputs, grads = tensors(dtypes, 4, 12)
        for save in (True, False):
            x, branch, weight, bias = (t.detach().requires_grad_(save) for t in inputs)
            arguments = x, branch, 0.3, weight.float(), bias.float(), norm == "layer", 1e-5, save
            torch.library.opcheck(torch.ops.depthnet.residual_norm, arguments)
        s, _, statistics = torch.ops.depthnet.residual_norm(*arguments[:-1], True)
        for grad_s, wanted in ((grads[0], True), (None, False)):
            backward = grads[1], s, grad_s, statistics, 0.3, weight.float(), wanted, wanted
            torch.library.opcheck(torch.ops.depthnet.residual_norm_backward, backward)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("used", ["both", "s", "y"])
def test_compiled_equals_eager(backend, norm, used):
    inputs = [t.requires_grad_() for t in tensors(MIXED[0], 4, 12)[0]]

    def loss(scale, *inputs):
        s, y = kernels.residual_norm(
            torch.tanh(inputs[0]), inputs[1], scale, *inputs[2:], norm=norm
        )
        return {"both": (s * y).sum(), "s": s.sin().sum(), "y": y.float().sin().sum()}[used]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for scale in (0.3, 0.4, 0.5):
        want, got = (
            torch.autograd.grad(
                f(scale, *inputs), inputs, allow_unused=True, materialize_grads=True
            )
            for f in (loss, compiled)
        )
        torch.testing.assert_close(got, want)


def test_under_autocast_branch_may_be_narrow(backend):
    inputs, _ = tensors(MIXED[0], 4, 16)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        s, y = ours(*inputs)
    assert (s.dtype, y.dtype) == MIXED[0]
    torch.testing.assert_close((s, y), ours(*inputs), rtol=0, atol=0)


def test_no_second_derivative(backend):
    x, branch = torch.randn(2, 6), torch.randn(2, 6, requires_grad=True)
    _, y = kernels.residual_norm(x, branch, 0.3)
    (gradient,) = torch.autograd.grad((y**2).sum(), branch, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_norm cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        (
            {"x": torch.zeros(())},
            ValueError,
            r"branch must have the shape of x, \(\), got \(2, 3\)",
        ),
        ({"branch": torch.zeros(2, 4)}, ValueError, r"branch must have the shape of x, \(2, 3\)"),
        ({"branch": torch.zeros(2, 3).double()}, TypeError, "branch must have the dtype of x"),
        ({"x": torch.zeros(2, 3).half()}, TypeError, "branch must have the dtype of x"),
        (
            {"branch": torch.zeros(2, 3, device="meta")},
            ValueError,
            "branch must be on the device of x",
        ),
        ({"scale": math.inf}, ValueError, "scale must be a finite number, got inf"),
        ({"scale": torch.ones(())}, ValueError, "scale must be a finite number, got tensor"),
        ({"weight": torch.zeros(2)}, ValueError, r"weight must have the shape \(3\).*got \(2\)"),
        ({"bias": torch.zeros(2, 3)}, ValueError, r"bias must have the shape \(3\).*got \(2, 3\)"),
        ({"weight": torch.zeros(3).double()}, TypeError, "weight must have the dtype of x"),
        ({"bias": [0.0, 0.0, 0.0]}, TypeError, "bias must be a tensor, got list"),
        ({"norm": "RMS"}, ValueError, "norm='RMS' is not one of layer, rms; did you mean 'rms'"),
        ({"eps": -1.0}, ValueError, "eps must not be negative, got -1.0"),
        ({"eps": math.nan}, ValueError, "eps must be a finite number, got nan"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"x": torch.zeros(2, 3), "branch": torch.zeros(2, 3), "scale": 1.0, **change}
    with pytest.raises(error, match=words):
        kernels.residual_norm(**arguments)
