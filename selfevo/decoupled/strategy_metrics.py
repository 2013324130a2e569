"""Scores of predicted support strategies: F1 and preference bias, as in Decoupled ESC (Zhang et al. 2025).

Standard library only. ``human`` and ``predicted`` are lists of N names; ``classes`` names the strategies, by default
the eight of ESConv. A prediction outside of them counts as ``unknown``. F1 scores are in 0..100.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, pstdev

from selfevo.dialogue import ESCONV_STRATEGIES

PUBLISHED_ROUNDS = 20
_MOST_ROUNDS = 20_000  # of a fit to convergence
_TOLERANCE = 1e-12  # relative change of all strengths below which a fit has converged
UNKNOWN = "Others"
Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class StrategyScores:
    """Accuracy and F1 in 0..100, ``bias`` in 0..sqrt(n - 1) for n strategies; ``strengths`` (0 and up) sum to n;
    ``predicted`` counts the predictions."""

    accuracy: float
    weighted_f1: float
    macro_f1: float
    bias: float
    strengths: Mapping[str, float]
    predicted: Mapping[str, int]


def score_strategies(
    human: Sequence[str],
    predicted: Sequence[str],
    classes: Sequence[str] = ESCONV_STRATEGIES,
    *,
    unknown: str = UNKNOWN,
    rounds: int | None = PUBLISHED_ROUNDS,
) -> StrategyScores:
    """All scores of predicted strategies.

    The F1 of a strategy that is neither among the predicted nor among the human ones is 0. Macro F1 is the mean over
    all ``classes`` (as in scikit-learn with ``labels=classes``); weighted F1 weights each class by its share among the
    human strategies. Raises ValueError as ``confusion_table`` does.
    """
    table = confusion_table(human, predicted, classes, unknown=unknown)
    strengths = preference_strengths(table, rounds=rounds)
    found = [sum(row) for row in table]
    wanted = [sum(row[j] for row in table) for j in range(len(classes))]
    right = [table[i][i] for i in range(len(classes))]
    f1 = [200 * hit / (seen + own) if seen + own else 0.0 for hit, seen, own in zip(right, found, wanted)]
    return StrategyScores(
        accuracy=100 * sum(right) / len(human),
        weighted_f1=math.fsum(score * own for score, own in zip(f1, wanted)) / len(human),
        macro_f1=math.fsum(f1) / len(f1),
        bias=pstdev(strengths),
        strengths=dict(zip(classes, strengths)),
        predicted=dict(zip(classes, found)),
    )


def confusion_table(
    human: Sequence[str],
    predicted: Sequence[str],
    classes: Sequence[str] = ESCONV_STRATEGIES,
    *,
    unknown: str = UNKNOWN,
) -> list[list[int]]:
    """``table[i][j]``: how often strategy i was predicted where j was the human one.

    Raises ValueError: no or unequally many names, classes that repeat or lack ``unknown``, a human name that is no
    class.
    """
    if len(human) != len(predicted) or not human:
        raise ValueError(f"as many predicted as human strategies are needed, not {len(predicted)} and {len(human)}")
    places = {name: place for place, name in enumerate(classes)}
    if len(places) != len(classes) or unknown not in places:
        raise ValueError(f"the classes must differ and include {unknown!r}: {', '.join(classes)}")
    table = [[0] * len(classes) for _ in classes]
    for index, (wanted, found) in enumerate(zip(human, predicted)):
        if wanted not in places:
            raise ValueError(f"human[{index}] should be one of {', '.join(classes)}, not {wanted!r}")
        table[places.get(found, places[unknown])][places[wanted]] += 1
    return table


def preference_bias(table: Table, *, rounds: int | None = PUBLISHED_ROUNDS) -> float:
    """The population standard deviation of the preference strengths, from 0 (no preference) to sqrt(n - 1) (every
    confusion is in favour of one strategy)."""
    return pstdev(preference_strengths(table, rounds=rounds))


def preference_strengths(table: Table, *, rounds: int | None = PUBLISHED_ROUNDS) -> list[float]:
    """Bradley-Terry strengths from an (n, n) table of counts; they sum to n. The diagonal is ignored.

    ``table[i][j]`` is how often i "won": it was predicted where j was the human strategy. Strengths start equal and are
    updated in place, and after each round divided by the geometric mean of the positive ones. ``rounds=None`` iterates
    until they no longer change (the iteration of Newman 2023, which converges to the maximum of the likelihood if there
    is one).

    If the likelihood has no maximum, the strengths are its limits: a strategy without wins has strength 0; strategies
    with wins but no losses share all the strength equally. A strategy that was never confused with another says nothing
    about preferences and has the neutral strength 1. Raises ValueError: a table that is not square, a count that is
    negative or not finite, fewer than one round.
    """
    size = len(table)
    if any(len(row) != size or not all(0 <= count < math.inf for count in row) for row in table):
        raise ValueError("the table of counts must be square, its counts finite and not negative")
    if rounds is not None and rounds < 1:
        raise ValueError(f"rounds must be at least 1, or None to converge, not {rounds}")
    wins = [sum(row) - row[i] for i, row in enumerate(table)]
    losses = [sum(row[i] for row in table) - table[i][i] for i in range(size)]
    confused = [i for i in range(size) if wins[i] or losses[i]]
    strengths = [1.0] * size
    undefeated = [i for i in confused if not losses[i]]
    if undefeated:
        for i in confused:
            strengths[i] = len(confused) / len(undefeated) if i in undefeated else 0.0
    elif confused:
        fitted = _fit([[table[i][j] for j in confused] for i in confused], rounds)
        scale = len(confused) / math.fsum(fitted)
        for i, strength in zip(confused, fitted):
            strengths[i] = strength * scale
    return strengths


def _fit(table: Table, rounds: int | None) -> list[float]:
    """The iteration, for strategies that all have losses. Then some of them beat one another in a cycle, so not all
    strengths become 0, and no division is by 0."""
    strengths = [1.0] * len(table)
    for _ in range(_MOST_ROUNDS if rounds is None else rounds):
        before = list(strengths)
        for i, own in enumerate(strengths):
            won = lost = 0.0
            for j, other in enumerate(strengths):
                if j != i and own + other > 0:
                    won += table[i][j] * other / (own + other)
                    lost += table[j][i] / (own + other)
            strengths[i] = won / lost if won else 0.0
        mean = geometric_mean([strength for strength in strengths if strength > 0])
        strengths = [strength / mean for strength in strengths]
        if rounds is None and all(abs(new - old) <= _TOLERANCE * new for new, old in zip(strengths, before)):
            break
    return strengths
