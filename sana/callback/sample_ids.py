"""Which samples were trained on, for proofs: ``samples.rank0.jsonl`` with one line per micro-batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from sana.run.records import MetricsLog


class SampleIds(Callback):
    """Writes the update, the positions in the stream and the keys of every micro-batch of a rank.

    A run that goes on drops what lies after its checkpoint, so the file reads like that of a run that never stopped.
    """

    def __init__(self) -> None:
        self._log: MetricsLog | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Open this rank's file."""
        path = Path(trainer.default_root_dir) / f"samples.rank{trainer.global_rank}.jsonl"
        MetricsLog.cut(path, trainer.global_step)
        self._log = MetricsLog(path)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write a line; before its update ends, a micro-batch counts to the update it is part of."""
        assert self._log is not None
        step = trainer.global_step + (not pl_module.between_updates)
        self._log.write(step, {"index": batch.index.tolist(), "key": list(batch.key)})

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()


def read_ids(run: str | Path) -> list[tuple[int, list[int], list[str]]]:
    """(update, positions, keys) of a run over all ranks, in the order of the stream."""
    rows = []
    for path in sorted(Path(run).glob("samples.rank*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            rows.append((row["step"], row["index"], row["key"]))
    return sorted(rows)
