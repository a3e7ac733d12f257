"""Our pipeline and diffusers' `SanaPipeline`, built with the same random weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana.bench.clock import Clock
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.gemma_random import byte_tokenizer
from sana.flow.grid import dpm_grid
from sana.model.generate import NOISE_SEED, Painter
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.embed import SinCos2d
from sana.nn.inference import for_inference
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.ops.random import normal
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler
from sana.types import Condition

GUIDANCE, SHIFT = 4.5, 3.0
STAGES = ("text", "denoiser", "autoencoder")


@dataclass(frozen=True)
class Size:
    """Attributes: of a published network, its text features, and the widths of its autoencoder."""

    width: int
    depth: int
    heads: int
    qk_norm: bool = False
    text_channels: int = 2304
    autoencoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    autoencoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)


SIZES = {
    "600m": Size(1152, 28, 16),
    "1600m": Size(2240, 20, 20),
    "1.5-1600m": Size(2240, 20, 20, qk_norm=True),
    "1.5-4800m": Size(2240, 60, 20, qk_norm=True),
    "tiny": Size(64, 2, 2, False, 64, (8, 8, 16, 32, 32, 32), (1, 1, 1, 1, 1, 1)),
}
ATTENTION = (False, False, False, True, True, True)


@dataclass(frozen=True)
class Work:
    """What is drawn.

    Attributes:
        size: key of SIZES.
        px: side of the images.
        steps: of the sampler, DPM-Solver++ with guidance.
        batch: images at once.
        text_layers: of the random Gemma-2.
        dtype: of all weights.
        device: where.
    """

    size: str
    px: int
    steps: int
    batch: int
    text_layers: int
    dtype: torch.dtype
    device: torch.device

    @property
    def latent(self) -> tuple[int, int, int, int]:
        """Shape of the noise."""
        side = self.px // 32
        return self.batch, 32, side, side

    def prompts(self, tokens: int, seed: int) -> list[str]:
        """Prompts of exactly so many tokens, BOS included, that no earlier seed has had."""
        return [f"{seed:04d}{i:02d}".ljust(tokens - 1, "abcdefgh"[i % 8])[: tokens - 1] for i in range(self.batch)]


class Side:
    """One implementation, ready to draw.

    Attributes:
        clock: of the stages.
        seen: latents and images of the last drawing, on their device.
    """

    def __init__(self, work: Work) -> None:
        self.work, self.clock, self.seen = work, Clock(work.device), {}

    def draw(self, prompts: list[str], seed: int, steps: int | None = None) -> None:
        """Draw images with the noise of a seed."""
        raise NotImplementedError

    def noise(self, seed: int) -> Tensor:
        """(b, 32, h, w): what our sampler draws for the seeds seed * batch, seed * batch + 1, ..."""
        index = torch.tensor(self.seeds(seed), device=self.work.device)
        _, c, h, w = self.work.latent
        return normal(NOISE_SEED, index, "sampling noise", (c, 1, h, w)).squeeze(2)

    def seeds(self, seed: int) -> list[int]:
        """One per image."""
        return list(range(seed * self.work.batch, (seed + 1) * self.work.batch))

    def watch(self, owner: Any, name: str, scale: float) -> None:
        """Keep what the decoder of a part takes (times scale) and gives."""
        function = getattr(owner, name)

        def decode(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = function(z.to(self.work.dtype), *args, **kwargs)
            self.seen = {
                "latent": z.float() * scale,
                "image": (result if torch.is_tensor(result) else result[0]).float(),
            }
            return result

        setattr(owner, name, decode)


class Ours(Side):
    """Prompts to pixels by `Painter`."""

    def __init__(self, work: Work, text: tuple[Any, Any], network: Sana, autoencoder: DCAE) -> None:
        super().__init__(work)
        encoder = GemmaEncoder.from_parts(*text, lowercase=True, strip=True, trim=True)
        network = for_inference(network.eval().requires_grad_(False))  # type: ignore[assignment]
        autoencoder.eval().requires_grad_(False)
        self.clock.wrap(network, "forward", "denoiser")
        self.clock.wrap(network, "prepare", "denoiser")
        self.clock.wrap(encoder, "_run", "text")
        self.clock.wrap(autoencoder, "decode", "autoencoder")
        self.watch(autoencoder, "decode", 1.0)

        def null_like(condition: Condition) -> Condition:
            return encoder.null(*condition.text.shape[:2])

        self.painter = Painter(network, autoencoder, encoder, null_like)

    def draw(self, prompts: list[str], seed: int, steps: int | None = None) -> None:
        """As `Side.draw`."""
        sampler = Sampler(flow_dpm, partial(dpm_grid, shift=SHIFT), steps or self.work.steps, GUIDANCE)
        px = self.work.px
        self.painter.draw(prompts, self.seeds(seed), sampler, px, px, batch=self.work.batch)


class Theirs(Side):
    """Prompts to pixels by diffusers' `SanaPipeline`."""

    def __init__(self, work: Work, text: tuple[Any, Any], network: Any, autoencoder: Any) -> None:
        from diffusers import DPMSolverMultistepScheduler, SanaPipeline

        super().__init__(work)
        model, tokenizer = text
        scheduler = DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, final_sigmas_type="zero"
        )
        self.pipeline: Any = SanaPipeline(tokenizer, model, autoencoder.eval(), network.eval(), scheduler)
        self.pipeline.set_progress_bar_config(disable=True)
        self.clock.wrap(network, "forward", "denoiser")
        self.clock.wrap(self.pipeline, "encode_prompt", "text")
        self.clock.wrap(autoencoder, "decode", "autoencoder")
        self.watch(autoencoder, "decode", autoencoder.config.scaling_factor)

    def draw(self, prompts: list[str], seed: int, steps: int | None = None) -> None:
        """As `Side.draw`."""
        px = self.work.px
        self.pipeline(
            prompt=prompts, num_inference_steps=steps or self.work.steps, guidance_scale=GUIDANCE, height=px, width=px,
            latents=self.noise(seed), complex_human_instruction=None, clean_caption=False, output_type="np",
            use_resolution_binning=False,
        )  # fmt: skip


def make_text(work: Work) -> tuple[Any, Any]:
    """A random Gemma-2 of the published width, of few layers, and a tokenizer of bytes."""
    from transformers import Gemma2Config, Gemma2Model

    tokenizer, channels = byte_tokenizer(), SIZES[work.size].text_channels
    heads = max(1, channels // 288)  # 8 at the published width
    eager: dict[str, Any] = {"attn_implementation": "eager"}  # not among the declared fields
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=channels, intermediate_size=4 * channels,
        num_hidden_layers=work.text_layers, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2),
        head_dim=256, query_pre_attn_scalar=256, **eager,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with _made(work):
        return Gemma2Model(config).eval(), tokenizer


def make_theirs(work: Work) -> tuple[Any, Any]:
    """diffusers' transformer and autoencoder with random weights."""
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    size, side = SIZES[work.size], work.px // 32
    kinds: Any = tuple("EfficientViTBlock" if attention else "ResBlock" for attention in ATTENTION)
    with _made(work):
        network = SanaTransformer2DModel(
            num_attention_heads=size.width // 32, num_layers=size.depth, num_cross_attention_heads=size.heads,
            cross_attention_head_dim=size.width // size.heads, cross_attention_dim=size.width, sample_size=side,
            caption_channels=size.text_channels, qk_norm="rms_norm_across_heads" if size.qk_norm else None,
            interpolation_scale={64: 1, 128: 2}.get(side),
        )  # fmt: skip
        autoencoder = AutoencoderDC(
            encoder_block_types=kinds, decoder_block_types=kinds, encoder_block_out_channels=size.autoencoder_widths,
            decoder_block_out_channels=size.autoencoder_widths, decoder_layers_per_block=size.autoencoder_depths,
            encoder_layers_per_block=_encoder_depths(size), downsample_block_type="conv",
            upsample_block_type="interpolate", decoder_conv_act_fn="relu", scaling_factor=0.41407,
        )  # fmt: skip
    return network, autoencoder


def make_ours(work: Work) -> tuple[Sana, DCAE]:
    """Our network and autoencoder with random weights."""
    size, side = SIZES[work.size], work.px // 32
    block = partial(
        Block,
        mixer=partial(LinearAttention, qk_norm=size.qk_norm),
        cross=partial(CrossAttention, heads=size.heads, qk_norm=size.qk_norm, norm_eps=1e-5),
        ffn=MixFFN,
    )
    position = {64: partial(SinCos2d, base=64), 128: partial(SinCos2d, base=128, interpolation=2.0)}.get(side)
    with _made(work):
        network = Sana(
            32, size.width, size.depth, size.text_channels, blocks=[block], floor_time=True, position=position
        )
        widths, depths = size.autoencoder_widths, size.autoencoder_depths
        autoencoder = DCAE(
            encoder_widths=widths, decoder_widths=widths, decoder_depths=depths, encoder_depths=_encoder_depths(size)
        )
    return network, autoencoder


def make_both(work: Work) -> tuple[Ours, Theirs]:
    """The two sides with the same weights and the same text encoder."""
    from sana.checkpoint.diffusers import sana_from_diffusers
    from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers

    text = make_text(work)
    network, autoencoder = make_theirs(work)
    ours, decoder = make_ours(work)
    ours.load_state_dict(sana_from_diffusers(network.state_dict()))
    decoder.load_state_dict(dc_ae_from_diffusers(autoencoder.state_dict()))
    return Ours(work, text, ours, decoder), Theirs(work, text, network, autoencoder)


def _encoder_depths(size: Size) -> tuple[int, ...]:
    return (2, 2, 2, 3, 3, 3) if size.autoencoder_depths[0] == 3 else size.autoencoder_depths


@contextlib.contextmanager
def _made(work: Work) -> Iterator[None]:
    """Weights are made in the dtype and on the device where they stay, without a copy; the same each time."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(work.dtype)
    try:
        with torch.device(work.device), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


Make = Callable[[Work], Side]


def make_one(side: str, work: Work) -> Side:
    """One side alone, for its memory."""
    if side == "ours":
        return Ours(work, make_text(work), *make_ours(work))
    return Theirs(work, make_text(work), *make_theirs(work))
