"""How a residual stack runs on a GPU: in which regime, in which tiles, and how long that should take.

`kernels/triton/stack.py` launches what `stack_plan` says, and users see it by `depthnet.kernels.plan`.
Times are predicted, from the operations, bytes and launches of each kernel and what the makers publish
of the chips.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from depthnet._checks import one_of
from depthnet.kernels.chips import CHIPS, Chip
from depthnet.kernels.reference import sign_bytes

# Assumed, not measured: what one of a chain of dependent steps takes when nothing else limits.
LAYER_SECONDS = 1e-6  # a layer of a narrow stack: product, mean over the row, next operand
SLAB_SECONDS = 0.2e-6  # a slab of a product of which loads are under way beforehand
# Assumed as well: the part of the peak rate that products reach, ours and a vendor's, and that Triton's
# reach in float32 without matrix instructions.
REACHED, REACHED_BY_FMA = 0.75, 0.5

# Assumed too: what the host takes to launch a kernel of torch's, by its dispatcher and autograd or
# inductor's code, and one of ours through Triton (9 to 18 us).  It decides for short kernels.
TORCH_HOST_SECONDS, OWN_HOST_SECONDS = 5e-6, 18e-6

NARROW = 256  # the widest rows that stay in registers
WIDEST = 2048  # from here on a vendor's products are nearer the peak than ours
KINDS = {torch.bfloat16: "16bit", torch.float16: "16bit", torch.float64: "float64"}


class Tile(NamedTuple):
    """What a program computes at a time, and what the compiled kernel takes."""

    rows: int
    columns: int
    slab: int  # of the dimension that is summed over
    warps: int  # of 32 threads; half as many of 64
    stages: int
    shared_bytes: int
    registers: int  # a thread
    any_width: bool = True  # whether no register spills where rows are no multiples of 16 elements

    def resident(self, chip: Chip) -> int:
        """How many programs a multiprocessor holds at once, by registers, threads and shared memory.

        Registers are handed out eight a thread, from four partitions; NVIDIA's reserve for each program of
        the shared memory what one program cannot have of all.
        """
        threads = 32 * self.warps
        a_warp = chip.warp * (-(-max(self.registers, 1) // 8) * 8)
        warps = 4 * (chip.registers // 4 // a_warp)
        reserved = chip.shared_bytes_per_multiprocessor - chip.shared_bytes
        return min(
            chip.max_threads // threads,
            warps // (threads // chip.warp),
            chip.shared_bytes_per_multiprocessor // max(self.shared_bytes + reserved, 1),
        )


class Launch(NamedTuple):
    """A kernel of a pass, launched `count` times.

    Attributes:
        programs: of each launch; `splits` of them share a tile.
        flops: of all launches.
        bytes: of all launches, that must cross to and from the memory.
        cache_bytes: of all launches, that programs read past the caches of their own.
        seconds: predicted, of all launches.
    """

    kernel: str
    count: int
    tile: Tile | None  # None: not one of ours with tiles
    programs: int
    splits: int
    flops: int
    bytes: int
    cache_bytes: int
    seconds: float


@dataclass(frozen=True)
class Plan:
    """How a stack runs: the launches of its three passes.

    Attributes:
        regime: `narrow` (one launch a pass, whatever the depth), `layers` (one launch a layer and pass,
            and one for all weight gradients), or `gemm` (torch's matrix products and the fused residual).
        arch: the architecture whose tiles are used: sm_80, sm_90, sm_100 or gfx942.
    """

    regime: str
    arch: str
    forward: tuple[Launch, ...]
    backward_data: tuple[Launch, ...]
    backward_weight: tuple[Launch, ...]

    def _all(self) -> tuple[Launch, ...]:
        return self.forward + self.backward_data + self.backward_weight

    @property
    def launches(self) -> int:
        """Of all kernels of forward and backward pass."""
        return sum(launch.count for launch in self._all())

    @property
    def flops(self) -> int:
        return sum(launch.flops for launch in self._all())

    @property
    def bytes(self) -> int:
        """That must cross to and from the memory at the least."""
        return sum(launch.bytes for launch in self._all())

    @property
    def shared_bytes(self) -> int:
        """The most that a program takes."""
        return max((launch.tile.shared_bytes for launch in self._all() if launch.tile), default=0)

    @property
    def seconds(self) -> float:
        """Predicted, of forward and backward pass, that the GPU takes."""
        return sum(launch.seconds for launch in self._all())

    @property
    def host_seconds(self) -> float:
        """Predicted, that the host takes to launch all kernels, unless a CUDA graph does."""
        return sum(
            launch.count
            * (TORCH_HOST_SECONDS if launch.kernel.startswith("torch") else OWN_HOST_SECONDS)
            for launch in self._all()
        )

    def __str__(self) -> str:
        lines = [f"{self.regime}, {self.arch}; times are predicted"]
        for name in ("forward", "backward_data", "backward_weight"):
            for launch in getattr(self, name):
                tile = launch.tile and f"{launch.tile.rows} x {launch.tile.columns}, slabs of "
                tile = (
                    f"tiles of {tile}{launch.tile.slab}, {launch.tile.warps} warps, "
                    if tile
                    else ""
                )
                lines.append(
                    f"{name}: {launch.count} x {launch.kernel}, {launch.programs} programs, {tile}"
                    f"{launch.flops / 1e9:.3g} GFLOP, {launch.bytes / 1e6:.3g} MB, "
                    f"{launch.seconds * 1e6:.3g} us"
                )
        return "\n".join(lines)


def plan(
    x_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    dtype: torch.dtype,
    arch: str | None = None,
) -> Plan:
    """How `residual_stack` runs on a GPU, forward and backward.

    Its blocks are plain: those of several layers, with a norm or activated before their products run in
    the regime `gemm` at any width.  With checkpoints every segment of layers is such a stack, and runs
    forward once more.

    Args:
        x_shape: (*P, B, n). weight_shape: (*P, L, n, n).
        dtype: of the weights; x is float32, or float64 beside float64 weights.  float32 products are TF32
            where torch allows it.
        arch: sm_80, sm_90, sm_100 or gfx942; None: of the current device.

    Raises:
        ValueError: the shapes do not fit together, or there are no tiles for `arch`.
        TypeError: `dtype` is not a floating-point type of the operator.
    """
    if dtype not in (*KINDS, torch.float32):
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    if len(weight_shape) < 3 or len(x_shape) < 2:
        raise ValueError(
            f"x_shape must be (*P, B, n) and weight_shape (*P, L, n, n), got {tuple(x_shape)} and "
            f"{tuple(weight_shape)}"
        )
    lead, (depth, n, columns) = tuple(weight_shape[:-3]), weight_shape[-3:]
    if min(math.prod(lead), x_shape[-2], n, depth) < 1:
        raise ValueError(
            f"a plan is of sizes of 1 at least, got x_shape {tuple(x_shape)} and weight_shape "
            f"{tuple(weight_shape)}"
        )
    if n != columns or tuple(x_shape[:-2]) != lead or x_shape[-1] != n:
        raise ValueError(
            f"x_shape (*P, B, n) and weight_shape (*P, L, n, n) do not fit: {tuple(x_shape)} and "
            f"{tuple(weight_shape)}"
        )
    arch = current_arch() if arch is None else one_of("arch", arch, CHIPS)
    sizes = math.prod(lead), x_shape[-2], n, depth
    return stack_plan(*sizes, kind_of(dtype), arch, CHIPS[arch].shared_bytes)


def kind_of(dtype: torch.dtype) -> str:
    """How products of `dtype` are computed: 16bit, tf32, float32 or float64."""
    if dtype != torch.float32:
        return KINDS[dtype]
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "float32"


def current_arch() -> str:
    """The architecture whose tiles suit the current device; sm_80 where there is none."""
    if not torch.cuda.is_available():
        return "sm_80"
    return arch_of(torch.cuda.current_device())


@cache
def arch_of(device: int) -> str:
    if torch.version.hip:
        return "gfx942"
    # Consumer chips of every generation since have the matrix instructions of sm_80.
    return {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}.get(
        torch.cuda.get_device_capability(device), "sm_80"
    )


@cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory that a program may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@cache
def tables() -> dict:
    """kernels/tiles.json, written by bench/tune.py: arch -> kernel -> kind -> size -> tiles."""
    return json.loads(Path(__file__).with_name("tiles.json").read_text())


def tile_columns(n: int) -> int:
    """The power of two that holds a narrow row; matrix instructions take at least 16."""
    return max(16, 1 << (n - 1).bit_length())


class _Work(NamedTuple):
    """What a kernel would do with a tile."""

    programs: int
    splits: int
    flops: int
    bytes: int
    cache_bytes: int
    chain: float  # seconds of the steps that a program takes one after another


def _rate(kind: str, arch: str, library: bool = False) -> float:
    """FLOP/s of products on one multiprocessor, ours or a vendor's."""
    chip = CHIPS[arch]
    peak = chip.flops["bfloat16" if kind == "16bit" else kind]
    reached = REACHED_BY_FMA if kind == "float32" and chip.warp == 32 and not library else REACHED
    return reached * peak / chip.multiprocessors


def _seconds(work: _Work, resident: int, rate: float, arch: str) -> float:
    """The longest of computing, loading and waiting, where the busiest multiprocessor decides."""
    chip = CHIPS[arch]
    busiest = math.ceil(work.programs / chip.multiprocessors)
    share = busiest / max(work.programs, 1)  # of the work that one multiprocessor does
    return chip.launch_seconds + max(
        share * work.flops / rate,
        share * work.cache_bytes / (chip.cache_bandwidth / chip.multiprocessors),
        work.bytes / chip.memory_bandwidth,
        work.chain * math.ceil(busiest / max(resident, 1)),
    )


def _best(kernel, size, n, work_of, kind, arch, shared_bytes) -> Launch:
    """One launch, in the tiles that should take the least time."""
    chip = CHIPS[arch]
    launches = []
    tiles = [Tile(*numbers) for numbers in tables()[arch][kernel][kind][str(size)]]
    if n % 16:
        tiles = [tile for tile in tiles if tile.any_width] or tiles
    for tile in tiles:
        if tile.shared_bytes > shared_bytes:
            continue
        work = work_of(tile)
        seconds = _seconds(work, tile.resident(chip), _rate(kind, arch), arch)
        launches.append(Launch(kernel, 1, tile, *work[:5], seconds))
    if not launches:
        raise RuntimeError(
            f"no tiles of {kernel} for {arch} fit in {shared_bytes} bytes of shared memory"
        )
    least = min(launch.seconds for launch in launches)
    # The table has large tiles first, which save traffic: they win what is no more than a tie.
    return next(launch for launch in launches if launch.seconds <= 1.02 * least)


def _times(count: int, launch: Launch) -> Launch:
    totals = {name: count * getattr(launch, name) for name in ("flops", "bytes", "cache_bytes")}
    return launch._replace(count=count, seconds=count * launch.seconds, **totals)


def regimes(n: int, kind: str) -> tuple[str, ...]:
    """Those that a stack of this width can run in."""
    if kind == "float64" or n >= WIDEST:
        return ("gemm",)
    return ("narrow",) if n <= NARROW else ("layers", "gemm")


@lru_cache(4096)
def stack_plan(
    members: int, rows: int, n: int, depth: int, kind: str, arch: str, shared_bytes: int
) -> Plan:
    """`plan` of sizes that are known to fit; a program may have `shared_bytes` of shared memory."""
    sizes = members, rows, n, depth, kind, arch, shared_bytes
    plans = (plan_in(regime, *sizes) for regime in regimes(n, kind))
    return min(plans, key=lambda plan: max(plan.seconds, plan.host_seconds))


def plan_in(regime: str, *sizes) -> Plan:
    """`stack_plan` of the same sizes in a given regime."""
    return {"narrow": _narrow, "layers": _layers, "gemm": _gemm}[regime](*sizes)


def _narrow(
    members: int, rows: int, n: int, depth: int, kind: str, arch: str, shared_bytes: int
) -> Plan:
    elements, item, saved = _sizes(members, rows, n, kind)
    weights, rate = members * n * n * item, _rate(kind, arch)

    def work(tile: Tile) -> _Work:
        blocks = members * math.ceil(rows / tile.rows)
        return _Work(
            programs=blocks,
            splits=1,
            flops=2 * elements * n * depth,
            bytes=2 * elements * 4 + depth * (weights + saved),
            cache_bytes=depth * blocks * n * n * item,
            chain=depth * (LAYER_SECONDS + 2 * tile.rows * n * n / rate),
        )

    size, where = tile_columns(n), (kind, arch, shared_bytes)
    return Plan(
        *("narrow", arch),
        forward=(_best("narrow_forward", size, n, work, *where),),
        backward_data=(_best("narrow_backward_data", size, n, work, *where),),
        backward_weight=(_weight_gradient(members, rows, n, depth, *where),),
    )


def _layers(
    members: int, rows: int, n: int, depth: int, kind: str, arch: str, shared_bytes: int
) -> Plan:
    elements, item, saved = _sizes(members, rows, n, kind)
    rate = _rate(kind, arch)

    def work(tile: Tile) -> _Work:
        blocks, tiles = members * math.ceil(rows / tile.rows), math.ceil(n / tile.columns)
        return _Work(
            programs=blocks * tiles,
            splits=1,
            flops=2 * elements * n,
            bytes=2 * elements * 4 + members * n * n * item + saved,
            cache_bytes=blocks * tiles * n * (tile.rows * 4 + tile.columns * item),
            chain=math.ceil(n / tile.slab) * SLAB_SECONDS + 2 * tile.rows * tile.columns * n / rate,
        )

    where = kind, arch, shared_bytes
    forward = _best("layer_forward", "wide", n, work, *where)
    backward_data = _best("layer_backward_data", "wide", n, work, *where)
    return Plan(
        *("layers", arch),
        forward=(_times(depth, forward), _elementwise("layer_finish", 8 * elements, arch)),
        backward_data=(_times(depth, backward_data),),
        backward_weight=(_weight_gradient(members, rows, n, depth, *where),),
    )


def _weight_gradient(
    members: int, rows: int, n: int, depth: int, kind: str, arch: str, shared_bytes: int
) -> Launch:
    elements, item, _ = _sizes(members, rows, n, kind)
    rate = _rate(kind, arch)

    def work(tile: Tile) -> _Work:
        tiles = members * depth * math.ceil(n / tile.rows) * math.ceil(n / tile.columns)
        slabs = math.ceil(rows / tile.slab)
        # Two programs a multiprocessor, of four slabs at least.
        splits = max(1, min(math.ceil(2 * CHIPS[arch].multiprocessors / tiles), slabs // 4))
        parts = 2 * tiles * splits * tile.rows * tile.columns * 4 if splits > 1 else 0
        each = math.ceil(slabs / splits)
        return _Work(
            programs=tiles * splits,
            splits=splits,
            flops=2 * elements * n * depth,
            bytes=depth * (2 * elements + members * n * n) * item,
            cache_bytes=tiles * rows * (tile.rows + tile.columns) * item + parts,
            chain=each * (SLAB_SECONDS + 2 * tile.rows * tile.columns * tile.slab / rate),
        )

    size = tile_columns(min(n, 128))
    return _best("weight_gradient", size, n, work, kind, arch, shared_bytes)


def _sizes(members: int, rows: int, n: int, kind: str) -> tuple[int, int, int]:
    """Elements of x, bytes of a weight, and bytes that a layer leaves for the backward pass."""
    elements, item = members * rows * n, {"16bit": 2, "float64": 8}.get(kind, 4)
    return elements, item, elements * item + members * rows * sign_bytes(n)


def _elementwise(kernel: str, bytes: int, arch: str) -> Launch:
    seconds = bytes / CHIPS[arch].memory_bandwidth + CHIPS[arch].launch_seconds
    return Launch(kernel, 1, None, 0, 1, 0, bytes, bytes, seconds)


def _gemm(
    members: int, rows: int, n: int, depth: int, kind: str, arch: str, shared_bytes: int
) -> Plan:
    """A product by torch and a fused kernel a layer; copies at both ends are not counted."""
    chip = CHIPS[arch]
    elements, item, saved = _sizes(members, rows, n, kind)
    stream = 8 if kind == "float64" else 4
    weights, flops = members * n * n * item, 2 * elements * n

    def product(bytes: int) -> Launch:
        chain = math.ceil(n / 64) * SLAB_SECONDS  # as a product of ours would have in slabs of 64
        work = _Work(chip.multiprocessors, 1, flops, bytes, bytes, chain)
        seconds = _seconds(work, 1, _rate(kind, arch, library=True), arch)
        return _times(depth, Launch("torch.baddbmm", 1, None, 0, 1, flops, bytes, bytes, seconds))

    def fused(kernel: str, bytes: int) -> Launch:
        return _times(depth, _elementwise(kernel, bytes, arch))

    return Plan(
        *("gemm", arch),
        forward=(
            product(elements * (item + stream) + weights),
            fused("residual_forward", 3 * elements * stream + saved),
        ),
        backward_data=(
            fused("residual_backward", elements * stream + saved),
            product(elements * (item + 2 * stream) + weights),
        ),
        backward_weight=(product(2 * elements * item + weights),),
    )
