"""Figures 8 and 9: a linear network's features over ten steps of SGD, in width, in depth and in theory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from depthnet._checks import integers, number, optional_import
from depthnet.diagnostics.fits import power_law
from depthnet.reproduce.networks import network, train
from depthnet.reproduce.study import Arrays, DataStudy, Findings, Job, Verdict
from depthnet.theory import Trajectory, linear_trajectory

FRACTIONS = np.array([0, 0.25, 0.5, 0.75, 1])


@dataclass(frozen=True)
class OnData(DataStudy):
    """SGD on the blocks of a network, with the cross-entropy of a data set of vectors.

    `steps` counts states of the network, so that the last one is after steps - 1 updates.
    """

    data: str = "digits"
    data_dir: str | None = None
    steps: int = 11
    batch: int = 1
    lr: float = 0.5

    def __post_init__(self) -> None:
        integers(self, steps=2, batch=1)
        number("lr", self.lr)
        if self.dataset.active_features is not None:
            raise ValueError(f"data: theory is computed for dense vectors, got {self.data!r}")

    @property
    def shown(self) -> list[int]:
        """After how many updates the pictures look: 1, 5 and 10 by default."""
        return sorted({min(1, self.steps - 1), self.steps // 2, self.steps - 1})

    def batches(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (T, batch, d), |x|^2 of about 1, and one-hot targets (T, batch, e)."""
        drawn = [self.dataset.batch(0, step, self.batch) for step in range(self.steps)]
        x = np.stack([x.numpy() for x, _ in drawn]) * self.dataset.in_features**-0.5
        y = np.stack([y.numpy() for _, y in drawn])
        return x, np.eye(self.dataset.out_features)[y]

    def sizes(self, found: Trajectory) -> np.ndarray:
        """(FRACTIONS, T): root mean square of the stream, over the width and a step's batch."""
        at = np.searchsorted(found.fractions, FRACTIONS - 1e-9)
        own = np.diagonal(found.forward_kernel[at], axis1=1, axis2=2)
        return np.sqrt(own.reshape(len(FRACTIONS), self.steps, self.batch).mean(-1))


def predict(study: OnData, depth: int | None) -> Trajectory:
    return linear_trajectory(*study.batches(), depth=depth, lr=study.lr, loss="cross_entropy")


@dataclass(frozen=True)
class Fig8(OnData):
    name: ClassVar[str] = "fig8"
    title: ClassVar[str] = "Wide linear networks approach the infinite-width limit (Fig. 8)"
    claim: ClassVar[str] = (
        "the features' sizes converge to the limit's as width grows, at every depth and step"
    )

    quick: ClassVar[dict[str, Any]] = {"widths": (128, 256, 512, 1024), "seeds": 4}

    depth: int = 64
    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    seeds: int = 6
    batch: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        integers(self, depth=4, widths=1, seeds=2)

    def jobs(self) -> list[Job]:
        jobs = [Job("theory", 0.1, lambda tick: {"sizes": self.sizes(predict(self, self.depth))})]
        for width in self.widths:
            for seed in range(self.seeds):
                cost = (width / 1024) ** 2 + 0.02
                jobs.append(Job(f"n{width}-s{seed}", cost, partial(self._train, width, seed)))
        return jobs

    def _train(self, width: int, seed: int, tick) -> Arrays:
        x, y = self.batches()
        model = network("identity", x.shape[-1], y.shape[-1], width, self.depth, 1.0, [seed])
        layers = [round(part * self.depth) for part in FRACTIONS]
        (found,) = train(model, x, y, lr=self.lr, layers=layers, loss="cross_entropy", tick=tick)
        return {"sizes": self.sizes(found)}

    def findings(self, results: dict[str, Arrays]) -> Findings:
        limit = results["theory"]["sizes"]
        sizes = np.array(
            [[results[f"n{n}-s{s}"]["sizes"] for n in self.widths] for s in range(self.seeds)]
        )  # seeds, widths, fractions, steps
        off = np.sqrt(((sizes / limit - 1) ** 2).mean((2, 3)))
        exponent = power_law(self.widths, off)
        rows = [
            {
                "width": width,
                "seed": seed,
                "layer": round(part * self.depth),
                "step": step,
                "size": float(sizes[seed, w, f, step]),
                "limit": float(limit[f, step]),
            }
            for w, width in enumerate(self.widths)
            for seed in range(self.seeds)
            for f, part in enumerate(FRACTIONS)
            for step in range(self.steps)
        ]
        places = [(f, t) for f in (1, 4) for t in self.shown]
        header = (
            "width",
            "error, all",
            *(f"l={round(FRACTIONS[f] * self.depth)} t={t}" for f, t in places),
        )
        lines = [
            (
                width,
                f"{100 * off[:, w].mean():.2f} %",
                *(
                    f"{100 * abs(sizes[:, w, f, t] / limit[f, t] - 1).mean():.2f} %"
                    for f, t in places
                ),
            )
            for w, width in enumerate(self.widths)
        ]
        holds = True if exponent.high < -0.25 else False if exponent.low > -0.25 else None
        words = (
            f"the relative error falls as n^{exponent.value:.2f} "
            f"[{exponent.low:.2f}, {exponent.high:.2f}], from {100 * off[:, 0].mean():.1f} % at width "
            f"{self.widths[0]} to {100 * off[:, -1].mean():.2f} % at {self.widths[-1]} "
            "(means of n independent numbers: n^-0.5)"
        )
        return Findings(
            rows,
            header,
            lines,
            [Verdict(self.claim, holds, words)],
            _figure(
                self,
                "width n",
                self.widths,
                sizes.mean(0),
                sizes.std(0, ddof=1),
                limit,
                f"Linear network of depth {self.depth} on {self.data}: mean and standard deviation of "
                f"{self.seeds} seeds\ndashed: infinite width, computed",
            ),
        )


@dataclass(frozen=True)
class Fig9(OnData):
    name: ClassVar[str] = "fig9"
    title: ClassVar[str] = (
        "Deep linear networks of infinite width approach the infinite-depth limit (Fig. 9)"
    )
    claim: ClassVar[str] = (
        "at infinite width the features' sizes converge as depth grows, with an error of O(1/L)"
    )

    depths: tuple[int, ...] = (16, 32, 64, 128, 256, 512)

    def __post_init__(self) -> None:
        super().__post_init__()
        integers(self, depths=4)

    def jobs(self) -> list[Job]:
        def of(depth):
            return lambda tick: {"sizes": self.sizes(predict(self, depth))}

        return [
            *(Job(f"L{depth}", (depth / 512) ** 2 + 0.05, of(depth)) for depth in self.depths),
            Job("limit", 0.2, self._limit),
        ]

    def _limit(self, tick) -> Arrays:
        found = predict(self, None)
        return {"sizes": self.sizes(found), "errors": self._size_errors(found)}

    def _size_errors(self, found: Trajectory) -> np.ndarray:
        """The extrapolation's error of `sizes`: half of the relative error of their squares."""
        at = np.searchsorted(found.fractions, FRACTIONS - 1e-9)
        own = np.diagonal(found.error.forward_kernel[at], axis1=1, axis2=2)
        mean = own.reshape(len(FRACTIONS), self.steps, self.batch).mean(-1)
        return mean / (2 * self.sizes(found))

    def findings(self, results: dict[str, Arrays]) -> Findings:
        sizes = np.array([results[f"L{depth}"]["sizes"] for depth in self.depths])
        limit, errors = results["limit"]["sizes"], results["limit"]["errors"]
        off = np.sqrt(((sizes / limit - 1) ** 2)[:, 1:].mean((1, 2)))
        exponent = power_law(self.depths, off[None]).value
        rows = [
            {
                "depth": depth if depth else "limit",
                "fraction": part,
                "step": step,
                "size": float(values[f, step]),
                "error": float(errors[f, step]) if not depth else 0.0,
            }
            for depth, values in [*zip(self.depths, sizes, strict=True), (0, limit)]
            for f, part in enumerate(FRACTIONS)
            for step in range(self.steps)
        ]
        lines = [
            (depth, f"{100 * off[i]:.3f} %", *(float(x) for x in sizes[i, 1:, -1]))
            for i, depth in enumerate(self.depths)
        ]
        lines.append(("limit", "", *(float(x) for x in limit[1:, -1])))
        header = ("depth", "error, all", *(f"{part:g} L" for part in FRACTIONS[1:]))
        steady = bool((np.diff(off) < 0).all())
        words = (
            f"the relative error falls as L^{exponent:.2f}, from {100 * off[0]:.2f} % at depth "
            f"{self.depths[0]} to {100 * off[-1]:.3f} % at {self.depths[-1]}"
            + ("" if steady else ", but not at every doubling")
        )
        holds = steady and abs(exponent + 1) < 0.25
        note = (
            f"The limit is extrapolated; its own relative error is about "
            f"{100 * (errors / limit).max():.3f} %. Columns: size of the features at the last step."
        )
        return Findings(
            rows,
            header,
            lines,
            [Verdict(self.claim, holds, words)],
            _figure(
                self,
                "depth L",
                self.depths,
                sizes,
                np.zeros_like(sizes),
                limit,
                f"Linear network of infinite width on {self.data}, computed\ndashed: infinite depth",
            ),
            [note],
        )


def _figure(study: OnData, label: str, points, sizes, spread, limit, title: str):
    """A panel for each of some steps: sizes (points, FRACTIONS, steps) and their limit."""
    optional_import("matplotlib", "plot", "drawing the picture")
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(FRACTIONS)))
    panels = figure.subplots(1, len(study.shown), sharey=True, squeeze=False)[0]
    for axis, step in zip(panels, study.shown, strict=True):
        for f, colour in enumerate(colours):
            axis.errorbar(
                points,
                sizes[:, f, step],
                spread[:, f, step],
                color=colour,
                marker="o",
                capsize=3,
                label=f"{FRACTIONS[f]:g} L" if f else "input",
            )
            axis.axhline(limit[f, step], color=colour, linestyle="--", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_title(f"after {step} step{'s' * (step != 1)}", fontsize=11)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("root mean square of features")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles[::-1], labels[::-1], title="at layer", loc="outside right center", frameon=False
    )
    figure.suptitle(title, fontsize=11)
    return figure
