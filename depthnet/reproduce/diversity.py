"""Figures 17 to 19: feature diversity at initialization and in training (claims 7.4 and 7.5)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from depthnet._checks import integers, number
from depthnet.diagnostics import residual_stream
from depthnet.diagnostics.diversity import (
    dyadic,
    feature_diversity,
    gradient_diversity,
    kappas,
    quadratic_variation,
    update_diversity,
)
from depthnet.diagnostics.fits import Interval, mean_interval, power_law
from depthnet.diagnostics.linearization import linearization
from depthnet.kernels import slopes
from depthnet.nn import ResNet
from depthnet.optim import AdamW
from depthnet.reproduce import diversity_pictures as pictures
from depthnet.reproduce.study import Arrays, DataStudy, Findings, Job, Verdict
from depthnet.scaling import Parametrization
from depthnet.training.population import PopulationTrainer

BASE_DEPTH, BETAS = 8, (0.9, 0.99)
PROBE_SEED, PROBE_INPUTS = 1_000_000, 16  # a batch that no member trains on
TOLERANCE = 0.05  # of exponents
DEEP = 1024  # where the claims about infinite depth are looked at, if a study is that deep
DETAILS = ("quadratic_variation", "gradients", "updates", "remainder", "relative_remainder")


@dataclass(frozen=True)
class DiversityStudy(DataStudy):
    """Networks trained whole, by AdamW, and their streams on one batch, after some of the steps.

    Args:
        data, data_dir: see depthnet.data.load.
        parametrizations: presets or exponents "ALPHA,GAMMA". activations: names.
        width: n; also the base width. depths: the numbers L of blocks, 32 or more.
        steps: after how many steps the stream is looked at, ascending; the first one is 0.
        seeds: independent networks of each kind, which train as one population.
        batch: of training. lr: the learning rate at depth 8, where all parametrizations are the same.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    data: str = "text"
    data_dir: str | None = None
    parametrizations: tuple[str, ...] = ("depth_mup", "0.75,0.25", "ode")
    activations: tuple[str, ...] = ("abs",)
    width: int = 64
    depths: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048)
    steps: tuple[int, ...] = (0, 100)
    seeds: int = 4
    batch: int = 64
    lr: float = 2**-7

    def __post_init__(self) -> None:
        integers(self, width=1, seeds=1, batch=1, depths=32, steps=0)
        names = tuple(Parametrization.of(name).name for name in self.parametrizations)
        object.__setattr__(self, "parametrizations", names)
        object.__setattr__(self, "depths", tuple(sorted(self.depths)))
        for argument in ("parametrizations", "activations", "depths", "steps"):
            values = getattr(self, argument)
            if not values or len(set(values)) != len(values):
                raise ValueError(
                    f"{argument} must be different from each other, at least one; got {values}"
                )
        if self.steps[0] != 0 or list(self.steps) != sorted(self.steps) or len(self.steps) < 2:
            raise ValueError(f"steps must ascend from 0 and be two at least, got {self.steps}")
        for activation in self.activations:
            slopes(activation)
        if number("lr", self.lr) <= 0:
            raise ValueError(f"lr must be positive, got {self.lr}")

    def jobs(self) -> list[Job]:
        return [
            Job(_name(*family, depth), depth + 8.0, partial(train, self, _look, *family, depth))
            for family in self.families
            for depth in self.depths
        ]

    @property
    def families(self) -> list[tuple[str, str]]:
        """(parametrization, activation) of the networks that differ in depth and seed only."""
        return list(product(self.parametrizations, self.activations))

    def label(self, family: tuple[str, str]) -> str:
        """What distinguishes a family from the others."""
        parametrization = Parametrization.of(family[0])
        exponents = f"({parametrization.alpha:g},{parametrization.gamma:g})"
        if len(self.activations) == 1:
            return exponents
        return family[1] if len(self.parametrizations) == 1 else f"{exponents} {family[1]}"

    def measured(self, results: dict[str, Arrays]) -> _Measured:
        epsilons = dyadic(min(self.depths))
        found = {
            family: [results[_name(*family, depth)] for depth in self.depths]
            for family in self.families
        }
        return _Measured(self, len(epsilons), found)


def _name(parametrization: str, activation: str, depth: int) -> str:
    return f"{parametrization}-{activation}-L{depth}"


# Of a population before training and (inputs, targets): looks at it whenever it is called.
Look = Callable[[ResNet, torch.Tensor, torch.Tensor], Callable[[], Arrays]]


def train(
    study: DiversityStudy,
    look: Look,
    parametrization: str,
    activation: str,
    depth: int,
    tick: Callable[[float], None],
    *,
    block_depth: int = 1,
) -> Arrays:
    """The losses, and what `look` has, arrays with a row for each of study.steps."""
    data = study.dataset
    model = ResNet(
        data.in_features,
        study.width,
        depth,
        data.out_features,
        activation=activation,
        parametrization=parametrization,
        active_features=data.active_features,
        base_width=study.width,
        base_depth=BASE_DEPTH,
        block_depth=block_depth,
        population=study.seeds,
        generator=[torch.Generator().manual_seed(seed) for seed in range(study.seeds)],
    )
    optimizer = AdamW(model, lr=study.lr, betas=BETAS, weight_decay=0.0)
    last = study.steps[-1]
    trainer = PopulationTrainer(model, optimizer, data, range(study.seeds), study.batch, last)
    look_now = look(model, *data.batch(PROBE_SEED, 0, PROBE_INPUTS))
    rows = []
    for step in range(last + 1):
        if step in study.steps:
            rows.append(look_now())
        if step < last:
            trainer.train_step()
            tick((step + 1) / (last + 1))
    return {
        "losses": trainer.losses,
        **{key: np.stack([row[key] for row in rows]) for key in rows[0]},
    }


def _look(model: ResNet, x: torch.Tensor, y: torch.Tensor) -> Callable[[], Arrays]:
    before = model.blocks.weight.detach().clone()

    def loss(outputs):
        labels = y.expand(outputs.shape[:-1])
        return functional.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="sum")

    def look_now() -> Arrays:
        stream = residual_stream(model, x, loss)
        diversity, linear = feature_diversity(stream), linearization(model, before, x)
        return {
            "epsilons": diversity.epsilons,
            "curves": diversity.curves,
            "quadratic_variation": quadratic_variation(stream).numpy(),
            "gradients": gradient_diversity(stream).members,
            "updates": update_diversity(model.blocks.weight - before).members,
            "remainder": linear.network_remainder,
            "relative_remainder": linear.network_relative,
        }

    return look_now


@dataclass(frozen=True)
class _Measured:
    """What jobs returned, by family and depth; kappa is fitted to the same `common` greatest values
    of eps at all depths, so that depths can be compared."""

    study: DiversityStudy
    common: int
    found: dict[tuple[str, str], list[Arrays]]

    @property
    def least(self) -> str:
        """The least common eps."""
        return f"1/{round(1 / dyadic(min(self.study.depths))[0])}"

    def kappas(self, family: tuple[str, str], step: int) -> np.ndarray:
        """(depths, P), after the step-th of study.steps."""
        return np.array(
            [
                kappas(
                    arrays["epsilons"][step, -self.common :],
                    arrays["curves"][step, :, -self.common :],
                )
                for arrays in self.found[family]
            ]
        )

    def intervals(self, family: tuple[str, str], step: int) -> list[Interval]:
        return [mean_interval(members) for members in self.kappas(family, step)]

    def growth(self, family: tuple[str, str], step: int) -> Interval:
        """How kappa changes when the depth doubles: a straight line for each member."""
        return mean_interval(
            np.polyfit(np.log2(self.study.depths), self.kappas(family, step), 1)[0]
        )

    def lines(
        self, show: Callable[[Interval], str], steps: Sequence[int], details: Sequence[str] = ()
    ) -> list[tuple]:
        """Family, depth, kappa as it is shown, means of details at the end, loss."""
        return [
            (
                self.study.label(family),
                depth,
                *(show(mean_interval(self.kappas(family, step)[at])) for step in steps),
                *(round(float(arrays[key][-1].mean()), 3) + 0.0 for key in details),
                _loss(arrays),
            )
            for family, found in self.found.items()
            for at, (depth, arrays) in enumerate(zip(self.study.depths, found, strict=True))
        ]

    def rows(self) -> list[dict[str, Any]]:
        return [
            {
                "parametrization": family[0],
                "activation": family[1],
                "depth": depth,
                "step": steps,
                "kappa": kappa.value,
                "kappa_low": kappa.low,
                "kappa_high": kappa.high,
                **{key: float(arrays[key][step].mean()) for key in DETAILS},
                "loss": _loss(arrays),
            }
            for family, found in self.found.items()
            for step, steps in enumerate(self.study.steps)
            for depth, arrays, kappa in zip(
                self.study.depths, found, self.intervals(family, step), strict=True
            )
        ]

    def scaled(self, arrays: Arrays, step: int, power: float) -> tuple[np.ndarray, np.ndarray]:
        """eps, and d(eps) / eps^power of each member, 1 at the least common eps."""
        epsilons, curves = arrays["epsilons"][step], arrays["curves"][step]
        curves = curves / epsilons**power
        return epsilons, curves / curves[:, -self.common, None]


def interval_text(interval: Interval) -> str:
    return f"{interval.value:.3f}±{interval.high - interval.value:.3f}"


def _loss(arrays: Arrays) -> float:
    return float(arrays["losses"][-10:].mean())


def _diverse(family: tuple[str, str]) -> bool | None:
    """Whether layers stay diverse in the limit of infinite depth; None where the theory is silent."""
    kappa = Parametrization.of(family[0]).classify().diversity_exponent
    return None if kappa is None else kappa > 0


def within(intervals: list[Interval], low: float, high: float) -> bool | None:
    """True if all intervals lie in [low, high], False if one lies outside, None otherwise."""
    if any(interval.high < low or interval.low > high for interval in intervals):
        return False
    return all(low <= interval.low and interval.high <= high for interval in intervals) or None


@dataclass(frozen=True)
class Fig17(DiversityStudy):
    """d(eps) at initialization and after training, by parametrization and depth."""

    name: ClassVar[str] = "fig17"
    title: ClassVar[str] = "Feature diversity: do neighboring layers do different things?"
    quick: ClassVar[dict[str, Any]] = {"depths": (64, 128, 256, 512)}

    def findings(self, results: dict[str, Arrays]) -> Findings:
        measured = self.measured(results)
        header = (
            "network",
            "depth",
            *(f"κ, step {self.steps[at]}" for at in (0, -1)),
            "cos dh",
            "cos ΔW",
            "remainder",
            "loss",
        )
        return Findings(
            measured.rows(),
            header,
            measured.lines(interval_text, (0, -1), ("gradients", "updates", "relative_remainder")),
            self._verdicts(measured),
            pictures.fig17(measured),
            [
                f"κ is fitted to eps from {measured.least} to 1/16, the same "
                f"at all depths; intervals are over {self.seeds} seeds. At initialization branches are "
                "independent noise under every parametrization that is stable, so that κ is 1/2: what the "
                "claims are about is training.",
                f"cos: of neighboring layers' gradients and updates, after {self.steps[-1]} steps. "
                "remainder: the part of a block's change that is not linear in its weights' (claim 7.6).",
            ],
        )

    def _verdicts(self, measured: _Measured) -> list[Verdict]:
        stable = [
            family
            for family in self.families
            if Parametrization.of(family[0]).classify().stable_at_initialization
        ]
        starts = [kappa for family in stable for kappa in measured.intervals(family, 0)]
        verdicts = []
        if starts:
            values = [kappa.value for kappa in starts]
            verdicts.append(
                Verdict(
                    "at initialization κ = 1/2, whatever the parametrization",
                    within(starts, 0.5 - TOLERANCE, 0.5 + TOLERANCE),
                    f"from {min(values):.3f} to {max(values):.3f}",
                )
            )
        deep = [depth for depth in self.depths if depth >= min(DEEP, max(self.depths))]
        for family in self.families:
            diverse, label = _diverse(family), self.label(family)
            if diverse:
                after = measured.intervals(family, -1)[-len(deep) :]
                verdicts.append(
                    Verdict(
                        f"{label}: κ = 1/2 ± {TOLERANCE} in training",
                        within(after, 0.5 - TOLERANCE, 0.5 + TOLERANCE),
                        ", ".join(
                            f"{interval_text(kappa)} at depth {depth}"
                            for kappa, depth in zip(after, deep, strict=True)
                        ),
                    )
                )
            elif diverse is False and len(self.depths) > 1:
                growth = measured.growth(family, -1)
                verdicts.append(
                    Verdict(
                        f"{label}: κ falls towards 0 in deeper networks",
                        within([growth], -np.inf, 0.0),
                        f"{interval_text(growth)} a doubling of depth, to "
                        f"{interval_text(measured.intervals(family, -1)[-1])} at depth {self.depths[-1]}",
                    )
                )
        if len(self.depths) > 1:
            verdicts += [v for family in self.families for v in self._linearized(measured, family)]
        return verdicts

    def _linearized(self, measured: _Measured, family: tuple[str, str]) -> list[Verdict]:
        """Claim 7.6 at a kink: a part L^(-gamma / 2) of a layer's change is not linear in its weights'.

        Nothing to say of the identity, or where the limit is not stable and nontrivial.
        """
        parametrization = Parametrization.of(family[0])
        found = measured.found[family]
        remainders = np.array([arrays["relative_remainder"][-1] for arrays in found])
        if parametrization.classify().layerwise_linearization is None or not (remainders > 0).all():
            return []
        slope, expected = power_law(self.depths, remainders.T), 0 - parametrization.gamma / 2
        return [
            Verdict(
                f"{self.label(family)}: remainder ∝ L^{expected:g} ± {TOLERANCE} (claim 7.6)",
                within([slope], expected - TOLERANCE, expected + TOLERANCE),
                f"L^{interval_text(slope)}",
            )
        ]


@dataclass(frozen=True)
class Fig18(DiversityStudy):
    """d(eps) / eps^(1/2) in the course of training: flat is kappa = 1/2."""

    name: ClassVar[str] = "fig18"
    title: ClassVar[str] = "Feature diversity in the course of training"
    quick: ClassVar[dict[str, Any]] = {"depths": (64, 128, 256)}
    parametrizations: tuple[str, ...] = ("depth_mup", "ode")
    depths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    steps: tuple[int, ...] = (0, 25, 100, 200)

    def findings(self, results: dict[str, Arrays]) -> Findings:
        measured = self.measured(results)
        header = (
            "network",
            "depth",
            *(f"slope, step {step}" for step in self.steps),
            "loss",
        )
        note = (
            "slope: the exponent of eps in d(eps) / eps^(1/2), that is 1/2 - κ; intervals are over "
            f"{self.seeds} seeds."
        )
        return Findings(
            measured.rows(),
            header,
            measured.lines(lambda kappa: interval_text(_slope(kappa)), range(len(self.steps))),
            [v for family in self.families for v in self._verdicts(measured, family)],
            pictures.fig18(measured),
            [note],
        )

    def _verdicts(self, measured: _Measured, family: tuple[str, str]) -> list[Verdict]:
        diverse, label = _diverse(family), self.label(family)
        trained = range(1, len(self.steps))
        if diverse:
            all_slopes = [_slope(i) for step in trained for i in measured.intervals(family, step)]
            values = [interval.value for interval in all_slopes]
            return [
                Verdict(
                    f"{label}: flat, slopes within ± {TOLERANCE}, at all depths and times",
                    within(all_slopes, -TOLERANCE, TOLERANCE),
                    f"slopes from {min(values):+.3f} to {max(values):+.3f}",
                )
            ]
        if diverse is None:
            return []
        verdicts = []
        if len(self.depths) > 1:
            growth = measured.growth(family, -1)
            verdicts.append(
                Verdict(
                    f"{label}: slopes grow with depth",
                    within([growth], -np.inf, 0.0),
                    f"κ changes by {interval_text(growth)} a doubling of depth, after "
                    f"{self.steps[-1]} steps",
                )
            )
        means = np.array(
            [0.5 - measured.kappas(family, step).mean(0) for step in range(len(self.steps))]
        )
        course = ", ".join(
            f"{mean:.3f} at {step}" for mean, step in zip(means.mean(1), self.steps, strict=True)
        )
        if len(trained) > 1:
            change = mean_interval(means[-1] - means[1])
            verdicts.append(
                Verdict(
                    f"{label}: slopes grow with time, from step {self.steps[1]} to {self.steps[-1]}",
                    within([change], 0.0, np.inf),
                    f"by {interval_text(change)}; mean over depths {course}",
                )
            )
        return verdicts


def _slope(kappa: Interval) -> Interval:
    return Interval(0.5 - kappa.value, 0.5 - kappa.high, 0.5 - kappa.low)


@dataclass(frozen=True)
class Fig19(DiversityStudy):
    """d(eps) / eps^(1/2) by activation, under Depth-muP, after training."""

    name: ClassVar[str] = "fig19"
    title: ClassVar[str] = "Feature diversity by activation: is |x| flatter than relu?"
    parametrizations: tuple[str, ...] = ("depth_mup",)
    activations: tuple[str, ...] = ("abs", "relu")
    depths: tuple[int, ...] = (64, 128, 256, 512, 1024)
    steps: tuple[int, ...] = (0, 100)

    def findings(self, results: dict[str, Arrays]) -> Findings:
        measured = self.measured(results)
        first, *others = self.families
        verdicts = []
        for other in others:
            # Members of one number share their batches: differences are taken seed by seed.
            lead = measured.kappas(first, -1).mean(0) - measured.kappas(other, -1).mean(0)
            verdicts.append(
                Verdict(
                    f"{self.label(first)} is flatter than {self.label(other)}",
                    within([mean_interval(lead)], 0.0, np.inf),
                    f"its κ is higher by {interval_text(mean_interval(lead))}, mean over depths",
                )
            )
        return Findings(
            measured.rows(),
            ("network", "depth", *(f"κ, step {self.steps[at]}" for at in (0, -1)), "loss"),
            measured.lines(interval_text, (0, -1)),
            verdicts,
            pictures.fig19(measured),
            [
                "In the limit of infinite depth and small eps κ is 1/2 for all activations. At any eps "
                "noise has a head start where a branch's variance Var φ is larger: 0.36 for |x|, 0.34 for "
                "relu, 1 for the identity."
            ],
        )
