"""Finite networks in the setting of depthnet.theory: what its limits are compared with."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from depthnet.diagnostics import residual_stream
from depthnet.nn import ResNet
from depthnet.theory import Trajectory

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared": lambda f, y: (f - y).square().sum() / 2,
    "cross_entropy": lambda f, y: -(f.log_softmax(-1) * y).sum(),
    "product": lambda f, y: (f * y).sum(),  # dLoss/df is the target, whatever f is
}


class SmoothBlock(nn.Module):
    """x + scale MS(phi(W x)) for any phi, members of a population as a leading dimension."""

    def __init__(self, weight: Tensor, scale: float, phi: Callable[[Tensor], Tensor]):
        super().__init__()
        self.weight, self.scale, self.phi = nn.Parameter(weight), scale, phi

    def forward(self, x: Tensor) -> Tensor:
        z = self.phi(x @ self.weight.mT)
        return x + self.scale * (z - z.mean(-1, keepdim=True))


def groups(seeds: int, size: int) -> list[list[int]]:
    """The seeds from 0 on, in populations of `size`."""
    return [list(range(first, min(first + size, seeds))) for first in range(0, seeds, size)]


def network(
    activation, inputs: int, outputs: int, width: int, depth: int, a: float, seeds
) -> nn.Module:
    """A population under Depth-muP with entries of U of N(0, 1) and of n V of N(0, 1).

    Args:
        activation: of the homogeneous family (a ResNet), or a function of tensors.
        seeds: one for each member.
    """
    smooth = callable(activation)
    model = ResNet(
        inputs,
        width,
        depth,
        outputs,
        activation="identity" if smooth else activation,
        base_width=width,
        base_depth=1,
        block_multiplier=a,
        output_std=1 / width,
        population=len(seeds),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )
    with torch.no_grad():
        model.input.weight *= inputs**0.5
    if smooth:
        scale = model.blocks.scale
        blocks = [SmoothBlock(w, scale, activation) for w in model.blocks.weight.detach().unbind(1)]
        model = nn.Sequential(model.input, nn.Sequential(*blocks), model.output)
    return model


def train(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    *,
    lr: float,
    layers: list[int],
    loss: str = "squared",
    tick: Callable[[float], None] = lambda part: None,
) -> list[Trajectory]:
    """SGD on the blocks; for each member the Trajectory that `depthnet.theory` predicts, at some layers.

    Args:
        inputs: (T, batch, d). targets: (T, batch, e).
        layers: whose kernels are kept, from 0 to L.
    """
    x, y = (torch.from_numpy(np.asarray(a, np.float32)) for a in (inputs, targets))
    if isinstance(model, ResNet):
        trained, blocks = [model.blocks.weight], None
    else:
        trained, blocks = list(model[1].parameters()), "1.*"
    optimizer = torch.optim.SGD(trained, lr=lr / x.shape[1])
    members = len(trained[0])
    outputs, streams, gradients = [], [], []
    for step in range(len(x)):
        batch = x[step].expand(members, -1, -1)
        stream = residual_stream(
            model, batch, lambda f, y=y[step]: LOSSES[loss](f, y), blocks=blocks
        )
        outputs.append(stream.outputs)
        streams.append(stream.x[layers])
        gradients.append(stream.dx[layers] * stream.x.shape[-1])
        if step < len(x) - 1:
            optimizer.zero_grad()
            LOSSES[loss](model(batch), y[step]).backward()
            optimizer.step()
        tick((step + 1) / len(x))
    depth = stream.depth
    forward, backward = (_gram(torch.cat(parts, dim=2)) for parts in (streams, gradients))
    f = torch.stack(outputs, 1).double().numpy()
    fractions = np.array(layers) / depth
    return [Trajectory(f[m], fractions, forward[:, m], backward[:, m]) for m in range(members)]


def _gram(rows: Tensor) -> np.ndarray:
    """(F, P, N, n) -> (F, P, N, N), inner products over n."""
    rows = rows.double()
    return (rows @ rows.mT / rows.shape[-1]).numpy()
