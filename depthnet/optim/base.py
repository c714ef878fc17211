"""What the optimizers share: groups with scales, vectors of rates, torch's state layout."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from depthnet.scaling.groups import SCALES, check_unscaled, param_groups

# The hyperparameter that each scale multiplies.
HYPERPARAMETERS = {scale: scale.removesuffix("_scale") for scale in SCALES}


class ScaledOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups carry `lr_scale`, `eps_scale` and `weight_decay_scale`.

    What a step uses is `group["lr"] * group["lr_scale"]`, and so on; schedulers touch only
    `group["lr"]`.  A scale is a number or a tensor over the leading dimensions of the group's
    parameters: of shape (L,) for a stack of L layers, (P,) or (P, L) for a population of P networks.
    A vector of learning rates becomes part of `lr_scale`, and `group["lr"]` is then 1.0, the factor
    that schedulers move.
    """

    rule: str  # whose rules of scaling.Rule apply: adamw, adam or sgd

    def __init__(self, params, defaults: dict):
        name = f"depthnet.optim.{type(self).__name__}"
        if isinstance(params, torch.nn.Module):
            params = param_groups(params, self.rule)
        else:
            params = [_listed(item) if isinstance(item, dict) else item for item in params]
            bare = [item for item in params if not isinstance(item, dict)]
            for group in params:
                if isinstance(group, dict) and not set(SCALES) & set(group):
                    bare += group["params"]
            bare = [item[1] if isinstance(item, tuple) else item for item in bare]  # (name, tensor)
            check_unscaled(bare, self.rule, name)
            for group in params:
                if isinstance(group, dict) and group.get("rule", self.rule) != self.rule:
                    raise ValueError(
                        f"params: the group {group.get('name')!r} follows the rule {group['rule']!r}; "
                        f"{name} needs model.param_groups({self.rule!r})"
                    )
        super().__init__(params, {**defaults, **dict.fromkeys(SCALES, 1.0)})

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict) -> None:
        for option in ("amsgrad", "maximize", "differentiable"):
            if group.get(option):
                raise ValueError(f"{option}=True is not supported")
        for key in SCALES:
            group[key] = _rates(key, group[key])
        lr = _rates("lr", group["lr"], keep_scalar_tensor=True)
        if isinstance(lr, Tensor) and lr.ndim:
            scale = group["lr_scale"]
            if isinstance(scale, Tensor):
                lr = lr.reshape((*lr.shape, *[1] * (scale.ndim - lr.ndim)))
            lr, group["lr_scale"] = 1.0, lr * scale
        group["lr"] = lr
        for key in ("eps", "weight_decay"):
            if key in group and getattr(_rates(key, group[key]), "ndim", 0):
                raise TypeError(
                    f"{key} must be a number, got {group[key]!r}; {key}_scale may be a vector"
                )
        for param in group["params"]:
            if param.is_complex():
                raise TypeError(f"params must be real, got {param.dtype}")
            for key in SCALES:
                shape = getattr(group[key], "shape", ())
                if param.shape[: len(shape)] != tuple(shape):
                    raise ValueError(
                        f"{key} (or a vector {HYPERPARAMETERS[key]}) of shape {tuple(shape)} does not "
                        f"fit the leading dimensions of a parameter of shape {tuple(param.shape)}"
                    )

    def __setstate__(self, state: dict) -> None:
        # A checkpoint of torch.optim has plain numbers, every scale multiplied out; one of an old torch
        # counts steps in a number.
        for group in state["param_groups"]:
            for key in SCALES:
                group.setdefault(key, 1.0)
            self._check_group(group)
        for entry in state["state"].values():
            if "step" in entry and not isinstance(entry["step"], Tensor):
                entry["step"] = torch.tensor(float(entry["step"]), device="cpu")
        super().__setstate__(state)

    def torch_state_dict(self) -> dict:
        """The state in the form of torch.optim's, every scale multiplied out, to load there.

        Raises:
            ValueError: a scale is a vector, which torch's groups cannot hold.
        """
        state = self.state_dict()
        for group in state["param_groups"]:
            for key in SCALES:
                scale, name = group.pop(key), HYPERPARAMETERS[key]
                if isinstance(scale, Tensor):
                    raise ValueError(f"{key} is a vector, which torch.optim's groups cannot hold")
                # What schedulers keep in a group is a learning rate too.
                for entry in (name, "initial_lr", "max_lr", "min_lr") if name == "lr" else (name,):
                    if entry in group:
                        group[entry] = group[entry] * scale
        return state

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Args:
            closure: None, or a function that computes the loss anew and returns it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        batches = defaultdict(list)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if param.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients")
                batches[(param.device, *self._constants(group, param))].append((param, group))
        for (_, *constants), batch in batches.items():
            self._step(batch, *constants)
        return loss

    def _constants(self, group: dict, param: Tensor) -> tuple:
        """What must be equal for parameters to be updated together."""
        raise NotImplementedError

    def _step(self, batch: list[tuple[Tensor, dict]], *constants) -> None:
        raise NotImplementedError


def _listed(group: dict) -> dict:
    """A group whose `params`, which may be one tensor or a generator, are a list."""
    members = group["params"]
    return {**group, "params": [members] if isinstance(members, Tensor) else list(members)}


def rate_tables(batch: list[tuple[Tensor, dict]], *names: str) -> tuple[list[int], list[Tensor]]:
    """For each parameter the number of leading dimensions that rates vary over, and for each name one
    float64 table with an entry for each slice of each parameter."""
    leading = [
        max(getattr(group[f"{name}_scale"], "ndim", 0) for name in names) for _, group in batch
    ]
    tables = []
    for name in names:
        entries = []
        for (param, group), dims in zip(batch, leading, strict=True):
            rate, shape = group[name] * group[f"{name}_scale"], param.shape[:dims]
            if isinstance(rate, Tensor):
                rate = rate.to(param.device, torch.float64)
            else:
                rate = torch.full((), rate, dtype=torch.float64, device=param.device)
            rate = rate.reshape((*rate.shape, *[1] * (dims - rate.ndim)))
            entries.append(rate.expand(shape).reshape(-1))
        tables.append(torch.cat(entries))
    return leading, tables


def _rates(
    argument: str, value: float | Tensor | Iterable, keep_scalar_tensor: bool = False
) -> float | Tensor:
    """A number, or a float64 tensor of finite numbers >= 0."""
    if isinstance(value, Tensor) and value.ndim == 0 and keep_scalar_tensor:
        if value.device.type == "cpu" and not value >= 0:
            raise ValueError(f"{argument} must be finite and not negative, got {value!r}")
        return value
    try:
        tensor = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{argument} must be a number or a vector of numbers, got {value!r}"
        ) from error
    if not (torch.isfinite(tensor) & (tensor >= 0)).all():
        raise ValueError(f"{argument} must be finite and not negative, got {value!r}")
    return tensor.clone() if tensor.ndim else tensor.item()
