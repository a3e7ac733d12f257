"""One consistency update of the published 0.6B student at 512 pixels, on a CPU, and what memory it takes."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sana.model.sprint import SprintModule
from sana.run.build import build
from sana.run.compose import compose
from sana.run.environment import fast_precision
from sana.types import Batch, Condition

GIB = 2**20  # ru_maxrss counts KiB


class Captions(nn.Module):
    """The null caption of data whose features are given."""

    def null(self, b: int) -> Condition:
        return Condition(text=torch.zeros(b, 300, 2304), mask=torch.arange(300).expand(b, -1) < 1)


@pytest.mark.slow
@pytest.mark.full_size
def test_a_consistency_update_of_the_published_student() -> None:
    config = compose("train", ["experiment=sprint/student_600m"]).config
    torch.manual_seed(0)
    with torch.device("meta"):  # both start as the same random network
        student = build(config.network, "network")
    student = student.to_empty(device="cpu")
    for name, p in student.named_parameters():
        nn.init.ones_(p) if "norm" in name else nn.init.normal_(p, std=0.02)
    nn.init.zeros_(student.guidance_embed.fc2.weight)
    nn.init.zeros_(student.guidance_embed.fc2.bias)
    assert sum(p.numel() for p in student.parameters()) == 593_501_216
    teacher = build(config.network, "network", guidance_embed=False)
    recipe = SprintModule(
        network=student, autoencoder=nn.Identity(), text_encoder=Captions(), teacher=teacher, discriminator=None,
        timestep=build(config.timestep, "timestep"), fake_timestep=build(config.timestep, "timestep"),
        noise_timestep=build(config.timestep, "timestep"), optimizer=build(config.optimizer, "optimizer"),
        schedule=build(config.schedule, "schedule"), discriminator_optimizer=build(config.optimizer, "optimizer"),
        discriminator_schedule=build(config.schedule, "schedule"), guidance=[4.5], adversarial_weight=0.0,
        tangent_warmup=0, null_mask="caption",
    )  # fmt: skip
    optimizer = recipe.optimisation["network"].optimizer(student.parameters())
    norms: list[Tensor] = []

    def optimise(name: str, loss: Tensor, *others: str) -> None:
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(student.parameters(), 0.1))
        optimizer.step()

    recipe.optimise = optimise  # type: ignore[method-assign]
    recipe.finish_batch = lambda samples: None  # type: ignore[method-assign]
    text, mask = torch.randn(1, 300, 2304), torch.arange(300)[None] < 40
    data = Batch(None, torch.randn(1, 32, 16, 16), ["a"], torch.tensor([5]), ["s"], text=text, text_mask=mask)
    before = student.blocks[3].mixer.qkv.weight.detach().clone()
    fast = fast_precision() == "bf16-mixed"  # where bf16 is emulated, the update takes 12 minutes
    with torch.autocast("cpu", torch.bfloat16, enabled=fast):
        recipe.training_step(replace(data), 0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB
    print(f"peak memory {peak:.1f} GiB, gradient norm {float(norms[0]):.3g}")
    assert torch.isfinite(norms[0])
    assert norms[0] > 0
    assert not torch.equal(before, student.blocks[3].mixer.qkv.weight)
    assert peak < 14
