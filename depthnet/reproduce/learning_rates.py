"""Figures 2, 3 and 10 to 13: learning rates and multipliers of one-layer blocks, across depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from depthnet.reproduce.curves import (
    Curves,
    Measured,
    Variant,
    exponents,
    judged,
    less,
    moves,
    stays,
    words,
)
from depthnet.reproduce.study import Verdict
from depthnet.sweep.analysis import COST_LIMIT, DRIFT_LIMIT, Estimate


@dataclass(frozen=True)
class Fig10(Curves):
    name: ClassVar[str] = "fig10"
    title: ClassVar[str] = "Learning rates across depth: Depth-muP, (1/2, 0) and (0, 0) (figure 10)"
    claim: ClassVar[str] = "Does the best learning rate transfer across depth?"

    @classmethod
    def full(cls) -> dict[str, Any]:
        return {**super().full(), "log2_lr": (-12.0, -6.0), "log2_a": (1.0,)}

    def variants(self) -> list[Variant]:
        wide = self.rates(lower=3)  # where the optimum falls fast with depth
        return [
            Variant("depth_mup", "Depth-μP", self.rates(), self.log2_a),
            Variant("half_zero", exponents("half_zero"), self.rates(), self.log2_a, "half_zero"),
            Variant("mup", exponents("mup"), wide, self.log2_a, "mup"),
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        verdicts = [
            rule(f"{name}: the best learning rate {what} with depth, {words(each.part)}", each)
            for variant, name, rule, what in (
                ("depth_mup", "Depth-μP", stays, "stays"),
                ("half_zero", "(1/2, 0)", moves, "moves"),
                ("mup", "(0, 0)", moves, "moves"),
            )
            for each in found[variant]
        ]
        late, standard = found["depth_mup"][-1], found["mup"][-1]
        shallow, deep = self.depths[0], self.depths[-1]
        return [
            *verdicts,
            less(f"Depth-μP: depth {deep} is better than {shallow}, late", (late, -1), (late, 0)),
            less(
                f"(0, 0): depth {deep} is worse than {shallow}, late", (standard, 0), (standard, -1)
            ),
        ]

    def notes(self) -> list[str]:
        return [
            "The paper: CIFAR-10, width 256, depths to 1024, log2 a = 1, 39,100 steps, of which the first "
            "thousand and the 37th are shown (`--full`). (0, 0) has the width rules of μP."
        ]


@dataclass(frozen=True)
class Fig10Hidden(Fig10):
    name: ClassVar[str] = "fig10-hidden"
    title: ClassVar[str] = "Learning rates of the blocks alone across depth (figure 10)"
    claim: ClassVar[str] = (
        "Does the blocks' best learning rate transfer, with that of input and output fixed?"
    )

    sweep: str = "hidden"
    outer_log2_lr: float = -9.0
    schedule: str = "linear"
    steps: int = 300
    log2_lr: tuple[float, float] = (-11.0, -4.0)

    @classmethod
    def full(cls) -> dict[str, Any]:
        return {**super().full(), "schedule": "constant"}


@dataclass(frozen=True)
class Fig10Frozen(Fig10):
    name: ClassVar[str] = "fig10-frozen"
    title: ClassVar[str] = "Learning rates across depth, input and output layers frozen (figure 10)"
    claim: ClassVar[str] = "Does the best learning rate transfer where only blocks are trained?"

    sweep: str = "frozen"
    output_std: float = 1.0
    log2_lr: tuple[float, float] = (-9.0, -3.0)

    def notes(self) -> list[str]:
        return [
            "What the theory treats: input and output layers stay as they are initialized, the output "
            "layer with the standard deviation 1 at the base width over the width."
        ]


@dataclass(frozen=True)
class Fig3(Curves):
    name: ClassVar[str] = "fig3"
    title: ClassVar[str] = "|x| against relu under Depth-muP (figure 3)"
    claim: ClassVar[str] = "Does |x| train better than relu, at every depth?"
    quick: ClassVar[dict[str, Any]] = {"depths": (16, 64), "seeds": 2, "steps": 60}

    data: str = "digits"
    depths: tuple[int, ...] = (16, 64, 256)
    log2_lr: tuple[float, float] = (-12.0, -4.0)
    lr_step: float = 1.0

    @classmethod
    def full(cls) -> dict[str, Any]:
        depths = tuple(2**k for k in range(2, 11))
        return {**super().full(), "depths": depths, "log2_lr": (-14.0, -7.0)}

    def variants(self) -> list[Variant]:
        return [
            Variant(name, label, self.rates(), self.log2_a, activation=name)
            for name, label in (("relu", "relu"), ("abs", "|x|"))
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        relu, absolute = found["relu"][-1], found["abs"][-1]
        return [
            less(f"|x| is better than relu at depth {depth}, late", (absolute, i), (relu, i))
            for i, depth in enumerate(self.depths)
        ]

    def notes(self) -> list[str]:
        return [
            "Each at its best learning rate, with the multiplier of the paper's figure for both. The "
            "study `family` tunes the multiplier, too. The paper's networks, too, go through their images "
            "until the training loss is near e^-3.5."
        ]


@dataclass(frozen=True)
class Fig2(Curves):
    name: ClassVar[str] = "fig2"
    title: ClassVar[str] = "Blocks W phi(x) gain little from depth, and lose to phi(W x) (figure 2)"
    claim: ClassVar[str] = "Is it better to activate before or after the product?"

    @classmethod
    def full(cls) -> dict[str, Any]:
        return {**super().full(), "log2_lr": (-16.0, -10.0), "log2_a": (0.0,)}

    def variants(self) -> list[Variant]:
        return [
            Variant("before", "W φ(x)", self.rates(), self.log2_a, activate="before"),
            Variant("after", "φ(W x)", self.rates(), self.log2_a),
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        before, after = (found[name][-1] for name in ("before", "after"))
        first = next((i for i, depth in enumerate(self.depths) if depth >= 8), 0)
        percent = f"{100 * COST_LIMIT:g} %"
        return [
            stays("W φ(x): the best learning rate stays with depth", before),
            less(
                f"W φ(x): depth {self.depths[-1]} gains less than {percent} over {self.depths[first]}",
                (before, first),
                (before, -1),
                COST_LIMIT,
            ),
            *(
                less(f"at depth {depth} φ(W x) is better than W φ(x)", (after, i), (before, i))
                for i, depth in enumerate(self.depths)
            ),
        ]


@dataclass(frozen=True)
class Fig11(Curves):
    name: ClassVar[str] = "fig11"
    title: ClassVar[str] = "Learning rates across depth under (1, 0), the ODE scaling (figure 11)"
    claim: ClassVar[str] = "Does the best learning rate transfer under (1, 0)?"

    @classmethod
    def full(cls) -> dict[str, Any]:
        depths = tuple(2**k for k in range(1, 10))
        changes = {"depths": depths, "log2_lr": (-13.0, -7.0), "log2_a": (-0.5,)}
        return {**super().full(), **changes}

    def variants(self) -> list[Variant]:
        grid = self.rates()
        return [
            Variant("ode", exponents("ode"), grid, self.log2_a, "ode"),
            Variant("depth_mup", "Depth-μP", grid, self.log2_a),
        ]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        ode, own = found["ode"][-1], found["depth_mup"][-1]
        moved = moves("(1, 0): the best learning rate rises with depth, late", ode)
        if moved.holds and ode.transfer.drift.value < 0:
            moved = Verdict(moved.claim, False, moved.words)
        return [
            moved,
            less(f"Depth-μP is better at depth {self.depths[-1]}, late", (own, -1), (ode, -1)),
        ]

    def notes(self) -> list[str]:
        return [
            f"Both are the same network at depth {self.base_depth}, where exponents say nothing."
        ]


@dataclass(frozen=True)
class Fig12(Curves):
    name: ClassVar[str] = "fig12"
    title: ClassVar[str] = "Learning rates across depth with |x| and a norm in front (figure 12)"
    claim: ClassVar[str] = "Does the best learning rate transfer across depth, with |x| and pre-LN?"

    log2_a: tuple[float, ...] = (-3.0,)

    @classmethod
    def full(cls) -> dict[str, Any]:
        depths = tuple(2**k for k in range(1, 11))
        changes = {"depths": depths, "log2_lr": (-17.0, -11.0), "log2_a": (-3.0,)}
        return {**super().full(), **changes}

    def variants(self) -> list[Variant]:
        blocks = {"activation": "abs", "norm": "layer"}
        label = "Depth-μP"
        half = Variant(
            "half_zero",
            exponents("half_zero"),
            self.rates(),
            self.log2_a,
            "half_zero",
            **blocks,
        )
        return [Variant("depth_mup", label, self.rates(), self.log2_a, **blocks), half]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return [
            stays(
                "Depth-μP: the best learning rate stays with depth, late", found["depth_mup"][-1]
            ),
            moves(
                "(1/2, 0): the best learning rate moves with depth, late", found["half_zero"][-1]
            ),
        ]


@dataclass(frozen=True)
class Fig13(Curves):
    name: ClassVar[str] = "fig13"
    title: ClassVar[str] = "The block multiplier a across depth under Depth-muP (figure 13)"
    claim: ClassVar[str] = "Does the best block multiplier transfer across depth?"
    along: ClassVar[str] = "log2_a"

    log2_lr: tuple[float, float] = (-8.0, -8.0)
    log2_a: tuple[float, ...] = (-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0)

    @classmethod
    def full(cls) -> dict[str, Any]:
        a = tuple(map(float, range(-6, 4)))
        return {**super().full(), "log2_lr": (-10.0, -10.0), "log2_a": a}

    def variants(self) -> list[Variant]:
        label = "Depth-μP"
        return [Variant("depth_mup", label, self.rates(), self.log2_a)]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return [self._converges(each) for each in found["depth_mup"]]

    def _converges(self, each: Measured) -> Verdict:
        """Between the two greatest depths the optimum moves by no more than what transfers."""
        claim = f"the best multiplier converges with depth, {words(each.part)}"
        if len(each.curves) < 2:
            return Verdict(claim, None, "one depth says nothing")
        *_, last, deepest = each.curves
        octaves = math.log2(deepest.scale / last.scale)
        shift = Estimate.of(
            (deepest.optimum.log2_lr - last.optimum.log2_lr) / octaves,
            (deepest.optima - last.optima) / octaves,
        )
        moved, edge = shift.exceeds(DRIFT_LIMIT), deepest.optimum.at_edge or last.optimum.at_edge
        return judged(
            claim,
            None if moved is None or edge else not moved,
            f"from depth {last.scale} to {deepest.scale} log2 a moves by {shift.value:+.2f} "
            f"[{shift.low:+.2f}, {shift.high:+.2f}] a doubling, limit ±{DRIFT_LIMIT:g}"
            + "; at the edge of the grid"
            * edge,
            each,
        )

    def notes(self) -> list[str]:
        return [f"The learning rate is 2^{self.log2_lr[0]:g} at {self.base_depth} blocks, for all."]
