"""Tokenizers: plain text to ids and back, and conversations to ids in the checkpoint's own chat format.

Text never becomes a special token, even if it spells one: only the chat formats write special ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from selfevo.dialogue import Messages
from selfevo.files import Fields, FileError, locate, read_bytes, read_object, read_text
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
_LARGEST_ID = 2**24
_SAMPLE = "It's 12 o'clock,\n\tna\u00efve \u6c49 \U0001f642"  # every tokenizer has to make something of it


class TokenizerError(FileError):
    """A tokenizer folder that cannot be used; the message names the file and what to do."""


@contextmanager
def _reading(path: Path | None, task: str) -> Iterator[None]:
    """Around calls of the tokenizer libraries: they raise bare Exceptions, and panics that are none."""
    try:
        yield
    except (FileError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = f" ({error})" if type(error).__name__ in ("Exception", "PanicException", "RuntimeError") else ""
        raise TokenizerError(f"{path}: {task}{said}") from error


@contextmanager
def _silence() -> Iterator[None]:
    """Without what those libraries themselves write on stderr, which is no file of Python's."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    try:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


class JsonBackend:
    """A tokenizer of the ``tokenizers`` library, given as the content of a ``tokenizer.json``.

    ``special`` has the ids of the special tokens, ``size`` is one more than the largest id, ``longest`` the length of
    the longest token.
    """

    def __init__(self, settings: Fields, markers: set[str], path: Path) -> None:
        self._path = path
        known: dict[str, int] = {}
        added = settings.take_list("added_tokens", dict, [])
        for index, values in enumerate(added):
            token = Fields(values, f"{path}, added token {index}")
            content = token.take("content", str)
            # encode_special_tokens acts on tokens marked special only: mark every control token
            values["special"] = token.take("special", bool, False) or content in markers
            if not content:
                raise token.fail("'content' should not be empty")
            known[content] = token.take("id", int, low=0, high=_LARGEST_ID)
        with _silence(), _reading(path, "not a tokenizer.json that can be read"):
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(settings.values | {"added_tokens": added}))
            self._tokenizer.encode_special_tokens = True
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            vocabulary = self._tokenizer.get_vocab()
        _check_ids(path, vocabulary)
        for content, id_ in known.items():
            if vocabulary.get(content) != id_:
                raise TokenizerError(
                    f"{path}: the token {content!r} is given two ids, {id_} and {vocabulary.get(content)}"
                )
        self.special = {values["content"]: values["id"] for values in added if values["special"]}
        self.size, self.longest = 1 + max(vocabulary.values()), max(map(len, vocabulary))
        # sentencepiece puts a space before every text; Metaspace does so unless the text begins with a space already
        scheme = _metaspace_scheme(settings.take("pre_tokenizer", dict, {}))
        self._dummy_space = scheme not in (None, "never")
        # "first" means at the beginning of the whole text: elsewhere a token that no text holds takes that place.
        self._before: tuple[str, int] | None = None
        if scheme == "first":
            mark = secrets.token_hex(16)
            self._tokenizer.add_tokens([tokenizers.AddedToken(mark, special=False, normalized=False)])
            self._before = mark, self.size
        _try(self, path)

    def encode(self, text: str) -> list[int]:
        return self._encode(" " + text if self._dummy_space and text.startswith(" ") else text)

    def encode_run(self, text: str, *, first: bool) -> list[int]:
        if first or self._before is None:
            return self._encode(text)
        mark, known = self._before
        ids = self._encode(mark + text)
        return ids[ids.index(known) + 1 :]

    def _encode(self, text: str) -> list[int]:
        with _reading(self._path, f"this tokenizer cannot write {text[:80]!r}"):
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        with _reading(self._path, "this tokenizer cannot decode what it wrote"):
            return str(self._tokenizer.decode([i for i in ids if i < self.size], skip_special_tokens=True))

    def pieces(self, before: list[int]) -> list[str]:
        rows = [[*before, i] for i in range(self.size)]
        return [
            "" if _ASCII_BYTE.fullmatch(self._tokenizer.id_to_token(row[-1]) or "") else text
            for row, text in zip(rows, self._tokenizer.decode_batch(rows, skip_special_tokens=True))
        ]


def _try(backend: Backend, path: Path) -> None:
    """Refuses a tokenizer that panics, or makes nothing of a text."""
    with _silence():
        if not backend.decode(backend.encode(_SAMPLE)):
            raise TokenizerError(f"{path}: makes nothing of the text {_SAMPLE!r}: are tokens missing?")


def _check_ids(path: Path, vocabulary: Mapping[str, int]) -> None:
    """Every token has an id of its own, and few ids have no token: what is made per id would be vast, or wrong."""
    if not vocabulary or not any(vocabulary):
        raise TokenizerError(f"{path}: has no tokens")
    owners: dict[int, str] = {}
    for token, id_ in vocabulary.items():
        if owners.setdefault(id_, token) != token:
            raise TokenizerError(f"{path}: the id {id_} has two tokens, {owners[id_]!r} and {token!r}")
    if not 0 <= min(owners) <= max(owners) < 2 * len(owners) + 2**16:
        token = owners[max(owners)]
        raise TokenizerError(f"{path}: the id of {token!r} is {max(owners)}, but there are only {len(owners)} tokens")


def _metaspace_scheme(pre_tokenizer: dict[str, Any]) -> str | None:
    """When a tokenizer.json in sentencepiece's manner puts a space before a text: always, first, never; else None."""
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("type") == "Metaspace":
            return str(step.get("prepend_scheme", "always"))
    return None


class SentencePieceBackend:
    """``tokenizer.model``, read by ``sentencepiece``, with the control tokens that were ``added`` to it."""

    def __init__(self, path: Path, added: dict[str, int]) -> None:
        import sentencepiece  # rarely needed: most folders have a tokenizer.json

        self._path = path
        self._model = sentencepiece.SentencePieceProcessor()
        hint = "not a sentencepiece model; Llama-3's original tokenizer.model is not one: use its tokenizer.json"
        with _silence(), _reading(path, hint):
            self._model.LoadFromSerializedProto(read_bytes(path))
            self._pieces: int = self._model.GetPieceSize()
            own = {self._model.IdToPiece(i): i for i in range(self._pieces)}
        control = [i for i in range(self._pieces) if self._model.IsControl(i) or self._model.IsUnknown(i)]
        _check_ids(path, own | added)
        self.special = {self._model.IdToPiece(i): i for i in control} | added
        self.size = 1 + max(self._pieces - 1, *added.values()) if added else self._pieces
        self.longest = max(map(len, own))
        _try(self, path)

    def encode(self, text: str) -> list[int]:
        with _reading(self._path, f"this tokenizer cannot write {text[:80]!r}"):
            return list(self._model.Encode(text))

    def encode_run(self, text: str, *, first: bool) -> list[int]:
        # A newline is a byte that no piece goes on from, so what follows it is encoded as it would be anywhere.
        return self.encode(text) if first else self.encode("\n" + text)[len(self.encode("\n")) :]

    def decode(self, ids: list[int]) -> str:
        with _reading(self._path, "this tokenizer cannot decode what it wrote"):
            return str(self._model.Decode([i for i in ids if i < self._pieces]))

    def pieces(self, before: list[int]) -> list[str]:
        texts = self._model.Decode([[*before, i] for i in range(self._pieces)])
        names = map(self._model.IdToPiece, range(self._pieces))
        texts = ["" if _ASCII_BYTE.fullmatch(name) else text for name, text in zip(names, texts)]
        return texts + [""] * (self.size - self._pieces)


def _from_vocab_and_merges(folder: Path, kind: str, added: dict[str, int]) -> Fields:
    """What a ``tokenizer.json`` would hold, from the ``vocab.json`` and ``merges.txt`` of a byte-level BPE, whose
    published class is ``kind``."""
    path = folder / "vocab.json"
    words = read_object(path)
    vocabulary = {token: words.take(token, int, low=0, high=_LARGEST_ID) for token in words.values}
    lines = read_text(folder / "merges.txt").split("\n")
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#version"):
            first, _, second = line.rstrip("\r").partition(" ")
            if not (first and second) or " " in second:
                raise TokenizerError(f"{folder / 'merges.txt'}, line {number}: {line[:80]!r} should be two tokens")
            merges.append((first, second))
    with _silence(), _reading(folder / "merges.txt", f"does not go with {path.name}"):
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    steps: list[Any] = [tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "Qwen2")]
    if kind == "Qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
        steps.insert(0, tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PATTERN), "isolated"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(steps)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] = [
        {"id": id_, "content": token, **flags} for token, id_ in sorted(added.items(), key=lambda item: item[1])
    ]
    return Fields(content, str(path))


def _added_tokens(folder: Path, settings: Fields) -> dict[str, int]:
    """The tokens beyond a vocabulary's own, from either place where transformers keeps them."""
    path = folder / "added_tokens.json"
    entries = read_object(path) if path.is_file() else Fields({}, str(path))
    added = {token: entries.take(token, int, low=0, high=_LARGEST_ID) for token in entries.values}
    decoder = Fields(settings.take("added_tokens_decoder", dict, {}), f"{settings.where}, added_tokens_decoder")
    for id_ in decoder.values:
        token = Fields(decoder.take(id_, dict), f"{decoder.where}, {id_!r}").take("content", str)
        if not re.fullmatch("[0-9]{1,8}", id_) or not token:
            raise decoder.fail(f"{id_!r} should be the id of a token, which is not empty: {token!r}")
        added[token] = int(id_)
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
        self.forced: str | None = None  # the chat format that was forced

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process loads it from its folder."""
        return _load_once, (self.folder, self.forced)

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
    Turns also stop at the ids of ``generation_config.json`` and at the tokenizer's end token. Raises ``FileError``,
    which :class:`TokenizerError` is.
    """
    folder = locate(source, patterns=FILES, revision=revision)
    config = folder / "tokenizer_config.json"
    settings = read_object(config) if os.path.lexists(config) else Fields({}, str(config))
    named = {key: token for key in _TOKEN_NAMES if (token := _token(settings, key))}
    markers = {marker for chat in FORMATS for marker in chat.markers} | set(named.values())
    added = _added_tokens(folder, settings)
    kind = settings.take("tokenizer_class", str, "")
    backend: Backend
    if os.path.lexists(path := folder / "tokenizer.json"):
        backend = JsonBackend(read_object(path), markers, path)
    elif os.path.lexists(path := folder / "tokenizer.model"):
        backend = SentencePieceBackend(path, added)
    elif os.path.lexists(path := folder / "vocab.json") and os.path.lexists(folder / "merges.txt"):
        kind = "Qwen2" if kind.startswith("Qwen2") else kind
        backend = JsonBackend(_from_vocab_and_merges(folder, kind, added), markers, path)
    else:
        raise TokenizerError(
            f"{folder}: neither tokenizer.json nor tokenizer.model is there, nor vocab.json and merges.txt"
        )
    chat = _choose_format(folder, settings, backend, named, chat_format)
    tokenizer = ChatTokenizer(backend, chat, folder, _stops(folder, backend, named), named)
    tokenizer.forced = chat_format
    if chat_format is not None or _template(folder, settings) is None:
        tokenizer.chat_template = chat.jinja
    return tokenizer


@lru_cache(maxsize=2)
def _load_once(folder: Path, chat_format: str | None) -> ChatTokenizer:
    return load_tokenizer(folder, chat_format=chat_format)


def _stops(folder: Path, backend: Backend, named: dict[str, str]) -> list[int]:
    """The ids at which generation ends, by the checkpoint's own files."""
    path = folder / "generation_config.json"
    settings = read_object(path) if os.path.lexists(path) else Fields({}, str(path))
    limits = {"low": 0, "high": _LARGEST_ID}
    if isinstance(settings.values.get("eos_token_id"), list):
        found: list[int] = settings.take_list("eos_token_id", int, **limits)
    else:
        one = settings.take("eos_token_id", int, None, **limits)
        found = [] if one is None else [one]
    if found and max(found) >= backend.size:
        raise settings.fail(f"'eos_token_id' {max(found)} is no id of the vocabulary, which has {backend.size}")
    if named.get("eos_token") in backend.special:
        found.append(backend.special[named["eos_token"]])
    return found


def _choose_format(
    folder: Path, settings: Fields, backend: Backend, named: dict[str, str], name: str | None
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
    found = _template(folder, settings)
    if found is None:
        return next(iter(available.values()), None) or _plain(folder, named, backend)
    template, path = found
    fingerprint = hashlib.sha256(template.strip().encode(errors="surrogatepass")).hexdigest()
    for chat in available.values():
        if fingerprint in chat.templates or template.strip() == chat.jinja.strip():
            return chat
    from selfevo.models.chat_template import TemplateChat  # Jinja2, which most folders do not need

    try:
        return TemplateChat(template, named, backend.special, str(path))
    except ChatError as error:
        reason = str(error).removeprefix(f"{path} ")
        raise TokenizerError(
            f"{path}: its chat template cannot be used ({reason}); --chat-format {', '.join([*available, 'plain'])} "
            "forces another format"
        ) from error


_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def _plain(folder: Path, named: dict[str, str], backend: Backend) -> PlainChat:
    bos, eos = named.get("bos_token"), named.get("eos_token")
    if eos is None or eos not in backend.special:
        raise TokenizerError(f"{folder}: tokenizer_config.json names no eos_token of the vocabulary to end a turn with")
    return PlainChat(backend.special.get(bos) if bos else None, backend.special[eos])


def _template(folder: Path, settings: Fields) -> tuple[str, Path] | None:
    """The default chat template, and which of the two files where transformers keeps it has it."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path), path
    if not isinstance(settings.values.get("chat_template"), list):
        template = settings.take("chat_template", str, None)
    else:
        entries = [Fields(entry, settings.where) for entry in settings.take_list("chat_template", dict)]
        templates = {entry.take("name", str): entry.take("template", str) for entry in entries}
        template = templates.get("default")
    return None if template is None else (template, Path(settings.where))


def _token(settings: Fields, key: str) -> str | None:
    """A named token: its text, or an object with it."""
    if isinstance(settings.values.get(key), dict):
        return str(Fields(settings.take(key, dict), f"{settings.where}, {key}").take("content", str))
    token: str | None = settings.take(key, str, None)
    return token
