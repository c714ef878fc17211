"""From an optimizer's groups, gradients and state to the tables that kernels run over.

Nearly always nothing has changed since the step before but where the gradients are and what a scheduler
has set.  Then a step costs a few list comprehensions and comparisons: the tables stay, and get new
addresses and numbers.
"""

from __future__ import annotations

import operator
import sys

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from depthnet.kernels import reference
from depthnet.kernels.dispatch import choice
from depthnet.kernels.optimizer import run_step, select_for_step
from depthnet.kernels.reference import gradient_factor
from depthnet.kernels.step import (
    ADDRESSES,
    GROUP,
    StepTables,
    describe,
    describe_step,
    tensors_of_step,
)
from depthnet.scaling.groups import SCALES


class Plan:
    """The tables of one optimizer's steps.

    Raises:
        RuntimeError, TypeError, ValueError: a gradient or a parameter cannot be stepped; nothing has
            been written then.
    """

    def __init__(self, optimizer):
        groups = optimizer.param_groups
        self.backend = choice()
        self.params = [param for group in groups for param in group["params"]]
        group_of = [index for index, group in enumerate(groups) for _ in group["params"]]
        active = [i for i, param in enumerate(self.params) if param.grad is not None]
        for i in active:
            check_gradient(optimizer, self.params[i], groups[group_of[i]])
        # States are the optimizer's once a step has written them: not if it is refused or skipped.
        self.pending: list[tuple[Tensor, dict]] = []
        # All tensors of a step in one list: parameters, gradients, and from here on states, each an entry
        # of the dictionary that the optimizer keeps for a parameter.
        self.sources: list[tuple[dict, str]] = []
        places, fresh = [], []
        for i in active:
            place = dict.fromkeys(ADDRESSES, -1) | {"param": i, "grad": len(self.params) + i}
            old = optimizer.state.get(self.params[i], {})
            state = dict(old)
            columns = optimizer._make_state(self.params[i], state, groups[group_of[i]])
            if identical(list(state.values()), list(old.values())):
                state = old
            else:
                self.pending.append((self.params[i], state))
            fresh.append(optimizer.kernel == "sgd" and old.get("momentum_buffer") is None)
            for column, key in columns:
                place[column] = 2 * len(self.params) + len(self.sources)
                self.sources.append((state, key))
            places.append(list(place.values()))

        self.state, self.entries = optimizer.state, list(optimizer.state.values())
        scales = [group[key] for group in groups for key in SCALES]
        self.vectors = [scale for scale in scales if isinstance(scale, Tensor)]
        self.versions = [vector._version for vector in self.vectors]
        tensors = tensors_of_step(self.params, self.sources)
        self.sharded = [i for i, tensor in enumerate(tensors) if local(tensor) is not tensor]
        self.placements = placements(tensors, self.sharded)
        tensors = self._local(tensors)
        self.forms = describe(tensors)[1].tobytes()
        self.groups = np.zeros(len(groups), GROUP)
        self._set(optimizer, list(map(optimizer._settings, groups)))

        batches = {}
        for i, place, new in zip(active, places, fresh, strict=True):
            leading = leading_dimensions(groups[group_of[i]])
            row = {name: tensors[at] for name, at in zip(ADDRESSES, place, strict=True) if at >= 0}
            batch = row["param"].device, select_for_step(leading, row)
            batches.setdefault(batch, []).append((i, leading, place, new))
        self.batches = [
            Batch(
                *(optimizer.kernel, groups, self.groups, backend, device, tensors, group_of),
                *zip(*rows, strict=True),
            )
            for (device, backend), rows in batches.items()
        ]

    def _local(self, tensors: list[Tensor | None]) -> list[Tensor | None]:
        for i in self.sharded:
            tensors[i] = local(tensors[i])
        return tensors

    def _set(self, optimizer, settings: list[tuple]) -> None:
        """Write the numbers of all groups into their table."""
        norms = list(dict.fromkeys(group["max_grad_norm"] for group in optimizer.param_groups))
        if len(norms) > 1:
            raise ValueError(
                f"max_grad_norm is of all groups together and must be the same in each, got {norms}"
            )
        for name, column in optimizer._number_columns(settings).items():
            self.groups[name] = column
        self.max_grad_norm, self.settings = norms[0], settings
        self.lrs = tensor_lrs(optimizer)
        self._read_lrs()

    def _read_lrs(self) -> None:
        """Tensors may have changed in place: those on the CPU are read, kernels read the others."""
        for i, lr in self.lrs.items():
            if lr.device.type == "cpu":
                self.groups["lr"][i] = lr.item()
            else:
                self.groups["lr_address"][i] = lr.data_ptr()

    def _reset(self, optimizer, settings: list[tuple]) -> bool:
        """Follow settings that have changed; False if other tables are needed."""
        structures = (list(map(optimizer._structure, each)) for each in (settings, self.settings))
        if not equal(*structures) or on_devices(self.lrs) or on_devices(tensor_lrs(optimizer)):
            return False  # with what is checked of an lr on a device
        self._set(optimizer, settings)
        return True

    def refresh(self, optimizer) -> bool:
        """Bring the tables up to date; False if others are needed."""
        settings = list(map(optimizer._settings, optimizer.param_groups))
        unchanged = (
            self.backend == choice()
            and self.state is optimizer.state
            and identical(list(optimizer.state.values()), self.entries)
            and (equal(settings, self.settings) or self._reset(optimizer, settings))
            and identical([param for params, *_ in settings for param in params], self.params)
            and [vector._version for vector in self.vectors] == self.versions
        )
        if not unchanged:
            return False
        self._read_lrs()
        tensors = None
        if self.sharded or any(batch.backend is reference for batch in self.batches):
            tensors = tensors_of_step(self.params, self.sources)
            if tensors is None or placements(tensors, self.sharded) != self.placements:
                return False
            described = describe(self._local(tensors))
        else:
            described = describe_step(self.params, self.sources)
        if described is None or described[1].tobytes() != self.forms:
            return False
        for batch in self.batches:
            batch.refresh(tensors, described[0])
        return True

    def run(self, optimizer) -> None:
        # GradScaler sets these for the time of a step.
        grad_scale = getattr(optimizer, "grad_scale", None)
        found_inf = getattr(optimizer, "found_inf", None)
        max_norm = self.max_grad_norm
        if max_norm is not None and len(self.batches) > 1:  # the norm is of all of them
            grads = [local(param.grad) for param in self.params if param.grad is not None]
            grad_scale = 1 / gradient_factor(grads, grad_scale, max_norm, grads[0].device)
            max_norm = None
        for batch in self.batches:
            batch.run(grad_scale, found_inf, max_norm, self.lrs)
        if self.pending and not (found_inf is not None and found_inf.item()):
            optimizer.state.update(self.pending)
            self.entries, self.pending = list(optimizer.state.values()), []
            for batch in self.batches:
                batch.set_written()


class Batch:
    """The tables of the parameters on one device that one backend steps."""

    def __init__(self, rule, groups, numbers, backend, device, tensors, group_of, *rows):
        indices, leading, places, fresh = rows
        self.backend, self.places = backend, np.array(places)
        self.present = np.nonzero(self.places >= 0)
        self.sources = self.places[self.present]
        params = [tensors[i] for i in indices]
        own = [groups[group_of[i]] for i in indices]
        self.tables = StepTables(
            rule=rule,
            columns=self._columns(tensors),
            leading=leading,
            scales=torch.from_numpy(scale_table(params, own, leading)).to(device),
            group=[group_of[i] for i in indices],
            groups=numbers,
            fresh=fresh,
            rounding=[
                i + 1 if group["stochastic_rounding"] and not group["master_weights"] else 0
                for i, group in zip(indices, own, strict=True)
            ],
        )
        if backend is not reference:
            self.tables.tensors  # noqa: B018  computed once, from the columns
            # Without gradients and states, whose memory is then free when their owners let it go.
            self.tables.columns = {"param": params}

    def _columns(self, tensors: list[Tensor | None]) -> dict[str, list[Tensor | None]]:
        pairs = zip(ADDRESSES, self.places.T.tolist(), strict=True)
        return {name: [tensors[at] if at >= 0 else None for at in column] for name, column in pairs}

    def refresh(self, tensors: list[Tensor | None] | None, addresses: np.ndarray) -> None:
        """New addresses; `tensors` are needed where the reference runs."""
        if self.backend is reference:
            self.tables.columns = self._columns(tensors)
            return
        self.tables.words[self.present] = addresses[self.sources]

    def run(
        self,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        max_norm: float | None,
        lrs: dict[int, Tensor],
    ) -> None:
        tables = self.tables
        device = tables.scales.device
        tables.lrs = {i: lr for i, lr in lrs.items() if lr.device == device}
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        tables.grad_scale = None if grad_scale is None else grad_scale.to(device, dtype)
        tables.found_inf = None if found_inf is None else found_inf.to(device, dtype)
        tables.max_grad_norm = max_norm
        run_step(self.backend, tables)
        if self.backend is reference:
            tables.columns = {"param": tables.params}

    def set_written(self) -> None:
        self.tables.fresh = [False] * len(self.tables.fresh)
        if self.backend is not reference:
            self.tables.tensors["fresh"] = 0


def identical(left: list, right: list) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(operator.is_, left, right))


def leading_dimensions(group: dict) -> int:
    """How many leading dimensions of the group's parameters have rates of their own."""
    return max(getattr(group[key], "ndim", 0) for key in SCALES)


def tensor_lrs(optimizer) -> dict[int, Tensor]:
    """The lrs that are tensors, by their groups."""
    lrs = ((index, group["lr"]) for index, group in enumerate(optimizer.param_groups))
    return {index: lr for index, lr in lrs if isinstance(lr, Tensor)}


def on_devices(lrs: dict[int, Tensor]) -> bool:
    return any(lr.device.type != "cpu" for lr in lrs.values())


def equal(left: list, right: list) -> bool:
    try:
        return left == right
    except RuntimeError:  # of a vector's truth; `number` refuses it
        return False


def check_gradient(optimizer, param: Tensor, group: dict) -> None:
    """Raise unless the memory of a parameter and its gradient is known and belongs together."""
    name, grad = type(optimizer).__name__, param.grad
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name} does not take sparse gradients, got {grad.layout}")
    for tensor in (param, grad):
        if is_traceable_wrapper_subclass(tensor) and not is_distributed(tensor):
            raise TypeError(
                f"{name} takes plain tensors and DTensors, got a {type(tensor).__name__} of shape "
                f"{tuple(tensor.shape)}"
            )
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.device != param.device:
        raise ValueError(
            f"lr must be on the CPU or with its parameter, {param.device}, got {lr.device}"
        )
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and lr.dtype != torch.float32:
        raise TypeError(f"lr on {lr.device} must be float32, got {lr.dtype}")
    if not is_distributed(param):
        return
    placements = param.placements
    if not is_distributed(grad) or grad.placements != placements:
        raise ValueError(
            f"{name}: the gradient of a DTensor placed {placements} must be placed alike, got "
            f"{getattr(grad, 'placements', 'a plain tensor')}; redistribute it first"
        )
    leading = leading_dimensions(group)
    sharded = [place.dim for place in placements if hasattr(place, "dim")]
    if any(dim < leading for dim in sharded):
        raise ValueError(
            f"{name}: rates over the {leading} leading dimensions need these whole on every rank, got "
            f"a DTensor placed {placements}"
        )
    if group["max_grad_norm"] is not None and not all(p.is_replicate() for p in placements):
        raise ValueError(
            f"max_grad_norm: the norm of sharded gradients (here placed {placements}) needs all ranks; "
            "use torch.nn.utils.clip_grad_norm_"
        )


def is_distributed(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there are none
    return module is not None and isinstance(tensor, module.DTensor)


def placements(tensors: list[Tensor | None], sharded: list[int]) -> list:
    return [getattr(tensors[i], "placements", None) for i in sharded]


def local(tensor: Tensor | None) -> Tensor | None:
    """A DTensor's shard on this rank; any other tensor itself."""
    if type(tensor) in (Tensor, torch.nn.Parameter) or not is_distributed(tensor):
        return tensor
    shard = tensor.to_local()
    return shard.wait() if hasattr(shard, "wait") else shard  # what a collective still brings


def scale_table(params: list[Tensor], groups: list[dict], leading: list[int]) -> np.ndarray:
    """float64 (3, slices): the scales of lr, eps and weight decay of all parameters' slices."""
    columns = []
    for key in SCALES:
        entries = []
        for param, group, dims in zip(params, groups, leading, strict=True):
            scale, lead = group[key], param.shape[:dims]
            if isinstance(scale, Tensor):
                scale = scale.reshape((*scale.shape, *[1] * (dims - scale.ndim))).expand(lead)
                entries += scale.flatten().tolist()
            else:
                entries += [scale] * lead.numel()
        columns.append(entries)
    return np.array(columns, np.float64).reshape(3, -1)
