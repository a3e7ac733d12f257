"""results.json and its table, and what a run's records say about its training."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
from rich.console import Console

from sana.run.results import read_results, results_table, training_facts, write_results

FIGURE = {"mean": 0.5, "interval": [0.4, 0.6], "level": 0.95, "n": 100}


def test_written_in_one_step_and_read_back(tmp_path):
    path = write_results(tmp_path / "new" / "results.json", {"overall": 0.5, "x": float("nan"), "y": np.float64(1.5)})
    assert read_results(path) == {"overall": 0.5, "x": "nan", "y": 1.5}
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]
    path.write_text('{"overall": 0.')
    assert read_results(path) is None
    assert read_results(tmp_path / "none.json") is None


def test_training_facts_from_records(tmp_path):
    assert training_facts(tmp_path) == {"steps": None, "seconds": None, "peak_rss_gib": None}
    rows = [{"step": 10, "time": 100.0}, {"step": 250, "time": 160.5, "train/loss": 1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + '{"step": 300, "ti')
    assert training_facts(tmp_path) == {"steps": 250, "seconds": 60.5, "peak_rss_gib": None}
    (tmp_path / "status.json").write_text('{"status": "finished", "seconds": 75.0, "peak_rss_gib": 1.25, "step": 260}')
    assert training_facts(tmp_path) == {"steps": 250, "seconds": 75.0, "peak_rss_gib": 1.25}


def test_peak_memory_is_that_of_this_process():
    """A block is counted; what the process that started this one had in use is not (ru_maxrss would count it)."""
    child = (
        "from sana.run.environment import peak_rss_gib; a = peak_rss_gib(); b = b'1' * 2**28; print(a, peak_rss_gib())"
    )
    parent = (
        "import subprocess, sys; held = b'1' * 2**29; "
        "print(subprocess.run([sys.executable, '-c', sys.argv[1]], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert 0.005 < before < 0.25
    assert abs(after - before - 0.25) < 0.01


def test_table_shows_every_figure():
    figures = {
        "overall": {**FIGURE, "n": 600},
        "tasks": {"colors": {**FIGURE, "mean": 0.875, "reasons": {"wrong colours": 9, "blank [/]": 2}}},
        "held_out": {"overall": {**FIGURE, "mean": 0.25}, "tasks": {"colors": {**FIGURE, "mean": 0.125}}},
        "fid_scenes": {"mean": 0.01234, "interval": [0.01, 0.02], "n": 600, "feature_space": "small: not Inception"},
    }
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(results_table({"figures": figures}))
    text = console.export_text()
    for part in (
        "87.5 %",
        "50.0 %",
        "25.0 %",
        "12.5 %",
        "40.0 to 60.0",
        "600",
        "wrong colours (9)",
        "0.01234",
        "small",
    ):
        assert part in text, part
    assert "held out: colors" in text
