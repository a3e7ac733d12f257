"""All trainings and drawings of the experiment.

For each seed a small, a deep and a grown network, three prunings of the grown one, and images of the one pruned by
importance for judges to choose from.

python experiments/sana15_scenes/chain.py [SEED ...]        two stages at a time; what is finished is not done again
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RUNS = Path(os.environ.get("RUNS", ROOT / "runs" / "sana15_scenes"))
SEEDS = (0, 1, 2)
SMALL, DEEP, PRUNED = 4, 8, 5  # blocks
S = 2000  # updates of the deep network from scratch; the small one's too
GROWN = 0.6  # of S: updates of the grown network
RECOVERY = 100  # updates after pruning
CALIBRATION = 48  # prompts that importance is measured on
POOL = 16  # candidates per prompt
TASKS = ("single_object", "colors", "counting")  # those of the recipe
SCORED, DRAWN = 100, 20  # prompts of each task: at each score, and for judges
ARMS = ("importance", "last", "random")
JUDGES = ("colours", "mix_scenes")  # imperfect ones, worst first


def script(log: Path, *command: str) -> None:
    """Run one script; its words go to a file.

    Raises:
        RuntimeError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as words:
        code = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=words, stderr=words, check=False).returncode
    if code:
        raise RuntimeError(f"{command[0]} ended with {code}; see {log}")


def once(folder: Path, work: Callable[[], None]) -> None:
    """Do what has not been done before, and note the seconds it took as the folder's neighbour."""
    done = folder.with_suffix(".seconds")
    if done.is_file():
        return
    begun = time.monotonic()
    work()
    seconds = time.monotonic() - begun
    done.write_text(f"{seconds:.1f}\n")
    print(f"{time.strftime('%H:%M:%S')} {folder.relative_to(RUNS)}: {seconds:.0f} s", flush=True)


def train(folder: Path, seed: int, steps: int, depth: int, every: int, *settings: str) -> None:
    """Train into a folder, going on where a run there was stopped; scored every so many updates and at the end."""
    once(
        folder,
        lambda: script(
            folder.with_suffix(".log"),
            "train.py", "experiment=sana15/scenes", "resume=auto", f"seed={seed}", f"network.depth={depth}",
            f"run.dir={folder}", f"trainer.max_steps={steps}", f"callback.evaluation.every={every}",
            f"callback.evaluation.prompts={RUNS / 'scored.jsonl'}", *settings,
        ),
    )  # fmt: skip


def grow(home: Path, seed: int) -> None:
    """The grown network: copies of the small one's blocks follow them."""
    train(
        home / "grown", seed, round(GROWN * S), DEEP, S // 10,
        f"init={home / 'small'}", "start=grow_cyclic", f"start.kept={SMALL}",
    )  # fmt: skip


def prune(home: Path, seed: int, arm: str) -> None:
    """One arm of pruning, and its recovery: the same updates at the same rate for all."""
    report = home / "importance" / "importance.json"
    picked = sorted(random.Random(seed).sample(range(DEEP), PRUNED))
    chosen = {
        "importance": f"start.importance={report}",
        "last": f"start.keep={list(range(PRUNED))}".replace(" ", ""),
        "random": f"start.keep={picked}".replace(" ", ""),
    }
    train(
        home / f"by_{arm}", seed, RECOVERY, PRUNED, RECOVERY,
        f"init={home / 'grown'}", "start=prune", chosen[arm],
        "optimizer.lr=3e-3", "schedule.warmup=20", "model.ema_decay=0.95",
    )  # fmt: skip


def draw(home: Path) -> None:
    """Two pools of the same prompts and other noise, which all judges score: one is estimated from, one checks that."""
    log = home / "chosen.log"
    for name, first in (("pool", 0), ("fresh", 1_000_000)):
        script(
            log, "sample.py", f"ckpt={home / 'by_importance'}", f"prompt={prompts(home, name, first)}",
            f"out={home / name}", f"best_of={POOL}", f"judge={JUDGES[0]}", "keep=1", "keep_all=true", "layout=geneval",
            "batch_size=48",
        )  # fmt: skip
        for judge in JUDGES:
            curve(log, home / name, judge, home / f"curve_{name}_{judge}")


def curve(log: Path, pool: Path, judge: str, output: Path) -> None:
    """Quality by the oracle against n, when that judge chooses."""
    script(log, "scripts/best_of_curve.py", str(pool), "--judge", judge, "--value", "oracle", "--output", str(output))


def prompts(home: Path, name: str, first: int) -> Path:
    """A file of the drawn prompts, each with a seed of its own, so that no two share their noise."""
    return write(
        home / f"{name}.jsonl", [{**line, "seed": first + 100 * i} for i, line in enumerate(asked(DRAWN, 3000))]
    )


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    """Prompts as a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def asked(per_task: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of the recipe's tasks, as lines of GenEval's metadata."""
    from sana.scenes import eval_prompts

    return [dict(line) for line in eval_prompts(per_task, seed) if line["tag"] in TASKS]


def growing(seed: int) -> None:
    """The small network and the grown one."""
    home = RUNS / f"seed{seed}"
    train(home / "small", seed, S, SMALL, S // 2)
    grow(home, seed)


def choosing(seed: int, grown: Future[None]) -> None:
    """Which blocks and which images: all that follows the grown network."""
    grown.result()
    home = RUNS / f"seed{seed}"
    report = home / "importance"
    calibration = write(home / "calibration.jsonl", asked(CALIBRATION // len(TASKS), 4000))  # scored on by nothing
    measured = ("scripts/importance.py", f"ckpt={home / 'grown'}", f"out={report}", f"prompt={calibration}")
    once(report, lambda: script(home / "importance.log", *measured))
    for arm in ARMS:
        prune(home, seed, arm)
    once(home / "chosen", lambda: draw(home))


def deep(seed: int) -> None:
    """The deep network, from scratch."""
    train(RUNS / f"seed{seed}" / "deep", seed, S, DEEP, S // 4)


def main() -> None:
    """Two jobs at a time, the short ones last; after an error none begins."""
    write(RUNS / "scored.jsonl", asked(SCORED, 2000))
    seeds = [int(word) for word in sys.argv[1:]] or list(SEEDS)
    with ThreadPoolExecutor(2) as workers:
        grown = {seed: workers.submit(growing, seed) for seed in seeds}
        jobs = [*grown.values(), *(workers.submit(deep, seed) for seed in seeds)]
        jobs += [workers.submit(choosing, seed, grown[seed]) for seed in seeds]
        ended, _ = wait(jobs, return_when=FIRST_EXCEPTION)
        workers.shutdown(wait=False, cancel_futures=True)
        for job in ended:
            job.result()


if __name__ == "__main__":
    main()
