"""Scores of the answers to test turns, each given in its ground-truth context, and comparisons between models.

An evaluation folder (``eval`` in a run) holds all that is needed to score again, to judge and to report, without the
data or the models: ``examples.jsonl``, and for every model ``NAME.replies.jsonl``, ``NAME.json`` (its scores) and
``NAME.values.jsonl`` (what each reply scored).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selfevo.evaluation.columns import EXTRAS, ScoreError, extra_score, in_order, score_replies
from selfevo.evaluation.folder import read_answers
from selfevo.evaluation.significance import Comparison, compare
from selfevo.files import FileError, file_hash, read_json, read_jsonl, write_json, write_jsonl


def score_answers(
    folder: Path,
    name: str,
    *,
    convention: str = "paper",
    extras: Sequence[str] | None = None,
    bert_model: str = "",
    counts: Mapping[str, int] | None = None,
) -> dict[str, float]:
    """Scores the replies of a model in an evaluation folder, and writes its scores and each reply's.

    Files are ``NAME.json`` and ``NAME.values.jsonl``, or ``NAME.CONVENTION.json`` and so on under another convention.
    METEOR and BERTScore are computed where their packages and data are there, and else noted as ``missing``; those in
    ``extras`` must be there (ScoreError). What an earlier scoring of the same replies had beyond this one is kept, and
    so are its ``counts``, unless others are given.
    """
    answers, path = read_answers(folder, name), score_file(folder, name, convention)
    texts = [text for _, text in answers], [e.golden.text for e, _ in answers], [e.dialogue for e, _ in answers]
    scores, missing = score_replies(*texts, convention=convention), dict[str, str]()
    available = EXTRAS if convention == "paper" else ()
    for extra in available if extras is None else extras:
        try:
            scores[extra] = extra_score(extra, *texts, bert_model=bert_model)
        except ScoreError as error:
            if extras is not None:
                raise
            missing[extra] = str(error)
    records, digest = read_jsonl(folder / f"{name}.replies.jsonl"), file_hash(folder / f"{name}.replies.jsonl")
    earlier, values = _earlier_scores(path, digest)
    found = earlier.pop("scores", {}) | {
        key: {"value": score.value, "signature": score.signature, "interval": list(score.interval)}
        for key, score in scores.items()
    }
    values |= {key: score.values for key, score in scores.items() if score.values is not None}
    report: dict[str, Any] = (earlier if counts is None else dict(sorted(counts.items()))) | {
        "model": name,
        "replies": len(answers),
        "replies_sha256": digest,
        "left_out_too_long": len(records) - len(answers),
        "contexts_cut": sum(bool(r["turns_dropped"]) for r in records if r["text"] is not None),
        "scores": {key: found[key] for key in in_order(found)},
        "missing": {key: why for key, why in missing.items() if key not in found},
    }
    rows = [
        {"id": example.id, "dialogue": example.dialogue} | {key: column[i] for key, column in values.items()}
        for i, (example, _) in enumerate(answers)
    ]
    write_jsonl(path.with_suffix(".values.jsonl"), rows)
    write_json(path, report)
    return {key: score["value"] for key, score in report["scores"].items()}


def _earlier_scores(path: Path, digest: str) -> tuple[dict[str, Any], dict[str, Sequence[float]]]:
    """An earlier report, with its scores only if they are of the same replies, and what each reply scored then."""
    if not path.is_file():
        return {}, {}
    earlier = read_json(path)
    if earlier.get("replies_sha256") != digest:
        return {key: value for key, value in earlier.items() if key != "scores"}, {}
    rows = read_jsonl(path.with_suffix(".values.jsonl"))
    return earlier, {key: [row[key] for row in rows] for key in rows[0] if key not in ("id", "dialogue")}


def missing_scores(folder: Path, names: Sequence[str]) -> list[str]:
    """A sentence for each score of our convention that could not be computed for some of the models."""
    reports = [read_json(score_file(folder, name, "paper")) for name in names]
    return list(dict.fromkeys(f"{why}." for report in reports for why in report.get("missing", {}).values()))


def compare_models(folder: Path, first: str, second: str, *, convention: str = "paper") -> dict[str, Comparison]:
    """Paired comparison, ``second`` minus ``first``, of every score that is a mean over replies to the same turns."""
    sides = []
    for name in (first, second):
        path = score_file(folder, name, convention).with_suffix(".values.jsonl")
        sides.append({record["id"]: record for record in read_jsonl(path)})
    shared = [id_ for id_ in sides[0] if id_ in sides[1]]
    if not shared:
        raise FileError(f"{folder}: {first} and {second} have no answered test turn in common")
    dialogues = [sides[0][id_]["dialogue"] for id_ in shared]
    names = [key for key in sides[0][shared[0]] if key in sides[1][shared[0]] and key not in ("id", "dialogue")]
    return {
        key: compare([sides[0][i][key] for i in shared], [sides[1][i][key] for i in shared], dialogues) for key in names
    }


def score_file(folder: Path, name: str, convention: str) -> Path:
    """Where the scores of a model under a convention are kept."""
    return folder / (f"{name}.json" if convention == "paper" else f"{name}.{convention}.json")
