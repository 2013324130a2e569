"""A model answers the test dialogues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from selfevo.datasets.prompts import SELF_REFLECTION, reply_prompt
from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.folder import write_examples
from selfevo.evaluation.score import score_answers
from selfevo.evolve.json_repair import json_object_end, salvage_json
from selfevo.evolve.refine import RefineSettings, check_form, reflect
from selfevo.evolve.reflection import FREE, GUIDED, TEXT, answer_form, written_text
from selfevo.evolve.settings import flatten
from selfevo.files import FileError, read_json, write_json, write_jsonl
from selfevo.generate.replies import Reply, sample_replies
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
    source: str,
    refining: bool = False,
) -> dict[str, float]:
    """Answers every example and scores the answers under our convention; what is in ``folder`` already is not repeated.

    ``source`` says which model this is (``BACKBONE`` or ``BACKBONE@ADAPTER``). It is kept in ``NAME.request.json`` with
    all that the answers depend on; FileError is raised where the name stands for answers to another request.

    A test context that does not fit into the window loses its oldest turns; where that is not enough the example is
    left out for every model alike, and counted. Under the style ``self-reflection`` (Table 3) the reply is the text
    inside the JSON that the model writes. ``refining`` scores what the model makes of its replies when asked to reflect
    on them. A reply whose JSON cannot be used stays as it is; ``unusable_json`` and ``refined`` are counted.
    """
    if is_answered(folder, name, settings, source, refining):
        return {key: score["value"] for key, score in read_json(folder / f"{name}.json")["scores"].items()}
    if refining:
        check_form(model, tokenizer, settings)
    write_examples(folder, examples)
    write_json(folder / f"{name}.request.json", _request(settings, source, refining))
    prompts = [reply_prompt(to_messages(example.context), settings.prompts.system) for example in examples]
    as_json, guided = settings.style == SELF_REFLECTION, settings.reflection == GUIDED
    final = folder / f"{name}.replies.jsonl"
    replies = sample_replies(
        model, tokenizer, prompts, folder / name / "first_replies.jsonl" if as_json or refining else final,
        sampling=settings.sampling, max_new_tokens=settings.reflection_tokens if as_json else settings.max_new_tokens,
        stop_when=(lambda text: json_object_end(text, TEXT) is not None) if as_json and not guided else None,
        form=answer_form(model, tokenizer, settings.prompts.system, TEXT) if as_json and guided else None,
        slots=settings.slots, label=f"{name} answers the test dialogues",
    )  # fmt: skip
    counts: Counter[str] = Counter()
    if as_json:
        replies = [_text_of(reply, counts) for reply in replies]
    if refining:
        reflections = reflect(model, tokenizer, prompts, replies, folder / name, settings, counts)
        replies = [
            r if thought is None else replace(r, text=thought.refined) for r, thought in zip(replies, reflections)
        ]
        counts["refined"] = sum(thought is not None for thought in reflections)
    if as_json or refining:
        write_jsonl(final, [{"index": i, **vars(r)} for i, r in enumerate(replies)])
    return score_answers(folder, name, counts=counts)


def is_answered(folder: Path, name: str, settings: RefineSettings, source: str, refining: bool) -> bool:
    """Whether a name's answers are there and scored. Raises FileError where they are answers to another request."""
    path, scored = folder / f"{name}.request.json", (folder / f"{name}.json").is_file()
    if path.is_file():
        stored = read_json(path)
        stored = {"reflection": FREE} | stored  # which versions without a choice did not note
        for key, value in _request(settings, source, refining).items():
            if stored.get(key) != value:
                was = f"{name} was answered with {key} {stored.get(key)!r}"
                raise FileError(f"{folder}: {was}, now it is {value!r}; give another name")
    elif scored:
        raise FileError(f"{folder}: {name} was answered by a version that did not note how; give another name")
    return scored


def _request(settings: RefineSettings, source: str, refining: bool) -> dict[str, Any]:
    """All that answers depend on besides the test turns."""
    request = {"model": source, "refining": refining, "seed": settings.sampling.seed} | flatten(settings)
    request["prompts"] = sha256("\n".join(vars(settings.prompts).values()).encode()).hexdigest()
    return {key: value for key, value in request.items() if key not in ("slots", "chosen", "prompts_file")}


def _text_of(reply: Reply, counts: Counter[str]) -> Reply:
    """The reply inside ``{"strategy", "text"}``."""
    if reply.text is None:
        return reply
    found = salvage_json(reply.text, TEXT)
    text = None if found is None else written_text(found.value.get(TEXT))
    if text is not None:
        return replace(reply, text=text)
    counts["unusable_json"] += 1
    return reply
