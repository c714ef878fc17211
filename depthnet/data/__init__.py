"""Data sets: batches as a function of (seed, step)."""

from depthnet.data.dataset import Arrays, Dataset, NextByte
from depthnet.data.loaders import NAMES, load
from depthnet.data.tokens import Tokens, tokens

__all__ = ["NAMES", "Arrays", "Dataset", "NextByte", "Tokens", "load", "tokens"]
