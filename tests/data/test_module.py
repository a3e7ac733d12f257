"""The data module in a real trainer: order, resume, sizes, filters, mixtures, bad samples, inspection."""

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
from memory_source import Pictures
from rich.console import Console
from torch import nn

from sana.callback.bad_samples import BadSamples, TooManyBadSamples
from sana.callback.checkpoints import Checkpoints
from sana.callback.records import Records
from sana.data.bucket import Buckets, by_area
from sana.data.caption import Proportion
from sana.data.module import ShardsData
from sana.data.stream import Filter
from sana.model.base import Optimisation, Recipe, weighted_mean
from sana.run.build import build
from sana.run.error import ConfigError
from sana.run.inspect import inspect
from sana.run.saved import prepare
from sana.types import Batch

CHOICE = Proportion({"short": 3.0, "long": 1.0})


class Brightness(Recipe):
    """Learns the mean of the pixels, and remembers what it saw."""

    def __init__(self) -> None:
        plan = Optimisation(partial(torch.optim.SGD, lr=0.1), lambda update: 1.0)
        super().__init__({"level": plan}, seed=0)
        torch.manual_seed(0)
        self.level = nn.Linear(1, 1)
        self.seen: list[tuple[str, float]] = []
        self.shapes: list[tuple[int, ...]] = []

    def trainables(self) -> dict[str, nn.Module]:
        return {"level": self.level}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.begin_batch(batch.key)
        assert batch.image is not None
        assert batch.weight is not None
        assert batch.image.dtype == torch.float32
        assert batch.image.abs().max() <= 1
        losses = (self.level(batch.image.mean((1, 2, 3))[:, None]) - 1).square()
        self.optimise("level", weighted_mean(losses, batch.weight))
        self.seen += list(zip(batch.key, batch.weight.tolist(), strict=True))
        self.shapes.append(tuple(batch.image.shape))
        self.finish_batch(len(batch.key))


def fit(data: ShardsData, folder: Path, steps: int, resume: Path | None = None, **more: Any) -> Any:
    recipe = Brightness()
    folder.mkdir(exist_ok=True)
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[BadSamples(every=2), Records(1), Checkpoints(every=100)],
        **more,
    )
    recipe.resume = resume
    trainer.fit(recipe, datamodule=data)
    return recipe


@pytest.mark.parametrize("micro", [None, 2])
def test_each_epoch_holds_every_sample_once_and_a_stop_loses_none(tmp_path: Path, micro: int | None) -> None:
    pictures = Pictures(24, [(8, 8), (8, 16)])
    folder = str(pictures.write(tmp_path / "shards", 3))
    table = Buckets([(8, 8), (8, 16)], [1.0, 0.5])
    make = partial(ShardsData, folder, 4, CHOICE, buckets=table, micro_batch=micro, seed=3)
    straight = fit(make(), tmp_path / "a", 12)
    assert set(Counter(straight.seen).values()) == {2}
    assert {shape[2:] for shape in straight.shapes} == {(8, 8), (8, 16)}
    first = fit(make(), tmp_path / "b", 5)
    second = fit(make(), tmp_path / "c", 12, tmp_path / "b" / "checkpoints" / "step_00000005.ckpt")
    assert first.seen + second.seen == straight.seen
    assert torch.equal(straight.level.weight, second.level.weight)


def test_sizes(tmp_path: Path) -> None:
    folder = str(Pictures(4, [(9, 13), (20, 10)]).write(tmp_path, 1))
    data = ShardsData(folder, 2, CHOICE, size=8)
    assert next(data.batches()).image.shape == (2, 3, 8, 8)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="the images have 2 sizes"):
        next(ShardsData(folder, 2, CHOICE).batches())
    assert np.concatenate(list(data.validation_images(3))).shape == (4, 8, 8, 3)
    fixed = data.validation_batch()
    assert fixed.image is not None
    assert fixed.image.shape == (4, 3, 8, 8)
    assert fixed.index.tolist() == [0, 1, 2, 3]


def test_filters_and_mixtures(tmp_path: Path) -> None:
    one = str(Pictures(10, [(8, 8), (16, 16)]).write(tmp_path / "one", 1))
    two = str(Pictures(30, [(24, 24)], seed=1).write(tmp_path / "two", 2))
    data = ShardsData([one, two], 4, CHOICE, size=8, weights=[3, 1], filter=Filter(min_side=12))
    planner = data.planner()
    taken = np.concatenate([planner.at(4 * step).samples for step in range(70)])  # 8 epochs of 35
    assert (taken < 10).sum() == 210
    assert set(taken[taken < 10].tolist()) == {1, 3, 5, 7, 9}
    assert set(taken[taken >= 10].tolist()) == set(range(10, 40))
    with pytest.raises(ValueError, match="no sample is left"):
        ShardsData(one, 4, CHOICE, size=8, filter=Filter(min_side=99)).planner()
    with pytest.raises(ValueError, match="1 given for 2 folders"):
        ShardsData([one, two], 4, CHOICE, weights=[1])


def spoil(pictures: Pictures, numbers: list[int]) -> Pictures:
    for i in numbers:
        pictures.files[i] = pictures.files[i][:64]
    return pictures


def test_bad_samples_are_reported_and_the_run_goes_on(tmp_path: Path) -> None:
    folder = str(spoil(Pictures(40), [7, 21]).write(tmp_path / "shards", 3))
    recipe = fit(ShardsData(folder, 8, CHOICE, size=8, max_bad_fraction=0.1), tmp_path / "run", 10)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["000007", "000007", "000021", "000021"]
    assert all(line["shard"] and line["reason"] for line in lines)
    counts = Counter(recipe.seen)
    assert len(counts) == 40
    assert set(counts.values()) == {2}
    assert sorted(key[-6:] for key, weight in counts if not weight) == ["000007", "000021"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["data/bad"] == 4
    assert rows[-1]["data/caption/short"] + rows[-1]["data/caption/long"] == pytest.approx(1)
    assert abs(rows[-1]["data/caption/short"] - 0.75) < 0.2  # four standard deviations of 76 draws


@pytest.mark.slow
def test_two_processes_report_and_stop_together(tmp_path: Path) -> None:
    folder = str(spoil(Pictures(24), [3, 8, 13]).write(tmp_path / "shards", 2))
    ranks = dict(strategy="ddp_fork", devices=2)
    fit(ShardsData(folder, 4, CHOICE, size=8, max_bad_fraction=0.2), tmp_path / "run", 6, **ranks)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert sorted(line["key"] for line in lines) == ["000003", "000008", "000013"]
    assert lines == sorted(lines, key=lambda line: line["update"])
    with pytest.raises(Exception, match=r"3 bad samples, more than data.max_bad_fraction=0.1 of 24"):
        fit(ShardsData(folder, 4, CHOICE, size=8, max_bad_fraction=0.1), tmp_path / "stopped", 6, **ranks)
    assert len((tmp_path / "stopped" / "bad_samples.jsonl").read_text().splitlines()) == 3


def test_too_many_bad_samples_stop_the_run_with_the_report(tmp_path: Path) -> None:
    folder = str(spoil(Pictures(40), list(range(0, 40, 4))).write(tmp_path / "shards", 3))
    with pytest.raises(TooManyBadSamples, match=r"bad samples, more than data.max_bad_fraction=0.1 of \d+ allows"):
        fit(ShardsData(folder, 8, CHOICE, size=8, max_bad_fraction=0.1), tmp_path / "run", 1000)
    assert 50 < len((tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()) < 60
    with pytest.raises(TooManyBadSamples, match=r"10 bad samples, more than data.max_bad_fraction=0.1 of 40"):
        fit(ShardsData(folder, 8, CHOICE, size=8, max_bad_fraction=0.1), tmp_path / "short", 5)


def test_what_indexing_found_is_reported_first(tmp_path: Path) -> None:
    folder = Pictures(40).write(tmp_path / "shards", 2)
    tar = folder / "train-00001.tar"
    tar.write_bytes(tar.read_bytes()[: tar.stat().st_size // 2])
    recipe = fit(ShardsData(str(folder), 4, CHOICE, size=8, max_bad_fraction=0.1), tmp_path / "run", 6)
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {(line["update"], line["shard"]) for line in lines} == {(0, "train-00001.tar")}
    assert len(recipe.seen) == len(set(recipe.seen)) == 24
    with pytest.raises(TooManyBadSamples, match=f"{len(lines)} bad samples"):
        fit(ShardsData(str(folder), 4, CHOICE, size=8, max_bad_fraction=0.01), tmp_path / "stopped", 6)
    assert (tmp_path / "stopped" / "bad_samples.jsonl").exists()


def test_without_a_report_a_bad_sample_is_an_error() -> None:
    data = ShardsData("x", 1, CHOICE)
    batch = Batch(None, None, [""], torch.zeros(1, dtype=torch.int64), ["s/k"], bad=[("s", "k", "truncated")])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="s/k: truncated; to go on without bad samples"):
        data.on_after_batch_transfer(batch, 0)


def test_inspection_names_what_training_will_meet(tmp_path: Path) -> None:
    folder = str(spoil(Pictures(30, [(16, 8), (8, 8)]), [5]).write(tmp_path / "shards", 2))
    console = Console(record=True, width=120)
    data = ShardsData(folder, 4, CHOICE, buckets=by_area(64, 4, 0.25, 4.0), max_bad_fraction=0.01)
    assert inspect(data, tmp_path / "out", console) == 1
    said = console.export_text()
    assert "30 of 30 samples were read: 1 bad" in said
    assert "000005" in said
    assert "8x8" in said
    assert "short" in said
    (line,) = (tmp_path / "out" / "inspect_bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "000005"
    assert (tmp_path / "out" / "inspect.png").exists()


def test_the_configuration_reaches_the_data(tmp_path: Path) -> None:
    places = [str(Pictures(8, [(8, 8), (8, 16)], seed=k).write(tmp_path / str(k), 1)) for k in range(2)]
    overrides = [
        "data=shards", f"data.folder=[{','.join(places)}]", "data.weights=[3,1]",
        "data.filter.scores={aesthetic: 5.0}",
        "data.filter.min_side=8", "data.batch_size=4", "data.limits.max_pixels=100",
        "data.buckets={_target_: sana.data.bucket.by_area, area: 128, step: 8, min_ratio: 0.5, max_ratio: 2.0}",
    ]  # fmt: skip
    data = build(prepare("train", overrides).config.data, "data")
    assert data.folders == places
    assert data.weights == [3, 1]
    assert (8, 16) in data.buckets.sizes
    with pytest.raises(ValueError, match="no sample has a score 'aesthetic'"):
        data.planner()
    with pytest.raises(ConfigError, match="/none does not exist"):
        prepare("train", ["data=shards", f"data.folder=[{places[0]},/none]"])
    prepare("train", ["data=shards", "data.folder=https://example.org/shards"])
    with pytest.raises(ConfigError, match=r"data\.filter\.min_sides: unknown key"):
        prepare("train", ["data=shards", f"data.folder={places[0]}", "data.filter.min_sides=1"])
