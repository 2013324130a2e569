"""Cleaning makes dialogues alternate and says what it changed; examples and splits take whole turns and dialogues."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.dialogue import (
    ESCONV_STRATEGIES,
    OLDER_STRATEGY_NAMES,
    Dialogue,
    Example,
    Turn,
    clean_dialogue,
    reply_examples,
    split_dialogues,
    strategy_name,
    to_messages,
)

TURNS = st.builds(
    Turn,
    st.sampled_from(["seeker", "supporter"]),
    st.text(" \nab\u00a0", max_size=5),
    st.lists(st.sampled_from(ESCONV_STRATEGIES[:3]), max_size=2, unique=True).map(tuple),
)
DIALOGUES = st.lists(TURNS, max_size=10).map(lambda turns: Dialogue("d/0", tuple(turns)))


def alternating(length: int) -> Dialogue:
    """Turns "0", "1", ..., the seeker's being the even ones."""
    return Dialogue("d/7", tuple(Turn("supporter" if index % 2 else "seeker", str(index)) for index in range(length)))


def test_every_rule_changes_what_it_says_and_counts_it() -> None:
    dialogue = Dialogue(
        "d/0",
        (
            Turn("supporter", " \n"),
            Turn("supporter", "Welcome", ("Others",)),
            Turn("supporter", "Hello ", ("Question",)),
            Turn("seeker", "\tHi\n"),
            Turn("supporter", "How are you?", ("Question",)),
            Turn("seeker", " "),
            Turn("supporter", " I\n\nlisten. ", ("Others", "Question")),
            Turn("seeker", "Sad."),
            Turn("seeker", "Very."),
        ),
        system="s",
        situation="exam",
        emotion="fear",
        problem="school",
    )
    counts: Counter[str] = Counter()
    cleaned = clean_dialogue(dialogue, counts)
    assert cleaned.turns == (
        Turn("seeker", "Hi"),
        Turn("supporter", "How are you?\nI\n\nlisten.", ("Question", "Others")),
        Turn("seeker", "Sad.\nVery."),
    )
    assert dataclasses.replace(cleaned, turns=dialogue.turns) == dialogue  # all but the turns is as it was
    assert counts == {
        "blank_turns_dropped": 2,
        "leading_supporter_dropped": 2,
        "whitespace_stripped": 3,
        "turns_merged": 2,
    }


def test_a_dialogue_without_a_seeker_ends_up_empty_and_is_counted() -> None:
    counts: Counter[str] = Counter()
    cleaned = clean_dialogue(Dialogue("d/0", (Turn("supporter", "Hello?"), Turn("seeker", ""))), counts)
    assert cleaned.turns == ()
    assert counts == {"leading_supporter_dropped": 1, "blank_turns_dropped": 1, "empty_dialogues": 1}


@settings(deadline=None)
@given(DIALOGUES)
def test_cleaning_twice_changes_nothing_more(dialogue: Dialogue) -> None:
    cleaned = clean_dialogue(dialogue, Counter())
    counts: Counter[str] = Counter()
    assert clean_dialogue(cleaned, counts) == cleaned
    assert counts == ({} if cleaned.turns else {"empty_dialogues": 1})


@settings(deadline=None)
@given(DIALOGUES)
def test_a_cleaned_dialogue_alternates_from_the_seeker_and_holds_all_words_that_follow(dialogue: Dialogue) -> None:
    counts: Counter[str] = Counter()
    cleaned = clean_dialogue(dialogue, counts)
    assert [turn.speaker for turn in cleaned.turns] == ["seeker", "supporter"] * (len(cleaned.turns) // 2) + [
        "seeker"
    ] * (len(cleaned.turns) % 2)
    assert all(turn.text and turn.text == turn.text.strip() for turn in cleaned.turns)
    seekers = [i for i, turn in enumerate(dialogue.turns) if turn.speaker == "seeker" and turn.text.strip()]
    kept = dialogue.turns[seekers[0] :] if seekers else ()
    for speaker in ("seeker", "supporter"):
        before = [word for turn in kept if turn.speaker == speaker for word in turn.text.split()]
        assert before == [word for turn in cleaned.turns if turn.speaker == speaker for word in turn.text.split()]
    dropped = counts["blank_turns_dropped"] + counts["leading_supporter_dropped"] + counts["turns_merged"]
    assert len(cleaned.turns) + dropped == len(dialogue.turns)


def test_an_example_is_a_supporter_turn_with_everything_before_it() -> None:
    dialogue = alternating(12)  # replies at 1, 3, 5, 7, 9, 11
    counts: Counter[str] = Counter()
    examples = reply_examples(dialogue, counts)
    assert [example.turn for example in examples] == [3, 5, 7]
    assert examples[0] == Example("d/7", 3, dialogue.turns[:3], dialogue.turns[3])
    assert [example.id for example in examples] == ["d/7#3", "d/7#5", "d/7#7"]
    assert counts == {"examples": 3, "first_turns_skipped": 1, "last_turns_skipped": 2}


@pytest.mark.parametrize(
    ("length", "skip_first", "skip_last", "targets"),
    [
        (0, 1, 2, []),
        (1, 0, 0, []),
        (6, 1, 2, []),
        (7, 1, 2, []),
        (8, 1, 2, [3]),
        (9, 1, 2, [3]),  # ends with the seeker: the last two replies are still 5 and 7
        (4, 0, 0, [1, 3]),
        (4, 1, 0, [3]),
        (4, 0, 1, [1]),
        (4, 9, 9, []),
    ],
)
def test_the_first_and_last_replies_are_no_targets_and_every_reply_is_accounted_for(
    length: int, skip_first: int, skip_last: int, targets: list[int]
) -> None:
    counts: Counter[str] = Counter()
    examples = reply_examples(alternating(length), counts, skip_first=skip_first, skip_last=skip_last)
    assert [example.turn for example in examples] == targets
    assert counts.total() == length // 2


def test_examples_of_an_uncleaned_dialogue_and_negative_skips_are_refused() -> None:
    doubled = Dialogue("d/3", (Turn("seeker", "a"), Turn("supporter", "b"), Turn("supporter", "c")))
    with pytest.raises(ValueError, match="d/3: the turns do not alternate"):
        reply_examples(doubled, Counter())
    with pytest.raises(ValueError, match="do not alternate"):
        reply_examples(Dialogue("d/3", (Turn("supporter", "a"),)), Counter())
    with pytest.raises(ValueError, match="not be negative"):
        reply_examples(alternating(4), Counter(), skip_last=-1)


def test_messages_name_the_seeker_user_and_begin_with_a_system_text_only_if_there_is_one() -> None:
    turns = (Turn("seeker", "a"), Turn("supporter", "b", ("Question",)))
    spoken = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert to_messages(turns) == spoken
    assert to_messages(turns, "s") == [{"role": "system", "content": "s"}, *spoken]


@settings(deadline=None)
@given(
    st.integers(0, 60),
    st.lists(st.integers(1, 9), min_size=1, max_size=5).map(lambda parts: [part / sum(parts) for part in parts]),
    st.integers(0, 2**32),
)
def test_a_split_deals_every_item_out_once_in_order_and_in_proportion(
    total: int, fractions: list[float], seed: int
) -> None:
    parts = split_dialogues(range(total), fractions, seed=seed)
    assert sorted(item for part in parts for item in part) == list(range(total))
    assert all(part == sorted(part) for part in parts)
    assert all(abs(len(part) - fraction * total) < 1 for part, fraction in zip(parts, fractions, strict=True))


@pytest.mark.parametrize(
    ("total", "fractions", "sizes"),
    [
        (1300, (0.9, 0.1), [1170, 130]),
        (100, (0.29, 0.71), [29, 71]),  # 0.29 * 100 is a little less than 29
        (5, (0.5, 0.5), [3, 2]),
        (5, (0.1, 0.9), [1, 4]),  # a tie, though as floats 0.9 * 5 leaves more than 0.1 * 5
        (7, (1 / 3, 1 / 3, 1 / 3), [3, 2, 2]),
        (3, (0.9, 0.1), [3, 0]),
        (4, (1.0,), [4]),
    ],
)
def test_split_sizes_follow_the_largest_remainder(total: int, fractions: tuple[float, ...], sizes: list[int]) -> None:
    assert [len(part) for part in split_dialogues(range(total), fractions, seed=0)] == sizes


def test_a_split_depends_on_its_seed_alone_and_leaves_the_global_generator_alone() -> None:
    random.seed(1)
    state = random.getstate()
    first = split_dialogues(range(50), (0.5, 0.5), seed=3)
    assert random.getstate() == state
    random.seed(2)
    assert split_dialogues(range(50), (0.5, 0.5), seed=3) == first
    assert split_dialogues(range(50), (0.5, 0.5), seed=4) != first


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.9, 0.2), (1.5, -0.5), (1.0, 0.0), (float("nan"), 1.0)])
def test_fractions_that_are_no_fractions_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="positive and sum to 1"):
        split_dialogues([1, 2], fractions, seed=0)


def test_older_strategy_names_and_other_cases_become_the_eight_and_others_stay() -> None:
    assert len(set(ESCONV_STRATEGIES)) == 8
    assert set(OLDER_STRATEGY_NAMES.values()) <= set(ESCONV_STRATEGIES)
    counts: Counter[str] = Counter()
    for name in ESCONV_STRATEGIES:
        assert strategy_name(name, counts) == name
    assert not counts
    for older, name in OLDER_STRATEGY_NAMES.items():
        assert strategy_name(older, counts) == name
    assert strategy_name(" reflection of Feelings", counts) == "Reflection of feelings"
    assert counts == {"strategies_renamed": len(OLDER_STRATEGY_NAMES) + 1}
    assert strategy_name("Imagery", counts) == "Imagery"
    assert counts["strategies_unknown"] == 1
