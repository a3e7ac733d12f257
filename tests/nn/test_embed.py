"""Embeddings against convolutions, diffusers' tables and numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import PatchEmbed as DiffusersPatchEmbed
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from sana.nn.embed import (
    FinalLayer,
    GuidanceEmbedding,
    PatchEmbed,
    SinCos2d,
    TextEmbedding,
    TimeEmbedding,
    sinusoid,
)
from sana.types import Grid


@pytest.mark.parametrize("patch", [1, 2, 3])
def test_patch_embed_is_a_strided_convolution_of_each_frame(patch):
    torch.manual_seed(patch)
    embed = PatchEmbed(3, 8, patch).double()
    x = torch.randn(2, 3, 4, 2 * patch, 5 * patch, dtype=torch.float64)
    frames = x.transpose(1, 2).flatten(0, 1)
    want = F.conv2d(frames, embed.linear.weight.view(8, 3, patch, patch), embed.linear.bias, stride=patch)
    want = want.flatten(2).mT.reshape(2, 4 * 10, 8)
    torch.testing.assert_close(embed(x), want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("patch", [1, 2])
def test_final_layer_places_every_pixel(patch):
    torch.manual_seed(patch)
    grid, d, c = Grid(2, 3, 5), 8, 3
    final = FinalLayer(d, c, patch).double()
    torch.nn.init.normal_(final.table)
    x, time = torch.randn(2, grid.tokens, d).double(), torch.randn(2, grid.f, d).double()
    got = final(x, time, grid)
    assert got.shape == (2, c, 2, 3 * patch, 5 * patch)
    for b, f, row, column in [(0, 0, 0, 0), (1, 1, 2, 3), (0, 1, 3 * patch - 1, 5 * patch - 1)]:
        token = x[b, (f * 3 + row // patch) * 5 + column // patch]
        token = (token - token.mean()) / (token.var(correction=0) + 1e-6).sqrt()
        shift, scale = final.table + time[b, f]
        written = final.linear.weight @ (token * (1 + scale) + shift) + final.linear.bias
        pixel = written.view(patch, patch, c)[row % patch, column % patch]
        torch.testing.assert_close(got[b, :, f, row, column], pixel, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(5, 7), (7, 5), (8, 8), (1, 9)])
@pytest.mark.parametrize("interpolation", [1.0, 2.0])
def test_positions_equal_diffusers_and_the_formula(h, w, interpolation):
    base, d = 8, 24
    table = SinCos2d(d, base, interpolation)(Grid(3, h, w), "cpu", torch.float64)
    theirs = get_2d_sincos_pos_embed(d, (h, w), base_size=base, interpolation_scale=interpolation)
    if h == w:  # for other shapes its reshape of the mesh only suits the class below
        torch.testing.assert_close(table, theirs.double(), rtol=1e-6, atol=1e-6)
    omega = 10000.0 ** (-np.arange(d // 4) / (d / 4))
    for row, column in [(0, 0), (h - 1, 0), (0, w - 1), (h - 1, w - 1), (h // 2, w // 2)]:
        x, y = column / (w / base) / interpolation, row / (h / base) / interpolation
        want = np.concatenate([np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)])
        np.testing.assert_allclose(table[row * w + column].numpy(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("h", "w"), [(5, 7), (3, 9), (8, 8)])
def test_positions_equal_those_diffusers_adds(h, w):
    embed = DiffusersPatchEmbed(8, 8, patch_size=1, in_channels=2, embed_dim=16, interpolation_scale=1.0)
    torch.nn.init.zeros_(embed.proj.weight)
    torch.nn.init.zeros_(embed.proj.bias)
    theirs = embed(torch.zeros(1, 2, h, w))[0]
    ours = SinCos2d(16, 8)(Grid(1, h, w), "cpu", torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_positions_need_four_parts():
    with pytest.raises(ValueError, match="width 10 is not a multiple of 4"):
        SinCos2d(10, 8)


def test_sinusoid_is_cosines_then_sines():
    t = torch.tensor([[0.0, 3.7], [999.0, 0.25]])
    got = sinusoid(t, 8)
    assert got.dtype == torch.float32
    for index in np.ndindex(2, 2):
        angle = [t[index].item() * 10000 ** (-k / 4) for k in range(4)]
        want = [math.cos(a) for a in angle] + [math.sin(a) for a in angle]
        np.testing.assert_allclose(got[index].numpy(), want, rtol=1e-4, atol=1e-4)
    exact = sinusoid(t.double(), 8)
    assert exact.dtype == torch.float64
    np.testing.assert_allclose(exact[1, 0, 0].item(), math.cos(999.0), rtol=1e-12)


def test_time_embedding_ignores_autocast():
    """In bf16, t and t + 1/1024 near 1 have the same sinusoid; the embedding must tell them apart."""
    torch.manual_seed(0)
    embed = TimeEmbedding(16)
    t = torch.tensor([[0.9, 0.9 + 1 / 4096]])
    with torch.autocast("cpu", torch.bfloat16):
        got = embed(t, torch.float32)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, embed(t, torch.float32), rtol=0, atol=0)
    assert (got[0, 0] != got[0, 1]).all()


def test_guidance_embedding_scales_its_input():
    torch.manual_seed(0)
    guidance, time = GuidanceEmbedding(16, scale=0.1).double(), TimeEmbedding(16).double()
    time.load_state_dict(guidance.state_dict())
    w = torch.tensor([4.0, 4.5]).double()
    torch.testing.assert_close(guidance(w, torch.float64), time(w * 0.1, torch.float64))


@pytest.mark.parametrize("norm", [None, 0.01])
def test_text_embedding_written_out(norm):
    torch.manual_seed(0)
    embed = TextEmbedding(5, 8, norm).double()
    text = torch.randn(2, 3, 5, dtype=torch.float64)
    y = text @ embed.fc1.weight.T + embed.fc1.bias
    y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    y = y @ embed.fc2.weight.T + embed.fc2.bias
    if norm is not None:
        y = y / (y.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * norm
    torch.testing.assert_close(embed(text), y, rtol=1e-6, atol=1e-8)
