"""The perceptual net of the scenes: trained for a moment to name what is in a picture, then frozen."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sana.data.synthetic import make_scene, render
from sana.encoder.perceptual import AttributeNet, train_attributes
from sana.scenes import COLORS, SHAPES

PAIRS = tuple((shape, color) for shape in SHAPES for color in COLORS)
COUNTS = (1, 2, 3, 4)
ATTRIBUTES = len(SHAPES) + len(COLORS) + len(PAIRS) + len(COUNTS)


def trained_on_scenes(steps: int, batch: int, seed: int) -> AttributeNet:
    """An `AttributeNet` fitted to fresh scenes; the same weights for the same arguments on one machine.

    Args:
        steps: optimizer steps.
        batch: scenes per step.
        seed: of the scenes and of the initial weights; the caller's random state is not touched.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = AttributeNet(ATTRIBUTES)
    train_attributes(net, labelled_scenes(steps, batch, seed))
    return net


def labelled_scenes(
    steps: int, batch: int, seed: int
) -> Iterator[tuple[Float[Tensor, "b 3 64 64"], Float[Tensor, "b k"]]]:
    """Batches of training scenes in [-1, 1] with their attributes: shapes, colours, coloured shapes, then the count."""
    for step in range(steps):
        scenes = [make_scene(seed, step * batch + i) for i in range(batch)]
        pixels = torch.from_numpy(np.stack([render(scene) for scene in scenes]))
        target = torch.zeros(batch, ATTRIBUTES)
        for row, scene in zip(target, scenes, strict=True):
            for o in scene.objects:
                row[SHAPES.index(o.shape)] = 1
                row[len(SHAPES) + tuple(COLORS).index(o.color)] = 1
                row[len(SHAPES) + len(COLORS) + PAIRS.index((o.shape, o.color))] = 1
            row[-len(COUNTS) + COUNTS.index(len(scene.objects))] = 1
        yield pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, target
