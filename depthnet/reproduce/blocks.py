"""Figures 4 to 7 and 21, and the line alpha + gamma = 1: blocks of two layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np

from depthnet._checks import optional_import
from depthnet.report import figures
from depthnet.reproduce.curves import Curves, Measured, Variant, exponents, less, moves, words
from depthnet.reproduce.study import Verdict
from depthnet.sweep.optima import Slice, interval

BLOCK_DEPTH = 2
BEST_PART = 0.2  # of the points of a map: those of which a slope is measured
ABS_LN = {"activation": "abs", "norm": "layer"}


@dataclass(frozen=True)
class Fig4(Curves):
    name: ClassVar[str] = "fig4"
    title: ClassVar[str] = "Blocks of one and of two layers at equal depth, relu (figure 4)"
    claim: ClassVar[str] = "Blocks of one layer or of two, of as many layers in all?"
    kind: ClassVar[dict[str, Any]] = {}
    quick: ClassVar[dict[str, Any]] = {"depths": (4, 16), "seeds": 2, "steps": 40}

    depths: tuple[int, ...] = (4, 16, 64)
    log2_lr: tuple[float, float] = (-10.0, -5.0)
    lr_step: float = 1.0
    log2_a: tuple[float, ...] = (-5.5, -4.5, -3.5, -2.5, -1.5, -0.5)

    @classmethod
    def full(cls) -> dict[str, Any]:
        return {
            **super().full(),
            "depths": tuple(2**k for k in range(2, 11)),
            "log2_lr": (-15.0, -7.0),
            "log2_a": (-3.0, -2.0, -1.0, 0.0, 1.0),
            "early": (10_000 / 39_100, 11_000 / 39_100),
        }

    def variants(self) -> list[Variant]:
        return [
            Variant(name, label, self.rates(), self.log2_a, block_depth=layers, **self.kind)
            for layers, name, label in ((1, "one", "one layer a block"), (2, "two", "two layers"))
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return [
            less(
                f"one layer a block is better at depth {depth}, {words(one.part)}",
                (one, i),
                (two, i),
            )
            for one, two in zip(found["one"], found["two"], strict=True)
            for i, depth in enumerate(self.depths)
        ]

    def notes(self) -> list[str]:
        return [
            "Each at the best point of its grid of learning rates and multipliers. In the paper blocks of "
            "two layers are worse after a quarter of the training and catch up by its end."
        ]


@dataclass(frozen=True)
class Fig5(Fig4):
    name: ClassVar[str] = "fig5"
    title: ClassVar[str] = (
        "Blocks of one and of two layers at equal depth, |x| and pre-LN (figure 5)"
    )
    kind: ClassVar[dict[str, Any]] = ABS_LN

    log2_lr: tuple[float, float] = (-10.0, -5.0)
    log2_a: tuple[float, ...] = (-7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0)

    def notes(self) -> list[str]:
        return [
            "Each at the best point of its grid of learning rates and multipliers. In the paper the gap "
            "between blocks of one and of two layers stays to the end of training."
        ]


@dataclass(frozen=True)
class Fig6(Curves):
    name: ClassVar[str] = "fig6"
    title: ClassVar[str] = "Learning rates across depth, blocks of two layers (figure 6)"
    claim: ClassVar[str] = (
        "Does the best learning rate transfer under Depth-μP, with two layers a block?"
    )
    shared: ClassVar[str] = "blocks-of-two"

    log2_a: tuple[float, ...] = (-2.0, -3.0)  # of relu, of |x| with pre-LN

    def __post_init__(self) -> None:
        if len(self.log2_a) != 2:
            raise ValueError(f"log2_a must be that of relu and that of |x|, got {self.log2_a}")
        super().__post_init__()

    @classmethod
    def full(cls) -> dict[str, Any]:
        depths = tuple(BLOCK_DEPTH * 2**k for k in range(3, 11))
        changes = {"depths": depths, "log2_lr": (-13.0, -7.0), "log2_a": (-2.0, -1.0)}
        return {**super().full(), **changes}

    def variants(self) -> list[Variant]:
        relu, absolute = self.log2_a
        return [
            Variant("relu", "relu", self.rates(), (relu,), block_depth=BLOCK_DEPTH),
            Variant(
                "abs",
                "|x|, pre-LN",
                self.rates(),
                (absolute,),
                block_depth=BLOCK_DEPTH,
                **ABS_LN,
            ),
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return [
            moves(
                f"{each.variant.label}: the best learning rate moves with depth, {words(each.part)}",
                each,
            )
            for own in found.values()
            for each in own
        ]


@dataclass(frozen=True)
class Fig21(Fig6):
    name: ClassVar[str] = "fig21"
    title: ClassVar[str] = (
        "Learning rates in the course of training, blocks of two layers (figure 21)"
    )

    def variants(self) -> list[Variant]:
        return super().variants()[:1]

    def parts(self) -> list[Slice]:
        ends = [round(quarter * self.steps / 4) for quarter in range(5)]
        return [
            Slice(f"quarter {i + 1}", start, end) for i, (start, end) in enumerate(pairwise(ends))
        ]

    def notes(self) -> list[str]:
        return ["`early` and `late` play no part: the quarters of training are shown."]


@dataclass(frozen=True)
class Fig7(Curves):
    name: ClassVar[str] = "fig7"
    title: ClassVar[str] = "Learning rate and multiplier together, blocks of two layers (figure 7)"
    claim: ClassVar[str] = (
        "Which learning rates and multipliers go together, with two layers a block?"
    )
    quick: ClassVar[dict[str, Any]] = {"depths": (4, 16), "seeds": 2, "steps": 60}

    depths: tuple[int, ...] = (4, 16, 64)
    log2_lr: tuple[float, float] = (-12.0, -5.0)
    lr_step: float = 1.0
    log2_a: tuple[float, ...] = (-5.0, -4.0, -3.0, -2.0, -1.0)

    @classmethod
    def full(cls) -> dict[str, Any]:
        return {
            **super().full(),
            "depths": tuple(BLOCK_DEPTH * depth for depth in (2, 32, 1024)),
            "log2_lr": (-17.0, -10.5),
            "lr_step": 0.5,
            "log2_a": tuple(-4 + 0.5 * i for i in range(9)),
        }

    def variants(self) -> list[Variant]:
        label = "two layers a block"
        return [Variant("two", label, self.rates(), self.log2_a, block_depth=BLOCK_DEPTH, **ABS_LN)]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        each = found["two"][-1]
        tilts = self._tilts(each)
        first, last = tilts[0], tilts[-1]
        low, high = interval((last - first)[1:])
        holds = True if high < 0 else False if low > 0 else None
        listed = ", ".join(
            f"{1 / tilt[0]:.2f} at depth {depth}"
            for depth, tilt in zip(self.depths, tilts, strict=True)
        )
        return [
            Verdict(
                "the slope of log2 a against log2 lr among good points goes from -2 towards -1 with depth",
                holds,
                f"slopes {listed}; octaves of the learning rate that an octave of a is worth change by "
                f"{last[0] - first[0]:+.2f} [{low:+.2f}, {high:+.2f}] (from -1/2 to -1: -0.50)",
            )
        ]

    def _tilts(self, each: Measured) -> np.ndarray:
        """(depths, 1 + samples): `tilt` of each plane."""
        x, y = (np.array(axis) for axis in (each.settings.log2_lr, self.log2_a))
        return np.array([tilt(planes, x, y) for planes in each.planes])

    def notes(self) -> list[str]:
        return [
            "slope: of log2 a against log2 lr, along the best fifth of the points: the inverse of that of "
            "the least-squares line of log2 lr against log2 a, in which points weigh as much as their "
            "loss is below that of all others. It is right where these points end at the top and bottom "
            "of the map, not at its sides."
        ]

    def figure(self, found: dict[str, list[Measured]]):
        """A map a depth, late in training, with the slope of its best points drawn through the minimum."""
        optional_import("matplotlib", "plot", "drawing the picture")
        from matplotlib.figure import Figure

        each = found["two"][-1]
        figure = Figure(figsize=(1.5 + 3.3 * len(self.depths), 4.4), layout="constrained")
        axes = figure.subplots(1, len(self.depths), sharex=True, sharey=True, squeeze=False)[0]
        slopes = 1 / self._tilts(each)[:, 0]
        for index, (axis, depth, slope) in enumerate(zip(axes, self.depths, slopes, strict=True)):
            heat = figures.HeatMap("", each.planes[index, 0].T)
            figures.draw_map(figure, axis, heat, each.settings)
            if np.isfinite(slope):
                lr, a = each.lowest(index)
                at = each.settings.log2_lr[lr], self.log2_a[a]
                axis.axline(at, slope=slope, color="white", linestyle="--")
            axis.set_title(f"depth {depth}: slope {slope:.2f}", fontsize=10)
        figure.supxlabel("log2 of the blocks' learning rate")
        figure.supylabel("log2 of the block multiplier a")
        figure.suptitle(
            f"{self.claim}\n{self.dataset.source['name']}, width {self.width}, {self.seeds} seeds, "
            f"training loss of {words(each.part)}\n★ minimum   — within 1 % of it   - - slope of the best "
            "fifth of the points   × diverged",
            fontsize=11,
        )
        return figure


def tilt(planes: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Octaves of x for an octave of y, along the points of least loss of planes.

    The slope of the least-squares line of x against y through the best fifth of the points, weighted by
    how far their loss is below the greatest of them.

    Args:
        planes: (..., X, Y), losses; infinite where training diverged. x: (X,). y: (Y,).

    Returns:
        (...); NaN where all these points have one y, or one of them diverged.
    """
    level = np.quantile(planes, BEST_PART, axis=(-2, -1), keepdims=True, method="inverted_cdf")
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.clip(level - planes, 0, None)
        weight = weight / weight.sum((-2, -1), keepdims=True)
        x = x[:, None] - (weight * x[:, None]).sum((-2, -1), keepdims=True)
        y = y - (weight * y).sum((-2, -1), keepdims=True)
        return (weight * x * y).sum((-2, -1)) / (weight * y * y).sum((-2, -1))


@dataclass(frozen=True)
class Line(Curves):
    name: ClassVar[str] = "line"
    title: ClassVar[str] = (
        "Blocks of two layers on the line alpha + gamma = 1: does any parametrization transfer?"
    )
    claim: ClassVar[str] = (
        "Two layers a block, |x|, pre-LN: does the best learning rate move everywhere on α + γ = 1?"
    )

    log2_a: tuple[float, ...] = (-3.0,)

    @classmethod
    def full(cls) -> dict[str, Any]:
        depths = tuple(BLOCK_DEPTH * 2**k for k in range(3, 11))
        return {**super().full(), "depths": depths, "log2_lr": (-14.0, -6.0)}

    def variants(self) -> list[Variant]:
        return [
            Variant(
                name,
                exponents(of),
                self.rates(),
                self.log2_a,
                of,
                block_depth=BLOCK_DEPTH,
                **ABS_LN,
            )
            for name, of in (("half", "0.5,0.5"), ("between", "0.75,0.25"), ("one", "1,0"))
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return [
            moves(f"{own[-1].variant.label}: the best learning rate moves with depth", own[-1])
            for own in found.values()
        ]

    def notes(self) -> list[str]:
        return [
            "No figure of the paper: its section 9 says that blocks of two layers lose something under "
            "every parametrization; (1, 0) is that of CompleteP."
        ]
