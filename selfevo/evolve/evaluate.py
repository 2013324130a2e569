"""A model answers the test dialogues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfevo.datasets.prompts import reply_prompt
from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.folder import write_examples
from selfevo.evaluation.score import score_answers
from selfevo.evolve.refine import RefineSettings, reflect
from selfevo.files import read_json, write_jsonl
from selfevo.generate.replies import sample_replies
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer


def evaluate_model(
    model: Transformer,
    tokenizer: ChatTokenizer,
    examples: Sequence[Example],
    folder: Path,
    name: str,
    settings: RefineSettings,
    *,
    reflecting: bool = False,
) -> dict[str, float]:
    """Answers every example and scores the answers under our convention; what is in ``folder`` already is not repeated.

    A test context that does not fit into the window loses its oldest turns; where that is not enough the example is
    left out for every model alike, and counted. ``reflecting`` scores what the model makes of its replies when asked to
    reflect on them (Table 3); a reply whose reflection cannot be used stays as it is.
    """
    path = folder / f"{name}.json"
    if path.is_file():
        return {key: score["value"] for key, score in read_json(path)["scores"].items()}
    write_examples(folder, examples)
    prompts = [reply_prompt(to_messages(example.context), settings.style) for example in examples]
    first = folder / name / "first_replies.jsonl" if reflecting else folder / f"{name}.replies.jsonl"
    replies = sample_replies(
        model, tokenizer, prompts, first,
        sampling=settings.sampling, max_new_tokens=settings.max_new_tokens,
        slots=settings.slots, label=f"{name} answers the test dialogues",
    )  # fmt: skip
    counts: Counter[str] = Counter()
    if reflecting:
        reflections = reflect(model, tokenizer, prompts, replies, folder / name, settings, counts)
        replies = [
            r if thought is None else replace(r, text=thought.refined) for r, thought in zip(replies, reflections)
        ]
        counts["refined"] = sum(thought is not None for thought in reflections)
        write_jsonl(folder / f"{name}.replies.jsonl", [{"index": i, **vars(r)} for i, r in enumerate(replies)])
    return score_answers(folder, name, counts=counts)
