"""Published formats and plain folders as they are."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, make_tar, noise, png
from PIL import Image

from sana.data.formats import cached
from sana.data.formats.open import open_source
from sana.data.record import BadSample
from sana.data.source import Source
from sana.data.write_shards import write_shards


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def texts(source: Source) -> list[list[tuple]]:
    return [[tuple(caption) for caption in source.record(i).captions] for i in range(len(source))]


def kinds(source: Source) -> list[tuple[str, str, str]]:
    return [(bad.shard, bad.key, bad.kind) for bad in source.bad]


# ---- WebDataset ----------------------------------------------------------------------------------------------------


def plain_tars(folder: Path) -> None:
    make_tar(
        folder / "00.tar", {"a.jpg": encoded(noise(0), "JPEG"), "a.txt": b"one\n", "b.png": png(1), "b.txt": b"two"}
    )
    about = {"caption": "three", "key": "x", "similarity": 0.3, "clip_score": 31.0}
    make_tar(
        folder / "01.tar",
        {"c/d.webp": encoded(noise(2), "WEBP", lossless=True), "c/d.json": json.dumps(about).encode()},
    )


def test_plain_webdataset(tmp_path: Path) -> None:
    plain_tars(tmp_path)
    source = open_source(tmp_path)
    assert [source.key(i) for i in range(3)] == ["00.tar/a", "00.tar/b", "01.tar/c/d"]
    assert texts(source) == [[("prompt", "one", None)], [("prompt", "two", None)], [("caption", "three", None)]]
    assert source.record(2).scores == {"clip_score": 31.0}
    assert np.isnan(source.index.column("score.clip_score")[:2]).all()
    assert np.array_equal(source.image(1), noise(1))
    assert np.array_equal(source.image(2), noise(2))
    assert source.index.column("height").tolist() == [6, 6, 6]
    assert source.record(2).meta["similarity"] == 0.3
    with pytest.raises(FileNotFoundError, match="no split 'val'"):
        open_source(tmp_path, "val")
    one = open_source(tmp_path / "01.tar")
    assert texts(one) == texts(source)[2:]
    both = open_source(f"{tmp_path}/{{00..01}}.tar")
    assert texts(both) == texts(source)


def test_splits_of_tars(tmp_path: Path) -> None:
    for name in ("train-0", "val-0", "val-1"):
        make_tar(tmp_path / f"{name}.tar", {"a.png": png(0), "a.txt": name.encode()})
    assert texts(open_source(tmp_path)) == [[("prompt", "train-0", None)]]
    assert len(open_source(tmp_path, "val")) == 2
    (tmp_path / "more").mkdir()
    make_tar(tmp_path / "more" / "x.tar", {"a.png": png(0), "a.txt": b"inner"})
    assert texts(open_source(tmp_path, "more")) == [[("prompt", "inner", None)]]


def test_index_is_made_once_and_anew_when_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_tars(tmp_path)
    scans = []
    from sana.data.formats import tars

    scan = tars.scan_tar
    monkeypatch.setattr(tars, "scan_tar", lambda *a, **k: scans.append(a[1]) or scan(*a, **k))
    first = open_source(tmp_path).fingerprint()
    assert scans == ["00.tar", "01.tar"]
    assert open_source(tmp_path).fingerprint() == first
    assert len(scans) == 2
    make_tar(tmp_path / "01.tar", {"n.png": png(9), "n.txt": b"new"})
    assert open_source(tmp_path).fingerprint() != first
    assert len(scans) == 4
    open_source(tmp_path, max_pixels=10**5)
    assert len(scans) == 6
    (tmp_path / ".index-tars-train.arrow").write_bytes(b"damaged")
    assert len(open_source(tmp_path)) == 3
    assert len(scans) == 8


def test_a_read_only_place_has_its_index_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_tars(tmp_path)
    replace = cached._replace

    def refuse(place: Path, data: object) -> None:
        if place.parent == tmp_path:  # as root, permissions would not hold
            raise PermissionError(place)
        replace(place, data)  # type: ignore[arg-type]

    monkeypatch.setattr(cached, "_replace", refuse)
    assert len(open_source(tmp_path)) == 3
    assert not (tmp_path / ".index-tars-train.arrow").exists()
    assert [path.suffix for path in cached.cache_folder().iterdir()] == [".arrow"]
    assert len(open_source(tmp_path)) == 3
    monkeypatch.setattr(cached, "_replace", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    make_tar(tmp_path / "02.tar", {"n.png": png(9), "n.txt": b"new"})
    assert len(open_source(tmp_path)) == 4


def test_bad_samples_of_tars_are_kept_with_the_index(tmp_path: Path) -> None:
    plain_tars(tmp_path)
    make_tar(tmp_path / "02.tar", {"x.png": png(0), "y.png": b"nonsense" * 9, "y.txt": b"y"})
    data = (tmp_path / "00.tar").read_bytes()
    (tmp_path / "03.tar").write_bytes(data[: data.index(b"a.txt") + 100])  # within the second header
    (tmp_path / "04.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    for _ in range(2):
        source = open_source(tmp_path)
        assert len(source) == 3
        assert kinds(source) == [
            ("02.tar", "x", "no caption"),
            ("02.tar", "y", "not an image"),
            ("03.tar", "a", "no caption"),
            ("03.tar", "", "truncated"),
            ("04.tar", "", "corrupt tar"),
        ]
    for name in ("00", "01", "02", "03"):
        (tmp_path / f"{name}.tar").unlink()
    with pytest.raises(ValueError, match=r"no sample of 1 files can be used; the first: 04.tar/: corrupt tar"):
        open_source(tmp_path)


# ---- published shards ----------------------------------------------------------------------------------------------


def published_shards(folder: Path) -> None:
    """As SANA's released reader expects them; one shard without further files."""

    def about(i: int, **more: object) -> bytes:
        return json.dumps({"prompt": f"prompt {i}", "height": 6, "width": 9, "file_name": f"{i}", **more}).encode()

    make_tar(
        folder / "00000.tar",
        {"k.0.png": png(0), "k.0.json": about(0, version="high_quality"), "k1.png": png(1), "k1.json": about(1)},
    )
    make_tar(
        folder / "00001.tar",
        {"k2.jpg": encoded(noise(2), "JPEG"), "k2.json": about(2), "k3.npy": b"latent", "k3.json": about(3)},
    )
    write = lambda name, value: (folder / name).write_text(json.dumps(value))  # noqa: E731
    write(
        "wids-meta.json",
        {
            "name": "x",
            "wids_version": 1,
            "nfiles": 2,
            "shardlist": [{"url": f"0000{i}.tar", "nsamples": 2} for i in (0, 1)],
        },
    )
    write("00000.json", {"k1": {"VILA1-5-3B": "vila 1"}})
    write("00000_InternVL2-26B.v1.json", {"k.0": {"prompt": "intern 0"}, "k1": {"prompt": "intern 1"}})
    write(
        "00000_InternVL2-26B_clip_score.json", {"k.0": {"_InternVL2-26B_v1": 33.5}, "k1": {"_InternVL2-26B_v1": "bad"}}
    )
    write("00000_prompt_clip_score.json", {"k.0": {"prompt": 27.25}})


EXPECTED = [
    [("prompt", "prompt 0", 27.25), ("_InternVL2-26B_v1", "intern 0", 33.5)],
    [("prompt", "prompt 1", None), ("VILA1-5-3B", "vila 1", None), ("_InternVL2-26B_v1", "intern 1", None)],
    [("prompt", "prompt 2", None)],
    [("prompt", "prompt 3", None)],
]


def check_published(source: Source) -> None:
    assert [sorted(captions) for captions in texts(source)] == [sorted(captions) for captions in EXPECTED]
    assert [source.index.key(i) for i in range(4)] == ["k.0", "k1", "k2", "k3"]
    assert source.index.column("hq").tolist() == [1, 0, 0, 0]
    assert source.index.column("score.prompt_clip_score").tolist() == [27.25, 100, 100, 100]
    assert source.read(3, "latent") == b"latent"
    assert (source.record(3).width, source.record(3).height) == (9, 6)
    assert np.array_equal(source.image(1), noise(1))
    with pytest.raises(BadSample, match=r"00001.tar/k3: no image"):
        source.image(3)
    with pytest.raises(BadSample, match="it has no latent"):
        source.read(0, "latent")


def test_published_shards(tmp_path: Path) -> None:
    published_shards(tmp_path)
    check_published(open_source(tmp_path))
    check_published(open_source(tmp_path / "wids-meta.json"))
    assert open_source(tmp_path).bad == []


def test_published_shards_become_ours(tmp_path: Path) -> None:
    published_shards(tmp_path)
    written = write_shards(open_source(tmp_path), tmp_path / "dst", workers=1, progress=False)
    assert [(bad.key, bad.kind) for bad in written.bad] == [("k3", "no image")]
    own = open_source(tmp_path / "dst")
    assert [sorted(captions) for captions in texts(own)] == [sorted(captions) for captions in EXPECTED[:3]]
    assert own.index.column("score.prompt_clip_score").tolist() == [27.25, 100, 100]
    assert own.record(0).hq


@pytest.mark.parametrize(
    "url",
    ["pipe:touch pwned", "../x.tar", "https://127.0.0.1:9/x.tar", "file:///etc/passwd", "gone.tar", "ssh://h/x.tar"],
)
def test_unsafe_or_missing_shards_of_a_list(tmp_path: Path, url: str) -> None:
    (tmp_path / "data").mkdir()
    published_shards(tmp_path / "data")
    make_tar(tmp_path / "x.tar", {"a.png": png(0), "a.json": b'{"prompt": "a"}'})
    listed = {"shardlist": [{"url": url, "nsamples": 1}, {"url": "00001.tar", "nsamples": 2}]}
    (tmp_path / "data" / "wids-meta.json").write_text(json.dumps(listed))
    source = open_source(tmp_path / "data")
    assert len(source) == 2
    assert kinds(source)[0][2] in ("unsafe url", "unsafe name", "missing file")
    assert not Path("pwned").exists()


def test_a_wrong_list_says_what_it_should_be(tmp_path: Path) -> None:
    (tmp_path / "wids-meta.json").write_text('{"shardlist": ["a.tar"]}')
    with pytest.raises(ValueError, match=r'expected \{"shardlist"'):
        open_source(tmp_path)


# ---- published folder ----------------------------------------------------------------------------------------------


def test_published_folder(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"n{i}.{'jpg' if i == 1 else 'png'}").write_bytes(png(i))  # content tells, not the name
        (tmp_path / f"n{i}.txt").write_text(f"line {i}\nnot this")
    (tmp_path / "n0_VILA.json").write_text(json.dumps({"n0": {"VILA": "vila"}}))
    (tmp_path / "n0_clip_score.json").write_text(json.dumps({"n0": {"VILA": 25.5, "prompt": 20}}))
    (tmp_path / "n2.txt").unlink()
    names = ["n0", "n1.jpg", "n2", "n3", "n3", "../out", "n9"]
    (tmp_path / "meta_data.json").write_text(json.dumps({"img_names": names}))
    source = open_source(tmp_path)
    assert [sorted(captions) for captions in texts(source)] == [
        [("VILA", "vila", 25.5), ("prompt", "line 0", 20)],
        [("prompt", "line 1", None)],
        [("prompt", "line 3", None)],
    ]
    assert np.array_equal(source.image(1), noise(1))
    assert [source.key(i) for i in range(3)] == ["n0.png", "n1.jpg", "n3.png"]
    assert [(key, kind) for _, key, kind in kinds(source)] == [
        ("n2", "no caption"),
        ("n3", "duplicate key"),
        ("../out", "unsafe name"),
        ("n9", "no caption"),
    ]
    (tmp_path / "meta_data.json").write_text("{}")
    with pytest.raises(ValueError, match=r'expected \{"img_names"'):
        open_source(tmp_path)


# ---- any folder ----------------------------------------------------------------------------------------------------


def test_any_folder(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.PNG").write_bytes(png(0))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwith a mark\nand two lines\n")
    (tmp_path / "deep" / "b.c.jpg").write_bytes(png(1))
    (tmp_path / "deep" / "b.c.json").write_text('{"captions": ["one", "two"], "aesthetic_score": 6}')
    (tmp_path / "deep" / "er" / "c.webp").write_bytes(encoded(noise(2), "WEBP", lossless=True))
    (tmp_path / "deep" / "er" / "c.caption").write_text("c")
    (tmp_path / "deep" / "er" / "c.png").write_bytes(png(3))
    (tmp_path / "lonely.png").write_bytes(png(4))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "empty.txt").write_text("empty")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / ".hidden.png").write_bytes(png(5))
    os.symlink(tmp_path, tmp_path / "loop")
    os.symlink(tmp_path / "a.PNG", tmp_path / "linked.png")
    (tmp_path / "linked.txt").write_text("linked")
    for _ in range(2):  # made, and from the kept index
        source = open_source(tmp_path)
        assert [source.key(i) for i in range(len(source))] == ["a.PNG", "deep/b.c.jpg", "deep/er/c.png", "linked.png"]
        assert texts(source) == [
            [("prompt", "with a mark\nand two lines", None)],
            [("caption", "one", None), ("caption", "two", None)],
            [("prompt", "c", None)],
            [("prompt", "linked", None)],
        ]
        assert source.record(1).scores == {"aesthetic_score": 6.0}
        assert [(bad.key, bad.kind) for bad in source.bad] == [
            ("deep/er/c", "duplicate key"),
            ("empty", "not an image"),
            ("lonely", "no caption"),
        ]
    before = source.fingerprint()
    (tmp_path / "a.txt").write_text("another")
    assert texts(open_source(tmp_path))[0] == [("prompt", "another", None)]
    assert open_source(tmp_path).fingerprint() != before
    (tmp_path / "a.PNG").unlink()
    elsewhere = pickle.loads(pickle.dumps(source))  # as a worker has it, with no file open  # noqa: S301
    with pytest.raises(BadSample, match=r"a.PNG/a: missing file"):
        elsewhere.image(0)


def test_folders_with_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist; expected a folder"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither shards nor images"):
        open_source(tmp_path)
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"not read; expected .tar, .jsonl"):
        open_source(tmp_path / "x.bin")
    for url in ("pipe:cat x", "pipe://x", "ssh://x/y"):
        with pytest.raises(ValueError, match="unsafe url"):
            open_source(url)


def test_rotated_images_are_as_seen(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "a.jpg").write_bytes(encoded(noise(0, 16, 40), "JPEG", exif=exif))
    (tmp_path / "a.txt").write_text("a")
    source = open_source(tmp_path)
    assert source.image(0).shape == (40, 16, 3)
    assert (source.record(0).width, source.record(0).height) == (16, 40)
