from __future__ import annotations

import pytest
import torch

from sana.flow.grid import dpm_grid
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guidance import cfg, pag


def conditional(x, t):
    return 2 * x + 1


def pair(x, t):
    return conditional(x, t), -x


def refuse(x, t):
    raise AssertionError("called in vain")


X = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
T = torch.tensor([0.1, 0.5, 1.0])


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 4.5])
def test_cfg_extrapolates(scale):
    expected = -X + scale * ((2 * X + 1) + X)
    torch.testing.assert_close(cfg(pair, scale)(X, T), expected)


def test_outside_of_the_interval_the_conditional_velocity_is_used():
    v = cfg(pair, 3.0, (0.2, 0.7))(X, T)
    assert torch.equal(v[[0, 2]], conditional(X, T)[[0, 2]])
    torch.testing.assert_close(v[1], (-X + 3 * (3 * X + 1))[1])
    # Its ends belong to the interval.
    assert torch.equal(cfg(pair, 3.0, (0.5, 1.0))(X, T)[1:], cfg(pair, 3.0)(X, T)[1:])


def test_the_unconditional_velocity_is_not_computed_in_vain():
    outside = torch.tensor([0.1, 0.9, 1.0])
    assert torch.equal(cfg(refuse, 3.0, (0.2, 0.7), conditional)(X, outside), conditional(X, outside))
    assert torch.equal(cfg(refuse, 1.0, (0.0, 1.0), conditional)(X, T), conditional(X, T))
    with pytest.raises(AssertionError, match="in vain"):
        cfg(refuse, 3.0, (0.2, 0.7), conditional)(X, T)
    # And the conditional one is not computed twice.
    torch.testing.assert_close(cfg(pair, 3.0, (0.2, 0.7), refuse)(X, T), cfg(pair, 3.0, (0.2, 0.7))(X, T))


def test_guiding_the_velocity_equals_guiding_the_noise_as_published():
    """n = x + (1 - t) v is guided, then x0 = (x - t n) / (1 - t)."""
    x, t = X.double(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64).reshape(3, 1, 1, 1)
    c, u = ((x + (1 - t) * v) for v in pair(x, t))
    n = u + 4.5 * (c - u)
    v = cfg(pair, 4.5)(x, t.flatten())
    torch.testing.assert_close(x - t * v, (x - t * n) / (1 - t))


def test_guided_sampling_moves_a_gaussian_mean_by_the_closed_form():
    """Equal spreads, means m and 0: the guided field is that of the mean scale * m."""
    std, mean, scale = 0.5, 1.0, 3.0

    def field(m):
        def velocity(x, t):
            t = t[:, None]
            return -m + (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2) * (x - (1 - t) * m)

        return velocity

    noise = torch.randn(100, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    guided = cfg(lambda x, t: (field(mean)(x, t), field(0.0)(x, t)), scale)
    grid = dpm_grid(20, 3.0)
    torch.testing.assert_close(flow_dpm(guided, noise, grid), flow_dpm(field(scale * mean), noise, grid))


@pytest.mark.parametrize("interval", [(-0.1, 0.5), (0.6, 0.5), (0.0, 1.2)])
def test_impossible_intervals_are_refused(interval):
    with pytest.raises(ValueError, match="interval"):
        cfg(pair, 2.0, interval)


@pytest.mark.parametrize(("scale", "pag_scale"), [(4.5, 2.0), (1.0, 3.0), (5.0, 0.0)])
def test_pag_adds_the_difference_from_the_perturbed_branch(scale, pag_scale):
    c, u, p = torch.randn(3, 3, 2, 5, 7, dtype=torch.float64)
    expected = u + scale * (c - u) + pag_scale * (c - p)
    torch.testing.assert_close(pag(lambda x, t: (c, u, p), scale, pag_scale)(X, T), expected)


def test_pag_without_cfg_needs_no_unconditional_branch():
    c, p = torch.randn(2, 3, 2, 5, 7)
    torch.testing.assert_close(pag(lambda x, t: (c, None, p), 1.0, 2.0)(X, T), c + 2 * (c - p))
    with pytest.raises(ValueError, match="unconditional"):
        pag(lambda x, t: (c, None, p), 4.5, 2.0)(X, T)
