"""A model answers test dialogues, each turn in its ground-truth context; the answers, their scores and the tables.

An evaluation folder (``eval`` in a run) holds all that is needed to score again, to judge and to report, without the
data or the models: ``examples.jsonl``, and for every model ``NAME.replies.jsonl``, ``NAME.json`` (its scores) and
``NAME.values.jsonl`` (what each reply scored).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from selfevo.dialogue import Example, Turn, to_messages
from selfevo.files import FileError, read_json, read_jsonl, write_json, write_jsonl
from selfevo.markup import interval_text, markdown_table
from selfevo.models.tokenizer import ChatTokenizer
from selfevo.models.transformer import Transformer
from selfevo.prompts import reply_prompt
from selfevo.refine import RefineSettings, reflect
from selfevo.replies import sample_replies
from selfevo.scores import BERT_MODEL, score_replies
from selfevo.significance import Comparison, compare


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


def write_examples(folder: Path, examples: Sequence[Example]) -> None:
    """Keeps the test turns in ``folder``; raises FileError where it holds answers to other ones."""
    path = folder / "examples.jsonl"
    records = [
        {
            "id": example.id,
            "dialogue": example.dialogue,
            "turn": example.turn,
            "context": to_messages(example.context),
            "golden": example.golden.text,
            "strategies": list(example.golden.strategies),
        }
        for example in examples
    ]
    if not path.is_file():
        write_jsonl(path, records)
    elif read_jsonl(path) != records:
        raise FileError(f"{path}: holds other test turns; give another folder, or the same test file and limit")


def read_examples(folder: Path) -> list[Example]:
    """The test turns of an evaluation folder."""
    path = folder / "examples.jsonl"
    examples = []
    for index, record in enumerate(read_jsonl(path)):
        try:
            context = tuple(
                Turn("seeker" if message["role"] == "user" else "supporter", message["content"])
                for message in record["context"]
            )
            golden = Turn("supporter", record["golden"], tuple(record["strategies"]))
            examples.append(Example(record["dialogue"], record["turn"], context, golden))
        except (KeyError, TypeError) as error:
            raise FileError(f"{path}: record {index} is not a test turn of this library: {error!r}") from error
    return examples


def read_answers(folder: Path, name: str) -> list[tuple[Example, str]]:
    """The test turns that a model answered, with its replies; those that did not fit into its window are left out."""
    examples, path = read_examples(folder), folder / f"{name}.replies.jsonl"
    records = read_jsonl(path)
    if len(records) != len(examples):
        raise FileError(f"{path}: holds {len(records)} of {len(examples)} replies; let the model answer to the end")
    answers = [(e, str(r["text"])) for e, r in zip(examples, records) if r["text"] is not None]
    if not answers:
        raise FileError(f"{path}: none of the {len(examples)} test contexts fits into the model's window")
    return answers


def answered_models(folder: Path) -> list[str]:
    """The models whose replies are in an evaluation folder, in the order of their names."""
    names = sorted(path.name.removesuffix(".replies.jsonl") for path in folder.glob("*.replies.jsonl"))
    if not names:
        raise FileError(f"{folder}: holds no replies of a model (*.replies.jsonl); is this a run folder's eval?")
    return names


def score_answers(
    folder: Path,
    name: str,
    *,
    convention: str = "paper",
    extras: Sequence[str] = (),
    bert_model: str = BERT_MODEL,
    counts: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Scores the replies of a model in an evaluation folder, and writes its scores and each reply's.

    Files are ``NAME.json`` and ``NAME.values.jsonl``, or ``NAME.CONVENTION.json`` and so on under another convention.
    ``counts`` are told beside the scores; without them those of an earlier scoring stay.
    """
    answers = read_answers(folder, name)
    scores = score_replies(
        [text for _, text in answers], [e.golden.text for e, _ in answers], [e.dialogue for e, _ in answers],
        convention=convention, extras=extras, bert_model=bert_model,
    )  # fmt: skip
    records = read_jsonl(folder / f"{name}.replies.jsonl")
    path = _score_file(folder, name, convention)
    earlier: dict[str, Any] = read_json(path) if path.is_file() and counts is None else {}
    report = earlier | {
        "model": name,
        "replies": len(answers),
        "left_out_too_long": len(records) - len(answers),
        "contexts_cut": sum(bool(r["turns_dropped"]) for r in records if r["text"] is not None),
        "scores": {
            key: {"value": score.value, "signature": score.signature}
            | ({} if score.interval is None else {"interval": list(score.interval)})
            for key, score in scores.items()
        },
    }
    by_reply = {key: score.values for key, score in scores.items() if score.values is not None}
    values = [
        {"id": example.id, "dialogue": example.dialogue} | {key: column[i] for key, column in by_reply.items()}
        for i, (example, _) in enumerate(answers)
    ]
    write_jsonl(path.with_suffix(".values.jsonl"), values)
    write_json(path, report | dict(sorted((counts or {}).items())))
    return {key: score.value for key, score in scores.items()}


def compare_models(folder: Path, first: str, second: str, *, convention: str = "paper") -> dict[str, Comparison]:
    """Paired comparison, ``second`` minus ``first``, of every score that is a mean over replies to the same turns."""
    sides = []
    for name in (first, second):
        path = _score_file(folder, name, convention).with_suffix(".values.jsonl")
        sides.append({record["id"]: record for record in read_jsonl(path)})
    shared = [id_ for id_ in sides[0] if id_ in sides[1]]
    if not shared:
        raise FileError(f"{folder}: {first} and {second} have no answered test turn in common")
    dialogues = [sides[0][id_]["dialogue"] for id_ in shared]
    names = [key for key in sides[0][shared[0]] if key in sides[1][shared[0]] and key not in ("id", "dialogue")]
    return {
        key: compare([sides[0][i][key] for i in shared], [sides[1][i][key] for i in shared], dialogues) for key in names
    }


def _score_file(folder: Path, name: str, convention: str) -> Path:
    return folder / (f"{name}.json" if convention == "paper" else f"{name}.{convention}.json")


def comparison_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown in the form of Tables 2 and 6: a row per model, its values and the change against the row before."""
    columns = list(next(iter(scores.values())))
    rows: dict[str, list[str]] = {}
    before: Mapping[str, float] | None = None
    for name, values in scores.items():
        changes = ["" if before is None else f" ({values[c] - before[c]:+.2f})" for c in columns]
        rows[name] = [f"{values[c]:.2f}{change}" for c, change in zip(columns, changes)]
        before = values
    return markdown_table(["model", *columns], rows)


def interval_table(folder: Path, names: Sequence[str], *, convention: str = "paper") -> str:
    """Markdown: a row per model, each score with its bootstrap interval where it has one."""
    reports = {name: read_json(_score_file(folder, name, convention))["scores"] for name in names}
    columns = list(next(iter(reports.values())))
    rows = {name: [_interval_cell(scores[column]) for column in columns] for name, scores in reports.items()}
    return markdown_table(["model", *columns], rows)


def _interval_cell(score: Mapping[str, Any]) -> str:
    interval = f" ({interval_text(*score['interval'])})" if "interval" in score else ""
    return f"{score['value']:.2f}{interval}"


def significance_table(comparisons: Mapping[str, Mapping[str, Comparison]]) -> str:
    """Markdown: a row per pair of models, the mean difference of each score, its interval and the p-value."""
    rows = {
        name: [f"{c.difference:+.2f} ({c.low:+.2f} to {c.high:+.2f}), {_p_text(c.p_value)}" for c in row.values()]
        for name, row in comparisons.items()
    }
    return markdown_table(["difference", *next(iter(comparisons.values()))], rows)


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"
