"""What the curves of a sweep say: optima, their drift, costs, verdicts, and how sure they are.

A curve is the loss of one network against the learning rate, over one slice of training.  Its scale is
the network's depth, or its width in a study of several widths and one depth.  The curves of a panel
differ in scale only.  Optima and costs are read from bowls fitted to the curves; intervals are of 95 %,
from curves drawn as `optima.drawn_curves` says.  How often they hold the truth is measured by
bench/coverage.py.

Three things are judged apart: whether the optimum stays, what the learning rate tuned at the base scale
costs elsewhere, and whether networks of a greater scale are better at that learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from depthnet.scaling import Parametrization
from depthnet.sweep.optima import (
    Bowl,
    Optimum,
    Slice,
    bowl,
    drawn_curves,
    interval,
    slice_losses,
    slices,
)
from depthnet.sweep.study import Network, Range, SweepSettings, Trial

# A parametrization transfers if its optimum moves by at most a quarter octave per doubling of depth (half
# of what an exponent of the learning rate that is wrong by 1/2 makes), and if the learning rate tuned
# at the base depth costs at most one percent of the loss at every other depth.
DRIFT_LIMIT = 0.25
COST_LIMIT = 0.01

# A study says nothing of transfer unless training with the best learning rate of the grid is better than
# with the least by five times the cost that a verdict is about: else every learning rate is a good one.
CONTRAST_LIMIT = 5 * COST_LIMIT

EDGE = 0.05  # the part of a range, at either end, whose optimum may lie beyond

SWEPT = {"all": "all layers", "hidden": "blocks only", "frozen": "blocks only, others frozen"}


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
    bowl: of the curve and of the curves drawn; None of a search.
    optimum, interval: where the minimum is. best: the loss there.
    tuned: (1 + samples,), the loss at the base scale's optimum; NaN where it is not known.
    cost: by how much that is above `best`, as a part of it.
    optima, costs: (samples,), of each curve drawn.
    """

    scale: int
    network: Network
    log2_lr: np.ndarray
    mean: np.ndarray
    band: np.ndarray
    bowl: Bowl | None
    optimum: Optimum
    interval: tuple[float, float]
    best: float
    tuned: np.ndarray
    cost: float
    optima: np.ndarray
    costs: np.ndarray

    @property
    def contrast(self) -> float:
        """The loss at the least learning rate known, less `best`, as a part of it; NaN of a search."""
        known = self.mean[~np.isnan(self.mean)]
        return known[0] / self.best - 1 if self.bowl and math.isfinite(self.best) else math.nan


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
        if len(settings.sweep) > 1:
            key.append(SWEPT[network.sweep])
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
    measured: dict[int, tuple[Network, np.ndarray, np.ndarray]] = {}
    for network in panel.networks:
        if network in own:
            candidates, losses = candidate_losses(own[network], settings, part)
            tried = np.array([candidate.log2_lr for candidate in candidates])
            grid = np.unique(tried) if searched else np.array(settings.log2_lr)
            column = np.abs(tried[:, None] - grid).argmin(1)
            drawn = _profile(drawn_curves(losses), column, len(grid))
            measured[getattr(network, scale)] = network, grid, drawn
    bowls = {} if searched else {k: bowl(grid, drawn) for k, (_, grid, drawn) in measured.items()}
    base = bowls.get(base_scale(settings))
    found = []
    for size, (network, grid, drawn) in measured.items():
        own_bowl = bowls.get(size)
        if own_bowl is None:
            lowest, best = _lowest(drawn)
            optima = np.where(np.isfinite(best), grid[lowest], np.nan)
            at_edge = _at_edge(optima[0], settings.log2_lr)
        else:
            optima, best, at_edge = own_bowl.optimum, own_bowl.best, own_bowl.at_edge
        tuned = np.full(len(drawn), np.nan)
        if base is not None and own_bowl is not None:
            tuned = own_bowl.loss(base.optimum)
        with np.errstate(invalid="ignore"):
            # A line from point to point may pass below the bowl.
            costs = np.where(np.isinf(tuned), np.inf, np.maximum(tuned / best - 1, 0.0))
        found.append(
            Curve(
                scale=size,
                network=network,
                log2_lr=grid,
                mean=drawn[0],
                band=np.array([interval(point) for point in drawn[1:].T]).T,
                bowl=own_bowl,
                optimum=Optimum(float(optima[0]), at_edge),
                interval=interval(optima[1:]),
                best=float(best[0]),
                tuned=tuned,
                cost=float(costs[0]),
                optima=optima[1:],
                costs=costs[1:],
            )
        )
    return found


def _lowest(curve: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index and value of the lowest known points of curves (..., G)."""
    known = np.where(np.isnan(curve), np.inf, curve)
    return known.argmin(-1), known.min(-1)


class Estimate(NamedTuple):
    """A number with its 95 % interval; NaN if not known."""

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of(cls, value: float, samples: np.ndarray) -> Estimate:
        """The interval holds the value, also where all that is drawn lies to one side of it."""
        low, high = interval(samples)
        return cls(float(value), min(low, float(value)), max(high, float(value)))

    def exceeds(self, limit: float) -> bool | None:
        """Whether |value| is above a limit; None if that is not known, or the interval contains it."""
        if any(map(math.isnan, self)):
            return None
        if any(self.low <= end <= self.high for end in (-limit, limit)):
            return None
        return abs(self.value) > limit


@dataclass(frozen=True)
class Verdict:
    """Whether a panel's learning rate transfers across its scales, over one slice of training.

    transfers: None where that is not known: the contrast is below its limit, the drift's or the cost's
        interval contains its limit, an optimum is at the edge of the grid, or trials are missing, and
        nothing speaks against it.
    contrast: of the base scale's curve; see Curve.
    shift: octaves from the optimum of the base scale to that of the scale farthest from it.
    drift: octaves per doubling of the scale: the slope of a least-squares line through all optima.
    cost: the greatest over the scales.
    gain: the loss of the greatest scale at the learning rate tuned at the base, less the base's own, as
        a part of that. helps: whether it is below 0; None if its interval contains 0.
    """

    transfers: bool | None
    answer: str
    contrast: float
    shift: Estimate
    drift: Estimate
    cost: Estimate
    gain: Estimate
    helps: bool | None
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
    shift = drift = cost = gain = Estimate()
    contrast = by_scale[base].contrast if base in by_scale else math.nan
    if base in by_scale and farthest != base:
        ends = by_scale[farthest], by_scale[base]
        shift = Estimate.of(
            ends[0].optimum.log2_lr - ends[1].optimum.log2_lr, ends[0].optima - ends[1].optima
        )
    if len(found) > 1:
        lines = _slopes(np.array(scales), np.array([[c.optimum.log2_lr, *c.optima] for c in found]))
        drift = Estimate.of(lines[0], lines[1:])
    lost = [curve.scale for curve in found if curve.best == math.inf]
    at_edge = [curve.scale for curve in found if curve.optimum.at_edge]
    searched = isinstance(settings.log2_lr, Range)
    others = [curve for curve in found if curve.scale != base]
    measured = [curve for curve in others if not math.isnan(curve.cost)]
    untold = [] if searched else [curve.scale for curve in others if math.isnan(curve.cost)]
    worst = max(measured, key=lambda curve: curve.cost, default=None)
    if lost:
        cost = Estimate(math.inf, math.inf, math.inf)
    elif worst:
        # The worst scale need not be the same one in every draw.
        cost = Estimate.of(worst.cost, np.fmax.reduce([curve.costs for curve in measured]))
    if measured and max(scales) > base:
        with np.errstate(invalid="ignore"):
            change = by_scale[max(scales)].tuned / by_scale[base].tuned - 1
        gain = Estimate.of(change[0], change[1:])
    helps = True if gain.high < 0 else False if gain.low > 0 else None

    moves, costs = drift.exceeds(DRIFT_LIMIT), cost.exceeds(COST_LIMIT)
    searched_only = searched and len(found) > 1  # then nothing is known of costs
    transfers: bool | None = None
    if contrast < CONTRAST_LIMIT:
        answer = "no verdict"
    elif lost or moves or costs:
        transfers, answer = False, "does not transfer"
    elif (
        moves is None
        or (costs is None and not searched_only)
        or at_edge
        or missing
        or untold
        or len(found) == 1
    ):
        answer = "undecided"
    else:
        transfers, answer = True, "transfers"

    words = []
    if contrast < CONTRAST_LIMIT:
        words.append(
            f"{'the learning rate' if panel.networks[0].sweep == 'all' else 'blocks'} hardly "
            f"matter{'s' * (panel.networks[0].sweep == 'all')} here: the least learning rate of the grid "
            f"is only {100 * contrast:.1f} % worse than the best at {scale} {base}, where "
            f"{100 * CONTRAST_LIMIT:g} % are needed"
        )
    if missing:
        words.append(f"no trial is finished at {scale} {_join(missing)}")
    elif len(found) == 1:
        words.append(f"one {scale} says nothing of transfer")
    if math.isfinite(shift.value):
        words.append(
            f"the optimum moves by {shift.value:+.2f} octaves from {scale} {base} to {farthest} "
            f"({drift.value:+.2f} [{drift.low:+.2f}, {drift.high:+.2f}] per doubling of {scale}, "
            f"limit {DRIFT_LIMIT:g})"
        )
    if lost:
        words.append(f"every learning rate diverges at {scale} {_join(lost)}")
    elif cost.value == math.inf:
        words.append(f"the learning rate tuned at {scale} {base} diverges at {scale} {worst.scale}")
    elif worst:
        words.append(
            f"the learning rate tuned at {scale} {base} costs {percent(cost)} of the loss at {scale} "
            f"{worst.scale}, at most (limit {100 * COST_LIMIT:g} %)"
        )
    elif searched_only:
        words.append("a search does not measure what an untuned learning rate costs")
    if untold and not lost:
        words.append(f"what it costs at {scale} {_join(untold)} is not known")
    if gain.high < 10:
        better = {True: "better", False: "worse"}.get(helps, "neither better nor worse")
        words.append(
            f"at that rate {scale} {max(scales)} is {better} than {scale} {base}: its loss is "
            f"{100 * gain.value:+.1f} % [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"
        )
    if at_edge:
        grid = "range" if searched else "grid"
        words.append(
            f"at {scale} {_join(at_edge)} the lowest point is at the edge of the {grid} and the optimum "
            "may lie beyond, so that a wider one is needed to tell"
        )
    text = f"{answer}: {'; '.join(words)}"
    return Verdict(transfers, answer, contrast, shift, drift, cost, gain, helps, text)


def percent(part: Estimate) -> str:
    """A part with its interval, as 0.4 % (0.2 to 0.6); what is huge is only called so."""
    if part.high > 10:
        return "more than 1000 %" if part.low > 10 else f"{100 * part.low:.1f} % or more"
    return f"{100 * part.value:.1f} % ({100 * part.low:.1f} to {100 * part.high:.1f})"


def _join(sizes: list[int]) -> str:
    return ", ".join(map(str, sizes))


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
                    "sweep": network.sweep,
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
                "sweep": panel.networks[0].sweep,
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
        "answer": judged.answer,
        "verdict": judged.words,
        "contrast": judged.contrast,
        "shift_octaves": list(judged.shift),
        "drift_octaves_per_doubling": list(judged.drift),
        "cost": list(judged.cost),
        "gain": list(judged.gain),
        "helps": judged.helps,
        "scales": {
            str(curve.scale): {
                "optimum_log2_lr": curve.optimum.log2_lr,
                "optimum_interval": list(curve.interval),
                "at_edge": curve.optimum.at_edge,
                "best_loss": curve.best,
                "tuned_loss": float(curve.tuned[0]),
                "cost": list(Estimate.of(curve.cost, curve.costs)),
            }
            for curve in found
        },
    }
