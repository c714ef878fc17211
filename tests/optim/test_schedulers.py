"""torch's schedulers and weight averaging."""

import copy

import pytest
import torch
from optim.steps import NAMES, close, gradients, momentum, parameters, train
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn

import depthnet

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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
def test_schedulers_that_move_momentum_too(name, scheduler):
    """They write betas or momentum into the groups at every step."""
    arguments = {"CyclicLR": (0.01, 0.1, 2), "OneCycleLR": (0.1, 20)}[scheduler]
    results = []
    for module in (depthnet.optim, torch.optim):
        params = parameters(torch.float64)
        optimizer = getattr(module, name)(params, lr=0.01, **momentum(name))
        moved = getattr(lr_scheduler, scheduler)(optimizer, *arguments, cycle_momentum=True)
        for step in range(15):
            train(optimizer, params, 1, first=step)
            moved.step()
        results.append(params)
    close(*results, steps=15)


def test_a_scheduler_goes_on_after_both_are_loaded():
    """A tensor lr is another tensor after load_state_dict, and it is that one which moves."""
    for lr in (0.1, torch.tensor(0.1)):
        straight, stopped = parameters(), parameters()
        optimizer = depthnet.optim.AdamW(straight, lr=copy.deepcopy(lr))
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(6):
            train(optimizer, straight, 1, first=step)
            scheduler.step()

        first = depthnet.optim.AdamW(stopped, lr=copy.deepcopy(lr))
        scheduler = lr_scheduler.ExponentialLR(first, 0.5)
        for step in range(3):
            train(first, stopped, 1, first=step)
            scheduler.step()
        second = depthnet.optim.AdamW(stopped, lr=copy.deepcopy(lr))
        again = lr_scheduler.ExponentialLR(second, 0.5)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        again.load_state_dict(scheduler.state_dict())
        for step in range(3, 6):
            train(second, stopped, 1, first=step)
            again.step()
        assert all(torch.equal(a, b) for a, b in zip(straight, stopped, strict=True))


# ---- weight averaging ----


@pytest.mark.parametrize("kind", ["SWA", "EMA"])
def test_averaged_models_follow_the_steps(kind):
    """AveragedModel and SWALR beside our optimizer and torch's: equal averages, equal rates."""
    results = []
    for module in (depthnet.optim, torch.optim):
        torch.manual_seed(0)
        model = torch.nn.Linear(5, 3).double()
        average = {} if kind == "SWA" else {"multi_avg_fn": get_ema_multi_avg_fn(0.9)}
        averaged = AveragedModel(model, **average)
        optimizer = module.AdamW(model.parameters(), lr=0.1)
        scheduler = SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
        for step in range(8):
            train(optimizer, list(model.parameters()), 1, first=step)
            averaged.update_parameters(model)
            scheduler.step()
        results.append([*averaged.module.parameters(), *model.parameters()])
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)
    close(*results, steps=8)
    first = results[0]
    assert not torch.equal(first[0], first[2])  # the average is not the model


def test_training_a_copy_of_a_model_leaves_the_model_alone():
    model = torch.nn.Linear(5, 3)
    twin = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    train(depthnet.optim.AdamW(twin.parameters(), lr=0.1), list(twin.parameters()), 3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
