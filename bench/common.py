"""What the benchmarks share: interleaved timing, the machine's description, tables and CSV files."""

from __future__ import annotations

import csv
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
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


def print_machine() -> None:
    print(", ".join(f"{key} {value}" for key, value in machine().items()))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interleaved(
    providers: dict[str, Callable[[], object]],
    rounds: int = 30,
    seconds: float = 0.02,
    limits: dict[str, Callable[[float], float]] | None = None,
) -> dict[str, float]:
    """Median seconds a call of each provider; in every round each one is timed once, in turn.

    A timing is a loop of calls that lasts about `seconds`, so that the clock and the loop cost nothing.
    `limits` take part in the rounds too: each measures for a given time, and itself says what a call
    costs at the least.
    """
    timers = {name: _timer(function, seconds) for name, function in providers.items()}
    for name, limit in (limits or {}).items():
        timers[name] = partial(limit, seconds)
    samples = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    return {name: statistics.median(times) for name, times in samples.items()}


def _timer(function: Callable[[], object], seconds: float) -> Callable[[], float]:
    """A function that calls the warmed-up `function` for about `seconds` and returns the time a call."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    timed(3)
    return partial(timed, max(1, round(seconds / max(timed(1), 1e-7))))


def print_table(title: str, header: tuple, lines: list[tuple]) -> None:
    """Numbers and text in columns; floats with three significant digits."""

    def text(cell: object) -> str:
        if not isinstance(cell, float):
            return str(cell)
        return f"{cell:.{max(0, 2 - math.floor(math.log10(abs(cell) or 1)))}f}"

    cells = [header, *([text(cell) for cell in line] for line in lines)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def read_csv(name: str) -> list[dict]:
    with open(RESULTS / name, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(name: str, rows: list[dict], part: str | None = None) -> None:
    """Write rows, each with the machine; named a column `part`, only in place of the parts in `rows`."""
    RESULTS.mkdir(exist_ok=True)
    kept = read_csv(name) if part and (RESULTS / name).exists() else []
    new = {row[part] for row in rows} if part else set()
    described = [row for row in kept if row[part] not in new]
    described += [{**row, **machine()} for row in rows]
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(described[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(described)
    print(f"wrote {RESULTS / name}")
