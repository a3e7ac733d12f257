"""The autoencoder's recipe: both phases through a real Trainer, the frozen latent, the export, resume."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from sana.callback.checkpoints import Checkpoints
from sana.callback.reconstruction import Reconstruction
from sana.encoder.autoencoder.dc_ae import DCAE, load
from sana.encoder.autoencoder.fold import moments
from sana.encoder.perceptual import AttributeNet
from sana.metric.psnr import psnr
from sana.model.autoencoder import AutoencoderModule
from sana.model.perceptual import ATTRIBUTES, labelled_scenes, trained_on_scenes
from sana.network.discriminator import PatchDiscriminator
from sana.types import Batch


class Rectangles(LightningDataModule):
    """Grey pictures with one coloured rectangle each; batch n is a function of n."""

    def batch(self, n: int, count: int = 8) -> Batch:
        generator = torch.Generator().manual_seed(n)
        image = torch.zeros(count, 3, 16, 16)
        for picture in image:
            top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
            picture[:, top : top + 7, left : left + 7] = torch.rand(3, 1, 1, generator=generator) * 2 - 1
        index = torch.arange(n * count, (n + 1) * count)
        return Batch(image, None, [""] * count, index, [str(int(i)) for i in index])

    def train_dataloader(self) -> DataLoader:
        start = self.trainer.lightning_module.samples_seen // 8  # type: ignore[union-attr]
        return DataLoader(range(start, 10_000), batch_size=None, collate_fn=self.batch)  # type: ignore[arg-type]

    def validation_batch(self) -> Batch:
        return self.batch(20_000, 32)


def make(seed: int = 0, **changes: object) -> AutoencoderModule:
    torch.manual_seed(seed)
    sides = {"widths": (8, 8, 16), "depths": (0, 1, 1), "attention": (False, False, False)}
    settings: dict[str, object] = {
        "autoencoder": DCAE(
            channels=4,
            scale=1.0,
            decoder_shuffle=True,
            **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in sides.items()},
        ),
        "discriminator": PatchDiscriminator(width=8, depth=2),
        "perceptual_net": AttributeNet(3, widths=(8, 8)),
        "optimizer": partial(torch.optim.AdamW, lr=3e-3),
        "schedule": lambda update: 1.0,
        "discriminator_optimizer": partial(torch.optim.AdamW, lr=1e-3),
        "perceptual_weight": 0.1,
        "adversarial_weight": 0.1,
        "crop": 8,
        "adapt_from": 100,
        "refine_from": 1000,
        "latent_noise": 0.1,
        "ema_decay": 0.9,
        "seed": seed,
    }
    return AutoencoderModule(**{**settings, **changes})  # type: ignore[arg-type]


def fit(recipe: AutoencoderModule, root: Path, steps: int, checkpoint: Path | None = None, callbacks=()) -> Trainer:
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=root, callbacks=list(callbacks), use_distributed_sampler=False,
    )  # fmt: skip
    recipe.resume = checkpoint
    trainer.fit(recipe, Rectangles())
    return trainer


def test_learns_and_exports_a_white_latent(tmp_path) -> None:
    recipe = make()
    held = Rectangles().validation_batch().image
    assert held is not None
    before = psnr(held, recipe.export(held)(held)).mean()
    fit(recipe, tmp_path, 150, callbacks=[Reconstruction(every=150, shown=4)])
    model = load(tmp_path / "autoencoder.safetensors")
    with torch.no_grad():
        mean, covariance = moments(model.encode(held))
        after = psnr(held, model(held)).mean()
    assert mean.abs().max() < 0.02
    torch.testing.assert_close(covariance, torch.eye(4).double(), atol=0.03, rtol=0)
    assert after > before + 5
    assert (tmp_path / "samples" / "step_00000150.png").exists()


def test_export_is_the_trained_function() -> None:
    recipe = make(ema_decay=None)
    images = Rectangles().validation_batch().image
    assert images is not None
    exported = recipe.export(images)
    z = recipe.autoencoder.encode(images)
    z = (z - z.mean((0, 2, 3), keepdim=True)) / z.std((0, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(exported(images), recipe.autoencoder.decode(z), atol=1e-4, rtol=1e-4)


def test_refinement_trains_the_head_alone(tmp_path) -> None:
    recipe = make(adapt_from=1, refine_from=3, ema_decay=None)
    fit(recipe, tmp_path, 3)
    before = {name: p.clone() for name, p in recipe.named_parameters()}
    moving = recipe.normalise.running_mean.clone()  # type: ignore[union-attr]
    trainer = Trainer(
        max_steps=6, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(recipe, Rectangles())
    assert recipe.updates == {"autoencoder": 9, "discriminator": 6}
    changed = {name for name, p in recipe.named_parameters() if not torch.equal(p, before[name])}
    head = {f"autoencoder.decoder.{name}" for name, _ in recipe.autoencoder.decoder.named_parameters()
            if name.startswith(("stages.1.", "norm.", "output."))}  # fmt: skip
    critic = {f"discriminator.{name}" for name, _ in recipe.discriminator.named_parameters()}
    assert changed == head | critic
    assert torch.equal(moving, recipe.normalise.running_mean)  # type: ignore[arg-type]
    assert {"train/adversarial", "train/discriminator/loss"} <= recipe.report.keys()


@pytest.mark.parametrize("stop", [2, 5])  # before and after refinement begins
def test_resume_is_exact(tmp_path, stop: int) -> None:
    whole, first = make(adapt_from=1, refine_from=4), make(adapt_from=1, refine_from=4)
    fit(whole, tmp_path / "whole", 8)
    fit(first, tmp_path / "parts", stop, callbacks=[Checkpoints(every=100)])
    second = make(seed=9, adapt_from=1, refine_from=4)
    second.seed = 0
    second.frozen.perceptual.load_state_dict(whole.frozen.perceptual.state_dict())
    fit(second, tmp_path / "parts", 8, tmp_path / "parts" / "checkpoints" / f"step_{stop:08d}.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert whole.updates == second.updates


def test_crops_belong_to_the_sample() -> None:
    recipe = make()
    image = torch.arange(16 * 20.0).view(1, 1, 16, 20).expand(5, 3, 16, 20)
    index = torch.tensor([4, 11, 4, 90, 7])
    parts = recipe.crops(image, index)
    assert parts.shape == (5, 3, 8, 8)
    torch.testing.assert_close(parts[0], parts[2])
    assert not torch.equal(parts[0], parts[1])
    corners = torch.cat([recipe.crops(image[:1], torch.tensor([i]))[:, 0, 0, 0] for i in range(300)])
    rows, columns = corners // 20, corners % 20
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 8, 0, 12)  # up to the borders, not beyond


def test_noise_belongs_to_the_sample() -> None:
    recipe = make()
    recipe.normalise.eval()
    data = Rectangles().batch(3)
    assert data.image is not None
    order = torch.tensor([5, 1, 7, 0, 2, 3, 6, 4])
    y = recipe.reconstruct(data.image, data.index)
    torch.testing.assert_close(recipe.reconstruct(data.image[order], data.index[order]), y[order])
    assert not torch.equal(recipe.reconstruct(data.image, data.index + 100), y)


def test_refusals() -> None:
    recipe = make()
    data = Rectangles().batch(0)
    data.image, data.latent = None, torch.zeros(8, 4, 4, 4)
    with pytest.raises(ValueError, match="cache_latents=false"):
        recipe.training_step(data, 0)
    with pytest.raises(ValueError, match="crop=6 must be a multiple"):
        make(crop=6)
    with pytest.raises(ValueError, match="adapt_from=7 must not come after"):
        make(adapt_from=7, refine_from=6)
    with pytest.raises(ValueError, match="scale must be 1"):
        make(autoencoder=DCAE(channels=4, scale=0.5, encoder_widths=(8, 16), encoder_depths=(1, 1),
             encoder_attention=(False, False), decoder_widths=(8, 16), decoder_depths=(1, 1),
             decoder_attention=(False, False)))  # fmt: skip


def test_scene_attributes_name_what_is_there() -> None:
    from sana.data.synthetic import make_scene
    from sana.scenes import COLORS, SHAPES

    ((image, target),) = labelled_scenes(1, 6, seed=3)
    assert image.shape == (6, 3, 64, 64)
    assert target.shape == (6, ATTRIBUTES)
    for i, row in enumerate(target):
        objects = make_scene(3, i).objects
        names = [*SHAPES, *COLORS, *((s, c) for s in SHAPES for c in COLORS), 1, 2, 3, 4]
        said = {name for name, on in zip(names, row.tolist(), strict=True) if on}
        pairs = {(o.shape, o.color) for o in objects}
        assert said == {o.shape for o in objects} | {o.color for o in objects} | pairs | {len(objects)}


def test_perceptual_net_is_reproducible() -> None:
    state = torch.get_rng_state()
    a, b = (trained_on_scenes(steps=2, batch=4, seed=1) for _ in range(2))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
