"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from selfevo.evaluation.columns import EXTRAS, in_order
from selfevo.evaluation.score import read_report, score_file
from selfevo.evaluation.significance import Comparison


def comparison_table(scores: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown in the form of Tables 2 and 6: a row per model, its values and their relative change against the row
    before, in %."""
    columns = in_order([*EXTRAS, *(column for values in scores.values() for column in values)])
    rows: dict[str, list[str]] = {}
    before: Mapping[str, float] = {}
    for name, values in scores.items():
        rows[name] = [
            f"{values[c]:.2f}{relative_change(before.get(c), values[c])}" if c in values else "–" for c in columns
        ]
        before = values
    return markdown_table(["model", *columns], rows)


def relative_change(before: float | None, after: float) -> str:
    """``" (+3.25 %)"``; empty where there was nothing before."""
    return f" ({100 * (after / before - 1):+.2f} %)" if before else ""


def interval_table(folder: Path, names: Sequence[str], *, convention: str = "paper") -> str:
    """Markdown: a row per model, each score with its interval, "–" where it could not be computed."""
    reports = {name: read_report(score_file(folder, name, convention))["scores"] for name in names}
    extras = EXTRAS if convention == "paper" else ()
    columns = in_order([*extras, *(column for scores in reports.values() for column in scores)])
    rows = {name: [_interval_cell(scores.get(column)) for column in columns] for name, scores in reports.items()}
    return markdown_table(["model", *columns], rows)


def _interval_cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "–"
    interval = f" ({interval_text(*score['interval'])})" if "interval" in score else ""  # 0.1 had fewer of them
    return f"{score['value']:.2f}{interval}"


def significance_table(comparisons: Mapping[str, Mapping[str, Comparison]]) -> str:
    """Markdown: a row per pair of models, the mean difference of each score, its interval and the p-value."""
    columns = in_order([column for row in comparisons.values() for column in row])
    rows = {name: [_difference_cell(row.get(column)) for column in columns] for name, row in comparisons.items()}
    return markdown_table(["difference", *columns], rows)


def _difference_cell(found: Comparison | None) -> str:
    if found is None:
        return "–"
    return f"{found.difference:+.2f} ({found.low:+.2f} to {found.high:+.2f}), {_p_text(found.p_value)}"


def _p_text(p_value: float) -> str:
    return "p < 0.001" if p_value < 0.001 else f"p = {p_value:.3f}"


def mean_table(
    rows: Mapping[str, Sequence[Mapping[str, float]]],
    *,
    columns: Sequence[str] = (),
    before: Mapping[str, str] | None = None,
    digits: int = 2,
) -> str:
    """Markdown: a row per model, from its scores in one run or in several (one per seed): the mean, and of several
    values also the range; "–" where there is no such score. By default all columns. ``before`` names for a row the one
    that its mean is compared with, in %."""
    columns = columns or list(dict.fromkeys(column for runs in rows.values() for scores in runs for column in scores))
    values = {
        name: [[scores[column] for scores in runs if column in scores] for column in columns]
        for name, runs in rows.items()
    }
    cells: dict[str, list[str]] = {}
    for name, row in values.items():
        earlier = values.get((before or {}).get(name, ""), [[]] * len(columns))
        cells[name] = [_mean_cell(own, old, digits) for own, old in zip(row, earlier)]
    return markdown_table(["model", *columns], cells)


def _mean_cell(values: Sequence[float], earlier: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    spread = f" ({interval_text(min(values), max(values), digits)})" if len(values) > 1 else ""
    change = relative_change(fmean(earlier), fmean(values)) if earlier else ""
    return f"{fmean(values):.{digits}f}{spread}{change}"


def markdown_table(head: Sequence[str], rows: Mapping[str, Sequence[str]]) -> str:
    """A table in Markdown, for the terminal and for files: a row per name, its cells after it. What would break a cell
    in two, or a row, is written so that it does not."""
    lines = [[name, *cells] for name, cells in rows.items()]
    rule = "|---" * len(head) + "|"
    first, *others = ("| " + " | ".join(map(_cell, line)) + " |" for line in [head, *lines])
    return "\n".join([first, rule, *others])


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def interval_text(low: float, high: float, digits: int = 2) -> str:
    """``"9.10 to 10.00"``."""
    return f"{low:.{digits}f} to {high:.{digits}f}"
