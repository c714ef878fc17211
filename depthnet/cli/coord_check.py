"""depthnet coord-check."""

from __future__ import annotations

import argparse

from depthnet.cli.studies import run_study
from depthnet.cli.terminal import add_data, add_out, exponents_as_values, settings


def add_verbs(verbs) -> None:
    verb = verbs.add_parser(
        "coord-check",
        help="do sizes scale with width and depth as the parametrization says?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Exits with 0 if every slope is as predicted, with 1 if not.",
    )
    verb.set_defaults(run=run_coord_check)
    exponents_as_values(verb)
    # The defaults themselves are those of reproduce.coord_check.CoordCheckStudy.
    add = verb.add_argument
    add("--parametrization", default="depth_mup", metavar="NAME",
        help="a preset, or exponents as ALPHA,GAMMA")  # fmt: skip
    add("--optimizer", default="adamw", help="adamw, adam or sgd")
    add("--activation", default="abs", help="identity, relu, abs or leaky_relu")
    add_data(verb, "digits")
    add("--widths", type=int, nargs="+", default=[64, 128, 256, 512], metavar="N",
        help="compared at the base depth")  # fmt: skip
    add("--depths", type=int, nargs="+", default=[32, 64, 128, 256], metavar="L",
        help="compared at the base width")  # fmt: skip
    add("--base-width", type=int, default=128, metavar="N")
    add("--base-depth", type=int, default=8, metavar="L")
    add("--steps", type=int, default=4, metavar="N")
    add("--seeds", type=int, default=5, metavar="N")
    add("--batch", type=int, default=64, metavar="N")
    add("--lr", type=float, help="at the base shape; None is 2^-10, for sgd 2^-8")
    add("--eps", type=float,
        help="Adam's, at the base shape; None is 4 times the blocks' median gradient there")  # fmt: skip
    add("--blocks-alone", action="store_true", help="keep input and output layers as they start")
    add_out(verb, "runs/coord-check")


def run_coord_check(options: argparse.Namespace) -> int:
    from depthnet.reproduce.coord_check import CoordCheckStudy

    return run_study(settings(CoordCheckStudy, options), options.out, must_hold=True)
