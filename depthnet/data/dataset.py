"""What a training run draws its batches from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


def batch_indices(seed: int, step: int, size: int, stop: int) -> np.ndarray:
    """`size` indices below `stop`, with replacement, as a function of (seed, step) alone, so that an
    interrupted run goes on with the same batches."""
    return np.random.default_rng([seed, step]).integers(stop, size=size)


@dataclass
class Arrays:
    """Labelled vectors: x float32 (N, in_features), y int64 (N,), and a test set of the same form.

    `source` says where the data came from; it is recorded with every result.
    """

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    out_features: int
    source: dict[str, Any] = field(default_factory=dict)
    active_features: None = None

    @classmethod
    def standardised(cls, x, y, x_test, y_test, source: dict) -> Arrays:
        """Flatten the inputs and take them to mean 0 and variance 1 over the whole training set."""
        features = int(np.prod(x.shape[1:]))
        x, x_test = (np.asarray(a, np.float32).reshape(len(a), features) for a in (x, x_test))
        mean, std = x.mean(dtype=np.float64), x.std(dtype=np.float64) or 1.0
        x, x_test = (torch.from_numpy(((a - mean) / std).astype(np.float32)) for a in (x, x_test))
        y, y_test = (
            torch.from_numpy(np.asarray(a).astype(np.int64).reshape(-1)) for a in (y, y_test)
        )
        out_features = int(torch.cat([y, y_test]).max()) + 1
        digest = hashlib.sha256()
        for tensor in (x, y, x_test, y_test):
            digest.update(tensor.numpy().tobytes())
        source = {**source, "sha256": digest.hexdigest()}
        return cls(x, y, x_test, y_test, out_features, source)

    @property
    def in_features(self) -> int:
        return self.x.shape[1]

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Training batch number `step` of the stream `seed`: x (size, in_features), y (size,)."""
        index = torch.from_numpy(batch_indices(seed, step, size, len(self.x)))
        return self.x[index], self.y[index]


@dataclass
class NextByte:
    """Predict a byte from the `context` bytes before it.

    x holds, for each position of the context, the index position * symbols + byte: the ones of a
    one-hot input of context * symbols features that is never materialised.
    """

    text: np.ndarray  # uint8
    symbols: int
    context: int = 8
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def in_features(self) -> int:
        return self.context * self.symbols

    @property
    def active_features(self) -> int:
        return self.context

    @property
    def out_features(self) -> int:
        return self.symbols

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Training batch number `step` of the stream `seed`: x int64 (size, context), y (size,)."""
        start = batch_indices(seed, step, size, len(self.text) - self.context)
        window = self.text[start[:, None] + np.arange(self.context + 1)].astype(np.int64)
        x = window[:, :-1] + self.symbols * np.arange(self.context)
        return torch.from_numpy(x), torch.from_numpy(window[:, -1].copy())


Dataset = Arrays | NextByte
