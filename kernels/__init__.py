"""Operators for deep residual stacks, each on the fastest backend that can run it."""

from depthnet._activations import ACTIVATIONS, slopes
from depthnet.kernels.dispatch import BackendStatus, backends, use_backend
from depthnet.kernels.linear import embedding_sum, linear
from depthnet.kernels.mlp_activation import mlp_activation
from depthnet.kernels.optimizer import adamw_step_, sgd_step_
from depthnet.kernels.planning import Plan, plan
from depthnet.kernels.residual import scaled_residual
from depthnet.kernels.residual_norm import residual_norm
from depthnet.kernels.rotary import rotary
from depthnet.kernels.stack import residual_stack

__all__ = [
    "ACTIVATIONS",
    "BackendStatus",
    "Plan",
    "adamw_step_",
    "backends",
    "embedding_sum",
    "linear",
    "mlp_activation",
    "plan",
    "residual_norm",
    "residual_stack",
    "rotary",
    "scaled_residual",
    "sgd_step_",
    "slopes",
    "use_backend",
]
