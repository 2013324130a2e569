"""Rotary position embeddings and their scalings for longer contexts, as Llama, Qwen2 and Mistral checkpoints have them.

Notation: B batch, T tokens, E head size. Each scaling changes the angular frequency of the E / 2 pairs of dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by ``factor`` (Chen et al. 2023)."""

    factor: float

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies / self.factor


@dataclass(frozen=True)
class DynamicRope:
    """A larger base beyond the window of the configuration; within it, where this library stays, nothing changes."""

    factor: float

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        return frequencies


@dataclass(frozen=True)
class Llama3Rope:
    """The scaling of Llama 3.1 and later: long waves divided by the factor, short ones kept."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        share = self.original_max_positions * frequencies / (2 * math.pi)
        smooth = ((share - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - smooth) * frequencies / self.factor + smooth * frequencies


@dataclass(frozen=True)
class YarnRope:
    """YaRN (Peng et al. 2023): a ramp over the dimensions from kept to divided frequencies, and larger embeddings."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True

    def scale(self, frequencies: Tensor, theta: float) -> Tensor:
        pairs = len(frequencies)
        low, high = (self._dimension(rotations, pairs, theta) for rotations in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = torch.arange(pairs, dtype=torch.float32, device=frequencies.device)
        divided = ((ramp - low) / (high - low or 0.001)).clamp(0.0, 1.0)
        return divided * frequencies / self.factor + (1 - divided) * frequencies

    def _dimension(self, rotations: float, pairs: int, theta: float) -> float:
        """The pair of dimensions that makes this many rotations over the original window."""
        return pairs * math.log(self.original_max_positions / (rotations * 2 * math.pi)) / math.log(theta)


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope


def rope_tables(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Positions (B, T) -> cosines and sines, each (B, 1, T, E), computed in float32 and rounded once."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.scale(frequencies, theta)
    angles = positions[..., None].float() * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    size = scaling.attention_factor if isinstance(scaling, YarnRope) else 1.0
    cosines, sines = (table if size == 1.0 else table * size for table in (angles.cos(), angles.sin()))
    return cosines.to(dtype), sines.to(dtype)
