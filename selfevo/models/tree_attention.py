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

# Nodes up to which an accelerator is given one dense mask, as many small calls would wait for their launches. Reckoned,
# not measured.
_DENSE_ROW = 1024


def attend_tree(queries: Tensor, keys: Tensor, values: Tensor, mask: TreeMask) -> Tensor:
    """Attention (1, H, N, E) of nodes to the keys and values (1, K, N, E) of their ancestors and their own."""
    if queries.device.type != "cpu":
        if len(mask.trie) <= _DENSE_ROW:
            return fused(queries, keys, values, mask.dense)
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
        mixed.append(fused(own, own_keys, own_values, stretch.mask))
    return torch.cat(mixed, dim=2)


def fused(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's kernel: queries (B, H, T, E), keys and values (B, K, S, E), a boolean mask or None for causal."""
    each = queries.shape[1] // keys.shape[1]
    if each > 1 and mask is not None and queries.device.type != "cpu":
        # Given a mask and shared keys both, PyTorch falls back to a kernel that holds all scores.
        keys, values = (x.repeat_interleave(each, dim=1) for x in (keys, values))
        each = 1
    return F.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, is_causal=mask is None and queries.shape[2] > 1, enable_gqa=each > 1
    )


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
        whole = _Whole(queries, keys, values)
        mixed = whole.empty()
        for block in mask.blocks(whole.block_rows):
            part = _Part(whole, block)
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
        for block in ctx.mask.blocks(whole.block_rows):
            part = _Part(whole, block)
            slopes, weights = part.rows(grad), part.weights()
            part.add(grad_values, torch.bmm(weights.transpose(1, 2), slopes))
            slopes = torch.bmm(slopes, part.values.transpose(1, 2))
            slopes = torch._softmax_backward_data(slopes, weights, -1, weights.dtype)  # 0 where nothing may be seen
            part.write(grad_queries, torch.bmm(slopes, part.keys).mul_(whole.scale))
            part.add(grad_keys, torch.bmm(slopes.transpose(1, 2), part.queries))
        return grad_queries, grad_keys.to(keys.dtype)[None], grad_values.to(values.dtype)[None], None


class _Whole:
    """Keys and values (K, N, E), and what the blocks have in common."""

    def __init__(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        self.queries, self.keys, self.values = queries, keys[0].contiguous(), values[0].contiguous()
        self.scale = queries.shape[-1] ** -0.5
        self.block_rows = _ROW_BYTES // queries.element_size()

    def empty(self) -> Tensor:
        """Room for (1, H, N, E), a node's heads side by side as the layers around want them."""
        _, heads, length, size = self.queries.shape
        return self.queries.new_empty(1, length, heads, size).transpose(1, 2)


class _Part:
    """One block: ``queries`` (K, R G, E), scaled, the rows of products with the ``keys`` (K, S, E) that they share.

    A bfloat16 product of a new shape takes milliseconds to prepare. Blocks of full size, of shapes that come again with
    every trie, are computed in the dtype of the keys, the odd ones in float32.
    """

    def __init__(self, whole: _Whole, block: Block) -> None:
        self.block, self.groups = block, len(whole.keys)
        self.sizes = [part.stop - part.start for part in block.seen]
        full = block.rows.stop - block.rows.start == whole.block_rows and sum(self.sizes) % whole.block_rows == 0
        self.dtype = whole.keys.dtype if full else torch.promote_types(whole.keys.dtype, torch.float32)
        self.queries = self.rows(whole.queries).mul_(whole.scale)
        self.keys, self.values = (
            torch.cat([x[:, part] for part in block.seen], dim=1).to(self.dtype) for x in (whole.keys, whole.values)
        )

    def rows(self, x: Tensor) -> Tensor:
        """(1, H, N, E) -> (K, R G, E), a copy."""
        own = x[0].unflatten(0, (self.groups, -1))[:, :, self.block.rows].transpose(1, 2)
        return own.to(self.dtype, copy=True, memory_format=torch.contiguous_format).flatten(1, 2)

    def write(self, target: Tensor, own: Tensor) -> None:
        place = target[0].unflatten(0, (self.groups, -1))[:, :, self.block.rows]
        place.copy_(own.unflatten(1, (place.shape[2], -1)).transpose(1, 2))

    def add(self, total: Tensor, own: Tensor) -> None:
        """Adds the gradient of keys or values (K, S, E) to its places in that of all."""
        for part, piece in zip(self.block.seen, own.split(self.sizes, dim=1)):
            total[:, part].add_(piece)

    def weights(self) -> Tensor:
        """Attention weights (K, R G, S)."""
        scores = torch.bmm(self.queries, self.keys.transpose(1, 2))
        hidden = self.block.hidden
        if hidden is not None:
            rows, last = hidden.shape
            scores.unflatten(1, (rows, -1))[..., -last:].masked_fill_(hidden[:, None], -torch.inf)
        return scores.softmax(dim=-1)
