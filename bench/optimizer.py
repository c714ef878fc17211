"""What does a learning rate for each layer cost?

    python bench/optimizer.py

One AdamW step on a stack of weights (L, n, n), float32: depthnet with a learning rate for each
layer, beside torch's fused AdamW with one learning rate, and with a group for each layer; and a
copy of the bytes that AdamW must move, 28 an element (p, m, v read and written, g read).
"""

import torch
from common import interleaved, print_machine, write_csv

import depthnet

SHAPES = [(64, 64), (128, 64), (256, 64), (512, 32), (1024, 16)]


def providers(n: int, depth: int) -> dict:
    def layers():
        weights = [torch.randn(n, n, requires_grad=True) for _ in range(depth)]
        for weight in weights:
            weight.grad = torch.randn(n, n)
        return weights

    stacked = torch.randn(depth, n, n, requires_grad=True)
    stacked.grad = torch.randn(depth, n, n)
    rates = [1e-3 * (layer + 1) / depth for layer in range(depth)]
    one, many = layers(), layers()
    groups = [{"params": [weight], "lr": lr} for weight, lr in zip(many, rates, strict=True)]
    source = torch.randn(depth * n * n * 28 // 8)
    target = torch.empty_like(source)
    return {
        "depthnet, an lr for each layer": depthnet.optim.AdamW([stacked], lr=rates).step,
        "torch fused, one lr": torch.optim.AdamW(one, lr=1e-3, fused=True).step,
        "torch fused, a group for each layer": torch.optim.AdamW(groups, fused=True).step,
        "copy": lambda: target.copy_(source),
    }


def main() -> None:
    print_machine()
    rows = []
    for n, depth in SHAPES:
        times = interleaved(providers(n, depth))
        ours = next(iter(times.values()))
        for provider, seconds in times.items():
            print(
                f"n={n:<5} L={depth:<4} {provider:<36} {seconds * 1e3:8.3f} ms "
                f"{seconds / ours:6.2f} x ours"
            )
            rows.append(
                {
                    "kernel": "adamw_step",
                    "n": n,
                    "depth": depth,
                    "provider": provider,
                    "ms": f"{seconds * 1e3:.5f}",
                    "bytes": 28 * depth * n * n,
                }
            )
    write_csv("optimizer.csv", rows)


if __name__ == "__main__":
    main()
