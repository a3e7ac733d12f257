"""The one optimization path, on a recipe small enough to be recomputed by hand."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sana.callback.checkpoints import Checkpoints
from sana.callback.faults import Faults
from sana.callback.records import Records, log_row
from sana.checkpoint import sharded
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.run_folder import STATE, read_manifest, read_state
from sana.checkpoint.sharded import Staging, open_pieces, write_pieces
from sana.model.base import Optimisation, Recipe
from sana.model.diagnose import NonFiniteError
from sana.model.state import PARTS


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
    def __init__(self, batch: int, micro: int | None = None, start: int | None = None) -> None:
        super().__init__()
        self.batch, self.micro, self.start = batch, micro, start

    def train_dataloader(self) -> DataLoader[Any]:
        seen = self.trainer.lightning_module.samples_seen  # type: ignore[union-attr]
        start = seen if self.start is None else self.start
        return DataLoader(range(10**9), batch_sampler=Positions(start, self.micro or self.batch))  # type: ignore[arg-type]


def fit(
    recipe: Toy,
    folder: Path,
    steps: int,
    resume: Path | None = None,
    micro: int | None = None,
    callbacks: Sequence[Callback] | None = None,
    start: int | None = None,
) -> Trainer:
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Checkpoints(every=5)] if callbacks is None else list(callbacks),
    )
    recipe.resume = resume
    trainer.fit(recipe, datamodule=Numbers(4, micro, start))
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
    facts = read_state(tmp_path / "checkpoints" / names[-1])
    assert facts["updates"] == {"main": 17, "second": 9}
    assert set(facts["ema"]) == {"main"}


def test_the_best_are_kept_besides_the_newest(tmp_path: Path) -> None:
    scores = iter([0.3, 0.1, 0.4, 0.15, 0.9, 0.6])

    class Score(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step % 5 == 0:
                log_row(trainer, {"val/loss": next(scores)})

    fit(Toy(), tmp_path, 30, callbacks=[Records(1), Score(), Checkpoints(every=5, keep=1, best=2)])
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000010.ckpt", "step_00000020.ckpt", "step_00000030.ckpt"]


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


def test_a_skipped_update_changes_nothing_and_the_data_go_on(tmp_path: Path) -> None:
    class Without(Toy):
        """Takes no notice of the third batch."""

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            if 9 in batch.tolist():
                self.begin_batch([])
                self.finish_batch(len(batch))
            else:
                super().training_step(batch, batch_idx)

    poisoned, without = Toy(poison=9), Without()
    fit(poisoned, tmp_path / "a", 10, callbacks=[Faults("skip"), Checkpoints(every=5)])
    fit(without, tmp_path / "b", 10)
    assert poisoned.skipped == {"main": 1, "second": 0}
    assert poisoned.updates["main"] == without.updates["main"] == 10
    assert poisoned.samples_seen == without.samples_seen == 44
    assert torch.equal(poisoned.main.weight, without.main.weight)
    assert torch.equal(poisoned.ema["main"].shadow["weight"], without.ema["main"].shadow["weight"])
    assert read_state(tmp_path / "a" / "checkpoints" / "step_00000010.ckpt")["skipped"] == {"main": 1, "second": 0}


def test_after_too_many_skipped_updates_it_goes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(Toy):
        """Not finite on all samples from 24 to 35, whatever the weights."""

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.poison = int(batch[0]) if 24 <= int(batch[0]) < 36 else None
            super().training_step(batch, batch_idx)

    recipe = Broken()
    fit(recipe, tmp_path / "a", 8, callbacks=[Faults("skip", rollback_after=3), Checkpoints(every=5)])
    # Updates 0 to 5 on samples 0 to 23, three skipped, back to update 5, and on with samples 36 to 47.
    assert [batch[0] for batch in recipe.history] == [4 * k for k in range(12)]
    assert recipe.updates["main"] == 8
    assert "3 updates in a row were not finite: resumed from" in capsys.readouterr().err
    fit(Toy(), tmp_path / "b", 5)
    again = Toy()
    fit(again, tmp_path / "c", 8, tmp_path / "b" / "checkpoints" / "step_00000005.ckpt", start=36)
    assert torch.equal(recipe.main.weight, again.main.weight)
    endless = Broken()
    with pytest.raises(NonFiniteError, match="2 updates in a row were not finite, after 0 rollbacks"):
        fit(endless, tmp_path / "d", 8, callbacks=[Faults("skip", 2, max_rollbacks=0), Checkpoints(every=5)])
    with pytest.raises(NonFiniteError, match="there are no checkpoints to go back to"):
        fit(Broken(), tmp_path / "e", 8, callbacks=[Faults("skip", 2)])


def test_a_leap_of_the_loss_is_an_alarm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Leaping(Toy):
        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            usual = 1 + 0.01 * (int(batch[0]) % 3)
            self.report["train/loss"] = torch.tensor(5.0 if int(batch[0]) == 100 else usual)

    fit(Leaping(), tmp_path, 40, callbacks=[Faults(), Checkpoints(every=50)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("alarm")]
    assert len(lines) == 1
    assert "the loss of update 26 is 5" in lines[0]


def test_a_layer_that_is_not_finite_is_named(tmp_path: Path) -> None:
    for broken in range(3):
        torch.manual_seed(0)
        recipe = Toy()
        recipe.main = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))  # type: ignore[assignment]
        layer = recipe.main[broken]
        layer.register_forward_hook(lambda m, i, out: out * torch.where(out > -1e9, torch.inf, 1.0))
        kind = type(layer).__name__
        with pytest.raises(NonFiniteError, match=rf"loss is not finite at update 0 of main; samples sample0.*"
                                                 rf"first bad layer main\.{broken} \({kind}\)") as caught:  # fmt: skip
            fit(recipe, tmp_path / str(broken), 3)
        saved = Path(re.search(r"batch in (\S+);", str(caught.value))[1])  # type: ignore[index]
        assert torch.load(saved, weights_only=True)["batches"][0].tolist() == [0, 1, 2, 3]


def rewrite(place: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """A checkpoint with other facts and tensors, and whole."""
    facts, tensors = read_state(place), dict(open_pieces(place, PARTS).tensors())
    change(facts, tensors)
    step = read_manifest(place).step
    pieces = Staging()({name: value.clone() for name, value in tensors.items()})
    write_pieces(place.with_name("x.tmp"), place, step, pieces, {STATE: json.dumps(facts).encode()})


MISSING = [
    (lambda facts, tensors: facts.pop("ema"), r"missing: ema\.main"),
    (lambda facts, tensors: facts.pop("samples_seen"), "missing: samples_seen"),
    (lambda facts, tensors: tensors.pop("ema.main.bias"), r"missing: ema\.main\.bias"),
    (lambda facts, tensors: tensors.pop("model.second.weight"), r"missing: model\.second\.weight"),
    (lambda facts, tensors: tensors.pop("optimizer.main.bias/momentum_buffer"),
     r"missing: optimizer\.main\.bias/momentum_buffer"),
    (lambda facts, tensors: tensors.update({"model.third": torch.ones(2)}), r"left over: model\.third"),
    (lambda facts, tensors: tensors.update({"model.main.bias": torch.ones(2)}), r"of another shape: model\.main\.bias"),
]  # fmt: skip


def test_what_is_missing_is_named_and_refused_unless_allowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(Toy(), tmp_path / "a", 5)
    place = tmp_path / "a" / "checkpoints" / "step_00000005.ckpt"
    for k, (change, said) in enumerate(MISSING):
        copy = tmp_path / str(k) / "step_00000005.ckpt"
        shutil.copytree(place, copy)
        rewrite(copy, change)  # type: ignore[arg-type]
        with pytest.raises(CheckpointError, match=said):
            fit(Toy(), tmp_path / "b", 10, copy)
    assert "resumed" not in capsys.readouterr().out
    recipe = Toy()
    recipe.allow_partial = True
    fit(recipe, tmp_path / "c", 7, tmp_path / "4" / "step_00000005.ckpt")
    assert recipe.updates["main"] == 7
    assert "optimizer NOT (optimizer.main.bias/momentum_buffer)" in capsys.readouterr().out
    recipe = Toy()
    recipe.allow_partial = True
    fit(recipe, tmp_path / "d", 6, tmp_path / "0" / "step_00000005.ckpt")
    assert recipe.ema["main"].updates == 1


def test_a_file_of_an_older_version_resumes_bitwise(tmp_path: Path) -> None:
    straight, first, second = Toy(), Toy(), Toy()
    fit(straight, tmp_path / "a", 12)
    fit(first, tmp_path / "b", 6)
    content = {
        "state_dict": first.state_dict(),
        "optimizer_states": [o.optimizer.state_dict() for o in first.optimizers()],  # type: ignore[union-attr]
        "updates": first.updates,
        "samples_seen": first.samples_seen,
        "ema": {"main": first.ema["main"].state_dict()},
    }
    torch.save(content, tmp_path / "old.ckpt")
    with torch.no_grad():
        for p in second.parameters():
            p.fill_(7.0)
    fit(second, tmp_path / "c", 12, tmp_path / "old.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(parameters(straight), parameters(second), strict=True))
    assert torch.equal(straight.ema["main"].shadow["weight"], second.ema["main"].shadow["weight"])
    assert second.updates == straight.updates


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Toy(), tmp_path / "a", 10)
    model = tmp_path / "a" / "checkpoints" / "step_00000010.ckpt" / "model.00000.safetensors"
    model.write_bytes(model.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=re.escape(str(model))):
        fit(Toy(), tmp_path / "b", 12, model.parent)
    recipe = Toy()
    fit(recipe, tmp_path / "b", 12, tmp_path / "a")
    said = capsys.readouterr()
    assert str(model) in said.err
    assert "update 5, sample 20" in said.out
    assert recipe.history[0] == [20, 21, 22, 23]


def test_a_save_that_fails_stops_the_run_and_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharded.shutil, "disk_usage", lambda path: usage(1, 1, 0 if saved(tmp_path) else 10**9))
    recipe = Toy()
    with pytest.raises(CheckpointError, match=r"step_00000010\.ckpt: cannot be written: needs .* bytes, 0 are free"):
        fit(recipe, tmp_path, 10**6)
    assert saved(tmp_path) == ["step_00000005.ckpt"]
    assert recipe.updates["main"] < 10**5


class usage(NamedTuple):
    total: int
    used: int
    free: int


def saved(folder: Path) -> list[str]:
    return [p.name for p in (folder / "checkpoints").glob("*.ckpt")]
