"""Benchmarks: ``python scripts/bench.py sample --size 600m --px 512 --steps 20 --peer diffusers --json out.json``."""

from __future__ import annotations

from sana.bench.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
