"""AdamW with 8-bit states, as the recipe builds it, against torch's AdamW."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

from sana.run.build import build
from sana.run.compose import compose

pytest.importorskip("torchao.optim")


@torch.compiler.set_stance("force_eager")  # compiling its step takes a minute
def test_it_follows_adamw_and_resumes() -> None:
    line = ["optimizer=adamw_8bit", "optimizer.lr.lr=1e-3", "data.batch_size=256", "optimizer.weight_decay=0.1"]
    make = build(compose("train", line).config.optimizer, "optimizer")
    torch.manual_seed(0)
    ours = nn.Parameter(torch.randn(64, 128))
    theirs = nn.Parameter(ours.detach().clone())
    optimizer, plain = make([ours]), torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.1)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(1e-3)
    for _ in range(5):
        gradient = torch.randn(64, 128)
        for p, each in ((ours, optimizer), (theirs, plain)):
            p.grad = gradient.clone()
            each.step()
    # Five updates of 1e-3; 8-bit moments change an update by a few per cent.
    assert (ours - theirs).abs().max() < 2e-3
    assert (ours - theirs).square().mean().sqrt() < 2e-4
    twin = nn.Parameter(ours.detach().clone())
    resumed = make([twin])
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    for p, each in ((ours, optimizer), (twin, resumed)):
        p.grad = torch.ones(64, 128)
        each.step()
    assert torch.equal(ours, twin)
