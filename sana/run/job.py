"""One run of a sweep: a process group of its own with fixed settings, watched from its start to its end.

    python -m sana.run.job <directory of the sweep> <number>

The ranks that a run starts belong to its group and see only its settings. What became of it is written to
``jobs/<number>.json`` beside its output, by this process and not by the sweep, so that it is known although the sweep
was killed meanwhile; and a run whose sweep is gone is ended.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from sana.run.records import read_metrics, to_json, write_atomically
from sana.run.watch import Watch, best_of, values_of

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.5  # seconds between looks at the run's numbers and at the sweep
GRACE = {"killed": 60.0, "pruned": 20.0}  # seconds that a run has to end after SIGTERM
ORPHANED = 20.0  # the same where nobody waits for it any more
DONE = ("finished", "pruned")
# Of the process that started the sweep; a run finds its own.
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR",
         "MASTER_PORT", "SANA_RUN_DIR", "PL_GLOBAL_SEED")  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A run of a sweep and what became of it.

    Attributes:
        number: also the name of its directory in the sweep's.
        overrides: its settings, all fixed.
        status: waiting, running, finished, pruned, failed or killed.
        reason: of a failure or of pruning, in one line.
        code: exit code of the run.
        value: its metric, where it has one.
        seconds: wall time.
        devices: what CUDA_VISIBLE_DEVICES says; None leaves it alone.
        params: the settings in which the runs of the sweep differ.
        host, pid: of the process that watches the run.
    """

    number: int
    overrides: list[str]
    status: str = "waiting"
    reason: str | None = None
    code: int | None = None
    value: float | None = None
    seconds: float | None = None
    devices: str | None = None
    params: dict[str, str] = field(default_factory=dict)
    host: str | None = None
    pid: int | None = None

    def settings(self) -> str:
        """What tells it from the other runs of its sweep."""
        return " ".join(f"{key}={value}" for key, value in self.params.items())


def job_file(folder: Path, number: int) -> Path:
    """Where a job's record is."""
    return folder / "jobs" / f"{number}.json"


def write_job(folder: Path, job: Job) -> Job:
    """Write a job's record in one step; returns the job."""
    (folder / "jobs").mkdir(exist_ok=True)
    write_atomically(job_file(folder, job.number), to_json(asdict(job), indent=2) + "\n")
    return job


def read_job(folder: Path, number: int) -> Job | None:
    """A job's record, None where there is none."""
    try:
        content = json.loads(job_file(folder, number).read_text(encoding="utf-8"))
        return Job(**content)
    except (OSError, ValueError, TypeError):
        return None


def read_jobs(folder: Path) -> list[Job]:
    """All jobs of a sweep in their order."""
    numbers = sorted(int(path.stem) for path in (folder / "jobs").glob("*.json") if path.stem.isdigit())
    return [job for number in numbers if (job := read_job(folder, number)) is not None]


def run_job(folder: Path, number: int) -> Job:
    """Run a job of a sweep to its end and record it. SIGTERM and SIGINT are passed on to the run's processes.

    Args:
        folder: of the sweep; sweep.json says how its runs are judged.
        number: of the job.
    """
    settings = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    job = read_job(folder, number)
    if job is None:
        raise FileNotFoundError(f"{job_file(folder, number)} cannot be read")
    if _is_follower():  # the same job on another node of its allocation: join it
        code = subprocess.call(_command(settings, folder, job), env=environment(job))
        return replace(job, code=code)
    clock = time.monotonic()
    job = write_job(folder, replace(job, status="running", host=socket.gethostname(), pid=os.getpid(), reason=None))
    metrics = folder / str(number) / "metrics.jsonl"
    watch = Watch.of(folder, settings, number)
    with open(folder / "jobs" / f"{number}.log", "ab") as log:
        process = subprocess.Popen(
            _command(settings, folder, job),
            cwd=settings["cwd"],
            env=environment(job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended = _watch(process, watch, metrics)
    job = replace(job, code=process.returncode, seconds=round(time.monotonic() - clock, 1))
    job = judge(folder, settings, job, ended)
    if job.status == "pruned":
        _mark(folder / str(number) / "status.json", job)
    return write_job(folder, job)


def judge(folder: Path, settings: dict[str, Any], job: Job, ended: tuple[str, str] | None = None) -> Job:
    """What became of a run, from its exit code and its records.

    Args:
        folder, settings: of the sweep.
        job: with its exit code; None where nobody waited for it.
        ended: ("pruned" or "killed", reason) where the run was made to end.
    """
    run = folder / str(job.number)
    try:
        record = json.loads((run / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    finished = record.get("status") == "finished" and job.code in (0, None)
    rows = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    points = values_of(rows, settings["metric"])
    value = best_of(points, settings["direction"], settings["value"])
    job = replace(job, value=value)
    if ended is not None and not finished:
        return replace(job, status=ended[0], reason=ended[1])
    if not finished:
        if job.code is None:
            return replace(job, status="killed", reason="the sweep was killed while it ran")
        reason = record.get("reason") or _last_line(folder / "jobs" / f"{job.number}.log")
        what = f"signal {-job.code}" if job.code < 0 else f"exit code {job.code}"
        return replace(job, status="failed", reason=f"{reason or 'no message'} ({what})")
    if settings["needs_value"] and value is None:
        names = sorted({name for row in rows for name in row} - {"step", "time"})
        reason = f"metrics.jsonl has no finite {settings['metric']}; it has {', '.join(names) or 'nothing'}"
        return replace(job, status="failed", reason=reason)
    return replace(job, status="finished", reason=None)


def environment(job: Job) -> dict[str, str]:
    """Variables of a run: those of this process, without another's ranks, and its own devices."""
    kept = {name: value for name, value in os.environ.items() if name not in RANKS}
    if os.environ.get("SLURM_NTASKS", "1") == "1":  # one task: the run starts its own ranks
        kept = {name: value for name, value in kept.items() if not name.startswith("SLURM_")}
    if job.devices is not None:
        kept["CUDA_VISIBLE_DEVICES"] = job.devices
    return kept


def _is_follower() -> bool:
    return os.environ.get("SLURM_NTASKS", "1") != "1" and os.environ.get("SLURM_PROCID", "0") != "0"


def _command(settings: dict[str, Any], folder: Path, job: Job) -> list[str]:
    script = ROOT / f"{settings['entry']}.py"
    return [sys.executable, str(script), *job.overrides, f"run.dir={folder / str(job.number)}"]


def _watch(process: subprocess.Popen[bytes], watch: Watch | None, metrics: Path) -> tuple[str, str] | None:
    """Wait for the run's group; returns why it was made to end, None where it ended of itself."""
    parent, ended, deadline = os.getppid(), None, None
    asked: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        asked.append(number)

    kept = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(POLL)
                return ended
            why, grace = None, 0.0
            if asked:
                why = ("killed", f"the sweep got {signal.Signals(asked[0]).name}")
            elif os.getppid() != parent:
                why, grace = ("killed", "the sweep was killed"), ORPHANED
            elif watch is not None and ended is None and (poor := watch.look(metrics)):
                why = ("pruned", poor)
            if why is not None and ended is None:
                ended, deadline = why, time.monotonic() + (grace or GRACE[why[0]])
                _signal(process.pid, signal.SIGTERM)
            if deadline is not None and (time.monotonic() > deadline or len(asked) > 1):
                _signal(process.pid, signal.SIGKILL)
    finally:
        _signal(process.pid, signal.SIGKILL)  # ranks that outlived the first one: devices are free when this returns
        for number, handler in kept.items():
            signal.signal(number, handler)


def _signal(group: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _mark(path: Path, job: Job) -> None:
    """A pruned run says so itself."""
    with suppress(OSError, ValueError):
        record = json.loads(path.read_text(encoding="utf-8"))
        write_atomically(path, to_json({**record, "status": job.status, "reason": job.reason}, indent=2) + "\n")


def _last_line(path: Path) -> str | None:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else None


if __name__ == "__main__":
    outcome = run_job(Path(sys.argv[1]), int(sys.argv[2]))
    raise SystemExit(0 if outcome.status in DONE else 1)
