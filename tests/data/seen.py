"""Runs `train.py` and writes down which samples it saw: ``python seen.py FILE OVERRIDE ...``, in the project's root."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from sana.callback.bad_samples import BadSamples


def main(path: Path) -> None:
    counted = BadSamples.on_train_batch_end

    def count(self: Any, trainer: Any, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(list(zip(batch.key, batch.weight.tolist(), strict=True))) + "\n")
        counted(self, trainer, recipe, outputs, batch, batch_idx)

    BadSamples.on_train_batch_end = count  # type: ignore[method-assign]
    runpy.run_path("train.py", run_name="__main__")


if __name__ == "__main__":
    sys.argv, file = ["train.py", *sys.argv[2:]], Path(sys.argv[1])
    main(file)
