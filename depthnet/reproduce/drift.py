"""Why the best learning rate moves with depth: finite depth, finite width, training length, schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np

from depthnet._checks import integers, optional_import
from depthnet.reproduce.curves import COLORS, MARKERS, Curves, Measured, Results, Variant
from depthnet.reproduce.study import DataStudy, Findings, Job, Verdict
from depthnet.sweep import analysis
from depthnet.sweep.analysis import Estimate
from depthnet.sweep.optima import Slice
from depthnet.sweep.study import SweepSettings

# A change of the drift by less, in octaves a doubling of depth for each doubling of width or of the number
# of steps, is none.
NO_CHANGE = 0.02
POWERS = np.linspace(0.1, 2.0, 39)  # p of x - b L^-p


@dataclass(frozen=True)
class Case(Curves):
    """Depth-muP networks of one width, trained for one number of steps by one schedule."""

    base_width: int = 64

    def variants(self) -> list[Variant]:
        return [Variant("depth_mup", "Depth-μP", self.rates(), self.log2_a, activation="abs")]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return []

    def settings_of(self, variant: Variant) -> SweepSettings:
        return replace(super().settings_of(variant), base_width=self.base_width)

    def parts(self) -> list[Slice]:
        return super().parts()[-1:]


class Measurement(NamedTuple):
    """A case, and of each depth log2 of the best learning rate: (depths, 1 + samples)."""

    case: Case
    measured: Measured
    optima: np.ndarray

    def drift(self, first: int, last: int) -> np.ndarray:
        """(1 + samples,), octaves a doubling from one depth to another."""
        at = [self.case.depths.index(depth) for depth in (first, last)]
        return (self.optima[at[1]] - self.optima[at[0]]) / math.log2(last / first)


@dataclass(frozen=True)
class Drift(DataStudy):
    """Learning rates across depth, for several widths, lengths of training and schedules.

    Args:
        data, data_dir: see depthnet.data.load.
        width: of the networks where it does not vary. depths: theirs where they vary only in depth;
            ascending, at least three.
        widths: others. base_depth, widest_depth, shared_depth: where their depths, and those of networks
            whose steps or schedule vary, are; more than twice `width` only the first two.
        log2_lr: least and greatest log2 of the learning rate of all layers, as it is at `width`.
        lr_step: of that grid, in octaves.
        seeds, batch: of all.
        steps: of training. lengths: others.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    name: ClassVar[str] = "drift"
    title: ClassVar[str] = "Why the best learning rate moves with depth under Depth-muP"
    quick: ClassVar[dict[str, Any]] = {
        "depths": (8, 16, 32),
        "widest_depth": 16,
        "shared_depth": 32,
        "widths": (32,),
        "lengths": (50,),
        "steps": 100,
        "seeds": 2,
    }

    data: str = "text"
    data_dir: str | None = None
    width: int = 64
    depths: tuple[int, ...] = (8, 16, 32, 64, 128, 256, 512)
    widths: tuple[int, ...] = (32, 128, 256)
    shared_depth: int = 128
    widest_depth: int = 32
    base_depth: int = 8
    log2_lr: tuple[float, float] = (-9.5, -5.5)
    lr_step: float = 0.5
    seeds: int = 4
    batch: int = 64
    steps: int = 200
    lengths: tuple[int, ...] = (100, 400, 800)

    def __post_init__(self) -> None:
        integers(self, widths=1, lengths=5, base_depth=1, shared_depth=1, widest_depth=1)
        if len(self.depths) < 3:
            raise ValueError(f"depths must be at least three, got {self.depths}")
        if not self.base_depth < self.widest_depth <= self.shared_depth:
            raise ValueError(
                "base_depth, widest_depth and shared_depth must be ascending, got "
                f"{self.base_depth}, {self.widest_depth}, {self.shared_depth}"
            )
        for depth in (self.base_depth, self.widest_depth, self.shared_depth):
            if depth not in self.depths:
                raise ValueError(f"depths must have {depth}, got {self.depths}")
        self.cases()  # checks the others

    def cases(self) -> dict[str, Case]:
        few = tuple(sorted({self.base_depth, self.widest_depth, self.shared_depth}))
        base = Case(
            data=self.data,
            data_dir=self.data_dir,
            width=self.width,
            base_width=self.width,
            depths=self.depths,
            base_depth=self.base_depth,
            log2_lr=self.log2_lr,
            lr_step=self.lr_step,
            seeds=self.seeds,
            batch=self.batch,
            steps=self.steps,
        )
        found = {"base": base}
        for width in self.widths:
            deep = few if width <= 2 * self.width else few[:2]
            found[f"width-{width}"] = replace(base, width=width, depths=deep)
        for steps in self.lengths:
            found[f"steps-{steps}"] = replace(base, steps=steps, depths=few)
        for steps in (self.steps, max(self.lengths)):
            higher = tuple(end + 1 for end in self.log2_lr)  # where the optimum is then
            found[f"linear-{steps}"] = replace(
                base, schedule="linear", steps=steps, depths=few, log2_lr=higher
            )
        return found

    def jobs(self) -> list[Job]:
        return [
            Job(
                f"{name}-{job.name}",
                job.cost * (case.width / self.width) ** 2 * case.steps / self.steps,
                job.run,
            )
            for name, case in self.cases().items()
            for job in case.jobs()
        ]

    def findings(self, results: Results) -> Findings:
        found = {name: self._measure(name, case, results) for name, case in self.cases().items()}
        return Findings(
            rows=[
                {"case": name, "width": each.case.width, "steps": each.case.steps, **row}
                for name, each in found.items()
                for row in each.case._rows(self._own(name, results))
            ],
            header=(
                "width",
                "steps",
                "schedule",
                "depth",
                "log2 lr",
                "loss",
                "tuned at base costs",
            ),
            lines=[line for each in found.values() for line in self._lines(each)],
            verdicts=self._verdicts(found),
            figure=self._figure(found),
            notes=[
                f"log2 lr: of all layers, as it is at width {self.width} and {self.base_depth} blocks; "
                "optimum of the last fifth of the steps. loss: there. *: at the edge of the grid.",
                "Intervals are of 95 %, by Student's t from the seeds' differences. The fit x - b L^-p is "
                f"to the optima of all depths, p from {POWERS[0]:g} to {POWERS[-1]:g}. In the theory the "
                "part of a block's change that is not linear in its weights falls as L^-1/4.",
                f"Contrast at the base: {100 * found['base'].measured.transfer.contrast:.0f} %.",
            ],
        )

    def _own(self, name: str, results: Results) -> Results:
        own = f"{name}-"
        jobs = [job.name for job in self.cases()[name].jobs()]
        return {job: results[own + job] for job in jobs}

    def _measure(self, name: str, case: Case, results: Results) -> Measurement:
        (variant,), (part,) = case.variants(), case.parts()
        measured = case.measure(variant, self._own(name, results), part)
        optima = np.array([[c.optimum.log2_lr, *c.optima] for c in measured.curves])
        return Measurement(case, measured, optima)

    def _verdicts(self, found: dict[str, Measurement]) -> list[Verdict]:
        base, first, mid, last = (
            found["base"],
            self.base_depth,
            self.widest_depth,
            self.shared_depth,
        )
        depths = self.depths
        middle = depths[(len(depths) - 1) // 2]
        early, late = base.drift(depths[0], middle), base.drift(middle, depths[-1])
        change = Estimate.of(late[0] - early[0], (late - early)[1:])
        power, limit = _fit(np.array(depths), base.optima)
        left = limit - base.optima[-1]
        early, late = (Estimate.of(each[0], each[1:]) for each in (early, late))
        verdicts = [
            Verdict(
                "the drift is of finite depth: it gets smaller as networks get deeper",
                True if change.high < 0 else False if change.low > 0 else None,
                f"{_words(early)} octaves a doubling from depth {depths[0]} to {middle}, {_words(late)} "
                f"from {middle} to {depths[-1]}; as x - b L^-p, p is "
                f"{_words(Estimate.of(power[0], power[1:]))} and "
                f"{_words(Estimate.of(left[0], left[1:]))} octaves are left beyond depth {depths[-1]}",
            )
        ]
        verdicts += [
            _trend(
                "the drift is of finite width: it gets smaller as networks get wider",
                [(each.case.width, each.drift(first, mid)) for each in _alike(found, "width")],
                "width",
                falling=True,
            ),
            _trend(
                "the drift is of the length of training: it gets larger as training gets longer",
                [(each.case.steps, each.drift(first, last)) for each in _alike(found, "steps")],
                "steps",
                falling=False,
            ),
        ]
        for steps in (self.steps, max(self.lengths)):
            constant = base if steps == self.steps else found[f"steps-{steps}"]
            fall, stay = (each.drift(first, last) for each in (found[f"linear-{steps}"], constant))
            more = Estimate.of(fall[0] - stay[0], (fall - stay)[1:])
            verdicts.append(
                Verdict(
                    f"over {steps} steps the drift is larger with a learning rate that falls to 0",
                    True if more.low > 0 else False if more.high < 0 else None,
                    f"{_words(Estimate.of(fall[0], fall[1:]))} octaves a doubling against "
                    f"{_words(Estimate.of(stay[0], stay[1:]))} with a constant one",
                )
            )
        return verdicts

    def _lines(self, each: Measurement) -> list[tuple]:
        return [
            (
                each.case.width,
                each.case.steps,
                each.case.schedule,
                curve.scale,
                f"{curve.optimum.log2_lr:.2f}{'*' * curve.optimum.at_edge} "
                "[{:.2f}, {:.2f}]".format(*curve.interval),
                f"{curve.best:.4f}",
                "{:.2f} % [{:.2f}, {:.2f}]".format(
                    *(100 * part for part in Estimate.of(curve.cost, curve.costs))
                ),
            )
            for curve in each.measured.curves
        ]

    def _figure(self, found: dict[str, Measurement]):
        """Optima against depth: by width, by length, by schedule."""
        optional_import("matplotlib", "plot", "drawing the picture")
        from matplotlib.figure import Figure

        longest = max(self.lengths)
        panels = {
            "width": {f"width {each.case.width}": each for each in _alike(found, "width")},
            "length of training": {
                f"{each.case.steps} steps": each for each in _alike(found, "steps")
            },
            "schedule": {
                f"constant, {self.steps}": found["base"],
                f"linear, {self.steps}": found[f"linear-{self.steps}"],
                f"constant, {longest}": found[f"steps-{longest}"],
                f"linear, {longest}": found[f"linear-{longest}"],
            },
        }
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (title, lines) in zip(axes, panels.items(), strict=True):
            for index, (label, each) in enumerate(lines.items()):
                ends = np.array([curve.interval for curve in each.measured.curves])
                middle = each.optima[:, 0]
                axis.errorbar(
                    each.case.depths,
                    middle,
                    np.abs(ends.T - middle),
                    color=COLORS[index % len(COLORS)],
                    marker=MARKERS[index % len(MARKERS)],
                    capsize=3,
                    label=label,
                )
            axis.set_xscale("log", base=2)
            axis.set_xticks(self.depths, self.depths)
            axis.minorticks_off()
            axis.set_xlabel("depth (blocks)")
            axis.set_title(title, fontsize=10)
            axis.grid(alpha=0.3)
            axis.legend(frameon=False, fontsize=9)
        axes[0].set_ylabel("log2 of the best learning rate")
        figure.suptitle(
            f"{self.title.replace('muP', 'μP')}\n{self.dataset.source['name']}, |x|, {self.seeds} seeds; "
            "bars: 95 % intervals",
            fontsize=11,
        )
        return figure


def _alike(found: dict[str, Measurement], kind: str) -> list[Measurement]:
    """The base and what differs from it in width or in steps only, in order."""
    own = (each for name, each in found.items() if name == "base" or name.startswith(kind))
    return sorted(own, key=lambda each: (each.case.width, each.case.steps))


def _fit(depths: np.ndarray, optima: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p and x of the least-squares fits x - b L^-p to columns of optima (depths, K)."""
    errors, limits = [], []
    for power in POWERS:
        basis = np.stack([np.ones(len(depths)), -(depths**-power)], -1)
        found = np.linalg.lstsq(basis, optima, rcond=None)[0]
        errors.append(((basis @ found - optima) ** 2).sum(0))
        limits.append(found[0])
    best = np.argmin(errors, 0)
    return POWERS[best], np.array(limits)[best, np.arange(optima.shape[1])]


def _trend(claim: str, drifts: list[tuple[int, np.ndarray]], of: str, *, falling: bool) -> Verdict:
    """Whether drifts get smaller (or larger) with a size, by the slope of a least-squares line."""
    sizes, values = (np.array(part) for part in zip(*drifts, strict=True))
    slopes = analysis._slopes(sizes, values)
    slope = Estimate.of(slopes[0], slopes[1:])
    sign = -1 if falling else 1
    ends = sorted((sign * slope.low, sign * slope.high))
    holds = True if ends[0] > 0 else False if ends[1] < NO_CHANGE else None
    listed = ", ".join(
        f"{_words(Estimate.of(value[0], value[1:]))} at {size}" for size, value in drifts
    )
    return Verdict(
        claim,
        holds,
        f"{listed} ({of}), octaves a doubling of depth; {slope.value:+.3f} [{slope.low:+.3f}, "
        f"{slope.high:+.3f}] for each doubling, less than {NO_CHANGE:g} is none",
    )


def _words(of: Estimate) -> str:
    return f"{of.value:+.2f} [{of.low:+.2f}, {of.high:+.2f}]"
