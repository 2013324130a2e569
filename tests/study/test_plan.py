"""Who talks to which model."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfevo.study.plan import MODES, StudySettings

NAMES = st.lists(st.sampled_from(["vanilla", "M0", "M1", "M2", "M3"]), min_size=2, unique=True)


def plan(mode: str, models: list[str], seed: int, scenarios: tuple[str, ...] = ()) -> StudySettings:
    return StudySettings(mode, tuple(models), 8, ("Overall",), "", scenarios=scenarios, seed=seed)


@given(st.sampled_from(MODES), NAMES, st.integers(), st.integers(0, 5))
def test_every_block_of_places_holds_each_model_or_pair_once(mode: str, models: list[str], seed: int, b: int) -> None:
    settings = plan(mode, models, seed)
    size = len(settings.units)
    assert size == (len(models) if mode == "pointwise" else len(models) * (len(models) - 1) // 2)
    units = [frozenset(settings.unit(place)) for place in range(b * size, (b + 1) * size)]
    assert len(set(units)) == size
    assert all(len(unit) == (1 if mode == "pointwise" else 2) for unit in units)


def test_every_model_meets_every_scenario_equally_often() -> None:
    settings = plan("pointwise", ["M0", "M1", "M2"], 3, ("a", "b"))
    met = Counter((settings.unit(place), settings.scenario(place)) for place in range(12))
    assert set(met.values()) == {2}
    assert len(met) == 6


def test_order_and_sides_are_random_and_those_of_the_seed() -> None:
    settings, same, other = (plan("pairwise", ["M0", "M1", "M2"], seed) for seed in (1, 1, 2))

    def drawn(plan: StudySettings) -> list[tuple[object, ...]]:
        return [(plan.unit(p), *plan.sides(p, t).items()) for p in range(20) for t in range(1, 11)]

    assert drawn(settings) == drawn(same) != drawn(other)
    first = Counter(
        settings.sides(place, turn)["A"] == min(settings.unit(place)) for place in range(50) for turn in range(10)
    )
    assert 200 < first[True] < 300  # of 500


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "triple"}, "mode"),
        ({"models": ("M0", "M0")}, "named once"),
        ({"models": ()}, "different"),
        ({"mode": "pairwise", "models": ("M0",)}, "two or more"),
        ({"turns": 0}, "turns"),
        ({"turns": 51}, "turns"),
        ({"conversations": 0}, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, object], said: str) -> None:
    values = {"mode": "pointwise", "models": ("M0",), "turns": 8, "aspects": ("Overall",), "source": ""} | change
    with pytest.raises(ValueError, match=said):
        StudySettings(**values)  # type: ignore[arg-type]
