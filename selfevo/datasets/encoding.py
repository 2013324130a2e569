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
    dropped = 0
    while len(ids := tokenizer.encode_chat([*system, *spoken[dropped:]])) > max_tokens:
        if len(spoken) - dropped - 2 < keep_last:
            return FittedPrompt(None, dropped)
        dropped += 2
    return FittedPrompt(ids, dropped)
