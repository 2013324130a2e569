"""Conversations as ids that fit the model's window."""

from __future__ import annotations

from dataclasses import dataclass

from selfevo.dialogue import Messages
from selfevo.models.tokenizer import ChatTokenizer


@dataclass(frozen=True)
class FittedPrompt:
    """The ids of a prompt without its oldest turns; ``ids`` is None if even the shortest form is too long."""

    ids: list[int] | None
    turns_dropped: int


def fit_prompt(tokenizer: ChatTokenizer, messages: Messages, max_tokens: int, *, keep_last: int = 1) -> FittedPrompt:
    """Ids of a conversation within ``max_tokens`` tokens: whole exchanges are dropped, the oldest first.

    The system message and the ``keep_last`` last messages always stay: 1 for a reply (the user's turn), 3 for a
    reflection (the user's turn, the reply, the request).
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    spoken = messages[len(system) :]

    def encode(exchanges: int) -> list[int]:
        return tokenizer.encode_chat([*system, *spoken[2 * exchanges :]])

    ids = encode(0)
    least, most = 0, max(0, len(spoken) - keep_last) // 2  # exchanges to drop: too few, and as many as may be
    if len(ids) <= max_tokens:
        return FittedPrompt(ids, 0)
    shortest = encode(most)
    if len(shortest) > max_tokens:
        return FittedPrompt(None, 2 * most)
    ids = shortest
    while most - least > 1:
        middle = (least + most) // 2
        tried = encode(middle)
        if len(tried) > max_tokens:
            least = middle
        else:
            most, ids = middle, tried
    return FittedPrompt(ids, 2 * most)
