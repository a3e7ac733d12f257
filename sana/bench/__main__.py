"""``python -m sana.bench``, the same as ``scripts/bench.py``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sana.bench import frechet, sample


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and run one benchmark; its exit code."""
    parser = argparse.ArgumentParser(prog="bench.py", description="Measurements against other implementations.")
    commands = parser.add_subparsers(dest="command", required=True)
    sample.add_arguments(commands.add_parser("sample", help="drawing, against diffusers' SanaPipeline"))
    frechet.add_arguments(commands.add_parser("frechet", help="of statistics, against clean-fid and torchmetrics"))
    given = parser.parse_args(arguments)
    return {"sample": sample, "frechet": frechet}[given.command].run(given)


if __name__ == "__main__":
    raise SystemExit(main())
