"""From a folder to shards: same source, same bytes; nothing lost silently; every flipped bit noticed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from pictures import encoded, noise, png
from PIL import Image

from sana.data import write_shards as writing
from sana.data.caption import Caption
from sana.data.formats.open import open_source
from sana.data.record import BadSample
from sana.data.write_shards import write_shards

COUNT = 23


def make_folder(folder: Path, count: int = COUNT) -> Path:
    """Nested images of three formats, each with a caption; two of them unfit."""
    for i in range(count):
        inner = folder / ("a" if i % 2 else "b/c")
        inner.mkdir(parents=True, exist_ok=True)
        kind, suffix = (("PNG", "png"), ("JPEG", "jpg"), ("WEBP", "webp"), ("GIF", "gif"))[i % 4]
        (inner / f"{i:03d}.x.{suffix}").write_bytes(encoded(noise(i, 8 + i, 30 - i), kind))
        if i % 3:
            (inner / f"{i:03d}.x.txt").write_text(f"picture {i} é\n")
        else:
            meta = {"prompt": f"picture {i}", "captions": [{"source": "vlm", "text": f"n {i}", "score": 20.5 + i}]}
            meta |= {"aesthetic_score": i / 8, "version": "high_quality", "licence": "CC0"}
            (inner / f"{i:03d}.x.json").write_text(json.dumps(meta))
    whole = (folder / "a" / "001.x.jpg").read_bytes()
    (folder / "a" / "cut.jpg").write_bytes(whole[: len(whole) - 40])  # its header is sound
    (folder / "a" / "cut.txt").write_text("cut off")
    (folder / "b" / "page.jpg").write_bytes(b"<!DOCTYPE html> not found " * 4)
    (folder / "b" / "page.txt").write_text("no image at all")
    return folder


def digests(folder: Path) -> dict[str, str]:
    # Opening the folder by its wids-meta.json, as another test does, leaves an index of its own there.
    found = [path for path in folder.iterdir() if path.name not in (".lock", ".index-wids.arrow")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("shards")
    source = make_folder(base / "src")
    written = write_shards(open_source(source), base / "dst", shard_size=10, workers=1, progress=False)
    assert written.count == COUNT
    assert [bad.kind for bad in written.bad] == ["not an image", "corrupt image"]
    return source, base / "dst"


def test_what_is_written_is_read(made: tuple[Path, Path]) -> None:
    folder, shards = made
    source, own = open_source(folder), open_source(shards)
    assert sorted(p.name for p in shards.iterdir()) == [
        ".lock",
        "bad_samples.jsonl",
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "train.index.arrow",
        "wids-meta.json",
    ]
    assert len(own) == COUNT
    assert own.index.facts["kind"] == "own"
    by_origin = {source.key(i): i for i in range(len(source))}
    for i in range(COUNT):
        record = own.record(i)
        j = by_origin[record.meta["origin"]]
        number = int(record.meta["origin"].split("/")[-1][:3])
        theirs = source.record(j)
        assert np.array_equal(own.image(i), source.image(j))
        assert (record.captions, record.scores, record.hq) == (theirs.captions, theirs.scores, theirs.hq)
        assert (record.height, record.width) == own.image(i).shape[:2] == (8 + number, 30 - number)
        assert own.index.column("checksum")[i] == xxhash.xxh3_64_intdigest(own.read(i))
        if number % 3:
            assert record.captions == (Caption("prompt", f"picture {number} é"),)
        else:
            assert record.captions == (Caption("vlm", f"n {number}", 20.5 + number),)
            assert record.scores == {"aesthetic_score": number / 8}
            assert record.hq
            assert record.meta["licence"] == "CC0"
    assert own.key(0) == "train-000000.tar/000000000"


def test_webdataset_reads_them(made: tuple[Path, Path]) -> None:
    own = open_source(made[1])
    urls = [str(path) for path in sorted(made[1].glob("*.tar"))]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("png;jpg;webp", "json"))
    assert len(theirs) == COUNT
    for i, (pixels, meta) in enumerate(theirs):
        assert np.array_equal(own.image(i), pixels)
        assert meta == own.record(i).meta


def test_the_released_reader_finds_them(made: tuple[Path, Path]) -> None:
    listed = json.loads((made[1] / "wids-meta.json").read_text())["shardlist"]
    assert [(shard["url"], shard["nsamples"]) for shard in listed] == [
        (f"train-{i:06d}.tar", n) for i, n in enumerate((10, 9, 4))
    ]
    own, theirs = open_source(made[1]), open_source(made[1] / "wids-meta.json")
    assert [theirs.key(i) for i in range(COUNT)] == [own.key(i) for i in range(COUNT)]
    for i in range(COUNT):
        meta = theirs.record(i).meta  # what that reader needs of every sample
        assert meta["prompt"]
        assert (meta["height"], meta["width"]) == own.image(i).shape[:2]


def test_script_says_what_is_wrong(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "scripts/make_shards.py", "images", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.png").write_bytes(b"not one" * 9)
    (tmp_path / "b.txt").write_text("b")
    for arguments in ((tmp_path, tmp_path), (tmp_path / "none", tmp_path / "dst")):
        done = run(*arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("make_shards: ")
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "dst").exists()
    done = run(tmp_path, tmp_path / "dst", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 images in 1 shards: ")
    assert "1 left out, see" in done.stdout


def test_the_report(made: tuple[Path, Path]) -> None:
    lines = [json.loads(line) for line in (made[1] / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["split"], line["shard"], line["reason"].split(":")[0]) for line in lines] == [
        ("train", "b/page.jpg", "not an image"),
        ("train", "a/cut.jpg", "corrupt image"),
    ]


@pytest.mark.slow
def test_same_bytes_with_more_workers_and_after_a_stop(
    made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, expected = open_source(made[0]), digests(made[1])
    write_shards(source, tmp_path / "two", shard_size=10, workers=2, progress=False)
    assert digests(tmp_path / "two") == expected
    write_one, calls = writing.write_shard, []

    def stop_at_second(*arguments: object) -> None:
        calls.append(arguments[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        write_one(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "write_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        write_shards(source, tmp_path / "stopped", shard_size=10, workers=1, progress=False)
    with pytest.raises(ValueError, match=r"split 'train' is not complete; run the same make_shards\.py"):
        open_source(tmp_path / "stopped")
    (tmp_path / "stopped" / ".train-000001.tar.partial").write_bytes(b"half")
    calls.append(0)
    write_shards(source, tmp_path / "stopped", shard_size=10, workers=1, progress=False)
    assert calls == [0, 1, 0, 1, 2]
    assert digests(tmp_path / "stopped") == expected
    write_shards(source, tmp_path / "stopped", shard_size=10, workers=1, progress=False)
    assert len(calls) == 5


@pytest.mark.slow
def test_killed_at_any_moment_and_completed(made: tuple[Path, Path], tmp_path: Path) -> None:
    target, command = tmp_path / "dst", [sys.executable, "scripts/make_shards.py", "images", str(made[0])]
    command += [str(target), "--shard-size", "10", "--workers", "1"]
    for wait in (6.0, 9.0):
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.communicate()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{COUNT} images in 3 shards" in done.stdout
    assert "2 left out" in done.stdout
    assert digests(target) == digests(made[1])


def test_refusals(made: tuple[Path, Path], tmp_path: Path) -> None:
    source = open_source(made[0])
    with pytest.raises(FileExistsError, match="its shard_size is 10, 7 was asked for"):
        write_shards(source, made[1], shard_size=7, workers=1, progress=False)
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.png").write_bytes(png(1))
    (other / "x.txt").write_text("x")
    with pytest.raises(FileExistsError, match="its source was another"):
        write_shards(open_source(other), made[1], shard_size=10, workers=1, progress=False)
    with pytest.raises(ValueError, match="expected at least one of each"):
        write_shards(source, tmp_path / "new", shard_size=0)
    with pytest.raises(ValueError, match="expected letters"):
        write_shards(source, tmp_path / "new", "../x")
    (other / "x.png").write_bytes(png(1)[:60])
    with pytest.raises(ValueError, match=r"no image of the source can be used; the first is x\.png: x: corrupt image"):
        write_shards(open_source(other), tmp_path / "none", workers=1, progress=False)
    assert [path.name for path in (tmp_path / "none").iterdir()] == [".lock"]
    (other / "x.txt").unlink()
    with pytest.raises(ValueError, match=r"no sample that can be used; 1 bad ones, such as x.png/x: no caption"):
        write_shards(open_source(other), tmp_path / "new", workers=1, progress=False)
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        write_shards(source, tmp_path / "file", workers=1, progress=False)


def test_two_splits_share_a_folder(tmp_path: Path) -> None:
    for name, numbers in (("one", range(3)), ("two", range(5, 7))):
        (tmp_path / name).mkdir()
        for i in numbers:
            (tmp_path / name / f"{i}.png").write_bytes(png(i))
            (tmp_path / name / f"{i}.txt").write_text(f"{i}")
        (tmp_path / name / "bad.png").write_bytes(b"bad" * 20)
        (tmp_path / name / "bad.txt").write_text("bad")
    write_shards(open_source(tmp_path / "one"), tmp_path / "dst", "train", workers=1, progress=False)
    write_shards(open_source(tmp_path / "two"), tmp_path / "dst", "val", workers=1, progress=False)
    assert [open_source(tmp_path / "dst", split).record(0).captions[0].text for split in ("train", "val")] == ["0", "5"]
    lines = [json.loads(line)["split"] for line in (tmp_path / "dst" / "bad_samples.jsonl").read_text().splitlines()]
    assert lines == ["train", "val"]


@pytest.mark.parametrize("member", ["image", "meta"])
def test_every_single_flipped_bit_is_noticed(made: tuple[Path, Path], tmp_path: Path, member: str) -> None:
    for path in made[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = open_source(tmp_path)
    rng = np.random.default_rng(5)
    caught = 0
    for _ in range(100):
        i = int(rng.integers(len(source)))
        shard = tmp_path / source.shard(i)
        offset, size = (int(source.index.column(f"{member}_{what}")[i]) for what in ("offset", "size"))
        place, bit = offset + int(rng.integers(size)), 1 << int(rng.integers(8))
        with open(shard, "r+b") as file:
            before = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([before[0] ^ bit]), place)
            try:
                source.image(i) if member == "image" else source.record(i)
            except BadSample as error:
                caught += error.kind == "checksum"
            os.pwrite(file.fileno(), before, place)
    assert caught == 100
    for i in range(len(source)):
        source.image(i)
        source.record(i)


def read_in_a_child(source: object, queue: object) -> None:
    queue.put([source.image(i).sum() for i in range(len(source))])  # type: ignore[attr-defined, arg-type]


def test_read_from_forked_and_spawned_processes(made: tuple[Path, Path]) -> None:
    source = open_source(made[1])
    sums = [source.image(i).sum() for i in range(len(source))]
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.SimpleQueue()
        child = context.Process(target=read_in_a_child, args=(source, queue))
        child.start()
        assert queue.get() == sums
        child.join()
    assert np.array_equal(pickle.loads(pickle.dumps(source)).image(3), source.image(3))  # noqa: S301


def test_missing_and_truncated_shards(made: tuple[Path, Path], tmp_path: Path) -> None:
    for path in made[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    os.truncate(tmp_path / "train-000001.tar", 3000)
    source = open_source(tmp_path)
    kinds = []
    for i in range(len(source)):
        try:
            source.image(i)
        except BadSample as error:
            kinds.append((error.shard, error.kind))
    assert kinds
    assert set(kinds) == {("train-000001.tar", "truncated")}
    (tmp_path / "train-000001.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 shards .* are missing, train-000001.tar first"):
        open_source(tmp_path)
    (tmp_path / "train.index.arrow").write_bytes(b"no index")
    with pytest.raises(ValueError, match="not an index of samples"):
        open_source(tmp_path)


def test_fingerprint_of_shards(made: tuple[Path, Path], tmp_path: Path) -> None:
    for path in made[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert open_source(tmp_path).fingerprint() == open_source(made[1]).fingerprint()
    write_shards(open_source(made[0]), tmp_path / "x", shard_size=11, workers=1, progress=False)
    assert open_source(tmp_path / "x").fingerprint() != open_source(made[1]).fingerprint()


def test_a_picture_is_as_large_as_needed(tmp_path: Path) -> None:
    Image.fromarray(noise(0, 400, 600)).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a")
    source = open_source(tmp_path)
    assert source.image(0, (100, 100)).shape == (100, 150, 3)
    assert source.image(0, (100, 160)).shape == (200, 300, 3)
