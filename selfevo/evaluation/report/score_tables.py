"""The scores of every model of a run against the golden replies, and by an LLM as judge, as rows of tables.

The cell of a score is a list of texts: its value, its change against the row before, its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfevo.evaluation.folder import is_stage, stage_order
from selfevo.evaluation.score import compare_models
from selfevo.evaluation.tables import interval_text
from selfevo.files import read_json

JUDGED = ".judge.json"
OURS = "paper"  # the convention of NAME.json
LEVEL = 0.05


def score_tables(folder: Path) -> list[dict[str, Any]]:
    """Tables 2 and 6 for every convention that the models of an evaluation folder were scored under, ours first."""
    by_convention: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        report = {} if path.name.endswith(JUDGED) else read_json(path)
        if {"model", "replies", "scores"} <= report.keys():
            convention = path.stem.removeprefix(report["model"]).removeprefix(".") or OURS
            by_convention.setdefault(convention, {})[report["model"]] = report
    conventions = sorted(by_convention, key=lambda name: (name != OURS, name))
    return [_score_table(folder, name, by_convention[name]) for name in conventions]


def _score_table(folder: Path, convention: str, reports: Mapping[str, Any]) -> dict[str, Any]:
    entries = [(name, score["signature"]) for report in reports.values() for name, score in report["scores"].items()]
    columns = list(dict.fromkeys(name for name, _ in entries))
    counts = list(
        dict.fromkeys(key for report in reports.values() for key, value in report.items() if isinstance(value, int))
    )
    rows = []
    names = sorted(reports, key=stage_order)
    for before, name in zip([None, *names], names):
        scores, earlier, proven = reports[name]["scores"], {}, set()
        if before is not None and is_stage(name):
            earlier, proven = reports[before]["scores"], _significant(folder, before, name, convention)
        rows.append([name, *(_score_cell(scores.get(c), earlier.get(c), c in proven) for c in columns)])
    return {
        "convention": convention,
        "turns": ", ".join(sorted({f"{report['replies']:,}" for report in reports.values()})),
        "level": LEVEL,
        "columns": [_unbroken(name) for name in columns],
        "rows": rows,
        "signatures": [(_unbroken(name), signature) for name, signature in dict.fromkeys(entries)],
        "counts": [key.replace("_", " ") for key in counts],
        "counted": [[name, *(report.get(key, 0) for key in counts)] for name, report in reports.items()],
    }


def _unbroken(name: str) -> str:
    return name.replace("-", "\N{NON-BREAKING HYPHEN}")


def _significant(folder: Path, before: str, name: str, convention: str) -> set[str]:
    """The scores of which ``name`` differs from ``before``, where the values of single replies are there to test it."""
    suffix = ".values.jsonl" if convention == OURS else f".{convention}.values.jsonl"
    if not all((folder / f"{model}{suffix}").is_file() for model in (before, name)):
        return set()
    compared = compare_models(folder, before, name, convention=convention)
    return {score for score, result in compared.items() if result.p_value < LEVEL}


def _score_cell(score: Mapping[str, Any] | None, before: Mapping[str, Any] | None, proven: bool) -> list[str]:
    if score is None:
        return ["–"]
    change = [f"{score['value'] - before['value']:+.2f}{' *' if proven else ''}"] if before else []
    interval = [interval_text(*score["interval"])] if score.get("interval") else []
    return [f"{score['value']:.2f}", *change, *interval]


def judge_table(folder: Path) -> dict[str, Any] | None:
    """The means of an LLM judge per aspect, where an evaluation folder holds ``NAME.judge.json``."""
    paths = {path.name.removesuffix(JUDGED): path for path in folder.glob(f"*{JUDGED}")}
    reports = {name: read_json(paths[name]) for name in sorted(paths, key=stage_order)}
    if not reports:
        return None
    aspects = list(dict.fromkeys(aspect for report in reports.values() for aspect in report["scores"]))
    rows = []
    for name, report in reports.items():
        scores = [report["scores"].get(aspect) for aspect in aspects]
        cells = [[f"{one['mean']:.2f}", interval_text(*one["interval"])] if one else "–" for one in scores]
        failures = ", ".join(f"{reason} {count:,}" for reason, count in report["failures"].items() if count) or "none"
        rows.append([name, *cells, report["answered"], failures])
    judges = ", ".join(sorted({str(report["judge"]) for report in reports.values()}))
    return {"judges": judges, "aspects": aspects, "rows": rows}
