from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from sana.optimizer.came import CAME
from sana.optimizer.came_8bit import CAME8bit, blocks_per_row, dequantise, quantise

LARGE = {"matrix": (130, 140), "1x1": (129, 131, 1, 1), "wide": (3, 5600)}


def rounded(m: torch.Tensor, block: int) -> torch.Tensor:
    """Rows cut into equal blocks, each rounded to 127 steps of its largest magnitude; in float64."""
    length = m.shape[1]
    width = math.ceil(length / math.ceil(length / block))
    parts = []
    for first in range(0, length, width):
        part = m[:, first : first + width]
        top = part.abs().amax(1, keepdim=True)
        parts.append(torch.where(top > 0, (part * 127 / top).round() * top / 127, torch.zeros_like(part)))
    return torch.cat(parts, 1)


def reference(weight, grads, lr, block, b=(0.9, 0.999, 0.9999), e=(1e-30, 1e-16)):
    """CAME's formulas in float64, with the momentum rounded between steps; the matrix of `u - m` uses it unrounded."""
    w = weight.double().flatten(1)
    m, r, c, rr, cc = torch.zeros_like(w), 0, 0, 0, 0
    for gradient in grads:
        g = gradient.double().flatten(1)
        s = g * g + e[0]
        r, c = b[1] * r + (1 - b[1]) * s.mean(1), b[1] * c + (1 - b[1]) * s.mean(0)
        u = g / ((r / r.mean())[:, None] * c).sqrt()
        u = u / max(1.0, u.square().mean().sqrt().item())
        m = b[0] * m + (1 - b[0]) * u
        s = (u - m) ** 2 + e[1]
        rr, cc = b[2] * rr + (1 - b[2]) * s.mean(1), b[2] * cc + (1 - b[2]) * s.mean(0)
        w = w - lr * m / ((rr / rr.mean())[:, None] * cc).sqrt()
        m = rounded(m, block)
    return w.reshape(weight.shape)


def draws(shape, steps, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g), [torch.randn(shape, generator=g) * 10.0**-k for k in range(steps)]


def run(weight, grads, **options):
    p = nn.Parameter(weight.clone())
    optimizer = CAME8bit([p], **options)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach(), optimizer


@pytest.mark.parametrize("block", [2048, 50])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", LARGE)
def test_updates_equal_the_formulas(name, seed, block):
    weight, grads = draws(LARGE[name], 5, seed)
    got, _ = run(weight, grads, lr=1e-3, block=block, min_size=10_000)
    expected = reference(weight, grads, 1e-3, block)
    # In float32 a momentum half way between two codes may go to the other one: 1/127 of a block's largest (some 0.4),
    # in few places, scaled up by the instability (up to 100 after the first updates) and carried on by beta1.
    wrong = (got.double() - expected).abs() > 2e-5
    assert wrong.float().mean() < 1e-3
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=3e-3)


@pytest.mark.parametrize("length", [1, 5, 6, 7, 12, 13])
@pytest.mark.parametrize("block", [1, 3, 6, 100])
def test_rounding(length, block):
    x = torch.randn(4, length, generator=torch.Generator().manual_seed(length))
    x[1] = 0
    x[2] = 1e-45  # its scale underflows
    codes = torch.full((4, length), 99, dtype=torch.int8)
    scale = torch.full((4, blocks_per_row(length, block)), torch.nan)
    quantise(x, codes, scale)
    back = dequantise(codes, scale)
    torch.testing.assert_close(back[[0, 3]], rounded(x.double(), block)[[0, 3]].float(), rtol=1e-5, atol=1e-7)
    assert torch.equal(back[1:3], torch.zeros(2, length)), "zero is exact, and nothing is divided by it"
    assert torch.isfinite(scale).all()
    # Half a step of the block's largest magnitude, at most.
    assert (back - x).abs().max() <= x.abs().max() / 127 / 2 * 1.001
    again_codes, again_scale = codes.clone(), scale.clone()
    quantise(back, again_codes, again_scale)
    assert torch.equal(again_codes, codes), "what is rounded stays as it is"


def test_one_large_element_spoils_its_block_only():
    x = torch.full((2, 4096), 1e-3)
    x[0, 0] = 1.0
    codes, scale = torch.zeros(2, 4096, dtype=torch.int8), torch.zeros(2, 2)
    quantise(x, codes, scale)
    back = dequantise(codes, scale)
    assert (back[0, 1:2048] == 0).all()
    torch.testing.assert_close(back[0, 2048:], x[0, 2048:])
    torch.testing.assert_close(back[1], x[1])


def test_state_takes_a_quarter():
    shapes = {"large": (512, 600), "small": (100, 100), "vector": (40_000,), "3x3": (300, 1, 9, 9)}
    params = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    optimizer = CAME8bit(params.values())
    for p in params.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, p in params.items():
        assert ("momentum_codes" in optimizer.state[p]) == (name == "large")
    size = {k: v.numel() * v.element_size() for k, v in optimizer.state[params["large"]].items()}
    assert size["momentum_codes"] == 512 * 600
    assert sum(size.values()) == 512 * 600 + 4 * 512 + 2 * 4 * (512 + 600)


def test_small_tensors_are_those_of_came():
    weight, grads = draws((20, 30), 4, 0)
    p = nn.Parameter(weight.clone())
    plain = CAME([p], lr=1e-2)
    for g in grads:
        p.grad = g.clone()
        plain.step()
    assert torch.equal(run(weight, grads, lr=1e-2)[0], p.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(dtype, tmp_path):
    weight, grads = draws((130, 140), 6, 0)
    p, optimizer = run(weight.to(dtype), [g.to(dtype) for g in grads[:3]], lr=1e-2)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    twin = nn.Parameter(p.clone())
    resumed = CAME8bit([twin], lr=1.0)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    state = resumed.state[twin]
    assert {name: value.dtype for name, value in state.items() if "momentum" in name} == {
        "momentum_codes": torch.int8, "momentum_scale": torch.float32
    }  # fmt: skip
    original = optimizer.param_groups[0]["params"][0]
    for g in grads[3:]:
        for parameter, each in ((original, optimizer), (twin, resumed)):
            parameter.grad = g.to(dtype)
            each.step()
    assert torch.equal(original, twin)
    for name, value in optimizer.state[original].items():
        assert torch.equal(value, state[name])


def test_tensors_updated_together_are_updated_as_alone():
    pairs = [draws((130, 140), 3, seed) for seed in range(3)]
    params = [nn.Parameter(w.clone()) for w, _ in pairs]
    optimizer = CAME8bit(params, lr=1e-2)
    for step in range(3):
        for p, (_, grads) in zip(params, pairs, strict=True):
            p.grad = grads[step].clone()
        optimizer.step()
    for p, (weight, grads) in zip(params, pairs, strict=True):
        torch.testing.assert_close(p.detach(), run(weight, grads, lr=1e-2)[0], rtol=1e-5, atol=1e-5)


def test_it_minimises_like_came():
    torch.manual_seed(0)
    target = torch.randn(130, 140)
    ends = {}
    for kind in (CAME, CAME8bit):
        p = nn.Parameter(torch.zeros(130, 140))
        optimizer = kind([p], lr=1e-2)
        for k in range(300):
            optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (k + 1) / 100) * (1 - k / 300)
            p.grad = 2 * (p.detach() - target)
            optimizer.step()
        ends[kind] = (p - target).square().mean().item()
    assert ends[CAME8bit] < 1.2 * ends[CAME] + 1e-4


@pytest.mark.parametrize("options", [{"block": 0}, {"min_size": -1}, {"lr": -1.0}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="got"):
        CAME8bit([nn.Parameter(torch.zeros(2, 2))], **options)
