from __future__ import annotations

import math

import pytest
import torch
from scipy import special, stats

from sana.data.caption import Caption, Captions, PowerScore, Proportion, SoftmaxScore
from sana.ops.random import uniform

FOUR = [
    Caption("prompt", "a", 24.0),
    Caption("vila_3b", "b", 26.0),
    Caption("vila_13b", "c", 30.0),
    Caption("internvl", "d", 28.5),
]


def shares(rule, captions, n=100_000):
    """Exact frequencies over an even lattice of u, up to 1 / n per boundary."""
    counts = dict.fromkeys((c.text for c in captions), 0)
    for k in range(n):
        counts[rule(captions, (k + 0.5) / n).text] += 1
    return [counts[c.text] / n for c in captions]


def test_power_rule_is_the_tenth_power_above_the_threshold():
    total = 26.0**10 + 30.0**10 + 28.5**10
    expected = [0.0, 26.0**10 / total, 30.0**10 / total, 28.5**10 / total]
    assert PowerScore().probabilities(FOUR) == pytest.approx(expected, rel=1e-12)
    assert shares(PowerScore(), FOUR) == pytest.approx(expected, abs=2e-5)


def test_power_rule_at_other_temperatures():
    assert PowerScore(1.0, 0.0).probabilities(FOUR) == pytest.approx([s / 108.5 for s in (24, 26, 30, 28.5)])
    assert PowerScore(1e-3, 0.0).probabilities(FOUR) == pytest.approx([0, 0, 1, 0], abs=1e-15)
    assert PowerScore(1e6, 0.0).probabilities(FOUR) == pytest.approx([0.25] * 4, rel=1e-6)


def test_power_rule_takes_the_best_if_none_reaches_the_threshold():
    assert PowerScore(0.1, 31.0).probabilities(FOUR) == [0, 0, 1, 0]
    assert PowerScore(0.1, 30.0).probabilities(FOUR) == [0, 0, 1, 0]  # the threshold itself passes
    tied = [FOUR[0], Caption("x", "e", 24.0)]
    assert PowerScore(0.1, 31.0).probabilities(tied) == [1, 0]


@pytest.mark.parametrize("rule", [PowerScore(), SoftmaxScore()])
def test_captions_without_scores(rule):
    assert rule([FOUR[1], Caption("y", "e"), FOUR[2]], 0.999999).text in "bc"
    assert rule.probabilities([FOUR[1], Caption("y", "e")]) == [1, 0]
    unscored = [Caption("y", "e"), Caption("prompt", "p"), Caption("z", "f")]
    assert rule.probabilities(unscored) == [0, 1, 0]
    assert rule.probabilities([unscored[0], unscored[2]]) == [1, 0]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_softmax_rule_equals_scipy(temperature):
    scores = [c.score for c in FOUR]
    expected = special.softmax([s / temperature for s in scores])
    assert SoftmaxScore(temperature).probabilities(FOUR) == pytest.approx(expected.tolist(), rel=1e-12)
    assert shares(SoftmaxScore(temperature), FOUR) == pytest.approx(expected.tolist(), abs=2e-5)


def test_softmax_rule_takes_negative_and_huge_scores():
    captions = [Caption("a", "a", -5.0), Caption("b", "b", 1e6), Caption("c", "c", 1e6)]
    assert SoftmaxScore(0.01).probabilities(captions) == [0, 0.5, 0.5]


def test_zero_scores_are_allowed_by_the_power_rule():
    zeros = [Caption("a", "a", 0.0), Caption("b", "b", 0.0)]
    assert PowerScore(0.1, 0.0).probabilities(zeros) == [0.5, 0.5]
    assert PowerScore(0.1, 0.0).probabilities([*zeros, FOUR[0]]) == [0, 0, 1]


def test_proportions_are_over_the_sources_that_exist():
    rule = Proportion({"prompt": 1.0, "vila_13b": 3.0, "internvl": 4.0})
    assert rule.probabilities(FOUR) == pytest.approx([1 / 8, 0, 3 / 8, 4 / 8])
    assert shares(rule, FOUR) == pytest.approx([1 / 8, 0, 3 / 8, 4 / 8], abs=2e-5)
    assert rule.probabilities(FOUR[:2]) == [1, 0]
    # Two captions of one source share its weight.
    doubled = [FOUR[0], FOUR[2], Caption("vila_13b", "e")]
    assert rule.probabilities(doubled) == pytest.approx([0.25, 0.375, 0.375])


@pytest.mark.parametrize("rule", [PowerScore(), SoftmaxScore(), Proportion({"prompt": 0.3, "internvl": 0.7})])
def test_observed_frequencies_follow_the_probabilities(rule):
    n = 4000
    texts = [rule(FOUR, u).text for u in uniform(0, torch.arange(n), "caption").tolist()]
    probabilities = rule.probabilities(FOUR)
    assert math.fsum(probabilities) == pytest.approx(1, abs=1e-15)
    observed = [texts.count(c.text) for c, p in zip(FOUR, probabilities, strict=True) if p > 0]
    expected = [n * p for p in probabilities if p > 0]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


@pytest.mark.parametrize("rule", [PowerScore(), SoftmaxScore(), Proportion({"prompt": 1, "vila_3b": 1, "internvl": 1})])
def test_both_ends_of_the_unit_interval_pick_a_possible_caption(rule):
    for u in (0.0, 1 - 2.0**-53):
        chosen = rule(FOUR, u)
        assert rule.probabilities(FOUR)[FOUR.index(chosen)] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PowerScore(0.0), "temperature"),
        (lambda: SoftmaxScore(-1.0), "temperature"),
        (lambda: Proportion({}), "proportions"),
        (lambda: Proportion({"a": 0.0}), "proportions"),
        (lambda: Proportion({"a": 1.0, "b": -1.0}), "proportions"),
        (lambda: Proportion({"a": 1.0})(FOUR, 0.5), "vila_3b"),
        (lambda: PowerScore()([], 0.5), "none"),
        (lambda: Proportion({"a": 1.0})([], 0.5), "none"),
        (lambda: PowerScore()([Caption("a", "a", -1.0)], 0.5), "negative"),
        (lambda: SoftmaxScore()([Caption("clip", "a", math.nan)], 0.5), "clip"),
        (lambda: PowerScore()(FOUR, 1.0), "uniform"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_captions_are_read_only_when_they_are_asked_for():
    read = []

    def reader(k):
        read.append(k)
        return (Caption("a", "x", 30.0), Caption("b", "y", 26.0), Caption("c", "z", 20.0))[k]

    lazy, eager = Captions([30.0, 26.0, 20.0], reader), [reader(k) for k in range(3)]
    for rule in (PowerScore(1.0, 25.0), SoftmaxScore(5.0)):
        for u in (0.0, 0.3, 0.6, 0.99):
            read.clear()
            chosen = rule(lazy, u)
            assert chosen == rule(eager, u)
            assert len(read) == 1
        assert rule.probabilities(lazy) == rule.probabilities(eager)
    assert list(lazy) == lazy[:] == eager
    assert (lazy[-1], len(lazy), lazy[1:]) == (eager[2], 3, eager[1:])
    with pytest.raises(IndexError):
        lazy[3]
    with pytest.raises(ValueError, match=r"not negative, got -1\.0 from b"):
        PowerScore()(Captions([1.0, -1.0, 2.0], reader), 0.5)
