"""Tables of images, images in memory and on a server, as they are."""

from __future__ import annotations

import csv
import json
import os
import stat
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from pictures import make_tar, noise, png
from test_formats import check_published, kinds, own_cache, plain_tars, published_shards, texts  # noqa: F401
from test_storage import server  # noqa: F401

from sana.data.caption import Caption
from sana.data.formats.open import open_source
from sana.data.write_shards import write_shards

# ---- tables --------------------------------------------------------------------------------------------------------

ROWS = [
    {"file_name": "sub/0.png", "text": "zero", "aesthetic_score": 5.5},
    {"file_name": "1.png", "text": "one, with a comma", "aesthetic_score": 6.25},
    {"file_name": "sub/0.png", "text": "zero again", "aesthetic_score": 5.5},
    {"file_name": "gone.png", "text": "gone", "aesthetic_score": 1.0},
    {"file_name": "2.png", "text": "", "aesthetic_score": 1.0},
    {"file_name": "", "text": "nowhere", "aesthetic_score": 1.0},
    {"file_name": "pipe:touch pwned", "text": "pipe", "aesthetic_score": 1.0},
    {"file_name": "3.png", "text": "1984", "aesthetic_score": 2.0},
]


def write_table(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            table = csv.DictWriter(file, list(ROWS[0]))
            table.writeheader()
            table.writerows(ROWS)
    else:
        parquet.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.csv", "t.parquet"])
@pytest.mark.parametrize("whole_folder", [True, False])
def test_tables(tmp_path: Path, name: str, whole_folder: bool) -> None:
    (tmp_path / "sub").mkdir()
    for i, path in enumerate(("sub/0.png", "1.png", "2.png", "3.png")):
        (tmp_path / path).write_bytes(png(i))
    write_table(tmp_path / name)
    source = open_source(tmp_path if whole_folder else tmp_path / name)
    assert texts(source) == [
        [("text", "zero", None), ("text", "zero again", None)],
        [("text", "one, with a comma", None)],
        [("text", "1984", None)],
    ]
    assert [source.index.key(i) for i in range(3)] == ["sub/0", "1", "3"]
    assert source.index.column("score.aesthetic_score").tolist() == [5.5, 6.25, 2.0]
    assert np.array_equal(source.image(0), noise(0))
    assert [(bad.key, bad.kind) for bad in source.bad] == [
        ("gone.png", "missing file"),
        ("2.png", "no caption"),
        ("row 6", "no image"),
        ("pipe:touch pwned", "unsafe url"),
    ]


def test_damaged_and_foreign_tables(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "t.jsonl").write_bytes(b'{"path": "0.png", "brief": "a"}\n{broken\n\xff\xfe\n[1]\n')
    source = open_source(tmp_path, caption_fields=("brief",))
    assert texts(source) == [[("brief", "a", None)]]
    assert [(bad.key, bad.kind) for bad in source.bad] == [
        ("row 2", "bad json"),
        ("row 3", "not UTF-8"),
        ("row 4", "bad json"),
    ]
    (tmp_path / "u.parquet").write_bytes(b"no parquet")
    with pytest.raises(ValueError, match="has 2 tables"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="no readable parquet"):
        open_source(tmp_path / "u.parquet")


def test_names_that_are_no_text(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path)
    for name in (b"caf\xe9", b"line\nbreak", b"fine"):
        with open(raw + b"/" + name + b".png", "wb") as file:
            file.write(png(0))
        with open(raw + b"/" + name + b".json", "wb") as file:
            file.write(b'{"prompt": "p", "note": "\\ud800", "a\\ud800score": 1}')
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(len(source))] == ["fine.png"]
    assert [bad.kind for bad in source.bad] == ["unsafe name", "unsafe name"]
    assert source.record(0).scores == {}
    write_shards(source, tmp_path / "dst", workers=1, progress=False)
    assert open_source(tmp_path / "dst").record(0).meta["note"] == "\ud800"
    rows = [{"path": "fine.png", "prompt": "p", "captions": {"a\ud800": "x"}}, {"path": "\ud800.png", "prompt": "p"}]
    rows += [{"path": "a\0b.png", "prompt": "p"}, {"path": "x" * 999, "prompt": "p"}, {"path": "dst", "prompt": "p"}]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"no sample that can be used"):
        write_shards(open_source(tmp_path / "t.jsonl"), tmp_path / "no", workers=1, progress=False)
    found = [bad.kind for bad in open_source(tmp_path / "t.jsonl").bad]
    assert found == ["not UTF-8", "unsafe name", "unsafe name", "unreadable", "unreadable"]


def test_a_csv_with_an_endless_field(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('path,prompt\n0.png,"' + "x" * 200_000)
    with pytest.raises(ValueError, match=r"t\.csv: no readable csv"):
        open_source(tmp_path)


# ---- remote --------------------------------------------------------------------------------------------------------


def test_from_memory() -> None:
    files = fsspec.filesystem("memory")
    for name, i in (("train-0.tar", 0), ("val-0.tar", 1)):
        local = Path(os.environ["XDG_CACHE_HOME"]) / name
        make_tar(local, {"a.png": png(i), "a.txt": name.encode()})
        files.pipe_file(f"/set/{name}", local.read_bytes())
    source = open_source("memory://set")
    assert texts(source) == [[("prompt", "train-0.tar", None)]]
    assert np.array_equal(source.image(0), noise(0))
    assert texts(open_source("memory://set", "val")) == [[("prompt", "val-0.tar", None)]]
    assert len(open_source("memory://set/train-0.tar")) == 1
    with pytest.raises(FileNotFoundError, match="behind a URL"):
        open_source("memory://set", "test")


def test_loose_images_from_memory() -> None:
    """Stands for s3 and gs: listings with sizes, byte ranges. No server of theirs can run here."""
    files = fsspec.filesystem("memory")
    for name, body in (
        ("a/1.png", png(1)),
        ("a/1.txt", b"one"),
        ("b/c/2.png", png(2)),
        ("b/c/2.json", b'{"prompt": "two"}'),
        ("b/.hidden/3.png", png(3)),
        ("b/4.png", b"broken"),
        ("b/4.txt", b"four"),
    ):
        files.pipe_file(f"/loose/{name}", body)
    source = open_source("memory://loose")
    assert texts(source) == [[("prompt", "one", None)], [("prompt", "two", None)]]
    assert np.array_equal(source.image(1), noise(2))
    assert [(bad.key, bad.kind) for bad in source.bad] == [("b/4", "corrupt image")]
    files.pipe_file("/table/t.csv", b"path,prompt\nx/5.png,five\n")
    files.pipe_file("/table/x/5.png", png(5))
    assert np.array_equal(open_source("memory://table").image(0), noise(5))


def test_from_a_server(server: str, tmp_path: Path) -> None:  # noqa: F811
    web = tmp_path / "web"
    for folder in ("own", "wids", "plain"):
        (web / folder).mkdir()
    published_shards(web / "wids")
    check_published(open_source(f"{server}/wids"))
    plain_tars(web / "plain")
    plain = open_source(f"{server}/plain/{{00..01}}.tar")
    assert len(plain) == 3
    assert np.array_equal(plain.image(1), noise(1))
    write_shards(open_source(web / "plain"), web / "own", workers=1, progress=False)
    own = open_source(f"{server}/own", cache=tmp_path / "cache")
    assert np.array_equal(own.image(1), noise(1))
    assert own.fingerprint() == open_source(web / "own").fingerprint()
    (web / "loose" / "in").mkdir(parents=True)
    (web / "loose" / "in" / "a.png").write_bytes(png(7))
    (web / "loose" / "in" / "a.txt").write_text("seven")
    assert np.array_equal(open_source(f"{server}/loose").image(0), noise(7))
    assert any(path.name.endswith("train-000000.tar") for path in (tmp_path / "cache").iterdir())


def test_modes_of_files_do_not_matter(tmp_path: Path) -> None:
    plain_tars(tmp_path)
    (tmp_path / "00.tar").chmod(stat.S_IRUSR)
    assert Caption("prompt", "one") in open_source(tmp_path).record(0).captions
