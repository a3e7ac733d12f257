"""``bench.py recipe``: a training step of the tiny recipe here against an earlier commit, through train.py itself.

Both worktrees train in turns, run by run, and report their own split of a step's time. The floor is what the matrix
products of the network alone take on this machine, forward and twice backward, one after the other.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sana.bench.roofline import best_of
from sana.bench.run import about
from sana.network.sana import Sana
from sana.nn.block import Block
from sana.nn.cross_attention import CrossAttention
from sana.nn.linear_attention import LinearAttention
from sana.nn.mix_ffn import MixFFN
from sana.types import Condition

ROOT = Path(__file__).resolve().parents[2]
QUIET = ["callback.validation=null", "callback.samples=null", "callback.checkpoints=null", "callback.progress=null"]
EVERY = 40  # updates between two rows of a run's records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument(
        "--before", type=Path, required=True, help="a worktree of the earlier commit (git worktree add)"
    )
    parser.add_argument("--updates", type=int, default=200, help="of each run; the first 40 are not counted")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side, in turns")
    parser.add_argument("--precision", default=None, help="of the trainer; default: the recipe's own choice")
    parser.add_argument("--json", type=Path, default=None, help="file of the results")


def run(options: argparse.Namespace) -> int:
    """The command; its exit code."""
    if not (options.before / "train.py").is_file():
        print(f"bench.py recipe: --before {options.before} has no train.py; give a worktree", file=sys.stderr)
        return 2
    if options.updates < 2 * EVERY or options.pairs < 1:
        print(f"bench.py recipe: --updates must be at least {2 * EVERY}, --pairs at least 1", file=sys.stderr)
        return 2
    sides = {"now": ROOT, "before": options.before.resolve()}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.pairs):
            for side in list(sides)[:: 1 if i % 2 == 0 else -1]:
                done = train(sides[side], Path(folder), f"{side}{i}", options.updates, options.precision)
                found[side].append(done)
                print(f"{side}: {1e3 * done['step']:.1f} ms per update", file=sys.stderr, flush=True)
    steps = {side: [one["step"] for one in ones] for side, ones in found.items()}
    names = {part for ones in found.values() for one in ones for part in one}
    results: dict[str, Any] = {
        "update_now_over_before": median(a / b for a, b in zip(steps["now"], steps["before"], strict=True)),
        "update_ms": {side: 1e3 * min(ones) for side, ones in steps.items()},
        "parts_ms": {
            part: {side: 1e3 * min(one.get(part, 0.0) for one in ones) for side, ones in found.items()}
            for part in sorted(names)
        },
        "products_ms": {name: 1e3 * products(name == "bf16") for name in ("fp32", "bf16")},
        "bar": 0.8,
        "about": about(torch.device("cpu")) | {"load_average": os.getloadavg()[0]},
        "raw": found,
    }
    print(json.dumps({name: value for name, value in results.items() if name not in ("raw", "about")}, indent=1))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


def train(worktree: Path, folder: Path, name: str, updates: int, precision: str | None) -> dict[str, float]:
    """Seconds per update of one run, "step" and its parts, from its own records.

    Args:
        worktree: whose train.py.
        folder: of the scenes, which all runs share, and of the run.
        name: of the run.
        updates: of the run.
        precision: of the trainer; None: the recipe's.

    Raises:
        RuntimeError: the run failed; the end of what it said.
    """
    command = [sys.executable, "train.py", "experiment=image/tiny", f"trainer.max_steps={updates}", *QUIET]
    command += [f"callback.records.every={EVERY}", f"run.dir={folder}/{name}"]
    command += [f"data.folder={folder}/scenes", "data.count=1000"]
    command += [] if precision is None else [f"trainer.precision={precision}"]
    environment = {**os.environ, "PYTHONPATH": str(worktree)}
    done = subprocess.run(command, cwd=worktree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{worktree}: train.py failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return split(folder / name / "metrics.jsonl")


def split(path: Path) -> dict[str, float]:
    """Seconds per update and its parts: medians over the rows of a run's records but the first."""
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if any(name.startswith("time/") for name in row)][1:]
    names = {name for row in rows for name in row if name.startswith("time/")} - {"time/checkpoint"}
    parts = {name.removeprefix("time/"): median(row.get(name, 0.0) for row in rows) for name in names}
    return {"step": sum(parts.values()), **parts}


def products(bf16: bool, batch: int = 64, text: int = 23) -> float:
    """Seconds of all matrix products and convolutions of one update of the tiny network."""
    block = partial(
        Block,
        mixer=partial(LinearAttention, qk_norm=True),
        cross=partial(CrossAttention, heads=5, qk_norm=True),
        ffn=partial(MixFFN, ratio=2.5),
    )
    network, calls = Sana(8, 160, 6, 96, [block], patch=2, text_norm=1.0), []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        calls.append((module, inputs[0].detach()))

    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_hook(seen)
    caption = Condition(torch.randn(batch, text, 96), torch.ones(batch, text, dtype=torch.bool))
    network(torch.randn(batch, 8, 1, 8, 8), torch.rand(batch, 1), caption)
    total, known = 0.0, {}
    for module, x in calls:
        key = (type(module), tuple(x.shape), tuple(module.weight.shape))
        if key not in known:
            known[key] = _once(module, x, torch.bfloat16 if bf16 else torch.float32)
        total += known[key]
    return total


def _once(module: nn.Linear | nn.Conv2d, x: Tensor, dtype: torch.dtype) -> float:
    """Forward, gradient of the input, gradient of the weight; casts of the weight are not counted."""
    device, weight = torch.device("cpu"), module.weight.detach().to(dtype)
    x = x.to(dtype)
    if isinstance(module, nn.Conv2d):  # of square images, given as tokens
        x = x.mT.unflatten(2, (math.isqrt(x.shape[1]), -1)).contiguous(memory_format=torch.channels_last)
        x, weight = x.requires_grad_(), weight.requires_grad_()

        def convolve() -> None:
            y = nn.functional.conv2d(x, weight, padding=module.padding, groups=module.groups)  # type: ignore[arg-type]
            torch.autograd.grad(y, (x, weight), y.detach())

        return best_of(5, convolve, device)
    rows = x.flatten(0, -2)
    out = rows @ weight.T

    def multiply() -> None:
        torch.mm(rows, weight.T)
        torch.mm(out, weight)
        torch.mm(out.T, rows)

    return best_of(5, multiply, device)
