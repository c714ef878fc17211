"""The operators adamw_step_ and sgd_step_: registration and public functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from depthnet.kernels import reference
from depthnet.kernels.checks import check_lists, count_slices, rate_table
from depthnet.kernels.dispatch import register, select
from depthnet.kernels.step import GROUP, StepTables, describe, laid_out_alike


def select_for_step(leading: int, row: dict[str, Tensor | None]):
    """The backend that can run a step of one parameter; `row` has its tensors by StepTables' names."""
    tensors = [tensor for name, tensor in row.items() if name != "step" and tensor is not None]
    param, grad, *states = tensors
    if param.numel() == 0:
        return reference  # which counts the step
    reasons = []
    if not describe([tensor for tensor in row.values() if tensor is not None])[1].all():
        reasons.append("where the memory of a tensor lies is not known")  # fake, or a wrapper
    if grad.is_neg():
        reasons.append("a gradient is a negated view")
    if grad.dtype != param.dtype:
        reasons.append(f"a gradient is {grad.dtype}, its parameter {param.dtype}")
    if any(state.dtype != reference.stream_dtype(param.dtype) for state in states):
        reasons.append("the state is not in the dtype that the parameter is computed in")
    if not laid_out_alike(tensors, leading):
        reasons.append("the tensors of a parameter differ in layout, or have gaps")
    step = row.get("step")
    if step is not None and (step.dtype != torch.float32 or step.device != param.device):
        reasons.append(
            f"a step counter is {step.dtype} on {step.device}, not float32 with its tensor"
        )
    return select("optimizer_step_", *tensors, native_reasons=reasons)


def run_step(backend, tables: StepTables) -> None:
    """One step on a backend that `select_for_step` gave for each of the parameters."""
    backend.optimizer_step_(tables)
    if backend is not reference:  # whose operators count versions themselves
        torch.autograd.graph.increment_version(tables.params)


def _run(
    rule: str, columns: dict[str, list[Tensor | None]], leading: list[int], scales: Tensor, **group
) -> None:
    """One step of parameters that share everything but their scales."""
    count = len(columns["param"])
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    chosen = [select_for_step(dims, row) for dims, row in zip(leading, rows, strict=True)]
    backend = chosen[0] if len(set(chosen)) == 1 else reference
    groups = np.zeros(1, GROUP)
    for name, value in {"lr": 1, "eps": 1, "weight_decay": 1, **group}.items():
        groups[name] = value
    zeros = [0] * count
    run_step(backend, StepTables(rule, columns, leading, scales, zeros, groups, zeros, zeros))


def _adamw_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    max_exp_avg_sqs,
    steps,
    lr,
    eps,
    weight_decay,
    leading,
    beta1,
    beta2,
    decoupled,
    maximize,
):
    columns = {"param": params, "grad": grads, "state0": exp_avgs, "state1": exp_avg_sqs}
    columns["state2"] = max_exp_avg_sqs or [None] * len(params)
    columns |= {"master": [None] * len(params), "step": steps}
    constants = {"beta1": beta1, "beta2": beta2, "decoupled": decoupled, "maximize": maximize}
    _run("adam", columns, leading, torch.stack((lr, eps, weight_decay)), **constants)


def _sgd_step(
    params,
    grads,
    momentum_buffers,
    lr,
    weight_decay,
    leading,
    momentum,
    dampening,
    nesterov,
    decoupled,
    maximize,
):
    none = [None] * len(params)
    columns = {"param": params, "grad": grads, "state0": momentum_buffers or none}
    columns |= dict.fromkeys(("state1", "state2", "master", "step"), none)
    constants = {"beta1": momentum, "beta2": dampening, "nesterov": nesterov}
    constants |= {"decoupled": decoupled, "maximize": maximize}
    _run("sgd", columns, leading, torch.stack((lr, lr, weight_decay)), **constants)


def _no_output(*args):
    return None


register(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, Tensor lr, "
    "Tensor eps, Tensor weight_decay, int[] leading, float beta1, float beta2, bool decoupled, "
    "bool maximize) -> ()",
    _adamw_step,
    _no_output,
)
register(
    "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, "
    "Tensor weight_decay, int[] leading, float momentum, float dampening, bool nesterov, "
    "bool decoupled, bool maximize) -> ()",
    _sgd_step,
    _no_output,
)


@torch.no_grad()
def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    betas: tuple[float, float],
    max_exp_avg_sqs: Sequence[Tensor] = (),
    leading: Sequence[int] | None = None,
    decoupled: bool = True,
    maximize: bool = False,
) -> None:
    """One Adam step for a list of tensors, in place, each slice with rates of its own.

    With t the incremented step and g negated if `maximize`: m <- b1 m + (1 - b1) g,
    v <- b2 v + (1 - b2) g^2 and p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps);
    with `decoupled=False` g <- g + wd p takes the place of the factor (1 - lr wd).  With
    `max_exp_avg_sqs` (amsgrad) the greatest v so far takes the place of v in the last formula.

    Args:
        params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs: tensors of equal shapes, list by list.
            Fast with states in the dtype that a parameter is computed in: float32, or float64.
        steps: 0-dim tensors, the number of steps taken so far; incremented.
        lr, eps, weight_decay: a number, or a 1-dim tensor with one entry for each slice, the slices of
            all tensors one after another.
        leading: for each tensor the number d of leading dimensions whose indices are slices of their
            own: shape[0] * ... * shape[d-1] slices.  None: 0 everywhere, one slice a tensor.

    Raises:
        TypeError, ValueError: the lists or the tables of rates do not fit each other.
    """
    leading, slices = count_slices(params, leading)
    check_lists(params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if max_exp_avg_sqs:
        check_lists(params, max_exp_avg_sqs=max_exp_avg_sqs)
    if len(steps) != len(params) or any(step.numel() != 1 for step in steps):
        raise ValueError(f"steps must be {len(params)} tensors of one element, got {list(steps)}")
    if not params:
        return
    lr = rate_table("lr", lr, slices, params[0])
    eps = rate_table("eps", eps, slices, params[0])
    weight_decay = rate_table("weight_decay", weight_decay, slices, params[0])
    torch.ops.depthnet.adamw_step_(
        *(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(max_exp_avg_sqs)),
        *(list(steps), lr, eps, weight_decay, leading, *betas, decoupled, maximize),
    )


@torch.no_grad()
def sgd_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] = (),
    *,
    lr: float | Tensor,
    weight_decay: float | Tensor = 0.0,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    leading: Sequence[int] | None = None,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """One SGD step for a list of tensors, in place, each slice with rates of its own.

    With g negated if `maximize`: g <- g + wd p (or, `decoupled`, p <- p (1 - lr wd));
    b <- momentum b + (1 - dampening) g; g <- g + momentum b if `nesterov` else b; p <- p - lr g.
    Without momentum buffers the two middle steps are left out.  `lr`, `weight_decay` and `leading` are
    those of `adamw_step_`.

    Raises:
        TypeError, ValueError: the lists or the tables of rates do not fit each other.
    """
    leading, slices = count_slices(params, leading)
    check_lists(params, grads=grads)
    if momentum_buffers:
        check_lists(params, momentum_buffers=momentum_buffers)
    if not params:
        return
    lr = rate_table("lr", lr, slices, params[0])
    weight_decay = rate_table("weight_decay", weight_decay, slices, params[0])
    torch.ops.depthnet.sgd_step_(
        *(list(params), list(grads), list(momentum_buffers), lr, weight_decay, leading),
        *(momentum, dampening, nesterov, decoupled, maximize),
    )
