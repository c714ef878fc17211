"""Properties of residual_stack over random shapes, slopes, strides and dtypes.

Of one layer the result is known within a bound: a term of a sum that passes at most k roundings is off by
at most k u / (1 - k u) of itself, u being half the spacing of the numbers at 1.  On the native backend a
deeper stack, a population and a checkpointed pass give the bits of their blocks, networks and segments.
"""

import itertools
from dataclasses import dataclass, replace

import torch
from cases import grads, native
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from depthnet import kernels
from depthnet.kernels.reference import slope, stream_dtype, subtract_mean, unpack_signs

repeatable = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

EDGES = [1, *(16 * i + j for i in range(1, 5) for j in (-1, 0, 1))]  # of vectors and words of signs
WIDTHS = st.sampled_from(EDGES) | st.integers(1, 70)
ROWS = st.sampled_from([0, *EDGES]) | st.integers(0, 70)
BLOCKS = st.sampled_from(
    [
        {},
        {"block_depth": 3},
        {"norm": "layer"},
        {"block_depth": 2, "norm": "rms"},
        {"activate": "before"},
        {"block_depth": 2, "activate": "before"},
    ]
)
# Half precision has few digits and no tiny numbers: nothing underflows.
NUMBERS = st.floats(-2, 2, width=16)


def view(tensor, strides):
    """A tensor of the same shape with such strides; `expanded` repeats the first row, layer or network."""
    if strides == "transposed":
        return tensor.mT.contiguous().mT
    if strides == "sliced":
        return tensor.repeat_interleave(2, -1)[..., ::2]
    if strides == "offset":
        return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)
    if strides == "expanded" and tensor.numel():
        repeated = -min(tensor.ndim, 3)
        return tensor.narrow(repeated, 0, 1).expand_as(tensor)
    return tensor


DENSE = st.just("contiguous")
VIEWS = st.sampled_from(["contiguous", "transposed", "sliced", "offset", "expanded"])


@dataclass
class Case:
    x: torch.Tensor
    weight: torch.Tensor
    g: torch.Tensor
    scale: float | torch.Tensor
    options: dict

    def run(self, **options):
        """The output and the gradients of x and of the weight."""

        def stack(x, weight):
            return kernels.residual_stack(x, weight, self.scale, **self.options, **options)

        return grads(stack, [self.x, self.weight], self.g)


@st.composite
def cases(draw, views=DENSE):
    n, rows, block = draw(WIDTHS), draw(ROWS), draw(BLOCKS)
    depth = block.get("block_depth", 1) * draw(st.integers(0, 6))
    lead = draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape, std=1.0):
        tensor = std * torch.randn(*lead, *shape, generator=generator)
        return view(tensor.to(dtype), draw(views))

    x, weight, g = normal(rows, n), normal(depth, n, n, std=n**-0.5), normal(rows, n)
    scale = torch.randn(lead, generator=generator) if draw(st.booleans()) else draw(NUMBERS)
    activation, mean_subtract = (draw(NUMBERS), draw(NUMBERS)), draw(st.booleans())
    options = {"activation": activation, "mean_subtract": mean_subtract, **block}
    return Case(x, weight, g, scale, options)


def assert_equal_bits(ours, theirs):
    for name, a, b in zip(("output", "gradient of x", "of weight"), ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"{name}: {(a != b).sum().item()} of {a.numel()} differ"


@native
@repeatable
@given(case=cases(), every=st.integers(1, 8))
def test_checkpointing_changes_no_bit(backend, case, every):
    assert_equal_bits(case.run(checkpoint_every=every), case.run())


@native
@repeatable
@given(case=cases(VIEWS), every=st.none() | st.integers(1, 8))
def test_strides_change_no_bit(backend, case, every):
    dense = {name: getattr(case, name).contiguous() for name in ("x", "weight", "g")}
    expected = replace(case, **dense).run(checkpoint_every=every)
    assert_equal_bits(case.run(checkpoint_every=every), expected)


@native
@repeatable
@given(case=cases())
def test_a_population_is_its_networks_bit_by_bit(backend, case):
    together = case.run()
    for index in itertools.product(*map(range, case.x.shape[:-2])):
        own = {name: getattr(case, name)[index] for name in ("x", "weight", "g")}
        if isinstance(case.scale, torch.Tensor):
            own["scale"] = case.scale[index]
        assert_equal_bits([result[index] for result in together], replace(case, **own).run())


@native
@repeatable
@given(case=cases())
def test_a_stack_is_its_blocks_one_after_another_bit_by_bit(backend, case):
    # The stream between the blocks is float32 or float64.
    weight, layers = case.weight, case.options.get("block_depth", 1)
    case = replace(case, x=case.x.to(stream_dtype(weight.dtype)))

    def blocks(x, weight):
        for block in weight.split(layers, -3):
            x = kernels.residual_stack(x, block, case.scale, **case.options)
        return x

    assert_equal_bits(case.run(), grads(blocks, [case.x, weight], case.g))


def gamma(roundings, dtype):
    """The relative error of a term after so many roundings."""
    u = torch.finfo(dtype).eps / 2
    return roundings * u / (1 - roundings * u)


def assert_within(result, truth, magnitude, roundings, storage, stream):
    """`magnitude` is the sum of the absolute terms.  The truth, in float64, is rounded as often.

    Three roundings are to the storage type: of an operand, of the result, and one more for what they
    do to each other.
    """
    error = gamma(roundings, stream) + gamma(roundings, torch.float64) + gamma(3, storage)
    excess = (result.double() - truth).abs() - error * magnitude
    assert (excess <= 0).all(), f"{excess.max().item()} too far at {excess.argmax().item()}"


@repeatable
@given(
    n=WIDTHS,
    rows=ROWS,
    members=st.integers(1, 3),
    dtypes=st.sampled_from(
        [
            (torch.float32, torch.float32),
            (torch.float64, torch.float64),
            (torch.bfloat16, torch.bfloat16),
            (torch.float32, torch.bfloat16),
        ]
    ),
    scale=NUMBERS,
    many_scales=st.booleans(),
    p=NUMBERS,
    q=NUMBERS,
    mean_subtract=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_a_layer_is_as_exact_as_its_sums_allow(
    backend, n, rows, members, dtypes, scale, many_scales, p, q, mean_subtract, seed
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, dtype=dtypes[0]):
        return torch.randn(members, *shape, generator=generator).to(dtype)

    x, g, weight = normal(rows, n), normal(rows, n), normal(1, n, n, dtype=dtypes[1])
    scales = normal(dtype=torch.float64) if many_scales else None
    constants = scale, scales, p, q, mean_subtract, 0
    y, *saved = torch.ops.depthnet.residual_stack(x, weight, *constants, True)
    inputs, signs, _ = saved
    grad_x, grad_weight = torch.ops.depthnet.residual_stack_backward(
        g, weight, *saved, *constants, True
    )

    # Each step beside the sum of its absolute terms, with the signs that were saved.
    operand = x.to(weight.dtype)
    assert torch.equal(inputs, operand[:, None])
    stream, storage = stream_dtype(x.dtype), weight.dtype
    w, s = weight[:, 0].double(), scale if scales is None else (scale * scales)[:, None, None]
    x, g, operand = x.double(), g.double(), operand.double()
    nonnegative = unpack_signs(signs[:, 0], n)
    slopes = slope(nonnegative, p, q, torch.float64)

    def mean_added(z):
        return z + z.mean(-1, keepdim=True) if mean_subtract else z

    h, terms_h = operand @ w.mT, operand.abs() @ w.abs().mT
    certain = h.abs() > (gamma(n, stream) + gamma(n, torch.float64)) * terms_h
    assert torch.equal(nonnegative[certain], h[certain] >= 0)

    # Roundings: n in h, 2 of a slope and its product, n in the mean, 1 of the difference, 3 of the
    # multiplier and its product, 1 of the sum.  phi stretches errors by its steeper slope at most.
    z = torch.where(h >= 0, p * h, -q * h)
    terms = x.abs() + abs(s) * mean_added(max(abs(p), abs(q)) * terms_h)
    truth = x + s * subtract_mean(z, mean_subtract)
    assert_within(y, truth, terms, 2 * n + 7, y.dtype, stream)

    d = s * subtract_mean(g, mean_subtract) * slopes
    terms_d = abs(s) * mean_added(g.abs()) * slopes.abs()
    assert_within(
        grad_weight[:, 0], d.mT @ operand, terms_d.mT @ operand.abs(), n + 6 + rows, storage, stream
    )
    assert_within(grad_x, g + d @ w, g.abs() + terms_d @ w.abs(), 2 * n + 7, storage, stream)
