"""Scores of a system of Decoupled ESC on test turns: of its strategies and of its replies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from selfevo.decoupled.mining import ErrorFinder, case_of
from selfevo.decoupled.planner import Labelled, Plan
from selfevo.decoupled.strategy_metrics import score_strategies
from selfevo.evaluation.ask_json import Responder, request_hash
from selfevo.evaluation.columns import support_columns
from selfevo.evaluation.judge import judge_replies, load_aspects, summarise
from selfevo.evaluation.judgements import describe_aspects
from selfevo.evaluation.origin import first_difference
from selfevo.files import Fields, FileError, read_object, write_json

STRATEGY_COLUMNS = {"accuracy": "accuracy", "weighted_f1": "weighted F1", "macro_f1": "macro F1", "bias": "bias"}
Scores = dict[str, float]


def score_plans_of(turns: Sequence[Labelled], plans: Sequence[Plan | None], path: Path) -> Scores:
    """Scores of predicted strategies, written to ``path`` together with the preference strengths.

    Turns that were too long for the model (plan None) are left out and counted. Raises FileError if none is left.
    """
    both = [(turn.strategy, plan.strategy) for turn, plan in zip(turns, plans, strict=True) if plan is not None]
    if not both:
        raise FileError(f"{path}: none of the {len(turns)} test contexts fits into the model's window")
    found = score_strategies([human for human, _ in both], [plan for _, plan in both])
    write_json(path, asdict(found) | {"turns": len(both), "left_out_too_long": len(turns) - len(both)})
    return {title: float(getattr(found, name)) for name, title in STRATEGY_COLUMNS.items()}


def score_replies_of(
    turns: Sequence[Labelled],
    replies: Sequence[tuple[str, str | None]],
    path: Path,
    find_errors: ErrorFinder,
    judge: Responder | None,
) -> Scores:
    """Scores of replies, each given as (strategy it was to follow, text); text None if the prompt was too long.

    Includes the share of replies in which ``find_errors`` finds a psychological error, and the ``judge``'s four
    aspects. All is written to ``path``; a file of the same replies and judge is read back, so that none is asked twice.
    """
    aspects = load_aspects("decoupled")
    told = [[turn.example.id, turn.reply, plan, text] for turn, (plan, text) in zip(turns, replies, strict=True)]
    origin = {"replies_sha256": request_hash({"replies": told}), "judge": "" if judge is None else judge.name}
    origin |= {"aspects_sha256": request_hash(describe_aspects(aspects))}
    if path.is_file() and not first_difference(origin | read_object(path).values, origin):  # 0.1 noted none of these
        stored = Fields(read_object(path).take("scores", dict), f"{path}, 'scores'")
        return {name: stored.take(name, float) for name in stored.values}
    answered = [(turn, plan, text) for turn, (plan, text) in zip(turns, replies, strict=True) if text is not None]
    if not answered:
        raise FileError(f"{path}: none of the {len(turns)} test contexts fits into the model's window")
    texts, golden = [text for _, _, text in answered], [turn.reply for turn, _, _ in answered]
    columns = support_columns()
    scores = {column.name: column.measure(texts, golden) for column in columns}
    counts: Counter[str] = Counter()
    verdicts = find_errors([case_of(turn, text, plan) for turn, plan, text in answered], counts)
    known = [errors for errors in verdicts if errors is not None]
    if known:
        scores["errors, %"] = 100 * fmean(bool(errors) for errors in known)
        counts.update(error for errors in known for error in errors)
    report: dict[str, Any] = origin | {"replies": len(answered), "left_out_too_long": len(turns) - len(answered)}
    report |= {"errors": dict(sorted(counts.items())), "signatures": {c.name: c.signature for c in columns}}
    if judge is not None:
        failures: Counter[str] = Counter()
        asked = [(turn.example, text) for turn, _, text in answered]
        name = path.name.split(".")[0]
        judged = judge_replies(judge, asked, failures, aspects=aspects, joint=True, label=f"judging {name}")
        report["judge"] = summarise(judged, [example.dialogue for example, _ in asked], failures)
        scores |= {aspect: score["mean"] for aspect, score in report["judge"]["scores"].items()}
    write_json(path, report | {"scores": scores})
    return scores
