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
from depthnet.sweep import analysis, optima
from depthnet.sweep.study import Range, SweepSettings

# What a verdict's `transfers` is called, its sign and the class of its color.
CHIPS = {
    True: ("transfers", "✓", "yes"),
    False: ("does not transfer", "✗", "no"),
    None: ("undecided", "?", "open"),
}


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
    planes = [(each.title, figures.map_figure(each, settings)) for line in maps for each in line]
    return templates.get_template("report.html.jinja").render(
        settings=settings,
        question=figures.question(settings),
        scale=summary["scale"],
        base=summary["base"],
        answer=_answer(panels, settings),
        panels=panels,
        notes=notes(summary, settings),
        files=files,
        parquet=summary["parquet"],
        curves=_inline(curves, "curve", jinja),
        curves_note=_curves_note(settings),
        maps=_inline(planes, "map", jinja),
        regret_percent=f"{100 * analysis.REGRET_LIMIT:g}",
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
    if settings.seeds > 1:
        found.append(
            f"Intervals are of 95 %, from {optima.SAMPLES} resamplings of the {settings.seeds} seeds "
            "and of blocks of steps within each; where seeds differ much, few of them make intervals too "
            "short."
        )
    else:
        found.append(
            f"Intervals are of 95 %, from {optima.SAMPLES} resamplings of blocks of steps; of one seed, "
            "they do not tell what other seeds would give."
        )
    return found


def _answer(panels: list[dict[str, Any]], settings: SweepSettings) -> str:
    """What a reader wants to know first."""
    scale = analysis.scale_of(settings)
    sizes = getattr(settings, scale)
    if len(sizes) == 1:
        return f"Networks of one {scale} say nothing of transfer; their optima are below."
    answers = []
    for transfers, word in ((True, "yes"), (False, "no"), (None, "undecided")):
        names = [panel["name"] for panel in panels if panel["transfers"] is transfers]
        if names:
            answers.append(f"{word} with {_join(names)}")
    rule = (
        f"A learning rate transfers if the best one moves by at most {analysis.DRIFT_LIMIT:g} octaves "
        f"(factors of 2) per doubling of {scale}"
    )
    if not isinstance(settings.log2_lr, Range):
        rule += (
            f", and if the one tuned at {scale} {analysis.base_scale(settings)} costs at most "
            f"{100 * analysis.REGRET_LIMIT:g} % of the loss at any other"
        )
    return f"From {scale} {min(sizes)} to {max(sizes)}: {'; '.join(answers)}. {rule}."


def _join(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _panel(record: dict[str, Any], panel: analysis.Panel) -> dict[str, Any]:
    parts = record["slices"]
    last = list(parts.values())[-1]
    verdict, sign, chip = CHIPS[last["transfers"]]
    scales = sorted({size for part in parts.values() for size in part["scales"]}, key=int)
    return {
        "name": panel.name,
        "title": figures.title(panel),
        "transfers": last["transfers"],
        "verdict": verdict,
        "sign": sign,
        "chip": chip,
        "reason": capitalized(last["verdict"].partition(": ")[2]),
        "slices": {
            name: {
                "shift": estimate(part["shift_octaves"], part["shift_interval"]),
                "drift": estimate(part["drift_octaves_per_doubling"], part["drift_interval"]),
            }
            for name, part in parts.items()
        },
        "rows": [
            {
                "scale": size,
                "cells": [optimum_text(part["scales"][size]) for part in parts.values()],
                "loss": loss_text(last["scales"][size]),
                "regret": regret_text(last["scales"][size]),
            }
            for size in scales
        ],
    }


def capitalized(text: str) -> str:
    return text[:1].upper() + text[1:]


def estimate(value: float, ends: list[float]) -> str:
    """A value and its interval; a dash if unknown."""
    return "–" if math.isnan(value) else f"{value:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]"


def optimum_text(cell: dict[str, Any]) -> str:
    """The optimum of a curve, from its record in the summary."""
    if math.isnan(cell["optimum_log2_lr"]):
        return "diverged"
    low, high = cell["optimum_interval"]
    return f"{cell['optimum_log2_lr']:.2f}{'*' if cell['at_edge'] else ''} [{low:.2f}, {high:.2f}]"


def loss_text(cell: dict[str, Any]) -> str:
    return f"{cell['best_loss']:#.4g}" if math.isfinite(cell["best_loss"]) else "–"


def regret_text(cell: dict[str, Any]) -> str:
    if math.isnan(cell["regret"]):
        return "–"
    return "diverges" if math.isinf(cell["regret"]) else f"{100 * cell['relative_regret']:.1f} %"


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
