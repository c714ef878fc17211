"""Training loops."""

from depthnet.training.population import PopulationTrainer

__all__ = ["PopulationTrainer"]
