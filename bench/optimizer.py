"""What does an optimizer step with a learning rate for each layer cost?

    python bench/optimizer.py
    python bench/optimizer.py --device cuda

One AdamW step, float32, over stacks of weights (n, n) x L, as L tensors and as one stacked tensor:
depthnet with a learning rate for each layer, beside torch's fused AdamW, its foreach AdamW and its
compiled step, each with one learning rate for all and with a group for each layer; and a copy of as
many bytes as AdamW must move, 28 an element (p, m, v read and written, g read).  Then 10,000 tensors of
1,000 elements, and the time of a step beyond the kernel's own, for 10 to 10,000 tensors of 4 elements.
"""

import torch
from common import argument_parser, interleaved, parse_args, print_machine, print_table, write_csv

import depthnet

SHAPES = [(64, 64), (128, 64), (256, 64), (512, 32), (1024, 16)]
BYTES = 28  # an element
MANY = 10_000


def parameter(device: str, *shape: int) -> torch.Tensor:
    weight = torch.randn(shape, device=device, requires_grad=True)
    weight.grad = torch.randn(shape, device=device)
    return weight


def parameters(device: str, count: int, *shape: int) -> list[torch.Tensor]:
    return [parameter(device, *shape) for _ in range(count)]


def rates(count: int) -> list[float]:
    return [1e-3 * (index + 1) / count for index in range(count)]


def groups(params: list[torch.Tensor]) -> list[dict]:
    """A group for each parameter, with a learning rate of its own."""
    return [{"params": [p], "lr": lr} for p, lr in zip(params, rates(len(params)), strict=True)]


def compiled(params: list[torch.Tensor]):
    return torch.compile(torch.optim.AdamW(params).step)


def copy(device: str, elements: int):
    source = torch.randn(elements * BYTES // 8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def torchs(device: str, count: int, *shape: int) -> dict:
    """torch's AdamW with one group, and with a group for each parameter."""
    adamw = torch.optim.AdamW
    return {
        "torch fused, one lr": adamw(parameters(device, count, *shape), fused=True).step,
        "torch fused, a group each": adamw(
            groups(parameters(device, count, *shape)), fused=True
        ).step,
        "torch foreach, one lr": adamw(parameters(device, count, *shape), foreach=True).step,
        "torch foreach, a group each": adamw(
            groups(parameters(device, count, *shape)), foreach=True
        ).step,
    }


def stacks(device: str) -> list[dict]:
    rows = []
    for n, depth in SHAPES:
        adamw = depthnet.optim.AdamW
        providers = {
            "depthnet, stacked": adamw([parameter(device, depth, n, n)], lr=rates(depth)).step,
            "depthnet, a group each": adamw(groups(parameters(device, depth, n, n))).step,
            **torchs(device, depth, n, n),
            "torch fused, stacked": torch.optim.AdamW(
                [parameter(device, depth, n, n)], fused=True
            ).step,
            "torch compile, one lr": compiled(parameters(device, depth, n, n)),
            "copy": copy(device, depth * n * n),
        }
        rows += measured("stack", device, {"n": n, "tensors": depth}, depth * n * n, providers)
    return rows


def many(device: str) -> list[dict]:
    adamw = depthnet.optim.AdamW
    providers = {
        "depthnet, a group each": adamw(groups(parameters(device, MANY, 1000))).step,
        "depthnet, one lr": adamw(parameters(device, MANY, 1000)).step,
        **torchs(device, MANY, 1000),
        "copy": copy(device, MANY * 1000),
    }
    return measured("many", device, {"n": 1000, "tensors": MANY}, MANY * 1000, providers, rounds=5)


def overhead(device: str) -> list[dict]:
    """Steps that move next to nothing."""
    rows = []
    for count in (10, 100, 1000, 10_000):
        providers = {
            "depthnet, one lr": depthnet.optim.AdamW(parameters(device, count, 4)).step,
            "torch fused, one lr": torch.optim.AdamW(parameters(device, count, 4), fused=True).step,
        }
        rows += measured(
            "overhead", device, {"n": 4, "tensors": count}, 4 * count, providers, rounds=10
        )
    return rows


def measured(
    section: str, device: str, size: dict, elements: int, providers: dict, rounds: int = 30
) -> list[dict]:
    times = interleaved(providers, rounds=rounds, device=device)
    return [
        {
            "section": section,
            **size,
            "provider": provider,
            "ms": f"{seconds * 1e3:.5f}",
            "bytes": BYTES * elements,
        }
        for provider, seconds in times.items()
    ]


def report(rows: list[dict]) -> None:
    sizes = dict.fromkeys((row["section"], row["n"], row["tensors"]) for row in rows)
    for section, n, tensors in sizes:
        ms = {
            row["provider"]: float(row["ms"])
            for row in rows
            if (row["section"], row["n"], row["tensors"]) == (section, n, tensors)
        }
        ours = next(iter(ms.values()))
        moved = next(row["bytes"] for row in rows if (row["n"], row["tensors"]) == (n, tensors))
        lines = [
            (provider, time, time / ours, moved / time / 1e6, time / tensors * 1e6)
            for provider, time in ms.items()
        ]
        header = "provider", "ms", "x ours", "GB/s", "ns a tensor"
        print_table(f"{section}: {tensors} tensors, n = {n}", header, lines)


def main() -> None:
    device = parse_args(argument_parser(__doc__)).device
    print_machine(device)
    torch._dynamo.config.recompile_limit = len(SHAPES) + 1  # each shape is compiled once
    rows = [*stacks(device), *many(device), *overhead(device)]
    report(rows)
    write_csv("optimizer.csv", rows, device=device)


if __name__ == "__main__":
    main()
