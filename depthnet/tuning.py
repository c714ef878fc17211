"""Hyperparameters tuned on a small network, and whether they will hold on a large one."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from depthnet._checks import integer, number, optional_import
from depthnet.data import Arrays, Dataset, load
from depthnet.diagnostics.fits import Interval
from depthnet.diagnostics.stream import find_blocks
from depthnet.nn.resnet import ResidualStack
from depthnet.optim import AdamW
from depthnet.scaling import Parametrization, classify, param_groups
from depthnet.sweep.analysis import DRIFT_LIMIT
from depthnet.sweep.optima import (
    Slice,
    bowl,
    drawn_curves,
    extrapolated,
    interval,
    slice_losses,
    slices,
)
from depthnet.sweep.population import BETAS
from depthnet.training import PopulationTrainer

# How far beyond the grid to look for an optimum at its edge, octaves.
WIDER = 4

# Octaves: an extrapolation whose interval is wider says nothing; an octave to either side costs a tenth of
# the loss or so.
INTERVAL_LIMIT = 2.0

UNSCALED = (
    "no module of the model has param_groups: its learning rates do not scale with width and depth, and "
    "nothing promises that these settings are right for any other shape"
)

# Of one network: log2 of the learning rate, weight decay, seed.
Member = tuple[float, float, int]
Progress = Callable[[int, int], Any]


class TuningWarning(UserWarning):
    """Hyperparameters were tuned, but may not be right for other depths or widths."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Training loss against learning rate at one depth, averaged over the last fifth of the steps.

    losses: float64 (seeds, G), infinite where a run diverged.
    low, high: float64 (G,), 95 % interval of the mean curve.
    initial_loss: before training, mean over the runs.
    optimum: log2 of the best learning rate with its 95 % interval; NaN if every rate diverges.
    at_edge: whether the lowest point is the first or the last of the grid.
    shift: octaves from the optimum of the depth that is tuned to this one's, with its interval.
    """

    depth: int
    losses: np.ndarray
    low: np.ndarray
    high: np.ndarray
    initial_loss: float
    optimum: Interval
    at_edge: bool
    shift: Interval

    @property
    def mean(self) -> np.ndarray:
        """(G,), over the seeds; infinite where any of them diverged."""
        return self.losses.mean(0)


@dataclass(frozen=True, eq=False)
class Extrapolation:
    """log2 of the best learning rate at a depth that was not trained, with 95 % intervals.

    depths: those fitted, ascending. target_depth: the depth that is told of.
    base: the optimum of the depth that is tuned. deepest: that of the greatest of `depths`.
    extrapolated: a + b target_depth^-p of the fit to the optima at `depths`; NaN if one is not known.
    """

    depths: tuple[int, ...]
    target_depth: int
    base: Interval
    deepest: Interval
    extrapolated: Interval


@dataclass(frozen=True, eq=False)
class Tuning:
    """What `tune` has found.

    settings: `lr`, `weight_decay`, `betas` at the base shape: depthnet.optim.AdamW(model, **settings).
    width, depth: the shape that was trained.
    log2_lr: float64 (G,), the grid.
    curves: by depth, the one that is tuned first, at the weight decay of `settings`.
    weight_decay: by candidate, the loss at its best learning rate of the grid, at the depth that is tuned.
    parametrization: of the model; None if nothing in it scales learning rates.
    block_depth: weight matrices in a residual block; None if no blocks were found.
    extrapolation: to `target_depth`; None if none was asked for.
    warnings: reasons why `settings` may not be right for other shapes.
    """

    settings: dict[str, Any]
    width: int
    depth: int
    log2_lr: np.ndarray
    curves: dict[int, Curve]
    weight_decay: dict[float, float]
    parametrization: Parametrization | None
    block_depth: int | None
    extrapolation: Extrapolation | None
    warnings: list[str]

    @property
    def optimum(self) -> Interval:
        """log2 of the best learning rate, with its 95 % interval."""
        return self.curves[self.depth].optimum

    @property
    def extrapolated(self) -> Interval | None:
        """The same at `target_depth`, extrapolated; None if that was not asked for."""
        return self.extrapolation and self.extrapolation.extrapolated

    def __str__(self) -> str:
        tuned = int(self.curves[self.depth].mean.argmin())
        lines = [
            f"lr = {self.settings['lr']:.3g}, log2 {self.optimum} (95 %), weight decay "
            f"{self.settings['weight_decay']:g}, betas {self.settings['betas']}",
            f"width {self.width}, tuned at depth {self.depth}, "
            f"parametrization {self.parametrization or 'none'}",
            f"{'depth':>6}  {'log2 of the best lr':<22}{'best loss':>10}{'loss at the tuned lr':>22}",
        ]
        lines += [
            f"{depth:>6}  {curve.optimum!s:<22}{curve.mean.min():>10.4g}{curve.mean[tuned]:>22.4g}"
            for depth, curve in self.curves.items()
        ]
        if self.extrapolation:
            told = self.extrapolation
            lines += [
                f"log2 of the best lr at depth {told.target_depth}, not trained:",
                f"  as at depth {self.depth:<20}{told.base}",
                f"  as at depth {told.depths[-1]:<20}{told.deepest}",
                f"  {f'extrapolated from {told.depths}':<32}{told.extrapolated}",
            ]
        return "\n".join([*lines, *(f"warning: {text}" for text in self.warnings)])

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain lists and numbers, for JSON; None for what is not finite."""
        return _plain(
            {
                **vars(self),
                "curves": {depth: vars(curve) for depth, curve in self.curves.items()},
                "parametrization": self.parametrization and asdict(self.parametrization),
                "extrapolation": self.extrapolation and vars(self.extrapolation),
            }
        )

    def plot(self):
        """A matplotlib Figure: a curve a depth with its 95 % interval, and its optimum with its own.

        What is extrapolated is a line across all losses, and its interval a band.
        """
        optional_import("matplotlib", "plot", "drawing the picture")
        return _figure(self)


def tune(
    model_fn: Callable[..., nn.Module],
    data: Dataset | str | tuple[Tensor, Tensor],
    *,
    width: int,
    depth: int,
    log2_lr: tuple[float, float] = (-13.0, -4.0),
    per_octave: int = 1,
    weight_decay: Sequence[float] = (0.0,),
    seeds: int = 2,
    steps: int = 300,
    batch: int = 64,
    check_depths: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    target_depth: int | None = None,
    blocks: str | None = None,
    progress: Progress | None = None,
) -> Tuning:
    """Find the learning rate of AdamW on a small network, and measure whether it holds at other depths.

    Trains every candidate with every seed and takes the minimum of the loss over the last fifth of the
    steps.  Seeds fix initial weights and batches, so that the same call gives the same result.

    Args:
        model_fn: builds a network from the keywords width and depth.  If it also takes `population` and
            `generator` (a list of torch.Generator of the CPU), as depthnet.ResNet does, all candidates
            train as one population; if not, one after another, each built after torch.manual_seed(seed).
        data: a data set of depthnet.data, what depthnet.data.load takes, or a pair of tensors: x float
            (N, features), y int64 (N,) of classes.
        width, depth: the small shape.
        log2_lr: least and greatest log2 of the learning rate, that of all layers.
        per_octave: grid points a factor of 2.
        weight_decay: candidates, each tried with every learning rate.
        seeds: their number. steps, batch: of training.
        check_depths: other depths at which the curve is measured too; None means (4 * depth,), or none
            where `depths` are given, () none.
        depths, target_depth: three shallow depths or more, which are measured too, and a deeper one, to
            which the best learning rate is extrapolated from `depths` alone; None for no extrapolation.
        blocks: the pattern of the names of the residual blocks, such as "layers.*"; None looks for a
            ModuleList or Sequential of `depth` modules of one type.
        progress: called after every step with the steps done and in all, each network's counted.

    Warns:
        TuningWarning: each of the result's `warnings`.

    Raises:
        TypeError, ValueError: an argument is not as described, or every learning rate diverges.
    """
    for argument, value, least in (
        ("width", width, 1),
        ("depth", depth, 1),
        ("per_octave", per_octave, 1),
        ("seeds", seeds, 1),
        ("steps", steps, 5),  # the last fifth of the steps must hold one
        ("batch", batch, 1),
    ):
        integer(argument, value, least)
    grid = _grid(log2_lr, per_octave)
    decays = _weight_decays(weight_decay)
    shallow = _shallow_depths(depths, target_depth)
    others = _check_depths(() if depths and check_depths is None else check_depths, depth)
    others += [other for other in shallow if other not in (depth, *others)]
    as_population = _takes_population(model_fn)
    data = _dataset(data)
    with torch.random.fork_rng():
        model = model_fn(width=width, depth=depth)
        _check_model(model, data, batch)
        block_depth = _block_depth(model, depth, blocks)
        scaled = _scaled(model)
    parametrization = getattr(scaled[0], "parametrization", None) if scaled else None

    total = steps * seeds * len(grid) * (len(decays) + len(others))
    tick = _counter(progress, total)
    train = _train_population if as_population else _train_one_by_one

    def losses(at_depth: int, decays: Sequence[float]) -> np.ndarray:
        """float32 (decays, seeds, G, steps), NaN from the step on whose loss is not finite."""
        members = [(lr, decay, s) for decay in decays for s in range(seeds) for lr in grid.tolist()]
        found = train(model_fn, data, width, at_depth, members, steps, batch, tick)
        found = np.where(np.isfinite(found).cumprod(0), found, np.nan)
        return found.T.reshape(len(decays), seeds, len(grid), steps)

    part = slices(steps)[-1]
    small = losses(depth, decays)
    best = [float(slice_losses(np.moveaxis(each, -1, 0), part).mean(0).min()) for each in small]
    if not np.isfinite(best).any():
        raise ValueError(
            f"log2_lr: at depth {depth} every learning rate from 2^{grid[0]:g} to 2^{grid[-1]:g} "
            f"diverges; try log2_lr=({grid[0] - 2 * WIDER:g}, {grid[0]:g})"
        )
    chosen = int(np.argmin(best))
    by_depth = {depth: small[chosen]}
    by_depth |= {other: losses(other, [decays[chosen]])[0] for other in others}
    curves, optima = _curves(grid, by_depth, part)
    extrapolation = _extrapolation(curves, optima, depth, shallow, target_depth)
    found = Tuning(
        settings={
            "lr": 2.0 ** curves[depth].optimum.value,
            "weight_decay": decays[chosen],
            "betas": BETAS,
        },
        width=width,
        depth=depth,
        log2_lr=grid,
        curves=curves,
        weight_decay=dict(zip(decays, best, strict=True)),
        parametrization=parametrization,
        block_depth=block_depth,
        extrapolation=extrapolation,
        warnings=[
            *([] if scaled else [UNSCALED]),
            *_theory_warnings(parametrization, block_depth),
            *_measured_warnings(grid, curves, depth),
            *_extrapolation_warnings(extrapolation, curves, parametrization),
        ],
    )
    for text in found.warnings:
        warnings.warn(text, TuningWarning, stacklevel=2)
    return found


def _grid(log2_lr: tuple[float, float], per_octave: int) -> np.ndarray:
    try:
        low, high = (number("log2_lr", end) for end in log2_lr)
    except TypeError:
        raise TypeError(f"log2_lr must be two numbers, got {log2_lr!r}") from None
    except ValueError:
        raise ValueError(f"log2_lr must be two finite numbers, got {log2_lr!r}") from None
    octaves = (high - low) * per_octave
    if not (-60 <= low < high <= 60 and abs(octaves - round(octaves)) < 1e-9):
        raise ValueError(
            f"log2_lr must be two numbers from -60 to 60, the lower first, whole steps of "
            f"1/{per_octave} apart; got {log2_lr!r}"
        )
    return low + np.arange(round(octaves) + 1) / per_octave


def _weight_decays(weight_decay: Sequence[float]) -> list[float]:
    if not isinstance(weight_decay, (tuple, list)) or not weight_decay:
        raise ValueError(f"weight_decay must be a sequence of candidates, got {weight_decay!r}")
    decays = [number("weight_decay", decay) for decay in weight_decay]
    if min(decays) < 0 or len(set(decays)) < len(decays):
        raise ValueError(
            f"weight_decay must be different numbers that are not negative, got {weight_decay!r}"
        )
    return decays


def _check_depths(check_depths: Sequence[int] | None, depth: int) -> list[int]:
    if check_depths is None:
        return [4 * depth]
    if not isinstance(check_depths, (tuple, list)):
        raise TypeError(f"check_depths must be a sequence of depths, got {check_depths!r}")
    depths = [integer("check_depths", other, 1) for other in check_depths]
    if len({depth, *depths}) <= len(depths):
        raise ValueError(
            f"check_depths must be different from each other and from depth={depth}, got "
            f"{check_depths!r}"
        )
    return depths


def _shallow_depths(depths: Sequence[int] | None, target: int | None) -> tuple[int, ...]:
    """The depths to extrapolate from, ascending; () if nothing is extrapolated."""
    if depths is None and target is None:
        return ()
    if depths is None or target is None:
        given, missing = (
            ("target_depth", "depths") if depths is None else ("depths", "target_depth")
        )
        raise ValueError(f"{missing} must be given where {given} is")
    if not isinstance(depths, (tuple, list)):
        raise TypeError(f"depths must be a sequence of depths, got {depths!r}")
    shallow = sorted(integer("depths", each, 1) for each in depths)
    if len(set(shallow)) < max(3, len(shallow)):
        raise ValueError(f"depths must be three different ones at least, got {depths!r}")
    if integer("target_depth", target, 1) <= shallow[-1]:
        raise ValueError(
            f"target_depth must be deeper than all of depths={depths!r}, got {target!r}"
        )
    return tuple(shallow)


def _takes_population(model_fn: Callable[..., nn.Module]) -> bool:
    """Whether the networks can train as one population."""
    if isinstance(model_fn, nn.Module) or not callable(model_fn):
        raise TypeError(
            f"model_fn must be a function that builds a network, got {type(model_fn).__name__}"
        )

    def takes(*keywords: str) -> bool:
        try:
            inspect.signature(model_fn).bind(**dict.fromkeys(keywords))
        except TypeError:
            return False
        return True

    if takes("width", "depth", "population", "generator"):
        return True
    if takes("width", "depth"):
        return False
    raise TypeError(
        "model_fn must be callable as model_fn(width=, depth=) or as model_fn(width=, depth=, "
        f"population=, generator=), got the signature {inspect.signature(model_fn)}"
    )


def _dataset(data: Dataset | str | tuple[Tensor, Tensor]) -> Dataset:
    if isinstance(data, str):
        return load(data)
    if isinstance(data, Dataset):
        return data
    if not (isinstance(data, (tuple, list)) and len(data) == 2 and all(map(torch.is_tensor, data))):
        raise TypeError(
            "data must be a data set of depthnet.data, the name of one, or a pair of tensors x, y; "
            f"got {type(data).__name__}"
        )
    x, y = data
    if not (
        x.is_floating_point() and x.ndim > 1 and y.dtype == torch.int64 and y.shape == x.shape[:1]
    ):
        raise ValueError(
            "data must be x float (N, features) and y int64 (N,), got "
            f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
        )
    if not len(x) or y.min() < 0:
        raise ValueError("data must hold samples, and classes from 0")
    return Arrays(x, y, x[:0], y[:0], out_features=int(y.max()) + 1)


def _check_model(model: nn.Module, data: Dataset, batch: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model_fn must return a torch module, got {type(model).__name__}")
    x, _ = data.batch(0, 0, batch)
    with torch.no_grad():
        outputs = model(x.to(_device(model)))
    if outputs.ndim != 2 or len(outputs) != batch or outputs.shape[1] < data.out_features:
        raise ValueError(
            f"model_fn must build networks with outputs of the shape (batch, classes), here ({batch}, "
            f"{data.out_features}); got {tuple(outputs.shape)}"
        )


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _scaled(model: nn.Module) -> list[nn.Module]:
    """The modules whose learning rates scale with width and depth."""
    return [module for module in model.modules() if hasattr(module, "param_groups")]


def _block_depth(model: nn.Module, depth: int, blocks: str | None) -> int | None:
    """The weight matrices in a residual block; None if there are none that look like blocks."""
    if blocks is None:
        for module in model.modules():
            if hasattr(module, "block_depth"):
                return module.block_depth
            if isinstance(module, ResidualStack):
                return 1
        rows = [
            list(module)
            for module in model.modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) == depth
        ]
        found = max(
            (row for row in rows if len(set(map(type, row))) == 1), key=_matrices, default=None
        )
        if found is None:
            return None
    else:
        found = find_blocks(model, blocks)
    return max(_matrices([block]) for block in found)


def _matrices(modules: Sequence[nn.Module]) -> int:
    return sum(param.ndim > 1 for module in modules for param in module.parameters())


def _counter(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def tick(steps: int) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done, total)

    return tick


def _train_population(model_fn, data, width, depth, members, steps, batch, tick) -> np.ndarray:
    """Losses (steps, members)."""
    log2_lr, decays, seeds = zip(*members, strict=True)
    model = model_fn(
        width=width,
        depth=depth,
        population=len(members),
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
    )
    if getattr(model, "population", None) != len(members):
        raise ValueError(
            f"model_fn takes population, but model_fn(..., population={len(members)}) has the "
            f"population {getattr(model, 'population', None)}"
        )
    groups, decay = param_groups(model, "adamw"), torch.tensor(decays, dtype=torch.float64)
    for group in groups:
        scale = torch.as_tensor(group["weight_decay_scale"], dtype=torch.float64)
        group["weight_decay_scale"] = decay.view(-1, *[1] * (scale.ndim - 1)) * scale
    optimizer = AdamW(groups, lr=2.0 ** np.array(log2_lr), betas=BETAS, weight_decay=1.0)
    trainer = PopulationTrainer(model, optimizer, data, seeds, batch, steps)
    for _ in range(steps):
        trainer.train_step()
        tick(len(members))
    return trainer.losses


def _train_one_by_one(model_fn, data, width, depth, members, steps, batch, tick) -> np.ndarray:
    """Losses (steps, members)."""
    losses = np.full((steps, len(members)), np.nan, np.float32)
    for column, (log2_lr, decay, seed) in zip(losses.T, members, strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_fn(width=width, depth=depth)
            optimizer = AdamW(model, lr=2.0**log2_lr, betas=BETAS, weight_decay=decay)
            device = _device(model)
            for step in range(steps):
                x, y = data.batch(seed, step, batch)
                loss = cross_entropy(model(x.to(device)), y.to(device))
                column[step] = loss.item()
                if not math.isfinite(column[step]):
                    tick(steps - step)
                    break
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                tick(1)
    return losses


def _curves(
    grid: np.ndarray, by_depth: dict[int, np.ndarray], part: Slice
) -> tuple[dict[int, Curve], dict[int, np.ndarray]]:
    """From float32 losses (seeds, G, steps) by depth, the one that is tuned first: the curves, and the
    optima of all the curves drawn."""
    found: dict[int, Curve] = {}
    all_optima = {}
    for depth, losses in by_depth.items():
        own = slice_losses(np.moveaxis(losses, -1, 0), part)
        drawn = drawn_curves(np.where(np.isfinite(own)[..., None], losses, np.inf)[..., _of(part)])
        fitted = bowl(grid, drawn)
        optima = all_optima[depth] = fitted.optimum
        if not found:
            tuned = optima
        shift = optima - tuned
        low, high = np.array([interval(point) for point in drawn[1:].T]).T
        found[depth] = Curve(
            depth=depth,
            losses=own,
            low=low,
            high=high,
            initial_loss=float(losses[..., 0].mean(dtype=np.float64)),
            optimum=Interval(float(optima[0]), *interval(optima[1:])),
            at_edge=fitted.at_edge,
            shift=Interval(float(shift[0]), *interval(shift[1:])),
        )
    return found, all_optima


def _extrapolation(
    curves: dict[int, Curve],
    optima: dict[int, np.ndarray],
    tuned: int,
    shallow: tuple[int, ...],
    target: int | None,
) -> Extrapolation | None:
    if target is None:
        return None
    told = Interval(math.nan, math.nan, math.nan)
    if not _without_optimum(curves, shallow):
        told = Interval(*extrapolated(shallow, np.stack([optima[d] for d in shallow]), target))
    return Extrapolation(shallow, target, curves[tuned].optimum, curves[shallow[-1]].optimum, told)


def _without_optimum(curves: dict[int, Curve], depths: Sequence[int]) -> list[int]:
    """The depths whose optimum the grid does not hold."""
    return [d for d in depths if curves[d].at_edge or math.isnan(curves[d].optimum.value)]


def _of(part: Slice) -> slice:
    return slice(part.start, part.end)


def _theory_warnings(parametrization: Parametrization | None, block_depth: int | None) -> list[str]:
    texts = []
    if block_depth is not None and block_depth > 1:
        text = (
            f"the residual blocks have {block_depth} weight matrices each: for such blocks no limit of "
            "infinite depth keeps all that a network does, and the best hyperparameters move with depth"
        )
        if parametrization is not None:
            lost = classify(parametrization.alpha, parametrization.gamma, block_depth).lost
            text += f"; {parametrization} loses {' and '.join(lost)}" if lost else ""
        texts.append(text)
    if parametrization is not None:
        limit = parametrization.classify()
        if not limit.faithful:
            texts.append(
                f"{parametrization} is {limit.summary} as depth grows, and its best learning rate moves; "
                "depth_mup has a limit that keeps it"
            )
        if parametrization.width_rule == "none":
            texts.append(
                f"{parametrization} has no width rule: its best learning rate moves with the width"
            )
    return texts


def _measured_warnings(grid: np.ndarray, curves: dict[int, Curve], tuned: int) -> list[str]:
    texts, half_step = [], (grid[1] - grid[0]) / 2
    for depth, curve in curves.items():
        if not curve.mean.min() < curve.initial_loss:
            texts.append(
                f"at depth {depth} no learning rate of the grid brings the loss below the "
                f"{curve.initial_loss:.4g} before training"
            )
        if not math.isfinite(curve.optimum.value):
            continue
        if curve.at_edge:
            lowest = curve.optimum.value == grid[0]
            side, beyond = ("least", "below") if lowest else ("greatest", "above")
            wider = (grid[0] - WIDER, grid[-1]) if lowest else (grid[0], grid[-1] + WIDER)
            texts.append(
                f"at depth {depth} the best learning rate is the {side} of the grid, "
                f"2^{curve.optimum.value:g}, and the optimum may lie {beyond} it; try "
                f"log2_lr=({wider[0]:g}, {wider[1]:g})"
            )
        if depth == tuned:
            continue
        shift, drift = curve.shift, curve.shift.value / math.log2(depth / tuned)
        if shift.low > half_step or shift.high < -half_step or abs(drift) > DRIFT_LIMIT:
            text = (
                f"the best learning rate moves by {shift} octaves (95 %) from depth {tuned} to {depth}, "
                f"{drift:+.2f} per doubling of depth"
            )
            if shift.low <= 0 <= shift.high:
                text += "; that may be chance, which more seeds or steps would tell"
            texts.append(text)
    return texts


def _extrapolation_warnings(
    told: Extrapolation | None,
    curves: dict[int, Curve],
    parametrization: Parametrization | None,
) -> list[str]:
    if told is None:
        return []
    lacking = _without_optimum(curves, told.depths)
    if lacking:
        return [
            f"nothing is extrapolated to depth {told.target_depth}: the grid does not hold the optimum "
            f"at depth {', '.join(map(str, lacking))}"
        ]
    texts = []
    if parametrization is None or not parametrization.classify().faithful:
        texts.append(
            f"what is extrapolated to depth {told.target_depth} presumes a best learning rate that "
            f"converges as depth grows, which that of {parametrization or 'this model'} does not"
        )
    wide = told.extrapolated.high - told.extrapolated.low
    if wide > INTERVAL_LIMIT:
        texts.append(
            f"what is extrapolated to depth {told.target_depth} is not known: its interval is {wide:.1f} "
            f"octaves wide, {INTERVAL_LIMIT:g} are the limit; more seeds or steps make it narrower"
        )
    return texts


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Interval):
        return _plain(vars(value))
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    return float(value) if math.isfinite(value) else None


def _figure(tuning: Tuning):
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    viridis = matplotlib.colormaps["viridis"]
    depths, grid = sorted(tuning.curves), tuning.log2_lr
    # Above the loss before training nothing is of interest, unless there is nothing below it.
    initial = [curve.initial_loss for curve in tuning.curves.values()]
    ceiling = np.nanmax([*initial, tuning.curves[tuning.depth].mean.min()])
    for depth in depths:
        curve = tuning.curves[depth]
        color = viridis(0.9 * depths.index(depth) / max(len(depths) - 1, 1))
        mean, low, high = (
            np.where(np.isfinite(line), line, 1e3 * ceiling)
            for line in (curve.mean, curve.low, curve.high)
        )
        axis.plot(grid, mean, ".-", color=color, label=f"{depth}")
        axis.fill_between(grid, low, high, color=color, alpha=0.2, linewidth=0)
        best = curve.optimum
        if math.isfinite(best.value):
            loss = curve.mean.min()
            axis.plot(best.value, loss, "*", color=color, markersize=12)
            axis.plot([best.low, best.high], [loss, loss], "|-", color=color)
    told = tuning.extrapolated
    if told is not None and math.isfinite(told.value):
        label = f"{tuning.extrapolation.target_depth}, extrapolated"
        axis.axvline(told.value, color="black", linestyle="--", label=label)
        axis.axvspan(told.low, told.high, color="black", alpha=0.1, linewidth=0)
    axis.set(
        yscale="log",
        xlabel="log2 of the learning rate, at the base shape",
        ylabel="training loss, last fifth of the steps",
        title=f"width {tuning.width}, {tuning.parametrization or 'no parametrization'}",
    )
    axis.set_ylim(min(curve.low.min() for curve in tuning.curves.values()) / 1.1, 1.1 * ceiling)
    axis.legend(title="depth\n★ optimum", frameon=False)
    return figure
