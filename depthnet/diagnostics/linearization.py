"""Does each layer act as its linearization in its weights' update?  (Claim 7.6.)"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depthnet.diagnostics.stream import residual_stream
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


def linearization(model: ResNet, weights_before: Tensor, inputs: Tensor) -> Linearization:
    """Compare each block of a trained network with its linearization about earlier weights.

    Args:
        model: as it is now. weights_before: a copy of model.blocks.weight as it was, (*P, L, n, n).
        inputs: what the model is called with.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(model, ResNet):
        raise TypeError(f"model must be a depthnet.ResNet, got {type(model).__name__}")
    blocks = model.blocks
    if weights_before.shape != blocks.weight.shape:
        raise ValueError(
            f"weights_before must be {tuple(blocks.weight.shape)}, as model.blocks.weight is, "
            f"got {tuple(weights_before.shape)}"
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
