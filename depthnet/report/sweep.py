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
    found = analysis.summarize(trials, settings)
    summary = {
        "name": settings.name,
        "headline": headline(found),
        "settings": asdict(settings),
        "environment": environment,
        **found,
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


def headline(found: dict[str, Any]) -> str:
    """What analysis.summarize has found, in a sentence for who knows nothing of it.

    It tells of the study's first panel, and of the one whose learning rate costs most.
    """
    scale, base = found["scale"], found["base"]
    last = [list(panel["slices"].values())[-1] for panel in found["panels"]]
    others = {int(size) for size in last[0]["scales"]} - {base}
    if not others:
        return f"Nothing is known yet of networks of more than one {scale}."
    if last[0]["answer"] == "no verdict":
        return f"{last[0]['verdict'].partition(': ')[2].partition(';')[0].capitalize()}."
    farthest = max(others) if max(others) > base else min(others)
    costs = [
        analysis.Estimate(*part["scales"][str(farthest)]["cost"])
        if str(farthest) in part["scales"]
        else analysis.Estimate()
        for part in last
    ]
    names = [_with(panel) for panel in found["panels"]]
    sentence = (
        f"Tuned at {scale} {base}, the same learning rate at {scale} {farthest} "
        f"{_costs(costs[0])} {names[0]}"
    )
    gain = analysis.Estimate(*last[0]["gain"])
    if last[0]["helps"] is not None and math.isfinite(gain.value):
        sentence += (
            f", where {scale} {farthest} is {abs(100 * gain.value):.1f} % "
            f"{'better' if last[0]['helps'] else 'worse'} than {scale} {base}"
        )
    worst = max(
        range(len(costs)), key=lambda i: -1 if math.isnan(costs[i].value) else costs[i].value
    )
    if worst != 0:
        sentence += f"; {names[worst]} it {_costs(costs[worst])}"
    return f"{sentence}."


def _with(panel: dict[str, Any]) -> str:
    none = (panel["alpha"], panel["gamma"]) == (0, 0)
    return f"without a depth rule ({panel['name']})" if none else f"with {panel['name']}"


def _costs(cost: analysis.Estimate) -> str:
    if math.isnan(cost.value):
        return "has a cost that is not known"
    if math.isinf(cost.value):
        return "diverges"
    return f"costs {analysis.percent(cost)}"


def table(summary: dict[str, Any]):
    """A rich table of the optima, the best losses and the costs."""
    rich_box = optional_import("rich.box", "cli", "printing a table")
    rich_table = optional_import("rich.table", "cli", "printing a table")
    text = optional_import("rich.text", "cli", "printing a table")
    parts = list(summary["panels"][0]["slices"])
    columns = rich_table.Table(
        title="log2 of the best learning rate, by slice of training",
        caption="± half the 95 % interval   * lowest point at the edge of the grid\n"
        "loss: best of the last slice   cost: of the learning rate tuned at the base, as a part of it",
        box=rich_box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    columns.add_column(summary["scale"], no_wrap=True)
    for heading in (*parts, "loss", "cost"):
        columns.add_column(heading, justify="right", no_wrap=True)
    for panel in summary["panels"]:
        lines = [*panel["name"].split(", "), f"({panel['alpha']:g}, {panel['gamma']:g})"]
        columns.add_row(text.Text("\n".join(lines), style="bold"))
        for size in panel["slices"][parts[-1]]["scales"]:
            cells = [panel["slices"][part]["scales"][size] for part in parts]
            last = cells[-1]
            texts = [
                *map(_short_optimum, cells),
                html.loss_text(last, "best_loss"),
                _short_cost(last["cost"][0]),
            ]
            columns.add_row(size, *map(text.Text, texts))
    return columns


def _short_cost(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:.1f} %" if value < 10 else "> 1000 %"


def _short_optimum(cell: dict[str, Any]) -> str:
    low, high = cell["optimum_interval"]
    if math.isnan(low):
        return "diverged"
    return f"{cell['optimum_log2_lr']:.2f}±{(high - low) / 2:.2f}{'*' if cell['at_edge'] else ''}"
