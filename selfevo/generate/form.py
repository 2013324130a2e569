"""Forms: replies whose fixed text is given, while the model fills the slots between. Ids only; see ``json_form``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Step(NamedTuple):
    """What an id does in a slot: the state it leads to (None ends the slot), and the ids that are left of it where the
    slot ends with it. Where the slot goes on the id stays whole."""

    state: int | None
    left: tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """What may be written in a slot: an automaton over ids, which begins in state 0.

    ``banned`` has for each state the ids (N,) that may not come next, ``steps`` for each state those of the others that
    do more than to lead to state 1.
    """

    banned: tuple[Tensor, ...]
    steps: tuple[Mapping[int, Step], ...]

    @property
    def most_left(self) -> int:
        return max([1, *(len(step.left) for steps in self.steps for step in steps.values())])

    def step(self, state: int, token: int) -> Step:
        return self.steps[state].get(token) or Step(1, (token,))


@dataclass(frozen=True)
class Slot:
    """A place to fill: by these rules, with at most ``limit`` sampled ids."""

    rules: Rules
    limit: int


@dataclass(frozen=True)
class Form:
    """Fixed ids before, between and after the slots; only those before the first slot may be missing.

    Raises ValueError for a form of another shape.
    """

    fixed: tuple[tuple[int, ...], ...]
    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        if not self.slots or len(self.fixed) != len(self.slots) + 1 or not all(self.fixed[1:]):
            raise ValueError("a form needs slots, and fixed ids behind each of them")
        if any(slot.limit < 1 for slot in self.slots):
            raise ValueError("a slot needs room for at least one token")

    @property
    def longest(self) -> int:
        """The ids of the longest reply."""
        return sum(map(len, self.fixed)) + sum(slot.limit - 1 + slot.rules.most_left for slot in self.slots)

    @property
    def longest_run(self) -> int:
        """The most ids that a reply gains by a sampled one."""
        return max(slot.rules.most_left + len(behind) for slot, behind in zip(self.slots, self.fixed[1:]))

    def ends_full(self, reply: Sequence[int]) -> bool:
        """Whether the last slot of a reply in this form took all the ids that it may: its limit may have ended it."""
        place = count = 0
        for slot, before, behind in zip(self.slots, self.fixed, self.fixed[1:]):
            place, count, state = place + len(before), 0, 0
            # Fixed ids end the slot where its rules let it end, in state 1: elsewhere the same ids are content.
            while state != 1 or tuple(reply[place : place + len(behind)]) != behind:
                state = slot.rules.step(state, reply[place]).state or 1
                place, count = place + 1, count + 1
        return count >= self.slots[-1].limit


class Filling:
    """One reply on its way through a form. ``finished`` once the last slot is filled."""

    def __init__(self, form: Form) -> None:
        self.form, self.place, self.state, self.taken = form, 0, 0, 0

    @property
    def finished(self) -> bool:
        return self.place == len(self.form.slots)

    @property
    def banned(self) -> Tensor:
        """The ids that may not be sampled next, (N,)."""
        return self.form.slots[self.place].rules.banned[self.state]

    def take(self, token: int) -> list[int]:
        """A sampled id -> the ids that the reply gains: itself, or what is left of it and the fixed ids behind the slot
        that it ends."""
        slot = self.form.slots[self.place]
        state, left = slot.rules.step(self.state, token)
        self.taken += 1
        if state is not None and self.taken < slot.limit:
            self.state = state
            return [token]
        self.place, self.state, self.taken = self.place + 1, 0, 0
        return [*left, *self.form.fixed[self.place]]
