"""Tables of sizes, and the nearest of them, against a search over all."""

from __future__ import annotations

import numpy as np
import pytest

from sana.aspect_ratio import RATIOS_1024
from sana.data.bucket import Buckets, by_area, published, square


def by_search(buckets: Buckets, height: int, width: int) -> int:
    distances = [abs(ratio - height / width) for ratio in buckets.ratios]
    return distances.index(min(distances))


@pytest.mark.parametrize("size", [512, 1024, 2048, 4096])
def test_the_published_tables(size: int) -> None:
    table = published(size)
    assert len(table) == 40
    assert table.sizes[0] == (size // 2, 2 * size)
    assert table.sizes[list(table.ratios).index(1.0)] == (size, size)
    assert all(h % 32 == 0 and w % 32 == 0 for h, w in table.sizes)
    assert table.lanczos == (size in (2048, 4096))


@pytest.mark.parametrize("table", [published(1024), by_area(1024**2, 32), by_area(65536, 32, 0.4, 3.0), square(64)])
def test_the_nearest_is_that_of_a_search(table: Buckets) -> None:
    rng = np.random.default_rng(0)
    heights, widths = rng.integers(1, 5000, 3000), rng.integers(1, 5000, 3000)
    found = table.nearest(heights, widths)
    assert found.tolist() == [by_search(table, h, w) for h, w in zip(heights.tolist(), widths.tolist(), strict=True)]


def test_ties_go_to_the_first_of_the_table() -> None:
    for ratios in ([0.5, 1.5], [1.5, 0.5]):
        assert Buckets([(1, 1), (1, 1)], ratios).nearest(np.array([7]), np.array([7])).tolist() == [0]


def test_published_sizes_choose_themselves() -> None:
    """All but those whose rounded ratios lie nearer to a neighbour: none."""
    heights, widths = np.array(list(RATIOS_1024.values())).T
    assert published(1024).nearest(heights, widths).tolist() == list(range(40))


@pytest.mark.parametrize(
    ("area", "step", "low", "high"), [(1024**2, 32, 0.25, 4.0), (256**2, 32, 0.5, 2.0), (9, 3, 1, 1)]
)
def test_own_tables(area: int, step: int, low: float, high: float) -> None:
    table = by_area(area, step, low, high)
    assert list(table.ratios) == sorted(set(table.ratios))
    for (height, width), ratio in zip(table.sizes, table.ratios, strict=True):
        assert height % step == width % step == 0
        assert ratio == height / width
        assert low <= ratio <= high
        # Half a step to the side from the exact area at most.
        assert abs(height * width - area) <= max(height, width) * step / 2
    side = int(area**0.5)
    assert (side, side) in table.sizes
    if low == 1 / high:
        assert {(w, h) for h, w in table.sizes} == set(table.sizes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="only for 512, 1024, 2048, 4096"):
        published(256)
    with pytest.raises(ValueError, match="no size of 100 pixels"):
        by_area(100, 64, 0.3, 0.4)
    with pytest.raises(ValueError, match="positive"):
        by_area(0, 32)
    with pytest.raises(ValueError, match="2 sizes and 1 ratios"):
        Buckets([(1, 1), (2, 2)], [1.0])
