"""Depth transfer: loss against learning rate at many depths, for several parametrizations.

All learning rates and seeds of one (parametrization, depth) are one job: they train as one population.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from depthnet._checks import integers
from depthnet.data import Dataset
from depthnet.kernels import dispatch, slopes
from depthnet.nn import ResNet
from depthnet.optim import AdamW
from depthnet.scaling import Parametrization
from depthnet.sweep.store import Store
from depthnet.training.population import SECTIONS, PopulationTrainer

FIXED_LOG2_LR = -7.0  # of input and output layers where only the hidden learning rate is swept
BETAS = (0.9, 0.99)
CHECKPOINT_SECONDS = 20.0


@dataclass(frozen=True)
class TransferSettings:
    """What a depth-transfer study trains.

    Args:
        data, data_dir: see depthnet.data.load.
        width: n; also the base width. depths: the numbers L of blocks.
        base_depth: the depth that learning rates are tuned at, one of `depths`; None is the smallest.
        parametrizations: presets or exponents "ALPHA,GAMMA". activation: a name, or slopes (p, q).
        log2_lr: least and greatest log2 of the learning rate. per_octave: grid points a factor of 2.
        seeds: their number. steps, batch: of training.
        sweep: `hidden` moves the learning rate of the blocks only, input and output layers staying at
            2^-7; `all` moves every one.
        device: a torch device.

    Raises:
        TypeError, ValueError: a setting is not as described.
    """

    data: str = "text"
    data_dir: str | None = None
    width: int = 64
    depths: tuple[int, ...] = (8, 16, 32, 64, 128)
    base_depth: int | None = None
    parametrizations: tuple[str, ...] = ("depth_mup", "half_zero", "ode", "standard")
    activation: str | tuple[float, float] = "abs"
    log2_lr: tuple[float, float] = (-13.0, -4.0)
    per_octave: int = 1
    seeds: int = 2
    steps: int = 300
    batch: int = 64
    sweep: str = "hidden"
    device: str = "cpu"

    def __post_init__(self) -> None:
        integers(self, width=1, seeds=1, batch=1, per_octave=1)
        integers(self, steps=5)  # the last fifth of the steps must hold one
        for name in self.parametrizations:
            if not isinstance(name, str):
                raise TypeError(f"parametrizations must be names or 'ALPHA,GAMMA', got {name!r}")
        names = tuple(Parametrization.of(name).name for name in self.parametrizations)
        object.__setattr__(self, "parametrizations", names)
        for argument in ("depths", "parametrizations"):
            values = getattr(self, argument)
            if not values or len(set(values)) != len(values):
                raise ValueError(
                    f"{argument} must be different from each other, at least one; got {values}"
                )
        integers(self, depths=1)
        if self.base_depth is None:
            object.__setattr__(self, "base_depth", min(self.depths))
        elif self.base_depth not in self.depths:
            raise ValueError(
                f"base_depth must be one of depths, {self.depths}, got {self.base_depth}"
            )
        slopes(self.activation)
        low, high = self.log2_lr
        if not -60 <= low < high <= 60:
            raise ValueError(f"log2_lr must be two numbers, the lower first, got {self.log2_lr}")
        if abs((high - low) * self.per_octave % 1) > 1e-9:
            raise ValueError(
                f"log2_lr must be whole steps of 1/{self.per_octave} apart, got {self.log2_lr}"
            )
        if self.sweep not in ("hidden", "all"):
            raise ValueError(f"sweep must be hidden or all, got {self.sweep!r}")
        try:
            torch.empty(0, device=self.device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {self.device!r} cannot be used ({reason})") from None

    @property
    def grid(self) -> np.ndarray:
        """The log2 learning rates, ascending."""
        low, high = self.log2_lr
        return low + np.arange(int((high - low) * self.per_octave + 1e-9) + 1) / self.per_octave


@dataclass(frozen=True)
class Job:
    """The runs of one parametrization at one depth; member i has log2_lr[i] and seed[i]."""

    parametrization: Parametrization
    depth: int
    log2_lr: np.ndarray
    seed: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.parametrization.name}-L{self.depth}"


@dataclass
class JobResult:
    """A finished job: float32 losses (steps, members) and the seconds spent by section."""

    job: Job
    losses: np.ndarray
    seconds: dict[str, float]


class Interrupted(Exception):
    """The study was asked to stop; what it had done is saved."""


def jobs(settings: TransferSettings) -> list[Job]:
    """Every job of a study, the depths of one parametrization after another."""
    log2_lr = np.tile(settings.grid, settings.seeds)
    seed = np.repeat(np.arange(settings.seeds), len(settings.grid))
    return [
        Job(Parametrization.of(name), depth, log2_lr, seed)
        for name in settings.parametrizations
        for depth in settings.depths
    ]


def trainer(settings: TransferSettings, job: Job, data: Dataset) -> PopulationTrainer:
    """A job's population at its first step.  Members of one seed start from the same weights."""
    model = ResNet(
        data.in_features,
        settings.width,
        job.depth,
        data.out_features,
        activation=settings.activation,
        parametrization=job.parametrization,
        active_features=data.active_features,
        base_width=settings.width,
        base_depth=settings.base_depth,
        population=len(job.seed),
        generator=[torch.Generator().manual_seed(int(seed)) for seed in job.seed],
    ).to(settings.device)
    swept = 2.0**job.log2_lr
    groups = model.param_groups("adamw")
    for group in groups:
        moves = settings.sweep == "all" or group["name"] == "hidden"
        group["lr"] = swept if moves else 2.0**FIXED_LOG2_LR
    optimizer = AdamW(groups, betas=BETAS, weight_decay=0.0)
    seeds = [int(seed) for seed in job.seed]
    return PopulationTrainer(model, optimizer, data, seeds, settings.batch, settings.steps)


def versions() -> dict[str, str]:
    """The software that results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "depthnet": version("depthnet"),
        "backend": dispatch.choice(),
    }


def record(settings: TransferSettings, data: Dataset) -> dict[str, Any]:
    """What must be equal for a study to go on: the settings, the data and the software."""
    return {**asdict(settings), "source": data.source, "versions": versions()}


def run(
    settings: TransferSettings,
    store: Store,
    data: Dataset,
    *,
    progress: Callable[[Job, int], Any] = lambda job, steps: None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[JobResult]:
    """Train what is not yet trained and yield every job's result, in order.

    A study that was stopped, or killed, goes on where it was when it is run again with the same
    settings and folder, and ends with the same results.

    Args:
        store: the study's folder, opened with `record(settings, data)`.
        data: what to train on.
        progress: called with a job and the number of its steps that are newly known.
        stop: asked after every step; if true, the state is saved and Interrupted raised.

    Raises:
        Interrupted: `stop` said so.
    """
    for job in jobs(settings):
        saved = store.finished(job.name)
        if saved is None:
            population = trainer(settings, job, data)
            store.load_checkpoint(job.name, population.load_state_dict)
            progress(job, population.step)
            last_save = time.monotonic()
            while population.step < settings.steps:
                population.train_step()
                progress(job, 1)
                if stop():
                    store.save_checkpoint(job.name, population.state_dict())
                    raise Interrupted
                if time.monotonic() - last_save > CHECKPOINT_SECONDS:
                    store.save_checkpoint(job.name, population.state_dict())
                    last_save = time.monotonic()
            saved = {"losses": population.losses, **population.seconds}
            store.finish(job.name, **saved)
        else:
            progress(job, settings.steps)
        losses = saved.pop("losses", np.empty(0))
        if losses.shape != (settings.steps, len(job.seed)) or set(saved) != set(SECTIONS):
            raise ValueError(f"out: the file of job {job.name} is not of this study; remove it")
        yield JobResult(job, losses, {section: float(value) for section, value in saved.items()})
