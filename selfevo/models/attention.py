"""Attention: who may attend to what, and the ways to compute it.

Notation: B batch, T tokens of this call, S keys (cached and new), H heads, K key-value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from selfevo.models.tree_attention import attend_tree, fused
from selfevo.trie import TreeMask


@dataclass(frozen=True)
class Trunk:
    """N prompt tokens that R rows share: ``keys`` and ``values`` (layers, K, N, E), ``depths`` (N,), the tokens'
    positions, and ``hidden`` (R, N), True where a row may not attend; None where every row sees them all."""

    keys: Tensor
    values: Tensor
    depths: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class SharedPrefixes:
    """B rows of one new token each. Each attends to its trunk and to its own later tokens.

    ``order`` (B,) takes the rows trunk by trunk, ``sizes`` of them each, ``back`` undoes it; ``hidden`` (B, S) is True
    where a row may not attend among its own S.
    """

    trunks: Sequence[Trunk]
    sizes: list[int]
    order: Tensor
    back: Tensor
    hidden: Tensor

    def within(self, window: int, positions: Tensor, key_positions: Tensor) -> SharedPrefixes:
        """With what lies ``window`` or more tokens back hidden; positions (B, 1) and key positions (B, S)."""
        trunks = []
        for trunk, rows in zip(self.trunks, positions[self.order].split(self.sizes)):
            past = rows - trunk.depths >= window
            trunks.append(replace(trunk, hidden=past if trunk.hidden is None else past | trunk.hidden))
        return replace(self, trunks=trunks, hidden=self.hidden | (positions - key_positions >= window))


Mask = Tensor | TreeMask | SharedPrefixes | None


def attention_mask(positions: Tensor, key_positions: Tensor, mask: Mask, window: int | None) -> Mask:
    """The boolean mask (B, 1, T, S), True where a token may attend; None stands for plain causal attention.

    ``mask`` is the caller's (T, S) or (B, T, S); the window is laid over it by position, as a packed row needs. A tree
    mask stays as it is where the window leaves nothing out.
    """
    if isinstance(mask, SharedPrefixes):
        return mask if window is None else mask.within(window, positions, key_positions)
    if isinstance(mask, TreeMask):
        if window is None or window > int(mask.trie.positions.max()):
            return mask
        mask = mask.dense
    if mask is None:
        if window is None or window >= positions.shape[1]:
            return None
        length = positions.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()
    if mask.dim() == 2:
        mask = mask[None]
    if window is not None:
        mask = mask & (positions[:, :, None] - key_positions[:, None, :] < window)
    return mask[:, None]


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | TreeMask | None) -> Tensor:
    """Attention (B, H, T, E) of queries to the keys and values (B, K, S, E) that the mask allows."""
    if isinstance(mask, TreeMask):
        return attend_tree(queries, keys, values, mask)
    heads, groups = queries.shape[1], keys.shape[1]
    if queries.shape[2] == 1 and heads != groups and mask is not None:
        # one token a row: the heads that share keys become queries of one head, which reads its keys once
        return attend(queries.unflatten(1, (groups, -1)).squeeze(3), keys, values, mask).view_as(queries)
    return fused(queries, keys, values, mask)


def attend_shared(queries: Tensor, keys: Tensor, values: Tensor, mask: SharedPrefixes, layer: int) -> Tensor:
    """Attention (B, H, 1, E) of rows to their own keys and values (B, K, S, E) and to the trunks they share.

    A trunk is read once for all its rows, whose queries are the rows of one product; one softmax takes both parts.
    Computed in the dtype of the keys.
    """
    batch, heads, _, size = queries.shape
    groups = keys.shape[1]
    each = heads // groups  # query heads that share a key-value head
    scaled = queries.to(keys.dtype).mul(size**-0.5).view(batch, groups, each, size)
    own = torch.matmul(scaled, keys.transpose(2, 3)).masked_fill_(mask.hidden[:, None, None], -torch.inf)
    parts: list[tuple[Tensor, Tensor]] = []
    per_trunk = (x[mask.order].transpose(0, 1).split(mask.sizes, dim=1) for x in (scaled, own))
    for trunk, rows, latest in zip(mask.trunks, *per_trunk):
        scores = torch.bmm(rows.flatten(1, 2), trunk.keys[layer].transpose(1, 2)).unflatten(1, (-1, each))
        if trunk.hidden is not None:
            scores.masked_fill_(trunk.hidden[:, None], -torch.inf)
        shared, latest = torch.cat((scores, latest), dim=-1).softmax(-1).split((scores.shape[-1], own.shape[-1]), -1)
        parts.append((torch.bmm(shared.flatten(1, 2), trunk.values[layer]).view_as(rows), latest))
    mixed, weights = (torch.cat(x, dim=1).transpose(0, 1)[mask.back] for x in zip(*parts))
    return mixed.add_(torch.matmul(weights, values)).view(batch, heads, 1, size).to(queries.dtype)
