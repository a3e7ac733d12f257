"""The one optimization path, on a recipe small enough to be recomputed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sana.callback.checkpoints import Checkpoints
from sana.model.base import NonFiniteError, Optimisation, Recipe


class Toy(Recipe):
    """Two linear maps: "main" fits y = 3x, "second" is pushed to zero on every other micro-batch."""

    def __init__(self, accumulate: int = 1, clip: float | None = None, poison: int | None = None) -> None:
        plan = Optimisation(partial(torch.optim.SGD, lr=0.1, momentum=0.9), lambda u: min(1.0, (u + 1) / 4), clip, 0.9)
        second = Optimisation(partial(torch.optim.SGD, lr=0.01), lambda u: 1.0)
        super().__init__({"main": plan, "second": second}, seed=0, accumulate=accumulate)
        torch.manual_seed(0)
        self.main, self.second = nn.Linear(1, 1), nn.Linear(1, 1)
        self.poison, self.history = poison, []

    def trainables(self) -> dict[str, nn.Module]:
        return {"main": self.main, "second": self.second}

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.begin_batch([f"sample{int(i)}" for i in batch])
        x = torch.sin(batch.float())[:, None]
        loss = (self.main(x) - 3 * x).square().mean()
        if self.poison is not None and self.poison in batch.tolist():
            loss = loss * float("nan")
        self.optimise("main", loss)
        if self.accumulate == 1 and self.updates["main"] % 2:
            self.optimise("second", self.second(x).square().mean())
        self.history.append(batch.tolist())
        self.finish_batch(len(batch))


class Positions:
    """Endless micro-batches of consecutive positions."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.size = start, size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(first, first + self.size)) for first in count(self.start, self.size))


class Numbers(LightningDataModule):
    def __init__(self, batch: int, micro: int | None = None) -> None:
        super().__init__()
        self.batch, self.micro = batch, micro

    def train_dataloader(self) -> DataLoader[Any]:
        start = self.trainer.lightning_module.samples_seen  # type: ignore[union-attr]
        return DataLoader(range(10**9), batch_sampler=Positions(start, self.micro or self.batch))  # type: ignore[arg-type]


def fit(recipe: Toy, folder: Path, steps: int, resume: Path | None = None, micro: int | None = None) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Checkpoints(every=5)],
    )
    recipe.resume = resume
    trainer.fit(recipe, datamodule=Numbers(4, micro))
    return trainer


def parameters(recipe: Toy) -> list[Tensor]:
    return [p.detach().clone() for p in recipe.parameters()]


def test_counts_and_reports(tmp_path: Path) -> None:
    recipe = Toy()
    trainer = fit(recipe, tmp_path, 7)
    assert trainer.global_step == 7
    assert recipe.updates == {"main": 7, "second": 4}
    assert recipe.samples_seen == 28
    assert recipe.report["train/lr"] == pytest.approx(0.1)
    assert set(recipe.report) >= {"train/grad_norm", "train/lr", "train/second/grad_norm", "train/second/lr"}
    assert [p for batch in recipe.history for p in batch] == list(range(28))


def test_updates_equal_a_loop_by_hand(tmp_path: Path) -> None:
    recipe = Toy(clip=0.5)
    fit(recipe, tmp_path, 6)
    torch.manual_seed(0)
    weight, bias = (p.detach().double().clone() for p in nn.Linear(1, 1).parameters())
    w, c = float(weight), float(bias)
    mw = mc = 0.0
    average = [w, c]
    for step in range(6):
        x = torch.sin(torch.arange(4 * step, 4 * step + 4).double())
        error = w * x + c - 3 * x
        gw, gc = float((2 * error * x).mean()), float((2 * error).mean())
        norm = (gw**2 + gc**2) ** 0.5
        factor = min(1.0, 0.5 / (norm + 1e-6))
        gw, gc = gw * factor, gc * factor
        mw, mc = 0.9 * mw + gw, 0.9 * mc + gc
        lr = 0.1 * min(1.0, (step + 1) / 4)
        w, c = w - lr * mw, c - lr * mc
        decay = min(0.9, (2 + step) / (11 + step))
        average = [decay * a + (1 - decay) * new for a, new in zip(average, (w, c), strict=True)]
    assert recipe.main.weight.item() == pytest.approx(w, rel=1e-5)
    assert recipe.main.bias.item() == pytest.approx(c, rel=1e-5)
    with recipe.averaged("main") as module:
        assert module.weight.item() == pytest.approx(average[0], rel=1e-5)
        assert module.bias.item() == pytest.approx(average[1], rel=1e-5)
        assert not module.training
    assert recipe.main.weight.item() == pytest.approx(w, rel=1e-5)
    assert recipe.main.training


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = Toy(accumulate=1), Toy(accumulate=2)
    fit(whole, tmp_path / "a", 5)
    trainer = fit(parts, tmp_path / "b", 5, micro=2)
    assert trainer.global_step == 5
    assert parts.samples_seen == whole.samples_seen == 20
    assert torch.allclose(whole.main.weight, parts.main.weight, rtol=1e-6)


def test_resume_is_bitwise(tmp_path: Path) -> None:
    straight, first, second = Toy(), Toy(), Toy()
    fit(straight, tmp_path / "a", 20)
    fit(first, tmp_path / "b", 10)
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(7.0)  # whatever is not restored shows
    fit(second, tmp_path / "c", 20, tmp_path / "b" / "checkpoints" / "step_00000010.ckpt")
    assert first.history + second.history == straight.history
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(second), strict=True))
    ours, theirs = second.ema["main"].state_dict(), straight.ema["main"].state_dict()
    assert ours["updates"] == theirs["updates"] == 20
    assert all(torch.equal(ours["shadow"][k], theirs["shadow"][k]) for k in theirs["shadow"])
    assert second.updates == straight.updates
    assert second.samples_seen == straight.samples_seen


def test_checkpoints_are_kept_by_number_and_whole(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000001.ckpt.tmp").write_bytes(b"left by a crash")
    fit(Toy(), tmp_path, 17)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000015.ckpt", "step_00000017.ckpt"]
    content = torch.load(tmp_path / "checkpoints" / names[-1], weights_only=True)
    assert content["updates"] == {"main": 17, "second": 9}
    assert set(content["ema"]) == {"main"}


def test_a_loss_that_is_not_finite_stops_at_once(tmp_path: Path) -> None:
    recipe = Toy(poison=9)
    with pytest.raises(NonFiniteError, match=r"loss is not finite at update 2 of main; samples sample8, sample9"):
        fit(recipe, tmp_path, 10)
    assert recipe.updates["main"] == 2


def test_a_gradient_that_is_not_finite_names_the_parameter(tmp_path: Path) -> None:
    recipe = Toy()
    recipe.main.bias.register_hook(lambda grad: grad * float("inf"))
    before = parameters(recipe)
    with pytest.raises(NonFiniteError, match="gradient is not finite, first in bias"):
        fit(recipe, tmp_path, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(recipe), strict=True))


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    fit(Toy(), tmp_path / "a", 5)
    path = tmp_path / "a" / "checkpoints" / "step_00000005.ckpt"
    content = torch.load(path, weights_only=True)
    del content["ema"]
    torch.save(content, path)
    with pytest.raises(KeyError, match="has no 'ema'"):
        fit(Toy(), tmp_path / "b", 10, path)
