"""Where decoding keeps keys and values, each cache being the ``AttentionContext`` of its forward passes.

Notation: K key-value heads, G query heads that share a key head, E head size; rows are the replies being decoded,
always the first slots of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfevo.models.attention import fused_attention, within_window
from selfevo.models.transformer import Transformer
from selfevo.trie.attention import TreeContext
from selfevo.trie.trie import Ids, TokenTrie

_ROWS, _KEYS = 8, 256  # the rows and keys of a step are rounded up to these, so that steps come in few shapes


class Prefill:
    """The context in which a trie of prompts is computed; it keeps the keys and values of every layer."""

    def __init__(self, trie: TokenTrie, device: torch.device) -> None:
        self.trie = trie
        self._tree = TreeContext(trie, device)
        self._layers: list[tuple[Tensor, Tensor]] = []

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        self._layers.append((keys[0], values[0]))
        return self._tree.attend(layer, queries, keys, values, window)

    def prefix(self, nodes: Ids, dtype: torch.dtype) -> Prefix:
        """Some nodes of the trie."""
        device = self._layers[0][0].device
        chosen = torch.from_numpy(nodes).to(device)
        keys, values = (torch.stack([kept[:, chosen].to(dtype) for kept in side]) for side in zip(*self._layers))
        return Prefix(keys, values, self.trie.positions[nodes].to(device))


@dataclass(frozen=True)
class Prefix:
    """N prompt tokens, which several prompts may share: keys and values (layers, K, N, E), positions (N,)."""

    keys: Tensor
    values: Tensor
    positions: Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt: the tokens of ``prefix`` at the indices ``path``, in their order, and behind them those of ``tail``,
    which no other prompt has."""

    prefix: Prefix
    path: Tensor
    tail: Prefix | None = None


class RowCache(Protocol):
    """Takes the prompts of a prefilled trie, lets them enter a slot one at a time, adds a token to every row a step.
    ``tails`` are how many of a prompt's last tokens a cache that shares prefixes keeps with the row's own reply.

    ``advance`` reserves the place of that token; from then on a step is of the first ``rows`` slots, some of which may
    be idle, and ``span`` keys. ``extend`` reserves the places of several tokens in some slots instead: the next pass is
    of these, T tokens each, where places beyond a row's count are padding that is overwritten later. ``step`` begins a
    forward pass, for which the cache is the context.
    """

    rows: int
    span: int

    def prompts(self, prefill: Prefill, tails: Sequence[int]) -> list[Prompt]: ...
    def enter(self, slot: int, prompt: Prompt) -> None: ...
    def move(self, source: int, target: int) -> None: ...
    def advance(self, rows: int) -> None: ...
    def extend(self, slots: list[int], counts: list[int]) -> None: ...
    def step(self) -> Tensor:
        """The positions of the rows' new tokens, (rows, T)."""
        ...

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor: ...


class Slots:
    """Preallocated keys and values (layers, slots, K, capacity, E), of which ``lengths`` (slots,) are filled; ``held``
    are the same numbers, known without asking the device."""

    def __init__(self, model: Transformer, slots: int, capacity: int, dtype: torch.dtype) -> None:
        config, device = model.config, model.device
        shape = (config.num_layers, slots, config.num_kv_heads, capacity, config.head_dim)
        self.keys, self.values = (_zeros(shape, dtype, device) for _ in range(2))
        self.slots = torch.arange(slots, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)
        self.held = [0] * slots
        self.rows = self.span = 0
        self.chosen: slice | Tensor = slice(0, 0)  # the slots of this pass
        self.offsets: int | Tensor = -1  # of their new tokens' places from their lengths

    def fill(self, slot: int, length: int) -> None:
        self.lengths[slot] = self.held[slot] = length

    def move(self, source: int, target: int) -> None:
        length = self.held[source]
        for stored in (self.keys, self.values):
            stored[:, target, :, :length] = stored[:, source, :, :length]
        self.fill(target, length)

    def advance(self, rows: int) -> None:
        self.lengths[:rows] += 1
        self.held[:rows] = [length + 1 for length in self.held[:rows]]
        self.rows, self.span = rows, max(self.held[:rows])
        self.chosen, self.offsets = slice(0, rows), -1

    def extend(self, slots: list[int], counts: list[int]) -> None:
        device, width = self.lengths.device, max(counts)
        self.chosen, new = torch.tensor(slots, device=device), torch.tensor(counts, device=device)
        self.offsets = torch.arange(width, device=device) - new[:, None]
        self.rows, self.span = len(slots), max(self.held[slot] for slot in slots) + width
        self.lengths[self.chosen] += new
        for slot, count in zip(slots, counts):
            self.held[slot] += count

    def newest(self) -> Tensor:
        """The places of the rows' new tokens, (rows, T)."""
        return (self.lengths[self.chosen, None] + self.offsets).clamp(min=0)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the new keys and values (rows, K, T, E); returns all of the rows, (rows, K, span, E)."""
        rows, places = self.slots[self.chosen, None], self.newest()
        self.keys[layer, rows, :, places] = keys.transpose(1, 2).to(self.keys.dtype)
        self.values[layer, rows, :, places] = values.transpose(1, 2).to(self.values.dtype)
        return self.keys[layer, self.chosen, :, : self.span], self.values[layer, self.chosen, :, : self.span]


class SlotCache(Slots):
    """Every row has a copy of its prompt, and one call attends for all: for GPUs, where each call costs much, and for a
    single row. Idle slots and unused keys fill a step up, so that steps come in few shapes and can be captured."""

    def __init__(self, model: Transformer, slots: int, capacity: int) -> None:
        super().__init__(model, slots, capacity, model.dtype)
        self._masks: dict[int | None, Tensor] = {}  # of this step, by window

    def prompts(self, prefill: Prefill, tails: Sequence[int]) -> list[Prompt]:
        prefix = prefill.prefix(np.arange(len(prefill.trie)), self.keys.dtype)
        return [Prompt(prefix, torch.from_numpy(path.copy()).to(self.keys.device)) for path in prefill.trie.paths]

    def enter(self, slot: int, prompt: Prompt) -> None:
        length = len(prompt.path)
        self.keys[:, slot, :, :length] = prompt.prefix.keys[:, :, prompt.path]
        self.values[:, slot, :, :length] = prompt.prefix.values[:, :, prompt.path]
        self.fill(slot, length)

    def advance(self, rows: int) -> None:
        super().advance(rows)
        self.rows = min(_rounded(rows, _ROWS), len(self.held))
        self.span = min(_rounded(self.span, _KEYS), self.keys.shape[3])
        self.chosen = slice(0, self.rows)

    def step(self) -> Tensor:
        self._masks = {}
        return self.newest()

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Queries (rows, K G, T, E), new keys and values (rows, K, T, E) -> (rows, K G, T, E)."""
        keys, values = self.append(layer, keys, values)
        # The heads that share keys become queries of one head, which reads its keys once.
        grouped = queries.unflatten(1, (keys.shape[1], -1))
        if window not in self._masks:
            newest, places = self.newest(), torch.arange(self.span, device=self.lengths.device)
            allowed = places <= newest[..., None]
            if window is not None:
                allowed = allowed & within_window(newest, places.expand(self.rows, -1), window)
            heads = grouped.shape[2] if newest.shape[1] > 1 else 1  # one query a head: the mask is of all of them
            self._masks[window] = allowed[:, None].repeat(1, 1, heads, 1)
        return fused_attention(grouped.flatten(2, 3), keys, values, self._masks[window]).view_as(queries)


def _rounded(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer that need not be written before it is used: a masked place has weight 0, and 0 times what fresh memory
    may hold, NaN, is NaN. On a CPU zeros come from the operating system, which maps a page when it is touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
