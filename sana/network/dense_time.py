"""Another unit of time for a trained network, without training: the embedding of t from that of 1000 t.

A few-step student is differentiated by time, and a sinusoid of 1000 t has a thousandfold derivative (SANA-Sprint,
arXiv:2503.09641, section 3.2, which fine-tunes its teacher for 5,000 updates to change this). All that the network
knows of the time is a curve in the space of the embedding, which a small regression finds again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sana.nn.embed import TimeEmbedding, sinusoid

POINTS = 8192  # times at which the two embeddings are compared
WIDTH = 0.04  # half of the stretch of time in which a hidden unit is on, if there are units enough
HEIGHT = 2.0  # of a unit at its time
RIDGE = 1e-6  # of the regression, relative to the mean square of the hidden units


@torch.no_grad()
def densify(old: TimeEmbedding, new: TimeEmbedding, scale: float) -> float:
    """Make ``new(t)`` equal to ``old(scale t)`` for t in [0, 1] as nearly as it can be.

    Each hidden unit of `new` is on about a time of its own and off elsewhere; its last layer is the least-squares
    solution. So few units are on at any time, no larger than a trained one's, and an optimizer's step moves the
    embedding no further than the old one. What the curve of `old` does faster than a unit is wide is smoothed away.

    Args:
        old: trained on scale t.
        new: of the same width; overwritten.
        scale: the old unit, 1000 in SANA.

    Returns:
        Root mean square difference of the two embeddings, relative to the spread of the old one over time.
    """
    t = torch.linspace(0, 1, POINTS, dtype=torch.float64)
    target = _embed(old, scale * t)
    hidden = new.fc1.get_parameter("weight").shape[0]
    # The sinusoid's first cosine and sine are those of t itself: k (cos(t - knot) - 1) + HEIGHT is a hill with its top
    # at the knot, which SiLU cuts at its foot, 1.3 below zero, where SiLU is least.
    knots = torch.linspace(-0.1, 1.1, hidden, dtype=torch.float64)
    steep = (HEIGHT + 1.3) / (1 - math.cos(max(WIDTH, 7 / hidden)))
    weight = torch.zeros(hidden, new.frequencies, dtype=torch.float64)
    weight[:, 0], weight[:, new.frequencies // 2] = steep * knots.cos(), steep * knots.sin()
    bias = torch.full_like(knots, HEIGHT - steep)
    new.fc1.get_parameter("weight").copy_(weight)
    new.fc1.get_parameter("bias").copy_(bias)
    given = torch.nn.functional.silu(nn.functional.linear(sinusoid(t, new.frequencies), weight, bias))
    given = torch.cat([given, torch.ones(POINTS, 1, dtype=torch.float64)], dim=1)
    normal = given.mT @ given / POINTS
    normal += RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    solution = torch.linalg.solve(normal, given.mT @ target / POINTS)
    new.fc2.get_parameter("weight").copy_(solution[:-1].mT)
    new.fc2.get_parameter("bias").copy_(solution[-1])
    rest = (given @ solution - target).square().mean().sqrt()
    return float(rest / (target - target.mean(0)).square().mean().sqrt())


def _embed(embedding: TimeEmbedding, t: Tensor) -> Tensor:
    """The embedding in float64."""
    fc1, fc2 = embedding.fc1, embedding.fc2
    hidden = nn.functional.linear(
        sinusoid(t, embedding.frequencies), fc1.get_parameter("weight").double(), fc1.get_parameter("bias").double()
    )
    return nn.functional.linear(
        nn.functional.silu(hidden), fc2.get_parameter("weight").double(), fc2.get_parameter("bias").double()
    )
