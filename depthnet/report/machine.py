"""What machine and software a result comes from."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch

import depthnet
from depthnet.kernels import backends


def machine(device: str = "cpu") -> dict[str, str]:
    """The machine and the software, for every row of a result."""
    software = {
        "torch": torch.__version__,
        "depthnet": depthnet.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    return {**(_gpu() if device == "cuda" else _cpu()), **software}


def _gpu() -> dict[str, str]:
    import triton

    drivers = [Path("/sys/module", name, "version") for name in ("nvidia", "amdgpu")]
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": next((file.read_text().strip() for file in drivers if file.exists()), "unknown"),
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "triton": triton.__version__,
    }


def _cpu() -> dict[str, str]:
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
    }
