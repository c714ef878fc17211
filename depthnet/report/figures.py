"""Pictures of a sweep: curves of loss against learning rate, and maps of loss over (a, learning rate)."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import numpy as np

from depthnet.sweep import analysis, optima
from depthnet.sweep.analysis import Curve, Panel, Verdict
from depthnet.sweep.study import Range, SweepSettings, Trial


def last_slice(settings: SweepSettings) -> optima.Slice:
    """The slice that pictures and headlines are of."""
    return optima.slices(settings.steps)[-1]


@dataclass(frozen=True)
class Curves:
    """The curves of a panel, and the y axis that all panels of a study share.

    Diverging runs pass through any loss; what lies above `high` is drawn on it, as a cross.
    """

    panel: Panel
    found: list[Curve]
    verdict: Verdict
    low: float
    high: float


def all_curves(trials: list[Trial], settings: SweepSettings) -> list[Curves]:
    """The curves of each panel that has a finished trial."""
    part = last_slice(settings)
    by_panel = [
        (panel, analysis.curves(trials, settings, panel, part))
        for panel in analysis.panels(settings)
    ]
    finite = [
        float(loss)
        for _, found in by_panel
        for curve in found
        for loss in curve.mean
        if math.isfinite(loss)
    ]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    ceiling = min(high, max(1.35 * low, 1.2 * statistics.median(finite or [1.0])))
    margin = 0.01 * abs(ceiling) + 0.04 * (ceiling - low)
    return [
        Curves(
            panel,
            found,
            analysis.verdict(found, settings, panel),
            low - margin,
            ceiling + margin,
        )
        for panel, found in by_panel
        if found
    ]


def curves_figure(drawn: list[Curves], settings: SweepSettings):
    """One axes a panel, one curve a scale, minima marked."""
    from matplotlib.figure import Figure

    columns = min(len(drawn), 2)
    lines = -(-len(drawn) // columns)
    figure = Figure(
        figsize=(max(2.0 + 3.6 * columns, 7.0), 1.4 + 2.9 * lines), layout="constrained"
    )
    axes = list(figure.subplots(lines, columns, sharey=True, squeeze=False).flat)
    for axis, each in zip(axes, drawn, strict=False):
        draw_curves(axis, each, settings)
        lines = [
            exponents(each.panel),
            ", ".join(each.panel.details),
            judged(each.verdict, settings),
        ]
        axis.set_title("\n".join(filter(None, lines)), fontsize=11, parse_math=False)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    figure.supxlabel(learning_rate_label(settings))
    figure.supylabel(loss_label(settings))
    handles = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    scale = analysis.scale_of(settings)
    figure.legend(*_in_order(handles), title=scale, loc="outside right center", frameon=False)
    figure.suptitle(
        f"{question(settings)}\n{legend_of(settings)}",
        fontsize=11,
        parse_math=False,
    )
    return figure


def panel_figure(each: Curves, settings: SweepSettings):
    """One panel alone, small enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.9), layout="constrained")
    axis = figure.subplots()
    draw_curves(axis, each, settings)
    axis.set_xlabel(learning_rate_label(settings))
    axis.set_ylabel(loss_label(settings))
    handles, _ = axis.get_legend_handles_labels()
    columns = min(len(handles), 5)
    figure.legend(
        handles=[handle for column in range(columns) for handle in handles[column::columns]],
        title=analysis.scale_of(settings),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
    )
    return figure


def _in_order(handles: dict[str, object]) -> tuple[list, list[str]]:
    labels = sorted(handles, key=int)
    return [handles[label] for label in labels], labels


def draw_curves(axis, each: Curves, settings: SweepSettings) -> None:
    from matplotlib.ticker import MaxNLocator, ScalarFormatter

    searched = isinstance(settings.log2_lr, Range)
    for curve in each.found:
        color = _color(curve.scale, settings)
        known = ~np.isnan(curve.mean)
        x, mean, band = curve.log2_lr[known], curve.mean[known], curve.band[:, known]
        shown = mean.clip(max=each.high)
        style = {"linestyle": "none"} if searched else {}
        axis.plot(x, shown, color=color, marker=".", label=f"{curve.scale}", **style)
        if not searched:
            axis.fill_between(
                x, *band.clip(each.low, each.high), color=color, alpha=0.2, linewidth=0
            )
        lost = mean > each.high
        if lost.any():  # an empty line that is not clipped breaks the layout
            axis.plot(x[lost], shown[lost], "x", color=color, markersize=7, clip_on=False)
        if curve.best <= each.high:
            axis.plot(curve.interval, [curve.best] * 2, color="black", linewidth=3, zorder=3)
            axis.plot(curve.interval, [curve.best] * 2, color=color, linewidth=2, zorder=3)
            axis.plot(
                [curve.optimum.log2_lr],
                [curve.best],
                marker="*",
                markersize=12,
                color=color,
                markeredgecolor="black",
                markeredgewidth=0.7,
                zorder=4,
            )
    if each.low > 0:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.yaxis.minorticks_off()
    axis.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axis.grid(alpha=0.3)
    low, high = ends(settings.log2_lr)
    axis.set_xlim(low - 0.5, high + 0.5)
    axis.set_ylim(each.low, each.high)


@dataclass(frozen=True)
class HeatMap:
    """Mean losses of a network, (multipliers, learning rates): infinite where a seed diverged, NaN where
    no trial is finished."""

    title: str
    losses: np.ndarray


def heat_maps(trials: list[Trial], settings: SweepSettings) -> list[list[HeatMap]]:
    """For each panel its networks' maps, in order of scale; none where a study has no such plane."""
    planes = settings.log2_lr, settings.log2_block_multiplier
    if any(isinstance(values, Range) or len(values) < 2 for values in planes):
        return []
    own, scale = analysis.by_network(trials), analysis.scale_of(settings)
    found = [
        [
            HeatMap(
                f"{panel.name}, {scale} {getattr(network, scale)}", _plane(own[network], settings)
            )
            for network in panel.networks
            if network in own
        ]
        for panel in analysis.panels(settings)
    ]
    return [maps for maps in found if maps]


def _plane(trials: list[Trial], settings: SweepSettings) -> np.ndarray:
    multipliers, rates = map(np.array, (settings.log2_block_multiplier, settings.log2_lr))
    candidates, losses = analysis.candidate_losses(trials, settings, last_slice(settings))
    plane = np.full((len(multipliers), len(rates)), np.nan)
    for candidate, loss in zip(candidates, optima.drawn_curves(losses, 0)[0], strict=True):
        row = np.abs(multipliers - candidate.log2_block_multiplier).argmin()
        column = np.abs(rates - candidate.log2_lr).argmin()
        plane[row, column] = np.fmin(plane[row, column], loss)
    return plane


def heat_figure(maps: list[list[HeatMap]], settings: SweepSettings):
    """Every map of a study, a row a panel."""
    from matplotlib.figure import Figure

    columns = max(map(len, maps))
    figure = Figure(
        figsize=(max(1.5 + 3.0 * columns, 7.0), 1.3 + 2.8 * len(maps)), layout="constrained"
    )
    axes = figure.subplots(len(maps), columns, sharex=True, sharey=True, squeeze=False)
    for line, own in zip(axes, maps, strict=True):
        for axis in line[len(own) :]:
            axis.set_visible(False)
        for axis, each in zip(line, own, strict=False):
            draw_map(figure, axis, each, settings)
            axis.set_title(each.title, fontsize=10, parse_math=False)
    figure.supxlabel(learning_rate_label(settings))
    figure.supylabel("log2 of the block multiplier a")
    figure.suptitle(
        f"{loss_label(settings)}   ★ minimum   — within "
        f"{100 * analysis.COST_LIMIT:g} % of it   × diverged",
        fontsize=11,
    )
    return figure


def map_figure(each: HeatMap, settings: SweepSettings):
    """One map alone, small enough to be read on a phone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.3), layout="constrained")
    axis = figure.subplots()
    draw_map(figure, axis, each, settings)
    axis.set_xlabel(learning_rate_label(settings))
    axis.set_ylabel("log2 of the block multiplier a")
    return figure


def draw_map(figure, axis, each: HeatMap, settings: SweepSettings) -> None:
    from matplotlib.ticker import MaxNLocator

    rates, multipliers = settings.log2_lr, settings.log2_block_multiplier
    finite = np.where(np.isfinite(each.losses), each.losses, np.nan)
    for row, column in np.argwhere(np.isinf(each.losses)):
        axis.plot(rates[column], multipliers[row], "x", color="0.6", markersize=5)
    axis.set_facecolor("0.95")
    axis.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axis.set_yticks(multipliers[:: 1 + (len(multipliers) - 1) // 8])
    axis.set_xlim(*_around(rates)[[0, -1]])
    axis.set_ylim(*_around(multipliers)[[0, -1]])
    if np.isnan(finite).all():
        return
    best = np.nanmin(finite)
    # A tenth above the best is as bad as any worse.
    mesh = axis.pcolormesh(
        _around(rates),
        _around(multipliers),
        np.ma.masked_invalid(finite),
        cmap="cividis_r",
        edgecolors="face",  # or SVG viewers show seams
        linewidth=0.3,
        vmin=best,
        vmax=min(np.nanmax(finite), best + 0.1 * abs(best)),
    )
    clipped = np.nanmax(finite) > mesh.norm.vmax
    bar = figure.colorbar(mesh, ax=axis, extend="max" if clipped else "neither")
    bar.locator = MaxNLocator(5)
    bar.update_ticks()
    level = best + analysis.COST_LIMIT * abs(best)
    if np.nanmax(finite) > level:
        # What diverged is as high as needed for the contour to go around what did not.
        filled = np.where(np.isinf(each.losses), np.nanmax(finite), finite)
        for color, width in (("black", 3.0), ("white", 1.5)):
            axis.contour(
                rates,
                multipliers,
                np.ma.masked_invalid(filled),
                [level],
                colors=color,
                linewidths=width,
            )
    row, column = np.unravel_index(np.nanargmin(finite), finite.shape)
    axis.plot(
        rates[column],
        multipliers[row],
        marker="*",
        markersize=14,
        color="white",
        markeredgecolor="black",
    )


def _around(values: tuple[float, ...]) -> np.ndarray:
    """Edges of cells around values: halfway to the neighbors."""
    points = np.array(values)
    middle = (points[1:] + points[:-1]) / 2
    return np.concatenate([[2 * points[0] - middle[0]], middle, [2 * points[-1] - middle[-1]]])


def _color(scale: int, settings: SweepSettings):
    import matplotlib

    scales = sorted(getattr(settings, analysis.scale_of(settings)))
    # The upper end of viridis is too pale for lines on white.
    return matplotlib.colormaps["viridis"](0.9 * scales.index(scale) / max(len(scales) - 1, 1))


def ends(values: tuple[float, ...] | Range) -> tuple[float, float]:
    return (values.low, values.high) if isinstance(values, Range) else (values[0], values[-1])


def exponents(panel: Panel) -> str:
    own = panel.parametrization
    return f"{own.name} (α = {own.alpha:g}, γ = {own.gamma:g})"


# What a verdict's answer and a sign for it are.
SIGNS = {"transfers": "✓", "does not transfer": "✗", "undecided": "?", "no verdict": "–"}


def judged(verdict: Verdict, settings: SweepSettings) -> str:
    """A verdict in a line; empty for networks of one scale."""
    scale = analysis.scale_of(settings)
    if len(getattr(settings, scale)) == 1:
        return ""
    helps = {True: f"{scale} helps", False: f"{scale} hurts"}.get(verdict.helps)
    return "  ".join([f"{SIGNS[verdict.answer]} {verdict.answer}", *([helps] if helps else [])])


def title(panel: Panel) -> str:
    return ", ".join((exponents(panel), *panel.details))


def question(settings: SweepSettings) -> str:
    scale = analysis.scale_of(settings)
    if len(getattr(settings, scale)) == 1:
        return "What is the best learning rate?"
    return f"Does the best learning rate transfer across {scale}?"


def learning_rate_label(settings: SweepSettings) -> str:
    swept = {("all",): " of all layers"}.get(settings.sweep, "")
    if "all" not in settings.sweep:
        swept = " of the blocks"
    return (
        f"log2 of the learning rate{swept},\n"
        f"as it is at width {settings.base_width}, depth {settings.base_depth}"
    )


def loss_label(settings: SweepSettings) -> str:
    part = last_slice(settings)
    return f"training loss, steps {part.start} to {part.end}"


def data_name(settings: SweepSettings) -> str:
    return settings.data.replace("\\", "/").rpartition("/")[2]


def legend_of(settings: SweepSettings) -> str:
    """What the networks have in common, and what the signs mean."""
    scale = analysis.scale_of(settings)
    other = {"depth": settings.width, "width": settings.depth}[scale]
    shape = f"{'width' if scale == 'depth' else 'depth'} {', '.join(map(str, other))}"
    activations = ", ".join(f"({each})" if "," in each else each for each in settings.activation)
    seeds = f"{settings.seeds} seed{'s' if settings.seeds > 1 else ''}"
    return (
        f"{data_name(settings)}, {shape}, φ = {activations}, {seeds}\n"
        "★ optimum and its 95 % interval   × diverged, or above the scale"
    )
