"""Does each layer act as its linearization in its weights' update?  (Claim 7.6.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from depthnet.diagnostics.stream import find_blocks, residual_stream
from depthnet.kernels import slopes
from depthnet.kernels.reference import slope, subtract_mean
from depthnet.nn import ResNet


@dataclass(frozen=True)
class Linearization:
    """What training changed in each block, and how much of it is not linear in the weights' update.

    Both are float64 (L, *P), root mean squares over inputs and coordinates, times L: a block may
    contribute 1/L to the stream.

    change: L m MS(phi(W_t x) - phi(W_0 x)), with x = x_t^(l-1) and m the branch multiplier.
    remainder: L m MS(phi(W_t x) - phi(W_0 x) - phi'(W_0 x) o ((W_t - W_0) x)).
    """

    change: np.ndarray
    remainder: np.ndarray

    @property
    def relative(self) -> np.ndarray:
        """(L, *P), remainder / change; NaN where nothing changed."""
        with np.errstate(invalid="ignore"):
            return self.remainder / self.change

    @property
    def network_remainder(self) -> np.ndarray:
        """(*P), the remainder's root mean square over layers.

        On the line alpha + gamma = 1 it follows L^(1 - alpha - 3/2 gamma) at a kink of phi: it falls
        if alpha is in [1/2, 1), and stays at alpha = 1.
        """
        return _rms(self.remainder)

    @property
    def network_relative(self) -> np.ndarray:
        """(*P), the same, relative to the change's: it follows L^(-gamma / 2)."""
        with np.errstate(invalid="ignore"):
            return _rms(self.remainder) / _rms(self.change)


def linearization(
    model: nn.Module,
    weights_before: Tensor | dict[str, Tensor],
    inputs: Tensor,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
) -> Linearization:
    """Compare each block of a trained network with its linearization about earlier weights.

    Args:
        model: as it is now.
        weights_before: a copy of what it was: of a ResNet model.blocks.weight, (*P, L, n, n); of other
            modules model.state_dict(), of which the parameters in blocks are used.
        inputs: what the model is called with.
        blocks: of modules other than a ResNet, their residual blocks or a pattern of their names, see
            `residual_stream`; each must be callable with the stream alone.  They are linearized by
            forward-mode differentiation, and the change of a block is that of its output.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if isinstance(model, ResNet) and blocks is None:
        return _of_resnet(model, weights_before, inputs)
    found = find_blocks(model, blocks)
    names = {id(module): name for name, module in model.named_modules()}
    stream = residual_stream(model, inputs, blocks=found)
    sizes = []
    for block, x in zip(found, stream.x, strict=False):  # the last x leaves the last block
        after = {name: parameter.detach() for name, parameter in block.named_parameters()}
        try:
            before = {name: weights_before[f"{names[id(block)]}.{name}"] for name in after}
        except (KeyError, TypeError):
            raise ValueError(
                "weights_before must be an earlier model.state_dict(), with the parameters of every block"
            ) from None
        sizes.append(_of_block(block, before, after, x))
    change, remainder = (len(found) * np.array(size) for size in zip(*sizes, strict=True))
    return Linearization(change=change, remainder=remainder)


def _of_block(block: nn.Module, before: dict, after: dict, x: Tensor) -> tuple[float, float]:
    """Sizes of a block's change and of what is not linear in that of its parameters."""

    def run(parameters):
        return torch.func.functional_call(block, parameters, (x,))

    update = {name: after[name] - before[name] for name in after}
    start, linear = torch.func.jvp(run, (before,), (update,))
    change = (run(after) - start).detach()
    return tuple(z.double().square().mean().sqrt().item() for z in (change, change - linear))


def _of_resnet(model: ResNet, weights_before: Tensor, inputs: Tensor) -> Linearization:
    blocks = model.blocks
    shape = getattr(weights_before, "shape", None)
    if shape != blocks.weight.shape:
        raise ValueError(
            f"weights_before must be {tuple(blocks.weight.shape)}, as model.blocks.weight is, "
            f"got {shape if shape is None else tuple(shape)}"
        )
    stream = residual_stream(model, inputs)
    after = stream.h
    before = stream.x[:-1] @ weights_before.detach().movedim(-3, 0).mT
    p, q = slopes(blocks.activation)
    slope_after, slope_before = (slope(h >= 0, p, q, h.dtype) for h in (after, before))
    # phi(h) = phi'(h) h, so that nothing is left where no sign changes, not even rounding.
    remainder = (slope_after - slope_before) * after
    change = slope_after * after - slope_before * before
    multiplier = stream.depth * torch.as_tensor(blocks.scale, dtype=torch.float64).abs().cpu()

    def size(z: Tensor) -> np.ndarray:
        z = subtract_mean(z, blocks.mean_subtract).double()
        return (multiplier * z.square().mean((-2, -1)).sqrt().cpu()).numpy()

    return Linearization(change=size(change), remainder=size(remainder))


def _rms(layers: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(layers).mean(0))
