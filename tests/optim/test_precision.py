"""bfloat16 and float16: float32 states, accuracy, float32 masters, stochastic rounding."""

import itertools

import pytest
import torch
from cases import cpu_isas, native
from optim.steps import (
    NAMES,
    close,
    equal,
    gradients,
    momentum,
    parameters,
    snapshot,
    threads,
    train,
)

import depthnet
from depthnet import kernels
from depthnet.kernels.reference import _round_stochastically

HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_steps_are_as_accurate_as_torchs(backend, name, dtype):
    """The error against float64 is at most twice that of torch in the same dtype, and one rounding."""
    start, results = parameters(dtype), []
    eps = {} if name == "SGD" else {"eps": 1e-4}
    for module, kind in ((depthnet, dtype), (torch, dtype), (torch, torch.float64)):
        params = [p.detach().to(kind).requires_grad_() for p in start]
        options = {"weight_decay": 0.1, **momentum(name), **eps}
        optimizer = getattr(module.optim, name)(params, lr=0.01, **options)
        for step in range(5):
            gradients(start, step)
            for param, own in zip(params, start, strict=True):
                param.grad = own.grad.to(kind)
            optimizer.step()
        results.append(params)
    for a, b, t in zip(*results, strict=True):
        error, torchs = ((v.double() - t).square().mean().sqrt() for v in (a, b))
        assert error <= 2 * torchs + torch.finfo(dtype).eps * t.square().mean().sqrt()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_states_are_float32_and_those_of_float32_parameters(backend, name, dtype):
    """In the first step they are the numbers that float32 parameters of equal value get, but for the
    roundings of float32; and the parameters are theirs, rounded once."""
    options = {"lr": 0.01, "weight_decay": 0.1, **momentum(name)}
    half = parameters(dtype)
    single = [p.detach().float().requires_grad_() for p in half]
    optimizers = [getattr(depthnet.optim, name)(params, **options) for params in (half, single)]
    gradients(half, 0)
    for a, b in zip(half, single, strict=True):
        b.grad = a.grad.float()
    for optimizer in optimizers:
        optimizer.step()
    narrow, wide = (snapshot(optimizer) for optimizer in optimizers)
    close(narrow[4:], wide[4:], steps=1)  # the states
    for a, b in zip(narrow[:4], wide[:4], strict=True):
        assert a.dtype == dtype
        tolerance = torch.finfo(dtype).eps / 2 + 10 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="torch before 2.10")
def test_gradients_in_float32_of_bfloat16_parameters():
    """Where torch is told to keep them wide, they are used as they are."""
    half = parameters(torch.bfloat16)
    single = [p.detach().float().requires_grad_() for p in half]
    narrow = depthnet.optim.AdamW(half, lr=0.01, master_weights=True)
    wide = depthnet.optim.AdamW(single, lr=0.01)
    for step in range(3):
        gradients(single, step)
        for a, b in zip(half, single, strict=True):
            a.grad_dtype = None
            a.grad = b.grad.clone()
        narrow.step()
        wide.step()
    close([narrow.state[p]["master_param"] for p in half], single, steps=3)


# ---- masters ----


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_masters_train_as_float32_and_parameters_are_the_masters_rounded(backend, name, dtype):
    """With gradients of half precision; the masters are those of a float32 run, but for its roundings."""
    half = parameters(dtype)
    single = [p.detach().float().requires_grad_() for p in half]
    options = {"lr": 0.01, "weight_decay": 0.1, **momentum(name)}
    masters = getattr(depthnet.optim, name)(half, master_weights=True, **options)
    plain = getattr(depthnet.optim, name)(single, **options)
    for step in range(10):
        gradients(half, step)
        for a, b in zip(half, single, strict=True):
            b.grad = a.grad.float()
        masters.step()
        plain.step()
        own = [masters.state[p]["master_param"] for p in half]
        close(own, single, steps=step + 1)
        assert equal(half, [p.to(dtype) for p in own])


@pytest.mark.parametrize("dtype", HALF)
def test_small_updates_move_masters_but_not_plain_halves(backend, dtype):
    """1000 steps of 1e-5 from 1: together 1e-2, though each is far below half a unit in the last place."""
    results = []
    for options in ({}, {"master_weights": True}):
        param = torch.ones(33, dtype=dtype).requires_grad_()
        optimizer = depthnet.optim.SGD([param], lr=1e-5, **options)
        param.grad = torch.ones_like(param)
        for _ in range(1000):
            optimizer.step()
        results.append(param.detach().double())
    assert (results[0] == 1).all()
    # 1000 roundings of numbers near 1 in float32, and one in the half.
    tolerance = 1000 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (results[1] - 0.99).abs().max() <= tolerance


def test_only_halves_have_masters():
    params = [*parameters(), *parameters(torch.float64), *parameters(torch.bfloat16)]
    optimizer = depthnet.optim.AdamW(params, master_weights=True)
    train(optimizer, params, 1)
    assert ["master_param" in optimizer.state[p] for p in params] == [False] * 8 + [True] * 4


# ---- stochastic rounding ----


def neighbours(x, dtype):
    """The greatest value of `dtype` that is at most float32 x, and the least that is at least x."""
    near = x.to(dtype)
    below = torch.where(
        near.float() > x, torch.nextafter(near, torch.full_like(near, -torch.inf)), near
    )
    above = torch.where(
        near.float() < x, torch.nextafter(near, torch.full_like(near, torch.inf)), near
    )
    return below.float(), above.float()


def rounded(values, dtype, steps=1, start=0):
    """What steps to float32 `values` write: SGD with lr 1 from 0, all exact but for the last rounding.

    A half's gradient cannot hold such values but its momentum buffer can: it is -values, the gradient 0.
    """
    param = torch.zeros(values.shape, dtype=dtype).requires_grad_()
    optimizer = depthnet.optim.SGD([param], lr=1.0, momentum=1.0, stochastic_rounding=True)
    results = []
    for step in range(start, start + steps):
        optimizer.state[param] = {
            "momentum_buffer": -values.clone(),
            "step": torch.tensor(float(step)),
        }
        with torch.no_grad():
            param.zero_()
        param.grad = torch.zeros_like(param)
        optimizer.step()
        results.append(param.detach().clone())
    return results


def spread(dtype):
    """float32 numbers over the whole range of a half: both signs, subnormals, halfway points, ties."""
    generator = torch.Generator().manual_seed(0)
    low, high = (-30, 17) if dtype == torch.float16 else (-130, 127)
    exponents = torch.randint(low, high, (4000,), generator=generator)
    mantissas = 1 + torch.rand(4000, generator=generator)
    values = torch.ldexp(mantissas, exponents) * torch.randn(4000, generator=generator).sign()
    return values.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max)


@pytest.mark.parametrize("dtype", HALF)
def test_results_are_one_of_the_two_neighbours(backend, dtype):
    values = spread(dtype)
    if dtype == torch.bfloat16:
        values = values[
            values.abs() >= torch.finfo(dtype).tiny
        ]  # of 2^-126: below, torch may flush
    below, above = neighbours(values, dtype)
    seen_below = seen_above = 0
    for result in rounded(values, dtype, steps=4):
        result = result.float()
        assert ((result == below) | (result == above)).all()
        seen_below += (result != above).sum()
        seen_above += (result != below).sum()
    assert seen_below > 1000
    assert seen_above > 1000


@pytest.mark.parametrize("dtype", HALF)
def test_what_the_dtype_can_hold_stays(backend, dtype):
    """Also zeros, and what is not finite."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[~every.isnan()]
    (result,) = rounded(every, dtype)
    assert torch.equal(result.float(), every)
    (result,) = rounded(torch.full((40,), torch.nan), dtype)
    assert result.isnan().all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value", [1 / 3, -1e-3, 3e-6, 40000.1])
def test_the_mean_is_unbiased(backend, dtype, value):
    """Over N independent roundings: within six standard deviations, which p (1 - p) / N gives, and the
    bias of the random bits' own resolution, 2^-13 of a unit (float16) or 2^-16 (bfloat16)."""
    count = 50_000
    x = torch.full((count,), value)
    below, above = (t[0].double().item() for t in neighbours(x, dtype))
    exact = x[0].double().item()
    p = (exact - below) / (above - below)
    (result,) = rounded(x, dtype)
    share = (result.double().mean().item() - below) / (above - below)
    resolution = 2**-13 if dtype == torch.float16 else 2**-16
    assert abs(share - p) <= 6 * (p * (1 - p) / count) ** 0.5 + resolution


@pytest.mark.parametrize("dtype", HALF)
def test_infinities_stay(backend, dtype):
    values = torch.tensor([torch.inf, -torch.inf]).repeat(50)
    (result,) = rounded(values, dtype)
    assert torch.equal(result.float(), values)


def test_beyond_the_greatest_float16(backend):
    """Far beyond, infinity; between it and what would be the next one, either of the two."""
    (result,) = rounded(torch.tensor([1e30, -1e30]).repeat(50), torch.float16)
    assert torch.equal(result.float(), torch.tensor([torch.inf, -torch.inf]).repeat(50))
    (result,) = rounded(torch.full((10_000,), 65504.0 + 16), torch.float16)
    assert set(result.float().tolist()) == {65504.0, torch.inf}


def test_beyond_the_greatest_bfloat16(backend):
    """bfloat16 ends below float32: what lies between becomes the greatest number, or infinity."""
    greatest = torch.finfo(torch.bfloat16).max
    values = torch.tensor([1.0, -1.0]).repeat(5000) * (greatest + 2.0**119)
    (result,) = rounded(values, torch.bfloat16)
    assert set(result.float().abs().tolist()) == {greatest, torch.inf}
    assert not result.isnan().any()


@pytest.mark.parametrize("dtype", HALF)
def test_random_bits_are_the_references_on_every_instruction_set(backend, dtype):
    """Rounding alone, of equal float32 numbers: bit for bit, for several steps."""
    values = spread(dtype)
    if dtype == torch.bfloat16:
        values = values[values.abs() >= torch.finfo(dtype).tiny]
    for step, result in enumerate(rounded(values, dtype, steps=3, start=5)):
        expected = _round_stochastically(values, dtype, 1, torch.tensor(float(step + 6)))
        assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_differs_between_steps_tensors_and_elements(backend, dtype):
    """Of 4000 numbers halfway between two neighbours, two independent roundings agree on half: within six
    standard deviations of 2000, sqrt(1000) each."""
    middle = 1 + torch.finfo(dtype).eps / 2
    params = [torch.zeros(4000, dtype=dtype).requires_grad_() for _ in range(2)]
    optimizer = depthnet.optim.SGD(params, lr=1.0, momentum=1.0, stochastic_rounding=True)
    draws = []
    for step in range(2):
        for param in params:
            buffer = torch.full((4000,), -middle)
            optimizer.state[param] = {"momentum_buffer": buffer, "step": torch.tensor(float(step))}
            with torch.no_grad():
                param.zero_()
            param.grad = torch.zeros_like(param)
        optimizer.step()
        draws += [param.detach() > 1 for param in params]
    draws.append(draws[0].roll(1))
    draws.append(draws[0].roll(8))
    draws.append(draws[0].roll(16))
    for a, b in itertools.combinations(draws, 2):
        assert abs((a == b).sum().item() - 2000) <= 6 * 1000**0.5


@native
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_the_same_on_any_number_of_threads_and_every_run(backend, name, dtype):
    results = []
    for count in (1, 2, 3, 1):
        with threads(count):
            params = parameters(dtype, [(1,), (40_003,), (17, 31), (5,)])
            options = {"stochastic_rounding": True, **momentum(name)}
            optimizer = getattr(depthnet.optim, name)(params, lr=0.01, **options)
            train(optimizer, params, 3)
            results.append(snapshot(optimizer))
    assert all(equal(results[0], other) for other in results[1:])


@pytest.mark.skipif(not cpu_isas(), reason="no native kernels here")
@pytest.mark.parametrize("dtype", HALF)
def test_rounding_does_not_depend_on_how_a_tensor_is_laid_out_into_slices(dtype):
    """A slice's elements are numbered from the tensor's start."""
    results = []
    for scale in (1.0, torch.ones(5), torch.ones(5, 7)):
        params = parameters(dtype, [(5, 7, 11)])
        group = {"params": params, "lr_scale": scale}
        optimizer = depthnet.optim.SGD([group], lr=0.01, stochastic_rounding=True)
        with kernels.use_backend("cpu"):
            train(optimizer, params, 3)
        results.append(params)
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])


@pytest.mark.parametrize("dtype", HALF)
def test_small_updates_add_up_under_stochastic_rounding(backend, dtype):
    """200 steps of 5e-5 from 1 come to 0.99 in the mean of N elements: within six standard deviations,
    each step's being at most half a unit (of numbers below 1)."""
    count, steps, unit = 10_000, 200, torch.finfo(dtype).eps / 2
    param = torch.ones(count, dtype=dtype).requires_grad_()
    optimizer = depthnet.optim.SGD([param], lr=5e-5, stochastic_rounding=True)
    param.grad = torch.ones_like(param)
    for _ in range(steps):
        optimizer.step()
    resolution = steps * unit * (2**-13 if dtype == torch.float16 else 2**-16)
    deviation = unit / 2 * (steps / count) ** 0.5
    arithmetic = steps * torch.finfo(torch.float32).eps
    assert abs(param.double().mean().item() - 0.99) <= 6 * deviation + resolution + arithmetic
    assert optimizer.state[param]["step"].item() == steps


def test_masters_and_wide_parameters_are_not_rounded_at_random():
    for dtype, options in (
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.bfloat16, {"master_weights": True}),
    ):
        results = []
        for stochastic in (False, True):
            params = parameters(dtype)
            optimizer = depthnet.optim.AdamW(params, stochastic_rounding=stochastic, **options)
            train(optimizer, params, 3)
            results.append(snapshot(optimizer))
        assert equal(*results)
