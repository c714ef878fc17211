"""depthnet theory."""

from __future__ import annotations

import argparse

from depthnet.cli.studies import run_study
from depthnet.cli.terminal import add_data, add_out, settings


def add_verbs(verbs) -> None:
    theory = verbs.add_parser(
        "theory",
        help="features, gradients and losses of a network of infinite width, computed",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    theory.set_defaults(run=run_theory)
    add = theory.add_argument
    add("--activation", default="abs", help="identity, relu, abs or leaky_relu")
    add("--depth", type=int, metavar="L", help="None is the limit of infinite depth")
    add(
        "--block-multiplier",
        dest="a",
        type=float,
        default=1.0,
        metavar="A",
        help="branches are A L^-alpha",
    )
    add("--alpha", type=float, default=0.5, help="other exponents than 0.5, 0.5: identity only")
    add("--gamma", type=float, default=0.5)
    add("--lr", type=float, default=0.5, help="of SGD on the blocks")
    add("--steps", type=int, default=5, metavar="N")
    add("--batch", type=int, default=1, metavar="N")
    add_data(theory, "digits", "digits, cifar10, mnist or PATH.npz")
    add_out(theory, "runs/theory")


def run_theory(options: argparse.Namespace) -> int:
    from depthnet.reproduce.prediction import Prediction

    return run_study(settings(Prediction, options), options.out)
