"""Muon against torch.optim.Muon, torch.optim.AdamW and the singular value decomposition."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from sana.optimizer.muon import Muon, orthogonalise


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 96, 33), (1, 33, 96)])
def test_singular_values_become_about_one_and_directions_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    u, s, v = torch.linalg.svd(orthogonalise(x).double(), full_matrices=False)
    assert s.max() < 1.3
    assert s.median() > 0.65
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    ideal = left @ right
    cosine = (u @ v * ideal).sum((1, 2)) / ideal.square().sum((1, 2))
    assert (cosine > 0.98).all()
    assert not orthogonalise(torch.zeros(1, 40, 40)).any()


class Both(nn.Module):
    """Two matrices of one shape, one of another, and what is no matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b, self.c = nn.Linear(48, 40), nn.Linear(48, 40), nn.Linear(40, 64)
        self.table, self.kernel = nn.Parameter(torch.randn(6, 64)), nn.Parameter(torch.randn(64, 1, 3, 3))

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(torch.tanh(self.a(x)) + self.b(x))
        return (y * self.table.sum(0) + self.kernel.sum((1, 2, 3))).square().mean()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_steps_equal_torch(decay: float) -> None:
    ours, theirs = Both(), Both()
    optimizer = Muon(ours.parameters(), lr=0.01, weight_decay=decay)
    matrices = [m.weight for m in (theirs.a, theirs.b, theirs.c)]
    rest = [p for p in theirs.parameters() if all(p is not m for m in matrices)]
    muon = torch.optim.Muon(matrices, lr=0.01, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=decay)
    for step in range(6):
        x = torch.randn(32, 48, generator=torch.Generator().manual_seed(step))
        for model, optimizers in ((ours, [optimizer]), (theirs, [muon, adamw])):
            model.zero_grad()
            model.loss(x).backward()
            for each in optimizers:
                each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        # Both orthogonalise in bfloat16; a batched product may round its last bit otherwise.
        assert torch.allclose(p, q, rtol=2e-3, atol=1e-3), name


def test_state_resumes_bit_for_bit() -> None:
    def run(model: Both, optimizer: Muon, steps: range) -> None:
        for step in steps:
            model.zero_grad()
            model.loss(torch.randn(8, 48, generator=torch.Generator().manual_seed(step))).backward()
            optimizer.step()

    straight, first = Both(), Both()
    run(straight, Muon(straight.parameters(), lr=0.02), range(8))
    optimizer = Muon(first.parameters(), lr=0.02)
    run(first, optimizer, range(4))
    second = copy.deepcopy(first)
    resumed = Muon(second.parameters(), lr=0.02)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(second, resumed, range(4, 8))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), second.parameters(), strict=True))


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="momentum 1"):
        Muon(Both().parameters(), momentum=1.0)
