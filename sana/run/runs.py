"""Reading the records of one run or of a thousand, with no server."""

from __future__ import annotations

import difflib
import json
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sana.checkpoint.distributed_index import is_distributed
from sana.checkpoint.error import CheckpointError
from sana.checkpoint.hub import SCHEME, fetch, parse
from sana.checkpoint.record import read_record
from sana.checkpoint.run_folder import list_checkpoints
from sana.run.error import ConfigError
from sana.run.groups import CONF
from sana.run.job import read_jobs
from sana.run.summary import summarise

SHIPPED = CONF.parent / "experiments"
SHIPPED_FILE = "model.safetensors"
LOADED = Path("runs") / "loaded"


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

    Keys: path, name, status, reason, started, seconds, peak_rss_gib, step (of the last row), overrides (list), commit,
    dirty, gpus, checkpoint (the newest, or None), metrics {name: last value}, lowest and highest {name:
    extreme over the run}. A run that says it is running but whose process on this machine is gone has the
    status "killed".
    """
    path = Path(path)
    status = _json(path / "status.json")
    environment = _json(path / "environment.json")
    git = environment.get("git") or {}
    numbers = summarise(path / "metrics.jsonl")
    checkpoint = newest_checkpoint(path)
    return {
        "path": str(path),
        "name": path.parent.name,
        "status": _state(status),
        "reason": status.get("reason"),
        "started": status.get("started"),
        "seconds": status.get("seconds"),
        "peak_rss_gib": status.get("peak_rss_gib"),
        "step": numbers.step,
        "overrides": read_overrides(path),
        "commit": git.get("commit"),
        "dirty": git.get("dirty"),
        "gpus": [gpu.get("name") for gpu in environment.get("hardware", {}).get("gpus", [])],
        "checkpoint": None if checkpoint is None else str(checkpoint),
        "metrics": numbers.last,
        "lowest": numbers.lowest,
        "highest": numbers.highest,
    }


def load_status(path: str | Path) -> dict[str, Any]:
    """status.json of a run; {} where it cannot be read."""
    return _json(Path(path) / "status.json")


def load_runs(folder: str | Path = "runs") -> list[dict[str, Any]]:
    """Every run below a folder, failed ones and those that a sweep has yet to begin included, ordered by start; rows as
    `load_run` gives them.

    ``pandas.json_normalize(load_runs())`` makes a DataFrame with one column per metric.

    Raises:
        ConfigError: there is no such folder.
    """
    if not Path(folder).is_dir():
        raise ConfigError(f"{folder}: no such folder of runs")
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # long records are read outside of Python's lock
        rows = list(pool.map(load_run, find_runs(folder)))
    rows += [row for path in sorted(Path(folder).rglob("sweep.json")) for row in _without_run(path.parent)]
    return sorted(rows, key=lambda row: (row["started"] or "", row["path"]))


def _without_run(sweep: Path) -> Iterator[dict[str, Any]]:
    """Runs of a sweep that left no records: those that wait, and those that failed before they began."""
    for job in read_jobs(sweep):
        path = sweep / str(job.number)
        if not (path / "status.json").exists():
            facts = {"status": job.status, "reason": job.reason, "overrides": job.overrides, "seconds": job.seconds}
            yield {**load_run(path), **facts}


def read_overrides(path: str | Path) -> list[str]:
    """What the command line of a run said; [] where the record is missing."""
    try:
        lines = (Path(path) / "overrides.yaml").read_text(encoding="utf-8").splitlines()
        return [json.loads(line[2:]) for line in lines if line.startswith("- ")]
    except (OSError, ValueError):
        return []


def newest_checkpoint(path: str | Path) -> Path | None:
    """The checkpoint of a run with the most updates, by what is recorded inside it, or None."""
    found = list_checkpoints(Path(path) / "checkpoints")
    return found[0][1] if found else None


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


@dataclass(frozen=True)
class Found:
    """What `ckpt=` leads to.

    Attributes:
        path: file or folder with the weights.
        home: directory for what is made of them: the run's own, or one under runs/loaded.
        of_run: whether a run of this project wrote them, whose records lie in home.
    """

    path: Path
    home: Path
    of_run: bool


def find_weights(name: str, key: str = "ckpt") -> Found:
    """The weights that a user names.

    Args:
        name: a run's directory or checkpoint; a file of weights, a diffusers folder or a directory of shards that no
            run of this project wrote; hf://organisation/repository
            with or without a file; or the bare name of a shipped model, whose file is
            experiments/<name>/model.safetensors or experiments/<any>/<name>.safetensors. What exists under the path
            goes first.
        key: of the setting, for messages.

    Raises:
        ConfigError: nothing there, with the names that are; or the hub refuses, with the steps that help.
    """
    if name.startswith(SCHEME):
        try:
            path = fetch(name, (Path("models"), CONF.parent / "models"))
        except CheckpointError as error:
            raise ConfigError(f"{key}: {error}") from None
        return Found(path, LOADED / parse(name)[0].split("/")[1], of_run=False)
    path = Path(name).expanduser()
    shipped = _shipped().get(name) if path.name == name else None
    if shipped is not None and not _has_weights(path):
        return Found(shipped, LOADED / name, of_run=False)
    if not path.exists():
        names = shipped_models()
        near = difflib.get_close_matches(name, names, 1, 0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        shown = f"; shipped: {', '.join(names)}" if names else ""
        raise ConfigError(
            f"{key}: {name} does not exist; {hint}give a run, a .ckpt, .pth or .safetensors file, a diffusers folder, "
            f"a directory of shards, or hf://organisation/repository{shown}"
        )
    if (path / SHIPPED_FILE).is_file() and not (path / "status.json").is_file():
        path = path / SHIPPED_FILE
    strange = is_distributed(path) and not any((home / "config.yaml").is_file() for home in path.resolve().parents)
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") or _is_diffusers(path) or strange:
        own = path.parent.name if path.name == SHIPPED_FILE else path.stem if path.is_file() else path.name
        return Found(path, LOADED / (own or "weights"), of_run=False)
    return Found(*find_checkpoint(path, key), of_run=True)


def shipped_models() -> list[str]:
    """Names of the models that come with the project."""
    return sorted(_shipped())


def _shipped() -> dict[str, Path]:
    """{name: file}."""
    found = [path for path in sorted(SHIPPED.glob("*/*.safetensors")) if _is_model(path)]
    return {path.parent.name if path.name == SHIPPED_FILE else path.stem: path for path in found}


def _is_model(path: Path) -> bool:
    """Whether a safetensors file is a network with a recipe, not the weights of an encoder."""
    try:
        return read_record(path) is not None
    except ValueError:
        return False


def _has_weights(path: Path) -> bool:
    holds = any((path / name).is_file() for name in ("status.json", SHIPPED_FILE))
    return path.is_file() or holds or _is_diffusers(path) or is_distributed(path)


def _is_diffusers(path: Path) -> bool:
    return any((path / name).is_file() for name in ("model_index.json", "transformer/config.json", "config.json"))


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
