"""Asking a model to reflect on its own reply, and reading the answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from selfevo.dialogue import Messages
from selfevo.evolve.json_repair import is_placeholder, json_objects, plain_key, salvage_json, unescape
from selfevo.generate.form import Form
from selfevo.generate.json_form import json_form, template_in
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer

REFINED = "refined_response"  # the key that every usable reflection has
TEXT = "text"  # and every usable answer of the style self-reflection
ASPECTS = ("profile", "emotion", "personality", "intention")
FREE, GUIDED = WAYS = ("free", "guided")  # JSON as the model writes it, or in a form
_UNDERSTANDING = {f"user_{aspect}": "" for aspect in ASPECTS}
_TEMPLATES: Mapping[str, Mapping[str, Any]] = {
    REFINED: {"understanding": _UNDERSTANDING, "evaluation_score": 0, "feedback": "", REFINED: ""},
    TEXT: {"strategy": "", TEXT: ""},
}
_SHARES = {"feedback": 2, REFINED: 3, TEXT: 5}  # of a form's tokens, where each other key has 1
# Around a text, the longer ones first.
_DELIMITERS = (('"""', '"""'), ("'''", "'''"), ("```", "```"), ("`", "`"), ('"', '"'), ("“", "”"), ("「", "」"))
_SENTENCES = re.compile(r".*[.!?…][\"'”’)]*(?=\s|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Reflection:
    """What the model wrote about its own reply; ``score`` is None where it gave none between 1 and 5."""

    understanding: dict[str, str]
    score: int | None
    feedback: str
    refined: str


def reflection_prompt(prompt: Messages, reply: str, request: str) -> list[dict[str, str]]:
    """The reply prompt continued by the model's own reply and by the request to reflect on it and to refine it."""
    own = {"role": "assistant", "content": reply}
    return [*(dict(message) for message in prompt), own, {"role": "user", "content": request}]


def read_reflection(value: Mapping[str, Any]) -> Reflection | None:
    """The reflection in a parsed JSON object, or None where it has no refined response to use.

    Keys are the paper's (``user_profile``, ``evaluation_score``, ...) or those of version 0.1 (``profile``, ``score``),
    in any case and punctuation.
    """
    fields = _plain(value)
    refined = written_text(fields.get(plain_key(REFINED)))
    if refined is None:
        return None
    understood = _plain(fields.get("understanding"))
    understood = {key: part for key, part in fields.items() if not isinstance(part, Mapping)} | understood
    return Reflection(
        understanding={a: _as_text(understood.get(f"user{a}", understood.get(a, ""))) for a in ASPECTS},
        score=_as_score(fields.get("evaluationscore", fields.get("score"))),
        feedback=_as_text(fields.get("feedback", "")),
        refined=refined,
    )


def written_text(value: Any) -> str | None:
    """A reply as it is meant, or None where there is none: no text, a blank one, a placeholder ("...", "<response>").

    A second layer of escapes, or Markdown's, is taken off, and so are quotes, three quotes and backticks around the
    whole, or one left at an end.
    """
    if not isinstance(value, str):
        return None
    text = unescape(value).strip()
    for opening, closing in _DELIMITERS:
        inner = text[len(opening) : len(text) - len(closing)]
        around = text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing)
        if around and opening not in inner and closing not in inner:
            text = inner.strip()
        elif opening == closing and text.count(opening) == 1:
            text = text.removeprefix(opening).removesuffix(closing).strip()
    return None if is_placeholder(text) else text


def _plain(value: Any) -> dict[str, Any]:
    return {plain_key(key): part for key, part in value.items()} if isinstance(value, Mapping) else {}


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_as_text(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_as_text(item)}" for key, item in value.items())
    return "" if value is None else str(value).strip()


def _as_score(value: Any) -> int | None:
    """Scores come as 3, 3.0, "3" or "3/5"."""
    if isinstance(value, str):
        value = value.strip().split("/")[0]
    try:
        score = float(value)
    except (TypeError, ValueError, OverflowError):  # the last for a model that repeats a digit hundreds of times
        return None
    return int(score) if score in (1, 2, 3, 4, 5) and not isinstance(value, bool) else None


def parse_reflection(text: str) -> Reflection | None:
    """The reflection in a model's answer, mended where it can be; None where there is no whole refined reply.

    The steps may be objects of their own: what the one with the refined reply lacks is taken from the others.
    """
    salvaged = salvage_json(text, REFINED)
    if salvaged is None:
        return None
    steps: dict[str, Any] = {}
    for step in json_objects(text):
        steps |= {} if plain_key(REFINED) in _plain(step) else _plain(step)
    reflection = read_reflection(steps | _plain(salvaged.value))
    if reflection is None:
        return None
    # The end of an object that was cut off may be missing from the reply.
    return reflection if salvaged.complete or reflection.refined[-1] in ".!?…\"'”)" else None


def answer_form(
    model: Transformer, tokenizer: ChatTokenizer, request: str, wanted: str = REFINED
) -> Callable[[int], Form]:
    """Makes the form of a JSON answer, of at most so many tokens: with the keys of the object that the request shows,
    or the paper's where it shows none with the key ``wanted``, REFINED or TEXT."""
    shown = template_in(request)
    template = _TEMPLATES[wanted] if shown is None or wanted not in shown else shown
    return lambda tokens: json_form(tokenizer, model.config.vocab_size, template, tokens, _SHARES)


def whole_sentences(text: str) -> str:
    """A text without the sentence that it breaks off in; "" where it has no whole one."""
    found = _SENTENCES.match(text)
    return found[0] if found else ""
