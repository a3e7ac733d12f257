"""Linear maps of the latent folded into the weights: equal functions in float64, whitened moments."""

from __future__ import annotations

import pytest
import torch

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.autoencoder.fold import fold_shortcut, map_decoder, map_encoder, moments, whitening


def build(seed: int, **settings) -> DCAE:
    torch.manual_seed(seed)
    common = {"depths": (0, 1, 1), "widths": (8, 8, 16), "attention": (False, False, False)}
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in common.items()}
    return DCAE(channels=4, scale=0.5, **sides, **settings).double()


@pytest.mark.parametrize("seed", [0, 1])
def test_shortcuts_become_taps(seed: int) -> None:
    model = build(seed)
    folded = fold_shortcut(model)
    image = torch.rand(2, 3, 12, 20, dtype=torch.float64)
    torch.testing.assert_close(folded.encode(image), model.encode(image))
    torch.testing.assert_close(folded(image), model(image))
    assert folded.config["latent_shortcut"] is False


@pytest.mark.parametrize("seed", [0, 1])
def test_maps_change_coordinates_only(seed: int) -> None:
    model, image = build(seed, latent_shortcut=False), torch.rand(3, 3, 12, 20, dtype=torch.float64)
    z, restored = model.encode(image), model(image)
    matrix, shift = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    map_encoder(model, matrix, torch.zeros(4))
    map_decoder(model, torch.linalg.inv(matrix))
    torch.testing.assert_close(model.encode(image), torch.einsum("ij,bjhw->bihw", matrix, z))
    torch.testing.assert_close(model(image), restored)
    map_encoder(model, torch.eye(4), shift)
    want = torch.einsum("ij,bjhw->bihw", matrix, z) + shift[:, None, None]
    torch.testing.assert_close(model.encode(image), want)


@pytest.mark.parametrize("seed", [0, 1])
def test_whitening_gives_unit_covariance(seed: int) -> None:
    torch.manual_seed(seed)
    mixing = torch.randn(5, 5, dtype=torch.float64)
    latent = torch.einsum("ij,bjhw->bihw", mixing, torch.randn(7, 5, 3, 4, dtype=torch.float64)) + 2.0
    mean, covariance = moments(latent)
    rows = latent.movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, rows.mean(1))
    torch.testing.assert_close(covariance, torch.cov(rows, correction=0))
    matrix = whitening(covariance)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ covariance @ matrix.T, torch.eye(5, dtype=torch.float64))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no latent shortcut"):
        fold_shortcut(build(0, latent_shortcut=False))
    with pytest.raises(ValueError, match="fold_shortcut first"):
        map_encoder(build(0), torch.eye(4), torch.zeros(4))
    with pytest.raises(ValueError, match="every direction"):
        whitening(torch.diag(torch.tensor([1.0, 0.0])))
