"""The coordinate check as a study: one job for each shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from depthnet._checks import integers
from depthnet.diagnostics.coord_check import (
    QUANTITIES,
    CoordCheck,
    cross,
    measure,
    resnet_builder,
)
from depthnet.diagnostics.fits import Interval
from depthnet.reproduce.study import Arrays, DataStudy, Findings, Job, Verdict
from depthnet.scaling import Parametrization

HOLDS = {True: "as predicted", False: "off", None: "undecided"}


@dataclass(frozen=True)
class CoordCheckStudy(DataStudy):
    """`depthnet.diagnostics.coord_check` of a ResNet made by `resnet_builder`.

    Args:
        data, data_dir: see depthnet.data.load. batch: samples a step.
        The others are arguments of `coord_check` and `resnet_builder`.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    name: ClassVar[str] = "coord-check"
    title: ClassVar[str] = "Coordinate check: do sizes scale with width and depth as they should?"

    data: str = "digits"
    data_dir: str | None = None
    parametrization: str = "depth_mup"
    optimizer: str = "adamw"
    activation: str = "abs"
    lr: float | None = None
    eps: float | None = None
    blocks_alone: bool = False
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (32, 64, 128, 256)
    base_width: int = 128
    base_depth: int = 8
    seeds: int = 5
    steps: int = 4
    batch: int = 64

    def __post_init__(self) -> None:
        cross(self.widths, self.depths, self.base_width, self.base_depth)
        Parametrization.of(self.parametrization)
        integers(self, seeds=2, steps=1, batch=1)

    def jobs(self) -> list[Job]:
        build = resnet_builder(
            self.dataset,
            self.parametrization,
            optimizer=self.optimizer,
            lr=self.lr,
            eps=self.eps,
            activation=self.activation,
            blocks_alone=self.blocks_alone,
            base_width=self.base_width,
            base_depth=self.base_depth,
        )
        batches = [self.dataset.batch(0, step, self.batch) for step in range(self.steps)]

        def job(width: int, depth: int) -> Job:
            def run(tick) -> Arrays:
                shape = {"width": width, "depth": depth, "seeds": self.seeds, "steps": self.steps}
                return measure(build, batches, **shape, progress=tick)

            return Job(_name(width, depth), (depth + 8) * width**2, run)

        return [job(*shape) for shape in self._shapes()]

    def findings(self, results: dict[str, Arrays]) -> Findings:
        check = CoordCheck(
            {shape: results[_name(*shape)] for shape in self._shapes()},
            Parametrization.of(self.parametrization),
            self.widths,
            self.depths,
            self.base_width,
            self.base_depth,
            self.blocks_alone,
        )
        lines = [
            self._line(check, axis, quantity)
            for axis in check.axes
            for quantity in QUANTITIES
            if any((row["axis"], row["quantity"]) == (axis, quantity) for row in check.rows)
        ]
        return Findings(
            rows=check.rows,
            header=("along", "quantity", "predicted", "slope", "after step", ""),
            lines=lines,
            verdicts=[
                Verdict(
                    f"sizes scale with {axis} as {check.parametrization.name} says", holds, words
                )
                for axis, (holds, words) in check.verdicts.items()
            ],
            figure=check.figure(),
            notes=[
                "Slopes of log size against log width or depth, with 95 % intervals over seeds; of all "
                "steps, the slope farthest from its prediction."
            ],
        )

    def _shapes(self) -> list[tuple[int, int]]:
        return cross(self.widths, self.depths, self.base_width, self.base_depth)

    @staticmethod
    def _line(check: CoordCheck, axis: str, quantity: str) -> tuple:
        worst = check.farthest(axis, quantity)
        if worst is None:
            worst = [r for r in check.rows if (r["axis"], r["quantity"]) == (axis, quantity)][-1]
        predicted, verdict = worst["predicted"], HOLDS[worst["holds"]]
        return (
            axis,
            quantity,
            "none" if predicted is None else f"{predicted:g}",
            str(Interval(worst["slope"], worst["low"], worst["high"])),
            worst["step"],
            "" if predicted is None else verdict,
        )


def _name(width: int, depth: int) -> str:
    return f"n{width}-L{depth}"
