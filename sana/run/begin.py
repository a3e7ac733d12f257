"""The first second of a run: its directory and its records."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from sana.run.compose import Composed
from sana.run.error import ConfigError
from sana.run.records import RunRecord, create_directory, is_first_rank
from sana.run.saved import to_yaml
from sana.run.tree import print_tree

DIRECTORY = "SANA_RUN_DIR"  # how the first rank tells the processes that it starts where the run lies


def begin(composed: Composed) -> tuple[DictConfig, RunRecord]:
    """Make the run's directory and write the records of its start; ranks after the first join them.

    Returns:
        The configuration with `run.dir` filled in, and the record, to be used as a context manager around the
        run.

    Raises:
        ConfigError: the directory is in use or cannot be made; or another launcher started this rank, which
            then needs `run.dir`.
    """
    config = composed.config.copy()
    if is_first_rank():
        path = create_directory(config.run.folder, config.run.name, config.run.dir)
        os.environ[DIRECTORY] = str(path.resolve())
    elif config.run.dir is not None or DIRECTORY in os.environ:
        path = Path(config.run.dir or os.environ[DIRECTORY])
    else:
        raise ConfigError("run.dir: has to be given, the same for all ranks, where torchrun or SLURM start them")
    config.run.dir = str(path)
    record = RunRecord(path)
    record.start(to_yaml(Composed(composed.entry, config, composed.overrides)), composed.overrides)
    if record.writes:
        print_tree(composed)
        print(f"run directory: {path}", flush=True)
    return config, record
