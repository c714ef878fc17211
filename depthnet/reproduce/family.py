"""The family phi(h) = p max(h, 0) + q max(-h, 0) from the identity to |h|: diversity and training loss."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from depthnet._checks import integers, number, optional_import
from depthnet.diagnostics import residual_stream
from depthnet.diagnostics.diversity import expected_gradient_correlation
from depthnet.diagnostics.fits import mean_interval, standard_error
from depthnet.nn import ResNet
from depthnet.reproduce.study import Arrays, DataStudy, Findings, Job, Verdict
from depthnet.scaling import Parametrization
from depthnet.sweep import optima
from depthnet.sweep.population import trainer
from depthnet.sweep.study import Job as Population
from depthnet.sweep.study import Member, SweepSettings

NAMES = {-45.0: "identity", -11.25: "leaky 0.2", 0.0: "relu", 45.0: "|h|"}
IDENTITY, RELU, ABS = -45.0, 0.0, 45.0
DEPTH_MUP = Parametrization.of("depth_mup")


def slopes(angle: float) -> tuple[float, float]:
    """(p, q) at an angle in degrees, with p^2 + q^2 = 2, so that E phi'^2 = 1 at centered Gaussians."""
    return 2**0.5 * math.cos(math.radians(angle)), 2**0.5 * math.sin(math.radians(angle))


def correlation(angle: float, depth: float = math.inf) -> float:
    """Of the gradients dh^l, dh^{l+1} at initialization, under Depth-muP with the multiplier depth^-1/2.

    In the limit of infinite width phi'(h^l) and phi'(h^{l+1}) are independent of each other and of dx:
    it is `expected_gradient_correlation`, times the correlation of dx^l and dx^{l+1}, which differ by the
    branch's gradient, of variance E phi'^2 / depth = 1 / depth relative to theirs.
    """
    return expected_gradient_correlation(slopes(angle)) / math.sqrt(1 + 1 / depth)


@dataclass(frozen=True)
class Family(DataStudy):
    """
    Args:
        data, data_dir: see depthnet.data.load.
        angles: in degrees, see `slopes`; -45 (identity), 0 (relu) and 45 (abs) are among them.
        width, depth: of the networks that are trained.
        multipliers: grid of the block multiplier, ascending, relative to depth^-1/2.
        log2_lr: least and greatest log2 of the blocks' learning rate, a grid of octaves; input and
            output layers have 2^-7.
        seeds, steps, batch: of training.
        gradient_width, gradient_depth, gradient_batch, gradient_seeds: of the networks whose gradients
            are correlated.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    name: ClassVar[str] = "family"
    title: ClassVar[str] = "Activations from identity to |h|: diversity of gradients, training loss"
    quick: ClassVar[dict[str, Any]] = {"angles": (-45.0, 0.0, 45.0), "depth": 32, "steps": 100}

    data: str = "text"
    data_dir: str | None = None
    angles: tuple[float, ...] = (-45.0, -33.75, -22.5, -11.25, 0.0, 11.25, 22.5, 33.75, 45.0)
    width: int = 64
    depth: int = 64
    multipliers: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    log2_lr: tuple[float, float] = (-10.0, -6.0)
    seeds: int = 4
    steps: int = 300
    batch: int = 64
    gradient_width: int = 256
    gradient_depth: int = 64
    gradient_batch: int = 8
    gradient_seeds: int = 16

    def __post_init__(self) -> None:
        for angle in self.angles:
            if not -45 <= number("angles", angle) <= 45:
                raise ValueError(f"angles must be from -45 to 45 degrees, got {angle}")
        ascending = sorted(set(self.angles)) == list(self.angles)
        if not ascending or not {IDENTITY, RELU, ABS} <= set(self.angles):
            raise ValueError(
                f"angles must be ascending, -45, 0 and 45 among them; got {self.angles}"
            )
        multipliers = [number("multipliers", multiplier) for multiplier in self.multipliers]
        if not multipliers or multipliers[0] <= 0 or sorted(set(multipliers)) != multipliers:
            raise ValueError(f"multipliers must be positive and ascending, got {self.multipliers}")
        integers(self, gradient_depth=2, gradient_width=1, gradient_batch=1)
        integers(self, gradient_seeds=2)  # for a standard error
        self._training(RELU)  # checks the others

    def _training(self, angle: float) -> SweepSettings:
        low, high = self.log2_lr
        return SweepSettings(
            data=self.data,
            data_dir=self.data_dir,
            width=self.width,
            depth=self.depth,
            activation="{!r},{!r}".format(*slopes(angle)),
            log2_lr={"low": low, "high": high, "step": 1.0},
            seeds=self.seeds,
            steps=self.steps,
            batch=self.batch,
            sweep="hidden",
            outer_log2_lr=-7.0,
        )

    @property
    def _grid(self) -> list[tuple[float, float]]:
        """(multiplier, log2 of the learning rate) of each member of a seed."""
        return [(m, lr) for m in self.multipliers for lr in self._training(RELU).log2_lr]

    def jobs(self) -> list[Job]:
        return [
            Job("gradients", 0.5, self._correlate),
            # A multiplier of 0, whatever the activation: the end of every grid.
            Job("no-blocks", 0.1, lambda tick: self._train(tick, RELU, 1, [(0.0, 0.0)])),
            *(
                Job(
                    f"train{angle:+g}",
                    1.0,
                    lambda tick, angle=angle: self._train(tick, angle, self.depth, self._grid),
                )
                for angle in self.angles
            ),
        ]

    def _correlate(self, tick) -> Arrays:
        """Over the n coordinates, mean over samples and layers: correlations (angles, seeds)."""
        data, n, depth = self.dataset, self.gradient_width, self.gradient_depth
        found = np.empty((len(self.angles), self.gradient_seeds))
        for seed in range(self.gradient_seeds):
            model = ResNet(
                data.in_features,
                n,
                depth,
                data.out_features,
                active_features=data.active_features,
                output_std=1.0,  # with the default, blocks have no gradient at first
                base_width=n,
                base_depth=depth,
                generator=torch.Generator().manual_seed(seed),
            )
            x, y = data.batch(seed, 0, self.gradient_batch)
            for row, angle in enumerate(self.angles):
                model.blocks.activation = slopes(angle)
                stream = residual_stream(model, x, lambda f, y=y: functional.cross_entropy(f, y))
                dh = stream.dh.double()
                unit = functional.normalize(dh - dh.mean(-1, keepdim=True), dim=-1, eps=0.0)
                found[row, seed] = (unit[1:] * unit[:-1]).sum(-1).mean()
                tick((seed + (row + 1) / len(self.angles)) / self.gradient_seeds)
        return {"correlations": found}

    def _train(self, tick, angle: float, depth: int, grid: list[tuple[float, float]]) -> Arrays:
        """Every point of a grid with every seed, as one population: losses (seeds, grid), means over
        the last fifth of the steps."""
        settings = self._training(angle)
        (base,) = settings.log2_block_multiplier
        network = replace(settings.networks[0], depth=depth)
        members = [Member(lr, base, 0.0, seed) for seed in range(self.seeds) for _, lr in grid]
        population = trainer(settings, Population("", network, tuple(members)), self.dataset)
        multipliers = [multiplier for multiplier, _ in grid] * self.seeds
        # Afterwards, because a multiplier of 0 has no logarithm.
        population.model.blocks.scale *= torch.tensor(multipliers)
        while not population.done:
            population.train_step()
            tick(population.step / self.steps)
        losses = optima.slice_losses(population.losses, optima.slices(self.steps)[-1])
        return {"losses": losses.reshape(self.seeds, len(grid))}

    def findings(self, results: dict[str, Arrays]) -> Findings:
        measured = dict(zip(self.angles, results["gradients"]["correlations"], strict=True))
        trained = {angle: results[f"train{angle:+g}"]["losses"] for angle in self.angles}
        blockless = results["no-blocks"]["losses"][:, 0]
        best = {angle: self._best(losses, blockless) for angle, losses in trained.items()}
        errors = _errors([best[angle].losses for angle in self.angles])
        return Findings(
            rows=self._rows(measured, trained, blockless),
            header=("angle", "φ", "correlation", "theory", "loss", "a", "log2 lr"),
            lines=[
                (
                    f"{angle:+g}",
                    NAMES.get(angle, ""),
                    f"{own.mean():.4f} ± {_error(own):.4f}",
                    f"{correlation(angle, self.gradient_depth):.4f}",
                    f"{best[angle].losses.mean():.3f} ± {error:.3f}",
                    *best[angle].words(),
                )
                for (angle, own), error in zip(measured.items(), errors, strict=True)
            ],
            verdicts=[*self._judge_correlations(measured), *_judge_losses(best)],
            figure=self._figure(measured, trained, blockless, best, errors),
            notes=self._notes(blockless),
        )

    def _notes(self, blockless: np.ndarray) -> list[str]:
        return [
            "φ(h) = p max(h, 0) + q max(−h, 0), (p, q) = √2 (cos angle, sin angle): E φ'(h)² = 1 for all, "
            "and gradients grow alike over the depth. Branches still differ in size, as blocks "
            "subtract the mean. So block multiplier and learning rate are tuned for each activation; "
            "a factor of φ is one of the multiplier, hence no normalization of φ is favored.",
            f"correlation: of width {self.gradient_width}, depth L = {self.gradient_depth}, mean and "
            f"standard error of {self.gradient_seeds} networks. theory: (p − q)² / (2 (p² + q²)), "
            "times (1 + 1/L)^−1/2.",
            f"loss: of width {self.width}, depth {self.depth}, at the best point of the grid; mean over "
            f"the last fifth of {self.steps} steps on {self.dataset.source['name']} and over "
            f"{self.seeds} seeds. Its error is that of the differences between activations, whose "
            "networks of one seed share initial weights and batches. Without blocks: "
            f"{blockless.mean():.3f}.",
            "a: the block multiplier is a L^−1/2; 0 is a network without blocks. *: at the edge of the "
            "grid, the optimum may lie beyond.",
        ]

    def _best(self, losses: np.ndarray, blockless: np.ndarray) -> _Best:
        """The point of the grid, or no blocks, of least loss, mean over seeds."""
        lowest = int(losses.mean(0).argmin())
        if blockless.mean() <= losses[:, lowest].mean():
            return _Best(0.0, math.nan, blockless, False)
        multiplier, log2_lr = self._grid[lowest]
        ends = self.multipliers[0], self.multipliers[-1]
        return _Best(
            multiplier, log2_lr, losses[:, lowest], multiplier in ends or log2_lr in self.log2_lr
        )

    def _judge_correlations(self, measured: dict[float, np.ndarray]) -> list[Verdict]:
        off, allowed = {}, {}
        for angle, own in measured.items():
            off[angle] = abs(own.mean() - correlation(angle, self.gradient_depth))
            allowed[angle] = 3 * _error(own) + 1 / self.gradient_width  # theory: of infinite width
        worst = max(off, key=lambda angle: off[angle] / allowed[angle])
        others = [own for angle, own in measured.items() if angle != ABS]
        return [
            Verdict(
                "gradients of neighboring layers correlate as (p − q)² / (2 (p² + q²))",
                all(off[angle] <= allowed[angle] for angle in off),
                f"off by {off[worst]:.4f} at {worst:+g}°, the worst case, where three standard errors and "
                f"1/width allow {allowed[worst]:.4f}",
            ),
            _less(
                "they correlate least for |h|",
                measured[ABS],
                min(others, key=np.mean),
                "correlation of |h|, less the next smallest",
            ),
        ]

    def _rows(self, measured, trained, blockless) -> list[dict[str, Any]]:
        def row(quantity, angle, seed, value, multiplier=None, log2_lr=None):
            p, q = (None, None) if angle is None else slopes(angle)
            return {
                "quantity": quantity,
                "angle": angle,
                "p": p,
                "q": q,
                "multiplier": multiplier,
                "log2_lr": log2_lr,
                "seed": seed,
                "value": float(value),
            }

        return [
            *(
                row("correlation", angle, seed, value)
                for angle, own in measured.items()
                for seed, value in enumerate(own)
            ),
            *(row("loss", None, seed, value, 0.0) for seed, value in enumerate(blockless)),
            *(
                row("loss", angle, seed, losses[seed, point], *self._grid[point])
                for angle, losses in trained.items()
                for seed, point in np.ndindex(losses.shape)
            ),
        ]

    def _figure(self, measured, trained, blockless, best, errors):
        optional_import("matplotlib", "plot", "drawing the picture")
        import matplotlib
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        fine = np.linspace(-45, 45, 181)
        theory = [correlation(angle, self.gradient_depth) for angle in fine]
        left.plot(fine, theory, color="black", linewidth=1, label="theory")
        left.errorbar(
            self.angles,
            [own.mean() for own in measured.values()],
            [3 * _error(own) for own in measured.values()],
            fmt="o",
            color="tab:blue",
            capsize=3,
            label="measured, ± 3 standard errors",
        )
        left.set_ylabel("correlation of neighboring layers' gradients")
        left.set_title(f"Initialization: width {self.gradient_width}, depth {self.gradient_depth}")

        shape = len(self.multipliers), -1
        colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(self.multipliers)))
        for row, (multiplier, colour) in enumerate(zip(self.multipliers, colours, strict=True)):
            tuned = [losses.mean(0).reshape(shape)[row].min() for losses in trained.values()]
            label = f"multiplier {multiplier:g} $L^{{-1/2}}$"
            right.plot(self.angles, tuned, color=colour, linewidth=1, marker=".", label=label)
        right.axhline(blockless.mean(), color="grey", linestyle="--", label="without blocks")
        right.errorbar(
            self.angles,
            [best[angle].losses.mean() for angle in self.angles],
            errors,
            color="tab:red",
            marker="o",
            linewidth=2,
            capsize=3,
            label="best multiplier, ± 1 standard error",
        )
        right.set_ylabel("training loss at the best learning rate")
        right.set_title(
            f"Training on {self.dataset.source['name']}: width {self.width}, depth {self.depth}, "
            f"{self.steps} steps, {self.seeds} seeds"
        )
        for axis in (left, right):
            axis.set_xlabel("angle of (p, q), degrees")
            axis.set_xticks([-45, -22.5, 0, 22.5, 45])
            axis.grid(alpha=0.3)
            names = axis.secondary_xaxis("top")
            names.set_xticks(list(NAMES), [name.replace(" ", "\n") for name in NAMES.values()])
            axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, frameon=False)
        figure.suptitle("φ(h) = p max(h, 0) + q max(−h, 0): diverse gradients, and training")
        return figure


@dataclass(frozen=True)
class _Best:
    """losses: (seeds,)."""

    multiplier: float
    log2_lr: float
    losses: np.ndarray
    at_edge: bool

    def words(self) -> tuple[str, str]:
        if self.multiplier == 0:
            return "0", "-"
        return f"{self.multiplier:g}", f"{self.log2_lr:g}{'*' * self.at_edge}"


def _judge_losses(best: dict[float, _Best]) -> list[Verdict]:
    return [
        _less(
            f"{NAMES[better]} trains better than {NAMES[worse]}",
            best[better].losses,
            best[worse].losses,
            f"loss of {NAMES[better]}, less that of {NAMES[worse]}",
            undecided=best[better].at_edge or best[worse].at_edge,
        )
        for better, worse in ((ABS, RELU), (RELU, IDENTITY))
    ]


def _less(claim: str, a: np.ndarray, b: np.ndarray, words: str, undecided=False) -> Verdict:
    """a < b, judged by the interval of their differences seed by seed."""
    found = mean_interval(a - b)
    holds = None if undecided else True if found.high < 0 else False if found.low > 0 else None
    edge = "; an optimum is at the edge of the grid" * undecided
    return Verdict(
        claim,
        holds,
        f"{words}: {found.value:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}{edge}",
    )


def _error(samples: np.ndarray) -> float:
    """The standard error of the mean."""
    return float(standard_error(samples)) if len(samples) > 1 else math.nan


def _errors(losses: list[np.ndarray]) -> list[float]:
    """Standard errors of the means of rows (seeds,), without what all rows of a seed share."""
    table = np.stack(losses)
    with np.errstate(invalid="ignore"):
        return [_error(row) for row in table - table.mean(0)]
