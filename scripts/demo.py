"""The whole path on the embedded default: train the tiny recipe, judge it, draw with it, and write a report.

    make demo

Runs `train.py`, `eval.py` and `sample.py` as a user would. The last line printed is the path of results.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a red circle left of a blue square"


def call(what: str, *command: str) -> float:
    """Run one entry point, showing its output; stop with its exit code if it fails. Returns its seconds."""
    print(f"\n== {what}: python {' '.join(command)}", flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def main() -> None:
    """Train, evaluate, sample; then say where everything lies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="passed to train.py, such as trainer.max_steps=100")
    overrides = parser.parse_args().overrides
    run = Path("runs") / "demo" / datetime.now().strftime("%Y%m%d_%H%M%S")
    start = time.perf_counter()
    seconds = {"train": call("training", "train.py", f"run.dir={run}", *overrides)}
    seconds["eval"] = call("evaluation", "eval.py", f"ckpt={run}")
    seconds["sample"] = call("sampling", "sample.py", f"ckpt={run}", f"prompt={PROMPT}", "n=8", "seed=0")
    results = ROOT / run / "results.json"
    overall = json.loads(results.read_text())["overall"]
    print(f"\noverall score {overall:.3f}; {time.perf_counter() - start:.0f} s in all:", end=" ")
    print(", ".join(f"{name} {spent:.0f} s" for name, spent in seconds.items()))
    for name, path in (
        ("report", "report.html"),
        ("checkpoint", "checkpoints"),
        ("drawn", "drawn"),
        ("records", ""),
    ):
        print(f"{name:<11}{run / path}")
    print(results.relative_to(ROOT))


if __name__ == "__main__":
    main()
