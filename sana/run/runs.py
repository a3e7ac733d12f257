"""Reading the records of one run or of a thousand, with no server."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sana.run.error import ConfigError
from sana.run.records import read_metrics

CHECKPOINT_SUFFIX = ".ckpt"


def find_runs(folder: str | Path) -> Iterator[Path]:
    """Directories below `folder` (itself included) that hold the records of a run, oldest name first."""
    root = Path(folder)
    for parent, folders, files in os.walk(root):
        folders.sort()
        if "status.json" in files:
            yield Path(parent)
            folders.clear()  # nothing inside a run is a run


def load_run(path: str | Path) -> dict[str, Any]:
    """One run as a flat dictionary.

    Keys: path, name, status, reason, started, seconds, step (of the last row), overrides (list), commit,
    dirty, gpus, checkpoint (the newest, or None), metrics {name: last value}, lowest and highest {name:
    extreme over the run}. A run that says it is running but whose process on this machine is gone has the
    status "killed".
    """
    path = Path(path)
    status = _json(path / "status.json")
    environment = _json(path / "environment.json")
    git = environment.get("git") or {}
    rows = read_metrics(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    last: dict[str, Any] = {}
    lowest: dict[str, float] = {}
    highest: dict[str, float] = {}
    for row in rows:
        for key, value in row.items():
            if key in ("step", "time"):
                continue
            last[key] = value
            if isinstance(value, int | float) and value == value:
                lowest[key] = min(value, lowest.get(key, value))
                highest[key] = max(value, highest.get(key, value))
    checkpoint = newest_checkpoint(path)
    return {
        "path": str(path),
        "name": path.parent.name,
        "status": _state(status),
        "reason": status.get("reason"),
        "started": status.get("started"),
        "seconds": status.get("seconds"),
        "step": rows[-1].get("step") if rows else None,
        "overrides": read_overrides(path),
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "gpus": [gpu.get("name") for gpu in environment.get("hardware", {}).get("gpus", [])],
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "metrics": last,
        "lowest": lowest,
        "highest": highest,
    }


def load_runs(folder: str | Path = "runs") -> list[dict[str, Any]]:
    """Every run below a folder, failed ones included, ordered by start; rows as `load_run` gives them.

    ``pandas.json_normalize(load_runs())`` makes a DataFrame with one column per metric.

    Raises:
        ConfigError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: no such folder of runs")
    rows = [load_run(path) for path in find_runs(folder)]
    return sorted(rows, key=lambda row: (row["started"] or "", row["path"]))


def read_overrides(path: str | Path) -> list[str]:
    """What the command line of a run said; [] where the record is missing."""
    try:
        lines = (Path(path) / "overrides.yaml").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return [json.loads(line[2:]) for line in lines if line.startswith("- ")]


def newest_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint of a run that was written last (a file, or the directory of a sharded one), or None."""
    folder = Path(path) / "checkpoints"
    if not folder.is_dir():
        return None
    found = [p for p in folder.iterdir() if p.suffix == CHECKPOINT_SUFFIX]
    return max(found, key=lambda p: (p.stat().st_mtime_ns, p.name), default=None)


def find_checkpoint(path: str | Path, key: str = "ckpt") -> tuple[Path, Path]:
    """The checkpoint that a user names, by its own path or by that of its run, and the run's directory.

    Raises:
        ConfigError: nothing there, a run without checkpoint, or a checkpoint outside a run.
    """
    path = Path(path)
    if not path.exists():
        raise ConfigError(f"{key}: {path} does not exist; give a checkpoint or the directory of a run")
    if (path / "status.json").is_file():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise ConfigError(f"{key}: the run {path} has no checkpoint yet")
        return checkpoint, path
    for run in path.resolve().parents:
        if (run / "config.yaml").is_file():
            return path, run
    raise ConfigError(f"{key}: {path} lies outside a run; its directory must hold the run's config.yaml")


def _state(status: dict[str, Any]) -> str:
    state = status.get("status", "unknown")
    if state == "running" and status.get("host") == socket.gethostname() and not _alive(status.get("pid")):
        return "killed"
    return state


def _alive(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (OSError, TypeError, ValueError):
        return False
    return True


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
