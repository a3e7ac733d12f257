"""What could not be read while training: a report, a count on the progress line, and an end when it is too much."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, Trainer

from sana.run.error import ConfigError
from sana.types import Bad, Batch, Clip

ENOUGH = 500
"""Samples from which on a part of them is taken to be the part of all."""


class TooManyBadSamples(ConfigError):
    """More of the data cannot be read than `data.max_bad_fraction` allows."""


class BadSamples(Callback):
    """Writes ``bad_samples.jsonl`` (update, shard, key, reason), counts, and stops a run on data that is mostly broken.

    What was found when the data were indexed stands there with update 0, the others with the update that lacked them.
    All ranks decide at the same update, on the counts of all. The part that is compared with `data.max_bad_fraction`
    is that of the samples of this run so far; until there were `ENOUGH`, only what would be too many of so many
    stops it. The shares of the captions' sources go into the metrics as ``data/caption/<source>``.

    Args:
        every: updates between the exchanges of ranks; a single process looks at every batch.
    """

    def __init__(self, every: int = 20) -> None:
        if every < 1:
            raise ValueError(f"callback.bad_samples.every must be at least 1, got {every}")
        self.every = every
        self._waiting: list[tuple[int, Bad]] = []
        self._seen = 0  # samples of this rank since the last exchange
        self._total = self._bad = 0  # of all ranks
        self._indexed = 0  # bad samples that were found when the data were indexed
        self._captions: Counter[str] = Counter()
        self._exchanged = -1

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Tell the data that bad samples are taken care of."""
        if hasattr(trainer.datamodule, "reported"):  # type: ignore[attr-defined]
            trainer.datamodule.reported = True  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Report what was found unfit when the data were indexed.

        Raises:
            TooManyBadSamples: that is too much already.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not hasattr(data, "sources"):
            return
        sources = data.sources()
        found = [Bad(entry.shard, entry.key, entry.reason) for source in sources for entry in source.bad]
        self._indexed = data.bad = len(found)
        self._write(trainer, [(0, bad) for bad in found])
        self._judge(trainer, data, self._indexed, self._indexed + sum(map(len, sources)), found)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count; exchange when due."""
        if not isinstance(batch, Batch | Clip):
            return
        step = trainer.global_step
        self._waiting += [(step, bad) for bad in batch.bad]
        self._seen += len(batch.key)
        self._captions.update(source for source in batch.source if source)
        if trainer.world_size == 1 or (step % self.every == 0 and step != self._exchanged):
            self._exchange(trainer, step)
        pl_module.report["data/bad"] = float(self._indexed + self._bad)
        captions = self._captions.total()
        for source, count in self._captions.items():
            pl_module.report[f"data/caption/{source}"] = count / captions

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Report what was not exchanged yet."""
        if self._total + self._seen:
            self._exchange(trainer, trainer.global_step, judge=False)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Judge the whole of a run that came to its end, when its last checkpoint is written.

        Raises:
            TooManyBadSamples: on all ranks.
        """
        if self._total and not trainer.should_stop:
            self._judge(trainer, trainer.datamodule, self._bad, self._total, [])  # type: ignore[attr-defined]

    def _exchange(self, trainer: Trainer, step: int, judge: bool = True) -> None:
        """Gather from all ranks, write, and stop if it is too much.

        Raises:
            TooManyBadSamples: on all ranks.
        """
        self._exchanged = step
        found, bad, seen = [self._waiting], len(self._waiting), self._seen
        if trainer.world_size > 1:
            counts = torch.tensor([bad, seen], device=trainer.strategy.root_device)
            dist.all_reduce(counts)
            bad, seen = counts.tolist()
            if bad:
                found = [[] for _ in range(trainer.world_size)]
                dist.all_gather_object(found, self._waiting)
        self._bad, self._total = self._bad + bad, self._total + seen
        self._waiting, self._seen = [], 0
        entries = sorted(item for part in found for item in part)
        self._write(trainer, entries)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.bad = self._indexed + self._bad
        if judge:
            self._judge(trainer, data, self._bad, max(self._total, ENOUGH), [bad for _, bad in entries])

    def _write(self, trainer: Trainer, entries: list[tuple[int, Bad]]) -> None:
        if entries and trainer.is_global_zero:
            with open(_report(trainer), "a", encoding="utf-8") as file:
                for update, bad in entries:
                    file.write(json.dumps({"update": update, **bad._asdict()}, ensure_ascii=False) + "\n")

    def _judge(self, trainer: Trainer, data: Any, bad: int, of: int, newest: list[Bad]) -> None:
        limit = data.max_bad_fraction
        if bad > limit * of:
            example = f"; such as {newest[0].shard}/{newest[0].key}: {newest[0].reason}" if newest else ""
            raise TooManyBadSamples(
                f"{bad} bad samples, more than data.max_bad_fraction={limit:g} of {of} allows; all are in "
                f"{_report(trainer)}{example}"
            )


def _report(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / "bad_samples.jsonl"
