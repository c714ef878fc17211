"""Curves of loss against learning rate: slices of training, bowls fitted to them, and their noise.

Losses are compared by ratios: a bowl is fitted to the logarithm of the loss, and what a learning rate
costs is a part of the loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SAMPLES = 1000  # curves drawn for an interval
# Of one seed's slice: losses of neighboring steps are not independent, those of blocks nearly are.
BLOCKS = 10
BAND = 0.2  # a bowl is fitted to what is within this part of the lowest loss
FINE = 64  # places an octave where a bowl is evaluated


@dataclass(frozen=True)
class Slice:
    """Training steps start .. end-1, whose losses are averaged."""

    name: str
    start: int
    end: int


def slices(steps: int) -> list[Slice]:
    half, fifth = steps // 2, steps - steps // 5
    return [
        Slice("first half", 0, half),
        Slice("second half", half, steps),
        Slice("last fifth", fifth, steps),
    ]


def slice_losses(losses: np.ndarray, part: Slice) -> np.ndarray:
    """Mean loss of each member over a slice; infinite if any loss in it, or before it, is not finite."""
    mean = losses[part.start : part.end].mean(0, dtype=np.float64)
    return np.where(np.isfinite(losses[: part.end]).all(0), mean, np.inf)


def final_loss(losses: np.ndarray) -> float:
    """What a trial is judged by: its mean loss over the last slice; infinite if it diverged."""
    return float(slice_losses(losses[:, None], slices(len(losses))[-1])[0])


def drawn_curves(losses: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """The mean curve, then curves that it might as well have been.

    They are spread around the mean as Student's t tells of as many seeds as there are, so that an
    interval of them is honest with two seeds, and wide.  Of a single seed blocks of steps take the
    seeds' place.  A draw weighs the seeds alike for every network and learning rate, as members of a
    seed see the same batches: what they have in common cancels in differences.  Calls with the same seed
    and as many seeds draw the same, too.

    Args:
        losses: (..., seeds, G, steps), of one slice: infinite if training diverged, NaN if not known.

    Returns:
        float64 (1 + samples, ..., G), the mean over the known seeds first; infinite where a loss of any
        seed is, NaN where none is known.
    """
    known = ~np.isnan(losses).any(-1)
    diverged = np.isinf(losses).any((-3, -1))
    each = np.where(np.isfinite(losses), losses, 1.0).mean(-1, dtype=np.float64)
    single = losses.shape[-3] == 1
    if single:
        blocks = np.array_split(losses, min(BLOCKS, losses.shape[-1]), -1)
        parts = np.concatenate([block.mean(-1, dtype=np.float64) for block in blocks], -2)
        each, known = np.where(np.isfinite(parts), parts, 1.0), np.repeat(known, len(blocks), -2)
    count = known.sum(-2, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (each * known).sum(-2, keepdims=True) / count
        error = np.where(known, each / mean - 1, 0.0) / np.sqrt(count * np.maximum(count - 1, 1))
    weights = _weights(each.shape[-2], samples, seed)
    spread = np.tensordot(weights, error, (1, -2)).reshape(samples, *mean[..., 0, :].shape)
    drawn = mean[..., 0, :] * np.exp(np.concatenate([np.zeros_like(spread[:1]), spread]))
    return np.where(diverged, np.inf, drawn)


def _weights(count: int, samples: int, seed: int) -> np.ndarray:
    """(samples, count), such that sums of independent deviations from their mean follow Student's t."""
    generator = np.random.default_rng(seed)
    normal = generator.standard_normal((samples, count))
    freedom = max(count - 1, 1)
    return normal * np.sqrt(freedom / generator.chisquare(freedom, (samples, 1)))


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve: where (log2 of the learning rate), and whether the lowest point is the
    first or last one measured, so that the minimum may lie beyond it."""

    log2_lr: float
    at_edge: bool


@dataclass(frozen=True, eq=False)
class Bowl:
    """What a curve is near its minimum, and each of the curves drawn with it.

    The log of the loss against log2 of the learning rate, as the least-squares polynomial through all points
    around the lowest one of the first curve that are within BAND of it, and at least one on either side:
    of degree 2 through three points, 3 through four or five, 4 through more.  Bowls are steeper where
    training is about to diverge; on a curve in quarter octaves, whole ones that start anywhere give its
    minimum within 0.06 octaves so, and 0.4 by a parabola.  Elsewhere it is a line from point to point.

    Attributes:
        optimum: (D,), where each curve is least within the points fitted; NaN if no loss is finite.
        best: (D,), the loss there; infinite if none is finite.
        at_edge: whether the first curve's lowest point is the first or last one known.
    """

    optimum: np.ndarray
    best: np.ndarray
    at_edge: bool
    _log2_lr: np.ndarray  # (G,), known points
    _curves: np.ndarray  # (D, G), logs of their losses
    _low: float
    _high: float
    _polynomials: np.ndarray  # (degree + 1, D), powers of log2_lr - _low

    def loss(self, log2_lr: np.ndarray | float) -> np.ndarray:
        """(D,), of each curve at its own place (D,), or at one; infinite beside a point that diverged,
        NaN outside what was measured."""
        at = np.broadcast_to(np.asarray(log2_lr, float), self.optimum.shape)
        inside = (at >= self._low) & (at <= self._high)
        found = np.where(inside, self._polynomial(at), self._line(at))
        return np.exp(found)

    def _polynomial(self, at: np.ndarray) -> np.ndarray:
        return np.polynomial.polynomial.polyval(at - self._low, self._polynomials, tensor=False)

    def _line(self, at: np.ndarray) -> np.ndarray:
        grid = self._log2_lr
        after = np.clip(np.searchsorted(grid, at), 1, max(len(grid) - 1, 1))
        if len(grid) == 1:
            return np.where(at == grid[0], self._curves[:, 0], np.nan)
        rows = np.arange(len(at))
        left, right = self._curves[rows, after - 1], self._curves[rows, after]
        part = (at - grid[after - 1]) / (grid[after] - grid[after - 1])
        with np.errstate(invalid="ignore"):
            line = np.where(part == 0, left, np.where(part == 1, right, left + part * (right - left)))
        line = np.where((0 < part) & (part < 1) & (np.isinf(left) | np.isinf(right)), np.inf, line)
        return np.where((at < grid[0]) | (at > grid[-1]), np.nan, line)


def bowl(log2_lr: np.ndarray, curves: np.ndarray) -> Bowl:
    """The bowls of curves whose points are the same.

    Args:
        log2_lr: (G,), ascending. curves: (D, G), losses of drawn_curves: infinite where training diverged,
            NaN where nothing is known, which is as if the grid had no such point.
    """
    known = ~np.isnan(curves[0])
    grid, logs = np.asarray(log2_lr, float)[known], np.log(curves[:, known])
    finite = np.isfinite(logs[0])
    if not finite.any():
        lost = np.full(len(curves), np.nan)
        return Bowl(lost, np.full(len(curves), np.inf), False, grid, logs, 0.0, -1.0, lost[None])
    lowest = int(logs[0].argmin())
    low, high = _fitted(logs[0], lowest)
    x, y = grid[low : high + 1] - grid[low], logs[:, low : high + 1]
    degree = min(len(x) - 1, 3 if len(x) < 6 else 4)
    polynomials = np.linalg.lstsq(np.vander(x, degree + 1, increasing=True), y.T, rcond=None)[0]
    found = Bowl(
        *(np.full(len(curves), np.nan) for _ in range(2)),
        lowest in (0, len(grid) - 1),
        grid,
        logs,
        grid[low],
        grid[high],
        polynomials,
    )
    fine = np.linspace(grid[low], grid[high], 1 + round(FINE * (grid[high] - grid[low])))
    values = np.polynomial.polynomial.polyval(fine - grid[low], polynomials)  # (D, places)
    at = values.argmin(-1)
    optimum = _vertex(fine, values, at)
    found.optimum[:] = optimum
    found.best[:] = np.exp(found._polynomial(optimum))
    return found


def _fitted(logs: np.ndarray, lowest: int) -> tuple[int, int]:
    """The first and last of the neighbors of the lowest point that a bowl is fitted to."""
    ends = []
    for step in (-1, 1):
        end = lowest
        while 0 <= end + step < len(logs) and np.isfinite(logs[end + step]):
            near = logs[end + step] <= logs[lowest] + math.log1p(BAND)
            if end != lowest and not near:
                break
            end += step
        ends.append(end)
    return ends[0], ends[1]


def _vertex(fine: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The vertex of the parabola through the lowest of equidistant points and its neighbors."""
    if len(fine) < 3:
        return fine[at]
    middle = np.clip(at, 1, len(fine) - 2)
    rows, step = np.arange(len(at)), fine[1] - fine[0]
    before, here, after = (values[rows, middle + shift] for shift in (-1, 0, 1))
    bend = before - 2 * here + after
    with np.errstate(invalid="ignore", divide="ignore"):
        vertex = fine[middle] + step * (before - after) / (2 * bend)
    return np.where((middle == at) & (bend > 0), vertex, fine[at])


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of samples that are not NaN; NaN if none is."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975], method="inverted_cdf")  # infinities stay such
    return float(low), float(high)
