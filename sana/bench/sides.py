"""Our pipeline and diffusers' `SanaPipeline`, built with the same random weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sana.bench.clock import Clock
from sana.bench.parts import (
    SIZES,
    our_autoencoder,
    our_network,
    random_text,
    their_autoencoder,
    their_network,
)
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma import GemmaEncoder
from sana.flow.grid import dpm_grid, few_step_grid
from sana.model.generate import NOISE_SEED, Painter
from sana.model.use_graphs import use_graphs
from sana.network.sana import Sana
from sana.nn.inference import for_inference
from sana.ops.random import normal
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import FewStep, Sampler
from sana.sampler.scm import few_step
from sana.types import Condition

GUIDANCE, SHIFT = 4.5, 3.0
STAGES = ("text", "denoiser", "autoencoder")


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

    def draw(self, prompts: list[str], seed: int, steps: int | None = None) -> Any:
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
    """Prompts to pixels by `Painter`; with few steps where the network embeds the guidance.

    Args:
        watched: time the stages and keep the results, as recorded graphs cannot; else draw by graphs where they help.
    """

    def __init__(
        self, work: Work, text: tuple[Any, Any], network: Sana, autoencoder: DCAE, watched: bool = True
    ) -> None:
        super().__init__(work)
        encoder = GemmaEncoder.from_parts(*text, lowercase=True, strip=True, trim=True)
        network = for_inference(network.eval().requires_grad_(False))  # type: ignore[assignment]
        autoencoder.eval().requires_grad_(False)
        if watched:
            self.clock.wrap(network, "forward", "denoiser")
            self.clock.wrap(network, "prepare", "denoiser")
            self.clock.wrap(encoder, "_run", "text")
            self.clock.wrap(autoencoder, "decode", "autoencoder")
            self.watch(autoencoder, "decode", 1.0)

        def null_like(condition: Condition) -> Condition:
            return encoder.null(*condition.text.shape[:2])

        self.painter = Painter(network, autoencoder, encoder, null_like)
        if not watched:
            use_graphs(self.painter, "auto")

    def draw(self, prompts: list[str], seed: int, steps: int | None = None) -> Any:
        """As `Side.draw`; the images, uint8."""
        px = self.work.px
        return self.painter.draw(prompts, self.seeds(seed), self.sampler(steps), px, px, batch=self.work.batch)

    def sampler(self, steps: int | None = None) -> Sampler:
        """The published one of the network."""
        steps = steps or self.work.steps
        if SIZES[self.work.size].guidance:
            return FewStep(few_step, few_step_grid, steps, GUIDANCE)
        return Sampler(flow_dpm, partial(dpm_grid, shift=SHIFT), steps, GUIDANCE)


class Theirs(Side):
    """Prompts to pixels by diffusers' `SanaPipeline`, or `SanaSprintPipeline` where the network embeds the guidance.

    Args:
        watched: as in `Ours`.
    """

    def __init__(self, work: Work, text: tuple[Any, Any], network: Any, autoencoder: Any, watched: bool = True) -> None:
        from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaSprintPipeline, SCMScheduler

        super().__init__(work)
        model, tokenizer = text
        parts = tokenizer, model, autoencoder.eval(), network.eval()
        if SIZES[work.size].guidance:
            scheduler: Any = SCMScheduler()
            self.pipeline: Any = SanaSprintPipeline(*parts, scheduler)
            self.more: dict[str, Any] = {"intermediate_timesteps": 1.3 if work.steps == 2 else None}
        else:
            scheduler = DPMSolverMultistepScheduler(
                prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT, final_sigmas_type="zero"
            )
            self.pipeline = SanaPipeline(*parts, scheduler)
            self.more = {}
        self.pipeline.set_progress_bar_config(disable=True)
        if watched:
            self.clock.wrap(network, "forward", "denoiser")
            self.clock.wrap(self.pipeline, "encode_prompt", "text")
            self.clock.wrap(autoencoder, "decode", "autoencoder")
            self.watch(autoencoder, "decode", autoencoder.config.scaling_factor)

    def draw(self, prompts: list[str], seed: int, steps: int | None = None, output: str = "np") -> Any:
        """As `Side.draw`; the images as `output` says."""
        px = self.work.px
        return self.pipeline(
            prompt=prompts, num_inference_steps=steps or self.work.steps, guidance_scale=GUIDANCE, height=px, width=px,
            latents=self.noise(seed), complex_human_instruction=None, clean_caption=False, output_type=output,
            use_resolution_binning=False, **self.more,
        ).images  # fmt: skip


def make_text(work: Work) -> tuple[Any, Any]:
    """A random Gemma-2 of the published width, of few layers, and a tokenizer of bytes."""
    return random_text(SIZES[work.size], work.text_layers, work.dtype, work.device)


def make_theirs(work: Work) -> tuple[Any, Any]:
    """diffusers' transformer and autoencoder with random weights."""
    size = SIZES[work.size]
    network = their_network(size, work.px, work.dtype, work.device)
    return network, their_autoencoder(size, work.dtype, work.device)


def make_ours(work: Work) -> tuple[Sana, DCAE]:
    """Our network and autoencoder with random weights."""
    size = SIZES[work.size]
    return our_network(size, work.px, work.dtype, work.device), our_autoencoder(size, work.dtype, work.device)


def make_both(work: Work, watched: bool = True) -> tuple[Ours, Theirs]:
    """The two sides with the same weights and the same text encoder; watched as in `Ours`."""
    from sana.checkpoint.diffusers import sana_from_diffusers
    from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers

    text = make_text(work)
    network, autoencoder = make_theirs(work)
    ours, decoder = make_ours(work)
    ours.load_state_dict(sana_from_diffusers(network.state_dict()))
    decoder.load_state_dict(dc_ae_from_diffusers(autoencoder.state_dict()))
    return Ours(work, text, ours, decoder, watched), Theirs(work, text, network, autoencoder, watched)


def make_one(side: str, work: Work) -> Side:
    """One side alone, for its memory."""
    if side == "ours":
        return Ours(work, make_text(work), *make_ours(work))
    return Theirs(work, make_text(work), *make_theirs(work))
