"""The sampler that a config names: which velocities it asks for, and what a callback sees."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from sana.flow.grid import dpm_grid, uniform_grid
from sana.sampler.euler import euler
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler

NOISE = torch.randn(3, 2, 5, 7, generator=torch.Generator().manual_seed(0))
BASE = Sampler(flow_dpm, partial(dpm_grid, shift=3.0), steps=7, guidance=2.5)


def conditional(x, t):
    return torch.sin(x) + t.reshape(-1, 1, 1, 1)


def unconditional(x, t):
    return 0.5 * x


def perturbed(x, t):
    return torch.cos(x)


def pair(x, t):
    return conditional(x, t), unconditional(x, t)


def refuse(x, t):
    raise AssertionError("called in vain")


def test_pag_is_the_formula_in_every_step():
    def total(x, t):
        c, u, p = conditional(x, t), unconditional(x, t), perturbed(x, t)
        return u + 2.5 * (c - u) + 1.5 * (c - p)

    sampler = replace(BASE, pag_scale=1.5)
    want = flow_dpm(total, NOISE, dpm_grid(7, 3.0))
    torch.testing.assert_close(sampler(refuse, pair, NOISE, perturbed), want)


def test_pag_without_cfg_asks_for_two_velocities():
    sampler = replace(BASE, guidance=1.0, pag_scale=2.0)
    want = flow_dpm(lambda x, t: 3 * conditional(x, t) - 2 * perturbed(x, t), NOISE, dpm_grid(7, 3.0))
    torch.testing.assert_close(sampler(conditional, refuse, NOISE, perturbed), want)


@pytest.mark.parametrize("pag_scale", [0.0, 1.5])
def test_outside_of_the_interval_only_the_conditional_velocity_is_asked_for(pag_scale):
    sampler = replace(BASE, pag_scale=pag_scale, interval=(0.0, 0.0))
    want = flow_dpm(conditional, NOISE, dpm_grid(7, 3.0))
    torch.testing.assert_close(sampler(conditional, refuse, NOISE, refuse), want)
    low, high = 0.3, 0.8
    asked = []

    def watched(x, t):
        asked.append(float(t[0]))
        return pair(x, t)

    replace(sampler, interval=(low, high))(conditional, watched, NOISE, perturbed)
    times = [float(t) for t in dpm_grid(7, 3.0)[:-1]]
    assert asked == pytest.approx([t for t in times if low <= t <= high])


@pytest.mark.parametrize("solver", [euler, flow_dpm])
def test_a_callback_sees_every_step_and_changes_nothing(solver):
    sampler, seen = replace(BASE, solver=solver), []
    plain = sampler(refuse, pair, NOISE)
    assert torch.equal(sampler(refuse, pair, NOISE, on_step=seen.append), plain)
    assert [(step.index, step.steps) for step in seen] == [(k, 7) for k in range(7)]
    assert [step.t for step in seen] == pytest.approx([float(t) for t in dpm_grid(7, 3.0)[:-1]])
    torch.testing.assert_close(seen[-1].x0, plain)  # the last step goes to the predicted sample
    c, u = pair(NOISE, torch.full((3,), seen[0].t))
    torch.testing.assert_close(seen[0].x0, NOISE - seen[0].t * (u + 2.5 * (c - u)))


def test_the_state_is_solved_in_float32():
    dtypes = set()

    def watched(x, t):
        dtypes.add((x.dtype, t.dtype))
        return pair(x, t)

    out = Sampler(euler, uniform_grid, 3, 2.0)(refuse, watched, NOISE.bfloat16())
    assert out.dtype == torch.float32
    assert dtypes == {(torch.float32, torch.float32)}


def test_what_cannot_be_meant_is_refused():
    with pytest.raises(ValueError, match="pag_scale"):
        replace(BASE, pag_scale=-1.0)
    with pytest.raises(ValueError, match="pag_layers names no layer"):
        replace(BASE, pag_layers=[])
    with pytest.raises(ValueError, match="no perturbed velocity"):
        replace(BASE, pag_scale=1.0)(conditional, pair, NOISE)
