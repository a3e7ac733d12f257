"""``-m``: many runs from one command, each a process group of its own with fixed settings.

Worker ranks never see the sweep, and no run inherits another's state. The same command again goes on with the same
sweep: what is finished stays, what is missing or failed is run. Everything a sweep knows lies in its directory::

    sweep.json           the command, and how runs are judged
    jobs/<number>.json   settings of a run, its status, reason and value; <number>.log has its output
    <number>/            the run's own directory
    study.journal        of sweep=optuna; or study.db
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from sana.run.build import build
from sana.run.compose import compose, parse_override
from sana.run.error import ConfigError
from sana.run.job import DONE, Job, read_jobs
from sana.run.launchers import Launcher, find_launcher
from sana.run.records import create_directory, to_json, write_atomically
from sana.run.saved import prepare
from sana.run.schema import check
from sana.run.search import Search

# Keys of sweep.json that make two commands the same sweep; the number of trials may grow.
IDENTITY = "identity"
LEFT = 180.0  # seconds to wait for runs of a killed sweep to end


def sweep(entry: str, overrides: Sequence[str]) -> int:
    """Run what is missing of a sweep.

    Args:
        entry: "train".
        overrides: the command line; ``sweep=...``, ``sweep.key=...`` and ``hydra/launcher=...`` are about the sweep,
            the rest about its runs.

    Returns:
        0, or 1 if a run failed; the others are run all the same.

    Raises:
        ConfigError: a combination that does not pass the check, or a sweep that runs already; then no run is started.
    """
    own, launching, rest = _split(overrides)
    settings = compose("sweep", own)
    check(settings)
    search: Search = build(settings.config.sweep, "sweep")
    launcher = find_launcher(entry, launching, search.parallel, search.devices)
    checked = [prepare(entry, [text for text in job if not _sets_dir(text)]) for job in search.samples(rest)]
    record = {
        "entry": entry,
        "command": list(overrides),
        "cwd": os.getcwd(),
        IDENTITY: _identity(entry, rest, search, [composed.resolved for composed in checked]),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        **search.record(),
    }
    run = checked[0].config.run
    chosen = next((parse_override(text).value() for text in rest if _sets_dir(text)), None)
    folder, old = _place(run.folder, run.name, chosen, record, search.fresh)
    with _owned(folder):
        _wait_for_leftovers(folder)
        if old is None:
            write_atomically(folder / "sweep.json", to_json(record, indent=2) + "\n")
        rest = [text for text in rest if not _sets_dir(text)]
        search.open(folder, rest)
        return _run_all(folder, search, launcher)


def _run_all(folder: Path, search: Search, launcher: Launcher) -> int:
    missing, before = search.missing(), sum(job.status in DONE for job in read_jobs(folder))
    print(f"{missing} runs in {folder}" + (f"; {before} are done" if before else ""), flush=True)
    begun, ended, failed = time.monotonic(), 0, []

    def tell(job: Job) -> None:
        nonlocal ended
        search.tell(job)
        ended += 1
        if job.status not in DONE:
            failed.append(job)
        left = (time.monotonic() - begun) / ended * (missing - ended)
        value = "" if job.value is None else f", {search.metric} {job.value:.5g}"
        reason = f": {job.reason}" if job.reason else ""
        print(f"run {job.number} {job.status}{value} ({job.settings()}){reason}", flush=True)
        rate = f"{60 * ended / (time.monotonic() - begun):.1f} runs/min"
        print(f"{ended}/{missing}, {len(failed)} failed, {rate}, ETA {left / 60:.1f} min", flush=True)

    launcher.run(folder, search.jobs(), tell)
    done = [job for job in read_jobs(folder) if job.value is not None and job.status == "finished"]
    if done:
        best = (min if search.direction == "minimize" else max)(done, key=lambda job: job.value or 0.0)
        print(f"best: run {best.number}, {search.metric} {best.value:.5g} ({best.settings()})", flush=True)
    if failed:
        print(
            f"{len(failed)} failed; the same command runs them again ({folder / 'jobs'} has their output)", flush=True
        )
    return 1 if failed else 0


def _split(overrides: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Settings of the sweep, of Hydra's launcher, and of the runs."""
    own, launching, rest = [], [], []
    for text in overrides:
        key = parse_override(text).key_or_group
        if key == "sweep" or key.startswith("sweep."):
            own.append(text)
        elif key == "hydra/launcher" or key.startswith("hydra.launcher."):
            launching.append(text)
        elif key.startswith(("hydra.", "hydra/")):
            raise ConfigError(f"{text}: of Hydra only the launcher is chosen here; sweep=grid|optuna for the rest")
        else:
            rest.append(text)
    return own, launching, rest


def _sets_dir(text: str) -> bool:
    return parse_override(text).key_or_group == "run.dir"


def _identity(entry: str, overrides: Sequence[str], search: Search, resolved: Sequence[Any]) -> str:
    """Hash of all that decides what the runs will be: so a command is another sweep after a change in conf/."""
    configs = [{key: value for key, value in config.items() if key != "run"} for config in resolved]
    varied = sorted(text for text in overrides if parse_override(text).is_sweep_override())
    what = [entry, search.record(), varied, configs]
    return hashlib.sha256(to_json(what).encode()).hexdigest()[:16]


def _place(
    folder: str, name: str, chosen: Any, record: dict[str, Any], fresh: bool
) -> tuple[Path, dict[str, Any] | None]:
    """The sweep's directory, and its record where the sweep was begun before."""
    if chosen is not None:
        path = Path(str(chosen)).absolute()
        old = _record(path)
        if old is not None and old.get(IDENTITY) == record[IDENTITY]:
            return path, old
        if path.is_dir() and any(path.iterdir()):
            raise ConfigError(f"run.dir: {path} is in use by another sweep or run; choose another, or leave it out")
        path.mkdir(parents=True, exist_ok=True)
        return path, None
    parent = Path(folder) / name
    parent.mkdir(parents=True, exist_ok=True)
    with open(parent / ".sweeps.lock", "w") as lock:  # two equal commands of one moment find one directory
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in [] if fresh else sorted(parent.glob("*/sweep.json"), reverse=True):
            old = _record(path.parent)
            if old is not None and old.get(IDENTITY) == record[IDENTITY]:
                return path.parent.absolute(), old
        path = create_directory(folder, name).absolute()
        write_atomically(path / "sweep.json", to_json(record, indent=2) + "\n")
        return path, None


def _record(folder: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    """One process drives a sweep at a time.

    Raises:
        ConfigError: another does.
    """
    file: IO[str]
    with open(folder / ".lock", "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{folder}: this sweep is being run already; sweep.fresh=true begins another") from None
        yield


def _wait_for_leftovers(folder: Path) -> None:
    """Runs of a sweep that was killed end by themselves within a moment; wait for it.

    Raises:
        ConfigError: one is still there after a while.
    """
    until = time.monotonic() + LEFT
    for job in read_jobs(folder):
        while job.status == "running" and _is_watched(job):
            if time.monotonic() > until:
                raise ConfigError(f"{folder}: run {job.number} still runs (process {job.pid} on {job.host})")
            time.sleep(0.5)
            job = next((j for j in read_jobs(folder) if j.number == job.number), replace(job, status="killed"))


def _is_watched(job: Job) -> bool:
    if job.pid is None or job.host != os.uname().nodename:
        return False
    try:
        command = Path(f"/proc/{job.pid}/cmdline").read_bytes()
    except OSError:
        return False
    return b"sana.run.job" in command or b"submitit" in command or b"ray" in command
