"""From the size of an image file to the size of its bucket."""

from __future__ import annotations

import numpy as np
from PIL import Image


def scaled_size(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """(height, width) of an image scaled until it just covers another size: one side equal, the other cut to an
    integer, as in the published code, which computes in floating point and so lacks a pixel now and then."""
    if to_height * width >= to_width * height:
        return to_height, to_height * width // height
    return to_width * height // width, to_width


def resize_and_crop(picture: Image.Image, height: int, width: int, *, lanczos: bool = False) -> np.ndarray:
    """Scale an image until it just covers a size, and cut out the middle.

    Args:
        picture: of mode RGB.
        height, width: of the result, positive.
        lanczos: Lanczos instead of bicubic; both with antialiasing.

    Returns:
        uint8 (height, width, 3), perhaps read-only.
    """
    w, h = picture.size
    scaled_h, scaled_w = scaled_size(h, w, height, width)
    if (scaled_h, scaled_w) != (h, w):
        resample = Image.Resampling.LANCZOS if lanczos else Image.Resampling.BICUBIC
        picture = picture.resize((scaled_w, scaled_h), resample)
    # torchvision's CenterCrop rounds halves to even.
    top, left = round((scaled_h - height) / 2), round((scaled_w - width) / 2)
    return np.asarray(picture)[top : top + height, left : left + width]
