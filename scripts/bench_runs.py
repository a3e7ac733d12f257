"""How long it takes to read many runs: python scripts/bench_runs.py --runs 1000 --rows 10000 --numbers 3

Writes runs into a temporary folder, then times `sana.run.load_runs` twice: the first reading, and the one that finds
every summary in its place, as after training. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from sana.run import load_metrics, load_runs


def write_runs(folder: Path, runs: int, rows: int, numbers: int) -> int:
    """Runs with the same rows but for their seed; returns the bytes of one metrics.jsonl."""
    rng = np.random.default_rng(0)
    names = ["train/loss", "train/lr", "train/grad_norm", *(f"val/loss_t{i}" for i in range(numbers))][:numbers]
    lines = (
        {"step": step, "time": 1.7e9 + step, **dict(zip(names, values, strict=True))}
        for step, values in enumerate(rng.random((rows, numbers)).tolist(), start=1)
    )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for i in range(runs):
        run = folder / "grid" / f"{i:04d}"
        run.mkdir(parents=True)
        (run / "metrics.jsonl").write_text(text)
        (run / "overrides.yaml").write_text(f'- "seed={i}"\n- "optimizer.lr=1e-3"\n')
        status = {"status": "finished", "reason": None, "started": "2026-01-31T12:00:00+00:00", "seconds": 60.0}
        (run / "status.json").write_text(json.dumps(status))
        (run / "environment.json").write_text(json.dumps({"git": {"commit": "0" * 40, "dirty": False}}))
    return len(text)


def main() -> None:
    """Write, read twice, and one run's curves."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--numbers", type=int, default=3, help="per row, besides step and time")
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench_runs_"))
    try:
        size = write_runs(folder, given.runs, given.rows, given.numbers)
        print(f"{given.runs} runs of {given.rows} rows, {size / 1e6:.1f} MB each; {os.cpu_count()} cores", flush=True)
        found = {}
        for name in ("first", "again"):
            start, cpu = time.perf_counter(), time.process_time()
            frame = load_runs(folder)
            found[name] = {"s": round(time.perf_counter() - start, 2), "cpu_s": round(time.process_time() - cpu, 2)}
            assert len(frame) == given.runs
            print(f"load_runs, {name}: {found[name]['s']} s ({found[name]['cpu_s']} s of CPU)", flush=True)
        start = time.perf_counter()
        load_metrics(folder / "grid" / "0000")
        found["load_metrics_s"] = round(time.perf_counter() - start, 3)
        print(json.dumps(vars(given) | {"mb_per_run": round(size / 1e6, 2)} | found))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
