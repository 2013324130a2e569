"""An LLM as judge (Table 7): seven aspects from 1 to 5, strictly parsed, every failure counted.

The criteria and the caps are in our own words. A study with other aspects gives them in a file (``load_aspects``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.ask_json import Responder, UnusableAnswerError, ask_json
from selfevo.evaluation.significance import bootstrap_interval
from selfevo.files import FileError, StrPath, read_json

LOWEST, HIGHEST = 1, 5


@dataclass(frozen=True)
class Aspect:
    """What is judged: what 1 and 5 mean, and ``cap``, what keeps the score from going above a bound ("" for none)."""

    name: str
    lowest: str
    highest: str
    cap: str = ""


ASPECTS = (
    Aspect("Fluency", "broken, garbled or repetitive language", "natural language that a person would use"),
    Aspect(
        "Understanding",
        "misses or misreads what the user feels and means",
        "grasps the feeling, its cause and what stays unsaid",
        "a reply that contradicts what the user said gets at most 2",
    ),
    Aspect(
        "Empathy",
        "cold, dismissive or blaming",
        "warm, takes the feeling seriously and stays with it",
        "stock sympathy that would fit any trouble gets at most 3",
    ),
    Aspect(
        "Personalisation",
        "could be sent to anybody",
        "could only be meant for this user: their facts, their personality, what they hope for",
        "a reply that takes up nothing this user has told gets at most 2; one with invented facts gets 1",
    ),
    Aspect(
        "Helpfulness",
        "leads nowhere or makes things worse",
        "moves the user on: a fitting question, insight or step",
        "advice before the trouble is understood gets at most 3",
    ),
    Aspect(
        "Skilfulness",
        "preaches, interrogates or shifts the topic",
        "the right kind of support for this moment of the conversation, well timed",
        "a list of generic tips gets at most 2",
    ),
    Aspect(
        "Overall",
        "a reply you would not send",
        "a reply that you would gladly receive in this place",
        "it is never above Fluency plus 1 nor above Understanding plus 1",
    ),
)
SUPPORT_ASPECTS = (
    Aspect("Empathy", "cold or dismissive", "recognises the feeling and responds to it with warmth"),
    Aspect("Fluency", "broken or repetitive language", "natural, coherent and of fitting length"),
    Aspect("Helpfulness", "leads nowhere", "helps the user to see or do something that eases the trouble"),
    Aspect("Professionalism", "unsafe, judging or intrusive", "what a trained counsellor would find sound"),
)  # those of Zhang et al. 2025


@dataclass(frozen=True)
class Judgement:
    """Scores from 1 to 5, and reasons ("" where none was given), by aspect."""

    scores: dict[str, int]
    reasons: dict[str, str]


def judge_replies(
    responder: Responder,
    answers: Sequence[tuple[Example, str]],
    counts: Counter[str],
    *,
    aspects: Sequence[Aspect] = ASPECTS,
    label: str = "",
) -> list[Judgement | None]:
    """A judgement of every reply to its test turn, None where no try gave a usable one; ``counts`` says why."""
    conversations = [judge_prompt(to_messages(example.context), reply, aspects) for example, reply in answers]

    def read(value: Mapping[str, Any]) -> Judgement:
        return read_judgement(value, aspects)

    return ask_json(responder, conversations, read, counts, label=label)


def judge_prompt(context: Sequence[Mapping[str, str]], reply: str, aspects: Sequence[Aspect]) -> list[dict[str, str]]:
    """One request: the conversation, the reply to it and what each score means."""
    spoken = "\n".join(
        f"{'User' if message['role'] == 'user' else 'Supporter'}: {message['content']}"
        for message in context
        if message["role"] != "system"
    )
    scales = "\n".join(
        f"- {a.name}: {LOWEST} = {a.lowest}; {HIGHEST} = {a.highest}." + (f" Limit: {a.cap}." if a.cap else "")
        for a in aspects
    )
    form = ", ".join(f'"{aspect.name}": {{"reason": "", "score": 0}}' for aspect in aspects)
    system = (
        "You judge replies in emotional support conversations. Be strict and use the whole scale: 3 is an ordinary "
        "reply, 5 is rare. Judge the last reply only, in its place in the conversation, and each aspect by itself."
    )
    request = (
        f"The conversation so far:\n{spoken}\n\nThe reply to judge:\n{reply}\n\nScore it on each aspect with a whole "
        f"number from {LOWEST} to {HIGHEST}:\n{scales}\n\nGive a reason of one sentence before each score. Answer with "
        f"one JSON object and nothing else:\n{{{form}}}"
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": request}]


def read_judgement(value: Mapping[str, Any], aspects: Sequence[Aspect]) -> Judgement:
    """Whole scores from 1 to 5 for every aspect and no other; anything else raises UnusableAnswerError."""
    scores, reasons = {}, {}
    for aspect in aspects:
        entry = value.get(aspect.name)
        score = entry.get("score") if isinstance(entry, Mapping) else entry
        reasons[aspect.name] = str(entry.get("reason", "")) if isinstance(entry, Mapping) else ""
        if score is None:
            raise UnusableAnswerError("aspect_missing")
        if not isinstance(score, int) or isinstance(score, bool):
            raise UnusableAnswerError("score_not_a_whole_number")
        if not LOWEST <= score <= HIGHEST:
            raise UnusableAnswerError("score_out_of_range")
        scores[aspect.name] = score
    if value.keys() - scores.keys():
        raise UnusableAnswerError("unknown_aspect")
    return Judgement(scores, reasons)


def load_aspects(path: StrPath) -> tuple[Aspect, ...]:
    """Aspects from a JSON list of objects with ``name``, ``lowest``, ``highest`` and optionally ``cap``."""
    aspects = []
    for index, entry in enumerate(read_json(path)):
        try:
            aspects.append(Aspect(**entry))
        except TypeError as error:
            raise FileError(
                f"{path}, entry {index}: expected name, lowest, highest and perhaps cap ({error})"
            ) from error
    if not aspects:
        raise FileError(f"{path}: holds no aspects")
    return tuple(aspects)


def summarise(
    judgements: Sequence[Judgement | None], dialogues: Sequence[str], counts: Mapping[str, int]
) -> dict[str, Any]:
    """Means over the judged replies with bootstrap intervals (dialogues drawn whole), and what failed."""
    judged = [(j, dialogue) for j, dialogue in zip(judgements, dialogues) if j is not None]
    scores = {}
    for name in judged[0][0].scores if judged else ():
        values = [float(judgement.scores[name]) for judgement, _ in judged]
        low, high = bootstrap_interval(values, [dialogue for _, dialogue in judged])
        scores[name] = {"mean": fmean(values), "interval": [low, high]}
    failures = {reason: count for reason, count in sorted(counts.items()) if reason != "answered"}
    return {"answered": len(judged), "failures": failures, "scores": scores}
