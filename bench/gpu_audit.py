"""What do the GPU kernels compile to?

    python bench/gpu_audit.py

Compiles every variant of every Triton kernel for each chip, those of the residual stack in every tile
of kernels/tiles.json, which needs no GPU: nothing is run or timed.  Counts the launches of a training
step.  Ends with status 1 if a register is spilled, a program does not fit, a product has no matrix
instructions, an access is narrower than 128 bits for no known reason, or launches depend on the depth.
"""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import triton
from aot import TARGETS, compile_kernel, figures
from stack_kernels import KERNELS, TYPES, variant

from depthnet.kernels import planning
from depthnet.kernels.chips import CHIPS
from depthnet.kernels.mlp_activation import MLPS
from depthnet.kernels.planning import Launch, Tile
from depthnet.kernels.triton import mlp, norm, optimizer, residual, rotation
from depthnet.kernels.triton.stack import FINISH_COLUMNS, FINISH_ROWS

RESULTS = Path(__file__).parent / "results"
# Of a multiprocessor of sm_100 ("PTX ISA", Tensor Memory), which its programs share.
TENSOR_MEMORY_COLUMNS = 512
FUNCTIONS = {
    **KERNELS,
    "residual_forward": residual.residual_forward_kernel,
    "residual_backward": residual.residual_backward_kernel,
    "residual_norm_forward": norm.residual_norm_forward_kernel,
    "residual_norm_backward": norm.residual_norm_backward_kernel,
    "mlp_activation_forward": mlp.mlp_activation_forward_kernel,
    "mlp_activation_backward": mlp.mlp_activation_backward_kernel,
    "rotary": rotation.rotary_kernel,
    "adam_step": optimizer.optimizer_step_kernel,
    "sgd_step": optimizer.optimizer_step_kernel,
    "gradient_norm": optimizer.gradient_norm_kernel,
}


@dataclass(frozen=True)
class KernelCase:
    """A kernel, the types of its arguments, and what is expected of it.

    Attributes:
        signature: the type of each argument that is not constant.
        constants: the value of each other argument.
        warps: of 32 threads.
        bytes_per_element: what must be read and written; of a stack for each of its layers.
        launches: of a call of the operator: a number, or for each layer one.
        loads, stores: of the optimizer: how many 128-bit accesses of a thread there are when all accesses
            to the arrays are that wide; the masked path has none.
        elements: the fewest of a tile that a thread has.
        product: whether there must be matrix instructions.
    """

    kernel: str
    variant: str
    signature: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int
    bytes_per_element: float
    launches: int | str
    loads: int | None = None
    stores: int | None = None
    elements: float = math.inf
    product: bool = False


STEP_SIGNATURE = {
    "tensors": "*i64",
    "groups": "*i64",
    "scales": "*fp64",
    "slices": "i32",
    "chunks": "*i64",
    "arrived": "*i32",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "norm": "*fp64",
    "max_norm": "fp64",
}
NORM_SIGNATURE = {
    "tensors": "*i64",
    "chunks": "*i64",
    "arrived": "*i32",
    "partial_sums": "*fp64",
    "norm": "*fp64",
}
DTYPE_CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
WARPS = 4
STAGES = 3  # what Triton takes where a launcher says nothing


def vectors(bytes_an_element: int) -> int:
    """How many 128-bit accesses a thread needs for its part of a block."""
    return bytes_an_element * optimizer.BLOCK.value // (32 * WARPS) // 16


def step_case(
    rule: str,
    *dtypes: str,
    states: int,
    masters: bool = False,
    rounded: bool = False,
    absent: tuple[str, ...] = ("grad_scale", "found_inf", "norm"),
) -> KernelCase:
    """A variant of the optimizer step, for tensors of some dtypes side by side."""
    item = [ITEM_BYTES[dtype] for dtype in dtypes]
    wide = [8 if dtype == "float64" else 4 for dtype in dtypes]
    extra = [(states + masters) * size for size in wide]  # read and written
    parts = ["+".join(dtypes), f"{states} states"]
    parts += ["master"] * masters + ["stochastic rounding"] * rounded
    parts += ["clipping, grad_scale, found_inf"] * (not absent)
    return KernelCase(
        kernel=f"{rule}_step",
        variant=", ".join(parts),
        signature={name: kind for name, kind in STEP_SIGNATURE.items() if name not in absent},
        constants={
            **dict.fromkeys(absent),
            "ADAM": rule == "adam",
            "DTYPES": sum(1 << DTYPE_CODES[dtype] for dtype in dtypes),
            "NSTATES": states,
            "STEPS": rule == "adam" or rounded,
            "MASTERS": masters,
            "ROUNDED": rounded,
        },
        warps=WARPS,
        stages=STAGES,
        loads=sum(vectors(2 * size + more) for size, more in zip(item, extra, strict=True)),
        stores=sum(vectors(size + more) for size, more in zip(item, extra, strict=True)),
        # Of the widest dtype.  With a master the parameter itself is only written.
        bytes_per_element=max(
            (2 if masters else 3) * size + 2 * more for size, more in zip(item, extra, strict=True)
        ),
        launches=1 if absent else 2,
    )


def norm_case(*dtypes: str) -> KernelCase:
    item = [ITEM_BYTES[dtype] for dtype in dtypes]
    return KernelCase(
        kernel="gradient_norm",
        variant="+".join(dtypes),
        signature=NORM_SIGNATURE,
        constants={"DTYPES": sum(1 << DTYPE_CODES[dtype] for dtype in dtypes)},
        warps=WARPS,
        stages=STAGES,
        loads=sum(map(vectors, item)),
        stores=0,
        bytes_per_element=max(item),
        launches=2,
    )


MIXED = "float32", "bfloat16", "float16"
OPTIMIZER_CASES = [
    step_case("adam", "float32", states=2),
    step_case("adam", "float32", states=2, absent=()),
    step_case("adam", "float32", states=3),
    step_case("adam", "bfloat16", states=2),
    step_case("adam", "bfloat16", states=2, rounded=True),
    step_case("adam", "bfloat16", states=2, masters=True),
    step_case("adam", "bfloat16", states=3, masters=True),
    step_case("adam", "float16", states=2),
    step_case("adam", "float16", states=2, rounded=True),
    step_case("adam", "float16", states=2, masters=True),
    step_case("adam", "float64", states=2),
    step_case("adam", *MIXED, states=2),
    step_case("adam", *MIXED, states=3, masters=True, rounded=True, absent=()),
    step_case("sgd", "float32", states=0),
    step_case("sgd", "float32", states=1),
    step_case("sgd", "bfloat16", states=1, rounded=True),
    step_case("sgd", *MIXED, states=1, masters=True, rounded=True, absent=()),
    norm_case("float32"),
    norm_case("bfloat16"),
    norm_case(*MIXED),
]


WIDTHS = 64, 128, 256, 512, 1024
TYPICAL = 4096, 64  # rows and layers
KINDS = {"bfloat16": "16bit", "float16": "16bit", "float32": "float32", "tf32": "tf32"}


def stack_cases(arch: str, dtype: str, n: int, all_tiles: bool = True) -> Iterator[KernelCase]:
    """Our kernels of a stack, in all tiles that a plan could take or in those of a typical one."""
    regime, *_ = planning.regimes(n, KINDS[dtype])
    rows, depth = TYPICAL
    plan = planning.plan_in(regime, 1, rows, n, depth, KINDS[dtype], arch, CHIPS[arch].shared_bytes)
    sizes = {"narrow": n, "layer": "wide", "weight": min(n, 128)}
    for launch in (*plan.forward, *plan.backward_data, *plan.backward_weight):
        if launch.kernel == "layer_finish":
            yield finish_case(launch, dtype, n, plan.forward[0].tile)
            continue
        size = sizes[launch.kernel.partition("_")[0]]
        tiles = planning.tables()[arch][launch.kernel][KINDS[dtype]][str(size)]
        assert list(launch.tile) in tiles
        for tile in tiles if all_tiles else [launch.tile]:
            yield stack_case(launch, dtype, n, Tile(*tile))


def stack_case(launch: Launch, dtype: str, n: int, tile: Tile) -> KernelCase:
    _, signature, constants = variant(launch.kernel, dtype, n, tile)
    short, middle, _ = sorted((tile.rows, tile.columns, tile.slab))
    return KernelCase(
        kernel=launch.kernel,
        variant=f"{dtype}, n {n}, tile {tile.rows} x {tile.columns} x {tile.slab}",
        signature=signature,
        constants=constants,
        warps=tile.warps,
        stages=tile.stages,
        **costs(launch, n),
        elements=short * middle / (32 * tile.warps),
        product=dtype != "float32",
    )


def finish_case(launch: Launch, dtype: str, n: int, forward: Tile) -> KernelCase:
    _, signature, constants = variant(launch.kernel, dtype, n, forward)
    tile = {"TILES": -(-n // forward.columns), "ROWS": FINISH_ROWS, "COLUMNS": FINISH_COLUMNS}
    return KernelCase(
        kernel=launch.kernel,
        variant=f"n {n}, {tile['TILES']} tiles",
        signature=signature,
        constants=constants | tile,
        warps=WARPS,
        stages=STAGES,
        **costs(launch, n),
    )


def costs(launch: Launch, n: int) -> dict:
    rows, depth = TYPICAL
    layers = 1 if launch.kernel == "layer_finish" else depth
    return {
        "bytes_per_element": round(launch.bytes / (rows * n * layers), 2),
        "launches": launch.count if launch.count == 1 else "1 a layer",
    }


RESIDUAL_SIGNATURE = {
    "signs": "*u8",
    **{f"{name}_stride": "i64" for name in ("x", "h", "y", "operand", "grad", "out", "signs")},
    **dict.fromkeys(("members", "rows", "pieces"), "i32"),
    **dict.fromkeys(("scale", "p", "q"), "fp64"),
}


def residual_cases() -> Iterator[KernelCase]:
    """The operator scaled_residual, and its kernels beside torch's products, with a float32 stream."""
    for dtype in ("bfloat16", "float16", "float32"):
        for n in (*WIDTHS, 16384):
            yield residual_case("residual_forward", dtype, n, x=dtype, h=dtype, y=dtype)
            yield residual_case("residual_backward", dtype, n, grad=dtype, out=dtype)
        stream = dict.fromkeys(("x", "h", "y"), "float32")
        yield residual_case("residual_forward", f"stack, {dtype}", 2048, **stream, operand=dtype)
        yield residual_case("residual_backward", f"stack, {dtype}", 2048, grad="float32", out=dtype)


def residual_case(kernel: str, name: str, n: int, **arrays: str) -> KernelCase:
    items = [ITEM_BYTES[dtype] for dtype in arrays.values()]
    rows, columns, warps = residual.tile(n, max(items))
    absent = {"operand", "scales"} - set(arrays)
    return KernelCase(
        kernel=kernel,
        variant=f"{name}, n {n}",
        signature=RESIDUAL_SIGNATURE | {name: f"*{TYPES[dtype]}" for name, dtype in arrays.items()},
        constants={
            **dict.fromkeys(absent),
            "MEAN": True,
            "UNIT": 8,
            "ROWS": rows,
            "COLS": columns,
            "LONG": n > columns,
        },
        warps=warps,
        stages=STAGES,
        bytes_per_element=sum(items) + 1 / 8,
        launches=1,
    )


NORM_ARRAYS = {  # of the stream, and of the branch
    "residual_norm_forward": (("x", "s"), ("branch", "y")),
    "residual_norm_backward": (("s", "grad_s", "grad_x"), ("grad_y", "grad_branch")),
}


def residual_norm_cases() -> Iterator[KernelCase]:
    """The operator residual_norm with a layer norm and its weight, as a transformer has it."""
    for stream, branch in (("bfloat16",) * 2, ("float32",) * 2, ("float32", "bfloat16")):
        for n in (*WIDTHS[1:], 4096, 16384):
            for kernel in NORM_ARRAYS:
                yield residual_norm_case(kernel, stream, branch, n)


def residual_norm_case(kernel: str, stream: str, branch: str, n: int) -> KernelCase:
    forward = kernel == "residual_norm_forward"
    rows, columns, warps = norm.tile(n, 4)
    of_stream, of_branch = NORM_ARRAYS[kernel]
    sums = {"bias"} if forward else {"weight_sums", "bias_sums"}
    pointers = {"statistics", "weight", *sums} - {"bias", "bias_sums"}
    return KernelCase(
        kernel=kernel,
        variant=f"{stream}, branch {branch}, n {n}",
        signature={
            **dict.fromkeys(of_stream, f"*{TYPES[stream]}"),
            **dict.fromkeys(of_branch, f"*{TYPES[branch]}"),
            **dict.fromkeys(pointers, "*fp32"),
            **dict.fromkeys(("rows", "pieces"), "i32"),
            **dict.fromkeys(("scale", "eps") if forward else ("scale",), "fp64"),
        },
        constants={
            "bias" if forward else "bias_sums": None,
            "CENTER": True,
            "UNIT": 8,
            "ROWS": rows,
            "COLS": columns,
            "LONG": n > columns,
        },
        warps=warps,
        stages=STAGES,
        bytes_per_element=len(of_stream) * ITEM_BYTES[stream] + len(of_branch) * ITEM_BYTES[branch],
        launches=1 if forward else 2,
    )


def mlp_activation_case(kernel: str, dtype: str, kind: str) -> KernelCase:
    backward = kernel == "mlp_activation_backward"
    arrays = ("grad", "h", "grad_h") if backward else ("h", "y")
    of_h = 2 if kind == "swiglu" else 1
    return KernelCase(
        kernel=kernel,
        variant=f"{dtype}, {kind}",
        signature={**dict.fromkeys(arrays, f"*{TYPES[dtype]}"), "pieces": "i32"},
        constants={"KIND": kind, "UNIT": 8, "BLOCK": mlp.BLOCK},
        warps=WARPS,
        stages=STAGES,
        bytes_per_element=ITEM_BYTES[dtype] * (1 + of_h * (len(arrays) - 1)),
        launches=1,
    )


def rotary_case(dtype: str, size: int, back: bool) -> KernelCase:
    tokens, columns = rotation.tile(size // 2)
    strides = (f"{part}_{of}" for part in "qkv" for of in ("batch", "head", "token"))
    return KernelCase(
        kernel="rotary",
        variant=f"{dtype}, heads of {size}{', backward' * back}",
        signature={
            **dict.fromkeys(("qkv", "q", "k", "v"), f"*{TYPES[dtype]}"),
            "rotation": "*fp32",
            **dict.fromkeys(("tokens", "heads", "pieces", *strides), "i32"),
        },
        constants={"BACK": back, "UNIT": 8, "TOKENS": tokens, "COLS": columns},
        warps=WARPS,
        stages=STAGES,
        bytes_per_element=2 * ITEM_BYTES[dtype],
        launches=1,
    )


def transformer_cases() -> Iterator[KernelCase]:
    """The operators between a transformer's products."""
    yield from residual_norm_cases()
    for dtype in ("bfloat16", "float16", "float32"):
        for kind in MLPS:
            yield mlp_activation_case("mlp_activation_forward", dtype, kind)
            yield mlp_activation_case("mlp_activation_backward", dtype, kind)
        for size in (64, 128):
            yield from (rotary_case(dtype, size, back) for back in (False, True))


# Arrays of which a thread accesses less than 128 bits at once, and why that has to be.
NARROW = {
    "signs": "the signs of 32 elements, or of 8, are a word",
    "sums": "one a row and tile",
    "y_sums": "one a row",
    "g_sums": "one a row",
    "counters": "a handful",
    "statistics": "one or two a row",
}
# In rows of up to so many elements the compiler stores in the layout that sums of rows are found in.
SHORT_ROWS = 256
OF_SHORT_ROWS = {
    "residual_norm_forward": {"s"},
    "residual_norm_backward": {"weight", "weight_sums", "s"},
}
NARROW_ON_AMD = {
    "operands": "stored as the matrix instructions leave sums, four elements a thread side by side",
    "d": "the same",
}
# From sm_90 on TF32 operands must lie in shared memory with the dimension that is summed over contiguous;
# where it is not so in global memory, they are transposed on the way, number by number.
TRANSPOSED_TF32 = {
    "narrow_backward_data": {"weight"},
    "layer_backward_data": {"weight"},
    "weight_gradient": {"d", "operands"},
}


def unexplained(case: KernelCase, arch: str, below_128: dict[str, int]) -> list[str]:
    """The arrays of which a thread has more in its part of a tile than it accesses at once."""
    known = set(NARROW)
    if case.constants.get("COLS", math.inf) <= SHORT_ROWS:
        known |= OF_SHORT_ROWS.get(case.kernel, set())
    if TARGETS[arch].backend == "hip":
        known |= NARROW_ON_AMD.keys()
    elif arch != "sm_80" and case.constants.get("PRECISION") == "tf32":
        known |= TRANSPOSED_TF32.get(case.kernel, set())
    return [
        array
        for array, bits in below_128.items()
        if array not in known and bits < case.elements * item_bits(case.signature.get(array))
    ]


def item_bits(pointer: str | None) -> int:
    return 32 if pointer is None else int(pointer[-2:])  # what the compiler has moved is a stream


def audit(case: KernelCase, arch: str) -> dict[str, object]:
    """A row of the result."""
    function, chip = FUNCTIONS[case.kernel], CHIPS[arch]
    parts = case.signature, case.constants, arch, case.warps, case.stages
    found = figures(compile_kernel(function, *parts), arch)
    columns, widths = found.pop("tensor_memory_columns"), found.pop("widths")
    tile = Tile(0, 0, 0, case.warps, 0, found["shared_bytes"], found["registers"])
    programs = tile.resident(chip)
    if columns:
        programs = min(programs, TENSOR_MEMORY_COLUMNS // columns)
    row = {
        "kernel": case.kernel,
        "variant": case.variant,
        "arch": arch,
        "evidence": "compiled, not measured",
        "threads": 32 * case.warps,
        **found,
        "shared_limit": chip.shared_bytes,
        "programs_per_multiprocessor": programs,
        "occupancy": round(programs * 32 * case.warps / chip.max_threads, 2),
        "product": case.product,
        "arrays_128": ", ".join(
            array for array, bits in sorted(widths.items()) if min(bits) >= 128
        ),
        "below_128": "",
        "loads_128_wanted": case.loads,
        "stores_128_wanted": case.stores,
        "bytes_per_element": case.bytes_per_element,
        "launches": case.launches,
        "triton": triton.__version__,
    }
    if case.loads is None:
        below = {array: min(bits) for array, bits in sorted(widths.items()) if min(bits) < 128}
        row["below_128"] = ", ".join(f"{array} {bits}" for array, bits in below.items())
        row["all_128"] = not unexplained(case, arch, below)
    else:
        row["all_128"] = all_wide(found["loads_128"], case.loads, arch) and all_wide(
            found["stores_128"], case.stores, arch
        )
    return row


def all_wide(count: int, wanted: int, arch: str) -> bool:
    """As many as wanted, or a multiple where the loop is unrolled.

    On AMD the rows of the optimizer's tables are read in 128 bits as well, so there are more.
    """
    multiple = TARGETS[arch].backend != "cuda" or wanted == 0 or count % wanted == 0
    return count >= wanted and multiple


VERDICTS = {
    "no register is spilled": lambda row: not row["stack_bytes"] and not row["spill_instructions"],
    "a program fits into a multiprocessor": lambda row: (
        row["shared_bytes"] <= row["shared_limit"] and row["programs_per_multiprocessor"] >= 1
    ),
    "products are of matrix instructions": lambda row: (
        not row["product"] or row["matrix_instructions"]
    ),
    "all accesses are 128 bits wide but those with a reason": lambda row: row["all_128"],
}


def training_steps() -> list[dict[str, object]]:
    """Rows with the launches of whole steps, counted where Triton's interpreter stands in for the GPU."""
    command = [sys.executable, Path(__file__).with_name("launches.py")]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return [
        {
            "kernel": "training step",
            "variant": f"n {step['width']}, {step['depth']} layers: "
            + ", ".join(f"{count} {name}" for name, count in step["launches"].items()),
            "evidence": "counted, not run",
            "launches": sum(step["launches"].values()),
            "triton": triton.__version__,
        }
        for step in map(json.loads, run.stdout.splitlines())
    ]


def summary(rows: list[dict]) -> Iterator[str]:
    def key(row):
        return row["kernel"], row["arch"]

    for (kernel, arch), group in groupby(sorted(rows, key=key), key):
        group = list(group)
        values = {name: [row[name] for row in group] for name in group[0]}
        occupancy = values["occupancy"]
        narrow = sorted({part for row in group for part in row["below_128"].split(", ")} - {""})
        yield (
            f"{kernel:<20} {arch:<6} {len(group):3} variants, registers {max(values['registers']):3}, "
            f"spills {sum(values['spill_instructions']) + sum(values['stack_bytes'])}, "
            f"shared bytes {max(values['shared_bytes']):6}, "
            f"occupancy {min(occupancy):.0%} to {max(occupancy):.0%}"
            + (f", below 128 bits: {', '.join(narrow)}" if narrow else "")
        )


def main() -> int:
    print("compiled, not measured")
    jobs = {  # what several dtypes share comes once
        (case.kernel, case.variant, arch): (case, arch)
        for arch in TARGETS
        for case in (
            *(case for dtype in KINDS for n in WIDTHS for case in stack_cases(arch, dtype, n)),
            *residual_cases(),
            *transformer_cases(),
            *OPTIMIZER_CASES,
        )
    }
    with ProcessPoolExecutor(2) as pool:
        rows = list(pool.map(audit, *zip(*jobs.values(), strict=True), chunksize=8))
    print(*summary(rows), sep="\n")
    steps = training_steps()
    print(*(f"{step['launches']} launches, {step['variant']}" for step in steps), sep="\n")
    with open(RESULTS / "gpu_audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows + steps)

    failures = {claim: [row for row in rows if not holds(row)] for claim, holds in VERDICTS.items()}
    counts = {step["launches"] for step in steps}
    failures["a step's launches do not depend on the depth"] = steps if len(counts) > 1 else []
    for claim, failed in failures.items():
        print(f"{claim}: {f'NO, {len(failed)} times' if failed else 'yes'}")
        for row in failed:
            print(f"  {row['kernel']}, {row['variant']}, {row.get('arch')}: {row.get('below_128')}")
    return int(any(failures.values()))


if __name__ == "__main__":
    sys.exit(main())
