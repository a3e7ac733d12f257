"""The proof from outside, as `scripts/kill_resume.py` makes it: five kills of warm starts here, twenty of cold ones by
hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("strategy", "workers"), [("single", 2), ("ddp", 0), ("fsdp", 0)])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path, strategy: str, workers: int) -> None:
    command = [sys.executable, "scripts/kill_resume.py", "--kills", "5", "--strategy", strategy]
    command += ["--warm", "--workers", str(workers), "--steps", "30", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    log = tmp_path / "log.txt"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text()[-3000:]
    assert "equal bit for bit" in done.stdout
    assert " 0 temporary files left" in done.stdout
