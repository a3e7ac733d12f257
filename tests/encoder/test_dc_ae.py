"""DC-AE by itself: parameter counts, shapes, scale, files, refusals; parity is in tests/parity."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sana.encoder.autoencoder.blocks import (
    Downsample,
    MultiScaleLinearAttention,
    RMSNorm2d,
    Upsample,
    average_channels,
    repeat_channels,
)
from sana.encoder.autoencoder.dc_ae import DCAE, load, save

TINY = {
    "channels": 4,
    "scale": 0.5,
    "encoder_widths": (8, 8, 16),
    "encoder_depths": (0, 1, 1),
    "encoder_attention": (False, False, True),
    "decoder_widths": (8, 8, 16),
    "decoder_depths": (1, 1, 1),
    "decoder_attention": (False, False, False),
    "head_dim": 8,
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_published_parameter_counts() -> None:
    with torch.device("meta"):
        sana = DCAE()
        lite = DCAE(
            decoder_depths=(0, 3, 5, 4, 4, 4),
            decoder_attention=(False,) * 6,
            decoder_shuffle=True,
            silu_output=True,
        )
    assert (count(sana.encoder), count(sana.decoder), count(sana)) == (153_027_104, 159_223_171, 312_250_275)
    assert (count(lite.encoder), count(lite.decoder)) == (153_027_104, 268_154_124)
    assert (sana.ratio, sana.channels, sana.scale) == (32, 32, 0.41407)


def test_scale_is_part_of_encode_and_decode() -> None:
    torch.manual_seed(0)
    model, image = DCAE(**TINY), torch.rand(2, 3, 12, 20) * 2 - 1
    raw = model.encoder(image)
    assert raw.shape == (2, 4, 3, 5)
    torch.testing.assert_close(model.encode(image), 0.5 * raw)
    torch.testing.assert_close(model.decode(model.encode(image)), model.decoder(raw))
    torch.testing.assert_close(model(image), model.decoder(raw))


def test_attention_groups_consecutive_channels() -> None:
    """A float64 loop over heads that reads q, k, v from runs of 3 head_dim rows, as published."""
    torch.manual_seed(1)
    width, dim = 8, 4
    module = MultiScaleLinearAttention(width, dim, (3,)).double()
    x = torch.randn(1, width, 2, 3, dtype=torch.float64)
    base = module.qkv(x)
    both = torch.cat([base, module.scales[0](base)], dim=1)[0].flatten(1)  # (6 width, n)
    out = []
    for head in range(both.shape[0] // (3 * dim)):
        q, k, v = both[3 * dim * head : 3 * dim * (head + 1)].split(dim)
        weight = q.relu().T @ k.relu()  # (n queries, n keys)
        out.append((weight @ v.T / (weight.sum(1, keepdim=True) + 1e-15)).T)
    want = x + module.norm(module.proj(torch.cat(out).view(1, 2 * width, 2, 3)))
    torch.testing.assert_close(module(x), want)


def test_rms_norm_by_hand_in_float64() -> None:
    torch.manual_seed(2)
    norm = RMSNorm2d(5).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 5, 3, 1, dtype=torch.float64)
    got = norm(x)
    for b in range(2):
        for i in range(3):
            v = x[b, :, i, 0]
            want = v / (v.square().mean() + 1e-5).sqrt() * norm.weight + norm.bias
            torch.testing.assert_close(got[b, :, i, 0], want)


def test_rms_norm_statistics_are_fp32() -> None:
    x = torch.full((1, 4, 1, 1), 300.0, dtype=torch.float16)  # 300^2 overflows fp16
    torch.testing.assert_close(RMSNorm2d(4).half()(x), torch.ones(1, 4, 1, 1, dtype=torch.float16))


def test_shortcuts_are_inverse_where_channels_repeat() -> None:
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(average_channels(repeat_channels(x, 12), 3), x)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resampling_shortcuts_by_hand(shuffle: bool) -> None:
    down, up = Downsample(4, 8, shuffle), Upsample(8, 4, shuffle)
    for module in (down, up):
        nn.init.zeros_(module.conv.weight)
        nn.init.zeros_(module.conv.bias)  # type: ignore[arg-type]
    x = torch.randn(1, 4, 6, 2)
    y = down(x)
    assert y.shape == (1, 8, 3, 1)
    # 16 unshuffled channels (c, dy, dx) in pairs: output 2 c + dy is the mean over dx
    torch.testing.assert_close(y[0, 5, 1, 0], x[0, 2, 3, 0:2].mean())
    z = up(y)
    assert z.shape == x.shape
    # 8 channels doubled to 16 = (c, dy, dx): pixel (c, 2i + dy, 2j + dx) is channel 2 c + dy at (i, j)
    torch.testing.assert_close(z[0, 2, 3, 1], y[0, 5, 1, 0])


@pytest.mark.parametrize(("inputs", "outputs", "shortcut"), [(8, 4, True), (6, 6, True), (4, 7, False), (3, 6, True)])
@pytest.mark.parametrize(("h", "w", "seed"), [(1, 1, 0), (3, 5, 1), (4, 2, 2)])
def test_enlarging_by_parity_is_enlarging_and_convolving(
    inputs: int, outputs: int, shortcut: bool, h: int, w: int, seed: int
) -> None:
    """Without gradients the enlarged map is never made; the oracle is the definition, in float64."""
    torch.manual_seed(seed)
    up = Upsample(inputs, outputs, shuffle=False, shortcut=shortcut).double()
    x = torch.randn(2, inputs, h, w, dtype=torch.float64)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    want = nn.functional.conv2d(large, up.conv.weight, up.conv.bias, padding=1)
    if shortcut:
        want = want + nn.functional.pixel_shuffle(repeat_channels(x, 4 * outputs), 2)
    with torch.no_grad():
        got = up(x)
        single = up.float()(x.float())
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(single.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(up.double()(x), want, rtol=1e-5, atol=1e-5)  # with gradients, weights once rounded


@pytest.mark.parametrize("seed", [0, 1])
def test_file_there_and_back(tmp_path, seed: int) -> None:
    torch.manual_seed(seed)
    model = DCAE(**TINY)
    path = tmp_path / "ae.safetensors"
    save(model, path)
    again = load(path)
    assert again.config == model.config
    assert not again.training
    image = torch.rand(1, 3, 8, 8)
    torch.testing.assert_close(again(image), model(image))
    started = DCAE(**TINY, weights=path)
    assert all(torch.equal(a, b) for a, b in zip(started.parameters(), model.parameters(), strict=True))
    save(model, path, torch.bfloat16)
    assert next(load(path).parameters()).dtype == torch.float32
    assert (load(path)(image) - model(image)).abs().max() < 0.1


def test_meta_device_reads_no_weights() -> None:
    with torch.device("meta"):
        assert DCAE(**TINY, weights="not/there.safetensors").channels == 4


def test_refusals(tmp_path) -> None:
    model = DCAE(**TINY)
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.zeros(1, 3, 10, 8))
    with pytest.raises(ValueError, match=r"\(b, 4, h, w\)"):
        model.decode(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="same two or more stages"):
        DCAE(**TINY | {"encoder_depths": (1, 1)})
    with pytest.raises(ValueError, match="only the first stage"):
        DCAE(**TINY | {"decoder_depths": (1, 0, 1)})
    with pytest.raises(ValueError, match="same number of stages"):
        DCAE(**TINY | {"decoder_widths": (8, 16), "decoder_depths": (1, 1), "decoder_attention": (False, False)})
    with pytest.raises(ValueError, match="downsampling from 8 to 24"):
        DCAE(**TINY | {"encoder_widths": (8, 8, 24)})
    with pytest.raises(ValueError, match="upsampling from 6 to 8"):
        DCAE(**TINY | {"decoder_widths": (8, 6, 16)})
    with pytest.raises(ValueError, match="latent_shortcut"):
        DCAE(**TINY | {"channels": 5})
    with pytest.raises(ValueError, match="odd"):
        DCAE(**TINY, kernels=(4,))
    with pytest.raises(ValueError, match="no multiple of head_dim"):
        DCAE(**TINY | {"head_dim": 6})
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path / "none.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="header"):
        load(tmp_path / "bare.safetensors")
    save(model, tmp_path / "ae.safetensors")
    with pytest.raises(ValueError, match="other settings of channels, latent_shortcut"):
        DCAE(**TINY | {"channels": 8, "latent_shortcut": False}, weights=tmp_path / "ae.safetensors")


def test_config_is_plain_json() -> None:
    config = DCAE(**TINY).config
    assert DCAE(**json.loads(json.dumps(config))).config == config
