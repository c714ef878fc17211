"""GPU kernels compiled ahead of time, which needs no GPU, and what the machine code says of them."""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from depthnet.kernels.triton import parts

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_kernel(
    function: Callable,
    signature: dict[str, str],
    constants: dict[str, object],
    arch: str,
    warps: int,
    stages: int,
):
    """A kernel as its launcher compiles it, with all pointers and the strides among them aligned.

    Args:
        signature: the type of each argument that is not constant; more than the kernel has do no harm.
        constants: the value of each other argument.
        warps: of 32 threads.
    """
    target = TARGETS[arch]
    kinds = {param.name: signature.get(param.name, "constexpr") for param in function.params}
    kinds.update((name, "constexpr") for name in constants if name in kinds)
    aligned = {
        (param.num,): [["tt.divisibility", 16]]
        for param in function.params
        if not param.do_not_specialize_on_alignment
        and (kinds[param.name].startswith("*") or param.name.endswith(("_member", "_layer")))
        and kinds[param.name] != "constexpr"
    }
    values = {name: value for name, value in constants.items() if name in kinds}
    source = ASTSource(function, kinds, values, aligned)
    options = {
        "num_warps": 32 * warps // target.warp_size,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=target, options=options)


def figures(kernel, arch: str) -> dict:
    """What the machine code says of a kernel.

    Registers, spills, shared and tensor memory, matrix instructions, accesses to global memory; and
    `widths`: for each array, by its pointer's name in the source, how many bits a thread accesses at once.
    """
    return (nvidia_figures if TARGETS[arch].backend == "cuda" else amd_figures)(kernel)


class Access(NamedTuple):
    """An instruction that loads from global memory or stores to it."""

    kind: str
    bits: int  # a thread
    array: str


def nvidia_figures(kernel) -> dict:
    """From the machine code.  The compiler's own count of spills stays 0 when there are some."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        run = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], **run)
        code = subprocess.run([TOOLS / "nvdisasm", "-c", "-gi", file.name], **run).stdout
    usage = usage.stdout + usage.stderr
    accesses, places, inlined = [], [], False
    for line in code.splitlines():
        if place := re.search(r'//## File "(.+?)", line (\d+)', line):
            places = [*places, place.groups()] if inlined else [place.groups()]
        inlined = bool(place)  # where to follows
        if found := re.search(r"\b(LDG|STG)(?:STS)?\.([.\w]*)", line):
            bits = re.search(r"(?:^|\.)[US]?(8|16|64|128|256)(?:\.|$)", found[2])
            kind = "load" if found[1] == "LDG" else "store"
            accesses.append(Access(kind, int(bits[1]) if bits else 32, _array(places)))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spill_instructions": _count(r"(?:LDL|STL)\b", code),
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory_columns": kernel.metadata.tmem_size,
        "matrix_instructions": _count(r"(?:HMMA|HGMMA|DMMA|UTC\w*MMA)\b", code),
        **_widths(accesses),
    }


AMD_BITS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}
AMD_BITS |= {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128}


def amd_figures(kernel) -> dict:
    code = kernel.asm["amdgcn"]
    folder = Path(parts.__file__).parent  # the code names files without it
    accesses, places = [], []
    for line in code.splitlines():
        if re.match(r"\s*\.loc\s", line):
            places = [
                (str(folder / name), number)
                for name, number in re.findall(r"(\w+\.py):(\d+)", line)
            ]
        if found := re.search(r"\b(?:global|buffer)_(load|store)_(?:lds_)?(\w+)", line):
            size = re.sub(r"_d16(_hi)?$", "", found[2])  # which half of a register does not matter
            accesses.append(Access(found[1], AMD_BITS[size], _array(places)))

    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "spill_instructions": _count("scratch_(?:load|store)", code),
        "shared_bytes": kernel.metadata.shared,
        "tensor_memory_columns": 0,
        "matrix_instructions": _count("v_(?:mfma|smfmac)", code),
        **_widths(accesses),
    }


def _count(pattern: str, code: str) -> int:
    return len(re.findall(rf"\b{pattern}", code))


def _array(places: list[tuple[str, str]]) -> str:
    """The pointer of the access in a place of the source that was inlined into the next, and so on."""
    names = [name for path, line in places if (name := _pointer(path, int(line)))]
    return names[-1] if names else "?"  # the compiler has moved it


@cache
def _pointer(path: str, line: int) -> str | None:
    source = linecache.getline(path, line).rstrip()
    if source.endswith("("):
        source += linecache.getline(path, line + 1).strip()
    found = re.search(r"\b\w*(?:load|store)\w*\((?:tl\.multiple_of\()?(\w+)", source)
    return found and found[1]


def _widths(accesses: list[Access]) -> dict:
    def count(kind: str, bits: int = 0) -> int:
        return sum(access.kind == kind and access.bits >= bits for access in accesses)

    widths: dict[str, set[int]] = {}
    for access in accesses:
        widths.setdefault(access.array, set()).add(access.bits)
    return {
        "loads": count("load"),
        "loads_128": count("load", 128),
        "stores": count("store"),
        "stores_128": count("store", 128),
        "widths": widths,
    }
