"""depthnet transfer: the sweep that asks whether the best learning rate transfers across depth."""

from __future__ import annotations

import argparse

from depthnet.cli.sweep import run_study
from depthnet.cli.terminal import add_data, add_out, exponents_as_values


def add_verbs(verbs) -> None:
    transfer = verbs.add_parser(
        "transfer",
        help="loss against learning rate at many depths: does the best one transfer?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    transfer.set_defaults(run=run_transfer)
    exponents_as_values(transfer)
    add = transfer.add_argument
    add_data(transfer, "text")
    add("--width", type=int, default=64)
    add("--depths", type=int, nargs="+", default=[8, 32, 128], metavar="L")
    add("--base-depth", type=int, metavar="L",
        help="the depth at which learning rates are tuned; None is the least")  # fmt: skip
    add("--parametrizations", nargs="+", metavar="NAME",
        default=["depth_mup", "half_zero", "ode", "standard"],
        help="presets, or exponents as ALPHA,GAMMA")  # fmt: skip
    add("--activation", default="abs", help="identity, relu, abs or leaky_relu")
    add("--log2-lr", type=float, nargs=2, default=[-9.0, -6.0], metavar=("LOW", "HIGH"))
    add("--per-octave", type=int, default=2, metavar="N", help="learning rates per factor of 2")
    add("--seeds", type=int, default=5, metavar="N")
    add("--steps", type=int, default=200, metavar="N")
    add("--batch", type=int, default=64, metavar="N")
    add("--schedule", default="constant", help="of learning rates: constant, linear or cosine")
    add("--warmup", type=int, default=0, metavar="N", help="steps in which they rise first")
    add("--sweep", nargs="+", default=["all"], metavar="WHAT",
        help="whose rate moves: all, hidden (blocks), frozen (blocks, others frozen)")  # fmt: skip
    add("--outer-log2-lr", type=float, default=-10.0, metavar="X",
        help="of input and output layers, with --sweep hidden")  # fmt: skip
    add("--output-std", type=float, default=0.0, metavar="X",
        help="of the output layer's initial weights; --sweep frozen needs one")  # fmt: skip
    add("--device", default="cpu", help="a torch device, such as cuda")
    add("--storage", metavar="URL", help="where trials live, so that many machines can take part; "
        "None is an SQLite file in DIR")  # fmt: skip
    add_out(transfer, "runs/transfer")


def run_transfer(options: argparse.Namespace) -> int:
    return run_study(settings_of(options), options.out, options.storage)


def settings_of(options: argparse.Namespace):
    from depthnet._checks import integer
    from depthnet.sweep.study import SweepSettings

    low, high = options.log2_lr
    step = 1 / integer("per_octave", options.per_octave, 1)
    if options.base_depth not in (None, *options.depths):
        raise ValueError(
            f"base_depth must be one of depths, {options.depths}, got {options.base_depth}"
        )
    same = ("data", "data_dir", "width", "base_depth", "activation", "seeds", "steps", "batch")
    same += ("schedule", "warmup", "sweep", "outer_log2_lr", "output_std")
    return SweepSettings(
        name="transfer",
        depth=options.depths,
        parametrization=options.parametrizations,
        log2_lr={"low": low, "high": high, "step": step},
        device=options.device,
        **{key: getattr(options, key) for key in same},
    )
