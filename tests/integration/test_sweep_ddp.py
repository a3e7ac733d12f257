"""A search over runs of two processes each, killed in its midst: no rank differs, and no finished trial runs twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sana.run.groups import CONF
from sana.run.job import read_jobs
from sana.run.runs import load_runs

ROOT = CONF.parent
TINY = ["data.count=32", "data.held=32", "data.batch_size=4", "data.validation=4", "data.cache_latents=false",
        "network.width=32", "network.depth=1", "block.cross.heads=1", "callback.samples=null",
        "callback.checkpoints=null", "callback.records.every=1", "callback.validation.bins=1", "trainer.max_steps=3",
        "trainer.precision=32-true", "trainer.accelerator=cpu"]  # fmt: skip


def command(folder: Path) -> list[str]:
    search = ["sweep=optuna", "sweep.trials=2", "optimizer.lr=tag(log,interval(1e-4,1e-1))"]
    places = [f"run.dir={folder / 'sweep'}", f"data.folder={folder / 'scenes'}"]
    return [sys.executable, "train.py", "-m", *search, "strategy=ddp", "trainer.devices=2", *TINY, *places]


@pytest.mark.long
def test_optuna_over_ddp_killed_and_issued_again(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command(tmp_path), cwd=ROOT, env=environment, start_new_session=True)
    until = time.monotonic() + 1500
    while time.monotonic() < until and first.poll() is None:
        statuses = [job.status for job in read_jobs(sweep)] if sweep.is_dir() else []
        if statuses[:1] == ["finished"] and statuses[1:2] == ["running"]:
            break
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {job.number: job for job in read_jobs(sweep)}
    assert before[0].status == "finished"
    written = (sweep / "0" / "metrics.jsonl").stat().st_mtime_ns

    done = subprocess.run(command(tmp_path), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = read_jobs(sweep)
    finished = [job for job in jobs if job.status == "finished"]
    assert len(finished) == 2
    # The run in progress was killed with its sweep, or came to its end before that and was taken up.
    assert {job.status for job in jobs if job.status != "finished"} <= {"killed"}
    assert jobs[0] == before[0]
    assert (sweep / "0" / "metrics.jsonl").stat().st_mtime_ns == written, "what was finished did not run again"
    assert "started" not in {line.split()[2] for line in done.stdout.splitlines() if line.startswith("run 0 ")}
    rates = set()
    for job in finished:
        log = (sweep / "jobs" / f"{job.number}.log").read_text()
        (line,) = re.findall(r"network: AdamW, lr (\S+), (\S+) on 2 ranks", log)
        asked = float(job.params["optimizer.lr"])
        for rate in line:
            assert float(rate) == pytest.approx(asked, rel=1e-5), "every rank trains with the rate of its job"
        assert yaml.safe_load((sweep / str(job.number) / "config.yaml").read_text())["optimizer"]["lr"] == asked
        rates.add(line[0])
    assert len(rates) == 2
    # One directory per job, each with the records of one run of three updates.
    directories = sorted(path.name for path in sweep.iterdir() if path.is_dir() and path.name.isdigit())
    assert directories == sorted(str(job.number) for job in jobs)
    assert [row["step"] for row in load_runs(sweep) if row["status"] == "finished"] == [3, 3]
