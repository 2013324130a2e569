"""Chat formats: how messages become ids. The formats of the model families are in their modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from selfevo.dialogue import Messages

ROLES = ("system", "user", "assistant")


class Codec(Protocol):
    """What a chat format needs from a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def encode_run(self, text: str, *, first: bool) -> list[int]:
        """Ids of text within a larger one: ``first`` at its beginning, else after a control token."""
        ...

    def special_id(self, token: str) -> int: ...
    def special_ids(self, *tokens: str) -> tuple[int, ...]:
        """The ids of those of the control tokens that the vocabulary has."""
        ...


class ChatFormat(Protocol):
    """Turns messages, checked by ``check_messages``, into ids of a codec whose vocabulary has all the ``markers``."""

    name: str
    markers: tuple[str, ...] = ()  # the special tokens that the format cannot do without
    jinja: str = ""  # the format as a chat template, for checkpoints that we write
    templates: frozenset[str] = frozenset()  # SHA-256 of the published templates that it reproduces, stripped
    later_system: bool = False  # whether a system message may stand elsewhere than at the beginning

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]: ...
    def reply(self, codec: Codec, text: str) -> list[int]:
        """Ids of an assistant's text as they follow a generation prompt, including the id that ends the turn."""
        ...

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        """All ids that end a turn; the format itself writes the first."""
        ...


class ChatError(ValueError):
    """Messages that a chat format cannot express; the error names the message and the reason."""


def check_messages(messages: Messages, chat: ChatFormat) -> None:
    """Refuses an empty conversation, unknown roles, missing texts, and where ``chat`` has no way to write it a system
    message that is not the first."""
    if not messages:
        raise ChatError("a conversation needs at least one message")
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise ChatError(f"message {index}: the role {role!r} is not one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ChatError(f"message {index}: its content should be a string, not {type(content).__name__}")
        if role == "system" and index and not chat.later_system:
            raise ChatError(f"message {index}: the {chat.name} format takes a system message only at the beginning")


class PlainChat(ChatFormat):
    """For base models without a chat template: roles are plain words; the stop token ends each assistant turn."""

    name = "plain"
    jinja = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{{ 'Assistant: ' + m['content'] | trim + eos_token }}"
        "{% else %}{{ ('User: ' if m['role'] == 'user' else '') + m['content'] | trim + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    )
    labels: Mapping[str, str] = {"system": "", "user": "User: ", "assistant": "Assistant: "}

    def __init__(self, bos: int | None, eos: int) -> None:
        self.bos, self.eos = bos, eos

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        ids, run = [] if self.bos is None else [self.bos], ""
        for message in messages:
            if message["role"] == "assistant":
                ids += codec.encode_run(f"{run}Assistant:", first=not ids) + self.reply(codec, message["content"])
                run = ""
            else:
                run += self.labels[message["role"]] + message["content"].strip() + "\n"
        run += "Assistant:" if add_generation_prompt else ""
        return ids + codec.encode_run(run, first=not ids) if run else ids

    def reply(self, codec: Codec, text: str) -> list[int]:
        known = codec.encode_run("Assistant:", first=True)
        whole = codec.encode_run(f"Assistant: {text.strip()}".rstrip(), first=True)
        return [*whole[len(known) :], self.eos]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return (self.eos,)
