"""Stochastic gradient descent."""

from __future__ import annotations

from operator import itemgetter

from torch import Tensor

from depthnet.optim.base import STRUCTURE, ScaledOptimizer, number


class SGD(ScaledOptimizer):
    """SGD with a learning rate and weight decay for each tensor, layer or population member.

    All parameters of all groups are updated in one parallel region (CPU) or one launch (GPU).

    Args:
        params: a module, whose parametrization then scales each layer's rates, or parameters or
            groups of parameters; see `ScaledOptimizer` for the scales in a group.
        lr: the learning rate at the base shape: a number, a 0-dim tensor (which may change in place, also
            inside a CUDA graph), or a vector over the members of a population.
        momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD.
        decoupled_weight_decay: whether weight decay acts on the weights or joins the gradient.
        max_grad_norm, master_weights, stochastic_rounding: as in `Adam`.
        foreach, fused: accepted for torch's sake; there is one implementation, which is fused.
        differentiable: must be False.

    State and state_dict are laid out as torch.optim.SGD's; momentum buffers of bfloat16 and float16
    parameters are float32, and stochastic rounding counts its steps in the state.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bare parameters of a model whose
            parametrization scales learning rates are given.
    """

    kernel = "sgd"
    _settings = staticmethod(
        itemgetter(
            *(*STRUCTURE, "lr", "weight_decay", "momentum", "dampening", "nesterov"),
            *("decoupled_weight_decay", "maximize"),
        )
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_grad_norm": max_grad_norm,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, "sgd")

    def _check_numbers(self, group: dict) -> None:
        momentum = group["momentum"]
        if not momentum >= 0:
            raise ValueError(f"momentum must not be negative, got {momentum}")
        if group["nesterov"] and (momentum <= 0 or group["dampening"] != 0):
            raise ValueError("nesterov needs a positive momentum and no dampening")

    @staticmethod
    def _structure(settings: tuple) -> tuple:
        momentum = settings[len(STRUCTURE) + 2]
        return (*settings[: len(STRUCTURE)], momentum != 0)

    @staticmethod
    def _number_columns(settings: list[tuple]) -> dict[str, list[float]]:
        names = ("lr", "weight_decay", "beta1", "beta2", "nesterov", "decoupled", "maximize")
        columns = list(zip(*settings, strict=True))[len(STRUCTURE) :]
        return {
            name: list(map(number, column)) for name, column in zip(names, columns, strict=True)
        }

    def _make_state(self, param: Tensor, state: dict, group: dict) -> list[tuple[str, str]]:
        columns = [*self._make_master(param, state, group)]
        if group["momentum"] != 0:
            self._make_moments(param, state, ["momentum_buffer"])
            columns.append(("state0", "momentum_buffer"))
        if group["stochastic_rounding"]:
            self._make_step(param, state)
            columns.append(("step", "step"))
        return columns
