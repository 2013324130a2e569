"""Preference pairs: the record and its file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfevo.dialogue import Message
from selfevo.files import FileError, read_jsonl


@dataclass(frozen=True)
class Pair:
    """One preference pair; ``source`` says where the chosen reply comes from: "refined" or "golden"."""

    id: str
    dialogue: str
    prompt: list[Message]
    chosen: str
    rejected: str
    golden: str
    source: str
    reflection: dict[str, Any] | None = None

    def as_record(self) -> dict[str, Any]:
        """The conversational preference form that TRL and LLaMA-Factory load, with our own fields beside it."""
        return {
            "prompt": self.prompt,
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
            "id": self.id,
            "dialogue": self.dialogue,
            "golden": self.golden,
            "source": self.source,
            "reflection": self.reflection,
        }


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a ``pairs.jsonl``."""
    pairs = []
    for index, record in enumerate(read_jsonl(path)):
        try:
            (chosen,), (rejected,) = record["chosen"], record["rejected"]
            own = {name: record[name] for name in ("id", "dialogue", "prompt", "golden", "source", "reflection")}
            pairs.append(Pair(chosen=chosen["content"], rejected=rejected["content"], **own))
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(
                f"{path}: record {index} is not a preference pair as written by this library: {error!r}"
            ) from error
    return pairs
