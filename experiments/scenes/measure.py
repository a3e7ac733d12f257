"""Judges the runs of run.sh and writes results.json, curve.png, the weights and the pictures beside this file."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNS = ROOT / "runs" / "scenes"
PER_TASK, HELD_OUT, SEED, FRESH_SEED = 200, 200, 2000, 3000
CURVE_PER_TASK, CURVE_EVERY = 50, 2000  # prompts, updates
FAILURES = 7
PROMPTS = (
    "a red circle",
    "three stars",
    "a green square and a yellow ring",
    "a pink triangle left of an orange cross",
    "a black star below a blue square",
    "a ring and a triangle",
)


def call(*command: str) -> None:
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)


def judge(checkpoint: str, out: Path, per_task: int, held_out: int, seed: int) -> dict[str, Any]:
    """results.json of one evaluation; kept if it is there already."""
    results = out / "results.json"
    if not results.is_file():
        sizes = (f"per_task={per_task}", f"held_out={held_out}", f"seed={seed}")
        where = (f"out={out}", f"output={results}")
        call("eval.py", f"ckpt={checkpoint}", "metric=[geneval_scenes,fid_scenes]", *sizes, *where)
    return json.loads(results.read_text())


def checkpoints(home: Path) -> list[Path]:
    """Those of all parts of a training, by update."""
    return sorted(home.glob("part*/checkpoints/step_*.ckpt"), key=lambda path: path.name)


def update_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.split("_")[1])


def training(home: Path) -> dict[str, Any]:
    """Updates, seconds and memory of a training in one or more parts."""
    parts = [json.loads(path.read_text()) for path in sorted(home.glob("part*/status.json"))]
    return {
        "steps": update_of(checkpoints(home)[-1]),
        "seconds": sum(part["seconds"] for part in parts),
        "peak_rss_gib": max(part["peak_rss_gib"] for part in parts),
        "parts": len(parts),
    }


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Each figure with its interval."""
    return {key: results["figures"][key] for key in ("overall", "tasks", "held_out", "fid_scenes")}


def draw_curve(points: list[tuple[int, dict[str, Any]]]) -> None:
    """Score against update, of every task and overall."""
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    updates = [update for update, _ in points]
    for task in points[0][1]["tasks"]:
        axes.plot(updates, [found["tasks"][task] for _, found in points], linewidth=1, label=task)
    axes.plot(updates, [found["overall"] for _, found in points], "k-o", markersize=4, label="overall")
    axes.set(xlabel="updates of 48 images", ylabel=f"share right ({CURVE_PER_TASK} prompts per task)", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncol=2)
    figure.tight_layout()
    figure.savefig(HERE / "curve.png")


def draw_failures(out: Path) -> None:
    """The first wrong pictures of each task, with prompt and reason."""
    lines = [json.loads(line) for line in (out / "results.verdicts.jsonl").read_text().splitlines()]
    wrong: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if not line["correct"] and line["split"] != "held_out":
            wrong.setdefault(line["tag"], []).append(line)
    figure, axes = plt.subplots(len(wrong), FAILURES, figsize=(2.1 * FAILURES, 2.6 * len(wrong)), dpi=90, squeeze=False)
    for row, (tag, found) in zip(axes, wrong.items(), strict=True):
        for axis in row:
            axis.axis("off")
        for axis, line in zip(row, found, strict=False):
            axis.imshow(plt.imread(out / line["filename"]))
            text = "\n".join(textwrap.wrap(line["prompt"], 26) + textwrap.wrap(line["reason"], 30))
            axis.set_title(text, fontsize=7, loc="left")
        row[0].text(-0.08, 0.5, tag, transform=row[0].transAxes, rotation=90, va="center", ha="right", fontsize=9)
    figure.tight_layout()
    figure.savefig(HERE / "failures.png")


def draw_samples() -> None:
    """A grid of what the shipped weights draw, seeds 0 to 5."""
    out = RUNS / "samples"
    shutil.rmtree(out, ignore_errors=True)
    prompts = json.dumps(PROMPTS)
    call("sample.py", "ckpt=scenes", f"prompt={prompts}", "n=6", "seed=0", "grid=true", f"out={out}")
    shutil.copy(out / "grid.png", HERE / "drawn.png")


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    homes = sorted(path for path in RUNS.glob("seed*") if checkpoints(path))
    if not homes:
        raise SystemExit(f"{RUNS}: no runs; experiments/scenes/run.sh makes them")
    seeds: dict[str, dict[str, Any]] = {}
    for home in homes:
        results = judge(str(checkpoints(home)[-1]), home / "eval", PER_TASK, HELD_OUT, SEED)
        seeds[home.name] = summary(results) | training(home) | {"commit": results["commit"]}
    best = max(seeds, key=lambda name: seeds[name]["overall"]["mean"])
    curve = [
        (update_of(path), judge(str(path), RUNS / best / "curve" / path.stem, CURVE_PER_TASK, 1, SEED))
        for path in checkpoints(RUNS / best)
        if update_of(path) % CURVE_EVERY == update_of(checkpoints(RUNS / best)[-1]) % CURVE_EVERY
    ]
    model = HERE / "model.safetensors"
    model.unlink(missing_ok=True)
    run = checkpoints(RUNS / best)[-1].parents[1]
    call("scripts/convert_checkpoint.py", str(run), str(model), "--to", "sana", "--dtype", "bf16")
    shutil.rmtree(RUNS / "shipped", ignore_errors=True)
    again = judge("scenes", RUNS / "shipped", PER_TASK, HELD_OUT, FRESH_SEED)
    draw_curve(curve)
    draw_failures(RUNS / "shipped")
    draw_samples()
    chosen = seeds[best]
    content = {
        **{key: chosen[key] for key in ("overall", "tasks", "held_out", "steps", "seconds", "peak_rss_gib", "commit")},
        "shipped": best,
        "sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        "bytes": model.stat().st_size,
        "rescored": summary(again) | {"prompts_seed": FRESH_SEED},
        "mean_of_seeds": {
            "overall": sum(found["overall"]["mean"] for found in seeds.values()) / len(seeds),
            "held_out": sum(found["held_out"]["overall"]["mean"] for found in seeds.values()) / len(seeds),
        },
        "seeds": seeds,
        "curve": [[update, found["overall"], found["tasks"]] for update, found in curve],
    }
    (HERE / "results.json").write_text(json.dumps(content, indent=2) + "\n")
    print(HERE / "results.json")


if __name__ == "__main__":
    main()
