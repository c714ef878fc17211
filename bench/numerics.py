"""How does the error of rounding grow with depth?

    python bench/numerics.py

The relative RMS error of a stack's output and gradients against a float64 run of plain PyTorch, by depth,
under Depth-muP (weights N(0, 1/n), multiplier L^-1/2, mean subtraction).  Inputs and weights are numbers
of bfloat16, kept as float32 as a user under autocast keeps them, so that nobody has erred before the first
layer.  Triton's kernels run in its interpreter, where they take most of the time.

Eager PyTorch comes in three variants.  Under autocast its stream has the dtype in which x enters, because
x + scale * z is promoted: float32 beside a float32 x, 16 bits beside the x that a layer before the stack
returns, which is how a network runs.  The third has everything in 16 bits.

A pre-activation near 0 may get another sign than in float64, and with |x| another slope, which no
precision of what follows repairs.  This is part of everyone's error of gradients.  The identity, which has
one slope only, shows what is left without it.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before depthnet: the backend then takes CPU tensors

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import plot
import torch
from common import dtype_name, print_machine, print_table, write_csv
from stack import plain_stack
from torch import Tensor

from depthnet.kernels import residual_stack, use_backend

N, ROWS, SEEDS = 64, 64, 5
DEPTHS = 16, 64, 256, 1024
QUANTITIES = "output", "grad_x", "grad_weight"
PHI = {"abs": Tensor.abs, "identity": lambda h: h}
SETTINGS = [
    ("abs", torch.bfloat16),
    ("abs", torch.float16),
    ("abs", torch.float32),
    ("identity", torch.bfloat16),
]
IN_TRITON = ("abs", torch.bfloat16)  # the interpreter takes too long for more
# The claim: depthnet's error grows no faster with depth, and is at most this part of eager's in the end.
PART = 0.5
# Exponents of growth that differ by less are the same: 9 % between the first depth and the last, about
# what other seeds change.
SAME_EXPONENT = 0.02


class Provider(NamedTuple):
    function: Callable[[Tensor, Tensor], Tensor]
    x: torch.dtype
    weight: torch.dtype
    backend: str = "auto"


def providers(activation: str, dtype: torch.dtype, scale: float) -> dict[str, Provider]:
    wide = torch.float32

    def ours(x, weight):
        return residual_stack(x, weight, scale, activation=activation)

    def eager(x, weight):
        return plain_stack(x, weight.unbind(), scale, PHI[activation])

    def autocast(function):
        def run(x, weight):
            with torch.autocast("cpu", dtype):
                return function(x, weight)

        return run

    if dtype == wide:
        return {
            "depthnet, native": Provider(ours, wide, wide, "cpu"),
            "eager": Provider(eager, wide, wide),
        }
    triton = {"depthnet, Triton": Provider(autocast(ours), wide, wide, "triton")}
    return {
        **(triton if (activation, dtype) == IN_TRITON else {}),
        "depthnet, native": Provider(autocast(ours), wide, wide, "cpu"),
        "depthnet, reference": Provider(autocast(ours), wide, wide, "reference"),
        "eager autocast, float32 x": Provider(autocast(eager), wide, wide),
        "eager autocast, 16-bit x": Provider(autocast(eager), dtype, wide),
        "eager, all 16-bit": Provider(eager, dtype, dtype),
    }


def run(provider: Provider, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """The output and the gradients of x and of the weights."""
    x, weight = x.to(provider.x).requires_grad_(), weight.to(provider.weight).requires_grad_()
    with use_backend(provider.backend):
        y = provider.function(x, weight)
        return [y, *torch.autograd.grad(y, (x, weight), grad.to(y.dtype))]


def relative_error(result: Tensor, truth: Tensor) -> float:
    return ((result.double() - truth).norm() / truth.norm()).item()


def measure(activation: str, depth: int, seed: int) -> dict[tuple, tuple[torch.dtype, list[float]]]:
    """For each dtype and provider the stream's dtype, and the errors of the QUANTITIES."""
    torch.manual_seed(seed)
    draws = torch.randn(ROWS, N), torch.randn(depth, N, N) * N**-0.5, torch.randn(ROWS, N)
    x, weight, grad = (draw.bfloat16().float() for draw in draws)
    scale, wide = depth**-0.5, torch.float64
    exact = Provider(lambda x, w: plain_stack(x, w, scale, PHI[activation]), wide, wide)
    truth = run(exact, x, weight, grad)
    measured = {}
    for dtype in (dtype for own, dtype in SETTINGS if own == activation):
        for name, provider in providers(activation, dtype, scale).items():
            results = run(provider, x, weight, grad)
            errors = [relative_error(*pair) for pair in zip(results, truth, strict=True)]
            measured[dtype, name] = results[0].dtype, errors
    return measured


def exponent(errors: list[float]) -> float:
    """b in error ~ L^b, by least squares in logarithms."""
    logs = [math.log(error) for error in errors]
    return statistics.linear_regression([math.log(depth) for depth in DEPTHS], logs).slope


def summary() -> list[dict]:
    rows = []
    start = time.perf_counter()
    for activation in PHI:
        for depth in DEPTHS:
            seeds = []
            for seed in range(SEEDS):
                seeds.append(measure(activation, depth, seed))
                passed = time.perf_counter() - start
                print(f"{activation}, L = {depth}, seed {seed}: {passed:.0f} s", flush=True)
            for dtype, name in seeds[0]:
                streams, errors = zip(*(one[dtype, name] for one in seeds), strict=True)
                row = {
                    "activation": activation,
                    "dtype": dtype_name(dtype),
                    "provider": name,
                    "stream": dtype_name(streams[0]),
                    "n": N,
                    "rows": ROWS,
                    "seeds": SEEDS,
                    "depth": depth,
                }
                for quantity, values in zip(QUANTITIES, zip(*errors, strict=True), strict=True):
                    spread = {
                        quantity: statistics.median(values),
                        f"{quantity}_least": min(values),
                        f"{quantity}_most": max(values),
                    }
                    row |= {key: f"{value:.4g}" for key, value in spread.items()}
                rows.append(row)
    return rows


def judge(rows: list[dict]) -> None:
    """Print the errors, and whether the claim holds against each variant of eager."""
    medians = {}
    for row in rows:
        for quantity in QUANTITIES:
            key = row["activation"], row["dtype"], row["provider"], row["stream"], quantity
            medians.setdefault(key, []).append(float(row[quantity]))
    print_table(
        f"Relative error, the median of {SEEDS} seeds; it grows like L^b",
        ("phi", "dtype", "", "stream", "", *(f"L={depth}" for depth in DEPTHS), "b"),
        [
            (*key, *(f"{error:.1e}" for error in errors), f"{exponent(errors):+.3f}")
            for key, errors in medians.items()
        ],
    )
    lines = []
    for (activation, dtype, name, stream, quantity), errors in medians.items():
        if dtype == "float32" or name.startswith("depthnet"):
            continue
        ours = [  # the worst of the backends counts
            own
            for (*setting, provider, _, kind), own in medians.items()
            if (setting, kind) == ([activation, dtype], quantity)
            and provider.startswith("depthnet")
        ]
        growth, theirs = max(map(exponent, ours)), exponent(errors)
        ratio = max(own[-1] for own in ours) / errors[-1]
        passes = growth <= theirs + SAME_EXPONENT, ratio <= PART
        lines.append(
            (
                *(activation, dtype, f"{name} ({stream} stream)", quantity),
                *(f"{growth:+.3f}", f"{theirs:+.3f}", "pass" if passes[0] else "miss"),
                *(f"{ratio:.2f}", "pass" if passes[1] else "miss"),
            )
        )
    print_table(
        f"Does depthnet's error grow no faster, and is it at most {PART} of eager's at L = {DEPTHS[-1]}?",
        (
            "phi",
            "dtype",
            "against",
            "",
            "our b",
            "their b",
            "no faster",
            "ratio",
            f"at most {PART}",
        ),
        lines,
    )


def main() -> None:
    print_machine()
    torch.set_num_threads(1)
    rows = summary()
    judge(rows)
    write_csv("numerics.csv", rows)
    plot.numerics()


if __name__ == "__main__":
    main()
