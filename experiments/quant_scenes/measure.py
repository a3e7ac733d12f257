"""Draws the same pairs of prompt and seed with the scenes model in every precision, judges them with the oracle, and
writes results.json beside this file. Work is kept in runs/quant_scenes, chunk by chunk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sana.metric.bootstrap import mean_of_means_interval
from sana.metric.scenes import score
from sana.model.generate import Painter
from sana.model.load import load_weights, make_painter
from sana.quant.layer import QuantisedLinear
from sana.run.build import build
from sana.run.environment import describe_git
from sana.run.records import write_atomically
from sana.run.restore import Restored, restore
from sana.run.saved import prepare
from sana.sampler.guided import Sampler
from sana.scenes import TASKS, eval_prompts

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PER_TASK, SEED, CHUNK = int(os.environ.get("PER_TASK", "200")), 2000, 100  # prompts; those that the model was chosen by
WORK = ROOT / "runs" / "quant_scenes" / str(PER_TASK)
MODEL = "scenes"
ARMS: dict[str, list[str]] = {
    "fp32": [],
    "bf16": [],
    "int8": ["quant=int8"],
    "fp8": ["quant=fp8"],
    "nvfp4": ["quant=nvfp4"],
    "svdquant_w4a4": ["quant=svdquant_w4a4"],
    "svdquant_nvfp4": ["quant=svdquant_w4a4", "quant.precision=nvfp4"],
}
"""Name -> how it is quantised; all but bf16 work in fp32 otherwise."""
BASE = "fp32"


def pairs() -> list[tuple[dict[str, Any], int]]:
    """Lines of prompts and their seeds; a longer list has those of a shorter one."""
    lines = eval_prompts(PER_TASK, SEED)
    return [(line, SEED + 1000 * (i // PER_TASK) + i % PER_TASK) for i, line in enumerate(lines)]


def quantised(arm: str) -> Path | None:
    """The arm's quantised file, made once; None where it has none."""
    if not ARMS[arm]:
        return None
    path = WORK / arm / "network.safetensors"
    if not path.with_suffix(".report.json").is_file():
        path.unlink(missing_ok=True)
        settings = [f"ckpt={MODEL}", f"out={path}", "device=cpu", "precision=32-true", *ARMS[arm]]
        subprocess.run([sys.executable, "scripts/quantise.py", *settings], cwd=ROOT, check=True)
    return path


def opened(arm: str) -> tuple[Painter, Sampler, Restored]:
    """What draws."""
    precision = "bf16-mixed" if arm == "bf16" else "32-true"
    composed = prepare("eval", [f"ckpt={quantised(arm) or MODEL}", f"precision={precision}", "device=cpu"])
    restored = restore(composed)
    load_weights(restored.module, restored.checkpoint)
    return make_painter(restored.module, restored.device), build(composed.config.sampler, "sampler"), restored


def draw(arm: str) -> None:
    """What is missing of an arm, a file per chunk."""
    every = pairs()
    starts = [s for s in range(0, len(every), CHUNK) if not chunk(arm, s).is_file()]
    if not starts:
        return
    painter, sampler, restored = opened(arm)
    for start in starts:
        some, begun = every[start : start + CHUNK], time.monotonic()
        with restored.autocast():
            images = painter.draw([line["prompt"] for line, _ in some], [seed for _, seed in some], sampler, 64, 64)
        seconds = time.monotonic() - begun
        right = [score(image, line).correct for image, (line, _) in zip(images, some, strict=True)]
        temporary = chunk(arm, start).with_suffix(".part.npz")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(temporary, images=images, right=right, seconds=seconds)
        temporary.rename(chunk(arm, start))
        print(f"{arm}: {start + len(some)} of {len(every)}, {seconds / len(some):.3f} s per pair", flush=True)


def chunk(arm: str, start: int) -> Path:
    return WORK / arm / f"chunk_{start:05d}.npz"


def gathered(arm: str) -> dict[str, NDArray[Any]] | None:
    """Images, verdicts and seconds of an arm; None before it is complete."""
    files = [chunk(arm, start) for start in range(0, len(pairs()), CHUNK)]
    if not all(file.is_file() for file in files):
        return None
    parts = [np.load(file) for file in files]
    found = {key: np.concatenate([part[key] for part in parts]) for key in ("images", "right")}
    return found | {"seconds": np.array([float(part["seconds"]) for part in parts])}


def by_task(values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """Values of all pairs in the order of `eval_prompts`, by task."""
    return {task: values[i * PER_TASK : (i + 1) * PER_TASK] for i, task in enumerate(TASKS)}


def compare(
    found: dict[str, NDArray[Any]], base: dict[str, NDArray[Any]], half: dict[str, NDArray[Any]] | None
) -> dict[str, Any]:
    """Score, and difference from full precision (and from bf16, where that was drawn) on the same pairs; 95 % by a
    bootstrap of the prompts of each task."""
    right, other = found["right"].astype(float), base["right"].astype(float)
    against = {} if half is None else {"difference_to_bf16": _difference(right, half["right"].astype(float))}
    squares = (found["images"].astype(float) - base["images"]) ** 2
    errors = squares.mean((1, 2, 3)).clip(min=1e-10)
    return {
        "score": mean_of_means_interval(by_task(right)).asdict(),
        "difference": _difference(right, other),
        **against,
        "changed_verdicts": int((right != other).sum()),
        "tasks": {task: float(values.mean()) for task, values in by_task(right).items()},
        "median_psnr": None if not squares.any() else float(np.median(10 * np.log10(255**2 / errors))),
        "seconds_per_pair": float(found["seconds"].sum() / len(right)),
    }


def _difference(right: NDArray[Any], other: NDArray[Any]) -> dict[str, Any]:
    return mean_of_means_interval(by_task(right - other)).asdict()


def layers(arm: str) -> dict[str, Any]:
    """What the report says, held against the module tree of the network that draws."""
    path = quantised(arm)
    assert path is not None
    report = json.loads(path.with_suffix(".report.json").read_text())
    full, drawn = opened(BASE)[0].network, opened(arm)[0].network
    converted = {name for name, module in drawn.named_modules() if isinstance(module, QuantisedLinear)}
    tree = {name for name, module in full.named_modules() if any(p.ndim > 1 for p in module.parameters(recurse=False))}
    if converted != set(report["converted"]) or tree - converted != set(report["skipped"]):
        raise SystemExit(f"{arm}: the report names other layers than the module tree has")
    linear = sum(isinstance(module, nn.Linear) for module in full.modules())
    held = sum(t.numel() * t.element_size() for t in drawn.state_dict().values())
    if held != report["bytes_after"]:
        raise SystemExit(f"{arm}: the network has {held} bytes, the report {report['bytes_after']}")
    errors = {"weights": report["converted"], "outputs": report["outputs"]}
    figures = {
        key: {"mean": float(np.mean(list(values.values()))), "largest": max(values.values())}
        for key, values in errors.items()
    }
    counts = {"converted": len(converted), "skipped": len(report["skipped"]), "linear_layers": linear}
    sizes = {key: report[key] for key in ("bytes_before", "bytes_after", "file_bytes")}
    return counts | sizes | figures | {"network_output": report["output"], "arithmetic": report["arithmetic"]}


def main() -> None:
    """Draw the chosen arms, and write down whatever is complete."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    chosen = os.environ.get("ARMS", " ".join(ARMS)).split()
    unknown = sorted(set(chosen) - set(ARMS))
    if unknown:
        raise SystemExit(f"ARMS: {', '.join(unknown)} unknown; there are {', '.join(ARMS)}")
    for arm in dict.fromkeys([BASE, *chosen]):
        draw(arm)
    base, half = gathered(BASE), gathered("bf16")
    assert base is not None
    arms: dict[str, Any] = {}
    for arm in ARMS:
        found = gathered(arm)
        if found is not None:
            arms[arm] = compare(found, base, half) | ({"layers": layers(arm)} if ARMS[arm] else {})
    content = {
        "pairs": len(pairs()),
        "seed": SEED,
        "base": BASE,
        "arms": arms,
        "torch": torch.__version__,
        "commit": (describe_git()[0] or {}).get("commit"),
    }
    out = HERE / "results.json" if PER_TASK == 200 else WORK / "results.json"  # a trial is no result
    write_atomically(out, json.dumps(content, indent=1) + "\n")
    print(out)


if __name__ == "__main__":
    main()
