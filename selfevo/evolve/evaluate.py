"""A model answers the test dialogues."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from selfevo.datasets.prompts import SELF_REFLECTION, reply_prompt
from selfevo.dialogue import Example, to_messages
from selfevo.evaluation.folder import check_examples, check_name, write_examples
from selfevo.evaluation.origin import adapter_hash, backbone_hash, first_difference
from selfevo.evaluation.score import read_report, score_answers
from selfevo.evolve.json_repair import json_object_end, salvage_json
from selfevo.evolve.refine import RefineSettings, check_form, reflect
from selfevo.evolve.reflection import FREE, GUIDED, TEXT, answer_form, written_text
from selfevo.evolve.run import BackboneSettings, dtype_of
from selfevo.evolve.settings import flatten
from selfevo.files import FileError, StrPath, read_object, write_json, write_jsonl
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
    origin: Mapping[str, Any],
    refining: bool = False,
) -> dict[str, float]:
    """Answers every example and scores the answers under our convention; what is in ``folder`` already is not repeated.

    ``origin`` says which model this is, as ``origin_of`` does. It is kept in ``NAME.request.json`` with all that the
    answers depend on; FileError is raised where the name stands for answers to another request, or the folder has
    answers to other test turns.

    A test context that does not fit into the window loses its oldest turns; where that is not enough the example is
    left out for every model alike, and counted. Under the style ``self-reflection`` (Table 3) the reply is the text
    inside the JSON that the model writes. ``refining`` scores what the model makes of its replies when asked to reflect
    on them. A reply whose JSON cannot be used stays as it is; ``unusable_json`` and ``refined`` are counted.
    """
    check_examples(folder, examples)
    if is_answered(folder, name, settings, origin, refining):
        return {key: score["value"] for key, score in read_report(folder / f"{name}.json")["scores"].items()}
    if refining:
        check_form(model, tokenizer, settings)
    write_examples(folder, examples)
    if not (folder / f"{name}.request.json").is_file():
        write_json(folder / f"{name}.request.json", _request(settings, origin, refining))
    prompts = [reply_prompt(to_messages(example.context), settings.prompts.system) for example in examples]
    as_json, guided = settings.style == SELF_REFLECTION, settings.reflection == GUIDED
    final = folder / f"{name}.replies.jsonl"
    replies = sample_replies(
        model, tokenizer, prompts, folder / name / "first_replies.jsonl" if as_json or refining else final,
        sampling=settings.sampling, max_new_tokens=settings.reflection_tokens if as_json else settings.max_new_tokens,
        stop_when=partial(json_object_end, wanted=TEXT) if as_json and not guided else None,
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


def origin_of(backbone: BackboneSettings, adapter: StrPath | None = None, shown: str = "") -> dict[str, Any]:
    """Which model answers: ``BACKBONE`` or ``BACKBONE@ADAPTER`` as it is ``shown``, the contents of both, and how the
    backbone is loaded."""
    name = shown or backbone.source + ("" if adapter is None else f"@{adapter}")
    return {
        "model": name,
        "backbone_sha256": backbone_hash(backbone.source, backbone.revision),
        "adapter_sha256": "" if adapter is None else adapter_hash(adapter),
        "chat_format": backbone.chat_format,
        "dtype": dtype_of(backbone),
    }


def is_answered(
    folder: Path, name: str, settings: RefineSettings, origin: Mapping[str, Any], refining: bool = False
) -> bool:
    """Whether a name's answers are there and scored. Raises FileError where they are answers to another request."""
    check_name(name)
    path = folder / f"{name}.request.json"
    if not path.is_file():
        files = [f"{name}.json", f"{name}.replies.jsonl", f"{name}.replies.jsonl.unfinished", name]
        if found := [file for file in files if (folder / file).exists()]:
            raise FileError(
                f"{folder}: holds {' and '.join(found)} without a note of the request; give another name than {name}, "
                "or remove them"
            )
        return False
    stored, request = read_object(path).values, _request(settings, origin, refining)
    # What versions without a choice did not note; of contents they noted nothing.
    request = {key: value for key, value in request.items() if key in stored or key not in origin}
    if all(request.get(key, "") == stored.get(key) for key in ("backbone_sha256", "adapter_sha256")):
        request.pop("model")  # the same files in another place
    if difference := first_difference({"reflection": FREE} | stored, request):
        raise FileError(
            f"{path}: {name} was answered otherwise ({difference}); give another name, or remove {name}.request.json, "
            f"{name}.replies.jsonl, {name}.json and {name}/ to answer anew"
        )
    return (folder / f"{name}.json").is_file()


def _request(settings: RefineSettings, origin: Mapping[str, Any], refining: bool) -> dict[str, Any]:
    """All that answers depend on besides the test turns."""
    request = {**origin, "refining": refining, "seed": settings.sampling.seed} | flatten(settings)
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
