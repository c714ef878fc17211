"""The operators adamw_step_ and sgd_step_: registration and public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from depthnet.kernels.checks import check_lists, count_slices, rate_table
from depthnet.kernels.dispatch import register, select


def _adamw_step(params, grads, exp_avgs, exp_avg_sqs, *args):
    backend = select("adamw_step_", *params, *grads, *exp_avgs, *exp_avg_sqs)
    backend.adamw_step_(params, grads, exp_avgs, exp_avg_sqs, *args)


def _sgd_step(params, grads, momentum_buffers, *args):
    backend = select("sgd_step_", *params, *grads, *momentum_buffers)
    backend.sgd_step_(params, grads, momentum_buffers, *args)


def _no_output(*args):
    return None


register(
    "adamw_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor lr, Tensor eps, Tensor weight_decay, "
    "int[] leading, float beta1, float beta2, bool decoupled) -> ()",
    _adamw_step,
    _no_output,
)
register(
    "sgd_step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, "
    "Tensor weight_decay, int[] leading, float momentum, float dampening, bool nesterov, "
    "bool decoupled) -> ()",
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
    leading: Sequence[int] | None = None,
    decoupled: bool = True,
) -> None:
    """One Adam step for a list of tensors, in place, each slice with rates of its own.

    With t the incremented step: m <- b1 m + (1 - b1) g, v <- b2 v + (1 - b2) g^2 and
    p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps); with `decoupled=False`
    g <- g + wd p takes the place of the factor (1 - lr wd).

    Args:
        params, grads, exp_avgs, exp_avg_sqs: tensors of equal shapes, list by list.
        steps: 0-dim tensors, the number of steps taken so far; incremented.
        lr, eps, weight_decay: a number, or a 1-dim tensor with one entry for each slice, the slices of
            all tensors one after another.
        leading: for each tensor the number d of leading dimensions whose indices are slices of their
            own: shape[0] * ... * shape[d-1] slices.  None: 0 everywhere, one slice a tensor.

    Raises:
        ValueError: the lists or the tables of rates do not fit each other.
    """
    leading, slices = count_slices(params, leading)
    check_lists(params, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if len(steps) != len(params) or any(step.numel() != 1 for step in steps):
        raise ValueError(f"steps must be {len(params)} tensors of one element, got {list(steps)}")
    if not params:
        return
    lr = rate_table("lr", lr, slices, params[0])
    eps = rate_table("eps", eps, slices, params[0])
    weight_decay = rate_table("weight_decay", weight_decay, slices, params[0])
    torch.ops.depthnet.adamw_step_(
        *(list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), list(steps)),
        *(lr, eps, weight_decay, leading, *betas, decoupled),
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
) -> None:
    """One SGD step for a list of tensors, in place, each slice with rates of its own.

    g <- g + wd p (or, `decoupled`, p <- p (1 - lr wd)); b <- momentum b + (1 - dampening) g;
    g <- g + momentum b if `nesterov` else b; p <- p - lr g.  Without momentum buffers the two middle
    steps are left out.  `lr`, `weight_decay` and `leading` are those of `adamw_step_`.

    Raises:
        ValueError: the lists or the tables of rates do not fit each other.
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
        *(momentum, dampening, nesterov, decoupled),
    )
