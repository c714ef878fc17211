"""Deep networks train, on real data, with the defaults."""

import pytest
import torch
from torch.nn.functional import cross_entropy

import depthnet
from depthnet import data

STEPS = 300


@pytest.mark.parametrize("depth", [64, 256])
def test_digits_reach_95_percent_in_300_steps(depth):
    digits = data.load("digits")
    model = depthnet.ResNet(64, 64, depth, 10, generator=torch.Generator().manual_seed(0))
    optimizer = depthnet.optim.AdamW(model, lr=2**-8)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        x, y = digits.batch(seed=0, step=step, size=64)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
        scheduler.step()
    with torch.no_grad():
        accuracy = (model(digits.x_test).argmax(1) == digits.y_test).float().mean().item()
    assert accuracy >= 0.95


def test_depth_1024_stays_finite():
    digits = data.load("digits")
    model = depthnet.ResNet(64, 64, 1024, 10, generator=torch.Generator().manual_seed(0))
    optimizer = depthnet.optim.AdamW(model, lr=2**-8)
    x, y = digits.batch(seed=0, step=0, size=64)
    with torch.no_grad():
        start = model.blocks(model.input(x))
    assert start.isfinite().all()
    assert 0.1 < start.square().mean() < 10
    losses = []
    for step in range(20):
        x, y = digits.batch(seed=0, step=step, size=64)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert losses[-1] < losses[0]
