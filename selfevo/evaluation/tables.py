"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selfevo.evaluation.score import _score_file
from selfevo.evaluation.significance import Comparison
from selfevo.files import read_json


def comparison_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown in the form of Tables 2 and 6: a row per model, its values and their relative change against the row
    before, in %."""
    columns = list(next(iter(scores.values())))
    rows: dict[str, list[str]] = {}
    before: Mapping[str, float] | None = None
    for name, values in scores.items():
        changes = [_relative(before[c], values[c]) if before else "" for c in columns]
        rows[name] = [f"{values[c]:.2f}{change}" for c, change in zip(columns, changes)]
        before = values
    return markdown_table(["model", *columns], rows)


def _relative(before: float, after: float) -> str:
    return f" ({100 * (after / before - 1):+.2f} %)" if before else ""


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


def mean_table(rows: Mapping[str, Sequence[Mapping[str, float]]], *, digits: int = 2) -> str:
    """Markdown: a row per model, from its scores in one run or in several (one per seed): the mean, and of several
    values also the range; empty if there is no such score."""
    columns = list(dict.fromkeys(column for runs in rows.values() for scores in runs for column in scores))
    cells: dict[str, list[str]] = {}
    for name, runs in rows.items():
        values = [[scores[column] for scores in runs if column in scores] for column in columns]
        cells[name] = [_mean_cell(own, digits) if own else "" for own in values]
    return markdown_table(["model", *columns], cells)


def _mean_cell(values: Sequence[float], digits: int) -> str:
    spread = f" ({interval_text(min(values), max(values), digits)})" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def markdown_table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown, for the terminal and for files: a row per name, its cells after it."""
    lines = [[name, *cells] for name, cells in rows.items()]
    rule = "|---" * len(head) + "|"
    first, *others = ("| " + " | ".join(line) + " |" for line in [head, *lines])
    return "\n".join([first, rule, *others])


def interval_text(low: float, high: float, digits: int = 2) -> str:
    """``"9.10 to 10.00"``."""
    return f"{low:.{digits}f} to {high:.{digits}f}"
