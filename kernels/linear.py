"""The operators linear and embedding_sum: registration, autograd, public functions.

torch has both, but rounds by a member's place in its population.  On the native CPU kernels a member's
results are the same bits whoever trains beside it; where these do not run, torch's operators do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from depthnet.kernels import reference
from depthnet.kernels.checks import check_float_tensor, check_no_tangent, check_same, shape_text
from depthnet.kernels.dispatch import (
    autocast_enabled,
    call,
    register,
    register_autograd,
    runs_native,
    select,
)


def _linear(x, weight):
    return select("linear", x, weight).linear(x, weight)


def _linear_fake(x, weight):
    return x.new_empty(*x.shape[:2], weight.shape[1])


def _linear_context(ctx, inputs, output):
    x, weight = inputs
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)


def _linear_autograd(ctx, grad):
    x, weight = ctx.saved_tensors
    grad_x = None if weight is None else call("linear", grad, weight.mT)
    grad_weight = None if x is None else call("linear", grad.mT, x.mT)
    return grad_x, grad_weight


def _embedding_sum(index, weight):
    return select("embedding_sum", weight).embedding_sum(index, weight)


def _embedding_sum_fake(index, weight):
    return weight.new_empty(*index.shape[:2], weight.shape[2])


def _embedding_sum_backward(grad, index, features):
    return select("embedding_sum_backward", grad).embedding_sum_backward(grad, index, features)


def _embedding_sum_backward_fake(grad, index, features):
    return grad.new_empty(grad.shape[0], features, grad.shape[2])


def _embedding_sum_context(ctx, inputs, output):
    index, weight = inputs
    ctx.save_for_backward(index)
    ctx.features = weight.shape[1]


def _embedding_sum_autograd(ctx, grad):
    (index,) = ctx.saved_tensors
    return None, call("embedding_sum_backward", grad, index, ctx.features)


register("linear(Tensor x, Tensor weight) -> Tensor", _linear, _linear_fake)
register_autograd("linear", _linear_autograd, _linear_context)
register(
    "embedding_sum(Tensor index, Tensor weight) -> Tensor", _embedding_sum, _embedding_sum_fake
)
register(
    "embedding_sum_backward(Tensor grad, Tensor index, SymInt features) -> Tensor",
    _embedding_sum_backward,
    _embedding_sum_backward_fake,
)
register_autograd("embedding_sum", _embedding_sum_autograd, _embedding_sum_context)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T, one W for each network of a population.  Backward: dx = dy W, dW = dy^T x.

    On the CPU float32 and float64 are computed by native kernels: each sum runs in one order, so that a
    member's results are the same bits alone, in any population and on any number of threads.
    Everywhere else, and under autocast, this is torch's x @ weight.mT.

    Args:
        x: (*P, B, in), or (B, in) for all members alike; float32, float64, bfloat16 or float16.
        weight: (*P, out, in), of the dtype of x unless under autocast; P is at most one dimension.

    Returns:
        (*P, B, out), of the dtype of x; under autocast of autocast's.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
    """
    check_float_tensor("x", x)
    check_float_tensor("weight", weight)
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must have the shape (*P, out, in), got {shape_text(weight)}")
    lead, features = weight.shape[:-2], weight.shape[-1]
    _check_rows("x", x, lead, features, weight)
    autocast = autocast_enabled(x)
    check_same("weight", weight, "x", x, dtype=not autocast)
    if autocast or not runs_native("linear", x, weight):
        return reference.linear(x, weight)
    check_no_tangent("x", x)
    check_no_tangent("weight", weight)
    y = call("linear", _members(x, lead), weight if lead else weight[None])
    return y if lead else y[0]


def embedding_sum(index: Tensor, weight: Tensor) -> Tensor:
    """`linear` of inputs of zeros and a few ones, given by the indices of the ones.

    What `linear` says of backends holds here too; bfloat16 and float16 are torch's embedding_bag.

    Args:
        index: int64 or int32 (*P, B, active), or (B, active) for all members alike; each from 0 to
            features - 1.
        weight: (*P, features, n), a row for each feature; float32, float64, bfloat16 or float16.

    Returns:
        (*P, B, n), of the dtype of weight: the sums of the rows that are named, added in their order.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, device or shape.
        IndexError, RuntimeError: an index names no feature; on a GPU this shows later.
    """
    check_float_tensor("weight", weight)
    if not isinstance(index, Tensor) or index.dtype not in (torch.int64, torch.int32):
        got = index.dtype if isinstance(index, Tensor) else type(index).__name__
        raise TypeError(f"index must be a tensor of int64 or int32, got {got}")
    if weight.ndim not in (2, 3):
        raise ValueError(f"weight must have the shape (*P, features, n), got {shape_text(weight)}")
    lead = weight.shape[:-2]
    _check_rows("index", index, lead, None, weight)
    if index.shape[-1] == 0:
        raise ValueError(f"index must name at least one row, got the shape {shape_text(index)}")
    check_same("weight", weight, "index", index, dtype=False)
    index, table = _members(index.to(torch.int64), lead), weight if lead else weight[None]
    if runs_native("embedding_sum", weight):
        check_no_tangent("weight", weight)
        y = call("embedding_sum", index, table)
    else:
        y = reference.embedding_sum(index, table)
    return y if lead else y[0]


def _check_rows(name, tensor, lead, size, weight):
    """That a tensor is (*lead, B, size), or (B, size), beside its weight; any size where that is None."""
    fits = tensor.shape[:-2] in (lead, ()) and tensor.ndim >= 2
    if not fits or size not in (None, tensor.shape[-1]):
        last = "active" if size is None else size
        alike = f"(B, {last})"
        own = f" or ({', '.join([*map(str, lead), 'B', str(last)])})" if lead else ""
        raise ValueError(
            f"{name} must have the shape {alike}{own} beside a weight of shape {shape_text(weight)}, "
            f"got {shape_text(tensor)}"
        )


def _members(tensor, lead):
    """(P, B, size) of a tensor that may be all members' own or shared."""
    return tensor if tensor.ndim == 3 else tensor.expand(*(lead or (1,)), *tensor.shape)
