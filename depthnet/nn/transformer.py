"""A decoder-only transformer, scaled so that it trains at any width and depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthnet._checks import integer, number, one_of
from depthnet.kernels import mlp_activation, residual_norm, rotary
from depthnet.kernels.checks import NORMS
from depthnet.kernels.mlp_activation import MLPS
from depthnet.kernels.reference import stream_dtype
from depthnet.nn.generation import Cache, sample
from depthnet.nn.layers import normal_
from depthnet.scaling import Parametrization, Rule
from depthnet.scaling.groups import group, track

POSITIONS = ("rotary", "learned")

EPS = 1e-5  # of the norms

# Of rotary positions: the slowest pair of coordinates turns by 1 / ROTARY_BASE a token.
ROTARY_BASE = 10000.0


class Weight(nn.Module):
    """A weight drawn from N(0, std^2), and a bias of zeros or none."""

    def __init__(self, rows: int, columns: int, std: float, *, bias: bool = False, **factory):
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(rows, columns, **factory))
        self.bias = nn.Parameter(torch.empty(rows, **factory)) if bias else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        normal_(self.weight, self.std, None, generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return f"weight={tuple(self.weight.shape)}, std={self.std:.4g}{bias}"


class Affine(Weight):
    """y = x W^T + b."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Embedding(Weight):
    """The rows of the weight that int64 indices name."""

    def forward(self, index: Tensor) -> Tensor:
        return F.embedding(index, self.weight)


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, alone or fused with the residual update before it."""

    def __init__(self, width: int, norm: str, *, bias: bool, **factory):
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.empty(width, **factory))
        self.bias = nn.Parameter(torch.empty(width, **factory)) if bias else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, EPS)
        return F.rms_norm(x, x.shape[-1:], self.weight, EPS)

    def after(self, x: Tensor, branch: Tensor, multiplier: float) -> tuple[Tensor, Tensor]:
        """x + multiplier * branch, and its norm."""
        return residual_norm(x, branch, multiplier, self.weight, self.bias, norm=self.norm, eps=EPS)

    def extra_repr(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return f"{len(self.weight)}, {self.norm!r}{bias}"


class Attention(nn.Module):
    """Causal attention: W_o concat_h(softmax(scale q k^T) v), with q, k, v of one product."""

    def __init__(self, width: int, head_size: int, scale: float, std: float, bias: bool, **factory):
        super().__init__()
        self.head_size, self.scale = head_size, scale
        self.qkv = Affine(3 * width, width, std, bias=bias, **factory)
        self.output = Affine(width, width, std, bias=bias, **factory)

    def forward(self, y: Tensor, rotation: Tensor | None, cache: Cache | None) -> Tensor:
        qkv = self.qkv(y).view(*y.shape[:2], 3, -1, self.head_size)
        if rotation is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
        else:
            q, k, v = rotary(qkv, rotation)
        mask = None
        if cache is not None:
            k, v = cache.append(self, k, v)
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])
        z = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        return self.output(z.transpose(1, 2).reshape(y.shape))

    def extra_repr(self) -> str:
        return f"head_size={self.head_size}, scale={self.scale:.4g}"


class MLP(nn.Module):
    """W_2 phi(W_1 y), or W_2 (silu(W_g y) * (W_1 y)) for `swiglu`, with W_g and W_1 in one weight."""

    def __init__(
        self, width: int, inner: int, mlp: str, stds: tuple[float, float], bias: bool, **factory
    ):
        super().__init__()
        self.mlp = mlp
        rows = 2 * inner if mlp == "swiglu" else inner
        self.up = Affine(rows, width, stds[0], bias=bias, **factory)
        self.down = Affine(width, inner, stds[1], bias=bias, **factory)

    def forward(self, y: Tensor) -> Tensor:
        return self.down(mlp_activation(self.up(y), self.mlp))

    def extra_repr(self) -> str:
        return repr(self.mlp)


class Layer(nn.Module):
    """x <- x + m Attention(norm(x)), then x <- x + m MLP(norm(x)).

    Each update is one operation with the norm that follows it.  A layer therefore takes, beside the
    stream x, its norm y, or None to compute it, and returns both as they leave it.
    """

    def __init__(self, multiplier: float, attention: Attention, mlp: MLP):
        super().__init__()
        self.multiplier, self.attention, self.mlp = multiplier, attention, mlp

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        norms: tuple[Norm, Norm, Norm],
        rotation: Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor]:
        own, inner, following = norms
        if y is None:
            y = own(x)
        x, y = inner.after(x, self.attention(y, rotation, cache), self.multiplier)
        return following.after(x, self.mlp(y), self.multiplier)

    def extra_repr(self) -> str:
        return f"multiplier={self.multiplier:.4g}"


class Transformer(nn.Module):
    """A decoder-only language model of L layers, each an attention and an MLP, both pre-norm:

    x <- x + m Attention(norm(x)),  x <- x + m MLP(norm(x)),  and logits W norm(x) after the last.

    The parametrization sets the branch multiplier m, the initial weights and, through `param_groups`,
    learning rates, eps and weight decay, so that hyperparameters tuned at the base width and depth hold
    at every other; optimizers of `depthnet.optim` take the model itself.

    Args:
        vocabulary: the number of tokens. width: n, a multiple of head_size. depth: L, 0 or more.
        context: the largest number of tokens. head_size: of the n / head_size heads; even, if rotary.
        mlp: `gelu`, `swiglu` or `abs`.
        mlp_width: inner width; None means 4 n, for `swiglu` 8/3 n rounded up to a multiple of 8.
        norm: `layer` or `rms`.
        positions: `rotary` (of queries and keys) or `learned` (added to the embedding).
        biases: whether weights of blocks, and layer norms, have biases.
        tied: whether the embedding is the output weight too.
        parametrization: a preset's name, exponents (alpha, gamma), or a scaling.Parametrization.
        block_multiplier: m at the base depth; None means base_depth^-1/2.
        embedding_std: standard deviation of embeddings and learned positions.
        output_std: standard deviation of output weights at the base width; 0 starts from logits 0.
        base_width, base_depth: the shape at which hyperparameters are (or were) tuned.
        base_head_size: the head size there, if heads grow with the width; None means head_size.
        generator: for the initial weights.

    Tokens are int64 (B, T); logits (B, T, vocabulary).  Parameters: `embedding.weight` (vocabulary, n),
    `positions.weight` (context, n), `layers.*.attention.qkv.weight` (3 n, n), `.attention.output.weight`,
    `layers.*.mlp.up.weight`, `.mlp.down.weight`, `norms.*.weight` (n,), where 2 l and 2 l + 1 are those of
    layer l and the last is the final one, and `head.weight` (vocabulary, n).

    Raises:
        TypeError, ValueError: an argument is not as described.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        depth: int,
        *,
        context: int = 256,
        head_size: int = 64,
        mlp: str = "gelu",
        mlp_width: int | None = None,
        norm: str = "layer",
        positions: str = "rotary",
        biases: bool = False,
        tied: bool = False,
        parametrization: str | tuple[float, float] | Parametrization = "completep",
        block_multiplier: float | None = None,
        embedding_std: float = 1.0,
        output_std: float = 0.0,
        base_width: int = 128,
        base_depth: int = 8,
        base_head_size: int | None = None,
        generator: torch.Generator | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.vocabulary = integer("vocabulary", vocabulary, 1)
        self.context = integer("context", context, 1)
        self.width, self.depth = integer("width", width, 1), integer("depth", depth, 0)
        one_of("mlp", mlp, MLPS)
        one_of("norm", norm, NORMS)
        if width % integer("head_size", head_size, 1):
            raise ValueError(f"width must be a multiple of head_size, {head_size}, got {width}")
        if one_of("positions", positions, POSITIONS) == "rotary" and head_size % 2:
            raise ValueError(f"head_size must be even for rotary positions, got {head_size}")
        if number("embedding_std", embedding_std) < 0:
            raise ValueError(f"embedding_std must not be negative, got {embedding_std}")
        if tied and output_std:
            raise ValueError(f"output_std is without effect if tied, got {output_std}")
        if mlp_width is None:
            mlp_width = -(-width // 3) * 8 if mlp == "swiglu" else 4 * width
        integer("mlp_width", mlp_width, 1)
        self.head_size = head_size
        self.parametrization = Parametrization.of(parametrization)

        def rule(role: str, fan_in: int = width) -> Rule:
            return self.parametrization.rule(
                role,
                fan_in=fan_in,
                width=width,
                depth=depth,
                base_width=base_width,
                base_depth=base_depth,
                block_multiplier=block_multiplier,
                input_std=embedding_std,
                output_std=output_std,
            )

        self.rules = {
            "input": rule("tied" if tied else "input", fan_in=1),
            "hidden": rule("hidden"),
            "norm": rule("norm"),
            "bias": rule("bias"),
            "final_norm": rule("final_norm"),
            "output": None if tied else rule("output"),
        }
        factory = {"device": device, "dtype": dtype}
        hidden, embedding = self.rules["hidden"], self.rules["input"]
        scale = self.parametrization.attention_scale(head_size, base_head_size)
        stds = hidden.init_std, rule("hidden", fan_in=mlp_width).init_std
        self.embedding = Embedding(vocabulary, width, embedding.init_std, **factory)
        self.positions = None
        if positions == "learned":
            self.positions = Embedding(context, width, embedding.init_std, **factory)
        self.layers = nn.ModuleList(
            Layer(
                hidden.multiplier,
                Attention(width, head_size, scale, hidden.init_std, biases, **factory),
                MLP(width, mlp_width, mlp, stds, biases, **factory),
            )
            for _ in range(depth)
        )
        # Here and not in the layers, as one layer ends with the norm that the next begins with.
        self.norms = nn.ModuleList(
            Norm(width, norm, bias=biases and norm == "layer", **factory)
            for _ in range(2 * depth + 1)
        )
        self.head = None
        if not tied:
            self.head = Affine(vocabulary, width, self.rules["output"].init_std, **factory)
        rotation = self._rotations() if positions == "rotary" else None
        self.register_buffer("rotation", rotation, persistent=False)
        self.reset_parameters(generator)
        track(self)

    def __setstate__(self, state):  # of copies and unpickled models
        super().__setstate__(state)
        track(self)

    def _rotations(self) -> Tensor:
        weight = self.embedding.weight
        table = rotations(self.context, self.head_size)
        return table.to(weight.device, stream_dtype(weight.dtype))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # that is `to` and its like, which may round to 16 bits
        if self.rotation is not None:
            self.rotation = self._rotations()
        return self

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new initial weights."""
        for module in self.modules():
            if isinstance(module, (Weight, Norm)):
                module.reset_parameters(generator)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits of the token after each one.

        Args:
            tokens: int64 (B, T).
            cache: None, or a generation.Cache: the tokens then follow those that it has seen.

        Raises:
            TypeError, ValueError: tokens are no int64 (B, T), not in the vocabulary (seen on a CPU only),
                or more than the context or the cache has room for.
        """
        return self.logits(self.features(tokens, cache))

    def features(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """What the output weights are applied to, (B, T, n); arguments as of `forward`."""
        start = 0 if cache is None else cache.length
        self.check_tokens("tokens", tokens, start, cache)
        end = start + tokens.shape[1]
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[start:end]
        rotation = None if self.rotation is None else self.rotation[start:end]
        # A hook may change the stream, or ask for its gradient: then norms are computed from it anew.
        watched = any(layer._forward_hooks or layer._forward_pre_hooks for layer in self.layers)
        norms, y = tuple(self.norms), None
        for index, layer in enumerate(self.layers):
            three = norms[2 * index : 2 * index + 3]
            x, y = layer(x, None if watched else y, three, rotation, cache)
        if watched or y is None:
            y = norms[-1](x)
        if cache is not None:
            cache.length = end
        return y

    def logits(self, features: Tensor) -> Tensor:
        """The output layer: (..., n) to (..., vocabulary)."""
        if self.head is not None:
            return self.head(features)
        return F.linear(features * self.rules["input"].multiplier, self.embedding.weight)

    def generate(
        self,
        prompt: Tensor,
        new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The prompt and tokens drawn after it, one after another, each computed once.

        Args:
            prompt: int64 (B, T), T at least 1; T + new_tokens must fit the context.
            temperature: of the distribution that is drawn from; 0 takes the largest logit.
            top_k: None, or draw from the k largest logits only.
            generator: for the draws.

        Returns:
            int64 (B, T + new_tokens).

        Raises:
            TypeError, ValueError: an argument is not as described.
        """
        options = {"temperature": temperature, "top_k": top_k, "generator": generator}
        drawn = sample(self, prompt, new_tokens, **options)
        return torch.cat([prompt, *(tokens[:, None] for tokens in drawn)], 1)

    def param_groups(self, optimizer: str) -> list[dict]:
        """The groups `input`, `hidden`, `norm`, `bias`, `final_norm` and `output`, those of them that have
        parameters, with their lr_scale, eps_scale, weight_decay_scale and the rule that these follow.

        `input` are embedding and learned positions, `norm` the norms' gains and `bias` all biases of
        layers, `final_norm` the last norm's gain and bias.

        Args:
            optimizer: `adamw` (decoupled weight decay), `adam` (coupled) or `sgd`.
        """
        *norms, final = self.norms
        blocks = [*self.layers.parameters(), *(p for norm in norms for p in norm.parameters())]
        gains = [norm.weight for norm in norms]
        weights = [p for p in self.layers.parameters() if p.ndim == 2]
        taken = {id(p) for p in (*weights, *gains)}
        tables = (self.embedding, self.positions)
        params = {
            "input": [table.weight for table in tables if table is not None],
            "hidden": weights,
            "norm": gains,
            "bias": [p for p in blocks if id(p) not in taken],
            "final_norm": list(final.parameters()),
            "output": [] if self.head is None else [self.head.weight],
        }
        return [
            group(role, params[role], rule, optimizer)
            for role, rule in self.rules.items()
            if params[role]
        ]

    def check_tokens(
        self, name: str, tokens: Tensor, start: int, cache: Cache | None = None
    ) -> None:
        """Raise an error that names the argument unless tokens can follow `start` others."""
        if not isinstance(tokens, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tokens).__name__}")
        if tokens.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {tokens.dtype}")
        if tokens.ndim != 2 or tokens.shape[1] == 0:
            raise ValueError(
                f"{name} must have the shape (B, T) with T at least 1, got {tuple(tokens.shape)}"
            )
        room = self.context if cache is None else min(self.context, cache.size)
        if start + tokens.shape[1] > room:
            after = f" after {start}" if start else ""
            raise ValueError(
                f"{name} must fit the context of {room} tokens, got {tokens.shape[1]}{after}"
            )
        # On a device this would wait for it; there the look-up itself fails.
        readable = type(tokens) is Tensor and tokens.device.type == "cpu" and tokens.numel()
        if readable and not torch.compiler.is_compiling():
            low, high = (bound.item() for bound in tokens.aminmax())
            if low < 0 or high >= self.vocabulary:
                raise ValueError(
                    f"{name} must be in the vocabulary, 0 to {self.vocabulary - 1}, got "
                    f"{low if low < 0 else high}"
                )

    def extra_repr(self) -> str:
        return f"parametrization={self.parametrization}"


def rotations(context: int, head_size: int) -> Tensor:
    """The rotation that `kernels.rotary` wants, float64 (context, 2, head_size).

    The pair of coordinates i and i + head_size / 2 turns by ROTARY_BASE^(-2 i / head_size) a token.
    """
    # Whatever the default device is: a model on "meta" may be moved.
    factory = {"dtype": torch.float64, "device": "cpu"}
    half = torch.arange(0, head_size, 2, **factory) / head_size
    angles = torch.arange(context, **factory)[:, None] * ROTARY_BASE**-half
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], 1), torch.cat([-sin, sin], 1)], 1)
