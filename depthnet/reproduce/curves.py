"""Studies of curves: loss against learning rate, or block multiplier, for networks of several depths."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from typing import Any, ClassVar

import numpy as np

from depthnet._checks import integers, number, optional_import
from depthnet.report import figures
from depthnet.reproduce.study import Arrays, DataStudy, Findings, Job, Verdict
from depthnet.scaling import Parametrization
from depthnet.sweep import analysis, optima, plan
from depthnet.sweep.analysis import CONTRAST_LIMIT, DRIFT_LIMIT
from depthnet.sweep.optima import Slice, interval
from depthnet.sweep.population import trainer
from depthnet.sweep.study import Member, Network, SweepSettings, Trial

Results = dict[str, Arrays]

# Of Okabe and Ito, who chose them so that color-blind people tell them apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
MARKERS = ("o", "s", "^", "D")


@dataclass(frozen=True)
class Variant:
    """Networks that differ in depth only, and the grid that they are trained on.

    name: of jobs and rows. label: what pictures and verdicts call it. The others are those of
    depthnet.ResNet and of depthnet.sweep.study.SweepSettings; log2_a is the block multiplier's.
    """

    name: str
    label: str
    log2_lr: tuple[float, ...]
    log2_a: tuple[float, ...]
    parametrization: str = "depth_mup"
    activation: str = "relu"
    block_depth: int = 1
    norm: str | None = None
    activate: str = "after"
    mean_subtract: bool = True


@dataclass(frozen=True, eq=False)
class Measured:
    """A variant over one part of training.

    curves: one a depth, against the axis that the study looks along, minima over the other axis.
    planes: (depths, 1 + samples, points of that axis, points of the other), mean losses: first of the
        seeds as they are, then of curves drawn; infinite where training diverged.
    best: (depths, 1 + samples), the least loss: of the bowls along that axis, the lowest.
    transfer: what depthnet.sweep says of the curves.
    """

    variant: Variant
    part: Slice
    settings: SweepSettings
    curves: list[analysis.Curve]
    planes: np.ndarray
    best: np.ndarray
    transfer: analysis.Verdict

    def lowest(self, depth: int) -> tuple[int, ...]:
        """Places, on both axes, of the least loss of the depth at that place."""
        plane = self.planes[depth, 0]
        return np.unravel_index(int(plane.argmin()), plane.shape)

    def at_edge(self, depth: int) -> bool:
        """Whether a point beyond the grid may be better."""
        sizes = self.planes.shape[2:]
        return any(
            size > 1 and place in (0, size - 1)
            for place, size in zip(self.lowest(depth), sizes, strict=True)
        )


@dataclass(frozen=True)
class Curves(DataStudy):
    """Trains variants of a network at several depths, every point of a grid with every seed.

    Args:
        data, data_dir: see depthnet.data.load.
        width, depths: of the networks; a depth counts layers, those of all blocks.
        base_depth: the number of blocks at which learning rate and multiplier are named.
        log2_lr: least and greatest log2 of the learning rate. lr_step: of that grid, in octaves.
        log2_a: of the block multiplier: values, ascending.
        seeds, steps, batch: of training.
        sweep, outer_log2_lr, output_std, schedule, warmup: whose learning rate it is, and how it changes
            in training, as in depthnet.sweep.
        early, late: parts of training, from 0 to 1, whose losses are averaged.
        device: of torch. memory: what networks that train side by side may take, such as "2GiB".

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    claim: ClassVar[str]  # the title of the picture
    along: ClassVar[str] = "log2_lr"  # the axis of curves: log2_lr or log2_a
    quick: ClassVar[dict[str, Any]] = {"depths": (8, 32), "seeds": 2, "steps": 60, "lr_step": 1.0}

    data: str = "text"
    data_dir: str | None = None
    width: int = 64
    depths: tuple[int, ...] = (8, 32, 128)
    base_depth: int = 8
    log2_lr: tuple[float, float] = (-10.0, -5.0)
    lr_step: float = 0.5
    log2_a: tuple[float, ...] = (-1.5,)
    seeds: int = 5
    steps: int = 200
    batch: int = 64
    sweep: str = "all"
    outer_log2_lr: float = -10.0
    output_std: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    early: tuple[float, float] = (0.0, 0.2)
    late: tuple[float, float] = (0.8, 1.0)
    device: str = "cpu"
    memory: str = "2GiB"

    def __post_init__(self) -> None:
        if len(self.log2_lr) != 2:
            raise ValueError(f"log2_lr must be the least and the greatest, got {self.log2_lr}")
        integers(self, depths=1, base_depth=1)
        if number("lr_step", self.lr_step) <= 0:
            raise ValueError(f"lr_step must be positive, got {self.lr_step}")
        if not self.depths or sorted(set(self.depths)) != list(self.depths):
            raise ValueError(f"depths must be ascending, got {self.depths}")
        for key in ("early", "late"):
            part = getattr(self, key)
            if len(part) != 2 or not 0 <= number(key, part[0]) < number(key, part[1]) <= 1:
                raise ValueError(f"{key} must be two ascending numbers from 0 to 1, got {part}")
        for variant in self.variants():
            self.settings_of(variant)  # checks the others
            odd = [depth for depth in self.depths if depth % variant.block_depth]
            if odd:
                raise ValueError(
                    f"depths must be whole numbers of blocks of {variant.block_depth} layers, got {odd}"
                )
        for part in self.parts():
            if part.start == part.end:
                raise ValueError(f"steps must be more: {part.name} has none, got {self.steps}")

    @classmethod
    def full(cls) -> dict[str, Any]:
        return {
            "data": "cifar10",
            "width": 256,
            "depths": tuple(2**k for k in range(3, 11)),
            "lr_step": 1.0,
            "seeds": 5,
            "steps": 39_100,  # 50 epochs
            "batch": 64,
            "early": (0.0, 1000 / 39_100),
            "late": (37_000 / 39_100, 38_000 / 39_100),
        }

    @abstractmethod
    def variants(self) -> list[Variant]: ...

    @abstractmethod
    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        """Of each variant, by its name, what was measured over each part of training."""

    def notes(self) -> list[str]:
        """What differs from the paper's run."""
        return []

    def parts(self) -> list[Slice]:
        """The parts of training that are looked at."""
        return [
            Slice(name, *(round(end * self.steps) for end in getattr(self, name)))
            for name in ("early", "late")
        ]

    def rates(self, lower: float = 0.0, higher: float = 0.0) -> tuple[float, ...]:
        """The grid of learning rates, some octaves wider."""
        low, high, step = self.log2_lr[0] - lower, self.log2_lr[1] + higher, self.lr_step
        return tuple(low + step * index for index in range(1 + round((high - low) / step)))

    def settings_of(self, variant: Variant) -> SweepSettings:
        """A variant's networks as depthnet.sweep has them, whose depths count layers too."""
        return SweepSettings(
            data=self.data,
            data_dir=self.data_dir,
            parametrization=variant.parametrization,
            activation=variant.activation,
            width=self.width,
            depth=self.depths,
            base_depth=self.base_depth * variant.block_depth,
            log2_lr=variant.log2_lr,
            log2_block_multiplier=variant.log2_a,
            seeds=self.seeds,
            steps=self.steps,
            batch=self.batch,
            sweep=self.sweep,
            outer_log2_lr=self.outer_log2_lr,
            output_std=self.output_std,
            schedule=self.schedule,
            warmup=self.warmup,
            memory=self.memory,
            device=self.device,
        )

    def jobs(self) -> list[Job]:
        return [
            Job(
                f"{variant.name}-L{depth}",
                (depth + 8) * len(variant.log2_lr) * len(variant.log2_a),
                partial(self._train, variant, depth),
            )
            for variant in self.variants()
            for depth in self.depths
        ]

    def _train(self, variant: Variant, depth: int, tick) -> Arrays:
        """losses: float32 (steps, seeds, multipliers, learning rates)."""
        settings = replace(self.settings_of(variant), depth=depth)
        populations = plan.jobs(settings, self.dataset, {})
        losses = []
        for place, job in enumerate(populations):
            population = trainer(settings, job, self.dataset)
            blocks = population.model.blocks
            # The weights of L layers are the same, however many of them make a block.
            for key in ("block_depth", "norm", "activate", "mean_subtract"):
                setattr(blocks, key, getattr(variant, key))
            while not population.done:
                population.train_step()
                tick((place + population.step / self.steps) / len(populations))
            losses.append(population.losses)
        shape = self.steps, self.seeds, len(variant.log2_a), len(variant.log2_lr)
        return {"losses": np.concatenate(losses, 1).reshape(shape)}

    def measure(self, variant: Variant, results: Results, part: Slice) -> Measured:
        settings, trials = self.settings_of(variant), []
        if self.along == "log2_a":  # analysis looks along the learning rate: the axes trade places
            settings = replace(
                settings,
                log2_lr=settings.log2_block_multiplier,
                log2_block_multiplier=settings.log2_lr,
            )
        axes = settings.log2_lr, settings.log2_block_multiplier
        planes = []
        for depth in self.depths:
            losses = results[f"{variant.name}-L{depth}"]["losses"]
            if self.along == "log2_lr":
                losses = losses.swapaxes(2, 3)
            parametrization = settings.parametrization[0]
            network = Network(parametrization, variant.activation, self.width, depth, self.sweep)
            own = [
                Trial(network, Member(x, y, 0.0, seed), losses[:, seed, i, j], 0.0, 0.0, None)
                for seed in range(self.seeds)
                for i, x in enumerate(axes[0])
                for j, y in enumerate(axes[1])
            ]
            _, table = analysis.candidate_losses(own, settings, part)
            drawn = optima.drawn_curves(table)  # as for curves: pairs of equal draws
            planes.append(drawn.reshape(len(drawn), *map(len, axes)))
            trials += own
        best = [
            np.min([optima.bowl(axes[0], column).best for column in np.moveaxis(plane, -1, 0)], 0)
            for plane in planes
        ]
        (panel,) = analysis.panels(settings)
        curves = analysis.curves(trials, settings, panel, part)
        transfer = analysis.verdict(curves, settings, panel)
        return Measured(variant, part, settings, curves, np.stack(planes), np.stack(best), transfer)

    def findings(self, results: Results) -> Findings:
        found = {
            variant.name: [self.measure(variant, results, part) for part in self.parts()]
            for variant in self.variants()
        }
        return Findings(
            rows=self._rows(results),
            header=("network", "steps", "depth", "log2 lr", "log2 a", "loss", "95 %"),
            lines=[line for each in _flat(found) for line in self._lines(each)],
            verdicts=self.judge(found),
            figure=self.figure(found),
            notes=[
                f"loss: of training on {self.dataset.source['name']}, mean over a part of {self.steps} "
                f"steps of {self.batch} samples and over {self.seeds} seeds, at the best point of the "
                f"grid; width {self.width}. depth: in layers. log2 lr, log2 a: of the learning rate "
                f"({analysis.SWEPT[self.sweep]}) and the multiplier, as they are at {self.base_depth} "
                "blocks. *: at the edge of the grid, the optimum may lie beyond. Intervals of losses "
                "against depth leave out what all networks of a seed share, those in the table do not.",
                _contrasts(found),
                *self.notes(),
            ],
        )

    def _rows(self, results: Results) -> list[dict[str, Any]]:
        rows = []
        for variant in self.variants():
            for depth in self.depths:
                losses = results[f"{variant.name}-L{depth}"]["losses"]
                for part in self.parts():
                    mean = optima.slice_losses(losses, part)
                    for (seed, a, lr), loss in np.ndenumerate(mean):
                        rows.append(
                            {
                                "network": variant.name,
                                "depth": depth,
                                "log2_a": variant.log2_a[a],
                                "log2_lr": variant.log2_lr[lr],
                                "seed": seed,
                                "step_from": part.start,
                                "step_to": part.end,
                                "loss": float(loss),
                            }
                        )
        return rows

    def _lines(self, each: Measured) -> Iterable[tuple]:
        for index, depth in enumerate(self.depths):
            curve, best = each.curves[index], each.best[index]
            other = each.settings.log2_block_multiplier[each.lowest(index)[1]]
            low, high = curve.interval
            mark = "*" * each.at_edge(index)
            shown = f"{curve.optimum.log2_lr:.2f}{mark} [{low:.2f}, {high:.2f}]", f"{other:g}"
            if not math.isfinite(best[0]):
                shown = "-", "-"
            yield (
                each.variant.label,
                f"{each.part.start} to {each.part.end}",
                depth,
                *(shown if self.along == "log2_lr" else shown[::-1]),
                f"{best[0]:.4f}",
                "[{:.4f}, {:.4f}]".format(*interval(best[1:])),
            )

    def figure(self, found: dict[str, list[Measured]]):
        """A row a part of training: curves of every variant, and their minima against depth."""
        optional_import("matplotlib", "plot", "drawing the picture")
        from matplotlib.figure import Figure

        parts, columns = self.parts(), list(found)
        single = len(columns) == 1  # then the parts stand side by side
        shape = (1, len(parts)) if single else (len(parts), len(columns) + 1)
        figure = Figure(figsize=(2.4 + 3.1 * shape[1], 1.6 + 2.8 * shape[0]), layout="constrained")
        axes = figure.subplots(*shape, squeeze=False)
        for row, part in enumerate(parts):
            measured = [own[row] for own in found.values()]
            low, high = _range(measured)
            for column, each in enumerate(measured):
                axis = axes[0, row] if single else axes[row, column]
                drawn = figures.Curves(None, each.curves, each.transfer, low, high)
                figures.draw_curves(axis, drawn, each.settings)
                axis.set_title(f"{each.variant.label}\n{words(part)}", fontsize=10)
            if not single:
                self._draw_best(axes[row, -1], measured)
                axes[row, -1].set_title(f"at the best point\n{words(part)}", fontsize=10)
        curve_axes = axes if single else axes[:, :-1]
        for axis in curve_axes[-1]:
            axis.set_xlabel(
                f"log2 of the {'learning rate' if self.along == 'log2_lr' else 'multiplier a'}"
            )
        for axis in axes[:, 0]:
            axis.set_ylabel("training loss")
        handles, depths = axes[0, 0].get_legend_handles_labels()
        labels = [f"depth {depth}" for depth in depths]
        if not single:
            axes[-1, -1].set_xlabel("depth (layers)")
            for all_, own in zip(
                (handles, labels), axes[0, -1].get_legend_handles_labels(), strict=True
            ):
                all_ += own
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(
            f"{self.claim}\n{self.dataset.source['name']}, width {self.width}, {self.steps} steps, "
            f"{self.seeds} seed{'s' * (self.seeds > 1)}\n"
            "★ optimum and its 95 % interval   × diverged, or above the scale",
            fontsize=11,
        )
        return figure

    def _draw_best(self, axis, measured: list[Measured]) -> None:
        """Least losses; what all networks of a draw of seeds and steps share is left out of intervals."""
        table = np.stack([each.best for each in measured])
        shared = np.where(np.isfinite(table), table, np.nan)
        if np.isfinite(table).any((0, 1)).all():
            shared = np.nanmean(shared, (0, 1))
            table = table - shared + shared[0]
        for index, (each, best) in enumerate(zip(measured, table, strict=True)):
            ends = np.array([interval(own[1:]) for own in best])
            known = np.isfinite(ends).all(1) & np.isfinite(best[:, 0])
            middle = best[known, 0]
            axis.errorbar(
                np.array(self.depths)[known],
                middle,
                np.abs(ends[known].T - middle),
                color=COLORS[index],
                marker=MARKERS[index],
                markersize=8 - 2 * index,  # equal networks cover each other, not quite
                linewidth=2.6 - 0.6 * index,
                capsize=3,
                label=each.variant.label,
            )
        axis.set_xscale("log", base=2)
        axis.set_xticks(self.depths, self.depths)
        axis.minorticks_off()
        axis.grid(alpha=0.3)


def _contrasts(found: dict[str, list[Measured]]) -> str:
    own = ", ".join(
        f"{100 * each[-1].transfer.contrast:.0f} % ({each[-1].variant.label})"
        for each in found.values()
    )
    return f"Contrast, of the least point of the grid against the best, at the base depth, late: {own}."


def words(part: Slice) -> str:
    return f"steps {part.start} to {part.end}"


def exponents(name: str) -> str:
    """Of a parametrization, as fractions: (1/2, 1/2)."""
    own = Parametrization.of(name)
    return f"({Fraction(own.alpha)}, {Fraction(own.gamma)})"


def less(
    claim: str, a: tuple[Measured, int], b: tuple[Measured, int], limit: float = 0.0
) -> Verdict:
    """The best loss of a, less that of b, as a part of b's, is below a limit.

    a and b are each a variant and the place of a depth.  Undecided, too, where the loser's optimum is at
    the edge of the grid: it might have won beyond.
    """
    losses, others = (each.best[index] for each, index in (a, b))
    with np.errstate(invalid="ignore"):
        differences = (losses - others) / np.where(np.isfinite(others), others, 1.0)
    low, high = interval(differences[1:])
    holds = True if high < limit else False if low > limit else None
    loser, index = b if holds else a
    edge = holds is not None and loser.at_edge(index) and math.isfinite(loser.best[index, 0])
    return Verdict(
        claim,
        None if edge else holds,
        f"{losses[0]:.4f} against {others[0]:.4f}: {100 * differences[0]:+.2f} % "
        f"[{100 * low:+.2f}, {100 * high:+.2f}]"
        + (f", limit {100 * limit:g} %" if limit else "")
        + "; an optimum is at the edge of the grid" * edge,
    )


def stays(claim: str, each: Measured) -> Verdict:
    """The optimum drifts by no more than DRIFT_LIMIT octaves a doubling of depth."""
    moved, edges = _drift(each)
    lost = any(not math.isfinite(loss) for loss in each.best[:, 0])
    holds = False if moved or lost else None if moved is None or edges else True
    return judged(claim, holds, _drift_words(each, edges), each)


def moves(claim: str, each: Measured) -> Verdict:
    """The optimum drifts by more than DRIFT_LIMIT octaves a doubling of depth."""
    moved, edges = _drift(each)
    holds = True if moved else None if moved is None or edges else False
    return judged(claim, holds, _drift_words(each, edges), each)


def judged(claim: str, holds: bool | None, words: str, each: Measured) -> Verdict:
    """A verdict on learning rates, which is none where the contrast is below its limit."""
    if each.transfer.contrast < CONTRAST_LIMIT:
        limit = f"{100 * CONTRAST_LIMIT:g} %"
        words = f"no verdict, as the contrast is {100 * each.transfer.contrast:.1f} % < {limit}; {words}"
        return Verdict(claim, None, words)
    return Verdict(claim, holds, words)


def _drift(each: Measured) -> tuple[bool | None, list[int]]:
    edges = [curve.scale for curve in each.curves if curve.optimum.at_edge]
    return each.transfer.drift.exceeds(DRIFT_LIMIT), edges


def _drift_words(each: Measured, edges: list[int]) -> str:
    drift = each.transfer.drift
    lost = [curve.scale for curve in each.curves if not math.isfinite(curve.best)]
    return (
        f"{drift.value:+.2f} [{drift.low:+.2f}, {drift.high:+.2f}] octaves a doubling of depth, limit "
        f"±{DRIFT_LIMIT:g}"
        + (f"; at the edge of the grid at depth {', '.join(map(str, edges))}" if edges else "")
        + (f"; all diverge at depth {', '.join(map(str, lost))}" if lost else "")
    )


def _flat(found: dict[str, list[Measured]]) -> list[Measured]:
    return [each for own in found.values() for each in own]


def _range(measured: list[Measured]) -> tuple[float, float]:
    """The losses that a row of panels shows: what is far above the minima is drawn at the upper end."""
    means = np.concatenate([curve.mean for each in measured for curve in each.curves])
    best = np.concatenate([each.best[:, 0] for each in measured])
    if not np.isfinite(best).any():
        return 0.0, 1.0
    low = best.min()
    high = min(means[np.isfinite(means)].max(), 1.25 * np.median(best[np.isfinite(best)]))
    margin = 0.04 * (high - low) + 0.01 * low
    return low - margin, high + margin
