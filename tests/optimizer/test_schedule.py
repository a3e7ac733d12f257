from __future__ import annotations

import math
from itertools import pairwise

import pytest

from sana.optimizer.schedule import constant, cosine, scale_lr


def test_constant_warms_up_linearly_from_its_first_update():
    assert [constant(4)(n) for n in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert [constant()(n) for n in (0, 10**9)] == [1.0, 1.0]
    assert constant(2000)(0) == 1 / 2000


def test_cosine_is_a_cosine_between_warmup_and_total():
    factor = cosine(10, 110, 0.1)
    assert [factor(n) for n in (0, 4, 9)] == [0.1, 0.5, 1.0]
    for n in range(10, 111):
        assert factor(n) == pytest.approx(0.55 + 0.45 * math.cos(math.pi * (n - 10) / 100))
    assert (factor(10), factor(110), factor(10**6)) == pytest.approx((1.0, 0.1, 0.1))
    assert cosine(0, 100)(50) == pytest.approx(0.5)
    assert cosine(0, 100)(0) == 1.0
    values = [factor(n) for n in range(10, 200)]
    assert all(a >= b for a, b in pairwise(values))


@pytest.mark.parametrize("make", [lambda: constant(-1), lambda: cosine(10, 0), lambda: cosine(0, 10, 1.5)])
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


def test_learning_rate_follows_the_batch():
    assert scale_lr(1e-4, 256) == 1e-4
    assert scale_lr(1e-4, 1024) == pytest.approx(2e-4)
    assert scale_lr(1e-4, 64) == pytest.approx(0.5e-4)
    assert scale_lr(1e-4, 64, rule="linear") == pytest.approx(0.25e-4)
    assert scale_lr(1e-4, 64, rule=None) == 1e-4
    assert scale_lr(1e-4, 64, base=16) == pytest.approx(2e-4)
    with pytest.raises(ValueError, match="cubic"):
        scale_lr(1e-4, 64, rule="cubic")
    with pytest.raises(ValueError, match="batch=0"):
        scale_lr(1e-4, 0)
