"""What a step of an optimizer costs, and what its states take, side by side on the parameters of a network."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sana.bench.roofline import wait
from sana.optimizer.came import CAME
from sana.optimizer.came_8bit import CAME8bit
from sana.optimizer.muon import Muon
from sana.run.build import build
from sana.run.compose import compose

Factory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
SIZES = {"tiny": "tiny", "600m": "sana_600m", "1600m": "sana_1600m", "4800m": "sana15_4800m"}


def peers() -> dict[str, Factory]:
    """The optimizers by name; torchao's only where it is installed."""
    found: dict[str, Factory] = {
        "adamw": partial(torch.optim.AdamW, lr=1e-4, foreach=True),
        "adamw_fused": partial(torch.optim.AdamW, lr=1e-4, fused=True),
        "came": partial(CAME, lr=1e-4),
        "came_8bit": partial(CAME8bit, lr=1e-4),
        "muon": partial(Muon, lr=1e-4),
    }
    try:
        from torchao.optim import AdamW8bit
    except ImportError:
        return found
    return {**found, "adamw_8bit": partial(AdamW8bit, lr=1e-4)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``bench.py optimizer``."""
    parser.add_argument("--size", choices=SIZES, default="600m", help="network whose parameters are updated")
    parser.add_argument("--blocks", type=int, help="only so many of its blocks")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each, taken in turns")
    parser.add_argument("--only", nargs="*", help="names of optimizers")
    parser.add_argument("--json", type=Path, help="file for the numbers")


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, write the numbers."""
    console = Console()
    chosen = {name: make for name, make in peers().items() if not arguments.only or name in arguments.only}
    shapes = parameter_shapes(arguments.size, arguments.blocks)
    console.print(f"{sum(map(_size, shapes)):,} parameters in {len(shapes)} tensors on {arguments.device}")
    rows = measure(chosen, shapes, torch.device(arguments.device), arguments.repeats, console)
    table = Table("optimizer", "step ms, least", "median", "of adamw", "state bytes", "per parameter", box=None)
    base = rows.get("adamw", next(iter(rows.values())))["least_ms"]
    for name, row in rows.items():
        table.add_row(
            name, f"{row['least_ms']:.2f}", f"{row['median_ms']:.2f}", f"{row['least_ms'] / base:.2f}x",
            f"{row['state_bytes']:,}", f"{row['bytes_per_parameter']:.3f}",
        )  # fmt: skip
    console.print(table)
    if arguments.json:
        facts = {key: getattr(arguments, key) for key in ("size", "blocks", "device", "repeats")}
        arguments.json.write_text(json.dumps({**facts, "optimizers": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


def parameter_shapes(size: str, blocks: int | None = None) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a published network, or of one with fewer blocks."""
    config = compose("train", [f"model={SIZES[size]}"]).config
    if blocks is not None:
        config.network.depth = blocks
    with torch.device("meta"):
        network = build(config.network, "network")
    return [tuple(p.shape) for p in network.parameters()]


def measure(
    factories: dict[str, Factory],
    shapes: list[tuple[int, ...]],
    device: torch.device,
    repeats: int,
    console: Console | None = None,
) -> dict[str, dict[str, Any]]:
    """Milliseconds per step and bytes of states, by name; optimizers take their steps in turns.

    Args:
        factories: by name.
        shapes: of the parameters; each optimizer has its own, so that memory for all of them is needed.
        device: where they are.
        repeats: timed steps of each, after two that are not (states, compilation).
        console: where progress is said.
    """
    optimizers: dict[str, torch.optim.Optimizer] = {}
    seconds: dict[str, list[float]] = {name: [] for name in factories}
    generator = torch.Generator(device).manual_seed(0)
    for name, make in factories.items():
        params = [nn.Parameter(torch.randn(shape, device=device, generator=generator)) for shape in shapes]
        for p in params:
            p.grad = torch.randn(p.shape, device=device, generator=generator)
        optimizers[name] = make(params)
    begun = time.perf_counter()
    for k in range(-2, repeats):
        for name, optimizer in optimizers.items():
            if console is not None and k < 0:  # said before: the first step of some compiles for minutes
                console.print(f"untimed step {k + 3}/2 of {name}", style="dim")
            wait(device)
            start = time.perf_counter()
            optimizer.step()
            wait(device)
            if k >= 0:
                seconds[name].append(time.perf_counter() - start)
        if console is not None and k >= 0:
            left = (time.perf_counter() - begun) / (k + 3) * (repeats - k - 1)
            console.print(f"round {k + 1}/{repeats}, ETA {left:.0f} s", style="dim")
    count = sum(map(_size, shapes))
    return {
        name: {
            "least_ms": 1e3 * min(seconds[name]),
            "median_ms": 1e3 * statistics.median(seconds[name]),
            "state_bytes": (size := state_bytes(optimizer)),
            "bytes_per_parameter": size / count,
        }
        for name, optimizer in optimizers.items()
    }


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of an optimizer's states; of tensors that are made of others, of those."""
    return sum(_bytes(value) for state in optimizer.state.values() for value in state.values())


def _bytes(value: Any) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    if hasattr(value, "__tensor_flatten__"):
        names, _ = value.__tensor_flatten__()  # type: ignore[attr-defined]
        return sum(_bytes(getattr(value, name)) for name in names)
    return value.numel() * value.element_size()


def _size(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
