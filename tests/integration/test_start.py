"""Growing and pruning as a user does it: the report, the run that starts from it, its records, and how it goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.checkpoint.run_file import read_run_file
from sana.network.importance import most_important
from sana.run.groups import CONF
from sana.run.importance import read_importance
from sana.run.records import read_metrics
from sana.run.runs import SHIPPED, newest_checkpoint

ROOT = CONF.parent
SMALL = ["experiment=image/scenes", "data.count=64", "data.held=16", "data.batch_size=4", "data.validation=4",
         "model.compile=false", "callback=importance", "callback.samples=null", "callback.validation=null",
         "callback.records.every=1", "callback.importance.times=2", "callback.importance.samples=2",
         "trainer.precision=32-true", "trainer.max_steps=1"]  # fmt: skip


def call(*words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False, timeout=500,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest_checkpoint(run)
    assert checkpoint is not None
    return dict(read_run_file(checkpoint, "live")[0])


@pytest.mark.slow
@pytest.mark.long
def test_prune_by_a_report_then_grow_again(tmp_path: Path) -> None:
    report = tmp_path / "report"
    said = call("scripts/importance.py", "ckpt=scenes", "prompt=[a star,two rings]", "sampler.steps=2", f"out={report}")
    assert "measured in" in said
    data = f"data.folder={tmp_path / 'scenes'}"
    cut = [*SMALL, data, "init=scenes", "start=prune", f"start.importance={report}/importance.json", "network.depth=4"]
    said = call("train.py", *cut, f"run.dir={tmp_path / 'pruned'}")
    keep = most_important(read_importance(report).values, 4)
    assert f"pruned from 6 blocks to {', '.join(map(str, keep))}" in said
    start = json.loads((tmp_path / "pruned" / "environment.json").read_text())["start"]
    assert (start["how"], start["keep"], start["source_depth"]) == ("pruned", keep, 6)
    assert start["source"] == str(SHIPPED / "scenes" / "model.safetensors")
    tensors = weights(tmp_path / "pruned")
    assert sum(name.endswith(".mixer.qkv.weight") for name in tensors) == 4

    # Its own checkpoint is not what the report is about.
    grow = [
        *SMALL,
        data,
        f"init={tmp_path / 'pruned'}",
        "start=grow",
        "start.kept=3",
        "start.new_lr=2",
        "network.depth=5",
    ]
    wrong = [*cut[:-4], f"init={tmp_path / 'pruned'}", *cut[-3:-1], "network.depth=3"]
    assert "ranks 6 blocks" in call("train.py", *wrong, f"run.dir={tmp_path / 'wrong'}", code=2)

    place = f"run.dir={tmp_path / 'grown'}"
    said = call("train.py", *grow, "resume=auto", place, "strategy=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
    assert "grown from 3 of 4 blocks to 5: 2 new, Constant(scale=0.0), at 2 times the rate" in said
    rows = read_metrics(tmp_path / "grown" / "metrics.jsonl")
    first = next(row for row in rows if "importance/block_04" in row)
    assert first["step"] == 0
    assert abs(first["importance/block_03"]) < 1e-6
    assert abs(first["importance/block_04"]) < 1e-6 < first["importance/block_02"]
    assert [row["train/lr_x2"] for row in rows if "train/lr" in row] == [
        2 * r["train/lr"] for r in rows if "train/lr" in r
    ]
    before = weights(tmp_path / "grown")
    said = call("train.py", *grow, "resume=auto", place, "trainer.max_steps=2")  # the same command goes on
    assert "resumed from" in said
    assert "grown from" not in said
    after = weights(tmp_path / "grown")
    assert before.keys() == after.keys()
    rows = read_metrics(tmp_path / "grown" / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/lr_x2" in row] == [1, 2]
