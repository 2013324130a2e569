"""The uncertainty of scores: bootstrap and jackknife intervals, paired tests, correlation with human scores.

The replies of one dialogue are not independent of one another, so whole dialogues are resampled, not single replies.
``values`` has one number per reply, (N,); ``groups`` has the dialogue of each (None: every reply is its own group).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Values = Sequence[float] | NDArray[np.float64]
SAMPLES = 2000
_ROUNDING = 1e-12  # relative to the largest value: what sums and means in another order may differ by
_BLOCK = 4_000_000  # random numbers held at a time


@dataclass(frozen=True)
class Comparison:
    """Model B minus model A on the same replies: mean difference, its bootstrap interval, two-sided p-value."""

    difference: float
    low: float
    high: float
    p_value: float


def bootstrap_interval(
    values: Values,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    samples: int = SAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of ``values`` (Efron and Tibshirani 1993, chapter 13).

    Each of the ``samples`` draws as many whole groups as there are, with replacement; its score is the mean over their
    replies. A single group gives an interval of width 0. Raises ValueError: no values, unequal lengths, NaN, a level
    outside (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level}")
    sums, sizes = _by_group(values, groups)
    draws = _random_rows(len(sums), (samples, len(sums)), seed)
    means = np.concatenate([sums[drawn].sum(1) / sizes[drawn].sum(1) for drawn in draws])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def jackknife_interval(score: float, without: Values, *, level: float = 0.95) -> tuple[float, float]:
    """An interval for a score of the whole corpus from the score without each of its G groups, (G,).

    The jackknife's standard error with the normal quantile (Efron and Tibshirani 1993, chapter 11). A bootstrap would
    not do for Distinct-n: a group that is drawn twice adds tokens but nothing new. One group gives a width of 0.
    """
    array = np.asarray(without, dtype=np.float64)
    count = len(array)
    error = math.sqrt((count - 1) / count * float(np.square(array - array.mean()).sum()))
    reach = NormalDist().inv_cdf((1 + level) / 2) * error
    return score - reach, score + reach


def compare(
    first: Values,
    second: Values,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    samples: int = SAMPLES,
    seed: int = 0,
) -> Comparison:
    """Paired comparison of two models' values for the same replies, ``second`` minus ``first``.

    The p-value is that of a sign-flip permutation test over groups (approximate randomisation, Noreen 1989): under the
    null hypothesis the two models are interchangeable in every dialogue. It is (1 + number of samples at least as
    extreme) / (1 + samples), or exact if there are at most ``samples`` sign patterns. Raises ValueError as
    ``bootstrap_interval`` does.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"the two models need values for the same replies, not {a.size} and {b.size}")
    differences = b - a
    low, high = bootstrap_interval(differences, groups, level=level, samples=samples, seed=seed)
    sums, _ = _by_group(differences, groups)
    return Comparison(float(differences.mean()), low, high, _sign_flip(sums, samples, seed))


def sign_test(wins: int, losses: int) -> float:
    """The two-sided p-value of the exact sign test: the chance of a split at least as uneven where both sides are
    equally likely. Ties are left out beforehand (Dixon and Mood 1946); 1.0 where nothing is left."""
    count, fewer = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(count, k) for k in range(fewer + 1)) / 2**count)


def pearson(first: Values, second: Values, *, level: float = 0.95) -> tuple[float, float, float]:
    """Pearson's correlation of two (N,) lists and the ends of its interval by Fisher's z transformation.

    NaN where not defined: each list needs values that differ by more than rounding, the interval four pairs and a
    correlation inside (-1, 1). Raises ValueError for lists of unequal lengths.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"a correlation needs pairs, not {a.size} and {b.size} values")
    if len(a) < 2 or any(np.ptp(one) <= _ROUNDING * np.abs(one).max() for one in (a, b)):
        return math.nan, math.nan, math.nan
    a, b = a - a.mean(), b - b.mean()
    r = float(np.clip((a / np.linalg.norm(a)) @ (b / np.linalg.norm(b)), -1, 1))
    if len(a) < 4 or 1 - abs(r) < _ROUNDING:
        return r, math.nan, math.nan
    reach = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(len(a) - 3)
    return r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach)


def _by_group(values: Values, groups: Sequence[Hashable] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(G,) sums and (G,) sizes, in the order in which groups first occur."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError("the values must be a list of at least one finite number")
    if groups is None:
        return array, np.ones_like(array)
    if len(groups) != len(array):
        raise ValueError(f"{len(array)} values need as many groups, not {len(groups)}")
    places: dict[Hashable, int] = {}
    index = np.array([places.setdefault(group, len(places)) for group in groups])
    return np.bincount(index, array).astype(np.float64), np.bincount(index).astype(np.float64)


def _random_rows(high: int, shape: tuple[int, int], seed: int) -> Iterator[NDArray[np.int64]]:
    """Random integers in 0..high-1 of the given shape, in blocks of rows to bound the memory."""
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK // shape[1])
    for start in range(0, shape[0], rows):
        yield generator.integers(high, size=(min(rows, shape[0] - start), shape[1]))


def _sign_flip(sums: NDArray[np.float64], samples: int, seed: int) -> float:
    """The share of sign patterns whose total is at least as far from zero as the one observed."""
    nonzero = sums[sums != 0]
    observed = abs(float(nonzero.sum())) * (1 - 1e-12)  # totals equal up to rounding count as equal
    count = len(nonzero)
    if 2**count <= samples:
        patterns = (np.arange(2**count)[:, None] >> np.arange(count)) & 1
        return float(np.mean(np.abs((1 - 2 * patterns) @ nonzero) >= observed))
    draws = _random_rows(2, (samples, count), seed)
    extreme = sum(int(np.sum(np.abs((2 * drawn - 1) @ nonzero) >= observed)) for drawn in draws)
    return (1 + extreme) / (1 + samples)
