"""How the error of rounding grows with depth: what the float32 stream is for."""

from __future__ import annotations

from functools import cache

import torch
from cases import grads, plain_stack
from torch import Tensor

from depthnet import kernels

SHALLOW, DEEP = 16, 256


def errors(results: list[Tensor], truth: list[Tensor]) -> list[float]:
    """Relative errors of the output and of the gradients of x and weight."""
    pairs = zip(results, truth, strict=True)
    return [((a.double() - t).norm() / t.norm()).item() for a, t in pairs]


@cache
def judge(depth: int, device: torch.device):
    """x, weight and the output's gradient, bfloat16; the float64 results; the errors of plain PyTorch with
    everything in bfloat16.  They are the same for all backends on a device."""
    torch.manual_seed(depth)
    n, rows = 64, 64
    draws = torch.randn(rows, n), torch.randn(depth, n, n) / n**0.5, torch.randn(rows, n)
    x, weight, g = (draw.bfloat16() for draw in draws)

    def plain(x, weight):
        return plain_stack(x, weight, depth**-0.5)

    truth = grads(plain, [x, weight], g, torch.float64)
    return (x, weight, g), truth, errors(grads(plain, [x, weight], g), truth)


def test_error_in_bfloat16(backend):
    growth, plain_growth = {}, {}
    for depth in (SHALLOW, DEEP):
        (x, weight, g), truth, plain_growth[depth] = judge(depth, torch.get_default_device())
        ours = grads(
            lambda x, weight, depth=depth: kernels.residual_stack(x, weight, depth**-0.5),
            [x.float(), weight],  # a float32 stream, as under autocast
            g,
        )
        growth[depth] = errors(ours, truth)
    for index, name in enumerate(("output", "gradient of x", "gradient of weight")):
        shallow, deep = growth[SHALLOW][index], growth[DEEP][index]
        plain_shallow, plain_deep = plain_growth[SHALLOW][index], plain_growth[DEEP][index]
        described = (
            f"{name}: {shallow:.2g} to {deep:.2g}, plain {plain_shallow:.2g} to {plain_deep:.2g}"
        )
        assert deep / shallow <= plain_deep / plain_shallow, described
        assert deep <= plain_deep / 2, described
