"""What the curves of a sweep say: optima, shifts, regret, verdicts, and how sure they are.

A curve is the loss of one network against the learning rate, over one slice of training.  Its scale is
the network's depth, or its width in a study of several widths and one depth.  The curves of a panel
differ in scale only.  Intervals are of 95 %, from curves whose seeds and steps are drawn anew; where
seeds differ more than steps do and are few, they hold the truth less often: on parabolas of known minima,
in 74 % of the studies with two such seeds, 88 % with five, 92 % with ten.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from depthnet.scaling import Parametrization
from depthnet.sweep.optima import (
    SAMPLES,
    Optimum,
    Slice,
    interval,
    means,
    minima,
    optimum,
    resampled,
    slice_losses,
    slices,
)
from depthnet.sweep.study import Network, Range, SweepSettings, Trial

# A parametrization transfers if its optimum moves by at most a quarter octave per doubling of depth (half
# of what an exponent of the learning rate that is wrong by 1/2 makes), and if the learning rate tuned
# at the base depth costs at most one percent of the loss at every other depth.
DRIFT_LIMIT = 0.25
REGRET_LIMIT = 0.01

EDGE = 0.05  # the part of a range, at either end, whose optimum may lie beyond


class Candidate(NamedTuple):
    """A point of the grid or search, which is trained with every seed."""

    log2_lr: float
    log2_block_multiplier: float
    weight_decay: float


@dataclass(frozen=True, eq=False)
class Curve:
    """Loss of one network against the learning rate, over one slice of training.

    log2_lr: (G,), ascending: the grid, or what a search tried. mean: (G,), over the seeds, and the minimum
        over block multipliers and weight decays; infinite if any seed diverged, NaN where no trial is
        finished. band: (2, G), the mean's interval.
    optimum, interval: where the minimum is. best: the lowest mean.
    regret: mean at the base scale's best learning rate, less `best`, and relative to it; NaN where that
        learning rate was not tried.
    optima, regrets: (samples,), the optimum and the relative regret of each curve drawn.
    """

    scale: int
    network: Network
    log2_lr: np.ndarray
    mean: np.ndarray
    band: np.ndarray
    optimum: Optimum
    interval: tuple[float, float]
    best: float
    regret: float
    relative_regret: float
    optima: np.ndarray
    regrets: np.ndarray


@dataclass(frozen=True)
class Panel:
    """Networks that differ in scale only, in the order of the study's settings."""

    parametrization: Parametrization
    details: tuple[str, ...]  # what else tells it from the study's other panels
    networks: tuple[Network, ...]

    @property
    def name(self) -> str:
        return ", ".join((self.parametrization.name, *self.details))


def scale_of(settings: SweepSettings) -> str:
    """What the curves of a study differ in: depth, or width if only that has several values."""
    return "width" if len(settings.width) > 1 and len(settings.depth) == 1 else "depth"


def base_scale(settings: SweepSettings) -> int:
    """The scale that learning rates are tuned at: that of the base shape, or the next to it trained."""
    scale = scale_of(settings)
    base = getattr(settings, f"base_{scale}")
    return min(getattr(settings, scale), key=lambda size: (abs(math.log2(size / base)), size))


def panels(settings: SweepSettings) -> list[Panel]:
    scale = scale_of(settings)
    groups: dict[tuple[str, ...], list[Network]] = {}
    for network in sorted(settings.networks, key=lambda network: getattr(network, scale)):
        key = [network.parametrization]
        if len(settings.activation) > 1:
            key.append(f"φ = {network.activation}")
        if scale == "depth" and len(settings.width) > 1:
            key.append(f"width {network.width}")
        groups.setdefault(tuple(key), []).append(network)
    order = {network: index for index, network in enumerate(settings.networks)}
    found = [
        Panel(Parametrization.of(name), tuple(details), tuple(networks))
        for (name, *details), networks in groups.items()
    ]
    return sorted(found, key=lambda panel: min(order[network] for network in panel.networks))


def by_network(trials: list[Trial]) -> dict[Network, list[Trial]]:
    groups: dict[Network, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.network, []).append(trial)
    return groups


def candidate_losses(
    trials: list[Trial], settings: SweepSettings, part: Slice
) -> tuple[list[Candidate], np.ndarray]:
    """The candidates that one network's trials tried, in order of their learning rate, and the losses of
    a slice, (seeds, candidates, steps): infinite if training diverged by its end, NaN if unknown."""
    of = [Candidate(*(getattr(trial.member, key) for key in Candidate._fields)) for trial in trials]
    candidates = sorted(set(of))
    column = {candidate: index for index, candidate in enumerate(candidates)}
    losses = np.full((settings.seeds, len(candidates), part.end - part.start), np.nan, np.float32)
    for candidate, trial in zip(of, trials, strict=True):
        finite = np.isfinite(trial.losses[: part.end]).all()
        losses[trial.member.seed, column[candidate]] = (
            trial.losses[part.start : part.end] if finite else np.inf
        )
    return candidates, losses


def seed_means(losses: np.ndarray) -> np.ndarray:
    """(candidates,): over seeds and steps of (seeds, candidates, steps), as in `Curve.mean`."""
    return means(losses, np.ones((1, len(losses), 1)))[0]


def _profile(means: np.ndarray, column: np.ndarray, count: int) -> np.ndarray:
    """Of (..., candidates), the minima over those with the same learning rate, (..., count)."""
    points = [
        np.fmin.reduce(means[..., column == index], axis=-1, initial=np.nan)
        for index in range(count)
    ]
    return np.stack(points, -1)


def _at_edge(position: float, searched: Range) -> bool:
    margin = EDGE * (searched.high - searched.low)
    return bool(position <= searched.low + margin or position >= searched.high - margin)


def curves(trials: list[Trial], settings: SweepSettings, panel: Panel, part: Slice) -> list[Curve]:
    """The curves of a panel's networks that have a finished trial, in order of scale."""
    searched = isinstance(settings.log2_lr, Range)
    own, scale = by_network(trials), scale_of(settings)
    measured = {}
    for network in panel.networks:
        if network in own:
            candidates, losses = candidate_losses(own[network], settings, part)
            tried = np.array([candidate.log2_lr for candidate in candidates])
            grid = np.unique(tried) if searched else np.array(settings.log2_lr)
            # The first curve is that of the seeds and steps as they are; the others are drawn.
            means = np.concatenate([seed_means(losses)[None], resampled(losses, SAMPLES, 0)])
            column = np.abs(tried[:, None] - grid).argmin(1)
            measured[getattr(network, scale)] = network, grid, _profile(means, column, len(grid))
    tuned = None if searched else measured.get(base_scale(settings))
    found = []
    for size, (network, grid, means) in measured.items():
        lowest, best = _lowest(means)
        if searched:
            optima = np.where(np.isfinite(best), grid[lowest], np.nan)
            at_edge = _at_edge(optima[0], settings.log2_lr)
        else:
            known = ~np.isnan(means[0])
            # A point that one sample does not have is never lowest in it.
            optima = minima(grid[known], np.where(np.isnan(means), np.inf, means)[:, known])
            at_edge = optimum(grid, means[0]).at_edge
        regrets = np.full(len(means), np.nan) if tuned is None else _regrets(tuned[2], means)
        with np.errstate(invalid="ignore", divide="ignore"):
            relative = np.where(regrets == 0, 0.0, regrets / best)
        found.append(
            Curve(
                scale=size,
                network=network,
                log2_lr=grid,
                mean=means[0],
                band=np.array([interval(point) for point in means[1:].T]).T,
                optimum=Optimum(float(optima[0]), at_edge),
                interval=interval(optima[1:]),
                best=float(best[0]),
                regret=float(regrets[0]),
                relative_regret=float(relative[0]),
                optima=optima[1:],
                regrets=relative[1:],
            )
        )
    return found


def _lowest(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and value of the lowest known points of curves (..., G)."""
    known = np.where(np.isnan(curve), np.inf, curve)
    return known.argmin(-1), known.min(-1)


def _regrets(tuned: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """Loss of curves (..., G) where `tuned` is lowest, less their best; NaN where either has no best."""
    at, best_tuned = _lowest(tuned)
    best = _lowest(curve)[1]
    known = np.isfinite(best_tuned) & np.isfinite(best)
    there = np.take_along_axis(curve, at[..., None], -1)[..., 0]
    return np.where(known, there, np.nan) - np.where(known, best, 0.0)


@dataclass(frozen=True)
class Verdict:
    """Whether a panel's learning rate transfers across its scales, over one slice of training.

    transfers: None where that is not known: the drift's or the regret's interval contains its limit, an
        optimum is at the edge of the grid, or trials are missing, and nothing speaks against it.
    shift: octaves from the optimum of the base scale to that of the scale farthest from it.
    drift: octaves per doubling of the scale: the slope of a least-squares line through all optima.
    worst_regret: the greatest regret over the scales, as a part of the best loss there; NaN if unknown.
    """

    transfers: bool | None
    shift: float
    shift_interval: tuple[float, float]
    drift: float
    drift_interval: tuple[float, float]
    worst_regret: float
    worst_regret_interval: tuple[float, float]
    words: str


def _slopes(scales: np.ndarray, optima: np.ndarray) -> np.ndarray:
    """Of least-squares lines through the finite optima (K, ...) against log2 of the scales (K,)."""
    known = np.isfinite(optima)
    x = np.log2(scales).reshape(-1, *(1,) * (optima.ndim - 1))
    y = np.where(known, optima, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (x - (x * known).sum(0) / known.sum(0)) * known
        return np.where(known.sum(0) > 1, (x * y).sum(0) / (x * x).sum(0), np.nan)


def verdict(found: list[Curve], settings: SweepSettings, panel: Panel) -> Verdict:
    scale, base = scale_of(settings), base_scale(settings)
    by_scale = {curve.scale: curve for curve in found}
    scales = list(by_scale)
    missing = [
        size
        for size in (getattr(network, scale) for network in panel.networks)
        if size not in scales
    ]
    farthest = max(scales, key=lambda size: (abs(math.log(size / base)), size), default=base)
    shift, shift_interval = math.nan, (math.nan, math.nan)
    drift, drift_interval = math.nan, (math.nan, math.nan)
    if base in by_scale and farthest != base:
        ends = by_scale[farthest], by_scale[base]
        shift = ends[0].optimum.log2_lr - ends[1].optimum.log2_lr
        shift_interval = interval(ends[0].optima - ends[1].optima)
    if len(found) > 1:
        drift = float(_slopes(np.array(scales), np.array([c.optimum.log2_lr for c in found])))
        drift_interval = interval(_slopes(np.array(scales), np.array([c.optima for c in found])))
    lost = [curve.scale for curve in found if curve.best == math.inf]
    at_edge = [curve.scale for curve in found if curve.optimum.at_edge]
    searched = isinstance(settings.log2_lr, Range)
    measured = [curve for curve in found if not math.isnan(curve.relative_regret)]
    untold = [] if searched else [c.scale for c in found if math.isnan(c.relative_regret)]
    worst = max(measured, key=lambda curve: curve.relative_regret, default=None)
    worst_regret = math.inf if lost else worst.relative_regret if worst else math.nan
    # The worst scale need not be the same one in every sample.
    worst_interval = (math.nan, math.nan)
    if worst:
        worst_interval = interval(np.fmax.reduce([curve.regrets for curve in measured]))

    drifts = _exceeds((drift, *drift_interval), DRIFT_LIMIT)
    costs = False
    if worst and len(found) > 1:
        costs = _exceeds((worst_regret, *worst_interval), REGRET_LIMIT)
    transfers: bool | None
    if lost or drifts or costs:
        transfers, answer = False, "does not transfer"
    elif drifts is None or costs is None or at_edge or missing or untold or len(found) == 1:
        transfers, answer = None, "undecided"
    else:
        transfers, answer = True, "transfers"

    words = []
    if missing:
        words.append(f"no trial is finished at {scale} {_join(missing)}")
    elif len(found) == 1:
        words.append(f"one {scale} says nothing of transfer")
    if math.isfinite(shift):
        words.append(
            f"the optimum moves by {shift:+.2f} octaves from {scale} {base} to {farthest} "
            f"({drift:+.2f} {_brackets(drift_interval)} per doubling of {scale}"
            f"{_around(drifts, f'{DRIFT_LIMIT:g}')})"
        )
    if lost:
        words.append(f"every learning rate diverges at {scale} {_join(lost)}")
    elif worst_regret == math.inf:
        words.append(f"the learning rate tuned at {scale} {base} diverges at {scale} {worst.scale}")
    elif worst and len(found) > 1:
        low, high = (100 * end for end in worst_interval)
        where = f" at {scale} {worst.scale}" if worst_regret else ""
        words.append(
            f"the learning rate tuned at {scale} {base} costs at most {100 * worst_regret:.1f} % "
            f"[{low:.1f}, {high:.1f}] of the loss{where}{_around(costs, f'{100 * REGRET_LIMIT:g} %')}"
        )
    elif len(found) > 1 and searched:
        words.append("a search does not measure what an untuned learning rate costs")
    if untold and not lost:
        words.append(f"what it costs at {scale} {_join(untold)} is not known yet")
    if at_edge:
        grid = "range" if searched else "grid"
        words.append(
            f"at {scale} {_join(at_edge)} the lowest point is at the edge of the {grid} and the optimum "
            "may lie beyond"
        )
    text = f"{answer}: {'; '.join(words)}"
    return Verdict(
        transfers,
        shift,
        shift_interval,
        drift,
        drift_interval,
        worst_regret,
        worst_interval,
        text,
    )


def _exceeds(estimate: tuple[float, float, float], limit: float) -> bool | None:
    """Whether |value| of (value, low, high) is above a limit; None if the interval contains the limit."""
    value, low, high = estimate
    if math.isnan(value):
        return None
    if any(low <= end <= high for end in (-limit, limit)):
        return None
    return abs(value) > limit


def _around(above: bool | None, limit: str) -> str:
    """What to add to an interval that does not decide; see `_exceeds`."""
    return f", an interval around the limit of {limit}" if above is None else ""


def _join(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


def _brackets(ends: tuple[float, float]) -> str:
    return f"[{ends[0]:+.2f}, {ends[1]:+.2f}]"


def rows(trials: list[Trial], settings: SweepSettings) -> list[dict[str, Any]]:
    """One row a trial and slice, for results.csv."""
    found = []
    for trial in trials:
        network, member = trial.network, trial.member
        parametrization = Parametrization.of(network.parametrization)
        for part in slices(settings.steps):
            loss = float(slice_losses(trial.losses[:, None], part)[0])
            found.append(
                {
                    "parametrization": network.parametrization,
                    "alpha": parametrization.alpha,
                    "gamma": parametrization.gamma,
                    "activation": network.activation,
                    "width": network.width,
                    "depth": network.depth,
                    "log2_lr": member.log2_lr,
                    "log2_block_multiplier": member.log2_block_multiplier,
                    "weight_decay": member.weight_decay,
                    "seed": member.seed,
                    "step_from": part.start,
                    "step_to": part.end,
                    "loss": loss,
                    "diverged": int(not math.isfinite(loss)),
                }
            )
    return found


def summarize(trials: list[Trial], settings: SweepSettings) -> dict[str, Any]:
    """What summary.json says: for each panel and slice a verdict, for each scale a record; the cost."""
    own = by_network(trials)
    return {
        "scale": scale_of(settings),
        "base": base_scale(settings),
        "trials": {"planned": settings.planned, **_cost(trials)},
        "panels": [
            {
                "name": panel.name,
                "parametrization": panel.parametrization.name,
                "alpha": panel.parametrization.alpha,
                "gamma": panel.parametrization.gamma,
                "activation": panel.networks[0].activation,
                "widths": sorted({network.width for network in panel.networks}),
                "depths": sorted({network.depth for network in panel.networks}),
                "slices": {
                    part.name: _slice_record(
                        curves(trials, settings, panel, part), settings, panel, part
                    )
                    for part in slices(settings.steps)
                },
            }
            for panel in panels(settings)
        ],
        "networks": {network.name: _cost(own.get(network, [])) for network in settings.networks},
    }


def _cost(trials: list[Trial]) -> dict[str, float]:
    return {
        "finished": len(trials),
        "diverged": sum(trial.diverged_at is not None for trial in trials),
        "seconds": sum(trial.seconds for trial in trials),
        "flops": sum(trial.flops for trial in trials),
    }


def _slice_record(
    found: list[Curve], settings: SweepSettings, panel: Panel, part: Slice
) -> dict[str, Any]:
    judged = verdict(found, settings, panel)
    return {
        "steps": [part.start, part.end],
        "transfers": judged.transfers,
        "verdict": judged.words,
        "shift_octaves": judged.shift,
        "shift_interval": list(judged.shift_interval),
        "drift_octaves_per_doubling": judged.drift,
        "drift_interval": list(judged.drift_interval),
        "worst_relative_regret": judged.worst_regret,
        "worst_relative_regret_interval": list(judged.worst_regret_interval),
        "scales": {
            str(curve.scale): {
                "optimum_log2_lr": curve.optimum.log2_lr,
                "optimum_interval": list(curve.interval),
                "at_edge": curve.optimum.at_edge,
                "best_loss": curve.best,
                "regret": curve.regret,
                "relative_regret": curve.relative_regret,
                "relative_regret_interval": list(interval(curve.regrets)),
            }
            for curve in found
        },
    }
