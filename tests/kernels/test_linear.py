"""linear and embedding_sum: as exact as torch's, and the same bits whoever trains beside a member."""

import math

import pytest
import torch
from backends import run_on
from cases import NATIVE, assert_as_accurate, grads, native
from torch._subclasses.fake_tensor import FakeTensorMode

from depthnet import kernels

OPS = torch.ops.depthnet
FLOATS = [torch.float32, torch.float64]
# rows, in, out: odd ones, one output, sums longer than a chunk, strips and tiles that are not full.
SHAPES = [
    (5, 7, 9),
    (40, 64, 1),
    (64, 64, 100),
    (17, 300, 31),
    (33, 1000, 65),
    (3, 1, 130),
    (16, 3072, 10),
]


@pytest.fixture(params=["reference", *NATIVE])
def backend(request):
    """The backends that have these operators."""
    yield from run_on(request)


def plain_linear(x, weight):
    return x @ weight.mT


def plain_embedding_sum(index, weight):
    """weight (P, features, n)."""
    features = torch.arange(weight.shape[1], device=index.device)
    hot = (index[..., None] == features).sum(-2).to(weight.dtype)
    return hot @ weight


def draw(lead, rows, features, outputs, dtype=torch.float32):
    x, weight, g = (rows, features), (outputs, features), (rows, outputs)
    return [torch.randn(*lead, *shape, dtype=dtype) for shape in (x, weight, g)]


def draw_index(lead, rows, active, features):
    """Features that are named more than once among them."""
    return torch.randint(features, (*lead, rows, active))


def embedding(index):
    return lambda weight: kernels.embedding_sum(index, weight)


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (1,), (3,)])
def test_linear_is_as_exact_as_torch(backend, dtype, lead):
    for shape in SHAPES:
        x, weight, g = draw(lead, *shape, dtype)
        ours = grads(kernels.linear, [x, weight], g)
        plain = grads(plain_linear, [x, weight], g)
        truth = grads(plain_linear, [x, weight], g, torch.float64)
        assert_as_accurate(str(shape), ours, plain, truth, terms=max(shape))


@native
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_sum_is_as_exact_as_its_terms_allow(backend, dtype):
    # One rounding a step at the most, two without a fused multiply-add: a bound for every element.
    x, weight, _ = draw((2,), 9, 700, 33, dtype)
    u = torch.finfo(dtype).eps / 2
    bound = 2 * 701 * u * (x.abs() @ weight.abs().mT).double()
    if dtype == torch.float64:  # the judge's own roundings
        bound *= 2
    error = (kernels.linear(x, weight).double() - x.double() @ weight.double().mT).abs()
    assert (error <= bound).all()


@pytest.mark.parametrize("lead", [(), (3,)])
def test_linear_of_nothing(backend, lead):
    for rows, features, outputs in [(0, 4, 5), (3, 0, 5), (3, 4, 0)]:
        x, weight, g = draw(lead, rows, features, outputs)
        ours, plain = (grads(f, [x, weight], g) for f in (kernels.linear, plain_linear))
        torch.testing.assert_close(ours, plain, rtol=0, atol=0)


@native
@pytest.mark.parametrize("dtype", FLOATS)
def test_strides_change_no_bit(backend, dtype):
    x, weight, g = draw((3,), 10, 40, 24, dtype)
    expected = grads(kernels.linear, [x, weight], g)

    def views(tensor):
        yield tensor.mT.contiguous().mT
        yield tensor.repeat_interleave(2, -1)[..., ::2]
        yield tensor.movedim(0, 2).contiguous().movedim(2, 0)
        yield torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)

    for a, b, c in zip(views(x), views(weight), views(g), strict=True):
        assert same(grads(kernels.linear, [a, b], c), expected)
    shared = x[0].expand_as(x), weight[0].expand_as(weight), g[0, :1, :1].expand_as(g)
    dense = [tensor.contiguous() for tensor in shared]
    assert same(
        grads(kernels.linear, list(shared[:2]), shared[2]),
        grads(kernels.linear, dense[:2], dense[2]),
    )


def test_one_input_for_all_members(backend):
    x, weight, g = draw((3,), 6, 20, 11)
    together = grads(kernels.linear, [x[0], weight], g)
    each = [grads(kernels.linear, [x[0], w], d) for w, d in zip(weight, g, strict=True)]
    y, grad_x, grad_weight = (torch.stack(results) for results in zip(*each, strict=True))
    torch.testing.assert_close(together[0], y)
    torch.testing.assert_close(together[1], grad_x.sum(0))
    torch.testing.assert_close(together[2], grad_weight)


@native
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(64, 64, 100), (7, 300, 65), (64, 3072, 16)])
def test_linear_of_a_member_is_the_same_bits_in_any_population_on_any_threads(
    backend, dtype, shape, set_threads
):
    arguments = draw((33,), *shape, dtype)
    arguments[0][5] = math.nan  # a member that has diverged touches no other
    set_threads(1)
    alone = [grads(kernels.linear, [x, w], g) for x, w, g in zip(*arguments, strict=True)]
    shuffled = torch.randperm(33)
    for members in ([4], shuffled[:7].tolist(), shuffled.tolist()):
        x, weight, g = (tensor[members] for tensor in arguments)
        for threads in (1, 2, 3):
            set_threads(threads)
            together = grads(kernels.linear, [x, weight], g)
            for place, member in enumerate(members):
                own = [result[place] for result in together]
                assert member == 5 or same(own, alone[member]), f"{len(members)}, {threads} threads"


@native
@pytest.mark.parametrize("dtype", FLOATS)
def test_embedding_sum_of_a_member_is_the_same_bits_in_any_population_on_any_threads(
    backend, dtype, set_threads
):
    rows, active, features, n = 40, 8, 90, 30
    index, weight = (
        draw_index((33,), rows, active, features),
        torch.randn(33, features, n, dtype=dtype),
    )
    g = torch.randn(33, rows, n, dtype=dtype)
    set_threads(1)
    alone = [grads(embedding(i), [w], d) for i, w, d in zip(index, weight, g, strict=True)]
    shuffled = torch.randperm(33)
    for members in ([4], shuffled[:7].tolist(), shuffled.tolist()):
        for threads in (1, 2, 3):
            set_threads(threads)
            together = grads(embedding(index[members]), [weight[members]], g[members])
            for place, member in enumerate(members):
                assert same([result[place] for result in together], alone[member])


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lead", [(), (1,), (3,)])
def test_embedding_sum_is_linear_of_its_ones(backend, dtype, lead):
    for rows, active, features, n in [
        (5, 2, 9, 7),
        (64, 8, 80, 64),
        (1, 1, 1, 1),
        (0, 3, 5, 4),
        (4, 9, 3, 33),
    ]:
        index, weight = (
            draw_index(lead, rows, active, features),
            torch.randn(*lead, features, n, dtype=dtype),
        )
        g = torch.randn(*lead, rows, n, dtype=dtype)
        ours = grads(embedding(index), [weight], g)
        weight = weight if lead else weight[None]
        index, g = index.view(len(weight), rows, active), g.view(len(weight), rows, n)
        plain = grads(lambda w: plain_embedding_sum(index, w), [weight], g)  # noqa: B023
        truth = grads(lambda w: plain_embedding_sum(index, w), [weight], g, torch.float64)  # noqa: B023
        ours = [tensor if lead else tensor[None] for tensor in ours]
        assert_as_accurate(str((rows, active)), ours, plain, truth, terms=max(active, rows))


def test_index_may_be_shared_strided_and_int32(backend):
    index, weight, g = draw_index((), 12, 4, 10), torch.randn(3, 10, 8), torch.randn(3, 12, 8)
    expected = grads(embedding(index.expand(3, 12, 4).contiguous()), [weight], g)
    for other in (index, index.int(), index.mT.contiguous().mT, index.expand(3, 12, 4)):
        torch.testing.assert_close(grads(embedding(other), [weight], g), expected)
    strided = [weight.mT.contiguous().mT], g.mT.contiguous().mT
    torch.testing.assert_close(grads(embedding(index), *strided), expected)


@pytest.mark.parametrize("lead", [(), (2,)])
def test_an_index_names_a_feature(backend, lead):
    for bad in (12, -1):
        with pytest.raises((IndexError, RuntimeError)):
            kernels.embedding_sum(torch.tensor([[0, 1, bad]]), torch.randn(*lead, 12, 4))


def test_gradcheck(backend):
    x, weight, _ = draw((2,), 4, 3, 5, torch.float64)
    inputs = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(kernels.linear, inputs)
    assert torch.autograd.gradgradcheck(kernels.linear, inputs)
    index, table = draw_index((2,), 4, 3, 6), torch.randn(2, 6, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(embedding(index), (table.requires_grad_(),))


@native
def test_embedding_sum_has_no_second_derivative(backend):
    y = kernels.embedding_sum(
        draw_index((), 4, 3, 6), weight := torch.randn(6, 5, requires_grad=True)
    )
    (gradient,) = torch.autograd.grad((y**2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="embedding_sum cannot be differentiated twice"):
        gradient.sum().backward()


def test_only_what_the_gradients_need_is_saved_and_computed(backend):
    x, weight, g = draw((3,), 6, 20, 11)
    full = grads(kernels.linear, [x, weight], g)
    for frozen in (0, 1):
        free = [x.clone(), weight.clone()]
        free[1 - frozen].requires_grad_()
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # noqa: B023
            y = kernels.linear(*free)
        assert [tensor.numel() for tensor in saved] == [free[frozen].numel()]
        y.backward(g)
        torch.testing.assert_close(free[1 - frozen].grad, full[2 - frozen])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_torchs(backend, dtype):
    x, weight, g = draw((3,), 6, 20, 11, dtype)
    ours, plain = (grads(f, [x, weight], g) for f in (kernels.linear, plain_linear))
    torch.testing.assert_close(ours, plain, rtol=0, atol=0)
    index, table = draw_index((3,), 6, 2, 9), torch.randn(3, 9, 8).to(dtype)
    y = kernels.embedding_sum(index, table)
    torch.testing.assert_close(y, plain_embedding_sum(index, table))
    with torch.autocast(x.device.type, dtype):
        assert kernels.linear(x.float(), weight.float()).dtype == dtype


@pytest.mark.parametrize("lead", [1, 3])
def test_opcheck(backend, lead):
    for strided in (False, True):
        x, weight, _ = draw((lead,), 6, 12, 5)
        index, table = draw_index((lead,), 6, 3, 9), torch.randn(lead, 9, 4)
        if strided:
            x, weight, table = (tensor.mT.contiguous().mT for tensor in (x, weight, table))
        torch.library.opcheck(OPS.linear, (x.requires_grad_(), weight.requires_grad_()))
        torch.library.opcheck(OPS.embedding_sum, (index, table.requires_grad_()))
        torch.library.opcheck(OPS.embedding_sum_backward, (torch.randn(lead, 6, 4), index, 9))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(backend, compiler):
    x, weight, _ = draw((), 6, 12, 5)
    index, table = draw_index((), 6, 3, 9), torch.randn(9, 12)

    def loss(weight, table):
        return (
            kernels.linear(torch.tanh(x) + kernels.embedding_sum(index, table), weight)
            .square()
            .sum()
        )

    inputs = [weight.requires_grad_(), table.requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    actual = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(actual, torch.autograd.grad(loss(*inputs), inputs))


def test_fake_tensors_have_the_real_shapes(backend):
    with FakeTensorMode():
        x, weight, table = torch.empty(4, 10), torch.empty(2, 3, 10), torch.empty(2, 6, 5)
        weight.requires_grad_(), table.requires_grad_()
        kernels.linear(x, weight).sum().backward()
        kernels.embedding_sum(torch.zeros(4, 2, dtype=torch.int64), table).sum().backward()
        assert weight.grad.shape == weight.shape
        assert table.grad.shape == table.shape


@native
def test_no_forward_mode_derivative(backend):
    x, weight, _ = draw((), 4, 3, 5)
    with pytest.raises(
        NotImplementedError, match="x: forward-mode derivatives are not implemented"
    ):
        torch.func.jvp(lambda x: kernels.linear(x, weight), (x,), (x,))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
        (
            {"weight": torch.zeros(2, 3, dtype=torch.int64)},
            TypeError,
            "weight must be one of float32",
        ),
        ({"weight": torch.zeros(3)}, ValueError, r"weight must have the shape \(\*P, out, in\)"),
        (
            {"x": torch.zeros(4, 2)},
            ValueError,
            r"x must have the shape \(B, 3\) or \(2, B, 3\) beside",
        ),
        ({"x": torch.zeros(3, 4, 3)}, ValueError, r"\(B, 3\) or \(2, B, 3\) .* got \(3, 4, 3\)"),
        ({"x": torch.zeros(3)}, ValueError, r"x must have the shape \(B, 3\) or \(2, B, 3\)"),
        (
            {"x": torch.zeros(4, 3).double()},
            TypeError,
            "weight must have the dtype of x, torch.float64",
        ),
        (
            {"x": torch.zeros(4, 3, device="meta")},
            ValueError,
            "weight must be on the device of x, meta",
        ),
    ],
)
def test_bad_arguments_of_linear_are_named(change, error, words):
    arguments = {"x": torch.zeros(2, 4, 3), "weight": torch.zeros(2, 5, 3), **change}
    with pytest.raises(error, match=words):
        kernels.linear(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"index": torch.zeros(4, 3)},
            TypeError,
            "index must be a tensor of int64 or int32, got torch.f",
        ),
        ({"index": 3}, TypeError, "index must be a tensor of int64 or int32, got int"),
        (
            {"index": torch.zeros(3, 4, 2, dtype=torch.int64)},
            ValueError,
            r"index must have the shape \(B, active\) or \(2, B, active\) .* got \(3, 4, 2\)",
        ),
        (
            {"index": torch.zeros(4, 0, dtype=torch.int64)},
            ValueError,
            r"index must name at least one row, got the shape \(4, 0\)",
        ),
        (
            {"weight": torch.zeros(3)},
            ValueError,
            r"weight must have the shape \(\*P, features, n\)",
        ),
    ],
)
def test_bad_arguments_of_embedding_sum_are_named(change, error, words):
    arguments = {"index": torch.zeros(4, 3, dtype=torch.int64), "weight": torch.zeros(2, 5, 3)}
    with pytest.raises(error, match=words):
        kernels.embedding_sum(**{**arguments, **change})
