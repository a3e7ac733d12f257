"""Moving scenes: the motion and the cameras that the shards tell are those of the decoded frames."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from sana.data.caption import PowerScore
from sana.data.clips import ClipReader, collate_clips, motion_score, with_motion
from sana.data.formats.open import open_source
from sana.data.moving import example
from sana.data.moving_shards import MovingSet, write_moving_shards
from sana.data.record import BadSample
from sana.data.room import furnished, look
from sana.data.source import Source
from sana.data.video import read_clip
from sana.data.world import read_camera
from sana.scenes import COLORS
from sana.types import Clip, World

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("shapes")
    write_moving_shards(folder, MovingSet(6, 3, "shapes"), progress=False)
    return open_source(folder)


@pytest.fixture(scope="module")
def rooms(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("rooms")
    write_moving_shards(folder, MovingSet(6, 5, "room", frames=9, size=96), progress=False)
    return open_source(folder)


def amount(frames: np.ndarray, color: str) -> np.ndarray:
    """How much of each pixel has a colour: its place on the line from the background to it, (f, h, w)."""
    frames = frames.astype(float)
    background = frames[:, :2].mean(axis=(0, 1, 2))
    line = np.array(COLORS[color], float) - background
    along = ((frames - background) @ line) / (line @ line)
    off = np.linalg.norm(frames - background - along[..., None] * line, axis=-1)
    return np.where((along > 0.2) & (off < 60), np.clip(along, 0, 1), 0)


def test_exact_motion_is_found_again(shapes: Source) -> None:
    """Centres of mass of lone shapes in the decoded mp4, against the tracks; the steps between frames too."""
    checked = 0
    for i in range(len(shapes)):
        facts = json.loads(shapes.read(i, "meta"))
        video = read_clip(shapes.read(i, "clip"), facts["frames"])
        for thing in facts["objects"]:
            weight = amount(video.frames, thing["color"])
            if thing["shape"] in ("triangle", "star") or len(facts["objects"]) > 1:
                continue  # the centre of the box is not the centre of mass; others may tint the background
            rows, columns = np.mgrid[:64, :64] + 0.5
            total = weight.sum(axis=(1, 2))
            found = (
                np.stack([(weight * columns).sum(axis=(1, 2)), (weight * rows).sum(axis=(1, 2))], axis=1)
                / total[:, None]
            )
            track = np.array(thing["track"])
            assert np.abs(found - track).max() < 0.3
            assert np.abs(np.diff(found, axis=0) - np.diff(track, axis=0)).max() < 0.25
            checked += 1
    assert checked >= 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_tracks_stay_inside_and_apart(seed: int) -> None:
    for index in range(8):
        made = example(seed, index)
        tracks = [np.array(thing["track"]) for thing in made.facts["objects"]]
        for track, thing in zip(tracks, made.facts["objects"], strict=True):
            assert track.min() > thing["size"] / 2
            assert track.max() < 64 - thing["size"] / 2
        for a in range(len(tracks)):
            for b in range(a):
                assert np.abs(tracks[a] - tracks[b]).max(axis=1).min() > 11
        assert made.facts["motion"] >= 0
        np.testing.assert_array_equal(made.frames, example(seed, index).frames)


def test_half_the_rate_takes_the_tracks_along(shapes: Source) -> None:
    reader = ClipReader(shapes, frames=5, fps=8.0, seed=1)
    starts = set()
    for position in range(12):
        sample = reader.read(position % len(shapes), position)
        assert np.diff(sample.video.index).tolist() == [2] * 4
        np.testing.assert_allclose(sample.video.times, sample.video.index / 16, atol=1e-4)
        starts.add(int(sample.video.index[0]))
        again = reader.read(position % len(shapes), position)
        np.testing.assert_array_equal(sample.video.frames, again.video.frames)
    assert len(starts) > 2


def test_lamps_stand_where_the_cameras_say(rooms: Source) -> None:
    """A lamp's pixels in the decoded frames against the projection of its centre, by hand in float64."""
    checked = 0
    for i in range(len(rooms)):
        facts = json.loads(rooms.read(i, "meta"))
        video = read_clip(rooms.read(i, "clip"), facts["frames"])
        camera = read_camera(rooms.read(i, "camera"), facts["frames"])
        for lamp in facts["objects"]:
            for k in range(facts["frames"]):
                near = np.linalg.norm(video.frames[k].astype(float) - COLORS[lamp["color"]], axis=-1) < 70
                pose, intrinsics = camera.pose[k], camera.intrinsics[k]
                local = np.linalg.inv(pose) @ np.array([*lamp["centre"], 1.0])
                if local[2] < 1.0:
                    continue
                u, v, _ = intrinsics @ (local[:3] / local[2])
                radius = lamp["radius"] * intrinsics[0, 0] / local[2]
                if not (radius + 4 < u < 92 - radius and radius + 4 < v < 92 - radius and radius > 3):
                    continue
                rows, columns = np.nonzero(near)
                mine = np.hypot(columns + 0.5 - u, rows + 0.5 - v) < 1.6 * radius
                if mine.sum() < 0.75 * np.pi * radius**2:
                    continue  # something stands before it
                # A sphere away from the axis is drawn longer than wide, its centre a little outwards.
                assert np.hypot((columns[mine] + 0.5).mean() - u, (rows[mine] + 0.5).mean() - v) < 0.6 + 0.06 * radius
                checked += 1
    assert checked >= 8


@pytest.mark.parametrize("index", [0, 1, 2])
def test_frames_agree_by_depth_and_camera(index: int) -> None:
    """Each frame is the first one seen from elsewhere: warped by depth, it agrees far better than unwarped."""
    made = example(7, index, "room", frames=5, size=64)
    assert made.camera is not None
    place, last = furnished(7, index, 5, 64)[0], 2
    k, pose = made.camera.intrinsics, made.camera.pose
    picture, depth = look(place, pose[last], k[last], 64)
    np.testing.assert_array_equal(picture, made.frames[last])
    u, v = np.meshgrid(np.arange(64) + 0.25, np.arange(64) + 0.25)
    rays = np.stack([(u - k[last, 0, 2]) / k[last, 0, 0], (v - k[last, 1, 2]) / k[last, 1, 1], np.ones_like(u)], -1)
    points = (rays * depth[..., None]) @ pose[last, :3, :3].T + pose[last, :3, 3]
    local = (points - pose[0, :3, 3]) @ pose[0, :3, :3]
    x = local[..., 0] / local[..., 2] * k[0, 0, 0] + k[0, 0, 2]
    y = local[..., 1] / local[..., 2] * k[0, 1, 1] + k[0, 1, 2]
    inside = (local[..., 2] > 0.1) & (x > 1) & (x < 63) & (y > 1) & (y < 63)
    assert inside.mean() > 0.3
    first = made.frames[0].astype(float)
    warped = np.stack(
        [map_coordinates(first[..., c], [y - 0.5, x - 0.5], order=1, mode="nearest") for c in range(3)], -1
    )
    # Half a pixel of the supersampled grid is left between the ray and the pixel's centre; so medians.
    with_camera = np.median(np.abs(warped - picture)[inside])
    assert with_camera <= 4
    assert np.mean(np.abs(warped - picture)[inside]) < 0.6 * np.mean(np.abs(first - picture)[inside]) + 1.0


def test_batches(rooms: Source, shapes: Source) -> None:
    reader = ClipReader(rooms, frames=5, size=(48, 64), camera=True, seed=2)
    samples = [reader.read(i, 100 + i) for i in range(3)]
    batch = collate_clips(samples, PowerScore(), seed=2, first_frame=0.5)
    assert isinstance(batch, World)
    assert batch.video is not None
    assert batch.video.shape == (3, 3, 5, 48, 64)
    assert float(batch.video.abs().max()) <= 1
    assert batch.pose.shape == (3, 5, 4, 4)
    assert batch.pose.dtype == torch.float64
    torch.testing.assert_close(batch.pose[:, 0], torch.eye(4, dtype=torch.float64).expand(3, 4, 4), rtol=0, atol=0)
    whole = read_camera(rooms.read(0, "camera"), 9)
    scale = 64 / 96  # the sides of the source are 96, its height is cropped to 72
    torch.testing.assert_close(
        batch.intrinsics[0, 0, :2, 2],
        torch.tensor([(whole.intrinsics[0, 0, 2]) * scale, (whole.intrinsics[0, 1, 2] - 12) * scale]),
    )
    assert batch.fps.tolist() == [16.0] * 3
    assert batch.key[0] == "train-000000.tar/00000000"
    plain = collate_clips([ClipReader(shapes, frames=9).read(0, 4)], PowerScore(), tell_motion=True)
    assert type(plain) is Clip
    motion = json.loads(shapes.read(0, "meta"))["motion"]
    assert plain.motion.tolist() == pytest.approx([motion])
    assert plain.caption[0].endswith(f" motion score: {int(motion)}.")
    coins = collate_clips([reader.read(0, p) for p in range(40)], PowerScore(), seed=2, first_frame=0.5).first_frame
    assert 8 < int(coins.sum()) < 32
    with pytest.raises(BadSample, match=r"train-000000.tar/00000000: corrupt clip: 9 frames, 10 asked"):
        ClipReader(rooms, frames=10).read(0, 0)


def test_motion_scores() -> None:
    assert motion_score({"motion": [1.0, 3.0]}) == 2.0
    assert np.isnan(motion_score({}))
    assert with_motion("a cat", float("nan")) == "a cat"
    assert with_motion("a cat", 7.9) == "a cat motion score: 7."


def test_filters(shapes: Source) -> None:
    scores = [json.loads(shapes.read(i, "meta"))["motion"] for i in range(len(shapes))]
    middle = float(np.median(scores))
    reader = ClipReader(shapes, frames=17, least_motion=middle)
    assert [reader.wanted(i) for i in range(len(shapes))] == [score >= middle for score in scores]
    assert not ClipReader(shapes, frames=18).wanted(0)


def test_shards_are_the_same_however_written(tmp_path: Path) -> None:
    def digests(folder: Path) -> dict[str, str]:
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}

    scenes = MovingSet(5, 1, "shapes", frames=5, size=32, shard_size=2)
    write_moving_shards(tmp_path / "a", scenes, progress=False)
    assert len(digests(tmp_path / "a")) == 3
    write_moving_shards(tmp_path / "b", scenes, progress=False)
    (tmp_path / "b" / "train-000001.tar").unlink()
    write_moving_shards(tmp_path / "b", scenes, progress=False)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    with pytest.raises(FileExistsError, match="frames is 5, asked 7"):
        write_moving_shards(tmp_path / "a", MovingSet(5, 1, "shapes", frames=7, size=32, shard_size=2), progress=False)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(FileExistsError, match="is not empty"):
        write_moving_shards(tmp_path / "other", scenes, progress=False)


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "scripts/make_shards.py", "moving", str(tmp_path / "m"), "--count", "3", "--seed", "1"]
    done = subprocess.run([*command, "--kind", "room", "--frames", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "3 clips in 1 shards" in done.stdout
    with tarfile.open(tmp_path / "m" / "train-000000.tar") as tar:
        assert tar.getnames()[:3] == ["00000000.json", "00000000.mp4", "00000000.camera.npz"]
        data = tar.extractfile("00000001.mp4").read()  # type: ignore[union-attr]
    assert io.BytesIO(data).read(8)[4:] == b"ftyp"
    done = subprocess.run([*command, "--size", "33"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
