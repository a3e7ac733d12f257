"""The entry points as a user calls them: train, resume, sample, evaluate, on real shards and shipped encoders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.checkpoint.run_folder import read_state
from sana.checkpoint.sharded import open_pieces

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data.count=96",
    "data.held=32",
    "data.batch_size=16",
    "data.validation=8",
    "network.width=32",
    "network.depth=2",
    "block.cross.heads=1",
    "trainer.precision=32-true",
    "callback.samples.per_prompt=1",
    "callback.records.every=1",
]


def call(*command: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(folder: Path, data: Path, *overrides: str) -> Path:
    call("train.py", f"run.dir={folder}", f"data.folder={data}", *SMALL, *overrides)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scenes")


@pytest.fixture(scope="module")
def run(data: Path) -> Path:
    return train(data.parent / "run", data, "trainer.max_steps=6", "callback.checkpoints.every=3", "logger=csv")


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_its_records(run: Path) -> None:
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert {"config.yaml", "overrides.yaml", "environment.json", "metrics.jsonl"} <= {p.name for p in run.iterdir()}
    losses = [row["train/loss"] for row in rows(run) if "train/loss" in row]
    assert len(losses) == 6
    assert all(np.isfinite(losses))
    final = {key for row in rows(run) for key in row}
    assert {"train/tflops", "train/mfu", "memory/peak_rss_gib", "time/data", "time/checkpoint"} <= final
    lines = (run / "metrics.csv").read_text().splitlines()
    assert len(lines) == 1 + len(rows(run))
    assert lines[0].startswith("step,time,train/loss")
    assert {"val/loss", "val/loss_t0", "val/loss_t9", "train/grad_norm", "train/lr", "time/model"} <= final
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_00000003.ckpt", "step_00000006.ckpt"]
    assert (run / "samples" / "step_00000006.png").exists()
    assert json.loads((run / "environment.json").read_text())["data"]["fingerprint"]


def test_resuming_gives_the_weights_of_the_straight_run(run: Path, data: Path) -> None:
    ckpt = run / "checkpoints" / "step_00000003.ckpt"
    again = train(data.parent / "resumed", data, "trainer.max_steps=6", f"resume={ckpt}")
    places = [path / "checkpoints" / "step_00000006.ckpt" for path in (run, again)]
    straight, resumed = (open_pieces(place, ("model", "ema", "optimizer")).tensors() for place in places)
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        assert torch.equal(value, resumed[name]), name
    assert [read_state(place)["samples_seen"] for place in places] == [96, 96]


def test_the_same_seed_draws_the_same_pixels(run: Path, tmp_path: Path) -> None:
    pictures = []
    for out in ("a", "b"):
        call(
            "sample.py",
            f"ckpt={run}",
            "prompt=a red circle",
            "n=2",
            "seed=3",
            f"out={tmp_path / out}",
            "sampler.steps=2",
        )
        pngs = sorted((tmp_path / out).glob("*.png"))
        assert len(pngs) == 2
        facts = json.loads(pngs[0].with_suffix(".json").read_text())
        assert facts["prompt"] == "a red circle"
        assert facts["seed"] == 3
        assert facts["steps"] == 2
        pictures.append([np.asarray(Image.open(p)) for p in pngs])
    assert all(np.array_equal(a, b) for a, b in zip(*pictures, strict=True))
    assert not np.array_equal(*pictures[0])


@pytest.mark.long
def test_evaluation_writes_results_and_a_page(run: Path) -> None:
    said = call("eval.py", f"ckpt={run}", "per_task=2", "held_out=1", "metric=geneval_scenes", "sampler.steps=2")
    assert "overall" in said
    results = json.loads((run / "results.json").read_text())
    assert {"overall", "tasks", "held_out", "steps", "seconds", "peak_rss_gib", "commit"} <= set(results)
    assert len(results["tasks"]) == 6
    assert results["steps"] == 6
    page = (run / "report.html").read_text()
    assert "data:image/png;base64" in page
    said = call(
        "eval.py", f"ckpt={run}", "per_task=2", "metric=fid_scenes", "sampler.steps=2", f"out={run / 'few'}", code=2
    )
    assert "96 feature dimensions" in said.splitlines()[-1]


@pytest.mark.long
def test_int8_weights_draw_nearly_the_same(run: Path, tmp_path: Path) -> None:
    common = ["prompt=two stars", "n=1", "sampler.steps=2"]
    call("sample.py", f"ckpt={run}", *common, f"out={tmp_path / 'full'}")
    call("sample.py", f"ckpt={run}", *common, "quant=int8_weight", f"out={tmp_path / 'int8'}")
    full, small = (
        np.asarray(Image.open(next((tmp_path / name).glob("*.png")))).astype(float) for name in ("full", "int8")
    )
    assert 0 < abs(full - small).mean() < 10


@pytest.mark.long
def test_a_sweep_makes_a_directory_per_run(data: Path, tmp_path: Path) -> None:
    overrides = [f"run.folder={tmp_path}", f"data.folder={data}", *SMALL]
    call("train.py", "-m", "seed=1,2", "trainer.max_steps=2", *overrides)
    runs = sorted(p.parent for p in tmp_path.rglob("status.json"))
    assert len(runs) == 2
    assert len({rows(run)[0]["train/loss"] for run in runs}) == 2
    for path in runs:
        assert json.loads((path / "status.json").read_text())["status"] == "finished"
        assert (path / "checkpoints" / "step_00000002.ckpt").exists()


@pytest.mark.long
def test_ctrl_c_leaves_a_usable_checkpoint(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "train.py", f"run.dir={tmp_path / 'run'}", f"data.folder={data}", *SMALL]
    process = subprocess.Popen([*command, "trainer.max_steps=100000"], cwd=ROOT, stderr=subprocess.DEVNULL)
    metrics, patience = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < patience and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(60) == 130
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "interrupted"
    (path,) = (tmp_path / "run" / "checkpoints").iterdir()
    steps = read_state(path)["updates"]["network"]
    again = train(tmp_path / "again", data, f"trainer.max_steps={steps + 1}", f"resume={tmp_path / 'run'}")
    assert rows(again)[0]["step"] == steps + 1
