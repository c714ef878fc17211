"""Scaling rules in width and depth, on plain numbers: no torch import."""

from depthnet.scaling.classification import Classification, classify
from depthnet.scaling.groups import param_groups, torch_param_groups
from depthnet.scaling.parametrization import PRESETS, Parametrization, Rule

__all__ = [
    "PRESETS",
    "Classification",
    "Parametrization",
    "Rule",
    "classify",
    "param_groups",
    "torch_param_groups",
]
