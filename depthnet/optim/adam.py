"""Adam and AdamW."""

from __future__ import annotations

import torch
from torch import Tensor

from depthnet.kernels import adamw_step_
from depthnet.optim.base import ScaledOptimizer, rate_tables


class Adam(ScaledOptimizer):
    """Adam with a learning rate, eps and weight decay for each tensor, layer or population member.

    Args:
        params: a module, whose parametrization then scales each layer's rates, or parameters or
            groups of parameters; see `ScaledOptimizer` for the scales in a group.
        lr: the learning rate at the base shape: a number, a 0-dim tensor (which can change without
            recompiling a compiled step), or a vector over the members of a population.
        betas, eps, weight_decay: as in torch.optim.Adam; eps and weight_decay at the base shape.
        decoupled_weight_decay: whether weight decay acts on the weights (AdamW) or joins the gradient.

    State and state_dict are laid out as torch.optim.Adam's.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bare parameters of a model whose
            parametrization scales learning rates are given.
    """

    rule = "adam"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = False,
    ):
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}] must be at least 0 and below 1, got {beta}")
        if decoupled_weight_decay:
            self.rule = "adamw"
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "decoupled_weight_decay": decoupled_weight_decay})

    def _constants(self, group: dict, param: Tensor) -> tuple:
        # A checkpoint of an old torch lacks the key.
        decoupled = group.get("decoupled_weight_decay", self.defaults["decoupled_weight_decay"])
        return tuple(group["betas"]), decoupled

    def _step(self, batch, betas, decoupled) -> None:
        params = [param for param, _ in batch]
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        leading, (lr, eps, weight_decay) = rate_tables(batch, "lr", "eps", "weight_decay")
        adamw_step_(
            params,
            [param.grad for param in params],
            *(
                [self.state[param][key] for param in params]
                for key in ("exp_avg", "exp_avg_sq", "step")
            ),
            lr=lr,
            eps=eps,
            weight_decay=weight_decay,
            betas=betas,
            leading=leading,
            decoupled=decoupled,
        )


class AdamW(Adam):
    """Adam with decoupled weight decay; everything else as in `Adam`.

    Under width and depth rules lr * weight_decay stays fixed for every layer.
    """

    rule = "adamw"

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, decoupled_weight_decay=True)
