"""Order, mixtures and filters: closed forms and properties over random cases."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.data.stream import Cell, Filter, Stream, last_at_most


def plain(count: int, seed: int, **more: bool) -> Stream:
    return Stream([Cell(np.arange(count), Fraction(count))], seed, **more)


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 1])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_the_plain_order_is_philox_of_seed_and_epoch(count: int, seed: int) -> None:
    """The order that runs have had from the first version on."""
    expected = [np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count) for epoch in range(5)]
    assert np.array_equal(plain(count, seed).take(0, 5 * count), np.concatenate(expected))


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 60), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 10**6))
def test_every_epoch_holds_every_sample_once(count: int, seed: int, epoch: int) -> None:
    assert sorted(plain(count, seed).take(epoch * count, count).tolist()) == list(range(count))


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    due=st.lists(st.fractions(Fraction(1, 7), 50, max_denominator=97), min_size=4, max_size=4),
    first=st.integers(0, 10**5),
    cut=st.integers(0, 200),
    resampled=st.booleans(),
)
def test_a_stream_is_a_function_of_the_position(
    sizes: list[int], due: list[Fraction], first: int, cut: int, resampled: bool
) -> None:
    def make() -> Stream:
        cells = [Cell(1000 * k + np.arange(n), due[k], str(k)) for k, n in enumerate(sizes)]
        return Stream(cells, 5, "x", resampled=resampled)

    whole = make().take(first, 200)
    other = make()
    assert np.array_equal(other.take(first + cut, 200 - cut), whole[cut:])
    assert np.array_equal(other.take(first, cut), whole[:cut])


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=3),
    due=st.lists(st.fractions(Fraction(1, 7), 50, max_denominator=97), min_size=3, max_size=3),
    epochs=st.integers(1, 40),
)
def test_a_mixture_gives_each_cell_its_due_and_its_samples_equally_often(
    sizes: list[int], due: list[Fraction], epochs: int
) -> None:
    stream = Stream([Cell(1000 * k + np.arange(n), due[k], str(k)) for k, n in enumerate(sizes)], 1)
    seen = Counter(stream.take(0, stream.before(epochs)).tolist())
    for k, n in enumerate(sizes):
        counts = [seen[1000 * k + i] for i in range(n)]
        assert sum(counts) == int(epochs * due[k])
        assert max(counts) - min(counts) <= 1


def test_resampling_draws_with_replacement() -> None:
    count = 20_000
    seen = np.bincount(plain(count, 0, resampled=True).take(0, count), minlength=count)
    for times in range(3):  # Poisson with mean 1: e^-1 / k!, four standard deviations of slack
        expected = np.exp(-1) / (1, 1, 2)[times]
        assert abs((seen == times).mean() - expected) < 4 * (expected / count) ** 0.5


def test_orders_differ_between_epochs_seeds_and_names() -> None:
    cell = Cell(np.arange(50), Fraction(50))
    orders = [Stream([cell], seed, name).take(50 * e, 50) for seed in (0, 1) for name in ("", "b") for e in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 8


def test_last_at_most() -> None:
    for value in range(40):
        assert last_at_most(lambda n: n * 7 // 3, value) == max(n for n in range(50) if n * 7 // 3 <= value)


class Columns:
    def __init__(self, **columns: np.ndarray) -> None:
        self.columns = columns

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]


def test_filters_keep_what_they_say() -> None:
    columns = {
        "width": np.array([64, 512, 300, 900]),
        "height": np.array([700, 512, 301, 100]),
        "hq": np.array([True, False, True, True]),
        "score.clip": np.array([30.0, 10.0, np.nan, 22.0], np.float32),
    }
    index = Columns(**columns)
    assert Filter().kept(index) is None
    assert Filter(min_side=64).kept(index) is None
    assert Filter(min_side=300).kept(index).tolist() == [1, 2]  # type: ignore[union-attr]
    assert Filter(scores={"clip": 22}).kept(index).tolist() == [0, 2, 3]  # type: ignore[union-attr]
    assert Filter(hq_only=True, min_side=100).kept(index).tolist() == [2, 3]  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="no sample has a score 'aesthetic'"):
        Filter(scores={"aesthetic": 5}).kept(index)


def test_streams_without_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        Stream([Cell(np.arange(0), Fraction(1))], 0)
    with pytest.raises(ValueError, match="samples are due"):
        Stream([Cell(np.arange(3), Fraction(0))], 0)
