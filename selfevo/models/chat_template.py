"""A checkpoint's own chat template, rendered by Jinja2 in its immutable sandbox, with contents that stay plain text.

Every content is put into the template as an unguessable placeholder. What the template itself writes is then encoded
with its control tokens, and each content as plain text in its place: no message can become a control token, whatever
the template does with it. The conventions are those of transformers.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.filters import do_indent
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from selfevo.dialogue import Messages
from selfevo.files import one_line
from selfevo.models.chat import ChatError, ChatFormat, Codec

# Templates may write today's date. This is the day on which that of Llama-3.1 falls back: a run has the same ids on any
# day.
TODAY = datetime(2024, 7, 26)
_GENERATION = re.compile(r"(\{%-?\s*)(end)?generation(\s*-?%\})")  # marks for transformers' masks; they write nothing
# What a template may do for one conversation, and more for each message: turns of loops, calls, and each 100 characters
# of what they make; and the characters or entries of one value.
_STEPS, _STEPS_PER_MESSAGE, _LARGEST_VALUE = 100_000, 200, 1_000_000
_PROBE = ({"role": "user", "content": "u"}, {"role": "assistant", "content": "a"})


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no template runs for ever or fills the memory: loops and calls are counted, sizes checked."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.steps, self.allowed = 0, _STEPS
        for name in ("batch", "center", "format", "slice", "wordwrap"):  # which make much of little
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters |= {"tojson": _to_json, "indent": _indent, "counted": self.counted, "sized": self.sized}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """The template with every loop counted, and every text that it puts together measured."""
        tree: nodes.Template = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        for block in tree.find_all(nodes.AssignBlock):
            block.filter = nodes.Filter(block.filter, "sized", [], [], None, None, lineno=block.lineno)
        for joined in tree.find_all(nodes.Concat):
            joined.nodes = [nodes.Filter(nodes.Concat(joined.nodes), "sized", [], [], None, None, lineno=joined.lineno)]
        for number in tree.find_all(nodes.Const):
            self.sized(number.value)
        return tree

    def step(self, cost: int = 1) -> None:
        self.steps += cost
        if self.steps > self.allowed:
            raise TemplateError("it takes too many steps")

    def counted(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def sized(self, value: Any) -> Any:
        """The value, at a cost by its size; no conversation needs a text, a list or a number that is very large."""
        size = (
            len(value) if isinstance(value, (str, list, tuple, dict)) else abs(value) if isinstance(value, int) else 0
        )
        if size > _LARGEST_VALUE:
            raise TemplateError(f"it makes a value of size {float(min(size, 10**300)):.0e}")
        self.step(1 + size // 100)
        return value

    def wrap_str_format(self, value: Any) -> None:
        if super().wrap_str_format(value) is not None:
            raise TemplateError("texts are not formatted by format() here")

    def call(self, context: Context, called: Any, /, *values: Any, **named: Any) -> Any:
        if isinstance(called, LoopContext) and values:  # a loop that calls itself
            values = (self.counted(values[0]), *values[1:])
        for value in (*values, *named.values()):
            self.sized(value)
        return self.sized(super().call(context, called, *values, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(value) if isinstance(value, (str, list, tuple)) else 0 for value in (left, right)]
        numbers = [abs(value) for value in (left, right) if isinstance(value, (int, float))]
        if operator == "**" and max(numbers, default=0) > 64:
            raise TemplateError("a power is too large")
        if operator == "*" and sum(sizes) * max(numbers, default=1) > _LARGEST_VALUE:
            raise TemplateError("a repeated text is too long")
        if operator == "%" and sizes[0]:
            raise TemplateError("texts are not formatted by % here")
        return self.sized(super().call_binop(context, operator, left, right))


@dataclass
class Run:
    """Text between two control tokens, and where in it a generation prompt would have ended."""

    text: str
    splits: list[int]


class TemplateChat(ChatFormat):
    """``template`` with the values of ``tokens`` (``bos_token``, ``eos_token``, ...); ``special`` has the control ids.

    Raises :class:`ChatError`, with the reason, for a template that cannot be rendered, that alters contents other than
    by trimming, or whose assistant turns do not begin as its generation prompt does and end with a control token.
    ``where`` names the template in messages.
    """

    name = "template"
    later_system = True

    def __init__(
        self, template: str, tokens: Mapping[str, str], special: Mapping[str, int], where: str = "the chat template"
    ) -> None:
        self._environment, self._where = BoundedEnvironment(), where
        try:
            self._template = self._environment.from_string(_GENERATION.sub(_unmark, template))
        except Exception as error:  # Jinja2 compiles it, and Python then what comes of that
            raise ChatError(f"it is not valid Jinja: {_reason(error)}") from error
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
        if self._end not in whole[len(prompt) :]:
            raise ChatError(f"{self._where} ends not every assistant's turn with the same control token")
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
        self._environment.steps, self._environment.allowed = 0, _STEPS + _STEPS_PER_MESSAGE * len(messages)
        try:
            parts = self._template.generate(
                messages=shown, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._tokens
            )
            text = "".join(map(self._environment.sized, parts))
        except Exception as error:  # whatever a template raises is its own
            raise ChatError(f"{self._where} cannot write these messages: {_reason(error)}") from error
        for index, message in enumerate(messages):
            if message["content"] and text.count(self._placeholder(index)) != 1:
                raise ChatError(f"{self._where} leaves out or alters the content of message {index}")
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


def _reason(error: Exception) -> str:
    """What went wrong, in words of a template rather than of Python."""
    if not isinstance(error, TemplateError):
        return f"it fails in Python with a {type(error).__name__.removesuffix('Error').lower()} error"
    return one_line(str(error)).replace(" object has no ", " without ")


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    return do_indent(text, width if isinstance(width, str) else min(width, 100), first, blank)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **how: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **how)
