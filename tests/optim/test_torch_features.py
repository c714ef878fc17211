"""What torch.optim.Optimizer offers besides steps: hooks, closures, names, torch.compile, autograd."""

import copy
import pickle

import pytest
import torch
from optim.steps import NAMES, close, equal, gradients, momentum, parameters, small_model, train
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

import depthnet


@pytest.mark.parametrize("name", NAMES)
def test_parameters_without_gradients_stay_and_have_no_state(name):
    params = parameters()
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, weight_decay=0.1, **momentum(name))
    optimizer.step()
    assert equal(params, parameters())
    assert optimizer.state_dict()["state"] == {}
    gradients(params[:1], 0)
    optimizer.step()
    assert equal(params[1:], parameters()[1:])
    assert set(optimizer.state) == {params[0]}


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_without_decay_move_nothing(backend, name):
    params = parameters()
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, weight_decay=0.0, **momentum(name))
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert equal(params, parameters())


@pytest.mark.parametrize("name", NAMES)
def test_closures_are_called_with_gradients_on_and_their_loss_returned(name):
    first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = getattr(depthnet.optim, name)([first, second], lr=0.5, weight_decay=0.0)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = first.sum()
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).item() == 3
    assert calls == [True]
    assert second.tolist() == [1, 1, 1]
    torch.testing.assert_close(first, torch.full((3,), 0.5), rtol=0, atol=1e-6)
    assert optimizer.step() is None


def test_hooks_run_around_the_step_in_their_order():
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    order, seen = [], []

    def before(opt, args, kwargs):
        assert opt is optimizer
        order.append("pre")
        seen.append(params[0].detach().clone())

    def after(opt, args, kwargs):
        order.append("post")
        seen.append(params[0].detach().clone())

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(after),
        register_optimizer_step_pre_hook(lambda *_: order.append("all pre")),
        register_optimizer_step_post_hook(lambda *_: order.append("all post")),
    ]
    try:
        train(optimizer, params, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert order == ["all pre", "pre", "post", "all post"]
    assert torch.equal(seen[0], parameters()[0])
    assert torch.equal(seen[1], params[0])
    train(optimizer, params, 1)
    assert len(order) == 4


def test_a_hook_before_the_step_may_change_what_it_steps():
    """Gradients, rates; also the closure."""
    params, twin = parameters(), parameters()
    optimizer = depthnet.optim.SGD(params, lr=99.0)

    def halve(opt, args, kwargs):
        opt.param_groups[0]["lr"] = 0.1
        for p in params:
            p.grad = p.grad / 2

    optimizer.register_step_pre_hook(halve)
    train(optimizer, params, 2)
    train(depthnet.optim.SGD(twin, lr=0.05), twin, 2)
    close(params, twin, steps=2)


def test_hooks_of_state_dict_and_load_state_dict():
    """One that makes another dictionary, one that changes it in place, one after loading."""
    params = parameters(torch.bfloat16)
    optimizer = depthnet.optim.AdamW(params, lr=0.1)
    train(optimizer, params, 2)
    order = []

    def replaced(opt, state):
        order.append("pre")
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] = state["state"][0]["exp_avg"] * 2
        return state

    def in_place(opt, state):
        order.append("second pre")
        state["state"][1]["exp_avg"] = state["state"][1]["exp_avg"] * 3

    again = depthnet.optim.AdamW(params, lr=0.5)
    again.register_load_state_dict_pre_hook(replaced)
    again.register_load_state_dict_pre_hook(in_place)
    again.register_load_state_dict_post_hook(lambda opt: order.append("post"))
    optimizer.register_state_dict_pre_hook(lambda opt: order.append("state pre"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "note": "kept"})
    state = optimizer.state_dict()
    assert state["note"] == "kept"
    again.load_state_dict(state)
    assert order == ["state pre", "pre", "second pre", "post"]
    for index, factor in enumerate((2, 3, 1, 1)):
        loaded = again.state[params[index]]["exp_avg"]
        assert loaded.dtype == torch.float32
        assert torch.equal(loaded, optimizer.state[params[index]]["exp_avg"] * factor)


def test_names_of_parameters_travel_with_the_state():
    model = torch.nn.Linear(3, 2)
    optimizer = depthnet.optim.AdamW(model.named_parameters(), lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["weight", "bias"]
    train(optimizer, list(model.parameters()), 1)
    state = optimizer.state_dict()
    assert state["param_groups"][0]["param_names"] == ["weight", "bias"]
    again = depthnet.optim.AdamW(model.named_parameters(), lr=0.5)
    again.load_state_dict(state)
    assert again.param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("name", NAMES)
def test_copies_have_every_public_attribute(name):
    """torch's copies have what __getstate__ lists; nothing public may be outside it."""
    params = parameters()
    optimizer = getattr(depthnet.optim, name)(params, lr=0.1, **momentum(name))
    train(optimizer, params, 1)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert repr(twin) == repr(optimizer)
        assert twin.defaults == optimizer.defaults
        public = [key for key in vars(optimizer) if not key.startswith("_")]
        assert set(public) <= set(vars(twin))


def test_steps_are_seen_by_autograd(backend):
    weight = torch.randn(3, 3, requires_grad=True)
    optimizer = depthnet.optim.AdamW([weight], lr=0.1)
    for _ in range(2):  # with new tables and with those of the step before
        y = (weight * weight).sum()
        weight.grad = torch.ones(3, 3)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


def test_the_default_dtype_and_device_do_not_matter():
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        theirs, ours = (
            make([weight], lr=0.1) for make in (torch.optim.AdamW, depthnet.optim.AdamW)
        )
        theirs.step()
        ours.load_state_dict(theirs.state_dict())  # its step is a float64 tensor
        ours.step()
        ours.step()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert ours.state[weight]["step"].item() == 3
    assert ours.state[weight]["exp_avg"].device.type == "cpu"


def test_steps_inside_autocast_and_inference_mode_are_the_same():
    results = []
    for context in (torch.enable_grad, torch.inference_mode, torch.no_grad, autocast):
        params = parameters()
        optimizer = depthnet.optim.AdamW(params, lr=0.1)
        with torch.no_grad():
            gradients(params, 0)
        with context():
            for _ in range(3):
                optimizer.step()
        results.append(params)
    assert all(equal(results[0], other) for other in results[1:])


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def test_gradients_as_a_view_of_one_buffer():
    """As DistributedDataParallel(gradient_as_bucket_view=True) keeps them."""
    params, twin = parameters(), parameters()
    bucket = torch.zeros(sum(p.numel() for p in params))
    views = bucket.split([p.numel() for p in params])
    optimizer, other = depthnet.optim.AdamW(params), depthnet.optim.AdamW(twin)
    for step in range(3):
        gradients(twin, step)
        for view, p, t in zip(views, params, twin, strict=True):
            p.grad = view.view(p.shape).copy_(t.grad)
        optimizer.step()
        other.step()
    assert equal(params, twin)


def test_a_step_inside_backward():
    """An optimizer for each parameter, run by its hook after accumulation; the gradient is freed there."""
    params, twin = parameters(), parameters()
    own = {p: depthnet.optim.AdamW([p], lr=0.1) for p in params}

    def step(p):
        own[p].step()
        p.grad = None

    for p in params:
        p.register_post_accumulate_grad_hook(step)
    other = depthnet.optim.AdamW(twin, lr=0.1)
    for _ in range(3):
        sum(p.square().sum() for p in params).backward()
        other.zero_grad()
        sum(p.square().sum() for p in twin).backward()
        other.step()
    assert equal(params, twin)


# ---- torch.compile ----


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_training_step_with_the_optimizer_in_it(name):
    """The graph breaks at the step; what is trained is what is trained without compiling."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3).double()
        options = {"lr": 0.05, "max_grad_norm": 1.0, **momentum(name)}
        optimizer = getattr(depthnet.optim, name)(model.parameters(), **options)

        def step(x, model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        run = torch.compile(step, backend="aot_eager") if compiled else step
        for index in range(5):
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(index)).double()
            loss = run(x)
        results.append([*model.parameters(), loss])
    close(*results, steps=5)


def test_compiled_training_step_and_changing_learning_rate_without_recompiling():
    torch.use_deterministic_algorithms(False)
    models = [small_model(), small_model()]
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(3, (8,))
    results = []
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = depthnet.optim.AdamW(model, lr=torch.tensor(0.01))

        def loss(x, y, model=model):
            return cross_entropy(model(x), y)

        step = optimizer.step
        if compiled:
            torch._dynamo.reset()
            forward_counter = CompileCounterWithBackend("inductor")
            step_counter = CompileCounterWithBackend("inductor")
            loss = torch.compile(loss, fullgraph=True, backend=forward_counter)
            step = torch.compile(step, backend=step_counter)
        counts = []
        for _ in range(6):
            optimizer.zero_grad()
            loss(x, y).backward()
            step()
            for group in optimizer.param_groups:
                group["lr"].mul_(0.5)
            if compiled:
                counts.append((forward_counter.frame_count, step_counter.frame_count))
        results.append([p.detach() for p in model.parameters()])
        if compiled:
            assert forward_counter.frame_count == 1
            # The first step makes the state; from the second on, nothing is compiled again.
            assert counts[1:] == [counts[1]] * 5
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
