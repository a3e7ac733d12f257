"""How images come to Inception's 299 pixels. Tools differ here, and FID of the same images with them.

Every function takes one uint8 (h, w, 3) image and gives (3, 299, 299) float32 in [-1, 1].

============  ==============================================================================================
clean         clean-fid (Parmar et al. 2022): PIL's bicubic filter with antialiasing on float channels, not rounded
              again; (x - 128) / 128
pytorch-fid   pytorch-fid and SANA's own toolkit: bilinear without antialiasing on [0, 1], then 2 x - 1; `size` first
              brings the shorter side to that many pixels (PIL's bilinear filter, rounded to bytes) and crops the centre
torchmetrics  torchmetrics' default: bilinear with antialiasing on bytes; (x - 128) / 128
tensorflow    torch-fidelity and the first implementation: TensorFlow 1's bilinear, whose pixels sit on corners;
              (x - 128) / 128
============  ==============================================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIDE = 299
Mode = Literal["clean", "pytorch-fid", "torchmetrics", "tensorflow"]


def clean(image: NDArray[np.uint8]) -> Tensor:
    """clean-fid's own resizer (the package's function)."""
    from cleanfid.resize import build_resizer

    return torch.from_numpy(build_resizer("clean")(image)).permute(2, 0, 1).sub(128).div(128)


def pytorch_fid(image: NDArray[np.uint8]) -> Tensor:
    """Bilinear interpolation without antialiasing, whatever the scale."""
    x = _tensor(image) / 255
    return 2 * F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False)[0] - 1


def torchmetrics(image: NDArray[np.uint8]) -> Tensor:
    """Bilinear interpolation with antialiasing."""
    x = F.interpolate(_tensor(image), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return ((x - 128) / 128)[0]


def tensorflow(image: NDArray[np.uint8]) -> Tensor:
    """TensorFlow 1's ``resize_bilinear`` (align_corners=False): output pixel i lies at i times the scale."""
    x = _tensor(image)
    for dim in (2, 3):
        n = x.shape[dim]
        place = torch.arange(SIDE, dtype=torch.float32) * (n / SIDE)
        low = place.floor().long().clamp_max(n - 1)
        high = (low + 1).clamp_max(n - 1)
        share = (place - low).view(-1, *[1] * (3 - dim))
        below, above = x.index_select(dim, low), x.index_select(dim, high)
        x = below + (above - below) * share
    return ((x - 128) / 128)[0]


def shrink(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shorter side to `size` pixels by PIL's bilinear filter, then the centre `size` x `size`, as torchvision does."""
    h, w = image.shape[:2]
    short = min(h, w)
    new_h, new_w = (size if side == short else int(size * side / short) for side in (h, w))
    picture = Image.fromarray(image)
    if (new_h, new_w) != (h, w):
        picture = picture.resize((new_w, new_h), Image.Resampling.BILINEAR)
    top, left = round((new_h - size) / 2), round((new_w - size) / 2)
    return np.asarray(picture.crop((left, top, left + size, top + size)))


RESIZERS: dict[str, Callable[[NDArray[np.uint8]], Tensor]] = {
    "clean": clean,
    "pytorch-fid": pytorch_fid,
    "torchmetrics": torchmetrics,
    "tensorflow": tensorflow,
}
assert set(RESIZERS) == set(get_args(Mode))


def _tensor(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
