"""Samples for a report: replies of all models to the same users, and pairs with the reflection between the two.

A sample is a heading, the last turns of a dialogue, and the answers by name: a text, or the parts of a reflection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfevo.datasets.pairs import read_pairs
from selfevo.dialogue import to_messages
from selfevo.evaluation.folder import read_examples

Sample = dict[str, Any]
SAMPLES = 4
TURNS = 3  # of the context that are shown


def sample_answers(folder: Path, replies: Mapping[str, Sequence[str | None]]) -> list[Sample]:
    """The models' replies to some test turns of an evaluation folder; a model that has not given all is left out."""
    count = max((len(own) for own in replies.values()), default=0)
    examples = read_examples(folder) if count else []
    step = max(1, count // SAMPLES)
    return [
        {
            "heading": f"Test turn {index + 1:,} of {count:,}",
            "turns": to_messages(examples[index].context)[-TURNS:],
            "answers": {name: own[index] or "(no reply)" for name, own in replies.items() if len(own) == count},
        }
        for index in range(step // 2, count, step)[:SAMPLES]
    ]


def sample_pairs(run: Path, stages: Sequence[str]) -> list[Sample]:
    """One pair of each iteration, with what the model wrote about the user and about its own reply."""
    samples = []
    for stage in stages:
        path = run / stage / "pairs.jsonl"
        pairs = [pair for pair in read_pairs(path) if pair.source == "refined"] if path.is_file() else []
        if pairs:
            pair = pairs[len(pairs) // 2]
            thought = pair.reflection or {}
            score = "none" if thought.get("score") is None else f"{thought['score']} of 5"
            reflection = {**(thought.get("understanding") or {}), "score": score, "feedback": thought.get("feedback")}
            turns = [message for message in pair.prompt if message["role"] != "system"][-TURNS:]
            answers = {
                "first reply (rejected)": pair.rejected,
                "reflection": {name: str(text or "–") for name, text in reflection.items()},
                "refined (chosen)": pair.chosen,
            }
            samples.append({"heading": f"{stage}, pair {pair.id}", "turns": turns, "answers": answers})
    return samples
