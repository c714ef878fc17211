"""Several steps of SGD on nonlinear networks: Definition E.1 as printed, corrected, and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch

from depthnet._checks import integers, number, one_of, optional_import
from depthnet.diagnostics.fits import standard_error
from depthnet.reproduce.networks import groups, network, train
from depthnet.reproduce.study import Arrays, Findings, Job, Study, Verdict
from depthnet.theory import Trajectory, trajectory

GAIN = 1.5


def _steep_tanh():
    """gain tanh(gain h), which has curvature at variances of order 1, and three derivatives."""

    def t(h):
        return np.tanh(GAIN * h)

    return (
        lambda h: GAIN * t(h),
        lambda h: GAIN**2 * (1 - t(h) ** 2),
        lambda h: -2 * GAIN**3 * t(h) * (1 - t(h) ** 2),
        lambda h: GAIN**4 * (1 - t(h) ** 2) * (6 * t(h) ** 2 - 2),
    )


ACTIVATIONS = {
    "tanh": (_steep_tanh(), lambda h: GAIN * torch.tanh(GAIN * h)),
    "abs": ("abs", "abs"),
    "relu": ("relu", "relu"),
}


@dataclass(frozen=True)
class Training(Study):
    name: ClassVar[str] = "trajectory"
    title: ClassVar[str] = (
        "Training of nonlinear networks: Definition E.1 as printed, corrected, measured"
    )
    claim: ClassVar[str] = (
        "networks approach the corrected definition as depth grows, not the printed one"
    )

    quick: ClassVar[dict[str, Any]] = {"width": 256, "depths": (16, 64), "seeds": 8}

    width: int = 512
    depths: tuple[int, ...] = (16, 64, 256)
    activations: tuple[str, ...] = ("tanh", "abs", "relu")
    lr: float = 0.5
    seeds: int = 24
    group: int = 4

    def __post_init__(self) -> None:
        integers(self, width=1, depths=1, seeds=2, group=1)
        number("lr", self.lr)
        for activation in self.activations:
            one_of("activations", activation, ACTIVATIONS)

    def _problem(self) -> tuple[np.ndarray, np.ndarray]:
        """Four inputs of one feature; dLoss/df is given, so that errors of f do not feed back."""
        inputs, chi = (1.0, 1.3, -0.8, 1.1), (1.0, -1.0, 1.0, 0.5)
        return np.reshape(inputs, (-1, 1, 1)), np.reshape(chi, (-1, 1, 1))

    def jobs(self) -> list[Job]:
        return [
            Job(
                f"{activation}-L{depth}-s{seeds[0]}",
                depth,
                partial(self._measure, activation, depth, seeds),
            )
            for activation in self.activations
            for depth in self.depths
            for seeds in groups(self.seeds, self.group)
        ]

    def _measure(self, activation: str, depth: int, seeds: list[int], tick) -> Arrays:
        model = network(ACTIVATIONS[activation][1], 1, 1, self.width, depth, 1.0, seeds)
        found = train(
            model, *self._problem(), lr=self.lr, layers=[0, depth], loss="product", tick=tick
        )
        return {"quantities": np.array([self._quantities(one) for one in found])}

    def _quantities(self, found: Trajectory) -> np.ndarray:
        """(3, T): outputs, |x|^2 at the last layer, |dx|^2 at the first."""
        last, first = found.forward_kernel[-1], found.gradient_kernel[0]
        return np.array([found.outputs.reshape(-1), np.diagonal(last), np.diagonal(first)])

    def theory(self, activation: str, corrected: bool) -> np.ndarray:
        x, y = self._problem()
        return self._quantities(
            trajectory(
                ACTIVATIONS[activation][0],
                x[:, 0],
                y[:, 0, 0],
                depth=None,
                lr=self.lr,
                corrected=corrected,
                loss=lambda f, y: y,
            )
        )

    def findings(self, results: dict[str, Arrays]) -> Findings:
        rows, lines, verdicts, panels = [], [], [], {}
        names = ("f", "|x^L|^2", "|dx^0|^2")
        for activation in self.activations:
            printed, corrected = (self.theory(activation, which) for which in (False, True))
            measured = np.array(
                [
                    np.concatenate(
                        [
                            results[f"{activation}-L{depth}-s{seeds[0]}"]["quantities"]
                            for seeds in groups(self.seeds, self.group)
                        ]
                    )
                    for depth in self.depths
                ]
            )  # depths, seeds, quantities, steps
            mean = measured.mean(1)
            error = standard_error(measured, axis=1)
            panels[activation] = printed, corrected, mean, error
            rows += [
                {
                    "activation": activation,
                    "quantity": name,
                    "step": step,
                    "depth": depth,
                    "measured": float(mean[d, q, step]),
                    "standard_error": float(error[d, q, step]),
                    "corrected": float(corrected[q, step]),
                    "printed": float(printed[q, step]),
                }
                for q, name in enumerate(names)
                for step in range(mean.shape[-1])
                for d, depth in enumerate(self.depths)
            ]
            lines += [
                (
                    activation,
                    name,
                    step,
                    f"{printed[q, step]:.3f}",
                    f"{corrected[q, step]:.3f}",
                    *(
                        f"{mean[d, q, step]:.3f}±{error[d, q, step]:.3f}"
                        for d in range(len(self.depths))
                    ),
                )
                for q, name in enumerate(names)
                for step in range(1, mean.shape[-1])
            ]
            verdicts.append(self._verdict(activation, printed, corrected, mean, error))
        header = ("φ", "", "t", "printed", "corrected", *(f"L={depth}" for depth in self.depths))
        return Findings(rows, header, lines, verdicts, self._figure(panels))

    def _verdict(self, activation, printed, corrected, mean, error) -> Verdict:
        """Compare distances of the networks' means to the two definitions, less what is noise of them."""
        scale = abs(corrected).mean(-1, keepdims=True)
        noise = np.sqrt(((error / scale) ** 2)[:, :, 1:].mean((1, 2)))

        def distance(theory):
            squares = (((mean - theory) / scale) ** 2)[:, :, 1:].mean((1, 2))
            return np.sqrt(np.maximum(squares - noise**2, 0))

        near, far = distance(corrected), distance(printed)
        approached = near[-1] <= noise[-1] or near[-1] <= near[0] / 2
        holds = bool(approached and near[-1] <= far[-1] / 2)
        shown = [f"{100 * x:.0f} %" if x > n else "none" for x, n in zip(near, noise, strict=True)]
        return Verdict(
            f"{activation}: {self.claim}",
            holds,
            f"relative distances at depths {', '.join(map(str, self.depths))}: to the corrected "
            f"definition {', '.join(shown)} (beyond the noise of {100 * noise[-1]:.0f} %), to the "
            f"printed one {', '.join(f'{100 * x:.0f} %' for x in far)}",
        )

    def _figure(self, panels):
        optional_import("matplotlib", "plot", "drawing the picture")
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 2.4 * len(panels) + 1.2), layout="constrained")
        grid = figure.subplots(len(panels), 3, sharex=True, squeeze=False)
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(self.depths)))
        for line, (activation, (printed, corrected, mean, error)) in zip(
            grid, panels.items(), strict=True
        ):
            for q, axis in enumerate(line):
                steps = np.arange(mean.shape[-1])
                axis.plot(steps, corrected[q], "k-", linewidth=1.5, label="corrected")
                axis.plot(
                    steps,
                    printed[q],
                    color="#D55E00",
                    linestyle="--",
                    linewidth=1.5,
                    label="printed",
                )
                for d, (depth, colour) in enumerate(zip(self.depths, colours, strict=True)):
                    axis.errorbar(
                        steps,
                        mean[d, q],
                        error[d, q],
                        color=colour,
                        fmt="o",
                        markersize=5,
                        label=f"L = {depth}",
                    )
                axis.grid(alpha=0.3)
                axis.set_xticks(steps)
            line[0].set_ylabel(f"φ = {activation}")
        for axis, name in zip(grid[0], ("output f", "‖x^L‖² / n", "‖dx⁰‖² / n"), strict=True):
            axis.set_title(name, fontsize=11)
        figure.supxlabel("steps of SGD")
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(
            f"Networks of width {self.width} ({self.seeds} seeds, points) and the limit of infinite width "
            "and depth (lines)",
            fontsize=11,
        )
        return figure
