"""Figures 14 to 16: learning rates, multipliers and depths of a small transformer, trained on text."""

from __future__ import annotations

import math
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from depthnet import data
from depthnet._checks import integers, number, optional_import
from depthnet.nn import Transformer
from depthnet.optim import AdamW
from depthnet.reproduce.curves import (
    Curves,
    Measured,
    Results,
    Variant,
    judged,
    less,
    moves,
    stays,
    words,
)
from depthnet.reproduce.study import Arrays, Findings, Job, Verdict
from depthnet.sweep import analysis
from depthnet.sweep.analysis import COST_LIMIT, DRIFT_LIMIT, Estimate
from depthnet.sweep.optima import Slice, interval
from depthnet.training.language import BETAS, FINAL_RATE
from depthnet.training.schedules import schedule

WARMUP = 0.1283  # of the steps; of the paper's 3900 it makes 500
SPREAD_LIMIT = 0.05  # of the least loss: about what the axis of the paper's figure 14 covers
VIABLE = 0.05  # of the least loss: a learning rate whose loss is above it by more is not viable
WAIT = 0.2  # seconds between questions whether to stop, where nothing else happens


@dataclass(frozen=True)
class Transformers(Curves):
    """Trains transformers of several depths, every point of a grid with every seed.

    All three studies have the same settings and share what they train.  The learning rate is that of
    all layers; it rises during the first eighth of the steps and falls to a tenth by a cosine.

    Args:
        data, data_dir: source and folder of depthnet.data.tokens.
        width, head_size, context, depths: of the networks; a depth counts pairs of attention and MLP.
        base_depth: the depth at which learning rate and multiplier are named, for width 128.
        log2_lr: least and greatest log2 of the learning rate. lr_step: of that grid, in octaves.
        log2_a: of the block multiplier. tuned, multipliers: of figure 14, log2 of the learning rate and
            of the multipliers.
        seeds, steps, batch: of training; a batch counts texts of `context` tokens. microbatch: as many
            of them go through the network at once.
        early, middle, late: parts of training, from 0 to 1, whose losses are averaged.
        device: of torch. memory, sweep, outer_log2_lr, output_std, schedule, warmup: play no part.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    shared: ClassVar[str] = "transformers"
    quick: ClassVar[dict[str, Any]] = {
        "depths": (2, 4),
        "log2_lr": (-8.0, -6.0),
        "multipliers": (-3.0, -1.0),
        "seeds": 1,
        "steps": 60,
    }
    shown: ClassVar[tuple[str, ...]]  # the parts of training that a study is about

    width: int = 32
    head_size: int = 16
    context: int = 64
    depths: tuple[int, ...] = (2, 4, 8, 16, 32)
    base_depth: int = 4
    log2_lr: tuple[float, float] = (-10.0, -5.0)
    lr_step: float = 1.0
    log2_a: tuple[float, ...] = (-1.0,)
    tuned: float = -8.0
    multipliers: tuple[float, ...] = (-5.0, -3.0, -1.0, 0.0)
    seeds: int = 1
    steps: int = 150
    batch: int = 8
    microbatch: int = 8
    early: tuple[float, float] = (0.05, 0.1)
    middle: tuple[float, float] = (0.5, 0.6)
    late: tuple[float, float] = (0.9, 1.0)

    def __post_init__(self) -> None:
        integers(self, context=1, microbatch=1)
        if len(self.middle) != 2 or not 0 <= self.middle[0] < self.middle[1] <= 1:
            raise ValueError(f"middle must be two ascending numbers from 0 to 1, got {self.middle}")
        if len(self.log2_a) != 1:
            raise ValueError(f"log2_a must be one value, got {self.log2_a}")
        number("tuned", self.tuned)
        for value in self.multipliers:
            number("multipliers", value)
        super().__post_init__()
        # The network checks the others.
        Transformer(1, self.width, 0, context=self.context, head_size=self.head_size)

    @classmethod
    def full(cls) -> dict[str, Any]:
        samples = 3900 * 256
        return {
            "width": 1024,
            "head_size": 64,
            "context": 4096,
            "depths": (8, 16, 32, 64, 128),
            "base_depth": 8,
            "log2_lr": (math.log2(1e-4) + 3, math.log2(1e-4) + 10),
            "log2_a": (-1.5,),
            "tuned": math.log2(1e-4) + 6,
            "multipliers": tuple(log2 - 1.5 for log2 in range(-4, 2)),  # the paper's are 2^-4 to 2
            "seeds": 1,
            "steps": 3900,
            "batch": 256,
            "microbatch": 1,
            "early": (32_768 / samples, 65_536 / samples),
            "middle": (524_288 / samples, 557_056 / samples),
            "late": (950_272 / samples, 983_040 / samples),
            "device": "cuda",
        }

    @cached_property
    def dataset(self) -> data.Tokens:
        return data.tokens(self.data, folder=self.data_dir)

    def variants(self) -> list[Variant]:
        return [
            Variant(name, label, self.rates(), self.log2_a, name)
            for name, label in (
                ("depth_mup", "Depth-μP"),
                ("completep", "CompleteP"),
                ("mup", "(0, 0)"),
            )
        ]

    def parts(self) -> list[Slice]:
        return [
            Slice(name, *(round(end * self.steps) for end in getattr(self, name)))
            for name in self.shown
        ]

    def _same(self) -> dict[str, str]:
        """Jobs by the job that trains the same: at the base depth a parametrization says nothing."""
        first, *others = (f"{variant.name}-L{self.base_depth}" for variant in self.variants())
        return dict.fromkeys(others, first) if self.base_depth in self.depths else {}

    def jobs(self) -> list[Job]:
        return [job for job in super().jobs() if job.name not in self._same()]

    def _train(self, variant: Variant, depth: int, tick) -> Arrays:
        members = list(product(range(self.seeds), variant.log2_a, variant.log2_lr))
        train = partial(train_one, replace(self), variant, depth, self.dataset.path)
        done, total = 0, len(members) * self.steps

        def step() -> None:
            nonlocal done
            done += 1
            tick(done / total)

        if torch.device(self.device).type == "cpu":
            losses = in_processes(train, members, step, lambda: tick(done / total))
        else:
            losses = [train(member, step) for member in members]
        shape = self.seeds, len(variant.log2_a), len(variant.log2_lr), self.steps
        return {"losses": np.moveaxis(np.reshape(losses, shape), -1, 0)}

    def findings(self, results: Results) -> Findings:
        results = {**results, **{name: results[of] for name, of in self._same().items()}}
        found = super().findings(results)
        return replace(
            found,
            notes=[
                f"loss: in nats a token of {self.dataset.source['name']}, mean over a part of "
                f"{self.steps} steps of {self.batch} texts of {self.context} tokens and over "
                f"{self._seeds_in_words}, at the best point of the grid; width {self.width}, heads of "
                f"{self.head_size}. depth: pairs of attention and MLP. log2 lr, log2 a: as they are at "
                f"width 128 and depth {self.base_depth}, where all parametrizations are the same. *: at "
                "the edge of the grid, the optimum may lie beyond. Intervals are from seeds and blocks of "
                "steps drawn anew; those of one seed do not tell how far another would be.",
                *self.notes(),
            ],
        )

    @property
    def _seeds_in_words(self) -> str:
        return f"{self.seeds} seed{'s' * (self.seeds > 1)}"

    def notes(self) -> list[str]:
        return [
            "The paper: Megatron on Common Crawl, depths 8 to 128, texts of 4096 tokens, 256 a batch, "
            "3900 steps, 500 of which warm up. It does not state the width: the 1024 of `--full` are a "
            "choice, as is the data, which `--set data` names. (0, 0) has the width rules of μP."
        ]


@dataclass(frozen=True)
class Fig14(Transformers):
    name: ClassVar[str] = "fig14"
    title: ClassVar[str] = "A transformer and its block multiplier a under Depth-muP (figure 14)"
    claim: ClassVar[str] = "Does the block multiplier of a transformer matter?"
    along: ClassVar[str] = "log2_a"
    shown: ClassVar[tuple[str, ...]] = ("middle", "late")

    def variants(self) -> list[Variant]:
        return [Variant("multiplier", "Depth-μP", (self.tuned,), self.multipliers)]

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        return [self._matters_little(each) for each in found["multiplier"]]

    def _matters_little(self, each: Measured) -> Verdict:
        """Over the paper's range of multipliers losses differ by less than they do in its figure."""
        curves = each.planes[..., 0]  # of the one learning rate
        with np.errstate(invalid="ignore"):
            spread = ((curves.max(-1) - curves.min(-1)) / curves.min(-1)).max(0)
        low, high = interval(spread[1:])
        return Verdict(
            f"losses differ by less than {100 * SPREAD_LIMIT:g} % from one multiplier to another at every "
            f"depth, {words(each.part)}",
            True if high < SPREAD_LIMIT else False if low > SPREAD_LIMIT else None,
            f"by {100 * spread[0]:.1f} % [{100 * low:.1f}, {100 * high:.1f}] for log2 a from "
            f"{self.multipliers[0]:g} to {self.multipliers[-1]:g}",
        )

    def notes(self) -> list[str]:
        root = 0.5 * math.log2(self.base_depth)
        return [
            f"The learning rate is 2^{self.tuned:g}, for all. The multiplier is a L^-1/2 "
            f"{self.base_depth}^1/2; the paper's range, 2^-4 to 2 times L^-1/2, is log2 a from "
            f"{-4 - root:g} to {1 - root:g}. The axis of its figure covers about "
            f"{100 * SPREAD_LIMIT:g} %.",
            *super().notes(),
        ]


@dataclass(frozen=True)
class Fig15(Transformers):
    name: ClassVar[str] = "fig15"
    title: ClassVar[str] = "Are deeper transformers better, early and late? (figure 15)"
    claim: ClassVar[str] = "Are deeper transformers better?"
    shown: ClassVar[tuple[str, ...]] = ("early", "late")

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        shallow, deep = self.depths[0], self.depths[-1]
        verdicts = []
        for early, late in found.values():
            label = early.variant.label
            verdicts += [
                less(
                    f"{label}: depth {deep} is worse than {shallow}, {words(early.part)}",
                    (early, 0),
                    (early, -1),
                ),
                less(
                    f"{label}: depth {deep} is better than {shallow}, {words(late.part)}",
                    (late, -1),
                    (late, 0),
                ),
            ]
        late = [own[-1] for own in found.values()]
        first, *others = sorted(late, key=lambda each: each.best[-1, 0])
        return verdicts + [
            less(
                f"at depth {deep} {first.variant.label} is better than {each.variant.label}, "
                f"{words(each.part)}",
                (first, -1),
                (each, -1),
            )
            for each in others
        ]

    def figure(self, found: dict[str, list[Measured]]):
        """The least loss against depth, a panel a part of training."""
        optional_import("matplotlib", "plot", "drawing the picture")
        from matplotlib.figure import Figure

        parts = self.parts()
        figure = Figure(figsize=(2.4 + 3.6 * len(parts), 4.6), layout="constrained")
        axes = figure.subplots(1, len(parts), squeeze=False)[0]
        for index, (axis, part) in enumerate(zip(axes, parts, strict=True)):
            self._draw_best(axis, [own[index] for own in found.values()])
            axis.set_title(f"{part.name}: {words(part)}", fontsize=10)
            axis.set_xticks(self.depths, self.depths)
            axis.minorticks_off()
            axis.set_xlabel("depth (pairs of attention and MLP)")
        axes[0].set_ylabel("training loss at the best learning rate (nats a token)")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False)
        figure.suptitle(
            f"{self.claim}\n{self.dataset.source['name']}, width {self.width}, {self.steps} steps, "
            f"{self._seeds_in_words}; bars: 95 % intervals",
            fontsize=11,
        )
        return figure


@dataclass(frozen=True)
class Fig16(Transformers):
    name: ClassVar[str] = "fig16"
    title: ClassVar[str] = "Learning rates of transformers across depth (figure 16)"
    claim: ClassVar[str] = "Does the best learning rate of a transformer transfer across depth?"
    shown: ClassVar[tuple[str, ...]] = ("middle", "late")

    def judge(self, found: dict[str, list[Measured]]) -> list[Verdict]:
        middle, late = found["depth_mup"]
        rises = "rises by half an octave a doubling of depth: that of the blocks stays"
        return [
            drifts(f"Depth-μP: the best learning rate {rises}, {words(middle.part)}", middle, 0.5),
            stays(f"Depth-μP: the best learning rate stays with depth, {words(late.part)}", late),
            *(
                viable(
                    f"Depth-μP: the largest viable learning rate stays, {words(part.part)}", part
                )
                for part in (middle, late)
            ),
            stays(
                f"CompleteP: the best learning rate stays with depth, {words(late.part)}",
                found["completep"][-1],
            ),
            moves(
                f"(0, 0): the best learning rate moves with depth, {words(late.part)}",
                found["mup"][-1],
            ),
            *(self._costs_little(own[-1]) for own in found.values()),
        ]

    def _costs_little(self, late: Measured) -> Verdict:
        curve = late.curves[-1]
        cost = Estimate.of(curve.cost, curve.costs)
        edge = curve.optimum.at_edge  # then it costs as much or more
        return judged(
            f"{late.variant.label}: the learning rate tuned at depth {self.base_depth} costs less than "
            f"{100 * COST_LIMIT:g} % at depth {curve.scale}, {words(late.part)}",
            True
            if cost.high < COST_LIMIT and not edge
            else False
            if cost.low > COST_LIMIT
            else None,
            f"{analysis.percent(cost)} of the loss"
            + "; the optimum is at the edge of the grid" * edge,
            late,
        )

    def notes(self) -> list[str]:
        return [
            f"Viable: the loss is at most {100 * VIABLE:g} % above the least at that depth; losses "
            "between learning rates are interpolated. Under Depth-μP the learning rate of the blocks is "
            "that of the axis times L^-1/2: where it should not depend on depth, the axis rises by half "
            "an octave.",
            *super().notes(),
        ]


def drifts(claim: str, each: Measured, expected: float) -> Verdict:
    """The optimum drifts by a number of octaves a doubling of depth, give or take DRIFT_LIMIT."""
    edges = [curve.scale for curve in each.curves if curve.optimum.at_edge]
    found = _drift(claim, each.transfer.drift, expected, edges)
    return judged(claim, found.holds, found.words, each)


def viable(claim: str, each: Measured) -> Verdict:
    """The largest viable learning rate drifts by no more than DRIFT_LIMIT octaves a doubling."""
    curves = each.planes.min(3)
    largest = largest_viable(np.array(each.settings.log2_lr), curves)
    slopes = analysis._slopes(np.array(each.settings.depth), largest)
    highest = each.settings.log2_lr[-1]
    edges = [
        depth
        for depth, own in zip(each.settings.depth, largest[:, 0], strict=True)
        if own == highest
    ]
    return _drift(claim, Estimate.of(slopes[0], slopes[1:]), 0.0, edges)


def _drift(claim: str, drift: Estimate, expected: float, edges: list[int]) -> Verdict:
    value, low, high = drift
    inside = expected - DRIFT_LIMIT <= low and high <= expected + DRIFT_LIMIT
    outside = high < expected - DRIFT_LIMIT or low > expected + DRIFT_LIMIT
    return Verdict(
        claim,
        False if outside else True if inside and not edges else None,
        f"{value:+.2f} [{low:+.2f}, {high:+.2f}] octaves a doubling of depth, expected {expected:+g}, "
        f"±{DRIFT_LIMIT:g}"
        + (f"; at the edge of the grid at depth {', '.join(map(str, edges))}" if edges else ""),
    )


def largest_viable(log2_lr: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Where curves rise above (1 + VIABLE) times their minimum for the last time.

    Args:
        log2_lr: (G,), ascending. losses: (..., G); infinite where training diverged.

    Returns:
        (...): interpolated between the points of the grid; the last one that is viable where the next
        diverged or there is none; NaN if no loss is finite.
    """
    level = (1 + VIABLE) * losses.min(-1, keepdims=True)
    last = losses.shape[-1] - 1 - (losses <= level)[..., ::-1].argmax(-1)
    beyond = np.minimum(last + 1, losses.shape[-1] - 1)
    at, after = (
        np.take_along_axis(losses, index[..., None], -1)[..., 0] for index in (last, beyond)
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (level[..., 0] - at) / (after - at)
    part = np.where(np.isfinite(after) & (after > at), part, 0.0)
    found = log2_lr[last] + part * (log2_lr[beyond] - log2_lr[last])
    return np.where(np.isfinite(level[..., 0]), found, np.nan)


# ---- training ----

Member = tuple[int, float, float]  # seed, log2 of the multiplier, log2 of the learning rate


def train_one(
    settings: Transformers,
    variant: Variant,
    depth: int,
    path: Path,
    member: Member,
    step_done: Callable[[], None],
) -> np.ndarray:
    """Train a network on a file of tokens: the loss before each step, float32 (steps,), NaN from the
    first on that is not finite."""
    seed, log2_a, log2_lr = member
    device, tokens = torch.device(settings.device), data.tokens(path)
    model = Transformer(
        tokens.vocabulary,
        settings.width,
        depth,
        context=settings.context,
        head_size=settings.head_size,
        parametrization=variant.parametrization,
        block_multiplier=2**log2_a,
        base_depth=settings.base_depth,
        generator=torch.Generator().manual_seed(seed),
    ).to(device)
    optimizer = AdamW(model, 2**log2_lr, BETAS, weight_decay=0.0)
    scheduler = schedule(
        optimizer, "cosine", settings.steps, int(WARMUP * settings.steps), FINAL_RATE
    )
    losses = np.full(settings.steps, np.nan, np.float32)
    for step in range(settings.steps):
        batch = tokens.batch(seed, step, settings.batch, settings.context)
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for x, y in zip(
            *(part.to(device).split(settings.microbatch) for part in batch), strict=True
        ):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
                logits = model(x)
            own = functional.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
            own = own * (len(x) / settings.batch)
            own.backward()
            loss += own.detach()
        if not math.isfinite(loss.item()):
            break
        losses[step] = loss.item()
        optimizer.step()
        scheduler.step()
        step_done()
    return losses


def in_processes(
    train: Callable[[Member, Callable[[], None]], np.ndarray],
    members: list[Member],
    step_done: Callable[[], None],
    waiting: Callable[[], None],
) -> list[np.ndarray]:
    """What `train` returns for each member, in processes of one thread each.

    There are as many as torch would use threads.  They end with this function, however it ends, and with
    this process.

    Args:
        train: can be pickled. step_done: called for each call of what `train` gets as second argument.
        waiting: called now and then; like step_done, it may raise an exception to end all this.
    """
    context, numbered, found = get_context("spawn"), list(enumerate(members)), {}
    count = min(torch.get_num_threads(), len(members))
    processes = {}
    try:
        with _interrupts_ignored():
            for first in range(count):
                reader, writer = context.Pipe(duplex=False)
                arguments = writer, train, numbered[first::count]
                process = context.Process(target=_train_all, args=arguments, daemon=True)
                process.start()
                processes[reader] = process
                writer.close()  # or the end of the process would not be seen
        reading = set(processes)
        while reading:
            waiting()
            for reader in connection.wait(reading, WAIT):
                try:
                    message = reader.recv()
                except EOFError:
                    reading.remove(reader)
                    processes[reader].join()
                    if status := processes[reader].exitcode:
                        waiting()
                        raise RuntimeError(
                            f"a process that trains ended with the status {status}"
                        ) from None
                    continue
                if message is None:
                    step_done()
                else:
                    found.update([message])
    finally:
        for process in processes.values():
            process.terminate()
            process.join()
    return [found[index] for index, _ in numbered]


def _train_all(writer, train, numbered: list[tuple[int, Member]]) -> None:
    torch.set_num_threads(1)
    try:
        for index, member in numbered:
            writer.send((index, train(member, lambda: writer.send(None))))
    except BrokenPipeError:  # the process that reads has been killed
        sys.exit(1)


@contextmanager
def _interrupts_ignored():
    """Processes started here leave Ctrl-C to this one, from their first moment on."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
