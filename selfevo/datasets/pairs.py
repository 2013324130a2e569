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
    """One preference pair; ``source`` is where the chosen reply comes from: "refined" or "golden"."""

    id: str
    dialogue: str
    prompt: list[Message]
    chosen: str
    rejected: str
    golden: str
    source: str
    reflection: dict[str, Any] | None = None

    def as_record(self) -> dict[str, Any]:
        """The conversational preference format that TRL and LLaMA-Factory load, with further fields of our own."""
        own = {name: getattr(self, name) for name in _OWN_FIELDS}
        chosen, rejected = ([{"role": "assistant", "content": text}] for text in (self.chosen, self.rejected))
        return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected, **own}


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a ``pairs.jsonl``. Raises ``FileError`` for a record that this library did not write."""
    pairs = []
    for index, record in enumerate(read_jsonl(path)):
        try:
            (chosen,), (rejected,) = record["chosen"], record["rejected"]
            own = {name: record[name] for name in ("prompt", *_OWN_FIELDS)}
            pairs.append(Pair(chosen=chosen["content"], rejected=rejected["content"], **own))
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path}: record {index} is not a preference pair as written by this library: {error!r}"
            ) from error
    return pairs
