"""How often the intervals of a sweep hold the truth, on curves like those seen, whose truth is known.

A study has depths 8, 32 and 128 and a grid of half octaves. The log of the loss, u octaves from the
optimum, is 0.142 (exp(s u) - 1 - s u) / s^2 and noise: with s = 0.9 what `depthnet transfer` measures at
depth 8. Optima drift by 0.1 octaves a doubling of depth. Seeds differ in their level (2 %) and in where
their optimum is: all their depths by `common` octaves, each depth by `own`; each trial has noise of
0.3 %. Counted are the intervals that hold the base's optimum, the drift, and the cost at depth 128
(bench/results/coverage.csv).
"""

from __future__ import annotations

import csv
import math

import numpy as np
from common import RESULTS, argument_parser

from depthnet.sweep import analysis, optima
from depthnet.sweep.study import Member, SweepSettings, Trial

STUDIES = 200
DEPTHS = (8, 32, 128)
DRIFT = 0.1
CASES = [
    (seeds, common, own, skew)
    for seeds in (2, 3, 4, 8)
    for common, own, skew in ((0.05, 0.02, 0.9), (0.2, 0.05, 0.9), (0.0, 0.2, 0.9), (0.1, 0.1, 0.6))
]


def rise(u: float, skew: float) -> float:
    """Of log loss, u octaves from the optimum."""
    return 0.142 * (math.exp(skew * u) - 1 - skew * u) / skew**2


def covered(seeds: int, common: float, own: float, skew: float, studies: int) -> np.ndarray:
    """Parts of the studies whose intervals hold the base's optimum, the drift, and the cost at 128."""
    settings = SweepSettings(
        depth=DEPTHS, seeds=seeds, steps=50, log2_lr=tuple(x / 2 for x in range(-22, -9))
    )
    part = optima.slices(50)[-1]
    (panel,) = analysis.panels(settings)
    held = np.zeros(3)
    for generator in range(studies):
        rng = np.random.default_rng(generator)
        base = rng.uniform(-9, -8)  # wherever the grid's points are
        levels, shifts = rng.normal(0, 0.02, seeds), rng.normal(0, common, seeds)
        trials = []
        for network in panel.networks:
            at = base + DRIFT * math.log2(network.depth / 8)
            for seed in range(seeds):
                off = at + shifts[seed] + rng.normal(0, own)
                for lr in settings.log2_lr:
                    loss = 2.3 * math.exp(
                        rise(lr - off, skew) + levels[seed] + rng.normal(0, 0.003)
                    )
                    steps = (loss * np.exp(rng.normal(0, 0.05, 50))).astype(np.float32)
                    trials.append(Trial(network, Member(lr, -1.5, 0.0, seed), steps, 1, 1, None))
        curves = analysis.curves(trials, settings, panel, part)
        judged = analysis.verdict(curves, settings, panel)
        shift = DRIFT * math.log2(DEPTHS[-1] / DEPTHS[0])
        cost = analysis.Estimate.of(curves[-1].cost, curves[-1].costs)
        held += [
            curves[0].interval[0] <= base <= curves[0].interval[1],
            judged.drift.low <= DRIFT <= judged.drift.high,
            cost.low <= math.expm1(rise(-shift, skew)) <= cost.high,
        ]
    return held / studies


def main() -> None:
    argument_parser(__doc__).parse_args()
    with open(RESULTS / "coverage.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("seeds", "common", "own", "skew", "studies", "optimum", "drift", "cost"))
        for case in CASES:
            row = (*case, STUDIES, *covered(*case, STUDIES).round(3).tolist())
            writer.writerow(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
