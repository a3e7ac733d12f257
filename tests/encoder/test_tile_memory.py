"""The memory plan of the published autoencoder: at 4096 px on tensors without data, at 768 and 1024 px against what a
fresh process takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.encoder.autoencoder.dc_ae import DCAE

GIB = 2**30
LITE = {
    "decoder_depths": (0, 3, 5, 4, 4, 4),
    "decoder_attention": (False,) * 6,
    "decoder_shuffle": True,
    "silu_output": True,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, LITE], ids=["f32c32", "lite"])
def test_4096_px_fit_into_6_gib(dtype: torch.dtype, settings: dict) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode():
            model = DCAE(**settings).requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    with next(model.parameters()).fake_mode:  # type: ignore[attr-defined]
        z, image = torch.empty(1, 32, 128, 128, dtype=dtype), torch.empty(1, 3, 4096, 4096, dtype=dtype)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    full = model.plan("decode", z).bytes
    # The last stage alone, at full resolution: a map before it, one within, one after.
    assert full - weights > 3 * 4096**2 * (128 if not settings else 64) * dtype.itemsize
    model.limit_memory(6.0)
    for part, x in (("decode", z), ("encode", image)):
        plan = model.plan(part, x)  # type: ignore[arg-type]
        assert weights < plan.bytes <= 6 * GIB
        assert all(
            segment.tile is None or segment.tile * 4096 // segment.sizes[-1][0] >= 256 for segment in plan.segments
        )


@pytest.mark.long
def test_more_memory_means_larger_tiles() -> None:
    with FakeTensorMode():
        model = DCAE().requires_grad_(False)
        z = torch.empty(1, 32, 64, 64)
    last = []
    for budget in (2.0, 3.0, 5.0, 40.0):
        model.limit_memory(budget)
        plan = model.plan("decode", z)
        assert plan.bytes <= budget * GIB
        last.append(plan.segments[-1].tile or 2048)
    assert last == sorted(last)
    assert len(set(last)) >= 3
    model.limit_memory(1.3)
    with pytest.raises(ValueError, match=r"1\.3 GiB are too little: at least 1\.\d+ GiB are needed, 1\.16 of them"):
        model.decode(z)


MEASURE = """
import json, sys
import torch
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.allocator import DRAWING, keep_pages
from sana.run.environment import peak_rss_gib

SMALL = {"channels": 4, "encoder_widths": (8, 8), "encoder_depths": (1, 1), "encoder_attention": (False, False)}
SMALL |= {"decoder_widths": (8, 8), "decoder_depths": (1, 1), "decoder_attention": (False, False)}
px, budget, path = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3]
keep_pages(DRAWING)  # as sample.py does
with torch.no_grad():
    torch.nn.Conv2d(8, 8, 3)(torch.zeros(1, 8, 64, 64))  # what the library sets up once
    DCAE(**SMALL, max_memory_gib=1.0).requires_grad_(False).plan("decode", torch.zeros(1, 4, 2, 2))
    before = peak_rss_gib()
    torch.manual_seed(0)
    model = DCAE(max_memory_gib=budget or None).requires_grad_(False)
    z = torch.randn(1, 32, px // 32, px // 32, generator=torch.Generator().manual_seed(1))
    plan = model.plan("decode", z)
    image = model.decode(z)
    peak = peak_rss_gib() - before
torch.save(image, path)
tiled = any(segment.tile for segment in plan.segments)
print(json.dumps({"peak": peak, "plan": plan.bytes / 2**30, "tiled": tiled}))
"""


def decode_in_child(px: int, budget: float, path: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(px), str(budget), str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is counted differently elsewhere")
@pytest.mark.parametrize(("px", "budget"), [(768, 2.0), (1024, 2.5)])
def test_full_size_decoding_stays_within_the_plan(tmp_path: Path, px: int, budget: float) -> None:
    whole = decode_in_child(px, 40.0, tmp_path / "whole.pt")
    tiled = decode_in_child(px, budget, tmp_path / "tiled.pt")
    assert tiled["tiled"]
    assert not whole["tiled"]
    assert tiled["plan"] <= budget < whole["plan"]
    for found in (whole, tiled):
        assert abs(found["peak"] / found["plan"] - 1) < 0.03, found
    assert tiled["peak"] <= budget, tiled
    want, got = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "tiled.pt"))
    assert ((got - want).abs().max() / want.abs().max()).item() < 1e-4
