"""What the curves of a depth-transfer study say: optima, shifts, regret, verdicts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from depthnet.scaling import Parametrization
from depthnet.sweep.transfer import JobResult, TransferSettings

# A parametrization transfers if its optimum moves by at most a quarter octave per doubling of depth (half
# of what an exponent of the learning rate that is wrong by 1/2 makes), and if the learning rate tuned
# at the base depth costs at most one percent of the loss at every other depth.
DRIFT_LIMIT = 0.25
REGRET_LIMIT = 0.01


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


@dataclass(frozen=True)
class Optimum:
    """The minimum of a curve: where (log2 of the learning rate), and whether the lowest point is the
    first or last of the grid, so that the minimum may lie beyond it."""

    log2_lr: float
    at_edge: bool


def optimum(log2_lr: np.ndarray, losses: np.ndarray) -> Optimum:
    """The minimum of the parabola through the three lowest points of a curve on an even grid.

    It is kept within half a grid step of the lowest point, where it always is if that point lies between
    the other two.  At the edge of the grid, or without three finite losses that bend upwards, it is
    the lowest point itself.  NaN if no loss is finite.
    """
    order = np.argsort(losses, kind="stable")
    lowest = order[0]
    if not np.isfinite(losses[lowest]):
        return Optimum(math.nan, False)
    at_edge = bool(lowest in (0, len(losses) - 1))
    position = float(log2_lr[lowest])
    if not at_edge and np.isfinite(losses[order[2]]):
        curvature, slope, _ = np.polyfit(log2_lr[order[:3]] - position, losses[order[:3]], 2)
        half_step = (log2_lr[1] - log2_lr[0]) / 2
        if curvature > 0:
            position += float(np.clip(-slope / (2 * curvature), -half_step, half_step))
    return Optimum(position, at_edge)


def rows(results: list[JobResult], settings: TransferSettings) -> list[dict]:
    """One row a run and slice, for results.csv."""
    return [
        {
            "parametrization": result.job.parametrization.name,
            "alpha": result.job.parametrization.alpha,
            "gamma": result.job.parametrization.gamma,
            "activation": settings.activation,
            "width": settings.width,
            "depth": result.job.depth,
            "log2_lr": float(result.job.log2_lr[member]),
            "seed": int(result.job.seed[member]),
            "step_from": part.start,
            "step_to": part.end,
            "loss": float(loss),
            "diverged": int(not math.isfinite(loss)),
        }
        for result in results
        for part in slices(settings.steps)
        for member, loss in enumerate(slice_losses(result.losses, part))
    ]


def by_parametrization(results: list[JobResult]) -> dict[Parametrization, list[JobResult]]:
    """The results of each parametrization, in order."""
    groups: dict[Parametrization, list[JobResult]] = {}
    for result in results:
        groups.setdefault(result.job.parametrization, []).append(result)
    return groups


@dataclass(frozen=True)
class Curve:
    """Loss against learning rate at one depth, over one slice of training.

    losses: (seeds, grid); mean: over the seeds, infinite where any diverged.
    optimum: of the mean curve; spread: standard deviation of the seeds' own optima (NaN for one seed).
    best: the mean curve's lowest loss on the grid.
    regret: loss at the grid's best learning rate of the base depth, less `best`.
    """

    depth: int
    losses: np.ndarray
    mean: np.ndarray
    optimum: Optimum
    spread: float
    best: float
    regret: float


def curves(results: list[JobResult], settings: TransferSettings, part: Slice) -> list[Curve]:
    """The curves of one parametrization, one for each depth."""
    by_depth = {
        result.job.depth: slice_losses(result.losses, part).reshape(settings.seeds, -1)
        for result in results
    }
    tuned = int(np.argmin(by_depth[settings.base_depth].mean(0)))
    found = []
    for depth, losses in by_depth.items():
        mean = losses.mean(0)
        optima = [optimum(settings.grid, one).log2_lr for one in losses]
        best = float(mean.min())
        regret = float(mean[tuned]) - best if math.isfinite(best) else math.inf
        spread = float(np.std(optima, ddof=1)) if len(optima) > 1 else math.nan
        found.append(Curve(depth, losses, mean, optimum(settings.grid, mean), spread, best, regret))
    return found


@dataclass(frozen=True)
class Verdict:
    """Whether a parametrization's learning rate transfers, over one slice of training.

    transfers: None where that is not known: the drift is within one standard error of the limit, or an
    optimum is at the edge of the grid, and nothing speaks against it.
    shift: octaves from the optimum of the base depth to that of the depth farthest from it.
    drift: octaves per doubling of depth: the slope of a least-squares line through all optima; its
    error is the standard error over seeds (NaN for one seed).
    worst_regret: the greatest regret over the depths, as a part of the best loss there.
    """

    transfers: bool | None
    shift: float
    drift: float
    drift_error: float
    worst_regret: float
    words: str


def _slope(depths: list[int], optima: list[float]) -> float:
    known = [
        (math.log2(depth), x) for depth, x in zip(depths, optima, strict=True) if math.isfinite(x)
    ]
    return float(np.polyfit(*zip(*known, strict=True), 1)[0]) if len(known) > 1 else math.nan


def verdict(found: list[Curve], settings: TransferSettings) -> Verdict:
    depths, base = [curve.depth for curve in found], settings.base_depth
    farthest = max(depths, key=lambda depth: abs(math.log(depth / base)))
    at = {curve.depth: curve.optimum.log2_lr for curve in found}
    shift, drift = at[farthest] - at[base], _slope(depths, list(at.values()))
    by_seed = [
        _slope(depths, [optimum(settings.grid, curve.losses[seed]).log2_lr for curve in found])
        for seed in range(settings.seeds)
    ]
    error = float(np.std(by_seed, ddof=1)) / len(by_seed) ** 0.5 if len(by_seed) > 1 else math.nan
    relative = {curve.depth: _relative(curve.regret, curve.best) for curve in found}
    worst = max(relative, key=relative.get)
    lost = [curve.depth for curve in found if not math.isfinite(curve.best)]
    at_edge = [curve.depth for curve in found if curve.optimum.at_edge]

    near = abs(abs(drift) - DRIFT_LIMIT) <= (0.0 if math.isnan(error) else error)
    transfers: bool | None
    if lost or relative[worst] > REGRET_LIMIT or (abs(drift) > DRIFT_LIMIT and not near):
        transfers, answer = False, "does not transfer"
    elif near or at_edge or len(found) == 1:
        transfers, answer = None, "undecided"
    else:
        transfers, answer = True, "transfers"

    words = []
    if len(found) == 1:
        words.append("one depth says nothing of transfer")
    elif math.isfinite(shift):
        plus_minus = "" if math.isnan(error) else f" ± {error:.2f}"
        words.append(
            f"the optimum moves by {shift:+.2f} octaves from depth {base} to {farthest} "
            f"({drift:+.2f}{plus_minus} per doubling of depth)"
        )
    if lost:
        words.append(f"every learning rate diverges at depth {', '.join(map(str, lost))}")
    elif math.isinf(relative[worst]):
        words.append(f"the learning rate tuned at depth {base} diverges at depth {worst}")
    elif len(found) > 1:
        words.append(
            f"the learning rate tuned at depth {base} costs at most {100 * relative[worst]:.1f} % of "
            f"the loss (at depth {worst})"
        )
    if at_edge:
        words.append(
            f"at depth {', '.join(map(str, at_edge))} the lowest point is at the edge of the grid and "
            "the optimum may lie beyond"
        )
    text = f"{answer}: {'; '.join(words)}"
    return Verdict(transfers, shift, drift, error, relative[worst], text)


def _relative(regret: float, best: float) -> float:
    """Regret as a part of the best loss: infinite where everything diverged, 0 of nothing is 0."""
    if not math.isfinite(best):
        return math.inf
    return regret / best if regret else 0.0


def summarise(results: list[JobResult], settings: TransferSettings) -> dict:
    """summary.json: for each parametrization and slice the verdict and a record for each depth."""
    summary = {}
    for parametrization, own in by_parametrization(results).items():
        record = {"alpha": parametrization.alpha, "gamma": parametrization.gamma, "slices": {}}
        summary[parametrization.name] = record
        for part in slices(settings.steps):
            found = curves(own, settings, part)
            judged = verdict(found, settings)
            record["slices"][part.name] = {
                "steps": [part.start, part.end],
                "transfers": judged.transfers,
                "verdict": judged.words,
                "shift_octaves": judged.shift,
                "drift_octaves_per_doubling": judged.drift,
                "drift_standard_error": judged.drift_error,
                "worst_relative_regret": judged.worst_regret,
                "depths": {
                    str(curve.depth): {
                        "optimum_log2_lr": curve.optimum.log2_lr,
                        "at_edge": curve.optimum.at_edge,
                        "spread": curve.spread,
                        "best_loss": curve.best,
                        "regret": curve.regret,
                    }
                    for curve in found
                },
            }
    return summary
