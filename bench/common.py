"""What the benchmarks share: interleaved timing, the machine's description, CSV files."""

from __future__ import annotations

import csv
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import depthnet
from depthnet.kernels import backends

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, str]:
    """The machine and the software, for every row of a result."""
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    native = next(status for status in backends() if status.name == "cpu")
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": native.details.split(" of ")[0] if native.active else "none",
        "torch": torch.__version__,
        "depthnet": depthnet.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def interleaved(
    providers: dict[str, Callable[[], object]], rounds: int = 30, seconds: float = 0.02
) -> dict[str, float]:
    """Median seconds a call of each provider; in every round each one is timed once, in turn.

    A timing is a loop of calls that lasts about `seconds`, so that the clock and the loop cost nothing.
    """
    calls = {}
    for name, function in providers.items():
        for _ in range(3):
            function()
        start = time.perf_counter()
        function()
        calls[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-7)))
    samples = {name: [] for name in providers}
    for _ in range(rounds):
        for name, function in providers.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                function()
            samples[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(times) for name, times in samples.items()}


def write_csv(name: str, rows: list[dict]) -> None:
    RESULTS.mkdir(exist_ok=True)
    described = [{**row, **machine()} for row in rows]
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(described[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(described)
    print(f"wrote {RESULTS / name}")
