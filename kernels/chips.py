"""GPUs as their makers publish them: what predictions of time and choices of blocks start from."""

from __future__ import annotations

from dataclasses import dataclass

# NVIDIA's blog post "Getting Started with CUDA Graphs": kernels of 2.9 µs take 3.8 µs each when they are
# queued.  That was a V100; for the chips below it is an assumption.
LAUNCH_SECONDS = 1e-6


@dataclass(frozen=True)
class Chip:
    """One GPU; none of the figures is measured here.

    Attributes:
        multiprocessors: SMs of NVIDIA, compute units of AMD.
        flops: dense peak FLOP/s of matrix products by the dtype of their operands; float32 and float64
            without tensor cores.
        memory_bandwidth: of the HBM, bytes/s.
        cache_bandwidth: bytes/s that the L2 delivers to all multiprocessors together.
        shared_bytes: shared memory that one program may have.
        shared_bytes_per_multiprocessor: what the programs of a multiprocessor share.
        registers: of 32 bits, of a multiprocessor.
        max_threads: that are resident on a multiprocessor.
        launch_seconds: from the end of a kernel to the start of the next one that waits.
    """

    name: str
    multiprocessors: int
    flops: dict[str, float]
    memory_bandwidth: float
    cache_bandwidth: float
    shared_bytes: int
    shared_bytes_per_multiprocessor: int
    registers: int = 65536
    max_threads: int = 2048
    warp: int = 32
    launch_seconds: float = LAUNCH_SECONDS


def _flops(sixteen: float, tf32: float, float32: float, float64: float) -> dict[str, float]:
    return {
        "bfloat16": sixteen,
        "float16": sixteen,
        "tf32": tf32,
        "float32": float32,
        "float64": float64,
    }


# Multiprocessors, FLOP/s and HBM: "NVIDIA A100 Tensor Core GPU" data sheet, "NVIDIA H100 Tensor Core GPU"
# data sheet and "NVIDIA H100 Tensor Core GPU Architecture" white paper, "NVIDIA Blackwell" data sheet (an
# eighth of HGX B200's; half of the rates with sparsity), "AMD Instinct MI300X Accelerator" data sheet.
# B200's 148 SMs: chipsandcheese.com, "Nvidia's B200: Keeping the CUDA Juggernaut Rolling".
# Shared memory, registers, threads: "CUDA C++ Programming Guide", compute capabilities 8.0, 9.0, 10.0;
# "AMD CDNA 3 Architecture" white paper and "AMD Instinct MI300 Instruction Set Architecture" (four SIMDs
# with 512 vector registers of 64 lanes and eight wavefronts each).
CHIPS = {
    "sm_80": Chip(
        name="A100 SXM 80 GB",
        multiprocessors=108,
        flops=_flops(312e12, 156e12, 19.5e12, 9.7e12),
        memory_bandwidth=2.039e12,
        # Published: 5120 bytes a clock ("NVIDIA A100 Tensor Core GPU Architecture"), at 1.41 GHz.
        cache_bandwidth=7.2e12,
        shared_bytes=163 * 1024,
        shared_bytes_per_multiprocessor=164 * 1024,
    ),
    "sm_90": Chip(
        name="H100 SXM",
        multiprocessors=132,
        flops=_flops(989.4e12, 494.7e12, 66.9e12, 33.5e12),
        memory_bandwidth=3.35e12,
        # Not published by NVIDIA: 5120 bytes a clock as in A100, at 1.755 GHz, which is also what table 3
        # of Ultrasonics Sonochemistry 99 (2023) 106546 has.
        cache_bandwidth=9.0e12,
        shared_bytes=227 * 1024,
        shared_bytes_per_multiprocessor=228 * 1024,
    ),
    "sm_100": Chip(
        name="B200",
        multiprocessors=148,
        flops=_flops(2250e12, 1125e12, 75e12, 37e12),
        memory_bandwidth=7.7e12,
        # Not published: assumed to be as much for each SM as in H100.
        cache_bandwidth=10.1e12,
        shared_bytes=227 * 1024,
        shared_bytes_per_multiprocessor=228 * 1024,
    ),
    "gfx942": Chip(
        name="MI300X",
        multiprocessors=304,
        flops=_flops(1307.4e12, 653.7e12, 163.4e12, 81.7e12),
        memory_bandwidth=5.3e12,
        # Published: 2048 bytes a clock from the L2 of each of 8 dies ("AMD CDNA 3 Architecture"), at 2.1
        # GHz.  All dies together get 17.2 TB/s from the Infinity Cache behind it.
        cache_bandwidth=34.4e12,
        shared_bytes=64 * 1024,
        shared_bytes_per_multiprocessor=64 * 1024,
        registers=4 * 512 * 64,
        warp=64,
    ),
}
