"""Drawing in one, two and four steps against diffusers' SanaSprintPipeline with the same random weights and noise.

* diffusers takes no `intermediate_timesteps` but with two steps, and its default is set: others pass None.
* Its pipeline cannot pass a list of times on to its scheduler, which can take one.
* Its fresh noise comes from a generator; here it is given ours.
* Its prompts are lower-cased and stripped, and it reads 300 tokens: as in test_parity_pipeline.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from diffusers import SanaSprintPipeline, SCMScheduler
from diffusers.schedulers import scheduling_scm
from test_parity_pipeline import CHANNELS, FORMS, PROMPTS, SEEDS, Pair, error

from sana.flow.grid import few_step_grid
from sana.model.generate import NOISE_SEED
from sana.ops.random import normal
from sana.sampler.guided import FewStep
from sana.sampler.scm import few_step

SHAPES = {
    "0.6B": dict(heads=3, cross=4, depth=3, shift=3.0, sample=32, qk_norm=True, guidance=True),
    "1.6B": dict(heads=5, cross=2, depth=2, shift=3.0, sample=32, qk_norm=True, guidance=True),
}


class Listed(SCMScheduler):
    """The scheduler as its pipeline calls it with a list."""

    def set_timesteps(self, num_inference_steps=None, timesteps=None, **options):
        if timesteps is None:
            return super().set_timesteps(num_inference_steps, **options)
        return super().set_timesteps(len(timesteps) - 1, timesteps, **options)


class Sprint(Pair):
    """The same weights on both sides; the network sees t itself."""

    def __init__(self, gemma, form=None, seed=0, **shape):
        super().__init__(gemma, form=form, seed=seed, **shape)
        self.network.time_scale, self.network.floor_time = 1.0, False

    def theirs(self, steps, prompts, seeds, height, width, monkeypatch, guidance=4.5, times=None):
        pipeline = SanaSprintPipeline(**self.pipeline_parts, scheduler=Listed())
        pipeline.set_progress_bar_config(disable=True)
        made = []

        def fresh(shape, **_):
            made.append(shape)
            noise = normal(NOISE_SEED, torch.tensor(seeds), f"sampling noise {len(made)}", (CHANNELS, 1, *shape[2:]))
            return noise.squeeze(2)

        monkeypatch.setattr(scheduling_scm, "randn_tensor", fresh)
        options = {"intermediate_timesteps": 1.3 if steps == 2 and times is None else None}
        if times is not None:
            options |= {"timesteps": [*times, 0.0], "max_timesteps": None}
        return pipeline(
            prompt=prompts, num_inference_steps=steps, height=32, width=32, latents=self.noise(seeds, height, width),
            guidance_scale=guidance, complex_human_instruction=None if self.form is None else self.form.split("\n"),
            use_resolution_binning=False, output_type="latent", return_dict=False, **options,
        )[0]  # fmt: skip

    def ours(self, steps, prompts, seeds, height, width, guidance=4.5, times=None):
        sampler = FewStep(few_step, partial(few_step_grid, times=times), steps, guidance)
        return self.painter.latents(prompts, seeds, sampler, height, width).squeeze(2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_latents_in_few_steps(gemma, shape, steps, form, monkeypatch):
    pair = Sprint(gemma, FORMS[form], seed=steps, **SHAPES[shape])
    theirs = pair.theirs(steps, PROMPTS, SEEDS, 20, 28, monkeypatch)
    assert error(pair.ours(steps, PROMPTS, SEEDS, 20, 28), theirs) < 1e-4


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_list_of_times_and_other_guidance(gemma, guidance, monkeypatch):
    pair, times = Sprint(gemma, None, seed=7, **SHAPES["0.6B"]), [1.5683, 1.4, 1.1]
    theirs = pair.theirs(3, PROMPTS, SEEDS, 12, 20, monkeypatch, guidance, times)
    assert error(pair.ours(3, PROMPTS, SEEDS, 12, 20, guidance, times), theirs) < 1e-4
    assert error(pair.ours(3, PROMPTS, SEEDS, 12, 20, 3.0, times), theirs) > 1e-4, "the scale is heard"
