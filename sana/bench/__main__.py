"""``python -m sana.bench``, the same as ``scripts/bench.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sana.bench import frechet, optimizer, sample, saving


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run one benchmark; its exit code."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measurements against other implementations.")
    commands = parser.add_subparsers(dest="command", required=True)
    sample.add_arguments(commands.add_parser("sample", help="drawing, against diffusers' SanaPipeline"))
    optimizer.add_arguments(commands.add_parser("optimizer", help="step time and state bytes of optimizers"))
    saving.add_arguments(commands.add_parser("saving", help="what a checkpoint costs the training that goes on"))
    frechet.add_arguments(commands.add_parser("frechet", help="of statistics, against clean-fid and torchmetrics"))
    given = parser.parse_args(arguments)
    return {"sample": sample, "optimizer": optimizer, "saving": saving, "frechet": frechet}[given.command].run(given)


if __name__ == "__main__":
    raise SystemExit(main())
