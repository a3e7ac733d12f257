"""Keeping the best: against the published comparison of pairs, played out as tournaments."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.reward.verifier import GAP, yes_no_score
from sana.sampler.best_of_n import keep_best

Image = tuple[float, float, bool]  # logit of yes, logit of no, whether the answer was yes
LOGITS = st.one_of(
    st.integers(-4, 4).map(float),  # many ties
    st.floats(-40, 40, width=32).filter(lambda x: x == 0 or abs(x) >= 2**-15),
)
IMAGES = st.lists(st.tuples(LOGITS, LOGITS, st.booleans()), min_size=1, max_size=13)


def first_wins(a: Image, b: Image) -> bool:
    """The published rule of two images."""
    if a[2] != b[2]:
        return a[2]
    return a[0] > b[0] if a[2] else a[1] < b[1]


def winner(images: list[Image], one: int, other: int) -> int:
    return one if first_wins(images[one], images[other]) else other


def bracket(images: list[Image], players: list[int]) -> int:
    """Neighbours meet, round after round; who has no partner goes on."""
    while len(players) > 1:
        pairs = [players[i : i + 2] for i in range(0, len(players), 2)]
        players = [winner(images, *pair) if len(pair) == 2 else pair[0] for pair in pairs]
    return players[0]


@settings(max_examples=150, deadline=None)
@given(IMAGES)
def test_the_sort_has_the_winners_of_tournaments(images):
    scores = yes_no_score(*zip(*images, strict=True))
    (best,) = keep_best(scores, 1)
    players = list(range(len(images)))
    assert best == bracket(images, players)
    assert best == reduce(lambda a, b: winner(images, a, b), players), "one after the other"
    for k in range(1, len(images) + 1):  # the best without those that have won already
        left, order = list(players), []
        for _ in range(k):
            order.append(bracket(images, left))
            left.remove(order[-1])
        assert keep_best(scores, k).tolist() == order


@settings(max_examples=150, deadline=None)
@given(IMAGES)
def test_every_pair_is_ordered_by_the_rule(images):
    scores = yes_no_score(*zip(*images, strict=True))
    for i, a in enumerate(images):
        for j, b in enumerate(images):
            assert (scores[i] > scores[j]) == first_wins(a, b) or a == b
            assert (scores[i] == scores[j]) == (not first_wins(a, b) and not first_wins(b, a))


def test_scores_can_be_read():
    assert yes_no_score([3.5, 1.0], [0.0, 2.0], [True, False]).tolist() == [GAP + 3.5, -GAP - 2.0]
    assert yes_no_score([np.inf], [1.0], [False]).tolist() == [-GAP - 1], "only the logit of the answer counts"
    for wrong in (np.nan, np.inf, GAP):
        with pytest.raises(ValueError, match="a logit is"):
            yes_no_score([0.0, wrong], [0.0, 0.0], [True, True])


def test_ties_go_to_the_later():
    assert keep_best([1.0, 0.0, 1.0, -2.0, 0.0], 4).tolist() == [2, 0, 4, 1]
    assert keep_best(np.float32([0.25]), 1).tolist() == [0]
    for scores, k, said in (
        ([1.0, 2.0], 3, "3 of 2 candidates"),
        ([1.0], 0, "0 of 1"),
        ([1.0, np.nan], 1, "finite"),
        ([[1.0]], 1, r"shape \(1, 1\)"),
    ):
        with pytest.raises(ValueError, match=said):
            keep_best(scores, k)
