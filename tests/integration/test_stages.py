"""The published chain 512 -> 1024 -> 2048 px at tiny width: each stage starts from the weights of the one before."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sana.checkpoint.run_file import read_run_file
from sana.run.launch import launch
from sana.run.runs import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]
TINY = [
    "network.width=32", "network.depth=2", "block.cross.heads=2", "network.text_channels=64",
    "encoder/text=gemma_random", "encoder.text.channels=64", "encoder.text.layers=1", "encoder.text.dtype=float32",
    "encoder.autoencoder.encoder_widths=[8,8,8,8,8,32]", "encoder.autoencoder.decoder_widths=[8,8,8,8,8,32]",
    "encoder.autoencoder.encoder_depths=[1,1,1,1,1,1]", "encoder.autoencoder.decoder_depths=[1,1,1,1,1,1]",
    "encoder.autoencoder.encoder_attention=[false,false,false,false,false,false]",
    "encoder.autoencoder.decoder_attention=[false,false,false,false,false,false]",
    "encoder.autoencoder.weights=null", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.devices=1",
    "data.batch_size=1", "data.num_workers=0", "data.validation=1", "callback.samples=null", "callback.validation=null",
    "trainer.max_steps=3", "callback.records.every=1",
]  # fmt: skip


@pytest.mark.long
def test_each_stage_starts_from_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sys.path.insert(0, str(ROOT))
    from train import train

    monkeypatch.setenv("SANA_RUN_DIR", "")  # is set by each run, and is to be gone afterwards
    images = tmp_path / "images"
    images.mkdir()
    for k, side in enumerate((512, 1024, 2048)):
        noise = np.random.default_rng(k).integers(0, 255, (side // 64, side // 64, 3), np.uint8)
        Image.fromarray(noise).resize((side, side)).save(images / f"{k}.jpg")
        (images / f"{k}.txt").write_text("noise")
    before: Path | None = None
    for size in (512, 1024, 2048):
        run = tmp_path / str(size)
        init = [] if before is None else [f"init={before}"]
        name = f"experiment=image/sana_1600m_{size}px"
        assert launch("train", train, [name, *TINY, f"data.folder={images}", f"run.dir={run}", *init]) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [1, 2, 3]
        assert all(np.isfinite(row["train/loss"]) for row in rows)
        checkpoint = newest_checkpoint(run)
        assert checkpoint is not None
        tensors, _, updates = read_run_file(checkpoint, "live")
        assert updates == 3
        if before is not None:
            # Three updates of a warm-up that begins at 1/2000 of the rate: nearly the weights of the stage before.
            old = read_run_file(newest_checkpoint(before), "live")[0]  # type: ignore[arg-type]
            assert old.keys() == tensors.keys()  # the position table of 2K has no weights
            for key in old:
                torch.testing.assert_close(tensors[key], old[key], rtol=0, atol=1e-4)
        before = run
