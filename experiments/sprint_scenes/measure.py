"""Judges what distil.py trained and writes results.json, page.html, the pictures and the weights beside this file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import distil
import numpy as np
import page
from numpy.typing import NDArray
from scipy.stats import t

HERE = Path(__file__).resolve().parent
STEPS = (1, 2, 4)
PER_TASK, SEED = 200, 2000  # 1,200 prompts; those that the teacher was chosen by
ARM_PER_TASK = 50
CURVE_PER_TASK = 40
RESAMPLES = 10_000
WEIGHTS = HERE / "scenes_sprint.safetensors"


def call(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=distil.ROOT, check=True)


def judge(checkpoint: Path | str, out: Path, per_task: int, *settings: str) -> NDArray[np.bool_]:
    """Whether each image is right, (tasks, prompts): the same prompts and seeds for every checkpoint; drawn once."""
    if not (out / "results.json").is_file():
        call("eval.py", f"ckpt={checkpoint}", "metric=[geneval_scenes]", f"per_task={per_task}", "held_out=1",
             f"seed={SEED}", f"out={out}", f"output={out / 'results.json'}", *settings)  # fmt: skip
    lines = [json.loads(line) for line in (out / "results.verdicts.jsonl").read_text().splitlines()]
    lines = sorted((line for line in lines if line["split"] != "held_out"), key=lambda line: line["filename"])
    tasks = sorted({line["tag"] for line in lines})
    return np.array([[line["correct"] for line in lines if line["tag"] == task] for task in tasks])


def interval(values: NDArray[np.float64]) -> list[float]:
    return [float(v) for v in np.quantile(values, (0.025, 0.975))]


def compare(teacher: NDArray[np.bool_], student: NDArray[np.bool_]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The student's score, and its share of the teacher's; 95 % by a bootstrap of the prompts of each task, the same
    prompts for both."""
    rng = np.random.default_rng(0)
    tasks, n = teacher.shape
    chosen = rng.integers(0, n, (RESAMPLES, tasks, n))
    row = np.arange(tasks)[None, :, None]
    mine, theirs = (x[row, chosen].mean((1, 2)) for x in (student, teacher))
    score = {"mean": float(student.mean()), "interval": interval(mine)}
    return score, {"mean": float(student.mean() / teacher.mean()), "interval": interval(mine / theirs)}


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % interval of Student's t over the seeds."""
    x = np.asarray(values, np.float64)
    half = float(t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return {"mean": float(x.mean()), "interval": [float(x.mean() - half), float(x.mean() + half)], "seeds": values}


def checkpoints(run: Path) -> list[tuple[int, Path]]:
    """Those of a run with their updates."""
    return sorted((int(path.stem.split("_")[1]), path) for path in run.glob("checkpoints/step_*.ckpt"))


def main() -> None:
    """Everything from the files of the runs alone."""
    runs = distil.RUNS
    if WEIGHTS.is_file():
        WEIGHTS.unlink()
    call("scripts/convert_checkpoint.py", str(runs / "student"), str(WEIGHTS), "--to", "sana", "--dtype", "bf16")
    teacher = judge("scenes", runs / "judged" / "teacher", PER_TASK, "sampler.steps=20")
    students = {
        n: judge(runs / "student", runs / "judged" / f"student_{n}", PER_TASK, f"sampler.steps={n}") for n in STEPS
    }
    shipped = {n: judge(WEIGHTS, runs / "judged" / f"shipped_{n}", PER_TASK, f"sampler.steps={n}") for n in STEPS}
    compared = {n: compare(teacher, right) for n, right in students.items()}
    names = sorted(page.TASKS)
    arms = {}
    for arm in distil.ARMS:
        right = [
            judge(runs / f"{arm}_{seed}", runs / "judged" / f"{arm}_{seed}_{n}", ARM_PER_TASK, f"sampler.steps={n}")
            for n in (1, 4)
            for seed in distil.SEEDS
        ]
        one, four = right[: len(distil.SEEDS)], right[len(distil.SEEDS) :]
        arms[arm] = over_seeds([float(x.mean()) for x in one]) | {
            "four_steps": over_seeds([float(x.mean()) for x in four]),
            "updates": [checkpoints(runs / f"{arm}_{seed}")[-1][0] for seed in distil.SEEDS],
        }
    curve = [
        (step, float(judge(path, runs / "judged" / f"curve_{step}", CURVE_PER_TASK, "sampler.steps=1").mean()))
        for step, path in checkpoints(runs / "student")
    ]
    content = {
        "teacher_overall": compare(teacher, teacher)[0],
        "overall": {str(n): score for n, (score, _) in compared.items()},
        "ratio": {str(n): ratio for n, (_, ratio) in compared.items()},
        "tasks": {
            name: {"teacher": float(teacher[i].mean())} | {str(n): float(students[n][i].mean()) for n in STEPS}
            for i, name in enumerate(names)
        },
        "shipped_in_bf16": {str(n): float(right.mean()) for n, right in shipped.items()},
        "ablations": arms,
        "seconds": {path.stem: float(path.read_text()) for path in sorted(runs.glob("*.seconds"))},
        "curve": curve,
        "steps": curve[-1][0],
        "seed": 0,
        "commit": json.loads((runs / "student" / "environment.json").read_text())["git"]["commit"],
        "bytes": WEIGHTS.stat().st_size,
        "sha256": hashlib.sha256(WEIGHTS.read_bytes()).hexdigest(),
    }
    (HERE / "results.json").write_text(json.dumps(content, indent=1) + "\n")
    page.write(content, runs, HERE)
    print(HERE / "page.html")


if __name__ == "__main__":
    main()
