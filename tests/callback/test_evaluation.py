"""Metrics in training: real runs on one and two ranks; training goes as if nothing had been measured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sana.callback.evaluation import Evaluation, from_first_rank
from sana.metric.geneval_scenes import GenEvalScenes
from sana.run.groups import CONF
from sana.run.records import read_metrics
from sana.scenes import TASKS

ROOT = CONF.parent
SMALL = ["data.count=96", "data.held=32", "data.batch_size=8", "data.validation=8", "callback.records.every=1",
         "callback.samples=null", "callback.validation.bins=2", "trainer.precision=32-true", "trainer.max_steps=2",
         "sampler.steps=2"]  # fmt: skip
MEASURED = ["callback=evaluated", "callback.evaluation.every=1", "callback.evaluation.per_task=1",
            "callback.evaluation.batch_size=2",
            "callback.evaluation.metrics.fid_scenes.allow_small_n=true"]  # fmt: skip


def train(folder: Path, name: str, *more: str) -> list[dict]:
    run = folder / name
    done = subprocess.run(
        [sys.executable, "train.py", *SMALL, f"run.dir={run}", f"data.folder={folder / 'scenes'}", *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return read_metrics(run / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.long
def test_training_does_not_notice_and_ranks_do_not_wait_for_ever(tmp_path):
    plain = train(tmp_path, "plain")
    one = train(tmp_path, "one", *MEASURED)
    losses = [[r["train/loss"] for r in rows if "train/loss" in r] for rows in (plain, one)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2
    rows = {r["step"]: r for r in one if "eval/ema/geneval_scenes" in r}
    assert set(rows) == {1, 2}
    names = {"geneval_scenes", "fid_scenes", *(f"geneval_scenes/{task}" for task in TASKS)}
    for row in rows.values():
        assert {k for k in row if k.startswith("eval/")} == {f"eval/{w}/{n}" for w in ("ema", "live") for n in names}
    assert rows[1]["eval/ema/fid_scenes"] != rows[1]["eval/live/fid_scenes"]
    two = train(tmp_path, "two", *MEASURED, "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    shared = {r["step"]: r for r in two if "eval/ema/geneval_scenes" in r}
    assert set(shared) == {1, 2}
    for step, row in rows.items():
        for key in (k for k in row if k.startswith("eval/")):
            assert shared[step][key] == pytest.approx(row[key], rel=1e-2, abs=1e-6)


def test_bad_settings_are_refused():
    for arguments, message in (
        ({"every": 0}, "at least 1"),
        ({"weights": ["EMA"]}, "expected some of ema, live"),
        ({"weights": []}, "expected some of ema, live"),
    ):
        with pytest.raises(ValueError, match=message):
            Evaluation({}, None, **arguments)


def test_scores_of_one_rank(recwarn):
    half = GenEvalScenes(lambda x, line: (bool(x[0, 0, 0] % 2), "even"), resamples=1)
    callback = Evaluation({"scenes": half, "left out": None}, None,
                          per_task=1, samples=2)  # fmt: skip
    assert len(callback.lines) == len(callback.seeds) == len(set(callback.seeds)) == 12
    numbers = callback._score([np.full((4, 4, 3), i, np.uint8) for i in range(12)])
    assert numbers == {"scenes": 0.5} | {f"scenes/{task}": 0.5 for task in TASKS}

    def refuses(*_):
        raise ValueError("fid: too few")

    callback.metrics = {"fid": refuses}
    assert callback._score([]) == {}
    assert "too few" in str(recwarn.pop().message)
    assert from_first_rank(lambda: {"a": 1.0}) == {"a": 1.0}
