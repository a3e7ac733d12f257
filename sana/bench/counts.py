"""What the work of a network or autoencoder consists of: kernels with their operations and bytes, counted by hand.

A forward of the network, in values read and written per token and channel of a layer (the plan of performance, A2):
modulated norm 2, qkv 4, sums of the attention 2, answers 2, projection 2, gated residual 3, queries 2, softmax
attention 2, projection 2, residual and modulated norm 4, expansion 6, depthwise convolution and gate 7.5, point 3.5,
gated residual 3. Where the residuals are fused into the products before them, 40 of these 45 remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sana.bench.parts import Size, our_autoencoder
from sana.bench.roofline import Rates
from sana.encoder.autoencoder.blocks import RMSNorm2d

H200 = Rates(790e12, 4.3e12)
"""Measured on such a card: a bf16 product of 8192 cubed on random data, and a copy."""
PEAK = 989e12
"""Dense bf16 of an H100 or H200 by its datasheet, which utilisation refers to."""
LAUNCH = 2e-6  # seconds between two kernels of a CUDA graph
UNITS = 132  # multiprocessors of an H100 or H200
TILES = ((128, 256), (256, 128), (128, 192), (128, 128), (64, 256), (64, 128))


@dataclass(frozen=True)
class Kernel:
    """One kind of launch.

    Attributes:
        name: for people.
        flops, bytes: of one launch.
        product: rows, columns and depth, where it is a matrix product (or a convolution as one).
        times: how often it is launched.
    """

    name: str
    flops: float
    bytes: float
    product: tuple[int, int, int] | None = None
    times: int = 1


def matrix(name: str, m: int, n: int, k: int, itemsize: int, times: int = 1) -> Kernel:
    """(m, k) by (k, n)."""
    return Kernel(name, 2.0 * m * n * k, itemsize * (m * k + k * n + m * n), (m, n, k), times)


def passing(name: str, values: float, itemsize: int, times: int = 1, flops: float = 0.0) -> Kernel:
    """A kernel that reads and writes so many values."""
    return Kernel(name, flops, values * itemsize, None, times)


def network_kernels(size: Size, tokens: int, text: int, batch: int, itemsize: int, reuse: bool = False) -> list[Kernel]:
    """One forward of `Sana` as its Triton kernels run it.

    Args:
        size: of the network.
        tokens, text: per sample.
        batch: samples.
        itemsize: bytes of a value.
        reuse: the caption's keys and values are there already.
    """
    c, depth, n = size.width, size.depth, tokens * batch
    hidden = int(2.5 * c)
    norms = [passing("q/k norm", 2 * n * c, itemsize, 3 * depth)] if size.qk_norm else []
    kernels = [
        passing("norm", 2 * n * c, itemsize, depth),
        matrix("qkv", n, 3 * c, c, itemsize, depth),
        *norms,
        passing("attention sums", 2 * n * c, itemsize, depth, 66.0 * n * c),
        passing("attention answers", 2 * n * c, itemsize, depth, 66.0 * n * c),
        matrix("proj", n, c, c, itemsize, depth),
        passing("gated residual", 3 * n * c, itemsize, depth),
        matrix("cross q", n, c, c, itemsize, depth),
        passing("softmax attention", 2 * n * c + 2 * batch * text * c, itemsize, depth, 4.0 * n * text * c),
        matrix("cross proj", n, c, c, itemsize, depth),
        passing("residual, norm", 4 * n * c, itemsize, depth),
        matrix("expand", n, 2 * hidden, c, itemsize, depth),
        passing("depthwise, gate", 3 * n * hidden, itemsize, depth, 36.0 * n * hidden),
        matrix("point", n, c, hidden, itemsize, depth),
        passing("gated residual", 3 * n * c, itemsize, depth),
        matrix("patches", n, c, 32, itemsize),
        passing("final norm", 2 * n * c, itemsize),
        matrix("final", n, 32, c, itemsize),
        matrix("time", batch, 6 * c, c, itemsize, 2),
        passing("small", batch * 6 * c, itemsize, 12),
    ]
    if not reuse:
        rows = text * batch
        kernels += [
            matrix("caption", rows, c, size.text_channels, itemsize),
            matrix("caption", rows, c, c, itemsize),
            passing("caption", 2 * rows * c, itemsize, 2),
            matrix("keys, values", rows, 2 * c, c, itemsize, depth),
        ]
    return kernels


def backward_kernels(kernels: Iterable[Kernel]) -> list[Kernel]:
    """What follows a forward of these: two products for each, twice the traffic of each pass."""
    back = []
    for one in kernels:
        if one.product is None:
            back.append(Kernel(one.name, 2 * one.flops, 2 * one.bytes, None, one.times))
            continue
        m, n, k = one.product
        back += [Kernel(one.name, one.flops, one.bytes, shape, one.times) for shape in ((m, k, n), (k, n, m))]
    return back


@cache
def decoder_kernels(size: Size, px: int, batch: int, itemsize: int) -> tuple[Kernel, ...]:
    """One decode of `DCAE`: its convolutions, its norms (with activation and residual fused), its attentions.

    Shapes are read from a decode of fake tensors.
    """
    kernels: list[Kernel] = []

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        x = inputs[0]
        if isinstance(module, nn.Conv2d):
            taps = math.prod(module.kernel_size) * module.in_channels // module.groups
            pixels, values = out.numel() // out.shape[1], x.numel() + out.numel() + module.weight.numel()
            shape = (pixels, out.shape[1], taps) if module.groups == 1 else None
            flops = 2.0 * pixels * module.out_channels * taps  # a gate may follow, which halves the channels
            kernels.append(Kernel("convolution", flops, values * itemsize, shape))
        else:
            kernels.append(passing("norm", 3 * out.numel(), itemsize))

    with FakeTensorMode(), torch.no_grad():
        autoencoder = our_autoencoder(size, torch.bfloat16, torch.device("cpu"))
        for module in autoencoder.modules():
            if isinstance(module, nn.Conv2d | RMSNorm2d):
                module.register_forward_hook(seen)
        autoencoder.decode(torch.empty(batch, 32, px // 32, px // 32, dtype=torch.bfloat16))
    return tuple(kernels)


def text_kernels(layers: int, tokens: int, batch: int, itemsize: int) -> list[Kernel]:
    """Gemma-2-2b of so many layers: width 2304, 8 heads of 256, 4 of keys, hidden width 9216."""
    n, width, hidden = tokens * batch, 2304, 9216
    return [
        matrix("q", n, 2048, width, itemsize, layers),
        matrix("k, v", n, 1024, width, itemsize, 2 * layers),
        passing("attention", 4 * n * 2048, itemsize, 8 * layers, 4.0 * n * tokens * 2048 / 8),
        matrix("proj", n, width, 2048, itemsize, layers),
        matrix("gate, up", n, hidden, width, itemsize, 2 * layers),
        matrix("down", n, width, hidden, itemsize, layers),
        passing("norms, residuals, gate", 3 * n * width, itemsize, 8 * layers),
    ]


def floor(kernels: Iterable[Kernel], rates: Rates = H200) -> float:
    """Seconds, at least: every kernel takes the longer of its operations at the product's rate and its bytes; gated
    residuals are thought of as fused into the products before them."""
    return sum(one.times * rates.seconds(one.flops, one.bytes) for one in kernels if one.name != "gated residual")


def predicted(kernels: Iterable[Kernel], rates: Rates = H200, launch: float = LAUNCH) -> float:
    """Seconds that these kernels should take in a CUDA graph.

    Products come in tiles, one per multiprocessor at a time, so that the last round may be half empty; of the usual
    tiles the best is taken. Each kernel begins `launch` after the one before it has ended.
    """
    total = 0.0
    for one in kernels:
        flops = one.flops if one.product is None else one.flops * _rounds(*one.product)
        total += one.times * (rates.seconds(flops, one.bytes) + launch)
    return total


def _rounds(m: int, n: int, k: int) -> float:
    """Time of a product in tiles over its time if all multiprocessors were busy to the end."""
    whole = m * n / UNITS
    cost = min(math.ceil(math.ceil(m / a) * math.ceil(n / b) / UNITS) * a * b for a, b in TILES)
    if whole < min(a * b for a, b in TILES):  # fewer tiles than multiprocessors: the depth is split among them too
        cost = min(cost, whole * max(1.0, 1024 / k) * 1.5)
    return max(1.0, cost / whole)
