"""What the benchmarks share: interleaved timing, the machine's description, tables and CSV files."""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from depthnet.kernels.chips import CHIPS, Chip
from depthnet.report.machine import machine

RESULTS = Path(__file__).parent / "results"


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, and `--device`; the script ends here where there is no such device."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what to measure; a GPU has CSV files of its own, *_cuda.csv (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.exit(2, "--device cuda: there is no GPU\n")
    return args


def chip() -> Chip | None:
    """What is published of the GPU at hand; None of an unknown one."""
    if torch.version.hip:
        arch = torch.cuda.get_device_properties().gcnArchName.partition(":")[0]
    else:
        arch = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return CHIPS.get(arch)


def print_machine(device: str = "cpu") -> None:
    print(", ".join(f"{key} {value}" for key, value in machine(device).items()))


def computes(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator of torch's is a kernel on a GPU: it neither views nor only allocates."""
    name = operator._schema.name
    results = (result.alias_info for result in operator._schema.returns)
    views = any(alias and not alias.is_write for alias in results)
    return not views and "empty" not in name and "record_function" not in name


def argument_parser(description: str) -> argparse.ArgumentParser:
    """For a script whose docstring is its description."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def interleaved(
    providers: dict[str, Callable[[], object]],
    rounds: int = 30,
    seconds: float = 0.02,
    limits: dict[str, Callable[[float], float]] | None = None,
    device: str = "cpu",
) -> dict[str, float]:
    """Median seconds a call of each provider; in every round each one is timed once, in turn.

    A timing is a loop of calls that lasts about `seconds`, so that the clock and the loop cost nothing;
    on a GPU it ends when the GPU has finished them.
    `limits` take part in the rounds too: each measures for a given time, and itself says what a call
    costs at the least.
    """
    timers = {name: _timer(function, seconds, device) for name, function in providers.items()}
    for name, limit in (limits or {}).items():
        timers[name] = partial(limit, seconds)
    samples = {name: [] for name in timers}
    for _ in range(rounds):
        for name, timer in timers.items():
            samples[name].append(timer())
    return {name: statistics.median(times) for name, times in samples.items()}


def _timer(function: Callable[[], object], seconds: float, device: str) -> Callable[[], float]:
    """A function that calls the warmed-up `function` for about `seconds` and returns the time a call."""
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None

    def timed(calls: int) -> float:
        finish()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        finish()
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


def write_csv(name: str, rows: list[dict], part: str | None = None, device: str = "cpu") -> None:
    """Write rows, each with the machine; named a column `part`, only in place of the parts in `rows`."""
    if device == "cuda":
        name = name.replace(".csv", "_cuda.csv")
    RESULTS.mkdir(exist_ok=True)
    kept = read_csv(name) if part and (RESULTS / name).exists() else []
    new = {row[part] for row in rows} if part else set()
    described = [row for row in kept if row[part] not in new]
    described += [{**row, **machine(device)} for row in rows]
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, list(described[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(described)
    print(f"wrote {RESULTS / name}")
