"""Which checkpoint a run goes on from."""

from __future__ import annotations

import sys
from pathlib import Path

from sana.checkpoint.error import CheckpointError
from sana.checkpoint.run_folder import newest_valid, verify

CHECKPOINTS = "checkpoints"  # of a run's directory


def choose(path: str | Path) -> tuple[str | None, str]:
    """A checkpoint that is whole.

    Args:
        path: a checkpoint, or the directory of a run, whose newest whole one is taken by the update recorded inside;
            damaged ones are named on stderr.

    Returns:
        (its place, "") or (None, what is wrong), so that one rank can tell the others.
    """
    path = Path(path)
    folder = path / CHECKPOINTS
    if folder.is_dir():
        found = newest_valid(folder, lambda line: print(f"warning: {line}", file=sys.stderr, flush=True))
        return (str(found), "") if found else (None, f"{folder}: none of its checkpoints is whole")
    try:
        verify(path)
    except (CheckpointError, OSError) as error:
        return None, str(error)
    return str(path), ""
