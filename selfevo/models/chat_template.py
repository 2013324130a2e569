"""A checkpoint's own chat template, rendered by Jinja2 in its immutable sandbox, with contents that stay plain text.

Every content is put into the template as an unguessable placeholder. What the template itself writes is then encoded
with its control tokens, and each content as plain text in its place: no message can become a control token, whatever
the template does with it. The conventions are those of transformers.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfevo.dialogue import Messages
from selfevo.models.chat import ChatError, ChatFormat, Codec

# Templates may write today's date. This is the day on which that of Llama-3.1 falls back: a run has the same ids on any
# day.
TODAY = datetime(2024, 7, 26)
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")  # marks for transformers' masks; they write nothing
_PROBE = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})


@dataclass
class Run:
    """Text between two control tokens, and where in it a generation prompt would have ended."""

    text: str
    splits: list[int]


class TemplateChat(ChatFormat):
    """``template`` with the values of ``tokens`` (``bos_token``, ``eos_token``, ...); ``special`` has the control ids.

    Raises :class:`ChatError`, with the reason, for a template that cannot be rendered, that alters contents other than
    by trimming, or whose assistant turns do not begin as its generation prompt does and end with a control token.
    """

    name = "template"
    later_system = True

    def __init__(self, template: str, tokens: Mapping[str, str], special: Mapping[str, int]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
        try:
            self._template = environment.from_string(_GENERATION.sub(_unmark, template))
        except TemplateError as error:
            raise ChatError(f"it is not valid Jinja: {error}") from error
        self._tokens, self._special = dict(tokens), dict(special)
        self._secret = secrets.token_hex(16)
        names = "|".join(sorted(map(re.escape, special), key=len, reverse=True)) or "(?!)"
        self._piece = re.compile(rf"(\ue000{self._secret}\d+\ue001)|({names})")
        prompt, whole = self._render(_PROBE[:1], True), self._render(_PROBE, False)
        if not whole.startswith(prompt):
            raise ChatError("an assistant's turn does not begin as its generation prompt does")
        rest = whole[len(prompt) :]
        self._lead = rest[: rest.index("\ue000")]
        spaced = self._render((_PROBE[0], {"role": "assistant", "content": " a"}), False)
        self._trims = len(spaced) == len(whole)
        ends = [found[2] for found in self._piece.finditer(rest) if found[2]]
        if not ends:
            raise ChatError("an assistant's turn does not end with a control token")
        self._end = self._special[ends[0]]

    def __call__(self, codec: Codec, messages: Messages, add_generation_prompt: bool) -> list[int]:
        return self._encode(codec, self._render(messages, add_generation_prompt), messages)

    def reply(self, codec: Codec, text: str) -> list[int]:
        messages = (_PROBE[0], {"role": "assistant", "content": text})
        prompt = self._encode(codec, self._render(messages[:1], True), messages)
        whole = self._encode(codec, self._render(messages, False), messages)
        return whole[len(prompt) : whole.index(self._end, len(prompt)) + 1]

    def stop_ids(self, codec: Codec) -> tuple[int, ...]:
        return (self._end,)

    def _render(self, messages: Messages, add_generation_prompt: bool) -> str:
        """The template's text with placeholders; white space around a content is the template's to keep or to trim."""
        shown = []
        for index, message in enumerate(messages):
            content = message["content"]
            held = self._placeholder(index).join(_around(content)) if content else ""
            shown.append({"role": message["role"], "content": held})
        try:
            text = self._template.render(
                messages=shown, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._tokens
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
            raise ChatError(f"the chat template cannot write these messages: {error}") from error
        for index, message in enumerate(messages):
            if message["content"] and text.count(self._placeholder(index)) != 1:
                raise ChatError(f"the chat template leaves out or alters the content of message {index}")
        return text

    def _placeholder(self, index: int) -> str:
        return f"\ue000{self._secret}{index}\ue001"

    def _encode(self, codec: Codec, text: str, messages: Messages) -> list[int]:
        """The ids of a rendered text: control tokens by name, the runs between them as plain text."""
        ids: list[int] = []
        run, at = Run("", []), 0
        for found in self._piece.finditer(text):
            run.text += text[at : found.start()]
            at = found.end()
            if found[2]:
                ids += [*_encode_run(codec, run, first=not ids), self._special[found[2]]]
                run = Run("", [])
            else:
                message = messages[int(found[1][1 + len(self._secret) : -1])]
                if message["role"] == "assistant":
                    kept = "" if self._trims else _around(message["content"])[0]
                    run.splits.append(len(run.text) - len(kept) - len(self._lead))
                run.text += message["content"].strip()
        run.text += text[at:]
        return ids + _encode_run(codec, run, first=not ids)


def _unmark(mark: re.Match[str]) -> str:
    return f"{mark[1]}endif{mark[3]}" if mark[2] else f"{mark[1]}if true{mark[3]}"


def _around(content: str) -> tuple[str, str]:
    """The white space before and after a content; all of it comes before where there is nothing else."""
    return content[: len(content) - len(content.lstrip())], content[len(content.rstrip()) :] if content.strip() else ""


def _encode_run(codec: Codec, run: Run, *, first: bool) -> list[int]:
    """The ids of a run, the same whether it is encoded at once or as a generation prompt and what follows it.

    Where a token would reach across a split, the two sides are encoded apart, as they are when a model writes.
    """
    ids: list[int] = []
    for start, end in zip([0, *run.splits], [*run.splits, len(run.text)]):
        whole = codec.encode_run(run.text[:end], first=first)
        known = codec.encode_run(run.text[:start], first=first) if start else []
        joined = whole[: len(known)] == known
        ids += whole[len(known) :] if joined else codec.encode_run(run.text[start:end], first=False)
    return ids


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)
