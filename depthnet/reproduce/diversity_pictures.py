"""The pictures of figures 17 to 19: distances within the stream, and kappa against depth."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np

from depthnet._checks import optional_import
from depthnet.scaling import Parametrization

GUIDES = {0.5: ("--", "ε$^{1/2}$"), 1.0: (":", "ε")}  # d(eps) of noise, and of a smooth path
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito


def fig17(measured):
    """Above initialization, below after training: a panel for each family, and kappa against depth."""
    study, families = measured.study, measured.study.families
    figure, axes = _panels(study, 2, len(families) + 1)
    for row, when in ((0, "initialization"), (-1, f"after {study.steps[-1]} steps")):
        for axis, family in zip(axes[row], families, strict=False):
            _curves(study, measured, axis, family, row, power=0.0)
            axis.set_title(f"{study.label(family)}, {when}", fontsize=10)
        _against_depth(study, measured, axes[row, -1], row)
        axes[row, -1].set_title(f"κ, {when}", fontsize=10)
        axes[row, 0].set_ylabel(f"d(ε) / d({measured.least})")
        axes[row, -1].set_ylim(-0.05, 0.6)
    return figure


def fig18(measured):
    """A row for each family, a column for each time."""
    study = measured.study
    figure, axes = _panels(study, len(study.families), len(study.steps))
    for row, family in enumerate(study.families):
        for step, steps in enumerate(study.steps):
            _curves(study, measured, axes[row, step], family, step, power=0.5)
            axes[row, step].set_title(f"{study.label(family)}, step {steps}", fontsize=10)
        axes[row, 0].set_ylabel(f"d(ε) / ε$^{{1/2}}$, 1 at ε = {measured.least}")
    return figure


def fig19(measured):
    """A panel for each activation, and kappa against depth."""
    study, families = measured.study, measured.study.families
    figure, axes = _panels(study, 1, len(families) + 1)
    for axis, family in zip(axes[0], families, strict=False):
        _curves(study, measured, axis, family, -1, power=0.5)
        axis.set_title(f"{study.label(family)}, step {study.steps[-1]}", fontsize=10)
    axes[0, 0].set_ylabel(f"d(ε) / ε$^{{1/2}}$, 1 at ε = {measured.least}")
    shown = [
        measured.scaled(arrays, -1, 0.5)[1] for found in measured.found.values() for arrays in found
    ]
    for axis in axes[0, :-1]:  # the differences are small
        axis.set_yscale("linear")
        axis.set_ylim(min(map(np.min, shown)) - 0.02, max(map(np.max, shown)) + 0.02)
    _against_depth(study, measured, axes[0, -1], -1)
    axes[0, -1].set_title(f"κ, step {study.steps[-1]}", fontsize=10)
    return figure


def _panels(study, rows: int, columns: int):
    optional_import("matplotlib", "plot", "drawing the picture")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(1.6 + 2.7 * columns, 1.5 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    seeds = f"{study.seeds} seed{'s' if study.seeds > 1 else ''}"
    words = [f"{Path(study.data).name}, width {study.width}, {seeds}"]
    if len(study.activations) == 1:
        words.append(f"φ = {study.activations[0]}")
    if len(study.parametrizations) == 1:
        words.append(str(Parametrization.of(study.parametrizations[0])))
    figure.suptitle(
        f"{study.title}\n{', '.join(words)}; shaded: range of seeds",
        fontsize=11,
        parse_math=False,
    )
    handles = [
        Line2D([], [], color=_shade(study, depth), label=f"{depth}") for depth in study.depths
    ]
    handles += [
        Line2D([], [], color="0.5", linestyle=style, label=label)
        for style, label in GUIDES.values()
    ]
    figure.legend(
        handles=handles, title="depth", loc="outside right center", frameon=False, fontsize=9
    )
    return figure, axes


def _shade(study, depth: int):
    import matplotlib

    place = study.depths.index(depth) / max(len(study.depths) - 1, 1)
    return matplotlib.colormaps["viridis"](0.9 * place)


def _curves(study, measured, axis, family, step: int, power: float) -> None:
    """Means over seeds with their spread, and the two laws that the theory knows as guide lines."""
    for depth, arrays in zip(study.depths, measured.found[family], strict=True):
        epsilons, curves = measured.scaled(arrays, step, power)
        colour = _shade(study, depth)
        axis.plot(epsilons, curves.mean(0), color=colour, marker=".")
        axis.fill_between(epsilons, curves.min(0), curves.max(0), color=colour, alpha=0.2, lw=0)
    least = epsilons[-measured.common]
    for exponent, (style, _) in GUIDES.items():
        axis.plot(
            epsilons, (epsilons / least) ** (exponent - power), color="0.5", ls=style, zorder=0
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xlabel("ε, part of the depth")
    axis.grid(alpha=0.3)


def _against_depth(study, measured, axis, step: int) -> None:
    for place, (family, colour) in enumerate(zip(study.families, cycle(COLOURS))):
        found = measured.intervals(family, step)
        values = [interval.value for interval in found]
        bars = [[i.value - i.low for i in found], [i.high - i.value for i in found]]
        if study.seeds == 1:
            bars = None
        axis.errorbar(
            np.array(study.depths) * 1.05**place,  # so that bars stand side by side
            values,
            bars,
            color=colour,
            marker="o",
            ms=4,
            capsize=3,
            label=study.label(family),
        )
    axis.axhline(0.5, color="0.5", lw=0.8, zorder=0)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("depth")
    axis.grid(alpha=0.3)
    axis.set_ylabel("κ, 95 % intervals")
    axis.margins(y=0.4)  # room for the legend
    axis.legend(fontsize=8, loc="lower left")
