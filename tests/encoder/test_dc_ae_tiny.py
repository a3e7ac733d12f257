"""The shipped tiny autoencoder: its bars on scenes that no training saw, and the latent that diffusion relies on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sana.data.synthetic import example
from sana.encoder.autoencoder.dc_ae import DCAE, load
from sana.encoder.autoencoder.fold import moments
from sana.metric.psnr import psnr
from sana.metric.scenes import oracle

WEIGHTS = Path(__file__).resolve().parents[2] / "experiments" / "dc_ae_tiny" / "dc_ae_tiny.safetensors"
COUNT = 192


@pytest.fixture(scope="module")
def model() -> DCAE:
    return load(WEIGHTS)


@pytest.fixture(scope="module")
def scenes() -> tuple[torch.Tensor, list[dict]]:
    rows = [example(8_000_000, i, held_out=i % 4 == 0) for i in range(COUNT)]
    pixels = torch.from_numpy(np.stack([row[0] for row in rows]))
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, [row[1] for row in rows]


def test_size_and_interface(model: DCAE) -> None:
    assert WEIGHTS.stat().st_size <= 2_000_000
    assert (model.channels, model.ratio, model.scale) == (8, 8, 1.0)
    assert not model.training


@torch.no_grad()
def test_reconstructions_show_the_prompt(model: DCAE, scenes: tuple[torch.Tensor, list[dict]]) -> None:
    image, metadata = scenes
    restored = torch.cat([model(part) for part in image.split(64)])
    assert psnr(image, restored).mean() >= 32
    pixels = ((restored.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    right = sum(oracle(picture, facts)[0] for picture, facts in zip(pixels, metadata, strict=True))
    assert right / COUNT >= 0.97


@torch.no_grad()
def test_latents_are_white_and_the_decoder_forgives(model: DCAE, scenes: tuple[torch.Tensor, list[dict]]) -> None:
    image, _ = scenes
    latent = model.encode(image)
    assert latent.shape == (COUNT, 8, 8, 8)
    mean, covariance = moments(latent)
    assert mean.abs().max() < 0.1
    torch.testing.assert_close(covariance, torch.eye(8).double(), atol=0.15, rtol=0)
    noise = 0.2 * torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    assert psnr(image, model.decode(latent + noise)).mean() >= 30
