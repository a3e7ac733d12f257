"""What saving costs: one training run in which windows of 50 updates with a save and without one take turns."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from sana.checkpoint.run_folder import list_checkpoints, read_manifest
from sana.run.records import read_metrics

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 50  # updates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command line."""
    parser.add_argument("--windows", type=int, default=10, help="pairs of windows (%(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("overrides", nargs="*", help="settings of train.py, such as strategy=fsdp trainer.devices=2")


def run(options: argparse.Namespace) -> int:
    """Train, and print the share of the time of 50 updates that one save costs."""
    with tempfile.TemporaryDirectory(prefix="saving_") as folder:
        home = Path(folder) / "run"
        steps = WINDOW * (2 * options.windows + 2)
        command = [
            sys.executable, "train.py", f"run.dir={home}", f"trainer.max_steps={steps}",
            f"callback.checkpoints.every={2 * WINDOW}", f"callback.records.every={WINDOW}",
            "callback.validation=null", "callback.samples=null", *options.overrides,
        ]  # fmt: skip
        code = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.DEVNULL).returncode
        if code:
            return code
        rows = [row for row in read_metrics(home / "metrics.jsonl") if row["step"] % WINDOW == 0 and row["step"]]
        place = list_checkpoints(home / "checkpoints")[0][1]
        size = sum(size for size, _ in read_manifest(place).files.values())
    # The save of update 100 is copied and written within updates 101 to 150.
    spans = [(a["step"], b["time"] - a["time"], b) for a, b in pairwise(rows)][1:]
    with_save = [span for step, span, _ in spans if step % (2 * WINDOW) == 0]
    without = [span for step, span, _ in spans if step % (2 * WINDOW)]
    blocked = [row["time/checkpoint"] * WINDOW for step, _, row in spans if step % (2 * WINDOW) == 0]
    numbers = {
        "updates": WINDOW,
        "seconds_without": statistics.median(without),
        "seconds_with": statistics.median(with_save),
        "cost_percent": 100 * (statistics.median(with_save) / statistics.median(without) - 1),
        "blocked_ms": 1000 * statistics.median(blocked),
        "state_mib": size / 2**20,
        "windows": len(with_save),
    }
    print(
        f"a save in {WINDOW} updates costs {numbers['cost_percent']:.2f} % of their time: "
        f"{numbers['seconds_with']:.2f} s with, {numbers['seconds_without']:.2f} s without (medians of "
        f"{len(with_save)} windows); training waits {numbers['blocked_ms']:.0f} ms for the copy of "
        f"{numbers['state_mib']:.1f} MiB"
    )
    if options.json:
        Path(options.json).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0
