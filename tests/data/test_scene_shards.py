"""Shards of scenes: the same bytes however written, readable by WebDataset, resumable, never mixed up."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest, chisquare

from sana.data import scene_shards
from sana.data.caption import PowerScore
from sana.data.formats.open import open_source
from sana.data.module import ScenesData
from sana.data.scene_shards import encode_png, write_scene_shards
from sana.data.synthetic import GENERATOR, example
from sana.scenes import HELD_OUT, TASKS, combinations

ROOT = Path(__file__).parents[2]
write = write_scene_shards


def _tars(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "a" / "b"
    write(folder, 70, seed=4, shard_size=30, workers=1, progress=False)
    return folder


@pytest.mark.parametrize("shape", [(64, 64, 3), (5, 9, 3), (1, 1, 3)])
def test_png(shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with Image.open(io.BytesIO(encode_png(image))) as read:
        read.load()
        assert read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read), image)


def test_index_and_names(written: Path) -> None:
    index = json.loads((written / "index.json").read_text())
    assert index["kind"] == "scenes"
    (split,) = index["splits"].values()
    assert split["complete"] is True
    assert (split["split"], split["count"], split["seed"], split["shard_size"]) == ("train", 70, 4, 30)
    assert split["generator"] == GENERATOR
    assert [(s["name"], s["count"]) for s in split["shards"]] == [
        ("train-000000.tar", 30),
        ("train-000001.tar", 30),
        ("train-000002.tar", 10),
    ]
    assert {s["name"]: s["sha256"] for s in split["shards"]} == _tars(written)
    assert all((written / s["name"]).stat().st_size == s["bytes"] for s in split["shards"])


def test_webdataset_reads_every_scene(written: Path) -> None:
    import webdataset

    urls = [str(p) for p in sorted(written.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [s["__key__"] for s in samples] == [f"{i:08d}" for i in range(70)]
    for i in (0, 29, 30, 69):
        image, facts = example(4, i)
        np.testing.assert_array_equal(samples[i]["png"], image)
        assert samples[i]["json"] == facts


def test_members_carry_no_time_nor_owner(written: Path) -> None:
    with tarfile.open(written / "train-000000.tar") as tar:
        members = tar.getmembers()
    assert [m.name for m in members[:2]] == ["00000000.png", "00000000.json"]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}


def test_same_bytes_with_more_workers_and_smaller_steps(written: Path, tmp_path: Path) -> None:
    write(tmp_path / "two", 70, seed=4, shard_size=30, workers=2, progress=False)
    assert _tars(tmp_path / "two") == _tars(written)
    assert (tmp_path / "two" / "index.json").read_bytes() == (written / "index.json").read_bytes()
    write(tmp_path / "other", 70, seed=5, shard_size=30, workers=1, progress=False)
    assert not set(_tars(tmp_path / "other").values()) & set(_tars(written).values())


def test_goes_on_where_it_ended(written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, made = scene_shards.example, 0

    def failing(seed: int, index: int, task: str | None = None, **rest: bool) -> object:
        nonlocal made
        made += 1
        if made > 45:
            raise KeyboardInterrupt
        return real(seed, index, task, **rest)

    monkeypatch.setattr(scene_shards, "example", failing)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 70, seed=4, shard_size=30, workers=1, progress=False)
    assert list(_tars(tmp_path)) == ["train-000000.tar"]
    assert not list(tmp_path.glob(".*.partial"))
    assert json.loads((tmp_path / "index.json").read_text())["splits"]["train"]["complete"] is False
    (tmp_path / ".train-000001.tar.partial").write_text("left by a killed process")
    before = (tmp_path / "train-000000.tar").stat().st_mtime_ns
    made = -1000
    write(tmp_path, 70, seed=4, shard_size=30, workers=1, progress=False)
    assert made == -1000 + 40  # only the missing two
    assert (tmp_path / "train-000000.tar").stat().st_mtime_ns == before
    assert _tars(tmp_path) == _tars(written)
    assert not list(tmp_path.glob(".*.partial"))
    # A damaged or missing shard is written again, and nothing else.
    (tmp_path / "train-000002.tar").unlink()
    with open(tmp_path / "train-000001.tar", "r+b") as file:
        file.seek(600)
        file.write(b"x")
    made = -1000
    write(tmp_path, 70, seed=4, shard_size=30, workers=1, progress=False)
    assert made == -1000 + 40
    assert _tars(tmp_path) == _tars(written)
    made = -1000
    write(tmp_path, 70, seed=4, shard_size=30, workers=1, progress=False)
    assert made == -1000


def test_splits_share_a_folder(tmp_path: Path) -> None:
    write(tmp_path, 6, seed=1, workers=1, progress=False)
    train = _tars(tmp_path)
    val = write(tmp_path, 4, seed=2, split="val", held_out=True, workers=1, progress=False)
    assert val["held_out"] is True
    assert _tars(tmp_path) == train | {val["shards"][0]["name"]: val["shards"][0]["sha256"]}
    assert set(json.loads((tmp_path / "index.json").read_text())["splits"]) == {"train", "val"}
    with tarfile.open(tmp_path / "val-000000.tar") as tar:
        for i in range(4):
            file = tar.extractfile(f"{i:08d}.json")
            assert file is not None
            assert combinations(json.load(file)) & HELD_OUT


def test_refuses_what_is_not_its_own(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="holds another 'train' set: seed is 4 there, 9 was asked for"):
        write(written, 70, seed=9, shard_size=30, progress=False)
    with pytest.raises(FileExistsError, match="count is 70 there, 80"):
        write(written, 80, seed=4, shard_size=30, progress=False)
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FileExistsError, match=r"holds 'photo.jpg' and no index.json: give an empty or a new"):
        write(tmp_path, 10, seed=0, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]
    (tmp_path / "index.json").write_text('{"kind": "images"}')
    with pytest.raises(FileExistsError, match="is no index of scenes"):
        write(tmp_path, 10, seed=0, progress=False)
    with pytest.raises(FileExistsError, match="is a file"):
        write(tmp_path / "photo.jpg", 10, seed=0, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0"),
        ({"shard_size": 0}, "shard_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"split": "a/b"}, "split is 'a/b'"),
        ({"workers": 0}, "workers is 0"),
    ],
)
def test_bad_parameters_leave_nothing(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "new", **({"count": 1, "seed": 0, "progress": False} | change))
    assert not (tmp_path / "new").exists()


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / "make_shards.py"), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_script(written: Path, tmp_path: Path) -> None:
    arguments = ("scenes", str(tmp_path / "out"), "--count", "70", "--shard-size", "30", "--workers", "1")
    done = _run(*arguments, "--seed", "4")
    assert done.returncode == 0, done.stderr
    assert "70 scenes in 3 shards" in done.stdout
    assert _tars(tmp_path / "out") == _tars(written)
    refused = _run(*arguments, "--seed", "5")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "seed is 4 there, 5 was asked for" in refused.stderr


def test_speed(tmp_path: Path) -> None:
    """1,000 images a second on two cores; processor time, so that neighbours do not count."""
    began = time.process_time()
    write(tmp_path, 600, seed=0, workers=1, progress=False)
    assert 600 / (time.process_time() - began) > 500


def test_tasks_come_by_weight(tmp_path: Path) -> None:
    tasks = {"position": 3.0, "counting": 1.0}
    write(tmp_path, 400, 3, tasks=tasks, progress=False)
    found: Counter[str] = Counter()
    for path in tmp_path.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    found[json.load(file)["tag"]] += 1
    assert set(found) == set(tasks)
    assert binomtest(found["position"], 400, 0.75).pvalue > 0.01
    write(tmp_path, 400, 3, tasks=tasks, progress=False)  # finds it there
    with pytest.raises(FileExistsError, match="tasks is"):
        write(tmp_path, 400, 3, progress=False)
    with pytest.raises(ValueError, match="there is no 'positions'"):
        write(tmp_path / "b", 4, 3, tasks={"positions": 1.0}, progress=False)
    with pytest.raises(ValueError, match="not all zero"):
        write(tmp_path / "b", 4, 3, tasks={"position": 0.0}, progress=False)


@pytest.mark.parametrize("tasks", [{"position": 9.0, "counting": 1.0, "colors": 0.0}, None])
def test_validation_has_the_trained_tasks_equally_often(tmp_path: Path, tasks: dict[str, float] | None) -> None:
    data = ScenesData(str(tmp_path), 4, PowerScore(), count=8, held=240, tasks=tasks)
    data.write()
    source = open_source(tmp_path, split="val")
    found = Counter(source.record(i).meta["tag"] for i in range(len(source)))
    assert found.keys() == ({"position", "counting"} if tasks else set(TASKS))
    assert chisquare(list(found.values())).pvalue > 0.01


def test_index_is_that_of_a_source(written: Path, tmp_path: Path) -> None:
    source = open_source(written)
    assert source.index.facts["kind"] == "own"
    assert len(source) == 70
    for i in (0, 30, 69):
        image, facts = example(4, i)
        np.testing.assert_array_equal(source.image(i), image)
        record = source.record(i)
        assert record.meta == facts
        assert [c._asdict() for c in record.captions] == facts["captions"]
        assert (record.width, record.height, record.key) == (64, 64, facts["key"])
    for path in [*written.glob("*.tar"), written / "index.json"]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write(tmp_path, 70, seed=4, shard_size=30, workers=1, progress=False)  # shards without an index get one
    name = "train.index.arrow"
    assert (tmp_path / name).read_bytes() == (written / name).read_bytes()
