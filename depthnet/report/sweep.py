"""The files and the table of a sweep, finished or not."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from depthnet._checks import optional_import
from depthnet.report import figures, html
from depthnet.report.files import write_figure, write_json, write_parquet, write_rows, write_text
from depthnet.sweep import analysis
from depthnet.sweep.study import SweepSettings, Trial


def write(
    trials: list[Trial],
    settings: SweepSettings,
    environment: dict[str, str],
    out: Path,
) -> dict[str, Any]:
    """Write what a sweep has found so far into a folder.

    results.csv, and results.parquet where pyarrow is installed; summary.json; transfer.png and .svg;
    heatmap.png and .svg of a grid of several block multipliers and learning rates; report.html.

    Args:
        trials: those that are finished, at least one.
        environment: what to say of the machine and the software.
        out: the folder, which is made if it is missing.

    Returns:
        What summary.json holds, with infinities and NaN as such.

    Raises:
        ImportError: matplotlib or Jinja2 is missing.
        ValueError: no trial is finished, or a file cannot be written.
    """
    optional_import("matplotlib", "plot", "drawing the pictures of a sweep")
    optional_import("jinja2", "report", "the report of a sweep")
    if not trials:
        raise ValueError("trials must have at least one that is finished, got none")
    out.mkdir(parents=True, exist_ok=True)
    summary = {
        "name": settings.name,
        "settings": asdict(settings),
        "environment": environment,
        **analysis.summarize(trials, settings),
    }
    files = ["results.csv"]
    rows = analysis.rows(trials, settings)
    write_rows(out / "results.csv", rows)
    if find_spec("pyarrow"):
        write_parquet(out / "results.parquet", rows)
        files.append("results.parquet")
        summary["parquet"] = "results.parquet"
    else:
        summary["parquet"] = (
            "not written: pyarrow is not installed (pip install 'depthnet[report]')"
        )
    write_json(out / "summary.json", summary)
    files.append("summary.json")
    drawn = figures.all_curves(trials, settings)
    pictures = {"transfer": figures.curves_figure(drawn, settings)}
    maps = figures.heat_maps(trials, settings)
    if maps:
        pictures["heatmap"] = figures.heat_figure(maps, settings)
    for name, picture in pictures.items():
        for kind in ("png", "svg"):
            write_figure(out / f"{name}.{kind}", picture)
            files.append(f"{name}.{kind}")
    write_text(out / "report.html", html.render(drawn, maps, settings, summary, environment, files))
    return summary


def table(summary: dict[str, Any]):
    """A rich table of the optima, the best losses and the regret."""
    rich_box = optional_import("rich.box", "cli", "printing a table")
    rich_table = optional_import("rich.table", "cli", "printing a table")
    text = optional_import("rich.text", "cli", "printing a table")
    parts = list(summary["panels"][0]["slices"])
    columns = rich_table.Table(
        title="log2 of the best learning rate, by slice of training",
        caption="± half the 95 % interval   * lowest point at the edge of the grid\n"
        "loss: best of the last slice   regret: what the learning rate tuned at the base adds",
        box=rich_box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    columns.add_column(summary["scale"], no_wrap=True)
    for heading in (*parts, "loss", "regret"):
        columns.add_column(heading, justify="right", no_wrap=True)
    for panel in summary["panels"]:
        lines = [*panel["name"].split(", "), f"({panel['alpha']:g}, {panel['gamma']:g})"]
        columns.add_row(text.Text("\n".join(lines), style="bold"))
        for size in panel["slices"][parts[-1]]["scales"]:
            cells = [panel["slices"][part]["scales"][size] for part in parts]
            last = cells[-1]
            texts = [
                *map(_short_optimum, cells),
                html.loss_text(last),
                html.regret_text(last),
            ]
            columns.add_row(size, *map(text.Text, texts))
    return columns


def _short_optimum(cell: dict[str, Any]) -> str:
    low, high = cell["optimum_interval"]
    if math.isnan(low):
        return "diverged"
    return f"{cell['optimum_log2_lr']:.2f}±{(high - low) / 2:.2f}{'*' if cell['at_edge'] else ''}"
