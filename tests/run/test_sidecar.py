"""Images with sidecars and labelled grids: what is written is what is read, and nothing is half written."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from sana.run.sidecar import (
    compose_grid,
    file_digest,
    pixel_digest,
    read_image,
    read_sidecar,
    save_grid,
    save_image,
)

FACTS = {
    "prompt": 'a "red" circle',
    "seed": 3,
    "steps": 20,
    "guidance": 4.5,
    "sampler": "flow_dpm",
    "checkpoint": "00ff",
    "commit": None,
}


def picture(seed: int = 0, h: int = 9, w: int = 13) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(h, w, 3), dtype=np.uint8)


def test_pixels_and_facts_survive(tmp_path):
    path = save_image(tmp_path / "deep" / "a.png", picture(), FACTS)
    record = read_sidecar(path)
    assert record is not None
    assert {k: record[k] for k in FACTS} == FACTS
    assert record["size"] == [13, 9]
    assert (read_image(path, record) == picture()).all()
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.json", "a.png"]


def test_a_picture_alone_says_how_it_was_made(tmp_path):
    path = save_image(tmp_path / "a.png", picture(), {**FACTS, "prompt": "ein Hündchen 🙂, 小狗"})
    with Image.open(path) as file:
        assert json.loads(file.text["parameters"]) == read_sidecar(path)
        assert (np.asarray(file) == picture()).all()


def test_same_image_same_bytes(tmp_path):
    paths = [save_image(tmp_path / f"{k}.png", picture(), FACTS) for k in "ab"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].with_suffix(".json").read_bytes() == paths[1].with_suffix(".json").read_bytes()
    assert pixel_digest(picture()) != pixel_digest(picture(1))
    assert pixel_digest(picture(0, 6, 4)) != pixel_digest(picture(0, 6, 4).reshape(4, 6, 3))


def test_changed_or_broken_images_are_noticed(tmp_path):
    path = save_image(tmp_path / "a.png", picture(), FACTS)
    Image.fromarray(picture(1)).save(path)
    with pytest.raises(ValueError, match="not those of its sidecar"):
        read_image(path, read_sidecar(path))
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match="cannot be read as an image"):
        read_image(path)
    path.with_suffix(".json").write_text("{")
    assert read_sidecar(path) is None
    assert read_sidecar(tmp_path / "none.png") is None


def test_a_kill_between_the_two_files_leaves_no_sidecar(tmp_path, monkeypatch):
    import sana.run.sidecar as module

    real, written = module.replace_bytes, []

    def die_second(path, data):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(path, data)

    monkeypatch.setattr(module, "replace_bytes", die_second)
    with pytest.raises(KeyboardInterrupt):
        save_image(tmp_path / "a.png", picture(), FACTS)
    assert read_sidecar(tmp_path / "a.png") is None


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks seed, commit"):
        save_image(tmp_path / "a.png", picture(), {k: v for k, v in FACTS.items() if k not in ("seed", "commit")})
    with pytest.raises(ValueError, match=r"written as \.png"):
        save_image(tmp_path / "a.jpg", picture(), FACTS)
    with pytest.raises(ValueError, match="expected uint8"):
        save_image(tmp_path / "a.png", picture() / 255, FACTS)
    assert list(tmp_path.iterdir()) == []


def test_digest_of_files_and_folders(tmp_path):
    one, folder = tmp_path / "x.ckpt", tmp_path / "sharded"
    one.write_bytes(b"weights")
    folder.mkdir()
    (folder / "0").write_bytes(b"weights")
    first = file_digest(folder)
    assert len(file_digest(one)) == 16
    assert file_digest(one) != first
    (folder / "0").rename(folder / "1")
    assert file_digest(folder) != first
    with pytest.raises(ValueError, match="no such file"):
        file_digest(tmp_path / "none")


@pytest.mark.parametrize(("h", "w", "scale"), [(16, 20, 6), (64, 64, 2), (200, 100, 1)])
def test_grid_holds_every_image_where_it_says(tmp_path, h, w, scale):
    rows = [[picture(10 * i + j, h, w) for j in range(3)] for i in range(2)]
    labels = ["a very long prompt that has to be wrapped over lines", "b"]
    path = save_grid(tmp_path / "samples" / "step_00000010.png", rows, labels, title="update 10")
    layout = json.loads(path.with_suffix(".json").read_text())
    assert layout["scale"] == scale
    assert [(c["row"], c["column"]) for c in layout["cells"]] == [(r, c) for r in labels for c in range(3)]
    grid = np.asarray(Image.open(path))
    for cell, image in zip(layout["cells"], [x for row in rows for x in row], strict=True):
        left, top, width, height = cell["box"]
        shown = grid[top : top + height, left : left + width]
        assert (shown == image.repeat(scale, 0).repeat(scale, 1)).all()
    boxes = [c["box"] for c in layout["cells"]]
    assert all(x >= 0 and y >= 0 and x + a <= grid.shape[1] and y + b <= grid.shape[0] for x, y, a, b in boxes)
    assert (grid[:, : boxes[0][0] - 6] < 128).any(), "row labels are drawn"


def test_grid_refuses_what_does_not_fit(tmp_path):
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="1 row and 0 column labels for 2 rows"):
        compose_grid(images, ["a"])
    with pytest.raises(ValueError, match="1 column labels"):
        compose_grid(images, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="expected uint8"):
        compose_grid(images / 2, ["a", "b"])
    with pytest.raises(ValueError, match="rows of one length"):
        save_grid(tmp_path / "g.png", [[picture()], [picture(), picture()]], ["a", "b"])
    with pytest.raises(ValueError, match="images of one size"):
        save_grid(tmp_path / "g.png", [[picture(), picture(0, 5, 5)]], ["a"])
