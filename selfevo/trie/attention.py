"""Attention of the nodes of a packed trie to their ancestors.

Notation: N nodes, H query heads, K key-value heads, G = H / K query heads that share keys, E head size. Of a tile:
R rows, S nodes seen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfevo.kernels.private_ops import has_matrix_units, softmax_backward
from selfevo.models.attention import fused_attention
from selfevo.trie.mask import Tile, TreeMask
from selfevo.trie.trie import TokenTrie

_ROW_BYTES = 256  # rows of a tile times the bytes of a score: 64 rows in float32, whose scores a CPU's cache holds
# Nodes up to which other devices get one dense mask, as many small calls would wait for their launches. Reckoned, not
# measured.
_DENSE_NODES = 1024


class TreeContext:
    """The ``AttentionContext`` of one packed trie: every node attends to itself and to its ancestors."""

    def __init__(self, trie: TokenTrie, device: torch.device | str = "cpu") -> None:
        self._mask = TreeMask(trie, torch.device(device))
        self._deepest = int(trie.positions.max())
        self._by_window: dict[int, Tensor] = {}

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """(1, H, N, E), (1, K, N, E) twice -> (1, H, N, E)."""
        if window is None or window > self._deepest:
            return attend_tree(queries, keys, values, self._mask)
        if window not in self._by_window:
            depths = self._mask.trie.positions.to(queries.device)
            self._by_window[window] = self._mask.dense & (depths[:, None] - depths[None, :] < window)
        return fused_attention(queries, keys, values, self._by_window[window])


def attend_tree(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
    """Attention (1, H, N, E) of nodes to the keys and values (1, K, N, E) of their ancestors and their own."""
    if queries.device.type != "cpu":
        if len(mask.trie) <= _DENSE_NODES:
            return fused_attention(queries, keys, values, mask.dense)
        return _attend_by_tiles(queries, keys, values, mask)
    mixed: Tensor = _TreeAttention.apply(queries, keys, values, mask)
    return mixed


def _attend_by_tiles(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
    """One call of PyTorch's fused kernel for every tile."""
    sizes, seen = mask.pieces  # split rather than sliced: the gradients of the pieces come together in one pass
    own = queries.split([tile.rows.stop - tile.rows.start for tile in mask.tiles], dim=2)
    key_pieces, value_pieces = keys.split(sizes, dim=2), values.split(sizes, dim=2)
    mixed = []
    for rows, tile, pieces in zip(own, mask.tiles, seen):
        tile_keys, tile_values = (torch.cat([side[n] for n in pieces], dim=2) for side in (key_pieces, value_pieces))
        mixed.append(fused_attention(rows, tile_keys, tile_values, tile.mask))
    return torch.cat(mixed, dim=2)


class _TreeAttention(torch.autograd.Function):
    """For the CPU: saves queries, keys and values; the backward pass recomputes the probabilities tile by tile, as
    FlashAttention does (Dao et al. 2022). Plain matrix products use a CPU's bfloat16 instructions; PyTorch's fused
    kernel does so in the forward pass alone, and only with matrix units (AMX)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
        ctx.mask = mask
        ctx.save_for_backward(queries, keys, values)
        if queries.dtype != torch.bfloat16 or has_matrix_units():
            return _attend_by_tiles(queries, keys, values, mask)
        whole = _Whole(queries, keys, values)
        mixed = whole.empty()
        for tile in mask.cut(whole.tile_rows):
            part = _Part(whole, tile)
            part.write(mixed, torch.bmm(part.weights(), part.values))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        whole = _Whole(queries, keys, values)
        grad_queries = whole.empty()
        wide = torch.promote_types(keys.dtype, torch.float32)  # the keys' gradients are sums over many blocks
        grad_keys, grad_values = (torch.zeros_like(x, dtype=wide) for x in (whole.keys, whole.values))
        for tile in ctx.mask.cut(whole.tile_rows):
            part = _Part(whole, tile)
            slopes, weights = part.rows(grad), part.weights()
            part.add(grad_values, torch.bmm(weights.transpose(1, 2), slopes))
            slopes = torch.bmm(slopes, part.values.transpose(1, 2))
            slopes = softmax_backward(slopes, weights)  # 0 where a node may not attend
            part.write(grad_queries, torch.bmm(slopes, part.keys).mul_(whole.scale))
            part.add(grad_keys, torch.bmm(slopes.transpose(1, 2), part.queries))
        return grad_queries, grad_keys.to(keys.dtype)[None], grad_values.to(values.dtype)[None], None


class _Whole:
    """Keys and values (K, N, E), and what the blocks have in common."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.queries, self.keys, self.values = queries, keys[0].contiguous(), values[0].contiguous()
        self.scale = queries.shape[-1] ** -0.5
        self.tile_rows = _ROW_BYTES // queries.element_size()

    def empty(self) -> Tensor:
        """Room for (1, H, N, E), a node's heads side by side as the layers around want them."""
        _, heads, length, size = self.queries.shape
        return self.queries.new_empty(1, length, heads, size).transpose(1, 2)


class _Part:
    """One block: ``queries`` (K, R G, E), scaled, the rows of products with the ``keys`` (K, S, E) that they share.

    A bfloat16 product of a new shape takes milliseconds to prepare. Blocks of full size, of shapes that come again with
    every trie, are computed in the dtype of the keys, the odd ones in float32.
    """

    def __init__(self, whole: _Whole, tile: Tile) -> None:
        self.tile, self.groups = tile, len(whole.keys)
        self.sizes = [part.stop - part.start for part in tile.seen]
        full = tile.rows.stop - tile.rows.start == whole.tile_rows and sum(self.sizes) % whole.tile_rows == 0
        self.dtype = whole.keys.dtype if full else torch.promote_types(whole.keys.dtype, torch.float32)
        self.queries = self.rows(whole.queries).mul_(whole.scale)
        self.keys, self.values = (
            torch.cat([x[:, part] for part in tile.seen], dim=1).to(self.dtype) for x in (whole.keys, whole.values)
        )

    def rows(self, x: Tensor) -> Tensor:
        """(1, H, N, E) -> (K, R G, E), a copy."""
        own = x[0].unflatten(0, (self.groups, -1))[:, :, self.tile.rows].transpose(1, 2)
        return own.to(self.dtype, copy=True, memory_format=torch.contiguous_format).flatten(1, 2)

    def write(self, target: Tensor, own: Tensor) -> None:
        place = target[0].unflatten(0, (self.groups, -1))[:, :, self.tile.rows]
        place.copy_(own.unflatten(1, (place.shape[2], -1)).transpose(1, 2))

    def add(self, total: Tensor, own: Tensor) -> None:
        """Adds the gradient of keys or values (K, S, E) to its places in that of all."""
        for part, piece in zip(self.tile.seen, own.split(self.sizes, dim=1)):
            total[:, part].add_(piece)

    def weights(self) -> Tensor:
        """Attention weights (K, R G, S)."""
        scores = torch.bmm(self.queries, self.keys.transpose(1, 2))
        blocked = self.tile.blocked
        own = scores.unflatten(1, (len(blocked), -1))[..., -len(blocked) :]  # (K, R, G, R)
        own.masked_fill_(blocked[:, None], -torch.inf)
        return scores.softmax(dim=-1)
