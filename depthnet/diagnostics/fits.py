"""Power laws fitted to measurements, with their uncertainty."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from depthnet._checks import optional_import


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided 95 % confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


def standard_error(samples: np.ndarray, axis: int = 0) -> np.ndarray:
    """Of the mean of independent samples along an axis, two of them at least."""
    return np.std(samples, axis, ddof=1) / np.shape(samples)[axis] ** 0.5


def mean_interval(samples: np.ndarray) -> Interval:
    """The mean of independent samples, with Student's interval; of one sample, an infinite one."""
    samples = np.asarray(samples, np.float64)
    mean, n = float(samples.mean()), len(samples)
    if n == 1 or not math.isfinite(mean):
        return Interval(mean, -math.inf, math.inf)
    stats = optional_import("scipy.stats", "stats", "a confidence interval")
    half = float(stats.t.ppf(0.975, n - 1) * standard_error(samples))
    return Interval(mean, mean - half, mean + half)


def power_law(sizes: np.ndarray, values: np.ndarray) -> Interval:
    """The exponent e of values ∝ sizes^e.

    It is the mean over seeds of the slopes of least-squares lines through the logarithms, and the
    interval is over seeds: what bends the curve does not widen it.

    Args:
        sizes: (K,), positive, two different ones at least. values: (seeds, K), positive.
    """
    x = np.log(np.asarray(sizes, np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        y = np.log(np.asarray(values, np.float64))
    x = x - x.mean()
    return mean_interval(y @ x / (x @ x))
