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
    """A form for objects like ``template``: its strings are slots for strings, its numbers for a digit from 1 to 5.

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
    shares = [(weights or {}).get(blank.key, 1) if blank.is_string else 0 for blank in blanks]
    least = sum(map(len, fixed)) + sum(rules.most_left if blank.is_string else 1 for blank in blanks)
    if tokens < least:
        raise ValueError(f"{tokens} tokens are too few for {json.dumps(template)}: it takes at least {least}")
    limits = [1 + (tokens - least) * share // max(1, sum(shares)) for share in shares]
    return Form(
        tuple(fixed),
        tuple(
            Slot(rules if blank.is_string else _digit_rules(tokenizer, vocab_size), limit)
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
    """A slot of a template, by the key that it belongs to."""

    key: str
    is_string: bool


def _parts(value: Any, key: str) -> Iterator[str | _Blank]:
    """The fixed texts and the slots of a template, in order."""
    if isinstance(value, Mapping):
        for place, (name, inner) in enumerate(value.items()):
            yield f"{', ' if place else '{'}{json.dumps(name, ensure_ascii=False)}: "
            yield from _parts(inner, name)
        yield "}" if value else "{}"
    elif isinstance(value, str):
        yield from ('"', _Blank(key, is_string=True), '"')
    elif isinstance(value, int) and not isinstance(value, bool):
        yield _Blank(key, is_string=False)
    else:
        raise ValueError(f"a form has texts, whole numbers and objects, not {json.dumps(value)}")


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


@lru_cache(maxsize=2)
def _digit_rules(tokenizer: ChatTokenizer, vocab_size: int) -> Rules:
    allowed = {token: piece for token, piece in enumerate(tokenizer.pieces()) if piece and piece in DIGITS}
    allowed = {token: piece for token, piece in allowed.items() if len(piece) == 1}
    if len(set(allowed.values())) < len(DIGITS):
        raise ValueError(f"the vocabulary lacks an id for each digit of {DIGITS}, of which a form has the model choose")
    return Rules((torch.tensor([token for token in range(vocab_size) if token not in allowed]),), ({},))
