"""Which training regime a study of learning rates should have, judged at the base depth alone.

In each regime networks of the base depth train at learning rates an octave apart. `contrast`: by how much
the least learning rate is worse than the best. A regime is fit for a study if that is above the limit of
depthnet.sweep; of those that are, the default of `depthnet transfer` is the one that trains best in the
time of its like (bench/results/regime.csv). Nothing here looks at a second depth.
"""

from __future__ import annotations

import csv
import time

from common import RESULTS, argument_parser, print_machine

from depthnet.data import load
from depthnet.sweep import plan
from depthnet.sweep.analysis import CONTRAST_LIMIT
from depthnet.sweep.optima import bowl, drawn_curves, interval, slices
from depthnet.sweep.population import trainer
from depthnet.sweep.study import SweepSettings
from depthnet.training.memory import keep_freed_memory

REGIMES = [
    {"sweep": "hidden", "outer_log2_lr": -7.0},
    {"sweep": "hidden", "outer_log2_lr": -8.0},
    {"sweep": "hidden", "outer_log2_lr": -9.0},
    {"sweep": "hidden", "outer_log2_lr": -10.0},
    {"sweep": "hidden", "outer_log2_lr": -11.0},
    {"sweep": "hidden", "outer_log2_lr": -8.0, "schedule": "linear"},
    {"sweep": "hidden", "outer_log2_lr": -9.0, "schedule": "linear"},
    {"sweep": "frozen", "output_std": 1.0},
    {"sweep": "all"},
    {"sweep": "all", "batch": 32},
    {"sweep": "all", "steps": 200},
    {"sweep": "all", "steps": 600},
    {"sweep": "all", "schedule": "linear"},
    {"sweep": "all", "schedule": "cosine", "warmup": 30},
    {"sweep": "all", "width": 128},
    {"sweep": "all", "width": 256},
]
SEEDS = 3


def main() -> None:
    argument_parser(__doc__).parse_args()
    keep_freed_memory()
    print_machine()
    rows = [measure(regime) for regime in REGIMES]
    with open(RESULTS / "regime.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def measure(regime: dict) -> dict:
    grid = tuple(map(float, range(-12, -3)))
    settings = SweepSettings(**{"depth": (8,), "seeds": SEEDS, "log2_lr": grid, **regime})
    data = load(settings.data)
    (job,) = plan.jobs(settings, data, {})
    population, started = trainer(settings, job, data), time.perf_counter()
    while not population.done:
        population.train_step()
    seconds = time.perf_counter() - started
    part = slices(settings.steps)[-1]
    losses = population.losses[part.start : part.end].T.reshape(SEEDS, len(grid), -1)
    drawn = drawn_curves(losses)
    found = bowl(grid, drawn)
    low, high = interval(found.optimum[1:])
    contrast = drawn[0, 0] / found.best[0] - 1
    row = {
        "sweep": settings.sweep[0],
        "outer_log2_lr": settings.outer_log2_lr if settings.sweep == ("hidden",) else "",
        "width": settings.width[0],
        "batch": settings.batch,
        "steps": settings.steps,
        "schedule": settings.schedule,
        "contrast": round(contrast, 3),
        "fit": contrast >= CONTRAST_LIMIT,
        "best_loss": round(found.best[0], 3),
        "optimum": round(found.optimum[0], 2),
        "half_interval": round((high - low) / 2, 2),
        "seconds": round(seconds, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


if __name__ == "__main__":
    main()
