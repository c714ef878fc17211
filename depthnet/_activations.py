"""Positively 1-homogeneous activations: phi(h) = p * max(h, 0) + q * max(-h, 0)."""

from __future__ import annotations

import math

import torch

from depthnet._checks import one_of

ACTIVATIONS: dict[str, tuple[float, float]] = {
    "identity": (1.0, -1.0),
    "relu": (1.0, 0.0),
    "abs": (1.0, 1.0),
    "leaky_relu": (1.0, -0.01),
}


def slopes(activation: str | tuple[float, float]) -> tuple[float, float]:
    """The slopes (p, q) of an activation, given by name or as the pair itself.

    leaky_relu has torch's default negative slope, 0.01; any other is the pair (1, -slope).

    Raises:
        ValueError: the name is unknown, or a slope is not finite.
        TypeError: `activation` is neither a name nor a pair of numbers.
    """
    if isinstance(activation, str):
        return ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    try:
        p, q = (float(value) for value in activation)
    except (TypeError, ValueError):
        raise TypeError(
            f"activation must be a name ({', '.join(ACTIVATIONS)}) or a pair of slopes (p, q), "
            f"got {activation!r}"
        ) from None
    if not torch.compiler.is_compiling() and not (math.isfinite(p) and math.isfinite(q)):
        raise ValueError(f"activation=(p, q) must be finite slopes, got {activation!r}")
    return p, q
