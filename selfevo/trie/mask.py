"""What the nodes of a packed trie may attend to: a dense mask, or, costing far less, a few tiles of it.

Most of a dense mask is forbidden, as replies do not see each other. In depth-first order with the longest sequences
first, the row falls into a few chains, each of which attends to itself and to a few whole stretches before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from selfevo.trie.trie import TokenTrie

DENSE_FOREST = 96  # nodes; what hangs below one node and has no more of them shares one tile


@dataclass(frozen=True)
class Tile:
    """Consecutive nodes, ``rows``, that attend to the nodes of the slices ``seen``, the last of which ends with them.

    ``blocked`` (rows, rows), on the CPU, is True where a node may not attend among the rows themselves; all else that
    is seen may be attended to.
    """

    rows: slice
    seen: tuple[slice, ...]
    blocked: Tensor
    device: torch.device

    @cached_property
    def mask(self) -> Tensor | None:
        """(rows, seen), True where a node may attend; None where that is a plain chain that sees nothing else."""
        count = len(self.blocked)
        before = sum(part.stop - part.start for part in self.seen) - count
        if not before and torch.equal(self.blocked, _later(count)):
            return None
        return torch.cat((self.blocked.new_ones(count, before), ~self.blocked), dim=1).to(self.device)


@dataclass(frozen=True)
class TreeMask:
    """The attention mask of a packed trie: each node sees itself and its ancestors."""

    trie: TokenTrie
    device: torch.device

    @cached_property
    def dense(self) -> Tensor:
        """(N, N) boolean, True where a node may attend."""
        nodes = torch.arange(len(self.trie), device=self.device)
        before = nodes[None, :] <= nodes[:, None]
        return before & (nodes[:, None] < self.trie.ends.to(self.device)[None, :])

    @cached_property
    def tiles(self) -> list[Tile]:
        """Chains and small forests, in the order of the row; together their rows are all nodes."""
        return list(self._tiles(0, len(self.trie), ()))

    @cached_property
    def pieces(self) -> tuple[list[int], list[list[int]]]:
        """The sizes of the pieces into which the tiles cut the row, and the pieces that each tile sees."""
        edges = sorted({edge for tile in self.tiles for part in tile.seen for edge in (part.start, part.stop)})
        place = {edge: number for number, edge in enumerate(edges)}
        seen = [[n for part in tile.seen for n in range(place[part.start], place[part.stop])] for tile in self.tiles]
        return [stop - start for start, stop in pairwise(edges)], seen

    def _tiles(self, start: int, stop: int, before: tuple[slice, ...]) -> Iterator[Tile]:
        """Those of the subtrees laid out in start..stop, which all hang below the same nodes ``before`` them."""
        ends, depths = self.trie.ends, self.trie.positions
        if stop - start <= DENSE_FOREST:
            yield self._tile(slice(start, stop), before)
            return
        while start < stop:
            breaks = (depths[start:stop].diff() != 1).nonzero()
            leaf = start + int(breaks[0]) if len(breaks) else stop - 1  # where the first chain ends
            yield self._tile(slice(start, leaf + 1), before)
            end, node = int(ends[start]), leaf + 1
            while node < end:
                parent = start + int(depths[node] - depths[start]) - 1
                later = (depths[node:end] < depths[node]).nonzero()
                after = node + int(later[0]) if len(later) else end
                yield from self._tiles(node, after, _joined((*before, slice(start, parent + 1))))
                node = after
            start = end

    def _tile(self, rows: slice, before: tuple[slice, ...]) -> Tile:
        nodes = torch.arange(rows.start, rows.stop)
        blocked = _later(len(nodes)) | (nodes[:, None] >= self.trie.ends[rows][None, :])
        return Tile(rows, _joined((*before, rows)), blocked, self.device)


def _later(count: int) -> Tensor:
    """(count, count), True above the diagonal: what a chain may not attend to."""
    return torch.ones(count, count, dtype=torch.bool).triu(1)


def _joined(parts: tuple[slice, ...]) -> tuple[slice, ...]:
    """Slices in order, with neighbours made one."""
    joined: list[slice] = []
    for part in parts:
        if joined and joined[-1].stop == part.start:
            part = slice(joined.pop().start, part.stop)
        joined.append(part)
    return tuple(joined)
