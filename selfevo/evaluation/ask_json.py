"""Requests to a model for JSON, repeated where the answer cannot be used."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from selfevo.dialogue import Messages


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or None and the reason in a word ("http_500", "timeout", "connection", "not_json",
    "malformed", "too_long"). ``error`` is "cut_at_limit" beside a text that the token limit ended."""

    text: str | None
    error: str = ""


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
_FENCED = re.compile(r"\A```(?:json)?\s*\n(.*)\n```\Z", re.DOTALL)


class UnusableAnswerError(ValueError):
    """A judge's answer that breaks the rules; the message is the reason in a word or two, to be counted."""


def ask_again(
    indices: Sequence[int],
    tries: int,
    ask: Callable[[list[int], int], Sequence[A]],
    use: Callable[[int, A, int], bool],
) -> list[int]:
    """Requests an answer for each index, and another one where it could not be used, up to ``tries`` times.

    ``ask(indices, attempt)`` gives the answers, ``use(index, answer, attempt)`` says whether one could be used, and
    attempts are counted from 1. Returns the indices without a usable answer.
    """
    pending = list(indices)
    for attempt in range(1, tries + 1):
        if pending:
            answers = ask(pending, attempt)
            pending = [index for index, answer in zip(pending, answers) if not use(index, answer, attempt)]
    return pending


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

    ``read`` raises UnusableAnswerError for an object that breaks its rules. Counts ``answered``, ``given_up`` and the
    reason of every failed try.
    """
    found: list[T | None] = [None] * len(conversations)

    def ask(indices: list[int], attempt: int) -> list[Answer]:
        name = label if attempt == 1 else f"{label}, try {attempt}"
        return responder.answer([conversations[index] for index in indices], attempt=attempt, label=name)

    def use(index: int, answer: Answer, attempt: int) -> bool:
        try:
            if answer.text is None or answer.error:
                raise UnusableAnswerError(answer.error or "no_answer")
            found[index] = read(json_object(answer.text))
        except UnusableAnswerError as error:
            counts[str(error)] += 1
            return False
        return True

    given_up = ask_again(range(len(conversations)), tries, ask, use)
    counts["answered"] += len(conversations) - len(given_up)
    counts["given_up"] += len(given_up)
    return found


def json_object(text: str) -> dict[str, Any]:
    """The one JSON object that an answer consists of, a code fence around it allowed; nothing is mended."""
    text = text.strip()
    fenced = _FENCED.match(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError) as error:
        raise UnusableAnswerError("not_json") from error
    if not isinstance(value, dict):
        raise UnusableAnswerError("not_an_object")
    return value
