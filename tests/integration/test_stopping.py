"""Runs of two real processes that are told to stop, go on, and lose a rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sana.checkpoint.run_folder import list_checkpoints
from sana.run.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.count=96", "data.held=16", "data.batch_size=12", "data.validation=4", "data.cache_text=true",
    "network.width=32", "network.depth=2", "block.cross.heads=1", "trainer.precision=32-true",
    "trainer.accelerator=cpu", "callback.samples=null", "callback.validation=null", "callback.records.every=1",
    "trainer.max_steps=1000000", "callback.checkpoints.every=5",
]  # fmt: skip


def start(run: Path, data: Path, *overrides: str, path: str | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if path is not None:
        environment |= {"PATH": f"{path}:{environment['PATH']}", "SLURM_JOB_ID": "17"}
    return subprocess.Popen(
        [sys.executable, "train.py", f"run.dir={run}", f"data.folder={data}", *SMALL, *overrides, "resume=auto"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def until(process: subprocess.Popen[str], what: Callable[[], bool], patience: float = 300.0) -> None:
    end = time.monotonic() + patience
    while not what():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.1)


def steps(run: Path) -> list[int]:
    path = run / "metrics.jsonl"
    return [int(row["step"]) for row in read_metrics(path)] if path.exists() else []


def child(process: subprocess.Popen[str]) -> int:
    """The second rank."""
    (found,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[:1]
    return int(found)


@pytest.mark.long
def test_a_signal_to_one_rank_stops_all_and_the_run_goes_on_until_one_is_killed(tmp_path: Path) -> None:
    run, data, called = tmp_path / "run", tmp_path / "data", tmp_path / "called"
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {called}\n')
    (tmp_path / "scontrol").chmod(0o755)
    two = ("strategy=ddp", "trainer.devices=2")

    process = start(run, data, *two, path=str(tmp_path))
    until(process, lambda: len(steps(run)) > 6)
    os.kill(child(process), signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 75, said
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["reason"]) == ("preempted", "SIGUSR1")
    assert called.read_text() == "requeue 17\n"
    stopped = list_checkpoints(run / "checkpoints")[0][0]
    assert stopped == steps(run)[-1]

    process = start(run, data, *two)
    until(process, lambda: bool(steps(run)) and steps(run)[-1] > stopped + 6)
    begun = time.monotonic()
    os.kill(child(process), signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - begun < 60
    assert process.returncode not in (0, 75)
    assert f"update {stopped}, sample {12 * stopped}," in said
    later = json.loads((run / "status.json").read_text())
    assert later["status"] == "failed"
    assert "rank" in later["reason"]
    assert (later["id"], later["started"], len(later["resumed"])) == (status["id"], status["started"], 1)
    assert steps(run) == list(range(1, steps(run)[-1] + 1))  # one curve
    assert list_checkpoints(run / "checkpoints")[0][0] > stopped


@pytest.mark.long
def test_torchrun_as_it_is(tmp_path: Path) -> None:
    """No run.dir: the ranks learn from the first where the run lies."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        [*command, f"run.folder={tmp_path / 'runs'}", f"data.folder={tmp_path / 'data'}", *SMALL, "strategy=fsdp",
         "trainer.devices=2", "trainer.max_steps=3"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (tmp_path / "runs" / "tiny").iterdir()
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert steps(run) == [1, 2, 3]
    assert len(list((run / "checkpoints" / "step_00000003.ckpt").glob("model.*"))) == 2
