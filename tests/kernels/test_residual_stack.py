import math

import pytest
import torch
from backends import run_on
from cases import (
    ACTIVATIONS,
    BACKENDS,
    NATIVE,
    WIDTHS,
    assert_as_accurate,
    grads,
    native,
    nearest_kink,
    plain_stack,
)

from depthnet import kernels
from depthnet.kernels import triton

# So many that slopes near 0, where rounding decides, fall either way; the interpreter takes long for each.
MANY = 48 if triton.INTERPRETED else 500


@pytest.fixture(params=[*BACKENDS, "triton-layers", "triton-gemm"])
def backend(request):
    """Triton's kernels also as they run wider stacks than these."""
    yield from run_on(request)


@pytest.fixture(params=["reference", *NATIVE, "triton-gemm"])
def block_backend(request):
    """Of other blocks than plain ones, for which Triton has one regime only."""
    yield from run_on(request)


BLOCKS = [
    {"block_depth": 2},
    {"block_depth": 3, "norm": "layer"},
    {"norm": "layer"},
    {"block_depth": 2, "norm": "rms"},
    {"activate": "before"},
    {"block_depth": 2, "activate": "before"},
]


def draw(n, depth, lead=(), rows=5, dtype=torch.float32, away_from_kinks=4e-6, **block):
    """x, weight and the gradient of the output; redrawn while rounding could decide a slope."""
    while True:
        x, g = (torch.randn(*lead, rows, n).to(dtype) for _ in range(2))
        weight = (torch.randn(*lead, depth, n, n) / n**0.5).to(dtype)
        if nearest_kink(x.double(), weight.double(), 0.3, **block) > away_from_kinks:
            return x, weight, g


def stack(scale=0.3, **options):
    return lambda x, weight: kernels.residual_stack(x, weight, scale, **options)


def plain(scale=0.3, **options):
    return lambda x, weight: plain_stack(x, weight, scale, **options)


def check(name, inputs, g, ours, like):
    _, weight = inputs
    assert_as_accurate(
        name,
        grads(ours, inputs, g),
        grads(like, inputs, g),
        grads(like, inputs, g, torch.float64),
        terms=weight.shape[-1] * (weight.shape[-3] + 1),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [(), (1,), (3,)])
@pytest.mark.parametrize("depth", [0, 1, 5])
def test_values_and_gradients(backend, dtype, lead, depth):
    for n in WIDTHS:
        # A wide layer takes the interpreter seconds, and two of them show what five do.
        layers = min(depth, 2) if triton.INTERPRETED and n > 64 else depth
        x, weight, g = draw(n, layers, lead, dtype=dtype)
        check(f"n={n}", [x, weight], g, stack(), plain())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("checkpoint_every", [None, 2])
def test_half_precision_has_a_float32_stream(backend, dtype, checkpoint_every):
    for depth in (1, 5) if triton.INTERPRETED else (1, 5, 40):
        x, weight, g = draw(64, depth, rows=MANY, dtype=dtype, away_from_kinks=0)
        ours = stack(depth**-0.5, checkpoint_every=checkpoint_every)
        check(f"L={depth}", [x, weight], g, ours, plain(depth**-0.5))


@pytest.mark.parametrize("mean_subtract", [True, False])
def test_activations(backend, mean_subtract):
    for activation in ACTIVATIONS:
        x, weight, g = draw(33, 4)
        if nearest_kink(x.double(), weight.double(), 0.3, activation, mean_subtract) < 1e-6:
            pytest.fail("draw other inputs: a pre-activation is too near 0")
        options = {"activation": activation, "mean_subtract": mean_subtract}
        check(str(activation), [x, weight], g, stack(**options), plain(**options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_other_blocks(block_backend, block, dtype):
    layers = block.get("block_depth", 1)
    for n, rows in (
        ((2, 5), (33, 5)) if triton.INTERPRETED else ((2, 5), (33, 5), (64, 40), (129, 17))
    ):
        for lead, blocks in (((), 1), ((2,), 3)):
            x, weight, g = draw(n, blocks * layers, lead, rows, dtype, **block)
            check(f"n={n} L={blocks}", [x, weight], g, stack(**block), plain(**block))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_other_blocks_without_mean_subtraction_with_other_slopes(block_backend, block):
    options = {"activation": (0.5, -2.0), "mean_subtract": False, **block}
    x, weight, g = draw(33, 2 * block.get("block_depth", 1), **options)
    check(str(block), [x, weight], g, stack(**options), plain(**options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_other_blocks_in_half_precision(block_backend, block, dtype):
    depth = 4 * block.get("block_depth", 1)
    x, weight, g = draw(64, depth, rows=MANY, dtype=dtype, away_from_kinks=0)
    check(str(block), [x, weight], g, stack(0.5, **block), plain(0.5, **block))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_other_blocks_checkpointed_for_members_of_their_own(block_backend, block):
    scale = torch.tensor([0.5, 0.25, 1.0])
    x, weight, g = draw(20, 5 * block.get("block_depth", 1), (3,), **block)
    for every in (1, 2):
        ours = stack(scale, checkpoint_every=every, **block)
        check(f"every={every}", [x, weight], g, ours, plain(scale, **block))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_gradcheck_of_other_blocks(block_backend, block):
    layers = block.get("block_depth", 1)
    x, weight, _ = draw(5, 2 * layers, (2,), 3, torch.float64, away_from_kinks=1e-3, **block)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(stack(**block), inputs)


@pytest.mark.parametrize("every", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("lead", [(), (2,)])
def test_checkpointing(backend, every, lead):
    x, weight, g = draw(33, 7, lead)
    check(f"every={every}", [x, weight], g, stack(checkpoint_every=every), plain())


def test_checkpointing_saves_every_cth_input_only(backend):
    x, weight, _ = draw(16, 12)
    sizes = {}
    for every in (None, 4):
        saved = []

        def pack(tensor, saved=saved):
            saved.append(tensor.numel() * tensor.element_size())
            return tensor

        weight.requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kernels.residual_stack(x, weight, 0.3, checkpoint_every=every)
        sizes[every] = sum(saved) - weight.numel() * 4
    rows, n, depth = 5, 16, 12
    assert sizes[None] == depth * rows * (4 * n + n // 8)
    assert sizes[4] == 3 * rows * 4 * n


def test_nothing_is_saved_without_gradients(backend):
    x, weight, _ = draw(16, 12)
    _, inputs, signs, _ = torch.ops.depthnet.residual_stack(
        x[None], weight[None], 0.3, None, 1.0, 1.0, True, 0, False
    )
    assert inputs.numel() == signs.numel() == 0


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_saved_inputs_are_written_past_the_caches_but_the_same(backend, dtype):
    # 4 MiB and more of whole lines; the halves of the stack are below that.
    depth, n = 96, 64
    rows = 4 * 2**20 // (depth * n * dtype.itemsize) + 1
    x, weight = (t[None] for t in draw(n, depth, rows=rows, dtype=dtype, away_from_kinks=0)[:2])

    def run(x, weight):
        return torch.ops.depthnet.residual_stack(x, weight, 0.1, None, 1.0, 1.0, True, 0, True)

    y, inputs, signs, _ = run(x, weight)
    assert inputs.numel() * inputs.element_size() >= 4 * 2**20
    middle, first_inputs, first_signs, _ = run(x, weight[:, : depth // 2])
    end, last_inputs, last_signs, _ = run(middle, weight[:, depth // 2 :])
    assert torch.equal(y, end)
    assert torch.equal(inputs, torch.cat([first_inputs, last_inputs], 1))
    assert torch.equal(signs, torch.cat([first_signs, last_signs], 1))


def test_frozen_weight_and_frozen_input(backend):
    x, weight, g = draw(16, 3)
    full = grads(stack(), [x, weight], g)
    free = x.clone().requires_grad_()
    stack()(free, weight).backward(g)
    torch.testing.assert_close(free.grad, full[1])
    free = weight.clone().requires_grad_()
    stack()(x, free).backward(g)
    torch.testing.assert_close(free.grad, full[2])


def test_empty_batch(backend):
    for lead in ((), (3,)):
        x, weight = torch.randn(*lead, 0, 8), torch.randn(*lead, 2, 8, 8)
        y, grad_x, grad_weight = grads(stack(), [x, weight], torch.zeros_like(x))
        assert y.shape == grad_x.shape == x.shape
        assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_non_contiguous(backend):
    x, weight, g = draw(24, 6)
    views = [
        x.mT.contiguous().mT,
        weight.movedim(0, 2).contiguous().movedim(2, 0),
    ]
    assert not any(view.is_contiguous() for view in views)
    torch.testing.assert_close(grads(stack(), views, g), grads(stack(), [x, weight], g))
    half = weight[::2]
    expected = grads(plain(), [x, half], g.expand_as(x))
    torch.testing.assert_close(grads(stack(), [x, half], g), expected)


def test_members_do_not_touch_each_other(backend):
    x, weight, g = draw(32, 4, (3,))
    together = grads(stack(), [x, weight], g)
    x[1], weight[1] = math.nan, math.inf
    beside = grads(stack(), [x, weight], g)
    for a, b in zip(together, beside, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])


def test_multiplier_for_each_member(backend):
    x, weight, g = draw(16, 3, (3,))
    scale = torch.tensor([0.5, 0.25, 1.0])
    check("scale", [x, weight], g, stack(scale), plain(scale))
    check("checkpointed", [x, weight], g, stack(scale, checkpoint_every=2), plain(scale))


def test_two_leading_dimensions(backend):
    x, weight, g = draw(16, 3, (2, 3))
    check("P=(2, 3)", [x, weight], g, stack(), plain())


def test_gradcheck(backend):
    x, weight, _ = draw(5, 3, (2,), dtype=torch.float64, away_from_kinks=1e-3)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    for every in (None, 2):
        assert torch.autograd.gradcheck(stack(checkpoint_every=every), inputs)


def test_autocast(backend):
    x, weight, g = draw(32, 6, rows=MANY, away_from_kinks=0)
    with torch.autocast(x.device.type, torch.bfloat16):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = stack()(*inputs)
        assert y.dtype == torch.float32
        y.backward(g)  # inside, where the backward's own GEMMs must not be cast either
    ours = [y.detach(), *(t.grad for t in inputs)]
    assert all(t.dtype == torch.float32 for t in ours)

    def eager(x, weight):
        with torch.autocast(x.device.type, torch.bfloat16):
            return plain_stack(x, weight, 0.3)

    truth = grads(plain(), [x, weight], g, torch.float64)
    assert_as_accurate("autocast", ours, grads(eager, [x, weight], g), truth, terms=1)


def test_no_second_derivative(backend):
    x, weight, _ = draw(6, 2)
    y = stack()(x, weight.requires_grad_())
    (gradient,) = torch.autograd.grad((y**2).sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="residual_stack cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            {"weight": torch.zeros(2, 3, 4)},
            ValueError,
            r"weight must have the shape \(\*P, L, n, n\)",
        ),
        ({"weight": torch.zeros(3, 3)}, ValueError, r"weight must have the shape \(\*P, L, n, n\)"),
        ({"x": torch.zeros(5, 4)}, ValueError, r"x must have the shape \(B, 3\).*got \(5, 4\)"),
        ({"x": torch.zeros(2, 5, 3)}, ValueError, r"x must have the shape \(B, 3\)"),
        (
            {"x": torch.zeros(5, 3).half()},
            TypeError,
            "weight must have the dtype of x, torch.float16",
        ),
        (
            {"x": torch.zeros(5, 3, device="meta")},
            ValueError,
            "weight must be on the device of x, meta",
        ),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1, got 0"),
        ({"checkpoint_every": 1.5}, TypeError, "checkpoint_every must be an integer, got 1.5"),
        ({"block_depth": 0}, ValueError, "block_depth must be at least 1, got 0"),
        (
            {"block_depth": 3},
            ValueError,
            "weight must hold whole blocks of block_depth=3 layers, got 2",
        ),
        ({"norm": "batch"}, ValueError, "norm='batch' is not one of layer, rms"),
        ({"activate": "behind"}, ValueError, "activate='behind' is not one of after, before"),
        (
            {"norm": "rms", "activate": "before"},
            ValueError,
            "activate='before' goes without a norm, got norm='rms'",
        ),
        ({"scale": torch.ones(1)}, ValueError, "scale must be a number or a tensor over"),
        ({"scale": math.nan}, ValueError, "scale must be finite"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"x": torch.zeros(5, 3), "weight": torch.zeros(2, 3, 3), "scale": 1.0, **change}
    with pytest.raises(error, match=words):
        kernels.residual_stack(**arguments)
