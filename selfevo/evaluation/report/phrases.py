"""The phrases that a model falls back on (Figure 6): how sentences begin, and runs of words, against a background."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from selfevo.metrics import word_pattern

OPENER = 3  # words at the beginning of a sentence
SIZES = (4, 5, 6)  # words anywhere in a sentence
_SAME = 0.75  # a phrase that shares words with a listed one, and this share of its replies, says nothing new
_SENTENCE_END = re.compile(r"[.!?…।。！？؟]+|\n")


@dataclass(frozen=True)
class Phrase:
    """``words`` joined by spaces, and the number of replies that hold them."""

    words: str
    replies: int


def phrases_of(text: str) -> set[str]:
    """The first three words of each sentence, and all runs of four to six words in one; lower-cased, with apostrophes.

    Shorter runs from the middle of a sentence ("that you are") are the glue of any English text.
    """
    found: set[str] = set()
    plain = unicodedata.normalize("NFC", text).lower().replace("’", "'").replace("_", " ")
    for sentence in _SENTENCE_END.split(plain):
        words = _spoken_word().findall(sentence)
        found |= set(_runs(words[:OPENER], OPENER)).union(*(_runs(words, size) for size in SIZES))
    return found


@cache
def _spoken_word() -> re.Pattern[str]:
    return re.compile(f"{word_pattern()}(?:'{word_pattern()})*")


def frequent_phrases(replies: Sequence[str], background: Sequence[str], top: int) -> list[Phrase]:
    """The ``top`` phrases by how many replies hold them times the logarithm of how much rarer they are in the
    ``background`` (what seekers say), each counted once per reply.

    A phrase that no reply more holds than the background does is left out, and so is one that overlaps with a phrase
    listed before it (by two words or more) and shares three quarters of its own replies with that: the windows on one
    long phrase are listed once. Of equal ones the longest comes first, then the first in the alphabet.
    """
    holders: dict[str, set[int]] = {}
    for index, text in enumerate(replies):
        for phrase in phrases_of(text):
            holders.setdefault(phrase, set()).add(index)
    elsewhere = Counter(phrase for text in background for phrase in phrases_of(text))

    def weight(phrase: str) -> float:
        held = len(holders[phrase])
        if not background:
            return float(held)
        return held * math.log((held / len(replies)) / ((elsewhere[phrase] + 0.5) / len(background)))

    found: list[Phrase] = []
    weights = {phrase: weight(phrase) for phrase in holders}
    for phrase in sorted(weights, key=lambda phrase: (-weights[phrase], -phrase.count(" "), phrase)):
        if len(found) == top or weights[phrase] <= 0:
            break
        held, pairs = holders[phrase], _pairs(phrase)
        shared = (len(held & holders[other.words]) for other in found if pairs & _pairs(other.words))
        if max(shared, default=0) < _SAME * len(held):
            found.append(Phrase(phrase, len(held)))
    return found


def phrase_shares(replies: Mapping[str, Sequence[str]], phrases: Sequence[str]) -> dict[str, list[float]]:
    """Per model the share of its replies, 0..1, that hold each of the ``phrases``; one without replies is left out."""
    found = {name: [phrases_of(text) for text in texts] for name, texts in replies.items() if texts}
    return {
        name: [sum(phrase in own for own in held) / len(held) for phrase in phrases] for name, held in found.items()
    }


def _runs(words: Sequence[str], size: int) -> list[str]:
    return [" ".join(words[start : start + size]) for start in range(len(words) - size + 1)]


def _pairs(phrase: str) -> set[str]:
    return set(_runs(phrase.split(), 2))
