"""What the theory predicts for given settings: the study behind `depthnet theory`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from depthnet._checks import optional_import
from depthnet.diagnostics.diversity import expected_gradient_correlation
from depthnet.reproduce.linear import FRACTIONS, OnData
from depthnet.reproduce.study import Arrays, Findings, Job
from depthnet.theory import initial_kernels, linear_trajectory, moments, trajectory


@dataclass(frozen=True)
class Prediction(OnData):
    """depth: None for the limit. Exponents other than (1/2, 1/2) are for activation="identity"."""

    name: ClassVar[str] = "theory"
    title: ClassVar[str] = "A network of infinite width, computed"

    activation: str = "abs"
    depth: int | None = None
    a: float = 1.0
    alpha: float = 0.5
    gamma: float = 0.5
    steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        moments(self.activation)
        if self.activation != "identity" and (self.alpha, self.gamma) != (0.5, 0.5):
            raise ValueError(
                f"activation: training at alpha={self.alpha:g}, gamma={self.gamma:g} is known for "
                f"identity only, got {self.activation!r}"
            )

    def jobs(self) -> list[Job]:
        return [Job("theory", 1.0, self._solve)]

    def _solve(self, tick) -> Arrays:
        x, y = self.batches()
        shared = {"depth": self.depth, "lr": self.lr, "a": self.a, "loss": "cross_entropy"}
        if self.activation == "identity":
            found = linear_trajectory(x, y, alpha=self.alpha, gamma=self.gamma, **shared)
        else:
            found = trajectory(self.activation, x, y, **shared)
        tick(0.9)
        initial = initial_kernels(self.activation, x, depth=self.depth, a=self.a, alpha=self.alpha)
        at = np.searchsorted(initial.fractions, FRACTIONS - 1e-9)
        gradient = np.diagonal(initial.gradient_kernel[at], axis1=1, axis2=2)
        labels = y.argmax(-1)
        f = found.outputs - found.outputs.max(-1, keepdims=True)
        loss = np.log(np.exp(f).sum(-1)) - np.take_along_axis(f, labels[..., None], -1)[..., 0]
        return {
            "sizes": self.sizes(found),
            "growth": np.sqrt(gradient.mean(-1)),
            "loss": loss.mean(1),
        }

    def findings(self, results: dict[str, Arrays]) -> Findings:
        found = results["theory"]
        sizes = found["sizes"]
        rows = [
            {
                "step": step,
                "fraction": part,
                "feature_size": float(sizes[f, step]),
                "initial_gradient_size": float(found["growth"][f]),
                "loss": float(found["loss"][step]),
            }
            for step in range(self.steps)
            for f, part in enumerate(FRACTIONS)
        ]
        header = ("step", "loss", *(f"x at {part:g} L" for part in FRACTIONS))
        lines = [
            (step, float(found["loss"][step]), *(float(x) for x in sizes[:, step]))
            for step in range(self.steps)
        ]
        phi, one = moments(self.activation), np.ones(())
        rate, slope = phi.covariance(one, one, one), phi.slope(one, one, one)
        notes = [
            f"φ = {self.activation}, depth {self.depth or 'infinite'}, a = {self.a:g}, "
            f"(α, γ) = ({self.alpha:g}, {self.gamma:g}). Root mean squares over the width.",
            f"At unit variance: Var φ(h) = {rate:.6g}, E φ'(h)² = {slope:.6g}; gradients of neighboring "
            f"layers correlate by {expected_gradient_correlation(self.activation):.4g} at initialization.",
            "Gradients at initialization, with respect to x at "
            + ", ".join(
                f"{part:g} L: {g:.4g}" for part, g in zip(FRACTIONS, found["growth"], strict=True)
            )
            + " (V at the output being 1).",
        ]
        return Findings(rows, header, lines, [], self._figure(found), notes)

    def _figure(self, found: Arrays):
        optional_import("matplotlib", "plot", "drawing the picture")
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.6), layout="constrained")
        features, loss = figure.subplots(1, 2)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(FRACTIONS)))
        for part, sizes, colour in zip(FRACTIONS, found["sizes"], colours, strict=True):
            features.plot(range(self.steps), sizes, color=colour, marker="o", label=f"{part:g} L")
        features.set_ylabel("root mean square of features")
        loss.plot(range(self.steps), found["loss"], color="#0072B2", marker="o")
        loss.set_ylabel("loss of the step's batch")
        for axis in (features, loss):
            axis.set_xlabel("steps of SGD")
            axis.grid(alpha=0.3)
        figure.legend(
            *features.get_legend_handles_labels(),
            title="layer",
            loc="outside right center",
            frameon=False,
        )
        figure.suptitle(
            f"Infinite width, depth {self.depth or 'infinite'}, computed: "
            f"φ = {self.activation}, {self.data}",
            fontsize=11,
        )
        return figure
