"""Ways to lessen the error of int8 and NVFP4 layers, each in float64 from its formula; writes ways.json.

``OMP_NUM_THREADS=1 python experiments/quant_formats/ways.py``. Layers of 1152 inputs and 256 outputs, 200 tokens, both
Gaussian, with three channels of the tokens multiplied by 1, 10 or 50; the mean of three seeds. Errors are relative, in
the Frobenius norm. No code of `sana.quant` is used: its tests hold the layers against these formulas.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor], Tensor]
SEEDS, OUTLIERS = (0, 1, 2), (1, 10, 50)
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)  # of E2M1
SCALES = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # its normal numbers, in order
ALL = range(-8, 9)  # an octave in either direction


def rotated(x: Tensor, block: int) -> Tensor:
    """Every block of channels times Hadamard's matrix."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return (x.unflatten(1, (-1, block)) @ (h / block**0.5)).flatten(1)


def int8(x: Tensor) -> Tensor:
    """Rows in int8."""
    scale = x.abs().amax(dim=-1, keepdim=True) / 127.5
    return (x / scale).round().clamp(-128, 127) * scale


def int8_groups(x: Tensor, group: int) -> Tensor:
    """Groups of a row in int8."""
    return int8(x.unflatten(1, (-1, group))).flatten(1)


def smoothed(a: float, b: float) -> Product:
    """W8A8 with a scale per channel, max |x|^a / max |w|^b."""

    def product(x: Tensor, w: Tensor) -> Tensor:
        scale = x.abs().amax(dim=0) ** a / w.abs().amax(dim=0) ** b
        return int8(x / scale) @ int8(w * scale).mT

    return product


def both(change: Callable[[Tensor], Tensor]) -> Product:
    """The product with both sides changed."""
    return lambda x, w: change(x) @ change(w).mT


def nvfp4(x: Tensor, steps: Sequence[int], room: float, rows: bool) -> Tensor:
    """Blocks of 16 in E2M1, each with that e4m3 scale among the neighbours `steps` of max / 6 that errs least."""
    largest = x.abs().amax(dim=1, keepdim=True) if rows else x.abs().amax().view(1, 1)
    unit = (largest / (6 * room)).unsqueeze(2)
    blocks = x.unflatten(1, (-1, 16))
    wanted = blocks.abs().amax(dim=2, keepdim=True) / 6 / unit
    nearest = torch.bucketize(wanted, (SCALES[1:] + SCALES[:-1]) / 2)
    return least([SCALES[(nearest + step).clamp(0, len(SCALES) - 1)] * unit for step in steps], blocks)


def nvfp4_free(x: Tensor, count: int = 60) -> Tensor:
    """The same with scales that need not be e4m3: a fine grid of them."""
    blocks = x.unflatten(1, (-1, 16))
    plain = blocks.abs().amax(dim=2, keepdim=True) / 6
    return least([plain * float(r) for r in torch.logspace(-0.35, 0.3, count)], blocks)


def least(scales: Sequence[Tensor], blocks: Tensor) -> Tensor:
    """Blocks rounded with the best of their scales."""
    found, best = torch.zeros_like(blocks), torch.full_like(blocks[..., :1], torch.inf)
    for scale in scales:
        tried = LEVELS[torch.bucketize(blocks.abs() / scale, (LEVELS[1:] + LEVELS[:-1]) / 2)] * blocks.sign() * scale
        error = (tried - blocks).square().sum(dim=2, keepdim=True)
        found, best = torch.where(error < best, tried, found), torch.minimum(error, best)
    return found.flatten(1)


def w4a4(weight: Sequence[int], token: Sequence[int], room: float = 256.0, block: int = 1) -> Product:
    """NVFP4 on both sides."""
    return lambda x, w: (
        nvfp4(rotated(x, block), token, room, rows=True) @ nvfp4(rotated(w, block), weight, room, rows=False).mT
    )


WAYS: dict[str, Product] = {
    "int8": both(int8),
    **{f"int8, rotated by {n}": both(lambda x, n=n: int8(rotated(x, n))) for n in (16, 32, 64, 128)},
    "int8, smoothed by weights, max|w|^-1/2": smoothed(0, 0.5),
    "int8, smoothed by tokens, max|x|^1/2": smoothed(0.5, 0),
    "int8, smoothed by both": smoothed(0.5, 0.5),
    **{f"int8, scales per {n} inputs": both(lambda x, n=n: int8_groups(x, n)) for n in (64, 128, 384)},
    "nvfp4": w4a4([0], [0], 448),
    "nvfp4, rotated by 16": w4a4([0], [0], 448, 16),
    "nvfp4, rotated by 128": w4a4([0], [0], 448, 128),
    "nvfp4, tensor scale for blocks of 256": w4a4([0], [0]),
    "nvfp4, 6 or 4": w4a4([0, 5], [0, 5]),
    "nvfp4, 6 or 4, tensor scale for blocks of 448": w4a4([0, 5], [0, 5], 448),
    "nvfp4, 17 scales for weights, 6 or 4 for tokens": w4a4(ALL, [0, 5]),
    "nvfp4, 17 scales for weights, 3 for tokens": w4a4(ALL, [0, -1, 5]),
    "nvfp4, 12 scales for weights, 3 for tokens": w4a4(range(-4, 8), [0, -1, 5]),
    "nvfp4, the same rotated by 128": w4a4(range(-4, 8), [0, -1, 5], 256, 128),
    "nvfp4, 17 scales for both": w4a4(ALL, ALL),
    "nvfp4, scales of any size for both": both(nvfp4_free),
    "nvfp4, weights only": lambda x, w: x @ nvfp4(w, [0], 448, rows=False).mT,
    "nvfp4, weights only, 12 scales": lambda x, w: x @ nvfp4(w, range(-4, 8), 256, rows=False).mT,
}


def main() -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    results: dict[str, dict[str, float]] = {name: {} for name in WAYS}
    for outlier in OUTLIERS:
        for seed in SEEDS:
            torch.manual_seed(seed)
            w, x = torch.randn(256, 1152).double(), torch.randn(200, 1152).double()
            x[:, torch.randperm(1152)[:3]] *= outlier
            y = x @ w.mT
            for name, way in WAYS.items():
                error = ((way(x, w) - y).norm() / y.norm()).item()
                results[name][str(outlier)] = results[name].get(str(outlier), 0.0) + error / len(SEEDS)
    for name, errors in results.items():
        print(f"| {name} |", " | ".join(f"{error:.2%}" for error in errors.values()), "|")
    path = Path(__file__).with_name("ways.json")
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
