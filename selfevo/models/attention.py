"""Attention: every layer calls an ``AttentionContext``, which decides what each token attends to.

Notation: B batch, T tokens of this call, S keys, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionContext(Protocol):
    """What each token attends to in one forward pass, and the kernel that computes it.

    A layer passes its projections after the rotary embeddings. A context may store them, as a cache does, and attend to
    earlier keys too. The model's configuration has the sliding window of each layer.
    """

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """(B, H, T, E), (B, K, T, E) twice -> (B, H, T, E).

        ``window`` is the number of positions that a token may attend to, including its own; None means no limit.
        """
        ...


class Causal:
    """Each token attends to itself and to those before it in its row; ``positions`` (B, T) are for sliding windows."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._windowed: Masked | None = None

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        length = queries.shape[2]
        if window is None or window >= length:
            return fused_attention(queries, keys, values, None)
        if self._windowed is None:
            allowed = torch.ones(length, length, dtype=torch.bool, device=queries.device).tril()
            self._windowed = Masked(allowed, self._positions)
        return self._windowed.attend(layer, queries, keys, values, window)


class Masked:
    """A token attends where ``allowed``, boolean (T, T) or (B, T, T), is True, within its window by position."""

    def __init__(self, allowed: Tensor, positions: Tensor) -> None:
        self._allowed = allowed[None] if allowed.dim() == 2 else allowed
        self._positions = positions
        self._by_window: dict[int | None, Tensor] = {}  # shared by all layers

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        if window not in self._by_window:
            allowed = self._allowed
            if window is not None:
                allowed = allowed & within_window(self._positions, self._positions, window)
            self._by_window[window] = allowed[:, None]
        return fused_attention(queries, keys, values, self._by_window[window])


def within_window(positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Positions (B, T) and (B, S) -> (B, T, S), True where a key is less than ``window`` positions before a query."""
    return positions[:, :, None] - key_positions[:, None, :] < window


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused kernel: (B, H, T, E), (B, K, S, E) twice -> (B, H, T, E).

    ``mask`` broadcasts to (B, H, T, S), True where a query may attend; None means causal.
    """
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1 and mask is not None and queries.device.type != "cpu":
        # With a mask and with keys shared by several heads, PyTorch uses a kernel that stores all scores.
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
        shared = 1
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None and queries.shape[2] > 1, enable_gqa=shared > 1
    )
