"""Optimizers with torch.optim's API and state layout, and rates for every layer or member."""

from depthnet.optim.adam import Adam, AdamW
from depthnet.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
