"""The prompts, in our own words, after the structure of Appendix E.1: three ways to ask for a reply, one to refine it.

Each is a file in ``prompt_texts/``. A style is the system prompt under which replies are sampled:

* ``vanilla``: the role and the names of the eight strategies,
* ``strategy``: each strategy with its definition (the default),
* ``self-reflection``: the definitions and three steps to take before one reply, which comes as JSON,
* ``plain`` and ``strategies``: those of version 0.1, so that its runs can be read.

``refine`` asks for a reflection on a reply. It continues the very conversation that the reply was sampled from, so the
two share their whole prefix. (The paper gives conversation and reply to a model afresh.)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from selfevo.dialogue import Messages
from selfevo.files import FileError, read_json

SELF_REFLECTION = "self-reflection"
PAPER_STYLES = ("vanilla", "strategy", SELF_REFLECTION)
OLDER_STYLES = ("plain", "strategies")
REPLY_STYLES = (*PAPER_STYLES, *OLDER_STYLES)
_TEXTS = Path(__file__).parent / "prompt_texts"


@dataclass(frozen=True)
class Prompts:
    """The texts of one style: ``system`` for replies, ``refine`` to ask for a reflection on one."""

    system: str
    refine: str


@cache
def prompts_of(style: str, file: str = "") -> Prompts:
    """The texts of a style; ``file``, a JSON object, may replace the system prompt of any style and ``refine``.

    Raises ValueError for an unknown style, and FileError for a file that cannot be used.
    """
    if style not in REPLY_STYLES:
        raise ValueError(f"style should be one of {', '.join(REPLY_STYLES)}, not {style!r}")
    refine = "refine-0.1" if style in OLDER_STYLES else "refine"
    system, request = ((_TEXTS / f"{name}.txt").read_text(encoding="utf-8").strip() for name in (style, refine))
    if not file:
        return Prompts(system, request)
    texts = read_json(file)
    known = {*REPLY_STYLES, "refine"}
    if not isinstance(texts, dict) or not all(key in known and isinstance(text, str) for key, text in texts.items()):
        raise FileError(f"{file}: expected a JSON object of texts under some of {', '.join(sorted(known))}")
    return Prompts(texts.get(style, system), texts.get("refine", request))


def reply_prompt(context: Messages, system: str) -> list[dict[str, str]]:
    """The conversation to answer, ending with the user, under our system prompt (which replaces another one)."""
    spoken = [dict(message) for message in context if message["role"] != "system"]
    return [{"role": "system", "content": system}, *spoken]
