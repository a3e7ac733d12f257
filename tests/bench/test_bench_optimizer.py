"""The bench of optimizers on a few small tensors: bytes by their formulas, and a file that says what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sana.bench import optimizer as bench
from sana.bench.__main__ import main

SHAPES = [(200, 130), (64, 1, 3, 3), (300,)]
COUNT = 200 * 130 + 64 * 9 + 300


def test_bytes_are_those_of_the_formulas() -> None:
    found = {name: make for name, make in bench.peers().items() if name != "adamw_8bit"}
    rows = bench.measure(found, SHAPES, torch.device("cpu"), 1)
    statistics = 2 * 4 * (200 + 130)
    rest = 2 * 4 * (64 * 9 + 300)  # not factored: momentum and second moment
    assert rows["came"]["state_bytes"] == 4 * 200 * 130 + statistics + rest
    assert rows["came_8bit"]["state_bytes"] == 200 * 130 + 4 * 200 + statistics + rest
    assert rows["adamw"]["state_bytes"] == rows["adamw_fused"]["state_bytes"] == 8 * COUNT + 4 * len(SHAPES)
    assert rows["adamw"]["bytes_per_parameter"] == pytest.approx(8, rel=1e-3)
    assert all(0 < row["least_ms"] <= row["median_ms"] for row in rows.values())


def test_tensors_made_of_others_count_as_those() -> None:
    torchao = pytest.importorskip("torchao.optim")
    states = torchao.subclass_8bit.OptimState8bit.zeros((64, 128), block_size=256)
    # A byte per element, a scale per 256, and the table of 256 values.
    assert bench._bytes(states) == 64 * 128 + 4 * (64 * 128 // 256) + 4 * 256


def test_the_command_writes_its_numbers(tmp_path: Path) -> None:
    line = [
        "optimizer",
        "--size",
        "tiny",
        "--blocks",
        "1",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--only",
        "adamw",
        "came",
    ]
    assert main([*line, "--json", str(tmp_path / "out.json")]) == 0
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert set(numbers["optimizers"]) == {"adamw", "came"}
    assert (numbers["size"], numbers["blocks"]) == ("tiny", 1)
