"""``python -m sana.bench``, the same as ``scripts/bench.py``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

COMMANDS = {
    "sample": "drawing, against diffusers' SanaPipeline",
    "optimizer": "step time and state bytes of optimizers",
    "saving": "what a checkpoint costs the training that goes on",
    "frechet": "of statistics, against clean-fid and torchmetrics",
    "recipe": "a training step of the tiny recipe, against an earlier commit",
    "blocks": "blocks on CPUs, against diffusers' blocks",
    "predicted": "the roofline of all rows, and what was measured",
    "warm": "compile what the rows with compiled peers will ask for",
}
MODULES = {"predicted": "forecast", "blocks": "layers"}
ROWS = {
    "operators": "each op, against torch eager and compiled",
    "models": "a forward of the denoiser, against diffusers",
    "autoencoder": "a decode, against diffusers",
    "end": "from a prompt to pixels, against diffusers",
    "update": "a training step, against diffusers",
    "day": "all of these five in the order of worth, within --seconds",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run one benchmark; its exit code.

    Only the module of the command is imported: some need packages that a bare GPU machine does not have.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="bench.py", description="Measurements against other implementations.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (COMMANDS | ROWS).items():
        one = commands.add_parser(name, help=text)
        if given[:1] == [name]:
            _module(name).add_arguments(one)
    options = parser.parse_args(given)
    if options.command in ROWS:
        return _module(options.command).run(options.command, options)
    return _module(options.command).run(options)


def _module(command: str) -> Any:
    return import_module("sana.bench." + ("run" if command in ROWS else MODULES.get(command, command)))


if __name__ == "__main__":
    raise SystemExit(main())
