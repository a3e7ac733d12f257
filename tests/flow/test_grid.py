from __future__ import annotations

import pytest
import torch

from sana.flow.grid import dpm_grid, euler_grid, uniform_grid

DPM_3 = """.99967 .98242 .96394 .94409 .92272 .89964 .87464 .84746 .81781 .78534 .74962 .71015 .66630 .61728
.56215 .49967 .42827 .34589 .24979 .13624 0"""
DPM_6 = """.99983 .99113 .98164 .97124 .95981 .94717 .93313 .91743 .89977 .87977 .85690 .83051 .79973 .76336
.71971 .66637 .59970 .51399 .39973 .23981 0"""
LEVELS_3 = "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 428 345 249 136"


@pytest.mark.parametrize(("shift", "golden"), [(3.0, DPM_3), (6.0, DPM_6)])
def test_dpm_grid_equals_the_published_numbers(shift, golden):
    expected = torch.tensor([float(x) for x in golden.split()], dtype=torch.float64)
    torch.testing.assert_close(dpm_grid(20, shift), expected, rtol=0, atol=5.1e-6)


def test_dpm_grid_truncates_to_the_published_integer_levels():
    assert (1000 * dpm_grid(20, 3.0)[:-1]).long().tolist() == [int(x) for x in LEVELS_3.split()]


def test_euler_grid_equals_the_published_numbers():
    grid = euler_grid(28, 3.0)
    assert grid[[0, 1, -4, -3, -2, -1]].tolist() == pytest.approx([1, 0.9874, 0.1998, 0.1109, 0.0089, 0], abs=5.1e-5)


@pytest.mark.parametrize(("steps", "shift"), [(20, 3.0), (20, 6.0), (14, 1.0), (5, 4.0)])
def test_dpm_grid_equals_diffusers(steps, shift):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(dpm_grid(steps, shift), scheduler.sigmas.double(), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("steps", "shift"), [(28, 3.0), (28, 6.0), (7, 1.0), (2, 3.0)])
def test_euler_grid_equals_diffusers(steps, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(euler_grid(steps, shift), scheduler.sigmas.double(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("grid", [dpm_grid, euler_grid, uniform_grid])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_grid_decreases_from_noise_to_exactly_zero(grid, steps, shift):
    times = grid(steps, shift)
    assert times.shape == (steps + 1,)
    assert times.dtype == torch.float64
    assert (times.diff() < 0).all()
    assert times[-1] == 0
    assert 0.999 <= times[0] <= 1


def test_uniform_grid_shifts_once():
    torch.testing.assert_close(uniform_grid(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0], dtype=torch.float64))


@pytest.mark.parametrize("grid", [dpm_grid, euler_grid, uniform_grid])
@pytest.mark.parametrize("bad", [(0, 3.0), (-2, 3.0), (4, 0.0), (4, -1.0)])
def test_impossible_grids_are_refused(grid, bad):
    with pytest.raises(ValueError, match="got"):
        grid(*bad)
