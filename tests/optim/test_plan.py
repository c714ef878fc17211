"""What is kept between steps never shows: whatever changes, the next step is that of a new optimizer.

Each test changes something between steps and compares with torch, or with an optimizer made anew from a
checkpoint before every step.
"""

import copy
import gc
import weakref
from collections import defaultdict

import pytest
import torch
from optim.steps import NAMES, close, equal, gradients, momentum, parameters, snapshot, train

import depthnet
from depthnet import kernels
from depthnet.optim import base


@pytest.fixture
def plans(monkeypatch):
    """Counts how often the tables are made."""
    made = []

    class Counted(base.Plan):
        def __init__(self, optimizer):
            super().__init__(optimizer)
            made.append(self)

    monkeypatch.setattr(base, "Plan", Counted)
    return made


def pair(name="AdamW", dtype=torch.float64, shapes=((3, 5), (7,), (4, 4)), **options):
    """Our optimizer and torch's, each with its parameters."""
    options = {"lr": 0.05, **momentum(name), **options}
    made = []
    for module in (depthnet.optim, torch.optim):
        params = parameters(dtype, shapes)
        made.append((getattr(module, name)(params, **options), params))
    return made


def compare(made, steps=10):
    (_, ours), (_, theirs) = made
    close(ours, theirs, steps=steps)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_tables_are_made_once(plans, name, set_to_none):
    """Over ordinary steps, with new gradients, a scheduler, and rates that change."""
    params = parameters()
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, weight_decay=0.1, **momentum(name))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(20):
        optimizer.zero_grad(set_to_none=set_to_none)
        sum((p * (step + 1)).square().sum() for p in params).backward()
        optimizer.step()
        scheduler.step()
        optimizer.param_groups[0]["weight_decay"] *= 0.9
    assert len(plans) == 1


def test_tables_are_made_once_with_a_tensor_lr_and_vectors(plans):
    params = parameters(shapes=[(3, 5), (3, 2)])
    group = {"params": params, "lr_scale": [1.0, 2.0, 3.0]}
    optimizer = depthnet.optim.AdamW([group], lr=torch.tensor(0.1))
    for step in range(10):
        train(optimizer, params, 1, first=step)
        optimizer.param_groups[0]["lr"].mul_(0.9)
    assert len(plans) == 1


@pytest.mark.parametrize("name", NAMES)
def test_gradients_that_come_and_go(backend, name):
    """A parameter without a gradient keeps its state and its count of steps; of SGD's, whose first
    gradient is not dampened, each begins when its first gradient comes."""
    made = pair(name, **({"dampening": 0.5} if name == "SGD" else {}))
    for step in range(12):
        for optimizer, params in made:
            gradients(params, step)
            for index, param in enumerate(params):
                if (step + index) % 3 == 0 or (step == 5):
                    param.grad = None
            optimizer.step()
    compare(made)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroed_gradients(set_to_none):
    made = pair()
    for step in range(6):
        for optimizer, params in made:
            if step % 2:
                optimizer.zero_grad(set_to_none=set_to_none)
            else:
                gradients(params, step)
            optimizer.step()
    compare(made)


def test_gradients_in_place_and_replaced():
    made = pair()
    for optimizer, params in made:
        gradients(params, 0)
        optimizer.step()
        for p in params:
            p.grad.mul_(-2)
        optimizer.step()
        for p in params:
            p.grad = p.grad.clone() + 1
        optimizer.step()
    compare(made)


LAYOUTS = {
    "transposed": lambda g: g.mT.contiguous().mT if g.ndim == 2 else g,
    "expanded": lambda g: g[:1].expand(g.shape),
    "strided": lambda g: torch.stack([g, g + 1], -1)[..., 0],
    "shifted": lambda g: torch.cat([g.flatten()[:1], g.flatten()])[1:].view(g.shape),
    "negated": lambda g: torch._neg_view(g),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_gradients_of_every_layout(layout):
    """In turn with ordinary ones."""
    made = pair()
    for step in range(6):
        for optimizer, params in made:
            gradients(params, step)
            for p in params:
                if step % 3:
                    p.grad = LAYOUTS[layout](p.grad)
            optimizer.step()
    compare(made)


def test_parameters_of_every_layout():
    """channels_last, transposed, with gaps, 0-dim, without elements."""
    results = []
    for module in (depthnet.optim, torch.optim):
        torch.manual_seed(0)
        params = [
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(5, 4).mT,
            torch.randn(6, 4)[:, ::2],
            torch.randn(()),
            torch.randn(0, 3),
            torch.randn(2, 3),
        ]
        params = [p.detach().double().requires_grad_() for p in params]
        params[2] = torch.randn(6, 4).double()[:, ::2].detach().requires_grad_()
        optimizer = module.AdamW(params, lr=0.05, amsgrad=True)
        for step in range(5):
            for index, p in enumerate(params):
                generator = torch.Generator().manual_seed(10 * step + index)
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        results.append(snapshot(optimizer))
    close(*results, steps=5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_are_added(name):
    made = pair(name)
    for optimizer, params in made:
        train(optimizer, params, 3)
        more = [torch.ones(2, 2, dtype=torch.float64, requires_grad=True)]
        optimizer.add_param_group({"params": more, "lr": 0.2})
        params += more
        train(optimizer, params, 3, first=3)
    compare(made)


def test_parameters_whose_data_is_replaced():
    """By other memory, another layout, another dtype, more elements (with the state gone)."""
    made = pair("SGD", shapes=((4, 4), (3,)), momentum=0.0)
    for optimizer, params in made:
        train(optimizer, params, 2)
        params[0].data = params[0].data.clone()
        train(optimizer, params, 2, first=2)
        params[0].data = params[0].data.mT.contiguous().mT
        train(optimizer, params, 2, first=4)
        params[1].data = torch.ones(5, dtype=torch.float64)
        params[1].grad = None
        train(optimizer, params, 2, first=6)
    compare(made)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_parameters_whose_dtype_is_replaced(backend, dtype):
    """As module.double() or .half() after some steps: as a new optimizer loaded with the state."""
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.05)
    train(optimizer, params, 3)
    for p in params:
        p.data, p.grad = p.data.to(dtype), None
    twin = [p.detach().clone().requires_grad_() for p in params]
    fresh = depthnet.optim.AdamW(twin)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 3, first=3)
    train(fresh, twin, 3, first=3)
    assert equal(snapshot(optimizer), snapshot(fresh))


CHANGES = {
    "lr": lambda o: o.param_groups[0].update(lr=0.2),
    "lr tensor": lambda o: o.param_groups[0].update(lr=torch.tensor(0.2, dtype=torch.float64)),
    "betas": lambda o: o.param_groups[0].update(betas=(0.5, 0.6)),
    "weight_decay": lambda o: o.param_groups[0].update(weight_decay=0.3),
    "eps": lambda o: o.param_groups[0].update(eps=0.1),
    "maximize": lambda o: o.param_groups[0].update(maximize=True),
    "decoupled": lambda o: o.param_groups[0].update(decoupled_weight_decay=False, weight_decay=0.1),
    "clear": lambda o: o.state.clear(),
    "new state": lambda o: setattr(o, "state", defaultdict(dict)),
    "one state": lambda o: o.state.pop(o.param_groups[0]["params"][0]),
    "entry": lambda o: o.state[o.param_groups[0]["params"][0]].update(
        exp_avg=torch.full((3, 5), 0.7, dtype=torch.float64)
    ),
    "entry in place": lambda o: o.state[o.param_groups[0]["params"][0]]["exp_avg"].fill_(0.7),
    "step": lambda o: o.state[o.param_groups[0]["params"][0]].update(step=torch.tensor(100.0)),
    "step in place": lambda o: o.state[o.param_groups[0]["params"][0]]["step"].fill_(100.0),
    "loaded": lambda o: o.load_state_dict(copy.deepcopy(o.state_dict())),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_between_steps(change):
    made = pair()
    for optimizer, params in made:
        train(optimizer, params, 3)
        CHANGES[change](optimizer)
        train(optimizer, params, 3, first=3)
    compare(made)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_options_switched_on_later_start_with_new_states(name):
    """amsgrad; momentum, whose first gradient is not dampened."""
    made = pair(name, **({"momentum": 0.0} if name == "SGD" else {}))
    for optimizer, params in made:
        train(optimizer, params, 3)
        (group,) = optimizer.param_groups
        if name == "SGD":
            group.update(momentum=0.9, dampening=0.5)
        else:
            group["amsgrad"] = True
            if type(optimizer).__module__.startswith("torch."):  # which does not make it
                for state in optimizer.state.values():
                    state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
        train(optimizer, params, 3, first=3)
    compare(made)


@pytest.mark.parametrize("before", ["number", "equal tensor", "tensor"])
def test_a_tensor_lr_is_the_one_in_the_group_now(before):
    """Also where the new one was equal at first to what it replaced."""
    made = pair("SGD", momentum=0.0)
    for optimizer, params in made:
        (group,) = optimizer.param_groups
        group["lr"] = {
            "number": 0.1,
            "equal tensor": torch.tensor(0.1, dtype=torch.float64),
            "tensor": torch.tensor(0.5, dtype=torch.float64),
        }[before]
        train(optimizer, params, 2)
        lr = group["lr"] = torch.tensor(0.1, dtype=torch.float64)
        train(optimizer, params, 2, first=2)
        lr.mul_(0.5)
        train(optimizer, params, 2, first=4)
        group["lr"] = 0.05
        lr.fill_(99.0)
        train(optimizer, params, 2, first=6)
    compare(made)


def test_tensor_betas_are_read_when_the_optimizer_is_made():
    """The group then holds numbers, so that what changes in place later is not half noticed."""
    betas = tuple(torch.tensor(beta, dtype=torch.float64) for beta in (0.9, 0.99))
    params, twins = parameters(torch.float64), parameters(torch.float64)
    optimizer = depthnet.optim.Adam(params, betas=betas)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.99)
    betas[0].fill_(0.5)
    train(optimizer, params, 3)
    train(torch.optim.Adam(twins, betas=(0.9, 0.99)), twins, 3)
    close(params, twins, steps=3)


@pytest.mark.parametrize("scale", ["lr_scale", "eps_scale", "weight_decay_scale"])
def test_vectors_may_change_in_place_and_be_replaced(backend, scale):
    """As an optimizer that is made anew for every step with the vector of that step."""

    def make(params, vector):
        group = {"params": params, scale: vector.clone()}
        return depthnet.optim.AdamW([group], lr=0.05, eps=0.01, weight_decay=0.1)

    vector = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    params, twin = parameters(shapes=[(3, 5)]), parameters(shapes=[(3, 5)])
    optimizer = make(params, vector)
    (group,) = optimizer.param_groups
    state = None
    for step in range(6):
        if step in (2, 3):
            group[scale].mul_(1.5)
        if step == 4:
            group[scale] = torch.ones(3, dtype=torch.float64)
        if step == 5:
            group[scale] = 2.0
        train(optimizer, params, 1, first=step)
        again = make(twin, vector)
        again.param_groups[0][scale] = copy.deepcopy(group[scale])
        if state:
            again.state[twin[0]] = state
        train(again, twin, 1, first=step)
        state = again.state[twin[0]]
    assert equal(params, twin)


def test_backends_switched_between_steps():
    made = pair(shapes=((3, 5), (0, 2), (7,)))
    names = [name for name in ("cpu", "reference", "auto") if not missing(name)]
    for step in range(9):
        for index, (optimizer, params) in enumerate(made):
            with kernels.use_backend(names[step % len(names)] if index == 0 else "auto"):
                train(optimizer, params, 1, first=step)
    compare(made)


def missing(name):
    return name != "auto" and not {b.name: b.active for b in kernels.backends()}[name]


def test_gradients_are_not_kept_alive(backend):
    """When their owner lets them go, after any step, their memory is free."""
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    for step in range(3):
        gradients(params, step)
        alive = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert [ref() for ref in alive] == [None] * len(params)


def test_states_are_not_kept_alive(backend):
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    train(optimizer, params, 2)
    alive = [weakref.ref(state["exp_avg"]) for state in optimizer.state.values()]
    optimizer.state = defaultdict(dict)
    train(optimizer, params, 1)
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(params)


def test_optimizers_and_parameters_are_freed():
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    train(optimizer, params, 2)
    alive = [weakref.ref(optimizer), *map(weakref.ref, params)]
    del optimizer, params
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)
