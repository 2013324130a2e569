"""Asking a model to reflect on its own reply, and reading the answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selfevo.dialogue import Messages
from selfevo.evolve.json_repair import salvage_json

REFINED = "refined_response"  # the key that every usable reflection has
ASPECTS = ("profile", "emotion", "personality", "intention")


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

    Keys are the paper's (``user_profile``, ``evaluation_score``, ...) or those of version 0.1 (``profile``, ``score``).
    """
    refined = value.get(REFINED)
    if not isinstance(refined, str) or not refined.strip():
        return None
    understanding = value.get("understanding")
    if not isinstance(understanding, Mapping):
        understanding = {}
    return Reflection(
        understanding={a: _as_text(understanding.get(f"user_{a}", understanding.get(a, ""))) for a in ASPECTS},
        score=_as_score(value.get("evaluation_score", value.get("score"))),
        feedback=_as_text(value.get("feedback", "")),
        refined=refined.strip(),
    )


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
    """The reflection in a model's answer, mended where it can be; None where there is no whole refined reply."""
    salvaged = salvage_json(text, REFINED)
    reflection = None if salvaged is None else read_reflection(salvaged.value)
    if reflection is None or salvaged is None:
        return None
    # The end of an object that was cut off may be missing from the reply.
    return reflection if salvaged.complete or reflection.refined[-1] in ".!?…\"'”)" else None
