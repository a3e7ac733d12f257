"""Checkpoints of a run: whole or absent, written while training goes on, and one at the end however it ends."""

from __future__ import annotations

import json
import math
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Timer

from sana.callback.records import Records
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.run_folder import (
    CONFIG,
    FORMAT,
    STATE,
    TEMPORARY,
    list_checkpoints,
    place_of,
    read_state,
    remove,
    remove_leftovers,
)
from sana.checkpoint.sharded import Piece, Staging, write_pieces
from sana.model.state import facts_of, random_states, tensors_of
from sana.run.stop import StopSignals, name_of

GRACE = 60.0  # seconds that a failing run gives to a save under way


class Checkpoints(Callback):
    """Saves ``checkpoints/step_NNNNNNNN.ckpt`` every few updates, at the end, and when the run is told to end.

    The state is copied, which training waits for, and written in the background; one save is under way at a time. A
    signal lets the update in progress finish; then all ranks save once and stop. A save that fails on one rank stops
    all of them at their next update.

    Args:
        every: updates between checkpoints.
        keep: how many of the newest to keep.
        best: how many to keep besides, of those with the lowest `monitor`.
        monitor: name of a logged number; what was logged last when the checkpoint is written.
    """

    def __init__(self, every: int = 1000, keep: int = 2, best: int = 0, monitor: str = "val/loss") -> None:
        if every < 1 or keep < 1 or best < 0:
            raise ValueError(
                "callback.checkpoints: every and keep must be at least 1 and best at least 0, "
                f"got {every}, {keep} and {best}"
            )
        self.every, self.keep, self.best, self.monitor = every, keep, best, monitor
        self.signals = StopSignals()
        self._staging = Staging()
        self._written: threading.Event | None = None  # by the save under way
        self._error: CheckpointError | None = None
        self._saved = -1
        self._end = math.inf  # of the time that `trainer.max_time` gives
        self._groups: tuple[Any, Any] = (None, None)  # of agreeing, of saving

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Signals and `trainer.max_time` are taken care of here: Lightning's handlers save in the middle of a step, and
        its timer stops behind the back of the callbacks."""
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
        for timer in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(timer, Timer):
                self._end = time.monotonic() + (timer._duration or math.inf)
        others = [c for c in trainer.callbacks if not isinstance(c, Timer)]  # type: ignore[attr-defined]
        trainer.callbacks = others  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Clear what an earlier crash left half-written, and take over the signals: before there are data workers,
        which get a signal to the whole group too and have to live until the update is done.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        if trainer.world_size > 1:
            self._groups = (dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
        if trainer.is_global_zero:
            try:
                self.folder(trainer).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"{self.folder(trainer)}: cannot be made: {error.strerror}") from None
            remove_leftovers(self.folder(trainer))
        self._token = trainer.strategy.broadcast(uuid.uuid4().hex[:8])
        self.signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """What is saved already need not be saved again."""
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save when due; stop when any rank was told to.

        Raises:
            CheckpointError: a save failed.
        """
        if not pl_module.between_updates:
            return
        failed = self._error is not None
        stop, failed, late = self._agree(self.signals.code, int(failed), int(time.monotonic() > self._end))
        if failed:
            self.finish()
            raise CheckpointError(f"{self.folder(trainer)}: another rank could not save")
        step = trainer.global_step
        if step != self._saved and step % self.every == 0:
            with pl_module.timed("checkpoint"):
                self.save(trainer, pl_module)
        if stop or late:
            pl_module.stopped = name_of(stop) if stop else "max_time"
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the end, wait until it is on the disk, and give the signals back."""
        if trainer.global_step != self._saved:
            self.save(trainer, pl_module)
        self.finish()
        self.signals.restore()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Let a save that is under way end, and give the signals back. Nothing new is saved: the state may be half a
        step old."""
        if self._written is not None:
            self._written.wait(GRACE)
        self.signals.restore()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Give the signals back where there was nothing left to train."""
        self.signals.restore()

    def save(self, trainer: Trainer, recipe: Any) -> Path:
        """Copy the state and start writing it.

        Raises:
            CheckpointError: the save before this one failed.
        """
        self.finish()
        step, parent = trainer.global_step, self.folder(trainer)
        pieces = self._staging(tensors_of(recipe), random_states(trainer.global_rank))
        small: dict[str, bytes] = {}
        if trainer.is_global_zero:
            facts = {"format": FORMAT, "step": step, "torch": torch.__version__, **facts_of(recipe)}
            facts["monitor"] = {"name": self.monitor, "value": _logged(trainer, self.monitor)}
            small[STATE] = json.dumps(facts, indent=1).encode()
            config = Path(trainer.default_root_dir) / CONFIG
            if config.is_file():
                small[CONFIG] = config.read_bytes()
        place = place_of(parent, step)
        # `Thread.join` of Python 3.11, broken off by a signal (ctrl-C, a worker's death), takes a thread for ended.
        self._written = threading.Event()
        arguments = (place, step, pieces, small, trainer.is_global_zero, self._written)
        threading.Thread(target=self._write, args=arguments, daemon=True).start()
        self._saved = step
        return place

    def finish(self) -> None:
        """Wait for the save that is under way.

        Raises:
            CheckpointError: it failed.
        """
        if self._written is not None:
            self._written.wait()
            self._written = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self,
        place: Path,
        step: int,
        pieces: dict[str, Piece],
        small: dict[str, bytes],
        first: bool,
        written: threading.Event,
    ) -> None:
        try:
            temporary = place.with_name(f"{place.name}.{self._token}{TEMPORARY}")
            write_pieces(temporary, place, step, pieces, small, self._groups[1])
            if first:
                self._prune(place.parent)
        except CheckpointError as error:
            self._error = error
        except Exception as error:  # a rank is gone; the main thread must not wait for ever
            self._error = CheckpointError(f"{place}: saving failed: {error}")
            self._error.__cause__ = error
        finally:
            written.set()

    def _prune(self, parent: Path) -> None:
        """Drop checkpoints that are neither among the newest nor among the best."""
        found = [place for _, place in list_checkpoints(parent)]
        scores = []
        for place in found if self.best else ():
            try:
                value = read_state(place)["monitor"]["value"] if place.is_dir() else None
            except (CheckpointError, KeyError, TypeError):
                continue
            if value is not None and value == value:
                scores.append((value, place.name, place))
        kept = {*found[: self.keep], *(place for _, _, place in sorted(scores)[: self.best])}
        for place in found:
            if place not in kept:
                try:
                    remove(place)
                except OSError as error:
                    print(f"warning: {place}: an old checkpoint cannot be removed: {error}", flush=True)

    def _agree(self, *values: int) -> tuple[int, ...]:
        """The greatest of each value over all ranks."""
        if self._groups[0] is None:
            return values
        shared = torch.tensor(values)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self._groups[0])
        return tuple(shared.tolist())

    @staticmethod
    def folder(trainer: Trainer) -> Path:
        """Where this run's checkpoints lie."""
        return Path(trainer.default_root_dir) / "checkpoints"


def _logged(trainer: Trainer, name: str) -> float | None:
    """The last logged value of a number."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Records):
            return callback.latest.get(name)
    return None
