"""Scores of the answers to test turns, each given in its ground-truth context, and comparisons between models.

An evaluation folder (``eval`` in a run) holds all that is needed to score again, to judge and to report, without the
data or the models: ``examples.jsonl``, and for every model ``NAME.replies.jsonl``, ``NAME.json`` (its scores) and
``NAME.values.jsonl`` (what each reply scored).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfevo.evaluation.columns import BERT_MODEL, score_replies
from selfevo.evaluation.folder import read_answers
from selfevo.evaluation.significance import Comparison, compare
from selfevo.files import FileError, read_json, read_jsonl, write_json, write_jsonl


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
    ``counts`` are stored beside the scores; without them those of an earlier scoring stay.
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
