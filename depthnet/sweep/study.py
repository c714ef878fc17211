"""What a sweep trains: its settings, validated, and the jobs that they make."""

from __future__ import annotations

import math
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

import depthnet
from depthnet._checks import integer, integers, number, one_of, optional_import
from depthnet.data import Dataset
from depthnet.kernels import dispatch, slopes
from depthnet.scaling import Parametrization
from depthnet.training.schedules import SCHEDULES

SAMPLERS = ("grid", "tpe")
SWEEPS = ("all", "hidden", "frozen")
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Range:
    """Every number from low to high; of a search, not of a grid."""

    low: float
    high: float


@dataclass(frozen=True, order=True)
class Network:
    """What decides the shapes of tensors, and what the members of one population have in common.

    parametrization: a preset's name, or exponents "ALPHA,GAMMA". activation: a name, or slopes "P,Q".
    sweep: whose learning rate moves, see SweepSettings.
    """

    parametrization: str
    activation: str
    width: int
    depth: int
    sweep: str = "all"

    @property
    def name(self) -> str:
        return f"{self.parametrization}-{self.activation}-n{self.width}-L{self.depth}-{self.sweep}"


@dataclass(frozen=True)
class Member:
    """The hyperparameters of one trial, at the base shape.

    log2_lr: of every layer, or of the blocks, as the network's `sweep` says. log2_block_multiplier: of
    a, the branch multiplier. weight_decay: of AdamW. seed: of initial weights and batches.
    """

    log2_lr: float
    log2_block_multiplier: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Job:
    """The trials that train as one population, and are claimed by one worker.

    name: unique in the study.
    """

    name: str
    network: Network
    members: tuple[Member, ...]


@dataclass(frozen=True, eq=False)
class Trial:
    """A finished trial.

    losses: float32 (steps,), the training loss of every step; NaN from the first that was not finite on.
    seconds: its share of its population's time. flops: of its training.
    diverged_at: the first step whose loss was not finite, or None.
    """

    network: Network
    member: Member
    losses: np.ndarray
    seconds: float
    flops: float
    diverged_at: int | None


Values = tuple[float, ...] | Range


@dataclass(frozen=True)
class SweepSettings:
    """A study: a grid, or a search, over hyperparameters and shapes.

    Args:
        name: of the study in its storage.
        data, data_dir: see depthnet.data.load.
        parametrization: presets, or exponents "ALPHA,GAMMA". activation: names, or slopes "P,Q".
        width, depth: sizes n and L of the networks. base_width, base_depth: the shape that
            hyperparameters are named at; None means the smallest of the study.
        log2_lr: of the learning rate; log2_block_multiplier: of the branch multiplier at the base depth,
            None meaning base_depth^-1/2; weight_decay: each a list of values, or for the `tpe` sampler
            a Range.
        seeds: every trial is repeated with the seeds 0 .. seeds-1.
        steps, batch: of training.
        schedule: of the learning rates: `constant`, or `linear` or `cosine`, which fall to 0 after the
            last step. warmup: steps in which they rise first.
        sweep: whose learning rate moves: `all` layers'; that of the blocks only (`hidden`), input and
            output layers having 2^outer_log2_lr; or that of the blocks, input and output layers staying
            as they are initialized (`frozen`, which needs an output_std). Several make a panel each.
        output_std: standard deviation of the output layer's initial weights at the base width.
        sampler: `grid` trains every combination; `tpe` searches the ranges for each network apart, with
            `trials` candidates, `round` of them at a time, each trained with every seed.
        memory: what a population may take, such as "2GiB"; it bounds the number of members.
        device: a torch device.

    Raises:
        TypeError, ValueError: a setting is not as described; the message begins with its name.
    """

    name: str = "sweep"
    data: str = "text"
    data_dir: str | None = None
    parametrization: tuple[str, ...] = ("depth_mup",)
    activation: tuple[str, ...] = ("abs",)
    width: tuple[int, ...] = (64,)
    depth: tuple[int, ...] = (8, 16, 32, 64, 128)
    base_width: int | None = None
    base_depth: int | None = None
    log2_lr: Values = tuple(range(-13, -3))
    log2_block_multiplier: Values | None = None
    weight_decay: Values = (0.0,)
    seeds: int = 2
    steps: int = 300
    batch: int = 64
    schedule: str = "constant"
    warmup: int = 0
    sweep: tuple[str, ...] = ("all",)
    outer_log2_lr: float = -10.0
    output_std: float = 0.0
    sampler: str = "grid"
    trials: int = 40
    round: int = 10
    memory: str = "2GiB"
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.+-]+", self.name):
            raise ValueError(f"name must be letters, digits and any of .+-_, got {self.name!r}")
        integers(self, seeds=1, batch=1, trials=1, round=1)
        integers(self, steps=5)  # the last fifth of the steps must hold one
        for key in ("parametrization", "activation", "width", "depth", "sweep"):
            self._set(key, _listed(key, getattr(self, key)))
        integers(self, width=1, depth=1, warmup=0)
        if self.warmup >= self.steps:
            raise ValueError(f"warmup must be less than steps, {self.steps}, got {self.warmup}")
        for value in self.parametrization:
            if not isinstance(value, str):
                raise TypeError(f"parametrization must be a name or 'ALPHA,GAMMA', got {value!r}")
        names = tuple(Parametrization.of(value).name for value in self.parametrization)
        self._set("parametrization", names)
        for value in self.activation:
            slopes(activation(value))
        for key in ("parametrization", "activation", "width", "depth", "sweep"):
            _different(key, getattr(self, key))
        for key, sizes in (("base_width", self.width), ("base_depth", self.depth)):
            if getattr(self, key) is None:
                self._set(key, min(sizes))
            integer(key, getattr(self, key), 1)
        one_of("sampler", self.sampler, SAMPLERS)
        one_of("schedule", self.schedule, SCHEDULES)
        for each in self.sweep:
            one_of("sweep", each, SWEEPS)
        if not -60 <= number("outer_log2_lr", self.outer_log2_lr) <= 60:
            raise ValueError(f"outer_log2_lr must be from -60 to 60, got {self.outer_log2_lr}")
        if number("output_std", self.output_std) < 0:
            raise ValueError(f"output_std must not be negative, got {self.output_std}")
        if "frozen" in self.sweep and not self.output_std:
            raise ValueError(
                "output_std must be positive with sweep frozen: an output layer that stays at 0 passes "
                "nothing on; got 0"
            )
        if self.log2_block_multiplier is None:
            self._set("log2_block_multiplier", -0.5 * math.log2(self.base_depth))
        for key, low, high in (
            ("log2_lr", -60, 60),
            ("log2_block_multiplier", -60, 60),
            ("weight_decay", 0, 2.0**60),
        ):
            self._set(key, _numbers(key, getattr(self, key), low, high, self.sampler))
        if self.sampler == "tpe" and not self.searched:
            raise ValueError("sampler: tpe searches ranges, and no setting is a range")
        memory_bytes(self.memory)
        try:
            torch.empty(0, device=self.device).tolist()
        except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device: {self.device!r} cannot be used ({reason})") from None

    def _set(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    @property
    def searched(self) -> dict[str, Range]:
        """The settings of a member that are ranges."""
        keys = ("log2_lr", "log2_block_multiplier", "weight_decay")
        values = {key: getattr(self, key) for key in keys}
        return {key: value for key, value in values.items() if isinstance(value, Range)}

    @property
    def networks(self) -> list[Network]:
        """Every network of the study, the depths of one parametrization side by side."""
        kinds = product(self.parametrization, self.activation, self.width, self.sweep)
        return [
            Network(parametrization, activation, width, depth, sweep)
            for parametrization, activation, width, sweep in kinds
            for depth in self.depth
        ]

    @property
    def planned(self) -> int:
        """The number of trials."""
        values = (self.log2_lr, self.log2_block_multiplier, self.weight_decay)
        candidates = math.prod(len(x) for x in values if not isinstance(x, Range))
        if self.sampler == "tpe":
            candidates *= self.trials
        return candidates * self.seeds * len(self.networks)


def activation(value: Any) -> str | tuple[float, float]:
    """A name of an activation as it is, the text "P,Q" as two slopes."""
    if isinstance(value, str) and "," in value:
        try:
            p, q = map(float, value.split(","))
        except ValueError:
            raise ValueError(f"activation must be a name or slopes 'P,Q', got {value!r}") from None
        return p, q
    return value


def memory_bytes(text: str) -> int:
    """The number of bytes that a text such as "2GiB" or "500 MB" names."""
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})", str(text))
    if not match or not float(match[1]):
        raise ValueError(f"memory must be a size such as 2GiB or 500MB, got {text!r}")
    return int(float(match[1]) * UNITS[match[2]])


def _listed(key: str, value: Any) -> tuple:
    """One value, or several, as a tuple."""
    values = (value,) if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
    if not values:
        raise ValueError(f"{key} must have at least one value, got none")
    return values


def _different(key: str, values: tuple) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{key} must be different values, got {', '.join(map(str, values))}")


def _numbers(key: str, value: Any, low: float, high: float, sampler: str) -> Values:
    """Numbers in ascending order, or a Range; each of low .. high."""
    if isinstance(value, Mapping):
        value = _from_mapping(key, value)
    if isinstance(value, Range):
        ends = (number(key, value.low), number(key, value.high))
        if ends[0] >= ends[1]:
            raise ValueError(f"{key} must have low below high, got {ends[0]:g} and {ends[1]:g}")
        if sampler != "tpe":
            raise ValueError(f"{key} needs a step, or a list of values: a grid has no ranges")
        value, found = Range(*ends), ends
    else:
        value = found = tuple(sorted(number(key, each) for each in _listed(key, value)))
        _different(key, value)
    if not all(low <= each <= high for each in found):
        raise ValueError(
            f"{key} must be from {low:g} to {high:g}, got {min(found):g}, {max(found):g}"
        )
    return value


def _from_mapping(key: str, given: Mapping) -> Values:
    """{low, high} as a Range, {low, high, step} as the values low, low + step, .. high."""
    if not {"low", "high"} <= set(given) <= {"low", "high", "step"}:
        raise ValueError(f"{key} must be a list, or have low, high and step; got {dict(given)}")
    low, high = (number(f"{key}.{end}", given[end]) for end in ("low", "high"))
    if "step" not in given:
        return Range(low, high)
    step = number(f"{key}.step", given["step"])
    if step <= 0 or low > high:
        raise ValueError(f"{key} must have low at most high and a positive step, got {dict(given)}")
    count = (high - low) / step
    if abs(count - round(count)) > 1e-9:
        raise ValueError(f"{key}: low and high must be whole steps apart, got {dict(given)}")
    return tuple(low + index * step for index in range(round(count) + 1))


def read_file(path: str | Path) -> dict[str, Any]:
    """The settings of a study file, YAML or TOML; its `name` is the file's where it has none.

    Raises:
        ValueError: it cannot be read, is not a table, or has a key that is no setting.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"study: {path} cannot be read ({error})") from None
    if path.suffix == ".toml":
        module = "tomllib" if sys.version_info >= (3, 11) else "tomli"
        toml = optional_import(module, "sweep", "a TOML study")
        parse, broken = toml.loads, toml.TOMLDecodeError
    elif path.suffix in (".yaml", ".yml"):
        yaml = optional_import("yaml", "sweep", "a YAML study")
        parse, broken = yaml.safe_load, yaml.YAMLError
    else:
        raise ValueError(f"study: {path} must be a .yaml, .yml or .toml file")
    try:
        given = parse(text)
    except broken as error:
        raise ValueError(
            f"study: {path} cannot be parsed ({' '.join(str(error).split())})"
        ) from None
    if not isinstance(given, dict):
        raise ValueError(f"study: {path} must hold settings as `key: value`, got {given!r}")
    known = [field.name for field in fields(SweepSettings)]
    for key in given:
        one_of(f"study: {path}: the key", key, known)
    return {"name": path.stem, **given}


def from_record(record: Mapping[str, Any]) -> SweepSettings:
    """The settings that `record` made a record of."""
    given = {field.name: record[field.name] for field in fields(SweepSettings)}
    return SweepSettings(**given)


def record(settings: SweepSettings, data: Dataset) -> dict[str, Any]:
    """What must be equal for a study to go on: the settings, the data and the software, JSON-able."""
    optuna = optional_import("optuna", "sweep", "a sweep")
    software = {**versions(), "optuna": optuna.__version__}
    return {**asdict(settings), "source": data.source, "versions": software}


def versions() -> dict[str, str]:
    """The software that results depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "depthnet": depthnet.__version__,
        "backend": dispatch.choice(),
    }
