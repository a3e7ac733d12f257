"""How the ranks that torchrun or SLURM start learn the directory that the first rank made."""

from __future__ import annotations

import os
import time
from pathlib import Path

from sana.run.error import ConfigError

PATIENCE = 300.0  # seconds


def tell(path: Path, folder: str | Path) -> None:
    """The first rank says where the run lies."""
    if _torchrun():
        _store().set(_key(), str(path))
    elif (note := _note(folder)) is not None:
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f"{note.name}.{os.getpid()}")
        temporary.write_text(str(path), encoding="utf-8")
        os.replace(temporary, note)


def hear(folder: str | Path) -> Path:
    """Another rank asks where the run lies.

    Raises:
        ConfigError: nobody says so within five minutes, or there is no way to ask.
    """
    if _torchrun():
        return Path(_store().get(_key()).decode())
    note = _note(folder)
    if note is None:
        raise ConfigError(
            "run.dir: has to be given, the same for all ranks, unless torchrun, srun or trainer.devices start them"
        )
    end = time.monotonic() + PATIENCE
    while not note.is_file():
        if time.monotonic() > end:
            raise ConfigError(f"run.folder: the first rank did not write {note} within {PATIENCE:.0f} s")
        time.sleep(0.2)
    return Path(note.read_text(encoding="utf-8"))


def _torchrun() -> bool:
    """Whether torchrun keeps a store that is up before the ranks are; with others (etcd) run.dir has to be given."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store():
    from torch.distributed import TCPStore

    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)


def _key() -> str:
    return f"sana/run_dir/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _note(folder: str | Path) -> Path | None:
    """A file that belongs to one start of one SLURM step."""
    job, step = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_STEP_ID")
    if job is None or step is None:
        return None
    return Path(folder) / ".joining" / f"{job}_{step}_{os.environ.get('SLURM_RESTART_COUNT', '0')}"
