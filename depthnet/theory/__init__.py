"""The limits of infinite width and depth, as functions in numpy, fast enough for a notebook."""

from depthnet.scaling.classification import Classification, classify
from depthnet.theory.limits import Trajectory, initial_kernels, linear_trajectory, trajectory
from depthnet.theory.moments import Moments, moments

__all__ = [
    "Classification",
    "Moments",
    "Trajectory",
    "classify",
    "initial_kernels",
    "linear_trajectory",
    "moments",
    "trajectory",
]
