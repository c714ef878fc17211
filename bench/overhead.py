"""How long does Python take to reach the launches of a training step?

    python bench/overhead.py

The operators on the Triton backend, with the launches themselves replaced by functions that do nothing:
what is left is what the host does besides, the allocation of results included.  Nothing is computed, so no
GPU is needed.  Beside it the same step of torch: its operators on the smallest tensors, where they take
little time but that of the host.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before depthnet: the backend then takes CPU tensors

import torch
from common import interleaved, print_machine, print_table, write_csv
from launches import without_launches
from stack import plain_stack

from depthnet import nn, optim
from depthnet.kernels import residual_stack, scaled_residual, use_backend
from depthnet.kernels.reference import PLAIN
from depthnet.kernels.triton import stack


def main() -> None:
    print_machine()
    torch.set_num_threads(1)
    depth, n, rows = 8, 64, 1
    block = nn.ResidualStack(n, depth)
    x, h, grad = (torch.zeros(rows, n) for _ in range(3))
    free, free_h = x.clone().requires_grad_(), h.clone().requires_grad_()
    weight, scale = block.weight, block.scale
    layers = [layer.clone().requires_grad_() for layer in weight.detach()]
    ours = optim.AdamW([weight], lr=0.0)
    theirs = torch.optim.AdamW(layers, lr=0.0, fused=True)
    weight.grad = torch.zeros_like(weight)
    for layer in layers:
        layer.grad = torch.zeros_like(layer)

    def no_grad_stack():
        with torch.no_grad():
            return residual_stack(x, weight, scale)

    def stack_step():
        return torch.autograd.grad(residual_stack(free, weight, scale), (free, weight), grad)

    def residual_step():
        return torch.autograd.grad(scaled_residual(x, free_h, scale), free_h, grad)

    member, weights = x[None], weight.detach()[None]
    constants = scale, None, 1.0, 1.0, True, PLAIN
    with without_launches():
        _, *saved = stack.residual_stack(member, weights, *constants, True)
    grad_weight = torch.empty_like(weights)

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(weight)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad, torch.empty_like(ctx.saved_tensors[0])

    def nothing_step():
        return torch.autograd.grad(Nothing.apply(free, weight), (free, weight), grad)

    def torch_step():
        return torch.autograd.grad(plain_stack(free, layers, scale), (free, *layers), grad)

    providers = {
        "residual_stack, forward": no_grad_stack,
        "residual_stack, forward and backward": stack_step,
        "  its forward launcher alone": lambda: stack.residual_stack(
            member, weights, *constants, True
        ),
        "  its backward launchers alone": lambda: stack.residual_stack_backward(
            member, weights, *saved, *constants, grad_weight
        ),
        "  allocating what forward returns": lambda: [
            torch.empty(like.shape, dtype=like.dtype) for like in (member, *saved)
        ],
        "  an autograd Function that does nothing": nothing_step,
        "scaled_residual, forward and backward": residual_step,
        "AdamW, one stacked parameter": ours.step,
        f"torch, {depth} layers, forward and backward": torch_step,
        f"torch, fused AdamW, {depth} parameters": theirs.step,
    }
    counts = {}
    with use_backend("triton"), without_launches() as launched:
        for name, function in providers.items():
            launched.clear()
            function()
            counts[name] = len(launched)
        times = interleaved(providers, rounds=20)
    print_table(
        "Host time of a call without the launches, us",
        ("", "us", "launches", "us a launch"),
        [
            (
                name,
                seconds * 1e6,
                counts[name],
                seconds * 1e6 / counts[name] if counts[name] else "",
            )
            for name, seconds in times.items()
        ],
    )
    rows = [
        {"call": name, "us": f"{seconds * 1e6:.2f}", "launches": counts[name]}
        for name, seconds in times.items()
    ]
    write_csv("overhead.csv", rows)


if __name__ == "__main__":
    main()
