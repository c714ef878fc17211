"""Every option, alone and crossed with the others, against torch.optim."""

import itertools

import pytest
import torch
from optim.steps import ADAM, SGD, close, crossed, gradients, parameters, snapshot, states, train

import depthnet


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "options"), [("Adam", ADAM), ("SGD", SGD)])
def test_all_options_crossed_each_in_a_group_of_one_optimizer(backend, name, options, dtype):
    """200 steps; the groups of one optimizer neither share options nor disturb each other."""
    rows = crossed(options)
    results = []
    for module in (depthnet.optim, torch.optim):
        params = parameters(dtype, [(3, 7)] * len(rows))
        groups = [{"params": [p], **row} for p, row in zip(params, rows, strict=True)]
        train(getattr(module, name)(groups, lr=0.01), params, 200)
        results.append(params)
    close(*results, steps=200, names=rows)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_option_for_all_tensors_of_many_shapes(backend, name, dtype):
    options = {"lr": 0.01, "weight_decay": 0.1}
    options |= {"momentum": 0.9} if name == "SGD" else {"betas": (0.8, 0.95), "eps": 1e-6}
    shapes = [(3, 40, 5), (7,), (33, 31), (), (1,), (2, 0, 3), (129,), (20_011,)]
    ours, theirs = parameters(dtype, shapes), parameters(dtype, shapes)
    first = getattr(depthnet.optim, name)(ours, **options)
    second = getattr(torch.optim, name)(theirs, **options)
    train(first, ours, 20)
    train(second, theirs, 20)
    close(ours, theirs, steps=20)
    close(states(first), states(second), steps=20)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_parameters_of_several_dtypes_in_one_group(backend, name):
    results = []
    for module in (depthnet.optim, torch.optim):
        params = [*parameters(torch.float64), *parameters(torch.float32)]
        options = {"momentum": 0.9} if name == "SGD" else {}
        train(getattr(module, name)(params, lr=0.01, weight_decay=0.1, **options), params, 20)
        results.append(params)
    close(*results, steps=20)


@pytest.mark.parametrize("device", ["meta", "fake"])
def test_steps_without_numbers(device):
    """On tensors that have only shapes, as tools that estimate memory use them."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        param = torch.zeros(3, 4, requires_grad=True)
        optimizer = depthnet.optim.AdamW([param], lr=0.1, amsgrad=True)
        for _ in range(3):
            param.grad = torch.ones(3, 4)
            optimizer.step()
        assert optimizer.state[param]["exp_avg"].shape == (3, 4)
        assert optimizer.state[param]["exp_avg"].device == param.device


@pytest.mark.parametrize("eps", [1e-8, 1e-3, 1.0])
@pytest.mark.parametrize("lr", [0.0, 1e-4, 0.1])
def test_lr_and_eps(eps, lr):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    train(depthnet.optim.AdamW(ours, lr=lr, eps=eps), ours, 20)
    train(torch.optim.AdamW(theirs, lr=lr, eps=eps), theirs, 20)
    close(ours, theirs, steps=20)


@pytest.mark.parametrize("maximize", [False, True])
def test_decoupled_decay_of_sgd_is_a_shrunk_parameter_and_a_step_without_decay(backend, maximize):
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    options = {"lr": 0.05, "momentum": 0.9, "maximize": maximize}
    first = depthnet.optim.SGD(ours, weight_decay=0.3, decoupled_weight_decay=True, **options)
    second = torch.optim.SGD(theirs, **options)
    for step in range(20):
        train(first, ours, 1, first=step)
        with torch.no_grad():
            torch._foreach_mul_(theirs, 1 - 0.05 * 0.3)
        train(second, theirs, 1, first=step)
    close(ours, theirs, steps=20)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=["P", "PL"])
def test_vectors_of_rates_are_a_loop_of_single_slices(backend, name, lead):
    """Rates over the leading dimensions of a stack against one torch optimizer for each slice."""
    weight = torch.randn(*lead, 9, 5, dtype=torch.float64).requires_grad_()
    scales = {key: torch.rand(lead, dtype=torch.float64) + 0.1 for key in ("lr", "weight_decay")}
    own = {"lr": 0.1, "weight_decay": 0.1}
    common = {"momentum": 0.9} if name == "SGD" else {"amsgrad": True}
    if name != "SGD":
        scales["eps"] = torch.rand(lead, dtype=torch.float64)
        own["eps"] = 1e-2
    group = {"params": [weight], **{f"{key}_scale": scale for key, scale in scales.items()}}
    ours = getattr(depthnet.optim, name)([group], **own, **common)

    slices, singles = {}, {}
    for index in itertools.product(*map(range, lead)):
        slices[index] = weight.detach()[index].clone().requires_grad_()
        numbers = {key: own[key] * scale[index].item() for key, scale in scales.items()}
        singles[index] = getattr(torch.optim, name)([slices[index]], **numbers, **common)
    for step in range(50):
        gradients([weight], step)
        ours.step()
        for index, single in singles.items():
            slices[index].grad = weight.grad[index].clone()
            single.step()
    close([weight[index] for index in slices], slices.values(), steps=50, names=list(slices))


def test_scales_over_dimensions_of_different_number_in_one_group(backend):
    """lr over (P,), weight decay over (P, L): the shorter one holds for every layer."""
    start = torch.randn(2, 3, 4, dtype=torch.float64)
    weights = [start.clone().requires_grad_() for _ in range(2)]
    lr, decay = torch.tensor([0.5, 2.0]).double(), torch.rand(2, 3, dtype=torch.float64)
    full = {"lr_scale": lr[:, None].expand(2, 3).clone(), "weight_decay_scale": decay}
    short = {"lr_scale": lr, "weight_decay_scale": decay}
    for weight, scales in zip(weights, (full, short), strict=True):
        optimizer = depthnet.optim.AdamW([{"params": [weight], **scales}], lr=0.1, weight_decay=0.1)
        train(optimizer, [weight], 3)
    assert torch.equal(*weights)


# ---- what is not finite ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"),
    [("Adam", ADAM | {"betas": ((0.9, 0.999),)}), ("SGD", SGD)],
    ids=["Adam", "SGD"],
)
def test_nan_and_inf_go_where_torch_lets_them_go(backend, name, options, dtype):
    """Element by element, in parameters and states: bad gradients, parameters that are infinite, and
    squares of gradients that overflow; good elements beside them stay good."""
    inf, nan, huge = torch.inf, torch.nan, torch.finfo(dtype).max / 4
    start = torch.tensor([1.0, 1, 1, 1, 1, inf, -inf, nan, 2, inf], dtype=dtype)
    grads = [
        [0.5, nan, inf, -inf, huge, 0.5, 0.5, 0.5, 0.5, 0.0],
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, nan, 0.0],
        [0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.0],
    ]
    rows, results = crossed(options), []
    for module in (depthnet.optim, torch.optim):
        params = [start.clone().requires_grad_() for _ in rows]
        groups = [{"params": [p], **row} for p, row in zip(params, rows, strict=True)]
        optimizer = getattr(module, name)(groups, lr=0.01)
        for grad in grads:
            for param in params:
                param.grad = torch.tensor(grad, dtype=dtype)
            optimizer.step()
        results.append(snapshot(optimizer))
    close(*results, steps=3)


@pytest.mark.parametrize("name", ["Adam", "SGD"])
def test_slices_without_decay_leave_infinite_parameters_alone(backend, name):
    weight = torch.tensor([[torch.inf], [1.0]], dtype=torch.float64).requires_grad_()
    weight.grad = torch.ones_like(weight)
    group = {"params": [weight], "weight_decay_scale": [0.0, 1.0]}
    optimizer = getattr(depthnet.optim, name)([group], lr=0.01, weight_decay=0.1)
    optimizer.step()
    assert weight[0].item() == torch.inf
    assert weight[1].isfinite().all()
    assert all(state.isfinite().all() for state in states(optimizer))


@pytest.mark.parametrize("beta1", [0.0, 0.3])
def test_a_short_memory_forgets_large_gradients(backend, beta1):
    """With beta1 below 1/2 the new average is near the new gradient, however large the old one was."""
    ours, theirs = (torch.ones(3, requires_grad=True) for _ in range(2))
    averages = []
    for param, module in ((ours, depthnet.optim), (theirs, torch.optim)):
        optimizer = module.Adam([param], betas=(beta1, 0.9))
        for size in (1e8, *[1e-3] * 60):  # 0.3^60 * 1e8 is nothing beside 1e-3
            param.grad = torch.full((3,), size)
            optimizer.step()
        averages.append(optimizer.state[param]["exp_avg"])
    torch.testing.assert_close(*averages)
    torch.testing.assert_close(averages[0], torch.full((3,), 1e-3))
