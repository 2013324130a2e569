"""The embedded dialogues with strategies: a rule that can be learnt, habits that cannot, and their filter."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from embedded import strategies, world

from selfevo.datasets import load_esconv
from selfevo.decoupled.mining import ERRORS, Case, case_of
from selfevo.decoupled.planner import labelled_turns
from selfevo.dialogue import ESCONV_STRATEGIES

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "embedded"


def test_written_data_is_what_the_script_makes(tmp_path: Path) -> None:
    strategies.write_data(tmp_path, seed=0)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.json" for name in strategies.COUNTS}
    for path in tmp_path.iterdir():
        assert (FOLDER / "data" / path.name).read_bytes() == path.read_bytes(), path.name


def seeker_turn(text: str) -> strategies.SeekerTurn:
    """A turn by its words: greetings and fillers reveal nothing."""
    empty = {*strategies.w.HELLOS, *strategies.w.FILLERS, *strategies.w.BYES}
    says_nothing = text in empty or set(re.split(r"(?<=[.!?]) +", text)) <= empty
    return strategies.SeekerTurn(text, () if says_nothing else ("something",))


@pytest.mark.parametrize("name", list(strategies.COUNTS))
def test_supporters_follow_the_seekers_last_sentence_but_for_their_habits(name: str) -> None:
    turns = labelled_turns(load_esconv(FOLDER / "data" / f"{name}.json"), Counter())
    called = [strategies.called_for(seeker_turn(turn.context[-1].text)) for turn in turns]
    against = [turn.strategy for wanted, turn in zip(called, turns) if wanted != turn.strategy]
    assert set(against) <= set(strategies.HABITS)
    assert 0.5 * strategies.HABIT < len(against) / len(turns) < strategies.HABIT  # some habits are what is called for
    assert {turn.strategy for turn in turns} == set(ESCONV_STRATEGIES)


def test_train_and_test_share_no_conversation() -> None:
    sides = [{d.turns for d in load_esconv(FOLDER / "data" / f"{name}.json")} for name in strategies.COUNTS]
    assert sides[0].isdisjoint(sides[1])


def test_replies_that_take_up_what_was_told_are_faultless_and_general_ones_are_not() -> None:
    turns = labelled_turns(load_esconv(FOLDER / "data" / "strategies.json"), Counter())
    found = strategies.find_errors([case_of(turn, turn.example.golden.text) for turn in turns], Counter())
    for turn, errors in zip(turns, found):
        assert errors is not None
        if world.personalisation(turn.example.golden.text, case_of(turn, "").context).used:
            assert not errors
    faulty = sum(bool(errors) for errors in found) / len(found)
    assert 0.15 < faulty < strategies.GENERAL


@pytest.mark.parametrize(
    ("reply", "errors"),
    [
        ("Your cat needs you too. What happened then?", set()),
        ("You feel lonely, and that makes sense. I see.", set()),
        ("You feel angry, and that makes sense. I see.", {"lack_of_empathy", "template_like"}),  # somebody else's
        ("That sounds really hard. What happened then?", {"template_like"}),
        ("Of course. What happened then?", {"lack_of_empathy", "template_like"}),
        ("Your cat needs you too. Maybe go for a walk.", {"early_advice"}),
        ("Maybe go for a walk.", set(ERRORS)),
    ],
)
def test_each_error_has_its_reason(reply: str, errors: set[str]) -> None:
    told = [{"role": "user", "content": "I feel so lonely these days. My cat sleeps next to me."}]
    assert strategies.find_errors([Case(told, "Question", reply)], Counter()) == [frozenset(errors)]


def test_advice_is_no_error_where_it_is_the_strategy_and_a_farewell_needs_nothing() -> None:
    told = [{"role": "user", "content": "My cat sleeps next to me."}]
    advice = Case(told, "Providing Suggestions", "Your cat needs you too. Maybe go for a walk.")
    bye = Case([{"role": "user", "content": strategies.w.BYES[0]}], "Others", "All the best.")
    assert strategies.find_errors([advice, bye], Counter()) == [frozenset(), frozenset()]


def test_records_depend_on_the_generator_alone() -> None:
    first, again, other = (strategies.make_record(Random(seed), "test") for seed in (1, 1, 2))
    assert first == again != other
