"""Modules."""

from depthnet.nn.resnet import ResidualStack, ResNet
from depthnet.nn.transformer import Transformer

__all__ = ["ResNet", "ResidualStack", "Transformer"]
