"""Derived seeds: stable forever, and different for different names."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from selfevo.datasets.seeds import derive_seed


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        ((0, "split", "test"), 164418849442266692),
        ((0, "replies", "M1"), 9137075957117349769),
        ((7, "order", 3), 7057241712520603416),
        ((-1,), 7535183112812446347),
    ],
)
def test_the_rule_never_changes(arguments: tuple[Any, ...], known: int) -> None:
    """Known answers: ``int(sha256(b'[0, "split", "test"]').hexdigest()[:16], 16) >> 1``, and so on."""
    assert derive_seed(*arguments) == known


def test_other_names_or_another_seed_give_another_seed() -> None:
    names: list[tuple[str | int, ...]] = [(), ("a",), ("a", "b"), ("ab",), ("b", "a"), ("a", 1)]
    names += [(1,), ("1",), (1, 2), (12,)]
    found = [derive_seed(seed, *name) for seed, name in itertools.product((0, 1, -1), names)]
    assert len(set(found)) == len(found)
    assert all(0 <= seed < 2**63 for seed in found)
