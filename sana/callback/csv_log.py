"""metrics.csv: the rows of metrics.jsonl as a table, for programs that read nothing else."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from sana.run.records import read_metrics, write_atomically


class CSVLog(Logger):
    """Writes the table when the run ends or is told to; metrics.jsonl has every row at once.

    Lightning's own begins anew in each part of a run that was stopped; this one is made from the run's records, so it
    is as continuous as they are.

    Args:
        save_dir: the run's directory.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self.path = Path(save_dir)

    @property
    def name(self) -> str:
        """Of the file."""
        return "csv"

    @property
    def version(self) -> int:
        """One for all parts of a run."""
        return 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nothing: the rows are in metrics.jsonl."""

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: they are in config.yaml."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the table of all rows so far."""
        if not (self.path / "metrics.jsonl").is_file():
            return
        rows = read_metrics(self.path / "metrics.jsonl")
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path / "metrics.csv", text.getvalue())
