"""Does extrapolating the best learning rate from shallow depths beat taking it from the deepest of them?

Residual networks train at depths 4, 8 and 16, and at depths 64 and 256, which the fit does not see.  Three
kinds of data: text, whose loss stays far above 0; digits, which are soon learned by heart; and labels of a
random network on Gaussian inputs, so many that nearly all are fresh, which any machine draws alike.
Measured at the deep ones: the regret of each learning rate, its loss above the least of the bowl there,
as a part of that; how often the extrapolation's interval holds the optimum.

The rule, fixed before anything deep was trained: extrapolation helps if its regret is less than that of
plain transfer from depth 16 in more than half of the cases (data, width, depth).  Beside it, and not part
of the rule: plain transfer from depth 28, which costs as much to train as 4, 8 and 16.

What bench/results/extrapolation.csv holds already is not trained again: a line a seed, its loss over the
last fifth of the steps at each log2 of the learning rate.  The table of docs/tuning.md is printed.
"""

from __future__ import annotations

import csv
import time
import warnings
from functools import partial

import numpy as np
from common import RESULTS, argument_parser, read_csv

import depthnet
from depthnet.data import Arrays, Dataset, load
from depthnet.diagnostics.fits import Interval
from depthnet.report.machine import machine
from depthnet.sweep.optima import Bowl, bowl, drawn_curves, extrapolated, interval
from depthnet.training.memory import keep_freed_memory
from depthnet.tuning import INTERVAL_LIMIT, TuningWarning

FILE = "extrapolation.csv"
DATA = ("text", "digits", "teacher")
WIDTHS = (32, 64)
SHALLOW = (4, 8, 16)
DEEP = (64, 256)
AS_DEAR = sum(SHALLOW)  # the depth whose training costs as much as that of all the shallow ones
GRID = range(-12, -3)
SEEDS = 3
STEPS = 200

Case = tuple[str, int, int]  # data, width, depth


def teacher() -> Arrays:
    """16384 inputs of N(0, 1)^64, and which of ten outputs of a random network is greatest."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16384, 64))
    hidden = np.maximum(x @ rng.standard_normal((64, 64)), 0)
    y = (hidden @ rng.standard_normal((64, 10))).argmax(1)
    return Arrays.standardised(x, y, x[:0], y[:0], {"name": "teacher"})


def train(case: Case, data: Dataset) -> list[dict]:
    name, width, depth = case
    options = {"active_features": data.active_features}
    model_fn = partial(depthnet.ResNet, data.in_features, out_features=data.out_features, **options)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TuningWarning)
        found = depthnet.tune(
            model_fn,
            data,
            width=width,
            depth=depth,
            log2_lr=(GRID[0], GRID[-1]),
            seeds=SEEDS,
            steps=STEPS,
            check_depths=(),
        )
    seconds = round(time.perf_counter() - start, 1)
    losses = found.curves[depth].losses
    return [
        {
            "data": name,
            "width": width,
            "depth": depth,
            "seed": seed,
            **{str(lr): f"{loss:.6g}" for lr, loss in zip(GRID, row, strict=True)},
            "seconds": seconds,
            **machine(),
        }
        for seed, row in enumerate(losses)
    ]


def measured() -> dict[Case, np.ndarray]:
    """Losses (seeds, G) of what is in the file."""
    found: dict[Case, list] = {}
    for row in read_csv(FILE) if (RESULTS / FILE).exists() else []:
        case = row["data"], int(row["width"]), int(row["depth"])
        found.setdefault(case, []).append([float(row[str(lr)]) for lr in GRID])
    return {case: np.array(rows) for case, rows in found.items()}


def bowls(losses: dict[Case, np.ndarray]) -> dict[Case, Bowl]:
    return {
        case: bowl(np.array(GRID, float), drawn_curves(rows[..., None]))
        for case, rows in losses.items()
    }


def regrets(deep: Bowl, log2_lr: np.ndarray | float) -> np.ndarray:
    """(1 + D,), of a learning rate, or of each curve's own."""
    return np.maximum(deep.loss(log2_lr) / deep.best - 1, 0.0)


def report(found: dict[Case, Bowl]) -> None:
    rows, gains, held, known, dear = [], [], [], [], []
    for (data, width, depth), deep in found.items():
        if depth not in DEEP:
            continue
        shallow = [found[data, width, each] for each in SHALLOW]
        optima = np.stack([each.optimum for each in shallow])
        told = Interval(*extrapolated(SHALLOW, optima, depth))
        plain = [regrets(deep, each.optimum[0])[0] for each in shallow]
        regret = regrets(deep, told.value)[0]
        best = Interval(deep.optimum[0], *interval(deep.optimum[1:]))
        known.append(told.high - told.low <= INTERVAL_LIMIT)
        held.append(told.low <= best.value <= told.high)
        # A grid that does not hold the optima tells of nothing, and counts against extrapolation.
        at_edge = any(each.at_edge for each in (*shallow, deep))
        gains.append(-np.inf if at_edge else plain[-1] - regret)
        marks = " (edge)" * at_edge + " (too wide)" * (not known[-1])
        dear.append(regrets(deep, found[data, width, AS_DEAR].optimum[0])[0] - regret)
        percents = (f"{100 * each:.2f}" for each in (*plain, regret + dear[-1], regret))
        rows.append((data, width, depth, f"{told}{marks}", best, *percents))
    header = (
        *("data", "width", "depth", "extrapolated", "measured"),
        *(f"regret from {each}, %" for each in (*SHALLOW, AS_DEAR)),
        "extrapolated, %",
    )
    for row in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(map(str, row))} |")
    everything = np.full(len(rows), True)
    for name, part in (("all", everything), ("intervals not too wide", np.array(known))):
        print(
            f"\n{name}: {part.sum()} cases, {np.array(held)[part].sum()} hold the measured optimum"
        )
        for depth, gain in ((SHALLOW[-1], np.array(gains)[part]), (AS_DEAR, np.array(dear)[part])):
            print(
                f"  regret less than from depth {depth}: {(gain > 0).sum()}, "
                f"by {100 * gain.mean():.2f} % of the loss in the mean, {100 * np.median(gain):.2f} median"
            )
    print(
        f"extrapolation {'helps' if 2 * sum(gain > 0 for gain in gains) > len(rows) else 'does not help'}"
    )


def main() -> None:
    argument_parser(__doc__).parse_args()
    keep_freed_memory()
    done = measured()
    for depth in (*SHALLOW, *DEEP, AS_DEAR):
        for data in DATA:
            for width in WIDTHS:
                case = data, width, depth
                if case in done:
                    continue
                rows = train(case, teacher() if data == "teacher" else load(data))
                new = not (RESULTS / FILE).exists()
                with open(RESULTS / FILE, "a", newline="") as file:
                    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
                    if new:
                        writer.writeheader()
                    writer.writerows(rows)
                print(*case, f"{rows[0]['seconds']} s", flush=True)
    report(bowls(measured()))


if __name__ == "__main__":
    main()
