"""Learning rates in the course of training."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from depthnet.training.schedules import SCHEDULES, schedule

STEPS = 12


def shape(kind, step, warmup, final):
    """The part of the learning rate that a step of training has, as the schedule is defined."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    over = (step - warmup) / (STEPS - warmup)
    falls = {"constant": 0, "linear": over, "cosine": (1 - math.cos(math.pi * over)) / 2}[kind]
    return 1 - (1 - final) * falls


def followed(make):
    """What a scheduler makes of two learning rates: before each step, and after the last one."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": lr} for lr in (0.5, 0.5)]
    optimizer = torch.optim.SGD(groups)
    scheduler, found = make(optimizer), []
    for _ in range(STEPS + 1):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("final", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 1, 5, STEPS - 1])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_step_has_the_part_of_the_learning_rate_that_the_shape_has_there(kind, warmup, final):
    found = followed(lambda optimizer: schedule(optimizer, kind, STEPS, warmup, final))
    expected = [shape(kind, step, warmup, final) for step in range(STEPS + 1)]
    assert found == [pytest.approx([0.5 * part] * 2, abs=1e-12) for part in expected]
    assert all(rates[0] > 0 for rates in found[:-1])  # no step is lost


def test_groups_of_different_rates_keep_their_ratios():
    """Also by a cosine, of which torch asks for the least rate itself."""
    for kind in SCHEDULES:
        parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
        groups = [
            {"params": [p], "lr": lr} for p, lr in zip(parameters, (1.0, 2**-10), strict=True)
        ]
        optimizer = torch.optim.SGD(groups)
        scheduler = schedule(optimizer, kind, STEPS, 3)
        for _ in range(STEPS):
            high, low = (group["lr"] for group in optimizer.param_groups)
            assert low == pytest.approx(high * 2**-10, rel=1e-9)
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(
    ("kind", "after"),
    [
        ("constant", lambda optimizer: lr_scheduler.ConstantLR(optimizer, 1.0, 0)),
        ("linear", lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS - 5)),
        ("cosine", lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, STEPS - 5)),
    ],
)
def test_a_schedule_is_torchs_own_after_torchs_own_warmup(kind, after):
    def composed(optimizer):
        rising = lr_scheduler.LinearLR(optimizer, 1 / 6, total_iters=5)
        return lr_scheduler.SequentialLR(optimizer, [rising, after(optimizer)], [5])

    assert followed(lambda optimizer: schedule(optimizer, kind, STEPS, 5)) == followed(composed)
