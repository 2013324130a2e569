"""Tokenizers: plain text to ids and back, and conversations to ids in the checkpoint's own chat format.

Text never becomes a special token, even if it spells one: only the chat formats write special ids.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from selfevo.dialogue import Messages
from selfevo.files import locate, read_json
from selfevo.models.chat import ChatError, ChatFormat, PlainChat, check_messages
from selfevo.models.llama import Llama3Chat
from selfevo.models.mistral import MistralChat
from selfevo.models.qwen2 import Qwen2Chat

FORMATS: tuple[ChatFormat, ...] = (Llama3Chat(), Qwen2Chat(), MistralChat())
FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
# How text is cut before the merges, by the class that published it (in tokenizer.json this is written out).
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASCII_BYTE = re.compile("<0x[0-7][0-9A-F]>")


class TokenizerError(ValueError):
    """A tokenizer folder that cannot be used; the message names the file and what to do."""


class JsonBackend:
    """A tokenizer of the ``tokenizers`` library, given as the content of a ``tokenizer.json``.

    ``special`` has the ids of the special tokens, ``size`` is one more than the largest id, ``longest`` the length of
    the longest token.
    """

    def __init__(self, settings: dict[str, Any], markers: set[str], path: Path) -> None:
        try:
            added = list(settings.get("added_tokens", []))
            for token in added:  # encode_special_tokens acts on tokens marked special only: mark every control token
                token["special"] = token["special"] or token["content"] in markers
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings | {"added_tokens": added}))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{path}: not a tokenizer.json that can be read: {error}") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.special = {token["content"]: int(token["id"]) for token in added if token["special"]}
        vocabulary = self._tokenizer.get_vocab()
        self.size, self.longest = 1 + max(vocabulary.values()), max(map(len, vocabulary))
        # sentencepiece puts a space before every text; Metaspace does so unless the text begins with a space already
        scheme = _metaspace_scheme(settings.get("pre_tokenizer"))
        self._dummy_space = scheme not in (None, "never")
        # "first" means at the beginning of the whole text: elsewhere a token that no text holds takes that place.
        self._before: tuple[str, int] | None = None
        if scheme == "first":
            mark = secrets.token_hex(16)
            self._tokenizer.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False)])
            self._before = mark, self.size

    def encode(self, text: str) -> list[int]:
        return self._encode(" " + text if self._dummy_space and text.startswith(" ") else text)

    def encode_run(self, text: str, *, first: bool) -> list[int]:
        if first or self._before is None:
            return self._encode(text)
        mark, known = self._before
        ids = self._encode(mark + text)
        return ids[ids.index(known) + 1 :]

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=True))

    def pieces(self, before: list[int]) -> list[str]:
        rows = [[*before, i] for i in range(self.size)]
        return [
            "" if _ASCII_BYTE.fullmatch(self._tokenizer.id_to_token(row[-1]) or "") else text
            for row, text in zip(rows, self._tokenizer.decode_batch(rows, skip_special_tokens=True))
        ]


def _metaspace_scheme(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """When a tokenizer.json in sentencepiece's manner puts a space before a text: always, first, never; else None."""
    for step in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        if step.get("type") == "Metaspace":
            return str(step.get("prepend_scheme", "always"))
    return None


class SentencePieceBackend:
    """``tokenizer.model``, read by ``sentencepiece``, with the control tokens that were ``added`` to it."""

    def __init__(self, path: Path, added: dict[str, int]) -> None:
        import sentencepiece  # rarely needed: most folders have a tokenizer.json

        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.Load(str(path))
        except (RuntimeError, OSError) as error:
            hint = "Llama-3's original tokenizer.model is not one: use its tokenizer.json"
            raise TokenizerError(f"{path}: not a sentencepiece model ({hint})") from error
        self._pieces = self._model.GetPieceSize()
        control = [i for i in range(self._pieces) if self._model.IsControl(i) or self._model.IsUnknown(i)]
        self.special = {self._model.IdToPiece(i): i for i in control} | added
        self.size = 1 + max(self._pieces - 1, *added.values()) if added else self._pieces
        self.longest = max(len(self._model.IdToPiece(i)) for i in range(self._pieces))

    def encode(self, text: str) -> list[int]:
        return list(self._model.Encode(text))

    def encode_run(self, text: str, *, first: bool) -> list[int]:
        # A newline is a byte that no piece goes on from, so what follows it is encoded as it would be anywhere.
        return self.encode(text) if first else self.encode("\n" + text)[len(self.encode("\n")) :]

    def decode(self, ids: list[int]) -> str:
        return str(self._model.Decode([i for i in ids if i < self._pieces]))

    def pieces(self, before: list[int]) -> list[str]:
        texts = self._model.Decode([[*before, i] for i in range(self._pieces)])
        names = map(self._model.IdToPiece, range(self._pieces))
        texts = ["" if _ASCII_BYTE.fullmatch(name) else text for name, text in zip(names, texts)]
        return texts + [""] * (self.size - self._pieces)


def _from_vocab_and_merges(folder: Path, settings: dict[str, Any], added: dict[str, int]) -> dict[str, Any]:
    """What a ``tokenizer.json`` would hold, from the ``vocab.json`` and ``merges.txt`` of a byte-level BPE."""
    model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    is_qwen2 = str(settings.get("tokenizer_class", "")).startswith("Qwen2")
    steps: list[Any] = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not is_qwen2)]
    if is_qwen2:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PATTERN), "isolated"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [{"id": id_, "content": token, **flags} for token, id_ in sorted(added.items())]
    return content


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[str, int]:
    """The tokens beyond a vocabulary's own, from either place where transformers keeps them."""
    path = folder / "added_tokens.json"
    added = dict(read_json(path)) if path.is_file() else {}
    for id_, token in settings.get("added_tokens_decoder", {}).items():
        added[token["content"]] = int(id_)
    return added


Backend = JsonBackend | SentencePieceBackend


class ChatTokenizer:
    """A tokenizer with a chat format. ``stop_ids`` are all ids that end a turn: the first is the one that the format
    writes, ``stops`` are more of them."""

    def __init__(
        self, backend: Backend, chat_format: ChatFormat, folder: Path | None = None, stops: Sequence[int] = (),
        named: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        # The named control tokens (bos_token, eos_token, ...) that the vocabulary has.
        self.named_ids = {
            name: backend.special[token] for name, token in (named or {}).items() if token in backend.special
        }
        self._encode = lru_cache(maxsize=2**14)(self._encode_once)  # the turns of a dialogue come again and again
        self.chat_template = ""  # the format as a template, where the folder has none of its own for it
        self._backend, self._format, self.folder = backend, chat_format, folder
        self._special = frozenset(backend.special.values())
        self._guarded = frozenset(i for token, i in backend.special.items() if token != "<unk>")
        self.format_name, self.vocab_size = chat_format.name, backend.size
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*chat_format.stop_ids(self), *stops]))

    def special_id(self, token: str) -> int:
        return self._backend.special[token]

    def special_ids(self, *tokens: str) -> tuple[int, ...]:
        return tuple(self._backend.special[token] for token in tokens if token in self._backend.special)

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, without BOS or EOS; text that looks like a special token stays text."""
        return list(self._encode(text, None))

    def least_tokens(self, text: str) -> int:
        """A number of tokens that a text has at least, without encoding it: none stands for more than so many
        characters, and normalising (to NFC) makes at most four of them into one."""
        return len(text.strip()) // (4 * self._backend.longest)

    def encode_run(self, text: str, *, first: bool) -> list[int]:
        """Ids of plain text within a larger one: ``first`` at its beginning, else after a control token.

        They differ from those of ``encode`` only where the vocabulary puts a space before a text.
        """
        return list(self._encode(text, first))

    def _encode_once(self, text: str, first: bool | None) -> tuple[int, ...]:
        ids = self._backend.encode(text) if first is None else self._backend.encode_run(text, first=first)
        if not self._guarded.isdisjoint(ids):
            raise TokenizerError(f"{self.folder}: this vocabulary spells a special token in plain text: {text[:80]!r}")
        return tuple(ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids if int(i) not in self._special])

    def pieces(self) -> list[str]:
        """What each id adds to a text that it continues; U+FFFD for a part of a character. Empty for special ids, and
        for single bytes of ASCII, whose text depends on the bytes around them."""
        before = self.encode("{")
        known = len(self.decode(before))
        return [
            "" if token in self._special else text[known:] for token, text in enumerate(self._backend.pieces(before))
        ]

    def encode_chat(self, messages: Messages, *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation (messages ``{"role", "content"}``), and of the prefix of the assistant's answer.

        Raises ``ChatError`` for messages that the format cannot express.
        """
        check_messages(messages, self._format)
        return self._format(self, messages, add_generation_prompt)

    def encode_reply(self, text: str) -> list[int]:
        """Ids of an assistant's reply as they follow a generation prompt, including the id that ends the turn."""
        return self._format.reply(self, text)


def load_tokenizer(source: str | Path, *, revision: str | None = None, chat_format: str | None = None) -> ChatTokenizer:
    """Loads ``tokenizer.json``, ``tokenizer.model``, or ``vocab.json`` and ``merges.txt`` from a folder or a hub id.

    The chat format is the template in the folder (for the published ones of Llama-3, Qwen2 and Mistral-v0.3 our own
    code, which gives the same ids); without a template it is the one of these whose control tokens are in the
    vocabulary, or else the plain format for base models. ``chat_format`` (llama3, qwen2, mistral or plain) forces one.
    Turns also stop at the ids of ``generation_config.json`` and at the tokenizer's end token. Raises
    :class:`TokenizerError`.
    """
    folder = locate(source, patterns=FILES, revision=revision)
    config = folder / "tokenizer_config.json"
    settings = _read_object(config) if config.is_file() else {}
    named = {key: token for key in _TOKEN_NAMES if (token := _token(settings, key))}
    markers = {marker for chat in FORMATS for marker in chat.markers} | set(named.values())
    added = _added_tokens(folder, settings)
    backend: Backend
    if (folder / "tokenizer.json").is_file():
        path = folder / "tokenizer.json"
        backend = JsonBackend(_read_object(path), markers, path)
    elif (folder / "tokenizer.model").is_file():
        backend = SentencePieceBackend(folder / "tokenizer.model", added)
    elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = JsonBackend(_from_vocab_and_merges(folder, settings, added), markers, folder / "vocab.json")
    else:
        raise TokenizerError(
            f"{folder}: neither tokenizer.json nor tokenizer.model is there, nor vocab.json and merges.txt"
        )
    chat = _choose_format(folder, settings, backend, named, chat_format)
    tokenizer = ChatTokenizer(backend, chat, folder, _stops(folder, backend, named), named)
    if chat_format is not None or _template(folder, settings) is None:
        tokenizer.chat_template = chat.jinja
    return tokenizer


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise TokenizerError(f"{path}: should hold a JSON object, not a {type(value).__name__}")
    return value


def _stops(folder: Path, backend: Backend, named: dict[str, str]) -> list[int]:
    """The ids at which generation ends, by the checkpoint's own files."""
    path = folder / "generation_config.json"
    stops = _read_object(path).get("eos_token_id") if path.is_file() else None
    found = [stops] if isinstance(stops, int) else [stop for stop in stops or () if isinstance(stop, int)]
    if named.get("eos_token") in backend.special:
        found.append(backend.special[named["eos_token"]])
    return found


def _choose_format(
    folder: Path, settings: dict[str, Any], backend: Backend, named: dict[str, str], name: str | None
) -> ChatFormat:
    available = {chat.name: chat for chat in FORMATS if all(marker in backend.special for marker in chat.markers)}
    if name is not None:
        if name == "plain":
            return _plain(folder, named, backend)
        if name not in available:
            known = ", ".join([*available, "plain"])
            raise TokenizerError(
                f"{folder}: the chat format {name!r} cannot be written with this vocabulary; {known} can"
            )
        return available[name]
    template = _template(folder, settings)
    if template is None:
        return next(iter(available.values()), None) or _plain(folder, named, backend)
    fingerprint = hashlib.sha256(template.strip().encode()).hexdigest()
    for chat in available.values():
        if fingerprint in chat.templates or template.strip() == chat.jinja.strip():
            return chat
    from selfevo.models.chat_template import TemplateChat  # Jinja2, which most folders do not need

    try:
        return TemplateChat(template, named, backend.special)
    except ChatError as error:
        raise TokenizerError(
            f"{folder}: its chat template cannot be used ({error}); --chat-format {', '.join([*available, 'plain'])} "
            "forces another format"
        ) from error


_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _plain(folder: Path, named: dict[str, str], backend: Backend) -> PlainChat:
    bos, eos = named.get("bos_token"), named.get("eos_token")
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
