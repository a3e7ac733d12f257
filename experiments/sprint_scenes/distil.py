"""All trainings of the experiment: the student, and nine short ones that say what each loss is worth.

python experiments/sprint_scenes/distil.py        what is finished is not done again; what was stopped goes on
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(os.environ.get("RUNS", ROOT / "runs" / "sprint_scenes"))
SEEDS = (0, 1, 2)
TIME = "00:00:04:00"  # of an ablation, from its first update (and compiling) to its last; days:hours:minutes:seconds
# Of both losses from the first update on, without the other, and without the one.
ARMS = {
    "scm": ("model.adversarial_weight=0",),
    "ladd": ("model.scm_weight=0", "model.adversarial_start=0"),
    "both": ("model.adversarial_start=0",),
}
STOPPED = 75  # exit code of a run that saved and stopped at trainer.max_time


def train(folder: Path, *settings: str, ends: tuple[int, ...] = (0,)) -> None:
    """Train into a folder, going on where a run there was stopped; its words and seconds go beside it.

    Raises:
        RuntimeError: it failed.
    """
    done, log = folder.with_suffix(".seconds"), folder.with_suffix(".log")
    if done.is_file():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with open(log, "a", encoding="utf-8") as words:
        command = ("train.py", "experiment=sprint/tiny", "resume=auto", f"run.dir={folder}", *settings)
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=words, stderr=words, check=False).returncode
    if code not in ends:
        raise RuntimeError(f"train.py ended with {code}; see {log}")
    done.write_text(f"{time.monotonic() - begun:.1f}\n")
    print(f"{time.strftime('%H:%M:%S')} {folder.relative_to(RUNS)}: {done.read_text().strip()} s", flush=True)


def ablate(arm: str, seed: int) -> None:
    """One arm of one seed on one core."""
    train(
        RUNS / f"{arm}_{seed}", *ARMS[arm], f"seed={seed}", f"trainer.max_time={TIME}",
        "trainer.max_steps=100000", "schedule=constant", "schedule.warmup=20", "callback.comparison=null",
        "model.ema_decay=0.97", "callback.checkpoints.every=100000", ends=(0, STOPPED),
    )  # fmt: skip


def main() -> None:
    """The student on two cores, then the arms, one core each."""
    train(RUNS / "student", "strategy=ddp", "trainer.devices=2")
    with ThreadPoolExecutor(2) as workers:
        list(workers.map(lambda job: ablate(*job), [(arm, seed) for seed in SEEDS for arm in ARMS]))


if __name__ == "__main__":
    main()
