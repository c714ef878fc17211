"""The kernels of the residual stack as they are compiled for a dtype, a width and a tile."""

from __future__ import annotations

from collections.abc import Callable

from depthnet.kernels.planning import Tile
from depthnet.kernels.triton import stack_layers, stack_narrow, weight_gradient

KERNELS = {
    "narrow_forward": stack_narrow.narrow_forward_kernel,
    "narrow_backward_data": stack_narrow.narrow_backward_data_kernel,
    "layer_forward": stack_layers.layer_forward_kernel,
    "layer_backward_data": stack_layers.layer_backward_data_kernel,
    "layer_finish": stack_layers.layer_finish_kernel,
    "weight_gradient": weight_gradient.weight_gradient_kernel,
}
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "fp32"}


def variant(kernel: str, dtype: str, n: int, tile: Tile) -> tuple[Callable, dict, dict]:
    """The kernel, its signature and its constants, with a float32 stream and all that backward needs.

    Args:
        dtype: of the weights: bfloat16, float16, float32; or tf32.
    """
    kind = TYPES[dtype]
    operands = ("weight", "operands", "operand", "d", "grad_weight")
    streams = ("x", "y", "grad", "grad_x", "g", "g_out", "sums", "y_sums", "g_sums", "partial")
    signature = {
        **dict.fromkeys(operands, f"*{kind}"),
        **dict.fromkeys(streams, "*fp32"),
        **{f"{name}_member": "i64" for name in ("weight", "operand", "signs", "d", "grad")},
        "weight_layer": "i64",
        **dict.fromkeys(("rows", "depth", "members", "splits", "counters"), "i32"),
        "signs": "*u8",
        "arrived": "*i32",
        "scale": "fp64",
        "p": "fp32",
        "q": "fp32",
    }
    constants = {
        "scales": None,
        "MEAN_SUBTRACT": True,
        "WIDTH": n,
        "PRECISION": "tf32" if dtype == "tf32" else "ieee",
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "SLAB": tile.slab,
    }
    return KERNELS[kernel], signature, constants
