"""Settings composed of parts: leaves, their names and defaults, and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest

from selfevo.decoupled import DecoupledConfig
from selfevo.evolve import EvolveConfig
from selfevo.evolve.settings import REQUIRED, _leaves, change, compose, flatten, leaves


@dataclass(frozen=True)
class Part:
    size: Annotated[int, "a size"] = 1
    names: Annotated[tuple[str, ...], "names", "titles"] = ()
    derived: int = 5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must not be negative: {self.size}")


@dataclass(frozen=True, kw_only=True)
class Whole:
    part: Part = Part(size=2)
    out: Annotated[str, "a folder"]


def test_leaves_have_the_defaults_of_the_whole_not_of_the_part() -> None:
    assert {name: leaf.default for name, leaf in leaves(Whole).items()} == {"size": 2, "titles": (), "out": REQUIRED}
    assert compose(Whole, {"out": "o"}) == Whole(out="o")
    assert compose(Whole, {"out": "o"}).part.size == 2


def test_composing_what_was_flattened_gives_the_same_settings() -> None:
    whole = Whole(part=Part(3, ("a", "b")), out="o")
    values = flatten(whole)
    assert values == {"size": 3, "titles": ("a", "b"), "out": "o"}
    assert compose(Whole, values | {"titles": ["a", "b"], "unknown": 1}) == whole


def test_a_change_keeps_all_else_and_knows_its_names() -> None:
    whole = Whole(part=Part(3, derived=7), out="o")
    assert change(whole, titles=("a",), out="p") == Whole(part=Part(3, ("a",), 7), out="p")
    with pytest.raises(ValueError, match="Whole has no setting derived, sizes"):
        change(whole, sizes=1, derived=2)
    with pytest.raises(ValueError, match="size must not be negative"):
        change(whole, size=-1)


def test_what_has_no_default_must_be_given() -> None:
    with pytest.raises(ValueError, match="out has no default"):
        compose(Whole, {})


@pytest.mark.parametrize("kind", [EvolveConfig, DecoupledConfig])
def test_no_two_leaves_of_a_run_have_one_name(kind: type) -> None:
    given = {"backbone": "b", "esconv": "e", "out": "o"}
    config = compose(kind, given)
    assert set(flatten(config)) == set(leaves(kind))
    assert compose(kind, flatten(config)) == config
    counted = [leaf.name for leaf in _leaves(kind, REQUIRED)]
    assert sorted(counted) == sorted(set(counted))
