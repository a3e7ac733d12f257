"""The order of samples: a pure function of (seed, position), the same over any ranks."""

from __future__ import annotations

import itertools

import pytest

from sana.data.order import Order, PositionBatches


def take(batches: PositionBatches, count: int) -> list[list[int]]:
    return list(itertools.islice(iter(batches), count))


@pytest.mark.parametrize("count", [1, 7, 100])
def test_every_sample_once_per_epoch(count: int) -> None:
    order = Order(count, seed=3)
    for epoch in range(3):
        seen = [order.sample(epoch * count + i) for i in range(count)]
        assert sorted(seen) == list(range(count))


def test_epochs_differ_and_seeds_differ_and_repeat() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order(50, seed)
        return [order.sample(50 * number + i) for i in range(50)]

    assert epoch(0, 0) != epoch(0, 1)
    assert epoch(0, 0) != epoch(1, 0)
    assert epoch(0, 1) == epoch(0, 1)


@pytest.mark.parametrize("world", [1, 2, 3, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_global_batches_do_not_depend_on_the_world(world: int, accumulate: int) -> None:
    batch = 12
    micro = batch // world // accumulate
    ranks = [take(PositionBatches(batch, 24, rank, world, micro), 3 * accumulate) for rank in range(world)]
    for step in range(3):
        joined = [p for rank in ranks for part in rank[step * accumulate : (step + 1) * accumulate] for p in part]
        assert sorted(joined) == list(range(24 + 12 * step, 24 + 12 * (step + 1)))


def test_a_start_continues_where_another_stopped() -> None:
    assert take(PositionBatches(8, 0), 5)[3:] == take(PositionBatches(8, 24), 2)


def test_batches_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="does not divide by 3"):
        PositionBatches(8, world=3)
    with pytest.raises(ValueError, match="micro-batches of 3"):
        PositionBatches(8, micro=3)
    with pytest.raises(ValueError, match="at least one"):
        Order(0, 0)
