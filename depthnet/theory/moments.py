"""Moments of an activation under a pair of Gaussians: what a layer of infinite width does.

For (z, y) ~ N(0, [[A, B], [B, D]]), arrays of any equal shape, every method returns an array of that
shape.  Price's theorem ties them: E phi''(z) phi''(y) = d/dB E phi'(z) phi'(y), and so on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np

from depthnet._activations import slopes

Array = np.ndarray
Function = Callable[[Array], Array]


class Moments(Protocol):
    """phi^c below is phi - E phi: what mean subtraction makes of phi."""

    def second(self, A: Array, B: Array, D: Array) -> Array:
        """E phi(z) phi(y)."""

    def covariance(self, A: Array, B: Array, D: Array) -> Array:
        """Cov(phi(z), phi(y))."""

    def slope(self, A: Array, B: Array, D: Array) -> Array:
        """E phi'(z) phi'(y)."""

    def slope_covariance(self, A: Array, B: Array, D: Array) -> Array:
        """Cov(phi'(z), phi'(y))."""

    def curvature(self, A: Array, B: Array, D: Array) -> Array:
        """E phi''(z) phi''(y)."""

    def curvature_value(self, A: Array, B: Array, D: Array) -> Array:
        """E phi''(z) phi^c(y)."""

    def third_slope(self, A: Array, B: Array, D: Array) -> Array:
        """E phi'''(z) phi'(y)."""


def moments(activation: str | tuple) -> Moments:
    """The moments of an activation.

    Args:
        activation: `identity`, `relu`, `abs`, `leaky_relu`, or slopes (p, q), in closed form; or the
            smooth functions (phi, phi', phi'', phi''') of arrays, by quadrature.

    Raises:
        TypeError, ValueError: it is none of these.
    """
    if not isinstance(activation, str):
        try:
            functions = tuple(activation)
        except TypeError:
            functions = ()
        if functions and all(map(callable, functions)):
            if len(functions) != 4:
                raise ValueError(
                    f"activation must be four functions (phi, phi', phi'', phi'''), got {len(functions)}"
                )
            return Smooth(*functions)
    return Homogeneous(*slopes(activation))


class Homogeneous:
    """phi(h) = p max(h, 0) + q max(-h, 0) = even |h| + odd h, in closed form (arc-cosine kernels)."""

    def __init__(self, p: float, q: float):
        self.even, self.odd = (p + q) / 2, (p - q) / 2

    def second(self, A, B, D):
        return self.even**2 * self._absolute(A, B, D, 0.0) + self.odd**2 * B

    def covariance(self, A, B, D):
        return self.even**2 * self._absolute(A, B, D, 1.0) + self.odd**2 * B

    def slope(self, A, B, D):
        return self.slope_covariance(A, B, D) + self.odd**2

    def slope_covariance(self, A, B, D):
        return self.even**2 * (2 / np.pi) * np.arcsin(_correlation(A, B, D))

    def curvature(self, A, B, D):
        """0 where z and y are multiples of each other, and the density of both at 0 is infinite: there
        it only ever multiplies a difference of the two that is 0."""
        root = np.sqrt(np.maximum(A * D - B * B, 0.0))
        apart = root > 1e-6 * np.sqrt(A * D)
        return (
            self.even**2 * (2 / np.pi) * np.divide(1.0, root, out=np.zeros_like(root), where=apart)
        )

    def curvature_value(self, A, B, D):
        left = np.sqrt(np.maximum(D - _ratio(B * B, A), 0.0)) - np.sqrt(D)  # of y, given z = 0
        return self.even**2 * (2 / np.pi) * _ratio(left, np.sqrt(A))

    def third_slope(self, A, B, D):
        return -_ratio(B, A) * self.curvature(A, B, D)

    def _absolute(self, A, B, D, mean):
        """E |z| |y|, less E |z| E |y| if `mean` is 1."""
        r = _correlation(A, B, D)
        return (2 / np.pi) * np.sqrt(A * D) * (np.sqrt(1 - r * r) + r * np.arcsin(r) - mean)


def _ratio(a, b):
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)


def _correlation(A, B, D):
    return np.clip(_ratio(B, np.sqrt(np.asarray(A) * D)), -1.0, 1.0)


class Smooth:
    """phi with three derivatives, as functions of arrays, by the trapezoidal rule in two dimensions.

    For analytic functions under a Gaussian that rule converges exponentially, where Gauss-Hermite's
    points are too far apart for an activation steep beside the variance: with steps of 1/5 standard
    deviation its error is about exp(-10 pi r / sd), r being how far from the real line phi is analytic
    (pi/2 for tanh).
    """

    def __init__(self, phi: Function, first: Function, second: Function, third: Function):
        self.functions = phi, first, second, third
        points = np.arange(-36, 37) / 5
        weights = np.exp(-(points**2) / 2)
        weights /= weights.sum()
        self.u, self.v = (grid.ravel() for grid in np.meshgrid(points, points, indexing="ij"))
        self.weights = np.outer(weights, weights).ravel()

    def second(self, A, B, D):
        return self._product(0, 0, A, B, D)

    def covariance(self, A, B, D):
        return self._product(0, 0, A, B, D, centred=True)

    def slope(self, A, B, D):
        return self._product(1, 1, A, B, D)

    def slope_covariance(self, A, B, D):
        return self._product(1, 1, A, B, D, centred=True)

    def curvature(self, A, B, D):
        return self._product(2, 2, A, B, D)

    def curvature_value(self, A, B, D):
        return self._product(2, 0, A, B, D, centred=True)

    def third_slope(self, A, B, D):
        return self._product(3, 1, A, B, D)

    def _product(self, i, j, A, B, D, centred=False):
        """E f_i(z) f_j(y), f_i the i-th derivative; with `centred`, less the product of the means."""
        A, B, D = (np.asarray(a, float)[..., None] for a in np.broadcast_arrays(A, B, D))
        z = np.sqrt(A) * self.u
        rest = np.sqrt(np.maximum(D - _ratio(B * B, A), 0.0))
        y = _ratio(B, np.sqrt(A)) * self.u + rest * self.v
        first, second = self.functions[i](z), self.functions[j](y)
        if centred:
            first = first - (first @ self.weights)[..., None]
        return (first * second) @ self.weights
