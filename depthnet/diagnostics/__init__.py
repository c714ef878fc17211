"""Measurements of networks: what their parametrization promises, and what they do."""

from depthnet.diagnostics.coord_check import (
    CoordCheck,
    coord_check,
    next_token_loss,
    resnet_builder,
    transformer_builder,
)
from depthnet.diagnostics.diversity import (
    FeatureDiversity,
    Neighbors,
    feature_diversity,
    gradient_diversity,
    quadratic_variation,
    update_diversity,
)
from depthnet.diagnostics.linearization import Linearization, linearization
from depthnet.diagnostics.phase_diagram import PhaseDiagram, phase_diagram
from depthnet.diagnostics.stream import Stream, residual_stream

__all__ = [
    "CoordCheck",
    "FeatureDiversity",
    "Linearization",
    "Neighbors",
    "PhaseDiagram",
    "Stream",
    "coord_check",
    "feature_diversity",
    "gradient_diversity",
    "linearization",
    "next_token_loss",
    "phase_diagram",
    "quadratic_variation",
    "residual_stream",
    "resnet_builder",
    "transformer_builder",
    "update_diversity",
]
