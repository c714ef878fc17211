"""Residual networks that train at any depth, with hyperparameters tuned once on a small network."""

from depthnet import diagnostics, graphs, kernels, nn, optim, scaling, theory
from depthnet.nn import ResNet
from depthnet.scaled import scale
from depthnet.tuning import tune

__version__ = "0.1.0"
__all__ = [
    "ResNet",
    "__version__",
    "diagnostics",
    "graphs",
    "kernels",
    "nn",
    "optim",
    "scale",
    "scaling",
    "theory",
    "tune",
]
