"""``bench.py operators|models|autoencoder|end|update``: the rows of a stage; ``day``: of all, in the order of worth."""

from __future__ import annotations

import argparse
import logging
import os
import platform
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from sana.bench import decoding, end, models, operators, training
from sana.bench.measure import Bench, BrokenDeviceError, Case, attempt, one_line, say
from sana.bench.rows import Book, plot, table
from sana.ops.choice import set_kernels
from sana.run.environment import cpu_name, describe_git, gpus, installed

STAGES: dict[str, Any] = {
    "operators": operators,
    "models": models,
    "autoencoder": decoding,
    "end": end,
    "update": training,
}
BROKEN = 3
"""Exit code: a kernel has broken the device for this process; the same command goes on with the rows after it."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a stage."""
    parser.add_argument("--size", choices=["published", "tiny"], default="published", help="tiny: to try the command")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of all weights")
    parser.add_argument("--kernels", choices=["auto", "naive", "triton"], default="auto", help="of our side")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which nothing new starts")
    parser.add_argument("--only", nargs="+", default=[], help="words that a row's name or shape must have, one of them")
    parser.add_argument(
        "--compiled", action=argparse.BooleanOptionalAction, default=True, help="peers compiled as well"
    )
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True, help="what is not compiled")
    parser.add_argument("--json", type=Path, default=None, help="file of the rows; those that it holds are kept")
    parser.add_argument("--plot", type=Path, default=None, help="PNG of the ratios")
    parser.add_argument("--wait", type=int, nargs="*", default=[], help=argparse.SUPPRESS)  # for these processes


def run(stage: str, options: argparse.Namespace) -> int:
    """The command; its exit code."""
    start = time.monotonic()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"bench.py {stage}: --device {device}: this machine has no CUDA device", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("sana").setLevel(logging.INFO)
    set_kernels(options.kernels)
    book = Book(options.json, about(device))
    bench = Bench(device, DTYPES[options.dtype], book, options.size == "tiny", start + options.seconds)
    if bench.tiny:
        bench.seconds = 0.05
    chosen = day(bench.tiny) if stage == "day" else STAGES[stage].cases(bench.tiny)
    chosen = [case for case in chosen if _asked(case, options)]
    _wait(options.wait, bench)
    code = 0
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        for case in chosen:
            attempt(case, bench)
    except BrokenDeviceError as error:
        say(f"the device takes no more work: {error}")
        code = BROKEN
    except KeyboardInterrupt:
        say("stopped")
        code = 130
    finally:
        signal.signal(signal.SIGTERM, before)
    print(table(book.rows.values()))
    if options.plot is not None and code != BROKEN:
        try:
            plot(book.rows.values(), options.plot)
        except Exception as error:  # the numbers are there without it
            say(f"no plot: {one_line(error)}")
    return code


def day(tiny: bool) -> list[Case]:
    """All that there is, what is most wanted first, compiled peers last."""
    network, attention, pictures = models.cases(tiny), operators.attention_cases(tiny), decoding.cases(tiny)
    drawings, steps = end.cases(tiny), training.cases(tiny)
    plain = [case for case in network if case.name == "forward" and case.part != "compiled"]
    ordered = [*plain[:3], *attention[:2], pictures[0], *drawings, steps[0], *network, *attention]
    ordered += [*pictures, *operators.other_cases(tiny), *steps]
    late = [case for case in ordered if case.part == "compiled"]
    return list(dict.fromkeys([*(case for case in ordered if case.part != "compiled"), *late]))


def about(device: torch.device) -> dict[str, Any]:
    """When, where, on what, with what and by which command."""
    card = gpus()
    git = describe_git()[0] or {}
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "driver": card[0]["driver_version"] if card and device.type == "cuda" else None,
        "commit": os.environ.get("SANA_COMMIT") or git.get("commit"),
        "command": " ".join(["bench.py", *(Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:])]),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("torch", "triton", "diffusers", "transformers")},
        "threads": torch.get_num_threads(),
    }


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


def _asked(case: Case, options: argparse.Namespace) -> bool:
    if not (options.compiled if case.part == "compiled" else options.plain):
        return False
    return not options.only or any(word in f"{case.name} {case.shape}" for word in options.only)


def _wait(processes: list[int], bench: Bench) -> None:
    """Until others are done, so that they do not disturb what is timed; at most a quarter of the time."""
    until = time.monotonic() + min(60.0, bench.left / 4)
    for process in processes:
        while time.monotonic() < until and Path(f"/proc/{process}").exists():
            time.sleep(0.2)
