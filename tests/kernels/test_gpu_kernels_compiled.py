"""Some of bench/gpu_audit.py: what the Triton kernels compile to, for chips that need not be here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from depthnet.kernels.triton import INTERPRETED

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import gpu_audit

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")


def assert_compiled_well(case, arch: str) -> dict:
    row = gpu_audit.audit(case, arch)
    for claim, holds in gpu_audit.VERDICTS.items():
        assert holds(row), f"not so: {claim}: {row}"
    return row


@pytest.mark.parametrize(
    ("arch", "dtype", "n"),
    [
        ("sm_80", "bfloat16", 64),
        ("sm_80", "float32", 512),
        ("sm_90", "bfloat16", 512),
        ("sm_90", "float32", 256),
        ("sm_100", "bfloat16", 256),
        ("sm_100", "float32", 64),
        ("gfx942", "bfloat16", 512),
        ("gfx942", "float32", 256),
    ],
)
def test_residual_stack(arch, dtype, n):
    kernels = set()
    for case in gpu_audit.stack_cases(arch, dtype, n, all_tiles=False):
        row = assert_compiled_well(case, arch)
        kernels.add(case.kernel)
        below = {part.partition(" ")[0] for part in row["below_128"].split(", ")}
        assert "weight" not in below, row
        assert row["loads_128"], row
    passes = {"weight_gradient", "narrow_forward", "narrow_backward_data"}
    if n > 256:
        passes = {"weight_gradient", "layer_forward", "layer_finish", "layer_backward_data"}
    assert kernels == passes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_adam(arch, dtype):
    assert_compiled_well(gpu_audit.step_case("adam", dtype, states=2), arch)


@pytest.mark.parametrize("kernel", list(gpu_audit.NORM_ARRAYS))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_residual_norm(arch, kernel):
    case = gpu_audit.residual_norm_case(kernel, "float32", "bfloat16", 1024)
    row = assert_compiled_well(case, arch)
    assert "s" in row["arrays_128"].split(", "), row


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_scaled_residual(arch):
    arrays = {"x": "bfloat16", "h": "bfloat16", "y": "bfloat16"}
    row = assert_compiled_well(gpu_audit.residual_case("residual_forward", "", 256, **arrays), arch)
    assert set(arrays) <= set(row["arrays_128"].split(", ")), row


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("kernel", ["mlp_activation_forward", "mlp_activation_backward"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_mlp_activation(arch, kernel, kind):
    row = assert_compiled_well(gpu_audit.mlp_activation_case(kernel, "bfloat16", kind), arch)
    assert not row["below_128"], row


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_rotary(arch, back):
    row = assert_compiled_well(gpu_audit.rotary_case("bfloat16", 64, back), arch)
    assert not row["below_128"], row
