"""Gradient scaling and clipping: GradScaler's protocol, max_grad_norm."""

import itertools

import pytest
import torch
from optim.steps import NAMES, close, equal, gradients, momentum, parameters, snapshot, train
from torch.nn.utils import clip_grad_norm_

import depthnet

SHAPES = [(3, 40, 5), (7,), (33, 31), (), (20_011,)]


def grads_of(params):
    return [p.grad.clone() for p in params]


# ---- GradScaler ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_gradients_are_divided_by_their_scale(backend, name, dtype):
    """A power of two is undone without rounding: the same bits as without a scale; gradients stay."""
    ours, twin = parameters(dtype), parameters(dtype)
    options = {"lr": 0.01, "weight_decay": 0.1, **momentum(name)}
    scaled = getattr(depthnet.optim, name)(ours, **options)
    plain = getattr(depthnet.optim, name)(twin, **options)
    scaled.grad_scale, scaled.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for step in range(3):
        gradients(ours, step)
        train(plain, twin, 1, first=step)
        for p in ours:
            p.grad.mul_(1024)
        before = grads_of(ours)
        scaled.step()
        assert equal(before, grads_of(ours))
    assert equal(snapshot(scaled), snapshot(plain))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 1.0}, {"master_weights": True}, {"stochastic_rounding": True}]
)
def test_with_found_inf_nothing_is_written(backend, name, options):
    """Parameters, states, masters, and the count of steps stay, at the first step and later."""
    params = parameters(torch.bfloat16)
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, **momentum(name), **options)

    def skip(step):
        gradients(params, step)
        params[1].grad[0] = torch.inf
        optimizer.found_inf = torch.tensor(1.0)
        optimizer.step()
        del optimizer.found_inf

    start = [p.detach().clone() for p in params]
    skip(0)
    assert equal(start, params)
    assert all(state["step"] == 0 for state in optimizer.state.values() if "step" in state)
    train(optimizer, params, 2)
    before = snapshot(optimizer)
    skip(2)
    assert equal(before, snapshot(optimizer))


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}])
def test_a_first_step_that_is_skipped_is_not_the_first(backend, options):
    """GradScaler often skips the first steps; the first gradient that counts is not dampened."""
    results = []
    for module in (depthnet.optim, torch.optim):
        params = parameters()
        optimizer = module.SGD(params, lr=0.1, momentum=0.9, **options)
        if module is depthnet.optim:
            for _ in range(2):
                gradients(params, 99)
                optimizer.found_inf = torch.tensor(1.0)
                optimizer.step()
                del optimizer.found_inf
        train(optimizer, params, 3)
        results.append(params)
    close(*results, steps=3)


def test_a_checkpoint_between_a_skipped_first_step_and_the_next():
    """Nothing has happened yet, and the checkpoint does not say otherwise."""
    results = []
    for skip in (False, True):
        params = parameters()
        optimizer = depthnet.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5)
        if skip:
            gradients(params, 99)
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            state = optimizer.state_dict()
            optimizer = depthnet.optim.SGD(params, lr=0.1)
            optimizer.load_state_dict(state)
        train(optimizer, params, 2)
        results.append(params)
    assert equal(*results)


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler_from_end_to_end(backend, name):
    """With overflow at some steps, against torch's optimizer without a fused step."""
    results, scales = [], []
    for module in (depthnet.optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        optimizer = getattr(module, name)(model.parameters(), lr=0.01, **momentum(name))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(5, 6, generator=generator)
            if step in (0, 5):
                x[0] = torch.inf
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            before = grads_of(model.parameters())
            scaler.step(optimizer)
            if module is depthnet.optim:  # torch's divides in place, or rather GradScaler does
                assert equal(before, grads_of(model.parameters()))
                assert not hasattr(optimizer, "found_inf")
            scaler.update()
        results.append(snapshot(optimizer))
        scales.append(scaler.get_scale())
    close(*results, steps=12)
    assert scales[0] == scales[1]


@pytest.mark.parametrize("name", NAMES)
def test_unscale_then_clip_then_step(name):
    """After `unscale_` the step divides by nothing."""
    results = []
    for module in (depthnet.optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        optimizer = getattr(module, name)(model.parameters(), lr=0.01, **momentum(name))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        for step in range(5):
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        results.append(snapshot(optimizer))
    close(*results, steps=5)


def test_scaled_gradients_and_a_norm(backend):
    """max_grad_norm is of the gradients without their scale."""
    ours, twin = parameters(shapes=SHAPES), parameters(shapes=SHAPES)
    scaled = depthnet.optim.SGD(ours, lr=0.1, max_grad_norm=1.0)
    plain = depthnet.optim.SGD(twin, lr=0.1, max_grad_norm=1.0)
    scaled.grad_scale = torch.tensor(4096.0)
    for step in range(3):
        gradients(ours, step)
        for p in ours:
            p.grad.mul_(4096)
        scaled.step()
        train(plain, twin, 1, first=step)
    close(ours, twin, steps=3)


# ---- max_grad_norm ----


def clipped(module, name, dtype, max_norm, change=lambda params: None, steps=5, shapes=SHAPES):
    """Train with clipped gradients, inside our step or before torch's; everything that has changed."""
    params = parameters(dtype, shapes)
    groups = [
        {"params": params[:2], "lr": 0.1},
        {"params": params[2:], "lr": 0.01, "weight_decay": 0.1, "maximize": True},
    ]
    options = momentum(name) or {"eps": 1.0}  # with a small one, Adam would hide a factor
    options |= {"max_grad_norm": max_norm} if module is depthnet.optim else {}
    optimizer = getattr(module, name)(groups, **options)
    for step in range(steps):
        gradients(params, step)
        change(params)
        if module is torch.optim:
            clip_grad_norm_(params, max_norm)
        optimizer.step()
    return snapshot(optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6], ids=["far above", "above", "below"])
@pytest.mark.parametrize("name", NAMES)
def test_clipping_inside_the_step_is_clip_grad_norm(backend, name, dtype, max_norm):
    """The norm of all groups together; it is a sum of 21000 squares, whose roundings are at most their
    number times half of epsilon, and about its root."""
    ours, theirs = (clipped(m, name, dtype, max_norm) for m in (depthnet.optim, torch.optim))
    close(ours, theirs, steps=5 + 21_000**0.5 / 10)


def test_gradients_stay_as_they_are_when_they_are_clipped(backend):
    params = parameters(shapes=SHAPES)
    optimizer = depthnet.optim.AdamW(params, max_grad_norm=1e-3)
    gradients(params, 0)
    before = grads_of(params)
    optimizer.step()
    assert equal(before, grads_of(params))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", NAMES)
def test_a_norm_that_is_not_finite_does_what_torch_does(backend, name, bad):
    """An infinite norm makes good gradients zero and bad ones NaN; a NaN norm makes all NaN."""

    def change(params):
        params[0].grad[0, 0, 0] = bad

    made = [clipped(m, name, torch.float32, 1.0, change, 2) for m in (depthnet.optim, torch.optim)]
    close(*made, steps=2 + 21_000**0.5 / 10)


def mixed(kind):
    a, b, c = (p.detach() for p in parameters(torch.float64, [(3, 4, 5), (7,), (33, 31)]))
    return {
        "float32 and float64": [a.float(), b, c.float()],
        "halves": [a.bfloat16(), b.half(), c.float()],
        "transposed": [a.mT.contiguous().mT, b, c],
        "without elements": [a, b, c, torch.zeros(0, 3).double()],
    }[kind]


@pytest.mark.parametrize(
    "kind", ["float32 and float64", "halves", "transposed", "without elements"]
)
def test_the_norm_is_of_all_parameters_however_they_are_stepped(kind):
    """Some of them natively, some in plain PyTorch (a gradient laid out unlike its parameter); against
    float64 arithmetic."""
    params = [p.requires_grad_() for p in mixed(kind)]
    exact = [p.detach().double().clone() for p in params]
    optimizer = depthnet.optim.SGD(params, lr=1.0, max_grad_norm=0.5)
    steps = 3
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
        grads = [p.grad.double() for p in params]
        norm = sum(g.square().sum() for g in grads).sqrt()
        exact = [p - g * 0.5 / (norm + 1e-6) for p, g in zip(exact, grads, strict=True)]
    # Sums of 1100 squares in the least precise dtype that something is computed in.
    computed = torch.float64 if all(p.dtype == torch.float64 for p in params) else torch.float32
    for param, expected in zip(params, exact, strict=True):
        tolerance = steps * torch.finfo(param.dtype).eps + 50 * torch.finfo(computed).eps
        torch.testing.assert_close(param.double(), expected, rtol=tolerance, atol=tolerance)


def test_the_norm_is_of_parameters_with_gradients_only():
    results = []
    for module in (depthnet.optim, torch.optim):
        params = parameters(torch.float64)
        options = {"max_grad_norm": 0.5} if module is depthnet.optim else {}
        optimizer = module.SGD(params, lr=1.0, **options)
        for step in range(4):
            gradients(params, step)
            params[step].grad = None
            if module is torch.optim:
                clip_grad_norm_(params, 0.5)
            optimizer.step()
        results.append(params)
    close(*results, steps=4 + 1600**0.5 / 10)


def test_no_gradients_have_no_norm():
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, max_grad_norm=0.5)
    optimizer.step()
    assert equal(params, parameters())
    assert not optimizer.state


def test_zero_gradients_stay_zero(backend):
    params = parameters()
    optimizer = depthnet.optim.SGD(params, lr=1.0, max_grad_norm=0.5)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(params, parameters())


def test_norms_that_differ_between_groups_are_refused():
    first, second = parameters(shapes=[(2,), (3,)])
    groups = [{"params": [first], "max_grad_norm": 1.0}, {"params": [second]}]
    optimizer = depthnet.optim.SGD(groups, lr=1.0, momentum=0.9, dampening=0.5)
    gradients([first, second], 0)
    before = [p.detach().clone() for p in (first, second)]
    with pytest.raises(ValueError, match=r"max_grad_norm .* the same in each, got \[1.0, None\]"):
        optimizer.step()
    assert equal(before, [first, second])


def test_a_norm_that_changes_between_steps():
    results = []
    for module in (depthnet.optim, torch.optim):
        params = parameters(torch.float64)
        optimizer = module.SGD(params, lr=1.0)
        for step, max_norm in enumerate((None, 0.5, 0.25, None)):
            gradients(params, step)
            if module is depthnet.optim:
                optimizer.param_groups[0]["max_grad_norm"] = max_norm
            elif max_norm is not None:
                clip_grad_norm_(params, max_norm)
            optimizer.step()
        results.append(params)
    close(*results, steps=4 + 1600**0.5 / 10)


def test_populations_have_no_common_norm():
    model = depthnet.ResNet(4, 8, 3, 2, population=3, output_std=1.0)
    for make, norm in itertools.product((depthnet.optim.AdamW, depthnet.optim.SGD), (1.0, 5)):
        with pytest.raises(
            ValueError, match=r"max_grad_norm: .* couple the members of a population"
        ):
            make(model, lr=0.1, max_grad_norm=norm)
