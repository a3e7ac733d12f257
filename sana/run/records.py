"""The directory that a run leaves behind, self-describing from its first second and without any server.

    config.yaml        every setting, interpolations resolved except those that read environment variables
    overrides.yaml     what the command line said
    environment.json   git commit, versions, hardware, data fingerprint; diff.patch holds uncommitted changes
    metrics.jsonl      one JSON object per line, appended and flushed line by line
    status.json        running, finished, failed (with the reason), interrupted or preempted; the run's id
    error_rank_*.txt   why another rank than the first failed

Only the first rank writes. All files but metrics.jsonl are replaced atomically, so a reader never sees half
of one.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import time
import traceback
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from sana.run.environment import describe_environment, peak_rss_gib
from sana.run.error import ConfigError
from sana.run.stop import INTERRUPTED, REQUEUE, Stopped, requeue

Status = Literal["running", "finished", "failed", "interrupted", "preempted"]

LOCK = ".lock"  # of a run's directory; not inherited by the processes that a run starts
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # the order in which Lightning reads them


def is_first_rank() -> bool:
    """Whether this process is rank zero of its job, from the launcher's environment (True without a
    launcher)."""
    return next((int(os.environ[name]) == 0 for name in RANK_VARIABLES if name in os.environ), True)


def create_directory(folder: str | Path, name: str, directory: str | Path | None = None) -> Path:
    """Make the directory of a new run, which no other run has or will get.

    Args:
        folder: where runs are kept.
        name: of the recipe or experiment; runs of one name lie side by side.
        directory: an explicit place instead of ``folder/name/<date>_<time>_<n>``; new or empty.

    Raises:
        ConfigError: the explicit directory is in use, or it cannot be made.
    """
    if directory is not None:
        return _claim(Path(directory))
    parent = Path(folder) / name
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    n = 0
    while True:
        path = parent / f"{stamp}_{n}"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # fails where it exists: two runs of the same second get different n
            return path
        except FileExistsError:
            if not parent.is_dir():
                raise ConfigError(f"run.folder: {parent} is a file, runs need a directory") from None
            n += 1
        except OSError as error:
            raise ConfigError(f"run.folder: cannot make {path}: {error.strerror}") from None


def _claim(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run.dir: cannot make {path}: {error.strerror}") from None
    if any(path.iterdir()):
        raise ConfigError(
            f"run.dir: {path} is in use (not empty); choose another, or leave run.dir out to get a fresh one"
        )
    try:
        # Of two runs that found it empty, the one that creates status.json owns it.
        os.close(os.open(path / "status.json", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        raise ConfigError(f"run.dir: {path} was taken by another run a moment ago") from None
    return path


def lock_directory(path: Path) -> TextIO:
    """Take a run's directory for this process, until it ends however it ends; the open file is the lock.

    Raises:
        ConfigError: another process has it.
    """
    file = open(path / LOCK, "a", encoding="utf-8")  # noqa: SIM115 - held as long as the run lives
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(f"run.dir: a run is under way in {path}") from None
    return file


def is_locked(path: Path) -> bool:
    """Whether a run is under way in a directory."""
    try:
        lock_directory(path).close()
    except ConfigError:
        return True
    except OSError:
        return False
    return False


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by another in one step: readers see the old or the new text, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON; numbers that JSON lacks become the strings "nan", "inf", "-inf", and tensors their
    values."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "tolist"):  # tensors and numpy values
        return _plain(value.tolist())
    return str(value)


class MetricsLog:
    """Appends rows to a metrics.jsonl; each row is on disk before `write` returns, whatever happens later.

    Args:
        path: the file; it is continued where it exists, after closing a line that a killed writer left open.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - lives as long as the log
        if self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n"):
            self._file.write(b"\n")

    @staticmethod
    def cut(path: Path, step: int) -> None:
        """Drop the rows after an update, which a run that goes on from there will write again."""
        rows = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        kept = [row for row in rows if (at := _step_of(row)) is not None and at <= step]
        if len(kept) != len(rows):
            write_atomically(path, "".join(f"{row}\n" for row in kept))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Add one row ``{"step": ..., "time": seconds since 1970, **values}``; step counts optimizer
        updates."""
        row = {"step": step, "time": round(time.time(), 3), **values}
        self._file.write((to_json(row) + "\n").encode())

    def close(self) -> None:
        """Close the file; `write` is an error afterwards."""
        self._file.close()


def _step_of(row: str) -> int | None:
    try:
        return int(json.loads(row)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl in the order written; a line torn by a killed writer is left out."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict):
                rows.append({k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in row.items()})
    return rows


class RunRecord:
    """Writes what a run leaves behind, and its end, however it ends.

    Use as a context manager around the run: it ends as finished, as failed with the exception as reason, or
        as
    interrupted after ctrl-C (also where Lightning has turned that into an exit).

    Args:
        path: the run's directory, from `create_directory`.
        writes: False on all ranks but the first; then nothing is written.
        lock: from `lock_directory`, held as long as this lives.
    """

    def __init__(self, path: str | Path, writes: bool | None = None, lock: TextIO | None = None) -> None:
        self.path, self.lock = Path(path), lock
        self.writes = is_first_rank() if writes is None else writes
        self._status: dict[str, Any] = {}
        self._clock = time.monotonic()

    def start(self, config: str, overrides: Sequence[str]) -> RunRecord:
        """Write all records of the beginning. A run that goes on keeps its id, its first start and its seconds.

        Args:
            config: text of config.yaml.
            overrides: what the command line said.
        """
        if self.writes:
            before = _read_json(self.path / "status.json")
            self._clock = time.monotonic() - float(before.get("seconds", 0.0))
            now = datetime.now(UTC).isoformat(timespec="seconds")
            self._status = {
                "status": "running",
                "reason": None,
                "id": before.get("id") or uuid.uuid4().hex[:12],
                "started": before.get("started") or now,
                "resumed": [*before.get("resumed", []), *([now] if "started" in before else [])],
                "seconds": 0.0,
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
            self._write_status()
            write_atomically(self.path / "config.yaml", config)
            # JSON strings are YAML strings, quoted where they must be.
            lines = "".join(f"- {json.dumps(o, ensure_ascii=False)}\n" for o in overrides)
            write_atomically(self.path / "overrides.yaml", lines or "[]\n")
            environment, diff = describe_environment()
            write_atomically(self.path / "environment.json", to_json(environment, indent=2) + "\n")
            if diff:
                write_atomically(self.path / "diff.patch", diff)
            (self.path / "metrics.jsonl").touch()
        return self

    def describe(self, **facts: Any) -> None:
        """Add facts to environment.json once they are known, such as ``data={"fingerprint": ...}``."""
        if self.writes:
            path = self.path / "environment.json"
            known = json.loads(path.read_text(encoding="utf-8"))
            write_atomically(path, to_json({**known, **facts}, indent=2) + "\n")

    def update(self, **facts: Any) -> None:
        """Add facts to status.json, such as ``step=120``."""
        if self.writes:
            self._status.update(facts)
            self._write_status()

    def end(self, status: Status, reason: str | None = None, details: str | None = None) -> None:
        """Write how the run ended, with a one-line reason and a traceback if there is one."""
        self.update(status=status, reason=reason, details=details)

    @property
    def id(self) -> str:
        """Of the run, over all its parts."""
        return str(self._status["id"]) if self.writes else str(_read_json(self.path / "status.json").get("id"))

    def stop(self, reason: str | None, alone: bool) -> int:
        """Write that the run was told to end, and have it started again where SLURM can.

        Args:
            reason: a signal's name or "max_time"; None: it came to its end.
            alone: whether each rank's exit code counts; where the first rank started the others, it answers for them.

        Returns:
            The exit code of this rank.
        """
        if reason is None:
            return 0
        if self.writes:
            self.end("interrupted" if reason == "SIGINT" else "preempted", reason)
            if line := requeue(reason):
                print(line, flush=True)
        elif not alone:
            return 0
        return INTERRUPTED if reason == "SIGINT" else REQUEUE

    def _write_status(self) -> None:
        self._status["seconds"] = round(time.monotonic() - self._clock, 1)
        self._status["peak_rss_gib"] = round(peak_rss_gib(), 3)
        write_atomically(self.path / "status.json", to_json(self._status, indent=2) + "\n")

    def __enter__(self) -> RunRecord:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            if self._status.get("status") == "running":
                self.end("finished")
            return
        if isinstance(error, Stopped):
            self.end("preempted", str(error))
            return
        if not self.writes:
            rank = next(os.environ[name] for name in RANK_VARIABLES if name in os.environ)
            text = "".join(traceback.format_exception(kind, error, trace))
            with suppress(OSError):
                write_atomically(self.path / f"error_rank_{rank}.txt", f"{type(error).__name__}: {error}\n\n{text}")
            return
        # Lightning answers ctrl-C by sys.exit inside its handler, so the interrupt is the context of the
        # exit.
        if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
            self.end("interrupted", "ctrl-C")
        else:
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0]}" if lines[0] else type(error).__name__
            if any(word in reason for word in ("peer", "gloo", "Gloo", "NCCL", "Broken pipe", "Socket")):
                reason = _of_other_rank(self.path) or f"a rank is gone ({reason})"
            with suppress(OSError):  # the directory may be what failed
                self.end("failed", reason, "".join(traceback.format_exception(kind, error, trace)))


def _of_other_rank(path: Path, patience: float = 3.0) -> str | None:
    """What another rank said before it ended, so that its partners lost it."""
    end = time.monotonic() + patience
    while time.monotonic() < end:
        for file in sorted(path.glob("error_rank_*.txt")):
            line = file.read_text(encoding="utf-8").partition("\n")[0]
            if "peer" not in line:
                return f"rank {file.stem.rsplit('_', 1)[1]}: {line}"
        time.sleep(0.2)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
