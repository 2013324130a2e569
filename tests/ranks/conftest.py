"""The small world of runs as a fixture."""

from runs import world

__all__ = ["world"]
