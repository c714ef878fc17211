"""Data sets: batches as a function of (seed, step)."""

from depthnet.data.dataset import Arrays, Dataset, NextByte
from depthnet.data.loaders import NAMES, load

__all__ = ["NAMES", "Arrays", "Dataset", "NextByte", "load"]
