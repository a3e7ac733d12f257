"""``quant=fp8_train``: real runs of train.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sana.checkpoint.run_file import read_run_file
from sana.run.error import ConfigError
from sana.run.export import export_run
from sana.run.restore import restore
from sana.run.runs import newest_checkpoint
from sana.run.saved import prepare

pytest.importorskip("torchao")

ROOT = Path(__file__).resolve().parents[2]


def train(folder: Path, name: str, *settings: str) -> tuple[Path, str]:
    """A small run, and what it printed."""
    run = folder / name
    small = ["data.count=64", "data.batch_size=8", f"data.folder={folder / 'data'}", "network.depth=2", "seed=3"]
    small += [
        "callback.samples=null",
        "callback.validation=null",
        "callback.checkpoints.every=3",
        "callback.records.every=1",
    ]
    done = subprocess.run(
        [sys.executable, "train.py", f"run.dir={run}", "trainer.precision=32-true", *small, *settings],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def weights(run: Path, kind: str) -> dict[str, torch.Tensor]:
    path = newest_checkpoint(run)
    assert path is not None
    tensors, _, updates = read_run_file(path, kind)  # type: ignore[arg-type]
    assert updates == 6
    return {name: tensors[name].clone() for name in tensors}


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.mark.long
def test_a_run_keeps_full_precision_and_resumes_exactly(tmp_path: Path) -> None:
    whole, printed = train(tmp_path, "whole", "quant=fp8_train", "trainer.max_steps=6")
    assert "fp8_train in 12 layers" in printed
    plain, _ = train(tmp_path, "plain", "trainer.max_steps=6")
    train(tmp_path, "parts", "quant=fp8_train", "trainer.max_steps=3")
    parts, _ = train(tmp_path, "parts", "quant=fp8_train", "trainer.max_steps=6", "resume=auto")
    ours, theirs = weights(whole, "live"), weights(parts, "live")
    assert ours.keys() == theirs.keys() == weights(plain, "live").keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(a, weights(parts, "ema")[name]) for name, a in weights(whole, "ema").items())
    assert {t.dtype for t in ours.values()} == {torch.float32}
    # The first loss differs by the rounding of the products alone, and does.
    first, other = losses(whole)[0], losses(plain)[0]
    assert first != other
    assert first == pytest.approx(other, rel=0.05)
    out = tmp_path / "exported.safetensors"
    record = export_run(whole, out)
    assert record.recipe is not None
    assert "quant" not in record.recipe
    network = restore(prepare("sample", [f"ckpt={out}", "prompt=a ring", "device=cpu"])).module.network
    assert not any("Float8" in type(module).__name__ for module in network.modules())


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"quant: training is in full precision, or .*quant=fp8_train"):
        prepare("train", ["quant=int8"])
    with pytest.raises(ConfigError, match="fp8_train trains velocities"):
        prepare("train", ["experiment=sprint/tiny", "quant=fp8_train"])
    for entry, line in (("sample", ["prompt=a"]), ("eval", [])):
        with pytest.raises(ConfigError, match=r"fp8_train is for train\.py"):
            prepare(entry, ["ckpt=scenes", "quant=fp8_train", *line])
    assert prepare("train", ["quant=fp8_train"]).config.quant is not None


def test_torchao_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sana.run.saved.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="fp8_train needs torchao"):
        prepare("train", ["quant=fp8_train"])
