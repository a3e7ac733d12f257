"""Drawing against diffusers' SanaPipeline with the same random weights, noise, prompts and masks: latents and pixels.

What differs between the two, and which setting makes ours do as theirs does:

* diffusers lower-cases and strips prompts: `encoder.text.lowercase`, `encoder.text.strip`.
* Its DPM++ truncates the times it gives to the network, its Euler does not: `network.floor_time`, `sampler.floor`.
* The eps of its q/k norms in cross-attention is 1e-5, the published one 1e-6: `block.cross.norm_eps`.
* Its negative branch looks at the negative prompt's own tokens, the published one at as many rows as the positive
  prompt has: `negative_mask`.
* Its PAG leaves out the q/k norms of the perturbed layers, in all branches; so SANA-1.5 is held against the definition.
* With several images per prompt and several prompts it pairs images with the masks of other prompts; not compared.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaPAGPipeline,
    SanaPipeline,
    SanaTransformer2DModel,
)

from sana.checkpoint.diffusers import sana_from_diffusers
from sana.checkpoint.diffusers_dc_ae import dc_ae_from_diffusers
from sana.encoder.autoencoder.dc_ae import DCAE
from sana.encoder.text.gemma import GemmaEncoder
from sana.encoder.text.instruction import read_instruction
from sana.flow.grid import dpm_grid, euler_grid
from sana.model.generate import NOISE_SEED, Painter, pag_layers
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.embed import SinCos2d
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.ops.random import normal
from sana.sampler.euler import euler
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler
from sana.types import Condition

CHANNELS = 6
FORMS = {name: read_instruction(name) for name in ("diffusers", "published_yaml")}
PROMPTS = ["A Cat and 12 dogs", "naive", "  two  spaces and two capitals, and a bustling city street\n"]
SEEDS = [3, 2**40 + 1, 11]

# The published shapes at small width: heads of 32 channels in the mixer; 72/32 and 112/32 of that in cross-attention.
SHAPES = {
    "600M": dict(heads=3, cross=4, depth=3, shift=3.0),
    "600M 1024px": dict(heads=3, cross=4, depth=3, shift=4.0, sample=32),
    "1600M": dict(heads=5, cross=2, depth=2, shift=3.0, sample=32),
    "1.5": dict(heads=5, cross=2, depth=4, shift=3.0, sample=32, qk_norm=True),
    "2K": dict(heads=5, cross=2, depth=2, shift=3.0, sample=64, interpolation=1.0),
    "4K": dict(heads=5, cross=2, depth=2, shift=6.0, sample=128, interpolation=2.0),
}


class Pair:
    """The same weights on both sides."""

    def __init__(self, gemma, heads, cross, depth, shift, sample=16, qk_norm=False, interpolation=None, form=None,
                 guidance=False, seed=0):  # fmt: skip
        torch.manual_seed(seed)
        self.shift, width = shift, 32 * heads
        self.transformer = SanaTransformer2DModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_attention_heads=heads,
            attention_head_dim=32,
            num_layers=depth,
            num_cross_attention_heads=cross,
            cross_attention_head_dim=width // cross,
            cross_attention_dim=width,
            caption_channels=32,
            sample_size=sample,
            interpolation_scale=interpolation,
            guidance_embeds=guidance,
            qk_norm="rms_norm_across_heads" if qk_norm else None,
        ).eval()
        vae = AutoencoderDC(
            latent_channels=CHANNELS,
            encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
            encoder_block_out_channels=(6, 24, 96),
            decoder_block_out_channels=(6, 24, 96),
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_conv_act_fn="relu",
            scaling_factor=0.41407,
        ).eval()
        with torch.no_grad():  # norms and biases away from one and zero; the caption heard over its initial 0.01
            for name, p in [*self.transformer.named_parameters(), *vae.named_parameters()]:
                p.add_(0.1 * (p.std() if p.ndim > 1 else 1) * torch.randn_like(p))
                if name == "caption_norm.weight":
                    p.add_(1.0)
        self.pipeline_parts = dict(tokenizer=gemma[1], text_encoder=gemma[0], vae=vae, transformer=self.transformer)
        self.form = form
        self.network = Sana(
            CHANNELS,
            width,
            depth,
            32,
            blocks=[
                partial(
                    Block,
                    mixer=partial(LinearAttention, qk_norm=qk_norm),
                    cross=partial(CrossAttention, heads=cross, qk_norm=qk_norm, norm_eps=1e-5),
                    ffn=MixFFN,
                )
            ],
            floor_time=True,
            guidance_embed=guidance,
            position=None if interpolation is None else partial(SinCos2d, base=sample, interpolation=interpolation),
        ).eval()
        self.network.load_state_dict(sana_from_diffusers(self.transformer.state_dict()))
        autoencoder = DCAE(
            channels=CHANNELS,
            encoder_widths=(6, 24, 96),
            encoder_depths=(1, 1, 1),
            encoder_attention=(False, False, True),
            decoder_widths=(6, 24, 96),
            decoder_depths=(1, 1, 1),
            decoder_attention=(False, False, True),
        ).eval()
        autoencoder.load_state_dict(dc_ae_from_diffusers(vae.state_dict()))
        encoder = GemmaEncoder.from_parts(*gemma, instruction=form, lowercase=True, strip=True)
        self.painter = Painter(self.network, autoencoder, encoder, lambda c: encoder.null(len(c.text), c.text.shape[1]))

    def noise(self, seeds, height, width):
        index = torch.tensor(seeds)
        return normal(NOISE_SEED, index, "sampling noise", (CHANNELS, 1, height // 4, width // 4)).squeeze(2)

    def scheduler(self, kind):
        if kind == "euler":
            return FlowMatchEulerDiscreteScheduler(shift=self.shift)
        return DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=self.shift, final_sigmas_type="zero"
        )

    def theirs(self, kind, steps, prompts, seeds, height, width, pag=None, output="latent", **options):
        parts = self.pipeline_parts | {"scheduler": self.scheduler(kind)}
        pipeline = SanaPipeline(**parts) if pag is None else SanaPAGPipeline(**parts, pag_applied_layers=pag)
        pipeline.set_progress_bar_config(disable=True)
        instruction = None if self.form is None else self.form.split("\n")
        result = pipeline(
            prompt=prompts,
            num_inference_steps=steps,
            height=32,  # must be multiples of 32; the size is that of the noise
            width=32,
            latents=self.noise(seeds, height, width),
            complex_human_instruction=instruction,
            use_resolution_binning=False,
            output_type=output,
            return_dict=False,
            **options,
        )
        return result[0]

    def sampler(self, kind, steps, guidance=4.5, **options):
        if kind == "euler":
            return Sampler(euler, partial(euler_grid, shift=self.shift), steps, guidance, floor=False, **options)
        return Sampler(flow_dpm, partial(dpm_grid, shift=self.shift), steps, guidance, **options)

    def ours(self, kind, steps, prompts, seeds, height, width, guidance=4.5, pag_scale=0.0, layers=None, **options):
        sampler = self.sampler(kind, steps, guidance, pag_scale=pag_scale, pag_layers=layers)
        return self.painter.latents(prompts, seeds, sampler, height, width, **options).squeeze(2)


def error(ours, theirs):
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "the comparison says something"
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("kind", "steps"), [("dpm", 20), ("euler", 28)])
@pytest.mark.parametrize("shape", SHAPES)
def test_latents_of_every_published_shape(gemma, shape, kind, steps, form):
    pair = Pair(gemma, **SHAPES[shape], form=FORMS[form])
    theirs = pair.theirs(kind, steps, PROMPTS, SEEDS, 20, 28)
    assert error(pair.ours(kind, steps, PROMPTS, SEEDS, 20, 28), theirs) < 1e-4


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("kind", ["dpm", "euler"])
def test_few_steps_without_instruction_and_without_guidance(gemma, kind, steps):
    pair = Pair(gemma, **SHAPES["600M"], seed=1)
    theirs = pair.theirs(kind, steps, PROMPTS[:2], SEEDS[:2], 12, 12, guidance_scale=1.0)
    assert error(pair.ours(kind, steps, PROMPTS[:2], SEEDS[:2], 12, 12, guidance=1.0), theirs) < 1e-4


def test_times_that_are_not_rounded_down_show(gemma):
    """Else the tests above would not see the difference between the two schedulers of diffusers."""
    pair = Pair(gemma, **SHAPES["600M"], form=FORMS["diffusers"])
    theirs = pair.theirs("euler", 8, PROMPTS, SEEDS, 12, 12)
    pair.sampler = lambda *a, **k: replace(Pair.sampler(pair, *a, **k), floor=None)
    assert error(pair.ours("euler", 8, PROMPTS, SEEDS, 12, 12), theirs) > 1e-4
    assert pair.network.floor_time


@pytest.mark.parametrize("negative", ["blurry, 2 legs", "a very " + "long " * 30 + "prompt", ""])
@pytest.mark.parametrize("mask", ["own", "caption"])
def test_negative_prompts_under_both_masks(gemma, mask, negative):
    pair = Pair(gemma, **SHAPES["600M"], form=FORMS["diffusers"], seed=2)
    ours = pair.ours("dpm", 20, PROMPTS, SEEDS, 12, 20, negative=negative, negative_mask=mask)
    if mask == "own":
        theirs = pair.theirs("dpm", 20, PROMPTS, SEEDS, 12, 20, negative_prompt=negative)
    else:  # the published scripts: the positive prompts' masks for both halves
        pipeline = SanaPipeline(**pair.pipeline_parts, scheduler=None)
        with torch.no_grad():
            text, rows, other, _ = pipeline.encode_prompt(
                PROMPTS, negative_prompt=negative, complex_human_instruction=FORMS["diffusers"].split("\n")
            )
        theirs = pair.theirs(
            "dpm", 20, None, SEEDS, 12, 20, negative_prompt=None, prompt_embeds=text, prompt_attention_mask=rows,
            negative_prompt_embeds=other, negative_prompt_attention_mask=rows,
        )  # fmt: skip
    assert error(ours, theirs) < 1e-4


def test_images_of_one_prompt_share_its_keys(gemma):
    pair = Pair(gemma, **SHAPES["1.5"], form=FORMS["diffusers"], seed=3)
    counted = []
    prepare = pair.network.prepare
    pair.network.prepare = lambda condition: counted.append(len(condition.text)) or prepare(condition)
    theirs = pair.theirs("dpm", 20, PROMPTS[0], SEEDS, 12, 12, num_images_per_prompt=3)
    assert error(pair.ours("dpm", 20, PROMPTS[:1] * 3, SEEDS, 12, 12), theirs) < 1e-4
    assert counted == [2], "one prompt and nothing, once for all steps and images"


@pytest.mark.parametrize(("guidance", "scale"), [(4.5, 2.5), (1.0, 3.0)])
@pytest.mark.parametrize(("shape", "layer"), [("600M", 1), ("1600M", 0), ("2K", 1)])
@pytest.mark.parametrize("kind", ["dpm", "euler"])
def test_perturbed_attention_guidance(gemma, shape, layer, guidance, scale, kind):
    pair = Pair(gemma, **SHAPES[shape], form=FORMS["diffusers"], seed=4)
    where, options = f"transformer_blocks.{layer}", {"guidance_scale": guidance, "pag_scale": scale}
    theirs = pair.theirs(kind, 20, PROMPTS, SEEDS, 12, 20, pag=where, **options)
    ours = pair.ours(kind, 20, PROMPTS, SEEDS, 12, 20, guidance, scale, [layer])
    assert error(ours, theirs) < 1e-4
    assert error(pair.ours(kind, 20, PROMPTS, SEEDS, 12, 20, guidance), theirs) > 1e-3


class Identity:
    """A processor of diffusers' attention whose weights are the identity."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return attn.to_out[0](attn.to_v(hidden_states))


def test_perturbed_attention_guidance_with_qk_norm_by_its_definition(gemma):
    pair = Pair(gemma, **SHAPES["1.5"], form=FORMS["diffusers"], seed=5)
    layer, guidance, scale = 2, 4.5, 3.0
    pipeline = SanaPipeline(**pair.pipeline_parts, scheduler=None)
    with torch.no_grad():
        text, rows, other, other_rows = pipeline.encode_prompt(
            PROMPTS, complex_human_instruction=FORMS["diffusers"].split("\n")
        )
    scheduler, x = pair.scheduler("dpm"), pair.noise(SEEDS, 12, 20)
    scheduler.set_timesteps(20)
    attention = pair.transformer.transformer_blocks[layer].attn1
    own = attention.processor

    def velocity(x, t, text, rows, processor):
        attention.processor = processor
        with torch.no_grad():
            return pair.transformer(x, text, t.expand(3), encoder_attention_mask=rows, return_dict=False)[0]

    for t in scheduler.timesteps:
        c, u = velocity(x, t, text, rows, own), velocity(x, t, other, other_rows, own)
        p = velocity(x, t, text, rows, Identity())
        x = scheduler.step(u + guidance * (c - u) + scale * (c - p), t, x).prev_sample
    assert error(pair.ours("dpm", 20, PROMPTS, SEEDS, 12, 20, guidance, scale, [layer]), x) < 1e-4


def test_a_network_that_embeds_the_guidance_scale(gemma):
    """SANA-Sprint's teacher: one evaluation per step, with the scale as an input; diffusers' pipeline cannot."""
    pair = Pair(gemma, **SHAPES["1.5"], guidance=True, seed=6)
    scheduler, x = pair.scheduler("euler"), pair.noise(SEEDS, 12, 12)
    scheduler.set_timesteps(20)
    with torch.no_grad():
        pipeline = SanaPipeline(**pair.pipeline_parts, scheduler=None)
        text, rows, _, _ = pipeline.encode_prompt(PROMPTS)
        for t in scheduler.timesteps:
            scale = torch.full((3,), 4.5 * 0.1)
            v = pair.transformer(x, text, t.expand(3), guidance=scale, encoder_attention_mask=rows, return_dict=False)
            x = scheduler.step(v[0], t, x).prev_sample
    assert error(pair.ours("euler", 20, PROMPTS, SEEDS, 12, 12), x) < 1e-4


def test_an_interval_of_guidance_by_its_definition(gemma):
    pair = Pair(gemma, **SHAPES["600M"], seed=7)
    low, high, scale = 0.3, 0.9, 4.5
    scheduler, x = pair.scheduler("dpm"), pair.noise(SEEDS, 12, 12)
    scheduler.set_timesteps(20)
    pipeline = SanaPipeline(**pair.pipeline_parts, scheduler=None)
    with torch.no_grad():
        text, rows, other, other_rows = pipeline.encode_prompt(PROMPTS)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
            c = pair.transformer(x, text, t.expand(3), encoder_attention_mask=rows, return_dict=False)[0]
            u = pair.transformer(x, other, t.expand(3), encoder_attention_mask=other_rows, return_dict=False)[0]
            x = scheduler.step(u + scale * (c - u) if low <= sigma <= high else c, t, x).prev_sample
    sampler = replace(pair.sampler("dpm", 20, scale), interval=(low, high))
    ours = pair.painter.latents(PROMPTS, SEEDS, sampler, 12, 12).squeeze(2)
    assert error(ours, x) < 1e-4


@pytest.mark.parametrize("shape", ["600M", "1.5"])
def test_pixels(gemma, shape):
    pair = Pair(gemma, **SHAPES[shape], form=FORMS["diffusers"], seed=8)
    theirs = pair.theirs("dpm", 20, PROMPTS, SEEDS, 12, 20, output="np")
    ours = pair.painter.draw(PROMPTS, SEEDS, pair.sampler("dpm", 20), 12, 20)
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.02
    assert np.abs(ours / 255 - theirs).max() < 0.51 / 255 + 1e-3


def test_the_layer_to_perturb_follows_the_depth():
    assert [pag_layers(depth) for depth in (20, 28)] == [(8,), (14,)]
    assert all(0 <= pag_layers(depth)[0] < depth for depth in range(1, 61))


def test_dropping_padding_changes_nothing(gemma):
    """The same network over all 300 rows."""
    pair = Pair(gemma, **SHAPES["1.5"], form=FORMS["diffusers"], seed=9)
    encoder = pair.painter.text_encoder
    full, null = encoder.encode(PROMPTS), encoder.null(3)
    assert full.text.shape[1] == 300
    sampler, noise = pair.sampler("dpm", 20), pair.noise(SEEDS, 12, 12).unsqueeze(2)

    def at(condition):
        return lambda x, t: pair.network(x, t[:, None], condition)

    with torch.no_grad():
        c, u = at(Condition(full.text, full.mask)), at(Condition(null.text, null.mask))
        expected = sampler(c, lambda x, t: (c(x, t), u(x, t)), noise).squeeze(2)
    assert error(pair.ours("dpm", 20, PROMPTS, SEEDS, 12, 12), expected) < 1e-5
    assert math.isfinite(expected.sum().item())
