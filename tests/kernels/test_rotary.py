import pytest
import torch
from cases import DTYPES, assert_as_accurate, native

from depthnet import kernels
from depthnet.kernels.reference import stream_dtype
from depthnet.kernels.triton import INTERPRETED

SINGLE = torch.float32
pytestmark = pytest.mark.usefixtures("float64_is_torchs")


def rotation_of(tokens, size, dtype=SINGLE):
    angles = torch.rand(tokens, size // 2, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    table = torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1)
    return table.to(stream_dtype(dtype))


def plain(qkv, rotation):
    """As a user of torch writes it."""
    q, k, v = qkv.transpose(1, 3).unbind(2)
    cos, sin = rotation[:, 0].to(qkv.dtype), rotation[:, 1].to(qkv.dtype)
    half = qkv.shape[-1] // 2

    def turned(x):
        return x * cos + torch.cat([x[..., half:], x[..., :half]], -1) * sin

    return turned(q), turned(k), v


def definition(qkv, rotation):
    """Pairs of coordinates are complex numbers."""
    half = qkv.shape[-1] // 2
    by = torch.complex(rotation[:, 0, :half], rotation[:, 1, half:])[:, None]

    def turned(x):
        y = torch.complex(x[..., :half], x[..., half:]) * by
        return torch.cat([y.real, y.imag], -1)

    q, k, v = qkv.unbind(2)
    return [part.transpose(1, 2) for part in (turned(q), turned(k), v)]


def results(function, qkv, rotation, grads, dtype=None):
    """[q, k, v, gradient of qkv], computed in `dtype`."""
    qkv = qkv.detach().to(dtype or qkv.dtype).requires_grad_()
    outputs = function(qkv, rotation.to(dtype or rotation.dtype))
    grads = [g.to(qkv.dtype) for g in grads]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, qkv, grads)]


def draw(batch, tokens, heads, size, dtype=SINGLE):
    qkv = torch.randn(batch, tokens, 3, heads, size).to(dtype)
    grads = [torch.randn(batch, heads, tokens, size).to(dtype) for _ in range(3)]
    return qkv, rotation_of(tokens, size, dtype), grads


def check(qkv, rotation, grads):
    got = results(kernels.rotary, qkv, rotation, grads)
    judge = results(plain, qkv, rotation, grads)
    truth = results(definition, qkv, rotation, grads, torch.float64)
    assert_as_accurate(str(tuple(qkv.shape)), got, judge, truth, 3)
    assert all(part.is_contiguous() for part in got[:3])


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
@pytest.mark.parametrize(("tests", "keyword"), [("tests/kernels/test_rotary.py", "triton")])
def test_in_the_interpreter(run_in_interpreter, tests, keyword):
    pytest.importorskip("triton", reason="triton is not installed")
    run_in_interpreter(tests, keyword)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("size", [2, 6, 64, 80])
def test_values_and_gradients(backend, dtype, heads, size):
    check(*draw(2, 5, heads, size, dtype))


@pytest.mark.parametrize(
    "shape", [(0, 5, 3, 8), (2, 0, 3, 8), (2, 5, 0, 8), (1, 1, 1, 2), (40, 70, 2, 4)]
)
def test_any_shape(backend, shape):
    check(*draw(*shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(backend, dtype):
    qkv, rotation, grads = draw(2, 5, 3, 8, dtype)
    qkv = qkv.transpose(1, 3).contiguous().transpose(1, 3)
    rotation = torch.cat([rotation, rotation], -1)[..., :8]
    by_tokens = grads[0].transpose(1, 2).contiguous().transpose(1, 2)  # as attention may have it
    check(
        qkv,
        rotation,
        [by_tokens, grads[1].mT.contiguous().mT, grads[2][:1, :1].expand_as(grads[2])],
    )


def test_a_part_that_is_not_used(backend):
    qkv, rotation, grads = draw(2, 5, 3, 8)
    qkv.requires_grad_()
    q, _, _ = kernels.rotary(qkv, rotation)
    q.backward(grads[0])
    want = results(kernels.rotary, qkv, rotation, [grads[0], *(0 * g for g in grads[1:])])[3]
    assert torch.equal(qkv.grad, want)


def test_parts_share_no_memory(backend):
    qkv, rotation, _ = draw(2, 5, 3, 8)
    before = qkv.clone()
    for part in kernels.rotary(qkv, rotation):
        part.zero_()
    assert torch.equal(qkv, before)


def test_not_finite_values_stay_in_their_pair(backend):
    qkv, rotation, _ = draw(2, 5, 3, 8)
    qkv[1, 2, 1, 0, 5] = torch.nan  # of keys
    q, k, v = kernels.rotary(qkv, rotation)
    assert q.isfinite().all()
    assert v.isfinite().all()
    assert k.isnan().nonzero().tolist() == [[1, 0, 2, 1], [1, 0, 2, 5]]


def test_gradcheck():
    qkv, rotation, _ = draw(2, 3, 2, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda qkv: kernels.rotary(qkv, rotation), [qkv.requires_grad_()]
    )


@native
def test_equal_bits_on_one_and_many_threads(backend, set_threads):
    case = draw(20, 100, 3, 32)
    outcomes = []
    for threads in (1, 2, 3):
        set_threads(threads)
        outcomes.append(results(kernels.rotary, *case))
    for other in outcomes[1:]:
        assert all(map(torch.equal, outcomes[0], other))


def test_only_the_rotation_is_saved(backend):
    qkv, rotation, _ = draw(2, 5, 3, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        kernels.rotary(qkv.requires_grad_(), rotation)
    assert [tensor.numel() for tensor in saved] == [rotation.numel()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    qkv, rotation, grads = draw(2, 5, 3, 8, dtype)
    torch.library.opcheck(torch.ops.depthnet.rotary, (qkv.requires_grad_(), rotation))
    torch.library.opcheck(torch.ops.depthnet.rotary_backward, (*grads, rotation))


def test_compiled_equals_eager(backend):
    qkv, rotation, _ = draw(2, 5, 3, 8)
    qkv.requires_grad_()

    def loss(qkv):
        q, k, v = kernels.rotary(qkv.sin(), rotation)
        return (q @ k.mT @ v).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = (torch.autograd.grad(f(qkv), qkv) for f in (loss, compiled))
    torch.testing.assert_close(got, want)


def test_no_second_derivative(backend):
    qkv, rotation, _ = draw(2, 5, 3, 8)
    qkv.requires_grad_()
    q, k, v = kernels.rotary(qkv, rotation)
    (gradient,) = torch.autograd.grad((q * k * v).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="rotary cannot be differentiated twice"):
        gradient.sum().backward()


QKV, ROTATION = torch.zeros(2, 5, 3, 4, 8), torch.zeros(5, 2, 8)


@pytest.mark.parametrize(
    ("qkv", "rotation", "error", "words"),
    [
        (None, ROTATION, TypeError, "qkv must be a tensor, got NoneType"),
        (QKV.long(), ROTATION, TypeError, "qkv must be one of float32"),
        (QKV[0], ROTATION, ValueError, r"qkv must have the shape .*even size, got \(5, 3, 4, 8\)"),
        (QKV[:, :, :2], ROTATION, ValueError, r"qkv must have .*, got \(2, 5, 2, 4, 8\)"),
        (QKV[..., :7], ROTATION, ValueError, r"qkv must have .*, got \(2, 5, 3, 4, 7\)"),
        (QKV, None, TypeError, "rotation must be a tensor"),
        (
            QKV,
            ROTATION[:4],
            ValueError,
            r"rotation must have the shape \(5, 2, 8\), got \(4, 2, 8\)",
        ),
        (QKV, ROTATION.bfloat16(), TypeError, "rotation must be torch.float32, got torch.bfloat16"),
        (QKV.double(), ROTATION, TypeError, "rotation must be torch.float64, got torch.float32"),
        (QKV, ROTATION.to("meta"), ValueError, "rotation must be on the device of qkv"),
        (QKV, ROTATION.clone().requires_grad_(), ValueError, "rotation gets no gradient"),
    ],
)
def test_bad_arguments_are_named(qkv, rotation, error, words):
    with pytest.raises(error, match=words):
        kernels.rotary(qkv, rotation)
