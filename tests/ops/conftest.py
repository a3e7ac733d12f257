"""Where kernels are tested, and memory that shows what they left unwritten."""

from __future__ import annotations

import pytest
import torch

from sana.ops import buffer, choice


@pytest.fixture(autouse=True)
def exact_convolutions(monkeypatch) -> None:
    """On a card, plain convolutions of fp32 are in fp32: with TF32 they err more than kernels may."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """A card with compiled kernels where there is one, else the CPU with interpreted ones."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def nan_buffers(monkeypatch) -> list[torch.Tensor]:
    """Everything that kernels are given to write holds NaN before; the list of what they were given."""
    given: list[torch.Tensor] = []

    def allocate(*shape, **options):
        given.append(torch.full(*shape, float("nan"), **options))
        return given[-1]

    monkeypatch.setattr(buffer, "_allocate", allocate)
    return given


@pytest.fixture
def triton_kernels():
    """Ops go to their Triton kernels or raise."""
    before = choice.chosen()
    choice.set_kernels("triton")
    yield
    choice.set_kernels(before)
