"""Modules."""

from depthnet.nn.resnet import ResidualStack, ResNet

__all__ = ["ResNet", "ResidualStack"]
