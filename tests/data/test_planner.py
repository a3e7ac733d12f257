"""The plan of global batches: closed forms, and properties over random buckets, mixtures and stops."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sana.data.planner import Planner, plan

Case = tuple[list[np.ndarray], list[np.ndarray] | None, list[float] | None]


@st.composite
def cases(draw: st.DrawFn, weighted: bool = True) -> Case:
    """Sources of unique samples, their buckets, and weights or none."""
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    ids = np.arange(sum(sizes))
    sources = [part.copy() for part in np.split(ids, np.cumsum(sizes)[:-1])]
    kinds = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    # Any imbalance: bucket 0 is common, the last is rare.
    buckets = [np.minimum(rng.geometric(0.5, n) - 1, kinds - 1) for n in sizes] if kinds else None
    weights = None
    if weighted and draw(st.booleans()):
        weights = draw(st.lists(st.sampled_from([0.1, 0.3, 1.0, 2.5]), min_size=len(sizes), max_size=len(sizes)))
    return sources, buckets, weights


def walk(planner: Planner, first: int, steps: int) -> list[tuple[int, list[int]]]:
    position = planner.start(first)
    found = []
    for _ in range(steps):
        bucket, samples = planner.at(position)
        found.append((bucket, samples.tolist()))
        position += planner.batch
    return found


@settings(deadline=None, max_examples=50)
@given(case=cases(), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_step_has_one_bucket_and_a_whole_batch_of_it(case: Case, batch: int, seed: int) -> None:
    sources, buckets, weights = case
    of = dict(zip(np.concatenate(sources).tolist(), np.concatenate(buckets).tolist(), strict=True)) if buckets else {}
    for bucket, samples in walk(plan(sources, buckets, batch, seed, weights=weights), 0, 30):
        assert len(samples) == batch
        assert all(of.get(sample, 0) == bucket for sample in samples)


@settings(deadline=None, max_examples=50)
@given(case=cases(weighted=False), batch=st.integers(1, 9), seed=st.integers(0, 99), epochs=st.integers(1, 4))
def test_each_sample_once_per_epoch_and_remainders_open_the_next(
    case: Case, batch: int, seed: int, epochs: int
) -> None:
    """After e epochs every sample came e times, but for the fewer than B of each bucket that wait for the next."""
    sources, buckets, _ = case
    planner = plan(sources, buckets, batch, seed)
    samples = np.concatenate(sources)
    of = np.concatenate(buckets) if buckets else np.zeros(len(samples), int)
    steps = sum(epochs * int((of == bucket).sum()) // batch for bucket in range(6))
    if buckets and len(np.unique(of)) > 1:
        assert planner.before(epochs) == steps
    seen = Counter(sample for _, batch_ in walk(planner, 0, steps) for sample in batch_)
    for bucket in np.unique(of).tolist():
        members = samples[of == bucket]
        waiting = epochs * len(members) % batch
        counts = np.array([seen[sample] for sample in members.tolist()])
        assert counts.sum() == epochs * len(members) - waiting
        # Of a bucket smaller than the batch several epochs may wait.
        assert counts.max() <= epochs
        assert counts.min() >= epochs - -(-waiting // len(members))


@settings(deadline=None, max_examples=50)
@given(case=cases(), batch=st.integers(1, 9), seed=st.integers(0, 99), stop=st.integers(0, 200))
def test_a_stop_at_any_step_goes_on_with_the_next_batch(case: Case, batch: int, seed: int, stop: int) -> None:
    sources, buckets, weights = case
    whole = walk(plan(sources, buckets, batch, seed, weights=weights), 0, stop + 10)
    again = walk(plan(sources, buckets, batch, seed, weights=weights), stop * batch, 10)
    assert again == whole[stop:]


@settings(deadline=None, max_examples=50)
@given(case=cases(), batch=st.integers(1, 9), weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3))
def test_weights_are_met_to_one_sample_per_bucket(case: Case, batch: int, weights: list[float]) -> None:
    sources, _, _ = case
    planner = plan(sources, None, batch, 0, weights=weights[: len(sources)])
    stream = planner.streams[0]
    total, sums = sum(map(len, sources)), sum(weights[: len(sources)])
    dealt = stream.take(0, stream.before(50)) if stream.before(50) else np.array([], int)
    for weight, source in zip(weights, sources, strict=False):
        assert abs(np.isin(dealt, source).sum() - 50 * total * weight / sums) <= 1


def test_one_bucket_is_the_order_without_buckets() -> None:
    """And that is Philox of (seed, epoch), cut into batches across the ends of epochs."""
    samples = np.arange(23)
    expected = np.concatenate(
        [np.random.Generator(np.random.Philox(key=[7, epoch])).permutation(23) for epoch in range(4)]
    )
    for buckets in (None, [np.zeros(23, int)], [np.full(23, 4)]):
        planner = plan([samples], buckets, 5, 7)
        found = [sample for _, batch in walk(planner, 0, 18) for sample in batch]
        assert found == expected[:90].tolist()
        # A batch may begin anywhere: the batch size of a run without buckets can change.
        assert planner.at(planner.start(13)).samples.tolist() == expected[13:18].tolist()


def test_a_bucket_of_one_sample_comes_every_batch_of_epochs() -> None:
    """41 samples, 40 of bucket 0: in 4 epochs 4 * 40 / 4 steps of bucket 0 and one of the lone sample."""
    planner = plan([np.arange(41)], [np.array([0] * 40 + [1])], 4, 0)
    found = walk(planner, 0, 41)
    assert Counter(bucket for bucket, _ in found) == {0: 40, 1: 1}
    assert planner.before(4) == 41


def test_bucket_steps_are_mixed_and_differ_between_epochs() -> None:
    planner = plan([np.arange(800)], [np.arange(800) % 2], 4, 0)
    orders = [[bucket for bucket, _ in walk(planner, 800 * epoch, 200)] for epoch in range(2)]
    assert orders[0] != orders[1]
    for order in orders:
        assert sum(order) == 100
        changes = sum(a != b for a, b in pairwise(order))
        assert 70 < changes < 130  # of a fair coin: 99.5, deviation 7


def test_far_positions_cost_nothing() -> None:
    planner = plan([np.arange(1000)], [np.arange(1000) % 3], 7, 0)
    bucket, samples = planner.at(7 * 10**12)
    assert (samples % 3 == bucket).all()


def test_refusals() -> None:
    samples = [np.arange(3), np.arange(3, 5)]
    for weights in ([1.0], [0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="weights: expected 2"):
            plan(samples, None, 2, 0, weights=weights)
    with pytest.raises(ValueError, match="no sample is left"):
        plan([np.arange(0)], None, 2, 0)
    with pytest.raises(ValueError, match="without samples"):
        plan([np.arange(3), np.arange(0)], None, 2, 0, weights=[1, 1])
    with pytest.raises(ValueError, match="lies within a batch"):
        plan([np.arange(9)], [np.arange(9) % 2], 2, 0).at(3)
