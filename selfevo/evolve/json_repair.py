"""The JSON object in what a model wrote, however untidy: fences, prose, wrong quotes, lost commas, a cut-off end.

A forgiving reader that agrees with ``json.loads`` on proper JSON and never evaluates anything. At every quote inside a
string it asks one question: does what follows look like the end of a value? Only then does the quote end the string,
so ``'I'm ok'`` and ``"a "big" day"`` are read as meant. Its time grows linearly with the text.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

__all__ = ["Salvaged", "json_object_end", "salvage_json"]
_MAX_DEPTH = 64
# Which quotes close a string, by the one that opened it. Inside proper JSON curly quotes are text.
_CLOSERS = {'"': '"', "'": "'", "“": '“”"', "”": '“”"', "‘": "‘’'", "’": "‘’'"}
# What could end a string, and what begins one and goes on up to there. A backslash takes the next character with it.
_QUOTES = {opener: re.compile(rf"\\(?s:.)|[{closers}]") for opener, closers in _CLOSERS.items()}
_OPENED = {rf"{opener}(?:[^{closers}\\]|\\(?s:.))*": f"[{closers}]" for opener, closers in _CLOSERS.items()}
_ODD = r"(?:[^,:{}\n\\]|\\.){0,80}?"  # a short key that has quotes inside it
_QUOTED_KEY = "|".join(rf"(?:{opened}|{opened[0]}{_ODD}){closer}\s*:\s*" for opened, closer in _OPENED.items())
_BARE_KEY = r"[^\W\d][\w-]{0,59}\s*:\s*"
_KEY = re.compile(f"{_QUOTED_KEY}|{_BARE_KEY}")
_CUT_KEY = re.compile("|".join(rf"{opened}(?:{closer}\s*|\\)?\Z" for opened, closer in _OPENED.items()))
_STRAY = re.compile("|".join(f"{opened}{closer}?" for opened, closer in _OPENED.items()) + r"|[^,}\]\n]*")
# What may follow a string in an object. A comma alone proves little ("he said "no", and left"): behind it there must be
# a key. Where the comma is lost, a bare key must begin a line, as words with a colon are common in prose.
_AFTER_MEMBER = re.compile(
    rf"\s*(?:[}}\]]|```|\Z|,\s*(?:\Z|}}|{_KEY.pattern}|{_CUT_KEY.pattern})|{_QUOTED_KEY})"
    rf"|[^\S\n]*\n\s*{_BARE_KEY}"
)
_LITERALS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ITEM = rf"[\"'“”‘’{{}}\[\]\d-]|\Z|(?:{'|'.join(_LITERALS)}|NaN|Infinity)\b|[a-zA-Z]{{1,7}}\Z"
_AFTER_ITEM = re.compile(rf"\s*(?:[}}\]]|```|\Z|,\s*(?:{_ITEM}))|\s+[\"'“”‘’]")
_SEPARATORS = re.compile(r"[\s,]*")
# A quote belongs to a bare value only inside a word: elsewhere it begins the next key, the comma being lost.
_BARE_VALUE = re.compile(r"(?:[^,}\]\n\"“”'‘’]|(?<=\w)['‘’])*")
# An escape that is known, or cut in two by the end of the text. Others stay as they are.
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|([ntrbf/\\\"'“”‘’])|(?:u[0-9a-fA-F]{0,3})?\Z)")
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
    None. Raises nothing; nesting beyond 64 levels gives None.
    """
    found = _find_object(text, wanted)
    return None if found is None else found[0]


def json_object_end(text: str, wanted: str | None = None) -> int | None:
    """The index just past the object that ``salvage_json`` finds, or None while that is not complete.

    Made for stopping a generation: the beginning of a proper JSON object has no end yet, a brace inside a string does
    not count, and with ``wanted`` an object without that key ends nothing.
    """
    found = _find_object(text, wanted)
    if found is None or not found[0].complete or (wanted is not None and wanted not in found[0].value):
        return None
    return found[1]


def _find_object(text: str, wanted: str | None) -> tuple[Salvaged, int] | None:
    """The object and the index just past the outermost object around it."""
    best: tuple[Salvaged, int] | None = None
    start, complete = text.find("{"), True
    while start >= 0 and complete:  # where the text ends inside an object, no other one can follow it
        value, complete, end = _read_object(text, start + 1)
        holder = value if wanted is None else _holder(value, wanted)
        if holder:
            return Salvaged(holder, complete), end
        if value is not None and (best is None or (value and not best[0].value)):
            best = Salvaged(value, complete), end
        start = text.find("{", end)
    return best


def _holder(value: Any, wanted: str) -> dict[str, Any] | None:
    """The outermost object with the key ``wanted``, in reading order."""
    if isinstance(value, dict) and wanted in value:
        return value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((found for part in inner if (found := _holder(part, wanted)) is not None), None)


def _read_object(text: str, position: int) -> tuple[dict[str, Any] | None, bool, int]:
    """The object whose brace is just before ``position``, whether it was closed, and the index where reading ended.

    The object is None for a brace in prose, which no key and colon follow, and for one with nothing behind it.
    """
    position = _end(_SEPARATORS, text, position)
    if text[position : position + 1] not in ("", "}") and not _KEY.match(text, position):
        return None, not _CUT_KEY.match(text, position), position
    whole: dict[str, Any] = {}
    around: list[Any] = [whole]  # the objects and lists that are open, the innermost last
    while around:
        position = _end(_SEPARATORS, text, position)
        if len(around) > _MAX_DEPTH:
            return None, False, position
        if position == len(text):
            return whole or None, False, position
        part = around[-1]
        in_list = isinstance(part, list)
        key = None if in_list and text[position] not in _QUOTES else _KEY.match(text, position)
        if text[position] in "}]":
            kind = dict if text[position] == "}" else list
            if any(isinstance(outer, kind) for outer in around):
                while not isinstance(around.pop(), kind):
                    pass  # what is open inside has lost its own bracket
            position += 1
        elif in_list and key:
            around.pop()  # the list has lost its bracket, and the object around it goes on
        elif not in_list and not key:
            position = _end(_STRAY, text, position)
        else:
            after = _AFTER_MEMBER if key else _AFTER_ITEM
            value, position = _read_value(text, key.end() if key else position, after)
            if key and value is not _NOTHING:
                name = key[0].rpartition(":")[0].rstrip()
                part[_unescape(name[1:-1]) if name[0] in _QUOTES else name] = value
            elif value is not _NOTHING:
                part.append(value)
            if isinstance(value, (dict, list)):
                around.append(value)
    return whole, True, position


def _read_value(text: str, position: int, after: re.Pattern[str]) -> tuple[Any, int]:
    """The value at ``position`` (``_NOTHING`` for none, an object or list still empty) and the index just past it."""
    opener = text[position : position + 1]
    if opener in ("{", "["):
        return {} if opener == "{" else [], position + 1
    if opener in _QUOTES:
        for quote in _QUOTES[opener].finditer(text, position + 1):
            if quote[0][0] != "\\" and after.match(text, quote.end()):
                return _unescape(text[position + 1 : quote.start()]), quote.end()
        # Cut off. A closing fence is not the string's; U+FFFD is half a character or half a surrogate pair.
        body = text[position + 1 :]
        if body.rstrip().endswith("```"):
            body = body.rstrip()[:-3].rstrip()
        return _unescape(body).removesuffix("\ufffd"), len(text)
    end = _end(_BARE_VALUE, text, position)
    words = text[position:end].strip()
    if words in _LITERALS:
        return _LITERALS[words], end
    for kind in (int, float):
        try:
            number = kind(words)
        except ValueError:  # no number, or one with more digits than Python reads
            continue
        return number if abs(number) < math.inf else None, end
    return words if words and end < len(text) else _NOTHING, end  # at the end it may be half a word


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return position if found is None else found.end()


def _unescape(body: str) -> str:
    text = _ESCAPE.sub(lambda escape: chr(int(escape[1], 16)) if escape[1] else _ESCAPED.get(escape[2], ""), body)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
