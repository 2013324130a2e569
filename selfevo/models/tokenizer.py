"""Tokenizers: plain text to ids and back, and conversations to ids in the checkpoint's own chat format.

Text never becomes a special token, even if it spells one: only the chat formats write special ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from selfevo.dialogue import Messages
from selfevo.files import read_json
from selfevo.models.chat import ChatFormat, PlainChat, check_messages
from selfevo.models.hub import locate
from selfevo.models.llama import Llama3Chat
from selfevo.models.mistral import MistralChat
from selfevo.models.qwen2 import Qwen2Chat

FORMATS: tuple[ChatFormat, ...] = (Llama3Chat(), Qwen2Chat(), MistralChat())
FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used; the message names the file and what to do."""


class JsonBackend:
    """``tokenizer.json``, read by the ``tokenizers`` library. ``special`` has the ids of the special tokens."""

    def __init__(self, path: Path, markers: set[str]) -> None:
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            added = settings.get("added_tokens", [])
            for token in added:  # encode_special_tokens acts on tokens marked special only: mark every control token
                token["special"] = token["special"] or token["content"] in markers
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{path}: not a tokenizer.json that can be read: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special = {token["content"]: int(token["id"]) for token in added if token["special"]}
        self.size = self._tokenizer.get_vocab_size()
        # sentencepiece puts a space before every text; Metaspace does so unless the text begins with a space already
        metaspace = settings.get("pre_tokenizer") or {}
        self._dummy_space = metaspace.get("type") == "Metaspace" and metaspace.get("prepend_scheme") != "never"

    def encode(self, text: str) -> list[int]:
        if self._dummy_space and text.startswith(" "):
            text = " " + text
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))


class SentencePieceBackend:
    """``tokenizer.model``, read by ``sentencepiece``; for folders without a ``tokenizer.json``."""

    def __init__(self, path: Path) -> None:
        import sentencepiece  # rarely needed: most folders have a tokenizer.json

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            hint = "Llama-3's original tokenizer.model is not one: use its tokenizer.json"
            raise TokenizerError(f"{path}: not a sentencepiece model ({hint})") from error
        self.size = self._model.GetPieceSize()
        control = [i for i in range(self.size) if self._model.IsControl(i) or self._model.IsUnknown(i)]
        self.special = {self._model.IdToPiece(i): i for i in control}

    def encode(self, text: str) -> list[int]:
        return list(self._model.Encode(text))

    def decode(self, ids: list[int]) -> str:
        return str(self._model.Decode(ids))


Backend = JsonBackend | SentencePieceBackend


class ChatTokenizer:
    """A tokenizer with a chat format. ``stop_ids`` are all ids that end a turn; the format itself writes the first."""

    def __init__(self, backend: Backend, chat_format: ChatFormat, folder: Path | None = None) -> None:
        self._backend, self._format, self.folder = backend, chat_format, folder
        self._special = frozenset(backend.special.values())
        self._guarded = frozenset(i for token, i in backend.special.items() if token != "<unk>")
        self.format_name, self.vocab_size = chat_format.name, backend.size
        self.stop_ids: tuple[int, ...] = chat_format.stop_ids(self)

    def special_id(self, token: str) -> int:
        return self._backend.special[token]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS or EOS; text that looks like a special token stays text."""
        ids = self._backend.encode(text)
        if not self._guarded.isdisjoint(ids):
            raise TokenizerError(f"{self.folder}: this vocabulary spells a special token in plain text: {text[:80]!r}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids if int(i) not in self._special])

    def encode_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation (messages ``{"role", "content"}``), and of the prefix of the assistant's answer.

        Raises ``ChatError`` for messages that the format cannot express.
        """
        check_messages(messages, format_name=self.format_name)
        return self._format(self, messages, add_generation_prompt)

    def encode_reply(self, text: str) -> list[int]:
        """Ids of an assistant's reply as they follow a generation prompt, including the id that ends the turn."""
        return self._format.reply(self, text)


def load_tokenizer(source: str | Path, *, revision: str | None = None, chat_format: str | None = None) -> ChatTokenizer:
    """Loads ``tokenizer.json`` or ``tokenizer.model`` from a folder or a hub id.

    The chat format is the one whose published template is in the folder; without a template, the one whose control
    tokens are in the vocabulary, or else the plain format for base models. Another template is refused, unless
    ``chat_format`` (llama3, qwen2, mistral or plain) says which format to use. Raises :class:`TokenizerError`.
    """
    folder = locate(source, patterns=FILES, revision=revision)
    config = folder / "tokenizer_config.json"
    settings: dict[str, Any] = read_json(config) if config.is_file() else {}
    markers = {marker for chat in FORMATS for marker in chat.markers}
    markers.update(token for key in ("bos_token", "eos_token", "pad_token") if (token := _token(settings, key)))
    backend: Backend
    if (folder / "tokenizer.json").is_file():
        backend = JsonBackend(folder / "tokenizer.json", markers)
    elif (folder / "tokenizer.model").is_file():
        backend = SentencePieceBackend(folder / "tokenizer.model")
    else:
        raise TokenizerError(f"{folder}: neither tokenizer.json nor tokenizer.model is there")
    return ChatTokenizer(backend, _choose_format(folder, settings, backend, chat_format), folder)


def _choose_format(folder: Path, settings: dict[str, Any], backend: Backend, name: str | None) -> ChatFormat:
    available = {chat.name: chat for chat in FORMATS if all(marker in backend.special for marker in chat.markers)}
    if name is not None:
        if name == "plain":
            return _plain(folder, settings, backend)
        if name not in available:
            known = ", ".join([*available, "plain"])
            raise TokenizerError(
                f"{folder}: the chat format {name!r} cannot be written with this vocabulary; {known} can"
            )
        return available[name]
    template = _template(folder, settings)
    if template is None:
        return next(iter(available.values()), None) or _plain(folder, settings, backend)
    fingerprint = hashlib.sha256(template.strip().encode()).hexdigest()
    for chat in available.values():
        if fingerprint in chat.templates:
            return chat
    raise TokenizerError(
        f"{folder}: its chat template is none of those implemented (Meta-Llama-3-Instruct, Qwen2-Instruct, "
        "Mistral-7B-Instruct-v0.3); pass chat_format='llama3', 'qwen2', 'mistral' or 'plain' to use one all the same"
    )


def _plain(folder: Path, settings: dict[str, Any], backend: Backend) -> PlainChat:
    bos, eos = _token(settings, "bos_token"), _token(settings, "eos_token")
    if eos is None or eos not in backend.special:
        raise TokenizerError(f"{folder}: tokenizer_config.json names no eos_token of the vocabulary to end a turn with")
    return PlainChat(backend.special.get(bos) if bos else None, backend.special[eos])


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    """The default chat template, from either of the two files where transformers keeps it."""
    path = folder / "chat_template.jinja"
    template = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _token(settings: dict[str, Any], key: str) -> str | None:
    value = settings.get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
