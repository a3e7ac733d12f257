"""The first second of a run: its directory and its records."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from sana.run.compose import Composed
from sana.run.join import hear, tell
from sana.run.lineage import AUTO, continued_run, has_checkpoints
from sana.run.records import RunRecord, create_directory, is_first_rank, lock_directory
from sana.run.saved import to_yaml
from sana.run.tree import print_tree

DIRECTORY = "SANA_RUN_DIR"  # how the first rank tells the processes that it starts where the run lies


@dataclass(frozen=True)
class Begun:
    """A run that has its directory.

    Attributes:
        config: with `run.dir` filled in.
        record: a context manager around the run.
        resume: the checkpoint or run to go on from, None for a new start.
    """

    config: DictConfig
    record: RunRecord
    resume: Path | None


def begin(composed: Composed) -> Begun:
    """Make the run's directory, or find the one to go on in, and write the records of the start; ranks after the first
    join them.

    Raises:
        ConfigError: the directory is in use or cannot be made.
    """
    config = composed.config.copy()
    resume = None if config.resume in (None, AUTO) else Path(config.resume)
    lock = None
    if is_first_rank():
        path = continued_run(composed) if config.resume == AUTO else None
        if path is None:
            path = create_directory(config.run.folder, config.run.name, config.run.dir)
            lock = lock_directory(path)
        else:
            lock = lock_directory(path)
            resume = path if has_checkpoints(path) else None
        os.environ[DIRECTORY] = str(path.resolve())
        tell(path.resolve(), config.run.folder)
    else:
        path = Path(os.environ[DIRECTORY]) if DIRECTORY in os.environ else hear(config.run.folder)
        if config.resume == AUTO and has_checkpoints(path):
            resume = path
    config.run.dir = str(path)
    record = RunRecord(path, lock=lock)
    record.start(to_yaml(Composed(composed.entry, config, composed.overrides)), composed.overrides)
    if record.writes:
        print_tree(composed)
        print(f"run directory: {path}", flush=True)
        if config.resume == AUTO:
            print("going on from its newest checkpoint" if resume else "nothing to go on from: a new start", flush=True)
    return Begun(config, record, resume)
