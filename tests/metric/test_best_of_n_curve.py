"""The curve of best of n: against all subsets, exact fractions and a simulation; correlations against scipy's."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest
from scipy import stats

from sana.metric.best_of_n import _weights, best_of_n_curve, expected_best, rank_correlation
from sana.metric.bootstrap import mean_interval, mean_of_means_interval


def over_all_subsets(scores, values, n):
    """Mean over all subsets of n of the value of the best, of equal scores the mean of theirs."""
    total = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        total.append(np.mean([values[i] for i in subset if scores[i] == top]))
    return np.mean(total)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("kinds", [1000, 3, 1])
def test_all_subsets(seed, kinds):
    """With as good as no ties, with many, and with nothing but ties."""
    rng = np.random.default_rng(seed)
    scores, values = rng.integers(0, kinds, (3, 9)).astype(float), rng.normal(size=(3, 9))
    ns = [1, 2, 3, 5, 8, 9]
    want = [[over_all_subsets(s, v, n) for n in ns] for s, v in zip(scores, values, strict=True)]
    assert expected_best(scores, values, ns) == pytest.approx(np.array(want), rel=1e-12)
    assert expected_best(scores, values, [1])[:, 0] == pytest.approx(values.mean(1))


@pytest.mark.parametrize(("size", "n"), [(7, 3), (2048, 1), (2048, 32), (2048, 1024), (2048, 2048)])
def test_weights_are_exact_fractions(size, n):
    want = [Fraction(comb(i - 1, n - 1), comb(size, n)) for i in range(1, size + 1)]
    got = _weights(size, n)
    assert got.sum() == pytest.approx(1, rel=1e-12)
    for share, exact in zip(got, want, strict=True):
        assert share == pytest.approx(float(exact), rel=1e-10, abs=1e-300)


def test_an_unbiased_estimate_of_fresh_drawings():
    """Pools of a known population: the mean estimate is the expectation over independent sets of n."""
    rng = np.random.default_rng(5)
    n, size, pools = 4, 12, 20_000
    scores = rng.normal(size=(pools, size))
    values = scores + rng.normal(size=(pools, size))  # a judge with a correlation of 0.7
    got = expected_best(scores, values, [n])[:, 0]
    # The value's noise is independent of the score, so the expectation is that of the largest of n normal numbers.
    largest = stats.norm.expect(lambda x: n * x * stats.norm.cdf(x) ** (n - 1))
    assert got.mean() == pytest.approx(largest, abs=4 * got.std() / np.sqrt(pools))
    fresh = rng.normal(size=(pools, n)).max(1)
    assert got.std() < (fresh + rng.normal(size=pools)).std(), "and has less variance than one fresh drawing"


@pytest.mark.parametrize("seed", [3, 4])
def test_right_or_wrong_with_a_perfect_judge(seed):
    """1 - C(wrong, n) / C(N, n), the estimate of pass@n."""
    right = np.random.default_rng(seed).integers(0, 2, (5, 11)).astype(float)
    wrong = (1 - right).sum(1).astype(int)
    for n in (1, 4, 11):
        want = [1 - comb(w, n) / comb(11, n) for w in wrong]
        assert expected_best(right, right, [n])[:, 0] == pytest.approx(np.array(want))


def test_the_curve_has_intervals_over_prompts():
    rng = np.random.default_rng(6)
    scores, values = rng.normal(size=(2, 10, 8))
    each = expected_best(scores, values, [2, 8])
    rows = best_of_n_curve(scores, values, [2, 8], resamples=500, seed=3)
    for row, n, column in zip(rows, (2, 8), each.T, strict=True):
        want = mean_interval(column, resamples=500, seed=3)
        assert row == {"best_of": n, **want.asdict()}
    tags = ["a"] * 3 + ["b"] * 7
    (row,) = best_of_n_curve(scores, values, [2], tags, resamples=500)
    assert row["mean"] == pytest.approx((each[:3, 0].mean() + each[3:, 0].mean()) / 2)
    want = mean_of_means_interval({"a": each[:3, 0], "b": each[3:, 0]}, resamples=500)
    assert row["interval"] == pytest.approx([want.low, want.high])
    for wrong, said in (
        ((scores, values[:, :7], [2]), "expected"),
        ((scores, values, [9]), "n is 9, but the pool has 8"),
        ((scores, values, [0]), "n is 0"),
        ((scores * np.nan, values, [1]), "not finite"),
        ((scores, values, [1], ["a"]), "1 groups for 10"),
    ):
        with pytest.raises(ValueError, match=said):
            best_of_n_curve(*wrong)


def test_correlation_within_prompts():
    rng = np.random.default_rng(7)
    a = rng.normal(size=(6, 9))
    b = a + 2 * rng.normal(size=(6, 9)) + 10 * rng.normal(size=(6, 1))  # prompts differ more than images
    b[4] = 1.0
    found = rank_correlation(a, b)
    want = [stats.spearmanr(a[i], b[i]).statistic for i in (0, 1, 2, 3, 5)]
    assert found["within"] == pytest.approx(np.mean(want))
    assert (found["prompts"], found["of"]) == (5, 6)
    assert found["overall"] == pytest.approx(stats.spearmanr(a.ravel(), b.ravel()).statistic)
    assert rank_correlation(a, np.ones_like(a)) == {"within": None, "prompts": 0, "of": 6, "overall": None}
