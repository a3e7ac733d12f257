"""Runs of a sweep as processes of their own: judged, pruned, and ended with all that they started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_sweep import ROOT, SETTINGS

from sana.run import job as job_module
from sana.run import search
from sana.run.job import Job, read_job, run_job, write_job

CHILD = """
import json, os, subprocess, sys, time
path = [a for a in sys.argv if a.startswith("run.dir=")][0][8:]
os.mkdir(path)
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(path + "/rank", "w").write(str(rank.pid))
json.dump({"status": "running"}, open(path + "/status.json", "w"))
metrics = open(path + "/metrics.jsonl", "w")
for step in range(1, 100):
    print(json.dumps({"step": step, "val/loss": float(os.environ.get("LOSS", "1"))}), file=metrics, flush=True)
    time.sleep(float(os.environ.get("PAUSE", "0.2")))
    if step == int(os.environ.get("STEPS", "3")):
        break
if os.environ.get("FAIL"):
    raise SystemExit("no luck")
json.dump({"status": "finished"}, open(path + "/status.json", "w"))
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    script = tmp_path / "child.py"
    script.write_text(CHILD)

    def command(settings: dict, folder: Path, job: Job) -> list[str]:
        return [sys.executable, str(script), f"run.dir={folder / str(job.number)}"]

    monkeypatch.setattr(job_module, "_command", command)
    monkeypatch.setattr(job_module, "POLL", 0.1)
    folder = tmp_path / "sweep"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(SETTINGS))
    return folder


def gone(pid: int) -> bool:
    for _ in range(50):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_run_is_judged_and_its_ranks_end_with_it(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_job(child, Job(0, []))
    done = run_job(child, 0)
    assert (done.status, done.value, done.code) == ("finished", 1.0, 0)
    assert read_job(child, 0) == done
    assert gone(int((child / "0" / "rank").read_text())), "devices are free when the run has ended"
    monkeypatch.setenv("FAIL", "1")
    write_job(child, Job(1, []))
    failed = run_job(child, 1)
    assert (failed.status, failed.reason) == ("failed", "no luck (exit code 1)")


def test_a_poor_run_is_pruned(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    settings = {**SETTINGS, **search.Optuna(startup=2, trials=9).record()}
    (child / "sweep.json").write_text(json.dumps(settings))
    study = search.open_study(child, settings)
    space = {"lr": optuna.distributions.FloatDistribution(0, 1)}
    for _ in range(3):
        trial = study.ask(space)
        for step in range(1, 4):
            trial.report(0.5, step)
        study.tell(trial, 0.5)
    monkeypatch.setenv("STEPS", "90")
    trial = study.ask(space)
    write_job(child, Job(trial.number, []))
    begun = time.monotonic()
    job = run_job(child, trial.number)
    assert time.monotonic() - begun < 10
    assert job.status == "pruned"
    assert job.reason == "val/loss 1 at update 1 is worse than the median of the other runs"
    assert json.loads((child / "3" / "status.json").read_text())["status"] == "pruned"
    monkeypatch.setenv("LOSS", "0.1")
    monkeypatch.setenv("STEPS", "3")
    trial = study.ask(space)
    write_job(child, Job(trial.number, []))
    assert run_job(child, trial.number).status == "finished"


ORPHAN = """
import sys, json
from pathlib import Path
from sana.run import job
job.POLL = 0.1
child, folder = sys.argv[1:]
job._command = lambda settings, folder, j: [sys.executable, child, f"run.dir={folder / str(j.number)}"]
job.run_job(Path(folder), 0)
"""


@pytest.mark.parametrize("how", ["the sweep is killed", "SIGTERM"])
def test_a_run_ends_with_its_sweep(how: str, child: Path, tmp_path: Path) -> None:
    write_job(child, Job(0, []))
    watcher = [sys.executable, "-c", ORPHAN, str(tmp_path / "child.py"), str(child)]
    code = "import subprocess, sys, time; subprocess.Popen(sys.argv[1:], start_new_session=True); time.sleep(60)"
    environ = {**os.environ, "PAUSE": "0.2", "STEPS": "90", "PYTHONPATH": str(ROOT)}
    if how == "SIGTERM":
        parent = subprocess.Popen(watcher, env=environ)
    else:
        parent = subprocess.Popen([sys.executable, "-c", code, *watcher], env=environ)
    for _ in range(150):
        if (child / "0" / "status.json").exists():
            break
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM if how == "SIGTERM" else signal.SIGKILL)
    assert gone(int((child / "0" / "rank").read_text()))
    parent.wait()
    for _ in range(50):
        job = read_job(child, 0)
        if job is not None and job.status != "running":
            break
        time.sleep(0.1)
    assert job is not None
    reasons = {"SIGTERM": "the sweep got SIGTERM", "the sweep is killed": "the sweep was killed"}
    assert (job.status, job.reason) == ("killed", reasons[how])
