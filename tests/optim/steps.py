"""What the tests of the optimizers share: parameters, gradients, training, and tolerances."""

import io
import itertools
from contextlib import contextmanager

import torch
from torch.nn.functional import cross_entropy

from depthnet import ResNet

NAMES = ["AdamW", "Adam", "SGD"]
SHAPES = [(3, 40, 5), (7,), (33, 31), ()]
ADAM = {  # every option with the values that it is tried with
    "decoupled_weight_decay": (True, False),
    "weight_decay": (0.0, 0.1),
    "amsgrad": (False, True),
    "maximize": (False, True),
    "betas": ((0.9, 0.999), (0.6, 0.95), (0.0, 0.5)),
}
SGD = {
    "weight_decay": (0.0, 0.1),
    "maximize": (False, True),
    "momentum": (0.0, 0.9),
    "dampening": (0.0, 0.3),
    "nesterov": (False, True),
}


def crossed(options):
    """Every combination of options that torch takes."""
    table = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]
    return [
        row
        for row in table
        if not (row.get("nesterov") and (row["momentum"] == 0 or row["dampening"]))
    ]


def parameters(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def train(optimizer, params, steps, first=0):
    for step in range(first, first + steps):
        gradients(params, step)
        optimizer.step()


def momentum(name):
    """Options with which every optimizer has a state."""
    return {"momentum": 0.9} if name == "SGD" else {}


def close(ours, theirs, steps, names=None):
    """Both round each of some ten operations a step, on numbers of order one; the errors add up."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        tolerance = 10 * steps * torch.finfo(a.dtype).eps
        torch.testing.assert_close(
            a,
            b,
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda text, index=index: f"{names[index] if names else index}: {text}",
        )


def equal(ours, theirs):
    """Whether tensors are the same bits, NaN included."""
    pairs = list(zip(ours, theirs, strict=True))
    return all(
        a.dtype == b.dtype
        and torch.equal(a.detach().isnan(), b.detach().isnan())
        and torch.equal(a.detach().nan_to_num(), b.detach().nan_to_num())
        for a, b in pairs
    )


def states(optimizer):
    """Copies of all tensors of an optimizer's state, in the order of its parameters."""
    entries = optimizer.state_dict()["state"]
    return [entries[i][key].clone() for i in sorted(entries) for key in sorted(entries[i])]


def snapshot(optimizer):
    """Copies of an optimizer's parameters and states."""
    params = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    return params + states(optimizer)


def round_trip(state):
    """A state_dict, written to a file and read again."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@contextmanager
def threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_model(**options):
    generator = torch.Generator().manual_seed(0)
    return ResNet(6, 32, 20, 3, output_std=1.0, generator=generator, dtype=torch.float64, **options)


def trained(model, optimizer, steps=10, first=0):
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, model.in_features, generator=generator).double()
        y = torch.randint(model.out_features, (8,), generator=generator)
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]
