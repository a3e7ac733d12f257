"""Cameras of clips: one pose and one matrix of intrinsics per frame, as a small npz beside the mp4.

Conventions as in `sana.types.World`: camera to world, OpenCV axes, pixels of the source picture with the centre of the
first at (0.5, 0.5). Poses are kept in float64: rounding them to bf16 turns rays by up to 0.17 degrees.
"""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass

import numpy as np

MAX_BYTES = 64 << 20  # of an unpacked array; 100,000 frames need 20 MB
_ORTHONORMAL = 1e-3  # published poses are stored in float32 and chained


@dataclass(frozen=True)
class Camera:
    """The camera of each of f frames.

    Attributes:
        pose: (f, 4, 4) float64 camera to world.
        intrinsics: (f, 3, 3) float64, pixels.
    """

    pose: np.ndarray
    intrinsics: np.ndarray

    def __len__(self) -> int:
        return len(self.pose)

    def at(self, index: np.ndarray) -> Camera:
        """The cameras of some frames."""
        return Camera(self.pose[index], self.intrinsics[index])

    def relative(self) -> Camera:
        """The same path seen from the first frame, whose pose becomes exactly the identity; lengths stay."""
        pose = np.linalg.inv(self.pose[0]) @ self.pose
        pose[:, 3] = (0.0, 0.0, 0.0, 1.0)
        pose[0] = np.eye(4)
        return Camera(pose, self.intrinsics)

    def resized(self, box: tuple[float, float, float, float], width: int, height: int) -> Camera:
        """Intrinsics after the part `box` (left, top, right, bottom) of the picture became width x height pixels."""
        left, top, right, bottom = box
        scale = np.array([width / (right - left), height / (bottom - top)])
        intrinsics = self.intrinsics.copy()
        intrinsics[:, :2, 2] -= (left, top)
        intrinsics[:, :2] *= scale[:, None]
        return Camera(self.pose, intrinsics)

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where points of the world (n, 3) are seen: pixels (f, n, 2), and depths along the axis (f, n).

        A point behind the camera has a depth that is not positive, and pixels without meaning.
        """
        rotation, origin = self.pose[:, :3, :3], self.pose[:, :3, 3]
        local = (points[None] - origin[:, None]) @ rotation
        with np.errstate(divide="ignore", invalid="ignore"):
            pixels = local @ self.intrinsics.transpose(0, 2, 1) / local[..., 2:]
        return pixels[..., :2], local[..., 2]


def write_camera(camera: Camera) -> bytes:
    """The npz of a camera: float64 arrays "pose" (f, 4, 4) and "intrinsics" (f, 3, 3); the same bytes each time."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, array in (("pose", camera.pose), ("intrinsics", camera.intrinsics)):
            body = io.BytesIO()
            np.lib.format.write_array(body, np.ascontiguousarray(array, np.float64), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), body.getvalue())  # its time is 1980, not now
    return buffer.getvalue()


def read_camera(data: bytes, frames: int) -> Camera:
    """Cameras of a video from an npz.

    Args:
        data: npz with "pose" (F, 4, 4) camera to world, and "intrinsics": (F, 3, 3) or (F, 4) = fx, fy, cx, cy, or one
            (3, 3) or (4,) for all frames.
        frames: F, the number of frames of the video.

    Raises:
        ValueError: arrays are missing, of another shape or length, not finite, or no camera.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist()}
            if max(sizes.values(), default=0) > MAX_BYTES:
                raise ValueError(f"camera of more than {MAX_BYTES} bytes")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name], np.float64) for name in ("pose", "intrinsics")}
    except KeyError as error:
        raise ValueError(f"camera has no {str(error.args[0]).split()[0]!r}; expected 'pose' and 'intrinsics'") from None
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ValueError(f"camera is no readable npz: {error}") from error
    return check_camera(found["pose"], found["intrinsics"], frames)


def check_camera(pose: np.ndarray, intrinsics: np.ndarray, frames: int) -> Camera:
    """A camera from arrays as in `read_camera`, checked; raises `ValueError`."""
    if pose.shape != (frames, 4, 4):
        raise ValueError(f"poses are {pose.shape}, expected {(frames, 4, 4)}: one per frame of the video")
    full = _matrices(intrinsics, frames)
    if not (np.isfinite(pose).all() and np.isfinite(full).all()):
        raise ValueError("camera has numbers that are not finite")
    rotation = pose[:, :3, :3]
    off = np.abs(rotation @ rotation.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    wrong = (off > _ORTHONORMAL) | (np.linalg.det(rotation) < 0)
    wrong |= np.abs(pose[:, 3] - (0.0, 0.0, 0.0, 1.0)).max(axis=1) > _ORTHONORMAL
    if wrong.any():
        raise ValueError(f"pose {int(np.flatnonzero(wrong)[0])} is no rotation and translation (4x4, camera to world)")
    if not (full[:, [0, 1], [0, 1]] > 0).all():
        raise ValueError("focal lengths must be positive")
    return Camera(pose, full)


def _matrices(intrinsics: np.ndarray, frames: int) -> np.ndarray:
    """(F, 3, 3) from any of the accepted shapes."""
    if intrinsics.shape[-1:] == (4,):
        fx, fy, cx, cy = np.moveaxis(intrinsics, -1, 0)
        zero, one = np.zeros_like(fx), np.ones_like(fx)
        rows = [[fx, zero, cx], [zero, fy, cy], [zero, zero, one]]
        intrinsics = np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)
    if intrinsics.shape == (3, 3):
        intrinsics = np.broadcast_to(intrinsics, (frames, 3, 3)).copy()
    if intrinsics.shape != (frames, 3, 3):
        raise ValueError(f"intrinsics are {intrinsics.shape}, expected (3, 3) or (4,), for all or for each of {frames}")
    return intrinsics
