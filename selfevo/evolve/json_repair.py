"""The JSON object in what a model wrote, however untidy: fences, prose, wrong quotes, lost commas, a cut-off end.

A forgiving reader that agrees with ``json.loads`` on proper JSON and never evaluates anything. At every quote inside a
string it asks one question: does what follows look like the end of a value? Only then does the quote end the string,
so ``'I'm ok'`` and ``"a "big" day"`` are read as meant. Its time grows linearly with the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

__all__ = ["Salvaged", "json_object_end", "salvage_json"]
_MAX_STARTS = 100  # braces to try; bounds the time on text that is nothing but braces
# Which quotes close a string, by the one that opened it. Inside proper JSON curly quotes are text.
_CLOSERS = {'"': '"', "'": "'", "“": '“”"', "”": '“”"', "‘": "‘’'", "’": "‘’'"}
_STOPS = {opener: re.compile(rf"[{closers}\\]") for opener, closers in _CLOSERS.items()}
_QUOTE = "[\"'“”‘’]"
# A key and its colon: properly quoted, short and with quotes of other kinds or inside it, or without any.
_QUOTED_KEY = "|".join(
    [r'"(?:[^"\\]|\\.)*"\s*:', r"'(?:[^'\\]|\\.)*'\s*:"]
    + [rf"[{opener}](?:[^,:{{}}\n\\]|\\.){{0,80}}?[{closers}]\s*:" for opener, closers in _CLOSERS.items()]
)
_BARE_KEY = r"[^\W\d][\w-]{0,59}\s*:"
_KEY = re.compile(f"{_QUOTED_KEY}|{_BARE_KEY}", re.DOTALL)
_CUT_KEY = re.compile(rf"""(?:"(?:[^"\\]|\\.?)*"?|'(?:[^'\\]|\\.?)*'?|{_QUOTE}\w*)\s*\Z""", re.DOTALL)
# What may follow a string in an object. A comma alone proves little ("he said "no", and left"): behind it there must be
# a key. Where the comma is lost, a bare key must begin a line, as words with a colon are common in prose.
_AFTER_MEMBER = re.compile(
    rf"\s*(?:[}}\]]|```|\Z|,\s*(?:\Z|}}|{_KEY.pattern}|{_CUT_KEY.pattern})|{_QUOTED_KEY})|[^\S\n]*\n\s*{_BARE_KEY}",
    re.DOTALL,
)
_AFTER_ITEM = re.compile(
    rf"\s*(?:[}}\]]|```|\Z|,\s*(?:{_QUOTE}|[{{}}\[\]\d-]|\Z|(?:true|false|null|True|False|None|NaN|Infinity)\b|[a-zA-Z]{{1,7}}\Z))"
    rf"|\s+{_QUOTE}"
)
_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s,]*")
_JUNK = re.compile(r"[^,}\]\n]*")
# A quote belongs to a bare value only inside a word: elsewhere it begins the next key, the comma being lost.
_BARE_VALUE = re.compile(r"(?:[^,}\]\n\"“”'‘’]|(?<=\w)['‘’])*")
_LITERALS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(?:u[0-9a-fA-F]{0,3})?\Z|(.))", re.DOTALL)
_ESCAPED = dict(zip("ntrbf", "\n\t\r\b\f")) | {character: character for character in "/\\\"'“”‘’"}
_NOTHING: Any = object()


class Salvaged(NamedTuple):
    """An object and whether it was closed in the text; if not, its last value may lack its end."""

    value: dict[str, Any]
    complete: bool


def salvage_json(text: str, wanted: str | None = None) -> Salvaged | None:
    """The first JSON object in ``text`` that holds the key ``wanted``, itself or in an object inside it.

    Where none does, and without ``wanted``, it is the first object that is not empty, else an empty one, else None.
    Mended: text around it, any kind of quotes, unescaped quotes and newlines inside strings, bare keys and values,
    Python's literals, commas too many or lost, a bracket lost or of the wrong kind, and a missing end: what is open is
    closed, a cut-off string keeps what it had, a member whose value had not begun is left out. A number at the very end
    is taken as it stands. Half a surrogate pair becomes U+FFFD, since no tokenizer takes it; NaN and infinities become
    None. Raises nothing; nesting too deep for Python's stack gives None.
    """
    found = _find_object(text, wanted)
    return None if found is None else found[0]


def json_object_end(text: str, wanted: str | None = None) -> int | None:
    """The index just past the object that ``salvage_json`` finds, or None while that is not complete.

    Made for stopping a generation: the beginning of a proper JSON object has no end yet, a brace inside a string does
    not count, and with ``wanted`` an object without that key ends nothing.
    """
    if "}" not in text:
        return None
    found = _find_object(text, wanted)
    if found is None or not found[0].complete or (wanted is not None and wanted not in found[0].value):
        return None
    return found[1]


def _find_object(text: str, wanted: str | None) -> tuple[Salvaged, int] | None:
    """The object and the index just past the outermost object around it."""
    best: tuple[Salvaged, int] | None = None
    start = text.find("{")
    for _ in range(_MAX_STARTS):
        if start < 0:
            break
        reader = _Reader(text, start + 1)
        try:
            value = reader.read_object()
        except RecursionError:
            break
        if value or (value is not None and reader.complete):
            holder = value if wanted is None else _holder(value, wanted)
            if holder or (value and wanted is None):
                return Salvaged(holder or value, reader.complete), reader.position
            if best is None or (value and not best[0].value):
                best = Salvaged(value, reader.complete), reader.position
        if not reader.complete:  # the text ended inside this object, so no other one can follow it
            break
        start = text.find("{", start + 1 if value is None else reader.position)
    return best


def _holder(value: Any, wanted: str) -> dict[str, Any] | None:
    """The outermost object with the key ``wanted``, in reading order."""
    if isinstance(value, dict) and wanted in value:
        return value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((found for part in inner if (found := _holder(part, wanted)) is not None), None)


class _Reader:
    """Reads one object, ``position`` being behind its brace; ``complete`` turns False where the text ends too early."""

    def __init__(self, text: str, position: int) -> None:
        self.text, self.position = text, position
        self.complete = True
        self.open_lists = 0

    def read_object(self) -> dict[str, Any] | None:
        """The object, or None if this brace begins none: a brace in prose is not followed by a key and a colon."""
        begin = self._skip(_SEPARATORS)
        if self._here() not in ("}", "") and not _KEY.match(self.text, begin):
            self.complete = not _CUT_KEY.match(self.text, begin)
            return None
        return self._members()

    def _here(self) -> str:
        return self.text[self.position : self.position + 1]

    def _skip(self, pattern: re.Pattern[str]) -> int:
        found = pattern.match(self.text, self.position)
        self.position = self.position if found is None else found.end()
        return self.position

    def _at_end(self) -> bool:
        self.complete &= self._skip(_SEPARATORS) < len(self.text)
        return not self.complete

    def _members(self) -> dict[str, Any]:
        members: dict[str, Any] = {}
        while not self._at_end():
            if self._here() == "}":
                self.position += 1
                break
            if self._here() == "]":
                if self.open_lists:  # the list around this object ends: the object's own brace is lost
                    break
                self.position += 1
            elif (key := _KEY.match(self.text, self.position)) is None:
                self._skip_junk()
            else:
                self.position = key.end()
                self._skip(_SPACE)
                if (value := self._value(_AFTER_MEMBER)) is not _NOTHING:
                    members[_key_text(key[0])] = value
        return members

    def _items(self) -> list[Any]:
        items: list[Any] = []
        self.open_lists += 1
        while not self._at_end():
            if self._here() == "]":
                self.position += 1
                break
            # The object around this list ends or goes on: the list's own bracket is lost.
            if self._here() == "}" or (self._here() in _STOPS and _KEY.match(self.text, self.position)):
                break
            if (value := self._value(_AFTER_ITEM)) is not _NOTHING:
                items.append(value)
        self.open_lists -= 1
        return items

    def _value(self, after: re.Pattern[str]) -> Any:
        """The value at the position, or ``_NOTHING``; ``after`` matches what may follow a string."""
        opener, begin = self._here(), self.position + 1
        if opener in ("{", "["):
            self.position = begin
            return self._members() if opener == "{" else self._items()
        if opener not in _STOPS:
            text = self.text[begin - 1 : self._skip(_BARE_VALUE)].strip()
            return _bare_value(text, cut=self.position == len(self.text))
        for quote in self._quotes(begin):
            if after.match(self.text, quote + 1):
                self.position = quote + 1
                return _unescape(self.text[begin:quote])
        self.complete, self.position = False, len(self.text)
        return _cut_string(self.text[begin:])

    def _quotes(self, begin: int) -> Iterator[int]:
        """The unescaped quotes that could close the string whose opening quote stands just before ``begin``."""
        position = begin
        while (stop := _STOPS[self.text[begin - 1]].search(self.text, position)) is not None:
            position = stop.end() + (stop[0] == "\\")
            if stop[0] != "\\":
                yield stop.start()

    def _skip_junk(self) -> None:
        """Past what is no member: a quoted text, or else all up to the next comma, bracket or line."""
        if self._here() in _STOPS:
            self.position = next(self._quotes(self.position + 1), len(self.text) - 1) + 1
        else:
            self._skip(_JUNK)


def _key_text(key: str) -> str:
    key = key[:-1].rstrip()
    return _unescape(key[1:-1]) if key[0] in _STOPS else key


def _bare_value(text: str, *, cut: bool) -> Any:
    """A number, a literal, or the words themselves; ``_NOTHING`` for none and for what may be half a word."""
    if text in _LITERALS:
        return _LITERALS[text]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:  # no number, or one with more digits than Python reads
            continue
        return number if math.isfinite(number) else None
    return text if text and not cut else _NOTHING


def _cut_string(body: str) -> str:
    """What a string had when the text ended, less a closing fence, which is the model's and not the string's."""
    stripped = body.rstrip()
    text = _unescape(stripped[:-3].rstrip() if stripped.endswith("```") else body)
    # The first half of a surrogate pair whose second half was cut off has become U+FFFD.
    return text.removesuffix("\ufffd") if "\\" in body[-12:] else text


def _unescape(body: str) -> str:
    text = _ESCAPE.sub(_character, body) if "\\" in body else body
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _character(escape: re.Match[str]) -> str:
    if escape[1]:
        return chr(int(escape[1], 16))
    # An escape that JSON does not know stays as it is; one that the end of the text cut in two is dropped.
    return _ESCAPED.get(escape[2], escape[0]) if escape[2] else ""
