"""People's scores of replies, to be joined with a judge's: what could be joined, what could not, and why."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from selfevo.evaluation.significance import pearson
from selfevo.files import Fields, FileError, StrPath, read_records

Reply = tuple[str, str]  # a model and the id of a test turn
Scores = Mapping[Reply, Mapping[str, float]]  # by aspect


@dataclass(frozen=True)
class Rating:
    """One record of a file of ratings: one person's scores of a reply, by aspect as written; None where left blank."""

    reply: Reply
    scores: Mapping[str, float | None]


def read_ratings(path: StrPath) -> list[Rating]:
    """Records ``{"model", "id", "scores": {aspect: number}}``, a list or JSON lines.

    There may be several for one reply: of several people, or one for each aspect. Raises FileError with the record at
    fault.
    """
    ratings = []
    for where, entry in read_records(path):
        fields = Fields(entry, where)
        scores = Fields(fields.take("scores", dict), f"{where}, 'scores'")
        if len({_folded(aspect) for aspect in scores.values}) < max(1, len(scores.values)):
            raise scores.fail("should hold a number for each aspect, and each aspect once")
        reply = fields.take("model", str), fields.take("id", str)
        ratings.append(Rating(reply, {aspect: scores.take(aspect, float, None) for aspect in scores.values}))
    return ratings


def join_ratings(
    ratings: Sequence[Rating], replies: Collection[Reply], aspects: Sequence[str], source: StrPath
) -> tuple[Scores, list[str]]:
    """People's mean scores of the ``replies``, by aspect, and sentences on what was joined and what was not.

    Names of aspects may be written in other case. Raises FileError where nothing can be joined.
    """
    known, models = {_folded(aspect): aspect for aspect in aspects}, sorted({model for model, _ in replies})
    found: dict[Reply, dict[str, list[float]]] = {}
    joined, left, foreign = Counter[str](), Counter[str](), Counter[str]()
    blank = 0
    for rating in ratings:
        given = {aspect: score for aspect, score in rating.scores.items() if score is not None}
        blank += len(rating.scores) - len(given)
        wanted = {known[_folded(aspect)]: score for aspect, score in given.items() if _folded(aspect) in known}
        model = rating.reply[0]
        if rating.reply in replies and wanted:
            joined[model] += 1
            for aspect, score in wanted.items():
                found.setdefault(rating.reply, {}).setdefault(aspect, []).append(score)
        elif model not in models:
            left[f"of {model!r}, which is not judged here ({', '.join(models)} are)"] += 1
        elif rating.reply not in replies:
            left[f"of {model} with ids that are not among the judged test turns"] += 1
        else:
            left[f"of {model} without a score for a judged aspect"] += 1
        foreign.update(aspect for aspect in given if _folded(aspect) not in known)
    told = [f"{count} records {why}" for why, count in left.items()]
    if foreign:
        told.append("aspects that are not judged: " + ", ".join(f"{name} ({n} scores)" for name, n in foreign.items()))
    if blank:
        told.append(f"{blank} blank scores")
    if not found:
        raise FileError(f"{source}: nothing can be joined with what is judged: {'; '.join(told)}")
    raters = [len(scores) for by_aspect in found.values() for scores in by_aspect.values()]
    sentences = [
        f"{source}: {joined.total()} of {len(ratings)} records joined ({_listed(joined)}), {len(found)} replies, "
        f"{min(raters)} to {max(raters)} scores each, averaged"
    ]
    sentences += [f"{source}: not joined: {'; '.join(told)}"] if told else []
    if alone := [aspect for aspect in aspects if not any(aspect in by_aspect for by_aspect in found.values())]:
        sentences.append(f"{source}: has no scores for {', '.join(alone)}")
    return {reply: {a: fmean(scores) for a, scores in own.items()} for reply, own in found.items()}, sentences


def correlation(aspect: str, judged: Scores, people: Scores) -> str:
    """Pearson's r of an aspect, its 95 % interval and the number of replies; "–" where it is not defined."""
    both = [
        (scores[aspect], people[reply][aspect])
        for reply, scores in judged.items()
        if aspect in scores and aspect in people.get(reply, {})
    ]
    r, low, high = pearson([a for a, _ in both], [b for _, b in both])
    return "–" if math.isnan(r) else f"{r:.2f} ({low:.2f} to {high:.2f}, {len(both)})".replace("nan", "–")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _folded(aspect: str) -> str:
    return " ".join(aspect.casefold().replace("_", " ").split())
