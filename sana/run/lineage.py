"""Which run `resume=auto` goes on in: the same directory, so that records and curves are one."""

from __future__ import annotations

from pathlib import Path

from sana.checkpoint.run_folder import list_checkpoints
from sana.run.compose import Composed, parse_override
from sana.run.records import is_locked
from sana.run.runs import find_runs, load_status, read_overrides

AUTO = "auto"
OWN = ("run.", "resume", "allow_partial", "kernels", "trainer.max_steps", "trainer.max_time", "trainer.devices",
       "trainer.num_nodes", "strategy", "data.num_workers", "data.micro_batch", "callback.", "logger.")  # fmt: skip
"""Settings that may differ between the parts of one run: where and how long it runs, not what it computes."""


def continued_run(composed: Composed) -> Path | None:
    """The directory of the run to go on in.

    With `run.dir`, that directory if a run began there. Otherwise, of the runs in ``run.folder/run.name`` with the same
    settings that neither finished nor are under way, the one with the newest checkpoint.

    Returns:
        None where there is none, for a new start.
    """
    config = composed.config
    if config.run.dir is not None:
        path = Path(config.run.dir)
        return path if (path / "status.json").is_file() else None
    found = []
    for path in find_runs(Path(config.run.folder) / config.run.name):
        if load_status(path).get("status") == "finished" or is_locked(path):
            continue
        if _settings(read_overrides(path)) == _settings(composed.overrides):
            steps = [step for step, _ in list_checkpoints(path / "checkpoints")]
            if steps:
                found.append((steps[0], path.name, path))
    return max(found)[2] if found else None


def has_checkpoints(path: Path) -> bool:
    """Whether a run has written a checkpoint, whole or not."""
    return bool(list_checkpoints(path / "checkpoints"))


def _settings(overrides: tuple[str, ...] | list[str]) -> list[str]:
    """What a command line says of the computation."""
    kept = [text for text in overrides if not parse_override(text).key_or_group.startswith(OWN)]
    return sorted(kept)
