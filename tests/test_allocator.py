"""Freed blocks stay with the process: the same pages come back without page faults."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from sana.allocator import keep_pages
kept = keep_pages() if sys.argv[1] == "keep" else False
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(4_000_000)  # 32 MB
before = faults()
for _ in range(10):
    np.ones(4_000_000)
print(kept, faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc only")
def test_page_faults_vanish() -> None:
    def faults(mode: str) -> tuple[str, int]:
        out = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True).stdout
        kept, count = out.split()
        return kept, int(count)

    kept, quiet = faults("keep")
    if kept == "False":
        pytest.skip("another C library")
    assert quiet < 0.1 * max(faults("default")[1], 100)
