"""Chat formats: how messages become ids. The formats of the model families are in their modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from selfevo.dialogue import Messages

ROLES = ("system", "user", "assistant")


class Codec(Protocol):
    """What a chat format needs from a tokenizer."""

    def encode(self, text: str) -> list[int]: ...
    def special_id(self, token: str) -> int: ...


class ChatFormat(Protocol):
    """Turns messages, checked by ``check_messages``, into ids of a codec whose vocabulary has all the ``markers``."""

    name: str
    markers: tuple[str, ...]  # the special tokens that the format writes
    templates: frozenset[str]  # SHA-256 of the published templates (without outer white space) that it reproduces

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]: ...
    def reply(self, codec: Codec, text: str) -> list[int]:
        """Ids of an assistant's text as they follow a generation prompt, including the id that ends the turn."""
        ...

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        """All ids that end a turn; the format itself writes the first."""
        ...


class ChatError(ValueError):
    """Messages that a chat format cannot express; the error names the message and the reason."""


def check_messages(messages: Messages, *, format_name: str) -> None:
    """Refuses an empty conversation, unknown roles, missing texts and a system message that is not the first."""
    if not messages:
        raise ChatError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"message {index}: the role {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ChatError(f"message {index}: its content should be a string, not {type(content).__name__}")
        if role == "system" and index:
            raise ChatError(f"message {index}: the {format_name} format takes a system message only at the beginning")


class PlainChat(ChatFormat):
    """For base models without a chat template: roles are plain words; the stop token ends each assistant turn."""

    name = "plain"
    markers = ()
    templates = frozenset()
    labels: Mapping[str, str] = {"system": "", "user": "User: ", "assistant": "Assistant: "}

    def __init__(self, bos: int | None, eos: int) -> None:
        self.bos, self.eos = bos, eos

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        ids = [] if self.bos is None else [self.bos]
        for message in messages:
            if message["role"] == "assistant":
                ids += codec.encode("Assistant:") + self.reply(codec, message["content"])
            else:
                ids += codec.encode(self.labels[message["role"]] + message["content"].strip() + "\n")
        return ids + codec.encode("Assistant:") if add_generation_prompt else ids

    def reply(self, codec: Codec, text: str) -> list[int]:
        return [*codec.encode(" " + text.strip()), self.eos]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return (self.eos,)
