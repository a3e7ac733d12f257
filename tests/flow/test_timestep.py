from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import special, stats

from sana.flow.timestep import LogitNormal, TrigLogNormal, Uniform, shift
from sana.ops.random import uniform


def test_shift_golden_values():
    assert shift(0.5, 3.0) == 0.75
    assert shift(0.5, 6.0) == pytest.approx(0.857142857142857, abs=1e-15)
    assert (shift(0.0, 3.0), shift(1.0, 3.0)) == (0.0, 1.0)


def test_shift_is_increasing_and_undone_by_its_inverse():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for s in (0.25, 1.0, 3.0, 6.0):
        assert (shift(t, s).diff() > 0).all()
        torch.testing.assert_close(shift(shift(t, s), 1 / s), t)


def test_shift_scales_the_signal_to_noise_ratio():
    """Its purpose: t / (1 - t) is multiplied by s, as a change of resolution does."""
    t = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    moved = shift(t, 3.0)
    torch.testing.assert_close(moved / (1 - moved), 3.0 * t / (1 - t))


@pytest.mark.parametrize(("mean", "std", "by"), [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.4, 1.3, 1.0), (0.2, 1.6, 6.0)])
def test_logit_normal_has_its_distribution(mean, std, by):
    u = uniform(0, torch.arange(40_000), "timestep")
    t = LogitNormal(mean, std, by)(u).double().numpy()
    before = t / (by - (by - 1) * t)
    assert stats.kstest(special.logit(before), stats.norm(mean, std).cdf).pvalue > 1e-3


@pytest.mark.parametrize("by", [1.0, 3.0])
def test_logit_normal_quantiles_are_exact(by):
    u = torch.tensor([0.5, 0.25, 0.975], dtype=torch.float64)
    n = torch.tensor([0.0, -0.6744897501960817, 1.959963984540054], dtype=torch.float64)
    plain = 1 / (1 + torch.exp(-(0.3 + 1.2 * n)))
    torch.testing.assert_close(LogitNormal(0.3, 1.2, by)(u), by * plain / (1 + (by - 1) * plain))


def test_discrete_logit_normal_is_the_published_table():
    """A table of 1000 shifted levels, indexed by floor(1000 sigmoid(n)), as the published training does."""
    n = np.random.default_rng(0).normal(size=5000)
    table = 1 - np.linspace(1.0, 0.001, 1000)
    table = 3.0 * table / (1 + 2.0 * table)
    expected = table[np.floor(1000 * special.expit(n)).astype(int)]
    t = LogitNormal(shift=3.0, steps=1000)(torch.tensor(special.ndtr(n)))
    np.testing.assert_allclose(t, expected, atol=1e-12)


@pytest.mark.parametrize("steps", [None, 1000, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("distribution", [LogitNormal, Uniform])
def test_all_of_the_unit_interval_maps_inside_it(distribution, dtype, steps):
    u = torch.tensor([0.0, 2.0**-24, 0.5, 1 - 2.0**-24], dtype=dtype)
    t = distribution(shift=3.0, steps=steps)(u)
    assert t.dtype == dtype
    assert t.shape == u.shape
    assert (t >= 0).all()
    assert (t <= 1).all()
    assert (t.diff() >= 0).all()
    if distribution is LogitNormal and steps is None:
        assert t[0] > 0


def test_uniform_is_the_shifted_input():
    u = uniform(0, torch.arange(20_000), "t", (2,))
    torch.testing.assert_close(Uniform()(u), u)
    torch.testing.assert_close(Uniform(shift=3.0)(u), 3 * u / (1 + 2 * u))
    levels = Uniform(steps=10)(u)
    assert levels.unique().tolist() == pytest.approx([k / 10 for k in range(10)])
    assert stats.chisquare(np.unique(levels.numpy(), return_counts=True)[1]).pvalue > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitNormal(std=0.0),
        lambda: LogitNormal(shift=0.0),
        lambda: LogitNormal(steps=0),
        lambda: Uniform(shift=-1.0),
        lambda: Uniform(steps=-5),
        lambda: shift(0.5, 0.0),
    ],
)
def test_values_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


@pytest.mark.parametrize(("mean", "std"), [(0.2, 1.6), (-0.6, 1.0)])
def test_trig_times_have_the_quantiles_of_their_law(mean: float, std: float) -> None:
    u = np.array([0.01, 0.2, 0.5, 0.77, 0.999])
    expected = np.arctan(np.exp(stats.norm.ppf(u, mean, std)) / 0.5)
    np.testing.assert_allclose(TrigLogNormal(mean, std)(torch.from_numpy(u)).numpy(), expected, rtol=1e-12)
    half = TrigLogNormal(mean, std, largest=0.5)(torch.from_numpy(np.concatenate([u / 2, [0.5, 0.75, 0.999]])))
    np.testing.assert_allclose(half[:5].numpy(), expected, rtol=1e-12)
    assert half[5:].tolist() == [1.5708] * 3
    assert TrigLogNormal(largest=1.0)(torch.rand(5)).tolist() == pytest.approx([1.5708] * 5)


def test_trig_times_refuse_what_is_no_law() -> None:
    for wrong in ({"std": 0.0}, {"sigma": -1.0}, {"largest": 1.5}):
        with pytest.raises(ValueError, match=r"positive|probability"):
            TrigLogNormal(**wrong)
