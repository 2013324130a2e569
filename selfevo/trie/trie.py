"""The token trie: sequences that share prefixes, merged so that every distinct prefix is computed once.

The nodes are laid out depth first in one packed row. A node's subtree is then a contiguous stretch of it, so node j is
an ancestor of node i exactly when ``j <= i < ends[j]``, and that is the whole attention mask. With each node's depth
as its position, a causal model gives every node the hidden state that it would have in its own sequence.
The longest sequence below any node is laid out first, so that the row falls into few chains (see ``mask.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]


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


def as_ids(sequence: Sequence[int] | Ids) -> Ids:
    return np.asarray(sequence, dtype=np.int64)


def sort_key(sequence: Ids) -> bytes:
    """Bytes that sort as the sequences do: sequences with a common prefix become neighbours."""
    return sequence.astype(">u4").tobytes()


def shared_prefix(a: Ids, b: Ids) -> int:
    """How many leading tokens two sequences have in common."""
    length = min(len(a), len(b))
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length


def private_tails(sequences: Sequence[Ids]) -> list[int]:
    """How many of the last tokens of each sequence are behind all that it shares with any other."""
    order = sorted(range(len(sequences)), key=lambda index: sort_key(sequences[index]))
    links = [0, *(shared_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)), 0]  # between neighbours
    shared = {index: max(links[place : place + 2]) for place, index in enumerate(order)}
    return [len(sequence) - shared[index] for index, sequence in enumerate(sequences)]


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


@dataclass
class _Branch:
    """A node of the trie where sequences end or part: those ending here (``own``) and the branches below."""

    depth: int
    own: list[int]
    below: list[_Branch]
    longest: int = 0


def _long_first(order: list[int], arrays: Sequence[Ids]) -> list[int]:
    """Indices of sequences in lexicographic order, rearranged so that below every node the longest one comes first.

    The others follow in the order of how much they share with it, most first, so that its nodes stay neighbours. The
    branches are found from neighbours' common prefixes, as a suffix tree is from a suffix array.
    """
    path = [_Branch(0, [], [])]  # from the root to the newest sequence
    previous = as_ids([])
    for index in order:
        array = arrays[index]
        link, previous = shared_prefix(previous, array), array
        _close(path, link)
        if path[-1].depth == len(array):
            path[-1].own.append(index)
        else:
            path.append(_Branch(len(array), [index], []))
            path[-2].below.append(path[-1])
    root = path[0]
    _close(path, -1)
    result: list[int] = []
    waiting: list[_Branch | list[int]] = [root]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            result += part
        else:
            part.below.reverse()  # the stack gives the longest branch first, and of equally long ones the first
            part.below.sort(key=lambda branch: branch.longest)
            waiting += [part.own, *part.below]
    return result


def _close(path: list[_Branch], depth: int) -> None:
    """Leaves the branches of a path that are deeper than ``depth``; what parts there from the path gets a branch."""
    while path and path[-1].depth > depth:
        branch = path.pop()
        branch.longest = max([branch.depth, *(below.longest for below in branch.below)])
        if path and path[-1].depth < depth:
            path[-1].below[-1] = _Branch(depth, [], [branch])
            path.append(path[-1].below[-1])
