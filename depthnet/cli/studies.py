"""depthnet reproduce, and how the command runs any study."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields
from typing import Any

from depthnet._checks import one_of, optional_import
from depthnet.cli.terminal import EXIT_INTERRUPTED, StopRequests, console, progress_bar


def run_study(study, out: str) -> int:
    """Run a reproduce.Study with a progress bar; print its table and verdicts."""
    from depthnet.reproduce.study import run
    from depthnet.sweep.transfer import Interrupted

    optional_import("matplotlib", "plot", "the picture of a study")
    terminal, started = console(), time.monotonic()
    terminal.print(f"[bold]{study.title}[/bold]", highlight=False)
    reported = -1
    with StopRequests() as stop, progress_bar(terminal) as bar:
        task = bar.add_task("", total=1.0)

        def progress(job: str, part: float) -> None:
            nonlocal reported
            bar.update(task, completed=part, description=f"{job:>16}")
            if not terminal.is_terminal and int(10 * part) > reported:
                reported = int(10 * part)
                print(f"{10 * reported} %", flush=True)

        try:
            findings = run(study, out, progress=progress, stop=stop)
        except Interrupted:
            bar.stop()
            print(f"stopped; the same command goes on from {out}", file=sys.stderr)
            return EXIT_INTERRUPTED
    if not terminal.is_terminal:
        terminal.width = 1000  # a file has no width: nothing is wrapped
    terminal.print(_table(findings))
    terminal.print(_verdicts(findings))
    for note in findings.notes:
        terminal.print(note, highlight=False, markup=False, style="dim")
    terminal.print(
        f"{time.monotonic() - started:.0f} s. Wrote results.csv, summary.json, {study.name}.png in {out}.",
        highlight=False,
        markup=False,
    )
    return 0


def _table(findings):
    table = _rich_table()
    for number, heading in enumerate(findings.header):
        numeric = all(isinstance(line[number], (int, float)) for line in findings.lines)
        # Where a terminal is too narrow, cells are folded, not cut.
        table.add_column(heading, justify="right" if numeric else "left", overflow="fold")
    for line in findings.lines:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line))
    return table


def _verdicts(findings):
    text = optional_import("rich.text", "cli", "the command line").Text
    marks = {True: ("yes", "green"), False: ("no", "red"), None: ("undecided", "yellow")}
    table = _rich_table(show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for verdict in findings.verdicts:
        mark, color = marks[verdict.holds]
        claim = verdict.claim[:1].upper() + verdict.claim[1:]
        table.add_row(text(mark, style=f"bold {color}"), text(claim, style="bold"))
        table.add_row("", text(verdict.words))
    return table


def _rich_table(**options):
    box = optional_import("rich.box", "cli", "printing a table")
    table = optional_import("rich.table", "cli", "printing a table").Table
    return table(box=box.SIMPLE_HEAD, collapse_padding=True, **options)


def add_verbs(verbs) -> None:
    from depthnet.cli import coord_check, diversity, phase_diagram  # which import this module

    coord_check.add_coord_check(verbs)
    diversity.add_diversity(verbs)
    phase_diagram.add_phase_diagram(verbs)
    reproduce = verbs.add_parser(
        "reproduce", help="does what the paper claims hold on this machine?"
    )
    reproduce.set_defaults(run=run_reproduce)
    add = reproduce.add_argument
    add("name", nargs="?", metavar="NAME", help="of the study; without one, all are listed")
    add("--list", action="store_true", help="list all studies")
    add("--set", nargs="+", action="append", default=[], metavar=("KEY", "VALUE"),
        help="change a setting, such as: --set steps 1000 --set depths 64 256")  # fmt: skip
    add("--out", metavar="DIR",
        help="results go here, by default runs/NAME; a stopped study goes on from here")  # fmt: skip


def run_reproduce(options: argparse.Namespace) -> int:
    from depthnet.reproduce.registry import STUDIES, study

    if options.list or options.name is None:
        table = _rich_table()
        for heading in ("name", "study", "the paper's claim"):
            table.add_column(heading, overflow="fold")
        for name, entry in STUDIES.items():
            try:
                title = entry.load().title
            except ImportError as error:
                title = str(error)
            table.add_row(name, title, entry.claim)
        console().print(table, highlight=False, markup=False)
        return 0
    kind = study(options.name)
    return run_study(kind(**_settings(kind(), options.set)), options.out or f"runs/{options.name}")


def _settings(defaults, changes: list[list[str]]) -> dict:
    """The changed settings of a study, converted to the types of the defaults."""
    chosen: dict[str, Any] = {}
    for key, *words in changes:
        one_of("set", key, [field.name for field in fields(defaults)])
        default = getattr(defaults, key)
        several = isinstance(default, tuple)
        kind = str if default is None else type(default[0] if several else default)
        if not words or (len(words) > 1 and not several):
            raise ValueError(
                f"set: {key} takes {'values' if several else 'one value'}, got {words}"
            )
        try:
            values = tuple(kind(word) for word in words)
        except ValueError:
            raise ValueError(f"set: {key} takes {kind.__name__}, got {' '.join(words)}") from None
        chosen[key] = values if several else values[0]
    return chosen
