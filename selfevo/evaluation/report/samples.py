"""Samples for a report: replies of all models to the same users, and pairs with the reflection between the two.

A sample is a heading, the turns of a dialogue, how many of them come first and are folded away, and the answers by
name: a text, or the parts of a reflection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from selfevo.datasets.pairs import read_pairs
from selfevo.dialogue import Messages, to_messages
from selfevo.evaluation.folder import read_examples
from selfevo.metrics import unigram_f1

Sample = dict[str, Any]
Replies = Mapping[str, Sequence[str | None]]
SAMPLES = 4
TURNS = 3  # of the context that are shown at once; those before them are folded away
GOLDEN = "golden (the person's)"


def sample_answers(folder: Path, replies: Replies) -> list[Sample]:
    """The models' replies to some test turns of an evaluation folder; a model that has not given all is left out."""
    complete = _complete(replies)
    count = len(next(iter(complete.values()), []))
    step = max(1, count // SAMPLES)
    return [_answers(folder, complete, index) for index in range(step // 2, count, step)[:SAMPLES]]


def telling_case(folder: Path, replies: Replies) -> Sample | None:
    """The test turn whose replies, the person's among them, have the least in common: the smallest largest F1 of the
    words of any two. Of those with at least two earlier exchanges, where there are some."""
    complete = _complete(replies)
    if not complete:
        return None
    examples, alike = read_examples(folder), dict[int, float]()
    deep = [index for index, example in enumerate(examples) if len(example.context) > 4] or list(range(len(examples)))
    for index in deep:
        texts = [own[index] or "" for own in complete.values()] + [examples[index].golden.text]
        if all(texts):
            alike[index] = max(unigram_f1([a], [b]) for a, b in combinations(texts, 2))
    return _answers(folder, complete, min(alike, key=lambda index: alike[index])) if alike else None


def _complete(replies: Replies) -> dict[str, Sequence[str | None]]:
    count = max((len(own) for own in replies.values()), default=0)
    return {name: own for name, own in replies.items() if len(own) == count}


def _answers(folder: Path, replies: Replies, index: int) -> Sample:
    examples = read_examples(folder)
    answers = {name: own[index] or "(no reply)" for name, own in replies.items()}
    return {
        "heading": f"Test turn {index + 1:,} of {len(examples):,}",
        **_turns(to_messages(examples[index].context)),
        "answers": answers | {GOLDEN: examples[index].golden.text},
    }


def _turns(messages: Messages) -> dict[str, Any]:
    spoken = [message for message in messages if message["role"] != "system"]
    return {"turns": spoken, "folded": max(0, len(spoken) - TURNS)}


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
            understanding = thought.get("understanding")
            understood = understanding if isinstance(understanding, dict) else {}
            reflection = {**understood, "score": score, "feedback": thought.get("feedback")}
            answers = {
                "first reply (rejected)": pair.rejected,
                "reflection": {name: str(text or "–") for name, text in reflection.items()},
                "refined (chosen)": pair.chosen,
            }
            samples.append({"heading": f"{stage}, pair {pair.id}", **_turns(pair.prompt), "answers": answers})
    return samples
