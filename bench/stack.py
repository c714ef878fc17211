"""The residual stack that several benchmarks run: its tensors, and two ways to compute it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from depthnet.kernels import residual_stack


def plain_stack(x: Tensor, weights: list[Tensor], scale: float) -> Tensor:
    """A residual stack as one writes it in PyTorch."""
    for weight in weights:
        h = x @ weight.T
        z = h.abs()
        x = x + scale * (z - z.mean(-1, keepdim=True))
    return x


class Stack:
    """Inputs, weights and the output's gradient, allocated before anything is measured.

    PyTorch gets the weights as L separate parameters: the gradient of one stacked parameter would cost
    it a tensor of zeros for each layer, or a copy into the stack.
    """

    def __init__(
        self,
        n: int,
        depth: int,
        rows: int = 128,
        dtype: torch.dtype = torch.float32,
        population: tuple[int, ...] = (),
    ):
        self.scale = depth**-0.5
        self.x = torch.randn(*population, rows, n, dtype=dtype).requires_grad_()
        self.grad = torch.randn(*population, rows, n, dtype=dtype)
        self.weight = torch.randn(*population, depth, n, n, dtype=dtype).mul_(n**-0.5)
        self.layers = [layer.clone().requires_grad_() for layer in self.weight.unbind(-3)]
        self.weight.requires_grad_()

    def depthnet(self, checkpoint_every: int | None = None) -> Tensor:
        return residual_stack(self.x, self.weight, self.scale, checkpoint_every=checkpoint_every)

    def eager(self, function: Callable = plain_stack) -> Tensor:
        return function(self.x, self.layers, self.scale)

    def depthnet_step(self, checkpoint_every: int | None = None) -> tuple[Tensor, ...]:
        """Forward and backward: the gradients of x and of all weights."""
        output = self.depthnet(checkpoint_every)
        return torch.autograd.grad(output, (self.x, self.weight), self.grad)

    def eager_step(self, function: Callable = plain_stack) -> tuple[Tensor, ...]:
        """The same, by PyTorch's own operators."""
        return torch.autograd.grad(self.eager(function), (self.x, *self.layers), self.grad)
