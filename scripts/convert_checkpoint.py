"""Convert weights between layouts; every tensor keeps its bits.

python scripts/convert_checkpoint.py runs/tiny/2026-01-31_12-00-00_0 experiments/mine/model.safetensors --to sana
    The network of a run as one file, which `python sample.py ckpt=mine` finds by its name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sana.run.export import export_run

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Convert weights between layouts; every tensor keeps its bits.")
    made.add_argument("source", metavar="SRC", help="directory of a run or one of its checkpoints")
    made.add_argument("target", metavar="DST", help="file or folder to write; must not exist yet")
    made.add_argument("--to", required=True, choices=["sana"], help="layout to write")
    made.add_argument("--weights", choices=["ema", "live"], default="ema", help="which set of a run (%(default)s)")
    made.add_argument("--dtype", choices=DTYPES, help="round to this type; left out: every bit is kept")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        record = export_run(options.source, options.target, options.weights, DTYPES.get(options.dtype))
    except (ValueError, OSError) as problem:
        print(f"convert_checkpoint: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("convert_checkpoint: interrupted; nothing was written", file=sys.stderr)
        return 130
    size = Path(options.target).stat().st_size
    print(f"{options.target}: {record.weights} weights after {record.updates} updates, {size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
