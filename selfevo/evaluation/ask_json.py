"""Requests to a model for JSON, repeated where the answer cannot be used."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from selfevo.dialogue import Messages


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or None and the reason in a word ("http_500", "timeout", "connection", "not_json",
    "malformed", "too_long"). ``error`` is "cut_at_limit" beside a text that the token limit ended.

    ``said`` is what the server said, ``final`` means that no other request can succeed, ``kept`` that the answer is of
    an earlier run.
    """

    text: str | None
    error: str = ""
    said: str = field(default="", compare=False)
    final: bool = field(default=False, compare=False)
    kept: bool = field(default=False, compare=False)


class Responder(Protocol):
    """Answers conversations, in order; another ``attempt`` requests new answers in place of unusable ones."""

    @property
    def name(self) -> str: ...
    def answer(self, conversations: Sequence[Messages], *, attempt: int = 1, label: str = "") -> list[Answer]: ...


def request_hash(request: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()


A = TypeVar("A")
T = TypeVar("T")
TRIES = 3  # requests for one usable answer
_FENCED = re.compile(r"\A```\w*\s(.*)```\Z", re.DOTALL)
_OBJECT = re.compile(r'\{\s*"')
_THOUGHTS = "think|thinking|thought|reasoning"
_THOUGHT = re.compile(rf"\s*(?:<(?:{_THOUGHTS})>|\[THINK\])", re.IGNORECASE)
_THOUGHT_END = re.compile(rf"</(?:{_THOUGHTS})>|\[/THINK\]", re.IGNORECASE)


class UnusableAnswerError(ValueError):
    """A judge's answer that breaks the rules; the message is the reason in a word or two, to be counted."""


def ask_again(
    indices: Sequence[int],
    tries: int,
    ask: Callable[[list[int], int], Sequence[A]],
    use: Callable[[int, A, int], bool],
    free: Callable[[A], bool] = lambda answer: False,
) -> list[int]:
    """Requests an answer for each index, and another one where it could not be used, up to ``tries`` times.

    ``ask(indices, attempt)`` gives the answers, ``use(index, answer, attempt)`` says whether that was all, and attempts
    are counted from 1. An answer that is ``free`` uses up no try. Returns the indices whose tries are used up.
    """
    pending, left = list(indices), dict.fromkeys(indices, tries)
    attempt = 0
    while pending and tries > 0:
        attempt += 1
        unused = []
        for index, answer in zip(pending, ask(pending, attempt)):
            if not use(index, answer, attempt):
                unused.append(index)
                left[index] -= not free(answer)
        pending = [index for index in unused if left[index] > 0]
    return [index for index in indices if left[index] <= 0]


def ask_json(
    responder: Responder,
    conversations: Sequence[Messages],
    read: Callable[[Mapping[str, Any]], T],
    counts: Counter[str],
    *,
    tries: int = TRIES,
    label: str = "",
) -> list[T | None]:
    """What ``read`` makes of each answer's JSON object, or None where no try gave a usable one.

    ``read`` raises UnusableAnswerError for an object that breaks its rules. Counts ``answered``, ``given_up``, the
    reason of every failed try, and what was mended in those that were used (``mended_...``). An answer kept from an
    earlier run that cannot be used is requested anew, as the server or the judge may have been mended since.
    """
    found: list[T | None] = [None] * len(conversations)

    def ask(indices: list[int], attempt: int) -> list[Answer]:
        name = label if attempt == 1 else f"{label}, try {attempt}"
        return responder.answer([conversations[index] for index in indices], attempt=attempt, label=name)

    def use(index: int, answer: Answer, attempt: int) -> bool:
        mended: Counter[str] = Counter()
        try:
            if answer.text is None or answer.error:
                raise UnusableAnswerError(answer.error or "no_answer")
            found[index] = read(json_object(answer.text, mended))
        except UnusableAnswerError as error:
            counts[str(error)] += 1
            return answer.final
        counts.update(mended)
        return True

    ask_again(range(len(conversations)), tries, ask, use, free=lambda answer: answer.kept)
    given_up = sum(value is None for value in found)
    counts["answered"] += len(conversations) - given_up
    counts["given_up"] += given_up
    return found


def json_object(text: str, mended: Counter[str] | None = None) -> dict[str, Any]:
    """The one JSON object in an answer, proper JSON as it stands. What was left out around it is counted in ``mended``:
    "mended_thoughts", "mended_fence" or "mended_prose". Raises UnusableAnswerError where there is none, or several that
    are not the same."""
    start = answer_start(text)
    text = text[start:].strip()
    fenced = _FENCED.match(text)
    found, whole = _objects(fenced[1].strip() if fenced else text)
    if not found:
        raise UnusableAnswerError("not_an_object" if whole else "not_json")
    if any(other != found[0] for other in found[1:]):
        raise UnusableAnswerError("ambiguous")
    if mended is not None:
        around = {"thoughts": start, "prose": not whole, "fence": whole and fenced}
        mended.update(f"mended_{name}" for name, there in around.items() if there)
    return found[0]


def answer_start(text: str) -> int:
    """Where an answer begins, behind what a model thought first: the length of the text where the thought is open.

    The beginning of a thought may be missing, as some chat templates write it into the prompt; a text that begins with
    an object has none.
    """
    if text.lstrip().startswith("{"):
        return 0
    closed = [match.end() for match in _THOUGHT_END.finditer(text)]
    start = closed[-1] if closed else 0
    return len(text) if _THOUGHT.match(text, start) else start


def _objects(text: str) -> tuple[list[dict[str, Any]], bool]:
    """The proper JSON objects in a text, outermost ones only, and whether the whole text is one JSON value."""
    value, end = _decode(text, 0)
    if text and end == len(text):
        return [value] if isinstance(value, dict) else [], True
    found: list[dict[str, Any]] = []
    begin = _OBJECT.search(text)
    while begin is not None:
        value, end = _decode(text, begin.start())
        if value is None:
            raise UnusableAnswerError("not_json")  # what is inside a broken object may be a part of it
        found.append(value)
        begin = _OBJECT.search(text, end)
    return found, False


def _decode(text: str, place: int) -> tuple[Any, int]:
    """The JSON value at a place of a text and where it ends; None and the place for none."""
    try:
        value, end = _DECODER.raw_decode(text, place)
    except UnusableAnswerError:
        raise
    except (ValueError, RecursionError):  # no JSON, a number of too many digits, brackets in brackets
        return None, place
    return value, end


def _unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if any(value[key] is not other and value[key] != other for key, other in pairs):
        raise UnusableAnswerError("ambiguous")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_unambiguous)
