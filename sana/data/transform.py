"""From the size of an image file to the size of its bucket."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate


def scaled_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """(height, width) of an image scaled until it just covers another size: one side equal, the other cut to an
    integer, as in the published code, which computes in floating point and so lacks a pixel now and then."""
    if to_height * width >= to_width * height:
        return to_height, to_height * width // height
    return to_width * height // width, to_width


def resize_and_crop(pixels: np.ndarray, height: int, width: int, *, lanczos: bool = False) -> np.ndarray:
    """Scale an image until it just covers a size, and cut out the middle.

    Bicubically by torch's kernel for bytes, which has Pillow's filter and about four times its speed; its weights have
    16 bits, so one value in a hundred is another than Pillow's, by one, seldom two of 255 levels.

    Args:
        pixels: uint8 (H, W, 3).
        height, width: of the result, positive.
        lanczos: Lanczos, by Pillow, instead of bicubic; both with antialiasing.

    Returns:
        uint8 (height, width, 3), perhaps a read-only view.
    """
    h, w = pixels.shape[:2]
    scaled_h, scaled_w = scaled_size(h, w, height, width)
    if (scaled_h, scaled_w) != (h, w):
        pixels = (_lanczos if lanczos else _bicubic)(pixels, scaled_h, scaled_w)
    # torchvision's CenterCrop rounds halves to even.
    top, left = round((scaled_h - height) / 2), round((scaled_w - width) / 2)
    return pixels[top : top + height, left : left + width]


def _bicubic(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    if not pixels.flags.writeable:  # torch would warn
        pixels = pixels.copy()
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return interpolate(image, (height, width), mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()


def _lanczos(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
