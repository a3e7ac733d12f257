"""How long a start takes: the help, a refused typo, and the first update of the tiny recipe.

python scripts/startup.py [folder of the scenes, made beforehand if it is not there]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GOALS = {"help": 0.6, "refusal": 3.0, "first update": 12.0}  # seconds, on two cores


def timed(*line: str, code: int = 0) -> float:
    """Wall seconds of train.py with a command line."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", *line], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return time.perf_counter() - start


def first_update(scenes: Path) -> float:
    """Wall seconds from the start of the tiny recipe to the first line of metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        metrics, begun = Path(folder) / "run" / "metrics.jsonl", time.perf_counter()
        line = [f"run.dir={folder}/run", f"data.folder={scenes}", "data.count=640", "data.cache_latents=false"]
        process = subprocess.Popen([sys.executable, "train.py", *line], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            while not metrics.exists() or not metrics.stat().st_size:
                if process.poll() is not None:
                    raise SystemExit(f"train.py ended with exit code {process.returncode} before its first update")
                time.sleep(0.02)
            return time.perf_counter() - begun
        finally:
            process.kill()
            process.wait()


def main() -> int:
    """Measure, three times each, and print the least; 1 if a goal is missed."""
    scenes = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "cache" / "startup")
    first_update(scenes)  # makes the scenes, and fills the caches of the file system
    found = {
        "help": min(timed("--help") for _ in range(3)),
        "refusal": min(timed("+trainr.max_steps=3", code=2) for _ in range(3)),
        "first update": min(first_update(scenes) for _ in range(3)),
    }
    print(
        json.dumps({name: {"seconds": round(value, 2), "goal": GOALS[name]} for name, value in found.items()}, indent=1)
    )
    return int(any(value > GOALS[name] for name, value in found.items()))


if __name__ == "__main__":
    raise SystemExit(main())
