"""depthnet coord-check, diversity, phase-diagram and reproduce: studies from the command line."""

from __future__ import annotations

import sys
import time

from depthnet._checks import optional_import
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
    terminal.print(_table(findings))
    for verdict in findings.verdicts:
        mark = {
            True: "[green]yes[/green]",
            False: "[red]no[/red]",
            None: "[yellow]undecided[/yellow]",
        }
        terminal.print(f"{mark[verdict.holds]}  ", end="")
        terminal.print(f"{verdict.claim}: {verdict.words}", highlight=False, markup=False)
    for note in findings.notes:
        terminal.print(note, highlight=False, markup=False, style="dim")
    terminal.print(
        f"{time.monotonic() - started:.0f} s. Wrote results.csv, summary.json, {study.name}.png in {out}.",
        highlight=False,
        markup=False,
    )
    return 0


def _table(findings):
    box = optional_import("rich.box", "cli", "printing a table")
    table = optional_import("rich.table", "cli", "printing a table").Table(box=box.SIMPLE_HEAD)
    for number, heading in enumerate(findings.header):
        numeric = all(isinstance(line[number], (int, float)) for line in findings.lines)
        table.add_column(heading, justify="right" if numeric else "left")
    for line in findings.lines:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line))
    return table


def add_verbs(verbs) -> None:
    """To be written."""
