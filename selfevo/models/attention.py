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
    positions, and ``hidden`` (R G, N), see :func:`hide`; None where every row sees them all."""

    keys: Tensor
    values: Tensor
    depths: Tensor
    hidden: Tensor | None


@dataclass(frozen=True)
class SharedPrefixes:
    """B rows of one new token each, with G query heads to a key head. A row attends to its trunk and to its own later
    tokens.

    ``order`` (B,) takes the rows trunk by trunk, ``sizes`` of them each, ``back`` undoes it; ``hidden`` (B, S) is what
    a row may not attend to among its own S, see :func:`hide`.
    """

    trunks: Sequence[Trunk]
    sizes: list[int]
    order: Tensor
    back: Tensor
    hidden: Tensor
    each: int  # G

    def within(self, window: int, positions: Tensor, key_positions: Tensor) -> SharedPrefixes:
        """With what lies ``window`` or more tokens back hidden; positions (B, 1) and key positions (B, S)."""
        trunks = []
        for trunk, rows in zip(self.trunks, positions[self.order].split(self.sizes)):
            past = hide(rows - trunk.depths >= window, trunk.keys.dtype, self.each)
            trunks.append(replace(trunk, hidden=past if trunk.hidden is None else past.minimum(trunk.hidden)))
        past = hide(positions - key_positions >= window, self.hidden.dtype)
        return replace(self, trunks=trunks, hidden=past.minimum(self.hidden))


def hide(hidden: Tensor, dtype: torch.dtype, each: int = 1) -> Tensor:
    """Booleans (R, S), True where a row may not attend -> what is added to the scores of its heads, (R ``each``, S).

    Finite, for the sake of rows that a window hides all of a trunk from.
    """
    added = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)
    return added.repeat_interleave(each, dim=0)


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

    A trunk is read once for all its rows, whose queries are the rows of one product. Each part is attended to by
    itself; how the softmax over both divides between them follows from the sums of their exponentials. For processors.
    Computed in the dtype of the keys.
    """
    batch, heads, _, size = queries.shape
    rows = queries.to(keys.dtype).reshape(batch, keys.shape[1], mask.each, size).contiguous()
    own, own_sums = _attend_and_sum(rows, keys, values, mask.hidden[:, None, None].expand(-1, -1, mask.each, -1))
    found = []
    together = rows[mask.order].transpose(0, 1).flatten(1, 2)[None]
    for trunk, part in zip(mask.trunks, together.split([mask.each * count for count in mask.sizes], dim=2)):
        hidden = None if trunk.hidden is None else trunk.hidden[None, None]
        found.append(_attend_and_sum(part, trunk.keys[layer][None], trunk.values[layer][None], hidden))
    shared, shared_sums = (
        torch.cat(x, dim=2)[0].unflatten(1, (-1, mask.each)).transpose(0, 1)[mask.back] for x in zip(*found)
    )
    mixed = torch.lerp(own.to(own_sums.dtype), shared.to(own_sums.dtype), (shared_sums - own_sums).sigmoid()[..., None])
    return mixed.view(batch, heads, 1, size).to(queries.dtype)


def _attend_and_sum(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """PyTorch's kernel for processors: queries (B, K, T, E), keys and values (B, K, S, E), a mask to be added -> the
    result and, which the public function keeps to itself, logarithms (B, K, T) of the sums of exponentials. It takes
    for granted that the last dimension of each is contiguous."""
    mixed, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, attn_mask=mask)
    return mixed, sums
