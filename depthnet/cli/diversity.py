"""depthnet diversity."""

from __future__ import annotations

import argparse

from depthnet.cli.studies import run_study
from depthnet.cli.terminal import add_data, add_out, exponents_as_values


def add_verbs(verbs) -> None:
    diversity = verbs.add_parser(
        "diversity",
        help="do neighboring layers do different things? features, gradients, updates, by depth",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    diversity.set_defaults(run=run_diversity)
    exponents_as_values(diversity)
    add = diversity.add_argument
    add("--parametrizations", nargs="+", metavar="NAME", default=["depth_mup", "0.75,0.25", "ode"],
        help="presets, or exponents as ALPHA,GAMMA")  # fmt: skip
    add("--activation", default="abs", help="identity, relu, abs or leaky_relu")
    add("--width", type=int, default=64)
    add("--depths", type=int, nargs="+", default=[64, 128, 256, 512, 1024], metavar="L",
        help="32 or more")  # fmt: skip
    add("--steps", type=int, default=100, metavar="N", help="of training")
    add("--seeds", type=int, default=4, metavar="N", help="networks of each kind")
    add("--batch", type=int, default=64, metavar="N")
    add("--lr", type=float, default=2**-7, help="the learning rate at depth 8")
    add_data(diversity, "text")
    add_out(diversity, "runs/diversity")


def run_diversity(options: argparse.Namespace) -> int:
    from depthnet.reproduce.diversity import Fig17

    study = Fig17(
        data=options.data,
        data_dir=options.data_dir,
        parametrizations=tuple(options.parametrizations),
        activations=(options.activation,),
        width=options.width,
        depths=tuple(options.depths),
        steps=(0, options.steps),
        seeds=options.seeds,
        batch=options.batch,
        lr=options.lr,
    )
    return run_study(study, options.out)
