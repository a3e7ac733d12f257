"""Quantise once: ``python scripts/quantise.py ckpt=<run or checkpoint> quant=int8_weight out=FILE.safetensors``;
``--help`` lists the rest.

Writes a file of plain tensors that sample.py and eval.py take as ckpt=FILE.safetensors, without the weights that it was
made of, and FILE.report.json: which layers were converted, which were not and why, bytes, and the error of each layer
and of the whole network on a few prompts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sana.run.launch import launch

if TYPE_CHECKING:
    from sana.run.compose import Composed


def quantise(composed: Composed) -> None:
    """Quantise, measure, write, and say what was done."""
    from sana.model.quantise import quantise_to_file
    from sana.run.error import ConfigError

    try:
        report, path, report_path = quantise_to_file(composed)
    except ValueError as error:  # what only the weights or the prompts could tell
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error
    print(report.summary())
    print(f"{path}: {Path(path).stat().st_size:,} bytes; {report_path}", flush=True)


if __name__ == "__main__":
    raise SystemExit(launch("quantise", quantise))
