"""SSIM and LPIPS against torchmetrics and the lpips package; pairs of folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from sana.metric.lpips import LPIPS
from sana.metric.pairs import Pairs
from sana.metric.psnr import psnr
from sana.metric.ssim import ssim


def pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(*shape, generator=generator) * 2 - 1
    return x, (x + 0.3 * torch.randn(*shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("seed", [0, 1])
def test_ssim_equals_torchmetrics(seed):
    from torchmetrics.functional.image import structural_similarity_index_measure

    x, y = pair(seed, 3, 3, 31, 44)
    _, maps = structural_similarity_index_measure(
        (y + 1) / 2, (x + 1) / 2, sigma=1.5, data_range=1.0, reduction="none", return_full_image=True
    )
    # torchmetrics also averages places whose window is padded by reflection; Wang's own program does not.
    theirs = maps[..., 5:-5, 5:-5].flatten(1).mean(1)
    assert ssim(x, y).numpy() == pytest.approx(theirs.numpy(), abs=2e-5)
    assert ssim(x, x).numpy() == pytest.approx(np.ones(3))
    with pytest.raises(ValueError, match="the window needs 11"):
        ssim(x[..., :9], y[..., :9])


@pytest.mark.slow
def test_lpips_equals_the_package():
    import lpips

    ours = LPIPS("random:0", "random:1")
    theirs = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).eval()
    states = iter(ours.layers.state_dict().values())
    with torch.no_grad():
        for parameter in theirs.net.parameters():
            parameter.copy_(next(states))
        for i, weight in enumerate(ours.weights):
            getattr(theirs, f"lin{i}").model[1].weight.copy_(weight)
        x, y = pair(0, 2, 3, 45, 64)
        expected = theirs(x, y).flatten()
    assert expected.min() > 0.01
    assert ours(x, y).numpy() == pytest.approx(expected.numpy(), rel=1e-5)
    assert ours(x, x).abs().max() == 0
    assert "random:1" in ours.settings["linear"]


def test_pairs_of_folders(tmp_path):
    rng = np.random.default_rng(0)
    originals = [rng.integers(0, 256, size=(20 + i, 17, 3), dtype=np.uint8) for i in range(4)]
    noisy = [np.clip(x.astype(int) + rng.integers(-9, 10, size=x.shape), 0, 255).astype(np.uint8) for x in originals]
    for i, x in enumerate(originals):
        Image.fromarray(x).save(tmp_path / f"{i}.png")
    figure = Pairs(psnr, tmp_path)(noisy)
    squared = [np.square(a.astype(float) - b).mean() for a, b in zip(noisy, originals, strict=True)]
    assert figure["mean"] == pytest.approx(np.mean([10 * np.log10(255**2 / s) for s in squared]), rel=1e-5)
    assert figure["n"] == 4
    one = Pairs(psnr, tmp_path)([originals[0], *noisy[1:]])
    assert (one["n"], one["settings"]["equal_to_original"]) == (3, 1)
    for images, message in (
        (noisy[:3], "3 images and 4 originals"),
        (originals, "equal their originals"),
        (noisy[::-1], "image 0 is"),
    ):
        with pytest.raises(ValueError, match=message):
            Pairs(psnr, tmp_path)(images)
    with pytest.raises(ValueError, match="give reference=FOLDER"):
        Pairs(psnr)(noisy)
