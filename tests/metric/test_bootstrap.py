"""Bootstrap intervals against scipy's bootstrap, closed forms and counted coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from sana.metric.bootstrap import mean_interval, mean_of_means_interval


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("n", [7, 60, 231])
def test_interval_of_a_mean_agrees_with_scipy(seed, n):
    values = np.random.default_rng(seed).gamma(2.0, size=n)
    ours = mean_interval(values, resamples=20_000, seed=seed)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=seed + 100, vectorized=True
    ).confidence_interval
    # Two independent Monte Carlo quantiles: each has a standard error of about 2.7 % of the standard error.
    tolerance = 0.15 * values.std() / math.sqrt(n)
    assert ours.mean == pytest.approx(values.mean(), abs=1e-12)
    assert abs(ours.low - theirs.low) < tolerance
    assert abs(ours.high - theirs.high) < tolerance
    assert ours.n == n


def test_interval_of_a_proportion_is_the_binomial_quantile():
    """Means of resampled 0/1 values are exactly Binomial(n, p) / n, so the percentile ends are known."""
    n, right = 100, 83
    values = np.r_[np.ones(right), np.zeros(n - right)]
    interval = mean_interval(values, resamples=200_000, level=0.9)
    binomial = scipy.stats.binom(n, right / n)
    assert abs(interval.low - binomial.ppf(0.05) / n) <= 0.01 + 1e-12
    assert abs(interval.high - binomial.ppf(0.95) / n) <= 0.01 + 1e-12


def test_mean_of_means_is_unweighted_and_its_variance_is_the_sum_over_tasks():
    rng = np.random.default_rng(3)
    groups = {"a": rng.random(40) < 0.9, "b": rng.random(400) < 0.3, "c": rng.random(90) < 0.5}
    interval = mean_of_means_interval(groups, resamples=100_000, level=0.95)
    means = [float(np.mean(v)) for v in groups.values()]
    assert interval.mean == pytest.approx(sum(means) / 3, abs=1e-12)
    sigma = math.sqrt(sum(p * (1 - p) / len(v) for p, v in zip(means, groups.values(), strict=True))) / 3
    normal = scipy.stats.norm.ppf(0.975)
    assert interval.low == pytest.approx(interval.mean - normal * sigma, abs=0.05 * sigma + 0.002)
    assert interval.high == pytest.approx(interval.mean + normal * sigma, abs=0.05 * sigma + 0.002)


def test_clusters_widen_the_interval_as_the_closed_form_says():
    """Four identical images per prompt hold the information of one.

    The interval is that of the prompts alone.
    """
    prompts = np.random.default_rng(5).random(150) < 0.4
    images = np.repeat(prompts, 4)
    alone = mean_interval(prompts, seed=1, resamples=50_000)
    together = mean_interval(images, np.repeat(np.arange(150), 4).tolist(), seed=1, resamples=50_000)
    assert (together.low, together.high) == (alone.low, alone.high)
    naive = mean_interval(images, seed=1, resamples=50_000)
    assert (together.high - together.low) / (naive.high - naive.low) == pytest.approx(2.0, rel=0.1)


def test_coverage_is_near_the_nominal_level():
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(400):
        values = rng.random(80) < 0.6
        interval = mean_interval(values, resamples=1000, seed=trial)
        hits += interval.low <= 0.6 <= interval.high
    assert 0.90 <= hits / 400 <= 0.99


def test_same_seed_same_interval_in_any_order_of_groups():
    rng = np.random.default_rng(0)
    a, b = rng.random(30), rng.random(50)
    one = mean_of_means_interval({"a": a, "b": b}, seed=4)
    other = mean_of_means_interval({"b": b, "a": a}, seed=4)
    assert (one.low, one.high) == (other.low, other.high)
    assert one.mean == pytest.approx(other.mean, abs=1e-15)
    assert mean_of_means_interval({"a": a, "b": b}, seed=5).low != one.low


def test_chunking_does_not_change_the_numbers(monkeypatch):
    values = np.random.default_rng(0).random(123)
    whole = mean_interval(values, resamples=997)
    monkeypatch.setattr("sana.metric.bootstrap.CHUNK", 123 * 10)
    assert mean_interval(values, resamples=997) == whole


def test_all_right_gives_a_point():
    assert mean_interval([1.0] * 9).asdict() == {"mean": 1.0, "interval": [1.0, 1.0], "level": 0.95, "n": 9}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_interval([]), "n >= 1"),
        (lambda: mean_interval([[1.0]]), "shape"),
        (lambda: mean_interval([1.0, math.nan]), "not finite"),
        (lambda: mean_interval([1.0], ["a", "b"]), "2 cluster labels"),
        (lambda: mean_interval([1.0], level=95), "level is 95"),
        (lambda: mean_interval([1.0], resamples=0), "resamples is 0"),
        (lambda: mean_of_means_interval({}), "no groups"),
        (lambda: mean_of_means_interval({"x": [math.inf]}), "of group 'x'"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
