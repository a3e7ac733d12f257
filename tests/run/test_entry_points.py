"""The three entry points as a user runs them, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sana.run.groups import CONF
from sana.run.records import read_metrics
from sana.run.runs import load_runs

ROOT = CONF.parent
SMALL = ["data.count=256", "data.held=32", "data.batch_size=16", "data.validation=8", "callback.records.every=1",
         "callback.samples=null", "callback.validation.bins=2", "trainer.precision=32-true"]  # fmt: skip


def call(*command: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def losses(run: Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(run / "metrics.jsonl") if "train/loss" in row]


@pytest.mark.long
def test_a_sweep_then_a_run_repeated_then_drawing(tmp_path: Path) -> None:
    places = [f"run.folder={tmp_path / 'runs'}", f"data.folder={tmp_path / 'scenes'}"]
    before = set(ROOT.iterdir())
    call("train.py", "-m", "seed=1,2", "trainer.max_steps=3", *SMALL, *places)
    rows = load_runs(tmp_path / "runs")
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert [row["step"] for row in rows] == [3, 3], "max_steps counts updates"
    first, second = (Path(row["path"]) for row in rows)
    assert losses(first) != losses(second)
    for run, seed in ((first, 1), (second, 2)):
        assert {p.name for p in run.iterdir()} >= {
            "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "overrides.yaml", "status.json"
        }  # fmt: skip
        assert f"seed={seed}" in (run / "overrides.yaml").read_text()
        assert json.loads((run / "environment.json").read_text())["data"]["fingerprint"]

    call("train.py", "--rerun", str(first), f"run.dir={tmp_path / 'again'}")
    assert losses(tmp_path / "again") == losses(first), "the same settings give the same losses"

    drawn = []
    for out in ("a", "b"):
        call("sample.py", f"ckpt={first}", "prompt=a red circle", "n=2", "sampler.steps=2", f"out={tmp_path / out}")
        drawn.append([p.read_bytes() for p in sorted((tmp_path / out).glob("*.png"))])
    assert len(drawn[0]) == 2
    assert drawn[0] == drawn[1], "the same seed gives the same pixels"
    assert drawn[0][0] != drawn[0][1]
    sidecar = json.loads((tmp_path / "a" / "a_red_circle_1.json").read_text())
    assert (sidecar["prompt"], sidecar["seed"], sidecar["steps"]) == ("a red circle", 1, 2)

    call("eval.py", f"ckpt={first}", "per_task=1", "held_out=1", "sampler.steps=1", "metric=[geneval_scenes]")
    results = json.loads((first / "results.json").read_text())
    assert set(results) >= {"overall", "tasks", "held_out", "steps", "seconds", "peak_rss_gib", "commit"}
    assert len(results["tasks"]) == 6
    assert results["steps"] == 3
    assert set(ROOT.iterdir()) - before <= {ROOT / ".pytest_cache"}, "nothing is left beside the run"


def test_refusals_have_an_exit_code() -> None:
    for line in (
        ["+trainr.max_steps=3"],
        ["model=sana_160m"],
        ["data=shards", "data.folder=/none"],
        [f"run.dir={ROOT}"],
    ):
        assert call("train.py", *line, code=2) == ""
