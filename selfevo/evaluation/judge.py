"""An LLM as judge (Table 7, Appendix E.2): aspects scored from 1 to 5, strictly parsed, every failure counted.

The aspects are data: ``aspects/paper.json`` has the paper's seven with their levels and score caps in our own words,
``personalisation.json`` one of our own, ``decoupled.json`` the four of Zhang et al. (2025). A study with other aspects
gives a file of the same form (``load_aspects``).
"""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.ask_json import Responder, UnusableAnswerError, ask_json
from selfevo.evaluation.significance import bootstrap_interval
from selfevo.files import Fields, FileError, StrPath, read_json

LOWEST, HIGHEST = 1, 5
OWN_SETS = ("paper", "personalisation", "decoupled")
_OWN = Path(__file__).parent / "aspects"
_WRITTEN = re.compile(rf"\s*([+-]?\d{{1,9}}(?:\.\d{{1,9}})?)\s*(?:(?:/|out of)\s*{HIGHEST}(?:\.0)?)?\s*", re.ASCII)


@dataclass(frozen=True)
class Aspect:
    """What is judged: a question, what the scores mean, and conditions that keep a score from exceeding a bound."""

    name: str
    question: str
    levels: Mapping[int, str]
    caps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """Scores from 1 to 5, and explanations ("" where none was given), by aspect; failed aspects are missing."""

    scores: dict[str, int]
    reasons: dict[str, str]


def judge_replies(
    responder: Responder,
    answers: Sequence[tuple[Example, str]],
    counts: Counter[str],
    *,
    aspects: Sequence[Aspect],
    joint: bool = False,
    label: str = "",
) -> list[Judgement]:
    """A judgement of every reply to its test turn. ``counts`` says how many requests were answered and what failed.

    There is one request for each reply and aspect, as in the paper, or with ``joint`` one for all aspects together.
    """
    judged = [Judgement({}, {}) for _ in answers]
    for group in [list(aspects)] if joint else [[aspect] for aspect in aspects]:
        conversations = [judge_prompt(to_messages(example.context), reply, group) for example, reply in answers]
        name = label if joint else f"{label}: {group[0].name}"

        def read(value: Mapping[str, Any], group: Sequence[Aspect] = group) -> Judgement:
            return read_judgement(value, group, counts)

        for whole, part in zip(judged, ask_json(responder, conversations, read, counts, label=name)):
            if part is not None:
                whole.scores.update(part.scores)
                whole.reasons.update(part.reasons)
    return judged


def judge_prompt(context: Sequence[Mapping[str, str]], reply: str, aspects: Sequence[Aspect]) -> list[dict[str, str]]:
    """One request: the conversation, the reply to it, and for each aspect what is asked, the levels and the caps."""
    names = {"user": "User", "assistant": "Supporter"}
    spoken = "\n".join(f"{names[m['role']]}: {m['content']}" for m in context if m["role"] in names)
    form = '{"explanation": "", "score": 0}'
    if len(aspects) > 1:
        form = "{" + ", ".join(f'"{aspect.name}": {form}' for aspect in aspects) + "}"
    system = (
        "You judge replies in emotional support conversations, strictly. Judge the last reply only, in its place in "
        "the conversation. Give a higher score only for what goes beyond the level below it."
    )
    request = (
        f"The conversation so far:\n{spoken}\n\nThe reply to judge:\n{reply}\n\n"
        + "\n\n".join(map(_criteria, aspects))
        + f"\n\nGive whole numbers from {LOWEST} to {HIGHEST}, each after an explanation of one sentence. "
        f"Answer with one JSON object and nothing else:\n{form}"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": request}]


def _criteria(aspect: Aspect) -> str:
    levels = [f"{score} = {meaning}" for score, meaning in sorted(aspect.levels.items(), reverse=True)]
    return "\n".join([f"{aspect.name}. {aspect.question}".strip(), *levels, *(f"Limit: {cap}" for cap in aspect.caps)])


def read_judgement(
    value: Mapping[str, Any], aspects: Sequence[Aspect], counts: Counter[str] | None = None
) -> Judgement:
    """Whole scores from 1 to 5 for every aspect and no other; anything else raises UnusableAnswerError.

    For one aspect the object is ``{"explanation", "score"}``, for several one of these under each aspect's name, or the
    bare score. Keys may be capitalised, and ``reason`` stands for ``explanation``. A score may be written as 4.0, "4"
    or "4/5", which ``counts`` counts as ``mended_score``.
    """
    entries = {aspects[0].name: value} if len(aspects) == 1 and aspects[0].name not in value else dict(value)
    scores, reasons, mended = {}, {}, 0
    for aspect in aspects:
        entry = entries.pop(aspect.name, None)
        fields = {key.lower(): part for key, part in entry.items()} if isinstance(entry, Mapping) else {"score": entry}
        if isinstance(entry, Mapping) and len(fields) < len(entry):
            raise UnusableAnswerError("ambiguous")
        given = fields.get("score")
        scores[aspect.name] = _score(given)
        mended += not isinstance(given, int)
        reasons[aspect.name] = str(fields.get("explanation", fields.get("reason", "")))
    if entries:
        raise UnusableAnswerError("unknown_aspect")
    if mended and counts is not None:
        counts["mended_score"] += mended
    return Judgement(scores, reasons)


def _score(given: Any) -> int:
    if given is None:
        raise UnusableAnswerError("score_missing")
    if isinstance(given, str) and (written := _WRITTEN.fullmatch(given)):
        given = float(written[1])
    if isinstance(given, bool) or not isinstance(given, (int, float)) or given != given // 1:
        raise UnusableAnswerError("score_not_a_whole_number")
    if not LOWEST <= given <= HIGHEST:
        raise UnusableAnswerError("score_out_of_range")
    return int(given)


def load_aspects(source: StrPath) -> tuple[Aspect, ...]:
    """The aspects of a set by name (paper, personalisation, decoupled) or of a JSON file.

    A file holds a list of ``{"name", "question", "levels": {"5": meaning, ...}, "caps": ["at most 2: ...", ...]}``;
    question and caps may be missing. The form of version 0.1 (``lowest``, ``highest``, ``cap``) is read too. Raises
    FileError with the entry at fault.
    """
    path = _OWN / f"{source}.json" if str(source) in OWN_SETS else Path(source)
    entries = read_json(path)
    if not isinstance(entries, list):
        raise FileError(f"{path}: should hold a list of aspects, not {reprlib.repr(entries)}")
    aspects = [_aspect(Fields(entry, f"{path}, entry {index}")) for index, entry in enumerate(entries)]
    check_aspects(aspects, str(path))
    return tuple(aspects)


def check_aspects(aspects: Sequence[Aspect], source: str) -> None:
    """Raises FileError where there are none, or two of one name."""
    names = [aspect.name.casefold() for aspect in aspects]
    if not names or len(set(names)) < len(names):
        raise FileError(f"{source}: no aspects, or two of one name: {', '.join(aspect.name for aspect in aspects)}")


def _aspect(entry: Fields) -> Aspect:
    name, cap = entry.take("name", str), entry.take("cap", str, "")
    if not name.strip() or not name.isprintable():
        raise entry.fail("'name' should be the name of an aspect")
    if "levels" in entry.values:
        meanings = Fields(entry.take("levels", dict), f"{entry.where}, 'levels'")
        scores = {str(score) for score in range(LOWEST, HIGHEST + 1)}
        if not meanings.values or not meanings.values.keys() <= scores:
            raise meanings.fail(f"should have texts under some of {LOWEST} to {HIGHEST}")
        levels = {int(score): meanings.take(score, str) for score in meanings.values}
    else:
        levels = {LOWEST: entry.take("lowest", str), HIGHEST: entry.take("highest", str)}
    caps = (*entry.take_list("caps", str, []), *([cap] if cap else []))
    return Aspect(name, entry.take("question", str, ""), levels, caps)


def summarise(judgements: Sequence[Judgement], dialogues: Sequence[str], counts: Mapping[str, int]) -> dict[str, Any]:
    """Means over the judged replies with bootstrap intervals (dialogues drawn whole), what failed and what was
    mended."""
    scores: dict[str, Any] = {}
    for name in dict.fromkeys(name for judgement in judgements for name in judgement.scores):
        rows = [(float(j.scores[name]), dialogue) for j, dialogue in zip(judgements, dialogues) if name in j.scores]
        values = [value for value, _ in rows]
        low, high = bootstrap_interval(values, [dialogue for _, dialogue in rows])
        scores[name] = {"mean": fmean(values), "interval": [low, high], "replies": len(values)}
    mended = {reason: count for reason, count in sorted(counts.items()) if reason.startswith("mended")}
    failures = {reason: count for reason, count in sorted(counts.items()) if reason not in {"answered", *mended}}
    return {
        "answered": sum(bool(j.scores) for j in judgements),
        "failures": failures,
        "mended": mended,
        "scores": scores,
    }
