"""The cache of latents: encoded once, keyed by what they depend on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sana.data.latents import build, cache_path, to_tensor


def test_latents_are_encoded_once_and_keyed_by_what_they_depend_on(tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    calls = []

    def encode(images):  # type: ignore[no-untyped-def]
        calls.append(len(images))
        return images.mean(1, keepdim=True)

    path = cache_path(tmp_path, "shards", "encoder", "float16")
    assert path != cache_path(tmp_path, "shards", "another encoder", "float16")
    first = build(path, lambda i: pictures[i], 5, encode, batch=2)
    assert calls == [2, 2, 1]
    again = build(path, lambda i: pictures[i], 5, encode, batch=2)
    assert calls == [2, 2, 1]
    expected = (pictures.astype(np.float64) / 127.5 - 1).mean(-1)[:, None]
    assert np.abs(np.asarray(first, np.float64) - expected).max() < 1e-3
    assert np.array_equal(first, again)
    with pytest.raises(ValueError, match="holds 5 latents, 6 expected"):
        build(path, lambda i: pictures[i], 6, encode)
    with pytest.raises(ValueError, match="not finite"):
        build(tmp_path / "other.npy", lambda i: pictures[i], 5, lambda x: x / 0)
    assert not list(tmp_path.glob(".*tmp"))


def test_pixels_span_minus_one_to_one() -> None:
    pixels = np.array([[[[0, 255, 51]]]], np.uint8)
    assert to_tensor(pixels).flatten().tolist() == pytest.approx([-1.0, 1.0, 51 / 127.5 - 1])


def test_samples_without_an_image_have_no_latent(tmp_path: Path) -> None:
    pictures = np.random.default_rng(1).integers(0, 256, (7, 8, 8, 3), dtype=np.uint8)
    missing = {0, 1, 4, 6}
    path = tmp_path / "latents.npy"
    found = build(path, lambda i: None if i in missing else pictures[i], 7, lambda x: x.mean(1, keepdim=True), batch=2)
    assert set(np.flatnonzero(np.isnan(found).all((1, 2, 3))).tolist()) == missing
    assert np.isfinite(found[[2, 3, 5]]).all()
    with pytest.raises(ValueError, match="no image can be read"):
        build(tmp_path / "none.npy", lambda i: None, 3, lambda x: x)
