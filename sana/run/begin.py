"""The first second of a run: its directory and its records."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, open_dict

from sana.run.compose import Composed
from sana.run.join import hear, tell
from sana.run.lineage import AUTO, continued_run, has_checkpoints
from sana.run.records import RunRecord, create_directory, is_first_rank, lock_directory
from sana.run.saved import to_yaml
from sana.run.tree import print_tree

DIRECTORY = "SANA_RUN_DIR"  # how the first rank tells the processes that it starts where the run lies


class Begun(NamedTuple):
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
        given = os.environ.get(DIRECTORY) or config.run.dir
        path = hear(config.run.folder) if given is None else Path(given)
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
    _name_loggers(config, record.id)
    return Begun(config, record, resume)


def _name_loggers(config: DictConfig, run: str) -> None:
    """Give Weights & Biases the run's id, so that all parts of a run that is stopped and goes on are one there."""
    for node in (config.get("logger") or {}).values():
        if node is not None and node._target_.endswith("WandbLogger"):
            with open_dict(node):
                node.id = node.get("id") or run
                node.resume = node.get("resume") or "allow"
