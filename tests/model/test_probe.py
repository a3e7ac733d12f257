"""A probe asks every network at the points that the first one met."""

from __future__ import annotations

import copy

import torch

from sana.model.load import bare_painter, load_weights
from sana.model.probe import Probe
from sana.run.build import build
from sana.run.restore import restore
from sana.run.saved import prepare
from sana.sampler.guided import Sampler


def test_outputs_are_compared_at_the_same_points() -> None:
    composed = prepare("sample", ["ckpt=scenes", "prompt=x", "device=cpu", "precision=32-true"])
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    painter, node = bare_painter(restored.module, restored.device), composed.config.sampler
    sampler = Sampler(build(node.solver, "solver"), build(node.grid, "grid"), 3, 2.0)
    network = restored.module.network
    probe = Probe(painter, sampler, ["a ring", "two stars", "a red circle"], [0, 1, 2], 64, batch=2)
    first = probe(network)
    assert first.shape == (3 * 2 * 3 * 8 * 8 * 8,)  # steps, guided pairs, prompts, latents
    assert torch.equal(probe(network), first)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.final.linear.weight.mul_(2)
        other.final.linear.bias.mul_(2)
    # Had it followed its own outputs, those of the later steps would be those of another drawing.
    torch.testing.assert_close(probe(other), 2 * first)
    assert not network._forward_hooks
    assert not network._forward_pre_hooks
    assert painter.network is network
