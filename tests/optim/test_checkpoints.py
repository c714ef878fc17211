"""State: torch's keys, dtypes and shapes; resuming to the bit; checkpoints to and from torch.optim."""

import copy
import pickle

import pytest
import torch
from optim.steps import (
    NAMES,
    close,
    equal,
    momentum,
    parameters,
    round_trip,
    small_model,
    snapshot,
    train,
    trained,
)
from torch.optim import lr_scheduler

import depthnet
from depthnet.scaling import torch_param_groups

HALF = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Adam", {}),
        ("AdamW", {"amsgrad": True}),
        ("SGD", {}),
        ("SGD", {"momentum": 0.9}),
    ],
)
def test_the_states_layout_is_torchs(name, options):
    """Keys in torch's order, shapes, dtypes; strides are the parameter's; and groups have every key that
    torch's have."""
    channels_last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    given = []
    for module in (torch.optim, depthnet.optim):
        params = [*parameters(torch.float64), channels_last.detach().clone().requires_grad_()]
        optimizer = getattr(module, name)(params, **options)
        train(optimizer, params, 1)
        given.append(optimizer.state_dict())
    theirs, ours = given
    assert list(theirs["state"]) == list(ours["state"])
    for index, entry in theirs["state"].items():
        own = {key: value for key, value in ours["state"][index].items() if value is not None}
        wanted = {key: value for key, value in entry.items() if value is not None}
        assert list(own) == list(wanted)
        for key, value in wanted.items():
            assert (own[key].shape, own[key].dtype) == (value.shape, value.dtype)
            assert key == "step" or own[key].stride() == params[index].stride()
    for mine, torchs in zip(ours["param_groups"], theirs["param_groups"], strict=True):
        assert set(torchs) <= set(mine)
        assert mine["params"] == torchs["params"]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"amsgrad": True},
        {"max_grad_norm": 5.0},
        {"master_weights": True},
        {"stochastic_rounding": True},
    ],
    ids=lambda options: "".join(options),
)
@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_exact(backend, name, options, dtype):
    """10 steps, or 5, a checkpoint in a file, and 5 more with a new optimizer: the same bits."""
    if name == "SGD":
        options = {key: value for key, value in options.items() if key != "amsgrad"}
    options = {"lr": 0.01, "weight_decay": 0.1, **momentum(name), **options}
    make = getattr(depthnet.optim, name)
    straight, stopped = parameters(dtype), parameters(dtype)

    def groups(params):
        scales = [1.0, 2.0, 3.0], 2.0, 3.0, 4.0
        return [
            {"params": param, "lr_scale": scale, "weight_decay_scale": scale}
            for param, scale in zip(params, scales, strict=True)
        ]

    whole = make(groups(straight), **options)
    train(whole, straight, 10)
    first = make(groups(stopped), **options)
    train(first, stopped, 5)
    weights = round_trip([p.detach() for p in stopped])
    resumed = [p.requires_grad_() for p in weights]
    second = make(groups(resumed), lr=99.0)
    second.load_state_dict(round_trip(first.state_dict()))
    train(second, resumed, 5, first=5)
    assert equal(snapshot(whole), snapshot(second))


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_both_ways_between_torch_and_us(name):
    options = {"weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {"eps": 1e-6})}
    ours, theirs = getattr(depthnet.optim, name), getattr(torch.optim, name)

    def torchs(model):
        eps = {} if name == "SGD" else {"eps": 1e-6}
        rule = name.lower()
        groups = torch_param_groups(model, 2**-7, optimizer=rule, weight_decay=0.1, **eps)
        return theirs(groups, lr=0.0, **options)

    model = small_model()
    expected = trained(model, ours(model, lr=2**-7, **options), 15)

    model = small_model()
    before = torchs(model)
    trained(model, before, 10)
    after = ours(model, lr=99.0)
    after.load_state_dict(round_trip(before.state_dict()))
    assert [group["lr_scale"] for group in after.param_groups] == [1.0] * 3
    from_torch = trained(model, after, 5, first=10)

    model = small_model()
    before = ours(model, lr=2**-7, **options)
    trained(model, before, 10)
    after = torchs(model)
    after.load_state_dict(round_trip(before.torch_state_dict()))
    to_torch = trained(model, after, 5, first=10)

    keys = {"momentum_buffer"} if name == "SGD" else {"step", "exp_avg", "exp_avg_sq"}
    assert all(set(state) == keys for state in before.state.values())
    for a, b, c in zip(expected, from_torch, to_torch, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(c, a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamW", {"amsgrad": True, "maximize": True}),
        ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
        ("SGD", {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("SGD", {}),
    ],
)
def test_options_travel_with_the_checkpoints(name, options, dtype):
    """Five steps with the one library, five with the other, whose own options were others."""
    ours, theirs = getattr(depthnet.optim, name), getattr(torch.optim, name)
    expected = parameters(dtype)
    train(theirs(expected, lr=0.01, **options), expected, 10)
    for first, second in ((ours, theirs), (theirs, ours)):
        params = parameters(dtype)
        optimizer = first(params, lr=0.01, **options)
        train(optimizer, params, 5)
        own = first is ours
        state = optimizer.torch_state_dict() if own else optimizer.state_dict()
        optimizer = second(params, lr=99.0)
        optimizer.load_state_dict(round_trip(state))
        train(optimizer, params, 5, first=5)
        close(params, expected, steps=10)


def test_a_stack_with_rates_for_each_layer_loads_into_torchs_optimizer():
    """The state of a stacked tensor is that of torch's over the same tensor; with equal rates, so are
    the steps that follow."""
    params = parameters(torch.float64, [(3, 5, 4)])
    optimizer = depthnet.optim.AdamW([{"params": params, "lr_scale": [1.0, 1.0, 1.0]}], lr=0.1)
    train(optimizer, params, 3)
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    state["param_groups"] = [{key: group[key] for key in group if not key.endswith("_scale")}]
    twin = [params[0].detach().clone().requires_grad_()]
    theirs = torch.optim.AdamW(twin, lr=99.0)
    theirs.load_state_dict(round_trip(state))
    train(optimizer, params, 3, first=3)
    train(theirs, twin, 3, first=3)
    close(params, twin, steps=6)


def test_a_checkpoint_of_another_population_is_refused_whole():
    def adam(members):
        return depthnet.optim.AdamW([torch.zeros(members, requires_grad=True)], lr=[0.1] * members)

    ours = adam(2)
    with pytest.raises((ValueError, RuntimeError), match="fit"):
        ours.load_state_dict(adam(3).state_dict())
    assert ours.param_groups[0]["lr_scale"].tolist() == [0.1, 0.1]


def test_a_checkpoint_with_bad_numbers_is_refused_whole():
    params = parameters()
    ours = depthnet.optim.AdamW(params, lr=0.5)
    train(ours, params, 2)
    before = snapshot(ours)
    state = copy.deepcopy(ours.state_dict())
    state["param_groups"][0] |= {"lr": 0.25, "betas": (0.9, 1.0)}
    with pytest.raises(ValueError, match=r"betas\[1\]"):
        ours.load_state_dict(state)
    assert ours.param_groups[0]["lr"] == 0.5
    assert ours.param_groups[0]["betas"] == (0.9, 0.999)
    assert equal(before, snapshot(ours))


def test_checkpoints_of_old_torch_lack_newer_options_and_count_steps_in_numbers():
    params = parameters(torch.float64)
    theirs = torch.optim.Adam(params, lr=0.1, weight_decay=0.1)
    train(theirs, params, 3)
    state = copy.deepcopy(theirs.state_dict())
    for group in state["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "amsgrad"):
            group.pop(key)
        group.pop("decoupled_weight_decay", None)
    for entry in state["state"].values():
        entry["step"] = entry["step"].item()
    twin = [p.detach().clone().requires_grad_() for p in params]
    ours = depthnet.optim.Adam(twin, lr=99.0)
    ours.load_state_dict(state)
    train(theirs, params, 3, first=3)
    train(ours, twin, 3, first=3)
    close(twin, params, steps=6)


def test_what_schedulers_keep_is_scaled_for_torch_too():
    optimizer = depthnet.optim.AdamW([{"params": [torch.zeros(2)], "lr_scale": 0.5}], lr=0.1)
    lr_scheduler.StepLR(optimizer, 1)
    (group,) = optimizer.torch_state_dict()["param_groups"]
    assert (group["lr"], group["initial_lr"]) == (0.05, 0.05)


def test_vectors_do_not_fit_torchs_groups():
    optimizer = depthnet.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=[0.1, 0.2])
    with pytest.raises(ValueError, match="lr_scale is a vector"):
        optimizer.torch_state_dict()


@pytest.mark.parametrize("dtype", HALF)
def test_loading_keeps_float32_states_of_half_parameters(dtype):
    """torch.optim.Optimizer casts states to the parameter's dtype, which would round them."""
    params = parameters(dtype)
    optimizer = depthnet.optim.AdamW(params, lr=0.1, amsgrad=True, master_weights=True)
    train(optimizer, params, 3)
    again = depthnet.optim.AdamW(params, lr=0.1)
    again.load_state_dict(round_trip(optimizer.state_dict()))
    keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master_param")
    assert all(again.state[p][key].dtype == torch.float32 for p in params for key in keys)
    assert equal(snapshot(again), snapshot(optimizer))


@pytest.mark.parametrize("dtype", HALF)
def test_torchs_half_states_become_float32(dtype):
    params = parameters(dtype)
    theirs = torch.optim.AdamW(params, lr=0.01, eps=1e-3)
    train(theirs, params, 3)
    ours = depthnet.optim.AdamW(params)
    ours.load_state_dict(round_trip(theirs.state_dict()))
    train(ours, params, 1, first=3)
    assert all(ours.state[p]["exp_avg"].dtype == torch.float32 for p in params)
    assert all(ours.state[p]["step"].item() == 4 for p in params)
    assert all(p.isfinite().all() for p in params)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_alone(copied, name):
    """A copy, made between two steps, goes on as the original would, and does not move it."""
    params = parameters()
    optimizer = getattr(depthnet.optim, name)(params, lr=0.01, **momentum(name))
    train(optimizer, params, 3)
    before = snapshot(optimizer)
    twin = copied(optimizer)
    own = [p for group in twin.param_groups for p in group["params"]]
    train(twin, own, 3, first=3)
    assert equal(before, snapshot(optimizer))
    train(optimizer, params, 3, first=3)
    assert equal(snapshot(twin), snapshot(optimizer))
