"""Which tiles do the kernels of the residual stack run in?

    python bench/tune.py                    # the chip that is here, measured
    python bench/tune.py --compiled         # every chip, by what the kernels compile to; needs no GPU
    python bench/tune.py --compiled --arch sm_90

Writes kernels/tiles.json.  For every kernel, kind of product and width it holds a tile for each number
of rows; which of them a call uses, `stack_plan` decides by its sizes.  Of the tiles with as many rows the
one is written that was fastest, or, where nothing can be run, the first in the order of `candidates`
that spills no register and fits into the chip.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from aot import TARGETS, compile_kernel, figures
from stack_kernels import variant
from triton.testing import do_bench

import depthnet
from depthnet.kernels import planning
from depthnet.kernels.chips import CHIPS
from depthnet.kernels.planning import Tile
from depthnet.kernels.reference import PLAIN
from depthnet.kernels.triton import stack

TABLE = Path(depthnet.kernels.__file__).with_name("tiles.json")
DTYPES = {"16bit": "bfloat16", "tf32": "tf32", "float32": "float32"}
NARROW_COLUMNS = [16, 32, 64, 128, 256]
WIDE = 1024  # what stands for all wide stacks
DEPTH = 16  # of what is measured


def jobs(arch: str) -> list[tuple]:
    """(arch, kernel, kind, size, rows): a tile is sought for each."""
    found = []
    for kind in DTYPES:
        for name in ("narrow_forward", "narrow_backward_data"):
            found += [
                (arch, name, kind, columns, rows)
                for columns in NARROW_COLUMNS
                for rows in (128, 64, 32, 16)
                if rows * columns <= 64 * 256
            ]
        for name in ("layer_forward", "layer_backward_data"):
            found += [(arch, name, kind, "wide", rows) for rows in (128, 64, 32, 16)]
        found += [
            (arch, "weight_gradient", kind, size, rows)
            for size in NARROW_COLUMNS[:-1]
            for rows in (128, 64, 32, 16)
            if rows <= size
        ]
    return found


def candidates(arch: str, kernel: str, kind: str, size: int | str, rows: int) -> list[tuple]:
    """(columns, slab, warps, stages), what should be fast first.

    A thread holds 32 or 64 elements of a tile where that gives a program enough threads, four warps at the
    least.  Loads run two slabs ahead where that leaves room for a second program on a multiprocessor.
    """
    sixteen = kind == "16bit"
    if kernel.startswith("narrow"):
        columns = [size]
        slabs = [size] if size <= 128 and kind != "float32" else []
        slabs += [slab for slab in (64, 32, 16) if slab < size or (not slabs and slab == size)]
    elif kernel == "weight_gradient":
        columns, slabs = [min(rows, size)], [64, 32, 16] if sixteen else [32, 16]
    else:
        columns = [128, 64] if rows >= 64 else [64, 32]
        slabs = [64, 32] if sixteen else [32]
    found = [
        (width, slab, max(4, min(8, rows * width // (32 * elements))), stages)
        for width in columns
        for slab in slabs
        for stages in (3, 2, 1)
        for elements in (64, 32, 16)
    ]

    def fills(candidate: tuple) -> bool:
        """Whether the slabs that are under way leave no room for a second program."""
        width, slab, _, stages = candidate
        ahead = stages * slab * (width + (rows if slab < width else 0)) * (2 if sixteen else 4)
        return 2 * ahead > CHIPS[arch].shared_bytes_per_multiprocessor

    return sorted(dict.fromkeys(found), key=fills)


def compiled(job: tuple, candidate: tuple) -> Tile | None:
    """The candidate as a tile; None if it spills registers or does not fit into the chip."""
    arch, kernel, kind, size, rows = job
    columns, slab, warps, stages = candidate
    tile = Tile(rows, columns, slab, warps, stages, 0, 0)
    n = WIDE if size == "wide" else size

    def figures_of(n: int) -> dict:
        parts = variant(kernel, DTYPES[kind], n, tile)
        return figures(compile_kernel(*parts, arch, warps, stages), arch)

    found = figures_of(n)
    if spills(found) or found["shared_bytes"] > CHIPS[arch].shared_bytes:
        return None
    return tile._replace(
        shared_bytes=found["shared_bytes"],
        registers=found["registers"],
        any_width=not spills(figures_of(n - 5)),
    )


def spills(found: dict) -> bool:
    return bool(found["stack_bytes"] or found["spill_instructions"])


def first_compiled(job: tuple) -> Tile | None:
    """The first candidate that compiles well."""
    tiles = (compiled(job, candidate) for candidate in candidates(*job))
    return next(filter(None, tiles), None)


def compiled_tables(archs: list[str]) -> dict:
    tables = {}
    wanted = [job for arch in archs for job in jobs(arch)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        tiles = pool.map(first_compiled, wanted)
        for number, (job, tile) in enumerate(zip(wanted, tiles, strict=True), 1):
            print(f"{number}/{len(wanted)} {' '.join(map(str, job))}: {tile or 'none'}", flush=True)
            _add(tables, job, tile)
    for arch in archs:
        tables[arch]["evidence"] = "compiled, not measured"
    return tables


@contextmanager
def only(job: tuple, tile: Tile) -> Iterator[None]:
    """Runs in one tile, also where a plan would prefer torch's products."""
    arch, kernel, kind, size, _ = job
    regime = "layers" if size == "wide" else "narrow"
    one_tile = mock.patch.dict(planning.tables()[arch][kernel][kind], {str(size): [tile]})
    for cached in (planning.stack_plan, stack.prepared):
        cached.cache_clear()
    with one_tile, mock.patch.object(planning, "regimes", return_value=(regime,)):
        yield


def seconds(job: tuple, tile: Tile) -> float:
    """Of the pass that the kernel belongs to, with one tile for each multiprocessor."""
    arch, kernel, kind, size, _ = job
    n = WIDE if size == "wide" else size
    dtype = torch.bfloat16 if kind == "16bit" else torch.float32
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    rows = tile.rows * CHIPS[arch].multiprocessors // (n // tile.columns)
    x = torch.randn(1, rows, n, device="cuda")
    weight = (torch.randn(1, DEPTH, n, n, device="cuda") / n**0.5).to(dtype)
    constants = DEPTH**-0.5, None, 1.0, 1.0, True, PLAIN
    with only(job, tile):
        _, *saved = stack.residual_stack(x, weight, *constants, True)
        arguments = x, weight, *saved, *constants
        out = torch.empty_like(weight) if kernel == "weight_gradient" else None
        if kernel.endswith("forward"):
            milliseconds = do_bench(lambda: stack.residual_stack(x, weight, *constants, True))
        else:
            milliseconds = do_bench(lambda: stack.residual_stack_backward(*arguments, out))
    return milliseconds / 1e3


def measured_tables(arch: str) -> dict:
    """The fastest of all candidates that compile well; other kernels' tiles are those of the table."""
    tables, wanted = {}, jobs(arch)
    for number, job in enumerate(wanted, 1):
        tiles = [compiled(job, candidate) for candidate in candidates(*job)]
        times = {tile: seconds(job, tile) for tile in filter(None, tiles)}
        best = min(times, key=times.get, default=None)
        took = "" if best is None else f" {times[best] * 1e6:.1f} us"
        print(
            f"{number}/{len(wanted)} {' '.join(map(str, job))}: {best or 'none'}{took}", flush=True
        )
        _add(tables, job, best)
    tables[arch]["evidence"] = f"measured on {torch.cuda.get_device_name()}"
    return tables


def _add(tables: dict, job: tuple, tile: Tile | None) -> None:
    if tile is None:
        return
    arch, kernel, kind, size, _ = job
    kinds = tables.setdefault(arch, {}).setdefault(kernel, {})
    kinds.setdefault(kind, {}).setdefault(str(size), []).append(tile)


def write(tables: dict) -> None:
    """With a line for each tile, so that a change can be read."""
    text = json.dumps(tables, indent=1, sort_keys=True)
    lists = re.compile(r"\[[^][]*\]")
    TABLE.write_text(lists.sub(lambda tile: " ".join(tile[0].split()), text) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--compiled", action="store_true", help="choose by compiling; run nothing")
    parser.add_argument("--arch", nargs="+", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    if not arguments.compiled and not torch.cuda.is_available():
        parser.error("there is no GPU to measure on; --compiled needs none")
    tables = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if arguments.compiled:
        tables.update(compiled_tables(arguments.arch))
    else:
        tables.update(measured_tables(planning.current_arch()))
    write(tables)
    print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()
