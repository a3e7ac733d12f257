"""README's lines on own images, as they stand there."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def lines_of_the_readme() -> list[str]:
    section = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## Train on your own images\n")[1].split("\n## ")[0]
    )
    return [line.strip() for line in section.splitlines() if line.startswith("    ")]


def own_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        pixels = np.kron(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
        Image.fromarray(pixels).save(folder / f"{i}.{('jpg', 'png')[i % 2]}")
        (folder / f"{i}.txt").write_text("a red circle")
    return folder


@pytest.mark.long
def test_the_five_lines_of_the_readme(tmp_path: Path) -> None:
    own_images(tmp_path / "my_images", 2)
    for name in (
        "train.py",
        "sample.py",
        "scripts",
        "experiments",
    ):  # as in a clone, so that nothing is written into this one
        (tmp_path / name).symlink_to(ROOT / name)
    lines = lines_of_the_readme()
    assert len(lines) == 5
    for line in lines:
        words = [sys.executable if word == "python" else word for word in shlex.split(line, comments=True)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False, env=ENVIRONMENT)
        assert done.returncode == 0, line + done.stdout + done.stderr
    assert (tmp_path / "my_shards" / "train-000000.tar").exists()
    assert (tmp_path / "runs" / "inspect.png").exists()
    records = [tmp_path / "my_run" / "status.json", *(tmp_path / "runs").rglob("status.json")]
    assert [json.loads(path.read_text())["status"] for path in records] == ["finished"] * 2
