"""Evaluation: ``python eval.py ckpt=<run or checkpoint>``, or ``images=<folder>`` for images made elsewhere; ``--help``
lists the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def evaluate_run(composed: Composed) -> None:
    """Draw the prompts with a checkpoint unless there are images, score them, and write results.json, the table and
    the report."""
    from rich.console import Console

    from sana.model.evaluate import evaluate
    from sana.model.evaluation import drawing_of, join_ranks, metrics_of, on_first_rank
    from sana.model.found import read_lines
    from sana.run.error import ConfigError
    from sana.run.restore import restore

    config = composed.config
    with join_ranks():
        common = {"output": config.output, "console": Console(quiet=not on_first_rank())}
        try:
            lines = None if config.metadata is None else read_lines(config.metadata)
            if config.images is not None:
                evaluate(config.images, metrics_of(composed), lines=lines, **common)
                return
            restored = restore(composed)
            metrics = metrics_of(composed, restored)
            drawing = drawing_of(composed, restored, lines)
            folder = Path(config.out or restored.run / "eval" / restored.checkpoint.stem)
            commit = drawing["settings"]["commit"]
            evaluate(folder, metrics, run_dir=restored.run, commit=commit, drawing=drawing, **common)
        except ValueError as error:  # too few images for a metric, or a folder drawn with other settings
            raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(launch("eval", evaluate_run))
