"""Clips in a real trainer: typed batches, each clip once per epoch, resumption, bad clips."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Trainer
from test_module import Brightness

from sana.callback.bad_samples import BadSamples
from sana.data.caption import PowerScore
from sana.data.clip_module import ClipsData
from sana.data.formats.open import open_source
from sana.data.loader import Slot
from sana.data.moving_shards import MovingSet, write_moving_shards
from sana.model.base import weighted_mean
from sana.types import Clip, World


class Watcher(Brightness):
    """Remembers batches of clips."""

    def training_step(self, batch: Clip, batch_idx: int) -> None:  # type: ignore[override]
        self.begin_batch(batch.key)
        assert batch.video is not None
        assert batch.weight is not None
        losses = (self.level(batch.video.mean((1, 2, 3, 4))[:, None]) - 1).square()[:, 0]
        self.optimise("level", weighted_mean(losses, batch.weight))
        self.seen += list(zip(batch.key, batch.weight.tolist(), strict=True))
        self.shapes.append(tuple(batch.video.shape))
        self.last = batch
        self.finish_batch(len(batch.key))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rooms")
    write_moving_shards(root, MovingSet(12, 3, "room", frames=9, size=32, shard_size=5), progress=False)
    return root


def fit(data: ClipsData, folder: Path, steps: int, seen: int = 0) -> Watcher:
    recipe = Watcher()
    recipe.samples_seen = seen
    folder.mkdir(exist_ok=True)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(max_steps=steps, accelerator="cpu", default_root_dir=folder, callbacks=[BadSamples()], **quiet)
    trainer.fit(recipe, datamodule=data)
    return recipe


def test_worlds_each_once_and_exactly_resumed(folder: Path, tmp_path: Path) -> None:
    make = partial(
        ClipsData, str(folder), 4, PowerScore(), frames=5, size=(16, 24), camera=True, first_frame=0.5, seed=1
    )
    straight = fit(make(), tmp_path / "a", 6)
    assert set(Counter(straight.seen).values()) == {2}
    assert set(straight.shapes) == {(4, 3, 5, 16, 24)}
    assert isinstance(straight.last, World)
    assert straight.last.pose.shape == (4, 5, 4, 4)
    assert all(straight.last.caption)
    assert len(straight.last.source) == 4
    resumed = fit(make(num_workers=1), tmp_path / "b", 3, seen=12)
    assert resumed.seen == straight.seen[12:]


def test_clips_of_some_motion(folder: Path, tmp_path: Path) -> None:
    source = open_source(folder)
    motion = np.asarray(source.index.column("score.motion"))
    middle = float(np.sort(motion)[6])
    data = ClipsData([str(folder), str(folder)], 4, PowerScore(), frames=9, least_motion=middle)
    recipe = fit(data, tmp_path, 3)
    wanted = {source.key(int(i)) for i in np.flatnonzero(motion >= middle)}
    assert Counter(key for key, _ in recipe.seen) == dict.fromkeys(wanted, 2)
    assert type(recipe.last) is Clip
    with pytest.raises(ValueError, match="no clip is left"):
        ClipsData(str(folder), 4, PowerScore(), frames=9, least_motion=1e9).planner()


def test_bad_clips_are_replaced_and_reported(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.glob("*.tar"):
        (copy / path.name).write_bytes(path.read_bytes())
    source = open_source(copy)
    offset, size = (int(source.index.column(f"clip_{what}")[2]) for what in ("offset", "size"))
    body = bytearray((copy / source.shard(2)).read_bytes())
    body[offset : offset + size] = bytes(size)
    (copy / source.shard(2)).write_bytes(body)
    data = ClipsData(str(copy), 4, PowerScore(), frames=9, max_bad_fraction=0.5)
    recipe = fit(data, tmp_path / "run", 3)
    assert [key for key, weight in recipe.seen if not weight] == [source.key(2)]
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert (line["shard"], line["key"]) == (source.shard(2), source.index.key(2))
    assert line["reason"].startswith("corrupt clip")
    assert torch.isfinite(recipe.level.weight).all()
    slots = [Slot(k, k, 0, 0) for k in range(4)]
    clips = ClipsData(str(copy), 4, PowerScore(), frames=10).clips()
    with pytest.raises(ValueError, match="none of 4 clips can be read"):
        clips.__getitems__(slots)
