"""The columnar index: what is written is read, without copies, in no time."""

from __future__ import annotations

import math
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sana.data.caption import Caption
from sana.data.index import Entry, Index, join, serialise, table, write

ENTRIES = [
    Entry(
        "a",
        0,
        (Caption("prompt", "ein Fuß"), Caption("vlm", "a foot, 脚", 26.15)),
        640,
        480,
        {"clip": 28.0},
        True,
        {"image": (512, 100), "meta": (1024, 7)},
        {"image": 2**64 - 1, "meta": 5},
    ),
    Entry(
        "b",
        1,
        (Caption("prompt", "b"),),
        3,
        2,
        members={"image": (512, 9), "clip": (2048, 11)},
        checksums={"clip": 7},
        meta='{"x":1}',
    ),
    Entry("c", 1, (), scores={"aesthetic": 5.5}, path="sub/c.png"),
]
SHARDS = [{"name": "0.tar", "bytes": 10}, {"name": "1.tar", "bytes": 20}]


def check(index: Index) -> None:
    assert len(index) == 3
    assert [index.key(i) for i in range(3)] == ["a", "b", "c"]
    assert [index.captions(i) for i in range(3)] == [entry.captions for entry in ENTRIES]
    assert index.column("shard").tolist() == [0, 1, 1]
    assert index.column("checksum").tolist() == [2**64 - 1, 0, 0]
    assert index.column("meta_checksum").tolist() == [5, 0, 0]
    assert index.column("image_offset").tolist() == [512, 512, 0]
    assert index.column("clip_size").tolist() == [0, 11, 0]
    assert index.column("clip_checksum").tolist() == [0, 7, 0]
    assert index.column("hq").tolist() == [1, 0, 0]
    assert index.column("width").tolist() == [640, 3, 0]
    assert sorted(index.scores) == ["aesthetic", "clip"]
    assert sorted(index.members) == ["clip", "image", "meta"]
    clip = index.column("score.clip")
    assert clip.dtype == np.float32
    assert clip[0] == 28
    assert math.isnan(clip[1])
    assert [index.text("path", i) for i in range(3)] == ["", "", "sub/c.png"]
    assert [index.text("meta", i) for i in range(3)] == ["", '{"x":1}', ""]
    assert index.caption_counts().tolist() == [2, 1, 0]
    lengths = {name: found.tolist() for name, found in index.caption_lengths().items()}
    assert lengths == {"prompt": [8, 1], "vlm": [len("a foot, 脚".encode())]}
    assert index.shards == SHARDS
    assert index.facts == {"kind": "test"}


def test_file_and_memory(tmp_path: Path) -> None:
    write(tmp_path / "i.arrow", table(ENTRIES), SHARDS, {"kind": "test"})
    assert [p.name for p in tmp_path.iterdir()] == ["i.arrow"]
    index = Index(tmp_path / "i.arrow")
    check(index)
    check(pickle.loads(pickle.dumps(index)))  # noqa: S301
    memory = Index(serialise(table(ENTRIES), SHARDS, {"kind": "test"}))
    check(memory)
    check(pickle.loads(pickle.dumps(memory)))  # noqa: S301


def test_joined_pieces_are_the_whole() -> None:
    pieces = [table([entry]) for entry in ENTRIES]
    joined = serialise(join(pieces), SHARDS, {"kind": "test"})
    check(Index(joined))
    assert b"".join(Index(joined).digest_parts()) == b"".join(
        Index(serialise(table(ENTRIES), SHARDS, {"kind": "test"})).digest_parts()
    )


def test_nothing_at_all() -> None:
    index = Index(serialise(table([]), [], {}))
    assert len(index) == 0
    assert index.column("width").tolist() == []
    assert index.caption_counts().tolist() == []


def test_digest_follows_everything() -> None:
    def digest(*entries: Entry) -> bytes:
        return b"".join(Index(serialise(table(entries), SHARDS, {})).digest_parts())

    plain = Entry("k", 0, (Caption("prompt", "ab", 1.0),), 3, 4)
    others = [
        Entry("l", 0, (Caption("prompt", "ab", 1.0),), 3, 4),
        Entry("k", 1, (Caption("prompt", "ab", 1.0),), 3, 4),
        Entry("k", 0, (Caption("prompt", "ac", 1.0),), 3, 4),
        Entry("k", 0, (Caption("prompt", "ab", 2.0),), 3, 4),
        Entry("k", 0, (Caption("prompta", "b", 1.0),), 3, 4),
        Entry("k", 0, (Caption("prompt", "ab", 1.0),), 4, 3),
    ]
    assert len({digest(entry) for entry in [plain, *others]}) == 7


def test_what_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "i.arrow").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="not an index of samples"):
        Index(tmp_path / "i.arrow")
    with pa.ipc.new_file(str(tmp_path / "j.arrow"), pa.schema([("x", pa.int8())])) as writer:
        writer.write_table(pa.table({"x": pa.array([1], pa.int8())}))
    with pytest.raises(ValueError, match="not an index of samples"):
        Index(tmp_path / "j.arrow")
    index = Index(serialise(table(ENTRIES), SHARDS, {}))
    with pytest.raises(KeyError, match="no column of numbers 'widht'; it has shard"):
        index.column("widht")


def test_a_million_samples_open_at_once_and_are_not_read(tmp_path: Path) -> None:
    count = 1_000_000
    numbers = np.arange(count)
    keys = pa.array(np.char.zfill(numbers.astype("U8"), 8)).cast(pa.large_string())
    one = table([ENTRIES[1]])
    rows = one.take(pa.array(np.zeros(count, np.int64)))
    rows = rows.set_column(0, "key", keys).set_column(1, "shard", pa.array((numbers // 10_000).astype(np.int32)))
    shards = [{"name": f"{i:06d}.tar", "bytes": 1} for i in range(100)]
    path = tmp_path / "million.arrow"
    write(path, rows, shards, {})
    began = time.perf_counter()
    index = Index(path)
    widths = index.column("width")
    assert index.key(987_654) == "00987654"
    seconds = time.perf_counter() - began
    assert len(index) == count
    assert not widths.flags.owndata
    assert seconds < 0.2
    before = pa.total_allocated_bytes()
    other = Index(path)
    assert other.column("shard")[-1] == 99
    assert pa.total_allocated_bytes() - before < 100_000
    began = time.perf_counter()
    for i in range(0, count, 1000):
        index.captions(i)
    assert (time.perf_counter() - began) / 1000 < 1e-4
