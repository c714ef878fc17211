"""How the command runs a study."""

from __future__ import annotations

import sys
import time

from depthnet._checks import optional_import
from depthnet.cli.terminal import EXIT_FAILED, EXIT_INTERRUPTED, StopRequests, console, progress_bar


def run_study(study, out: str, *, must_hold: bool = False) -> int:
    """Run a reproduce.Study with a progress bar; print its table and verdicts.

    Returns the exit status: with `must_hold`, EXIT_FAILED unless every verdict is yes.
    """
    from depthnet.reproduce.study import run
    from depthnet.sweep.worker import Interrupted
    from depthnet.training.memory import keep_freed_memory

    keep_freed_memory()
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
    if findings.verdicts:
        terminal.print(_verdicts(findings))
    for note in findings.notes:
        terminal.print(note, highlight=False, markup=False, style="dim")
    terminal.print(
        f"{time.monotonic() - started:.0f} s. Wrote results.csv, summary.json, {study.name}.png in {out}.",
        highlight=False,
        markup=False,
    )
    holds = all(verdict.holds is True for verdict in findings.verdicts)
    return EXIT_FAILED if must_hold and not holds else 0


def _table(findings):
    table = rich_table()
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
    table = rich_table(show_header=False)
    for _ in range(2):
        table.add_column(overflow="fold")
    for verdict in findings.verdicts:
        mark, color = marks[verdict.holds]
        claim = verdict.claim[:1].upper() + verdict.claim[1:]
        table.add_row(text(mark, style=f"bold {color}"), text(claim, style="bold"))
        table.add_row("", text(verdict.words))
    return table


def rich_table(**options):
    box = optional_import("rich.box", "cli", "printing a table")
    table = optional_import("rich.table", "cli", "printing a table").Table
    return table(box=box.SIMPLE_HEAD, collapse_padding=True, **options)
