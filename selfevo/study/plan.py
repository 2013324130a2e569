"""Who talks to which model: balanced blocks by seed, scenarios, and the sides of every turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from random import Random
from typing import TypeVar

from selfevo.datasets.seeds import derive_seed

T = TypeVar("T")
POINTWISE, PAIRWISE = "pointwise", "pairwise"
MODES = (POINTWISE, PAIRWISE)
TURNS = {POINTWISE: 8, PAIRWISE: 10}  # the paper's minimum
SIDES = ("A", "B")
MOST_TURNS = 50  # of a conversation


@dataclass(frozen=True)
class StudySettings:
    """What a study is; once it has begun, none of this can change.

    ``turns`` is the least number of turns of a conversation, ``conversations`` how many a participant may have one
    after the other, ``aspects`` what is rated at the end, ``source`` identifies the models and how they are sampled.
    """

    mode: str
    models: tuple[str, ...]
    turns: int
    aspects: tuple[str, ...]
    source: str
    conversations: int = 1
    scenarios: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode should be one of {', '.join(MODES)}, not {self.mode!r}")
        if len(set(self.models)) < len(self.models) or len(self.models) < (2 if self.mode == PAIRWISE else 1):
            raise ValueError(f"a {self.mode} study needs {'two or more' if self.mode == PAIRWISE else 'different'} "
                             f"models, each named once, not {', '.join(self.models) or 'none'}")  # fmt: skip
        if not 1 <= self.turns <= MOST_TURNS:
            raise ValueError(f"the least number of turns should be from 1 to {MOST_TURNS}, not {self.turns}")
        if self.conversations < 1:
            raise ValueError(f"a participant has at least 1 conversation, not {self.conversations}")

    @property
    def units(self) -> list[tuple[str, ...]]:
        """What a conversation may be with: a model, or a pair of models."""
        return list(combinations(self.models, 2 if self.mode == PAIRWISE else 1))

    def unit(self, place: int) -> tuple[str, ...]:
        """What the conversation at a place (0, 1, ...) is with. Places come in blocks that hold each unit once."""
        block, index = divmod(place, len(self.units))
        return _shuffled(self.units, derive_seed(self.seed, "study", "block", block))[index]

    def scenario(self, place: int) -> str:
        """The scenario at a place, one for each block of units, so that every unit meets all of them; may be ""."""
        if not self.scenarios:
            return ""
        block, index = divmod(place // len(self.units), len(self.scenarios))
        return _shuffled(self.scenarios, derive_seed(self.seed, "study", "scenarios", block))[index]

    def sides(self, place: int, turn: int) -> dict[str, str]:
        """The model on each side of one turn: A and B at random, or A alone."""
        models = _shuffled(self.unit(place), derive_seed(self.seed, "study", "sides", place, turn))
        return dict(zip(SIDES, models))


def _shuffled(items: Sequence[T], seed: int) -> list[T]:
    return Random(seed).sample(list(items), len(items))
