"""Tiled encoding and decoding against the whole map; receptive fields against gradients; blending against diffusers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers import AutoencoderDC

from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers
from sana.encoder.autoencoder.blocks import Downsample, EViTBlock, ResBlock, RMSNorm2d, Upsample
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.autoencoder.tiles import run, split, through

KINDS: dict[str, dict] = {
    "attention in both": {
        "encoder_depths": (1, 1, 2, 1),
        "encoder_attention": (False, False, True, True),
        "decoder_depths": (2, 1, 2, 1),
        "decoder_attention": (False, False, True, True),
    },
    "as DC-AE-Lite": {
        "encoder_depths": (2, 1, 1, 1),
        "encoder_attention": (False, False, False, True),
        "decoder_depths": (0, 1, 2, 1),
        "decoder_attention": (False,) * 4,
        "decoder_shuffle": True,
        "silu_output": True,
    },
    "shuffled, two scales": {
        "encoder_depths": (0, 1, 1, 2),
        "encoder_attention": (False, False, False, True),
        "decoder_depths": (1, 1, 1, 1),
        "decoder_attention": (False, False, True, False),
        "encoder_shuffle": True,
        "decoder_shuffle": True,
        "latent_shortcut": False,
        "kernels": (3, 5),
    },
}


def small(kind: str, seed: int, **settings) -> DCAE:
    torch.manual_seed(seed)
    widths = (8, 16, 32, 32)
    model = DCAE(
        channels=4, scale=0.7, encoder_widths=widths, decoder_widths=widths, head_dim=8, **KINDS[kind], **settings
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(False)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "tile", "seed"), [((104, 72), 8, 0), ((88, 136), 24, 1), ((56, 200), 40, 2)])
def test_tiles_give_what_the_whole_gives(kind: str, size: tuple[int, int], tile: int, seed: int) -> None:
    """In float64, where only a wrong overlap could show; sides that are no multiples of the tile."""
    model = small(kind, seed).double()
    image = torch.rand(2, 3, *size, dtype=torch.float64) * 2 - 1
    z = model.encode(image)
    pixels = model.decode(z)
    with torch.no_grad():
        for part, half, x, want in (("encode", "encoder", image, z / 0.7), ("decode", "decoder", z / 0.7, pixels)):
            plan = model.plan(part, x, tile)  # type: ignore[arg-type]
            assert any(segment.tile is not None for segment in plan.segments)
            assert relative(run(plan.segments, x, plan.batch), want) < 1e-11, half


@pytest.mark.parametrize(("batch", "share", "seed"), [(1, 0.7, 0), (3, 0.3, 1), (3, 0.5, 2)])
def test_a_budget_changes_nothing_in_fp32(batch: int, share: float, seed: int) -> None:
    model = small("attention in both", seed)
    image = torch.rand(batch, 3, 184, 248) * 2 - 1
    with torch.no_grad():
        z = model.encode(image)
        want = model.decode(z)
        needed = model.plan("decode", z).bytes
        model.limit_memory(share * needed / 2**30)
        plan = model.plan("decode", z)
        assert plan.bytes <= share * needed
        assert plan.batch == 1
        assert any(segment.tile is not None for segment in plan.segments) or batch > 1
        assert relative(model.encode(image), z) < 1e-4
        assert relative(model.decode(z), want) < 1e-4
        model.limit_memory(2 * needed / 2**30)
        assert model.plan("decode", z).batch == batch
        assert all(segment.tile is None for segment in model.plan("decode", z).segments)
        assert relative(model.decode(z), want) < 1e-5


def test_low_precision_maps_and_autocast() -> None:
    model = small("attention in both", 3)
    z = torch.randn(1, 4, 20, 28)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model.decode(z)
        full = model.plan("decode", z).bytes
        model.limit_memory(0.7 * full / 2**30)
        got = model.decode(z)
        assert any(segment.tile is not None for segment in model.plan("decode", z).segments)
        assert got.dtype == want.dtype
    assert relative(got.float(), want.float()) < 5e-2


def test_gradients_ignore_the_budget() -> None:
    model = small("attention in both", 4).requires_grad_(True)
    z = torch.randn(1, 4, 8, 8)
    want = torch.autograd.grad(model.decode(z).square().sum(), list(model.decoder.parameters()))
    model.limit_memory(1e-6)
    got = torch.autograd.grad(model.decode(z).square().sum(), list(model.decoder.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


LAYERS = {
    "residual": lambda: ResBlock(8),
    "norm": lambda: RMSNorm2d(8),
    "attention": lambda: EViTBlock(8, 4, (3, 5)),
    "up": lambda: Upsample(8, 8, shuffle=False),
    "up, shuffled": lambda: Upsample(8, 8, shuffle=True),
    "down": lambda: Downsample(8, 8, shuffle=False),
    "down, shuffled": lambda: Downsample(8, 8, shuffle=True),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("first", "end"), [(6, 7), (5, 9), (8, 10)])
def test_fields_are_where_gradients_are_not_zero(name: str, first: int, end: int) -> None:
    """Of the outputs [first, end) of a column; downsampling may read one row more, to stay even."""
    torch.manual_seed(0)
    layer = LAYERS[name]().double()
    x = torch.randn(1, 8, 40, 6, dtype=torch.float64, requires_grad=True)
    sums = layer.attention.sums(x.detach(), slice(None), slice(None)) if isinstance(layer, EViTBlock) else None
    y = layer(x) if sums is None else layer(x, sums)
    (gradient,) = torch.autograd.grad(y[:, :, first:end].square().sum(), x)
    rows = gradient.abs().amax((0, 1, 3)).nonzero().flatten()
    p, q = layer.field(first, end)
    slack = 1 if isinstance(layer, Downsample) else 0
    assert 0 <= rows.min() - p <= slack
    assert 0 <= q - (rows.max() + 1) <= slack
    assert y.shape[2] == layer.size(40)


def test_sums_of_parts_add_up() -> None:
    torch.manual_seed(5)
    block = EViTBlock(8, 4, (5,)).double()
    x = torch.randn(2, 8, 11, 9, dtype=torch.float64)
    whole = block.attention.sums(x, slice(None), slice(None))
    torch.testing.assert_close(block(x, whole), block(x))
    top = block.attention.sums(x[:, :, :6], slice(0, 4), slice(None))
    rest = block.attention.sums(x[:, :, 2:], slice(2, None), slice(None))
    torch.testing.assert_close(top + rest, whole)


def test_chains_are_the_halves() -> None:
    for kind in KINDS:
        model = small(kind, 6)
        image = torch.rand(1, 3, 48, 40)
        for half, x in ((model.encoder, image), (model.decoder, model.encode(image))):
            segments = split(half.chain(), x.shape[2], x.shape[3])
            y = x
            for segment in segments:
                y = through(segment, y, segment.areas()[0])
            torch.testing.assert_close(y, half(x))
            assert sum(len(segment.layers) for segment in segments) == len(half.chain())


def test_a_model_with_plans_can_be_copied_and_sent() -> None:
    model = small("attention in both", 8)
    model.limit_memory(1.0)
    z = torch.randn(1, 4, 3, 2)
    with torch.no_grad():
        want = model.decode(z)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 (made here)
            assert torch.equal(other.decode(z), want)
            next(iter(other.decoder.parameters())).zero_()
            assert not torch.equal(other.decode(z), want)  # its plan holds its own layers
        assert torch.equal(model.decode(z), want)


def test_wrong_limits_are_named() -> None:
    model = small("attention in both", 7)
    with pytest.raises(ValueError, match="exclude each other"):
        model.limit_memory(1.0, [64, 32])
    with pytest.raises(ValueError, match="must be positive"):
        model.limit_memory(0)
    for wrong in ([64], [60, 32], [32, 64], [64, 0]):
        with pytest.raises(ValueError, match=r"multiples of 8 with 0 < stride <= tile"):
            model.limit_memory(None, wrong)
    model.limit_memory(1e-4)
    with pytest.raises(ValueError, match=r"max_memory_gib: to decode \(1, 4, 64, 64\), 0.0001 GiB are too little: at"):
        model.decode(torch.zeros(1, 4, 64, 64))


@pytest.mark.parametrize(("size", "tile", "stride"), [((96, 64), 32, 24), ((64, 104), 48, 32), ((72, 72), 40, 40)])
def test_blending_is_that_of_diffusers(size: tuple[int, int], tile: int, stride: int) -> None:
    torch.manual_seed(0)
    theirs = AutoencoderDC(
        latent_channels=4,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 32, 64),
        decoder_block_out_channels=(8, 16, 32, 64),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    ).requires_grad_(False)
    theirs.enable_tiling(tile, tile, stride, stride)
    widths, attention = (8, 16, 32, 64), (False, False, False, True)
    settings = {"widths": widths, "depths": (1, 1, 1, 1), "attention": attention}
    ours = DCAE(
        channels=4,
        scale=0.7,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in settings.items()},
        blending=[tile, stride],
    ).requires_grad_(False)
    ours.load_state_dict(dc_ae_from_diffusers(theirs.state_dict()))
    image = torch.rand(2, 3, *size) * 2 - 1
    want = theirs.encode(image, return_dict=False)[0]
    assert relative(ours.encode(image), want * 0.7) < 1e-5
    assert relative(ours.decode(want * 0.7), theirs.decode(want, return_dict=False)[0]) < 1e-5
    ours.limit_memory()
    assert relative(ours.encode(image), want * 0.7) > 1e-4  # blending is not the whole
