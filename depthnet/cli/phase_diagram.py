"""depthnet phase-diagram."""

from __future__ import annotations

import argparse

from depthnet.cli.studies import run_study
from depthnet.cli.terminal import add_data, add_out, settings


def add_verbs(verbs) -> None:
    phase = verbs.add_parser(
        "phase-diagram",
        help="in which region of figure 1 does each (alpha, gamma) lie, as measured?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    phase.set_defaults(run=run_phase_diagram)
    # The defaults themselves are those of diagnostics.phase_diagram.PhaseSettings.
    add = phase.add_argument
    add("--alphas", type=float, nargs=2, default=[0.25, 1.25], metavar=("LOW", "HIGH"),
        help="branches are multiplied by L^-alpha")  # fmt: skip
    add("--gammas", type=float, nargs=2, default=[-0.25, 0.75], metavar=("LOW", "HIGH"),
        help="learning rates are proportional to L^-gamma")  # fmt: skip
    add("--spacing", type=float, default=0.125, metavar="X", help="from cell to cell")
    add("--depths", type=int, nargs="+", default=[64, 256, 1024], metavar="L")
    add("--width", type=int, default=64)
    add("--seeds", type=int, default=12, metavar="N", help="networks a cell")
    add("--steps", type=int, default=5, metavar="N")
    add("--batch", type=int, default=32, metavar="N")
    add("--optimizer", choices=["adamw", "sgd"], default="adamw")
    add("--activation", default="abs", help="identity, relu, abs or leaky_relu")
    add_data(phase, "digits")
    add_out(phase, "runs/phase")


def run_phase_diagram(options: argparse.Namespace) -> int:
    from depthnet.reproduce.phase import Phase

    return run_study(settings(Phase, options), options.out)
