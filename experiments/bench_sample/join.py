"""Joins the results of the precisions into one file: the keys of fp32 at the top, all of bf16 under "bf16"."""

from __future__ import annotations

import json
import sys
from pathlib import Path

fp32, bf16 = (json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:3])
Path(sys.argv[3]).write_text(json.dumps({**fp32, "bf16": bf16}, indent=1) + "\n", encoding="utf-8")
