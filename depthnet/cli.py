"""The command `depthnet`."""

from __future__ import annotations

import argparse
import io
import os
import platform
import re
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

from depthnet._checks import optional_import

EXIT_USAGE, EXIT_INTERRUPTED = 2, 130
EXPECTED = (ValueError, TypeError, ImportError, OSError, RuntimeError)


def main(arguments: list[str] | None = None) -> int:
    """Run one verb; returns the exit status.  Bad arguments print one line and exit with 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="replace"
            )  # a terminal without Greek letters shows question marks
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except (*EXPECTED, ArithmeticError, MemoryError) as error:
        if os.environ.get("DEPTHNET_DEBUG"):
            raise
        print(f"depthnet {options.verb}: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print(f"depthnet {options.verb}: stopped", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="depthnet", description=sys.modules["depthnet"].__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    transfer = verbs.add_parser(
        "transfer",
        help="loss against learning rate at many depths: does the best one transfer?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    transfer.set_defaults(run=run_transfer)
    # argparse takes -0.5,1.5 and -1e1 for options, unless they look like negative numbers to it.
    transfer._negative_number_matcher = re.compile(r"-[\d.][\d.,eE+-]*$")
    # The defaults themselves are those of sweep.TransferSettings.
    add = transfer.add_argument
    add("--data", default="text", metavar="NAME",
        help="text, digits, cifar10, mnist, PATH.npz or PATH.txt")  # fmt: skip
    add("--data-dir", metavar="DIR", help="folder of the files of cifar10 or mnist")
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
    add("--out", default="runs/transfer", metavar="DIR",
        help="results go here; a study that was stopped goes on from here")  # fmt: skip

    classify = verbs.add_parser(
        "classify", help="what the infinite-depth limit of (ALPHA, GAMMA) is"
    )
    classify.set_defaults(run=run_classify)
    classify.add_argument("alpha", type=float, help="branch multiplier ∝ depth^-ALPHA")
    classify.add_argument("gamma", type=float, help="Adam learning rate ∝ depth^-GAMMA")

    doctor = verbs.add_parser("doctor", help="what this installation has, and what it lacks")
    doctor.set_defaults(run=run_doctor)
    return parser


def _console():
    return optional_import("rich.console", "cli", "the command line").Console()


def run_transfer(options: argparse.Namespace) -> int:
    console = _console()
    progress_module = optional_import("rich.progress", "cli", "the progress bar")
    text = optional_import("rich.text", "cli", "the command line")
    optional_import("matplotlib", "plot", "the picture of a study")
    from depthnet.data import load
    from depthnet.report import transfer as report
    from depthnet.sweep import transfer as sweep
    from depthnet.sweep.store import Store

    chosen = {field.name: getattr(options, field.name) for field in fields(sweep.TransferSettings)}
    chosen = {
        key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()
    }
    settings = sweep.TransferSettings(**chosen)
    data = load(settings.data, settings.data_dir)
    store = Store(options.out, sweep.record(settings, data))
    all_jobs = sweep.jobs(settings)
    console.print(
        f"{len(all_jobs)} populations of {len(all_jobs[0].seed)} networks on {_describe(data.source)}",
        highlight=False,
        markup=False,
    )
    columns = (
        progress_module.TextColumn("{task.description}"),
        progress_module.BarColumn(),
        progress_module.TaskProgressColumn(),
        progress_module.TimeRemainingColumn(),
        progress_module.TextColumn("left"),
    )
    results, started = [], time.monotonic()
    with _StopRequests() as stop, progress_module.Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=sum(settings.steps * _cost(job) for job in all_jobs))

        def advance(job, steps):
            bar.update(task, advance=steps * _cost(job), description=f"{job.name:>16}")

        try:
            for result in sweep.run(settings, store, data, progress=advance, stop=stop):
                results.append(result)
                if not console.is_terminal:
                    seconds = sum(result.seconds.values())
                    print(f"{result.job.name}: {seconds:.1f} s of training", flush=True)
        except sweep.Interrupted:
            bar.stop()
            print(f"stopped; the same command goes on from {options.out}", file=sys.stderr)
            return EXIT_INTERRUPTED
    summary = report.write(results, settings, store)
    console.print(report.table(summary))
    for name, record in summary["parametrizations"].items():
        last = list(record["slices"].values())[-1]
        console.print(text.Text.assemble((name, "bold"), f" {last['verdict']}."))
    split = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    console.print(
        f"Training took {sum(summary['seconds'].values()):.0f} s ({split}); this call, "
        f"{time.monotonic() - started:.0f} s. Wrote results.csv, summary.json, transfer.png in "
        f"{options.out}.",
        highlight=False,
        markup=False,
    )
    return 0


def _cost(job) -> int:
    """Time of a step in proportion to that of one layer; input, output and loss are about eight."""
    return job.depth + 8


def _describe(source: dict) -> str:
    details = [f"{key} {value}" for key, value in source.items() if key not in ("name", "sha256")]
    return f"{source['name']} ({', '.join(details)})" if details else source["name"]


class _StopRequests:
    """Turns the first Ctrl-C or SIGTERM into a request that is asked for between steps."""

    def __enter__(self):
        self.asked = False
        self.previous = {
            number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __call__(self) -> bool:
        return self.asked

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


def run_classify(options: argparse.Namespace) -> int:
    from depthnet.scaling import PRESETS, classify

    console = _console()
    found = classify(options.alpha, options.gamma)
    presets = [
        preset.name
        for preset in PRESETS.values()
        if (preset.alpha, preset.gamma) == (found.alpha, found.gamma)
    ]
    called = f" ({', '.join(presets)})" if presets else ""
    console.print(
        f"[bold]alpha={found.alpha:g}, gamma={found.gamma:g}[/bold]{called}: {found.summary}"
    )
    grid = optional_import("rich.table", "cli", "the command line").Table.grid(padding=(0, 2))
    words = {True: "yes", False: "no", None: "-"}
    for label, value in (
        ("stable at initialization", words[found.stable_at_initialization]),
        ("stable in training", words[found.stable_in_training]),
        ("nontrivial", words[found.nontrivial]),
        ("faithful", words[found.faithful]),
        ("feature learning", words[found.feature_learning]),
        ("feature diversity exponent",
         "-" if found.diversity_exponent is None else f"{found.diversity_exponent:g} (1/2 is the most)"),
        ("layerwise linearization", words[found.layerwise_linearization]),
    ):  # fmt: skip
        grid.add_row("", label, value)
    console.print(grid, highlight=False)
    console.print(found.explanation, highlight=False)
    console.print(
        "One-layer blocks, infinite width then depth; branch multiplier ∝ depth^-alpha, Adam learning "
        "rate of the blocks ∝ depth^-gamma. A dash: the claims say nothing there.",
        style="dim",
    )
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    import importlib.metadata

    import torch

    import depthnet
    from depthnet.kernels import backends

    console = _console()
    console.print(
        f"depthnet {depthnet.__version__} in {Path(depthnet.__file__).parent}\n"
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        highlight=False,
    )
    for status in backends():
        text = status.details if status.active else "; ".join(status.reasons)
        mark = "[green]active[/green]  " if status.active else "[yellow]inactive[/yellow]"
        console.print(f"  {status.name:<10} {mark} ", end="")
        console.print(text, highlight=False, markup=False)
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    where = (
        f"{accelerator}; residual operators run there on the reference backend"
        if accelerator
        else "none found"
    )
    console.print(f"  accelerator: {where}", highlight=False)
    for requirement in ("triton", "matplotlib", "scikit-learn", "optuna", "rich"):
        try:
            version = importlib.metadata.version(requirement)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        console.print(f"  {requirement} {version}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
