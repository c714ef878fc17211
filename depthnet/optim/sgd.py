"""Stochastic gradient descent."""

from __future__ import annotations

import torch
from torch import Tensor

from depthnet.kernels import sgd_step_
from depthnet.optim.base import ScaledOptimizer, rate_tables


class SGD(ScaledOptimizer):
    """SGD with a learning rate and weight decay for each tensor, layer or population member.

    Args:
        params: a module, whose parametrization then scales each layer's rates, or parameters or
            groups of parameters; see `ScaledOptimizer` for the scales in a group.
        lr: the learning rate at the base shape: a number, a 0-dim tensor (which can change without
            recompiling a compiled step), or a vector over the members of a population.
        momentum, dampening, weight_decay, nesterov: as in torch.optim.SGD.
        decoupled_weight_decay: whether weight decay acts on the weights or joins the gradient.

    State and state_dict are laid out as torch.optim.SGD's.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bare parameters of a model whose
            parametrization scales learning rates are given.
    """

    rule = "sgd"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        decoupled_weight_decay: bool = False,
    ):
        if not momentum >= 0:
            raise ValueError(f"momentum must not be negative, got {momentum}")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("nesterov needs a positive momentum and no dampening")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults)

    def _constants(self, group: dict, param: Tensor) -> tuple:
        # The first step has no dampening: torch starts the buffer from the gradient itself.
        first = group["momentum"] != 0 and self.state[param].get("momentum_buffer") is None
        return (
            group["momentum"],
            0.0 if first else group["dampening"],
            group["nesterov"],
            group.get("decoupled_weight_decay", False),
        )

    def _step(self, batch, momentum, dampening, nesterov, decoupled) -> None:
        params = [param for param, _ in batch]
        buffers = []
        if momentum:
            for param in params:
                state = self.state[param]
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(param)
                buffers.append(state["momentum_buffer"])
        leading, (lr, weight_decay) = rate_tables(batch, "lr", "weight_decay")
        sgd_step_(
            params,
            [param.grad for param in params],
            buffers,
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            leading=leading,
            decoupled=decoupled,
        )
