"""The scores of every model of a run: against the golden replies, by an LLM as judge, and what else was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfevo.evaluation.columns import EXTRAS, in_order
from selfevo.evaluation.folder import EXAMPLES, stage_order
from selfevo.evaluation.score import compare_models, is_report, missing_scores, read_report, score_file
from selfevo.files import Fields, FileError, file_hash, read_object, write_json

OURS = "paper"  # the convention of NAME.json
TABLES = "tables.json"
LEVEL = 0.05


def score_tables(folder: Path, baseline: str = "") -> list[dict[str, Any]]:
    """Tables 2 and 6 for every convention that the models of an evaluation folder were scored under, ours first.

    Every model is compared with the ``baseline``, by default the first row. Raises ValueError where a convention has no
    such model, and FileError for scores of other replies than the folder holds today.
    """
    by_convention: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        if is_report(folder, path):
            report = read_report(path)
            convention = path.stem.removeprefix(report["model"]).removeprefix(".") or OURS
            by_convention.setdefault(convention, {})[report["model"]] = report
            _check_current(folder, path, report)
    conventions = sorted(by_convention, key=lambda name: (name != OURS, name))
    return [_score_table(folder, name, by_convention[name], baseline) for name in conventions]


def _check_current(folder: Path, path: Path, report: Mapping[str, Any]) -> None:
    for key, file in (("replies_sha256", f"{report['model']}.replies.jsonl"), ("examples_sha256", EXAMPLES)):
        if key in report and report[key] != file_hash(folder / file):
            raise FileError(f"{path}: has scores of another {file} than is there today; score again with evaluate.py")


def _score_table(folder: Path, convention: str, reports: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """Per model its scores, those of the baseline and which of them differ; the small print."""
    names = sorted(reports, key=stage_order)
    first = baseline or names[0]
    if first not in names:
        raise ValueError(f"the baseline {first} has no scores (convention {convention}); there are {', '.join(names)}")
    models = []
    for name in names:
        compared = {} if name == first else reports[first]["scores"]
        proven = _significant(folder, first, name, convention) if compared else set()
        models.append((name, reports[name]["scores"], compared, proven))
    entries = [(name, score["signature"]) for report in reports.values() for name, score in report["scores"].items()]
    counts = dict.fromkeys(
        key for report in reports.values() for key, value in report.items() if isinstance(value, int)
    )
    return {
        "convention": convention,
        "baseline": first,
        "turns": ", ".join(sorted({f"{report['replies']:,}" for report in reports.values()})),
        "level": LEVEL,
        "columns": in_order([*(EXTRAS if convention == OURS else ()), *(name for name, _ in entries)]),
        "missing": missing_scores(folder, names) if convention == OURS else [],
        "models": models,
        "signatures": list(dict.fromkeys(entries)),
        "counts": list(counts),
        "counted": {name: [report.get(key, 0) for key in counts] for name, report in reports.items()},
    }


def _significant(folder: Path, baseline: str, name: str, convention: str) -> set[str]:
    """The scores of which ``name`` differs from the baseline, where the values of single replies are there to test
    it."""
    files = [score_file(folder, model, convention).with_suffix(".values.jsonl") for model in (baseline, name)]
    if not all(file.exists() for file in files):
        return set()
    compared = compare_models(folder, baseline, name, convention=convention)
    return {score for score, result in compared.items() if result.p_value < LEVEL}


def plain_tables(folder: Path) -> list[dict[str, Any]]:
    """The tables that a command left for the report with ``add_table``, and the strategies and replies of a run of
    Decoupled ESC."""
    tables = []
    for name, value in _stored_tables(folder).items():
        table = Fields(value, f"{folder / TABLES}, {name!r}")
        title, digits = table.take("title", str), table.take("digits", int, low=0, high=10)
        tables.append({"title": title, "digits": digits, "rows": _numbers(table.take("rows", dict), table.where)})
    path = folder / "scores.json"
    scores = read_object(path).values if path.exists() else {}
    if {"strategies", "replies"} == scores.keys():
        titles = {"strategies": "Strategies, predicted and human.", "replies": "Replies."}
        tables += [
            {"title": titles[kind], "digits": 2, "rows": _numbers(rows, f"{path}, {kind!r}")}
            for kind, rows in scores.items()
        ]
    return [
        one | {"columns": list(dict.fromkeys(key for row in one["rows"].values() for key in row))} for one in tables
    ]


def _stored_tables(folder: Path) -> dict[str, Any]:
    return read_object(folder / TABLES).values if (folder / TABLES).exists() else {}


def _numbers(rows: Any, where: str) -> dict[str, dict[str, float]]:
    """Rows of numbers by column, checked."""
    found = {}
    for name, values in Fields(rows, where).values.items():
        row = Fields(values, f"{where}, row {name!r}")
        found[name] = {column: row.take(column, float) for column in row.values}
    return found


def add_table(folder: Path, name: str, title: str, rows: Mapping[str, Mapping[str, float]], digits: int = 1) -> None:
    """Keeps a table, rows of numbers by column, for the report of the run that an evaluation folder belongs to; one of
    the same ``name`` is replaced."""
    write_json(folder / TABLES, _stored_tables(folder) | {name: {"title": title, "digits": digits, "rows": rows}})
