"""The cases that every backend passes, the plain PyTorch they are judged by, and the judge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

NATIVE = ["cpu-baseline", "cpu-avx2", "cpu-avx512", "cpu-avx512_bf16"]
BACKENDS = ["reference", *NATIVE, "triton"]
native = pytest.mark.parametrize("backend", NATIVE, indirect=True)
WIDTHS = [1, 7, 63, 64, 100, 129]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ACTIVATIONS = ["identity", "relu", "abs", "leaky_relu", (0.5, -2.0)]


def cpu_isas() -> list[str]:
    try:
        from depthnet import _C
    except ImportError:
        return []
    return _C.isas()


def phi(h: Tensor, activation) -> Tensor:
    """The activation as a user of torch would write it."""
    if activation == "identity":
        return h
    if activation == "relu":
        return h.relu()
    if activation == "abs":
        return torch.where(h >= 0, h, -h)  # h.abs() has gradient 0, not 1, at 0
    if activation == "leaky_relu":
        return torch.nn.functional.leaky_relu(h)
    p, q = activation
    return torch.where(h >= 0, p * h, -q * h)


def plain_residual(x, h, scale, activation="abs", mean_subtract=True):
    z = phi(h, activation)
    return x + scale * (z - z.mean(-1, keepdim=True) if mean_subtract else z)


def plain_norm(x, norm):
    if norm == "layer":
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=1e-5)
    return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=1e-5) if norm == "rms" else x


def plain_stack(
    x, weight, scale, activation="abs", mean_subtract=True, block_depth=1, norm=None,
    activate="after", watch=lambda h: None,
):  # fmt: skip
    """x (*P, B, n), weight (*P, L k, n, n); scale a number or (*P,); `watch` sees what phi is taken of."""
    if isinstance(scale, Tensor):
        scale = scale.to(x.dtype)[..., None, None]

    def activated(h):
        watch(h)
        return phi(h, activation)

    layers = weight.unbind(-3)
    for start in range(0, len(layers), block_depth):
        z = plain_norm(x, norm)
        for layer in layers[start : start + block_depth]:
            z = activated(z) @ layer.mT if activate == "before" else activated(z @ layer.mT)
        x = plain_residual(x, z, scale, "identity", mean_subtract)
    return x


def nearest_kink(x, weight, scale, activation="abs", mean_subtract=True, **block) -> float:
    """The least |pre-activation|: phi' jumps at 0, where rounding decides."""
    least = [torch.inf]

    def watch(h):
        least.append(h.abs().min().item() if h.numel() else torch.inf)

    plain_stack(x, weight, scale, activation, mean_subtract, watch=watch, **block)
    return min(least)


def grads(function, inputs: list[Tensor], grad: Tensor, dtype=None) -> list[Tensor]:
    """[output, gradient of each input] of a function of tensors, computed in `dtype`."""
    inputs = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
    output = function(*inputs)
    grad = grad.to(output.dtype)
    gradients = torch.autograd.grad(output, inputs, grad, allow_unused=True, materialize_grads=True)
    return [output.detach(), *gradients]


def assert_as_accurate(
    name: str, ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], terms: int
):
    """Errors against a float64 run are at most twice those of plain torch in the dtype of the inputs.

    Errors are root mean squares; one rounding of the result is always allowed.  float64 itself, which
    has no such judge, may round once for each of the `terms` of a result's sums.
    """
    assert len(ours) == len(plain) == len(truth)
    for index, (a, b, t) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.shape == t.shape, f"{name}[{index}]: shape {tuple(a.shape)}, not {tuple(t.shape)}"
        assert a.dtype == b.dtype, f"{name}[{index}]: {a.dtype}, not {b.dtype}"
        if t.numel() == 0:
            continue
        difference = (a.double() - t).abs()
        error, plain_error = (v.double().sub(t).square().mean().sqrt() for v in (a, b))
        roundings = terms if a.dtype == torch.float64 else 1
        rounding = roundings * torch.finfo(a.dtype).eps * t.square().mean().sqrt()
        worst = int(difference.argmax())
        assert error <= 2 * plain_error + rounding, (
            f"{name}[{index}]: error {error:.3g}, plain torch's {plain_error:.3g}; worst at flat index "
            f"{worst}: {a.flatten()[worst].item()} for {t.flatten()[worst].item()}"
        )
