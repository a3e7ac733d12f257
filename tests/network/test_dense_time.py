"""Another unit of time: a trained curve found again, and its derivative."""

from __future__ import annotations

import math

import pytest
import torch

from sana.network.dense_time import densify
from sana.nn.embed import TimeEmbedding, sinusoid


def curve(width: int, seed: int) -> TimeEmbedding:
    """An embedding of 1000 t that is smooth in t: only slow frequencies are read, as trained ones do."""
    torch.manual_seed(seed)
    old = TimeEmbedding(width)
    slow = sinusoid(torch.tensor(1.0), 256)  # cosines first: those of low frequency are near 1
    with torch.no_grad():
        old.fc1.weight.mul_((slow[:128] > math.cos(5e-3)).float().repeat(2))
    return old


@pytest.mark.parametrize("seed", [0, 1])
def test_the_curve_is_found_again(seed: int) -> None:
    old, new = curve(48, seed), TimeEmbedding(48)
    assert densify(old, new, 1000.0) < 2e-3
    t = torch.linspace(0.01, 0.99, 333)
    expected, found = old(1000 * t, torch.float32), new(t, torch.float32)
    assert ((found - expected).norm() / (expected - expected.mean(0)).norm()).item() < 5e-3
    # ... and how fast it is run through, against central differences of the old one in float64
    wide, h = old.double(), 1e-4
    slope = torch.func.jvp(lambda t: new(t, torch.float32), (t,), (torch.ones_like(t),))[1]
    central = (wide(1000 * (t + h).double(), torch.float64) - wide(1000 * (t - h).double(), torch.float64)) / (2 * h)
    assert ((slope - central).norm() / central.norm()).item() < 0.1


def test_what_is_too_fast_is_smoothed() -> None:
    torch.manual_seed(0)
    old, new = TimeEmbedding(32), TimeEmbedding(32)
    rest = densify(old, new, 1000.0)
    assert 0.01 < rest < 1.5
    t, one = torch.linspace(0.1, 0.9, 100), torch.ones(100)
    fast = torch.func.jvp(lambda t: old(1000 * t, torch.float32), (t,), (one,))[1].norm()
    slow = torch.func.jvp(lambda t: new(t, torch.float32), (t,), (one,))[1].norm()
    assert slow < 0.2 * fast


def test_a_step_of_an_optimizer_moves_the_curve_little() -> None:
    """What a change of sign(gradient) times rate moves: the sum of the hidden units' sizes, some 80 in a fresh layer of
    160 and 2,000 where every unit is a ramp over half of the times."""
    old, new = curve(160, 0), TimeEmbedding(160)
    densify(old, new, 1000.0)
    hidden = torch.nn.functional.silu(new.fc1(sinusoid(torch.linspace(0, 1, 999), new.frequencies)))
    assert hidden.abs().sum(-1).max() < 40
