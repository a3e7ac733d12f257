"""The few-step recipe: its start, its turns, a closed form through its own loss, going on in the middle of a turn."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sana.callback.alarms import Alarms
from sana.callback.checkpoints import Checkpoints
from sana.checkpoint.error import CheckpointError
from sana.flow.timestep import TrigLogNormal
from sana.flow.trig import trig_field, x0_from_field
from sana.model.sprint import SprintModule
from sana.model.teacher import start_student
from sana.network.discriminator import FeatureDiscriminator
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.optimizer.schedule import constant
from sana.types import Batch, Condition

WIDTH, DEPTH = 34, 3


class Captions(nn.Module):
    """The null caption of data whose features are given."""

    def null(self, b: int) -> Condition:
        return Condition(text=torch.zeros(b, 5, 24), mask=torch.ones(b, 5, dtype=torch.bool))


def network(guidance: bool = True, time_scale: float = 1.0, seed: int = 0, every: int = 0) -> Sana:
    torch.manual_seed(seed)
    block = partial(
        Block,
        mixer=partial(LinearAttention, head_dim=17, qk_norm=True),
        cross=partial(CrossAttention, heads=2, qk_norm=True),
        ffn=MixFFN,
    )
    return Sana(4, WIDTH, DEPTH, 24, [block], text_norm=1.0, time_scale=time_scale, guidance_embed=guidance,
                checkpoint_every=every)  # fmt: skip


def sprint(teacher: nn.Module | None = None, student: nn.Module | None = None, **settings: Any) -> SprintModule:
    torch.manual_seed(11)
    options: dict[str, Any] = {
        "guidance": [2.0, 4.5], "tangent_warmup": 4, "clip_norm": 1.0, "ema_decay": 0.9, "seed": 3,
        "discriminator": FeatureDiscriminator(WIDTH, [0, 2]),
    }  # fmt: skip
    return SprintModule(
        network=student or network(seed=1), autoencoder=nn.Identity(), text_encoder=Captions(),
        teacher=network(guidance=False) if teacher is None else teacher,
        timestep=TrigLogNormal(), fake_timestep=TrigLogNormal(largest=0.5), noise_timestep=TrigLogNormal(-0.6, 1.0),
        optimizer=partial(torch.optim.AdamW, lr=1e-3), schedule=constant(2),
        discriminator_optimizer=partial(torch.optim.AdamW, lr=2e-3), discriminator_schedule=constant(),
        **(options | settings),
    )  # fmt: skip


def batch(first: int = 0, b: int = 6) -> Batch:
    rows = [torch.Generator().manual_seed(i) for i in range(first, first + b)]
    latent = torch.stack([torch.randn(4, 4, 6, generator=g) for g in rows])
    text = torch.stack([torch.randn(5, 24, generator=g) for g in rows])
    mask = torch.arange(5) < torch.tensor([3 + i % 3 for i in range(b)])[:, None]
    names = [f"s{i}" for i in range(first, first + b)]
    return Batch(None, latent, [""] * b, torch.arange(first, first + b), names, text=text, text_mask=mask)


class Latents(LightningDataModule):
    """Batches of six, from the first sample that the recipe has not seen."""

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        seen = self.trainer.lightning_module.samples_seen

        def positions() -> Iterator[int]:
            return count(seen, 6)

        class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
            def __iter__(self) -> Iterator[int]:
                return positions()

        return DataLoader(Stream(), batch_size=None, collate_fn=batch)


class Turns(Callback):
    """What every batch was used for, and the numbers of the student's updates."""

    def __init__(self) -> None:
        self.turns: list[str] = []
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.turns.append(pl_module.phase[0])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if self.turns[-1] == "n":
            self.rows.append({name: float(value) for name, value in pl_module.report.items()})


def fit(recipe: SprintModule, folder: Path, steps: int, every: int = 100, resume: Path | None = None) -> Turns:
    turns, recipe.resume = Turns(), resume
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[turns, Checkpoints(every=every)],
    )  # fmt: skip
    trainer.fit(recipe, datamodule=Latents())
    return turns


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_a_student_starts_as_its_teacher(guidance: float) -> None:
    teacher, recipe = network(guidance=False), sprint(mismatch=False)
    data = batch()
    plain = Condition(data.text, data.text_mask)  # type: ignore[arg-type]
    given = Condition(data.text, data.text_mask, torch.full((6,), guidance))  # type: ignore[arg-type]
    x, t = recipe.latents(data), torch.rand(6, 1)
    assert torch.equal(recipe.network(x, t, given), teacher(x, t, plain))


def test_a_student_in_another_unit_of_time_nearly_so() -> None:
    teacher, student = network(guidance=False, time_scale=1000.0), network(seed=4)
    assert 0 < start_student(student, teacher) < 1.5
    with torch.no_grad():  # what it cannot follow is how fast a random embedding changes; a slow one it follows
        teacher.time_embed.fc1.weight[:, torch.arange(256) % 128 < 100] = 0
    assert start_student(student, teacher) < 1e-3
    data, t = batch(), torch.linspace(0.05, 1, 6)[:, None]
    text = (data.text, data.text_mask)
    found = student(data.latent.unsqueeze(2), t, Condition(*text, torch.full((6,), 4.5)))  # type: ignore[union-attr, arg-type]
    expected = teacher(data.latent.unsqueeze(2), t, Condition(*text))  # type: ignore[union-attr, arg-type]
    assert ((found - expected).norm() / expected.norm()).item() < 1e-3


def test_turns_are_counted_once(tmp_path: Path) -> None:
    recipe = sprint()
    turns = fit(recipe, tmp_path, 5)
    assert "".join(turns.turns) == "ndndndndn"
    assert recipe.updates == {"network": 5, "uncertainty": 5, "discriminator": 4}
    assert recipe.samples_seen == 9 * 6
    assert recipe.trainer.global_step == 5
    assert [row["train/tangent_warmup"] for row in turns.rows] == [0.25, 0.5, 0.75, 1.0, 1.0]
    last = turns.rows[-1]
    names = "scm generator tangent_norm grad_norm discriminator/loss discriminator/mismatch discriminator/grad_norm"
    assert last.keys() >= {f"train/{name}" for name in names.split()}
    assert all(math.isfinite(value) for value in last.values())
    assert last["train/loss"] == pytest.approx(last["train/scm"] + 0.5 * last["train/generator"], abs=1e-5)


def test_the_discriminator_may_join_in_later(tmp_path: Path) -> None:
    recipe = sprint(adversarial_start=2, step=0.2)
    turns = fit(recipe, tmp_path / "a", 5, every=3)
    assert "".join(turns.turns) == "nnndndn"
    assert ["train/generator" in row for row in turns.rows] == [False, False, True, True, True]
    assert recipe.updates == {"network": 5, "uncertainty": 5, "discriminator": 2}
    again = sprint(adversarial_start=2, step=0.2)
    fit(again, tmp_path / "b", 5, resume=tmp_path / "a" / "checkpoints" / "step_00000003.ckpt")
    for name, value in recipe.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_going_on_in_the_middle_of_a_turn_is_bitwise(tmp_path: Path) -> None:
    """A checkpoint is made after an update of the student, when the discriminator's is still to come."""
    straight = sprint()
    fit(straight, tmp_path / "a", 6, every=3)
    again = sprint()
    turns = fit(again, tmp_path / "b", 6, resume=tmp_path / "a" / "checkpoints" / "step_00000003.ckpt")
    assert "".join(turns.turns) == "dndndn"
    for name, value in straight.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    for name, value in straight.ema["network"].shadow.items():
        assert torch.equal(again.ema["network"].shadow[name], value), name
    assert (again.updates, again.samples_seen) == (straight.updates, straight.samples_seen)


@pytest.mark.parametrize(
    ("settings", "turns", "terms"),
    [
        ({"adversarial_weight": 0.0}, "nnn", {"train/scm"}),
        ({"scm_weight": 0.0}, "ndndn", {"train/generator"}),
        ({"uncertainty": False, "mismatch": False, "r1_weight": 0.1}, "ndndn", {"train/scm", "train/generator"}),
        ({"step": 0.2}, "ndndn", {"train/scm", "train/generator"}),
    ],
)
def test_a_weight_of_zero_turns_a_term_off(tmp_path: Path, settings: dict, turns: str, terms: set) -> None:
    recipe = sprint(**settings)
    seen = fit(recipe, tmp_path, 3)
    assert "".join(seen.turns) == turns
    assert seen.rows[-1].keys() & {"train/scm", "train/generator"} == terms
    derived = "train/scm" in terms and "step" not in settings
    assert ("train/tangent_norm" in seen.rows[-1]) == derived, "the semi-discrete form takes no derivative"
    assert ("train/discriminator/r1" in seen.rows[-1]) == ("r1_weight" in settings)
    assert ("uncertainty" in recipe.updates) == (terms >= {"train/scm"} and settings.get("uncertainty", True))
    assert ("discriminator" in recipe.trainables()) == ("train/generator" in terms)


def test_the_gradient_is_that_of_both_losses(tmp_path: Path) -> None:
    """Each term alone, weighted and added, gives the gradient of one step of both."""

    def gradient(**settings: Any) -> dict[str, Tensor]:
        recipe = sprint(**settings)
        recipe.trainer = type("T", (), {"world_size": 1})()  # type: ignore[assignment]
        recipe.optimise = lambda name, loss, *others: loss.backward()  # type: ignore[method-assign]
        recipe.training_step(batch(), 0)
        return {n: p.grad.clone() for n, p in recipe.network.named_parameters() if p.grad is not None}

    both = gradient(adversarial_weight=0.3, scm_weight=2.0)
    scm = gradient(adversarial_weight=0.0)
    adversarial = gradient(scm_weight=0.0, adversarial_weight=1.0)
    assert both.keys() == adversarial.keys() == dict(network().named_parameters()).keys()
    for name, value in both.items():
        expected = 2.0 * scm.get(name, torch.zeros_like(value)) + 0.3 * adversarial[name]
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-6)


def test_guided_teacher_and_its_features() -> None:
    recipe, data = sprint(), batch()
    x, tau = recipe.latents(data), torch.rand(6, 1) + 0.2
    teacher, scales = network(guidance=False), recipe.scales(data.index)
    assert set(scales.tolist()) == {2.0, 4.5}
    plain = Condition(data.text, data.text_mask)  # type: ignore[arg-type]
    null = Condition(torch.zeros_like(data.text), torch.ones(6, 5, dtype=torch.bool))  # type: ignore[arg-type]
    c, u = (trig_field(lambda x, t, w=w: teacher(x, t, w))(x, tau) for w in (plain, null))
    expected = u + scales.view(-1, 1, 1, 1, 1) * (c - u)
    found = recipe.teacher_field(x, tau, Condition(data.text, data.text_mask, scales))  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    one, two = (recipe.features(x, plain, data.index, name) for name in ("real", "fake"))
    assert one.keys() == {0, 2}
    assert not torch.equal(one[2], two[2]), "independent noise"


class Gaussian(nn.Module):
    """The velocity of data N(m, s^2) in every number, whatever the caption: a teacher in closed form."""

    time_scale = 1.0
    mean, spread = 0.4, 0.8

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        t = t.view(-1, 1, 1, 1, 1)
        rest = (x - (1 - t) * self.mean) / ((1 - t).square() * self.spread**2 + t.square())
        return t * rest - (self.mean + (1 - t) * self.spread**2 * rest)


class Pointwise(nn.Module):
    """A student for numbers that know nothing of each other."""

    time_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.guidance_embed = nn.Linear(1, 1)
        self.net = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        given = torch.stack([x, t.view(-1, 1, 1, 1, 1).expand_as(x)], dim=-1)
        return Gaussian().forward(x, t, condition) + self.net(given).squeeze(-1)


@pytest.mark.long
def test_a_student_of_gaussian_data_reaches_the_closed_form(tmp_path: Path) -> None:
    """One step from pure noise comes within 0.06 of where the teacher's path ends, through the recipe's own loss. With
    the learned scale, which weighs all times alike, 1,500 updates come within 0.17 only."""

    class Student(Pointwise):
        def load_state_dict(self, *a: Any, **k: Any) -> Any:
            return None

    class Points(LightningDataModule):
        def train_dataloader(self) -> DataLoader[Any]:
            def make(first: int) -> Batch:
                g = torch.Generator().manual_seed(first)
                latent = 0.4 + 0.8 * torch.randn(64, 2, 4, 4, generator=g)
                text, mask = torch.zeros(64, 5, 24), torch.ones(64, 5, dtype=torch.bool)
                index = torch.arange(first, first + 64)
                return Batch(None, latent, [""] * 64, index, [""] * 64, text=text, text_mask=mask)

            return DataLoader(range(0, 10**6, 64), batch_size=None, collate_fn=make)  # type: ignore[arg-type]

    torch.manual_seed(0)
    recipe = SprintModule(
        network=Student(), autoencoder=nn.Identity(), text_encoder=Captions(), teacher=None, discriminator=None,
        timestep=TrigLogNormal(), fake_timestep=TrigLogNormal(), noise_timestep=TrigLogNormal(),
        optimizer=partial(torch.optim.Adam, lr=2e-3), schedule=lambda n: 0.5 * (1 + math.cos(math.pi * n / 1500)),
        discriminator_optimizer=partial(torch.optim.Adam, lr=1e-3), discriminator_schedule=constant(),
        guidance=[4.5], adversarial_weight=0.0, tangent_warmup=300, clip_norm=None, uncertainty=False,
    )  # fmt: skip
    recipe.frozen._modules["teacher"] = Gaussian()
    trainer = Trainer(
        max_steps=1500, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(recipe, datamodule=Points())
    x = torch.randn(500, 2, 1, 4, 4)
    tau = torch.full((500, 1), math.pi / 2 - 1e-3)
    nothing = Condition(torch.zeros(500, 5, 24), None, torch.full((500,), 4.5))
    with torch.no_grad():
        one = x0_from_field(x, tau, recipe.field(nothing)(x, tau))
    c, s = math.cos(math.pi / 2 - 1e-3), math.sin(math.pi / 2 - 1e-3)
    end = 0.4 + 0.8 * (x - c * 0.4) / math.sqrt(c**2 * 0.64 + s**2)
    assert (one - end).square().mean().sqrt() < 0.06
    assert (x0_from_field(x, tau, trig_field(lambda x, t: Gaussian()(x, t, nothing))(x, tau)) - end).std() > 0.5


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="embeds the guidance scale"):
        sprint(student=network(guidance=False))
    with pytest.raises(ValueError, match="one of the first two is positive"):
        sprint(scm_weight=0.0, adversarial_weight=0.0)
    with pytest.raises(ValueError, match=r"step is an angle in \(0, pi/2\) or null, got 1\.6"):
        sprint(step=1.6)
    for settings in ({"adversarial_start": -1}, {"adversarial_start": 5, "scm_weight": 0.0}):
        with pytest.raises(ValueError, match="adversarial_start is not negative, and 0 where scm_weight is 0"):
            sprint(**settings)
    deeper = network(guidance=False)
    deeper.blocks.append(network().blocks[0])  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"cannot start as its teacher: missing none, left over blocks\.3"):
        sprint(teacher=deeper)
    recipe = sprint(discriminator=None)
    with pytest.raises(ValueError, match=r"model\.discriminator: needed unless"):
        fit(recipe, tmp_path, 1)


def test_alarms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alarms = Alarms({"train/tangent_norm": 1e-6, "train/grad_norm": 1e9, "train/nothing": 1.0})
    recipe = sprint()
    trainer = Trainer(
        max_steps=2, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[alarms],
    )  # fmt: skip
    trainer.fit(recipe, datamodule=Latents())
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alarm")]
    assert len(said) == alarms.count == 2
    assert "alarm: train/tangent_norm of update 1 is" in said[0]
    with pytest.raises(ValueError, match="positive bounds"):
        Alarms({})
