"""The JSON object in what a model wrote, however untidy: thoughts and drafts before it, fences, prose, wrong quotes,
lost commas, a second layer of escaping, a cut-off end.

A forgiving reader that agrees with ``json.loads`` on proper JSON and never evaluates anything. At every quote inside a
string it asks one question: does what follows look like the end of a value? Only then does the quote end the string,
so ``'I'm ok'`` and ``"a "big" day"`` are read as meant. A text is read once (twice more where it is escaped as a
whole), so that its time grows linearly; strings are made of the text's own characters, escapes replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal, NamedTuple

from selfevo.evaluation.ask_json import answer_start

__all__ = ["Salvaged", "is_placeholder", "json_object_end", "json_objects", "plain_key", "salvage_json", "unescape"]
_MAX_DEPTH = 64
_LAYERS = 2  # of escaping around the whole text, or of JSON in strings of JSON
# Which quotes close a string, by the one that opened it. Inside proper JSON curly quotes are text.
_CLOSERS = {
    '"': '"', "'": "'", "“": '“”"', "”": '“”"', "‘": "‘’'", "’": "‘’'", "`": "`", "＂": "＂",
}  # fmt: skip
_ALL = "".join(_CLOSERS)
# A string in which a line begins with another object was given up where it stood: JSON has no raw newlines in strings.
_ANEW = r"""\n[^\S\n]*(?P<anew>\{\s*["'“”][^\W\d][\w\\ -]{0,59}["'“”]\s*[:：])"""
# What could end a string, and what begins one and goes on up to there. A backslash takes the next character with it.
_QUOTES = {opener: re.compile(rf"\\(?s:.)|[{closers}]|{_ANEW}") for opener, closers in _CLOSERS.items()}
_OPENED = {rf"{opener}(?:[^{closers}\\]|\\(?s:.))*": f"[{closers}]" for opener, closers in _CLOSERS.items()}
_COLON = r"\s*[:：]\s*"
_ODD = r"(?:[^,:，：{}\n\\]|\\.){0,80}?"  # a short key that has quotes inside it
_QUOTED_KEY = "|".join(rf"(?:{opened}|{opened[0]}{_ODD}){closer}{_COLON}" for opened, closer in _OPENED.items())
_BARE_KEY = rf"[^\W\d](?:[\w-]|\\_){{0,59}}{_COLON}"
_KEY = re.compile(f"{_QUOTED_KEY}|{_BARE_KEY}")
_CUT_KEY = re.compile("|".join(rf"{opened}(?:{closer}\s*|\\)?\Z" for opened, closer in _OPENED.items()))
_STRAY = re.compile("|".join(f"{opened}{closer}?" for opened, closer in _OPENED.items()) + r"|[^,，}｝\]］\n]*")
# What may follow a string in an object. A comma alone proves little ("he said "no", and left"): behind it there must be
# a key. Where the comma is lost, a bare key must begin a line, as words with a colon are common in prose.
_AFTER_MEMBER = re.compile(
    rf"\s*(?:[}}｝\]］]|```|\Z|[,，]\s*(?:\Z|[}}｝]|{_KEY.pattern}|{_CUT_KEY.pattern})|{_QUOTED_KEY})"
    rf"|[^\S\n]*\n\s*{_BARE_KEY}"
)
_LITERALS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_ITEM = rf"[{_ALL}{{}}｛｝\[\]［］\d-]|\Z|(?:{'|'.join(_LITERALS)}|NaN|Infinity)\b|[a-zA-Z]{{1,7}}\Z"
_AFTER_ITEM = re.compile(rf"\s*(?:[}}｝\]］]|```|\Z|[,，]\s*(?:{_ITEM}))|\s+[{_ALL}]")
_JOIN = re.compile(rf"\s*\+\s*([{_ALL}])")  # "a" + "b"
_TRIPLE = {quotes: re.compile(f"{quotes[0]}{{3,}}|{_ANEW}") for quotes in ('"""', "'''", "```")}
_MAX_TRIPLES = 8  # of which one may close a string
_FENCE_BEHIND, _LONGEST_FENCE = re.compile(r"```\w*\Z"), 20
_LANGUAGE = re.compile(r"\w*\n")  # behind three backticks
_BRACE = re.compile("[{｛]")
_SEPARATORS = re.compile(r"[\s,，]*")
# A quote belongs to a bare value only inside a word: elsewhere it begins the next key, the comma being lost.
_BARE_VALUE = re.compile(r"(?:[^,，}｝\]］\n\"“”'‘’]|(?<=\w)['‘’])*")
# An escape that is known or of Markdown, or cut in two by the end of the text. Others stay as they are.
_ESCAPE = re.compile(
    r"\\(?:u([0-9a-fA-F]{4})|([ntrbf/\\\"'“”‘’_*#\[\](){}<>~!|&$+.=`:;,?%@^-])|(?:u[0-9a-fA-F]{0,3})?\Z)"
)
_ESCAPED = dict(zip("ntrbf", "\n\t\r\b\f"))
_ESCAPED_OBJECT = re.compile(r"[{｛](?:\s|\\[nt])*\\+[\"']")
_LAYER = re.compile(r"\\([ntrbf/\\\"'])")
# A whole text in place of a reply: dots, something in brackets, words like "your response here".
_PLACEHOLDER = re.compile(
    r"\W*|<[^<>]*>|\[[^\[\]]*\]|\{[^{}]*\}|\W*(?:(?:your|the|a|an|insert|write|enter|put|my)[\s_]+)*"
    r"(?:(?:refined|improved|revised|rewritten|new|final|better)[\s_]+)*(?:response|reply|answer|text|string)"
    r"(?:[\s_]+(?:text|goes|comes))?(?:[\s_]+here)?\W*|(?:n/?a|null|none|tbd|todo|placeholder)\W*",
    re.IGNORECASE,
)
_NOTHING: Any = object()


class Salvaged(NamedTuple):
    """An object and whether it was closed in the text; if not, its last value may lack its end."""

    value: dict[str, Any]
    complete: bool


class _Outermost(NamedTuple):
    """An object that is inside no other one: None for a brace in prose. ``open`` are those parts of it that were not
    closed, itself first; ``end`` is where reading ended."""

    value: dict[str, Any] | None
    open: list[Any]
    end: int


def salvage_json(text: str, wanted: str | None = None) -> Salvaged | None:
    """The first JSON object in ``text`` that holds the key ``wanted`` with something to read in it.

    All objects are looked through, also those inside others and those written as a string; thoughts (``<think>``),
    blank forms and placeholders are passed over, and one that is cut off gives way to a whole one. Where there is none,
    and without ``wanted``, it is the first object with the key, else the first that is not empty, else an empty one,
    else None.

    Mended: text around it, any kind of quotes, unescaped quotes and newlines inside strings, three quotes and backticks
    around them, strings joined by a plus, bare keys and values, Markdown's escapes, full-width punctuation, a second
    layer of escapes, Python's literals, commas too many or lost, a bracket lost or of the wrong kind, and a missing
    end: what is open is closed, a cut-off string keeps what it had, a member whose value had not begun is left out. A
    number at the very end is taken as it stands. Half a surrogate pair becomes U+FFFD, since no tokenizer takes it; NaN
    and infinities become None. Raises nothing; nesting beyond 64 levels gives None.
    """
    found = _find_object(text, wanted)
    return None if found is None else found[0]


def json_object_end(text: str, wanted: str | None = None) -> int | None:
    """The index just past the object that ``salvage_json`` finds, or just past the outermost one around it; None while
    that is not complete.

    Made for stopping a generation: the beginning of a proper JSON object has no end yet, a brace inside a string does
    not count, and with ``wanted`` an object without that key, or with nothing in it, ends nothing.
    """
    found = _find_object(text, wanted)
    if found is None or not found[0].complete or (wanted is not None and not _is_filled(found[0].value, wanted)):
        return None
    return found[1]


def json_objects(text: str) -> list[dict[str, Any]]:
    """All closed outermost objects in ``text``, behind any thoughts."""
    found = _outermost(text, answer_start(text))
    return [outer.value for outer in found if outer.value is not None and not outer.open]


def is_placeholder(text: str) -> bool:
    """Whether a text only stands where a reply should: dots, ``<response>``, ``[your reply]``, "refined response"."""
    return _PLACEHOLDER.fullmatch(text.strip()) is not None


def plain_key(key: str) -> str:
    """A key without case and punctuation: models write ``Refined Response`` or ``refined\\_response``."""
    return re.sub(r"[\W_]+", "", key).casefold()


def _find_object(text: str, wanted: str | None, layers: int = _LAYERS) -> tuple[Salvaged, int | None] | None:
    """The object and the index just past the outermost object around it, None where that was not closed."""
    best, rank = None, -1
    for outer in _outermost(text, 0 if wanted is None else answer_start(text)):
        if outer.value is None:
            continue
        holders = [(outer.value, True)] if wanted is None else _holders(outer.value, wanted, layers)
        for value, closed in [*holders, (outer.value, True)]:
            complete = closed and not any(value is part for part in outer.open)
            if wanted is not None and _is_filled(value, wanted):
                own = 4 if complete else 3
            else:
                own = 2 if wanted is not None and _parts(value, wanted) else int(bool(value))
            if own > rank:
                best, rank = (Salvaged(value, complete), None if outer.open else outer.end), own
        if rank == (1 if wanted is None else 4):
            return best
    if wanted is not None and layers and _ESCAPED_OBJECT.search(text):
        found = _find_object(_LAYER.sub(_unlayered, text), wanted, layers - 1)
        if found is not None and _is_filled(found[0].value, wanted):
            return found[0], None if found[1] is None else _place_before(text, found[1])
    return best


def _unlayered(escape: re.Match[str]) -> str:
    return _ESCAPED.get(escape[1], escape[1])


def _place_before(text: str, place: int) -> int:
    """The place in ``text`` of one behind the removal of its escapes."""
    for escape in _LAYER.finditer(text):
        if escape.start() >= place:
            break
        place += 1
    return place


def _holders(value: Any, wanted: str, layers: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """The objects with the key ``wanted`` inside ``value``, outermost first, in reading order; those written in a
    string with whether they are closed there."""
    if isinstance(value, str):
        if layers and "{" in value:
            found = _find_object(value, wanted, layers - 1)
            if found is not None and _is_filled(found[0].value, wanted):
                yield found[0]
        return
    if isinstance(value, dict) and _parts(value, wanted):
        yield value, True
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _holders(part, wanted, layers)


def _parts(value: dict[str, Any], wanted: str) -> list[Any]:
    """What an object has under the key ``wanted``, however that is written."""
    return [part for key, part in value.items() if key == wanted or plain_key(key) == plain_key(wanted)]


def _is_filled(value: dict[str, Any], wanted: str) -> bool:
    """Whether there is something to read under the key ``wanted``."""
    return any(
        part not in (None, {}, []) and not (isinstance(part, str) and is_placeholder(part))
        for part in _parts(value, wanted)
    )


def _outermost(text: str, start: int) -> Iterator[_Outermost]:
    """What begins with a brace, one after the other: where the text ends inside an object, no other one follows."""
    brace = _BRACE.search(text, start)
    while brace is not None:
        outer = _read_object(text, brace.end())
        yield outer
        brace = _BRACE.search(text, outer.end)


def _read_object(text: str, position: int) -> _Outermost:
    """The object whose brace is just before ``position``. None for a brace in prose, which no key and colon follow, and
    for one with nothing behind it."""
    position = _end(_SEPARATORS, text, position)
    if text[position : position + 1] not in ("", "}", "｝") and not _KEY.match(text, position):
        return _Outermost(None, [], len(text) if _CUT_KEY.match(text, position) else position)
    whole: dict[str, Any] = {}
    around: list[Any] = [whole]  # the objects and lists that are open, the innermost last
    while around:
        position = _end(_SEPARATORS, text, position)
        if len(around) > _MAX_DEPTH:
            return _Outermost(None, around, len(text))
        if position == len(text):
            return _Outermost(whole or None, around, position)
        part = around[-1]
        in_list = isinstance(part, list)
        key = None if in_list and text[position] not in _QUOTES else _KEY.match(text, position)
        if text[position] in "}]｝］":
            kind = dict if text[position] in "}｝" else list
            if any(isinstance(outer, kind) for outer in around):
                while not isinstance(around.pop(), kind):
                    pass  # what is open inside has lost its own bracket
            position += 1
        elif in_list and key:
            around.pop()  # the list has lost its bracket, and the object around it goes on
        elif not in_list and not key:
            if text[position] in "{｛" and _KEY.match(text, _end(_SEPARATORS, text, position + 1)):
                return _Outermost(whole, around, position)  # given up for another one
            position = _end(_STRAY, text, position)
        else:
            after = _AFTER_MEMBER if key else _AFTER_ITEM
            value, position, anew = _read_value(text, key.end() if key else position, after)
            if key and value is not _NOTHING:
                name = key[0].rstrip()[:-1].rstrip()
                part[unescape(name[1:-1] if name[0] in _QUOTES else name)] = value
            elif value is not _NOTHING:
                part.append(value)
            if anew:
                return _Outermost(whole, around, position)
            if isinstance(value, (dict, list)):
                around.append(value)
    return _Outermost(whole, [], position)


def _read_value(text: str, position: int, after: re.Pattern[str]) -> tuple[Any, int, bool]:
    """The value at ``position`` (``_NOTHING`` for none, an object or list still empty), the index just past it, and
    whether it was given up there for another object."""
    opener = text[position : position + 1]
    if opener in ("{", "[", "｛", "［"):
        return {} if opener in "{｛" else [], position + 1, False
    if opener in _QUOTES:
        body, end, ending = _read_string(text, position, after)
        if end > position:
            return unescape(body) if ending == "closed" else _cut_off(body), end, ending == "anew"
    end = _end(_BARE_VALUE, text, position)
    words = text[position:end].strip()
    if words in _LITERALS:
        return _LITERALS[words], end, False
    for kind in (int, float):
        try:
            number = kind(words)
        except ValueError:  # no number, or one with more digits than Python reads
            continue
        return number if abs(number) < math.inf else None, end, False
    return words if words and end < len(text) else _NOTHING, end, False  # at the end it may be half a word


def _read_string(text: str, position: int, after: re.Pattern[str]) -> tuple[str, int, Literal["closed", "cut", "anew"]]:
    """The text between the quotes at ``position``, escapes as they are, the index just past them, and what ended it:
    quotes, the end of the text, or another object. Three backticks that nothing closes begin no string: they close a
    fence."""
    if (quotes := text[position : position + 3]) in _TRIPLE:
        start = position + 3
        ends = [*islice(_TRIPLE[quotes].finditer(text, start), _MAX_TRIPLES)]
        closing = [end for end in ends if not end["anew"]]
        if closing and ends[0] is closing[0]:
            close = next((end for end in closing if after.match(text, end.end())), closing[0])
            language = _LANGUAGE.match(text, start) if quotes == "```" else None
            return text[language.end() if language else start : close.end() - 3], close.end(), "closed"
        if quotes == "```":
            return "", position, "cut"
        if ends:
            return text[start : ends[0].start()], ends[0].start("anew"), "anew"
        return text[start:], len(text), "cut"
    opener, start, parts = text[position], position + 1, list[str]()
    while True:
        for quote in _QUOTES[opener].finditer(text, start):
            if quote[0][0] == "\\":
                continue
            if quote["anew"]:
                return "".join([*parts, text[start : quote.start()]]), quote.start("anew"), "anew"
            if joined := _JOIN.match(text, quote.end()):
                parts.append(text[start : quote.start()])
                opener, start = joined[1], joined.end()
                break
            if after.match(text, quote.end()):
                return "".join([*parts, text[start : quote.start()]]), quote.end(), "closed"
        else:
            return "".join([*parts, text[start:]]), len(text), "cut"


def _cut_off(body: str) -> str:
    """What there is of a string without its end. A fence behind it is not the string's; U+FFFD is half a character or
    half a surrogate pair."""
    fence = _FENCE_BEHIND.search(body.rstrip()[-_LONGEST_FENCE:])
    if fence:
        body = body.rstrip()[: -len(fence[0])].rstrip()
    return unescape(body).removesuffix("\ufffd")


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    found = pattern.match(text, position)
    return position if found is None else found.end()


def unescape(body: str) -> str:
    """A text with its escapes replaced, JSON's and Markdown's; what is no escape stays as it is."""
    text = _ESCAPE.sub(_unescaped, body)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unescaped(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else _ESCAPED.get(escape[2] or "", escape[2] or "")
