"""Argument checks shared by the whole package: one clear error, naming the argument."""

from __future__ import annotations

import difflib
import importlib
import math
import numbers
from collections.abc import Iterable, Mapping


def one_of(argument: str, value: object, choices: Iterable[str]) -> str:
    """Return `value` if it is one of `choices`, else raise a ValueError naming the nearest one."""
    choices = list(choices)
    if isinstance(value, str) and value in choices:
        return value
    near = difflib.get_close_matches(str(value).lower(), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{argument}={value!r} is not one of {', '.join(choices)}{hint}")


def integer(argument: str, value: object, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`, else raise a TypeError or ValueError."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be an integer, got {value!r} ({type(value).__name__})")
    if value.__index__() < minimum:
        raise ValueError(f"{argument} must be at least {minimum}, got {value}")
    return value.__index__()


def integers(settings: object, **minimums: int) -> None:
    """Check attributes that must be integers of at least a minimum; of several, every one."""
    for argument, minimum in minimums.items():
        value = getattr(settings, argument)
        for each in value if isinstance(value, (tuple, list)) else [value]:
            integer(argument, each, minimum)


def number(argument: str, value: object) -> float:
    """Return `value` as a float if it is a finite real number, else raise a ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ValueError(f"{argument} must be a finite number, got {value!r}")
    return float(value)


def differences(there: Mapping, now: Mapping) -> str:
    """What differs between two records, a line a key; empty if nothing does."""
    return "".join(
        f"\n  {key}: {there.get(key)!r} there, {now.get(key)!r} now"
        for key in {**there, **now}
        if there.get(key) != now.get(key)
    )


def optional_import(module: str, extra: str, purpose: str):
    """Import `module`, or raise an ImportError naming the extra of depthnet that brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(
            f"{purpose} needs {package}, which cannot be imported ({error}). "
            f"Install it with: pip install 'depthnet[{extra}]'"
        ) from error
