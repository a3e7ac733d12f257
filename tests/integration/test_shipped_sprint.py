"""The few-step student that ships: it is found by its name, and draws as its results say."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from sana.run.runs import SHIPPED, find_weights, shipped_models

HERE = SHIPPED / "sprint_scenes"
RESULTS = json.loads((HERE / "results.json").read_text())


def test_the_file_is_that_of_the_results() -> None:
    found = find_weights("scenes_sprint").path
    assert found == HERE / "scenes_sprint.safetensors"
    assert hashlib.sha256(found.read_bytes()).hexdigest() == RESULTS["sha256"]
    assert {"scenes", "scenes_sprint"} <= {*shipped_models()}


def test_figures_have_intervals() -> None:
    figures = [RESULTS["teacher_overall"], *RESULTS["overall"].values(), *RESULTS["ratio"].values()]
    for figure in [*figures, *RESULTS["ablations"].values()]:
        low, high = figure["interval"]
        assert low <= figure["mean"] <= high
    assert RESULTS["ablations"].keys() == {"scm", "ladd", "both"}
    for steps, figure in RESULTS["overall"].items():
        assert figure["mean"] / RESULTS["teacher_overall"]["mean"] == pytest.approx(RESULTS["ratio"][steps]["mean"])


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 4])
def test_scores_as_the_results_say(tmp_path: Path, steps: int) -> None:
    each = 20
    line = (
        "eval.py", "ckpt=scenes_sprint", "metric=geneval_scenes", f"per_task={each}", "held_out=1", "seed=77",
        f"sampler.steps={steps}", f"out={tmp_path / 'drawn'}", f"output={tmp_path / 'results.json'}",
    )  # fmt: skip
    done = subprocess.run([sys.executable, *line], cwd=SHIPPED.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    overall = json.loads((tmp_path / "results.json").read_text())["overall"]
    shares = [task[str(steps)] for task in RESULTS["tasks"].values()]
    deviation = math.sqrt(sum(p * (1 - p) / each for p in shares)) / len(shares)
    assert overall == pytest.approx(RESULTS["overall"][str(steps)]["mean"], abs=4 * deviation)
