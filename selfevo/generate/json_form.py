"""JSON objects as forms: keys and punctuation are fixed, the model fills the strings and chooses the digits."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from selfevo.generate.form import Form, Rules, Slot, Step
from selfevo.models.tokenizer import ChatTokenizer

DIGITS = "12345"  # what may be written where a template has a number: a score
BOOLEANS = ("true", "false")
_EMPTY, _TEXT, _ESCAPE = range(3)  # a string: nothing visible yet, some text, behind a backslash
_CONTENT = re.compile(r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*')  # of a string; \u is left out: half a pair is no text
_MOST_LEFT = 3  # ids that hold a quote behind a text of more than so many ids are left out: they are whole phrases
_OBJECT = re.compile(r"\{.*\}", re.DOTALL)


def json_form(
    tokenizer: ChatTokenizer,
    vocab_size: int,
    template: Mapping[str, Any],
    tokens: int,
    weights: Mapping[str, int] | None = None,
) -> Form:
    """A form for objects like ``template``: its strings are slots for strings, its numbers for a digit from 1 to 5, its
    true and false for one of these.

    A reply has at most ``tokens`` ids, of which the strings get equal shares, or shares by the ``weights`` of their
    keys (1 where none is given). A string has something visible in it. It ends at the quote in an id that holds one,
    with an id that ends a turn, or at its limit. ``vocab_size`` is the model's, which may have more ids than the
    tokenizer. Raises ValueError where ``tokens`` are too few, and for a template with lists or without any slot.
    """
    texts, blanks = [""], []
    for part in _parts(template, ""):
        if isinstance(part, str):
            texts[-1] += part
        else:
            blanks.append(part)
            texts.append("")
    # The end of a turn that encode_reply adds is left out.
    fixed = [tuple(tokenizer.encode_reply(texts[0])[:-1])]
    fixed += [tuple(tokenizer.encode_run(text, first=False)) for text in texts[1:]]
    rules = _string_rules(tokenizer, vocab_size)
    shares = [0 if blank.words else (weights or {}).get(blank.key, 1) for blank in blanks]
    longest = [max(map(len, blank.words), default=0) for blank in blanks]
    least = sum(map(len, fixed)) + sum(most or rules.most_left for most in longest)
    if tokens < least:
        raise ValueError(f"{tokens} tokens are too few for {json.dumps(template)}: it takes at least {least}")
    limits = [most or 1 + (tokens - least) * share // max(1, sum(shares)) for most, share in zip(longest, shares)]
    return Form(
        tuple(fixed),
        tuple(
            Slot(_choice_rules(tokenizer, vocab_size, blank.words) if blank.words else rules, limit)
            for blank, limit in zip(blanks, limits)
        ),
    )


def template_in(request: str) -> dict[str, Any] | None:
    """The JSON object that a request shows as the form of its answer: what stands between the first brace and the last
    one, or on the last line that begins with one."""
    lines = [line for line in request.splitlines() if line.startswith("{")]
    for text in [*lines[-1:], *(found[0] for found in [_OBJECT.search(request)] if found)]:
        try:
            value = json.loads(text)
        except ValueError:
            continue
        if isinstance(value, dict):
            return value
    return None


@dataclass(frozen=True)
class _Blank:
    """A slot of a template, by the key that it belongs to: for one of some words, or without any for a string."""

    key: str
    words: tuple[str, ...] = ()


def _parts(value: Any, key: str) -> Iterator[str | _Blank]:
    """The fixed texts and the slots of a template, in order."""
    if isinstance(value, Mapping):
        for place, (name, inner) in enumerate(value.items()):
            yield f"{', ' if place else '{'}{json.dumps(name, ensure_ascii=False)}: "
            yield from _parts(inner, name)
        yield "}" if value else "{}"
    elif isinstance(value, str):
        yield from ('"', _Blank(key), '"')
    elif isinstance(value, int):
        yield _Blank(key, BOOLEANS if isinstance(value, bool) else tuple(DIGITS))
    else:
        raise ValueError(f"a form has texts, whole numbers, true, false and objects, not {json.dumps(value)}")


@lru_cache(maxsize=2)
def _string_rules(tokenizer: ChatTokenizer, vocab_size: int) -> Rules:
    pieces = tokenizer.pieces()
    banned: list[list[int]] = [list(range(len(pieces), vocab_size)) for _ in range(3)]
    steps: list[dict[int, Step]] = [{}, dict.fromkeys(tokenizer.stop_ids, Step(None, ())), {}]
    for token, piece in enumerate(pieces):
        for state in (_EMPTY, _TEXT, _ESCAPE):
            before = "\\" if state == _ESCAPE else ""
            content = _CONTENT.match(before + piece)
            assert content is not None
            rest = (before + piece)[content.end() :]
            visible = state != _EMPTY or json.loads(f'"{content[0]}"').strip()
            if token in steps[state] or (piece and visible and not rest):
                continue
            left = tuple(tokenizer.encode_run(content[0][len(before) :], first=False))
            if piece and visible and (rest[0] == '"' or rest == "\\") and len(left) <= _MOST_LEFT:
                steps[state][token] = Step(None if rest[0] == '"' else _ESCAPE, left)
            else:
                banned[state].append(token)
    return Rules(tuple(map(torch.tensor, banned)), tuple(steps))


@lru_cache(maxsize=4)
def _choice_rules(tokenizer: ChatTokenizer, vocab_size: int, words: tuple[str, ...]) -> Rules:
    """One of some words, of which none begins another one: a state for each beginning of them."""
    pieces = {
        token: piece for token, piece in enumerate(tokenizer.pieces()) if piece and any(piece in w for w in words)
    }
    lacking = set("".join(words)) - set(pieces.values())
    if lacking:
        raise ValueError(f"the vocabulary lacks an id for {', '.join(sorted(lacking))}, of which a form has to choose")
    # State 1 stands for the end of a slot.
    begun = ["", "", *sorted({word[:length] for word in words for length in range(1, len(word))})]
    banned, steps = [], []
    for written in begun:
        texts = {token: written + piece for token, piece in pieces.items()}
        found = {token: Step(None, (token,)) for token, text in texts.items() if text in words}
        found |= {token: Step(begun.index(text, 2), (token,)) for token, text in texts.items() if text in begun[2:]}
        allowed = torch.zeros(vocab_size, dtype=torch.bool)
        allowed[list(found)] = True
        banned.append(torch.nonzero(~allowed)[:, 0])
        steps.append(found)
    return Rules(tuple(banned), tuple(steps))
