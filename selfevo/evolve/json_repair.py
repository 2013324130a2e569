"""The JSON object in what a model wrote, however untidy: fences, prose, wrong quotes, lost commas, a cut-off end.

A small forgiving reader, not a list of substitutions: on text that is JSON already it agrees with ``json.loads``, and
it never evaluates anything. What makes it forgiving is one question, asked at every quote inside a string: does what
follows look like the end of a value? Only then does the quote end the string, so ``'I'm ok'`` and ``"a "big" day"``
are read as meant. Its time grows linearly with the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["Salvaged", "json_object_end", "salvage_json"]
_MAX_DEPTH = 64
_MAX_STARTS = 100  # braces to try; bounds the time on text that is nothing but braces
_MAX_DIGITS = 1000  # Python refuses to read integers much longer than this
_MAX_ODD_KEY = 80  # how far a key with a quote inside it may reach
# Which quotes close a string, by the one that opened it. A straight double quote is closed by its own kind alone, for
# inside proper JSON curly quotes are text.
_CLOSERS = {'"': '"', "'": "'", "“": '“”"', "”": '“”"', "‘": "‘’'", "’": "‘’'"}
_STOPS = {opener: re.compile(rf"[{closers}\\]") for opener, closers in _CLOSERS.items()}
_SPACE = re.compile(r"\s*")
_SEPARATORS = re.compile(r"[\s,]*")
_COLON = re.compile(r"\s*:\s*")
_END = re.compile(r"\s*\Z")
_BARE_KEY = re.compile(r"[^\W\d][\w-]{0,59}(?=\s*:)")
_STRUCTURE = re.compile(r"[,:{}\n]")
_JUNK = re.compile(r"[^,}\]\n]*")
_AFTER_COMMA_IN_LIST = re.compile(
    r"[\"'“”‘’{}\[\]\d-]|\Z|(?:true|false|null|True|False|None|NaN|Infinity)\b|[A-Za-z]{1,7}\Z"
)
# A quote belongs to a bare value only inside a word: elsewhere it begins the next key, the comma being lost.
_BARE_VALUE = re.compile(r"(?:[^,}\]\n\"“”'‘’]|(?<=\w)['‘’])*")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?([eE][+-]?[0-9]+)?")
# JSON has no NaN and no infinities, though Python's reader takes them; no number is the honest reading.
_LITERALS: dict[str, bool | None] = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    **dict.fromkeys(("null", "None", "NaN", "Infinity", "-Infinity")),
}
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|(?:u[0-9a-fA-F]{0,3})?\Z|(.))", re.DOTALL)
_ESCAPED = dict(zip("ntrbf", "\n\t\r\b\f")) | {character: character for character in "/\\\"'“”‘’"}
_SURROGATE = re.compile("[\ud800-\udfff]")
_NOTHING: Any = object()


class Salvaged(NamedTuple):
    """An object and whether it was closed in the text; if not, its last value may lack its end."""

    value: dict[str, Any]
    complete: bool


def salvage_json(text: str) -> Salvaged | None:
    """The first JSON object in ``text``, or None where there is none to be had. Raises nothing.

    Mended: text around it, any kind of quotes, unescaped quotes and newlines inside strings, bare keys and values,
    Python's literals, commas too many or lost, a bracket lost or of the wrong kind, and a missing end: what is open is
    closed, a cut-off string keeps what it had, a member whose value had not begun is left out. A number at the very end
    is taken as it stands. Half a surrogate pair becomes U+FFFD, since no tokenizer takes it; NaN and infinities become
    None. An empty object is returned only if no other follows. Nesting beyond 64 levels gives None.
    """
    found = _find_object(text)
    return None if found is None else found[0]


def json_object_end(text: str) -> int | None:
    """The index just past the first JSON object in ``text``, or None while it is not complete.

    Made for stopping a generation: it agrees with ``salvage_json`` on what is complete, and the beginning of a proper
    JSON object has no end yet. A brace inside a string does not count.
    """
    if "}" not in text:
        return None
    found = _find_object(text)
    return found[1] if found is not None and found[0].complete else None


class _TooDeepError(Exception):
    """Nested so deeply that it cannot be an answer, only a model repeating itself."""


def _find_object(text: str) -> tuple[Salvaged, int] | None:
    """The object and the index just past it."""
    empty: tuple[Salvaged, int] | None = None
    start = text.find("{")
    for _ in range(_MAX_STARTS):
        if start < 0:
            break
        reader = _Reader(text, start + 1)
        try:
            value = reader.read_top()
        except _TooDeepError:
            return None
        if value:
            return Salvaged(value, reader.complete), reader.position
        if not reader.complete:  # the text ended inside this object, so no other one can follow it
            break
        if value is not None and empty is None:
            empty = Salvaged(value, True), reader.position
        start = text.find("{", start + 1 if value is None else reader.position)
    return empty


class _Reader:
    """Reads one object, ``position`` being behind its brace; ``complete`` turns False where the text ends too early."""

    def __init__(self, text: str, position: int) -> None:
        self.text = text
        self.position = position
        self.complete = True
        self.depth = 1
        self.open_lists = 0

    def read_top(self) -> dict[str, Any] | None:
        """The object, or None if this brace begins none: a brace in prose is not followed by a key and a colon."""
        begin = self._skip(_SEPARATORS)
        if self._here() not in ("}", "") and self._key() is None:
            self.complete = not self._cut_key_at(begin)
            return None
        self.position = begin
        return self._members()

    def _here(self) -> str:
        return self.text[self.position : self.position + 1]

    def _skip(self, pattern: re.Pattern[str]) -> int:
        self.position = _end_of(pattern, self.text, self.position)
        return self.position

    def _at_end(self) -> bool:
        if self._skip(_SEPARATORS) == len(self.text):
            self.complete = False
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
            elif (key := self._key()) is None:
                self._skip_junk()
            elif (value := self._value(self._ends_member)) is not _NOTHING:
                members[key] = value
        return members

    def _items(self) -> list[Any]:
        items: list[Any] = []
        self.open_lists += 1
        while not self._at_end():
            if self._here() == "]":
                self.position += 1
                break
            # The object around this list ends or goes on: the list's own bracket is lost.
            if self._here() == "}" or (self._here() in _STOPS and self._key_at(self.position)):
                break
            value = self._value(self._ends_item)
            if value is not _NOTHING:
                items.append(value)
        self.open_lists -= 1
        return items

    def _value(self, ends: Callable[[int], bool]) -> Any:
        """The value at the position, or ``_NOTHING``; ``ends(index)`` tells whether a string may end before index."""
        opener = self._here()
        if opener in _STOPS:
            return self._string(ends)
        if opener not in ("{", "["):
            begin = self.position
            end = self._skip(_BARE_VALUE)
            return _bare_value(self.text[begin:end].strip(), cut=end == len(self.text))
        if self.depth == _MAX_DEPTH:
            raise _TooDeepError
        self.depth += 1
        self.position += 1
        value = self._members() if opener == "{" else self._items()
        self.depth -= 1
        return value

    def _string(self, ends: Callable[[int], bool]) -> str:
        begin = self.position + 1
        for quote in self._quotes(begin):
            if ends(quote + 1):
                self.position = quote + 1
                return _unescape(self.text[begin:quote])
        self.complete = False
        self.position = len(self.text)
        return _cut_string(self.text[begin:])

    def _key(self) -> str | None:
        """The key at the position, which moves on to its value; None, and no move, if there is no key with a colon."""
        begin = self.position
        if self._here() in _STOPS:
            end = self._key_end(begin + 1)
            if end is None:
                return None
            self.position = end + 1
            self._skip(_COLON)
            return _unescape(self.text[begin + 1 : end])
        if (bare := _BARE_KEY.match(self.text, begin)) is None:
            return None
        self.position = bare.end()
        self._skip(_COLON)
        return bare[0]

    def _key_end(self, begin: int) -> int | None:
        """Where the quote is that ends the key which begins here. A quote inside a key is forgiven in short ones."""
        for count, quote in enumerate(self._quotes(begin)):
            if count and (quote - begin > _MAX_ODD_KEY or _STRUCTURE.search(self.text, begin, quote)):
                return None
            if _COLON.match(self.text, quote + 1):
                return quote
        return None

    def _key_at(self, index: int) -> bool:
        if self.text[index] in _STOPS:
            return self._key_end(index + 1) is not None
        return _BARE_KEY.match(self.text, index) is not None

    def _cut_key_at(self, index: int) -> bool:
        """Whether the text ends inside a quoted key or right behind it."""
        if self.text[index] not in _STOPS:
            return False
        quote = next(self._quotes(index + 1), None)
        return quote is None or _END.match(self.text, quote + 1) is not None

    def _quotes(self, begin: int) -> Iterator[int]:
        """The unescaped quotes that could close the string whose opening quote stands just before ``begin``."""
        stops = _STOPS[self.text[begin - 1]]
        position = begin
        while (stop := stops.search(self.text, position)) is not None:
            position = stop.end()
            if stop[0] == "\\":
                position += 1
            else:
                yield stop.start()

    def _ends_member(self, index: int) -> bool:
        """Whether what stands at ``index`` may follow a string that is a member's value.

        A comma alone proves little ("he said "no", and left"): behind it there must be a key.
        """
        after = _end_of(_SPACE, self.text, index)
        if self._closes(after):
            return True
        if self.text[after] == ",":
            following = _end_of(_SPACE, self.text, after + 1)
            if self.text[following : following + 1] in ("", "}"):
                return True
            return self._key_at(following) or self._cut_key_at(following)
        # A lost comma. Words with a colon are common in prose, so a bare key must begin a line.
        return (self.text[after] in _STOPS or "\n" in self.text[index:after]) and self._key_at(after)

    def _ends_item(self, index: int) -> bool:
        """Whether what stands at ``index`` may follow a string that is an item of a list."""
        after = _end_of(_SPACE, self.text, index)
        if self._closes(after):
            return True
        if self.text[after] == ",":
            following = _end_of(_SPACE, self.text, after + 1)
            return _AFTER_COMMA_IN_LIST.match(self.text, following) is not None
        return after > index and self.text[after] in _STOPS

    def _closes(self, index: int) -> bool:
        """Whether an object or a list may end at ``index``. A fence ends the text: the brackets before it are lost."""
        return self.text[index : index + 1] in ("", "}", "]") or self.text.startswith("```", index)

    def _skip_junk(self) -> None:
        """Past what is no member: a quoted text, or else all up to the next comma, bracket or line."""
        if self._here() in _STOPS:
            quote = next(self._quotes(self.position + 1), len(self.text) - 1)
            self.position = quote + 1
        else:
            self._skip(_JUNK)


def _end_of(pattern: re.Pattern[str], text: str, index: int) -> int:
    found = pattern.match(text, index)
    return index if found is None else found.end()


def _bare_value(text: str, *, cut: bool) -> Any:
    """A number, a literal, or the words themselves; ``_NOTHING`` for none and for what may be half a word."""
    if text in _LITERALS:
        return _LITERALS[text]
    if len(text) <= _MAX_DIGITS and (number := _NUMBER.fullmatch(text)) is not None:
        if number[1] is None and number[2] is None:
            return int(text)
        return value if math.isfinite(value := float(text)) else None
    return text if text and not cut else _NOTHING


def _cut_string(body: str) -> str:
    """What a string had when the text ended, less a closing fence, which is the model's and not the string's."""
    stripped = body.rstrip()
    return _unescape(stripped[:-3].rstrip() if stripped.endswith("```") else body, cut=True)


def _unescape(body: str, *, cut: bool = False) -> str:
    text = _ESCAPE.sub(_character, body) if "\\" in body else body
    if _SURROGATE.search(text) is None:
        return text
    if cut and "\ud800" <= text[-1] <= "\udbff":  # the first half of a pair whose second half was cut off
        text = text[:-1]
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _character(escape: re.Match[str]) -> str:
    if escape[1]:
        return chr(int(escape[1], 16))
    # An escape that JSON does not know stays as it is; one that the end of the text cut in two is dropped.
    return _ESCAPED.get(escape[2], escape[0]) if escape[2] else ""
