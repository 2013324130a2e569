"""A cache for the CPU in which rows with similar prompts share one prefix, read once for all of them.

Notation: R rows, T new tokens of each, S keys of their own replies, N tokens of a prefix, K key-value heads, G query
heads that share a key head, E head size. A ``bias`` is what is added to attention scores: 0, or very negative where a
row may not attend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from selfevo.generate.cache import Prefill, Prefix, Prompt, Slots
from selfevo.kernels.private_ops import attention_and_logsumexp
from selfevo.models.transformer import Transformer
from selfevo.trie.trie import Ids

SPREAD = 1.1  # a prefix holds at most so many times the tokens of its longest prompt


@dataclass(frozen=True)
class RowGroups:
    """Which rows share a prefix. ``order`` (R,) lists the rows prefix by prefix, ``sizes`` of them each, and ``back``
    undoes it; ``blocked`` has for each prefix a boolean (rows, N), True where a row may not attend."""

    prefixes: list[Prefix]
    sizes: list[int]
    blocked: list[Tensor]
    order: Tensor
    back: Tensor


class SharedPrefixCache(Slots):
    """Rows keep the keys of their own replies, and of what their prompts do not share, in float32 or wider."""

    def __init__(self, model: Transformer, slots: int, own: int) -> None:
        super().__init__(model, slots, own, torch.promote_types(model.dtype, torch.float32))
        self._queries_per_key = model.config.num_heads // model.config.num_kv_heads
        self._entered: list[Prompt | None] = [None] * slots
        self._starts = torch.zeros(slots, dtype=torch.int64)  # the positions of the rows' first own keys
        self._groups: RowGroups | None = None  # until a row comes or goes
        self._prefix_biases: dict[int | None, list[Tensor | None]] = {}  # by window
        self._own_biases: dict[int | None, Tensor] = {}

    def prompts(self, prefill: Prefill, tails: Sequence[int]) -> list[Prompt]:
        found: list[Prompt] = []
        splits = [np.split(path, [len(path) - tail]) for path, tail in zip(prefill.trie.paths, tails)]
        own = iter(tail for _, tail in splits)
        for paths in similar_runs([path for path, _ in splits]):
            nodes = np.unique(np.concatenate(paths))
            prefix = prefill.prefix(nodes, self.keys.dtype)
            for path in paths:
                tail = prefill.prefix(next(own), self.keys.dtype)
                found.append(Prompt(prefix, torch.from_numpy(np.searchsorted(nodes, path)), tail))
        return found

    def enter(self, slot: int, prompt: Prompt) -> None:
        assert prompt.tail is not None
        self._entered[slot], self._starts[slot] = prompt, len(prompt.path)
        length = len(prompt.tail.positions)
        self.keys[:, slot, :, :length], self.values[:, slot, :, :length] = prompt.tail.keys, prompt.tail.values
        self.fill(slot, length)
        self._groups = None

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        self._entered[target], self._entered[source] = self._entered[source], None
        self._starts[target] = self._starts[source]
        self._groups = None

    def advance(self, rows: int) -> None:
        if not isinstance(self.chosen, slice) or rows != self.rows:
            self._entered[rows:] = [None] * (len(self._entered) - rows)  # frees their prefixes
            self._groups = None
        super().advance(rows)

    def extend(self, slots: list[int], counts: list[int]) -> None:
        super().extend(slots, counts)
        self._groups = None

    def step(self) -> Tensor:
        if self._groups is None:
            prompts = [self._entered[slot] for slot in self.slots[self.chosen].tolist()]
            self._groups = group_rows([prompt for prompt in prompts if prompt is not None])
            self._prefix_biases = {}
        else:  # windows move with every token, what belongs to other prompts stays
            self._prefix_biases = {w: bias for w, bias in self._prefix_biases.items() if w is None}
        self._own_biases = {}
        return self._starts[self.chosen, None] + self.newest()

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """Queries (R, K G, T, E), new keys and values (R, K, T, E) -> (R, K G, T, E)."""
        assert self._groups is not None
        keys, values = self.append(layer, keys, values)
        if window not in self._own_biases:
            self._own_biases[window] = self._own_bias(window)
        if window not in self._prefix_biases:
            self._prefix_biases[window] = self._prefix_bias(self._groups, window)
        return attend_shared(
            queries, keys, values, layer, self._groups, self._own_biases[window], self._prefix_biases[window]
        )

    def _own_bias(self, window: int | None) -> Tensor:
        newest, places = self.newest()[..., None], torch.arange(self.span)
        blocked = places > newest
        if window is not None:
            blocked = blocked | (newest - places >= window)
        return attention_bias(blocked, self.keys.dtype)

    def _prefix_bias(self, groups: RowGroups, window: int | None) -> list[Tensor | None]:
        """For each prefix (rows G T, N), or None where every row may attend to all of it."""
        positions = (self._starts[self.chosen, None] + self.newest())[groups.order].split(groups.sizes)
        biases: list[Tensor | None] = []
        for prefix, rows, blocked in zip(groups.prefixes, positions, groups.blocked):
            blocked = blocked[:, None].expand(-1, rows.shape[1], -1)
            if window is not None:
                blocked = blocked | (rows[..., None] - prefix.positions >= window)
            elif not bool(blocked.any()):
                biases.append(None)
                continue
            bias = attention_bias(blocked, self.keys.dtype)[:, None].expand(-1, self._queries_per_key, -1, -1)
            biases.append(bias.flatten(0, 2))
        return biases


def attention_bias(blocked: Tensor, dtype: torch.dtype) -> Tensor:
    """True where a row may not attend -> what is added to its scores, of the same shape.

    Finite, for the sake of rows that a window keeps from all of a prefix.
    """
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, torch.finfo(dtype).min)


def similar_runs(paths: Sequence[Ids]) -> list[list[Ids]]:
    """Splits a trie's paths, in their order, into runs that share so much that one prefix for all wastes little."""
    runs: list[list[Ids]] = []
    union, longest = np.empty(0, dtype=np.int64), 0
    for path in paths:
        joined = np.union1d(union, path)
        if runs and len(joined) <= SPREAD * max(longest, len(path)):
            runs[-1].append(path)
            union, longest = joined, max(longest, len(path))
        else:
            runs.append([path])
            union, longest = path, len(path)
    return runs


def group_rows(prompts: Sequence[Prompt]) -> RowGroups:
    """The rows with these prompts, prefix by prefix."""
    rows: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(id(prompt.prefix), []).append(row)
    prefixes, masks = [], []
    for members in rows.values():
        prefix = prompts[members[0]].prefix
        blocked = torch.ones(len(members), len(prefix.positions), dtype=torch.bool)
        for place, row in enumerate(members):
            blocked[place, prompts[row].path] = False
        prefixes.append(prefix)
        masks.append(blocked)
    order = torch.tensor([row for members in rows.values() for row in members])
    return RowGroups(prefixes, [len(members) for members in rows.values()], masks, order, order.argsort())


def attend_shared(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    layer: int,
    groups: RowGroups,
    own_bias: Tensor,
    prefix_biases: Sequence[Tensor | None],
) -> Tensor:
    """Attention (R, K G, T, E) of rows to their own keys and values (R, K, S, E) and to the prefixes they share.

    ``own_bias`` is (R, T, S), ``prefix_biases`` are (rows G T, N).

    Each part is attended to by itself, a prefix by all its rows in one product. The log-sum-exps of the scores say how
    a softmax over both divides between them, and so they are joined exactly. Computed in the dtype of the keys.
    """
    count, heads, new, size = queries.shape
    per_key = heads // keys.shape[1] * new
    rows = queries.to(keys.dtype).reshape(count, keys.shape[1], per_key, size).contiguous()
    by_head = own_bias.view(count, 1, 1, new, -1).expand(-1, -1, per_key // new, -1, -1).flatten(2, 3)
    own, own_sums = attention_and_logsumexp(rows, keys, values, by_head)
    found = []
    by_prefix = rows[groups.order].transpose(0, 1).flatten(1, 2)[None]  # (1, K, R G, E)
    parts = by_prefix.split([per_key * count for count in groups.sizes], dim=2)
    for prefix, part, bias in zip(groups.prefixes, parts, prefix_biases):
        mask = None if bias is None else bias[None, None]
        found.append(attention_and_logsumexp(part, prefix.keys[layer][None], prefix.values[layer][None], mask))
    shared, shared_sums = (
        torch.cat(side, dim=2)[0].unflatten(1, (-1, per_key)).transpose(0, 1)[groups.back] for side in zip(*found)
    )
    share = (shared_sums - own_sums).sigmoid()[..., None]
    return (
        torch.lerp(own.to(share.dtype), shared.to(share.dtype), share).view(count, heads, new, size).to(queries.dtype)
    )
