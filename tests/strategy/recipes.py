"""Recipes and data small enough to be trained under every strategy, and what one process of such a training does.

python recipes.py JOBS.json        as rank LOCAL_RANK of WORLD_SIZE; JOBS is a list of arguments of `run`
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from sana.callback.checkpoints import Checkpoints
from sana.callback.faults import Faults
from sana.flow.timestep import TrigLogNormal
from sana.model.base import Optimisation, Recipe
from sana.model.image import ImageModule
from sana.model.sprint import SprintModule
from sana.network.discriminator import FeatureDiscriminator
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.objective.flow_matching import flow_matching
from sana.optimizer.came import CAME
from sana.quant.fp8_train import fp8_train
from sana.strategy.replicated import Replicated
from sana.strategy.sharded import Sharded
from sana.types import Batch, Condition

WORLD = os.environ.get("WORLD_SIZE", "1")  # Lightning takes it away at the end of each training
BATCH = 12  # global; divides by 1, 2, 3 and 4


class Captions(nn.Module):
    """The null caption of data whose features are given."""

    def null(self, b: int) -> Condition:
        return Condition(text=torch.zeros(b, 5, 24), mask=torch.ones(b, 5, dtype=torch.bool))


class Uniform:
    def __call__(self, u: Tensor) -> Tensor:
        return u


def block_of(head_dim: int) -> Any:
    """What makes a block with two heads of this width."""
    return partial(
        Block,
        mixer=partial(LinearAttention, head_dim=head_dim, qk_norm=True),
        cross=partial(CrossAttention, heads=2, qk_norm=True),
        ffn=MixFFN,
    )


def image(lr: float = 1e-4) -> ImageModule:
    """A SANA of odd widths under CAME, clipping, averaging and caption dropout.

    The seed is one of those (half of them) that leave no channel of a query or key negative for every token. The
    gradient of such a row is rounding noise, which CAME, dividing each row by its own size, turns into full steps: then
    sums in another order lead elsewhere within three updates, under one strategy and another alike.
    """
    torch.manual_seed(6)
    block = block_of(17)
    return ImageModule(
        network=Sana(4, 34, 3, 24, [block], text_norm=1.0),
        autoencoder=nn.Identity(),
        text_encoder=Captions(),
        objective=flow_matching,
        timestep=Uniform(),
        optimizer=partial(CAME, lr=lr),
        schedule=lambda update: min(1.0, (update + 1) / 10),
        clip_norm=0.5,
        ema_decay=0.99,
        caption_dropout=0.2,
        seed=1,
    )


def wide(quantised: bool = True, compile: bool = False, keep: str | None = None) -> ImageModule:
    """As `image`, of widths that FP8 products take; the embeddings and the last layer stay as they are.

    Args:
        quantised: with FP8 products.
        compile: each block.
        keep: of blocks that are recomputed; None: none is.
    """
    torch.manual_seed(6)
    block = block_of(16)
    network = Sana(
        4, 32, 2, 24, [block], text_norm=1.0, checkpoint_every=int(keep is not None), checkpoint_keep=keep or "input"
    )  # type: ignore[arg-type]
    module = ImageModule(
        network=network,
        autoencoder=nn.Identity(),
        text_encoder=Captions(),
        objective=flow_matching,
        timestep=Uniform(),
        optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-5),
        schedule=lambda update: 1.0,
        clip_norm=0.5,
        ema_decay=0.9,
        caption_dropout=0.2,
        seed=1,
        compile=compile,
    )
    if quantised:  # after the recipe is made, as train.py does
        module.network = fp8_train(network, exclude=["*_embed.*", "modulation.*", "final.*"])
    return module


def sprint() -> SprintModule:
    """A few-step student of the same network, with every term of its losses."""
    networks = []
    for guidance in (False, True):
        torch.manual_seed(6)
        block = block_of(17)
        networks.append(Sana(4, 34, 3, 24, [block], text_norm=1.0, time_scale=1.0, guidance_embed=guidance))
    torch.manual_seed(7)
    return SprintModule(
        network=networks[1],
        autoencoder=nn.Identity(),
        text_encoder=Captions(),
        teacher=networks[0],
        discriminator=FeatureDiscriminator(34, [0, 2], group=6),
        timestep=TrigLogNormal(),
        fake_timestep=TrigLogNormal(largest=0.5),
        noise_timestep=TrigLogNormal(-0.6, 1.0),
        optimizer=partial(torch.optim.AdamW, lr=1e-4, eps=1e-5),
        schedule=lambda update: min(1.0, (update + 1) / 4),
        discriminator_optimizer=partial(torch.optim.AdamW, lr=1e-4, eps=1e-5),
        discriminator_schedule=lambda update: 1.0,
        guidance=[2.0, 4.5],
        tangent_warmup=4,
        clip_norm=0.5,
        ema_decay=0.9,
        seed=1,
    )


class Adversarial(Recipe):
    """A generator and a discriminator, each with an optimizer of its own, both updated in every step."""

    def __init__(self) -> None:
        plans = {
            "generator": Optimisation(partial(torch.optim.AdamW, lr=1e-3), lambda u: 1.0, 1.0, 0.9),
            "discriminator": Optimisation(partial(torch.optim.AdamW, lr=2e-3), lambda u: 1.0, 1.0),
        }
        super().__init__(plans, seed=0)
        torch.manual_seed(5)
        self.generator = nn.Sequential(nn.Linear(4, 7), nn.SiLU(), nn.Linear(7, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1))

    def trainables(self) -> dict[str, nn.Module]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.begin_batch(batch.key)
        assert batch.latent is not None
        fake = self.generator(batch.latent[:, :, 0, 0])
        self.discriminator.requires_grad_(False)
        loss = -self.discriminator(fake).mean()
        self.report["train/loss"] = loss.detach()
        self.optimise("generator", loss)
        self.discriminator.requires_grad_(True)
        real = batch.latent[:, :3, 1, 1]
        verdict = (1 - self.discriminator(real)).relu().mean() + (1 + self.discriminator(fake.detach())).relu().mean()
        self.optimise("discriminator", verdict)
        self.finish_batch(len(batch.key))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch.to(device)


class Positions:
    """Micro-batches of one rank, endlessly."""

    def __init__(self, start: int, rank: int, world: int, micro: int | None) -> None:
        self.start, self.rank, self.share = start, rank, BATCH // world
        self.micro = micro or self.share

    def __iter__(self) -> Iterator[list[int]]:
        position = self.start
        while True:
            first = position + self.rank * self.share
            for offset in range(0, self.share, self.micro):
                yield list(range(first + offset, first + offset + self.micro))
            position += BATCH


class Latents(LightningDataModule):
    """Latents and caption features as functions of the position. Position `poison` is not a number."""

    def __init__(self, micro: int | None = None, poison: int | None = None) -> None:
        super().__init__()
        self.micro, self.poison = micro, poison

    def accumulation(self, world: int) -> int:
        return BATCH // world // (self.micro or BATCH // world)

    def collate(self, batch: list[int]) -> Batch:
        rows = [torch.Generator().manual_seed(i) for i in batch]
        latent = torch.stack([torch.randn(4, 4, 6, generator=g) for g in rows])
        text = torch.stack([torch.randn(5, 24, generator=g) for g in rows])
        index = torch.tensor(batch)
        if self.poison is not None:
            latent[index == self.poison] = torch.nan
        mask = torch.ones(len(batch), 5, dtype=torch.bool)
        return Batch(None, latent, [""] * len(batch), index, [f"s{i}" for i in batch], text=text, text_mask=mask)

    def train_dataloader(self) -> DataLoader[Any]:
        trainer = self.trainer
        assert trainer is not None
        seen = trainer.lightning_module.samples_seen
        batches = Positions(seen, trainer.global_rank, trainer.world_size, self.micro)
        return DataLoader(range(10**9), batch_sampler=batches, collate_fn=self.collate)  # type: ignore[arg-type]


class Curve(Callback):
    """Losses over all ranks, by update."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._sum = torch.zeros(())

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        report = pl_module.report  # of recipes whose modules take turns, the loss of whose turn it was
        self._sum = self._sum + report.get("train/loss", report.get("train/discriminator/loss"))
        if pl_module.between_updates:
            mean = trainer.strategy.reduce(self._sum / pl_module.accumulate)
            self.losses.append(float(mean))
            self._sum = torch.zeros(())


KINDS = {
    "image": image,
    "adversarial": Adversarial,
    "sprint": sprint,
    "wide": partial(wide, quantised=False),
    "fp8": wide,
    "fp8 compiled": partial(wide, compile=True),
    "fp8 recomputed": partial(wide, keep="products"),
    "fp8 recomputed from inputs": partial(wide, keep="input"),
}
STRATEGIES = {
    "single": lambda: "auto",
    "ddp": Replicated,
    "fsdp": Sharded,
    "offload": lambda: Sharded(offload=True),
    "low": lambda: Sharded(low_precision=True),
    "hsdp": lambda: Sharded(2),
}


def run(
    out: str,
    strategy: str,
    steps: int,
    kind: str = "image",
    resume: str | None = None,
    micro: int | None = None,
    poison: int | None = None,
    non_finite: str = "stop",
    precision: str = "32-true",
    every: int = 10**6,
    rate: float = 1.0,
) -> dict[str, Any]:
    """Train; rank 0 leaves ``result.pt`` in `out`: losses, and all values of the end, whole."""
    if WORLD != "1":
        os.environ["WORLD_SIZE"] = WORLD
    world = int(WORLD)
    recipe = KINDS[kind]()
    recipe.resume = resume
    if rate != 1:  # of the last two blocks, as after a growth
        names = (name for name, _ in recipe.trainables()["network"].named_parameters())
        recipe.rates = {"network": {name: rate for name in names if name.startswith(("blocks.1.", "blocks.2."))}}
    curve = Curve()
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=world, strategy=STRATEGIES[strategy](), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=out,
        use_distributed_sampler=False, callbacks=[curve, Faults(non_finite), Checkpoints(every=every)],
        precision=precision,
    )  # fmt: skip
    error = ""
    try:
        trainer.fit(recipe, datamodule=Latents(micro, poison))
    except RuntimeError as problem:
        error = f"{type(problem).__name__}: {problem}"
    whole = {name: _full(p).clone() for name, p in recipe.state_dict().items()}
    average = {name: _full(p).clone() for ema in recipe.ema.values() for name, p in ema.shadow.items()}
    outputs = None
    if isinstance(recipe, ImageModule) and not error:
        data = Latents().collate([5, 900, 77])
        assert data.latent is not None
        x, t = data.latent.unsqueeze(2), torch.full((3, 1), 0.3)
        condition = Condition(text=data.text, mask=data.text_mask)  # type: ignore[arg-type]
        with torch.no_grad(), recipe.averaged("network") as averaged:
            network: Any = averaged  # every public method that runs parameters has to gather them
            outputs = [
                network(x, t, condition),
                network(x, t, network.prepare(condition)),
                network(x, t, network.prepare(condition, torch.tensor([0.3]))),
                network.stream(x, t, condition, None)[0],
            ]
    result = {
        "losses": curve.losses, "whole": whole, "average": average, "outputs": outputs, "error": error,
        "samples_seen": recipe.samples_seen, "updates": recipe.updates, "skipped": recipe.skipped,
    }  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(result, Path(out) / "result.pt")
    return result


def _full(value: Tensor) -> Tensor:
    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        run(**job)
