"""The cases of torch's own tests of Adam, AdamW and SGD, run with our classes."""

import inspect
import warnings

import pytest
import torch
from optim.steps import close, snapshot
from torch.nn import Parameter

import depthnet


def torchs_cases():
    """torch.testing._internal.common_optimizers; importing it takes away the right to set torch.backends'
    flags, which is given back."""
    before = torch.backends.__allow_nonbracketed_mutation_flag
    try:
        from torch.testing._internal import common_optimizers
    finally:
        torch.backends.__allow_nonbracketed_mutation_flag = before
    return common_optimizers


CASES = torchs_cases()
INFOS = {
    info.optim_cls.__name__: info
    for info in CASES.optim_db
    if info.optim_cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
}


# Ours has a single implementation: nothing depends on foreach, and 0-dim tensors are numbers everywhere.
ACCEPTED = {
    "lr as Tensor doesn't work with foreach & not capturable",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True",
    "betas must be either both floats or both Tensors",
}


def inputs():
    """(name, case) for each input of each class, with a readable id."""
    for name, info in INFOS.items():
        for index, case in enumerate(info.optim_inputs_func(device="cpu")):
            yield pytest.param(name, index, id=f"{name}-{case.desc}")
        # The inputs that torch tries on GPUs only: capturable, tensors of one element as numbers.
        if name != "SGD":
            for index, case in enumerate(info.optim_inputs_func(device="cuda")):
                if index >= len(info.optim_inputs_func(device="cpu")):
                    yield pytest.param(name, index, id=f"{name}-{case.desc}")


def error_inputs():
    for name, info in INFOS.items():
        for index, case in enumerate(
            info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        ):
            yield pytest.param(name, index, id=f"{name}-{case.optimizer_error_input.desc}-{index}")


def small_problem(dtype):
    """torch's: a matrix and a vector, fitted to zero (`test_forloop_goes_right_direction`)."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(s, generator=generator).to(dtype) for s in ((10, 5), (10,), (5,))
    )
    return Parameter(weight.clone()), Parameter(bias.clone()), x


def typed(options, dtype):
    """Options with their tensors in `dtype`: with float32 ones torch computes rates in float32."""
    if isinstance(options.get("lr"), torch.Tensor):
        options["lr"] = options["lr"].to(dtype)
    if "betas" in options:
        options["betas"] = tuple(beta.to(dtype) for beta in options["betas"])
    return options


def fit(optimizer, weight, bias, x, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (weight.mv(x) + bias).pow(2).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "index"), list(inputs()))
def test_inputs(name, index, dtype):
    """20 steps are those of torch's class, and go in the right direction."""
    info, results = INFOS[name], []
    device = "cpu" if index < len(info.optim_inputs_func(device="cpu")) else "cuda"
    for module in (torch.optim, depthnet.optim):
        case = info.optim_inputs_func(device=device, dtype=dtype)[index]
        kwargs = typed(dict(case.kwargs), dtype)
        if module is torch.optim:
            kwargs = {**kwargs, "foreach": False}
            kwargs.pop("capturable", None)  # torch's needs a GPU for it
        weight, bias, x = small_problem(dtype)
        optimizer = getattr(module, name)([weight, bias], **kwargs)
        losses = fit(optimizer, weight, bias, x, 20)
        results.append(snapshot(optimizer))
        first, last = losses[0], losses[-1]
        assert last > first if kwargs.get("maximize") else last < first
    # Gradients are sums of ten products that grow with the parameters.
    scale = max(t.abs().max().item() for t in results[0])
    close(*[[t / scale for t in tensors] for tensors in results], steps=20 * 10)


@pytest.mark.parametrize(("name", "index"), list(inputs()))
def test_inputs_of_groups(name, index):
    """torch's `test_param_groups_lr` and `_weight_decay`: two groups, one with a rate of its own."""
    info, results = INFOS[name], []
    device = "cpu" if index < len(info.optim_inputs_func(device="cpu")) else "cuda"
    for module in (torch.optim, depthnet.optim):
        kwargs = typed(dict(info.optim_inputs_func(device=device)[index].kwargs), torch.float64)
        if module is torch.optim:
            kwargs.pop("capturable", None)
        weight, bias, x = small_problem(torch.float64)
        groups = [{"params": [weight]}, {"params": [bias], "lr": 0.01, "weight_decay": 0.2}]
        optimizer = getattr(module, name)(groups, **kwargs)
        fit(optimizer, weight, bias, x, 10)
        results.append(snapshot(optimizer))
    scale = max(t.abs().max().item() for t in results[0])
    close(*[[t / scale for t in tensors] for tensors in results], steps=10 * 10)


@pytest.mark.parametrize(("name", "index"), list(error_inputs()))
def test_error_inputs(name, index):
    """The same type of error, or a warning, as torch's class gives."""
    case = INFOS[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)[index]
    given = case.optimizer_error_input
    params = [Parameter(torch.randn(1, 1))] if given.params is None else given.params
    make = getattr(depthnet.optim, name)
    if given.desc in ACCEPTED:
        make(params, **given.kwargs)
    elif issubclass(case.error_type, Warning):
        with pytest.warns(case.error_type, match=case.error_regex):
            make(params, **given.kwargs)
    else:
        with pytest.raises(case.error_type):
            make(params, **given.kwargs)


def test_every_case_that_is_accepted_is_one_of_torchs():
    descriptions = {
        case.optimizer_error_input.desc
        for info in INFOS.values()
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
    }
    assert descriptions >= ACCEPTED


@pytest.mark.parametrize("name", list(INFOS))
def test_hyperparameters_and_their_order_are_torchs(name):
    """Every option of torch's class has its name and default here, the positional ones their order."""
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    ours = {}
    for cls in getattr(depthnet.optim, name).__mro__:
        if cls.__module__.startswith("depthnet.optim") and "__init__" in vars(cls):
            for key, parameter in inspect.signature(cls).parameters.items():
                ours.setdefault(key, parameter)
    for key, parameter in theirs.items():
        if key == "decoupled_weight_decay":
            continue
        assert key in ours
        assert ours[key].default == parameter.default
    positional = [k for k, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = inspect.signature(getattr(depthnet.optim, name)).parameters
    assert [k for k, p in own.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional


@pytest.mark.parametrize("name", list(INFOS))
@pytest.mark.parametrize("scheduler", range(3))
def test_schedulers_of_torchs_cases(name, scheduler):
    """`test_forloop_goes_right_direction` with learning rate schedulers, in every combination that torch
    has for the class."""
    combinations = INFOS[name].scheduler_inputs
    results = []
    for module in (torch.optim, depthnet.optim):
        weight, bias, x = small_problem(torch.float64)
        optimizer = getattr(module, name)([weight, bias], lr=0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # schedulers made before the first step
            schedulers = [make(optimizer) for make in combinations[scheduler % len(combinations)]]
        for _ in range(20):
            (loss,) = fit(optimizer, weight, bias, x, 1)
            for each in schedulers:
                metric = isinstance(each, torch.optim.lr_scheduler.ReduceLROnPlateau)
                each.step(*[loss] * metric)
        results.append([weight, bias])
    close(*results, steps=20 * 10)
