"""The prompts, in our own words, after the structure of Appendix E.1: three ways to ask for a reply, one to refine it.

A style is the system prompt under which replies are sampled, and the request that asks for a reflection on them:

* ``vanilla``: the role and the names of the eight strategies,
* ``strategy``: each strategy with its definition (the default),
* ``self-reflection``: the definitions and three steps to take before one reply, which comes as JSON.

The request to reflect continues the very conversation that the reply was sampled from, so the two share their whole
prefix. (The paper gives conversation and reply to a model afresh.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from selfevo.dialogue import ESCONV_STRATEGIES, Messages
from selfevo.files import FileError, read_json

_DEFINITIONS = {
    "Question": "ask about the problem, so that the person can put into words what they face",
    "Affirmation and Reassurance": "confirm what the person feels or has done, and give confidence",
    "Reflection of feelings": "say which feelings you hear, and how they show",
    "Information": "give facts, figures, views or sources that are of use, or answer a question",
    "Providing Suggestions": "offer ways to go about it, without deciding for the person",
    "Restatement or Paraphrasing": "say back in fewer words what you were told, so that it becomes clear",
    "Self-disclosure": "share something similar that you have lived or felt",
    "Others": "greet, thank, say goodbye, or support in any other way",
}
_ROLE = "You are an expert in emotional support."
_VANILLA = f"{_ROLE}\nThese strategies are at your disposal: {', '.join(_DEFINITIONS)}."
_STRATEGY = "\n".join(
    [f"{_ROLE} These strategies are at your disposal:"]
    + [f"{number}. {name}: {meaning}." for number, (name, meaning) in enumerate(_DEFINITIONS.items(), 1)]
)
_SELF_REFLECTION = f"""{_STRATEGY}
Take three steps before you answer:
1. Understand the person: who they are and what they are like, what they feel and need, what they may prefer.
2. Choose the strategy that fits these needs and preferences.
3. Answer with that strategy.
Write one JSON object: {{"strategy": "one of the eight", "text": "your answer"}}"""
_REFINE = """Now step out of the conversation and work on your last answer:
1. Understand the person: who they are and what they are like, what they feel and need, what they may prefer.
2. Rate your last answer from 1 to 5: how well it meets these needs and preferences, and supports.
3. Say where it falls short, for instance in tone, warmth or relevance, and how it could support better.
4. Write it anew, so that it fits this person's needs and preferences better. Keep it short.
Answer with one JSON object:
{"understanding": {"user_profile": "", "user_emotion": "", "user_personality": "", "user_intention": ""}, \
"evaluation_score": 0, "feedback": "", "refined_response": ""}"""

SELF_REFLECTION = "self-reflection"
REPLY_STYLES = ("vanilla", "strategy", SELF_REFLECTION)
assert set(_DEFINITIONS) == set(ESCONV_STRATEGIES)


@dataclass(frozen=True)
class Prompts:
    """The texts of one style: ``system`` for replies, ``refine`` to ask for a reflection on one."""

    system: str
    refine: str = _REFINE


PROMPTS: Mapping[str, Prompts] = {
    "vanilla": Prompts(_VANILLA),
    "strategy": Prompts(_STRATEGY),
    SELF_REFLECTION: Prompts(_SELF_REFLECTION),
}


@cache
def prompts_of(style: str, file: str = "") -> Prompts:
    """The texts of a style; ``file``, a JSON object, may replace the system prompt of any style and ``refine``.

    Raises ValueError for an unknown style, and FileError for a file that cannot be used.
    """
    if style not in REPLY_STYLES:
        raise ValueError(f"style should be one of {', '.join(REPLY_STYLES)}, not {style!r}")
    own = PROMPTS[style]
    if not file:
        return own
    texts = read_json(file)
    known = {*REPLY_STYLES, "refine"}
    if not isinstance(texts, dict) or not all(key in known and isinstance(text, str) for key, text in texts.items()):
        raise FileError(f"{file}: expected a JSON object of texts under some of {', '.join(sorted(known))}")
    return Prompts(texts.get(style, own.system), texts.get("refine", own.refine))


def reply_prompt(context: Messages, system: str) -> list[dict[str, str]]:
    """The conversation to answer, ending with the user, under our system prompt (which replaces another one)."""
    spoken = [dict(message) for message in context if message["role"] != "system"]
    return [{"role": "system", "content": system}, *spoken]
