"""The published networks, autoencoders and text encoders with random weights: ours and diffusers'.

Weights are made in the dtype and on the device where they stay, so that billions of them take seconds on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma_random import byte_tokenizer
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.embed import SinCos2d
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN


@dataclass(frozen=True)
class Size:
    """Attributes: of a published network, its text features, and the widths of its autoencoder; guidance: the network
    embeds the scale and sees t itself (Sprint)."""

    width: int
    depth: int
    heads: int
    qk_norm: bool = False
    text_channels: int = 2304
    autoencoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    autoencoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    guidance: bool = False


SIZES = {
    "600m": Size(1152, 28, 16),
    "1600m": Size(2240, 20, 20),
    "1.5-1600m": Size(2240, 20, 20, qk_norm=True),
    "1.5-4800m": Size(2240, 60, 20, qk_norm=True),
    "sprint-1600m": Size(2240, 20, 20, qk_norm=True, guidance=True),
    "tiny": Size(64, 2, 2, False, 64, (8, 8, 16, 32, 32, 32), (1, 1, 1, 1, 1, 1)),
    "sprint-tiny": Size(64, 2, 2, True, 64, (8, 8, 16, 32, 32, 32), (1, 1, 1, 1, 1, 1), guidance=True),
}
ATTENTION = (False, False, False, True, True, True)


@contextlib.contextmanager
def made(dtype: torch.dtype, device: torch.device, seed: int = 0) -> Iterator[None]:
    """Tensors and modules made here are of this type, on this device, and the same each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_default_dtype(before)


def our_network(size: Size, px: int, dtype: torch.dtype, device: torch.device) -> Sana:
    """`Sana` of a published size, at the time scale that diffusers' scheduler gives the other one."""
    block = partial(
        Block,
        mixer=partial(LinearAttention, qk_norm=size.qk_norm),
        cross=partial(CrossAttention, heads=size.heads, qk_norm=size.qk_norm, norm_eps=1e-5),
        ffn=MixFFN,
    )
    table = {64: partial(SinCos2d, base=64), 128: partial(SinCos2d, base=128, interpolation=2.0)}
    time: dict[str, Any] = {"time_scale": 1.0, "guidance_embed": True} if size.guidance else {"floor_time": True}
    with made(dtype, device):
        return Sana(32, size.width, size.depth, size.text_channels, [block], position=table.get(px // 32), **time)


def their_network(size: Size, px: int, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' `SanaTransformer2DModel`."""
    from diffusers import SanaTransformer2DModel

    side = px // 32
    with made(dtype, device):
        return SanaTransformer2DModel(
            num_attention_heads=size.width // 32, num_layers=size.depth, num_cross_attention_heads=size.heads,
            cross_attention_head_dim=size.width // size.heads, cross_attention_dim=size.width, sample_size=side,
            caption_channels=size.text_channels, qk_norm="rms_norm_across_heads" if size.qk_norm else None,
            interpolation_scale={64: 1, 128: 2}.get(side), guidance_embeds=size.guidance,
        )  # fmt: skip


def our_autoencoder(size: Size, dtype: torch.dtype, device: torch.device) -> DCAE:
    """`DCAE` f32c32."""
    widths, depths = size.autoencoder_widths, size.autoencoder_depths
    with made(dtype, device):
        return DCAE(
            encoder_widths=widths, decoder_widths=widths, decoder_depths=depths, encoder_depths=_encoder_depths(size)
        )


def their_autoencoder(size: Size, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' `AutoencoderDC`."""
    from diffusers import AutoencoderDC

    kinds: Any = tuple("EfficientViTBlock" if attention else "ResBlock" for attention in ATTENTION)
    with made(dtype, device):
        return AutoencoderDC(
            encoder_block_types=kinds, decoder_block_types=kinds, encoder_block_out_channels=size.autoencoder_widths,
            decoder_block_out_channels=size.autoencoder_widths, decoder_layers_per_block=size.autoencoder_depths,
            encoder_layers_per_block=_encoder_depths(size), downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_conv_act_fn="relu", scaling_factor=0.41407,
        )  # fmt: skip


def random_text(size: Size, layers: int, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A random Gemma-2 of the published width, of few layers, and a tokenizer of bytes."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer, channels = byte_tokenizer(), size.text_channels
    heads = max(1, channels // 288)  # 8 at the published width
    eager: dict[str, Any] = {"attn_implementation": "eager"}  # not among the declared fields
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=channels, intermediate_size=4 * channels,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        head_dim=256, query_pre_attn_scalar=256, **eager,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with made(dtype, device):
        return Gemma2Model(config).eval(), tokenizer


def _encoder_depths(size: Size) -> tuple[int, ...]:
    return (2, 2, 2, 3, 3, 3) if size.autoencoder_depths[0] == 3 else size.autoencoder_depths
