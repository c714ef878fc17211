"""The files and the table of a depth-transfer study."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

from depthnet._checks import optional_import
from depthnet.sweep import analysis
from depthnet.sweep.store import Store
from depthnet.sweep.transfer import JobResult, TransferSettings
from depthnet.training.population import SECTIONS


def write(results: list[JobResult], settings: TransferSettings, store: Store) -> dict:
    """Write results.csv, summary.json and transfer.png; returns the summary."""
    store.write_rows("results.csv", analysis.rows(results, settings))
    summary = {
        "settings": json.loads((store.out / "settings.json").read_text()),
        "parametrizations": analysis.summarise(results, settings),
        "seconds": time_split(results),
    }
    store.write_json("summary.json", summary)
    store.write_figure("transfer.png", picture(results, settings))
    return summary


def time_split(results: list[JobResult]) -> dict[str, float]:
    """Seconds of training, by section, over all jobs."""
    return {name: sum(result.seconds[name] for result in results) for name in SECTIONS}


def table(summary: dict):
    """A rich table of the optima, the best losses and the regret."""
    rich_box = optional_import("rich.box", "cli", "printing a table")
    rich_table = optional_import("rich.table", "cli", "printing a table")
    parametrizations = summary["parametrizations"]
    parts = list(next(iter(parametrizations.values()))["slices"])
    columns = rich_table.Table(
        title="log2 of the best learning rate, by slice of training",
        caption="± over seeds   * lowest point at the edge of the grid\n"
        "loss: best of the last slice   regret: what the learning rate tuned at the base depth adds",
        box=rich_box.SIMPLE_HEAD,
        padding=(0, 1),
    )
    columns.add_column("depth", overflow="fold")
    for heading in (*parts, "loss", "regret"):
        columns.add_column(heading, justify="right", no_wrap=True)
    for name, record in parametrizations.items():
        columns.add_row(f"[bold]{name}\n({record['alpha']:g}, {record['gamma']:g})[/bold]")
        for depth in record["slices"][parts[-1]]["depths"]:
            cells = [record["slices"][part]["depths"][depth] for part in parts]
            last = cells[-1]
            losses = [f"{last['best_loss']:.4g}", f"{last['regret']:.2g}"]
            columns.add_row(depth, *map(_optimum_text, cells), *losses)
    return columns


def _optimum_text(cell: dict) -> str:
    if math.isnan(cell["optimum_log2_lr"]):
        return "diverged"
    spread = "" if math.isnan(cell["spread"]) else f"±{cell['spread']:.2f}"
    return f"{cell['optimum_log2_lr']:.2f}{spread}{'*' if cell['at_edge'] else ''}"


def picture(results: list[JobResult], settings: TransferSettings):
    """One panel a parametrization, one curve a depth, minima marked; the last fifth of training."""
    optional_import("matplotlib", "plot", "drawing the picture")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    part = analysis.slices(settings.steps)[-1]
    panels = {
        parametrization: analysis.curves(own, settings, part)
        for parametrization, own in analysis.by_parametrization(results).items()
    }
    finite = [
        value
        for found in panels.values()
        for curve in found
        for value in curve.mean
        if math.isfinite(value)
    ]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    # Diverging runs pass through any loss; what lies above this line is drawn on it, as a cross.
    ceiling = min(high, max(1.35 * low, 1.2 * statistics.median(finite or [1.0]))) * 1.01
    columns = 1 if len(panels) == 1 else 2
    lines = -(-len(panels) // columns)
    figure = Figure(
        figsize=(max(2.0 + 3.6 * columns, 7.0), 1.4 + 2.9 * lines), layout="constrained"
    )
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    depths = sorted(settings.depths)
    colours = matplotlib.colormaps["viridis"].resampled(max(len(depths), 2))
    for axis, (parametrization, found) in zip(axes, panels.items(), strict=False):
        for curve in found:
            colour = colours(depths.index(curve.depth) / max(len(depths) - 1, 1) * 0.9)
            shown = curve.mean.clip(max=ceiling)
            axis.plot(settings.grid, shown, color=colour, marker=".", label=f"{curve.depth}")
            lost = curve.mean > ceiling
            if lost.any():
                axis.plot(
                    settings.grid[lost], shown[lost], "x", color=colour, markersize=7, clip_on=False
                )
            if curve.best <= ceiling:
                axis.plot(
                    [curve.optimum.log2_lr],
                    [curve.best],
                    marker="*",
                    markersize=13,
                    color=colour,
                    markeredgecolor="black",
                    markeredgewidth=0.7,
                    zorder=4,
                )
        alpha, gamma = parametrization.alpha, parametrization.gamma
        axis.set_title(f"{parametrization.name} (α = {alpha:g}, γ = {gamma:g})", fontsize=11)
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.minorticks_off()
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.set_xlim(settings.grid[0] - 0.5, settings.grid[-1] + 0.5)
        axis.set_ylim(low / 1.01, ceiling)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    swept = "blocks" if settings.sweep == "hidden" else "all layers"
    figure.supxlabel(
        f"log2 of the learning rate of the {swept}, as it is at depth {settings.base_depth}"
    )
    figure.supylabel(f"training loss, steps {part.start} to {part.end}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, title="depth", loc="outside right center", frameon=False)
    figure.suptitle(
        "Does the best learning rate transfer across depth?\n"
        f"{Path(settings.data).name}, width {settings.width}, φ = {settings.activation}, "
        f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}\n"
        "★ optimum of the curve   × diverged, or above the scale",
        fontsize=11,
        parse_math=False,
    )
    return figure
