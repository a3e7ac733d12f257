"""The scenes model that ships: what its results say of it is so, and it draws what it is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sana.metric.scenes import score
from sana.run.restore import restore
from sana.run.runs import SHIPPED, find_weights
from sana.run.saved import prepare
from sana.scenes import TASKS, entry

HERE = SHIPPED / "scenes"
ROOT = SHIPPED.parent
RESULTS = json.loads((HERE / "results.json").read_text())


def call(*line: str) -> None:
    done = subprocess.run([sys.executable, *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_files_are_those_of_the_results() -> None:
    model = HERE / "model.safetensors"
    assert find_weights("scenes").path == model
    assert hashlib.sha256(model.read_bytes()).hexdigest() == RESULTS["sha256"]
    parts = [model, ROOT / "experiments/dc_ae_tiny/dc_ae_tiny.safetensors", *ROOT.glob("experiments/gemma_tiny/*.*")]
    assert sum(path.stat().st_size for path in parts) <= 12e6


def test_figures_have_intervals() -> None:
    assert {"overall", "tasks", "held_out", "steps", "seconds", "peak_rss_gib", "commit"} <= RESULTS.keys()
    assert RESULTS["tasks"].keys() == {*TASKS}
    for found in (RESULTS["overall"], RESULTS["held_out"]["overall"], *RESULTS["tasks"].values()):
        low, high = found["interval"]
        assert low <= found["mean"] <= high
    assert len(RESULTS["seeds"]) == 2


def test_drawing_compiles_nothing() -> None:
    """It was trained with `compile`, which costs a minute and needs a compiler: too much for a picture."""
    restored = restore(prepare("sample", ["ckpt=scenes", "prompt=a star"]))
    assert restored.training.model.compile
    assert all(block._compiled_call_impl is None for block in restored.module.network.blocks)


@pytest.mark.slow
def test_scores_as_the_results_say(tmp_path: Path) -> None:
    each = 15
    out = f"out={tmp_path / 'drawn'}", f"output={tmp_path / 'results.json'}"
    call("eval.py", "ckpt=scenes", "metric=geneval_scenes", f"per_task={each}", "held_out=5", "seed=77", *out)
    overall = json.loads((tmp_path / "results.json").read_text())["overall"]
    shares = [RESULTS["tasks"][task]["mean"] for task in TASKS]
    deviation = math.sqrt(sum(p * (1 - p) / each for p in shares)) / len(shares)
    assert overall == pytest.approx(RESULTS["overall"]["mean"], abs=4 * deviation)


@pytest.mark.slow
def test_draws_a_relation(tmp_path: Path) -> None:
    call("sample.py", "ckpt=scenes", "prompt=a red circle left of a blue square", "n=8", "seed=0", f"out={tmp_path}")
    things = [{"class": "square", "count": 1, "color": "blue"}, {"class": "circle", "count": 1, "color": "red"}]
    line = entry("position", [things[0], things[1] | {"position": ["left of", 0]}])
    assert line["prompt"] == "a red circle left of a blue square"
    pictures = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(tmp_path.glob("*.png"))]
    assert len(pictures) == 8
    assert sum(score(picture, line)[0] for picture in pictures) >= 5
