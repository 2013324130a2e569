"""The small world of runs as a fixture."""

from runs import finished, world

__all__ = ["finished", "world"]
