"""Does each block act as its linearization in its weights' update?  (Claim 7.6 and section 9.)"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from depthnet.diagnostics.stream import find_blocks, residual_stream
from depthnet.kernels import slopes
from depthnet.kernels.reference import row_norm, slope, subtract_mean
from depthnet.nn import ResNet


@dataclass(frozen=True)
class Linearization:
    """What training changed in each block, and how much of it is not linear in the weights' update.

    All are float64, root mean squares over inputs and coordinates, times L: a block may contribute 1/L
    to the stream.  Of a ResNet whose blocks are x + m MS(b(W, x)), with x = x_t^(l-1):

    change: (L, *P), L m MS(b(W_t, x) - b(W_0, x)).
    remainder: (L, *P), its part that is not linear in W_t - W_0.
    linear: (k, L, *P), its part that is linear in the update of a block's j-th layer alone.
    products: (L, *P), its part that is of second or higher order in the updates while every phi' stays
        as it was: products of updates of several layers, 0 in blocks of one layer.  The rest of the
        remainder is due to kinks of phi.

    The last two are None for modules other than a ResNet.
    """

    change: np.ndarray
    remainder: np.ndarray
    linear: np.ndarray | None = None
    products: np.ndarray | None = None

    @property
    def relative(self) -> np.ndarray:
        """(L, *P), remainder / change; NaN where nothing changed."""
        with np.errstate(invalid="ignore"):
            return self.remainder / self.change

    @property
    def network_remainder(self) -> np.ndarray:
        """(*P), the remainder's root mean square over blocks.

        On the line alpha + gamma = 1 it follows L^(1 - alpha - 3/2 gamma) at a kink of phi: it falls
        if alpha is in [1/2, 1), and stays at alpha = 1.
        """
        return _rms(self.remainder)

    @property
    def network_relative(self) -> np.ndarray:
        """(*P), the same, relative to the change's: it follows L^(-gamma / 2)."""
        return _ratio(self.remainder, self.change)

    @property
    def network_products(self) -> np.ndarray | None:
        """(*P), the products' root mean square over blocks, relative to the change's.

        With two layers a block it follows L^-gamma, or falls faster: see docs/theory.md.
        """
        return None if self.products is None else _ratio(self.products, self.change)


def linearization(
    model: nn.Module,
    weights_before: Tensor | dict[str, Tensor],
    inputs: Tensor,
    *,
    blocks: str | Sequence[nn.Module] | None = None,
) -> Linearization:
    """Compare each block of a trained network with its linearization about earlier weights.

    Args:
        model: as it is now.
        weights_before: a copy of what it was: of a ResNet model.blocks.weight, (*P, L k, n, n); of other
            modules model.state_dict(), of which the parameters in blocks are used.
        inputs: what the model is called with.
        blocks: of modules other than a ResNet, their residual blocks or a pattern of their names, see
            `residual_stream`; each must be callable with the stream alone.  They are linearized by
            forward-mode differentiation, and the change of a block is that of its output.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if isinstance(model, ResNet) and blocks is None:
        return _of_resnet(model, weights_before, inputs)
    found = find_blocks(model, blocks)
    names = {id(module): name for name, module in model.named_modules()}
    stream = residual_stream(model, inputs, blocks=found)
    sizes = []
    for block, x in zip(found, stream.x, strict=False):  # the last x leaves the last block
        after = {name: parameter.detach() for name, parameter in block.named_parameters()}
        try:
            before = {name: weights_before[f"{names[id(block)]}.{name}"] for name in after}
        except (KeyError, TypeError):
            raise ValueError(
                "weights_before must be an earlier model.state_dict(), with the parameters of every block"
            ) from None
        sizes.append(_of_block(block, before, after, x))
    change, remainder = (len(found) * np.array(size) for size in zip(*sizes, strict=True))
    return Linearization(change=change, remainder=remainder)


def _of_block(block: nn.Module, before: dict, after: dict, x: Tensor) -> tuple[float, float]:
    """Sizes of a block's change and of what is not linear in that of its parameters."""

    def run(parameters):
        return torch.func.functional_call(block, parameters, (x,))

    update = {name: after[name] - before[name] for name in after}
    start, linear = torch.func.jvp(run, (before,), (update,))
    change = (run(after) - start).detach()
    return tuple(z.double().square().mean().sqrt().item() for z in (change, change - linear))


def _of_resnet(model: ResNet, weights_before: Tensor, inputs: Tensor) -> Linearization:
    blocks = model.blocks
    shape = getattr(weights_before, "shape", None)
    if shape != blocks.weight.shape:
        raise ValueError(
            f"weights_before must be {tuple(blocks.weight.shape)}, as model.blocks.weight is, "
            f"got {shape if shape is None else tuple(shape)}"
        )
    stream = residual_stream(model, inputs)
    p, q = slopes(blocks.activation)

    def gate(h: Tensor) -> Tensor:  # phi(h) = phi'(h) h
        return slope(h >= 0, p, q, h.dtype)

    def by_layer(weight: Tensor) -> Tensor:  # (*P, L k, n, n) -> (k, L, *P, n, n)
        layers = weight.detach().unflatten(-3, (stream.depth, blocks.block_depth))
        return layers.movedim((-3, -4), (0, 1)).mT

    # What a block computes is start + sum(linear) + products + kinks, layer by layer: with the weights
    # and gates of before; linear in one layer's update; the rest, while gates are as before; and what
    # gates change, which is exactly 0 where no sign does.
    start = stream.x[:-1]
    if blocks.norm:
        start = row_norm(start, blocks.norm)[0]
    if blocks.activate == "before":
        start = start * gate(start)
    linear: list[Tensor] = []
    products = kinks = torch.zeros_like(start)
    now = stream.h.unflatten(0, (stream.depth, blocks.block_depth)).unbind(1)
    weights = zip(by_layer(weights_before), by_layer(blocks.weight), strict=True)
    for layer, (before, after) in enumerate(weights):
        update = after - before
        products = products @ after + sum(z @ update for z in linear)
        linear = [*(z @ before for z in linear), start @ update]
        start, kinks = start @ before, kinks @ after
        if blocks.activate == "after" or layer + 1 < blocks.block_depth:
            was, h = gate(start), now[layer]
            start, products, kinks = start * was, products * was, kinks * was + (gate(h) - was) * h
            linear = [z * was for z in linear]

    multiplier = stream.depth * torch.as_tensor(blocks.scale, dtype=torch.float64).abs().cpu()

    def size(z: Tensor) -> np.ndarray:
        z = subtract_mean(z, blocks.mean_subtract).double()
        return (multiplier * z.square().mean((-2, -1)).sqrt().cpu()).numpy()

    return Linearization(
        change=size(sum(linear) + products + kinks),
        remainder=size(products + kinks),
        linear=np.stack([size(z) for z in linear]),
        products=size(products),
    )


def _rms(blocks: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(blocks).mean(0))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return _rms(part) / _rms(whole)
