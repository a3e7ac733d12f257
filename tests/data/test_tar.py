"""Tars of every kind and in every state: what is sound is listed as the standard library does, the rest is named."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pictures import make_tar, png

from sana.data.record import REASONS, Limits
from sana.data.scan import scan_tar
from sana.data.storage import LocalFolder
from sana.data.tar import Window, member_name, members, samples, split_name


def listed(path: Path, step: int = 512) -> list[tuple[str, int, int, str]]:
    window = Window(LocalFolder(path.parent), path.name, step)
    return [(m.name, m.offset, m.size, m.fault) for m in members(window.read, path.stat().st_size)]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("step", [512, 8192])
def test_lists_as_the_standard_library_does(tmp_path: Path, format: int, step: int) -> None:
    rng = np.random.default_rng(format)
    names = ["a.png", "folder/b.json", "d" * 90 + "/" + "e" * 90 + ".txt", "x" * 40 + "/" + "y" * 99]
    if format != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + "/ä" + "q" * 200 + ".png", "füß.json"]
    make_tar(tmp_path / "t.tar", [(name, rng.bytes(int(rng.integers(0, 2000)))) for name in names], format)
    with tarfile.open(tmp_path / "t.tar") as tar:
        expected = [(info.name, info.offset_data, info.size, "") for info in tar]
    assert listed(tmp_path / "t.tar", step) == expected


def test_large_members_in_both_spellings(tmp_path: Path) -> None:
    """8 GiB do not fit eleven octal digits; the file is sparse, its bytes are never read."""
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path, size = tmp_path / f"{format}.tar", 9 * 2**30 + 5
        info = tarfile.TarInfo("big.mp4")
        info.size = size
        header = info.tobuf(format)
        path.write_bytes(header)
        os.truncate(path, len(header) + size + 507 + 1024)
        assert listed(path) == [("big.mp4", len(header), size, "")]


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    make_tar(tmp_path / "t.tar", {"a.png": bytes(700), "b.png": bytes(100)})
    data = (tmp_path / "t.tar").read_bytes()
    for length in [*range(1, 2560, 37), 512, 1024, 1536, 2048, 2560]:
        (tmp_path / "cut.tar").write_bytes(data[:length])
        found = listed(tmp_path / "cut.tar")
        assert found[-1][3].startswith("truncated"), length
        whole = [name for name, _, _, fault in found if not fault]
        assert whole == ["a.png", "b.png"][: (length >= 512 + 700) + (length >= 1536 + 512 + 100)]
    assert [fault for *_, fault in listed(tmp_path / "t.tar")] == ["", ""]


def test_a_damaged_header_costs_its_member_only(tmp_path: Path) -> None:
    bodies = {f"{i}.png": png(i) for i in range(5)}
    make_tar(tmp_path / "t.tar", bodies)
    data = bytearray((tmp_path / "t.tar").read_bytes())
    with tarfile.open(tmp_path / "t.tar") as tar:
        place = tar.getmember("2.png").offset
    data[place + 124] ^= 0xFF
    (tmp_path / "t.tar").write_bytes(data)
    found = listed(tmp_path / "t.tar")
    assert [name for name, _, _, fault in found if not fault] == ["0.png", "1.png", "3.png", "4.png"]
    assert [fault.split(" at")[0] for *_, fault in found if fault] == ["corrupt tar: no header"]


def test_what_is_no_tar(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    assert "compressed" in listed(tmp_path / "a.tar")[0][3]
    (tmp_path / "b.tar").write_bytes(b"<html>" * 1000)
    assert listed(tmp_path / "b.tar")[0][3].startswith("corrupt tar")
    make_tar(tmp_path / "c.tar", {"a.png": b"1"})
    make_tar(tmp_path / "d.tar", {"b.png": bytes(30_000)})
    (tmp_path / "e.tar").write_bytes((tmp_path / "c.tar").read_bytes() + (tmp_path / "d.tar").read_bytes())
    assert listed(tmp_path / "e.tar")[-1][3].startswith("corrupt tar: ")
    (tmp_path / "empty.tar").write_bytes(b"")
    assert listed(tmp_path / "empty.tar")[0][3].startswith("truncated")


def test_nothing_dangerous_is_followed(tmp_path: Path) -> None:
    """A tar with every trick: each is named, none has an effect, the sound sample is read."""
    with tarfile.open(tmp_path / "t.tar", "w") as tar:

        def add(name: str, body: bytes = b"x", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, link
            info.size = len(body) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(body))

        add("good.png", png(0))
        add("good.json", b'{"prompt": "good"}')
        add("../up.png", png(1))
        add("../up.txt", b"up")
        add("/etc/abs.png", png(1))
        add("a/../../b.png", png(1))
        add("C:\\x.png", png(1))
        add("link.png", kind=tarfile.SYMTYPE, link="/etc/passwd")
        add("link.txt", b"a link")
        add("hard.png", kind=tarfile.LNKTYPE, link="good.png")
        add("dev.png", kind=tarfile.CHRTYPE)
        add("fifo.png", kind=tarfile.FIFOTYPE)
        add("folder", kind=tarfile.DIRTYPE)
        add("code.png", png(2))
        add("code.txt", b"code")
        add("code.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")
        add("twice.png", png(3))
        add("twice.txt", b"first")
        add("twice.png", png(4))
        add("other.png", png(5))
        add("twice.txt", b"second")
        add("bytes.png", png(6))
        add("bytes.txt", b"caf\xe9")
        add("void.png", png(6))
        add("void.txt", b" \n")
        add("json.png", png(6))
        add("json.json", b'{"prompt": ')
        add("list.png", png(6))
        add("list.json", b"[1]")
        add("deep.png", png(6))
        add("deep.json", b"[" * 100_000)
        add("surrogate.png", png(6))
        add("surrogate.json", b'{"prompt": "\\ud800"}')
        add("text.txt", b"no image here")
        add("null.png", b"")
        add("null.txt", b"empty image")
        add(".hidden.png", png(7))
        add("README", b"no suffix")
        for i in range(70):
            add(f"many.{i}", b"x")
    limits = Limits(max_bytes=150_000)
    entries, bad = scan_tar(LocalFolder(tmp_path), "t.tar", 0, limits)
    assert [entry.key for entry in entries] == ["good", "twice"]
    assert entries[1].captions[0].text == "first"
    reasons = {(b.key, b.kind) for b in bad}
    assert {b.kind for b in bad} <= set(REASONS)
    assert reasons == {
        ("../up", "unsafe name"),
        ("/etc/abs", "unsafe name"),
        ("a/../../b", "unsafe name"),
        ("C:\\x", "unsafe name"),
        ("link", "link"),
        ("hard", "link"),
        ("dev", "link"),
        ("fifo", "link"),
        ("code", "pickle"),
        ("twice", "duplicate key"),
        ("other", "no caption"),
        ("bytes", "not UTF-8"),
        ("void", "empty caption"),
        ("json", "bad json"),
        ("list", "bad json"),
        ("deep", "bad json"),
        ("surrogate", "not UTF-8"),
        ("text", "no image"),
        ("null", "not an image"),
        ("many", "too many members"),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.tar"]
    _, small = scan_tar(LocalFolder(tmp_path), "t.tar", 0, Limits(max_bytes=100, max_pixels=53))
    assert ("good", "too many bytes") in {(b.key, b.kind) for b in small}
    _, small = scan_tar(LocalFolder(tmp_path), "t.tar", 0, Limits(max_pixels=53))
    assert ("good", "too many pixels") in {(b.key, b.kind) for b in small}


@pytest.mark.parametrize("seed", range(4))
def test_random_damage_raises_nothing(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    bodies = {
        f"{i}.{kind}": png(i) if kind == "png" else b'{"prompt": "p"}' for i in range(4) for kind in ("png", "json")
    }
    make_tar(tmp_path / "t.tar", bodies)
    data = (tmp_path / "t.tar").read_bytes()
    for _ in range(60):
        broken = bytearray(data[: int(rng.integers(1, len(data) + 1))])
        for place in rng.integers(0, len(broken), 10):
            broken[place] = rng.integers(0, 256)
        (tmp_path / "b.tar").write_bytes(broken)
        entries, bad = scan_tar(LocalFolder(tmp_path), "b.tar", 0, Limits())
        assert len(entries) <= 4 or bad
        assert {b.kind for b in bad} <= set(REASONS)


def test_names() -> None:
    assert split_name("./a/b.c.jpg") == ("a/b", "c.jpg")
    assert split_name("a/b.c.JPG", last_dot=True) == ("a/b.c", "jpg")
    assert split_name("a.b/c") == ("a.b/c", "")
    assert split_name("a/.c.jpg") == ("", "")
    names = ["jpg", "json", "npy", "mp4", "poses.npy", "intrinsics.npy", "seg.png", "txt", "meta.npy", "A-b.npy"]
    assert [member_name(name) for name in names] == [
        "image",
        "meta",
        "latent",
        "clip",
        "poses",
        "intrinsics",
        None,
        None,
        None,
        None,
    ]


def test_grouping_keeps_the_order_of_keys(tmp_path: Path) -> None:
    make_tar(tmp_path / "t.tar", [(n, b"1") for n in ("b.png", "a.png", "b.txt", "a.txt")])
    window = Window(LocalFolder(tmp_path), "t.tar", 512)
    found = samples(members(window.read, (tmp_path / "t.tar").stat().st_size))
    assert [(s.key, sorted(s.members)) for s in found] == [("b", ["png", "txt"]), ("a", ["png", "txt"])]
