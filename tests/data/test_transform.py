"""Resize and crop against torchvision's, which the published code uses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional as F

from sana.data.bucket import published
from sana.data.transform import resize_and_crop, scaled_size


def by_torchvision(pixels: np.ndarray, height: int, width: int, lanczos: bool) -> np.ndarray:
    size = scaled_size(*pixels.shape[:2], height, width)
    mode = F.InterpolationMode.LANCZOS if lanczos else F.InterpolationMode.BICUBIC
    image = F.resize(Image.fromarray(pixels), list(size), mode)
    return np.asarray(F.center_crop(image, [height, width]))  # type: ignore[arg-type]


@pytest.mark.parametrize("lanczos", [False, True])
@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((97, 131), (64, 64)),
        ((131, 97), (64, 96)),
        ((33, 20), (64, 64)),
        ((200, 50), (32, 64)),
        ((64, 100), (64, 64)),
        ((1, 1), (5, 3)),
        ((3, 400), (7, 2)),
        ((901, 1203), (64, 96)),
    ],
)
def test_equals_torchvision(size: tuple[int, int], to: tuple[int, int], lanczos: bool) -> None:
    """On noise, the hardest case: Lanczos exactly, bicubic but for roundings."""
    pixels = np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8)
    pixels.flags.writeable = False
    ours, theirs = resize_and_crop(pixels, *to, lanczos=lanczos), by_torchvision(pixels, *to, lanczos)
    assert ours.shape == theirs.shape == (*to, 3)
    assert ours.dtype == np.uint8
    off = np.abs(ours.astype(int) - theirs)
    assert off.max() <= (0 if lanczos else 2)
    assert (off > 0).mean() <= (0 if lanczos else 0.02)


def test_the_scaled_size_covers_and_is_never_short() -> None:
    """Exact integers; the published rule in floating point is one short for some of these, and never longer."""
    rng, short = np.random.default_rng(1), 0
    for height, width in rng.integers(1, 4000, (400, 2)).tolist():
        for to_height, to_width in published(1024).sizes:
            h, w = scaled_size(height, width, to_height, to_width)
            assert h >= to_height
            assert w >= to_width
            assert h == to_height or w == to_width
            if to_height / height > to_width / width:
                theirs = to_height, int(width * (to_height / height))
            else:
                theirs = int(height * (to_width / width)), to_width
            short += theirs != (h, w)
            assert h - 1 <= theirs[0] <= h
            assert w - 1 <= theirs[1] <= w
    assert short > 0


def test_the_right_size_is_not_touched() -> None:
    pixels = np.arange(105, dtype=np.uint8).reshape(5, 7, 3)
    assert np.array_equal(resize_and_crop(pixels, 5, 7), pixels)
