"""PSNR against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sana.metric.psnr import psnr


@pytest.mark.parametrize("seed", [0, 1])
def test_by_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-1.2, 1.2, (2, 3, 3, 5, 7))
    got = psnr(torch.from_numpy(x), torch.from_numpy(y))
    a, b = (np.clip(v, -1, 1) * 127.5 + 127.5 for v in (x, y))
    want = 10 * np.log10(255**2 / ((a - b) ** 2).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-5)


def test_limits() -> None:
    one = torch.ones(1, 3, 2, 2)
    assert psnr(one, one).item() == float("inf")
    assert psnr(one, -one).item() == 0.0
