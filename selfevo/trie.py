"""The token trie: sequences that share prefixes, merged so that every distinct prefix is computed once.

The nodes are laid out depth first in one packed row. A node's subtree is then a contiguous stretch of it, so node j is
an ancestor of node i exactly when ``j <= i < ends[j]``, and that is the whole attention mask. With each node's depth
as its position, a causal model gives every node the hidden state that it would have in its own sequence.

Most of a dense mask is forbidden: replies do not see each other. The longest sequence below any node is laid out first,
so that the row falls into a few chains, each of which attends to itself and to a few whole stretches before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
DENSE_FOREST = 96  # nodes; what hangs below one node and has no more of them shares one call


@dataclass(frozen=True)
class Stretch:
    """Consecutive nodes whose attention is one call: to the ancestors ``before`` all of them, and among themselves.

    ``mask`` is (nodes, before + nodes), True where a node may attend; None where nothing comes before a plain chain.
    """

    nodes: slice
    before: tuple[slice, ...]
    mask: Tensor | None


@dataclass(frozen=True)
class Block:
    """Consecutive nodes, ``rows``, that attend to the stretches ``seen``, the last of which ends with their own.

    ``hidden`` (rows, last) is True where a node may not attend among the last so many that the block sees, which end
    with its own; None where it may to all.
    """

    rows: slice
    seen: tuple[slice, ...]
    hidden: Tensor | None


@dataclass(frozen=True)
class TreeMask:
    """What the nodes of a packed row may attend to: ``dense`` (N, N) boolean, or, costing far less, ``stretches``, or
    ``blocks`` of few rows each."""

    trie: TokenTrie
    device: torch.device
    _blocks: dict[int, list[Block]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @cached_property
    def dense(self) -> Tensor:
        nodes = torch.arange(len(self.trie), device=self.device)
        before = nodes[None, :] <= nodes[:, None]
        return before & (nodes[:, None] < self.trie.ends.to(self.device)[None, :])

    @cached_property
    def stretches(self) -> list[Stretch]:
        return list(self._stretches(0, len(self.trie), ()))

    @cached_property
    def pieces(self) -> tuple[list[int], list[list[int]]]:
        """The sizes of the pieces into which the stretches cut the row, and the pieces that each of them attends to."""
        parts = [(*stretch.before, stretch.nodes) for stretch in self.stretches]
        edges = sorted({edge for seen in parts for part in seen for edge in (part.start, part.stop)})
        place = {edge: number for number, edge in enumerate(edges)}
        attended = [[n for part in seen for n in range(place[part.start], place[part.stop])] for seen in parts]
        return [stop - start for start, stop in pairwise(edges)], attended

    def blocks(self, rows: int) -> list[Block]:
        """The stretches, of which long chains are cut so that no block has more ``rows``; a forest stays whole."""
        if rows not in self._blocks:
            self._blocks[rows] = [block for stretch in self.stretches for block in self._cut(stretch, rows)]
        return self._blocks[rows]

    def _cut(self, stretch: Stretch, rows: int) -> Iterator[Block]:
        start, stop = stretch.nodes.start, stretch.nodes.stop
        step = rows if stop - start > DENSE_FOREST else stop - start
        for first in range(start, stop, step):
            own = slice(first, min(first + step, stop))
            count = own.stop - own.start
            hidden = torch.ones(count, count, dtype=torch.bool, device=self.device).triu(1)
            if count == stop - start and stretch.mask is not None:
                hidden = ~stretch.mask[:, -count:]
            seen = _joined((*stretch.before, slice(start, own.stop)))
            yield Block(own, seen, hidden if bool(hidden.any()) else None)

    def _stretches(self, start: int, stop: int, before: tuple[slice, ...]) -> Iterator[Stretch]:
        """Those of the subtrees laid out in start..stop, which all hang below the same nodes ``before`` them."""
        ends, depths = self.trie.ends, self.trie.positions
        if stop - start <= DENSE_FOREST:
            yield self._stretch(slice(start, stop), before, ends)
            return
        while start < stop:
            breaks = (depths[start:stop].diff() != 1).nonzero()
            leaf = start + int(breaks[0]) if len(breaks) else stop - 1  # where the first chain ends
            yield self._stretch(slice(start, leaf + 1), before, ends)
            end, node = int(ends[start]), leaf + 1
            while node < end:
                parent = start + int(depths[node] - depths[start]) - 1
                later = (depths[node:end] < depths[node]).nonzero()
                after = node + int(later[0]) if len(later) else end
                yield from self._stretches(node, after, _joined((*before, slice(start, parent + 1))))
                node = after
            start = end

    def _stretch(self, nodes: slice, before: tuple[slice, ...], ends: Tensor) -> Stretch:
        count, known = nodes.stop - nodes.start, sum(part.stop - part.start for part in before)
        own = torch.arange(nodes.start, nodes.stop)
        sees = (own[None, :] <= own[:, None]) & (own[:, None] < ends[nodes][None, :])
        if not known and bool((ends[nodes] >= nodes.stop).all()):
            return Stretch(nodes, before, None)
        mask = torch.cat((torch.ones(count, known, dtype=torch.bool), sees), dim=1)
        return Stretch(nodes, before, mask.to(self.device))


def _joined(parts: tuple[slice, ...]) -> tuple[slice, ...]:
    """Slices in order, with neighbours made one."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return tuple(joined)


@dataclass(frozen=True)
class TokenTrie:
    """N distinct prefixes of some sequences as one packed row.

    ``tokens``, ``positions`` (depths) and ``ends`` (one past the last node of the subtree) are (N,) int64;
    ``paths[s]`` gives the node of each token of the s-th sequence, in the order in which the sequences were given.
    """

    tokens: Tensor
    positions: Tensor
    ends: Tensor
    paths: list[Ids]

    def __len__(self) -> int:
        return len(self.tokens)

    def mask(self, device: torch.device | str = "cpu") -> TreeMask:
        """Where the nodes may attend: each to itself and its ancestors."""
        return TreeMask(self, torch.device(device))


def as_ids(sequence: Sequence[int] | Ids) -> Ids:
    return np.asarray(sequence, dtype=np.int64)


def sort_key(sequence: Ids) -> bytes:
    """Bytes that compare as the sequences do: relatives become neighbours."""
    return sequence.astype(">u4").tobytes()


def shared_prefix(a: Ids, b: Ids) -> int:
    """How many leading tokens two sequences have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def build_trie(sequences: Sequence[Sequence[int] | Ids]) -> TokenTrie:
    """Merges non-empty id sequences; equal ones share all their nodes. No Python work per token."""
    arrays = [as_ids(sequence) for sequence in sequences]
    if not arrays or any(len(array) == 0 for array in arrays):
        raise ValueError("a token trie needs at least one sequence, and none of them empty")
    order = _long_first(sorted(range(len(arrays)), key=lambda index: sort_key(arrays[index])), arrays)
    total = sum(map(len, arrays))
    ends = np.empty(total, dtype=np.int64)
    tokens, positions = np.empty(total, dtype=np.int64), np.empty(total, dtype=np.int64)
    paths: list[Ids] = [as_ids([])] * len(arrays)
    previous, path, size = as_ids([]), as_ids([]), 0
    for index in order:
        array = arrays[index]
        shared = shared_prefix(previous, array)
        ends[path[shared:]] = size  # these branches are complete
        new = slice(size, size + len(array) - shared)
        tokens[new], positions[new] = array[shared:], np.arange(shared, len(array))
        path = np.concatenate((path[:shared], np.arange(new.start, new.stop)))
        previous, size = array, new.stop
        paths[index] = path
    ends[path] = size
    row = [torch.from_numpy(values[:size].copy()) for values in (tokens, positions, ends)]
    return TokenTrie(row[0], row[1], row[2], paths)


def _long_first(order: list[int], arrays: Sequence[Ids]) -> list[int]:
    """Indices of sequences in lexicographic order, rearranged so that below every node the longest one comes first.

    What leaves the longest sequence latest follows it first: depth first, the trunk's nodes stay neighbours.
    """
    if len(order) < 3:
        return sorted(order, key=lambda index: -len(arrays[index]))
    trunk = max(order, key=lambda index: len(arrays[index]))
    branches: dict[int, list[int]] = {}
    for index in order:
        if index != trunk:
            branches.setdefault(shared_prefix(arrays[trunk], arrays[index]), []).append(index)
    result = [trunk]
    for depth in sorted(branches, reverse=True):
        result += _long_first(branches[depth], arrays)
    return result


def pack(items: Sequence[Sequence[Ids]], max_tokens: int) -> list[list[int]]:
    """Splits items, each a few sequences that stay together, into packs of about ``max_tokens`` distinct tokens.

    Items are taken in lexicographic order, so that relatives share a pack; a full pack ends where neighbours have least
    in common, if that leaves it at least half full. Returns the items' indices, pack by pack; an item that is larger
    than the budget has a pack of its own.
    """
    order = sorted(range(len(items)), key=lambda index: sort_key(items[index][0]))
    packs: list[list[int]] = []
    links: list[int] = []  # of the last pack: what each item shares with the one before it
    costs: list[int] = []  # and the distinct tokens that it adds
    previous = as_ids([])
    for index in order:
        own, link = _distinct(items[index]), shared_prefix(previous, items[index][0])
        if packs and sum(costs) + own - link > max_tokens:
            cut = _weakest([*links, link], costs, max_tokens)
            packs.append(packs[-1][cut:])
            del packs[-2][cut:]
            links, costs = links[cut:], costs[cut:]
            if costs:
                costs[0] += links[0]
            if sum(costs) + own - link > max_tokens and costs:
                packs.append([])
                links, costs = [], []
        if not packs:
            packs.append([])
        packs[-1].append(index)
        links.append(link)
        costs.append(own - link if costs else own)
        previous = items[index][0]
    return packs


def _weakest(links: Sequence[int], costs: Sequence[int], max_tokens: int) -> int:
    """The item that shares least with the one before it, the last of several, once the pack is half full."""
    filled = accumulate(costs)
    late = [place for place, before in enumerate(filled, start=1) if 2 * before >= max_tokens]
    return min(late or [len(costs)], key=lambda place: (links[place], -place))


def _distinct(sequences: Sequence[Ids]) -> int:
    """Distinct prefixes of one item's sequences, each compared with the first."""
    first = sequences[0]
    return len(first) + sum(len(other) - shared_prefix(first, other) for other in sequences[1:])
