"""Cameras: poses and intrinsics through files, relative frames, resizing and cropping."""

from __future__ import annotations

import io

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from sana.data.video import covering_box
from sana.data.world import Camera, read_camera, write_camera


def some_camera(seed: int, frames: int = 7) -> Camera:
    rng = np.random.default_rng(seed)
    pose = np.tile(np.eye(4), (frames, 1, 1))
    pose[:, :3, :3] = Rotation.random(frames, random_state=seed).as_matrix()
    pose[:, :3, 3] = rng.normal(size=(frames, 3)) * 3
    k = np.tile(np.eye(3), (frames, 1, 1))
    k[:, 0, 0], k[:, 1, 1] = rng.uniform(40, 90, (2, frames))
    k[:, 0, 2], k[:, 1, 2] = rng.uniform(20, 40, (2, frames))
    return Camera(pose, k)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_file_and_back(seed: int) -> None:
    camera = some_camera(seed)
    data = write_camera(camera)
    assert data == write_camera(camera)
    again = read_camera(data, 7)
    np.testing.assert_array_equal(again.pose, camera.pose)
    np.testing.assert_array_equal(again.intrinsics, camera.intrinsics)


def test_accepts_every_form_of_intrinsics() -> None:
    camera = some_camera(3)
    four = camera.intrinsics[:, [0, 1, 0, 1], [0, 1, 2, 2]]
    for given, expected in (
        (four, camera.intrinsics),
        (four[0], np.tile(camera.intrinsics[0], (7, 1, 1))),
        (camera.intrinsics[0], np.tile(camera.intrinsics[0], (7, 1, 1))),
    ):
        buffer = io.BytesIO()
        np.savez(buffer, pose=camera.pose.astype(np.float32), intrinsics=given)
        np.testing.assert_allclose(read_camera(buffer.getvalue(), 7).intrinsics, expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_relative_poses_keep_what_is_seen(seed: int) -> None:
    camera = some_camera(seed)
    relative = camera.relative()
    np.testing.assert_array_equal(relative.pose[0], np.eye(4))
    points = np.random.default_rng(seed).normal(size=(20, 3)) * 5
    moved = (points - camera.pose[0, :3, 3]) @ camera.pose[0, :3, :3]  # the same points in the first camera's axes
    for ours, theirs in zip(relative.project(moved), camera.project(points), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_projection_against_scipy_rotations() -> None:
    """X = R^T (p - o) written with scipy's quaternions, and K applied by hand."""
    camera = some_camera(5)
    points = np.random.default_rng(5).normal(size=(9, 3)) * 4
    pixels, depth = camera.project(points)
    for f in range(7):
        local = Rotation.from_matrix(camera.pose[f, :3, :3]).inv().apply(points - camera.pose[f, :3, 3])
        k = camera.intrinsics[f]
        u = k[0, 0] * local[:, 0] / local[:, 2] + k[0, 2]
        v = k[1, 1] * local[:, 1] / local[:, 2] + k[1, 2]
        np.testing.assert_allclose(pixels[f], np.stack([u, v], axis=1), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(depth[f], local[:, 2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "to"), [((64, 48), (32, 32)), ((65, 37), (40, 56)), ((30, 50), (61, 33))])
def test_intrinsics_follow_resize_and_crop(size: tuple[int, int], to: tuple[int, int]) -> None:
    """A pixel of the source and the pixel it becomes: project, then scale and shift, as a ruler would."""
    camera = some_camera(2)
    box = covering_box(*size, *to)
    points = np.random.default_rng(0).normal(size=(15, 3)) * 4
    before, _ = camera.project(points)
    after, _ = camera.resized(box, *to).project(points)
    scale = max(to[0] / size[0], to[1] / size[1])
    expected = (before - np.array(size) / 2) * scale + np.array(to) / 2  # about the centre, equal in both directions
    np.testing.assert_allclose(after, expected, rtol=1e-9, atol=1e-7)


def test_what_is_no_camera_is_refused() -> None:
    camera = some_camera(0)
    with pytest.raises(ValueError, match=r"poses are \(7, 4, 4\), expected \(9, 4, 4\)"):
        read_camera(write_camera(camera), 9)
    mirrored = camera.pose.copy()
    mirrored[3, :3, 0] *= -1
    with pytest.raises(ValueError, match="pose 3 is no rotation"):
        read_camera(write_camera(Camera(mirrored, camera.intrinsics)), 7)
    with pytest.raises(ValueError, match="not finite"):
        read_camera(write_camera(Camera(camera.pose * np.nan, camera.intrinsics)), 7)
    with pytest.raises(ValueError, match="focal lengths must be positive"):
        read_camera(write_camera(Camera(camera.pose, -camera.intrinsics)), 7)
    with pytest.raises(ValueError, match="no readable npz"):
        read_camera(b"PK nothing", 7)
    buffer = io.BytesIO()
    np.savez(buffer, pose=camera.pose)
    with pytest.raises(ValueError, match="camera has no 'intrinsics"):
        read_camera(buffer.getvalue(), 7)
    buffer = io.BytesIO()
    np.savez(buffer, pose=np.array([{"a": 1}], object), intrinsics=camera.intrinsics)
    with pytest.raises(ValueError, match="pickle"):
        read_camera(buffer.getvalue(), 7)
