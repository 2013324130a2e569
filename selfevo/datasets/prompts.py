"""The prompt for a reply, in our own words after the structure of the paper's Appendix E."""

from __future__ import annotations

from typing import Literal, get_args

from selfevo.dialogue import Messages

ReplyStyle = Literal["plain", "strategies"]
REPLY_STYLES: tuple[str, ...] = get_args(ReplyStyle)
STRATEGIES: dict[str, str] = {  # what the prompt says about each
    "Question": "ask openly, to understand better",
    "Restatement or Paraphrasing": "say back briefly what you heard",
    "Reflection of feelings": "name the feeling you notice",
    "Self-disclosure": "share something similar of your own",
    "Affirmation and Reassurance": "point to strengths, encourage",
    "Providing Suggestions": "offer a small step, leave the choice open",
    "Information": "give a useful fact",
    "Others": "greet, thank, say goodbye",
}
_PLAIN = "You are a warm and attentive emotional supporter. Answer the person in one or two short, natural sentences."
_WITH_STRATEGIES = (
    _PLAIN + " Choose what helps now: " + "; ".join(f"{name} ({meaning})" for name, meaning in STRATEGIES.items()) + "."
)


def reply_prompt(context: Messages, style: str = "strategies") -> list[dict[str, str]]:
    """The conversation to answer, ending with the user, under our system prompt (which replaces another one)."""
    if style not in REPLY_STYLES:
        raise ValueError(f"the reply style should be one of {', '.join(REPLY_STYLES)}, not {style!r}")
    system = _PLAIN if style == "plain" else _WITH_STRATEGIES
    spoken = [dict(message) for message in context if message["role"] != "system"]
    return [{"role": "system", "content": system}, *spoken]
