"""depthnet sweep run, report and watch."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from pathlib import Path

from depthnet._checks import optional_import
from depthnet.cli.terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    StopRequests,
    console,
    exponents_as_values,
    progress_bar,
)

# The options that change a setting of the study file: flag, type, and what it says.
SEVERAL = {
    "parametrization": (str, "presets, or exponents as ALPHA,GAMMA"),
    "activation": (str, "identity, relu, abs, leaky_relu, or slopes as P,Q"),
    "width": (int, "numbers of features"),
    "depth": (int, "numbers of blocks"),
    "sweep": (
        str,
        "whose learning rate moves: all, hidden (the blocks) or frozen (the others frozen)",
    ),
}
NUMBERS = {
    "log2_lr": "of the learning rate",
    "log2_block_multiplier": "of the branch multiplier at the base depth",
    "weight_decay": "of AdamW",
}
SINGLE = {
    "name": (str, "of the study in its storage"),
    "data": (str, "text, digits, cifar10, mnist, PATH.npz or PATH.txt"),
    "data_dir": (str, "folder of the files of cifar10 or mnist"),
    "base_width": (int, "the width that hyperparameters are named at"),
    "base_depth": (int, "the depth that they are named at"),
    "seeds": (int, "how often every trial is repeated"),
    "steps": (int, "of training"),
    "batch": (int, "samples a step"),
    "schedule": (str, "of learning rates: constant, linear or cosine"),
    "warmup": (int, "steps in which they rise first"),
    "outer_log2_lr": (float, "of input and output layers, with sweep hidden"),
    "output_std": (float, "of the output layer's initial weights"),
    "sampler": (str, "grid or tpe"),
    "trials": (int, "candidates of a network, for tpe"),
    "round": (int, "how many of them train at a time"),
    "memory": (str, "what a population may take, such as 2GiB"),
    "device": (str, "a torch device, such as cuda"),
}


def add_verbs(verbs) -> None:
    sweep = verbs.add_parser("sweep", help="a study of hyperparameters, on one machine or many")
    actions = sweep.add_subparsers(dest="action", required=True, metavar="ACTION")

    run = actions.add_parser(
        "run",
        help="train what nobody else trains of a study, until it is finished",
        description="Settings come from the study file, YAML or TOML, then from the options. Start the "
        "same command on any number of machines: they share the work.",
    )
    run.set_defaults(run=run_run)
    exponents_as_values(run)
    run.add_argument("study", nargs="?", metavar="STUDY.yaml")
    _add_places(run)
    run.add_argument("--tensorboard", metavar="DIR", help="log the losses for TensorBoard here")
    group = run.add_argument_group("settings")
    for key, (kind, words) in SEVERAL.items():
        group.add_argument(_flag(key), type=kind, nargs="+", metavar="X", help=words)
    for key, words in NUMBERS.items():
        group.add_argument(_flag(key), type=_numbers, nargs="+", metavar="X",
            help=f"{words}: values, LOW:HIGH:STEP or, for tpe, LOW:HIGH")  # fmt: skip
    for key, (kind, words) in SINGLE.items():
        group.add_argument(_flag(key), type=kind, metavar="X", help=words)

    report = actions.add_parser("report", help="write the report of a study, finished or not")
    report.set_defaults(run=run_report)
    watch = actions.add_parser("watch", help="a live view of a running study")
    watch.set_defaults(run=run_watch)
    for parser in (report, watch):
        parser.add_argument("study", metavar="STUDY", help="the study file, or the folder of a run")
        _add_places(parser)


def _add_places(parser) -> None:
    parser.add_argument("--storage", metavar="URL",
        help="where trials live: a database's URL, journal:PATH or redis://HOST; by default an SQLite "
        "file in the folder")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="of checkpoints and the report; runs/NAME")


def _flag(key: str) -> str:
    return "--" + key.replace("_", "-")


def _numbers(text: str):
    """A number, or a mapping of low, high and step."""
    parts = [float(part) for part in text.split(":")]
    if len(parts) == 1:
        return parts[0]
    if len(parts) > 3:
        raise ValueError
    return dict(zip(("low", "high", "step"), parts, strict=False))


def settings_of(options: argparse.Namespace):
    """The settings of a study file, changed by the options that are given."""
    from depthnet.sweep.study import SweepSettings, read_file

    given = read_file(options.study) if options.study else {}
    for field in fields(SweepSettings):
        value = getattr(options, field.name)
        if value is not None:
            spans = field.name in NUMBERS and any(isinstance(x, dict) for x in value)
            if spans and len(value) > 1:
                raise ValueError(f"{field.name}: a range stands alone, got {len(value)} values")
            given[field.name] = value[0] if spans else value
    return SweepSettings(**given)


def run_run(options: argparse.Namespace) -> int:
    study = settings_of(options)
    return run_study(
        study, options.out or f"runs/{study.name}", options.storage, options.tensorboard
    )


def run_study(study, out: str, storage: str | None, tensorboard: str | None = None) -> int:
    """Take part in a study, write its report and print what it says; returns the exit status."""
    optional_import("rich", "cli", "the command line")
    optional_import("matplotlib", "plot", "the pictures of a study")
    from depthnet.data import load
    from depthnet.sweep.ledger import Ledger, StorageError, hide_password
    from depthnet.sweep.study import record
    from depthnet.sweep.tensorboard import log_trials
    from depthnet.sweep.worker import Interrupted, Worker
    from depthnet.training.memory import keep_freed_memory

    keep_freed_memory()
    data = load(study.data, study.data_dir)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {out} cannot be written ({error})") from None
    url, started = storage or sqlite(out), time.monotonic()
    ledger = Ledger(url, study.name, record(study, data))
    terminal = console()
    terminal.print(
        f"{study.planned} trials of {len(study.networks)} networks on {describe_source(data.source)}, "
        f"kept in {hide_password(url)}",
        highlight=False,
        markup=False,
    )
    if tensorboard is not None:
        optional_import("tensorboard", "tensorboard", "--tensorboard")
    with StopRequests() as stop, progress_bar(terminal) as bar:
        task = bar.add_task("", total=1.0)

        def advance(progress) -> None:
            bar.update(task, completed=progress.part, description=progress.words)

        def log(line: str) -> None:
            bar.console.print(line, highlight=False, markup=False)

        worker = Worker(ledger, data, out, progress=advance, stop=stop, log=log)
        try:
            for job, trials in worker.run():
                if tensorboard is not None:
                    log_trials(trials, tensorboard)
                if not terminal.is_terminal:
                    seconds = sum(trial.seconds for trial in trials)
                    print(
                        f"{job.name}: {len(trials)} trials, {seconds:.1f} s of training", flush=True
                    )
        except Interrupted:
            bar.stop()
            print(f"stopped; the same command goes on from {out}", file=sys.stderr)
            return EXIT_INTERRUPTED
        except StorageError as error:
            bar.stop()
            print(f"{error}\nNothing is lost: the same command goes on from {out}", file=sys.stderr)
            return EXIT_FAILED
    if tensorboard is not None:
        log_trials(ledger.trials(), tensorboard)  # of other workers, and of earlier calls
    _write_report(ledger, Path(out), terminal)
    terminal.print(f"This call took {time.monotonic() - started:.0f} s.", highlight=False)
    return 0


def _write_report(ledger, out: Path, terminal) -> None:
    """Write the report of what is finished, and print its table and verdicts."""
    text = optional_import("rich.text", "cli", "the command line")
    from depthnet.report import sweep as report
    from depthnet.report.machine import machine

    settings, trials = ledger.settings, ledger.trials()
    environment = {**ledger.record["versions"], **machine(settings.device.partition(":")[0])}
    summary = report.write(trials, settings, environment, out)
    terminal.print(text.Text(summary["headline"], style="bold"))
    terminal.print(report.table(summary))
    for panel in summary["panels"]:
        last = list(panel["slices"].values())[-1]
        terminal.print(text.Text.assemble((panel["name"], "bold"), f" {last['verdict']}."))
    count = summary["trials"]
    seconds, flops = count["seconds"], count["flops"]
    terminal.print(
        f"{count['finished']} of {count['planned']} trials took {seconds:.0f} s of training, "
        f"{flops / 1e9 / seconds:.3g} GFLOP/s. Report: {out / 'report.html'}",
        highlight=False,
        markup=False,
    )


def run_report(options: argparse.Namespace) -> int:
    optional_import("matplotlib", "plot", "the pictures of a study")
    ledger, out = _open(options)
    _write_report(ledger, out, console())
    return 0


def run_watch(options: argparse.Namespace) -> int:
    from depthnet.cli.watch import watch

    ledger, _ = _open(options)
    return watch(ledger, console())


def _open(options: argparse.Namespace):
    """The ledger of a study that exists, and its folder, from a study file or the folder of a run."""
    from depthnet.sweep.ledger import Ledger, study_names
    from depthnet.sweep.study import read_file

    if Path(options.study).is_dir():
        out = Path(options.out or options.study)
        url = options.storage or sqlite(options.study)
        _require(url)
        names = study_names(url)
        if len(names) != 1:
            raise ValueError(
                f"study: {url} has {len(names)} studies ({', '.join(names)}); name a study file"
            )
        return Ledger(url, names[0], None), out
    name = read_file(options.study)["name"]
    out = Path(options.out or f"runs/{name}")
    url = options.storage or sqlite(out)
    _require(url)
    return Ledger(url, name, None), out


def sqlite(out: str | Path) -> str:
    """The URL of the SQLite file of a run's folder."""
    return f"sqlite:///{Path(out) / 'study.db'}"


def _require(url: str) -> None:
    """Opening an SQLite file that is not there would make one."""
    path = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not path.exists():
        raise ValueError(f"study: there is no {path}; has the study been run?")


def describe_source(source: dict) -> str:
    details = [f"{key} {value}" for key, value in source.items() if key not in ("name", "sha256")]
    return f"{source['name']} ({', '.join(details)})" if details else source["name"]
