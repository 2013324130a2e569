"""Conversations as ids that fit the model's window."""

from __future__ import annotations

from dataclasses import dataclass

from selfevo.dialogue import Messages
from selfevo.models.chat import ChatError
from selfevo.models.tokenizer import ChatTokenizer

_DENSE = 8  # characters a token: a conversation with more is probably longer than the window


@dataclass(frozen=True)
class FittedPrompt:
    """The ids of a prompt without its oldest turns; ``ids`` is None if even the shortest form is too long."""

    ids: list[int] | None
    turns_dropped: int


def fit_prompt(
    tokenizer: ChatTokenizer, messages: Messages, max_tokens: int, *, keep_last: int = 1, name: str = ""
) -> FittedPrompt:
    """Ids of a conversation within ``max_tokens`` tokens: whole exchanges are dropped, the oldest first.

    The system message and the ``keep_last`` last messages always stay: 1 for a reply (the user's turn), 3 for a
    reflection (the user's turn, the reply, the request). Raises ``ChatError``, with the ``name`` of the conversation,
    where the chat format cannot write it.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    spoken = messages[len(system) :]

    def encode(exchanges: int) -> list[int] | None:
        """The ids without so many exchanges; None where they do not fit. A text that cannot fit is not encoded."""
        kept = [*system, *spoken[2 * exchanges :]]
        if sum(tokenizer.least_tokens(message["content"]) for message in kept) > max_tokens:
            return None
        try:
            ids = tokenizer.encode_chat(kept)
        except ChatError as error:
            raise ChatError(f"{name}: {error}; mend or remove this record" if name else str(error)) from error
        return ids if len(ids) <= max_tokens else None

    # Exchanges to drop: as many as may be, and one fewer than the fewest that can do.
    most, least = max(0, len(spoken) - keep_last) // 2, -1
    if sum(len(message["content"]) for message in spoken) <= _DENSE * max_tokens:  # else they hardly fit
        whole = encode(0)
        if whole is not None or not most:
            return FittedPrompt(whole, 0)
        least = 0
    ids = encode(most)
    step = 1
    while ids is not None and most - least > 1:  # from the end: what is far beyond the window is never encoded
        tried = max(least + 1, most - step)
        found = encode(tried)
        if found is None:
            least = tried
            break
        most, ids, step = tried, found, 2 * step
    while ids is not None and most - least > 1:
        middle = (least + most) // 2
        found = encode(middle)
        if found is None:
            least = middle
        else:
            most, ids = middle, found
    return FittedPrompt(ids, 2 * most)
