"""Sizes by aspect ratio against diffusers' tables and its choice."""

from __future__ import annotations

import random

import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import ASPECT_RATIO_512_BIN, ASPECT_RATIO_1024_BIN
from diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma import ASPECT_RATIO_2048_BIN
from diffusers.pipelines.sana.pipeline_sana import ASPECT_RATIO_4096_BIN

from sana.aspect_ratio import RATIOS_1024, nearest_bin, sampling_bins

THEIRS = {
    512: ASPECT_RATIO_512_BIN,
    1024: ASPECT_RATIO_1024_BIN,
    2048: ASPECT_RATIO_2048_BIN,
    4096: ASPECT_RATIO_4096_BIN,
}


@pytest.mark.parametrize("size", THEIRS)
def test_bins_are_those_of_diffusers(size: int) -> None:
    bins = sampling_bins(size)
    assert bins == {float(k): (int(h), int(w)) for k, (h, w) in THEIRS[size].items()}
    assert len(bins) == (33 if size <= 1024 else 40)
    assert all(h % 32 == w % 32 == 0 for h, w in bins.values())


def test_forty_bins_for_training() -> None:
    assert len(RATIOS_1024) == 40
    assert all(abs(h / w - float(key)) < 0.025 for key, (h, w) in RATIOS_1024.items())


@pytest.mark.parametrize("size", THEIRS)
def test_the_nearest_bin_is_that_of_diffusers(size: int) -> None:
    draw = random.Random(size)
    requests = [(draw.randint(1, 5000), draw.randint(1, 5000)) for _ in range(300)]
    for height, width in [*requests, (1080, 1920), (1920, 1080), (size, size), (1, 5000)]:
        want = PixArtImageProcessor.classify_height_width_bin(height, width, THEIRS[size])
        assert nearest_bin(height, width, size) == want


def test_other_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="none are published for 768 px"):
        sampling_bins(768)
    with pytest.raises(ValueError, match="positive, got 0x5"):
        nearest_bin(0, 5, 512)
