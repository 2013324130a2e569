"""The seam between the model and its tokens' neighbours: every layer asks an ``AttentionContext`` to attend.

Notation: B batch, T tokens of this call, S keys, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionContext(Protocol):
    """Who may attend to what in one forward pass, and by which kernel.

    A layer hands over its projections, rotary embeddings applied; a context may keep them, as a cache does, and put
    earlier keys before them. Sliding windows come from the model's configuration, layer by layer.
    """

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """(B, H, T, E), (B, K, T, E) twice -> (B, H, T, E).

        ``window`` is how many positions a token may see, itself included; None is no limit.
        """
        ...


class Causal:
    """Each token attends to itself and to those before it in its row. ``positions`` (B, T) serve sliding windows."""

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
    """A token attends where ``allowed``, (T, T) or (B, T, T) boolean, is True; windows are laid over it by position."""

    def __init__(self, allowed: Tensor, positions: Tensor) -> None:
        self._allowed = allowed[None] if allowed.dim() == 2 else allowed
        self._positions = positions
        self._by_window: dict[int | None, Tensor] = {}  # made once for all layers

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        if window not in self._by_window:
            allowed = self._allowed
            if window is not None:
                allowed = allowed & within_window(self._positions, self._positions, window)
            self._by_window[window] = allowed[:, None]
        return fused_attention(queries, keys, values, self._by_window[window])


def within_window(positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """Positions (B, T) and (B, S) -> (B, T, S), True where a key lies less than ``window`` positions back."""
    return positions[:, :, None] - key_positions[:, None, :] < window


def fused_attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused kernel: (B, H, T, E), (B, K, S, E) twice -> (B, H, T, E).

    ``mask`` broadcasts to (B, H, T, S), True where a query may attend; None is causal.
    """
    shared = queries.shape[1] // keys.shape[1]
    if shared > 1 and mask is not None and queries.device.type != "cpu":
        # Given both a mask and keys that several heads share, PyTorch falls back to a kernel that holds all scores.
        keys, values = (x.repeat_interleave(shared, dim=1) for x in (keys, values))
        shared = 1
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None and queries.shape[2] > 1, enable_gqa=shared > 1
    )
