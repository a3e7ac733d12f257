from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from sana.ops.random import normal, philox, spread, uniform

WORD = 0xFFFFFFFF


def philox_scalar(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python integers, written from the paper's figure rather than from the tensor code."""
    left, right = (counter[1], counter[3]), (counter[0], counter[2])
    for i in range(10):
        bumped = [(k + i * w) % 2**32 for k, w in zip(key, (0x9E3779B9, 0xBB67AE85), strict=True)]
        (high0, low0), (high1, low1) = (
            divmod(0xD2511F53 * right[0], 2**32),
            divmod(0xCD9E8D57 * right[1], 2**32),
        )
        right = (high1 ^ left[0] ^ bumped[0], high0 ^ left[1] ^ bumped[1])
        left = (low1, low0)
    return right[0], left[0], right[1], left[1]


def words(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    return tuple(int(w) for w in philox((c0, c1, c2, c3), (key[0], key[1])))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((WORD,) * 4, (WORD,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    assert words(counter, key) == expected
    assert philox_scalar(counter, key) == expected


def test_philox_equals_python_integers_at_random_and_extreme_words():
    rng = np.random.default_rng(0)
    extreme = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
    for _ in range(60):
        draw = [int(rng.choice(extreme)) if rng.random() < 0.4 else int(rng.integers(2**32)) for _ in range(6)]
        assert words(tuple(draw[:4]), tuple(draw[4:])) == philox_scalar(tuple(draw[:4]), tuple(draw[4:]))


def test_philox_broadcasts_its_counter_words():
    a, b, c = torch.arange(3)[:, None], torch.arange(5)[None] + 2**31, torch.tensor([[WORD]])
    got = torch.stack(philox((a, b, c, a), (1, 2)), -1)
    for i in range(3):
        for j in range(5):
            assert tuple(got[i, j].tolist()) == philox_scalar((i, 2**31 + j, WORD, i), (1, 2))


@pytest.mark.parametrize("draw", [uniform, normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 4)])
def test_a_sample_draws_the_same_whatever_its_batch(draw, shape):
    index = torch.tensor([5, 0, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 17])
    whole = draw(3, index, "noise", shape)
    assert whole.shape == (7, *shape)
    assert whole.dtype == torch.float32
    order = torch.tensor([6, 2, 4, 0, 1, 5, 3])
    assert torch.equal(draw(3, index[order], "noise", shape), whole[order])
    assert torch.equal(torch.cat([draw(3, part, "noise", shape) for part in index.split([1, 4, 2])]), whole)


@pytest.mark.parametrize("draw", [uniform, normal])
def test_a_shape_only_folds_the_stream(draw):
    index = torch.arange(4)
    long = draw(0, index, "noise", (101,))
    assert torch.equal(draw(0, index, "noise", (5, 3)), long[:, :15].reshape(4, 5, 3))
    assert torch.equal(draw(0, index, "noise"), long[:, 0])
    assert draw(0, index, "noise", (0, 3)).shape == (4, 0, 3)
    assert draw(0, index[:0], "noise", (3,)).shape == (0, 3)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"seed": -1},
        {"seed": 2**40},
        {"purpose": "flip"},
        {"purpose": "noise "},
        {"index": torch.arange(64, 128)},
        {"index": torch.arange(64) + 2**32},
    ],
    ids=str,
)
def test_seed_purpose_and_index_each_change_everything(other):
    base = {"seed": 0, "index": torch.arange(64), "purpose": "noise"}
    x = normal(**base, shape=(500,)).flatten()
    y = normal(**{**base, **other}, shape=(500,)).flatten()
    n = x.numel()
    assert abs(np.corrcoef(x, y)[0, 1]) < 4 / n**0.5
    # Independence beyond correlation: the squares, and the joint distribution over quartiles.
    assert abs(np.corrcoef(x**2, y**2)[0, 1]) < 4 / n**0.5
    cells = np.histogram2d(x, y, bins=[stats.norm.ppf([0, 0.25, 0.5, 0.75, 1])] * 2)[0]
    assert stats.chisquare(cells.ravel()).pvalue > 1e-4


def test_neighbouring_elements_and_samples_are_uncorrelated():
    x = normal(1, torch.arange(300), "noise", (300,)).double()
    for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1]), (x[:, 2:], x[:, :-2]), (x[:, 4:], x[:, :-4])):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 4 / a.numel() ** 0.5


@pytest.mark.parametrize("seed", [0, 1, 123456789012])
def test_uniform_is_uniform(seed):
    u = uniform(seed, torch.arange(1000), "u", (200,))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u.flatten().double(), "uniform").pvalue > 1e-3
    # One number per sample, the common use, runs over indices instead of over the stream.
    assert stats.kstest(uniform(seed, torch.arange(50_000), "u").double(), "uniform").pvalue > 1e-3
    # All 24 bits are fair coins.
    bits = (u.flatten().double() * 2**24).long()[:, None] >> torch.arange(24) & 1
    assert ((bits.double().mean(0) - 0.5).abs() < 4.5 * 0.5 / len(bits) ** 0.5).all()


@pytest.mark.parametrize("seed", [0, 1, 123456789012])
def test_normal_is_normal_to_its_tails(seed):
    x = normal(seed, torch.arange(1000), "n", (1000,)).flatten().double()
    assert stats.kstest(x, "norm").pvalue > 1e-3
    n = len(x)
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - expected) < 4.5 * (variance / n) ** 0.5
    for threshold in (3.0, 4.0, 4.5):
        count, mean = int((x.abs() > threshold).sum()), n * 2 * stats.norm.sf(threshold)
        assert 1e-4 < stats.poisson.cdf(count, mean) < 1 - 1e-4 or count == round(mean)


def test_box_muller_is_finite_at_extreme_words():
    from sana.ops.random import _box_muller

    radius, angle = torch.meshgrid(
        torch.tensor([0, 1, 2**31, WORD - 1, WORD]),
        torch.tensor([0, 1, 2**30, 2**31, 2**32 - 1]),
        indexing="ij",
    )
    for z in _box_muller(radius, angle):
        assert torch.isfinite(z).all()
        assert z.abs().max() < 6.67
    z0, z1 = _box_muller(radius, angle)
    expected = -2 * np.log((radius.numpy() + 1.0) / 2**32)
    np.testing.assert_allclose(z0.double() ** 2 + z1.double() ** 2, expected, rtol=1e-6)


def test_spread_is_uniform_over_seeds_and_even_over_indices():
    over_seeds = torch.cat([spread(seed, torch.tensor([7]), "t") for seed in range(4000)])
    assert stats.kstest(over_seeds.double(), "uniform").pvalue > 1e-3
    for seed, first in ((0, 0), (5, 12_345), (9, 2**33 + 1)):
        for n in (8, 64, 257):
            u = spread(seed, torch.arange(first, first + n), "t").double().sort().values
            discrepancy = (u - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
            # Independent numbers would have about 0.87 / sqrt(n): 14 / n at n = 257.
            assert discrepancy < 3.0 / n, (seed, n, discrepancy * n)
    index = torch.tensor([4, 9, 2**35, 1])
    assert torch.equal(spread(1, index, "t").flip(0), spread(1, index.flip(0), "t"))
    assert not torch.equal(spread(1, index, "t"), spread(2, index, "t"))
    assert not torch.equal(spread(1, index, "t"), spread(1, index, "u"))


def test_spread_makes_the_mean_of_a_batch_less_noisy():
    index = torch.arange(32)
    means = {draw: torch.stack([draw(seed, index, "t").mean() for seed in range(200)]) for draw in (uniform, spread)}
    assert means[spread].std() < 0.35 * means[uniform].std()


@pytest.mark.parametrize("draw", [uniform, normal, spread])
def test_an_index_that_is_not_int64_is_refused(draw):
    with pytest.raises(ValueError, match="int64"):
        draw(0, torch.arange(3, dtype=torch.int32), "t")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_draws_the_same_numbers():
    index = torch.tensor([0, 5, 2**32 + 3, 2**40])
    assert torch.equal(uniform(3, index.cuda(), "u", (1001,)).cpu(), uniform(3, index, "u", (1001,)))
    assert torch.equal(spread(3, index.cuda(), "u").cpu(), spread(3, index, "u"))
    torch.testing.assert_close(
        normal(3, index.cuda(), "u", (100_001,)).cpu(),
        normal(3, index, "u", (100_001,)),
        rtol=2e-7,
        atol=1e-7,
    )
