"""The phrases that a model falls back on, on made-up replies and on the real supporters of ESConv."""

from __future__ import annotations

from pathlib import Path

from selfevo.datasets.corpus import read_dialogues
from selfevo.evaluation.report.phrases import Phrase, frequent_phrases, phrase_shares, phrases_of


def test_openers_have_three_words_and_runs_at_least_four_within_a_sentence() -> None:
    assert phrases_of("I’m here now. Don't you go!") == {"i'm here now", "don't you go"}
    assert phrases_of("a b c d e") == {"a b c", "a b c d", "b c d e", "a b c d e"}
    assert phrases_of("") == phrases_of("Quite alone.") == set()


def test_a_phrase_counts_once_per_reply() -> None:
    replies = ["so very sad, so very sad", "my good dog", "my good dog"]
    assert frequent_phrases(replies, [], 1) == [Phrase("my good dog", 2)]


def test_what_the_background_says_as_often_is_left_out() -> None:
    replies = ["i do not know"] * 3 + ["it sounds like it"] * 2
    assert frequent_phrases(replies, ["i do not know"] * 3 + ["yes"] * 2, 5) == [Phrase("it sounds like it", 2)]


def test_windows_on_one_long_phrase_are_listed_once() -> None:
    replies = ["you are going through a lot"] * 4
    assert frequent_phrases(replies, [], 10) == [Phrase("you are going through a lot", 4)]
    assert frequent_phrases([*replies, "you are going away"], [], 10)[0] == Phrase("you are going", 5)


def test_real_supporters_are_known_by_what_they_say(shared: Path) -> None:
    """The stock phrases of people who support, not the glue of English ("of the", "you are")."""
    dialogues = read_dialogues(str(shared / "data" / "esconv_test.json"))
    said = {
        who: [turn.text for d in dialogues for turn in d.turns if turn.speaker == who]
        for who in ("supporter", "seeker")
    }
    found = [phrase.words for phrase in frequent_phrases(said["supporter"], said["seeker"], 12)]
    assert {"it sounds like", "have you tried", "is there anything"} <= set(found)
    assert any("sorry to hear" in phrase for phrase in found)
    assert all(len(phrase.split()) >= 3 for phrase in found)


def test_shares_are_of_each_models_own_replies() -> None:
    replies = {"M0": ["i hear you well", "no"], "M1": ["yes"], "M2": []}
    assert phrase_shares(replies, ["i hear you", "i hear you well"]) == {"M0": [0.5, 0.5], "M1": [0, 0]}
    assert phrase_shares({"M0": ["a b"]}, []) == {"M0": []}


def test_words_of_every_script_are_whole() -> None:
    assert "मैं बहुत दुखी" in phrases_of("मैं बहुत दुखी हूँ। क्या करूँ?")
    assert phrases_of("one_two three") == phrases_of("one two three")
