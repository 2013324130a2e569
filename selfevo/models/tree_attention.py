"""Attention of the nodes of a packed trie to their ancestors.

Notation: N nodes, H heads, K key-value heads, G = H / K heads that share keys, E head size. Of a block: R rows, S keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from selfevo.products import has_matrix_units
from selfevo.trie import Block, TreeMask

_ROW_BYTES = 256  # so many of one column of a block: 64 rows in float32, whose scores a processor's cache holds


def attend_tree(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
    """Attention (1, H, N, E) of nodes to the keys and values (1, K, N, E) of their ancestors and their own."""
    if queries.device.type != "cpu":
        return _by_stretches(queries, keys, values, mask)
    mixed: Tensor = _TreeAttention.apply(queries, keys, values, mask)
    return mixed


def _by_stretches(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
    """One call of PyTorch's fused kernel for every stretch."""
    sizes, attended = mask.pieces  # split, rather than sliced, the parts' gradients come together in one pass
    each = queries.split([stretch.nodes.stop - stretch.nodes.start for stretch in mask.stretches], dim=2)
    key_pieces, value_pieces = keys.split(sizes, dim=2), values.split(sizes, dim=2)
    mixed = []
    for own, stretch, seen in zip(each, mask.stretches, attended):
        own_keys, own_values = (torch.cat([pieces[n] for n in seen], dim=2) for pieces in (key_pieces, value_pieces))
        causal = stretch.mask is None and own.shape[2] > 1
        mixed.append(
            F.scaled_dot_product_attention(
                own, own_keys, own_values, attn_mask=stretch.mask, is_causal=causal,
                enable_gqa=own.shape[1] != own_keys.shape[1],
            )
        )  # fmt: skip
    return torch.cat(mixed, dim=2)


class _TreeAttention(torch.autograd.Function):
    """For processors. It keeps queries, keys and values alone; the backward pass finds the probabilities anew, block by
    block, while the cache holds them. Plain products use a processor's bfloat16 units; PyTorch's fused kernel uses
    them forward only, and only where they are matrix units, and takes nearly three times as long elsewhere."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
        ctx.mask = mask
        ctx.save_for_backward(queries, keys, values)
        if queries.dtype != torch.bfloat16 or has_matrix_units():
            return _by_stretches(queries, keys, values, mask)
        blocks = _Blocks(queries, keys, values)
        mixed = blocks.empty()
        for block in mask.blocks(_ROW_BYTES // queries.element_size()):
            own = blocks.rows(queries, block)
            blocks.write(mixed, block, torch.bmm(blocks.weights(own, block), blocks.seen(blocks.values, block)))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values = ctx.saved_tensors
        blocks = _Blocks(queries, keys, values)
        grad_queries = blocks.empty()
        wide = torch.promote_types(keys.dtype, torch.float32)  # the keys' gradients are sums over many blocks
        grad_keys, grad_values = (torch.zeros_like(x, dtype=wide) for x in (blocks.keys, blocks.values))
        for block in ctx.mask.blocks(_ROW_BYTES // queries.element_size()):
            own, slopes = blocks.rows(queries, block), blocks.rows(grad, block)
            weights = blocks.weights(own, block)
            blocks.add(grad_values, block, torch.bmm(weights.transpose(1, 2), slopes))
            slopes = torch.bmm(slopes, blocks.seen(blocks.values, block).transpose(1, 2))
            slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)  # 0 where nothing may be seen
            slopes.mul_(blocks.scale)
            blocks.write(grad_queries, block, torch.bmm(slopes, blocks.seen(blocks.keys, block)))
            blocks.add(grad_keys, block, torch.bmm(slopes.transpose(1, 2), own))
        return grad_queries, grad_keys.to(keys.dtype)[None], grad_values.to(values.dtype)[None], None


class _Blocks:
    """Queries as rows of products with the keys that they share, block by block."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys[0].contiguous(), values[0].contiguous()
        self.heads, self.length, self.size = queries.shape[1:]
        self.scale = self.size**-0.5
        self.new = queries.new_empty

    def empty(self) -> Tensor:
        """Room for (1, H, N, E), a node's heads side by side as the layers around want them."""
        return self.new(1, self.length, self.heads, self.size).transpose(1, 2)

    def rows(self, x: Tensor, block: Block) -> Tensor:
        """(1, H, N, E) -> (K, R G, E)."""
        own = x[0].unflatten(0, (len(self.keys), -1))[:, :, block.rows]
        return own.transpose(1, 2).reshape(len(self.keys), -1, self.size)

    def write(self, target: Tensor, block: Block, own: Tensor) -> None:
        place = target[0].unflatten(0, (len(self.keys), -1))[:, :, block.rows]
        place.copy_(own.unflatten(1, (place.shape[2], -1)).transpose(1, 2))

    def seen(self, x: Tensor, block: Block) -> Tensor:
        """Keys or values (K, N, E) -> those that the block attends to, (K, S, E)."""
        return x[:, block.seen[0]] if len(block.seen) == 1 else torch.cat([x[:, part] for part in block.seen], dim=1)

    def add(self, total: Tensor, block: Block, own: Tensor) -> None:
        """Adds what :meth:`seen` would take, (K, S, E), to its places."""
        for part, piece in zip(block.seen, own.split([part.stop - part.start for part in block.seen], dim=1)):
            total[:, part] += piece

    def weights(self, own: Tensor, block: Block) -> Tensor:
        """Rows (K, R G, E) -> their attention weights (K, R G, S)."""
        scores = torch.bmm(own * self.scale, self.seen(self.keys, block).transpose(1, 2))
        if block.hidden is not None:
            rows, last = block.hidden.shape
            scores.unflatten(1, (rows, -1))[..., -last:].masked_fill_(block.hidden[:, None], -torch.inf)
        return scores.softmax(dim=-1)
