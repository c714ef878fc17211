"""The residual stream of a network, layer by layer: what the other diagnostics look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from depthnet.kernels import scaled_residual, slopes
from depthnet.kernels.reference import row_norm, slope
from depthnet.nn import ResNet


@dataclass(frozen=True)
class Stream:
    """What passes through L residual blocks of width n, for a batch of B inputs.

    x: (L + 1, *P, B, n), the stream; x[0] enters the first block, x[l] leaves block l.
    h: (L k, *P, B, n), what the weights' products are, k for each block; None for modules other than a
        ResNet.  In blocks of one layer they are the pre-activations W_l x[l-1].
    outputs: what the model returns.
    dx, dh: the loss's gradients with respect to x and h; None without a loss.

    P is the population, absent for a single network; blocks of other modules may have any shape in
    place of (B, n).  All tensors are detached.
    """

    x: Tensor
    h: Tensor | None
    outputs: Tensor
    dx: Tensor | None = None
    dh: Tensor | None = None

    @property
    def depth(self) -> int:
        return len(self.x) - 1


def residual_stream(
    model: nn.Module,
    inputs: Tensor,
    loss: Callable[[Tensor], Tensor] | None = None,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
) -> Stream:
    """Run a model once and keep its residual stream, which is memory O(L).

    Args:
        model: a depthnet.ResNet, or any module whose residual blocks run one after another.
        inputs: what the model is called with.
        loss: a scalar function of the outputs, for gradients; of a population, the sum over members.
        blocks: for modules other than a ResNet, their residual blocks in order, or a pattern of their
            names such as "layers.*" (`*` within one part of a name).  The stream is each block's first
            argument, and the last one's result (of a tuple, the first).

    Raises:
        ValueError: no block is found, or they do not all run once, or change the stream's shape.
        TypeError: `blocks` is missing.
    """
    with torch.set_grad_enabled(loss is not None):
        if isinstance(model, ResNet) and blocks is None:
            xs, hs, outputs = _of_resnet(model, inputs)
        else:
            (xs, outputs), hs = _by_hooks(model, inputs, find_blocks(model, blocks)), []
    gradients: Sequence[Tensor] = ()
    if loss is not None:
        gradients = torch.autograd.grad(loss(outputs), [*xs, *hs])
    return Stream(
        x=torch.stack(xs).detach(),
        h=torch.stack(hs).detach() if hs else None,
        outputs=outputs.detach(),
        dx=torch.stack(gradients[: len(xs)]) if gradients else None,
        dh=torch.stack(gradients[len(xs) :]) if gradients and hs else None,
    )


def _of_resnet(model: ResNet, inputs: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    blocks = model.blocks
    xs, hs = [_differentiable(model.input(inputs))], []
    p, q = slopes(blocks.activation)
    for number, weight in enumerate(blocks.weight.unbind(-3)):
        if number % blocks.block_depth == 0:
            z = row_norm(xs[-1], blocks.norm)[0] if blocks.norm else xs[-1]
        elif blocks.activate == "after":
            z = z * slope(z >= 0, p, q, z.dtype)
        if blocks.activate == "before":
            z = z * slope(z >= 0, p, q, z.dtype)
        z = z @ weight.mT
        hs.append(z)
        if (number + 1) % blocks.block_depth == 0:
            last = blocks.activation if blocks.activate == "after" else "identity"
            step = scaled_residual(
                xs[-1], z, blocks.scale, activation=last, mean_subtract=blocks.mean_subtract
            )
            xs.append(step)
    return xs, hs, model.output(xs[-1])


def find_blocks(model: nn.Module, blocks: str | Sequence[nn.Module] | None) -> Sequence[nn.Module]:
    if blocks is None:
        raise TypeError(
            f"blocks must name the residual blocks of a {type(model).__name__}: a pattern such as "
            "'layers.*', or the modules themselves"
        )
    if not isinstance(blocks, str):
        found = list(blocks)
    else:
        dots = blocks.count(".")
        found = [
            module
            for name, module in model.named_modules()
            if name.count(".") == dots and fnmatchcase(name, blocks)
        ]
    if not found:
        raise ValueError(f"blocks={blocks!r} finds no module in the {type(model).__name__}")
    return found


def _by_hooks(model, inputs, blocks) -> tuple[list[Tensor], Tensor]:
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []

    def enter(module, arguments):
        if not arguments or not isinstance(arguments[0], Tensor):
            raise ValueError(
                f"blocks must take the stream as their first positional argument; the "
                f"{type(module).__name__} was called with {arguments!r}"
            )
        return (_differentiable(arguments[0]), *arguments[1:])

    def keep(module, arguments, result):
        first = result[0] if isinstance(result, tuple) else result
        seen.append((module, arguments[0], first))

    handles = [blocks[0].register_forward_pre_hook(enter)]
    handles += [block.register_forward_hook(keep) for block in blocks]
    try:
        outputs = model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if [id(module) for module, _, _ in seen] != [id(block) for block in blocks]:
        raise ValueError(
            f"blocks must run once each, in the order given: {len(blocks)} were given, {len(seen)} ran"
        )
    xs = [x for _, x, _ in seen] + [seen[-1][2]]
    shapes = {tuple(x.shape) for x in xs}
    if len(shapes) > 1:
        raise ValueError(f"blocks must keep the shape of the stream, got {sorted(shapes)}")
    return xs, outputs


def _differentiable(x: Tensor) -> Tensor:
    """The stream as it enters the blocks, which has no gradient if the layers before are frozen."""
    return x.detach().requires_grad_() if torch.is_grad_enabled() and not x.requires_grad else x
