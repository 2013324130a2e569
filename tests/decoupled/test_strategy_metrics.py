"""Strategy scores against scikit-learn, and the preference bias against the published formula and the likelihood."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score

from selfevo.decoupled.strategy_metrics import confusion_table, preference_bias, preference_strengths, score_strategies
from selfevo.dialogue import ESCONV_STRATEGIES

SIZE = len(ESCONV_STRATEGIES)
names = st.sampled_from(ESCONV_STRATEGIES)


def published(table: np.ndarray, rounds: int = 20) -> np.ndarray:
    """The published update in float64 numpy, one strategy after the other; undefined where nothing is lost."""
    t = np.asarray(table, dtype=np.float64)
    p = np.ones(len(t))
    for _ in range(rounds):
        for i in range(len(t)):
            others = np.arange(len(t)) != i
            sums = p[i] + p[others]
            p[i] = (t[i, others] * p[others] / sums).sum() / (t[others, i] / sums).sum()
        p = p / np.exp(np.log(p[p > 0]).mean())
    return p * len(t) / p.sum()


def dense(seed: int, most: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, most, (SIZE, SIZE))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(names, names), min_size=1, max_size=60))
def test_f1_and_accuracy_are_those_of_scikit_learn(both: list[tuple[str, str]]) -> None:
    human, predicted = [h for h, _ in both], [p for _, p in both]
    scores = score_strategies(human, predicted)
    for average, found in (("macro", scores.macro_f1), ("weighted", scores.weighted_f1)):
        wanted = f1_score(human, predicted, labels=list(ESCONV_STRATEGIES), average=average, zero_division=0)
        assert found == pytest.approx(100 * wanted)
    assert scores.accuracy == pytest.approx(100 * accuracy_score(human, predicted))


def test_an_unknown_prediction_counts_as_others() -> None:
    human = ["Question", "Others", "Information"]
    scores = score_strategies(human, ["Question", "", "Ask something"])
    assert scores == score_strategies(human, ["Question", "Others", "Others"])
    assert scores.predicted["Others"] == 2


def test_the_table_counts_predictions_by_row_and_humans_by_column() -> None:
    table = confusion_table(["a", "a", "b"], ["b", "b", "a"], ("a", "b"), unknown="a")
    assert table == [[0, 1], [2, 0]]


@pytest.mark.parametrize("seed", range(20))
def test_strengths_are_those_of_the_published_formula(seed: int) -> None:
    table = dense(seed)
    strengths = preference_strengths(table.tolist())
    assert strengths == pytest.approx(published(table).tolist(), rel=1e-12)
    assert preference_bias(table.tolist()) == pytest.approx(float(np.std(published(table))), rel=1e-12)


@pytest.mark.parametrize("missing", [(0,), (3, 5), (0, 1, 2, 3, 4)])
@pytest.mark.parametrize("seed", range(5))
def test_a_never_predicted_strategy_has_strength_0_as_published(seed: int, missing: tuple[int, ...]) -> None:
    table = dense(seed)
    table[list(missing)] = 0
    strengths = preference_strengths(table.tolist())
    assert all(strengths[i] == 0 for i in missing)
    with np.errstate(invalid="ignore"):
        wanted = published_without_zero_pairs(table)
    assert strengths == pytest.approx(wanted.tolist(), rel=1e-10)


def published_without_zero_pairs(table: np.ndarray) -> np.ndarray:
    """As ``published``, where two strategies of strength 0 are 0/0: what they have not won counts as 0."""
    t = np.asarray(table, dtype=np.float64)
    p = np.ones(len(t))
    for _ in range(20):
        for i in range(len(t)):
            sums = p[i] + p
            won, lost = np.nan_to_num(t[i] * p / sums), np.nan_to_num(t[:, i] / sums)
            p[i] = np.delete(won, i).sum() / np.delete(lost, i).sum()
        p = p / np.exp(np.log(p[p > 0]).mean())
    return p * len(t) / p.sum()


@pytest.mark.parametrize("seed", range(5))
def test_converged_strengths_maximise_the_likelihood(seed: int) -> None:
    """At the maximum every strategy wins exactly as often as its strengths say it should."""
    table = dense(seed, 12).astype(np.float64)
    p = np.asarray(preference_strengths(table.tolist(), rounds=None))
    met = table + table.T
    np.fill_diagonal(met, 0)
    expected = (met * (p[:, None] / (p[:, None] + p[None, :]))).sum(axis=1)
    won = table.sum(axis=1) - np.diag(table)
    assert np.allclose(expected, won, rtol=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 8), st.randoms(use_true_random=False), st.sampled_from([1, 20, 200]))
def test_strengths_are_defined_for_every_table(size: int, rng: random.Random, rounds: int) -> None:
    table = [[rng.choice((0, 0, 0, 1, 5)) for _ in range(size)] for _ in range(size)]
    strengths = preference_strengths(table, rounds=rounds)
    assert math.fsum(strengths) == pytest.approx(size)
    assert all(strength >= 0 for strength in strengths)
    assert 0 <= preference_bias(table, rounds=rounds) <= math.sqrt(size - 1) + 1e-9


@settings(max_examples=50, deadline=None)
@given(st.permutations(range(SIZE)), st.integers(0, 10))
def test_converged_strengths_follow_their_strategies_when_these_change_places(order: list[int], seed: int) -> None:
    table = dense(seed)
    moved = table[np.ix_(order, order)]
    strengths = preference_strengths(table.tolist(), rounds=None)
    assert preference_strengths(moved.tolist(), rounds=None) == pytest.approx([strengths[i] for i in order], rel=1e-8)


def test_the_limits() -> None:
    perfect = [[4 if i == j else 0 for j in range(SIZE)] for i in range(SIZE)]
    assert preference_strengths(perfect) == [1.0] * SIZE
    assert preference_bias(perfect) == 0
    one_answer = [[3] * SIZE] + [[0] * SIZE for _ in range(SIZE - 1)]
    assert preference_strengths(one_answer) == [SIZE] + [0] * (SIZE - 1)
    assert preference_bias(one_answer) == pytest.approx(math.sqrt(SIZE - 1))
    even = [[5] * SIZE for _ in range(SIZE)]
    assert preference_bias(even) == pytest.approx(0, abs=1e-12)
    # c was never taken for another: neutral. a beats b and loses to none: all that is left.
    assert preference_strengths([[0, 2, 0], [0, 0, 0], [0, 0, 7]]) == [2, 0, 1]


def test_two_strategies_have_strengths_in_the_ratio_of_their_wins() -> None:
    assert preference_strengths([[9, 3], [1, 9]], rounds=None) == pytest.approx([1.5, 0.5])


@pytest.mark.parametrize(
    ("human", "predicted", "message"),
    [
        ([], [], "not 0 and 0"),
        (["Question"], [], "not 0 and 1"),
        (["Chatter"], ["Question"], r"human\[0\].*'Chatter'"),
    ],
)
def test_bad_lists_are_refused(human: list[str], predicted: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_strategies(human, predicted)


def test_bad_tables_and_settings_are_refused() -> None:
    for table in ([[1, 2]], [[1, -1], [1, 1]], [[1, math.nan], [1, 1]], [[1, math.inf], [1, 1]]):
        with pytest.raises(ValueError, match="square"):
            preference_strengths(table)
    with pytest.raises(ValueError, match="rounds"):
        preference_strengths([[1, 1], [1, 1]], rounds=0)
    with pytest.raises(ValueError, match="classes"):
        confusion_table(["a"], ["a"], ("a", "b"))
