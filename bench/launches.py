"""How many kernels does a training step launch?

    TRITON_INTERPRET=1 python bench/launches.py

Runs a step of depthnet.ResNet with Triton's kernels replaced by a count, and counts torch's operators that
would be kernels on a GPU.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
from common import computes
from torch.utils._python_dispatch import TorchDispatchMode

import depthnet
from depthnet.kernels import device_tables, dispatch
from depthnet.kernels.triton import norm, optimizer, residual, stack

ROWS, FEATURES, WIDTH, CLASSES = 8, 16, 64, 10


class Launch(NamedTuple):
    kernel: str
    grid: tuple[int, ...]  # () of torch's operators


class Recorder:
    """Takes the place of a kernel."""

    def __init__(self, name: str, launched: list[Launch]):
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **options: self.launched.append(Launch(self.name, grid))


class Operators(TorchDispatchMode):
    """Lists torch's operators that are kernels on a GPU."""

    def __init__(self, launched: list[Launch]):
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator._schema.name.partition("::")[2]
        if operator.namespace == "depthnet":
            with self:  # what it is made of
                return dispatch._eager[name].run(*args, **kwargs)
        if computes(operator):
            self.launched.append(Launch(name, ()))
        return operator(*args, **kwargs)


@contextmanager
def without_launches() -> Iterator[list[Launch]]:
    """What Triton's kernels are launched for inside the `with` block, where they do nothing."""
    launched = []
    with ExitStack() as patches:
        for module in (norm, optimizer, residual, stack):
            for name in vars(module):
                if name.endswith("_kernel"):
                    recorder = Recorder(name.removesuffix("_kernel"), launched)
                    patches.enter_context(mock.patch.object(module, name, recorder))
        yield launched


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """What is launched inside the `with` block, torch's operators among it; see `without_launches`.

    The optimizer's tables are left out: they are copied, by no kernel, when a gradient has moved.
    """
    triton = depthnet.kernels.use_backend("triton")
    no_tables = mock.patch.object(device_tables._Upload, "refresh")
    with triton, no_tables, without_launches() as launched, Operators(launched):
        yield launched


def training_step(width: int, depth: int) -> Counter:
    """The kernels of a step, by name."""
    model = depthnet.ResNet(FEATURES, width, depth, CLASSES)
    adam = depthnet.optim.AdamW(model, lr=2**-8)
    x, y = torch.randn(ROWS, FEATURES), torch.randint(CLASSES, (ROWS,))
    for _ in range(2):  # the first step also makes the optimizer's tables
        with recorded() as launched:
            adam.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            adam.step()
    return Counter(launch.kernel for launch in launched)


def main() -> None:
    for depth in (8, 1024):
        step = {"width": WIDTH, "depth": depth, "launches": training_step(WIDTH, depth)}
        print(json.dumps(step))


if __name__ == "__main__":
    main()
