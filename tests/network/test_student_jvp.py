"""Forward derivatives through a whole student on the circle, as the consistency loss takes them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from sana.flow.trig import trig_field
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.embed import SinCos2d
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition


def student(every: int = 0, keep: str = "input") -> Sana:
    """Everything that a student of the scenes has, at odd sizes, with weights away from their start."""
    torch.manual_seed(0)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=12, qk_norm=True),
        cross=partial(CrossAttention, heads=3, qk_norm=True),
        ffn=MixFFN,
    )
    network = Sana(
        5, 36, 3, 10, [block], patch=2, text_norm=0.5, time_scale=1.0, guidance_embed=True,
        position=partial(SinCos2d, base=8), checkpoint_every=every, checkpoint_keep=keep,  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network.double()


def inputs(seed: int) -> tuple[Condition, Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=g, dtype=torch.float64)
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    guidance = torch.tensor([4.0, 5.0], dtype=torch.float64)
    tau = torch.tensor([[0.3], [1.4]], dtype=torch.float64)
    scale = (tau.cos() * tau.sin()).view(2, 1, 1, 1, 1)
    return (
        Condition(draw(2, 7, 10), mask, guidance),
        draw(2, 5, 1, 6, 10),
        tau,
        scale * draw(2, 5, 1, 6, 10),
        tau.cos() * tau.sin(),
    )


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


def derivative(network: Sana, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    condition, *rest = inputs(seed)
    narrow = Condition(condition.text.to(dtype), condition.mask, condition.guidance.to(dtype))  # type: ignore[union-attr]
    x, tau, dx, dtau = (part.to(dtype) for part in rest)
    field = trig_field(lambda x, t: network(x, t, narrow))
    return torch.func.jvp(field, (x, tau), (dx, dtau))[1]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("every", "keep"), [(0, "input"), (1, "input"), (2, "products")])
def test_equals_central_differences(seed: int, every: int, keep: str) -> None:
    """In float64 within 1e-6; with recomputed blocks too, whether or not gradients are recorded around it."""
    condition, x, tau, dx, dtau = inputs(seed)
    network, h = student(), 1e-5
    with torch.no_grad():
        field = trig_field(lambda x, t: network(x, t, condition))
        central = (field(x + h * dx, tau + h * dtau) - field(x - h * dx, tau - h * dtau)) / (2 * h)
    found = derivative(student(every, keep), seed)
    assert relative(found, central) < 1e-6
    with torch.no_grad():
        torch.testing.assert_close(derivative(student(every, keep), seed), found, rtol=0, atol=1e-13)


@pytest.mark.parametrize("seed", [0, 1])
def test_in_fp32_and_under_autocast(seed: int) -> None:
    exact = derivative(student(), seed)
    narrow = student().float()
    assert relative(derivative(narrow, seed, torch.float32), exact) < 1e-3
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(derivative(narrow, seed, torch.float32), exact) < 0.1


def test_nothing_is_switched_for_the_process() -> None:
    before = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.is_grad_enabled()]
    derivative(student(), 0)
    after = [torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.is_grad_enabled()]
    assert before == after
