"""Scores of the answers to test turns, each given in its ground-truth context, and comparisons between models.

An evaluation folder (``eval`` in a run) holds all that is needed to score again, to judge and to report, without the
data or the models: ``examples.jsonl``, and for every model ``NAME.replies.jsonl``, ``NAME.json`` (its scores) and
``NAME.values.jsonl`` (what each reply scored).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selfevo.evaluation.columns import CONVENTIONS, EXTRAS, ScoreError, extra_score, in_order, score_replies
from selfevo.evaluation.folder import EXAMPLES, read_answers, reply_records
from selfevo.evaluation.significance import Comparison, compare
from selfevo.files import Fields, FileError, file_hash, read_jsonl, read_object, write_json, write_jsonl
from selfevo.metrics import is_unspaced

Row = dict[str, Any]  # what a reply scored, by column, with its "id" and "dialogue"
_ENCODER = re.compile(r"^bert_score\|model:(.*?)\|layer:")


@dataclass(frozen=True)
class _Stored:
    """What is kept of an earlier scoring: scores and their values by column, and other entries of the report."""

    scores: dict[str, Any]
    values: Mapping[str, Sequence[float]]
    others: dict[str, Any]


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
    so are its ``counts``, unless others are given. All models of a folder have the BERTScore of one encoder: another
    ``bert_model`` than before is a ScoreError.
    """
    answers, path = read_answers(folder, name), score_file(folder, name, convention)
    texts = [text for _, text in answers], [e.golden.text for e, _ in answers], [e.dialogue for e, _ in answers]
    encoder = _encoder(folder, name, convention, bert_model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "texts without spaces")  # said in a sentence of the report
        scores = score_replies(*texts, convention=convention)
    missing = _unspaced(texts[0], texts[1], convention)
    records = reply_records(folder / f"{name}.replies.jsonl")
    origin = {f"{key}_sha256": file_hash(folder / file) for key, file in
              (("replies", f"{name}.replies.jsonl"), ("examples", EXAMPLES))}  # fmt: skip
    rows: list[Row] = [{"id": example.id, "dialogue": example.dialogue} for example, _ in answers]
    new = {key: score.values for key, score in scores.items() if score.values is not None}
    earlier = _earlier_scores(path, origin, rows, new)
    available = EXTRAS if convention == "paper" else ()
    for extra in available if extras is None else extras:
        if extra in earlier.scores and (extras is None or (extra == "BERTScore" and not bert_model)):
            continue
        try:
            scores[extra] = extra_score(extra, *texts, bert_model=encoder)
        except ScoreError as error:
            if extras is not None:
                raise
            missing[extra] = str(error)
    found = earlier.scores | {
        key: {"value": score.value, "signature": score.signature, "interval": list(score.interval)}
        for key, score in scores.items()
    }
    values = {**earlier.values} | {key: score.values for key, score in scores.items() if score.values is not None}
    report: dict[str, Any] = (earlier.others if counts is None else dict(sorted(counts.items()))) | {
        "model": name,
        "replies": len(answers),
        **origin,
        "left_out_too_long": len(records) - len(answers),
        "contexts_cut": sum(bool(r.take("turns_dropped", int, 0)) for r in records if r.values["text"] is not None),
        "scores": {key: found[key] for key in in_order(found)},
        "missing": {key: why for key, why in missing.items() if key not in found},
    }
    rows = [row | {key: column[i] for key, column in values.items()} for i, row in enumerate(rows)]
    write_jsonl(path.with_suffix(".values.jsonl"), rows)
    write_json(path, report)
    return {key: score["value"] for key, score in report["scores"].items()}


def _unspaced(replies: Sequence[str], golden: Sequence[str], convention: str) -> dict[str, str]:
    if convention == "characters" or 2 * sum(map(is_unspaced, [*replies, *golden])) <= len(replies) + len(golden):
        return {}
    return {
        "words": "these texts are in a script that does not space its words, so a whole clause counts as one word: "
        "score them with --convention characters"
    }


def _encoder(folder: Path, name: str, convention: str, asked: str) -> str:
    """The encoder that the folder's BERTScores were computed with, else the one ``asked`` for."""
    for path in sorted(folder.glob("*.json")):
        scores = read_report(path)["scores"] if is_report(folder, path, convention) else {}
        match = _ENCODER.match(scores.get("BERTScore", {}).get("signature", ""))
        if match and asked not in ("", match[1]):
            raise ScoreError(
                f"{path}: its BERTScore is of {match[1]}, not of {asked}; leave --bert-model out for {name}, or remove "
                "the file to score anew"
            )
        if match:
            return match[1]
    return asked


def _earlier_scores(
    path: Path, origin: Mapping[str, str], rows: Sequence[Row], new: Mapping[str, Sequence[float]]
) -> _Stored:
    """What there is of an earlier scoring, its scores only if they are of the same replies to the same test turns."""
    if not path.is_file():
        return _Stored({}, {}, {})
    report = dict(read_report(path))
    scores = report.pop("scores")
    known = {key: report.pop(key) for key in origin if key in report}
    kept = read_values(path)
    columns = [key for key in (kept[0] if kept else {}) if key not in ("id", "dialogue")]
    values = {key: [row.get(key, math.nan) for row in kept] for key in columns}
    same = all(origin[key] == digest for key, digest in known.items())
    if "replies_sha256" not in known:  # version 0.1 did not note it; what replies scored tells as much
        same = len(kept) == len(rows) and all(map(_close, values.get("BLEU-2", []), new.get("BLEU-2", [])))
    if same and [row["id"] for row in kept] != [row["id"] for row in rows]:
        raise FileError(
            f"{path.with_suffix('.values.jsonl')}: has values of other replies than {path.name} has scores of; remove "
            "both to score anew"
        )
    return _Stored(scores, values, report) if same else _Stored({}, {}, report)


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, abs_tol=1e-9)


def is_report(folder: Path, path: Path, convention: str | None = None) -> bool:
    """Whether a JSON file of an evaluation folder has a model's scores, under a convention or under any."""
    if path.name.endswith((".judge.json", ".request.json", ".strategies.json", ".support.json")):
        return False
    fields = read_object(path)
    if not {"model", "replies", "scores"} <= fields.values.keys():
        return False
    name = fields.take("model", str)
    return any(path == score_file(folder, name, c) for c in (CONVENTIONS if convention is None else (convention,)))


def read_report(path: Path) -> dict[str, Any]:
    """A model's report, checked: its name, how many replies, and scores each with a value, a signature and perhaps an
    interval; "missing" has the reasons why others are not there."""
    fields = read_object(path)
    fields.take("model", str)
    fields.take("replies", int, low=0)
    scores = fields.take("scores", dict)
    for key, value in scores.items():
        score = Fields(value, f"{path}, score {key!r}")
        score.take("value", float)
        score.take("signature", str)
        if len(score.take_list("interval", float, [0.0, 0.0])) != 2:
            raise score.fail("'interval' should be its two ends")
    missing = Fields(fields.take("missing", dict, {}), f"{path}, 'missing'")
    fields.values["missing"] = {key: missing.take(key, str) for key in missing.values}
    for key in fields.values:
        if key.endswith("_sha256"):
            fields.take(key, str)
    return fields.values


def read_values(path: Path) -> list[Row]:
    """What each reply scored: of a report's path, its ``.values.jsonl``, checked."""
    path = path.with_suffix(".values.jsonl")
    rows: list[Row] = []
    ids: set[str] = set()
    for index, record in enumerate(read_jsonl(path)):
        fields = Fields(record, f"{path}, record {index}")
        for key in ("id", "dialogue"):
            fields.take(key, str)
        for key in fields.values.keys() - {"id", "dialogue"}:
            fields.take(key, float)
        if fields.values["id"] in ids or (rows and rows[0].keys() != fields.values.keys()):
            raise fields.fail("is of a test turn again, or has other columns; remove file and scores, and score again")
        ids.add(fields.values["id"])
        rows.append(fields.values)
    return rows


def missing_scores(folder: Path, names: Sequence[str]) -> list[str]:
    """A sentence for each score of our convention that could not be computed for some of the models."""
    reports = [read_report(score_file(folder, name, "paper")) for name in names]
    return list(dict.fromkeys(f"{why}." for report in reports for why in report["missing"].values()))


def compare_models(folder: Path, first: str, second: str, *, convention: str = "paper") -> dict[str, Comparison]:
    """Paired comparison, ``second`` minus ``first``, of every score that is a mean over replies to the same turns.

    A score that the two were given in different ways, by its signatures, is left out.
    """
    paths = [score_file(folder, name, convention) for name in (first, second)]
    sides = [{row["id"]: row for row in read_values(path)} for path in paths]
    shared = [id_ for id_ in sides[0] if id_ in sides[1]]
    if not shared:
        files = " and ".join(str(path.with_suffix(".values.jsonl")) for path in paths)
        raise FileError(f"{files}: have no answered test turn in common; score both models again")
    dialogues = [sides[0][id_]["dialogue"] for id_ in shared]
    scores, others = (read_report(path)["scores"] for path in paths)
    names = [
        key for key in sides[0][shared[0]]
        if key in sides[1][shared[0]] and key in scores and key in others
        and scores[key]["signature"] == others[key]["signature"]
    ]  # fmt: skip
    return {
        key: compare([sides[0][i][key] for i in shared], [sides[1][i][key] for i in shared], dialogues) for key in names
    }


def score_file(folder: Path, name: str, convention: str) -> Path:
    """Where the scores of a model under a convention are kept."""
    return folder / (f"{name}.json" if convention == "paper" else f"{name}.{convention}.json")
