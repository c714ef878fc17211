"""Against torch.optim, option by option; scales, vectors of rates, checkpoints, schedulers."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler

import depthnet
from depthnet import ResNet, kernels
from depthnet.scaling import torch_param_groups


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 40, 5), (7,), (33, 31), ()]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        gradients(params, step)
        optimizer.step()


def close(ours, theirs, dtype):
    # Both round each of some ten operations a step; errors of 50 steps add up.
    tolerance = 50 * 10 * torch.finfo(dtype).eps
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adam_is_torchs(backend, dtype, decoupled, weight_decay):
    name = "AdamW" if decoupled else "Adam"
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    ours, theirs = parameters(dtype), parameters(dtype)
    train(getattr(depthnet.optim, name)(ours, **options), ours, 50)
    train(getattr(torch.optim, name)(theirs, **options), theirs, 50)
    close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sgd_is_torchs(backend, dtype):
    crossed = itertools.product((0.0, 0.9), (0.0, 0.3), (0.0, 0.1), (False, True))
    for momentum, dampening, weight_decay, nesterov in crossed:
        if nesterov and (momentum == 0 or dampening):
            continue
        options = {"momentum": momentum, "dampening": dampening}
        options |= {"lr": 0.01, "weight_decay": weight_decay, "nesterov": nesterov}
        ours, theirs = parameters(dtype), parameters(dtype)
        train(depthnet.optim.SGD(ours, **options), ours, 50)
        train(torch.optim.SGD(theirs, **options), theirs, 50)
        close(ours, theirs, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_steps_as_accurately_as_torchs(backend, dtype):
    truth, theirs, ours = parameters(torch.float64), parameters(dtype), parameters(dtype)
    for params in (truth, theirs, ours):
        with torch.no_grad():
            for param, start in zip(params, parameters(dtype), strict=True):
                param.copy_(start)
    make = depthnet.optim.AdamW
    for params, optimizer in (
        (truth, torch.optim.AdamW),
        (theirs, torch.optim.AdamW),
        (ours, make),
    ):
        step = optimizer(params, lr=0.01, eps=1e-4)
        gradients(params, 0)
        for param, exact in zip(params, parameters(dtype), strict=True):
            param.grad.copy_(exact)
        step.step()
    for a, b, t in zip(ours, theirs, truth, strict=True):
        error, torchs = ((v.double() - t).abs().max() for v in (a, b))
        assert error <= 2 * torchs + torch.finfo(dtype).eps * t.abs().max()


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD"])
def test_vectors_of_rates_are_a_loop_of_single_slices(backend, optimizer):
    """Weights (P, L, n, n) with rates (P, L) against P * L torch optimizers."""
    members, depth = 2, 3
    weight = torch.randn(members, depth, 9, 5, dtype=torch.float64).requires_grad_()
    table = torch.rand(members, depth, dtype=torch.float64) + 0.1
    decay = torch.rand(depth, dtype=torch.float64).expand(members, depth)
    eps = torch.rand(members, depth, dtype=torch.float64)
    group = {"params": [weight], "lr_scale": table, "eps_scale": eps, "weight_decay_scale": decay}
    momentum = {"momentum": 0.9} if optimizer == "SGD" else {}
    options = {"weight_decay": 0.1, **momentum}
    with_eps = {} if optimizer == "SGD" else {"eps": 1e-2}

    ours = getattr(depthnet.optim, optimizer)([group], lr=0.1, **options, **with_eps)
    slices = {
        (p, layer): weight.detach()[p, layer].clone().requires_grad_()
        for p in range(members)
        for layer in range(depth)
    }
    singles = {}
    for (p, layer), parameter in slices.items():
        own = dict(options, weight_decay=0.1 * decay[p, layer].item())
        if with_eps:
            own["eps"] = 1e-2 * eps[p, layer].item()
        lr = 0.1 * table[p, layer].item()
        singles[p, layer] = getattr(torch.optim, optimizer)([parameter], lr=lr, **own)
    for step in range(20):
        gradients([weight], step)
        ours.step()
        for index, parameter in slices.items():
            parameter.grad = weight.grad[index].clone()
            singles[index].step()
    for index, parameter in slices.items():
        torch.testing.assert_close(weight[index], parameter, rtol=1e-12, atol=1e-12)


def test_learning_rate_for_each_member(backend):
    model = ResNet(4, 8, 3, 2, population=3, output_std=1.0)
    before = copy.deepcopy(model.state_dict())
    optimizer = depthnet.optim.SGD(model, lr=torch.tensor([0.0, 0.5, 1.0]))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0, 1.0]
    model(torch.randn(3, 5, 4)).square().sum().backward()
    optimizer.step()
    for group in optimizer.param_groups:
        scale = group["lr_scale"]
        (param,) = group["params"]
        name = {"input": "input", "hidden": "blocks", "output": "output"}[group["name"]] + ".weight"
        for member in range(3):
            moved = before[name][member] - scale[member].float() * param.grad[member]
            torch.testing.assert_close(param[member].detach(), moved)


def test_equal_bits_on_one_and_many_threads(backend):
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            params = [torch.linspace(-1, 1, 100_003).requires_grad_()]
            train(depthnet.optim.AdamW(params, lr=0.1), params, 3)
            results.append(params[0].detach())
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


# ---- groups ----


def trained(model, optimizer, steps=10, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, model.in_features, generator=generator).double()
        y = torch.randint(model.out_features, (8,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def small_model(**options):
    generator = torch.Generator().manual_seed(0)
    return ResNet(6, 32, 20, 3, output_std=1.0, generator=generator, dtype=torch.float64, **options)


@pytest.mark.parametrize(("ours", "rule"), [("AdamW", "adamw"), ("Adam", "adam"), ("SGD", "sgd")])
def test_plain_groups_for_torch_train_the_same(ours, rule):
    options = {"lr": 2**-7, "weight_decay": 0.1}
    model, twin = small_model(), small_model()
    first = getattr(depthnet.optim, ours)(model, **options)
    eps = {} if rule == "sgd" else {"eps": 1e-8}
    groups = torch_param_groups(twin, 2**-7, optimizer=rule, weight_decay=0.1, **eps)
    second = getattr(torch.optim, ours)(groups, lr=0.0)
    for a, b in zip(trained(model, first), trained(twin, second), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_model_inside_another_keeps_its_rules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), small_model().float(), torch.nn.Linear(3, 2))
    groups = {g["name"]: g for g in depthnet.optim.AdamW(model, lr=0.1).param_groups}
    assert list(groups) == ["1.input", "1.hidden", "1.output", "other"]
    assert groups["other"]["lr_scale"] == 1
    assert groups["1.hidden"]["lr_scale"] == pytest.approx(4 * (20 / 8) ** -0.5)
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_bare_parameters_of_a_scaled_model_are_refused(name):
    make = getattr(depthnet.optim, name)
    model = small_model()
    pickled = pickle.loads(pickle.dumps(model))
    for twin in (model, copy.deepcopy(model), pickled, torch.nn.Sequential(model)):
        message = rf"bare parameters of a ResNet.*depthnet\.optim\.{name}\(model, \.\.\.\)"
        with pytest.raises(ValueError, match=message):
            make(twin.parameters(), lr=0.1)
        with pytest.raises(ValueError, match="bare parameters"):
            make([{"params": list(twin.parameters())}], lr=0.1)
        with pytest.raises(ValueError, match="bare parameters"):
            make(twin.named_parameters(), lr=0.1)
        with pytest.raises(ValueError, match="bare parameters"):
            make([{"params": twin.named_parameters()}], lr=0.1)
    make(ResNet(4, 8, 3, 2, parametrization="standard").parameters(), lr=0.1)  # scales nothing
    make(ResNet(4, 128, 8, 2).parameters(), lr=0.1)  # the base shape
    make(torch.nn.Linear(2, 2).parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite"),
        ({"lr": "fast"}, TypeError, "lr must be a number or a vector of numbers, got 'fast'"),
        ({"lr": torch.ones(3)}, ValueError, r"lr_scale .* \(3,\) does not fit .* \(2, 5\)"),
        ({"betas": (1.0, 0.9)}, ValueError, r"betas\[0\] must be at least 0 and below 1, got 1.0"),
        ({"eps": -1.0}, ValueError, "eps must be finite and not negative, got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be finite and not negative"),
        ({"lr": torch.tensor(-0.1)}, ValueError, "lr must be finite and not negative"),
        ({"weight_decay": [0.1, 0.2]}, TypeError, "weight_decay must be a number"),
    ],
)
def test_bad_arguments_are_named(arguments, error, words):
    with pytest.raises(error, match=words):
        depthnet.optim.AdamW([torch.zeros(2, 5, requires_grad=True)], **arguments)


def test_bad_arguments_of_sgd():
    param = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="nesterov needs a positive momentum"):
        depthnet.optim.SGD([param], nesterov=True)
    with pytest.raises(ValueError, match="momentum must not be negative"):
        depthnet.optim.SGD([param], momentum=-0.1)
    with pytest.raises(TypeError, match="params must be real"):
        depthnet.optim.SGD([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])


def test_a_group_that_is_refused_is_not_added():
    optimizer = depthnet.optim.AdamW([torch.zeros(2, requires_grad=True)])
    with pytest.raises(ValueError, match="lr_scale"):
        optimizer.add_param_group(
            {"params": [torch.zeros(3, requires_grad=True)], "lr_scale": [1, 2]}
        )
    assert len(optimizer.param_groups) == 1


def test_groups_of_another_rule_are_refused():
    with pytest.raises(ValueError, match="the group 'input' follows the rule 'sgd'"):
        depthnet.optim.AdamW(small_model().param_groups("sgd"))


def test_a_groups_generator_of_parameters_is_used_up_once():
    linear = torch.nn.Linear(2, 2)
    optimizer = depthnet.optim.AdamW([{"params": linear.parameters()}], lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 2


@pytest.mark.parametrize("option", ["maximize", "amsgrad", "differentiable"])
def test_options_that_we_lack_are_refused_in_groups(option):
    group = {"params": [torch.zeros(2, requires_grad=True)], option: True}
    with pytest.raises(ValueError, match=f"{option}=True is not supported"):
        depthnet.optim.SGD([group])


def test_steps_are_seen_by_autograd(backend):
    weight = torch.randn(3, 3, requires_grad=True)
    optimizer = depthnet.optim.AdamW([weight], lr=0.1)
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
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert ours.state[weight]["step"].item() == 2
    assert ours.state[weight]["exp_avg"].device.type == "cpu"


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 3, sparse=True)
    optimizer = depthnet.optim.AdamW(embedding.parameters(), lr=0.1)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="AdamW does not take sparse gradients"):
        optimizer.step()


def test_parameters_without_gradients_stay_and_closures_are_called():
    first, second = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = depthnet.optim.SGD([first, second], lr=0.5)

    def closure():
        loss = first.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert second.tolist() == [1, 1, 1]
    assert first.tolist() == [0.5, 0.5, 0.5]


def test_non_contiguous_parameters():
    weight = torch.randn(5, 4).mT.requires_grad_()
    twin = weight.detach().contiguous().requires_grad_()
    for param in (weight, twin):
        optimizer = depthnet.optim.AdamW([param], lr=0.1)
        param.grad = torch.ones(4, 5)
        optimizer.step()
    torch.testing.assert_close(weight, twin)


# ---- checkpoints ----


def round_trip(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_resuming_is_exact(backend, name):
    options = {"lr": 0.01, "weight_decay": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    make = getattr(depthnet.optim, name)
    straight, stopped = parameters(), parameters()

    def groups(params):
        return [
            {"params": param, "lr_scale": scale, "eps_scale": scale}
            for param, scale in zip(params, (1, 2, 3, 4), strict=True)
        ]

    train(make(groups(straight), **options), straight, 10)
    first = make(groups(stopped), **options)
    train(first, stopped, 5)
    second = make(groups(stopped), lr=99.0)
    second.load_state_dict(round_trip(first.state_dict()))
    train(second, stopped, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
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


def test_torch_options_that_we_lack_are_refused_whole():
    theirs = torch.optim.AdamW([torch.zeros(2, requires_grad=True)], amsgrad=True)
    ours = depthnet.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=0.5)
    with pytest.raises(ValueError, match="amsgrad=True is not supported"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.5


def test_a_checkpoint_of_another_population_is_refused_whole():
    def adam(members):
        return depthnet.optim.AdamW([torch.zeros(members, requires_grad=True)], lr=[0.1] * members)

    ours = adam(2)
    with pytest.raises((ValueError, RuntimeError), match="fit"):
        ours.load_state_dict(adam(3).state_dict())
    assert ours.param_groups[0]["lr_scale"].tolist() == [0.1, 0.1]


def test_what_schedulers_keep_is_scaled_for_torch_too():
    optimizer = depthnet.optim.AdamW([{"params": [torch.zeros(2)], "lr_scale": 0.5}], lr=0.1)
    lr_scheduler.StepLR(optimizer, 1)
    (group,) = optimizer.torch_state_dict()["param_groups"]
    assert (group["lr"], group["initial_lr"]) == (0.05, 0.05)


def test_vectors_do_not_fit_torchs_groups():
    optimizer = depthnet.optim.AdamW([torch.zeros(2, requires_grad=True)], lr=[0.1, 0.2])
    with pytest.raises(ValueError, match="lr_scale is a vector"):
        optimizer.torch_state_dict()


def test_copy_and_pickle():
    params = parameters()
    optimizer = depthnet.optim.AdamW(params, lr=0.01)
    train(optimizer, params, 3)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own = [p for group in twin.param_groups for p in group["params"]]
        train(twin, own, 3, first=3)
        expected = [p.detach().clone().requires_grad_() for p in params]
        again = depthnet.optim.AdamW(expected, lr=0.01)
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # loading shares, as in torch
        train(again, expected, 3, first=3)
        assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


# ---- schedulers ----

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.1, 0.5, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=8, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def test_no_scheduler_of_torch_is_forgotten():
    base = lr_scheduler.LRScheduler
    public = {
        name
        for name in lr_scheduler.__all__
        if issubclass(getattr(lr_scheduler, name), base) and name != "LRScheduler"
    }
    assert public == set(SCHEDULERS)


@pytest.mark.parametrize("name", list(SCHEDULERS))
@pytest.mark.parametrize("kind", ["number", "vector", "tensor"])
def test_schedulers_move_every_rate_alike(name, kind):
    """Against torch's AdamW on one slice, whose learning rate is a number."""
    rates = [0.25, 0.5]
    theirs = [torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in rates]
    ours = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    if kind == "vector":
        optimizer = depthnet.optim.AdamW([ours], lr=rates)
    else:
        lr = torch.tensor(1.0, dtype=torch.float64) if kind == "tensor" else 1.0
        optimizer = depthnet.optim.AdamW([{"params": [ours], "lr_scale": rates}], lr=lr)
    scheduler = SCHEDULERS[name](optimizer)
    singles = [torch.optim.AdamW([param], lr=1.0) for param in theirs]
    single_schedulers = [SCHEDULERS[name](single) for single in singles]
    for step in range(7):
        gradients([ours], step)
        optimizer.step()
        for index, (param, single) in enumerate(zip(theirs, singles, strict=True)):
            param.grad = ours.grad[index].clone()
            group = single.param_groups[0]
            number = float(group["lr"])
            group["lr"] = number * rates[index]
            single.step()
            group["lr"] = number
        metric = [1.0] if name == "ReduceLROnPlateau" else []
        for each in (scheduler, *single_schedulers):
            each.step(*metric)
    for index, param in enumerate(theirs):
        torch.testing.assert_close(ours[index], param, rtol=1e-9, atol=1e-12)


# ---- torch.compile ----


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


# ---- the step operators themselves ----


def test_bad_arguments_of_the_step_operators():
    p = [torch.zeros(2, 3)]
    rates = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.0, "betas": (0.9, 0.99)}
    step = [torch.zeros(())]
    kernels.adamw_step_(p, p, p, p, step, **rates)
    kernels.adamw_step_([], [], [], [], [], **rates)
    with pytest.raises(ValueError, match="grads must have 1 tensors, as params has, got 0"):
        kernels.adamw_step_(p, [], p, p, step, **rates)
    with pytest.raises(
        ValueError, match=r"exp_avgs\[0\] must have the shape .* \(2, 3\), got \(3\)"
    ):
        kernels.adamw_step_(p, p, [torch.zeros(3)], p, step, **rates)
    with pytest.raises(ValueError, match="lr must be a number or a 1-dim tensor of 2 entries"):
        kernels.adamw_step_(p, p, p, p, step, **{**rates, "lr": torch.ones(3)}, leading=[1])
    with pytest.raises(ValueError, match=r"leading\[0\] must be 0 to 2"):
        kernels.sgd_step_(p, p, lr=0.1, leading=[3])
    with pytest.raises(TypeError, match=r"params\[0\] must be one of float32"):
        kernels.sgd_step_([torch.zeros(2, dtype=torch.int32)], [torch.zeros(2)], lr=0.1)
    with pytest.raises(ValueError, match="steps must be 1 tensors of one element"):
        kernels.adamw_step_(p, p, p, p, [], **rates)
