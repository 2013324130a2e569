"""The self-evolution loop and what belongs to it."""

from selfevo.evolve.loop import EvolveConfig, evolve, read_corpus
from selfevo.evolve.run import RunConfig, RunError, load_backbone

__all__ = ["EvolveConfig", "RunConfig", "RunError", "evolve", "load_backbone", "read_corpus"]
