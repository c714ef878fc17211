"""Curves of loss against learning rate: slices of training, minima, and curves drawn anew."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SAMPLES = 1000  # curves drawn for an interval
# Of a slice's steps: losses of neighboring steps are not independent, those of blocks nearly are.
BLOCKS = 10


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


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve: where (log2 of the learning rate), and whether the lowest point is the
    first or last one measured, so that the minimum may lie beyond it."""

    log2_lr: float
    at_edge: bool


def optimum(log2_lr: np.ndarray, losses: np.ndarray) -> Optimum:
    """The minimum of the parabola through the three lowest points of a curve.

    It is kept within half a grid step of the lowest point, where it always is on an even grid if that
    point lies between the other two.  At the edge of the grid, or without three finite losses that bend
    upwards, it is the lowest point itself.  NaN if no loss is finite.

    Args:
        log2_lr: (G,), ascending. losses: (G,); infinite where training diverged, NaN where it is not
            known, which is as if the grid had no such point.
    """
    known = ~np.isnan(losses)
    log2_lr, losses = np.asarray(log2_lr)[known], np.asarray(losses)[known]
    if not np.isfinite(losses).any():
        return Optimum(math.nan, False)
    return Optimum(float(minima(log2_lr, losses)), bool(losses.argmin() in (0, len(losses) - 1)))


def minima(log2_lr: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """`optimum` of curves (..., G) without NaN: positions (...)."""
    count = losses.shape[-1]
    order = np.argsort(losses, axis=-1, kind="stable")
    lowest = order[..., 0]
    position = log2_lr[lowest]
    found = np.where(np.isfinite(losses.min(-1)), position, np.nan)
    if count < 3:
        return found
    # Newton's form of the parabola through the three lowest points.
    x = np.moveaxis(log2_lr[order[..., :3]], -1, 0)
    y = np.moveaxis(np.take_along_axis(losses, order[..., :3], -1), -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        slope = (y[1] - y[0]) / (x[1] - x[0])
        curvature = ((y[2] - y[0]) / (x[2] - x[0]) - slope) / (x[2] - x[1])
        vertex = (x[0] + x[1] - slope / curvature) / 2
    inside = (lowest > 0) & (lowest < count - 1) & (curvature > 0)
    low = (position + log2_lr[np.maximum(lowest - 1, 0)]) / 2
    high = (position + log2_lr[np.minimum(lowest + 1, count - 1)]) / 2
    return np.where(inside & np.isfinite(y[2]), np.clip(vertex, low, high), found)


def bootstrap_curves(losses: np.ndarray, samples: int = SAMPLES, seed: int = 0) -> np.ndarray:
    """Mean curves with seeds and steps drawn anew, with replacement.

    A sample draws as many seeds as there are, and for each of them as many blocks of consecutive steps
    (about ten) as the slice has.  The draw is the same for every network and learning rate, as members
    of a seed see the same batches: what they have in common cancels in differences.  Calls with the
    same seed and as many seeds and steps draw the same, too.

    Args:
        losses: (..., seeds, G, steps), of one slice; steps and seeds at least 1.

    Returns:
        float64 (samples, ..., G); infinite where a loss of any seed is not finite.
    """
    return resampled(np.where(np.isfinite(losses), losses, np.inf), samples, seed)


def resampled(losses: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """`bootstrap_curves` of losses that are NaN where they are not known: a sample without any is NaN."""
    seeds, blocks = losses.shape[-3], min(BLOCKS, losses.shape[-1])
    generator = np.random.default_rng(seed)
    drawn = generator.integers(seeds, size=(samples, seeds))
    times = generator.multinomial(blocks, [1 / blocks] * blocks, size=(samples, seeds))
    weights = np.zeros((samples, seeds, blocks))
    np.add.at(weights, (np.arange(samples)[:, None], drawn), times)
    return means(losses, weights)


def means(losses: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means (samples, ..., G) over the seeds that are known and over blocks of steps.

    weights: (samples, seeds, blocks).  Where any seed is infinite, so is the mean, whatever its weight.
    """
    steps, blocks = losses.shape[-1], weights.shape[-1]
    starts = np.arange(blocks) * steps // blocks
    weights = weights * np.diff(starts, append=steps)
    known = ~np.isnan(losses).any(-1)
    diverged = np.isinf(losses).any((-3, -1))
    finite = np.where(np.isfinite(losses), losses, 0.0)
    sums = np.add.reduceat(finite, starts, -1, dtype=np.float64) / np.diff(starts, append=steps)
    sums *= known[..., None]
    total = np.einsum("zsb,...sgb->z...g", weights, sums, optimize=True)
    weight = np.einsum("zs,...sg->z...g", weights.sum(-1), known.astype(float), optimize=True)
    mean = np.divide(total, weight, out=np.full_like(total, np.nan), where=weight > 0)
    return np.where(diverged, np.inf, mean)


def interval(samples: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of samples that are not NaN; NaN if none is."""
    known = samples[~np.isnan(samples)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975], method="inverted_cdf")  # infinities stay such
    return float(low), float(high)
