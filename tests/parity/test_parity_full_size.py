"""A 512 px image by SANA 0.6B at full size, against diffusers' SanaPipeline, on the CPU in fp32.

Four steps instead of twenty: each takes ten seconds a side on one thread, and every line of code runs in each. The
text encoder has Gemma's width but two layers.
"""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

from sana.checkpoint.diffusers import sana_to_diffusers
from sana.checkpoint.diffusers_dc_ae import dc_ae_to_diffusers
from sana.encoder.text.gemma_random import gemma_random
from sana.flow.grid import dpm_grid
from sana.model.generate import NOISE_SEED, Painter
from sana.ops.random import normal
from sana.run.build import build
from sana.run.compose import compose
from sana.sampler.flow_dpm import flow_dpm
from sana.sampler.guided import Sampler

NEEDED = 10  # GiB: two networks and one autoencoder in fp32, and what a decode at 512 px takes
STEPS = 4
PROMPT, SEED = "a photo of a bench, and a cat asleep on it", 2024


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    return 0.0


@pytest.mark.slow
@pytest.mark.full_size
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="does not know how much memory is free")
def test_a_picture_of_the_full_size_0_6b() -> None:
    if available_gib() < NEEDED:
        pytest.skip(f"{available_gib():.1f} GiB of memory are free, {NEEDED} are needed")
    config = compose("train", ["experiment=image/sana_600m_512px", "encoder.autoencoder.weights=null"]).config
    torch.manual_seed(0)
    network, autoencoder = build(config.network, "network").eval(), build(config.encoder.autoencoder, "encoder").eval()
    assert sum(p.numel() for p in network.parameters()) == 591_747_872
    with torch.no_grad():
        network.text_embed.norm.weight.fill_(1.0)  # at its initial 0.01 the prompt would hardly be heard
    encoder = gemma_random(2304, 2, max_tokens=300, dtype="float32")
    noise = normal(NOISE_SEED, torch.tensor([SEED]), "sampling noise", (32, 1, 16, 16)).squeeze(2)

    painter = Painter(network, autoencoder, encoder, lambda c: encoder.null(len(c.text), c.text.shape[1]))
    sampler = Sampler(flow_dpm, partial(dpm_grid, shift=3.0), STEPS, 4.5)
    latents = painter.latents([PROMPT], [SEED], sampler, 512, 512)
    picture = painter.decode(latents)

    with torch.device("meta"):
        transformer = SanaTransformer2DModel(
            num_attention_heads=36,
            num_layers=28,
            num_cross_attention_heads=16,
            cross_attention_head_dim=72,
            cross_attention_dim=1152,
            sample_size=16,
        )
        kinds = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
        vae = AutoencoderDC(
            encoder_block_types=kinds,
            decoder_block_types=kinds,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            decoder_conv_act_fn="relu",
            scaling_factor=0.41407,
        )
    transformer.load_state_dict(sana_to_diffusers(network.state_dict()), assign=True)
    vae.load_state_dict(dc_ae_to_diffusers(autoencoder.state_dict()), assign=True)
    del painter, network, autoencoder
    gc.collect()
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, final_sigmas_type="zero"
    )
    pipeline = SanaPipeline(encoder.tokenizer, encoder.model, vae.eval(), transformer.eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        PROMPT, num_inference_steps=STEPS, height=512, width=512, latents=noise, complex_human_instruction=None,
        output_type="latent", return_dict=False,
    )[0]  # fmt: skip
    assert theirs.std() > 0.1
    assert ((latents.squeeze(2) - theirs).abs().max() / theirs.abs().max()).item() < 1e-4
    with torch.no_grad():
        image = vae.decode(theirs / 0.41407, return_dict=False)[0]
    want = pipeline.image_processor.postprocess(image, output_type="np")
    assert np.abs(picture / 255 - want).max() < 0.51 / 255 + 1e-3
