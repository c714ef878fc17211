"""Curves of loss against learning rate: slices of training, bowls fitted to them, and their noise.

Losses are compared by ratios: a bowl is fitted to the logarithm of the loss, and what a learning rate
costs is a part of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAMPLES = 1000  # curves drawn for an interval
# Of one seed's slice: losses of neighboring steps are not independent, those of blocks nearly are.
BLOCKS = 10
BAND = 0.12  # a bowl is fitted to what is within this part of the lowest loss
SKEW = 0.9  # of a bowl, an octave; seen at the base depth of `depthnet transfer`
SKEWS = (0.0, 0.3, 0.6, 0.9, 1.2)
# The optimum of depth L nears its limit as L^-p. What a network of depth L lacks to its limit falls so:
# with p = 1/4 what kinks of the activation add to a block's change under Depth-muP, with 1/2 the changes
# of blocks beside their weights, with 1 the error of L steps of the limit's equation. The middle one is
# taken, and an interval must hold what the others say.
EXPONENT = 0.5
EXPONENTS = (0.25, 0.5, 1.0)


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

    Seeds that are known at some points only play no part where others are known at all: they would
    shift some points against the others, and with a single one elsewhere nothing tells by how much.

    Args:
        losses: (..., seeds, G, steps), of one slice: infinite if training diverged, NaN if not known.

    Returns:
        float64 (1 + samples, ..., G), the mean over the seeds first; infinite where a loss of any is, NaN
        where none is known.
    """
    diverged = np.isinf(losses).any((-3, -1))
    whole = ~np.isnan(losses).any((*range(losses.ndim - 3), -2, -1))
    if whole.any():
        losses = losses[..., whole, :, :]
    each = _means(losses)
    mean, _ = _center(each)
    if losses.shape[-3] == 1:
        blocks = np.array_split(losses, min(BLOCKS, losses.shape[-1]), -1)
        each = np.concatenate([_means(block) for block in blocks], -2)
    center, count = _center(each)
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.nan_to_num(each / center - 1) / np.sqrt(count * np.maximum(count - 1, 1))
    weights = np.concatenate(
        [np.zeros((1, each.shape[-2])), _weights(each.shape[-2], samples, seed)]
    )
    spread = np.tensordot(weights, error, (1, -2))
    # Two seeds draw factors beyond what a float holds.
    return np.where(diverged, np.inf, mean[..., 0, :] * np.exp(np.clip(spread, -50, 50)))


def _means(losses: np.ndarray) -> np.ndarray:
    """Over steps (..., steps); 1 where training diverged, NaN where a loss is not known."""
    return np.where(np.isinf(losses), 1.0, losses).mean(-1, dtype=np.float64)


def _center(each: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The mean over the known of (..., seeds, G), and how many they are; (..., 1, G)."""
    count = (~np.isnan(each)).sum(-2, keepdims=True)
    with np.errstate(invalid="ignore"):
        return np.nansum(each, -2, keepdims=True) / count, count


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

    The log of the loss at u, log2 of the learning rate, is c0 + c1 u + c2 (exp(s u) - 1 - s u) / s^2: the
    least-squares fit to all points around the lowest one of the first curve that are within BAND of it,
    and at least one on either side.  Loss grows linearly where networks learn too slowly and
    exponentially where they are about to diverge.  The skew s is SKEW, or of five points or more that of
    SKEWS that fits best; 0 makes a parabola.  Elsewhere the curve is a line from point to point.

    Attributes:
        optimum: (D,), where each curve is least within the points fitted; NaN if no loss is finite.
        best: (D,), the loss there; infinite if none is finite.
        at_edge: whether the first curve's lowest point is the first or last one known.
    """

    optimum: np.ndarray
    best: np.ndarray
    at_edge: bool
    _log2_lr: np.ndarray  # (G,), known points
    _logs: np.ndarray  # (D, G), of the losses there
    _ends: tuple[float, float]  # of the points fitted
    _skew: np.ndarray  # (D,)
    _coefficients: np.ndarray  # (3, D), with u counted from the first end

    def loss(self, log2_lr: np.ndarray | float) -> np.ndarray:
        """(D,), of each curve at its own place (D,), or at one; infinite beside a point that diverged,
        NaN outside what was measured."""
        at = np.broadcast_to(np.asarray(log2_lr, float), self.optimum.shape)
        inside = (at >= self._ends[0]) & (at <= self._ends[1])
        fitted = (_basis(at - self._ends[0], self._skew).T * self._coefficients).sum(0)
        return np.exp(np.where(inside, fitted, self._line(at)))

    def _line(self, at: np.ndarray) -> np.ndarray:
        """Logs of losses, linear from point to point."""
        grid, logs = self._log2_lr, self._logs
        before = np.clip(np.searchsorted(grid, at, "right") - 1, 0, len(grid) - 1)
        after = np.minimum(before + 1, len(grid) - 1)
        rows = np.arange(len(at))
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.where(
                at == grid[before], 0.0, (at - grid[before]) / (grid[after] - grid[before])
            )
            rise = np.where(part == 0, 0.0, part * (logs[rows, after] - logs[rows, before]))
            line = np.where(np.isinf(logs[rows, before]), np.inf, logs[rows, before] + rise)
        return np.where((at >= grid[0]) & (at <= grid[-1]), line, np.nan)


def bowl(log2_lr: np.ndarray, curves: np.ndarray) -> Bowl:
    """The bowls of curves whose points are the same.

    Args:
        log2_lr: (G,), ascending. curves: (D, G), losses of drawn_curves: infinite where training diverged,
            NaN where nothing is known, which is as if the grid had no such point.
    """
    known = ~np.isnan(curves[0])
    grid, logs = np.asarray(log2_lr, float)[known], np.log(curves[:, known])
    if not np.isfinite(logs[:1]).any():
        lost = np.full(len(curves), np.nan)
        infinite = np.full(len(curves), np.inf)
        return Bowl(lost, infinite, False, grid, logs, (0.0, 0.0), lost, np.tile(lost, (3, 1)))
    lowest = int(logs[0].argmin())
    low, high = _fitted(logs[0], lowest)
    x, y = grid[low : high + 1] - grid[low], logs[:, low : high + 1]
    fits = [_least_squares(x, y, skew) for skew in (SKEWS if len(x) > 4 else (SKEW,))]
    # Each curve has the skew that fits it best: how far noise decides that is part of the intervals.
    chosen = np.argmin([error for error, _ in fits], 0)
    rows = np.arange(len(curves))
    coefficients = np.stack([found for _, found in fits])[chosen, :, rows].T
    skew = np.array(SKEWS if len(x) > 4 else (SKEW,))[chosen]
    optimum = grid[low] + _vertex(coefficients, skew, x[-1])
    ends = (grid[low], grid[high])
    edge = lowest in (0, len(grid) - 1)
    found = Bowl(optimum, optimum.copy(), edge, grid, logs, ends, skew, coefficients)
    found.best[:] = found.loss(optimum)
    return found


def _basis(u: np.ndarray, skew: np.ndarray | float) -> np.ndarray:
    """(..., 3): the functions that a bowl is a sum of."""
    with np.errstate(invalid="ignore", divide="ignore"):
        bend = (np.exp(skew * u) - 1 - skew * u) / np.square(skew)
    return np.stack([np.ones_like(u), u, np.where(np.equal(skew, 0), u * u / 2, bend)], -1)


def _least_squares(x: np.ndarray, y: np.ndarray, skew: float) -> tuple[np.ndarray, np.ndarray]:
    """The errors (D,) and the coefficients (3, D) of the fits to all curves."""
    basis = _basis(x, skew)[:, : len(x)]
    found = np.zeros((3, len(y)))
    found[: basis.shape[1]] = np.linalg.lstsq(basis, y.T, rcond=None)[0]
    return ((basis @ found[: basis.shape[1]] - y.T) ** 2).sum(0), found


def _vertex(coefficients: np.ndarray, skew: np.ndarray, high: float) -> np.ndarray:
    """(D,): where bowls are least from 0 to high."""
    _, slope, bend = coefficients
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = -slope / bend
        vertex = np.where(skew == 0, ratio, np.log1p(np.maximum(skew * ratio, -1.0)) / skew)
    end = _basis(np.full_like(skew, high), skew)[:, 1:]
    falls = (
        slope * end[:, 0] + bend * end[:, 1] < 0
    )  # from one end to the other, where it bends down
    return np.clip(np.where(bend > 0, vertex, np.where(falls, high, 0.0)), 0.0, high)


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


def extrapolated(
    depths: Sequence[int], optima: np.ndarray, target: int
) -> tuple[float, float, float]:
    """The optimum at another depth and its 95 % interval, by least squares: x(L) = a + b L^-p.

    The value is that of the first curves with p = EXPONENT.  The interval is the least that holds those of
    all EXPONENTS, each of the fits to the curves drawn, and the value.

    Args:
        depths: (K,), three different ones at least. optima: (K, 1 + D), log2 of the learning rate, of the
            curves of drawn_curves; the draws of all depths must be the same.

    Returns:
        value, low, high; NaN if an optimum of the first curves is.
    """
    value, ends = math.nan, []
    for p in EXPONENTS:
        basis = np.stack([np.ones(len(depths)), np.asarray(depths, float) ** -p], -1)
        fits = np.array([1.0, target**-p]) @ np.linalg.pinv(basis) @ optima
        if p == EXPONENT:
            value = float(fits[0])
        ends += interval(fits[1:])
    return value, min(value, *ends), max(value, *ends)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of samples that are not NaN; NaN if none is."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975], method="inverted_cdf")  # infinities stay such
    return float(low), float(high)
