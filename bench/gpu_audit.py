"""What do the GPU kernels compile to?

    python bench/gpu_audit.py

Compiles every variant of every Triton kernel for each chip, which needs no GPU, and reports registers,
spills, shared memory and how wide the accesses to global memory are.  Nothing is run or timed.
"""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from depthnet.kernels.triton import optimizer

RESULTS = Path(__file__).parent / "results"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class KernelCase:
    """A kernel, the types of its arguments, and what is expected of it.

    Attributes:
        signature: the type of each argument that is not constant.
        constants: the value of each other argument.
        threads: of a program.
        loads, stores: how many 128-bit accesses of a thread there are when all accesses to the arrays
            are that wide; the masked path has none.
        bytes_per_element: what must be read and written.
        launches: of all kernels together in one call of the operator, whatever the number of tensors.
    """

    kernel: str
    variant: str
    function: Callable
    signature: dict[str, str]
    constants: dict[str, object]
    threads: int
    loads: int
    stores: int
    bytes_per_element: int
    launches: int


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
THREADS = 128


def vectors(bytes_an_element: int) -> int:
    """How many 128-bit accesses a thread needs for its part of a block."""
    return bytes_an_element * optimizer.BLOCK.value // THREADS // 16


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
        function=optimizer.optimizer_step_kernel,
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
        threads=THREADS,
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
        function=optimizer.gradient_norm_kernel,
        signature=NORM_SIGNATURE,
        constants={"DTYPES": sum(1 << DTYPE_CODES[dtype] for dtype in dtypes)},
        threads=THREADS,
        loads=sum(map(vectors, item)),
        stores=0,
        bytes_per_element=max(item),
        launches=2,
    )


MIXED = "float32", "bfloat16", "float16"
CASES = [
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


def compiled(case: KernelCase, arch: str):
    """The kernel as the launcher compiles it, all pointers aligned to 16 bytes."""
    target, params = TARGETS[arch], case.function.params
    signature = {param.name: case.signature.get(param.name, "constexpr") for param in params}
    aligned = {
        (param.num,): [["tt.divisibility", 16]]
        for param in params
        if signature[param.name].startswith("*") and not param.do_not_specialize_on_alignment
    }
    source = ASTSource(case.function, signature, case.constants, aligned)
    options = {**optimizer.OPTIONS, "num_warps": case.threads // target.warp_size}
    return triton.compile(source, target=target, options=options)


def nvidia_figures(kernel) -> dict[str, int]:
    """From the machine code.  The compiler's own count of spills stays 0 when there are some."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], **run)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], **run).stdout
    usage = usage.stdout + usage.stderr
    ops = Counter(re.findall(r"\b(?:LDG|STG|LDL|STL)\b[.\w]*", code))

    def count(*starts: str, of: str = "") -> int:
        return sum(n for op, n in ops.items() if op.startswith(starts) and of in op)

    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spill_instructions": count("LDL", "STL"),
        "shared_bytes": kernel.metadata.shared,
        "loads_128": count("LDG", of=".128"),
        "stores_128": count("STG", of=".128"),
    }


def amd_figures(kernel) -> dict[str, int]:
    code = kernel.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spill_instructions": len(re.findall(r"\bscratch_(?:load|store)", code)),
        "shared_bytes": kernel.metadata.shared,
        "loads_128": len(re.findall(r"\bglobal_load_dwordx4\b", code)),
        "stores_128": len(re.findall(r"\bglobal_store_dwordx4\b", code)),
    }


def audit(case: KernelCase, arch: str) -> dict[str, object]:
    """A row of the result: the figures, and whether all accesses to whole blocks are 128 bits wide.

    Then there are as many as wanted, or a multiple where the loop is unrolled.  On AMD the rows of the
    tables are read in 128 bits as well, so there are more.
    """
    kernel = compiled(case, arch)
    nvidia = TARGETS[arch].backend == "cuda"
    figures = nvidia_figures(kernel) if nvidia else amd_figures(kernel)

    def all_wide(count: int, wanted: int) -> bool:
        return count >= wanted and (not nvidia or wanted == 0 or count % wanted == 0)

    return {
        "kernel": case.kernel,
        "variant": case.variant,
        "arch": arch,
        "evidence": "compiled, not measured",
        **figures,
        "loads_128_wanted": case.loads,
        "stores_128_wanted": case.stores,
        "all_128": all_wide(figures["loads_128"], case.loads)
        and all_wide(figures["stores_128"], case.stores),
        "threads": case.threads,
        "launches": case.launches,
        "bytes_per_element": case.bytes_per_element,
        "triton": triton.__version__,
    }


def main() -> None:
    print("compiled, not measured")
    rows = []
    for case in CASES:
        for arch in TARGETS:
            row = audit(case, arch)
            rows.append(row)
            print(
                f"{case.kernel:<13} {case.variant:<75} {arch:<6} {row['registers']:4} registers, "
                f"{row['stack_bytes']} + {row['spill_instructions']} spills, "
                f"128-bit loads {row['loads_128']}/{case.loads} "
                f"stores {row['stores_128']}/{case.stores}"
            )
    with open(RESULTS / "gpu_audit.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
