"""What the optimizers share: groups with scales, vectors of rates, torch's state layout."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from depthnet.kernels import device_tables
from depthnet.kernels.reference import stream_dtype
from depthnet.kernels.step import StepTables
from depthnet.optim.plan import Plan
from depthnet.scaling.groups import SCALES, check_unscaled, param_groups

# Keys of a group that decide what the tables of a step hold, for every optimizer.
STRUCTURE = ("params", *SCALES, "max_grad_norm", "master_weights", "stochastic_rounding")

# The hyperparameter that each scale multiplies.
HYPERPARAMETERS = {scale: scale.removesuffix("_scale") for scale in SCALES}


class ScaledOptimizer(torch.optim.Optimizer):
    """An optimizer whose groups carry `lr_scale`, `eps_scale` and `weight_decay_scale`.

    What a step uses is `group["lr"] * group["lr_scale"]`, and so on; schedulers touch only
    `group["lr"]`.  A scale is a number or a tensor over the leading dimensions of the group's
    parameters: of shape (L,) for a stack of L layers, (P,) or (P, L) for a population of P networks.
    A vector of learning rates becomes part of `lr_scale`, and `group["lr"]` is then 1.0, the factor
    that schedulers move.

    Args:
        rule: whose rules of scaling.Rule apply: `adamw`, `adam` or `sgd`.
    """

    kernel: str  # which kernels run: adam or sgd
    _step_supports_amp_scaling = True  # GradScaler then leaves grad_scale and found_inf to the step
    _plan: Plan | None = None
    _captured_tables: tuple[StepTables, ...] = ()

    def __init__(self, params, defaults: dict, rule: str):
        name = f"depthnet.optim.{type(self).__name__}"
        if isinstance(params, torch.nn.Module):
            params = param_groups(params, rule)
        elif not isinstance(params, Tensor):  # which torch refuses
            params = [_listed(item) if isinstance(item, dict) else item for item in params]
            bare = [item for item in params if not isinstance(item, dict)]
            for group in params:
                if isinstance(group, dict) and not set(SCALES) & set(group):
                    bare += group["params"]
            bare = [item[1] if isinstance(item, tuple) else item for item in bare]  # (name, tensor)
            check_unscaled(bare, rule, name)
            for group in params:
                if isinstance(group, dict) and group.get("rule", rule) != rule:
                    raise ValueError(
                        f"params: the group {group.get('name')!r} follows the rule {group['rule']!r}; "
                        f"{name} needs model.param_groups({rule!r})"
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
        if group["differentiable"]:
            raise ValueError("differentiable=True is not supported: the step writes in place")
        norm = group["max_grad_norm"]
        if norm is not None and not (norm > 0 and norm != torch.inf):
            raise ValueError(f"max_grad_norm must be None or positive and finite, got {norm}")
        if norm is not None and group.get("population") is not None:
            raise ValueError(
                "max_grad_norm: one norm of all gradients would couple the members of a population"
            )
        self._check_numbers(group)
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
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            for key, default in defaults.items():
                group.setdefault(key, default)
            for key in SCALES:
                group.setdefault(key, 1.0)
            self._check_group(group)
        for entry in state["state"].values():
            if "step" in entry and not isinstance(entry["step"], Tensor):
                entry["step"] = torch.tensor(float(entry["step"]), device="cpu")
        super().__setstate__(state)

    def torch_state_dict(self) -> dict:
        """The state in the form of torch.optim's, every scale multiplied out, to load there.

        What only depthnet has, clipping, masters and stochastic rounding, is left out.

        Raises:
            ValueError: a scale is a vector, which torch's groups cannot hold.
        """
        state = self.state_dict()
        state["state"] = {
            index: {key: value for key, value in entry.items() if key != "master_param"}
            for index, entry in state["state"].items()
        }
        for group in state["param_groups"]:
            for key in ("max_grad_norm", "master_weights", "stochastic_rounding"):
                group.pop(key)
            for key in SCALES:
                scale, name = group.pop(key), HYPERPARAMETERS[key]
                if isinstance(scale, Tensor):
                    raise ValueError(f"{key} is a vector, which torch.optim's groups cannot hold")
                # What schedulers keep in a group is a learning rate too.
                for entry in (name, "initial_lr", "max_lr", "min_lr") if name == "lr" else (name,):
                    if entry in group:
                        group[entry] = group[entry] * scale
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state_dict of this class, or of its namesake in torch.optim.

        Raises:
            ValueError: it is of other groups, or scales in it do not fit the parameters; nothing has been
                loaded then.
        """
        given = {}
        # The last of the hooks sees what the others have made of the state.
        hook = self.register_load_state_dict_pre_hook(lambda _, state: given.update(state))
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
        # torch has cast every state to the dtype of its parameter: those in float32 are loaded again.
        for group, given_group in zip(self.param_groups, given["param_groups"], strict=True):
            for param, index in zip(group["params"], given_group["params"], strict=True):
                for key, value in given["state"].get(index, {}).items():
                    if isinstance(value, Tensor) and value.dtype == torch.float32 and key != "step":
                        self.state[param][key] = value.to(param.device)

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient.

        Everything is checked before the first write.

        Args:
            closure: None, or a function that computes the loss anew and returns it.

        Raises:
            RuntimeError, TypeError, ValueError: a gradient is sparse, or its memory is not that of a
                plain tensor or of a DTensor's shard; or the step is captured into a CUDA graph before
                one like it has been made.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update()
        return loss

    @torch._disable_dynamo  # there is nothing to fuse: under torch.compile the graph breaks here
    def _update(self) -> None:
        current = self._plan is not None and self._plan.refresh(self)
        if device_tables.capturing():
            # What is made inside a graph is made again by every replay: moments would start from zero.
            if not current or self.state_pending:
                raise RuntimeError(
                    f"{type(self).__name__}: this step needs states or tables that cannot be made while a "
                    "CUDA graph is captured; first make a step outside, for the same parameters and with "
                    "the same settings, that GradScaler does not skip"
                )
            # Replays read the tables, also when later steps have needed others.
            tables = [batch.tables for batch in self._plan.batches]
            self._captured_tables = (*self._captured_tables, *tables)
        elif not current:
            self._plan = None  # if the next line raises, the old one is not used again
            self._plan = Plan(self)
        self._plan.run(self)

    @property
    def state_pending(self) -> bool:
        """Whether the last step's states are not yet in `state`: GradScaler has skipped every step."""
        return self._plan is not None and bool(self._plan.pending)

    def keep(self, members: Tensor) -> None:
        """Go on with some members of the populations only, in place, once the module has done the same.

        Args:
            members: int64 (fewer,), their places.
        """
        for group in self.param_groups:
            if group.get("population") is None:
                continue
            group["population"] = len(members)
            for key in SCALES:
                if isinstance(group[key], Tensor):
                    group[key] = group[key][members.cpu()]
            for param in group["params"]:
                for key, value in self.state.get(param, {}).items():
                    if value.ndim:  # all but the count of steps
                        self.state[param][key] = value[members]
        self._plan = None

    def _check_numbers(self, group: dict) -> None:
        """Check what only one kind of optimizer has."""
        raise NotImplementedError

    @staticmethod
    def _settings(group: dict) -> tuple:
        """STRUCTURE, and what else in a group a step depends on."""
        raise NotImplementedError

    @staticmethod
    def _structure(settings: tuple) -> tuple:
        """Which of the settings decide what a step's tables hold: other than numbers of groups."""
        raise NotImplementedError

    @staticmethod
    def _number_columns(settings: list[tuple]) -> dict[str, list[float]]:
        """The numbers of all groups, as columns of kernels.step.GROUP."""
        raise NotImplementedError

    def _make_state(self, param: Tensor, state: dict, group: dict) -> list[tuple[str, str]]:
        """Complete a parameter's state; its keys, each with its column of kernels.step.ADDRESSES."""
        raise NotImplementedError

    @staticmethod
    def _make_step(param: Tensor, state: dict) -> None:
        step = state.get("step")
        if step is None:
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        elif step.dtype != torch.float32 or step.device != param.device:
            state["step"] = step.to(param.device, torch.float32)

    @staticmethod
    def _make_moments(param: Tensor, state: dict, keys: Iterable[str]) -> None:
        dtype = stream_dtype(param.dtype)
        for key in keys:
            if state.get(key) is None:
                state[key] = torch.zeros_like(param, dtype=dtype)
            elif state[key].dtype != dtype:
                state[key] = state[key].to(dtype)
            check_shape(param, state, key)

    @staticmethod
    def _make_master(param: Tensor, state: dict, group: dict) -> list[tuple[str, str]]:
        if not group["master_weights"] or param.dtype.itemsize != 2:
            return []
        if "master_param" not in state:
            state["master_param"] = param.detach().to(torch.float32)
        check_shape(param, state, "master_param")
        return [("master", "master_param")]


def check_shape(param: Tensor, state: dict, key: str) -> None:
    if state[key].shape != param.shape:
        raise ValueError(
            f"state: {key} must have the shape of its parameter, {tuple(param.shape)}, got "
            f"{tuple(state[key].shape)}"
        )


def _listed(group: dict) -> dict:
    """A group whose `params`, which may be one tensor or a generator, are a list."""
    members = group["params"]
    return {**group, "params": [members] if isinstance(members, Tensor) else list(members)}


def number(value: float | Tensor) -> float:
    """The value; NaN for what is on a device, where kernels read it themselves."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        raise ValueError(
            "lr and the other numbers of a group must be single ones, got the shape "
            f"{tuple(value.shape)}; vectors of rates go into lr_scale"
        )
    return value.item() if value.device.type == "cpu" else torch.nan


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
