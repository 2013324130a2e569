"""Splits sequences into packs of a token budget; sequences with a common prefix stay together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from selfevo.trie.trie import Ids, as_ids, shared_prefix, sort_key


def pack(items: Sequence[Sequence[Ids]], max_tokens: int) -> list[list[int]]:
    """Splits items, each a few sequences that stay together, into packs of about ``max_tokens`` distinct tokens.

    Items are taken in lexicographic order, so that common prefixes share a pack; a full pack ends where neighbours
    share least, if that leaves it at least half full. Returns the items' indices, pack by pack; an item that is larger
    than the budget has a pack of its own.
    """
    order = sorted(range(len(items)), key=lambda index: sort_key(items[index][0]))
    packs: list[list[int]] = []
    links: list[int] = []  # of the last pack: what each item shares with the one before it
    costs: list[int] = []  # and the distinct tokens that it adds
    filled = 0  # the sum of the costs
    previous = as_ids([])
    for index in order:
        own, link = _distinct(items[index]), shared_prefix(previous, items[index][0])
        if packs and filled + own - link > max_tokens:
            cut = _weakest([*links, link], costs, max_tokens)
            packs.append(packs[-1][cut:])
            del packs[-2][cut:]
            links, costs = links[cut:], costs[cut:]
            if costs:
                costs[0] += links[0]
            filled = sum(costs)
            if filled + own - link > max_tokens and costs:
                packs.append([])
                links, costs, filled = [], [], 0
        if not packs:
            packs.append([])
        packs[-1].append(index)
        links.append(link)
        costs.append(own - link if costs else own)
        filled += costs[-1]
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
