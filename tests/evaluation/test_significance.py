"""Intervals, paired tests and correlation, against scipy-free closed forms and numpy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfevo.evaluation import bootstrap_interval, compare, pearson
from selfevo.evaluation.significance import jackknife_interval
from selfevo.metrics import distinct_n, without_each_group

finite = st.floats(-100, 100, allow_subnormal=False)
graded = st.integers(-1600, 1600).map(lambda n: n / 16)  # their sums are exact, so ties are ties


def test_the_interval_of_many_independent_values_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(50, 10, 4000)
    low, high = bootstrap_interval(values, samples=4000)
    reach = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - reach, abs=0.05)
    assert high == pytest.approx(values.mean() + reach, abs=0.05)


def test_replies_of_one_dialogue_are_drawn_together() -> None:
    dialogues = np.random.default_rng(2).normal(50, 10, 200)
    values, groups = np.repeat(dialogues, 25), [i // 25 for i in range(5000)]
    low, high = bootstrap_interval(values, groups)
    alone_low, alone_high = bootstrap_interval(values)
    assert (high - low) / (alone_high - alone_low) == pytest.approx(5, rel=0.15)  # the square root of 25


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    inside = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.exponential(1.0, 80), samples=400, seed=trial)
        inside += low <= 1.0 <= high
    assert 0.88 < inside / 300 < 0.98


@settings(deadline=None, max_examples=50)
@given(values=st.lists(finite, min_size=1, max_size=30), seed=st.integers(0, 9))
def test_an_interval_lies_within_the_values_and_repeats(values: list[float], seed: int) -> None:
    low, high = bootstrap_interval(values, samples=200, seed=seed)
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9
    assert (low, high) == bootstrap_interval(values, samples=200, seed=seed)


def test_the_jackknife_of_a_mean_has_its_usual_standard_error() -> None:
    values = np.random.default_rng(3).normal(size=40)
    without = [np.delete(values, i).mean() for i in range(len(values))]
    low, high = jackknife_interval(values.mean(), without)
    assert (low + high) / 2 == pytest.approx(values.mean())
    assert high - low == pytest.approx(2 * 1.959964 * values.std(ddof=1) / math.sqrt(len(values)))
    assert jackknife_interval(5.0, [3.0]) == (5.0, 5.0)


def test_the_jackknife_covers_distinct_n_about_as_often_as_it_says() -> None:
    """Replies drawn from a known source; the true value is the mean over many corpora of that size."""
    generator = np.random.default_rng(0)
    odds = 1 / np.arange(1, 400)
    groups = [index // 4 for index in range(120)]

    def draw() -> list[str]:
        return [" ".join(f"w{w}" for w in generator.choice(399, 8, p=odds / odds.sum())) for _ in range(120)]

    truth = np.mean([distinct_n(draw(), 1) for _ in range(200)])
    inside = 0
    for _ in range(100):
        replies = draw()
        without = without_each_group(distinct_n, replies, replies, groups, n=1)
        low, high = jackknife_interval(distinct_n(replies, 1), without)
        inside += low <= truth <= high
    assert inside >= 85


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(graded, graded), min_size=1, max_size=8))
def test_few_pairs_are_tested_exactly(pairs: list[tuple[float, float]]) -> None:
    differences = [b - a for a, b in pairs]
    totals = [
        abs(sum(s * d for s, d in zip(signs, differences)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = np.mean([t >= totals[0] for t in totals])
    result = compare([a for a, _ in pairs], [b for _, b in pairs])
    assert result.p_value == pytest.approx(expected)
    assert result.difference == pytest.approx(math.fsum(differences) / len(differences), abs=1e-9)


def test_under_the_null_hypothesis_p_values_are_uniform() -> None:
    generator = np.random.default_rng(4)
    p_values = []
    for trial in range(400):
        a, b = generator.normal(size=(2, 40))
        p_values.append(compare(a, b, samples=300, seed=trial).p_value)
    for quantile in (0.05, 0.25, 0.5, 0.75):
        assert np.mean(np.array(p_values) <= quantile) == pytest.approx(quantile, abs=0.08)


def test_a_clear_difference_is_found_and_its_sign_is_second_minus_first() -> None:
    first = np.random.default_rng(5).normal(0, 1, 200)
    result = compare(first, first + 0.5)
    assert result.difference == pytest.approx(0.5)
    assert (result.low, result.high) == (pytest.approx(0.5), pytest.approx(0.5))
    assert result.p_value < 0.001
    swapped = compare(first + 0.5, first)
    assert (swapped.difference, swapped.p_value) == (pytest.approx(-0.5), result.p_value)


def test_equal_models_have_p_value_one() -> None:
    assert compare([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p_value == 1


@settings(deadline=None, max_examples=50)
@given(pairs=st.lists(st.tuples(finite, finite), min_size=5, max_size=30))
def test_pearson_equals_numpy(pairs: list[tuple[float, float]]) -> None:
    a, b = np.array(pairs).T
    if a.std() < 1e-6 or b.std() < 1e-6:
        return
    r, low, high = pearson(a, b)
    assert r == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-8)
    assert math.isnan(low) or low <= r <= high


def test_pearsons_interval_is_fishers() -> None:
    # r = 0.5 of 28 pairs: z = 0.5493 +- 1.95996 / 5
    generator = np.random.default_rng(6)
    a, noise = generator.normal(size=(2, 28))
    a -= a.mean()
    noise -= noise.mean()
    noise -= a * (a @ noise) / (a @ a)
    b = a / np.linalg.norm(a) + math.sqrt(3) * noise / np.linalg.norm(noise)
    r, low, high = pearson(a, b)
    assert (r, low, high) == (pytest.approx(0.5), pytest.approx(0.15603, abs=1e-4), pytest.approx(0.73582, abs=1e-4))


def test_pearson_is_undefined_without_variation() -> None:
    assert all(map(math.isnan, pearson([1, 1, 1], [1, 2, 3])))
    assert all(map(math.isnan, pearson([1], [2])))


def test_pearson_of_constants_that_differ_by_rounding_is_undefined() -> None:
    rounded = [0.3, 0.1 + 0.2, 0.3, 0.1 * 3]
    assert len(set(rounded)) == 2
    assert all(map(math.isnan, pearson(rounded, [1, 2, 3, 5])))
    assert all(map(math.isnan, pearson([1, 2, 3, 5], [1e6 * value for value in rounded])))
    assert pearson([1e-9 * n for n in range(4)], [0, 1, 2, 3])[0] == pytest.approx(1)  # small is not constant
    assert math.isnan(pearson([0.1 * n for n in range(6)], range(6))[1])  # 1 up to rounding has no interval


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one"),
        (lambda: bootstrap_interval([1.0, math.nan]), "finite"),
        (lambda: bootstrap_interval([1.0], ["a", "b"]), "as many groups"),
        (lambda: bootstrap_interval([1.0], level=1.0), "level"),
        (lambda: compare([1.0], [1.0, 2.0]), "same replies"),
        (lambda: pearson([1.0], [1.0, 2.0]), "pairs"),
    ],
)
def test_unusable_values_are_refused(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        call()
