"""report.html: one file that says what a sweep found, readable without a network or scripts."""

from __future__ import annotations

import io
import math
import re
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from depthnet._checks import optional_import
from depthnet.report import figures
from depthnet.report.files import NO_METADATA, SVG
from depthnet.sweep import analysis
from depthnet.sweep.study import Range, SweepSettings

# The class of a verdict's color.
CHIPS = {True: "yes", False: "no", None: "open"}


def render(
    drawn: list[figures.Curves],
    maps: list[list[figures.HeatMap]],
    settings: SweepSettings,
    summary: dict[str, Any],
    environment: dict[str, str],
    files: list[str],
) -> str:
    """The page.

    Args:
        drawn, maps: of figures.all_curves and figures.heat_maps. summary: of `write`.
        environment: what the study ran on. files: names of those beside the page, which it links to.
    """
    jinja = optional_import("jinja2", "report", "the report of a sweep")
    templates = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    panels = [
        _panel(record, panel)
        for record, panel in zip(summary["panels"], analysis.panels(settings), strict=True)
    ]
    curves = [(figures.title(each.panel), figures.panel_figure(each, settings)) for each in drawn]
    whole = [(figures.question(settings), figures.curves_figure(drawn, settings))]
    planes = [(each.title, figures.map_figure(each, settings)) for line in maps for each in line]
    return templates.get_template("report.html.jinja").render(
        settings=settings,
        question=figures.question(settings),
        scale=summary["scale"],
        base=summary["base"],
        headline=summary["headline"],
        whole=_inline(whole, "whole", jinja)[0]["svg"],
        rule=_rule(settings),
        panels=panels,
        notes=notes(summary, settings),
        files=files,
        parquet=summary["parquet"],
        curves=_inline(curves, "curve", jinja),
        curves_note=_curves_note(settings),
        maps=_inline(planes, "map", jinja),
        cost_percent=f"{100 * analysis.COST_LIMIT:g}",
        costs=[
            *(_cost(name, cost) for name, cost in summary["networks"].items()),
            _cost("all", summary["trials"]),
        ],
        setting_rows=[(key, _text(value)) for key, value in asdict(settings).items()],
        environment=environment,
    )


def notes(summary: dict[str, Any], settings: SweepSettings) -> list[str]:
    """Sentences on how far the numbers go."""
    count = summary["trials"]
    found = [
        f"{count['finished']} of {count['planned']} trials are finished, {count['diverged']} diverged."
    ]
    if count["finished"] < count["planned"]:
        found.append("What is not finished is left out.")
    kind = f"{settings.seeds} seeds" if settings.seeds > 1 else "blocks of steps of the one seed"
    found.append(
        f"Intervals are of 95 %, by Student's t from the differences between {kind}"
        + ("." if settings.seeds > 1 else "; they do not tell what other seeds would give.")
    )
    return found


def _rule(settings: SweepSettings) -> str:
    """What the verdicts say."""
    scale = analysis.scale_of(settings)
    if len(getattr(settings, scale)) == 1:
        return f"Networks of one {scale} say nothing of transfer; their optima are below."
    rule = (
        f"A learning rate transfers if the best one moves by at most {analysis.DRIFT_LIMIT:g} octaves "
        f"(factors of 2) per doubling of {scale}"
    )
    if not isinstance(settings.log2_lr, Range):
        rule += (
            f", and if the one tuned at {scale} {analysis.base_scale(settings)} costs at most "
            f"{100 * analysis.COST_LIMIT:g} % of the loss at any other. Where the least learning rate of "
            f"the grid is not {100 * analysis.CONTRAST_LIMIT:g} % worse than the best, there is no verdict"
        )
    return f"{rule}."


def _panel(record: dict[str, Any], panel: analysis.Panel) -> dict[str, Any]:
    parts = record["slices"]
    last = list(parts.values())[-1]
    scales = sorted({size for part in parts.values() for size in part["scales"]}, key=int)
    return {
        "name": panel.name,
        "title": figures.title(panel),
        "verdict": last["answer"],
        "sign": figures.SIGNS[last["answer"]],
        "chip": CHIPS[last["transfers"]],
        "reason": capitalized(last["verdict"].partition(": ")[2]),
        "contrast": "–" if math.isnan(last["contrast"]) else f"{100 * last['contrast']:.1f} %",
        "slices": {
            name: {
                "shift": estimate(part["shift_octaves"]),
                "drift": estimate(part["drift_octaves_per_doubling"]),
            }
            for name, part in parts.items()
        },
        "rows": [
            {
                "scale": size,
                "cells": [optimum_text(part["scales"][size]) for part in parts.values()],
                "loss": loss_text(last["scales"][size], "best_loss"),
                "tuned": loss_text(last["scales"][size], "tuned_loss"),
                "cost": cost_text(last["scales"][size]),
            }
            for size in scales
        ],
    }


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def estimate(found: list[float]) -> str:
    """A value and its interval; a dash if unknown."""
    return "–" if math.isnan(found[0]) else "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)


def optimum_text(cell: dict[str, Any]) -> str:
    """The optimum of a curve, from its record in the summary."""
    if math.isnan(cell["optimum_log2_lr"]):
        return "diverged"
    low, high = cell["optimum_interval"]
    return f"{cell['optimum_log2_lr']:.2f}{'*' if cell['at_edge'] else ''} [{low:.2f}, {high:.2f}]"


def loss_text(cell: dict[str, Any], key: str) -> str:
    return f"{cell[key]:#.4g}" if math.isfinite(cell[key]) else "–"


def cost_text(cell: dict[str, Any]) -> str:
    value = cell["cost"][0]
    if math.isnan(value):
        return "–"
    return "diverges" if math.isinf(value) else analysis.percent(analysis.Estimate(*cell["cost"]))


def _curves_note(settings: SweepSettings) -> str:
    profiled = [
        name
        for name, values in (
            ("block multiplier", settings.log2_block_multiplier),
            ("weight decay", settings.weight_decay),
        )
        if isinstance(values, Range) or len(values) > 1
    ]
    part = figures.last_slice(settings)
    best = f", at the best {' and '.join(profiled)}" if profiled else ""
    mean = f"training loss of steps {part.start} to {part.end}, the mean over seeds{best}"
    drawn = f"Curves: {mean}; bands are its 95 % interval. ★ optimum"
    if isinstance(settings.log2_lr, Range):
        drawn = f"Points: {mean}, of each candidate of the search. ★ the best one"
    return f"{drawn}, with the 95 % interval of where it is. × diverged, or above the scale."


def _cost(name: str, cost: dict[str, float]) -> list[str]:
    seconds, flops = cost["seconds"], cost["flops"]
    return [
        name,
        str(cost["finished"]),
        str(cost["diverged"]),
        f"{seconds:.1f}",
        f"{flops:.3g}",
        f"{flops / seconds:.3g}" if seconds else "–",
    ]


def _text(value: Any) -> str:
    """A setting, where ranges have become {low, high}."""
    if isinstance(value, dict):
        return f"{value['low']:g} to {value['high']:g}"
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _inline(drawings: list[tuple[str, Any]], prefix: str, jinja) -> list[dict[str, Any]]:
    """Titles and SVG elements of figures."""
    markup = jinja.filters.Markup
    return [
        {"title": title, "svg": markup(_svg(figure, title, f"{prefix}{index}"))}
        for index, (title, figure) in enumerate(drawings)
    ]


def _svg(figure, title: str, prefix: str) -> str:
    """An SVG element, whose ids are its own in the page."""
    import matplotlib

    target = io.StringIO()
    with matplotlib.rc_context(SVG):
        figure.savefig(target, format="svg", metadata=NO_METADATA)
    text = target.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
