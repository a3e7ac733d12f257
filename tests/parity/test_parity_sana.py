"""The trunk against diffusers' SanaTransformer2DModel with the same random weights: outputs and input gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import SanaTransformer2DModel

from sana.checkpoint.diffusers import sana_from_diffusers, sana_to_diffusers
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.embed import SinCos2d
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition

CHANNELS, TEXT, WIDTH, DEPTH = 6, 10, 64, 3


def build(qk_norm=False, guidance=False, interpolation=None, patch=1, seed=0):
    torch.manual_seed(seed)
    theirs = SanaTransformer2DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=32,
        num_layers=DEPTH,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=TEXT,
        sample_size=8 * patch,
        patch_size=patch,
        interpolation_scale=interpolation,
        guidance_embeds=guidance,
        qk_norm="rms_norm_across_heads" if qk_norm else None,
    )
    with torch.no_grad():  # norms and biases away from one and zero, so that a swap would show
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    ours = Sana(
        CHANNELS,
        WIDTH,
        DEPTH,
        TEXT,
        blocks=[
            partial(
                Block,
                mixer=partial(LinearAttention, qk_norm=qk_norm),
                cross=partial(CrossAttention, heads=4, qk_norm=qk_norm, norm_eps=1e-5),
                ffn=MixFFN,
            )
        ],
        patch=patch,
        guidance_embed=guidance,
        position=None if interpolation is None else partial(SinCos2d, base=8, interpolation=interpolation),
    )
    ours.load_state_dict(sana_from_diffusers(theirs.state_dict()))
    return ours, theirs


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize(
    ("grid", "masked", "settings"),
    [
        ((5, 7), False, {}),
        ((3, 9), True, {"seed": 1}),
        ((5, 7), True, {"qk_norm": True}),
        ((8, 8), True, {"interpolation": 1.0}),
        ((3, 9), False, {"interpolation": 2.0, "qk_norm": True, "seed": 2}),
        ((5, 7), True, {"guidance": True, "qk_norm": True}),
        ((3, 5), True, {"patch": 2, "guidance": True, "interpolation": 1.0}),
        ((1, 1), False, {}),
    ],
)
def test_output_and_gradients_equal_diffusers(grid, masked, settings):
    ours, theirs = build(**settings)
    h, w = (side * settings.get("patch", 1) for side in grid)
    b, length = 3, 6
    x = torch.randn(b, CHANNELS, h, w)
    text = torch.randn(b, length, TEXT)
    t = torch.tensor([0.0, 0.3771, 1.0])
    mask = torch.arange(length) < torch.tensor([[1], [4], [6]]) if masked else None
    guidance = torch.tensor([4.0, 4.5, 5.0]) if settings.get("guidance") else None
    weight = torch.randn(b, CHANNELS, h, w)

    x1, text1 = x.clone().requires_grad_(), text.clone().requires_grad_()
    cond = Condition(text1, mask, guidance)
    v1 = ours(x1.unsqueeze(2), t.unsqueeze(1), cond).squeeze(2)
    grads1 = torch.autograd.grad((v1 * weight).sum(), [x1, text1])

    x2, text2 = x.clone().requires_grad_(), text.clone().requires_grad_()
    v2 = theirs(
        x2,
        encoder_hidden_states=text2,
        timestep=t * 1000,
        guidance=None if guidance is None else guidance * 0.1,
        encoder_attention_mask=None if mask is None else mask.float(),
        return_dict=False,
    )[0]
    grads2 = torch.autograd.grad((v2 * weight).sum(), [x2, text2])

    assert relative(v1, v2) < 1e-5
    for ours_grad, theirs_grad in zip(grads1, grads2, strict=True):
        assert relative(ours_grad, theirs_grad) < 1e-5


@pytest.mark.parametrize("settings", [{}, {"qk_norm": True}, {"guidance": True, "patch": 2}])
def test_names_round_trip_to_the_bit(settings):
    ours, theirs = build(**settings)
    there = sana_to_diffusers(ours.state_dict(), patch=settings.get("patch", 1))
    want = theirs.state_dict()
    assert there.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(there[name], value), name
    back = sana_from_diffusers(there)
    assert back.keys() == ours.state_dict().keys()
    for name, value in ours.state_dict().items():
        assert torch.equal(back[name], value), name


def test_missing_and_extra_keys_are_named():
    ours, theirs = build()
    state = theirs.state_dict()
    value = state.pop("transformer_blocks.1.attn1.to_k.weight")
    state["transformer_blocks.1.attn1.to_x.weight"] = value
    with pytest.raises(ValueError, match=r"missing transformer_blocks.1.attn1.to_k.weight, .*attn1.to_x.weight"):
        sana_from_diffusers(state)
    state = ours.state_dict()
    del state["final.table"]
    with pytest.raises(ValueError, match=r"missing final.table, unexpected none"):
        sana_to_diffusers(state)
    with pytest.raises(ValueError, match=r"no key begins with 'transformer_blocks\.'"):
        sana_from_diffusers({"encoder.weight": value})
