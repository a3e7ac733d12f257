"""The sizes on which SANA was trained: for each nominal resolution, one height and width per aspect ratio.

Source: the bins of the published pipelines (the same in PixArt-sigma and diffusers). All have about the area of the
nominal square; those of 512, 2048 and 4096 px are those of 1024 px, halved, doubled and quadrupled.
"""

from __future__ import annotations

from collections.abc import Mapping

RATIOS_1024: Mapping[str, tuple[int, int]] = {
    "0.25": (512, 2048), "0.26": (512, 1984), "0.27": (512, 1920), "0.28": (512, 1856), "0.32": (576, 1792),
    "0.33": (576, 1728), "0.35": (576, 1664), "0.40": (640, 1600), "0.42": (640, 1536), "0.48": (704, 1472),
    "0.50": (704, 1408), "0.52": (704, 1344), "0.57": (768, 1344), "0.60": (768, 1280), "0.68": (832, 1216),
    "0.72": (832, 1152), "0.78": (896, 1152), "0.82": (896, 1088), "0.88": (960, 1088), "0.94": (960, 1024),
    "1.0": (1024, 1024), "1.07": (1024, 960), "1.13": (1088, 960), "1.21": (1088, 896), "1.29": (1152, 896),
    "1.38": (1152, 832), "1.46": (1216, 832), "1.67": (1280, 768), "1.75": (1344, 768), "2.0": (1408, 704),
    "2.09": (1472, 704), "2.4": (1536, 640), "2.5": (1600, 640), "2.89": (1664, 576), "3.0": (1728, 576),
    "3.11": (1792, 576), "3.62": (1856, 512), "3.75": (1920, 512), "3.88": (1984, 512), "4.0": (2048, 512),
}  # fmt: skip
"""Ratio height / width, rounded as published -> (height, width) at 1024 px. All 40, on which was trained."""

TRAINED_ONLY = frozenset({"0.26", "0.27", "2.89", "3.11", "3.62", "3.75", "3.88"})
"""Ratios of 512 and 1024 px that the published pipelines do not draw; at 2048 and 4096 px they draw all 40."""

NOMINAL = (512, 1024, 2048, 4096)


def sampling_bins(size: int) -> dict[float, tuple[int, int]]:
    """Ratio height / width -> (height, width) in pixels, those that are drawn at a nominal size.

    Raises:
        ValueError: no bins were published for this size.
    """
    if size not in NOMINAL:
        raise ValueError(f"bins: none are published for {size} px, only for {', '.join(map(str, NOMINAL))}")
    dropped = TRAINED_ONLY if size <= 1024 else frozenset()
    return {
        float(ratio): (h * size // 1024, w * size // 1024)
        for ratio, (h, w) in RATIOS_1024.items()
        if ratio not in dropped
    }


def nearest_bin(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of the bin whose ratio is nearest to that of the request, by absolute difference of h / w.

    Args:
        height, width: of the request, in pixels; only their ratio counts.
        size: nominal resolution of the model: 512, 1024, 2048 or 4096.

    Raises:
        ValueError: a side is not positive, or no bins were published for this size.
    """
    if height < 1 or width < 1:
        raise ValueError(f"the size must be positive, got {height}x{width}")
    bins = sampling_bins(size)
    return bins[min(bins, key=lambda ratio: abs(ratio - height / width))]


def drawn_size(height: int, width: int, size: int, multiple: int, bins: bool) -> tuple[int, int]:
    """(height, width) in pixels to draw for a request: that of the nearest published bin, or the request itself.

    Args:
        height, width: asked for.
        size: nominal resolution of the model; bins are published for 512, 1024, 2048 and 4096.
        multiple: pixels per token side.
        bins: whether to go by bins where there are some.

    Raises:
        ValueError: without bins, a side is no multiple; the message has the nearest that is.
    """
    if min(height, width) < 1:
        raise ValueError(f"a size of {width}x{height} cannot be drawn; both sides have to be positive")
    if bins and size in NOMINAL:
        return nearest_bin(height, width, size)
    if height % multiple or width % multiple:
        near = (max(multiple, round(side / multiple) * multiple) for side in (width, height))
        raise ValueError(
            f"{width}x{height} pixels cannot be drawn: this model draws multiples of {multiple}, "
            f"such as {'x'.join(map(str, near))}"
        )
    return height, width
