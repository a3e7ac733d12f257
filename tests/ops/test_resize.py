"""Resizing to cover and cropping: against diffusers where that keeps its promise, else by what is asked for."""

from __future__ import annotations

import pytest
import torch
from diffusers.image_processor import PixArtImageProcessor

from sana.ops.resize import resize_and_crop


def image(h: int, w: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, h, w, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("drawn", "asked"), [((20, 36), (40, 72)), ((20, 36), (40, 60)), ((36, 20), (45, 25))])
def test_enlarging_by_a_ratio_that_divides_is_as_in_diffusers(drawn: tuple[int, int], asked: tuple[int, int]) -> None:
    x = image(*drawn)
    want = PixArtImageProcessor.resize_and_crop_tensor(x, asked[1], asked[0])
    torch.testing.assert_close(resize_and_crop(x, *asked), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", range(40))
def test_the_size_is_always_the_one_that_was_asked_for(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    h, w, height, width = (int(n) for n in torch.randint(1, 80, (4,), generator=draw))
    y = resize_and_crop(image(h, w, seed), height, width)
    assert y.shape == (2, 3, height, width)
    assert y.abs().max() <= 1


def test_the_middle_is_kept() -> None:
    x = image(6, 9)
    assert torch.equal(resize_and_crop(x, 6, 9), x)
    assert torch.equal(resize_and_crop(x, 6, 5), x[..., 2:7]), "a side that fits is not resampled"
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    small = resize_and_crop(ramp, 8, 16)
    torch.testing.assert_close(small[0, 0, 0], ramp[0, 0, 0].reshape(16, 4).mean(1), rtol=0, atol=0.02)


def test_no_size_is_refused() -> None:
    with pytest.raises(ValueError, match="positive, got 0x5"):
        resize_and_crop(image(4, 4), 0, 5)
