"""The benchmark of drawing at a tiny size: both sides draw the same, the file has its keys, refusals are lines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.bench.__main__ import main
from sana.bench.clock import Clock
from sana.bench.parts import SIZES
from sana.bench.roofline import Rates, denoiser_bytes
from sana.bench.sides import Work, make_both, make_ours, make_theirs

ROOT = Path(__file__).resolve().parents[2]


def work(**changes) -> Work:
    settings = {"size": "tiny", "px": 64, "steps": 3, "batch": 1, "text_layers": 1, "dtype": torch.float32}
    return Work(**(settings | changes), device=torch.device("cpu"))


@pytest.mark.parametrize(("batch", "tokens", "px"), [(1, 40, 64), (3, 300, 96), (2, 9, 32)])
def test_both_sides_draw_the_same(batch: int, tokens: int, px: int) -> None:
    task = work(batch=batch, px=px)
    ours, theirs = make_both(task)
    prompts = task.prompts(tokens, 7)
    condition = ours.painter.text_encoder.encode(prompts)
    assert condition.mask.sum(1).tolist() == [tokens] * batch
    for side in (ours, theirs):
        side.draw(prompts, 7)
    for name in ("latent", "image"):
        a, b = ours.seen[name], theirs.seen[name]
        assert a.shape == b.shape
        assert ((a - b).abs().max() / b.abs().max()).item() < 1e-4
    assert ours.seen["image"].shape == (batch, 3, px, px)
    for side in (ours, theirs):
        assert side.clock.read().keys() == {"text", "denoiser", "autoencoder"}
        assert side.clock.read() == {}


def test_prompts_of_runs_differ() -> None:
    task = work(batch=3)
    seen = [*task.prompts(40, 0), *task.prompts(40, 1)]
    assert len(set(seen)) == 6


@pytest.mark.parametrize("name", ["600m", "1600m", "1.5-1600m", "1.5-4800m"])
def test_sizes_are_the_published_ones(name: str) -> None:
    counts = {"600m": 591_747_872, "1600m": 1_604_462_752, "1.5-1600m": 1_604_641_952, "1.5-4800m": 4_721_825_952}
    task = Work(name, 1024, 20, 1, 2, torch.float32, torch.device("meta"))
    network, autoencoder = make_ours(task)
    assert sum(p.numel() for p in network.parameters()) == counts[name]
    assert sum(p.numel() for p in autoencoder.parameters()) == 312_250_275
    theirs, other = make_theirs(task)
    assert sum(p.numel() for p in theirs.parameters()) == counts[name]
    assert sum(p.numel() for p in other.parameters()) == 312_250_275
    assert len(network.blocks) == SIZES[name].depth


def test_clock_adds_up_calls() -> None:
    clock = Clock(torch.device("cpu"))

    class Part:
        def work(self, x: int) -> int:
            return x + 1

    part = Part()
    clock.wrap(part, "work", "stage")
    assert [part.work(1), part.work(2)] == [2, 3]
    seconds = clock.read()
    assert seconds.keys() == {"stage"}
    assert 0 <= seconds["stage"] < 1


def test_floors_by_hand() -> None:
    assert Rates(flops=10.0, bytes=4.0).seconds(100.0, 20.0) == 10.0
    assert Rates(flops=10.0, bytes=4.0).seconds(10.0, 20.0) == 5.0
    # A2 of the plan of performance: 40 values per token, channel and layer, and the weights once.
    assert denoiser_bytes(100, 5, 3, 2, 4, 2) == 2 * (100 + 40 * 5 * 3 * 2 * 4)


@pytest.mark.long
def test_command_writes_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "new" / "out.json"
    command = (
        "scripts/bench.py sample --size tiny --px 64 --steps 2 --repeats 2 --text-layers 1 --peer diffusers --json"
    )
    done = subprocess.run([sys.executable, *command.split(), str(file)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(file.read_text())
    assert {"ratio_latency_40", "ratio_latency_300", "ratio_peak_memory", "max_rel_error"} <= results.keys()
    assert results["max_rel_error"] < 1e-4
    assert [row["tokens"] for row in results["raw"]] == [40, 40, 300, 300]
    for tokens in (40, 300):
        ratios = sorted(r["ours"]["total"] / r["theirs"]["total"] for r in results["raw"] if r["tokens"] == tokens)
        assert results[f"ratio_latency_{tokens}"] == pytest.approx(sum(ratios) / 2)
    assert "GFLOP/s" in done.stdout
    assert "autoencoder" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--px", "100"], "--px 100 is not a positive multiple of 32"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--tokens", "40", "301"], "--tokens must be from 8 to 300"),
        (["--device", "tpu"], "--device tpu: cpu or cuda"),
    ],
)
def test_refusals_are_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", *arguments]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
