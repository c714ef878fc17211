"""Text from a transformer, token by token: the cache of keys and values, sampling."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from depthnet._checks import integer, number


class Cache:
    """Keys and values of the tokens that a model has seen, so that none is computed twice.

    `model(tokens, cache)` goes on after the `length` tokens seen so far, and adds its own.

    Args:
        size: the number of tokens that it has room for.
    """

    def __init__(self, size: int):
        self.size, self.length = integer("size", size, 1), 0
        self._kept: dict[nn.Module, Tensor] = {}

    def append(self, attention: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keep an attention's keys and values, (B, heads, T, head_size) each; all that it has now."""
        batch, heads, tokens, head_size = keys.shape
        if attention not in self._kept:  # only here is the dtype known, which autocast may choose
            self._kept[attention] = keys.new_empty(2, batch, heads, self.size, head_size)
        kept, end = self._kept[attention], self.length + tokens
        kept[0, :, :, self.length : end] = keys
        kept[1, :, :, self.length : end] = values
        return kept[0, :, :, :end], kept[1, :, :, :end]


@torch.no_grad()
def sample(
    model,
    prompt: Tensor,
    new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """The tokens that follow a prompt, int64 (B,) one after another; see `Transformer.generate`."""
    integer("new_tokens", new_tokens, 0)
    if number("temperature", temperature) < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if top_k is not None and integer("top_k", top_k, 1) > model.vocabulary:
        raise ValueError(f"top_k must be at most the vocabulary, {model.vocabulary}, got {top_k}")
    model.check_tokens("prompt", prompt, 0)
    if prompt.shape[1] + new_tokens > model.context:
        raise ValueError(
            f"prompt and new_tokens must fit the context of {model.context} tokens, got "
            f"{prompt.shape[1]} + {new_tokens}"
        )
    cache, tokens = Cache(model.context), prompt
    for _ in range(new_tokens):
        logits = model.logits(model.features(tokens, cache)[:, -1])
        following = choose(logits, temperature, top_k, generator)
        yield following
        tokens = following[:, None]


def choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Draw from softmax(logits / temperature) over the top_k largest; temperature 0 takes the largest.

    Args:
        logits: (B, vocabulary).

    Returns:
        int64 (B,).
    """
    if temperature == 0:
        return logits.argmax(-1)
    largest, tokens = (logits, None) if top_k is None else logits.topk(top_k)
    scaled = (largest - largest.amax(-1, keepdim=True)).float() / temperature
    drawn = torch.multinomial(scaled.softmax(-1), 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(-1, drawn))[:, 0]
