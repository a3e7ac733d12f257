"""Faults injected into a small run: it saves once and stops, or says in one line what is wrong; it never hangs."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from test_recipe import Numbers, Toy, fit, saved
from torch import Tensor
from torch.utils.data import DataLoader

from sana.callback.checkpoints import Checkpoints
from sana.callback.faults import Faults
from sana.checkpoint import sharded
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.run_folder import place_of, read_state
from sana.checkpoint.sharded import Staging, write_pieces
from sana.run.stop import REQUEUE, Stopped, requeue, stopping_at_once

ROOT = Path(__file__).resolve().parents[2]


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


class InStep(Toy):
    """Gets a signal within update 7."""

    number = signal.SIGTERM

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        if 28 in batch.tolist():
            send(self.number)
        super().training_step(batch, batch_idx)


class Between(Callback):
    """Gets a signal in a callback after update 8, as a validation would."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == 8:
            send(signal.SIGUSR1)


class WhileWaiting(Numbers):
    """Gets a signal while the data of update 9 are made."""

    def train_dataloader(self) -> DataLoader[Any]:
        loader = super().train_dataloader()

        def collate(batch: list[int]) -> Tensor:
            if 36 in batch:
                send(signal.SIGUSR2)
            return torch.tensor(batch)

        loader.collate_fn = collate
        return loader


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_within_a_step(tmp_path: Path, number: signal.Signals) -> None:
    recipe = InStep()
    recipe.number = number
    before = signal.getsignal(number)
    fit(recipe, tmp_path, 10**6, callbacks=[Checkpoints(every=100)])
    assert recipe.stopped == number.name
    assert saved(tmp_path) == ["step_00000008.ckpt"]
    assert recipe.samples_seen == 32
    assert signal.getsignal(number) == before


def test_a_signal_between_steps_in_a_save_and_in_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Toy()
    fit(recipe, tmp_path / "a", 10**6, callbacks=[Between(), Checkpoints(every=100)])
    assert (recipe.stopped, saved(tmp_path / "a")) == ("SIGUSR1", ["step_00000008.ckpt"])

    recipe = Toy()
    trainer = Trainer(
        max_steps=10**6, accelerator="cpu", default_root_dir=tmp_path / "b", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Checkpoints(every=100)],
    )  # fmt: skip
    trainer.fit(recipe, datamodule=WhileWaiting(4))
    assert recipe.stopped == "SIGUSR2"
    assert len(saved(tmp_path / "b")) == 1

    write = sharded._write_file

    def slowly(path: Path, *rest: Any) -> Any:
        if "model" in path.name and "00000005" in path.parent.name:
            send(signal.SIGTERM)
        return write(path, *rest)

    monkeypatch.setattr(sharded, "_write_file", slowly)
    recipe = Toy()
    fit(recipe, tmp_path / "c", 10**6, callbacks=[Checkpoints(every=5, keep=20)])
    assert recipe.stopped == "SIGTERM"
    assert "step_00000005.ckpt" in saved(tmp_path / "c")
    assert not list((tmp_path / "c" / "checkpoints").glob("*.tmp"))
    again = Toy()
    fit(again, tmp_path / "d", recipe.updates["main"] + 1, tmp_path / "c")
    assert again.history[0][0] == 4 * recipe.updates["main"]


def test_a_signal_before_there_is_anything_to_save() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM"), stopping_at_once():
        send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_within_an_accumulation_window_it_stops_at_its_end(tmp_path: Path) -> None:
    recipe = InStep(accumulate=2)
    fit(recipe, tmp_path, 10**6, micro=4, callbacks=[Checkpoints(every=100)])
    assert recipe.updates["main"] == 4
    assert recipe.samples_seen == 32
    assert saved(tmp_path) == ["step_00000004.ckpt"]


def test_the_time_limit_saves_once(tmp_path: Path) -> None:
    recipe = Toy()
    trainer = Trainer(
        max_steps=10**9, max_time={"seconds": 1}, accelerator="cpu", default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Checkpoints(every=10**8)],
    )  # fmt: skip
    trainer.fit(recipe, datamodule=Numbers(4))
    assert recipe.stopped == "max_time"
    assert saved(tmp_path) == [f"step_{recipe.updates['main']:08d}.ckpt"]


def test_an_error_while_it_waits_for_a_save_leaves_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the death of a data worker, which torch raises in whatever the main thread is doing."""
    write = sharded._write_file

    def slowly(path: Path, *rest: Any) -> Any:
        time.sleep(0.5)
        return write(path, *rest)

    def fail(*_: Any) -> None:
        raise RuntimeError("a worker is gone")

    monkeypatch.setattr(sharded, "_write_file", slowly)
    before = signal.signal(signal.SIGALRM, fail)
    try:
        # It comes while the second save waits for the first.
        alarm = At(1, lambda: signal.setitimer(signal.ITIMER_REAL, 0.3))
        with pytest.raises(RuntimeError, match="a worker is gone"):
            fit(Toy(), tmp_path, 10**6, callbacks=[alarm, Checkpoints(every=1)])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert saved(tmp_path) == ["step_00000001.ckpt"]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_slurm_is_asked_to_start_the_job_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REQUEUE == os.EX_TEMPFAIL
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert requeue("SIGUSR1") is None
    called = tmp_path / "called"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert requeue("SIGUSR1") == "SLURM job 17 requeued"
    assert requeue("SIGTERM") is None  # SLURM does it itself
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "20")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue("max_time") == "SLURM job 20_3 requeued"
    assert called.read_text() == "requeue 17\nrequeue 20_3\n"


class At(Callback):
    """Does something after an update."""

    def __init__(self, step: int, action: Callable[[], object]) -> None:
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.action()


def test_a_directory_that_vanishes_is_named(tmp_path: Path) -> None:
    gone = At(7, lambda: (tmp_path / "run").rename(tmp_path / "gone"))
    with pytest.raises(
        CheckpointError, match=r"step_000000(05|10)\.ckpt: cannot be written: No such file or directory"
    ):
        fit(Toy(), tmp_path / "run", 10**6, callbacks=[gone, Checkpoints(every=5)])
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"checkpoints: cannot be made: File exists"):
        fit(Toy(), tmp_path, 3)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    """The limit on the size of files stands for the disk: the second write fails in the middle of a file."""
    pieces = Staging()({"model.weight": torch.randn(4096)})
    for step, limit in ((5, None), (6, 8192)):
        place = place_of(tmp_path, step)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            if limit is None:
                write_pieces(place.with_name("a.tmp"), place, step, pieces, {"state.json": b"{}"})
                continue
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            with pytest.raises(CheckpointError, match=r"step_00000006\.ckpt: cannot be written: File too large"):
                write_pieces(place.with_name("a.tmp"), place, step, pieces, {"state.json": b"{}"})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000005.ckpt"]


# In a process of its own: torch raises a worker's death at any line that the main thread is at, pytest's among them.
DEAD_WORKER = """
import multiprocessing, os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from torch.utils.data import DataLoader
from test_faults import At, Checkpoints, Numbers, Toy, Trainer
class Worked(Numbers):
    def train_dataloader(self):
        loader = super().train_dataloader()
        return DataLoader(loader.dataset, batch_sampler=loader.batch_sampler, num_workers=1)
def kill():
    worker, = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
trainer = Trainer(
    max_steps=10**6, accelerator="cpu", default_root_dir={out!r}, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False, callbacks=[At(3, kill), Checkpoints(every=2)],
)
trainer.fit(Toy(), datamodule=Worked(4))
"""


def run_apart(code: str, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code.format(tests=str(Path(__file__).parent), out=str(out))],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=400, check=False,
    )  # fmt: skip


def test_a_dead_data_worker_is_an_error(tmp_path: Path) -> None:
    done = run_apart(DEAD_WORKER, tmp_path)
    assert done.returncode == 1, done.stderr
    assert re.search(r"RuntimeError: DataLoader worker .* (killed by signal|exited unexpectedly)", done.stderr)
    assert "step_00000002.ckpt" in saved(tmp_path)


HANGING = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_recipe import Toy, fit
from sana.callback.faults import Faults
class Hanging(Toy):
    def training_step(self, batch, batch_idx):
        if batch_idx == 2:
            time.sleep(600)
        super().training_step(batch, batch_idx)
fit(Hanging(), Path({out!r}), 5, callbacks=[Faults(patience=2.0)])
"""


@pytest.mark.slow
def test_a_step_that_never_ends_is_shown_and_ended(tmp_path: Path) -> None:
    done = run_apart(HANGING, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Timeout" in done.stderr
    assert "in training_step" in done.stderr


def test_settings_out_of_range() -> None:
    for bad in ({"non_finite": "ignore"}, {"rollback_after": 0}, {"window": 3}):
        with pytest.raises(ValueError, match=r"callback\.faults"):
            Faults(**bad)  # type: ignore[arg-type]


def test_the_state_says_what_was_saved(tmp_path: Path) -> None:
    fit(Toy(), tmp_path, 5)
    state = read_state(tmp_path / "checkpoints" / "step_00000005.ckpt")
    assert json.dumps(state)
    assert (state["world_size"], state["strategy"], state["samples_seen"]) == (1, "SingleDeviceStrategy", 20)
