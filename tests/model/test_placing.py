"""Drawing the same in less time: weights cast once under autocast, and the layout that convolutions are fastest in."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.model.compile_gate import use_compiled
from sana.model.generate import Painter
from sana.model.offload import Offload
from sana.model.use_graphs import use_graphs
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.inference import cast_once, for_inference
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition


def autoencoder(**settings) -> DCAE:
    torch.manual_seed(0)
    sizes = dict(widths=(16, 16, 32, 32), depths=(1, 1, 1, 2), attention=(False, False, True, True))
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in sizes.items()}
    return DCAE(8, 1.0, head_dim=8, **halves, **settings).eval().requires_grad_(False)


def painter(**settings) -> Painter:
    torch.manual_seed(0)
    block = partial(
        Block, mixer=partial(LinearAttention, head_dim=8), cross=partial(CrossAttention, heads=2), ffn=MixFFN
    )
    network = for_inference(Sana(8, 16, 2, 10, [block], text_norm=1.0).eval().requires_grad_(False))
    return Painter(network, autoencoder(), None, lambda c: c, **settings)


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_weights_cast_once_draw_the_bits_of_autocast(own):
    """own: the decoder has a precision of its own, and is left as it is."""
    whole = painter(autocast_decoder=not own)
    z, t = torch.randn(2, 8, 1, 4, 5), torch.full((2, 1), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        text = whole.network.prepare(Condition(torch.randn(2, 7, 10)))
        velocity, pixels = whole.network(z, t, text), whole.decode(z)
        cast_once(whole.network, None if own else whole.autoencoder)
        assert torch.equal(whole.network(z, t, text), velocity)
        assert (whole.decode(z) == pixels).all()
    kinds = {nn.Conv2d: torch.float32 if own else torch.bfloat16, nn.Parameter: torch.float32}
    decoder = whole.autoencoder.decoder
    assert decoder.input.weight.dtype == kinds[nn.Conv2d]
    assert decoder.norm.weight.dtype == whole.autoencoder.encoder.output.weight.dtype == torch.float32
    assert whole.network.blocks[1].cross.kv.weight.dtype == torch.bfloat16


def test_there_are_no_graphs_without_a_cuda_device():
    whole = use_graphs(painter(), "auto")
    assert whole.velocity is None


def test_offload_and_compile_exclude_each_other():
    with pytest.raises(ValueError, match="compile: true with offload=sequential"):
        use_compiled(painter(offload=Offload("sequential", "cpu")), True)


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"decoder_shuffle": True}, {"latent_shortcut": False, "silu_output": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_convolution_of_the_decoder_works_channels_last(settings, dtype):
    """From the first one on, whose input are the latents; NCHW would be copied around every convolution on GPUs."""
    model, seen = autoencoder(**settings), []
    for parameter in model.parameters():  # as `cast_parts` does
        parameter.data = parameter.data.to(dtype)

    def watch(layer, inputs, output):
        seen.append([x.is_contiguous(memory_format=torch.channels_last) for x in (inputs[0], output)])

    layers = [layer for layer in model.decoder.modules() if isinstance(layer, nn.Conv2d)]
    assert all(layer.weight.is_contiguous(memory_format=torch.channels_last) for layer in layers)
    for layer in layers:
        layer.register_forward_hook(watch)
    with torch.autocast("cpu", torch.bfloat16):  # else CPUs take a way of their own through some layers
        pixels = model.decode(torch.randn(2, 8, 5, 6, dtype=dtype))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert seen == [[False, True]] + [[True, True]] * (len(layers) - 1)
