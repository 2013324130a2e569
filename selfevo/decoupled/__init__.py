"""Decoupled ESC (Zhang et al. 2025): a strategy planner and a response generator."""

from selfevo.decoupled.run import DecoupledConfig, decouple

__all__ = ["DecoupledConfig", "decouple"]
