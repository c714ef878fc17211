"""Figure 1: the phase diagram of (alpha, gamma), measured cell by cell."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

from depthnet.diagnostics.phase_diagram import (
    QUANTITIES,
    REGIONS,
    UNDECIDED,
    Cell,
    PhaseDiagram,
    PhaseSettings,
    measure,
)
from depthnet.reproduce.study import Arrays, DataStudy, Findings, Job, Verdict


@dataclass(frozen=True)
class Phase(PhaseSettings, DataStudy):
    """The settings are those of depthnet.diagnostics.phase_diagram.PhaseSettings."""

    name: ClassVar[str] = "phase"
    title: ClassVar[str] = "The phase diagram of (alpha, gamma), measured (figure 1)"
    quick: ClassVar[dict[str, Any]] = {"depths": (32, 64, 128), "seeds": 6}

    def jobs(self) -> list[Job]:
        return [
            Job(
                _name(depth, number),
                depth * len(members),
                lambda tick, depth=depth, members=members: measure(
                    self, self.dataset, depth, members, tick
                ),
            )
            for depth in self.depths
            for number, members in enumerate(self.chunks(depth))
        ]

    def findings(self, results: dict[str, Arrays]) -> Findings:
        parts = {
            depth: [results[_name(depth, number)] for number in range(len(self.chunks(depth)))]
            for depth in self.depths
        }
        diagram = PhaseDiagram.of(self, parts)
        cells, missed = diagram.cells, diagram.disagreeing
        theory, measured, agree = (
            Counter(cell.theory for cell in cells),
            Counter(cell.measured for cell in cells),
            Counter(cell.theory for cell in cells if cell.agrees),
        )
        wrong = any(cell.measured != UNDECIDED for cell in missed)
        return Findings(
            rows=[_row(cell) for cell in cells],
            header=("region", "cells in theory", "cells measured", "in both"),
            lines=[
                (name, theory[name], measured[name], agree[name])
                for name in (*REGIONS, UNDECIDED)
                if theory[name] or measured[name]
            ],
            verdicts=[
                Verdict(
                    "every (alpha, gamma) lies in the region that the claims put it in (7.1 to 7.5)",
                    (False if wrong else None) if missed else True,
                    f"agreement {diagram.agreeing} of {len(cells)}",
                )
            ],
            figure=diagram.figure(),
            notes=[
                f"({cell.alpha:g}, {cell.gamma:g}): {cell.theory} in theory, {cell.measured} as measured; "
                + ", ".join(f"{name} {interval}" for name, interval in cell.exponents.items())
                for cell in missed
            ],
        )


def _name(depth: int, number: int) -> str:
    return f"L{depth}-{number}"


def _row(cell: Cell) -> dict:
    row = {
        "alpha": cell.alpha,
        "gamma": cell.gamma,
        "theory": cell.theory,
        "measured": cell.measured,
        "agrees": cell.agrees,
    }
    for name in QUANTITIES:
        interval = cell.exponents[name]
        row |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return row
