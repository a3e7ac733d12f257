"""Offloading with the CPU as both places: the same results, weights fetched when needed, dropped and put back after.

Copies on another device, and the time that fetching takes, cannot be seen here.
"""

from __future__ import annotations

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma_random import gemma_random
from sana.flow.grid import dpm_grid
from sana.model.generate import Painter
from sana.model.offload import Offload
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.quant.int8_weight import int8_weight
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler


class Device:
    """A device that is a set of copies: what is alive on it, and the most there ever was."""

    def __init__(self) -> None:
        self.alive, self.most, self.fetched = 0, 0, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        memory = tensor.numpy().copy()  # owned by the copy's storage: it goes when the last tensor on it goes
        self.fetched += memory.nbytes
        self.alive += memory.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(memory, self._dropped, memory.nbytes)
        return torch.from_numpy(memory)

    def _dropped(self, size: int) -> None:
        self.alive -= size


def painter(offload: Offload | None = None, quantised: bool = False) -> Painter:
    torch.manual_seed(0)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=8, qk_norm=True),
        cross=partial(CrossAttention, heads=2, qk_norm=True),
        ffn=MixFFN,
    )
    network = Sana(4, 32, 6, 64, [block], text_norm=1.0).eval()
    autoencoder = DCAE(
        channels=4,
        scale=1.0,
        encoder_widths=(8, 8, 32),
        encoder_depths=(1, 1, 1),
        encoder_attention=(False, False, True),
        decoder_widths=(8, 8, 32),
        decoder_depths=(1, 1, 1),
        decoder_attention=(False, False, True),
    ).eval()
    encoder = gemma_random(64, 2, max_tokens=24, dtype="float32", trim=True)
    if quantised:
        int8_weight(network)
    return Painter(network, autoencoder, encoder, lambda c: encoder.null(len(c.text), c.text.shape[1]), offload)


SAMPLER = Sampler(flow_dpm, partial(dpm_grid, shift=3.0), steps=2, guidance=2.0, pag_scale=1.0, pag_layers=[1])
WORK = (["a red circle", "two stars", "two stars"], [1, 2, 3], SAMPLER, 16, 24)


def size_of(module: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))


def homes(painter: Painter) -> list[int]:
    parts = (painter.network, painter.autoencoder, painter.text_encoder)
    return [x.data_ptr() for part in parts for x in part.parameters()]


def nearly_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """oneDNN's depthwise convolution sums in an order that depends on where weights lie in memory: 1e-7, which may
    turn one level of one pixel."""
    return np.abs(a.astype(int) - b).max() <= 1 and (a != b).mean() < 0.01


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_the_same_picture_and_everything_back_home(mode, quantised):
    want = painter(quantised=quantised).draw(*WORK, negative="blurry")
    device = Device()
    mine = painter(Offload(mode, "cpu", device), quantised)
    before = homes(mine)
    assert nearly_equal(mine.draw(*WORK, negative="blurry"), want)
    assert homes(mine) == before
    assert device.alive == 0
    assert nearly_equal(mine.draw(*WORK, negative="blurry"), want)


def test_one_part_at_a_time():
    device = Device()
    mine = painter(Offload("model", "cpu", device))
    mine.draw(*WORK, negative_mask="own")
    sizes = [size_of(part) for part in (mine.network, mine.autoencoder, mine.text_encoder)]
    assert max(sizes) <= device.most < 1.02 * max(sizes), "no two at once"
    once = device.fetched
    mine.draw(*WORK, negative_mask="own")
    assert device.fetched - once < sum(sizes), "the text encoder has nothing to do any more"


def test_one_layer_at_a_time():
    device = Device()
    mine = painter(Offload("sequential", "cpu", device))
    mine.draw(*WORK)
    outside = max(size_of(part) - size_of(layers) for part, layers in (
        (mine.network, mine.network.blocks), (mine.text_encoder, mine.text_encoder.model.layers)))  # fmt: skip
    layer = max(size_of(m) for m in mine.text_encoder.modules() if isinstance(m, nn.Linear))
    tables = sum(block.table.numel() * 4 for block in mine.network.blocks)
    assert device.most <= outside + layer + tables
    assert device.most < 0.6 * size_of(mine.text_encoder)


@pytest.mark.parametrize("mode", ["model", "sequential"])
def test_an_error_inside_leaves_everything_at_home(mode):
    device = Device()
    mine = painter(Offload(mode, "cpu", device))
    before = homes(mine)

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine.draw(*WORK, on_step=stop)
    wrong = torch.zeros(1, 5, 1, 4, 4)
    with pytest.raises(ValueError, match="latent must be"):
        mine.decode(wrong)
    with mine.offload.use(mine.network), pytest.raises(RuntimeError):
        mine.network.blocks[0].mixer.qkv(torch.zeros(1, 3))
    assert homes(mine) == before
    assert device.alive == 0
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in mine.network.modules())


def test_shared_weights_are_fetched_once():
    layer, device = nn.Linear(5, 5), Device()
    tied = nn.Sequential(layer, nn.Linear(5, 5))
    tied[1].weight = layer.weight
    with Offload("model", "cpu", device).use(tied):
        assert device.alive == (25 + 5 + 5) * 4
        assert tied[0].weight is tied[1].weight
        with Offload("model", "cpu", device).use(nn.Linear(2, 2)):
            pass
    assert tied[0].weight is tied[1].weight


def test_modes():
    with pytest.raises(ValueError, match="'model' or 'sequential', got 'all'"):
        Offload("all", "cpu")
