"""Where a rollout keeps keys and values: of the prompts, computed prefix by prefix, and of the replies' own tokens.

Notation: K key-value heads, E head size; rows are the replies being decoded, always the first slots of a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from selfevo.models.attention import Mask, SharedPrefixes, Trunk, hide
from selfevo.models.transformer import Transformer
from selfevo.products import has_matrix_units
from selfevo.trie import Ids, TokenTrie

_ROWS, _KEYS = 8, 256  # what the rows and keys of a step are rounded up to where steps are captured
SPREAD = 1.1  # a trunk holds at most so many times the tokens of its longest prompt


class PrefillCache:
    """Keeps the keys and values of one packed row, layer by layer."""

    def __init__(self) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.layers.append((keys[0], values[0]))
        return keys, values


@dataclass(frozen=True)
class Step:
    """What the model is given to decode one token for every row."""

    positions: Tensor  # (rows, 1)
    mask: Mask
    key_positions: Tensor  # (rows, keys)


class RowCache(Protocol):
    """Takes the prompts of a prefilled trie, lets them enter a slot one at a time, adds a token to every row a step.

    ``advance`` makes room for that token; from then on a step is of the first ``rows`` slots, some of which may be
    idle, and ``span`` keys.
    """

    rows: int
    span: int

    def prompts(self, prefill: PrefillCache, trie: TokenTrie) -> list[Prompt]: ...
    def enter(self, slot: int, prompt: Prompt) -> None: ...
    def move(self, source: int, target: int) -> None: ...
    def advance(self, rows: int) -> None: ...
    def step(self) -> Step: ...
    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Prompt:
    """One prompt's keys and values: those of its ``trunk``, which others may share, that ``path`` names."""

    trunk: Trunk
    path: Tensor


def row_cache(model: Transformer, slots: int, longest: int, new: int) -> RowCache:
    """The cache for this device, with room for prompts of up to ``longest`` tokens and replies of up to ``new``."""
    if model.device.type == "cpu" and slots > 1:
        return BranchCache(model, slots, new)
    return SlotCache(model, slots, longest + new)


class _Slots:
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

    def newest(self) -> Tensor:
        """Where the rows' new tokens go, (rows,)."""
        return (self.lengths[: self.rows] - 1).clamp(min=0)

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        rows, places = self.slots[: self.rows], self.newest()
        self.keys[layer, rows, :, places] = keys[:, :, 0].to(self.keys.dtype)
        self.values[layer, rows, :, places] = values[:, :, 0].to(self.values.dtype)
        return self.keys[layer, : self.rows, :, : self.span], self.values[layer, : self.rows, :, : self.span]


class SlotCache(_Slots):
    """Every row has a copy of its prompt, and one call attends for all. For accelerators, where calls are dear, and for
    a single row.

    Steps come in few shapes, so that they can be captured: idle slots and unused keys fill them up.
    """

    def __init__(self, model: Transformer, slots: int, capacity: int) -> None:
        super().__init__(model, slots, capacity, model.dtype)

    def prompts(self, prefill: PrefillCache, trie: TokenTrie) -> list[Prompt]:
        trunk = _trunk(prefill, trie, np.arange(len(trie)), self.keys.dtype)
        return [Prompt(trunk, torch.from_numpy(path.copy()).to(self.keys.device)) for path in trie.paths]

    def enter(self, slot: int, prompt: Prompt) -> None:
        length = len(prompt.path)
        self.keys[:, slot, :, :length] = prompt.trunk.keys[:, :, prompt.path]
        self.values[:, slot, :, :length] = prompt.trunk.values[:, :, prompt.path]
        self.fill(slot, length)

    def advance(self, rows: int) -> None:
        super().advance(rows)
        self.rows = min(_rounded(rows, _ROWS), len(self.held))
        self.span = min(_rounded(self.span, _KEYS), self.keys.shape[3])

    def step(self) -> Step:
        newest, places = self.newest()[:, None], torch.arange(self.span, device=self.lengths.device)
        return Step(newest, (places <= newest)[:, None], places.expand(self.rows, -1))


class BranchCache(_Slots):
    """Rows keep the tokens of their replies alone; relatives share the trunk of their prompts. For several rows on a
    processor; in float32 unless it has units for bfloat16."""

    def __init__(self, model: Transformer, slots: int, new: int) -> None:
        units = model.dtype == torch.bfloat16 and has_matrix_units()
        super().__init__(model, slots, new, model.dtype if units else torch.promote_types(model.dtype, torch.float32))
        self.each = model.config.num_heads // model.config.num_kv_heads
        self.branches: list[Prompt | None] = [None] * slots
        self.starts = torch.zeros(slots, dtype=torch.int64)  # the lengths of the prompts
        self.shared: SharedPrefixes | None = None  # until a row comes or goes

    def prompts(self, prefill: PrefillCache, trie: TokenTrie) -> list[Prompt]:
        found: list[Prompt] = []
        for paths in _relatives(trie.paths):
            nodes = np.unique(np.concatenate(paths))
            trunk = _trunk(prefill, trie, nodes, self.keys.dtype)
            found += [Prompt(trunk, torch.from_numpy(np.searchsorted(nodes, path))) for path in paths]
        return found

    def enter(self, slot: int, prompt: Prompt) -> None:
        self.branches[slot], self.starts[slot] = prompt, len(prompt.path)
        self.fill(slot, 0)
        self.shared = None

    def move(self, source: int, target: int) -> None:
        super().move(source, target)
        self.branches[target], self.branches[source] = self.branches[source], None
        self.starts[target] = self.starts[source]
        self.shared = None

    def step(self) -> Step:
        newest, places, starts = self.newest()[:, None], torch.arange(self.span), self.starts[: self.rows, None]
        if self.shared is None or len(self.shared.order) != self.rows:
            self.branches[self.rows :] = [None] * (len(self.branches) - self.rows)  # lets go of what finished
            self.shared = _shared([branch for branch in self.branches if branch is not None], self.each)
        mask = replace(self.shared, hidden=hide(places > newest, self.keys.dtype))
        return Step(starts + newest, mask, starts + places)


def _trunk(prefill: PrefillCache, trie: TokenTrie, nodes: Ids, dtype: torch.dtype) -> Trunk:
    """Some nodes of a prefilled row."""
    chosen = torch.from_numpy(nodes).to(prefill.layers[0][0].device)
    keys, values = (torch.stack([stored[:, chosen].to(dtype) for stored in side]) for side in zip(*prefill.layers))
    return Trunk(keys, values, trie.positions[nodes].to(chosen.device), None)


def _relatives(paths: Sequence[Ids]) -> list[list[Ids]]:
    """Splits a trie's paths, in their order, into runs that share so much that one trunk for all wastes little."""
    groups: list[list[Ids]] = []
    union, longest = np.empty(0, dtype=np.int64), 0
    for path in paths:
        joined = np.union1d(union, path)
        if groups and len(joined) <= SPREAD * max(longest, len(path)):
            groups[-1].append(path)
            union, longest = joined, max(longest, len(path))
        else:
            groups.append([path])
            union, longest = path, len(path)
    return groups


def _shared(branches: Sequence[Prompt], each: int) -> SharedPrefixes:
    """Rows, trunk by trunk; what they own is not known yet."""
    rows: dict[int, list[int]] = {}
    for row, branch in enumerate(branches):
        rows.setdefault(id(branch.trunk), []).append(row)
    trunks = []
    for members in rows.values():
        trunk = branches[members[0]].trunk
        hidden = torch.ones(len(members), len(trunk.depths), dtype=torch.bool)
        for place, row in enumerate(members):
            hidden[place, branches[row].path] = False
        trunks.append(replace(trunk, hidden=hide(hidden, trunk.keys.dtype, each) if bool(hidden.any()) else None))
    order = torch.tensor([row for members in rows.values() for row in members])
    sizes = [len(members) for members in rows.values()]
    return SharedPrefixes(trunks, sizes, order, order.argsort(), torch.empty(0), each)


def _rounded(number: int, multiple: int) -> int:
    return math.ceil(number / multiple) * multiple


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room that need not be written before it is used: a masked place has weight 0, and 0 times what fresh memory may
    hold, NaN, is NaN. On a processor zeros come from the system, which maps a page when it is touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
