"""The tables of scores: every model of a run against the golden replies, and by an LLM as judge."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selfevo.evaluation.folder import is_stage, stage_order
from selfevo.evaluation.report.html import Html, details, element, join, table
from selfevo.evaluation.score import compare_models
from selfevo.evaluation.tables import interval_text
from selfevo.files import read_json

JUDGED = ".judge.json"
NONE = Html("–")
OURS = "paper"  # the convention of NAME.json
LEVEL = 0.05


def score_tables(folder: Path) -> Html:
    """Tables 2 and 6 for every convention that the models of an evaluation folder were scored under, ours first."""
    by_convention: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        report = {} if path.name.endswith(JUDGED) else read_json(path)
        if {"model", "replies", "scores"} <= report.keys():
            convention = path.stem.removeprefix(report["model"]).removeprefix(".") or OURS
            by_convention.setdefault(convention, {})[report["model"]] = report
    conventions = sorted(by_convention, key=lambda name: (name != OURS, name))
    return join(*(_score_table(folder, name, by_convention[name]) for name in conventions))


def _score_table(folder: Path, convention: str, reports: Mapping[str, Any]) -> Html:
    """A row per model; under each value its change against the row before and its interval."""
    columns = list(dict.fromkeys(name for report in reports.values() for name in report["scores"]))
    names = sorted(reports, key=stage_order)
    rows: list[list[str]] = []
    for before, name in zip([None, *names], names):
        comparable = before if before is not None and is_stage(name) else None
        scores, earlier = reports[name]["scores"], reports[comparable]["scores"] if comparable else {}
        proven = _significant(folder, comparable, name, convention) if comparable else set()
        rows.append([name, *(_score_cell(scores.get(c), earlier.get(c), c in proven) for c in columns)])
    turns = ", ".join(sorted({f"{report['replies']:,}" for report in reports.values()}))
    caption = (
        f"Scores against the golden replies of {turns} test turns (convention: {convention}). Under each value its "
        f"change against the row before (* where a paired test over dialogues gives p < {LEVEL}) and its 95 % interval."
    )
    return join(table(caption, ["model", *map(_unbroken, columns)], rows), _small_print(reports))


def _significant(folder: Path, before: str, name: str, convention: str) -> set[str]:
    """The scores of which ``name`` differs from ``before``, where the values of single replies are there to test it."""
    suffix = ".values.jsonl" if convention == OURS else f".{convention}.values.jsonl"
    if not all((folder / f"{model}{suffix}").is_file() for model in (before, name)):
        return set()
    compared = compare_models(folder, before, name, convention=convention)
    return {score for score, result in compared.items() if result.p_value < LEVEL}


def _small_print(reports: Mapping[str, Any]) -> Html:
    """How the scores were computed and what was left out, folded away."""
    entries = [(name, score["signature"]) for report in reports.values() for name, score in report["scores"].items()]
    lines = [[_unbroken(name), element("code", signature)] for name, signature in dict.fromkeys(entries)]
    keys = dict.fromkeys(key for report in reports.values() for key, value in report.items() if isinstance(value, int))
    counted = [[name, *(f"{report.get(key, 0):,}" for key in keys)] for name, report in reports.items()]
    head = ["model", *(key.replace("_", " ") for key in keys)]
    return join(
        details("How each score was computed", table("Signatures of the scores", ["score", "signature"], lines)),
        details("Test turns that were cut or left out", table("Test turns per model", head, counted)),
    )


def _unbroken(name: str) -> str:
    return name.replace("-", "\N{NON-BREAKING HYPHEN}")


def _score_cell(score: Mapping[str, Any] | None, before: Mapping[str, Any] | None, proven: bool) -> Html:
    if score is None:
        return NONE
    parts = [f"{score['value']:.2f}"]
    if before is not None:
        parts.append(element("small", f"{score['value'] - before['value']:+.2f}{' *' if proven else ''}"))
    if score.get("interval"):
        parts.append(element("small", interval_text(*score["interval"])))
    return join(*parts)


def judge_table(folder: Path) -> Html:
    """The means of an LLM judge per aspect, where an evaluation folder holds ``NAME.judge.json``."""
    paths = {path.name.removesuffix(JUDGED): path for path in folder.glob(f"*{JUDGED}")}
    reports = {name: read_json(paths[name]) for name in sorted(paths, key=stage_order)}
    if not reports:
        return Html("")
    aspects = list(dict.fromkeys(aspect for report in reports.values() for aspect in report["scores"]))
    rows: list[list[str]] = []
    for name, report in reports.items():
        failures = ", ".join(f"{reason} {count:,}" for reason, count in report["failures"].items() if count) or "none"
        cells = [_judge_cell(report["scores"].get(aspect)) for aspect in aspects]
        rows.append([name, *cells, f"{report['answered']:,}", failures])
    judges = ", ".join(sorted({str(report["judge"]) for report in reports.values()}))
    caption = f"Mean scores by the judge {judges}. Under each its 95 % interval."
    return table(caption, ["model", *aspects, "judged", "failures"], rows)


def _judge_cell(score: Mapping[str, Any] | None) -> Html:
    if score is None:
        return NONE
    return join(f"{score['mean']:.2f}", element("small", interval_text(*score["interval"])))
