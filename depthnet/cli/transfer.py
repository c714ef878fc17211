"""depthnet transfer."""

from __future__ import annotations

import argparse
import sys
import time

from depthnet._checks import optional_import
from depthnet.cli.terminal import (
    EXIT_INTERRUPTED,
    StopRequests,
    add_data,
    add_out,
    console,
    exponents_as_values,
    progress_bar,
    settings,
)


def add_verbs(verbs) -> None:
    transfer = verbs.add_parser(
        "transfer",
        help="loss against learning rate at many depths: does the best one transfer?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    transfer.set_defaults(run=run_transfer)
    exponents_as_values(transfer)
    # The defaults themselves are those of sweep.TransferSettings.
    add = transfer.add_argument
    add_data(transfer, "text")
    add("--width", type=int, default=64)
    add("--depths", type=int, nargs="+", default=[8, 16, 32, 64, 128], metavar="L")
    add("--base-depth", type=int, metavar="L",
        help="the depth at which learning rates are tuned; None is the least")  # fmt: skip
    add("--parametrizations", nargs="+", metavar="NAME",
        default=["depth_mup", "half_zero", "ode", "standard"],
        help="presets, or exponents as ALPHA,GAMMA")  # fmt: skip
    add("--activation", default="abs", help="identity, relu, abs or leaky_relu")
    add("--log2-lr", type=float, nargs=2, default=[-13.0, -4.0], metavar=("LOW", "HIGH"))
    add("--per-octave", type=int, default=1, metavar="N", help="learning rates per factor of 2")
    add("--seeds", type=int, default=2, metavar="N")
    add("--steps", type=int, default=300, metavar="N")
    add("--batch", type=int, default=64, metavar="N")
    add("--sweep", choices=["hidden", "all"], default="hidden",
        help="whose learning rate moves; hidden keeps input and output layers at 2^-7")  # fmt: skip
    add("--device", default="cpu", help="a torch device, such as cuda")
    add_out(transfer, "runs/transfer")


def run_transfer(options: argparse.Namespace) -> int:
    optional_import("rich", "cli", "the command line")
    optional_import("matplotlib", "plot", "the picture of a study")
    from depthnet.data import load
    from depthnet.sweep import transfer as sweep
    from depthnet.sweep.store import Store

    study = settings(sweep.TransferSettings, options)
    data = load(study.data, study.data_dir)
    with Store(options.out, sweep.record(study, data)) as store:
        return _transfer(study, data, store)


def _transfer(study, data, store) -> int:
    from depthnet.report import transfer as report
    from depthnet.sweep import transfer as sweep

    terminal = console()
    all_jobs = sweep.jobs(study)
    terminal.print(
        f"{len(all_jobs)} populations of {len(all_jobs[0].seed)} networks on "
        f"{describe_source(data.source)}",
        highlight=False,
        markup=False,
    )
    results, started = [], time.monotonic()
    with StopRequests() as stop, progress_bar(terminal) as bar:
        task = bar.add_task("", total=sum(study.steps * _cost(job) for job in all_jobs))

        def advance(job, steps):
            bar.update(task, advance=steps * _cost(job), description=f"{job.name:>16}")

        try:
            for result in sweep.run(study, store, data, progress=advance, stop=stop):
                results.append(result)
                if not terminal.is_terminal:
                    seconds = sum(result.seconds.values())
                    print(f"{result.job.name}: {seconds:.1f} s of training", flush=True)
        except sweep.Interrupted:
            bar.stop()
            print(f"stopped; the same command goes on from {store.out}", file=sys.stderr)
            return EXIT_INTERRUPTED
    text = optional_import("rich.text", "cli", "the command line")
    summary = report.write(results, study, store)
    terminal.print(report.table(summary))
    for name, record in summary["parametrizations"].items():
        last = list(record["slices"].values())[-1]
        terminal.print(text.Text.assemble((name, "bold"), f" {last['verdict']}."))
    split = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    terminal.print(
        f"Training took {sum(summary['seconds'].values()):.0f} s ({split}); this call, "
        f"{time.monotonic() - started:.0f} s. Wrote results.csv, summary.json, transfer.png in "
        f"{store.out}.",
        highlight=False,
        markup=False,
    )
    return 0


def _cost(job) -> int:
    """Time of a step in proportion to that of one layer; input, output and loss are about eight."""
    return job.depth + 8


def describe_source(source: dict) -> str:
    details = [f"{key} {value}" for key, value in source.items() if key not in ("name", "sha256")]
    return f"{source['name']} ({', '.join(details)})" if details else source["name"]
