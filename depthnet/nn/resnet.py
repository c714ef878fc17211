"""Residual networks scaled so that they train at any width and depth."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from depthnet._checks import integer
from depthnet.kernels import residual_stack, slopes
from depthnet.kernels.dispatch import autocast_enabled
from depthnet.kernels.stack import check_block
from depthnet.nn.layers import EmbeddingSum, Generators, Linear, normal_
from depthnet.scaling import Parametrization
from depthnet.scaling.groups import group, track


class ResidualStack(nn.Module):
    """L blocks x <- x + scale * (phi(W_l x) - mean(phi(W_l x))), computed by one operator.

    Deeper blocks, with a norm or with the activation before each product, are those of
    `depthnet.kernels.residual_stack`.

    Args:
        width: n. depth: L, 0 or more.
        scale: the branch multiplier, a finite number; None means depth^-1/2.
        activation: `identity`, `relu`, `abs`, `leaky_relu`, or slopes (p, q).
        mean_subtract: whether the mean over the width is subtracted.
        checkpoint_every: None, or keep every c-th x_l only and recompute the rest backward: memory
            O(L/c + c) instead of O(L).
        block_depth: k, the number of layers of a block.
        norm: None, or `layer` or `rms`: what a block begins with.
        activate: `after` or `before` the products; `before` only without a norm.
        population: None, or the number P of independent networks.
        generator: for the initial weights: a torch.Generator, one for each member, or None.

    Input and output (*P, B, n); `weight` is one parameter of shape (*P, L k, n, n), drawn from N(0, 1/n).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        scale: float | None = None,
        *,
        activation: str | tuple[float, float] = "abs",
        mean_subtract: bool = True,
        checkpoint_every: int | None = None,
        block_depth: int = 1,
        norm: str | None = None,
        activate: str = "after",
        population: int | None = None,
        generator: Generators = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.width, self.depth = integer("width", width, 1), integer("depth", depth, 0)
        self.scale = max(depth, 1) ** -0.5 if scale is None else scale
        slopes(activation)
        self.activation, self.mean_subtract = activation, mean_subtract
        self.checkpoint_every = checkpoint_every
        if checkpoint_every is not None:
            integer("checkpoint_every", checkpoint_every, 1)
        self.block_depth = integer("block_depth", block_depth, 1)
        check_block(norm, activate)
        self.norm, self.activate = norm, activate
        self.population = check_population(population, generator)
        lead = () if population is None else (population,)
        shape = *lead, depth * block_depth, width, width
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generators = None) -> None:
        normal_(self.weight, self.width**-0.5, self.population, generator)

    def forward(self, x: Tensor) -> Tensor:
        return residual_stack(
            x,
            self.weight,
            self.scale,
            activation=self.activation,
            mean_subtract=self.mean_subtract,
            checkpoint_every=self.checkpoint_every,
            block_depth=self.block_depth,
            norm=self.norm,
            activate=self.activate,
        )

    def extra_repr(self) -> str:
        return (
            f"weight={tuple(self.weight.shape)}, scale={self.scale:.4g}, "
            f"activation={self.activation!r}, mean_subtract={self.mean_subtract}, "
            f"block_depth={self.block_depth}, norm={self.norm!r}, activate={self.activate!r}"
        )


class ResNet(nn.Module):
    """Input layer, L residual blocks, output layer: f = V (blocks(U x)), no biases.

    The parametrization sets the branch multiplier, the initial weights and, through `param_groups`,
    each layer's learning rate, eps and weight decay, so that hyperparameters tuned at the base width
    and depth hold at every other; optimizers of `depthnet.optim` take the model itself:
    `depthnet.optim.AdamW(model, lr=2**-8)`.

    Args:
        in_features, out_features: sizes of input and output.
        width: n. depth: the number L of blocks, 0 or more.
        activation: `identity`, `relu`, `abs`, `leaky_relu`, or slopes (p, q).
        parametrization: a preset's name, exponents (alpha, gamma), or a scaling.Parametrization.
        block_multiplier: the branch multiplier at the base depth; None means base_depth^-1/2, so that
            Depth-muP's multiplier is exactly depth^-1/2.
        mean_subtract: whether each block subtracts the mean over the width.
        active_features: None for dense inputs.  A number k for inputs of zeros and k ones: x then
            holds the k indices of the ones, as int64 (*P, B, k), and the input layer is a sum of k
            embeddings.
        output_std: standard deviation of output weights at the base width; 0 starts from f = 0.
        base_width, base_depth: the shape at which hyperparameters are (or were) tuned.
        checkpoint_every: None, or keep every c-th activation only and recompute the rest backward.
        block_depth, norm, activate: of the blocks, see `ResidualStack`.  With two or more layers a block
            every parametrization loses something; see scaling.classify.
        population: None, or the number P of independent networks with one leading dimension P in
            every weight and output.
        generator: for the initial weights: a torch.Generator, one for each member, or None.

    Input (*P, B, in_features), or (B, in_features) for all members alike; output (*P, B, out_features).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int,
        *,
        activation: str | tuple[float, float] = "abs",
        parametrization: str | tuple[float, float] | Parametrization = "depth_mup",
        block_multiplier: float | None = None,
        mean_subtract: bool = True,
        active_features: int | None = None,
        output_std: float = 0.0,
        base_width: int = 128,
        base_depth: int = 8,
        checkpoint_every: int | None = None,
        block_depth: int = 1,
        norm: str | None = None,
        activate: str = "after",
        population: int | None = None,
        generator: Generators = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        integer("in_features", in_features, 1)
        integer("out_features", out_features, 1)
        if (
            active_features is not None
            and integer("active_features", active_features, 1) > in_features
        ):
            raise ValueError(
                f"active_features must be at most in_features, {in_features}, got {active_features}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.active_features = active_features
        self.parametrization = Parametrization.of(parametrization)
        self.population = check_population(population, generator)
        fan_in = {"input": active_features or in_features, "hidden": width, "output": width}
        self.rules = {
            role: self.parametrization.rule(
                role,
                fan_in=fan_in[role],
                width=width,
                depth=depth,
                base_width=base_width,
                base_depth=base_depth,
                block_multiplier=block_multiplier,
                output_std=output_std,
            )
            for role in ("input", "hidden", "output")
        }
        shared = {
            "population": population,
            "generator": generator,
            "device": device,
            "dtype": dtype,
        }
        input_layer = Linear if active_features is None else EmbeddingSum
        self.input = input_layer(in_features, width, self.rules["input"].init_std, **shared)
        self.blocks = ResidualStack(
            width,
            depth,
            self.rules["hidden"].multiplier,
            activation=activation,
            mean_subtract=mean_subtract,
            checkpoint_every=checkpoint_every,
            block_depth=block_depth,
            norm=norm,
            activate=activate,
            **shared,
        )
        self.output = Linear(width, out_features, self.rules["output"].init_std, **shared)
        track(self)

    def __setstate__(self, state):  # of copies and unpickled models
        super().__setstate__(state)
        track(self)

    def reset_parameters(self, generator: Generators = None) -> None:
        """Draw new initial weights."""
        check_population(self.population, generator)
        for layer in (self.input, self.blocks, self.output):
            layer.reset_parameters(generator)

    def keep(self, members: Tensor) -> None:
        """Go on with some members of the population only, in place; they keep their parameters.

        Args:
            members: int64 (fewer,), their places, on the device of the weights; at least one.

        Raises:
            ValueError: the network is no population.
        """
        if self.population is None:
            raise ValueError("keep: a single network has no members")
        self.population = len(members)
        for layer in (self.input, self.blocks, self.output):
            layer.population = len(members)
            layer.weight.grad = None
            layer.weight.data = layer.weight.data[members]
        if isinstance(self.blocks.scale, Tensor):
            self.blocks.scale = self.blocks.scale[members]

    def forward(self, x: Tensor) -> Tensor:
        self._check_input(x)
        x = self.input(x)
        return self.output(self.blocks(x))

    def param_groups(self, optimizer: str) -> list[dict]:
        """The groups `input`, `hidden` and `output` with their lr_scale, eps_scale, weight_decay_scale,
        the rule that these follow, and the size of the population (None: a single network).

        Args:
            optimizer: `adamw` (decoupled weight decay), `adam` (coupled) or `sgd`.
        """
        layers = {"input": self.input, "hidden": self.blocks, "output": self.output}
        return [
            {
                **group(role, [layer.weight], self.rules[role], optimizer),
                "population": self.population,
            }
            for role, layer in layers.items()
        ]

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        lead = () if self.population is None else (self.population,)
        features = self.active_features or self.in_features
        shapes = {(*lead, "B", features), ("B", features)}
        fits = any(
            x.ndim == len(shape)
            and all(want in ("B", size) for want, size in zip(shape, x.shape, strict=True))
            for shape in shapes
        )
        if not fits:
            wanted = " or ".join(
                f"({', '.join(map(str, shape))})" for shape in sorted(shapes, key=len)
            )
            raise ValueError(f"x must have the shape {wanted}, got {tuple(x.shape)}")
        if self.active_features is not None and x.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"x must hold the int64 indices of the active features, got {x.dtype}")
        own = self.input.weight.dtype
        if self.active_features is None and x.dtype != own and not autocast_enabled(x):
            raise TypeError(f"x must have the dtype of the model, {own}, got {x.dtype}")

    def extra_repr(self) -> str:
        return f"parametrization={self.parametrization}"


def check_population(population: int | None, generator: Generators) -> int | None:
    if population is not None:
        integer("population", population, 1)
    if isinstance(generator, Sequence) and len(generator) != population:
        raise ValueError(
            f"generator must be one torch.Generator or one for each of the {population} members "
            f"of the population, got {len(generator)}"
        )
    return population
