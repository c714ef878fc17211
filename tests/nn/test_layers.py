"""A network of a population computes the bits that it computes alone."""

import pytest
import torch
from backends import run_on
from cases import NATIVE

from depthnet import ResNet

MEMBERS = 33


@pytest.fixture(params=NATIVE)
def backend(request):
    yield from run_on(request)


def build(members, active):
    return ResNet(
        *(60, 24, 3, 10),
        active_features=active,
        output_std=1.0,
        population=len(members),
        generator=[torch.Generator().manual_seed(seed) for seed in members],
    )


def gradients(model, x, target):
    """Outputs and gradients; one loss for each member, whose gradients do not meet."""
    y = model(x)
    ((y - target) ** 2).sum().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("active", [None, 5])
@pytest.mark.parametrize("shared", [False, True])
def test_members_have_their_own_bits(backend, active, shared, set_threads):
    x = torch.randint(60, (MEMBERS, 20, 5)) if active else torch.randn(MEMBERS, 20, 60)
    if shared:
        x = x[:1].expand_as(x)
    target = torch.randn(MEMBERS, 20, 10)
    set_threads(1)
    alone = [gradients(build([m], active), x[m : m + 1], target[m : m + 1]) for m in range(MEMBERS)]
    shuffled = torch.randperm(MEMBERS).tolist()
    for members in (shuffled[:1], shuffled[:7], shuffled):
        for threads in (1, 2):
            set_threads(threads)
            inputs = x[0] if shared else x[members]
            together = gradients(build(members, active), inputs, target[members])
            for place, member in enumerate(members):
                for ours, theirs in zip(together, alone[member], strict=True):
                    assert torch.equal(ours[place], theirs[0])
