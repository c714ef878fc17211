"""The coordinate check: do sizes scale with width and depth as the parametrization says?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from depthnet._checks import integer, number, one_of, optional_import
from depthnet.data import Dataset
from depthnet.diagnostics.fits import Interval, power_law
from depthnet.diagnostics.stream import find_blocks, residual_stream
from depthnet.nn import ResNet, Transformer
from depthnet.optim import SGD, Adam, AdamW
from depthnet.scaling import Parametrization
from depthnet.scaling.parametrization import OPTIMIZERS

# Half of what an exponent that is wrong by 1/2 makes of a slope.
TOLERANCE = 0.25

# The slope of sizes of which some are 0.
NO_POWER = Interval(math.nan, -math.inf, math.inf)

# The least range of a panel of the picture.
SPAN = 8.0

# The groups of parameters that are in blocks.
BLOCK_ROLES = ("hidden", "norm", "bias")

# Of the builders: small enough that changes are proportional to them.
LEARNING_RATES = {"adamw": 2**-10, "adam": 2**-10, "sgd": 2**-8}

# What is measured, its label, and the number of steps before it is first seen.
QUANTITIES = {
    "stream": ("stream $x^l$", 0),
    "branch": ("branch $x^l - x^{l-1}$", 0),
    "gradient": ("gradient of $W^l$", 0),
    "weight_change": ("change of $W^l$", 1),
    "preactivation_change": ("change of $W^l x^{l-1}$", 1),
    "stream_change": ("change of $x^l$", 1),
    "output_change": ("change of outputs", 1),
}

# A shape's measurements: root mean squares, float64 (steps, seeds) for each of QUANTITIES.
Sizes = dict[str, np.ndarray]
Build = Callable[[int, int, int], tuple[nn.Module, torch.optim.Optimizer]]


@dataclass(frozen=True)
class CoordCheck:
    """What was measured, and whether it is what the parametrization predicts.

    sizes: of every shape (width, depth) in `cross(widths, depths, base_width, base_depth)`, see `measure`.
    The other fields are arguments of `coord_check`.
    """

    sizes: dict[tuple[int, int], Sizes]
    parametrization: Parametrization
    widths: Sequence[int]
    depths: Sequence[int]
    base_width: int
    base_depth: int
    blocks_alone: bool = False

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """A slope each: axis, quantity, step (how often weights were updated before), slope with its
        95 % interval low to high, predicted (None without a prediction), holds (None: undecided)."""
        predicted = predictions(self.parametrization, self.blocks_alone)
        rows = []
        for axis in self.axes:
            points = self.points(axis)
            for name, (_, first) in QUANTITIES.items():
                sizes = self.along(axis, name)
                for step, values in enumerate(sizes, first):
                    if (
                        sizes.any() and not values.any()
                    ):  # not yet: output weights that start from 0
                        continue
                    slope, law = NO_POWER, predicted[axis][name]
                    if values.all():
                        slope = power_law(points, values)
                    row = {"axis": axis, "quantity": name, "step": step}
                    row |= {"slope": slope.value, "low": slope.low, "high": slope.high}
                    rows.append(row | {"predicted": law, "holds": holds(slope, law)})
        return rows

    @property
    def axes(self) -> list[str]:
        """Those of `width` and `depth` along which there is something to compare."""
        return [axis for axis in ("width", "depth") if len(self.points(axis)) > 1]

    def points(self, axis: str) -> list[int]:
        """The widths or depths that are compared, ascending."""
        return sorted(self.widths if axis == "width" else self.depths)

    def along(self, axis: str, name: str) -> np.ndarray:
        """A quantity's sizes at the points of an axis: (steps, seeds, points), with no steps if the
        model does not show it."""
        shapes = [
            (point, self.base_depth) if axis == "width" else (self.base_width, point)
            for point in self.points(axis)
        ]
        values = [self.sizes[shape][name] for shape in shapes if name in self.sizes[shape]]
        return np.stack(values, -1) if values else np.empty((0, 0, 0))

    def farthest(self, axis: str, quantity: str | None = None) -> dict[str, Any] | None:
        """The row whose slope is farthest from its prediction; None where none has one."""
        rows = [
            row
            for row in self.rows
            if row["axis"] == axis
            and quantity in (None, row["quantity"])
            and row["predicted"] is not None
        ]
        return max(rows, key=_error, default=None)

    @property
    def verdicts(self) -> dict[str, tuple[bool | None, str]]:
        """For each axis, whether all predicted slopes are right, None if undecided, and a sentence."""
        return {axis: self._verdict(axis) for axis in self.axes}

    @property
    def words(self) -> list[str]:
        return [words for _, words in self.verdicts.values()]

    @property
    def passed(self) -> bool:
        """Whether all is as predicted; what is undecided, or an axis without predictions, is not."""
        return all(verdict is True for verdict, _ in self.verdicts.values())

    def _verdict(self, axis: str) -> tuple[bool | None, str]:
        points, worst = self.points(axis), self.farthest(axis)
        where = f"{axis} {points[0]} to {points[-1]}"
        if worst is None:
            unstable = self.parametrization.classify().summary
            reason = (
                "no width rule" if axis == "width" else f"{unstable}, which follows no power law"
            )
            return False, f"{where}: {self.parametrization} cannot pass: {reason}"
        found = [
            row["holds"]
            for row in self.rows
            if row["axis"] == axis and row["predicted"] is not None
        ]
        words = {True: "as predicted", False: "off", None: "undecided"}
        tally = ", ".join(f"{found.count(key)} {words[key]}" for key in words if key in found)
        verdict = False if False in found else None if None in found else True
        return verdict, (
            f"{where}: of {len(found)} slopes {tally}; farthest is {worst['quantity']} after "
            f"{worst['step']} step{'s' if worst['step'] != 1 else ''}, {_interval(worst)}, predicted "
            f"{worst['predicted']:g}"
        )

    def figure(self):
        """A matplotlib Figure: quantities by axis, a colour each step, sizes with their range over
        seeds; dashed, the predicted slope."""
        optional_import("matplotlib", "plot", "drawing the picture")
        return _figure(self)


def coord_check(
    build: Build,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    widths: Sequence[int] = (64, 128, 256, 512),
    depths: Sequence[int] = (32, 64, 128, 256),
    base_width: int = 128,
    base_depth: int = 8,
    seeds: int = 5,
    steps: int = 4,
    parametrization: str | tuple[float, float] | Parametrization = "depth_mup",
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    blocks: str | None = None,
    blocks_alone: bool = False,
    progress: Callable[[float], Any] = lambda part: None,
) -> CoordCheck:
    """Train for a few steps at several widths and depths, and hold every size against its prediction.

    | quantity, a root mean square | power of width | power of depth |
    |---|---|---|
    | stream: x^l | 0 | 0 |
    | branch: x^l - x^{l-1}, at initialization | 0 | -alpha |
    | gradient: of the blocks' weights | -1 | -alpha |
    | weight_change: W_t - W_0 | -1 | -gamma |
    | preactivation_change: W_t x_t - W_0 x_0 (ResNet only) | 0 | max(-gamma, stream_change) |
    | stream_change, output_change: x_t^l - x_0^l, f_t - f_0 | 0 | 1 - alpha - gamma |

    Powers of depth are `classify(alpha, gamma).exponents`; those of width hold under the muP width rule.
    Outputs are judged by their change, as f_0 itself falls like width^-1/2 under muP.  Layers outside
    the blocks add changes of size 1: where 1 - alpha - gamma is not 0, the last two lines are then sums of
    two powers, which are judged only if the blocks are trained alone.

    A slope is right if |slope - predicted| + half <= 1/4, half being half its 95 % interval over seeds,
    wrong if |slope - predicted| - half > 1/4, else undecided; the check passes if all are right.

    Args:
        build: `build(width, depth, seed)` returns (model, optimizer), freshly initialized from the seed;
            `resnet_builder` and `transformer_builder` make one.
        batches: pairs (inputs, targets), such as a DataLoader; the first `steps` are trained on, again
            from the first if there are fewer.  The first is also what sizes are measured on.
        widths, depths: compared at base_depth and at base_width; with one only, the axis is left out.
        seeds: their number, 2 or more. steps: of training.
        parametrization: what is claimed: a preset's name, (alpha, gamma), or a Parametrization.
        loss: loss(outputs, targets), a scalar.
        blocks: for models other than a ResNet, a pattern of the names of their residual blocks, such as
            "layers.*": see `residual_stream`.
        blocks_alone: whether the optimizer trains nothing but the blocks.
        progress: called with the part done, from 0 to 1.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    parametrization = Parametrization.of(parametrization)
    batches = list(islice(batches, integer("steps", steps, 1)))
    shapes = cross(widths, depths, base_width, base_depth)
    sizes = {}
    for index, shape in enumerate(shapes):
        sizes[shape] = measure(
            build,
            batches,
            *shape,
            seeds=seeds,
            steps=steps,
            loss=loss,
            blocks=blocks,
            progress=lambda part, index=index: progress((index + part) / len(shapes)),
        )
    return CoordCheck(sizes, parametrization, widths, depths, base_width, base_depth, blocks_alone)


def cross(
    widths: Sequence[int], depths: Sequence[int], base_width: int, base_depth: int
) -> list[tuple[int, int]]:
    """The shapes (width, depth) of a check: all widths at base_depth, all depths at base_width."""
    integer("base_width", base_width, 1)
    integer("base_depth", base_depth, 1)
    for argument, values in (("widths", widths), ("depths", depths)):
        for value in values:
            integer(argument, value, 1)
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{argument} must be different from each other, got {values}")
    if len(widths) == len(depths) == 1:
        raise ValueError("widths or depths must be two or more: there is nothing to compare")
    across = [(width, base_depth) for width in widths if len(widths) > 1]
    along = [(base_width, depth) for depth in depths if len(depths) > 1]
    return list(dict.fromkeys(across + along))


def predictions(
    parametrization: Parametrization, blocks_alone: bool = False
) -> dict[str, dict[str, float | None]]:
    """The powers of width and of depth that QUANTITIES follow; None where there is no one power."""
    width = depth = dict.fromkeys(QUANTITIES)
    if parametrization.width_rule == "mup":
        width = {**dict.fromkeys(QUANTITIES, 0.0), "gradient": -1.0, "weight_change": -1.0}
    exponents = parametrization.classify().exponents
    if exponents is not None:
        known = {**exponents, "weight_change": -parametrization.gamma}
        depth = {name: known[name] + 0.0 for name in QUANTITIES}  # no -0.0
        if not blocks_alone and abs(exponents["stream_change"]) > 1e-9:  # 0.7 + 0.3 is 1
            depth |= dict.fromkeys(("preactivation_change", "stream_change", "output_change"))
    return {"width": width, "depth": depth}


def holds(slope: Interval, predicted: float | None) -> bool | None:
    """Whether a slope is as predicted, by TOLERANCE; None where that is undecided.

    A slope that is not finite is wrong: training diverged, or weights never moved.
    """
    if predicted is None:
        return None
    if not math.isfinite(slope.value):
        return False
    error, half = abs(slope.value - predicted), (slope.high - slope.low) / 2
    return True if error + half <= TOLERANCE else False if error - half > TOLERANCE else None


def measure(
    build: Build,
    batches: Sequence[tuple[Tensor, Tensor]],
    width: int,
    depth: int,
    *,
    seeds: int,
    steps: int,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    blocks: str | None = None,
    progress: Callable[[float], Any] = lambda part: None,
) -> Sizes:
    """Train one shape and return the sizes of QUANTITIES, pooled over all layers.

    Arguments as of `coord_check`.  `stream` has a row before each step and one after the last,
    `gradient` one before each step, changes one after each step, `branch` one in all.
    """
    integer("seeds", seeds, 2)  # an interval over seeds needs two
    if not batches:
        raise ValueError("batches must hold a pair (inputs, targets) at least, got none")
    if getattr(build, "populations", False):
        return _train(*build(width, depth, range(seeds)), batches, steps, loss, blocks, progress)
    singles = []
    for seed in range(seeds):
        built = build(width, depth, seed)
        if not isinstance(built, tuple) or len(built) != 2:
            raise TypeError(f"build must return (model, optimizer), got {type(built).__name__}")
        singles.append(
            _train(
                *built,
                batches,
                steps,
                loss,
                blocks,
                lambda part, seed=seed: progress((seed + part) / seeds),
            )
        )
    return {name: np.concatenate([one[name] for one in singles], 1) for name in singles[0]}


def _train(model, optimizer, batches, steps, loss, blocks, progress) -> Sizes:
    """Sizes of one model, (steps, members): its population's, or one."""
    population = getattr(model, "population", None) is not None
    weights = [model.blocks.weight] if isinstance(model, ResNet) else _matrices(model, blocks)
    sizes: dict[str, list[Tensor]] = {name: [] for name in QUANTITIES}

    def record(name: str, *tensors: Tensor, layers: bool = False) -> None:
        if population and layers:
            tensors = tuple(tensor.transpose(0, 1) for tensor in tensors)
        sizes[name].append(_rms(tensors, population))

    probe = batches[0][0]
    start = residual_stream(model, probe, blocks=blocks)
    start_weights = [weight.detach().clone() for weight in weights]
    record("stream", start.x[1:], layers=True)
    record("branch", start.x.diff(dim=0), layers=True)
    for step in range(steps):
        inputs, targets = batches[step % len(batches)]
        outputs = model(inputs)
        members = outputs if population else [outputs]
        optimizer.zero_grad()
        sum(loss(member, targets) for member in members).backward()
        if any(weight.grad is None for weight in weights):
            raise ValueError("blocks: the loss has no gradient with respect to their weights")
        record("gradient", *(weight.grad for weight in weights))
        optimizer.step()
        now = residual_stream(model, probe, blocks=blocks)
        record("stream", now.x[1:], layers=True)
        record("stream_change", now.x[1:] - start.x[1:], layers=True)
        record("output_change", now.outputs - start.outputs)
        if now.h is not None:
            record("preactivation_change", now.h - start.h, layers=True)
        changes = zip(weights, start_weights, strict=True)
        record("weight_change", *(weight.detach() - first for weight, first in changes))
        progress((step + 1) / steps)
    return {name: torch.stack(rows).cpu().numpy() for name, rows in sizes.items() if rows}


def _matrices(model: nn.Module, blocks) -> list[nn.Parameter]:
    """The weights in the blocks; biases and gains have sizes of their own."""
    found = [p for block in find_blocks(model, blocks) for p in block.parameters() if p.ndim > 1]
    if not found:
        raise ValueError(f"blocks={blocks!r} have no weights of two dimensions or more")
    return found


def _rms(tensors: Sequence[Tensor], population: bool) -> Tensor:
    """The root mean square over all entries of all tensors, float64 (members,)."""
    flat = [tensor.flatten(1) if population else tensor.flatten()[None] for tensor in tensors]
    squares = sum(torch.linalg.vector_norm(f, dim=1, dtype=torch.float64) ** 2 for f in flat)
    return (squares / sum(f.shape[1] for f in flat)).sqrt()


def _interval(row: dict) -> Interval:
    return Interval(row["slope"], row["low"], row["high"])


def _error(row: dict) -> float:
    error = abs(row["slope"] - row["predicted"])
    return error if math.isfinite(error) else math.inf


def resnet_builder(
    data: Dataset,
    parametrization: str | tuple[float, float] | Parametrization = "depth_mup",
    *,
    optimizer: str = "adamw",
    lr: float | None = None,
    eps: float | None = None,
    activation: str | tuple[float, float] = "abs",
    blocks_alone: bool = False,
    base_width: int = 128,
    base_depth: int = 8,
) -> Build:
    """A `build` for `coord_check`: depthnet.ResNet with an optimizer of depthnet.optim.

    Output weights start with standard deviation 1 / base_width at the base width, so that outputs start
    small and blocks have a gradient from the first step.  There is no weight decay.

    Args:
        data: what it will be trained on.
        optimizer: `adamw`, `adam` or `sgd`.
        lr: the learning rate at the base shape; None means LEARNING_RATES, small enough that sizes of
            changes are proportional to it.
        eps: Adam's, at the base shape; None means 4 times the median of |gradient| over the blocks'
            weights there.  An eps that is far below the gradients does nothing, and no check can see
            whether it follows its rule; one above them divides the steps, at every shape alike if it does.
        blocks_alone: whether input and output layers keep their initial weights.
        base_width, base_depth: the shape at which hyperparameters are as given.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    parametrization = Parametrization.of(parametrization)

    def network(width: int, depth: int, seed: int | Sequence[int]) -> ResNet:
        """Of several seeds, one population."""
        alone = isinstance(seed, int)
        generators = [torch.Generator().manual_seed(s) for s in ([seed] if alone else seed)]
        return ResNet(
            data.in_features,
            width,
            depth,
            data.out_features,
            activation=activation,
            parametrization=parametrization,
            active_features=data.active_features,
            output_std=1 / base_width,
            base_width=base_width,
            base_depth=base_depth,
            population=None if alone else len(generators),
            generator=generators[0] if alone else generators,
        )

    def base_loss() -> tuple[ResNet, Tensor]:
        model = network(base_width, base_depth, 0)
        x, y = data.batch(0, 0, 64)
        return model, cross_entropy(model(x), y)

    build = _builder(network, base_loss, optimizer, lr, eps, blocks_alone)
    build.populations = True
    return build


def transformer_builder(
    data,
    parametrization: str | tuple[float, float] | Parametrization = "completep",
    *,
    optimizer: str = "adamw",
    lr: float | None = None,
    eps: float | None = None,
    blocks_alone: bool = False,
    base_width: int = 128,
    base_depth: int = 8,
    **options,
) -> Build:
    """A `build` for `coord_check`: depthnet.nn.Transformer with an optimizer of depthnet.optim.

    `coord_check(transformer_builder(data), batches, parametrization="completep", blocks="layers.*",
    loss=next_token_loss)`, with batches of (tokens, targets), int64 (B, T) both.

    Args:
        data: what it will be trained on: anything with a `vocabulary` and `batch(seed, step, size,
            length)`, such as depthnet.data.tokens returns.
        options: other arguments of the Transformer, such as head_size.

    The other arguments, the output weights and the weight decay are those of `resnet_builder`.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    parametrization = Parametrization.of(parametrization)

    def network(width: int, depth: int, seed: int) -> Transformer:
        return Transformer(
            data.vocabulary,
            width,
            depth,
            parametrization=parametrization,
            base_width=base_width,
            base_depth=base_depth,
            generator=torch.Generator().manual_seed(seed),
            **{"output_std": 0.0 if options.get("tied") else 1 / base_width, **options},
        )

    def base_loss() -> tuple[Transformer, Tensor]:
        model = network(base_width, base_depth, 0)
        tokens, targets = data.batch(0, 0, 8, min(model.context, 32))
        return model, next_token_loss(model(tokens), targets)

    return _builder(network, base_loss, optimizer, lr, eps, blocks_alone)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy of logits (B, T, vocabulary) and targets int64 (B, T)."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def _builder(network, base_loss, optimizer, lr, eps, blocks_alone) -> Build:
    """`build` of networks with `param_groups`; base_loss() is (model, loss) at the base shape."""
    one_of("optimizer", optimizer, OPTIMIZERS)
    lr = LEARNING_RATES[optimizer] if lr is None else number("lr", lr)
    if eps is None and optimizer != "sgd":
        model, loss = base_loss()
        loss.backward()
        groups = {group["name"]: group["params"] for group in model.param_groups(optimizer)}
        gradients = torch.cat([weight.grad.flatten() for weight in groups["hidden"]])
        eps = 4 * gradients.abs().median().item()
    make = {
        "adamw": lambda groups: AdamW(groups, lr=lr, eps=eps, weight_decay=0.0),
        "adam": lambda groups: Adam(groups, lr=lr, eps=eps),
        "sgd": lambda groups: SGD(groups, lr=lr),
    }[optimizer]

    def build(width: int, depth: int, seed: int | Sequence[int]):
        model = network(width, depth, seed)
        groups = model.param_groups(optimizer)
        return model, make([g for g in groups if g["name"] in BLOCK_ROLES or not blocks_alone])

    return build


def _figure(check: CoordCheck):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator

    axes = check.axes
    names = [name for name in QUANTITIES if check.along(axes[0], name).size]
    steps = range(max(row["step"] for row in check.rows) + 1)
    viridis = matplotlib.colormaps["viridis"]
    colours = [viridis(0.9 * step / max(steps[-1], 1)) for step in steps]
    figure = Figure(figsize=(2.4 + 3.3 * len(axes), 1.2 + 1.6 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(axes), squeeze=False, sharex="col", sharey="row")
    for line, name in zip(panels, names, strict=True):
        for panel, axis in zip(line, axes, strict=True):
            _panel(panel, check, axis, name, colours)
        low, high = line[0].get_ylim()
        room = max(1.0, (SPAN * low / high) ** 0.5)  # sizes that do not move shall look like it
        line[0].set_ylim(low / room, high * room)
        if high / low < 100:  # powers of ten would be too few ticks
            line[0].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            line[0].yaxis.set_major_formatter(LogFormatterSciNotation(labelOnlyBase=False))
        line[0].set_ylabel(QUANTITIES[name][0])
    figure.align_ylabels(panels[:, 0])
    fixed = {"width": f"depth {check.base_depth}", "depth": f"width {check.base_width}"}
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(f"{axis} (at {fixed[axis]})")
    figure.legend(
        [
            *(Line2D([], [], color=colour, marker=".") for colour in colours),
            Line2D([], [], color="black", linestyle="--"),
        ],
        [*map(str, steps), "predicted\nslope"],
        title="after step",
        loc="outside right center",
        frameon=False,
    )
    seeds = next(iter(check.sizes.values()))["stream"].shape[1]
    figure.suptitle(
        f"Coordinate check of {check.parametrization}: {'passed' if check.passed else 'not passed'}\n"
        f"root mean squares, {seeds} seeds; slopes: the farthest from its prediction",
        fontsize=11,
    )
    return figure


def _panel(panel, check: CoordCheck, axis: str, name: str, colours: list) -> None:
    points = check.points(axis)
    centred = np.array(points) / np.exp(np.log(points).mean())
    middle = None
    for step, values in enumerate(check.along(axis, name), QUANTITIES[name][1]):
        if not values.all():  # there is no logarithm of 0
            continue
        middle = np.exp(np.log(values).mean(0))
        panel.fill_between(
            points, values.min(0), values.max(0), color=colours[step], alpha=0.25, linewidth=0
        )
        panel.plot(points, middle, color=colours[step], marker=".")
    worst = check.farthest(axis, name)
    if worst is None:
        panel.set_title("no prediction", fontsize=9)
    else:
        if middle is not None:
            law = np.exp(np.log(middle).mean()) * centred ** worst["predicted"]
            panel.plot(points, law, color="black", linestyle="--")
        word, colour = {
            True: ("as predicted", "black"),
            False: ("off", "#d55e00"),
            None: ("undecided", "#0072b2"),
        }[worst["holds"]]
        panel.set_title(
            f"slope {worst['slope']:+.2f}, predicted {worst['predicted']:g}: {word}",
            fontsize=9,
            color=colour,
        )
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(points, [str(point) for point in points])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
