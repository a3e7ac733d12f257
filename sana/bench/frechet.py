"""The Frechet distance of two sets of statistics: this project's against clean-fid's and torchmetrics' functions.

All three get the same float64 means and covariances, in turns, in one process with the same number of threads.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sana.metric.frechet import Statistics, gaussian_distance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``bench.py frechet``."""
    parser.add_argument("--dim", type=int, default=2048, help="features; 2048 are Inception's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="of ours; the others are slow and run once")
    parser.add_argument("--images", type=int, default=50_000, help="features that are streamed, to show the memory")
    parser.add_argument("--json", type=Path, help="also write the numbers here")


def features(n: int, dim: int, seed: int) -> torch.Tensor:
    """(n, dim) vectors with the falling spectrum that Inception features have, and correlations."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / dim**0.5
    scale = torch.arange(1, dim + 1, dtype=torch.float64) ** -0.7
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * scale) @ mix + 0.4


def streamed(n: int, dim: int, seed: int, batch: int = 1000) -> Statistics:
    """Statistics of n vectors, a batch at a time."""
    statistics = Statistics(dim)
    for k in range(0, n, batch):
        statistics.update(features(min(batch, n - k), dim, seed + k))
    return statistics


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a line per implementation, and say whether they agree within 1e-4."""
    import resource

    torch.set_num_threads(arguments.threads)
    dim = arguments.dim
    n = max(arguments.images, 2 * dim)
    clock = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    a, b = streamed(n, dim, 0), streamed(2 * dim, dim, 10**6)
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(f"{n:,} vectors of {dim} streamed in {time.perf_counter() - clock:.1f} s; peak memory grew {memory:.2f} GiB")
    pairs = [z for s in (a, b) for z in (s.mean, s.covariance)]
    arrays = [z.numpy() for z in pairs]
    sides: dict[str, Callable[[], float]] = {
        "ours": lambda: gaussian_distance(*pairs),
        "torchmetrics": lambda: _torchmetrics(*pairs),
        "clean-fid": lambda: _cleanfid(*arrays),
    }
    results: dict[str, dict[str, float]] = {}
    for name, side in sides.items():
        seconds = []
        value = 0.0
        for _ in range(arguments.repeats if name == "ours" else 1):
            clock = time.perf_counter()
            value = side()
            seconds.append(time.perf_counter() - clock)
        ours = results.get("ours", {"seconds": min(seconds), "value": value})
        results[name] = {
            "seconds": min(seconds),
            "value": value,
            "times_ours": min(seconds) / ours["seconds"],
            "relative_difference": abs(value / ours["value"] - 1),
        }
        row = results[name]
        print(
            f"{name:14}{row['seconds']:9.2f} s {row['times_ours']:7.1f} x ours  value {value:.10g}  "
            f"differs by {row['relative_difference']:.1e}",
            flush=True,
        )
    if arguments.json is not None:
        facts = {"dim": dim, "images": n, "threads": arguments.threads, "memory_gib": memory, "sides": results}
        arguments.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0 if all(r["relative_difference"] < 1e-4 for r in results.values()) else 1


def _torchmetrics(mean_a: torch.Tensor, cov_a: torch.Tensor, mean_b: torch.Tensor, cov_b: torch.Tensor) -> float:
    from torchmetrics.image.fid import _compute_fid

    return float(_compute_fid(mean_a, cov_a, mean_b, cov_b))


def _cleanfid(mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray) -> float:
    from cleanfid.fid import frechet_distance

    return float(frechet_distance(mean_a, cov_a, mean_b, cov_b))
