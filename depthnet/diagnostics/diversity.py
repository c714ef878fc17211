"""Do neighboring layers do different things?  Features (claims 7.4, 7.5), gradients and updates."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depthnet.diagnostics.fits import Interval, mean_interval, power_law
from depthnet.diagnostics.stream import Stream
from depthnet.kernels import slopes

FINEST, COARSEST = 1 / 256, 1 / 16  # the default range of eps, that of the paper's figures 17 to 19
STRETCHES = 8


@dataclass(frozen=True)
class FeatureDiversity:
    """How far the stream moves within a part eps of the depth: d(eps) ∝ eps^(1 - kappa).

    kappa = 1/2 is a Brownian path, whose layers are independent; kappa = 0 a smooth one, whose layers
    repeat each other.  All arrays are float64; P is 1 for a single network.

    epsilons: (K,), ascending, multiples of 1/L. fractions: (F,), where the steps start, as parts lambda
        of the depth.
    distances: (K, F, P), ||x^((lambda + eps) L) - x^(lambda L)|| / n^1/2, root mean square over inputs.
    """

    epsilons: np.ndarray
    fractions: np.ndarray
    distances: np.ndarray

    @property
    def curves(self) -> np.ndarray:
        """(P, K), d(eps) of each member: root mean square over lambda."""
        return _over_fractions(self.distances)

    @property
    def kappas(self) -> np.ndarray:
        """(P,), the exponent of each member."""
        return kappas(self.epsilons, self.curves)

    @property
    def kappa(self) -> Interval:
        """The mean over members, which are independent; of a single network, without bounds."""
        return mean_interval(self.kappas)

    @property
    def along_depth(self) -> Interval:
        """kappa of up to 8 stretches of the depth, averaged over members.

        The interval takes the stretches for independent, which is so for noise only; it says how much
        kappa varies along the depth, also of a single network.
        """
        count = min(STRETCHES, len(self.fractions))
        stretches = np.array_split(self.distances, count, axis=1)
        return mean_interval(
            [kappas(self.epsilons, _over_fractions(part)).mean() for part in stretches]
        )


def _over_fractions(distances: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(distances).mean(1)).T


def kappas(epsilons: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """(P,): kappa of each curve d(eps), (P, K), by least squares through the logarithms."""
    return np.array([1 - power_law(epsilons, curve[None]).value for curve in curves])


def feature_diversity(
    stream: Stream | Tensor,
    *,
    epsilons: np.ndarray | None = None,
    fractions: np.ndarray | None = None,
) -> FeatureDiversity:
    """Measure the feature diversity exponent of a residual stream (claims 7.4 and 7.5, Figs 17 to 19).

    Args:
        stream: a Stream, or x itself, (L + 1, B, n) or (L + 1, P, B, n).
        epsilons: two different numbers in (0, 1) at least, each rounded to a multiple of 1/L; None means
            1/16, 1/32, ... down to 1/256, or to 1/L where that is more.
        fractions: where steps start, from 0 to 1 - max(epsilons), each rounded to a multiple of 1/L;
            None means every layer.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    x = _stream(stream)
    depth = len(x) - 1
    if epsilons is None:
        epsilons = dyadic(depth)
    steps = _layers("epsilons", epsilons, depth, least=1, most=depth)
    if len(steps) < 2:
        raise ValueError(f"epsilons must be two different multiples of 1/{depth}, got {epsilons}")
    last = depth - steps[-1]
    if fractions is None:
        fractions = np.arange(last + 1) / depth
    starts = _layers("fractions", fractions, depth, least=0, most=last)
    squares = [
        (x[starts + step] - x[starts]).double().square().mean((-2, -1)).reshape(len(starts), -1)
        for step in steps
    ]
    return FeatureDiversity(
        epsilons=np.array(steps) / depth,
        fractions=np.array(starts) / depth,
        distances=torch.stack(squares).sqrt().cpu().numpy(),
    )


def dyadic(depth: int) -> np.ndarray:
    """The default values of eps at a depth of 32 or more: powers of 2 that hold a layer at least."""
    octaves = int(math.log2(min(COARSEST / FINEST, max(depth * COARSEST, 1))))
    if octaves < 1:
        raise ValueError(
            f"epsilons must be given for a stream of fewer than 32 blocks, got {depth}"
        )
    return COARSEST * 2.0 ** -np.arange(octaves, -1, -1)


def quadratic_variation(stream: Stream | Tensor) -> Tensor:
    """sum over l of ||x^l - x^(l-1)||^2 / n, mean over inputs: (*P), for x (L + 1, *P, B, n).

    It keeps its size in deeper networks if layers are diverse, and falls as L^(1 - 2 alpha) if not.
    """
    return _stream(stream).diff(dim=0).square().mean((-2, -1)).sum(0)


@dataclass(frozen=True)
class Neighbors:
    """cosines: float64 (L - 1, P), between layers l and l + 1; NaN where one of them is zero."""

    cosines: np.ndarray

    @property
    def members(self) -> np.ndarray:
        """(P,), the mean over layers."""
        return self.cosines.mean(0)

    @property
    def mean(self) -> Interval:
        """The mean over members, which are independent; of a single network, without bounds."""
        return mean_interval(self.members)


def gradient_diversity(stream: Stream) -> Neighbors:
    """The correlation over coordinates of dh^l and dh^(l+1), mean over inputs.

    dh^l = phi'(h^l) o MS(dx^l) enters the gradient of W^l.  At initialization, for n and L large, the
    correlation is `expected_gradient_correlation`.

    Args:
        stream: of a ResNet, with gradients: residual_stream(model, inputs, loss).

    Raises:
        ValueError: the stream has no dh, or fewer than two blocks.
    """
    if stream.dh is None:
        raise ValueError(
            "stream must hold dh: make it of a ResNet by residual_stream(model, inputs, loss)"
        )
    cosines = _cosines("stream", stream.dh).mean(-1)
    return Neighbors(cosines.reshape(len(cosines), -1).cpu().numpy())


def update_diversity(updates: Tensor) -> Neighbors:
    """The cosine of neighboring layers' updates W_t^l - W_0^l, or of their gradients.

    Args:
        updates: (L, n, n) or (P, L, n, n), such as model.blocks.weight - its copy before training.

    Raises:
        ValueError: `updates` has another shape, or fewer than two layers.
    """
    if updates.ndim not in (3, 4):
        raise ValueError(f"updates must be (L, n, n) or (P, L, n, n), got {tuple(updates.shape)}")
    cosines = _cosines("updates", updates.detach().movedim(-3, 0).flatten(-2))
    return Neighbors(cosines.reshape(len(cosines), -1).cpu().numpy())


def expected_gradient_correlation(activation: str | tuple[float, float]) -> float:
    """(E phi')^2 / E phi'^2 = (p - q)^2 / (2 (p^2 + q^2)): identity 1, relu 1/2, abs 0."""
    p, q = slopes(activation)
    return (p - q) ** 2 / (2 * (p**2 + q**2))


def _cosines(argument: str, layers: Tensor) -> Tensor:
    """(L, ..., n) -> (L - 1, ...)."""
    if len(layers) < 2:
        raise ValueError(f"{argument} must have two blocks at least, got {len(layers)}")
    directions = layers.double()
    directions = directions / directions.norm(dim=-1, keepdim=True)
    return (directions[:-1] * directions[1:]).sum(-1)


def _stream(stream: Stream | Tensor) -> Tensor:
    x = stream.x if isinstance(stream, Stream) else stream
    if not isinstance(x, Tensor):
        raise TypeError(f"stream must be a Stream or a tensor, got {type(x).__name__}")
    if x.ndim not in (3, 4) or len(x) < 2:
        raise ValueError(
            f"stream must be (L + 1, B, n) or (L + 1, P, B, n) with L of 1 or more, got {tuple(x.shape)}"
        )
    return x.detach()


def _layers(argument: str, parts, depth: int, least: int, most: int) -> np.ndarray:
    """Parts of the depth as numbers of layers, ascending, each once."""
    parts = np.asarray(parts, np.float64)
    if parts.ndim != 1 or not len(parts) or not np.isfinite(parts).all():
        raise ValueError(f"{argument} must be a list of finite numbers, got {parts}")
    layers = np.unique(np.rint(parts * depth).astype(int))
    if layers[0] < least or layers[-1] > most:
        raise ValueError(
            f"{argument} must be from {least / depth:g} to {most / depth:g} at depth {depth}, got {parts}"
        )
    return layers
