"""From conversations to texts: contexts cut to the window, replies sampled and kept on disk as they are finished.

A reply depends on its own index and prompt alone, so a killed rollout continues with the same replies: in float32, but
for a draw that lies within rounding of a boundary; in bfloat16 rounding is coarse, and depends on the batch's members.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from selfevo.datasets.encoding import fit_prompt
from selfevo.dialogue import Messages
from selfevo.files import read_jsonl, write_jsonl
from selfevo.generate.decoder import SLOTS, generate
from selfevo.generate.sampling import Sampling
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer
from selfevo.seeds import derive_seed
from selfevo.settings import option

R = TypeVar("R", bound="ReplySettings")


@dataclass(frozen=True)
class ReplySettings:
    """How replies are sampled, and how many at a time."""

    sampling: Sampling = Sampling()
    max_new_tokens: int = option(128, "longest reply, in tokens")
    slots: int = option(SLOTS, "replies decoded at a time: more is faster, and on a CPU cheap; fewer take less memory")

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def seeded(self: R, seed: int, *names: str | int) -> R:
        """The same settings with the seed of these names (see ``derive_seed``)."""
        return replace(self, sampling=replace(self.sampling, seed=derive_seed(seed, *names)))


@dataclass(frozen=True)
class Reply:
    """A sampled text; ``cut`` says that the token limit ended it. ``text`` is None where the prompt did not fit."""

    text: str | None
    tokens: int = 0
    cut: bool = False
    turns_dropped: int = 0


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
    slots: int = SLOTS,
    label: str = "replies",
) -> list[Reply]:
    """One reply per conversation, in order, kept in ``path`` (JSON lines); what is there is not sampled again.

    A reply has at most ``max_new_tokens``, and at most a quarter of the model's window. ``stop_when`` sees the text so
    far whenever a token has closed a brace, and ends the reply. ``slots`` replies are decoded at a time, which bounds
    the memory of their keys and values. Until all are finished they are in ``PATH.unfinished``, in the order in which
    they came.
    """
    if not path.is_file():
        with _Unfinished(path, len(prompts)) as finished:
            _sample_missing(
                model, tokenizer, prompts, finished, sampling, max_new_tokens, keep_last, stop_when, slots, label
            )
            write_jsonl(path, [{"index": index, **vars(finished.replies[index])} for index in range(len(prompts))])
    records = read_jsonl(path)
    if len(records) != len(prompts):
        raise ValueError(f"{path}: holds {len(records)} replies where {len(prompts)} are wanted; it is of another run")
    return [_as_reply(record) for record in records]


def _sample_missing(
    model: Transformer,
    tokenizer: ChatTokenizer,
    prompts: Sequence[Messages],
    finished: _Unfinished,
    sampling: Sampling,
    max_new_tokens: int,
    keep_last: int,
    stop_when: Callable[[str], bool] | None,
    slots: int,
    label: str,
) -> None:
    max_new_tokens = min(max_new_tokens, model.config.max_positions // 4)  # a short window is mostly for the context
    room = model.config.max_positions - max_new_tokens
    missing = [index for index in range(len(prompts)) if index not in finished.replies]
    fitted = {index: fit_prompt(tokenizer, prompts[index], room, keep_last=keep_last) for index in missing}
    asked = {index: prompt.ids for index, prompt in fitted.items() if prompt.ids is not None}
    for index in missing:
        if index not in asked:
            finished.keep(index, Reply(None, turns_dropped=fitted[index].turns_dropped))
    indices = list(asked)

    def stop(ids: list[int]) -> bool:
        return stop_when is not None and "}" in tokenizer.decode(ids[-1:]) and stop_when(tokenizer.decode(ids))

    def keep(place: int, ids: list[int]) -> None:
        index, cut = indices[place], len(ids) == max_new_tokens and not stop(ids)
        finished.keep(index, Reply(tokenizer.decode(ids).strip(), len(ids), cut, fitted[index].turns_dropped))

    generate(
        model, list(asked.values()), max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids, keys=indices,
        batch_size=slots, stop_when=None if stop_when is None else stop, on_reply=keep, progress=label,
        **vars(sampling),
    )  # fmt: skip


class _Unfinished:
    """The replies of a rollout on its way to ``path``: each is a line of ``PATH.unfinished`` as soon as it is there.

    On entering, those of a rollout that was killed are read back; on leaving without an error the file goes.
    """

    def __init__(self, path: Path, total: int) -> None:
        self.path, self.total = path.with_name(f"{path.name}.unfinished"), total
        self.replies: dict[int, Reply] = {}

    def __enter__(self) -> _Unfinished:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            data = self.path.read_bytes()
            os.truncate(self.path, data.rfind(b"\n") + 1)  # a kill may have torn the last line
            self.replies = {record["index"]: _as_reply(record) for record in read_jsonl(self.path)}
        if any(index >= self.total for index in self.replies):
            raise ValueError(f"{self.path}: holds other replies than the {self.total} wanted; it is of another run")
        self.file = self.path.open("a", encoding="utf-8")
        return self

    def keep(self, index: int, reply: Reply) -> None:
        self.replies[index] = reply
        self.file.write(json.dumps({"index": index, **vars(reply)}) + "\n")
        self.file.flush()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.file.close()
        if kind is None:
            self.path.unlink()


def _as_reply(record: Mapping[str, Any]) -> Reply:
    return Reply(**{name: value for name, value in record.items() if name != "index"})
