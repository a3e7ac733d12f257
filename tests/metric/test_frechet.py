"""The Frechet distance against scipy's matrix square root, closed forms and brute-force statistics."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from sana.metric.features import DIM, SCENE_FEATURES, scene_features
from sana.metric.frechet import (
    Frechet,
    Statistics,
    frechet_distance,
    gaussian_distance,
    jackknife_error,
    merged,
)


def stats(x) -> Statistics:
    x = torch.as_tensor(x)
    return Statistics(x.shape[1]).update(x)


def scipy_distance(x, y) -> float:
    """The textbook formula with the general matrix square root of scipy."""
    mean, cov = zip(*[(z.mean(0), np.cov(z, rowvar=False)) for z in (x, y)], strict=True)
    root = scipy.linalg.sqrtm(cov[0] @ cov[1])
    return float(np.sum((mean[0] - mean[1]) ** 2) + np.trace(cov[0]) + np.trace(cov[1]) - 2 * np.trace(root).real)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dim", [1, 3, 17, 64])
def test_equals_scipy_on_the_same_features(seed, dim):
    rng = np.random.default_rng(seed)
    mix_x, mix_y = rng.normal(size=(2, dim, dim))
    x = rng.normal(size=(3 * dim + 5, dim)) @ mix_x + rng.normal(size=dim)
    y = rng.normal(size=(4 * dim + 7, dim)) @ mix_y
    if dim == 1:
        expected = (x.mean() - y.mean()) ** 2 + (x.std(ddof=1) - y.std(ddof=1)) ** 2
    else:
        expected = scipy_distance(x, y)
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(stats(y), stats(x)) == pytest.approx(expected, rel=1e-6)


def test_closed_form_of_gaussians_with_commuting_covariances():
    """Same eigenvectors: |mu_1 - mu_2|^2 + sum (sqrt a - sqrt b)^2."""
    rng = np.random.default_rng(0)
    basis = torch.as_tensor(scipy.stats.ortho_group.rvs(9, random_state=0))
    a, b = (torch.as_tensor(rng.gamma(1.5, size=9)) for _ in range(2))
    mean_a, mean_b = (torch.as_tensor(rng.normal(size=9)) for _ in range(2))
    got = gaussian_distance(mean_a, basis @ a.diag() @ basis.T, mean_b, basis @ b.diag() @ basis.T)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert got == pytest.approx(float(expected), rel=1e-12)


def test_closed_form_of_large_samples_of_two_gaussians():
    rng = np.random.default_rng(4)
    scale_a, scale_b, shift = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5]), np.array([0.0, 1.0, -2.0])
    x = rng.normal(size=(200_000, 3)) * scale_a
    y = rng.normal(size=(200_000, 3)) * scale_b + shift
    expected = float((shift**2).sum() + ((scale_a - scale_b) ** 2).sum())
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(expected, rel=0.01)


def test_identical_sets_are_at_zero_even_when_rank_deficient():
    x = np.random.default_rng(1).normal(size=(400, 64))
    assert frechet_distance(stats(x), stats(x)) < 1e-9
    flat = x.copy()
    flat[:, 40:] = flat[:, :24] * 2  # only 40 independent directions
    assert frechet_distance(stats(flat), stats(flat)) < 1e-6
    other = np.random.default_rng(2).normal(size=(400, 64))
    assert frechet_distance(stats(flat), stats(other)) == pytest.approx(scipy_distance(flat, other), rel=1e-6)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_any_split_gives_the_same_statistics(offset):
    x = torch.as_tensor(np.random.default_rng(7).normal(size=(257, 13)) + offset)
    whole = stats(x)
    assert whole.mean.numpy() == pytest.approx(x.numpy().mean(0), rel=1e-12)
    assert np.abs(whole.covariance.numpy() - np.cov(x.numpy(), rowvar=False)).max() < 1e-10
    for sizes in ([1] * 257, [100, 100, 57], [0, 256, 1], [3, 5, 249]):
        split = Statistics(13)
        for part in x.split(sizes):
            split.update(part)
        assert split.n == 257
        assert (split.mean - whole.mean).abs().max() < 1e-10 * max(1.0, offset)
        assert (split.covariance - whole.covariance).abs().max() < 1e-10
    ranks = [stats(x[r::3]) for r in range(3)]
    assert (merged(ranks).covariance - whole.covariance).abs().max() < 1e-10
    other = stats(x * 1.1 + 0.3)
    one, three = frechet_distance(whole, other), frechet_distance(merged(ranks), other)
    assert three == pytest.approx(one, abs=1e-10 * max(1.0, one))


def test_float32_features_are_accumulated_in_float64():
    x = torch.as_tensor(np.random.default_rng(0).normal(size=(5000, 4)) + 1000, dtype=torch.float32)
    expected = np.cov(x.double().numpy(), rowvar=False)
    assert np.abs(stats(x).covariance.numpy() - expected).max() < 1e-10


def test_too_few_images_are_refused_unless_allowed():
    x = np.random.default_rng(0).normal(size=(9, 10))
    with pytest.raises(ValueError, match="9 images for 10 feature dimensions"):
        frechet_distance(stats(x), stats(x))
    assert frechet_distance(stats(x), stats(x), allow_small_n=True) < 1e-6


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"expected \(b, 3\)"):
        Statistics(3).update(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="not finite"):
        Statistics(1).update(torch.tensor([[float("nan")]]))
    with pytest.raises(ValueError, match="cannot merge"):
        Statistics(3).merge(Statistics(4))
    with pytest.raises(ValueError, match="4 feature dimensions on one side"):
        frechet_distance(Statistics(4), Statistics(3))
    with pytest.raises(ValueError, match="at least 2"):
        stats(np.ones((1, 2))).covariance  # noqa: B018


def test_jackknife_error_is_the_spread_over_repeated_draws():
    """The standard error from one draw against the standard deviation of the distance over 200 draws."""
    rng = np.random.default_rng(0)
    reference = stats(rng.normal(size=(50_000, 3)))

    def draw():
        return rng.normal(size=(600, 3)) * 1.3 + 0.4

    values, errors = [], []
    for _ in range(200):
        x = draw()
        values.append(frechet_distance(stats(x), reference))
        if len(errors) < 40:
            errors.append(jackknife_error([stats(x[i::20]) for i in range(20)], reference))
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def noise(n: int, seed: int, size: int = 16, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, size=(n, size, size, 3), dtype=np.uint8)


def blocks(n: int, seed: int) -> np.ndarray:
    """Images with structure: a coloured rectangle on grey."""
    rng = np.random.default_rng(seed)
    images = np.full((n, 24, 20, 3), 180, np.uint8)
    for image in images:
        y, x = rng.integers(0, 12, size=2)
        image[y : y + 8, x : x + 8] = rng.integers(0, 256, size=3)
    return images


def test_metric_on_images():
    reference = blocks(300, 0)
    metric = Frechet(scene_features, [reference[:100], reference[100:]], SCENE_FEATURES)
    same, other, far = (metric(x) for x in (reference, blocks(200, 1), np.repeat(blocks(150, 1), 2, 0) // 3))
    assert same["mean"] < 1e-6
    assert 0 < other["mean"] < far["mean"]
    assert other["interval"][0] <= other["mean"] <= other["interval"][1]
    assert other["interval"][1] > other["interval"][0]
    assert other["reference_halves"] is not None
    assert 0 < other["reference_halves"] < far["mean"]
    assert (other["n"], other["reference_n"], other["size"]) == (200, 300, [24, 20])
    assert other["feature_space"] == SCENE_FEATURES
    assert "not Inception" in SCENE_FEATURES
    by_features = frechet_distance(
        stats(scene_features(torch.as_tensor(blocks(200, 1)))),
        stats(scene_features(torch.as_tensor(reference))),
    )
    assert other["mean"] == pytest.approx(by_features, abs=1e-10)


def test_batch_size_and_order_of_reading_do_not_matter():
    reference, images = blocks(150, 0), blocks(130, 3)
    one = Frechet(scene_features, [reference], SCENE_FEATURES)(images)
    other = Frechet(scene_features, lambda: reference.reshape(10, 15, 24, 20, 3), SCENE_FEATURES, batch_size=7)(images)
    assert other["mean"] == pytest.approx(one["mean"], abs=1e-10)
    assert other["interval"] == pytest.approx(one["interval"], abs=1e-10)


def test_clusters_stay_together_in_the_jackknife():
    """Every image twice.

    With clusters the interval is as wide as for the images once, without it is narrower.
    """
    reference, images = blocks(400, 0), blocks(200, 3)
    metric = Frechet(scene_features, [reference], SCENE_FEATURES)
    twice = np.repeat(images, 2, 0)
    labels = np.repeat(np.arange(200), 2).tolist()
    width = [np.ptp(r["interval"]) for r in (metric(images), metric(twice, (), labels), metric(twice))]
    assert width[1] == pytest.approx(width[0], rel=0.05)
    assert width[2] < 0.9 * width[1]


def test_metric_refuses_what_does_not_compare():
    with pytest.raises(ValueError, match="compare sets of one size"):
        Frechet(scene_features, [blocks(100, 0)], SCENE_FEATURES)(noise(100, 0))
    with pytest.raises(ValueError, match=f"50 images for {DIM} feature dimensions"):
        Frechet(scene_features, [blocks(100, 0)], SCENE_FEATURES)(blocks(50, 1))
    assert Frechet(scene_features, [blocks(20, 0)], "", allow_small_n=True)(blocks(5, 1))["reference_halves"] is None
    with pytest.raises(ValueError, match="no images"):
        Frechet(scene_features, [], SCENE_FEATURES)(blocks(50, 1))
    with pytest.raises(ValueError, match="expected uint8"):
        Frechet(scene_features, [blocks(100, 0) / 255], SCENE_FEATURES)(blocks(50, 1))
    with pytest.raises(ValueError, match="parts is 1"):
        Frechet(scene_features, [], SCENE_FEATURES, parts=1)


def test_scene_features_are_per_image_and_mean_what_they_say():
    images = torch.as_tensor(noise(11, 0, size=19))
    features = scene_features(images)
    assert features.shape == (11, DIM)
    assert features.dtype == torch.float64
    assert (features - torch.cat([scene_features(x[None]) for x in images])).abs().max() < 1e-14

    grey = torch.full((1, 16, 16, 3), 51, dtype=torch.uint8)
    flat = scene_features(grey)[0]
    assert flat[:48].numpy() == pytest.approx(np.full(48, 0.2))
    assert flat[48:80].abs().max() == 0
    assert flat[80].item() == pytest.approx(0.8**3)
    assert flat[80:88].sum().item() == pytest.approx(1)
    assert flat[88].item() == pytest.approx(1)

    stripes = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    stripes[:, :, 8:] = 255  # one vertical edge: horizontal gradient, angle 0, bin 0 of each quadrant
    angle = scene_features(stripes)[0, 48:80].view(4, 8)
    assert (angle[:, 0] > 0.1).all()
    assert angle[:, 1:].abs().max() < 1e-12
    turned = scene_features(stripes.transpose(1, 2).contiguous())[0, 48:80].view(4, 8)
    assert (turned[:, 4] > 0.1).all()
    assert turned[:, 4].sum() == pytest.approx(turned.sum().item())

    red = torch.zeros(1, 16, 16, 3, dtype=torch.uint8)
    red[:, :4, :4, 0] = 255
    assert scene_features(red)[0, :48].nonzero().flatten().tolist() == [0]
    with pytest.raises(ValueError, match="at least 8"):
        scene_features(torch.zeros(1, 4, 16, 3, dtype=torch.uint8))


def test_small_eigenvalues_keep_their_digits():
    """Features of trained networks have variances over many orders; oracle: singular values, which square nothing."""
    torch.manual_seed(0)
    d = 200
    spread = torch.arange(1, d + 1, dtype=torch.float64) ** -2.0
    basis, turn = (torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0] for _ in range(2))
    x, y = (torch.randn(2000, d, dtype=torch.float64) * spread for _ in range(2))
    a, b = stats(x @ basis), stats(1.01 * y @ (torch.eye(d, dtype=torch.float64) + 0.05 * turn) @ basis)
    roots = [torch.linalg.cholesky(s.covariance) for s in (a, b)]
    trace = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    expected = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-10)
