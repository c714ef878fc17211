"""depthnet theory."""

from __future__ import annotations


def add_verbs(verbs) -> None:
    """To be written."""
