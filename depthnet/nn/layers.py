"""The layers around a residual stack, for one network or a population of networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from depthnet.kernels import embedding_sum, linear

Generators = torch.Generator | Sequence[torch.Generator] | None


def normal_(weight: Tensor, std: float, population: int | None, generator: Generators) -> None:
    """Fill a weight with N(0, std^2), the members of a population one after another.

    With a generator for each member, a member's weights are those of a single network drawn from the
    same generator.
    """
    members = [weight] if population is None else weight.unbind(0)
    each = generator if isinstance(generator, Sequence) else [generator] * len(members)
    with torch.no_grad():
        for member, member_generator in zip(members, each, strict=True):
            if std:
                member.normal_(0.0, std, generator=member_generator)
            else:
                member.zero_()


class _Layer(nn.Module):
    """One weight of shape (*P, rows, columns), drawn from N(0, std^2)."""

    def __init__(self, rows, columns, std, population, generator, device, dtype):
        super().__init__()
        self.std, self.population = std, population
        lead = () if population is None else (population,)
        self.weight = nn.Parameter(torch.empty(*lead, rows, columns, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generators = None) -> None:
        normal_(self.weight, self.std, self.population, generator)

    def extra_repr(self) -> str:
        return f"weight={tuple(self.weight.shape)}, std={self.std:.4g}"


class Linear(_Layer):
    """y = x W^T without bias, one W for each member of a population.

    Input (*P, B, in_features), or (B, in_features) for all members alike; weight (*P, out_features,
    in_features); output (*P, B, out_features).
    """

    def __init__(self, in_features, out_features, std, **options):
        super().__init__(out_features, in_features, std, **options)

    def forward(self, x: Tensor) -> Tensor:
        # Alone, a vendor's product may be faster; beside others a member's bits must not depend on them.
        return x @ self.weight.mT if self.population is None else linear(x, self.weight)


class EmbeddingSum(_Layer):
    """A Linear layer on inputs of zeros and a few ones, given by the indices of the ones.

    Input int64 (*P, B, active), or (B, active) for all members alike; weight (*P, in_features,
    out_features), a row for each feature; output (*P, B, out_features), the sum of the named rows.
    """

    def __init__(self, in_features, out_features, std, **options):
        super().__init__(in_features, out_features, std, **options)

    def forward(self, x: Tensor) -> Tensor:
        return embedding_sum(x, self.weight)
