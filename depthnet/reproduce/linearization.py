"""Section 9: with several layers a block, every limit of infinite depth loses something."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from depthnet._checks import integers, optional_import
from depthnet.diagnostics import (
    feature_diversity,
    linearization,
    quadratic_variation,
    residual_stream,
)
from depthnet.diagnostics.fits import power_law
from depthnet.nn import ResNet
from depthnet.reproduce.diversity import (
    DiversityStudy,
    interval_text,
    train,
    within,
)
from depthnet.reproduce.diversity_pictures import COLOURS
from depthnet.reproduce.study import Arrays, Findings, Job, Verdict
from depthnet.scaling import Parametrization, classify
from depthnet.scaling.classification import DIVERSITY, WITHIN_BLOCKS

STABILITY = "stability"
# What is lost is decided halfway between the exponents of presets and (3/4, 1/4), in which it differs.
GROWS, FALLS, PRODUCTS_FALL = 0.25, -0.25, -0.125
TOLERANCES = {"remainder": 0.05, "products": 0.1}  # the theory has no one exponent for products
QUANTITIES = {
    "stream_change": "change of the stream",
    "quadratic_variation": "quadratic variation",
    "remainder": "remainder / change",
    "products": "products / change",
}


@dataclass(frozen=True)
class LinearizationStudy(DiversityStudy):
    """What each parametrization keeps in training: stability, diversity, nonlinear learning in blocks.

    Args:
        block_depths: the numbers k of layers of a block.
        steps: after how many steps networks are looked at, ascending; the first one is 0.  Stability is
            judged at the second one, before training makes up for steps that were too large, and all of
            networks that the theory does not call faithful; the rest at the last one.  Output weights
            start from 0, so that the first step changes no block.
        The others are those of a DiversityStudy, with one activation.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    name: ClassVar[str] = "linearization"
    title: ClassVar[str] = "Deeper blocks: does every limit lose something?"
    quick: ClassVar[dict[str, Any]] = {"depths": (32, 64, 128)}
    parametrizations: tuple[str, ...] = ("depth_mup", "0.75,0.25", "ode", "half_zero")
    block_depths: tuple[int, ...] = (1, 2)
    depths: tuple[int, ...] = (32, 64, 128, 256)
    steps: tuple[int, ...] = (0, 3, 50)
    lr: float = 2**-8

    def __post_init__(self) -> None:
        super().__post_init__()
        integers(self, block_depths=1)
        for argument, least in (("block_depths", 1), ("depths", 2)):
            values = getattr(self, argument)
            if len(set(values)) != len(values) or len(values) < least:
                raise ValueError(f"{argument} must be {least} or more different ones, got {values}")
        if len(self.activations) != 1:
            raise ValueError(f"activations must be one, got {self.activations}")

    def jobs(self) -> list[Job]:
        shapes = product(self.families, self.depths)
        named = list(zip(shapes, super().jobs(), strict=True))
        return [
            Job(
                f"k{k}-{job.name}",
                k * job.cost,
                partial(train, self, _look, *family, depth, block_depth=k),
            )
            for k in self.block_depths
            for (family, depth), job in named
        ]

    def findings(self, results: dict[str, Arrays]) -> Findings:
        networks = [
            _Network(self, family, k, results)
            for k in self.block_depths
            for family in self.families
        ]
        deepest, last = self.depths[-1], self.steps[-1]
        return Findings(
            rows=[row for network in networks for row in network.rows()],
            header=("network", "k", *QUANTITIES.values(), f"κ at {deepest}", "lost", "loss"),
            lines=[network.line() for network in networks],
            verdicts=[verdict for network in networks for verdict in network.verdicts()],
            figure=_figure(self, networks),
            notes=[
                f"k: layers a block. Exponents of L, with 95 % intervals over {self.seeds} seeds, at "
                f"depths {self.depths[0]} to {deepest}, after {last} steps; those of the stream's change, "
                f"and all where there is no faithful limit, after {self.steps[1]}.",
                "remainder: the part of blocks' changes that is not linear in their weights' updates; "
                "products: its part of products of updates of several layers, which is what layers learn "
                "together; the rest is due to kinks of φ.",
                f"lost, as measured: {STABILITY} if the stream's change grows faster than L^{GROWS}; "
                f"{DIVERSITY} if the quadratic variation falls faster than L^{FALLS}; "
                f"{WITHIN_BLOCKS} if the products' part falls faster than L^{PRODUCTS_FALL}.",
            ],
        )


def _look(model: ResNet, inputs: torch.Tensor, _) -> Callable[[], Arrays]:
    before = model.blocks.weight.detach().clone()
    start = residual_stream(model, inputs).x[-1]

    def look_now() -> Arrays:
        stream, split = residual_stream(model, inputs), linearization(model, before, inputs)
        diversity = feature_diversity(stream)
        change = (stream.x[-1] - start).double()
        return {
            "epsilons": diversity.epsilons,
            "curves": diversity.curves,
            "stream_change": change.square().mean((-2, -1)).sqrt().numpy(),
            "quadratic_variation": quadratic_variation(stream).numpy(),
            "remainder": split.network_relative,
            "products": split.network_products,
        }

    return look_now


class _Network:
    """What was measured of one parametrization with blocks of k layers, at all depths."""

    def __init__(self, study: LinearizationStudy, family: tuple[str, str], k: int, results):
        prefix = f"k{k}-"
        self.study, self.family, self.block_depth = study, family, k
        self.measured = study.measured(
            {
                name.removeprefix(prefix): arrays
                for name, arrays in results.items()
                if name.startswith(prefix)
            }
        )
        parametrization = Parametrization.of(family[0])
        self.alpha, self.gamma = parametrization.alpha, parametrization.gamma
        self.theory = classify(self.alpha, self.gamma, k)
        self.look = -1 if self.theory.faithful else 1
        self.exponents = {
            name: power_law(study.depths, self.values(name).T)
            for name in QUANTITIES
            if name != "products" or k > 1
        }

    def values(self, name: str) -> np.ndarray:
        """(depths, P)."""
        look = 1 if name == "stream_change" else self.look
        return np.array([arrays[name][look] for arrays in self.measured.found[self.family]])

    @property
    def predicted(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest exponent that the theory expects, if L is large."""
        change, variation = 1 - self.alpha - self.gamma, 1 - 2 * self.alpha
        return {
            "stream_change": (change, change),
            "quadratic_variation": (variation, variation),
            "remainder": (-self.gamma / 2, -self.gamma / 2),
            "products": (-2 * self.gamma, -self.gamma),
        }

    @property
    def lost(self) -> tuple[str, ...] | None:
        """As measured; None where an interval does not decide."""
        answers = {
            STABILITY: within([self.exponents["stream_change"]], GROWS, np.inf),
            DIVERSITY: within([self.exponents["quadratic_variation"]], -np.inf, FALLS),
        }
        if self.block_depth > 1:
            answers[WITHIN_BLOCKS] = within([self.exponents["products"]], -np.inf, PRODUCTS_FALL)
        if self.theory.faithful is None and answers[STABILITY]:
            return (STABILITY,)  # of what explodes, nothing else is claimed
        if None in answers.values():
            return None
        return tuple(name for name, answer in answers.items() if answer)

    @property
    def label(self) -> str:
        return self.study.label(self.family)

    def line(self) -> tuple:
        lost = self.lost
        kappa = self.measured.intervals(self.family, self.look)[-1]
        return (
            self.label,
            self.block_depth,
            *(str(self.exponents.get(name, "")) for name in QUANTITIES),
            interval_text(kappa),
            "undecided" if lost is None else ", ".join(lost) or "nothing",
            round(float(self._losses()[-1]), 3),
        )

    def rows(self) -> list[dict[str, Any]]:
        kappas = self.measured.intervals(self.family, self.look)
        return [
            {
                "parametrization": self.family[0],
                "block_depth": self.block_depth,
                "depth": depth,
                "step": self.study.steps[self.look],
                "stream_change_step": self.study.steps[1],
                **{name: float(self.values(name)[at].mean()) for name in QUANTITIES},
                "kappa": kappas[at].value,
                "kappa_low": kappas[at].low,
                "kappa_high": kappas[at].high,
                "loss": float(self._losses()[at]),
            }
            for at, depth in enumerate(self.study.depths)
        ]

    def _losses(self) -> np.ndarray:
        return np.array([a["losses"][-10:].mean() for a in self.measured.found[self.family]])

    def verdicts(self) -> list[Verdict]:
        layers = f"{self.block_depth} layer{'s' if self.block_depth > 1 else ''} a block"
        name = f"{self.label}, {layers}"
        expected = self.theory.lost
        if expected is None:
            if self.theory.stable_in_training is not False:
                return []
            expected = (STABILITY,)
        lost = self.lost
        kappa = self.measured.intervals(self.family, self.look)[-1]
        verdicts = [
            Verdict(
                f"{name}: loses {' and '.join(expected) or 'nothing'}",
                None if lost is None else lost == expected,
                ", ".join(
                    f"{QUANTITIES[each]} ∝ L^{interval_text(self.exponents[each])}"
                    for each in ("stream_change", "quadratic_variation", "products")
                    if each in self.exponents
                )
                + f", κ {interval_text(kappa)} at depth {self.study.depths[-1]}",
            )
        ]
        if self.theory.faithful:
            verdicts += [
                self._exponent(name, each) for each in TOLERANCES if each in self.exponents
            ]
        return verdicts

    def _exponent(self, name: str, quantity: str) -> Verdict:
        low, high = (0.0 + each for each in self.predicted[quantity])
        tolerance = TOLERANCES[quantity]
        text = f"L^{low:g}" if low == high else f"a power of L from {low:g} to {high:g}"
        found = self.exponents[quantity]
        return Verdict(
            f"{name}: {QUANTITIES[quantity]} ∝ {text} ± {tolerance:g}",
            within([found], low - tolerance, high + tolerance),
            f"L^{interval_text(found)}",
        )


def _figure(study: LinearizationStudy, networks: list[_Network]):
    """A row for each block depth, a column for each quantity; predicted slopes dashed."""
    optional_import("matplotlib", "plot", "drawing the picture")
    from matplotlib.figure import Figure

    rows, columns = len(study.block_depths), len(QUANTITIES)
    figure = Figure(figsize=(1.6 + 3.0 * columns, 1.2 + 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True)
    figure.suptitle(
        f"{study.title}\n{Path(study.data).name}, width {study.width}, φ = {study.activations[0]}, "
        f"{study.steps[-1]} steps; shaded: range of {study.seeds} seeds; dashed: predicted",
        fontsize=11,
    )
    depths = np.array(study.depths)
    for network in networks:
        row = study.block_depths.index(network.block_depth)
        color = COLOURS[study.families.index(network.family) % len(COLOURS)]
        for axis, name in zip(axes[row], QUANTITIES, strict=True):
            if name not in network.exponents:
                continue
            values = network.values(name)
            axis.plot(depths, values.mean(1), color=color, marker=".", label=network.label)
            axis.fill_between(depths, values.min(1), values.max(1), color=color, alpha=0.2, lw=0)
            if network.theory.faithful or name == "stream_change":
                for exponent in network.predicted[name]:
                    guide = values[-1].mean() * (depths / depths[-1]) ** exponent
                    axis.plot(depths, guide, color=color, ls="--", lw=0.8, zorder=0)
    for row, k in enumerate(study.block_depths):
        for axis, (name, words) in zip(axes[row], QUANTITIES.items(), strict=True):
            if name == "products" and k == 1:
                axis.set_axis_off()
                continue
            axis.set_title(f"k = {k}: {words}", fontsize=10)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.grid(alpha=0.3)
    figure.supxlabel("depth L")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title="(α,γ)", loc="outside right center", frameon=False)
    return figure
