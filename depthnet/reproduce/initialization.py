"""Kernels at initialization and after the first step: closed forms beside networks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from depthnet._activations import slopes
from depthnet._checks import integers, optional_import
from depthnet.diagnostics.fits import standard_error
from depthnet.reproduce.networks import groups, network, train
from depthnet.reproduce.study import Arrays, Findings, Job, Study, Verdict
from depthnet.theory import initial_kernels, trajectory

CORRELATIONS = (-0.5, 0.0, 0.5, 0.9)
FRACTIONS = np.linspace(0, 1, 9)


@dataclass(frozen=True)
class Initialization(Study):
    name: ClassVar[str] = "init"
    title: ClassVar[str] = "Kernels at initialization follow their closed forms"
    claim: ClassVar[str] = "within 2 % of the closed form at every depth"
    quick: ClassVar[dict[str, Any]] = {"width": 512, "depth": 128, "seeds": 6}

    width: int = 1024
    depth: int = 256
    activations: tuple[str, ...] = ("identity", "relu", "abs")
    seeds: int = 10
    pairs: int = 192

    def __post_init__(self) -> None:
        integers(self, width=1, depth=8, seeds=2, pairs=len(CORRELATIONS))
        for activation in self.activations:
            slopes(activation)

    def inputs(self) -> np.ndarray:
        """Pairs of unit vectors, correlated as in CORRELATIONS, each in a plane of its own."""
        x = np.zeros((self.pairs, 2, self.pairs, 2))
        pair = np.arange(self.pairs)
        r = np.resize(CORRELATIONS, self.pairs)
        x[pair, 0, pair, 0] = 1.0
        x[pair, 1, pair, 0], x[pair, 1, pair, 1] = r, np.sqrt(1 - r * r)
        return x.reshape(1, 2 * self.pairs, 2 * self.pairs)

    def jobs(self) -> list[Job]:
        return [
            Job(f"{activation}-s{seed}", 1.0, partial(self._measure, activation, seed))
            for activation in self.activations
            for seed in range(self.seeds)
        ]

    def _measure(self, activation: str, seed: int, tick) -> Arrays:
        x = self.inputs()
        # Each pair's gradient is that of an output of its own, so that pairs are independent samples.
        y = np.eye(self.pairs).repeat(2, axis=0)[None]
        model = network(activation, x.shape[-1], self.pairs, self.width, self.depth, 1.0, [seed])
        layers = [round(part * self.depth) for part in FRACTIONS]
        (found,) = train(model, x, y, lr=0.0, layers=layers, loss="product", tick=tick)
        return {
            "forward": self._kinds(found.forward_kernel),
            "gradient": self._kinds(found.gradient_kernel),
        }

    def _kinds(self, kernel: np.ndarray) -> np.ndarray:
        """(FRACTIONS, 1 + CORRELATIONS): of an input with itself, and with its partner."""
        first = 2 * np.arange(self.pairs)
        cross = kernel[:, first, first + 1]
        of = np.arange(self.pairs) % len(CORRELATIONS)
        own = np.diagonal(kernel, axis1=1, axis2=2).mean(1)
        return np.stack([own, *(cross[:, of == c].mean(1) for c in range(len(CORRELATIONS)))], 1)

    def findings(self, results: dict[str, Arrays]) -> Findings:
        rows, lines, verdicts, panels = [], [], [], {}
        kinds = ("own", *(f"{r:g}" for r in CORRELATIONS))
        for activation in self.activations:
            limit = initial_kernels(activation, self.inputs())
            at = np.searchsorted(limit.fractions, FRACTIONS)
            worst, decided = [], True
            for which in ("forward", "gradient"):
                kernel = getattr(limit, f"{which}_kernel")[at]
                theory = self._kinds(kernel)
                measured = np.array(
                    [results[f"{activation}-s{s}"][which] for s in range(self.seeds)]
                )
                panels[activation, which] = theory, measured
                # Errors are relative to the size of the vectors, which a kernel near 0 is not.
                scale = theory[:, :1]
                off = abs(measured.mean(0) - theory) / scale
                noise = standard_error(measured) / scale
                worst.append(off.max())
                decided &= bool((abs(off - 0.02) > 2 * noise).all())
                lines.append(
                    (
                        activation,
                        which,
                        *(f"{100 * x:.2f} %" for x in off.max(0)),
                        f"{100 * noise.max():.2f} %",
                    )
                )
                rows += [
                    {
                        "activation": activation,
                        "kernel": which,
                        "pair": kind,
                        "fraction": part,
                        "closed_form": float(theory[f, k]),
                        "measured": float(measured[:, f, k].mean()),
                        "standard_error": float(noise[f, k] * scale[f, 0]),
                    }
                    for f, part in enumerate(FRACTIONS)
                    for k, kind in enumerate(kinds)
                ]
            holds = bool(max(worst) <= 0.02) if decided else None
            words = f"at most {100 * worst[0]:.2f} % off forward, {100 * worst[1]:.2f} % backward"
            verdicts.append(Verdict(f"{activation}: {self.claim}", holds, words))
        header = ("φ", "kernel", "own", *(f"ρ={r:g}" for r in CORRELATIONS), "noise")
        note = "Largest relative errors over the depth, by the inputs' correlation ρ; and of the noise."
        return Findings(rows, header, lines, verdicts, self._figure(panels), [note])

    def _figure(self, panels):
        optional_import("matplotlib", "plot", "drawing the picture")
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * len(self.activations) + 1.5, 5.6), layout="constrained")
        axes = figure.subplots(2, len(self.activations), sharex=True, sharey="row", squeeze=False)
        colours = np.roll(
            matplotlib.colormaps["viridis"](np.linspace(0, 0.9, 1 + len(CORRELATIONS))), 1, axis=0
        )  # by correlation, which an input has 1 of with itself
        names = ("with itself", *(f"ρ = {r:g}" for r in CORRELATIONS))
        for (activation, which), (theory, measured) in panels.items():
            axis = axes[int(which == "gradient"), self.activations.index(activation)]
            for k, (name, colour) in enumerate(zip(names, colours, strict=True)):
                axis.plot(FRACTIONS, theory[:, k], color=colour, linewidth=1)
                error = standard_error(measured[:, :, k])
                axis.errorbar(
                    FRACTIONS,
                    measured[:, :, k].mean(0),
                    error,
                    color=colour,
                    fmt="o",
                    markersize=4,
                    label=name,
                )
            axis.grid(alpha=0.3)
        for axis, activation in zip(axes[0], self.activations, strict=True):
            axis.set_title(f"φ = {activation}", fontsize=11)
        axes[0, 0].set_ylabel("features, ⟨x, x'⟩ / n")
        axes[1, 0].set_ylabel("gradients, ⟨dx, dx'⟩ / n")
        figure.supxlabel("depth l / L")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, title="inputs", loc="outside right center", frameon=False)
        figure.suptitle(
            f"Width {self.width}, depth {self.depth}, {self.seeds} seeds (points); "
            "infinite width and depth (lines)",
            fontsize=11,
        )
        return figure


@dataclass(frozen=True)
class FirstStep(Study):
    name: ClassVar[str] = "first-step"
    title: ClassVar[str] = "The first step of SGD follows the limit's differential equation"
    claim: ClassVar[str] = "within three standard errors of the limit"
    quick: ClassVar[dict[str, Any]] = {"width": 256, "seeds": 12}

    width: int = 512
    depth: int = 256
    activations: tuple[str, ...] = ("identity", "relu", "abs")
    lr: float = 1.0
    chi: float = 0.7
    seeds: int = 24
    group: int = 4

    def __post_init__(self) -> None:
        integers(self, width=1, depth=8, seeds=2, group=1)
        for activation in self.activations:
            slopes(activation)

    def jobs(self) -> list[Job]:
        return [
            Job(f"{activation}-s{seeds[0]}", 1.0, partial(self._measure, activation, seeds))
            for activation in self.activations
            for seeds in groups(self.seeds, self.group)
        ]

    def _problem(self):
        """The same input twice; dLoss/df is chi, whatever f is."""
        return np.ones((2, 1, 1)), np.full((2, 1, 1), self.chi)

    def _measure(self, activation: str, seeds: list[int], tick) -> Arrays:
        model = network(activation, 1, 1, self.width, self.depth, 1.0, seeds)
        layers = [round(part * self.depth) for part in FRACTIONS]
        found = train(model, *self._problem(), lr=self.lr, layers=layers, loss="product", tick=tick)
        return {
            "change": np.array(
                [float(one.outputs[1, 0, 0] - one.outputs[0, 0, 0]) for one in found]
            ),
            "kernel": np.array([one.forward_kernel for one in found]),
        }

    def findings(self, results: dict[str, Arrays]) -> Findings:
        rows, lines, verdicts, panels = [], [], [], {}
        for activation in self.activations:
            own = [results[f"{activation}-s{g[0]}"] for g in groups(self.seeds, self.group)]
            change = np.concatenate([one["change"] for one in own])
            kernel = np.concatenate([one["kernel"] for one in own])
            x, y = self._problem()
            limit = trajectory(
                activation, x[:, 0], y[:, 0, 0], depth=None, lr=self.lr, loss=lambda f, y: y
            )
            at = np.searchsorted(limit.fractions, FRACTIONS)
            theory = limit.forward_kernel[at]
            panels[activation] = theory, kernel
            quantities = {
                "f_1 - f_0": (change, float(limit.outputs[1])),
                "<x_1, x_0> at L": (kernel[:, -1, 1, 0], float(theory[-1, 1, 0])),
                "<x_1, x_1> at L": (kernel[:, -1, 1, 1], float(theory[-1, 1, 1])),
                "<x_1, x_1> at L/2": (kernel[:, 4, 1, 1], float(theory[4, 1, 1])),
            }
            scores = []
            for name, (measured, predicted) in quantities.items():
                mean = float(measured.mean())
                error = float(standard_error(measured))
                scores.append((mean - predicted) / error)
                lines.append((activation, name, predicted, mean, error, f"{scores[-1]:+.1f}"))
                rows.append(
                    {
                        "activation": activation,
                        "quantity": name,
                        "limit": predicted,
                        "measured": mean,
                        "standard_error": error,
                        "seeds": len(measured),
                    }
                )
            worst = max(scores, key=abs)
            verdicts.append(
                Verdict(
                    f"{activation}: {self.claim}",
                    bool(abs(worst) <= 3),
                    f"the farthest of {len(scores)} quantities is {worst:+.1f} standard errors off",
                )
            )
        header = ("φ", "quantity", "limit", "measured", "± s.e.", "s.e. off")
        return Findings(rows, header, lines, verdicts, self._figure(panels))

    def _figure(self, panels):
        optional_import("matplotlib", "plot", "drawing the picture")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(3.2 * len(panels) + 1.5, 3.4), layout="constrained")
        names = {(0, 0): "⟨x₀, x₀⟩", (1, 0): "⟨x₁, x₀⟩", (1, 1): "⟨x₁, x₁⟩"}
        for axis, (activation, (theory, kernel)) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0],
            panels.items(),
            strict=True,
        ):
            for ((i, j), name), colour in zip(
                names.items(), ("#0072B2", "#E69F00", "#009E73"), strict=True
            ):
                axis.plot(FRACTIONS, theory[:, i, j], color=colour, linewidth=1)
                error = standard_error(kernel[:, :, i, j])
                axis.errorbar(
                    FRACTIONS,
                    kernel[:, :, i, j].mean(0),
                    error,
                    color=colour,
                    fmt="o",
                    markersize=4,
                    label=name,
                )
            axis.set_title(f"φ = {activation}", fontsize=11)
            axis.grid(alpha=0.3)
        figure.axes[0].set_ylabel("inner product over n")
        figure.supxlabel("depth l / L")
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False
        )
        figure.suptitle(
            f"Features before (0) and after (1) a step of SGD: width {self.width}, depth {self.depth}, "
            f"{self.seeds} seeds (points);\ninfinite width and depth (lines)",
            fontsize=11,
        )
        return figure
