"""Operators for deep residual stacks, each on the fastest backend that can run it."""

from depthnet.kernels.activations import ACTIVATIONS, slopes
from depthnet.kernels.ops import (
    BackendStatus,
    adamw_step_,
    backends,
    residual_stack,
    scaled_residual,
    sgd_step_,
    use_backend,
)

__all__ = [
    "ACTIVATIONS",
    "BackendStatus",
    "adamw_step_",
    "backends",
    "residual_stack",
    "scaled_residual",
    "sgd_step_",
    "slopes",
    "use_backend",
]
