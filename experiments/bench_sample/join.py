"""Joins the results of the precisions into results.json: the keys of fp32 at the top, those of bf16 under "bf16" where
the machine has it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
results = json.loads((folder / "fp32.json").read_text(encoding="utf-8"))
if (folder / "bf16.json").exists():
    results["bf16"] = json.loads((folder / "bf16.json").read_text(encoding="utf-8"))
(folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
for name in ("fp32.json", "bf16.json"):
    (folder / name).unlink(missing_ok=True)
