"""What does a training step need in memory?

    python bench/memory.py
    python bench/memory.py --device cuda

The highest resident memory during forward and backward of a residual stack, above that before them,
which holds the inputs and weights.  It has to hold the gradients that come out, and what is saved for
the backward pass: x and h of every layer in eager PyTorch; x and one bit an element in depthnet; with
checkpoints every c-th x, and all of the c layers whose turn it is.  PyTorch frees the x and h of a
layer before the next layer's gradient is there, so that it may do with less than the sum of both.

Measured twice: with a malloc that returns every tensor to the system when it is freed, which is what the
step needs; and with malloc as it is, which keeps the gaps that freed tensors leave.  On a GPU once, by
what PyTorch's allocator has given out.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from common import argument_parser, parse_args, print_machine, print_table, write_csv
from stack import Stack

ROWS = 128
WIDTHS = [64, 256]
DEPTHS = [64, 256, 1024]
RETURN_ALL = {"MALLOC_MMAP_THRESHOLD_": "16384"}  # glibc: larger blocks are mapped on their own


def checkpoint_every(depth: int) -> int:
    return round(depth**0.5)


PROVIDERS = {
    "eager": Stack.eager_step,
    "depthnet": Stack.depthnet_step,
    "depthnet, checkpoints": lambda stack: stack.depthnet_step(
        checkpoint_every(stack.weight.shape[0])
    ),
    "eager, inference": torch.no_grad()(Stack.eager),
    "depthnet, inference": torch.no_grad()(Stack.depthnet),
}


def saved_bytes(provider: str, n: int, depth: int) -> int:
    """What the shapes say that is saved for the backward pass."""
    every, x, signs = checkpoint_every(depth), 4 * ROWS * n, ROWS * n // 8
    return {
        "eager": depth * 2 * x,
        "depthnet": depth * (x + signs),
        "depthnet, checkpoints": -(-depth // every) * x + every * (x + signs),
    }.get(provider, 0)


def gradient_bytes(provider: str, n: int, depth: int) -> int:
    return 0 if "inference" in provider else 4 * (depth * n * n + ROWS * n)


def peak(device: str) -> int:
    """The highest memory, on the CPU resident, of this process since its start or the last reset."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux; macOS counts in bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # without the right, the peak so far stays: inputs and weights as well
        Path("/proc/self/clear_refs").write_text("5")


def peak_of(function: Callable[[], object], device: str) -> int:
    """What a call needs at most above what is there before it."""
    reset_peak(device)
    before = peak(device)
    function()
    return peak(device) - before


def measure(device: str, case: tuple[str, int, int]) -> int:
    provider, n, depth = case
    run = PROVIDERS[provider]
    # Threads, libraries and workspaces are there after a first call.
    run(Stack(n, 1, ROWS, device=device))
    stack = Stack(n, depth, ROWS, device=device)
    return peak_of(partial(run, stack), device)


def measure_all(cases: list[tuple], device: str, environment: dict[str, str]) -> list[int]:
    """Each case in a process of its own: memory freed by an earlier one would be taken again unseen."""
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, environment), spawn.Pool(1, maxtasksperchild=1) as pool:
        return pool.map(partial(measure, device), cases, chunksize=1)


def main() -> None:
    device = parse_args(argument_parser(__doc__)).device
    print_machine(device)
    cases = [(provider, n, depth) for n in WIDTHS for depth in DEPTHS for provider in PROVIDERS]
    needed = measure_all(cases, device, RETURN_ALL)
    resident = measure_all(cases, device, {}) if device == "cpu" else needed
    rows, table = [], []
    for case, peak_bytes, default_bytes in zip(cases, needed, resident, strict=True):
        provider, n, depth = case
        saved, gradients = saved_bytes(*case), gradient_bytes(*case)
        rows.append(
            {
                "kernel": "residual_stack",
                "mode": "forward" if "inference" in provider else "forward+backward",
                "n": n,
                "depth": depth,
                "rows": ROWS,
                "dtype": "float32",
                "provider": provider,
                "peak_bytes": peak_bytes,
                "default_malloc_bytes": default_bytes,
                "saved_bytes": saved,
                "gradient_bytes": gradients,
            }
        )
        sizes = (peak_bytes, saved + gradients, saved, gradients, default_bytes)
        table.append((n, depth, provider, *(size / 2**20 for size in sizes)))
    print_table(
        f"Memory above inputs and weights, B = {ROWS}, float32, MiB",
        ("n", "L", "", "peak", "by the shapes:", "saved", "+ gradients", "peak, default malloc"),
        table,
    )
    write_csv("memory.csv", rows, device=device)


if __name__ == "__main__":
    main()
