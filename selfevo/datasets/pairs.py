"""Preference pairs and their file, ``pairs.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfevo.dialogue import Message
from selfevo.files import Fields, read_jsonl

_OWN_FIELDS = ("id", "dialogue", "golden", "source", "reflection")


@dataclass(frozen=True)
class Pair:
    """One preference pair; ``source`` is where the chosen reply comes from: "refined" or "golden".

    ``rejected_cut``: the token limit ended the rejected reply, so the model wrote no end to it.
    """

    id: str
    dialogue: str
    prompt: list[Message]
    chosen: str
    rejected: str
    golden: str
    source: str
    reflection: dict[str, Any] | None = None
    rejected_cut: bool = False

    def as_record(self) -> dict[str, Any]:
        """The conversational preference format that TRL loads, with further fields of our own."""
        own = {name: getattr(self, name) for name in _OWN_FIELDS}
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (self.chosen, self.rejected))
        return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected, "rejected_cut": self.rejected_cut, **own}


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a ``pairs.jsonl``. Raises ``FileError`` for a record that this library did not write."""
    records = [Fields(values, f"{path}: record {index}") for index, values in enumerate(read_jsonl(path))]
    return [_read_pair(record) for record in records]


def _read_pair(record: Fields) -> Pair:
    def messages(key: str) -> list[Message]:
        found = [Fields(message, f"{record.where}, {key!r}") for message in record.take_list(key, dict)]
        return [{part: message.take(part, str) for part in ("role", "content")} for message in found]

    sides = [messages(key) for key in ("chosen", "rejected")]
    if any(len(side) != 1 for side in sides):
        raise record.fail("'chosen' and 'rejected' should each be one message, as this library writes them")
    prompt = messages("prompt")
    chosen, rejected = (side[0]["content"] for side in sides)
    id_, dialogue, golden, source = (record.take(name, str) for name in ("id", "dialogue", "golden", "source"))
    thought, cut = record.take("reflection", dict, None), record.take("rejected_cut", bool, False)
    return Pair(id_, dialogue, prompt, chosen, rejected, golden, source, thought, cut)
