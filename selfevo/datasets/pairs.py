"""Preference pairs and their file, ``pairs.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfevo.dialogue import Message
from selfevo.files import FileError, read_jsonl

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
    pairs = []
    for index, record in enumerate(read_jsonl(path)):
        try:
            (chosen,), (rejected,) = record["chosen"], record["rejected"]
            own = {name: record[name] for name in ("prompt", *_OWN_FIELDS)}
            cut = bool(record.get("rejected_cut", False))
            pairs.append(Pair(chosen=chosen["content"], rejected=rejected["content"], rejected_cut=cut, **own))
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path}: record {index} is not a preference pair as written by this library: {error!r}"
            ) from error
    return pairs
