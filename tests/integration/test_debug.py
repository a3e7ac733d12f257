"""The debug presets as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from sana.run.compose import compose
from sana.run.groups import CONF, list_options
from sana.run.records import read_metrics

TINY = ["data.count=32", "data.held=32", "data.batch_size=4", "data.validation=4", "data.cache_latents=false",
        "network.width=32", "network.depth=1", "block.cross.heads=1", "trainer.precision=32-true",
        "trainer.accelerator=cpu", "sampler.steps=1"]  # fmt: skip


def run(folder: Path, *line: str) -> Path:
    command = [sys.executable, "train.py", *TINY, *line, f"run.dir={folder / 'run'}", f"data.folder={folder / 'data'}"]
    done = subprocess.run(
        command, cwd=CONF.parent, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_the_names_that_users_know() -> None:
    assert list_options("debug") == ["fdr", "limit", "overfit", "profiler"]
    values = {name: compose("train", [f"debug={name}"]).resolved for name in list_options("debug")}
    assert values["fdr"]["trainer"]["fast_dev_run"] is True
    assert values["limit"]["trainer"]["max_steps"] == values["limit"]["callback"]["samples"]["every"] * 2 == 10
    assert values["profiler"]["trainer"]["profiler"]["_target_"].endswith("SimpleProfiler")
    assert values["overfit"]["trainer"]["overfit_batches"] == 1
    # A preset is chosen last, but the command line still wins.
    assert compose("train", ["debug=overfit", "trainer.max_steps=7"]).resolved["trainer"]["max_steps"] == 7


@pytest.mark.long
def test_overfitting_sees_one_batch_and_learns_it(tmp_path: Path) -> None:
    path = run(
        tmp_path, "debug=overfit", "trainer.max_steps=60", "callback.validation=null", "callback.checkpoints=null"
    )
    losses = [row["train/loss"] for row in read_metrics(path / "metrics.jsonl") if "train/loss" in row]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    # The same samples, noises and times: so smooth a curve has no other reason.
    assert max(b - a for a, b in pairwise(losses[20:])) < 0.2 * losses[0]


@pytest.mark.long
def test_one_update_of_everything_and_a_profile(tmp_path: Path) -> None:
    path = run(tmp_path / "fdr", "debug=fdr", "model.frozen=offload", "network.checkpoint_every=1")
    assert list((path / "samples").glob("*.png"))
    assert any("val/loss" in row for row in read_metrics(path / "metrics.jsonl"))
    path = run(tmp_path / "profiler", "debug=profiler", "trainer.max_steps=2", "callback=none")
    assert "run_training_epoch" in (path / "fit-profile.txt").read_text()
