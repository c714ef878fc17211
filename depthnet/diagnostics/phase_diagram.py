"""The phase diagram of (alpha, gamma), measured: figure 1 of Tensor Programs VI (arXiv 2310.02244).

Networks x^l = x^{l-1} + L^-alpha MS(phi(W^l x^{l-1})) take a few small steps at a learning rate
proportional to L^-gamma; the powers of the depth L that five sizes follow say in which region of the
diagram (alpha, gamma) lies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from depthnet._checks import integers, number, one_of, optional_import
from depthnet.data import Dataset, load
from depthnet.diagnostics.fits import Interval, power_law
from depthnet.diagnostics.stream import Stream, residual_stream
from depthnet.kernels import slopes
from depthnet.nn import ResNet
from depthnet.optim import SGD, AdamW
from depthnet.scaling import Parametrization, classify
from depthnet.training.population import PopulationTrainer

REGIONS = (
    "unstable at initialization",
    "unstable in training",
    "trivial",
    "unfaithful",
    "redundant",
    "diverse",
)
UNDECIDED = "undecided"

# In the order of claims 7.1 to 7.5: a size, which way it must go with depth, and the region if it does.
# What does none of these is in the last region.
QUESTIONS = (
    ("stream", "grows", REGIONS[0]),
    ("stream_change", "grows", REGIONS[1]),
    ("output_change", "vanishes", REGIONS[2]),
    ("preactivation_change", "grows", REGIONS[3]),
    ("quadratic_variation", "vanishes", REGIONS[4]),
)
QUANTITIES = tuple(quantity for quantity, _, _ in QUESTIONS)

# So small that the response is linear, one or two percent under Depth-muP, and that the loss does not
# saturate where changes grow; what vanishes still stays far above the rounding of float32.
LEARNING_RATES = {"adamw": 2.0**-12, "sgd": 2.0**-6}
MEMORY = 2**30  # bytes that one population may take


@dataclass(frozen=True)
class PhaseSettings:
    """Which cells are measured, and on which networks.

    Args:
        alphas, gammas: least and greatest exponent, whole steps of `spacing` apart.
        depths: the numbers L of blocks, ascending.  Multiplier and learning rate are powers of L itself
            (base depth 1, as in the paper's definition), so that at depths of 64 and more, factors such as
            exp(L^(1 - 2 alpha)) that tend to 1 have nearly done so, and do not pass for powers.
        width: n. seeds: networks a cell. steps, batch: of training.
        optimizer: `adamw` (without weight decay) or `sgd`.  Adam's exponents are cleaner: its updates do
            not feel by which factor gradients grow on their way back.
        activation: a name.
        data, data_dir: see depthnet.data.load.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    alphas: tuple[float, float] = (0.25, 1.25)
    gammas: tuple[float, float] = (-0.25, 0.75)
    spacing: float = 0.125
    depths: tuple[int, ...] = (64, 256, 1024)
    width: int = 64
    seeds: int = 12
    steps: int = 5
    batch: int = 32
    optimizer: str = "adamw"
    activation: str = "abs"
    data: str = "digits"
    data_dir: str | None = None

    def __post_init__(self) -> None:
        integers(self, width=2, seeds=2, steps=1, batch=1)
        if number("spacing", self.spacing) <= 0:
            raise ValueError(f"spacing must be positive, got {self.spacing}")
        for argument in ("alphas", "gammas"):
            low, high = (number(argument, value) for value in getattr(self, argument))
            cells = (high - low) / self.spacing
            if cells < 0 or abs(cells - round(cells)) > 1e-6:
                raise ValueError(
                    f"{argument} must be two numbers, the lower first, whole steps of "
                    f"{self.spacing:g} apart, got {low:g} and {high:g}"
                )
        integers(self, depths=1)
        if len(self.depths) < 2 or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths must be two at least, ascending, got {self.depths}")
        one_of("optimizer", self.optimizer, LEARNING_RATES)
        slopes(self.activation)

    @property
    def grid(self) -> tuple[np.ndarray, np.ndarray]:
        """The values of alpha and of gamma, ascending."""
        return tuple(
            low + self.spacing * np.arange(round((high - low) / self.spacing) + 1)
            for low, high in (self.alphas, self.gammas)
        )

    @property
    def members(self) -> np.ndarray:
        """Every network (alpha, gamma, seed): (cells * seeds, 3), gamma and seed running fastest."""
        axes = np.meshgrid(*self.grid, np.arange(self.seeds), indexing="ij")
        return np.stack([axis.ravel() for axis in axes], -1)

    def chunks(self, depth: int) -> list[np.ndarray]:
        """The members, in parts that fit in MEMORY as one population of this depth."""
        # Weights, gradients, two moments; the streams and pre-activations before and after training,
        # the latter twice while they are stacked.
        each = 4 * depth * self.width * (4 * self.width + 6 * self.batch)
        size = max(MEMORY // each, 1)
        return [self.members[first : first + size] for first in range(0, len(self.members), size)]


def measure(
    settings: PhaseSettings,
    data: Dataset,
    depth: int,
    members: np.ndarray,
    progress: Callable[[float], Any] = lambda part: None,
) -> dict[str, np.ndarray]:
    """Train networks of one depth as a population, and measure their five sizes.

    Only the blocks are trained.  Every size is a root mean square over width and a batch that is not
    trained on, and is relative to what it is a change of, at initialization: factors that both share,
    such as the growth of the stream through the blocks, cancel.

    | key | size |
    |---|---|
    | stream | x_0^L, relative to x_0^0 |
    | stream_change | x_t^L - x_0^L |
    | output_change | f_t - f_0 |
    | preactivation_change | h_t^l - h_0^l, over all blocks l |
    | quadratic_variation | after training, sum over l of ||x_t^l - x_t^{l-1}||^2 / ||x_t^{l-1}||^2 |

    Args:
        members: rows (alpha, gamma, seed), P of them.  One seed has the same initial weights in all cells,
            and the same input layer, output layer and batches at all depths.
        progress: called with the part that is done, from 0 to 1.

    Returns:
        float64 arrays (P,), by key.  Where a network diverged they are not finite.
    """
    model, optimizer = _population(settings, data, depth, members)
    seeds = [int(seed) for seed in members[:, 2]]
    trainer = PopulationTrainer(model, optimizer, data, seeds, settings.batch, settings.steps)
    probes = {seed: data.batch(seed, settings.steps, settings.batch)[0] for seed in set(seeds)}
    inputs = torch.stack([probes[seed] for seed in seeds])
    before = residual_stream(model, inputs)
    for step in range(settings.steps):
        progress((step + 1) / (settings.steps + 2))
        trainer.train_step()
    progress((settings.steps + 1) / (settings.steps + 2))
    sizes = _sizes(before, residual_stream(model, inputs))
    return {name: size.numpy() for name, size in sizes.items()}


def _population(settings: PhaseSettings, data: Dataset, depth: int, members: np.ndarray):
    """A model with a branch multiplier, and an optimizer with a learning rate, for each member."""
    width = settings.width
    rules = [
        Parametrization(alpha, gamma).rule(
            "hidden",
            fan_in=width,
            width=width,
            depth=depth,
            base_width=width,
            base_depth=1,
            block_multiplier=1.0,
        )
        for alpha, gamma in members[:, :2].tolist()
    ]
    model = ResNet(
        data.in_features,
        width,
        depth,
        data.out_features,
        activation=settings.activation,
        active_features=data.active_features,
        output_std=width**-0.5,  # outputs of size 1, so that the softmax is not saturated
        base_width=width,
        population=len(members),
        generator=[torch.Generator().manual_seed(int(seed)) for seed in members[:, 2]],
    )
    # By default a generator goes on to the output layer after L blocks; with one output layer at every
    # depth, changes vary half as much from depth to depth, or less.
    model.output.reset_parameters(
        [torch.Generator().manual_seed(2**32 + int(seed)) for seed in members[:, 2]]
    )
    model.input.requires_grad_(False)
    model.output.requires_grad_(False)
    model.blocks.scale = torch.tensor([rule.multiplier for rule in rules])
    group = next(g for g in model.param_groups(settings.optimizer) if g["name"] == "hidden")
    group["lr"] = LEARNING_RATES[settings.optimizer]
    group["lr_scale"] = torch.tensor([rule.lr_scale(settings.optimizer) for rule in rules])
    group["eps_scale"] = torch.tensor([rule.eps_scale() for rule in rules])
    if settings.optimizer == "sgd":
        return model, SGD([group])
    return model, AdamW([group], weight_decay=0.0)


def _sizes(before: Stream, after: Stream) -> dict[str, Tensor]:
    branch = _square(after.x.diff(dim=0)) / _square(after.x[:-1])
    preactivation = _square(after.h - before.h).sum(0) / _square(before.h).sum(0)
    return {
        "stream": (_square(before.x[-1]) / _square(before.x[0])).sqrt(),
        "stream_change": (_square(after.x[-1] - before.x[-1]) / _square(before.x[-1])).sqrt(),
        "output_change": (_square(after.outputs - before.outputs) / _square(before.outputs)).sqrt(),
        "preactivation_change": preactivation.sqrt(),
        "quadratic_variation": branch.sum(0),
    }


def _square(tensor: Tensor) -> Tensor:
    """The squared norm over batch and width, in float64: no square of a float32 overflows there."""
    return torch.linalg.vector_norm(tensor, dim=(-2, -1), dtype=torch.float64).square()


def exponent(depths: np.ndarray, sizes: np.ndarray) -> Interval:
    """The power of the depth that sizes (seeds, depths) follow, with its interval over seeds.

    It is +inf if a size is not finite, which is how an explosion ends, and -inf if one is 0.
    """
    if not np.isfinite(sizes).all():
        return Interval(math.inf, math.inf, math.inf)
    if (sizes == 0).any():
        return Interval(-math.inf, -math.inf, -math.inf)
    return power_law(depths, sizes)


def decide(exponents: dict[str, Interval], spacing: float) -> str:
    """The region that measured exponents belong to, or UNDECIDED.

    Claims 7.1 to 7.5 are asked one after another, each only if those before leave it open.  A size grows,
    or vanishes, if the whole interval of its exponent is beyond a threshold, and does not if the whole
    interval is short of it.  The threshold lies halfway between 0 and the exponent of the next cell:
    changes follow L^(1 - alpha - gamma) (or, of h, L^-gamma), whose exponent moves by `spacing` from cell
    to cell; that of the quadratic variation, L^(1 - 2 alpha), moves by twice as much.  The stream follows
    exp(c L^(1 - 2 alpha) / 2), no power; c is the variance of phi of a standard normal, 0.36 for |x|.
    Just below alpha = 1/2, its logarithm has the slope c spacing L^(2 spacing) in log L, which is beyond
    the threshold of spacing / 2 from L^(2 spacing) = 1 / (2 c) on: with cells 1/8 apart, from depth 4.
    """
    for quantity, direction, region in QUESTIONS:
        threshold = spacing if quantity == "quadratic_variation" else spacing / 2
        interval = exponents[quantity]
        low, high = interval.low, interval.high
        if direction == "vanishes":
            low, high = -high, -low
        if low > threshold:
            return region
        if not high <= threshold:
            return UNDECIDED
    return REGIONS[-1]


def region(alpha: float, gamma: float) -> str:
    """The region that claims 7.1 to 7.5 put (alpha, gamma) in."""
    claims = classify(alpha, gamma)
    answers = (
        not claims.stable_at_initialization,
        claims.stable_in_training is False,
        claims.nontrivial is False,
        claims.faithful is False,
        claims.redundant,
        True,
    )
    return REGIONS[answers.index(True)]


@dataclass(frozen=True)
class Cell:
    """One (alpha, gamma): its measured exponents, by quantity, and its region: measured, and in theory."""

    alpha: float
    gamma: float
    exponents: dict[str, Interval]
    measured: str
    theory: str

    @property
    def agrees(self) -> bool:
        return self.measured == self.theory


@dataclass(frozen=True)
class PhaseDiagram:
    """What was measured.

    sizes: by quantity (see `measure`), float64 (alphas, gammas, seeds, depths).
    """

    settings: PhaseSettings
    sizes: dict[str, np.ndarray]

    @classmethod
    def of(
        cls, settings: PhaseSettings, parts: dict[int, list[dict[str, np.ndarray]]]
    ) -> PhaseDiagram:
        """Put together what `measure` returned for the chunks of each depth, in order."""
        shape = (*map(len, settings.grid), settings.seeds)
        sizes = {
            quantity: np.stack(
                [
                    np.concatenate([part[quantity] for part in parts[depth]]).reshape(shape)
                    for depth in settings.depths
                ],
                axis=-1,
            )
            for quantity in QUANTITIES
        }
        return cls(settings, sizes)

    @cached_property
    def cells(self) -> list[Cell]:
        """Every cell, gamma running fastest."""
        found = []
        for i, alpha in enumerate(self.settings.grid[0].tolist()):
            for j, gamma in enumerate(self.settings.grid[1].tolist()):
                exponents = {
                    quantity: exponent(np.array(self.settings.depths), sizes[i, j])
                    for quantity, sizes in self.sizes.items()
                }
                measured = decide(exponents, self.settings.spacing)
                found.append(Cell(alpha, gamma, exponents, measured, region(alpha, gamma)))
        return found

    @property
    def agreeing(self) -> int:
        """The number of cells measured to be where theory has them."""
        return sum(cell.agrees for cell in self.cells)

    @property
    def disagreeing(self) -> list[Cell]:
        """The other cells."""
        return [cell for cell in self.cells if not cell.agrees]

    def figure(self):
        """A map: cells colored by their measured region, theory's boundaries and names drawn over."""
        optional_import("matplotlib", "plot", "drawing the picture")
        return _figure(self)


def phase_diagram(
    settings: PhaseSettings | None = None,
    *,
    progress: Callable[[int, float], Any] = lambda depth, part: None,
) -> PhaseDiagram:
    """Measure the phase diagram: train every cell's networks at every depth.

    Args:
        progress: called with a depth and the part of its networks that is done, from 0 to 1.

    Raises:
        ValueError, ImportError: the data cannot be loaded.
    """
    settings = settings or PhaseSettings()
    data = load(settings.data, settings.data_dir)

    def parts(depth: int) -> list[dict[str, np.ndarray]]:
        chunks, done = settings.chunks(depth), []

        def tick(part: float) -> None:
            progress(depth, (len(done) + part) / len(chunks))

        for members in chunks:
            done.append(measure(settings, data, depth, members, tick))
        return done

    return PhaseDiagram.of(settings, {depth: parts(depth) for depth in settings.depths})


# Okabe and Ito's colors, which the color-blind tell apart.
COLORS = dict(
    zip(
        (*REGIONS, UNDECIDED),
        ("#D55E00", "#E69F00", "#56B4E9", "#CC79A7", "#009E73", "#F0E442", "#FFFFFF"),
        strict=True,
    )
)


def _figure(diagram: PhaseDiagram):
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch, Rectangle

    settings, half = diagram.settings, diagram.settings.spacing / 2
    alphas, gammas = settings.grid
    figure = Figure(figsize=(8.8, 6.2), layout="constrained")
    axis = figure.subplots()
    for cell in diagram.cells:
        corner = (cell.alpha - half, cell.gamma - half)
        axis.add_patch(
            Rectangle(
                corner, 2 * half, 2 * half, facecolor=COLORS[cell.measured], edgecolor="white"
            )
        )
    missed = diagram.disagreeing
    cross = {
        "marker": "x",
        "color": "black",
        "linestyle": "none",
        "markersize": 9,
        "markeredgewidth": 2,
    }
    axis.plot([cell.alpha for cell in missed], [cell.gamma for cell in missed], **cross)
    star = {"marker": "*", "color": "black", "linestyle": "none", "markersize": 15}
    axis.plot([0.5], [0.5], **star)

    low, high = gammas[0] - half, gammas[-1] + half
    line = {"color": "black", "linewidth": 1.5}
    axis.plot([0.5, 0.5], [low, high], **line)
    right = alphas[-1] + half
    axis.plot([0.5, right], [0.5, 1 - right], **line)
    for name in REGIONS[:-1]:  # the last is one point, under the star
        own = np.array([(cell.alpha, cell.gamma) for cell in diagram.cells if cell.theory == name])
        if not len(own):
            continue
        on_line = name in ("unfaithful", "redundant")
        narrow = np.ptp(own[:, 0]) < np.ptp(own[:, 1]) / 2
        axis.annotate(
            name if narrow else name.replace(" ", "\n", 1),
            own.mean(0),
            xytext=(9, 9) if on_line else (0, 0),
            textcoords="offset points",
            rotation=-45 if on_line else 90 if narrow else 0,
            ha="center",
            va="center",
            fontweight="bold",
        )
    axis.set(
        xlim=(alphas[0] - half, right),
        ylim=(low, high),
        aspect="equal",
        xticks=alphas[::2],
        yticks=gammas[::2],
        xlabel=r"α: branches are multiplied by $L^{-\alpha}$",
        ylabel=r"γ: the blocks' learning rate is proportional to $L^{-\gamma}$",
    )
    found = {cell.measured for cell in diagram.cells}
    handles = [
        Patch(facecolor=color, edgecolor="grey", label=name)
        for name, color in COLORS.items()
        if name in found
    ]
    handles += [
        Line2D([], [], label="theory's boundaries", **line),
        Line2D([], [], label="Depth-μP", **star),
    ]
    if missed:
        handles.append(Line2D([], [], label="not what theory says", **cross))
    figure.legend(
        handles=handles,
        title="measured",
        loc="outside right center",
        frameon=False,
        alignment="left",
    )
    axis.set_title(
        "In which region does each (α, γ) lie?\n"
        f"{diagram.agreeing} of {len(diagram.cells)} cells, by their centers, are where theory has them\n"
        f"{settings.data}, depths {', '.join(map(str, settings.depths))}, width {settings.width}, "
        f"φ = {settings.activation}, {settings.optimizer}, {settings.seeds} seeds",
        fontsize=11,
        parse_math=False,
    )
    return figure
