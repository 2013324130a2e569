"""Samples for a report: replies of all models to the same users, and pairs with the reflection between the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from selfevo.datasets.pairs import Pair, read_pairs
from selfevo.dialogue import to_messages
from selfevo.evaluation.folder import read_examples
from selfevo.evaluation.report.html import Html, element, join

SAMPLES = 4
TURNS = 3  # of the context that are shown


def sample_answers(folder: Path, replies: Mapping[str, Sequence[str | None]]) -> Html:
    """The models' replies to some test turns of an evaluation folder, under the last turns of each context.

    A model that has not answered all of them yet is left out.
    """
    count = max((len(own) for own in replies.values()), default=0)
    if not count:
        return Html("")
    examples = read_examples(folder)
    parts = []
    step = max(1, count // SAMPLES)
    for index in range(step // 2, count, step)[:SAMPLES]:
        heading = element("h3", f"Test turn {index + 1:,} of {count:,}")
        turns = _turns(to_messages(examples[index].context))
        answers = [_answer(name, own[index] or "(no reply)") for name, own in replies.items() if len(own) == count]
        parts.append(element("div.talk", heading, turns, element("div.answers", *answers)))
    return join(*parts)


def sample_pairs(run: Path, stages: Sequence[str]) -> Html:
    """One pair of each iteration, with what the model wrote about the user and about its own reply."""
    parts = []
    for stage in stages:
        path = run / stage / "pairs.jsonl"
        pairs = [pair for pair in read_pairs(path) if pair.source == "refined"] if path.is_file() else []
        if pairs:
            pair = pairs[len(pairs) // 2]
            steps = (
                _answer("first reply (rejected)", pair.rejected),
                element("div.answer", element("span.who", "reflection"), _reflection(pair)),
                _answer("refined (chosen)", pair.chosen),
            )
            heading = element("h3", f"{stage}, pair {pair.id}")
            parts.append(element("div.talk", heading, _turns(pair.prompt), element("div.answers", *steps)))
    return join(*parts)


def _reflection(pair: Pair) -> Html:
    thought = pair.reflection or {}
    lines = dict(thought.get("understanding") or {})
    lines["score"] = "none" if thought.get("score") is None else f"{thought['score']} of 5"
    lines["feedback"] = thought.get("feedback") or ""
    items = [join(element("dt", name), element("dd", str(text) or "–")) for name, text in lines.items()]
    return element("dl", *items)


def _turns(messages: Sequence[Mapping[str, str]]) -> Html:
    spoken = [message for message in messages if message["role"] != "system"][-TURNS:]
    names = {"user": "user", "assistant": "supporter"}
    return join(*(element("p.turn", element("span.who", names[m["role"]]), m["content"]) for m in spoken))


def _answer(name: str, text: str) -> Html:
    return element("div.answer", element("span.who", name), text)
