"""Attention of the nodes of a packed trie to their ancestors.

Notation: N nodes, H query heads, K key-value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selfevo.models.attention import fused_attention
from selfevo.trie.mask import TreeMask
from selfevo.trie.trie import TokenTrie

# Up to so many nodes a GPU gets one dense mask, as launching many small kernels takes longer. Estimated, not measured.
_DENSE_NODES = 1024


class TreeContext:
    """The ``AttentionContext`` of one packed trie: every node attends to itself and to its ancestors."""

    def __init__(self, trie: TokenTrie, device: torch.device | str = "cpu") -> None:
        self._mask = TreeMask(trie, torch.device(device))
        self._deepest = int(trie.positions.max())
        self._dense: dict[int, Tensor] = {}

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """(1, H, N, E), (1, K, N, E) twice -> (1, H, N, E)."""
        if window is None or window > self._deepest:
            return attend_tree(queries, keys, values, self._mask)
        if window not in self._dense:
            depths = self._mask.trie.positions.to(queries.device)
            self._dense[window] = self._mask.dense & (depths[:, None] - depths[None, :] < window)
        return fused_attention(queries, keys, values, self._dense[window])


def attend_tree(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
    """Attention (1, H, N, E) of nodes to the keys and values (1, K, N, E) of their ancestors and their own.

    PyTorch's fused kernel is called once for every tile of the mask.
    """
    if queries.device.type != "cpu" and len(mask.trie) <= _DENSE_NODES:
        return fused_attention(queries, keys, values, mask.dense)
    sizes, seen = mask.pieces  # split rather than sliced: the gradients of the pieces come together in one pass
    own = queries.split([tile.rows.stop - tile.rows.start for tile in mask.tiles], dim=2)
    key_pieces, value_pieces = keys.split(sizes, dim=2), values.split(sizes, dim=2)
    mixed = []
    for rows, tile, pieces in zip(own, mask.tiles, seen):
        tile_keys, tile_values = (torch.cat([side[n] for n in pieces], dim=2) for side in (key_pieces, value_pieces))
        mixed.append(fused_attention(rows, tile_keys, tile_values, tile.mask))
    return torch.cat(mixed, dim=2)
