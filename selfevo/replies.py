"""From conversations to texts: contexts cut to the window, replies sampled chunk by chunk and kept on disk.

A chunk's members never depend on what was finished before, so a killed rollout continues with the very same replies.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfevo.files import read_jsonl, write_jsonl
from selfevo.generate import Sampling, generate
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer

Messages = Sequence[Mapping[str, str]]
CHUNK = 256  # prompts generated together and written together


@dataclass(frozen=True)
class Reply:
    """A sampled text; ``cut`` says that the token limit ended it. ``text`` is None where the prompt did not fit."""

    text: str | None
    tokens: int = 0
    cut: bool = False
    turns_dropped: int = 0


@dataclass(frozen=True)
class FittedPrompt:
    """A prompt's ids after the oldest turns were dropped; ``ids`` is None where even the shortest form is too long."""

    ids: list[int] | None
    turns_dropped: int


def fit_prompt(tokenizer: ChatTokenizer, messages: Messages, room: int, *, keep_last: int = 1) -> FittedPrompt:
    """Ids of a conversation within ``room`` tokens: whole exchanges are dropped, the oldest first.

    The system message and the ``keep_last`` last messages always stay: 1 for a reply (the user's turn), 3 for a
    reflection (the user's turn, the reply, the request).
    """
    has_system = bool(messages) and messages[0]["role"] == "system"
    head, spoken = list(messages[:1] if has_system else []), list(messages[1:] if has_system else messages)
    dropped = 0
    while True:
        ids = tokenizer.encode_chat([*head, *spoken[dropped:]])
        if len(ids) <= room:
            return FittedPrompt(ids, dropped)
        if len(spoken) - dropped - 2 < keep_last:
            return FittedPrompt(None, dropped)
        dropped += 2


def sample_replies(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Messages],
    path: Path,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    keep_last: int = 1,
    stop_when: Callable[[str], bool] | None = None,
    slots: int = 32,
    label: str = "replies",
) -> list[Reply]:
    """One reply per conversation, in order; finished chunks are kept in ``path`` (JSON lines) and not sampled again.

    A reply has at most ``max_new_tokens``, and at most a quarter of the model's window. ``stop_when`` sees the text so
    far whenever a token has closed a brace, and ends the reply. ``slots`` replies are decoded at a time, which bounds
    the memory of their keys and values.
    """
    max_new_tokens = min(max_new_tokens, model.config.max_positions // 4)  # a short window is mostly for the context
    records = _finished(path, len(prompts))
    while len(records) < len(prompts):
        chunk = range(len(records), min(len(records) + CHUNK, len(prompts)))
        name = f"{label}, {chunk.start + 1}-{chunk.stop} of {len(prompts)}"
        replies = _sample_chunk(
            model, tokenizer, prompts, chunk, sampling, max_new_tokens, keep_last, stop_when, slots, name
        )
        records = records + [{"index": index, **vars(reply)} for index, reply in zip(chunk, replies)]
        write_jsonl(path, records)
    return [Reply(**{name: value for name, value in record.items() if name != "index"}) for record in records]


def _finished(path: Path, total: int) -> list[dict[str, Any]]:
    """The records of an earlier, perhaps unfinished rollout."""
    if not path.is_file() or os.path.getsize(path) == 0:
        return []
    records: list[dict[str, Any]] = read_jsonl(path)
    if len(records) > total:
        raise ValueError(f"{path}: holds {len(records)} replies where {total} are wanted; it is of another run")
    return records


def _sample_chunk(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Messages],
    chunk: range,
    sampling: Sampling,
    max_new_tokens: int,
    keep_last: int,
    stop_when: Callable[[str], bool] | None,
    slots: int,
    label: str,
) -> list[Reply]:
    room = model.config.max_positions - max_new_tokens
    fitted = [fit_prompt(tokenizer, prompts[index], room, keep_last=keep_last) for index in chunk]
    keys = [index for index, prompt in zip(chunk, fitted) if prompt.ids is not None]

    def stop(ids: list[int]) -> bool:
        return stop_when is not None and "}" in tokenizer.decode(ids[-1:]) and stop_when(tokenizer.decode(ids))

    generated = generate(
        model,
        [prompt.ids for prompt in fitted if prompt.ids is not None],
        max_new_tokens=max_new_tokens,
        stop_ids=tokenizer.stop_ids,
        keys=keys,
        batch_size=slots,
        stop_when=None if stop_when is None else stop,
        progress=label,
        **vars(sampling),
    )
    by_key = dict(zip(keys, generated))
    replies = []
    for index, prompt in zip(chunk, fitted):
        ids = by_key.get(index)
        if ids is None:
            replies.append(Reply(None, turns_dropped=prompt.turns_dropped))
            continue
        cut = len(ids) == max_new_tokens and not stop(ids)
        replies.append(Reply(tokenizer.decode(ids).strip(), len(ids), cut, prompt.turns_dropped))
    return replies
