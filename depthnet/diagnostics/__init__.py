"""Measurements of networks: what their parametrization promises, and what they do."""

from depthnet.diagnostics.stream import Stream, residual_stream

__all__ = ["Stream", "residual_stream"]
