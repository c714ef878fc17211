"""Adam and AdamW."""

from __future__ import annotations

from operator import itemgetter

from torch import Tensor

from depthnet.optim.base import STRUCTURE, ScaledOptimizer, number


class Adam(ScaledOptimizer):
    """Adam with a learning rate, eps and weight decay for each tensor, layer or population member.

    All parameters of all groups are updated in one parallel region (CPU) or one launch (GPU).

    Args:
        params: a module, whose parametrization then scales each layer's rates, or parameters or
            groups of parameters; see `ScaledOptimizer` for the scales in a group.
        lr: the learning rate at the base shape: a number, a 0-dim tensor (which may change in place, also
            inside a CUDA graph), or a vector over the members of a population.
        betas, eps, weight_decay, amsgrad, maximize: as in torch.optim.Adam; eps and weight_decay at the
            base shape.
        decoupled_weight_decay: whether weight decay acts on the weights (AdamW) or joins the gradient.
        max_grad_norm: None, or the 2-norm that the gradients of all groups together are brought down to,
            as torch.nn.utils.clip_grad_norm_ does, but inside the step: gradients stay as they are.
        master_weights: whether bfloat16 and float16 parameters are rounded copies of float32 ones, which
            are kept as `master_param` in the state.
        stochastic_rounding: whether bfloat16 and float16 parameters without masters are rounded up or
            down at random, so that small updates are not lost.  The random bits depend on the
            parameter's place, the step and the element only: the same on every run, machine and rank.
        foreach, fused, capturable: accepted for torch's sake; there is one implementation, which is
            fused, and capturable on a GPU.
        differentiable: must be False.

    State and state_dict are laid out as torch.optim.Adam's; the moments of bfloat16 and float16
    parameters are float32.

    Raises:
        TypeError, ValueError: an argument is not as described, or the bare parameters of a model whose
            parametrization scales learning rates are given.
    """

    kernel = "adam"
    _settings = staticmethod(
        itemgetter(
            *(*STRUCTURE, "amsgrad"),
            *("lr", "eps", "weight_decay", "betas", "decoupled_weight_decay", "maximize"),
        )
    )

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        master_weights: bool = False,
        stochastic_rounding: bool = False,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
            "max_grad_norm": max_grad_norm,
            "master_weights": master_weights,
            "stochastic_rounding": stochastic_rounding,
        }
        super().__init__(params, defaults, "adamw" if decoupled_weight_decay else "adam")

    def _check_numbers(self, group: dict) -> None:
        betas = group["betas"]
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        for index, beta in enumerate(betas):
            if isinstance(beta, Tensor) and beta.device.type != "cpu":
                raise TypeError(f"betas[{index}] must be a number, got a tensor on {beta.device}")
            if not 0 <= beta < 1:
                raise ValueError(f"betas[{index}] must be at least 0 and below 1, got {beta}")
        group["betas"] = tuple(map(number, betas))

    @staticmethod
    def _structure(settings: tuple) -> tuple:
        return settings[: len(STRUCTURE) + 1]

    @staticmethod
    def _number_columns(settings: list[tuple]) -> dict[str, list[float]]:
        columns = list(zip(*settings, strict=True))[len(STRUCTURE) + 1 :]
        lr, eps, weight_decay, betas, decoupled, maximize = columns
        return {
            "lr": list(map(number, lr)),
            "eps": list(map(number, eps)),
            "weight_decay": list(map(number, weight_decay)),
            "beta1": [number(beta1) for beta1, _ in betas],
            "beta2": [number(beta2) for _, beta2 in betas],
            "decoupled": decoupled,
            "maximize": maximize,
        }

    def _make_state(self, param: Tensor, state: dict, group: dict) -> list[tuple[str, str]]:
        columns = {"state0": "exp_avg", "state1": "exp_avg_sq"}
        if group["amsgrad"]:
            columns["state2"] = "max_exp_avg_sq"
        self._make_step(param, state)
        self._make_moments(param, state, columns.values())
        return [("step", "step"), *columns.items(), *self._make_master(param, state, group)]


class AdamW(Adam):
    """Adam with decoupled weight decay; everything else as in `Adam`.

    Under width and depth rules lr * weight_decay stays fixed for every layer.
    """

    def __init__(
        self,
        params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options,
    ):
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay=True, **options
        )
