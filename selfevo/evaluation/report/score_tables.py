"""The scores of every model of a run: against the golden replies, by an LLM as judge, and what else was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfevo.evaluation.columns import EXTRAS, in_order
from selfevo.evaluation.folder import is_stage, stage_order
from selfevo.evaluation.score import compare_models, missing_scores
from selfevo.files import read_json, write_json

JUDGED = ".judge.json"
OURS = "paper"  # the convention of NAME.json
TABLES = "tables.json"
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
    """Per model its scores, and for a stage those of the model before and which of them differ; the small print."""
    models = []
    names = sorted(reports, key=stage_order)
    for before, name in zip([None, *names], names):
        earlier, proven = {}, set()
        if before is not None and is_stage(name):
            earlier, proven = reports[before]["scores"], _significant(folder, before, name, convention)
        models.append((name, reports[name]["scores"], earlier, proven))
    entries = [(name, score["signature"]) for report in reports.values() for name, score in report["scores"].items()]
    counts = dict.fromkeys(
        key for report in reports.values() for key, value in report.items() if isinstance(value, int)
    )
    return {
        "convention": convention,
        "turns": ", ".join(sorted({f"{report['replies']:,}" for report in reports.values()})),
        "level": LEVEL,
        "columns": in_order([*(EXTRAS if convention == OURS else ()), *(name for name, _ in entries)]),
        "missing": missing_scores(folder, names) if convention == OURS else [],
        "models": models,
        "signatures": list(dict.fromkeys(entries)),
        "counts": list(counts),
        "counted": {name: [report.get(key, 0) for key in counts] for name, report in reports.items()},
    }


def _significant(folder: Path, before: str, name: str, convention: str) -> set[str]:
    """The scores of which ``name`` differs from ``before``, where the values of single replies are there to test it."""
    suffix = ".values.jsonl" if convention == OURS else f".{convention}.values.jsonl"
    if not all((folder / f"{model}{suffix}").is_file() for model in (before, name)):
        return set()
    compared = compare_models(folder, before, name, convention=convention)
    return {score for score, result in compared.items() if result.p_value < LEVEL}


def plain_tables(folder: Path) -> list[dict[str, Any]]:
    """The tables that a command left for the report with ``add_table``, and the strategies and replies of a run of
    Decoupled ESC."""
    stored = list(read_json(folder / TABLES).values()) if (folder / TABLES).is_file() else []
    scores = read_json(folder / "scores.json") if (folder / "scores.json").is_file() else {}
    if {"strategies", "replies"} == scores.keys():
        titles = {"strategies": "Strategies, predicted and human.", "replies": "Replies."}
        stored += [{"title": titles[kind], "digits": 2, "rows": rows} for kind, rows in scores.items()]
    return [
        one | {"columns": list(dict.fromkeys(key for row in one["rows"].values() for key in row))} for one in stored
    ]


def add_table(folder: Path, name: str, title: str, rows: Mapping[str, Mapping[str, float]], digits: int = 1) -> None:
    """Keeps a table, rows of numbers by column, for the report of the run that an evaluation folder belongs to; one of
    the same ``name`` is replaced."""
    path = folder / TABLES
    stored = read_json(path) if path.is_file() else {}
    write_json(path, stored | {name: {"title": title, "digits": digits, "rows": rows}})


def judge_table(folder: Path) -> dict[str, Any] | None:
    """The reports of an LLM judge by model, where an evaluation folder holds ``NAME.judge.json``."""
    paths = {path.name.removesuffix(JUDGED): path for path in folder.glob(f"*{JUDGED}")}
    reports = {name: read_json(paths[name]) for name in sorted(paths, key=stage_order)}
    aspects = list(dict.fromkeys(aspect for report in reports.values() for aspect in report["scores"]))
    judges = ", ".join(sorted({str(report["judge"]) for report in reports.values()}))
    return {"judges": judges, "aspects": aspects, "reports": reports} if reports else None
