"""What several benchmarks run: a residual stack and a network, by depthnet and as plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from depthnet.kernels import residual_stack

# (n, L, rows): of a GPU that has enough to do.
GPU_SHAPES = [
    (64, 64, 4096),
    (128, 64, 4096),
    (256, 64, 4096),
    (256, 1024, 4096),
    (512, 32, 8192),
    (1024, 16, 8192),
    (2048, 16, 8192),
]
FEATURES, CLASSES = 32, 10


def plain_stack(
    x: Tensor, weights: Iterable[Tensor], scale: float, phi: Callable = torch.abs
) -> Tensor:
    """A residual stack as one writes it in PyTorch."""
    for weight in weights:
        z = phi(x @ weight.T)
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
        device: str = "cpu",
    ):
        new = {"dtype": dtype, "device": device}
        self.scale = depth**-0.5
        self.x = torch.randn(*population, rows, n, **new).requires_grad_()
        self.grad = torch.randn(*population, rows, n, **new)
        self.weight = torch.randn(*population, depth, n, n, **new).mul_(n**-0.5)
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


class PlainResNet(nn.Module):
    """depthnet.ResNet as one writes it in PyTorch, each layer's weight a parameter of its own."""

    def __init__(self, n: int, depth: int, device: str = "cpu"):
        super().__init__()
        self.scale = depth**-0.5
        self.input = nn.Linear(FEATURES, n, bias=False, device=device)
        self.output = nn.Linear(n, CLASSES, bias=False, device=device)
        layers = torch.randn(depth, n, n, device=device).mul_(n**-0.5)
        self.layers = nn.ParameterList(map(nn.Parameter, layers.unbind()))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(plain_stack(self.input(x), self.layers, self.scale))

    def adamw(self, lr: float) -> torch.optim.AdamW:
        """torch's fused optimizer, with a learning rate for each kind of layer."""
        kinds = self.input, self.layers, self.output
        groups = [{"params": list(kind.parameters()), "lr": lr} for kind in kinds]
        return torch.optim.AdamW(groups, fused=True)
